"""The charts of README and results page, a function each. Their numbers, and those of the messages
over them, are places of the Book; a chart raises Missing if one that it needs was not measured.
"""
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from analyze import short
from experiments.book import NEVER, NO_RUN, SHARES, answering_half, supervision_map
from experiments.canvas import (BLUE, GREY, INDIGO, PURPLE, SAND, SKY, WIDTH, WINE, name_seeds,
                                set_message, show_shares, tick, write_shares)
from experiments.verdicts import Missing


def tell(figure, template, book):
    """The message of a figure, with its numbers filled in; Missing if a run of one is."""
    message = book.fill(template)
    if NO_RUN in message:
        raise Missing("all runs that its title tells of")
    set_message(figure, message)


# ---------------------------------------------------------------- it groks
GROKS = (
    "It has fitted its training at step {value:tiny/natural step fit mean}; nine in ten pairs of "
    "OOD facts come right at step {value:tiny/natural step answer_.9 mean}")
CURVES = {"train_inferred": ("training", GREY), "test_id": ("unseen, of ID facts", SKY),
          "test_ood": ("unseen, of OOD facts", BLUE)}


def hero(book):
    """Training, unseen ID and unseen OOD questions of `tiny` along training: a thin line a seed,
    and their mean."""
    fit = book.need("tiny/natural step fit")
    answered = book.need("tiny/natural step answer_.9")
    figure = Figure((WIDTH, 3.8), layout="constrained")
    axes = figure.subplots()
    for split, (name, color) in CURVES.items():
        steps, seeds = curves_of(book, "tiny/natural", split)
        for shares in seeds:
            axes.plot(steps, shares, color=color, linewidth=0.8, alpha=0.55)
        axes.plot(steps, np.mean(seeds, axis=0), color=color, linewidth=2.2, label=name)
    axes.legend(loc="center right")
    if NEVER not in fit.values + answered.values:
        shade_wait(axes, fit.mean, answered.mean)
    show_shares(axes)
    axes.set(xlim=(0, steps[-1]), ylabel="share of two-step questions answered",
             xlabel=f"training step (tiny, natural, {name_seeds(fit)})")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    tell(figure, GROKS, book)
    return figure


def curves_of(book, group, split):
    """(steps, shares (seeds, steps)) of a split at every evaluation of a group."""
    histories = [run.history for run in book.runs.groups[group]]
    steps = [line["step"] for line in histories[0]]
    seeds = []
    for history in histories:
        seeds.append([line["accuracy"][split] for line in history])
    return steps, np.array(seeds)


def shade_wait(axes, fit, answered):
    """The time between the fit and nine OOD answers in ten."""
    axes.axvspan(fit, answered, color="0.95", linewidth=0, zorder=0)
    axes.annotate("", (answered, 0.06), (fit, 0.06), arrowprops=dict(arrowstyle="<->"))
    axes.text((fit + answered) / 2, 0.08, "from .99 of the training\nto .9 of the OOD questions",
              ha="center", va="bottom")


# ---------------------------------------------------------------- store and aim
STORES_AND_AIMS = (
    "From the fit to the end small brings the store of hop 2 from "
    "{value:small/natural fit aim test_ood own_code mean} to "
    "{value:small/natural end aim test_ood own_code mean} and the aim of hop 1 from "
    "{value:small/natural fit aim test_ood nearest_right mean} to "
    "{value:small/natural end aim test_ood nearest_right mean}; the seeds of trm end with a store "
    "of {value:trm/natural end aim test_ood own_code each} and an aim of "
    "{value:trm/natural end aim test_ood nearest_right each}")
LEVELS = {"as_is": ("answered as it is", BLUE),  # of analyze.aim_and_store
          "snapped": ("more, with the nearest code in its place", SKY),
          "own_code": ("more, with the right code in its place", PURPLE)}
NOT_STORED = "0.88"


def store_aim(book):
    """What stands between an OOD question and its right answer, at the fit and at the end."""
    figure = Figure((WIDTH, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, preset in zip(panels, ("small", "trm")):
        names = []
        for x, stage in enumerate(("fit", "end")):
            place = f"{preset}/natural {stage} aim test_ood"
            draw_bar(axes, x, [book.need(f"{place} {level}") for level in LEVELS])
            right = book.need(f"{place} nearest_right")
            names.append(f"at the {stage}\n(nearest code right: {short(right.mean)})")
        axes.set_xticks(range(len(names)), names)
        axes.set_title(f"{preset}, natural, {name_seeds(right)}")
        show_shares(axes)
    panels[0].set_ylabel("share of OOD questions answered")
    handles = [Patch(facecolor=color, label=name) for name, color in LEVELS.values()]
    handles.append(Patch(facecolor=NOT_STORED, label="not even then: hop 2 is not stored"))
    handles.append(Patch(facecolor="white", edgecolor="black", label="one seed's three levels"))
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    tell(figure, STORES_AND_AIMS, book)
    return figure


def draw_bar(axes, x, cells):
    """A bar stacked up to the means of the LEVELS, and each seed's levels as ticks on it."""
    colors = [color for _, color in LEVELS.values()]
    means = [cell.mean for cell in cells]
    bottom = 0.0
    for level, color in zip([*means, 1.0], [*colors, NOT_STORED]):
        top = max(bottom, level)  # a step that mends nothing, or less than nothing, has no part
        axes.bar(x, top - bottom, 0.66, bottom, color=color)
        if top - bottom >= 0.05:
            axes.text(x + 0.21, (top + bottom) / 2, short(top - bottom), ha="center", va="center",
                      color="white" if color == BLUE else "black")
        bottom = top
    for cell, color in zip(cells, colors):
        for seed, share in enumerate(cell.values):
            left = x - 0.31 + 0.13 * seed
            for width, ink in ((4.5, "black"), (2.5, color)):  # a rim around the colour
                axes.plot([left, left + 0.1], [share, share], color=ink, linewidth=width)


# ---------------------------------------------------------------- used where it is not seen
USED_NOT_SEEN = (
    "Of {value:all counts half} runs that answer half of the OOD questions, a swap redirects .8 or "
    "more of the answers in {value:all counts half_donor}; the lens sees less than half of the "
    "bridges in {value:all counts unseen}")
KINDS = {"small": BLUE, "tiny": SKY, "trm": WINE, "trm, a change": SAND,
         "map of supervision": INDIGO}


def kind_of(row):
    """The one of KINDS that a row of runs.csv belongs to."""
    folder = row["run"].split("/")[0]
    if folder == "map":
        return "map of supervision"
    if row["preset"] == "trm":
        return "trm, a change" if folder == "dial" else "trm"
    return "tiny" if row["preset"] == "tiny" else "small"


def seen_used(book):
    """One point a run that answers half or more of its OOD questions."""
    rows = [row for row in answering_half(book.rows) if None not in (row["seen"], row["donor"])]
    if not rows:
        raise Missing("a run that answers half of its OOD questions")
    figure = Figure((WIDTH, 5.4), layout="constrained")
    axes = figure.subplots()
    for row in rows:  # a line from what chance would give the lens
        axes.plot([row["chance"], row["seen"]], [row["donor"]] * 2, color="0.75", linewidth=1,
                  zorder=1)
    noise = [row["noise"] for row in rows]
    axes.axhspan(min(noise), max(noise), color="0.9", linewidth=0, zorder=0)
    axes.text(0.99, max(noise) + 0.01, "redirected by noise", ha="right", va="bottom")
    for kind, color in KINDS.items():
        chosen = [row for row in rows if kind_of(row) == kind]
        axes.plot([row["seen"] for row in chosen], [row["donor"] for row in chosen], "o",
                  markersize=7.5, alpha=0.75, color=color, markeredgecolor="white", clip_on=False,
                  zorder=3, label=f"{kind} ({len(chosen)})")
    axes.plot([], [], color="0.75", linewidth=1, label="from what the lens sees by chance")
    figure.legend(loc="outside lower center", ncols=3, title="one point a run")
    show_shares(axes, "x")
    show_shares(axes)
    axes.set_xlabel("seen: share of OOD bridges that the paper's lens shows, at any place")
    axes.set_ylabel("used: share of right OOD answers that a swap redirects")
    tell(figure, USED_NOT_SEEN, book)
    return figure


# ---------------------------------------------------------------- the map of supervision
EACH_ITS_OWN = (
    "Supervising all of hop 1 brings its aim from "
    "{value:map/hop1_0_hop2_0 end aim test_ood nearest_right mean} to "
    "{value:small/first_full end aim test_ood nearest_right mean}; supervising all of hop 2 brings "
    "its store from {value:map/hop1_0_hop2_0 end aim test_ood own_code mean} to "
    "{value:small/second_full end aim test_ood own_code mean}; both together answer "
    "{value:small/both_full end aim test_ood as_is mean}")
PANELS = {"end aim test_ood as_is": "answered as it is",  # path: title
          "end aim test_ood nearest_right": "aim of hop 1:\nthe nearest code is right",
          "end aim test_ood own_code": "store of hop 2:\nthe right code is answered",
          "end test_ood seen paper any": "seen by the lens"}


def supervision(book):
    """The four panels over the shares of OOD facts that are supervised as hop 1 and as hop 2."""
    book.need("map/hop1_0_hop2_0 end aim test_ood as_is")
    figure = Figure((WIDTH, 2.9), layout="constrained")
    for axes, (path, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        if "seen" in path:
            chances = supervision_map(book, f"{path}_chance")
            title += f"\n(chance {short(np.nanmin(chances))}–{short(np.nanmax(chances))})"
        draw_panel(axes, supervision_map(book, path), "Oranges" if "seen" in path else "Blues")
        axes.set_title(title, fontsize=9)
    figure.axes[0].set_ylabel("share supervised as hop 1")
    figure.supxlabel("share of the OOD facts supervised as hop 2", fontsize=9)
    tell(figure, EACH_ITS_OWN, book)
    return figure


def draw_panel(axes, values, shades):
    """A map with its numbers; what was not trained or not measured is hatched."""
    axes.imshow(values, vmin=0, vmax=1, cmap=shades, origin="lower")
    write_shares(axes, values)
    for row, column in np.argwhere(np.isnan(values)):
        axes.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////",
                                 linewidth=0, edgecolor="0.7"))
    shares = [tick(share) for share in SHARES]
    axes.set_xticks(range(len(shares)), shares)
    axes.set_yticks(range(len(shares)), shares)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


# ---------------------------------------------------------------- new facts
OLD_MLP = {0: "tune/long_natural_end", 0.25: "exposed/natural_end_0.25_4",  # {share exposed: group}
           0.5: "exposed/natural_end_0.5_4"}
NEW_MLP = {0: "tune/natural_new_mlp", 0.5: "exposed/natural_new_mlp_0.5_4"}
SERVE = (
    "New facts serve as hop 1 in {value:tune/long_natural_end 2000 accuracy new_old mean}, with "
    "half of them exposed in {value:exposed/natural_end_0.5_4 2000 accuracy new_old mean}, with "
    "the MLP drawn afresh in {value:tune/natural_new_mlp 2000 accuracy new_old mean}; as hop 2 in "
    "{value:tune/long_natural_end 2000 accuracy old_new mean}, "
    "{value:exposed/natural_end_0.5_4 2000 accuracy old_new mean}, "
    "{value:tune/natural_new_mlp 2000 accuracy old_new mean}; two of them are chained in "
    "{value:tune/long_natural_end 2000 accuracy new_new mean}, "
    "{value:exposed/natural_end_0.5_4 2000 accuracy new_new mean}, "
    "{value:tune/natural_new_mlp 2000 accuracy new_new mean}")
SERVED = {"new_old": ("new fact as hop 1", INDIGO), "old_new": ("new fact as hop 2", WINE),
          "new_new": ("both new", SAND)}


def new_facts(book):
    """What new facts serve for, by the share of them that was exposed, and by the MLP: a dot a seed
    of facts not exposed, a line through the means, a tick at what r2 alone gives."""
    figure = Figure((WIDTH, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    titles = ("the MLP as it was", "the MLP drawn afresh")
    for axes, title, groups in zip(panels, titles, (OLD_MLP, NEW_MLP)):
        for split, (_, color) in SERVED.items():
            means = []
            for share, group in groups.items():
                cell = book.need(f"{group} 2000 accuracy {split}")
                axes.plot([share] * cell.seeds, cell.measured, "o", color=color, markersize=5,
                          alpha=0.6, clip_on=False)
                axes.plot([share - 0.02, share + 0.02], [cell.chance] * 2, color=color, linewidth=3,
                          zorder=1)
                means.append(cell.mean)
            axes.plot(list(groups), means, color=color, linewidth=2)
        axes.set_title(f"{title} ({name_seeds(cell)})")
        axes.set_xlabel("share of the new facts that is exposed")
        axes.set_xticks(list(groups), [tick(share) for share in groups])
        show_shares(axes)
    panels[0].set_ylabel("questions answered at step 2,000\n(small, natural, from the end)")
    handles = [Line2D([], [], color=color, marker="o", label=name)
               for name, color in SERVED.values()]
    handles.append(Line2D([], [], color="0.3", linewidth=3, label="what r2 alone gives"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    tell(figure, SERVE, book)
    return figure
