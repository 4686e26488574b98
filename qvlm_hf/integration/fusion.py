"""What a quantized model computes together in inference, and files hold nothing of: modules that read one input, norms, rotary embedding.

Of a norm or an attention only the class changes: parameters, names, hooks and `isinstance` stay. A forward pass that somebody else put on
the module (accelerate's offloading, `kernelize`) goes first, as on any module.
"""

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm, eager_attention_forward

from qvlm_hf.core.architectures import shared_inputs
from qvlm_hf.integration.growing_cache import updated
from qvlm_hf.nn.fused import Fused, FusedRMSNorm
from qvlm_hf.nn.replace import quantized_modules
from qvlm_hf.nn.shared_input import share_inputs
from qvlm_hf.ops import rotary
from qvlm_hf.ops.fused import fusible

__all__ = ["FusedLlamaAttention", "FusedLlamaRMSNorm", "fuse", "unfuse"]


class FusedLlamaRMSNorm(FusedRMSNorm, LlamaRMSNorm):
    """LlamaRMSNorm by `qvlm_hf::rms_norm`."""


class FusedLlamaAttention(Fused, LlamaAttention):
    """LlamaAttention with its rotary embedding by `qvlm_hf::rotary`; the same bits."""

    def forward(  # type: ignore[override]  # Transformers lists what may be in kwargs
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,  # noqa: ANN401 - any Transformers cache
        **kwargs: Any,  # noqa: ANN401 - what Transformers passes on to the attention function
    ) -> tuple[Tensor, Tensor | None]:
        """[B, T, hidden] -> [B, T, hidden] and, if the attention function gives them, the weights; arguments as of LlamaAttention."""
        # A wrapper around a forward pass (accelerate's) keeps this one when the module has its own class again: `reference` is gone then.
        if getattr(self, "reference", True) or not fusible(hidden_states):
            return LlamaAttention.forward(self, hidden_states, position_embeddings, attention_mask, past_key_values, **kwargs)
        shape = hidden_states.shape[:-1]
        query, key, value = (proj(hidden_states).view(*shape, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotary((query, key), *position_embeddings)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if past_key_values is not None:
            key, value = updated(past_key_values, key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(mixed.reshape(*shape, -1).contiguous()), weights


_FUSED: dict[type[nn.Module], type[nn.Module]] = {LlamaRMSNorm: FusedLlamaRMSNorm, LlamaAttention: FusedLlamaAttention}


def fuse(model: nn.Module) -> None:
    """Prepares a quantized model; leaves one without quantized modules alone.

    Args:
        model: on its devices. Norms and attentions of exactly the known classes are changed: a subclass may compute something else.
    """
    if next(quantized_modules(model), None) is not None:
        share_inputs(model, shared_inputs(model))
        _change_classes(model, _FUSED)


def unfuse(model: nn.Module) -> None:
    """Gives norms and attentions their own classes again."""
    _change_classes(model, {fused: own for own, fused in _FUSED.items()})


def _change_classes(model: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
