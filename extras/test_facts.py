"""What extras/facts.py promises: `pytest extras/test_facts.py`."""
import json

import numpy as np
import torch

import data
import grok
from analyze import other_r2
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


def test_the_command_writes_facts_of_every_weights(tmp_path):
    run = tmp_path / "run"
    assert grok.main(["--preset", "smoke", "--phi", "1", "--steps", "160", "--eval-every", "40",
                      "--device", "cpu", "--out", str(run)]) == 0
    assert facts.main([str(run)]) == 0
    found = json.loads((run / "facts.json").read_text(encoding="utf-8"))
    assert list(found) == ["before", "grokked"]
    for stage in found.values():
        assert set(stage) == {"alone", "hop1", "hop2", "pair"} and len(stage["pair"]["one"]) == 3
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
