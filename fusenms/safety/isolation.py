"""Child processes with limits on memory and time, for files of unknown origin.

The limits are those of the operating system: memory for data on Linux (``RLIMIT_DATA``), no core file, and time everywhere. A child
process is no sandbox: it may read and write what its parent may.
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
    """Whether this is a child process with limits."""
    return _confined


def confine(memory: int) -> None:
    """Limit this process to so many bytes of memory for data, for good. Does nothing where the system has no such limit."""
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
    """Run a module of Python as a program in a child process with limits.

    Args:
        module: its name, as for ``python -m``.
        arguments: of the program.
        what: the file that it reads, for messages.
        given: its standard input; default: that of this process.

    Returns:
        its exit status.

    Raises:
        SourceError: the child process took too much time, or was ended by a signal, as it is where memory runs out in native code.
    """
    command = [sys.executable, "-c", _START, str(limits.max_isolated_bytes), module, *arguments]
    child = subprocess.Popen(
        command, stdin=None if given is None else subprocess.PIPE, start_new_session=os.name == "posix"
    )
    try:
        child.communicate(given, timeout=limits.max_isolated_seconds)
    except subprocess.TimeoutExpired as error:
        raise SourceError(
            f"{what}: it took more than {limits.max_isolated_seconds:g} s, and was stopped; "
            "if the file is trusted, raise max_isolated_seconds"
        ) from error
    finally:
        _end(child)
    if child.returncode < 0:
        raise SourceError(
            f"{what}: it was ended by signal {-child.returncode}, as it is where memory runs out "
            f"(at most {limits.max_isolated_bytes} bytes); if the file is trusted, raise max_isolated_bytes"
        )
    return child.returncode


def _end(child: subprocess.Popen[bytes]) -> None:
    """End a child process and those that it has started."""
    if child.poll() is None:
        if os.name == "posix":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()
