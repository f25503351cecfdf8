"""The notebook, its exercises, the student's copy and the page for teachers.

One execution, of the student's copy, serves all tests: after each check it also runs wrong answers,
the solution and other right forms of it.
"""
import ast
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

import analyze
import data
import grok
from extras import facts, pictures, tables
from tools import student

HERE = Path(__file__).resolve().parent.parent
NOTEBOOK = nbformat.read(HERE / "tutorial.ipynb", as_version=4)
CODE = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
PROSE = [cell.source for cell in NOTEBOOK.cells if cell.cell_type == "markdown"]
TEACHING = (HERE / "extras" / "TEACHING.md").read_text(encoding="utf-8")

WRONG = {  # exercise: answers that must not pass
    1: ["loses, gains = 'test_ood_id', 3420",                   # copied from the page
        "loses, gains = 'test_id_ood', len(full['train_inferred'].h) - 17640",
        "loses, gains = 'test_ood', 500"],
    2: ["def three_hops(h, r1, r2, r3):\n    return 7",
        "def three_hops(h, r1, r2, r3):                         # a hop too few\n"
        "    return world.facts[world.index[world.facts[world.index[h, r1], 2], r2], 2]"],
    3: ["enough = 18", "enough = 72", "enough = 74", "enough = 1000"],
    4: ["shuffled = torch.randint(40, bridges.shape)            # random entities\n"
        "rates = grok.lens_rates(top, shuffled)\n"
        "luck_any, luck_one = rates['any'], rates['map'][2][2]",
        "shuffled = bridges.roll(1)                             # neighbours\n"
        "rates = grok.lens_rates(top, shuffled)\n"
        "luck_any, luck_one = rates['any'], rates['map'][2][2]",
        "rates = grok.lens_rates(top, bridges)\n"
        "shuffled, luck_any, luck_one = bridges, rates['any'], rates['map'][2][2]",
        "shuffled = bridges[torch.randperm(len(bridges))]\nluck_any, luck_one = 0.1, 0.03",
        "luck_any, luck_one = 0.5, 0.5"],
    5: ["right, fewest = {n: 0.98 for n in range(1, 9)}, 2",
        "right, fewest = {n: shares[n] for n in shares}, 4",
        "right, fewest = {1: shares[1]}, 2"],
    6: ["site = (2, 1)", "site = (5, 2)", "site = [0, 0]", "site = (4, 0)"],
    7: ["def other_head(clean, pool, rng):                      # the answer may be the same\n"
        "    c, d = analyze.pairs(clean, pool)\n"
        "    allowed = (c.r1 == d.r1) & (c.r2 == d.r2) & (c.b != d.b)\n"
        "    clean, donor = analyze.pick_donors(clean, pool, allowed, rng)\n"
        "    return clean, donor, donor.t",
        "def other_head(clean, pool, rng):                      # one pair alone\n"
        "    c, d = analyze.pairs(clean, pool)\n"
        "    allowed = (c.r1 == d.r1) & (c.r2 == d.r2) & (c.h != d.h) & (c.t != d.t)\n"
        "    clean, donor = analyze.pick_donors(clean, pool, allowed, rng)\n"
        "    return clean.take(slice(1)), donor.take(slice(1)), donor.t[:1]",
        "def other_head(clean, pool, rng):                      # the clean answer\n"
        "    c, d = analyze.pairs(clean, pool)\n"
        "    allowed = (c.r1 == d.r1) & (c.r2 == d.r2) & (c.h != d.h) & (c.t != d.t)\n"
        "    clean, donor = analyze.pick_donors(clean, pool, allowed, rng)\n"
        "    return clean, donor, clean.t"],
    8: ["def average(values):\n    return torch.zeros_like(values)",
        "def average(values):\n    return torch.randn(values.shape[1])",
        "def average(values):\n    return values.mean()",
        "def average(values):\n    return values.mean(1)"],
    9: ["def both(loop, part, value):                           # the first patch alone\n"
        "    if (loop, part) == (1, 'state'):\n        value[:, 0] = theirs[1, 1, :, 0]\n"
        "    return value",
        "def both(loop, part, value):                           # the second alone\n"
        "    if (loop, part) == (2, 'state'):\n        value[:, 1] = ours[2, 1, :, 1]\n"
        "    return value",
        "def both(loop, part, value):                           # the whole clean run put back\n"
        "    return ours[loop, analyze.PARTS.index(part)]"],
    10: ["def learn(values, bridges, n_entities):\n"
         "    return torch.randn(n_entities, values.shape[1])",
         "def learn(values, bridges, n_entities):                # what the lens looks for\n"
         "    return blind.vectors()[:n_entities]",
         "def learn(values, bridges, n_entities):                # the same for all\n"
         "    return values.mean(0).expand(n_entities, -1)",
         "def learn(values, bridges, n_entities):                # another entity's\n"
         "    return torch.stack([values[bridges == (b + 1) % n_entities].mean(0)\n"
         "                        for b in range(n_entities)])"]}
RIGHT = {  # exercise: other forms of a right answer
    1: ["gains = np.int64(gains)"],
    2: ["def three_hops(h, r1, r2, r3):\n    t = dict(zip(map(tuple, world.facts[:, :2]), "
        "world.facts[:, 2]))\n    return torch.tensor(t[t[t[h, r1], r2], r3])"],
    3: ["enough = np.int64(enough)"],
    4: ["luck_any, luck_one = round(luck_any, 2), torch.tensor(luck_one)",
        "shuffled = np.random.default_rng(1).permutation(asked.b).tolist()\n"
        "rates = grok.lens_rates(top, torch.tensor(shuffled))\n"
        "luck_any, luck_one = f\"{rates['any']:.2f}\", round(rates['map'][2][2], 2)"],
    5: ["right = {n: round(share, 2) for n, share in right.items()}",
        "right = {n: torch.tensor([share]) for n, share in right.items()}"],
    6: ["site = [4, 1]", "site = torch.tensor([4, 1])"],
    7: ["def other_head(clean, pool, rng):                      # b differs where t does\n"
        "    c, d = analyze.pairs(clean, pool)\n"
        "    allowed = (c.r1 == d.r1) & (c.r2 == d.r2) & (c.t != d.t)\n"
        "    clean, donor = analyze.pick_donors(clean, pool, allowed, rng)\n"
        "    return clean, donor, donor.t"],
    8: ["def average(values):\n    return values.mean(0, keepdim=True)",
        "def average(values):\n    return values.mean(0).expand_as(values)",
        "def average(values):\n    return values.numpy().mean(0)"],
    9: ["def both(loop, part, value):                           # in place\n"
        "    if part == 'state' and loop == 1:\n        value[:, 0] = theirs[1, 1, :, 0]\n"
        "    if part == 'state' and loop == 2:\n        value[:, 1] = ours[2, 1, :, 1]\n"
        "    return value"],
    10: ["def learn(values, bridges, n_entities):                # least squares\n"
         "    asked = torch.nn.functional.one_hot(bridges, n_entities).float()\n"
         "    return torch.linalg.lstsq(asked, values).solution",
         "def learn(values, bridges, n_entities):\n    return np.stack([values.numpy()[bridges.numpy()"
         " == b].mean(0) for b in range(n_entities)])"]}


def tagged(cell, tag):
    return tag in cell.metadata.get("tags", ())


def kinds(cell):
    """What else than printed lines a cell gives: text, picture, table."""
    found = []
    for out in cell.outputs:
        if out.get("name") != "stdout":
            found.append(sorted(out.get("data", [out.get("name")])))
    return found


def printed(cell):
    """What a cell printed or showed as text, without pictures."""
    shown = [out.get("text") or out["data"].get("text/markdown", "") for out in cell.outputs
             if out.get("name") != "stderr"]
    return "\n".join(line.rstrip() for line in "".join(shown).splitlines())


def apart(text):
    """(text without its numbers, the numbers): another machine may round the last digit apart."""
    number = r"\d+(?:\.\d+)?"
    return re.sub(number, "#", text), [float(found) for found in re.findall(number, text)]


def added(source, check, kind, number):
    """Cells that run an answer to an exercise and then its check."""
    cells = [nbformat.v4.new_code_cell(text) for text in (source, check.source)]
    for cell in cells:
        cell.metadata.update(tags=["added"], kind=kind, number=number)
    return cells


def with_answers(copied, solutions):
    """The student's copy; after every check wrong answers, the solution, other right forms."""
    cells, number = [], 0
    for cell in copied.cells:
        cells.append(copy.deepcopy(cell))
        if tagged(cell, "check"):
            number += 1
            answers = [("wrong", source) for source in WRONG[number]]
            answers += [("right", source) for source in (solutions[number - 1], *RIGHT[number])]
            for kind, source in answers:
                cells += added(source, cell, kind, number)
    return nbformat.v4.new_notebook(cells=cells, metadata=copied.metadata)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The folder that tools.student writes."""
    out = tmp_path_factory.mktemp("student")
    assert student.main(["-o", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def executed(written):
    """Code cells of the student's copy with answers, run once."""
    page = (written / "solutions.md").read_text(encoding="utf-8")
    copied = nbformat.read(written / "tutorial_student.ipynb", as_version=4)
    notebook = with_answers(copied, re.findall("```python\n(.*?)```", page, re.DOTALL))
    where = {"metadata": {"path": str(HERE)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=where).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


# ---------------------------------------------------------------- the execution
def test_the_copy_runs_and_shows_what_is_committed(executed):
    """No cell fails; every number is the committed one, but for cells that train ("varies")."""
    fresh = [cell for cell in executed if not tagged(cell, "added")]
    assert [cell.source for cell in fresh] == [cell.source for cell in CODE]
    for cell, committed in zip(fresh, CODE):
        assert kinds(cell) == kinds(committed), cell.source      # pictures where pictures were
        if not tagged(cell, "varies"):
            (words, numbers), (other, wanted) = map(apart, (printed(cell), printed(committed)))
            assert words == other, cell.source
            assert numbers == pytest.approx(wanted, abs=0.011), cell.source


def test_stubs_and_wrong_answers_fail_and_right_ones_pass(executed):
    checks = [cell for cell in executed if tagged(cell, "check")]
    assert 8 <= len(checks) == len(WRONG) == len(RIGHT) <= 10
    for cell in checks:                                          # the stub
        assert printed(cell).startswith("not yet: "), cell.source
    sources = {cell.source for cell in checks}
    answers = [pair for pair in zip(executed, executed[1:]) if tagged(pair[1], "added")
               and tagged(pair[0], "added") and pair[1].source in sources]
    assert len(answers) == sum(map(len, [*WRONG.values(), *RIGHT.values()])) + len(checks)
    for answer, check in answers:
        verdict = printed(check).split("\n")[0]
        if check.metadata["kind"] == "right":
            assert verdict == "right", (answer.source, verdict)
        else:
            assert verdict.startswith("not yet: "), (answer.source, verdict)


# ---------------------------------------------------------------- what is committed
def test_committed_outputs_come_from_one_clean_run():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    for cell in CODE:
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", cell.source


def test_small_and_says_nothing_of_a_machine():
    text = nbformat.writes(NOTEBOOK)
    assert len(text.encode("utf-8")) < 3_000_000
    plain = re.sub('"image/png": "[^"]*"', "", text)
    assert not re.findall(r"/(?:work|tmp|root|home|Users|content)\b|[A-Z]:\\\\", plain)
    assert "TODO" not in text and not re.search(r"it/s|\d%\|", plain)  # no progress bar


def test_live_cells_are_there_and_only_they_vary():
    varies = [cell.source for cell in CODE if tagged(cell, "varies")]
    assert len(varies) == 2 and all("train_step" in source for source in varies)
    assert not any("train_step" in cell.source for cell in CODE if not tagged(cell, "varies"))


def test_folded_answers_bring_no_numbers_of_their_own():
    """Shares come from outputs alone, so that no answer can disagree with a table."""
    folded = [text for text in PROSE if "<summary><b>Answer" in text]
    assert len(folded) > 15
    for text in folded:
        assert not re.search(r"\d*\.\d", text), text


def test_defines_nothing_that_the_modules_have():
    modules = data, grok, analyze, tables, facts, pictures
    theirs = {name for module in modules for name in vars(module)}
    for cell in CODE:
        tree = ast.parse(cell.source.replace("%matplotlib inline", ""))
        mine = {node.name for node in ast.walk(tree)
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        assert not theirs & mine, theirs & mine


def test_the_fields_words_are_named():
    text = " ".join("\n".join(PROSE).lower().split())
    for word in ("interchange intervention", "noising", "denoising", "subspace patching",
                 "illusion", "mean ablation", "path patching", "logit difference", "argmax"):
        assert word in text, word


# ---------------------------------------------------------------- the student's copy
def test_the_copy_holds_neither_outputs_nor_solutions(written):
    text = (written / "tutorial_student.ipynb").read_text(encoding="utf-8")
    copied = json.loads(text)
    assert "Solution" not in text and '"solution"' not in text
    page = (written / "solutions.md").read_text(encoding="utf-8")
    solutions = re.findall("```python\n(.*?)```", page, re.DOTALL)
    assert len(solutions) == len(WRONG) == page.count("## Exercise")
    sources = ["".join(cell["source"]) for cell in copied["cells"]]
    for solution in solutions:
        assert not any(solution.strip() in source for source in sources)
    for cell in copied["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
    stubs = sum("stub" in cell["metadata"].get("tags", ()) for cell in copied["cells"])
    assert stubs == len(WRONG)


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
    parts = [re.match(r"## (\d+\. .*)", text) for text in PROSE]
    parts = [found.group(1) for found in parts if found]
    assert re.findall(r"\[(\d+\. [^\]]+)\]", TEACHING) == parts
    for number in map(int, re.findall(r"[Pp]art (\d+)", TEACHING)):
        assert 1 <= number <= len(parts)
    for number in map(int, re.findall(r"[Ee]xercise (\d+)", TEACHING)):
        assert number in WRONG


def test_teaching_plan_fills_two_times_ninety_minutes():
    plans = TEACHING.split("| minutes | ")[1:]
    assert [sum(map(int, re.findall(r"^\| (\d+) \|", plan.split("\n\n")[0], re.M)))
            for plan in plans] == [90, 90]


def test_the_quiz_has_five_questions_and_answers():
    questions, answers = TEACHING.split("## Exit quiz")[1].split("### Answers")
    for part in (questions, answers):
        assert re.findall(r"^(\d)\. ", part, re.M) == list("12345")
