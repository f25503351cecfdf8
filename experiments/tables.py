"""Tables over many runs: every number of the README comes from here.

    python -m extras.tables [FOLDER] [-o FILE]     all runs below FOLDER (runs/shipped)

A group is the runs that differ in their seed alone, and is named after its folder. Steps are those
of the first evaluation at which something holds. Cells are means over seeds (least to most).
"""
import argparse
import json
import re
import sys
import zipfile
from collections import Counter, namedtuple
from dataclasses import asdict
from functools import lru_cache
from itertools import chain, product
from operator import attrgetter
from pathlib import Path

import numpy as np

import analyze
from analyze import circuit, EXAMINED, map_at, places, predict
from data import BadInput, queries, REGIMES, WorldConfig
from extras.facts import guessed
from extras.graft import FRESH, PARTS
from grok import (build_data, first_step, LENGTH, load_run, PRESETS, read_run, say, to_tokens,
                  WEIGHTS, write_file)

Run = namedtuple("Run", "folder about history paths cells")  # paths, cells: None if not measured
LEVELS = (0.5, 0.9, 0.95)
SERVED = "new_old", "old_new", "new_new"
TUNED = "new_atomic", *SERVED, "old_atomic", "old_inferred"


# ---------------------------------------------------------------- reading runs
class Absent(KeyError):
    """A table needs runs, or a file of a run, that are not there."""


class Groups(dict):
    """{name: [Run, ...]}, that says which group is not there."""
    def __missing__(self, name):
        raise Absent(name)


def read_groups(root):
    """{name: [Run, ...]}, a Run a seed, of all runs below a folder, in the order of their names."""
    groups, seen = Groups(), {}
    folders = sorted(path.parent for path in Path(root).rglob("config.json"))
    for folder in folders:
        about, history = read_run(folder)
        name = str(folder.parent.relative_to(root)) if folder != Path(root) else folder.name
        group = groups.setdefault(name, [])
        if group and identity(about) != identity(group[0].about):
            raise BadInput(f"{folder}: differs from {group[0].folder} in more than its seed")
        whole = name, identity(about), about["model"]["seed"]
        if whole in seen:
            raise BadInput(f"{folder}: is the same run as {seen[whole]}")
        seen[whole] = folder
        group.append(Run(folder, about, history, *(read_json(folder / f"{file}.json")
                                                   for file in ("paths", "cells"))))
    if not groups:
        raise BadInput(f"{root}: holds no run")
    return groups


def identity(about):
    """What two runs of one group have in common, as text: all but the seed, and how long."""
    model = {name: value for name, value in about["model"].items() if name not in ("seed", "steps")}
    start = {name: value for name, value in about.get("start", {}).items() if name == "weights"}
    return json.dumps([about["regime"], about["world"], model, start, about.get("data")])


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def until(run, step):
    """The run as it was at a step."""
    return run._replace(history=[line for line in run.history if line["step"] <= step])


# ---------------------------------------------------------------- cells
def spread(values, digits=2):
    """"mean (least to most)" of one value a seed; seeds that never got there (None) are counted."""
    have = [value for value in values if value is not None]
    if not have:
        return "never" if len(values) else ""
    never = f"; {len(values) - len(have)} never" if len(have) < len(values) else ""
    if len(have) == 1:
        return f"{have[0]:.{digits}f}{never and ' (1;' + never[1:] + ')'}"
    return f"{np.mean(have):.{digits}f} ({min(have):.{digits}f} to {max(have):.{digits}f}{never})"


def wilson(hits, n):
    """95 % Wilson score interval (low, high) of a share hits / n; (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def last(run, split, lens=None):
    """Accuracy of a split at the end, or its lens rate of that name; None if not measured."""
    line = run.history[-1]
    return line["lens"].get(split, {}).get(lens) if lens else line["accuracy"].get(split)


# ---------------------------------------------------------------- tables of training
def stages(groups):
    """When the training is fitted, the bridge seen and the OOD answer given (Finding 1)."""
    yield ["run", "seeds", "steps", "training >= .5 / .9 / .95", "training >= .99",
           "bridge seen, best site >= .5 / .9 / .95", "bridge seen anywhere >= .5 / .9 / .95",
           "OOD answer >= .5 / .9 / .95", "OOD facts", "ID", "ID + OOD", "OOD + ID", "OOD answer",
           "answer seen anywhere", "bridge seen anywhere (chance)"]
    for name, runs in groups.items():
        stages = [milestones(runs, "train_inferred"), steps_to(runs, 0.99, "train_inferred"),
                  milestones(runs, "test_ood", "best"), milestones(runs, "test_ood", "any"),
                  milestones(runs, "test_ood")]
        if last(runs[0], "test_ood", "best") is None:  # older runs: not measured
            stages[2] = ""
        shares = [end(runs, split) for split in (
            "ood_atomic", "test_id", "test_id_ood", "test_ood_id", "test_ood")]
        seen, chance, anywhere = (end(runs, "test_ood", lens)
                                  for lens in ("any", "any_chance", "answer_any"))
        steps = runs[0].history[-1]["step"]
        yield [name, len(runs), steps, *stages, *shares, anywhere, f"{seen} ({chance})"]


def milestones(runs, split, lens=None):
    return " / ".join(steps_to(runs, level, split, lens) for level in LEVELS)


def tuned(groups):
    """New facts (Finding 3): what is right at the end of fine-tuning, and half way; last, what r2
    alone gives of new + old, old + new, new + new. One draw of new facts for all."""
    yield ["run", "seeds", "step", "new facts", "new + old", "old + new", "new + new",
           "old facts", "old compositions", "r2 alone"]
    for name, runs in groups.items():
        for part in (0.3, 1):
            step = round(part * runs[0].history[-1]["step"])
            then = [until(run, step) for run in runs]
            yield [name, len(runs), step, *(end(then, split) for split in TUNED),
                   " / ".join(by_r2(runs[0]))]


@lru_cache(maxsize=None)
def guesses(config, regime="natural"):
    """`guessed` in the world of a WorldConfig with new facts."""
    return guessed(*build_data({"world": asdict(config), "regime": regime}))


def by_r2(run):
    """What r2 alone gives in the world of a run, a cell a kind of SERVED: see `r2_alone`."""
    if "data" in run.about:
        found = guessed(*build_data(run.about, run.folder))
    else:
        found = guesses(WorldConfig(**run.about["world"]), run.about["regime"])
    return ["" if share is None else f"{share:.2f}" for share in found.values()]


def r2_alone(groups):
    """Compositions with new facts given the answer that r2 had most often in training: it takes no
    hop 1 and no new fact. Kept facts are few a relation, so it is often right of new + old. Five
    draws of the world; in that of the paper, as its code keeps old facts, and as its text does."""
    yield ["world", "old facts kept", "new + old", "old + new", "new + new"]
    ours = groups["tune/small_natural_grokked"][0].about["world"]
    theirs = {**PRESETS["paper"][1], "new_facts": 2000}
    for world, words, kept, whole in (
            (ours, "as in tune", ours["kept"], False),
            (ours, "with all compositions", ours["kept"], True), (ours, "all", 1.0, False),
            (theirs, "220, with all compositions", 220 / 38000, True),  # of 38,000 ID facts
            (theirs, "8,000", 8000 / 38000, False)):
        row, found = ["small" if world is ours else "paper", words], []
        for seed in range(5):
            drawn = {**world, "kept": kept, "whole_rows": whole, "data_seed": seed}
            found.append(guesses(WorldConfig(**drawn)))
        for kind in SERVED:
            row.append(spread([shares[kind] for shares in found]))
        yield row


# ---------------------------------------------------------------- tables of what is inside
def paths(groups):
    """Answered, seen, present, used, before and after grokking (Finding 2). In OOD queries, too, a
    swap asks most often for an ID fact: the next table parts them."""
    yield ["run", "weights", "queries", "answered", "seen anywhere (chance)", "seen, best site",
           "seen among entities", "present", "translated to its token", "used: a donor",
           "used: its code", "used: its token's direction", "probe's subspace", "all but that",
           "across ID and OOD", "used where"]
    for name, runs in groups.items():
        for stage in WEIGHTS:
            for split, short in EXAMINED.items():
                found = [(run, run.paths[stage][split]) for run in runs if stage in run.paths]
                if found:
                    yield [name, stage, short, *path_row(stage, split, found)]


def path_row(stage, split, found):
    """The cells of one row of `paths`: means over seeds."""
    answered = spread([answered_at(run, stage, split) for run, _ in found])
    found = [maps for _, maps in found]
    lens = [maps["lens"]["state"] for maps in found]
    among = [entity_seen(maps) for maps in found]
    used = [most(found, kind) for kind in (
        "other_r2", "code", "visible", "inside", "outside", "across")]
    return [answered, f"{spread([x['bridge']['any'] for x in lens])} "
            f"({np.mean([x['bridge_chance']['any'] for x in lens]):.2f})",
            spread([x["bridge"]["best"] for x in lens]), spread(among),
            spread([np.max(maps["probe"]) for maps in found]),
            spread([np.max(maps["translated"]) for maps in found]), *used,
            count(map(circuit_name, found))]


def most(found, kind):
    """The share that a kind of patch redirects at its best site, over seeds."""
    return spread([map_at(maps, kind).max() for maps in found])


def answered_at(run, stage, split):
    """Share of a split that is answered by the weights before or at the end."""
    step = run.history[-1]["step"]
    if stage == "before":
        step = first_step(run.history, 0.99, "train_inferred")
    return next(line["accuracy"][split] for line in run.history if line["step"] == step)


def circuit_name(found):
    """Where the bridge is used, in words: "mixed (3, r2)", "state (2, h)" or "spread"."""
    part, loop, position, _ = circuit(found)
    return part if loop is None else f"{part} ({loop + 1}, {places(99)[position]})"


def swaps(groups):
    """A swap asks for (donor's bridge, r2): in OOD queries, too, most often an ID fact. Share of
    the swaps redirected to ID facts and to OOD facts, at the site best for ID facts, in queries
    answered rightly. Before, few OOD ones are, and few facts asked (Findings 1, 2)."""
    yield ["run", "weights", "queries", "seeds", "answered rightly", "OOD facts asked",
           "donor, to ID facts", "donor, to OOD facts", "code, to ID facts", "code, to OOD facts"]
    for name, runs in groups.items():
        measured = [read_json(run.folder / "facts.json") for run in runs]
        for stage in WEIGHTS:
            for split, short in EXAMINED.items():
                found = [maps[stage]["swapped"][split] for maps in measured
                         if maps and "swapped" in maps.get(stage, {})]
                row = [name, stage, short, len(found),
                       spread([part["queries"] for part in found], 0),
                       spread([part["facts"][1] for part in found], 0)]
                for kind, i in product(("donor", "code"), (0, 1)):
                    row.append(spread([part[kind][i] for part in found if part[kind]]))
                if found:
                    yield row


def count(words):
    """"a (2), b" for a, b, a: each once, the most frequent first."""
    return ", ".join(word + (f" ({n})" if n > 1 else "") for word, n in
                     Counter(words).most_common())


def classes(groups):
    """Which form each seed's bridge has when the training is just fitted (ID queries): regime or
    seed? "entity": at one site the bridge is the first entity in half of them or more; "code": it
    is not, but by code a swap redirects .4 or more; "neither". "Then": what it is at the end, if
    that is another, half as long after the fit or later (not asked of the last two rows).
    other_world: both_full with other facts; smaller_steps: with lr .003 for .004. Last: how many
    seeds at the fit, with the 95 % interval."""
    yield ["runs", *(f"seed {seed}" for seed in range(8)), "first entity"]
    for regime in ("both_full", "both_half", "first_full", "second_full", "natural", "other_world",
                   "smaller_steps"):
        words, fitted = {}, []
        for run in runs_of(groups, regime):
            kind, last = class_of(run), class_of(run, "grokked")
            moved = last not in (kind, "not fitted")
            words[run.about["model"]["seed"]] = f"{kind}, then {last}" if moved else kind
            if kind != "not fitted":
                fitted.append(kind == "entity")
        if words:
            yield [regime, *(words.get(seed, "") for seed in range(8)), of_seeds(fitted)]


def by_class(groups):
    """The two forms apart, at the fit, OOD queries: means only over seeds of one class."""
    yield ["regime", "form", "seeds", "OOD answer", "seen anywhere", "seen among entities",
           "present", "used: a donor", "used: its code", "used: its token's direction"]
    for regime in ("both_full", "both_half", "first_full", "second_full", "natural"):
        runs = runs_of(groups, regime)
        for kind in ("entity", "code"):
            some = [run for run in runs if class_of(run) == kind]
            found = [run.paths["before"]["test_ood"] for run in some]
            seen = [maps["lens"]["state"]["bridge"]["any"] for maps in found]
            if some:
                yield [regime, kind, len(some), at_fit(some), spread(seen),
                       spread([entity_seen(maps) for maps in found]),
                       spread([np.max(maps["probe"]) for maps in found]),
                       *(most(found, patch) for patch in ("other_r2", "code", "visible"))]


def runs_of(groups, regime):
    """All runs of a regime in `small`, one a seed: the last that there is."""
    runs = {}
    for kind in ("small", "classes", "late"):
        for run in groups.get(f"{kind}/{regime}", []):
            runs[run.about["model"]["seed"]] = run
    return [runs[seed] for seed in sorted(runs)]


def draws(groups):
    """Which form, with the first weights of one seed and the draws of another (both_full)?"""
    yield ["first weights of", *(f"draws of seed {seed}" for seed in range(4))]
    for name, runs in groups.items():
        kinds = {run.about["model"]["seed"]: class_of(run) for run in runs}
        yield [name.replace("draws/weights_", "seed "), *(kinds.get(seed, "") for seed in range(4))]


def grafts(groups):
    """Which form, with one part of the first weights exchanged between seeds 0 and 2?"""
    yield ["part", "seed 0 with that of seed 2", "seed 2 with that of seed 0"]
    for part in PARTS:
        pair = [groups.get(f"graft/{part}_of_{name}") for name in ("2_in_0", "0_in_2")]
        if all(pair):
            yield [part, *(class_of(runs[0]) for runs in pair)]


def class_of(run, stage="before"):
    """"entity": the bridge is the lens's first entity at one site; "code": it is not, but its code
    redirects; "neither"; or "not fitted", if the run was not opened at this stage."""
    if stage not in (run.paths or {}):
        return "not fitted"
    found = run.paths[stage]["test_id"]
    if entity_seen(found) >= 0.5:
        return "entity"
    return "code" if map_at(found, "code").max() >= 0.4 else "neither"


def of_seeds(holds):
    """"2 of 3 [0.21, 0.94]": how many seeds, with the 95 % interval."""
    low, high = wilson(sum(holds), len(holds))
    return f"{sum(holds)} of {len(holds)} [{low:.2f}, {high:.2f}]"


def entity_seen(found):
    """How often the bridge is the lens's first entity at one site, mixed or state."""
    return max(part["entity"]["best"] for part in found["lens"].values())


# ---------------------------------------------------------------- likeness of paths (Finding 1)
def alike(a, b):
    """How alike two maps are, in [0, 1]: sum of minima over sum of maxima."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.minimum(a, b).sum() / max(np.maximum(a, b).sum(), 1e-12))


def alike_shuffled(a, b, free, times=300):
    """Mean of `alike` with the sites of b that are `free` (a mask) shuffled: what chance scores."""
    rng, a, b = np.random.default_rng(0), np.asarray(a), np.array(b)
    scores, kept = [], b[free].copy()
    for _ in range(times):
        b[free] = rng.permutation(kept)
        scores.append(alike(a, b))
    return float(np.mean(scores))


def reachable(found):
    """Sites (n_loops, 2, T) from which noise changes answers: where a patch could do something."""
    return map_at(found, "noise", "unchanged") < 0.99


def likeness(groups):
    """How alike swap maps (same r2) are: one model's, two seeds', two regimes' (Finding 1)."""
    yield ["run", "ID: before, grokked", "grokked: ID, OOD", "two seeds, before",
           "two seeds, grokked", "natural's, grokked", "reachable sites shuffled"]
    swaps = {name: list(map(swaps_of, runs)) for name, runs in groups.items()}
    for name, own in swaps.items():
        natural = swaps.get(str(Path(name).parent / "natural"), [])
        pairs = [within(own, "before ID", "grokked ID"), within(own, "grokked ID", "grokked OOD"),
                 between(own, own, "before ID"), between(own, own, "grokked ID"),
                 between(own, natural, "grokked ID") if own is not natural else []]
        free = [np.logical_or(reachable(run.paths["grokked"]["test_id"]),
                              reachable(run.paths["before"]["test_id"]))
                for run in groups[name] if "before" in run.paths and "grokked" in run.paths]
        null = [alike_shuffled(*pair, mask) for pair, mask in zip(pairs[0], free)]
        yield [name, *map(alike_all, pairs), spread(null)]


def alike_all(pairs):
    return spread([alike(*pair) for pair in pairs])


def swaps_of(run):
    """{"before ID": swap map, ...} of a run."""
    return {f"{stage} {EXAMINED[split]}": map_at(run.paths[stage][split], "swap")
            for stage, split in product(run.paths, EXAMINED)}


def within(runs, one, two):
    return [(maps[one], maps[two]) for maps in runs if one in maps and two in maps]


def between(runs, others, kind):
    """Pairs of maps of one kind from different runs, each pair once."""
    pairs = []
    for i, maps in enumerate(runs):
        for j, other in enumerate(others):
            if (runs is not others or i < j) and kind in maps and kind in other:
                pairs.append((maps[kind], other[kind]))
    return pairs


# ---------------------------------------------------------------- half supervision, in four cells
def four_cells(model, world, splits):
    """The OOD test in four cells: is hop 1's fact supervised as hop 1, hop 2's as hop 2 (trained in
    such a composition)? {"yes, no": {"n", "right", "n_known", "right_known"}, ...}; known: both
    facts are answered when asked alone. Shares are None without queries."""
    trained, asked = splits["train_inferred"], splits["test_ood"]
    tokens, answers = to_tokens(asked, world, model.config.layout)
    right = (predict(model, tokens) == answers).numpy()
    first, second = world.index[asked.h, asked.r1], world.index[asked.b, asked.r2]
    known = knows(model, world, first) & knows(model, world, second)
    hop1 = np.isin(first, world.index[trained.h, trained.r1])
    hop2 = np.isin(second, world.index[trained.b, trained.r2])
    table = {}
    for one, two in ((True, True), (True, False), (False, True), (False, False)):
        here = (hop1 == one) & (hop2 == two)
        table[f"{'yes' if one else 'no'}, {'yes' if two else 'no'}"] = {
            "n": int(here.sum()), "right": share(right[here]),
            "n_known": int((here & known).sum()), "right_known": share(right[here & known])}
    return table


def knows(model, world, facts):
    """(N,) whether the model answers these facts, given by number, when asked alone."""
    tokens, answers = to_tokens(queries(world, facts), world, model.config.layout)
    return (predict(model, tokens) == answers).numpy()


def share(right):
    return float(right.mean()) if len(right) else None


def cells(groups):
    """OOD answers by whether hop 1 and hop 2 were supervised (paper: Both Half, .48)."""
    yield ["run", "hop 1, hop 2 supervised", "queries a seed", "right", "both facts known",
           "right of those"]
    for name, runs in groups.items():
        for cell in runs[0].cells:
            here = [run.cells[cell] for run in runs if run.cells[cell]["n"]]
            if here:
                yield [name, cell, spread([c["n"] for c in here], 0),
                       spread([c["right"] for c in here]),
                       spread([c["n_known"] for c in here], 0),
                       spread([c["right_known"] for c in here if c["n_known"]])]


FILMED = "bridge", "entity", "code", "probe"  # maps of frames.npz: see `film` of extras.pictures


def read_frames(path):
    """What `film` of extras.pictures wrote."""
    try:
        with np.load(path) as saved:
            return {name: saved[name] for name in ("step", "n", *FILMED)}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        raise BadInput(f"{path}: is damaged, or is not what this file should be")


def filmed(groups):
    """When the bridge of OOD queries is there, where the lens may be blind: read by a probe at the
    best site, of 100 OOD queries at every evaluation; beside training and answer. A code that is
    put in redirects, mostly to ID facts, when hop 2 is ready: it shows no bridge of the query's own
    (Finding 1; `python -m extras.pictures --frames RUN`)."""
    yield ["run", "seeds", "training >= .99", "code put in redirects >= .5 / .9",
           "present: a probe >= .5 / .9", "answer when present >= .5", "OOD + ID >= .5",
           "ID + OOD >= .5", "OOD answer >= .25 / .5", "OOD answer, end", "seen at a site, most"]
    for name, runs in groups.items():
        runs = [run for run in runs if (run.folder / "frames.npz").exists()]
        if runs:
            frames = [read_frames(run.folder / "frames.npz") for run in runs]
            row = [name, len(runs), steps_to(runs, 0.99, "train_inferred")]
            for kind in ("code", "probe"):
                row.append(f"{reached(frames, kind, 0.5)} / {reached(frames, kind, 0.9)}")
            row.append(answer_then(runs, frames))
            for split in ("test_ood_id", "test_id_ood"):
                row.append(steps_to(runs, 0.5, split))
            yield [*row, f"{steps_to(runs, 0.25)} / {steps_to(runs, 0.5)}", end(runs, "test_ood"),
                   spread([found["bridge"].max() for found in frames])]


def first_frame(frames, kind, level):
    """The first step at which the best site of a map has a share >= level, or None."""
    there = np.flatnonzero(frames[kind].max((1, 2, 3)) >= level)
    return int(frames["step"][there[0]]) if len(there) else None


def reached(frames, kind, level):
    """That step, over seeds."""
    return spread([first_frame(found, kind, level) for found in frames], 0)


def answer_then(runs, frames):
    """The OOD answer at the first step at which a probe reads half of the bridges."""
    steps = [first_frame(found, "probe", 0.5) for found in frames]
    return spread([last(until(run, step), "test_ood") for run, step in zip(runs, steps) if step])


def measure_cells(root):
    """Write cells.json beside the weights of every run that supervises OOD facts in part."""
    for folder in sorted(path.parent for path in Path(root).rglob("after.pt")):
        about, history = read_run(folder)
        if "test_ood" in history[-1]["accuracy"] and not (folder / "cells.json").exists():
            found = four_cells(*load_run(folder))
            write_file(folder / "cells.json", json.dumps(found, indent=1).encode())


# ---------------------------------------------------------------- where facts are looked up
def lookups(groups):
    """The code of a fact asked alone, put into compositions; what the states at h and r1 hold."""
    yield ["run", "weights", "decides the fact itself", "at", "decides hop 1", "at",
           "decides hop 2", "at h and r1: question", "bridge", "new + old", "old + new"]
    for name, runs in groups.items():
        measured = [(run, read_json(run.folder / "facts.json")) for run in runs]
        for stage in WEIGHTS:
            found = [maps[stage] for _, maps in measured if maps and stage in maps]
            after = groups_after(groups, name, stage)
            if found and not name.startswith("tune/"):
                yield [name, stage, *strongest(found, "alone"), *strongest(found, "hop1"),
                       strongest(found, "hop2")[0], *pair_cells(found), *after]


def groups_after(groups, name, weights):
    """[new + old, old + new] after fine-tuning from these weights of a group, "" if not run."""
    kind, regime = name.split("/")
    tuned = f"tune/{kind}_{regime}_{weights}" if kind == "small" else f"tune/{kind}_{regime}"
    if tuned not in groups or kind == "dial" and weights == "before":
        return ["", ""]
    return [end(groups[tuned], split) for split in ("new_old", "old_new")]


def pair_cells(found):
    """[question, bridge]: what both states decide together, at the loop that decides most."""
    shares = []
    for maps in found:
        pair = maps.get("pair", {})
        if pair.get("n_two"):
            loop = int(np.argmax(np.add(pair["question"], pair["bridge"])))
            shares.append((pair["question"][loop], pair["bridge"][loop]))
    return [spread(column) for column in zip(*shares)] or ["", ""]


def new_by_class(groups):
    """Does the form of the bridge decide what new facts serve? Fine-tuned from each seed's weights;
    the class is that at the fit. Grokked: after 3,000 steps, of seeds 3 to 7 half as long after the
    fit or later. k: compositions trained for each new fact and hop, 2,000 steps."""
    starts = {  # its regime, the runs
        "natural, before": ("natural", "small_natural_before", "classes_natural_before"),
        "both_full, grokked": ("both_full", "small_both_full_grokked", "classes_both_full",
                               "late_both_full"),
        "second_full, grokked": ("second_full", "small_second_full_grokked", "classes_second_full",
                                 "late_second_full"),
        "natural, grokked, k = 4": ("natural", "flat_natural_grokked_k4")}
    yield ["start", "form", "seeds", "new + old", "old + new", "new + new"]
    for start, (regime, *names) in starts.items():
        kinds = {run.about["model"]["seed"]: class_of(run) for run in runs_of(groups, regime)}
        runs = chain.from_iterable(groups.get(f"tune/{name}", []) for name in names)
        runs = [(kinds.get(run.about["model"]["seed"]), run) for run in runs]
        for word in ("entity", "code"):
            some = [run for kind, run in runs if kind == word]
            if some:
                yield [start, word, len(some), *(end(some, split) for split in SERVED)]


def failing(groups):
    """Which hop fails? Of up to 500 wrong answers a seed, those that an old value with the right
    bridge mends, at the best site (Finding 3)."""
    yield ["run", "seeds", "steps", "new + old", "wrong, tried", "of these mended", "old + new",
           "wrong, tried", "of these mended"]
    for name, runs in groups.items():
        measured = [read_json(run.folder / "facts.json") for run in runs]
        cells = []
        for kind in ("new_old", "old_new"):
            found = [maps["grokked"]["mended"][kind] for maps in measured if maps]
            cells += [end(runs, kind), sum(part["n"] for part in found),
                      spread([part["share"] for part in found if part["n"]])]
        if any(measured):
            yield [name, len(runs), runs[0].history[-1]["step"], *cells]


def written(groups):
    """Where the answer of a fact asked alone stands in the last loop, at the position that answers,
    by a probe fitted on half of the old facts. A composition takes hop 1 from what is mixed, one
    loop earlier. New + old: all; where the probe reads the new fact in what is mixed; where not;
    last, wrong ones mended by the right bridge put into what is mixed at r2. _all: all old facts
    kept, else .21."""
    yield ["run", "seeds", "steps", "old fact in mixed", "new fact in mixed",
           "new fact in the state", "new + old", "if in mixed", "if not", "mended there"]
    for name, runs in groups.items():
        measured = [read_json(run.folder / "facts.json") for run in runs]
        found = [maps["grokked"].get("asked_alone") for maps in measured if maps]
        if found and all(found):
            at = LENGTH[runs[0].about["model"]["layout"]] - 2
            row = [name, len(runs), runs[0].history[-1]["step"]]
            for kind, part in (("old", 0), ("new", 0), ("new", 1)):
                row.append(spread([maps[kind][-1][part][at] for maps in found]))
            row.append(end(runs, "new_old"))
            for i in (0, 1):
                row.append(spread([maps["right"][i] for maps in found]))
            tried = [maps["grokked"]["mended"]["new_old"] for maps in measured]
            yield [*row, spread([part["mixed"] for part in tried if part["n"]])]


def unlearnt(groups):
    """Where is a new fact looked up? At one site the MLP gets its weights from before fine-tuning
    back: share of right answers then lost, the site where most are, and in the last loop where the
    answer is read. Old compositions are to lose little: where they lose much, the rest says little.
    """
    yield ["run", "seeds", "steps", "fact alone", "at", "as hop 1", "at", "as hop 2", "at",
           "alone, last loop", "hop 1, last loop", "hop 2, last loop", "old compositions, most"]
    for name, runs in groups.items():
        measured = [read_json(run.folder / "facts.json") for run in runs]
        found = [maps["grokked"].get("unlearnt") for maps in measured if maps]
        if found and all(found):
            row, ends, T = [], [], LENGTH[runs[0].about["model"]["layout"]]
            for kind, at in (("new_atomic", T - 2), ("new_old", T - 1), ("old_new", T - 1)):
                lost = [np.asarray(maps[kind]["lost"]) for maps in found]       # (n_loops, T) each
                row += [spread([shares.max() for shares in lost]), count(map(site_of, lost))]
                ends.append(spread([shares[-1, at] for shares in lost]))
            old = spread([np.max(maps["train_inferred"]["lost"]) for maps in found])
            yield [name, len(runs), runs[0].history[-1]["step"], *row, *ends, old]


def site_of(shares):
    """"(loop, position)" of the most in (n_loops, T)."""
    loop, position = np.unravel_index(shares.argmax(), shares.shape)
    return f"({loop + 1}, {places(99)[position]})"


def earlier(groups):
    """What fine-tuning grades, and what new facts serve, .21 of the old ones kept, 500 steps: the
    last loop or that before, too; the whole sequence, so that every position is to show its own
    token, or the answer alone."""
    yield ["start", "graded", "in loops", "seeds", "new + old", "old + new", "new + new",
           "old compositions"]
    yield ["r2 alone", "", "", "", *by_r2(groups["tune/small_natural_grokked"][0]), ""]
    for start in ("natural_before", *(f"{regime}_grokked" for regime in REGIMES)):
        for graded, loops, kind in (("sequence", "4", "small"), ("sequence", "3, 4", "early"),
                                    ("answer", "4", "answer"), ("answer", "3, 4", "early_answer")):
            runs = groups.get(f"tune/{kind}_{start}")
            if runs:
                yield [", ".join(start.rsplit("_", 1)), graded, loops, len(runs),
                       *(end(runs, split) for split in SERVED), end(runs, "old_inferred")]


def at_length(groups):
    """New facts at length, a fifth of the old ones kept: at step 400, then the median of those from
    4,000 to 6,000, as the loss has spikes and one evaluation may fall into one. Ahead: seeds that
    end with more of new + old than of old + new beyond what r2 alone gives, 0 that much and 1 all.
    Held out: old compositions of two kept facts that no training showed, at the end."""
    yield ["start", "seeds", "new + old, at 400", "old + new, at 400", "new + old, late",
           "old + new, late", "new + new, late", "new + old ahead", "old facts, late", "held out",
           "of"]
    guess = by_r2(groups["tune/small_natural_grokked"][0])
    yield ["r2 alone", "", *guess[:2], *guess, "", "", "", ""]
    for start in ("scratch", "natural_before", *(f"{regime}_grokked" for regime in REGIMES)):
        runs = groups.get(f"tune/flat_{start}", [])
        if runs:
            early = [until(run, 400) for run in runs]
            row = [end(early, split) for split in SERVED[:2]]
            for split in SERVED:
                row.append(spread([late(run, split) for run in runs]))
            row += [sum(map(hop1_ahead, runs)), spread([late(run, "old_atomic") for run in runs])]
            held = [facts_of(run, "grokked", "held_out") for run in runs]
            yield [", ".join(start.rsplit("_", 1)), len(runs), *row,
                   spread([part["right"] for part in held]), sum(part["n"] for part in held)]


def late(run, split):
    """The median accuracy of a split, steps 4,000 to 6,000."""
    return np.median([line["accuracy"][split] for line in run.history
                      if 4000 <= line["step"] <= 6000])


def hop1_ahead(run, share=late):
    """Whether new + old is ahead of old + new beyond what r2 alone gives."""
    beyond = []
    for split, guess in zip(SERVED, map(float, by_r2(run))):
        beyond.append((share(run, split) - guess) / (1 - guess))
    return bool(beyond[0] > beyond[1])


def fresh(groups):
    """Which part of the trained weights keeps new facts from serving? small/natural, grokked (or
    before), one part of its weights drawn afresh, after 6,000 steps on new facts, all old facts
    kept."""
    yield ["drawn afresh", "seeds", "new + old", "old + new", "new + new"]
    yield ["r2 alone", "", *by_r2(groups["tune/small_natural_grokked_all"][0])]
    starts = {"nothing": "tune/flat_natural_grokked_all",
              **{part: f"fresh/{part}" for part in FRESH}, "everything": "tune/flat_scratch_all",
              "nothing_before": "tune/flat_natural_before_all"}
    for part, name in starts.items():
        runs = [until(run, 6000) for run in groups.get(name, [])]
        if runs:
            yield [part.replace("_", ", "), len(runs), *(end(runs, split) for split in SERVED)]


def strongest(found, kind):
    """(share redirected at the best site, that site), over seeds."""
    maps = [np.asarray(maps[kind]["redirected"]) for maps in found]
    sites = []
    for shares in maps:
        loop, part, position = np.unravel_index(shares.argmax(), shares.shape)
        sites.append(f"{analyze.PARTS[part]} ({loop + 1}, {places(99)[position]})")
    return spread([shares.max() for shares in maps]), count(sites)


# ---------------------------------------------------------------- dials, growth
def dials(groups):
    """One setting moved at a time from small/second_full, which is trained for longer: what decides
    that a bridge is seen, used (Findings 1, 2, 3)."""
    yield ["run", "seeds", "steps", "training >= .99", "OOD answer >= .5 / .95", "OOD facts",
           "OOD answer", "seen, best site", "seen among entities", "present", "used: a donor",
           "used: its code",
           "used: its token's direction", "used where, OOD queries", "ID before and grokked alike",
           "new + old", "old + new", "new + new"]
    for name, runs in groups.items():
        if not name.startswith("tune/"):
            tuned = groups.get("tune/" + name.replace("/", "_"))
            yield [name, len(runs), runs[0].history[-1]["step"], *dial_row(runs), *(
                end(tuned or groups["tune/small_second_full_grokked"], split) for split in SERVED)]


def dial_row(runs):
    """The cells of one row of `dials` that come from the runs themselves."""
    found = [run.paths["grokked"]["test_ood"] for run in runs if run.paths]
    same = path_like([run for run in runs if run.paths], "before ID", "grokked ID")
    used = [most(found, kind) for kind in ("other_r2", "code", "visible")]
    return [steps_to(runs, 0.99, "train_inferred"),
            " / ".join(steps_to(runs, level) for level in (0.5, 0.95)),
            end(runs, "ood_atomic"), end(runs, "test_ood"),
            spread([f["lens"]["state"]["bridge"]["best"] for f in found]),
            spread([entity_seen(f) for f in found]), spread([np.max(f["probe"]) for f in found]),
            *used, count(map(circuit_name, found)), same]


def per_fact(groups):
    """How many compositions a new fact needs as each hop: k trained for each, at both hops. At
    8 no new + old is left to ask: with a fifth of the old facts kept, a new one has no more."""
    yield ["k", "steps", "new + old", "old + new", "new + new", "r2 alone"]
    for length in ("small", "flat"):
        for k in (0, 1, 2, 4, 8):
            runs = groups.get(f"tune/{length}_natural_grokked" + (f"_k{k}" if k else ""), [])
            runs = [until(run, 2000) for run in runs]
            if runs:
                yield [k, runs[0].history[-1]["step"], *(end(runs, split) for split in SERVED),
                       " / ".join(by_r2(runs[0]))]


def growth(groups):
    """Steps to fit and to OOD answers against the number of entities, and what a step takes, beside
    other runs: the median between two evaluations. The rule for the width D in small's conditions
    was fitted at 40 and 100 entities; 70 and 200 test it. At 500 the run ends with most facts
    learned, and no composition."""
    yield ["run", "entities", "D", "D by rule", "seeds", "steps", "ms a step", "training >= .99",
           "OOD answer >= .5", "OOD answer >= .95", "OOD answer"]
    for name, runs in sorted(groups.items(), key=entities):
        about, ends = runs[0].about, [run.history[-1] for run in runs]
        size = about["world"]["n_entities"]
        rule = f"{width_for(size):.0f}" if about["preset"] == "small" else ""
        yield [name, size, about["model"]["d_model"], rule, len(runs),
               spread([end["step"] for end in ends], 0),
               spread(list(map(step_time, runs)), 0),
               *(steps_to(runs, level, split)
                 for level, split in ((0.99, "train_inferred"), (0.5, "test_ood"),
                                      (0.95, "test_ood"))),
               spread([end["accuracy"]["test_ood"] for end in ends])]


def step_time(run):
    """Milliseconds a step: the median between two evaluations, as a run may have been paused."""
    steps = np.diff([0, *(line["step"] for line in run.history)])
    seconds = np.diff([0, *(line["seconds"] for line in run.history)])
    return 1000 * np.median(seconds / steps)


def width_for(n_entities):
    """The rule for the width D of `small` in a larger world: a power of the number of entities,
    through 96 at 40 and 192 at 100. The other sizes test it."""
    return 96 * (n_entities / 40) ** 0.756


def entities(item):
    return item[1][0].about["world"]["n_entities"], item[0]


# ---------------------------------------------------------------- the verdicts
def verdicts(groups):
    """A row a claim of the paper: its value, ours (means of seeds), verdict, why, the command."""
    yield ["claim", "paper, one run", "here", "verdict", "why", "command"]
    natural, second = groups["small/natural"], groups["small/second_full"]
    both = groups["small/both_full"]
    yield ["Full supervision gets there sooner", "answer .9 at 37k steps, natural never",
           f"{steps_to(both, 0.9)} steps; natural {steps_to(groups['long/natural'], 0.9)} by "
           "15,000", "holds",
           "the paths are alike", "--preset small --regime both_full"]
    for run in natural + second + both:
        if run.paths is None:
            raise Absent(f"paths.json in {run.folder}")
    yield ["Natural: training, then bridge, then answer", "106k, .5 at 219k, .5 at 396k",
           f"{steps_to(natural, 0.99, 'train_inferred')}, by a probe .5 at "
           f"{reached(frames_of(natural), 'probe', 0.5)}, .25 at {steps_to(natural, 0.25)}",
           "holds", "but the lens, which the paper uses, sees none here",
           "--preset small --steps 7000"]
    yield ["Fake grokking: answers, bridge not seen", "answer .97, bridge .65",
           f"answer {end(second, 'test_ood')}, bridge {end(second, 'test_ood', 'any')} (chance "
           f"{np.mean([last(run, 'test_ood', 'any_chance') for run in second]):.2f})", "holds",
           "as the lens sees it; but here in every regime",
           "--preset small --regime second_full"]
    yield ["... so no bridge is used", "no intervention",
           f"used: by code {used(second, 'code')}, by donor {used(second, 'other_r2')}",
           "differs", f"among the entities the lens sees {inside_lens(second)}", "analyze.py RUN"]
    yield ["The answer comes before the bridge: both_full", "37k steps, answer .92, bridge .003",
           f"at the fit: answer {at_fit(both)}, bridge {at_fit(both, 'any')}", "holds",
           f"by the lens; a probe reads {read_at_fit(both)} then", "--regime both_full"]
    yield ["ID queries: the same path before and after", "argued",
           f"maps alike {path_like(natural, 'before ID', 'grokked ID')}, ID and OOD "
           f"{path_like(natural, 'grokked ID', 'grokked OOD')}", "holds",
           "shuffled sites: see the table; OOD queries join the path", "extras.tables"]
    yield ["Grokking folds OOD facts into the ID path", "argued",
           f"swaps by code to OOD facts: {to_ood(natural, 'before')} before, "
           f"{to_ood(natural, 'grokked')} grokked", "holds",
           "naturally trained: see what a swap asks for", "-m extras.facts RUN"]
    yield from more_verdicts(groups)


def frames_of(runs):
    """What each of these runs was filmed to hold."""
    for run in runs:
        if not (run.folder / "frames.npz").exists():
            raise Absent(f"frames.npz in {run.folder}")
    return [read_frames(run.folder / "frames.npz") for run in runs]


def facts_of(run, stage, name):
    """What extras.facts measured under this name."""
    found = (read_json(run.folder / "facts.json") or {}).get(stage, {})
    if name not in found:
        raise Absent(f"{name} of {stage} in facts.json of {run.folder}")
    return found[name]


def more_verdicts(groups):
    """The rows on half supervision, new facts and the ordinary transformer."""
    tune = "grok.py --preset tune --start RUN"
    yield ["Half supervision is no substitute", "answer .48",
           f"answer {end(groups['small/both_half'], 'test_ood')}", "differs",
           "half helps half: see the four cells", "--regime both_half"]
    yield ["First hop alone collapses late", ".98, then .22",
           f"answer {end(groups['small/first_full'], 'test_ood')}", "open",
           "a run 50 times as long would decide", "--regime first_full"]
    yield ["New facts serve hop 1 only, from grokked: 500 steps", "new + old 1.0, old + new 0",
           new_facts(groups["tune/small_natural_grokked"]), "differs",
           "later the old facts kept decide: next row", tune]
    yield ["... or mostly, at length, a fifth of the old facts kept", "new + old 1.0, old + new 0",
           new_facts(groups["tune/flat_natural_grokked"], late), "holds",
           "beyond what r2 alone gives, too, on average", f"{tune} --steps 6000"]
    guess = {tuple(row[:2]): row[2:4] for row in r2_alone(groups)}
    ours, theirs = guess["small", "as in tune"], guess["paper", "220, with all compositions"]
    yield ["... more often than r2 alone tells", "its control, from scratch: .31",
           f"r2 alone: new + old {ours[0]}, old + new {ours[1]}", "holds",
           "on average, at length; not in every run", "extras.tables"]
    yield ["... so in the paper", "new + old 1.0 thrice, .53, .33; control .31",
           f"r2 alone, as its code keeps facts: {theirs[0]}", "open",
           "three starts are beyond it, three not; 16 to 36 queries", "extras.tables"]
    yield ["... and from the weights before grokking", "the same, not tried",
           new_facts(groups["tune/small_natural_before"]), "holds",
           "the paper's direction, before grokking", f"{tune} --weights before"]
    yield ["... and with loop 3 graded, too, while fine-tuning", "the same, not tried",
           new_facts(groups["tune/early_natural_grokked"]), "holds",
           "r2 must show its token where hop 2 is", f"{tune} --min-loops 3"]
    yield ["... from second hop supervised, two blocks in turn", "new + old .33, old + new 0",
           new_facts(groups["tune/dial_two_blocks"]), "holds", "the paper has two blocks",
           f"{tune}, of --n-blocks 2"]
    yield ["... from second hop supervised, four scratch slots", "new + old .33, old + new 0",
           new_facts(groups["tune/dial_slots"]), "differs", "the paper has sixteen",
           f"{tune}, of --slots 4"]
    yield ["An ordinary transformer fails", "near chance",
           f"answer {end(groups['tiny/own_blocks_last_loop'], 'test_ood')}, shared "
           f"{end(groups['tiny/last_loop'], 'test_ood')}", "holds",
           "not if loops 2 to 4 are graded", "--n-blocks 4 --min-loops 4"]


def short_verdicts(groups):
    """The rows that the README begins with, as lines of Markdown."""
    rows = [*verdicts(groups)]
    return [narrow(rows[i][:4]) for i in (1, 2, 7, 3, 4, 10)]


def narrow(row):
    """A line of Markdown in which "1 to 2" is "1–2"."""
    return re.sub(r"(\d) to (\d)", r"\1–\2", markdown(row))


def end(runs, split, lens=None):
    """What `last` finds, over seeds; "" if there is none of it."""
    shares = [last(run, split, lens) for run in runs]
    return spread(shares) if any(share is not None for share in shares) else ""


def steps_to(runs, level, split="test_ood", lens=None):
    return spread([first_step(run.history, level, split, lens) for run in runs], 0)


def at_fit(runs, lens=None):
    """OOD answer, or a lens rate of OOD queries, at the first evaluation with training >= .99."""
    shares = []
    for run in runs:
        step = first_step(run.history, 0.99, "train_inferred")
        line = next(line for line in run.history if line["step"] == step)
        shares.append((line["lens"] if lens else line["accuracy"])["test_ood"])
        if lens:
            shares[-1] = shares[-1][lens]
    return spread(shares)


def read_at_fit(runs):
    """The bridge of OOD queries as a probe reads it at the best site, by the weights at the fit."""
    return spread([np.max(run.paths["before"]["test_ood"]["probe"]) for run in runs])


def used(runs, kind):
    return most([run.paths["grokked"]["test_ood"] for run in runs], kind)


def inside_lens(runs):
    """How often the bridge is the lens's first entity at one site, OOD queries, grokked."""
    return spread([entity_seen(run.paths["grokked"]["test_ood"]) for run in runs])


def to_ood(runs, stage):
    """Share of swaps by code, in ID queries, that redirect to an OOD fact: see `swaps`."""
    found = [facts_of(run, stage, "swapped")["test_id"]["code"] for run in runs]
    return spread([shares[1] for shares in found if shares])


def path_like(runs, one, two):
    return alike_all(within([swaps_of(run) for run in runs], one, two))


def new_facts(runs, share=last):
    hop1 = spread([share(run, "new_old") for run in runs])
    hop2 = spread([share(run, "old_new") for run in runs])
    return f"new + old {hop1}, old + new {hop2}"


def markdown(row):
    return "| " + " | ".join(map(str, row)) + " |"


# ---------------------------------------------------------------- is it worthwhile?
def worth(groups):
    """What the wait costs and buys: starts of `small`, 500 steps on new facts, .21 of old ones."""
    yield ["start", "steps", "extra compositions", "OOD answer", "new + old", "old + new",
           "new + new"]
    for regime, weights, long in (("natural", "before", ""), ("natural", "grokked", ""),
                                  ("natural", "grokked", "long"), ("both_full", "before", ""),
                                  ("both_full", "grokked", ""), ("both_full", "grokked", "long"),
                                  ("both_half", "grokked", "")):
        runs = groups[f"{long or 'small'}/{regime}"]
        tuned = groups[f"tune/{long or 'small'}_{regime}_{weights}"]
        steps = steps_to(runs, 0.99, "train_inferred") if weights == "before" else spread(
            [run.history[-1]["step"] for run in runs[:1]], 0)
        answer = at_fit(runs) if weights == "before" else end(runs, "test_ood")
        yield [f"{regime}, {weights}", steps, extra_compositions(runs[0]), answer,
               *(end(tuned, split) for split in SERVED)]
    yield ["r2 alone", "", "", "", *by_r2(groups["tune/small_natural_grokked"][0])]


def extra_compositions(run):
    """How many compositions with an OOD fact the regime adds to training."""
    world = build_data(run.about, run.folder)[1]["train_inferred"]
    natural = build_data({**run.about, "regime": "natural"}, run.folder)[1]["train_inferred"]
    return len(world.h) - len(natural.h)


def worth_lines(groups):
    """The README's table, without new + new, as lines of Markdown."""
    head, *rows = [row[:-1] for row in worth(groups)]
    chosen = [rows[i] for i in (0, 1, 3, 5, 7)]
    return [narrow(row) for row in (head, ["---"] * len(head), *chosen)]


# ---------------------------------------------------------------- the page
INTRODUCTION = """# Every run and every number

Written whole by `python -m extras.tables -o runs/shipped/README.md` from the files in this folder;
a test compares. A cell is the mean over seeds (least to most), "2 never" counts seeds that did not
get there. Shares are of up to 500 queries a split and seed, by averaged weights, at the last step;
what is inside was measured on another sample of 500. Anywhere: at any state. Chance is the same
rate for another query's bridge. "state (3, r2) (2)" is the site (loop, position), in two seeds.
Probe's subspace, all but that: a swap inside and outside the directions that a probe reads.
`python -m extras.run_all` trains every run, but for those of `python -m extras.graft`. What is
inside is written beside a run: paths.json by `analyze.py`, facts.json by `python -m extras.facts`,
cells.json by `--measure` of this command, frames.npz by `python -m extras.pictures --frames`.
"""


def sections(groups):
    """{title: (its table, of which groups)}, in the order of the page."""
    looked = complete(choose(groups, "small/", "tiny/"), "paths")
    return {
        "Verdicts": (verdicts, groups),
        "The stages (Finding 1)": (stages, choose(groups, "small/", "long/", "tiny/")),
        "The stages with a probe (Finding 1)": (filmed, choose(groups, "small/")),
        "The path of ID and OOD queries (Finding 1)": (likeness, looked),
        "Seen, present, used (Finding 2)": (paths, looked),
        "What a swap asks for (Findings 1, 2)": (swaps, choose(groups, "small/")),
        "Which form of the bridge, regime or seed?": (
            classes, choose(groups, "small/", "classes/", "late/")),
        "The two forms apart": (by_class, choose(groups, "small/", "classes/", "late/")),
        "Which form, first weights or draws?": (draws, choose(groups, "draws/weights")),
        "Which form, which part of the first weights?": (grafts, choose(groups, "graft/")),
        "Half supervision in four cells": (cells, complete(groups, "cells")),
        "The dials": (dials, choose(groups, "dial/", "tune/dial_", "small/second_full",
                                    "tune/small_second_full_grokked")),
        "New facts (Finding 3)": (tuned, choose(groups, "tune/")),
        "What r2 alone gives (Finding 3)": (r2_alone, groups),
        "New facts, the two forms apart (Finding 3)": (new_by_class, groups),
        "Where a fact is looked up (Finding 3)": (lookups, choose(groups, "small/", "dial/",
                                                                  "tune/")),
        "Which hop fails? (Finding 3)": (failing, choose(groups, "tune/")),
        "Where a new fact is written (Finding 3)": (written, choose(groups, "tune/", "fresh/")),
        "Where a new fact is looked up (Finding 3)": (unlearnt, choose(groups, "tune/")),
        "What is graded, and new facts (Finding 3)": (earlier, groups),
        "New facts with a part drawn afresh (Finding 3)": (fresh, groups),
        "New facts at length (Finding 3)": (at_length, groups),
        "How many compositions a new fact needs (Finding 3)": (per_fact, groups),
        "Is it worthwhile?": (worth, groups),
        "Larger worlds": (growth, choose(groups, "growth/", "tiny/natural", "small/both_full"))}


def page(root):
    """Lines of runs/shipped/README.md."""
    yield from INTRODUCTION.splitlines()
    for title, (table, chosen) in sections(read_groups(root)).items():
        try:
            head, *rows = table(chosen)
        except Absent as missing:
            yield from ["", f"Left out, as there is no {missing}: {title}."]
            continue
        if rows:
            yield from ["", f"## {title}", "", " ".join(table.__doc__.split()), ""]
            for row in (head, ["---"] * len(head), *rows):
                yield markdown(row)
    for path in sorted(Path(root).glob("*.txt")):
        yield from ["", f"## {path.stem}", "", "```",
                    *path.read_text(encoding="utf-8").splitlines(), "```"]


def complete(groups, what):
    """The groups of whose every run there is "paths", or "cells"."""
    return {name: runs for name, runs in groups.items() if all(map(attrgetter(what), runs))}


def choose(groups, *starts):
    """The groups whose names begin with one of these."""
    return Groups((name, runs) for name, runs in groups.items() if name.startswith(starts))


def main(argv=None):
    """Print the tables of all runs below a folder; exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="extras.tables", description=main.__doc__)
    parser.add_argument("root", nargs="?", default="runs/shipped", help="(runs/shipped)")
    parser.add_argument("-o", help="a file to write them to")
    parser.add_argument("--measure", action="store_true", help="first write missing cells.json")
    given = parser.parse_args(argv)
    try:
        if given.measure:
            measure_cells(given.root)
        lines = [*page(given.root)]
        if given.o:
            write_file(Path(given.o), ("\n".join(lines) + "\n").encode())
        else:
            say("\n".join(lines))
    except (BadInput, OSError) as error:
        print(f"extras.tables: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
