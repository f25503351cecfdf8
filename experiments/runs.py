"""The runs below a folder, and all numbers of a run, as nested dicts.

A run's numbers are its files as they are, and what is worked out from them here: the steps at which
something was reached, how many compositions it was trained on, what it has learnt.
"""
import math
import re
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from data import BadInput, make_splits, make_world, reading
from experiments.measure import read_json
from grok import WEIGHTS, Config, first_step, read_run

NEVER = math.inf  # the step of what never came


# ---------------------------------------------------------------- reading runs
@dataclass(frozen=True)
class Run:
    """A finished run, and what was measured of it, by experiments/NAME.py; {} or [] if it was
    not."""
    name: str       # its folder under ROOT: small/natural/seed0
    folder: Path
    config: Config
    history: list   # see Trainer.measure
    inside: dict    # measure.py
    film: list      # measure.py --film
    grafts: list    # graft.py
    grokfast: dict  # grokfast.py
    together: list  # together.py


@dataclass
class Runs:
    """All runs under ROOT."""
    groups: dict = field(default_factory=dict)    # {small/natural: [Run, ...]}, one a seed
    left_out: list = field(default_factory=list)  # "small/natural/seed2: is not finished ..."
    paper_world: list = field(default_factory=list)  # see experiments/paper_world.py


def read_runs(root):
    """The Runs in every folder under ROOT with a config.json, however deep. A run that is not
    finished, is damaged or does not belong to its group is left out by name."""
    root = Path(root)
    if not root.is_dir():
        raise BadInput(f"root = {root}: is no folder")
    runs = Runs(paper_world=read_json(root / "paper_world.json", list))
    for path in sorted(root.rglob("config.json")):
        name = path.parent.relative_to(root).as_posix()
        group = runs.groups.setdefault(group_of(name), [])
        try:
            run = read_one(path.parent, name)
            check_group(run, group)
            group.append(run)
        except BadInput as error:
            reason = str(error).removeprefix(str(path.parent)).lstrip(":/ ")
            runs.left_out.append(f"{name}: {reason}".replace(f"{root}/", ""))
    runs.groups = {name: group for name, group in runs.groups.items() if group}
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
    run = Run(name, folder, config, history,
              inside=read_json(folder / "inside.json", dict),
              film=read_json(folder / "film.json", list),
              grafts=read_json(folder / "graft.json", list),
              grokfast=read_json(folder / "grokfast.json", dict),
              together=read_json(folder / "together.json", list))
    with reading(folder / "inside.json"):
        check_names([run.inside], (), ("r2_alone", *WEIGHTS))
        check_numbers(run.inside, "")
    for name, entries, needed in (("metrics.jsonl", history, ()),
                                  ("film.json", run.film, ("step", "fitted", "test_ood")),
                                  ("graft.json", run.grafts, ("seed", "first", "last")),
                                  ("grokfast.json", [run.grokfast], ()),
                                  ("together.json", run.together,
                                   ("sites", "redirected", "outright"))):
        with reading(folder / name):
            check_names(entries, needed)
            for entry in entries:
                check_numbers(entry, "")
    return run


def check_names(entries, needed, allowed=None):
    """ValueError if an entry of a list is no dict with the needed names, and no other than the
    allowed ones."""
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{entry} is no dict")
        for name in needed:
            if name not in entry:
                raise ValueError(f"{name} is missing")
        for name in entry:
            if allowed and name not in allowed:
                raise ValueError(f"{name} is unknown")


PLACES = ("where", "name", "names", "sites", "best_site")  # no numbers: they say where


def check_numbers(tree, path):
    """ValueError, with its path, if nested dicts hold what is no number, beside None and the names
    of PLACES."""
    for name, value in tree.items():
        place = f"{path} {name}".strip()
        if isinstance(value, dict):
            check_numbers(value, place)
        elif name not in PLACES:
            is_number = type(value) in (int, float) and math.isfinite(value)
            if value is not None and not is_number:
                raise ValueError(f"{place} is {value}")


def check_group(run, group):
    """Refuse a run that differs from its group in more than its seed, or in nothing."""
    steps = [line["step"] for line in run.history]
    for member in group:
        if run.config.seed == member.config.seed:
            raise BadInput(f"has the seed of {member.name}")
        for name, value in asdict(run.config).items():
            value_of_group = getattr(member.config, name)
            if name not in ("seed", "device") and value != value_of_group:
                raise BadInput(f"{name} = {value}, but {member.name} has {value_of_group}")
        if steps != [line["step"] for line in member.history]:
            raise BadInput(f"was evaluated at other steps than {member.name}")


# ---------------------------------------------------------------- the numbers of one run
MILESTONES = {  # name: (split, level, which rate of the lens)
    "fit": ("train_inferred", 0.99, None),
    "id_.5": ("test_id", 0.5, None),
    "answer_.5": ("test_ood", 0.5, None),
    "answer_.9": ("test_ood", 0.9, None),
    "lens_.5": ("test_ood", 0.5, "any")}
FILMED = {"fit": ("fitted", 0.99), "aim_.5": ("nearest_right", 0.5), "store_.5": ("own_code", 0.5),
          "answer_.5": ("as_is", 0.5)}  # of the frames of film.json: (number, level)


def numbers_of(run):
    """All that a place can lead to in a run, as nested dicts: its files as they are, and what is
    worked out from them."""
    numbers = {str(line["step"]): line for line in run.history}
    numbers.update(last=run.history[-1], config=asdict(run.config), **run.inside)
    if run.together:  # {"6": what six sites redirect}
        numbers["together"] = {str(len(entry["sites"])): entry for entry in run.together}
    if run.grokfast:
        numbers["grokfast"] = {name: NEVER if value is None else value
                               for name, value in run.grokfast.items()}
    if run.film:
        numbers["film"] = milestones_of_film(run.film)
    if run.grafts:  # {"from_2": what it shows with the mixing of seed 2}
        numbers["graft"] = {f"from_{graft['seed']}": graft for graft in run.grafts}
    numbers["step"] = milestones_of(run.history)
    numbers["times_as_late"] = times_as_late(numbers["step"])
    if run.name.startswith(("small/", "long/", "map/")) and not run.config.facts:
        numbers["compositions"] = count_compositions(replace(run.config, seed=0))
    if "end" in run.inside and not run.config.new_facts:
        numbers.update(learnt_by(run))
    return numbers


def milestones_of(history):
    """{name: step of the first evaluation at which it holds} of those MILESTONES whose split was
    measured."""
    steps = {}
    for name, (split, level, lens) in MILESTONES.items():
        if split in history[-1]["lens" if lens else "accuracy"]:
            steps[name] = first_step(history, level, split, lens) or NEVER
    return steps


def times_as_late(steps):
    """{name: its step by the step of the fit}."""
    fit = steps.get("fit", NEVER)
    ratios = {}
    for name, step in steps.items():
        ratios[name] = NEVER if NEVER in (step, fit) else step / fit
    return ratios


def milestones_of_film(film):
    """{name: step of the first frame at which it holds} of FILMED, of OOD questions."""
    history = []
    for frame in film:
        shares = {"fitted": frame["fitted"], **frame["test_ood"]}
        history.append({"step": frame["step"], "accuracy": shares})
    return {name: first_step(history, level, number) or NEVER
            for name, (number, level) in FILMED.items()}


@lru_cache(maxsize=None)
def count_compositions(config):
    """{"all": two-step questions in training, "extra": how many more than in natural training}."""
    world = make_world(config)
    n_trained = len(make_splits(world, config)["train_inferred"].h)
    n_natural = round(config.phi * np.count_nonzero(~world.is_ood))
    return {"all": n_trained, "extra": n_trained - n_natural}


def learnt_by(run):
    """What a measured run has learnt: {"form", "class", "learnt": {kind of class: 1 or 0},
    "end_if_half": what was measured at the end, if it answers half of the OOD questions}."""
    name = class_of(run)
    learnt = {kind: float(words in name) for kind, words in LEARNT.items()}
    answer = get(run.inside, "end aim test_ood as_is")
    end_if_half = run.inside["end"] if answer is not None and answer >= 0.5 else None
    return {"form": form_of(run), "class": name, "learnt": learnt, "end_if_half": end_if_half}


def form_of(run):
    """Whether the states of ID questions show the bridge as the "first" or the "last" of the
    entities at the end; None if neither, or if they were not looked into."""
    states = get(run.inside, "end test_id seen state")
    return word_of({"first": get(states, "entity best"), "last": get(states, "last_entity best")})


def word_of(shares):
    """The one of "first" and "last" that holds in half of the questions, or None."""
    for word in ("first", "last"):
        if shares[word] is not None and shares[word] >= 0.5:
            return word
    return None


LEARNT = {"memorises": "memorises", "circuit": "circuit", "for_all": "full circuit"}  # in a class


def class_of(run):
    """What a run has learnt, by intervention: a circuit is one only where a swap redirects .5."""
    if first_step(run.history, 0.99, "train_inferred") is None:
        return "does not fit"
    answers = {}
    redirects = {}
    for split in ("test_id", "test_ood"):
        answers[split] = run.history[-1]["accuracy"].get(split, 0.0) >= 0.5
        redirects[split] = (get(run.inside, f"end site {split} donor") or 0.0) >= 0.5
    if answers["test_ood"] and redirects["test_ood"]:
        return "a full circuit"
    if answers["test_id"] and redirects["test_id"]:
        return "an ID circuit"
    if not answers["test_id"] and not redirects["test_id"]:
        return "memorises"
    return "between these"


def get(tree, path):
    """What stands at a path of words in nested dicts, or None."""
    for word in path.split():
        if not isinstance(tree, dict) or tree.get(word) is None:
            return None
        tree = tree[word]
    return tree
