"""Train the demo model from nothing, on a CPU, in about half an hour: `python -m demo_model.train
--output DIR`.

    1. draw a pool of pictures; the first of them are published as the "train" split
    2. vision_steps of the vision tower and projector alone, on per-patch labels: what, which
    colour, which digit, which cell
    3. steps of the whole model on questions, with two auxiliary losses: the labels of the patches
       (their heads are dropped at the end), and a pull of three attention heads to the cells that
       show the answer and to the right one of several options. Without that pull the model had
       hardly begun to look places up after 650 steps; with it 80 % of the answer tokens were right
       after 150 (trial runs)
    4. plant outlier channels (outliers.py), cast to float16, save with processor and card

Three batches of four ask every question by itself, the fourth makes the questions turns of one
conversation (packing.py).

Each of a few worker processes has one thread and averages its gradients with the others once a
step: on a busy CPU that is several times faster than one process with as many threads, which wait
for each other at every operation.
"""

import argparse
import json
import logging
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing
from PIL import Image
from torch import distributed
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from demo_model.card import write_card, write_data_notice
from demo_model.datasets import SPLITS, write_split
from demo_model.losses import PatchHeads, answer_loss, picture_features
from demo_model.network import build_model
from demo_model.optimizer import make_optimizer, make_schedule, take_step
from demo_model.outliers import plant_outliers
from demo_model.packing import Packer
from demo_model.pool import Pool, draw_pool, patch_labels, shuffled_batches, to_pixels
from demo_model.processor import build_processor
from demo_model.recipe import EASY_KINDS, KIND_WEIGHTS, PARALLEL_SHARE, TrainOptions
from demo_model.scenes import load_sprite_bank
from demo_model.scoring import evaluate
from qvlm_hf.hf.saving import check_output

__all__ = ["TrainOptions", "export", "main", "train"]

logger = logging.getLogger(__name__)


def _train_vision(
    model: LlavaForConditionalGeneration,
    heads: PatchHeads,
    pool: Pool,
    processor: LlavaProcessor,
    options: TrainOptions,
) -> None:
    """Stage 2: vision tower and projector on the labels of the patches."""
    optimizer = make_optimizer(
        {model.model.vision_tower: 1.0, model.model.multi_modal_projector: 1.0, heads: 1.0}, options
    )
    schedule = make_schedule(optimizer, options.vision_steps)
    batches = shuffled_batches(
        len(pool.pictures),
        options.vision_batch,
        np.random.default_rng([options.seed, 10, distributed.get_rank()]),
    )
    start, mean = time.perf_counter(), 0.0
    for step, chosen in enumerate(islice(batches, options.vision_steps), 1):
        loss = heads(
            picture_features(model, to_pixels(pool.pictures[chosen], processor)),
            patch_labels(pool.scenes, chosen),
        )
        take_step(loss, optimizer, schedule)
        mean += float(loss.detach())
        if step % 50 == 0:
            logger.info(
                "vision step %d/%d, patch loss %.4f, %.0f s",
                step,
                options.vision_steps,
                mean / 50,
                time.perf_counter() - start,
            )
            mean = 0.0


def _train_answers(
    model: LlavaForConditionalGeneration,
    heads: PatchHeads,
    pool: Pool,
    processor: LlavaProcessor,
    options: TrainOptions,
    output: Path,
) -> None:
    """Stage 3: the whole model on questions; saves `output/checkpoint` every few minutes."""
    vision, projector, language = (
        model.model.vision_tower,
        model.model.multi_modal_projector,
        model.model.language_model,
    )
    slow = options.vision_rate
    optimizer = make_optimizer(
        {vision: slow, projector: slow, heads: 1.0, language: 1.0, model.lm_head: 1.0}, options
    )
    schedule = make_schedule(optimizer, options.steps)
    rng = np.random.default_rng([options.seed, 20, distributed.get_rank()])
    packer = Packer(processor, options.seed + distributed.get_rank())
    start = saved = time.perf_counter()
    sums = np.zeros(5)
    for step, chosen in enumerate(
        islice(shuffled_batches(len(pool.pictures), options.batch, rng), options.steps), 1
    ):
        weights = EASY_KINDS if step <= options.easy_steps else KIND_WEIGHTS
        batch = packer.pack(
            pool.scenes,
            chosen,
            options.questions,
            parallel=bool(rng.random() < PARALLEL_SHARE),
            weights=weights,
        )
        features = picture_features(model, to_pixels(pool.pictures[chosen], processor))
        loss, right, looks = answer_loss(model, features, batch)
        patch = heads(features, patch_labels(pool.scenes, chosen))
        take_step(
            loss + options.patch_loss * patch + options.look_loss * looks.sum(), optimizer, schedule
        )
        sums += (float(loss.detach()), float(right), float(patch.detach()), *looks.tolist())
        if step % 50 == 0:
            rate, (answer, share, aux, cell, option) = schedule.get_last_lr()[0], sums / 50
            sums[:] = 0
            message = "step %d/%d, answer loss %.4f, right tokens %.4f, patch loss %.4f, look losses %.4f %.4f, lr %.1e, %.0f s"
            logger.info(
                message,
                step,
                options.steps,
                answer,
                share,
                aux,
                cell,
                option,
                rate,
                time.perf_counter() - start,
            )
        if (
            distributed.get_rank() == 0
            and time.perf_counter() - saved > 60 * options.checkpoint_minutes
        ):
            saved = time.perf_counter()
            model.save_pretrained(output / "checkpoint")


@torch.no_grad()
def _rescale_error(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    dataset: Path,
    options: TrainOptions,
) -> tuple[dict, float]:
    """Plant the outliers; returns the channels and the largest change of a logit on 32 calibration
    questions, in float32.
    """
    chats = [
        json.loads(line)["messages"]
        for line in dataset.read_text(encoding="utf-8").splitlines()[:32]
    ]
    pictures = [Image.open(dataset.parent / chat[0]["content"][0]["path"]) for chat in chats]
    inputs = processor(
        images=pictures,
        text=[processor.apply_chat_template(chat) for chat in chats],
        padding=True,
        return_tensors="pt",
    )
    kept = inputs["attention_mask"].bool()
    before = model(**inputs).logits[kept]
    planted = plant_outliers(model, options.outlier_factor, options.outlier_fraction, options.seed)
    return planted, float((model(**inputs).logits[kept] - before).abs().max())


def export(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    options: TrainOptions,
    output: Path,
    minutes: float,
) -> None:
    """Stage 4: write the model (float16), its processor, its card and `outliers.json` to
    `output/model`, measured on `output/data`.
    """
    model.eval()
    test, target = output / "data" / "test.jsonl", output / "model"
    before = evaluate(model, processor, test)
    planted, error = _rescale_error(
        model, processor, output / "data" / "calibration.jsonl", options
    )
    model.half().save_pretrained(target)
    processor.save_pretrained(target)
    after = evaluate(model.float(), processor, test)
    rescale = {
        "factor": options.outlier_factor,
        "fraction": options.outlier_fraction,
        "seed": options.seed,
    }
    (target / "outliers.json").write_text(
        json.dumps({**rescale, "max_logit_change": error, "channels": planted}) + "\n",
        encoding="utf-8",
    )
    logger.info(
        "test accuracy: float32 %s, float16 with outliers %s; rescale error %.1e",
        before["all"],
        after["all"],
        error,
    )
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
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.ERROR, format="%(asctime)s %(message)s"
    )
    distributed.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=options.workers
    )
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
        torch.multiprocessing.spawn(
            _work, (options, output, f"{folder}/meeting_point"), options.workers
        )
    model = LlavaForConditionalGeneration.from_pretrained(
        output / "checkpoint", dtype=torch.float32
    )
    export(model, build_processor(), options, output, (time.perf_counter() - start) / 60)


def _parse(arguments: Sequence[str] | None) -> tuple[TrainOptions, Path]:
    """Read the command line: --output, and one option for each field of `TrainOptions`."""
    parser = argparse.ArgumentParser(
        prog="python -m demo_model.train", description="Train the demo model."
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="new or empty folder that gets data/ and model/"
    )
    for name, default in asdict(TrainOptions()).items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=type(default),
            default=default,
            help=f"default {default}",
        )
    values = vars(parser.parse_args(arguments))
    return TrainOptions(
        **{name: value for name, value in values.items() if name != "output"}
    ), values["output"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `python -m demo_model.train`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options, output = _parse(arguments)
    # half an hour of work, whose files replace others of their names
    train(options, check_output(output, overwrite=False))


if __name__ == "__main__":
    main()
