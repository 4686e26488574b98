"""`decode_attention`: the kernel against attention in float64, and who gets PyTorch's operators
instead.
"""

from contextlib import suppress

import pytest
import torch
from attention_calls import compare, exact, tensors
from hypothesis import given
from hypothesis import strategies as st
from linear_calls import (
    NO_COMPILER,
    OPS,
    needs_compiler,
    remove_compilers,
    run_python,
    with_threads,
)
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import pad, scaled_dot_product_attention

from qvlm_hf.ops import attention, decode_attention, fast_path

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, scope="module")
def loaded():
    assert attention.load() is None


@torch.no_grad()
def direct(*arguments):
    return fast_path.decode_attention(*arguments)


@pytest.fixture
def by_pytorch(monkeypatch):
    """A list that grows by one with every call that PyTorch's operators compute."""
    calls = []
    compute = attention.attend_with_pytorch
    counted = lambda *arguments: calls.append(1) or compute(*arguments)  # noqa: E731
    monkeypatch.setattr(attention, "attend_with_pytorch", counted)
    return calls


VIEWS = {
    "contiguous": lambda t: t,
    "static cache": lambda t: pad(t, (0, 0, 0, 5), value=torch.nan)[:, :, : t.shape[2]],
    "positions first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "part of a row": lambda t: pad(t, (3, 4), value=torch.nan)[..., 3:-4],
}


@st.composite
def calls(draw):
    """Arguments with the strides of caches and views, and every form of mask."""
    key_heads, batch = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    heads = key_heads * draw(st.sampled_from([1, 2, 3, 4, 7, 8, 17]))
    keys = draw(st.sampled_from([1, 2, 15, 16, 17, 127, 128, 129, 300]))
    size = draw(st.sampled_from([32, 33, 40, 64, 72, 80, 128, 200, 256]))
    seed = draw(st.integers(0, 99))
    given = tensors(heads, key_heads, keys, size, draw(st.sampled_from(DTYPES)), batch, seed)
    query, key, value = map(draw(st.sampled_from(list(VIEWS.values()))), given)
    if draw(st.booleans()):  # one sequence for all
        key, value = (t[:1].expand(batch, -1, -1, -1) for t in (key, value))
    form = draw(st.sampled_from([None, torch.bool, torch.float32, torch.bfloat16]))
    mask = None
    if form is not None:
        shape = draw(st.sampled_from([1, batch])), draw(st.sampled_from([1, heads])), 1, keys
        mask = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if form == torch.bool:
            mask = mask > draw(st.sampled_from([-1.0, 1.0]))
        else:
            mask = mask.masked_fill(mask > 1, -torch.inf).to(form)
        if draw(st.booleans()):
            mask = mask.expand(batch, heads, 1, keys)
    return query, key, value, mask, draw(st.sampled_from([size**-0.5, 1.0]))


@given(calls())
def test_close_to_attention_in_float64(call):
    compare(*call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(32, 4, 64), (8, 8, 128)])
def test_no_further_from_it_than_pytorch(dtype, heads, key_heads, size):
    ours, theirs = [], []
    for seed in range(5):
        query, key, value = tensors(heads, key_heads, 640, size, dtype, 1, seed)
        expected, _ = exact(query, key, value, None, size**-0.5)
        every = (t.repeat_interleave(heads // key_heads, 1) for t in (key, value))
        ours.append(decode_without_gradient(query, key, value) - expected)
        theirs.append(scaled_dot_product_attention(query, *every).transpose(1, 2) - expected)
    ours, theirs = (torch.stack(errors).abs() for errors in (ours, theirs))
    assert ours.mean() <= theirs.mean()
    assert ours.max() <= theirs.max()


def decode_without_gradient(*arguments):
    with torch.no_grad():
        return decode_attention(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_key_are_zero_and_the_lowest_number_is_no_infinity(dtype):
    query, key, value = tensors(dtype=dtype, keys=200)
    closed = torch.zeros(2, 1, 1, 200, dtype=torch.bool)
    lowest = torch.full((2, 1, 1, 200), torch.finfo(dtype).min, dtype=dtype)
    for mask in (closed, torch.full_like(lowest, -torch.inf), lowest):
        ours = direct(query, key, value, mask, 0.2)
        theirs = scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=0.2
        ).transpose(1, 2)
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert ours.any() == (mask is lowest)


def test_what_a_mask_closes_by_the_chunk_is_not_read():
    query, key, value = tensors(keys=400)
    key[:, :, 128:256], value[:, :, 128:256] = torch.nan, torch.nan
    mask = torch.ones(1, 1, 1, 400, dtype=torch.bool)
    mask[..., 128:256] = False
    ours = direct(query, key, value, mask, 0.2)
    expected, _ = exact(query, key.nan_to_num(), value.nan_to_num(), mask, 0.2)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_and_infinity_are_not_lost(dtype, number):
    query, key, value = tensors(dtype=dtype, keys=300)
    value[0, 1, 290, 5] = number
    query[1, 2, 0, 3] = number
    ours = direct(query, key, value, None, 0.2)
    finite = torch.ones(2, 1, 4, 32, dtype=torch.bool)
    finite[0, 0, 1, 5] = finite[1, 0, 2] = False
    assert torch.equal(ours.isfinite(), finite)
    assert torch.equal(ours[1, 0, 2].isnan(), torch.ones(32, dtype=torch.bool))


def test_scores_far_apart_and_far_from_zero():
    query, key, value = tensors(keys=300, size=64)
    for scale in (1e-30, 30.0, 1e5):
        compare(query, key, value, None, scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_with_any_number_of_threads(dtype):
    query, key, value = tensors(8, 2, 1000, 64, dtype)
    found = with_threads(lambda: direct(query, key, value, None, 0.1))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


Q, K, V = tensors()
MASK = torch.zeros(2, 1, 1, 9)


@pytest.mark.parametrize(
    "call",
    [
        (Q.half(), K.half(), V.half()), (Q.double(), K.double(), V.double()), (Q, K.bfloat16(), V), (Q, K, V.bfloat16()),
        (Q[..., :31], K[..., :31], V[..., :31]), tensors(size=257), (Q.expand(2, 4, 3, 32), K, V), (Q[0], K, V), (Q, K[0], V), (Q, K, V[0]),
        (Q, K[:, :3], V[:, :3]), (Q, K[:1], V[:1]), (Q, K[:, :, :0], V[:, :, :0]), (Q, K, V[:, :, :8]), (Q, K[:, :2], V),
        (Q[:0], K[:0], V[:0]),
        (Q, K.mT.contiguous().mT, V), (Q, K, V.mT.contiguous().mT), (Q.repeat(1, 1, 1, 2)[..., ::2], K, V),
        (Q, K, V, MASK.half()), (Q, K, V, MASK.int()), (Q, K, V, MASK[0]), (Q, K, V, MASK[..., :8]), (Q, K, V, MASK.expand(2, 1, 3, 9)),
        (Q, K, V, MASK.expand(2, 2, 1, 9)), (Q, K, V, MASK.repeat(2, 1, 1, 1)),
    ],
)  # fmt: skip
def test_nothing_for_what_is_not_ordinary(call):
    query, key, value, mask = (*call, None)[:4]
    assert direct(query, key, value, mask, 0.2) is None


@pytest.mark.parametrize("mask", [None, "boolean", "additive", "per head"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_pytorch_computes_what_the_kernel_does_not_take(mask, dtype, key_heads, by_pytorch):
    query, key, value = tensors(4, key_heads, 9, 16, dtype)
    noise = torch.randn(2, 4 if mask == "per head" else 1, 1, 9)
    given = {None: None, "boolean": noise > 0}.get(mask, noise.to(dtype))
    ours = decode_without_gradient(query, key, value, given, 0.3)
    expected, _ = exact(query, key, value, given, 0.3)
    assert by_pytorch == [1]
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_the_kernel_computes_the_rest(by_pytorch):
    for dtype in DTYPES:
        query, key, value = tensors(dtype=dtype)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                ours = decode_attention(query, key, value)
            assert torch.equal(ours, direct(query, key, value, None, 32**-0.5))
    assert by_pytorch == []


def test_gradients_and_transformations_see_the_operators_of_pytorch(by_pytorch):
    query, key, value = tensors()
    query.requires_grad_()
    assert decode_attention(query, key, value).requires_grad
    assert torch.autograd.gradcheck(
        lambda q: decode_attention(q, key.double(), value.double()), query.double()
    )
    by_pytorch.clear()
    with torch.no_grad():
        expected = decode_attention(query, key, value)
        assert by_pytorch == []
        mapped = torch.func.vmap(lambda q: decode_attention(q[None], key[:1], value[:1])[0])(query)
        torch.testing.assert_close(mapped[0], expected[0])
        torch.testing.assert_close(
            torch.jit.trace(lambda q: decode_attention(q, key, value), query)(query), expected
        )
        graph = make_fx(lambda q: decode_attention(q, key, value))(query).graph
        nodes = [node.target for node in graph.nodes]
        assert not any("qvlm_hf" in str(target) for target in nodes)
        assert any("attention" in str(target) for target in nodes)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = decode_attention(mode.from_tensor(query), key, value)
        assert (fake.shape, fake.dtype) == (expected.shape, expected.dtype)
        assert fake.stride() == expected.stride()
        count = len(by_pytorch)
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(query.detach(), torch.ones_like(query))
            with suppress(NotImplementedError):  # PyTorch's own attention may have none
                decode_attention(dual, key, value)
        assert len(by_pytorch) == count + 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_into_one_graph_that_calls_the_kernel(dtype, by_pytorch):
    graphs = []

    def look(module, _):
        graphs.append([node.target for node in module.graph.nodes if node.op == "call_function"])
        return module

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda q, k, v, m: decode_attention(q * 1, k, v, m) + 1, fullgraph=True, backend=look
    )
    query, key, value = tensors(dtype=dtype)
    for mask in (None, torch.rand(2, 1, 1, 9) > 0.5):
        with torch.no_grad():
            assert torch.equal(
                compiled(query, key, value, mask), decode_attention(query, key, value, mask) + 1
            )
    assert by_pytorch == []
    assert all(OPS.decode_attention.default in graph for graph in graphs)
    compiled(query, key, value, None)  # where a gradient may be wanted
    assert OPS.decode_attention.default not in graphs[-1]
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "arguments", [(*tensors(), None, 0.2), (*tensors(dtype=torch.float16), MASK.half(), 0.2)]
)
def test_the_operators_themselves(arguments):
    torch.library.opcheck(OPS.decode_attention.default, arguments)


def test_a_gradient_through_the_operator_is_refused():
    with pytest.raises(ValueError, match="decode_attention has no gradient: call it under"):
        OPS.decode_attention(Q.clone().requires_grad_(), K, V, None, 0.2)


@pytest.fixture
def fresh():
    assert fast_path.load() is None  # kept: what a test changes shall not fail this for good
    attention.load.cache_clear()
    fast_path.use("decode_attention", 0)
    yield
    attention.load.cache_clear()
    assert attention.load() is None  # the kernel takes calls again


def test_without_a_compiler_pytorch_computes(monkeypatch, tmp_path, fresh, by_pytorch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remove_compilers(monkeypatch)
    assert attention.load() == NO_COMPILER
    with torch.no_grad():
        torch.testing.assert_close(
            decode_attention(Q, K, V), exact(Q, K, V, None, 32**-0.5)[0].float()
        )
        assert torch.equal(
            OPS.decode_attention(Q, K, V, None, 0.2),
            attention.attend_with_pytorch(Q, K, V, None, 0.2),
        )
    assert len(by_pytorch) == 3
    monkeypatch.undo()


def test_a_wrong_kernel_takes_no_calls(monkeypatch, fresh, caplog):
    monkeypatch.setattr(
        attention, "attend_with_pytorch", lambda query, *_: torch.zeros_like(query).transpose(1, 2)
    )
    assert (
        attention.load()
        == "the compiled kernel is wrong for 8 heads, 1 key heads of 64, 300 keys, torch.bfloat16"
    )
    assert direct(Q, K, V, None, 0.2) is None
    assert (
        "computed by PyTorch, 1.1 to 1.8 times slower (docs/benchmarks.md): the compiled kernel is "
        "wrong" in caplog.text
    )
    monkeypatch.undo()


def test_a_kernel_that_cannot_be_compiled_is_spoken_of(monkeypatch, fresh, caplog):
    assert fast_path.load() is None  # these can
    monkeypatch.setattr(attention, "_FLAGS", ("-std=c++1",))
    assert "failed" in attention.load()
    (record,) = [record for record in caplog.records if record.name == attention.__name__]
    assert record.levelname == "WARNING"
    assert record.getMessage().endswith(attention.load())
    monkeypatch.undo()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["-mavx2", "-mfma"]])
def test_lesser_processors_compute_the_same(flags, tmp_path):
    """SSE2, and AVX2 where this processor has it, compiled for the purpose."""
    if flags and not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("no AVX2 here")
    run_python("import narrow_attention", *flags, XDG_CACHE_HOME=str(tmp_path))
