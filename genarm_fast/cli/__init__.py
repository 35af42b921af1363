"""The `genarm-fast` command. Only the chosen command's module is imported, so `--help` needs no torch."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from genarm_fast import __version__
from genarm_fast.cli.process import Terminated, ended_by_signals, forget_output, usable_streams

COMMANDS = {
    "generate": ("genarm_fast.cli.generate", "guided text for one prompt, or for a JSON-lines file of them"),
    "chat": ("genarm_fast.cli.chat", "talk to the guided model, changing weights as you go"),
    "score": ("genarm_fast.cli.score", "rewards of given responses, and accuracy on preference pairs"),
    "bench": ("genarm_fast.cli.bench", "what guidance costs here, beside the unguided base"),
    "train": ("genarm_fast.cli.train", "train an ARM from preference pairs"),
    "serve": ("genarm_fast.cli.serve", "vLLM's OpenAI server with guided decoding"),
}
EXIT_CODES = "exit codes: 0 done, 1 failed while running, 2 bad arguments or input, 130 interrupted, 128+N signal N"
BAD_PATHS = (errno.ELOOP, errno.ENAMETOOLONG)
BAD_INPUT = (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line: argparse prints the 60 lines of all options before the error."""

    def error(self, message: str) -> NoReturn:
        _usage_error(self.prog, message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (default: the process's own). Return the exit code; usage errors exit with 2."""
    # Read when torch is imported. Spinning OpenMP threads stall each other when other processes use the cores: 2.5
    # against 17.7 tokens/s on a busy 2-core machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    argv = sys.argv[1:] if argv is None else list(argv)
    usable_streams()
    parser = build_parser(argv)
    args, rest = parser.parse_known_args(argv)
    if rest and not hasattr(args, "rest"):
        _usage_error(f"{parser.prog} {args.command}", f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    try:
        with warnings.catch_warnings(), ended_by_signals():
            warnings.showwarning = _show_warning
            code = args.run(args)
            sys.stdout.flush()
        return code
    except Terminated as ended:
        print(f"\ngenarm-fast {args.command}: ended by {ended}", file=sys.stderr)
        return 128 + ended.number
    except KeyboardInterrupt:
        print(f"\ngenarm-fast {args.command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has ended, for example `| head`
        forget_output()
        return 1
    except Exception as error:
        if args.debug:
            raise
        print(f"genarm-fast {args.command}: error: {_one_line(error)}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            forget_output()
        return 2 if isinstance(error, BAD_INPUT) or getattr(error, "errno", None) in BAD_PATHS else 1


def build_parser(argv: Sequence[str]) -> Parser:
    """Return the parser, with the arguments of the command that `argv` names."""
    parser = Parser(
        prog="genarm-fast",
        description="Guided decoding with autoregressive reward models (GenARM).",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"genarm-fast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    chosen = next((arg for arg in argv if not arg.startswith("-")), None)
    for name, (module_name, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, epilog=EXIT_CODES)
        if name == chosen:
            # Python 3.14's own rule lets `--weights -1,0.5` through; older versions take it for an option.
            command._negative_number_matcher = re.compile(r"-\.?\d")
            module = import_module(module_name)
            module.add_arguments(command)
            command.add_argument("--debug", action="store_true", help="show the traceback of an error")
            command.set_defaults(run=module.run)
            if getattr(module, "PASSES_ON", False):
                command.set_defaults(rest=[])
    return parser


def _usage_error(prog: str, message: str) -> NoReturn:
    print(f"{prog}: error: {_joined(message)} (--help shows the options)", file=sys.stderr)
    sys.exit(2)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"genarm-fast: warning: {_joined(message)}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return ": ".join(filter(None, ("out of memory", _joined(error))))
    text = _joined(error) or type(error).__name__
    expected = isinstance(error, (*BAD_INPUT, RuntimeError, OSError))
    return text if expected else f"{type(error).__name__}: {text} (--debug shows where)"


def _joined(message: object) -> str:
    return " ".join(str(message).split())
