"""What experiments/tables.py promises, with book.py, verdicts.py and predictions.py beside it:
`pytest tests/test_tables.py`.

The page is that of the shipped runs; all else is tried on made-up runs, whose numbers are known.
"""
import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

import data
import grok
from experiments import book as book_module
from experiments import predictions, run_all, tables, verdicts
from experiments import runs as runs_module
from experiments.book import Book, Cell
from experiments.runs import NEVER, read_runs

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "runs/shipped"
EVERY_SPLIT = (*data.SPLITS, "kept_atomic", "new_atomic", "new_old", "old_new", "new_new",
               "exposed_old", "old_exposed", "old_atomic", "old_inferred")


# ---------------------------------------------------------------- made-up runs
def config_of(options, seed=0, start=None):
    """The Config of a line of the plan."""
    given = grok.parse(options)
    preset = given["preset"] or ("tune" if start else "tiny")
    values = {**(asdict(start) if start else {}), **grok.PRESETS[preset][2], "preset": preset}
    values["weights"] = (given["weights"] or "end") if start else ""
    if given["regime"]:
        values.update(data.shares_of_regime(given["regime"]))
    names = set(asdict(grok.Config()))
    values.update((name, value) for name, value in given.items()
                  if name in names and value is not None)
    return grok.Config(**{**values, "seed": seed})


def history_of(config, shares=None, steps=None):
    """Lines of metrics; shares = {split: share at every evaluation, or a list of one a line}."""
    steps = steps or sorted({500, 2000, 5000, config.steps} & set(range(config.steps + 1)))
    history = []
    for number, step in enumerate(steps):
        accuracy = {split: 0.25 for split in EVERY_SPLIT}
        accuracy["train_inferred"] = 1.0
        for split, share in (shares or {}).items():
            accuracy[split] = share[number] if isinstance(share, list) else share
        lens = {split: {"any": 0.125, "any_chance": 0.0625} for split in EVERY_SPLIT}
        history.append({"step": step, "seconds": 60.0, "accuracy": accuracy, "lens": lens})
    return history


def inside_of(**given):
    """What inside.json holds, with these numbers for every split and at the fit and the end."""
    number = dict(as_is=0.5, nearest_right=0.75, own_code=0.875, snapped=0.625, random_code=0.0625,
                  mean=0.03125, n=500, donor=0.9375, code=0.8125, noise=0.0, n_swapped=200,
                  others_swapped=0.96875, seen=0.125, chance=0.0625, entity=0.375, last=0.75)
    number.update(given)
    swaps = {name: number[name] for name in ("donor", "code", "noise", "others_swapped")}
    swaps["code_in_state"] = number["code"]
    aim = {name: number[name] for name in ("as_is", "nearest_right", "own_code", "snapped",
                                           "random_code", "mean", "n")}
    place = {"best": number["entity"], "best_chance": 0.03125}
    last = {"best": number["last"], "best_chance": 0.03125}
    lens = {"bridge": place, "entity": place, "last_entity": last}
    split = {"seen": {"n": 490, "mixed": lens, "state": lens,
                      "paper": {"any": number["seen"], "any_chance": number["chance"]}},
             "present": {"n": 490, "mixed": {"best": 0.5}, "state": {"best": 0.5}}}
    swaps.update(n=number["n_swapped"], same_bridge=1.0, n_same_bridge=100, mixed_donors=None,
                 n_mixed_donors=0)
    stage = {"test_id": split, "test_ood": split,
             "site": {"where": "one site", "name": "mixed, loop 3, r2", "sites": [[2, "mixed", 2]],
                      "test_id": swaps, "test_ood": swaps},
             "aim": {name: aim for name in EVERY_SPLIT}}
    return {"fit": stage, "end": stage}


def write_run(root, name, config=None, shares=None, inside=None, film=None, steps=None,
              grafts=None, grokfast=None, together=None):
    """A run folder of metrics and measurements; returns its Config."""
    folder = root / name
    folder.mkdir(parents=True)
    seed = int(re.search("[0-9]*$", name).group() or 0)
    config = replace(config or config_of(["--preset", "small"]), seed=seed)
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    lines = [json.dumps(line) + "\n" for line in history_of(config, shares, steps)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for file, content in (("inside.json", inside), ("film.json", film), ("graft.json", grafts),
                          ("grokfast.json", grokfast), ("together.json", together)):
        if content is not None:
            (folder / file).write_text(json.dumps(content))
    return config


@pytest.fixture
def write(tmp_path):
    """(a function that writes a run, a function that reads the Book of what was written)."""
    root = tmp_path / "root"

    def write_one(name, **options):
        return write_run(root, name, **options)

    def read_book():
        return Book(read_runs(root))

    return write_one, read_book


def test_the_class_of_every_run_of_a_square_counts(write):
    write_one, read_book = write
    square = config_of(["--preset", "small", "--phi", "6", "--ood-fraction", "0.06"])
    for seed, right in enumerate((0.75, 0.25)):
        write_one(f"data/phi_6_ood_0.06/seed{seed}", config=square, inside=inside_of(),
                  shares={"test_id": right, "test_ood": 0.0})
    book = read_book()
    assert book.cell("data/phi_6_ood_0.06 learnt circuit").values == [1.0, 0.0]
    assert book.cell("data/phi_6_ood_0.06 learnt for_all").values == [0.0, 0.0]
    assert book.say("data/phi_6_ood_0.06 class") == "an ID circuit (1), between these (1)"


def test_a_graft_is_told_by_the_seed_that_it_came_from(write):
    write_one, read_book = write
    write_one("small/both_full/seed0", grafts=[{"seed": 2, "first": 0.0, "last": 0.75}])
    write_one("small/both_full/seed2", grafts=[{"seed": 0, "first": 0.25, "last": 0.5}])
    book = read_book()
    assert book.say("small/both_full graft from_2 last each") == ".75, –"
    assert book.say("small/both_full graft from_0 first mean") == ".25"
    outcomes, _ = predictions.predict_all(book)
    assert outcomes["graft"] == "fails"


def test_runs_with_amplified_gradients_are_told_beside_those_without(write):
    write_one, read_book = write
    for seed, step in enumerate((2500, None)):
        write_one(f"search/one/seed{seed}",
                  grokfast={"fit": 700, "nine_in_ten": step, "answer": 0.5})
    write_one("search/other/seed0")
    book = read_book()
    assert book.say("search/one grokfast nine_in_ten") == "2,500 (1 never)"
    assert book.say("search/one grokfast answer") == ".50"
    assert book.say("search/other grokfast fit") == "*not measured*"


def test_the_form_of_the_bridge_is_told_seed_by_seed(write):
    write_one, read_book = write
    write_one("small/natural/seed0", inside=inside_of(entity=0.75, last=0.0))
    write_one("small/natural/seed1", inside=inside_of(entity=0.0, last=0.5))
    write_one("small/both_full/seed0", inside=inside_of(entity=0.25, last=0.25))
    book = read_book()
    assert book.say("small/natural form each") == "first, last"
    assert book.say("small/both_full form") == "*not measured*"


# ---------------------------------------------------------------- the page
def test_page_and_tables_are_what_the_shipped_runs_give():
    assert tables.main(["--check"]) == 0


def test_readme_is_what_its_template_and_the_shipped_runs_give():
    book = Book(read_runs(SHIPPED))
    wanted = tables.fill(tables.read_template("readme.md"), book)
    assert (ROOT / "README.md").read_text(encoding="utf-8") == wanted
    assert "no run yet" not in wanted.partition("## The paper's claims")[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a run of every seed of every line of the plan, its files and its Book."""
    root = tmp_path_factory.mktemp("whole")
    (root / "paper_world.json").write_text('[{"code": 0.625, "text": 0.03125}]')
    configs = {}
    frame = {"nearest_right": 0.75, "own_code": 0.75, "as_is": 0.25}
    film = [{"step": 2000, "fitted": 1.0, "test_id": frame, "test_ood": frame}]
    grokfast = {"fit": 500, "nine_in_ten": 2500, "answer": 0.95}
    r2_alone = {split: 0.125 for split in EVERY_SPLIT}
    for name, line in run_all.read_plan(run_all.HERE / "plan.txt").items():
        configs[name] = config_of(line.options, start=configs.get(line.start))
        last = configs[name].steps
        learnt = {"donor": 0.25} if "/phi_3" in name else {}  # the plain data need a border
        shares = {} if learnt else {"test_id": 0.75}
        if name == "dial/tied":  # and some runs are exceptions
            learnt = {"donor": 0.25, "code": 0.25}
        steps = [step for step in (500, 2000, 2500, 3000, 5000) if step < last] + [last]
        for seed in range(line.n_seeds):
            grafts = [{"seed": other, "first": 0.0, "last": 0.9} for other in range(3)]
            form = {"entity": 0.75, "last": 0.0} if seed == 0 else {"entity": 0.0, "last": 0.75}
            write_run(root, f"{name}/seed{seed}", config=configs[name], shares=shares,
                      steps=steps, film=film, grafts=grafts, grokfast=grokfast,
                      together=[{"sites": [0] * size, "n": 500, "redirected": 0.5, "outright": 1.0}
                                for size in (2, 6)],
                      inside={**inside_of(**form, **learnt), "r2_alone": r2_alone})
    return root, *tables.all_files(root)


def test_with_every_run_of_the_plan_no_place_of_the_page_is_empty(whole):
    _, files, book = whole
    page = files["README.md"].decode()
    for lacking in ("no run yet", "not measured", "open |", "{", "}", "@", "| = |", "Left out"):
        assert lacking not in page, lacking
    for text in (page, (SHIPPED / "README.md").read_text(encoding="utf-8")):
        words = [word for word in text.split() if re.search("[A-Za-z0-9]", word)]
        assert len(words) <= 4000  # numbers count, the lines of tables do not
    readme = tables.fill(tables.read_template("readme.md"), book)
    verdicts_there = readme.partition("| claim |")[2].partition("\n\n")[0]
    for lacking in ("no run yet", "not measured", "open |", "{", "}"):
        assert lacking not in verdicts_there, lacking


def test_every_run_of_the_plan_is_read_somewhere(whole, monkeypatch):
    """By page, README, a notebook or a map."""
    book = whole[2]
    read = set()
    look = Book.say

    def note(book, place):
        read.update(place.split())
        return look(book, place)

    monkeypatch.setattr(Book, "say", note)
    for template in ("page.md", "readme.md"):
        tables.fill(tables.read_template(template), book)
    for file in (ROOT / "tutorial.ipynb", ROOT / "experiments/further.ipynb"):
        read.update(re.findall(r"[\w./]+", file.read_text(encoding="utf-8")))
    unread = {group for group in book.runs.groups
              if group not in read and not group.startswith("map/")}
    assert not unread


def test_a_reader_meets_no_table_of_over_five_columns_or_eight_rows(whole):
    n_rows = 0
    for line in whole[1]["README.md"].decode().splitlines():
        n_rows = n_rows + 1 if line.startswith("|") else 0
        assert n_rows <= 10 and (n_rows == 0 or len(tables.cells_of(line)) <= 5), line


def anchors_of(text):
    """The anchors that GitHub gives the headings of a page."""
    return {re.sub("[^a-z0-9 -]", "", line.lstrip("# ").lower()).replace(" ", "-")
            for line in text.splitlines() if line.startswith("#")}


def test_what_the_page_links_to_is_there(whole):
    files = whole[1]
    page = files["README.md"].decode()
    anchors = anchors_of(page)
    for target in re.findall(r"\]\(([^)]*)\)", page):
        if target.startswith("#"):
            assert target[1:] in anchors
        elif target.startswith("tables/"):
            assert target in files
        elif target.startswith("../../figures/"):
            assert target.endswith(".png")
        else:
            path, _, anchor = target.partition("#")
            assert path == "tables" or (SHIPPED / path).exists(), target
            if anchor:  # a heading of the README
                assert anchor in anchors_of((SHIPPED / path).read_text(encoding="utf-8")), target


def test_no_number_of_ours_stands_in_the_words_of_the_page():
    """Shares in the words are thresholds or settings; all others come from a place."""
    template = re.sub(r"\{[^}]*\}", "", (tables.HERE / "page.md").read_text(encoding="utf-8"))
    prose = [line for line in template.splitlines() if not line.startswith(("|", "!"))]
    shares = set(re.findall(r"(?<![\w.])\.\d+", "\n".join(prose)))
    predicted = (tables.HERE / "PREDICTIONS.md").read_text(encoding="utf-8")
    levels = set(re.findall(r"(?<![\w.])\.\d+", predicted))
    assert shares <= levels | {".1", ".21", ".8", ".9", ".95", ".99"}


def test_a_row_without_a_run_says_so(write):
    write_one, read_book = write
    write_one("small/natural/seed0", shares={"test_ood": 0.375})
    lines = ["| run | answered |", "| --- | --- |", "| = | {value:@1 last accuracy test_ood} |",
             "| ours | @ small/natural |", "| theirs | @ trm/natural |", "", "after"]
    filled = tables.fill("\n".join(lines), read_book())
    assert "| ours | .38 |\n| theirs | *no run yet* |\n\nafter\n" in filled


@pytest.mark.parametrize("place", ["{value:small/natural}", "{value:}", "{verdict:nothing}",
                                   "{value:small/natural last accuracy}", "{numbers}",
                                   "{value:small/natural last accuracy test_ood foo}",
                                   "{verdict:ordinary trm}"])
def test_a_place_that_does_not_exist_is_refused_by_name(write, place):
    write_one, read_book = write
    write_one("small/natural/seed0")
    with pytest.raises(data.BadInput, match="template: .*is no"):
        tables.fill(place, read_book())


# ---------------------------------------------------------------- reading runs
def test_an_unfinished_run_is_left_out_by_name_and_never_averaged(write, tmp_path, capsys):
    write_one, read_book = write
    for seed, share in enumerate((0.25, 0.5, 1.0)):
        write_one(f"small/natural/seed{seed}", shares={"test_ood": share}, steps=[1000, 3000])
    metrics = tmp_path / "root/small/natural/seed2/metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines()[0] + "\n")
    write_one("deep/er/still/seed0")
    (tmp_path / "root/deep/er/still/seed0/metrics.jsonl").unlink()
    book = read_book()
    assert book.cell("small/natural last accuracy test_ood").values == [0.25, 0.5]
    assert tables.main(["--root", str(tmp_path / "root")]) == 0
    error = capsys.readouterr().err
    page = (tmp_path / "root/README.md").read_text()
    for said in (error, page):
        assert "deep/er/still/seed0: is not finished (step 0 of 3000)" in said
        assert "is not finished (step 1000 of 3000)" in said and str(tmp_path) not in said
    assert len(error.splitlines()) == 2


@pytest.mark.parametrize("damage, reason", [
    ({"end": []}, "inside.json: is damaged, or another kind of file (end is [])"),
    ({"last": {}}, "last is unknown"), ({"end": {"aim": {"test_ood": {"n": True}}}}, "n is True"),
    ({"end": {"aim": {"test_ood": {"n": "500"}}}}, "test_ood n is"),
    ({"end": {"aim": {"test_ood": {"as_is": float("nan")}}}}, "as_is is nan")])
def test_a_measurement_that_is_no_number_leaves_its_run_out_by_name(write, damage, reason):
    write_one, read_book = write
    write_one("small/natural/seed0", inside=damage)
    write_one("small/natural/seed1", inside=inside_of())
    book = read_book()
    assert len(book.runs.groups["small/natural"]) == 1
    assert "small/natural/seed0" in book.runs.left_out[0] and reason in book.runs.left_out[0]


@pytest.mark.parametrize("damage, reason", [
    ({"film": [1]}, "film.json: is damaged, or another kind of file (1 is no dict)"),
    ({"film": [{"step": 1, "fitted": 0.5}]}, "test_ood is missing"),
    ({"grafts": [{"seed": 1, "first": "a", "last": 0.5}]}, "first is a"),
    ({"grokfast": {"fit": [1]}}, "fit is [1]"), ({"together": [{}]}, "sites is missing"),
    ({"shares": {"test_ood": "half"}}, "metrics.jsonl: is damaged")])
def test_so_does_one_of_another_measurement(write, damage, reason):
    write_one, read_book = write
    write_one("small/natural/seed0", **damage)
    write_one("small/natural/seed1")
    book = read_book()
    assert reason in book.runs.left_out[0] and len(book.runs.groups["small/natural"]) == 1


def test_groups_are_named_by_their_folder_at_any_depth(write):
    write_one, read_book = write
    for name in ("small/natural/seed0", "a/b/c/seed1", "mine", "old/run_of_may"):
        write_one(name)
    assert set(read_book().runs.groups) == {"small/natural", "a/b/c", "mine", "old/run_of_may"}


def test_runs_that_do_not_belong_together_are_not_averaged(write, tmp_path):
    write_one, read_book = write
    config = write_one("small/natural/seed0", shares={"test_ood": 0.5})
    write_one("small/natural/seed1", config=replace(config, lr=0.5))
    on_gpu = replace(config, device="cuda")
    write_one("small/natural/seed2", config=on_gpu, shares={"test_ood": 1.0})
    write_one("small/natural/seed00")
    write_one("small/natural/seed3")
    write_one("small/natural/seed4", steps=[1000, 3000])
    (tmp_path / "root/small/natural/seed3/inside.json").write_text("[1]")
    book = read_book()
    assert book.cell("small/natural last accuracy test_ood").values == [0.5, 1.0]
    reasons = " ".join(book.runs.left_out)
    assert "seed4: was evaluated at other steps than small/natural/seed0" in reasons
    assert "seed1: lr = 0.5, but small/natural/seed0 has 0.004" in reasons
    assert "seed00: has the seed of small/natural/seed0" in reasons
    assert "seed3: inside.json: " in reasons


def test_what_was_not_measured_is_never_zero(write):
    write_one, read_book = write
    write_one("small/natural/seed0", inside=inside_of(donor=None, n_swapped=0))
    write_one("small/natural/seed1")
    write_one("small/both_full/seed0")
    book = read_book()
    swap = "end site test_ood donor"
    assert book.say(f"small/natural {swap}") == "*not measured*, n = 0"
    assert book.say("small/natural end aim test_ood own_code") == ".88 (1 not measured)"
    assert book.say(f"small/both_full {swap}") == "*not measured*"
    assert book.say(f"trm/both_full {swap}") == "*no run yet*"
    assert book.say("small/natural film aim_.5") == "*not measured*"
    assert book.verdicts["fake small"] == book.verdicts["folds small"] == "open"
    for field in ("n", "seeds"):
        assert book.say(f"small/natural {swap} {field}") == "0"
    text = tables.csv_of_places(book, "swaps").decode()
    assert "small/both_full" not in text and "donor" not in text


def test_an_empty_folder_and_none_are_refused(tmp_path, capsys):
    assert tables.main(["--root", str(tmp_path)]) == 2
    assert tables.main(["--root", str(tmp_path / "none")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert "holds no run" in error[0] and "is no folder" in error[1] and len(error) == 2


# ---------------------------------------------------------------- cells
@pytest.mark.parametrize("cell, text", [
    (Cell([0.5, 0.25, 0.75]), ".50 (.25–.75)"),
    (Cell([1.0, 1.0]), "1.00"),
    (Cell([0.5]), ".50"),
    (Cell([0.5, None]), ".50 (1 not measured)"),
    (Cell([0.5, 0.25], n=30), ".38 (.25–.50), n = 30"),
    (Cell([0.5, 0.25], n=100), ".38 (.25–.50)"),
    (Cell([1000, 3000, NEVER]), "2,000 (1,000–3,000; 1 never)"),
    (Cell([1000, NEVER, None]), "1,000 (1 never; 1 not measured)"),
    (Cell([NEVER, NEVER]), "never"),
    (Cell([2.0, 4.0]), "3.0 (2.0–4.0)"),
    (Cell([4939]), "4,939"),
    (Cell([0, 0]), "0"),
    (Cell(["106k"]), "106k"),
    (Cell(["a", "b", "a"]), "a (2), b (1)"),
    (Cell([None, None]), "*not measured*")])
def test_a_cell_says_mean_least_and_most_and_what_is_lacking(cell, text):
    assert cell.text() == text


def test_a_mean_of_steps_says_in_how_many_runs_they_never_came(write):
    write_one, read_book = write
    for seed, right in enumerate((0.95, 0.5)):
        write_one(f"small/natural/seed{seed}", shares={"test_ood": right}, steps=[1000, 3000])
    book = read_book()
    assert book.say("small/natural step answer_.9 mean") == "1,000 (1 never)"
    assert book.say("small/natural step answer_.9 least") == "1,000"
    assert book.say("small/natural step answer_.9 most") == "never"


def test_a_split_that_was_not_measured_is_not_said_to_come_never(write, tmp_path):
    write_one, read_book = write
    write_one("small/natural/seed0", inside=inside_of())
    metrics = tmp_path / "root/small/natural/seed0/metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for line in lines:
        del line["accuracy"]["test_ood"], line["lens"]["test_ood"]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    book = read_book()
    assert book.say("small/natural step answer_.9") == "*not measured*"
    assert book.say("small/natural step lens_.5") == "*not measured*"
    assert book.say("small/natural class") == "between these"


@pytest.mark.parametrize("name", ["all", "my runs/natural"])
def test_a_group_cannot_have_the_name_of_what_is_no_run_nor_a_space(write, name):
    write_one, read_book = write
    write_one(f"{name}/seed0")
    with pytest.raises(data.BadInput, match="no group of runs can have this name"):
        read_book()


def test_a_line_of_a_table_with_too_many_cells_is_refused(write):
    write_one, read_book = write
    write_one("small/natural/seed0")
    lines = "| = | {value:@1 last accuracy test_ood} |\n| ours | @ small/natural | more |"
    with pytest.raises(data.BadInput, match="is no line of a table"):
        tables.fill(lines, read_book())


def test_a_csv_has_a_line_a_cell_with_all_its_numbers(write, tmp_path):
    write_one, _ = write
    for seed, share in enumerate((0.25, 0.5, 0.75)):
        write_one(f"small/natural/seed{seed}", inside=inside_of(own_code=share))
    assert tables.main(["--root", str(tmp_path / "root")]) == 0
    with open(tmp_path / "root/tables/aim_and_store.csv", newline="") as file:
        rows = {(row["runs"], row["path"]): row for row in csv.DictReader(file)}
    row = rows["small/natural", "end aim test_ood_id own_code"]
    assert [row[name] for name in book_module.FIELDS] == [
        "0.5", "0.25", "0.75", "1500", "0.0625", "3"]
    assert rows["small/natural", "fit aim test_ood nearest_right"]["chance"] == "0.025"
    with open(tmp_path / "root/tables/runs.csv", newline="") as file:
        runs = list(csv.DictReader(file))
    assert [run["own_code"] for run in runs] == ["0.25", "0.5", "0.75"]
    assert runs[0]["run"] == "small/natural/seed0" and runs[0]["site"] == "mixed, loop 3, r2"


def test_milestones_are_those_of_the_histories(write):
    write_one, read_book = write
    curve = {"train_inferred": [0.5, 0.99, 1.0], "test_ood": [0.0, 0.5, 0.95]}
    write_one("small/natural/seed0", shares=curve, steps=[1000, 2000, 3000])
    book = read_book()
    steps = {name: book.cell(f"small/natural step {name}").values for name in
             ("fit", "answer_.5", "answer_.9", "lens_.5")}
    assert steps == {"fit": [2000], "answer_.5": [2000], "answer_.9": [3000],
                     "lens_.5": [NEVER]}
    assert book.say("small/natural times_as_late answer_.9") == "1.5"
    assert book.say("small/natural times_as_late lens_.5") == "never"


def test_extra_compositions_are_those_of_the_data(write):
    write_one, read_book = write
    for regime in ("natural", "both_full"):
        config = config_of(["--preset", "small", "--regime", regime])
        write_one(f"small/{regime}/seed0", config=config)
    book = read_book()
    splits = data.make_splits(data.make_world(config), config)
    n_trained = len(splits["train_inferred"].h)
    assert book.cell("small/natural compositions extra").values == [0]
    assert book.cell("small/both_full compositions all").values == [n_trained]
    assert book.cell("small/both_full compositions extra").values == [n_trained - 17640]


@pytest.mark.parametrize("shares, donors, kind", [
    ({"train_inferred": 0.5}, (1, 1), "does not fit"),
    ({"test_id": 0.25, "test_ood": 0.0}, (None, None), "memorises"),
    ({"test_id": 0.75, "test_ood": 0.25}, (0.5, None), "an ID circuit"),
    ({"test_id": 0.75, "test_ood": 0.5}, (0.75, 0.5), "a full circuit"),
    ({"test_id": 0.75, "test_ood": 0.25}, (0.25, None), "between these")])
def test_plain_data_are_classified_by_a_swap(write, shares, donors, kind):
    write_one, read_book = write
    inside = json.loads(json.dumps(inside_of()))  # without parts that are one object
    for split, donor in zip(("test_id", "test_ood"), donors):
        inside["end"]["site"][split]["donor"] = donor
    config = config_of(["--preset", "small", "--phi", "9", "--ood-fraction", ".06"])
    write_one("data/phi_9_ood_0.06/seed0", config=config, shares=shares, inside=inside)
    assert read_book().say("data/phi_9_ood_0.06 class") == kind


def test_the_exceptions_are_those_that_answer_half_and_are_not_redirected(write):
    write_one, read_book = write
    numbers = [(0.5, 0.75, 0.5), (0.5, 0.8, 0.5), (0.25, 0.0, 0.0), (0.75, None, None),
               (0.75, 0.5, 0.8)]
    for seed, (answer, donor, code) in enumerate(numbers):
        inside = inside_of(as_is=answer, donor=donor)
        inside["end"]["site"]["test_ood"]["code"] = code
        together = [{"sites": [0] * 6, "redirected": 0.45, "outright": 0.5}] if seed == 0 else None
        write_one(f"small/natural/seed{seed}", inside=inside, together=together)
    book = read_book()
    counted = {"opened": 5, "half": 4, "half_donor": 1, "half_code": 1, "half_none": 2,
               "unseen": 4, "unseen_donor": 1, "unseen_code": 1, "id_site": 1, "no_id_site": 3,
               "id_site_donor": 1, "id_site_code": 0, "together": 1}
    for name, count in counted.items():
        assert book.say(f"all counts {name}") == str(count), name
    assert [row["redirected_by"] for row in book.rows] == ["none", "donor", "none", "none", "code"]


# ---------------------------------------------------------------- verdicts
class Stub:
    """A book of the Cells that are given as {"GROUP PATH": list of values}."""

    def __init__(self, cells):
        self.cells = {"paper natural test_ood": [".68"], "paper second_full seen": [".65"], **cells}

    def need(self, words):
        if words not in self.cells:
            raise verdicts.Missing(words)
        given = self.cells[words]
        return given if isinstance(given, Cell) else Cell(given)


def cells_of_folds(answer, donor, n=300):
    return {"small/natural end site test_ood donor": Cell([donor], n=n),
            "small/natural end aim test_ood as_is": [answer]}


def cells_of_fake(answer, seen, donor):
    return {"small/second_full end aim test_ood as_is": [answer],
            "small/second_full end test_ood seen paper any": [seen],
            "small/second_full end site test_ood donor": [donor]}


def cells_of_stages(lens, film):
    cells = {f"long/natural step {name}": values
             for name, values in zip(("fit", "lens_.5", "answer_.5"), lens)}
    for name, values in zip(("fit", "aim_.5", "answer_.5"), film):
        cells[f"small/natural film {name}"] = values
    return cells


def cells_of_new_facts(early, late, guesses=(0.25,)):
    cells = {"tune/long_natural_end r2_alone new_old": list(guesses)}
    for where, pair in (("small_natural_end 500", early), ("long_natural_end last", late)):
        for split, share in zip(("new_old", "old_new"), pair):
            values = share if isinstance(share, list) else [share]
            cells[f"tune/{where} accuracy {split}"] = values
    return cells


NEVER_SEEN = ([100], [NEVER], [300])
CASES = [
    ("sooner", {"small/both_full step answer_.9": [100, 200],
                "long/natural step answer_.9": [NEVER, 300]}, "holds"),
    ("sooner", {"small/both_full step answer_.9": [100, 200],
                "long/natural step answer_.9": [NEVER, 200]}, "partly"),
    ("sooner", {"small/both_full step answer_.9": [200, 300],
                "long/natural step answer_.9": [NEVER, 200]}, "differs"),
    ("sooner", {"small/both_full step answer_.9": [100, NEVER],
                "long/natural step answer_.9": [NEVER]}, "partly"),
    ("sooner", {"small/both_full step answer_.9": [NEVER],
                "long/natural step answer_.9": [NEVER]}, "differs"),
    ("sooner", {}, "open"),
    ("stages", cells_of_stages(([100], [200], [300]), ()), "holds"),
    ("stages", cells_of_stages(([100], [200], [NEVER]), ()), "holds"),
    ("stages", cells_of_stages(NEVER_SEEN, ([100], [200], [NEVER])), "partly"),
    ("stages", cells_of_stages(NEVER_SEEN, ([100, 100], [200, 100], [300, 300])), "differs"),
    ("stages", cells_of_stages(NEVER_SEEN, ([100], [300], [300])), "differs"),
    ("stages", cells_of_stages(NEVER_SEEN, ()), "open"),
    ("folds", cells_of_folds(0.7, 0.8), "holds"),
    ("folds", cells_of_folds(0.6, 0.8), "partly"),
    ("folds", cells_of_folds(0.7, 0.7), "differs"),
    ("folds", cells_of_folds(0.7, 0.8, n=19), "open"),
    ("folds", cells_of_folds(0.05, 0.8), "open"),
    ("fake", cells_of_fake(0.9, 0.1, 0.9), "differs"),
    ("fake", cells_of_fake(0.9, 0.1, 0.4), "holds"),
    ("fake", cells_of_fake(0.9, 0.7, 0.4), "partly"),
    ("fake", cells_of_fake(0.9, 0.1, 0.6), "partly"),
    ("fake", cells_of_fake(0.4, 0.1, 0.9), "open"),
    ("before", {"small/both_full step answer_.5": [100, 100],
                "small/both_full step lens_.5": [200, NEVER]}, "holds"),
    ("before", {"small/both_full step answer_.5": [100, 100],
                "small/both_full step lens_.5": [200, 100]}, "partly"),
    ("before", {"small/both_full step answer_.5": [NEVER],
                "small/both_full step lens_.5": [200]}, "differs"),
    ("new_facts", cells_of_new_facts((0.5, 0.25), (0.5, 0.25)), "holds"),
    ("new_facts", cells_of_new_facts((0.25, 0.5), (0.5, 0.25)), "partly"),
    ("new_facts", cells_of_new_facts(([0.75, 0.25], [0.25, 0.25]), (0.5, 0.25)), "partly"),
    ("new_facts", cells_of_new_facts((0.25, 0.5), (0.5, 0.45)), "differs"),
    ("r2_alone", cells_of_new_facts((0.5, 0), ([0.5, 0.4], 0)), "holds"),
    ("r2_alone", cells_of_new_facts((0.5, 0), ([0.75, 0.3], 0)), "partly"),
    ("r2_alone", cells_of_new_facts((0.5, 0), ([0.3, 0.3], 0)), "differs"),
    ("ordinary", {"tiny/own_blocks_last_loop last accuracy test_ood": [0.1],
                  "tiny/own_blocks last accuracy test_ood": [0.9]}, "partly"),
    ("ordinary", {"tiny/own_blocks_last_loop last accuracy test_ood": [0.1],
                  "tiny/own_blocks last accuracy test_ood": [0.1]}, "holds"),
]


@pytest.mark.parametrize("name, cells, word", CASES)
def test_a_verdict_follows_its_rule(name, cells, word):
    try:
        judged = verdicts.JUDGES[name](Stub(cells), "small")
    except verdicts.Missing:
        judged = "open"
    assert judged == word


def test_a_verdict_names_both_models_where_they_differ():
    assert verdicts.combine("holds", "holds") == "holds"
    assert verdicts.combine("partly", None) == "partly"
    assert verdicts.combine("holds", "open") == "holds in `small`, open in `trm`"


def test_the_map_moves_by_the_largest_step_along_a_row_or_a_column(write):
    write_one, read_book = write
    for hop1, hop2 in product(book_module.SHARES, repeat=2):
        aim = hop1 + (0.25 * hop2 if hop1 == 0.5 else 0)
        config = config_of(["--preset", "small", "--hop1", str(hop1), "--hop2", str(hop2)])
        write_one(f"{book_module.square(hop1, hop2)}/seed0", config=config,
                  inside=inside_of(nearest_right=aim, own_code=hop2))
    book = read_book()
    assert book_module.moves_of_map(book) == {"aim_along_hop2": 0.25, "store_along_hop1": 0}
    assert book.say("map aim_along_hop2") == ".25"
    outcomes, _ = predictions.predict_all(book)
    assert (outcomes["map_aim"], outcomes["map_store"]) == ("fails", "holds")
    book.numbers.pop("map/hop1_0.5_hop2_0.5")
    assert book_module.moves_of_map(book) == {}


PREDICTED = """# a heading
more: the second is ahead of the first by .1, and neither is far off
    at least 0.1 | second last test_id mean - first last test_id mean
    at least 0.25 | first last test_id least
    at most .9 | second last test_id most

other: it is not there
    at most 0 | third last test_id mean
"""


@pytest.mark.parametrize("first, second, outcome", [
    ([0.25, 0.5], [0.5, 0.75], "holds"), ([0.5, 0.75], [0.75, 1.0], "fails"),
    ([0.0, 0.5], [0.5, 0.75], "fails"), ([0.5, 0.75], [0.5, 0.75], "fails")])
def test_a_prediction_holds_if_all_its_comparisons_do(monkeypatch, tmp_path, first, second,
                                                      outcome):
    text = tmp_path / "predictions.txt"
    text.write_text(PREDICTED)
    monkeypatch.setattr(predictions, "TEXT", text)
    book = Stub({"first last test_id": first, "second last test_id": second})
    outcomes, rows = predictions.predict_all(book)
    assert outcomes == {"more": outcome, "other": "open"}
    gap = sum(second) / 2 - sum(first) / 2
    assert [row[3] for row in rows] == [gap, first[0], second[1], None]
    assert rows[2][4:] == ["at most", 0.9, outcome]


@pytest.mark.parametrize("words, number", [
    ("some step mean", NEVER), ("some step most", NEVER), ("some step least", 100),
    ("none step mean", NEVER),
    ("none step least - all step mean", NEVER), ("all step mean - some step mean", -NEVER),
    ("some step mean - none step mean", None), ("half share mean", 0.5),
    ("all step least - half share mean * half share mean", 99.75), ("all step different", 2)])
def test_what_never_came_is_later_than_any_step(words, number):
    book = Stub({"all step": [100, 200], "some step": [100, NEVER], "none step": [NEVER, NEVER],
                 "half share": [0.5, None]})
    assert predictions.number_of(book, words) == number


@pytest.mark.parametrize("numbers, outcome", [
    ((0.5, None), "open"), ((0.25, None), "fails"), ((None, 0.5), "fails"), ((0.5, 0.25), "holds"),
    ((None, 0.25), "open"), ((None, None), "open")])
def test_a_prediction_is_open_only_if_what_is_missing_could_decide(numbers, outcome):
    comparisons = [predictions.Comparison("at least", 0.5, "a"),
                   predictions.Comparison("at most", 0.25, "b")]
    assert predictions.judge(comparisons, numbers) == outcome


def test_every_prediction_can_be_judged():
    """Its name is new, its rules are known, and its numbers are places of runs in the plan."""
    lines = predictions.TEXT.read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[0] for line in lines if line and line[0] not in "# "]
    predicted = predictions.read_predictions("\n".join(lines))
    plan = run_all.read_plan(run_all.HERE / "plan.txt")
    assert len(names) == len(set(names)) == len(predicted)
    assert not {name.split()[0] for name in predicted} & set(verdicts.JUDGES)
    for said, comparisons in predicted.values():
        assert said and comparisons
        for comparison in comparisons:
            assert comparison.rule in ("at least", "at most")
            for place in re.split(" [-*] ", comparison.number):
                group, *path, field = place.split()
                assert group in {*plan, "map"} and path, place
                assert field in (*book_module.FIELDS, "different")


# ---------------------------------------------------------------- the command
def test_check_names_what_is_out_of_date(write, tmp_path, capsys):
    write_one, _ = write
    write_one("small/natural/seed0")
    root = tmp_path / "root"
    assert tables.main(["--root", str(root)]) == 0
    assert tables.main(["--root", str(root), "--check"]) == 0
    (root / "tables/swaps.csv").write_text("changed")
    (root / "tables/older.csv").write_text("")
    write_one("small/natural/seed1")
    before = (root / "README.md").read_bytes()
    capsys.readouterr()
    assert tables.main(["--root", str(root), "--check"]) == 2
    error = capsys.readouterr().err
    for name in ("tables/swaps.csv", "tables/older.csv", "tables/training.csv"):
        assert name in error
    assert (root / "README.md").read_bytes() == before


@pytest.mark.parametrize("options, reason", [
    (["--check", "--readme"], "not allowed with"), (["--readme", "-o", "x"], "out = x: "),
    (["-o", ""], "o: is empty"), (["--root="], "root: is empty")])
def test_options_that_do_not_go_together_are_refused(options, reason, capsys):
    before = (ROOT / "README.md").read_bytes()
    assert tables.main(options) == 2
    error = capsys.readouterr().err
    assert reason in error and len(error.splitlines()) == 1
    assert (ROOT / "README.md").read_bytes() == before


def test_every_verdict_and_prediction_stands_in_a_csv_with_its_rule(whole):
    _, files, book = whole
    lines = files["tables/verdicts.csv"].decode().splitlines()
    assert len(lines) == 1 + len(verdicts.JUDGES)
    for name in verdicts.JUDGES:
        assert any(line.startswith(f"{name},{book.verdicts[name]},") for line in lines), name
    assert all("Holds if" in line for line in lines[1:])
    lines = files["tables/predictions.csv"].decode().splitlines()
    predicted = predictions.read_predictions(predictions.TEXT.read_text(encoding="utf-8"))
    assert len(lines) == 1 + sum(len(comparisons) for _, comparisons in predicted.values())
    for name in predicted:
        line = next(line for line in lines if line.startswith(f"{name},"))
        assert line.endswith(f",{book.verdicts[name]}"), name


def test_it_starts_as_a_script_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "experiments/tables.py"), "--root", "none"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": ""})
    assert ended.returncode == 2
    assert ended.stderr == "experiments.tables: root = none: is no folder\n"
