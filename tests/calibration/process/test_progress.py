"""How far a calibration is: a bar on a terminal, a plain line every half minute elsewhere."""

import io
import sys
import time

import pytest
from tiny_calibrations import calibrate

from qvlm_hf.calibration.process.progress import ProgressBar, planned_steps
from qvlm_hf.calibration.search import sensitivity
from qvlm_hf.calibration.settings import CalibrationSettings


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_plan_is_what_a_calibration_tells():
    for options in ({}, {"guard": False}, {"precision_budget": 4, "guard": False}):
        told = []

        class Listener:
            def on_step(self, name, done, total, told=told):
                told.append(name)

        options = {"recipe": "fixed", "max_block_depth": 1, "margins": (), **options}
        settings = CalibrationSettings(**options)
        calibrate(callbacks=[Listener()], **options)
        assert tuple(dict.fromkeys(told)) == planned_steps(settings)
    full = CalibrationSettings(optimize_vision=True)
    assert planned_steps(full) == ("recipes", "sensitivity", "vision", "search")
    assert planned_steps(CalibrationSettings(weight_bits=8, activation_bits=8)) == (
        "recipes",
        "search",
    )


def test_without_a_terminal_a_line_every_half_minute():
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(("sensitivity", "search"), stream, clock)
    for seconds, step in ((0, ("sensitivity", 0, 9)), (29, ("sensitivity", 5, 9))):
        clock.seconds = seconds
        bar.on_step(*step)
    assert stream.getvalue() == ""
    for seconds, done in ((30, 0), (59, 1), (60, 2), (89, 3), (7230, 4)):
        clock.seconds = seconds
        bar.on_step("search", done, 12)
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("qvlm 2/2 search: 0 of 12 layers")
    assert lines[1].startswith("qvlm 2/2 search: 2 of 12 layers, 0:02:30 left of it")
    assert lines[2].startswith("qvlm 2/2 search: 4 of 12 layers, 4:00:00 left of it")
    assert len(lines) == 3
    if sys.platform == "linux":
        assert all("GiB" in line for line in lines)


def test_what_prepares_a_step_says_nothing_of_its_speed():
    """Gradients of all samples come before the first site, and take longer than many sites."""
    stream, clock = io.StringIO(), Clock()
    bar = ProgressBar(("sensitivity",), stream, clock)
    for seconds, done in ((0, 0), (600, 0), (602, 1), (640, 2)):
        clock.seconds = seconds
        bar.on_step("sensitivity", done, 46)
    nothing_yet, last = stream.getvalue().splitlines()
    assert "left of it" not in nothing_yet
    assert last.startswith("qvlm 1/1 sensitivity: 2 of 46 sites, 0:14:40 left of it")


def test_a_bar_too_is_timed_from_there():
    bar = ProgressBar((), Terminal())
    bar.on_step("sensitivity", 0, 46)
    began = bar._bar.start_t
    time.sleep(0.01)
    bar.on_step("sensitivity", 0, 46)
    prepared = bar._bar.start_t
    assert prepared > began
    bar.on_step("sensitivity", 1, 46)
    assert (bar._bar.start_t, bar._bar.n) == (prepared, 1)


def test_sites_are_timed_without_the_gradients(monkeypatch):
    told, gradients = [], sensitivity._held_out_gradients
    monkeypatch.setattr(
        sensitivity,
        "_held_out_gradients",
        lambda calibration: told.append("gradients") or gradients(calibration),
    )

    class Listener:
        def on_step(self, name, done, total):
            if name == "sensitivity":
                told.append(done)

    calibrate(callbacks=[Listener()], recipe="fixed", max_block_depth=1, margins=())
    assert told[:4] == [0, "gradients", 0, 1]


@pytest.mark.parametrize(("plan", "title"), [((), "qvlm search"), (("search",), "qvlm 1/1 search")])
def test_on_a_terminal_a_bar(plan, title):
    stream = Terminal()
    bar = ProgressBar(plan, stream)
    for done in range(4):
        bar.on_step("search", done, 3)
    last = stream.getvalue().rstrip().split("\r")[-1]
    assert last.startswith(f"{title}: 100%")
    assert "3/3" in last
    bar.on_step("search", 0, 3)  # of another calibration
    assert "0/3" in stream.getvalue().split("\r")[-1]


def test_the_time_of_all_steps_follows_what_was_expected():
    stream, clock = io.StringIO(), Clock()
    expected = {"sensitivity": 30.0, "importance": 10.0, "search": 40.0, "rounding": 20.0}
    bar = ProgressBar(("sensitivity", "search"), stream, clock, expected)
    for seconds, step in ((0, ("sensitivity", 0, 10)), (60, ("sensitivity", 5, 10)),
                          (120, ("search", 0, 10)), (180, ("search", 4, 10))):  # fmt: skip
        clock.seconds = seconds
        bar.on_step(*step)
    first, _, last = stream.getvalue().splitlines()
    # half of the step took a minute, four times as long as expected; so will the other 70 s
    assert "0:01:00 left of it, 0:05:40 of all" in first
    assert "0:01:30 left of it, 0:01:30 of all" in last
