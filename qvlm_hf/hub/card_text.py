"""The sentences of a model card: each is made from what was recorded, and says plainly what was not."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvlm_hf.calibration.report import CalibrationReport
from qvlm_hf.format.scheme import parse_scheme
from qvlm_hf.hub.card_tables import (
    code,
    counted,
    full_precision_names,
    percent,
    shown_bytes,
    shown_versions,
)
from qvlm_hf.hub.contents import Contents

__all__ = [
    "Card",
    "accuracy",
    "bench_command",
    "blocks",
    "evaluate_command",
    "full_precision",
    "limits",
    "method",
    "names",
    "reference",
    "repeat",
    "self_check",
    "speed",
    "summary",
    "vision",
    "weights",
]

_PAPER = "[arXiv 2410.08119](https://arxiv.org/abs/2410.08119)"
_ROUNDING = {
    "nearest": "to nearest",
    "gptq": "with second-order compensation of the error (GPTQ)",
    "learned": "by gradient descent, block by block",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """What the texts are about.

    Attributes:
        contents: of the directory.
        name: of the model.
        source: what `from_pretrained` takes: a Hub id, or the directory's own name.
        base: Hub id of the full-precision model, or None.
        base_name: that, or the name of the directory it was read from, or None.
        picture: file name of the picture, or None.
        command_language, command: how to make the model again.
    """

    contents: Contents
    name: str
    source: str
    base: str | None
    base_name: str | None
    picture: str | None
    command_language: str
    command: str

    @property
    def report(self) -> CalibrationReport:
        """Of the quantization."""
        return self.contents.report

    @property
    def calibrated(self) -> bool:
        """Whether there were calibration samples."""
        return "dataset" in self.report.provenance

    @property
    def partial(self) -> bool:
        """Whether a calibration's report was not kept."""
        return self.calibrated and not self.report.sites


def summary(card: Card) -> str:
    """The first lines: what it is, from what, how small."""
    weight_bits, activation_bits = parse_scheme(card.contents.scheme)
    inputs = (
        f"{card.contents.dtype} activations"
        if activation_bits == 16
        else f"{activation_bits}-bit activations"
    )
    what = f"A `{card.contents.family}` model" if card.base_name is None else _base(card)
    full, packed = card.contents.bfloat16_bytes, card.contents.stored_bytes
    return (
        f"{what}, quantized to {weight_bits}-bit weights and {inputs} ({card.contents.scheme}) "
        f"with qvlm_hf, {_origin(card)}. "
        f"It takes {shown_bytes(packed)}, {full / packed:.2f} times less than in bfloat16."
    )


def weights(card: Card) -> str:
    """The grid of the weights, and their average width where that was chosen."""
    settings, report = card.report.settings, card.report
    where = "row" if settings["group_size"] == -1 else f"{settings['group_size']} inputs of a row"
    zero = "" if settings["symmetric"] else " and an integer zero point"
    text = f"Weights are integers with a bfloat16 scale{zero} per {where}, rounded {_ROUNDING[settings['weight_rounding']]}."
    if report.average_weight_bits is not None:
        text += f" A quantized weight has {report.average_weight_bits:.2f} bits on average, scales not counted"
        budget = settings["precision_budget"]
        text += (
            "."
            if budget is None
            else f"; the budget was {budget:g}, spent where it lowers the change of the answers "
            f"most."
        )
    return text


def full_precision(card: Card) -> str:
    """What was left alone."""
    names = full_precision_names(card.contents)
    text = (
        f"Linear modules in {card.contents.dtype}: {', '.join(names)}."
        if names
        else "Every linear module is quantized."
    )
    if asked := card.report.settings["modules_to_not_convert"]:
        text += f" `modules_to_not_convert` was {', '.join(f'`{code(name)}`' for name in asked)}."
    if card.report.dead:
        dead = ", ".join(f"`{name}`" for name in card.report.dead)
        text += f" No answer depends on {dead} (the model reads an earlier hidden state); rounded without a search."
    return text


def method(card: Card) -> str:
    """How bits and ranges were chosen."""
    settings, report = card.report.settings, card.report
    floating = parse_scheme(card.contents.scheme)[1] == 16
    if not card.calibrated:
        ranges = "" if floating else "; the ranges of activations are found at run time"
        return f"Every weight was rounded to nearest, without data{ranges}."
    steps = {
        "a Hadamard rotation folded into the weights": settings["rotation"] == "hadamard",
        "scales moved from input channels into the weights (equalization)": settings["equalization"]
        and not floating,
        "errors weighted by the importance of tokens": settings["token_importance"],
    }
    used = [step for step, there in steps.items() if there]
    goal = (
        "weights are rounded block by block, a block being"
        if floating
        else "ranges of activations are searched jointly in blocks of"
    )
    text = f"Calibrated with Q-VLM ({_PAPER}): {goal} layers that depend on each other."
    if used:
        text += f" Besides: {'; '.join(used)}."
    if report.sensitivities and not report.lifts:
        text += (
            f" The guard measured {len(report.sensitivities)} groups of modules and raised none."
        )
    if not settings["guard"]:
        text += " The guard against modules that few bits break was off."
    if card.partial:
        text += " The calibration report was not kept with the model: what stands here is what `config.json` knows."
    return text


def self_check(card: Card) -> str:
    """What was compared right after packing."""
    check: Any = card.report.self_check
    seen = (
        "that calibration had not seen"
        if check.held_out
        else "of the calibration itself, which flatters it"
    )
    return (
        f"Self-check after packing, on {counted(check.samples, 'sample')} {seen}: the most likely "
        f"token is that of full precision at "
        f"{percent(check.agreement)} of {check.answer_tokens} answer positions, KL divergence "
        f"{check.kl:.4f} nats."
    )


def blocks(card: Card) -> str:
    """How layers became blocks."""
    found = [block for segment in card.report.segments for block in segment.blocks]
    layers, depth = (
        sum(len(block.layers) for block in found),
        card.report.settings["max_block_depth"],
    )
    return (
        f"{counted(layers, 'layer')} in {counted(len(found), 'block')} of at most {depth}. D(k, "
        f"k+1) is the conditional entropy of a "
        "layer's output given the one before it; a block goes on while its mean is above the "
        "threshold."
    )


def vision(card: Card) -> str:
    """What the visual encoder optimisation did."""
    found: Any = card.report.vision
    kept = "kept" if found.kept else "not kept, because it was no better"
    return (
        f"Visual encoder optimisation, {found.epochs} epochs: error on held-out calibration "
        f"samples {found.error_before:.4f} before, "
        f"{found.error_after:.4f} after; {kept}."
    )


def reference(card: Card) -> str:
    """The name of full precision in the table of accuracies."""
    return f"`{code((card.report.evaluation or {}).get('reference') or card.base_name)}` in full precision"


def accuracy(card: Card) -> str:
    """How the accuracies were measured, and how the two models differ."""
    found: Mapping[str, Any] = card.report.evaluation or {}
    text = (
        "Share of the answers that greedy decoding gets exactly right, word for word, on "
        f"{counted(found['questions'], 'question')} of `{code(found['dataset'])}` (seed "
        f"{found['seed']}, SHA-256 `{found['sha256']}`). "
        f"Measured on {found['device']}, {counted(found['threads'], 'thread')}, with "
        f"{shown_versions(found['versions'])}."
    )
    pair = found["comparison"]
    if pair is None:
        return f"{text} Full precision was not measured beside it."
    low, high = (100 * end for end in pair["difference_interval"])
    return (
        f"{text}\n\nBoth models answered the same questions: difference "
        f"{100 * pair['difference']:+.1f} points (95 % interval {low:+.1f} "
        f"to {high:+.1f}), McNemar p = {pair['mcnemar_p_value']:.3g}; both right "
        f"{pair['both_right']}, only full precision right "
        f"{pair['only_reference']}, only this model right {pair['only_model']}, both wrong "
        f"{pair['both_wrong']}. KL divergence from full "
        f"precision {pair['answer_kl_nats']:.4f} nats per answer token."
    )


def speed(card: Card) -> str:
    """Where and how the times were measured."""
    found: Mapping[str, Any] = card.report.benchmark or {}
    settings, rows = found["settings"], found["rows"]
    threads = f", {counted(found['threads'], 'thread')}" if found["device_type"] == "cpu" else ""
    turns = "every way in turns" if found["together"] else "one way after the other"
    compiled = ", compiled, with a static cache" if settings["compile"] else ""
    text = (
        f"Measured on {found['device']}{threads}, with {shown_versions(found['versions'])}: median "
        f"of {settings['rounds']} rounds, {turns}"
        f"{compiled}; {settings['prompt_tokens']} prompt tokens, "
        f"{counted(settings['images'], 'picture')}, {settings['new_tokens']} new "
        f"tokens. Speedup: time of `{rows[0]['way']}` in the same run over time of the row; "
        f"spread: interquartile range over median. "
        "Another machine gives other ratios."
    )
    missing = [f"{row['way']} ({row['error']})" for row in rows if row["error"] is not None]
    return f"{text} Not measured: {'; '.join(missing)}." if missing else text


def names(card: Card) -> str:
    """What the names in the commands that measure stand for."""
    return "" if card.base_name is not None else " BASE stands for the full-precision model."


def evaluate_command(card: Card) -> str:
    """What would measure the accuracy."""
    return shlex.join(
        [
            "qvlm",
            "evaluate",
            card.name,
            "--dataset",
            "test.jsonl",
            "--against",
            card.base_name or "BASE",
            "--record",
        ]
    )


def bench_command(card: Card) -> str:
    """What would measure the speed."""
    against = [] if card.base_name is None else ["--against", card.base_name]
    return shlex.join(["qvlm", "bench", card.name, *against, "--record"])


def repeat(card: Card) -> str:
    """What the command needs."""
    found = card.report.provenance
    needs = []
    if card.base_name is None:
        needs.append("BASE stands for the full-precision model, which was in memory")
    if "dataset=samples" in card.command:
        needs.append(
            "`samples` are the calibration samples, which were in memory; their SHA-256 is above"
        )
    elif card.calibrated and found["dataset"] != "synthetic":
        needs.append("The data set is named as it was; its SHA-256 is above")
    text = f"Equal versions{' and threads' if card.calibrated else ''} on the same kind of machine give equal bytes"
    return ". ".join([text, *needs]) + "."


def limits(card: Card) -> list[str]:
    """What was not checked, and what the format cannot do."""
    report = card.report
    if not card.calibrated:
        unchecked = (
            "Rounded without data, so nothing was compared with full precision while it was made."
        )
        return [] if report.evaluation else [unchecked]
    samples = counted(report.provenance["samples"], "sample")
    lines = [f"Calibrated on {samples}: inputs unlike them may lose more than is measured here."]
    if report.self_check is None and not card.partial:
        lines.append(
            "No calibration sample had an answer, so the result was not compared with full "
            "precision."
        )
    return lines


def _base(card: Card) -> str:
    if card.base is None:
        return f"`{code(card.base_name)}`"
    revision = card.report.provenance.get("base_model_revision")
    return f"[{card.base}](https://huggingface.co/{card.base})" + (
        "" if revision is None else f" (revision `{revision}`)"
    )


def _origin(card: Card) -> str:
    modules = sum(module.scheme is not None for module in card.contents.modules)
    found = card.report.provenance
    if not card.calibrated:
        return f"rounded without data: {counted(modules, 'linear module')}"
    return f"calibrated on {counted(found['samples'], 'sample')} of `{code(found['dataset'])}`: {counted(modules, 'linear module')}"
