"""How good is a model, and how sure can one be of it: exact-match accuracy with intervals, and paired comparisons of two models."""

from qvlm_hf.evaluation.evaluate import Comparison, Evaluation, evaluate, format_comparison
from qvlm_hf.evaluation.metrics import (
    Interval,
    PairedCounts,
    Proportion,
    mcnemar_p_value,
    paired_difference,
    wilson_interval,
)

__all__ = [
    "Comparison",
    "Evaluation",
    "Interval",
    "PairedCounts",
    "Proportion",
    "evaluate",
    "format_comparison",
    "mcnemar_p_value",
    "paired_difference",
    "wilson_interval",
]
