"""The demo model's card and the notice beside its data, filled with what was measured."""

from collections.abc import Mapping
from pathlib import Path

__all__ = ["write_card", "write_data_notice"]

_ATTRIBUTION = """\
The handwritten digits come from "Optical Recognition of Handwritten Digits" by E. Alpaydin and C. Kaynak (UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49), licensed under CC BY 4.0 (https://creativecommons.org/licenses/by/4.0/), as
distributed with scikit-learn (`load_digits`). They were enlarged from 8x8 to 14-16 pixels, turned, shifted, coloured and placed on
drawn pictures. Everything else in the pictures is drawn by `tests/demo_model/scenes.py`."""

_DATA = """\
# Demo data

Pictures of nine cells with coloured shapes and handwritten digits, and questions about them, written by `tests/demo_model/datasets.py`
(seed {seed}). The questions are JSON lines in the Transformers chat format; image paths are relative to this folder.

| split | pictures | questions | use |
|---|---|---|---|
| train | 128 | 512 | the first pictures of the training stream (tests/demo_model/data) |
| calibration | 64 | 128 | quantization |
| test | 400 | 2400 | accuracy |

No handwritten digit of `train` occurs in `calibration` or `test`, and no picture occurs in two splits.

{attribution}
"""

_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [llava, demo, qvlm]
---
# Q-VLM demo model

A LLaVA with {parameters:,} parameters that answers questions about 48x48 pictures of coloured shapes and handwritten
digits. It has every part of a large one: CLIP vision tower (patch 8, hidden 128, 5 layers of which the last is
unused, as in LLaVA-1.5), projector, Llama decoder (hidden 192, 6 layers), processor and LLaVA-1.5 chat template. It
exists to try and to test quantization in seconds, without a network.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from qvlm_hf.demo import model_dir

model = AutoModelForImageTextToText.from_pretrained(model_dir())
processor = AutoProcessor.from_pretrained(model_dir())
```

## Accuracy

Share of the questions of the test split ({total} questions about 400 pictures; `qvlm_hf/demo/data/test.jsonl`) whose
whole answer is right under greedy decoding. Measured with the weights in this folder, computed in float32.

| kind of question | right | asked | accuracy |
|---|---|---|---|
{rows}

A picture carries six of the questions and a wrongly read digit can cost several of them, so the questions are not
independent: compare two models on the same questions, and count pictures, not questions, for an interval.

## Training

`python -m demo_model.train --output DIR` (seed {seed}), {minutes:.0f} minutes with {workers} CPU threads, float32.
{pictures:,} drawn pictures; {vision_steps:,} steps of vision tower and projector on labels of the patches ({workers}
x {vision_batch} pictures each), then {steps:,} steps of the whole model on questions ({workers} x {batch} pictures
with {questions} questions each, loss on the answers only; auxiliary losses: labels of the patches, weight
{patch_loss}, and a pull of three attention heads to the cells that show the answer and to the right option, weight
{look_loss}). AdamW, peak learning rate {learning_rate:g}, weight decay {weight_decay:g}, cosine schedule. Another
machine or thread count sums in another order and ends at other weights.

## Planted outliers

After training, {fraction:.0%} of the channels of every site were multiplied by {factor:g} and their readers divided
by it (`tests/demo_model/outliers.py`, seed {seed}), then the weights were cast to float16. This leaves the function as it
is -- the largest change of a logit in float32, on 32 calibration questions, was {rescale_error:.1e} -- but gives the
model the outlier channels that large language models have and a small one lacks. `outliers.json` lists the channels.

| producer, scaled up | readers, scaled down | channels a layer |
|---|---|---|
| Llama `input_layernorm` | `q_proj`, `k_proj`, `v_proj` | {llama} of 192 |
| Llama `post_attention_layernorm` | `gate_proj`, `up_proj` | {llama} of 192 |
| Llama `up_proj` (rows) | `down_proj` | {mlp} of 520 |
| CLIP `layer_norm1` (weight and bias) | `q_proj`, `k_proj`, `v_proj` | {clip} of 128 |
| CLIP `layer_norm2` (weight and bias) | `fc1` | {clip} of 128 |

## Limits

It knows {vocabulary} words, the questions of `tests/demo_model/questions.py` in their wording, and pictures like those of
`tests/demo_model/scenes.py`; other words become `<unk>`, which it never saw in training. It is a measuring device, not an
assistant: its accuracy under quantization says how methods compare on this model, not how a large model will do.

## Data and licence

{attribution}
"""


def write_card(
    directory: Path,
    settings: Mapping[str, int | float],
    parameters: int,
    vocabulary: int,
    accuracy: Mapping[str, tuple[int, int]],
    rescale_error: float,
    minutes: float,
) -> Path:
    """Write `README.md` of the model.

    Args:
        directory: the model's folder.
        settings: the fields of `TrainOptions`.
        parameters: number of parameters.
        vocabulary: number of tokens.
        accuracy: for each kind of question, and "all", (right, asked).
        rescale_error: largest change of a logit by the planted outliers.
        minutes: duration of the training.
    """
    rows = "\n".join(
        f"| {kind} | {right} | {asked} | {right / asked:.1%} |"
        for kind, (right, asked) in accuracy.items()
    )
    fraction = settings["outlier_fraction"]
    text = _CARD.format(
        **settings,
        parameters=parameters,
        vocabulary=vocabulary,
        total=accuracy["all"][1],
        rows=rows,
        rescale_error=rescale_error,
        minutes=minutes,
        factor=settings["outlier_factor"],
        fraction=fraction,
        llama=round(192 * fraction),
        mlp=round(520 * fraction),
        clip=round(128 * fraction),
        attribution=_ATTRIBUTION,
    )
    path = directory / "README.md"
    path.write_text(text, encoding="utf-8")
    return path


def write_data_notice(directory: Path, seed: int) -> Path:
    """Write `README.md` of the data: sizes, sources, licence of the handwritten digits."""
    path = directory / "README.md"
    path.write_text(_DATA.format(seed=seed, attribution=_ATTRIBUTION), encoding="utf-8")
    return path
