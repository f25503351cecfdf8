"""What the project promises, one section a module: `pytest` runs all of it.

Every answer is checked against an independent one: a walk over the graph, PyTorch's own layers,
a slow re-statement of a rule, or a number worked out by hand.
"""
import ast
import copy
import dataclasses
import errno
import functools
import hashlib
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import hypothesis
import matplotlib.image
import nbclient
import nbformat
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import analyze
import data
import grok
from data import (REGIMES, SPLITS, BadInput, WorldConfig, make_splits, make_world, queries,
                  read_facts, read_json, settings, write_json)
from grok import (INGREDIENTS, LENGTH, PRESETS, Config, LoopedTransformer, Trainer, attend,
                  bridge_rates, build_data, draw, evaluate, loss_of, make_exams, rms_norm, rotate,
                  run_states, to_tokens, training_rows)


# ---------------------------------------------------------------- data: the world

def triples(world):
    """{(h, r): t} and the set of OOD (h, r), read off the arrays one cell at a time."""
    facts, ood = {}, set()
    for h in range(world.n_entities):
        for k in range(world.relations.shape[1]):
            r = int(world.relations[h, k])
            if r >= 0:
                assert (h, r) not in facts
                facts[h, r] = int(world.tails[h, k])
                if world.is_ood[h, k]:
                    ood.add((h, r))
    return facts, ood


def walks(world):
    """Every composition by a walk over the graph: {(h, r1, r2): (b, t, hop 1 OOD?, hop 2 OOD?)}."""
    facts, ood = triples(world)
    return {(h, r1, r2): (b, t, (h, r1) in ood, (b, r2) in ood)
            for (h, r1), b in facts.items() for (head, r2), t in facts.items() if head == b}


def rows(split):
    """{(h, r1, r2): (b, t)} of Queries, which must not hold one twice."""
    found = {(h, r1, r2): (b, t) for h, r1, r2, b, t in zip(*(c.tolist() for c in split))}
    assert len(found) == len(split.h)
    return found


def restated_injection(regime):
    """Paper, Appendix C, as a list of (OOD hop, share of F1 or F2, most compositions a fact)."""
    return {"natural": [], "both_full": [(1, 1.0, 18), (2, 1.0, 18)], "first_full": [(1, 1.0, 18)],
            "both_half": [(1, 0.5, 9), (2, 0.5, 9)], "second_full": [(2, 1.0, 18)]}[regime]


def check_rules(world, config, regime, splits):
    """Every rule of the splits and of the regime, slowly, from the walks alone."""
    facts, ood = triples(world)
    assert len(ood) == round(config.ood_fraction * len(facts))
    atomic = lambda keys: {(h, r, -1): (-1, facts[h, r]) for h, r in keys}
    assert rows(splits["id_atomic"]) == atomic(set(facts) - ood)
    assert rows(splits["ood_atomic"]) == atomic(ood)

    paths, found = walks(world), {name: rows(splits[name]) for name in SPLITS[2:]}
    for split in found.values():
        assert all(paths[q][:2] == answer for q, answer in split.items())
    kind = lambda first, second: {q for q, p in paths.items() if p[2:] == (first, second)}
    train = set(found["train_inferred"])
    assert len(train & kind(False, False)) == round(config.phi * (len(facts) - len(ood)))
    assert not train & kind(True, True)
    assert set(found["test_id"]) == kind(False, False) - train
    assert len(found["test_id"]) >= 0.005 * len(kind(False, False))
    assert set(found["test_ood"]) == kind(True, True)
    assert set(found["test_id_ood"]) == kind(False, True) - train
    assert set(found["test_ood_id"]) == kind(True, False) - train

    fact_of = {1: lambda q: q[:2], 2: lambda q: (paths[q][0], q[2])}
    mixed = {1: kind(True, False), 2: kind(False, True)}
    injection = {hop: (share, k) for hop, share, k in restated_injection(regime)}
    for hop in (1, 2):
        share, k = injection.get(hop, (0, 0))
        pool = {fact_of[hop](q) for q in kind(True, True)}
        there = Counter(fact_of[hop](q) for q in mixed[hop])
        taken = Counter(fact_of[hop](q) for q in mixed[hop] & train)
        assert set(taken) <= pool
        assert all(n == min(k, there[fact]) for fact, n in taken.items())
        unseen = sum(fact not in there for fact in pool)  # chosen perhaps, without a composition
        assert len(taken) <= round(share * len(pool)) <= len(taken) + unseen


SMALL_WORLDS = [
    WorldConfig(n_entities=15, n_relations=9, out_degree=6, ood_fraction=0.25, phi=2.5),
    WorldConfig(n_entities=30, n_relations=30, out_degree=24, ood_fraction=0.1, phi=5.0),
    WorldConfig(**PRESETS["smoke"][1], data_seed=3)]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("config", SMALL_WORLDS)
def test_splits_obey_every_rule_of_the_paper(config, regime):
    world = make_world(config)
    check_rules(world, config, regime, make_splits(world, config, regime))


@st.composite
def legal_worlds(draw):
    n_relations = draw(st.integers(1, 12))
    return WorldConfig(
        n_entities=draw(st.integers(2, 25)), n_relations=n_relations,
        out_degree=draw(st.integers(1, n_relations)),
        ood_fraction=draw(st.floats(0, 1) | st.floats(0.1, 0.5)),
        phi=draw(st.floats(0, 12) | st.floats(0.1, 2)), data_seed=draw(st.integers(0, 2**63 - 1)))


@given(config=legal_worlds(), regime=st.sampled_from(list(REGIMES)))
@hypothesis.settings(max_examples=100, deadline=None)
def test_any_world_obeys_every_rule_or_has_too_few_compositions(config, regime):
    world = make_world(config)
    paths, (facts, ood) = walks(world), triples(world)
    id_id = sum(p[2:] == (False, False) for p in paths.values())
    enough = (1 <= round(config.phi * (len(facts) - len(ood))) <= int(0.995 * id_id)
              and any(p[2:] == (True, True) for p in paths.values()))
    hypothesis.event(regime if enough else "too few")
    if enough:
        check_rules(world, config, regime, make_splits(world, config, regime))
    else:
        with pytest.raises(BadInput, match="too few compositions"):
            make_splits(world, config, regime)


@given(config=legal_worlds(), broken=st.sampled_from([
    ("n_entities", 1), ("n_entities", 10**6 + 1), ("n_entities", 3.0), ("n_entities", True),
    ("n_relations", 0), ("out_degree", 0), ("out_degree", True),
    ("out_degree", 13), ("out_degree", "4"), ("ood_fraction", -1e-9),
    ("ood_fraction", 1.01), ("ood_fraction", math.nan), ("phi", -0.5),
    ("phi", math.inf), ("phi", None), ("data_seed", -1), ("data_seed", 2**63)]))
@hypothesis.settings(max_examples=60, deadline=None)
def test_a_world_setting_out_of_range_is_refused_by_name(config, broken):
    name, value = broken
    with pytest.raises(BadInput, match=f"^{name} = "):
        make_world(dataclasses.replace(config, **{name: value}))


def test_a_world_too_large_for_memory_is_refused():
    with pytest.raises(BadInput, match="n_entities = 1000000"):
        make_world(WorldConfig(n_entities=10**6, n_relations=10**5))


def test_the_paper_world_takes_under_a_second_and_500_megabytes():
    """Allows three times as long, for a machine with other work to do."""
    config = WorldConfig(**PRESETS["paper"][1])
    began = time.perf_counter()
    world = make_world(config)
    splits = make_splits(world, config, "both_full")
    assert time.perf_counter() - began < 3
    assert len(rows(splits["train_inferred"])) > 684_000
    tracemalloc.start()
    make_splits(make_world(config), config, "both_full")
    assert tracemalloc.get_traced_memory()[1] < 500e6
    tracemalloc.stop()


@pytest.mark.parametrize("config, regime, golden", [
    (SMALL_WORLDS[0], "natural", "f5f9766898b8c92a"),
    (WorldConfig(40, 40, 24, 0.125, 18.0), "both_half", "fd8c08b8f7b686d6")])
def test_the_data_of_two_worlds_never_change(config, regime, golden):
    """First facts and first rows of every split: shipped runs are of exactly these."""
    world = make_world(config)
    splits = make_splits(world, config, regime)
    first = [world.relations.ravel()[:50].tolist(), world.tails.ravel()[:50].tolist(),
             world.is_ood.ravel()[:50].tolist(),
             [[name, len(splits[name].h), *(c[:20].tolist() for c in splits[name])]
              for name in SPLITS]]
    assert hashlib.sha256(json.dumps(first).encode()).hexdigest()[:16] == golden


def test_the_world_comes_from_data_seed_alone():
    """Neither numpy's nor torch's global state is read or moved."""
    config, made = SMALL_WORLDS[0], []
    for seed in (1, 2):
        np.random.seed(seed)
        torch.manual_seed(seed)
        world = make_world(config)
        made.append((world, make_splits(world, config, "both_full")))
        expected = np.random.RandomState(seed).rand(), torch.Generator().manual_seed(seed)
        assert np.random.rand() == expected[0]
        assert torch.rand(1) == torch.rand(1, generator=expected[1])
    assert_same_data(made[0], made[1])
    other = make_world(dataclasses.replace(config, data_seed=1))
    assert (other.tails != made[0][0].tails).any()


@pytest.mark.parametrize("k", [0, 1, 3, 100])
def test_up_to_k_rows_of_each_fact_every_one_equally_often(k):
    fact = np.array([4, 0, 4, 4, 7, 4, 0, 4, 4, 9, 0])
    rows, rng, times = np.array([0, 1, 2, 4, 5, 6, 7, 8, 10]), np.random.default_rng(0), Counter()
    there = Counter(fact[rows].tolist())
    for _ in range(1000):
        taken = data.up_to_k(rows, fact, k, rng).tolist()
        assert set(taken) <= set(rows.tolist()) and len(set(taken)) == len(taken)
        assert Counter(fact[taken].tolist()) == {f: min(k, n) for f, n in there.items() if k}
        times.update(taken)
    for row in rows.tolist():
        share = min(1, k / there[fact[row]])
        assert abs(times[row] - 1000 * share) <= 5 * math.sqrt(1000 * share * (1 - share))


# ---------------------------------------------------------------- data: new facts

def check_new_facts(old, old_splits, config, world, splits):
    """Every rule of fine-tuning on new facts, slowly, from the walks through both worlds alone."""
    (old_facts, old_ood), (facts, new) = triples(old), triples(world)
    old_id, kept = set(old_facts) - old_ood, set(facts) - new
    assert len(new) == config.new_facts and not new & set(old_facts)
    assert len(kept) == round(config.kept * len(old_id)) and kept <= old_id
    assert all(facts[fact] == old_facts[fact] for fact in kept)
    assert (world.entity_names, world.relation_names) == (old.entity_names, old.relation_names)
    atomic = lambda facts, keys: {(h, r, -1): (-1, facts[h, r]) for h, r in keys}
    assert rows(splits["id_atomic"]) == atomic(facts, kept)
    assert rows(splits["ood_atomic"]) == atomic(facts, new)
    assert rows(splits["old_atomic"]) == atomic(old_facts, old_id)
    assert rows(splits["test_id"]) == rows(old_splits["test_id"])
    assert set(splits) == {*SPLITS, "old_atomic"}

    paths, train = walks(world), set(rows(splits["train_inferred"]))
    for name in ("train_inferred", "test_ood", "test_id_ood", "test_ood_id"):
        assert all(paths[q][:2] == answer for q, answer in rows(splits[name]).items())
    kind = lambda first, second: {q for q, p in paths.items() if p[2:] == (first, second)}
    hops = lambda q: ((q[0], q[1]), (old_facts[q[0], q[1]], q[2]))
    assert train & kind(False, False) == {q for q in rows(old_splits["train_inferred"])
                                          if set(hops(q)) <= kept}
    assert not train & (kind(True, False) | kind(True, True))
    second = lambda q: (paths[q][0], q[2])
    there, taken = Counter(map(second, kind(False, True))), train & kind(False, True)
    assert Counter(map(second, taken)) == {
        fact: min(config.new_k, n) for fact, n in there.items() if config.new_k}
    assert set(rows(splits["test_ood_id"])) == kind(True, False)
    assert set(rows(splits["test_id_ood"])) == kind(False, True) - train
    assert set(rows(splits["test_ood"])) == kind(True, True)
    assert train.isdisjoint(rows(splits["test_id"]))


@given(config=st.sampled_from(SMALL_WORLDS), regime=st.sampled_from(list(REGIMES)),
       new_facts=st.integers(20, 40), kept=st.floats(0.4, 1), new_k=st.integers(0, 4),
       data_seed=st.integers(0, 2**63 - 1))
@hypothesis.settings(max_examples=40, deadline=None)
def test_new_facts_obey_every_rule(config, regime, new_facts, kept, new_k, data_seed):
    """The smoke world has room for 24 of them, the first small one for 45."""
    new_facts = min(new_facts, config.n_entities * (config.n_relations - config.out_degree))
    config = dataclasses.replace(config, new_facts=new_facts, kept=kept, new_k=new_k,
                                 data_seed=data_seed)
    world = make_world(config)
    splits = make_splits(world, config, regime)
    check_new_facts(world, splits, config, *data.add_facts(world, splits, config))


def test_new_facts_are_the_same_for_every_regime_and_others_for_another_seed():
    config = dataclasses.replace(SMALL_WORLDS[0], new_facts=30, kept=0.5, new_k=2)
    made = [build_data(config, regime) for regime in ("natural", "both_full")]
    assert_same_data(*made)
    other = dataclasses.replace(config, data_seed=1)                             # of the same world
    assert triples(data.add_facts(*small_data(), other)[0]) != triples(made[0][0])
    assert triples(data.add_facts(*small_data(), config)[0]) == triples(made[0][0])


@pytest.mark.parametrize("changes, said", [
    (dict(new_facts=46), "^new_facts = 46: must lie in .0, 45.,"),
    (dict(new_facts=45, kept=0.0), "^new_facts = 45, kept = 0: too few, no composition"),
    (dict(new_facts=1), "^new_facts = 1, kept = 1: too few, no composition")])
def test_too_many_new_facts_or_nothing_left_to_ask_is_refused(changes, said):
    """15 heads have 6 of 9 relations each: 45 pairs are free."""
    with pytest.raises(BadInput, match=said):
        build_data(dataclasses.replace(SMALL_WORLDS[0], **changes), "natural")


# ---------------------------------------------------------------- data: files

def assert_same_data(one, two):
    """Worlds and splits equal to the last row, order and names included."""
    for name in ("relations", "tails", "is_ood"):
        np.testing.assert_array_equal(getattr(one[0], name), getattr(two[0], name))
    assert one[0].entity_names == two[0].entity_names
    assert one[0].relation_names == two[0].relation_names
    assert set(one[1]) == set(two[1]) >= set(SPLITS)
    for name in one[1]:
        for left, right in zip(one[1][name], two[1][name]):
            np.testing.assert_array_equal(left, right)


def small_data(regime="natural"):
    world = make_world(SMALL_WORLDS[0])
    return world, make_splits(world, SMALL_WORLDS[0], regime)


@pytest.mark.parametrize("regime", REGIMES)
def test_what_is_written_is_read_back_exactly(regime, tmp_path, capsys):
    made = small_data(regime)
    write_json(*made, tmp_path / "set")
    assert_same_data(read_json(tmp_path / "set"), made)
    assert capsys.readouterr() == ("", "")


def test_files_have_the_layout_of_the_field(tmp_path):
    world, splits = small_data()
    assert data.main(["--export", str(tmp_path / "a" / "set"), "--n-entities", "15",
                      "--n_relations", "9", "--out-degree=6", "--ood-fraction", "0.25",
                      "--phi", "2.5"]) == 0
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "a/set").iterdir()}
    assert files["vocab"] == [*(f"<e_{i}>" for i in range(15)), *(f"<r_{i}>" for i in range(9)),
                              "<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>"]
    facts, ood = triples(world)
    for item, ((h, r), t) in zip(files["train"], facts.items()):
        assert item == {"input_text": f"<e_{h}><r_{r}>",
                        "target_text": f"<e_{h}><r_{r}><e_{t}></a>"}
    text = lambda q: f"<e_{q[0]}><r_{q[1]}><r_{q[2]}>"
    of = lambda name: [{"input_text": text(q), "target_text": f"{text(q)}<e_{t}></a>"}
                       for q, (b, t) in rows(splits[name]).items()]
    assert files["train"][len(facts):] == of("train_inferred")
    assert files["valid"] == of("test_ood")
    assert [{**item, "type": "test_inferred_iid"} for item in of("test_id")] == [
        item for item in files["test"] if item["type"] == "test_inferred_iid"]
    assert Counter(item["type"] for item in files["test"]) == {
        "id_atomic": len(facts) - len(ood), "ood_atomic": len(ood),
        "train_inferred": len(of("train_inferred")), "test_inferred_iid": len(of("test_id")),
        "test_inferred_ood": len(of("test_ood"))}


def test_ood_facts_are_recovered_from_a_sample(tmp_path, capsys):
    """The public generator types at most 3,000 items of a kind and lists facts in any order."""
    world, splits = small_data()
    write_json(world, splits, tmp_path / "set")
    train, test = (json.loads((tmp_path / "set" / f"{n}.json").read_text())
                   for n in ("train", "test"))
    n_facts, rng = len(world.facts), np.random.default_rng(0)
    train[:n_facts] = [train[i] for i in rng.permutation(n_facts)]
    sample = [item for item in test if item["type"] == "ood_atomic"][:5]
    for kind in ("id_atomic", "test_inferred_iid", "test_inferred_ood"):
        sample += [item for item in test if item["type"] == kind][:4]
    for name, content in (("train", train), ("test", sample)):
        (tmp_path / "set" / f"{name}.json").write_text(json.dumps(content))
    found, listed = read_json(tmp_path / "set")
    assert triples(found) == triples(world)
    assert f"{n_facts - 9} of {n_facts} facts carry no type" in capsys.readouterr().err
    assert rows(listed["test_ood"]) == rows(splits["test_ood"])  # valid.json has them all
    assert list(rows(listed["test_id"])) == list(rows(splits["test_id"]))[:4]
    for name in ("id_atomic", "ood_atomic", "train_inferred", "test_id_ood", "test_ood_id"):
        assert rows(listed[name]) == rows(splits[name])


def item(text, answer, **more):
    return {"input_text": text, "target_text": f"{text}<{answer}></a>", **more}


def changed(name, number, **changes):
    """A change of one item of one file, for the table below."""
    return lambda files: files[name][number].update(changes)


def without_facts_of(entity):
    return lambda files: files.update(train=[i for i in files["train"] if i["input_text"].count(
        "<") != 2 or not i["input_text"].startswith(f"<{entity}>")])


BAD_SETS = {
    "unknown token": (changed("train", 3, **item("<e_0><r_99>", "e_1")), "train.json, item 3: "
                      "token <r_99> is not in vocab.json"),
    "two tails": (lambda files: files["train"].insert(1, {**files["train"][0], "target_text":
                  files["train"][0]["input_text"] + "<e_14></a>"}), "train.json, item 1: its head"),
    "fact twice": (lambda files: files["train"].insert(7, files["train"][0]), "item 7: its head"),
    "missing bridge": (without_facts_of("e_3"), "lacks a fact of its path"),
    "other answer": (lambda files: files["valid"][2].update(item(
        files["valid"][2]["input_text"], "e_0" if "<e_0></a>" not in
        files["valid"][2]["target_text"] else "e_1")), "valid.json, item 2: the facts of"),
    "training item tested": (lambda files: files["test"].append(
        {**files["train"][-1], "type": "test_inferred_iid"}), "is a training composition, too"),
    "ID composition as OOD": (lambda files: files["test"].append(
        {**files["train"][-1], "type": "test_inferred_ood"}), "test.json, item"),
    "head is a relation": (changed("train", 5, **item("<r_1><e_0>", "e_1")), "train.json, item"),
    "answer is a relation": (changed("train", 5, **item("<e_0><r_1>", "r_2")), "train.json, item"),
    "target not of input": (changed("test", 9, input_text="<e_0><r_1>"), "test.json, item 9: must"),
    "no end": (changed("test", 9, target_text="<e_0><r_1><e_2>"), "test.json, item 9: must"),
    "a hop too many": (changed("train", 9, **item("<e_0><r_1><r_2><r_3>", "e_1")), "item 9: must"),
    "nested item": (changed("train", 9, target_text=["<e_0>"]), "train.json, item 9: must"),
    "no type": (lambda files: files["test"][0].pop("type"), "test.json, item 0: must"),
    "unknown type": (changed("test", 0, type="test"), "test.json, item 0: must"),
    "type of a list": (changed("test", 0, type=["id_atomic"]), "test.json, item 0: must"),
    "fact typed as composition": (changed("test", 0, type="train_inferred"), "item 0: must"),
    "items are text": (lambda files: files.update(train=["<e_0><r_1>"]), "item 0: must"),
    "not a list": (lambda files: files.update(valid={"a": 1}), "valid.json: must be a JSON list"),
    "empty list": (lambda files: files.update(train=[]), "train.json: must be a JSON list"),
    "no facts": (lambda files: files.update(train=files["train"][-1:]),
                 "train.json: holds no fact"),
    "no compositions": (lambda files: files.update(train=files["train"][:90]), "lists nothing "
                        "for train_inferred"),
    "no ID test": (lambda files: files.update(test=[i for i in files["test"] if i["type"] !=
                   "test_inferred_iid"]), "lists nothing for test_id"),
    "vocab without relations": (lambda files: files.update(vocab=[
        t for t in files["vocab"] if "r_" not in t]), "is not in vocab.json"),
    "vocab without entities": (lambda files: files.update(vocab=[
        t for t in files["vocab"] if "e_" not in t]), "is not in vocab.json"),
    "vocab in another order": (lambda files: files["vocab"].reverse(), "precedes"),
    "vocab of numbers": (lambda files: files.update(vocab=[1, 2]), "vocab.json: must be a list of"),
    "vocab of words": (lambda files: files["vocab"].insert(0, "Anna"), "vocab.json: must be"),
    "token twice": (lambda files: files["vocab"].insert(1, "<e_0>"), "vocab.json: must be"),
}


@pytest.mark.parametrize("change, said", BAD_SETS.values(), ids=BAD_SETS)
def test_a_damaged_data_set_is_refused_with_file_and_item(change, said, tmp_path):
    write_json(*small_data(), tmp_path / "set")
    files = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "set").iterdir()}
    change(files)
    for name, content in files.items():
        (tmp_path / "set" / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(BadInput) as error:
        read_json(tmp_path / "set")
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train", "valid", "test", "vocab"])
@pytest.mark.parametrize("content", [
    b"", b"[", b"[" * 10**6, b'{"a": 1}', b"null", b"\xff\xfe\x00", b'["\\ud800"]', b"[[]]",
    b"[1e999]"])
def test_a_file_that_is_no_data_set_is_refused(name, content, tmp_path):
    write_json(*small_data(), tmp_path / "set")
    (tmp_path / "set" / f"{name}.json").write_bytes(content)
    with pytest.raises(BadInput, match=f"{name}.json"):
        read_json(tmp_path / "set")
    (tmp_path / "set" / f"{name}.json").unlink()
    with pytest.raises(BadInput, match=f"{name}.json: No such file"):
        read_json(tmp_path / "set")


@given(name=st.sampled_from(["train", "valid", "test", "vocab"]), at=st.floats(0, 1),
       cut=st.integers(0, 30), put=st.binary(max_size=6))
@hypothesis.settings(max_examples=100, deadline=None)
def test_random_damage_is_refused_or_harmless(name, at, cut, put):
    """Whatever bytes are lost or put in, nothing but BadInput is raised, and no answer is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(*small_data(), Path(folder) / "set")
        path = Path(folder) / "set" / f"{name}.json"
        content = path.read_bytes()
        start = int(at * len(content))
        path.write_bytes(content[:start] + put + content[start + cut:])
        try:
            world, splits = read_json(path.parent)
        except BadInput as error:
            assert "\n" not in str(error)
        else:
            paths = walks(world)
            for split in SPLITS[2:]:
                assert all(paths[q][:2] == answer for q, answer in rows(splits[split]).items())


@pytest.mark.parametrize("noise", [
    lambda: np.random.default_rng(0).bytes(10**8), lambda: b"[0," * (10**8 // 3),
    lambda: b"1" * 10**8, lambda: b'"' + b"a" * 10**8], ids=["bytes", "lists", "number", "text"])
def test_100_megabytes_of_noise_are_refused_quickly_in_modest_memory(noise, tmp_path):
    write_json(*small_data(), tmp_path / "set")
    (tmp_path / "set" / "train.json").write_bytes(noise())
    for read in (lambda: read_json(tmp_path / "set"),
                 lambda: read_facts(tmp_path / "set" / "train.json", WorldConfig())):
        began = time.perf_counter()
        tracemalloc.start()
        with pytest.raises(BadInput, match="train.json"):
            read()
        assert tracemalloc.get_traced_memory()[1] < 500e6
        tracemalloc.stop()
        assert time.perf_counter() - began < 10


FAMILY = "\ufeffAnna\tmother of\tJörg\r\n\nJörg\tknows\t李雷\n" \
         "李雷 \tknows\tAnna\nAnna\tknows\tAnna\n"


def test_own_facts_keep_their_names_and_order(tmp_path):
    (tmp_path / "family.tsv").write_text(FAMILY, encoding="utf-8", newline="")
    world = read_facts(tmp_path / "family.tsv", WorldConfig(ood_fraction=0.5))
    assert world.entity_names == ("Anna", "Jörg", "李雷")
    assert world.relation_names == ("mother of", "knows")
    facts, ood = triples(world)
    assert facts == {(0, 0): 1, (0, 1): 0, (1, 1): 2, (2, 1): 0} and len(ood) == 2


@pytest.mark.parametrize("content, said", [
    ("", "holds no fact"), ("\n \n", "holds no fact"), ("a\tr\tb\n", "line 1: b is never a head"),
    ("a\tr\ta\nb\tr\n", "line 2: needs head"), ("a\tr\ta\n\na r b\n", "line 3: needs head"),
    ("a\tr\ta\n\nb\ts\ta\na\tr\tb\n", "line 4: (a, r) has a tail already, in line 1"),
    ("a\tr\ta\na\t\tb\n", "line 2: needs head"), ("a\tr\ta\tx\n", "line 1: needs head"),
    ("a\tr\ta\nb\tr\tc\n", "line 2: c is never a head")])
def test_own_facts_that_cannot_be_used_are_refused_with_the_line(content, said, tmp_path):
    (tmp_path / "facts.tsv").write_text(content)
    with pytest.raises(BadInput) as error:
        read_facts(tmp_path / "facts.tsv", WorldConfig())
    assert said in str(error.value)


def test_own_facts_survive_the_fields_layout(tmp_path):
    """Names, rows of different length and order, too; names that would be misread are refused."""
    lines = [f"p{h}\tr{k}\tp{(3 * h + k * k) % 9}" for h in range(9) for k in range(3 + h % 3)]
    (tmp_path / "facts.tsv").write_text("\n".join(lines))
    config = WorldConfig(ood_fraction=0.3, phi=1.0)
    world = read_facts(tmp_path / "facts.tsv", config)
    made = world, make_splits(world, config)
    write_json(*made, tmp_path / "set")
    assert_same_data(read_json(tmp_path / "set"), made)
    bad = dataclasses.replace(world, entity_names=("a>b", *world.entity_names[1:]))
    with pytest.raises(BadInput, match="names"):
        write_json(bad, made[1], tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- model

SMALL = Config(d_model=16, n_heads=2, n_loops=3, min_loops=2, batch_size=8, warmup=4, ema=0.9,
               atomic_share=0.25, eval_every=3)
E, R = 12, 8  # entities and relations of the smoke preset's world
BLANK = E + R
KINDS = [(layout, shared) for layout in LENGTH for shared in (True, False)]
CPU = torch.device("cpu")


def make_model(seed=0, **changes):
    """A small float64 model with E entities and R relations."""
    torch.manual_seed(seed)
    return LoopedTransformer(dataclasses.replace(SMALL, **changes), E, R).double()


def random_tokens(layout="causal", n=16, seed=0):
    """n compositions followed by n atomic queries, (2 n, 3), or (2 n, 4) with a blank more."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.full((2 * n, {"causal": 3, "bidirectional": 4}[layout]), BLANK)
    tokens[:, 0] = torch.randint(0, E, (2 * n,), generator=generator)
    tokens[:, 1:3] = torch.randint(E, E + R, (2 * n, 2), generator=generator)
    tokens[n:, 2] = BLANK
    return tokens


@pytest.mark.parametrize("layout, more", [("causal", []), ("bidirectional", [BLANK])])
def test_queries_become_tokens(layout, more):
    """Entity e is token e, relation r token E + r; what is not asked stays blank. Only the
    bidirectional layout has a place of its own for the answer."""
    world, splits = smoke_data()
    for name in ("test_id", "ood_atomic"):
        tokens, answers = to_tokens(splits[name], world, layout)
        for i, (h, r1, r2, _, t) in enumerate(zip(*splits[name])):
            third = BLANK if name == "ood_atomic" else E + r2
            assert tokens[i].tolist() == [h, E + r1, third, *more] and answers[i] == t


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_scaled_dot_product_attention(causal, length):
    q, k, v = torch.randn(3, 5, 2, length, 8, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attend(q, k, v, causal), expected)


def test_rope_sees_only_the_distance_between_two_positions():
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    turned = lambda x, position: rotate(x[None], torch.tensor([position]))[0]
    dot = lambda i, j: (turned(q, i) @ turned(k, j)).item()
    assert dot(0, 0) == pytest.approx((q @ k).item(), abs=1e-6)
    for shift in (1, 2, 7):
        assert dot(1 + shift, 3 + shift) == pytest.approx(dot(1, 3), abs=1e-5)
        assert abs(dot(1, 3 + shift) - dot(1, 3)) > 1e-3
    assert turned(q, 5).norm().item() == pytest.approx(q.norm().item(), abs=1e-6)


def test_rms_norm_gives_root_mean_square_one():
    x = 5 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0)) + 3
    torch.testing.assert_close(rms_norm(x), F.rms_norm(x, (16,), eps=1e-6))
    torch.testing.assert_close(rms_norm(x).square().mean(-1), torch.ones(4))


def count(module):
    return sum(weight.numel() for weight in module.parameters())


def test_loops_of_a_shared_block_cost_no_parameters():
    """D = 16, MLP width 42: a block has 4 D D for attention and 3 * 42 D for the MLP."""
    block = 4 * 16 * 16 + 3 * 42 * 16
    for n_loops in (1, 3, 7):
        assert count(make_model(n_loops=n_loops)) == (E + R + 1) * 16 + block
        assert count(make_model(n_loops=n_loops, shared=False)) == (
            (E + R + 1) * 16 + n_loops * block)


@pytest.mark.parametrize("layout", LENGTH)
def test_every_loop_of_an_ordinary_transformer_has_its_own_weights(layout):
    """With shared False, block k alone makes the state after loop k."""
    model, tokens = make_model(layout=layout, shared=False), random_tokens(layout)
    before = run_states(model, tokens)
    with torch.no_grad():
        model.blocks[1].out.weight.neg_()
    changed = (run_states(model, tokens) != before).flatten(1).any(1)
    assert changed.tolist() == [False, True, True]


@pytest.mark.parametrize("layout, shared", KINDS)
def test_gradients_reach_every_parameter(layout, shared):
    model, tokens = make_model(layout=layout, shared=shared), random_tokens(layout)
    loss_of(model, tokens, torch.arange(len(tokens)) % E).backward()
    for name, weight in model.named_parameters():
        assert weight.grad.abs().amax(-1).min() > 0, name        # every row of every matrix


@pytest.mark.parametrize("layout, position, seen", [
    ("bidirectional", 0, True), ("causal", 0, False), ("causal", 1, False), ("causal", 2, True)])
def test_only_in_the_bidirectional_layout_a_state_depends_on_later_tokens(layout, position, seen):
    """Token 2 is changed; `position` is where the states are compared."""
    model, tokens = make_model(layout=layout), random_tokens(layout)
    other = tokens.clone()
    other[:, 2] = E + (tokens[:, 2] - E + 1) % R
    difference = run_states(model, tokens) - run_states(model, other)
    assert (difference[-1, :, position].abs().amax(-1) > 1e-6).all() == seen
    assert seen or difference[:, :, position].eq(0).all()


@pytest.mark.parametrize("layout, atomic, composition", [("bidirectional", 2, 3), ("causal", 1, 2)])
def test_the_answer_is_read_at_the_first_blank_or_one_before(layout, atomic, composition):
    tokens = random_tokens(layout, n=4)
    place = torch.arange(tokens.shape[1]).expand(tokens.shape)[:, :, None]       # state = position
    assert make_model(layout=layout).read(place, tokens)[:, 0].tolist() == (
        [composition] * 4 + [atomic] * 4)


def restated_logits(model, tokens):
    """The model's logits, written again with PyTorch's own layers and RoPE by complex numbers."""
    config, weights = model.config, dict(model.named_parameters())
    D, heads, without = config.d_model, config.n_heads, config.without
    d = D // heads
    table = weights["embedding"]
    if without != "unit_vectors":
        table = F.rms_norm(table, (D,), eps=1e-6)
    angle = torch.arange(tokens.shape[1])[:, None] / 100.0 ** (torch.arange(d // 2) / (d // 2))
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128)       # (T, d/2)

    def rope(x):
        turned = torch.complex(*x.split(d // 2, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    def by_head(x):
        return x.unflatten(-1, (heads, d)).transpose(1, 2)                       # (B, heads, T, d)

    x = state = F.embedding(tokens, table)
    for loop in range(config.n_loops):
        name = f"blocks.{0 if config.shared else loop}."
        q, k, v = map(by_head, F.linear(state, weights[name + "qkv.weight"]).split(D, dim=-1))
        mixed = F.scaled_dot_product_attention(rope(q), rope(k), v,
                                               is_causal=config.layout == "causal")
        mixed = F.linear(mixed.transpose(1, 2).flatten(2), weights[name + "out.weight"])
        u = F.rms_norm({"restart": state}.get(without, x) + mixed, (D,), eps=1e-6)
        gate, up = F.linear(u, weights[name + "gate_up.weight"]).tensor_split(2, dim=-1)
        new = F.linear(F.silu(gate) * up, weights[name + "down.weight"])
        state = F.rms_norm({"bare_mlp": u + new}.get(without, new), (D,), eps=1e-6)
    scale = weights["scale"] if without == "fixed_scale" else config.logit_scale
    logits = scale * math.sqrt(D) * F.cosine_similarity(state[:, :, None], table, dim=-1)
    if without == "unit_vectors":
        logits = logits * table.norm(dim=-1) / math.sqrt(D)                      # (B, T, V)
    places = [[*row, BLANK].index(BLANK) - (config.layout == "causal") for row in tokens.tolist()]
    return torch.stack([row[place] for row, place in zip(logits, places)])


@pytest.mark.parametrize("layout, shared", KINDS)
@pytest.mark.parametrize("without", ["", *INGREDIENTS])
def test_forward_and_gradients_equal_an_independent_restatement(layout, shared, without):
    model = make_model(layout=layout, shared=shared, without=without)
    tokens = random_tokens(layout)
    weights, answers = list(model.parameters()), torch.arange(len(tokens)) % E
    found, expected = model(tokens), restated_logits(model, tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    slopes = lambda logits: torch.autograd.grad(F.cross_entropy(logits, answers), weights)
    for a, b in zip(slopes(found), slopes(expected)):  # the cosine has no 1e-6 in it
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 if without else 1e-6)


@pytest.mark.parametrize("without", ["restart", "bare_mlp", "unit_vectors"])
def test_each_ingredient_left_out_makes_another_model_of_the_same_weights(without):
    model, tokens = make_model(without=without), random_tokens()
    usual = make_model()
    usual.load_state_dict(model.state_dict())
    assert ((model(tokens) - usual(tokens)).abs().amax(-1) > 1e-3).all()


def test_a_learned_scale_is_one_more_parameter_that_starts_as_usual_and_is_trained():
    model, usual, tokens = make_model(without="fixed_scale"), make_model(), random_tokens()
    assert {*model.state_dict()} - {*usual.state_dict()} == {"scale"}
    torch.testing.assert_close(model(tokens), usual(tokens), rtol=1e-6, atol=0)
    with torch.no_grad():
        model.scale *= 3
    torch.testing.assert_close(model(tokens), 3 * usual(tokens), rtol=1e-6, atol=0)
    trainer = make_trainer(without="fixed_scale", weight_decay=0.0)
    trainer.train_step()
    assert trainer.model.scale.grad.abs() > 1e-4
    assert trainer.model.scale != trainer.config.logit_scale


@pytest.mark.parametrize("layout", LENGTH)
def test_edit_is_called_after_every_loop_with_the_state(layout):
    model, tokens, calls = make_model(layout=layout), random_tokens(layout), []
    model(tokens, edit=lambda loop, state: calls.append((loop, state)) or state)
    assert [loop for loop, _ in calls] == [0, 1, 2]
    last = calls[-1][1]
    assert last.shape == (*tokens.shape, 16)
    assert torch.equal(model.unembed(model.read(last, tokens)), model(tokens))


@pytest.mark.parametrize("layout, shared", KINDS)
def test_an_edit_that_keeps_the_state_changes_no_bit(layout, shared):
    model, tokens = make_model(layout=layout, shared=shared).float(), random_tokens(layout)
    assert torch.equal(model(tokens, edit=lambda loop, state: state.clone()), model(tokens))


@pytest.mark.parametrize("layout, exact_from", [("bidirectional", 1), ("causal", 2)])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_the_whole_state_of_another_query_gives_its_logits(layout, exact_from, at):
    """Bit for bit after the last loop (2). One loop before, the query's own input speaks again at
    the answer position: in the bidirectional layout it is a blank, the same for both queries."""
    model, tokens = make_model(layout=layout).float(), random_tokens(layout)[:16]  # compositions
    swap = lambda loop, state: state.roll(1, 0) if loop == at else state
    assert torch.equal(model(tokens, edit=swap), model(tokens).roll(1, 0)) == (at >= exact_from)


# ---------------------------------------------------------------- training

def smoke_data(regime="natural"):
    return build_data(settings(WorldConfig, PRESETS["smoke"][1]), regime)


def make_trainer(**changes):
    return Trainer(dataclasses.replace(SMALL, **changes), *smoke_data(), CPU)


@pytest.mark.parametrize("layout", LENGTH)
@pytest.mark.parametrize("min_loops, graded", [(1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (9, [3])])
def test_loss_is_the_mean_cross_entropy_of_the_graded_loops(layout, min_loops, graded):
    """Loops min_loops..n_loops, each as if the model ended there; at least the last one."""
    model, tokens = make_model(layout=layout, min_loops=min_loops), random_tokens(layout)
    answers = torch.arange(len(tokens)) % E
    expected = [F.cross_entropy(model(tokens, n_loops=k), answers).item() for k in graded]
    assert loss_of(model, tokens, answers).item() == pytest.approx(np.mean(expected), rel=1e-12)


@pytest.mark.parametrize("layout", LENGTH)
def test_training_rows_are_the_facts_then_the_training_compositions(layout):
    world, splits = smoke_data("both_full")
    tokens, answers, n_facts = training_rows(splits, world, layout, CPU)
    assert n_facts == len(world.facts) == (tokens[:, 2] == BLANK).sum()
    assert (tokens[:n_facts, 2] == BLANK).all()
    rows = set(map(tuple, tokens[n_facts:].tolist()))
    as_rows = lambda name: set(map(tuple, to_tokens(splits[name], world, layout)[0].tolist()))
    assert rows == as_rows("train_inferred")
    for name in ("test_id", "test_ood", "test_id_ood", "test_ood_id"):
        assert rows.isdisjoint(as_rows(name))
    walk = {(h, r): t for h, r, t in zip(*(queries(world, world.facts)[i] for i in (0, 1, 4)))}
    for (h, r1, r2, *_), t in zip(tokens[n_facts:].tolist(), answers[n_facts:].tolist()):
        assert walk[walk[h, r1 - E], r2 - E] == t


@pytest.mark.parametrize("share, n_atomic", [(0.25, 16), (0.5, 32), (1.0, 64)])
def test_a_batch_holds_exactly_its_share_of_atomic_facts(share, n_atomic):
    config = dataclasses.replace(SMALL, atomic_share=share, batch_size=64)
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(50):
        rows = draw(config, 10, 30, generator)
        assert len(rows) == 64 and (rows < 10).sum() == n_atomic
        seen.update(rows.tolist())
    assert seen == set(range(10 if share == 1.0 else 30))


def test_atomic_share_zero_draws_every_row_equally_often():
    config = dataclasses.replace(SMALL, atomic_share=0.0, batch_size=60_000)
    rows = draw(config, 10, 30, torch.Generator().manual_seed(0))
    times = torch.bincount(rows)
    assert len(times) == 30 and ((times - 2000).abs() < 5 * 44).all()           # sd 44


def restated_steps(model, trainer, n_steps, seed):
    """n_steps of AdamW and of the moving average, slowly: yields (loss, weights, average)."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    weights = [w.detach().clone() for w in model.parameters()]
    average = [w.clone() for w in weights]
    m, v = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]
    for step in range(1, n_steps + 1):
        rows = draw(config, trainer.n_facts, len(trainer.tokens), generator)
        with torch.no_grad():
            for weight, value in zip(model.parameters(), weights):
                weight.copy_(value)
        loss = loss_of(model, trainer.tokens[rows], trainer.answers[rows])
        lr = config.lr * min(1, step / config.warmup)
        decay = min(config.ema, step / (step + 10))
        for i, g in enumerate(torch.autograd.grad(loss, list(model.parameters()))):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.98 * v[i] + 0.02 * g ** 2
            change = (m[i] / (1 - 0.9 ** step)) / ((v[i] / (1 - 0.98 ** step)).sqrt() + 1e-8)
            weights[i] = weights[i] - lr * config.weight_decay * weights[i] - lr * change
            average[i] = decay * average[i] + (1 - decay) * weights[i]
        yield loss.item(), list(weights), list(average)


def test_train_step_is_adamw_with_a_moving_average():
    """Warm-up ends at step 4, the average's decay reaches its limit .2 at step 3; both passed."""
    trainer = make_trainer(seed=5, ema=0.2)
    trainer.model.double(), trainer.average.double()
    model = make_model(ema=0.2)
    model.load_state_dict(trainer.model.state_dict())
    for loss, weights, average in restated_steps(model, trainer, 8, seed=5):
        trainer.train_step()
        assert trainer.losses[(trainer.step - 1) % 3].item() == pytest.approx(loss, rel=1e-6)
        for found, expected in ((trainer.model, weights), (trainer.average, average)):
            torch.testing.assert_close(list(found.parameters()), expected, rtol=1e-9, atol=1e-9)


class Recorder(TorchDispatchMode):
    """Notes every tensor operation of the work in its `with`, as a CUDA graph would.

    `replay` does them again without the Python that led to them: what an operation made is made
    anew, all other tensors are those of the first time.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        made = {}  # id of a tensor made while recording -> its successor
        new = lambda x: made.get(id(x), x) if isinstance(x, torch.Tensor) else x
        for function, args, kwargs, result in self.calls:
            again = function(*tree_map(new, args), **tree_map(new, kwargs))
            for before, after in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(before, torch.Tensor):
                    made[id(before)] = after
        return made


@pytest.mark.parametrize("bf16", [False, True])
def test_a_step_replayed_without_its_python_trains_as_the_step_does(bf16):
    """What a CUDA graph needs: no wait for a value, nothing that changes from step to step."""
    usual, replayed = (make_trainer(bf16=bf16, ema=0.2, batch_size=64) for _ in range(2))
    recorder = Recorder()

    def record():
        with recorder:
            replayed.learn()
        first = replayed.loss
        replayed.replay = lambda: setattr(replayed, "loss", recorder.replay()[id(first)])

    for step in range(12):
        if step == 5:  # past the warm-up
            replayed.replay = record
        usual.train_step(), replayed.train_step()
        assert usual.loss == replayed.loss and usual.losses.equal(replayed.losses)
    waits = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"}
    assert not waits & {function.overloadpacket.__name__ for function, *_ in recorder.calls}
    for one, two in ((usual.model, replayed.model), (usual.average, replayed.average)):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("bf16, kind", [(False, torch.float32), (True, torch.bfloat16)])
def test_bf16_is_for_the_matrix_products_of_training_alone(bf16, kind):
    trainer = make_trainer(bf16=bf16)
    for work, expected in ((trainer.train_step, kind), (trainer.measure, torch.float32)):
        with Recorder() as recorder:
            work()
        products = [args for function, args, *_ in recorder.calls
                    if function.overloadpacket.__name__ in ("mm", "bmm")]
        assert {x.dtype for args in products for x in args} == {expected}
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("warmup, ema, first", [(4, 0.2, 7), (0, 0.9, 93), (0, 0.0, 4)])
def test_the_step_is_captured_once_on_cuda_when_lr_and_decay_stay(warmup, ema, first, monkeypatch):
    trainer = make_trainer(warmup=warmup, ema=ema)
    captured, rows = [], trainer.tokens
    monkeypatch.setattr(grok, "capture", lambda work, _: captured.append(trainer.step) or work)
    for _ in range(first + 2):
        trainer.train_step()
    assert captured == []  # not on a CPU
    again = make_trainer(warmup=warmup, ema=ema)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x is again.tokens))
    nothing = lambda: None
    monkeypatch.setattr(grok, "capture", lambda work, _: captured.append(again.step) or nothing)
    for _ in range(first + 2):
        again.train_step()
    assert captured == [first - 1]
    again.load_state_dict(trainer.state_dict())
    for _ in range(5):
        again.train_step()
    assert captured == [first - 1, first + 5]


@pytest.mark.parametrize("warmup, rates", [(4, [0.25, 0.5, 0.75, 1, 1]), (0, [1] * 5)])
def test_the_learning_rate_rises_linearly_then_stays(warmup, rates):
    trainer, found = make_trainer(warmup=warmup), []
    for _ in rates:
        trainer.train_step()
        found.append(trainer.optimizer.param_groups[0]["lr"] / SMALL.lr)
    assert found == pytest.approx(rates)


def test_a_measurement_is_of_the_averaged_weights_and_the_losses_since_the_last():
    trainer, losses = make_trainer(), []
    for _ in range(5):
        trainer.train_step()
        losses.append(trainer.losses[(trainer.step - 1) % 3].item())
        if trainer.step in (3, 5):
            trainer.measure()
    first, second = trainer.history
    assert (first["step"], second["step"]) == (3, 5)
    assert first["loss"] == pytest.approx(np.mean(losses[:3]))
    assert second["loss"] == pytest.approx(np.mean(losses[3:]))
    found = {key: second[key] for key in ("accuracy", "lens")}
    assert found == evaluate(trainer.average, trainer.exams)
    assert found != evaluate(trainer.model, trainer.exams)


def test_the_weights_saved_are_the_averaged_ones(tmp_path):
    """In half precision: three digits."""
    trainer = make_trainer()
    for _ in range(5):
        trainer.train_step()
    trainer.measure()
    grok.save_weights(trainer, tmp_path / "after.pt")
    saved = torch.load(tmp_path / "after.pt", weights_only=True)["weights"]
    near = lambda a, b: torch.allclose(a.float(), b, rtol=1e-3, atol=1e-6)
    average, last = trainer.average.state_dict(), trainer.model.state_dict()
    assert set(saved) == set(average)
    assert all(near(saved[name], average[name]) for name in saved)
    assert not any(near(saved[name], last[name]) for name in saved)


class Scripted:
    """Stands in for a model whose top-1 token after loop l at position p is sites[l, query, p]."""

    def __init__(self, sites):
        self.sites = F.one_hot(torch.tensor(sites)).float()                      # (loops, N, T, V)

    def __call__(self, tokens, edit=lambda loop, state: state):
        for loop, state in enumerate(self.sites):
            edit(loop, state)
        return self.sites[-1, :, -1]

    def unembed(self, state):
        return state


# bridges 0 1 2 3; query 3 shows query 2's, its neighbour's, and 9 is nobody's
SITES = [[[9, 0, 9], [9, 1, 9], [9, 9, 9], [2, 9, 9]],
         [[9, 0, 6], [9, 9, 7], [2, 9, 8], [9, 9, 5]]]


def test_bridge_rates_on_states_made_by_hand():
    """Queries 0, 1, 2 show their bridge somewhere, two of them at (loop 0, position 1)."""
    assert bridge_rates(Scripted(SITES), torch.zeros(4, 3), torch.arange(4)) == {
        "any": 0.75, "best": 0.5, "any_chance": 0.25, "best_chance": 0.25}


def test_evaluate_counts_right_answers_and_leaves_out_empty_splits():
    exam = lambda *answers: (torch.zeros(4, 3), torch.tensor(answers), torch.arange(4))
    nothing = tuple(x[:0] for x in exam(0, 0, 0, 0))
    found = evaluate(Scripted(SITES), {"id_atomic": exam(6, 7, 8, 5), "test_id": exam(6, 7, 8, 9),
                                       "test_ood": exam(7, 8, 5, 6), "test_id_ood": nothing,
                                       "test_ood_id": exam(6, 8, 5, 6)})
    assert found["accuracy"] == {"id_atomic": 1.0, "test_id": 0.75, "test_ood": 0.0,
                                 "test_ood_id": 0.25}
    assert {split: rates["any"] for split, rates in found["lens"].items()} == {
        "test_id": 0.75, "test_ood": 0.75, "test_ood_id": 0.75}


@pytest.mark.parametrize("layout", LENGTH)
def test_exams_are_queries_of_their_split_with_answers_and_bridges(layout):
    world, splits = smoke_data()
    exams = make_exams(splits, world, layout, CPU, most=20)
    assert set(exams) == set(SPLITS)
    for name, (tokens, answers, bridges) in exams.items():
        everything = set(zip(map(tuple, to_tokens(splits[name], world, layout)[0].tolist()),
                             splits[name].t.tolist(), splits[name].b.tolist()))
        drawn = list(zip(map(tuple, tokens.tolist()), answers.tolist(), bridges.tolist()))
        assert len(set(drawn)) == len(drawn) == min(20, len(everything))
        assert everything.issuperset(drawn)


# ---------------------------------------------------------------- the command line

def run_grok(folder, *options):
    """The real command, in its own process and folder."""
    return subprocess.run([sys.executable, Path(grok.__file__), *options], cwd=folder,
                          capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder of three smoke runs (seed 0, seed 0 again, seed 1), and what each of them said."""
    folder = tmp_path_factory.mktemp("command")
    smoke = ("--preset", "smoke", "--phi", "1", "--device", "cpu", "--steps", "200",
             "--eval-every", "50")
    said = [run_grok(folder, *smoke, "--out", "first"),
            run_grok(folder, *smoke, "--out", "again", "--seed", "0"),
            run_grok(folder, *smoke, "--out", "other", "--seed", "1")]
    for run in said:
        assert run.returncode == 0, run.stderr
    return folder, said


def metrics(folder):
    """metrics.jsonl as a list, its timing fields (named *seconds*) left out."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if "seconds" not in key}
            for line in lines]


def test_a_smoke_run_learns(runs):
    """In 200 steps the loss halves, facts are learned, and training compositions are fitted."""
    first, *_, last = metrics(runs[0] / "first")
    assert last["loss"] < 0.5 * first["loss"]
    assert last["accuracy"]["ood_atomic"] >= first["accuracy"]["ood_atomic"] + 0.2
    assert last["accuracy"]["ood_atomic"] >= 0.9 and last["accuracy"]["train_inferred"] >= 0.99


def test_a_run_folder_holds_what_the_documentation_says(runs):
    folder = runs[0] / "first"
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "metrics.jsonl", "last.pt", "before.pt", "after.pt", "curves.png"}
    about = json.loads((folder / "config.json").read_text())
    assert {"preset", "regime", "world", "model", "versions", "device"} <= set(about)
    assert about["world"] == dataclasses.asdict(
        WorldConfig(**{**PRESETS["smoke"][1], "phi": 1.0}))
    assert about["model"] == dataclasses.asdict(
        Config(**{**PRESETS["smoke"][2], "steps": 200, "eval_every": 50}))
    history = metrics(folder)
    assert [line["step"] for line in history] == [50, 100, 150, 200]
    for line in history:
        assert set(line) == {"step", "loss", "accuracy", "lens"}
        assert set(line["accuracy"]) == set(SPLITS)
        assert set(line["lens"]) == {"test_id", "test_ood", "test_id_ood", "test_ood_id"}


def test_before_is_taken_when_training_is_fitted_and_after_at_the_end(runs):
    """Loaded again (in half precision), they answer as in the line they were saved at."""
    folder, history = runs[0] / "first", metrics(runs[0] / "first")
    fitted = next(line for line in history if line["accuracy"]["train_inferred"] >= 0.99)
    assert fitted["step"] < history[-1]["step"]
    for weights, line in (("before", fitted), ("after", history[-1])):
        model, world, splits = grok.load_run(folder, weights)
        exams = make_exams(splits, world, model.config.layout, CPU)
        found = evaluate(model, exams)["accuracy"]
        for split in ("id_atomic", "train_inferred", "test_id", "test_id_ood", "test_ood_id"):
            assert found[split] == pytest.approx(line["accuracy"][split], abs=0.03)
        assert torch.load(folder / f"{weights}.pt", weights_only=True)["step"] == line["step"]


def test_the_picture_is_a_png_with_something_on_it(runs):
    path = runs[0] / "first" / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    image = matplotlib.image.imread(path)
    assert min(image.shape[:2]) > 300 and image[..., :3].std() > 0.05


def test_the_same_seed_gives_the_same_metrics_and_another_seed_others(runs):
    folder = runs[0]
    assert metrics(folder / "first") == metrics(folder / "again")
    assert metrics(folder / "first") != metrics(folder / "other")
    for name in ("before.pt", "after.pt"):
        one, two = (torch.load(folder / run / name, weights_only=True)["weights"]
                    for run in ("first", "again"))
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_world_depends_on_data_seed_alone(runs):
    _, world, splits = grok.load_run(runs[0] / "first")
    _, other, other_splits = grok.load_run(runs[0] / "other")
    assert np.array_equal(world.tails, other.tails) and np.array_equal(world.is_ood, other.is_ood)
    for name in SPLITS:
        assert all(map(np.array_equal, splits[name], other_splits[name]))
    config = WorldConfig(**{**PRESETS["smoke"][1], "data_seed": 1})
    assert not np.array_equal(world.tails, build_data(config, "natural")[0].tails)


def test_a_piped_run_says_one_plain_line_an_evaluation_then_the_table(runs):
    said = runs[1][0].stdout
    assert "\r" not in said and runs[1][0].stderr == ""
    progress = [line for line in said.splitlines() if line.startswith("step ")]
    assert len(progress) == 4 and progress[-1].split()[1:3] == ["200", "100%"]
    right = metrics(runs[0] / "first")[-1]["accuracy"]
    for split in SPLITS:
        assert f"{split:<16}{right[split]:>7.3f}\n" in said
    assert "first" in said.splitlines()[-1]


def test_without_out_a_run_lies_under_preset_regime_and_seed(tmp_path):
    """Settings that differ from the preset are in the folder's name."""
    given = grok.make_parser().parse(["--preset=smoke", "--seed=3"])
    folder = lambda given: grok.default_folder(given, grok.describe(given, CPU))
    assert folder(given) == Path("runs/smoke/natural/seed3")
    given = grok.make_parser().parse(["--preset=smoke", "--regime=both_full", "--lr=0.01"])
    assert folder(given) == Path("runs/smoke/both_full,lr=0.01/seed0")


def test_every_run_of_the_readme_is_legal_has_its_own_folder_and_a_start_that_came_before(tmp_path):
    """Each run described leaves its after.pt, without which one that starts from it is refused."""
    root, worlds, found, seeds = tmp_path / "my runs", {}, [], {}
    for command in grok.every_run(root):
        given = grok.make_parser().parse([*shlex.split(command), f"--root={root}"])
        about = grok.describe(given, CPU)
        folder = grok.default_folder(given, about)
        folder.mkdir(parents=True)                                               # a new one
        (folder / "after.pt").write_text(command)
        (folder / "config.json").write_text(json.dumps(about))
        (folder / "metrics.jsonl").write_text(json.dumps({
            "step": 1, "accuracy": {"train_inferred": 1.0, "test_ood": 1.0},
            "lens": {"test_ood": {"any": 1.0}}}))
        worlds[json.dumps([about["world"], about["regime"]])] = about
        seeds.setdefault(folder.parent, []).append(about["model"]["seed"])
        found.append(about)
        if "start" in about:
            start = json.loads(Path(about["start"]["path"], "config.json").read_text())
            sizes = "layout", "shared", "without", "d_model", "n_heads", "n_loops", "seed"
            assert all(start["model"][name] == about["model"][name] for name in sizes)
    for about in worlds.values():
        build_data(settings(WorldConfig, about["world"]), about["regime"])
    assert all(some == [0, 1, 2] or some == [0] and folder.parent.name == "growth"
               for folder, some in seeds.items())
    assert {about["regime"] for about in found if about["preset"] == "tiny"} == set(REGIMES)
    assert {about["model"]["without"] for about in found} == {"nothing", *INGREDIENTS}
    assert {about["preset"] for about in found} == {"tiny", "bidirectional", "tune",
                                                          "growth"}


def test_all_divides_every_run_among_the_tasks_of_an_array(tmp_path, monkeypatch, capsys):
    """Each run once, with the root and the device that were given."""
    monkeypatch.chdir(tmp_path)
    calls = []
    monkeypatch.setattr(subprocess, "run", lambda call, **_: calls.append(call[2:]) or
                        subprocess.CompletedProcess(call, 0, "done\n", ""))
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "1")
    for task in ("1", "2", "3"):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
        assert grok.main(["--all", "--root", "my runs", "--device", "cpu"]) == 0
    commands = [shlex.split(command) for command in grok.every_run(Path("my runs"))]
    here = {"--root=my runs", "--device=cpu"}
    assert sorted([word for word in call if word not in here] for call in calls) == sorted(commands)
    for call in calls:
        asked = grok.make_parser().parse(call)
        assert (asked["root"], asked["device"], asked["all"]) == (Path("my runs"), "cpu", False)
    assert capsys.readouterr().out.count(": done; about") == len(commands)


@pytest.mark.parametrize("device, free, runs", [("cpu", 0, 6), ("mps", 0, 1), ("cuda", 80, 6),
                                                ("cuda", 9.5, 4), ("cuda", 0.5, 1)])
def test_runs_share_the_cores_and_the_memory_of_a_gpu(device, free, runs, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(free * 2**30), 80 * 2**30))
    assert grok.at_once(device) == runs


def test_torchrun_gives_each_task_of_a_machine_its_gpu(tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(os, "environ", {**os.environ, "RANK": "5", "WORLD_SIZE": "6",
                                        "LOCAL_RANK": "1"})
    monkeypatch.setattr(subprocess, "run", lambda call, env, **_: seen.append(env) or
                        subprocess.CompletedProcess(call, 0, "done\n", "a warning\n"))
    assert grok.main(["--all", "--root", str(tmp_path), "--device", "cpu"]) == 0
    assert len(seen) == len(grok.every_run(tmp_path)[5::6])
    assert {env["CUDA_VISIBLE_DEVICES"] for env in seen} == {"1"}
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize("error, said", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
    (MemoryError(), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False)])
def test_out_of_memory_is_one_line_and_others_are_not_hidden(error, said, monkeypatch, capsys):
    def fail(given):
        raise error
    monkeypatch.setattr(grok, "train_one", fail)
    if said:
        assert grok.main([]) == 2
        assert capsys.readouterr().err == "grok.py: out of memory: lower batch_size or d_model\n"
    else:
        with pytest.raises(RuntimeError):
            grok.main([])


def test_a_run_begun_on_another_kind_of_device_goes_on():
    """Its weights and moments are kept; what its generator drew cannot go on."""
    begun, here = make_trainer(), make_trainer()
    for _ in range(4):
        begun.train_step()
    saved = copy.deepcopy(begun.state_dict())
    saved["draws"] = torch.zeros(16, dtype=torch.uint8)  # as on CUDA
    for group in saved["optimizer"]["param_groups"]:
        group.update(fused=False, capturable=True)
    here.load_state_dict(saved)
    assert all(map(torch.equal, here.model.parameters(), begun.model.parameters()))
    first = make_trainer().generator.get_state()
    assert not torch.equal(here.generator.get_state(), first)
    here.train_step()
    assert here.step == 5 and torch.isfinite(here.loss)
    assert here.optimizer.param_groups[0]["fused"]


def test_bench_compares_the_step_with_its_matrix_products_and_a_plain_loop(monkeypatch, capsys):
    """The ratios printed are those of the medians printed, and all three kinds do work."""
    monkeypatch.setattr(grok, "BENCH_SECONDS", 0)
    assert grok.main(["--bench", "--preset", "smoke", "--device", "cpu"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    rate = {line.split()[2]: float(line.split()[3]) for line in lines}
    ratios = [float(word.split("=")[1]) for word in last.split()]
    assert [word.split("=")[0] for word in last.split()] == ["over_matmul", "over_plain"]
    assert ratios == pytest.approx([rate["matmul"] / rate["ours"], rate["ours"] / rate["plain"]],
                                   rel=0.05)
    assert rate["matmul"] > rate["ours"] > 0


def test_the_matrix_products_of_the_bench_are_those_of_the_step():
    """Counted with PyTorch's own counter: the same operations, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode
    for layout in LENGTH:
        config = Config(**{**PRESETS["smoke"][2], "layout": layout})
        trainer = Trainer(config, *smoke_data(), CPU)
        counts = []
        for work in (trainer.train_step, grok.matrix_products(trainer)):
            with FlopCounterMode(display=False) as counter:
                work()
            counts.append(counter.get_total_flops())
        assert counts[1] == pytest.approx(counts[0], rel=0.05)  # no gradient of the first input


def test_the_paper_preset_fits_in_eight_gigabytes_of_a_gpu_and_two_of_the_host():
    """Peak memory of a fresh process, on the host alone, so that all of it is counted: with the
    data; then with weights, moments and the activations of an eighth, and a quarter, of a batch."""
    pytest.importorskip("resource", reason="Windows cannot say")
    code = """if True:
        import resource, sys, torch, data, grok
        peak = lambda: (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
                        * (1 if sys.platform == "darwin" else 1024))
        _, world, model = grok.PRESETS["paper"]
        made = grok.build_data(data.settings(data.WorldConfig, world), "both_full")
        config, found = data.settings(grok.Config, model), [peak()]
        trainer = grok.Trainer(config, *made, torch.device("cpu"))
        for part in (8, 4):
            trainer.config = grok.replace(config, batch_size=config.batch_size // part)
            trainer.train_step()
            found.append(peak())
        print(*found)"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    with_data, eighth, quarter = map(int, said.stdout.split())
    assert with_data < 2e9
    assert eighth < quarter and eighth + 7 * (quarter - eighth) < 8e9


def test_help_lists_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        grok.main(["--help"])
    assert end.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    for field in (*dataclasses.fields(Config), *dataclasses.fields(WorldConfig)):
        name = "--" + field.name.replace("_", "-")
        assert f"{name} V {field.metadata['about']} ({field.default})" in said
    for name in ("--preset", "--regime", "--device", "--out", *PRESETS, *REGIMES):
        assert name in said


def test_underscore_and_hyphen_spell_the_same_setting():
    parse = grok.make_parser().parse
    for field in (*dataclasses.fields(Config), *dataclasses.fields(WorldConfig)):
        hyphens, value = field.name.replace("_", "-"), str(field.default)
        for spelling in (field.name, hyphens):
            assert parse([f"--{spelling}", value])[field.name] == field.default
            assert parse([f"--{spelling}={value}"])[field.name] == field.default
    assert str(parse(["--out", "my_run-1"])["out"]) == "my_run-1"                # values stay


# ---------------------------------------------------------------- trust: resume

SHORT = ["--preset", "smoke", "--phi", "1", "--device", "cpu", "--steps", "180", "--eval-every",
         "3"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run of SHORT that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    result = run_grok(folder, *SHORT, "--out", "run")
    assert result.returncode == 0, result.stderr
    assert (folder / "run" / "before.pt").exists()  # so that it is among what a kill may harm
    return folder / "run"


def assert_same_run(folder, whole):
    """Metrics but for the times, and weights before and after grokking, equal to the bit."""
    assert metrics(folder) == metrics(whole)
    assert {path.name for path in folder.iterdir()} == {path.name for path in whole.iterdir()}
    for name in ("before.pt", "after.pt"):
        assert (folder / name).exists() == (whole / name).exists()
        if (whole / name).exists():
            one, two = (torch.load(f / name, weights_only=True) for f in (folder, whole))
            assert one["step"] == two["step"] and one["weights"].keys() == two["weights"].keys()
            for key, weight in one["weights"].items():
                assert weight.dtype == two["weights"][key].dtype
                assert torch.equal(weight, two["weights"][key])


# imports once, then makes a process of the command for every line read; says how each one ended
FORKS = """
import os, sys, grok
for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(grok.main(sys.argv[1:]))
    print(pid, flush=True)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]), flush=True)
"""


def lines_in(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
def test_a_run_killed_twenty_times_ends_as_if_it_never_was(whole, tmp_path):
    """Each kill comes zero to two evaluations after the start, plus a random instant."""
    folder, rng, reached = tmp_path / "run", np.random.default_rng(0), []
    command = [sys.executable, "-c", FORKS, *SHORT, "--out", str(folder)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                              cwd=Path(grok.__file__).parent)
    for _ in range(20):
        wanted = lines_in(folder / "metrics.jsonl") + rng.integers(0, 3)
        server.stdin.write("\n")
        server.stdin.flush()
        pid, patience = int(server.stdout.readline()), time.monotonic() + 20
        while lines_in(folder / "metrics.jsonl") < wanted and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.15))
        os.kill(pid, signal.SIGKILL)
        assert int(server.stdout.readline()) == signal.SIGKILL
        reached.append(lines_in(folder / "metrics.jsonl"))
    server.stdin.close()
    server.wait()
    assert len(set(reached)) >= 10 and reached == sorted(reached) and reached[-1] < 60
    assert run_grok(tmp_path, *SHORT, "--out", str(folder)).returncode == 0
    assert_same_run(folder, whole)


class Killed(BaseException):
    """Stands for the end of the process at one exact place."""


TWELVE = [*SHORT, "--steps", "12", "--eval-every", "4"]


@pytest.fixture(scope="module")
def twelve(tmp_path_factory):
    """Folder of a run of TWELVE that nothing interrupted."""
    folder = tmp_path_factory.mktemp("twelve") / "run"
    assert grok.main([*TWELVE, "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("at", range(1, 11))
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_run_stopped_at_any_write_ends_as_if_it_never_was(where, at, twelve, tmp_path,
                                                            monkeypatch):
    """Stopped in the middle of each of the ten files it writes, or just before each is in place."""
    calls, function = [], getattr(os, where)

    def die(*given):
        calls.append(given)
        if len(calls) < at:
            return function(*given)
        if where == "fsync":
            os.ftruncate(given[0], os.fstat(given[0]).st_size // 2)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, where, die)
        with pytest.raises(Killed):
            grok.main([*TWELVE, "--out", str(tmp_path / "run")])
    assert grok.main([*TWELVE, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", twelve)


def test_ctrl_c_saves_and_says_how_to_go_on(whole, tmp_path):
    command = [sys.executable, Path(grok.__file__), *SHORT, "--out", "run"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                           text=True)
    while not run.stdout.readline().startswith("step"):
        pass
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130 and err == ""
    assert out.splitlines()[-1] == "stopped and saved in run; the same command goes on from here"
    assert 0 < lines_in(tmp_path / "run" / "metrics.jsonl") < lines_in(whole / "metrics.jsonl")
    assert run_grok(tmp_path, *SHORT, "--out", "run").returncode == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_full_disk_loses_nothing_and_is_said_in_one_line(twelve, tmp_path, monkeypatch, capsys):
    synced, sync = [], os.fsync

    def full(file):
        synced.append(file)
        if len(synced) > 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        capsys.readouterr()
        assert grok.main([*TWELVE, "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.endswith("cannot be written (No space left on device)\n") and err.count("\n") == 1
    assert not list((tmp_path / "run").glob("*.tmp"))
    assert grok.main([*TWELVE, "--out", str(tmp_path / "run")]) == 0
    assert_same_run(tmp_path / "run", twelve)


def test_a_checkpoint_too_large_for_the_disk_leaves_no_traceback(tmp_path):
    """A limit on the size of files (10 blocks) is how a full disk looks to torch.save."""
    result = subprocess.run(["sh", "-c", 'ulimit -f 10; exec "$@"', "sh", sys.executable,
                             Path(grok.__file__), *SHORT, "--out", "run"], cwd=tmp_path,
                            capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert result.stderr == "grok.py: run/last.pt: cannot be written (File too large)\n"
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    """Also when Ctrl-C comes between the bad loss and the next evaluation."""
    step = Trainer.train_step

    def spoilt(trainer):
        step(trainer)
        if trainer.step == 6:
            trainer.losses[1] = math.nan
            if interrupt:
                os.kill(os.getpid(), signal.SIGINT)

    for interrupt in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", spoilt)
            assert grok.main([*TWELVE, "--out", str(tmp_path / "run")]) == 2
        assert "loss is not finite at step 6" in capsys.readouterr().err
        assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 4
        assert [line["step"] for line in metrics(tmp_path / "run")] == [4]


# ---------------------------------------------------------------- trust: sources

@pytest.fixture
def source(tmp_path, monkeypatch):
    """A folder to work in, with a data set `set` and own facts `facts.tsv`."""
    monkeypatch.chdir(tmp_path)
    write_json(*small_data(), tmp_path / "set")
    lines = [f"p{h}\tr{k}\tp{(3 * h + k * k) % 9}" for h in range(9) for k in range(3 + h % 3)]
    Path("facts.tsv").write_text("\n".join(lines))
    return tmp_path


BRIEF = ["--preset", "smoke", "--device", "cpu", "--steps", "4", "--eval-every", "2"]
SOURCES = {"data": ["--data", "set"],
           "facts": ["--facts", "facts.tsv", "--phi", "1", "--ood-fraction", "0.3"]}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_run_on_a_file_records_it_and_loads_from_it(kind, source):
    assert grok.main([*BRIEF, *SOURCES[kind], "--out", "run"]) == 0
    model, world, splits = grok.load_run("run")
    about = json.loads(Path("run/config.json").read_text())
    assert about["source"]["kind"] == kind and about["source"]["path"] == SOURCES[kind][1]
    assert (about["world"]["n_entities"], about["world"]["n_relations"],
            about["world"]["out_degree"]) == (
        len(world.entity_names), len(world.relation_names), world.relations.shape[1])
    if kind == "data":
        assert_same_data((world, splits), small_data())
        assert (about["world"]["phi"], about["world"]["ood_fraction"]) == pytest.approx(
            (2.5, 0.25), abs=0.01)
    else:
        config = WorldConfig(**about["world"])
        assert world.entity_names[:3] == ("p0", "p1", "p4") and config.phi == 1.0
        check_rules(world, config, "natural", splits)
    assert grok.main([*BRIEF, *SOURCES[kind], "--out", "run"]) == 0  # goes on: nothing to do


@pytest.mark.parametrize("kind, file", [("data", "set/valid.json"), ("facts", "facts.tsv")])
def test_a_source_that_changed_or_went_is_refused(kind, file, source, capsys):
    assert grok.main([*BRIEF, *SOURCES[kind], "--out", "run"]) == 0
    content = Path(file).read_bytes()
    Path(file).write_bytes(content + b"\n")
    with pytest.raises(BadInput, match="has changed since the run began"):
        grok.load_run("run")
    refuses(["grok", *BRIEF, *SOURCES[kind], "--out", "run"], "run: holds a run of other settings "
            "(data)", capsys)
    Path(file).unlink()
    with pytest.raises(BadInput, match="No such file"):
        grok.load_run("run")
    refuses(["grok", *BRIEF, *SOURCES[kind], "--out", "run"], "No such file", capsys)


def test_a_run_on_a_file_lies_in_a_folder_named_after_it(source):
    for options in SOURCES.values():
        assert grok.main([*BRIEF, *options]) == 0
    assert {path.parent.parent.name for path in Path("runs").rglob("config.json")} == {
        "natural,data=set,steps=4,eval_every=2",
        "natural,facts=facts,ood_fraction=0.3,phi=1.0,steps=4,eval_every=2"}



# ---------------------------------------------------------------- trust: bad input

def tree(folder):
    """Every path below a folder with its content."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def refuses(command, said, capsys):
    """The command says one line that holds `said`, exits with status 2, and writes nothing."""
    capsys.readouterr()
    before = tree(Path.cwd())
    assert {"grok": grok, "data": data}[command[0]].main(command[1:]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"{command[0]}.py: ") and err.count("\n") == 1 and err.endswith("\n")
    assert said in err and "Traceback" not in err
    assert tree(Path.cwd()) == before


@pytest.mark.parametrize("command, said", [
    ("grok --preset huge", "preset = huge: must be one of tiny, bidirectional, tune"),
    ("grok --regime third_full", "regime = third_full: must be one of natural, both_full"),
    ("grok --device tpu", "device = tpu: must be auto or one that is here"),
    ("grok --out_degree 41", "out_degree = 41: must lie in [1, n_relations = 40]"),
    ("grok --ood-fraction 1.5", "ood_fraction = 1.5: must lie in [0.0, 1.0]"),
    ("grok --ood-fraction -0.1", "ood_fraction = -0.1: must lie in [0.0, 1.0]"),
    ("grok --ood-fraction 0", "0 OOD ones"),
    ("grok --ood-fraction 1", "this world has 0 ID ones"),
    ("grok --phi 10000", "phi = 10000"), ("grok --phi 0", "phi = 0"),
    ("grok --n-entities 1", "n_entities = 1: must lie in [2,"),
    ("grok --n-entities 1000000 --n-relations 100000", "n_entities = 1000000"),
    ("grok --n-relations 0", "n_relations = 0: must lie in [1,"),
    ("grok --data-seed -1", "data_seed = -1"), ("grok --seed -1", "seed = -1"),
    ("grok --seed 99999999999999999999", "seed = 99999999999999999999: must lie in [0, "),
    ("grok --layout sideways", "layout = sideways: must be one of causal, bidirectional"),
    ("grok --shared maybe", "must be true or false"),
    ("grok --without residual", "without = residual: must be one of "),
    ("grok --new-facts -1", "new_facts = -1: must lie in [0, "), ("grok --new-k -1", "new_k = -1"),
    ("grok --kept 1.5", "kept = 1.5: must lie in [0.0, 1.0]"),
    ("grok --new-facts 481", "new_facts = 481: must lie in [0, 480]"),
    ("grok --new-facts 480 --kept 0", "new_facts = 480, kept = 0: too few"),
    ("grok --all --steps 5", "steps = 5: --all takes --root and --device alone"),
    ("grok --all --preset smoke", "preset = smoke: --all takes --root and --device alone"),
    ("grok --facts facts.tsv --new-facts 3", "new_facts = 3: needs a world made here"),
    ("grok --start nowhere", "nowhere/metrics.jsonl: No such file or directory"),
    ("grok --start facts.tsv", "facts.tsv/metrics.jsonl: Not a directory"),
    ("grok --d-model 0", "d_model = 0"), ("grok --d-model 97", "n_heads = "),
    ("grok --n-heads 5 --d-model 96", "n_heads = 5: twice it must divide d_model = 96"),
    ("grok --n-loops 0", "n_loops = 0"), ("grok --min-loops 0", "min_loops = 0"),
    ("grok --logit-scale 0", "logit_scale = 0.0"),
    ("grok --lr nan", "lr = nan: must lie in [0.0, 10.0]"), ("grok --lr inf", "lr = inf"),
    ("grok --lr -0.001", "lr = -0.001"), ("grok --weight-decay -1", "weight_decay = -1.0"),
    ("grok --batch-size 0", "batch_size = 0"), ("grok --steps 0", "steps = 0"),
    ("grok --steps 1e3", "--steps: invalid int value: '1e3'"), ("grok --steps", "--steps"),
    ("grok --warmup -1", "warmup = -1"), ("grok --ema 2", "ema = 2.0"),
    ("grok --atomic-share 1.1", "atomic_share = 1.1"), ("grok --eval-every 0", "eval_every = 0"),
    ("grok --sed 1", "unrecognized arguments: --sed 1"), ("grok tiny", "unrecognized arguments"),
    ("grok --preset smoke --out facts.tsv", "facts.tsv"),
    ("grok --preset smoke --out facts.tsv/run", "facts.tsv/run"),
    ("grok --preset smoke --out /proc/run", "/proc/run"),
    ("grok --data nowhere", "No such file or directory: 'nowhere'"),
    ("grok --data facts.tsv", "facts.tsv"), ("grok --facts set", "set"),
    ("grok --facts nowhere.tsv", "No such file or directory: 'nowhere.tsv'"),
    ("grok --data set --facts facts.tsv", "data = set: brings its own facts"),
    ("grok --data set --regime both_full", "data = set: brings its own facts and regime"),
    ("grok --data set --n-entities 16", "n_entities = 16: must be 15, as in set"),
    ("grok --data set --phi 3", "phi = 3.0: must be 2.5"),
    ("grok --facts facts.tsv --phi 1 --ood-fraction 0.3 --out-degree 2",
     "out_degree = 2: must be 5, as in facts.tsv"),
    ("grok --facts facts.tsv --phi 1000", "too few compositions"),
    ("grok --all --facts facts.tsv", "facts = facts.tsv: --all takes --root"),
    ("grok --facts bad.tsv", "bad.tsv, line 1: needs head, relation and tail"),
    ("data", "--export"), ("data --export set", "set: cannot be written (File exists)"),
    ("data --export facts.tsv/set", "facts.tsv/set: cannot be written (Not a directory)"),
    ("data --export new --regime none", "regime = none: must be one of"),
    ("data --export new --out-degree 41", "out_degree = 41"),
    ("data --export new --phi 500", "too few compositions"),
    ("data --export new --steps 5", "unrecognized arguments: --steps 5"),
    ("data --export new --new-facts 3", "new_facts = 3: must be 0 here"),
])
def test_what_cannot_be_used_is_said_in_one_line_and_nothing_is_written(command, said, source,
                                                                        capsys):
    Path("bad.tsv").write_text("no tabs here\n")
    refuses(command.split(), said, capsys)


@pytest.mark.parametrize("options", [["--lr", "nan"], ["--out", "grok.py/x\ny"]])
def test_the_command_itself_exits_with_status_2(options, tmp_path):
    (tmp_path / "grok.py").write_text("")
    result = run_grok(tmp_path, "--preset", "smoke", *options)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("grok.py: ") and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["grok.py"]


class Stranger:
    """Runs a shell command in whoever unpickles it."""

    def __reduce__(self):
        return os.system, ("echo > stranger-was-here",)


def edit_config(**changes):
    """A change of config.json: `world__phi=1` sets about["world"]["phi"]; None removes."""
    def change(run):
        about = json.loads((run / "config.json").read_text())
        for name, value in changes.items():
            *parts, last = name.split("__")
            place = functools.reduce(dict.__getitem__, parts, about)
            place.pop(last, None)
            place.update({} if value is None else {last: value})
        (run / "config.json").write_text(json.dumps(about))
    return change


def replace(name, content):
    return lambda run: (run / name).write_bytes(content)


def truncate(name, share):
    def change(run):
        content = (run / name).read_bytes()
        (run / name).write_bytes(content[:int(share * len(content))])
    return change


def exchange(name, **changes):
    """A checkpoint with some entries changed, otherwise sound."""
    def change(run):
        saved = torch.load(run / name, weights_only=True)
        torch.save({**saved, **changes}, run / name)
    return change


DAMAGE = {
    "empty config": replace("config.json", b""), "config half": truncate("config.json", 0.5),
    "config not text": replace("config.json", b"\xff\x00"),
    "config a list": replace("config.json", b"[1]"), "config nested": replace(
        "config.json", b"[" * 10**5), "config foreign": replace("config.json", b'{"a": {}}'),
    "unknown setting": edit_config(model__dropout=0.1),
    "setting gone": edit_config(model__logit_scale=None), "flag for a number": edit_config(
        model__min_loops=True),
    "world a list": edit_config(world=[1]), "text for a number": edit_config(model__lr="high"),
    "number for a flag": edit_config(model__shared=1), "null": edit_config(world__n_entities=[]),
    "out of range": edit_config(model__n_loops=0), "regime a list": edit_config(regime=["natural"]),
    "source a number": edit_config(source=3), "source foreign": edit_config(source={"kind": "x"}),
}
OTHER_RUNS = {
    "other seed": edit_config(model__seed=1), "other world": edit_config(world__data_seed=1),
    "other regime": edit_config(regime="both_full"),
    "other start": edit_config(start={"path": "other", "sha256": "0" * 64}),
    "start foreign": edit_config(start=3), "other new facts": edit_config(world__new_facts=9),
    "an ingredient left out": edit_config(model__without="restart"),
}


@pytest.mark.parametrize("lines", [True, False])
@pytest.mark.parametrize("change", [*DAMAGE.values(), *OTHER_RUNS.values()],
                         ids=[*DAMAGE, *OTHER_RUNS])
def test_a_run_folder_with_another_config_is_left_alone(change, lines, finished, capsys):
    """With metrics.jsonl and, as after a kill, without."""
    change(Path("run"))
    if not lines:
        Path("run/metrics.jsonl").unlink()
    refuses(["grok", *BRIEF, "--out", "run"], "run", capsys)


CHECKPOINTS = {
    "empty": replace("last.pt", b""), "half": truncate("last.pt", 0.5),
    "but for the end": truncate("last.pt", 0.99), "noise": replace("last.pt", os.urandom(10**5)),
    "weights only": lambda run: (run / "last.pt").write_bytes((run / "after.pt").read_bytes()),
    "a list": lambda run: torch.save([1, 2], run / "last.pt"),
    "a stranger's": lambda run: torch.save({"step": Stranger()}, run / "last.pt"),
    "a plain pickle": lambda run: (run / "last.pt").write_bytes(pickle.dumps(Stranger())),
    "history foreign": exchange("last.pt", history=[3]), "draws foreign": exchange(
        "last.pt", draws=torch.zeros(3)), "model foreign": exchange("last.pt", model={}),
    "optimizer foreign": exchange("last.pt", optimizer=None),
    "another seed's": lambda run: (grok.main([*BRIEF, "--seed", "1", "--out", "other"]),
                                   (run / "last.pt").write_bytes(
                                       Path("other/last.pt").read_bytes())),
    "another world's": lambda run: (grok.main([*BRIEF, "--data-seed", "1", "--out", "other"]),
                                    (run / "last.pt").write_bytes(
                                        Path("other/last.pt").read_bytes())),
}


@pytest.fixture(scope="module")
def brief_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("brief")
    assert grok.main([*BRIEF, "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def finished(brief_run, tmp_path, monkeypatch):
    """A folder to work in that holds a finished run, `run`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(brief_run, "run")
    return tmp_path


@pytest.mark.parametrize("change", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_damaged_or_foreign_checkpoint_is_refused(change, finished, capsys, recwarn):
    change(Path("run"))
    recwarn.clear()
    refuses(["grok", *BRIEF, "--out", "run"], "run/last.pt", capsys)
    assert not recwarn.list  # on the command line a warning would be more lines
    assert not Path("stranger-was-here").exists()


def test_a_pickled_command_does_run_where_it_is_allowed_to(finished):
    """So that the test above means something."""
    torch.save({"step": Stranger()}, "bad.pt")
    torch.load("bad.pt", weights_only=False)
    assert Path("stranger-was-here").exists()


@pytest.mark.parametrize("change", [
    *DAMAGE.values(), truncate("after.pt", 0.7), replace("after.pt", b""),
    replace("metrics.jsonl", b""), replace("metrics.jsonl", b"{}\n"),
    replace("metrics.jsonl", b"3\n"), truncate("metrics.jsonl", 0.9),
    exchange("after.pt", weights=[1]), exchange(
        "after.pt", weights={}), exchange("after.pt", weights={"embedding": 1}),
    lambda run: torch.save({"weights": Stranger()}, run / "after.pt"),
    lambda run: torch.save([1], run / "after.pt"), lambda run: (run / "after.pt").unlink(),
    lambda run: shutil.rmtree(run)])
def test_load_run_refuses_what_does_not_fit(change, finished):
    change(Path("run"))
    with pytest.raises(BadInput) as error:
        grok.load_run("run")
    assert "run" in str(error.value) and "\n" not in str(error.value)
    assert not Path("stranger-was-here").exists()


def test_metrics_lost_beside_a_checkpoint_come_back(finished):
    lost = Path("run/metrics.jsonl").read_bytes()
    Path("run/metrics.jsonl").unlink()
    assert grok.main([*BRIEF, "--out", "run"]) == 0
    assert Path("run/metrics.jsonl").read_bytes() == lost


# ---------------------------------------------------------------- trust: starting from a run

NEW = ["--new-facts", "20", "--kept", "0.5"]
TUNED = [*BRIEF, *NEW, "--start", "run", "--out", "tuned"]
weights_in = lambda path: torch.load(path, weights_only=True)["weights"]


def test_a_run_starts_from_the_weights_another_ended_with(finished):
    """With step size 0 it ends with them; its first line is what they know of the new world."""
    assert grok.main([*TUNED, "--lr", "0"]) == 0
    start, end = weights_in("run/after.pt"), weights_in("tuned/after.pt")
    assert start.keys() == end.keys() and all(torch.equal(start[name], end[name]) for name in start)
    about, (first, last) = grok.read_run("tuned")
    assert about["start"] == {"path": "run", "sha256": hashlib.sha256(
        Path("run/after.pt").read_bytes()).hexdigest()}
    world, splits = build_data(settings(WorldConfig, about["world"]), "natural")
    assert triples(world) == triples(grok.load_run("tuned")[1])
    exams = make_exams(splits, world, about["model"]["layout"], CPU)
    found = evaluate(grok.load_run("run")[0], exams)
    assert set(found["accuracy"]) == {*SPLITS, "old_atomic"}
    assert found["accuracy"] == first["accuracy"] == last["accuracy"]


def test_what_starts_from_a_run_is_trained_further(finished):
    assert grok.main(TUNED) == 0
    start, end = weights_in("run/after.pt"), weights_in("tuned/after.pt")
    assert not any(torch.equal(start[name], end[name]) for name in start)


def test_a_run_that_started_from_another_resumes_where_it_stopped(finished, monkeypatch):
    """Stopped before its last checkpoint: config, last.pt and metrics are there by then."""
    assert grok.main(TUNED) == 0
    os.rename("tuned", "whole")
    written, write = [], grok.write_text

    def stop(path, text):
        if len(written) == 3:
            raise Killed
        written.append(path.name)
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(grok, "write_text", stop)
        with pytest.raises(Killed):
            grok.main(TUNED)
    assert written == ["config.json", "last.pt", "metrics.jsonl"]
    assert grok.main(TUNED) == 0
    assert_same_run(Path("tuned"), Path("whole"))


@pytest.mark.parametrize("change", [
    lambda run: (run / "after.pt").unlink(),
    replace("after.pt", b""), replace("after.pt", os.urandom(10**4)), truncate("after.pt", 0.5),
    truncate("after.pt", 0.99), exchange("after.pt", weights={}), exchange("after.pt", weights=[1]),
    lambda run: torch.save([1], run / "after.pt"),
    lambda run: torch.save({"weights": Stranger()}, run / "after.pt")],
    ids=["no file", "empty", "noise", "half", "but for the end", "no weights", "a list",
         "all a list", "a stranger's"])
def test_a_start_without_good_weights_is_refused_and_nothing_written(change, finished, capsys):
    change(Path("run"))
    refuses(["grok", *TUNED], "run/after.pt", capsys)


@pytest.mark.parametrize("options, said", [
    (["--d-model", "16"], "d_model = 32: must be 16, as in the run to start from"),
    (["--n-entities", "13"], "n_entities = 12: must be 13, as in the run to start from"),
    (["--data-seed", "1"], "data_seed = 0: must be 1, as in the run to start from"),
    (["--layout", "bidirectional"], "layout = causal: must be bidirectional, as in the run"),
    (["--shared=false"], "shared = True: must be False, as in the run to start from")])
def test_a_start_of_another_kind_is_refused_and_nothing_written(options, said, finished, capsys):
    shutil.rmtree("run")
    assert grok.main([*BRIEF, *options, "--out", "run"]) == 0
    refuses(["grok", *TUNED], said, capsys)


def test_a_folder_begun_from_another_start_is_left_alone(finished, capsys):
    shutil.copytree("run", "other")
    exchange("after.pt", step=5)(Path("other"))
    assert grok.main(TUNED) == 0
    for start in (["--start", "other"], []):
        refuses(["grok", *BRIEF, *NEW, *start, "--out", "tuned"],
                "tuned: holds a run of other settings (start)", capsys)
    os.rename("run", "moved")                                                    # the same weights
    assert grok.main([*BRIEF, *NEW, "--start", "moved", "--out", "tuned"]) == 0


def test_the_folder_of_a_run_is_named_after_its_start_and_settings(finished):
    given = grok.make_parser().parse([*BRIEF, "--new-facts=20", "--start=run", "--lr=0.5"])
    assert grok.default_folder(given, grok.describe(given, CPU)) == Path(
        f"runs/smoke/natural,start={finished.name},new_facts=20,lr=0.5,steps=4,"
        "eval_every=2/seed0")


# ---------------------------------------------------------------- trust: seeds

def test_seeds_of_data_and_of_initialisation_are_apart():
    given = lambda *options: grok.describe(grok.make_parser().parse([*BRIEF, *options]), CPU)
    plain, data_seed, seed = given(), given("--data-seed", "1"), given("--seed", "1")
    assert seed["world"] == plain["world"] and data_seed["model"] == plain["model"]
    start = lambda about: Trainer(settings(Config, about["model"]), *build_data(
        settings(WorldConfig, about["world"]), "natural"), CPU)
    weights = lambda about: start(about).model.embedding
    assert torch.equal(weights(plain), weights(data_seed))
    assert not torch.equal(weights(plain), weights(seed))


# ---------------------------------------------------------------- lens and patching, known circuit

class TwoHopTable(torch.nn.Module):
    """A model built by hand: exact lookup of the bridge at r1 in loop 1, of the tail in loop 2.

    States are one-hot token vectors; loop 3 changes nothing. So bridge and answer each sit at one
    known site from a known loop on, and every map of lens and patching is known in advance.
    """

    def __init__(self, world, layout):
        super().__init__()
        size = world.n_entities + world.n_relations + 1
        self.world, self.embedding = world, torch.eye(size)
        self.config = grok.Config(d_model=size, n_loops=3, layout=layout)

    def forward(self, tokens, n_loops=None, edit=None):
        state = self.embedding[tokens]
        for loop in range(n_loops or 3):
            state = state.clone()
            if loop < 2:  # the bridge goes to r1, the tail to the last token
                entity = tokens[:, 0] if loop == 0 else state[:, 1].argmax(-1)
                relation = tokens[:, 1 + loop] - self.world.n_entities
                state[:, 1 if loop == 0 else -1] = self.embedding[self.tail(entity, relation)]
            state = edit(loop, state) if edit else state
        return self.unembed(state[:, -1])

    def tail(self, entity, relation):
        fact = self.world.find(entity.numpy(), relation.numpy())
        # where there is no such fact: the blank, which is nobody's answer
        tail = np.where(fact >= 0, self.world.tails.ravel()[fact], len(self.embedding) - 1)
        return torch.from_numpy(tail)

    def vectors(self):
        return self.embedding

    def unembed(self, state):
        return state @ self.embedding.T


@pytest.fixture(scope="module", params=LENGTH)
def table(request):
    """The hand-built model, its world and OOD queries whose h, b and t are three entities."""
    config = data.WorldConfig(n_entities=30, n_relations=20, out_degree=12, phi=2.0)
    world = data.make_world(config)
    asked = data.make_splits(world, config)["test_id"]
    apart = (asked.h != asked.b) & (asked.b != asked.t) & (asked.h != asked.t)
    return TwoHopTable(world, request.param), world, asked.take(apart)


BRIDGE_READ, ANSWER = (0, 1), [(1, -1), (2, -1)]


def assert_sites(found, ones, but=0):
    """A map (3 loops, 3 or 4 positions) is 1 at the given sites and 0 elsewhere, or the reverse."""
    expected = np.full(np.shape(found), float(but))
    for site in ones:
        expected[site] = 1 - but
    assert np.array_equal(found, expected)


def test_lens_finds_the_known_circuit(table):
    model, world, asked = table
    found = analyze.lens(model, world, asked)
    assert np.shape(found["bridge"]["map"]) == (3, {"causal": 3}.get(model.config.layout, 4))
    assert_sites(found["bridge"]["map"], [(0, 1), (1, 1), (2, 1)])
    assert_sites(found["target"]["map"], ANSWER)
    assert found["bridge"]["any"] == found["bridge"]["best"] == 1
    assert found["bridge"]["best_site"][1] == 1
    # the chance level counts another query's bridge, which can be this one's by accident only
    shared = (asked.b == np.roll(asked.b, 1)).mean()
    assert found["bridge_chance"]["map"][0][1] == pytest.approx(shared)


@pytest.mark.parametrize("kind, redirected, changed", [
    ("self", [], []),
    ("swap", [BRIDGE_READ, *ANSWER], []),
    ("swap_other_r2", [BRIDGE_READ], ANSWER),
    ("same_bridge", ANSWER, []),
    ("restore", [BRIDGE_READ, *ANSWER], []),
])
def test_patching_finds_the_known_circuit(table, kind, redirected, changed):
    """The bridge is read from (loop 1, r1) alone; the answer's site gives the donor's own answer."""
    found = analyze.causal(*table)[kind]
    assert found["n"] > 300
    assert_sites(found["redirected"], redirected)
    assert_sites(found["changed"], changed)
    assert_sites(found["unchanged"], [*redirected, *changed], but=1)


def test_visible_part_is_all_the_bridge_and_none_of_the_answer(table):
    found = np.asarray(analyze.causal(*table)["swap_visible"]["redirected"])
    assert found[BRIDGE_READ] == 1
    assert found[1, -1] < 0.02  # by accident only: two queries whose b and t are each other's


def test_noise_breaks_but_does_not_redirect(table):
    found = analyze.causal(*table)["noise"]
    assert found["redirected"][0][1] < 0.15 and found["unchanged"][0][1] < 0.15


def test_donors_obey_their_rules(table):
    model, world, asked = table
    rng = np.random.default_rng(0)
    clean, donor, predicted = analyze.swap(model, world, asked, asked, rng)
    assert (clean.r2 == donor.r2).all() and (clean.b != donor.b).all()
    assert (clean.t != donor.t).all() and (predicted == donor.t).all()
    clean, donor, predicted = analyze.same_bridge(model, world, asked, asked, rng)
    assert (clean.b == donor.b).all() and (clean.r2 != donor.r2).all()
    clean, donor, predicted = analyze.swap_other_r2(model, world, asked, asked, rng)
    tails = {(h, r): t for h, r, _, _, t in zip(*data.queries(world, world.facts))}
    walk = [tails[b, r2] for b, r2 in zip(donor.b, clean.r2)]
    assert (predicted == walk).all() and (predicted != donor.t).all()


def test_probe_reads_the_bridge_where_the_known_circuit_carries_it(table):
    """Everywhere at r1, in every loop; hardly from the head, which goes to many bridges."""
    model, world, asked = table
    found = np.array(analyze.probe(model, world, asked.take(slice(0, None, 2)),
                                   asked.take(slice(1, None, 2))))
    assert found.shape == (3, LENGTH[model.config.layout])
    assert np.all(found[:, 1] == 1) and np.all(found[:, 0] < 0.5)


def test_probe_is_ridge_regression(small):
    """NumPy's least squares on the states, with the ridge as extra rows, says the same."""
    model, world, asked = small
    half = len(asked.h) // 2
    known, other = asked.take(slice(half)), asked.take(slice(half, 2 * half))
    x, y = (np.stack([state.numpy() for state in run_states(model, to_tokens(
        part, world, model.config.layout)[0])]) for part in (known, other))
    found = np.zeros((len(x), x.shape[2]))
    for loop, position in np.ndindex(*found.shape):
        with_one = lambda states: np.append(states[loop, :, position], np.ones((half, 1)), 1)
        rows = np.append(with_one(x), np.eye(x.shape[-1] + 1), axis=0)
        wanted = np.append(np.eye(world.n_entities)[known.b],
                           np.zeros((x.shape[-1] + 1, world.n_entities)), axis=0)
        weights = np.linalg.lstsq(rows, wanted, rcond=None)[0]
        found[loop, position] = np.mean((with_one(y) @ weights).argmax(1) == other.b)
    assert np.allclose(analyze.probe(model, world, known, other), found, atol=1.5 / half)


def test_the_causal_path_is_that_of_the_known_circuit(table):
    """The bridge at r1 after loop 1, then the answer; a site that moves nothing is left out."""
    model, world, asked = table
    maps = analyze.causal(model, world, asked)
    last = LENGTH[model.config.layout] - 1
    assert analyze.causal_path(maps) == [((0, 1), "b", 1.0), ((1, last), "t", 1.0)]
    assert analyze.strongest(maps["swap_other_r2"]["redirected"]) == (1.0, BRIDGE_READ)
    maps["swap"]["redirected"][1][last] = 0.1
    assert [site for site, *_ in analyze.causal_path(maps)] == [(0, 1)]


def test_without_a_right_answer_there_is_nothing_to_patch(table):
    """n = 0 and the widest interval, not a crash, where the model answers nothing rightly."""
    model, world, asked = table
    wrong = asked._replace(t=(asked.t + 1) % world.n_entities)
    assert analyze.causal(model, world, wrong)["swap"]["n"] == 0
    assert analyze.wilson(0, 0) == (0, 1)


# ---------------------------------------------------------------- lens and patching, real model

@pytest.fixture(scope="module", params=LENGTH)
def small(request):
    """An untrained model of the smoke preset, its world and some of its ID test compositions."""
    _, world, model = grok.PRESETS["smoke"]
    world, splits = grok.build_data(data.WorldConfig(**world), "natural")
    torch.manual_seed(0)
    config = grok.Config(**{**model, "layout": request.param})
    model = grok.LoopedTransformer(config, world.n_entities, world.n_relations)
    return model.requires_grad_(False), world, splits["test_id"]


def test_lens_of_the_last_loop_is_the_output(small):
    model, world, asked = small
    tokens, _ = grok.to_tokens(asked, world, model.config.layout)
    assert torch.equal(analyze.logit_lens(model, tokens)[-1, :, -1],
                       analyze.predict(model, tokens))


def test_patching_the_last_answer_state_gives_the_donors_logits_bit_for_bit(small):
    model, world, asked = small
    tokens, _ = grok.to_tokens(asked, world, model.config.layout)
    donor, site = tokens.roll(1, 0), (model.config.n_loops - 1, tokens.shape[1] - 1)
    state = grok.run_states(model, donor)[site[0], :, site[1]]
    assert torch.equal(analyze.patch(model, tokens, site, state), model(donor))


def test_a_query_patched_with_itself_keeps_its_logits_bit_for_bit(small):
    model, world, asked = small
    tokens, _ = grok.to_tokens(asked, world, model.config.layout)
    states = grok.run_states(model, tokens)
    for loop in range(model.config.n_loops):
        for position in range(tokens.shape[1]):
            patched = analyze.patch(model, tokens, (loop, position), states[loop, :, position])
            assert torch.equal(patched, model(tokens))


def test_patching_in_batches_equals_one_query_at_a_time(small, monkeypatch):
    model, world, asked = small
    tokens, answers = grok.to_tokens(asked.take(slice(20)), world, model.config.layout)
    donor = tokens.flip(0)
    batched = analyze.patch_map(model, tokens, donor, answers, answers.flip(0))
    monkeypatch.setattr(analyze, "BATCH", 1)
    assert analyze.patch_map(model, tokens, donor, answers, answers.flip(0)) == batched


def test_best_site_is_chosen_and_scored_on_different_queries():
    """Half the queries are hit at one site, the other half at another: the choice scores 0."""
    top = torch.zeros(1, 10, 2, dtype=torch.long)
    top[0, ::2, 0] = top[0, 1::2, 1] = 7
    rates = analyze.lens_rates(top, torch.full((10,), 7))
    assert rates["any"] == 1 and rates["best"] == 0 and rates["best_site"] == [0, 0]


def test_wilson_interval():
    """From the formula: n / (n + z^2) is the lower end of n of n."""
    assert analyze.wilson(16, 16) == (pytest.approx(0.806, abs=0.001), 1.0)
    assert analyze.wilson(0, 18) == (0.0, pytest.approx(0.176, abs=0.001))


def test_alikeness_of_maps():
    a = np.eye(4)
    assert analyze.alike(a, a) == 1 and analyze.alike(a, 1 - a) == 0
    assert analyze.alike(a, a / 2) == pytest.approx(0.5)
    assert 0 < analyze.alike_shuffled(a, a) < 0.5


# ---------------------------------------------------------------- other devices

@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_compute_and_train_like_the_cpu(device):
    """Same logits as on the CPU; a run saved there goes on as if it had not stopped."""
    try:
        grok.pick_device(device)
    except BadInput as reason:
        pytest.skip(str(reason))
    _, world, model = PRESETS["smoke"]
    config = settings(Config, {**model, "ema": 0.5})  # at its limit from step 10 on
    world, splits = build_data(settings(WorldConfig, world), "natural")
    here, there = (Trainer(config, world, splits, torch.device(d)) for d in ("cpu", device))
    there.model.load_state_dict(here.model.state_dict())
    tokens, _ = to_tokens(splits["test_id"], world, config.layout)
    assert torch.allclose(there.model(tokens.to(device)).cpu(), here.model(tokens), atol=1e-4)
    for _ in range(50):  # on CUDA the last of them replay a graph
        there.train_step()
    assert (there.replay is not None) == (device == "cuda")
    first = there.measure()["loss"]
    other = Trainer(config, world, splits, torch.device(device))
    other.load_state_dict(there.state_dict())
    for _ in range(50):
        there.train_step()
        other.train_step()
    assert there.measure()["loss"] == pytest.approx(other.measure()["loss"], rel=1e-3)
    assert there.history[-1]["loss"] < first


# ---------------------------------------------------------------- what is shipped

ROOT = Path(__file__).parent
SHIPPED = sorted(path.parent for path in (ROOT / "runs" / "shipped").rglob("config.json"))
WEIGHTS = [folder for folder in SHIPPED if (folder / "after.pt").exists()]


@pytest.mark.parametrize("folder", WEIGHTS, ids=lambda f: "/".join(f.parts[-3:]))
def test_shipped_weights_have_the_accuracy_of_their_metrics(folder):
    """Before and after grokking; another machine may round one query of a split apart."""
    _, history = grok.read_run(folder)
    for file in sorted(folder.glob("[ab]*.pt")):
        model, world, splits = grok.load_run(folder, file.stem)
        step = torch.load(file, weights_only=True)["step"]
        measured = next(line["accuracy"] for line in history if line["step"] == step)
        exams = grok.make_exams(splits, world, model.config.layout, CPU)
        for split, right in grok.evaluate(model, exams)["accuracy"].items():
            assert right == pytest.approx(measured[split], abs=1 / len(exams[split][0]) + 1e-6)


def test_weights_are_halved_only_where_that_changes_no_accuracy(tmp_path):
    trainer = Trainer(settings(Config, PRESETS["smoke"][2]), *smoke_data(), CPU)
    trainer.measure()
    for change, kind in ((0.0, torch.float16), (0.01, torch.float32)):
        trainer.history[-1]["accuracy"]["test_ood"] += change
        grok.save_weights(trainer, tmp_path / "some.pt")
        saved = torch.load(tmp_path / "some.pt", weights_only=True)["weights"]
        assert {weight.dtype for weight in saved.values()} == {kind}


def test_the_default_run_starts_as_shipped(tmp_path):
    """Its first evaluation, trained again: the same but for the arithmetic of another machine."""
    about, history = grok.read_run(ROOT / "runs/shipped/tiny/natural/seed0")
    world, splits = build_data(settings(WorldConfig, about["world"]), about["regime"])
    trainer = Trainer(settings(Config, about["model"]), world, splits, CPU)
    for _ in range(history[0]["step"]):
        trainer.train_step()
    line = trainer.measure()
    assert line["loss"] == pytest.approx(history[0]["loss"], rel=0.02)
    for split, right in line["accuracy"].items():
        assert right == pytest.approx(history[0]["accuracy"][split], abs=0.05)


def test_the_default_settings_are_those_of_the_shipped_runs():
    about, _ = grok.read_run(ROOT / "runs/shipped/tiny/natural/seed0")
    assert about["model"] == dataclasses.asdict(Config())
    assert about["world"] == dataclasses.asdict(WorldConfig())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_tiny_preset_groks(seed):
    """Training compositions fitted first, the OOD answer clearly later; enough OOD compositions."""
    about, history = grok.read_run(ROOT / f"runs/shipped/tiny/natural/seed{seed}")
    assert about["model"] == dataclasses.asdict(Config(seed=seed))
    first = lambda split, share: next(line["step"] for line in history
                                      if line["accuracy"][split] >= share)
    assert first("test_ood", 0.95) >= 3 * first("train_inferred", 0.99)
    _, splits = build_data(settings(WorldConfig, about["world"]), "natural")
    assert len(splits["test_ood"].h) >= 300


def test_the_tables_of_the_readme_are_made_from_the_shipped_runs():
    readme = (ROOT / "README.md").read_text()
    for line in analyze.tables(SHIPPED):
        assert line in readme
    assert (ROOT / "runs/shipped/bench.txt").read_text() in readme


def test_groups_of_runs_are_in_the_order_of_the_readme_and_hold_every_seed():
    groups = analyze.read_groups(SHIPPED)
    assert list(groups)[0] == "tiny/natural" and list(groups)[-1].startswith("growth")
    for name, seeds in groups.items():
        many = 1 if re.search("=([25]00|[12]000),|growth/natural,d_model", name) else 3
        assert [run.about["model"]["seed"] for run in seeds] == [0, 1, 2][:many]
    looked_into, less, tuned, larger = analyze.parts_of(groups)
    assert set(looked_into) | set(less) | set(tuned) | set(larger) == set(groups) | {
        "tiny/natural until step 3000"}
    assert all(name.startswith("tune/") for name in tuned)
    assert [run.history[-1]["step"] for run in less["tiny/natural until step 3000"]] == [3000] * 3


def test_the_table_of_new_facts_is_of_the_last_evaluation():
    """Means, sizes and Wilson intervals of one group, worked out from its metrics by hand."""
    name = "tune/natural"
    seeds = analyze.read_groups(SHIPPED)[name]
    head, row = analyze.tuned_table({name: seeds})
    right = [run.history[-1]["accuracy"]["test_ood_id"] for run in seeds]
    mean, (low, high) = np.mean(right), analyze.wilson(np.mean(right) * 500, 500)
    assert row[:4] == ["scratch", "0.21", 0, "500, 500, 500"]
    assert row[4] == (f"{mean:.2f} [{low:.2f}, {high:.2f}] ({min(right):.2f} to {max(right):.2f})")
    assert analyze.exact(seeds, "test_ood_id") == (pytest.approx(mean), 500)


def test_the_table_of_larger_worlds_is_that_of_its_runs():
    """One group, worked out from its files by hand."""
    name = "growth/natural"
    seeds = analyze.read_groups(SHIPPED)[name]
    head, row = analyze.growth_table({name: seeds})
    cell = dict(zip(head, row))
    assert [cell[key] for key in ("entities", "regime", "D", "facts", "seeds", "steps")] == [
        100, "natural", 192, 2800, 3, 4000]
    assert cell["parameters"] == 12 * 192**2 + 141 * 192
    steps = [next(m["step"] for m in run.history if m["accuracy"]["train_inferred"] >= 0.99)
             for run in seeds]
    assert cell["train >= .99"] == f"{sum(steps) / 3:.0f} ({min(steps)} to {max(steps)})"
    ms = [run.history[-1]["seconds"] / 4 for run in seeds]
    assert cell["ms a step"] == f"{sum(ms) / 3:.0f} ({min(ms):.0f} to {max(ms):.0f})"


def test_every_figure_is_drawn_from_the_shipped_runs(tmp_path):
    looked_into, _, tuned, _ = analyze.parts_of(analyze.read_groups(SHIPPED))
    draw = {analyze.plot_regimes: looked_into, analyze.plot_bridges: looked_into,
            analyze.plot_tuned: tuned}
    for i, figure in enumerate(plot(groups) for plot, groups in draw.items()):
        grok.save_figure(figure, tmp_path / f"{i}.png")
        pixels = matplotlib.image.imread(tmp_path / f"{i}.png")
        assert 0.01 < np.mean(pixels[..., :3].min(-1) < 0.9) < 0.9
        assert all(axes.get_ylabel() or axes.get_shared_y_axes() for axes in figure.axes)


def test_nothing_but_numpy_torch_and_matplotlib_is_imported_at_run_time():
    allowed = {"numpy", "torch", "matplotlib", "data", "grok", *sys.stdlib_module_names}
    for name in ("data.py", "grok.py", "analyze.py"):
        imports = [node for node in ast.walk(ast.parse((ROOT / name).read_text()))
                   if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in imports for alias in node.names
                 if isinstance(node, ast.Import)}
        names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
        assert {module.split(".")[0] for module in names} <= allowed


def test_what_the_readme_says_of_seen_and_used_holds_in_every_seed():
    """Its paragraph "What is seen is not what is used", from the measured maps."""
    paths = {preset: [json.loads((run / "paths.json").read_text()) for run in SHIPPED
                      if run.parts[-3:-1] == (preset, "natural")]
             for preset in ("tiny", "bidirectional")}
    seen = lambda path, site: path["lens"]["bridge"]["map"][site[0]][site[1]]
    used = lambda path, site, kind="swap": path["causal"][kind]["redirected"][site[0]][site[1]]
    assert [len(found) for found in paths.values()] == [3, 3]
    for path in paths["tiny"]:                                      # when, and in which form
        for split in path["after"].values():
            assert all(seen(split, (loop, 1)) >= 0.98 for loop in range(4))
            assert used(split, (2, 1)) >= 0.98
            assert all(used(split, (loop, 1)) < 0.05 for loop in (0, 1, 3))
        ood = path["before"]["test_ood"]
        assert used(ood, (2, 1)) > 0.895 and used(ood, (2, 1), "swap_visible") <= 0.345
        assert used(path["after"]["test_ood"], (2, 1), "swap_visible") >= 0.97
    for path in paths["bidirectional"]:                             # whether
        before, after = path["before"]["test_id"], path["after"]["test_id"]
        assert seen(before, (1, 0)) >= 0.98 and used(before, (1, 0)) <= 0.07
        assert used(after, (1, 0)) >= 0.96


# ---------------------------------------------------------------- the tutorial

NOTEBOOK = nbformat.read(Path(__file__).with_name("tutorial.ipynb"), as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
tagged = lambda cell, tag: tag in cell.metadata.get("tags", ())


def printed(cell):
    """What a cell printed or showed as text, without pictures."""
    shown = [out.get("text") or out["data"].get("text/markdown", "") for out in cell.outputs
             if out.get("name") != "stderr"]
    return "\n".join(line.rstrip() for line in "".join(shown).splitlines())


def apart(text):
    """(text without its numbers, the numbers): another machine may round the last digit apart."""
    number = r"\d+(?:\.\d+)?"
    return re.sub(number, "#", text), [float(found) for found in re.findall(number, text)]


def with_solutions(notebook):
    """The notebook and, after every check, its folded solution and the same check again."""
    cells = []
    for i, cell in enumerate(notebook.cells):
        cells.append(copy.deepcopy(cell))
        if tagged(cell, "check"):
            assert tagged(notebook.cells[i + 1], "solution")
            solution, = re.findall("```python\n(.*?)```", notebook.cells[i + 1].source, re.DOTALL)
            cells += [nbformat.v4.new_code_cell(source, metadata={"tags": ["added"]})
                      for source in (solution, cell.source)]
    return nbformat.v4.new_notebook(cells=cells, metadata=notebook.metadata)


@pytest.fixture(scope="module")
def executed():
    """One run of the whole notebook, training cell included, solutions beside the stubs."""
    notebook = with_solutions(NOTEBOOK)
    where = {"metadata": {"path": str(Path(__file__).parent)}}
    began = time.perf_counter()
    nbclient.NotebookClient(notebook, timeout=240, kernel_name="python3", resources=where).execute()
    notebook.metadata["seconds"] = time.perf_counter() - began
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_notebook_runs_and_prints_what_is_committed(executed):
    """No cell fails; every number is the committed one, but for cells that train ("varies")."""
    fresh = [cell for cell in executed if not tagged(cell, "added")]
    assert [cell.source for cell in fresh] == [cell.source for cell in CODE]
    for cell, committed in zip(fresh, CODE):
        if not tagged(cell, "varies"):
            (words, numbers), (other, wanted) = map(apart, (printed(cell), printed(committed)))
            assert words == other, cell.source
            assert numbers == pytest.approx(wanted, abs=0.011), cell.source


def test_notebook_exercises_can_be_failed_and_solved(executed):
    """An untouched stub is "not yet"; the folded solution is "right"."""
    checks = [i for i, cell in enumerate(executed) if tagged(cell, "check")]
    assert len(checks) >= 8
    for i in checks:
        assert tagged(executed[i - 1], "stub") and executed[i].source == executed[i + 2].source
        assert printed(executed[i]).startswith("not yet: "), executed[i].source
        assert printed(executed[i + 2]).split("\n")[0] == "right", executed[i + 1].source


def test_notebook_committed_outputs_come_from_one_clean_run():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", cell.source


def test_notebook_trains_a_model_live():
    train, = [cell for cell in CODE if "train_step" in cell.source]
    steps = [float(words[-1]) for words in map(str.split, printed(train).splitlines())]
    assert tagged(train, "varies") and "assert right" in train.source
    assert CODE.index(train) < len(CODE) / 4 and steps[-1] > steps[0]  # OOD answers begin to rise


def test_notebook_is_small_and_says_nothing_of_a_machine():
    text = nbformat.writes(NOTEBOOK)
    assert len(text) < 2_000_000
    plain = re.sub('"image/png": "[^"]*"', "", text)
    assert not re.findall(r"/(?:work|tmp|root|home|Users|content)\b", plain)
    assert "TODO" not in text and not re.search(r"it/s|\d%\|", plain)  # no progress bar


def test_notebook_is_short_prose_and_short_cells():
    prose = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
    words = re.sub(r"```.*?```|<[^>]+>|https?://\S+", " ", "\n".join(prose), flags=re.DOTALL)
    assert len(re.findall(r"[A-Za-z0-9][\w'’-]*", words)) < 4000
    assert 1.5 <= len(prose) / len(CODE) <= 3
    for cell in CODE:
        lines = cell.source.splitlines()
        assert len(lines) <= 12 and max(map(len, lines)) <= 100, cell.source


def test_notebook_defines_nothing_that_the_modules_have():
    """It imports data, grok and analyze; no function of theirs is written again."""
    theirs = {name for module in (data, grok, analyze) for name in vars(module)}
    for cell in CODE:
        tree = ast.parse(cell.source.replace("%matplotlib inline", ""))
        assert not theirs & {node.name for node in ast.walk(tree)
                             if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
