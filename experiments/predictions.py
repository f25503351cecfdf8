"""What became of the predictions, which PREDICTIONS.md held before the runs.

predictions.txt has them in a form that can be judged: under the name and the words of a prediction
stand the comparisons that must all hold, each "at least LEVEL | NUMBER" or "at most LEVEL |
NUMBER". A NUMBER is a place in the book, "TABLE KEY ... FIELD", or the difference of two, "PLACE -
PLACE"; a comparison that begins with "or" may hold in place of the one above it. Where
PREDICTIONS.md gives no level ("at chance", "does not mend"), we chose it here, afterwards.
"""
import math
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from experiments.verdicts import FAILS, HOLDS, OPEN, SHARES, Missing

TEXT = Path(__file__).with_name("predictions.txt")


@dataclass(frozen=True)
class Comparison:
    """What a number must be."""
    is_alternative: bool  # to the comparison above it
    rule: str             # "at least" or "at most"
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
        condition, number = line.split(" | ")
        *words, level = condition.split()
        comparisons.append(Comparison(words[0] == "or", " ".join(words[-2:]), float(level),
                                      " ".join(number.split())))
    return predictions


def number_of(book, words):
    """The number at "TABLE KEY ... FIELD", or the difference of two; None if one is not there, or
    if neither of the two ever came."""
    numbers = []
    for place in words.split(" - "):
        where, _, name = place.rpartition(" ")
        try:
            numbers.append(field_of(book.need(where), name))
        except Missing:
            return None
    if None in numbers:
        return None
    number = numbers[0] - numbers[1] if len(numbers) == 2 else numbers[0]
    return None if math.isnan(number) else number


def field_of(cell, name):
    """A field of a Cell; infinite if it is a step, of runs in one of which that never came."""
    if name in ("mean", "least", "most"):
        cell = cell.never_last()
    return getattr(cell, name)


def judge(comparisons, numbers):
    """HOLDS; FAILS if one comparison does; OPEN if none does and a number is not there."""
    results = []
    for comparison, number in zip(comparisons, numbers):
        is_so = None
        if number is not None:
            is_so = number <= comparison.level
            if comparison.rule == "at least":
                is_so = number >= comparison.level
        if comparison.is_alternative:
            either = (results.pop(), is_so)
            is_so = True in either or (None if None in either else False)
        results.append(is_so)
    if False in results:
        return FAILS
    return OPEN if None in results else HOLDS


def predict_all(book):
    """({name: outcome}, the rows of predictions.csv, one a comparison)."""
    outcomes = {}
    rows = []
    for name, (said, comparisons) in read_predictions(TEXT.read_text(encoding="utf-8")).items():
        numbers = [number_of(book, comparison.number) for comparison in comparisons]
        outcomes[name] = judge(comparisons, numbers)
        for comparison, number in zip(comparisons, numbers):
            rule = f"or {comparison.rule}" if comparison.is_alternative else comparison.rule
            rows.append([name, said, comparison.number, number, rule, comparison.level,
                         outcomes[name]])
    return outcomes, rows


# ---------------------------------------------------------------- numbers that no table has
def grid(book, measure):
    """{(hop1, hop2): mean} over the map; Missing unless every cell was measured."""
    return {(hop1, hop2): book.need(f"map {hop1:g} {hop2:g} {measure}").mean
            for hop1, hop2 in product(SHARES, SHARES)}


def moves(values, along):
    """How far {(hop1, hop2): value} moves at most along hop 1 (0) or hop 2 (1)."""
    ranges = []
    for fixed in SHARES:
        line = [value for place, value in values.items() if place[1 - along] == fixed]
        ranges.append(max(line) - min(line))
    return max(ranges)


def aim_along_hop2(book):
    return moves(grid(book, "aim"), along=1)


def store_along_hop1(book):
    return moves(grid(book, "store"), along=0)


def answer_above_product(book):
    """By how much the answer exceeds the product of aim and store, at most, where both shares are
    low."""
    excess = []
    for hop1, hop2 in product((0, 0.25), (0, 0.25)):
        aim, store, answer = [book.need(f"map {hop1:g} {hop2:g} {measure}").mean
                              for measure in ("aim", "store", "answer")]
        excess.append(answer - aim * store)
    return max(excess)


def nine_with_less(book):
    """How many squares answer .9 with neither both shares at .75 nor hop 2 at 1."""
    against = [place for place, answer in grid(book, "answer").items()
               if answer >= 0.9 and min(place) < 0.75 and place[1] < 1]
    return len(against)


def sites_of_trm(book):
    """At how many different sites the bridge is, over the seeds, both hops supervised."""
    sites = {row["site"] for row in book.rows if row["run"].startswith("trm/both_full/")}
    if not sites:
        raise Missing("trm/both_full")
    return len(sites)


def dials_not_redirected(book):
    """In how many runs of two dials that answer half a donor redirects less than .8."""
    count = 0
    for group in ("dial/answer_only", "dial/attention"):
        rows = [row for row in book.rows if row["run"].startswith(f"{group}/")]
        if not rows:
            raise Missing(group)
        for row in rows:
            is_redirected = row["donor"] is not None and row["donor"] >= 0.8
            count += row["answer"] >= 0.5 and not is_redirected
    return count


PHIS = (3, 6, 9, 12, 18)
OOD_SHARES = (0.06, 0.125, 0.25)
HELD_OUT = ((6, 0.06), (6, 0.25), (9, 0.125), (12, 0.125))  # squares that test the rule


def wrong_by_border(book):
    """How many of the squares held out a threshold on phi gets wrong, which was fitted on the
    others: halfway between the largest phi that memorises and the smallest with a circuit."""
    phis = {"memorises": [], "circuit": []}
    for phi, ood in product(PHIS, OOD_SHARES):
        for name in phis:
            if all_are(book, phi, ood, name) and (phi, ood) not in HELD_OUT:
                phis[name].append(phi)
    if not phis["memorises"] or not phis["circuit"]:
        raise Missing("a border of the map of plain data")
    border = (max(phis["memorises"]) + min(phis["circuit"])) / 2
    right = [all_are(book, phi, ood, "circuit" if phi > border else "memorises")
             for phi, ood in HELD_OUT]
    return right.count(False)


def all_are(book, phi, ood, name):
    """Whether every run of a square of the map of plain data is of a class."""
    return book.need(f"classes {phi} {ood:g} {name}").least == 1


DERIVED = (aim_along_hop2, store_along_hop1, answer_above_product, nine_with_less, sites_of_trm,
           dials_not_redirected, wrong_by_border)


def derived_numbers(book):
    """{name: number} of DERIVED, without those of which a run is missing."""
    numbers = {}
    for derive in DERIVED:
        try:
            numbers[derive.__name__] = derive(book)
        except Missing:
            continue
    return numbers
