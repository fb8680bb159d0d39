"""Reads detectors of Hugging Face transformers, from a directory with `config.json` and `model.safetensors`.

The transformers package provides the networks. Nothing is downloaded, no code in the directory runs (`trust_remote_code` is never set),
and weights are read only from safetensors.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusenms.artifacts.preprocessing import PIXELS, Pixels
from fusenms.errors import BackendUnavailableError, FusenmsError, SourceError, first_line
from fusenms.limits import DEFAULT_LIMITS, Limits
from fusenms.onnx_reading import untrusted
from fusenms.onnx_reading.metadata import check_names, read_json
from fusenms.safety.files import open_regular, read_regular
from fusenms.sources.export import DEFAULT_SIZE, queries_layout
from fusenms.sources.network import Network

SIGMOID = (
    "rt_detr", "rt_detr_v2", "d_fine", "deimv2", "deformable_detr", "conditional_detr", "dab-detr", "lw_detr", "rf_detr",
)  # fmt: skip
SOFTMAX = ("detr", "table-transformer", "yolos")
"""Model types whose scores are a softmax with "no object" as the last class. Scores of the others are sigmoids."""
NOT_NORMALIZED = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
STRIDE = 32
INDEX = "model.safetensors.index.json"


class _Queries(nn.Module):
    """A transformers detector that returns only boxes and logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(pixel_values=images)
        return found.pred_boxes, found.logits


def load_directory(path: Path, limits: Limits = DEFAULT_LIMITS) -> Network:
    """Read a detector from a directory of unknown origin.

    Raises:
        SourceError: the directory is not one of a Hugging Face detector, exceeds a limit, or its weights are not safetensors or do not
            fit its settings.
        BackendUnavailableError: transformers is not installed, or timm for a backbone of timm.
    """
    with untrusted(path, "loading"):
        return _load_directory(path, limits)


def _load_directory(path: Path, limits: Limits) -> Network:
    config = _read_json(path / "config.json", limits)
    kind = config.get("model_type")
    if kind not in (*SIGMOID, *SOFTMAX):
        found = "has no model_type" if kind is None else f"is a {str(kind)[:100]!r}"
        raise SourceError(f"{path}: {found}; expected a detector of {', '.join((*SIGMOID, *SOFTMAX))}")
    if not any(path.glob("*.safetensors")):
        raise SourceError(
            f"{path}: has no .safetensors; expected the weights in that format, which holds no code. "
            "Save the model again with save_pretrained"
        )
    _check_config(path, config, limits)
    pixels, size, stretch, notes = _preprocessing(path, config, limits)
    model = _load(path, config, limits)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SourceError(f"{path}: the weights of {name} are not finite (NaN or infinity); the training diverged")
    labels = model.config.id2label
    try:
        names = check_names((str(labels.get(i, f"class{i}")) for i in range(len(labels))), limits)
    except ValueError as error:
        raise SourceError(f"{path}: {error}; correct id2label in its config.json") from error
    module = _Queries(model).float().eval().requires_grad_(False)
    side = size or (DEFAULT_SIZE, DEFAULT_SIZE)
    try:
        with torch.no_grad():
            boxes, logits = module(torch.zeros(1, 3, *side))
    except Exception as error:  # the settings of the file can raise any error
        raise SourceError(f"{path}: the network does not run at {side[0]}x{side[1]} ({first_line(error)})") from error
    classes = logits.shape[2] - (kind in SOFTMAX)
    if boxes.shape[2] != 4 or classes != len(names):
        raise SourceError(
            f"{path}: its logits have the shape {list(logits.shape)}; expected the {len(names)} classes of its config for {kind}"
        )
    return Network(
        module, queries_layout(classes, softmax=kind in SOFTMAX), names, "detect", path.name, side, STRIDE, False, pixels, stretch, notes
    )  # fmt: skip


LAYERS = re.compile(r"layer|depth|block|stage|repeat|levels|points|queries|tokens|heads|groups")
"""Keys of a config whose numbers multiply the cost."""
MOST_LAYERS = 3000
"""Maximum of such a number, or of the sum of a list of such numbers."""
TIMM_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?")
BACKBONE_SETTINGS = ("out_indices", "in_chans", "output_stride", "features_only", "num_channels")
CODE = ("quantization_config", "custom_pipelines", "adapter_config")
"""Keys that change the network and need code or packages other than the classes of transformers. They are refused."""
IGNORED = ("auto_map", "trust_remote_code", "attn_implementation")
"""Keys that are not passed to transformers, so that its own classes are used instead of code in the directory."""
LABELS = ("id2label", "label2id", "task_specific_params")


def _check_config(path: Path, config: dict[str, Any], limits: Limits) -> None:
    """Refuse settings that need code or network access, and numbers that exceed those of every detector.

    Raises:
        SourceError: a setting is refused.
    """
    where = f"{path / 'config.json'}"
    labels, count = config.get("id2label"), config.get("num_labels")
    count = max(len(labels) if isinstance(labels, dict) else 0, count if isinstance(count, int) else 0)
    if count > limits.max_class_names:
        raise SourceError(f"{where}: has {count} classes; expected at most {limits.max_class_names} (max_class_names)")
    todo: list[tuple[str, Any]] = [("config", {key: value for key, value in config.items() if key not in LABELS})]
    while todo:
        name, value = todo.pop()
        if isinstance(value, dict):
            _check_settings(where, value)
            todo += value.items()
        elif isinstance(value, list):
            numbers = [n for n in value if isinstance(n, (int, float))]
            if LAYERS.search(name) and sum(numbers) > MOST_LAYERS and "size" not in name and "channel" not in name:
                raise SourceError(f"{where}: {name} is {str(value)[:60]}; expected at most {MOST_LAYERS} in sum")
            todo += ((name, item) for item in value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            wide = "size" in name or "channel" in name or not LAYERS.search(name)
            most = limits.max_channels if wide else MOST_LAYERS
            if isinstance(value, int) and abs(value) > most:
                raise SourceError(f"{where}: {name} is {str(value)[:40]}; expected at most {most}")


def _check_settings(where: str, settings: dict[str, Any]) -> None:
    if code := [key for key in CODE if settings.get(key)]:
        raise SourceError(
            f"{where}: has {code[0]}, which needs code beside the network; expected plain settings. Remove it, or save the plain model"
        )
    backbone, own = settings.get("backbone"), settings.get("backbone_config")
    timm = settings.get("use_timm_backbone") or settings.get("model_type") == "timm_backbone"
    if backbone is not None and not (isinstance(backbone, str) and timm and TIMM_NAME.fullmatch(backbone)) and not own:
        raise SourceError(
            f"{where}: takes the backbone {str(backbone)[:60]!r} from elsewhere; expected backbone_config, or a name of timm"
        )
    extra = settings.get("backbone_kwargs") or {}
    if not isinstance(extra, dict) or set(extra) - set(BACKBONE_SETTINGS):
        raise SourceError(
            f"{where}: backbone_kwargs is {str(extra)[:60]}; expected no keys except {', '.join(BACKBONE_SETTINGS)}"
        )


def _plain(value: Any) -> Any:
    """The settings without private and ignored keys, and without requests for pretrained weights from elsewhere."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    plain = {key: _plain(item) for key, item in value.items() if not key.startswith("_") and key not in IGNORED}
    if plain.get("backbone_config"):
        plain.pop("backbone", None)
    for key in ("use_pretrained_backbone", "pretrained"):
        if key in plain or plain.get("model_type") == "timm_backbone":
            plain[key] = False
    return plain


def _stage(path: Path, folder: Path, config: dict[str, Any], limits: Limits) -> None:
    """Fill a temporary folder with the only files that transformers sees: the checked settings and links to the weights.

    Raises:
        SourceError: a weight file is not a regular file, or the index names a file that is not in the directory.
    """
    (folder / "config.json").write_text(json.dumps(_plain(config)), encoding="utf-8")
    weights = sorted(path.glob("*.safetensors"))
    for file in weights:
        open_regular(file, limits.max_file_bytes).close()
        try:
            (folder / file.name).symlink_to(file.resolve())
        except OSError:  # Windows, where links need a special permission
            shutil.copyfile(file, folder / file.name)
    index = path / f"{INDEX}"
    if (path / "model.safetensors") in weights or not os.path.lexists(index):
        return
    places = _read_json(index, limits).get("weight_map")
    if not isinstance(places, dict) or not set(map(str, places.values())) <= {file.name for file in weights}:
        raise SourceError(f"{index}: names files that are not in the directory; expected only its own .safetensors")
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}), encoding="utf-8")


def _check_size(path: Path, config: Any, limits: Limits) -> None:
    """Build the network without memory for its weights, and count its layers and weights.

    Raises:
        SourceError: the network has too many layers or weights.
    """
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForObjectDetection.from_config(config, attn_implementation="eager")
    layers, weights = sum(1 for _ in model.modules()), sum(p.numel() for p in model.parameters())
    if layers > limits.max_modules or weights > limits.max_parameters:
        raise SourceError(
            f"{path}: its config makes {layers} layers with {weights} weights; expected at most {limits.max_modules} (max_modules) and "
            f"{limits.max_parameters} (max_parameters)"
        )


def _load(path: Path, settings: dict[str, Any], limits: Limits) -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            f"{path}: needs Hugging Face transformers ({error}); install it with: pip install 'fusenms[hf]'"
        ) from error
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    offline: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with tempfile.TemporaryDirectory(prefix="fusenms-") as folder:
            _stage(path, Path(folder), settings, limits)
            config = transformers.AutoConfig.from_pretrained(folder, **offline)
            config.use_pretrained_backbone = False  # all weights are in the folder
            _check_size(path, config, limits)
            model, report = transformers.AutoModelForObjectDetection.from_pretrained(
                folder, config=config, use_safetensors=True, output_loading_info=True, attn_implementation="eager", **offline
            )  # fmt: skip
    except FusenmsError:
        raise
    except ImportError as error:
        raise BackendUnavailableError(f"{path}: its network needs another package ({first_line(error)})") from error
    except Exception as error:  # transformers and safetensors can raise any error on a damaged file
        raise SourceError(
            f"{path}: cannot be loaded by transformers {transformers.__version__} ({first_line(error)})"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
    if missing := sorted(report["missing_keys"]):
        raise SourceError(
            f"{path}: the weights lack {len(missing)} tensors ({', '.join(missing[:3])}); expected weights of the model in config.json"
        )
    return model


def _preprocessing(
    path: Path, config: dict[str, Any], limits: Limits
) -> tuple[Pixels, tuple[int, int] | None, bool, tuple[str, ...]]:
    """The preprocessing of the model: pixels, (height, width) in pixels, whether images are stretched, and notes.

    Raises:
        SourceError: the settings are present, but invalid.
    """
    file = path / "preprocessor_config.json"
    stated = config.get("image_size")
    sides = stated if isinstance(stated, (list, tuple)) and len(stated) == 2 else ()
    if any(not isinstance(side, int) or not 1 <= side <= limits.max_image_side for side in sides):
        raise SourceError(
            f"{path / 'config.json'}: image_size is {str(stated)[:60]}; expected pixels, at most {limits.max_image_side} (max_image_side)"
        )
    size = (sides[0], sides[1]) if sides else None
    if not os.path.lexists(file):
        name = "rgb" if config["model_type"] in NOT_NORMALIZED else "imagenet"
        note = f"has no {file.name}: the usual pixels of {config['model_type']} ({name}) are used; set pixels and stretch to change them"
        return PIXELS[name], size, True, (note,)
    wanted = _read_json(file, limits)
    try:
        pixels, size, stretch = _stated(wanted, size)
        if size is not None and max(size) > limits.max_image_side:
            raise ValueError(f"size is {size[0]}x{size[1]}, at most {limits.max_image_side} (max_image_side)")
        return pixels, size, stretch, ()
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise SourceError(
            f"{file}: cannot be used ({type(error).__name__}: {error}); expected image_mean and image_std of three numbers if "
            "do_normalize is true, a positive rescale_factor, and a size of positive numbers"
        ) from error


def _stated(wanted: dict[str, Any], size: tuple[int, int] | None) -> tuple[Pixels, tuple[int, int] | None, bool]:
    scale = round(255.0 * wanted.get("rescale_factor", 1 / 255), 6) if wanted.get("do_rescale", True) else 255.0
    pixels = Pixels(scale=scale)
    if wanted.get("do_normalize", False):
        mean, std = (tuple(float(v) for v in wanted[key]) for key in ("image_mean", "image_std"))
        pixels = Pixels("rgb", scale, mean, std)  # type: ignore[arg-type]
    asked = wanted.get("size") or {}
    if isinstance(asked, dict) and "height" in asked and "width" in asked:
        height, width = int(asked["height"]), int(asked["width"])
        if min(height, width) < 1:
            raise ValueError(f"size is {height}x{width}")
        return pixels, (height, width), True
    edge = asked.get("shortest_edge") if isinstance(asked, dict) else asked
    if edge is None:
        return pixels, size, size is not None
    return pixels, (max(1, round(int(edge) / STRIDE)) * STRIDE,) * 2, False


def _read_json(path: Path, limits: Limits) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise SourceError(
            f"{path.parent}: has no {path.name}; expected a directory of a Hugging Face detector (config.json and model.safetensors), "
            "a checkpoint (.pt) or an .onnx file"
        )
    try:
        values = read_json(read_regular(path, limits.max_metadata_bytes).decode(), limits)
    except ValueError as error:
        raise SourceError(f"{path}: cannot be read ({first_line(error)})") from error
    if not isinstance(values, dict):
        raise SourceError(f"{path}: is a {type(values).__name__}; expected an object with settings")
    return values
