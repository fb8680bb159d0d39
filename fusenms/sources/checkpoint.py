"""Loads a `.pt` checkpoint as plain data. No code of the file runs, and the package that wrote it is not needed.

1. `archive.py` reads the zip archive. `unpickle.py` reads the pickle in it, as names and records, not as objects.
2. A checkpoint with a name that fusenms does not know is refused.
3. `rebuild.py` builds a network from the records, with classes of fusenms, checks its cost, and reads the weights.
4. The head is checked: its attributes must match the shapes of its outputs.

`fusenms.limits.Limits` bounds every step.
"""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusenms.errors import ConfigError, SourceError
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.safety.files import open_regular
from fusenms.safety.text import has_controls
from fusenms.sources.torch_files.archive import SIGNATURE, Archive
from fusenms.sources.torch_files.unpickle import Record, globals_of, unpickle
from fusenms.sources.torch_modules import blocks, rtdetr, tasks, yolov7
from fusenms.sources.torch_modules import layers as modules
from fusenms.sources.torch_modules.cost import check_cost
from fusenms.sources.torch_modules.fields import shown
from fusenms.sources.torch_modules.rebuild import DTYPES, Rebuilder
from fusenms.sources.torch_modules.torch_layers import TORCH_LAYERS

_BLOCKS: tuple[type[nn.Module], ...] = (
    *(modules.Conv, modules.Bottleneck, modules.C2f, modules.C3, modules.SPPF, modules.Concat, modules.DFL),
    *(*blocks.BLOCKS, *tasks.BLOCKS),
)

_PLAIN = (
    # data of torch
    *(
        f"torch.{name}"
        for name in (
            *DTYPES,
            "ComplexFloatStorage",
            "ComplexDoubleStorage",
            "QInt8Storage",
            "QUInt8Storage",
            "QInt32Storage",
        )
    ),
    *(f"torch.storage.{name}" for name in ("UntypedStorage", "TypedStorage", "_LegacyStorage")),
    *(
        f"torch._utils.{name}"
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter", "_rebuild_parameter_with_state")
    ),
    *(
        "torch.Size",
        "torch.device",
        "torch.dtype",
        "torch.Tensor",
        "torch._tensor.Tensor",
        "torch.nn.parameter.Parameter",
    ),
    *(f"torch.{str(dtype).removeprefix('torch.')}" for dtype in DTYPES.values()),
    # data of Python and NumPy
    *("collections.OrderedDict", "collections.defaultdict", "collections.Counter", "_codecs.encode"),
    *(
        f"{home}.{name}"
        for home in ("builtins", "__builtin__")
        for name in ("set", "frozenset", "dict", "list", "getattr")
    ),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *("numpy.dtype", "numpy.ndarray", "datetime.datetime", "argparse.Namespace", "types.SimpleNamespace"),
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *(f"pathlib._local.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    "ultralytics.utils.IterableSimpleNamespace",
    "ultralytics.yolo.utils.IterableSimpleNamespace",
)
"""Names of plain data. A file that uses them gets records. Nothing is imported or called."""


def _stand_ins() -> dict[str, type[nn.Module] | None]:
    """Map every name that a checkpoint may use to the fusenms class that replaces it, or to None for plain data."""
    table: dict[str, type[nn.Module] | None] = dict.fromkeys(_PLAIN)
    table |= {f"{cls.__module__}.{cls.__name__}": cls for cls in TORCH_LAYERS}
    table["torch.nn.modules.activation.MultiheadAttention"] = rtdetr.MultiheadAttention
    for cls in (*_BLOCKS, *rtdetr.MODULES):
        for home in ("", "conv.", "block.", "head.", "transformer."):
            table[f"ultralytics.nn.modules.{home}{cls.__name__}"] = cls
    for cls in (*_BLOCKS, *yolov7.MODULES):
        table[f"models.common.{cls.__name__}"] = cls
    table |= {"models.common.RepConvN": blocks.RepConv, "models.common.RepNBottleneck": blocks.RepBottleneck}
    for name in ("Detect", "v10Detect"):
        for home in ("", "head."):
            table[f"ultralytics.nn.modules.{home}{name}"] = modules.AnchorFreeDetect
    for name, head in tasks.HEADS.items():
        for home in ("", "head."):
            table[f"ultralytics.nn.modules.{home}{name}"] = head
    table["models.yolo.Segment"] = tasks.AnchorSegment
    table |= {f"models.yolo.{name}": modules.AnchorDetect for name in ("Detect", "IDetect", "IAuxDetect")}
    table |= {f"models.yolo.{name}": yolov7.AuxiliaryDetect for name in ("DualDDetect", "TripleDDetect", "DualDetect")}
    table["models.yolo.DDetect"] = modules.AnchorFreeDetect
    for name in (
        "DetectionModel",
        "YOLOv10DetectionModel",
        "RTDETRDetectionModel",
        "SegmentationModel",
        "PoseModel",
        "OBBModel",
    ):
        table[f"ultralytics.nn.tasks.{name}"] = modules.DetectionModel
    table |= {
        f"models.yolo.{name}": modules.DetectionModel for name in ("Model", "DetectionModel", "SegmentationModel")
    }
    ours = (*_BLOCKS, *tasks.HEADS.values(), modules.AnchorFreeDetect, modules.AnchorDetect, modules.DetectionModel)
    homes = ("torch_modules.layers", "torch_modules.blocks", "torch_modules.tasks", "modules", "blocks", "tasks")
    return table | {f"fusenms.sources.{home}.{cls.__name__}": cls for home in homes for cls in ours}


STAND_INS = _stand_ins()
_OTHER_TASKS = {
    "Classif": "a classifier",
    "World": "an open-vocabulary model",
    "YOLOE": "an open-vocabulary model",
    "Semantic": "a model that labels pixels",
    "Depth": "a model of depths",
}
TASKS: dict[type[nn.Module], str] = {
    tasks.AnchorSegment: "segment", tasks.AnchorFreeSegment: "segment", tasks.AnchorFreePose: "pose", tasks.AnchorFreePose26: "pose",
    tasks.AnchorFreeOriented: "obb", tasks.AnchorFreeOriented26: "obb",
}  # fmt: skip
"""Tasks of the heads that return task outputs beside boxes."""
MAX_STRIDE = 128
Head = modules.AnchorFreeDetect | modules.AnchorDetect | rtdetr.RTDETRDecoder
EXPECTED = (
    "a checkpoint that detects (with masks, keypoints or oriented boxes, or without) of YOLOv3u to YOLO26 or RT-DETR (Ultralytics), or "
    "of the original YOLOv5, YOLOv7 or YOLOv9"
)


@dataclass(frozen=True)
class Checkpoint:
    """A network rebuilt from a checkpoint, in evaluation mode and float32, with batch normalization folded.

    Attributes:
        module: takes images ``[B, 3, height, width]`` float32 (RGB, 0 to 1) and returns the head's taps.
        class_names: class names by index.
        strides: stride of each level, in pixels.
        size: side of the square training images, in pixels; None if the checkpoint does not state it.
        task: ``detect``, ``segment``, ``pose`` or ``obb``.
    """

    module: modules.DetectionModel
    class_names: tuple[str, ...]
    strides: tuple[int, ...]
    size: int | None
    task: str

    @property
    def head(self) -> Head:
        return self.module.model[-1]  # type: ignore[return-value]


def load_checkpoint(path: Path, one_to_many: bool = False, limits: Limits = DEFAULT_LIMITS) -> Checkpoint:
    """Load a detector from a checkpoint of Ultralytics, or of the original YOLOv5, YOLOv7 or YOLOv9.

    Args:
        one_to_many: use the branch that needs suppression, if the head has two branches (YOLOv10, YOLO26).
        limits: bounds on the cost of the file.

    Raises:
        SourceError: the file is not a checkpoint, is damaged, names unknown code, exceeds a limit, holds another kind of model, or has
            weights that are not finite.
        ConfigError: ``one_to_many`` is set, and the head has only one branch.
    """
    with _open(path, limits) as archive:
        content = _content(path, archive)
        record = content if isinstance(content, Record) else _network_of(path, content)
        if not _is_network(record):
            found = record.name.rsplit(".", 1)[-1] if isinstance(record, Record) else type(record).__name__
            raise SourceError(f"{path}: found {found} instead of a network; expected {EXPECTED}")
        try:
            checkpoint = _rebuild(archive, record, one_to_many)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise SourceError(_unreadable(path, error)) from error
        except _DAMAGE as error:
            raise SourceError(f"{path}: this checkpoint cannot be used: {error}. Expected {EXPECTED}") from error
    if one_to_many and "one2one_cv2" not in checkpoint.head._modules:
        raise ConfigError(f"{path}: has only one head; leave one_to_many out")
    return checkpoint


_DAMAGE = (
    ArithmeticError, AssertionError, AttributeError, EOFError, LookupError, MemoryError, NotImplementedError, OSError, RuntimeError,
    TypeError, ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""Errors that the standard library and torch raise on damaged data."""


def _open(path: Path, limits: Limits) -> Archive:
    with open_regular(path, limits.max_file_bytes) as file:
        data = file.read(len(SIGNATURE))
        if data != SIGNATURE:
            data += file.read(limits.max_pickle_bytes)
    if data != SIGNATURE:
        if unknown := sorted(globals_of(data, limits) - set(STAND_INS)):
            raise SourceError(_refusal(path, unknown))
        reason = (
            "it may have PyTorch's format from before 1.6, which a newer torch.save replaces"
            if data.startswith(b"\x80")
            else "it is neither a zip archive nor a readable pickle"
        )
        raise SourceError(_unreadable(path, reason))
    try:
        return Archive(path, limits)
    except _DAMAGE as error:
        raise SourceError(_unreadable(path, error)) from error


def _content(path: Path, archive: Archive) -> Any:
    """Read the object tree of the pickle, and check that all names in it are known."""
    try:
        data = archive.pickle()
    except _DAMAGE as error:
        raise SourceError(_unreadable(path, error)) from error
    try:
        found = unpickle(data, archive.limits)
    except _DAMAGE as error:
        if unknown := sorted(globals_of(data, archive.limits) - set(STAND_INS)):
            raise SourceError(_refusal(path, unknown)) from error
        raise SourceError(_unreadable(path, error)) from error
    if unknown := sorted(found.names - set(STAND_INS)):
        raise SourceError(_refusal(path, unknown))
    if called := sorted(name for name in found.called if STAND_INS[name] is not None):
        raise SourceError(
            f"{path}: refused, because it calls the constructor of a layer: {', '.join(called[:8])}. Nothing of it was run. "
            "Expected a checkpoint that torch.save wrote, in which layers have a state instead"
        )
    return found.tree


def _unreadable(path: Path, reason: object) -> str:
    return (
        f"{path}: not a readable PyTorch checkpoint ({str(reason)[:200]}); the file is damaged, cut short, or of another kind: "
        "download it again, or pass an .onnx file"
    )


def _refusal(path: Path, unknown: list[str]) -> str:
    names = [name[:80] for name in unknown]
    listed = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    for name in names:
        for word, what in _OTHER_TASKS.items():
            if word in name.rsplit(".", 1)[-1]:
                return f"{path}: found {what} ({listed}); expected {EXPECTED}"
    return (
        f"{path}: refused, because it names code that fusenms does not know: {listed}. Nothing of it was run. "
        f"Expected {EXPECTED}; export other models to .onnx where you trust them, and pass the .onnx file"
    )


def _network_of(path: Path, content: Any) -> Any:
    """The network in a checkpoint's dictionary: the averaged one (``ema``) if present, else ``model``."""
    if not isinstance(content, dict):
        return content
    model = content.get("model") if content.get("ema") is None else content["ema"]
    if model is None or isinstance(model, dict):
        raise SourceError(
            f"{path}: found a dictionary of {_keys(model or content)}, without a network; expected a full checkpoint "
            "(keys `model` or `ema`), as Ultralytics and YOLOv5 save it: pass that file, not a state dict"
        )
    return model


def _is_network(record: Any) -> bool:
    return isinstance(record, Record) and STAND_INS.get(record.name) is modules.DetectionModel


def _rebuild(archive: Archive, record: Record, one_to_many: bool) -> Checkpoint:
    rebuilder, limits = Rebuilder(archive, STAND_INS), archive.limits
    model = rebuilder.network(record)
    head = model.model[-1] if len(model.model) else None
    if not isinstance(head, Head):
        raise ValueError(f"its last layer is a {type(head).__name__}, not a detection head")
    if isinstance(head, modules.AnchorFreeDetect):
        head.one_to_one = "one2one_cv2" in head._modules and not one_to_many
    strides = _strides(model, head)
    names, size = _names(record.state, int(head.nc), limits), _size(record.state, limits)
    shapes = check_cost(model, 2 * max(strides), limits)
    rebuilder.read_weights()
    _check_finite(model)
    for module in model.modules():
        if isinstance(module, modules.Conv):
            module.fold()
    _check_finite(model)
    _check_head(head, strides, shapes)
    return Checkpoint(model, names, strides, size, TASKS.get(type(head), "detect"))


def _strides(model: modules.DetectionModel, head: Head) -> tuple[int, ...]:
    strides = tuple(int(s) for s in (head.stride if hasattr(head, "stride") else model.stride).tolist())
    if not strides or list(strides) != sorted(set(strides)) or min(strides) < 1 or max(strides) > MAX_STRIDE:
        raise ValueError(f"its strides are {list(strides)}; expected ascending strides from 1 to {MAX_STRIDE}")
    return strides


def _check_finite(model: nn.Module) -> None:
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"the weights of {name} are not finite (NaN or infinity); the training diverged")


def _check_head(head: Head, strides: tuple[int, ...], shapes: list[tuple[int, ...]]) -> None:
    """Compare the head's attributes with the shapes of its outputs, for an image with sides of twice its largest stride."""
    side = 2 * max(strides)
    expected: list[tuple[int, ...]]
    cells, classes = sum((side // s) ** 2 for s in strides), int(head.nc)
    if isinstance(head, rtdetr.RTDETRDecoder):
        queries = shapes[0][0]
        expected = [(queries, 4), (queries, classes)]
    elif isinstance(head, modules.AnchorFreeDetect):
        if head.reg_max > 1 and len(head.bin_values) != head.reg_max:
            raise ValueError(f"its box distribution has {len(head.bin_values)} values; expected {head.reg_max}")
        expected = [(4 * int(head.reg_max), cells), (classes, cells)]
    else:
        anchors = tuple(head.anchors.shape)
        if anchors != (len(strides), int(head.na), 2):
            raise ValueError(f"its anchors are {list(anchors)}; expected [{len(strides)}, {int(head.na)}, 2]")
        if not (head.anchors > 0).all():
            raise ValueError("some of its anchors are 0 or negative; expected sizes in units of the stride")
        expected = [(5 + classes, int(head.na) * cells)]
    if isinstance(head, (tasks.AnchorFreeSegment, tasks.AnchorSegment)):
        candidates, prototypes = expected[0][1], shapes[-1]
        expected += [(int(head.nm), candidates), (int(head.nm), *prototypes[1:])]
        if len(prototypes) != 3:
            raise ValueError(
                f"its prototypes have the shape {list(prototypes)}; expected [{int(head.nm)}, height, width]"
            )
    elif isinstance(head, tasks.AnchorFreePose):
        count, numbers = (int(n) for n in head.kpt_shape)
        if numbers not in (2, 3) or count < 1:
            raise ValueError(f"its keypoints are {[count, numbers]}; expected points of 2 or 3 numbers")
        expected.append((count * numbers, cells))
    elif isinstance(head, tasks.AnchorFreeOriented):
        expected.append((1, cells))
    if shapes != expected:
        raise ValueError(
            f"its head returns the shapes {shapes}; expected {expected} for {classes} classes and the strides {list(strides)}"
        )


def _names(state: dict[str, Any], count: int, limits: Limits) -> tuple[str, ...]:
    """Class names by index."""
    names = state.get("names") or {}
    table = dict(enumerate(names)) if isinstance(names, (list, tuple)) else names
    if not isinstance(table, dict) or max(len(table), count) > limits.max_class_names:
        raise ValueError(
            f"it has {len(names)} class names and {count} classes; expected a list of at most {limits.max_class_names} names"
        )
    return tuple(_name(table.get(i, f"class{i}"), limits) for i in range(count))


def _name(name: Any, limits: Limits) -> str:
    if not isinstance(name, (str, int, float)):
        raise ValueError(f"a class name is {shown(name)}; expected text")
    text = str(name)
    if len(text) > limits.max_name_length:
        raise ValueError(f"a class name has {len(text)} characters; expected at most {limits.max_name_length}")
    if has_controls(text):
        raise ValueError(f"the class name {text!a} has control characters; expected text of one line")
    return text


def _size(state: dict[str, Any], limits: Limits) -> int | None:
    """Side of the square training images, in pixels. None if the file does not state it."""
    args = state.get("args")
    args = args.state if isinstance(args, Record) else args
    size = args.get("imgsz") if isinstance(args, dict) else None
    size = size[0] if isinstance(size, (list, tuple)) and size else size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        return None
    if size > limits.max_image_side:
        raise ValueError(f"its input size is {size} pixels; expected at most {limits.max_image_side} (max_image_side)")
    return size


def _keys(content: dict[Any, Any]) -> str:
    keys = [key[:40] if isinstance(key, str) else shown(key) for key in content]
    return f"{len(keys)} entries ({', '.join(keys[:4])}{', …' if len(keys) > 4 else ''})"
