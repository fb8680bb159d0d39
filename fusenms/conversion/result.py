"""`Conversion`: a file that was fused again, or cut back to its head."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from fusenms.artifacts.fused import FusedModel
from fusenms.artifacts.raw import RawModel
from fusenms.artifacts.report import Report
from fusenms.conversion.semantics import Semantics
from fusenms.conversion.third_party import RowsCompared
from fusenms.errors import SourceError
from fusenms.layout import Layout
from fusenms.safety.files import write_together
from fusenms.verification.agreement import Agreement

LAYOUT_SUFFIX = ".layout.json"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What `fusenms.convert` or `fusenms.configure` made of a file.

    Attributes:
        source: name of the file.
        found: what suppressed in the file, in words.
        model: the fused model with its report; None if the raw head was asked for.
        raw: the network up to the head.
        layout: the meaning of the head, in the tensors of ``raw``.
        changes: what is other than in the file, a line each.
        agreement: detections of the file and of ``model`` on images, if fusenms made the file; None if nothing was compared.
        semantics: what the suppression of a third-party file does.
        rows: rows of a third-party file beside the reference on images.
        lost: what the file does that the new one does not, a line each.
        meaning: what the network of a third-party file shows of its head, and what is assumed, a line each.

    Example:
        >>> import fusenms
        >>> path = fusenms.fuse("yolov8n.pt", size=64).save("yolov8n.ort.onnx")
        >>> made = fusenms.convert(path, "raw")
        >>> made.model is None, made.layout.family
        (True, 'yolov8')
    """

    source: str
    found: str
    model: FusedModel | None
    raw: RawModel = field(repr=False)
    layout: Layout
    changes: tuple[str, ...] = ()
    agreement: Agreement | None = None
    semantics: Semantics | None = None
    rows: RowsCompared | None = None
    lost: tuple[str, ...] = ()
    meaning: tuple[str, ...] = ()

    @property
    def report(self) -> Report | None:
        """The comparison with the reference; None for a raw head."""
        return None if self.model is None else self.model.report

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the file and return its path. A raw head has its layout beside it, in ``FILE.layout.json``; both are written or none.

        Raises:
            SourceError: the path cannot be written.
            VerificationError: the model differs from the reference.
        """
        if self.model is not None:
            return self.model.save(path)
        if not isinstance(path, (str, os.PathLike)):
            raise SourceError(f"found a {type(path).__name__}; expected the path of a file to write")
        from fusenms.conversion.own import raw_file

        text = json.dumps(self.layout.to_dict(), indent=2) + "\n"
        return write_together({layout_path(path): text.encode(), Path(path): raw_file(self.raw)})[1]


def layout_path(path: str | os.PathLike[str]) -> Path:
    """Where the layout of a raw file is written: ``yolov8n.raw.onnx`` has ``yolov8n.raw.layout.json``."""
    return Path(path).with_suffix(LAYOUT_SUFFIX)
