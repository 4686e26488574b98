"""Runs a function in several processes that know each other, as `accelerate launch` starts them."""

import multiprocessing
import traceback

import torch
import torch.distributed as dist

__all__ = ["run_together"]

# a process of its own, without threads, that has imported everything: the others are copies of it
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["together"])


def run_together(processes, folder, work, *args):
    """Returns what `work(number, *args)` returns in each process; an error comes as its text."""
    queue = _CONTEXT.SimpleQueue()
    store = folder / "store"
    store.unlink(missing_ok=True)
    started = [
        _CONTEXT.Process(target=_run, args=(number, processes, store, queue, work, args))
        for number in range(processes)
    ]
    for process in started:
        process.start()
    found = dict(queue.get() for _ in started)
    for process in started:
        process.join()
    return [found[number] for number in range(processes)]


def _run(number, processes, store, queue, work, args):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=number, world_size=processes
    )
    try:
        found = work(number, *args)
    except Exception as error:
        traceback.print_exc()
        found = f"{type(error).__name__}: {error}"
    queue.put((number, found))
    dist.destroy_process_group()
