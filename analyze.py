"""Looking inside a trained model: the logit lens reads its states, activation patching moves them.

    python analyze.py [RUN ...]     lens and patching of each run (RUN/paths.json), table, figures

A site is (loop, position): the state after that loop at that token. The lens asks what a state
*shows* (paper, Section 4: the top-1 token of its unembedding); patching asks what a state *does*
(after Wang et al. 2024, Section 3, who count changed answers; here the answer must become the one
that the donor's bridge predicts). Everything goes through the model's one `edit(loop, state)`.
"""
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from data import BadInput, Parser
from grok import (load_run, milestones, plot_curves, read_run, rms_norm, run_states, to_tokens,
                  write_text)

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
    """lens_rates of bridge and target for Queries, each with its chance level (another query's)."""
    tokens, answers = to_tokens(asked, world)
    top, bridges = logit_lens(model, tokens), torch.from_numpy(asked.b)
    return {"n": len(tokens),
            "bridge": lens_rates(top, bridges), "bridge_chance": lens_rates(top, bridges.roll(1)),
            "target": lens_rates(top, answers), "target_chance": lens_rates(top, answers.roll(1))}


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
    tokens, answers = to_tokens(asked, world)
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
    tokens, answers = to_tokens(corrupted, world)
    lost = (predict(model, tokens) != answers).numpy()
    return corrupted.take(lost), clean.take(lost), clean.t[lost]


PATCHES = {"self": (itself, whole), "swap": (swap, whole), "swap_visible": (swap, visible),
           "swap_other_r2": (swap_other_r2, whole), "same_bridge": (same_bridge, whole),
           "noise": (swap, noise), "restore": (restore, whole)}


def causal(model, world, asked, n=500):
    """Every kind of PATCHES at every site, {kind: patch_map}, for up to n of the Queries `asked`.
    Clean and donor query are both answered rightly; donors come from all of `asked`."""
    rng, vector = np.random.default_rng(0), rms_norm(model.embedding)
    pool, maps = right_only(model, world, asked), {}
    for kind, (choose, put) in PATCHES.items():
        clean, donor, predicted = choose(model, world, pool.take(slice(n)), pool, rng)
        tokens, donor_tokens = to_tokens(clean, world)[0], to_tokens(donor, world)[0]
        maps[kind] = patch_map(model, tokens, donor_tokens, predict(model, tokens),
                               torch.from_numpy(predicted), put, vector[donor.b] - vector[clean.b])
    return maps


# ---------------------------------------------------------------- inference paths of a run
def inference_path(model, world, splits, n=500, pool=2000):
    """{split: {"lens": lens, "causal": causal}} of ID and OOD queries: up to n random ones for the
    lens, up to n answered rightly for patching, with donors from up to `pool` of the split."""
    rng, path = np.random.default_rng(0), {}
    for split in EXAMINED:
        asked = splits[split].take(rng.permutation(len(splits[split].h))[:pool])
        path[split] = {"lens": lens(model, world, asked.take(slice(n))),
                       "causal": causal(model, world, asked, n)}
    return path


def causal_path(maps):
    """For each loop but the last: ((loop, position), "b" or "t", share redirected by `swap`).
    The position is where a swap redirects most; it carries the bridge (b) if `swap_other_r2`
    redirects more there than `same_bridge` does, else the answer (t)."""
    effect, bridge, answer = (np.asarray(maps[kind]["redirected"])
                              for kind in ("swap", "swap_other_r2", "same_bridge"))
    return [(site, "b" if bridge[site] > answer[site] else "t", effect[site])
            for site in enumerate(effect[:-1].argmax(1))]


def alike(a, b):
    """How alike two maps (n_loops, T) are, in [0, 1]: sum of minima over sum of maxima.
    The last loop is left out: its state at the answer position is the output in every model."""
    a, b = np.asarray(a)[:-1], np.asarray(b)[:-1]
    return float(np.minimum(a, b).sum() / max(np.maximum(a, b).sum(), 1e-12))


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


def plot_maps(paths, columns, title, path):
    """A grid of maps: a row for each stage and split, a column for each (part, kind)."""
    rows = [(f"{split}, {stage}", splits[split])
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
            axes.set_xticks(range(len(POSITIONS)), POSITIONS, fontsize=7)
            axes.set_yticks(range(len(values)), range(1, len(values) + 1), fontsize=7)
    figure.supxlabel("token position", fontsize=8)
    figure.suptitle(title, fontsize=8)
    figure.savefig(path, dpi=130, metadata={"Software": None})


def plot_regimes(groups, path):
    """A panel a regime (paper, Figure 2): mean over seeds, and the range as a band."""
    figure = Figure((max(4.2, 2.4 * len(groups)), 3.2), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, sharey=True)[0]
    for axes, (regime, seeds) in zip(panels, groups.items()):
        steps = [line["step"] for line in seeds[0][0]]
        for name, label, color, style in (
                ("train_inferred", "training compositions", "#000000", "-"),
                ("test_ood", "OOD answer", "#D55E00", "-"),
                ("any", "bridge seen on OOD (lens)", "#009E73", "--"),
                ("any_chance", "the same by chance", "#009E73", ":")):
            values = np.array([[{**line["accuracy"], **line["lens"]["test_ood"]}[name]
                                for line in history] for history, *_ in seeds])  # (seeds, steps)
            axes.plot(steps, values.mean(0), style, color=color, label=label, lw=1.5)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        axes.set(title=f"{regime}\nseeds: {len(seeds)}", xscale="log", xlabel="training step")
    panels[0].set(ylabel="share of queries", ylim=(-0.02, 1.02))
    figure.legend(handles=axes.get_lines(), fontsize=7, ncols=2, loc="outside lower center")
    figure.savefig(path, dpi=130, metadata={"Software": None})


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
    h, r1, r2, _ = (names[token] for token in to_tokens(query, world)[0][0])
    yield (f"OOD query ({h}, {r1} -> bridge {names[query.b[0]]}, {r2} -> {names[query.t[0]]}): "
           "top-1 token at each site")
    yield f"  {'loop':<6}" + "".join(f"{position:<12}" for position in POSITIONS)
    for loop, row in enumerate(logit_lens(model, to_tokens(query, world)[0])[:, 0], 1):
        yield f"  {loop:<6}" + "".join(f"{names[token]:<12}" for token in row)


def by_regime(runs):
    """{regime: [(metrics.jsonl, paths.json, seed), ...]}; a run folder's parent is its regime."""
    groups = {}
    for run in map(Path, runs):
        (about, history), paths = read_run(run), json.loads((run / "paths.json").read_text())
        found = history, paths, about["model"]["seed"]
        groups.setdefault(run.absolute().parent.name, []).append(found)
    return groups


def spread(values, digits=2):
    """"mean (least to most)" of one value a seed; seeds that never got there (None) are counted."""
    have = [value for value in values if value is not None]
    if not have:
        return "never"
    never = f"; {len(values) - len(have)} never" if len(have) < len(values) else ""
    return f"{np.mean(have):.{digits}f} ({min(have):.{digits}f} to {max(have):.{digits}f}{never})"


def stages_table(groups):
    """Milestones and last figures, a row a regime (Finding 1; paper, Figure 2)."""
    yield ["regime", "seeds", *milestones([]), "ID answer", "OOD answer", "bridge on OOD",
           "by chance"]
    for regime, seeds in groups.items():
        last = [history[-1] for history, *_ in seeds]
        steps = [spread([milestones(h)[name] for h, *_ in seeds], 0) for name in milestones([])]
        right = [spread([m["accuracy"][split] for m in last], 3) for split in EXAMINED]
        seen = [spread([m["lens"]["test_ood"][key] for m in last]) for key in ("any", "any_chance")]
        yield [regime, len(seeds), *steps, *right, *seen]


def paths_table(groups):
    """The causal path of each model, stage and split, beside what the lens sees (Finding 1)."""
    yield ["regime", "seed", "queries", "grokking", "n (swap)", "causal path: loops 1, 2, 3",
           "lens: bridge at any site (chance)", "at the best fixed site",
           "swap of the visible part redirects at most"]
    for regime, seeds in groups.items():
        for (_, paths, seed), split in itertools.product(seeds, EXAMINED):
            for stage in paths:
                lens, causal = paths[stage][split]["lens"], paths[stage][split]["causal"]
                seen, chance = lens["bridge"], lens["bridge_chance"]
                path = " → ".join(f"{carried} at {POSITIONS[position]} {share:.2f}"
                                  for (_, position), carried, share in causal_path(causal))
                visible = np.asarray(causal["swap_visible"]["redirected"])[:-1]
                strongest = np.unravel_index(visible.argmax(), visible.shape)
                yield [regime, seed, EXAMINED[split], stage, causal["swap"]["n"], path,
                       f"{seen['any']:.2f} ({chance['any']:.2f})",
                       f"{seen['best']:.2f} at {name_of(seen['best_site'])}",
                       f"{visible.max():.2f} at {name_of(strongest)}"]


def likeness_table(groups):
    """How alike maps are: one model's before and after, beside two baselines (Finding 1)."""
    yield ["regime", "map", "compared", "pairs", "alike", "sites shuffled"]
    other = "another seed's"
    for regime, seeds in groups.items():
        for name, part, kind, share in (("swap", "causal", "swap", "redirected"),
                                        ("lens", "lens", "bridge", "map")):
            maps = [{f"{EXAMINED[split]} {stage}": paths[stage][split][part][kind][share]
                     for stage in paths for split in EXAMINED} for _, paths, _ in seeds]
            for one, two in (("ID before", "ID after"), ("ID after", "OOD after"),
                             ("ID before", other), ("ID after", other)):
                pairs = [(m[one], m[two]) for m in maps if one in m and two in m]
                if two == other:
                    pairs = list(itertools.combinations([m[one] for m in maps if one in m], 2))
                if pairs:
                    yield [regime, name, f"{one}, {two}", len(pairs),
                           spread([alike(*pair) for pair in pairs]),
                           f"{np.mean([alike_shuffled(*pair) for pair in pairs]):.2f}"]


def tables(runs):
    """Lines of the README's Markdown tables, from metrics.jsonl and paths.json of the runs."""
    groups = by_regime(runs)
    for head, *rows in (stages_table(groups), paths_table(groups), likeness_table(groups)):
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
    plot_curves(folder)
    name, shown = "{regime}, seed {model[seed]}".format(**about), "share of queries whose "
    plot_maps(paths, LENS, f"{name}: {shown}top-1 token is the ...", folder / "lens.png")
    plot_maps(paths, CAUSAL, f"{name}: {shown}answer is the predicted one", folder / "patching.png")
    plot_maps(paths, SIDE_BY_SIDE, f"{name}: what is seen, and what is used", folder / "paths.png")
    print(f"\n{folder}", *report(paths), *trace(*models["after"]), sep="\n", flush=True)


def main(argv=None):
    """Analyse runs, print their tables, draw their figures; exit status 0, or 2 for bad input."""
    parser = Parser(prog="analyze.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders (all under runs/shipped)")
    shipped = sorted(path.parent for path in Path("runs/shipped").rglob("after.pt"))
    try:
        runs = parser.parse(sys.argv[1:] if argv is None else argv)["runs"] or shipped
        if not runs:
            raise BadInput("runs/shipped: holds no trained run; name the folders of your own")
        for folder in runs:
            analyze_run(folder)
        if runs is shipped:
            Path("figures").mkdir(exist_ok=True)
            plot_regimes(by_regime(runs), "figures/regimes.png")
        print(*tables(runs), sep="\n")
    except (BadInput, OSError) as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
