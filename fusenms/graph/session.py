"""Every ONNX Runtime session of the package is opened here, with a time limit on each run and with the errors of fusenms.

ONNX Runtime checks its stop flag before each node, in loops too. One thread watches all current runs, so a run costs only a few
microseconds more. A single operator and the creation of a session cannot be stopped; `onnx_reading` bounds both if shapes are known.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusenms.errors import (
    BackendUnavailableError,
    InputError,
    RunError,
    SourceError,
    UnsupportedOperatorError,
    first_line,
)
from fusenms.graph import custom_ops
from fusenms.graph.custom_ops import MISSING
from fusenms.limits import DEFAULT_LIMITS

if TYPE_CHECKING:
    import onnx

Provider = str | tuple[str, dict[str, Any]]
"""An execution provider of ONNX Runtime: its name, or its name and its options."""
_LACKS_OPERATOR = re.compile("is not a registered function/op|No opset import for domain|Unrecognized schema")


class Session:
    """A model opened in ONNX Runtime. Safe to call from several threads.

    Attributes:
        inputs: names of its inputs.
        outputs: names of its outputs.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        *,
        source: str,
        max_seconds: float = DEFAULT_LIMITS.max_run_seconds,
        providers: Sequence[Provider] = ("CPUExecutionProvider",),
        threads: int | None = None,
        arena: bool = True,
        spinning: bool = False,
        options: Any = None,
    ) -> None:
        """Open a model.

        Args:
            source: name of the file, for messages.
            max_seconds: time limit of one run.
            providers: execution providers, in order of preference, each a name or a name with options.
            threads: threads of one run; default: ONNX Runtime's choice.
            arena: keep freed memory for the next run, as ONNX Runtime does by default.
            spinning: let threads wait for their next work in a busy loop, as ONNX Runtime does by default. It gains some percent where the
                session has the cores to itself, and delays everything else that runs on them, other sessions among it.
            options: an `onnxruntime.SessionOptions` to start from, instead of ``spinning``; ``threads`` and ``arena`` are set on it.

        Raises:
            BackendUnavailableError: ONNX Runtime, or a provider, is not installed or cannot start on this machine.
            UnsupportedOperatorError: ONNX Runtime, with the libraries of `custom_ops`, lacks an operator of the model.
            SourceError: ONNX Runtime refuses the model.
        """
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise BackendUnavailableError(MISSING) from error
        available = onnxruntime.get_available_providers()
        names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        if missing := [name for name in names if name not in available]:
            raise BackendUnavailableError(f"ONNX Runtime has no {', '.join(missing)}; it has {', '.join(available)}")
        if options is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4  # problems are raised as errors
            if not spinning:
                options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.enable_cpu_mem_arena = arena
        if threads is not None:
            options.intra_op_num_threads = threads
        custom_ops.register(options)
        self._source, self._max_seconds, self._new_options = source, max_seconds, onnxruntime.RunOptions
        try:
            self._session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=list(providers))
            self.inputs = [entry.name for entry in self._session.get_inputs()]
            self.outputs = [entry.name for entry in self._session.get_outputs()]
        except Exception as error:  # ONNX Runtime raises its own exception types, protobuf a ValueError beyond 2 GB
            if (foreign := custom_ops.foreign_operators(model)) and _LACKS_OPERATOR.search(str(error)):
                raise UnsupportedOperatorError(
                    f"{source}: {lacking(foreign)}; give its library: custom_ops='LIB'"
                ) from error
            raise SourceError(
                f"{source}: ONNX Runtime refuses the model ({first_line(error)}); it is damaged, or too new for this version"
            ) from error
        if lost := [name for name in names if name not in self._session.get_providers()]:
            raise BackendUnavailableError(
                f"ONNX Runtime has {', '.join(lost)}, but cannot start it on this machine; expected its hardware, driver and libraries "
                "(CUDA: an NVIDIA GPU, and CUDA and cuDNN of the version that onnxruntime-gpu was built for)"
            )

    def run(self, inputs: Mapping[str, np.ndarray], outputs: Sequence[str] | None = None) -> list[Any]:
        """Run the model and return the values of all outputs, or of those named.

        Raises:
            RunError: ONNX Runtime fails, or does not finish within the time limit.
            InputError: the session is closed.
        """
        session = self.__dict__.get("_session")
        if session is None:
            raise InputError(f"{self._source}: is closed; open the file again")
        options = self._new_options()
        number = _watch.start(options, self._max_seconds)
        try:
            return session.run(list(outputs) if outputs is not None else None, dict(inputs), options)
        except Exception as error:  # ONNX Runtime raises its own exception types
            if options.terminate:
                raise RunError(
                    f"{self._source}: one run took longer than {self._max_seconds:g} s and was stopped (max_run_seconds); "
                    "raise that limit only for a file that you trust"
                ) from error
            raise RunError(f"{self._source}: does not run in ONNX Runtime ({first_line(error)})") from error
        finally:
            _watch.stop(number)

    def close(self) -> None:
        """Free the model."""
        self.__dict__.pop("_session", None)


def lacking(operators: Mapping[str, str]) -> str:
    """Says that nothing here runs some operators: ``domain::operator`` to the name of a node."""
    named = ", ".join(f"{name} (node {node!r})" for name, node in operators.items())
    given = f" and {', '.join(libraries)}" if (libraries := custom_ops.current_libraries()) else ""
    return f"ONNX Runtime{given} {'have' if given else 'has'} no operator {named}"


def missing_operators(model: onnx.ModelProto) -> dict[str, str]:
    """Operators of other domains, if ONNX Runtime with the libraries of `custom_ops` cannot open the model for lack of one."""
    if not (foreign := custom_ops.foreign_operators(model)):
        return {}
    try:
        Session(model, source="model").close()
    except UnsupportedOperatorError:
        return foreign
    return {}


class _Watch:
    """Stops runs that take too long. Its thread exists during runs, and for up to one time limit after the last one."""

    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._forget()

    def _forget(self) -> None:
        """Reset the state. A forked process does not have the thread."""
        self._changed = threading.Condition()
        self._runs: dict[int, tuple[float, Any]] = {}
        self._wakes = float("inf")
        self._thread: threading.Thread | None = None

    def start(self, options: Any, seconds: float) -> int:
        """Watch a run; return its number."""
        number, deadline = next(self._numbers), time.monotonic() + seconds
        with self._changed:
            self._runs[number] = (deadline, options)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="fusenms-time-limit", daemon=True)
                self._thread.start()
            elif deadline < self._wakes:
                self._changed.notify()
        return number

    def stop(self, number: int) -> None:
        with self._changed:
            self._runs.pop(number, None)

    def _work(self) -> None:
        with self._changed:
            while self._runs:
                now = time.monotonic()
                for number, (deadline, options) in list(self._runs.items()):
                    if deadline <= now:
                        options.terminate = True
                        del self._runs[number]
                self._wakes = min((deadline for deadline, _ in self._runs.values()), default=now)
                if self._wakes > now:
                    self._changed.wait(min(self._wakes - now, threading.TIMEOUT_MAX))
            self._thread, self._wakes = None, float("inf")


_watch = _Watch()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_watch._forget)


class OnnxRuntimeRunner:
    """Runs a fused model in ONNX Runtime. Safe to call from several threads."""

    def __init__(
        self,
        model: onnx.ModelProto,
        providers: Sequence[Provider] = ("CPUExecutionProvider",),
        threads: int | None = None,
        *,
        arena: bool = True,
        spinning: bool = False,
        options: Any = None,
        source: str = "the model",
        max_seconds: float = DEFAULT_LIMITS.max_run_seconds,
    ) -> None:
        """Open the model. Arguments and errors are those of `fusenms.graph.session.Session`."""
        self._session = Session(
            model,
            source=source,
            max_seconds=max_seconds,
            providers=providers,
            threads=threads,
            arena=arena,
            spinning=spinning,
            options=options,
        )
        self.inputs, self.outputs = self._session.inputs, self._session.outputs

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on inputs by name; return outputs by name.

        Raises:
            RunError: ONNX Runtime fails, or does not finish within the time limit.
        """
        return dict(zip(self.outputs, self._session.run(inputs), strict=True))

    def infer(self, images: np.ndarray, more: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
        """Run on images ``[B, 3, height, width]`` float32 and optional inputs; return outputs by name."""
        return self.run({self.inputs[0]: images, **(more or {})})

    def close(self) -> None:
        self._session.close()
