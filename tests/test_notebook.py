"""The notebooks, the exercises and their checks, the student's copy and the page for teachers.

One execution, of the student's copy, serves all tests. After each stub it also runs wrong answers,
the solution and other right forms of it; then every code cell again, in order; then further.ipynb.
Only the cells that train are shortened.
"""
import ast
import builtins
import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the kernel: tests run in two processes

import nbclient
import nbformat
import pytest

import analyze
import data
import grok
from tools import checks, student

HERE = Path(__file__).resolve().parent.parent
NOTEBOOK = nbformat.read(HERE / "tutorial.ipynb", as_version=4)
FURTHER = nbformat.read(HERE / "experiments" / "further.ipynb", as_version=4)
TEACHING = (HERE / "tools" / "TEACHING.md").read_text(encoding="utf-8")
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PROSE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
SHORTER = (("train_until(250)", "train_until(20)"),  # in the cells that train
           ("train_until(1000)", "train_until(40)"), ("% 250", "% 20"),
           ('"steps": 3000', '"steps": 20'))

WRONG = {  # exercise: answers that must not pass
    1: ["my_facts = my_facts[:2]",
        "my_facts = 'Ada mother Bea'",
        "my_facts = [(f'e{n}', 'next', f'e{n + 1}') for n in range(8)]  # no other chain there\n"
        "left_out, n_questions = my_facts[:2], 7",
        "my_facts = [('Ada', 'mother', 'Bea')] * 8",
        "my_facts = [(f'e{n}', r, f'e{n + 1}') for n in range(4) for r in 'xy']\n"
        "left_out, n_questions = my_facts[:2], 12                       # they do not chain",
        "my_facts = [(f'e{n}', r, f'e{n + 1}') for n in range(4) for r in 'xy']\n"
        "left_out, n_questions = my_facts[1:3], 13                      # counted wrongly"],
    2: ["def control(ours, theirs):\n    return ours",
        "def control(ours, theirs):\n    return torch.zeros_like(theirs)",
        "def control(ours, theirs):\n    return 0.95 * theirs",
        "def control(ours, theirs):\n    return theirs.mean(0)",
        "def control(ours, theirs):\n    return None",
        "def control(ours, theirs):\n    return ours + 0.01 * analyze.noise(ours)"],
    3: ["my_guess = 0.5",
        "my_guess = 'most'",
        "my_guess, my_trainer = 0.5, grok.Trainer(live_config, live_world, live_splits)",
        "my_config = grok.Config(**grok.PRESETS['small'][2], hop1=0.5, hop2=1.0)  # on the map\n"
        "my_trainer = grok.Trainer(my_config, *grok.make_data(my_config, {}))\nmy_guess = 0.9"],
    4: ["right, fewest = {n: 0.98 for n in range(1, 9)}, 2",
        "right, fewest = {1: 0.04}, 2",
        "right, fewest = [0.5] * 8, 4"],
    5: ["moved_site = (2, 1)", "moved_site = (5, 2)", "moved_site = [0, 0]", "moved_site = (4, 0)",
        "moved_site = (4, 7)", "moved_site = 'r1'"],
    6: ["def other_head(clean, pool, rng):                      # the answer may be the same\n"
        "    rows, donors = analyze.draw_donors(clean, pool, lambda c, d: (c.r1 == d.r1)\n"
        "                                       & (c.r2 == d.r2) & (c.b != d.b), rng)\n"
        "    return clean.take(rows), pool.take(donors), pool.take(donors).t",
        "def other_head(clean, pool, rng):                      # one pair alone\n"
        "    rows, donors = analyze.draw_donors(clean, pool, lambda c, d: (c.r1 == d.r1)\n"
        "                                   & (c.r2 == d.r2) & (c.b != d.b) & (c.t != d.t), rng)\n"
        "    donor = pool.take(donors[:1])\n"
        "    return clean.take(rows[:1]), donor, donor.t",
        "def other_head(clean, pool, rng):                      # the clean answer\n"
        "    rows, donors = analyze.draw_donors(clean, pool, lambda c, d: (c.r1 == d.r1)\n"
        "                                   & (c.r2 == d.r2) & (c.b != d.b) & (c.t != d.t), rng)\n"
        "    return clean.take(rows), pool.take(donors), clean.take(rows).t",
        "def other_head(clean, pool, rng):\n    return None"],
    7: ["def average(values):\n    return torch.zeros_like(values)",
        "def average(values):\n    return torch.randn(values.shape[1])",
        "def average(values):\n    return values.mean()",
        "def average(values):\n    return values.mean(1)"],
    8: ["def both(loop, part, value):                           # the first patch alone\n"
        "    if (loop, part) == (1, 'state'):\n"
        "        value[:, 0] = theirs['state'][1, :, 0]\n"
        "    return value",
        "def both(loop, part, value):                           # the second alone\n"
        "    if (loop, part) == (2, 'state'):\n"
        "        value[:, 1] = ours['state'][2, :, 1]\n"
        "    return value",
        "def both(loop, part, value):                           # the whole clean run put back\n"
        "    return ours[part][loop]"],
    9: ["def learn(values, bridges, n_entities):\n"
        "    return torch.randn(n_entities, values.shape[1])",
        "def learn(values, bridges, n_entities):                # the same for all\n"
        "    return values.mean(0).expand(n_entities, -1)",
        "def learn(values, bridges, n_entities):                # another entity's\n"
        "    return torch.stack([values[bridges == (b + 1) % n_entities].mean(0)\n"
        "                        for b in range(n_entities)])",
        "def learn(values, bridges, n_entities):\n    return values"]}
RIGHT = {  # exercise: other forms of a right answer
    1: ["n_questions = np.int64(n_questions)",
        "my_facts = [(f'e{n}', r, f'e{n + 1}') for n in range(4) for r in 'xy']\n"
        "left_out, n_questions = [my_facts[0], list(my_facts[3])], '12'"],
    2: ["def control(ours, theirs):\n    return analyze.noise(theirs)",
        "def control(ours, theirs):\n    return -theirs.numpy()",
        "def control(ours, theirs):\n    return theirs[torch.randperm(len(theirs))]"],
    3: ["my_guess = '0.4'"],
    4: ["right = {n: round(share, 2) for n, share in right.items()}",
        "right = {n: torch.tensor([share]) for n, share in right.items()}"],
    5: ["moved_site = [4, 1]", "moved_site = torch.tensor([4, 1])"],
    6: ["def other_head(clean, pool, rng):                      # b differs where t does\n"
        "    rows, donors = analyze.draw_donors(clean, pool, lambda c, d: (c.r1 == d.r1)\n"
        "                                       & (c.r2 == d.r2) & (c.t != d.t), rng)\n"
        "    return clean.take(rows), pool.take(donors), torch.tensor(pool.take(donors).t)"],
    7: ["def average(values):\n    return values.mean(0, keepdim=True)",
        "def average(values):\n    return values.mean(0).expand_as(values)",
        "def average(values):\n    return values.numpy().mean(0)"],
    8: ["def both(loop, part, value):                           # in place\n"
        "    if part == 'state' and loop == 1:\n"
        "        value[:, 0] = theirs['state'][1, :, 0]\n"
        "    if part == 'state' and loop == 2:\n"
        "        value[:, 1] = ours['state'][2, :, 1]\n"
        "    return value"],
    9: ["def learn(values, bridges, n_entities):                # least squares\n"
        "    asked = torch.nn.functional.one_hot(bridges, n_entities).float()\n"
        "    return torch.linalg.lstsq(asked, values).solution",
        "def learn(values, bridges, n_entities):\n"
        "    of = bridges.numpy()\n"
        "    return np.stack([values.numpy()[of == b].mean(0) for b in range(n_entities)])"]}


# ---------------------------------------------------------------- the execution
def tagged(cell, tag):
    return tag in cell.metadata.get("tags", ())


def printed(cell):
    """What a cell printed or showed as text, without pictures."""
    texts = [out.get("text") or out["data"].get("text/plain", "") for out in cell.outputs
             if out.get("name") != "stderr" and "image/png" not in out.get("data", {})]
    return "\n".join(line.rstrip() for line in "".join(texts).splitlines())


def pictures(cell):
    """How many pictures a cell drew."""
    return sum("image/png" in out.get("data", {}) for out in cell.outputs)


def apart(text):
    """(text without its numbers, the numbers): another machine may round the last digit apart."""
    number = r"\d+(?:\.\d+)?"
    return re.sub(number, "#", text), [float(figure) for figure in re.findall(number, text)]


def shorter(cell):
    """The cell with fewer training steps, if it trains."""
    for full, short in SHORTER:
        cell.source = cell.source.replace(full, short)
    return cell


def added(source, kind, number=None):
    """A code cell that is none of the notebook's: a "wrong" or "right" answer, or "other"."""
    cell = nbformat.v4.new_code_cell(source)
    cell.metadata.update(tags=["added"], kind=kind, number=number)
    return shorter(cell)


def with_answers(cells, solutions):
    """The cells and, after every stub, wrong answers, the solution and other right forms, each with
    the last line of the stub, which checks it."""
    result = []
    number = 0
    for cell in cells:
        result.append(cell)
        if tagged(cell, "stub"):
            number += 1
            check = cell.source.splitlines()[-1]
            answers = [("wrong", source) for source in WRONG[number]]
            answers += [("right", source) for source in (solutions[number - 1], *RIGHT[number])]
            result += [added(f"{source}\n{check}", kind, number) for kind, source in answers]
    return result


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder that tools.student writes."""
    out = tmp_path_factory.mktemp("student")
    assert student.main(["-o", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def executed(written):
    """Code cells, run once: {"first": the notebook's, "again": these once more, "answers": those of
    the exercises, "further": those of further.ipynb}."""
    page = (written / "solutions.md").read_text(encoding="utf-8")
    solutions = re.findall("```python\n(.*?)\n```", page, re.DOTALL)
    copied = nbformat.read(written / "tutorial_student.ipynb", as_version=4)
    code = [shorter(cell) for cell in copied.cells if cell.cell_type == "code"]
    further = [copy.deepcopy(cell) for cell in FURTHER.cells if cell.cell_type == "code"]
    cells = [*with_answers(code, solutions), *copy.deepcopy(code), *further]
    cells.insert(0, added("from tools import checks\nchecks.MAP_STEPS = 20\ndel checks", "other"))
    for number, cell in enumerate(cells):
        cell.id = f"run-{number}"
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=copied.metadata)
    where = {"metadata": {"path": str(HERE)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    own = [cell for cell in notebook.cells if not tagged(cell, "added")]
    n = len(code)
    return {"first": own[:n], "again": own[n:2 * n], "further": own[2 * n:],
            "answers": [cell for cell in notebook.cells if cell.metadata.get("number")]}


def same_numbers(fresh, committed):
    """Refuses what was printed unless it is the committed text, but for the last digit."""
    words, numbers = apart(printed(fresh))
    committed_words, committed_numbers = apart(printed(committed))
    assert words == committed_words, fresh.source
    assert numbers == pytest.approx(committed_numbers, abs=0.011), fresh.source
    assert pictures(fresh) == pictures(committed), fresh.source


def test_the_copy_runs_and_shows_what_is_committed(executed):
    """No cell fails; every number is the committed one, but for the cell that trains."""
    assert len(executed["first"]) == len(CODE)
    for fresh, committed in zip(executed["first"], CODE):
        if not tagged(fresh, "varies"):
            assert fresh.source == shorter(copy.deepcopy(committed)).source
            same_numbers(fresh, committed)


def test_run_again_every_cell_prints_the_same(executed):
    """Back at the top, after all of it and the exercises: no part spoils what another one uses."""
    assert len(executed["again"]) == len(CODE)
    for first, again in zip(executed["first"], executed["again"]):
        assert printed(again) == printed(first), again.source
        assert pictures(again) == pictures(first), again.source


def test_the_further_notebook_shows_what_is_committed(executed):
    code = [cell for cell in FURTHER.cells if cell.cell_type == "code"]
    for fresh, committed in zip(executed["further"], code, strict=True):
        same_numbers(fresh, committed)


def test_stubs_and_wrong_answers_fail_and_right_ones_pass(executed):
    stubs = [cell for cell in executed["first"] if tagged(cell, "stub")]
    assert len(stubs) == len(WRONG) == len(RIGHT)
    for cell in stubs:
        assert printed(cell).startswith("not yet: "), cell.source
    n_right = sum(len(answers) + 1 for answers in RIGHT.values())
    assert len(executed["answers"]) == n_right + sum(map(len, WRONG.values()))
    for cell in executed["answers"]:
        wanted = "right: " if cell.metadata["kind"] == "right" else "not yet: "
        assert printed(cell).startswith(wanted), (cell.source, printed(cell))


# ---------------------------------------------------------------- what is committed
def test_committed_outputs_come_from_one_clean_run():
    for notebook in (NOTEBOOK, FURTHER):
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        for cell in code:
            for out in cell.outputs:
                assert out.output_type != "error" and out.get("name") != "stderr", cell.source


def test_small_and_says_nothing_of_a_machine():
    for notebook in (NOTEBOOK, FURTHER):
        text = nbformat.writes(notebook)
        assert len(text.encode("utf-8")) < 1_200_000
        plain = re.sub('"image/png": "[^"]*"', "", text)
        assert not re.findall(r"/(?:work|tmp|root|home|Users|content)\b|[A-Z]:\\\\", plain)
        assert "TODO" not in text and not re.search(r"it/s|\d%\|", plain)  # no progress bar


def test_live_training_stands_in_two_cells_and_in_exercise_3():
    assert sum("train_step" in cell.source for cell in CODE) == 1
    training = [cell for cell in CODE if "train_until(" in cell.source]
    assert len(training) == 2 and all(tagged(cell, "varies") for cell in training)
    assert sum(tagged(cell, "slow") for cell in CODE) == 1
    for full, _ in SHORTER:
        assert sum(full in cell.source for cell in NOTEBOOK.cells) == 1, full


def test_folded_answers_bring_no_numbers_of_their_own():
    """Shares come from outputs alone, so that no answer can disagree with a cell."""
    for notebook, least in ((NOTEBOOK, 18), (FURTHER, 2)):
        text = "\n".join(cell.source for cell in notebook.cells)
        answers = re.findall(r"<summary><b>Answer</b></summary>(.*?)</details>", text, re.DOTALL)
        assert len(answers) >= least
        for folded in answers:
            assert not re.search(r"\d*\.\d", folded), folded


# ---------------------------------------------------------------- names and modules
def tree_of(cell):
    return ast.parse(cell.source)


def stored_names(tree):
    """Names that are bound anywhere in a tree, those of arguments and comprehensions included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
        elif isinstance(node, ast.arg):
            names.add(node.arg)
    return names


def lasting_names(statement):
    """Names that a statement of a cell leaves behind: of a function its own alone, and none of
    those inside comprehensions."""
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    passing = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.comprehension):
            passing |= stored_names(node.target)
    return stored_names(statement) - passing - {"_", "figure", "panel", "panels"}


def parts_of_notebook():
    """{heading: trees of its code cells}, "" for the cells before part 1."""
    parts = {"": []}
    heading = ""
    for cell in NOTEBOOK.cells:
        if cell.cell_type == "markdown":
            found = re.search(r"^(?:## \d+\. .*|# Exercises)$", cell.source, re.MULTILINE)
            heading = found.group() if found else heading
        else:
            parts.setdefault(heading, []).append(tree_of(cell))
    return parts


def test_no_part_rebinds_the_names_of_another():
    """A loop's names live no longer than its cell: two parts may share them, if none keeps one."""
    owner = {}
    looping = []
    for heading, trees in parts_of_notebook().items():
        for statement in [statement for tree in trees for statement in tree.body]:
            for name in lasting_names(statement):
                if isinstance(statement, ast.For):
                    looping.append((name, heading))
                else:
                    assert owner.setdefault(name, heading) == heading, (name, heading)
    for name, heading in looping:
        assert owner.get(name, heading) == heading, (name, owner[name], heading)


def test_the_second_session_and_the_exercises_begin_afresh():
    """Part 6 and all after it read only what the opening or they themselves made."""
    parts = parts_of_notebook()
    opening = set(dir(builtins)).union(*map(stored_names, parts[""]))
    for heading, trees in parts.items():
        if heading and not re.match(r"## [1-5]\. ", heading):
            known = opening.union(*map(stored_names, trees))
            for node in [node for tree in trees for node in ast.walk(tree)]:
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    assert node.id in known, (node.id, heading)


def test_the_parts_import_the_first_tier_and_the_exercises_the_checks():
    packages = {"inspect", "json", "pathlib", "matplotlib", "numpy", "torch"}
    allowed = packages | {"analyze", "data", "grok"}
    for heading, trees in parts_of_notebook().items():
        modules = set()
        for tree in trees:
            for node in ast.walk(tree):
                if isinstance(node, ast.Import):
                    modules |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom):
                    modules.add(node.module.split(".")[0])
        assert modules <= (allowed | {"tools"} if heading == "# Exercises" else allowed), heading


def test_defines_nothing_that_the_modules_have_and_keeps_lines_short():
    theirs = {name for module in (data, grok, analyze) for name in vars(module)}
    for cell in CODE:
        mine = {node.name for node in ast.walk(tree_of(cell))
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert not theirs & mine, theirs & mine
        assert max(map(len, cell.source.splitlines())) <= 100, cell.source


def test_garbage_is_judged_and_raises_nothing(capsys):
    garbage = (None, "x", 3.5, [], [[1, 2], [3]], {"a": 1}, float("nan"), object())
    for thing in garbage:
        checks.own_facts(thing, thing, thing)
        checks.map_point(thing, thing)
        checks.loops(thing, thing)
        checks.site_moves(thing)
        for check in (checks.control, checks.other_head, checks.mean_ablation, checks.hidden_code):
            check(lambda *values: thing)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 * len(garbage)
    assert all(line.startswith("not yet: ") for line in lines), lines


# ---------------------------------------------------------------- the student's copy
def test_the_copy_holds_neither_outputs_nor_answers_nor_solutions(written):
    text = (written / "tutorial_student.ipynb").read_text(encoding="utf-8")
    copied = json.loads(text)
    assert "<details>" not in text and '"solution"' not in text and "<b>Answer" not in text
    page = (written / "solutions.md").read_text(encoding="utf-8")
    solutions = re.findall("```python\n(.*?)```", page, re.DOTALL)
    assert len(solutions) == len(WRONG) == page.count("## Exercise")
    sources = ["".join(cell["source"]) for cell in copied["cells"]]
    for solution in solutions:
        assert not any(solution.strip() in source for source in sources)
    for cell in copied["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
        else:
            assert cell["source"].strip()
    stubs = sum("stub" in cell["metadata"].get("tags", ()) for cell in copied["cells"])
    assert stubs == len(WRONG)
    folded = student.FOLDED.findall("\n".join(PROSE))
    assert len(folded) > 25
    for answer in folded:
        assert answer.strip().removeprefix("```python\n") in page, answer


def test_what_is_not_folded_stays_in_the_copy(written):
    copied = nbformat.read(written / "tutorial_student.ipynb", as_version=4)
    text = "\n".join(cell.source for cell in copied.cells if cell.cell_type == "markdown")
    for word in ("**Predict", "**Recap.**", "### Exercise"):
        assert text.count(word) == "\n".join(PROSE).count(word), word


def test_a_file_that_is_no_notebook_is_refused(tmp_path):
    cell = {"cell_type": "code", "metadata": {}, "source": "x = 1"}
    bad = [[], {}, {"cells": [1]}, {"cells": [{}]}, {"cells": [{**cell, "source": [1]}]},
           {"cells": [{**cell, "metadata": None}]}]
    contents = [json.dumps(content).encode() for content in bad]
    for content in (*contents, b"", b"{", b"[" * 10**6, "\xe9".encode("latin-1")):
        (tmp_path / "bad.ipynb").write_bytes(content)
        with pytest.raises(data.BadInput, match="bad.ipynb"):
            student.read_notebook(tmp_path / "bad.ipynb")
    with pytest.raises(data.BadInput, match="none.ipynb"):
        student.read_notebook(tmp_path / "none.ipynb")
    good = json.dumps({"cells": [{**cell, "source": ["x = 1\n", "x"]}]}).encode()
    (tmp_path / "mark.ipynb").write_bytes(b"\xef\xbb\xbf" + good)
    assert student.read_notebook(tmp_path / "mark.ipynb")["cells"][0]["source"] == "x = 1\nx"


def test_the_student_command_runs_as_a_file_from_anywhere(written, tmp_path):
    """As an editor's Run button starts it; without docstrings; what it cannot do takes one line."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    command = [sys.executable, "-OO", str(HERE / "tools" / "student.py"), "-o"]
    done = subprocess.run([*command, "class"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    for name in ("tutorial_student.ipynb", "solutions.md"):
        assert (tmp_path / "class" / name).read_bytes() == (written / name).read_bytes()
    assert student.main(["-o", str(tmp_path / "file" / "below")]) == 2
    assert student.main(["--oot", "x"]) == 2


# ---------------------------------------------------------------- the page for teachers
def test_teaching_names_the_parts_that_there_are():
    parts = re.findall(r"^## (\d+\. .*)$", "\n".join(PROSE), re.MULTILINE)
    assert re.findall(r"\[(\d+\. [^\]]+)\]", TEACHING) == parts
    for number in map(int, re.findall(r"[Pp]art (\d+)", TEACHING)):
        assert 1 <= number <= len(parts)
    for number in map(int, re.findall(r"[Ee]xercise (\d+)", TEACHING)):
        assert number in WRONG
