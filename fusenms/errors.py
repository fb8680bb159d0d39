"""The errors that fusenms raises on purpose. All derive from :class:`FusenmsError`.

A message says what was found, what was expected, and what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusenms.artifacts.report import Report


class FusenmsError(Exception):
    """Base of all errors that fusenms raises on purpose."""


class ConfigError(FusenmsError, ValueError):
    """A setting is out of its range, or two settings contradict each other."""


class SourceError(FusenmsError):
    """The weights cannot be read, are not a detector, or are not safe to load."""


class RunError(SourceError):
    """A graph fails at run time, takes too long, or returns other outputs than it declares: the file is damaged."""


class UnsupportedOperatorError(SourceError):
    """An operator of the network is not exported, or nothing here runs it."""


class HeadError(FusenmsError):
    """The raw head of the model cannot be used."""


class HeadNotRecognizedError(HeadError):
    """No detector family fits the model; the message lists each family's reason."""


class AmbiguousHeadError(HeadError):
    """More than one detector family fits the model."""


class LayoutContradictedError(HeadError):
    """The network's scores or boxes contradict the layout that its head is read by."""


class AlreadyFusedError(HeadError):
    """The model already ends in detections."""


class SuppressionError(HeadError):
    """The suppression of a third-party file cannot be cut out, or the file gives other rows than what was read."""


class FusionError(FusenmsError):
    """The fused graph could not be built although head and settings are valid. This is a bug in fusenms."""


class BackendError(FusenmsError):
    """A backend cannot do what was asked."""


class BackendUnavailableError(BackendError):
    """The package that the backend runs on is not installed."""


class UnsupportedByBackendError(BackendError):
    """The backend cannot express the requested settings."""


class EngineBuildError(BackendError):
    """The builder cannot build an engine from the model."""


class VerificationError(FusenmsError):
    """The fused model differs from the reference. ``report`` lists every difference."""

    def __init__(self, message: str, report: Report) -> None:
        super().__init__(message)
        self.report = report


class DriftError(FusenmsError):
    """The int8 model finds other objects than the float32 model. ``drift`` is the share that is not the same."""

    def __init__(self, message: str, drift: float) -> None:
        super().__init__(message)
        self.drift = drift


class InputError(FusenmsError, ValueError):
    """An image or another input of a fused model cannot be used."""


def first_line(error: BaseException) -> str:
    """The first line of an error, for the end of a message: at most 300 characters, all of them visible."""
    text = str(error).strip()
    line = text.splitlines()[0][:300] if text else type(error).__name__
    return "".join(char if char.isprintable() else " " for char in line)
