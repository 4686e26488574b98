"""Asks a model the questions of a data set, and compares it with another question by question.

One teacher-forced forward pass answers a whole batch: the model reads question and expected answer,
and its prediction at every answer position is compared with the token there. Greedy decoding gives
this answer, end of sequence included, exactly if all these predictions agree: up to the first that
does not, it has read the same tokens. So this is the exact-match accuracy of greedy decoding, at a
small part of its cost. (A numerical tie between two tokens is the one exception.)

Left out: free-form answers. A model that says "a cat" where "cat" is expected is wrong here.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from qvlm_hf.calibration.measure.answers import answer_kl, answer_logits
from qvlm_hf.calibration.process.waiting import yield_to_others
from qvlm_hf.calibration.samples import (
    IGNORE_INDEX,
    Batch,
    Processor,
    Sample,
    collate,
    fingerprint,
    longest_sample,
)
from qvlm_hf.calibration.samples.scienceqa import COLUMNS
from qvlm_hf.calibration.values import whole_number
from qvlm_hf.evaluation.metrics import (
    Interval,
    PairedCounts,
    Proportion,
    mcnemar_p_value,
    paired_difference,
)

__all__ = ["Comparison", "Evaluation", "check_answers", "evaluate", "format_comparison"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A model (the second) beside its reference (the first) on the same questions."""

    reference_accuracy: Proportion
    counts: PairedCounts  # "first" is the reference, "second" the model
    p_value: float  # exact two-sided McNemar test
    difference: float  # accuracy of the model minus that of the reference
    difference_interval: Interval  # 95 %
    kl: float  # KL(reference || model) in nats, mean of all answer tokens
    answer_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "reference_accuracy": _proportion_dict(self.reference_accuracy),
            "both_right": self.counts.both_right,
            "only_reference": self.counts.only_first,
            "only_model": self.counts.only_second,
            "both_wrong": self.counts.both_wrong,
            "mcnemar_p_value": self.p_value,
            "difference": self.difference,
            "difference_interval": [self.difference_interval.low, self.difference_interval.high],
            "answer_kl_nats": self.kl,
            "answer_tokens": self.answer_tokens,
        }


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The answers of a model.

    Attributes:
        correct: per question, in input order.
        kinds: kind of each question, None where the data set names none.
        columns: published columns that each question counts in, as ScienceQA's.
        origins: where each question was read.
        data_fingerprint: `fingerprint` of the samples.
        answer_logits: per question [answer tokens, vocabulary] on the CPU, in the model's dtype;
            only with `keep_logits`.
        comparison: with the reference, if one was given.
    """

    correct: tuple[bool, ...]
    kinds: tuple[str | None, ...]
    columns: tuple[tuple[str, ...], ...]
    origins: tuple[str, ...]
    data_fingerprint: str
    answer_logits: tuple[torch.Tensor, ...] | None = None
    comparison: Comparison | None = None

    @property
    def accuracy(self) -> Proportion:
        """Share of questions answered exactly."""
        return Proportion(successes=sum(self.correct), total=len(self.correct))

    @property
    def by_kind(self) -> dict[str, Proportion]:
        """The same for each kind of question, sorted by name; empty if no kinds are known.

        Where the data set has published columns, these in their order instead.
        """
        groups: dict[str, list[bool]] = {name: [] for name in COLUMNS}
        for kind, columns, right in zip(self.kinds, self.columns, self.correct, strict=True):
            for name in columns or ((kind,) if kind is not None else ()):
                groups.setdefault(name, []).append(right)
        published = [name for name in COLUMNS if groups[name]]
        return {
            name: Proportion(successes=sum(groups[name]), total=len(groups[name]))
            for name in (*published, *sorted(groups.keys() - set(COLUMNS)))
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything but the logits, for JSON."""
        return {
            "accuracy": _proportion_dict(self.accuracy),
            "by_kind": {kind: _proportion_dict(share) for kind, share in self.by_kind.items()},
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "data_fingerprint": self.data_fingerprint,
            "questions": [
                {"origin": origin, "kind": kind, "correct": right}
                for origin, kind, right in zip(self.origins, self.kinds, self.correct, strict=True)
            ],
        }


@yield_to_others()
def evaluate(
    model: torch.nn.Module,
    samples: Sequence[Sample],
    processor: Processor,
    *,
    batch_size: int = 16,
    reference: torch.nn.Module | Evaluation | None = None,
    keep_logits: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Measures exact-match accuracy, and compares with a reference if there is one.

    Args:
        model: called with the processor's tensors, returns `.logits`; runs on its own device.
        samples: with answers; of a chat with several turns the last answer counts.
        processor: of both models.
        batch_size: questions per forward pass, which are sorted by length.
        reference: the full-precision model, run on the same batches, or its `Evaluation` on the
            same samples with `keep_logits=True`.
        keep_logits: keep the logits at answer positions, for comparing other models later.
        progress: called with (questions done, questions in all) after every batch.

    Raises:
        ValueError: for no samples, a sample without an answer, a reference that belongs to other
            samples or kept no logits, logits that are not numbers, a sample that the model has no
            positions for, and as `collate` does.
    """
    check_answers(samples)
    batch_size = whole_number("batch_size", batch_size, 1)
    data = fingerprint(samples)
    if isinstance(reference, Evaluation):
        _check_reference(reference, data)
    longest = longest_sample(model)
    order = sorted(range(len(samples)), key=lambda index: _length(samples[index]), reverse=True)
    answers: dict[int, _Answer] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        batch = collate([samples[index] for index in indices], processor, max_tokens=longest)
        found = _batch_answers(model, batch, reference, indices, keep_logits)
        answers |= zip(indices, found, strict=True)
        if progress is not None:
            progress(len(answers), len(samples))
    in_order = [answers[index] for index in range(len(samples))]
    logits = tuple(answer.logits for answer in in_order if answer.logits is not None)
    return Evaluation(
        correct=tuple(answer.correct for answer in in_order),
        kinds=tuple(sample.kind for sample in samples),
        columns=tuple(sample.columns for sample in samples),
        origins=tuple(sample.origin for sample in samples),
        data_fingerprint=data,
        answer_logits=logits if keep_logits else None,
        comparison=None if reference is None else _compare(in_order),
    )


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """One question's result."""

    correct: bool
    tokens: int
    logits: torch.Tensor | None
    reference_correct: bool
    kl: float  # mean over its tokens


def check_answers(samples: Sequence[Sample]) -> None:
    """Raises ValueError for no samples, and for the first without an answer to compare with."""
    if not samples:
        raise ValueError("evaluate got no samples; give at least one")
    for sample in samples:
        if sample.answer is None:
            raise ValueError(
                f"{sample.origin}: has no answer to compare with; add one or leave the sample out"
            )


def _check_reference(reference: Evaluation, data: str) -> None:
    if reference.data_fingerprint != data:
        raise ValueError(
            "the reference was evaluated on other samples; "
            "evaluate both models on the same samples in the same order"
        )
    if reference.answer_logits is None:
        raise ValueError(
            "the reference kept no logits; "
            "evaluate it with keep_logits=True, or pass the reference model itself"
        )


def _length(sample: Sample) -> int:
    """A stand-in for the number of tokens, to put samples of like length side by side."""
    parts = [part for message in sample.messages for part in message["content"]]
    # a picture is hundreds of tokens: more than a question has characters
    return sum(len(part["text"]) if part["type"] == "text" else 2000 for part in parts)


def _batch_answers(
    model: torch.nn.Module,
    batch: Batch,
    reference: torch.nn.Module | Evaluation | None,
    indices: Sequence[int],
    keep_logits: bool,
) -> Iterator[_Answer]:
    logits = answer_logits(model, batch)
    expected: Sequence[torch.Tensor] | None = None
    if isinstance(reference, Evaluation):
        expected = [(reference.answer_logits or ())[index] for index in indices]
    elif reference is not None:
        expected = answer_logits(reference, batch)
    for row, own in enumerate(logits):
        labels = batch.labels[row][batch.labels[row] != IGNORE_INDEX]
        other = own if expected is None else expected[row].to(own.device)
        yield _Answer(
            correct=_is_right(own, labels),
            tokens=len(labels),
            logits=own.cpu() if keep_logits else None,
            reference_correct=_is_right(other, labels),
            kl=0.0 if expected is None else answer_kl(other, own),
        )


def _is_right(logits: torch.Tensor, labels: torch.Tensor) -> bool:
    return torch.equal(logits.argmax(dim=-1).cpu(), labels)


def _compare(answers: Sequence[_Answer]) -> Comparison:
    counts = PairedCounts.of(
        [answer.reference_correct for answer in answers], [answer.correct for answer in answers]
    )
    right = counts.both_right + counts.only_first
    difference, interval = paired_difference(counts)
    tokens = sum(answer.tokens for answer in answers)
    return Comparison(
        reference_accuracy=Proportion(successes=right, total=counts.total),
        counts=counts,
        p_value=mcnemar_p_value(counts),
        difference=difference,
        difference_interval=interval,
        kl=sum(answer.kl * answer.tokens for answer in answers) / tokens,
        answer_tokens=tokens,
    )


def format_comparison(
    evaluation: Evaluation, *, name: str = "quantized", reference: str = "full precision"
) -> list[str]:
    """An evaluation as lines of text: accuracy, kinds and the comparison with the reference.

    `name` and `reference` are what the two models are called.
    """
    lines = [f"{name}: accuracy {_percent(evaluation.accuracy)}"]
    lines += [f"  {kind}: {_percent(share)}" for kind, share in evaluation.by_kind.items()]
    if (found := evaluation.comparison) is None:
        return lines
    counts, ends = found.counts, found.difference_interval
    return [
        f"{reference}: accuracy {_percent(found.reference_accuracy)}",
        *lines,
        f"difference {100 * found.difference:+.1f} points [{100 * ends.low:+.1f}, "
        f"{100 * ends.high:+.1f}], McNemar p = {found.p_value:.3g}",
        f"both right {counts.both_right}, only {reference} {counts.only_first}, "
        f"only {name} {counts.only_second}, both wrong {counts.both_wrong}",
        f"KL({reference} || {name}) {found.kl:.4g} nats per answer token "
        f"({found.answer_tokens} token{'' if found.answer_tokens == 1 else 's'})",
    ]


def _percent(share: Proportion) -> str:
    low, high = 100 * share.interval.low, 100 * share.interval.high
    return f"{100 * share.value:.1f} % [{low:.1f}, {high:.1f}] ({share.successes}/{share.total})"


def _proportion_dict(share: Proportion) -> dict[str, Any]:
    return {
        "value": share.value,
        "interval": [share.interval.low, share.interval.high],
        "correct": share.successes,
        "total": share.total,
    }
