"""The notebook for a class: a copy without outputs and without solutions, and a page of solutions.

    python -m extras.student [-o FOLDER]     writes tutorial_student.ipynb and solutions.md

The copy runs beside data.py, grok.py and analyze.py, so FOLDER is by default the one they lie in.
"""
import argparse
import json
import sys
from pathlib import Path

from data import BadInput
from grok import say, write_file

HERE = Path(__file__).resolve().parent.parent


def read_notebook(path):
    """The notebook as nested dicts and lists, each cell's source as one text."""
    try:
        notebook = json.loads(Path(path).read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            cell["source"] = "".join(cell["source"])
        return notebook
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}")
    except (ValueError, KeyError, TypeError):
        raise BadInput(f"{path}: is damaged, or no notebook")


def is_solution(cell):
    return "solution" in cell["metadata"].get("tags", ())


def student_copy(notebook):
    """The notebook without solutions, outputs and execution counts; stubs and checks stay."""
    cells = [dict(cell) for cell in notebook["cells"] if not is_solution(cell)]
    for cell in cells:
        if cell["cell_type"] == "code":
            cell.update(outputs=[], execution_count=None)
    return {**notebook, "cells": cells}


def solutions(notebook):
    """Markdown: the heading of every exercise and, under it, its solution."""
    parts, heading = ["# Solutions to the exercises of tutorial.ipynb"], ""
    for cell in notebook["cells"]:
        first = cell["source"].split("\n")[0]
        if first.startswith("### "):
            heading = first.removeprefix("#")
        if is_solution(cell):
            code = cell["source"].split("```")[1]                # "python", then the lines
            parts += [heading, f"```{code}```"]
    return "\n\n".join(parts) + "\n"


def main(argv=None):
    """Write both files; exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="extras.student", description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--out", type=Path, default=HERE, help="folder (beside grok.py)")
    out = parser.parse_args(argv).out
    try:
        notebook = read_notebook(HERE / "tutorial.ipynb")
        text = json.dumps(student_copy(notebook), indent=1, ensure_ascii=False) + "\n"
        page = solutions(notebook)
        out.mkdir(parents=True, exist_ok=True)
        for name, content in (("tutorial_student.ipynb", text), ("solutions.md", page)):
            write_file(out / name, content.encode("utf-8"))
            say(str(out / name))
    except (BadInput, OSError) as error:
        print(f"extras.student: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
