"""Which tensor of a model a key in its files stands for, by Transformers' conversion rules.

Some of these rules join or split tensors (experts, fused qkv), which packed ones cannot be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from qvlm_hf.models.experts import find_experts, has_split_experts, split_experts
from qvlm_hf.models.families import has_row

if TYPE_CHECKING:  # transformers' modeling code takes a second to import
    from transformers import PreTrainedModel

__all__ = [
    "PARTS",
    "keep_names_on_saving",
    "names_when_loaded",
    "split_saved_experts",
    "without_rules_for_experts",
]

# The tensors of a quantized module, each a key behind the module's name.
PARTS = ("weight", "weight_scale", "weight_zero_point", "input_scale", "input_zero_point", "bias")


def names_when_loaded(model: PreTrainedModel) -> Callable[[str], str]:
    """Makes a function from a key in files to the name that loading gives it."""
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    state = model.state_dict()

    def in_model(key: str) -> str:
        # A module's tensors are renamed as its `weight`, the one that the float model has too.
        base, _, part = key.rpartition(".")
        known = f"{base}.weight" if part in PARTS else key
        renamed = rename_source_key(known, renamings, converters, model.base_model_prefix, state)[0]
        if renamed not in state and known in state:  # as Transformers' loading
            renamed = known
        linear = part in PARTS and renamed.endswith(".weight")  # no bare parameter
        return f"{renamed.removesuffix('weight')}{part}" if linear else renamed

    return in_model


def split_saved_experts(model: PreTrainedModel, modules: Iterable[str]) -> None:
    """Splits the experts of a model if config.json lists one of them: then all are saved apart."""
    places = [f".{name}." for name in find_experts(model)]
    if any(place in f".{name}" for name in modules for place in places):
        split_experts(model)


def without_rules_for_experts(rules: Sequence[Any], model: PreTrainedModel) -> list[Any]:
    """Transformers' conversion rules without those that would make one parameter of split experts.

    Nothing is left out for a model without any.
    """
    if not has_split_experts(model):
        return list(rules)
    held = {
        child for module in find_experts(model).values() for child, _ in module.named_children()
    }
    return [
        rule
        for rule in rules
        if not isinstance(rule, WeightConverter)
        or held.isdisjoint(target.rpartition(".")[2] for target in rule.target_patterns)
    ]


def keep_names_on_saving(model: PreTrainedModel) -> None:
    """Saves a model under its own names where those of older files would not lead back to them.

    Those may join or split tensors (experts, fused qkv), which packed ones cannot be.
    """
    if not has_row(model) or has_split_experts(model) or not _leads_back(model):
        model._weight_conversions = []  # type: ignore[assignment]


def _leads_back(model: PreTrainedModel) -> bool:
    """Whether the keys under which Transformers would save a model load into all its tensors."""
    state = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
    try:
        keys = revert_weight_conversion(model, state)
    except (RuntimeError, ValueError):  # packed tensors that do not fit together
        return False
    return set(map(names_when_loaded(model), keys)) == state.keys()
