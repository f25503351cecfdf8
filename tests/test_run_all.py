"""What experiments/run_all.py and its plan promise: `pytest tests/test_run_all.py`.

Where only the order counts, a script that ends at once stands in for grok.py.
"""
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import grok
from experiments import run_all

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "runs/shipped"
STAND_IN = """
import sys
print("said last")
sys.exit(int(sys.argv[sys.argv.index("--warmup") + 1]) if "--warmup" in sys.argv else 0)
"""
LAUNCH = """
import os, signal, sys
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    ignored = name == sys.argv[1]
    signal.signal(getattr(signal, name), signal.SIG_IGN if ignored else signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""
STUBBORN = """
import pathlib, signal, sys, time
begun, saved = map(pathlib.Path, sys.argv[1:])
signal.signal(signal.SIGINT, lambda number, frame: saved.touch())
begun.touch()
time.sleep(60)
"""
on_posix = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")


def write_plan(tmp_path, content):
    """The options that name a plan of this text or these bytes, and a folder for its runs."""
    plan = tmp_path / "plan.txt"
    plan.write_bytes(content if isinstance(content, bytes) else content.encode())
    return ["--plan", str(plan), "--out", str(tmp_path / "runs")]


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---------------------------------------------------------------- with grok.py itself
def contents(folder):
    """{path: (time of its last change, bytes)} of all that a run leaves but its picture, which is
    drawn again."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "curve.png"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def test_a_plan_is_trained_each_run_after_its_start_and_a_second_time_nothing_is(tmp_path, capsys):
    argv = write_plan(tmp_path, "# two lines\n\nbase  --preset smoke --steps 5 seeds=1\n"
                                "tuned/more  --start base --new-facts 20 --steps 5 seeds=1\n")
    assert run_all.main(argv) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["1/2 base/seed0", "2/2 tuned/more/seed0"]
    for line in said:
        assert "trained in" in line and "minutes left" in line
    base = tmp_path / "runs/base/seed0"
    tuned = tmp_path / "runs/tuned/more/seed0"
    config, _ = grok.read_run(tuned)
    assert config.weights == "end" and config.new_facts == 20
    assert (tuned / "start.pt").read_bytes() == (base / "end.pt").read_bytes()
    before = contents(tmp_path / "runs")
    assert run_all.main(argv) == 0
    assert all("already done" in line for line in capsys.readouterr().out.splitlines())
    assert contents(tmp_path / "runs") == before


@pytest.fixture
def launch(tmp_path):
    """A function that starts a list with one long training, with this signal ignored and no other,
    and waits until it trains. Whatever becomes of the test, none of its processes is left."""
    argv = write_plan(tmp_path, "long --preset smoke --steps 50000 --eval-every 10 seeds=1")
    lists = []

    def start(ignored="none"):
        command = ["-m", "experiments.run_all", *argv]
        lists.append(subprocess.Popen([sys.executable, "-c", LAUNCH, ignored, *command], cwd=ROOT,
                                      start_new_session=True))
        wait_for((tmp_path / "runs/long/seed0/metrics.jsonl").exists)
        return lists[0]

    yield start
    for process in lists:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def has_members(group):
    """Whether a process group has a process that was not waited for."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@on_posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_list_that_is_ended_leaves_no_training_behind_and_what_it_has_is_whole(
        tmp_path, launch, name):
    process = launch()
    process.send_signal(getattr(signal, name))
    assert process.wait(60) == 128 + getattr(signal, name)
    assert not has_members(process.pid)
    folder = tmp_path / "runs/long/seed0"
    assert grok.read_history(folder) and grok.read_config(folder).steps == 50000
    assert not list(folder.glob("*.tmp"))


@on_posix
def test_under_ignored_hang_ups_a_list_goes_on_until_it_is_ended(tmp_path, launch):
    process = launch(ignored="SIGHUP")
    folder = tmp_path / "runs/long/seed0"
    os.killpg(process.pid, signal.SIGHUP)  # as a terminal that is closed: list and training
    seen = len(grok.read_history(folder))
    wait_for(lambda: len(grok.read_history(folder)) > seen + 2)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not has_members(process.pid)


@on_posix
def test_what_is_ended_may_save_itself_and_is_killed_if_it_goes_on(tmp_path):
    begun = tmp_path / "begun"
    saved = tmp_path / "saved"
    process = subprocess.Popen([sys.executable, "-c", STUBBORN, str(begun), str(saved)])
    try:
        wait_for(begun.exists)
        run_all.end_all([process], patience=1)
        assert process.returncode == -signal.SIGKILL and saved.exists()
    finally:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- the order
@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """[("begin" or "end", run), ...] as it happens, with a script in place of grok.py whose exit
    status is the option --warmup's."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN, encoding="utf-8")
    events = []

    class Noted(run_all.Training):
        def __init__(self, options):
            super().__init__(options)
            self.run = Path(options[-1]).relative_to(tmp_path / "runs").as_posix()
            events.append(("begin", self.run))

        def read_output(self):
            events.append(("end", self.run))
            return super().read_output()

    monkeypatch.setattr(run_all, "GROK", script)
    monkeypatch.setattr(run_all, "Training", Noted)
    return events


def most_at_once(events):
    running = 0
    most = 0
    for what, _ in events:
        running += 1 if what == "begin" else -1
        most = max(most, running)
    return most


@pytest.mark.parametrize("at_once, most", [(2, 2), (9, 4)])  # 4: a and c, of two seeds
def test_so_many_at_once_in_the_plans_order_and_none_before_its_start(
        tmp_path, stand_in, at_once, most):
    argv = write_plan(tmp_path, "a seeds=2\nb --start a seeds=2\nc seeds=2\nd/e --start=b seeds=2")
    assert run_all.main([*argv, "--at-once", str(at_once)]) == 0
    names = []
    for name in ("a", "b", "c", "d/e"):
        names += [f"{name}/seed0", f"{name}/seed1"]
    assert sorted(run for what, run in stand_in if what == "end") == names
    assert most_at_once(stand_in) == most
    assert stand_in[:2] == [("begin", "a/seed0"), ("begin", "a/seed1")]
    for seed in (0, 1):
        for start, name in (("a", "b"), ("b", "d/e")):
            ended = stand_in.index(("end", f"{start}/seed{seed}"))
            assert ended < stand_in.index(("begin", f"{name}/seed{seed}"))


def test_a_failed_run_is_said_its_dependents_are_skipped_and_the_rest_is_trained(
        tmp_path, stand_in, capsys):
    argv = write_plan(tmp_path, "bad --warmup 3 seeds=1\nnext --start bad seeds=1\n"
                                "last --start next seeds=1\nworse --warmup 7 seeds=1\n"
                                "good seeds=1\n")
    assert run_all.main([*argv, "--at-once", "1"]) == 7
    said = {}
    for line in capsys.readouterr().out.splitlines():
        name, _, words = line.split(" ", 1)[1].partition(": ")
        said[name] = words
    assert said["bad/seed0"].startswith("FAILED, 3: said last")
    assert said["next/seed0"].startswith("skipped, bad/seed0 has failed")
    assert said["last/seed0"].startswith("skipped, next/seed0 has failed")
    assert said["good/seed0"].startswith("trained in") and len(said) == 5
    assert {run for _, run in stand_in} == {"bad/seed0", "worse/seed0", "good/seed0"}


def test_only_takes_names_alike_and_a_start_apart_from_them_is_not_waited_for(tmp_path, stand_in):
    argv = write_plan(tmp_path, "one/a seeds=2\none/b\ntwo/a --start one/a seeds=2\n")
    assert run_all.main([*argv, "--only", "two/*"]) == 0
    assert {run for _, run in stand_in} == {"two/a/seed0", "two/a/seed1"}


def test_signals_are_as_before_when_a_list_has_been_trained(tmp_path, stand_in):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert run_all.main([*write_plan(tmp_path, "a seeds=1"), "--at-once", "1"]) == 0
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("given, used", [(None, "1"), ("2", "2")])
def test_a_training_has_one_thread_unless_the_environment_says_otherwise(
        tmp_path, monkeypatch, given, used):
    script = tmp_path / "script.py"
    script.write_text("import os; print(os.environ['OMP_NUM_THREADS'])", encoding="utf-8")
    monkeypatch.setattr(run_all, "GROK", script)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    else:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    training = run_all.Training([])
    training.process.wait(60)
    assert training.read_output() == [used]


def test_as_many_at_once_as_processors_are_allowed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2}, raising=False)
    assert run_all.processors() == 1 == run_all.parse([]).at_once
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert run_all.processors() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert run_all.processors() == os.cpu_count()


# ---------------------------------------------------------------- the list
def test_list_prints_a_plain_command_a_run_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = write_plan(tmp_path, "a --lr 1e-3 seeds=2\nb/c --start a --steps 7 seeds=2\n"
                                "d --start=a seeds=1\ne\n")
    root = (tmp_path / "runs").as_posix()
    assert run_all.main([*argv, "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"python grok.py --lr 1e-3 --seed 0 --out {root}/a/seed0",
        f"python grok.py --lr 1e-3 --seed 1 --out {root}/a/seed1",
        f"python grok.py --steps 7 --start {root}/a/seed0 --seed 0 --out {root}/b/c/seed0",
        f"python grok.py --steps 7 --start {root}/a/seed1 --seed 1 --out {root}/b/c/seed1",
        f"python grok.py --start {root}/a/seed0 --seed 0 --out {root}/d/seed0",
        f"python grok.py --seed 0 --out {root}/e/seed0",
        f"python grok.py --seed 1 --out {root}/e/seed1",
        f"python grok.py --seed 2 --out {root}/e/seed2"]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [[str(ROOT / "experiments/run_all.py")],
                                     ["-m", "experiments.run_all"]])
def test_it_starts_from_any_folder_and_without_docstrings(tmp_path, command):
    asked = [*command, "--list", "--only", "tiny/natural", "-o", "my runs"]
    printed = subprocess.run([sys.executable, "-OO", *asked], cwd=tmp_path, check=True, text=True,
                             capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    script = (ROOT / "grok.py").as_posix()
    assert printed.stdout.splitlines() == [
        f"python {script} --preset tiny --seed {seed} --out 'my runs/tiny/natural/seed{seed}'"
        for seed in range(3)]
    assert not printed.stderr and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- what is refused
def test_a_byte_order_mark_and_lines_of_windows_are_no_part_of_a_name(tmp_path):
    write_plan(tmp_path, b"\xef\xbb\xbfa seeds=1\r\n\r\nb seeds=1\r\n")
    plan = run_all.read_plan(tmp_path / "plan.txt")
    assert list(plan) == ["a", "b"] and plan["a"].n_seeds == 1


@pytest.mark.parametrize("content, said", [
    ("a --learning 3", "line 1: unrecognized arguments: --learning 3"),
    ("a\nb --steps many", "line 2: argument --steps: invalid int value: 'many'"),
    ("a\n\nb --steps 0", "line 3: steps = 0: must lie in"),
    ("a --preset big", "line 1: preset = big: must be one of"),
    ("a --preset tune", "line 1: preset = tune: tune needs --start RUN"),
    ("a\na --lr 1", "line 2: name = a:"),
    ("--lr 1", "line 1: name = --lr:"),
    ("/a", "line 1: name = /a:"), ("a/../b", "line 1: name = a/../b:"), ("a/", "name = a/:"),
    ("a --seed 1", "line 1: seed = 1:"),
    ("a --out b", "line 1: out = b:"),
    ("a --start b\nb", "line 1: start = b: no line above trains b/seed2"),
    ("a seeds=2\nb --start a", "line 2: start = a: no line above trains a/seed2"),
    ("a seeds=0", "line 1: seeds = 0:"), ("a seeds=3-5", "line 1: seeds = 3-5: must lie in"),
    ("a 'b", "line 1: No closing quotation"),
    ("# none", "plan.txt: holds no run"),
    (b"a\n# gr\xfc\xdfe\n", "line 2: is not UTF-8 text"),
])
def test_a_plan_that_cannot_be_is_refused_before_anything_is_trained(
        tmp_path, capsys, content, said):
    assert run_all.main(write_plan(tmp_path, content)) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options, said", [
    (["--at-once", "0"], "at_once = 0:"), (["--only", "x"], "only = x: no line of"),
    (["--plan", "no/such"], "no/such"), (["--all"], "--all")])
def test_bad_options_are_refused(tmp_path, capsys, options, said):
    assert run_all.main([*write_plan(tmp_path, "a"), *options]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.startswith("run_all: ") and printed.count("\n") == 1


# ---------------------------------------------------------------- the plan here
@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """{run: Config} of every run of the plan here, as grok.py settles them one after another; the
    run that one starts from has settings alone, since nothing is trained."""
    root = tmp_path_factory.mktemp("planned")
    configs = {}
    plan = run_all.read_plan(ROOT / "experiments/plan.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grok, "load_run", lambda folder, weights: None)
        for name, run in run_all.every_run(plan, root).items():
            configs[name], _ = grok.settle(grok.parse(run.options))
            write_settings(root / name, configs[name])
    return configs


def write_settings(folder, config):
    """The folder of a finished run with these settings, and weights that are empty."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(asdict(config)), encoding="utf-8")
    last = {"step": config.steps, "accuracy": {}, "lens": {}}
    (folder / "metrics.jsonl").write_text(json.dumps(last) + "\n", encoding="utf-8")
    for weights in grok.WEIGHTS:
        (folder / f"{weights}.pt").touch()


def test_every_run_of_the_plan_here_has_data_to_train_on(planned):
    tried = set()
    world = grok.settings_of("the world")
    for config in planned.values():
        settings = tuple(getattr(config, name) for name in world)
        if settings not in tried:
            tried.add(settings)
            grok.make_data(config, {})
    assert len(planned) < 330


def test_every_shipped_run_is_what_its_line_of_the_plan_makes(planned):
    shipped = {}
    for path in sorted(SHIPPED.rglob("config.json")):
        shipped[path.parent.relative_to(SHIPPED).as_posix()] = grok.read_config(path.parent)
    assert shipped and sorted(shipped.keys() - planned.keys()) == []
    for name, config in shipped.items():
        here = replace(planned[name], device=config.device)  # whichever this machine has
        assert config == here, name
