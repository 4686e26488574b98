"""Where the search of a site starts."""

import pytest
from tiny_calibrations import tiny_batches, tiny_calibration
from tiny_models import tiny_llava

from qvlm_hf.calibration.search.ranges import initialize_sites
from qvlm_hf.calibration.settings import RangeCandidate


@pytest.mark.parametrize(
    ("options", "start"),
    [
        ({"activation_bits": 4}, RangeCandidate(granularity="channel")),
        ({"activation_bits": 8}, RangeCandidate(granularity="dynamic_token")),
        (
            {"activation_bits": 4, "percentiles": (0.99, 0.999)},
            RangeCandidate(granularity="channel", percentile=0.999),
        ),
        ({"activation_bits": 4, "margins": ()}, RangeCandidate(granularity="channel")),
    ],
)
def test_a_search_starts_at_the_widest_range_of_what_was_seen(options, start):
    calibration = tiny_calibration(
        tiny_llava().eval(), tiny_batches(4), ["language"], weight_bits=4, **options
    )
    (segment,) = calibration.segments
    inputs = calibration.inputs[segment.name]
    hidden = [entry.hidden for entry in inputs]
    rows = initialize_sites(calibration, "language", segment.layers, inputs, hidden)
    assert {site.chosen.range for row in rows for site in row} == {start}
