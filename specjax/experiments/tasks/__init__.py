"""The tasks of experiments: their prompts, the metrics of the papers, and a sandbox for programs."""

from specjax.experiments.tasks.quality import METRICS, bleu, rouge2, rouge2_scores

__all__ = ["METRICS", "bleu", "rouge2", "rouge2_scores"]
