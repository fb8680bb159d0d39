"""Load a `.pt` checkpoint without running any code of it and without the package that wrote it.

`torch.load(weights_only=True)` rebuilds the module tree, with our own classes (`modules.py`)
standing in for the pickled ones. A name that is neither known here nor on torch's own list of
plain data is refused. Afterwards the tree is checked: only known types, no hooks, no method
replaced by data of the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fusenms.errors import ConfigError, SourceError
from fusenms.sources import blocks, modules, rtdetr, tasks, yolov7

_BLOCKS: tuple[type[nn.Module], ...] = (
    *(modules.Conv, modules.Bottleneck, modules.C2f, modules.C3, modules.SPPF, modules.Concat, modules.DFL),
    *(*blocks.BLOCKS, *tasks.BLOCKS),
)

_TORCH: tuple[type[nn.Module], ...] = (
    *(nn.SiLU, nn.ReLU, nn.LeakyReLU, nn.Hardswish, nn.Identity, nn.BatchNorm2d, nn.Conv2d, nn.MaxPool2d),
    *(
        nn.Upsample,
        nn.Tanh,
        nn.Sequential,
        nn.ModuleList,
        nn.ConvTranspose2d,
        nn.ZeroPad2d,
        nn.GELU,
        nn.Linear,
        nn.LayerNorm,
    ),
    *(nn.Dropout, nn.Embedding, nn.modules.linear.NonDynamicallyQuantizableLinear),
)


class Inert:
    """Stands in for whatever is of no use here (training results, arguments, paths); keeps plain attributes."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})


def _attribute(*_: Any) -> Inert:
    """Stands in for `getattr`, by which older heads keep a method of theirs that nothing calls; it gives nothing."""
    return Inert()


_INERT = (
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    "datetime.datetime",
    "argparse.Namespace",
    "types.SimpleNamespace",
    "ultralytics.utils.IterableSimpleNamespace",
    "ultralytics.yolo.utils.IterableSimpleNamespace",
)


def _stand_ins() -> dict[str, Any]:
    """Map every global that a checkpoint may name to what is used in its place."""
    table: dict[str, Any] = {f"{cls.__module__}.{cls.__name__}": cls for cls in _TORCH}
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
    table |= {
        "models.yolo.Segment": tasks.AnchorSegment,
        "builtins.getattr": _attribute,
        "__builtin__.getattr": _attribute,
    }
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
    table |= {f"{cls.__module__}.{cls.__name__}": cls for cls in ours}
    return table | dict.fromkeys(_INERT, Inert)


STAND_INS = _stand_ins()
_HOOKS = (
    *("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"),
    *("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
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
"""Of heads that give more than boxes."""
MAX_STRIDE = 128
Head = modules.AnchorFreeDetect | modules.AnchorDetect | rtdetr.RTDETRDecoder
EXPECTED = (
    "a checkpoint that detects (with masks, keypoints or oriented boxes, or without) of YOLOv3u to YOLO26 or RT-DETR (Ultralytics), or "
    "of the original YOLOv5, YOLOv7 or YOLOv9"
)
_lock = threading.Lock()


@dataclass(frozen=True)
class Checkpoint:
    """A network rebuilt from a checkpoint: evaluation mode, float32, batch normalization folded.

    Attributes:
        module: takes images ``[B, 3, height, width]`` float32 (RGB, 0 to 1), returns the head's taps.
        names: class names by index.
        strides: stride of each level, in pixels.
        size: side of the square picture it was trained on, in pixels, where the checkpoint says so.
        task: ``detect``, ``segment``, ``pose`` or ``obb``.
    """

    module: modules.DetectionModel
    names: tuple[str, ...]
    strides: tuple[int, ...]
    size: int | None
    task: str

    @property
    def head(self) -> Head:
        return self.module.model[-1]  # type: ignore[return-value]


def load_checkpoint(path: Path, one_to_many: bool = False) -> Checkpoint:
    """Load a checkpoint of Ultralytics, or of the original YOLOv5, YOLOv7 or YOLOv9, that detects objects.

    Args:
        one_to_many: of a head with two branches (YOLOv10, YOLO26) take the one that needs suppression.

    Raises:
        SourceError: the file is no checkpoint, is damaged, names code that is not known, holds another kind of
            model, or has weights that are not finite.
    """
    content = _read(path)
    if not isinstance(content, dict):
        content = {"model": content}
    model = content.get("model") if content.get("ema") is None else content["ema"]
    if model is None or isinstance(model, dict):
        raise SourceError(
            f"{path}: found a dictionary of {_keys(model or content)}, without a network; expected a full checkpoint "
            "(keys `model` or `ema`), as Ultralytics and YOLOv5 save it: pass that file, not a state dict"
        )
    if not isinstance(model, modules.DetectionModel):
        raise SourceError(f"{path}: found {type(model).__name__} in place of a network; expected {EXPECTED}")
    try:
        _check_tree(path, model)
        checkpoint = _finish(model, one_to_many)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise SourceError(
            f"{path}: the network in this checkpoint is incomplete ({error}); expected one that detects objects"
        ) from error
    if one_to_many and "one2one_cv2" not in checkpoint.head._modules:
        raise ConfigError(f"{path}: has one head only; leave one_to_many (--one-to-many) out")
    return checkpoint


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        if zipped and (member := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"the checksum of {member} is wrong")
        unknown = _unknown_globals(path) if zipped else []
        if unknown:
            raise SourceError(_refusal(path, unknown))
        with _only_stand_ins(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unusual pickle protocol; what matters fails
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        EOFError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        AssertionError,
        zipfile.BadZipFile,
    ) as error:
        if name := re.search(r"GLOBAL `?([\w.]+)`?", str(error)):
            raise SourceError(_refusal(path, [name[1]])) from error
        said = str(error).rsplit("WeightsUnpickler error:", 1)[-1].strip()
        reason = (
            said.splitlines()[0][:200] if " " in said else "it holds neither an archive nor a pickle that can be read"
        )
        if foreign := sorted(_names_in_pickle(path, zipped) - set(STAND_INS) - _plain_globals()):
            raise SourceError(_refusal(path, foreign)) from error
        if not zipped and _looks_pickled(path):
            reason = f"it may have PyTorch's format from before 1.6, which a newer torch.save replaces; {reason}"
        raise SourceError(
            f"{path}: not a readable PyTorch checkpoint ({reason}); the file is damaged, cut short, or of another kind: "
            "download it again, or pass an .onnx file"
        ) from error


def _names_in_pickle(path: Path, zipped: bool) -> set[str]:
    """What a pickle names as code, read without running it, as far as it can be read: for the message about a file that fails."""
    try:
        data = path.read_bytes()
        if zipped:
            with zipfile.ZipFile(path) as archive:
                data = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    except (OSError, StopIteration, zipfile.BadZipFile):
        return set()
    found, texts, stream = set[str](), [""], io.BytesIO(data)
    try:
        while stream.tell() < len(data):  # PyTorch's old format has several pickles, one after the other
            for operation, argument, _ in pickletools.genops(stream):
                if operation.name in ("GLOBAL", "INST"):
                    found.add(str(argument).replace(" ", "."))
                elif operation.name == "STACK_GLOBAL":
                    found.add(".".join(texts[-2:]))
                elif isinstance(argument, str):
                    texts.append(argument)
    except Exception:  # what is not a pickle, or is damaged in any way, ends it
        pass
    return found


def _plain_globals() -> set[str]:
    """What torch itself takes for plain data."""
    return set(torch._weights_only_unpickler._get_allowed_globals()) | {"__builtin__.set", "collections.OrderedDict"}


def _looks_pickled(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80"


def _unknown_globals(path: Path) -> list[str]:
    with _lock, _no_user_globals():
        found = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    return sorted(set(found) - set(STAND_INS))


def _refusal(path: Path, unknown: list[str]) -> str:
    listed = ", ".join(unknown[:8]) + (f" and {len(unknown) - 8} more" if len(unknown) > 8 else "")
    for name in unknown:
        for word, what in _OTHER_TASKS.items():
            if word in name.rsplit(".", 1)[-1]:
                return f"{path}: found {what} ({listed}); expected {EXPECTED}"
    return (
        f"{path}: refused, because it names code that fusenms does not know: {listed}. Nothing of it was run. "
        f"Expected {EXPECTED}; export other models to .onnx where you trust them and pass that"
    )


@contextmanager
def _no_user_globals() -> Iterator[None]:
    """Set aside what the host program has told torch to trust: it is not meant for this file."""
    trusted = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(trusted)


@contextmanager
def _only_stand_ins() -> Iterator[None]:
    with _lock, _no_user_globals(), torch.serialization.safe_globals([(cls, name) for name, cls in STAND_INS.items()]):
        yield


def _check_tree(path: Path, model: nn.Module) -> None:
    """Refuse a tree in which data of the file took the place of code, or has parts that would be left out."""
    allowed = {cls for cls in STAND_INS.values() if isinstance(cls, type) and issubclass(cls, nn.Module)}
    for name, module in model.named_modules():
        where = f"{path}: layer {name or '(root)'} ({type(module).__name__})"
        if type(module) not in allowed:
            raise SourceError(f"{where} is of an unknown type")
        if any(module.__dict__.get(hooks) for hooks in _HOOKS):
            raise SourceError(f"{where} carries hooks; expected plain weights")
        module.__dict__.pop("type", None)  # the class name, as text; it hides a method of nn.Module
        replaced = sorted(key for key in module.__dict__ if callable(getattr(type(module), key, None)))
        if replaced:
            raise SourceError(f"{where} replaces its own {', '.join(replaced)}; expected plain weights")
        children = {key for key, child in module._modules.items() if child is not None}
        extra = sorted(children - module.parts) if hasattr(module, "parts") else []
        if extra:
            raise SourceError(
                f"{where} has parts that fusenms does not know: {', '.join(extra)}. This variant is not supported; pass its .onnx"
            )
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SourceError(
                f"{path}: the weights of {name} are not finite (NaN or infinity); the training diverged or the file is damaged"
            )


def _finish(model: modules.DetectionModel, one_to_many: bool) -> Checkpoint:
    model = model.float().eval().requires_grad_(False)
    for module in model.modules():
        if isinstance(module, modules.Conv):
            module.fold()
        elif isinstance(module, nn.Upsample):
            module.recompute_scale_factor = None  # absent from old checkpoints
    head = model.model[-1]
    if not isinstance(head, Head):
        raise ValueError(f"its last layer is a {type(head).__name__}, not a detection head")
    if isinstance(head, modules.AnchorFreeDetect):
        head.one_to_one = "one2one_cv2" in head._modules and not one_to_many
    strides = tuple(int(s) for s in (head.stride if hasattr(head, "stride") else model.stride).tolist())
    _check_head(model, head, strides)
    return Checkpoint(model, _names(model, int(head.nc)), strides, _size(model), TASKS.get(type(head), "detect"))


def _check_head(model: modules.DetectionModel, head: Head, strides: tuple[int, ...]) -> None:
    """Run it once: what the head says of itself must be what it gives."""
    if not strides or list(strides) != sorted(set(strides)) or min(strides) < 1 or max(strides) > MAX_STRIDE:
        raise ValueError(f"its strides are {list(strides)}; expected them rising, from 1 to {MAX_STRIDE}")
    side = 2 * max(strides)
    expected: list[tuple[int, ...]]
    with torch.no_grad():
        shapes = [tuple(tap.shape[1:]) for tap in model(torch.zeros(1, 3, side, side))]
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
            f"with {classes} classes and strides {list(strides)} its head must give {expected}, but it gives {shapes}"
        )


def _names(model: nn.Module, count: int) -> tuple[str, ...]:
    names = getattr(model, "names", None) or {}
    table = dict(enumerate(names)) if isinstance(names, (list, tuple)) else dict(names)
    return tuple(str(table.get(i, f"class{i}")) for i in range(count))


def _size(model: nn.Module) -> int | None:
    args = getattr(model, "args", None)
    values = args if isinstance(args, dict) else getattr(args, "__dict__", {})
    size = values.get("imgsz")
    size = size[0] if isinstance(size, (list, tuple)) and size else size
    return size if isinstance(size, int) and size > 0 else None


def _keys(content: dict[Any, Any]) -> str:
    keys = [str(key) for key in content]
    return f"{len(keys)} entries ({', '.join(keys[:4])}{', …' if len(keys) > 4 else ''})"
