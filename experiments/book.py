"""Every number of the results page: the runs below a folder, read into a Book.

A Book is {table: {keys: Cell}}; a Cell is one number of a group of runs, a value a run. A group is
the runs that differ in their seed alone, and is named after its folder: small/natural.
"""
import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from itertools import chain, product
from pathlib import Path

import numpy as np

from analyze import COMPOSITIONS, short
from data import BadInput, SPLITS, change_facts, compositions, make_splits, make_world, queries
from experiments.measure import NEW, r2_alone, read_json
from experiments.predictions import derived_numbers, predict_all
from experiments.verdicts import FAILS, HOLDS, OPEN, SHARES, Missing, judge_all
from grok import PRESETS, WEIGHTS, Config, first_step, read_run

FEW = 100  # queries; a number that rests on fewer says on how many
NO_RUN = "*no run yet*"
NOT_MEASURED = "*not measured*"
NEVER = ("steps", "ratio")  # kinds of Cells in which None is "never"
FIELDS = ("mean", "least", "most", "n", "chance", "seeds", "without")  # the numbers of a Cell
IN_WORDS = ("with_chance", "each")  # its text and its chance level; all values, seed by seed

# The numbers of He et al., arXiv 2601.09049: one run each; steps in thousands.
PAPER = {  # (start or regime, what): (number, where it stands)
    ("natural", "fit"): ("106k", "Figure 2"),
    ("natural", "lens_.5"): ("219k", "Figure 2"),
    ("natural", "answer_.5"): ("396k", "Figure 2"),
    ("natural", "answer_.9"): ("never (.86 at most)", "Figure 2"),
    ("natural", "test_ood"): (".68", "Figure 2, its last point"),
    ("both_full", "answer_.9"): ("37k", "Figure 2"),
    ("both_full", "answer_at_37k"): (".92", "Figure 2"),
    ("both_full", "seen_at_37k"): (".003", "Figure 2"),
    ("second_full", "test_ood"): (".97", "Figure 2, its last point"),
    ("second_full", "seen"): (".65", "Figure 2, its last point"),
    ("natural", "new_old"): ("1.0", "Figure 4, 16 queries"),
    ("natural", "old_new"): ("0", "Figure 4, 18 queries"),
    ("natural", "new_new"): (".003", "Figure 4, 3,000 queries"),
    ("both_full", "new_old"): ("1.0", "Figure 4, 26 queries"),
    ("second_full", "new_old"): (".33", "Figure 4, 33 queries"),
    ("both_half", "new_old"): (".53", "Figure 4, 36 queries"),
    ("scratch", "new_old"): (".31", "Figure 4, its control, 16 queries"),
}


# ---------------------------------------------------------------- reading runs
@dataclass(frozen=True)
class Run:
    """A finished run."""
    name: str       # its folder under ROOT: small/natural/seed0
    folder: Path
    config: Config
    history: list   # see Trainer.measure
    inside: dict    # inside.json, see experiments/measure.py; {} if it was not measured
    film: list      # film.json; [] if it was not filmed
    grafts: list    # graft.json, see experiments/graft.py; [] if there was none
    grokfast: dict  # grokfast.json, see experiments/grokfast.py; {} if there was none
    together: list  # together.json, see experiments/together.py; [] if there was none


@dataclass
class Runs:
    """All runs under ROOT."""
    groups: dict = field(default_factory=dict)    # {small/natural: [Run, ...]}, one a seed
    left_out: list = field(default_factory=list)  # "small/natural/seed2: is not finished ..."


def read_runs(root):
    """The Runs in every folder under ROOT with a config.json, however deep. A run that is not
    finished, is damaged or does not belong to its group is left out by name."""
    runs = Runs()
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"root = {root}: is no folder")
    for path in sorted(root.rglob("config.json")):
        name = path.parent.relative_to(root).as_posix()
        group = runs.groups.get(group_of(name), [])
        try:
            run = read_one(path.parent, name)
            check_group(run, group)
        except BadInput as error:
            reason = str(error).removeprefix(f"{path.parent}: ")
            runs.left_out.append(f"{name}: {reason}".replace(f"{root}/", ""))
            continue
        runs.groups[group_of(name)] = [*group, run]
    if not runs.groups and not runs.left_out:
        raise BadInput(f"{root}: holds no run")
    return runs


def group_of(name):
    """small/natural of small/natural/seed0; a folder without a seed is a group of its own."""
    folder, _, last = name.rpartition("/")
    return folder if folder and re.fullmatch("seed[0-9]+", last) else name


def read_one(folder, name):
    """The Run in a folder."""
    config, history = read_run(folder)
    return Run(name, folder, config, history,
               inside=read_json(folder / "inside.json", dict),
               film=read_json(folder / "film.json", list),
               grafts=read_json(folder / "graft.json", list),
               grokfast=read_json(folder / "grokfast.json", dict),
               together=read_json(folder / "together.json", list))


def check_group(run, group):
    """Refuse a run that differs from its group in more than its seed, or in nothing."""
    for other in group:
        if run.config.seed == other.config.seed:
            raise BadInput(f"has the seed of {other.name}")
        for name, value in asdict(run.config).items():
            theirs = getattr(other.config, name)
            if name not in ("seed", "device") and value != theirs:
                raise BadInput(f"{name} = {value}, but {other.name} has {theirs}")


# ---------------------------------------------------------------- one number of a group of runs
@dataclass(frozen=True)
class Cell:
    """What came out in each run of a group; None is "never" of steps, else "not measured"."""
    values: list
    kind: str = "share"   # or "steps", "ratio", "count", "text"
    n: int = None         # queries that it rests on, of all runs together
    chance: float = None

    @property
    def have(self):
        return [value for value in self.values if value is not None]

    @property
    def mean(self):
        return float(np.mean(self.have)) if self.have else None

    @property
    def least(self):
        return min(self.have, default=None)

    @property
    def most(self):
        return max(self.have, default=None)

    def never_last(self):
        """The same Cell in which what never came is later than any step."""
        values = [math.inf if value is None else value for value in self.values]
        return replace(self, values=values) if self.kind in NEVER else self

    @property
    def seeds(self):
        return len(self.have)

    @property
    def without(self):
        return len(self.values) - len(self.have)

    def show(self, value):
        """One value as a reader meets it."""
        if value is None:
            return "never" if self.kind in NEVER else NOT_MEASURED
        if self.kind == "text":
            return value
        if self.kind == "share":
            return short(value) if value >= 0 else f"-{short(-value)}"
        return f"{value:.1f}" if self.kind == "ratio" else f"{value:,.0f}"

    def text(self):
        """"mean (least to most)", and what is lacking."""
        if not self.values:
            return NO_RUN
        if self.kind == "text":
            return self.values[0]
        if not self.have:
            return self.show(None) + (" (0 queries)" if self.n == 0 else "")
        notes = []
        if self.show(self.least) != self.show(self.most):
            notes.append(f"{self.show(self.least)} to {self.show(self.most)}")
        if self.without:
            notes.append(f"{self.without} {self.show(None).strip('*')}")
        said = self.show(self.mean)
        if notes:
            said += f" ({'; '.join(notes)})"
        return f"{said}, n = {self.n}" if self.n is not None and self.n < FEW else said

    def field(self, name):
        """One of FIELDS or IN_WORDS, as a reader meets it."""
        if name == "text" or name == "with_chance" and not self.have:
            return self.text()
        if name == "with_chance":
            return f"{self.text()}, chance {self.show(self.chance)}"
        if name == "each":
            return ", ".join(self.show(value) for value in self.values)
        value = getattr(self, name)
        is_size = name in ("n", "seeds", "without") and value is not None
        return f"{value:,}" if is_size else self.show(value)


NOTHING = Cell([])


# ---------------------------------------------------------------- the book: what training gave
MILESTONES = {  # measure: (split, level, which rate of the lens)
    "train_.5": ("train_inferred", 0.5, None),
    "train_.9": ("train_inferred", 0.9, None),
    "train_.95": ("train_inferred", 0.95, None),
    "fit": ("train_inferred", 0.99, None),
    "id_.5": ("test_id", 0.5, None),
    "answer_.5": ("test_ood", 0.5, None),
    "answer_.9": ("test_ood", 0.9, None),
    "answer_.95": ("test_ood", 0.95, None),
    "lens_.5": ("test_ood", 0.5, "any"),
    "lens_.9": ("test_ood", 0.9, "any"),
    "lens_.95": ("test_ood", 0.95, "any")}


def in_groups(groups, find):
    """{(group, *keys): Cell} of what find(runs of a group), {keys: Cell}, finds in each group."""
    cells = {}
    for group, members in groups.items():
        for keys, cell in find(members).items():
            cells[(group, *keys)] = cell
    return cells


def training_cells(members):
    """{(measure,): Cell}: steps of the first evaluation at which something holds, and shares at the
    end."""
    cells = {}
    for name, (split, level, lens) in MILESTONES.items():
        steps = [first_step(run.history, level, split, lens) for run in members]
        cells[name,] = Cell(steps, "steps")
    for level in (".5", ".9"):
        pairs = zip(cells[f"answer_{level}",].values, cells["fit",].values)
        ratios = [step / fit if step and fit else None for step, fit in pairs]
        cells[f"ratio_{level}",] = Cell(ratios, "ratio")
    cells["steps",] = Cell([members[0].config.steps], "count")
    cells["entities",] = Cell([members[0].config.n_entities], "count")
    cells["seconds",] = Cell([run.history[-1].get("seconds") for run in members], "count")
    for name, cell in last_shares(members).items():
        cells[name,] = cell
    return cells


def last_shares(members):
    """{split: Cell of what is right at the end, split_lens: of what the paper's lens sees}, and
    test_ood_at_STEP, test_ood_lens_at_STEP, the same after these steps."""
    cells = {}
    for split in SPLITS:
        cells[split] = Cell([run.history[-1]["accuracy"].get(split) for run in members])
    for split in COMPOSITIONS:
        end_rates = [run.history[-1]["lens"].get(split, {}) for run in members]
        cells[f"{split}_lens"] = lens_cell(end_rates)
    for step in (2500, 3000, 5000):
        lines = [line_at(run, step) for run in members]
        cells[f"test_ood_at_{step}"] = Cell([get(line, "accuracy test_ood") for line in lines])
        step_rates = [get(line, "lens test_ood") or {} for line in lines]
        cells[f"test_ood_lens_at_{step}"] = lens_cell(step_rates)
    return cells


def lens_cell(rates):
    """The Cell of what the paper's lens sees, from the rates of `grok.evaluate` of some runs."""
    chance = Cell([rate.get("any_chance") for rate in rates]).mean
    return Cell([rate.get("any") for rate in rates], chance=chance)


def line_at(run, step):
    """The evaluation after this step; None if there was none."""
    for line in run.history:
        if line["step"] == step:
            return line
    return None


def share_at(run, step, split):
    """What was right of a split at the evaluation after this step; None if there was none."""
    return get(line_at(run, step), f"accuracy {split}")


def composition_cells(members):
    """{(measure,): Cell}: how many training compositions a regime has in all, and how many more
    than the natural one."""
    config = members[0].config
    if not members[0].name.startswith(("small/", "long/", "map/")) or config.facts:
        return {}
    world = make_world(config)
    n_train = len(make_splits(world, config)["train_inferred"].h)
    n_natural = round(config.phi * np.count_nonzero(~world.is_ood))
    return {("all",): Cell([n_train], "count"), ("extra",): Cell([n_train - n_natural], "count")}


FILMED = {"fit": ("fitted", 0.99), "aim_.5": ("nearest_right", 0.5), "store_.5": ("own_code", 0.5),
          "answer_.5": ("as_is", 0.5)}


def film_cells(members):
    """{(measure,): Cell} of filmed runs: the first frame in which something is .5 or more of the
    OOD questions, and the training .99."""
    films = [history_of(run.film) for run in members if run.film]
    cells = {}
    for name, (measure, level) in FILMED.items():
        steps = [first_step(film, level, measure) for film in films]
        cells[name,] = Cell(steps, "steps")
    return cells if films else {}


def history_of(film):
    """Its frames as lines of a history, see Trainer.measure."""
    history = []
    for frame in film:
        shares = {"fitted": frame["fitted"], **frame["test_ood"]}
        history.append({"step": frame["step"], "accuracy": shares})
    return history


# ---------------------------------------------------------------- the book: what is inside
# {table: {measure: (path, path of n, path of the chance level)}} in inside.json at the fit or end
INSIDE = {
    "aim_and_store": {
        "as_is": ("aim SPLIT as_is", "aim SPLIT n", "aim SPLIT random_code"),
        "nearest_right": ("aim SPLIT nearest_right", "aim SPLIT n", "1/E"),
        "own_code": ("aim SPLIT own_code", "aim SPLIT n", "aim SPLIT random_code"),
        "snapped": ("aim SPLIT snapped", "aim SPLIT n", "aim SPLIT random_code"),
        "random_code": ("aim SPLIT random_code", "aim SPLIT n", ""),
        "mean_code": ("aim SPLIT mean", "aim SPLIT n", "aim SPLIT random_code")},
    "swaps": {
        "donor": ("site SPLIT donor", "site SPLIT n", "site SPLIT noise"),
        "code": ("site SPLIT code", "site SPLIT n", "site SPLIT noise"),
        "code_in_state": ("site SPLIT code_in_state", "site SPLIT n", "site SPLIT noise"),
        "noise": ("site SPLIT noise", "site SPLIT n", ""),
        "others_swapped": ("site SPLIT others_swapped", "site SPLIT n_others_swapped", ""),
        "same_bridge": ("site SPLIT same_bridge", "site SPLIT n_same_bridge", ""),
        "mixed_donors": ("site SPLIT mixed_donors", "site SPLIT n_mixed_donors", "")},
    "seen": {
        "paper": ("SPLIT seen paper any", "SPLIT seen n", "SPLIT seen paper any_chance"),
        "best": ("SPLIT seen state bridge best", "SPLIT seen n",
                 "SPLIT seen state bridge best_chance"),
        "entity": ("SPLIT seen state entity best", "SPLIT seen n",
                   "SPLIT seen state entity best_chance"),
        "last_entity": ("SPLIT seen state last_entity best", "SPLIT seen n",
                        "SPLIT seen state last_entity best_chance"),
        "mixed": ("SPLIT seen mixed bridge best", "SPLIT seen n",
                  "SPLIT seen mixed bridge best_chance"),
        "mixed_entity": ("SPLIT seen mixed entity best", "SPLIT seen n",
                         "SPLIT seen mixed entity best_chance"),
        "probe": ("SPLIT present state best", "SPLIT present n", "1/E"),
        "mixed_probe": ("SPLIT present mixed best", "SPLIT present n", "1/E")},
}
SPLITS_OF = {"aim_and_store": COMPOSITIONS, "swaps": ("test_id", "test_ood"),
             "seen": ("test_id", "test_ood")}


def get(tree, path):
    """What stands at a path of words in nested dicts, or None."""
    for word in path.split():
        if not isinstance(tree, dict) or tree.get(word) is None:
            return None
        tree = tree[word]
    return tree


def inside_cells(members, table):
    """{(weights, split, measure): Cell} of one table of INSIDE."""
    cells = {}
    for weights, split, measure in product(WEIGHTS, SPLITS_OF[table], INSIDE[table]):
        cells[weights, split, measure] = inside_cell(members, table, weights, split, measure)
    return cells


def inside_cell(members, table, weights, split, measure):
    """The Cell of one number of inside.json."""
    value, n, chance = [path.replace("SPLIT", split) for path in INSIDE[table][measure]]
    stages = [run.inside.get(weights) for run in members]
    sizes = [get(stage, n) for stage in stages if get(stage, n) is not None]
    if chance == "1/E":
        level = 1 / members[0].config.n_entities
    else:
        level = Cell([get(stage, chance) for stage in stages]).mean if chance else None
    values = [get(stage, value) for stage in stages]
    return Cell(values, n=sum(sizes) if sizes else None, chance=level)


def site_cells(members):
    """{(weights,): Cell}: where the bridge is used, in words; in how many runs, if they differ."""
    cells = {}
    for weights in WEIGHTS:
        sites = [get(run.inside, f"{weights} site") for run in members]
        names = [name_of_site(site) for site in sites if site]
        cells[weights,] = Cell([counted(names) or NOT_MEASURED], "text")
    return cells


def counted(words):
    """"a (2), b (1)"; "a" alone if all are the same."""
    counts = Counter(words)
    if len(counts) == 1:
        return words[0]
    return ", ".join(f"{word} ({n})" for word, n in counts.most_common())


def name_of_site(site):
    """Its name; of a run in which no site redirects half of the answers, "spread"."""
    return site["name"] if site["where"] in ("one site", "several passes") else "spread"


def form_cells(members):
    """{(): Cell}: whether the state of ID questions shows the bridge first or last of the entities
    at the end, seed by seed, in words."""
    words = [form_of(run) for run in members]
    return {} if None in words else {(): Cell([", ".join(words)], "text")}


def form_of(run):
    """"first" or "last"; None if the states show neither, or were not looked into."""
    states = get(run.inside, "end test_id seen state")
    return word_of({"first": get(states, "entity best"), "last": get(states, "last_entity best")})


def word_of(shares):
    """The one of "first" and "last" that holds in half of the questions, or None."""
    for word in ("first", "last"):
        if shares[word] is not None and shares[word] >= 0.5:
            return word
    return None


def graft_cells(members):
    """{(measure,): Cell}: of the runs whose mixing of positions started from another seed's first
    weights, how many have that seed's form in the end, and how many keep their own."""
    forms = {run.config.seed: form_of(run) for run in members}
    follows = {"parted": [], "alike": []}  # whether the form is that of the grafted seed
    for run in members:
        for graft in run.grafts:
            own = forms.get(run.config.seed)
            theirs = forms.get(graft["seed"])
            result = word_of(graft)
            if None not in (own, theirs, result):
                follows["parted" if own != theirs else "alike"].append(result == theirs)
    cells = {}
    for name, trials in follows.items():
        if trials:
            cells[name,] = Cell([len(trials)], "count")
            cells[f"{name}_follow",] = Cell([sum(trials)], "count")
    return cells


def grokfast_cells(members):
    """{(measure,): Cell}: the runs trained anew with their slow gradients amplified."""
    lines = [run.grokfast for run in members if run.grokfast]
    cells = {}
    for name, kind in (("fit", "steps"), ("nine_in_ten", "steps"), ("answer", "share")):
        cells[name,] = Cell([line[name] for line in lines], kind)
    return cells if lines else {}


MAP_CORNERS = ("small/first_full", "small/second_full", "small/both_full")


MAP_MEASURES = {  # measure of the map: (table, measure) of OOD questions at the end
    "answer": ("aim_and_store", "as_is"), "aim": ("aim_and_store", "nearest_right"),
    "store": ("aim_and_store", "own_code"), "snapped": ("aim_and_store", "snapped"),
    "seen": ("seen", "paper"), "used": ("swaps", "donor")}


def map_cells(groups, book):
    """{(hop1, hop2, measure): Cell}: the map of supervision."""
    cells = {}
    for group, members in groups.items():
        if is_of_map(group):
            place = (f"{members[0].config.hop1:g}", f"{members[0].config.hop2:g}")
            for name, (table, measure) in MAP_MEASURES.items():
                cells[(*place, name)] = book[table][group, "end", "test_ood", measure]
            cells[(*place, "trained_answer")] = book["training"][group, "test_ood"]
            cells[(*place, "extra")] = book["compositions"][group, "extra"]
    return cells


def is_of_map(group):
    """Whether a group is a cell of the map of supervision: three corners are regimes of small."""
    return group.startswith("map/") or group in MAP_CORNERS


def needed_cells(cells):
    """{(which hops, measure): Cell}: where the map, {(hop1, hop2, measure): Cell}, answers nine in
    ten with the fewest extra compositions, and how many these are."""
    shares = [f"{share:g}" for share in SHARES]
    routes = {"hop1": [(share, "0") for share in shares],
              "hop2": [("0", share) for share in shares],
              "alike": [(share, share) for share in shares],
              "any": list(product(shares, shares))}
    result = {}
    for route, places in routes.items():
        answers = {place: cells.get((*place, "trained_answer"), NOTHING) for place in places}
        if not all(cell.have for cell in answers.values()):
            continue
        extra = {place: cells[(*place, "extra")].mean for place in places if
                 answers[place].mean >= 0.9}
        if extra:
            best = min(extra, key=extra.get)
            result[route, "place"] = Cell([", ".join(best)], "text")
            result[route, "extra"] = cells[(*best, "extra")]
            result[route, "answer"] = answers[best]
        else:
            result[route, "place"] = Cell(["none"], "text")
            result[route, "extra"] = Cell([None], "steps")
            result[route, "answer"] = answers[places[-1]]
    return result


def class_of(run):
    """What a run has learnt, by intervention: a circuit is one only where a swap redirects .5."""
    if first_step(run.history, 0.99, "train_inferred") is None:
        return "does not fit"
    answers = run.history[-1]["accuracy"]
    redirects = {}
    for split in ("test_id", "test_ood"):
        share = get(run.inside, f"end site {split} donor")
        redirects[split] = share is not None and share >= 0.5
    if answers["test_ood"] >= 0.5 and redirects["test_ood"]:
        return "a full circuit"
    if answers["test_id"] >= 0.5 and redirects["test_id"]:
        return "an ID circuit"
    if answers["test_id"] < 0.5 and not redirects["test_id"]:
        return "memorises"
    return "between these"


CLASSES = {"memorises": "memorises", "circuit": "circuit", "for_all": "full circuit"}


def data_cells(groups):
    """The map of plain data: {(phi, share of OOD facts): Cell} of its classes and answers in words,
    and {(phi, share of OOD facts, class): Cell}, 1 for a run of the class, else 0."""
    words = {}
    counts = {}
    for group, members in groups.items():
        if not group.startswith("data/") and group != "map/hop1_0_hop2_0":
            continue
        place = (f"{members[0].config.phi:g}", f"{members[0].config.ood_fraction:g}")
        classes = [class_of(run) for run in members if "end" in run.inside]
        shares = last_shares(members)
        answers = [shares[split].field("mean") for split in ("test_id", "test_ood")]
        said = f"{counted(classes) or NOT_MEASURED}: {', '.join(answers)}"
        words[place] = Cell([said], "text")
        for name, part in CLASSES.items():
            counts[(*place, name)] = Cell([float(part in kind) for kind in classes])
    return words, counts


# ---------------------------------------------------------------- the book: new facts
def new_facts_cells(members):
    """{(when, split): Cell}: what is right after 500 and 2,000 steps and at the end, and what r2
    alone gives."""
    cells = {}
    last = members[0].history[-1]
    for split in last["accuracy"]:
        if split in NEW:
            guesses = [get(run.inside, f"r2_alone {split}") for run in members]
            cells["r2_alone", split] = Cell(guesses)
    for when, step in (("500", 500), ("2000", 2000), ("end", last["step"])):
        for split in last["accuracy"]:
            guess = cells.get(("r2_alone", split), NOTHING)
            shares = [share_at(run, step, split) for run in members]
            cells[when, split] = Cell(shares, chance=guess.mean)
    cells["end", "steps"] = Cell([last["step"]], "count")
    return cells


def new_facts_aim_cells(members):
    """{(split, measure): Cell}: aim and store in compositions with new facts, at the end."""
    cells = {}
    for split, measure in product(NEW, INSIDE["aim_and_store"]):
        if split in members[0].history[-1]["accuracy"]:
            cells[split, measure] = inside_cell(members, "aim_and_store", "end", split, measure)
    return cells


@lru_cache(maxsize=None)
def r2_alone_cells():
    """{("paper", "code" or "text"): Cell}: what r2 alone gives of new + old in the paper's world,
    five draws. Its code keeps 220 old facts and all compositions with one of them, its text 8,000
    facts (Finding 3)."""
    config = Config(**{**PRESETS["paper"][2], "new_facts": 2000})
    code = []
    text = []
    for data_seed in range(5):
        rng = np.random.default_rng(data_seed)
        world = change_facts(make_world(replace(config, data_seed=data_seed)), config, rng)
        code.append(r2_alone_of_kept(world, config.phi, 220, n_hops=1, rng=rng))
        text.append(r2_alone_of_kept(world, config.phi, 8000, n_hops=2, rng=rng))
    return {("paper", "code"): Cell(code), ("paper", "text"): Cell(text)}


def r2_alone_of_kept(world, phi, n_kept, n_hops, rng):
    """The share of new + old that r2 alone gives, in a World with new facts of which n_kept of the
    old ones remain; and of phi training compositions an old fact those remain in which n_hops or
    more of the hops do."""
    old_facts = np.flatnonzero(~world.is_new)
    is_kept = np.zeros(len(world.facts), bool)
    is_kept[rng.permutation(old_facts)[:n_kept]] = True
    first, second = compositions(world)
    old = np.flatnonzero(~world.is_new[first] & ~world.is_new[second])
    trained = rng.permutation(old)[:round(phi * len(old_facts))]
    kept_hops = is_kept[first[trained]].astype(int) + is_kept[second[trained]]
    remain = trained[kept_hops >= n_hops]
    new_old = np.flatnonzero(world.is_new[first] & is_kept[second])
    splits = {"train_inferred": queries(world, first[remain], second[remain]),
              "new_old": queries(world, first[new_old], second[new_old])}
    return r2_alone(world, splits)["new_old"]


# ---------------------------------------------------------------- the book: one row a run
RUN_COLUMNS = {  # column: path in inside.json at the end; all but donor_id of OOD questions
    "answer": "aim test_ood as_is", "n": "aim test_ood n",
    "seen": "test_ood seen paper any", "chance": "test_ood seen paper any_chance",
    "seen_entity": "test_ood seen state entity best",
    "probe": "test_ood present state best", "nearest_right": "aim test_ood nearest_right",
    "own_code": "aim test_ood own_code", "snapped": "aim test_ood snapped",
    "donor": "site test_ood donor", "code": "site test_ood code", "donor_id": "site test_id donor",
    "n_swapped": "site test_ood n", "where": "site where", "site": "site name"}


def rows_of_runs(groups):
    """One dict a run that was looked into: its name, preset, the RUN_COLUMNS, what four sites
    together redirect (None if that was not tried), its class."""
    rows = []
    for run in chain(*groups.values()):
        if "end" in run.inside:
            row = {"run": run.name, "preset": run.config.preset}
            for column, path in RUN_COLUMNS.items():
                row[column] = get(run.inside["end"], path)
            row["together"] = run.together[-1]["mixed_donors"] if run.together else None
            row["class"] = class_of(run)
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


def count_cells(runs, rows):
    """{(what,): Cell} of how many runs were opened, answer half, are redirected by a donor, else by
    codes, or by neither; the same of those in which the lens sees less than half; in how many a
    donor redirects .8 of the ID answers at the site, and of the OOD answers, too; what four sites
    together redirect where none does; and how many hours all runs trained, on one core each."""
    half = answering_half(rows)
    swaps = [redirected_by(row) for row in half]
    unseen = [row for row in half if row["seen"] is not None and row["seen"] < 0.5]
    swaps_unseen = [redirected_by(row) for row in unseen]
    id_site = [row for row in half if row["donor_id"] is not None and row["donor_id"] >= 0.8]
    swaps_id_site = [redirected_by(row) for row in id_site]
    together = [row["together"] for row in exceptions(rows) if row["together"] is not None]
    seconds = sum(run.history[-1].get("seconds", 0) for run in chain(*runs.groups.values()))
    numbers = {"opened": len(rows), "half": len(half), "used": swaps.count("donor"),
               "coded": swaps.count("code"), "unseen": len(unseen),
               "unseen_used": swaps_unseen.count("donor"),
               "unseen_coded": swaps_unseen.count("code"), "unexplained": swaps.count(None),
               "id_site": len(id_site), "id_site_used": len(id_site) - swaps_id_site.count(None),
               "together": sum(share >= 0.8 for share in together), "hours": seconds / 3600}
    cells = {(name,): Cell([number], "count") for name, number in numbers.items()}
    cells["apart",] = Cell([share for share in together if share < 0.8])
    return cells


# ---------------------------------------------------------------- the book itself
PER_RUN = ("runs", "measure")
INNER = ("runs", "weights", "questions", "measure")
KEYS = {"training": PER_RUN, "compositions": PER_RUN, "film": PER_RUN, "aim_and_store": INNER,
        "swaps": INNER, "seen": INNER, "map": ("hop1", "hop2", "measure"),
        "new_facts": ("runs", "when", "questions"),
        "new_facts_aim": ("runs", "questions", "measure"), "r2_alone": ("world", "measure"),
        "counts": ("measure",), "derived": ("measure",), "needed": ("hops", "measure"),
        "site": ("runs", "weights"), "form": ("runs",), "graft": PER_RUN, "grokfast": PER_RUN,
        "data": ("phi", "ood_fraction"), "classes": ("phi", "ood_fraction", "class"),
        "paper": PER_RUN}
# of words, or with a file of its own
NO_CSV = ("needed", "site", "form", "graft", "data", "classes", "paper", "derived")
FIND_TRAINED = {"training": training_cells, "compositions": composition_cells, "film": film_cells,
                "site": site_cells, "form": form_cells, "graft": graft_cells,
                "grokfast": grokfast_cells}
FIND_TUNED = {"new_facts": new_facts_cells, "new_facts_aim": new_facts_aim_cells}


class Book(dict):
    """{table: {keys: Cell}}, and the verdicts on them."""

    def __init__(self, runs):
        super().__init__()
        trained = {}  # {group: its runs}, from scratch in an old world
        tuned = {}    # the same of runs on new facts
        for group, members in runs.groups.items():
            kind = tuned if members[0].config.new_facts else trained
            kind[group] = members
        self.runs = runs
        self.rows = rows_of_runs(trained)
        for table, find in FIND_TRAINED.items():
            self[table] = in_groups(trained, find)
        for table in INSIDE:
            self[table] = in_groups(trained, partial(inside_cells, table=table))
        for table, find in FIND_TUNED.items():
            self[table] = in_groups(tuned, find)
        self["map"] = map_cells(trained, self)
        self["needed"] = needed_cells(self["map"])
        self["data"], self["classes"] = data_cells(trained)
        self["r2_alone"] = r2_alone_cells()
        self["counts"] = count_cells(runs, self.rows)
        self["paper"] = {keys: Cell([text], "text") for keys, (text, _) in PAPER.items()}
        self["derived"] = {(name,): Cell([number]) for name, number in
                           derived_numbers(self).items()}
        outcomes, self.predictions = predict_all(self)
        self.verdicts = {**judge_all(self), **outcomes}  # {name: word}
        for name, word in (("hold", HOLDS), ("fail", FAILS), ("open", OPEN)):
            self["counts"][name,] = Cell([list(outcomes.values()).count(word)], "count")

    def look(self, words):
        """The Cell at "TABLE KEY ..."; NOTHING if there is none."""
        table, *keys = words.split()
        if table not in self or len(keys) != len(KEYS[table]):
            raise BadInput(f"template: {{value:{words}}}: is no cell of a table")
        return self[table].get(tuple(keys), NOTHING)

    def need(self, words):
        """The Cell at "TABLE KEY ..."; Missing if nothing was measured."""
        cell = self.look(words)
        if not cell.values or cell.kind == "share" and not cell.have:
            raise Missing(words)
        return cell

    def say(self, words):
        """The text of the Cell at "TABLE KEY ...", or of a FIELD of it."""
        where, _, name = words.rpartition(" ")
        if name not in (*FIELDS, *IN_WORDS):
            where = words
            name = "text"
        cell = self.look(where)
        if not cell.values:
            return NOT_MEASURED if self.runs.groups.keys() & set(where.split()) else NO_RUN
        return cell.field(name)
