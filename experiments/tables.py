"""The results page, and the tables behind it, from the files of the runs.

    python -m experiments.tables              writes README.md and tables/*.csv beside the runs
    python -m experiments.tables --check      says whether they are what the runs there give
    python -m experiments.tables --readme     writes README.md of the project, from readme.md

The words of a page stand in page.md or readme.md; the numbers come from here, in these places:

    {value:PLACE [FIELD]}      a number of the book: "mean (least–most)", or one FIELD of it
    {verdict:NAME}             holds, partly, differs or open (JUDGES), fails (predictions.txt)

and in tables a line "| = | {value:@1 PATH} | ..." is the pattern of the lines below it, each
"| label | @ GROUP; WORD |", which stand for @1 and @2. What a PLACE is, book.py says;
tables/TABLE.csv holds more than the page.
"""
import csv
import io
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
if not __package__:  # started as a script, `python experiments/tables.py`, from any folder
    sys.path.insert(0, str(HERE.parent))

from data import BadInput, decode, read_bytes
from experiments.book import FIELDS, RUN_COLUMNS, Book
from experiments.runs import get, read_runs
from experiments.verdicts import JUDGES, rule_of
from grok import Parser, command, say, write_file


# ---------------------------------------------------------------- the page
def fill(template, book):
    """The page: the template with its tables written out and all its places filled."""
    lines = []
    pattern = None
    for line in template.splitlines():
        if line.startswith("| = |"):
            pattern = cells_of(line)[1:]
            continue
        if not line.startswith("|"):
            pattern = None
        lines.append(line if pattern is None else fill_pattern(pattern, line))
    return book.fill("\n".join(lines)).rstrip() + "\n"


def fill_pattern(pattern, line):
    """The line "| label | @ KEY; KEY |" of a table as the pattern has it, with the keys for @1, @2,
    ...: its places are still to be filled."""
    label, *rest = cells_of(line)
    if len(rest) != 1 or not rest[0].startswith("@"):
        raise BadInput(f"template: {line}: is no line of a table with a pattern")
    cells = " | ".join([label, *pattern])
    for number, key in enumerate(rest[0].removeprefix("@").split(";"), 1):
        cells = cells.replace(f"@{number}", key.strip())
    return f"| {cells} |"


def cells_of(line):
    """["a", "b"] of "| a | b |"."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


# ---------------------------------------------------------------- files
CSVS = {  # table: the first words of the places in it
    "training": ("step", "times_as_late", "last accuracy", "last lens", "compositions"),
    "aim_and_store": ("fit aim", "end aim"), "swaps": ("fit site", "end site"),
    "seen": ("end test_id", "end test_ood"),
    "new_facts": ("500 accuracy", "2000 accuracy", "last accuracy", "r2_alone"),
    "others": ("film", "grokfast", "graft", "counts", "code", "text")}


def csv_of_places(book, table):
    """A line a place in one of CSVS, with the FIELDS of its Cell; new_facts has the runs on new
    facts alone, training all others."""
    rows = []
    for group, members in book.numbers.items():
        is_tuned = bool(get(members[0], "config new_facts")) if members else False
        if table in ("training", "new_facts") and is_tuned != (table == "new_facts"):
            continue
        for path in paths_of_group(members, table):
            cell = book.cell(f"{group} {path}")
            rows.append([group, path, *[getattr(cell, name) for name in FIELDS]])
    return write_csv(["runs", "path", *FIELDS], rows)


def paths_of_group(members, table):
    """The paths of a table that lead to a number in one of these runs, each once."""
    paths = {}
    for prefix in CSVS[table]:
        for numbers in members:
            paths.update(dict.fromkeys(paths_in(numbers, prefix)))
    return paths


def paths_in(tree, path):
    """Every path, beginning with this one, to a number that is no size and no chance level."""
    inner = get(tree, path)
    if isinstance(inner, dict):
        for name in inner:
            is_size = name in ("n", "left_out") or name.startswith("n_")
            if not is_size and not name.endswith("_chance"):
                yield from paths_in(tree, f"{path} {name}")
    elif isinstance(inner, (int, float)):
        yield path


def write_csv(head, rows):
    """Bytes of a CSV; shares to four digits, None is empty."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        writer.writerow([round(cell, 4) if isinstance(cell, float) else cell for cell in row])
    return text.getvalue().encode()


def read_template(name):
    """The text of a file beside this one."""
    return decode(read_bytes(HERE / name), name)


def all_files(root):
    """({path below ROOT: bytes} of page and tables, the Book)."""
    book = Book(read_runs(root))
    page = fill(read_template("page.md"), book)
    if book.runs.left_out:
        page += f"\nLeft out: {'; '.join(book.runs.left_out)}.\n"
    files = {"README.md": page.encode()}
    for table in CSVS:
        files[f"tables/{table}.csv"] = csv_of_places(book, table)
    columns = ["run", *RUN_COLUMNS, "redirected_by"]
    rows = []
    for row in book.rows:
        rows.append([row[column] for column in columns])
    files["tables/runs.csv"] = write_csv(columns, rows)
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
        raise BadInput(f"{out}: {', '.join(stale)}: not what the runs give; the same command "
                       "without --check writes its files anew")


def parse(argv=None):
    """The options, root filled in."""
    parser = Parser(prog="python -m experiments.tables",
                    description="The results page and its tables, from the files of the runs.")
    parser.add_argument("--root", type=Path, help="the folder of the runs (runs/shipped)")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER", help="write there (ROOT)")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="compare, and write nothing")
    instead.add_argument("--readme", action="store_true", help="write the README of the project")
    args = parser.parse_args(argv)
    for name in ("root", "out"):
        if args.readme and getattr(args, name):
            raise BadInput(f"{name} = {getattr(args, name)}: --readme writes README.md of the "
                           "project, from runs/shipped")
    args.root = args.root or HERE.parent / "runs" / "shipped"
    return args


@command("experiments.tables")
def main(argv=None):
    """Write or compare; exit status 0, or 2 for what cannot be used or is out of date."""
    args = parse(argv)
    files, book = all_files(args.root)
    out = args.out or args.root
    for reason in book.runs.left_out:
        print(f"experiments.tables: left out: {reason}", file=sys.stderr)
    if args.readme:
        text = fill(read_template("readme.md"), book)
        write_file(HERE.parent / "README.md", text.encode())
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
