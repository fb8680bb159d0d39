"""The command line. Each subcommand has its own file, which parses arguments, calls the public function and prints the result."""

from __future__ import annotations

import argparse
import errno
import json
import sys
import traceback
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

from fusenms._version import __version__
from fusenms.cli import (
    bench,
    compare,
    configure,
    convert,
    demo,
    deploy,
    detect,
    doctor,
    edit,
    engine,
    eval,
    expose,
    extract,
    families,
    fuse,
    inspect,
    restamp,
    serve,
    verify,
)
from fusenms.cli.flags import with_flags
from fusenms.cli.terminal import standard_streams
from fusenms.errors import FusenmsError
from fusenms.fusion.backends import BACKENDS
from fusenms.graph.custom_ops import custom_ops
from fusenms.limits import Limits
from fusenms.safety.isolation import is_confined, run_isolated
from fusenms.safety.text import printable, printable_lines

COMMANDS = {
    module.NAME: module
    for module in (
        fuse,
        inspect,
        verify,
        engine,
        deploy,
        detect,
        serve,
        eval,
        families,
        bench,
        demo,
        doctor,
        compare,
        expose,
        extract,
        edit,
        restamp,
        convert,
        configure,
    )
}
USAGE = """fusenms WEIGHTS [--backend {backends}] [-o FILE] [options]
       fusenms {commands} ..."""


class Parser(argparse.ArgumentParser):
    """A parser that escapes its error messages, because they repeat arguments that could control a terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with all subcommands."""
    parser = Parser(
        prog="fusenms",
        usage=USAGE.format(
            backends="|".join(BACKENDS), commands="|".join(name for name in COMMANDS if name != fuse.NAME)
        ),
        description="Fuse a detector's post-processing (decoding and non-maximum suppression) into its ONNX graph, and prove the result.",
        epilog="Without a subcommand, the first argument is WEIGHTS:  fusenms yolov8n.pt --backend trt",
    )
    parser.add_argument("--version", action="version", version=f"fusenms {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        command = commands.add_parser(name, prog=f"fusenms {name}", help=module.HELP, description=module.HELP)
        module.add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object instead of text")
        command.add_argument(
            "--isolate",
            action="store_true",
            help="run in a child process with limits on memory and time, for files of unknown origin",
        )
        command.add_argument(
            "--limit",
            type=limit_argument,
            action="append",
            default=[],
            metavar="NAME=N",
            help="change a limit on the cost of files, such as max_file_bytes=100000000",
        )
        command.add_argument(
            "--custom-ops",
            action="append",
            default=[],
            metavar="LIB",
            help="library of ONNX Runtime custom operators, which is opened: name only your own; may be given several times",
        )
        command.add_argument("-v", "--verbose", action="store_true", help="show the traceback of an error")
    return parser


def limit_argument(text: str) -> tuple[str, float]:
    """Parse a limit, ``NAME=N``."""
    name, _, value = text.partition("=")
    kinds = {field.name: float if field.type == "float" else int for field in fields(Limits)}
    if name not in kinds:
        raise argparse.ArgumentTypeError(f"found {name!r}; expected one of {', '.join(kinds)}")
    try:
        return name, kinds[name](value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"found {text!r}; expected a number after the equals sign") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return 0 (done) or 1 (a FusenmsError, with one message; 2 from compare). A usage error raises SystemExit with
    code 2.

    A command finishes its work even if its output cannot be written, and then returns 1 with a message. A closed pipe is no error.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    with standard_streams() as output:
        stop: SystemExit | None = None
        try:
            status = _run(words)
        except SystemExit as error:  # from argparse
            status, stop = 0 if error.code in (0, None) else 2, error
        output.flush()
        if status == 0 and output.error is not None and output.error.errno != errno.EPIPE:
            reason = output.error.strerror or output.error
            print(
                f"fusenms: standard output cannot be written ({reason}); everything else was done, and all files are complete",
                file=sys.stderr,
            )
            return 1
    if stop is not None:
        raise stop
    return status


def _run(words: list[str]) -> int:
    if words and words[0] not in COMMANDS and words[0] not in ("-h", "--help", "--version"):
        words.insert(0, fuse.NAME)
    args = build_parser().parse_args(words)
    try:
        args.limits = Limits(**dict(args.limit))
        if args.isolate and not is_confined():
            return run_isolated("fusenms", words, args.limits, what="the command")
        with custom_ops(*args.custom_ops):
            return int(COMMANDS[args.command].run(args))
    except (FusenmsError, MemoryError) as error:
        message = (
            with_flags(str(error))
            if isinstance(error, FusenmsError)
            else "not enough memory; expected a smaller model, size or number of images"
        )
        if args.verbose:
            print(printable_lines(traceback.format_exc()), file=sys.stderr)
        if args.json:
            print(json.dumps({"error": type(error).__name__, "message": message}))
        print(f"fusenms: {printable_lines(message)}", file=sys.stderr)
        return getattr(COMMANDS[args.command], "STATUS_OF_ERRORS", 1)
    except KeyboardInterrupt:
        print("fusenms: stopped", file=sys.stderr)
        return 130
