"""A race to the result: ours, and what one would write with PyTorch's own encoder layer instead.

    python -m extras.bench                   at the size of preset tiny, some minutes
    python -m extras.bench --preset small
    python -m extras.bench --time-only       20 seconds: steps a second, and nothing else

"looped" is one nn.TransformerEncoderLayer applied as often as ours, "layers" as many of them with
own weights. Both have learned positions, AdamW, a step size of 1e-3, a DataLoader that draws the
same rows as often as ours, and see the answer alone, at the end. Of the three the one with the
least training time so far goes on: so the machine is the same for all. Grading is not counted.
"""
import argparse
import math
import platform
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

import grok
from data import BadInput

TURN = 10  # steps; it divides the steps between two gradings of every preset
GOALS = {"training >= .99": ("train_inferred", 0.99), "OOD >= .5": ("test_ood", 0.5),
         "OOD >= .95": ("test_ood", 0.95)}


@dataclass
class Racer:
    """What is trained, how, and how it fared."""
    name: str
    trained: nn.Module
    graded: nn.Module    # the weights that are graded
    step: object = None  # a function without arguments
    loading: float = 0   # seconds that it waited for its DataLoader
    turns: list = field(default_factory=list)   # (seconds, of these loading) of TURN steps
    grades: list = field(default_factory=list)  # (training seconds so far, {split: share right})

    def seconds(self):
        return sum(seconds for seconds, _ in self.turns)

    def step_time(self, with_loading=True):
        """Seconds of a step, median over the turns."""
        times = [seconds if with_loading else seconds - loading for seconds, loading in self.turns]
        return statistics.median(times) / TURN


class Plain(nn.Module):
    """PyTorch's own encoder layer: n_own of them, used in turn, n_loops times in all.

    Its feed-forward width makes the matrix products of a loop as large as ours.
    """

    def __init__(self, config, n_tokens, n_own):
        super().__init__()
        D, T = config.d_model, grok.LENGTH[config.layout]
        self.config, self.blank = config, n_tokens - 1
        width = 4 * D if config.mixing == "attention" else (5 * D + 10 * T) // 2
        self.tokens, self.positions = nn.Embedding(n_tokens, D), nn.Embedding(T, D)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(
            D, config.n_heads, width, dropout=0.0, batch_first=True) for _ in range(n_own))
        self.head = nn.Linear(D, n_tokens)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, V) at the position where ours answers."""
        causal, T = self.config.layout == "causal", tokens.shape[1]
        mask = torch.full((T, T), -math.inf, device=tokens.device).triu(1) if causal else None
        state = self.tokens(tokens) + self.positions.weight                     # (B, T, D)
        for loop in range(self.config.n_loops):
            state = self.layers[loop % len(self.layers)](state, src_mask=mask, is_causal=causal)
        answer = (tokens != self.blank).sum(1) - int(causal)
        return self.head(state[torch.arange(len(tokens), device=tokens.device), answer])


def make_loader(trainer):
    """A DataLoader of our training rows, each as likely in a batch as in one of ours."""
    config, n_facts, n_rows = trainer.config, trainer.n_facts, len(trainer.tokens)
    share = round(config.atomic_share * config.batch_size) / config.batch_size
    if config.atomic_share == 0:
        share = n_facts / n_rows
    chance = torch.full((n_rows,), (1 - share) / (n_rows - n_facts))
    chance[:n_facts] = share / n_facts
    random = torch.Generator().manual_seed(config.seed)
    rows = TensorDataset(trainer.tokens.cpu(), trainer.answers.cpu())
    return DataLoader(rows, config.batch_size, generator=random,
                      sampler=WeightedRandomSampler(chance, n_rows, generator=random))


def make_plain(name, trainer, n_own, weight_decay):
    """A racer: the training loop that one would write, as a step."""
    config, device, loader = trainer.config, trainer.tokens.device, make_loader(trainer)
    with torch.random.fork_rng(devices=[]):  # leaves the global random state as it was
        torch.default_generator.manual_seed(config.seed)
        model = Plain(config, trainer.model.blank + 1, n_own).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=weight_decay)
    racer, batches = Racer(name, model, model), endless(loader)

    def step():
        began = time.perf_counter()
        tokens, answers = (column.to(device) for column in next(batches))
        racer.loading += time.perf_counter() - began
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            loss = F.cross_entropy(model(tokens), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    racer.step = step
    return racer


def endless(loader):
    while True:
        yield from loader


def make_racers(described, weight_decay):
    """([ours, looped, layers], the Trainer of ours), from what `describe` returns."""
    trainer = grok.begin(*described)
    return [Racer("ours", trainer.model, trainer.average, trainer.train_step),
            make_plain("looped", trainer, 1, weight_decay),
            make_plain("layers", trainer, trainer.config.n_loops, weight_decay)], trainer


# ---------------------------------------------------------------- the race
def race(racers, trainer, seconds=None, graded=True):
    """Train in turn for so many seconds each; None: as many as ours needs to OOD >= .95, or for
    all of its steps."""
    kind, config = getattr(torch, trainer.tokens.device.type), trainer.config
    while not is_over(racers, config, seconds):
        racer = min(racers, key=Racer.seconds)
        began, loaded = time.perf_counter(), racer.loading
        for _ in range(TURN):
            racer.step()
        kind.synchronize()
        racer.turns.append((time.perf_counter() - began, racer.loading - loaded))
        if graded and TURN * len(racer.turns) % config.eval_every == 0:
            grade(racer, trainer.exams)
    for racer in racers if graded else ():
        grade(racer, trainer.exams)


def is_over(racers, config, seconds):
    """See `race`."""
    ours = racers[0]
    if seconds is None:
        seconds = reached(ours, *GOALS["OOD >= .95"])
    if seconds is None and TURN * len(ours.turns) >= config.steps:
        seconds = ours.seconds()
    return seconds is not None and min(racer.seconds() for racer in racers) >= seconds


@torch.no_grad()
def grade(racer, exams):
    """Note the shares right on the questions that ours is examined on."""
    shares = {}
    for split in ("train_inferred", "test_ood"):
        tokens, answers, _ = exams[split]
        shares[split] = (racer.graded(tokens).argmax(-1) == answers).float().mean().item()
    racer.grades.append((racer.seconds(), shares))


def reached(racer, split, level):
    """Training seconds to the first grading with such a share right; None if there is none."""
    for seconds, shares in racer.grades:
        if shares[split] >= level:
            return seconds
    return None


# ---------------------------------------------------------------- what is said
def racer_lines(racer, ours):
    """Its size and pace, then when it got where."""
    count = sum(weight.numel() for weight in racer.trained.parameters())
    waits = sum(loading for _, loading in racer.turns) / racer.seconds()
    yield (f"{racer.name}: {count} parameters, {1 / racer.step_time():.1f} steps/s, "
           f"{waits:.0%} of the time in its DataLoader")
    for goal, (split, level) in GOALS.items() if racer.grades else ():
        seconds, needed = reached(racer, split, level), reached(ours, split, level)
        if seconds is not None:
            yield f"{racer.name}: {goal} after {seconds:.1f} s"
        elif needed is None or racer is ours:
            yield f"{racer.name}: {goal} not reached in {racer.seconds():.1f} s"
        else:
            _, shares = min(racer.grades, key=lambda grade: abs(grade[0] - needed))
            yield (f"{racer.name}: {goal} not reached in {racer.seconds():.1f} s; it had "
                   f"{shares[split]:.3f} when ours got there")


def ratio_lines(ours, other):
    """How many times as fast as another racer ours is, one line a ratio."""
    faster = other.step_time() / ours.step_time()
    alone = other.step_time(with_loading=False) / ours.step_time()
    yield f"ours / {other.name}: {faster:.2f} times as many steps a second"
    yield f"ours / {other.name}: {alone:.2f} times as many, the DataLoader not counted"
    for goal, (split, level) in GOALS.items() if ours.grades else ():
        needed, theirs = reached(ours, split, level), reached(other, split, level)
        if needed is not None and theirs is not None:
            yield f"ours / {other.name}: {goal} {theirs / needed:.2f} times as soon"
        elif needed is not None:
            least = other.seconds() / needed
            yield f"ours / {other.name}: {goal} more than {least:.2f} times as soon"


def hardware(device):
    """The name of the GPU, or of the processor and how many threads are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    for line in cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else ():
        if line.startswith("model name"):
            name = line.split(":")[1].strip()
    return f"{name}, {device.type}, {torch.get_num_threads()} threads"


def main(argv=None):
    """Run the command line; returns the exit status: 0, or 2 for bad input."""
    parser = grok.Parser(prog="python -m extras.bench", allow_abbrev=False, description=__doc__,
                         formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--preset", default="tiny", help="of grok.py; tiny, small (tiny)")
    parser.add_argument("--regime", help="of grok.py (natural)")
    parser.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--seed", default="0", help="of rows, initialisation and batches (0)")
    parser.add_argument("--seconds", type=float, help="of training for each, more than 0 (until "
                                                      "ours has OOD >= .95);\nof all (--time-only)")
    parser.add_argument("--weight-decay", type=float, default=0.01,
                        help="of looped and layers; ours has its preset's (AdamW's: .01)")
    parser.add_argument("--time-only", action="store_true", help="steps a second, and no result")
    try:
        given = parser.parse_args(sys.argv[1:] if argv is None else argv)
        if given.seconds is not None and not 0 < given.seconds < math.inf:
            raise BadInput(f"seconds = {given.seconds}: must be more than 0")
        if not 0 <= given.weight_decay <= 1000:
            raise BadInput(f"weight_decay = {given.weight_decay}: must lie in [0, 1000]")
        asked = grok.parse(["--preset", given.preset, "--seed", given.seed])
        described = grok.describe({**asked, "regime": given.regime, "device": given.device})
    except BadInput as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    for racer in make_racers(described, given.weight_decay)[0]:
        racer.step()  # so that the first of the race does not pay for what all need
    racers, trainer = make_racers(described, given.weight_decay)
    grok.say(f"{hardware(trainer.tokens.device)}, torch {torch.__version__}, preset "
             f"{given.preset}, {described[0]['regime']}, seed {given.seed}")
    seconds = (given.seconds or 20) / len(racers) if given.time_only else given.seconds
    race(racers, trainer, seconds, graded=not given.time_only)
    ours, *others = racers
    for racer in racers:
        for line in racer_lines(racer, ours):
            grok.say(line)
    for other in others:
        for line in ratio_lines(ours, other):
            grok.say(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
