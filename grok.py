"""A tiny parameter-sharing transformer that groks two-hop composition, and the loop that trains it.

    python grok.py                      train the default run, a few minutes on two CPU cores
    python grok.py --help               every setting

Paper: He et al., "Is Grokking Worthwhile?", arXiv 2601.09049. Words used throughout:

    B  queries in a batch            h, r1, r2  head entity and the two relations of a query
    T  positions: 3 or 4, and slots  b, t       bridge entity; the answer
    D  width of the model            loop       one pass through the block
    V  tokens of the vocabulary      state      what a loop hands to the next, (B, T, D)
                                     mixed      what mixing found inside a loop, (B, T, D)
"""
import argparse
import copy
import hashlib
import io
import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from data import (add_facts, BadInput, check_settings, describe_fields, LIMITS, make_splits,
                  make_world, read_data, read_facts, reading, REGIMES, TRAINED, WorldConfig)


@dataclass(frozen=True)
class Config:
    """The model and its training."""
    layout: str = "causal"     # causal: h r1 r2, answered at r2; bidirectional: and a blank (paper)
    mixing: str = "attention"  # between positions: attention, or tokens, an MLP over them (paper)
    tied: bool = True          # one matrix reads tokens and gives answers; false: two (paper)
    copy: bool = False         # graded are all tokens of the sequence (paper), or the answer alone
    min_loops: int = 2         # graded are this loop and every later one; n_loops: the last (paper)
    restart: bool = True       # a loop adds what it mixed to the input; false: to the last state
    mlp_residual: bool = False  # add the MLP's input to its output
    n_blocks: int = 1          # blocks, used in turn; n_loops of them: an ordinary transformer
    slots: int = 0             # scratch positions after the sequence, learned vectors (paper: 16)
    d_model: int = 64          # width D; chosen, as logit_scale, for the causal layout: see small
    n_heads: int = 1           # attention heads
    n_loops: int = 4           # passes through a block
    logit_scale: float = 0.8   # logits = scale * sqrt(D) * cosine, not learned
    lr: float = 4e-3           # AdamW step size, constant after the warm-up
    weight_decay: float = 0.3  # AdamW weight decay, on every parameter
    batch_size: int = 256      # queries a step
    steps: int = 7000          # training steps
    warmup: int = 200          # steps of linear warm-up
    ema: float = 0.995         # decay of the averaged weights, which are the ones evaluated
    atomic_share: float = 0.4  # share of a batch that is facts; 0: all rows alike (paper)
    bf16: bool = False         # train with matrix products in bfloat16
    eval_every: int = 100      # steps between evaluations
    seed: int = 0              # seed of initialisation and batches


# ---------------------------------------------------------------- the model
LENGTH = {"causal": 3, "bidirectional": 4}  # positions: h r1 r2; and a blank for the answer


def rms_norm(x):
    """x scaled to root mean square 1 along its last axis; no gain is learned."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def rotate(x, cos, sin):
    """RoPE: turn x (..., T, d) by the angles of its positions; channel i pairs with i + d/2."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attend(q, k, v, causal):
    """Softmax attention over (..., T, d), written out to be read."""
    score = q @ k.mT / math.sqrt(q.shape[-1])                                   # (..., T, T)
    if causal:
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        score = score.masked_fill(future, -torch.inf)
    return score.softmax(-1) @ v


class Attention(nn.Module):
    """Mixing by attention with rotary positions."""

    def __init__(self, config, T):
        super().__init__()
        D, self.n_heads, self.causal = config.d_model, config.n_heads, config.layout == "causal"
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        half = D // config.n_heads // 2
        angle = torch.arange(T)[:, None] * 100.0 ** (-torch.arange(half) / half)    # (T, d/2)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1), persistent=False)

    def forward(self, state):
        B, T, D = state.shape
        heads = self.qkv(state).view(B, T, 3, self.n_heads, D // self.n_heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)                                  # (B, heads, T, d)
        q, k = rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)
        found = attend(q, k, v, self.causal)
        return self.out(found.transpose(1, 2).reshape(B, T, D))                 # heads side by side


class TokenMixing(nn.Module):
    """Mixing by a gated MLP along the positions, each with weights of its own (the paper's TRM)."""

    def __init__(self, config, T):
        super().__init__()
        self.gate_up = nn.Linear(T, 8 * T, bias=False)
        self.down = nn.Linear(4 * T, T, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, state):
        B, T, D = state.shape
        columns = state.transpose(0, 1).reshape(T, B * D)  # four times as fast as (B, D, T) here
        gate, up = (self.gate_up.weight @ columns).chunk(2, dim=0)              # (4T, B * D) each
        found = self.down.weight @ (F.silu(gate) * up)                          # (T, B * D)
        return self.out(found.view(T, B, D).transpose(0, 1))


class Block(nn.Module):
    """Mixing between the positions of the state, then a gated MLP on (input + what was mixed).
    By default it departs from the usual block twice: a loop restarts from the *input*, and the MLP
    has no residual around it, so the old state is passed on through mixing alone."""

    def __init__(self, config, T):
        super().__init__()
        D, hidden = config.d_model, 8 * config.d_model // 3
        self.config = config
        self.mix = (Attention if config.mixing == "attention" else TokenMixing)(config, T)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, state, x, edit):
        """state (B, T, D) after the previous loop, x (B, T, D) the input -> state (B, T, D)."""
        mixed = edit("mixed", self.mix(state))
        return edit("state", self.look_up((x if self.config.restart else state) + mixed))

    def look_up(self, asked):
        """The MLP: what a position makes of what it holds and has mixed, (..., D)."""
        found = rms_norm(asked)
        gate, up = self.gate_up(found).chunk(2, dim=-1)
        new = self.down(F.silu(gate) * up)
        return rms_norm(found + new if self.config.mlp_residual else new)


class LoopedTransformer(nn.Module):
    """One block applied n_loops times: the parameter sharing of the paper's model (Figure 1)."""

    def __init__(self, config, n_entities, n_relations):
        super().__init__()
        self.config, self.blank = config, n_entities + n_relations
        D, T = config.d_model, LENGTH[config.layout] + config.slots
        self.embedding = nn.Parameter(torch.empty(self.blank + 1, D))
        if not config.tied:
            self.head = nn.Parameter(torch.empty(self.blank + 1, D))
        if config.slots:
            self.scratch = nn.Parameter(torch.empty(config.slots, D))
        with torch.random.fork_rng(devices=[]):  # leaves the global random state as it was
            torch.default_generator.manual_seed(config.seed)  # the CPU's alone
            self.blocks = nn.ModuleList(Block(config, T) for _ in range(config.n_blocks))
            for name, weight in self.named_parameters():
                fan_in = weight.shape[1] if name.startswith("blocks") else 1
                nn.init.normal_(weight, std=fan_in ** -0.5)

    def forward(self, tokens, n_loops=None, edit=None):
        """tokens (B, T) -> logits (B, V) at each query's answer position.

        `edit(loop, part, value) -> value` is called in every loop with ("mixed", (B, T, D)), then
        with ("state", (B, T, D)): the one hook behind loss, lens, probe and all patching.
        """
        def edited(part, value):
            new = value if edit is None else edit(loop, part, value)
            if not isinstance(new, torch.Tensor):
                raise TypeError("edit(loop, part, value) must return the value to go on with")
            return new

        state = x = self.embed(tokens)                                          # (B, T, D)
        for loop in range(self.config.n_loops if n_loops is None else n_loops):
            # the sharing: with one block, every loop goes through the same weights
            state = self.blocks[loop % self.config.n_blocks](state, x, edited)
        return self.unembed(self.read(state, tokens))

    def embed(self, tokens):
        """tokens (B, T) -> vectors (B, T, D), those of the slots after them."""
        x = rms_norm(self.embedding)[tokens]
        if self.config.slots:
            x = torch.cat([x, rms_norm(self.scratch).expand(len(tokens), -1, -1)], 1)
        return x

    def answer_position(self, tokens):
        """(B,): the first blank, or in the causal layout the last token. So a fact is answered at
        the position of r2, or of r1."""
        return (tokens != self.blank).sum(1) - int(self.config.layout == "causal")

    def read(self, state, tokens):
        """The state at the answer position, (B, D)."""
        rows = torch.arange(len(tokens), device=tokens.device)
        return state[rows, self.answer_position(tokens)]

    def vectors(self):
        """The unembedding vectors (V, D): what the lens compares a state with."""
        return rms_norm(self.embedding if self.config.tied else self.head)

    def unembed(self, state):
        """Logits (..., V) of any state (..., D): scaled cosines with the unembedding vectors."""
        scale = self.config.logit_scale / math.sqrt(self.config.d_model)
        return scale * (state @ self.vectors().T)


def to_tokens(queries, world, layout):
    """Queries -> tokens (N, T), answers (N,): entity e is e, relation r is E + r, blank E + R."""
    E, blank = world.n_entities, world.n_entities + world.n_relations
    tokens = np.full((len(queries.h), LENGTH[layout]), blank)
    tokens[:, 0], tokens[:, 1] = queries.h, E + queries.r1
    tokens[:, 2] = np.where(queries.r2 >= 0, E + queries.r2, blank)
    return torch.from_numpy(tokens), torch.from_numpy(np.asarray(queries.t))


# ---------------------------------------------------------------- what is measured while training
def run_values(model, tokens):
    """What was mixed, and the state, of every loop of one run, (n_loops, 2, B, T, D)."""
    kept = []

    def keep(loop, part, value):
        kept.append(value)
        return value

    model(tokens, edit=keep)
    return torch.stack(kept).unflatten(0, (-1, 2))


def lens_rates(top, wanted):
    """How often `wanted` (B,) is the top-1 token in top (n_loops, B, T).
    {"map": (n_loops, T) share at each site; "any": at one site at least (the paper's measure);
    "best": at one fixed site, chosen on every other query and scored on the rest, None if there is
    no rest; "best_site": that (loop, position)}."""
    hit = top == wanted[None, :, None]
    choice = hit[:, ::2].float().mean(1)                                        # (n_loops, T)
    loop, position = divmod(choice.argmax().item(), choice.shape[1])
    scored = hit[loop, 1::2, position].float()
    return {"map": hit.float().mean(1).tolist(), "any": hit.any(2).any(0).float().mean().item(),
            "best": scored.mean().item() if len(scored) else None, "best_site": [loop, position]}


@torch.no_grad()
def evaluate(model, exams):
    """{"accuracy": {split: share right}, "lens": {split of compositions: what the lens reads}}.
    Lens: bridge at "any" site and at the "best" one, each with its chance level, which is the rate
    of another query's bridge (None if there is no other), and the answer (paper, Figure 2)."""
    accuracy, lens = {}, {}
    for split, (tokens, answers, bridges) in exams.items():
        states = run_values(model, tokens)[:, 1]                                # (loops, B, T, D)
        right = model.unembed(model.read(states[-1], tokens)).argmax(-1) == answers
        accuracy[split] = right.float().mean().item()
        if split.endswith("atomic") or split == "train_inferred":
            continue
        top = model.unembed(states).argmax(-1)                                  # (loops, B, T)
        seen, chance = lens_rates(top, bridges), lens_rates(top, bridges.roll(1))
        lens[split] = {"any": seen["any"], "any_chance": chance["any"] if len(top[0]) > 1 else None,
                       "best": seen["best"], "best_chance": chance["best"],
                       "answer_any": lens_rates(top, answers)["any"]}
    return {"accuracy": accuracy, "lens": lens}


def make_exams(splits, world, layout, device, most=500):
    """{split: (tokens, answers, bridges)} of up to `most` random queries; empty splits left out."""
    rng, exams = np.random.default_rng(0), {}
    for name, asked in splits.items():
        chosen = asked.take(rng.permutation(len(asked.h))[:most])
        exam = *to_tokens(chosen, world, layout), torch.from_numpy(chosen.b)
        if len(chosen.h):
            exams[name] = tuple(column.to(device) for column in exam)
    return exams


# ---------------------------------------------------------------- training
def training_rows(splits, world, layout, device):
    """All training rows, facts first: tokens (N, T), answers (N,), number of facts."""
    parts = [to_tokens(splits[name], world, layout) for name in TRAINED if name in splits]
    tokens, answers = (torch.cat(column).to(device) for column in zip(*parts))
    return tokens, answers, len(parts[0][0]) + len(parts[1][0])


def draw(config, n_facts, n_rows, generator):
    """Row numbers of one batch, with replacement; atomic_share 0: all rows alike (paper)."""
    def pick(low, high, n):
        return torch.randint(low, high, (n,), generator=generator, device=generator.device)

    if config.atomic_share == 0:
        return pick(0, n_rows, config.batch_size)
    atomic = round(config.atomic_share * config.batch_size)
    return torch.cat([pick(0, n_facts, atomic), pick(n_facts, n_rows, config.batch_size - atomic)])


def loss_of(model, tokens, answers):
    """Cross-entropy of what is graded, mean over the graded loops (deep supervision, if several).
    Graded is the answer; with `copy` every position, which is to show its own token and, at the
    answer position, the answer (the paper's loss)."""
    place, graded = model.answer_position(tokens)[:, None], []
    targets = tokens.scatter(1, place, answers[:, None]) if model.config.copy else answers[:, None]

    def keep(loop, part, state):
        if part == "state" and loop + 1 >= model.config.min_loops:
            graded.append(state[:, :tokens.shape[1]] if model.config.copy
                          else model.read(state, tokens)[:, None])
        return state

    model(tokens, edit=keep)
    logits = model.unembed(torch.stack(graded))                                 # (G, B, T or 1, V)
    return F.cross_entropy(logits.flatten(0, 2), targets.repeat(len(graded), 1).flatten())


class Trainer:
    """All that changes in a run: weights, their average, optimiser, draws, what was measured."""
    PARTS = "model", "average", "optimizer"

    def __init__(self, config, world, splits, device):
        self.config, self.step, self.history = config, 0, []
        self.model = LoopedTransformer(config, world.n_entities, world.n_relations).to(device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.weights, self.averaged = (list(m.parameters()) for m in (self.model, self.average))
        self.optimizer = torch.optim.AdamW(self.weights, lr=config.lr, betas=(0.9, 0.98),
                                           weight_decay=config.weight_decay, fused=True)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        rows = training_rows(splits, world, config.layout, device)
        self.tokens, self.answers, self.n_facts = rows
        self.exams = make_exams(splits, world, config.layout, device)
        self.losses = []  # since the last evaluation
        self.began = time.perf_counter()

    def train_step(self):
        """One step. The loss stays on the device: the host does not wait for it."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (self.step + 1) / max(1, config.warmup))
        rows = draw(config, self.n_facts, len(self.tokens), self.generator)
        with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=config.bf16):
            loss = loss_of(self.model, self.tokens[rows], self.answers[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        decay = min(config.ema, (self.step + 1) / (self.step + 11))
        with torch.no_grad():
            torch._foreach_lerp_(self.averaged, self.weights, 1 - decay)
        self.losses.append(loss.detach())
        self.step += 1

    def measure(self):
        """Append a line of metrics.jsonl to the history and return it:

        {"step", "loss": mean since the last line, "seconds", "accuracy": {split: share right},
         "lens": {split: {"any", "any_chance", "best", "best_chance", "answer_any"}}}
        Raises BadInput if a loss since the last line, or a weight now, is not finite."""
        losses = torch.stack(self.losses)
        bad = [int(row) for row in (~torch.isfinite(losses)).nonzero()]
        if not all(weight.isfinite().all() for weight in self.averaged):
            bad.append(len(losses))  # a last step that spoiled the weights: no loss shows it yet
        if bad:
            at = self.step - len(losses) + 1 + bad[0]
            raise BadInput(f"loss is not finite at step {at}: lower lr = {self.config.lr:g}; the "
                           "last good checkpoint is kept")
        self.losses.clear()
        self.history.append({"step": self.step, "loss": losses.mean().item(),
                             "seconds": round(time.perf_counter() - self.began, 1),
                             **evaluate(self.average, self.exams)})
        return self.history[-1]

    def state_dict(self):
        """What last.pt holds."""
        return {"step": self.step, "history": self.history, "draws": self.generator.get_state(),
                **{name: getattr(self, name).state_dict() for name in self.PARTS}}

    def load_state_dict(self, saved):
        """Go on from what last.pt holds."""
        for name in self.PARTS:
            getattr(self, name).load_state_dict(saved[name])
        self.generator.set_state(saved["draws"])
        self.step, self.history = saved["step"], saved["history"]
        self.began = time.perf_counter() - self.history[-1]["seconds"]


def train(trainer, folder):
    """Train to the end; leaves in `folder` metrics.jsonl (a line an evaluation, see `measure`),
    before.pt (weights at the first evaluation with training >= .99) and after.pt (at the end)."""
    while trainer.step < trainer.config.steps:
        trainer.train_step()
        if trainer.step % trainer.config.eval_every == 0 or trainer.step == trainer.config.steps:
            right = trainer.measure()["accuracy"]["train_inferred"]
            if right >= 0.99 and not (folder / "before.pt").exists():
                save_weights(trainer, folder / "before.pt")
            lines = [json.dumps(line) + "\n" for line in trainer.history]
            write_file(folder / "metrics.jsonl", "".join(lines).encode())
            write_checkpoint(folder / "last.pt", trainer.state_dict())
            say_progress(trainer)
    save_weights(trainer, folder / "after.pt")


# ---------------------------------------------------------------- the run folder
WEIGHTS = {"before": "before.pt", "grokked": "after.pt"}  # may be in half precision


def write_file(path, content):
    """Write bytes: killed at any moment, the path holds all of the new or all of the old; so it
    does with two processes in one run folder, for each writes a file of its own first."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_checkpoint(path, content):
    buffer = io.BytesIO()  # torch.save hides the reason when a disk is full
    torch.save(content, buffer)
    write_file(path, buffer.getvalue())


def save_weights(trainer, path):
    write_checkpoint(path, {"step": trainer.step, "weights": trainer.average.state_dict()})


def read_checkpoint(path, use):
    """What `use` returns of what a .pt file holds; reading it runs no code."""
    with reading(path):
        return use(torch.load(path, map_location="cpu", weights_only=True))


def read_config(folder):
    """config.json of a run folder, as `describe` made it."""
    path = Path(folder, "config.json")
    with reading(path):
        about = json.loads(path.read_bytes())
        about["regime"], about["device"]  # one of ours
        for part, cls in (("world", WorldConfig), ("model", Config)):
            about[part] = asdict(check(cls(**about[part])))
        return about


def read_run(folder):
    """(config.json, see `describe`; metrics.jsonl as a list, see `measure`) of a run folder."""
    about, path = read_config(folder), Path(folder, "metrics.jsonl")
    with reading(path):
        history = [json.loads(line) for line in path.read_bytes().splitlines()]
        history[-1]["accuracy"], history[-1]["lens"]  # there is a line, and it is one of ours
        return about, history


def load_run(folder, weights="grokked"):
    """(model, world, splits) of a run, on the CPU; its weights "before" or "grokked"."""
    about, path = read_config(folder), Path(folder, WEIGHTS[weights])
    world, splits = build_data(about, folder)
    model = LoopedTransformer(Config(**about["model"]), world.n_entities, world.n_relations)
    read_checkpoint(path, lambda saved: model.load_state_dict(saved["weights"]))
    return model.eval().requires_grad_(False), world, splits


def build_data(about, folder="."):
    """(world, splits) of a run: made from its settings, or read from the file that it names, which
    is looked for from the run's folder; then with new facts, if there are any to add."""
    config, file = WorldConfig(**about["world"]), about.get("data")
    path = Path(folder, file["path"]) if file else Path()
    if file and digest(path) != file["sha256"]:
        raise BadInput(f"{path}: has changed since the run began")
    if path.suffix == ".npz":
        world, splits, _ = read_data(path)
    else:
        world = read_facts(path, config) if file else make_world(config)
        splits = make_splits(world, config, about["regime"])
    return add_facts(world, splits, config) if config.new_facts else (world, splits)


def digest(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def is_done(folder, about):
    """Whether this run lies in the folder, finished. Refuses a folder that holds a run of other
    settings, naming one; more steps alone are the same run, which goes on."""
    if not (folder / "config.json").exists():
        return False
    old, new, end = identity(read_config(folder)), identity(about), folder / "after.pt"
    for name in new:
        if name != "steps" and new[name] != old[name]:
            raise BadInput(f"{name} = {new[name]}: {folder} holds a run with {name} = {old[name]}; "
                           "choose another --out")
    ended = read_checkpoint(end, lambda saved: saved["step"]) if end.exists() else 0
    last, lines = folder / "last.pt", folder / "metrics.jsonl"
    if not ended and not last.exists() and lines.exists() and lines.read_bytes().count(b"\n") > 1:
        raise BadInput(f"out = {folder}: holds a run without its weights; choose another --out")
    can_go_on = not ended or last.exists()
    if new["steps"] < old["steps"] or ended < new["steps"] and not can_go_on:
        raise BadInput(f"steps = {new['steps']}: {folder} holds a run of {old['steps']}, which "
                       "can only go on, and only from its last.pt; choose another --out")
    return new["steps"] == ended


def identity(about):
    """{setting: value} of all that makes a run the run it is: not where its files lie."""
    whole = {name: about[name] for name in ("regime", "device")}
    files = {name: about.get(name, {}).get("sha256") for name in ("data", "start")}
    return {**about["world"], **about["model"], **whole, **files}


def begin(about, world, splits):
    """The Trainer of the run that `describe` describes."""
    trainer = Trainer(Config(**about["model"]), world, splits, torch.device(about["device"]))
    start = about.get("start")
    if start and start["weights"] in WEIGHTS:
        begun = load_run(start["path"], start["weights"])[0].state_dict()
        trainer.model.load_state_dict(begun)
        trainer.average.load_state_dict(begun)
    return trainer


def resume(trainer, about, folder):
    """Go on from last.pt, if there is one; write config.json, its paths seen from the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "last.pt").exists():
        read_checkpoint(folder / "last.pt", trainer.load_state_dict)
    written = copy.deepcopy(about)
    for name in written.keys() & {"data", "start"}:
        path = os.path.realpath(written[name]["path"])
        written[name]["path"] = os.path.relpath(path, os.path.realpath(folder))
    write_file(folder / "config.json", (json.dumps(written, indent=1) + "\n").encode())


# ---------------------------------------------------------------- settings
PRESETS = {  # name: (what it is for, world settings, model settings)
    "tiny": ("minutes on two CPU cores", {}, {}),
    "small": ("the paper's conditions, in small", {},
              dict(layout="bidirectional", mixing="tokens", tied=False, copy=True, min_loops=4,
                   d_model=96, logit_scale=0.9, atomic_share=0.2, steps=3000)),
    "tune": ("new facts for the run that --start names",
             dict(new_facts=140, kept=0.21), dict(lr=2e-3, steps=500, eval_every=50)),
    "smoke": ("seconds, for the tests",
              dict(n_entities=12, n_relations=8, out_degree=6, ood_fraction=0.2, phi=4.0),
              dict(d_model=32, n_loops=3, batch_size=64, steps=200, warmup=20, eval_every=50)),
    "growth": ("a larger world", dict(n_entities=100),
               dict(d_model=192, n_heads=2, logit_scale=0.45, lr=2.7e-3, weight_decay=0.36,
                    atomic_share=0.6, bf16=True, steps=4000, eval_every=200)),
    "paper": ("the paper's world, for one GPU",
              dict(n_entities=2000, n_relations=200, out_degree=20, ood_fraction=0.05, phi=18.0),
              dict(d_model=2048, n_heads=16, logit_scale=0.2, atomic_share=0.6, bf16=True,
                   batch_size=1024, lr=5e-4, steps=40000, warmup=1000, eval_every=500)),
}
MODEL_LIMITS = {  # (least, most), or the words there are
    "layout": ("causal", "bidirectional"), "mixing": ("attention", "tokens"),
    "min_loops": (1, 128), "n_blocks": (1, 128), "n_loops": (1, 128), "slots": (0, 64),
    "d_model": (4, 2**14), "n_heads": (1, 128), "logit_scale": (1e-6, 1e6), "lr": (0, 10),
    "weight_decay": (0, 1000), "batch_size": (1, 2**20), "steps": (1, 10**9),
    "warmup": (0, 10**9), "ema": (0, 1), "atomic_share": (0, 1), "eval_every": (1, 10**9),
    "seed": (0, 2**63 - 1)}
GRAPH = "n_entities", "n_relations", "out_degree"
FREE = ("new_facts", "kept", "new_k1", "new_k2", "whole_rows", "lr", "weight_decay", "batch_size",
        "steps", "warmup", "ema", "atomic_share", "bf16", "eval_every", "seed", "min_loops", "copy")


def check(config):
    """The WorldConfig or Config given; BadInput for its first setting that cannot be."""
    if isinstance(config, WorldConfig):
        for name in ("kept", "new_k1", "new_k2", "whole_rows"):
            if not config.new_facts and getattr(config, name) != getattr(WorldConfig, name):
                raise BadInput(f"{name} = {getattr(config, name)}: needs new_facts above 0")
        return check_settings(config, LIMITS)
    check_settings(config, MODEL_LIMITS)
    heads, D = config.n_heads, config.d_model
    if D % (2 * heads):
        raise BadInput(f"n_heads = {heads}: twice it must divide d_model = {D}")
    for name, value in (("min_loops", config.min_loops), ("n_blocks", config.n_blocks)):
        if value > config.n_loops:
            raise BadInput(f"{name} = {value}: must lie in [1, n_loops = {config.n_loops}]")
    if config.layout == "causal" and (config.mixing == "tokens" or config.copy or config.slots):
        raise BadInput("layout = causal: needs mixing = attention, copy = false, slots = 0")
    return config


def describe(given):
    """(about, world, splits) of the run that the command line's {option: value or None} asks for.

    about, which config.json holds: {"preset", "regime", "world": WorldConfig, "model": Config,
     "device", "versions"; of a run on a file "data": {"path", "sha256"}; of one that starts from
     another run "start": {"path", "weights": "before", "grokked" or "none", "sha256"}}.
    Paths: from here; in config.json, from the run's folder."""
    about, chosen = begin_from(given)
    chosen.update((name, value) for name, value in given.items() if value is not None)
    for part, cls in (("world", WorldConfig), ("model", Config)):
        values = {name: chosen[name] for name in cls.__annotations__ if name in chosen}
        about[part] = asdict(check(cls(**values)))
    here = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    if given["device"] not in (None, *here):
        raise BadInput(f"device = {given['device']}: must be one that is here: {', '.join(here)}")
    about["device"] = given["device"] or here[0]
    about["versions"] = {"python": sys.version.split()[0], "torch": torch.__version__,
                         "numpy": np.__version__}
    world, splits = build_data(about)
    if not given["start"]:  # a graph from a file has these settings, too
        degree = int(np.bincount(world.facts[:, 0]).max())
        about["world"].update(zip(GRAPH, (world.n_entities, world.n_relations, degree)))
        check(WorldConfig(**about["world"]))
    return about, world, splits


def begin_from(given):
    """(the first entries of about, {setting: value}) that preset, start or data file bring."""
    if given["preset"] not in PRESETS:
        raise BadInput(f"preset = {given['preset']}: must be one of {', '.join(PRESETS)}")
    about = {"preset": given["preset"], "regime": given["regime"] or "natural"}
    chosen = {**PRESETS[given["preset"]][1], **PRESETS[given["preset"]][2]}
    if given["start"]:
        start = read_start(given)
        about.update((name, start[name]) for name in ("regime", "data", "start") if name in start)
        free = {name: value for name, value in chosen.items() if name in FREE}
        chosen = {**start["world"], **start["model"], **free}
    elif given["weights"] or given["new_facts"] or "new_facts" in chosen:
        raise BadInput("start = None: weights and new_facts need a run that is there, --start RUN")
    elif given["data"]:
        whole = Path(given["data"]).suffix == ".npz"  # brings its splits, too
        brought = [*WorldConfig.__annotations__, "regime"] if whole else GRAPH
        refuse(given, brought, "comes with --data")
        about["data"] = {"path": given["data"], "sha256": digest(given["data"])}
        about["regime"] = read_data(given["data"])[2] if whole else about["regime"]
    return about, chosen


def refuse(given, names, why):
    """Refuse the command line if it gives one of these settings."""
    for name in names:
        if given[name] is not None:
            raise BadInput(f"{name} = {given[name]}: {why}, leave it out")


def read_start(given):
    """config.json of the run to start from, with our own "start" and its paths seen from here."""
    path, weights = Path(given["start"]), given["weights"] or "grokked"
    if weights not in (*WEIGHTS, "none"):
        raise BadInput(f"weights = {weights}: must be one of {', '.join(WEIGHTS)}, none")
    settings = *WorldConfig.__annotations__, *Config.__annotations__, "regime", "data"
    refuse(given, [name for name in settings if name not in FREE], f"comes from {path}")
    start = read_config(path)
    if start["world"]["new_facts"]:
        raise BadInput(f"start = {path}: has new facts already, and would get the same again")
    if "data" in start:
        start["data"]["path"] = str(path / start["data"]["path"])
    sha256 = digest(path / WEIGHTS.get(weights, "config.json"))
    return {**start, "start": {"path": str(path), "weights": weights, "sha256": sha256}}


# ---------------------------------------------------------------- the command line
def main(argv=None):
    """Run the command line; returns the exit status: 0, 2 for bad input, 130 when interrupted."""
    try:
        given = parse(argv)
        about, world, splits = describe(given)
        folder = Path(given["out"] or "runs/{preset}/{regime}/seed{model[seed]}".format(**about))
        say("{preset}, {regime}, on {device}, in ".format(**about) + str(folder))
        if is_done(folder, about):
            say("already done")
        else:
            trainer = begin(about, world, splits)
            resume(trainer, about, folder)
            train(trainer, folder)
        print_result(folder)
        return 0
    except KeyboardInterrupt:
        print("grok.py: stopped; the same command goes on from last.pt", file=sys.stderr)
        return 130
    except (BadInput, OSError, torch.OutOfMemoryError) as error:
        print(f"grok.py: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""
    def error(self, message):
        raise BadInput(message)


def parse(argv=None):
    """{option: value, None where not given}."""
    parser = Parser(prog="grok.py", allow_abbrev=False, description=f"{__doc__.splitlines()[0]} "
                    "Killed at any moment, the same command goes on.")
    presets = "; ".join(f"{name}: {about}" for name, (about, _, _) in PRESETS.items())
    parser.add_argument("--preset", default="tiny", help=f"{presets} (tiny)")
    parser.add_argument("--regime", help=f"{', '.join(REGIMES)} (natural)")
    parser.add_argument("--device", help="cuda, mps or cpu (the first there is)")
    parser.add_argument("--out", help="the run's folder (runs/PRESET/REGIME/seedK)")
    parser.add_argument("--start", help="the run to fine-tune: brings its world and model")
    parser.add_argument("--weights", help="of the start: before, grokked, none (grokked)")
    parser.add_argument("--data", "--facts", help="your own facts, lines of head, relation, tail, "
                        "tab-separated; or the .npz that extras.exchange makes of a data set")
    about = {**describe_fields(Config), **describe_fields(WorldConfig)}
    for field in (*fields(Config), *fields(WorldConfig)):
        names = sorted({"--" + field.name.replace("_", "-"), "--" + field.name})
        parser.add_argument(*names, metavar="V", help=f"{about[field.name]} ({field.default})",
                            type=truth if field.type is bool else field.type)
    return vars(parser.parse_args(argv))


def truth(text):
    """What "true" and "false" mean; any other word is left for `check` to refuse."""
    return {"true": True, "false": False}.get(text.lower(), text)


def say(text):
    """Print, whatever characters the terminal or file can hold."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), flush=True)


def say_progress(trainer):
    """One line an evaluation: what is right so far, and the minutes that are left."""
    line, steps = trainer.history[-1], trainer.config.steps
    shares = "  ".join(f"{name} {share:.3f}" for name, share in line["accuracy"].items()
                       if name in ("train_inferred", "test_id", "test_ood", "new_new"))
    left = line["seconds"] * (steps / line["step"] - 1) / 60
    say(f"step {line['step']:>6} {line['step'] / steps:4.0%}  loss {line['loss']:.3f}  {shares}  "
        f"{left:.1f} minutes left")


def first_step(history, level, split, lens=None):
    """First step with a split's accuracy, or its lens rate of that name, >= level, or None."""
    for line in history:
        rates = line["lens"].get(split, {}) if lens else line["accuracy"]
        share = rates.get(lens or split)
        if share is not None and share >= level:
            return line["step"]
    return None


def print_result(folder):
    """Accuracy at the end, first steps of the stages, time."""
    about, history = read_run(folder)
    accuracy = history[-1]["accuracy"]
    asked = "test_ood" if "test_ood" in accuracy else "new_new"
    stages = {"training": ("train_inferred", None), f"{asked} answer": (asked, None),
              f"{asked} bridge seen (any state)": (asked, "any")}
    say("  ".join(f"{name} {share:.3f}" for name, share in accuracy.items()))
    for what, (split, lens) in stages.items():
        steps = (first_step(history, level, split, lens) for level in (0.5, 0.9, 0.95, 0.99))
        said = ", ".join(str(step or "never") for step in steps)
        say(f"{what} >= .5, .9, .95, .99 at step {said}")
    say(f"{history[-1]['seconds']:.0f} seconds on {about['device']}; python analyze.py {folder} "
        "looks inside")


if __name__ == "__main__":
    sys.exit(main())
