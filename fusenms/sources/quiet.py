"""Keeps what PyTorch's exporters say away from standard output and standard error."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch


@contextmanager
def quiet_exporters() -> Iterator[list[warnings.WarningMessage]]:
    """Silence prints, log records and warnings, and yield the list that warnings go to. Global state: for one export at a time.

    The TorchScript exporter prints the whole graph if an export fails, because it takes its own log for enabled
    (`setup_onnx_logging` tests a function instead of calling it, in PyTorch 2.13).
    """
    native: Any = torch._C
    before, log = logging.root.manager.disable, native._jit_onnx_log
    logging.disable(logging.CRITICAL)
    native._jit_onnx_log = lambda *_: None
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield caught
    finally:
        native._jit_onnx_log = log
        logging.disable(before)
