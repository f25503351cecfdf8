"""The charts of README and results page, one function each; a Shelf of runs gives their numbers."""
from itertools import chain, cycle, product

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from analyze import short
from experiments.book import SHARES, square
from experiments.canvas import (BLUE, GREEN, GREY, INDIGO, PURPLE, SAND, SKY, WHOLE, WIDTH, WINE,
                                Absent, draw_curves, mean, name_of, name_seeds, new_curves,
                                set_message, share_at, shares_of, show_shares, span, steps_of, tick,
                                write_shares)
from experiments.runs import get
from grok import first_step

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
    known = f"It has fitted its training at step {span(fits, WHOLE)}"
    waits = [step - fit for fit, step in zip(fits, answers) if step is not None]
    if not waits:
        return f"{known}; pairs of OOD facts have not come when training ends"
    where = "" if len(waits) == len(fits) else f", in {len(waits)} of {len(fits)} seeds"
    return f"{known}; pairs of OOD facts come {span(waits, WHOLE)} steps later{where}"


# ---------------------------------------------------------------- store and aim
LEVELS = ("as_is", "snapped", "own_code")  # of analyze.aim_and_store
BAR_PARTS = {"answered as it is": BLUE,
             "more, with the nearest code in its place": SKY,
             "more, with the right code in its place": PURPLE,
             "not even then: hop 2 is not stored": "0.88"}


def store_aim(runs):
    """What stands between an OOD question and its right answer, at the fit and at the end."""
    groups = {name: runs.group(name, "fit", "end") for name in ("small/natural", "trm/natural")}
    figure = Figure((WIDTH, 4.4), layout="constrained")
    told = []
    panels = figure.subplots(1, len(groups), sharey=True)
    for axes, group in zip(panels, groups):
        aims = {}
        for stage in ("fit", "end"):
            aims[stage] = [run.inside[stage]["aim"]["test_ood"] for run in groups[group]]
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
        right = mean_of(seeds, "nearest_right")
        names.append(f"at the {stage}\n(nearest code right: {short(right)})")
    show_shares(axes)
    axes.set_xticks(range(len(names)), names)


def mean_of(seeds, name):
    """The mean over seeds of a number of aim_and_store."""
    return mean(aim[name] for aim in seeds)


def say_gains(group, aims):
    """What happens between the fit and the end, in words."""
    told = []
    for key, verb, hop in (("own_code", "store", "hop 2"), ("nearest_right", "aim", "hop 1")):
        before = [aim[key] for aim in aims["fit"]]
        after = [aim[key] for aim in aims["end"]]
        n_gain = sum(high - low >= 0.1 for low, high in zip(before, after))
        does = f"{verb}s" if n_gain else f"does not {verb}"
        said = f"{short(mean(before))} to {short(mean(after))}"
        if 0 < n_gain < len(after):
            each = ", ".join(short(value) for value in after)
            said = f"in {n_gain} of {len(after)} seeds: {each}"
        told.append(f"{does} {hop} ({said})")
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
    stores, aims, answers = [curves_of(films, key)
                             for key in ("own_code", "nearest_right", "as_is")]
    draw_curves(axes, steps, {"store: the right\ncode is answered": (PURPLE, stores),
                              "aim: the nearest\ncode is right": (GREEN, aims),
                              "answered as it is": (BLUE, answers)})
    fits = [first_step(run.history, 0.99, "train_inferred") for run in group]
    if None in fits:
        raise Absent("a filmed run of small/natural that never fitted its training")
    axes.axvspan(min(fits) - 8, max(fits) + 8, color="0.85", linewidth=0, zorder=0)
    axes.text(max(fits), 1.0, "  the fit of the training", va="center")
    at_fit = int(np.searchsorted(steps, max(fits)))
    store, aim, answer = [curves.mean(axis=0)[at_fit:] for curves in (stores, aims, answers)]
    do = "stay below both" if (answer <= np.minimum(store, aim) + 0.02).all() else "go"
    set_message(figure, f"From step {steps[at_fit]:,} on, when every seed is fitted, hop 2 gets "
                f"stored ({rise(store)}) and hop 1 aimed ({rise(aim)}); the answers {do} "
                f"({rise(answer)})")
    return figure


def curves_of(films, key):
    """One number of the OOD questions along films, (seeds, steps)."""
    curves = []
    for film in films:
        curves.append([frame["test_ood"][key] for frame in film])
    return np.array(curves)


def rise(curve):
    return f"{short(curve[0])} to {short(curve[-1])}"


# ---------------------------------------------------------------- used where it is not seen
KINDS = {"small": BLUE, "tiny": SKY, "trm": WINE, "trm, a change": SAND,
         "map of supervision": INDIGO}
PLACES = {"seen": "test_ood seen paper any", "seen_chance": "test_ood seen paper any_chance",
          "used": "site test_ood donor", "used_chance": "site test_ood noise"}  # in inside.json


def kind_of(run):
    """The one of KINDS that a run belongs to."""
    folder = run.name.split("/")[0]
    if folder == "map":
        return "map of supervision"
    if run.config.model == "recursive":
        return "trm, a change" if folder == "dial" else "trm"
    return "tiny" if run.config.preset == "tiny" else "small"


def seen_used(runs):
    """One point a run that answers half or more of its OOD questions."""
    points = []
    for run in chain(*runs.groups.values()):
        answer = get(run.inside, "end aim test_ood as_is")
        if answer is None or answer < 0.5:
            continue
        shares = {name: get(run.inside["end"], place) for name, place in PLACES.items()}
        if None in shares.values():
            runs.left_out[run.name] = "has no lens or no swaps (0 queries)"
        else:
            points.append({"kind": kind_of(run), **shares})
    if not points:
        raise Absent("no measured run that answers half of its OOD questions")
    figure = Figure((WIDTH, 5.4), layout="constrained")
    axes = figure.subplots()
    draw_points(axes, points)
    figure.legend(loc="outside lower center", ncols=3, title="one point a run")
    show_shares(axes, "x")
    show_shares(axes)
    axes.set_xlabel("seen: share of OOD bridges that the paper's lens shows, at any place")
    axes.set_ylabel("used: share of right OOD answers that a swap redirects")
    n_used = sum(point["used"] >= 0.8 for point in points)
    n_unseen = sum(point["seen"] < 0.5 for point in points)
    set_message(figure, f"Of {len(points)} runs that answer half of the OOD questions, a swap "
                f"redirects .8 or more of the answers in {n_used}; the lens sees less than half of "
                f"the bridges in {n_unseen}")
    return figure


def draw_points(axes, points):
    """The points by kind, each with a line from what chance would give the lens; a band is what
    noise redirects."""
    for point in points:
        axes.plot([point["seen_chance"], point["seen"]], [point["used"]] * 2, color="0.75",
                  linewidth=1, zorder=1)
    chance = [point["used_chance"] for point in points]
    axes.axhspan(min(chance), max(chance), color="0.9", linewidth=0, zorder=0)
    axes.text(0.99, max(chance) + 0.01, "redirected by noise", ha="right", va="bottom")
    for kind, color in KINDS.items():
        chosen = [point for point in points if point["kind"] == kind]
        if chosen:
            axes.plot([point["seen"] for point in chosen], [point["used"] for point in chosen],
                      "o", markersize=7.5, alpha=0.75, color=color, markeredgecolor="white",
                      clip_on=False, zorder=3, label=f"{kind} ({len(chosen)})")
    axes.plot([], [], color="0.75", linewidth=1, label="from what the lens sees by chance")


# ---------------------------------------------------------------- the map of supervision
PANELS = {  # what is in inside.json: title
    "end aim test_ood as_is": "answered as it is",
    "end aim test_ood nearest_right": "aim of hop 1:\nthe nearest code is right",
    "end aim test_ood own_code": "store of hop 2:\nthe right code is answered",
    "end test_ood seen paper any": "seen by the lens"}
ANSWER, AIM, STORE, SEEN = PANELS


def supervision(runs):
    """The four panels over the shares of OOD facts that are supervised as hop 1 and as hop 2."""
    maps = {path: read_map(runs, path) for path in PANELS}
    chances = read_map(runs, SEEN + "_chance")
    if np.isnan(maps[ANSWER]).all():
        raise Absent("no measured run of map")
    figure = Figure((WIDTH, 2.9), layout="constrained")
    for axes, (path, title) in zip(figure.subplots(1, len(PANELS)), PANELS.items()):
        draw_panel(axes, maps[path], "Oranges" if path == SEEN else "Blues")
        axes.set_title(title, fontsize=9)
    chance = span(chances[np.isfinite(chances)])
    figure.axes[-1].set_title(f"{PANELS[SEEN]}\n(chance {chance})", fontsize=9)
    figure.axes[0].set_ylabel("share supervised as hop 1")
    figure.supxlabel("share of the OOD facts supervised as hop 2", fontsize=9)
    set_message(figure, say_map(maps))
    return figure


def read_map(runs, path):
    """The means of what stands at a path in inside.json, (hop 1's shares, hop 2's); nan where
    nothing was measured."""
    values = np.full((len(SHARES), len(SHARES)), np.nan)
    for row, column in product(range(len(SHARES)), repeat=2):
        group = runs.groups.get(square(SHARES[row], SHARES[column]), [])
        values[row, column] = mean(get(run.inside, path) for run in runs.measured(group))
    return values


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


def say_map(maps):
    """The message of `supervision`: what supervising all of a hop's facts adds, to aim and store,
    as a mean over the shares of the other hop."""
    gains = []
    for values in (maps[AIM], maps[STORE]):
        for added in (values[-1] - values[0], values[:, -1] - values[:, 0]):
            gains.append(mean(added[np.isfinite(added)]))
    if np.isnan(gains).any():
        n_squares = int(np.isfinite(maps[ANSWER]).sum())
        return f"Answer, aim, store and lens in {n_squares} of {maps[ANSWER].size} squares"
    aim_by_hop1, aim_by_hop2, store_by_hop1, store_by_hop2 = [signed(gain) for gain in gains]
    return (f"Supervising all of hop 1 adds {aim_by_hop1} to its aim and {store_by_hop1} to the "
            f"store of hop 2; supervising all of hop 2 adds {aim_by_hop2} and {store_by_hop2} "
            "(means)")


def signed(number):
    """"+.30", "-.02"."""
    return ("-" if number < 0 else "+") + short(abs(number))


# ---------------------------------------------------------------- plain data
SEED_LINES = ("-", "--", ":")


def plain_data(runs):
    """What `small` answers along natural training, with few and with many questions a fact."""
    groups = {}
    for name in ("long/phi_6", "long/natural"):
        group = runs.group(name)
        groups[f"{group[0].config.phi:g} training questions a fact"] = group
    if len(groups) < 2:
        raise Absent("long/phi_6 and long/natural with the same phi")
    figure = Figure((WIDTH, 3.7), layout="constrained")
    panels = figure.subplots(1, len(groups), sharey=True)
    last = min(group[0].config.steps for group in groups.values())
    for axes, (title, group) in zip(panels, groups.items()):
        for split, color in (("train_inferred", GREY), ("test_id", SKY), ("test_ood", BLUE)):
            for run, line in zip(group, cycle(SEED_LINES)):
                axes.plot(steps_of(group), shares_of(run, split), line, color=color, linewidth=1.2)
        show_shares(axes)
        axes.set(xlim=(0, last), title=title,
                 xlabel=f"training step (the run has {group[0].config.steps:,})")
        axes.xaxis.set_major_formatter("{x:,.0f}")
    panels[0].set_ylabel("share of two-step questions answered")
    names = {"training": GREY, "unseen, of ID facts": SKY, "unseen, of OOD facts": BLUE}
    handles = [Line2D([], [], color=color, label=name) for name, color in names.items()]
    for run, line in zip(max(groups.values(), key=len), cycle(SEED_LINES)):
        handles.append(Line2D([], [], linestyle=line, color="black",
                              label=f"seed {run.config.seed}"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
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
    reached = [step for step in steps if step is not None]
    if not reached:
        return "never"
    seeds = f", in {len(reached)} of {len(steps)} seeds" if len(reached) < len(steps) else ""
    return f"at step {span(reached, WHOLE)}{seeds}"


# ---------------------------------------------------------------- new facts
SERVED = {"new_old": ("new fact\nas hop 1", INDIGO), "old_new": ("new fact\nas hop 2", WINE),
          "new_new": ("both new", SAND)}
FROM_THE_END = {"the MLP as it was": {0.0: "tune/long_natural_end",
                                      0.25: "exposed/natural_end_0.25_4",
                                      0.5: "exposed/natural_end_0.5_4"},
                "the MLP drawn afresh": {0.0: "tune/natural_new_mlp",
                                         0.5: "exposed/natural_new_mlp_0.5_4"}}


def new_facts(runs):
    """What new facts serve for, by the share of them that was exposed, and by the MLP."""
    figure = Figure((WIDTH, 3.9), layout="constrained")
    means = {}
    for axes, (title, names) in zip(figure.subplots(1, 2, sharey=True), FROM_THE_END.items()):
        groups = {share: runs.group(name, "r2_alone") for share, name in names.items()}
        means[title] = {}
        for split, (_, color) in SERVED.items():
            means[title][split] = draw_exposure(axes, groups, split, color)
        for share, group in groups.items():
            draw_r2_alone(axes, group, share)
        axes.set_title(f"{title} ({name_seeds(groups[0.0])})")
        axes.set_xlabel("share of the new facts that is exposed")
        axes.set_xticks(list(groups), [tick(share) for share in groups])
        show_shares(axes)
    figure.axes[0].set_ylabel("questions answered at step 2,000\n(small, natural, from the end)")
    handles = [Line2D([], [], color=color, marker="o", label=name.replace("\n", " "))
               for name, color in SERVED.values()]
    handles.append(Line2D([], [], color="0.3", linewidth=3, label="what r2 alone gives"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    set_message(figure, say_new_facts(*means.values()))
    return figure


def draw_exposure(axes, groups, split, color):
    """A dot a seed of facts not exposed, and a line through the means; {share exposed: mean}."""
    means = {}
    for share, group in groups.items():
        values = [share_at(run, split, 2000) for run in group]
        means[share] = mean(values)
        axes.plot([share] * len(values), values, "o", color=color, markersize=5, alpha=0.6,
                  clip_on=False)
    axes.plot(list(means), list(means.values()), color=color, linewidth=2)
    return means


def draw_r2_alone(axes, runs, x):
    """Ticks at what r2 alone gives, see experiments/measure.py; those of hop 2 and of two new
    facts, which lie close together, take one half each."""
    ends = {"new_old": (x - 0.02, x + 0.02), "old_new": (x - 0.02, x), "new_new": (x, x + 0.02)}
    for run in runs:
        for split, share in run.inside["r2_alone"].items():
            if split in SERVED:
                axes.plot(ends[split], [share] * 2, color=SERVED[split][1], zorder=1, linewidth=3,
                          solid_capstyle="butt")


def say_new_facts(kept, drawn):
    """The message of `new_facts`, from {split: {share exposed: mean}} with the MLP as it was and
    drawn afresh: what either adds, by itself."""
    shares = {}
    for split in SERVED:
        levels = (kept[split][0.0], kept[split][max(kept[split])], drawn[split][0.0])
        shares[split] = [short(level) for level in levels]
    alone, exposed, afresh = shares["new_old"]
    return (f"New facts serve as hop 1 in {alone}, with half of them exposed in {exposed}, with "
            f"the MLP drawn afresh in {afresh}; as hop 2 in {', '.join(shares['old_new'])}; two of "
            f"them are chained in {', '.join(shares['new_new'])}")
