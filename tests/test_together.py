"""What experiments/together.py promises: `pytest tests/test_together.py`."""
import json

import pytest
import torch

import grok
from experiments import together

SMALL = grok.Config(**{**grok.PRESETS["smoke"][2], "layout": "bidirectional", "mixing": "tokens",
                       "tied": False, "copy": True, "min_loops": 3, "d_model": 16, "steps": 20,
                       "eval_every": 10, "preset": "smoke"})


HELD = {(1, "mixed", 2), (2, "mixed", 2), (2, "state", 0)}


def third_each(sites):
    """What is redirected if three sites hold a third of the bridge each."""
    return len(HELD & set(sites)) / 3


def test_the_sites_that_hold_the_bridge_together_are_found():
    model = grok.build_model(SMALL, 12, 8)
    sites = together.sites_of(model)
    sets = together.grow(third_each, sites)
    assert [len(chosen) for chosen in sets] == [1, 2, 3, 4, 5, 6]
    assert set(sets[1]) < set(sets[2]) == HELD < set(sets[3])
    assert len(sites) == len(set(sites)) == 3 * 2 * 4


@pytest.fixture(scope="module")
def trial():
    """(model, world, a trial) of an untrained model on all training questions."""
    world, splits = grok.make_data(SMALL, {})
    model = grok.build_model(SMALL, world.n_entities, world.n_relations)
    trial, _ = together.prepare(model, world, splits["train_inferred"], 50)
    return model, world, trial


def test_what_is_asked_outright_is_the_donors_bridge_with_the_questions_own_relation(monkeypatch):
    world, splits = grok.make_data(SMALL, {})
    facts = {(h, r): t for h, r, t in world.facts}
    model = grok.build_model(SMALL, world.n_entities, world.n_relations)

    def answer(predicted, model, world, queries, put):
        assert put == {}
        answers = [facts[facts[h, r1], r2] for h, r1, r2 in zip(queries.h, queries.r1, queries.r2)]
        return float((answers == predicted).mean())

    monkeypatch.setattr(together, "share_becoming", answer)
    trial, outright = together.prepare(model, world, splits["train_inferred"], 50)
    assert outright == 1 and len(trial[0].h) > 10


def test_the_two_donors_share_a_bridge_which_is_not_the_questions_own(trial):
    _, world, (clean, first, second, predicted) = trial
    tails = {(h, r): t for h, r, t in world.facts}
    assert len(clean.h) > 10
    new_bridges = [tails.get((h, r)) for h, r in zip(clean.h, clean.r1)]
    assert new_bridges == clean.b.tolist()
    assert (predicted != clean.t).all()
    values = first["mixed"][-1, :, 0] - second["mixed"][-1, :, 0]                   # (N, D)
    assert (values.abs().amax(1) > 0).all()  # two donors, not one


def test_h_and_r1_come_from_different_donors_and_the_rest_in_turns():
    r1, answer, h, r2 = (2, "state", 1), (2, "mixed", 3), (1, "state", 0), (2, "mixed", 2)
    assert together.divide([r1, answer, h, r2]) == ([answer, h], [r1, r2])
    assert together.divide([r1, answer, h, r2], first_begins=False) == ([h, r2], [r1, answer])


def test_the_smaller_of_the_two_mixtures_counts(trial, monkeypatch):
    _, _, (_, first, second, _) = trial
    at_r2, at_answer = (2, "mixed", 2), (2, "mixed", 3)
    begins = []

    def note(predicted, model, world, clean, put):
        donor = first if torch.equal(put[at_r2], first["mixed"][2, :, 2]) else second
        other = second if donor is first else first
        assert torch.equal(put[at_answer], other["mixed"][2, :, 3])
        begins.append(donor is first)
        return 0.75 if donor is first else 0.25

    monkeypatch.setattr(together, "share_becoming", note)
    assert together.redirected(*trial, [at_r2, at_answer]) == 0.25
    assert begins == [True, False]


def test_the_command_writes_a_line_a_set_and_refuses_other_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(together, "right_only", lambda model, world, queries: queries)
    four_positions = ["--layout", "bidirectional", "--mixing", "tokens"]
    many = ["--ood-fraction", "0.4", "--phi", "1"]
    runs = {"good": [*four_positions, *many], "few": four_positions, "causal": []}
    for name, options in runs.items():
        assert grok.main(["--preset", "smoke", "--steps", "10", "--device", "cpu", *options,
                          "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert together.main([str(tmp_path / name) for name in ("causal", "few", "good")]) == 2
    refused = capsys.readouterr().err.splitlines()
    assert "causal: is no run of four positions" in refused[0]
    assert "few: answers too few OOD questions" in refused[1] and len(refused) == 2
    lines = json.loads((tmp_path / "good/together.json").read_bytes())
    assert [len(line["sites"]) for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(0 <= line["redirected"] <= 1 and line["n"] > 0 for line in lines)
