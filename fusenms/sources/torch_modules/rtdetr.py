"""Stand-ins for the modules of RT-DETR: the HGNetV2 backbone, the encoder's attention, and the decoder with its head.

Like those in `blocks.py`, they get their parts from the checkpoint. Sources: Zhao et al., "DETRs Beat YOLOs on Real-time Object Detection",
2023; Zhu et al., "Deformable DETR", 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fusenms.sources.torch_modules import fields
from fusenms.sources.torch_modules.blocks import Block
from fusenms.sources.torch_modules.fields import Field

GRID_SIZE, MARGIN = 0.05, 1e-2
"""Side of the anchors of the finest level, and minimum distance of an anchor from the edge, both normalized to the image."""


class HGStem(Block):
    """First layers of HGNetV2. They downsample by 4."""

    parts: ClassVar[frozenset[str]] = frozenset({"stem1", "stem2a", "stem2b", "stem3", "stem4", "pool"})

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(self.stem1(x), (0, 1, 0, 1))
        y = self.stem2b(functional.pad(self.stem2a(x), (0, 1, 0, 1)))
        return self.stem4(self.stem3(torch.cat((self.pool(x), y), 1)))


class LightConv(Block):
    """A convolution across channels, then a depthwise convolution."""

    parts: ClassVar[frozenset[str]] = frozenset({"conv1", "conv2"})

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class HGBlock(Block):
    """Concatenates the outputs of a chain of convolutions (HGNetV2)."""

    parts: ClassVar[frozenset[str]] = frozenset({"m", "sc", "ec"})
    attributes: ClassVar[Mapping[str, Field]] = {"add": fields.flag}
    add: bool

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for conv in self.m:
            maps.append(conv(maps[-1]))
        y = self.ec(self.sc(torch.cat(maps, 1)))
        return y + x if self.add else y


class RepC3(Block):
    """Sum of a chain of convolutions and one parallel convolution."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "cv3", "m"})

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.m(self.cv1(x)) + self.cv2(x))


class ResNetBlock(Block):
    """Bottleneck of a ResNet."""

    parts: ClassVar[frozenset[str]] = frozenset({"cv1", "cv2", "cv3", "shortcut"})

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.cv3(self.cv2(self.cv1(x))) + self.shortcut(x))


class ResNetLayer(Block):
    """One stage of a ResNet."""

    parts: ClassVar[frozenset[str]] = frozenset({"layer"})

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class MultiheadAttention(Block):
    """Replaces torch's `MultiheadAttention`, whose fast path would be traced. Batch first, without a mask."""

    parts: ClassVar[frozenset[str]] = frozenset({"out_proj"})
    attributes: ClassVar[Mapping[str, Field]] = {"num_heads": fields.channels, "add_zero_attn": fields.no}
    tensors: ClassVar[frozenset[str]] = frozenset({"in_proj_weight", "in_proj_bias"})
    add_zero_attn = False
    num_heads: int
    in_proj_weight: Tensor
    in_proj_bias: Tensor

    def forward(self, query: Tensor, value: Tensor) -> Tensor:
        """Attend with ``query`` as query and key. All tensors are ``[B, n, C]``."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, w, b).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for x, w, b in zip((query, query, value), weights, biases, strict=True)
        )
        share = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(3)
        return self.out_proj((share @ v).transpose(1, 2).flatten(2))


class AIFI(Block):
    """One transformer layer over the coarsest map, with a sine positional encoding of its cells."""

    parts: ClassVar[frozenset[str]] = frozenset(
        {"ma", "fc1", "fc2", "norm1", "norm2", "dropout", "dropout1", "dropout2", "act"}
    )
    attributes: ClassVar[Mapping[str, Field]] = {"normalize_before": fields.flag}
    normalize_before: bool

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        cells = x.flatten(2).transpose(1, 2)
        place = _sine_places(height, width, channels, x)
        if self.normalize_before:
            normed = self.norm1(cells)
            cells = cells + self.ma(normed + place, normed)
            cells = cells + self.fc2(self.act(self.fc1(self.norm2(cells))))
        else:
            cells = self.norm1(cells + self.ma(cells + place, cells))
            cells = self.norm2(cells + self.fc2(self.act(self.fc1(cells))))
        return cells.transpose(1, 2).unflatten(2, (height, width))


def _sine_places(height: int, width: int, channels: int, like: Tensor) -> Tensor:
    """Sine positional encoding of rows and columns, ``[1, cells, channels]``."""
    count = channels // 4
    rate = 10000.0 ** -(torch.arange(count, dtype=torch.float32) / count)
    row, column = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    turns = [place.reshape(-1, 1) * rate for place in (row, column)]
    return torch.cat([f(turn) for turn in turns for f in (torch.sin, torch.cos)], 1)[None].to(like.dtype)


class MLP(Block):
    """Linear layers with activations between them."""

    parts: ClassVar[frozenset[str]] = frozenset({"layers", "act", "out_norm"})
    attributes: ClassVar[Mapping[str, Field]] = {"sigmoid": fields.flag, "residual": fields.flag}
    sigmoid = False
    residual = False

    def forward(self, x: Tensor) -> Tensor:
        act = self._modules.get("act") or functional.relu
        y = x
        for layer in self.layers[:-1]:
            y = act(layer(y))
        y = self.layers[-1](y)
        y = y + x if self.residual else y
        norm = self._modules.get("out_norm")
        y = y if norm is None else norm(y)
        return y.sigmoid() if self.sigmoid else y


class MSDeformAttn(Block):
    """Attention to a few points of each level around the box of the query (Deformable DETR)."""

    parts: ClassVar[frozenset[str]] = frozenset({"sampling_offsets", "attention_weights", "value_proj", "output_proj"})
    attributes: ClassVar[Mapping[str, Field]] = {
        "n_levels": fields.channels,
        "n_heads": fields.channels,
        "n_points": fields.channels,
    }
    n_levels: int
    n_heads: int
    n_points: int

    def forward(self, query: Tensor, boxes: Tensor, value: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        """Attend from queries to the maps.

        Args:
            query: ``[B, n, C]``.
            boxes: ``[B, n, 4]``, cxcywh, normalized.
            value: ``[B, cells, C]``, the cells of all levels.
            shapes: (height, width) of each level, in cells.

        Returns:
            ``[B, n, C]``.
        """
        heads, points, count = self.n_heads, self.n_points, query.shape[1]
        offsets = self.sampling_offsets(query).unflatten(2, (heads, self.n_levels * points, 2))
        share = self.attention_weights(query).unflatten(2, (heads, self.n_levels * points)).softmax(3)
        at = boxes[:, :, None, None, :2] + offsets * (boxes[:, :, None, None, 2:] * (0.5 / points))
        places = (2 * at - 1).transpose(1, 2).flatten(0, 1).split(points, 2)  # [B * heads, n, points, 2] each
        cells = self.value_proj(value).unflatten(2, (heads, -1)).permute(0, 2, 3, 1).flatten(0, 1)
        maps = [
            part.unflatten(2, shape)
            for part, shape in zip(cells.split([h * w for h, w in shapes], 2), shapes, strict=True)
        ]
        seen = torch.cat(
            [
                functional.grid_sample(m, p, mode="bilinear", padding_mode="zeros", align_corners=False)
                for m, p in zip(maps, places, strict=True)
            ],
            3,
        )  # [B * heads, channels, n, points of all levels]
        weights = share.transpose(1, 2).flatten(0, 1).unsqueeze(1)
        mixed = (seen * weights).sum(3)  # [B * heads, channels, n]
        return self.output_proj(mixed.reshape(-1, value.shape[2], count).transpose(1, 2))


class DeformableTransformerDecoderLayer(Block):
    """Self-attention among the queries, then attention to the image."""

    parts: ClassVar[frozenset[str]] = frozenset({
        "self_attn", "dropout1", "norm1", "cross_attn", "dropout2", "norm2", "linear1", "act", "dropout3", "linear2", "dropout4", "norm3",
    })  # fmt: skip

    def forward(self, x: Tensor, place: Tensor, boxes: Tensor, value: Tensor, shapes: list[tuple[int, int]]) -> Tensor:
        x = self.norm1(x + self.self_attn(x + place, x))
        x = self.norm2(x + self.cross_attn(x + place, boxes, value, shapes))
        return self.norm3(x + self.linear2(self.act(self.linear1(x))))


class DeformableTransformerDecoder(Block):
    """A list of decoder layers. Each refines the boxes of the previous one. `RTDETRDecoder` runs them."""

    parts: ClassVar[frozenset[str]] = frozenset({"layers"})
    attributes: ClassVar[Mapping[str, Field]] = {"eval_idx": fields.index}
    eval_idx: int


class RTDETRDecoder(Block):
    """Head of RT-DETR. The cells with the best scores become queries.

    Anchors in the checkpoint are not used, because they are in half precision and for one size only.
    """

    parts: ClassVar[frozenset[str]] = frozenset({
        "input_proj", "decoder", "denoising_class_embed", "tgt_embed", "query_pos_head", "enc_output", "enc_score_head", "enc_bbox_head",
        "dec_score_head", "dec_bbox_head",
    })  # fmt: skip
    attributes: ClassVar[Mapping[str, Field]] = {
        "nc": fields.channels,
        "num_queries": fields.channels,
        "learnt_init_query": fields.flag,
    }
    nc: int
    num_queries: int
    learnt_init_query: bool

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return boxes ``[B, queries, 4]`` (cxcywh, normalized to the input) and class logits ``[B, queries, C]``."""
        maps = [project(level) for project, level in zip(self.input_proj, levels, strict=True)]
        shapes = [(int(m.shape[2]), int(m.shape[3])) for m in maps]
        cells = torch.cat([m.flatten(2).transpose(1, 2) for m in maps], 1)
        anchors, inside = _anchors(shapes)
        features = self.enc_output(cells * inside)
        best = self.enc_score_head(features).amax(2)
        index = best.topk(min(self.num_queries, best.shape[1]), 1)[1].unsqueeze(2)  # [B, queries, 1]
        x = features.gather(1, index.expand(-1, -1, features.shape[2]))
        boxes = (self.enc_bbox_head(x) + anchors[index.squeeze(2)]).sigmoid()
        if self.learnt_init_query:
            x = self.tgt_embed.weight[: x.shape[1]].expand_as(x)
        last = self.decoder.eval_idx % len(self.decoder.layers)
        for i, layer in enumerate(self.decoder.layers[: last + 1]):
            x = layer(x, self.query_pos_head(boxes), boxes, cells, shapes)
            boxes = (self.dec_bbox_head[i](x) + _logit(boxes)).sigmoid()
        return boxes, self.dec_score_head[last](x)


def _anchors(shapes: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """One anchor for each cell.

    Returns:
        logits of the anchors ``[cells, 4]`` (cxcywh, normalized), infinite if the anchor is too near to an edge of the image; and a mask
        ``[cells, 1]``, 0 for these cells and 1 for the others.
    """
    every = []
    for level, (height, width) in enumerate(shapes):
        row, column = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
        side = torch.full_like(row, GRID_SIZE * 2.0**level)
        every.append(torch.stack((column / width, row / height, side, side), 2).reshape(-1, 4))
    boxes = torch.cat(every)
    inside = ((boxes > MARGIN) & (boxes < 1 - MARGIN)).all(1, keepdim=True)
    return torch.log(boxes / (1 - boxes)).masked_fill(~inside, torch.inf), inside.float()


def _logit(x: Tensor, least: float = 1e-5) -> Tensor:
    return torch.log(x.clamp(min=least) / (1 - x).clamp(min=least))


MODULES: tuple[type[nn.Module], ...] = (
    HGStem, LightConv, HGBlock, RepC3, ResNetBlock, ResNetLayer, AIFI, MLP, MSDeformAttn, DeformableTransformerDecoderLayer,
    DeformableTransformerDecoder, RTDETRDecoder,
)  # fmt: skip
