"""What experiments/pictures.py promises: `pytest tests/test_pictures.py`.

Most pictures are drawn from made-up runs, whose numbers are chosen so that each message can be
checked by hand; what task.png says is checked by swaps in shipped weights.
"""
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.text import Text
from PIL import Image

import grok
from analyze import other_r2, patch, right_only, values_of
from data import REGIMES
from experiments import canvas, diagrams, measure, pictures
from experiments.book import Book
from experiments.runs import read_runs
from experiments.verdicts import Missing

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "runs/shipped"


# ---------------------------------------------------------------- made-up runs
def config_of(preset, **changes):
    return grok.Config(**{**grok.PRESETS[preset][2], "preset": preset, **changes})


def write_run(root, name, config, curve, inside=None):
    """A finished run of four evaluations; curve(i) are the shares at the i-th."""
    folder = root / name
    folder.mkdir(parents=True)
    lines = []
    for i in range(4):
        lines.append({"step": config.steps * (i + 1) // 4, "loss": 1.0, "seconds": 1.0,
                      "accuracy": curve(i), "lens": {}})
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if inside is not None:
        (folder / "inside.json").write_text(json.dumps(inside))
    return folder


def groks(i):
    """It fits its training at the second evaluation, and answers nine in ten at the last."""
    return {"train_inferred": min(1.0, 0.5 + 0.5 * i), "test_id": 0.3 + 0.2 * i,
            "test_ood": (0.0, 0.1, 0.4, 0.95)[i]}


def inside_of(seen=0.1, used=0.9, aim=0.8, store=0.9, answer=0.6, fit_aim=0.3, fit_store=0.1):
    """What experiments/measure.py finds, as far as a picture reads it."""
    def stage(seen, used, aim, store, answer):
        lens = {"seen": {"paper": {"any": seen, "any_chance": 0.07}}}
        site = {"where": "one site", "sites": [[2, "mixed", 2]], "name": "mixed, loop 3, r2",
                "test_ood": {"n": 100, "donor": used, "noise": 0.03}}
        hops = {"n": 500, "as_is": answer, "snapped": (answer + store) / 2, "own_code": store,
                "nearest_right": aim}
        return {"test_ood": lens, "site": site, "aim": {"test_ood": hops}}

    return {"fit": stage(0.05, used, fit_aim, fit_store, 0.05),
            "end": stage(seen, used, aim, store, answer)}


def write_frames(folder):
    used = np.zeros((4, 4, 2, 4), np.float32)
    used[:, 2, 0, 2] = (0.0, 0.3, 0.6, 0.9)     # mixed, loop 3, r2
    seen = np.full((4, 4, 2, 4), 0.04, np.float32)
    np.savez(folder / "frames.npz", step=[750, 1500, 2250, 3000], answer=[0, 0.1, 0.5, 0.95],
             seen=seen, used=used)


def write_paths(folder, config, sites):
    """A recursion of 28 loops, in which a swap redirects at one site alone."""
    maps = {part: np.full((28, 4), 0.02) for part in grok.PARTS}
    for loop, part, position in sites:
        maps[part][loop, position] = 0.97
    redirected = {part: shares.tolist() for part, shares in maps.items()}
    seen = {"paper": {"any": 0.21, "any_chance": 0.19},
            "state": {"bridge": {"map": np.full((28, 4), 0.05).tolist()}}}
    end = {"test_ood": {"seen": seen, "used": {"other_r2": {"n": 50, "redirected": redirected}}},
           "site": {"sites": sites, "test_ood": {"donor": 0.98, "n": 90}}}
    (folder / "paths.json").write_text(json.dumps({"end": end}))


def serves(first, second, both):
    def curve(i):
        return {"new_old": first[i], "old_new": second[i], "new_new": both}
    return curve


def write_new_facts(root):
    """Fine-tuning, and the same with a share of the new facts exposed."""
    tuning = dict(new_facts=140, kept=0.21, steps=4000, eval_every=1000)
    alone = {"r2_alone": {"new_old": 0.2, "old_new": 0.01, "new_new": 0.02, "exposed_old": 0.2}}
    small = {**grok.PRESETS["small"][2], **tuning, "preset": "tune"}
    for seed in (0, 1):
        curve = serves((0.2, 0.3, 0.4, 0.5), (0.6, 0.45, 0.3, 0.2), 0.06)
        write_run(root, f"tune/long_natural_end/seed{seed}", grok.Config(**small, seed=seed), curve,
                  alone)
        groups = {"exposed/natural_end_0.25_4": (0.25, 0.5, 0.45),
                  "exposed/natural_end_0.5_4": (0.5, 0.6, 0.6),
                  "tune/natural_new_mlp": (0.0, 0.9, 0.5),
                  "exposed/natural_new_mlp_0.5_4": (0.5, 0.95, 0.7)}
        for group, (share, first, second) in groups.items():
            config = grok.Config(**{**small, "steps": 2000}, seed=seed, exposed=share)
            write_run(root, f"{group}/seed{seed}", config,
                      serves((first,) * 4, (second,) * 4, 0.1), alone)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with all the runs that the pictures need."""
    root = tmp_path_factory.mktemp("runs")
    for seed in range(3):
        write_run(root, f"tiny/natural/seed{seed}", config_of("tiny", seed=seed, steps=4000), groks,
                  inside_of(seen=1.0))
        for regime, (hop1, hop2, k) in REGIMES.items():
            config = config_of("small", hop1=hop1, hop2=hop2, k=k, seed=seed)
            hops = {}
            if regime.endswith("_full"):  # three corners of the map
                hops = dict(aim=0.5 + 0.5 * hop1, store=0.6 + 0.4 * hop2)
            write_run(root, f"small/{regime}/seed{seed}", config, groks,
                      inside_of(used=0.9 - 0.01 * seed, **hops))
    write_frames(root / "small/second_full/seed0")
    for hop1 in (0.0, 0.25, 0.5, 0.75, 1.0):
        for hop2 in (0.0, 0.25, 0.5, 1.0):  # .75 is still missing
            if (hop1, hop2) in ((0, 1), (1, 0), (1, 1)):
                continue  # regimes of small
            config = config_of("small", hop1=hop1, hop2=hop2)
            inside = inside_of(aim=0.5 + 0.5 * hop1, store=0.6 + 0.4 * hop2, answer=0.6)
            write_run(root, f"map/hop1_{hop1:g}_hop2_{hop2:g}/seed0", config, groks, inside)
    write_run(root, "dial/tied/seed0", config_of("small", tied=True, steps=2500), groks,
              inside_of(used=0.23, seen=0.7))
    write_run(root, "trm/natural/seed0", config_of("trm"), groks,
              inside_of(aim=0.7, store=0.6, answer=0.4))
    config = config_of("trm", hop1=1.0, hop2=1.0)
    folder = write_run(root, "trm/both_full/seed0", config, groks, inside_of())
    write_paths(folder, config, [[26, "state", 3]])
    write_new_facts(root)
    return root


@pytest.fixture(scope="module")
def book(root):
    return Book(read_runs(root))


def figure_of(file, book):
    with rc_context(canvas.STYLE):
        return pictures.PICTURES[file](book)


@pytest.fixture(scope="module")
def figures(book):
    """{file: figure} of all but the moving picture."""
    return {file: figure_of(file, book) for file in pictures.PICTURES if file.endswith(".png")}


def message_of(figure):
    return figure.get_suptitle().replace("\n", " ")


def texts_of(figure):
    """What is written on a figure: not the labels of ticks beyond the ends of an axis."""
    hidden = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for place, label in zip(axis.get_ticklocs(), axis.get_ticklabels()):
                if not axes.axison or not low <= place <= high:
                    hidden.add(label)
    return [text for text in figure.findobj(Text)
            if text.get_visible() and text.get_text().strip() and text not in hidden]


# ---------------------------------------------------------------- all pictures
def test_all_pictures_are_drawn_and_no_other_is_left(root, tmp_path, capsys):
    assert pictures.main(["--root", str(root), "-o", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(pictures.PICTURES)
    assert "skipped" not in capsys.readouterr().out
    for path in (tmp_path / "out").glob("*.png"):
        with Image.open(path) as image:
            assert image.width == 1200
    with Image.open(tmp_path / "out/grokking.gif") as image:
        assert (image.n_frames, image.width) == (4, 800)
        first = np.asarray(image.convert("RGB")).astype(int)
        image.seek(3)
        last = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(last - first).max() > 100 and (last[0, 0] == 255).all()


@pytest.mark.parametrize("file", [name for name in pictures.PICTURES if name.endswith(".png")])
def test_text_is_large_enough_stays_on_the_page_and_overlaps_nothing(file, figures):
    figure = figures[file]
    pictures.FigureCanvasAgg(figure).draw()
    page = figure.bbox
    boxes = []
    for text in texts_of(figure):
        assert text.get_fontsize() >= 8, text
        box = text.get_window_extent()
        assert page.x0 <= box.x0 and box.x1 <= page.x1, text
        assert page.y0 <= box.y0 and box.y1 <= page.y1, text
        boxes.append((text, box))
    for i, (text, box) in enumerate(boxes):
        for other, other_box in boxes[:i]:
            width = min(box.x1, other_box.x1) - max(box.x0, other_box.x0)
            height = min(box.y1, other_box.y1) - max(box.y0, other_box.y0)
            assert width < 1 or height < 1, (text, other)


def test_missing_runs_skip_a_picture_and_what_is_unfinished_is_named(root, tmp_path, capsys):
    some = tmp_path / "runs"
    for group in ("small/natural", "small/both_half", "trm/natural"):
        shutil.copytree(root / group, some / group)
    cut = some / "small/natural/seed2/metrics.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(True)[:2]))
    (some / "small/natural/seed1/inside.json").unlink()
    other = some / "small/both_half/seed2/config.json"
    changed = config_of("small", hop1=0.5, hop2=0.5, k=9, seed=2, lr=0.001)
    other.write_text(json.dumps(asdict(changed)))
    assert pictures.main(["--root", str(some), "-o", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "small/natural/seed2: is not finished (step 1500 of 3000)" in said
    assert "left out: small/both_half/seed2: lr = 0.001, but small/both_half/seed0 has" in said
    assert "map.png: skipped, " in said and "lacks map/hop1_0_hop2_0 end aim test_ood as_is" in said
    for file in ("hero.png", "map.png", "new_facts.png", "recursion.png", "grokking.gif"):
        assert f"{file}: skipped" in said and not (tmp_path / "out" / file).exists()
    assert (tmp_path / "out/store_aim.png").exists()
    only = ["--root", str(some), "-o", str(tmp_path / "out"), "--only", "hero.png"]
    assert pictures.main(only) == 2
    assert "only = hero.png: " in capsys.readouterr().err
    aims = figure_of("store_aim.png", Book(read_runs(some)))
    assert len(aims.axes[0].patches) == 8 and aims.axes[0].get_title() == "small, natural, 1 seed"


def test_what_is_asked_wrongly_is_one_line_and_nothing_is_written(root, tmp_path, capsys):
    out = tmp_path / "out"
    for options in (["--root", str(tmp_path)], ["--root", str(root), "--only", "cells.png"],
                    ["--roots", "x"]):
        assert pictures.main([*options, "-o", str(out)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("experiments.pictures: ") and said.count("\n") == 1
        assert not out.exists()


def test_it_runs_as_a_script_from_anywhere(root, tmp_path):
    command = [sys.executable, str(ROOT / "experiments/pictures.py"), "--only", "task.png",
               "--root", str(root), "-o", "drawn"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "drawn/task.png\n"), done.stderr


# ---------------------------------------------------------------- what the pictures say
def test_messages_are_those_of_the_numbers(figures):
    said = {file: message_of(figure) for file, figure in figures.items()}
    assert said["hero.png"] == ("It has fitted its training at step 2,000; nine in ten pairs of "
                                "OOD facts come right at step 4,000")
    assert said["store_aim.png"] == (
        "From the fit to the end small brings the store of hop 2 from .10 to .90 and the aim of "
        "hop 1 from .30 to .80; the seeds of trm end with a store of .60 and an aim of .70")
    # 3 of tiny, 15 of small, 17 of the map, whose corners are runs of small, 1 of trm, 1 dial
    assert said["seen_used.png"] == (
        "Of 37 runs that answer half of the OOD questions, a swap redirects .8 or more of the "
        "answers in 36; the lens sees less than half of the bridges in 33")
    assert said["map.png"] == (
        "Supervising all of hop 1 brings its aim from .50 to 1.00; supervising all of hop 2 brings "
        "its store from .60 to 1.00; both together answer .60")
    assert said["new_facts.png"] == (
        "New facts serve as hop 1 in .30, with half of them exposed in .60, with the MLP drawn "
        "afresh in .90; as hop 2 in .45, .60, .50; two of them are chained in .06, .10, .10")
    assert said["recursion.png"] == (
        "In seed 0 of the paper's recursion the lens, which looks after every pass, sees .21 of "
        "the bridges (chance .19); a swap at the black frame redirects .98 of the answers (n = 90; "
        "in the map 50)")


def test_the_pictures_here_say_what_the_shipped_runs_give():
    """Each carries its message as the title of the file."""
    book = Book(read_runs(ROOT / "runs/shipped"))
    for file in sorted(pictures.PICTURES):
        if file.endswith(".png"):
            with Image.open(ROOT / "figures" / file) as image:
                assert image.text["Title"] == figure_of(file, book).get_suptitle(), file


@pytest.mark.parametrize("regime", REGIMES)
def test_the_swap_of_task_png_works_where_it_is_drawn_and_not_in_the_state_after_it(regime):
    model, world, splits = grok.load_run(SHIPPED / "small" / regime / "seed0")
    rng = np.random.default_rng(0)
    pool = splits["test_ood"].take(rng.permutation(len(splits["test_ood"].h))[:250])
    right = right_only(model, world, pool)
    clean, donor, predicted = other_r2(world, right, right, rng)
    tokens, _ = grok.to_tokens(clean, world, "bidirectional")
    theirs = values_of(model, grok.to_tokens(donor, world, "bidirectional")[0])
    loop, part, position = diagrams.SITE
    shares = {}
    for at in grok.PARTS:
        new = {(loop, at, position): theirs[at][loop, :, position]}
        answers = patch(model, tokens, new).argmax(-1).numpy()
        shares[at] = (answers == predicted).mean()
    assert len(predicted) > 50 and part == "mixed"
    assert shares["mixed"] > 0.75 and shares["state"] < 0.05


def test_a_bar_of_aim_is_stacked_from_its_levels(figures):
    figure = figures["store_aim.png"]
    heights = [bar.get_height() for bar in figure.axes[0].patches[4:8]]  # at the end
    assert np.allclose(heights, [0.6, 0.15, 0.15, 0.1])
    assert [text.get_text() for text in figure.axes[0].texts][-4:] == [".60", ".15", ".15", ".10"]


def test_the_map_has_a_number_a_cell_and_hatches_what_is_missing(figures):
    figure = figures["map.png"]
    for axes in figure.axes:
        assert len(axes.texts) == 20
        corners = [cell.get_xy() for cell in axes.patches if cell.get_hatch()]
        assert corners == [(2.5, row - 0.5) for row in range(5)]
    aims = {text.get_position(): text.get_text() for text in figure.axes[1].texts}
    assert (aims[0, 0], aims[0, 4], aims[4, 0]) == (".50", "1.00", ".50")  # hop 1 goes up


def test_a_run_that_was_measured_at_the_fit_alone_has_no_bar(tmp_path):
    for name, preset in (("small/natural", "small"), ("trm/natural", "trm")):
        inside = inside_of()
        del inside["end"]
        write_run(tmp_path, f"{name}/seed0", config_of(preset), groks, inside)
    with pytest.raises(Missing, match="small/natural end aim"):
        figure_of("store_aim.png", Book(read_runs(tmp_path)))


def test_the_recursion_shows_each_site_where_it_is(root, tmp_path):
    config = config_of("trm", hop1=1.0, hop2=1.0)
    folder = write_run(tmp_path, "trm/both_full/seed0", config, groks)
    write_paths(folder, config, [[22, "mixed", 2], [24, "mixed", 2]])
    figure = figure_of("recursion.png", Book(read_runs(tmp_path)))
    framed = {}
    for number, axes in enumerate(figure.axes):
        for frame in axes.patches:
            if frame.get_edgecolor() == (0, 0, 0, 1):
                framed[number] = frame.get_xy()
    assert framed == {11: (-0.5, 1.5), 12: (-0.5, 1.5)}  # mixed, block 1, r2
    assert len(figure.axes) == 14
    assert [text.get_text() for text in figure.axes[11].texts if "." in text.get_text()] == [
        ".97", ".05"]
    assert figure.axes[6].get_title(loc="left") == "z_H\npass 1"


# ---------------------------------------------------------------- the moving picture
@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoke") / "seed0"
    assert grok.main(["--preset", "smoke", "--steps", "60", "--eval-every", "30", "--device",
                      "cpu", "--out", str(folder)]) == 0
    return folder


def test_a_filmed_run_is_the_run(smoke):
    assert measure.main(["--frames", str(smoke)]) == 0
    frames = np.load(smoke / "frames.npz")
    _, history = grok.read_run(smoke)
    assert frames["step"].tolist() == [30, 60]
    assert frames["answer"].tolist() == [line["accuracy"]["test_ood"] for line in history]
    assert frames["seen"].shape == frames["used"].shape == (2, 3, 2, 3)


def test_a_run_that_ends_otherwise_is_refused(smoke, tmp_path, capsys):
    _, history = grok.read_run(smoke)
    history[-1]["accuracy"]["test_ood"] += 0.01
    shutil.copy(smoke / "config.json", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    assert measure.main(["--frames", str(tmp_path)]) == 2
    assert "ends otherwise" in capsys.readouterr().err
    assert not (tmp_path / "frames.npz").exists()


def test_a_frame_against_one_query_at_a_time(smoke):
    model, world, splits = grok.load_run(smoke)
    pool = splits["test_ood"]
    clean, donor, predicted = other_r2(world, pool.take(slice(20)), pool, np.random.default_rng(0))
    frame = measure.maps_of_moment(model, world, clean, donor, predicted)
    loop, part, position = 1, "state", 2
    seen = used = 0
    for i in range(len(predicted)):
        tokens, _ = grok.to_tokens(clean.take([i]), world, "causal")
        theirs, _ = grok.to_tokens(donor.take([i]), world, "causal")
        own = grok.run_values(model, tokens)[part][loop, 0, position]
        put = grok.run_values(model, theirs)[part][loop, 0, position]

        def edit(at_loop, at_part, value):
            if (at_loop, at_part) == (loop, part):
                value = value.clone()
                value[0, position] = put
            return value

        seen += int(model.unembed(own).argmax()) == clean.b[i]
        used += int(model(tokens, edit=edit).argmax()) == predicted[i]
    where = (loop, grok.PARTS.index(part), position)
    assert len(predicted) > 5
    assert np.allclose([frame["seen"][where], frame["used"][where]],
                       [seen / len(predicted), used / len(predicted)])


def test_the_poster_is_the_last_frame_and_circles_the_site_that_is_used(figures):
    figure = figures["grokking.png"]
    said = " ".join(text.get_text() for text in figure.texts)
    assert said == ("Step 3,000: it answers .95 of the OOD questions. The lens sees at most .04 "
                    "of the bridges at any one site; a swap at the circled one redirects .90.")
    for axes in figure.axes:
        assert axes.lines[0].get_xydata().tolist() == [[2, 4]]  # r2; mixed, loop 3
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names[4] == "loop 3, mixed"
