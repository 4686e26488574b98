"""A cache layer with room gives what `DynamicLayer` gives, whatever happens to it in between, and writes to nothing that somebody holds."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llava
from transformers import AutoModelForImageTextToText, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from qvlm_hf import QVLMConfig
from qvlm_hf.integration.growing_cache import GrowingLayer, grow_in_place

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 5, 6], [1, 9, 8, 7, 6, 5, 9, 8]])


def states(tokens, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, tokens, 4).to(dtype), torch.randn(batch, 3, tokens, 5).to(dtype)


def pair():
    return GrowingLayer(), DynamicLayer()


CHANGES = {
    "append 1": lambda layer, new: layer.update(*(one[:, :, :1] for one in new)),
    "append 9": lambda layer, new: layer.update(*new),
    "crop": lambda layer, _: layer.crop(-min(2, layer.get_seq_length() - 1)),
    "reorder": lambda layer, _: layer.reorder_cache(torch.tensor([1, 0])),
    "select": lambda layer, _: layer.batch_select_indices(torch.tensor([1, 1])),
    "reset": lambda layer, _: layer.reset(),
    "offload": lambda layer, _: layer.offload(),
    "assign": lambda layer, _: setattr(layer, "keys", None if layer.keys is None else layer.keys.clone()),
}


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(sorted(CHANGES)), max_size=25), st.booleans())
def test_whatever_happens_it_holds_what_a_dynamic_layer_holds(names, inference):
    torch.manual_seed(0)
    ours, theirs = pair()
    held = []
    with torch.inference_mode() if inference else torch.no_grad():
        for name in ("append 9", *names):
            new = states(9)
            if theirs.get_seq_length() or name.startswith("append") or name == "reset":
                CHANGES[name](ours, new)
                CHANGES[name](theirs, new)
            assert ours.get_seq_length() == theirs.get_seq_length()
            if theirs.get_seq_length():
                assert torch.equal(ours.keys, theirs.keys)
                assert torch.equal(ours.values, theirs.values)
                held.append((ours.keys, ours.keys.clone()))
        assert all(torch.equal(then, now) for now, then in held), "a tensor that was handed out has changed"


def test_nothing_is_copied_while_there_is_room():
    layer, _ = pair()
    with torch.no_grad():
        layer.update(*states(700))
        first = layer.keys.data_ptr()
        for _ in range(80):
            layer.update(*states(1))
        assert layer.keys.data_ptr() == first
        copies = 0
        for _ in range(2000):
            before = layer.keys.data_ptr()
            layer.update(*states(1))
            copies += layer.keys.data_ptr() != before
    assert 1 <= copies < 15
    assert layer.get_seq_length() == 2780


@pytest.mark.parametrize("fork", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_two_copies_go_their_own_ways(fork):
    torch.manual_seed(0)
    with torch.no_grad():
        one, expected = pair()
        new = states(9)
        one.update(*new)
        expected.update(*new)
        other, other_expected = fork(one), copy.deepcopy(expected)
        for layer, plain in ((one, expected), (other, other_expected)) * 3:
            new = states(2)
            layer.update(*new)
            plain.update(*new)
        for layer, plain in ((one, expected), (other, other_expected)):
            assert torch.equal(layer.keys, plain.keys)
            assert torch.equal(layer.values, plain.values)


def test_tensors_of_inference_mode_can_be_continued_outside():
    ours, theirs = pair()
    first, second, third = states(9), states(1), states(1)
    for mode, new in ((torch.inference_mode, first), (torch.no_grad, second), (torch.inference_mode, third)):
        with mode():
            ours.update(*new)
            theirs.update(*new)
    with torch.no_grad():
        assert torch.equal(ours.keys, theirs.keys)


def test_gradients_and_other_dtypes_go_transformers_way():
    ours, theirs = pair()
    with torch.no_grad():
        new = states(9)
        ours.update(*new)
        theirs.update(*new)
        new = states(1, dtype=torch.float64)  # torch.cat promotes
        ours.update(*new)
        theirs.update(*new)
    assert torch.equal(ours.keys, theirs.keys)
    assert ours.keys.dtype == torch.float64
    new = tuple(one.requires_grad_() for one in states(1, dtype=torch.float64))
    ours.update(*new)[0].sum().backward()
    assert new[0].grad is not None
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors"):
        ours.update(*states(1, batch=3, dtype=torch.float64))


def test_only_dynamic_layers_change(monkeypatch):
    model = tiny_llava()
    static = StaticCache(config=model.config.text_config, max_cache_len=8)
    dynamic = DynamicCache()
    for cache in (static, dynamic, None):
        grow_in_place(cache, 0)
    assert not any(isinstance(layer, GrowingLayer) for layer in static.layers)
    with torch.no_grad():
        dynamic.update(*states(1), 0)
    grow_in_place(dynamic, 0)
    grow_in_place(dynamic, 0)
    assert type(dynamic.layers[0]) is GrowingLayer
    assert isinstance(dynamic.layers[0], DynamicLayer)
    assert type(DynamicCache(config=model.config.text_config).layers[0]) is DynamicLayer, "Transformers makes ours by itself"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    tiny_llava().save_pretrained(path)
    config = QVLMConfig(scheme="W4A8", activation_granularity="dynamic_token")
    return AutoModelForImageTextToText.from_pretrained(path, quantization_config=config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 2, "do_sample": True},
    ],
)
def test_generate_gives_the_same_text(model, monkeypatch, options):
    ids = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS
    caches = []

    def text():
        torch.manual_seed(0)
        made = model.generate(input_ids=ids, max_new_tokens=80, do_sample=options.get("do_sample", False), return_dict_in_generate=True,
                              eos_token_id=None, **{k: v for k, v in options.items() if k != "do_sample"})  # fmt: skip
        caches.append(made.past_key_values)
        return made.sequences

    grown = text()
    monkeypatch.setattr("qvlm_hf.integration.fusion.grow_in_place", lambda *_: None)
    assert torch.equal(text(), grown)
    assert {type(layer) for layer in caches[0].layers} == {GrowingLayer}
    assert {type(layer) for layer in caches[1].layers} == {DynamicLayer}


def test_one_prefix_for_several_questions(model):
    """The usual way to reuse a prompt: copies of a filled cache."""
    with torch.no_grad():
        prefix = model(input_ids=IDS[:1, :5], use_cache=True).past_key_values
        tails = (IDS[:1, 5:], IDS[1:, 5:])
        answers = [model(input_ids=tail, past_key_values=copy.deepcopy(prefix), use_cache=True).logits for tail in tails]
        assert prefix.get_seq_length() == 5
        for tail, answer in zip(tails, answers, strict=True):
            whole = model(input_ids=torch.cat((IDS[:1, :5], tail), 1), use_cache=False).logits[:, 5:]
            torch.testing.assert_close(answer, whole, rtol=1e-3, atol=1e-3)
