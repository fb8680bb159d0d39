"""Child processes with limits on memory and time, for files of unknown origin.

The operating system enforces the limits: memory for data on Linux (``RLIMIT_DATA``), no core file, and time on every system. A child
process is not a sandbox: it can read and write everything that its parent can.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from fusenms.errors import SourceError
from fusenms.limits import Limits

_START = """
import runpy, sys
from fusenms.safety.isolation import confine
confine(int(sys.argv.pop(1)))
runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
"""


_confined = False


def is_confined() -> bool:
    """Whether this process is a child process with limits."""
    return _confined


def confine(memory: int) -> None:
    """Limit the data memory of this process permanently. Does nothing if the system has no such limit.

    Args:
        memory: limit in bytes.
    """
    global _confined
    _confined = True
    try:
        import resource
    except ModuleNotFoundError:
        return
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    most = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    with contextlib.suppress(ValueError, OSError):  # macOS
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def run_isolated(
    module: str, arguments: Sequence[str], limits: Limits, *, what: str, given: bytes | None = None
) -> int:
    """Run a Python module as a program in a child process with limits.

    Args:
        module: name of the module, as for ``python -m``.
        arguments: command-line arguments of the program.
        what: the file that the program reads, for messages.
        given: standard input of the program; default: that of this process.

    Returns:
        the exit status.

    Raises:
        SourceError: the child process exceeded the time limit, or a signal ended it, for example because native code ran out of memory.
    """
    command = [sys.executable, "-c", _START, str(limits.max_isolated_bytes), module, *arguments]
    child = subprocess.Popen(
        command, stdin=None if given is None else subprocess.PIPE, start_new_session=os.name == "posix"
    )
    try:
        child.communicate(given, timeout=limits.max_isolated_seconds)
    except subprocess.TimeoutExpired as error:
        raise SourceError(
            f"{what}: the child process took more than {limits.max_isolated_seconds:g} s, and was stopped; "
            "if the file is trusted, raise max_isolated_seconds"
        ) from error
    finally:
        _end(child)
    if child.returncode < 0:
        raise SourceError(
            f"{what}: the child process was ended by signal {-child.returncode}, possibly because it ran out of memory "
            f"(at most {limits.max_isolated_bytes} bytes); if the file is trusted, raise max_isolated_bytes"
        )
    return child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child process and the processes that it started."""
    if child.poll() is None:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()
