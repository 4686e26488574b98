"""The counts of a preflight against what the steps really compute and hold."""

import math

import pytest
import torch
from tiny_calibrations import calibrate, tiny_batches, tiny_calibration, tiny_samples
from tiny_models import IMAGE_TOKENS, tiny_llava
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from qvlm_hf.calibration.estimate import seconds
from qvlm_hf.calibration.estimate.seconds import FACTORS, Rates, count_seconds, measure_rates
from qvlm_hf.calibration.estimate.sums import Data, Sums
from qvlm_hf.calibration.layers import run_layer
from qvlm_hf.calibration.plan import resolve_segments
from qvlm_hf.calibration.settings import CalibrationSettings

COUNTED = Rates(single=1, native=1, values=math.inf, call=0)  # an operation is a second


class _Counter(TorchDispatchMode):
    """PyTorch's own counts of matrix products; of its counter the module hooks are in the way."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if (count := flop_registry.get(function._overloadpacket)) is not None:
            self.operations += count(*args, **(kwargs or {}), out_val=output)
        return output


def counted(run):
    """Multiplications and additions, each counted."""
    with _Counter() as counter:
        run()
    return counter.operations


def data_of(batches, size):
    """As the preflight finds it."""
    samples = sum(len(batch.origins) for batch in batches)
    text = sum(batch.inputs["input_ids"].numel() for batch in batches) / samples
    tokens = {"vision": IMAGE_TOKENS + 1, "projector": IMAGE_TOKENS, "language": text}
    # attention is one operator, which PyTorch does not count on a CPU
    return Data(samples=samples, batch_size=size, tokens=tokens, context=dict.fromkeys(tokens, 0.0))


def test_a_pass_is_counted_as_pytorch_counts_it():
    calibration = tiny_calibration()
    data = data_of(calibration.data, 4)
    for segment in calibration.segments:
        entries = calibration.inputs[segment.name]
        hidden = [entry.hidden for entry in entries]
        live = [layer for layer in segment.layers if not layer.dead]

        def run(hidden=hidden, live=live, entries=entries):
            for layer in live:
                hidden = run_layer(layer.module, entries, hidden)

        expected = COUNTED.run(Sums(segment, data, 1.0), data)
        assert counted(run) == pytest.approx(expected, rel=1e-6), segment.component


@pytest.mark.parametrize(
    "options",
    [
        {},  # one batch is judged on, and nothing screened
        {"weight_rounding": "nearest", "batch_size": 2},
    ],
    ids=["defaults", "screened"],
)
def test_products_of_a_calibration_are_counted(options, monkeypatch):
    monkeypatch.setattr(seconds, "_FACTORISED", 0)  # which is no product
    monkeypatch.setattr(seconds, "FACTORS", dict.fromkeys(FACTORS, 1.0))
    options = {"group_size": 128, "max_block_depth": 3, "batch_size": 4, **options}
    model, samples, settings = tiny_llava(), tiny_samples(8), CalibrationSettings(**options)
    data = data_of(tiny_batches(8, settings.batch_size), settings.batch_size)
    segments = resolve_segments(model, settings)
    total = sum(count_seconds(model, segments, settings, data, COUNTED).values())
    found = counted(lambda: calibrate(model, samples, **options))
    assert 0.6 < found / total < 1.6  # the search ends when it is done


def test_rates_turn_counts_into_seconds():
    calibration = tiny_calibration()
    segment, data = calibration.segments[0], data_of(calibration.data, 4)
    one, run = Sums(segment, data, 1.0), Rates(single=2.0, native=4.0, values=math.inf, call=0).run
    assert run(one, data) == 2 * run(one, data, native=True) == one.operations / 2
    called = Rates(single=math.inf, native=math.inf, values=math.inf, call=3.0)
    assert called.run(one, data) == 3 * one.layers * data.batches
    rounded = Rates(single=math.inf, native=math.inf, values=1.0, call=0)
    assert rounded.run(one, data, simulated=True) > rounded.run(one, data) > one.values
    measured = measure_rates(torch.device("cpu"), torch.float32)
    assert measured.single == measured.native > 1e8
    assert measured.values > 1e6


def test_more_of_anything_takes_longer():
    tokens = {"vision": 17.0, "projector": 16.0, "language": 30.0}
    model, settings = tiny_llava(text_layers=4), CalibrationSettings()

    def cost_of(model=model, settings=settings, samples=64):
        data = Data(samples=samples, batch_size=8, tokens=tokens, context=tokens)
        rates, segments = (
            Rates(single=1e9, native=1e9, values=1e9),
            resolve_segments(model, settings),
        )
        return sum(count_seconds(model, segments, settings, data, rates).values())

    usual = cost_of()
    assert cost_of(samples=128) > 1.3 * usual
    assert cost_of(tiny_llava(text_layers=8)) > 1.3 * usual
    assert cost_of(settings=CalibrationSettings(precision_budget=4.0)) > usual
    assert cost_of(settings=CalibrationSettings(max_block_depth=1)) < usual
