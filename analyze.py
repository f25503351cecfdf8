"""Looking inside a trained model: the logit lens reads its values, patching moves them.

    python analyze.py RUN...     lens, probe and patching of every run in these folders: paths.json
                                 and figures beside its metrics

A site is (loop, part, position); part 0 is what was mixed in that loop, part 1 the state after it.
The lens asks what a site *shows* (paper, Section 4), a probe what is *present*, patching what is
*used* (after Wang et al. 2024, who count changed answers; here the answer must become the one that
the donor's bridge predicts, an interchange intervention). All of it goes through the model's one
`edit`. Words: values (n_loops, 2, N, T, D) hold every site of N queries, maps (n_loops, 2, T).
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from data import BadInput
from grok import (lens_rates, load_run, read_run, run_values, say, to_tokens, WEIGHTS,
                  write_file)

PARTS, POSITIONS = ("mixed", "state"), ("h", "r1", "r2", "answer")
EXAMINED = {"test_id": "ID", "test_ood": "OOD"}
BATCH = 512  # queries at a time: bounds the memory at any size of world and model


@torch.no_grad()
def predict(model, tokens):
    """The model's answers (N,) to tokens (N, T)."""
    return torch.cat([model(part).argmax(-1) for part in tokens.split(BATCH)])


@torch.no_grad()
def values_of(model, tokens):
    """The values at every site, (n_loops, 2, N, T, D), for tokens (N, T)."""
    return torch.cat([run_values(model, part) for part in tokens.split(BATCH)], 2)


# ---------------------------------------------------------------- what a site shows
@torch.no_grad()
def logit_lens(model, tokens, first=None):
    """Top-1 token at every site, (n_loops, 2, N, T): the paper's lens. With `first` only so many
    tokens compete: with n_entities the entities, so that a site's own token cannot drown them."""
    return torch.cat([model.unembed(run_values(model, part))[..., :first].argmax(-1)
                      for part in tokens.split(BATCH)], 2)


def lens(model, tokens, bridges, answers, n_entities):
    """{part: {"bridge", "answer", "entity" (the bridge among the entities): lens_rates, and with
    "_chance" that of the query before, so the queries must come in random order}}."""
    top, among, found = logit_lens(model, tokens), logit_lens(model, tokens, n_entities), {}
    for i, part in enumerate(PARTS):
        found[part] = {}
        for name, shown, wanted in (("bridge", top, bridges), ("entity", among, bridges),
                                    ("answer", top, answers)):
            found[part][name] = lens_rates(shown[:, i], wanted)
            found[part][name + "_chance"] = lens_rates(shown[:, i], wanted.roll(1))
    return found


# ---------------------------------------------------------------- what is present
def fit(model, tokens, targets, ridge=1.0):
    """Ridge regression at every site, in closed form: weights (n_loops, 2, T, D + 1, K) from the
    values of tokens (N, T), and a constant 1, to targets (N, K)."""
    gram = moment = 0
    for part, wanted in zip(tokens.split(BATCH), targets.split(BATCH)):
        x = with_one(values_of(model, part))                            # (n_loops, 2, T, B, D + 1)
        gram, moment = gram + x.mT @ x, moment + x.mT @ wanted
    return torch.linalg.solve(gram + ridge * torch.eye(gram.shape[-1]), moment)


def read(model, tokens, weights):
    """What the weights of `fit` make of the values of tokens: (n_loops, 2, T, N, K)."""
    return with_one(values_of(model, tokens)) @ weights


def with_one(values):
    """Values (n_loops, 2, N, T, D) -> (n_loops, 2, T, N, D + 1): a site's queries side by side."""
    return torch.nn.functional.pad(values, (0, 1), value=1.0).transpose(2, 3)


def subspace(weights):
    """Orthonormal basis (n_loops, 2, T, D, k) of the directions by which the probe's weights tell
    entities apart: k is at most K - 1, for a constant added to all scores tells nothing."""
    scores = weights[..., :-1, :]                                       # without the constant
    scores = scores - scores.mean(-1, keepdim=True)
    basis, size, _ = torch.linalg.svd(scores, full_matrices=False)
    return basis * (size > 1e-4 * size.amax(-1, keepdim=True))[..., None, :]


# ---------------------------------------------------------------- what is used
def patch(model, tokens, new):
    """Logits (B, V) on tokens (B, T) with values put in: new = {site: (B, D)}."""
    def edit(loop, part, value):
        for (at, where, position), put in new.items():
            if (at, PARTS[where]) == (loop, part):
                value = value.clone()
                value[:, position] = put
        return value
    return model(tokens, edit=edit)


@torch.no_grad()
def patch_map(model, tokens, new, predicted):
    """Put new[site] into the runs on tokens (N, T), one site at a time; new as `values_of`.

    Returns {"n", "redirected", "changed", "unchanged"}: maps of the share of answers that become
    the predicted one (N,), another one, or stay. Without queries, {"n": 0} alone.
    """
    if len(tokens) == 0:
        return {"n": 0}
    usual, counts = predict(model, tokens), torch.zeros(3, *new.shape[:2], new.shape[3])
    for site in np.ndindex(*counts.shape[1:]):
        loop, part, position = site
        for rows in torch.arange(len(tokens)).split(BATCH):
            put = {site: new[loop, part, rows, position]}
            got = patch(model, tokens[rows], put).argmax(-1)
            hit, same = got == predicted[rows], got == usual[rows]
            counts[(slice(None), *site)] += torch.stack([hit, ~hit & ~same, ~hit & same]).sum(1)
    names = ("redirected", "changed", "unchanged")
    return {"n": len(tokens), **dict(zip(names, (counts / len(tokens)).tolist()))}


def inside(clean, donor, basis):
    """The clean values with their part in a subspace made the donor's; basis (..., T, D, k) is
    orthonormal. Swapped arguments give the rest: inside(donor, clean, basis)."""
    difference = (donor - clean).transpose(2, 3)                        # (n_loops, 2, T, N, D)
    return clean + (difference @ basis @ basis.mT).transpose(2, 3)


def codes(model, tokens, bridges, n_entities):
    """Each entity's mean value over the queries whose bridge it is, (n_loops, 2, E, T, D): all that
    a site carries of the bridge and of nothing else, if what it carries adds up."""
    which = torch.nn.functional.one_hot(bridges, n_entities).float()                    # (N, E)
    which = which / which.sum(0).clamp(min=1)
    return torch.einsum("lpntd,ne->lpetd", values_of(model, tokens), which)


def visible(clean, donor, direction):
    """The clean values with their part along direction (N, D) made the donor's: the difference of
    the two bridges' unembedding vectors, which is what the lens reads."""
    unit = (direction / direction.norm(dim=-1, keepdim=True))[:, None]  # (N, 1, D)
    return clean + ((donor - clean) * unit).sum(-1, keepdim=True) * unit


def noise(donor):
    """Random values of the donors' norms: break the run, should redirect nothing."""
    random = torch.randn(donor.shape, generator=torch.Generator().manual_seed(0))
    return random * donor.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------- donors
def right_only(model, world, asked):
    """Those of the Queries that the model answers rightly."""
    tokens, answers = to_tokens(asked, world, model.config.layout)
    return asked.take((predict(model, tokens) == answers).numpy())


def pick_donors(clean, pool, allowed, rng):
    """For each clean query a random one of the pool that `allowed` (N, P) permits: (clean, donors);
    a clean query without a donor is left out."""
    found = allowed.any(1) if allowed.size else np.zeros(len(clean.h), bool)
    donor = (allowed * rng.random(allowed.shape))[found].argmax(1) if found.any() else []
    return clean.take(found), pool.take(np.array(donor, int))


def pairs(clean, pool):
    """The columns of clean (N, 1) and of pool (P,): compared, they give (N, P)."""
    return clean.take(np.s_[:, None]), pool


def swap(clean, pool, rng):
    """Donors with the same r2, another bridge and answer: the answer should be the donor's."""
    c, d = pairs(clean, pool)
    clean, donor = pick_donors(clean, pool, (c.r2 == d.r2) & (c.b != d.b) & (c.t != d.t), rng)
    return clean, donor, donor.t


def other_r2(world, clean, pool, rng):
    """Donors with another r2 too: a value that carries the bridge b' alone gives the tail of
    (b', r2), which is neither query's own answer; one that carries the answer gives the donor's."""
    c, d = pairs(clean, pool)
    t = tail(world, d.b, c.r2)                                          # (N, P)
    allowed = (c.r2 != d.r2) & (c.b != d.b) & (c.t != d.t) & (t >= 0) & (t != c.t) & (t != d.t)
    clean, donor = pick_donors(clean, pool, allowed, rng)
    return clean, donor, tail(world, donor.b, clean.r2)


def same_bridge(clean, pool, rng):
    """Donors with the same bridge, another r2 and answer: no change where b alone is carried; the
    donor's answer where the answer is."""
    c, d = pairs(clean, pool)
    allowed = (c.b == d.b) & (c.r2 != d.r2) & (c.t != d.t) & ((c.h != d.h) | (c.r1 != d.r1))
    clean, donor = pick_donors(clean, pool, allowed, rng)
    return clean, donor, donor.t


def tail(world, head, relation):
    """Tails of the facts (head, relation), -1 where there is none."""
    fact = world.index[head, relation]
    return np.where(fact >= 0, world.facts[fact, 2], -1)


def corrupt(model, world, clean, rng):
    """Clean queries with h replaced at random and the answer lost, into which the clean values are
    put back: the answer should return (causal tracing of Meng et al. 2022, ROME)."""
    moved = (clean.h + rng.integers(1, world.n_entities, len(clean.h))) % world.n_entities
    tokens, answers = to_tokens(clean._replace(h=moved), world, model.config.layout)
    lost = (predict(model, tokens) != answers).numpy()
    return clean._replace(h=moved).take(lost), clean.take(lost), clean.t[lost]


# ---------------------------------------------------------------- inference paths of a run
def inference_path(model, world, splits, n=500, most=2000):
    """{split: {"n", "lens", "probe", "translated", "patch", "pair"}} of ID and OOD queries.

    Up to n random ones for lens and probe, which is fitted on up to `most` ID queries that nothing
    else uses; up to n answered rightly for patching, with donors from up to `most` of the split.
    """
    rng, layout = np.random.default_rng(0), model.config.layout
    order = {split: rng.permutation(len(splits[split].h)) for split in EXAMINED}
    half = len(order["test_id"]) // 2
    known = splits["test_id"].take(order["test_id"][half:][:most])
    asked = {"test_id": splits["test_id"].take(order["test_id"][:half][:most]),
             "test_ood": splits["test_ood"].take(order["test_ood"][:most])}
    right = {split: right_only(model, world, asked[split]) for split in EXAMINED}
    known_tokens, bridges = to_tokens(known, world, layout)[0], torch.from_numpy(known.b)
    probe = fit(model, known_tokens, torch.eye(world.n_entities)[bridges])
    map_to_tokens = fit(model, known_tokens, model.vectors()[bridges])
    code = codes(model, known_tokens, bridges, world.n_entities)
    path = {}
    for split, other in (("test_id", "test_ood"), ("test_ood", "test_id")):
        some = asked[split].take(slice(n))
        tokens, answers = to_tokens(some, world, layout)
        b = torch.from_numpy(some.b)
        path[split] = {
            "n": len(b), "lens": lens(model, tokens, b, answers, world.n_entities),
            "probe": means(read(model, tokens, probe).argmax(-1) == b),
            "translated": means(model.unembed(read(model, tokens, map_to_tokens)).argmax(-1) == b),
            "patch": patches(model, world, right[split], right[other], subspace(probe), code, n),
            "pair": pair_of_states(model, world, right[split], n)}
    return path


def patches(model, world, pool, other, basis, code, n):
    """Every kind of patch at every site, {kind: patch_map}, for up to n of the Queries `pool`;
    "across" takes its donors from the Queries `other`."""
    rng, clean, vector, maps = np.random.default_rng(0), pool.take(slice(n)), model.vectors(), {}
    for kind, (queries, donor, predicted) in {
            "swap": swap(clean, pool, rng), "same_bridge": same_bridge(clean, pool, rng),
            "restore": corrupt(model, world, clean, rng),
            "across": other_r2(world, clean, other, rng)}.items():
        tokens, _, theirs = prepared(model, world, queries, donor)
        maps[kind] = patch_map(model, tokens, theirs, torch.from_numpy(predicted))
    queries, donor, predicted = other_r2(world, clean, pool, rng)
    tokens, ours, theirs = prepared(model, world, queries, donor)
    direction = vector[donor.b] - vector[queries.b]
    for kind, new in {"other_r2": theirs, "visible": visible(ours, theirs, direction),
                      "inside": inside(ours, theirs, basis), "noise": noise(theirs),
                      "outside": inside(theirs, ours, basis),
                      "code": ours + code[:, :, donor.b] - code[:, :, queries.b]}.items():
        maps[kind] = patch_map(model, tokens, new, torch.from_numpy(predicted))
    return maps


def prepared(model, world, clean, donor):
    """Tokens of the clean queries, their values, the donors' values."""
    tokens, donor_tokens = (to_tokens(q, world, model.config.layout)[0] for q in (clean, donor))
    return tokens, values_of(model, tokens), values_of(model, donor_tokens)


def pair_of_states(model, world, pool, n):
    """Is it a bridge that the states at h and r1 hold together, or the question that leads to it?

    For each loop both states come from other runs. "one": one donor with another r2 (the share that
    goes to the tail of its bridge). "two": h's from a donor A and r1's from a donor B with A's
    bridge; then the answer is the tail of that bridge ("bridge"), or of what the fact (h of A, r1
    of B) says ("question"). {"one", "bridge", "question": shares, one a loop; "n", "n_two"}.
    """
    rng, clean = np.random.default_rng(0), pool.take(slice(n))
    first, a, to_bridge = other_r2(world, clean, pool, rng)
    one = pair_swap(model, world, first, a, a)
    c, d = pairs(a, pool)
    same = (c.b == d.b) & (c.h != d.h) & (c.r1 != d.r1)
    mixed = tail(world, c.h, d.r1)                                      # what A and B ask together
    allowed = same & (mixed >= 0) & (mixed != c.b)
    found = allowed.any(1) if allowed.size else np.zeros(len(a.h), bool)
    two, a_two = first.take(found), a.take(found)
    _, b = pick_donors(a, pool, allowed, rng)
    asked = tail(world, tail(world, a_two.h, b.r1), two.r2)             # (N_two,)
    both = pair_swap(model, world, two, a_two, b)
    bridge = to_bridge[found]
    apart = (asked >= 0) & (asked != bridge) & (asked != two.t)
    return {"n": len(first.h), "n_two": int(apart.sum()),
            "one": means(one == to_bridge), "bridge": means((both == bridge)[:, apart]),
            "question": means((both == asked)[:, apart])}


def pair_swap(model, world, clean, at_h, at_r1):
    """Answers (n_loops, N) with h's state from at_h and r1's from at_r1, after each loop in turn."""
    tokens, _ = to_tokens(clean, world, model.config.layout)
    _, first, second = prepared(model, world, at_h, at_r1)
    got = np.full((len(first), len(tokens)), -1)
    for loop in range(len(first) if len(tokens) else 0):
        new = {(loop, 1, 0): first[loop, 1, :, 0], (loop, 1, 1): second[loop, 1, :, 1]}
        got[loop] = patch(model, tokens, new).argmax(-1).numpy()
    return got


def means(right):
    """Means over the queries, the last axis, as nested lists; None without queries."""
    return np.asarray(right).mean(-1).tolist() if right.shape[-1] else None


# ---------------------------------------------------------------- what the maps say
def map_at(found, kind, outcome="redirected"):
    """A map of one kind of patch as an array (n_loops, 2, T), zeros where nothing was measured."""
    maps = found["patch"][kind]
    return np.asarray(maps[outcome]) if maps["n"] else np.zeros_like(found["probe"])


def circuit(found, least=0.5):
    """Where the bridge is used: (part, loop, position, share) of the site where a donor with another
    r2, or the bridge's code alone, redirects most, states first; ("spread", None, None, share) if
    none redirects `least`."""
    used = np.maximum(map_at(found, "other_r2"), map_at(found, "code"))
    for part in (1, 0):
        loop, position = np.unravel_index(used[:, part].argmax(), used[:, part].shape)
        if used[loop, part, position] >= least:
            return PARTS[part], int(loop), int(position), float(used[loop, part, position])
    return "spread", None, None, float(used.max())


def trace(model, world, query):
    """Lines that follow one query (Queries of one row): the top-1 token at every site."""
    names = [*world.entity_names, *world.relation_names, "_"]
    tokens, _ = to_tokens(query, world, model.config.layout)
    h, r1, r2 = (names[token] for token in tokens[0, :3])
    lines = [f"({h}, {r1}) is the bridge {names[query.b[0]]}, ({names[query.b[0]]}, {r2}) is "
             f"{names[query.t[0]]}: top-1 token at each site"]
    lines.append(f"{'loop':<6}{'part':<8}" + "".join(f"{p:<10}" for p in places(tokens.shape[1])))
    for (loop, part), row in zip(np.ndindex(99, 2), logit_lens(model, tokens)[..., 0, :].flatten(0, 1)):
        lines.append(f"{loop + 1:<6}{PARTS[part]:<8}" + "".join(f"{names[t]:<10}" for t in row))
    return lines


def places(n):
    """Names of n positions: the tokens, then scratch slots."""
    return [*POSITIONS, *(f"slot {i}" for i in range(1, 65))][:n]


# ---------------------------------------------------------------- figures of one run
def plot_maps(paths, part, title):
    """What is seen, present and used at each site of one part: a row a stage and split."""
    columns = {"seen: bridge is top-1": "bridge", "seen among entities": "entity",
               "present: a probe reads it": "probe", "used: a donor redirects": "other_r2",
               "used: its code redirects": "code", "donor of the same bridge": "same_bridge"}
    rows = [(stage, split) for stage in paths for split in EXAMINED]
    figure = Figure((2.1 * len(columns) + 0.6, 1.7 * len(rows) + 0.8), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for (stage, split), line in zip(rows, grid):
        line[0].set_ylabel(f"{EXAMINED[split]}, {stage}\nloop", fontsize=8)
        for (name, kind), axes in zip(columns.items(), line):
            found = paths[stage][split]
            n, values = panel(found, kind, part)
            axes.set_title(f"{name}\nn = {n}" if n else f"{name}\ntoo few", fontsize=7)
            draw_map(axes, values)
    figure.suptitle(title, fontsize=9)
    return figure


def panel(found, kind, part):
    """(n, map (n_loops, T)) of a column of `plot_maps`."""
    if kind in ("bridge", "entity"):
        return found["n"], found["lens"][PARTS[part]][kind]["map"]
    if kind == "probe":
        return found["n"], np.asarray(found["probe"])[:, part]
    return found["patch"][kind]["n"], map_at(found, kind)[:, part]


def draw_map(axes, values):
    """A map (n_loops, T) in numbers and shades; its last site, the output, is hatched."""
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    for (loop, position), value in np.ndenumerate(np.asarray(values)):
        axes.text(position, loop, f"{value:.2f}", ha="center", va="center", fontsize=8,
                  color="white" if value > 0.6 else "black")
    width, height = len(values[0]), len(values)
    axes.fill_between([width - 1.5, width - 0.5], height - 1.5, height - 0.5, hatch="//",
                      facecolor="none", edgecolor="0.6", linewidth=0)
    axes.set_xticks(range(width), places(width), fontsize=8)
    axes.set_yticks(range(len(values)), range(1, len(values) + 1), fontsize=8)


# ---------------------------------------------------------------- the command line
def analyze_run(folder):
    """Measure one run: paths.json and a figure for each part into its folder."""
    about, _ = read_run(folder)
    paths = {}
    for stage, file in WEIGHTS.items():
        if (folder / file).exists():
            model, world, splits = load_run(folder, stage)
            if min((len(splits[split].h) for split in EXAMINED if split in splits), default=0) < 2:
                raise BadInput(f"{folder}: too few ID or OOD compositions to look into")
            paths[stage] = inference_path(model, world, splits)
            for split in EXAMINED:
                report(stage, split, paths[stage][split])
    if not paths:
        raise BadInput(f"{folder}: holds no weights")
    write_file(folder / "paths.json", json.dumps(paths).encode())
    for part, name in enumerate(PARTS):
        title = "{preset}, {regime}, seed {model[seed]}: ".format(**about) + name
        plot_maps(paths, part, title).savefig(folder / f"{name}.png", dpi=130)


def report(stage, split, found):
    """One line on a stage and split of a run: seen, present, used."""
    seen, (part, loop, position, used) = found["lens"]["state"], circuit(found)
    where = part if loop is None else f"{part} ({loop + 1}, {places(99)[position]})"
    say(f"{EXAMINED[split]}, {stage}: bridge seen anywhere {seen['bridge']['any']:.2f} (chance "
        f"{seen['bridge_chance']['any']:.2f}), at one site {seen['bridge']['best']:.2f}, among the "
        f"entities {seen['entity']['best']:.2f}; present {np.max(found['probe']):.2f}; used "
        f"{used:.2f}: {where}")


def main(argv=None):
    """Analyse runs; exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="analyze.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs")
    try:
        for root in parser.parse_args(argv).runs:
            folders = sorted(path.parent for path in root.rglob("config.json"))
            if not folders:
                raise BadInput(f"{root}: holds no run")
            for folder in folders:
                say(f"\n{folder}")
                analyze_run(folder)
    except (BadInput, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
