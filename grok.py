"""A tiny parameter-sharing transformer that groks two-hop composition, and the loop that trains it.

`python grok.py --help` lists every setting and its default. Paper: He et al., "Is Grokking
Worthwhile?", arXiv 2601.09049. Words used throughout:

    B  queries in a batch            h, r1, r2  head entity and the two relations of a query
    T  token positions (3 or 4)      b, t       bridge entity; tail entity, the answer
    D  width of the model            state      what a loop hands to the next, (B, T, D)
    V  tokens of the vocabulary      site       (loop, position): where a state can be read
"""
import copy
import hashlib
import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import (add_facts, BadInput, make_splits, make_world, Parser, read_facts, read_json,
                  read_text, REGIMES, setting, settings, WorldConfig)

LENGTH = {"causal": 3, "bidirectional": 4}  # h r1 r2; bidirectional: and a blank for the answer
INGREDIENTS = ("restart", "bare_mlp", "unit_vectors", "fixed_scale")  # what Config.without drops


@dataclass(frozen=True)
class Config:
    """The model and its training. Wang et al. train the ordinary transformer, `shared` False."""
    layout: str = setting("causal", None, None, "what attention sees; bidirectional: the paper's",
                          tuple(LENGTH))
    shared: bool = setting(True, None, None, "one block for all loops; false: one block a loop")
    without: str = setting("nothing", None, None, f"leave out {' or '.join(INGREDIENTS)}",
                           ("nothing", *INGREDIENTS))
    d_model: int = setting(64, 4, 2**14, "width D")
    n_heads: int = setting(1, 1, 2**7, "attention heads")
    n_loops: int = setting(4, 1, 2**7, "passes through the block")
    logit_scale: float = setting(0.8, 1e-6, 1e6, "logits = scale * sqrt(D) * cosine, not learned")
    lr: float = setting(4e-3, 0.0, 10.0, "AdamW step size, constant after the warm-up")
    weight_decay: float = setting(0.3, 0.0, 1e3, "AdamW weight decay, on every parameter")
    batch_size: int = setting(256, 1, 2**20, "queries a step")
    steps: int = setting(7000, 1, 10**9, "training steps")
    warmup: int = setting(200, 0, 10**9, "steps of linear warm-up")
    ema: float = setting(0.995, 0.0, 1.0, "decay of the averaged weights that are evaluated")
    atomic_share: float = setting(0.4, 0.0, 1.0, "share of a batch that is atomic facts")
    min_loops: int = setting(2, 1, 2**7, "the answer is trained after this loop and every later")
    bf16: bool = setting(False, None, None, "train with matrix products in bfloat16")
    eval_every: int = setting(100, 1, 10**9, "steps between evaluations")
    seed: int = setting(0, 0, 2**63 - 1, "seed of initialisation and batches")


PRESETS = {  # name: (what it is for, world settings, model settings)
    "tiny": ("minutes on two CPU cores", {}, {}),
    "bidirectional": ("the paper's layout, which takes longer", {},
                      dict(layout="bidirectional", d_model=96, n_heads=2, logit_scale=0.6,
                           atomic_share=0.5, steps=9000)),
    "tune": ("new facts for a model of preset tiny, named by --start",
             dict(new_facts=140, kept=0.21), dict(lr=2e-3, steps=500, eval_every=50)),
    "smoke": ("seconds, for the tests",
              dict(n_entities=12, n_relations=8, out_degree=6, ood_fraction=0.2, phi=4.0),
              dict(d_model=32, n_loops=3, batch_size=64, steps=200, warmup=20, eval_every=50)),
    "growth": ("a larger world; see the README for still larger ones", dict(n_entities=100),
               dict(d_model=192, n_heads=2, logit_scale=0.45, lr=2.7e-3, weight_decay=0.36,
                    atomic_share=0.6, bf16=True, steps=4000, eval_every=200)),
    "paper": ("the paper's world, for one GPU",
              dict(n_entities=2000, n_relations=200, out_degree=20, ood_fraction=0.05, phi=18.0),
              dict(d_model=2048, n_heads=16, logit_scale=0.2, atomic_share=0.6, bf16=True,
                   batch_size=1024, lr=5e-4, steps=40000, warmup=1000, eval_every=500)),
}


# ---------------------------------------------------------------- the model

def rms_norm(x):
    """x scaled to root mean square 1 along its last axis; no gain is learned."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def rotate(x, positions):
    """RoPE: turn pairs of channels of x (..., T, d) by angles proportional to the position."""
    half = x.shape[-1] // 2
    speed = 100.0 ** (-torch.arange(half, device=x.device) / half)
    angle = positions[:, None] * speed                                          # (T, d/2)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def attend(q, k, v, causal):
    """Softmax attention over (B, heads, T, d), written out to be read."""
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])                    # (B, heads, T, T)
    if causal:
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        score = score.masked_fill(future, -torch.inf)
    return score.softmax(-1) @ v


class Block(nn.Module):
    """Attention over the state, then a gated MLP on (input + what was attended).

    Two departures from the usual block, each with a row in the README: the residual restarts from
    the *input* embedding, so every loop looks at the question afresh, and the MLP is bare, without
    a residual around it, so the old state is passed on through attention only.
    """

    def __init__(self, config):
        super().__init__()
        D, hidden = config.d_model, 8 * config.d_model // 3
        self.n_heads, self.causal = config.n_heads, config.layout == "causal"
        self.without = config.without
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, state, x):
        """state (B, T, D) after the previous loop, x (B, T, D) the input -> state (B, T, D)."""
        B, T, D = state.shape
        heads = self.qkv(state).view(B, T, 3, self.n_heads, D // self.n_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)                                  # (B, heads, T, d)
        positions = torch.arange(T, device=x.device)
        mixed = attend(rotate(q, positions), rotate(k, positions), v, self.causal)
        mixed = mixed.transpose(1, 2).reshape(B, T, D)                          # heads side by side
        found = rms_norm((state if self.without == "restart" else x) + self.out(mixed))
        gate, up = self.gate_up(found).chunk(2, dim=-1)
        new = self.down(F.silu(gate) * up)
        return rms_norm(found + new if self.without == "bare_mlp" else new)


class LoopedTransformer(nn.Module):
    """One block applied n_loops times: the parameter sharing of the paper's model (TRM)."""

    def __init__(self, config, n_entities, n_relations):
        super().__init__()
        self.config, self.blank = config, n_entities + n_relations
        self.embedding = nn.Parameter(torch.empty(self.blank + 1, config.d_model))
        n_blocks = 1 if config.shared else config.n_loops
        self.blocks = nn.ModuleList(Block(config) for _ in range(n_blocks))
        for name, weight in self.named_parameters():
            fan_in = 1 if name == "embedding" else weight.shape[1]
            nn.init.normal_(weight, std=fan_in ** -0.5)
        self.scale = config.logit_scale
        if config.without == "fixed_scale":
            self.scale = nn.Parameter(torch.tensor(config.logit_scale))

    def vectors(self):
        """The vectors (V, D) of all tokens, the same for reading and for answering."""
        normal = self.config.without != "unit_vectors"
        return rms_norm(self.embedding) if normal else self.embedding

    def forward(self, tokens, n_loops=None, edit=None):
        """tokens (B, T) -> logits (B, V) at each query's answer position.

        `edit(loop, state) -> state` is called after every loop with the state (B, T, D): the one
        hook behind the logit lens and all activation patching.
        """
        x = state = self.vectors()[tokens]                                      # (B, T, D)
        for loop in range(n_loops or self.config.n_loops):
            # the sharing: every pass goes through the same block
            block = self.blocks[0 if self.config.shared else loop]
            state = block(state, x)
            if edit is not None:
                state = edit(loop, state)
        return self.unembed(self.read(state, tokens))

    def read(self, state, tokens):
        """The state at the answer position, (B, D): the first blank, or, causal, the last token."""
        place = (tokens != self.blank).sum(1) - int(self.config.layout == "causal")
        return state[torch.arange(len(tokens), device=tokens.device), place]

    def unembed(self, state):
        """Logits (..., V) of any state (..., D): scaled cosines with the token embeddings."""
        return self.scale / math.sqrt(self.config.d_model) * (state @ self.vectors().T)


def to_tokens(queries, world, layout):
    """Queries -> tokens (N, T), answers (N,): entity e is e, relation r is E + r, blank E + R."""
    E, blank = world.n_entities, world.n_entities + world.n_relations
    tokens = np.full((len(queries.h), LENGTH[layout]), blank)
    tokens[:, 0], tokens[:, 1] = queries.h, E + queries.r1
    tokens[:, 2] = np.where(queries.r2 >= 0, E + queries.r2, blank)
    return torch.from_numpy(tokens), torch.from_numpy(np.asarray(queries.t))


# ---------------------------------------------------------------- what is measured while training

def run_states(model, tokens):
    """All states of one run of the model, (n_loops, B, T, D)."""
    kept = []
    model(tokens, edit=lambda loop, state: kept.append(state) or state)
    return torch.stack(kept)


def bridge_rates(model, tokens, bridges):
    """Shares of queries whose b is the top-1 token of the logit lens: at `any` site (the paper's
    measure), at the `best` fixed site, and `_chance`: the same for the bridges of other queries.
    """
    top = model.unembed(run_states(model, tokens)).argmax(-1)                   # (loops, B, T)
    rates = {}
    for name, b in (("", bridges), ("_chance", bridges.roll(1))):
        hit = top == b[None, :, None]
        rates["any" + name] = hit.any(2).any(0).float().mean().item()
        rates["best" + name] = hit.float().mean(1).max().item()
    return rates


@torch.no_grad()
def evaluate(model, exams):
    """{"accuracy": {split: share right}, "lens": {split: bridge_rates}} over `make_exams`."""
    accuracy, lens = {}, {}
    for split, (tokens, answers, bridges) in exams.items():
        if len(tokens):
            accuracy[split] = (model(tokens).argmax(-1) == answers).float().mean().item()
            if split.startswith("test"):
                lens[split] = bridge_rates(model, tokens, bridges)
    return {"accuracy": accuracy, "lens": lens}


def make_exams(splits, world, layout, device, most=500):
    """Up to `most` random queries of each split: {split: (tokens, answers, bridges)}."""
    rng = np.random.default_rng(0)
    exams = {}
    for name in splits:
        chosen = splits[name].take(rng.permutation(len(splits[name].h))[:most])
        exam = *to_tokens(chosen, world, layout), torch.from_numpy(chosen.b)
        exams[name] = tuple(column.to(device) for column in exam)
    return exams


# ---------------------------------------------------------------- training

def training_rows(splits, world, layout, device):
    """All training rows, atomic facts first: tokens (N, T), answers (N,), number of facts."""
    names = "id_atomic", "ood_atomic", "train_inferred"
    parts = [to_tokens(splits[name], world, layout) for name in names]
    tokens, answers = (torch.cat(column).to(device) for column in zip(*parts))
    return tokens, answers, len(parts[0][0]) + len(parts[1][0])


def draw(config, n_facts, n_rows, generator):
    """Row numbers of one batch, with replacement; atomic_share 0: all rows alike (the paper)."""
    pick = lambda low, high, n: torch.randint(low, high, (n,), generator=generator,
                                              device=generator.device)
    if config.atomic_share == 0:
        return pick(0, n_rows, config.batch_size)
    atomic = round(config.atomic_share * config.batch_size)
    return torch.cat([pick(0, n_facts, atomic), pick(n_facts, n_rows, config.batch_size - atomic)])


def loss_of(model, tokens, answers):
    """Cross-entropy of the answer, mean over the loops from min_loops on (deep supervision)."""
    losses = []

    def grade(loop, state):
        if loop + 1 >= min(model.config.min_loops, model.config.n_loops):
            logits = model.unembed(model.read(state, tokens))
            losses.append(F.cross_entropy(logits, answers))
        return state

    model(tokens, edit=grade)
    return torch.stack(losses).mean()


def capture(work, generator):
    """`work` recorded as a CUDA graph: one launch replays its hundreds of kernels."""
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        work()
    return graph.replay


class Trainer:
    """All that changes in a run: weights, their average, optimiser, draws, what was measured."""

    def __init__(self, config, world, splits, device):
        torch.manual_seed(config.seed)
        self.config, self.step, self.history = config, 0, []
        self.replay, self.alike = None, 0  # the captured step, and how many were alike so far
        sizes = world.n_entities, world.n_relations
        self.model = LoopedTransformer(config, *sizes).to(device)
        self.average = LoopedTransformer(config, *sizes).to(device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.98),
            weight_decay=config.weight_decay, fused=device.type != "mps")
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self.tokens, self.answers, self.n_facts = training_rows(splits, world, config.layout,
                                                                device)
        self.exams = make_exams(splits, world, config.layout, device)
        self.losses = torch.zeros(config.eval_every, device=device)
        rows = torch.cat([self.tokens, self.answers[:, None]], 1).cpu().numpy().tobytes()
        self.made_of = hashlib.sha256(repr(config).encode() + rows).hexdigest()
        self.began = time.perf_counter()

    def train_step(self):
        """One batch. Leaves the loss on the device; the host does not wait for it."""
        config = self.config
        lr = config.lr * min(1.0, (self.step + 1) / max(1, config.warmup))
        self.decay = min(config.ema, (self.step + 1) / (self.step + 11))
        self.alike += lr == config.lr and self.decay == config.ema
        recording = self.alike == 4 and self.tokens.is_cuda  # three as usual make the moments
        for group in self.optimizer.param_groups:
            group.update(lr=lr, capturable=recording)
        if recording:
            self.replay = capture(self.learn, self.generator)
        (self.replay or self.learn)()
        self.losses[self.step % config.eval_every] = self.loss
        self.step += 1

    def learn(self):
        """Draw, forward, backward, AdamW, moving average. Nothing here waits for the device, or
        changes between steps once lr and decay are at their limits: a CUDA graph can replay it."""
        config = self.config
        rows = draw(config, self.n_facts, len(self.tokens), self.generator)
        with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=config.bf16):
            loss = loss_of(self.model, self.tokens[rows], self.answers[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.loss = loss.detach()
        with torch.no_grad():
            for mean, weight in zip(self.average.parameters(), self.model.parameters()):
                mean.lerp_(weight, 1 - self.decay)

    def recent_losses(self):
        """Losses since the last evaluation, (n,). Raises BadInput if one is not finite."""
        count = (self.step - 1) % self.config.eval_every + 1
        bad = (~torch.isfinite(self.losses[:count])).nonzero()
        if len(bad):
            raise BadInput(f"loss is not finite at step {self.step - count + 1 + bad[0].item()}: "
                           f"lower lr = {self.config.lr:g}; the last good checkpoint is kept")
        return self.losses[:count]

    def measure(self):
        """Append one line to the history and return it."""
        self.history.append({"step": self.step, "loss": self.recent_losses().mean().item(),
                             "seconds": round(time.perf_counter() - self.began, 1),
                             **evaluate(self.average, self.exams)})
        return self.history[-1]

    def state_dict(self):
        return {"made_of": self.made_of, "step": self.step, "history": self.history,
                "losses": self.losses, "model": self.model.state_dict(),
                "average": self.average.state_dict(), "optimizer": self.optimizer.state_dict(),
                "draws": self.generator.get_state()}

    def load_state_dict(self, saved):
        if saved["made_of"] != self.made_of:
            raise ValueError("other settings or other data")
        self.step, self.history = saved["step"], saved["history"]
        self.replay, self.alike = None, 0
        self.began -= self.history[-1]["seconds"] if self.history else 0.0
        self.losses.copy_(saved["losses"])
        self.model.load_state_dict(saved["model"])
        self.average.load_state_dict(saved["average"])
        for group in saved["optimizer"]["param_groups"]:
            group["fused"] = self.optimizer.defaults["fused"]
        self.optimizer.load_state_dict(saved["optimizer"])
        draws = saved["draws"].cpu()
        if draws.dtype == torch.uint8 and len(draws) != len(self.generator.get_state()):
            self.generator.manual_seed(self.config.seed + self.step)  # begun on another device
        else:
            self.generator.set_state(draws)


# ---------------------------------------------------------------- the run folder

def write_text(path, text):
    """Write text, or bytes: killed at any moment, the path holds all of the new or of the old."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(text.encode() if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BadInput(f"{path}: cannot be written ({error.strerror})")


def write_checkpoint(path, content):
    buffer = io.BytesIO()  # torch.save hides the reason when a disk is full
    torch.save(content, buffer)
    write_text(path, buffer.getvalue())


def save_weights(trainer, path):
    """Write the averaged weights alone, as before.pt or after.pt: in half precision if that leaves
    every accuracy as it was just measured."""
    weights = trainer.average.state_dict()
    half = {name: w.half() for name, w in weights.items()}
    rounded = copy.deepcopy(trainer.average)
    rounded.load_state_dict(half)
    if evaluate(rounded, trainer.exams)["accuracy"] == trainer.history[-1]["accuracy"]:
        weights = half
    write_checkpoint(path, {"step": trainer.step, "weights": weights})


def save(trainer, folder):
    """Write last.pt, from which the run resumes, and metrics.jsonl, which it contains."""
    trainer.recent_losses()  # an interrupt may come between a bad loss and the next evaluation
    write_checkpoint(folder / "last.pt", trainer.state_dict())
    write_text(folder / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in trainer.history))


@contextmanager
def opened(path):
    """The content of a .json or .pt file; what fails with it, inside the `with`, is one line."""
    try:
        with warnings.catch_warnings(record=True):  # weights_only: runs no code from the file
            yield (json.loads(path.read_bytes()) if path.suffix == ".json" else
                   torch.load(path, map_location="cpu", weights_only=True))
    except (BadInput, OSError) as error:
        raise BadInput(f"{path}: {error}")
    except Exception as error:  # a damaged file makes torch raise many kinds
        raise BadInput(f"{path}: is damaged or of another run ({type(error).__name__})")


def read_run(folder):
    """(config.json as a dict, metrics.jsonl as a list of dicts) of a run folder."""
    lines = read_text(Path(folder) / "metrics.jsonl").splitlines()
    with opened(Path(folder) / "config.json") as about:
        for part, cls in (("world", WorldConfig), ("model", Config)):
            if asdict(settings(cls, about[part])) != about[part]:
                raise BadInput(f"{part} lacks or does not know a setting")
        history = [json.loads(line) for line in lines]
        milestones(history), history[-1]["step"]
    return about, history


def load_run(folder, weights="after"):
    """(model, world, splits) of a run, averaged weights `before` or `after` grokking, on CPU."""
    about, _ = read_run(folder)
    with opened(Path(folder) / f"{weights}.pt") as saved:
        world, splits = build_data(WorldConfig(**about["world"]), about["regime"],
                                   about.get("source"))
        model = LoopedTransformer(Config(**about["model"]), world.n_entities, world.n_relations)
        model.load_state_dict({name: w.float() for name, w in saved["weights"].items()})
    return model.eval().requires_grad_(False), world, splits


def build_data(config, regime, source=None):
    """(world, splits) made from the settings or read from the --data or --facts of config.json,
    with new facts if there are any to add."""
    if source and digest(source["path"]) != source["sha256"]:
        raise BadInput(f"{source['path']}: has changed since the run began")
    if source and source["kind"] == "data":
        world, splits = read_json(source["path"])
    else:
        world = read_facts(source["path"], config) if source else make_world(config)
        splits = make_splits(world, config, regime)
    return add_facts(world, splits, config) if config.new_facts else (world, splits)


def digest(path):
    """SHA-256 of a file, or of the four files of a data set."""
    names = [f"{path}/{name}.json" for name in ("train", "valid", "test", "vocab")]
    files = names if Path(path).is_dir() else [path]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()


# ---------------------------------------------------------------- one run from start to end

def train(folder, about, world, splits):
    """Train the run that `about` describes, or go on where it stopped, till its end or Ctrl-C.

    Leaves in `folder`: config.json, metrics.jsonl (a line an evaluation), before.pt (weights when
    the training compositions are first >= .99), after.pt (at the end), curves.png.
    """
    config, interrupts = settings(Config, about["model"]), []
    trainer = Trainer(config, world, splits, torch.device(about["device"]))
    if "start" in about:
        with opened(Path(about["start"]["path"]) / "after.pt") as saved:
            for model in trainer.model, trainer.average:
                model.load_state_dict({name: w.float() for name, w in saved["weights"].items()})
    resume(trainer, folder, about)
    usual = signal.signal(signal.SIGINT, lambda *_: interrupts.append(True))
    try:
        while trainer.step < config.steps and not interrupts:
            trainer.train_step()
            if trainer.step % config.eval_every == 0 or trainer.step == config.steps:
                right = trainer.measure()["accuracy"]["train_inferred"]
                if right >= 0.99 and not (folder / "before.pt").exists():
                    save_weights(trainer, folder / "before.pt")
                save(trainer, folder)
                say_progress(trainer)
        save(trainer, folder)
        if trainer.step == config.steps:
            save_weights(trainer, folder / "after.pt")
            save_figure(plot_curves(folder), folder / "curves.png")
    finally:
        signal.signal(signal.SIGINT, usual)
    return trainer


def resume(trainer, folder, about):
    """Load last.pt if there is one; refuse a folder that holds a run of other settings."""
    if (folder / "config.json").exists():
        parts = lambda a: {"data": a.get("source", {"sha256": ""})["sha256"], "regime": a["regime"],
                           "start": a.get("start", {"sha256": ""})["sha256"],
                           "world": json.dumps(a["world"]), "model": json.dumps(a["model"])}
        with opened(folder / "config.json") as found:
            other = [name for name in parts(about) if parts(about)[name] != parts(found)[name]]
        if other:
            raise BadInput(f"{folder}: holds a run of other settings ({', '.join(other)}); "
                           "choose another --out")
    if (folder / "last.pt").exists():
        with opened(folder / "last.pt") as saved:
            trainer.load_state_dict(saved)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "config.json", json.dumps(about, indent=1) + "\n")


def say_progress(trainer):
    """One line: rewritten in place on a terminal, one an evaluation when piped."""
    line, steps, terminal = trainer.history[-1], trainer.config.steps, sys.stdout.isatty()
    right, rate = line["accuracy"], line["step"] / max(0.1, line["seconds"])
    minutes, seconds = divmod(round((steps - line["step"]) / rate), 60)
    print(f"{chr(13) * terminal}step {line['step']:>6} {line['step'] / steps:4.0%}  loss "
          f"{line['loss']:.3f}  train {right['train_inferred']:.3f}  ID {right['test_id']:.3f}  "
          f"OOD {right['test_ood']:.3f}  {rate:.1f} steps/s  {minutes}:{seconds:02} left",
          end="" if terminal else "\n", flush=True)


def milestones(history):
    """{what: first step at which it holds, or None}: the three stages of the paper's Figure 2."""
    first = lambda holds: next((line["step"] for line in history if holds(line)), None)
    return {"train >= .99": first(lambda m: m["accuracy"]["train_inferred"] >= 0.99),
            "bridge on OOD >= .9": first(lambda m: m["lens"]["test_ood"]["any"] >= 0.9),
            "OOD answer >= .95": first(lambda m: m["accuracy"]["test_ood"] >= 0.95)}


def plot_curves(folder):
    """A figure of the three stages (paper, Figure 2), from a run folder's files."""
    about, history = read_run(folder)
    rows = [{**line["accuracy"], **line["lens"]["test_ood"]} for line in history]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots(subplot_kw=dict(xscale="log", ylim=(-0.02, 1.02)))
    for name, label, color, style in (
            ("train_inferred", "training compositions", "#000000", "-"),
            ("test_id", "ID test", "#0072B2", "-"), ("test_ood", "OOD test", "#D55E00", "-"),
            ("test_ood_id", "OOD hop 1 + ID hop 2", "#E69F00", ":"),
            ("test_id_ood", "ID hop 1 + OOD hop 2", "#CC79A7", ":"),
            ("any", "bridge seen on OOD (lens)", "#009E73", "--"),
            ("any_chance", "another query's bridge: chance", "#009E73", (0, (1, 3)))):
        if name in rows[-1]:
            axes.plot([line["step"] for line in history], [row[name] for row in rows],
                      color=color, ls=style, lw=2 if style == "-" else 1.2, label=label)
    for height, (what, step) in zip((1.02, 1.08, 1.02), milestones(history).items()):
        if step:
            axes.axvline(step, color="0.6", lw=0.8)
            axes.text(step, height, f"{what}: {step}", ha="center", va="bottom", fontsize=7)
    axes.set(xlabel="training step", ylabel="share of queries")
    title = "{preset}/{regime}, {model[layout]}, seed {model[seed]}".format(**about)
    axes.set_title(title, loc="left", fontsize=9, pad=26)
    axes.legend(fontsize=7, loc="upper left")
    return figure


def save_figure(figure, path):
    figure.savefig(path, dpi=130, metadata={"Software": None})


# ---------------------------------------------------------------- how fast
BENCH_SECONDS = 20

class PlainLoop(nn.Module):
    """What a user would otherwise write: PyTorch's own encoder layer, as wide, looped as often."""

    def __init__(self, config, n_tokens):
        super().__init__()
        D = config.d_model
        self.embedding, self.n_loops = nn.Embedding(n_tokens, D), config.n_loops
        self.layer = nn.TransformerEncoderLayer(D, config.n_heads, 4 * D, dropout=0.0,
                                                batch_first=True)
        self.head = nn.Linear(D, n_tokens)

    def forward(self, tokens):
        state = self.embedding(tokens)
        for _ in range(self.n_loops):
            state = self.layer(state)
        return self.head(state[:, -1])


def plain_steps(trainer):
    """Yields after every step of a PlainLoop trained on the same rows with a DataLoader."""
    device = trainer.tokens.device
    model = PlainLoop(trainer.config, trainer.model.blank + 1).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=trainer.config.lr)
    rows = torch.utils.data.TensorDataset(trainer.tokens.cpu(), trainer.answers.cpu())
    while True:
        for tokens, answers in torch.utils.data.DataLoader(rows, trainer.config.batch_size,
                                                           shuffle=True):
            loss = F.cross_entropy(model(tokens.to(device)), answers.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            yield


def matrix_products(trainer):
    """A function that does the matrix products alone of one training step, forward and backward."""
    config, device = trainer.config, trainer.tokens.device
    D, hidden = config.d_model, 8 * config.d_model // 3
    B, T = config.batch_size, LENGTH[config.layout]
    heads, d = B * config.n_heads, D // config.n_heads
    graded = config.n_loops - min(config.min_loops, config.n_loops) + 1
    dense = [(B * T, D, 3 * D), (B * T, D, D), (B * T, D, 2 * hidden), (B * T, hidden, D)]
    attention = [(heads, T, d, T), (heads, T, T, d)]
    shapes = config.n_loops * ([(1, *shape) for shape in dense] + attention)
    shapes += graded * [(1, B, D, trainer.model.blank + 1)]
    kind = dict(device=device, dtype=torch.bfloat16 if config.bf16 else torch.float32)
    made = {s: [torch.randn(s[0], *size, **kind) for size in
                ((s[1], s[2]), (s[2], s[3]), (s[1], s[3]))] for s in set(shapes)}

    def multiply():
        for shape in shapes:
            x, weight, gradient = made[shape]
            x @ weight, gradient @ weight.mT, x.mT @ gradient
    multiply()
    replay = capture(multiply, trainer.generator) if device.type == "cuda" else multiply
    return lambda: made and replay()  # a CUDA graph knows addresses: what lies there must stay


def bench(given):
    """Time the training step, its matrix products alone, and a plain PyTorch loop; returns 0.

    The three take turns, so that a drifting machine is the same for all; medians are printed.
    """
    about = describe(given, pick_device(given["device"]))
    config, device = settings(Config, about["model"]), torch.device(about["device"])
    config = replace(config, warmup=0, ema=0.0)  # as fast, and alike from the first step on
    trainer = Trainer(config, *build_data(settings(WorldConfig, about["world"]), about["regime"]),
                      device)
    plain = plain_steps(trainer)
    kinds = {"ours": trainer.train_step, "matmul": matrix_products(trainer),
             "plain": lambda: next(plain)}
    seconds = {name: [] for name in kinds}
    began = time.perf_counter()
    while len(seconds["ours"]) < 15 or time.perf_counter() < began + BENCH_SECONDS:
        for name, step in kinds.items():
            start = time.perf_counter()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    median = {name: sorted(times[5:])[len(times[5:]) // 2] for name, times in seconds.items()}
    for name, took in median.items():
        print(f"{about['preset']:<14} {device.type:<5} {name:<7} {1 / took:9.1f} steps/s  "
              f"{config.batch_size / took:10.0f} sequences/s")
    print(f"over_matmul={median['ours'] / median['matmul']:.2f} "
          f"over_plain={median['plain'] / median['ours']:.2f}")
    return 0


# ---------------------------------------------------------------- the command line

def main(argv=None):
    """Run the command line; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    try:
        given = make_parser().parse(sys.argv[1:] if argv is None else argv)
        if given["bench"]:
            return bench(given)
        return train_all(given) if given["all"] else train_one(given)
    except KeyboardInterrupt:
        print("grok.py: stopped; the same command goes on", file=sys.stderr)
        return 130
    except (BadInput, OSError) as error:
        said = error
    except (RuntimeError, MemoryError) as error:
        words = "out of memory", "allocate", "alloc_failed", "memoryerror"
        if not any(word in repr(error).lower() for word in words):
            raise
        said = "out of memory: lower batch_size or d_model"
    print(f"grok.py: {said}", file=sys.stderr)
    return 2


def make_parser():
    about = ("Train a tiny parameter-sharing transformer until it groks two-hop composition. "
             "Killed at any moment, the same command goes on.")
    parser = Parser(prog="grok.py", allow_abbrev=False, description=about)
    presets = "; ".join(f"{name}: {about}" for name, (about, _, _) in PRESETS.items())
    parser.add_argument("--preset", default="tiny", help=f"{presets} (tiny)")
    parser.add_argument("--regime", default="natural", help=f"{', '.join(REGIMES)} (natural)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--out", type=Path, help="the run's folder (ROOT/PRESET/REGIME/seedK)")
    parser.add_argument("--root", type=Path, default="runs", help="where runs lie (runs)")
    parser.add_argument("--start", help="a run's folder: start from its after.pt (preset tune)")
    parser.add_argument("--all", action="store_true", help="every run of the README, done ones "
                                                           "skipped, broken ones resumed")
    parser.add_argument("--bench", action="store_true", help="time the training step")
    parser.add_argument("--data", help="a data set to train on: a folder that data.py --export or "
                                       "the public GrokkedTransformer code wrote")
    parser.add_argument("--facts", help="your own: lines of head, relation, tail, tab-separated")
    parser.add_settings(Config, "model and training (defaults of preset tiny)")
    parser.add_settings(WorldConfig, "world (defaults of preset tiny)")
    return parser


def train_one(given):
    about = describe(given, pick_device(given["device"]))
    world, splits = build_data(settings(WorldConfig, about["world"]), about["regime"],
                               about.get("source"))
    if "source" in about:
        about["world"] = fit_settings(given, about, world, splits)
    folder = given["out"] or default_folder(given, about)
    print("{preset} / {regime} on {device}".format(**about) + f", in {folder}", flush=True)
    trainer = train(folder, about, world, splits)
    if trainer.step < trainer.config.steps:
        print(f"\nstopped and saved in {folder}; the same command goes on from here")
        return 130
    print_result(trainer.history, folder)
    return 0


def every_run(root):
    """Options of every run of the README; what starts from a run comes after it."""
    regimes = [f"--regime={regime}" for regime in REGIMES]
    tune = "--preset=tune --start={root}/tiny/{regime}/seed{seed}"
    tune_paper = "--preset=tune --layout=bidirectional --d-model=96 --n-heads=2 --logit-scale=0.6"
    kinds = (
        [*regimes, "--shared=false"]                                         # Findings 1 and 2
        + ["--preset=tune"] + [tune.replace("{regime}", regime) for regime in REGIMES]  # Finding 3
        + [tune.replace("{regime}", "natural") + f" --kept=1 --new-k={k}" for k in (0, 1, 2, 4, 8)]
        + [f"--preset=bidirectional {regime}" for regime in (regimes[0], regimes[1], regimes[4])]
        + [tune_paper, tune_paper + " --start={root}/bidirectional/natural/seed{seed}"]
        + [f"--steps=3000 {change}" for change in (                              # ingredients
            *(f"--without={name}" for name in INGREDIENTS),
            "--min-loops=4", "--ema=0", "--atomic-share=0", "--weight-decay=0",
            "--shared=false --min-loops=4")]
        + ["--bf16=true"])
    return [kind.format(root=shlex.quote(str(root)), seed=seed) + f" --seed={seed}"
            for kind in kinds for seed in (0, 1, 2)] + larger_worlds()


def larger_worlds():
    """Options of the runs in larger worlds: first of all, more width. 5 steps only time a step."""
    fifty = "--d-model=128 --logit-scale=0.55 --lr=0.004 --weight-decay=0.48"
    narrow = "--d-model=128 --logit-scale=0.8 --lr=0.004 --weight-decay=0.12 --steps=14000"
    wide, once = "--d-model=384 --logit-scale=0.36 --lr=0.0018", "--steps=5 --eval-every=5"
    sizes = ((50, f"{fifty} --steps=2500", 3), (50, f"{fifty} --regime=both_full --steps=2000", 3),
             (100, "", 3), (100, "--regime=both_full --steps=2000", 3), (100, narrow, 1),
             (200, f"{wide} --steps=7000", 1), (200, f"{wide} --regime=both_full --steps=2000", 1),
             (500, f"--d-model=960 --logit-scale=0.25 --lr=0.0007 {once}", 1),
             (1000, f"--d-model=1920 --logit-scale=0.19 --lr=0.0004 {once}", 1),
             (2000, f"--d-model=2048 --logit-scale=0.2 --lr=0.0004 {once}", 1))
    return [f"--preset=growth --n-entities={size} {change} --seed={seed}"
            for size, change, seeds in sizes for seed in range(seeds)]


def train_all(given):
    """Run `every_run`, each in its own process, those that start from another one last.

    SLURM arrays and torchrun divide the list: by seed, if the number of tasks divides 3.
    """
    usual = make_parser().parse([])
    other = [name for name in given if name not in ("all", "root", "device")
             and given[name] != usual[name]]
    if other:
        raise BadInput(f"{other[0]} = {given[other[0]]}: --all takes --root and --device alone")
    if "LOCAL_RANK" in os.environ:  # torchrun: each task of a machine has a GPU of its own
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", os.environ["LOCAL_RANK"])
    number = lambda name, default: int(os.environ.get(name, default))
    rank = number("SLURM_ARRAY_TASK_ID", number("RANK", 0)) - number("SLURM_ARRAY_TASK_MIN", 0)
    runs = every_run(given["root"])
    runs = runs[rank::number("SLURM_ARRAY_TASK_COUNT", number("WORLD_SIZE", 1))]
    where = [f"--root={given['root']}", f"--device={given['device']}"]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    call = lambda run: subprocess.run([sys.executable, __file__, *shlex.split(run), *where],
                                      env=one_thread, capture_output=True, text=True)
    began, done, worst = time.perf_counter(), 0, 0
    with ThreadPoolExecutor(at_once(pick_device(given["device"]).type)) as pool:
        for part in ([run for run in runs if ("--start" in run) == late] for late in (False, True)):
            for run, result in zip(part, pool.map(call, part)):
                done += 1
                left = (time.perf_counter() - began) / done * (len(runs) - done) / 60
                said = result.stderr if result.returncode else result.stdout
                said = ["", *said.splitlines()][-1]
                print(f"{done}/{len(runs)} {run}: {said}; about {left:.0f} minutes left",
                      flush=True)
                worst = max(worst, abs(result.returncode))
    return worst


def at_once(device):
    """How many runs share a machine: one a core; on a GPU, too, but at most one in 2 free GiB."""
    if device == "cuda":
        return max(1, min(os.cpu_count(), torch.cuda.mem_get_info()[0] // 2**31))
    return os.cpu_count() if device == "cpu" else 1


def pick_device(name):
    there = {"cuda": torch.cuda, "mps": torch.backends.mps, "cpu": torch.cpu}
    here = [kind for kind, backend in there.items() if backend.is_available()]
    if name not in ("auto", *here):
        raise BadInput(f"device = {name}: must be auto or one that is here: {', '.join(here)}")
    return torch.device(here[0] if name == "auto" else name)


def describe(given, device):
    """The content of config.json: every setting, and what the run was made with."""
    if given["preset"] not in PRESETS:
        raise BadInput(f"preset = {given['preset']}: must be one of {', '.join(PRESETS)}")
    if given["data"] and (given["facts"] or given["regime"] != "natural"):
        raise BadInput(f"data = {given['data']}: brings its own facts and regime; "
                       "leave out --facts and --regime")
    _, world, model = PRESETS[given["preset"]]
    chosen = {name: value for name, value in given.items() if value is not None}
    model = settings(Config, {**model, **chosen})
    if model.d_model % (2 * model.n_heads):
        raise BadInput(f"n_heads = {model.n_heads}: twice it must divide d_model = {model.d_model}")
    world = settings(WorldConfig, {**world, **chosen})
    about = {"preset": given["preset"], "regime": given["regime"], "world": asdict(world),
             "model": asdict(model), "device": device.type,
             "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                          "numpy": np.__version__}}
    for kind in ("data", "facts"):
        if kind in chosen:
            if world.new_facts:
                raise BadInput(f"new_facts = {world.new_facts}: needs a world made here; leave out "
                               f"--{kind}")
            about["source"] = {"kind": kind, "path": chosen[kind], "sha256": digest(chosen[kind])}
    if given["start"]:
        check_start(read_run(given["start"])[0], about)
        about["start"] = {"path": given["start"],
                          "sha256": digest(Path(given["start"], "after.pt"))}
    return about


def check_start(start, about):
    """Refuse to start from another kind of model, or in another world, its new facts apart."""
    shape = {"layout", "shared", "without", "d_model", "n_heads", "n_loops"}
    graph = set(start["world"]) - {"new_facts", "kept", "new_k"}
    for part, names in (("world", graph), ("model", shape)):
        for name in sorted(names):
            if about[part][name] != start[part][name]:
                raise BadInput(f"{name} = {about[part][name]}: must be {start[part][name]}, as in "
                               "the run to start from")


def fit_settings(given, about, world, splits):
    """The world settings that --data or --facts bring; refuses others on the command line."""
    found = {"n_entities": world.n_entities, "n_relations": world.n_relations,
             "out_degree": world.relations.shape[1]}
    if about["source"]["kind"] == "data":
        found["ood_fraction"] = world.is_ood.sum().item() / len(world.facts)
        found["phi"] = len(splits["train_inferred"].h) / max(1, len(splits["id_atomic"].h))
    for name, value in found.items():
        if given[name] not in (None, value):
            raise BadInput(f"{name} = {given[name]}: must be {value}, as in "
                           f"{about['source']['path']}")
    return asdict(settings(WorldConfig, {**about["world"], **found}))


def default_folder(given, about):
    """ROOT/PRESET/REGIME/seedK; given settings other than the preset's are named after REGIME."""
    _, world, model = PRESETS[about["preset"]]
    usual = {**asdict(WorldConfig()), **asdict(Config()), **world, **model}
    name = about["regime"]
    if "source" in about:
        name += f",{about['source']['kind']}={Path(about['source']['path']).stem}"
    if "start" in about:
        name += f",start={Path(about['start']['path']).absolute().parent.name}"
    for key, value in usual.items():
        if key != "seed" and given[key] not in (None, value):
            name += f",{key}={given[key]}"
    return Path(given["root"], about["preset"], name, f"seed{about['model']['seed']}")


def print_result(history, folder):
    """The seven accuracies, the stages, and where the run lies."""
    last, lens = history[-1], history[-1]["lens"]["test_ood"]
    print(f"\n{'split':<16}{'right':>7}")
    for split, right in last["accuracy"].items():
        print(f"{split:<16}{right:>7.3f}")
    print(f"bridge seen on OOD (lens, any site) {lens['any']:.3f}, chance {lens['any_chance']:.3f}")
    for what, step in milestones(history).items():
        print(f"{what:<20} {'at step ' + str(step) if step else 'never'}")
    print(f"{last['seconds']:.0f} seconds; config, metrics, weights and curves.png in {folder}")


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):  # so that `| head` ends it quietly
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    sys.exit(main())
