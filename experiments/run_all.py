"""Train every run of a plan, each in a process of its own, as many at once as there are processors.

    python -m experiments.run_all                      every run of plan.txt, into runs/mine
    python -m experiments.run_all --only "small/*"     those of the lines with such a name
    python -m experiments.run_all --list               their command lines; nothing is trained

What has been trained is not trained again, and what was interrupted goes on where it was.
"""
import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

HERE = Path(__file__).resolve().parent
if not __package__:  # started as a script, `python experiments/run_all.py`, from any folder
    sys.path.insert(0, str(HERE.parent))

import grok
from data import BadInput, decode, read_bytes

GROK = HERE.parent / "grok.py"
SEEDS = 3  # of a line that does not say how many
HELP = """\
A line of the plan is a name and options of grok.py:

    small/natural           --preset small --steps 7000
    tune/small_natural_end  --start small/natural

It is trained for the seeds 0, 1 and 2, in ROOT/small/natural/seed0 and so on; with seeds=N at its
end, for the seeds 0 to N - 1. `--start NAME` means the run of that name and of the same seed.

To divide a plan over machines or tasks, let what starts them do it: --list prints one command a
line. First come those that start from no other run, then the rest:

    python -m experiments.run_all --list > all.txt
    grep -v -e --start all.txt | xargs -L 1 -P 8 env OMP_NUM_THREADS=1
    grep -e --start all.txt | xargs -L 1 -P 8 env OMP_NUM_THREADS=1

or, as a task of an array job:  sed -n "${SLURM_ARRAY_TASK_ID}p" all.txt | sh
"""


# ---------------------------------------------------------------- the plan
@dataclass(frozen=True)
class Line:
    """A line of the plan."""
    options: list  # of grok.py, without --start
    start: str     # name of the line whose runs its runs start from, or None
    n_seeds: int


@dataclass(frozen=True)
class Run:
    """A run of the plan; its name is that of its folder under ROOT, small/natural/seed0."""
    options: list  # all that comes after `python grok.py`
    start: str     # name of the run it starts from, or None


def read_plan(path):
    """{name: Line} in the order of the file; a line that begins with # is a comment. BadInput names
    the line that grok.py would refuse, as far as that can be told before anything is trained."""
    plan = {}
    for number, text in enumerate(decode(read_bytes(path), path).split("\n"), 1):
        if not text.strip() or text.strip().startswith("#"):
            continue
        try:
            name, *options = split_words(text)
            check_name(name, plan)
            plan[name] = read_line(options, plan)
        except BadInput as error:
            raise BadInput(f"{path}, line {number}: {error}")
    if not plan:
        raise BadInput(f"{path}: holds no run")
    return plan


def split_words(text):
    """The words of a line, as a shell splits them."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise BadInput(str(error))


def check_name(name, above):
    """Refuse a name that is no folder's under ROOT, or another line's above it."""
    path = PurePosixPath(name)
    is_plain = path.as_posix() == name and path.parts and ".." not in path.parts
    if not is_plain or path.is_absolute() or name.startswith("-"):
        raise BadInput(f"name = {name}: must be that of a folder, like small/natural")
    if name in above:
        raise BadInput(f"name = {name}: is the name of a line above")


def read_line(options, above):
    """The Line with these words after its name; `above` are the lines before it."""
    n_seeds = SEEDS
    if options and options[-1].startswith("seeds="):
        n_seeds = read_seeds(options.pop().removeprefix("seeds="))
    given = grok.parse(options)
    for name in ("seed", "out"):
        if given[name] is not None:
            raise BadInput(f"{name} = {given[name]}: each run gets its own, leave it out")
    start = given["start"]
    if start is None:
        # what a device or a file of facts brings is seen where the run is trained
        grok.settle({**given, "device": None, "facts": None})
    elif start not in above or above[start].n_seeds < n_seeds:
        raise BadInput(f"start = {start}: no line above trains {start}/seed{n_seeds - 1}")
    return Line(without_start(options), start, n_seeds)


def read_seeds(text):
    """How many seeds a line's seeds=N asks for."""
    if not re.fullmatch("[1-9][0-9]{0,2}", text):
        raise BadInput(f"seeds = {text}: must lie in [1, 999]")
    return int(text)


def without_start(options):
    """The options but --start and its value."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--start")
    _, rest = parser.parse_known_args(options)
    return rest


def every_run(plan, root):
    """{name: Run} of the lines, in their order."""
    runs = {}
    for name, line in plan.items():
        for seed in range(line.n_seeds):
            options = list(line.options)
            start = None
            if line.start:
                start = f"{line.start}/seed{seed}"
                options += ["--start", (root / start).as_posix()]
            run = f"{name}/seed{seed}"
            options += ["--seed", str(seed), "--out", (root / run).as_posix()]
            runs[run] = Run(options, start)
    return runs


# ---------------------------------------------------------------- training them
class Training:
    """A run that is being trained, by a process on one thread (unless OMP_NUM_THREADS is set)."""

    def __init__(self, options):
        self.began = time.perf_counter()
        self.output = tempfile.TemporaryFile()
        self.process = subprocess.Popen([sys.executable, str(GROK), *options], stdout=self.output,
                                        stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                        env={"OMP_NUM_THREADS": "1", **os.environ})

    def has_ended(self):
        return self.process.poll() is not None

    def minutes(self):
        return (time.perf_counter() - self.began) / 60

    def read_output(self):
        """The lines that it has printed, at least one."""
        with self.output:
            self.output.seek(0)
            return self.output.read().decode("utf-8", "replace").splitlines() or [""]


class Queue:
    """The runs to train, those in training, and what became of the rest."""

    def __init__(self, runs, at_once):
        self.runs = runs        # {name: Run}
        self.at_once = at_once
        self.training = {}      # {name: Training}
        self.status = {}        # {name: exit status}; a skipped run has that of its start
        self.minutes = []       # of each run that was trained

    def train_all(self, signals):
        """Train them; something in the list `signals` ends it, and every process it started."""
        try:
            while len(self.status) < len(self.runs) and not signals:
                self.begin()
                time.sleep(0.1)
                if not signals:
                    self.finish()
        finally:
            end_all([training.process for training in self.training.values()])

    def begin(self):
        """Begin what can begin, and skip what cannot any more, in the order of the plan."""
        for name, run in self.runs.items():
            waits = run.start in self.runs and run.start not in self.status
            if waits or name in self.status or name in self.training:
                continue
            if self.status.get(run.start):
                self.note(name, self.status[run.start], f"skipped, {run.start} has failed")
            elif len(self.training) < self.at_once:
                self.training[name] = Training(run.options)

    def finish(self):
        """Note what became of the trainings that have ended."""
        for name, training in list(self.training.items()):
            if not training.has_ended():
                continue
            del self.training[name]
            status = training.process.returncode
            lines = training.read_output()
            if status:
                self.note(name, abs(status), f"FAILED, {status}: {lines[-1]}")
            elif "already done" in lines:
                self.note(name, 0, "already done")
            else:
                self.minutes.append(training.minutes())
                self.note(name, 0, f"trained in {self.minutes[-1]:.1f} minutes")

    def note(self, name, status, said):
        """Keep the exit status of a run and say what became of it."""
        self.status[name] = status
        left = ""
        if self.minutes:
            mean = sum(self.minutes) / len(self.minutes)
            n_left = len(self.runs) - len(self.status)
            left = f"; about {mean * n_left / self.at_once:.0f} minutes left"
        grok.say(f"{len(self.status)}/{len(self.runs)} {name}: {said}{left}")


def end_all(processes, patience=10):
    """End these trainings as Ctrl-C does, so that each saves how far it is, and kill those that
    have not ended after `patience` seconds."""
    for process in processes:
        if os.name == "posix":  # on Windows a Ctrl-C has reached them already
            process.send_signal(signal.SIGINT)
    end = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def signals_noted():
    """A list that every signal to end lengthens. What is ignored, as nohup has it for hang-ups, is
    ignored still."""
    signals = []
    before = {}

    def note(number, frame):
        signals.append(number)

    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, note)
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- the command line
def processors():
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def parse(argv=None):
    """The options of the command line."""
    parser = grok.Parser(prog="python -m experiments.run_all",
                         formatter_class=argparse.RawTextHelpFormatter, epilog=HELP,
                         description="Train every run of a plan, as many at once as there are "
                         "processors. If it is interrupted,\nthe same command goes on.")
    parser.add_argument("--only", metavar="GLOB", default="*",
                        help="the lines with such a name, like \"small/*\"; what they start from\n"
                        "must be among them, or lie under ROOT")
    parser.add_argument("--list", action="store_true", help="print the command lines alone")
    parser.add_argument("-o", "--out", metavar="ROOT", type=Path, default=Path("runs/mine"),
                        help="(runs/mine)")
    parser.add_argument("--plan", metavar="FILE", type=Path, default=HERE / "plan.txt",
                        help="(experiments/plan.txt)")
    parser.add_argument("--at-once", metavar="N", type=int, default=processors(),
                        help="how many at once (as many as there are processors; on a GPU, as\n"
                        "many as its memory holds)")
    return parser.parse_args(argv)


def choose_runs(given):
    """{name: Run} of the lines of the plan that --only asks for."""
    plan = read_plan(given.plan)
    chosen = {name: line for name, line in plan.items() if fnmatchcase(name, given.only)}
    if not chosen:
        raise BadInput(f"only = {given.only}: no line of {given.plan} has such a name; names are "
                       f"like {next(iter(plan))}")
    return every_run(chosen, given.out)


def print_commands(runs):
    """Print a command line a run, also to a reader who stops before the end, as `head` does."""
    script = GROK.name if Path.cwd() == GROK.parent else GROK.as_posix()
    lines = [shlex.join(["python", script, *run.options]) for run in runs.values()]
    try:
        grok.say("\n".join(lines))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to flush


def train_runs(runs, at_once):
    """Train them; returns the worst exit status, or 128 + the number of a signal that ended it."""
    queue = Queue(runs, at_once)
    with signals_noted() as signals:
        queue.train_all(signals)
    if signals:
        print("run_all: stopped; the same command goes on", file=sys.stderr)
        return 128 + signals[0]
    return max(queue.status.values())


@grok.command("run_all")
def main(argv=None):
    """Run the command line; returns the exit status: of the worst run, 2 for bad input, 128 + the
    number of the signal that ended it."""
    given = parse(argv)
    if given.at_once < 1:
        raise BadInput(f"at_once = {given.at_once}: must be 1 or more")
    runs = choose_runs(given)
    if given.list:
        print_commands(runs)
        return 0
    return train_runs(runs, given.at_once)


if __name__ == "__main__":
    sys.exit(main())
