"""PyTorch's threads stop spinning while they wait, whenever another program wants their cores.

Threads of libgomp, PyTorch's OpenMP runtime on Linux, spin while they wait. That is fastest on an
idle machine. On a busy one a spinning thread uses up the time that the thread it waits for needs:
calibration took more than ten times as long. libgomp reads OMP_WAIT_POLICY when it is loaded, too
early for a library. But it spins for microseconds only while the process has more OpenMP threads
than cores. So idle threads are added. They compute nothing: operations are split as before, and
results keep every bit.
"""

import ctypes
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import torch

__all__ = ["yield_to_others"]

_LOOK = 0.5  # seconds between two looks at the machine
_STAY = 10.0  # seconds that idle threads stay, once they are there
_TASKS = Path("/proc/self/task")
_BUSY = 0.25  # cores that the process could use and does not get; 0.01 on an idle machine


@contextmanager
def yield_to_others() -> Iterator[None]:
    """Inside, threads wait without spinning whenever the machine is busy."""
    add_threads = _idle_threads()
    done = Event()
    watcher = Thread(target=_watch, args=(done, add_threads), daemon=True, name="qvlm yield")
    watching = add_threads is not None and torch.get_num_threads() > 1
    if watching:
        watcher.start()
    try:
        yield
    finally:
        done.set()
        if watching:
            watcher.join()


def _watch(done: Event, add_threads: Callable[[Event], None]) -> None:
    """Keeps idle threads while the process waits for cores, until `done`."""
    leave = Event()
    leave.set()  # there are none
    waited, since = _waited(), time.monotonic()
    while not done.wait(_LOOK if leave.is_set() else _STAY):
        now_waited, now = _waited(), time.monotonic()
        busy = now_waited - waited > _BUSY * (now - since)
        waited, since = now_waited, now
        if not busy:
            leave.set()
        elif leave.is_set():
            leave = Event()
            Thread(target=add_threads, args=(leave,), daemon=True, name="qvlm idle").start()
    leave.set()


def _idle_threads() -> Callable[[Event], None] | None:
    """Makes idle OpenMP threads and keeps them until an event; None where there is no libgomp."""
    try:
        runtime = ctypes.CDLL(torch._C.__file__)  # finds what PyTorch itself is linked with
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)  # of a null pointer
    except (OSError, AttributeError, TypeError):
        return None
    if not hasattr(runtime, "GOMP_parallel") or hasattr(runtime, "kmp_set_blocktime"):
        return None
    count = max(2, (os.cpu_count() or 1) + 2 - torch.get_num_threads())  # with the calling thread

    def add_threads(leave: Event) -> None:
        runtime.GOMP_parallel(nothing, None, count, 0)
        leave.wait()  # they sleep until their master ends

    return add_threads


def _waited() -> float:
    """Seconds that ready threads of this process had no core; 0 where the kernel does not say."""
    nanoseconds = 0
    for thread in _TASKS.glob("*/schedstat"):
        with suppress(OSError):  # a thread that has ended
            nanoseconds += int(thread.read_text().split()[1])
    return nanoseconds / 1e9
