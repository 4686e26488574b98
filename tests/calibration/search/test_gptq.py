"""GPTQ: against the exhaustive optimum, against plain rounding, and what must not change it."""

import itertools

import pytest
import torch
from tiny_calibrations import tiny_calibration, tiny_site

from qvlm_hf.calibration.layers import observe_inputs, run_layer
from qvlm_hf.calibration.search import gptq
from qvlm_hf.calibration.search.ranges import initialize_sites
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.format.grids import group_expand, quantize_weight
from qvlm_hf.format.scheme import QuantScheme


def rounded(weight, hessian, scheme):
    return gptq.gptq_round(weight, hessian, quantize_weight(weight, scheme), scheme.weight_bits)


def problem(
    out_features: int, in_features: int, tokens: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(in_features, in_features, generator=generator) * 0.5 + torch.eye(
        in_features
    )
    inputs = torch.randn(tokens, in_features, generator=generator) @ mixing
    return torch.randn(out_features, in_features, generator=generator), inputs


def output_error(weight: torch.Tensor, dequantized: torch.Tensor, inputs: torch.Tensor) -> float:
    return float(((weight - dequantized) @ inputs.T).double().square().sum())


def exhaustive_error(weight: torch.Tensor, inputs: torch.Tensor, scheme: QuantScheme) -> float:
    """The lowest output error of any choice of integers on the same grids; rows are independent."""
    grid = quantize_weight(weight, scheme)
    length = weight.shape[1]
    scale, zero = (
        group_expand(t, grid.group_length, length).float() for t in (grid.scale, grid.zero_point)
    )
    levels = torch.tensor(
        list(itertools.product(range(2**scheme.weight_bits), repeat=length)), dtype=torch.float32
    )
    total = 0.0
    for row in range(weight.shape[0]):
        candidates = (levels - zero[row]) * scale[row]
        total += float(((weight[row] - candidates) @ inputs.T).double().square().sum(1).min())
    return total


def test_near_the_exhaustive_optimum_on_tiny_problems():
    scheme = QuantScheme(weight_bits=2, activation_bits=4, group_size=-1)
    found = optimum = plain = 0.0
    for seed in range(12):
        weight, inputs = problem(3, 6, 200, seed)
        best = exhaustive_error(weight, inputs, scheme)
        own = output_error(weight, rounded(weight, inputs.T @ inputs, scheme).dequantize(), inputs)
        assert own >= best * (1 - 1e-4)
        found, optimum = found + own, optimum + best
        plain += output_error(weight, quantize_weight(weight, scheme).dequantize(), inputs)
    # more than half of what rounding to nearest loses against the optimum is won back
    assert found - optimum < 0.5 * (plain - optimum)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_much_better_than_rounding_to_nearest(bits, symmetric):
    scheme = QuantScheme(weight_bits=bits, activation_bits=4, group_size=32, symmetric=symmetric)
    weight, inputs = problem(24, 80, 600, bits)
    own = output_error(weight, rounded(weight, inputs.T @ inputs, scheme).dequantize(), inputs)
    assert own < 0.7 * output_error(weight, quantize_weight(weight, scheme).dequantize(), inputs)


SCHEME = QuantScheme(weight_bits=4, activation_bits=4, group_size=16)


def test_the_strongest_input_comes_first():
    """Nothing is compensated before it, so its column is rounded to nearest wherever it stands."""
    weight, inputs = problem(64, 40, 200, 1)
    inputs[:, 37] *= 5
    found = rounded(weight, inputs.T @ inputs, SCHEME).values
    same = found == quantize_weight(weight, SCHEME).values
    assert same[:, 37].all()
    assert not same.all(0)[:37].any()


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    weight, _ = problem(8, 40, 10, 0)
    nearest = quantize_weight(weight, SCHEME).values
    assert torch.equal(rounded(weight, torch.eye(40), SCHEME).values, nearest)


def test_the_chunk_changes_only_the_speed(monkeypatch):
    weight, inputs = problem(8, 40, 300, 1)
    hessian = inputs.T @ inputs
    expected = rounded(weight, hessian, SCHEME).values
    monkeypatch.setattr(gptq, "_CHUNK", 7)
    # float32 sums in another order
    assert (rounded(weight, hessian, SCHEME).values != expected).float().mean() < 0.02


def test_the_factor_is_that_of_the_inverse():
    """Against the plain computation: the upper Cholesky factor of the damped Hessian's inverse."""
    _, inputs = problem(1, 40, 300, 3)
    hessian = (inputs.T @ inputs).double()
    damped = hessian + torch.eye(40) * 0.01 * torch.diagonal(hessian).mean()
    expected = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    found = gptq._inverse_factor(hessian.float())
    assert torch.allclose(found.double(), expected, rtol=1e-4, atol=1e-6 * expected.max())


@pytest.mark.parametrize("granularity", ["channel", "dynamic_token", "none"])
def test_modules_of_one_input_are_rounded_as_each_alone(granularity):
    """Together their rows are multiplied in other blocks: float32 sums in another order."""
    site, x = tiny_site(granularity)
    inputs = site.multiplied_input(x).flatten(0, 1)
    hessian = inputs.T @ inputs
    together = gptq._round_siblings(site, hessian)
    for index, (found, start) in enumerate(zip(together, site.quantized_weights(), strict=True)):
        alone = gptq.gptq_round(site.folded_weight(index), hessian, start, 4)
        assert (found.values != alone.values).float().mean() < 0.01
        assert (found.values != start.values).float().mean() > 0.05
        assert torch.equal(found.scale, start.scale)
        assert torch.equal(found.zero_point, start.zero_point)


def test_hessians_are_those_of_whole_runs_of_the_layer():
    """A layer runs no further than the site whose inputs are gathered."""
    calibration = tiny_calibration(components=["language"])
    (segment,) = calibration.segments
    inputs, layer = calibration.inputs[segment.name], segment.layers[0]
    hidden = [entry.hidden for entry in inputs]
    (sites,) = initialize_sites(calibration, "language", [layer], inputs, hidden)
    tokens = [torch.rand(h.shape[:-1]) for h in hidden]
    with installed(sites):
        for site in sites:
            seen = []
            see = lambda _, args, __, seen=seen: seen.append(args[0])  # noqa: E731
            with observe_inputs({0: site.linears[0]}, see):
                run_layer(layer.module, inputs, hidden)
            expected = torch.zeros(2, *[site.linears[0].in_features] * 2)
            for batch, (x, weight, entry) in enumerate(zip(seen, tokens, inputs, strict=True)):
                a = site.multiplied_input(x) * weight.sqrt()[..., None]
                for sample in range(len(a)):  # every second one is in the second half
                    rows = a[sample][entry.valid[sample]]
                    expected[(batch + sample) % 2] += rows.T @ rows
            (found,) = gptq._hessians(layer.module, [site], inputs, hidden, tokens)
            assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_a_singular_hessian_is_damped_until_it_factorises():
    weight, inputs = problem(8, 40, 3, 2)
    inputs[:, 5] = 0  # a channel that never fires
    for hessian in (inputs.T @ inputs, torch.zeros(40, 40)):
        assert torch.isfinite(rounded(weight, hessian, SCHEME).dequantize()).all()


def test_a_hessian_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        rounded(torch.ones(2, 16), torch.full((16, 16), torch.nan), SCHEME)


def halves(inputs: torch.Tensor) -> torch.Tensor:
    return torch.stack([part.T @ part for part in (inputs[::2], inputs[1::2])])


def factor(found: torch.Tensor, halved: torch.Tensor) -> float:
    """What the off-diagonals were multiplied by; the diagonal must have stayed."""
    whole = halved.sum(0)
    assert torch.equal(found.diagonal(), whole.diagonal())
    off = ~torch.eye(len(whole), dtype=torch.bool)
    ratios = (found / whole)[off & (whole.abs() > 1e-3 * whole.abs().max())]
    assert ratios.max() - ratios.min() < 1e-4
    return float(ratios.mean())


def test_what_both_halves_show_stays():
    _, inputs = problem(1, 40, 100, 1)
    same = (inputs.T @ inputs).expand(2, -1, -1)
    assert torch.allclose(gptq.agreed_hessian(same), 2 * same[0], rtol=1e-5)
    unlike = torch.stack([same[0], 7 * same[0]])  # more tokens, or heavier, with the same to say
    assert torch.allclose(gptq.agreed_hessian(unlike), 8 * same[0], rtol=1e-5)


def test_what_only_chance_shows_goes():
    noise = torch.randn(200, 40, generator=torch.Generator().manual_seed(3))
    assert factor(gptq.agreed_hessian(halves(noise)), halves(noise)) < 0.1


@pytest.mark.parametrize("tokens", [40, 160, 640])
def test_the_factor_is_near_the_one_that_the_truth_asks_for(tokens):
    """Of samples of which the true correlations are known; few tokens keep less of theirs."""
    generator = torch.Generator().manual_seed(4)
    mixing = torch.eye(40) + 0.08 * torch.randn(40, 40, generator=generator)
    truth = gptq.agreed_hessian((mixing.T @ mixing).expand(2, -1, -1))
    truth = truth * truth.diagonal().rsqrt() * truth.diagonal().rsqrt()[:, None]
    found, best = [], []
    for _ in range(20):
        inputs = torch.randn(tokens, 40, generator=generator) @ mixing
        halved = halves(inputs)
        found.append(factor(gptq.agreed_hessian(halved), halved))
        seen = halved.sum(0)
        seen = seen * seen.diagonal().rsqrt() * seen.diagonal().rsqrt()[:, None]
        off = ~torch.eye(40, dtype=torch.bool)
        best.append(float((seen * truth)[off].sum() / seen[off].square().sum()))
    mean, wanted = (sum(values) / len(values) for values in (found, best))
    assert abs(mean - wanted) < 0.06, (mean, wanted)


def test_few_tokens_are_rounded_better_for_others():
    """What few samples teach is judged on tokens that they do not hold."""
    plain = shrunk = 0.0
    for seed in range(8):
        weight, inputs = problem(24, 40, 800, seed)
        few, others = halves(inputs[:48]), inputs[48:]
        for hessian, taken in ((few.sum(0), False), (gptq.agreed_hessian(few), True)):
            error = output_error(weight, rounded(weight, hessian, SCHEME).dequantize(), others)
            plain, shrunk = plain + error * (not taken), shrunk + error * taken
    assert shrunk < plain


def test_a_half_without_tokens_says_nothing():
    _, inputs = problem(1, 16, 60, 2)
    one = torch.stack([inputs.T @ inputs, torch.zeros(16, 16)])
    assert torch.equal(gptq.agreed_hessian(one), one[0])
    assert torch.equal(gptq.agreed_hessian(torch.zeros(2, 16, 16)), torch.zeros(16, 16))


def test_halves_are_every_second_sample():
    """Of a batch and of batches of one; pictures in one row are one sample."""
    assert gptq._in_second_half(torch.ones(3, 2), 0)[:, 0].tolist() == [False, True, False]
    assert gptq._in_second_half(torch.ones(1, 2), 1)[:, 0].tolist() == [True]
    assert gptq._in_second_half(torch.ones(4), 1).tolist() == [True] * 4
    assert gptq._in_second_half(torch.ones(2, 4, 3), 0).sum((1, 2)).tolist() == [0, 12]
