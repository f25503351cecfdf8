"""Tests of extras.pictures: every figure from made-up runs, and a run that is filmed."""
import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

import grok
from analyze import other_r2, PARTS
from data import WorldConfig
from extras import pictures
from extras.tables import read_groups

SITES = (4, 2, 4)  # loops, parts, positions
REGIMES = list(pictures.NAMES)


# ---------------------------------------------------------------- made-up runs
def write_run(folder, regime="natural", seed=0, n_lines=4, n=500, start=None, kept=0.21):
    """A run of `small`, or with `start` a fine-tuning, whose shares grow from line to line."""
    preset = "tune" if start else "small"
    _, world, model = grok.PRESETS["small"]
    new = dict(new_facts=140, kept=kept) if start else {}
    about = {"preset": preset, "regime": regime, "world": asdict(WorldConfig(**world, **new)),
             "model": asdict(grok.Config(**model, seed=seed) if not start else
                             grok.Config(**{**model, "steps": 500}, seed=seed)),
             "device": "cpu", "versions": {}}
    if start:
        about["start"] = {"path": "../none", "weights": start, "sha256": ""}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(about), encoding="utf-8")
    lines = [history_line(100 * (i + 1), (i + 1) / n_lines - 0.02 * seed, n, bool(start))
             for i in range(n_lines)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines),
                                          encoding="utf-8")
    if not start:
        paths = {"grokked": {split: path_of(0.8 - 0.1 * seed, n)
                             for split in ("test_id", "test_ood")}}
        (folder / "paths.json").write_text(json.dumps(paths), encoding="utf-8")
        (folder / "cells.json").write_text(json.dumps(cells_of()), encoding="utf-8")


def history_line(step, share, n, tuned):
    """A line of metrics.jsonl; with 0 OOD queries their split is missing, with 1 its chance."""
    if tuned:
        accuracy = {"new_old": share, "old_new": share / 2, "new_new": share / 4}
        return {"step": step, "loss": 1.0, "seconds": 1.0, "accuracy": accuracy, "lens": {}}
    accuracy, lens = {"train_inferred": 1.0, "test_id": share}, {}
    if n:
        accuracy["test_ood"] = share
        lens["test_ood"] = {"any": share / 2, "any_chance": None if n == 1 else 0.1,
                            "best": None if n == 1 else share, "best_chance": None}
    return {"step": step, "loss": 1.0, "seconds": 1.0, "accuracy": accuracy, "lens": lens}


def path_of(share, n):
    """What inference_path leaves of one split of n queries; a single one has no donor."""
    rates = {"any": share, "best": None if n < 2 else share - 0.05, "best_site": [0, 0],
             "map": np.full((4, 4), share).tolist()}
    lens = {name: rates for name in ("bridge", "bridge_chance", "entity", "entity_chance")}
    maps = {"n": n, "redirected": np.full(SITES, share - 0.15).tolist()} if n > 1 else {"n": 0}
    return {"n": n, "lens": dict.fromkeys(PARTS, lens), "probe": np.full(SITES, share).tolist(),
            "patch": dict.fromkeys(("other_r2", "code"), maps)}


def cells_of():
    """Cells of 16 queries all right, of 18 all wrong, of 1, and of none."""
    cells = {}
    for cell, n, right in (("yes, yes", 16, 1.0), ("yes, no", 18, 0.0), ("no, yes", 1, 1.0),
                           ("no, no", 0, None)):
        known = min(n, 1)
        cells[cell] = {"n": n, "right": right, "n_known": known,
                       "right_known": right if known else None}
    return cells


@pytest.fixture
def root(tmp_path):
    """A folder with all the runs that the pictures need, seeds of unequal length."""
    for regime in REGIMES:
        for seed in (0, 1):
            write_run(tmp_path / "small" / regime / f"seed{seed}", regime, seed, 4 - seed)
    for name, regime, start, kept in (
            ("scratch", "natural", "none", 0.21), ("natural_before", "natural", "before", 0.21),
            ("natural_grokked", "natural", "grokked", 0.21),
            ("both_full_grokked", "both_full", "grokked", 0.21),
            ("natural_grokked_all", "natural", "grokked", 1.0)):
        for seed in (0, 1):
            write_run(tmp_path / "tune" / f"small_{name}" / f"seed{seed}", regime, seed, 4 - seed,
                      start=start, kept=kept)
    write_frames(tmp_path / "small/natural/seed0")
    return tmp_path


def write_frames(folder):
    maps = {name: np.linspace(0, 1, 4)[:, None, None, None] * np.ones(SITES)
            for name in pictures.FILMED}
    np.savez_compressed(folder / "frames.npz", step=[100, 200, 300, 400], n=7, **maps)


def figures(root):
    """{file: figure} of all pictures, of the moving one its last frame."""
    chosen = pictures.choose(read_groups(root))
    run = chosen["grokking.gif"][1]
    drawn = {file: draw(given) for file, (draw, given) in chosen.items() if draw != pictures.moving}
    return {**drawn, "grokking.gif": pictures.scene(
        run, pictures.read_frames(run.folder / "frames.npz"), 3)}


def texts(figure):
    """The texts that are drawn: not the labels of ticks beyond the ends of an axis."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            hidden |= {label for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels())
                       if not axes.axison or not low <= place <= high}
    return [text for text in figure.findobj(Text)
            if text.get_visible() and text.get_text() and text not in hidden]


def lines_of(axes, color):
    return [line for line in axes.get_lines() if line.get_color() == color]


# ---------------------------------------------------------------- all figures
def test_all_pictures_are_written(root, tmp_path, capsys):
    assert pictures.main(["--root", str(root), "-o", str(tmp_path / "out")]) == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"task.png", "grokking.gif", "hero.png", "seen_used.png", "cells.png",
                     "tuned.png", "regimes.png", "stages.png"}
    assert "skipped" not in capsys.readouterr().out
    for path in (tmp_path / "out").glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 1200


def test_text_can_be_read_and_stays_on_the_page_and_there_is_ink(root):
    for file, figure in figures(root).items():
        image = np.asarray(pictures.pixels(figure)).astype(int)
        page = figure.bbox
        for text in texts(figure):
            assert text.get_fontsize() >= 8, (file, text)
            extent = text.get_window_extent()
            assert page.x0 <= extent.x0 and extent.x1 <= page.x1, (file, text)
            assert page.y0 <= extent.y0 and extent.y1 <= page.y1, (file, text)
        for axes in figure.axes:
            box = axes.get_window_extent()
            rows = slice(int(page.y1 - box.y1) + 3, int(page.y1 - box.y0) - 3)
            inside = image[rows, int(box.x0) + 3:int(box.x1) - 3]
            assert (inside.min(-1) < 200).sum() > 40, (file, axes.get_title())


def test_pictures_without_runs_are_skipped_and_said(tmp_path, capsys):
    write_run(tmp_path / "runs/small/natural/seed0")
    assert pictures.main(["--root", str(tmp_path / "runs"), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    for file in ("grokking.gif", "cells.png", "tuned.png", "stages.png"):
        assert f"{file}: skipped" in said and not (tmp_path / "out" / file).exists()
    assert (tmp_path / "out/hero.png").exists()


@pytest.mark.parametrize("n", [0, 1])
def test_no_query_or_one_in_a_split(tmp_path, n):
    for regime in REGIMES:
        write_run(tmp_path / "small" / regime / "seed0", regime, n_lines=1, n=n)
    write_frames(tmp_path / "small/natural/seed0")
    drawn = 0
    for draw, given in pictures.choose(read_groups(tmp_path)).values():
        if given and draw != pictures.moving:
            pictures.pixels(draw(given))
            drawn += 1
    assert drawn == 6  # all but the moving one, and fine-tuning
    assert pictures.moving(pictures.choose(read_groups(tmp_path))["grokking.gif"][1])


def test_bad_folders_are_one_line_and_nothing_is_written(tmp_path, capsys):
    assert pictures.main(["--root", str(tmp_path / "none"), "-o", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- each figure
def test_a_curve_is_the_mean_at_the_steps_that_all_seeds_have(root):
    runs = read_groups(root)["small/natural"]
    axes = pictures.regimes({"natural": runs}).axes[0]
    line, = lines_of(axes, pictures.BLUE)
    assert line.get_xdata().tolist() == [100, 200, 300]  # seed 1 has no step 400
    assert np.allclose(line.get_ydata(), [(1/4 + 1/3 - 0.02) / 2, (2/4 + 2/3 - 0.02) / 2,
                                          (3/4 + 1 - 0.02) / 2])


def test_hero_says_when_and_shades_what_lies_between(root, tmp_path):
    run = read_groups(root)["small/natural"][0]
    figure = pictures.hero(run)
    axes, = figure.axes
    assert axes.get_title() == ("small, natural, seed 0: training fitted at step 100, nine in ten "
                                "OOD answers right at 400")
    assert "300 steps\nin between" in [text.get_text() for text in axes.texts]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["100", "200"]
    write_run(tmp_path / "short/seed0", n_lines=4)
    short = pictures.until(read_groups(tmp_path / "short/seed0")["seed0"][0], 200)
    axes, = pictures.hero(short).axes
    assert axes.get_title().endswith("nine in ten OOD answers right never")
    assert not any("between" in text.get_text() for text in axes.texts)


def test_labels_at_the_ends_keep_apart():
    axes = pictures.Figure().subplots()
    pictures.label_ends(axes, {"a": ("k", 1.0), "b": ("k", 0.99), "c": ("k", 1.0),
                               "d": ("k", 0.3), "e": ("k", np.nan)})
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert len(heights) == 4 and heights[0] == 0.3
    assert min(np.diff(heights)) > 0.129 and heights[-1] <= 1.03


def test_seen_used_shows_each_seed_the_mean_and_the_paper(root):
    groups = pictures.regimes_of(read_groups(root), "small", "paths")
    figure = pictures.seen_used(groups)
    axes = figure.axes[REGIMES.index("second_full")]
    assert axes.get_title() == "second hop\nsupervised"
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    row = names.index("seen at any state")
    dots = [line for line in lines_of(axes, pictures.BLUE)
            if abs(line.get_ydata()[0] - row) < 0.2]
    assert np.allclose(dots[0].get_xdata(), [0.8, 0.7])
    assert any(np.allclose(line.get_xdata(), 0.75) and abs(line.get_ydata()[0] - row) < 0.4
               for line in axes.get_lines())
    hollow = [line for line in axes.get_lines() if line.get_marker() == "D"]
    assert [line.get_markerfacecolor() for line in hollow] == ["none", "none"]
    assert [round(line.get_ydata()[0]) for line in hollow] == [0, 1]


def test_cells_show_wilson_intervals_and_how_many(root):
    groups = pictures.regimes_of(read_groups(root), "small", "cells")
    figure = pictures.cells({"both_half": groups["both_half"]})
    axes, known = figure.axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == [f"half of both supervised: {cell}" for cell in ("both hops", "hop 1 alone",
                                                                     "hop 2 alone")]
    intervals = [line.get_xdata() for line in lines_of(axes, pictures.GREY)]
    z = 1.959964
    assert np.allclose(intervals[0], [16 / (16 + z * z), 1])  # 16 of 16: n / (n + z z) to 1
    assert np.allclose(intervals[2], [0, z * z / (18 + z * z)])  # 0 of 18
    assert [text.get_text() for text in axes.texts] == ["n = 16", "n = 18", "n = 1"]
    assert [text.get_text() for text in known.texts] == ["n = 1"] * 3


def test_tuned_has_a_row_for_what_is_kept_and_a_line_for_each_start(root):
    figure = pictures.tuned(pictures.tuned_of(read_groups(root)))
    assert [axes.get_ylabel() for axes in figure.axes] == ["21 % of old facts kept", "", "",
                                                           "all old facts kept", "", ""]
    assert [len(axes.get_lines()) for axes in figure.axes] == [5, 5, 5, 2, 2, 2]
    guesses = [axes.get_lines()[0].get_ydata()[0] for axes in figure.axes]
    assert guesses[0] > guesses[3] > 2 * guesses[1] > 0     # r2 alone: few kept facts tell more
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named == ["from scratch", "natural, before", "natural, grokked",
                     "both hops supervised, grokked", "r2 alone"]


def test_the_probe_is_a_line_of_the_best_site_at_every_evaluation(root):
    axes, = figures(root)["stages.png"].axes
    line, = lines_of(axes, pictures.GREEN)
    assert line.get_xdata().tolist() == [100, 200, 300, 400]
    assert np.allclose(line.get_ydata(), np.linspace(0, 1, 4))
    assert any("probe" in text.get_text() for text in axes.texts)


# ---------------------------------------------------------------- the moving picture
def test_the_gif_moves_and_is_small(root):
    run = pictures.choose(read_groups(root))["grokking.gif"][1]
    content = pictures.moving(run)
    with Image.open(pictures.io.BytesIO(content)) as gif:
        assert gif.n_frames == 4
        first = np.asarray(gif.convert("RGB")).astype(int)
        gif.seek(3)
        last = np.asarray(gif.convert("RGB")).astype(int)
    assert np.abs(last - first).max() > 100 and (last[0, 0] == 255).all()
    for color in (pictures.ORANGE, pictures.BLUE):  # a line's color is not lost among so few
        wanted = 255 * np.array(to_rgb(color))
        assert (np.abs(last - wanted).max(-1) < 3).sum() > 40
    assert len(content) < 2e6


def test_a_map_has_a_row_for_each_part_and_the_output_hatched():
    values = np.arange(32).reshape(SITES) / 32
    axes = pictures.Figure().subplots()
    pictures.draw_sites(axes, values, "map")
    shown = [text.get_text() for text in axes.texts]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels[:3] == ["1 mixed", "1 state", "2 mixed"] and len(labels) == 8
    assert shown[labels.index("3 state") * 4 + 2] == f"{values[2, 1, 2]:.2f}"
    hatched, = [part for part in axes.collections if part.get_hatch()]
    corners = hatched.get_paths()[0].get_extents()
    assert (corners.x0, corners.x1, corners.y0, corners.y1) == (2.5, 3.5, 6.5, 7.5)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "seed0"
    assert grok.main(["--preset", "smoke", "--steps", "100", "--device", "cpu",
                      "--out", str(folder)]) == 0
    return folder


def test_a_filmed_run_is_the_run(smoke):
    threads = torch.get_num_threads()
    assert pictures.main(["--frames", str(smoke)]) == 0
    assert torch.get_num_threads() == threads
    frames = pictures.read_frames(smoke / "frames.npz")
    assert frames["step"].tolist() == [50, 100]
    assert {frames[name].shape for name in pictures.FILMED} == {(2, 3, 2, 3)}
    assert 0 < frames["n"] <= 100 and (frames["entity"] >= frames["bridge"]).all()


def test_a_run_that_ends_otherwise_is_refused(smoke, tmp_path, capsys):
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((smoke / name).read_bytes())
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    last = json.loads(lines[-1])
    last["accuracy"]["test_ood"] += 0.01
    (tmp_path / "metrics.jsonl").write_text(json.dumps(last) + "\n", encoding="utf-8")
    assert pictures.main(["--frames", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "test_ood" in said and "metrics.jsonl" in said and said.count("\n") == 1
    assert not (tmp_path / "frames.npz").exists()


def test_a_frame_against_one_query_at_a_time(smoke):
    model, world, splits = grok.load_run(smoke)
    known, pool = splits["test_id"], splits["test_ood"]
    clean, donor, predicted = (part[:20] if isinstance(part, np.ndarray) else part.take(slice(20))
                               for part in other_r2(world, pool, pool, np.random.default_rng(0)))
    found = pictures.frame(model, world, known, clean, donor, predicted)
    loop, position, E, n = 1, 1, world.n_entities, len(predicted)
    assert n > 5
    known_values = states_at(model, grok.to_tokens(known, world, "causal")[0], loop, position)
    values = states_at(model, grok.to_tokens(clean, world, "causal")[0], loop, position)

    def code(b):
        return known_values[known.b == b].mean(0) if (known.b == b).any() else 0

    seen = among = used = 0
    for i, tokens in enumerate(grok.to_tokens(clean, world, "causal")[0]):
        logits = model.unembed(values[i])
        seen += int(logits.argmax()) == clean.b[i]
        among += int(logits[:E].argmax()) == clean.b[i]

        def edit(at, part, value):
            if (at, part) == (loop, "state"):
                value = value.clone()
                value[0, position] += code(donor.b[i]) - code(clean.b[i])
            return value

        used += int(model(tokens[None], edit=edit).argmax()) == predicted[i]
    shares = [found[name][loop][1][position] for name in ("bridge", "entity", "code")]
    assert np.allclose(shares, [seen / n, among / n, used / n], atol=1e-6)


def states_at(model, tokens, loop, position):
    kept = {}

    def keep(at, part, value):
        kept[at, part] = value
        return value

    model(tokens, edit=keep)
    return kept[loop, "state"][:, position]


def test_damaged_frames_are_refused(root, tmp_path, capsys):
    (root / "small/natural/seed0/frames.npz").write_bytes(b"PK\x03\x04 cut")
    assert pictures.main(["--root", str(root), "-o", str(tmp_path / "out")]) == 2
    assert "frames.npz: is damaged" in capsys.readouterr().err
