"""What experiments/together.py promises: `pytest tests/test_together.py`."""
import json

import pytest

import grok
from experiments import together

SMALL = grok.Config(**{**grok.PRESETS["smoke"][2], "layout": "bidirectional", "mixing": "tokens",
                       "tied": False, "copy": True, "min_loops": 3, "d_model": 16, "steps": 20,
                       "eval_every": 10, "preset": "smoke"})


class FakeTrial:
    """One in which the bridge stands in three sites, a third in each."""
    held = {(1, "mixed", 2), (2, "mixed", 2), (2, "state", 0)}

    def redirected(self, sites):
        return len(self.held & set(sites)) / 3


def test_the_sites_that_hold_the_bridge_together_are_found():
    model = grok.build_model(SMALL, 12, 8)
    two, three, four = together.grow(FakeTrial(), together.sites_of(model))
    assert set(two) < set(three) == FakeTrial.held and set(three) < set(four)


@pytest.fixture(scope="module")
def trial():
    """A Trial of an untrained model on all training questions."""
    world, splits = grok.make_data(SMALL, {})
    model = grok.build_model(SMALL, world.n_entities, world.n_relations)
    return together.prepare(model, world, splits["train_inferred"], 50)


def test_the_two_donors_share_a_bridge_which_is_not_the_questions_own(trial):
    world = trial.world
    tails = {(h, r): t for h, r, t in world.facts}
    assert len(trial.clean.h) > 10
    new_bridges = [tails.get((h, r)) for h, r in zip(trial.clean.h, trial.clean.r1)]
    assert new_bridges == trial.clean.b.tolist()
    assert (trial.predicted != trial.clean.t).all()
    values = trial.first["mixed"][-1, :, 0] - trial.second["mixed"][-1, :, 0]       # (N, D)
    assert (values.abs().amax(1) > 0).all()  # two donors, not one


def test_at_one_site_and_everywhere_the_first_donor_alone_decides(trial):
    site = (2, "mixed", 2)
    assert trial.redirected([site]) == trial.redirected_by_one([site])


def test_of_a_recursive_model_the_last_passes_take_part():
    config = grok.Config(**{**grok.PRESETS["trm"][2], "d_model": 16, "preset": "trm"})
    sites = together.sites_of(grok.build_model(config, 12, 8))
    assert len(sites) == len(set(sites)) == 64 and min(loop for loop, _, _ in sites) == 20


def test_the_command_writes_a_line_a_set_and_refuses_other_layouts(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(together, "right_only", lambda model, world, queries: queries)
    folder = tmp_path / "run"
    options = ["--preset", "smoke", "--layout", "bidirectional", "--mixing", "tokens", "--steps",
               "10", "--device", "cpu", "--out", str(folder)]
    assert grok.main(options) == 0
    assert together.main([str(folder)]) == 0
    lines = json.loads((folder / "together.json").read_bytes())
    assert [len(line["sites"]) for line in lines] == [2, 3, 4]
    assert all(0 <= line["mixed_donors"] <= 1 and line["n"] > 0 for line in lines)
    other = tmp_path / "other"
    assert grok.main(["--preset", "smoke", "--steps", "10", "--device", "cpu", "--out",
                      str(other)]) == 0
    capsys.readouterr()
    assert together.main([str(other)]) == 2
    assert "is no run of four positions" in capsys.readouterr().err
