"""A cache with room gives what Transformers' gives, whatever happens to it in between, and writes
to nothing that somebody holds.
"""

import copy
import gc
import inspect
import io
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llava
from torch.utils import _pytree as pytree
from transformers import AutoModelForImageTextToText, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.executorch import register_dynamic_cache_export_support

from qvlm_hf import QVLMConfig
from qvlm_hf.hf.runtime import growing_cache
from qvlm_hf.hf.runtime.growing_cache import GrowingLayer, compare_caches

IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 5, 6], [1, 9, 8, 7, 6, 5, 9, 8]])


def states(tokens, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, tokens, 4).to(dtype), torch.randn(batch, 3, tokens, 5).to(dtype)


def append(cache, new, *, ours):
    if ours:
        growing_cache._prepare(None, (), {"under any name": cache})
    return cache.update(*new, 0)


def filled(*, ours, tokens=9):
    cache = DynamicCache()
    torch.manual_seed(0)
    with torch.no_grad():
        append(cache, states(tokens), ours=ours)
        append(cache, states(1), ours=ours)
    return cache


def assert_equal(one, other):
    assert torch.equal(one.layers[0].keys, other.layers[0].keys)
    assert torch.equal(one.layers[0].values, other.layers[0].values)


def assign(layer, change):
    layer.keys, layer.values = change(layer.keys), change(layer.values)


def swap(layer):
    layer.keys.data, layer.values.data = layer.keys.data[:, :, :-1], layer.values.data[:, :, 1:]
    layer.values.data = torch.cat((layer.values.data[:, :, :1], layer.values.data), 2)[:, :, :-1]


CHANGES = {
    "crop": lambda layer: layer.crop(-min(2, layer.get_seq_length() - 1)),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
    "offload": lambda layer: layer.offload(),
    "clone": lambda layer: assign(layer, torch.clone),
    "write": lambda layer: (layer.keys.mul_(0.5), layer.values.add_(1)),
    "data": swap,
    "Transformers' own": lambda layer: DynamicLayer.update(layer, *states(1)),
}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from([*CHANGES, "append 1", "append 1", "append 9"]), max_size=25),
    st.booleans(),
)
def test_whatever_happens_it_holds_what_transformers_holds(names, inference):
    ours, theirs = filled(ours=True), filled(ours=False)
    held = []
    with torch.inference_mode() if inference else torch.no_grad():
        for step, name in enumerate(names):
            for cache in (ours, theirs):
                torch.manual_seed(step)
                if name.startswith("append"):
                    append(cache, states(int(name[7:])), ours=cache is ours)
                elif cache.layers[0].get_seq_length() > 2:
                    if name == "write":
                        held.clear()  # what is written to on purpose may change
                    CHANGES[name](cache.layers[0])
            assert_equal(ours, theirs)
            held.append(
                (ours.layers[0].keys.view_as(ours.layers[0].keys), ours.layers[0].keys.clone())
            )
        assert all(torch.equal(now, then) for now, then in held), (
            "a tensor that was handed out has changed"
        )


def test_nothing_is_copied_while_there_is_room():
    cache = filled(ours=True, tokens=700)
    with torch.no_grad():
        first = cache.layers[0].keys.data_ptr()
        for _ in range(80):
            append(cache, states(1), ours=True)
        assert cache.layers[0].keys.data_ptr() == first
        copies = 0
        for _ in range(2000):
            before = cache.layers[0].keys.data_ptr()
            append(cache, states(1), ours=True)
            copies += cache.layers[0].keys.data_ptr() != before
    assert 1 <= copies < 15
    assert cache.get_seq_length() == 2781


def shallow(cache):
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


@pytest.mark.parametrize(
    "fork", [shallow, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]
)
def test_two_copies_go_their_own_ways(fork):
    ours, theirs = filled(ours=True), filled(ours=False)
    pairs = ((ours, theirs), (fork(ours), copy.deepcopy(theirs)))
    with torch.no_grad():
        for step in range(6):
            for cache, expected in pairs[:: 1 if step % 2 else -1]:
                new = states(2)
                append(cache, new, ours=True)
                expected.update(*new, 0)
        for cache, expected in pairs:
            assert_equal(cache, expected)


def test_keys_moved_to_a_place_of_the_same_form_are_continued_there():
    cache = filled(ours=True)
    (layer,) = cache.layers
    elsewhere = torch.zeros_like(layer._rooms[0].whole)
    layer.keys.data = elsewhere[:, :, :10]
    with torch.no_grad():
        append(cache, states(1), ours=True)
    assert not cache.layers[0].keys[:, :, :10].any()


def test_a_pickled_cache_is_written_to_where_it_lies():
    cache = pickle.loads(pickle.dumps(filled(ours=True)))
    with torch.no_grad():
        cache.layers[0].keys.zero_()
        append(cache, states(1), ours=True)
    assert not cache.layers[0].keys[:, :, :10].any()


def test_tensors_of_inference_mode_can_be_continued_outside():
    ours, theirs = DynamicCache(), DynamicCache()
    for mode, tokens in (
        (torch.inference_mode, 9),
        (torch.inference_mode, 1),
        (torch.no_grad, 1),
        (torch.inference_mode, 1),
    ):
        new = states(tokens)
        with mode():
            append(ours, new, ours=True)
            append(theirs, new, ours=False)
    with torch.no_grad():
        assert_equal(ours, theirs)


def test_what_autograd_keeps_may_be_continued():
    cache = filled(ours=True)
    query = torch.randn(2, 3, 1, 4, requires_grad=True)
    score = (query @ cache.layers[0].keys.transpose(-1, -2)).sum()
    expected = cache.layers[0].keys.sum(2, keepdim=True)
    with torch.no_grad():
        append(cache, states(1), ours=True)
    score.backward()
    assert torch.equal(query.grad, expected)


def test_gradients_and_other_dtypes_go_transformers_way():
    ours, theirs = filled(ours=True), filled(ours=False)
    new = states(1, dtype=torch.float64)  # torch.cat promotes
    with torch.no_grad():
        append(ours, new, ours=True)
        append(theirs, new, ours=False)
        assert_equal(ours, theirs)
        assert ours.layers[0].keys.dtype == torch.float64
    new = tuple(one.requires_grad_() for one in states(1, dtype=torch.float64))
    append(ours, new, ours=True)[0].sum().backward()
    assert new[0].grad is not None
    with torch.no_grad(), pytest.raises(RuntimeError, match="Sizes of tensors"):
        append(ours, states(1, batch=3, dtype=torch.float64), ours=True)


def test_it_grows_on_cuda_devices_unless_a_graph_is_captured(monkeypatch):
    """A replay would write to the positions of its capture."""
    on = {name: growing_cache._grows_on(torch.device(name)) for name in ("cpu", "cuda:1", "meta")}
    assert on == {"cpu": True, "cuda:1": True, "meta": False}
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        assert growing_cache._grows_on(torch.device("cuda")) is not capturing
        assert growing_cache._grows_on(torch.device("cpu"))


def test_growing_asks_for_no_device_of_its_own(monkeypatch):
    """Tensors without memory take the way of a GPU's: room stays on their device, and is used."""
    monkeypatch.setattr(growing_cache, "_grows_on", lambda device: True)
    with torch.device("meta"):
        cache = filled(ours=True)
        (layer,) = cache.layers
        whole = layer._rooms[0].whole
        with torch.no_grad():
            append(cache, states(64), ours=True)
            assert layer._rooms[0].whole is whole
            append(cache, states(1), ours=True)
    assert layer._rooms[0].whole.shape[2] > whole.shape[2] == 74 == layer.keys.shape[2] - 1
    assert {one.device.type for one in (layer.keys, layer.values, *layer._rooms[1][:2])} == {"meta"}
    here, there = torch.empty(1, 1, 1, 1), torch.empty(1, 1, 1, 1, device="meta")
    assert [growing_cache._continues(here, one) for one in (here, there)] == [True, False]


@pytest.mark.parametrize("change", [DynamicLayer.reset, GrowingLayer.reset, DynamicLayer.crop])
def test_room_goes_with_the_keys(change):
    cache = filled(ours=True)
    (layer,) = cache.layers
    rooms = [weakref.ref(whole) for _, whole, _ in layer._rooms]
    if change is DynamicLayer.crop:
        layer.crop(-1)
    else:
        change(layer)
        assert layer._rooms is None or change is DynamicLayer.reset
    with torch.no_grad():
        append(cache, states(1), ours=True)
    gc.collect()
    assert [room() for room in rooms] == [None, None]


def test_saved_keys_carry_nothing_of_others():
    """A saved view takes its storage along: beyond the keys that is zeros, not somebody's memory."""
    file = io.BytesIO()
    cache = filled(ours=True)
    torch.save(cache.layers[0].keys, file)
    file.seek(0)
    keys = torch.load(file)
    assert torch.equal(keys, cache.layers[0].keys)
    beyond = torch.as_strided(keys, (2, 3, 74, 4), (3 * 74 * 4, 74 * 4, 4, 1))[:, :, 10:]
    assert not beyond.any()


def test_other_caches_are_left_to_themselves():
    class Own(DynamicCache):
        pass

    class OwnLayer(DynamicLayer):
        pass

    config = tiny_llava().config.text_config
    offloading = DynamicCache(config=config)
    offloading.offloading = True
    mixed = DynamicCache(config=config)
    mixed.layers[0] = OwnLayer()
    for cache in (StaticCache(config=config, max_cache_len=8), Own(config=config), offloading):
        classes = [type(layer) for layer in cache.layers]
        with torch.no_grad():
            growing_cache._prepare(None, (cache,), {})
        assert [type(layer) for layer in cache.layers] == classes
    with torch.no_grad():
        growing_cache._prepare(None, (mixed,), {})
    assert [type(layer) for layer in mixed.layers] == [OwnLayer, GrowingLayer]


def test_another_cache_of_transformers_is_noticed(monkeypatch):
    assert compare_caches() is None

    def windowed(self, key_states, value_states, *args, **kwargs):
        keys, values = update(self, key_states, value_states, *args, **kwargs)
        return keys[:, :, -2:], values[:, :, -2:]

    update = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", windowed)
    assert compare_caches() == "DynamicCache.update returns something else"
    monkeypatch.setattr(DynamicLayer, "update", lambda self, states: (states, states))
    with pytest.raises(TypeError):  # which `fuse` takes for a difference
        compare_caches()
    monkeypatch.undo()

    def counting(self, *args, **kwargs):
        self.positions = getattr(self, "positions", 0) + 1
        return update(self, *args, **kwargs)

    monkeypatch.setattr(DynamicLayer, "update", counting)
    assert compare_caches().startswith("DynamicLayer holds")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("full")
    tiny_llava().save_pretrained(path)
    config = QVLMConfig(scheme="W4A8", activation_granularity="dynamic_token")
    return AutoModelForImageTextToText.from_pretrained(path, quantization_config=config)


OPTIONS = (
    {},
    {"num_beams": 3},
    {"num_beams": 3, "num_return_sequences": 3},
    {"prompt_lookup_num_tokens": 3},
    {"num_return_sequences": 2, "do_sample": True},
)


@pytest.mark.parametrize("options", OPTIONS)
def test_generate_gives_the_same_text(model, monkeypatch, options):
    ids = IDS[:1] if "prompt_lookup_num_tokens" in options else IDS

    def text():
        torch.manual_seed(0)
        return model.generate(
            input_ids=ids, max_new_tokens=40, eos_token_id=None, **{"do_sample": False} | options
        )

    written = []
    with monkeypatch.context() as patched:
        appended = growing_cache._appended
        patched.setattr(
            growing_cache, "_appended", lambda *args: written.append(1) or appended(*args)
        )
        grown = text()
    monkeypatch.setattr(GrowingLayer, "update", DynamicLayer.update)
    assert torch.equal(text(), grown)
    assert len(written) > 40


def test_one_prefix_for_several_questions(model):
    """The usual way to reuse a prompt: copies of a filled cache."""
    with torch.no_grad():
        name = (
            "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        )
        prefix = model(input_ids=IDS[:1, :5], use_cache=True)[name]
        tails = (IDS[:1, 5:], IDS[1:, 5:])
        answers = [
            model(input_ids=tail, **{name: copy.deepcopy(prefix)}, use_cache=True).logits
            for tail in tails
        ]
        assert prefix.get_seq_length() == 5
        for tail, answer in zip(tails, answers, strict=True):
            whole = model(input_ids=torch.cat((IDS[:1, :5], tail), 1), use_cache=False).logits[
                :, 5:
            ]
            torch.testing.assert_close(answer, whole, rtol=1e-3, atol=1e-3)


def test_compilers_see_an_ordinary_cache(model):
    """Export takes a new cache, and fullgraph compilation one that has grown in place."""
    language = model.model.language_model
    name = (
        "cache" if "cache" in inspect.signature(language.forward).parameters else "past_key_values"
    )
    with torch.no_grad():
        cache = language(IDS[:1], use_cache=True)[name]
        language(IDS[:1, :1], **{name: cache})
        assert {type(layer) for layer in cache.layers} == {GrowingLayer}
        register_dynamic_cache_export_support()
        fresh = DynamicCache(config=model.config.text_config)
        fresh.update(*states(1), 0)
        assert len(pytree.tree_leaves(fresh)) == 2

        def step(cache, ids):
            return language(input_ids=ids, **{name: cache}).last_hidden_state

        expected = step(copy.deepcopy(cache), IDS[:1, 3:4])
        torch._dynamo.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(copy.deepcopy(cache), IDS[:1, 3:4]), expected)
        fresh = DynamicCache(config=model.config.text_config)
        assert torch.equal(compiled(fresh, IDS[:1]), step(DynamicCache(), IDS[:1]))
        torch._dynamo.reset()
