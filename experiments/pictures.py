"""Every picture of README and results page, drawn from what runs have left in their folders.

    python -m experiments.pictures                      all of them, into figures
    python -m experiments.pictures --only hero.png      one of them
    python -m experiments.pictures --frames RUN         train RUN anew and measure it at every
                                                        evaluation, for the moving picture

A picture whose runs are missing is skipped; a run that is unfinished, or was not measured, is left
out by name. The message over a picture is written from the numbers that are drawn. All are 8 inches
wide, with text of 8 points or more: they are shown at about 800 pixels.
"""
import io
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from textwrap import wrap

import numpy as np
import torch
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from PIL import Image

HERE = Path(__file__).resolve().parent
if not __package__:  # started as a script, `python experiments/pictures.py`, from any folder
    sys.path.insert(0, str(HERE.parent))

from analyze import (POSITIONS, check_writable, donor_map, logit_lens, name_positions, other_r2,
                     short)
from data import REGIMES, BadInput, reading
from experiments.book import get, is_of_map, read_json, read_runs, share_at
from experiments.measure import check_same_end, evaluations
from grok import (PARTS, Parser, Trainer, first_step, load_data, name_loops, read_run, run_command,
                  say, to_tokens, write_file)

WIDTH = 8.0  # inches
STYLE = {"font.size": 8.5, "axes.titlesize": 9.5, "axes.labelsize": 9, "figure.titlesize": 11,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "axes.axisbelow": True, "grid.color": "0.92"}
# told apart by the colour-blind
GREY = "0.45"       # training
SKY = "#56B4E9"     # unseen ID questions; what the nearest code adds
BLUE = "#0072B2"    # OOD questions as they are answered; what is used
ORANGE = "#D55E00"  # what the lens sees
GREEN = "#009E73"   # the aim of hop 1; the input
PURPLE = "#CC79A7"  # the store of hop 2
INDIGO = "#332288"  # a new fact as hop 1
WINE = "#882255"    # a new fact as hop 2
SAND = "#B8A032"    # two new facts
BEA = "#F7C99B"
DORA = "#9FCBE8"


# ---------------------------------------------------------------- the runs that a picture needs
class Absent(Exception):
    """The runs of a picture are not there; its text says which."""


class Shelf:
    """The finished runs below a folder, and those that the picture which is drawn cannot use."""

    def __init__(self, root):
        runs = read_runs(root)
        for reason in runs.left_out:
            say(f"left out: {reason}")
        if not runs.groups:
            raise BadInput(f"{root}: holds no finished run")
        self.groups = runs.groups  # {"small/natural": [Run, ...]}
        self.left_out = {}         # {name of a run: why}, since it was last emptied

    def all(self):
        """All runs, group by group."""
        runs = []
        for group in self.groups.values():
            runs.extend(group)
        return runs

    def measured(self, runs, part="end"):
        """Those of the runs whose inside.json has this part."""
        for run in runs:
            if part not in run.inside:
                self.left_out[run.name] = "was not measured"
        return [run for run in runs if part in run.inside]

    def group(self, name):
        """The seeds of a group; raises Absent if there are none."""
        if name not in self.groups:
            raise Absent(f"no finished run of {name}")
        return self.groups[name]

    def measured_group(self, name):
        """Those of its seeds that were measured; raises Absent if there are none."""
        runs = self.measured(self.group(name))
        if not runs:
            raise Absent(f"no finished run of {name} that was measured")
        return runs


def shares_of(run, split):
    """What a run answers of a split, at every evaluation."""
    return [line["accuracy"][split] for line in run.history]


# ---------------------------------------------------------------- what the pictures share
def mean_of(seeds, key):
    """The mean over seeds, each a dict, of what they have under this key; see `mean`."""
    return mean(seed[key] for seed in seeds)


def mean(values):
    """The mean of those that were measured; nan if none was."""
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else np.nan


def span(numbers, write=short):
    """".05" or ".05 to .14": the least and the most."""
    low = write(min(numbers))
    high = write(max(numbers))
    return low if low == high else f"{low} to {high}"


def whole(number):
    return f"{number:,}"


def tick(share):
    """"0", ".25", "1"."""
    return f"{share:g}".removeprefix("0") or "0"


def steps_of(runs):
    """The steps of the evaluations, which are those of all seeds of a group."""
    return [line["step"] for line in runs[0].history]


def name_of(group, runs):
    """"small, natural, 3 seeds"."""
    n_seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    return f"{group.replace('/', ', ').replace('_', ' ')}, {n_seeds}"


def set_message(figure, text):
    """The message of a figure over it, in lines of about the same length."""
    width = 90
    while len(wrap(text, width - 1)) == len(wrap(text, 90)):
        width -= 1
    figure.suptitle("\n".join(wrap(text, width)))


def show_shares(axes, along="y"):
    """A share, from 0 to 1, along this axis."""
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set(**{f"{along}lim": (-0.03, 1.03), f"{along}ticks": ticks,
                f"{along}ticklabels": [tick(share) for share in ticks]})
    axes.grid(axis=along)


def new_curves(ylabel, xlabel):
    """(figure, axes) for shares along steps."""
    figure = Figure((WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    show_shares(axes)
    axes.set_ylabel(ylabel)
    axes.set_xlabel(xlabel)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    return figure, axes


def draw_curves(axes, steps, curves):
    """A thin line a seed, and their mean with its name; {name: (color, (seeds, steps))}."""
    ends = {}
    for name, (color, seeds) in curves.items():
        for shares in seeds:
            axes.plot(steps, shares, color=color, linewidth=0.8, alpha=0.55)
        middle = np.mean(seeds, axis=0)
        axes.plot(steps, middle, color=color, linewidth=2.2)
        ends[name] = (color, middle[-1])
    axes.set_xlim(0, steps[-1])
    label_ends(axes, steps[-1], ends)


def label_ends(axes, x, ends):
    """Names beside the ends of lines, {name: (color, height)}, pushed down until none overlap."""
    next_height = 1.1
    for name, (color, height) in sorted(ends.items(), key=height_of, reverse=True):
        height = min(height, next_height)
        axes.annotate(name, (x, height), (7, 0), textcoords="offset points", va="center",
                      color=color, annotation_clip=False)
        next_height = height - (0.14 if "\n" in name else 0.08)


def height_of(item):
    _, (_, height) = item
    return height


# ---------------------------------------------------------------- the task, and one swap
SITE = (2, "mixed", 2)     # counted from 0: what is mixed in loop 3 at r2, just before the MLP
COLUMNS = (11, 21, 31, 41)          # x of the four tokens
LOOPS = (10.5, 22.3, 34.1, 45.9)    # y of the lower edges of the four loops
# heights within a loop
BAR = 1.6
MIXED = 4.0
PLUS = 6.0
MLP = 8.0
STATE = 9.8
TOP = 10.8


def box(axes, x, y, text, color="white", width=7.0, height=3.2, size=9):
    """A box with text around the point (x, y)."""
    axes.add_patch(FancyBboxPatch((x - width / 2, y - height / 2), width, height, facecolor=color,
                                  boxstyle="round,pad=0,rounding_size=0.6", edgecolor="0.3",
                                  zorder=3))
    axes.text(x, y, text, ha="center", va="center", fontsize=size, zorder=4)


def arrow(axes, start, end, color="0.3", bend=0.0, linewidth=1.2, zorder=2):
    """An arrow between two points."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=9, color=color,
                                   connectionstyle=f"arc3,rad={bend}", shrinkA=0, shrinkB=0,
                                   linewidth=linewidth, zorder=zorder))


def dot(axes, x, y):
    """The place of a value that the hook can read or replace."""
    axes.add_patch(Circle((x, y), 0.55, facecolor="white", edgecolor="0.3", zorder=3))


def task(runs):
    """The question as two facts; the looped model unrolled; and the swap that redirects it."""
    figure = Figure((WIDTH, 7.3))
    axes = figure.add_axes([0, 0, 1, 0.95], xlim=(0, 80), ylim=(1.5, 73))
    axes.set_axis_off()
    draw_facts(axes, 5.5, "The question: in which city does Ada's mother live?",
               ("Ada", "Bea", "Bern"), ("mother", "city"), ("hop 1", "hop 2"), BEA)
    draw_facts(axes, 46.5, "The donor: in which street does Carl's boss live?",
               ("Carl", "Dora", "Oslo"), ("boss", "city"), ("hop 1", "not asked"), DORA)
    draw_input(axes)
    for loop in range(len(LOOPS)):
        draw_loop(axes, loop)
    x = COLUMNS[-1]
    box(axes, x, 60.5, "Bern")
    box(axes, 63.5, 60.5, "Oslo", DORA)
    arrow(axes, (x + 3.5, 60.5), (60, 60.5), BLUE, linewidth=2)
    axes.text(67.8, 60.5, "after the swap:\nthe city of Dora", va="center", color=BLUE)
    draw_hops(axes)
    set_message(figure, "Put Dora in Bea's place, inside the block, and the answer becomes the "
                "city of Dora")
    return figure


def draw_facts(axes, left, question, entities, relations, notes, color):
    """A question over its two facts, (h, r1, b) and (b, r2, t)."""
    axes.text(left - 3.5, 71.5, question, fontsize=9.5, va="center")
    for i, (word, shade) in enumerate(zip(entities, ("white", color, "white"))):
        box(axes, left + 14 * i, 67.2, word, shade)
    for i, (word, note) in enumerate(zip(relations, notes)):
        x = left + 14 * i + 3.5
        arrow(axes, (x, 67.2), (x + 7, 67.2))
        axes.text(x + 3.5, 67.9, word, ha="center", va="bottom")
        axes.text(x + 3.5, 66.3, note, ha="center", va="top", color="0.4")


def draw_input(axes):
    """The four tokens, and the path of the input into every loop."""
    for x, word, name in zip(COLUMNS, ("Ada", "mother", "city", "_"), POSITIONS):
        box(axes, x, 6, word)
        axes.text(x, 3.2, name, ha="center", va="center", color="0.4")
        arrow(axes, (x, 7.6), (x, LOOPS[0] + BAR - 1))
    top = LOOPS[-1] + PLUS
    axes.plot([COLUMNS[0] - 3.5, 3, 3, 5], [6, 6, top, top], color=GREEN, linewidth=1.2)
    axes.text(1.5, 33, "the input enters every loop", rotation=90, color=GREEN, ha="center",
              va="center")


def draw_loop(axes, loop):
    """One loop: mix the tokens, add the input, MLP."""
    y = LOOPS[loop]
    axes.add_patch(Rectangle((5, y), 40.5, TOP, facecolor="0.94", edgecolor="0.7"))
    axes.text(6.6, y + 8.4, f"loop {loop + 1}", rotation=90, ha="center", va="center",
              color="0.35")
    axes.plot([3, COLUMNS[-1]], [y + PLUS] * 2, color=GREEN, linewidth=1.2, zorder=1)
    for position, x in enumerate(COLUMNS):
        arrow(axes, (x, y + BAR), (x, y + MLP - 1))
        is_last = loop + 1 == len(LOOPS)
        if not is_last or position + 1 == len(COLUMNS):
            arrow(axes, (x, y + MLP + 1), (x, 58.9 if is_last else LOOPS[loop + 1] + BAR - 1))
        axes.text(x, y + PLUS, "+", ha="center", va="center", color=GREEN, zorder=4,
                  bbox=dict(boxstyle="circle,pad=0.05", facecolor="white", edgecolor=GREEN))
        box(axes, x, y + MLP, "MLP", width=5.4, height=2.0, size=8)
        dot(axes, x, y + STATE)
        dot(axes, x, y + MIXED)
    box(axes, 26, y + BAR, "mix the tokens", "0.84", width=36, height=1.9, size=8)
    if loop == 0:
        axes.text(12.3, y + MIXED, "mixed", fontsize=8, va="center")
        axes.text(12.3, y + STATE, "state", fontsize=8, va="center")


def draw_hops(axes):
    """Where one hop ends and the other begins, and the arrow of the swap."""
    loop, _, position = SITE
    x = COLUMNS[position]
    y = LOOPS[loop] + MIXED
    box(axes, x, y, "Bea", BEA, width=5.4, height=2.2)
    for low, high in ((LOOPS[0], y - 1.2), (y + 1.2, LOOPS[-1] + TOP)):
        axes.plot([46.7, 47.7, 47.7, 46.7], [low, low, high, high], color="0.4", linewidth=1.2)
    axes.text(49.3, 8.5, "One block, applied four times:\nall loops have the same weights.",
              va="center")
    axes.text(49.3, 23.5, "Hop 1: Ada and mother become Bea.\nIt ends in what is mixed at r2 in "
              "loop 3:\nthere, just before the MLP, is Bea.", va="center")
    axes.text(49.3, 48.5, "Hop 2: Bea and city become Bern.\nIt is taken after this place.\n"
              "The question is still Ada's, about a city,\nso Dora in this place gives Oslo.",
              va="center")
    box(axes, 58.5, y, "Dora", DORA)
    arrow(axes, (55, y), (x + 2.8, y), BLUE, bend=0.1, linewidth=2.2, zorder=5)
    axes.text(62.7, y, "what is mixed at this\nsite in Carl's run", va="center", color=BLUE)


# ---------------------------------------------------------------- it groks
def hero(runs):
    """Training, unseen ID and unseen OOD questions of `tiny`."""
    group = runs.group("tiny/natural")
    curves = {}
    for split, name, color in (("train_inferred", "training", GREY),
                               ("test_id", "unseen, of\nID facts", SKY),
                               ("test_ood", "unseen, of\nOOD facts", BLUE)):
        curves[name] = (color, [shares_of(run, split) for run in group])
    figure, axes = new_curves("share of two-step questions answered",
                              f"training step ({name_of('tiny/natural', group)})")
    draw_curves(axes, steps_of(group), curves)
    fits = [first_step(run.history, 0.99, "train_inferred") for run in group]
    answers = [first_step(run.history, 0.9, "test_ood") for run in group]
    if None not in fits + answers:
        shade_wait(axes, np.mean(fits), np.mean(answers))
    set_message(figure, say_when(fits, answers))
    return figure


def shade_wait(axes, fit, answered):
    """The time between the fit and nine OOD answers in ten."""
    axes.axvspan(fit, answered, color="0.95", linewidth=0, zorder=0)
    axes.annotate("", (answered, 0.06), (fit, 0.06), arrowprops=dict(arrowstyle="<->"))
    axes.text((fit + answered) / 2, 0.08, "from .99 of the training\nto .9 of the OOD questions",
              ha="center", va="bottom")


def say_when(fits, answers):
    """The message of `hero`, from the steps of the fit and of nine OOD answers in ten."""
    if None in fits:
        return f"{fits.count(None)} of {len(fits)} seeds do not fit their training"
    known = f"It has fitted its training at step {span(fits, whole)}"
    waits = [step - fit for fit, step in zip(fits, answers) if step is not None]
    if not waits:
        return f"{known}; pairs of OOD facts have not come when training ends"
    where = "" if len(waits) == len(fits) else f", in {len(waits)} of {len(fits)} seeds"
    return f"{known}; pairs of OOD facts come {span(waits, whole)} steps later{where}"


# ---------------------------------------------------------------- store and aim
LEVELS = ("as_is", "snapped", "own_code")  # of analyze.aim_and_store
BAR_PARTS = {"answered as it is": BLUE,
             "more, with the nearest code in its place": SKY,
             "more, with the right code in its place": PURPLE,
             "not even then: hop 2 is not stored": "0.88"}


def store_aim(runs):
    """What stands between an OOD question and its right answer, at the fit and at the end."""
    groups = {"small/natural": runs.measured_group("small/natural")}
    for other in ("trm/natural", "small/second_full"):
        seeds = runs.measured(runs.groups.get(other, []))
        if seeds and len(groups) == 1:
            groups[other] = seeds
    figure = Figure((WIDTH, 4.4), layout="constrained")
    told = []
    panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
    for axes, group in zip(panels, groups):
        aims = {}
        for stage in ("fit", "end"):
            aims[stage] = [run.inside[stage]["aim"]["test_ood"] for run in groups[group]
                           if stage in run.inside]
        draw_aims(axes, aims)
        axes.set_title(name_of(group, groups[group]))
        told.append(say_gains(group, aims))
    panels[0].set_ylabel("share of OOD questions answered")
    handles = [Patch(facecolor=color, label=name) for name, color in BAR_PARTS.items()]
    handles.append(Patch(facecolor="white", edgecolor="black", label="one seed's three levels"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    set_message(figure, "; ".join(told))
    return figure


def draw_aims(axes, aims):
    """A stacked bar a stage, {stage: [aim_and_store of a seed]}, and each seed's levels."""
    names = []
    for x, (stage, seeds) in enumerate(aims.items()):
        levels = [mean_of(seeds, level) for level in LEVELS] + [1.0]
        bottom = 0.0
        for level, color in zip(levels, BAR_PARTS.values()):
            top = max(bottom, level)  # a step that mends nothing, or less than nothing, has no part
            axes.bar(x, top - bottom, 0.66, bottom, color=color)
            if top - bottom >= 0.05:
                axes.text(x + 0.21, (top + bottom) / 2, short(top - bottom), ha="center",
                          va="center", color="white" if color == BLUE else "black")
            bottom = top
        for seed, aim in enumerate(seeds):
            left = x - 0.31 + 0.13 * seed
            for level, color in zip(LEVELS, BAR_PARTS.values()):
                for width, ink in ((4.5, "black"), (2.5, color)):  # a rim around the colour
                    axes.plot([left, left + 0.1], [aim[level]] * 2, color=ink, linewidth=width)
        right = mean(aim["nearest_right"] for aim in seeds)
        names.append(f"at the {stage}\n(nearest code right: {short(right)})")
    show_shares(axes)
    axes.set_xticks(range(len(names)), names)


def say_gains(group, aims):
    """What happens between the fit and the end, in words."""
    told = []
    for key, verb, hop in (("own_code", "store", "hop 2"), ("nearest_right", "aim", "hop 1")):
        before = mean_of(aims["fit"], key)
        after = mean_of(aims["end"], key)
        does = f"{verb}s" if after - before >= 0.1 else f"does not {verb}"
        told.append(f"{does} {hop} ({short(before)} to {short(after)})")
    name = group.replace("/", ", ").replace("_", " ")
    return f"{name}: after the fit it {' and '.join(told)}"


def film(runs):
    """Store, aim and answer along training."""
    group = [run for run in runs.group("small/natural") if run.film]
    if not group:
        raise Absent("no finished run of small/natural that was filmed")
    films = [run.film for run in group]
    steps = [frame["step"] for frame in films[0]]
    figure, axes = new_curves("share of OOD questions",
                              f"training step ({name_of('small/natural', group)})")
    curves = {}
    for key, name, color in (("own_code", "store: the right\ncode is answered", PURPLE),
                             ("nearest_right", "aim: the nearest\ncode is right", GREEN),
                             ("as_is", "answered as it is", BLUE)):
        curves[name] = (color, [curve_of(frames, key) for frames in films])
    draw_curves(axes, steps, curves)
    fits = [first_step(run.history, 0.99, "train_inferred") or steps[0] for run in group]
    axes.axvspan(min(fits) - 8, max(fits) + 8, color="0.85", linewidth=0, zorder=0)
    axes.text(max(fits), 1.0, "  the fit of the training", va="center")
    at_fit = int(np.searchsorted(steps, max(fits)))
    store, aim, answer = (np.mean(seeds, axis=0)[at_fit:] for _, seeds in curves.values())
    below = (answer <= np.minimum(store, aim) + 0.02).all()
    set_message(figure, f"After the fit hop 2 gets stored ({rise(store)}) and hop 1 aimed "
                f"({rise(aim)}); the answers {'stay below both' if below else 'go'} "
                f"({rise(answer)})")
    return figure


def curve_of(frames, key):
    """One number of the OOD questions along a film."""
    return [frame["test_ood"][key] for frame in frames]


def rise(curve):
    return f"{short(curve[0])} to {short(curve[-1])}"


# ---------------------------------------------------------------- used where it is not seen
KINDS = {"small": BLUE, "tiny": SKY, "trm": WINE, "dials of small": SAND,
         "map of supervision": INDIGO}


def kind_of(run):
    """The one of KINDS that a run belongs to."""
    folder = run.name.split("/")[0]
    if folder in ("dial", "map"):
        return {"dial": "dials of small", "map": "map of supervision"}[folder]
    if run.config.model == "recursive":
        return "trm"
    return "tiny" if run.config.preset == "tiny" else "small"


def seen_and_used(run):
    """{"seen", "seen_chance", "used", "used_chance"} of the OOD questions at the end; None if one
    of them was not measured."""
    measured = run.inside["end"]
    lens = measured["test_ood"]["seen"]["paper"]
    swaps = measured["site"]["test_ood"]
    shares = {"seen": lens["any"], "seen_chance": lens["any_chance"], "used": swaps["donor"],
              "used_chance": swaps["noise"]}
    return None if None in shares.values() else shares


def seen_used(runs):
    """One point a run that answers half or more of its OOD questions."""
    points = {}
    for run in runs.all():
        answer = get(run.inside, "end aim test_ood as_is")
        if answer is None or answer < 0.5:
            continue
        shares = seen_and_used(run)
        if shares is None:
            runs.left_out[run.name] = "has no lens or no swaps (0 queries)"
        else:
            points[run.name] = {"kind": kind_of(run), **shares}
    if not points:
        raise Absent("no measured run that answers half of its OOD questions")
    figure = Figure((WIDTH, 5.0), layout="constrained")
    axes = figure.subplots()
    draw_points(axes, points)
    for used, name in sorted((point["used"], name) for name, point in points.items())[:4]:
        seen = points[name]["seen"]
        if used < 0.8:  # the exceptions have names
            axes.text(seen, used - 0.02, name, fontsize=8, va="top",
                      ha="left" if seen < 0.5 else "right")
    show_shares(axes, "x")
    show_shares(axes)
    axes.set_xlabel("seen: share of OOD bridges that the paper's lens shows, at any place")
    axes.set_ylabel("used: share of right OOD answers that a swap redirects")
    n_used = sum(point["used"] >= 0.8 for point in points.values())
    n_unseen = sum(point["seen"] < 0.5 for point in points.values())
    set_message(figure, f"Of {len(points)} runs that answer half of the OOD questions, a swap "
                f"redirects .8 or more of the answers in {n_used}; the lens sees less than half of "
                f"the bridges in {n_unseen}")
    return figure


def draw_points(axes, points):
    """The points by kind, and what chance gives as bands."""
    chance = [point["seen_chance"] for point in points.values()]
    axes.axvspan(min(chance), max(chance), color="0.9", linewidth=0, zorder=0)
    axes.text(max(chance) + 0.01, 0.5, "seen by chance", rotation=90, va="center")
    chance = [point["used_chance"] for point in points.values()]
    axes.axhspan(min(chance), max(chance), color="0.9", linewidth=0, zorder=0)
    axes.text(0.99, max(chance) + 0.01, "redirected by noise", ha="right", va="bottom")
    for kind, color in KINDS.items():
        chosen = [point for point in points.values() if point["kind"] == kind]
        if chosen:
            axes.plot([point["seen"] for point in chosen], [point["used"] for point in chosen],
                      "o", markersize=7.5, alpha=0.75, color=color, markeredgecolor="white",
                      clip_on=False, zorder=3, label=f"{kind} ({len(chosen)})")
    axes.legend(loc="center right", title="one point a run")


def seen_used_bars(runs):
    """Two bars a regime of `small`: what the lens sees, what a swap shows is used."""
    shares = {}
    for regime in REGIMES:
        measured = runs.measured(runs.groups.get(f"small/{regime}", []))
        seeds = [seen_and_used(run) for run in measured]
        seeds = [seed for seed in seeds if seed is not None]
        if seeds:
            shares[regime] = seeds
    if not shares:
        raise Absent("no measured run of small")
    figure = Figure((WIDTH, 3.7), layout="constrained")
    axes = figure.subplots()
    spans = {}
    for key, shift, color in (("seen", -0.2, ORANGE), ("used", 0.2, BLUE)):
        spans[key] = span([mean_of(seeds, key) for seeds in shares.values()])
        for x, seeds in enumerate(shares.values()):
            draw_bar(axes, x + shift, [seed[key] for seed in seeds], color,
                     mean_of(seeds, f"{key}_chance"))
    show_shares(axes)
    names = [name_of(regime, seeds).replace(", ", "\n") for regime, seeds in shares.items()]
    axes.set_xticks(range(len(shares)), names)
    axes.set_ylabel("share of OOD questions")
    handles = [Patch(color=ORANGE, label="seen: the lens shows the bridge"),
               Patch(color=BLUE, label="used: a swap redirects right answers"),
               Line2D([], [], color="black", linewidth=2, label="chance"),
               Line2D([], [], color="0.25", marker="o", linestyle="", label="one seed")]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    set_message(figure, f"Regime by regime of small, a swap redirects {spans['used']} of the right "
                f"OOD answers; the lens sees {spans['seen']} of the bridges")
    return figure


def draw_bar(axes, x, shares, color, chance):
    """A bar for the mean of seeds, a dot for each, a tick for chance."""
    axes.bar(x, mean(shares), 0.36, color=color, alpha=0.85)
    axes.plot(x + 0.08 * (np.arange(len(shares)) - (len(shares) - 1) / 2), shares, "o",
              color="0.25", markersize=4, clip_on=False)
    axes.plot([x - 0.18, x + 0.18], [chance] * 2, color="black", linewidth=2)


# ---------------------------------------------------------------- the map of supervision
PANELS = {"answer": "answered as it is", "aim": "aim of hop 1:\nthe nearest code is right",
          "store": "store of hop 2:\nthe right code is answered", "seen": "seen by the lens"}


def supervision(runs):
    """The four panels over the shares of OOD facts that are supervised as hop 1 and as hop 2."""
    cells = {}
    for group, members in runs.groups.items():
        for run in runs.measured(members if is_of_map(group) else []):
            cells.setdefault((run.config.hop1, run.config.hop2), []).append(read_cell(run))
    if not cells:
        raise Absent("no measured run of map")
    grid = sorted({0.0, 0.25, 0.5, 0.75, 1.0}.union(*cells))
    maps = {}
    for panel in PANELS:
        maps[panel] = np.full((len(grid), len(grid)), np.nan)           # (hop 1, hop 2)
        for (hop1, hop2), seeds in cells.items():
            where = (grid.index(hop1), grid.index(hop2))
            maps[panel][where] = mean(cell[panel] for cell in seeds)
    figure = Figure((WIDTH, 2.9), layout="constrained")
    for axes, (panel, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        draw_panel(axes, maps[panel], grid, "Oranges" if panel == "seen" else "Blues")
        axes.set_title(title, fontsize=9)
    figure.axes[0].set_ylabel("share supervised as hop 1")
    figure.supxlabel("share of the OOD facts supervised as hop 2", fontsize=9)
    set_message(figure, say_map(maps))
    return figure


def read_cell(run):
    """The four panels' numbers of one run."""
    end = run.inside["end"]
    aim = end["aim"]["test_ood"]
    return {"answer": aim["as_is"], "aim": aim["nearest_right"], "store": aim["own_code"],
            "seen": end["test_ood"]["seen"]["paper"]["any"]}


def draw_panel(axes, values, grid, shades):
    """A map with its numbers; what was not trained or not measured is hatched."""
    axes.imshow(values, vmin=0, vmax=1, cmap=shades, origin="lower")
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////",
                                     linewidth=0, edgecolor="0.7"))
        else:
            axes.text(column, row, short(value), ha="center", va="center", fontsize=8,
                      color="white" if value > 0.6 else "black")
    axes.set_xticks(range(len(grid)), [tick(share) for share in grid])
    axes.set_yticks(range(len(grid)), [tick(share) for share in grid])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def say_map(maps):
    """The message of `supervision`: what supervising all of a hop's facts adds, to aim and store,
    as a mean over the shares of the other hop."""
    gains = {}
    for panel in ("aim", "store"):
        values = maps[panel]
        for hop, added in ((1, values[-1] - values[0]), (2, values[:, -1] - values[:, 0])):
            gains[panel, hop] = mean(gain for gain in added if np.isfinite(gain))
    if np.isnan(list(gains.values())).any():
        n_cells = int(np.isfinite(maps["answer"]).sum())
        return f"Answer, aim, store and lens in {n_cells} of {maps['answer'].size} cells"
    return (f"Supervising all of hop 1 adds {signed(gains['aim', 1])} to its aim and "
            f"{signed(gains['store', 1])} to the store of hop 2; supervising all of hop 2 adds "
            f"{signed(gains['aim', 2])} and {signed(gains['store', 2])} (means)")


def signed(number):
    """"+.30", "-.02"."""
    return ("-" if number < 0 else "+") + short(abs(number))


# ---------------------------------------------------------------- plain data
def plain_data(runs):
    """What `small` answers along natural training, with few and with many questions a fact."""
    groups = {}
    for name in ("long/phi_6", "long/natural"):
        group = runs.group(name)
        groups[f"{group[0].config.phi:g} training questions a fact"] = group
    figure = Figure((WIDTH, 3.7), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True)
    last = min(group[0].config.steps for group in groups.values())
    for axes, (title, group) in zip(panels, groups.items()):
        for split, color in (("train_inferred", GREY), ("test_id", SKY), ("test_ood", BLUE)):
            for run in group:
                axes.plot(steps_of(group), shares_of(run, split), color=color, linewidth=1.2)
        show_shares(axes)
        axes.set_xlim(0, last)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_title(f"{title}, {name_of('small', group).partition(', ')[2]}")
        axes.set_xlabel("training step")
    panels[0].set_ylabel("share of two-step questions answered")
    names = {"training": GREY, "unseen, of ID facts": SKY, "unseen, of OOD facts": BLUE}
    figure.legend(handles=[Line2D([], [], color=color, label=name)
                           for name, color in names.items()], loc="outside lower center", ncols=3)
    set_message(figure, say_plain_data(groups))
    return figure


def say_plain_data(groups):
    """When the training is fitted, and when half of the unseen ID questions are answered."""
    told = []
    for title, group in groups.items():
        fit = moment([first_step(run.history, 0.99, "train_inferred") for run in group])
        half = moment([first_step(run.history, 0.5, "test_id") for run in group])
        told.append(f"{title} the fit comes {fit}, half of the unseen ID questions {half}")
    return f"With {'; with '.join(told)}"


def moment(steps):
    """"at step 700 to 900, in 2 of 3 seeds"; None is never."""
    there = [step for step in steps if step is not None]
    if not there:
        return "never"
    seeds = f", in {len(there)} of {len(steps)} seeds" if len(there) < len(steps) else ""
    return f"at step {span(there, whole)}{seeds}"


# ---------------------------------------------------------------- new facts
SERVED = {"new_old": ("new fact\nas hop 1", INDIGO), "old_new": ("new fact\nas hop 2", WINE),
          "new_new": ("both new", SAND)}
EXPOSED = {"exposed_old": ("exposed fact\nas hop 1", INDIGO),
           "old_exposed": ("exposed fact\nas hop 2", WINE)}


def new_facts(runs):
    """What new facts serve for, by the share of them that was exposed."""
    groups = {0.0: runs.group("tune/long_natural_end")}
    for share in (0.25, 0.5, 1.0):
        name = f"exposed/natural_end_{share:g}_4"
        if name in runs.groups:
            groups[share] = runs.groups[name]
    if len(groups) == 1:
        raise Absent("no finished run of exposed/natural_end_*_4")
    step = groups[max(groups)][0].config.steps
    figure, axes = new_curves(f"two-step questions answered at step {step:,}",
                              "share of the new facts that is exposed: trained in 4 two-step "
                              "questions a hop, too")
    means = {}
    ends = {}  # {share at which lines end: {name: (color, height)}}
    for split, (name, color) in {**SERVED, **EXPOSED}.items():
        means[split] = draw_exposure(axes, groups, step, split, color)
        share = max(means[split])
        ends.setdefault(share, {})[name] = (color, means[split][share])
    for share, names in ends.items():
        label_ends(axes, share, names)
    dot = {"marker": "o", "linestyle": ""}
    key = {"new fact, not exposed": dot,
           "new fact, exposed": {**dot, "markerfacecolor": "white"}}
    for share, group in groups.items():
        draw_r2_alone(axes, runs.measured(group, "r2_alone"), (share - 0.02, share + 0.02), key)
    add_key(axes, key, "center right")
    axes.set_xticks(list(groups), [tick(share) for share in groups])
    axes.set_xlim(-0.04, max(groups) * 1.3)
    set_message(figure, say_exposure(means))
    return figure


def draw_exposure(axes, groups, step, split, color):
    """A dot a seed, and a line through the means, {share exposed: mean}, which are returned."""
    means = {}
    for share, group in groups.items():
        values = [share_at(run, step, split) for run in group]
        values = [value for value in values if value is not None]
        if values:
            means[share] = mean(values)
            axes.plot([share] * len(values), values, "o", color=color, markersize=5, alpha=0.6,
                      markerfacecolor="white" if split in EXPOSED else color, clip_on=False)
    axes.plot(list(means), list(means.values()), "--" if split in EXPOSED else "-", color=color,
              linewidth=2)
    return means


def draw_r2_alone(axes, runs, ends, key):
    """Ticks from end to end at what r2 alone gives, see experiments/measure.py."""
    style = {"linewidth": 3, "solid_capstyle": "butt"}
    for run in runs:
        key["what r2 alone gives"] = style
        for split, share in run.inside["r2_alone"].items():
            if split in SERVED:
                axes.plot(ends, [share] * 2, color=SERVED[split][1], zorder=1, **style)


def add_key(axes, key, place="upper left"):
    """What the kinds of lines mean, {text: style}."""
    axes.legend(handles=[Line2D([], [], color="0.3", label=text, **style)
                         for text, style in key.items()], loc=place)


def say_exposure(means):
    """The message of `new_facts`, at the largest share that leaves others to test."""
    share = max(means["new_new"])
    none = min(means["new_new"])
    gains = [means[split][share] - means[split][none] for split in ("new_old", "old_new")]
    better = "serve better in each hop" if min(gains) >= 0.1 else "serve"
    told = []
    for split, hop in (("new_old", 1), ("old_new", 2)):
        told.append(f"{short(means[split][none])} to {short(means[split][share])} as hop {hop}")
    chained = "hardly chained" if means["new_new"][share] < 0.2 else "chained"
    return (f"With {short(share)} of the new facts exposed, the others {better} "
            f"({', '.join(told)}); two of them are {chained} ({short(means['new_new'][share])})")


def tuned(runs):
    """Compositions with new facts while a trained model is fine-tuned."""
    group = runs.group("tune/long_natural_end")
    steps = steps_of(group)
    figure, axes = new_curves("two-step questions answered", "step of fine-tuning (small, natural, "
                              f"from the end; {len(group)} seeds)")
    curves = {}
    for split, (name, color) in SERVED.items():
        curves[name] = (color, np.array([shares_of(run, split) for run in group]))  # (seeds, steps)
    draw_curves(axes, steps, curves)
    axes.set_xscale("log")
    axes.set_xlim(steps[0], steps[-1])
    shown = [step for step in (200, 500, 1000, 2000, 5000) if steps[0] <= step <= steps[-1]]
    axes.set_xticks(shown, [f"{step:,}" for step in shown])
    axes.minorticks_off()
    key = {"one seed": {"linewidth": 0.8}}
    draw_r2_alone(axes, runs.measured(group, "r2_alone"), (0.9 * steps[-1], steps[-1]), key)
    add_key(axes, key)
    set_message(figure, say_tuned(steps, curves))
    return figure


def say_tuned(steps, curves):
    """The message of `tuned`: what new facts serve for early, and at the end."""
    first, second, both = (seeds for _, seeds in curves.values())                # (seeds, steps)
    first = first.mean(axis=0)
    second = second.mean(axis=0)
    early = min(int(np.searchsorted(steps, 400)), len(steps) - 1)
    told = []
    for row in (early, -1):
        hop = 1 if first[row] > second[row] else 2
        shares = sorted((first[row], second[row]))
        told.append(f"at step {steps[row]:,} more as hop {hop} ({short(shares[1])} against "
                    f"{short(shares[0])})")
    return (f"New facts serve {told[0]}, {told[1]}; two of them are chained in {short(both.max())} "
            "at most")


# ---------------------------------------------------------------- the paper's own recursion
def recursion(runs):
    """The paper's recursion unrolled: what its lens sees after every pass, what a swap redirects
    at every site inside."""
    run = runs.group("trm/both_full")[0]
    measured = read_json(run.folder / "paths.json").get("end")
    if measured is None:
        raise Absent(f"no paths.json of {run.name}; analyze.py makes it")
    used = measured["test_ood"]["used"]["other_r2"]
    if not used["n"]:
        raise Absent(f"no swap in {run.name} (0 queries)")
    config = run.config
    shares = np.stack([used["redirected"][part] for part in PARTS], axis=1)  # (n_loops, 2, T)
    lens = np.array(measured["test_ood"]["seen"]["state"]["bridge"]["map"])     # (n_loops, T)
    figure = Figure((WIDTH, 1.2 + 1.9 * config.n_cycles), layout="constrained")
    passes = figure.subplots(config.n_cycles, config.n_low + 1, squeeze=False).ravel()
    for number, axes in enumerate(passes):
        loops = slice(number * config.n_blocks, (number + 1) * config.n_blocks)
        draw_pass(axes, shares[loops], lens[loops][-1].max())
        name = name_loops(config)[loops][0].split(",")[0].replace(" pass", "\npass")
        axes.set_title(name, fontsize=8, loc="left")
        if number % (config.n_low + 1):
            axes.set_yticks([])
            axes.annotate("", (-0.03, 0.5), (-0.21, 0.5), xycoords="axes fraction",
                          arrowprops=dict(arrowstyle="-|>", color="0.3"))
    for loop, part, position in measured["site"]["sites"]:
        number, block = divmod(loop, config.n_blocks)
        corner = (block * len(PARTS) + PARTS.index(part) - 0.5, position - 0.5)
        passes[number].add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black",
                                           linewidth=2.2, clip_on=False, zorder=6))
    figure.legend(handles=[
        Patch(facecolor="none", edgecolor=ORANGE, linewidth=2,
              label="where the paper's lens looks, and the most that it sees there"),
        Patch(facecolor=BLUE, label="what a donor's value redirects"),
        Patch(facecolor="none", edgecolor="black", linewidth=2.5, label="the site of the bridge"),
        Line2D([], [], color="0.3", label="between the two blocks of a pass")],
        loc="outside lower center", ncols=2)
    set_message(figure, say_recursion(config, measured))
    return figure


def draw_pass(axes, shares, seen):
    """The sites of one pass, shares (n_blocks, 2, T), shaded by what a swap redirects there; framed
    is what the lens reads, with the share that it sees."""
    n_blocks, n_parts, T = shares.shape
    values = shares.reshape(n_blocks * n_parts, T).T                         # (T, sites of a row)
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", origin="lower", aspect="auto")
    for (position, column), share in np.ndenumerate(values):
        if share >= 0.3:
            axes.text(column, position, short(share), ha="center", va="center", fontsize=8,
                      color="white" if share > 0.6 else "black")
    for block in range(1, n_blocks):
        axes.axvline(block * n_parts - 0.5, color="0.3", linewidth=1)
    last = n_blocks * n_parts - 1
    axes.add_patch(Rectangle((last - 0.5, -0.5), 1, T, fill=False, edgecolor=ORANGE, linewidth=2.5,
                             clip_on=False, zorder=5))
    axes.text(last, T - 0.4, short(seen), color=ORANGE, ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(last + 1), list(PARTS) * n_blocks, rotation=90, fontsize=8)
    axes.set_yticks(range(T), name_positions(T), fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)


def say_recursion(config, measured):
    """The message of `recursion`."""
    lens = measured["test_ood"]["seen"]["paper"]
    site = measured["site"]
    names = []
    is_read = []
    for loop, part, _ in site["sites"]:
        names.append(name_loops(config)[loop].split(",")[0])
        is_read.append(part == "state" and (loop + 1) % config.n_blocks == 0)
    place = ("after " if any(is_read) else "inside ") + " and ".join(dict.fromkeys(names))
    seen = f"{short(lens['any'])} of the bridges (chance {short(lens['any_chance'])})"
    swaps = site["test_ood"]
    n_map = measured["test_ood"]["used"]["other_r2"]["n"]
    return (f"In seed {config.seed} of the paper's recursion the lens looks after every pass, and "
            f"sees {seen} over all of them; a swap {place} redirects {short(swaps['donor'])} of "
            f"the answers (n = {swaps['n']}; in the map {n_map})")


# ---------------------------------------------------------------- the moving picture
FILMED = "small/second_full"  # its first seed
MAPS = {"seen": ("what the lens sees", "Oranges"),
        "used": ("what a swap shows is used", "Blues")}


def measure_frames(folder, n=100):
    """Train the run of a folder anew, on the CPU, and write frames.npz into it:

    "step" (S,), one an evaluation; "answer" (S,), the share of OOD questions answered; and in
    (S, n_loops, 2, T), the parts in the order of PARTS, "seen", the share of n OOD questions whose
    bridge is top-1 there, and "used", the share that a donor of another r2 redirects.
    Raises BadInput if the run does not end as its metrics.jsonl says."""
    read_run(folder)  # an unfinished one is refused
    config, world, splits = load_data(folder)
    if config.new_facts:
        raise BadInput(f"{folder}: is a run on new facts, and has no OOD questions")
    check_writable(folder)
    rng = np.random.default_rng(0)
    pool = splits["test_ood"].take(rng.permutation(len(splits["test_ood"].h)))
    swapped = other_r2(world, pool.take(slice(n)), pool, rng)
    trainer = Trainer(replace(config, device="cpu"), world, splits)
    frames = []
    for line in evaluations(trainer):
        frames.append({"step": line["step"], "answer": line["accuracy"]["test_ood"],
                       **measure_frame(trainer.average, world, *swapped)})
    check_same_end(folder, line)
    content = io.BytesIO()
    arrays = {}
    for name in frames[0]:
        arrays[name] = np.array([frame[name] for frame in frames])
    np.savez_compressed(content, **arrays)
    write_file(folder / "frames.npz", content.getvalue())


def measure_frame(model, world, clean, donor, predicted):
    """{"seen", "used": (n_loops, 2, T)} of one moment."""
    tokens, _ = to_tokens(clean, world, model.config.layout)
    redirected = donor_map(model, world, clean, donor, predicted)["redirected"]
    top = logit_lens(model, tokens)
    bridges = torch.from_numpy(clean.b)[:, None]                                # (N, 1)
    seen = [(top[part] == bridges).float().mean(1).numpy() for part in PARTS]
    used = [redirected[part].astype(np.float32) for part in PARTS]
    return {"seen": np.stack(seen, axis=1), "used": np.stack(used, axis=1)}


def read_frames(runs):
    """What frames.npz of the filmed run holds."""
    run = runs.group(FILMED)[0]
    path = run.folder / "frames.npz"
    if not path.exists():
        raise Absent(f"no frames.npz of {run.name}; --frames makes it")
    with reading(path), np.load(path) as saved:
        return {key: saved[key] for key in saved}


def scene(frames, i):
    """The i-th frame: the two maps, the site that is used at the end circled in both."""
    figure = Figure((WIDTH, 4.4), dpi=100)
    _, n_loops, n_parts, T = frames["used"].shape
    site = np.unravel_index(frames["used"][-1].argmax(), frames["used"][-1].shape)
    loop, part, position = site
    names = [f"loop {number + 1}, {name}" for number, name in product(range(n_loops), PARTS)]
    for left, (key, (title, shades)) in zip((0.13, 0.60), MAPS.items()):
        axes = figure.add_axes([left, 0.09, 0.37, 0.68], title=title)
        axes.imshow(frames[key][i].reshape(n_loops * n_parts, T), vmin=0, vmax=1, cmap=shades,
                    aspect="auto", origin="lower")
        axes.plot(position, loop * n_parts + part, "o", markersize=27, markerfacecolor="none",
                  markeredgecolor="black", markeredgewidth=2)
        axes.set_yticks(range(len(names)), names if left < 0.5 else [""] * len(names))
        axes.set_xticks(range(T), name_positions(T))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(True)
    figure.text(0.02, 0.945, f"Step {frames['step'][i]:,}: it answers {short(frames['answer'][i])} "
                "of the OOD questions.", fontsize=11, va="center")
    seen = short(frames["seen"][i].max())
    used = short(frames["used"][i][site])
    figure.text(0.02, 0.885, f"The lens sees at most {seen} of the bridges at any one site; a swap "
                f"at the circled one redirects {used}.", fontsize=11, va="center")
    return figure


def moving(runs):
    """The GIF, as bytes."""
    frames = read_frames(runs)
    images = []
    for i in range(len(frames["step"])):
        canvas = FigureCanvasAgg(scene(frames, i))
        canvas.draw()
        image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
        # one palette for all: a pixel that does not change costs nothing
        images.append(image.quantize(palette=palette(), dither=Image.Dither.NONE))
    content = io.BytesIO()
    images[0].save(content, "GIF", save_all=True, append_images=images[1:], loop=0,
                   duration=[300] * (len(images) - 1) + [4000])
    return content.getvalue()


def palette():
    """An image with the colours of a scene: those of the maps, and greys."""
    greys = np.repeat(np.linspace(0, 1, 24)[:, None], 3, axis=1)
    ramps = [colormaps[shades](np.linspace(0, 1, 100))[:, :3] for _, shades in MAPS.values()]
    colors = np.concatenate([greys, *ramps])
    image = Image.new("P", (1, 1))
    image.putpalette((255 * colors).round().astype(np.uint8).tobytes())
    return image


def poster(runs):
    """The last frame of the moving picture."""
    return scene(read_frames(runs), -1)


# ---------------------------------------------------------------- the command line
PICTURES = {"task.png": task, "hero.png": hero, "store_aim.png": store_aim, "film.png": film,
            "seen_used.png": seen_used, "seen_used_bars.png": seen_used_bars,
            "map.png": supervision, "plain_data.png": plain_data, "new_facts.png": new_facts,
            "tuned.png": tuned, "recursion.png": recursion, "grokking.gif": moving,
            "grokking.png": poster}


def draw(file, runs):
    """One of the PICTURES, as bytes."""
    with rc_context(STYLE):
        drawn = PICTURES[file](runs)
        if isinstance(drawn, Figure):
            content = io.BytesIO()
            message = drawn.get_suptitle()
            drawn.savefig(content, dpi=150, format="png", metadata={"Title": message})
            drawn = content.getvalue()
    return drawn


def draw_all(root, output, only=None):
    """Draw the pictures of the runs below root into the folder `output`."""
    runs = Shelf(root)
    check_writable(output)
    for file in PICTURES if only is None else [only]:
        runs.left_out.clear()
        try:
            write_file(output / file, draw(file, runs))
            say((output / file).as_posix())
        except Absent as reason:
            say(f"{file}: skipped, {Path(root).as_posix()} holds {reason}")
        for name, reason in runs.left_out.items():
            say(f"  without {name}, which {reason}")


def main(argv=None):
    """Draw, or film; exit status 0, or 2 for bad input."""
    def body():
        parser = Parser(prog="experiments.pictures", description="Draw all pictures from runs.")
        parser.add_argument("--root", type=Path, default=HERE.parent / "runs/shipped",
                            help="folder of runs (runs/shipped)")
        parser.add_argument("-o", "--out", type=Path, default=HERE.parent / "figures",
                            help="(figures)")
        parser.add_argument("--only", metavar="NAME", help=f"one of {', '.join(PICTURES)}")
        parser.add_argument("--frames", type=Path, metavar="RUN", help="write frames.npz of RUN")
        args = parser.parse_args(argv)
        if args.only not in (None, *PICTURES):
            raise BadInput(f"only = {args.only}: must be one of {', '.join(PICTURES)}")
        if args.frames:
            torch.set_num_threads(1)  # more would take sums in another order: another run
            measure_frames(args.frames)
        else:
            draw_all(args.root, args.out, args.only)

    return run_command("experiments.pictures", body)


if __name__ == "__main__":
    sys.exit(main())
