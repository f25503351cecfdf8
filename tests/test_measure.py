"""What experiments/measure.py and paper_world.py promise: `pytest tests/test_measure.py`."""
import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import grok
from analyze import inference_path, plain
from data import Queries
from experiments import measure, paper_world


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A smoke run that has fitted its few questions, looked into by the command."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    assert grok.main(["--preset", "smoke", "--phi", "1", "--steps", "90", "--eval-every", "30",
                      "--device", "cpu", "--out", str(folder)]) == 0
    assert measure.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tuned(run):
    """A fine-tuning of it on new facts."""
    folder = run.parent / "tuned"
    assert grok.main(["--start", str(run), "--new-facts", "12", "--kept", "1", "--steps", "10",
                      "--eval-every", "10", "--device", "cpu", "--out", str(folder)]) == 0
    assert measure.main([str(folder)]) == 0
    return folder


def names_in(tree):
    """All names in nested dicts."""
    if not isinstance(tree, dict):
        return set()
    return set(tree).union(*[names_in(inner) for inner in tree.values()])


def queries_of(pairs):
    """Queries that matter by (r2, t) alone."""
    r2, t = np.array(pairs).T
    return Queries(t * 0, t * 0, r2, t * 0, t)


def test_r2_alone_counts_what_its_most_frequent_answer_gets_right():
    world = SimpleNamespace(n_relations=3, n_entities=4)
    splits = {"train_inferred": queries_of([(0, 1), (0, 1), (0, 2), (1, 3)]),
              "new_old": queries_of([(0, 1), (0, 2), (1, 3), (1, 2)]),
              "old_new": queries_of([(2, 0), (2, 1)]),   # r2 never trained: entity 0
              "new_new": queries_of([(1, 3)]).take(slice(0))}
    assert measure.r2_alone(world, splits) == {"new_old": 0.5, "old_new": 0.5}


def test_inside_json_holds_what_analyze_finds_without_its_maps(run):
    inside = json.loads((run / "inside.json").read_text())
    stages = [stage for stage in grok.WEIGHTS if (run / f"{stage}.pt").exists()]
    assert list(inside) == stages and stages[-1] == "end"
    assert set(inside["end"]) == {"site", "aim", "test_id", "test_ood"}
    assert not names_in(inside) & {"map", "used"}
    whole = plain(inference_path(*grok.load_run(run, "end")))
    for part in ("site", "aim"):
        assert inside["end"][part] == whole[part]
    seen = whole["test_ood"]["seen"]
    assert inside["end"]["test_ood"]["seen"]["paper"] == seen["paper"]
    del seen["state"]["bridge"]["map"]
    assert inside["end"]["test_ood"]["seen"]["state"]["bridge"] == seen["state"]["bridge"]


def test_a_film_is_the_run_itself(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    assert measure.main(["--film", str(run)]) == 0
    frames = json.loads((run / "film.json").read_text())
    _, history = grok.read_run(run)
    assert [frame["step"] for frame in frames] == [line["step"] for line in history]
    for frame, line in zip(frames, history):
        assert frame["fitted"] == round(line["accuracy"]["train_inferred"], 4)
        assert set(frame["test_ood"]) >= {"as_is", "own_code", "nearest_right", "snapped"}
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_film_that_ends_otherwise_than_the_run_is_refused(run, tmp_path, capsys):
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "steps": 30}))
    (tmp_path / "inside.json").write_bytes((run / "inside.json").read_bytes())
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    line["accuracy"]["test_ood"] += 0.5
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert measure.main(["--film", str(tmp_path)]) == 2
    assert "ends otherwise" in capsys.readouterr().err
    assert not (tmp_path / "film.json").exists()


def test_a_run_is_trained_anew_from_its_first_step_with_one_thread(run):
    torch.set_num_threads(2)
    trainer, world, splits = measure.trainer_of(run)
    first = grok.build_model(trainer.config, world.n_entities, world.n_relations)
    assert trainer.step == 0 and torch.get_num_threads() == 1
    for ours, theirs in zip(trainer.weights, first.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("option", ["--film", "--frames"])
def test_what_cannot_be_trained_anew_is_refused_in_a_line_and_the_next_is_tried(option, run, tuned,
                                                                               tmp_path, capsys):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    assert measure.main([option, str(tuned), str(tmp_path)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "is a run on new facts" in lines[0]
    if option == "--film":
        assert "was not measured" in lines[1] and len(lines) == 2
    else:
        assert (tmp_path / "frames.npz").exists() and len(lines) == 1


def test_a_run_on_new_facts_is_measured_with_and_without_its_weights(tuned):
    inside = json.loads((tuned / "inside.json").read_text())
    _, _, splits = grok.load_data(tuned)
    kinds = {name for name in measure.NEW if name in splits and len(splits[name].h)}
    assert set(inside["r2_alone"]) == kinds >= {"new_old", "old_new"}
    assert set(inside["end"]) == {"site", "aim"} and set(inside["end"]["aim"]) == kinds
    for weights in tuned.glob("*.pt"):
        weights.unlink()
    assert measure.main([str(tuned)]) == 0
    without = json.loads((tuned / "inside.json").read_text())
    assert without == {"r2_alone": inside["r2_alone"]}


def test_a_folder_without_a_run_is_refused_in_one_line(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "none"):
        assert measure.main([str(folder)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_r2_alone_in_a_small_world_is_counted_by_hand():
    config = grok.Config(**{**grok.PRESETS["smoke"][2], "new_facts": 12})
    world = data.change_facts(data.make_world(config), config, np.random.default_rng(1))
    share = paper_world.r2_alone_of_kept(world, 4, 20, 1, np.random.default_rng(2))
    rng = np.random.default_rng(2)
    old = np.flatnonzero(~world.is_new)
    kept = set(rng.permutation(old)[:20].tolist())
    pairs = [(one, two) for one, two in product(range(len(world.facts)), repeat=2)
             if world.facts[one, 2] == world.facts[two, 0]]
    both_old = [pair for pair in pairs if not world.is_new[list(pair)].any()]
    trained = [both_old[row] for row in rng.permutation(len(both_old))[:4 * len(old)]]
    answers = {}
    for one, two in trained:
        if one in kept or two in kept:
            answers.setdefault(world.facts[two, 1], []).append(world.facts[two, 2])
    right = []
    for one, two in pairs:
        if world.is_new[one] and two in kept:
            given = answers.get(world.facts[two, 1], [0])
            right.append(world.facts[two, 2] == max(sorted(set(given)), key=given.count))
    assert len(right) > 5 and share == pytest.approx(np.mean(right))


def test_the_papers_world_is_drawn_into_one_file(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_world, "N_DRAWS", 1)
    assert paper_world.main(["-o", str(tmp_path)]) == 0
    draw, = json.loads((tmp_path / "paper_world.json").read_text())
    shipped = json.loads((paper_world.SHIPPED / "paper_world.json").read_text())
    assert draw == pytest.approx(shipped[0]) and len(shipped) == 5
    (tmp_path / "file").touch()
    assert paper_world.main(["-o", str(tmp_path / "file/none")]) == 2
