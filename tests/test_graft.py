"""What experiments/graft.py promises: `pytest tests/test_graft.py`."""
import json
from dataclasses import replace

import pytest
import torch

import grok
from experiments import graft

SMALL = grok.Config(**{**grok.PRESETS["smoke"][2], "layout": "bidirectional", "mixing": "tokens",
                       "tied": False, "copy": True, "min_loops": 3, "d_model": 16, "steps": 20,
                       "eval_every": 10, "preset": "smoke"})


@pytest.fixture
def folder(tmp_path):
    """What a finished run of SMALL leaves, without its weights."""
    return write_run(tmp_path / "run", SMALL)


def write_run(folder, config):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.__dict__))
    last = {"step": config.steps, "accuracy": {}, "lens": {}}
    (folder / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    return folder


def test_of_all_weights_those_along_the_positions_alone_are_copied():
    ours, theirs = (grok.build_model(replace(SMALL, seed=seed), 12, 8) for seed in (0, 1))
    before = {name: weight.clone() for name, weight in ours.named_parameters()}
    graft.copy_mixing(ours, theirs)
    n_copied = 0
    for name, weight in ours.named_parameters():
        is_mixing = name in ("blocks.0.mix.gate_up.weight", "blocks.0.mix.down.weight")
        wanted = dict(theirs.named_parameters())[name] if is_mixing else before[name]
        assert torch.equal(weight, wanted), name
        n_copied += is_mixing * weight.numel()
    assert n_copied == 192


def test_a_graft_of_its_own_weights_is_the_run_itself(folder):
    grafted = graft.graft(folder, SMALL.seed)
    trainer = grok.Trainer(SMALL, *grok.make_data(SMALL, {}))
    for _ in range(SMALL.steps):
        trainer.train_step()
    assert grafted["answer"] == trainer.measure()["accuracy"]["test_ood"]
    assert 0 <= grafted["first"] <= 1 and 0 <= grafted["last"] <= 1


def test_a_run_on_own_facts_is_grafted_on_these_facts(folder):
    world, _ = grok.make_data(SMALL, {})
    (folder / "facts.tsv").write_text(
        "".join(f"e{h}\tr{r}\te{t}\n" for h, r, t in world.facts))
    write_run(folder, replace(SMALL, facts="facts.tsv", phi=1.0))
    assert 0 <= graft.graft(folder, 1)["answer"] <= 1


def test_the_command_writes_one_line_a_seed_and_refuses_other_models(folder, capsys):
    assert graft.main([str(folder), "1", "2"]) == 0
    assert [line["seed"] for line in json.loads((folder / "graft.json").read_bytes())] == [1, 2]
    write_run(folder, replace(SMALL, layout="causal", mixing="attention", copy=False))
    capsys.readouterr()
    assert graft.main([str(folder), "1"]) == 2
    assert "is no run of the preset small" in capsys.readouterr().err
