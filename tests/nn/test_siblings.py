import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from packing_by_hand import pack_linear
from torch import nn

from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.siblings import share_inputs

IN, OUT = 40, (24, 8, 8)
NAMES = ("q", "k", "v")


def layer(*, granularity="channel", bias=False, symmetric=False, grids=(1, 1, 1)):
    """A module whose children q, k, v are quantized; `grids`: factors on their activation grids."""
    torch.manual_seed(0)
    scheme = QuantScheme(
        weight_bits=4,
        activation_bits=8,
        group_size=16,
        symmetric=symmetric,
        granularity=granularity,
    )
    model = nn.Module()
    for name, out, factor in zip(NAMES, OUT, grids, strict=True):
        bounds = torch.tensor([-3.0, 3.0])[:, None].expand(2, IN) * factor
        model.add_module(name, pack_linear(nn.Linear(IN, out, bias=bias), scheme, bounds[None]))
    return model


def shared(**options):
    model = layer(**options)
    share_inputs([[model.get_submodule(name) for name in NAMES]])
    return model


def outputs(model, x):
    return [getattr(model, name)(x) for name in NAMES]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture
def calls(monkeypatch):
    """Counts the joint operator's calls."""
    import qvlm_hf.nn.siblings as module

    counted, original = [], module.linears
    monkeypatch.setattr(
        module, "linears", lambda *args, **kwargs: counted.append(1) or original(*args, **kwargs)
    )
    return counted


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True},
        {"symmetric": True},
        {"granularity": "dynamic_token"},
        {"granularity": "dynamic_group"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_one_call(options, dtype, calls):
    x = torch.randn(2, 5, IN, dtype=dtype)
    with torch.no_grad():
        expected = outputs(layer(**options), x)
        model = shared(**options)
        for _ in range(2):
            assert same(outputs(model, x), expected)
    assert len(calls) == 2
    assert model.q.shared[0]._waiting is None  # nothing is kept alive


def test_any_order_and_a_changed_input(calls):
    model, x = shared(), torch.randn(3, IN)
    with torch.no_grad():
        v, q = model.v(x), model.q(x)
        assert len(calls) == 1
        x.mul_(2)  # k has not been called: it must not get the old result
        k = model.k(x)
        plain = layer()
        assert torch.equal(k, plain.k(x))
        assert torch.equal(v, plain.v(x / 2))
        assert torch.equal(q, plain.q(x / 2))


def test_modules_that_do_not_follow_one_another_dissolve_the_group(calls):
    model, plain = shared(), layer()
    with torch.no_grad():
        for _ in range(10):
            x = torch.randn(3, IN)
            assert torch.equal(model.q(x), plain.q(x))
            assert torch.equal(model.k(x + 1), plain.k(x + 1))
    assert model.q.shared is model.v.shared is None
    assert len(calls) <= 3


def test_results_that_are_fetched_keep_the_group():
    model = shared()
    with torch.no_grad():
        for _ in range(10):
            outputs(model, torch.randn(3, IN))
            model.q(torch.randn(3, IN))  # now and then one alone
            outputs(model, torch.randn(3, IN))
    assert model.q.shared is not None


def test_gradients_flow_as_without():
    model, plain = shared(), layer()
    grads = []
    for module in (model, plain):
        x = torch.linspace(-1, 1, 3 * IN).reshape(3, IN).requires_grad_()
        sum(y.square().sum() for y in outputs(module, x)).backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


def test_a_bias_that_is_trained_gets_its_gradient():
    model, x = shared(bias=True), torch.randn(3, IN)
    model.k.bias.requires_grad_()
    outputs(model, x)[1].sum().backward()
    assert torch.equal(model.k.bias.grad, torch.full((8,), 3.0))


def test_inference_mode():
    model, x = shared(), torch.randn(3, IN)
    with torch.inference_mode():
        y = outputs(model, x + 0)  # an inference tensor has no version
    assert same(y, outputs(layer(), x))


def test_hooks_see_and_change_what_they_always_do(calls):
    model, x = shared(), torch.randn(3, IN)
    seen = []
    model.q.register_forward_pre_hook(lambda module, args: seen.append(args[0]) or (args[0] * 2,))
    model.k.register_forward_hook(lambda module, args, y: y + 1)
    with torch.no_grad():
        q, k, v = outputs(model, x)
        plain = layer()
        assert seen[0] is x
        assert torch.equal(q, plain.q(2 * x))
        assert torch.equal(k, plain.k(x) + 1)
        assert torch.equal(v, plain.v(x))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("write", [lambda x: x.mul_(1.5), lambda x: x.data.mul_(1.5)])
@pytest.mark.parametrize("when", ["register_forward_pre_hook", "register_forward_hook"])
def test_hooks_may_write_to_the_input(mode, write, when):
    results = []
    for model in (shared(), layer()):
        getattr(model.k, when)(lambda module, args, *_: (write(args[0]), None)[1])
        with mode():
            results.append(outputs(model, torch.linspace(-1, 1, 3 * IN).reshape(3, IN)))
    assert same(*results)


def test_a_part_that_is_replaced_counts():
    x = torch.randn(3, IN)
    model, plain = shared(bias=True), layer(bias=True)
    for each in (model, plain):
        each.k.bias = None
        each.v.input_scale = nn.Parameter(each.v.input_scale * 2, requires_grad=False)
    with torch.no_grad():
        assert same(outputs(model, x), outputs(plain, x))


def test_nobodys_activations_are_copied_or_saved():
    model = shared()
    with torch.no_grad():
        model.q(torch.randn(1, 4000, IN))
    sizes = []
    for each in (model, copy.deepcopy(model), shared()):
        buffer = io.BytesIO()
        torch.save(each, buffer)
        sizes.append(buffer.tell())
    assert max(sizes) - min(sizes) < 1000


def test_only_where_schemes_and_grids_agree():
    assert shared(grids=(1, 1, 1.5)).q.shared is None
    model = layer()
    model.v = nn.Linear(IN, 8)
    share_inputs([[model.get_submodule(name) for name in NAMES]])
    assert model.q.shared is None
    model = layer()
    model.k.to("meta")
    share_inputs([[model.get_submodule(name) for name in NAMES]])
    assert model.q.shared is None


def test_another_device_for_one_of_them():
    model, x = shared(), torch.randn(3, IN)
    model.v.to("meta")  # as offloading leaves it
    with torch.no_grad():
        assert torch.equal(model.q(x), layer().q(x))


def test_loading_other_tensors_dissolves():
    model, other = shared(), layer(grids=(1, 2, 3))
    model.load_state_dict(other.state_dict())
    assert model.q.shared is None
    x = torch.randn(3, IN)
    with torch.no_grad():
        assert same(outputs(model, x), outputs(other, x))


def test_the_reference_computes_each_by_itself(calls):
    model = shared()
    for module in model.children():
        module.reference = True
    with torch.no_grad():
        outputs(model, torch.randn(3, IN))
    assert not calls


def test_copies_and_files_are_whole():
    model, x = shared(), torch.randn(3, IN)
    assert list(model.state_dict()) == list(layer().state_dict())
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = outputs(layer(), x)
        for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
            assert twin.q.shared[0] is not model.q.shared[0]
            assert twin.q.shared[0].modules == [twin.q, twin.k, twin.v]
            assert same(outputs(twin, x), expected)
        assert model.q.shared[0].modules == [model.q, model.k, model.v]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), copy.copy]
)
def test_a_copy_that_is_made_alone_takes_no_sibling_along(copied, calls):
    model, x = shared(bias=True), torch.randn(3, IN)
    group = model.k.shared[0]
    lone = copied(model.k)
    with torch.no_grad():
        assert torch.equal(lone(x), model.k(x))
        assert lone.shared is None
        outputs(model, x)
    assert group.modules == [model.q, model.k, model.v]  # the copy did not push the original out
    assert model.k.shared[0] is group
    calls.clear()
    some = copied(nn.ModuleDict({"q": model.q, "k": model.k}))
    if copied is not copy.copy:  # which leaves the modules inside as they are
        with torch.no_grad():
            assert torch.equal(some["q"](x), layer(bias=True).q(x))
        assert some["q"].shared is some["k"].shared is None
        assert not calls


def test_a_file_of_one_module_is_of_its_own_size():
    sizes = []
    for module in (shared(bias=True).k, layer(bias=True).k):
        buffer = io.BytesIO()
        torch.save(module, buffer)
        sizes.append(buffer.tell())
    assert sizes[0] - sizes[1] < 300  # an empty group


def test_a_copy_agrees_anew():
    model, x = shared(bias=True), torch.randn(3, IN)
    model.v.input_scale = nn.Parameter(model.v.input_scale * 2, requires_grad=False)
    twin = copy.deepcopy(model)
    assert twin.q.shared is None
    with torch.no_grad():
        assert same(outputs(twin, x), outputs(model, x))


def test_no_module_keeps_another_alive():
    model, x = shared(), torch.randn(3, IN)
    kept, sibling = model.q, weakref.ref(model.k)
    gc.disable()
    try:
        del model
        assert sibling() is None  # at once, without the cycle collector
    finally:
        gc.enable()
    with torch.no_grad():
        assert torch.equal(kept(x), layer().q(x))
    assert kept.shared is None


def test_a_module_that_is_replaced_dissolves_the_group():
    model, x = shared(), torch.randn(3, IN)
    model.k = model.k.to_linear(torch.float32)
    with torch.no_grad():
        q, _, v = outputs(model, x)
        assert torch.equal(q, layer().q(x))
        assert torch.equal(v, layer().v(x))
    assert model.q.shared is model.v.shared is None


def test_two_threads_never_mix():
    model, plain = shared(), layer()
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(200):
                x = torch.randn(3, IN, generator=generator)
                if not same(outputs(model, x), outputs(plain, x)):
                    wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiles_without_a_graph_break():
    model, x = shared(), torch.randn(3, IN)
    compiled = torch.compile(lambda x: outputs(model, x), fullgraph=True, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            assert all(
                torch.equal(a, b) for a, b in zip(compiled(x), outputs(layer(), x), strict=True)
            )
    assert model.q.shared is not None
