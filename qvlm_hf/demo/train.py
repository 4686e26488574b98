"""Train the demo model from nothing, on a CPU, in about half an hour: `python -m qvlm_hf.demo.train --output DIR`.

    1. draw a pool of pictures; the first of them are published as the "train" split
    2. vision_steps of the vision tower and projector alone, on per-patch labels: what, which colour, which digit, which cell
    3. steps of the whole model on questions, with two auxiliary losses: the labels of the patches (their heads are dropped at the end), and
       a pull of three attention heads to the cells that show the answer and to the right one of several options. Without that pull the
       model had hardly begun to look places up after 650 steps; with it 80 % of the answer tokens were right after 150 (trial runs)
    4. plant outlier channels (outliers.py), cast to float16, save with processor and card

Several questions about one picture share one sequence, so the picture is encoded once. In three batches of four every question sees only
the picture (a block-diagonal mask, positions counted as if it were alone), which is exactly the single-turn form; in the fourth batch the
questions are the turns of one conversation. The loss is taken on the answers and their `</s>` only.

Each of a few worker processes has one thread and averages its gradients with the others once a step: on a busy CPU that is several times
faster than one process with as many threads, which wait for each other at every operation.

Legend: B sequences, L tokens, P = 36 patches, D = 192 hidden channels.
"""

import argparse
import json
import logging
import math
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.multiprocessing
from PIL import Image
from torch import distributed, nn
from torch.nn.functional import cross_entropy
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from qvlm_hf.demo.card import write_card, write_data_notice
from qvlm_hf.demo.datasets import SPLITS, scene_stream, write_split
from qvlm_hf.demo.outliers import plant_outliers
from qvlm_hf.demo.processor import IMAGE_TOKEN, PATCH, build_processor
from qvlm_hf.demo.questions import KINDS, ask, cells_of
from qvlm_hf.demo.scenes import COLORS, EMPTY, PLACES, SHAPES, SIDE, SceneBatch, load_sprite_bank

__all__ = ["TrainOptions", "build_model", "evaluate", "export", "main", "train"]

logger = logging.getLogger(__name__)

_IGNORE = -100
_PARALLEL_SHARE = 0.75  # of the batches: every question by itself
# kinds that join several cells get more of the examples
_KIND_WEIGHTS: dict[str, float] = {
    "color": 0.7,
    "shape": 0.7,
    "digit": 1,
    "count": 3,
    "where": 1,
    "exists": 1,
    "compare": 1.5,
    "choice": 2.5,
}
# the first steps ask only what is where: looking a place up is learnt in a few hundred steps, and the other kinds build on it
# layers from 0. In layer 2 the last token of a prompt has gathered the words: heads 0 and 1 look at the cells that show the answer;
# in layer 4 it knows what they hold: head 0 looks for it among the options
_CELL_LAYER, _OPTION_LAYER = 2, 4
_EASY_KINDS: dict[str, float] = {"color": 1, "shape": 1, "digit": 1}
_PATCH_LABELS = {"kind": len(SHAPES) + 2, "color": len(COLORS) + 1, "digit": 11, "cell": len(PLACES)}


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The recipe's numbers.

    Attributes:
        seed: of pictures, questions, initial weights and batches.
        pictures: size of the pool of training pictures.
        vision_steps: optimizer steps of stage 2.
        vision_batch: pictures of one worker in one such step.
        steps: optimizer steps of stage 3.
        easy_steps: the first of them, with questions of the three easiest kinds only.
        batch: pictures (sequences) of one worker in one such step.
        questions: questions about each picture of a batch.
        learning_rate: peak of the cosine schedule, for both stages.
        vision_rate: share of it for the vision tower and projector in stage 3.
        weight_decay: of AdamW, on matrices only.
        patch_loss: weight of the auxiliary loss on the patches in stage 3.
        look_loss: weight of the auxiliary loss on attention in stage 3.
        workers: processes of one thread each.
        checkpoint_minutes: the model is saved that often during training.
        outlier_factor: see `plant_outliers`.
        outlier_fraction: see `plant_outliers`.
    """

    seed: int = 0
    pictures: int = 32768
    vision_steps: int = 1600
    vision_batch: int = 20
    steps: int = 2400
    easy_steps: int = 200
    batch: int = 4
    questions: int = 8
    learning_rate: float = 1e-3
    vision_rate: float = 0.3
    weight_decay: float = 0.05
    patch_loss: float = 0.3
    look_loss: float = 0.5
    workers: int = 3
    checkpoint_minutes: float = 3.0
    outlier_factor: float = 20.0
    outlier_fraction: float = 0.03


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Training pictures: uint8 [N, 48, 48, 3], and what they show."""

    pictures: np.ndarray
    scenes: SceneBatch


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One packed batch.

    Attributes:
        ids: int64 [B, L].
        labels: int64 [B, L], -100 outside of the answers.
        positions: int64 [B, L].
        mask: bool [B, 1, L, L], True where a token may attend.
        looks: for some layers, where prompts should look.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    looks: dict[int, "Looks"]


@dataclass(frozen=True, kw_only=True)
class Looks:
    """Where the last tokens of M prompts should look in one layer.

    Attributes:
        source: int64 [M, 3]: sequence, token, attention head.
        among: bool [M, L], the tokens to choose from.
        wanted: bool [M, L], the right ones.
    """

    source: torch.Tensor
    among: torch.Tensor
    wanted: torch.Tensor


class Look(NamedTuple):
    """Where one token should look: layer, token, head, the tokens to choose from (first, end), the right ones."""

    layer: int
    token: int
    head: int
    first: int
    end: int
    wanted: list[int]


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """Build the untrained model: 5 CLIP layers (the last one is not used, as in LLaVA-1.5), projector, 6 Llama layers."""
    # 344 and 520 are multiples of neither 32 nor 128: short last groups are part of the demo
    vision = CLIPVisionConfig(
        image_size=SIDE, patch_size=PATCH, hidden_size=128, intermediate_size=344, num_hidden_layers=5, num_attention_heads=4
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=520,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.06,  # about 1 / sqrt(hidden_size)
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(SIDE // PATCH) ** 2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    # words at the scale of 1, or they drown in what the first layer adds to them, a mean over 36 patches
    nn.init.normal_(model.model.language_model.embed_tokens.weight)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model


def draw_pool(options: TrainOptions) -> Pool:
    """Draw the pool of training pictures: the beginning of the "train" stream."""
    bank = load_sprite_bank(options.seed)
    scenes, pictures = [], []
    for batch, drawn in islice(scene_stream("train", bank, options.seed), math.ceil(options.pictures / 1024)):
        scenes.append(batch)
        pictures.append(drawn)
    joined = {name: np.concatenate([getattr(batch, name) for batch in scenes]) for name in ("kind", "color", "digit", "instance")}
    return Pool(pictures=np.concatenate(pictures), scenes=SceneBatch(**joined))


def _cell_of_patch() -> np.ndarray:
    """Return the cell of every patch; int64 [36], two patches a side in each cell."""
    row, column = np.mgrid[0 : SIDE // PATCH, 0 : SIDE // PATCH]
    return (row // 2 * 3 + column // 2).ravel()


def patch_labels(scenes: SceneBatch, chosen: np.ndarray) -> dict[str, torch.Tensor]:
    """Return the labels of every patch for the auxiliary heads; int64 [B, 36] each, 0 for an empty cell."""
    kind = scenes.kind[chosen]
    labels = {
        "kind": np.where(kind == EMPTY, 0, kind + 1),
        "color": scenes.color[chosen] + 1,
        "digit": scenes.digit[chosen] + 1,
        "cell": np.broadcast_to(np.arange(len(PLACES)), kind.shape),
    }
    return {name: torch.from_numpy(np.ascontiguousarray(value[:, _cell_of_patch()])) for name, value in labels.items()}


def _pixels(pictures: np.ndarray, processor: LlavaProcessor) -> torch.Tensor:
    """Normalise pictures as the processor does; uint8 [B, 48, 48, 3] -> float32 [B, 3, 48, 48]."""
    mean, std = (np.asarray(v, np.float32) for v in (processor.image_processor.image_mean, processor.image_processor.image_std))
    return torch.from_numpy(((pictures.astype(np.float32) / 255 - mean) / std).transpose(0, 3, 1, 2).copy())


class Turn(NamedTuple):
    """One turn as token ids, question with "ASSISTANT:" and answer with `</s>`; the cells, and the token of the option, to look at."""

    question: list[int]
    answer: list[int]
    places: list[int]
    option: int | None


class Packer:
    """Draws questions about pictures and packs them into sequences.

    Args:
        processor: the demo processor; texts are tokenized with its tokenizer and laid out as its chat template does.
        seed: of the questions.
    """

    def __init__(self, processor: LlavaProcessor, seed: int) -> None:
        """See the class docstring."""
        self.tokenizer = processor.tokenizer
        self.random = random.Random(seed)
        image = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.user = self._ids("USER:")
        self.assistant = self._ids("ASSISTANT:")
        self.after_option = {self._ids(word)[0] for word in ("(", "Answer", "ASSISTANT")}
        self.prefix = [self.tokenizer.bos_token_id, *self.user, *[image] * (SIDE // PATCH) ** 2]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _turns(self, scenes: SceneBatch, index: int, count: int, weights: dict[str, float]) -> list[Turn]:
        """Draw `count` turns about one picture."""
        cells = cells_of(scenes, index)
        turns: list[Turn] = []
        while len(turns) < count:
            kind = self.random.choices(KINDS, [weights.get(k, 0) for k in KINDS])[0]
            question = ask(kind, cells, self.random)
            if question is not None:
                places = [PLACES.index(place) for place in question.places]
                asked, answer = self._ids(question.text) + self.assistant, self._ids(question.answer + "</s>")
                turns.append(Turn(asked, answer, places, self._option(asked, answer[0]) if kind == "choice" else None))
        return turns

    def _option(self, question: list[int], letter: int) -> int:
        """Return the index of the last token of the option that `letter` names: "(A) top [left] (B) ..."."""
        start = question.index(letter)
        return next(i for i in range(start, len(question)) if question[i] in self.after_option) - 1

    def pack(self, scenes: SceneBatch, chosen: np.ndarray, count: int, parallel: bool, weights: dict[str, float]) -> Batch:
        """Pack `count` questions about each chosen picture.

        Args:
            scenes: the pool's scenes.
            chosen: int64 [B], indices into it.
            count: questions a picture.
            weights: how often each kind of question is drawn, relative to the others.
            parallel: True: every question sees the picture alone; False: the questions are turns of one conversation.
        """
        rows = [self._row(self._turns(scenes, int(index), count, weights), parallel) for index in chosen]
        length = math.ceil(max(len(row[0]) for row in rows) / 8) * 8
        fill = (self.tokenizer.pad_token_id, _IGNORE, 0, -1)
        ids, labels, positions, segments = (
            torch.tensor([row[i] + [fill[i]] * (length - len(row[i])) for row in rows]) for i in range(len(fill))
        )
        query, key = segments[:, :, None], segments[:, None, :]
        visible = ((key == 0) | (key == query)) & torch.ones(length, length, dtype=torch.bool).tril()
        looks = {layer: _join_looks([row[4] for row in rows], layer, length) for layer in (_CELL_LAYER, _OPTION_LAYER)}
        return Batch(ids=ids, labels=labels, positions=positions, mask=visible[:, None], looks=looks)

    def _row(self, turns: Sequence[Turn], parallel: bool) -> tuple[list[int], list[int], list[int], list[int], list[Look]]:
        """Lay out one sequence: ids, labels, positions, segments (0 is visible to all that follow it), and where to look."""
        ids, labels = list(self.prefix), [_IGNORE] * len(self.prefix)
        positions, segments = list(range(len(ids))), [0] * len(ids)
        looks: list[Look] = []
        image = len(self.prefix) - (SIDE // PATCH) ** 2
        for number, (question, answer, places, option) in enumerate(turns):
            opening = self.user if number and not parallel else []
            added = [*opening, *question, *answer]
            start = len(self.prefix) if parallel else len(ids)
            ids += added
            last = len(ids) - len(answer) - 1
            for head, place in enumerate(places):
                patches = (np.flatnonzero(_cell_of_patch() == place) + image).tolist()
                looks.append(Look(_CELL_LAYER, last, head, image, len(self.prefix), patches))
            if option is not None:
                asked = last + 1 - len(question)
                looks.append(Look(_OPTION_LAYER, last, 0, asked, last, [asked + option]))
            labels += [_IGNORE] * (len(added) - len(answer)) + answer
            positions += range(start, start + len(added))
            segments += [number + 1 if parallel else 0] * len(added)
        return ids, labels, positions, segments, looks


def _join_looks(rows: Sequence[Sequence[Look]], layer: int, length: int) -> Looks:
    """Join the looks of one layer over the sequences of a batch."""
    chosen = [(number, look) for number, row in enumerate(rows) for look in row if look.layer == layer]
    among, wanted = torch.zeros(2, len(chosen), length, dtype=torch.bool)
    for index, (_, look) in enumerate(chosen):
        among[index, look.first : look.end] = True
        wanted[index, look.wanted] = True
    source = torch.tensor([(number, look.token, look.head) for number, look in chosen], dtype=torch.int64).view(-1, 3)
    return Looks(source=source, among=among, wanted=wanted)


class PatchHeads(nn.Module):
    """Linear heads on the projected patches [B, 36, 192]; only there to train the vision tower, never saved."""

    def __init__(self, width: int) -> None:
        """Make one head for each label; `width` is the projector's output width."""
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, classes) for name, classes in _PATCH_LABELS.items()})

    def forward(self, features: torch.Tensor, labels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the mean cross-entropy over patches and labels."""
        losses = [cross_entropy(head(features).flatten(0, 1), labels[name].flatten()) for name, head in self.heads.items()]
        return torch.stack(losses).mean()


def _features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
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


def _look_loss(language: LlamaModel, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor, looks: Looks) -> torch.Tensor:
    """Return the mean of -log(share of attention on the tokens wanted, among those to choose from); 0 where nobody looks.

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
    scores = (key[sequence, head] @ query[sequence, head, token][:, :, None]).squeeze(-1) * query.shape[-1] ** -0.5
    share = scores.masked_fill(~looks.among, -math.inf).log_softmax(-1)
    return -share.masked_fill(~looks.wanted, -math.inf).logsumexp(-1).sum() / max(1, len(token))


def answer_loss(
    model: LlavaForConditionalGeneration, features: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return over a packed batch (mean cross-entropy, share of right tokens) of the answers, and the look losses, one a layer."""
    embeds = model.get_input_embeddings()(batch.ids)
    first = int((batch.ids[0] == model.config.image_token_id).nonzero()[0])
    embeds = torch.cat([embeds[:, :first], features, embeds[:, first + features.shape[1] :]], dim=1)
    language = model.model.language_model
    attentions = {layer: language.layers[layer].self_attn for layer in batch.looks}
    queries = {f"query{layer}": attention.q_proj for layer, attention in attentions.items()}
    keys = {f"key{layer}": attention.k_proj for layer, attention in attentions.items()}
    with _outputs(**queries, **keys) as found:
        hidden = language(inputs_embeds=embeds, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False).last_hidden_state
    pointers = [
        _look_loss(language, found[f"query{layer}"], found[f"key{layer}"], batch.positions, looks) for layer, looks in batch.looks.items()
    ]
    asked = batch.labels[:, 1:] != _IGNORE
    logits, target = model.lm_head(hidden[:, :-1][asked]), batch.labels[:, 1:][asked]
    return cross_entropy(logits, target), (logits.argmax(-1) == target).float().mean(), torch.stack(pointers)


def _optimizer(parts: dict[nn.Module, float], options: TrainOptions) -> torch.optim.AdamW:
    """AdamW for modules, each with its share of the learning rate; weight decay on matrices only."""
    groups = []
    for part, share in parts.items():
        for decay, is_matrix in ((options.weight_decay, True), (0.0, False)):
            chosen = [p for p in part.parameters() if (p.ndim > 1) == is_matrix]
            if chosen:
                groups.append({"params": chosen, "weight_decay": decay, "lr": options.learning_rate * share})
    return torch.optim.AdamW(groups, lr=options.learning_rate, betas=(0.9, 0.95), fused=True)


def _schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over 4 % of the steps, then a cosine to 2 % of the peak."""
    warm = max(1, round(0.04 * steps))

    def factor(step: int) -> float:
        progress = min(1.0, max(0.0, (step - warm) / max(1, steps - warm)))
        return min((step + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _indices(size: int, batch: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Yield batches of indices, epoch after epoch, each in a new order."""
    while True:
        order = rng.permutation(size)
        yield from (order[i : i + batch] for i in range(0, size - batch + 1, batch))


def _step(loss: torch.Tensor, optimizer: torch.optim.Optimizer, schedule: torch.optim.lr_scheduler.LRScheduler) -> None:
    """Do one optimizer step with the mean gradient of all workers, its norm clipped to 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in trained])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, gradient in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = gradient.view_as(parameter)
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()


def _train_vision(
    model: LlavaForConditionalGeneration, heads: PatchHeads, pool: Pool, processor: LlavaProcessor, options: TrainOptions
) -> None:
    """Stage 2: vision tower and projector on the labels of the patches."""
    optimizer = _optimizer({model.model.vision_tower: 1.0, model.model.multi_modal_projector: 1.0, heads: 1.0}, options)
    schedule = _schedule(optimizer, options.vision_steps)
    batches = _indices(len(pool.pictures), options.vision_batch, np.random.default_rng([options.seed, 10, distributed.get_rank()]))
    start, mean = time.perf_counter(), 0.0
    for step, chosen in enumerate(islice(batches, options.vision_steps), 1):
        loss = heads(_features(model, _pixels(pool.pictures[chosen], processor)), patch_labels(pool.scenes, chosen))
        _step(loss, optimizer, schedule)
        mean += float(loss.detach())
        if step % 50 == 0:
            logger.info("vision step %d/%d, patch loss %.4f, %.0f s", step, options.vision_steps, mean / 50, time.perf_counter() - start)
            mean = 0.0


def _train_answers(
    model: LlavaForConditionalGeneration, heads: PatchHeads, pool: Pool, processor: LlavaProcessor, options: TrainOptions, output: Path
) -> None:
    """Stage 3: the whole model on questions; saves `output/checkpoint` every few minutes."""
    vision, projector, language = model.model.vision_tower, model.model.multi_modal_projector, model.model.language_model
    slow = options.vision_rate
    optimizer = _optimizer({vision: slow, projector: slow, heads: 1.0, language: 1.0, model.lm_head: 1.0}, options)
    schedule = _schedule(optimizer, options.steps)
    rng = np.random.default_rng([options.seed, 20, distributed.get_rank()])
    packer = Packer(processor, options.seed + distributed.get_rank())
    start = saved = time.perf_counter()
    sums = np.zeros(5)
    for step, chosen in enumerate(islice(_indices(len(pool.pictures), options.batch, rng), options.steps), 1):
        weights = _EASY_KINDS if step <= options.easy_steps else _KIND_WEIGHTS
        batch = packer.pack(pool.scenes, chosen, options.questions, parallel=bool(rng.random() < _PARALLEL_SHARE), weights=weights)
        features = _features(model, _pixels(pool.pictures[chosen], processor))
        loss, right, looks = answer_loss(model, features, batch)
        patch = heads(features, patch_labels(pool.scenes, chosen))
        _step(loss + options.patch_loss * patch + options.look_loss * looks.sum(), optimizer, schedule)
        sums += (float(loss.detach()), float(right), float(patch.detach()), *looks.tolist())
        if step % 50 == 0:
            rate, (answer, share, aux, cell, option) = schedule.get_last_lr()[0], sums / 50
            sums[:] = 0
            message = "step %d/%d, answer loss %.4f, right tokens %.4f, patch loss %.4f, look losses %.4f %.4f, lr %.1e, %.0f s"
            logger.info(message, step, options.steps, answer, share, aux, cell, option, rate, time.perf_counter() - start)
        if distributed.get_rank() == 0 and time.perf_counter() - saved > 60 * options.checkpoint_minutes:
            saved = time.perf_counter()
            model.save_pretrained(output / "checkpoint")


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, dataset: Path, limit: int | None = None, batch_size: int = 60
) -> dict[str, tuple[int, int]]:
    """Count the questions of a split that greedy decoding would answer exactly.

    One teacher-forced forward is enough: greedy decoding produces the answer if and only if the most likely token is the right one at every
    position of the answer, `</s>` included.

    Args:
        model: in any floating dtype; left in evaluation mode.
        processor: its processor.
        dataset: a JSON-lines file as written by `datasets.write_split`.
        limit: only the first so many questions.
        batch_size: questions in one forward.

    Returns:
        For each kind of question (right, asked), and the sum under "all".
    """
    model.eval()
    lines = [json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines()[:limit]]
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for start in range(0, len(lines), batch_size):
        part = lines[start : start + batch_size]
        right = _answered(model, processor, [line["messages"] for line in part], dataset.parent)
        for line, is_right in zip(part, right, strict=True):
            for key in (line["kind"], "all"):
                counts[key][0] += is_right
                counts[key][1] += 1
    return {key: (counts[key][0], counts[key][1]) for key in (*KINDS, "all") if key in counts}


def _answered(model: LlavaForConditionalGeneration, processor: LlavaProcessor, chats: list[list[dict]], folder: Path) -> list[bool]:
    """Tell for each chat whether its answer is what greedy decoding would produce."""
    pictures = [Image.open(folder / chat[0]["content"][0]["path"]) for chat in chats]
    texts = [processor.apply_chat_template(chat) for chat in chats]
    inputs = processor(images=pictures, text=texts, padding=True, padding_side="right", return_tensors="pt")
    answers = [processor.tokenizer(chat[1]["content"][0]["text"] + "</s>", add_special_tokens=False).input_ids for chat in chats]
    logits = model(**inputs.to(model.dtype)).logits
    right = []
    for row, answer in enumerate(answers):
        end = int(inputs["attention_mask"][row].sum())
        predicted = logits[row, end - len(answer) - 1 : end - 1].argmax(-1)
        right.append(predicted.tolist() == answer)
    return right


@torch.no_grad()
def _rescale_error(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, dataset: Path, options: TrainOptions
) -> tuple[dict, float]:
    """Plant the outliers; returns the channels and the largest change of a logit on 32 calibration questions, in float32."""
    chats = [json.loads(line)["messages"] for line in dataset.read_text(encoding="utf-8").splitlines()[:32]]
    pictures = [Image.open(dataset.parent / chat[0]["content"][0]["path"]) for chat in chats]
    inputs = processor(images=pictures, text=[processor.apply_chat_template(chat) for chat in chats], padding=True, return_tensors="pt")
    kept = inputs["attention_mask"].bool()
    before = model(**inputs).logits[kept]
    planted = plant_outliers(model, options.outlier_factor, options.outlier_fraction, options.seed)
    return planted, float((model(**inputs).logits[kept] - before).abs().max())


def export(model: LlavaForConditionalGeneration, processor: LlavaProcessor, options: TrainOptions, output: Path, minutes: float) -> None:
    """Stage 4: write the model (float16), its processor, its card and `outliers.json` to `output/model`, measured on `output/data`."""
    model.eval()
    test, target = output / "data" / "test.jsonl", output / "model"
    before = evaluate(model, processor, test)
    planted, error = _rescale_error(model, processor, output / "data" / "calibration.jsonl", options)
    model.half().save_pretrained(target)
    processor.save_pretrained(target)
    after = evaluate(model.float(), processor, test)
    rescale = {"factor": options.outlier_factor, "fraction": options.outlier_fraction, "seed": options.seed}
    (target / "outliers.json").write_text(json.dumps({**rescale, "max_logit_change": error, "channels": planted}) + "\n", encoding="utf-8")
    logger.info("test accuracy: float32 %s, float16 with outliers %s; rescale error %.1e", before["all"], after["all"], error)
    write_card(
        target,
        settings=asdict(options),
        parameters=sum(p.numel() for p in model.parameters()),
        vocabulary=len(processor.tokenizer),
        accuracy=after,
        rescale_error=error,
        minutes=minutes,
    )


def _work(rank: int, options: TrainOptions, output: Path, meeting_point: str) -> None:
    """Run stages 1 to 3 in one worker; the first saves `output/checkpoint`."""
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.ERROR, format="%(asctime)s %(message)s")
    distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=options.workers)
    try:
        pool = draw_pool(options)
        logger.info("%d pictures drawn", len(pool.pictures))
        processor = build_processor()
        model = build_model(processor.tokenizer, options.seed)
        heads = PatchHeads(model.config.get_text_config().hidden_size)
        model.train()
        _train_vision(model, heads, pool, processor, options)
        if rank == 0:
            model.save_pretrained(output / "vision")
        _train_answers(model, heads, pool, processor, options, output)
        if rank == 0:
            model.save_pretrained(output / "checkpoint")
    finally:
        distributed.destroy_process_group()


def train(options: TrainOptions, output: Path) -> None:
    """Run the recipe: write `output/data` and `output/model`."""
    start = time.perf_counter()
    bank = load_sprite_bank(options.seed)
    for split in SPLITS:
        write_split(split, output / "data", bank, options.seed)
    write_data_notice(output / "data", options.seed)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_work, (options, output, f"{folder}/meeting_point"), options.workers)
    model = LlavaForConditionalGeneration.from_pretrained(output / "checkpoint", dtype=torch.float32)
    export(model, build_processor(), options, output, (time.perf_counter() - start) / 60)


def _parse(arguments: Sequence[str] | None) -> tuple[TrainOptions, Path]:
    """Read the command line: --output, and one option for each field of `TrainOptions`."""
    parser = argparse.ArgumentParser(prog="python -m qvlm_hf.demo.train", description="Train the demo model.")
    parser.add_argument("--output", type=Path, required=True, help="folder that gets data/ and model/")
    for name, default in asdict(TrainOptions()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}")
    values = vars(parser.parse_args(arguments))
    return TrainOptions(**{name: value for name, value in values.items() if name != "output"}), values["output"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m qvlm_hf.demo.train`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(*_parse(arguments))


if __name__ == "__main__":
    main()
