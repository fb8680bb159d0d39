"""Detectors of Hugging Face transformers, from a directory with `config.json` and `model.safetensors`.

Networks are those of the transformers package; nothing is fetched, no code of the directory runs (`trust_remote_code` is never set), and
weights are read from safetensors alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fusenms.artifacts import PIXELS, Pixels
from fusenms.errors import BackendUnavailableError, SourceError
from fusenms.sources.export import DEFAULT_SIZE, Network, queries_layout

SIGMOID = (
    "rt_detr", "rt_detr_v2", "d_fine", "deimv2", "deformable_detr", "conditional_detr", "dab-detr", "lw_detr", "rf_detr",
)  # fmt: skip
SOFTMAX = ("detr", "table-transformer", "yolos")
"""Model types whose classes are a softmax with "no object" last; the others' are sigmoids of their own."""
NOT_NORMALIZED = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2")
STRIDE = 32


class _Queries(nn.Module):
    """A transformers detector that returns boxes and logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(pixel_values=images)
        return found.pred_boxes, found.logits


def load_directory(path: Path) -> Network:
    """Read a detector from a directory.

    Raises:
        SourceError: it is no such directory, or one of another kind of model, or its weights are no safetensors or do not fit.
        BackendUnavailableError: transformers (or timm, for a backbone of it) is not installed.
    """
    config = _read_json(path / "config.json")
    kind = config.get("model_type")
    if kind not in (*SIGMOID, *SOFTMAX):
        found = "has no model_type" if kind is None else f"is a {kind!r}"
        raise SourceError(f"{path}: {found}; expected a detector of {', '.join((*SIGMOID, *SOFTMAX))}")
    if not any(path.glob("*.safetensors")):
        raise SourceError(
            f"{path}: has no .safetensors; expected the weights in that format, which holds no code. "
            "Save the model again with save_pretrained"
        )
    model = _load(path)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise SourceError(f"{path}: the weights of {name} are not finite (NaN or infinity); the training diverged")
    labels = model.config.id2label
    names = tuple(str(labels.get(i, f"class{i}")) for i in range(len(labels)))
    pixels, size, stretch, notes = _preprocessing(path, config)
    module = _Queries(model).float().eval().requires_grad_(False)
    side = size or (DEFAULT_SIZE, DEFAULT_SIZE)
    try:
        with torch.no_grad():
            boxes, logits = module(torch.zeros(1, 3, *side))
    except Exception as error:  # whatever its settings make it do
        raise SourceError(f"{path}: the network does not run at {side[0]}x{side[1]} ({_first_line(error)})") from error
    classes = logits.shape[2] - (kind in SOFTMAX)
    if boxes.shape[2] != 4 or classes != len(names):
        raise SourceError(
            f"{path}: its config names {len(names)} classes, but it gives {list(logits.shape)} for {kind}"
        )
    return Network(
        module, queries_layout(classes, softmax=kind in SOFTMAX), names, "detect", path.name, side, STRIDE, False, pixels, stretch, notes
    )  # fmt: skip


def _load(path: Path) -> Any:
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
        config = transformers.AutoConfig.from_pretrained(str(path), **offline)
        config.use_pretrained_backbone = False  # the weights are all here
        model, report = transformers.AutoModelForObjectDetection.from_pretrained(
            str(path), config=config, use_safetensors=True, output_loading_info=True, attn_implementation="eager", **offline
        )  # fmt: skip
    except ImportError as error:
        raise BackendUnavailableError(f"{path}: its network needs another package ({_first_line(error)})") from error
    except Exception as error:  # whatever transformers or safetensors make of a damaged file
        raise SourceError(
            f"{path}: cannot be loaded by transformers {transformers.__version__} ({_first_line(error)})"
        ) from error
    finally:
        transformers.logging.set_verbosity(level)
    if missing := sorted(report["missing_keys"]):
        raise SourceError(
            f"{path}: the weights lack {', '.join(missing[:3])} ({len(missing)} in all); they are of another model"
        )
    return model


def _preprocessing(path: Path, config: dict[str, Any]) -> tuple[Pixels, tuple[int, int] | None, bool, tuple[str, ...]]:
    """How the model wants its pictures: pixels, (height, width), whether they are stretched to that; and notes on it.

    Raises:
        SourceError: the settings are there, but cannot be used.
    """
    file = path / "preprocessor_config.json"
    stated = config.get("image_size")
    size = (int(stated[0]), int(stated[1])) if isinstance(stated, (list, tuple)) and len(stated) == 2 else None
    if not file.is_file():
        name = "rgb" if config["model_type"] in NOT_NORMALIZED else "imagenet"
        note = f"has no {file.name}: pixels as usual for {config['model_type']} ({name}); --pixels and --stretch say otherwise"
        return PIXELS[name], size, True, (note,)
    wanted = _read_json(file)
    try:
        return (*_stated(wanted, size), ())
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(
            f"{file}: cannot be used ({type(error).__name__}: {error}); expected image_mean and image_std of three numbers where "
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


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise SourceError(
            f"{path.parent}: has no {path.name}; expected a directory of a Hugging Face detector (config.json and model.safetensors), "
            "a checkpoint (.pt) or an .onnx file"
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise SourceError(f"{path}: is a {type(values).__name__}; expected an object with settings")
    return values


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
