"""Every picture of README and results page, drawn from what runs have left in their folders.

    python -m experiments.pictures                      all of them, into figures
    python -m experiments.pictures --only hero.png      one of them

Drawings of the models are in diagrams.py, charts in charts.py; the moving picture is here. A
picture whose runs are missing is skipped; a run that is unfinished is left out by name.
"""
import io
import sys
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

HERE = Path(__file__).resolve().parent
if not __package__:  # started as a script, `python experiments/pictures.py`, from any folder
    sys.path.insert(0, str(HERE.parent))

from analyze import check_writable, name_positions, short
from data import BadInput, reading
from experiments import charts, diagrams
from experiments.book import Book
from experiments.canvas import STYLE, WIDTH
from experiments.runs import read_runs
from experiments.verdicts import Missing
from grok import PARTS, Parser, command, say, write_file


# ---------------------------------------------------------------- the moving picture
FILMED_RUN = "small/second_full"  # its first seed
MAPS = {"seen": ("what the lens sees", "Oranges"),
        "used": ("what a swap shows is used", "Blues")}


def read_frames(book):
    """What frames.npz of the filmed run holds."""
    book.need(f"{FILMED_RUN} last accuracy test_ood")
    run = book.runs.groups[FILMED_RUN][0]
    path = run.folder / "frames.npz"
    if not path.exists():
        raise Missing(f"frames.npz of {run.name}, which experiments.measure --frames makes")
    with reading(path), np.load(path) as saved:
        return {name: saved[name] for name in ("step", "answer", "seen", "used")}


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


def moving(book):
    """The GIF, as bytes."""
    frames = read_frames(book)
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


def poster(book):
    """The last frame of the moving picture."""
    return scene(read_frames(book), -1)


# ---------------------------------------------------------------- the command line
PICTURES = {"task.png": diagrams.task, "hero.png": charts.hero, "store_aim.png": charts.store_aim,
            "seen_used.png": charts.seen_used, "map.png": charts.supervision,
            "new_facts.png": charts.new_facts, "recursion.png": diagrams.recursion,
            "grokking.gif": moving, "grokking.png": poster}


def draw(file, book):
    """One of the PICTURES, as bytes."""
    with rc_context(STYLE):
        drawn = PICTURES[file](book)
        if isinstance(drawn, Figure):
            content = io.BytesIO()
            message = drawn.get_suptitle()
            drawn.savefig(content, dpi=150, format="png", metadata={"Title": message})
            drawn = content.getvalue()
    return drawn


def draw_all(root, output, only=None):
    """Draw the pictures of the runs below root into the folder `output`."""
    runs = read_runs(root)
    for reason in runs.left_out:
        say(f"left out: {reason}")
    if not runs.groups:
        raise BadInput(f"{root}: holds no finished run")
    book = Book(runs)
    check_writable(output)
    for file in PICTURES if only is None else [only]:
        try:
            write_file(output / file, draw(file, book))
            say((output / file).as_posix())
        except Missing as lacking:
            if only:
                raise BadInput(f"only = {only}: {root.as_posix()} lacks {lacking}")
            say(f"{file}: skipped, {root.as_posix()} lacks {lacking}")


@command("experiments.pictures")
def main(argv=None):
    """Draw; exit status 0, or 2 for bad input."""
    parser = Parser(prog="experiments.pictures", description="Draw all pictures from runs.")
    parser.add_argument("--root", type=Path, default=HERE.parent / "runs/shipped",
                        help="folder of runs (runs/shipped)")
    parser.add_argument("-o", "--out", type=Path, default=HERE.parent / "figures",
                        help="(figures)")
    parser.add_argument("--only", choices=PICTURES, help="one of them")
    args = parser.parse_args(argv)
    draw_all(args.root, args.out, args.only)


if __name__ == "__main__":
    sys.exit(main())
