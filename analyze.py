"""Looking inside a trained model: the logit lens reads its states, activation patching moves them.

    python analyze.py [RUN ...]     lens and patching of each run (RUN/paths.json), table, figures

A site is (loop, position): the state after that loop at that token. The lens asks what a state
*shows* (paper, Section 4: the top-1 token of its unembedding); patching asks what a state *does*
(after Wang et al. 2024, Section 3, who count changed answers; here the answer must become the one
that the donor's bridge predicts). Everything goes through the model's one `edit(loop, state)`.
"""
import functools
import itertools
import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch

from data import BadInput, Parser, Queries
from grok import (load_run, milestones, plot_curves, read_run, rms_norm, run_states, to_tokens,
                  write_text)

POSITIONS = ("h", "r1", "r2", "answer")
LENS_KINDS = ("bridge", "bridge_chance", "target", "target_chance")
OUTCOMES = ("redirected", "changed", "unchanged")
BATCH = 512


# ---------------------------------------------------------------- small statistics

def wilson(hits, n):
    """95 % Wilson score interval (low, high) of a share hits / n; (0, 1) if n is 0."""
    if n == 0:
        return 0.0, 1.0
    z, p = 1.959964, hits / n
    middle, half = p + z * z / (2 * n), z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def alike(a, b):
    """How alike two causal maps (n_loops, T) are, in [0, 1]: sum of minima over sum of maxima.

    The last loop is left out: there the answer's site is 1 and every other 0 by construction.
    """
    a, b = np.asarray(a)[:-1], np.asarray(b)[:-1]
    return float(np.minimum(a, b).sum() / max(np.maximum(a, b).sum(), 1e-12))


def alike_shuffled(a, b, times=1000):
    """Mean of `alike` with the sites of b (last loop apart) shuffled: what chance would score."""
    rng, b = np.random.default_rng(0), np.array(b)
    return float(np.mean([alike(a, [*rng.permutation(b[:-1].ravel()).reshape(b[:-1].shape), b[-1]])
                          for _ in range(times)]))


@torch.no_grad()
def predict(model, tokens):
    """The model's answers (N,) to tokens (N, T), a batch at a time."""
    return torch.cat([model(part).argmax(-1) for part in tokens.split(BATCH)])


# ---------------------------------------------------------------- logit lens

@torch.no_grad()
def logit_lens(model, tokens):
    """Top-1 token at every site, (n_loops, N, T) int64, for tokens (N, T); the paper's lens."""
    def top(state):
        return model.unembed(state).argmax(-1)                                  # one loop at a time
    return torch.cat([torch.stack([top(state) for state in run_states(model, part)])
                      for part in tokens.split(BATCH)], dim=1)


def lens_rates(top, wanted):
    """Rates at which `wanted` (N,) is the top-1 token in top (n_loops, N, T).

    map: (n_loops, T) share at each site; any: at one site at least (the paper's measure);
    best: at one fixed site, chosen on every other query and scored on the rest.
    """
    hit = top == wanted[None, :, None]
    choice = hit[:, ::2].float().mean(1)
    site = divmod(choice.argmax().item(), choice.shape[1])
    return {"map": hit.float().mean(1).tolist(), "any": hit.any(2).any(0).float().mean().item(),
            "best": hit[site[0], 1::2, site[1]].float().mean().item(), "best_site": list(site)}


def lens(model, world, asked):
    """Lens rates of bridge and target for Queries, each with its chance level (another query's)."""
    tokens, answers = to_tokens(asked, world)
    top, bridges = logit_lens(model, tokens), torch.from_numpy(asked.b)
    return {"n": len(tokens),
            "bridge": lens_rates(top, bridges), "bridge_chance": lens_rates(top, bridges.roll(1)),
            "target": lens_rates(top, answers), "target_chance": lens_rates(top, answers.roll(1))}


# ---------------------------------------------------------------- activation patching

def patch(model, tokens, site, state):
    """Logits (B, V) of a run on tokens (B, T) with `state` (B, D) put in at `site`."""
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
    """The clean state with only its part along `direction` (B, D) made the donor's.

    The direction is the difference of the two bridges' unembedding vectors: what the lens reads.
    """
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
    predicted answer), changed (to another one), unchanged.
    """
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
    shares = (counts / max(1, len(clean))).tolist()
    return {"n": len(clean), **dict(zip(OUTCOMES, shares))}


# ---------------------------------------------------------------- donors

def right_only(model, world, asked):
    """Those of the Queries that the model answers rightly."""
    tokens, answers = to_tokens(asked, world)
    return asked.take((predict(model, tokens) == answers).numpy())


def pick_donors(clean, pool, allowed, rng):
    """For each clean query a random one of the pool with allowed(clean (N, 1), pool (P,)).

    Returns (clean, donors), as Queries of the same length: clean ones without a donor are left out.
    """
    mask = allowed(Queries(*(column[:, None] for column in clean)), pool)
    if not mask.size:
        return clean.take(slice(0)), pool.take(slice(0))
    donor = (mask * rng.random(mask.shape)).argmax(1)
    found = mask.any(1)
    return clean.take(found), pool.take(donor[found])


def swap(model, world, clean, pool, rng):
    """Donor with the same r2, another bridge, another answer: the answer should be the donor's."""
    clean, donor = pick_donors(clean, pool, lambda c, d:
                               (c.r2 == d.r2) & (c.b != d.b) & (c.t != d.t), rng)
    return clean, donor, donor.t


def swap_other_r2(model, world, clean, pool, rng):
    """Donor with another r2 too: a state that carries the bridge b' alone gives the tail of
    (b', r2), which is neither query's own answer; one that carries the answer gives the donor's."""
    def tail(b, r2):
        fact = world.find(*np.broadcast_arrays(b, r2))
        return np.where(fact >= 0, world.tails.ravel()[fact], -1)

    def allowed(c, d):
        t = tail(d.b, c.r2)
        return ((c.r2 != d.r2) & (c.b != d.b) & (c.t != d.t)
                & (t >= 0) & (t != c.t) & (t != d.t))
    clean, donor = pick_donors(clean, pool, allowed, rng)
    return clean, donor, tail(donor.b, clean.r2)


def same_bridge(model, world, clean, pool, rng):
    """Donor with the same bridge, another r2 and answer: no change where only b is carried."""
    clean, donor = pick_donors(clean, pool, lambda c, d:
                               (c.b == d.b) & (c.r2 != d.r2) & (c.t != d.t) &
                               ((c.h != d.h) | (c.r1 != d.r1)), rng)
    return clean, donor, donor.t


def restore(model, world, clean, pool, rng):
    """Corrupted run (h replaced at random, the answer lost) into which the clean state is put back.

    The roles are turned round: the corrupted query is patched, the clean one is the donor, and the
    predicted answer is the clean one (Wang et al., Section 3, role h).
    """
    moved = (clean.h + rng.integers(1, world.n_entities, len(clean.h))) % world.n_entities
    corrupted = clean._replace(h=moved)
    tokens, answers = to_tokens(corrupted, world)
    lost = (predict(model, tokens) != answers).numpy()
    return corrupted.take(lost), clean.take(lost), clean.t[lost]


PATCHES = {"swap": (swap, whole), "swap_visible": (swap, visible),
           "swap_other_r2": (swap_other_r2, whole), "same_bridge": (same_bridge, whole),
           "noise": (swap, noise), "restore": (restore, whole)}


def causal(model, world, asked, n=500):
    """Every kind of PATCHES at every site, {kind: patch_map}; clean and donor query both right.

    Donors come from `asked` too. "self" (donor = the query) is in as the control that must read
    unchanged = 1 everywhere.
    """
    rng = np.random.default_rng(0)
    pool = right_only(model, world, asked)
    clean = pool.take(slice(n))
    maps = {"self": _measure(model, world, clean, clean, np.full(len(clean.t), -1), whole)}
    for kind, (donors, put) in PATCHES.items():
        maps[kind] = _measure(model, world, *donors(model, world, clean, pool, rng), put)
    return maps


def _measure(model, world, clean, donor, predicted, put):
    tokens, donor_tokens = to_tokens(clean, world)[0], to_tokens(donor, world)[0]
    vector = rms_norm(model.embedding)
    direction = vector[donor.b] - vector[clean.b] if put is visible else None
    return patch_map(model, tokens, donor_tokens, predict(model, tokens),
                     torch.from_numpy(predicted), put, direction)


# ---------------------------------------------------------------- inference paths of a run

def inference_path(model, world, splits, n=500, pool=2000):
    """{split: {"lens": ..., "causal": ...}} for test_id and test_ood compositions.

    The lens looks at up to n random queries; patching at up to n of those answered rightly,
    with donors from up to `pool` of the split.
    """
    rng, path = np.random.default_rng(0), {}
    for split in ("test_id", "test_ood"):
        asked = splits[split].take(rng.permutation(len(splits[split].h))[:pool])
        path[split] = {"lens": lens(model, world, asked.take(slice(n))),
                       "causal": causal(model, world, asked, n)}
    return path


def run_paths(folder):
    """Inference paths before and after grokking of a run folder; kept in its paths.json."""
    paths = {}
    for stage in ("before", "after"):
        if (Path(folder) / f"{stage}.pt").exists():
            paths[stage] = inference_path(*load_run(folder, stage))
    write_text(Path(folder) / "paths.json", json.dumps(paths) + "\n")
    return paths


def trace(model, world, splits):
    """Lines that follow one OOD query with h, b and t apart: the top-1 token at every site."""
    asked = splits["test_ood"]
    apart = asked.take((asked.h != asked.b) & (asked.b != asked.t) & (asked.h != asked.t))
    right = right_only(model, world, apart)
    query = (right if len(right.h) else asked).take(slice(1))
    entity, relation = world.entity_names, world.relation_names
    h, r1, r2, b, t = (int(column[0]) for column in query)
    yield (f"OOD query ({entity[h]}, {relation[r1]} -> bridge {entity[b]}, {relation[r2]} -> "
           f"{entity[t]}): top-1 token at each site")
    names = [*entity, *relation, "_"]
    yield f"  {'loop':<6}" + "".join(f"{position:<12}" for position in POSITIONS)
    for loop, row in enumerate(logit_lens(model, to_tokens(query, world)[0])[:, 0].tolist(), 1):
        yield f"  {loop:<6}" + "".join(f"{names[token]:<12}" for token in row)


# ---------------------------------------------------------------- figures, from a run's files

def canvas(rows, columns, width, height, **options):
    """A figure of rows x columns axes of the given size in inches each."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt.subplots(rows, columns, squeeze=False, layout="constrained",
                        figsize=(width * columns + 0.6, height * rows + 0.4), **options)


def finish(figure, path):
    """Write the figure as PNG, the same bytes for the same content."""
    figure.savefig(path, dpi=130, metadata={"Software": None})
    matplotlib.pyplot.close(figure)


def heat(axes, values, title):
    """One map (n_loops, T) of shares in [0, 1], each cell with its number."""
    values = np.asarray(values)
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    for (loop, position), value in np.ndenumerate(values):
        axes.text(position, loop, f"{value:.2f}", ha="center", va="center", fontsize=7,
                  color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(POSITIONS)), POSITIONS, fontsize=7)
    axes.set_yticks(range(len(values)), range(1, len(values) + 1), fontsize=7)
    axes.set_title(title, fontsize=7)


def plot_maps(paths, about, part, path):
    """Maps of a run's paths: a row for each stage and split, a column for each kind of map."""
    lens_part = part == "lens"
    kinds = LENS_KINDS if lens_part else tuple(PATCHES)
    rows = [(stage, split) for stage in paths for split in paths[stage]]
    figure, grid = canvas(len(rows), len(kinds), 1.75, 1.75)
    for (stage, split), line in zip(rows, grid):
        found = paths[stage][split][part]
        for kind, axes in zip(kinds, line):
            values = found[kind]["map" if lens_part else "redirected"]
            n = found["n"] if lens_part else found[kind]["n"]
            heat(axes, values, f"{kind.replace('_', ' ')}\n(n = {n})")
        line[0].set_ylabel(f"{split}, {stage}\nloop", fontsize=8)
    figure.supxlabel("token position", fontsize=8)
    what = "top-1 token is the ..." if lens_part else "answer becomes the predicted one"
    figure.suptitle(f"{about['regime']}, seed {about['model']['seed']}: share of queries whose "
                    f"{what}", fontsize=9)
    finish(figure, path)


CURVES = {"training compositions": ("#000000", "-", ("accuracy", "train_inferred")),
          "OOD answer": ("#D55E00", "-", ("accuracy", "test_ood")),
          "bridge seen on OOD (lens)": ("#009E73", "--", ("lens", "test_ood", "any")),
          "the same by chance": ("#009E73", ":", ("lens", "test_ood", "any_chance"))}


def plot_regimes(groups, path):
    """A panel a regime (paper, Figure 2): mean over seeds, and the range as a band."""
    figure, (row,) = canvas(1, len(groups), 2.6, 2.6, sharey=True)
    for (name, histories), axes in zip(groups.items(), row):
        steps = [line["step"] for line in histories[0]]
        for label, (color, style, keys) in CURVES.items():
            values = np.array([[functools.reduce(dict.get, keys, line) for line in history]
                               for history in histories])
            axes.plot(steps, values.mean(0), style, color=color, label=label, lw=1.5)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        axes.set_title(f"{name}\n({len(histories)} seeds)", fontsize=8)
        axes.set(xscale="log", xlabel="training step", ylim=(-0.02, 1.02))
    row[0].set_ylabel("share of queries")
    row[0].legend(fontsize=6, loc="upper left")
    finish(figure, path)


# ---------------------------------------------------------------- tables

def causal_path(maps):
    """The path through a run: for each loop (position, "b" or "t", share redirected by `swap`).

    The position is where a swap redirects most; it carries the bridge (b) if `swap_other_r2`
    redirects more there than `same_bridge` does, else the answer (t).
    """
    effect, bridge, answer = (np.asarray(maps[kind]["redirected"])
                              for kind in ("swap", "swap_other_r2", "same_bridge"))
    best = effect.argmax(1)
    return [(position, "b" if bridge[loop, position] > answer[loop, position] else "t",
             effect[loop, position]) for loop, position in enumerate(best)]


def report(paths):
    """Lines about one run: what the lens sees, and every patch along the causal path."""
    for (stage, splits), split in itertools.product(paths.items(), ("test_id", "test_ood")):
        found = splits[split]
        seen, chance = found["lens"]["bridge"], found["lens"]["bridge_chance"]
        loop, position = seen["best_site"]
        yield (f"{stage}, {split}: lens (n = {found['lens']['n']}) bridge at any site "
               f"{seen['any']:.3f} (chance {chance['any']:.3f}), at loop {loop + 1}, "
               f"{POSITIONS[position]} {seen['best']:.3f}")
        for loop, (position, carried, _) in enumerate(causal_path(found["causal"])[:-1]):
            yield (f"  {f'loop {loop + 1}, {POSITIONS[position]} ({carried})':<20}{'n':>4}  "
                   + "".join(f"{outcome:<20}" for outcome in OUTCOMES))
            for kind, maps in found["causal"].items():
                n, cells = maps["n"], ""
                for outcome in OUTCOMES:
                    share = maps[outcome][loop][position]
                    low, high = wilson(share * n, n)
                    cells += f"{share:.3f} [{low:.2f}, {high:.2f}]  "
                yield f"    {kind:<18}{n:>4}  {cells}"


def spread(values, digits=2):
    """"mean (least to most)" of one value a seed; seeds that never got there (None) are counted."""
    there = [v for v in values if v is not None]
    never = len(values) - len(there)
    if not there:
        return "never"
    return (f"{np.mean(there):.{digits}f} ({min(there):.{digits}f} to {max(there):.{digits}f}"
            + (f"; {never} never)" if never else ")"))


def markdown(head, rows):
    """Lines of a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(map(str, row)) + " |"


def by_regime(found):
    """{run folder: value} -> {regime: [value of each seed]}; the folder's parent is the regime."""
    groups = {}
    for folder, value in found.items():
        groups.setdefault(Path(folder).parent.name, []).append(value)
    return groups


def stages_table(groups):
    """Milestones and last figures, a row a regime (Finding 1; paper, Figure 2)."""
    names = list(milestones([]))
    for regime, histories in groups.items():
        last = [history[-1] for history in histories]
        steps = [spread([milestones(history)[name] for history in histories], 0) for name in names]
        right = [spread([line["accuracy"][split] for line in last], 3)
                 for split in ("test_id", "test_ood")]
        seen = [spread([line["lens"]["test_ood"][key] for line in last])
                for key in ("any", "any_chance")]
        yield [regime, len(histories), *steps, *right, *seen]


STAGES_HEAD = ["regime", "seeds", *milestones([]), "ID answer", "OOD answer", "bridge on OOD",
               "by chance"]


def paths_table(groups):
    """The causal path of each model, stage and split, beside what the lens sees (Finding 1)."""
    for regime, models in groups.items():
        for (seed, paths), split in itertools.product(enumerate(models), ("test_id", "test_ood")):
            for stage, found in paths.items():
                seen, maps = found[split]["lens"]["bridge"], found[split]["causal"]
                chance = found[split]["lens"]["bridge_chance"]
                loop, position = seen["best_site"]
                path = " → ".join(f"{carried} at {POSITIONS[place]} {share:.2f}"
                                  for place, carried, share in causal_path(maps)[:-1])
                visible = np.asarray(maps["swap_visible"]["redirected"])[:-1]
                site = np.unravel_index(visible.argmax(), visible.shape)
                yield [regime, seed, SPLIT_NAMES[split], stage, maps["swap"]["n"], path,
                       f"{seen['any']:.2f} ({chance['any']:.2f})",
                       f"{seen['best']:.2f} at {loop + 1}, {POSITIONS[position]}",
                       f"{visible.max():.2f} at {site[0] + 1}, {POSITIONS[site[1]]}"]


SPLIT_NAMES = {"test_id": "ID", "test_ood": "OOD"}
PATHS_HEAD = ["regime", "seed", "queries", "grokking", "n", "causal path: loops 1, 2, 3",
              "lens: bridge at any site (chance)", "at the best fixed site",
              "swap of the visible part redirects at most"]
MAPS = {"swap": lambda found: found["causal"]["swap"]["redirected"],
        "lens": lambda found: found["lens"]["bridge"]["map"]}
PAIRS = {"ID before, ID after": (("before", "test_id"), ("after", "test_id"), True),
         "ID after, OOD after": (("after", "test_id"), ("after", "test_ood"), True),
         "ID before, another seed's": (("before", "test_id"), ("before", "test_id"), False),
         "ID after, another seed's": (("after", "test_id"), ("after", "test_id"), False)}
LIKE_HEAD = ["regime", "map", "compared", "pairs", "alike", "sites shuffled"]


def likeness_table(groups):
    """How alike maps are: one model's before and after, beside two baselines (Finding 1)."""
    for (regime, models), (name, pick) in itertools.product(groups.items(), MAPS.items()):
        maps = [{(stage, split): pick(found) for stage, splits in model.items()
                 for split, found in splits.items()} for model in models]
        for label, (one, two, same) in PAIRS.items():
            pairs = [(a[one], b[two]) for i, a in enumerate(maps) for j, b in enumerate(maps)
                     if (i == j if same else i < j) and one in a and two in b]
            if pairs:
                yield [regime, name, label, len(pairs), spread([alike(*pair) for pair in pairs]),
                       f"{np.mean([alike_shuffled(*pair) for pair in pairs]):.2f}"]


def tables(runs):
    """Lines of the README's Markdown tables, from metrics.jsonl and paths.json of the runs."""
    histories = by_regime({run: read_run(run)[1] for run in runs})
    paths = by_regime({run: json.loads((Path(run) / "paths.json").read_text()) for run in runs})
    for head, rows in ((STAGES_HEAD, stages_table(histories)), (PATHS_HEAD, paths_table(paths)),
                       (LIKE_HEAD, likeness_table(paths))):
        yield ""
        yield from markdown(head, rows)


# ---------------------------------------------------------------- the command line

def analyze_run(folder):
    """Measure one run: paths.json, curves.png, lens.png, patching.png; prints what was found."""
    about, _ = read_run(folder)
    paths = run_paths(folder)
    plot_curves(folder)
    plot_maps(paths, about, "lens", Path(folder) / "lens.png")
    plot_maps(paths, about, "causal", Path(folder) / "patching.png")
    print(f"\n{folder}", *report(paths), *trace(*load_run(folder)), sep="\n", flush=True)


def shipped():
    """The run folders under runs/shipped, in order."""
    return sorted(path.parent for path in Path("runs/shipped").rglob("after.pt"))


def main(argv=None):
    """Analyse runs, print their tables, draw their figures; exit status 0, or 2 for bad input."""
    parser = Parser(prog="analyze.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders (all under runs/shipped)")
    try:
        runs = parser.parse(sys.argv[1:] if argv is None else argv)["runs"] or shipped()
        for folder in runs:
            analyze_run(folder)
        Path("figures").mkdir(exist_ok=True)
        histories = by_regime({run: read_run(run)[1] for run in runs})
        plot_regimes(histories, Path("figures/regimes.png"))
        print(*tables(runs), sep="\n")
    except BadInput as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
