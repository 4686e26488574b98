"""Experts as linear modules: they compute what Transformers does, and become parameters again."""

import copy

import pytest
import torch
from shrunken_families import tiny_model
from tiny_families import tiny_family
from torch import nn

from qvlm_hf.hf.runtime.experts import register_experts
from qvlm_hf.models.by_structure import read_structure
from qvlm_hf.models.experts import experts_split, find_experts, join_experts, split_experts
from qvlm_hf.models.graph import Selection

# shared experts, experts by token type, transposed parameters, tokens sorted beforehand
FAMILIES = ("aria", "ernie4_5_vl_moe", "glm4v_moe", "llama4", "minimax_m3_vl", "qwen3_vl_moe")


def mixture(family):
    model = tiny_family(family, family, family) if family == "llama4" else tiny_model(family)
    with torch.no_grad():
        for module in find_experts(model).values():
            for parameter in module.parameters():
                parameter.normal_(std=0.2)
    if family != "llama4":  # which has no other
        model.set_experts_implementation("eager")
    register_experts(model)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 37)[None]).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_split_experts_compute_what_transformers_does(family):
    model = mixture(family)
    expected, before = logits(model), dict(model.named_parameters())
    with experts_split(model):
        assert (logits(model) - expected).abs().max() < 1e-5 * expected.abs().max()
        linears = [name for name, module in model.named_modules() if type(module) is nn.Linear]
        split = [name for name in linears if ".experts." in name and name[-1].isdigit()]
        assert len(split) == sum(2 * m.num_experts for m in find_experts(model).values())
        stacks = [p for name, p in model.named_parameters() if p.dim() == 3 and "experts" in name]
        assert not stacks
        again = copy.deepcopy(model)
        assert torch.equal(logits(again), logits(model))
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is parameter for name, parameter in before.items())
    assert torch.equal(logits(model), expected)
    join_experts(again)
    assert torch.equal(logits(again), expected)


def test_an_error_inside_leaves_the_parameters_as_they_were():
    model = mixture("llama4")
    before = dict(model.named_parameters())

    def fail():
        with experts_split(model, keep=True):
            next(iter(find_experts(model).values())).down_proj[0] = nn.Identity()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    after = dict(model.named_parameters())
    assert [*after] == [*before]
    assert all(after[name] is parameter for name, parameter in before.items())


def test_experts_stay_apart_while_one_of_them_is_no_plain_linear_module():
    model = mixture("qwen3_vl_moe")
    split_experts(model)
    experts = [*find_experts(model).values()]
    special = nn.Identity()
    experts[0].down_proj[1] = special
    join_experts(model)
    assert isinstance(experts[1].down_proj, nn.ModuleList)
    weights = [linear.weight for linear in experts[1].down_proj]
    assert len({weight.untyped_storage().data_ptr() for weight in weights}) == len(weights)
    assert all(weight.is_contiguous() for weight in weights)


def test_split_experts_do_not_change_how_others_are_computed():
    model = mixture("qwen3_vl_moe")
    first, second = find_experts(model).values()
    config = second.config
    with experts_split(model):
        assert first.config._experts_implementation == "qvlm"
        assert config._experts_implementation == "eager"
        assert model.get_experts_implementation()["text_config"] == "eager"
        model.set_experts_implementation("batched_mm")
        assert torch.isfinite(logits(model)).all()


def modules(structure):
    return {name for s in structure.segments for site in s.sites for name in site.modules}


def test_by_structure_every_expert_counts_whoever_got_tokens():
    model = tiny_model("glm4v_moe")
    structure = read_structure(model)
    (name,) = find_experts(model)
    experts = {module for module in modules(structure) if module.startswith(f"{name}.")}
    assert experts == {f"{name}.{p}.{e}" for p in ("gate_up_proj", "down_proj") for e in range(4)}
    (layer,) = (la for s in structure.segments for la in s.layers if name.startswith(la.name))
    assert experts <= {module for site in layer.sites for module in site.modules}
    assert not any(module.startswith(name) for module in structure.left_out)
    assert [p.dim() for p in model.get_submodule(name).parameters()] == [3, 3]  # as it was
    left = read_structure(model, Selection(modules_to_not_convert=["experts.down_proj"]))
    assert experts - modules(left) == {f"{name}.down_proj.{e}" for e in range(4)}
