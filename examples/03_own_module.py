"""An nn.Module with a head of your own, described by a Layout."""

import torch

import fusenms
from fusenms.layout import Activation, BoxFormat, Decoded, Layout, Tap


class TinyDetector(torch.nn.Module):
    """Boxes ``[B, 64, 4]`` (cx, cy, w, h, normalized) and class logits ``[B, 64, 3]``."""

    def __init__(self):
        super().__init__()
        self.features = torch.nn.Conv2d(3, 7, 8, 8)

    def forward(self, images):
        rows = self.features(images).flatten(2).transpose(1, 2)
        return rows[..., :4].sigmoid(), rows[..., 4:] * 8


torch.manual_seed(0)
layout = Layout(
    family="tiny",
    boxes=Tap("boxes", channel_axis=2, start=0, stop=4),
    classes=Tap("logits", channel_axis=2, start=0, stop=3),
    objectness=None,
    activation=Activation.SIGMOID,
    decode=Decoded(BoxFormat.CXCYWH, normalized=True),
)
fused = fusenms.fuse(
    TinyDetector(), example=torch.rand(1, 3, 64, 64), layout=layout, class_names=["cat", "dog", "bird"]
)
print(fused.report.summary)
print(fused.save("tiny.ort.onnx"))
