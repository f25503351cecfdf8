"""The notebook for a class: a copy without outputs, answers and solutions, and a page with these.

    python -m tools.student [-o FOLDER]     writes tutorial_student.ipynb and solutions.md

The copy runs beside data.py, grok.py and analyze.py, so FOLDER is by default the one they lie in.
"""
import json
import re
import sys
from pathlib import Path

if not __package__:  # an editor's Run button starts this file and not the module
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import decode, read_bytes, reading
from grok import Parser, command, say, write_file

HERE = Path(__file__).resolve().parent.parent
FOLDED = re.compile(r"<details><summary>.*?</summary>(.*?)</details>", re.DOTALL)


def read_notebook(path):
    """The notebook as nested dicts and lists, each cell's source as one text; BadInput if the file
    cannot be read or is no notebook."""
    text = decode(read_bytes(path), path)
    with reading(path, "is damaged, or no notebook"):
        notebook = json.loads(text)
        if not isinstance(notebook, dict):
            raise ValueError("holds no dict")
        for cell in notebook["cells"]:
            check_cell(cell)
            cell["source"] = "".join(cell["source"])
    return notebook


def check_cell(cell):
    """ValueError unless a cell has what is needed of it here."""
    if not isinstance(cell, dict) or not {"cell_type", "metadata", "source"} <= cell.keys():
        raise ValueError("a cell lacks its type, metadata or source")
    if not isinstance(cell["metadata"], dict):
        raise ValueError("the metadata of a cell are no dict")
    source = cell["source"]  # a text, or a list of its lines
    if not isinstance(source, (str, list)) or not all(isinstance(line, str) for line in source):
        raise ValueError("the source of a cell is no text")


def is_solution(cell):
    """Whether a cell is tagged as a solution."""
    return "solution" in cell["metadata"].get("tags", ())


def student_copy(notebook):
    """The notebook without solutions, folded answers, outputs and execution counts; stubs stay."""
    cells = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cells.append({**cell, "outputs": [], "execution_count": None})
            continue
        source = FOLDED.sub("", cell["source"]).strip()
        if source and not is_solution(cell):
            cells.append({**cell, "source": source})
    return {**notebook, "cells": cells}


def answers(notebook):
    """Markdown: the heading of every part and, under it, the folded answers to its predictions."""
    parts = ["# Answers to the predictions of tutorial.ipynb"]
    for cell in notebook["cells"]:
        if cell["cell_type"] != "markdown" or is_solution(cell):
            continue
        headings = re.findall(r"^## .*", cell["source"], re.MULTILINE)
        parts.extend(headings)
        parts.extend(text.strip() for text in FOLDED.findall(cell["source"]))
    return "\n\n".join(parts) + "\n"


def solutions(notebook):
    """Markdown: the heading of every exercise and, under it, its solution."""
    parts = ["# Solutions to the exercises of tutorial.ipynb"]
    heading = ""
    for cell in notebook["cells"]:
        first_line = cell["source"].split("\n")[0]
        if first_line.startswith("### "):
            heading = first_line.removeprefix("#")
        if is_solution(cell):
            code = cell["source"].split("```")[1]  # "python", then the lines
            parts.append(heading)
            parts.append(f"```{code}```")
    return "\n\n".join(parts) + "\n"


def write_files(out):
    """Write both files to the folder `out`."""
    notebook = read_notebook(HERE / "tutorial.ipynb")
    copied = json.dumps(student_copy(notebook), indent=1, ensure_ascii=False) + "\n"
    page = answers(notebook) + "\n" + solutions(notebook)
    files = {"tutorial_student.ipynb": copied, "solutions.md": page}
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write_file(out / name, text.encode("utf-8"))
        say((out / name).as_posix())


@command("student")
def main(argv=None):
    """Write both files; exit status 0, 2 for bad input, 130 when stopped."""
    parser = Parser(prog="python -m tools.student",
                    description="The notebook for a class: a copy without outputs, answers and "
                    "solutions, tutorial_student.ipynb, and a page with these, solutions.md.")
    parser.add_argument("-o", "--out", type=Path, default=HERE, metavar="FOLDER",
                        help="where they go (beside grok.py)")
    write_files(parser.parse_args(argv).out)


if __name__ == "__main__":
    sys.exit(main())
