"""The self-check: does the packed model still answer as the full-precision one did?"""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from qvlm_hf.calibration.measure.answers import answer_kl, answer_logits
from qvlm_hf.calibration.process import ranks
from qvlm_hf.calibration.process.scratch import keep
from qvlm_hf.calibration.record.report import SelfCheck
from qvlm_hf.calibration.samples import Batch

__all__ = ["AnswerComparison", "collapse_warning", "head_warning"]

# On the demo model sound W4A4 agreed on 0.98 of the answer tokens; W4A4 that its dynamic ranges
# broke agreed on 0.52.
_COLLAPSED_AGREEMENT = 0.75
# What a quantized output head may cost.
_HEAD_AGREEMENT = 0.005
_HEAD_KL = 0.001


class AnswerComparison:
    """The full-precision answers to some samples, to compare later answers with.

    Args:
        model: in full precision.
        batches: with labels; every process compares its share of them.
        held_out: whether calibration does not see these samples.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Batch], *, held_out: bool) -> None:
        self._model, self._held_out = model, held_out
        self._batches = batches[ranks.rank() :: ranks.world_size()]
        self._reference = [keep(logits.cpu()) for logits in self._answers()]

    def divergences(self) -> list[float]:
        """The mean KL (nats a token) of every own sample with an answer, as the model is now."""
        return [answer_kl(full, logits) for full, logits in self._compared()]

    def measure(self) -> SelfCheck | None:
        """Compares the model as it is now; None if no sample has an answer."""
        agree = tokens = 0
        divergence = 0.0
        for full, logits in self._compared():
            tokens += len(full)
            agree += int((full.argmax(-1) == logits.argmax(-1)).sum())
            divergence += answer_kl(full, logits) * len(full)
        samples, agree, tokens = ranks.all_reduce_numbers(len(self._reference), agree, tokens)
        (divergence,) = ranks.all_reduce_numbers(divergence)
        if not tokens:
            return None
        return SelfCheck(
            samples=samples,
            held_out=self._held_out,
            answer_tokens=tokens,
            agreement=agree / tokens,
            kl=divergence / tokens,
        )

    def _compared(self) -> Iterator[tuple[Tensor, Tensor]]:
        for full, logits in zip(self._reference, self._answers(), strict=True):
            if len(full):
                yield full.to(logits.device), logits

    def _answers(self) -> Iterator[Tensor]:
        for batch in self._batches:
            yield from answer_logits(self._model, batch)


def collapse_warning(check: SelfCheck | None, *, ranges_chosen: bool) -> str | None:
    """One line if the model no longer answers like itself, else None.

    `ranges_chosen`: the user set `activation_granularity`, so that leaving it out may help.
    """
    if check is None or check.agreement >= _COLLAPSED_AGREEMENT:
        return None
    remedies = "use more bits, or calibrate with data like yours."
    if ranges_chosen:
        remedies = (
            "use more bits, calibrate with data like yours, or leave out activation_granularity=."
        )
    return (
        f"the quantized model agrees with full precision on only {100 * check.agreement:.0f} % of "
        f"{check.answer_tokens} answer tokens "
        f"(KL {check.kl:.2g}): {remedies}"
    )


def head_warning(before: SelfCheck | None, after: SelfCheck | None) -> str | None:
    """One line if quantizing the output head as well cost answers, else None."""
    if before is None or after is None:
        return None
    if after.agreement >= before.agreement - _HEAD_AGREEMENT and after.kl <= before.kl + _HEAD_KL:
        return None
    return (
        f"lm_head_bits: the quantized output head moved the answers (agreement "
        f"{before.agreement:.1%} to {after.agreement:.1%}, "
        f"KL {before.kl:.2g} to {after.kl:.2g}): the head stays in full precision."
    )
