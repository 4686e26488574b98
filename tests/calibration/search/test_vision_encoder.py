"""Visual encoder optimisation: gradients, and when its result is kept."""

from itertools import combinations

import pytest
import torch
from tiny_calibrations import TEXT, calibrate, tiny_batches, tiny_calibration, tiny_site
from tiny_models import tiny_llava

from qvlm_hf.calibration.backward import frozen
from qvlm_hf.calibration.layers import live_layers
from qvlm_hf.calibration.measure.entropy import DependencyHistogram, value_bounds
from qvlm_hf.calibration.options import VisionOptimization
from qvlm_hf.calibration.run import LearnedRanges
from qvlm_hf.calibration.search import vision_encoder
from qvlm_hf.calibration.search.sites import installed
from qvlm_hf.calibration.search.vision_encoder import optimize_vision
from qvlm_hf.calibration.settings import Precision
from qvlm_hf.format.grids import grid_bounds
from qvlm_hf.nn.replace import quantized_modules

OPTIONS = {
    "activation_granularity": "channel",
    "optimize_vision": VisionOptimization(epochs=3, learning_rate=0.02),
}


def setup(data=None, components=None, **options):
    return tiny_calibration(tiny_llava(seed=1).eval(), data, components, **{**OPTIONS, **options})


def test_entropy_gradients_equal_finite_differences():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    second = first + 0.5 * torch.randn(20, 3, generator=generator, dtype=torch.float64)
    bounds = [value_bounds([h], False) for h in (first, second)]

    def entropy(values):
        histogram = DependencyHistogram(*bounds, levels=8, elements=60)
        histogram.update(first, values)
        return histogram.entropy()

    second.requires_grad_(True)
    (gradient,) = torch.autograd.grad(entropy(second), second)
    assert gradient.abs().max() > 1e-4
    with torch.no_grad():
        for i in range(0, 60, 7):
            shift = torch.zeros(60, dtype=torch.float64)
            shift[i] = 1e-2
            shift = shift.view(20, 3)
            difference = float(entropy(second + shift) - entropy(second - shift)) / 2e-2
            assert float(gradient.view(-1)[i]) == pytest.approx(difference, rel=0.05, abs=2e-5)


def test_lowers_the_held_out_error_and_leaves_the_model_alone():
    calibration = setup()
    model = calibration.model

    def state():
        return (
            {name: tensor.clone() for name, tensor in model.state_dict().items()},
            [p.requires_grad for p in model.parameters()],
            [("forward" in vars(m), len(m._forward_hooks)) for m in model.modules()],
        )

    before = state()
    result = optimize_vision(calibration)
    after = state()
    assert result.report.kept
    assert result.report.error_after < result.report.error_before
    assert 1 <= result.report.epochs <= 3
    layers = [layer for segment in calibration.segments[:2] for layer in live_layers(segment)]
    assert set(result.ranges) == {site.name for layer in layers for site in layer.sites}
    assert any(
        (learned.weights[0] != 1).any() and (learned.activations[0] != 1).any()
        for learned in result.ranges.values()
    )
    assert len(result.dependencies[calibration.segments[0].name][0]) == 1
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    assert before[1:] == after[1:]


def test_what_does_not_help_is_not_kept():
    """A learning rate that ruins every range: the start is given back."""
    result = optimize_vision(setup(optimize_vision=VisionOptimization(epochs=5, learning_rate=1.0)))
    assert not result.report.kept
    assert result.report.error_after == result.report.error_before
    assert result.report.epochs == vision_encoder._PATIENCE
    assert not result.ranges
    assert not result.dependencies


@pytest.mark.parametrize(
    "given",
    [
        {"data": tiny_batches(4)},  # one batch: nothing is held out
        {"components": ["language"]},  # nothing to learn
        {"optimize_vision": None},
    ],
    ids=lambda given: next(iter(given)),
)
def test_where_nothing_can_be_done_nothing_is_done(given):
    assert optimize_vision(setup(**given)) is None


def test_what_did_not_run_is_said():
    options = {**OPTIONS, "batch_size": 8}
    _, report = calibrate(**options)
    assert report.vision is None
    assert any("optimize_vision did not run" in warning for warning in report.warnings)
    assert report.provenance["optimize_vision"] == "did not run"
    with pytest.raises(ValueError, match=r"^strict=True: optimize_vision did not run"):
        calibrate(**options, strict=True)


def test_batches_without_pictures_do_not_stand_in_the_way():
    calibration = setup([*tiny_batches(), *tiny_batches(rows=TEXT)])
    assert optimize_vision(calibration).report.epochs > 0


def test_without_vision_encoder_the_projector_learns_alone():
    calibration = setup(components=["projector", "language"])
    result = optimize_vision(calibration)
    (layer,) = calibration.segments[0].layers
    assert set(result.ranges) == {site.name for site in layer.sites}
    assert result.report.depth_before is None


def test_floating_point_inputs_learn_weight_ranges():
    result = optimize_vision(setup(activation_bits=16, weight_bits=3, activation_granularity=None))
    assert result.report.kept
    assert all(learned.activations is None for learned in result.ranges.values())


def test_raised_sites_learn_at_their_own_bits():
    calibration = setup()
    name = calibration.segments[0].layers[0].sites[0].name
    calibration.precisions = {name: Precision(weight_bits=8, activation_bits=8)}
    assert name in optimize_vision(calibration).ranges


def test_every_term_reaches_the_ranges():
    """L = L_reg + lambda1 L_ent + lambda2 L_err, one term at a time: each has its own gradient."""
    calibration = setup()
    gradients = []
    for options in (
        VisionOptimization(entropy_weight=0, error_weight=0),
        VisionOptimization(entropy_weight=1, error_weight=0),
        VisionOptimization(entropy_weight=0, error_weight=1),
        VisionOptimization(entropy_weight=0, error_weight=1, output_weight=0),
    ):
        loss = vision_encoder._Loss(calibration, options)
        sites = vision_encoder._differentiable_sites(calibration)
        with frozen(calibration.model), installed(sites), torch.enable_grad():
            loss_value = loss(calibration.data[0])
            gradients.append(torch.autograd.grad(loss_value, sites[0].parameters())[0])
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert not any(torch.allclose(a, b) for a, b in combinations(gradients, 2))


def test_learned_ranges_are_a_candidate_and_the_start():
    site, _ = tiny_site("channel")
    before = grid_bounds(site.chosen.grid)
    factors = tuple(torch.full_like(bound, 0.5) for bound in before)
    clips = tuple(torch.full((linear.out_features, 3), 0.5) for linear in site.linears)
    plain = site.quantized_weights()
    site.add_learned(LearnedRanges(site.chosen.range, factors, clips))
    assert site.choice == 1
    assert site.chosen.range.learned
    assert site.scheme == site.candidates[0].scheme
    for new, old in zip(grid_bounds(site.chosen.grid), before, strict=True):
        assert (new - old * 0.5).abs().max() <= site.chosen.grid.scale.max()
    for own, wide in zip(site.quantized_weights(), plain, strict=True):
        assert (own.scale.float() < wide.scale.float()).all()


def test_the_whole_calibration_uses_and_reports_it():
    model, report = calibrate(tiny_llava(seed=1).eval(), max_block_depth=3, **OPTIONS)
    assert report.vision.kept
    chosen = {site.modules[0]: site.candidate.learned for site in report.sites}
    assert any(chosen.values())
    assert not any(learned for name, learned in chosen.items() if "language" in name)
    for _, module in quantized_modules(model):
        assert torch.isfinite(module.weight_scale.float()).all()
    assert report.settings["optimize_vision"]["epochs"] == 3
    assert report.provenance["optimize_vision"] == "kept"
    assert type(report).from_dict(report.to_dict()) == report
