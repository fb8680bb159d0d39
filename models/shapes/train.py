"""Train the demo detector from nothing: a small YOLOv8-style network on synthetic images.

Run:  python models/shapes/train.py [--out models/shapes/shapes.pt]

Everything is made here: the images (`images.py`), the network (the modules of `fusenms.sources`), the weights.
Seeds and the number of threads are fixed. No GPU, no download. `evaluate.py` measures the result.

The training has three stages: small and partly hidden shapes first, then twice shapes like those of the samples. A stage writes
its checkpoint, and the next one starts from it.

The loss is the usual one for this head: task-aligned assignment (Feng et al., "TOOD", 2021),
binary cross-entropy on classes, CIoU (Zheng et al., 2020) and distribution focal loss (Li et al., 2020) on boxes.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusenms.sources.torch_modules.layers import SPPF, AnchorFreeDetect, C2f, Concat, Conv, DetectionModel
from images import NAMES, draw_image

STRIDES = (8, 16, 32)
SIZE = 256
"""Of the model's input in pixels."""
BATCH = 8
CROP = 160
"""Of the images to train on, in pixels. The network is fully convolutional, so it can be trained on less than its input."""
BINS = 16


def network() -> DetectionModel:
    """Build the untrained network: the layers of YOLOv8 at a fraction of their width."""
    a, b, c, d, e = 12, 24, 40, 64, 96
    up = nn.Upsample(scale_factor=2.0, mode="nearest")
    layers: list[tuple[int | list[int], nn.Module]] = [
        (-1, Conv(3, a, 3, 2)), (-1, Conv(a, b, 3, 2)), (-1, C2f(b, b, 1, True)),
        (-1, Conv(b, c, 3, 2)), (-1, C2f(c, c, 1, True)),
        (-1, Conv(c, d, 3, 2)), (-1, C2f(d, d, 1, True)),
        (-1, Conv(d, e, 3, 2)), (-1, C2f(e, e, 1, True)), (-1, SPPF(e, e)),
        (-1, copy.deepcopy(up)), ([-1, 6], Concat()), (-1, C2f(e + d, d)),
        (-1, copy.deepcopy(up)), ([-1, 4], Concat()), (-1, C2f(d + c, c)),
        (-1, Conv(c, c, 3, 2)), ([-1, 12], Concat()), (-1, C2f(c + d, d)),
        (-1, Conv(d, d, 3, 2)), ([-1, 9], Concat()), (-1, C2f(d + e, e)),
        ([15, 18, 21], AnchorFreeDetect(len(NAMES), (c, d, e), STRIDES, BINS)),
    ]  # fmt: skip
    model = DetectionModel([layer for _, layer in layers], [source for source, _ in layers])
    head = model.model[-1]
    for branch, stride in zip(head.cv3, STRIDES, strict=True):  # start from "almost nothing is an object"
        branch[-1].bias.data.fill_(math.log(5 / len(NAMES) / (640 / stride) ** 2))
    for branch in head.cv2:
        branch[-1].bias.data.fill_(1.0)
    return model


def grid(size: int) -> tuple[Tensor, Tensor]:
    """Return cell centers ``[N, 2]`` in pixels and strides ``[N, 1]`` of all candidates."""
    centers, strides = [], []
    for stride in STRIDES:
        ticks = (torch.arange(size // stride) + 0.5) * stride
        y, x = torch.meshgrid(ticks, ticks, indexing="ij")
        centers.append(torch.stack((x, y), -1).view(-1, 2))
        strides.append(torch.full((len(centers[-1]), 1), float(stride)))
    return torch.cat(centers), torch.cat(strides)


def ciou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of boxes ``[..., 4]`` (xyxy), element by element."""
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inter = (high - low).clamp(0).prod(-1)
    wa, wb = (a[..., 2:] - a[..., :2]).clamp(1e-6), (b[..., 2:] - b[..., :2]).clamp(1e-6)
    iou = inter / (wa.prod(-1) + wb.prod(-1) - inter + 1e-7)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    apart = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) ** 2).sum(-1) / 4
    shape = 4 / math.pi**2 * (torch.atan(wb[..., 0] / wb[..., 1]) - torch.atan(wa[..., 0] / wa[..., 1])) ** 2
    weight = (shape / (1 - iou + shape + 1e-7)).detach()
    return iou - apart / ((hull**2).sum(-1) + 1e-7) - shape * weight


def assign(logits: Tensor, boxes: Tensor, truth: Tensor, labels: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """Give each candidate at most one true object.

    Returns the object's index ``[N]`` (-1: none) and the class target ``[N]`` (0 to 1).
    """
    owner = torch.full((len(boxes),), -1)
    target = torch.zeros(len(boxes))
    if not len(truth):
        return owner, target
    iou = ciou(truth[:, None], boxes[None]).clamp(0)
    inside = ((centers[None] - truth[:, None, :2]).amin(-1) > 0) & ((truth[:, None, 2:] - centers[None]).amin(-1) > 0)
    score = logits.sigmoid()[:, labels].T
    fit = score.sqrt() * iou**6 * inside
    best = torch.zeros_like(fit, dtype=torch.bool).scatter_(1, fit.topk(10, 1).indices, True) & inside & (fit > 1e-9)
    claimed = torch.where(best, iou, -1.0)
    value, index = claimed.max(0)
    owner[value >= 0] = index[value >= 0]
    held = torch.zeros_like(fit).scatter_(0, index[None], 1.0).bool() & best
    top_fit, top_iou = (fit * held).amax(1), (iou * held).amax(1)
    target = (fit * held / (top_fit[:, None] + 1e-9) * top_iou[:, None]).amax(0)
    return owner, target


def loss_of(
    taps: tuple[Tensor, Tensor], truths: list[tuple[Tensor, Tensor]], centers: Tensor, strides: Tensor
) -> Tensor:
    """Return the loss of one batch; ``taps`` are the head's distances ``[B, 4 * bins, N]`` and logits ``[B, C, N]``."""
    bins = torch.arange(BINS, dtype=torch.float32)
    total, weight = torch.zeros(()), torch.zeros(())
    for raw, logits, (truth, labels) in zip(taps[0], taps[1], truths, strict=True):
        spread = raw.T.view(-1, 4, BINS)
        distance = spread.softmax(-1) @ bins
        boxes = torch.cat((centers - distance[:, :2] * strides, centers + distance[:, 2:] * strides), 1)
        owner, target = assign(logits.T.detach(), boxes.detach(), truth, labels, centers)
        mine = owner >= 0
        classes = torch.zeros_like(logits.T)
        if mine.any():
            classes[mine, labels[owner[mine]]] = target[mine]
            goal = truth[owner[mine]]
            wanted = torch.cat((centers[mine] - goal[:, :2], goal[:, 2:] - centers[mine]), 1) / strides[mine]
            wanted = wanted.clamp(0, BINS - 1.01)
            left = wanted.long()
            frac = wanted - left
            rows = spread[mine].flatten(0, 1)
            dfl = F.cross_entropy(rows, left.flatten(), reduction="none") * (1 - frac.flatten())
            dfl = dfl + F.cross_entropy(rows, left.flatten() + 1, reduction="none") * frac.flatten()
            total = total + (7.5 * (1 - ciou(boxes[mine], goal)) + 1.5 * dfl.view(-1, 4).mean(1)) @ target[mine]
        total = total + 0.5 * F.binary_cross_entropy_with_logits(logits.T, classes, reduction="sum")
        weight = weight + target.sum()
    return total / weight.clamp(1.0)


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    Attributes:
        seed: of the images.
        steps: each on `BATCH` images.
        rate: the highest learning rate.
        shapes: what `draw_image` takes, with radii in pixels of the model's input: of the samples' 640 pixels, 256 are left.
    """

    seed: int
    steps: int
    rate: float
    shapes: dict[str, Any]


LIKE_SAMPLES = {"radii": (9.0, 42.0), "visible": 0.8, "contrast": 90.0}
STAGES = (
    Stage(0, 1600, 3e-3, {"radii": (6.0, 44.0), "visible": 0.65, "contrast": 70.0}),
    Stage(1, 1200, 1.5e-3, LIKE_SAMPLES),
    Stage(2, 1800, 2e-3, LIKE_SAMPLES),
)


def batch(rng: np.random.Generator, stage: Stage) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Draw images ``[BATCH, 3, CROP, CROP]`` (RGB, 0 to 1), and the boxes and labels of each.

    Half of the images have the gray margins that `Detector` adds.
    """
    images, truths = [], []
    for i in range(BATCH):
        margin = CROP // 8 * (i % 2)
        image, boxes, labels = draw_image(rng, CROP - 2 * margin, CROP, **stage.shapes)
        image = cv2.copyMakeBorder(image, margin, margin, 0, 0, cv2.BORDER_CONSTANT, value=(114, 114, 114))
        boxes = boxes + np.array([0, margin, 0, margin], np.float32)
        images.append(torch.from_numpy(image).permute(2, 0, 1).float() / 255)
        truths.append((torch.from_numpy(boxes), torch.from_numpy(labels)))
    return torch.stack(images).contiguous(memory_format=torch.channels_last), truths


def train(model: DetectionModel, stage: Stage, steps: int) -> DetectionModel:
    """Train for one stage; return a model with the moving average of the weights, in half precision."""
    rng, (centers, strides) = np.random.default_rng(stage.seed), grid(CROP)
    model = model.train().to(memory_format=torch.channels_last)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995), use_buffers=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.rate, weight_decay=1e-3)
    start = time.monotonic()
    for step in range(steps):
        rate = stage.rate * min(1, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        images, truths = batch(rng, stage)
        loss = loss_of(model(images), truths, centers, strides)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        averaged.update_parameters(model)
        if (step + 1) % 50 == 0:
            minutes = (time.monotonic() - start) / 60
            print(f"step {step + 1} of {steps}  loss {loss.item():.3f}  {minutes:.1f} minutes", flush=True)
    return averaged.module.eval().half().to(memory_format=torch.contiguous_format)


def save(model: DetectionModel, path: Path) -> None:
    """Write a checkpoint."""
    model.names = dict(enumerate(NAMES))
    model.task = "detect"
    model.stride = torch.tensor([float(s) for s in STRIDES])
    model.args = {"imgsz": SIZE}
    torch.save({"model": model, "license": "Apache-2.0"}, path)
    print(f"wrote {path}: {path.stat().st_size:,} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="of each stage, to try the script (default: all)")
    parser.add_argument(
        "--stage", type=int, choices=(1, 2, 3), default=1, help="start with this one, from the checkpoint in --out"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("shapes.pt"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    model = network() if args.stage == 1 else torch.load(args.out, weights_only=False)["model"]
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    for stage in STAGES[args.stage - 1 :]:
        model = train(model.float(), stage, args.steps or stage.steps)
        save(model, args.out)


if __name__ == "__main__":
    main()
