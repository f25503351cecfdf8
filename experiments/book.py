"""Every number of README and results page: a place in the files of the runs.

A place is a group of runs and a path in their files, as the files spell it:

    small/natural end aim test_ood own_code   inside.json
    small/natural last accuracy test_ood      metrics.jsonl, its last line
    small/natural 3000 lens test_ood any      its line of step 3,000
    small/natural config steps                config.json
    small/natural step answer_.9              first evaluation with .9 answered, see MILESTONES

A group is the runs that differ in their seed alone; it is named after its folder. What is found at
a place in all of them is a Cell. A few more places lead to what is no run: those of ALSO.
"""
import csv
from collections import Counter
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

import numpy as np

from analyze import short
from data import BadInput, decode, read_bytes
from experiments.predictions import predict_all
from experiments.runs import NEVER, form_of, get, numbers_of, word_of
from experiments.verdicts import FAILS, HOLDS, OPEN, Missing, judge_all

FEW = 100  # queries; a number that rests on fewer says on how many
PAPER = Path(__file__).with_name("paper.csv")
NO_RUN = "*no run yet*"
NOT_MEASURED = "*not measured*"
FIELDS = ("mean", "least", "most", "n", "chance", "seeds", "without")  # the numbers of a Cell
IN_WORDS = ("with_chance", "each")  # its text and its chance level; all values, seed by seed
ALSO = {"paper": "the numbers of the paper, paper.csv", "paper_world": "see paper_world.py",
        "all": "counts over all runs", "apart": "the exceptions that six sites do not explain",
        "needed": "the cheapest square of the map", "derived": "what predictions need beside these"}


# ---------------------------------------------------------------- one number of a group of runs
@dataclass(frozen=True)
class Cell:
    """What stands at a place in each run of a group: None if it was not measured, NEVER of a step
    that was not reached."""
    values: list
    kind: str = "share"   # or "steps", "ratio", "count", "text"
    n: int = None         # queries that it rests on, of all runs together
    chance: float = None

    @property
    def have(self):
        return [value for value in self.values if value not in (None, NEVER)]

    @property
    def mean(self):
        return float(np.mean(self.have)) if self.have else None

    @property
    def least(self):
        return min(self.have, default=None)

    @property
    def most(self):
        return max(self.have, default=None)

    @property
    def seeds(self):
        return len(self.have)

    @property
    def without(self):
        return len(self.values) - len(self.have)

    def show(self, value):
        """One value as a reader meets it."""
        if value is None:
            return NOT_MEASURED
        if value == NEVER:
            return "never"
        if self.kind == "text":
            return value
        if self.kind == "share":
            return short(value) if value >= 0 else f"-{short(-value)}"
        if self.kind == "ratio":
            return f"{value:.1f}"
        return f"{value:,.0f}" if value >= 1 else f"{value:g}"

    def text(self):
        """"mean (least to most)", and what is lacking."""
        if self.kind == "text":
            return counted(self.have) or NOT_MEASURED
        if not self.have:
            shown = self.show(NEVER if NEVER in self.values else None)
            return shown + (" (0 queries)" if self.n == 0 else "")
        notes = []
        if self.show(self.least) != self.show(self.most):
            notes.append(f"{self.show(self.least)} to {self.show(self.most)}")
        for lacking in (NEVER, None):
            if lacking in self.values:
                shown = self.show(lacking).strip("*")
                notes.append(f"{self.values.count(lacking)} {shown}")
        said = self.show(self.mean)
        if notes:
            said += f" ({'; '.join(notes)})"
        return f"{said}, n = {self.n}" if self.n is not None and self.n < FEW else said

    def field(self, name):
        """One of FIELDS or IN_WORDS, as a reader meets it."""
        if name == "with_chance":
            return f"{self.text()}, chance {self.show(self.chance)}" if self.have else self.text()
        if self.kind == "text" and name != "each":
            raise BadInput(f"template: {self.text()}: are words, and have no {name}")
        if name == "each":
            return ", ".join(self.show(value) for value in self.values)
        value = getattr(self, name)
        if name == "mean" and NEVER in self.values:
            return self.text()  # a mean of those that came would mislead
        is_size = name in ("n", "seeds", "without") and value is not None
        return f"{value:,}" if is_size else self.show(value)


def counted(words):
    """"a (2), b (1)"; "a" alone if all are the same, "" of none."""
    counts = Counter(words)
    if len(counts) <= 1:
        return "".join(counts)
    return ", ".join(f"{word} ({n})" for word, n in counts.most_common())


# ---------------------------------------------------------------- a place
KINDS = {"step": "steps", "film": "steps", "grokfast": "steps", "times_as_late": "ratio",
         "config": "count", "compositions": "count", "counts": "count"}  # by the first word


def cell_at(group, path):
    """The Cell at a path in the numbers of some runs. The queries and the chance level that it
    rests on stand beside it in the file."""
    values = [get(numbers, path) for numbers in group]
    if any(isinstance(value, (dict, list)) for value in values):
        raise BadInput(f"template: {path or 'a group alone'}: is no number")
    sizes = Cell([size_at(numbers, path) for numbers in group]).have
    chance = Cell([chance_at(numbers, path) for numbers in group]).mean
    return Cell(values, kind_of(path, values), sum(sizes) if sizes else None, chance)


def kind_of(path, values):
    """The kind of a Cell."""
    if any(isinstance(value, str) for value in values):
        return "text"
    return "share" if path == "grokfast answer" else KINDS.get(path.split()[0], "share")


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


def chance_at(numbers, path):
    """The chance level of the number at a path, or None."""
    *parents, name = path.split()
    beside = " ".join(parents)
    if name == "nearest_right" or "present" in parents:
        return 1 / numbers["config"]["n_entities"]
    if "accuracy" in parents:  # of a split with new facts
        return get(numbers, f"r2_alone {name}")
    if "aim" in parents and name != "random_code":
        return get(numbers, f"{beside} random_code")
    if "site" in parents and name in ("donor", "code", "code_in_state"):
        return get(numbers, f"{beside} noise")
    return get(numbers, f"{beside} {name}_chance")


# ---------------------------------------------------------------- numbers of many groups
SHARES = (0, 0.25, 0.5, 0.75, 1)  # of OOD facts supervised, in the map of supervision
PHIS = (3, 6, 9, 12, 18)
OOD_SHARES = (0.06, 0.125, 0.25)
HELD_OUT = ((6, 0.06), (6, 0.25), (9, 0.125), (12, 0.125))  # squares that test the rule


def square(hop1, hop2):
    """The group of a square of the map of supervision; three of its corners are regimes."""
    corners = {(1, 0): "first_full", (0, 1): "second_full", (1, 1): "both_full"}
    if (hop1, hop2) in corners:
        return f"small/{corners[hop1, hop2]}"
    return f"map/hop1_{hop1:g}_hop2_{hop2:g}"


def map_of(book, path):
    """The map of supervision, (5, 5): means by hop 1's share and hop 2's; Missing unless every
    square was measured."""
    means = []
    for hop1 in SHARES:
        means.append([book.need(f"{square(hop1, hop2)} {path}").mean for hop2 in SHARES])
    return np.array(means)


def moves_of_map(book):
    """What the predictions say of the map: how far aim and store move at most along the other
    hop's share; by how much the answer exceeds their product where both shares are low; how many
    squares answer .9 with neither both shares at .75 nor hop 2 at 1."""
    aim = map_of(book, "end aim test_ood nearest_right")
    store = map_of(book, "end aim test_ood own_code")
    answer = map_of(book, "end aim test_ood as_is")
    excess = answer - aim * store
    nine_with_less = 0
    for (row, column), share in np.ndenumerate(answer):
        hop1 = SHARES[row]
        hop2 = SHARES[column]
        if share >= 0.9 and min(hop1, hop2) < 0.75 and hop2 < 1:
            nine_with_less += 1
    return {"aim_along_hop2": np.ptp(aim, axis=1).max(),
            "store_along_hop1": np.ptp(store, axis=0).max(),
            "answer_above_product": excess[:2, :2].max(), "nine_with_less": nine_with_less}


def data_square(phi, ood):
    """The group of a square of the map of plain data; one is a square of the other map."""
    return square(0, 0) if (phi, ood) == (18, 0.125) else f"data/phi_{phi}_ood_{ood:g}"


def border_of_data(book):
    """How many of the squares held out a threshold on phi gets wrong, which was fitted on the
    others: halfway between the largest phi that memorises and the smallest with a circuit."""
    phis = {"memorises": [], "circuit": []}
    for phi, ood in product(PHIS, OOD_SHARES):
        for kind in phis:
            if all_are(book, phi, ood, kind) and (phi, ood) not in HELD_OUT:
                phis[kind].append(phi)
    if not phis["memorises"] or not phis["circuit"]:
        raise Missing("a border of the map of plain data")
    border = (max(phis["memorises"]) + min(phis["circuit"])) / 2
    right = [all_are(book, phi, ood, "circuit" if phi > border else "memorises")
             for phi, ood in HELD_OUT]
    return {"wrong_by_border": right.count(False)}


def all_are(book, phi, ood, kind):
    """Whether every run of a square of the map of plain data is of a kind of class."""
    return book.need(f"{data_square(phi, ood)} learnt {kind}").least == 1


def sites_of_trm(book):
    """At how many different sites the bridge is, over the seeds, both hops supervised."""
    return {"sites_of_trm": len(set(book.need("trm/both_full end site name").values))}


def derived_numbers(book):
    """Numbers that predictions need and no file has, without those of which a run is missing."""
    numbers = {}
    for derive in (moves_of_map, border_of_data, sites_of_trm):
        try:
            numbers.update(derive(book))
        except Missing:
            continue
    return numbers


def cheapest_square(book, level=0.9):
    """{"place", "extra", "answer"}: the square of the map that answers nine in ten, with the fewest
    additional compositions; {} while a square is missing."""
    extra = {}
    for hop1, hop2 in product(SHARES, SHARES):
        answer = book.cell(f"{square(hop1, hop2)} last accuracy test_ood")
        if not answer.have:
            return {}
        if answer.mean >= level:
            extra[hop1, hop2] = book.cell(f"{square(hop1, hop2)} compositions extra").mean
    if not extra:
        return {"place": "none", "extra": "never", "answer": f"below {short(level)}"}
    best = min(extra, key=extra.get)
    return {"place": "{:g}, {:g}".format(*best), "extra": f"{extra[best]:,.0f}",
            "answer": book.say(f"{square(*best)} last accuracy test_ood")}


def count_grafts(groups):
    """{"parted", "parted_follow", "alike", "alike_follow"}: how many runs started with the mixing
    of a seed whose form is another, or the same, and how many then have that seed's form."""
    counts = Counter(parted=0, parted_follow=0, alike=0, alike_follow=0)
    for members in groups.values():
        forms = {run.config.seed: form_of(run) for run in members}
        for run in members:
            for graft in run.grafts:
                own = forms[run.config.seed]
                theirs = forms.get(graft["seed"])
                result = word_of(graft)
                if None not in (own, theirs):
                    kind = "parted" if own != theirs else "alike"
                    counts[kind] += 1
                    counts[f"{kind}_follow"] += result == theirs
    return dict(counts)


# ---------------------------------------------------------------- one row a run
RUN_COLUMNS = {  # column: path in the numbers of a run; all but donor_id of OOD questions
    "preset": "config preset", "answer": "end aim test_ood as_is", "n": "end aim test_ood n",
    "seen": "end test_ood seen paper any", "chance": "end test_ood seen paper any_chance",
    "seen_entity": "end test_ood seen state entity best",
    "probe": "end test_ood present state best", "nearest_right": "end aim test_ood nearest_right",
    "own_code": "end aim test_ood own_code", "snapped": "end aim test_ood snapped",
    "donor": "end site test_ood donor", "code": "end site test_ood code",
    "donor_id": "end site test_id donor", "n_swapped": "end site test_ood n",
    "where": "end site where", "site": "end site name", "together": "together redirected",
    "outright": "together outright", "class": "class"}


def rows_of(groups, numbers):
    """One dict a run in an old world that was looked into: its name and the RUN_COLUMNS."""
    rows = []
    for group, members in groups.items():
        for run, its_numbers in zip(members, numbers[group]):
            if "end" in run.inside and not run.config.new_facts:
                row = {"run": run.name}
                for column, path in RUN_COLUMNS.items():
                    row[column] = get(its_numbers, path)
                rows.append(row)
    return rows


def answering_half(rows):
    """The rows of the runs that answer half of the OOD questions or more."""
    return [row for row in rows if row["answer"] is not None and row["answer"] >= 0.5]


def redirected_by(row):
    """Which swap redirects .8 of the right answers of a run: "donor", else "code", else None."""
    for swap in ("donor", "code"):
        if row[swap] is not None and row[swap] >= 0.8:
            return swap
    return None


def exceptions(rows):
    """The runs that answer half or more, of which no swap is known to redirect .8."""
    return [row for row in answering_half(rows) if redirected_by(row) is None]


def count_runs(rows):
    """{what: how many runs} that were opened, answer half, are redirected by a donor, else by
    codes, or by neither; the same of those in which the lens sees less than half; in how many a
    donor redirects .8 of the ID answers at the site, and of the OOD answers, too; and in how many
    exceptions up to six sites together redirect nine tenths of what can be expected of them."""
    half = answering_half(rows)
    swaps = [redirected_by(row) for row in half]
    unseen = [row for row in half if row["seen"] is not None and row["seen"] < 0.5]
    swaps_unseen = [redirected_by(row) for row in unseen]
    id_site = [row for row in half if row["donor_id"] is not None and row["donor_id"] >= 0.8]
    swaps_id_site = [redirected_by(row) for row in id_site]
    return {"opened": len(rows), "half": len(half), "used": swaps.count("donor"),
            "coded": swaps.count("code"), "unseen": len(unseen),
            "unseen_used": swaps_unseen.count("donor"),
            "unseen_coded": swaps_unseen.count("code"), "unexplained": swaps.count(None),
            "id_site": len(id_site), "no_id_site": len(half) - len(id_site),
            "id_site_used": len(id_site) - swaps_id_site.count(None),
            "together": sum((part_of(row) or 0) >= 0.9 for row in exceptions(rows))}


def part_of(row):
    """What six sites together redirect, of a row of runs.csv, by what the model answers outright;
    None if that was not tried."""
    if row["together"] is None or not row["outright"]:
        return None
    return row["together"] / row["outright"]


# ---------------------------------------------------------------- the book itself
class Book:
    """The numbers of all groups, the verdicts on them, and what became of the predictions."""

    def __init__(self, runs):
        self.runs = runs
        self.numbers = {}  # {group: [numbers of a run, ...]}
        for group, members in runs.groups.items():
            self.numbers[group] = [numbers_of(run) for run in members]
        self.rows = rows_of(runs.groups, self.numbers)
        seconds = sum(run.history[-1].get("seconds", 0) for run in chain(*runs.groups.values()))
        for name in ALSO:
            if name in self.numbers:
                raise BadInput(f"{name}: no group of runs can have this name")
        self.numbers["paper"] = [paper_numbers()]
        self.numbers["paper_world"] = runs.paper_world
        self.numbers["all"] = [{"counts": {**count_runs(self.rows), **count_grafts(runs.groups),
                                           "hours": seconds / 3600}}]
        parts = [part_of(row) for row in exceptions(self.rows)]
        self.numbers["apart"] = [{"part": part} for part in parts if part is not None and part < 0.9]
        self.numbers["needed"] = [cheapest_square(self)]
        self.numbers["derived"] = [derived_numbers(self)]
        outcomes, self.predictions = predict_all(self)
        self.verdicts = {**judge_all(self), **outcomes}  # {name: word}
        for name, word in (("hold", HOLDS), ("fail", FAILS), ("open", OPEN)):
            self.numbers["all"][0]["counts"][name] = list(outcomes.values()).count(word)

    def cell(self, place):
        """The Cell at "GROUP PATH"."""
        group, _, path = place.partition(" ")
        return cell_at(self.numbers.get(group, []), path)

    def need(self, place):
        """The Cell at "GROUP PATH"; Missing if nothing was measured."""
        cell = self.cell(place)
        if all(value is None for value in cell.values):
            raise Missing(place)
        return cell

    def say(self, words):
        """The text of the Cell at "GROUP PATH", or of a FIELD of it."""
        place, _, name = words.rpartition(" ")
        group, _, path = words.partition(" ")
        if not group or not path:
            raise BadInput(f"template: {{value:{words}}}: is no place")
        if not self.numbers.get(group):
            return NO_RUN
        whole = self.cell(words)  # first, for a number itself may be called mean or n
        if name in (*FIELDS, *IN_WORDS) and not whole.have:
            return self.cell(place).field(name)
        return whole.text()


def paper_numbers():
    """The numbers of He et al., arXiv 2601.09049, as nested dicts: one run each; steps in
    thousands."""
    numbers = {}
    text = decode(read_bytes(PAPER), PAPER)
    for row in csv.DictReader(text.splitlines()):
        regime, measure = row["path"].split()
        numbers.setdefault(regime, {})[measure] = row["number"]
    return numbers
