"""The self-check: does the packed model still answer as the full-precision one did?"""

from collections.abc import Sequence

from torch import Tensor, nn

from qvlm_hf.calibration.measure.answers import answer_kl, answer_logits
from qvlm_hf.calibration.report import SelfCheck
from qvlm_hf.calibration.samples import Batch

__all__ = ["collapse_warning", "compare_answers", "head_warning"]

# On the demo model sound W4A4 agreed on 0.98 of the answer tokens; W4A4 that its dynamic ranges
# broke agreed on 0.52.
_COLLAPSED_AGREEMENT = 0.75
# What a quantized output head may cost.
_HEAD_AGREEMENT = 0.005
_HEAD_KL = 0.001


def compare_answers(
    model: nn.Module, batches: Sequence[Batch], reference: Sequence[Tensor], *, held_out: bool
) -> SelfCheck | None:
    """Runs the packed model on the batches whose full-precision answers are known.

    Args:
        model: after packing.
        batches: with labels.
        reference: full-precision logits per sample [answer tokens, vocabulary], in the order of the
            batches.
        held_out: whether calibration did not see these samples.

    Returns:
        None if no sample has an answer.
    """
    samples = agree = tokens = 0
    divergence = 0.0
    expected = iter(reference)
    for batch in batches:
        for logits in answer_logits(model, batch):
            full = next(expected).to(logits.device)
            samples += 1
            if full.shape[0]:
                tokens += full.shape[0]
                agree += int((full.argmax(-1) == logits.argmax(-1)).sum())
                divergence += answer_kl(full, logits) * full.shape[0]
    if not tokens:
        return None
    return SelfCheck(
        samples=samples,
        held_out=held_out,
        answer_tokens=tokens,
        agreement=agree / tokens,
        kl=divergence / tokens,
    )


def collapse_warning(check: SelfCheck | None) -> str | None:
    """One line if the model no longer answers like itself, else None."""
    if check is None or check.agreement >= _COLLAPSED_AGREEMENT:
        return None
    return (
        f"the quantized model agrees with full precision on only {100 * check.agreement:.0f} % of "
        f"{check.answer_tokens} answer tokens "
        f"(KL {check.kl:.2g}): "
        "use more bits, calibrate with data like yours, or leave out activation_granularity=."
    )


def head_warning(before: SelfCheck | None, after: SelfCheck | None) -> str | None:
    """One line if quantizing the output head as well cost answers, else None.

    Args:
        before: the check with the head in full precision.
        after: the check with the quantized head; None where no sample has an answer to compare.
    """
    if before is None or after is None:
        return None
    if after.agreement >= before.agreement - _HEAD_AGREEMENT and after.kl <= before.kl + _HEAD_KL:
        return None
    return (
        f"lm_head_bits: the quantized output head moved the answers (agreement "
        f"{before.agreement:.1%} to {after.agreement:.1%}, "
        f"KL {before.kl:.2g} to {after.kl:.2g}): the head stays in full precision."
    )
