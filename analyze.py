"""Looking inside a trained model: the logit lens reads its states, activation patching moves them.

    python analyze.py [RUN ...]     lens and patching of each run (RUN/paths.json), table, figures

A site is (loop, position): the state after that loop at that token. The lens asks what a state
*shows* (paper, Section 4: the top-1 token of its unembedding); patching asks what a state *does*
(after Wang et al. 2024, Section 3, who count changed answers; here the answer must become the one
that the donor's bridge predicts). Everything goes through the model's one `edit(loop, state)`.
"""
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
    """How alike two maps of shares are, in [0, 1]: sum of minima over sum of maxima (Ruzicka)."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.minimum(a, b).sum() / max(np.maximum(a, b).sum(), 1e-12))


def alike_shuffled(a, b, times=1000):
    """`alike` of a and b with the sites of b shuffled, mean: what two unrelated maps would score."""
    rng, b = np.random.default_rng(0), np.asarray(b)
    return float(np.mean([alike(a, rng.permutation(b.ravel()).reshape(b.shape))
                          for _ in range(times)]))


@torch.no_grad()
def predict(model, tokens):
    """The model's answers (N,) to tokens (N, T), a batch at a time."""
    return torch.cat([model(part).argmax(-1) for part in tokens.split(BATCH)])


# ---------------------------------------------------------------- logit lens

@torch.no_grad()
def logit_lens(model, tokens):
    """Top-1 token at every site, (n_loops, N, T) int64, for tokens (N, T); the paper's lens."""
    return torch.cat([model.unembed(run_states(model, part)).argmax(-1)
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
    """Donor with the same bridge, another r2 and answer: changes nothing where only b is carried."""
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


def trace(model, world, query):
    """Top-1 token at every site for one query (Queries of length 1), as names [loop][position]."""
    names = [*world.entity_names, *world.relation_names, "_"]
    top = logit_lens(model, to_tokens(query, world)[0])[:, 0]                   # (n_loops, T)
    return [[names[token] for token in row] for row in top.tolist()]


# ---------------------------------------------------------------- figures, from a run's files

def heat(axes, values, title, n):
    """One map (n_loops, T) of shares as a labelled heat map; n is the number of queries."""
    values = np.asarray(values)
    axes.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
    for (loop, position), value in np.ndenumerate(values):
        axes.text(position, loop, f"{value:.2f}", ha="center", va="center", fontsize=7,
                  color="white" if value < 0.6 else "black")
    axes.set_xticks(range(len(POSITIONS)), POSITIONS, fontsize=7)
    axes.set_yticks(range(len(values)), range(1, len(values) + 1), fontsize=7)
    axes.set_title(f"{title}\n(n = {n})", fontsize=7)


LENS_MAPS = ("bridge", "bridge_chance", "target", "target_chance")
CAUSAL_MAPS = ("swap", "swap_other_r2", "same_bridge", "swap_visible", "noise", "restore")


def plot_maps(paths, about, part, kinds, path):
    """Rows: stage x split; columns: kinds of map. `part` is "lens" or "causal"."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    rows = [(stage, split) for stage in paths for split in paths[stage]]
    figure, grid = plt.subplots(len(rows), len(kinds), squeeze=False, layout="constrained",
                                figsize=(1.75 * len(kinds) + 0.6, 1.75 * len(rows) + 0.4))
    for (stage, split), line in zip(rows, grid):
        found = paths[stage][split][part]
        for kind, axes in zip(kinds, line):
            if part == "lens":
                heat(axes, found[kind]["map"], kind.replace("_", ", "), found["n"])
            else:
                heat(axes, found[kind]["redirected"], kind.replace("_", " "), found[kind]["n"])
        line[0].set_ylabel(f"{split}, {stage}\nloop", fontsize=8)
    figure.supxlabel("token position", fontsize=8)
    what = "top-1 token is ..." if part == "lens" else "answer becomes the predicted one"
    figure.suptitle(f"{about['regime']}, seed {about['model']['seed']}: share of queries whose {what}",
                    fontsize=9)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


def plot_regimes(groups, path):
    """A panel a regime (paper, Figure 2): mean over seeds, and the range as a band."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, row = plt.subplots(1, len(groups), sharey=True, squeeze=False, layout="constrained",
                               figsize=(2.3 * len(groups) + 0.5, 2.6))
    for (name, histories), axes in zip(groups.items(), row[0]):
        steps = [line["step"] for line in histories[0]]
        for label, color, style, pick in (
                ("training compositions", "#000000", "-", lambda m: m["accuracy"]["train_inferred"]),
                ("OOD answer", "#D55E00", "-", lambda m: m["accuracy"]["test_ood"]),
                ("bridge seen on OOD (lens)", "#009E73", "--", lambda m: m["lens"]["test_ood"]["any"]),
                ("chance", "#009E73", ":", lambda m: m["lens"]["test_ood"]["any_chance"])):
            values = np.array([[pick(line) for line in history] for history in histories])
            axes.plot(steps, values.mean(0), style, color=color, label=label, lw=1.5)
            axes.fill_between(steps, values.min(0), values.max(0), color=color, alpha=0.15, lw=0)
        axes.set_title(f"{name}\n({len(histories)} seeds)", fontsize=8)
        axes.set(xscale="log", xlabel="training step", ylim=(-0.02, 1.02))
    row[0][0].set_ylabel("share of queries")
    row[0][-1].legend(fontsize=6, loc="upper left")
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)


# ---------------------------------------------------------------- the table and the command line

def summary(paths):
    """Lines of the printed table: lens and best causal sites of each stage and split."""
    yield (f"{'stage':<7}{'split':<9}{'bridge any (chance)':>20}{'best fixed site':>19}"
           f"{'swap redirects':>27}{'other r2':>10}{'same bridge':>12}{'visible':>9}")
    for stage, splits in paths.items():
        for split, found in splits.items():
            seen, chance = found["lens"]["bridge"], found["lens"]["bridge_chance"]
            loop, position = seen["best_site"]
            at = {kind: found["causal"][kind] for kind in PATCHES}
            hop = np.asarray(at["swap_other_r2"]["redirected"])
            site = np.unravel_index(hop.argmax(), hop.shape)
            get = lambda kind, outcome="redirected": at[kind][outcome][site[0]][site[1]]
            n = at["swap"]["n"]
            low, high = wilson(get("swap") * n, n)
            yield (f"{stage:<7}{split:<9}{seen['any']:>12.3f} ({chance['any']:.3f})"
                   f"{seen['best']:>9.3f} at {loop + 1},{POSITIONS[position]:<6}"
                   f"{get('swap'):>6.3f} [{low:.2f}, {high:.2f}] at {site[0] + 1},"
                   f"{POSITIONS[site[1]]:<6}{get('swap_other_r2'):>5.3f}"
                   f"{get('same_bridge', 'unchanged'):>12.3f}{get('swap_visible'):>9.3f}")


def spread(values, digits=2):
    """"mean (least to most)" of one value a seed; a seed that never got there is counted."""
    there = [v for v in values if v is not None]
    never = f", {len(values) - len(there)} never" if len(there) < len(values) else ""
    if not there:
        return "never"
    return (f"{np.mean(there):.{digits}f} ({min(there):.{digits}f} to {max(there):.{digits}f}"
            f"{never})")


def by_regime(runs):
    """{regime: [history of each seed]} of run folders; a folder's parent names its regime."""
    groups = {}
    for folder in runs:
        groups.setdefault(Path(folder).parent.name, []).append(read_run(folder)[1])
    return groups


def stages_table(groups):
    """Markdown table of milestones and last figures, one row a regime (Finding 1, paper Figure 2)."""
    names = list(milestones([]))
    yield "| run | seeds | " + " | ".join(names) + " | ID | OOD | bridge on OOD (chance) |"
    yield "|" + "---|" * (len(names) + 5)
    for group, found in groups.items():
        last = [history[-1] for history in found]
        cells = [spread([milestones(history)[name] for history in found], 0) for name in names]
        cells += [spread([line["accuracy"][split] for line in last], 3)
                  for split in ("test_id", "test_ood")]
        seen = [np.mean([line["lens"]["test_ood"][k] for line in last])
                for k in ("any", "any_chance")]
        yield (f"| {group} | {len(found)} | " + " | ".join(cells)
               + f" | {seen[0]:.2f} ({seen[1]:.2f}) |")


def likeness_table(paths):
    """Markdown table of how alike causal maps are; `paths` maps run folders to inference paths.

    Same model before and after grokking, beside two baselines: another seed at the same stage,
    and the same map with its sites shuffled (Finding 1 stands or falls by this).
    """
    yield "| run | maps compared | pairs | alike (least to most) | sites shuffled |"
    yield "|---|---|---|---|---|"
    groups = {}
    for folder, found in paths.items():
        groups.setdefault(Path(folder).parent.name, []).append(
            {(stage, split): maps["causal"]["swap"]["redirected"]
             for stage, splits in found.items() for split, maps in splits.items()
             if maps["causal"]["swap"]["n"] >= 20})
    for group, models in groups.items():
        for label, one, two, same in (
                ("ID before, ID after", ("before", "test_id"), ("after", "test_id"), True),
                ("ID after, OOD after", ("after", "test_id"), ("after", "test_ood"), True),
                ("ID after, another seed's", ("after", "test_id"), ("after", "test_id"), False)):
            pairs = [(a[one], b[two]) for i, a in enumerate(models) for j, b in enumerate(models)
                     if (i == j if same else i < j) and one in a and two in b]
            if pairs:
                yield (f"| {group} | {label} | {len(pairs)} | "
                       f"{spread([alike(*pair) for pair in pairs])} | "
                       f"{np.mean([alike_shuffled(*pair) for pair in pairs]):.2f} |")


def draw(folder, paths):
    """curves.png, lens.png and patching.png of a run, from its files."""
    about, _ = read_run(folder)
    plot_curves(folder)
    plot_maps(paths, about, "lens", LENS_MAPS, Path(folder) / "lens.png")
    plot_maps(paths, about, "causal", CAUSAL_MAPS, Path(folder) / "patching.png")


def main(argv=None):
    """Analyse runs, print their tables, draw their figures; exit status 0, or 2 for bad input."""
    parser = Parser(prog="analyze.py", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="run folders (all under runs/shipped)")
    try:
        runs = parser.parse(sys.argv[1:] if argv is None else argv)["runs"]
        runs = runs or sorted(p.parent for p in Path("runs/shipped").rglob("after.pt"))
        paths = {folder: run_paths(folder) for folder in runs}
        for folder, found in paths.items():
            draw(folder, found)
            print(f"\n{folder}", *summary(found), sep="\n")
        groups = by_regime(runs)
        Path("figures").mkdir(exist_ok=True)
        plot_regimes(groups, Path("figures/regimes.png"))
        print("", *stages_table(groups), "", *likeness_table(paths), sep="\n")
    except BadInput as error:
        print(f"analyze.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
