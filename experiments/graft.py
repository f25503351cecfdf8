"""Which of the first weights decide the form of the bridge?

    python -m experiments.graft RUN SEED...    graft.json in RUN: trains RUN anew, once for each
                                               SEED, from its own first weights but for those that
                                               mix the positions, which are that seed's

graft.json holds, for each seed, {"seed", "first", "last": how often the bridge of ID questions is
the first, and the last, of the entities in the best state at the end, "answer": OOD answers then}.
"""
import json
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # started as a script, `python experiments/graft.py`, from any folder
    sys.path.insert(0, str(HERE.parent))

import numpy as np
import torch

from analyze import check_writable, plain, seen
from data import BadInput
from experiments.measure import evaluations
from grok import Parser, Trainer, build_model, command, make_data, read_run, say, write_file


def graft(config, seed):
    """What becomes of a run whose position mixing starts from the first weights of another seed."""
    world, splits = make_data(config, {})
    trainer = Trainer(config, world, splits)
    donor = build_model(replace(config, seed=seed), world.n_entities, world.n_relations)
    copy_mixing(trainer.model, donor)
    copy_mixing(trainer.average, donor)
    for line in evaluations(trainer):
        answer = line["accuracy"]["test_ood"]
    order = np.random.default_rng(0).permutation(len(splits["test_id"].h))
    states = seen(trainer.average, world, splits["test_id"].take(order[:500]))["state"]
    return {"seed": seed, "first": states["entity"]["best"], "last": states["last_entity"]["best"],
            "answer": answer}


@torch.no_grad()
def copy_mixing(model, donor):
    """Copy the weights along the positions, 12 T * T of them: 192 where T = 4."""
    for name in ("gate_up", "down"):
        theirs = getattr(donor.blocks[0].mix, name).weight
        getattr(model.blocks[0].mix, name).weight.copy_(theirs)


# ---------------------------------------------------------------- the command line
@command("experiments.graft")
def main(argv=None):
    """Train and measure; exit status 0, or 2 for what cannot be used."""
    parser = Parser(prog="experiments.graft",
                    description="Which of the first weights decide the form of the bridge?")
    parser.add_argument("run", type=Path, metavar="RUN", help="a finished run of small")
    parser.add_argument("seeds", nargs="+", type=int, metavar="SEED",
                        help="whose first weights mix its positions")
    args = parser.parse_args(argv)
    config, _ = read_run(args.run)
    if config.mixing != "tokens" or config.model != "looped" or config.new_facts:
        raise BadInput(f"{args.run}: is no run of the preset small")
    check_writable(args.run)
    grafts = [graft(config, seed) for seed in args.seeds]
    write_file(args.run / "graft.json", json.dumps(plain(grafts)).encode())
    say(f"{args.run.as_posix()}: graft.json")


if __name__ == "__main__":
    sys.exit(main())
