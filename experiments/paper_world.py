"""How many questions with new facts could be answered from r2 alone in the paper's own world?

    python -m experiments.paper_world [-o FOLDER]    paper_world.json in FOLDER (runs/shipped)

It holds a list of five draws of the world, each {"code", "text"}: the share of new + old that is
right if one answers with whatever r2 had most often in training. The paper's code keeps 220 old
facts and all compositions with one of them, its text 8,000 facts (Finding 3).
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from analyze import check_writable
from data import change_facts, compositions, make_world, queries
from experiments.measure import r2_alone
from grok import PRESETS, Config, Parser, command, say, write_file

SHIPPED = Path(__file__).resolve().parent.parent / "runs" / "shipped"
N_DRAWS = 5


def draw(data_seed):
    """{"code", "text"} of one draw of the paper's world, with 2,000 new facts."""
    config = Config(**{**PRESETS["paper"][2], "new_facts": 2000})
    rng = np.random.default_rng(data_seed)
    world = change_facts(make_world(replace(config, data_seed=data_seed)), config, rng)
    return {"code": r2_alone_of_kept(world, config.phi, 220, n_hops=1, rng=rng),
            "text": r2_alone_of_kept(world, config.phi, 8000, n_hops=2, rng=rng)}


def r2_alone_of_kept(world, phi, n_kept, n_hops, rng):
    """The share of new + old that r2 alone gives, in a World with new facts of which n_kept of the
    old ones remain; and of phi training compositions an old fact those remain in which n_hops or
    more of the hops do."""
    old_facts = np.flatnonzero(~world.is_new)
    is_kept = np.zeros(len(world.facts), bool)
    is_kept[rng.permutation(old_facts)[:n_kept]] = True
    first, second = compositions(world)
    old = np.flatnonzero(~world.is_new[first] & ~world.is_new[second])
    trained = rng.permutation(old)[:round(phi * len(old_facts))]
    kept_hops = is_kept[first[trained]].astype(int) + is_kept[second[trained]]
    remain = trained[kept_hops >= n_hops]
    new_old = np.flatnonzero(world.is_new[first] & is_kept[second])
    splits = {"train_inferred": queries(world, first[remain], second[remain]),
              "new_old": queries(world, first[new_old], second[new_old])}
    return r2_alone(world, splits)["new_old"]


# ---------------------------------------------------------------- the command line
@command("experiments.paper_world")
def main(argv=None):
    """Draw, count and write; exit status 0, or 2 for what cannot be used."""
    parser = Parser(prog="experiments.paper_world",
                    description="What r2 alone gives in the paper's world.")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER",
                        default=SHIPPED, help="(runs/shipped)")
    folder = parser.parse_args(argv).out
    check_writable(folder)
    draws = [draw(data_seed) for data_seed in range(N_DRAWS)]
    out = folder / "paper_world.json"
    write_file(out, json.dumps(draws).encode())
    say(out.as_posix())


if __name__ == "__main__":
    sys.exit(main())
