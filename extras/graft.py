"""Which part of the weights decides? Two models, one part exchanged.

    python -m extras.graft ONE OTHER -o ROOT           which form comes?
    python -m extras.graft RUN FIRST -o ROOT --tune    what do new facts serve?

ONE and OTHER are run folders that differ in their seed and hold their first weights, as those of
draws/init in extras/plan.txt, which take one step of size 0. For each of PARTS, ONE with that
part of OTHER's weights is trained for 2,000 steps, and OTHER with ONE's: ROOT/graft/PART_of_2_in_0
and so on; their first weights go to ROOT/start.

With --tune, RUN is a trained run and FIRST holds the first weights of its seed. RUN with each part
of FRESH drawn afresh, as it was in FIRST, is trained on new facts for 6,000 steps, all old facts
kept: ROOT/fresh/PART/seed0 and so on; the last with its weights from before grokking.
"""
import argparse
import shutil
import sys
from pathlib import Path

import torch

import grok
from data import BadInput

PARTS = {"embedding": ("embedding",), "head": ("head",), "mixing": ("blocks.0.mix.",),
         "mixing_positions": ("blocks.0.mix.gate_up.", "blocks.0.mix.down."),  # 192 numbers
         "mixing_out": ("blocks.0.mix.out.",), "mlp": ("blocks.0.gate_up.", "blocks.0.down.")}

FRESH = {"embedding": ("embedding", "grokked"), "mixing": ("mixing", "grokked"),
         "mlp": ("mlp", "grokked"), "mlp_before": ("mlp", "before")}  # the part; RUN's weights else


def graft(run, donor, part, folder, rest="grokked"):
    """Write a copy of a run whose weights with names that begin so are the donor's. BadInput, and
    nothing is written, if the folder holds anything else."""
    own = grok.read_checkpoint(run / grok.WEIGHTS[rest], dict)
    other = grok.read_checkpoint(donor / "after.pt", dict)
    taken = {name: weight for name, weight in other["weights"].items() if name.startswith(part)}
    weights, there = {**own["weights"], **taken}, folder / "after.pt"
    if there.exists():
        found = grok.read_checkpoint(there, lambda saved: saved["weights"])
        if found.keys() != weights.keys() or not all(map(torch.equal, found.values(),
                                                         weights.values())):
            raise BadInput(f"{folder}: holds other first weights; choose another -o")
    elif folder.exists() and grok.read_config(folder) != grok.read_config(run):
        raise BadInput(f"{folder}: holds another run; choose another -o")
    else:
        shutil.copytree(run, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.pt"))
        grok.write_checkpoint(there, {**own, "weights": weights})


def train(run, donor, name, root):
    """Exit status of the training that starts from the run with this part of the donor's."""
    seed, other = (grok.read_config(folder)["model"]["seed"] for folder in (run, donor))
    label = f"{name}_of_{other}_in_{seed}/seed{seed}"
    graft(run, donor, PARTS[name], root / "start" / label)
    return grok.main(["--preset", "small", "--start", str(root / "start" / label), "--lr", "0.004",
                      "--steps", "2000", "--seed", str(seed), "--out", str(root / "graft" / label)])


def tune(run, first, name, root):
    """Exit status of the training on new facts that starts from the run with this part afresh."""
    seed, (part, rest) = grok.read_config(run)["model"]["seed"], FRESH[name]
    label = f"{name}/seed{seed}"
    graft(run, first, PARTS[part], root / "start" / label, rest)
    return grok.main(["--preset", "tune", "--start", str(root / "start" / label), "--kept", "1",
                      "--steps", "6000", "--eval-every", "200", "--seed", str(seed), "--out",
                      str(root / "fresh" / label)])


def main(argv=None):
    """Train them all; exit status 0, or that of the first that failed."""
    parser = argparse.ArgumentParser(prog="extras.graft", description=__doc__.splitlines()[0])
    parser.add_argument("one", type=Path, help="a run's folder")
    parser.add_argument("other", type=Path, help="another's")
    parser.add_argument("-o", "--out", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--tune", action="store_true", help="train on new facts")
    given = parser.parse_args(argv)
    one, other, root = given.one, given.other, given.out
    if given.tune:
        wanted = [(tune, one, other, name) for name in FRESH]
    else:
        wanted = [(train, *pair, name) for name in PARTS for pair in ((one, other), (other, one))]
    for trained, run, donor, name in wanted:
        try:
            status = trained(run, donor, name, root)
        except (BadInput, OSError) as error:
            status = 2
            print(f"extras.graft: {error}", file=sys.stderr)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
