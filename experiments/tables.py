"""The results page, and the tables behind it, from the files of the runs.

    python -m experiments.tables              writes README.md and tables/*.csv into runs/shipped
    python -m experiments.tables --check      says whether they are what the runs there give
    python -m experiments.tables --readme     writes README.md of the project, from readme.md

The words of a page stand in page.md or readme.md; the numbers come from here, in these places:

    {value:TABLE KEY ... [FIELD]}   a Cell of the book: "mean (least to most)", or one FIELD of it
    {verdict:NAME}                  holds, partly, differs or open (JUDGES), fails (predictions.txt)
    {exceptions} {left_out}         a table of runs; the runs that cannot be used, and why
    {when NAME: WORD ...} ... {end} lines that stand only if the verdict is one of these words

and in tables a line "| = | TABLE @1 KEY | ..." says what is looked up in the lines below it, each
"| label | @ KEY; KEY |". A line without a run is left out, and a sentence below says so.

The book is {table: {keys: Cell}}; tables/TABLE.csv holds all of a table, a line a Cell.
"""
import csv
import io
import re
import sys
import textwrap
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # started as a script, `python experiments/tables.py`, from any folder
    sys.path.insert(0, str(HERE.parent))

from analyze import short
from data import BadInput, decode, read_bytes
from experiments.book import (FIELDS, KEYS, NEVER, NO_CSV, NO_RUN, PAPER, RUN_COLUMNS, Book,
                              exceptions, read_runs)
from experiments.verdicts import JUDGES, rule_of
from grok import Parser, command, say, write_file


# ---------------------------------------------------------------- the page
def fill(template, book):
    """The page: the template with all its places filled."""
    lines = []
    stands = True
    for line in template.splitlines():
        if line.startswith("{when "):
            name, _, words = line.strip("{}").removeprefix("when ").partition(":")
            stands = book.verdicts[name] in words.split()
        elif line == "{end}":
            stands = True
        elif stands:
            lines.append(line)
    text = fill_places("\n".join(fill_tables(lines, book)), book)
    text = re.sub(r"\n{3,}", "\n\n", text) + "\n"
    return re.sub(r"^\|.*", narrow, text, flags=re.MULTILINE)


def narrow(match):
    """A line of a table in which "1 to 2" is "1–2"."""
    return re.sub(r"(\d) to (\.?\d)", r"\1–\2", match.group())


def readme(book):
    """The README of the project, its paragraphs wrapped anew now that the numbers are in."""
    blocks = []
    fenced = False
    for block in fill(read_template("readme.md"), book).split("\n\n"):
        if block.count("```") == 1:
            fenced = not fenced
        is_prose = not fenced and not block.startswith(("#", "|", "!", "```", "  ", "<"))
        blocks.append(wrap(block) if is_prose else block)
    return "\n\n".join(blocks).rstrip("\n") + "\n"


def wrap(block):
    """A paragraph, or a list of items that begin with "- ", in lines of 120 characters."""
    items = re.split(r"\n(?=- )", block)
    return "\n".join(textwrap.fill(" ".join(item.split()), 120, break_long_words=False,
                                   break_on_hyphens=False,
                                   subsequent_indent="  " if item.startswith("- ") else "")
                     for item in items)


def fill_places(text, book):
    """The text with its {value:...}, {verdict:...} and the like filled."""
    def put(match):
        kind, _, words = match.group(1).partition(":")
        if kind == "value":
            return book.say(words)
        if kind == "verdict" and words in book.verdicts:
            return book.verdicts[words]
        if kind == "exceptions":
            return exceptions_table(book)
        if kind == "left_out":
            return left_out_sentence(book.runs)
        raise BadInput(f"template: {match.group(0)}: is no place")

    return re.sub(r"\{([^{}]*)\}", put, text)


def fill_tables(lines, book):
    """The lines with those of tables that have a pattern, "| = | ...", looked up."""
    result = []
    pattern = None
    left_out = []
    for line in [*lines, ""]:
        if line.startswith("| = |"):
            pattern = cells_of(line)[1:]
            continue
        if pattern and not line.startswith("|"):
            end_table(result, left_out)
            pattern = None
            left_out = []
        if pattern:
            row = fill_row(line, pattern, book)
            if row is None:
                left_out.append(cells_of(line)[0])
                continue
            line = row
        result.append(line)
    return result[:-1]


def cells_of(line):
    """["a", "b"] of "| a | b |"."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def fill_row(line, pattern, book):
    """"| label | @ KEY; KEY |" with the cells of the pattern looked up; None if there is no run."""
    label, keys = cells_of(line)
    keys = keys.removeprefix("@").split(";")
    filled = [label]
    looked_up = []
    for words in pattern:
        for number, key in enumerate(keys, 1):
            words = words.replace(f"@{number}", key.strip())
        if words.split()[0] in KEYS:
            words = book.say(words)
            looked_up.append(words)
        filled.append(words)
    if set(looked_up) == {NO_RUN}:
        return None
    return f"| {' | '.join(filled)} |"


def end_table(lines, left_out):
    """Add what was left out of a table; one without rows goes, with its head."""
    if left_out and lines[-1].startswith("| ---"):
        del lines[-2:]
        lines.append("*No run of this table is there yet.*")
    elif left_out:
        lines += ["", f"*Left out, as there is no run yet: {'; '.join(left_out)}.*"]


def exceptions_table(book, most=5):
    """Markdown of those of the exceptions() of which four sites together redirect most."""
    rows = exceptions(book.rows)
    rows.sort(key=share_together, reverse=True)
    if not rows:
        return "*There is none.*"
    lines = ["| run | answers | a donor redirects | its code redirects | four sites together |",
             "| --- | --- | --- | --- | --- |"]
    for row in rows[:most]:
        shown = [short(row[name]) for name in ("answer", "donor", "code", "together")]
        lines.append(f"| `{row['run']}` | {' | '.join(shown)} |")
    return "\n".join(lines)


def share_together(row):
    """What four sites together redirect, of a row of runs.csv; -1 if that was not tried."""
    return -1 if row["together"] is None else row["together"]


def left_out_sentence(runs):
    """Which runs cannot be used, and why."""
    if not runs.left_out:
        return ""
    return f"Left out: {'; '.join(runs.left_out)}."


# ---------------------------------------------------------------- files
def write_csv(head, rows):
    """Bytes of a CSV; shares to four digits, None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([round(cell, 4) if isinstance(cell, float) else cell for cell in row])
    return text.getvalue().encode()


def csv_of_cells(book, table):
    """A line a Cell that has a value, or that says "never"."""
    rows = []
    for keys, cell in book[table].items():
        if cell.have or cell.kind in NEVER:
            rows.append([*keys, *(getattr(cell, name) for name in FIELDS)])
    return write_csv([*KEYS[table], *FIELDS], rows)


def read_template(name):
    """The text of a file beside this one."""
    return decode(read_bytes(HERE / name), name)


def all_files(root):
    """({path below ROOT: bytes} of page and tables, the Book)."""
    book = Book(read_runs(root))
    files = {"README.md": fill(read_template("page.md"), book).encode()}
    for table in KEYS:
        if table not in NO_CSV:
            files[f"tables/{table}.csv"] = csv_of_cells(book, table)
    columns = ["run", "preset", *RUN_COLUMNS, "together", "class"]
    rows = []
    for row in book.rows:
        rows.append([row[column] for column in columns])
    files["tables/runs.csv"] = write_csv(columns, rows)
    paper = [[*keys, number, source] for keys, (number, source) in PAPER.items()]
    files["tables/paper.csv"] = write_csv(["runs", "measure", "number", "source"], paper)
    files["tables/verdicts.csv"] = csv_of_verdicts(book)
    files["tables/predictions.csv"] = write_csv(
        ["name", "prediction", "number of", "number", "rule", "level", "outcome"], book.predictions)
    return files, book


def csv_of_verdicts(book):
    """A line a verdict: over both models, in each, and the rule."""
    rows = []
    for name in JUDGES:
        words = [book.verdicts[key] for key in (name, f"{name} small", f"{name} trm")]
        rows.append([name, *words, rule_of(name)])
    return write_csv(["name", "verdict", "small", "trm", "rule"], rows)


def compare(files, out):
    """Refuse, by name, files that are not what the runs give."""
    stale = [name for name, content in files.items()
             if not (out / name).exists() or (out / name).read_bytes() != content]
    stale += [path.relative_to(out).as_posix() for path in sorted(out.glob("tables/*"))
              if path.relative_to(out).as_posix() not in files]
    if stale:
        raise BadInput(f"{out}: {', '.join(stale)}: not what the runs give; write them anew with "
                       "python -m experiments.tables")


def parse(argv=None):
    parser = Parser(prog="python -m experiments.tables",
                    description="The results page and its tables, from the files of the runs.")
    parser.add_argument("--root", type=Path, default=HERE.parent / "runs" / "shipped",
                        help="the folder of the runs (runs/shipped)")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="write there (ROOT)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="compare, and write nothing")
    instead.add_argument("--readme", action="store_true", help="write the README of the project")
    args = parser.parse_args(argv)
    if args.readme and args.out:
        raise BadInput(f"out = {args.out}: --readme writes README.md of the project")
    return args


@command("experiments.tables")
def main(argv=None):
    """Write, compare or print; exit status 0, or 2 for what cannot be used or is out of date."""
    args = parse(argv)
    files, book = all_files(args.root)
    out = args.out or args.root
    if book.runs.left_out:
        print(f"experiments.tables: {left_out_sentence(book.runs)}", file=sys.stderr)
    if args.readme:
        write_file(HERE.parent / "README.md", readme(book).encode())
    elif args.check:
        compare(files, out)
        say(f"{len(files)} files are what the runs give")
    else:
        (out / "tables").mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_file(out / name, content)
        say(f"{len(files)} files in {out.as_posix()}")


if __name__ == "__main__":
    sys.exit(main())
