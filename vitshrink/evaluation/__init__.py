"""Accuracy of a model, and its fidelity to the dense one, over batches that are seen once."""

from vitshrink.evaluation.masking import Masking
from vitshrink.evaluation.measure import check_labels, evaluate, evaluate_dual, evaluate_each, evaluate_pairs
from vitshrink.evaluation.quality import Evaluation

__all__ = ["Evaluation", "Masking", "check_labels", "evaluate", "evaluate_dual", "evaluate_each", "evaluate_pairs"]
