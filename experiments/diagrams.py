"""The two drawings of a model: one question and a swap in it; the paper's recursion unrolled."""
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle

from analyze import POSITIONS, name_positions, short
from data import reading
from experiments.canvas import BEA, BLUE, DORA, GREEN, ORANGE, WIDTH, set_message, write_shares
from experiments.measure import read_json
from experiments.verdicts import Missing
from grok import PARTS, name_loops

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


def task(book):
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
    axes.plot([COLUMNS[-1], 3, 3, 5], [6, 6, top, top], color=GREEN, linewidth=1.2, zorder=1)
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


# ---------------------------------------------------------------- the paper's own recursion
def recursion(book):
    """The paper's recursion unrolled, in one seed: what its lens sees after every pass, what a swap
    redirects at every site inside."""
    book.need("trm/both_full last accuracy test_ood")
    run = book.runs.groups["trm/both_full"][0]
    path = run.folder / "paths.json"
    if not path.exists():
        raise Missing(f"paths.json of {run.name}, which analyze.py makes")
    config = run.config
    with reading(path):
        measured = read_json(path, dict)["end"]
        redirected = measured["test_ood"]["used"]["other_r2"]["redirected"]
        shares = np.stack([redirected[part] for part in PARTS], axis=1)          # (n_loops, 2, T)
        lens = np.array(measured["test_ood"]["seen"]["state"]["bridge"]["map"])  # (n_loops, T)
    n_in_cycle = config.n_low + 1
    figure = Figure((WIDTH, 1.2 + 1.9 * config.n_cycles), layout="constrained")
    passes = figure.subplots(config.n_cycles, n_in_cycle, squeeze=False).ravel()
    for number, axes in enumerate(passes):
        loops = slice(number * config.n_blocks, (number + 1) * config.n_blocks)
        draw_pass(axes, shares[loops], lens[loops][-1].max())
        axes.set_title(name_pass(config, loops.start), fontsize=8, loc="left")
        if number % n_in_cycle:
            axes.set_yticks([])
            axes.annotate("", (-0.03, 0.5), (-0.21, 0.5), xycoords="axes fraction",
                          arrowprops=dict(arrowstyle="-|>", color="0.3"))
    for cycle, axes in enumerate(passes[::n_in_cycle], 1):
        axes.set_ylabel(f"cycle {cycle}" + (", no gradient" if cycle < config.n_cycles else ""))
    for loop, part, position in measured["site"]["sites"]:
        number, block = divmod(loop, config.n_blocks)
        corner = (block * len(PARTS) + PARTS.index(part) - 0.5, position - 0.5)
        passes[number].add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black",
                                           linewidth=2.2, clip_on=False, zorder=6))
    figure.legend(handles=recursion_key(), loc="outside lower center", ncols=2)
    set_message(figure, say_recursion(config, measured))
    return figure


def name_pass(config, loop):
    """"z_L\\npass 3" of the pass that a loop is in."""
    return name_loops(config)[loop].split(",")[0].replace(" pass", "\npass")


def recursion_key():
    """What frames, shades and lines of `recursion` mean."""
    return [Patch(facecolor="none", edgecolor=ORANGE, linewidth=2,
                  label="where the paper's lens looks, and the most that it sees there"),
            Patch(facecolor=BLUE, label="what a donor's value redirects"),
            Patch(facecolor="none", edgecolor="black", linewidth=2.5,
                  label="the site of the bridge"),
            Line2D([], [], color="0.3", label="between the two blocks of a pass"),
            Line2D([], [], linestyle="", label="every z_L pass takes in z_H and the input, too")]


def draw_pass(axes, shares, seen):
    """The sites of one pass, shares (n_blocks, 2, T), shaded by what a swap redirects there; framed
    is what the lens reads, with the share that it sees."""
    n_blocks, n_parts, T = shares.shape
    values = shares.reshape(n_blocks * n_parts, T).T                         # (T, sites of a row)
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", origin="lower", aspect="auto")
    write_shares(axes, values, least=0.3)
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
    swaps = measured["site"]["test_ood"]
    n_map = measured["test_ood"]["used"]["other_r2"]["n"]
    seen = f"{short(lens['any'])} of the bridges (chance {short(lens['any_chance'])})"
    return (f"In seed {config.seed} of the paper's recursion the lens, which looks after every "
            f"pass, sees {seen}; a swap at the black frame redirects {short(swaps['donor'])} of "
            f"the answers (n = {swaps['n']}; in the map {n_map})")
