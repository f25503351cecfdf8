"""Every picture of the README, drawn from the files of shipped runs.

    python -m extras.pictures [--root runs/shipped] [-o figures]
    python -m extras.pictures --frames RUN    train RUN anew, measuring for the moving picture

A picture whose runs are not there is skipped, with a line that says so. All are 8 inches wide, with
text of 8 points or more: the README shows them at about 800 pixels. A line is a mean over seeds, a
band goes from the least to the most.
"""
import argparse
import io
import sys
from itertools import chain, product
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

from analyze import (codes, draw_map, fit, logit_lens, map_at, means, other_r2, PARTS, patch_map,
                     places, read, values_of)
from data import BadInput
from extras.tables import by_r2, FILMED, last, read_frames, read_groups, until, wilson
from grok import (begin, build_data, Config, first_step, read_run, say, say_progress, to_tokens,
                  write_file)

WIDTH = 8.0  # inches
# told apart by the colour-blind, and in grey
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "0.45"
NAMES = {"natural": "natural", "both_full": "both hops supervised",
         "first_full": "first hop supervised", "second_full": "second hop supervised",
         "both_half": "half of both supervised"}
PAPER = {  # paper, one run, at its end: OOD answers right, bridge seen at any site
    "natural": (0.683, 0.998), "both_full": (0.999, 0.999), "first_full": (0.220, 1.0),
    "second_full": (0.968, 0.653), "both_half": (0.477, 0.078)}


# ---------------------------------------------------------------- what the pictures share
def regimes_of(groups, preset, has="history"):
    """{regime: those of its runs that have a history, paths or cells}, in the order of NAMES."""
    found = {}
    for regime in NAMES:
        runs = [run for run in groups.get(f"{preset}/{regime}", []) if getattr(run, has)]
        if runs:
            found[regime] = runs
    return found


def curve(run, split, lens=None):
    """{step: accuracy of a split, or its lens rate of that name; nan where not measured}."""
    found = {}
    for line in run.history:
        share = line["lens"].get(split, {}).get(lens) if lens else line["accuracy"].get(split)
        found[line["step"]] = np.nan if share is None else share
    return found


def draw_curve(axes, runs, split, lens=None, **style):
    """Mean and band over seeds, at the steps that every seed has; returns the last mean."""
    curves = [curve(run, split, lens) for run in runs]
    steps = sorted(set.intersection(*(set(found) for found in curves)))
    if not steps:
        return np.nan
    return draw_band(axes, steps, [list(map(found.get, steps)) for found in curves], **style)


def draw_band(axes, steps, shares, **style):
    """Mean and band of shares (seeds, steps); returns the last mean."""
    shares = np.array(shares)
    axes.plot(steps, shares.mean(0), **style)
    if len(shares) > 1:
        axes.fill_between(steps, shares.min(0), shares.max(0), color=style["color"], alpha=0.2,
                          linewidth=0)
    return shares[:, -1].mean()


def stage_lines(axes, runs):
    """Training, bridge seen with its chance, OOD answer; {label: last mean} for `label_ends`."""
    draw_curve(axes, runs, "test_ood", "any_chance", color="0.2", lw=1, ls=":")
    return {"training\ncompositions": (GREY, draw_curve(axes, runs, "train_inferred", color=GREY,
                                                        lw=1.6, ls="--")),
            "bridge seen,\nOOD (lens)": (ORANGE, draw_curve(axes, runs, "test_ood", "any",
                                                            color=ORANGE, lw=1.6)),
            "OOD answer": (BLUE, draw_curve(axes, runs, "test_ood", color=BLUE, lw=2.6))}


def label_ends(axes, ends, apart=0.13):
    """Write {label: (color, height)} to the right of the lines, moved until none overlap."""
    low = -np.inf
    ordered = sorted((height, label, color) for label, (color, height) in ends.items()
                     if np.isfinite(height))
    top = 1.02 - apart * (len(ordered) - 1)
    for i, (height, label, color) in enumerate(ordered):
        low = max(low + apart, min(height, top + apart * i))
        axes.text(1.015, low, label, transform=axes.get_yaxis_transform(), fontsize=8.5,
                  va="center", color=color)


def shares_up(axes, steps, log=True):
    """Shares upwards from 0 to 1; training steps to the right, as plain numbers."""
    axes.set_ylim(-0.03, 1.05)
    axes.set_yticks([0, 0.5, 1], ["0", ".5", "1"])
    axes.set_xlabel("training step", fontsize=8.5)
    plain(axes)
    first, end = min(steps), max(steps)
    if log and first < end:
        axes.set_xscale("log")
        ticks = np.outer(10 ** np.arange(9), (1, 2, 5)).ravel()
        ticks = ticks[(first <= ticks) & (ticks <= end)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlim(first, end)


def shares_right(axes, n_rows):
    """Shares to the right from 0 to 1; rows downwards."""
    axes.set_xlim(-0.06, 1.06)
    axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"])
    axes.set_ylim(n_rows - 0.5, -0.5)
    axes.grid(axis="x", color="0.85")
    for row in range(1, n_rows):
        axes.axhline(row - 0.5, color="0.9", lw=0.8)
    plain(axes)


def plain(axes):
    axes.tick_params(labelsize=8.5)
    axes.spines[["top", "right"]].set_visible(False)


def name_of(run):
    regime = run.about["regime"]
    return f"{run.about['preset']}, {NAMES.get(regime, regime)}, seed {run.about['model']['seed']}"


def steps_of(runs):
    steps = []
    for run in runs:
        steps += [line["step"] for line in run.history]
    return steps


def seeds_of(groups):
    """"3 seeds" or "1 to 3 seeds" of {name: runs}."""
    counts = [len(runs) for runs in groups.values()]
    low, high = min(counts), max(counts)
    return f"{low} to {high} seeds" if low < high else f"{high} seed{'s' * (high > 1)}"


# ---------------------------------------------------------------- one query in words
def trace(model, world, query):
    """Lines that follow one query (Queries of one row): the top-1 token at every site."""
    names = [*world.entity_names, *world.relation_names, "_"]
    tokens, _ = to_tokens(query, world, model.config.layout)
    h, r1, r2 = (names[token] for token in tokens[0, :3])
    b, t, top = names[query.b[0]], names[query.t[0]], logit_lens(model, tokens)[:, :, 0]
    lines = [f"({h}, {r1}) is the bridge {b}, ({b}, {r2}) is {t}: top-1 token at each site",
             f"{'loop':<6}{'part':<8}" + "".join(f"{p:<10}" for p in places(top.shape[2]))]
    for loop, part in np.ndindex(*top.shape[:2]):
        shown = "".join(f"{names[token]:<10}" for token in top[loop, part])
        lines.append(f"{loop + 1:<6}{PARTS[part]:<8}{shown}")
    return lines


# ---------------------------------------------------------------- the task
def box(axes, x, y, text, color="white", width=1.5, height=0.75, **style):
    """A box with text around the point (x, y)."""
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=color,
                                  boxstyle="round,pad=0,rounding_size=0.12", edgecolor="0.3",
                                  **style))
    axes.text(x, y, text, ha="center", va="center", fontsize=9)


def arrow(axes, start, end, text="", bend=0.0, color="0.3", above=0.28):
    """An arrow between two points, with text at its middle."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color,
                                   connectionstyle=f"arc3,rad={bend}", linewidth=1.3,
                                   shrinkA=0, shrinkB=0))
    axes.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + above, text, ha="center",
              va="center", fontsize=9)


def two_facts(axes, words, symbols, shade):
    """The facts (h, r1, b) and (b, r2, t) as a path; words for h, r1, b, r2, t."""
    h, r1, b, r2, t = words
    colors = "white", shade, "white"
    for x, word, symbol, color in zip((1.1, 4.1, 7.1), (h, b, t), symbols, colors):
        box(axes, x, 7.5, word, color)
        axes.text(x, 6.87, symbol, ha="center", va="center", fontsize=8.5, color="0.3")
    arrow(axes, (1.9, 7.5), (3.3, 7.5), r1)
    arrow(axes, (4.9, 7.5), (6.3, 7.5), r2)


def looped_block(axes, words, n_loops):
    """The block over the tokens of a query, and the way back through it."""
    for x, word, symbol in zip((1.1, 2.8, 4.5, 6.2), words, ("h", "r1", "r2", "answer")):
        box(axes, x, 1.15, word)
        axes.text(x, 0.5, symbol, ha="center", va="center", fontsize=8.5, color="0.3")
        arrow(axes, (x, 1.55), (x, 2.08))
        box(axes, x, 4.15, "", width=0.7, height=0.42)
        arrow(axes, (x, 3.32), (x, 3.92))
    box(axes, 3.65, 2.7, "one block: mix the tokens, then MLP", "0.9", width=6.6, height=1.2)
    axes.text(0.2, 4.15, "state", ha="right", va="center", fontsize=8.5, rotation=90)
    arrow(axes, (6.65, 4.15), (7.02, 2.55), bend=-0.75)
    axes.text(7.75, 3.3, f"× {n_loops}", va="center", fontsize=11, weight="bold")


def task(n_loops):
    """The page a teacher draws on the board: two facts, a question, and one swap."""
    figure = Figure((WIDTH, 4.35))
    left, right = (figure.add_axes([x, 0.0, 0.48, 0.92], xlim=(-0.3, 8.6), ylim=(0.2, 8.2))
                   for x in (0.01, 0.51))
    for axes in (left, right):
        axes.set_axis_off()
        looped_block(axes, ("Ada", "mother", "city", "_"), n_loops)
    left.set_title("The question: in which city is Ada's mother?", fontsize=10.5)
    two_facts(left, ("Ada", "mother", "Bea", "city", "Bern"),
              ("h", "bridge b: never named", "answer t"), ORANGE)
    arrow(left, (6.2, 4.38), (6.2, 5.05))
    box(left, 6.2, 5.45, "Bern")
    right.set_title("One swap: does the model use the bridge?", fontsize=10.5)
    two_facts(right, ("Carl", "boss", "Dora", "team", "Reds"),
              ("donor's h", "donor's bridge", "donor's answer"), BLUE + "66")
    box(right, 4.5, 4.15, "", BLUE + "66", width=0.7, height=0.42)
    arrow(right, (4.1, 6.62), (4.5, 4.42), bend=-0.1, color=BLUE)
    right.text(3.9, 5.7, "a value from Carl's\nquery is put in here", ha="right", va="center",
               fontsize=8.5, color=BLUE)
    arrow(right, (6.2, 4.38), (6.2, 5.05))
    box(right, 6.2, 5.45, "Oslo", BLUE + "66")
    right.text(7.15, 5.45, "Dora's city:\nredirected", va="center", fontsize=8.5)
    return figure


# ---------------------------------------------------------------- training curves
def hero(run):
    """One run: training, bridge, OOD answer, and how long the last comes after the first."""
    figure = Figure((WIDTH, 3.7), layout="constrained")
    axes = figure.subplots()
    ends = stage_lines(axes, [run])
    shares_up(axes, steps_of([run]))
    label_ends(axes, ends)
    axes.set_ylabel("share of queries", fontsize=8.5)
    fitted = first_step(run.history, 0.99, "train_inferred")
    answered = first_step(run.history, 0.9, "test_ood")
    said = "training never fitted" if fitted is None else f"training fitted at step {fitted:,}"
    said += (", nine in ten OOD answers right never" if answered is None
             else f", nine in ten OOD answers right at {answered:,}")
    axes.set_title(name_of(run) + ": " + said, fontsize=10)
    if fitted is not None and answered is not None and fitted < answered:
        axes.axvspan(fitted, answered, color="0.92", zorder=0, linewidth=0)
        axes.text((fitted * answered) ** 0.5, 0.02, f"{answered - fitted:,} steps\nin between",
                  fontsize=8.5, ha="center")
    chance = last(run, "test_ood", "any_chance")
    if chance is not None:
        axes.text(0.99, chance + 0.02, "bridge seen by chance", fontsize=8, ha="right",
                  transform=axes.get_yaxis_transform())
    return figure


def probed(runs):
    """Filmed runs: the stages, and the bridge of OOD queries as a probe reads it, best site."""
    figure = Figure((WIDTH, 3.3), layout="constrained")
    axes = figure.subplots()
    ends = stage_lines(axes, runs)
    filmed = [read_frames(run.folder / "frames.npz") for run in runs]
    S = min(len(frames["step"]) for frames in filmed)
    present = [frames["probe"][:S].max((1, 2, 3)) for frames in filmed]      # (seeds, S)
    ends["bridge present,\nOOD (probe)"] = GREEN, draw_band(
        axes, filmed[0]["step"][:S], present, color=GREEN, lw=1.6, ls="-.")
    shares_up(axes, steps_of(runs))
    label_ends(axes, ends)
    axes.set_ylabel("share of queries", fontsize=8.5)
    axes.set_title("{preset}, {regime}: ".format(**runs[0].about) + "mean and range of "
                   f"{seeds_of({'': runs})}; dots: seen by chance", fontsize=10)
    return figure


def regimes(groups):
    """The curves of the regimes, {regime: runs}, one panel each."""
    figure = Figure((WIDTH, 4.6), layout="constrained")
    grid = figure.subplots(2, 3, sharey=True).ravel()  # the last panel: the legend
    for axes in grid[len(groups):]:
        axes.set_axis_off()
    for axes, (regime, runs) in zip(grid, groups.items()):
        stage_lines(axes, runs)
        shares_up(axes, steps_of(runs))
        axes.set_title(NAMES[regime], fontsize=9.5)
    grid[-1].legend(handles=[
        Line2D([], [], color=GREY, ls="--", lw=1.6, label="training compositions"),
        Line2D([], [], color=ORANGE, lw=1.6, label="bridge seen at any state, OOD"),
        Line2D([], [], color="0.2", lw=1, ls=":", label="the same by chance"),
        Line2D([], [], color=BLUE, lw=2.6, label="OOD answer")], loc="center", fontsize=8.5,
        frameon=False)
    preset = next(iter(groups.values()))[0].about["preset"]
    figure.suptitle(f"Training, bridge and OOD answer in {preset}: mean and range of "
                    f"{seeds_of(groups)}", fontsize=10)
    figure.supylabel("share of queries", fontsize=8.5)
    return figure


# ---------------------------------------------------------------- seen and used (Finding 2)
def shares_of(run, split):
    """{measure: share of a split's queries, or nan}, grokked; sites are the best of all."""
    found = run.paths["grokked"][split]
    lens = [found["lens"][part] for part in PARTS]
    seen = lens[PARTS.index("state")]["bridge"]
    used = [map_at(found, kind).max() if found["patch"][kind]["n"] else None
            for kind in ("other_r2", "code")]
    shares = {"answered": last(run, split), "seen at any state": seen["any"],
              "seen at one site": seen["best"],
              "seen among entities": largest(part["entity"]["best"] for part in lens),
              "present: a probe": largest(np.ravel(found["probe"])),
              "used: a donor's value": used[0], "used: the bridge's code": used[1]}
    return {name: np.nan if share is None else share for name, share in shares.items()}


def largest(shares):
    """The largest share; None if there is none."""
    return max((share for share in shares if share is not None), default=None)


def seen_used(groups):
    """{regime: runs with paths}: what is answered, seen, present and used, one panel a regime."""
    measures = list(shares_of(next(iter(groups.values()))[0], "test_ood"))
    figure = Figure((WIDTH, 4.9), layout="constrained")
    grid = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, (regime, runs) in zip(grid, groups.items()):
        for split, color, marker, shift in (("test_ood", BLUE, "o", -0.11),
                                            ("test_id", ORANGE, "s", 0.11)):
            draw_shares(axes, [shares_of(run, split) for run in runs], color, marker, shift)
        draw_paper(axes, regime, runs)
        axes.set_title("\n".join(NAMES[regime].rsplit(" ", 1)), fontsize=9)
        shares_right(axes, len(measures))
    grid[0].set_yticks(range(len(measures)), measures)
    figure.suptitle("Answered, seen, present, used: share of queries at the end of training "
                    "(used: of those answered rightly)", fontsize=10)
    figure.legend(handles=[
        Line2D([], [], color=BLUE, marker="o", ls="", ms=5, label="OOD, a dot a seed"),
        Line2D([], [], color=ORANGE, marker="s", ls="", ms=5, label="ID"),
        Line2D([], [], color="0.2", marker="|", ls="", ms=12, mew=2, label="mean over seeds"),
        Line2D([], [], color="0.2", marker="x", ls="", ms=5, label="seen by chance, OOD"),
        Line2D([], [], color="black", marker="D", ls="", mfc="none", ms=6,
               label="paper, one run (OOD)")],
        loc="outside lower center", ncols=5, fontsize=8.5, frameon=False, columnspacing=1.0,
        handletextpad=0.2)
    return figure


def draw_shares(axes, shares, color, marker, shift):
    """One row a measure: a dot a seed, their mean as a line; shares is a list of `shares_of`."""
    for row, name in enumerate(shares[0]):
        values = np.array([found[name] for found in shares])
        values = values[np.isfinite(values)]
        axes.plot(values, np.full(len(values), row + shift), marker, ms=4.5, color=color,
                  alpha=0.75, mew=0)
        if len(values):
            axes.plot([values.mean()] * 2, [row + shift - 0.1, row + shift + 0.1], color="0.2",
                      lw=2, solid_capstyle="butt")


def draw_paper(axes, regime, runs):
    """The paper's values, hollow, and what the lens shows of another query's bridge."""
    for row, share in enumerate(PAPER[regime]):
        axes.plot(share, row - 0.33, "D", color="black", mfc="none", ms=5.5, clip_on=False)
    chance = [run.paths["grokked"]["test_ood"]["lens"]["state"]["bridge_chance"] for run in runs]
    for row, kind in ((1, "any"), (2, "best")):
        values = [found[kind] for found in chance if found[kind] is not None]
        if values:
            axes.plot(np.mean(values), row + 0.33, "x", color="0.2", ms=4.5)


# ---------------------------------------------------------------- half supervision in four cells
CELLS = {"yes, yes": "both hops", "yes, no": "hop 1 alone", "no, yes": "hop 2 alone",
         "no, no": "neither hop"}


def cells(groups):
    """{regime: runs with cells}: OOD answers by what was supervised, a dot a seed."""
    rows = []
    for regime, cell in product(groups, CELLS):
        if any(run.cells[cell]["n"] for run in groups[regime]):
            rows.append((regime, cell))
    figure = Figure((WIDTH, 0.42 * len(rows) + 1.3), layout="constrained")
    grid = figure.subplots(1, 2, sharey=True)
    for axes, title, end in zip(grid, ("all OOD queries", "both facts are known"), ("", "_known")):
        for row, (regime, cell) in enumerate(rows):
            found = [run.cells[cell] for run in groups[regime] if run.cells[cell]["n" + end]]
            draw_cell(axes, row, [(c["right" + end], c["n" + end]) for c in found])
        axes.set_title(title, fontsize=9.5)
        axes.set_xlabel("share right, and 95 % interval of each seed", fontsize=8.5)
        shares_right(axes, len(rows))
    grid[0].set_yticks(range(len(rows)), [f"{NAMES[regime]}: {CELLS[cell]}"
                                          for regime, cell in rows])
    figure.suptitle(f"OOD answers by the hops whose facts were supervised, {seeds_of(groups)}",
                    fontsize=10)
    return figure


def draw_cell(axes, row, found):
    """One row: [(share, n) of a seed, ...] with Wilson intervals, n to the right."""
    for seed, (share, n) in enumerate(found):
        y = row + 0.2 * (seed - (len(found) - 1) / 2)
        axes.plot(wilson(round(share * n), n), [y, y], color=GREY, lw=1.2)
        axes.plot(share, y, "o", color=BLUE, ms=4.5)
    counts = [n for _, n in found] or [0]
    low, high = min(counts), max(counts)
    axes.text(1.04, row, f"n = {low}" + (f" to {high}" if low < high else ""), fontsize=8.5,
              va="center", transform=axes.get_yaxis_transform())


# ---------------------------------------------------------------- fine-tuning (Finding 3)
KINDS = {"new_old": "new + old", "old_new": "old + new", "new_new": "new + new"}
STARTS = {  # started from: color, dashes, name
    "scratch": (GREY, ":", "from scratch"),
    "natural_before": (ORANGE, "--", "natural, before"),
    "natural_grokked": (BLUE, "-", "natural, grokked"),
    "both_full_grokked": ("#CC79A7", "-.", "both hops supervised, grokked")}


def tuned_of(groups):
    """{"some" or "all" old facts kept: {key of STARTS: runs}}, the longer runs where there are."""
    found = {}
    for kept, end in (("some", ""), ("all", "_all")):
        for start in STARTS:
            short, long = (groups.get(f"tune/{kind}_{start}{end}") for kind in ("small", "flat"))
            if long or short:
                found.setdefault(kept, {})[start] = long or short
    return found


def tuned(found):
    """Compositions with new facts while fine-tuning, one panel a kind; see `tuned_of`. A thin
    line: what r2 alone gives, see `r2_alone` of tables."""
    figure = Figure((WIDTH, 2.3 * len(found) + 0.9), layout="constrained")
    grid = figure.subplots(len(found), 3, sharey=True, squeeze=False)
    for (kept, starts), line in zip(found.items(), grid):
        one = next(iter(starts.values()))[0]
        some = one.about["world"]["kept"]
        line[0].set_ylabel("all old facts kept" if kept == "all"
                           else f"{100 * some:.0f} % of old facts kept", fontsize=8.5)
        for (split, kind), guess, axes in zip(KINDS.items(), by_r2(one), line):
            axes.axhline(float(guess), color="0.2", lw=0.8)
            for key, runs in starts.items():
                color, dashes, _ = STARTS[key]
                draw_curve(axes, runs, split, color=color, ls=dashes, lw=2)
            shares_up(axes, sum(map(steps_of, starts.values()), []), log=False)
            axes.set_title(kind, fontsize=9.5)
    shown = set().union(*found.values())
    figure.legend(handles=[Line2D([], [], color=color, ls=dashes, lw=2, label=name)
                           for key, (color, dashes, name) in STARTS.items() if key in shown]
                  + [Line2D([], [], color="0.2", lw=0.8, label="r2 alone")],
                  loc="outside lower center", ncols=5, fontsize=8.5, frameon=False)
    runs = dict(enumerate(chain.from_iterable(starts.values() for starts in found.values())))
    figure.suptitle("Share of compositions with new facts that are right, while fine-tuning: mean "
                    f"and range of {seeds_of(runs)}", fontsize=10)
    return figure


# ---------------------------------------------------------------- the moving picture
MAPS = {"bridge": "seen: bridge\nis top-1", "entity": "seen: bridge is top\namong entities",
        "code": "used: bridge's code\nredirects"}


def film(folder, n=100):
    """Train the run of a folder anew, on one thread of the CPU, and write frames.npz into it.

    "step" (S,), one an evaluation; "bridge", "entity", "probe", "code": maps (S, n_loops, 2, T) of
    the share of up to n OOD queries in which the bridge is top-1, is top among the entities, is
    read by a probe fitted on ID queries, and in which the code of a donor's bridge in place of
    their own redirects the answer; "n". Raises BadInput if the run does not end as its
    metrics.jsonl says.
    """
    about, history = read_run(folder)
    world, splits = build_data(about, folder)
    if "test_ood" not in splits:
        raise BadInput(f"{folder}: has no OOD queries, a run with new facts cannot be filmed")
    rng = np.random.default_rng(0)
    known, pool = (splits[split].take(rng.permutation(len(splits[split].h))[:2000])
                   for split in ("test_id", "test_ood"))
    swapped = [part[:n] if isinstance(part, np.ndarray) else part.take(slice(n))
               for part in other_r2(world, pool, pool, rng)]
    if not len(swapped[2]):
        raise BadInput(f"{folder}: has no two OOD queries to swap")
    trainer, frames = begin({**about, "device": "cpu"}, world, splits), []
    while trainer.step < trainer.config.steps:
        trainer.train_step()
        if trainer.step % trainer.config.eval_every == 0 or trainer.step == trainer.config.steps:
            trainer.measure()
            frames.append(frame(trainer.average, world, known, *swapped))
            say_progress(trainer)
    compare(folder, trainer.history, history)
    content = io.BytesIO()
    maps = {}
    for name in FILMED:
        maps[name] = np.array([found[name] for found in frames], np.float32)
    np.savez_compressed(content, n=len(swapped[2]), step=[line["step"] for line in trainer.history],
                        **maps)
    write_file(folder / "frames.npz", content.getvalue())


def frame(model, world, known, clean, donor, predicted):
    """{"bridge", "entity", "code", "probe"}: the maps of `film` for one moment; codes and probe are
    those of the ID queries `known`."""
    tokens, _ = to_tokens(clean, world, model.config.layout)
    known_tokens, _ = to_tokens(known, world, model.config.layout)
    code = codes(model, known_tokens, torch.from_numpy(known.b), world.n_entities)
    new = values_of(model, tokens) + code[:, :, donor.b] - code[:, :, clean.b]
    bridges, found = torch.from_numpy(clean.b)[:, None], {}
    for name, first in (("bridge", None), ("entity", world.n_entities)):
        found[name] = (logit_lens(model, tokens, first) == bridges).float().mean(2).tolist()
    weights = fit(model, known_tokens, torch.eye(world.n_entities)[torch.from_numpy(known.b)])
    found["probe"] = means(read(model, tokens, weights).argmax(-1) == bridges[:, 0])
    found["code"] = patch_map(model, tokens, new, torch.from_numpy(predicted))["redirected"]
    return found


def compare(folder, new, old):
    """BadInput unless both histories end with the same accuracies, up to rounding."""
    ends = [{"step": line["step"], **line["accuracy"]} for line in (new[-1], old[-1])]
    for name, value in ends[1].items():
        if not abs(ends[0].get(name, np.nan) - value) <= 1e-6:  # a nan is no agreement
            raise BadInput(f"{folder}: {name} = {ends[0].get(name)} at the end when trained anew, "
                           f"must be {value} as in metrics.jsonl; nothing is written")


def scene(run, frames, i):
    """The i-th frame of the moving picture."""
    figure, step = Figure((WIDTH, 3.9), dpi=100), int(frames["step"][i])
    axes = figure.add_axes([0.04, 0.13, 0.26, 0.66])
    ends = stage_lines(axes, [until(run, step)])
    shares_up(axes, steps_of([run]))
    label_ends(axes, ends, 0.16)
    for (name, title), left in zip(MAPS.items(), (0.487, 0.662, 0.837)):
        sites = figure.add_axes([left, 0.13, 0.15, 0.66])
        draw_sites(sites, frames[name][i], title)
        sites.tick_params(labelleft=left < 0.5)
    axes.set_title("share of queries", fontsize=8.5)
    figure.suptitle(f"Step {step:,} ({name_of(run)}); maps: share of {frames['n']} OOD queries",
                    fontsize=10)
    return figure


def pixels(figure):
    """The figure as an image."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])


def draw_sites(axes, values, title):
    """A map (n_loops, 2, T) with a row for what was mixed and one for the state of each loop."""
    n_loops, n_parts, T = values.shape
    draw_map(axes, values.reshape(n_loops * n_parts, T))
    rows = product(range(1, n_loops + 1), PARTS)
    axes.set_yticks(range(n_loops * n_parts), [f"{loop} {part}" for loop, part in rows])
    axes.set_xticks(range(T), places(T))
    axes.tick_params(labelsize=8, length=0)
    axes.set_title(title, fontsize=8.5)


def palette():
    """An image with the colors of a scene: those of the lines, fading to white, and of the maps."""
    fading = np.linspace(0, 1, 16)[:, None]
    ramps = [1 - fading * (1 - np.array(to_rgb(color))) for color in ("black", BLUE, ORANGE)]
    colors = np.concatenate([*ramps, colormaps["Blues"](np.linspace(0, 1, 64))[:, :3]])
    image = Image.new("P", (1, 1))
    image.putpalette((255 * colors).round().astype(np.uint8).tobytes())
    return image


def moving(run, most=40):
    """The GIF, as bytes: at most so many frames, dense where the steps are few."""
    frames = read_frames(run.folder / "frames.npz")
    S = len(frames["step"])
    shown = np.unique(np.geomspace(1, S, most).round().astype(int)) - 1
    images = [pixels(scene(run, frames, i)) for i in shown]
    colors = palette()  # the same for all: a pixel that does not change costs nothing
    images = [image.quantize(palette=colors, dither=Image.Dither.NONE) for image in images]
    content = io.BytesIO()
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], loop=0,
                   duration=[250] * (len(images) - 1) + [4000])
    return content.getvalue()


# ---------------------------------------------------------------- the command line
def choose(groups):
    """{file: (what draws it, from what, which is empty if the runs are not there)}."""
    runs = chain.from_iterable(groups.values())
    filmed = [run for run in runs if (run.folder / "frames.npz").exists()]
    natural = [run for run in groups.get("small/natural", []) if run in filmed]
    quick = groups.get("tiny/natural") or groups.get("small/natural") or []
    measured = regimes_of(groups, "small", "cells")
    half = {regime: measured[regime] for regime in ("both_half", "first_full", "second_full")
            if regime in measured}
    return {"task.png": (task, Config().n_loops), "grokking.gif": (moving, filmed and filmed[-1]),
            "hero.png": (hero, quick and quick[0]), "stages.png": (probed, natural),
            "seen_used.png": (seen_used, regimes_of(groups, "small", "paths")),
            "cells.png": (cells, half), "tuned.png": (tuned, tuned_of(groups)),
            "regimes.png": (regimes, regimes_of(groups, "small"))}


def draw_all(root, out):
    """Draw the pictures of the runs below root into the folder out."""
    chosen = choose(read_groups(root))
    out.mkdir(parents=True, exist_ok=True)
    for file, (draw, given) in chosen.items():
        if not given:
            say(f"{file}: skipped, {root} does not hold its runs")
            continue
        drawn = draw(given)
        if isinstance(drawn, Figure):
            content = io.BytesIO()
            drawn.savefig(content, dpi=150)
            drawn = content.getvalue()
        write_file(out / file, drawn)
        say(f"{out / file}")


def main(argv=None):
    """Draw, or film; exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="pictures.py", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default="runs/shipped", help="(runs/shipped)")
    parser.add_argument("-o", "--out", type=Path, default="figures", help="(figures)")
    parser.add_argument("--frames", type=Path, metavar="RUN", help="write frames.npz of this run")
    asked, threads = parser.parse_args(argv), torch.get_num_threads()
    try:
        if asked.frames:
            torch.set_num_threads(1)  # sums in another order would make another run
            film(asked.frames)
        else:
            draw_all(asked.root, asked.out)
    except (BadInput, OSError) as error:
        print(f"pictures.py: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
