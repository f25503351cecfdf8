"""What all pictures share: the runs that they are drawn from, colours, axes, the message on top.

A message is written from the numbers that are drawn. All pictures are 8 inches wide, with text of 8
points or more: they are shown at about 800 pixels.
"""
from textwrap import wrap

import numpy as np
from matplotlib.figure import Figure

from analyze import short
from data import BadInput
from experiments.runs import read_runs
from grok import say

WIDTH = 8.0  # inches
WHOLE = "{:,}".format  # a step as it is told: 1,500
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

    def measured(self, runs, part="end"):
        """Those of the runs whose inside.json has this part."""
        for run in runs:
            if part not in run.inside:
                self.left_out[run.name] = "was not measured"
        return [run for run in runs if part in run.inside]

    def group(self, name, *parts):
        """The seeds of a group of which all these parts are `measured`; Absent if there is none."""
        runs = self.groups.get(name, [])
        chosen = runs
        for part in parts:
            chosen = self.measured(chosen, part)
        if not chosen:
            raise Absent(f"no finished run of {name}" + (" that was measured" if runs else ""))
        return chosen


def shares_of(run, split):
    """What a run answers of a split, at every evaluation."""
    return [line["accuracy"][split] for line in run.history]


def share_at(run, split, step):
    """What a run answers of a split at the evaluation after this step; None if there was none."""
    for line in run.history:
        if line["step"] == step:
            return line["accuracy"].get(split)
    return None


# ---------------------------------------------------------------- what the pictures share
def mean(values):
    """The mean of those that were measured; nan if none was."""
    measured = [value for value in values if value is not None]
    return float(np.mean(measured)) if measured else np.nan


def span(numbers, write=short):
    """".05" or ".05 to .14": the least and the most."""
    low = write(min(numbers))
    high = write(max(numbers))
    return low if low == high else f"{low} to {high}"


def tick(share):
    """"0", ".25", "1"."""
    return f"{share:g}".removeprefix("0") or "0"


def steps_of(runs):
    """The steps of the evaluations, which are those of all seeds of a group."""
    return [line["step"] for line in runs[0].history]


def name_of(group, runs):
    """"small, natural, 3 seeds"; of one run, "small, natural, seed 0"."""
    return f"{group.replace('/', ', ').replace('_', ' ')}, {name_seeds(runs)}"


def name_seeds(runs):
    return f"{len(runs)} seeds" if len(runs) > 1 else f"seed {runs[0].config.seed}"


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


def write_shares(axes, values, least=0.0):
    """The numbers of a map, of those that are so large at least; what is nan has none."""
    for (row, column), value in np.ndenumerate(values):
        if value >= least:
            axes.text(column, row, short(value), ha="center", va="center", fontsize=8,
                      color="white" if value > 0.6 else "black")


def new_curves(ylabel, xlabel):
    """(figure, axes) for shares along steps."""
    figure = Figure((WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    show_shares(axes)
    axes.set(xlabel=xlabel, ylabel=ylabel)
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
    from_the_top = sorted(ends.items(), key=lambda item: item[1][1], reverse=True)
    for name, (color, height) in from_the_top:
        height = min(height, next_height)
        axes.annotate(name, (x, height), (7, 0), textcoords="offset points", va="center",
                      color=color, annotation_clip=False)
        next_height = height - (0.14 if "\n" in name else 0.08)
