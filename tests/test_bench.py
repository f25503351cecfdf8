"""What extras/bench.py promises: `pytest extras/test_bench.py`."""
import re

import pytest
import torch

import grok
from extras import bench


def made(preset="smoke", **settings):
    """What grok.describe returns."""
    options = [f"--{name}={value}" for name, value in settings.items()]
    return grok.describe(grok.parse(["--preset", preset, "--device", "cpu", *options]))


def sizes(about):
    """(entities + relations + the blank, D, T, loops)"""
    world, model = about["world"], about["model"]
    return (world["n_entities"] + world["n_relations"] + 1, model["d_model"],
            {"causal": 3, "bidirectional": 4}[model["layout"]], model["n_loops"])


def test_the_plain_ones_are_trained_on_our_rows_drawn_as_often():
    trainer = bench.make_racers(made(atomic_share=0.25, batch_size=64), 0.01)[1]
    loader = bench.make_loader(trainer)
    assert torch.equal(loader.dataset.tensors[0], trainer.tokens)
    assert torch.equal(loader.dataset.tensors[1], trainer.answers)
    assert loader.batch_size == 64
    chance = loader.sampler.weights / loader.sampler.weights.sum()
    assert chance[:trainer.n_facts].sum().item() == pytest.approx(0.25)
    assert torch.unique(chance).numel() == 2 and loader.sampler.replacement
    random = torch.Generator().manual_seed(1)
    rows = [grok.draw(trainer.config, trainer.n_facts, len(trainer.tokens), random)
            for _ in range(4)]
    ours = torch.stack(rows) < trainer.n_facts
    assert ours.float().mean().item() == 0.25


def test_without_a_share_of_facts_all_rows_are_as_likely():
    trainer = bench.make_racers(made(atomic_share=0), 0.01)[1]
    weights = bench.make_loader(trainer).sampler.weights
    torch.testing.assert_close(weights, weights[0].expand(len(trainer.tokens)))


@pytest.mark.parametrize("preset", ["smoke", "tiny", "small"])
def test_parameters_are_as_many_as_the_formulas_say_and_products_about_as_large(preset):
    described = made(preset)
    V, D, T, loops = sizes(described[0])
    hidden = 8 * D // 3
    ours, looped, layers = bench.make_racers(described, 0.01)[0]
    width = looped.trained.layers[0].linear1.out_features
    if preset == "small":  # token mixing, and two matrices of tokens
        expected = 2 * V * D + 8 * T * T + 4 * T * T + D * D + 3 * D * hidden
        products, plain = 9 * D + 12 * T, 4 * D + 2 * T + 2 * width  # a position, over D
    else:
        expected = V * D + 4 * D * D + 3 * D * hidden
        products, plain = 12 * D + 2 * T, 4 * D + 2 * T + 2 * width
    layer = 4 * D * D + 4 * D + 2 * D * width + width + D + 4 * D
    rest = V * D + T * D + D * V + V
    for racer, count in ((ours, expected), (looped, rest + layer), (layers, rest + loops * layer)):
        assert sum(weight.numel() for weight in racer.trained.parameters()) == count
    assert plain == pytest.approx(products, rel=0.01)


@pytest.mark.parametrize("preset", ["smoke", "small"])
def test_looped_is_layers_with_equal_weights_and_answers_where_ours_does(preset):
    described = made(preset)
    racers, trainer = bench.make_racers(described, 0.01)
    looped, layers = (racer.trained for racer in racers[1:])
    layers.tokens, layers.positions, layers.head = looped.tokens, looped.positions, looped.head
    for layer in layers.layers:
        layer.load_state_dict(looped.layers[0].state_dict())
    tokens = torch.cat([trainer.tokens[:3], trainer.tokens[-3:]])  # facts, and compositions
    torch.testing.assert_close(layers(tokens), looped(tokens))
    state, mask = looped.tokens(tokens) + looped.positions.weight, None
    if preset == "smoke":
        mask = torch.tensor([[0, 1, 1], [0, 0, 1], [0, 0, 0]]).bool()
    for _ in range(described[0]["model"]["n_loops"]):
        state = looped.layers[0](state, src_mask=mask)
    place = {"smoke": [1, 1, 1, 2, 2, 2], "small": [2, 2, 2, 3, 3, 3]}[preset]
    expected = looped.head(state[torch.arange(6), torch.tensor(place)])
    torch.testing.assert_close(looped(tokens), expected)


def test_the_plain_ones_learn_their_rows_and_their_wait_for_them_is_counted():
    racers, trainer = bench.make_racers(made(), 0.01)
    for racer in racers[1:]:
        before = racer.trained(trainer.tokens)
        for _ in range(20):
            racer.step()
        losses = [torch.nn.functional.cross_entropy(logits, trainer.answers)
                  for logits in (before, racer.trained(trainer.tokens))]
        assert losses[1] < losses[0] and racer.loading > 0


def racer_of(name, turns, grades):
    return bench.Racer(name, torch.nn.Linear(1, 2), None, turns=turns, grades=grades)


def test_what_is_said_follows_from_times_and_grades():
    ours = racer_of("ours", [(1.0, 0.0)] * 4, [
        (1.0, {"train_inferred": 0.5, "test_ood": 0.0}),
        (2.0, {"train_inferred": 0.99, "test_ood": 0.5}),
        (4.0, {"train_inferred": 1.0, "test_ood": 0.96})])
    other = racer_of("other", [(2.0, 0.5), (3.0, 0.5), (2.0, 0.5)], [
        (4.0, {"train_inferred": 0.9, "test_ood": 0.125}),
        (7.0, {"train_inferred": 0.99, "test_ood": 0.25})])
    assert list(bench.racer_lines(ours, ours)) == [
        "ours: 4 parameters, 10.0 steps/s, 0% of the time in its DataLoader",
        "ours: training >= .99 after 2.0 s", "ours: OOD >= .5 after 2.0 s",
        "ours: OOD >= .95 after 4.0 s"]
    assert list(bench.racer_lines(other, ours)) == [
        "other: 4 parameters, 5.0 steps/s, 21% of the time in its DataLoader",
        "other: training >= .99 after 7.0 s",
        "other: OOD >= .5 not reached in 7.0 s; it had 0.125 when ours got there",
        "other: OOD >= .95 not reached in 7.0 s; it had 0.125 when ours got there"]
    assert list(bench.ratio_lines(ours, other)) == [
        "ours / other: 2.00 times as many steps a second",
        "ours / other: 1.50 times as many, the DataLoader not counted",
        "ours / other: training >= .99 3.50 times as soon",
        "ours / other: OOD >= .5 more than 3.50 times as soon",
        "ours / other: OOD >= .95 more than 1.75 times as soon"]


@pytest.mark.parametrize("goal_at, seconds, expected", [
    (None, None, None),   # ours never gets there: until it has made all of its steps
    (0.4, None, 0.4),     # all have the time that ours needed
    (0.4, 0.6, 0.6)])     # or the time that was asked for
def test_a_race_gives_all_the_same_time(monkeypatch, goal_at, seconds, expected):
    racers, trainer = bench.make_racers(made(steps=100, eval_every=10), 0.01)
    clock = [0.0]
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock[0])

    def fake_grade(racer, exams):
        right = 1.0 if goal_at and racer is racers[0] and racer.seconds() >= goal_at else 0.0
        racer.grades.append((racer.seconds(), {"train_inferred": right, "test_ood": right}))

    def fake_step(racer, took):
        def step():
            clock[0] += took
        racer.step = step

    monkeypatch.setattr(bench, "grade", fake_grade)
    for racer, took in zip(racers, (0.01, 0.02, 0.005)):
        fake_step(racer, took)
    bench.race(racers, trainer, seconds)
    wanted = expected or 1.0  # 100 steps of .01 s
    for racer, turn in zip(racers, (0.1, 0.2, 0.05)):
        assert wanted - 1e-6 <= racer.seconds() <= wanted + 0.2 + turn
    assert [racer.step_time() for racer in racers] == pytest.approx([0.01, 0.02, 0.005])


def test_the_bench_says_hardware_and_then_one_line_a_fact(capsys):
    assert bench.main(["--preset", "smoke", "--device", "cpu", "--seconds", "0.5"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}, preset smoke, natural, seed 0" in first
    assert "threads" in first
    for name in ("ours", "looped", "layers"):
        mine = [line for line in lines if line.startswith(name + ": ")]
        assert re.fullmatch(rf"{name}: \d+ parameters, [\d.]+ steps/s, \d+% of the time in its "
                            "DataLoader", mine[0])
        for line, goal in zip(mine[1:], ("training >= .99", "OOD >= .5", "OOD >= .95")):
            assert re.fullmatch(rf"{name}: {re.escape(goal)} (after [\d.]+ s|not reached in [\d.]+"
                                r" s(; it had [\d.]+ when ours got there)?)", line)
        assert len(mine) == 4
    ratios = [line for line in lines if line.startswith("ours / ")]
    assert len(ratios) >= 4 and len(ratios) + 12 == len(lines)


def test_time_only_grades_nothing(capsys):
    assert bench.main(["--preset=smoke", "--device=cpu", "--time-only", "--seconds=0.6"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 3 + 4 and not any("reached" in line or "after" in line
                                               for line in lines)


@pytest.mark.parametrize("options, said", [
    (["--seconds", "0"], "seconds = 0.0:"), (["--seconds", "nan"], "seconds = nan:"),
    (["--weight-decay", "-1"], "weight_decay = -1.0:"), (["--preset", "big"], "preset = big:"),
    (["--preset", "tune"], "start = None:"), (["--facts", "f.tsv"], "--facts"),
    (["--seed", "-1"], "seed = -1:"), (["--device", "tpu"], "device = tpu:")])
def test_bad_options_are_refused(capsys, options, said):
    assert bench.main(options) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.count("\n") == 1 and not printed.out
