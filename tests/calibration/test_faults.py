"""What goes wrong in a calibration: one line that names module, file or sample."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_calibrations import calibrate, tiny_batches, tiny_logits
from tiny_models import tiny_llava, tiny_messages

from qvlm_hf.calibration.backward import frozen
from qvlm_hf.calibration.layers import model_inputs, run_model
from qvlm_hf.calibration.samples import load_samples
from qvlm_hf.nn.replace import quantized_modules

LANGUAGE = "model.language_model"


def spoil(model, name):
    """Makes a module return infinity at one place, from finite inputs and weights."""

    def infinite(_module, _inputs, output):
        output = output.clone()
        output.view(-1)[3] = torch.inf
        return output

    model.get_submodule(name).register_forward_hook(infinite)


@pytest.mark.parametrize(
    "name",
    [
        f"{LANGUAGE}.layers.0.mlp.act_fn",
        f"{LANGUAGE}.layers.0.self_attn.v_proj",
        f"{LANGUAGE}.layers.1.post_attention_layernorm",
        "model.vision_tower.encoder.layers.0.layer_norm1",
        "model.multi_modal_projector.act",
        f"{LANGUAGE}.embed_tokens",
    ],
)
def test_the_first_module_that_makes_infinity_is_named(name):
    model = tiny_llava().eval()
    tiny_logits(model)  # Transformers leaves hooks of its own behind
    modules = dict(model.named_modules())
    spoil(model, name if name in modules else name.replace("_tower.", "_tower.vision_model."))
    hooks = sum(len(module._forward_hooks) for module in modules.values())
    with pytest.raises(ValueError, match=f"^{name} makes NaN or infinity: dataset") as caught:
        calibrate(model, max_block_depth=1)
    assert "\n" not in str(caught.value)
    assert sum(len(module._forward_hooks) for module in modules.values()) == hooks
    assert next(quantized_modules(model), None) is None


def test_a_function_in_the_place_of_forward_is_not_lost():
    model = tiny_llava().eval()
    linear = model.model.language_model.layers[1].mlp.up_proj
    linear.forward = lambda x: torch.zeros(*x.shape[:-1], linear.out_features)
    with pytest.raises(ValueError, match=r"^model\..*layers.1.mlp.up_proj has a forward function"):
        calibrate(model, max_block_depth=1)
    assert next(quantized_modules(model), None) is None
    del linear.forward
    calibrate(model, max_block_depth=1)


def test_channels_and_weights_without_a_range_are_quantized():
    model = tiny_llava().eval()
    layer = model.model.language_model.layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight[:5] = 0  # channels that are always 0
        layer.self_attn.q_proj.weight[0] = 0
        layer.mlp.up_proj.weight.zero_()
    model, report = calibrate(model, max_block_depth=1, activation_granularity="channel")
    assert report.self_check.kl < 1
    layer = model.model.language_model.layers[0]
    assert not layer.mlp.up_proj.dequantize().any()
    assert layer.self_attn.q_proj.input_scale.isfinite().all()


def test_a_sample_of_a_hundred_thousand_tokens_is_named():
    rows = tiny_messages(4)
    rows[2]["messages"][0]["content"].append({"type": "text", "text": "what " * 100_000})
    samples = load_samples(rows)
    with pytest.raises(ValueError, match=r"dataset\[2\].*10\d{4} tokens.*positions"):
        calibrate(data=samples)


@pytest.mark.parametrize(
    ("spoiled", "said"),
    [
        (lambda file: Image.new("1", (20_000, 20_000)).save(file), "400000000 pixels.* exceeds"),
        (lambda file: file.write_bytes(file.read_bytes()[:60]), "[Tt]runcated|broken"),
        (lambda file: file.write_bytes(b"x" * 99), "cannot identify"),
    ],
    ids=["huge", "truncated", "no picture"],
)
def test_a_picture_that_cannot_be_used_is_named(tmp_path, spoiled, said):
    file = tmp_path / "a.png"
    Image.effect_noise((40, 40), 50).save(file)
    spoiled(file)
    rows = [{"image": str(file), "question": "what ?", "answer": "red"}]
    with pytest.raises(ValueError, match=rf"unreadable picture .*a\.png .*({said})") as caught:
        load_samples(rows)
    assert "\n" not in str(caught.value)


def test_pictures_come_in_the_dtype_of_the_processor_or_of_the_model():
    batch = tiny_batches(2, 2)[0]
    half = {**batch.inputs, "pixel_values": batch.inputs["pixel_values"].bfloat16()}
    model = tiny_llava().eval()
    same = replace(batch, inputs=half)
    assert model_inputs(model, same)["pixel_values"].dtype == torch.float32
    assert model_inputs(model, same)["input_ids"].dtype == torch.int64
    assert torch.isfinite(run_model(model, same).logits).all()


def test_the_head_gets_no_rows_apart_when_gradients_are_taken():
    model, seen = tiny_llava().eval(), []
    model.lm_head.register_forward_hook(lambda _, args, __: seen.append(args[0].is_contiguous()))
    inputs = tiny_batches(2, 2)[0].inputs
    with torch.no_grad():
        expected = model(**inputs, logits_to_keep=3).logits
        with frozen(model):
            assert torch.allclose(model(**inputs, logits_to_keep=3).logits, expected, atol=1e-6)
        model(**inputs, logits_to_keep=3)
    assert seen == [False, True, False]  # and the hook is gone
