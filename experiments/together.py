"""Where is the bridge of a run in which no single site holds it?

    python -m experiments.together RUN...    together.json in each RUN: the two, three and four
                                             sites that together redirect most OOD answers

Two donors have the same bridge and different heads; one gives its value at the first site, the
other at the rest. What such a mixture redirects is no more than the bridge that they share, however
many sites take part. The best two sites are found by trying all pairs, then sites are added one at
a time. The sites are chosen on one half of the right OOD questions and scored on the other.

together.json is a list of {"sites": [[loop, part, position], ...], "names", "n": questions scored,
"mixed_donors": redirected by two such donors, "donor": by the first of them at all of the sites,
"outright": how often the model gives the predicted answer to the new question itself (the donor's
head and first relation, the question's own second relation)}. No swap can be expected to redirect
more than that.
"""
import sys
from functools import partial
from itertools import combinations, product
from pathlib import Path

import numpy as np

from analyze import (POSITIONS, mixed_donors, name_sites, right_only, share_becoming, take_sites,
                     values_of)
from data import BadInput
from experiments.measure import write_each
from grok import PARTS, Parser, command, load_run, to_tokens

MOST = 4          # sites
N_CHOOSING = 100  # questions
N_SCORING = 300
LAST_PASSES = 4   # of a recursive model; the sites of all its 28 loops make too many pairs


def prepare(model, world, queries, n):
    """(trial, outright): a trial is (up to n Queries, what the model holds for the first donor of
    each and for the second, {part: (n_loops, N, T, D)}, what the answers become if the bridge that
    the two share is used (N,)). All of the queries may be donors."""
    rng = np.random.default_rng(0)
    clean, first, second, predicted = mixed_donors(world, queries.take(slice(n)), queries, rng)
    values = [values_of(model, to_tokens(donor, world, model.config.layout)[0])
              for donor in (first, second)]
    new_question = clean._replace(h=first.h, r1=first.r1)
    outright = share_becoming(predicted, model, world, new_question, {})
    return (clean, *values, predicted), outright


def redirected(model, world, trial, n_first, sites):
    """Share of the answers of a trial, see `prepare`, that become the predicted ones if the first
    donor gives its values at the first n_first of the sites, the second at the others."""
    clean, first, second, predicted = trial
    put = {**take_sites(first, sites[:n_first]), **take_sites(second, sites[n_first:])}
    return share_becoming(predicted, model, world, clean, put)


def sites_of(model):
    """Every (loop, part, position); of a recursive model, in its last passes."""
    first = 0
    if model.config.model == "recursive":
        first = max(0, model.n_loops - LAST_PASSES * model.config.n_blocks)
    positions = range(len(POSITIONS))  # the tokens: scratch slots do not take part
    return list(product(range(first, model.n_loops), PARTS, positions))


def grow(redirects, sites):
    """The sets of two to MOST sites that redirect most, by redirects(sites of a set), each the last
    one and a site more."""
    best = max(combinations(sites, 2), key=redirects)
    sets = [best]
    while len(best) < MOST:
        longer = [(*best, site) for site in sites if site not in best]
        best = max(longer, key=redirects)
        sets.append(best)
    return sets


def look_together(folder):
    """What together.json holds of a run."""
    model, world, splits = load_run(folder)
    if model.config.layout != "bidirectional" or model.config.new_facts:
        raise BadInput(f"{folder}: is no run of four positions on an old world")
    pool = splits["test_ood"].shuffled(np.random.default_rng(0))
    right = right_only(model, world, pool)
    choosing, _ = prepare(model, world, right.take(slice(0, None, 2)), N_CHOOSING)
    scoring, outright = prepare(model, world, right.take(slice(1, None, 2)), N_SCORING)
    n = len(scoring[-1])
    if n == 0 or len(choosing[-1]) == 0:
        raise BadInput(f"{folder}: answers too few OOD questions to find two donors for one")
    measured = []
    for sites in grow(partial(redirected, model, world, choosing, 1), sites_of(model)):
        measured.append({"sites": [list(site) for site in sites],
                         "names": [name_sites([site], model.loop_names) for site in sites],
                         "n": n, "mixed_donors": redirected(model, world, scoring, 1, sites),
                         "donor": redirected(model, world, scoring, len(sites), sites),
                         "outright": outright})
    return measured


# ---------------------------------------------------------------- the command line
@command("experiments.together")
def main(argv=None):
    """Measure runs; exit status 0, or 2 for what cannot be used."""
    parser = Parser(prog="experiments.together",
                    description="Which sites together hold the bridge of a run?")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
    args = parser.parse_args(argv)
    return write_each("experiments.together", args.runs, "together.json", look_together)


if __name__ == "__main__":
    sys.exit(main())
