"""What the project promises, against graph walks, PyTorch's layers, rules restated, hand sums."""
import copy
import errno
import hashlib
import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st

import analyze
import data
import grok
from data import (LIMITS, LISTED, REGIMES, SPLITS, TRAINED, BadInput, WorldConfig, add_facts,
                  describe_fields, make_splits, make_world, read_data, read_facts)
from grok import (Config, LoopedTransformer, PRESETS, Trainer, build_data, draw, evaluate,
                  first_step, lens_rates, load_run, loss_of, make_exams, read_run, to_tokens,
                  training_rows)

TINY = WorldConfig(n_entities=15, n_relations=9, out_degree=6, ood_fraction=0.25, phi=2.5)
WORLDS = st.builds(
    WorldConfig, n_entities=st.integers(2, 25), n_relations=st.integers(6, 12),
    out_degree=st.integers(1, 6), ood_fraction=st.floats(0, 1) | st.floats(0.1, 0.5),
    phi=st.floats(0, 12) | st.floats(0.1, 2), data_seed=st.integers(0, 2**63 - 1))
INJECTED = {"natural": {}, "both_full": {1: (1.0, 18), 2: (1.0, 18)}, "first_full": {1: (1.0, 18)},
            "both_half": {1: (0.5, 9), 2: (0.5, 9)}, "second_full": {2: (1.0, 18)}}  # Appendix C


# ---------------------------------------------------------------- data
def small_data(regime="natural", config=TINY):
    world = make_world(config)
    return world, make_splits(world, config, regime)


def triples(world):
    """{(h, r): t} and the set of marked (h, r), fact by fact; the index tells the same facts."""
    facts = {(h, r): t for h, r, t in world.facts.tolist()}
    assert len(facts) == len(world.facts) == (world.index >= 0).sum()
    for number, (h, r) in enumerate(facts):
        assert world.index[h, r] == number
    return facts, {fact for fact, ood in zip(facts, world.is_ood.tolist()) if ood}


def walks(world):
    """Every composition by a walk over the graph: {(h, r1, r2): (b, t, hop 1 OOD?, hop 2 OOD?)}."""
    facts, ood = triples(world)
    return {(h, r1, r2): (b, t, (h, r1) in ood, (b, r2) in ood)
            for (h, r1), b in facts.items() for (head, r2), t in facts.items() if head == b}


def rows(split):
    """{(h, r1, r2): (b, t)} of Queries, which must not hold one twice."""
    found = {(h, r1, r2): (b, t) for h, r1, r2, b, t in np.stack(split).T.tolist()}
    assert len(found) == len(split.h)
    return found


def atomic(facts, keys):
    """What `rows` must give for these facts."""
    return {(h, r, -1): (-1, facts[h, r]) for h, r in keys}


def of_kind(paths, first, second):
    """The compositions whose hops are OOD, or new, as given."""
    return {q for q, path in paths.items() if path[2:] == (first, second)}


def hop(paths, which, q):
    """The fact (head, relation) that is hop 1 or 2 of a composition."""
    return q[:2] if which == 1 else (paths[q][0], q[2])


def check_rules(world, config, regime, splits):
    """Every rule of the splits and of the regime, slowly, from the walks alone."""
    (facts, ood), paths = triples(world), walks(world)
    assert len(ood) == round(config.ood_fraction * len(facts)) and tuple(splits) == SPLITS
    found = {name: rows(split) for name, split in splits.items()}
    assert found["id_atomic"] == atomic(facts, set(facts) - ood)
    assert found["ood_atomic"] == atomic(facts, ood)
    for name in SPLITS[2:]:
        assert all(paths[q][:2] == answer for q, answer in found[name].items())
    train, id_id = set(found["train_inferred"]), of_kind(paths, False, False)
    ood_ood = of_kind(paths, True, True)
    assert len(train & id_id) == round(config.phi * (len(facts) - len(ood)))
    assert set(found["test_id"]) == id_id - train and len(id_id - train) >= 0.005 * len(id_id)
    assert set(found["test_ood"]) == ood_ood and not train & ood_ood
    for which, name, mixed in ((1, "test_ood_id", of_kind(paths, True, False)),
                               (2, "test_id_ood", of_kind(paths, False, True))):
        assert set(found[name]) == mixed - train
        share, k = INJECTED[regime].get(which, (0, 0))
        pool = {hop(paths, which, q) for q in ood_ood}
        there = Counter(hop(paths, which, q) for q in mixed)
        taken = Counter(hop(paths, which, q) for q in mixed & train)
        assert set(taken) <= pool and all(n == min(k, there[f]) for f, n in taken.items())
        least = len(taken)  # a fact may be chosen and have no composition
        assert least <= round(share * len(pool)) <= least + len(pool - set(there))


@pytest.mark.parametrize("regime", REGIMES)
@given(config=WORLDS)
@example(config=TINY)
@settings(max_examples=20, deadline=None)
def test_splits_obey_every_rule_of_the_paper_or_are_refused(regime, config):
    """For a phi that is refused, the limits told are legal as printed."""
    world = make_world(config)
    paths, (facts, ood) = walks(world), triples(world)
    n_id, n_ood = len(of_kind(paths, False, False)), len(of_kind(paths, True, True))
    if n_id >= 2 and n_ood and 1 <= round(config.phi * len(set(facts) - ood)) <= int(0.995 * n_id):
        return check_rules(world, config, regime, make_splits(world, config, regime))
    with pytest.raises(BadInput) as error:
        make_splits(world, config, regime)
    setting, _, limits = str(error.value).partition(": must lie in ")
    assert setting.startswith("phi = ") == bool(limits) == (n_id >= 2 and n_ood > 0)
    for phi in json.loads(limits or "[]"):
        told = replace(config, phi=float(phi))
        check_rules(world, told, regime, make_splits(world, told, regime))


@pytest.mark.parametrize("changes, said", [
    (dict(n_entities=3.0), "n_entities = 3.0: must be int"), (dict(phi=True), "phi = True: mus"),
    (dict(phi="4"), "phi = '4': must be float"), (dict(phi=float("nan")), "phi = nan: must lie in"),
    (dict(out_degree=10), "out_degree = 10: must lie in [1, n_relations = 9]"),
    (dict(n_entities=10**6, n_relations=10**5), "n_entities = 1000000: makes over 50000000 compos"),
    (dict(ood_fraction=0), "ood_fraction = 0: too few"),
    (dict(phi=1e4), "phi = 10000: must lie in [0.0147058824, 4.86764706]"),
    (dict(new_facts=46), "new_facts = 46: must lie in [0, 45]"),  # 15 heads, each without 3 of 9
    (dict(new_facts=1), "new_facts = 1, kept = 1: too few facts")])
def test_settings_that_do_not_fit_are_refused_by_name(changes, said):
    config = replace(TINY, **changes)
    with pytest.raises(BadInput, match="^" + re.escape(said)):
        add_facts(*small_data(config=config), config)


def fingerprint(world, splits):
    """Of the first 50 facts and the first 20 rows of every split: what shipped runs are made of."""
    (_, relations, tails), ood = world.facts[:50].T.tolist(), world.is_ood[:50].tolist()
    first = [[name, len(s.h), *np.stack(s)[:, :20].tolist()] for name, s in splits.items()]
    return hashlib.sha256(json.dumps([relations, tails, ood, first]).encode()).hexdigest()[:16]


def test_the_data_never_change():
    """Neither the splits of two worlds nor the new facts of a third."""
    assert fingerprint(*small_data()) == "f5f9766898b8c92a"
    assert fingerprint(*small_data("both_half", WorldConfig(out_degree=24))) == "fd8c08b8f7b686d6"
    for k, golden in ((0, "aaa6bb0a613089c1"), (4, "91d443792b44072e")):
        config = WorldConfig(new_facts=140, kept=0.21, new_k2=k)
        world, splits = add_facts(*small_data("natural", config), config)
        names = "kept_atomic", "new_atomic", "train_inferred", "new_old", "old_new", "new_new"
        assert fingerprint(world, {name: splits[name] for name in names}) == golden


def assert_same_data(one, two):
    """Worlds and splits equal to the last row, order and names included."""
    for name in ("facts", "is_ood", "index", "entity_names", "relation_names"):
        assert np.array_equal(getattr(one[0], name), getattr(two[0], name))
    assert set(one[1]) == set(two[1])
    assert all(np.array_equal(one[1][name], two[1][name]) for name in one[1])


def check_new_facts(old, old_splits, config, world, splits):
    """Every rule of fine-tuning on new facts, slowly, from the walks through both worlds alone."""
    (old_facts, old_ood), (facts, new), paths = triples(old), triples(world), walks(world)
    found, old_id = {name: rows(split) for name, split in splits.items()}, set(old_facts) - old_ood
    kept = {(h, r) for h, r, _ in found["kept_atomic"]}
    assert set(facts) - new == (old_id if config.whole_rows else kept) and kept <= old_id
    assert len(new) == config.new_facts and len(kept) == round(config.kept * len(old_id))
    assert dict(facts.items() - old_facts.items()).keys() == new and not new & set(old_facts)
    assert (world.entity_names, world.relation_names) == (old.entity_names, old.relation_names)
    assert found["kept_atomic"] == atomic(facts, kept)
    assert found["new_atomic"] == atomic(facts, new)
    assert found["old_atomic"] == atomic(old_facts, old_id)
    assert found["old_inferred"] == rows(old_splits["test_id"])
    assert set(TRAINED) & set(splits) == {"kept_atomic", "new_atomic", "train_inferred"}
    for name in ("train_inferred", "new_old", "old_new", "new_new"):
        assert all(paths[q][:2] == answer for q, answer in found[name].items())
    train = set(found["train_inferred"])
    still = {q for q, (b, _) in rows(old_splits["train_inferred"]).items()
             if {q[:2], (b, q[2])} <= set(facts) and {q[:2], (b, q[2])} & kept}
    assert train & of_kind(paths, False, False) == still
    assert set(found["new_new"]) == of_kind(paths, True, True) and not train & set(found["new_new"])
    for which, k, name, kinds in ((1, config.new_k1, "new_old", (True, False)),
                                  (2, config.new_k2, "old_new", (False, True))):
        asked = {q for q in of_kind(paths, *kinds) if hop(paths, 3 - which, q) in kept}
        there = Counter(hop(paths, which, q) for q in asked)
        taken = train & of_kind(paths, *kinds)
        assert Counter(hop(paths, which, q) for q in taken) == {
            fact: min(k, n) for fact, n in there.items() if k}
        assert taken <= asked and set(found[name]) == asked - train


@given(regime=st.sampled_from(list(REGIMES)), new_facts=st.integers(20, 45),
       kept=st.floats(0.4, 1), new_k1=st.integers(0, 4), new_k2=st.integers(0, 4),
       whole_rows=st.booleans(), data_seed=st.integers(0, 2**63 - 1))
@settings(max_examples=30, deadline=None)
def test_new_facts_obey_every_rule(regime, **changes):
    config = replace(TINY, **changes)
    world, splits = small_data(regime, config)
    check_new_facts(world, splits, config, *add_facts(world, splits, config))


def test_own_facts_keep_their_names_and_order(tmp_path):
    """One stands twice; Otto is never a head."""
    path, config = tmp_path / "family.tsv", WorldConfig(ood_fraction=0.5)
    text = ("\ufeffAnna\tmother of\tJörg\r\nJörg\tknows\t李雷\n李雷 \tknows\tAnna\n"
            "Anna\tknows\tAnna\nJörg\tknows\t李雷\n李雷\tmother of\tOtto\n\n")
    path.write_text(text, encoding="utf-8", newline="")
    world = read_facts(path, config)
    assert world.entity_names == ("Anna", "Jörg", "李雷", "Otto")
    assert world.relation_names == ("mother of", "knows") and world.is_ood.sum() == 2
    assert triples(world)[0] == {(0, 0): 1, (0, 1): 0, (1, 1): 2, (2, 1): 0, (2, 0): 3}
    assert len(data.compositions(world)[0]) == len(walks(world)) == 7


@pytest.mark.parametrize("content, said", [
    ("", "line 1: needs head, relation and tail"), ("a\tr\ta\n\na\tr\tb\n", "line 2: needs head"),
    ("a\tr\ta\na\t\tb\n", "line 2: needs"), ("\udcff", "can't decode byte"),
    ("a\tr\ta\n\ufeffb\tr\tc\nb \tr\tc\na\tr\tb\n", "line 4: another tail of .a, r."),
    ("".join(f"a{i}\tr{i}\ta0\n" for i in range(8000)), "makes over 50000000 compositions")])
def test_own_facts_that_cannot_be_used_are_refused(content, said, tmp_path):
    path = tmp_path / "facts.tsv"
    path.write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(BadInput, match="facts.tsv.*" + said):
        read_facts(path, TINY)


def write_by_hand(path, **changes):
    """The small world as the file that `read_data` describes, with some of its arrays changed."""
    world, splits = small_data("both_half")
    number = {fact: i for i, fact in enumerate(triples(world)[0])}
    names = "A\rna \0", "Jörg", *world.entity_names[2:]
    arrays = {"facts": world.facts, "is_ood": world.is_ood,
              "names": np.array(json.dumps([names, world.relation_names, "mine"]))}
    for name in LISTED:
        arrays[name] = [(number[h, r1], number[b, r2])
                        for (h, r1, r2), (b, _) in rows(splits[name]).items()]
    np.savez_compressed(path, **{**arrays, **changes})
    return replace(world, entity_names=names), splits


class Trap:
    """Fails the test when it is unpickled, past every `except Exception`."""
    def __reduce__(self):
        return pytest.fail, ("a data file ran code",)


@pytest.mark.parametrize("name, array", [
    ("facts", np.ones((90, 3))), ("facts", np.zeros((90, 2), int)), ("is_ood", np.zeros(3, bool)),
    ("test_ood", np.full((4, 2), 90)), ("facts", np.array([Trap()])), ("names", np.array("[["))])
def test_what_is_no_data_file_is_refused(name, array, tmp_path):
    write_by_hand(tmp_path / "data.npz", **{name: array})
    with pytest.raises(BadInput, match="data.npz: is no data file"):
        read_data(tmp_path / "data.npz")


# ---------------------------------------------------------------- grok: the model
SMALL = Config(d_model=16, n_heads=2, n_loops=3, batch_size=8, warmup=4, ema=0.9,
               atomic_share=0.25, eval_every=3)
E, R, BLANK = 12, 8, 20  # entities and relations of the smoke preset's world, and its blank
CPU = torch.device("cpu")
OTHER = dict(layout="bidirectional")
KINDS = {
    "default": {}, "bidirectional": OTHER, "own blocks": dict(n_blocks=3), "two": dict(n_blocks=2),
    "one loop": dict(n_loops=1, min_loops=1), "no restart": dict(restart=False),
    "residual": dict(mlp_residual=True), "usual": dict(restart=False, mlp_residual=True),
    "two matrices": dict(tied=False), "slots": dict(OTHER, slots=2), "copy": dict(OTHER, copy=True),
    "paper": dict(OTHER, mixing="tokens", tied=False, copy=True, min_loops=3, slots=3)}
every_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)
def make_model(**changes):
    """A small float64 model with E entities and R relations."""
    return LoopedTransformer(replace(SMALL, **changes), E, R).double()


def random_tokens(layout="causal", n=16):
    """n compositions followed by n atomic queries, (2 n, 3), or (2 n, 4) with a blank more."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((2 * n, 3 if layout == "causal" else 4), BLANK)
    tokens[:, 0] = torch.randint(0, E, (2 * n,), generator=generator)
    tokens[:, 1:3] = torch.randint(E, E + R, (2 * n, 2), generator=generator)
    tokens[n:, 2] = BLANK
    return tokens


def smoke_data(regime="natural"):
    return small_data(regime, WorldConfig(**PRESETS["smoke"][1]))


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up.T).tensor_split(2, dim=-1)
    return (gate * gate.sigmoid() * up) @ down.T


def restated_attention(config, state, weights):
    """With PyTorch's own attention, and RoPE by complex numbers."""
    D, d = config.d_model, config.d_model // config.n_heads
    angle = torch.arange(state.shape[1])[:, None] / 100.0 ** (torch.arange(d // 2) / (d // 2))
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)      # (T, d/2)
    q, k, v = (x.unflatten(-1, (config.n_heads, d)).transpose(1, 2)             # (B, heads, T, d)
               for x in (state @ weights["mix.qkv.weight"].T).split(D, dim=-1))
    q, k = (torch.complex(*x.split(d // 2, dim=-1)) * turn for x in (q, k))
    q, k = (torch.cat([x.real, x.imag], dim=-1) for x in (q, k))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=config.layout == "causal")
    return mixed.transpose(1, 2).flatten(2) @ weights["mix.out.weight"].T


def restated(model, tokens, n_loops):
    """The logits at every position, (B, T + slots, V), of n_loops loops, written a second time."""
    config, all_weights = model.config, dict(model.named_parameters())
    x = norm(all_weights["embedding"])[tokens]
    if config.slots:
        x = torch.cat([x, norm(all_weights["scratch"]).repeat(len(x), 1, 1)], dim=1)
    state = x
    for loop in range(n_loops):
        begin = f"blocks.{loop % config.n_blocks}."
        weights = {name.removeprefix(begin): w for name, w in all_weights.items() if begin in name}
        if config.mixing == "tokens":
            mixed = swiglu(state.mT, weights["mix.gate_up.weight"], weights["mix.down.weight"]).mT
            mixed = mixed @ weights["mix.out.weight"].T
        else:
            mixed = restated_attention(config, state, weights)
        u = norm((x if config.restart else state) + mixed)
        new = swiglu(u, weights["gate_up.weight"], weights["down.weight"])
        state = norm(u + new if config.mlp_residual else new)
    vectors = norm(all_weights["embedding" if config.tied else "head"])
    return config.logit_scale * math.sqrt(config.d_model) * F.cosine_similarity(
        state[:, :, None], vectors, dim=-1)


def places(tokens, layout):
    """Where each row is answered, counted by hand."""
    return [[*row, BLANK].index(BLANK) - (layout == "causal") for row in tokens.tolist()]


@every_kind
def test_forward_and_gradients_equal_an_independent_restatement(changes):
    """No parameter is left out: `grad` refuses those that the logits do not depend on."""
    model = make_model(**changes)
    tokens = random_tokens(model.config.layout)
    answers = torch.arange(len(tokens)) % E
    full = restated(model, tokens, model.config.n_loops)
    expected = torch.stack([row[at] for row, at in zip(full, places(tokens, model.config.layout))])
    found = model(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    used = list(model.parameters())
    for a, b in zip(*(torch.autograd.grad(F.cross_entropy(logits, answers), used)
                      for logits in (found, expected))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)   # the cosine has no 1e-6 in it


# ---------------------------------------------------------------- grok: training
def make_trainer(device=CPU, **changes):
    return Trainer(replace(SMALL, **changes), *smoke_data(), device)


@every_kind
def test_loss_is_the_mean_cross_entropy_of_the_graded_loops_and_positions(changes):
    """Loops min_loops to n_loops, each as if the model ended there; with `copy` all positions, each
    of which shows its token, or the answer."""
    config = replace(SMALL, **changes)
    tokens, losses = random_tokens(config.layout), []
    answers = torch.arange(len(tokens)) % E
    for least in range(1, config.n_loops + 1):
        model = make_model(**{**changes, "min_loops": least})
        for loop in range(least, config.n_loops + 1):
            for row, full, at, answer in zip(tokens, restated(model, tokens, loop),
                                             places(tokens, config.layout), answers):
                wanted = torch.where(torch.arange(len(row)) == at, answer, row)
                graded = slice(len(row)) if config.copy else slice(at, at + 1)
                losses.append(F.cross_entropy(full[:len(row)][graded], wanted[graded]).item())
        assert loss_of(model, tokens, answers).item() == pytest.approx(np.mean(losses), rel=1e-5)
        losses.clear()


@pytest.mark.parametrize("layout", ["causal", "bidirectional"])
def test_training_rows_are_the_facts_then_the_training_compositions(layout):
    """Entity e is token e, relation r token E + r; what is not asked stays blank."""
    world, splits = smoke_data("both_full")
    tokens, answers, n_facts = training_rows(splits, world, layout, CPU)
    assert n_facts == len(world.facts) == (tokens[:, 2] == BLANK).sum()
    assert (tokens[:n_facts, 2:] == BLANK).all() and (tokens[n_facts:, 3:] == BLANK).all()
    facts, _ = triples(world)
    found = {(h, r1 - E, r2 - E): t for (h, r1, r2), t in
             zip(tokens[n_facts:, :3].tolist(), answers[n_facts:].tolist())}
    assert len(found) == len(tokens) - n_facts and set(found) == set(rows(splits["train_inferred"]))
    assert all(facts[facts[h, r1], r2] == t for (h, r1, r2), t in found.items())
    assert all(facts[h, r1 - E] == t for (h, r1), t in
               zip(tokens[:n_facts, :2].tolist(), answers[:n_facts].tolist()))


@pytest.mark.parametrize("share, n_atomic", [(0.25, 15_000), (0.5, 30_000), (1.0, 60_000)])
def test_a_batch_holds_exactly_its_share_of_facts_and_without_one_all_rows_alike(share, n_atomic):
    config, generator = replace(SMALL, atomic_share=share, batch_size=60_000), torch.Generator()
    times = torch.bincount(draw(config, 10, 30, generator), minlength=30)
    assert times[:10].sum() == n_atomic and times.sum() == 60_000
    for part in (times[:10], times[10:]):
        assert ((part - part.sum() / len(part)).abs() <= 5 * (part.sum() / len(part)) ** 0.5).all()
    times = torch.bincount(draw(replace(config, atomic_share=0.0), 10, 30, generator))
    assert len(times) == 30 and ((times - 2000).abs() < 5 * 44).all()           # sd 44


@pytest.mark.parametrize("warmup", [4, 0])
def test_train_step_is_adamw_with_warm_up_and_a_moving_average(warmup):
    """The warm-up ends, and the average's decay reaches its limit .2 (at step 3); both passed. A
    measurement, every 3 steps, is of the average, and of the losses since the last one."""
    trainer = make_trainer(seed=5, ema=0.2, warmup=warmup)
    trainer.model.double(), trainer.average.double()
    config, model, generator = trainer.config, copy.deepcopy(trainer.model), torch.Generator()
    generator.manual_seed(5)
    weights, losses = [w.detach().clone() for w in model.parameters()], []
    average, m, v = (list(torch._foreach_mul(weights, scale)) for scale in (1, 0, 0))
    for step in range(1, 9):
        drawn = draw(config, trainer.n_facts, len(trainer.tokens), generator)
        torch.nn.utils.vector_to_parameters(torch.cat([w.flatten() for w in weights]),
                                            model.parameters())
        loss = loss_of(model, trainer.tokens[drawn], trainer.answers[drawn])
        losses.append(loss.item())
        lr, decay = config.lr * min(1, step / max(1, warmup)), min(config.ema, step / (step + 10))
        for i, g in enumerate(torch.autograd.grad(loss, list(model.parameters()))):
            m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.98 * v[i] + 0.02 * g ** 2
            change = (m[i] / (1 - 0.9 ** step)) / ((v[i] / (1 - 0.98 ** step)).sqrt() + 1e-8)
            weights[i] = weights[i] - lr * config.weight_decay * weights[i] - lr * change
            average[i] = decay * average[i] + (1 - decay) * weights[i]
        trainer.train_step()
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        for found, expected in ((trainer.model, weights), (trainer.average, average)):
            torch.testing.assert_close(list(found.parameters()), expected, rtol=1e-9, atol=1e-9)
        if step % 3 == 0 or step == 8:
            line = trainer.measure()
            assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
            assert line.items() >= evaluate(trainer.average, trainer.exams).items()
            losses.clear()


def test_lens_rates_on_states_made_by_hand():
    """Queries 0, 1, 2 show their bridge somewhere. Queries 0 and 2 choose (loop 1, position 0); all
    four would have chosen (0, 1). Of the rest, 1 and 3, none shows it there; 9 is nobody's."""
    top = torch.tensor([[[9, 0, 9], [9, 1, 9], [9, 9, 9], [2, 9, 9]],
                        [[0, 0, 6], [9, 9, 7], [2, 9, 8], [9, 9, 5]]])
    assert lens_rates(top, torch.arange(4)) == {
        "map": [[0, 0.5, 0], [0.5, 0.25, 0]], "any": 0.75, "best": 0.0, "best_site": [1, 0]}
    assert lens_rates(top, torch.arange(4).roll(1))["any"] == 0.25


@pytest.mark.parametrize("device, bf16", [
    ("cpu", True), ("cuda", False), ("cuda", True), ("mps", False)])
def test_other_devices_train_like_the_cpu_and_bf16_rounds_the_training_alone(device, bf16):
    if not getattr(torch, device).is_available():
        pytest.skip(f"no {device} is here")
    here, there = make_trainer(), make_trainer(device=torch.device(device), bf16=bf16)
    tokens = here.tokens[:64]
    assert torch.allclose(there.model(tokens.to(device)).cpu(), here.model(tokens), atol=1e-4)
    here.train_step(), there.train_step()
    assert device != "cpu" or here.losses[0] != there.losses[0] == pytest.approx(
        here.losses[0].item(), rel=0.02)
    assert {weight.dtype for weight in there.model.parameters()} == {torch.float32}
    assert there.measure()["step"] == 1


# ---------------------------------------------------------------- grok: a run and its folder
SMOKE = [*"--preset smoke --phi 1 --device cpu --steps 160 --eval-every 20".split()]
BRIEF = [*SMOKE, "--steps", "8", "--eval-every", "4"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A smoke run that nothing interrupted; its output goes to a pipe that holds few letters."""
    folder = tmp_path_factory.mktemp("äé→李") / "run"
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = subprocess.run([sys.executable, grok.__file__, *SMOKE, "--out", str(folder)],
                            capture_output=True, timeout=300, env=env)
    assert result.returncode == 0 and result.stderr == b"", result.stderr
    assert [line.startswith(b"step ") for line in result.stdout.splitlines()[1:10]] == [1] * 8 + [0]
    return folder


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A folder to work in that holds the run as `run`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(whole, "run")
    return tmp_path


def metrics(folder):
    """metrics.jsonl as a list, less the times."""
    return [{**line, "seconds": None} for line in read_run(folder)[1]]


def weights_in(path):
    return torch.load(path, weights_only=True)["weights"]


def assert_same_run(one, two, but="-"):
    """Files, metrics but for the times, and weights equal to the bit."""
    left = {path.name for path in one.iterdir() if not path.match(but)}
    assert left == {path.name for path in two.iterdir()}
    assert metrics(one) == metrics(two)
    for path in one.glob("*.pt"):
        a, b = (torch.load(run / path.name, weights_only=True) for run in (one, two))
        a, b = (saved.get("weights") or saved["average"] for saved in (a, b))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def tree(folder):
    """Every path below a folder, with its time and content."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
            for path in folder.rglob("*")}


def refuses(options, said, capsys):
    """The command says one line that holds `said`, exits with status 2, and writes nothing."""
    capsys.readouterr()
    before = tree(Path.cwd())
    assert grok.main(options) == 2 and tree(Path.cwd()) == before
    err = capsys.readouterr().err
    assert err.startswith("grok.py: ") and err.count("\n") == 1 and said in err, err


def test_a_run_learns_and_leaves_what_is_documented(whole):
    """before.pt is of the first evaluation at which training is fitted."""
    first, *_, last = history = metrics(whole)
    assert last["loss"] < 0.5 * first["loss"] and last["accuracy"]["train_inferred"] >= 0.99
    assert {path.name for path in whole.iterdir()} == {"config.json", "metrics.jsonl", "last.pt",
                                                       "before.pt", "after.pt"}
    about = json.loads((whole / "config.json").read_text(encoding="utf-8"))
    assert set(about) == {"preset", "regime", "world", "model", "device", "versions"}
    assert about["world"] == asdict(WorldConfig(**{**PRESETS["smoke"][1], "phi": 1.0}))
    assert about["model"] == asdict(Config(**{**PRESETS["smoke"][2], "steps": 160,
                                              "eval_every": 20}))
    assert [line["step"] for line in history] == [*range(20, 161, 20)]
    for line in history:
        assert set(line) == {"step", "loss", "seconds", "accuracy", "lens"}
        assert set(line["accuracy"]) == set(SPLITS) and set(line["lens"]) == set(SPLITS[3:])
    for name, step in ("before", first_step(history, 0.99, "train_inferred")), ("after", 160):
        assert torch.load(whole / f"{name}.pt", weights_only=True)["step"] == step


def test_the_milestones_of_a_run_are_the_first_steps(whole, capsys):
    history, levels = metrics(whole), (0.5, 0.9, 0.95, 0.99)
    grok.print_result(whole)
    said = capsys.readouterr().out
    for split, lens in (("train_inferred", None), ("test_ood", None), ("test_ood", "any")):
        steps = [first_step(history, level, split, lens) for level in levels]
        assert " at step " + ", ".join(str(step or "never") for step in steps) in said
    shares = [{"step": i, "accuracy": {"a": i / 10}, "lens": {}} for i in range(11)]
    assert [first_step(shares, level, "a") for level in (0.5, 1.1)] == [5, None]
    assert first_step(shares, 0, "b") is first_step(shares, 0, "a", "any") is None


def test_the_same_seed_gives_the_same_metrics_and_a_seed_is_not_a_data_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, *more in (("a",), ("b",), ("c", "--seed", "1"), ("d", "--data-seed", "1")):
        np.random.seed(ord(name)), torch.manual_seed(ord(name))  # neither is read
        assert grok.main([*BRIEF, *more, "--out", name]) == 0
    assert metrics("a") == metrics("b") != metrics("c") and metrics("a") != metrics("d")
    one, two, three = (load_run(name)[1:] for name in "acd")
    assert_same_data(one, two)
    assert triples(one[0]) != triples(three[0])


def test_a_finished_run_is_read_only_and_more_steps_end_as_one_long_run(here, capsys):
    """Shipped ones are without last.pt, or without weights."""
    more = [*SMOKE, "--steps", "200", "--out"]
    shutil.copytree("run", "bare", ignore=shutil.ignore_patterns("*.pt"))
    refuses([*SMOKE, "--out", "bare"], "out = bare: holds a run without its weights", capsys)
    shutil.copytree("run", "shipped", ignore=shutil.ignore_patterns("last.pt"))
    for name in ("run", "shipped"):
        before = tree(here)
        assert grok.main([*SMOKE, "--out", name]) == 0
        assert "already done" in capsys.readouterr().out and tree(here) == before
        refuses([*SMOKE, "--steps", "100", "--out", name], f"steps = 100: {name} holds", capsys)
    refuses([*more, "shipped"], "steps = 200: shipped holds", capsys)
    assert grok.main([*more, "run"]) == grok.main([*more, "long"]) == 0
    assert_same_run(Path("run"), Path("long"))


@pytest.mark.parametrize("options, said", [
    ("--seed 1", "seed = 1: run holds a run with seed = 0"), ("--phi 2", "phi = 2.0: run holds"),
    ("--regime both_full", "regime = both_full: run holds a run with regime = natural"),
    ("--preset smoke --start other", "start = ")])
def test_a_folder_with_another_run_is_left_alone(options, said, here, capsys):
    """Also when it was killed before its first evaluation."""
    shutil.copytree("run", "other")
    given = [*(SMOKE[4:] if "--start" in options else SMOKE), *options.split(), "--out", "run"]
    refuses(given, said, capsys)
    for name in ("metrics.jsonl", "last.pt", "before.pt", "after.pt"):
        Path("run", name).unlink()
    refuses(given, said, capsys)


# imports once, then makes a process of the command for every line read; says how each one ended
FORKS = """
import os, sys, grok
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os._exit(grok.main(sys.argv[1:]))
    print(pid, file=sys.stderr, flush=True)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), file=sys.stderr, flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_killed_ten_times_ends_as_if_it_never_was(tmp_path):
    """Each kill comes zero or one evaluation after the start, plus a random instant."""
    options, rng, reached = [*SMOKE, "--eval-every", "4"], np.random.default_rng(0), []
    assert grok.main([*options, "--out", str(tmp_path / "whole")]) == 0
    command = [sys.executable, "-c", FORKS, *options, "--out", str(tmp_path / "run")]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              stdout=subprocess.DEVNULL, cwd=Path(grok.__file__).parent)
    lines = tmp_path / "run" / "metrics.jsonl"
    for _ in range(10):
        reached.append(lines.read_text(encoding="utf-8").count("\n") if lines.exists() else 0)
        wanted, patience = reached[-1] + rng.integers(0, 2), time.monotonic() + 30
        server.stdin.write("\n"), server.stdin.flush()
        pid = int(server.stderr.readline())
        while wanted > reached[-1] and time.monotonic() < patience and not (
                lines.exists() and lines.read_text(encoding="utf-8").count("\n") >= wanted):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        assert int(server.stderr.readline()) == signal.SIGKILL
    server.stdin.close(), server.wait()
    assert len(set(reached)) >= 5 and reached[-1] < 40
    assert grok.main([*options, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole", but="*.tmp")


class Killed(BaseException):
    """Stands for the end of the process at one exact place."""


TUNED = [*BRIEF[4:], "--preset", "smoke", "--start", "run", "--lr", "0"]  # fitted from the first


@pytest.mark.parametrize("owner, name, error", [
    (Path, "write_bytes", Killed()), (os, "replace", Killed()),
    (Path, "write_bytes", OSError(errno.ENOSPC, "No space left on device"))])
def test_a_run_stopped_at_any_write_ends_as_if_it_never_was(owner, name, error, here, capsys,
                                                            monkeypatch):
    """Stopped in the middle of each of its files, or just before each is in place; by a full disk,
    which is said in one line."""
    assert grok.main([*TUNED, "--out", "never"]) == 0
    function, calls, at = getattr(owner, name), [], 0
    while len(calls) == at:                                      # until there was no such call
        calls, at = [], at + 1

        def die(path, content):
            calls.append(path)
            if len(calls) < at:
                return function(path, content)
            if owner is Path:
                function(path, content[:len(content) // 2])
            raise error

        shutil.rmtree("new", ignore_errors=True)
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(owner, name, die)
            assert grok.main([*TUNED, "--out", "new"]) == (2 if at < 8 else 0)
        said, full = capsys.readouterr().err, at < 8 and isinstance(error, OSError)
        assert said.count("\n") == ("No space left on device" in said) == full
        assert grok.main([*TUNED, "--out", "new"]) == 0
        assert_same_run(Path("new"), Path("never"))
    assert at == 8                                               # config, 2 * 2, before, after


@pytest.mark.parametrize("status, said", [
    (2, "loss is not finite at step 6"), (130, "stopped; the same command goes on")])
def test_a_spoilt_loss_and_ctrl_c_keep_the_last_evaluation(status, said, here, monkeypatch, capsys):
    step = Trainer.train_step

    def spoilt(trainer):
        step(trainer)
        if trainer.step == 6:
            trainer.losses[1] = torch.tensor(math.nan)
            if status == 130:
                raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train_step", spoilt)
    assert grok.main([*BRIEF, "--out", "cut"]) == status
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and [line["step"] for line in metrics("cut")] == [4]
    assert torch.load("cut/last.pt", weights_only=True)["step"] == 4


def test_weights_spoilt_by_the_last_step_are_not_kept(here, capsys, monkeypatch):
    """No loss shows them yet."""
    step = Trainer.train_step

    def spoilt(trainer):
        step(trainer)
        if trainer.step == 8:
            trainer.averaged[0][0, 0] = math.inf

    monkeypatch.setattr(Trainer, "train_step", spoilt)
    assert grok.main([*BRIEF, "--out", "cut"]) == 2
    assert "not finite at step 9" in capsys.readouterr().err
    assert torch.load("cut/last.pt", weights_only=True)["step"] == 4


def test_too_little_memory_is_said_in_one_line(here, capsys, monkeypatch):
    def full(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee more")

    monkeypatch.setattr(Trainer, "train_step", full)
    assert grok.main([*BRIEF, "--out", "cut"]) == 2
    assert capsys.readouterr().err == (
        "grok.py: CUDA out of memory. Tried to allocate 2 GiB.\n")


def test_two_processes_in_one_folder_leave_whole_files(whole, tmp_path):
    command = [sys.executable, grok.__file__, *SMOKE, "--out", str(tmp_path / "run")]
    both = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait(300) for process in both] == [0, 0]
    assert_same_run(tmp_path / "run", whole)


# ---------------------------------------------------------------- grok: sources and starts
@pytest.fixture
def source(here):
    """A folder to work in, with the run, a data file and own facts."""
    write_by_hand("set.12.npz")
    lines = [f"p{h}\tr{k}\tp{(3 * h + k * k) % 9}" for h in range(9) for k in range(3 + h % 3)]
    Path("facts.tsv").write_text("\n".join(lines), encoding="utf-8")
    return here


ON_FILE = {"set.12.npz": [*BRIEF[:2], *BRIEF[4:], "--data", "set.12.npz"],
           "facts.tsv": [*BRIEF, "--facts", "facts.tsv", "--ood-fraction", "0.3"]}


@pytest.mark.parametrize("file", ON_FILE)
def test_a_run_on_a_file_records_it_and_is_read_and_started_from_anywhere(file, source,
                                                                          monkeypatch):
    own, sha256 = Path(file).resolve(), hashlib.sha256(Path(file).read_bytes()).hexdigest()
    assert grok.main([*ON_FILE[file], "--out", "own"]) == 0
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    about, (_, world, splits) = read_run("../own")[0], load_run("../own")
    assert about["data"] == {"path": f"../{file}", "sha256": sha256}
    assert [about["world"][name] for name in ("n_entities", "n_relations", "out_degree")] == [
        world.n_entities, world.n_relations, np.bincount(world.facts[:, 0]).max()]
    if file == "facts.tsv":
        check_rules(world, WorldConfig(**about["world"]), "natural", splits)
    else:
        assert_same_data((world, splits), write_by_hand("again.npz"))
        assert about["regime"] == "mine"
    new = "--start ../own --preset smoke --new-facts 8 --out new"
    assert grok.main([*BRIEF[4:], *new.split()]) == 0
    assert read_run("new")[0]["data"] == {"path": f"../../{file}", "sha256": sha256}
    config = WorldConfig(**read_run("new")[0]["world"])
    check_new_facts(world, splits, config, *load_run("new")[1:])
    own.write_bytes(b"changed")
    with pytest.raises(BadInput, match=f"{file}: has changed since the run began"):
        load_run("new")


@pytest.mark.parametrize("weights", ["before", "grokked", "none"])
def test_a_run_starts_from_the_weights_and_world_of_another(weights, here, capsys):
    """With step size 0 it ends with the weights it began with."""
    new = ["--preset", "tune", "--new-facts", "20", "--kept", "0.5", "--lr", "0", "--steps", "4"]
    assert grok.main([*new, "--start", "run", "--weights", weights, "--out", "new"]) == 0
    start, about = read_run("run")[0], read_run("new")[0]
    file = Path("run", grok.WEIGHTS.get(weights, "config.json"))
    assert about["start"] == {"path": "../run", "weights": weights,
                              "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    free = {name: about["model"][name] for name in grok.FREE if name in about["model"]}
    assert about["model"] == {**start["model"], **free}
    assert {**about["world"], "new_facts": 0, "kept": 1.0} == start["world"]
    config = WorldConfig(**about["world"])
    assert_same_data(load_run("new")[1:], add_facts(*load_run("run")[1:], config))
    refuses([*new, "--start", "new"], "start = new: has new facts already", capsys)
    begun = (weights_in(file) if weights != "none" else
             LoopedTransformer(Config(**start["model"]), E, R).state_dict())
    for name, weight in weights_in("new/after.pt").items():
        torch.testing.assert_close(weight, begun[name], rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- grok: bad input
def test_every_setting_is_in_the_help_has_a_flag_and_keeps_its_limits(tmp_path, monkeypatch,
                                                                     capsys):
    """Refused are a word that is none of its, and what lies just outside its range."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        grok.main(["--help"])
    said, limits = " ".join(capsys.readouterr().out.split()), {**LIMITS, **grok.MODEL_LIMITS}
    assert all(name in said for name in (*PRESETS, *REGIMES, "--start"))
    about = {**describe_fields(Config), **describe_fields(WorldConfig)}
    for field in (*fields(Config), *fields(WorldConfig)):
        flag, bad = "--" + field.name.replace("_", "-"), ["x"]
        assert f"{flag} V" in said and f"{about[field.name]} ({field.default})" in said
        for given in (flag, f"--{field.name}"):
            assert grok.parse([f"{given}={field.default}"])[field.name] == field.default
        if field.type in (int, float):
            bad += [str(limits[field.name][0] - 1), str(limits[field.name][1] + 1), "nan"]
        for value in bad:
            refuses([f"{flag}={value}"], field.name, capsys)


@pytest.mark.parametrize("command, said", [
    ("--preset huge", "preset = huge: must be one of tiny, small, tune"), ("tiny", "unrecognized"),
    ("--preset tune", "start = None"), ("--new-facts 3", "start = None"), ("--sed 1", "--sed 1"),
    ("--kept .5", "kept = 0.5: needs"), ("--whole-rows true", "whole_rows = True: needs"),
    ("--start run --new-k2 3", "new_k2 = 3: needs"),
    ("--facts one.tsv --phi 2", "n_entities = 1: must lie in"),
    ("--regime third", "regime = third: must be one of natur"), ("--phi 0", "phi = 0: must lie"),
    ("--device tpu", "device = tpu: must be one that is here: "), ("--data no", "'no'"),
    ("--n-heads 5 --d-model 96", "n_heads = 5: twice it must divide d_model = 96"),
    ("--min-loops 5", "min_loops = 5: must lie in [1, n_loops = 4]"),
    ("--copy true", "layout = causal: needs"), ("--out facts.tsv", "facts.tsv"),
    ("--data set.12.npz --regime natural", "regime = natural: comes with --data, leave it out"),
    ("--facts facts.tsv --out-degree 2", "out_degree = 2: comes with --data"),
    ("--facts twice.tsv", "twice.tsv, line 2: "), ("--data twice.npz", "is no data file"),
    ("--start run --d-model 16", "d_model = 16: comes from run"),
    ("--start run --data-seed 0", "data_seed = 0: comes from"), ("--start no", "no/config.json"),
    ("--start run --facts x", "data = x: comes from"), ("--start run --weights x", "weights = x"),
    ("--start run --preset tune --new-facts 999", "new_facts = 999: must lie in")])
def test_what_cannot_be_used_is_said_in_one_line_and_nothing_is_written(command, said, source,
                                                                        capsys):
    for twice in ("twice.tsv", "twice.npz"):
        Path(twice).write_text("a\tr\ta\na\tr\tb\n", encoding="utf-8")
    lines = [f"a\tr{number}\ta\n" for number in range(20)]
    Path("one.tsv").write_text("".join(lines), encoding="utf-8")
    refuses(command.split(), said, capsys)


@pytest.mark.parametrize("name", ["last.pt", "after.pt", "metrics.jsonl", "config.json"])
def test_a_damaged_or_foreign_file_is_refused_and_runs_no_code(name, here, capsys):
    if name == "last.pt":
        Path("run/after.pt").unlink()                            # a run that has not ended
    path, strange, plain = Path("run", name), io.BytesIO(), io.BytesIO()
    torch.save({"step": 4, "weights": Trap()}, strange), torch.save([1, 2], plain)
    for content in (b"", path.read_bytes()[:-40], os.urandom(10**4), plain.getvalue(), b"[1]",
                    strange.getvalue(), pickle.dumps(Trap(), 2), b"[" * 10**5):
        path.write_bytes(content)
        refuses([*SMOKE, "--out", "run"], f"run/{name}", capsys)
        if name in ("after.pt", "config.json"):
            refuses([*TUNED, "--out", "new"], f"run/{name}", capsys)
            with pytest.raises(BadInput, match=name):
                load_run("run")


def test_foreign_settings_and_weights_are_refused(here, capsys):
    """A setting that config.json lacks has its default."""
    about = json.loads(Path("run/config.json").read_text(encoding="utf-8"))
    for part, changes in (("model", {"dropout": 0.1}), ("model", {"lr": "high"}),
                          ("model", {"n_loops": 0}), ("world", {"phi": []})):
        content = json.dumps({**about, part: {**about[part], **changes}})
        Path("run/config.json").write_text(content, encoding="utf-8")
        refuses([*SMOKE, "--out", "run"], "run/config.json", capsys)
    for name in ("regime", "device", "world"):
        content = json.dumps({key: value for key, value in about.items() if key != name})
        Path("run/config.json").write_text(content, encoding="utf-8")
        refuses([*SMOKE, "--out", "run"], "run/config.json", capsys)
    assert about["model"].pop("slots") == about["world"].pop("new_facts") == 0
    Path("run/config.json").write_text(json.dumps(about), encoding="utf-8")
    assert grok.main([*SMOKE, "--out", "run"]) == 0
    sound = weights_in("run/after.pt")
    for weights in ({}, {**sound, "more": torch.zeros(1)}, {**sound, "embedding": torch.zeros(3)}):
        torch.save({"step": 160, "weights": weights}, "run/after.pt")
        refuses([*TUNED, "--out", "new"], "run/after.pt: is damaged", capsys)


# ---------------------------------------------------------------- analyze: a circuit known by hand
class TwoHopTable(torch.nn.Module):
    """By hand: loop 1 looks up the bridge at r1, loop 2 the tail at the answer, loop 3 nothing.
    Vectors are one-hot; what is found is `mixed`, then the state there: all maps are known."""
    def __init__(self, world, layout):
        super().__init__()
        self.E, size = world.n_entities, world.n_entities + world.n_relations + 1
        self.embedding = torch.eye(size)
        self.config = grok.Config(d_model=size, n_loops=3, layout=layout)
        self.tails = torch.full((size, world.n_relations), size - 1)  # the blank: no such fact
        head, relation, tail = torch.from_numpy(world.facts).T
        self.tails[head, relation] = tail

    def forward(self, tokens, edit=None):
        state = self.embedding[tokens]
        for loop in range(3):
            mixed = self.embedding[-1].expand_as(state).clone()  # the blank: nothing looked up
            if loop < 2:
                entity = tokens[:, 0] if loop == 0 else state[:, 1].argmax(-1)
                tail = self.tails[entity, tokens[:, 1 + loop] - self.E]
                mixed[:, 1 if loop == 0 else -1] = self.embedding[tail]
            mixed = edit(loop, "mixed", mixed) if edit else mixed
            nothing = mixed.argmax(-1, keepdim=True) == len(self.embedding) - 1
            state = torch.where(nothing, state, mixed)
            state = edit(loop, "state", state) if edit else state
        return self.unembed(self.read(state, tokens))

    def read(self, state, tokens):
        return state[:, -1]

    def vectors(self):
        return self.embedding

    def unembed(self, state):
        return state @ self.embedding.T


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def table(request):
    """The hand-built model, its world and ID queries whose h, b and t are three entities."""
    config = data.WorldConfig(n_entities=24, n_relations=16, out_degree=12, phi=2.0)
    world = data.make_world(config)
    asked = data.make_splits(world, config)["test_id"]
    apart = (asked.h != asked.b) & (asked.b != asked.t) & (asked.h != asked.t)
    return TwoHopTable(world, request.param), world, asked.take(apart)


@pytest.fixture(scope="module")
def known_maps(table):
    model, world, asked = table
    tokens, bridges = to_tokens(asked, world, model.config.layout)[0], torch.from_numpy(asked.b)
    probe = analyze.fit(model, tokens, torch.eye(world.n_entities)[bridges])
    code = analyze.codes(model, tokens, bridges, world.n_entities)
    return analyze.patches(model, world, asked, asked, analyze.subspace(probe), code, n=400)


BRIDGE = [(0, 0, 1), (0, 1, 1)]                 # read from the state (loop 1, r1) alone
ANSWER = [(1, 0, -1), (1, 1, -1), (2, 1, -1)]


def assert_sites(found, ones, but=0):
    """A map (3 loops, 2 parts, positions) is 1 at the given sites and 0 elsewhere, or reversed."""
    expected = np.full(np.shape(found), float(but))
    for site in ones:
        expected[site] = 1 - but
    assert np.array_equal(found, expected)


def test_lens_finds_the_known_circuit_among_entities_also_below_louder_tokens(table):
    model, world, asked = table
    tokens, answers = to_tokens(asked, world, model.config.layout)
    known = tokens, torch.from_numpy(asked.b), answers, world.n_entities
    found = analyze.lens(model, *known)
    for name, sites in (("bridge", [*BRIDGE, (1, 1, 1), (2, 1, 1)]), ("answer", ANSWER)):
        assert_sites(np.stack([found[part][name]["map"] for part in analyze.PARTS], 1), sites)
    seen, chance = found["state"]["bridge"], found["state"]["bridge_chance"]
    assert seen["any"] == seen["best"] == 1 and seen["best_site"][1] == 1
    assert chance["map"][0][1] == pytest.approx((asked.b == np.roll(asked.b, 1)).mean())

    class Louder(TwoHopTable):
        def unembed(self, state):
            logits = super().unembed(state)
            return logits + 2.0 * (torch.arange(logits.shape[-1]) >= self.E)  # all but entities

    found = analyze.lens(Louder(world, model.config.layout), *known)["state"]
    assert found["bridge"]["map"][0][1] == 0 and found["entity"]["map"][0][1] == 1


def test_evaluate_knows_the_known_circuit(table):
    """With one query no other bridge could show by chance; of an empty split nothing is said."""
    model, world, asked = table
    asked_of = {"test_id": asked, "test_ood": asked.take([0]), "test_id_ood": asked.take([]),
                "train_inferred": asked._replace(t=asked.h)}
    exams = make_exams(asked_of, world, model.config.layout, CPU)
    found, all_right = evaluate(model, exams), dict.fromkeys(("any", "best", "answer_any"), 1)
    assert found["accuracy"] == {"test_id": 1, "test_ood": 1, "train_inferred": 0}
    assert set(found["lens"]) == {"test_id", "test_ood"}
    assert found["lens"]["test_id"].items() >= all_right.items()
    assert found["lens"]["test_ood"] == {**all_right, "any_chance": None, "best": None,
                                         "best_chance": None}


@pytest.mark.parametrize("kind, redirected, changed", [
    ("swap", [*BRIDGE, *ANSWER], []), ("other_r2", BRIDGE, ANSWER), ("same_bridge", ANSWER, []),
    ("across", BRIDGE, ANSWER), ("restore", [*BRIDGE, *ANSWER], [])])
def test_patching_finds_the_known_circuit(known_maps, kind, redirected, changed):
    found = known_maps[kind]
    assert found["n"] > 300
    assert_sites(found["redirected"], redirected)
    assert_sites(found["changed"], changed)
    assert_sites(found["unchanged"], [*redirected, *changed], but=1)


def test_parts_of_a_value_redirect_where_the_bridge_is_and_only_if_they_hold_it(known_maps):
    """Its token's direction, the probe's subspace, its code: all of it; outside them: nothing.
    Noise breaks the run."""
    for kind, expected in (("visible", 1), ("inside", 1), ("code", 1), ("outside", 0)):
        found = np.asarray(known_maps[kind]["redirected"])
        assert all(found[site] == expected for site in BRIDGE), kind
        assert kind == "code" or all(found[site] < 0.05 for site in ANSWER)  # by accident only
    for outcome in ("redirected", "unchanged"):
        assert known_maps["noise"][outcome][0][1][1] < 0.15


def test_donors_obey_their_rules(table):
    _, world, asked = table
    rng, tails = np.random.default_rng(0), {(h, r): t for h, r, t in world.facts.tolist()}
    clean, donor, predicted = analyze.swap(asked, asked, rng)
    assert len(clean.h) and (clean.r2 == donor.r2).all() and (clean.b != donor.b).all()
    assert (clean.t != donor.t).all() and (predicted == donor.t).all()
    clean, donor, predicted = analyze.same_bridge(asked, asked, rng)
    assert len(clean.h) and (clean.b == donor.b).all() and (clean.r2 != donor.r2).all()
    assert (clean.t != donor.t).all() and ((clean.h != donor.h) | (clean.r1 != donor.r1)).all()
    clean, donor, predicted = analyze.other_r2(world, asked, asked, rng)
    assert len(clean.h) and (clean.r2 != donor.r2).all() and (clean.b != donor.b).all()
    assert (predicted != donor.t).all() and (predicted != clean.t).all()
    assert predicted.tolist() == [tails[b, r2] for b, r2 in zip(donor.b, clean.r2)]


def test_without_right_answers_there_is_nothing_to_patch_with(table):
    model, world, asked = table
    wrong = asked._replace(t=(asked.t + 1) % world.n_entities)
    paths = analyze.inference_path(model, world, {"test_id": asked, "test_ood": wrong}, n=100)
    right, found = paths["test_id"], paths["test_ood"]
    assert all(state[1] == 1 and state[0] < 0.6 for _, state in right["probe"])  # r1, h
    assert right["patch"]["swap"]["n"] == 100 and right["patch"]["across"]["n"] == 0
    assert {maps["n"] for maps in found["patch"].values()} == {0}
    json.dumps(paths, allow_nan=False)


# ---------------------------------------------------------------- analyze: a real model
@pytest.fixture(scope="module", params=[{}, dict(layout="bidirectional", mixing="tokens",
                                                 tied=False, copy=True)])
def real(request):
    """An untrained model of the smoke preset, its tokens (N, T) and ID test compositions."""
    _, config, settings = grok.PRESETS["smoke"]
    config, settings = data.WorldConfig(**config), grok.Config(**{**settings, **request.param})
    world = data.make_world(config)
    asked = data.make_splits(world, config)["test_id"]
    model = grok.LoopedTransformer(settings, world.n_entities, world.n_relations)
    return model.requires_grad_(False), to_tokens(asked, world, settings.layout)[0], asked


def test_patching_and_lens_agree_with_the_output_bit_for_bit(real):
    """The last answer state shows the output, and gives it to another query; a query's own value
    changes nothing at any site. An edit that returns nothing is told what is expected."""
    model, tokens, _ = real
    values, donor = analyze.values_of(model, tokens), tokens.roll(1, 0)
    assert torch.equal(analyze.logit_lens(model, tokens)[-1, 1, :, -1],
                       analyze.predict(model, tokens))
    last = model.config.n_loops - 1, 1, tokens.shape[1] - 1
    new = {last: analyze.values_of(model, donor)[-1, 1, :, -1]}
    assert torch.equal(analyze.patch(model, tokens, new), model(donor))
    for loop, part, position in np.ndindex(*values.shape[:2], tokens.shape[1]):
        same = {(loop, part, position): values[loop, part, :, position]}
        assert torch.equal(analyze.patch(model, tokens, same), model(tokens))
    with pytest.raises(TypeError, match="must return the value to go on with"):
        model(tokens, edit=lambda loop, part, value: None)


def test_many_queries_equal_one_at_a_time(real, monkeypatch):
    model, tokens, asked = real[0], real[1][:12], real[2]
    new, predicted = analyze.values_of(model, tokens.flip(0)), torch.from_numpy(asked.t[:12])
    found, right = analyze.patch_map(model, tokens, new, predicted), analyze.predict(model, tokens)
    each = [analyze.patch_map(model, tokens[i:i + 1], new[:, :, i:i + 1], predicted[i:i + 1])
            for i in range(12)]
    for name in ("redirected", "changed", "unchanged"):
        assert np.allclose(found[name], np.mean([one[name] for one in each], 0))
    monkeypatch.setattr(analyze, "BATCH", 5)
    assert torch.equal(analyze.predict(model, tokens), right)
    assert torch.allclose(analyze.values_of(model, tokens.flip(0)), new, atol=1e-5)


def test_probe_is_ridge_regression(real):
    """NumPy's least squares on the values, with the ridge as extra rows, reads the same."""
    model, tokens, asked = real
    targets, values = np.eye(12)[asked.b], analyze.values_of(model, tokens).numpy()
    weights = analyze.fit(model, tokens, torch.tensor(targets).float())
    read = analyze.read(model, tokens, weights).numpy()                 # (n_loops, 2, T, N, K)
    for loop, part, position in ((0, 0, 0), (1, 1, 1), (2, 0, 2)):
        x = np.append(values[loop, part, :, position], np.ones((len(tokens), 1)), 1)
        rows, wanted = np.append(x, np.eye(33), 0), np.append(targets, np.zeros((33, 12)), 0)
        expected = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        assert np.allclose(weights[loop, part, position].numpy(), expected, atol=2e-3)
        assert np.allclose(read[loop, part, position], x @ expected, atol=2e-3)


def test_inside_and_outside_a_subspace_make_up_the_whole(real):
    model, tokens = real[0], real[1][:20]
    clean, donor = analyze.values_of(model, tokens), analyze.values_of(model, tokens.flip(0))
    basis = analyze.subspace(torch.randn(3, 2, tokens.shape[1], 33, 5))
    assert torch.linalg.matrix_rank(basis[0, 0, 0]) == 4          # one of five tells nothing
    one, two = analyze.inside(clean, donor, basis), analyze.inside(donor, clean, basis)
    assert torch.allclose(one + two, clean + donor, atol=1e-4)
    assert torch.allclose(analyze.inside(one, donor, basis), one, atol=1e-4)


# ---------------------------------------------------------------- analyze: the command line
def test_analyze_measures_and_draws_a_run(here, capsys):
    """Both weights of it; a folder stands for all runs below."""
    assert analyze.main(["."]) == 0
    text = Path("run/paths.json").read_text(encoding="utf-8")
    for path in json.loads(text)["grokked"].values():
        assert set(path) == {"n", "lens", "probe", "translated", "patch"}
        assert np.shape(path["probe"]) == np.shape(path["translated"]) == (3, 2, 3)
    for part in analyze.PARTS:
        assert matplotlib.image.imread(f"run/{part}.png").std() > 0.05
    assert "NaN" not in text and capsys.readouterr().out.count("bridge seen anywhere") == 4


def test_analyze_says_what_it_cannot_look_into(here, capsys):
    """"little" has one OOD query; it is trained, and its metrics hold no NaN."""
    small = "--n-entities 8 --n-relations 4 --out-degree 3 --ood-fraction .13 --phi 1 --out little"
    assert grok.main(["--preset", "smoke", "--steps", "2", *small.split()]) == 0
    assert "NaN" not in Path("little/metrics.jsonl").read_text(encoding="utf-8")
    Path("run/before.pt").unlink(), Path("run/after.pt").unlink(), Path("empty").mkdir()
    for name, said in (("empty", "no run"), ("run", "no weights"), ("little", "too few")):
        assert analyze.main([name]) == 2 and not Path(name, "paths.json").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error and name in error


def test_analyze_goes_on_after_a_run_that_it_cannot_look_into(here, capsys):
    """"few" has but three ID queries, too few to fit on one half and ask the other."""
    few = ["--preset", "smoke", "--phi", "4.67241379", "--steps", "2", "--out", "few"]
    assert grok.main(few) == 0 and len(load_run("few")[2]["test_id"].h) < 4
    assert analyze.main(["few", "run"]) == 2
    assert "few: too few" in capsys.readouterr().err and Path("run/paths.json").exists()


# ---------------------------------------------------------------- what is shipped
ROOT = Path(__file__).parent
SHIPPED = ROOT / "runs" / "shipped"
RUNS = sorted(path.parent for path in SHIPPED.rglob("seed0/after.pt"))


@pytest.mark.parametrize("folder", RUNS, ids=lambda f: str(f.relative_to(SHIPPED)))
def test_shipped_weights_have_the_accuracy_of_their_metrics(folder):
    """Before and grokked; another machine may round one query of a split apart."""
    measured = {line["step"]: line["accuracy"] for line in read_run(folder)[1]}
    for stage, file in grok.WEIGHTS.items():
        if (folder / file).exists():
            model, world, splits = load_run(folder, stage)
            expected = measured[torch.load(folder / file, weights_only=True)["step"]]
            exams = make_exams(splits, world, model.config.layout, CPU)
            for split, right in evaluate(model, exams)["accuracy"].items():
                assert right == pytest.approx(expected[split], abs=1 / len(exams[split][0]) + 1e-6)


@pytest.mark.parametrize("name", ["tiny/natural", "small/second_full"])
def test_the_first_evaluation_trained_again_is_the_shipped_one(name):
    """The same but for the arithmetic of another machine; the settings are the preset's."""
    about, history = read_run(SHIPPED / name / "seed0")
    _, world, model = PRESETS[name.split("/")[0]]
    assert about["model"] == asdict(Config(**model))
    assert about["world"] == asdict(WorldConfig(**world))
    trainer = Trainer(Config(**model), *build_data(about, SHIPPED / name / "seed0"), CPU)
    for _ in range(history[0]["step"]):
        trainer.train_step()
    line = trainer.measure()
    assert line["loss"] == pytest.approx(history[0]["loss"], rel=0.02)
    for split, right in line["accuracy"].items():
        assert right == pytest.approx(history[0]["accuracy"][split], abs=0.05)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_tiny_preset_groks(seed):
    """Training compositions fitted first, the OOD answer clearly later; enough OOD compositions."""
    folder = SHIPPED / f"tiny/natural/seed{seed}"
    about, history = read_run(folder)
    fitted = first_step(history, 0.99, "train_inferred")
    assert first_step(history, 0.95, "test_ood") >= 3 * fitted
    assert first_step(history, 0.5, "test_ood") >= 1.5 * fitted
    assert len(build_data(about, folder)[1]["test_ood"].h) >= 300


@pytest.mark.parametrize("name", ["data", "grok", "analyze"])
def test_nothing_but_numpy_torch_and_matplotlib_is_imported_at_run_time(name):
    allowed = {"numpy", "torch", "matplotlib", "data", "grok", *sys.stdlib_module_names}
    text = (ROOT / f"{name}.py").read_text(encoding="utf-8")
    names = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE))
    assert names <= allowed - ({"torch", "matplotlib"} if name == "data" else set())


def test_what_is_shipped_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) < 30e6
