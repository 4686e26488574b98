"""How many questions of a split the model answers exactly, counted without generating."""

import json
from collections import defaultdict
from pathlib import Path

import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from demo_model.questions import KINDS

__all__ = ["evaluate"]


@torch.no_grad()
def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    dataset: Path,
    limit: int | None = None,
    batch_size: int = 60,
) -> dict[str, tuple[int, int]]:
    """Count the questions of a split that greedy decoding would answer exactly.

    One teacher-forced forward is enough: greedy decoding produces the answer if and only if the
    most likely token is the right one at every position of the answer, `</s>` included.

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


def _answered(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    chats: list[list[dict]],
    folder: Path,
) -> list[bool]:
    """Tell for each chat whether its answer is what greedy decoding would produce."""
    pictures = [Image.open(folder / chat[0]["content"][0]["path"]) for chat in chats]
    texts = [processor.apply_chat_template(chat) for chat in chats]
    inputs = processor(
        images=pictures, text=texts, padding=True, padding_side="right", return_tensors="pt"
    )
    answers = [
        processor.tokenizer(
            chat[1]["content"][0]["text"] + "</s>", add_special_tokens=False
        ).input_ids
        for chat in chats
    ]
    logits = model(**inputs.to(model.dtype)).logits
    right = []
    for row, answer in enumerate(answers):
        end = int(inputs["attention_mask"][row].sum())
        predicted = logits[row, end - len(answer) - 1 : end - 1].argmax(-1)
        right.append(predicted.tolist() == answer)
    return right
