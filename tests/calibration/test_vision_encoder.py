"""Visual encoder optimisation: gradients against finite differences, and when its result is kept."""

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_llava, tiny_messages, tiny_processor
from tiny_models import tiny_trial as trial

from qvlm_hf.calibration import vision_encoder
from qvlm_hf.calibration.layers import capture_inputs, frozen
from qvlm_hf.calibration.measure.entropy import DependencyHistogram, value_bounds
from qvlm_hf.calibration.samples import batches, load_samples
from qvlm_hf.calibration.search.sites import LearnedRanges, installed
from qvlm_hf.calibration.settings import CalibrationSettings, Precision, VisionOptimization
from qvlm_hf.calibration.vision_encoder import optimize_vision
from qvlm_hf.format.grids import grid_bounds
from qvlm_hf.models.graph import resolve
from qvlm_hf.nn.replace import quantized_modules
from qvlm_hf.quantize import calibrate_and_pack


def setup(count=8, batch_size=4, **options):
    model = tiny_llava(seed=1).eval()
    fields = {
        "group_size": 32,
        "activation_granularity": "channel",
        "optimize_vision": VisionOptimization(epochs=3, learning_rate=0.02),
    }
    settings = CalibrationSettings(**{**fields, **options})
    segments = resolve(model)
    data = list(batches(load_samples(tiny_messages(count, seed=0)), tiny_processor(), batch_size))
    inputs = capture_inputs(model, data, [segment.layers[0].name for segment in segments])
    return model, segments, inputs, data, settings


def patched(model):
    return [("forward" in vars(module), len(module._forward_hooks)) for module in model.modules()]


def run(*parts, precisions=None):
    return optimize_vision(*parts, precisions or {}, lambda: None)


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
    model, *rest = setup()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    before = patched(model)
    result = run(model, *rest)
    report = result.report
    assert report.kept
    assert report.error_after < report.error_before
    assert 1 <= report.epochs <= 3
    assert set(result.ranges) == {
        site.name
        for segment in rest[0][:2]
        for layer in segment.layers
        if not layer.dead
        for site in layer.sites
    }
    assert any(
        (learned.weights[0] != 1).any() and (learned.activations[0] != 1).any()
        for learned in result.ranges.values()
    )
    assert len(result.dependencies["vision"][0]) == 1
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert patched(model) == before


def test_what_does_not_help_is_not_kept():
    """A learning rate that ruins every range: the start is given back."""
    result = run(*setup(optimize_vision=VisionOptimization(epochs=5, learning_rate=1.0)))
    assert not result.report.kept
    assert result.report.error_after == result.report.error_before
    assert result.report.epochs == vision_encoder._PATIENCE
    assert not result.ranges
    assert not result.dependencies


def test_nothing_held_out_or_nothing_to_learn_means_nothing_is_done():
    assert run(*setup(count=4)) is None  # one batch
    model, segments, *rest = setup()
    assert run(model, segments[2:], *rest) is None  # the language model alone
    assert run(*setup(optimize_vision=None)) is None


def test_what_did_not_run_is_said():
    model, settings = tiny_llava(seed=1).eval(), setup()[-1]
    report = calibrate_and_pack(
        model,
        replace(settings, batch_size=8),
        load_samples(tiny_messages(8, seed=0)),
        tiny_processor(),
    )
    assert report.vision is None
    assert any("optimize_vision did not run" in warning for warning in report.warnings)
    assert report.provenance["optimize_vision"] == "did not run"
    strict = replace(settings, batch_size=8, strict=True)
    with pytest.raises(ValueError, match=r"^strict=True: optimize_vision did not run"):
        calibrate_and_pack(
            tiny_llava(seed=1).eval(),
            strict,
            load_samples(tiny_messages(8, seed=0)),
            tiny_processor(),
        )


def test_batches_without_pictures_do_not_stand_in_the_way():
    model, segments, _, data, settings = setup()
    text = [
        {"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]}
    ] * 4
    data = [*data, *batches(load_samples(text), tiny_processor(), 4)]
    inputs = capture_inputs(model, data, [segment.layers[0].name for segment in segments])
    assert run(model, segments, inputs, data, settings).report.epochs > 0


def test_without_vision_encoder_the_projector_learns_alone():
    model, segments, *rest = setup()
    result = run(model, segments[1:], *rest)
    assert set(result.ranges) == {site.name for layer in segments[1].layers for site in layer.sites}
    assert result.report.depth_before is None


def test_floating_point_inputs_learn_weight_ranges():
    result = run(*setup(activation_bits=16, weight_bits=3, activation_granularity=None))
    assert result.report.kept
    assert all(learned.activations is None for learned in result.ranges.values())


def test_every_term_reaches_the_ranges():
    """L = L_reg + lambda1 L_ent + lambda2 L_err, one term at a time: each has a gradient of its own."""
    model, segments, inputs, data, settings = setup()
    gradients = {}
    for name, options in {
        "reg": VisionOptimization(entropy_weight=0, error_weight=0),
        "ent": VisionOptimization(entropy_weight=1, error_weight=0),
        "err": VisionOptimization(entropy_weight=0, error_weight=1),
        "vision": VisionOptimization(entropy_weight=0, error_weight=1, output_weight=0),
    }.items():
        loss = vision_encoder._Loss(model, segments, data, settings, options)
        sites = [
            s
            for segment in segments
            for s in vision_encoder._sites(model, segment, inputs, settings, {}).values()
        ]
        parameters = sites[0].parameters()
        with frozen(model), installed(sites), torch.enable_grad():
            gradients[name] = torch.autograd.grad(loss(data[0]), parameters)[0]
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())
    keys = list(gradients)
    assert all(
        not torch.allclose(gradients[a], gradients[b])
        for i, a in enumerate(keys)
        for b in keys[i + 1 :]
    )


def test_learned_ranges_are_a_candidate_and_the_start():
    site, _ = trial("channel")
    before = grid_bounds(site.qparams[0])
    factors = tuple(torch.full_like(bound, 0.5) for bound in before)
    clips = tuple(torch.full((linear.out_features, 3), 0.5) for linear in site.linears)
    plain = site.quantized_weights()
    site.add_learned(LearnedRanges(site.chosen, factors, clips))
    assert site.choice == 1
    assert site.chosen.learned
    assert site.scheme == site.schemes[0]
    after = grid_bounds(site.qparams[1])
    assert all(
        (new - old * 0.5).abs().max() <= site.qparams[1].scale.max()
        for new, old in zip(after, before, strict=True)
    )
    assert all(
        (a.scale.float() < b.scale.float()).all()
        for a, b in zip(site.quantized_weights(), plain, strict=True)
    )


def test_the_whole_calibration_uses_and_reports_it():
    model, settings = tiny_llava(seed=1).eval(), setup()[-1]
    samples = load_samples(tiny_messages(8, seed=0))
    report = calibrate_and_pack(model, replace(settings, batch_size=4), samples, tiny_processor())
    assert report.vision.kept
    chosen = {site.modules[0]: site.candidate.learned for site in report.sites}
    assert any(chosen.values())
    assert not any(learned for name, learned in chosen.items() if "language" in name)
    assert all(
        torch.isfinite(module.weight_scale.float()).all() for _, module in quantized_modules(model)
    )
    assert report.settings["optimize_vision"]["epochs"] == 3
    assert report.provenance["optimize_vision"] == "kept"
    assert type(report).from_dict(report.to_dict()) == report


def test_lifted_sites_learn_at_their_own_bits():
    model, segments, *rest = setup()
    name = segments[0].layers[0].sites[0].name
    result = run(
        model, segments, *rest, precisions={name: Precision(weight_bits=8, activation_bits=8)}
    )
    assert name in result.ranges
