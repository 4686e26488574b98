"""What training lowers: the loss on answers, and two auxiliary ones, on the labels of patches and
on where attention looks.

Legend: B sequences, L tokens, D = 192 hidden channels.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import LlamaModel, LlavaForConditionalGeneration
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from demo_model.packing import IGNORE, Batch, Looks
from demo_model.pool import PATCH_LABELS

__all__ = ["PatchHeads", "answer_loss", "picture_features"]


class PatchHeads(nn.Module):
    """Linear heads on the projected patches [B, 36, 192]; only there to train the vision tower,
    never saved.
    """

    def __init__(self, width: int) -> None:
        """Make one head for each label; `width` is the projector's output width."""
        super().__init__()
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width, classes) for name, classes in PATCH_LABELS.items()}
        )

    def forward(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean cross-entropy over patches and labels."""
        losses = [
            cross_entropy(head(features).flatten(0, 1), labels[name].flatten())
            for name, head in self.heads.items()
        ]
        return torch.stack(losses).mean()


def picture_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """Encode pictures; float32 [B, 3, 48, 48] -> [B, 36, 192]."""
    return torch.stack(list(model.model.get_image_features(pixels, return_dict=True).pooler_output))


@contextmanager
def _outputs(**modules: nn.Module) -> Iterator[dict[str, torch.Tensor]]:
    """Record the latest output of each module, under the name it is passed by."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, tuple, torch.Tensor], None]:
        return lambda _module, _inputs, output: found.__setitem__(name, output)

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _look_loss(
    language: LlamaModel,
    query: torch.Tensor,
    key: torch.Tensor,
    positions: torch.Tensor,
    looks: Looks,
) -> torch.Tensor:
    """Return the mean of -log(share of attention on the tokens wanted, among those to choose from);
    0 where nobody looks.

    Args:
        language: the decoder, for its rotary embedding.
        query: float32 [B, L, D], one layer's queries before rotation.
        key: the same of its keys.
        positions: int64 [B, L].
        looks: who looks where.
    """
    heads = language.config.num_attention_heads
    query, key = (x.view(*x.shape[:2], heads, -1).transpose(1, 2) for x in (query, key))
    query, key = apply_rotary_pos_emb(query, key, *language.rotary_emb(query, positions))
    sequence, token, head = looks.source.unbind(1)
    scores = (key[sequence, head] @ query[sequence, head, token][:, :, None]).squeeze(
        -1
    ) * query.shape[-1] ** -0.5
    share = scores.masked_fill(~looks.among, -math.inf).log_softmax(-1)
    return -share.masked_fill(~looks.wanted, -math.inf).logsumexp(-1).sum() / max(1, len(token))


def answer_loss(
    model: LlavaForConditionalGeneration, features: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return over a packed batch (mean cross-entropy, share of right tokens) of the answers, and
    the look losses, one a layer.
    """
    embeds = model.get_input_embeddings()(batch.ids)
    first = int((batch.ids[0] == model.config.image_token_id).nonzero()[0])
    embeds = torch.cat([embeds[:, :first], features, embeds[:, first + features.shape[1] :]], dim=1)
    language = model.model.language_model
    attentions = {layer: language.layers[layer].self_attn for layer in batch.looks}
    queries = {f"query{layer}": attention.q_proj for layer, attention in attentions.items()}
    keys = {f"key{layer}": attention.k_proj for layer, attention in attentions.items()}
    with _outputs(**queries, **keys) as found:
        hidden = language(
            inputs_embeds=embeds,
            attention_mask=batch.mask,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
    pointers = [
        _look_loss(language, found[f"query{layer}"], found[f"key{layer}"], batch.positions, looks)
        for layer, looks in batch.looks.items()
    ]
    asked = batch.labels[:, 1:] != IGNORE
    logits, target = model.lm_head(hidden[:, :-1][asked]), batch.labels[:, 1:][asked]
    return (
        cross_entropy(logits, target),
        (logits.argmax(-1) == target).float().mean(),
        torch.stack(pointers),
    )
