"""Metrics of the quality of texts, by the libraries that the field uses. Both scales run from 0 to 100."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU (Papineni et al. 2002) as sacrebleu computes it, tokenisation 13a, case-sensitive."""
    try:
        import sacrebleu
    except ImportError as error:
        raise ImportError("BLEU is computed by sacrebleu: pip install sacrebleu.") from error
    return float(sacrebleu.corpus_bleu(list(texts), [list(references)]).score)


def rouge2_scores(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """F1 of shared bigrams (ROUGE-2, Lin 2004) of each text, words stemmed, as rouge-score computes it."""
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ImportError("ROUGE is computed by rouge-score: pip install rouge-score.") from error
    scorer = rouge_scorer.RougeScorer(["rouge2"], use_stemmer=True)
    pairs = zip(references, texts, strict=True)
    return [100.0 * scorer.score(reference, text)["rouge2"].fmeasure for reference, text in pairs]


def rouge2(texts: Sequence[str], references: Sequence[str]) -> float:
    """The mean of `rouge2_scores`."""
    scores = rouge2_scores(texts, references)
    return sum(scores) / len(scores)


METRICS: Mapping[str, Callable[[Sequence[str], Sequence[str]], float]] = MappingProxyType(
    {"bleu": bleu, "rouge2": rouge2}
)
"""The metrics by their names in configs."""
