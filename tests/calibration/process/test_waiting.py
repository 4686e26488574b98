"""When idle threads come and go, and that nothing else changes; speed is no test."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from qvlm_hf import quantize
from qvlm_hf.calibration.process import waiting
from qvlm_hf.calibration.process.waiting import yield_to_others
from qvlm_hf.calibration.settings import CalibrationSettings
from qvlm_hf.evaluation.evaluate import evaluate


def test_idle_threads_come_when_cores_are_missed_and_go_when_they_are_not(monkeypatch):
    """The watcher over numbers of cores that the process waits for, without real time."""
    rates = [0, 0.01, 0.6, 1.2, 0.5, 0.1, 0, 0.4]
    now, missed, waits, leaves, there = 0.0, 0.0, [], [], []

    class Clock:
        def wait(self, seconds):
            nonlocal now, missed
            there.append(any(not leave.is_set() for leave in leaves))
            if len(waits) == len(rates):
                return True
            now, missed = now + seconds, missed + rates[len(waits)] * seconds
            waits.append(seconds)
            return False

    class Now:
        """A thread whose function is called at `start`."""

        def __init__(self, target, args, **_):
            self.start = lambda: target(*args)

    monkeypatch.setattr(waiting.time, "monotonic", lambda: now)
    monkeypatch.setattr(waiting, "Thread", Now)
    monkeypatch.setattr(waiting, "_waited", lambda: missed)
    waiting._watch(Clock(), leaves.append)
    assert all(leave.is_set() for leave in leaves)
    assert there[1:] == [False, False, True, True, True, False, False, True]
    assert waits == [0.5, 0.5, 0.5, 10.0, 10.0, 10.0, 0.5, 0.5]
    assert len(leaves) == 2


def tasks():
    return len(list(Path("/proc/self/task").iterdir()))


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(waiting._idle_threads() is None, reason="another OpenMP runtime")
def test_more_openmp_threads_than_cores_then_none_and_the_same_bits(monkeypatch):
    monkeypatch.setattr(waiting, "_LOOK", 0.01)
    waited = iter(range(0, 10**9, 1000))
    monkeypatch.setattr(waiting, "_waited", lambda: next(waited))
    x, weight = torch.randn(500, 300), torch.randn(400, 300)
    work = lambda: (torch.nn.functional.linear(x, weight).sum(0), x.exp().sum())  # noqa: E731
    before, (alone, threads) = tasks(), (work(), torch.get_num_threads())
    before = max(before, tasks())
    with yield_to_others():
        # the watcher, the master of the idle ones, and so many that all together are one more than
        # the cores
        until(lambda: tasks() >= before + 2 + os.cpu_count() + 1 - threads)
        crowded = work()
        assert torch.get_num_threads() == threads
    assert all(torch.equal(one, other) for one, other in zip(alone, crowded, strict=True))
    until(lambda: tasks() <= before)


@pytest.mark.parametrize(("runtime", "threads"), [(None, 2), (lambda _: None, 1)])
def test_one_thread_or_another_runtime_is_left_alone(monkeypatch, runtime, threads):
    started = threading.active_count()
    monkeypatch.setattr(waiting, "_idle_threads", lambda: runtime)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    with yield_to_others():
        assert threading.active_count() == started


def test_an_error_ends_the_watch():
    with pytest.raises(ValueError, match="inside"), yield_to_others():
        raise ValueError("inside")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qvlm yield")]


@pytest.mark.skipif(
    waiting._waited() == 0, reason="a kernel that does not say how long threads wait"
)
def test_waiting_for_a_core_is_seen():
    """Four times as many busy programs as cores: each thread here waits longer than it runs."""
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"])
        for _ in range(4 * os.cpu_count())
    ]
    try:
        waited, since = waiting._waited(), time.monotonic()
        while time.monotonic() - since < 1:
            sum(range(10_000))
        assert waiting._waited() - waited > waiting._BUSY * (time.monotonic() - since)
    finally:
        for program in busy:
            program.kill()
            program.wait()


def test_a_kernel_that_does_not_say_is_never_busy(monkeypatch, tmp_path):
    monkeypatch.setattr(waiting, "_TASKS", tmp_path)
    assert waiting._waited() == 0
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "schedstat").write_text("5000000000 2500000000 7\n")
    assert waiting._waited() == 2.5


@pytest.mark.parametrize(
    ("entry", "given"),
    [
        (quantize.quantize_without_data, (CalibrationSettings(),)),
        (quantize.quantize_with_data, (CalibrationSettings(), [], None)),
        (evaluate, ([], None)),
    ],
    ids=["round", "calibrate", "evaluate"],
)
def test_what_computes_for_long_yields(monkeypatch, entry, given):
    asked = []
    monkeypatch.setattr(waiting, "_idle_threads", lambda: asked.append(1))
    with pytest.raises((ValueError, AttributeError)):
        entry(torch.nn.Linear(2, 2), *given)
    assert asked == [1]
