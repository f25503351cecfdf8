"""Does it grok sooner if slow gradients are amplified? (Lee et al., Grokfast, arXiv 2405.20233.)

    python -m experiments.grokfast RUN...    grokfast.json in each RUN: trains it anew, and adds to
                                             every gradient a multiple of its running mean

grokfast.json holds {"fit", "nine_in_ten": the step of the first evaluation with .99 of the training
questions, and with .9 of the OOD questions, right, null if there is none, "answer": OOD answers at
the end}.
"""
import sys
from pathlib import Path

from experiments.measure import evaluations, trainer_of, write_each
from grok import Parser, command, first_step

# Grokfast-EMA as its authors recommend it: how much of the running mean is kept in a step (alpha),
# and how many times it is added (lambda)
KEPT = 0.98
ADDED = 2.0


def train_anew(folder):
    """Train the run of this folder anew with its slow gradients amplified; what became of it."""
    trainer, _, _ = trainer_of(folder)
    means = []

    def amplify(optimizer, args, kwargs):
        """Called by PyTorch between the gradient and the step."""
        if not means:  # they start at the first gradient, as in the authors' code, not at 0
            means.extend(weight.grad.clone() for weight in trainer.weights)
        for mean, weight in zip(means, trainer.weights):
            mean.lerp_(weight.grad, 1 - KEPT)
            weight.grad.add_(mean, alpha=ADDED)

    trainer.optimizer.register_step_pre_hook(amplify)
    history = list(evaluations(trainer))
    return {"fit": first_step(history, 0.99, "train_inferred"),
            "nine_in_ten": first_step(history, 0.9, "test_ood"),
            "answer": history[-1]["accuracy"]["test_ood"]}


# ---------------------------------------------------------------- the command line
@command("experiments.grokfast")
def main(argv=None):
    """Train and measure; exit status 0, or 2 for what cannot be used."""
    parser = Parser(prog="experiments.grokfast", description="Grokfast: amplify slow gradients.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished runs")
    args = parser.parse_args(argv)
    return write_each("experiments.grokfast", args.runs, "grokfast.json", train_anew)


if __name__ == "__main__":
    sys.exit(main())
