"""What extras/run_all.py promises: `pytest extras/test_run_all.py`.

Where only the order counts, a script that ends at once stands in for grok.py.
"""
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import grok
from extras import run_all

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = """
import sys
print("said last")
sys.exit(int(sys.argv[sys.argv.index("--warmup") + 1]) if "--warmup" in sys.argv else 0)
"""


def write_plan(tmp_path, text):
    plan = tmp_path / "plan.txt"
    plan.write_text(text, encoding="utf-8")
    return ["--plan", str(plan), "--root", str(tmp_path / "runs")]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """What begins and ends, in order, with a script in place of grok.py whose exit status is the
    option --warmup's."""
    script, events, begin, finish = tmp_path / "stand_in.py", [], run_all.begin, run_all.finish
    script.write_text(STAND_IN, encoding="utf-8")

    def note(what, out):
        events.append((what, Path(out).relative_to(tmp_path / "runs").as_posix()))

    def noted_begin(options):
        note("begin", options[-1])
        return begin(options)

    def noted_finish(process, *rest):
        note("end", process.args[-1])
        return finish(process, *rest)

    monkeypatch.setattr(run_all, "GROK", script)
    monkeypatch.setattr(run_all, "begin", noted_begin)
    monkeypatch.setattr(run_all, "finish", noted_finish)
    return events


def most_at_once(events):
    running = highest = 0
    for what, _ in events:
        running += 1 if what == "begin" else -1
        highest = max(highest, running)
    return highest


def wait_for(condition):
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid):
    """Whether a process runs; one that only waits to be reaped does not."""
    status = Path(f"/proc/{pid}/stat")
    try:
        os.kill(pid, 0)
        return not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


# ---------------------------------------------------------------- with grok.py itself
def test_a_plan_is_trained_each_run_after_its_start_and_a_second_time_nothing_is(tmp_path, capsys):
    argv = write_plan(tmp_path, "# two lines\n\nbase  --preset smoke --steps 5 seeds=1\n"
                                "tuned/more --preset tune --start base --new-facts 20 --steps 5\n")
    assert run_all.main([*argv, "--seeds", "1"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in said] == ["1/2 base/seed0", "2/2 tuned/more/seed0"]
    assert all("trained in" in line and "minutes left" in line for line in said)
    about, _ = grok.read_run(tmp_path / "runs/tuned/more/seed0")
    base = tmp_path / "runs/base/seed0"
    assert (tmp_path / "runs/tuned/more/seed0" / about["start"]["path"]).resolve() == base.resolve()
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}
    assert run_all.main([*argv, "--seeds", "1"]) == 0
    assert all("already done" in line for line in capsys.readouterr().out.splitlines())
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files} == before


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_list_that_is_ended_leaves_no_training_behind(tmp_path, name):
    argv = write_plan(tmp_path, "long --preset smoke --steps 1000000 --eval-every 10 seeds=1")
    folder = tmp_path / "runs/long/seed0"
    process = subprocess.Popen([sys.executable, "-m", "extras.run_all", *argv], cwd=ROOT,
                               start_new_session=True)
    wait_for((folder / "metrics.jsonl").exists)
    trains = int(subprocess.check_output(["pgrep", "-P", str(process.pid)]))
    process.send_signal(getattr(signal, name))
    status, left = process.wait(60), is_alive(trains)
    if left:
        os.kill(trains, signal.SIGKILL)
    assert status == 128 + getattr(signal, name) and not left
    assert grok.read_run(folder)


# ---------------------------------------------------------------- the order
@pytest.mark.parametrize("at_once, most", [(2, 2), (9, 4)])  # 4: a and c, of two seeds
def test_so_many_at_once_in_the_plans_order_and_none_before_its_start(
        tmp_path, stand_in, at_once, most):
    argv = write_plan(tmp_path, "a\nb --start a\nc\nd/e --start=b\n")
    assert run_all.main([*argv, "--seeds", "2", "--at-once", str(at_once)]) == 0
    events = stand_in
    names = [f"{name}/seed{seed}" for name in ("a", "b", "c", "d/e") for seed in (0, 1)]
    assert sorted(out for what, out in events if what == "end") == sorted(names)
    assert most_at_once(events) == most
    assert events[:2] == [("begin", "a/seed0"), ("begin", "a/seed1")]
    for seed in (0, 1):
        for start, name in (("a", "b"), ("b", "d/e")):
            ended = events.index(("end", f"{start}/seed{seed}"))
            assert ended < events.index(("begin", f"{name}/seed{seed}"))


def test_a_failed_run_is_said_its_dependents_are_skipped_and_the_rest_is_trained(
        tmp_path, stand_in, capsys):
    argv = write_plan(tmp_path, "bad --warmup 3 seeds=1\nnext --start bad\nlast --start next\n"
                                "worse --warmup 7\ngood\n")
    assert run_all.main([*argv, "--seeds", "1", "--at-once", "1"]) == 7
    said = capsys.readouterr().out.splitlines()
    said = {line.split()[1].rstrip(":"): line.split(": ", 1)[1] for line in said}
    assert said["bad/seed0"].startswith("FAILED, 3: said last")
    assert said["next/seed0"] == "skipped, bad/seed0 has failed"
    assert said["last/seed0"] == "skipped, next/seed0 has failed"
    assert said["good/seed0"].startswith("trained in") and len(said) == 5
    assert {out for _, out in stand_in} == {"bad/seed0", "worse/seed0", "good/seed0"}


def test_only_takes_names_alike_and_a_start_apart_from_them_is_not_waited_for(tmp_path, stand_in):
    argv = write_plan(tmp_path, "one/a\none/b\ntwo/a --start one/a\n")
    assert run_all.main([*argv, "--only", "two/*", "--seeds", "2"]) == 0
    assert {out for _, out in stand_in} == {"two/a/seed0", "two/a/seed1"}


def test_signals_are_as_before_when_a_list_is_trained(tmp_path, stand_in):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    assert run_all.main([*write_plan(tmp_path, "a seeds=1"), "--at-once", "1"]) == 0
    assert [signal.getsignal(number) for number in numbers] == before


# ---------------------------------------------------------------- list, plan, processors
def test_list_prints_a_plain_command_a_run_and_writes_nothing(tmp_path, capsys):
    argv = write_plan(tmp_path, "a --lr 1e-3 seeds=2\nb/c --start a --steps 7 seeds=1\nd\n"
                                "e --start a/seed1 seeds=3-4\nf seeds=4,6\n")
    root = tmp_path / "runs"
    assert run_all.main([*argv, "--list", "--seeds", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"python grok.py --lr 1e-3 --seed 0 --out {root}/a/seed0",
        f"python grok.py --lr 1e-3 --seed 1 --out {root}/a/seed1",
        f"python grok.py --steps 7 --start {root}/a/seed0 --seed 0 --out {root}/b/c/seed0",
        f"python grok.py --seed 0 --out {root}/d/seed0",
        f"python grok.py --start {root}/a/seed1 --seed 3 --out {root}/e/seed3",
        f"python grok.py --start {root}/a/seed1 --seed 4 --out {root}/e/seed4",
        f"python grok.py --seed 4 --out {root}/f/seed4",
        f"python grok.py --seed 6 --out {root}/f/seed6"]
    assert not root.exists()


def test_every_line_of_the_plan_here_is_one_that_grok_takes(tmp_path, capsys):
    assert run_all.main(["--list", "--root", str(tmp_path)]) == 0
    for command in capsys.readouterr().out.splitlines():
        given = grok.parse(shlex.split(command)[2:])
        if given["seed"] == 0 and not given["start"]:  # a start brings what is to be checked
            _, world, model = grok.PRESETS[given["preset"]]
            chosen = {name: value for name, value in given.items() if value is not None}
            for cls in (grok.WorldConfig, grok.Config):
                values = {**world, **model, **chosen}
                names = [field.name for field in dataclasses.fields(cls) if field.name in values]
                grok.check(cls(**{name: values[name] for name in names}))


@pytest.mark.parametrize("text, said", [
    ("a --learning 3", "line 1: unrecognized arguments: --learning 3"),
    ("a\nb --steps many", "line 2: argument --steps: invalid int value: 'many'"),
    ("a\na --lr 1", "line 2: name = a:"),
    ("--lr 1", "line 1: name = --lr:"),
    ("/a", "line 1: name = /a:"),
    ("a --seed 1", "line 1: seed = 1:"),
    ("a --out b", "line 1: out = b:"),
    ("a --start b\nb", "line 1: start = b: no line above trains b/seed0"),
    ("a seeds=2\nb --start a", "line 2: start = a: no line above trains a/seed2"),
    ("a seeds=0", "line 1: seeds = 0:"), ("a seeds=3-2", "line 1: seeds = 3-2: must be"),
    ("a seeds=3-5\nb --start a/seed2 seeds=1", "line 2: start = a/seed2: no line above"),
    ("a seeds=x", "line 1: invalid literal"),
    ("a 'b", "line 1: No closing quotation"),
    ("# none", "only = *: must be like one of"),
])
def test_a_plan_that_cannot_be_is_refused_before_anything_is_trained(tmp_path, capsys, text, said):
    assert run_all.main(write_plan(tmp_path, text)) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("options, said", [
    (["--at-once", "0"], "at_once = 0:"), (["--only", "x"], "only = x: must be like one of a"),
    (["--seeds", "0"], "seeds = 0:"), (["--plan", "no/such"], "no/such"), (["--all"], "--all")])
def test_bad_options_are_refused(tmp_path, capsys, options, said):
    assert run_all.main([*write_plan(tmp_path, "a"), *options]) == 2
    printed = capsys.readouterr().err
    assert said in printed and printed.startswith("run_all: ") and printed.count("\n") == 1


def test_as_many_at_once_as_processors_are_allowed(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2}, raising=False)
    assert run_all.processors() == 1 == run_all.parse([]).at_once
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert run_all.processors() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert run_all.processors() == os.cpu_count()
