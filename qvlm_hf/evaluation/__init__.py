"""Accuracy of a model with its interval, and the paired comparison of two models."""

from qvlm_hf.evaluation.evaluate import Comparison, Evaluation, evaluate, format_comparison

__all__ = ["Comparison", "Evaluation", "evaluate", "format_comparison"]
