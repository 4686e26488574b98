"""What the search simulates is what the packed integers compute."""

from dataclasses import replace

import pytest
import torch
from tiny_calibrations import tiny_site

from qvlm_hf.calibration.search import sites as module
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.format.scheme import GRANULARITIES
from qvlm_hf.nn.linear import QVLMLinear, packed_tensors


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_equals_the_packed_module(granularity, bits):
    site, x = tiny_site(granularity, bits)
    for linear, quantized in zip(site.linears, site.quantized_weights(), strict=True):
        packed = QVLMLinear.from_packed(
            linear, site.scheme, packed_tensors(quantized, site.scheme, site.input_qparams)
        )
        with installed([site]):
            simulated = linear(x)
        torch.testing.assert_close(simulated, packed(x), rtol=1e-5, atol=1e-5)


def test_no_granularity_is_taken_for_another():
    site, x = tiny_site("channel")
    site.candidates = [replace(site.chosen, range=replace(site.chosen.range, granularity="new"))]
    with pytest.raises(ValueError, match="granularity='new'"):
        site.forward(0, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_keeps_the_dtype_of_16_bit_models(dtype):
    site, x = tiny_site("channel", dtype=dtype)
    expected = site.linears[0](x)
    with installed([site]):
        found = site.linears[0](x)
    assert found.dtype == dtype
    assert 0 < (found - expected).float().norm() / expected.float().norm() < 0.3


def test_full_precision_when_nothing_is_active_and_restored_after_errors():
    site, x = tiny_site("channel")
    expected = site.linears[0](x)
    site.active = None
    with installed([site]):
        assert torch.equal(site.linears[0](x), expected)
    with pytest.raises(RuntimeError), installed([site]):
        site.linears[0](x[..., :3])  # a wrong shape
    assert "forward" not in vars(site.linears[0])
    with pytest.raises(ValueError, match="no candidate in force"):
        _ = site.choice


def test_the_shared_input_is_quantized_once(monkeypatch):
    site, x = tiny_site("dynamic_token")
    calls = []
    original = module.shift_quantize
    monkeypatch.setattr(
        module, "shift_quantize", lambda *args: (calls.append(1), original(*args))[1]
    )
    with installed([site]):
        site.linears[0](x)
        site.linears[1](x)
        site.linears[0](x.clone())
    assert len(calls) == 2


@pytest.mark.parametrize("margin", [0.9, 1.0, 1.1, 1.25])
def test_tried_candidates_share_the_factors_of_their_granularity(margin):
    """They fit nearly as well as a candidate's own, which the final weights have."""
    site, x = tiny_site("channel")
    (first,) = site.candidates
    grid = replace(first.grid, scale=first.grid.scale * margin)
    site.candidates.append(replace(first, grid=grid, final_grid=grid))
    own = site._rounded(1)[0].dequantize()
    with installed([site]):
        for index in range(2):
            site.active = index
            site.linears[0](x)
        tried, folded = site._weights[1][0], site.folded_weight(0)
        errors = [float((weight - folded).abs().pow(2.4).sum()) for weight in (own, tried)]
        assert errors[0] * (1 - 1e-4) <= errors[1] < errors[0] * 1.02
        site.take_final_grids()
        site.linears[0](x)
    assert torch.equal(site._weights[1][0], own)
    assert torch.equal(site.quantized_weights()[0].dequantize(), own)
