"""Where is the bridge of a run in which no single site holds it?

    python -m experiments.together RUN...    together.json in each RUN: the two, three and four
                                             sites that together redirect most OOD answers

Two donors have the same bridge and different heads; one gives its value at the first site, the other
at the rest. What such a mixture redirects is no more than the bridge that they share, however many
sites take part. The best two sites are found by trying all pairs, then sites are added one at a
time. The sites are chosen on one half of the right OOD questions and scored on the other.

together.json is a list of {"sites": [[loop, part, position], ...], "names", "n": questions scored,
"mixed_donors": redirected by two such donors, "donor": by the first of them at all of the sites}.
"""
import json
import sys
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # started as a script, `python experiments/together.py`, from any folder
    sys.path.insert(0, str(HERE.parent))

import numpy as np

from analyze import (check_writable, mixed_donors, name_sites, plain, right_only, share_becoming,
                     take_sites, values_of)
from data import BadInput, Queries, World
from grok import PARTS, Parser, TwoHopModel, command, load_run, read_run, say, to_tokens, write_file

MOST = 4          # sites
N_CHOOSING = 100  # questions
N_SCORING = 300
LAST_PASSES = 4   # of a recursive model; the sites of all its 28 loops make too many pairs


@dataclass(frozen=True)
class Trial:
    """Questions, and the values of two donors for each, which share its donors' bridge."""
    model: TwoHopModel
    world: World
    clean: Queries
    first: dict            # {part: (n_loops, N, T, D)}
    second: dict
    predicted: np.ndarray  # (N,): what becomes the answer if the donors' bridge is used

    def redirected(self, sites):
        """Share of answers redirected by the first donor at the first site, the second elsewhere."""
        put = {**take_sites(self.first, sites[:1]), **take_sites(self.second, sites[1:])}
        return share_becoming(self.predicted, self.model, self.world, self.clean, put)

    def redirected_by_one(self, sites):
        """Share redirected by the first donor at all of the sites."""
        put = take_sites(self.first, sites)
        return share_becoming(self.predicted, self.model, self.world, self.clean, put)


def prepare(model, world, queries, n):
    """A Trial of up to n Queries; the others are donors."""
    rng = np.random.default_rng(0)
    clean, first, second, predicted = mixed_donors(world, queries.take(slice(n)), queries, rng)
    values = [values_of(model, to_tokens(donor, world, model.config.layout)[0])
              for donor in (first, second)]
    return Trial(model, world, clean, *values, predicted)


def sites_of(model):
    """Every (loop, part, position); of a recursive model, in its last passes."""
    first = 0
    if model.config.model == "recursive":
        first = max(0, model.n_loops - LAST_PASSES * model.config.n_blocks)
    positions = range(4)  # the tokens: scratch slots do not take part
    return list(product(range(first, model.n_loops), PARTS, positions))


def grow(trial, sites):
    """The sets of two to MOST sites that redirect most, each the last one and a site more."""
    best = max(combinations(sites, 2), key=trial.redirected)
    sets = [best]
    while len(best) < MOST:
        longer = [(*best, site) for site in sites if site not in best]
        best = max(longer, key=trial.redirected)
        sets.append(best)
    return sets


def look_together(folder):
    """What together.json holds of a run."""
    model, world, splits = load_run(folder)
    if model.config.layout != "bidirectional" or model.config.new_facts:
        raise BadInput(f"{folder}: is no run of four positions on an old world")
    pool = splits["test_ood"].shuffled(np.random.default_rng(0))
    right = right_only(model, world, pool)
    choosing = prepare(model, world, right.take(slice(0, None, 2)), N_CHOOSING)
    scoring = prepare(model, world, right.take(slice(1, None, 2)), N_SCORING)
    measured = []
    for sites in grow(choosing, sites_of(model)):
        measured.append({"sites": [list(site) for site in sites],
                         "names": [name_sites([site], model.loop_names) for site in sites],
                         "n": len(scoring.clean.h),
                         "mixed_donors": scoring.redirected(sites),
                         "donor": scoring.redirected_by_one(sites)})
    return plain(measured)


# ---------------------------------------------------------------- the command line
@command("experiments.together")
def main(argv=None):
    """Measure runs; exit status 0, or 2 for what cannot be used."""
    parser = Parser(prog="experiments.together",
                    description="Which sites together hold the bridge of a run?")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
    args = parser.parse_args(argv)
    for folder in args.runs:
        read_run(folder)  # an unfinished one is refused
        check_writable(folder)
        write_file(folder / "together.json", json.dumps(look_together(folder)).encode())
        say(f"{folder.as_posix()}: together.json")


if __name__ == "__main__":
    sys.exit(main())
