"""A race: our training step against what one would write with PyTorch's own layers.

    python -m tools.bench                     preset tiny: the pace, then the race to the result
    python -m tools.bench --preset trm        small and trm take longer
    python -m tools.bench --time-only         the pace alone, half a minute
    python -m tools.bench --threads 1 -o race.txt

Against the teaching model (tiny, small) run "looped", one nn.TransformerEncoderLayer applied as
often as our block, and "layers", as many of them with weights of their own. Both have learned
positions, AdamW with a step size of 1e-3, and a loss on the answer alone, after the last loop.

Against the paper's recursion (trm) runs "plain recursion", the same model and the same loss written
with nn.Linear on states (B, T, D), transposed for the mixing. AdamW has our preset's settings.

A DataLoader gives each of them the rows that ours draws, as often. None averages its weights, as
ours does. If the preset trains in bfloat16, all do.

The pace: a few steps of each in turn, so that a busy moment of the machine hits all alike. In every
round our step is also compared with its matrix products alone, which no way of writing it can save.
On a processor a last line says which operators of PyTorch take the time of our step.
The race: whoever has the least training time so far goes on. Grading is not counted.
"""
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

if not __package__:  # an editor's Run button starts this file and not the module
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import grok
from data import BadInput, regime_name

DESCRIPTION = "Race our training step against what one would write with PyTorch's own layers."
TURN = 5          # steps; it divides the steps between two evaluations of every preset
PACE_SECONDS = 30
LEAST_ROUNDS = 5
GOALS = {"training >= .99": ("train_inferred", 0.99),
         "OOD >= .5": ("test_ood", 0.5),
         "OOD >= .9": ("test_ood", 0.9)}

Turn = namedtuple("Turn", "seconds waited")  # of TURN steps; waited: for the DataLoader
Grade = namedtuple("Grade", "seconds shares")  # training seconds so far, {split: share right}


@dataclass
class Racer:
    """What is trained, and how it fared."""
    name: str
    step: Callable              # one training step; takes and returns nothing
    model: nn.Module = None     # what is trained
    graded: nn.Module = None    # the weights that are graded
    waited: float = 0.0         # seconds that it has waited for its DataLoader so far
    products: list = field(default_factory=list)  # of a step, see ProductRecorder
    turns: list = field(default_factory=list)   # of Turn
    grades: list = field(default_factory=list)  # of Grade

    def seconds(self):
        """Seconds of training so far."""
        return sum(turn.seconds for turn in self.turns)

    def step_seconds(self):
        """Seconds of a step, median over the turns."""
        return statistics.median(turn.seconds for turn in self.turns) / TURN


# ---------------------------------------------------------------- what one would write
class PlainLayers(nn.Module):
    """PyTorch's own encoder layer: n_own of them, used in turn, n_loops times in all."""

    def __init__(self, config, n_tokens, n_own):
        super().__init__()
        D = config.d_model
        T = grok.LENGTH[config.layout]
        self.config = config
        self.blank = n_tokens - 1
        self.embedding = nn.Embedding(n_tokens, D)
        self.positions = nn.Embedding(T, D)
        self.layers = nn.ModuleList(make_layer(config) for _ in range(n_own))
        self.head = nn.Linear(D, n_tokens)

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, V) at the position where ours answers."""
        is_causal = self.config.layout == "causal"
        mask = None
        if is_causal:
            T = tokens.shape[1]
            mask = torch.full((T, T), -math.inf, device=tokens.device).triu(1)
        state = self.embedding(tokens) + self.positions.weight                  # (B, T, D)
        for loop in range(self.config.n_loops):
            layer = self.layers[loop % len(self.layers)]
            state = layer(state, src_mask=mask, is_causal=is_causal)
        n_given = (tokens != self.blank).sum(1)                                 # (B,)
        position = n_given - 1 if is_causal else n_given
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.head(state[rows, position])

    def loss(self, tokens, answers):
        """Cross-entropy of the answer."""
        return F.cross_entropy(self(tokens), answers)


def make_layer(config):
    """An encoder layer whose hidden width makes its matrix products as large as our block's.

    Multiplications at a position: the layer has 4 D D for attention, 2 T D for its scores, and
    2 D width; our block has 12 D D + 2 T D with attention, 9 D D + 12 T D with token mixing."""
    D = config.d_model
    T = grok.LENGTH[config.layout]
    width = 4 * D if config.mixing == "attention" else (5 * D + 10 * T) // 2
    return nn.TransformerEncoderLayer(D, nhead=1, dim_feedforward=width, dropout=0.0,
                                      batch_first=True)


class PlainRecursion(nn.Module):
    """The paper's recursion (Section 3), as one would write it from the text."""

    def __init__(self, config, n_tokens):
        super().__init__()
        D = config.d_model
        self.config = config
        self.blank = n_tokens - 1
        self.embedding = nn.Embedding(n_tokens, D)
        self.scratch = nn.Parameter(torch.randn(config.slots, D))
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.n_blocks))
        self.head = nn.Linear(D, n_tokens, bias=False)
        self.register_buffer("first_low", torch.randn(D))
        self.register_buffer("first_high", torch.randn(D))

    def all_logits(self, tokens):
        """tokens (B, T) -> logits (B, T, V) at every position of the sequence."""
        slots = self.scratch.expand(len(tokens), -1, -1)
        x = torch.cat([self.embedding(tokens), slots], dim=1)                   # (B, T + slots, D)
        z_low = self.first_low.expand(x.shape)
        z_high = self.first_high.expand(x.shape)
        # the gradient runs through the last cycle only
        with torch.no_grad():
            for _ in range(self.config.n_cycles - 1):
                z_low, z_high = self.cycle(z_low, z_high, x)
        z_low, z_high = self.cycle(z_low, z_high, x)
        return self.head(z_high[:, :tokens.shape[1]])

    def cycle(self, z_low, z_high, x):
        """z_L is refined n_low times, then z_H once; all (B, T + slots, D)."""
        for _ in range(self.config.n_low):
            z_low = self.one_pass(z_low + z_high + x)
        z_high = self.one_pass(z_high + z_low)
        return z_low, z_high

    def one_pass(self, z):
        for block in self.blocks:
            z = block(z)
        return z

    def forward(self, tokens):
        """tokens (B, T) -> logits (B, V) at the answer position, which is the first blank."""
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.all_logits(tokens)[rows, (tokens != self.blank).sum(1)]

    def loss(self, tokens, answers):
        """Cross-entropy over the whole sequence, copied but for the answer in its place."""
        targets = tokens.clone()
        rows = torch.arange(len(tokens), device=tokens.device)
        targets[rows, (tokens != self.blank).sum(1)] = answers
        return F.cross_entropy(self.all_logits(tokens).flatten(0, 1), targets.flatten())


class PlainBlock(nn.Module):
    """A gated MLP along the positions, then one along the channels, norm after each."""

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        T = grok.LENGTH[config.layout] + config.slots
        hidden = 8 * D // 3
        self.mix_gate_up = nn.Linear(T, 8 * T, bias=False)
        self.mix_down = nn.Linear(4 * T, T, bias=False)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, z):
        """z (B, T, D) -> (B, T, D)"""
        columns = z.transpose(1, 2)                                             # (B, D, T)
        gate, up = self.mix_gate_up(columns).chunk(2, dim=-1)                   # (B, D, 4T) each
        mixed = self.mix_down(F.silu(gate) * up).transpose(1, 2)                # (B, T, D)
        z = F.rms_norm(z + mixed, z.shape[-1:], eps=1e-6)
        gate, up = self.gate_up(z).chunk(2, dim=-1)                             # (B, T, hidden)
        return F.rms_norm(z + self.down(F.silu(gate) * up), z.shape[-1:], eps=1e-6)


def make_loader(trainer):
    """A DataLoader of our training rows, each as likely in a batch as in one of ours."""
    config = trainer.config
    n_rows = len(trainer.tokens)
    n_facts = trainer.n_facts
    share = round(config.atomic_share * config.batch_size) / config.batch_size
    if config.atomic_share == 0:
        share = n_facts / n_rows
    chance = torch.full((n_rows,), (1 - share) / (n_rows - n_facts))
    chance[:n_facts] = share / n_facts
    generator = torch.Generator().manual_seed(config.seed)
    rows = TensorDataset(trainer.tokens.cpu(), trainer.answers.cpu())
    sampler = WeightedRandomSampler(chance, n_rows, generator=generator)
    return DataLoader(rows, config.batch_size, sampler=sampler, generator=generator)


def endless(loader):
    """The batches of a loader, from its beginning again whenever it ends."""
    while True:
        yield from loader


def make_optimizer(model, config):
    """(AdamW, the schedule of its step size): PyTorch's own, or for the recursion the preset's."""
    if isinstance(model, PlainLayers):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    def factor(step):
        return grok.step_size(config, step) / config.lr

    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, config.beta2),
                                  weight_decay=config.weight_decay)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def make_plain(name, model, trainer):
    """A racer: the training loop that one would write around this model."""
    config = trainer.config
    device = trainer.device
    model = model.to(device)
    optimizer, schedule = make_optimizer(model, config)
    batches = endless(make_loader(trainer))

    def step():
        started = time.perf_counter()
        tokens, answers = next(batches)
        racer.waited += time.perf_counter() - started
        with torch.autocast(device.type, torch.bfloat16, enabled=config.bf16):
            loss = model.loss(tokens.to(device), answers.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    racer = Racer(name, step, model, model)
    return racer


def make_racers(config, files):
    """([ours, then the plain ones], our Trainer), all before their first step."""
    world, splits = grok.make_data(config, files)
    trainer = grok.Trainer(config, world, splits)
    n_tokens = trainer.model.blank + 1
    with torch.random.fork_rng(devices=[]):  # leaves the global random state as it was
        torch.default_generator.manual_seed(config.seed)
        if config.model == "recursive":
            plain = {"plain recursion": PlainRecursion(config, n_tokens)}
        else:
            plain = {"looped": PlainLayers(config, n_tokens, 1),
                     "layers": PlainLayers(config, n_tokens, config.n_loops)}
    racers = [Racer("ours", trainer.train_step, trainer.model, trainer.average)]
    for name, model in plain.items():
        racers.append(make_plain(name, model, trainer))
    return racers, trainer


# ---------------------------------------------------------------- a step's matrix products
PRODUCTS = {torch.ops.aten.mm.default: torch.mm,
            torch.ops.aten.addmm.default: torch.mm,  # (bias, left, right)
            torch.ops.aten.bmm.default: torch.bmm}


class ProductRecorder(TorchDispatchMode):
    """Notes in `products` the matrix products that run under it, those of the backward pass too:
    (torch.mm or torch.bmm, left operand, right operand). The operands are stand-ins of the same
    shape, memory layout and type; products of one kind share them. PyTorch's fused attention is
    not noted (about 1 % of what the plain layers multiply)."""

    def __init__(self):
        super().__init__()
        self.products = []
        self.operands = {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator in PRODUCTS:
            left, right = args[-2:]
            product = (PRODUCTS[operator], self.stand_in(left), self.stand_in(right))
            self.products.append(product)
        return operator(*args, **(kwargs or {}))

    def stand_in(self, tensor):
        """Random numbers that lie in memory as this tensor does."""
        key = (tensor.shape, tensor.stride(), tensor.dtype)
        if key not in self.operands:
            size = 1
            for length, stride in zip(tensor.shape, tensor.stride()):
                size += (length - 1) * stride
            numbers = torch.rand(size, device=tensor.device).to(tensor.dtype)
            self.operands[key] = numbers.as_strided(tensor.shape, tensor.stride())
        return self.operands[key]


def record_products(step):
    """The matrix products of one step, see ProductRecorder; the step is made."""
    with torch.random.fork_rng(devices=[]), ProductRecorder() as recorder:
        step()
    return recorder.products


def gflop(products):
    """Thousand million operations: a multiplication and an addition for each term of each sum."""
    total = 0
    for _, left, right in products:
        total += 2 * left.numel() * right.shape[-1]
    return total / 1e9


def make_replay(ours):
    """A racer that makes the matrix products of our step and nothing else."""
    def step():
        for multiply, left, right in ours.products:
            multiply(left, right)

    return Racer("products", step)


class OperatorTimer(TorchDispatchMode):
    """Adds up the seconds of every operator, forward and backward: {"mm": 0.031, "mul": ...}."""

    def __init__(self):
        super().__init__()
        self.seconds = Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        started = time.perf_counter()
        result = operator(*args, **(kwargs or {}))
        self.seconds[operator.overloadpacket.__name__] += time.perf_counter() - started
        return result


# ---------------------------------------------------------------- the pace
def take_turn(racer, device):
    """TURN steps, timed."""
    started = time.perf_counter()
    waited = racer.waited
    for _ in range(TURN):
        racer.step()
    getattr(torch, device.type).synchronize()
    racer.turns.append(Turn(time.perf_counter() - started, racer.waited - waited))


def take_rounds(racers, device):
    """Rounds in which each racer has one turn, for PACE_SECONDS, and LEAST_ROUNDS at least."""
    started = time.perf_counter()
    while time.perf_counter() - started < PACE_SECONDS or len(racers[0].turns) < LEAST_ROUNDS:
        for racer in racers:
            take_turn(racer, device)


def measure_pace(racers, device):
    """The rounds of these racers and of the products alone, which are returned as a racer, too."""
    for racer in racers:
        racer.step()  # what only a first step pays for
        racer.products = record_products(racer.step)
    replay = make_replay(racers[0])
    replay.step()
    take_rounds([*racers, replay], device)
    return replay


def ratios(racer, ours, loading=True):
    """How many times as long as ours it took, one number a round."""
    of_rounds = []
    for its, our in zip(racer.turns, ours.turns):
        seconds = its.seconds if loading else its.seconds - its.waited
        of_rounds.append(seconds / our.seconds)
    return of_rounds


def pace_lines(racers, replay):
    """What the rounds say, a line each."""
    ours, *others = racers
    for racer in racers:
        yield racer_line(racer)
    yield (f"over_plain: steps of ours in the time of one of theirs, median of {len(ours.turns)} "
           "rounds (least to most)")
    for racer in others:
        yield over_plain_line(racer, ours)
    yield from products_lines(ours, replay)


def racer_line(racer):
    """Its size and its pace."""
    n_parameters = sum(weight.numel() for weight in racer.model.parameters())
    text = (f"{racer.name}: {n_parameters} parameters, {gflop(racer.products):.2f} Gflop of matrix "
            f"products a step, {1 / racer.step_seconds():.1f} steps/s")
    waited = sum(turn.waited for turn in racer.turns) / racer.seconds()
    return f"{text}, {waited:.0%} of the time in its DataLoader" if waited else text


def over_plain_line(racer, ours):
    """How many steps ours makes in the time of one of this plain racer's."""
    of_rounds = ratios(racer, ours)
    middle = statistics.median(of_rounds)
    without = statistics.median(ratios(racer, ours, loading=False))
    return (f"over_plain, {racer.name}: {middle:.2f} ({min(of_rounds):.2f} to {max(of_rounds):.2f})"
            f", {without:.2f} if its DataLoader is not counted")


def products_lines(ours, replay):
    """How far our step is from the bound that its arithmetic sets."""
    share = statistics.median(ratios(replay, ours))
    step_seconds = replay.step_seconds()
    rate = gflop(ours.products) / step_seconds
    yield (f"a step of ours takes {1000 * ours.step_seconds():.1f} ms, {1 / share:.2f} times its "
           f"matrix products alone")
    yield (f"its {len(ours.products)} products alone: {1000 * step_seconds:.1f} ms, {share:.0%} of "
           f"the step, at {rate:.0f} Gflop/s")


def operators_line(step, n_named=8):
    """Which operators take the time of a step, the largest first; TURN steps are made."""
    with torch.random.fork_rng(devices=[]), OperatorTimer() as timer:
        for _ in range(TURN):
            step()
    total = timer.seconds.total()
    named = [f"{name} {seconds / total:.0%}"
             for name, seconds in timer.seconds.most_common(n_named)]
    return f"where the time of its operators goes: {', '.join(named)}"


# ---------------------------------------------------------------- the race to the result
def race(racers, trainer):
    """Train in turn until ours has OOD >= .9 or has made all of its steps, and the others have had
    as long."""
    ours = racers[0]
    limit = math.inf
    while min(racer.seconds() for racer in racers) < limit:
        racer = min(racers, key=Racer.seconds)
        take_turn(racer, trainer.device)
        done = TURN * len(racer.turns)
        if done % trainer.config.eval_every == 0:
            grade(racer, trainer.eval_sets)
        is_over = reached(racer, "OOD >= .9") is not None or done >= trainer.config.steps
        if racer is ours and is_over:
            limit = ours.seconds()
    for racer in racers:
        grade(racer, trainer.eval_sets)


@torch.no_grad()
def grade(racer, eval_sets):
    """Note the shares right on the questions that ours is evaluated on."""
    shares = {}
    for split in ("train_inferred", "test_ood"):
        tokens, answers, _ = eval_sets[split]
        right = racer.graded(tokens).argmax(-1) == answers
        shares[split] = right.float().mean().item()
    racer.grades.append(Grade(racer.seconds(), shares))


def reached(racer, goal):
    """Training seconds to the first grade that meets one of GOALS; None if there is none."""
    split, level = GOALS[goal]
    for seconds, shares in racer.grades:
        if shares[split] >= level:
            return seconds
    return None


def share_at(racer, split, seconds):
    """Its share right on a split at the grade nearest to that many seconds of training."""
    nearest = racer.grades[0]
    for at in racer.grades:
        if abs(at.seconds - seconds) < abs(nearest.seconds - seconds):
            nearest = at
    return nearest.shares[split]


def race_lines(racers):
    """When each got where, and how much sooner ours did, a line each."""
    ours, *others = racers
    for racer in racers:
        for goal in GOALS:
            yield goal_line(racer, ours, goal)
    for racer in others:
        for goal in GOALS:
            if reached(ours, goal) is not None:
                yield sooner_line(racer, ours, goal)


def goal_line(racer, ours, goal):
    """When it reached a goal, or how far it was when ours did."""
    seconds = reached(racer, goal)
    if seconds is not None:
        return f"{racer.name}: {goal} after {seconds:.1f} s"
    text = f"{racer.name}: {goal} not reached in {racer.seconds():.1f} s"
    needed = reached(ours, goal)
    if needed is None:
        return text
    split, _ = GOALS[goal]
    return f"{text}; it had {share_at(racer, split, needed):.3f} when ours got there"


def sooner_line(racer, ours, goal):
    """How many times as long as ours the other needed to a goal that ours reached."""
    needed = reached(ours, goal)
    seconds = reached(racer, goal)
    if seconds is None:
        return f"ours / {racer.name}: {goal} more than {racer.seconds() / needed:.2f} times as soon"
    return f"ours / {racer.name}: {goal} {seconds / needed:.2f} times as soon"


# ---------------------------------------------------------------- the command line
def hardware(device):
    """The name of the GPU, or of the processor, and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
    n_threads = torch.get_num_threads()
    return f"{name}, {device.type}, {n_threads} thread{'s' if n_threads > 1 else ''}"


def bench_lines(config, files, time_only):
    """Run the bench; what comes out, a line each, as soon as it is known."""
    racers, trainer = make_racers(config, files)
    precision = "bfloat16" if config.bf16 else "float32"
    yield (f"{hardware(trainer.device)}, torch {torch.__version__}, preset {config.preset}, "
           f"{regime_name(config)}, {precision}")
    replay = measure_pace(racers, trainer.device)
    yield from pace_lines(racers, replay)
    if trainer.device.type == "cpu":  # a GPU works on while the host goes ahead
        yield operators_line(racers[0].step)
    if time_only:
        return
    minutes = config.steps * racers[0].step_seconds() * len(racers) / 60
    yield f"the race ends when ours has OOD >= .9, or after about {minutes:.0f} minutes"
    racers, trainer = make_racers(config, files)
    race(racers, trainer)
    yield from race_lines(racers)


def parse(argv):
    """(options, Config, {file name: bytes}) of the command line."""
    presets = [name for name in grok.PRESETS if name != "tune"]
    parser = grok.Parser(prog="python -m tools.bench", description=DESCRIPTION)
    parser.add_argument("--preset", default="tiny", help=f"[{', '.join(presets)}] (tiny)")
    parser.add_argument("--regime", help="of grok.py (natural)")
    parser.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--threads", type=int, help="of the processor (PyTorch's choice, or what "
                        "OMP_NUM_THREADS says)")
    parser.add_argument("--time-only", action="store_true", help="the pace, and no race")
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="to write the lines to, too")
    options = parser.parse_args(argv)
    if options.preset not in presets:
        raise BadInput(f"preset = {options.preset}: must be one of {', '.join(presets)}")
    n_cores = os.cpu_count() or 1
    if options.threads is not None and not 1 <= options.threads <= n_cores:
        raise BadInput(f"threads = {options.threads}: must lie in [1, {n_cores}] on this machine")
    given = grok.parse(["--preset", options.preset])
    given.update(regime=options.regime, device=options.device)
    config, files = grok.settle(given)
    return options, config, files


def check_out(path):
    """Refuse, before minutes of work, a file that could not be written."""
    if path.is_dir():
        raise BadInput(f"out = {path}: is a folder; must be a file")
    with tempfile.TemporaryFile(dir=path.parent):
        pass


@grok.command("bench")
def main(argv=None):
    """Run the command line; returns the exit status: 0, 2 for bad input, 130 when stopped."""
    options, config, files = parse(argv)
    if options.out:
        check_out(options.out)
    if options.threads:
        torch.set_num_threads(options.threads)
    lines = []
    for line in bench_lines(config, files, options.time_only):
        grok.say(line)
        lines.append(line + "\n")
    if options.out:
        grok.write_file(options.out, "".join(lines).encode())


if __name__ == "__main__":
    sys.exit(main())
