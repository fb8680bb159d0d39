"""`Pixels`: the pixel format that a network expects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fusenms.errors import ConfigError


@dataclass(frozen=True)
class Pixels:
    """The input that a network expects for an image ``p`` (RGB, 0 to 1): ``(p * scale - mean) / std``, in the order of ``channels``.

    Attributes:
        channels: order of the colors that the network expects, rgb or bgr.
        scale: highest value of a color before the mean is subtracted, as 1 or 255.
        mean: mean of each color in the order of the channels, in units of the scale.
        std: standard deviation of each color in the order of the channels, in units of the scale.

    Example:
        >>> from fusenms.artifacts.preprocessing import Pixels
        >>> str(Pixels("bgr", 255.0))
        'BGR from 0 to 255'
    """

    channels: str = "rgb"
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        if self.channels not in ("rgb", "bgr"):
            raise ConfigError(f"channels is {self.channels!r}; expected 'rgb' or 'bgr'")
        if not 0 < self.scale < float("inf"):
            raise ConfigError(f"scale is {self.scale!r}; expected a positive number")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(self.std):
            raise ConfigError(f"mean is {self.mean!r}, std is {self.std!r}; expected three numbers each, std not 0")

    def __str__(self) -> str:
        text = f"{self.channels.upper()} from 0 to {self.scale:g}"
        normal = ", ".join(f"({v:g})" if v < 0 else f"{v:g}" for v in self.mean), ", ".join(f"{v:g}" for v in self.std)
        return f"{text}, less ({normal[0]}), over ({normal[1]})" if any(self.mean) or set(self.std) != {1.0} else text

    def apply(self, images: np.ndarray) -> np.ndarray:
        """Convert images ``[B, 3, height, width]`` float32 (RGB, 0 to 1) to the format that the network expects."""
        ordered = images[:, ::-1] if self.channels == "bgr" else images
        factor, offset = self.terms
        return ordered * factor + offset

    @property
    def terms(self) -> tuple[np.ndarray, np.ndarray]:
        """The same conversion as a factor and an offset, ``[1, 3, 1, 1]`` float32 each."""
        mean, std = (np.array(values, np.float64).reshape(1, 3, 1, 1) for values in (self.mean, self.std))
        return (self.scale / std).astype(np.float32), (-mean / std).astype(np.float32)


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


PIXELS: dict[str, Pixels] = {
    "rgb": Pixels(),
    "bgr": Pixels("bgr"),
    "rgb255": Pixels(scale=255.0),
    "bgr255": Pixels("bgr", 255.0),
    "imagenet": Pixels("rgb", 1.0, *_IMAGENET),
    "bgr255-imagenet": Pixels("bgr", 255.0, (103.53, 116.28, 123.675), (57.375, 57.12, 58.395)),
}
"""Pixel formats by name: 0 to 1 or 0 to 255, RGB or BGR, optionally normalized with ImageNet's mean and standard deviation."""
