"""Looking inside a trained model: the logit lens reads its values, patching moves them.

    python analyze.py RUN...     measure every run in these folders: paths.json and two figures

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
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import BadInput
from grok import lens_rates, load_run, read_run, run_values, say, to_tokens, WEIGHTS, write_file

PARTS, POSITIONS = ("mixed", "state"), ("h", "r1", "r2", "answer")
EXAMINED = {"test_id": "ID", "test_ood": "OOD"}
BATCH = 512  # queries at a time


# ---------------------------------------------------------------- what a site shows
@torch.no_grad()
def values_of(model, tokens):
    """The values at every site, (n_loops, 2, N, T, D), for tokens (N, T)."""
    return torch.cat([run_values(model, part) for part in tokens.split(BATCH)], 2)


def logit_lens(model, tokens, first=None):
    """Top-1 token at every site, (n_loops, 2, N, T): the paper's lens. With `first` only so many
    tokens compete: with n_entities the entities, so that a site's own token cannot drown them."""
    return model.unembed(values_of(model, tokens))[..., :first].argmax(-1)


def lens(model, tokens, bridges, answers, n_entities):
    """{part: {"bridge", "answer", "entity" (the bridge among the entities): lens_rates, and with
    "_chance" that of the query before, so the queries must come in random order}}."""
    logits, found = model.unembed(values_of(model, tokens)), {}         # (n_loops, 2, N, T, V)
    top, among = logits.argmax(-1), logits[..., :n_entities].argmax(-1)
    asked = {"bridge": (top, bridges), "entity": (among, bridges), "answer": (top, answers)}
    for i, part in enumerate(PARTS):
        found[part] = {}
        for name, (shown, wanted) in asked.items():
            found[part][name] = lens_rates(shown[:, i], wanted)
            found[part][name + "_chance"] = lens_rates(shown[:, i], wanted.roll(1))
    return found


# ---------------------------------------------------------------- what is present
def fit(model, tokens, targets, ridge=1.0):
    """Ridge regression at every site, in closed form: weights (n_loops, 2, T, D + 1, K) from the
    values of tokens (N, T), and a constant 1, to targets (N, K)."""
    gram = moment = 0
    for part, wanted in zip(tokens.split(BATCH), targets.split(BATCH)):
        x = F.pad(values_of(model, part), (0, 1), value=1.0).transpose(2, 3)  # (..., T, B, D + 1)
        gram, moment = gram + x.mT @ x, moment + x.mT @ wanted
    return torch.linalg.solve(gram + ridge * torch.eye(gram.shape[-1]), moment)


def read(model, tokens, weights):
    """What the weights of `fit` make of the values of tokens: (n_loops, 2, T, N, K)."""
    return F.pad(values_of(model, tokens), (0, 1), value=1.0).transpose(2, 3) @ weights


def subspace(weights):
    """Orthonormal basis (n_loops, 2, T, D, min(D, K)) of the directions by which a probe tells
    entities apart; columns that tell nothing are 0, as a constant added to all scores."""
    scores = weights[..., :-1, :]                                       # without the constant
    basis, size, _ = torch.linalg.svd(scores - scores.mean(-1, keepdim=True), full_matrices=False)
    return basis * (size > 1e-4 * size.amax(-1, keepdim=True))[..., None, :]


# ---------------------------------------------------------------- what is used
@torch.no_grad()
def predict(model, tokens):
    """The model's answers (N,) to tokens (N, T)."""
    return torch.cat([model(part).argmax(-1) for part in tokens.split(BATCH)])


def patch(model, tokens, new):
    """Logits (N, V) on tokens (N, T) with values put in: new = {site: (N, D)}."""
    def edit(loop, part, value):
        for (at, where, position), put in new.items():
            if (at, PARTS[where]) == (loop, part):
                value = value.clone()
                value[:, position] = put
        return value
    return model(tokens, edit=edit)


def patch_map(model, tokens, new, predicted):
    """Put the values `new` (n_loops, 2, N, T, D) into the runs on tokens (N, T), a site at a time:
    {"n", "redirected", "changed", "unchanged"}, maps of the share of answers that become the
    predicted one (N,), another one, or stay. Without queries {"n": 0} alone."""
    if len(tokens) == 0:
        return {"n": 0}
    usual, shares = predict(model, tokens), torch.zeros(3, *new.shape[:2], new.shape[3])
    for loop, part, position in np.ndindex(*shares.shape[1:]):
        put = new[loop, part, :, position]                              # (N, D)
        got = patch(model, tokens, {(loop, part, position): put}).argmax(-1)
        hit, same = got == predicted, got == usual
        outcomes = torch.stack([hit, ~hit & ~same, ~hit & same])        # (3, N)
        shares[:, loop, part, position] = outcomes.float().mean(1)
    return {"n": len(tokens), **dict(zip(("redirected", "changed", "unchanged"), shares.tolist()))}


def inside(clean, donor, basis):
    """The clean values with their part in a subspace made the donor's; basis (..., T, D, k) is
    orthonormal. Swapped arguments give the rest: inside(donor, clean, basis)."""
    difference = (donor - clean).transpose(2, 3)                        # (n_loops, 2, T, N, D)
    return clean + (difference @ basis @ basis.mT).transpose(2, 3)


def visible(clean, donor, direction):
    """The clean values with their part along `direction` (N, D) made the donor's."""
    unit = (direction / direction.norm(dim=-1, keepdim=True))[:, None]  # (N, 1, D)
    return clean + ((donor - clean) * unit).sum(-1, keepdim=True) * unit


def codes(model, tokens, bridges, n_entities):
    """Each entity's mean value over the queries whose bridge it is, (n_loops, 2, E, T, D), 0 for
    one that is none's: the difference of two moves the bridge and nothing else, if what a site
    carries adds up."""
    of = F.one_hot(bridges, n_entities).float()                         # (N, E)
    of = of / of.sum(0).clamp(min=1)
    return sum(torch.einsum("lpntd,ne->lpetd", values_of(model, part), share)
               for part, share in zip(tokens.split(BATCH), of.split(BATCH)))


def noise(donor):
    """Random values of the donors' norms: break the run, should redirect nothing."""
    random = torch.randn(donor.shape, generator=torch.Generator().manual_seed(0))
    return random * donor.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------- donors
def right_only(model, world, asked):
    """Those of the Queries that the model answers rightly."""
    tokens, answers = to_tokens(asked, world, model.config.layout)
    return asked.take((predict(model, tokens) == answers).numpy())


def pairs(clean, pool):
    """The columns of clean (N, 1) and of pool (P,): compared, they give (N, P)."""
    return clean.take(np.s_[:, None]), pool


def pick_donors(clean, pool, allowed, rng):
    """(clean, donors): a random one of those `allowed` (N, P) for each clean query that has any."""
    found = allowed.any(1)
    donor = (allowed * rng.random(allowed.shape))[found].argmax(1) if found.any() else []
    return clean.take(found), pool.take(np.array(donor, int))


def swap(clean, pool, rng):
    """Donors with the same r2, another bridge and answer: the answer should be the donor's."""
    c, d = pairs(clean, pool)
    clean, donor = pick_donors(clean, pool, (c.r2 == d.r2) & (c.b != d.b) & (c.t != d.t), rng)
    return clean, donor, donor.t


def same_bridge(clean, pool, rng):
    """Donors with the same bridge, another r2: only where the answer is carried is it theirs."""
    c, d = pairs(clean, pool)
    allowed = (c.b == d.b) & (c.r2 != d.r2) & (c.t != d.t) & ((c.h != d.h) | (c.r1 != d.r1))
    clean, donor = pick_donors(clean, pool, allowed, rng)
    return clean, donor, donor.t


def other_r2(world, clean, pool, rng):
    """Donors with another r2 too: a value that carries the bridge b' alone gives the tail of
    (b', r2), which is neither query's own answer; one that carries the answer gives the donor's.
    Of OOD queries, too, (b', r2) is most often an ID fact: `swapped` of extras/facts.py."""
    c, d = pairs(clean, pool)
    t = tail(world, d.b, c.r2)                                          # (N, P)
    allowed = (c.r2 != d.r2) & (c.b != d.b) & (c.t != d.t) & (t >= 0) & (t != c.t) & (t != d.t)
    clean, donor = pick_donors(clean, pool, allowed, rng)
    return clean, donor, tail(world, donor.b, clean.r2)


def tail(world, head, relation):
    """Tails of the facts (head, relation), -1 where there is none."""
    fact = world.index[head, relation]
    return np.where(fact >= 0, world.facts[fact, 2], -1)


def corrupt(model, world, clean, rng):
    """Clean queries with h replaced at random and the answer lost, into which the clean values are
    put back: the answer should return (causal tracing of Meng et al. 2022, ROME)."""
    heads = (clean.h + rng.integers(1, world.n_entities, len(clean.h))) % world.n_entities
    moved = clean._replace(h=heads)
    tokens, answers = to_tokens(moved, world, model.config.layout)
    lost = (predict(model, tokens) != answers).numpy()
    return moved.take(lost), clean.take(lost), clean.t[lost]


# ---------------------------------------------------------------- inference paths of a run
def inference_path(model, world, splits, n=500, most=2000):
    """{split: {"n", "lens", "probe", "translated", "patch"}} of ID and OOD queries.
    Up to n random ones for lens, probe and "translated", the lens on a linear map to the bridge's
    unembedding vector; these two and the codes are fitted on other ID queries, up to `most` or 20
    an entity. Up to n answered rightly for patching, with donors from up to `most` of the split."""
    rng, E, paths = np.random.default_rng(0), world.n_entities, {}
    shuffled = {name: splits[name].take(rng.permutation(len(splits[name].h))) for name in EXAMINED}
    half = len(shuffled["test_id"].h) // 2
    known = shuffled["test_id"].take(slice(half, half + max(most, 20 * E)))
    asked = {"test_id": shuffled["test_id"].take(slice(min(half, most))),
             "test_ood": shuffled["test_ood"].take(slice(most))}
    right = {name: right_only(model, world, queries) for name, queries in asked.items()}
    tokens, bridges = to_tokens(known, world, model.config.layout)[0], torch.from_numpy(known.b)
    probe = fit(model, tokens, torch.eye(E)[bridges])
    to_token = fit(model, tokens, model.vectors()[bridges])
    code = codes(model, tokens, bridges, E)
    for split, other in (("test_id", "test_ood"), ("test_ood", "test_id")):
        some = asked[split].take(slice(n))
        tokens, answers = to_tokens(some, world, model.config.layout)
        b = torch.from_numpy(some.b)
        paths[split] = {
            "n": len(b), "lens": lens(model, tokens, b, answers, E),
            "probe": means(read(model, tokens, probe).argmax(-1) == b),
            "translated": means(model.unembed(read(model, tokens, to_token)).argmax(-1) == b),
            "patch": patches(model, world, right[split], right[other], subspace(probe), code, n)}
    return paths


def means(right):
    """Means over the queries, the last axis, as nested lists; None without queries."""
    return torch.as_tensor(right).double().mean(-1).tolist() if right.shape[-1] else None


def prepared(model, world, clean, donor):
    """Tokens of the clean queries, their values, the donors' values."""
    tokens, donor_tokens = (to_tokens(q, world, model.config.layout)[0] for q in (clean, donor))
    return tokens, values_of(model, tokens), values_of(model, donor_tokens)


def patches(model, world, pool, other, basis, code, n):
    """Every kind of patch at every site, {kind: patch_map}, for up to n of the Queries `pool`;
    "across" takes its donors from the Queries `other`."""
    rng, clean, maps = np.random.default_rng(0), pool.take(slice(n)), {}
    whole = {"swap": swap(clean, pool, rng), "same_bridge": same_bridge(clean, pool, rng),
             "restore": corrupt(model, world, clean, rng),
             "across": other_r2(world, clean, other, rng),
             "other_r2": other_r2(world, clean, pool, rng)}
    for kind, (queries, donor, predicted) in whole.items():
        tokens, _, theirs = prepared(model, world, queries, donor)
        maps[kind] = patch_map(model, tokens, theirs, torch.from_numpy(predicted))
    queries, donor, predicted = whole["other_r2"]                       # and parts of its values
    tokens, ours, theirs = prepared(model, world, queries, donor)
    # the lens reads along the bridges' unembedding vectors
    direction = model.vectors()[donor.b] - model.vectors()[queries.b]   # (N, D)
    parts = {"visible": visible(ours, theirs, direction), "inside": inside(ours, theirs, basis),
             "noise": noise(theirs), "outside": inside(theirs, ours, basis),
             "code": ours + code[:, :, donor.b] - code[:, :, queries.b]}
    for kind, new in parts.items():
        maps[kind] = patch_map(model, tokens, new, torch.from_numpy(predicted))
    return maps


# ---------------------------------------------------------------- what the maps say
def map_at(found, kind, outcome="redirected"):
    """A map (n_loops, 2, T) of one split as an array: of a kind of lens, the "probe", or a kind of
    patch, zeros where nothing was measured."""
    if kind in found["lens"]["state"]:
        return np.stack([found["lens"][part][kind]["map"] for part in PARTS], 1)
    if kind == "probe":
        return np.asarray(found["probe"])
    maps = found["patch"][kind]
    return np.asarray(maps[outcome]) if maps["n"] else np.zeros_like(found["probe"])


def circuit(found, least=0.5):
    """Where the bridge is used: (part, loop, position, share) of the state where "other_r2" or
    "code" redirects most; if that is below `least`, of what is mixed; then ("spread", None, None,
    share)."""
    used = np.maximum(map_at(found, "other_r2"), map_at(found, "code"))
    for part in (1, 0):
        loop, position = np.unravel_index(used[:, part].argmax(), used[:, part].shape)
        if used[loop, part, position] >= least:
            return PARTS[part], int(loop), int(position), float(used[loop, part, position])
    return "spread", None, None, float(used.max())


def places(n):
    """Names of n positions: the tokens, then scratch slots."""
    return [*POSITIONS, *(f"slot {i}" for i in range(1, 65))][:n]


# ---------------------------------------------------------------- figures of one run
def plot_maps(paths, part, title):
    """What is seen, present and used at each site of one part: a row a stage and split."""
    columns = {"bridge": "seen: bridge is top-1", "entity": "seen among entities",
               "probe": "present: a probe reads it", "other_r2": "used: a donor redirects",
               "code": "used: its code redirects", "same_bridge": "donor of the same bridge"}
    rows = [(stage, split) for stage in paths for split in EXAMINED]
    figure = Figure((13.2, 1.7 * len(rows) + 0.8), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for (stage, split), line in zip(rows, grid):
        line[0].set_ylabel(f"{EXAMINED[split]}, {stage}\nloop", fontsize=8)
        for (kind, name), axes in zip(columns.items(), line):
            found = paths[stage][split]
            n = found["patch"].get(kind, found)["n"]
            axes.set_title(f"{name}\nn = {n}" if n else f"{name}\ntoo few", fontsize=7)
            draw_map(axes, map_at(found, kind)[:, part])
    figure.suptitle(title, fontsize=9)
    return figure


def draw_map(axes, values):
    """A map (n_loops, T) in numbers and shades; its last site, the output, is hatched."""
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    for (loop, position), value in np.ndenumerate(np.asarray(values)):
        axes.text(position, loop, f"{value:.2f}", ha="center", va="center", fontsize=8,
                  color="white" if value > 0.6 else "black")
    height, width = np.shape(values)
    axes.fill_between([width - 1.5, width - 0.5], height - 1.5, height - 0.5, hatch="//",
                      facecolor="none", edgecolor="0.6", linewidth=0)
    axes.set_xticks(range(width), places(width), fontsize=8)
    axes.set_yticks(range(height), range(1, height + 1), fontsize=8)


# ---------------------------------------------------------------- the command line
def analyze_run(folder):
    """Measure one run: paths.json and a figure for each part into its folder."""
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder}: holds no run")
    about, paths = read_run(folder)[0], {}
    for stage in [stage for stage, file in WEIGHTS.items() if (folder / file).exists()]:
        model, world, splits = load_run(folder, stage)
        if min(len(splits[split].h) if split in splits else 0 for split in EXAMINED) < 4:
            raise BadInput(f"{folder}: too few ID or OOD compositions to look into")
        paths[stage] = inference_path(model, world, splits)
        for split, kind in EXAMINED.items():
            say(f"{kind}, {stage}: {report(paths[stage][split])}")
    if not paths:
        raise BadInput(f"{folder}: holds no weights")
    write_file(folder / "paths.json", json.dumps(paths).encode())
    for part, name in enumerate(PARTS):
        title = "{preset}, {regime}, seed {model[seed]}: ".format(**about) + name
        plot_maps(paths, part, title).savefig(folder / f"{name}.png", dpi=130)


def report(found):
    """How far the bridge is seen, present and used."""
    seen, (part, loop, position, used) = found["lens"]["state"], circuit(found)
    where = part if loop is None else f"{part} ({loop + 1}, {places(99)[position]})"
    return (f"bridge seen anywhere {seen['bridge']['any']:.2f} (chance "
            f"{seen['bridge_chance']['any']:.2f}), among entities {seen['entity']['best']:.2f}; "
            f"present {np.max(found['probe']):.2f}; used {used:.2f}: {where}")


def main(argv=None):
    """Analyse runs; exit status 0, or 2 if one of them cannot be."""
    parser = argparse.ArgumentParser(prog="analyze.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs")
    status = 0
    for root in parser.parse_args(argv).runs:
        for folder in sorted(path.parent for path in root.rglob("config.json")) or [root]:
            try:
                say(f"\n{folder}")
                analyze_run(folder)
            except (BadInput, OSError) as error:  # says so, and goes on to the next
                print(f"analyze.py: {error}", file=sys.stderr)
                status = 2
    return status


if __name__ == "__main__":
    sys.exit(main())
