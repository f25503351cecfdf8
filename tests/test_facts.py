"""What extras/facts.py promises: `pytest extras/test_facts.py`."""
import copy
import json

import numpy as np
import pytest
import torch

import data
import grok
from analyze import other_r2, patch, right_only, values_of
from extras import facts
from test_grok import table  # noqa: F401, the circuit that is known by hand


def test_two_donors_of_one_bridge_tell_the_bridge_from_the_question(table):
    """The state at r1 holds the bridge after loop 1, so h's state says nothing there."""
    model, world, asked = table
    found = facts.pair_of_states(model, world, asked, 400)
    assert found["n"] > 300 and found["n_two"] > 50
    assert found["one"] == [1, 0, 0] and found["bridge"][0] == 1 and found["question"][0] == 0
    clean, donor, predicted = other_r2(world, asked, asked, np.random.default_rng(0))
    assert (facts.pair_swap(model, world, clean, donor, donor)[0] == predicted).all()
    none = facts.pair_of_states(model, world, asked.take([]), 400)
    assert none == {"n": 0, "n_two": 0, "one": None, "bridge": None, "question": None}


def test_swaps_to_ood_facts_are_counted_apart(table):
    """A model that knows all facts is redirected to all, one that lost the OOD facts to none."""
    model, world, asked = table
    found = facts.swapped(model, world, asked, asked)
    assert found["queries"] == len(asked.h) and found["n"][0] == 500 >= found["n"][1] > 100
    assert found["facts"][1] <= world.is_ood.sum() < found["facts"][0]
    assert found["donor"] == found["code"] == [1, 1]
    forgot, (heads, relations, _) = copy.deepcopy(model), world.facts[world.is_ood].T
    forgot.tails[heads, relations] = len(model.embedding) - 1
    found = facts.swapped(forgot, world, asked, asked)
    assert found["donor"] == found["code"] == [1, 0]
    none = facts.swapped(model, world, asked, asked.take([]))
    assert none == {"queries": 0, "n": [0, 0], "facts": [0, 0], "donor": [], "code": []}


def test_the_command_writes_facts_of_every_weights(tmp_path):
    run = tmp_path / "run"
    assert grok.main(["--preset", "smoke", "--phi", "1", "--steps", "160", "--eval-every", "40",
                      "--device", "cpu", "--out", str(run)]) == 0
    assert facts.main([str(run)]) == 0
    found = json.loads((run / "facts.json").read_text(encoding="utf-8"))
    assert list(found) == ["before", "grokked"]
    for stage in found.values():
        assert set(stage) == {"alone", "hop1", "hop2", "pair", "swapped"}
        assert len(stage["pair"]["one"]) == 3
    for name in grok.WEIGHTS.values():
        (run / name).unlink()
    assert facts.main([str(run)]) == 2                  # as a shipped run without its weights
    assert json.loads((run / "facts.json").read_text(encoding="utf-8")) == found


class Written:
    """A model of one loop in which what is mixed at r2 holds the tails of `early` facts alone, the
    state those of all; a composition is answered rightly if its first fact is an early one."""

    def __init__(self, world, early):
        self.config, self.world, self.early = grok.Config(layout="bidirectional"), world, early

    def answer_position(self, tokens):
        return torch.full((len(tokens),), 2)

    def __call__(self, tokens, edit=None):
        E, h, r1, r2 = self.world.n_entities, *tokens[:, :3].T.numpy()
        first = self.world.index[h, r1 - E]
        tails, value = self.world.facts[first, 2], torch.zeros(len(h), 4, E)
        value[:, 2] = torch.eye(E)[tails]
        if edit:
            edit(0, "mixed", value * torch.from_numpy(self.early[first])[:, None, None])
            edit(0, "state", value)
        second = self.world.index[tails, np.minimum(r2 - E, self.world.n_relations - 1)]
        answers = (self.world.facts[second, 2] + ~self.early[first]) % E
        return torch.eye(E)[answers]


def test_a_probe_reads_facts_asked_alone_where_they_stand():
    """Old facts are all early, of the new ones every third; and these alone serve as hop 1."""
    config = data.WorldConfig(new_facts=60)
    start = data.make_world(config)
    world, splits = data.add_facts(start, data.make_splits(start, config), config)
    early = ~world.is_ood
    early[np.flatnonzero(world.is_ood)[::3]] = True
    found = facts.asked_alone(Written(world, early), world, splits)
    old, new = np.array(found["old"]), np.array(found["new"])
    assert old.shape == new.shape == (1, 2, 4)
    assert old[0, :, 2].tolist() == [1, 1] and new[0, 1, 2] == 1
    assert 20 / 60 <= new[0, 0, 2] < 0.4               # a wrong guess is right now and then
    assert sum(found["n"]) == len(splits["new_old"].h) and found["right"][1] == 0
    assert found["right"][0] > 0.85


def test_held_out_compositions_are_those_of_two_kept_facts():
    for whole in (False, True):                         # True: the others stay in the world, too
        config = data.WorldConfig(new_facts=60, kept=0.5, whole_rows=whole)
        start = data.make_world(config)
        world, splits = data.add_facts(start, data.make_splits(start, config), config)
        kept = set(zip(splits["kept_atomic"].h, splits["kept_atomic"].r1))
        asked = splits["old_inferred"]
        n = sum((h, r1) in kept and (b, r2) in kept
                for h, r1, r2, b in zip(asked.h, asked.r1, asked.r2, asked.b))
        for known in (True, False):
            model = Written(world, np.full(len(world.facts), known))
            assert 0 < n < len(asked.h)
            assert facts.held_out(model, world, splits) == {"n": n, "right": float(known)}


def test_an_old_mlp_at_one_site_is_a_patch_of_what_it_makes_there():
    world = data.make_world(data.WorldConfig(n_entities=12, n_relations=8, out_degree=6))
    draws = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 8, (20, 4), generator=draws) + torch.tensor([0, 12, 12, 12])
    tokens[:, 3] = 20                                   # the blank
    for change in ({}, {"restart": False}, {"mlp_residual": True}, {"n_blocks": 2}, {"slots": 2}):
        model, start = (grok.LoopedTransformer(grok.Config(
            layout="bidirectional", mixing="tokens", d_model=16, n_loops=3, seed=seed, **change),
            world.n_entities, world.n_relations) for seed in (0, 1))
        values, x = values_of(model, tokens), model.embed(tokens)
        for loop in range(3):
            old = x if model.config.restart or loop == 0 else values[loop - 1, 1]
            made = start.blocks[loop % len(start.blocks)].look_up(old + values[loop, 0])
            for position in range(4):
                new = {(loop, 1, position): made[:, position]}
                got = facts.with_old_mlp(model, start, tokens, loop, position)
                assert torch.equal(got, patch(model, tokens, new).argmax(-1))


def test_a_model_that_learned_nothing_loses_nothing_and_one_that_forgot_all_loses_it():
    config = data.WorldConfig(new_facts=60)
    start = data.make_world(config)
    world, splits = data.add_facts(start, data.make_splits(start, config), config)
    about = grok.Config(layout="bidirectional", mixing="tokens", tied=False, n_loops=2, d_model=32)
    model, blank = (grok.LoopedTransformer(about, world.n_entities, world.n_relations)
                    for _ in range(2))
    for weight in blank.blocks.parameters():
        torch.nn.init.zeros_(weight)                    # its state is 0, and so are all logits
    same = facts.unlearnt(model, model, world, splits)
    lost = facts.unlearnt(model, blank, world, splits)
    assert list(same) == ["new_atomic", "new_old", "old_new", "train_inferred"]
    for name, at in (("new_atomic", 2), ("train_inferred", 3)):
        right = right_only(model, world, splits[name]).take(slice(500))
        expected = np.zeros(4)
        expected[at] = np.mean(right.t != 0)            # of equal logits the first is the answer
        assert same[name]["n"] == lost[name]["n"] == len(right.t) > 0
        assert np.array_equal(same[name]["lost"], np.zeros((2, 4)))
        assert lost[name]["lost"][-1] == pytest.approx(expected)
