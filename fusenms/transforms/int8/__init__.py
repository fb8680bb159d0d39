"""int8 as a typed graph: the network is quantized up to its last convolutions; these, the decode and the suppression stay float32.

1. `places`: which convolutions are quantized, and which operators between them.
2. `calibration`: the range of each tensor, measured on images.
3. `to_int8`: the graph with pairs of `QuantizeLinear` and `DequantizeLinear` (Q/DQ), by ONNX Runtime's quantizer.
4. `ranking`: what each convolution costs, so that the dearest can stay float32.

Scales are constants, so that the images of a batch do not change each other's results.
"""

from __future__ import annotations

from fusenms.transforms.int8.calibration import Calibrated, calibrate
from fusenms.transforms.int8.network import SCHEMES, Scheme, network_of, to_int8
from fusenms.transforms.int8.places import Layer, Places, places
from fusenms.transforms.int8.ranking import Cost, rank

__all__ = [
    "SCHEMES",
    "Calibrated",
    "Cost",
    "Layer",
    "Places",
    "Scheme",
    "calibrate",
    "network_of",
    "places",
    "rank",
    "to_int8",
]
