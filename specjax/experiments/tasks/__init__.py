"""What an experiment decodes, and how good a text is: prompts, the metrics of the papers, and what runs programs."""

from specjax.experiments.tasks.quality import METRICS, bleu, rouge2, rouge2_scores

__all__ = ["METRICS", "bleu", "rouge2", "rouge2_scores"]
