"""What tools/bench.py promises: `pytest tests/test_bench.py`."""
import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import grok
from grok import Config, PRESETS
from tools import bench

SMOKE = PRESETS["smoke"][2]
SMALL = {**PRESETS["small"][2], **SMOKE, "d_model": 24, "min_loops": 3}
RECURSIVE = {**PRESETS["trm"][2], "n_entities": 12, "n_relations": 8, "out_degree": 6,
             "ood_fraction": 0.2, "phi": 4.0, "d_model": 12, "batch_size": 32, "n_low": 2,
             "slots": 2, "steps": 200, "eval_every": 50}
KINDS = {"smoke": SMOKE, "small": SMALL, "recursive": RECURSIVE}


def make_config(kind="smoke", **changes):
    """The small Config of a kind, on the CPU."""
    return Config(**{**KINDS[kind], "device": "cpu", **changes})


def make_racers(kind="smoke", **changes):
    return bench.make_racers(make_config(kind, **changes), {})


@pytest.fixture
def short(monkeypatch):
    """A pace of few rounds, and the number of threads put back."""
    n_threads = torch.get_num_threads()
    monkeypatch.setattr(bench, "PACE_SECONDS", 0)
    monkeypatch.setattr(bench, "LEAST_ROUNDS", 2)
    yield
    torch.set_num_threads(n_threads)


# ---------------------------------------------------------------- the plain ones
def test_the_plain_ones_are_trained_on_our_rows_drawn_as_often():
    _, trainer = make_racers(atomic_share=0.25, batch_size=64)
    loader = bench.make_loader(trainer)
    assert torch.equal(loader.dataset.tensors[0], trainer.tokens)
    assert torch.equal(loader.dataset.tensors[1], trainer.answers)
    assert loader.batch_size == 64
    assert loader.sampler.replacement
    chance = loader.sampler.weights / loader.sampler.weights.sum()
    assert chance[:trainer.n_facts].sum().item() == pytest.approx(0.25)
    assert torch.unique(chance).numel() == 2
    generator = torch.Generator().manual_seed(1)
    rows = grok.draw_batch(trainer.config, trainer.n_facts, len(trainer.tokens), generator)
    assert (rows < trainer.n_facts).float().mean().item() == 0.25


def test_without_a_share_of_facts_all_rows_are_as_likely():
    _, trainer = make_racers(atomic_share=0.0)
    weights = bench.make_loader(trainer).sampler.weights
    torch.testing.assert_close(weights, weights[0].expand(len(trainer.tokens)))


@pytest.mark.parametrize("preset", ["smoke", "tiny", "small"])
def test_parameters_are_as_many_as_the_formulas_say_and_products_about_as_large(preset):
    config = Config(**PRESETS[preset][2], device="cpu")
    V = config.n_entities + config.n_relations + 1
    D = config.d_model
    hidden = 8 * D // 3
    racers, _ = bench.make_racers(config, {})
    ours, looped, layers = racers
    width = looped.model.layers[0].linear1.out_features
    if preset == "small":  # token mixing, and two matrices of tokens
        T = 4
        expected = 2 * V * D + 8 * T * T + 4 * T * T + D * D + 3 * D * hidden
        our_products = 9 * D + 12 * T  # a position, over D
    else:
        T = 3
        expected = V * D + 4 * D * D + 3 * D * hidden
        our_products = 12 * D + 2 * T
    layer = 4 * D * D + 4 * D + 2 * D * width + width + D + 4 * D
    rest = V * D + T * D + D * V + V
    assert 4 * D + 2 * T + 2 * width == pytest.approx(our_products, rel=0.01)
    for racer, count in ((ours, expected), (looped, rest + layer),
                         (layers, rest + config.n_loops * layer)):
        assert sum(weight.numel() for weight in racer.model.parameters()) == count


@pytest.mark.parametrize("kind", ["smoke", "small"])
def test_looped_is_layers_with_equal_weights_and_answers_where_ours_does(kind):
    racers, trainer = make_racers(kind)
    _, looped, layers = [racer.model for racer in racers]
    layers.embedding = looped.embedding
    layers.positions = looped.positions
    layers.head = looped.head
    for layer in layers.layers:
        layer.load_state_dict(looped.layers[0].state_dict())
    tokens = torch.cat([trainer.tokens[:3], trainer.tokens[-3:]])  # facts, and compositions
    torch.testing.assert_close(layers(tokens), looped(tokens))
    mask = None
    if kind == "smoke":
        mask = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
    state = looped.embedding(tokens) + looped.positions.weight
    for _ in range(trainer.config.n_loops):
        state = looped.layers[0](state, src_mask=mask)
    places = {"smoke": [1, 1, 1, 2, 2, 2], "small": [2, 2, 2, 3, 3, 3]}[kind]
    expected = looped.head(state[torch.arange(6), torch.tensor(places)])
    torch.testing.assert_close(looped(tokens), expected)


@pytest.mark.parametrize("changes", [{}, {"slots": 0, "n_cycles": 3, "n_blocks": 1}])
def test_plain_recursion_with_our_weights_has_our_answers_loss_and_gradients(changes):
    racers, trainer = make_racers("recursive", **changes)
    ours = copy.deepcopy(racers[0].model).double()
    plain = racers[1].model.double()
    weights = ours.state_dict()
    weights["embedding.weight"] = weights.pop("embedding")
    weights["head.weight"] = weights.pop("head")
    plain.load_state_dict(weights)
    tokens = torch.cat([trainer.tokens[:5], trainer.tokens[-5:]])
    answers = torch.cat([trainer.answers[:5], trainer.answers[-5:]])
    torch.testing.assert_close(plain(tokens), ours(tokens))
    our_loss = grok.loss_of(ours, tokens, answers)
    plain_loss = plain.loss(tokens, answers)
    torch.testing.assert_close(plain_loss, our_loss)
    our_loss.backward()
    plain_loss.backward()
    gradients = {name.removesuffix(".weight"): weight.grad
                 for name, weight in plain.named_parameters()}
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(gradients[name.removesuffix(".weight")], weight.grad)


@pytest.mark.parametrize("kind", ["smoke", "recursive"])
def test_the_plain_ones_learn_their_rows_and_their_wait_for_them_is_counted(kind):
    racers, trainer = make_racers(kind, warmup=10)
    for racer in racers[1:]:
        before = F.cross_entropy(racer.model(trainer.tokens), trainer.answers)
        for _ in range(30):
            racer.step()
        after = F.cross_entropy(racer.model(trainer.tokens), trainer.answers)
        assert after < before
        assert racer.waited > 0


def test_the_step_sizes_are_adamws_own_and_for_the_recursion_the_presets():
    racers, trainer = make_racers()
    optimizer, schedule = bench.make_optimizer(racers[1].model, trainer.config)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.param_groups[0]["weight_decay"] == 0.01
    racers, trainer = make_racers("recursive", warmup=4, decay=0.5, steps=10)
    optimizer, schedule = bench.make_optimizer(racers[1].model, trainer.config)
    for expected in (0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2):
        group = optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(trainer.config.lr * expected)
        assert (group["weight_decay"], group["betas"]) == (0.3, (0.9, 0.98))
        optimizer.step()
        schedule.step()


def test_racers_are_the_same_again_and_leave_the_random_state_alone():
    before = torch.random.get_rng_state()
    for kind in KINDS:
        one, _ = make_racers(kind)
        two, _ = make_racers(kind)
        for racer, again in zip(one, two, strict=True):
            for weight, same in zip(racer.model.parameters(), again.model.parameters()):
                assert torch.equal(weight, same)
        bench.record_products(one[0].step)
    assert torch.equal(torch.random.get_rng_state(), before)


# ---------------------------------------------------------------- the matrix products
@pytest.mark.parametrize("kind", KINDS)
def test_the_products_of_a_step_are_those_that_pytorch_counts(kind):
    racers, _ = make_racers(kind, bf16=kind == "recursive")
    for racer in racers:
        counter = FlopCounterMode(display=False)
        with counter:
            racer.step()
        counted = counter.get_total_flops() / 1e9
        products = bench.record_products(racer.step)
        assert bench.gflop(products) == pytest.approx(counted)
        wanted = torch.bfloat16 if kind == "recursive" else torch.float32
        for multiply, left, right in products:
            assert multiply(left, right).dtype == wanted


def test_a_stand_in_lies_in_memory_as_the_tensor_does():
    recorder = bench.ProductRecorder()
    for tensor in (torch.ones(3, 4), torch.ones(3, 4).T, torch.ones(6, 5)[::2, 1:4],
                   torch.ones(1, 4).expand(3, 4), torch.ones(2, 3, 4).bfloat16().mT):
        stand_in = recorder.stand_in(tensor)
        assert stand_in.shape == tensor.shape
        assert stand_in.stride() == tensor.stride()
        assert stand_in.dtype == tensor.dtype
        assert recorder.stand_in(tensor) is stand_in
    assert recorder.stand_in(torch.zeros(3, 4)) is recorder.stand_in(torch.ones(3, 4))


# ---------------------------------------------------------------- pace and race
class FakeClock:
    """time.perf_counter whose time passes in steps alone."""
    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(bench.time, "perf_counter", self.read)

    def read(self):
        return self.now

    def make_step(self, seconds, log=None, name=None):
        def step():
            self.now += seconds
            if log is not None:
                log.append(name)
        return step


def test_the_seconds_of_operators_are_those_of_forward_and_backward():
    x = torch.rand(300, 300, requires_grad=True)
    with bench.OperatorTimer() as timer:
        (x @ x).relu().sum().backward()
    assert {"mm", "relu", "threshold_backward", "sum"} <= timer.seconds.keys()
    assert all(seconds > 0 for seconds in timer.seconds.values())
    line = bench.operators_line(lambda: (x @ x).relu().sum().backward(), n_named=2)
    assert re.fullmatch(r"where the time of its operators goes: \w+ \d+%, \w+ \d+%", line)


def test_in_the_rounds_each_has_its_turn(monkeypatch):
    clock = FakeClock(monkeypatch)
    log = []
    racers = [bench.Racer(name, clock.make_step(seconds, log, name))
              for name, seconds in (("ours", 0.5), ("other", 1.0))]
    monkeypatch.setattr(bench, "PACE_SECONDS", 40)
    monkeypatch.setattr(bench, "LEAST_ROUNDS", 2)
    bench.take_rounds(racers, torch.device("cpu"))
    assert log == (["ours"] * bench.TURN + ["other"] * bench.TURN) * 6  # 7.5 s a round
    assert bench.ratios(racers[1], racers[0]) == pytest.approx([2.0] * 6)
    assert racers[1].step_seconds() == pytest.approx(1.0)


def racer_of(name, turns, grades=()):
    turns = [bench.Turn(*turn) for turn in turns]
    grades = [bench.Grade(*grade) for grade in grades]
    return bench.Racer(name, None, torch.nn.Linear(1, 2), None, turns=turns, grades=grades)


def test_the_pace_is_what_the_turns_say():
    ours = racer_of("ours", [(1.0, 0.0), (2.0, 0.0), (1.0, 0.0)])
    other = racer_of("other", [(2.0, 0.5), (3.0, 0.5), (2.5, 0.5)])
    replay = racer_of("products", [(0.5, 0.0), (1.0, 0.0), (0.25, 0.0)])
    ours.products = [(torch.mm, torch.ones(1000, 200), torch.ones(200, 5000))] * 2
    assert list(bench.pace_lines([ours, other], replay)) == [
        "ours: 4 parameters, 4.00 Gflop of matrix products a step, 5.0 steps/s",
        "other: 4 parameters, 0.00 Gflop of matrix products a step, 2.0 steps/s, 20% of the time "
        "in its DataLoader",
        "over_plain: steps of ours in the time of one of theirs, median of 3 rounds "
        "(least to most)",
        "over_plain, other: 2.00 (1.50 to 2.50), 1.50 if its DataLoader is not counted",
        "a step of ours takes 200.0 ms, 2.00 times its matrix products alone",
        "its 2 products alone: 100.0 ms, 50% of the step, at 40 Gflop/s"]


def test_the_result_is_what_the_grades_say():
    ours = racer_of("ours", [(1.0, 0.0)] * 4, [
        (1.0, {"train_inferred": 0.5, "test_ood": 0.0}),
        (2.0, {"train_inferred": 0.99, "test_ood": 0.5}),
        (4.0, {"train_inferred": 1.0, "test_ood": 0.96})])
    other = racer_of("other", [(2.0, 0.5), (3.0, 0.5), (2.0, 0.5)], [
        (4.0, {"train_inferred": 0.9, "test_ood": 0.125}),
        (7.0, {"train_inferred": 0.99, "test_ood": 0.25})])
    assert list(bench.race_lines([ours, other])) == [
        "ours: training >= .99 after 2.0 s",
        "ours: OOD >= .5 after 2.0 s",
        "ours: OOD >= .9 after 4.0 s",
        "other: training >= .99 after 7.0 s",
        "other: OOD >= .5 not reached in 7.0 s; it had 0.125 when ours got there",
        "other: OOD >= .9 not reached in 7.0 s; it had 0.125 when ours got there",
        "ours / other: training >= .99 3.50 times as soon",
        "ours / other: OOD >= .5 more than 3.50 times as soon",
        "ours / other: OOD >= .9 more than 1.75 times as soon"]
    ours.grades.clear()
    assert list(bench.race_lines([ours])) == [
        f"ours: {goal} not reached in 4.0 s" for goal in bench.GOALS]


@pytest.mark.parametrize("goal_at, expected", [
    (None, 1.0),   # ours never gets there: as long as all of its 100 steps take
    (0.4, 0.4)])   # all have the time that ours needed
def test_a_race_gives_all_the_same_time(monkeypatch, goal_at, expected):
    racers, trainer = make_racers(steps=100, eval_every=10)
    clock = FakeClock(monkeypatch)

    def fake_grade(racer, eval_sets):
        is_there = goal_at and racer is racers[0] and racer.seconds() >= goal_at - 1e-9
        share = 1.0 if is_there else 0.0
        racer.grades.append(bench.Grade(racer.seconds(), {"train_inferred": share,
                                                          "test_ood": share}))

    monkeypatch.setattr(bench, "grade", fake_grade)
    for racer, seconds in zip(racers, (0.01, 0.02, 0.005)):
        racer.step = clock.make_step(seconds)
    bench.race(racers, trainer)
    assert racers[0].seconds() == pytest.approx(expected)
    for racer, seconds in zip(racers, (0.01, 0.02, 0.005)):
        assert expected - 1e-6 <= racer.seconds() <= expected + bench.TURN * seconds + 1e-6
        assert racer.step_seconds() == pytest.approx(seconds)


def test_grades_are_shares_of_right_answers_and_ours_is_graded_with_its_average():
    racers, trainer = make_racers()
    ours = racers[0]
    assert ours.model is trainer.model
    assert ours.graded is trainer.average
    for racer in racers:
        bench.grade(racer, trainer.eval_sets)
        tokens, answers, _ = trainer.eval_sets["test_ood"]
        right = sum(racer.graded(tokens[row:row + 1]).argmax().item() == answers[row].item()
                    for row in range(len(tokens)))
        assert racer.grades[0].shares["test_ood"] == pytest.approx(right / len(tokens))


def test_a_turn_divides_the_steps_between_two_evaluations_of_every_preset():
    for _, _, settings in PRESETS.values():
        assert settings.get("eval_every", Config.eval_every) % bench.TURN == 0


# ---------------------------------------------------------------- the command line
def test_the_bench_says_hardware_pace_and_result_and_writes_what_it_says(capsys, short, tmp_path):
    out = tmp_path / "race.txt"
    command = ["--preset", "smoke", "--device", "cpu", "--threads", "1", "-o", str(out)]
    assert bench.main(command) == 0
    printed = capsys.readouterr().out
    assert out.read_text() == printed
    assert [path.name for path in tmp_path.iterdir()] == ["race.txt"]
    first, *lines = printed.splitlines()
    assert f"cpu, 1 thread, torch {torch.__version__}, preset smoke, natural, float32" in first
    for name in ("ours", "looped", "layers"):
        pace, *goals = [line for line in lines if line.startswith(name + ": ")]
        assert re.match(rf"{name}: \d+ parameters, [\d.]+ Gflop of matrix products a step, [\d.]+ "
                        "steps/s", pace)
        for line, goal in zip(goals, bench.GOALS, strict=True):
            assert re.fullmatch(rf"{name}: {re.escape(goal)} (after [\d.]+ s|not reached in [\d.]+"
                                r" s(; it had [\d.]+ when ours got there)?)", line)
    assert len([line for line in lines if line.startswith("over_plain, ")]) == 2
    assert any("times its matrix products alone" in line for line in lines)


def test_time_only_has_no_race(capsys, short):
    assert bench.main(["--preset=smoke", "--device=cpu", "--time-only"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 + 3 + 3
    assert "reached" not in " ".join(lines)


def test_the_recursion_races_against_the_plain_recursion_in_the_same_precision(short):
    lines = list(bench.bench_lines(make_config("recursive"), {}, True))
    assert lines[0].endswith("bfloat16")
    assert [line.split(":")[0] for line in lines[1:5]] == [
        "ours", "plain recursion", "over_plain", "over_plain, plain recursion"]
    racers, _ = make_racers("recursive")
    for racer in racers:
        kinds = {left.dtype for _, left, _ in bench.record_products(racer.step)}
        assert kinds == {torch.bfloat16}


@pytest.mark.parametrize("options, said", [
    (["--preset", "big"], "preset = big:"), (["--preset", "tune"], "preset = tune:"),
    (["--regime", "half"], "regime = half:"), (["--device", "tpu"], "device = tpu:"),
    (["--threads", "0"], "threads = 0:"), (["--threads", "9999"], "threads = 9999:"),
    (["--threads", "two"], "--threads"), (["--facts", "f.tsv"], "--facts"),
    (["-o", "."], "out = .:"), (["-o", "nowhere/race.txt"], "nowhere")])
def test_bad_options_are_refused_in_one_line_and_write_nothing(capsys, tmp_path, monkeypatch,
                                                               options, said):
    monkeypatch.chdir(tmp_path)
    assert bench.main(options) == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out
    assert not list(tmp_path.iterdir())


def test_ctrl_c_ends_in_one_line(capsys, monkeypatch):
    def stop(racers, device):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure_pace", stop)
    assert bench.main(["--preset", "smoke", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "bench: stopped\n"


def test_it_starts_as_a_file_too_from_anywhere_and_without_docstrings(tmp_path):
    command = [sys.executable, "-OO", str(Path(bench.__file__).resolve()), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0
    assert "--time-only" in done.stdout
