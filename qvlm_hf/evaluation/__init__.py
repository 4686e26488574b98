"""Accuracy and language of a model with intervals, and the paired comparison of two models."""

from qvlm_hf.evaluation.evaluate import (
    Comparison,
    Evaluation,
    check_answers,
    evaluate,
    format_comparison,
)
from qvlm_hf.evaluation.text import (
    TextEvaluation,
    check_text,
    evaluate_text,
    format_text,
    read_text,
)

__all__ = [
    "Comparison",
    "Evaluation",
    "TextEvaluation",
    "check_answers",
    "check_text",
    "evaluate",
    "evaluate_text",
    "format_comparison",
    "format_text",
    "read_text",
]
