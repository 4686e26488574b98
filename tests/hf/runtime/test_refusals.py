"""What a quantized model refuses: NaN that integer kernels would hide, parts saved alone, a longer
vocabulary for packed words.
"""

import copy
import json
import pickle

import pytest
import torch
from tiny_models import tiny_llava
from transformers import AutoModel, AutoModelForImageTextToText

from qvlm_hf import quantize_model
from qvlm_hf.hf.runtime.refusals import _check_hidden_states, _finite

OVERFLOW = r"a value left the range of torch.{}"


def quantized(*, dtype=torch.float32, **options):
    model = tiny_llava(dtype=dtype)
    quantize_model(
        model,
        {"scheme": "W4A8", "activation_granularity": "dynamic_token", "group_size": 32} | options,
    )
    return model


@pytest.fixture(scope="module", params=[None, 8])
def model(request):
    return quantized(lm_head_bits=request.param)


def logits(model, inputs, **changes):
    with torch.no_grad():
        return model(**(inputs | changes)).logits


def spoiled(tensor, value, *position):
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


def refused(message, call, *args, **kwargs):
    with pytest.raises(ValueError, match=message) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_pixels_that_are_no_numbers_are_refused(model, inputs, value):
    """Full precision answers NaN to each."""
    pixels = spoiled(inputs["pixel_values"], value, 1, 2, 3, 4)
    assert logits(tiny_llava(), inputs, pixel_values=pixels)[1, -1].isnan().all()
    message = r"^pixel_values hold NaN or infinity: check the picture and its processing\.$"
    refused(message, logits, model, inputs, pixel_values=pixels)
    refused(message, model.get_image_features, pixel_values=pixels)
    with torch.no_grad():
        refused(message, model.generate, **(inputs | {"pixel_values": pixels}), max_new_tokens=2)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_embeddings_that_are_no_numbers_are_refused(model, inputs, value):
    embeddings = spoiled(
        model.get_input_embeddings()(inputs["input_ids"]).detach(), value, 0, -1, 5
    )
    mask = inputs["attention_mask"]
    message = r"^inputs_embeds hold NaN or infinity: check what computes them\.$"
    with torch.no_grad():
        refused(message, model, inputs_embeds=embeddings, attention_mask=mask)
        refused(message, model, inputs_embeds=embeddings[:, -1:])  # one token


def test_what_overflows_in_the_vision_encoder_is_refused(model, inputs):
    pixels = spoiled(inputs["pixel_values"], 3e38, 0)  # finite, and a sum of them is not
    assert not logits(tiny_llava(), inputs, pixel_values=pixels)[0, -1].isfinite().all()
    refused(
        "^the picture features hold NaN or infinity: " + OVERFLOW.format("float32"),
        logits,
        model,
        inputs,
        pixel_values=pixels,
    )


@pytest.mark.parametrize("head", [None, 8])
def test_what_overflows_in_float16_is_refused_with_the_remedy(inputs, head):
    model, plain = (
        quantized(dtype=torch.float16, lm_head_bits=head),
        tiny_llava(dtype=torch.float16),
    )
    inputs = inputs | {"pixel_values": inputs["pixel_values"].half()}
    assert logits(model, inputs).isfinite().all()
    for one in (model, plain):
        with torch.no_grad():
            one.model.language_model.embed_tokens.weight[inputs["input_ids"][0, -3]] = 6e4
            one.model.language_model.layers[0].mlp.down_proj.register_forward_hook(
                lambda module, args, y: y + 3e4
            )
    assert logits(plain, inputs)[0, -1].isnan().all()
    remedy = r" \(load the model in bfloat16 or float32\)"
    refused(
        "^the language model's hidden states hold NaN or infinity: "
        + OVERFLOW.format("float16")
        + remedy,
        logits,
        model,
        inputs,
    )


def to_infinity(module, args, output):
    return (
        tuple(part * torch.inf for part in output)
        if isinstance(output, tuple)
        else output * torch.inf
    )


@pytest.mark.parametrize("head", [None, 8])
def test_a_single_token_gives_nan_or_an_error(inputs, head):
    """What arises in a decoding step shows in the logits, or is refused where a quantized head
    would hide it.
    """
    model, token = quantized(lm_head_bits=head), {"input_ids": inputs["input_ids"][:1, -1:]}
    assert logits(model, token).isfinite().all()
    model.model.language_model.layers[1].register_forward_hook(to_infinity)
    if head is None:
        assert logits(model, token).isnan().all()
    else:
        refused("^the language model's hidden states hold NaN or infinity", logits, model, token)


def test_padding_may_hold_anything(model, inputs):
    """Nothing reads it: only what stands at real tokens counts."""
    mask = inputs["attention_mask"].clone()
    mask[0, :2] = 0
    for spoil in (mask, 1 - mask):
        norm = model.model.language_model.norm
        handle = norm.register_forward_hook(
            lambda module, args, y, at=spoil: torch.where(at[..., None].bool(), y, torch.nan)
        )
        try:
            with torch.no_grad():
                if spoil is mask:
                    hidden = model.model(**(inputs | {"attention_mask": mask})).last_hidden_state
                    assert hidden[0, :2].isnan().all()
                    assert hidden[mask.bool()].isfinite().all()
                else:
                    refused(
                        "^the language model's hidden",
                        model.model,
                        **(inputs | {"attention_mask": mask}),
                    )
        finally:
            handle.remove()


def test_the_mask_of_a_continued_prompt_is_read_from_its_end(model):
    """It covers the cache too: the hidden states are those of its last places."""
    hidden, mask = torch.zeros(1, 3, 4), torch.ones(1, 9)
    hidden[0, 0] = torch.nan
    given = model.model, (), {"attention_mask": mask}, (hidden,)
    mask[0, :3] = 0
    refused("^the language model's hidden", _check_hidden_states, *given)
    mask[0, -3] = 0
    _check_hidden_states(*given)


def test_with_a_mask_of_another_form_the_last_token_counts(model):
    hidden = torch.zeros(1, 3, 4)
    given = model.model, (), {"attention_mask": torch.ones(1, 1, 3, 3)}, (hidden,)
    hidden[0, 0] = torch.nan
    _check_hidden_states(*given)
    hidden[0, -1] = torch.nan
    refused("^the language model's hidden", _check_hidden_states, *given)


def test_huge_but_finite_numbers_pass(model, inputs):
    """Their sum leaves float32, they do not."""
    assert _finite(torch.full((8,), 3e38))
    assert not _finite(torch.tensor([3e38, torch.nan]))
    assert _finite(torch.full((4, 40000), 60000.0, dtype=torch.float16))
    assert logits(model, inputs).isfinite().all()


def test_a_decoding_step_is_not_looked_at(inputs, monkeypatch):
    """A look costs a wait on a GPU: pixels, features and prompt once, a token never."""
    model, looks, look = quantized(), [], torch.isfinite
    monkeypatch.setattr(torch, "isfinite", lambda values: looks.append(values) or look(values))
    model(**inputs)
    assert len(looks) == 3
    model.generate(**inputs, max_new_tokens=4, min_new_tokens=4)
    assert len(looks) == 6


@pytest.mark.parametrize("part", ["language_model", "vision_tower", None])
def test_a_part_is_neither_saved_nor_dequantized_alone(model, tmp_path, part):
    """Its packed weights would lie there without their configuration."""
    for whole in (model, copy.deepcopy(model)):
        module = whole.model if part is None else getattr(whole.model, part)
        for method in ("save_pretrained", "push_to_hub", "dequantize"):
            message = (
                rf"^a part of a quantized model has no {method}\(\): call it on the whole model\.$"
            )
            refused(message, getattr(module, method), str(tmp_path / "part"))
    assert not list(tmp_path.iterdir())


def test_a_part_in_full_precision_is_saved(tmp_path, inputs):
    model = quantized(quantize_vision=False)
    model.model.vision_tower.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(
            again(inputs["pixel_values"])[0], model.model.vision_tower(inputs["pixel_values"])[0]
        )


def test_a_quantized_head_keeps_its_vocabulary(inputs, tmp_path):
    model = quantized(lm_head_bits=8)
    embeddings = model.get_input_embeddings()
    message = (
        "^resize_token_embeddings cannot resize the quantized output head: call model.dequantize"
    )
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        refused(message, one.resize_token_embeddings, 140)
        refused(message, one.resize_token_embeddings, pad_to_multiple_of=100)
        for same in ((), (128,), (None, 64)):
            assert one.resize_token_embeddings(*same) is one.get_input_embeddings()
        assert one.get_input_embeddings().num_embeddings == 128
    assert model.get_input_embeddings() is embeddings
    model.dequantize()
    assert model.resize_token_embeddings(140).num_embeddings == 140
    assert logits(model, inputs).shape[-1] == 140
    model = quantized()
    model.resize_token_embeddings(140)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["vocab_size"] == 140
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


def test_dequantizing_takes_all_of_it_away(inputs, tmp_path):
    model = quantized(lm_head_bits=8)
    twin = pickle.loads(pickle.dumps(model))
    refused(
        "^pixel_values hold NaN",
        logits,
        twin,
        inputs,
        pixel_values=inputs["pixel_values"] * torch.nan,
    )
    model.dequantize()
    ours = [
        hook
        for module in model.modules()
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        if hook.__module__.startswith("qvlm_hf")
    ]
    assert ours == []
    assert logits(model, inputs, pixel_values=inputs["pixel_values"] * torch.nan).isnan().any()
    model.model.language_model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()


def test_training_may_overflow(inputs):
    """A gradient scaler expects to see it, and skips the step."""
    model = quantized().train()
    model.model.language_model.layers[1].register_forward_hook(to_infinity)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    assert loss.isnan()
