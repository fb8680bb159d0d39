"""Detection in data sets on a cluster, with Ray Data."""

from __future__ import annotations

from fusenms.cluster.detecting import DatasetRun, detect_dataset

__all__ = ["DatasetRun", "detect_dataset"]
