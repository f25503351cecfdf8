"""What experiments/grokfast.py promises: `pytest tests/test_grokfast.py`."""
import json

import pytest

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
    """Of a constant gradient g, two steps: the means are (1 - kept) g and (1 - kept^2) g."""
    config = grok.Config(**{**grok.PRESETS["smoke"][2], "preset": "smoke", "steps": 2})
    seen = []

    def remember(trainer):
        for _ in range(2):
            trainer.optimizer.zero_grad()
            for weight in trainer.weights:
                weight.grad = weight.detach() * 0 + 1.0
            trainer.optimizer.step()
            seen.append(trainer.weights[0].grad.flatten()[0].item())
        return iter([{"step": 2, "accuracy": {"train_inferred": 0.0, "test_ood": 0.25}}])

    monkeypatch.setattr(grokfast, "load_data", lambda folder: (config, *grok.make_data(config, {})))
    monkeypatch.setattr(grokfast, "evaluations", remember)
    result = grokfast.train_anew(tmp_path)
    kept, added = grokfast.KEPT, grokfast.ADDED
    wanted = [1 + added * (1 - kept), 1 + added * (1 - kept ** 2)]
    assert seen == pytest.approx(wanted, rel=1e-5)
    assert result == {"fit": None, "nine_in_ten": None, "answer": 0.25}


def test_the_command_writes_its_result_and_refuses_an_unfinished_run(folder, capsys):
    assert grokfast.main([str(folder)]) == 0
    result = json.loads((folder / "grokfast.json").read_bytes())
    assert set(result) == {"fit", "nine_in_ten", "answer"}
    (folder / "metrics.jsonl").unlink()
    assert grokfast.main([str(folder)]) == 2
    assert "not finished" in capsys.readouterr().err
