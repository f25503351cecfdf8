"""Every number of README, results page and pictures: a place in the files of the runs.

A place is a group of runs and a path in their files, as the files spell it:

    small/natural end aim test_ood own_code   inside.json
    small/natural last accuracy test_ood      metrics.jsonl, its last line
    small/natural 3000 lens test_ood any      its line of step 3,000
    small/natural config steps                config.json
    small/natural step answer_.9              first evaluation with .9 answered, see MILESTONES

A group is the runs that differ in their seed alone; it is named after its folder. What stands at a
place in all of them is a Cell. A few more groups are no runs: those of NO_RUNS.
"""
import csv
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from analyze import short
from data import BadInput, decode, read_bytes
from experiments.predictions import predict_all
from experiments.runs import NEVER, get, numbers_of
from experiments.verdicts import FAILS, HOLDS, OPEN, Missing, judge_all

FEW = 100  # queries; a number that rests on fewer says on how many
PAPER = Path(__file__).with_name("paper.csv")
NO_RUN = "*no run yet*"
NOT_MEASURED = "*not measured*"
FIELDS = ("mean", "least", "most", "n", "chance", "seeds")  # the numbers of a Cell
IN_WORDS = ("with_chance", "each")  # its text and its chance level; all values ("–": none)
NO_RUNS = {"paper": "the numbers of the paper, paper.csv", "paper_world": "see paper_world.py",
           "all": "counts over all runs", "map": "how far the map of supervision moves"}


# ---------------------------------------------------------------- one number of a group of runs
@dataclass(frozen=True)
class Cell:
    """What stands at a place in each run of a group: None if it was not measured, NEVER of a step
    that was not reached, which is later than any step."""
    values: list
    n: int = None         # queries that it rests on, of all runs together
    chance: float = None

    @property
    def measured(self):
        """Without those that were not."""
        return [value for value in self.values if value is not None]

    @property
    def seeds(self):
        """How many runs were measured."""
        return len(self.measured)

    @property
    def mean(self):
        """The mean over runs; NEVER if one of them is, None if nothing was measured."""
        return float(np.mean(self.measured)) if self.measured else None

    @property
    def least(self):
        """The least of all runs."""
        return min(self.measured, default=None)

    @property
    def most(self):
        """The most of all runs."""
        return max(self.measured, default=None)

    def text(self):
        """"mean (least–most)", of what came; and what is lacking."""
        if any(isinstance(value, str) for value in self.values):
            return counted(self.measured)
        came = Cell([value for value in self.measured if value != NEVER])
        few = f", n = {self.n}" if self.n is not None and self.n < FEW else ""
        if not came.values:
            return show(self.least) + few
        said = show(came.least)
        notes = []
        if show(came.least) != show(came.most):
            said = show(came.mean)
            notes.append(f"{show(came.least)}–{show(came.most)}")
        for lacking, words in ((NEVER, "never"), (None, "not measured")):
            if lacking in self.values:
                notes.append(f"{self.values.count(lacking)} {words}")
        if notes:
            said += f" ({'; '.join(notes)})"
        return said + few

    def field(self, name):
        """One of FIELDS or IN_WORDS, as a reader meets it."""
        if name == "each":
            return ", ".join("–" if value is None else show(value) for value in self.values)
        if any(isinstance(value, str) for value in self.values):
            raise BadInput(f"template: {self.text()}: are words, and have no {name}")
        if name == "with_chance":
            return f"{self.text()}, chance {show(self.chance)}"
        if name == "mean" and self.mean == NEVER:
            return self.text()
        return show(getattr(self, name))


def show(value):
    """A value as a reader meets it: a share is .14, a ratio 3.8, a step or a count 1,400."""
    if value is None:
        return NOT_MEASURED
    if value == NEVER:
        return "never"
    if isinstance(value, str):
        return value
    if isinstance(value, int) or value >= 100:
        return f"{value:,.0f}"
    return short(value) if value <= 1 else f"{value:.1f}"


def counted(words):
    """"a (2), b (1)"; "a" alone if all are the same."""
    counts = Counter(words)
    if len(counts) == 1:
        return words[0]
    return ", ".join(f"{word} ({n})" for word, n in counts.most_common())


# ---------------------------------------------------------------- a place
def cell_at(group, path):
    """The Cell at a path in the numbers of some runs. The queries and the chance level that it
    rests on stand beside it in the file."""
    values = [get(numbers, path) for numbers in group]
    if any(isinstance(value, (dict, list)) for value in values):
        raise BadInput(f"template: {path or 'a group alone'}: is no number")
    sizes = Cell([size_at(numbers, path) for numbers in group]).measured
    chance = Cell([chance_at(numbers, path) for numbers in group]).mean
    return Cell(values, sum(sizes) if sizes else None, chance)


WITH_OWN_N = ("others_swapped", "same_bridge", "mixed_donors")


def size_at(numbers, path):
    """How many queries the number at a path rests on: n_NAME beside it, or the nearest n."""
    *parents, name = path.split()
    if name in WITH_OWN_N:
        return get(numbers, " ".join([*parents, f"n_{name}"]))
    size = None
    while size is None and parents:
        size = get(numbers, " ".join([*parents, "n"]))
        parents.pop()
    return size


CHANCES = {  # where it is not called NAME_chance
    "as_is": "random_code", "snapped": "random_code", "own_code": "random_code",
    "mean": "random_code", "donor": "noise", "code": "noise", "code_in_state": "noise"}


def chance_at(numbers, path):
    """The chance level of the number at a path, or None."""
    *parents, name = path.split()
    if name == "nearest_right" or "present" in parents:
        return 1 / numbers["config"]["n_entities"]
    if "accuracy" in parents:  # of a split with new facts
        return get(numbers, f"r2_alone {name}")
    beside = CHANCES.get(name, f"{name}_chance")
    return get(numbers, " ".join([*parents, beside]))


# ---------------------------------------------------------------- the map of supervision
SHARES = (0, 0.25, 0.5, 0.75, 1)  # of OOD facts supervised, as hop 1 and as hop 2


def square(hop1, hop2):
    """The group of a square of the map; three of its corners are regimes."""
    corners = {(1, 0): "first_full", (0, 1): "second_full", (1, 1): "both_full"}
    if (hop1, hop2) in corners:
        return f"small/{corners[hop1, hop2]}"
    return f"map/hop1_{hop1:g}_hop2_{hop2:g}"


def supervision_map(book, path):
    """Means by hop 1's share and hop 2's, (5, 5); nan where nothing was measured."""
    means = np.full((len(SHARES), len(SHARES)), np.nan)
    for row, hop1 in enumerate(SHARES):
        for column, hop2 in enumerate(SHARES):
            mean = book.cell(f"{square(hop1, hop2)} {path}").mean
            means[row, column] = np.nan if mean is None else mean
    return means


def moves_of_map(book):
    """How far aim and store move at most along the other hop's share; {} while a square is
    missing."""
    aim = supervision_map(book, "end aim test_ood nearest_right")
    store = supervision_map(book, "end aim test_ood own_code")
    if np.isnan(aim + store).any():
        return {}
    return {"aim_along_hop2": np.ptp(aim, axis=1).max(),
            "store_along_hop1": np.ptp(store, axis=0).max()}


# ---------------------------------------------------------------- one row a run
RUN_COLUMNS = {  # column: path in the numbers of a run; all but donor_id are of OOD questions
    "preset": "config preset", "answer": "end aim test_ood as_is", "n": "end aim test_ood n",
    "seen": "end test_ood seen paper any", "chance": "end test_ood seen paper any_chance",
    "seen_entity": "end test_ood seen state entity best",
    "probe": "end test_ood present state best", "nearest_right": "end aim test_ood nearest_right",
    "own_code": "end aim test_ood own_code", "snapped": "end aim test_ood snapped",
    "donor": "end site test_ood donor", "code": "end site test_ood code",
    "noise": "end site test_ood noise", "donor_id": "end site test_id donor",
    "n_swapped": "end site test_ood n",
    "where": "end site where", "site": "end site name", "together": "together 6 redirected",
    "outright": "together 6 outright", "class": "class"}


def rows_of(groups, numbers):
    """One dict a run in an old world that was looked into: its name, the RUN_COLUMNS, and which
    swap redirects it."""
    rows = []
    for group, members in groups.items():
        for run, its_numbers in zip(members, numbers[group]):
            if "end" in run.inside and not run.config.new_facts:
                row = {"run": run.name}
                for column, path in RUN_COLUMNS.items():
                    row[column] = get(its_numbers, path)
                row["redirected_by"] = redirected_by(row)
                rows.append(row)
    return rows


def redirected_by(row):
    """Which swap redirects .8 of the right OOD answers of a run: "donor", else "code", else
    "none"."""
    for swap in ("donor", "code"):
        if row[swap] is not None and row[swap] >= 0.8:
            return swap
    return "none"


def answering_half(rows):
    """The rows of the runs that answer half of the OOD questions or more."""
    return [row for row in rows if row["answer"] is not None and row["answer"] >= 0.5]


def count_runs(rows):
    """{what: how many runs}: "opened"; of these, "half": that answer half of the OOD questions; of
    these, "unseen": in which the lens sees less than half; "id_site": with a site where a donor
    redirects .8 of the ID answers, "no_id_site": without; of each, redirected by "donor", by "code"
    or by "none"; and of the last, "together": in which six sites redirect nine tenths of what the
    model answers when it is asked outright."""
    half = answering_half(rows)
    kinds = {"half": half, "unseen": [], "id_site": [], "no_id_site": [], "together": []}
    for row in half:
        if row["seen"] is not None and row["seen"] < 0.5:
            kinds["unseen"].append(row)
        has_site = row["donor_id"] is not None and row["donor_id"] >= 0.8
        kinds["id_site" if has_site else "no_id_site"].append(row)
        is_tried = row["together"] is not None and row["redirected_by"] == "none"
        if is_tried and row["together"] >= 0.9 * row["outright"]:
            kinds["together"].append(row)
    counts = {"opened": len(rows)}
    for kind, chosen in kinds.items():
        counts[kind] = len(chosen)
        for swap in ("donor", "code", "none"):
            counts[f"{kind}_{swap}"] = sum(row["redirected_by"] == swap for row in chosen)
    return counts


# ---------------------------------------------------------------- the book itself
class Book:
    """The numbers of all groups, the verdicts on them, and what became of the predictions."""

    def __init__(self, runs):
        self.runs = runs
        self.numbers = {}  # {group: [numbers of a run, ...]}
        for group, members in runs.groups.items():
            if group in NO_RUNS or " " in group:
                raise BadInput(f"{group}: no group of runs can have this name")
            self.numbers[group] = [numbers_of(run) for run in members]
        self.rows = rows_of(runs.groups, self.numbers)
        counts = count_runs(self.rows)
        seconds = sum(run.history[-1].get("seconds", 0) for run in chain(*runs.groups.values()))
        counts["hours"] = round(seconds / 3600)
        self.numbers["paper"] = [paper_numbers()]
        self.numbers["paper_world"] = runs.paper_world
        self.numbers["all"] = [{"counts": counts}]
        self.numbers["map"] = [moves_of_map(self)]
        outcomes, self.predictions = predict_all(self)
        self.verdicts = {**judge_all(self), **outcomes}  # {name: word}
        for name, word in (("hold", HOLDS), ("fail", FAILS), ("open", OPEN)):
            counts[name] = list(outcomes.values()).count(word)

    def cell(self, place):
        """The Cell at "GROUP PATH"."""
        group, _, path = place.partition(" ")
        return cell_at(self.numbers.get(group, []), path)

    def need(self, place):
        """The Cell at "GROUP PATH"; Missing if nothing was measured."""
        cell = self.cell(place)
        if not cell.measured:
            raise Missing(place)
        return cell

    def say(self, words):
        """The text of the Cell at "GROUP PATH", or of a field of it, "GROUP PATH FIELD"."""
        group, _, path = words.partition(" ")
        if not path:
            raise BadInput(f"template: {{value:{words}}}: is no place")
        runs = self.numbers.get(group)
        if not runs:
            return NO_RUN
        outer, _, last = path.rpartition(" ")
        if any(isinstance(get(numbers, outer), dict) for numbers in runs):
            return cell_at(runs, path).text()  # a number itself may be called mean or n
        cell = cell_at(runs, outer)
        if last in (*FIELDS, *IN_WORDS):
            return cell.field(last)
        if cell.measured:
            raise BadInput(f"template: {{value:{words}}}: is no place")
        return NOT_MEASURED

    def fill(self, text):
        """The text with every {value:PLACE} or {value:PLACE FIELD} and {verdict:NAME} filled."""
        def filled(match):
            kind, _, words = match.group(1).partition(":")
            if kind == "value":
                return self.say(words)
            if kind == "verdict" and self.verdicts.get(words):
                return self.verdicts[words]
            raise BadInput(f"template: {match.group(0)}: is no place")

        return re.sub(r"\{([^{}]*)\}", filled, text)


def paper_numbers():
    """The numbers of He et al., arXiv 2601.09049, as nested dicts: one run each; steps in
    thousands."""
    numbers = {}
    text = decode(read_bytes(PAPER), PAPER)
    for row in csv.DictReader(text.splitlines()):
        regime, measure = row["path"].split()
        numbers.setdefault(regime, {})[measure] = row["number"]
    return numbers
