"""What experiments/graft.py promises: `pytest tests/test_graft.py`."""
import json
from dataclasses import replace

import torch

import grok
from experiments import graft

SMALL = grok.Config(**{**grok.PRESETS["smoke"][2], "layout": "bidirectional", "mixing": "tokens",
                       "tied": False, "copy": True, "min_loops": 3, "d_model": 16, "steps": 20,
                       "eval_every": 10, "preset": "smoke"})


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


def test_a_graft_of_its_own_weights_is_the_run_itself():
    grafted = graft.graft(SMALL, SMALL.seed)
    trainer = grok.Trainer(SMALL, *grok.make_data(SMALL, {}))
    for _ in range(SMALL.steps):
        trainer.train_step()
    assert grafted["answer"] == trainer.measure()["accuracy"]["test_ood"]
    assert 0 <= grafted["first"] <= 1 and 0 <= grafted["last"] <= 1


def test_the_command_writes_one_line_a_seed_and_refuses_other_models(tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMALL.__dict__))
    last = {"step": SMALL.steps, "accuracy": {}, "lens": {}}
    (folder / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    assert graft.main([str(folder), "1", "2"]) == 0
    assert [line["seed"] for line in json.loads((folder / "graft.json").read_bytes())] == [1, 2]
    causal = replace(SMALL, layout="causal", mixing="attention", copy=False)
    (folder / "config.json").write_text(json.dumps(causal.__dict__))
    capsys.readouterr()
    assert graft.main([str(folder), "1"]) == 2
    assert "is no run of the preset small" in capsys.readouterr().err
