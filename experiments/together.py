"""Where is the bridge of a run in which no single site holds it?

    python -m experiments.together RUN...    together.json in each RUN: the sites that together
                                             redirect most OOD answers, one to six of them

A set of sites that holds h and r1 of a donor would redirect without holding any bridge. So two
donors take part, who have the same bridge and differ in h and in r1. One gives its values at h, the
other at r1, and at r2 and the answer they take turns: what such a mixture redirects is no more than
the bridge that they share. Either may begin; the smaller share of the two counts. Sites are added
one at a time, always the one that redirects most. They are chosen on one half of the right OOD
questions and scored on the other.

together.json is a list of {"sites": [[loop, part, position], ...], "names", "n": questions scored,
"redirected": by the two donors, "outright": how often the model gives the predicted answer to the
new question itself (a donor's head and first relation, the question's own second relation)}. No
swap can be expected to redirect more than that.
"""
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from analyze import (POSITIONS, mixed_donors, name_sites, right_only, share_becoming, take_sites,
                     values_of)
from data import BadInput
from experiments.measure import write_each
from grok import PARTS, Parser, command, load_run, to_tokens

MOST = 6          # sites
N_CHOOSING = 100  # questions
N_SCORING = 300
# positions
H = 0
R1 = 1


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


def redirected(model, world, trial, sites):
    """Share of the answers of a trial, see `prepare`, that become the predicted ones if the two
    donors give their values at the sites; the smaller of the two shares, by who begins."""
    clean, first, second, predicted = trial
    shares = []
    for of_first, of_second in (divide(sites), divide(sites, first_begins=False)):
        put = {**take_sites(first, of_first), **take_sites(second, of_second)}
        shares.append(share_becoming(predicted, model, world, clean, put))
    return min(shares)


def divide(sites, first_begins=True):
    """(sites of the first donor, sites of the second): at h the first, at r1 the second, elsewhere
    in turns."""
    of_first = []
    of_second = []
    is_first = first_begins
    for site in sites:
        position = site[2]
        if position in (H, R1):
            owner = of_first if position == H else of_second
        else:
            owner = of_first if is_first else of_second
            is_first = not is_first
        owner.append(site)
    return of_first, of_second


def sites_of(model):
    """Every (loop, part, position) of the tokens: scratch slots do not take part."""
    return list(product(range(model.n_loops), PARTS, range(len(POSITIONS))))


def grow(redirects, sites):
    """The sets of one to MOST sites, each the last one and the site more with which it redirects
    most, by redirects(sites of a set)."""
    best = ()
    sets = []
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
    for sites in grow(partial(redirected, model, world, choosing), sites_of(model)):
        measured.append({"sites": [list(site) for site in sites],
                         "names": [name_sites([site], model.loop_names) for site in sites],
                         "n": n, "redirected": redirected(model, world, scoring, sites),
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
