"""A page to patch in: one HTML file, for any browser, that holds a run and its forward pass.

    python -m extras.explorer [RUN] -o explorer.html

The page is extras/explorer.html with the run's data put in. It loads nothing and needs no network.
"""
import argparse
import base64
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import numpy as np

from analyze import EXAMINED, other_r2, predict, right_only
from data import BadInput
from grok import WEIGHTS, load_run, read_run, say, to_tokens, write_file

HERE = Path(__file__).resolve().parent
DEFAULT = Path("runs/shipped/small/second_full/seed0")
MOST_BYTES = 600_000
MOST_QUERIES = 300  # of each kind
TRIED = 2000        # queries of each kind, of which those answered rightly are taken


# ---------------------------------------------------------------- what the page holds
def load_rounded(folder, stage):
    """(model, world, splits) of a run, the weights rounded to half precision as in the page."""
    model, world, splits = load_run(folder, stage)
    model.load_state_dict({name: weight.half().float()
                           for name, weight in model.state_dict().items()})
    return model, world, splits


def encode(model):
    """All weights in the order of state_dict: base64 of little-endian half precision."""
    weights = [weight.numpy().ravel() for weight in model.state_dict().values()]
    return base64.b64encode(np.concatenate(weights).astype("<f2").tobytes()).decode()


def choose_queries(model, world, splits):
    """{"ID", "OOD": up to MOST_QUERIES random Queries of each that the model answers rightly}."""
    rng, chosen = np.random.default_rng(0), {}
    for split, kind in EXAMINED.items():
        tried = splits[split].take(rng.permutation(len(splits[split].h))[:TRIED])
        chosen[kind] = right_only(model, world, tried).take(slice(MOST_QUERIES))
    return chosen


def with_before(asked, model, world):
    """Rows [h, r1, r2, 1 where the model before grokking answers rightly too, else 0]."""
    right = np.zeros(len(asked.h), int)
    if model is not None:
        tokens, answers = to_tokens(asked, world, model.config.layout)
        right = (predict(model, tokens) == answers).numpy().astype(int)
    return np.column_stack([asked.h, asked.r1, asked.r2, right]).tolist()


def describe(folder):
    """The data of the page; BadInput for a run that it cannot show.

    {"title", "config": Config, "entities", "relations": names, "tails": (E, R), -1 where there is
     no fact, "queries": {"ID", "OOD": rows of `with_before`}, "sizes": [[name, numbers]...] of the
     weights, "weights": {"before", "grokked": see `encode`}, before only where the run has it}
    """
    about, _ = read_run(folder)
    models = {"grokked": load_rounded(folder, "grokked")}
    if (folder / WEIGHTS["before"]).exists():
        models = {"before": load_rounded(folder, "before"), **models}
    model, world, splits = models["grokked"]
    sizes = [[name, weight.numel()] for name, weight in model.state_dict().items()]
    check_size(folder, len(models) * sum(size for _, size in sizes) * 2 * 4 // 3)
    if not EXAMINED.keys() <= splits.keys():
        raise BadInput(f"{folder}: is fine-tuned; the page shows runs with ID and OOD compositions")
    chosen, before = choose_queries(model, world, splits), models.get("before", (None,))[0]
    if not any(has_pair(world, asked) for asked in chosen.values()):
        raise BadInput(f"{folder}: no two compositions that it answers rightly make a fair pair")
    fact = world.index
    return {"title": "{preset}, {regime}, seed {model[seed]}".format(**about),
            "config": asdict(model.config), "entities": world.entity_names,
            "relations": world.relation_names,
            "tails": np.where(fact >= 0, world.facts[fact, 2], -1).tolist(),
            "queries": {kind: with_before(asked, before, world) for kind, asked in chosen.items()},
            "sizes": sizes, "weights": {stage: encode(m) for stage, (m, _, _) in models.items()}}


def has_pair(world, asked):
    """Whether two of the Queries make a fair swap."""
    return len(other_r2(world, asked, asked, np.random.default_rng(0))[0].h) > 0


def check_size(folder, n_bytes):
    if n_bytes > MOST_BYTES:
        raise BadInput(f"{folder}: too large for the page, {n_bytes // 1000} KB of at most "
                       f"{MOST_BYTES // 1000}")


# ---------------------------------------------------------------- the page
def make_page(folder, notebook="../tutorial.ipynb"):
    """The page of a run as bytes, the same each time; `notebook` is the address of its link."""
    data = json.dumps({**describe(Path(folder)), "notebook": notebook}, separators=(",", ":"))
    template = (HERE / "explorer.html").read_text(encoding="utf-8")
    page = template.replace("@DATA@", data.replace("<", "\\u003c")).encode()  # closes no element
    check_size(folder, len(page))
    return page


def main(argv=None):
    """Write the page; exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="explorer.py", description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, default=DEFAULT,
                        help=f"a run's folder ({DEFAULT.as_posix()})")
    parser.add_argument("-o", "--out", type=Path, default=Path("explorer.html"),
                        help="the page to write (explorer.html)")
    given = parser.parse_args(argv)
    try:
        notebook = Path(os.path.relpath(HERE.parent / "tutorial.ipynb", given.out.parent))
        page = make_page(given.run, quote(notebook.as_posix()))
        write_file(given.out, page)
    except (BadInput, OSError) as error:
        print(f"explorer.py: {error}", file=sys.stderr)
        return 2
    say(f"{given.out}: {len(page) / 1000:.0f} KB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
