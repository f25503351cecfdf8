"""Two tiny transformers that share their parameters, and the loop that trains them until they grok.

    python grok.py                      train the default run, 1 to 2 minutes on two CPU cores
    python grok.py --help               every setting

"In which city does Ada's mother live?" chains two facts, (Ada, mother, Bea) and (Bea, city, Bern).
Paper: He et al., "Is Grokking Worthwhile?", arXiv 2601.09049. Symbols used throughout:

    B  queries in a batch            h, r1, r2  head entity and the two relations of a query
    T  positions: 3 or 4, and slots  b, t       bridge entity (Bea); the answer (Bern)
    D  width of the model            loop       one application of a block
    V  tokens of the vocabulary      mixed      what mixing the positions gave in a loop, (B, T, D)
                                     state      what a loop hands to the next, (B, T, D)
"""
import argparse
import copy
import io
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import wraps
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import (BadInput, REGIMES, TRAINED, add_facts, describe_world, make_splits, make_world,
                  parse_source, read_bytes, reading, regime_name, shares_of_regime)

PARTS = ("mixed", "state")  # the two places inside a loop where a value can be read or replaced
LENGTH = {"causal": 3, "bidirectional": 4}  # positions: h r1 r2; and a blank for the answer


# ---------------------------------------------------------------- the models
def unchanged(loop, part, value):
    """The edit that changes nothing."""
    return value


class TwoHopModel(nn.Module):
    """What both models have in common: tokens in, one vector a token of the vocabulary out."""

    def __init__(self, config, n_entities, n_relations):
        super().__init__()
        self.config = config
        self.blank = n_entities + n_relations
        self.embedding = nn.Parameter(torch.empty(self.blank + 1, config.d_model))
        if not config.tied:
            self.head = nn.Parameter(torch.empty(self.blank + 1, config.d_model))

    def embed(self, tokens):
        """tokens (B, T) -> unit-RMS vectors (B, T, D)."""
        return rms_norm(self.embedding)[tokens]

    def answer_position(self, tokens):
        """(B,): the first blank, or in the causal layout the last token. So a fact alone is
        answered where a composition has r2, or in the causal layout r1."""
        n_tokens = (tokens != self.blank).sum(1)
        return n_tokens - 1 if self.config.layout == "causal" else n_tokens

    def read(self, state, tokens):
        """The state (B, T, D) at the answer position, (B, D)."""
        rows = torch.arange(len(tokens), device=tokens.device)
        return state[rows, self.answer_position(tokens)]

    def vectors(self):
        """The unembedding vectors (V, D): what the logit lens compares a state with."""
        return rms_norm(self.embedding if self.config.tied else self.head)

    def unembed(self, state):
        """Logits (..., V) of any state (..., D): scaled cosines with the unembedding vectors."""
        scale = self.config.logit_scale / math.sqrt(self.config.d_model)
        return scale * (state @ self.vectors().T)


class LoopedTransformer(TwoHopModel):
    """The teaching model: one block applied n_loops times. This is the parameter sharing of the
    paper's model (Figure 1) with nothing around it.

    `edit(loop, part, value) -> value` is called in every loop with ("mixed", (B, T, D)), then with
    ("state", (B, T, D)): the one hook behind loss, lens, probe and all patching."""

    def __init__(self, config, n_entities, n_relations):
        super().__init__(config, n_entities, n_relations)
        self.n_loops = config.n_loops
        self.loop_names = [f"loop {loop + 1}" for loop in range(self.n_loops)]
        self.stages = list(range(self.n_loops))  # the lens looks after every loop
        self.first_graded = config.min_loops - 1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_blocks))
            for name, weight in self.named_parameters():
                fan_in = weight.shape[1] if name.startswith("blocks") else 1
                nn.init.normal_(weight, std=fan_in ** -0.5)

    def forward(self, tokens, n_loops=None, edit=unchanged):
        """tokens (B, T) -> logits (B, V) at each query's answer position."""
        x = self.embed(tokens)                                                  # (B, T, D)
        state = x
        for loop in range(self.n_loops if n_loops is None else n_loops):
            # the sharing: with one block, every loop goes through the same weights
            block = self.blocks[loop % len(self.blocks)]
            mixed = edit(loop, "mixed", block.mix(state))
            # a loop restarts from the input: the old state is passed on through mixing alone
            state = edit(loop, "state", block.mlp(x + mixed))
        return self.unembed(self.read(state, tokens))


class Block(nn.Module):
    """Mixing between the positions, and the MLP that follows it, which has no residual."""

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        hidden = 8 * D // 3
        self.mix = Attention(config) if config.mixing == "attention" else TokenMixing(config)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def mlp(self, x):
        """x (..., D) -> what each position makes of what it holds and has mixed, (..., D)."""
        return rms_norm(gated(self.gate_up, self.down, rms_norm(x)))


def rms_norm(x):
    """x scaled to root mean square 1 along its last axis; no gain is learned."""
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


def gated(gate_up, down, x):
    """A gated MLP (SwiGLU) along the last axis: half of the hidden units gate the other half."""
    gate, up = gate_up(x).chunk(2, dim=-1)
    return down(F.silu(gate) * up)


class Attention(nn.Module):
    """Mixing by causal attention with one head and rotary positions (RoPE)."""

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        T = LENGTH[config.layout]
        self.causal = config.layout == "causal"
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)
        half = D // 2
        angle = torch.arange(T)[:, None] * 100.0 ** (-torch.arange(half) / half)    # (T, D/2)
        self.register_buffer("cos", torch.cat([angle.cos()] * 2, -1), persistent=False)
        self.register_buffer("sin", torch.cat([-angle.sin(), angle.sin()], -1), persistent=False)

    def forward(self, state):
        q, k, v = self.qkv(state).chunk(3, dim=-1)                              # (B, T, D) each
        q = rotate(q, self.cos, self.sin)
        k = rotate(k, self.cos, self.sin)
        return self.out(attend(q, k, v, self.causal))


def rotate(x, cos, sin):
    """RoPE: turn x (B, T, D) by the angles of its positions; channel i pairs with i + D/2."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attend(q, k, v, causal):
    """Softmax attention over (B, T, D), written out to be read."""
    score = q @ k.mT / math.sqrt(q.shape[-1])                                   # (B, T, T)
    if causal:
        future = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        score = score.masked_fill(future, -torch.inf)
    return score.softmax(-1) @ v


class TokenMixing(nn.Module):
    """Mixing by a gated MLP along the positions, each with weights of its own (as in the paper)."""

    def __init__(self, config):
        super().__init__()
        T = LENGTH[config.layout]
        self.gate_up = nn.Linear(T, 8 * T, bias=False)
        self.down = nn.Linear(4 * T, T, bias=False)
        self.out = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, state):
        B, T, D = state.shape
        columns = state.transpose(0, 1).reshape(T, B * D)  # four times as fast as (B, D, T) here
        gate, up = (self.gate_up.weight @ columns).chunk(2, dim=0)              # (4T, B * D) each
        mixed = self.down.weight @ (F.silu(gate) * up)                          # (T, B * D)
        return self.out(mixed.view(T, B, D).transpose(0, 1))


# ---------------------------------------------------------------- the paper's own model
class RecursiveTransformer(TwoHopModel):
    """The paper's own recursion (Section 3; Jolicoeur-Martineau, TRM, arXiv 2510.04871): two shared
    blocks, and two states. z_L is refined n_low times from itself, z_H and the input; then z_H
    once from itself and z_L; all this n_cycles times. The answer is read from the last z_H.

    One *pass* goes through all blocks; one *loop* is one block, so at the paper's sizes there are
    2 * (6 + 1) * 2 = 28 loops. The same `edit(loop, part, value)` is called in each.
    Differs from the paper: plain cross-entropy, which its StableMax replaces; no halting loss, for
    none of its runs halts; and both norms run over the channels, where the paper's code lets the
    first one run over the positions: over four of them the model then fits much later."""

    def __init__(self, config, n_entities, n_relations):
        super().__init__(config, n_entities, n_relations)
        self.loop_names = name_loops(config)
        self.n_loops = len(self.loop_names)
        # the paper's lens looks after every pass, so after the last block of each
        self.stages = list(range(config.n_blocks - 1, self.n_loops, config.n_blocks))
        self.first_graded = self.n_loops - 1
        self.scratch = nn.Parameter(torch.empty(config.slots, config.d_model))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.blocks = nn.ModuleList(ResidualBlock(config) for _ in range(config.n_blocks))
            for name, weight in self.named_parameters():
                fan_in = 1 if name in ("embedding", "scratch") else weight.shape[1]
                nn.init.normal_(weight, std=fan_in ** -0.5)
            # the first states are drawn once and never trained
            self.register_buffer("first_low", torch.randn(config.d_model))
            self.register_buffer("first_high", torch.randn(config.d_model))

    def forward(self, tokens, edit=unchanged):
        """tokens (B, T) -> logits (B, V) at each query's answer position."""
        x = self.embed(tokens).transpose(0, 1).contiguous()                     # (T, B, D)
        z_low = self.first_low.expand(x.shape)
        z_high = self.first_high.expand(x.shape)
        loop = 0
        for cycle in range(self.config.n_cycles):
            # the gradient runs through the last cycle only (the paper's training)
            trains = torch.is_grad_enabled() and cycle == self.config.n_cycles - 1
            with torch.set_grad_enabled(trains):
                for _ in range(self.config.n_low):
                    z_low, loop = self.one_pass(z_low + z_high + x, loop, edit)
                if self.config.two_states:
                    z_high, loop = self.one_pass(z_high + z_low, loop, edit)
        last = z_high if self.config.two_states else z_low
        return self.unembed(self.read(last.transpose(0, 1), tokens))

    def embed(self, tokens):
        """tokens (B, T) -> vectors (B, T + slots, D), not normalised; scratch slots come last."""
        slots = self.scratch.expand(len(tokens), -1, -1)
        return torch.cat([self.embedding[tokens], slots], dim=1)

    def vectors(self):
        """The unembedding vectors (V, D), not normalised."""
        return self.head

    def unembed(self, state):
        """Logits (..., V) of any state (..., D)."""
        return state @ self.head.T

    def one_pass(self, z, loop, edit):
        """z (T, B, D) through all blocks -> (z, the number of the next loop)."""
        for block in self.blocks:
            z = block(z, loop, edit)
            loop += 1
        return z, loop


class ResidualBlock(nn.Module):
    """Token mixing, then a gated MLP, each with a residual connection and the norm after it. The
    state lies as (T, B, D), so mixing the positions is one matrix product and copies nothing."""

    def __init__(self, config):
        super().__init__()
        D = config.d_model
        T = LENGTH[config.layout] + config.slots
        hidden = 8 * D // 3
        self.residual = config.residual
        self.mix_gate_up = nn.Linear(T, 8 * T, bias=False)
        self.mix_down = nn.Linear(4 * T, T, bias=False)
        self.gate_up = nn.Linear(D, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, D, bias=False)

    def forward(self, z, loop, edit):
        mixed = edit(loop, "mixed", self.mix(z).transpose(0, 1))                # (B, T, D)
        z = self.add(z, mixed.transpose(0, 1))
        z = self.add(z, gated(self.gate_up, self.down, z))
        state = edit(loop, "state", z.transpose(0, 1))                          # (B, T, D)
        return state.transpose(0, 1)

    def add(self, z, change):
        """The residual connection and the norm after it; without it, the change alone is left."""
        return rms_norm(z + change if self.residual else change)

    def mix(self, z):
        """z (T, B, D) -> a gated MLP along the positions, (T, B, D)."""
        gate, up = (self.mix_gate_up.weight @ z.flatten(1)).chunk(2, dim=0)     # (4T, B * D) each
        return (self.mix_down.weight @ (F.silu(gate) * up)).view(z.shape)


def name_loops(config):
    """["z_L pass 1, block 1", ...]: one name a loop of the recursive model."""
    names = []
    for cycle in range(config.n_cycles):
        first = cycle * config.n_low + 1
        passes = [f"z_L pass {number}" for number in range(first, first + config.n_low)]
        if config.two_states:
            passes.append(f"z_H pass {cycle + 1}")
        for name in passes:
            names.extend(f"{name}, block {block + 1}" for block in range(config.n_blocks))
    return names


def build_model(config, n_entities, n_relations):
    """The untrained model that the Config describes."""
    kind = LoopedTransformer if config.model == "looped" else RecursiveTransformer
    return kind(config, n_entities, n_relations)


def to_tokens(queries, world, layout):
    """Queries -> tokens (N, T), answers (N,): entity e is e, relation r is E + r, blank E + R."""
    E = world.n_entities
    blank = E + world.n_relations
    tokens = np.full((len(queries.h), LENGTH[layout]), blank)
    tokens[:, 0] = queries.h
    tokens[:, 1] = E + queries.r1
    tokens[:, 2] = np.where(queries.r2 >= 0, E + queries.r2, blank)
    return torch.from_numpy(tokens), torch.from_numpy(np.asarray(queries.t))


# ---------------------------------------------------------------- what is measured while training
def run_values(model, tokens):
    """What was mixed, and the state, in every loop: {"mixed", "state": (n_loops, B, T, D)}."""
    values = {part: [] for part in PARTS}

    def keep(loop, part, value):
        values[part].append(value)
        return value

    model(tokens, edit=keep)
    return {part: torch.stack(kept) for part, kept in values.items()}


def lens_rates(top, wanted):
    """How often `wanted` (B,) is the top-1 token in top (n_loops, B, T).
    {"map": (n_loops, T) share at each site; "any": at one site at least (the paper's measure);
    "best": at one fixed site, chosen on every other query and scored on the rest, None if there is
    no rest; "best_site": that (loop, position)}."""
    hit = top == wanted[None, :, None]
    choice = hit[:, ::2].float().mean(1)                                        # (n_loops, T)
    loop, position = divmod(choice.argmax().item(), choice.shape[1])
    scored = hit[loop, 1::2, position].float()
    return {"map": hit.float().mean(1).tolist(),
            "any": hit.any(2).any(0).float().mean().item(),
            "best": scored.mean().item() if len(scored) else None,
            "best_site": [loop, position]}


@torch.no_grad()
def evaluate(model, eval_sets):
    """{"accuracy": {split: share right}, "lens": {split of compositions: what the lens reads}}.
    Lens (paper, Section 4 and Figure 2): the bridge at "any" site and at the "best" one, each with
    its chance level, which is the rate of another query's bridge (None if there is no other), and
    the answer. Queries whose bridge is their own head count as all others do, here."""
    accuracy = {}
    lens = {}
    for split, (tokens, answers, bridges) in eval_sets.items():
        states = run_values(model, tokens)["state"][model.stages]       # (S, B, T + slots, D)
        right = model.unembed(model.read(states[-1], tokens)).argmax(-1) == answers
        accuracy[split] = right.float().mean().item()
        if split.endswith("atomic") or split == "train_inferred":
            continue
        top = model.unembed(states[:, :, :tokens.shape[1]]).argmax(-1)          # (S, B, T)
        seen = lens_rates(top, bridges)
        chance = lens_rates(top, bridges.roll(1))
        lens[split] = {"any": seen["any"],
                       "any_chance": chance["any"] if len(tokens) > 1 else None,
                       "best": seen["best"],
                       "best_chance": chance["best"],
                       "answer_any": lens_rates(top, answers)["any"]}
    return {"accuracy": accuracy, "lens": lens}


def make_eval_sets(splits, world, layout, device, most=500):
    """{split: (tokens, answers, bridges)} of up to `most` random queries; empty splits left out."""
    rng = np.random.default_rng(0)
    eval_sets = {}
    for name, queries in splits.items():
        chosen = queries.shuffled(rng).take(slice(most))
        if len(chosen.h):
            tokens, answers = to_tokens(chosen, world, layout)
            columns = (tokens, answers, torch.from_numpy(chosen.b))
            eval_sets[name] = tuple(column.to(device) for column in columns)
    return eval_sets


# ---------------------------------------------------------------- training
def training_rows(splits, world, layout, device):
    """All training rows, facts first: tokens (N, T), answers (N,), number of facts."""
    tokens = []
    answers = []
    n_facts = 0
    for name in TRAINED:
        if name in splits:
            split_tokens, split_answers = to_tokens(splits[name], world, layout)
            tokens.append(split_tokens)
            answers.append(split_answers)
            if name.endswith("atomic"):
                n_facts += len(split_tokens)
    return torch.cat(tokens).to(device), torch.cat(answers).to(device), n_facts


def draw_batch(config, n_facts, n_rows, generator):
    """Row numbers (B,) of one batch, with replacement; atomic_share 0: uniform sampling (paper)."""
    where = {"generator": generator, "device": generator.device}
    B = config.batch_size
    if config.atomic_share == 0:
        return torch.randint(0, n_rows, (B,), **where)
    n_atomic = round(config.atomic_share * B)
    facts = torch.randint(0, n_facts, (n_atomic,), **where)
    compositions = torch.randint(n_facts, n_rows, (B - n_atomic,), **where)
    return torch.cat([facts, compositions])


def loss_of(model, tokens, answers):
    """Cross-entropy of what is graded, mean over the graded loops (deep supervision, if several).
    Graded is the answer. With `copy` it is every position: each has to show its own token and, at
    the answer position, the answer (the paper's loss, over the whole copied sequence)."""
    copies = model.config.copy
    targets = answers[:, None]                                                  # (B, 1)
    if copies:
        position = model.answer_position(tokens)[:, None]                       # (B, 1)
        targets = tokens.scatter(1, position, targets)                          # (B, T)
    graded = []

    def keep(loop, part, value):
        if part == "state" and loop >= model.first_graded:
            read = value[:, :tokens.shape[1]] if copies else model.read(value, tokens)[:, None]
            graded.append(read)                                                 # (B, T or 1, D)
        return value

    model(tokens, edit=keep)
    logits = model.unembed(torch.stack(graded))                                 # (G, B, T or 1, V)
    return F.cross_entropy(logits.flatten(0, 2), targets.repeat(len(graded), 1).flatten())


def step_size(config, step):
    """The step size of step 0, 1, ...: a linear rise over `warmup` steps, then constant, then, over
    the last share `decay` of all steps, a linear fall to a fiftieth."""
    rise = min(1.0, (step + 1) / max(1, config.warmup))
    if config.decay == 0:
        return config.lr * rise
    left = (config.steps - step) / (config.decay * config.steps)
    return config.lr * rise * min(1.0, max(0.02, left))


class Trainer:
    """All that changes in a run: weights, their average, optimiser, draws, what was measured."""
    SAVED = ("model", "average", "optimizer")

    def __init__(self, config, world, splits):
        self.config = config
        self.device = torch.device(config.device)
        self.model = build_model(config, world.n_entities, world.n_relations).to(self.device)
        self.average = copy.deepcopy(self.model).requires_grad_(False)
        self.weights = list(self.model.parameters())
        self.averaged = list(self.average.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, lr=config.lr, betas=(0.9, config.beta2),
                                           weight_decay=config.weight_decay, fused=True)
        self.generator = torch.Generator(self.device).manual_seed(config.seed)
        self.tokens, self.answers, self.n_facts = training_rows(
            splits, world, config.layout, self.device)
        self.eval_sets = make_eval_sets(splits, world, config.layout, self.device)
        self.step = 0
        self.history = []  # a line an evaluation
        self.losses = []   # since the last evaluation
        self.started = time.perf_counter()

    def train_step(self):
        """One step. The loss stays on the device: the host does not wait for it."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = step_size(config, self.step)
        rows = draw_batch(config, self.n_facts, len(self.tokens), self.generator)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
            loss = loss_of(self.model, self.tokens[rows], self.answers[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        decay = min(config.ema, (self.step + 1) / (self.step + 11))
        with torch.no_grad():
            for averaged, weight in zip(self.averaged, self.weights):
                averaged.lerp_(weight, 1 - decay)
        self.losses.append(loss.detach())
        self.step += 1

    def is_at_evaluation(self):
        """Whether this step is one to measure after."""
        return self.step % self.config.eval_every == 0 or self.step == self.config.steps

    def measure(self):
        """Append a line of metrics.jsonl to the history and return it:

        {"step", "loss": mean since the last line, "seconds", "accuracy": {split: share right},
         "lens": {split: {"any", "any_chance", "best", "best_chance", "answer_any"}}}
        Raises BadInput if a loss since the last line, or a weight now, is not finite."""
        losses = torch.stack(self.losses)
        step_of_first = self.step - len(losses) + 1
        spoilt = [step_of_first + int(row) for row in (~torch.isfinite(losses)).nonzero()]
        if not all(weight.isfinite().all() for weight in self.averaged):
            spoilt.append(self.step)  # a last step that spoiled the weights: no loss shows it yet
        if spoilt:
            raise BadInput(f"loss is not finite at step {spoilt[0]}: lower lr = "
                           f"{self.config.lr:g}; nothing after the last save is kept")
        self.losses.clear()
        self.history.append({"step": self.step, "loss": losses.mean().item(),
                             "seconds": round(self.seconds(), 1),
                             **evaluate(self.average, self.eval_sets)})
        return self.history[-1]

    def seconds(self):
        """Seconds of training so far, those before an interruption included."""
        return time.perf_counter() - self.started

    def state_dict(self):
        """What last.pt holds."""
        parts = {name: getattr(self, name).state_dict() for name in self.SAVED}
        return {"step": self.step, "history": self.history, "losses": self.losses,
                "seconds": self.seconds(), "draws": self.generator.get_state(), **parts}

    def load_state_dict(self, saved):
        """Go on from what last.pt holds."""
        for name in self.SAVED:
            getattr(self, name).load_state_dict(saved[name])
        self.generator.set_state(saved["draws"])
        self.step = saved["step"]
        self.history = saved["history"]
        self.losses = [loss.to(self.device) for loss in saved["losses"]]
        self.started = time.perf_counter() - saved["seconds"]


def train(trainer, folder):
    """Train to the end; leaves in `folder` fit.pt (weights at the first evaluation with training
    >= .99), end.pt (weights at the end), last.pt (to go on from) and metrics.jsonl (a line an
    evaluation, see `measure`). Saves once a minute, too, and on Ctrl-C, which ends a step first."""
    config = trainer.config
    saved = time.perf_counter()
    with interrupts_counted() as interrupts:
        while trainer.step < config.steps:
            trainer.train_step()
            if trainer.is_at_evaluation():
                trainer.measure()
                save_evaluation(trainer, folder)
                show_progress(trainer)
            if interrupts or time.perf_counter() - saved > 60:
                write_checkpoint(folder / "last.pt", trainer.state_dict())
                saved = time.perf_counter()
            if interrupts:
                raise KeyboardInterrupt(f"stopped at step {trainer.step}; the same command goes on")


@contextmanager
def interrupts_counted():
    """A list that every Ctrl-C lengthens, in place of an exception in the middle of a step; the
    third ends the program after all."""
    interrupts = []

    def count(number, frame):
        interrupts.append(number)
        if len(interrupts) > 2:
            raise KeyboardInterrupt("stopped")

    if threading.current_thread() is not threading.main_thread():
        yield interrupts  # only the main thread may say what Ctrl-C does
        return
    previous = signal.signal(signal.SIGINT, count)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, previous)


def save_evaluation(trainer, folder):
    """Write what an evaluation leaves. metrics.jsonl comes last: it alone says what is done."""
    right = trainer.history[-1]["accuracy"]["train_inferred"]
    if right >= 0.99 and not (folder / "fit.pt").exists():
        save_weights(trainer, folder / "fit.pt")
    if trainer.step == trainer.config.steps:
        save_weights(trainer, folder / "end.pt")
    write_checkpoint(folder / "last.pt", trainer.state_dict())
    write_metrics(trainer, folder)


# ---------------------------------------------------------------- the settings
def setting(default, help, least=None, most=None, words=()):
    """A field of Config with its help, and its limits or the words it may be."""
    return field(default=default, metadata=dict(help=help, least=least, most=most, words=words))


GROUPS = {"n_entities": "the world", "model": "the model", "min_loops": "training",
          "preset": "the run"}  # the first setting of each group, in the order of Config
MOST_STEPS = 10**9
MOST_SEED = 2**63 - 1


@dataclass(frozen=True)
class Config:
    """All settings of a run, checked when made. A line more is a flag more."""
    # the world (paper, Section 3 and Appendix C)
    n_entities: int = setting(40, "entities E", 2, 10**6)
    n_relations: int = setting(40, "relations R", 1, 10**5)
    out_degree: int = setting(28, "facts a head entity has, each with its own relation", 1, 10**5)
    ood_fraction: float = setting(0.125, "share of the facts that are OOD", 0, 1)
    phi: float = setting(18.0, "training compositions per ID fact", 0, 10**5)
    data_seed: int = setting(0, "seed of graph and splits", 0, MOST_SEED)
    hop1: float = setting(0.0, "share of the OOD test facts supervised as hop 1", 0, 1)
    hop2: float = setting(0.0, "share of the OOD test facts supervised as hop 2", 0, 1)
    k: int = setting(18, "training compositions for each supervised fact", 1, 10**5)
    new_facts: int = setting(0, "facts added by fine-tuning, in place of the OOD facts", 0, 10**7)
    kept: float = setting(1.0, "share of the ID facts kept when fine-tuning", 0, 1)
    exposed: float = setting(0.0, "share of the new facts trained in compositions, too", 0, 1)
    exposed_k: int = setting(4, "their compositions, as hop 1 and as hop 2", 1, 10**5)
    # the model
    model: str = setting("looped", "the teaching model, or the paper's own",
                         words=("looped", "recursive"))
    layout: str = setting("causal", "h r1 r2, answered at r2; or with a blank after it (paper)",
                          words=("causal", "bidirectional"))
    mixing: str = setting("attention", "between positions; tokens: an MLP over them (paper)",
                          words=("attention", "tokens"))
    tied: bool = setting(True, "one matrix reads tokens and gives answers; false: two (paper)")
    copy: bool = setting(False, "grade every token of the sequence (paper), or the answer alone")
    d_model: int = setting(64, "width D", 4, 2**14)
    n_loops: int = setting(4, "looped: applications of a block", 1, 128)
    n_blocks: int = setting(1, "blocks, used in turn; n_loops of them: nothing is shared", 1, 128)
    logit_scale: float = setting(0.8, "looped: logits = scale * sqrt(D) * cosine", 1e-6, 1e6)
    n_low: int = setting(6, "recursive: passes of z_L for one of z_H", 1, 128)
    n_cycles: int = setting(2, "recursive: how often, the last with a gradient", 1, 128)
    slots: int = setting(0, "recursive: scratch positions (paper: 16)", 0, 64)
    residual: bool = setting(True, "recursive: add to z what a block makes of it (paper)")
    two_states: bool = setting(True, "recursive: z_L and z_H (paper); false: z_H never changes")
    # training
    min_loops: int = setting(2, "looped: graded are this loop and all later ones", 1, 128)
    atomic_share: float = setting(0.4, "share of a batch that is facts; 0: uniform sampling "
                                  "(paper)", 0, 1)
    lr: float = setting(4e-3, "AdamW step size", 0, 10)
    decay: float = setting(0.4, "share of the steps, at the end, in which it falls", 0, 1)
    warmup: int = setting(200, "steps in which it rises", 0, MOST_STEPS)
    weight_decay: float = setting(0.3, "AdamW weight decay, on every parameter", 0, 1000)
    beta2: float = setting(0.98, "AdamW decay of the squared gradients", 0, 0.999999)
    batch_size: int = setting(256, "queries a step", 1, 2**20)
    steps: int = setting(3500, "training steps", 1, MOST_STEPS)
    ema: float = setting(0.995, "decay of the averaged weights, which are evaluated", 0, 1)
    bf16: bool = setting(False, "train with matrix products in bfloat16")
    eval_every: int = setting(100, "steps between evaluations", 1, MOST_STEPS)
    # the run
    preset: str = setting("tiny", "where the settings come from that are not given")
    seed: int = setting(0, "seed of first weights and batches", 0, MOST_SEED)
    device: str = setting("cpu", "cuda, mps or cpu", words=("cuda", "mps", "cpu"))
    facts: str = setting("", "your own facts: a file of lines head, relation, tail, tab-separated",
                         words=("", "facts.tsv", "facts.npz"))
    weights: str = setting("", "with --start: its weights at the fit or the end, or none",
                           words=("", "fit", "end", "none"))
    new_mlp: bool = setting(False, "with --start: all but its MLPs, which are drawn afresh")

    def __post_init__(self):
        for item in fields(self):
            check_value(item.name, getattr(self, item.name), item.type, item.metadata)
        check_model(self)
        check_training(self)


def check_value(name, value, kind, limits):
    """Refuse a value of another type, out of its limits, or not one of its words."""
    is_whole_float = kind is float and type(value) is int
    if type(value) is not kind and not is_whole_float:
        raise BadInput(f"{name} = {value!r}: must be {kind.__name__}")
    words = limits.get("words")
    if words and value not in words:
        said = ", ".join(word for word in words if word)
        raise BadInput(f"{name} = {value}: must be one of {said}")
    least = limits.get("least")
    most = limits.get("most")
    if least is not None and not least <= value <= most:
        raise BadInput(f"{name} = {value}: must lie in [{least}, {most}]")


def check_model(config):
    """Refuse settings of the model that do not go together, or would be ignored."""
    not_used_by = {"looped": ("n_low", "n_cycles", "slots", "residual", "two_states"),
                   "recursive": ("n_loops", "min_loops", "logit_scale")}
    for name in not_used_by[config.model]:
        if getattr(config, name) != DEFAULTS[name]:
            raise BadInput(f"{name} = {getattr(config, name)}: model = {config.model} has none")
    is_paper_like = (config.layout == "bidirectional" and config.mixing == "tokens"
                     and config.copy and not config.tied)
    if config.model == "recursive" and not is_paper_like:
        raise BadInput("model = recursive: needs layout = bidirectional, mixing = tokens, "
                       "tied = false, copy = true")
    if config.layout == "causal" and (config.mixing == "tokens" or config.copy):
        raise BadInput("layout = causal: needs mixing = attention, copy = false")
    if config.mixing == "attention" and config.d_model % 2:
        raise BadInput(f"d_model = {config.d_model}: must be even for attention")
    for name in ("min_loops", "n_blocks"):
        value = getattr(config, name)
        if config.model == "looped" and value > config.n_loops:
            raise BadInput(f"{name} = {value}: must lie in [1, n_loops = {config.n_loops}]")


def check_training(config):
    """Refuse what would train nothing, or would be ignored."""
    n_atomic = round(config.atomic_share * config.batch_size)
    if config.atomic_share > 0 and not 0 < n_atomic < config.batch_size:
        raise BadInput(f"atomic_share = {config.atomic_share:g}: a batch of {config.batch_size} "
                       f"would have {n_atomic} facts; must leave room for both kinds, or be 0")
    if config.out_degree > config.n_relations:
        raise BadInput(f"out_degree = {config.out_degree}: must lie in "
                       f"[1, n_relations = {config.n_relations}]")
    if config.preset not in PRESETS:
        raise BadInput(f"preset = {config.preset}: must be one of {', '.join(PRESETS)}")
    is_supervised = config.hop1 > 0 or config.hop2 > 0
    is_exposed = config.exposed > 0
    is_tuning = config.new_facts > 0
    has_start = config.weights in ("fit", "end")
    for name, is_used, need in (("k", is_supervised, "hop1 or hop2 above 0"),
                                ("exposed_k", is_exposed, "exposed above 0"),
                                ("kept", is_tuning, "new_facts above 0"),
                                ("exposed", is_tuning, "new_facts above 0"),
                                ("weights", is_tuning, "new_facts above 0"),
                                ("new_mlp", has_start, "weights = fit or end")):
        value = getattr(config, name)
        if value != DEFAULTS[name] and not is_used:
            raise BadInput(f"{name} = {value}: needs {need}")


DEFAULTS = {item.name: item.default for item in fields(Config)}

PRESETS = {  # name: (what it is for, how long it takes, settings)
    "tiny": ("the quick look", "1 to 2 minutes on two CPU cores", {}),
    "small": ("the paper's conditions in small, on the teaching model", "2 to 3 minutes",
              dict(layout="bidirectional", mixing="tokens", tied=False, copy=True, min_loops=4,
                   d_model=96, logit_scale=0.9, atomic_share=0.2, decay=0.0, steps=3000)),
    "trm": ("the same with the paper's own recursion", "5 to 10 minutes",
            dict(model="recursive", layout="bidirectional", mixing="tokens", tied=False, copy=True,
                 n_blocks=2, d_model=96, atomic_share=0.2, lr=3e-3, decay=0.0, bf16=True,
                 steps=3000)),
    "tune": ("new facts for the run that --start names, which implies it", "a minute",
             dict(new_facts=140, kept=0.21, lr=2e-3, decay=0.0, steps=500, eval_every=50)),
    "smoke": ("nothing but a test", "seconds",
              dict(n_entities=12, n_relations=8, out_degree=6, ood_fraction=0.2, phi=4.0,
                   d_model=32, n_loops=3, batch_size=64, decay=0.0, steps=200, warmup=20,
                   eval_every=50)),
    "paper": ("the paper's model in the paper's world, for a GPU; not run to its end yet", "days",
              dict(n_entities=2000, n_relations=200, out_degree=20, ood_fraction=0.05,
                   model="recursive", layout="bidirectional", mixing="tokens", tied=False,
                   copy=True, n_blocks=2, slots=16, d_model=1536, atomic_share=0.0, lr=4e-5,
                   decay=0.0, warmup=2000, weight_decay=1.0, beta2=0.95, batch_size=512,
                   steps=1_600_000, ema=0.999, bf16=True, eval_every=1000)),
}


# ---------------------------------------------------------------- the run folder
WEIGHTS = ("fit", "end")  # fit.pt, end.pt: the shipped ones in half precision
LEFT_BY_A_RUN = ("fit.pt", "end.pt", "last.pt", "start.pt", "metrics.jsonl")


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


def write_metrics(trainer, folder):
    lines = [json.dumps(line) + "\n" for line in trainer.history]
    write_file(folder / "metrics.jsonl", "".join(lines).encode())


def read_checkpoint(path, use):
    """What `use` returns of what a .pt file holds; reading it runs no code."""
    with reading(path):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
        except (IndexError, TypeError, AttributeError) as error:  # torch's, over foreign bytes
            raise ValueError(error)
        if not isinstance(saved, dict):
            raise ValueError("holds no dict")
        return use(saved)


def read_config(folder):
    """The Config of a run folder."""
    path = Path(folder, "config.json")
    with reading(path):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("holds no settings")
        for name in values.keys() - {item.name for item in fields(Config)}:
            raise ValueError(f"{name} is no setting")
        return Config(**values)


def read_history(folder):
    """The lines of metrics.jsonl, see Trainer.measure; [] where there is none."""
    path = Path(folder, "metrics.jsonl")
    if not path.exists():
        return []
    with reading(path):
        history = [json.loads(line) for line in path.read_bytes().splitlines()]
        for line in history:
            if not isinstance(line, dict) or not {"step", "accuracy", "lens"} <= line.keys():
                raise ValueError("has a line that is no evaluation")
    return history


def last_step(history):
    """The step of the last evaluation; 0 before the first."""
    return history[-1]["step"] if history else 0


def is_finished(folder):
    """Whether the run in this folder has been trained to its end."""
    done = last_step(read_history(folder))
    return done > 0 and done == read_config(folder).steps


def read_run(folder):
    """(Config, history) of a run folder that is finished."""
    config = read_config(folder)
    history = read_history(folder)
    done = last_step(history)
    if done != config.steps:
        raise BadInput(f"{folder}: is not finished (step {done} of {config.steps})")
    return config, history


def load_data(folder):
    """(Config, world, splits) of a run, with or without its weights."""
    config = read_config(folder)
    files = {config.facts: read_bytes(Path(folder, config.facts))} if config.facts else {}
    return config, *make_data(config, files)


def load_run(folder, weights="end"):
    """(model, world, splits) of a run, on the CPU, with its weights at the "fit" or the "end"."""
    config, world, splits = load_data(folder)
    model = build_model(config, world.n_entities, world.n_relations)

    def use(saved):
        model.load_state_dict(take_weights(saved))

    read_checkpoint(Path(folder, f"{weights}.pt"), use)
    return model.eval().requires_grad_(False), world, splits


def make_data(config, files):
    """(world, splits) of a run, from its settings or from its own facts, in {name: bytes}."""
    splits = None
    if config.facts:
        world, splits = parse_source(files[config.facts], config.facts, config)
    else:
        world = make_world(config)
    if splits is None:
        splits = make_splits(world, config)
    if config.new_facts:
        world, splits = add_facts(world, splits, config)
    return world, splits


# ---------------------------------------------------------------- what the command line asks for
def settle(given):
    """(Config, {file name: bytes}) of the run that the command line's {flag: value or None} asks
    for; the files are what it takes into its folder: its own facts, the weights it starts from."""
    preset = given["preset"] or ("tune" if given["start"] else "tiny")
    if preset not in PRESETS:
        raise BadInput(f"preset = {preset}: must be one of {', '.join(PRESETS)}")
    if (preset == "tune") != bool(given["start"]):
        raise BadInput(f"preset = {preset}: tune needs --start RUN, and --start implies tune")
    if given["weights"] and not given["start"]:
        raise BadInput(f"weights = {given['weights']}: needs --start RUN")
    values = {**PRESETS[preset][2], "preset": preset}
    files = {}
    if given["start"]:
        inherited, files = take_start(Path(given["start"]), given)
        values = {**inherited, **values}
    if given["regime"]:
        values.update(shares_of_regime(given["regime"]))
    names = [item.name for item in fields(Config) if item.name != "facts"]
    values.update((name, given[name]) for name in names if given[name] is not None)
    here = [kind for kind in ("cuda", "mps", "cpu") if getattr(torch, kind).is_available()]
    values["device"] = given["device"] or here[0]
    if values["device"] not in here:
        raise BadInput(f"device = {given['device']}: must be one that is here: {', '.join(here)}")
    if given["facts"]:
        values, files = take_facts(given["facts"], values, given)
    return Config(**values), files


def settings_of(*groups):
    """The names of the settings in these GROUPS."""
    names = []
    title = "the world"
    for item in fields(Config):
        title = GROUPS.get(item.name, title)
        if title in groups:
            names.append(item.name)
    return names


def take_start(start, given):
    """(settings, {file name: bytes}) that come with the run to fine-tune: world and model, all but
    the new facts, cannot be given again."""
    fixed = [name for name in settings_of("the world", "the model")
             if name not in ("new_facts", "kept", "exposed", "exposed_k")]
    for name in (*fixed, "regime", "facts"):
        if given[name] is not None:
            raise BadInput(f"{name} = {given[name]}: comes from {start}, leave it out")
    config = read_config(start)
    if config.new_facts:
        raise BadInput(f"start = {start}: has new facts already, and would get the same again")
    weights = given["weights"] or "end"
    check_value("weights", weights, str, {"words": (*WEIGHTS, "none")})
    files = {}
    if config.facts:
        files[config.facts] = read_bytes(start / config.facts)
    if weights == "end" and not is_finished(start):
        raise BadInput(f"start = {start}: is not finished; --weights fit takes those at the fit")
    if weights != "none":
        load_run(start, weights)  # what does not fit is refused before anything is written
        files["start.pt"] = read_bytes(start / f"{weights}.pt")
    return {**asdict(config), "weights": weights}, files


def take_facts(path, values, given):
    """(settings, {file name: bytes}) with the user's own facts, which bring their graph's sizes;
    a data set with its splits (.npz) also brings all that makes splits."""
    content = read_bytes(path)
    world, splits = parse_source(content, path, Config(**values))
    brought = ["n_entities", "n_relations", "out_degree"]
    if splits is not None:
        brought = [*settings_of("the world"), "regime"]
    for name in brought:
        if given[name] is not None:
            raise BadInput(f"{name} = {given[name]}: comes with --facts, leave it out")
    name = "facts.tsv" if splits is None else "facts.npz"
    degree = int(np.bincount(world.facts[:, 0]).max())
    sizes = dict(n_entities=world.n_entities, n_relations=world.n_relations, out_degree=degree)
    say(f"{path}: {describe_world(world)}")
    return {**values, **sizes, "facts": name}, {name: content}


def steps_done(folder, config, files):
    """How far this run has come in its folder. Refuses, by name, a folder that holds anything else;
    more steps alone are the same run, which goes on."""
    if not (folder / "config.json").exists():
        for name in (*LEFT_BY_A_RUN, "facts.tsv", "facts.npz"):
            if (folder / name).exists():
                raise BadInput(f"out = {folder}: holds {name} of a run without config.json; choose "
                               "another --out")
        return 0
    earlier = read_config(folder)
    for name, value in asdict(config).items():
        if name != "steps" and value != getattr(earlier, name):
            raise BadInput(f"{name} = {value}: {folder} holds a run with {name} = "
                           f"{getattr(earlier, name)}; choose another --out")
    done = last_step(read_history(folder))
    has_last = (folder / "last.pt").exists()
    for name, content in files.items():
        if (folder / name).exists() and (folder / name).read_bytes() != content:
            raise BadInput(f"out = {folder}: holds a run with another {name}; choose another --out")
        if not (folder / name).exists() and (0 < done < config.steps or has_last):
            raise BadInput(f"out = {folder}: holds a run without its {name}; choose another --out")
    check_more_steps(folder, config, earlier, done, has_last)
    return done


def check_more_steps(folder, config, earlier, done, has_last):
    """Refuse to go on where that would not be the same run."""
    is_longer = config.steps > earlier.steps
    if config.steps < earlier.steps or (is_longer and config.decay):
        raise BadInput(f"steps = {config.steps}: {folder} holds a run of {earlier.steps}, which "
                       "cannot be shortened, nor, with decay, be lengthened; choose another --out")
    if 0 < done < config.steps and not has_last:
        raise BadInput(f"out = {folder}: holds a run of {done} steps without the last.pt to go on "
                       "from; choose another --out")


def prepare(config, files, folder):
    """The Trainer of a run, where it was left or at its first step; its folder is made ready."""
    world, splits = make_data(config, files)
    trainer = Trainer(config, world, splits)
    goes_on = (folder / "last.pt").exists()
    if goes_on:  # read before anything is written: it may be damaged
        read_checkpoint(folder / "last.pt", trainer.load_state_dict)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "config.json", (json.dumps(asdict(config), indent=1) + "\n").encode())
    for name, content in files.items():
        write_file(folder / name, content)
    if goes_on:
        write_metrics(trainer, folder)  # it may have been stopped just before
    elif (folder / "start.pt").exists():
        weights = read_checkpoint(folder / "start.pt", take_weights)
        if config.new_mlp:
            weights.update(mlp_weights(trainer.model))  # as they were drawn for this run
        trainer.model.load_state_dict(weights)
        trainer.average.load_state_dict(weights)
    return trainer


def mlp_weights(model):
    """{name: weight} of all that the MLPs of the blocks are made of."""
    return {name: weight for name, weight in model.state_dict().items()
            if name.startswith("blocks") and ".mix" not in name}


def take_weights(saved):
    """The weights in what a .pt file holds."""
    if not isinstance(saved["weights"], dict):
        raise ValueError("holds no weights")
    return saved["weights"]


# ---------------------------------------------------------------- the command line
def command(name):
    """Makes a function of argv, the command line, the main of a command: it returns the exit
    status (0 where the function returns None), and says in one line what cannot be used or is
    lacking."""
    def decorate(body):
        @wraps(body)
        def main(argv=None):
            try:
                return body(argv) or 0
            except (KeyboardInterrupt, BadInput, OSError, MemoryError, RuntimeError) as error:
                reason = reason_of(error)
                if reason is None:  # a mistake of ours: it shows where
                    raise
                print(f"{name}: {reason.splitlines()[0]}", file=sys.stderr)
                return 130 if isinstance(error, KeyboardInterrupt) else 2

        return main

    return decorate


@command("grok.py")
def main(argv=None):
    """Train a run, or say that it is done; exit status 0, 2 for bad input, 130 when stopped."""
    given = parse(argv)
    config, files = settle(given)
    default = Path("runs", config.preset, regime_name(config), f"seed{config.seed}")
    folder = Path(given["out"] or default)
    say(f"{config.preset}, {regime_name(config)}, on {config.device} with "
        f"{torch.get_num_threads()} threads, in {folder.as_posix()}")
    if steps_done(folder, config, files) == config.steps:
        say("already done")
    else:
        train(prepare(config, files, folder), folder)
    print_result(folder)


def reason_of(error):
    """Why a command ends, in words; None if a RuntimeError names nothing that the machine lacks."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        return text or "stopped"
    if isinstance(error, (BadInput, OSError)):
        return text or type(error).__name__
    tried = "tried to allocate" in text.lower() or "allocate memory" in text
    if tried or isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return f"not enough memory ({' '.join(text.split())}); a smaller --batch-size needs less"
    if "no kernel image" in text:
        return "this GPU has no kernels in this PyTorch; --device cpu trains without it"
    return None


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, whose flags have one spelling, and no empty value."""
    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message):
        raise BadInput(message)

    def parse_args(self, argv=None):
        words = sys.argv[1:] if argv is None else argv
        for flag, word in zip(["an argument", *words], words):
            if word == "" or word.startswith("--") and word.endswith("="):
                name = (word or flag).strip("-=").replace("-", "_")
                raise BadInput(f"{name}: is empty; leave it out, or give it a value")
        return super().parse_args(words)


def parse(argv=None):
    """{flag: value, None where not given}."""
    presets = "\n".join(f"  {name:6} {purpose} ({duration})"
                        for name, (purpose, duration, _) in PRESETS.items())
    parser = Parser(prog="grok.py", usage="grok.py [--SETTING VALUE ...]",
                    formatter_class=argparse.RawDescriptionHelpFormatter,
                    description="Train a tiny transformer until it groks. If it is interrupted, "
                    "the same command goes on.\n\npresets, for --preset:\n" + presets)
    group = parser  # of a setting that stands above the first group
    for item in fields(Config):
        if item.name in GROUPS:
            group = parser.add_argument_group(GROUPS[item.name])
        words = [word for word in item.metadata.get("words", ()) if word]
        shown = f" [{', '.join(words)}]" if words and item.name != "facts" else ""
        default = "" if item.default == "" else f" ({item.default})"
        group.add_argument("--" + item.name.replace("_", "-"), metavar="V",
                           type=truth if item.type is bool else item.type,
                           help=f"{item.metadata.get('help', '')}{shown}{default}")
    group.add_argument("--regime", metavar="V", help="hop1, hop2 and k by the paper's names "
                       f"[{', '.join(REGIMES)}]")
    group.add_argument("--start", metavar="RUN", help="the run to fine-tune on new facts")
    group.add_argument("--out", metavar="FOLDER", help="(runs/PRESET/REGIME/seedK)")
    return vars(parser.parse_args(argv))


def truth(text):
    """What "true" and "false" mean; any other word is left for Config to refuse."""
    return {"true": True, "false": False}.get(text.lower(), text)


def say(text, end="\n"):
    """Print, whatever characters the terminal or file can hold."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end=end, flush=True)


def show_progress(trainer):
    """The shares right so far and the minutes left: one line that changes on a terminal, else one
    line an evaluation."""
    line = trainer.history[-1]
    steps = trainer.config.steps
    names = [name for name in ("train_inferred", "test_id", "test_ood", "new_old", "old_new")
             if name in line["accuracy"]]
    shares = "  ".join(f"{name} {line['accuracy'][name]:.3f}" for name in names)
    minutes = line["seconds"] * (steps / line["step"] - 1) / 60
    text = f"step {line['step']:>6} of {steps}  {shares}  {minutes:.1f} minutes left"
    if sys.stdout.isatty():
        say("\r" + text.ljust(100), end="\n" if line["step"] == steps else "")
    else:
        say(text)


def first_step(history, level, split, lens=None):
    """First step with a split's accuracy, or its lens rate of that name, >= level, or None."""
    for line in history:
        rates = line["lens"].get(split, {}) if lens else line["accuracy"]
        share = rates.get(lens or split)
        if share is not None and share >= level:
            return line["step"]
    return None


def print_result(folder):
    """What came out, in sentences, and the picture of it: curve.png in the run's folder."""
    config, history = read_run(folder)
    for sentence in tell(config, history):
        say(sentence)
    picture = folder / "curve.png"
    try:
        draw_curve(config, history).savefig(picture, dpi=130)
        say(f"The curves are in {picture.as_posix()}.")
    except OSError as error:
        say(f"No picture was written: {error}")
    say(f"To look inside: python analyze.py {shlex.quote(folder.as_posix())}")


def tell(config, history):
    """What came out, a sentence each."""
    end = history[-1]["accuracy"]
    seconds = {line["step"]: line["seconds"] for line in history}
    if config.new_facts:
        kinds = {"new_atomic": "new facts alone", "new_old": "questions new + old",
                 "old_new": "old + new", "new_new": "new + new"}
        shares = [f"{end[kind]:.3f} of the {said}" for kind, said in kinds.items() if kind in end]
        return [f"After {config.steps} steps of fine-tuning it answers {', '.join(shares)}."]
    fit = first_step(history, 0.99, "train_inferred")
    if fit is None:
        return [f"It has not fitted its training: {end['train_inferred']:.3f} right at the end."]
    told = [f"It had fitted the training questions at step {fit:,} ({seconds[fit]:.0f} s)."]
    grokked = first_step(history, 0.9, "test_ood")
    if grokked is not None:
        conclusion = ": it grokked." if end["test_ood"] >= 0.9 else "."
        told.append(f"Nine in ten of the OOD questions, which it never saw, were right at step "
                    f"{grokked:,} ({seconds[grokked]:.0f} s), {grokked / fit:.1f} times as late"
                    f"{conclusion}")
    told.append(f"At the end it answers {end['test_ood']:.3f} of the OOD questions and "
                f"{end['test_id']:.3f} of unseen ID questions.")
    if "ood_atomic" in end:
        told.append(f"Asked alone, it knows {end['ood_atomic']:.3f} of the OOD facts.")
    told.append(f"All took {history[-1]['seconds']:.0f} s on {config.device}.")
    return told


def draw_curve(config, history):
    """What is right at each step: the training, unseen ID and OOD questions (or new facts); and
    how often the lens sees the bridge of OOD questions (paper, Figure 2)."""
    shown = {"train_inferred": "training", "test_id": "unseen, ID", "test_ood": "unseen, OOD",
             "new_atomic": "new facts alone", "new_old": "new + old", "old_new": "old + new",
             "new_new": "new + new"}
    figure = Figure((7, 3.2), layout="constrained")
    axes = figure.subplots()
    steps = [line["step"] for line in history]
    for split, name in shown.items():
        if split in history[-1]["accuracy"]:
            axes.plot(steps, [line["accuracy"][split] for line in history], label=name)
    if "test_ood" in history[-1]["lens"]:
        seen = [line["lens"]["test_ood"]["any"] for line in history]
        axes.plot(steps, seen, ":", label="OOD bridge, seen by the lens")
    axes.set_xlabel("training steps")
    axes.set_ylabel("share of questions")
    axes.set_ylim(-0.03, 1.03)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    axes.set_title(f"{config.preset}, {regime_name(config)}, seed {config.seed}", fontsize=10)
    return figure


if __name__ == "__main__":
    sys.exit(main())
