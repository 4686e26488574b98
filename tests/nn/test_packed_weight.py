"""`module.weight` of a quantized module: it is read freely, computing raises one line."""

import copy
import io
import pickle

import pytest
import torch
from packing_by_hand import pack_linear
from torch import nn
from torch.nn.utils import parametrizations, prune

from qvlm_hf.format.packing import unpack
from qvlm_hf.format.scheme import QuantScheme
from qvlm_hf.nn.packed_weight import FloatForm, PackedWeight
from qvlm_hf.ops import fast_path

SCHEME = QuantScheme(weight_bits=4, activation_bits=8, group_size=32, granularity="dynamic_token")
REFUSED = (
    r"^a quantized module's packed weight takes no arithmetic: call model.dequantize\(\) first.$"
)
UNTRAINABLE = "^a quantized module's packed weight cannot be trained: train an adapter, or "


@pytest.fixture
def module():
    torch.manual_seed(0)
    return pack_linear(nn.Linear(64, 64), SCHEME)


def replace_data(weight):
    weight.data = weight.data.clone()


def require_gradient(weight):
    weight.requires_grad = True


def write(weight, value):
    weight.data[:] = value


COLUMN = torch.rand(64, 1)  # broadcasts against [out, words]: integers were changed without a word
REFUSALS = {
    "mul": lambda w: torch.mul(w.data, COLUMN),
    "integer mul": lambda w: w * COLUMN.int(),
    "div": lambda w: torch.div(w.data, COLUMN + 1),
    "reflected": lambda w: 1 - w,
    "add in place": lambda w: w.data.__iadd__(COLUMN),
    "add to a copy": lambda w: w.data.clone().add_(torch.ones(64, 64, dtype=torch.int32)),
    "number": lambda w: w * 0.5,
    "number in place": lambda w: w.mul_(0.5),
    "matmul": lambda w: COLUMN.T @ w,
    "transposed": lambda w: COLUMN.T @ w.T.contiguous().reshape(64, 8),
    "linear": lambda w: nn.functional.linear(torch.rand(2, 8), w),
    "einsum": lambda w: torch.einsum("ij,ik->jk", w, COLUMN),
    "norm": lambda w: torch.linalg.vector_norm(w, dim=1),
    "float": lambda w: w.float(),
    "to": lambda w: w.to(torch.bfloat16),
    "type_as": lambda w: w.type_as(COLUMN),
    "row": lambda w: w[0] + COLUMN,
    "written to": lambda w: write(w, torch.rand(64, 8)),
    "read into": lambda w: torch.zeros(64, 8).copy_(w),
    "replaced": replace_data,
    "initialised": lambda w: nn.init.normal_(w),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_computing_with_it_raises_one_line_and_changes_nothing(module, name):
    before = module.state_dict()["weight"].clone()
    with pytest.raises(ValueError, match=REFUSED):
        REFUSALS[name](module.weight)
    assert torch.equal(module.state_dict()["weight"], before)


@pytest.mark.parametrize(
    "train",
    [
        lambda m: m.weight.requires_grad_(),
        lambda m: require_gradient(m.weight),
        lambda m: m.requires_grad_(True),
        lambda m: next(m.parameters()).requires_grad_(True),
        lambda m: copy.deepcopy(nn.Sequential(m)).requires_grad_(True),
        lambda m: pickle.loads(pickle.dumps(m)).requires_grad_(True),
    ],
)
def test_training_it_raises_one_line(module, train):
    with pytest.raises(ValueError, match=UNTRAINABLE):
        train(module)
    module.requires_grad_(False)
    assert next(module.parameters()).requires_grad_(False) is next(module.parameters())


def test_reading_it_is_free(module):
    stored, weight = module._parameters["weight"], module.weight
    assert isinstance(weight, nn.Parameter)
    assert (weight.shape, weight.dtype, weight.device, weight.requires_grad) == (
        (64, 8), torch.int32, stored.device, False,
    )  # fmt: skip
    assert weight.data_ptr() == stored.data_ptr()
    assert torch.equal(weight, stored)
    torch.testing.assert_close(weight, stored)
    assert torch.equal(unpack(weight, 4, 64), unpack(stored, 4, 64))
    assert int(weight.max()) == int(stored.max())
    assert (weight.numpy() == stored.numpy()).all()
    assert "PackedWeight" in repr(weight)
    assert weight._is_hf_initialized is True
    weight.mark = 1
    assert stored.mark == 1
    assert type(copy.deepcopy(weight)) is PackedWeight
    assert torch.equal(pickle.loads(pickle.dumps(weight)), stored)
    assert type(weight.to("meta")) is torch.Tensor


def test_operators_of_ours_take_it(module):
    x = torch.randn(3, 64)
    parts = (module.weight_scale, module.weight_zero_point, None, None, module.bias)
    arguments = (*parts, 64, 4, 8, 32, "dynamic_token", 0)
    with torch.no_grad():
        for operator in (torch.ops.qvlm_hf.linear, torch.ops.qvlm_hf.linear.default):
            torch.testing.assert_close(operator(x, module.weight, *arguments), module(x))


def test_what_is_stored_is_an_ordinary_parameter(module):
    for made in (
        module,
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        module.to(torch.bfloat16),
    ):
        for held in (made._parameters["weight"], dict(made.named_parameters())["weight"]):
            assert type(held) is nn.Parameter
        assert type(made.state_dict()["weight"]) is torch.Tensor
    other = copy.deepcopy(module)
    other._mark_initialized()
    module.weight = other.weight  # as who ties weights does
    assert type(module._parameters["weight"]) is nn.Parameter
    assert module._parameters["weight"]._is_hf_initialized is True
    buffer = io.BytesIO()
    torch.save(dict(module.named_parameters()), buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)["weight"]  # holds no class of ours
    assert torch.equal(loaded, module._parameters["weight"])
    assert vars(loaded) == {"_is_hf_initialized": True}


def test_the_forward_pass_never_meets_it(module, monkeypatch):
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = module(x)
    monkeypatch.setattr(PackedWeight, "__torch_function__", None)
    seen, direct = [], fast_path.linears

    def linears(*arguments):
        seen.append([type(tensor) for tensor in arguments[1]])
        return direct(*arguments)

    monkeypatch.setattr(fast_path, "linears", linears)
    with torch.no_grad():
        assert torch.equal(module(x), expected)
    assert seen == [[nn.Parameter]]
    y = module(x.requires_grad_())
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_compiled_code_reads_the_ordinary_one(module):
    @torch.compile(backend="eager", fullgraph=True)
    def read(x):
        return module(x).to(torch.float64) if module.weight.dtype == torch.int32 else x

    x = torch.randn(2, 64)
    with torch.no_grad():
        torch.testing.assert_close(read(x), module(x).double())


BY_ADAPTERS = eval("lambda module: module.weight", {"__name__": "peft.tuners.lora.layer"})


def test_adapters_read_the_form_of_a_float_weight(module):
    form = BY_ADAPTERS(module)
    assert isinstance(form, nn.Parameter)
    assert (form.shape, form.dtype, form.device.type) == ((64, 64), torch.float32, "cpu")
    assert (form.numel(), form.size(1), form.dim(), form.is_floating_point()) == (4096, 64, 2, True)
    assert form.requires_grad is False
    form.requires_grad = False
    form.requires_grad_(False)
    for same in (form.data, form.T, form.t(), form.detach()):
        assert type(same) is FloatForm
        assert (same.shape, same.dtype) == ((64, 64), torch.float32)
    assert torch.rand(64 * 64).reshape(form.shape).shape == (64, 64)
    module.to("meta")
    assert BY_ADAPTERS(module).is_meta
    others = eval("lambda module: module.weight", {"__name__": "pefter"})
    assert others(module).dtype == module.weight.dtype == torch.int32


FORMS_REFUSALS = {
    "copied": lambda w: copy.deepcopy(w),
    "pickled": lambda w: pickle.dumps(w),
    "cloned": lambda w: w.data.clone(),
    "read": lambda w: w[0],
    "values": lambda w: w.numpy(),
    "list": lambda w: w.tolist(),
    "into float": lambda w: w.to(torch.float32),
    "of ours": lambda w: torch.ops.qvlm_hf.linear(
        w, w, None, None, None, None, None, 64, 4, 8, 32, "none", 0
    ),
    "absolute": lambda w: w.abs(),
    "view": lambda w: w.view(-1),
    "compared": lambda w: torch.equal(w, w),
    "real part": lambda w: w.real,
}


@pytest.mark.parametrize("name", REFUSALS | FORMS_REFUSALS)
def test_the_form_has_no_values(module, name):
    before = module.state_dict()["weight"].clone()
    with pytest.raises(ValueError, match=REFUSED):
        (REFUSALS | FORMS_REFUSALS)[name](BY_ADAPTERS(module))
    with pytest.raises(ValueError, match=REFUSED):
        module.weight = BY_ADAPTERS(module)
    assert torch.equal(module.state_dict()["weight"], before)
    with pytest.raises(ValueError, match=UNTRAINABLE):
        BY_ADAPTERS(module).requires_grad_()
    with pytest.raises(ValueError, match=UNTRAINABLE):
        require_gradient(BY_ADAPTERS(module))


def assign(module):
    module.weight = nn.Parameter(torch.rand(64, 64))


REPLACEMENTS = {
    "assigned": assign,
    "deleted": lambda m: delattr(m, "weight"),
    "registered": lambda m: m.register_parameter("weight", nn.Parameter(torch.rand(64, 8))),
    "l1 pruning": lambda m: prune.l1_unstructured(m, "weight", 0.5),
    "random pruning": lambda m: prune.random_unstructured(m, "weight", 0.5),
    "custom pruning": lambda m: prune.custom_from_mask(m, "weight", torch.ones(64, 8)),
    "norm pruning": lambda m: prune.ln_structured(m, "weight", 0.5, 2, 0),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
REPLACED = "^a quantized module's packed weight cannot be replaced, pruned or parametrized: call "


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_replacing_it_raises_one_line_and_changes_nothing(module, name):
    x = torch.rand(2, 64)
    before, expected = module.state_dict(), module(x)
    with pytest.raises(ValueError, match=rf"{REPLACED}|{REFUSED}"):
        REPLACEMENTS[name](module)
    assert module.state_dict().keys() == before.keys()
    assert torch.equal(module(x), expected)
