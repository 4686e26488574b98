"""Ctrl-C while the command line starts: importing torch and Transformers takes seconds, and nobody is there yet to catch it."""

import os
import signal
import sys
from types import FrameType

__all__ = ["MESSAGE", "STATUS", "let_go", "quit_at_once", "raise_again"]

STATUS = 130  # of a shell for a program that Ctrl-C ended
MESSAGE = "qvlm: interrupted"


def quit_at_once() -> None:
    """Lets Ctrl-C end the process with one line, if this process is the command line and nobody else looks after it."""
    if _is_command_line() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def raise_again() -> None:
    """Ends `quit_at_once`: from here on Ctrl-C raises KeyboardInterrupt, so that what was begun is cleared away."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def let_go() -> None:
    """The work is done: Ctrl-C may kill what is left of the process, without a traceback from its last imports."""
    if _is_command_line() and signal.getsignal(signal.SIGINT) in (_quit, signal.default_int_handler):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def _quit(_signal: int, _frame: FrameType | None) -> None:
    # Nothing has begun that would have to be cleared away, and a library may swallow an exception while it is imported.
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(STATUS)


def _is_command_line() -> bool:
    program, *words = getattr(sys, "argv", None) or [""]
    name = os.path.basename(program).removesuffix(".exe")
    if name == "-m" or name == "__main__.py":  # the first while the package is imported, the second afterwards
        return "qvlm_hf" in sys.orig_argv
    return name == "qvlm" or (name == "optimum-cli" and words[:1] == ["qvlm"])


quit_at_once()
