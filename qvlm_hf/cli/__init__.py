"""`qvlm`: one file per command; only the chosen one is imported.

Exit status 0, 1 (failed) or 2 (wrong usage); errors are one line, with a traceback only under
--debug.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from qvlm_hf import interruption
from qvlm_hf.cli.wording import command_arguments, in_options, shown_name

__all__ = ["main"]

_COMMANDS = {
    "demo": "quantize the embedded demo model and show what it did",
    "quantize": "calibrate, quantize and save a model",
    "ask": "ask a saved model about a picture",
    "evaluate": "measure accuracy on a data set, against another model if wanted",
    "ablate": "measure what each part of the method is worth on a model",
    "bench": "measure speed and memory of models, or of the kernels",
    "publish": "put a saved model on the Hugging Face Hub",
    "inspect": "show what a saved model holds, or what would be quantized of another",
    "export": "write a saved model in a format that other programs load",
    "check": "decode with a saved model to check it here, "
    "or see whether vLLM will run an exported one",
    "autoload": "let programs that never import qvlm_hf load quantized models",
}


_PATHS = ("DIR", "F", "FILE", "MODEL")  # metavars of arguments that may be a path


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Returns its exit status.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Raises:
        SystemExit: wrong usage (2), --help and --version (0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
    except KeyboardInterrupt as interrupt:
        return interruption.stop(str(interrupt))
    except SystemExit as end:  # of argparse, which has said why
        interruption.end_with(int(end.code or 0))
        raise
    interruption.end_with(status)
    return status


def _run(arguments: Sequence[str]) -> int:
    chosen = next((word for word in arguments if word in _COMMANDS), None)
    debug = "--debug" in arguments
    try:
        options = _parser(chosen).parse_args(arguments)
        debug = options.debug
        interruption.raise_again()
        status = _run_command(options)
        sys.stdout.flush()  # here, where its error is one line
        return status
    except BrokenPipeError:
        # nobody reads our output any more; Python would complain again while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        text = in_options(_one_line(error), chosen)
        if not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
            text = f"unexpected {type(error).__name__} ({text}): --debug shows where"
        print(f"qvlm: error: {text}", file=sys.stderr)
        return 1


class _Command(argparse.ArgumentParser):
    """The parser of one command, whose own usage answers a word that it does not know."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return options, unknown


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qvlm", description="Q-VLM quantization of vision-language models."
    )
    version = importlib.import_module("qvlm_hf").__version__
    parser.add_argument("--version", action="version", version=f"qvlm {version}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=_Command
    )
    for name, summary in _COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, description=f"{summary[0].upper()}{summary[1:]}."
        )
        if name == chosen:
            importlib.import_module(f"qvlm_hf.cli.{name}").add_arguments(command)
        command.add_argument(
            "--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)"
        )
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _run_command(options: argparse.Namespace) -> int:
    for action in command_arguments(options.command).values():
        given = getattr(options, action.dest)
        # as a path it would be the working directory: a script's variable was not set
        if "" in (given if isinstance(given, list) else [given]):
            raise ValueError(f"{shown_name(action)} is empty: give it a value ({action.help}).")
        if action.metavar in _PATHS and given is not None:  # no shell expands --output=~/x
            setattr(options, action.dest, os.path.expanduser(given))
    command = importlib.import_module(f"qvlm_hf.cli.{options.command}")
    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads {options.threads} must be at least 1.")
        # thousands of them take all memory, and then a file seems broken
        if (cpus := os.cpu_count()) is not None and options.threads > cpus:
            raise ValueError(
                f"--threads {options.threads} is more than the {cpus} CPUs here: give {cpus} at "
                f"most."
            )
        importlib.import_module("torch").set_num_threads(options.threads)
    return command.run(options)


def _one_line(error: BaseException) -> str:
    """The first line of a message, and the second behind a colon: only others write more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first, *rest = lines or [type(error).__name__]
    return f"{first} {rest[0]}" if rest and first.endswith(":") else first
