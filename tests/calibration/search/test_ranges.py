"""What candidates of a range are judged on."""

import torch
from tiny_calibrations import tiny_calibration

from qvlm_hf.calibration.search.ranges import _start_errors, initialize_sites


def test_starts_are_judged_on_every_second_batch_alone():
    calibration = tiny_calibration(components=("language",))
    segment = calibration.segments[0]
    layers, inputs = segment.layers[:1], calibration.inputs[segment.name]
    first, second = (entry.hidden for entry in inputs)
    rows = initialize_sites(calibration, "language", layers, inputs, [first, second])
    sites = {site.site.name: site for row in rows for site in row}

    def errors(*hidden):
        return _start_errors(calibration, "language", layers, inputs, hidden, sites)

    assert errors(torch.randn_like(first), second) == errors(first, second)
    assert errors(first, torch.randn_like(second)) != errors(first, second)
    for name, site in sites.items():
        found = errors(first, second)[name]
        assert len(found) > 1
        assert found[site.active] == min(found.values())
