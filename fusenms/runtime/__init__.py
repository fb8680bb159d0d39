"""Runs fused models on images."""

from fusenms.runtime.detections import Detections
from fusenms.runtime.detector import Detector

__all__ = ["Detections", "Detector"]
