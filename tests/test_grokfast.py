"""What experiments/grokfast.py promises: `pytest tests/test_grokfast.py`."""
import json

import pytest
import torch

import grok
from experiments import grokfast


@pytest.fixture
def folder(tmp_path):
    """A finished run of the preset smoke."""
    folder = tmp_path / "run"
    assert grok.main(["--preset", "smoke", "--device", "cpu", "--out", str(folder)]) == 0
    return folder


def test_with_nothing_added_it_is_the_run_itself(folder, monkeypatch):
    monkeypatch.setattr(grokfast, "ADDED", 0.0)
    _, history = grok.read_run(folder)
    result = grokfast.train_anew(folder)
    assert result["answer"] == history[-1]["accuracy"]["test_ood"]
    assert result["fit"] == grok.first_step(history, 0.99, "train_inferred")


def test_the_running_mean_is_added_to_the_gradient(monkeypatch, tmp_path):
    """Gradients of 1, then 3: the means are 1, then .98 * 1 + .02 * 3, and twice that is added."""
    config = grok.Config(**{**grok.PRESETS["smoke"][2], "preset": "smoke", "steps": 2})
    seen = []

    def remember(trainer):
        for gradient in (1.0, 3.0):
            for weight in trainer.weights:
                weight.grad = torch.full_like(weight, gradient)
            trainer.optimizer.step()
            seen.append(trainer.weights[0].grad.flatten()[0].item())
        return iter([{"step": 2, "accuracy": {"train_inferred": 0.0, "test_ood": 0.25}}])

    world, splits = grok.make_data(config, {})
    trainer = grok.Trainer(config, world, splits)
    monkeypatch.setattr(grokfast, "trainer_of", lambda folder: (trainer, world, splits))
    monkeypatch.setattr(grokfast, "evaluations", remember)
    result = grokfast.train_anew(tmp_path)
    assert seen == pytest.approx([1 + 2 * 1, 3 + 2 * 1.04], rel=1e-5)
    assert result == {"fit": None, "nine_in_ten": None, "answer": 0.25}


def test_the_command_writes_its_result_and_refuses_an_unfinished_run(folder, capsys):
    assert grokfast.main([str(folder)]) == 0
    result = json.loads((folder / "grokfast.json").read_bytes())
    assert set(result) == {"fit", "nine_in_ten", "answer"}
    (folder / "metrics.jsonl").unlink()
    assert grokfast.main([str(folder)]) == 2
    assert "not finished" in capsys.readouterr().err
