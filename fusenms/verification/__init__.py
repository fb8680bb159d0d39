"""A fused model to its report: the proof."""

from fusenms.artifacts.report import Check, Report
from fusenms.verification.checks import verify

__all__ = ["Check", "Report", "verify"]
