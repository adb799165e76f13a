"""What an experiment decodes, and how good a text is: pairs of input and reference, and the metrics of the papers."""

from specjax.tasks.quality import METRICS, bleu, rouge2

__all__ = ["METRICS", "bleu", "rouge2"]
