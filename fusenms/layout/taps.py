"""Channels of a head: `Tap` names some of a tensor, `Join` makes one tensor of several."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fusenms.errors import ConfigError

MOST_CHANNELS = 2**24
"""Limit on the channels of one head tensor. float32 holds every integer up to this one."""
LARGEST = float(np.finfo(np.float32).max)
"""Limit on the magnitude of numbers that become constants of the graph."""


def other_axis(axis: int) -> int:
    """Return the other axis of a head tensor ``[B, …, …]``: 2 for 1, and 1 for 2."""
    return 3 - axis


@dataclass(frozen=True)
class Tap:
    """A range of channels of a head tensor ``[B, C, N]`` (``channel_axis`` 1) or ``[B, N, C]`` (``channel_axis`` 2).

    ``tensor`` is the tensor's name in the graph. The channels run from ``start`` up to but not including ``stop``.
    """

    tensor: str
    channel_axis: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not is_name(self.tensor):
            raise ConfigError(f"tap of {self.tensor!r}; expected the name of a tensor")
        whole = all(type(value) is int for value in (self.channel_axis, self.start, self.stop))
        if not whole or self.channel_axis not in (1, 2) or not 0 <= self.start < self.stop <= MOST_CHANNELS:
            raise ConfigError(
                f"tap of {self.tensor!r}: axis {self.channel_axis!r}, channels {self.start!r} to {self.stop!r}; expected axis 1 or 2, and "
                f"channels with 0 <= start < stop <= {MOST_CHANNELS}"
            )

    @property
    def channels(self) -> int:
        return self.stop - self.start

    @property
    def candidate_axis(self) -> int:
        """Axis of the candidates: the one that does not hold the channels."""
        return other_axis(self.channel_axis)


@dataclass(frozen=True)
class Join:
    """A head tensor that fusing builds from tensors of the model, usually one per level, only by moving values.

    With ``channel_axis`` 2, a part is ``[B, anchors, rows, columns, C]`` or ``[B, n, C]``; with 1, it is ``[B, C, rows, columns]`` or
    ``[B, C, n]``. With several ``anchors`` (and ``channel_axis`` 2), a part is ``[B, anchors * C, rows, columns]``, the channels of an
    anchor side by side. Parts of another dtype are cast to float32.
    """

    tensor: str
    parts: tuple[str, ...]
    channel_axis: int
    channels: int
    anchors: int = 1

    def __post_init__(self) -> None:
        parts = isinstance(self.parts, tuple) and self.parts and all(map(is_name, self.parts))
        if not is_name(self.tensor) or not parts:
            raise ConfigError(
                f"join of {self.parts!r} into {self.tensor!r}; expected names of tensors, at least one part"
            )
        whole = type(self.channel_axis) is int and type(self.channels) is int
        if not whole or self.channel_axis not in (1, 2) or not 1 <= self.channels <= MOST_CHANNELS:
            raise ConfigError(
                f"join of {self.tensor!r}: axis {self.channel_axis!r}, {self.channels!r} channels; expected axis 1 or 2, and 1 to "
                f"{MOST_CHANNELS} channels"
            )
        if type(self.anchors) is not int or not 1 <= self.anchors * self.channels <= MOST_CHANNELS:
            raise ConfigError(f"join of {self.tensor!r}: anchors is {self.anchors!r}; expected a whole number from 1")
        if self.anchors > 1 and self.channel_axis != 2:
            raise ConfigError(f"join of {self.tensor!r}: {self.anchors} anchors require channel_axis 2")

    @property
    def candidate_axis(self) -> int:
        """Axis of the candidates, along which the parts are concatenated."""
        return other_axis(self.channel_axis)

    @property
    def part_shape(self) -> tuple[int, int, int]:
        """Shape that each part is brought to: 0 copies the batch, -1 is inferred."""
        return (0, -1, self.channels) if self.channel_axis == 2 else (0, self.channels, -1)


def check_tap(name: str, tap: Any, channels: int | None = None) -> None:
    """Raise a `ConfigError` unless a value is a `Tap`, and of so many channels."""
    if not isinstance(tap, Tap) or channels not in (None, tap.channels):
        found = f"has {tap.channels} channels" if isinstance(tap, Tap) else f"is {tap!r}"
        raise ConfigError(f"{name} {found}; expected a Tap{f' of {channels}' if channels else ''}")


def is_name(value: Any) -> bool:
    """Whether a value is a text that is not empty."""
    return isinstance(value, str) and bool(value)


def is_finite(value: Any) -> bool:
    """Whether a value is a number in the range of float32."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and bool(abs(value) <= LARGEST)


def named(kind: Any) -> str:
    """The names of classes, or of the values of an enumeration, for an error."""
    return (
        ", ".join(k.__name__ for k in kind)
        if isinstance(kind, tuple)
        else ", ".join(f"{kind.__name__}.{k.name}" for k in kind)
    )
