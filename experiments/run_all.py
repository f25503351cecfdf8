"""Train every run of a plan, each in a process of its own, as many at once as there are processors.

    python -m extras.run_all                      every run of extras/plan.txt, into runs/mine
    python -m extras.run_all --only "small/*"     those with such a name
    python -m extras.run_all --list               their command lines, and nothing is trained

A line of the plan is a name and options of grok.py: `small/natural  --preset small`. It is trained
for seeds 0, 1, 2 into ROOT/small/natural/seed0 and so on. `--start NAME` in a line means the run of
that name and seed, `--start NAME/seed5` that one for every seed; it comes first. `seeds=8` at the
end of a line are seeds 0 to 7, `seeds=3-7` these five, `seeds=4,6` these two.
"""
import argparse
import fnmatch
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grok
from data import BadInput

HERE = Path(__file__).resolve().parent
GROK = HERE.parent / "grok.py"
TO_DIVIDE = """\
To divide a plan over tasks or machines, let what starts them do it: --list prints one command a
line. First those that start from no other run, then the rest:

    python -m extras.run_all --list > all.txt
    grep -v -e --start all.txt | xargs -L 1 -P 8 env OMP_NUM_THREADS=1
    grep -e --start all.txt | xargs -L 1 -P 8 env OMP_NUM_THREADS=1

or, as a task of an array job:  sed -n "${SLURM_ARRAY_TASK_ID}p" all.txt | sh
"""


def read_plan(path, usual):
    """{name: (options but --start, its name or None, its seeds)}, in the file's order."""
    plan = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip() and not line.strip().startswith("#"):
            try:
                name, *options = shlex.split(line)
                plan[name] = read_options(name, options, plan, usual)
            except ValueError as error:  # BadInput is one; shlex: a quotation is not closed
                raise BadInput(f"{path}, line {number}: {error}")
    return plan


def read_options(name, options, above, usual):
    """What `read_plan` holds of one line; `above` are the lines before it."""
    if name in above or name.startswith("-") or not Path(name).parts or Path(name).is_absolute():
        raise BadInput(f"name = {name}: must be a folder's, and no other line's")
    text = str(usual)
    if options and options[-1].startswith("seeds="):
        text = options.pop().removeprefix("seeds=")
    seeds = read_seeds(text)
    given = grok.parse(options)  # a wrong option is found before anything is trained
    start = given["start"]
    grok.refuse(given, ("seed", "out"), "each run gets its own")
    if not seeds:
        raise BadInput(f"seeds = {text}: must be 1 or more, or like 3-7, or like 4,6")
    for seed in seeds if start else ():
        source, _, number = run_of(start, seed).rpartition("/seed")
        if source not in above or int(number) not in above[source][2]:
            raise BadInput(f"start = {start}: no line above trains {source}/seed{number}")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--start")
    return parser.parse_known_args(options)[1], start, seeds


def read_seeds(text):
    """The seeds that "8", "3-7" or "4,6" names."""
    least, dash, most = text.partition("-")
    if dash:
        return range(int(least), int(most) + 1)
    return [int(seed) for seed in text.split(",")] if "," in text else range(int(text))


def run_of(start, seed):
    """The run that the run of this seed starts from, NAME/seedK."""
    return start if re.search(r"/seed\d+$", start) else f"{start}/seed{seed}"


def every_run(plan, root):
    """{NAME/seedK: (all that comes after `python grok.py`, the run to start from or None)}."""
    runs = {}
    for name, (options, start, seeds) in plan.items():
        for seed in seeds:
            run, source = f"{name}/seed{seed}", run_of(start, seed) if start else None
            begin = ["--start", str(root / source)] if start else []
            own = ["--seed", str(seed), "--out", str(root / run)]
            runs[run] = [*options, *begin, *own], source
    return runs


def train_all(runs, at_once, signals):
    """{name: exit status} of the runs, trained; a skipped one has the status of its start.

    Something in the list `signals` ends it at once, and with it every process that it started.
    """
    status, training, minutes = {}, {}, []
    try:
        while len(status) < len(runs) and not signals:
            for name, (options, start) in runs.items():
                if name in status or name in training or start in runs and start not in status:
                    continue
                if status.get(start):
                    status[name], said = status[start], f"skipped, {start} has failed"
                    grok.say(f"{len(status)}/{len(runs)} {name}: {said}")
                elif len(training) < at_once:
                    training[name] = begin(options)
            time.sleep(0.1)
            for name in [name for name in training if training[name][0].poll() is not None]:
                status[name], said = finish(*training.pop(name), minutes)
                left = sum(minutes) / max(1, len(minutes)) * (len(runs) - len(status)) / at_once
                grok.say(f"{len(status)}/{len(runs)} {name}: {said}; about {left:.0f} minutes left")
    finally:
        for process, *_ in training.values():
            process.kill()
            process.wait()
    return status


def begin(options):
    """(process, file of what it prints, when it began) of a training on one thread."""
    output = tempfile.TemporaryFile()
    process = subprocess.Popen([sys.executable, str(GROK), *options], stdout=output,
                               stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
    return process, output, time.perf_counter()


def finish(process, output, began, minutes):
    """(exit status, words) of a training that has ended; `minutes` gets the time that it took."""
    with output:
        output.seek(0)
        lines = output.read().decode("utf-8", "replace").splitlines()
    if process.returncode:
        return abs(process.returncode), f"FAILED, {process.returncode}: {['', *lines][-1]}"
    if "already done" in lines:
        return 0, "already done"
    minutes.append((time.perf_counter() - began) / 60)
    return 0, f"trained in {minutes[-1]:.1f} minutes"


def processors():
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def parse(argv):
    parser = grok.Parser(prog="python -m extras.run_all", description=__doc__, epilog=TO_DIVIDE,
                         allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--plan", type=Path, default=HERE / "plan.txt", help="(extras/plan.txt)")
    parser.add_argument("--root", type=Path, default="runs/mine", help="(runs/mine)")
    parser.add_argument("--seeds", type=int, default=3, help="of a line that names no number (3)")
    parser.add_argument("--only", default="*", help="names like this; what they start from must "
                                                    "be among them,\nor lie under ROOT (*)")
    parser.add_argument("--at-once", type=int, default=processors(),
                        help="(as many as processors allowed; on a GPU, what its memory holds)")
    parser.add_argument("--list", action="store_true", help="print the command lines")
    return parser.parse_args(argv)


def print_all(lines):
    """Print them; 0, also if whoever reads, as `head` does, stops before the end."""
    try:
        grok.say("\n".join(lines))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to flush
    return 0


def main(argv=None):
    """Run the command line; returns the worst exit status of all runs, 2 for bad input, and
    128 + the signal's number when a signal ended it."""
    signals, before = [], {}

    def note(number, frame):
        signals.append(number)

    try:
        given = parse(sys.argv[1:] if argv is None else argv)
        if given.at_once < 1:
            raise BadInput(f"at_once = {given.at_once}: must be 1 or more")
        plan = read_plan(given.plan, given.seeds)
        chosen = {name: line for name, line in plan.items() if fnmatch.fnmatch(name, given.only)}
        if not chosen:
            raise BadInput(f"only = {given.only}: must be like one of {', '.join(plan)}")
    except (BadInput, OSError) as error:
        print(f"run_all: {error}", file=sys.stderr)
        return 2
    runs = every_run(chosen, given.root)
    if given.list:
        return print_all(shlex.join(["python", "grok.py", *line]) for line, _ in runs.values())
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number and signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
            before[number] = signal.signal(number, note)
    try:
        status = train_all(runs, given.at_once, signals)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + signals[0] if signals else max(status.values())


if __name__ == "__main__":
    sys.exit(main())
