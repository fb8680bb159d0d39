"""Edit ONNX files: take a part, show inner tensors, change nodes, and give a fused file that was edited elsewhere its metadata again.

A fused file stays one: its metadata is kept, `verify` and `detect` take further outputs, and a change of the graph marks it as unverified.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusenms import contract
from fusenms.artifacts.fused import check_graph, load_fused
from fusenms.errors import SourceError, VerificationError
from fusenms.layout import Layout
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading import untrusted
from fusenms.onnx_reading.files import read_metadata, read_onnx
from fusenms.onnx_reading.metadata import read_json
from fusenms.safety.files import check_writable, copy_beside, write_atomically
from fusenms.verification.checks import verify

if TYPE_CHECKING:
    import onnx

    from fusenms.graph.editing import Op

PathLike = str | os.PathLike[str]


def expose(path: PathLike, tensors: Sequence[str], output: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> Path:
    """Write a file with inner tensors as further outputs, and return its path. A fused file stays verified: nothing else changes.

    Args:
        path: an `.onnx` file, raw or fused.
        tensors: names of tensors outside of subgraphs.
        output: the file to write.

    Raises:
        ConfigError: there is no such tensor.
        SourceError: a file cannot be read or written.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> shown = fusenms.expose(path, fusenms.load_fused(path).layout.tensors, "shown.onnx")
        >>> len(fusenms.inspect(shown).outputs), bool(fusenms.verify(fusenms.load_fused(shown)))
        (6, True)
    """
    from fusenms.graph.editing import exposed

    source, target, model = _opened(path, output, limits)
    with untrusted(source, "showing its tensors"):
        return _written(target, exposed(model, tensors), source, limits)


def extract(
    path: PathLike, inputs: Sequence[str], outputs: Sequence[str], output: PathLike, *, limits: Limits = DEFAULT_LIMITS
) -> Path:
    """Write the part of a file from some tensors to others, and return its path.

    Metadata is kept, but for what fusenms says of a fused file, which a part no longer is.

    Args:
        path: an `.onnx` file, raw or fused.
        inputs, outputs: names of tensors outside of subgraphs. The outputs may depend on nothing but the inputs.
        output: the file to write.

    Raises:
        ConfigError: there is no such tensor, or the inputs are too few or too many.
        SourceError: a file cannot be read or written.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> head = fusenms.load_fused(path).layout.tensors
        >>> part = fusenms.extract(path, ["images"], head, "network.onnx")
        >>> [tensor.name for tensor in fusenms.inspect(part).outputs] == list(head)
        True
    """
    from fusenms.graph.editing import extracted

    source, target, model = _opened(path, output, limits)
    with untrusted(source, "taking a part of it"):
        part = extracted(model, inputs, outputs)
    kept = {key: text for key, text in read_metadata(part).items() if not key.startswith(contract.PREFIX)}
    return _written(target, _with_metadata(part, kept), source, limits)


def edit(
    path: PathLike,
    output: PathLike,
    *,
    rename: Mapping[str, str] | None = None,
    attributes: Mapping[tuple[str, str], Any] | None = None,
    remove: Iterable[str] = (),
    insert: Mapping[str, Op] | None = None,
    replace: Mapping[str, Op] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Path:
    """Write a file with changed nodes, and return its path. The changes are made in the order of the parameters.

    The result is checked by ONNX, and its shapes are inferred anew. Metadata is kept. A fused file is marked as unverified, and its layout
    follows renamed tensors; `fusenms.verify` says whether it is still equal to the reference.

    Args:
        path: an `.onnx` file, raw or fused.
        output: the file to write.
        rename: tensors: old name to new one.
        attributes: (node, attribute) to its value; None removes it. A node is called by its name or by a tensor that it makes.
        remove: nodes; what read their output reads their first input.
        insert: tensor to an operator behind it.
        replace: node to an operator that takes its first input and makes its outputs.

    Raises:
        ConfigError: there is no such tensor or node, or the result is no valid model.
        SourceError: a file cannot be read or written.

    Example:
        >>> import fusenms
        >>> from fusenms.graph.editing import Op
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> edited = fusenms.edit(path, "darker.onnx", insert={"images": Op("Mul", (0.5,))})
        >>> fusenms.inspect(edited).verification
        'unverified'
        >>> bool(fusenms.verify(fusenms.load_fused(edited)))  # the head and everything behind it are as they were
        True
    """
    from fusenms.graph import editing

    source, target, model = _opened(path, output, limits)
    metadata, names = read_metadata(model), dict(rename or {})
    with untrusted(source, "editing"):
        if names:
            model = editing.renamed(model, names)
        if attributes:
            model = editing.with_attributes(model, attributes)
        if removed := list(remove):
            model = editing.without_nodes(model, removed)
        if insert:
            model = editing.with_inserted(model, insert)
        if replace:
            model = editing.with_replaced(model, replace)
    if contract.KEY_BACKEND in metadata:
        with untrusted(source, "reading its metadata"):
            layout = Layout.from_dict(read_json(metadata[contract.KEY_LAYOUT], limits)).renamed(names)
            image = read_json(metadata[contract.KEY_IMAGE], limits)
            image = _renamed(image, names)
            if image.get("frames") is not None:
                image["frames"] = _renamed(image["frames"], names)
        metadata |= {
            contract.KEY_LAYOUT: json.dumps(layout.to_dict()),
            contract.KEY_IMAGE: json.dumps(image),
            contract.KEY_VERIFICATION: contract.UNVERIFIED,
        }
    return _written(target, _with_metadata(model, metadata), source, limits)


def restamp(path: PathLike, like: PathLike, output: PathLike, *, limits: Limits = DEFAULT_LIMITS) -> Path:
    """Write an edited file with the metadata of the fused file that it was, if it is still equal to the reference. Return its path.

    Tools that edit ONNX files often lose the metadata; `verify` and `detect` do not know such a file any more. It is verified anew.

    Args:
        path: the edited file.
        like: the fused file, as it was written.
        output: the file to write.

    Raises:
        SourceError: a file cannot be read or written, or the graph contradicts the metadata.
        VerificationError: the graph differs from the reference.

    Example:
        >>> import fusenms, onnx
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> model = onnx.load(path)
        >>> del model.metadata_props[:]
        >>> onnx.save(model, "lost.onnx")
        >>> fusenms.inspect(fusenms.restamp("lost.onnx", path, "again.onnx")).kind
        'fused'
    """
    source, target, model = _opened(path, output, limits, keep_large=False)
    fused = dataclasses.replace(load_fused(like, limits=limits), model=model)
    check_graph(source, fused)
    made = {name for node in model.graph.node for name in node.output}
    if lost := [name for name in fused.layout.tensors if name not in made]:
        raise SourceError(
            f"{source}: has no tensor {', '.join(lost)}, which the layout of {like} names; it cannot be verified"
        )
    report = verify(fused)
    if not report:
        raise VerificationError(f"{target} was not written: {source} differs from the reference\n{report}", report)
    return fused.proven(report).save(target)


def _renamed(entry: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """An entry of the metadata that names its tensor, after a renaming."""
    return {**entry, "tensor": names.get(entry["tensor"], entry["tensor"])}


def _opened(
    path: PathLike, output: PathLike, limits: Limits, keep_large: bool = True
) -> tuple[Path, Path, onnx.ModelProto]:
    """Both paths, and the model; external data above 2 GB stays where it is."""
    if not all(isinstance(one, (str, os.PathLike)) for one in (path, output)):
        raise SourceError("expected paths of .onnx files")
    source, target = Path(path), Path(output)
    check_writable(target, source)
    return source, target, read_onnx(source, limits, keep_large=keep_large)


def _with_metadata(model: onnx.ModelProto, metadata: Mapping[str, str]) -> onnx.ModelProto:
    import onnx

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata))
    return model


def _written(path: Path, model: onnx.ModelProto, source: Path, limits: Limits) -> Path:
    """Write a model. External data that was left where it is comes along: its files are copied if the folder is another one."""
    from fusenms.onnx_reading.external import external_files

    try:
        data = model.SerializeToString()
    except ValueError as error:
        raise SourceError(
            f"{path} was not written: the model is above 2 GB, which one file cannot hold ({error}); store its weights as external data"
        ) from error
    with untrusted(source, "finding its external data"):
        files = external_files(model, source, limits)
    copied = []
    try:
        for location, file in files.items():
            if copy_beside(file, path.parent / location):
                copied.append(path.parent / location)
        return write_atomically(path, data)
    except BaseException:
        for file in copied:
            file.unlink(missing_ok=True)
        raise
