"""What became of the predictions, which PREDICTIONS.md held before the runs.

predictions.txt has them in a form that can be judged: under the name and the words of a prediction
stand the comparisons that must all hold, each "at least LEVEL | NUMBER" or "at most LEVEL |
NUMBER". A NUMBER is "PLACE FIELD", see book.py, or reckoned from such, "A - B" or "A - B * C";
steps that never came are later than any step. Where PREDICTIONS.md gives no level ("at chance",
"does not mend"), we chose it here, afterwards.
"""
import math
from dataclasses import dataclass
from pathlib import Path

from experiments.verdicts import FAILS, HOLDS, OPEN, Missing

TEXT = Path(__file__).with_name("predictions.txt")


@dataclass(frozen=True)
class Comparison:
    """What a number must be."""
    rule: str  # "at least" or "at most"
    level: float
    number: str


def read_predictions(text):
    """{name: (what was said, [Comparison, ...])} of the lines of predictions.txt."""
    predictions = {}
    for line in text.splitlines():
        if line.startswith("#") or not line:
            continue
        if not line.startswith(" "):
            name, _, said = line.partition(": ")
            comparisons = []
            predictions[name] = (said, comparisons)
            continue
        condition, number = line.strip().split(" | ")
        rule, _, level = condition.rpartition(" ")
        comparisons.append(Comparison(rule, float(level), number))
    return predictions


def number_of(book, words):
    """The value of "A", "A - B" or "A - B * C", each "PLACE FIELD"; None if one is not there, or if
    neither of two steps ever came."""
    terms = []
    for term in words.split(" - "):
        factors = [value_of(book, place) for place in term.split(" * ")]
        if None in factors:
            return None
        terms.append(math.prod(factors))
    number = terms[0] - sum(terms[1:])
    return None if math.isnan(number) else number


def value_of(book, words):
    """The number at "PLACE FIELD", or None; "different" is how many values the runs have."""
    place, _, name = words.rpartition(" ")
    try:
        cell = book.need(place)
    except Missing:
        return None
    return len(set(cell.measured)) if name == "different" else getattr(cell, name)


def judge(comparisons, numbers):
    """HOLDS; FAILS if one comparison does; OPEN if none does and a number is not there."""
    for comparison, number in zip(comparisons, numbers):
        if number is None:
            continue
        is_enough = number >= comparison.level
        if comparison.rule == "at most":
            is_enough = number <= comparison.level
        if not is_enough:
            return FAILS
    return OPEN if None in numbers else HOLDS


def predict_all(book):
    """({name: outcome}, the rows of predictions.csv, one a comparison)."""
    outcomes = {}
    rows = []
    for name, (said, comparisons) in read_predictions(TEXT.read_text(encoding="utf-8")).items():
        numbers = [number_of(book, comparison.number) for comparison in comparisons]
        outcomes[name] = judge(comparisons, numbers)
        for comparison, number in zip(comparisons, numbers):
            rows.append([name, said, comparison.number, number, comparison.rule, comparison.level,
                         outcomes[name]])
    return outcomes, rows
