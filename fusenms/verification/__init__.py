"""From a fused model to its report."""

from fusenms.artifacts.report import Check, Report
from fusenms.verification.checks import verify

__all__ = ["Check", "Report", "verify"]
