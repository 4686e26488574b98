"""Ctrl-C ends the command line with one line and status 130, at any moment of its life.

imports     the process ends at once: nothing has begun
command     KeyboardInterrupt is raised, so that the command clears away its beginnings
exit        the process ends at once, before Python takes apart what it holds
"""

import atexit
import os
import signal
import sys
from contextlib import suppress
from types import FrameType, TracebackType

__all__ = ["MESSAGE", "STATUS", "end_with", "quit_at_once", "raise_again", "stop"]

STATUS = 130  # of a shell for a program that Ctrl-C ended
MESSAGE = "qvlm: interrupted"

_ending: int | None = None  # the exit status, when the work is done


def quit_at_once() -> None:
    """Lets Ctrl-C end the process with one line, if it is the command line and not handled yet."""
    if _is_command_line() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)
        sys.excepthook = _quit_or_show
        atexit.register(_leave)  # registered first, so it comes last


def raise_again() -> None:
    """Ends `quit_at_once`: from here on Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def end_with(status: int) -> None:
    """The work is done: Ctrl-C ends the process at once again."""
    global _ending
    if _is_ours():
        signal.signal(signal.SIGINT, _quit)
        _ending = status


def stop(more: str = "") -> int:
    """Says that Ctrl-C ended the work, and `more`; a second one adds no line."""
    global _ending
    ours = _is_ours()
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr.write(f"{MESSAGE}; {more}\n" if more else f"{MESSAGE}\n")
    sys.stderr.flush()
    if ours:
        _ending = STATUS
        signal.signal(signal.SIGINT, lambda *_: os._exit(STATUS))
    return STATUS


def _quit(_signal: int, _frame: FrameType | None) -> None:
    # no exception: a library may swallow it while it is imported, and at the end it is a traceback
    os.write(2, f"{MESSAGE}\n".encode())
    os._exit(STATUS)


def _quit_or_show(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Python's hook for exceptions that nobody caught: one came between two handlers of ours."""
    if issubclass(kind, KeyboardInterrupt):
        _quit(signal.SIGINT, None)
    sys.__excepthook__(kind, error, trace)


def _leave() -> None:
    """Ends the process before Python's own end, a second long, in which no handler runs."""
    if _ending is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # nobody reads it any more
                stream.flush()
        os._exit(_ending)


def _is_ours() -> bool:
    ours = (_quit, signal.default_int_handler)
    return _is_command_line() and signal.getsignal(signal.SIGINT) in ours


def _is_command_line() -> bool:
    program, *words = getattr(sys, "argv", None) or [""]
    name = os.path.basename(program).removesuffix(".exe")
    if name in ("-m", "__main__.py"):  # while the package is imported, and afterwards
        return "qvlm_hf" in sys.orig_argv
    return name == "qvlm" or (name == "optimum-cli" and words[:1] == ["qvlm"])


quit_at_once()
