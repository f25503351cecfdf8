"""What all pictures share: colours, axes, curves, the message on top.

All pictures are 8 inches wide, with text of 8 points or more: they are shown at about 800 pixels.
"""
from textwrap import wrap

import numpy as np

from analyze import short

WIDTH = 8.0  # inches
STYLE = {"font.size": 8.5, "axes.titlesize": 9.5, "axes.labelsize": 9, "figure.titlesize": 11,
         "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
         "axes.axisbelow": True, "grid.color": "0.92"}
# told apart by the colour-blind
GREY = "0.45"       # training
SKY = "#56B4E9"     # unseen ID questions; what the nearest code adds
BLUE = "#0072B2"    # OOD questions as they are answered; what is used
ORANGE = "#D55E00"  # what the lens sees
GREEN = "#009E73"   # the input
PURPLE = "#CC79A7"  # the store of hop 2
INDIGO = "#332288"  # a new fact as hop 1
WINE = "#882255"    # a new fact as hop 2
SAND = "#B8A032"    # two new facts
BEA = "#F7C99B"
DORA = "#9FCBE8"


def set_message(figure, text):
    """The message of a figure over it, in lines of about the same length."""
    width = 90
    while len(wrap(text, width - 1)) == len(wrap(text, 90)):
        width -= 1
    figure.suptitle("\n".join(wrap(text, width)))


def tick(share):
    """"0", ".25", "1"."""
    return f"{share:g}".removeprefix("0") or "0"


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


def name_seeds(cell):
    """"3 seeds": the runs of a Cell that were measured."""
    return "1 seed" if cell.seeds == 1 else f"{cell.seeds} seeds"
