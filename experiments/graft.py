"""Which of the first weights decide the form of the bridge?

    python -m experiments.graft RUN SEED...    graft.json in RUN: trains RUN anew, once for each
                                               SEED, from its own first weights but for those that
                                               mix the positions, which are that seed's

graft.json holds, for each seed, {"seed", "first", "last": how often the bridge of ID questions is
the first, and the last, of the entities in the best state at the end, "answer": OOD answers then}.
"""
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from analyze import seen
from data import BadInput
from experiments.measure import evaluations, trainer_of, write_each
from grok import Parser, build_model, command


def graft(folder, seed):
    """What becomes of a run whose position mixing starts from the first weights of another seed."""
    trainer, world, splits = trainer_of(folder)
    config = trainer.config
    if config.mixing != "tokens" or config.model != "looped":
        raise BadInput(f"{folder}: is no run of the preset small")
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
    """Copy the weights along the positions, 12 T * T of them in a block: 192 where T = 4."""
    for block, donor_block in zip(model.blocks, donor.blocks):
        for name in ("gate_up", "down"):
            getattr(block.mix, name).weight.copy_(getattr(donor_block.mix, name).weight)


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

    def graft_each(folder):
        return [graft(folder, seed) for seed in args.seeds]

    return write_each("experiments.graft", [args.run], "graft.json", graft_each)


if __name__ == "__main__":
    sys.exit(main())
