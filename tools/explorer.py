"""A page to swap in: one HTML file, for any browser, that holds runs and their forward pass.

    python -m tools.explorer [RUN ...] -o figures/explorer.html

"In which city does Ada's mother live?" is answered through Bea. The page shows what the logit lens
reads at every site, and a click puts in what the model holds there while it answers "In which
street does Carl's boss live?". If the answer becomes the city of Dora, his boss, that site carries
the bridge. The page loads nothing; it is figures/explorer.html with the data of these runs put in
place of those that are there.
"""
import base64
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

import numpy as np

if not __package__:  # an editor's Run button starts this file and not the module
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from analyze import (EXAMINED, bridge_site, donor_map, logit_lens, other_r2, patch, predict,
                     right_only, tail, values_at)
from data import BadInput, question_numbers, regime_name
from grok import (WEIGHTS, Parser, command, first_step, load_run, read_run, say, to_tokens,
                  write_file)

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "figures" / "explorer.html"
SHIPPED = HERE.parent / "runs" / "shipped"
DEFAULT = (SHIPPED / "small" / "second_full" / "seed0",  # used, and hardly seen
           SHIPPED / "tiny" / "natural" / "seed0")       # used, and seen
MOST_BYTES = 1_000_000
MOST_QUERIES = 300  # of each kind
TRIED = 2000        # queries of each kind, of which those answered rightly are taken

# What the opening pair is called in a random world: its entities, its relations. "Oslo" is what the
# donor's bridge predicts.
ENTITIES = ("Ada", "Bea", "Bern", "Carl", "Dora", "Elm St", "Oslo")
RELATIONS = ("mother", "city", "boss", "street")


# ---------------------------------------------------------------- the queries of a run
def load_rounded(folder, weights):
    """(model, world, splits) of a run, the weights rounded to half precision as in the page."""
    model, world, splits = load_run(folder, weights)
    for weight in model.parameters():
        weight.copy_(weight.half().float())
    return model, world, splits


def make_pools(model, world, splits):
    """{"ID", "OOD": Queries that the model answers rightly, in random order}. As analyze.seen does,
    they leave out those whose bridge is their own head, where the query shows its own token."""
    rng = np.random.default_rng(0)
    pools = {}
    for split, kind in EXAMINED.items():
        shuffled = splits[split].shuffled(rng)
        hidden = shuffled.take(shuffled.b != shuffled.h)
        pools[kind] = right_only(model, world, hidden.take(slice(TRIED)))
    return pools


def find_site(model, world, pool):
    """The one site (loop, part, position) of the bridge, by analyze.bridge_site: where donors with
    another r2 redirect most answers to Queries of the pool. None if there is no such site."""
    clean = pool.take(slice(MOST_QUERIES))
    clean, donor, predicted = other_r2(world, clean, pool, np.random.default_rng(0))
    if len(clean.h) == 0:
        return None
    used = donor_map(model, world, clean, donor, predicted)
    bridge = bridge_site(model, world, pool, used, scoring={}, code=None)
    return tuple(bridge["sites"][0]) if bridge["where"] == "one site" else None


# ---------------------------------------------------------------- the opening pair
def choose_opening(model, world, pools, site, wished=None):
    """(kind, row of the clean query, row of the donor) in a pool: the first pair that can open the
    page, if possible a plain one, or, where none can, the first that is fair. OOD queries go first,
    and before them `wished`, (kind, clean, donor) of another run. None if there is no fair pair."""
    if wished is not None:
        kind, *pair = wished
        rows = np.concatenate([find_rows(world, pools[kind], query) for query in pair])
        if len(rows) == 2 and can_open(model, world, *pair, site).all():
            return kind, *rows
    fair = None
    for kind in ("OOD", "ID"):
        pool = pools[kind]
        clean, donor, _ = other_r2(world, pool, pool, np.random.default_rng(0))
        rows = np.stack([find_rows(world, pool, clean), find_rows(world, pool, donor)], axis=1)
        possible = can_open(model, world, clean, donor, site)                   # (N,) bool
        plain = possible & is_plain(model, world, clean, donor)                 # (N,) bool
        for wanted in (plain, possible):
            if wanted.any():
                return kind, *rows[wanted.argmax()]
        if fair is None and len(rows):
            fair = (kind, *rows[0])
    return fair


def find_rows(world, pool, queries):
    """The rows at which Queries stand in a pool, without those that do not."""
    row_of = {number: row for row, number in enumerate(question_numbers(world, pool).tolist())}
    numbers = question_numbers(world, queries).tolist()
    return np.array([row_of[number] for number in numbers if number in row_of], int)


def can_open(model, world, clean, donor, site):
    """(N,) bool: for which pairs a swap at the site redirects the answer, all that they are about
    are different things, so that each can have a name of its own, and neither the donor's head nor
    its first relation gives the predicted answer alone: who is Carl's mother, or Ada's boss?"""
    if site is None:
        return np.zeros(len(clean.h), bool)
    tokens, _ = to_tokens(clean, world, model.config.layout)
    swapped = patch(model, tokens, values_at(model, world, donor, [site])).argmax(-1)
    predicted = tail(world, donor.b, clean.r2)
    redirected = swapped.numpy() == predicted
    by_bridge_alone = np.ones(len(clean.h), bool)
    for h, r1 in ((donor.h, clean.r1), (clean.h, donor.r1)):
        b = tail(world, h, r1)                                                  # -1: no such fact
        by_bridge_alone &= (b < 0) | (tail(world, b, clean.r2) != predicted)
    entities, relations = things_of(world, clean, donor)
    return redirected & by_bridge_alone & all_different(entities) & all_different(relations)


def things_of(world, clean, donor):
    """What pairs are about, in the order of ENTITIES and RELATIONS: (7, N) and (4, N)."""
    predicted = tail(world, donor.b, clean.r2)
    entities = np.stack([clean.h, clean.b, clean.t, donor.h, donor.b, donor.t, predicted])
    relations = np.stack([clean.r1, clean.r2, donor.r1, donor.r2])
    return entities, relations


def is_plain(model, world, clean, donor):
    """(N,) bool: in which pairs the lens shows in neither run, by chance, a token that belongs to
    the other one."""
    E = world.n_entities
    predicted = tail(world, donor.b, clean.r2)
    of_clean = [clean.h, clean.b, clean.t, E + clean.r1, E + clean.r2]
    of_donor = [donor.h, donor.b, donor.t, E + donor.r1, E + donor.r2]
    return ~(shows_any(model, world, clean, [*of_donor, predicted])
             | shows_any(model, world, donor, [*of_clean, predicted]))


def shows_any(model, world, queries, foreign):
    """(N,) bool: for which Queries the lens shows one of the foreign tokens (N,), at any site,
    over all tokens or over the entities alone."""
    tokens, _ = to_tokens(queries, world, model.config.layout)
    shown = np.zeros(len(tokens), bool)
    for first in (None, world.n_entities):
        for top in logit_lens(model, tokens, first).values():                   # (n_loops, N, T)
            for token in foreign:
                shown |= (top.numpy() == token[:, None]).any(axis=(0, 2))
    return shown


def all_different(table):
    """(N,) bool: in which columns of a table (K, N) no number stands twice."""
    return np.array([len(set(column)) == len(column) for column in table.T.tolist()], bool)


def name_things(world, clean, donor):
    """(entity names, relation names) of a random world, those of the opening pair replaced."""
    entities, relations = things_of(world, clean, donor)
    entity_names = list(world.entity_names)
    relation_names = list(world.relation_names)
    for entity, name in zip(entities[:, 0], ENTITIES):
        entity_names[entity] = name
    for relation, name in zip(relations[:, 0], RELATIONS):
        relation_names[relation] = name
    return entity_names, relation_names


# ---------------------------------------------------------------- what the page holds of a run
def describe_run(folder, earlier=None):
    """(run, opening) for the page; BadInput for a run that it cannot show. An `earlier` run's
    opening, (world, kind, clean, donor), is taken if it belongs to the same world and fits.

    run = {"name", "config": Config, "entities", "relations": names,
           "tails": (E, R), -1 where there is no fact,
           "queries": {"ID", "OOD": see `as_rows`}, "right": see `shares_right`,
           "site": (loop, part, position) of the bridge or None,
           "opening": {"kind", "clean", "donor": [h, r1, r2], "named": whether it has ENTITIES},
           "sizes": [[name, numbers]...] of the weights, "weights": {"fit", "end": see `encode`}}
    The weights at the fit are there only if the run has them.
    """
    config, history = read_run(folder)
    models, world, splits = load_models(folder, config)
    model = models["end"]
    pools = make_pools(model, world, splits)
    site = find_site(model, world, pools["ID"])
    same_world = earlier is not None and np.array_equal(earlier[0].facts, world.facts)
    opening = choose_opening(model, world, pools, site, earlier[1:] if same_world else None)
    if opening is None:
        raise BadInput(f"{folder}: no two compositions that it answers rightly make a fair pair")
    kind, clean_row, donor_row = opening
    pools[kind] = put_first(pools[kind], clean_row, donor_row)
    clean = pools[kind].take([0])
    donor = pools[kind].take([1])
    named = not config.facts and bool(can_open(model, world, clean, donor, site)[0])
    run = {"name": f"{config.preset}, {regime_name(config)}, seed {config.seed}",
           "config": asdict(config),
           **describe_world(world, clean, donor, named),
           "queries": {kind: as_rows(pool.take(slice(MOST_QUERIES)), models.get("fit"), world)
                       for kind, pool in pools.items()},
           "right": shares_right(history),
           "site": site,
           "opening": {"kind": kind, "clean": as_row(clean), "donor": as_row(donor),
                       "named": named},
           **describe_weights(models)}
    return run, (world, kind, clean, donor)


def put_first(pool, *rows):
    """The Queries of a pool with these rows before all others."""
    others = np.setdiff1d(np.arange(len(pool.h)), rows)
    return pool.take(np.concatenate([rows, others]))


def describe_world(world, clean, donor, named):
    """{"entities", "relations", "tails"}, see `describe_run`."""
    entity_names = world.entity_names
    relation_names = world.relation_names
    if named:
        entity_names, relation_names = name_things(world, clean, donor)
    tails = np.where(world.index >= 0, world.facts[world.index, 2], -1)         # (E, R)
    return {"entities": entity_names, "relations": relation_names, "tails": tails.tolist()}


def describe_weights(models):
    """{"sizes", "weights"}, see `describe_run`."""
    sizes = [[name, weight.numel()] for name, weight in models["end"].state_dict().items()]
    return {"sizes": sizes, "weights": {name: encode(model) for name, model in models.items()}}


def load_models(folder, config):
    """({"fit", "end": model}, world, splits); BadInput for a run that the page cannot show."""
    if config.model != "looped":
        raise BadInput(f"{folder}: model = {config.model}: the page shows looped models only")
    if config.new_facts:
        raise BadInput(f"{folder}: is fine-tuned; the page shows runs with ID and OOD compositions")
    models = {}
    for weights in WEIGHTS:
        if weights == "end" or (folder / f"{weights}.pt").exists():
            models[weights], world, splits = load_rounded(folder, weights)
    n_weights = sum(weight.numel() for weight in models["end"].parameters())
    check_size(folder, len(models) * n_weights * 2 * 4 // 3)
    return models, world, splits


def as_row(query):
    """[h, r1, r2] of Queries of one."""
    return [int(query.h[0]), int(query.r1[0]), int(query.r2[0])]


def as_rows(queries, model_at_fit, world):
    """Rows [h, r1, r2, 1 where the model at the fit answers rightly, too, else 0]."""
    right = np.zeros(len(queries.h), int)
    if model_at_fit is not None:
        tokens, answers = to_tokens(queries, world, model_at_fit.config.layout)
        right = (predict(model_at_fit, tokens) == answers).numpy().astype(int)
    return np.column_stack([queries.h, queries.r1, queries.r2, right]).tolist()


def shares_right(history):
    """{"fit", "end": {"ID", "OOD": share of the test compositions answered rightly then}}."""
    steps = {"fit": first_step(history, 0.99, "train_inferred"), "end": history[-1]["step"]}
    right = {}
    for line in history:
        for weights, step in steps.items():
            if line["step"] == step:
                right[weights] = {kind: line["accuracy"].get(split)
                                  for split, kind in EXAMINED.items()}
    return right


def encode(model):
    """All weights in the order of state_dict: base64 of little-endian half precision."""
    weights = [weight.numpy().ravel() for weight in model.state_dict().values()]
    return base64.b64encode(np.concatenate(weights).astype("<f2").tobytes()).decode()


def check_size(name, n_bytes):
    if n_bytes > MOST_BYTES:
        raise BadInput(f"{name}: too large for the page, {n_bytes // 1000} KB of at most "
                       f"{MOST_BYTES // 1000}")


# ---------------------------------------------------------------- the page
def make_page(folders, notebook="../tutorial.ipynb"):
    """The page of these runs as bytes, the same each time; `notebook` is where its link leads."""
    runs = []
    opening = None
    for folder in folders:
        run, opening_there = describe_run(Path(folder), opening)
        opening = opening or opening_there
        runs.append(run)
    data = json.dumps({"runs": runs, "notebook": notebook}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # so that no name can close the element it stands in
    page = put_in(PAGE.read_text(encoding="utf-8"), data).encode()
    check_size(", ".join(str(folder) for folder in folders), len(page))
    return page


def put_in(page, data):
    """The page with other data, a JSON text, in the element that holds them."""
    before, begin, rest = page.partition('<script type="application/json" id="data">')
    _, end, after = rest.partition("</script>")
    return before + begin + data + end + after


@command("tools.explorer")
def main(argv=None):
    """Write the page; exit status 0, 2 for bad input, 130 when stopped."""
    parser = Parser(prog="python -m tools.explorer",
                    description="A page to swap in: one HTML file that holds runs.")
    parser.add_argument("runs", nargs="*", type=Path, default=DEFAULT, metavar="RUN",
                        help="folders of runs (small, second_full and tiny, natural, seed 0)")
    parser.add_argument("-o", "--out", type=Path, default=Path("explorer.html"),
                        metavar="FILE", help="the page to write (explorer.html)")
    given = parser.parse_args(argv)
    notebook = Path(os.path.relpath(HERE.parent / "tutorial.ipynb", given.out.parent))
    page = make_page(given.runs, quote(notebook.as_posix()))
    write_file(given.out, page)
    say(f"{given.out.as_posix()}: {len(page) / 1000:.0f} KB")


if __name__ == "__main__":
    sys.exit(main())
