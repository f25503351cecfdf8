"""What extras/facts.py promises of its pair of states: `pytest extras/test_facts.py`."""
import json

import numpy as np

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
