"""What data.py, grok.py and analyze.py promise, a section a module: held against walks over the
graph, rules and models restated in plain loops, PyTorch's own layers, sums by hand, and a circuit
that is known by construction."""
import copy
import errno
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

# two test processes share two cores: one thread each, for what they start, too
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.image
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings, strategies as st

import analyze
import data
import grok
from data import (BadInput, GIVEN_SPLITS, REGIMES, SPLITS, TRAINED, add_facts, compositions,
                  describe_world, make_splits, make_world, parse_data, parse_facts, regime_name)
from grok import (Config, PARTS, PRESETS, Trainer, build_model, draw_batch, evaluate, first_step,
                  is_finished, lens_rates, load_run, loss_of, make_eval_sets, read_config, read_run,
                  run_values, step_size, to_tokens, training_rows)

torch.set_num_threads(1)  # sums in another order would round otherwise
TINY = Config(n_entities=15, n_relations=9, out_degree=6, ood_fraction=0.25, phi=2.5)


# ---------------------------------------------------------------- data: splits and regimes
def small_data(config=TINY):
    world = make_world(config)
    return world, make_splits(world, config)


def facts_of(world):
    """{(h, r): t}, and the set of the (h, r) that are OOD, or new; the index tells the same."""
    facts = {}
    marked = set()
    for number, (h, r, t) in enumerate(world.facts.tolist()):
        assert world.index[h, r] == number
        facts[h, r] = t
        if world.is_ood[number] or world.is_new[number]:
            marked.add((h, r))
    assert len(facts) == len(world.facts) == (world.index >= 0).sum()
    assert not (world.is_ood.any() and world.is_new.any())
    return facts, marked


def walks(world):
    """Every composition, by a walk over the graph: {(h, r1, r2): (b, t, hop 1 is OOD or new?,
    hop 2 is?)}."""
    facts, marked = facts_of(world)
    paths = {}
    for (h, r1), b in facts.items():
        for (head, r2), t in facts.items():
            if head == b:
                paths[h, r1, r2] = (b, t, (h, r1) in marked, (b, r2) in marked)
    return paths


def rows(split):
    """{(h, r1, r2): (b, t)} of Queries, which must not hold one twice."""
    answers = {}
    for h, r1, r2, b, t in np.stack(split, axis=1).tolist():
        assert (h, r1, r2) not in answers
        answers[h, r1, r2] = (b, t)
    return answers


def rows_of_facts(facts, pairs):
    """What `rows` must give for these facts, asked alone."""
    return {(h, r, -1): (-1, facts[h, r]) for h, r in pairs}


def of_kind(paths, hop1, hop2):
    """The compositions whose hops are OOD, or new, as given."""
    return {question for question, path in paths.items() if path[2:] == (hop1, hop2)}


def fact_at(paths, hop, question):
    """The fact (head, relation) that is hop 1 or 2 of a composition."""
    h, r1, r2 = question
    return (h, r1) if hop == 1 else (paths[question][0], r2)


def count_facts(paths, hop, questions):
    """How often each fact is this hop of these compositions."""
    return Counter(fact_at(paths, hop, question) for question in questions)


def check_answers(paths, split):
    for question, answer in rows(split).items():
        assert paths[question][:2] == answer


def check_splits(world, config, splits):
    """Every rule of the splits and of the regime, slowly, from the walks alone."""
    facts, ood = facts_of(world)
    paths = walks(world)
    assert tuple(splits) == SPLITS
    assert len(ood) == round(config.ood_fraction * len(facts))
    assert rows(splits["id_atomic"]) == rows_of_facts(facts, set(facts) - ood)
    assert rows(splits["ood_atomic"]) == rows_of_facts(facts, ood)
    for name in SPLITS[2:]:
        check_answers(paths, splits[name])
    train = set(rows(splits["train_inferred"]))
    id_id = of_kind(paths, False, False)
    ood_ood = of_kind(paths, True, True)
    assert len(train & id_id) == round(config.phi * (len(facts) - len(ood)))
    assert set(rows(splits["test_id"])) == id_id - train
    assert len(id_id - train) >= 0.005 * len(id_id)
    assert set(rows(splits["test_ood"])) == ood_ood
    assert not train & ood_ood
    for hop, share, name in ((1, config.hop1, "test_ood_id"), (2, config.hop2, "test_id_ood")):
        mixed = of_kind(paths, hop == 1, hop == 2)
        assert set(rows(splits[name])) == mixed - train
        tested = set(count_facts(paths, hop, ood_ood))
        available = count_facts(paths, hop, mixed)
        trained = count_facts(paths, hop, mixed & train)
        assert set(trained) <= tested
        for fact, times in trained.items():
            assert times == min(config.k, available[fact])
        n_without = len(tested - set(available))  # chosen, but there is no composition to train
        assert len(trained) <= round(share * len(tested)) <= len(trained) + n_without


WORLDS = st.builds(
    Config, n_entities=st.integers(2, 25), n_relations=st.integers(6, 12),
    out_degree=st.integers(1, 6), ood_fraction=st.floats(0, 1) | st.floats(0.1, 0.5),
    phi=st.floats(0, 12) | st.floats(0.1, 2), data_seed=st.integers(0, 2**63 - 1))
SHARES = st.sampled_from(list(REGIMES.values())) | st.tuples(
    st.floats(0.1, 1), st.floats(0, 1), st.integers(1, 20))  # hop1, hop2, k


@given(config=WORLDS, regime=SHARES)
@example(config=TINY, regime=REGIMES["both_half"])
@settings(max_examples=60, deadline=None)
def test_splits_obey_every_rule_of_the_paper_or_are_refused(config, regime):
    """For a phi that is refused, the limits told are legal as printed."""
    hop1, hop2, k = regime
    config = replace(config, hop1=hop1, hop2=hop2, k=k)
    world = make_world(config)
    facts, ood = facts_of(world)
    paths = walks(world)
    n_id = len(of_kind(paths, False, False))
    n_ood = len(of_kind(paths, True, True))
    n_train = round(config.phi * (len(facts) - len(ood)))
    if n_id >= 2 and n_ood and 1 <= n_train <= int(0.995 * n_id):
        check_splits(world, config, make_splits(world, config))
        return
    with pytest.raises(BadInput) as error:
        make_splits(world, config)
    setting, _, limits = str(error.value).partition(": must lie in ")
    assert setting.startswith("phi = ") == bool(limits) == (n_id >= 2 and n_ood > 0)
    for phi in json.loads(limits or "[]"):
        told = replace(config, phi=phi)
        check_splits(world, told, make_splits(world, told))


def test_the_regimes_are_those_of_appendix_c():
    both_half = Config(hop1=0.5, hop2=0.5, k=9)
    for name, config in {"natural": Config(), "both_full": Config(hop1=1.0, hop2=1.0),
                         "both_half": both_half, "first_full": Config(hop1=1.0),
                         "second_full": Config(hop2=1.0), "data": Config(facts="facts.npz"),
                         "hop1_0.5_hop2_0.5_k_18": replace(both_half, k=18)}.items():
        assert regime_name(config) == name


@pytest.mark.parametrize("changes, said", [
    (dict(n_entities=10**6, n_relations=10**5), "n_entities = 1000000: makes over 50000000 compos"),
    (dict(ood_fraction=0), "ood_fraction = 0: too few"),
    (dict(phi=1e4), "phi = 10000: must lie in [0.0147058824, 4.86764706]"),
    (dict(new_facts=46), "new_facts = 46: must lie in [0, 45]"),  # 15 heads, each without 3 of 9
    (dict(new_facts=1), "new_facts = 1, kept = 1: too few facts"),
    (dict(new_facts=20, kept=0.0), "new_facts = 20, kept = 0: too few facts"),
    (dict(new_facts=20, exposed=0.01), "exposed = 0.01: is less than one of 20 new facts; must be "
                                       "0 or lie in [0.05, 1]")])
def test_settings_that_do_not_fit_a_world_are_refused_by_name(changes, said):
    config = replace(TINY, **changes)
    with pytest.raises(BadInput, match="^" + re.escape(said)):
        add_facts(*small_data(config), config)


def fingerprint(world, splits):
    """Of the first 50 facts and the first 20 rows of every split: what shipped runs are made of."""
    _, relations, tails = world.facts[:50].T.tolist()
    marked = (world.is_ood | world.is_new)[:50].tolist()
    first_rows = []
    for name, split in splits.items():
        first_rows.append([name, len(split.h), *np.stack(split)[:, :20].tolist()])
    text = json.dumps([relations, tails, marked, first_rows])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def test_the_data_never_change():
    """Neither the splits of two worlds nor the new facts of two more."""
    assert fingerprint(*small_data()) == "f5f9766898b8c92a"
    half = Config(out_degree=24, hop1=0.5, hop2=0.5, k=9)
    assert fingerprint(*small_data(half)) == "fd8c08b8f7b686d6"
    names = ["kept_atomic", "new_atomic", "train_inferred", "new_old", "old_new", "new_new"]
    config = Config(new_facts=140, kept=0.21)
    world, splits = add_facts(*small_data(config), config)
    assert fingerprint(world, {name: splits[name] for name in names}) == "aaa6bb0a613089c1"
    config = replace(config, exposed=0.5)
    world, splits = add_facts(*small_data(config), config)
    names += ["exposed_old", "old_exposed"]
    assert fingerprint(world, {name: splits[name] for name in names}) == "9345997942608daa"


# ---------------------------------------------------------------- data: new facts
def check_new_facts(old_world, old_splits, config, world, splits):
    """Every rule of fine-tuning on new facts, slowly, from the walks through both worlds alone."""
    old_facts, old_ood = facts_of(old_world)
    old_id = set(old_facts) - old_ood
    facts, new = facts_of(world)
    kept = set(facts) - new
    assert not world.is_ood.any()
    assert len(new) == config.new_facts and not new & set(old_facts)
    assert len(kept) == round(config.kept * len(old_id)) and kept <= old_id
    for fact in kept:
        assert facts[fact] == old_facts[fact]
    assert world.entity_names == old_world.entity_names
    assert world.relation_names == old_world.relation_names
    assert rows(splits["kept_atomic"]) == rows_of_facts(facts, kept)
    assert rows(splits["new_atomic"]) == rows_of_facts(facts, new)
    assert rows(splits["old_atomic"]) == rows_of_facts(old_facts, old_id)
    assert rows(splits["old_inferred"]) == rows(old_splits["test_id"])
    assert set(TRAINED) & set(splits) == {"kept_atomic", "new_atomic", "train_inferred"}
    paths = walks(world)
    train = set(rows(splits["train_inferred"]))
    check_answers(paths, splits["train_inferred"])
    remain = set()
    for (h, r1, r2), (b, _) in rows(old_splits["train_inferred"]).items():
        if {(h, r1), (b, r2)} <= kept:
            remain.add((h, r1, r2))
    assert train & of_kind(paths, False, False) == remain
    check_exposed(paths, train, new, config, splits)


def check_exposed(paths, train, new, config, splits):
    """Exposed facts are trained in compositions with kept ones, up to exposed_k for each hop, and
    tested apart; a new fact that has no composition with a kept one shows not whether it is."""
    exposed = set()
    with_kept = set()
    mixed = {1: of_kind(paths, True, False), 2: of_kind(paths, False, True)}
    for hop in (1, 2):
        exposed |= set(count_facts(paths, hop, mixed[hop] & train))
        with_kept |= set(count_facts(paths, hop, mixed[hop]))
    n_exposed = round(config.exposed * config.new_facts)
    assert len(exposed) <= n_exposed <= len(exposed) + len(new - with_kept)
    assert ("exposed_old" in splits) == ("old_exposed" in splits) == (config.exposed > 0)
    for hop, name, exposed_name in ((1, "new_old", "exposed_old"), (2, "old_new", "old_exposed")):
        of_exposed = {question for question in mixed[hop]
                      if fact_at(paths, hop, question) in exposed}
        available = count_facts(paths, hop, of_exposed)
        trained = count_facts(paths, hop, of_exposed & train)
        for fact in available:
            assert trained[fact] == min(config.exposed_k, available[fact])
        assert mixed[hop] & train <= of_exposed
        assert set(rows(splits[name])) == mixed[hop] - of_exposed
        check_answers(paths, splits[name])
        if config.exposed > 0:
            assert set(rows(splits[exposed_name])) == of_exposed - train
            check_answers(paths, splits[exposed_name])
    new_new = set(rows(splits["new_new"]))
    check_answers(paths, splits["new_new"])
    assert new_new <= of_kind(paths, True, True)
    for question in of_kind(paths, True, True):
        hops = {fact_at(paths, 1, question), fact_at(paths, 2, question)}
        if hops & exposed:
            assert question not in new_new
        elif config.exposed == 0 or hops <= with_kept:
            assert question in new_new


@given(regime=SHARES, new_facts=st.integers(20, 45), kept=st.floats(0.4, 1),
       exposed=st.sampled_from([0.0, 0.5, 1.0]), exposed_k=st.integers(1, 4),
       data_seed=st.integers(0, 2**63 - 1))
@settings(max_examples=25, deadline=None)
def test_new_facts_obey_every_rule(regime, **changes):
    hop1, hop2, k = regime
    if changes["exposed"] == 0:
        del changes["exposed_k"]
    config = replace(TINY, hop1=hop1, hop2=hop2, k=k, **changes)
    world, splits = small_data(config)
    check_new_facts(world, splits, config, *add_facts(world, splits, config))


# ---------------------------------------------------------------- data: files
def test_own_facts_keep_their_names_and_order(tmp_path):
    """With a byte-order mark, Windows line ends, spaces; one stands twice; Otto is never a head."""
    path = tmp_path / "family.tsv"
    text = ("\ufeffAnna\tmother of\tJörg\r\nJörg\tknows\t李雷\n李雷 \tknows\tAnna\n"
            "Anna\tknows\tAnna\nJörg\tknows\t李雷\n李雷\tmother of\tOtto\n\n")
    path.write_bytes(text.encode())
    world = parse_facts(path.read_bytes(), path, Config(ood_fraction=0.5))
    assert world.entity_names == ("Anna", "Jörg", "李雷", "Otto")
    assert world.relation_names == ("mother of", "knows")
    facts, ood = facts_of(world)
    assert facts == {(0, 0): 1, (0, 1): 0, (1, 1): 2, (2, 1): 0, (2, 0): 3}
    assert len(ood) == 2
    assert len(compositions(world)[0]) == len(walks(world)) == 7
    assert re.findall(r"\d+", describe_world(world)) == ["4", "2", "5", "7"]


@pytest.mark.parametrize("content, said", [
    (b"", "line 1: needs head, relation and tail"),
    (b"a\tr\ta\n\na\tr\tb\n", "line 2: needs head, relation and tail"),
    (b"a\tr\ta\na\t\tb\n", "line 2: needs head, relation and tail"),
    (b"Head\tRelation\tTail\na\tr\ta\n", "line 1: looks like a header"),
    (b"\xef\xbb\xbfhead\trelation\ttail\r\na\tr\ta\n", "line 1: looks like a header"),
    (b"a\tr\ta\nJ\xf6rg\tr\tc\n", "line 2: is not UTF-8 text"),  # Latin-1
    (b"a\tr\tb\nc\tr\td\n", "has no two-hop path"),
    (b"a\tr\ta\n\xef\xbb\xbfb\tr\tc\nb \tr\tc\na\tr\tb\n", "line 4: another tail of .a, r."),
    ("".join(f"a{i}\tr{i}\ta0\n" for i in range(8000)).encode(), "makes over 50000")])
def test_own_facts_that_cannot_be_used_are_refused(content, said):
    with pytest.raises(BadInput, match="facts.tsv.*" + said):
        parse_facts(content, "facts.tsv", TINY)


def write_by_hand(path, **changes):
    """The small world as the file that `parse_data` describes, with some of its arrays changed."""
    world, splits = small_data(replace(TINY, hop1=0.5, hop2=0.5, k=9))
    number_of = {}
    for number, (h, r, _) in enumerate(world.facts.tolist()):
        number_of[h, r] = number
    names = ("A\rna \0", "Jörg", *world.entity_names[2:])
    arrays = {"facts": world.facts, "is_ood": world.is_ood,
              "names": np.array(json.dumps([names, world.relation_names, "mine"]))}
    for name in GIVEN_SPLITS:
        hops = []
        for (h, r1, r2), (b, _) in rows(splits[name]).items():
            hops.append((number_of[h, r1], number_of[b, r2]))
        arrays[name] = hops
    with open(path, "wb") as file:
        np.savez_compressed(file, **{**arrays, **changes})
    return replace(world, entity_names=names), splits


def assert_same_data(one, two):
    """(world, splits) equal to the last row, order and names included."""
    for item in fields(data.World):
        assert np.array_equal(getattr(one[0], item.name), getattr(two[0], item.name))
    assert set(one[1]) == set(two[1])
    for name in one[1]:
        assert np.array_equal(one[1][name], two[1][name])


class Trap:
    """Fails the test when it is unpickled, past every `except Exception`."""
    def __reduce__(self):
        return pytest.fail, ("a data file ran code",)


@pytest.mark.parametrize("name, array", [
    ("facts", np.ones((90, 3))), ("facts", np.zeros((90, 2), int)), ("is_ood", np.zeros(3, bool)),
    ("test_ood", np.full((4, 2), 90)), ("facts", np.array([Trap()])), ("names", np.array("[["))])
def test_what_is_no_data_file_is_refused(name, array, tmp_path):
    path = tmp_path / "data.npz"
    write_by_hand(path, **{name: array})
    with pytest.raises(BadInput, match="data.npz: is no data file"):
        parse_data(path.read_bytes(), path)


# ---------------------------------------------------------------- grok: the models
E = 12      # entities of the smoke preset's world
R = 8       # its relations
BLANK = 20  # its blank
SMALL = Config(d_model=16, batch_size=8, warmup=4, ema=0.9, atomic_share=0.25, decay=0.0,
               eval_every=3)
BLANKED = dict(layout="bidirectional")
PAPER = dict(layout="bidirectional", mixing="tokens", tied=False, copy=True)
KINDS = {
    "default": {}, "bidirectional": BLANKED, "two blocks": dict(n_blocks=2),
    "own blocks": dict(n_blocks=4), "one loop": dict(n_loops=1, min_loops=1),
    "two matrices": dict(tied=False), "copy": dict(BLANKED, copy=True),
    "paper's conditions": dict(PAPER, min_loops=4),
    "recursive": dict(PAPER, model="recursive", n_blocks=2, slots=3),
    "recursive, other sizes": dict(PAPER, model="recursive", n_low=1, n_cycles=3),
    "no residual": dict(PAPER, model="recursive", n_low=2, residual=False),
    "one state": dict(PAPER, model="recursive", n_blocks=2, n_low=2, two_states=False)}
every_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def make_model(**changes):
    """A small float64 model with E entities and R relations."""
    return build_model(replace(SMALL, **changes), E, R).double()


def random_tokens(layout="causal", n=8):
    """n compositions followed by n facts asked alone, (2 n, 3), or (2 n, 4) with a blank more."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.full((2 * n, 3 if layout == "causal" else 4), BLANK)
    tokens[:, 0] = torch.randint(0, E, (2 * n,), generator=generator)
    tokens[:, 1:3] = torch.randint(E, E + R, (2 * n, 2), generator=generator)
    tokens[n:, 2] = BLANK
    return tokens


def places(tokens, layout):
    """Where each row is answered, counted by hand."""
    positions = []
    for row in tokens.tolist():
        n_tokens = len(row) - row.count(BLANK)
        positions.append(n_tokens - 1 if layout == "causal" else n_tokens)
    return positions


def norm(x):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def swiglu(x, gate_up, down):
    gate, up = (x @ gate_up.T).tensor_split(2, dim=-1)
    return (gate * gate.sigmoid() * up) @ down.T


def restated_token_mixing(state, gate_up, down):
    """A gated MLP along the positions of (B, T, D), as sums over positions and hidden units."""
    n_hidden = len(gate_up) // 2
    hidden = []
    for unit in range(n_hidden):
        gate = up = 0
        for position in range(state.shape[1]):
            gate = gate + gate_up[unit, position] * state[:, position]
            up = up + gate_up[n_hidden + unit, position] * state[:, position]
        hidden.append(gate * gate.sigmoid() * up)
    mixed = []
    for position in range(state.shape[1]):
        total = 0
        for unit in range(n_hidden):
            total = total + down[position, unit] * hidden[unit]
        mixed.append(total)
    return torch.stack(mixed, dim=1)


def restated_attention(state, qkv, out, causal):
    """With PyTorch's own attention, and RoPE by complex numbers."""
    _, T, D = state.shape
    angle = torch.arange(T)[:, None] / 100.0 ** (torch.arange(D // 2) / (D // 2))
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)      # (T, D/2)
    q, k, v = (state @ qkv.T).split(D, dim=-1)                                  # (B, T, D) each
    turned = []
    for x in (q, k):
        pairs = torch.complex(*x.split(D // 2, dim=-1)) * turn
        turned.append(torch.cat([pairs.real, pairs.imag], dim=-1))
    return F.scaled_dot_product_attention(*turned, v, is_causal=causal) @ out.T


def restated_looped(model, tokens, n_loops):
    """The teaching model's logits at every position, (B, T, V), after n_loops loops."""
    config = model.config
    weights = dict(model.named_parameters())
    x = norm(weights["embedding"])[tokens]
    state = x
    for loop in range(n_loops):
        block = f"blocks.{loop % config.n_blocks}."
        if config.mixing == "tokens":
            mixed = restated_token_mixing(state, weights[block + "mix.gate_up.weight"],
                                          weights[block + "mix.down.weight"])
            mixed = mixed @ weights[block + "mix.out.weight"].T
        else:
            mixed = restated_attention(state, weights[block + "mix.qkv.weight"],
                                       weights[block + "mix.out.weight"],
                                       causal=config.layout == "causal")
        positions = []
        for position in range(tokens.shape[1]):
            value = norm(x[:, position] + mixed[:, position])
            positions.append(norm(swiglu(value, weights[block + "gate_up.weight"],
                                         weights[block + "down.weight"])))
        state = torch.stack(positions, dim=1)
    vectors = norm(weights["embedding" if config.tied else "head"])
    cosine = F.cosine_similarity(state[:, :, None], vectors, dim=-1)            # (B, T, V)
    return config.logit_scale * math.sqrt(config.d_model) * cosine


def restated_recursive(model, tokens):
    """The paper's recursion, its logits at every token's position, (B, T, V)."""
    config = model.config
    weights = dict(model.named_parameters())
    slots = weights["scratch"].repeat(len(tokens), 1, 1)
    x = torch.cat([weights["embedding"][tokens], slots], dim=1)
    z_low = model.first_low.repeat(len(tokens), x.shape[1], 1)
    z_high = model.first_high.repeat(len(tokens), x.shape[1], 1)
    for _ in range(config.n_cycles):
        z_low = z_low.detach()  # so that the gradient runs through the last cycle alone
        z_high = z_high.detach()
        for _ in range(config.n_low):
            z_low = restated_pass(weights, z_low + z_high + x, config)
        if config.two_states:
            z_high = restated_pass(weights, z_high + z_low, config)
    if not config.two_states:
        z_high = z_low
    return z_high[:, :tokens.shape[1]] @ weights["head"].T


def restated_pass(weights, z, config):
    """z (B, T, D) through every block: each half adds to what is there and is normed after."""
    kept = 1.0 if config.residual else 0.0
    for number in range(config.n_blocks):
        block = f"blocks.{number}."
        z = norm(kept * z + restated_token_mixing(z, weights[block + "mix_gate_up.weight"],
                                                  weights[block + "mix_down.weight"]))
        positions = []
        for position in range(z.shape[1]):
            value = z[:, position]
            positions.append(norm(kept * value + swiglu(value, weights[block + "gate_up.weight"],
                                                        weights[block + "down.weight"])))
        z = torch.stack(positions, dim=1)
    return z


def restated(model, tokens, n_loops):
    if model.config.model == "recursive":
        return restated_recursive(model, tokens)
    return restated_looped(model, tokens, n_loops)


@every_kind
def test_forward_and_gradients_equal_an_independent_restatement(changes):
    """No parameter is left out: `grad` refuses those that the logits do not depend on."""
    model = make_model(**changes)
    layout = model.config.layout
    tokens = random_tokens(layout)
    answers = torch.arange(len(tokens)) % E
    full = restated(model, tokens, model.config.n_loops)
    expected = torch.stack([row[at] for row, at in zip(full, places(tokens, layout))])
    logits = model(tokens)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(F.cross_entropy(logits, answers), parameters)
    restated_gradients = torch.autograd.grad(F.cross_entropy(expected, answers), parameters)
    for one, two in zip(gradients, restated_gradients):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)  # the cosine has no 1e-6 in it


def test_the_looped_model_can_be_run_for_fewer_loops():
    model = make_model()
    tokens = random_tokens()
    for n_loops in range(1, 5):
        expected = restated(model, tokens, n_loops)
        for row, full, at in zip(model(tokens, n_loops), expected, places(tokens, "causal")):
            torch.testing.assert_close(row, full[at], rtol=1e-5, atol=1e-5)


def test_the_hook_of_the_recursive_model_is_called_in_every_loop_and_each_has_its_name():
    """At the paper's sizes 28 loops and 14 passes; a gradient runs through the last cycle only."""
    model = make_model(**KINDS["recursive"])
    calls = []

    def keep(loop, part, value):
        assert value.shape == (16, 4 + 3, 16)
        assert value.requires_grad == (loop >= 14)
        calls.append((loop, part))
        return value

    model(random_tokens("bidirectional"), edit=keep)
    names = []
    for cycle in (1, 2):
        passes = [f"z_L pass {6 * (cycle - 1) + number}" for number in range(1, 7)]
        for name in [*passes, f"z_H pass {cycle}"]:
            names += [f"{name}, block 1", f"{name}, block 2"]
    assert calls == list(itertools.product(range(28), PARTS))
    assert model.loop_names == names
    assert model.n_loops == 28
    assert model.stages == [loop for loop in range(28) if names[loop].endswith("block 2")]


@every_kind
def test_what_the_hook_returns_takes_the_place_of_what_it_was_given(changes):
    """Another query's states give its logits, and what was mixed for it changes them; a query's own
    values change nothing. The last state, read and unembedded, is the output."""
    model = make_model(**changes)
    tokens = random_tokens(model.config.layout)[:8]  # compositions, all answered at one position
    donor = tokens.roll(1, 0)
    ours = run_values(model, tokens)
    theirs = run_values(model, donor)
    assert model.n_loops == len(model.loop_names) == len(ours["state"])

    def their_states(loop, part, value):
        return theirs[part][loop] if part == "state" else value

    def their_first_mixed(loop, part, value):
        return theirs[part][loop] if (loop, part) == (0, "mixed") else value

    def our_values(loop, part, value):
        return ours[part][loop].clone()

    logits = model(tokens)
    assert torch.equal(model(tokens, edit=their_states), model(donor))
    assert not torch.allclose(model(tokens, edit=their_first_mixed), logits)
    assert torch.equal(model(tokens, edit=our_values), logits)
    assert torch.equal(model.unembed(model.read(ours["state"][-1], tokens)), logits)


def count_parameters(**changes):
    return sum(weight.numel() for weight in make_model(**changes).parameters())


def test_loops_and_passes_share_their_parameters():
    for n_loops in (2, 7):
        assert count_parameters(n_loops=n_loops) == count_parameters()
    recursive = KINDS["recursive"]
    assert count_parameters(**recursive, n_low=3, n_cycles=5) == count_parameters(**recursive)
    assert count_parameters(n_blocks=4) > count_parameters()


def test_preset_paper_has_the_papers_number_of_parameters():
    """44.5 million, the paper's 44.6 but for what its halting head and its own extras hold."""
    config = Config(**PRESETS["paper"][2])
    E = 2000
    R = 200
    D = 1536
    T = 4 + 16
    embeddings = 2 * (E + R + 1) * D
    mixing = T * 8 * T + 4 * T * T
    mlp = 3 * D * (8 * D // 3)
    with torch.device("meta"):  # shapes without numbers
        model = build_model(config, E, R)
    n_parameters = sum(weight.numel() for weight in model.parameters())
    assert n_parameters == embeddings + 16 * D + 2 * (mixing + mlp)
    assert round(n_parameters / 1e6, 1) == 44.5


# ---------------------------------------------------------------- grok: training
def smoke_config(**changes):
    return Config(**{**PRESETS["smoke"][2], **changes})


def make_trainer(**changes):
    return Trainer(replace(SMALL, **changes), *small_data(smoke_config()))


@every_kind
def test_loss_is_the_mean_cross_entropy_of_the_graded_loops_and_positions(changes):
    """Loops min_loops to n_loops, each as if the model ended there; of the recursive model the
    last. With `copy` all positions, each of which shows its token, or the answer."""
    config = replace(SMALL, **changes)
    tokens = random_tokens(config.layout, n=4)
    answers = torch.arange(len(tokens)) % E
    last = config.n_loops
    for least in (last,) if config.model == "recursive" else (1, last):
        graded_from = {} if config.model == "recursive" else dict(min_loops=least)
        model = make_model(**{**changes, **graded_from})
        losses = []
        for loop in range(least, last + 1):
            full = restated(model, tokens, loop)
            positions = places(tokens, config.layout)
            for row, at, logits, answer in zip(tokens, positions, full, answers):
                wanted = row.clone()
                wanted[at] = answer
                graded = slice(len(row)) if config.copy else slice(at, at + 1)
                losses.append(F.cross_entropy(logits[graded], wanted[graded]).item())
        assert loss_of(model, tokens, answers).item() == pytest.approx(np.mean(losses), rel=1e-5)


@pytest.mark.parametrize("layout", ["causal", "bidirectional"])
def test_training_rows_are_the_facts_then_the_training_compositions(layout):
    """Entity e is token e, relation r token E + r; what is not asked stays blank."""
    world, splits = small_data(smoke_config(hop1=1.0, hop2=1.0))
    tokens, answers, n_facts = training_rows(splits, world, layout, torch.device("cpu"))
    facts, _ = facts_of(world)
    fact_rows = {}
    composition_rows = {}
    for number, (row, t) in enumerate(zip(tokens.tolist(), answers.tolist())):
        h = row[0]
        r1 = row[1] - E
        r2 = row[2] - E
        if number < n_facts:
            assert set(row[2:]) == {BLANK}
            fact_rows[h, r1] = t
        else:
            assert set(row[3:]) <= {BLANK}
            composition_rows[h, r1, r2] = (facts[h, r1], t)
    assert fact_rows == facts and n_facts == len(facts)
    assert composition_rows == rows(splits["train_inferred"])
    assert len(tokens) == len(fact_rows) + len(composition_rows)


@pytest.mark.parametrize("share, n_atomic", [(0.25, 15_000), (0.5, 30_000), (0.0, 20_000)])
def test_a_batch_holds_exactly_its_share_of_facts_and_without_one_all_rows_alike(share, n_atomic):
    """Of 30 rows 10 are facts; no row is drawn more than 5 standard deviations too often."""
    config = replace(SMALL, atomic_share=share, batch_size=60_000)
    times = torch.bincount(draw_batch(config, 10, 30, torch.Generator()), minlength=30)
    assert len(times) == 30 and times.sum() == 60_000
    if share > 0:
        assert times[:10].sum() == n_atomic
    for kind, total in ((times[:10], n_atomic), (times[10:], 60_000 - n_atomic)):
        mean = total / len(kind)
        assert ((kind - mean).abs() <= 5 * mean ** 0.5).all()


def test_the_step_size_rises_stays_and_falls_to_a_fiftieth():
    config = replace(SMALL, lr=1.0, steps=1000, warmup=10, decay=0.4)
    for step, expected in ((0, 0.1), (4, 0.5), (9, 1), (599, 1), (800, 0.5), (900, 0.25),
                           (999, 0.02)):
        assert step_size(config, step) == pytest.approx(expected)
    assert step_size(replace(config, decay=0.0), 999) == 1
    assert step_size(replace(config, warmup=0), 0) == 1


class RestatedAdamW:
    """AdamW and the average of the weights, a list of tensors each, by the textbook."""

    def __init__(self, config, weights):
        self.config = config
        self.weights = [weight.detach().clone() for weight in weights]
        self.average = [weight.clone() for weight in self.weights]
        self.first_moment = [torch.zeros_like(weight) for weight in self.weights]
        self.second_moment = [torch.zeros_like(weight) for weight in self.weights]

    def step(self, number, gradients):
        """Step 1, 2, ...; returns its size."""
        config = self.config
        lr = config.lr * min(1, number / max(1, config.warmup))
        if config.decay:
            lr *= min(1, (config.steps - (number - 1)) / (config.decay * config.steps))
        decay = min(config.ema, number / (number + 10))
        for i, gradient in enumerate(gradients):
            self.first_moment[i] = 0.9 * self.first_moment[i] + 0.1 * gradient
            self.second_moment[i] = (config.beta2 * self.second_moment[i]
                                     + (1 - config.beta2) * gradient ** 2)
            m = self.first_moment[i] / (1 - 0.9 ** number)
            v = self.second_moment[i] / (1 - config.beta2 ** number)
            shrunk = self.weights[i] - lr * config.weight_decay * self.weights[i]
            self.weights[i] = shrunk - lr * m / (v.sqrt() + 1e-8)
            self.average[i] = decay * self.average[i] + (1 - decay) * self.weights[i]
        return lr


@pytest.mark.parametrize("changes", [
    dict(warmup=4), dict(warmup=0, beta2=0.9), dict(warmup=2, decay=0.5, weight_decay=1.0)])
def test_train_step_is_adamw_with_warm_up_fall_and_a_moving_average(changes):
    """The warm-up ends, and the average's decay reaches its limit .2 (at step 3); both passed. A
    measurement, every 3 steps, is of the average, and of the losses since the last one."""
    trainer = make_trainer(seed=5, ema=0.2, steps=8, **changes)
    trainer.model.double()
    trainer.average.double()
    model = copy.deepcopy(trainer.model)
    restatement = RestatedAdamW(trainer.config, model.parameters())
    generator = torch.Generator().manual_seed(5)
    losses = []
    for step in range(1, 9):
        drawn = draw_batch(trainer.config, trainer.n_facts, len(trainer.tokens), generator)
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), restatement.weights):
                parameter.copy_(weight)
        loss = loss_of(model, trainer.tokens[drawn], trainer.answers[drawn])
        losses.append(loss.item())
        lr = restatement.step(step, torch.autograd.grad(loss, list(model.parameters())))
        trainer.train_step()
        assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        for trained, expected in ((trainer.model, restatement.weights),
                                  (trainer.average, restatement.average)):
            torch.testing.assert_close(list(trained.parameters()), expected, rtol=1e-9, atol=1e-9)
        if step % 3 == 0 or step == 8:
            line = trainer.measure()
            assert line["loss"] == pytest.approx(np.mean(losses), rel=1e-6)
            assert line.items() >= evaluate(trainer.average, trainer.eval_sets).items()
            losses.clear()


def test_lens_rates_on_states_made_by_hand():
    """Queries 0, 1, 2 show their bridge somewhere. Queries 0 and 2 choose (loop 1, position 0); all
    four would have chosen (0, 1). Of the rest, 1 and 3, none shows it there; 9 is nobody's."""
    top = torch.tensor([[[9, 0, 9], [9, 1, 9], [9, 9, 9], [2, 9, 9]],
                        [[0, 0, 6], [9, 9, 7], [2, 9, 8], [9, 9, 5]]])
    assert lens_rates(top, torch.arange(4)) == {
        "map": [[0, 0.5, 0], [0.5, 0.25, 0]], "any": 0.75, "best": 0.0, "best_site": [1, 0]}
    assert lens_rates(top, torch.arange(4).roll(1))["any"] == 0.25


@pytest.mark.parametrize("kind", ["default", "recursive"])
@pytest.mark.parametrize("device, bf16", [
    ("cpu", True), ("cuda", False), ("cuda", True), ("mps", False)])
def test_other_devices_train_like_the_cpu_and_bf16_rounds_the_training_alone(device, bf16, kind):
    if not getattr(torch, device).is_available():
        pytest.skip(f"no {device} is here")
    here = make_trainer(**KINDS[kind])
    there = make_trainer(**KINDS[kind], device=device, bf16=bf16)
    tokens = here.tokens[:64]
    assert torch.allclose(there.model(tokens.to(device)).cpu(), here.model(tokens), atol=1e-4)
    here.train_step()
    there.train_step()
    if device == "cpu":  # elsewhere other rows are drawn
        assert here.losses[0] != there.losses[0] == pytest.approx(here.losses[0].item(), rel=0.02)
    assert {weight.dtype for weight in there.model.parameters()} == {torch.float32}
    assert there.measure()["step"] == 1


# ---------------------------------------------------------------- grok: a run and its folder
SMOKE = "--preset smoke --phi 1 --device cpu --steps 160 --eval-every 20".split()
BRIEF = [*SMOKE, "--steps", "8", "--eval-every", "4"]
TUNED = ("--start run --new-facts 20 --kept 0.5 --lr 0 --device cpu --steps 8 "  # lr 0: it is
         "--eval-every 4".split())                                # fitted from the first
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """(the process, its run folder) of a smoke run that nothing interrupted, in a Python that drops
    docstrings and asserts; its output goes to a pipe that holds few letters."""
    folder = tmp_path_factory.mktemp("äé→李") / "run"
    arguments = [sys.executable, "-OO", grok.__file__, *SMOKE, "--out", str(folder)]
    return subprocess.run(arguments, capture_output=True, timeout=300, env=ENVIRONMENT), folder


@pytest.fixture
def here(command, tmp_path, monkeypatch):
    """A folder to work in that holds the smoke run as `run`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(command[1], "run")
    return tmp_path


def metrics(folder):
    """metrics.jsonl of a finished run as a list, less the times."""
    return [{**line, "seconds": None} for line in read_run(folder)[1]]


def weights_in(path):
    saved = torch.load(path, weights_only=True)
    return saved["average"] if path.name == "last.pt" else saved["weights"]


def assert_same_run(one, two, but="-"):
    """Files, metrics but for the times, and weights equal to the bit."""
    names = {path.name for path in one.iterdir() if not path.match(but)}
    assert names == {path.name for path in two.iterdir() if not path.match(but)}
    assert metrics(one) == metrics(two)
    for path in one.glob("*.pt"):
        weights = weights_in(path)
        others = weights_in(two / path.name)
        assert weights.keys() == others.keys()
        for name in weights:
            assert torch.equal(weights[name], others[name])


def tree(folder):
    """Every path below a folder, with its time and content."""
    contents = {}
    for path in folder.rglob("*"):
        is_readable = path.is_file()  # a pipe is no file
        contents[path] = path.stat().st_mtime_ns, path.read_bytes() if is_readable else None
    return contents


def refuses(options, said, capsys):
    """The command says one line that holds `said`, exits with status 2, and writes nothing."""
    capsys.readouterr()
    before = tree(Path.cwd())
    assert grok.main(options) == 2
    assert tree(Path.cwd()) == before
    err = capsys.readouterr().err
    assert err.startswith("grok.py: ") and err.count("\n") == 1 and said in err, err


def cut_metrics(folder, n_lines):
    """Leave so many lines of metrics.jsonl."""
    path = Path(folder, "metrics.jsonl")
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:n_lines]))


def test_the_command_works_without_docstrings_and_asserts(command):
    """Every evaluation is a line, and so is every sentence about what came out."""
    process, folder = command
    assert process.returncode == 0 and process.stderr == b"", process.stderr
    lines = process.stdout.splitlines()
    assert sum(line.startswith(b"step ") for line in lines) == 8
    assert matplotlib.image.imread(folder / "curve.png").std() > 0.05


def test_a_run_learns_and_leaves_what_is_documented(here):
    """fit.pt is of the first evaluation at which training is fitted; config.json is the Config."""
    folder = Path("run")
    history = metrics(folder)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    assert history[-1]["accuracy"]["train_inferred"] >= 0.99
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "last.pt", "fit.pt", "end.pt", "curve.png"}
    config = smoke_config(phi=1.0, steps=160, eval_every=20, preset="smoke")
    assert read_config(folder) == config
    assert json.loads((folder / "config.json").read_text(encoding="utf-8")) == asdict(config)
    assert [line["step"] for line in history] == list(range(20, 161, 20))
    for line in history:
        assert set(line) == {"step", "loss", "seconds", "accuracy", "lens"}
        assert set(line["accuracy"]) == set(SPLITS)
        assert set(line["lens"]) == set(SPLITS[3:])
    fit = first_step(history, 0.99, "train_inferred")
    for weights, step in (("fit", fit), ("end", 160)):
        assert torch.load(folder / f"{weights}.pt", weights_only=True)["step"] == step
        model, world, splits = load_run(folder, weights)
        eval_sets = make_eval_sets(splits, world, config.layout, "cpu")
        expected = history[step // 20 - 1]
        assert expected.items() >= evaluate(model, eval_sets).items()


def test_first_step_is_the_first_at_a_level():
    history = []
    for step in range(11):
        history.append({"step": step, "accuracy": {"a": step / 10}, "lens": {"a": {"any": 0.25}}})
    assert first_step(history, 0.5, "a") == 5
    assert first_step(history, 1.1, "a") is None
    assert first_step(history, 0, "b") is None
    assert first_step(history, 0.25, "a", "any") == 0
    assert first_step(history, 0.26, "a", "any") is first_step(history, 0, "a", "best") is None


def test_the_same_seed_gives_the_same_metrics_and_a_seed_is_not_a_data_seed(here):
    """Whatever the global random states are, and in a thread, as a notebook may."""
    for number, (name, *more) in enumerate((["a"], ["b"], ["c", "--seed", "1"],
                                            ["d", "--data-seed", "1"])):
        np.random.seed(number)
        torch.manual_seed(number)
        arguments = [*BRIEF, *more, "--out", name]
        if name == "b":
            thread = threading.Thread(target=grok.main, args=(arguments,), daemon=True)
            thread.start()
            thread.join(60)
        else:
            assert grok.main(arguments) == 0
    assert metrics("a") == metrics("b")
    assert metrics("c") != metrics("a") != metrics("d")
    a, c, d = [load_run(name)[1:] for name in "acd"]
    assert_same_data(a, c)
    assert facts_of(a[0]) != facts_of(d[0])


# ---------------------------------------------------------------- grok: runs that go on
def test_a_finished_run_is_left_alone_and_more_steps_end_as_one_long_run(here, capsys):
    """Shipped ones are without last.pt; a step size that falls knows its last step."""
    shutil.copytree("run", "shipped", ignore=shutil.ignore_patterns("last.pt"))
    for name in ("run", "shipped"):
        before = tree(here)
        assert grok.main([*SMOKE, "--out", name]) == 0
        assert "already done" in capsys.readouterr().out
        after = tree(here)
        for path in after:
            assert path.name in ("curve.png", name) or before[path] == after[path]
        refuses([*SMOKE, "--steps", "100", "--out", name], f"steps = 100: {name} holds", capsys)
    longer = [*SMOKE, "--steps", "200", "--out"]
    refuses([*longer, "shipped"], "out = shipped: holds a run of 160 steps without the last.pt",
            capsys)
    assert grok.main([*longer, "run"]) == 0
    assert grok.main([*longer, "long"]) == 0
    assert_same_run(Path("run"), Path("long"))
    falling = [*BRIEF, "--decay", "0.5", "--out", "falling"]
    assert grok.main(falling) == 0
    refuses([*falling, "--steps", "12"], "steps = 12: falling holds a run of 8", capsys)


def test_metrics_alone_say_whether_a_run_is_done(here, capsys):
    """Whatever weights are there: end.pt without all of its evaluations is no finished run."""
    shutil.copytree("run", "whole")
    assert is_finished("run")
    for n_lines in (3, 0):
        cut_metrics("run", n_lines)
        assert not is_finished("run")
        with pytest.raises(BadInput, match=f"run: is not finished .step {20 * n_lines} of 160"):
            read_run("run")
    Path("run/metrics.jsonl").unlink()
    assert not is_finished("run")
    assert grok.main([*SMOKE, "--out", "run"]) == 0
    assert_same_run(Path("run"), Path("whole"))
    cut_metrics("run", 3)
    Path("run/last.pt").unlink()
    refuses([*SMOKE, "--out", "run"], "out = run: holds a run of 60 steps without the last.pt",
            capsys)
    for path in Path("whole").glob("*.pt"):
        path.unlink()
    assert is_finished("whole")


@pytest.mark.parametrize("options, said", [
    ("--seed 1", "seed = 1: run holds a run with seed = 0"), ("--phi 2", "phi = 2.0: run holds"),
    ("--regime both_full", "hop1 = 1.0: run holds a run with hop1 = 0.0")])
def test_a_folder_with_another_run_is_left_alone(options, said, here, capsys):
    """Also when it was killed before its first evaluation."""
    arguments = [*SMOKE, *options.split(), "--out", "run"]
    refuses(arguments, said, capsys)
    for path in Path("run").iterdir():
        if path.name != "config.json":
            path.unlink()
    refuses(arguments, said, capsys)


@pytest.mark.parametrize("name", ["fit.pt", "end.pt", "last.pt", "start.pt", "metrics.jsonl",
                                  "facts.tsv", "facts.npz"])
def test_what_lies_without_a_config_belongs_to_no_run(name, here, capsys):
    """It would be taken for this run's, or be overwritten."""
    Path("new").mkdir()
    shutil.copy("run/end.pt", Path("new", name))
    refuses([*BRIEF, "--out", "new"], f"out = new: holds {name} of a run without config", capsys)


@contextmanager
def started(*options):
    """`python grok.py` in a process of its own, which is killed in the end, come what may."""
    process = subprocess.Popen([sys.executable, grok.__file__, *options], env=ENVIRONMENT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for_lines(path, n_lines):
    """Until so many evaluations are written; not for ever."""
    patience = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < n_lines:
        assert time.monotonic() < patience
        time.sleep(0.002)


def test_a_run_killed_three_times_ends_as_if_it_never_was(command, tmp_path):
    """The first time two processes are at work in its folder; each kill comes at an instant that
    nobody chose."""
    run = tmp_path / "run"
    options = [*SMOKE, "--out", str(run)]
    with started(*options) as one, started(*options) as two:
        wait_for_lines(run / "metrics.jsonl", 2)
    with started(*options) as three:
        wait_for_lines(run / "metrics.jsonl", 5)
    for process in (one, two, three):
        assert process.returncode not in (0, 1, 2)  # it was at work until it was killed
    assert not is_finished(run)
    assert grok.main(options) == 0
    assert_same_run(run, command[1], but="*.tmp")


class Killed(BaseException):
    """Stands for the end of the process at one exact place."""


@pytest.mark.parametrize("owner, name, error", [
    (Path, "write_bytes", Killed()), (os, "replace", Killed()),
    (Path, "write_bytes", OSError(errno.ENOSPC, "No space left on device"))])
def test_a_run_stopped_at_any_write_ends_as_if_it_never_was(owner, name, error, here, capsys,
                                                            monkeypatch):
    """Stopped in the middle of each of its files, or just before each is in place; by a full disk,
    which is said in one line."""
    monkeypatch.setattr(grok, "draw_curve", lambda config, history: grok.Figure((1, 1)))
    assert grok.main([*TUNED, "--out", "never"]) == 0
    function = getattr(owner, name)
    n_writes = 8  # config.json, start.pt; fit.pt, last.pt, metrics; end.pt, last.pt, metrics
    calls = []
    fatal = 0

    def die(path, content):
        calls.append(path)
        if len(calls) != fatal:
            return function(path, content)
        if owner is Path:
            function(path, content[:len(content) // 2])
        raise error

    for fatal in range(1, n_writes + 2):
        calls.clear()
        shutil.rmtree("new", ignore_errors=True)
        is_stopped = fatal <= n_writes
        with monkeypatch.context() as patch, suppress(Killed):
            patch.setattr(owner, name, die)
            assert grok.main([*TUNED, "--out", "new"]) == (2 if is_stopped else 0)
        assert len(calls) == min(fatal, n_writes)
        is_full = is_stopped and isinstance(error, OSError)
        said = capsys.readouterr().err
        assert said.count("\n") == ("No space left on device" in said) == is_full
        assert is_finished("new") == (not is_stopped)
        assert grok.main([*TUNED, "--out", "new"]) == 0
        assert_same_run(Path("new"), Path("never"))


def after_step(monkeypatch, number, action):
    """Let `action(trainer)` happen in the step of this number, after all that belongs to it."""
    step = Trainer.train_step

    def train_step(trainer):
        step(trainer)
        if trainer.step == number:
            action(trainer)

    monkeypatch.setattr(Trainer, "train_step", train_step)


@pytest.mark.parametrize("times, said", [
    (1, "stopped at step 3; the same command goes on"), (3, "stopped")])
def test_ctrl_c_before_the_first_evaluation_loses_nothing(times, said, here, monkeypatch, capsys):
    """It waits for the end of the step, then saves; whoever presses it three times will not wait.
    Either way the same command ends as if it had not been pressed."""
    before = signal.getsignal(signal.SIGINT)

    def press(trainer):
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        after_step(patch, 3, press)
        assert grok.main([*BRIEF, "--out", "cut"]) == 130
    assert capsys.readouterr().err == f"grok.py: {said}\n"
    assert signal.getsignal(signal.SIGINT) is before
    left = {path.name for path in Path("cut").iterdir()}
    assert left == ({"config.json", "last.pt"} if times == 1 else {"config.json"})
    if times == 1:
        assert torch.load("cut/last.pt", weights_only=True)["step"] == 3
    assert grok.main([*BRIEF, "--out", "cut"]) == 0
    assert grok.main([*BRIEF, "--out", "never"]) == 0
    assert_same_run(Path("cut"), Path("never"))


def test_a_run_is_saved_once_a_minute_between_evaluations(here, monkeypatch):
    def let_a_minute_pass(trainer):
        monkeypatch.setattr(time, "perf_counter", lambda: 1e9)

    def die(trainer):
        raise Killed

    after_step(monkeypatch, 2, let_a_minute_pass)
    after_step(monkeypatch, 3, die)
    with suppress(Killed):
        grok.main([*BRIEF, "--out", "cut"])
    assert torch.load("cut/last.pt", weights_only=True)["step"] == 2


def spoil_a_loss(trainer):
    trainer.losses[1] = torch.tensor(math.nan)


def spoil_a_weight(trainer):
    trainer.averaged[0][0, 0] = math.inf


@pytest.mark.parametrize("number, action, said", [
    (6, spoil_a_loss, "loss is not finite at step 6: lower lr = 0.004"),
    (8, spoil_a_weight, "loss is not finite at step 8: lower lr = 0.004")])
def test_what_is_not_finite_is_said_and_never_saved(number, action, said, here, monkeypatch,
                                                    capsys):
    """The weights that the last step spoils show in no loss."""
    after_step(monkeypatch, number, action)
    assert grok.main([*BRIEF, "--out", "cut"]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert [line["step"] for line in grok.read_history("cut")] == [4]
    assert torch.load("cut/last.pt", weights_only=True)["step"] == 4


def no_kernels(trainer):
    raise RuntimeError("CUDA error: no kernel image is available for execution on the device")


def full_gpu(trainer):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nSee more")


def full_windows(trainer):
    raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.")


@pytest.mark.parametrize("action, said", [
    (lambda trainer: torch.empty(2**50), "not enough memory"),
    (lambda trainer: np.empty(2**50), "not enough memory"),
    (full_gpu, "not enough memory"), (full_windows, "not enough memory"),
    (no_kernels, "--device cpu")])
def test_what_the_machine_lacks_is_said_in_one_line(action, said, here, capsys, monkeypatch):
    after_step(monkeypatch, 1, action)
    assert grok.main([*BRIEF, "--out", "cut"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("grok.py: ") and err.count("\n") == 1 and said in err


def a_mistake_of_ours(trainer):
    raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_a_mistake_of_ours_keeps_its_traceback(here, monkeypatch):
    after_step(monkeypatch, 1, a_mistake_of_ours)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        grok.main([*BRIEF, "--out", "cut"])


# ---------------------------------------------------------------- grok: own facts and starts
@pytest.fixture
def source(here):
    """A folder to work in, with the run, a data file and own facts, neither named as it should."""
    write_by_hand("set.tsv")
    lines = []
    for head in range(9):
        for relation in range(3 + head % 3):
            lines.append(f"p{head}\tr{relation}\tp{(3 * head + relation * relation) % 9}")
    Path("own.npz").write_text("\n".join(lines), encoding="utf-8")
    return here


ON_FILE = {"set.tsv": [*BRIEF[:2], *BRIEF[4:], "--facts", "set.tsv"],
           "own.npz": [*BRIEF, "--facts", "own.npz", "--ood-fraction", "0.3"]}


def measured(folder):
    """What its end weights answer and show, by all that lies in the run folder itself."""
    model, world, splits = load_run(folder)
    return evaluate(model, make_eval_sets(splits, world, model.config.layout, "cpu"))


@pytest.mark.parametrize("file", ON_FILE)
def test_a_run_on_own_facts_takes_them_along_and_stands_alone(file, source, capsys):
    """What is in the file decides what it is. The runs are moved, the file and the run that the
    other started from deleted."""
    content = Path(file).read_bytes()
    assert grok.main([*ON_FILE[file], "--out", "own"]) == 0
    assert grok.main([*TUNED, "--start", "own", "--new-facts", "8", "--kept", "1",
                      "--out", "new"]) == 0
    before = {name: measured(name) for name in ("own", "new")}
    Path(file).unlink()
    Path("elsewhere").mkdir()
    shutil.move("own", "elsewhere/own")
    shutil.move("new", "elsewhere/new")
    own = Path("elsewhere/own")
    _, world, splits = load_run(own)
    config, history = read_run(own)
    assert (own / config.facts).read_bytes() == content
    assert describe_world(world) in capsys.readouterr().out
    degree = np.bincount(world.facts[:, 0]).max()
    assert (config.n_entities, config.n_relations, config.out_degree) == (
        world.n_entities, world.n_relations, degree)
    if file == "own.npz":
        assert config.facts == "facts.tsv"
        check_splits(world, config, splits)
    else:
        assert config.facts == "facts.npz"
        assert_same_data((world, splits), write_by_hand("again.npz"))
    assert measured(own) == before["own"]
    assert measured(own)["accuracy"] == history[-1]["accuracy"]
    shutil.rmtree(own)
    assert measured("elsewhere/new") == before["new"]
    _, new_world, new_splits = load_run("elsewhere/new")
    check_new_facts(world, splits, read_config("elsewhere/new"), new_world, new_splits)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_own_facts_may_come_from_a_pipe(source):
    """It is read once: whoever reads it again gets nothing."""
    content = Path("own.npz").read_bytes()
    os.mkfifo("pipe")

    def write():
        for text in (content, b""):
            Path("pipe").write_bytes(text)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    assert grok.main([*ON_FILE["own.npz"], "--facts", "pipe", "--out", "piped"]) == 0
    os.close(os.open("pipe", os.O_RDONLY | os.O_NONBLOCK))  # lets the writer go
    writer.join(10)
    assert Path("piped/facts.tsv").read_bytes() == content
    assert is_finished("piped")


@pytest.mark.parametrize("weights, new_mlp", [("fit", False), ("end", False), ("none", False),
                                              ("fit", True)])
def test_a_run_starts_from_the_weights_and_world_of_another(weights, new_mlp, here, capsys):
    """With step size 0 it ends with the weights it began with."""
    options = [*TUNED, "--weights", weights, "--new-mlp", str(new_mlp)]
    assert grok.main([*options, "--out", "new"]) == 0
    start = read_config("run")
    config = read_config("new")
    assert (config.preset, config.weights) == ("tune", weights)
    for name in grok.settings_of("the world", "the model"):
        if name not in ("new_facts", "kept"):
            assert getattr(config, name) == getattr(start, name)
    _, world, splits = load_run("run")
    check_new_facts(world, splits, config, *load_run("new")[1:])
    assert Path("new/start.pt").exists() == (weights != "none")
    drawn = build_model(config, E, R).state_dict()
    first = {}
    for name in drawn:
        is_of_mlp = name in ("blocks.0.gate_up.weight", "blocks.0.down.weight")
        if weights == "none" or new_mlp and is_of_mlp:
            first[name] = drawn[name]
        else:
            first[name] = weights_in(Path("run", f"{weights}.pt"))[name]
    for name, weight in weights_in(Path("new/end.pt")).items():
        torch.testing.assert_close(weight, first[name], rtol=1e-6, atol=1e-6)
    refuses([*TUNED, "--start", "new"], "start = new: has new facts already", capsys)


def test_the_end_of_a_run_that_is_not_finished_is_no_start(here, capsys):
    lines = Path("run/metrics.jsonl").read_bytes().splitlines(keepends=True)
    Path("run/metrics.jsonl").write_bytes(b"".join(lines[:-1]))
    refuses([*TUNED, "--out", "new"], "start = run: is not finished; --weights fit", capsys)
    assert not Path("new").exists()


def test_a_start_that_is_trained_further_or_deleted_changes_nothing(here):
    assert grok.main([*TUNED, "--out", "new"]) == 0
    before = measured("new")
    start = weights_in(Path("new/start.pt"))
    assert grok.main([*SMOKE, "--steps", "180", "--out", "run"]) == 0
    assert not torch.equal(weights_in(Path("run/end.pt"))["embedding"], start["embedding"])
    assert measured("new") == before
    shutil.rmtree("run")
    assert measured("new") == before


def test_a_run_with_other_facts_or_another_start_is_another_run(source, capsys):
    """Which is told by what it took along."""
    own = [*ON_FILE["own.npz"], "--out", "own"]
    assert grok.main(own) == 0
    text = Path("own.npz").read_text(encoding="utf-8")
    Path("own.npz").write_text(text.replace("p0\tr0\tp0", "p0\tr0\tp1"), encoding="utf-8")
    refuses(own, "out = own: holds a run with another facts.tsv", capsys)
    tuned = [*TUNED, "--out", "new"]
    assert grok.main(tuned) == 0
    assert grok.main([*SMOKE, "--steps", "170", "--out", "run"]) == 0
    refuses(tuned, "out = new: holds a run with another start.pt", capsys)
    cut_metrics("new", 1)
    Path("new/start.pt").unlink()
    refuses(tuned, "out = new: holds a run without its start.pt", capsys)


@pytest.mark.parametrize("exposed", ["0.5", "1"])
def test_what_was_not_measured_is_not_told(exposed, here, capsys):
    """If all new facts are exposed, no composition of unexposed ones is left."""
    assert grok.main([*TUNED, "--exposed", exposed, "--exposed-k", "1", "--out", "new"]) == 0
    accuracy = metrics("new")[-1]["accuracy"]
    assert ("new_old" in accuracy) == (exposed == "0.5")
    assert {"exposed_old", "old_exposed"} <= accuracy.keys()
    assert "new facts alone" in capsys.readouterr().out


# ---------------------------------------------------------------- grok: settings and bad input
@pytest.mark.parametrize("item", fields(Config), ids=lambda item: item.name)
def test_a_setting_has_a_flag_and_keeps_its_type_and_limits(item):
    """One spelling a flag. Refused are another type, and what lies just outside its limits."""
    flag = "--" + item.name.replace("_", "-")
    value = "x" if item.default == "" else item.default  # what a word may be, Config says
    assert grok.parse([f"{flag}={value}"])[item.name] == value
    if "_" in item.name:
        with pytest.raises(BadInput, match="unrecognized"):
            grok.parse([f"--{item.name}={item.default}"])
    least = item.metadata.get("least")
    most = item.metadata.get("most")
    bad = [None, [], b"x"]
    if item.type is float:
        bad += ["0.5", math.nan, math.inf, True, least - 1e-9, math.nextafter(most, math.inf)]
    elif item.type is int:
        bad += [float(item.default), True, least - 1, most + 1]
    elif item.type is bool:
        bad += [0, 1, "true"]
    elif item.metadata.get("words"):
        bad += ["x", item.default + "x"]
    for value in bad:
        with pytest.raises(BadInput, match=f"^{item.name} = .*: must "):
            Config(**{item.name: value})
    if least is not None:
        for value in (least, most):
            grok.check_value(item.name, value, item.type, item.metadata)


@pytest.mark.parametrize("flag", ["--facts", "--start", "--regime", "--device", "--out"])
def test_an_empty_value_is_refused_and_not_ignored(flag, here, capsys):
    refuses([flag, ""], f"grok.py: {flag[2:]}: is empty", capsys)


def test_the_help_names_every_setting_and_preset_with_its_default(capsys):
    with pytest.raises(SystemExit):
        grok.main(["--help"])
    said = "".join(capsys.readouterr().out.split())  # wherever the lines break
    for name in (*PRESETS, *REGIMES, *grok.GROUPS.values(), "--start RUN", "--out FOLDER"):
        assert name.replace(" ", "") in said
    for item in fields(Config):
        flag = item.name.replace("_", "-")
        line = f"--{flag} V {item.metadata['help']}"
        assert line.replace(" ", "") in said
        assert f"({item.default})" in said or item.default == ""


def test_every_preset_is_legal():
    for name, (_, _, values) in PRESETS.items():
        assert Config(**values, preset=name).preset == name


def test_a_line_more_in_config_is_a_setting_more(here, capsys, monkeypatch):
    @dataclass(frozen=True)
    class Mine(Config):
        dropout: float = 0.0

    monkeypatch.setattr(grok, "Config", Mine)
    assert grok.main([*BRIEF, "--dropout", "0.2", "--out", "mine"]) == 0
    assert read_config("mine").dropout == 0.2
    with pytest.raises(SystemExit):
        grok.main(["--help"])
    assert "--dropout V" in capsys.readouterr().out
    refuses([*BRIEF, "--dropout", "x", "--out", "other"], "--dropout", capsys)
    refuses([*BRIEF, "--out", "mine"], "dropout = 0.0: mine holds a run with dropout = 0.2", capsys)


RECURSIVE = dict(PAPER, model="recursive")


@pytest.mark.parametrize("values, said", [
    (dict(mixing="token"), "mixing = token: must be one of attention, tokens"),
    (dict(model="layers"), "model = layers: must be one of looped, recursive"),
    (dict(copy=True), "layout = causal: needs mixing = attention, copy = false"),
    (dict(mixing="tokens"), "layout = causal: needs mixing = attention, copy = false"),
    (dict(d_model=5), "d_model = 5: must be even for attention"),
    (dict(min_loops=5), "min_loops = 5: must lie in [1, n_loops = 4]"),
    (dict(n_blocks=5), "n_blocks = 5: must lie in [1, n_loops = 4]"),
    (dict(slots=2), "slots = 2: model = looped has none"),
    (dict(n_low=3), "n_low = 3: model = looped has none"),
    (dict(residual=False), "residual = False: model = looped has none"),
    (dict(two_states=False), "two_states = False: model = looped has none"),
    (dict(n_cycles=3), "n_cycles = 3: model = looped has none"),
    (dict(model="recursive"), "model = recursive: needs layout = bidirectional"),
    (dict(RECURSIVE, tied=True), "model = recursive: needs layout = bidirectional"),
    (dict(RECURSIVE, n_loops=3), "n_loops = 3: model = recursive has none"),
    (dict(RECURSIVE, min_loops=3), "min_loops = 3: model = recursive has none"),
    (dict(RECURSIVE, logit_scale=2.0), "logit_scale = 2.0: model = recursive has none"),
    (dict(batch_size=2, atomic_share=0.2), "atomic_share = 0.2: a batch of 2 would have 0 facts"),
    (dict(atomic_share=1.0), "atomic_share = 1: a batch of 256 would have 256 facts"),
    (dict(kept=0.5), "kept = 0.5: needs new_facts above 0"),
    (dict(exposed=0.5), "exposed = 0.5: needs new_facts above 0"),
    (dict(exposed_k=5), "exposed_k = 5: needs exposed above 0"),
    (dict(n_relations=9, out_degree=10), "out_degree = 10: must lie in [1, n_relations = 9]"),
    (dict(preset="huge"), "preset = huge: must be one of tiny, small, trm"),
    (dict(k=9), "k = 9: needs hop1 or hop2 above 0"),
    (dict(phi=-1.0), "phi = -1.0: must lie in [0, 100000]"),
    (dict(seed=-1), "seed = -1: must lie in [0, 9223372036854775807]")])
def test_settings_are_refused_in_python_as_on_the_command_line(values, said, here, capsys):
    with pytest.raises(BadInput, match="^" + re.escape(said)):
        Config(**values)
    options = []
    for name, value in values.items():
        options.append(f"--{name.replace('_', '-')}={value}")
    refuses(options, "grok.py: " + said, capsys)


def test_weights_to_start_from_are_refused_without_new_facts():
    with pytest.raises(BadInput, match="weights = fit: needs new_facts above 0"):
        Config(weights="fit")


@pytest.mark.parametrize("options, said", [
    ("--preset huge", "preset = huge: must be one of tiny, small, trm, tune"),
    ("--preset tune", "preset = tune: tune needs --start RUN"),
    ("--start run --preset smoke", "preset = smoke: tune needs --start RUN"),
    ("--weights fit", "weights = fit: needs --start RUN"),
    ("--regime third", "regime = third: must be one of natural"),
    ("--device tpu", "device = tpu: must be one that is here: "),
    ("tiny", "unrecognized"), ("--sed 1", "--sed 1"), ("--k x", "--k"),
    ("--copy maybe", "copy = 'maybe': must be bool"), ("--out own.npz", "own.npz"),
    ("--facts no", "no: No such file or directory"),
    ("--facts one.tsv --phi 2", "n_entities = 1: must lie in"),
    ("--facts own.npz --out-degree 2", "out_degree = 2: comes with --facts, leave it out"),
    ("--facts set.tsv --regime natural", "regime = natural: comes with --facts, leave it out"),
    ("--facts set.tsv --phi 2", "phi = 2.0: comes with --facts, leave it out"),
    ("--facts header.tsv", "header.tsv, line 1: looks like a header"),
    ("--facts damaged.npz", "damaged.npz: is no data file"),
    ("--start no", "no/config.json: No such file or directory"),
    ("--start run --d-model 16", "d_model = 16: comes from run, leave it out"),
    ("--start run --data-seed 0", "data_seed = 0: comes from run, leave it out"),
    ("--start run --phi 1", "phi = 1.0: comes from run, leave it out"),
    ("--start run --regime natural", "regime = natural: comes from run, leave it out"),
    ("--start run --facts own.npz", "facts = own.npz: comes from run, leave it out"),
    ("--start run --weights x", "weights = x: must be one of fit, end, none"),
    ("--start run --new-facts 999", "new_facts = 999: must lie in [0, 24]")])
def test_what_cannot_be_used_is_said_in_one_line_and_nothing_is_written(options, said, source,
                                                                        capsys):
    lines = [f"a\tr{number}\ta\n" for number in range(20)]
    Path("one.tsv").write_text("".join(lines), encoding="utf-8")
    Path("header.tsv").write_text("head\trelation\ttail\n" + lines[0], encoding="utf-8")
    Path("damaged.npz").write_bytes(Path("set.tsv").read_bytes()[:-100])
    refuses(options.split(), said, capsys)


@pytest.mark.parametrize("name", ["last.pt", "end.pt", "metrics.jsonl", "config.json"])
def test_a_damaged_or_foreign_file_is_refused_and_runs_no_code(name, here, capsys):
    path = Path("run", name)
    strange = io.BytesIO()
    torch.save({"step": 4, "weights": Trap()}, strange)
    plain = io.BytesIO()
    torch.save([1, 2], plain)
    if name == "last.pt":
        cut_metrics("run", 3)
    for content in (b"", path.read_bytes()[:-40], os.urandom(10**4), b"\x80\x02q\x00.",
                    plain.getvalue(), b"[1]",
                    strange.getvalue(), pickle.dumps(Trap(), 2), b"[" * 10**5):
        path.write_bytes(content)
        if name == "metrics.jsonl" and content == b"":
            continue  # a run before its first evaluation
        if name != "end.pt":  # a finished run does not look at its weights
            refuses([*SMOKE, "--out", "run"], f"run/{name}", capsys)
        if name in ("end.pt", "config.json"):
            refuses([*TUNED, "--out", "new"], f"run/{name}", capsys)
            with pytest.raises(BadInput, match=name):
                load_run("run")
        if name == "metrics.jsonl":
            with pytest.raises(BadInput, match=name):
                read_run("run")
        if name == "last.pt":
            refuses([*SMOKE, "--steps", "200", "--out", "run"], f"run/{name}", capsys)


@pytest.mark.parametrize("changes", [
    {"dropout": 0.1}, {"lr": "high"}, {"n_loops": 0}, {"phi": []}, {"mixing": "tokens"}])
def test_foreign_settings_are_refused(changes, here, capsys):
    values = asdict(read_config("run"))
    Path("run/config.json").write_text(json.dumps({**values, **changes}), encoding="utf-8")
    refuses([*SMOKE, "--out", "run"], "run/config.json: ", capsys)


def test_a_setting_that_an_older_config_lacks_has_its_default(here):
    values = asdict(read_config("run"))
    assert values.pop("slots") == values.pop("exposed") == 0
    Path("run/config.json").write_text(json.dumps(values), encoding="utf-8")
    assert grok.main([*SMOKE, "--out", "run"]) == 0


def test_foreign_weights_are_refused(here, capsys):
    sound = weights_in(Path("run/end.pt"))
    for weights in ({}, {**sound, "more": torch.zeros(1)}, {**sound, "embedding": torch.zeros(3)}):
        torch.save({"step": 160, "weights": weights}, "run/end.pt")
        refuses([*TUNED, "--out", "new"], "run/end.pt: is damaged", capsys)


# ---------------------------------------------------------------- analyze: a circuit known by hand
class TwoHopTable(torch.nn.Module):
    """A circuit that is known, since it is written here. Of "In which city does Ada's mother live?"
    loop 1 looks up Ada's mother and puts Bea at r1; loop 2 looks up the city of whoever stands at
    r1 and puts Bern at the last position; loop 3 does nothing. Every vector is one-hot, and what
    was looked up is `mixed` before it becomes the state there: so all maps are known."""

    def __init__(self, world, layout):
        super().__init__()
        self.n_loops = 3
        self.loop_names = ["loop 1", "loop 2", "loop 3"]
        self.stages = [0, 1, 2]
        self.config = Config(n_loops=3, layout=layout)
        self.E = world.n_entities
        self.blank = world.n_entities + world.n_relations
        self.one_hot = torch.eye(self.blank + 1)
        heads, relations, tails = torch.from_numpy(world.facts).T
        self.hop1 = torch.full((self.blank + 1, world.n_relations), self.blank)  # no such fact
        self.hop1[heads, relations] = tails
        self.hop2 = self.hop1.clone()

    def forward(self, tokens, edit=grok.unchanged):
        state = self.one_hot[tokens]                                            # (B, T, V)
        for loop in range(self.n_loops):
            mixed = self.one_hot[self.blank].expand_as(state).clone()  # nothing was looked up
            if loop == 0:
                mixed[:, 1] = self.one_hot[self.hop1[tokens[:, 0], tokens[:, 1] - self.E]]
            if loop == 1:
                bridge = state[:, 1].argmax(-1)
                mixed[:, -1] = self.one_hot[self.hop2[bridge, tokens[:, 2] - self.E]]
            mixed = edit(loop, "mixed", mixed)
            is_nothing = mixed.argmax(-1, keepdim=True) == self.blank
            state = edit(loop, "state", torch.where(is_nothing, state, mixed))
        return self.unembed(self.read(state, tokens))

    def read(self, state, tokens):
        return state[:, -1]

    def vectors(self):
        return self.one_hot

    def unembed(self, state):
        return state @ self.one_hot.T


BRIDGE = [(0, "mixed", 1), (0, "state", 1)]  # loop 2 reads the second of them alone
ANSWER = [(1, "mixed", -1), (1, "state", -1), (2, "state", -1)]


def hand_built(kind, layout):
    """A model built by hand, its world, and ID queries whose h, b and t are three entities."""
    config = Config(n_entities=24, n_relations=16, out_degree=12, phi=2.0)
    world, splits = small_data(config)
    queries = splits["test_id"]
    are_three = (queries.h != queries.b) & (queries.b != queries.t) & (queries.h != queries.t)
    return kind(world, layout), world, queries.take(are_three)


@pytest.fixture(scope="module", params=["causal", "bidirectional"])
def table(request):
    return hand_built(TwoHopTable, request.param)


@pytest.fixture(scope="module")
def table_codes(table):
    """The code of every entity at every site, and which entities have one."""
    _, code, known = analyze.fit_on(*table)
    return code, known


def assert_map(maps, ones, but=0):
    """Maps {part: (3 loops, T)} are 1 at these sites and 0 elsewhere, or the reverse."""
    for part in PARTS:
        expected = np.full(np.shape(maps[part]), float(but))
        for loop, at_part, position in ones:
            if at_part == part:
                expected[loop, position] = 1 - but
        assert np.array_equal(maps[part], expected), part


def test_the_lens_sees_the_known_circuit_and_among_entities_also_below_louder_tokens(table):
    model, world, queries = table
    result = analyze.seen(model, world, queries)
    stays = [*BRIDGE, (1, "state", 1), (2, "state", 1)]
    assert_map({part: result[part]["bridge"]["map"] for part in PARTS}, stays)
    assert_map({part: result[part]["answer"]["map"] for part in PARTS}, ANSWER)
    assert result["state"]["bridge"]["any"] == result["state"]["bridge"]["best"] == 1
    chance = (queries.b == np.roll(queries.b, 1)).mean()
    assert result["paper"] == {"any": 1, "any_chance": pytest.approx(chance, abs=0.1)}

    class Louder(TwoHopTable):
        def unembed(self, state):
            is_no_entity = torch.arange(self.blank + 1) >= self.E
            return super().unembed(state) + 2.0 * is_no_entity

    result = analyze.seen(Louder(world, model.config.layout), world, queries)["state"]
    assert result["bridge"]["map"][0][1] == 0
    assert result["entity"]["map"][0][1] == 1


def test_the_turned_lens_sees_a_bridge_that_is_written_with_the_other_sign(table):
    model, world, queries = table

    class Turned(TwoHopTable):
        def unembed(self, state):
            return -super().unembed(state)

    plain = analyze.seen(model, world, queries)["state"]
    turned = analyze.seen(Turned(world, model.config.layout), world, queries)["state"]
    assert plain["entity"]["map"][0][1] == turned["last_entity"]["map"][0][1] == 1
    assert plain["last_entity"]["map"][0][1] == turned["entity"]["map"][0][1] == 0


def test_queries_whose_bridge_is_their_own_head_are_left_out_of_the_lens(table):
    """They show it in their own token."""
    model, world, queries = table
    everything = data.queries(world, *compositions(world))
    reflexive = everything.take(everything.h == everything.b)
    assert len(reflexive.h) > 0
    result = analyze.seen(model, world, reflexive)
    assert (result["n"], result["left_out"]) == (0, len(reflexive.h))
    assert result["state"]["bridge"]["any"] is result["paper"]["any"] is None
    both = data.Queries(*(np.concatenate(pair) for pair in zip(queries, reflexive)))
    assert analyze.seen(model, world, both)["n"] == len(queries.h)


def test_evaluate_knows_the_known_circuit(table):
    """With one query no other bridge could show by chance; of an empty split nothing is said."""
    model, world, queries = table
    splits = {"test_id": queries, "test_ood": queries.take([0]), "test_id_ood": queries.take([]),
              "train_inferred": queries._replace(t=queries.h)}
    result = evaluate(model, make_eval_sets(splits, world, model.config.layout, "cpu"))
    assert result["accuracy"] == {"test_id": 1, "test_ood": 1, "train_inferred": 0}
    assert set(result["lens"]) == {"test_id", "test_ood"}
    all_seen = dict.fromkeys(("any", "best", "answer_any"), 1)
    assert result["lens"]["test_id"].items() >= all_seen.items()
    assert result["lens"]["test_ood"] == {**all_seen, "any_chance": None, "best": None,
                                         "best_chance": None}


def test_swaps_find_the_known_circuit(table, table_codes):
    """A donor with the same r2 redirects where its bridge or its answer is carried, one of another
    r2 only where its bridge is, one with the same bridge only where its answer is; by code the
    bridge moves alone."""
    model, world, queries = table
    code, _ = table_codes
    rng = np.random.default_rng(0)
    clean, donor, predicted = analyze.swap(queries, queries, rng)
    tokens, _ = to_tokens(clean, world, model.config.layout)
    theirs = analyze.values_of(model, to_tokens(donor, world, model.config.layout)[0])
    maps = analyze.swap_maps(model, world, queries.take(slice(400)), queries, code, rng)
    maps["swap"] = analyze.patch_map(model, tokens, theirs, predicted)
    for kind, sites in (("swap", [*BRIDGE, *ANSWER]), ("other_r2", BRIDGE),
                        ("same_bridge", ANSWER)):
        assert maps[kind]["n"] > 300
        assert_map(maps[kind]["redirected"], sites)
    stays = analyze.patch_map(model, tokens, theirs, clean.t)
    assert_map(stays["redirected"], [*BRIDGE, *ANSWER], but=1)  # all else keeps its answer
    clean, donor, predicted = analyze.other_r2(world, queries, queries, rng)
    own = analyze.donor_map(model, world, clean, donor, donor.t)
    assert_map(own["redirected"], ANSWER)  # there the donor's own answer is carried
    for loop, part, position in BRIDGE:
        assert maps["code"]["redirected"][part][loop, position] == 1
    random = {part: analyze.noise(value) for part, value in theirs.items()}
    for answers in (predicted, clean.t):
        broken = analyze.patch_map(model, tokens, random, answers)
        assert broken["redirected"]["state"][0, 1] < 0.15


def find_site(model, world, queries, code):
    """What `bridge_site` says of these queries, half of which choose the site."""
    chosen_by = queries.take(slice(0, None, 2))
    scoring = {"test_id": queries.take(slice(1, None, 2))}
    rng = np.random.default_rng(0)
    maps = analyze.swap_maps(model, world, chosen_by.take(slice(300)), chosen_by, code, rng)
    return analyze.bridge_site(model, world, chosen_by, maps["other_r2"], scoring, code)


def test_the_one_site_of_the_bridge_is_that_of_the_known_circuit(table, table_codes):
    """Its value is the bridge and nothing else: the answer follows the donor's, and follows nothing
    that is swapped elsewhere."""
    model, world, queries = table
    code, _ = table_codes
    site = find_site(model, world, queries, code)
    assert (site["where"], site["name"]) == ("one site", "mixed, loop 1, r1")
    assert site["sites"] == [[0, "mixed", 1]] and site["redirected"] == 1
    scores = site["test_id"]
    assert scores["n"] > 100 and scores["n_same_bridge"] > 100
    assert scores["donor"] == scores["code"] == 1
    assert scores["others_swapped"] == scores["same_bridge"] == 1
    assert scores["noise"] < 0.15
    assert (scores["n_mixed_donors"], scores["mixed_donors"]) == (0, None)
    site = find_site(model, world, queries.take([]), code)
    assert site["where"] is site["redirected"] is site["test_id"]["donor"] is None


class InInstalments(TwoHopTable):
    """The bridge comes half in loop 2 and half in loop 3, at r1; hop 2 is looked up only if both
    halves are of the same entity."""

    def __init__(self, world, layout):
        super().__init__(world, layout)
        self.config = Config(**PAPER, model="recursive")

    def forward(self, tokens, edit=grok.unchanged):
        state = self.one_hot[tokens]
        bridge = torch.zeros_like(state[:, 1])
        for loop in range(self.n_loops):
            mixed = torch.zeros_like(state)
            if loop > 0:
                mixed[:, 1] = self.one_hot[self.hop1[tokens[:, 0], tokens[:, 1] - self.E]] / 2
            mixed = edit(loop, "mixed", mixed)
            bridge = bridge + mixed[:, 1]
            if loop == 2:
                entity = torch.where(bridge.amax(-1) > 0.75, bridge.argmax(-1), self.blank)
                state = state.clone()
                state[:, -1] = self.one_hot[self.hop2[entity, tokens[:, 2] - self.E]]
            state = edit(loop, "state", state)
        return self.unembed(self.read(state, tokens))


def test_a_bridge_that_comes_in_instalments_is_found_at_several_sites_together():
    """Either half alone redirects nothing; the values of two donors of one bridge fit together."""
    model, world, queries = hand_built(InInstalments, "bidirectional")
    _, code, _ = analyze.fit_on(model, world, queries)
    site = find_site(model, world, queries, code)
    assert site["where"] == "several passes" and site["redirected"] == 1
    assert site["sites"] == [[1, "mixed", 1], [2, "mixed", 1]]
    assert site["name"] == "mixed, loop 2 and loop 3, r1"
    assert site["test_id"]["donor"] == site["test_id"]["code"] == 1
    assert site["test_id"]["mixed_donors"] == site["test_id"]["same_bridge"] == 1
    assert site["test_id"]["n_mixed_donors"] > 100
    one_half = analyze.score_sites(model, world, queries, site["sites"][:1], code)
    assert one_half["donor"] == 0


def test_aim_and_store_tell_which_hop_of_the_known_circuit_was_broken(table, table_codes):
    """In the whole one both are right; then hop 1 aims at another entity from every second head;
    then hop 2 knows nothing."""
    whole, world, queries = table
    code, known = table_codes

    def measure(model):
        return analyze.aim_and_store(model, world, queries, [(0, "state", 1)], code, known, n=400)

    result = measure(whole)
    assert result["n"] == 400
    for name in ("as_is", "own_code", "snapped", "nearest_right"):
        assert result[name] == 1, name
    assert result["random_code"] < 0.2 and result["mean"] < 0.2
    astray = copy.deepcopy(whole)
    astray.hop1[0::2] = torch.where(whole.hop1[0::2] < world.n_entities,
                                    (whole.hop1[0::2] + 1) % world.n_entities, whole.blank)
    result = measure(astray)
    assert result["own_code"] == 1
    assert result["nearest_right"] == pytest.approx((queries.h[:400] % 2 == 1).mean())
    assert result["nearest_right"] <= result["as_is"] == result["snapped"] < 0.8
    empty = copy.deepcopy(whole)
    empty.hop2.fill_(whole.blank)
    result = measure(empty)
    assert result["nearest_right"] == 1
    assert result["own_code"] == result["snapped"] == result["as_is"] == 0
    nothing = analyze.aim_and_store(whole, world, queries, [], code, known)
    assert nothing.pop("n") == 0 and set(nothing.values()) == {None}


def test_donors_obey_their_rules(table):
    _, world, queries = table
    tails, _ = facts_of(world)
    rng = np.random.default_rng(0)
    clean, donor, predicted = analyze.swap(queries, queries, rng)
    assert len(clean.h) > 0
    assert (clean.r2 == donor.r2).all() and (clean.b != donor.b).all()
    assert (clean.t != donor.t).all() and (predicted == donor.t).all()
    clean, donor, predicted = analyze.same_bridge(queries, queries, rng)
    assert len(clean.h) > 0
    assert (clean.b == donor.b).all() and (clean.r2 != donor.r2).all()
    assert (clean.t != donor.t).all() and (predicted == donor.t).all()
    assert ((clean.h != donor.h) | (clean.r1 != donor.r1)).all()
    clean, donor, predicted = analyze.other_r2(world, queries, queries, rng)
    assert len(clean.h) > 0
    check_other_r2(tails, clean, donor, predicted)
    clean, one, two, predicted = analyze.mixed_donors(world, queries, queries, rng)
    assert len(clean.h) > 0
    check_other_r2(tails, clean, one, predicted)
    assert (one.b == two.b).all() and (one.h != two.h).all() and (one.r1 != two.r1).all()
    assert (two.t != predicted).all()
    few = queries.take([0]), queries.take([])
    for columns in (analyze.swap(*few, rng), analyze.mixed_donors(world, *few, rng)):
        assert {len(column.h) for column in columns[:-1]} == {0}


def check_other_r2(tails, clean, donor, predicted):
    assert (clean.r2 != donor.r2).all() and (clean.b != donor.b).all()
    assert (predicted != donor.t).all() and (predicted != clean.t).all()
    for b, r2, t in zip(donor.b.tolist(), clean.r2.tolist(), predicted.tolist()):
        assert tails[b, r2] == t


def test_what_was_not_measured_is_not_zero(table):
    """No OOD query is answered rightly, so none is swapped, and the report and figures say so."""
    model, world, queries = table
    _, splits = small_data(Config(n_entities=24, n_relations=16, out_degree=12, phi=2.0))
    wrong = queries._replace(t=(queries.t + 1) % world.n_entities)
    paths = analyze.inference_path(model, world, {**splits, "test_id": queries, "test_ood": wrong},
                                   n=100)
    json.dumps(paths, allow_nan=False)
    read = np.array(paths["test_id"]["present"]["state"]["map"])
    assert (read[:, 1] == 1).all() and (read[:, 0] < 0.6).all()  # r1, h
    assert paths["site"]["name"] == "mixed, loop 1, r1"
    assert paths["test_id"]["used"]["other_r2"]["n"] > 50
    for swaps in paths["test_ood"]["used"].values():
        assert swaps == {"n": 0, "redirected": None}
    assert paths["site"]["test_ood"]["donor"] is None
    assert paths["aim"]["test_ood"]["own_code"] < 0.2  # its "answers" are no tails of its bridges
    assert "not measured" not in " ".join(analyze.report(paths, "test_id"))
    assert "(0 queries)" in " ".join(analyze.report(paths, "test_ood"))
    for part in PARTS:
        figure = analyze.plot_maps({"end": paths}, part, model.loop_names)
        titles = [axes.get_title() for axes in figure.axes]
        assert sum("not measured (0 queries)" in title for title in titles) == 3


# ---------------------------------------------------------------- analyze: real models
@pytest.fixture(scope="module", params=["default", "paper's conditions", "recursive"])
def real(request):
    """An untrained model in the smoke preset's world, tokens (N, T) of ID compositions, these."""
    changes = {**KINDS[request.param], "n_loops": 4}
    if request.param == "recursive":
        changes["n_low"] = 1  # 8 loops
    config = smoke_config(**changes)
    world, splits = small_data(config)
    model = build_model(config, world.n_entities, world.n_relations).requires_grad_(False)
    queries = splits["test_id"]
    return model, to_tokens(queries, world, config.layout)[0], queries


def sites_of(model, tokens):
    """Every site at a token."""
    return itertools.product(range(model.n_loops), PARTS, range(tokens.shape[1]))


def test_patching_and_lens_agree_with_the_output_bit_for_bit(real):
    """The last answer state shows the output, and gives it to another query; a query's own value
    changes nothing at any site."""
    model, tokens, _ = real
    tokens = tokens[:40]
    donor = tokens.roll(1, 0)
    values = analyze.values_of(model, tokens)
    last = model.n_loops - 1
    position = places(tokens, model.config.layout)[0]
    top = analyze.logit_lens(model, tokens)["state"][last, :, position]
    assert torch.equal(top, analyze.predict(model, tokens))
    put = {(last, "state", position): analyze.values_of(model, donor)["state"][last, :, position]}
    assert torch.equal(analyze.patch(model, tokens, put), model(donor))
    logits = model(tokens)
    for loop, part, position in sites_of(model, tokens):
        own = {(loop, part, position): values[part][loop, :, position]}
        assert torch.equal(analyze.patch(model, tokens, own), logits)


def test_many_queries_equal_one_at_a_time(real, monkeypatch):
    model, tokens, queries = real
    tokens = tokens[:6]
    predicted = torch.from_numpy(queries.t[:6])
    theirs = analyze.values_of(model, tokens.flip(0))
    answers = analyze.predict(model, tokens)
    together = analyze.patch_map(model, tokens, theirs, predicted)
    apart = []
    for row in range(6):
        one = {part: value[:, row:row + 1] for part, value in theirs.items()}
        apart.append(analyze.patch_map(model, tokens[row:row + 1], one, predicted[row:row + 1]))
    for part in PARTS:
        mean = np.mean([maps["redirected"][part] for maps in apart], axis=0)
        assert np.allclose(together["redirected"][part], mean)
    monkeypatch.setattr(analyze, "BATCH", 4)
    assert torch.equal(analyze.predict(model, tokens), answers)
    for part, value in analyze.values_of(model, tokens.flip(0)).items():
        assert torch.allclose(value, theirs[part], atol=1e-5)


def test_a_probe_is_ridge_regression(real, monkeypatch):
    """NumPy's least squares on the values, with the ridge as extra rows, reads the same."""
    model, tokens, queries = real
    monkeypatch.setattr(analyze, "BATCH", 100)
    targets = np.eye(12)[queries.b]
    weights = analyze.fit_probe(model, tokens, torch.tensor(targets).float())
    scores = analyze.apply_probe(model, tokens, weights)
    values = analyze.values_of(model, tokens)
    size = values["state"].shape[-1] + 1
    for loop, part, position in ((0, "mixed", 1), (1, "state", 1), (2, "mixed", 2)):
        x = np.append(values[part][loop, :, position].numpy(), np.ones((len(tokens), 1)), axis=1)
        with_ridge = np.append(x, np.eye(size), axis=0)
        wanted = np.append(targets, np.zeros((size, 12)), axis=0)
        expected = np.linalg.lstsq(with_ridge, wanted, rcond=None)[0]
        assert np.allclose(weights[part][loop, position].numpy(), expected, atol=2e-3)
        assert np.allclose(scores[part][loop, :, position].numpy(), x @ expected, atol=2e-3)


def test_a_code_is_the_mean_value_of_the_queries_with_this_bridge(real, monkeypatch):
    model, tokens, queries = real
    monkeypatch.setattr(analyze, "BATCH", 100)
    bridges = queries.b.copy()
    bridges[bridges == 3] = 4  # 3 is nobody's
    code = analyze.codes(model, tokens, torch.from_numpy(bridges), 12)
    values = analyze.values_of(model, tokens)
    for part in PARTS:
        for entity in range(12):
            expected = torch.zeros_like(values[part][:, 0])
            if entity != 3:
                expected = values[part][:, bridges == entity].mean(1)
            assert torch.allclose(code[part][:, entity], expected, atol=1e-5)


def test_no_query_gives_no_number(real):
    model, tokens, queries = real
    world, _ = small_data(model.config)
    nothing = queries.take([])
    result = analyze.seen(model, world, nothing)
    assert result["n"] == 0 and result["state"]["bridge"]["map"] is None
    values = analyze.values_of(model, tokens[:0])
    assert analyze.patch_map(model, tokens[:0], values, nothing.t) == {
        "n": 0, "redirected": None}


# ---------------------------------------------------------------- analyze: the command line
def test_analyze_measures_and_draws_every_run_in_a_folder(here, capsys):
    """Both weights of it; of a recursive model with slots, too."""
    recursive = ("--preset smoke --model recursive --layout bidirectional --mixing tokens --tied "
                 "false --copy true --n-loops 4 --n-low 1 --slots 1 --device cpu --steps 4")
    assert grok.main([*recursive.split(), "--out", "two words"]) == 0
    assert analyze.main(["."]) == 0
    for name, stages, T in (("run", ["fit", "end"], 3), ("two words", ["end"], 5)):
        text = Path(name, "paths.json").read_text(encoding="utf-8")
        assert "NaN" not in text
        paths = json.loads(text)
        assert list(paths) == stages
        for result in paths.values():
            assert set(result) == {"test_id", "test_ood", "site", "aim"}
            n_loops = 3 if name == "run" else 4
            assert np.shape(result["test_id"]["present"]["state"]["map"]) == (n_loops, T)
        for part in PARTS:
            assert matplotlib.image.imread(f"{name}/{part}.png").std() > 0.05
    out = capsys.readouterr().out
    assert out.count("The lens sees") == 6 and "'two words'" in out


def test_analyze_leaves_shipped_runs_as_they_are(here, monkeypatch):
    shutil.move("run", "shipped/small/seed0")
    monkeypatch.setattr(analyze, "SHIPPED", here / "shipped")
    before = tree(here / "shipped")
    assert analyze.main(["shipped/small"]) == 0
    assert tree(here / "shipped") == before
    looked_into = here / "looked_into/small/seed0"
    assert {path.name for path in looked_into.iterdir()} == {"paths.json", "mixed.png", "state.png"}


def must_not_run(*arguments):
    raise AssertionError("computed before it was refused")


def test_analyze_says_what_it_cannot_look_into_and_goes_on(here, capsys, monkeypatch):
    """"little" has one OOD query; "few" two ID queries, too few to fit on one half of them."""
    small = "--n-entities 8 --n-relations 4 --out-degree 3 --ood-fraction .13 --phi 1"
    smoke = ["--preset", "smoke", "--device", "cpu", "--steps", "2"]
    assert grok.main([*smoke, *small.split(), "--out", "little"]) == 0
    assert grok.main([*smoke, "--phi", "4.67241379", "--out", "few"]) == 0
    assert "NaN" not in Path("little/metrics.jsonl").read_text(encoding="utf-8")
    shutil.copytree("run", "cut")
    cut_metrics("cut", 3)
    shutil.copytree("run", "bare")
    Path("bare/fit.pt").unlink()
    Path("bare/end.pt").unlink()
    Path("empty").mkdir()
    Path("file").write_text("", encoding="utf-8")
    capsys.readouterr()
    measure = analyze.inference_path
    monkeypatch.setattr(analyze, "inference_path", must_not_run)
    for options, said in ((["empty"], "empty: holds no run"), (["bare"], "bare: holds no weights"),
                          (["cut"], "cut: is not finished"), (["little"], "little: has 1 OOD"),
                          (["few"], "few: has 2 ID"), (["run", "-o", "file/x"], "cannot be writ"),
                          (["run", "--seed"], "unrecognized"), ([], "runs")):
        before = tree(here)
        assert analyze.main(options) == 2
        assert tree(here) == before
        error = capsys.readouterr().err
        assert error.startswith("analyze.py: ") and error.count("\n") == 1 and said in error, error
    monkeypatch.setattr(analyze, "inference_path", measure)
    assert analyze.main(["few", "run", "-o", "elsewhere"]) == 2
    assert "few: has 2 ID" in capsys.readouterr().err
    assert Path("elsewhere/run/paths.json").exists()
    assert not Path("run/paths.json").exists()


def test_ctrl_c_ends_analyze_in_one_line(here, capsys, monkeypatch):
    def press(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(analyze, "inference_path", press)
    assert analyze.main(["run"]) == 130
    assert capsys.readouterr().err == "analyze.py: stopped\n"


# ---------------------------------------------------------------- the three files
@pytest.mark.parametrize("name, packages", [
    ("data", {"numpy"}), ("grok", {"numpy", "torch", "matplotlib", "data"}),
    ("analyze", {"numpy", "torch", "matplotlib", "data", "grok"})])
def test_a_file_imports_what_stands_below_it_and_nothing_else(name, packages):
    text = Path(grok.__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", text, re.MULTILINE))
    assert imported <= packages | set(sys.stdlib_module_names)
