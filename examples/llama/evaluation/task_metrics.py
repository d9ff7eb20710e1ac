"""Scores of a model's answers, from 0 to 100, as TRACE takes them.

Each is a function of answers, expected answers and questions, lists of as many texts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from rapidfuzz import fuzz
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

Metric = Callable[[Sequence[str], Sequence[str], Sequence[str]], float]


def exact_match(
    answers: Sequence[str], expected: Sequence[str], questions: Sequence[str]
) -> float:
    """How many are the expected text, but for white space around it."""
    return _mean(a.strip() == e.strip() for a, e in zip(answers, expected, strict=True))


def first_letter(
    answers: Sequence[str], expected: Sequence[str], questions: Sequence[str]
) -> float:
    """How many begin with the expected letter, the choice of several answers."""
    pairs = zip(answers, expected, strict=True)
    return _mean(a.strip()[:1] == e.strip()[:1] != "" for a, e in pairs)


def rouge_l(
    answers: Sequence[str], expected: Sequence[str], questions: Sequence[str]
) -> float:
    """ROUGE-L's F measure, by rouge_score, without stemming."""
    scorer = RougeScorer(["rougeL"])
    pairs = zip(answers, expected, strict=True)
    return _mean(scorer.score(e, a)["rougeL"].fmeasure for a, e in pairs)


def edit_similarity(
    answers: Sequence[str], expected: Sequence[str], questions: Sequence[str]
) -> float:
    """The normalized similarity of characters, by rapidfuzz's ratio."""
    pairs = zip(answers, expected, strict=True)
    return _mean(fuzz.ratio(a.strip(), e.strip()) / 100 for a, e in pairs)


def sari(
    answers: Sequence[str], expected: Sequence[str], questions: Sequence[str]
) -> float:
    """SARI of simplifications (Xu et al. 2016) of the questions.

    In lower case and sacrebleu's tokenization, with one reference each.
    """
    triples = zip(answers, expected, questions, strict=True)
    return _mean(sari_of(answer, [text], source) for answer, text, source in triples)


def sari_of(answer: str, references: Sequence[str], source: str) -> float:
    """SARI of one simplification, from 0 to 1.

    The mean, over n-grams of 1 to 4 words, of the F measures of what was kept and what
    was added and of the precision of what was deleted, where 0 of 0 is 1. As in Hugging
    Face's evaluate, whose script is on the hub alone.
    """
    tokenize = Tokenizer13a()
    texts = [tokenize(text.lower()).split() for text in (source, answer, *references)]
    scores = []
    for n in range(1, 5):
        s, c, *rs = (
            Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            for words in texts
        )
        r = sum(rs, Counter())
        many = {gram: len(rs) * count for gram, count in s.items()}
        s, added, wanted = Counter(many), c.keys() - s.keys(), r.keys() - s.keys()
        c = Counter({gram: len(rs) * count for gram, count in c.items()})
        kept, keep = s & c, s & r
        good = kept & r
        scores.append(_f(_shares(good, kept), _ratio(good.total(), keep.total())))
        deleted = s - c
        scores.append(_shares(deleted - r, deleted))
        both = len(added & wanted)
        scores.append(_f(_ratio(both, len(added)), _ratio(both, len(wanted))))
    return sum(scores) / len(scores)


METRICS: dict[str, Metric] = {
    "exact_match": exact_match,
    "first_letter": first_letter,
    "rouge_l": rouge_l,
    "edit_similarity": edit_similarity,
    "sari": sari,
}


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return 100 * sum(numbers) / len(numbers)


def _shares(good: Counter, counts: Counter) -> float:
    """The mean share of each n-gram's count that is good."""
    shares = sum(good[gram] / counts[gram] for gram in good)
    return _ratio(shares, len(counts))


def _ratio(a: float, b: float) -> float:
    return a / b if b else 1.0


def _f(precision: float, recall: float) -> float:
    total = precision + recall
    return 2 * precision * recall / total if total else 0.0
