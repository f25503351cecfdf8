"""Looking inside a trained model: the logit lens reads its states, activation patching moves them.

    python analyze.py [RUN ...]     lens and patching of each run (RUN/paths.json), tables, figures

A site is (loop, position): the state after that loop at that token. The lens asks what a state
*shows* (paper, Section 4: the top-1 token of its unembedding); patching asks what a state *does*
(after Wang et al. 2024, Section 3, who count changed answers; here the answer must become the one
that the donor's bridge predicts). Everything goes through the model's one `edit(loop, state)`.
"""
import itertools
import json
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from data import BadInput, Parser, REGIMES, WorldConfig
from grok import (build_data, Config, load_run, LoopedTransformer, make_exams, milestones,
                  plot_curves, PRESETS, read_run, run_states, save_figure, to_tokens, write_text)

POSITIONS = ("h", "r1", "r2", "answer")
OUTCOMES = ("redirected", "changed", "unchanged")
name_of = lambda site: f"{site[0] + 1}, {POSITIONS[site[1]]}"  # loops are counted from 1 in print
EXAMINED = {"test_id": "ID", "test_ood": "OOD"}
BATCH = 512  # queries at a time: bounds the memory at any size of world and model
COLUMN = np.s_[:, None]  # queries.take(COLUMN) is (N, 1): compared with a pool (P,) it gives (N, P)


@torch.no_grad()
def predict(model, tokens):
    """The model's answers (N,) to tokens (N, T)."""
    return torch.cat([model(part).argmax(-1) for part in tokens.split(BATCH)])


# ---------------------------------------------------------------- logit lens
@torch.no_grad()
def logit_lens(model, tokens):
    """Top-1 token at every site, (n_loops, N, T) int64, for tokens (N, T): the paper's lens."""
    def look(part):  # one loop at a time: never the logits of all sites at once
        return torch.stack([model.unembed(state).argmax(-1) for state in run_states(model, part)])
    return torch.cat([look(part) for part in tokens.split(BATCH)], dim=1)


def lens_rates(top, wanted):
    """Rates at which `wanted` (N,) is the top-1 token in top (n_loops, N, T).
    map: (n_loops, T) share at each site; any: at one site at least (the paper's measure);
    best: at one fixed site, chosen on every other query and scored on the rest."""
    hit = top == wanted[None, :, None]
    choice = hit[:, ::2].float().mean(1)
    site = divmod(choice.argmax().item(), choice.shape[1])
    return {"map": hit.float().mean(1).tolist(), "any": hit.any(2).any(0).float().mean().item(),
            "best": hit[site[0], 1::2, site[1]].float().mean().item(), "best_site": list(site)}


def lens(model, world, asked):
    """lens_rates of bridge and target for Queries, each with its chance level: that of the query
    before it, so the Queries must come in random order."""
    tokens, answers = to_tokens(asked, world, model.config.layout)
    top, bridges = logit_lens(model, tokens), torch.from_numpy(asked.b)
    return {"n": len(tokens),
            "bridge": lens_rates(top, bridges), "bridge_chance": lens_rates(top, bridges.roll(1)),
            "target": lens_rates(top, answers), "target_chance": lens_rates(top, answers.roll(1))}


@torch.no_grad()
def probe(model, world, known, asked, ridge=1.0):
    """Share of the Queries `asked` whose bridge a linear probe reads at each site, (n_loops, T).
    Ridge regression from states to bridges in closed form, fitted on the Queries `known`. Finds
    what is present without being the lens's top-1; says nothing of whether it is used."""
    states = lambda queries: torch.nn.functional.pad(  # and a 1, for the probe's constant
        run_states(model, to_tokens(queries, world, model.config.layout)[0]), (0, 1), value=1.0)
    x = states(known).transpose(1, 2)                                    # (n_loops, T, N, D + 1)
    y = torch.eye(world.n_entities)[known.b]                                              # (N, E)
    gram = x.mT @ x + ridge * torch.eye(x.shape[-1])
    read = (states(asked).transpose(1, 2) @ torch.linalg.solve(gram, x.mT @ y)).argmax(-1)
    return (read == torch.from_numpy(asked.b)).float().mean(-1).tolist()


# ---------------------------------------------------------------- activation patching
def patch(model, tokens, site, state):
    """Logits (B, V) on tokens (B, T) with `state` (B, D) put in at `site` (Wang et al., Sec. 3)."""
    def edit(loop, stream):
        if loop == site[0]:
            stream = stream.clone()
            stream[:, site[1]] = state
        return stream
    return model(tokens, edit=edit)


def whole(clean, donor, direction, rng):
    """What a patch puts in: the donor's state (B, D), all of it."""
    return donor


def visible(clean, donor, direction, rng):
    """The clean state with only its part along `direction` (B, D) made the donor's: along
    the difference of the two bridges' unembedding vectors, which is what the lens reads."""
    unit = direction / direction.norm(dim=-1, keepdim=True)
    return clean + ((donor - clean) * unit).sum(-1, keepdim=True) * unit


def noise(clean, donor, direction, rng):
    """A random state of the donor's norm: breaks the run, should redirect nothing."""
    random = torch.randn(donor.shape, generator=rng)
    return random * donor.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)


@torch.no_grad()
def patch_map(model, clean, donor, answers, predicted, put=whole, direction=None):
    """Patch every site of the clean runs with the donors' states; count what the answer becomes.
    clean, donor: tokens (N, T); answers: the clean run's (N,); predicted: what the donor's state
    should make of it (N,). Returns {"n", outcome: (n_loops, T) shares} for redirected (to the
    predicted answer), changed (to another one), unchanged."""
    rng = torch.Generator().manual_seed(0)
    counts = torch.zeros(3, model.config.n_loops, clean.shape[1])
    direction = torch.zeros(len(clean), model.config.d_model) if direction is None else direction
    for rows in torch.arange(len(clean)).split(BATCH):
        old, new = run_states(model, clean[rows]), run_states(model, donor[rows])
        for loop, position in np.ndindex(*counts.shape[1:]):
            state = put(old[loop, :, position], new[loop, :, position], direction[rows], rng)
            answer = patch(model, clean[rows], (loop, position), state).argmax(-1)
            hit, same = answer == predicted[rows], answer == answers[rows]
            counts[:, loop, position] += torch.stack([hit, ~hit & ~same, ~hit & same]).sum(1)
    return {"n": len(clean), **dict(zip(OUTCOMES, (counts / max(1, len(clean))).tolist()))}


# ---------------------------------------------------------------- donors
def right_only(model, world, asked):
    """Those of the Queries that the model answers rightly."""
    tokens, answers = to_tokens(asked, world, model.config.layout)
    return asked.take((predict(model, tokens) == answers).numpy())


def pick_donors(clean, pool, allowed, rng):
    """For each clean query a random one of the pool that `allowed` (N, P) permits.
    Returns (clean, donors, the donors' answers); a clean query without a donor is left out."""
    donor = (allowed * rng.random(allowed.shape)).argmax(1) if allowed.size else np.zeros(0, int)
    found = allowed.any(1)
    return clean.take(found), pool.take(donor[found]), pool.t[donor[found]]


# The kinds of patch: each returns the queries to patch, their donors, the answers predicted (N,).
def itself(model, world, clean, pool, rng):
    """Donor = the query: the control that must read unchanged = 1 everywhere."""
    return clean, clean, np.full(len(clean.t), -1)


def swap(model, world, clean, pool, rng):
    """Donor with the same r2, another bridge, another answer: the answer should be the donor's."""
    c, d = clean.take(COLUMN), pool
    return pick_donors(clean, pool, (c.r2 == d.r2) & (c.b != d.b) & (c.t != d.t), rng)


def swap_other_r2(model, world, clean, pool, rng):
    """Donor with another r2 too: a state that carries the bridge b' alone gives the tail of
    (b', r2), which is neither query's own answer; one that carries the answer gives the donor's."""
    def tail(b, r2):
        fact = world.find(*np.broadcast_arrays(b, r2))
        return np.where(fact >= 0, world.tails.ravel()[fact], -1)
    c, d = clean.take(COLUMN), pool
    t = tail(d.b, c.r2)
    allowed = (c.r2 != d.r2) & (c.b != d.b) & (c.t != d.t) & (t >= 0) & (t != c.t) & (t != d.t)
    clean, donor, _ = pick_donors(clean, pool, allowed, rng)
    return clean, donor, tail(donor.b, clean.r2)


def same_bridge(model, world, clean, pool, rng):
    """Donor with the same bridge, another r2 and answer: no change where only b is carried."""
    c, d = clean.take(COLUMN), pool
    allowed = (c.b == d.b) & (c.r2 != d.r2) & (c.t != d.t) & ((c.h != d.h) | (c.r1 != d.r1))
    return pick_donors(clean, pool, allowed, rng)


def restore(model, world, clean, pool, rng):
    """Corrupted run (h replaced at random, the answer lost) into which the clean state is put back:
    the clean query is the donor, whose answer should return (Wang et al., Section 3, role h)."""
    moved = (clean.h + rng.integers(1, world.n_entities, len(clean.h))) % world.n_entities
    corrupted = clean._replace(h=moved)
    tokens, answers = to_tokens(corrupted, world, model.config.layout)
    lost = (predict(model, tokens) != answers).numpy()
    return corrupted.take(lost), clean.take(lost), clean.t[lost]


PATCHES = {"self": (itself, whole), "swap": (swap, whole), "swap_visible": (swap, visible),
           "swap_other_r2": (swap_other_r2, whole), "same_bridge": (same_bridge, whole),
           "noise": (swap, noise), "restore": (restore, whole)}


def causal(model, world, asked, n=500):
    """Every kind of PATCHES at every site, {kind: patch_map}, for up to n of the Queries `asked`.
    Clean and donor query are both answered rightly; donors come from all of `asked`."""
    rng, vector = np.random.default_rng(0), model.vectors()
    pool, maps = right_only(model, world, asked), {}
    for kind, (choose, put) in PATCHES.items():
        clean, donor, predicted = choose(model, world, pool.take(slice(n)), pool, rng)
        tokens, donor_tokens = (to_tokens(q, world, model.config.layout)[0] for q in (clean, donor))
        maps[kind] = patch_map(model, tokens, donor_tokens, predict(model, tokens),
                               torch.from_numpy(predicted), put, vector[donor.b] - vector[clean.b])
    return maps


# ---------------------------------------------------------------- inference paths of a run
def inference_path(model, world, splits, n=500, pool=2000):
    """{split: {"lens": lens, "probe": probe, "causal": causal}} of ID and OOD queries: up to n
    random ones for the lens and the probe, which is fitted on up to `pool` ID queries that nothing
    else uses; up to n answered rightly for patching, with donors from up to `pool` of the split."""
    rng, path = np.random.default_rng(0), {}
    half = len(splits["test_id"].h) // 2
    order = rng.permutation(2 * half)
    parts = {"test_id": splits["test_id"].take(order[:half][:pool]),
             "test_ood": splits["test_ood"].take(rng.permutation(len(splits["test_ood"].h))[:pool])}
    known = splits["test_id"].take(order[half:][:pool])
    for split, asked in parts.items():
        path[split] = {"lens": lens(model, world, asked.take(slice(n))),
                       "probe": {"map": probe(model, world, known, asked.take(slice(n)))},
                       "causal": causal(model, world, asked, n)}
    return path


def causal_path(maps, least=0.2):
    """For each loop but the last: ((loop, position), "b" or "t", share redirected by `swap`).
    The position is where a swap redirects most, if that is at least `least` of the answers; it
    carries the bridge (b) if `swap_other_r2` redirects more there than `same_bridge` does, else the
    answer (t)."""
    effect, bridge, answer = (np.asarray(maps[kind]["redirected"])
                              for kind in ("swap", "swap_other_r2", "same_bridge"))
    return [(site, "b" if bridge[site] > answer[site] else "t", effect[site])
            for site in enumerate(effect[:-1].argmax(1)) if effect[site] >= least]


def alike(a, b):
    """How alike two maps (n_loops, T) are, in [0, 1]: sum of minima over sum of maxima.
    The last loop is left out: its state at the answer position is the output in every model."""
    a, b = np.asarray(a)[:-1], np.asarray(b)[:-1]
    return float(np.minimum(a, b).sum() / max(np.maximum(a, b).sum(), 1e-12))


def strongest(values):
    """(share, site) of the largest in a map (n_loops, T), the last loop left out."""
    values = np.asarray(values)[:-1]
    return values.max(), np.unravel_index(values.argmax(), values.shape)


def alike_shuffled(a, b, times=1000):
    """Mean of `alike` with the sites of b (last loop apart) shuffled: what chance would score."""
    rng, b = np.random.default_rng(0), np.asarray(b)
    shuffled = lambda: np.append(rng.permutation(b[:-1].ravel()), b[-1]).reshape(b.shape)
    return float(np.mean([alike(a, shuffled()) for _ in range(times)]))


# ---------------------------------------------------------------- figures
LENS = [("lens", kind) for kind in ("bridge", "bridge_chance", "target", "target_chance")]
CAUSAL = [("causal", kind) for kind in PATCHES if kind != "self"]
SIDE_BY_SIDE = [("lens", "bridge"), ("causal", "swap_other_r2"), ("lens", "target"),
                ("causal", "same_bridge")]  # what is seen, what is used: the bridge, the answer


def plot_maps(paths, columns, title):
    """A grid of maps: a row for each stage and split, a column for each (part, kind)."""
    rows = [(f"{EXAMINED[split]}, {stage}", splits[split])
            for stage, splits in paths.items() for split in splits]
    figure = Figure((1.7 * len(columns) + 0.6, 1.55 * len(rows) + 0.6), layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    for (label, found), line in zip(rows, grid):
        line[0].set_ylabel(f"{label}\nloop", fontsize=8)
        for (part, kind), axes in zip(columns, line):
            maps = found[part][kind]
            n = maps.get("n", found["lens"]["n"])
            axes.set_title(f"{part}: {kind.replace('_', ' ')} (n = {n})", fontsize=6)
            values = maps["map" if part == "lens" else "redirected"]
            axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
            for (loop, position), value in np.ndenumerate(values):
                axes.text(position, loop, f"{value:.2f}", ha="center", va="center", fontsize=7,
                          color="white" if value > 0.6 else "black")
            axes.set_xticks(range(len(values[0])), POSITIONS[:len(values[0])], fontsize=7)
            axes.set_yticks(range(len(values)), range(1, len(values) + 1), fontsize=7)
    figure.supxlabel("token position", fontsize=8)
    figure.suptitle(title, fontsize=8)
    return figure


def plot_regimes(groups):
    """A panel a regime (paper, Figures 1 and 2): mean over seeds, and the range as a band."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure((3 * columns, 2.3 * rows + 0.8), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for axes in grid[len(groups):]:
        axes.remove()
    for axes, (name, seeds) in zip(grid, groups.items()):
        steps = [line["step"] for line in seeds[0].history]
        for key, label, color, style in (
                ("train_inferred", "training compositions", "#000000", "-"),
                ("test_ood", "OOD answer", "#D55E00", "-"),
                ("any", "bridge seen on OOD (lens)", "#009E73", "--"),
                ("any_chance", "the same by chance", "#009E73", ":")):
            values = np.array([[{**line["accuracy"], **line["lens"]["test_ood"]}[key]
                                for line in run.history] for run in seeds])     # (seeds, steps)
            axes.plot(steps, values.mean(0), style, color=color, label=label, lw=1.5)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        axes.set_title(f"{name}, seeds: {len(seeds)}", fontsize=8)
        axes.set(xscale="log", xlabel="training step", ylabel="share of queries",
                 ylim=(-0.02, 1.02))
    figure.legend(handles=axes.get_lines(), fontsize=7, ncols=4, loc="outside lower center")
    return figure


def plot_bridges(groups):
    """Bars a regime, for OOD queries before and after grokking (Finding 2): answered, and the
    bridge seen by the lens, read by a probe, used by the model (swap_other_r2; of those answered
    rightly); a dot a seed."""
    def answered(run, stage):
        fitted = milestones(run.history)["train >= .99"]
        last = run.history[-1] if stage == "after" else next(
            line for line in run.history if line["step"] == fitted)
        return last["accuracy"]["test_ood"]
    look = lambda run, stage: run.paths[stage]["test_ood"]
    parts = (("answered rightly", "#D55E00", answered),
             ("bridge seen: lens, best site", "#009E73",
              lambda *at: look(*at)["lens"]["bridge"]["best"]),
             ("bridge present: linear probe, best site", "#56B4E9",
              lambda *at: np.max(look(*at)["probe"]["map"])),
             ("bridge used: its swap redirects the answer", "#0072B2",
              lambda *at: strongest(look(*at)["causal"]["swap_other_r2"]["redirected"])[0]))
    figure = Figure((1.1 * len(groups) + 1, 5), layout="constrained")
    for axes, stage in zip(figure.subplots(2, 1, sharex=True), ("before", "after")):
        for i, (label, color, value) in enumerate(parts):
            for place, seeds in enumerate(groups.values(), 1):
                found = [value(run, stage) for run in seeds if stage in run.paths]
                x = place + (i - 1.5) * 0.2
                axes.bar(x, np.mean(found) if found else 0, 0.18, color=color, alpha=0.6,
                         label=label if place == 1 else None)
                axes.plot([x] * len(found), found, ".", color=color, ms=5)
        axes.set(ylabel=f"share of OOD queries,\n{stage} grokking", ylim=(0, 1.03))
    axes.set_xticks(range(1, len(groups) + 1), [name.replace("/", "\n") for name in groups],
                    fontsize=7)
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, ncols=2,
                  loc="outside lower center")
    return figure


ASKED = {"test_ood_id": "new + old", "test_id_ood": "old + new", "test_ood": "new + new"}


def plot_tuned(groups):
    """Fine-tuning on new facts (Finding 3): exact match by start, and by compositions per new fact;
    mean over seeds with the Wilson interval of one seed's queries."""
    starts = {k: v for k, v in groups.items() if v[0].about["world"]["kept"] < 1}
    curve = sorted((v for v in groups.values() if v[0].about["world"]["kept"] == 1),
                   key=lambda seeds: seeds[0].about["world"]["new_k"])
    figure = Figure((10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    for i, ((split, label), color) in enumerate(zip(ASKED.items(),
                                                    ("#0072B2", "#E69F00", "#D55E00"))):
        def bars(seeds):
            mean, n = exact(seeds, split)
            low, high = wilson(mean * n, n)
            return mean, mean - low, high - mean
        for axes, kinds, place in ((left, [*starts.values()], np.arange(len(starts)) + 0.25 * i),
                                   (right, curve, [v[0].about["world"]["new_k"] for v in curve])):
            if kinds:
                mean, *interval = map(np.array, zip(*map(bars, kinds)))
                draw = dict(yerr=np.maximum(interval, 0), color=color, label=label, capsize=2)
                if axes is left:
                    axes.bar(place, mean, 0.22, **draw)
                else:
                    axes.errorbar(place, mean, marker="o", **draw)
    names = [start_of(v[0].about).replace("/", "\n") for v in starts.values()]
    left.set_xticks(np.arange(len(starts)) + 0.25, names, fontsize=7)
    left.set(ylabel="exact match", ylim=(0, 1.05), xlabel="fine-tuned from (share of old facts "
             f"kept: {min([v[0].about['world']['kept'] for v in starts.values()], default=1):g})")
    right.set(xlabel="trained compositions per new fact as second hop\n(from natural, all old "
              "facts kept)")
    right.legend(fontsize=7)
    return figure


# ---------------------------------------------------------------- tables
def wilson(hits, n):
    """95 % Wilson score interval (low, high) of a share hits / n; (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def report(paths):
    """Lines about one run: what the lens sees, and every patch along the causal path."""
    for (stage, splits), split in itertools.product(paths.items(), EXAMINED):
        lens, causal = splits[split]["lens"], splits[split]["causal"]
        seen, chance = lens["bridge"], lens["bridge_chance"]
        yield (f"{stage}, {split}: lens (n = {lens['n']}) bridge at any site {seen['any']:.3f} "
               f"(chance {chance['any']:.3f}), at loop {name_of(seen['best_site'])} "
               f"{seen['best']:.3f}")
        for (loop, position), carried, _ in causal_path(causal):
            title = f"loop {name_of((loop, position))} ({carried})"
            yield f"  {title:<20}{'n':>4}  " + "".join(f"{outcome:<20}" for outcome in OUTCOMES)
            for kind, maps in causal.items():
                line = f"    {kind:<18}{maps['n']:>4}  "
                for outcome in OUTCOMES:
                    share = maps[outcome][loop][position]
                    low, high = wilson(share * maps["n"], maps["n"])
                    line += f"{share:.3f} [{low:.2f}, {high:.2f}]  "
                yield line


def trace(model, world, splits):
    """Lines that follow one OOD query with h, b and t apart: the top-1 token at every site."""
    asked, names = splits["test_ood"], [*world.entity_names, *world.relation_names, "_"]
    apart = asked.take((asked.h != asked.b) & (asked.b != asked.t) & (asked.h != asked.t))
    right = right_only(model, world, apart)
    query = (right if len(right.h) else asked).take(slice(1))
    tokens, _ = to_tokens(query, world, model.config.layout)
    h, r1, r2 = (names[token] for token in tokens[0, :3])
    yield (f"OOD query ({h}, {r1} -> bridge {names[query.b[0]]}, {r2} -> {names[query.t[0]]}): "
           "top-1 token at each site")
    yield f"  {'loop':<6}" + "".join(f"{place:<12}" for place, _ in zip(POSITIONS, tokens[0]))
    for loop, row in enumerate(logit_lens(model, tokens)[:, 0], 1):
        yield f"  {loop:<6}" + "".join(f"{names[token]:<12}" for token in row)


Run = namedtuple("Run", "about history paths")  # of config.json, metrics.jsonl, paths.json


def read_groups(folders):
    """{"preset/regime": [Run, ...]}, a Run a seed; its paths are None where none were measured."""
    groups = {}
    for folder in map(Path, folders):
        paths = folder / "paths.json"
        run = Run(*read_run(folder), json.loads(paths.read_text()) if paths.exists() else None)
        groups.setdefault("/".join(folder.absolute().parts[-3:-1]), []).append(run)
    def rank(item):
        about = item[1][0].about
        return [*PRESETS].index(about["preset"]), [*REGIMES].index(about["regime"]), item[0]
    return dict(sorted(groups.items(), key=rank))


def start_of(about):
    """The preset/regime a fine-tuned run started from, or scratch."""
    if "start" in about:
        return "/".join(Path(about["start"]["path"]).parts[-3:-1])
    return "scratch" if about["model"]["layout"] == "causal" else "bidirectional/scratch"


def exact(seeds, split):
    """(mean share right at the end, queries a seed) of fine-tuned runs."""
    about = seeds[0].about
    world, splits = build_data(WorldConfig(**about["world"]), about["regime"])
    n = len(make_exams({split: splits[split]}, world, about["model"]["layout"], "cpu")[split][0])
    return np.mean([run.history[-1]["accuracy"][split] for run in seeds]), n


def spread(values, digits=2):
    """"mean (least to most)" of one value a seed; seeds that never got there (None) are counted."""
    have = [value for value in values if value is not None]
    if not have:
        return "never"
    never = f"; {len(values) - len(have)} never" if len(have) < len(values) else ""
    return f"{np.mean(have):.{digits}f} ({min(have):.{digits}f} to {max(have):.{digits}f}{never})"


def stages_table(groups):
    """Milestones and last figures, a row a regime (Finding 1; paper, Figures 1 and 2)."""
    shown = {"test_id": "ID", "test_ood_id": "OOD + ID", "test_id_ood": "ID + OOD",
             "test_ood": "OOD"}
    yield ["run", "seeds", *milestones([]), *shown.values(), "bridge on OOD (chance)"]
    for name, seeds in groups.items():
        last = [run.history[-1] for run in seeds]
        steps = [spread([milestones(run.history)[what] for run in seeds], 0)
                 for what in milestones([])]
        right = [spread([m["accuracy"][split] for m in last]) for split in shown]
        seen, chance = (np.mean([m["lens"]["test_ood"][key] for m in last])
                        for key in ("any", "any_chance"))
        yield [name, len(seeds), *steps, *right, f"{seen:.2f} ({chance:.2f})"]


def paths_table(groups):
    """The causal path, a row a regime, stage and split, beside what is seen (Findings 1 and 2)."""
    yield ["run", "grokking", "queries", "causal path (loop, position)", "bridge used", "at",
           "seen anywhere (chance)", "seen at best site", "probe", "visible part used"]
    for name, seeds in groups.items():
        for stage, split in itertools.product(("before", "after"), EXAMINED):
            found = [run.paths[stage][split] for run in seeds if stage in run.paths]
            if not found:
                continue
            each = lambda value: f"{np.mean([value(f) for f in found]):.2f}"
            kinds = [" → ".join(f"{carried} at {name_of(site)}"
                                for site, carried, _ in causal_path(f["causal"])) or "none"
                     for f in found]
            sites = [name_of(strongest(f["causal"]["swap_other_r2"]["redirected"])[1])
                     for f in found]
            count = lambda words: "; ".join(
                word + (f" ({words.count(word)} of {len(words)})" if len(set(words)) > 1 else "")
                for word in dict.fromkeys(words))
            yield [name, stage, EXAMINED[split], count(kinds),
                   spread([strongest(f["causal"]["swap_other_r2"]["redirected"])[0]
                           for f in found]), count(sites),
                   each(lambda f: f["lens"]["bridge"]["any"])
                   + f" ({each(lambda f: f['lens']['bridge_chance']['any'])})",
                   each(lambda f: f["lens"]["bridge"]["best"]),
                   each(lambda f: np.max(f["probe"]["map"])),
                   each(lambda f: strongest(f["causal"]["swap_visible"]["redirected"])[0])]


def likeness_table(groups):
    """How alike swap maps are: of one model, of two seeds, of a regime and natural (Finding 1)."""
    yield ["run", "ID before, ID after", "ID after, OOD after", "seeds, before", "seeds, after",
           "natural's, after", "sites shuffled"]
    maps = {name: [{f"{stage} {split}": run.paths[stage][split]["causal"]["swap"]["redirected"]
                    for stage in run.paths for split in EXAMINED} for run in seeds]
            for name, seeds in groups.items()}
    for name, own in maps.items():
        both = lambda one, two: [(m[one], m[two]) for m in own if one in m and two in m]
        seeds = lambda kind: [*itertools.combinations([m[kind] for m in own if kind in m], 2)]
        natural = name.split("/")[0] + "/natural"
        others = itertools.product(own, maps.get(natural, []) if name != natural else [])
        pairs = [both("before test_id", "after test_id"), both("after test_id", "after test_ood"),
                 seeds("before test_id"), seeds("after test_id"),
                 [(m["after test_id"], n["after test_id"]) for m, n in others]]
        yield [name, *(spread([alike(*pair) for pair in p]) if p else "" for p in pairs),
               f"{np.mean([alike_shuffled(*pair) for p in pairs for pair in p]):.2f}"]


def tuned_table(groups):
    """Fine-tuned runs (Finding 3; paper, Figure 4): exact match [Wilson, one seed's queries]."""
    yield ["started from", "old facts kept", "k", "n", *ASKED.values(),
           "bridge (chance): " + ", ".join(ASKED.values()), "old facts", "old ID compositions"]
    for seeds in groups.values():
        world, last = seeds[0].about["world"], [run.history[-1] for run in seeds]
        right, sizes, seen = [], [], []
        for split in ASKED:
            mean, n = exact(seeds, split)
            low, high = wilson(mean * n, n)
            values = [m["accuracy"][split] for m in last]
            right.append(f"{mean:.2f} [{low:.2f}, {high:.2f}] ({min(values):.2f} to "
                         f"{max(values):.2f})")
            sizes.append(n)
            rate = [np.mean([m["lens"][split][key] for m in last]) for key in ("any", "any_chance")]
            seen.append("{:.2f} ({:.2f})".format(*rate))
        old = [spread([m["accuracy"][split] for m in last]) for split in ("old_atomic", "test_id")]
        yield [start_of(seeds[0].about), f"{world['kept']:g}", world["new_k"],
               ", ".join(map(str, sizes)), *right, ", ".join(seen), *old]


def growth_table(groups):
    """Time to fit and to grok against the number of entities, and what a step takes."""
    yield ["entities", "regime", "D", "parameters", "facts", "seeds", "steps", "ms a step",
           *milestones([]), "OOD"]
    by_size = lambda seeds: (seeds[0].about["world"]["n_entities"], len(seeds[0].history))
    for seeds in sorted(groups.values(), key=by_size):
        world, config = (seeds[0].about[part] for part in ("world", "model"))
        model = LoopedTransformer(Config(**config), world["n_entities"], world["n_relations"])
        last = [run.history[-1] for run in seeds]
        found = [spread([milestones(run.history)[what] for run in seeds], 0)
                 for what in milestones([])]
        found.append(spread([m["accuracy"]["test_ood"] for m in last]))
        if last[0]["step"] < config["warmup"]:  # made to time a step
            found = ["not trained"] * len(found)
        yield [world["n_entities"], seeds[0].about["regime"], config["d_model"],
               sum(weight.numel() for weight in model.parameters()),
               world["n_entities"] * world["out_degree"], len(seeds), last[0]["step"],
               spread([1000 * m["seconds"] / m["step"] for m in last], 0), *found]


def parts_of(groups):
    """Groups whose paths were measured; those with an ingredient left out, after the full recipe
    up to the same step; fine-tuned ones; those in bfloat16, of which most are larger worlds."""
    tuned = {name: v for name, v in groups.items() if v[0].about["world"]["new_facts"]}
    larger = {name: v for name, v in groups.items() if v[0].about["model"]["bf16"]}
    looked_into = {name: v for name, v in groups.items() if all(run.paths for run in v)}
    less = {name: v for name, v in groups.items() if name not in {**tuned, **larger, **looked_into}}
    if less and "tiny/natural" in groups:
        last = max(run.history[-1]["step"] for seeds in less.values() for run in seeds)
        until = lambda run: run._replace(history=[m for m in run.history if m["step"] <= last])
        less = {f"tiny/natural until step {last}": [*map(until, groups["tiny/natural"])], **less}
    return looked_into, less, tuned, larger


def tables(folders):
    """Lines of the README's Markdown tables, from metrics.jsonl and paths.json of run folders."""
    looked_into, less, tuned, larger = parts_of(read_groups(folders))
    for head, *rows in (stages_table(looked_into), paths_table(looked_into),
                        likeness_table(looked_into), tuned_table(tuned), stages_table(less),
                        growth_table(larger)):
        if rows:
            yield ""
            for row in (head, ["---"] * len(head), *rows):
                yield "| " + " | ".join(map(str, row)) + " |"


# ---------------------------------------------------------------- the command line
def analyze_run(folder):
    """Measure one run: paths.json and four figures into its folder; prints what was found."""
    about, models = read_run(folder)[0], {"after": load_run(folder)}
    if (folder / "before.pt").exists():
        models = {"before": load_run(folder, "before"), **models}
    paths = {stage: inference_path(*model) for stage, model in models.items()}
    write_text(folder / "paths.json", json.dumps(paths) + "\n")
    name, shown = "{preset}/{regime}, seed {model[seed]}".format(**about), "share of queries whose "
    for part, columns, title in (
            ("lens", LENS, f"{name}: {shown}top-1 token is the ..."),
            ("patching", CAUSAL, f"{name}: {shown}answer is the predicted one"),
            ("paths", SIDE_BY_SIDE, f"{name}: what is seen, and what is used")):
        save_figure(plot_maps(paths, columns, title), folder / f"{part}.png")
    save_figure(plot_curves(folder), folder / "curves.png")
    print(f"\n{folder}", *report(paths), *trace(*models["after"]), sep="\n", flush=True)


def main(argv=None):
    """Analyse runs, print their tables, draw their figures; exit status 0, or 2 for bad input."""
    parser = Parser(prog="analyze.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders (all under runs/shipped)")
    shipped = sorted(path.parent for path in Path("runs/shipped").rglob("config.json"))
    try:
        runs = parser.parse(sys.argv[1:] if argv is None else argv)["runs"] or shipped
        if not runs:
            raise BadInput("runs/shipped: holds no trained run; name the folders of your own")
        for folder in runs:
            if runs is not shipped or (folder / "after.pt").exists() and "tune" not in folder.parts:
                analyze_run(folder)
        if runs is shipped:
            looked_into, _, tuned, _ = parts_of(read_groups(runs))
            Path("figures").mkdir(exist_ok=True)
            save_figure(plot_regimes(looked_into), "figures/regimes.png")
            save_figure(plot_bridges(looked_into), "figures/bridges.png")
            save_figure(plot_tuned(tuned), "figures/tuned.png")
        print(*tables(runs), sep="\n")
    except (BadInput, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
