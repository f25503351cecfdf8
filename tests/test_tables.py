"""The tables are those of the shipped files; their arithmetic is checked by hand."""
import json
from pathlib import Path

import numpy as np
import pytest

import data
import grok
from extras import tables
from grok import first_step

ROOT = Path(__file__).parents[1]
SHIPPED = ROOT / "runs" / "shipped"


@pytest.fixture(scope="module")
def groups():
    return tables.read_groups(SHIPPED)


def test_the_page_of_runs_is_written_from_the_shipped_files():
    expected = "\n".join(tables.page(SHIPPED)) + "\n"
    assert (SHIPPED / "README.md").read_text(encoding="utf-8") == expected


def test_the_verdicts_of_the_readme_are_those_of_the_shipped_files(groups):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for line in [*tables.short_verdicts(groups), *tables.worth_lines(groups)]:
        assert line in readme


def test_grokking_folds_ood_facts_in_and_supervision_does_it_by_the_fit(groups):
    head, *rows = tables.swaps(tables.choose(groups, "small/"))
    shares = {}
    for name, stage, split, *cells in rows:
        shares[name, stage, split] = [float(cell.split()[0]) for cell in cells[2:]]
    assert len(shares) == 20
    facts, donor_id, donor_ood, code_id, code_ood = shares["small/natural", "before", "ID"]
    assert facts > 100 and min(donor_id, code_id) > 0.85 > 0.15 > max(donor_ood, code_ood)
    facts, donor_id, donor_ood, code_id, code_ood = shares["small/natural", "grokked", "ID"]
    assert facts > 100 and min(donor_id, code_id) > 0.95 > min(donor_ood, code_ood) > 0.7
    assert shares["small/natural", "before", "OOD"][0] < 10     # too few to say anything
    for name in ("both_full", "second_full"):           # hop 2 supervised: ID and OOD alike
        for stage in grok.WEIGHTS:
            facts, donor_id, donor_ood, code_id, code_ood = shares[f"small/{name}", stage, "ID"]
            assert abs(donor_id - donor_ood) < 0.05 and abs(code_id - code_ood) < 0.05, name


def test_a_probe_reads_the_papers_order_where_the_lens_sees_nothing(groups):
    runs = [run for run in groups["small/natural"] if (run.folder / "frames.npz").exists()]
    assert len(runs) == 3
    for run in runs:
        frames = tables.read_frames(run.folder / "frames.npz")
        assert list(frames["step"]) == [line["step"] for line in run.history]
        fit = first_step(run.history, 0.99, "train_inferred")
        half = tables.first_frame(frames, "probe", 0.5)
        assert fit < half < first_step(run.history, 0.25, "test_ood")
        assert tables.last(tables.until(run, half), "test_ood") < 0.1
        assert frames["bridge"].max() < 0.2
        one, two = (first_step(run.history, 0.5, split) for split in ("test_ood_id", "test_id_ood"))
        assert one < two, run.folder                    # hop 1 is folded in before hop 2


def test_what_r2_alone_gives_is_counted_by_hand_and_said_in_the_readme(groups):
    run = groups["tune/small_natural_grokked"][0]
    world, splits = grok.build_data(run.about, run.folder)
    trained, asked = splits["train_inferred"], splits["new_old"]
    answers, right = {}, 0
    for r2, t in zip(trained.r2.tolist(), trained.t.tolist()):
        answers.setdefault(r2, []).append(t)
    for r2, t in zip(asked.r2.tolist(), asked.t.tolist()):
        seen = answers.get(r2, [0])
        right += t == max(sorted(set(seen)), key=seen.count)
    assert tables.by_r2(run)[0] == f"{right / len(asked.t):.2f}"
    head, *rows = tables.r2_alone(groups)
    paper = next(row for row in rows if row[:2] == ["paper", "220, with all compositions"])
    said = tables.narrow(paper[2:3]).strip("| ")[:-1]
    assert f"that gives {said}, five draws) of new + old" in (
        " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()))
    text = next(row for row in rows if row[:2] == ["paper", "8,000"])
    assert float(text[2].split()[0]) < 0.05 and float(paper[3].split()[0]) < 0.05


def test_tables_of_own_runs_leave_out_what_compares_others(tmp_path, capsys):
    """Those that compare runs which are not there say so; the others are made."""
    folder = tmp_path / "mine/natural/seed0"
    folder.mkdir(parents=True)
    for name in ("config.json", "metrics.jsonl"):
        (folder / name).write_bytes((SHIPPED / "tiny/natural/seed0" / name).read_bytes())
    (tmp_path / "mine").rename(tmp_path / "tiny")
    assert tables.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "no 'small/natural': Verdicts." in said and "| tiny/natural | 1 | 7000 |" in said


def test_the_readme_shows_what_the_shipped_run_printed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    grok.print_result(Path("runs/shipped/tiny/natural/seed0"))
    assert capsys.readouterr().out in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_the_readme_says_of_the_forms_holds_in_every_regime(groups):
    """Grokked: in seeds 0 and 1 the bridge is the first entity, in seed 2 not; used in all."""
    for name, runs in tables.choose(groups, "small/").items():
        for run in runs:
            found = run.paths["grokked"]["test_id"]
            first = run.about["model"]["seed"] in (0, 1)
            assert (tables.entity_seen(found) >= 0.95) == first, (name, run.folder)
            assert tables.map_at(found, "code").max() >= 0.9
            assert tables.last(run, "test_ood", "best") < 0.55
    before = [run.paths["before"]["test_id"] for name in ("both_full", "second_full")
              for run in groups[f"small/{name}"] + groups[f"classes/{name}"] if run.paths]
    assert all(tables.map_at(found, "code").max() >= 0.5 for found in before)


def test_the_seed_decides_the_form_but_for_two_runs_of_seed_4(groups):
    head, *rows = tables.classes(groups)
    assert [row[0] for row in rows] == ["both_full", "both_half", "first_full", "second_full",
                                        "natural", "other_world", "smaller_steps"]
    usual = ["entity", "entity", "code", "entity", "entity", "code", "code", "entity"]
    odd = {}
    for name, *words in rows:
        odd.update(((name, i), words[i]) for i in range(8) if words[i] not in ("", usual[i]))
    assert odd == {("both_half", 4): "code", ("first_full", 4): "code, then entity",
                   ("natural", 6): "code, then neither"}


def test_every_run_of_the_classes_goes_half_as_long_after_the_fit_and_is_opened_twice(groups):
    opened = 0
    for regime in ("both_full", "both_half", "first_full", "second_full", "natural"):
        for run in tables.runs_of(groups, regime):
            fit = first_step(run.history, 0.99, "train_inferred")
            assert run.history[-1]["step"] >= 1.5 * fit, run.folder
            assert list(run.paths) == ["before", "grokked"], run.folder
            opened += 1
    assert opened == 40


def test_a_form_that_the_lens_sees_takes_in_new_facts_more_easily(groups):
    head, *rows = tables.new_by_class(groups)
    assert [row[2] for row in rows] == [5, 3] * 3 + [2, 1]
    for one, other in zip(rows[::2], rows[1::2]):
        for i in (3, 4, 5):
            assert float(one[i].split()[0]) >= float(other[i].split()[0]), (one[0], head[i])
    ends = [float(row[-1].split()[0]) for row in rows[-2:]]
    assert ends[0] > 0.95 and ends[1] < 0.5


def test_each_form_has_its_own_row_and_every_seed_one(groups):
    head, *rows = tables.by_class(groups)
    for one, other in zip(rows[::2], rows[1::2]):
        assert one[0] == other[0] and one[1:2] + other[1:2] == ["entity", "code"]
        assert one[2] + other[2] == 8
    seen = head.index("seen among entities")
    for regime in range(4):  # supervised: the OOD bridge is seen more where it is an entity
        means = [float(row[seen].split()[0]) for row in rows[2 * regime:2 * regime + 2]]
        assert means[0] > 3 * means[1]


def test_the_first_weights_decide_the_form_whatever_is_drawn(groups):
    head, *rows = tables.draws(tables.choose(groups, "draws/weights"))
    assert rows == [["seed 0", *["entity"] * 4], ["seed 1", *["entity"] * 4],
                    ["seed 2", *["code"] * 4], ["seed 5", *["code"] * 4]]


def test_of_the_first_weights_the_mixing_decides(groups):
    head, *rows = tables.grafts(tables.choose(groups, "graft/"))
    kinds = {part: cells for part, *cells in rows}
    assert kinds["mixing"] == kinds["mixing_positions"] == ["code", "entity"]  # both ways
    for part in ("embedding", "head", "mixing_out", "mlp"):
        assert kinds[part] == ["entity", "code"], part
    mix = grok.load_run(SHIPPED / "small/both_full/seed0")[0].blocks[0].mix
    assert mix.gate_up.weight.numel() + mix.down.weight.numel() == 192


def test_the_rule_for_width_holds_at_sizes_that_it_was_not_fitted_on(groups):
    for size, seeds, steps in ((70, 3, 3000), (200, 3, 16000)):
        runs = groups[f"growth/small_{size}_both_full"]
        assert len(runs) == seeds
        for run in runs:
            assert abs(run.about["model"]["d_model"] - tables.width_for(size)) < 2
            assert first_step(run.history, 0.95, "test_ood") <= steps


def test_the_papers_direction_comes_out_where_the_readme_says(groups):
    """In every seed: before grokking, and with three dials, two of them beyond what r2 alone gives;
    wrong old + new stays wrong even with the right bridge put in."""
    for name in ("small_natural_before", "dial_two_blocks", "dial_six_loops", "dial_rows_alike"):
        for run in groups[f"tune/{name}"]:
            assert tables.last(run, "new_old") > tables.last(run, "old_new") + 0.1, run.folder
            assert name == "dial_two_blocks" or tables.hop1_ahead(run, tables.last), run.folder
            found = tables.read_json(run.folder / "facts.json")["grokked"]["mended"]["old_new"]
            assert found["n"] > 300 and found["share"] <= 0.1


def test_a_row_of_stages_worked_out_by_hand(groups):
    head, *rows = tables.stages({"tiny/natural": groups["tiny/natural"]})
    cell = dict(zip(head, rows[0]))
    histories, fitted = [], []
    for seed in (0, 1, 2):
        text = (SHIPPED / f"tiny/natural/seed{seed}/metrics.jsonl").read_text(encoding="utf-8")
        histories.append([json.loads(line) for line in text.splitlines()])
    for history in histories:
        fitted.append(next(line["step"] for line in history
                           if line["accuracy"]["train_inferred"] >= 0.99))
    assert cell["training >= .99"] == f"{sum(fitted) / 3:.0f} ({min(fitted)} to {max(fitted)})"
    ends = [history[-1]["accuracy"]["test_ood"] for history in histories]
    assert cell["OOD answer"] == f"{np.mean(ends):.2f} ({min(ends):.2f} to {max(ends):.2f})"


def test_four_cells_by_brute_force():
    """Each OOD composition is looked up by hand among the training compositions."""
    folder = SHIPPED / "small/both_half/seed0"
    model, world, splits = grok.load_run(folder)
    found = tables.four_cells(model, world, splits)
    trained = list(zip(*(column.tolist() for column in splits["train_inferred"])))
    as_hop1, as_hop2 = {(h, r1) for h, r1, *_ in trained}, {(b, r2) for _, _, r2, b, _ in trained}
    asked = splits["test_ood"]
    tokens, answers = grok.to_tokens(asked, world, model.config.layout)
    right = (model(tokens).argmax(-1) == answers).tolist()
    counts = {cell: [] for cell in found}
    for h, r1, r2, b, good in zip(*(column.tolist() for column in asked[:4]), right):
        words = ["no", "yes"]
        counts[f"{words[(h, r1) in as_hop1]}, {words[(b, r2) in as_hop2]}"].append(good)
    for cell, hits in counts.items():
        assert found[cell]["n"] == len(hits)
        assert found[cell]["right"] == pytest.approx(np.mean(hits), abs=1e-6)
    stored = json.loads((folder / "cells.json").read_text(encoding="utf-8"))
    assert {cell: part["n"] for cell, part in stored.items()} == {
        cell: part["n"] for cell, part in found.items()}


def test_runs_are_grouped_by_what_they_are(tmp_path):
    """Runs that differ in more than their seed under one name, or the same run twice: refused."""
    def made(name, *options):
        assert grok.main(["--preset", "smoke", "--steps", "2", "--out", str(tmp_path / name),
                          *options]) == 0

    made("a/one")
    made("a/two", "--seed", "1")
    assert [len(runs) for runs in tables.read_groups(tmp_path).values()] == [2]
    made("a/three", "--seed", "1")
    with pytest.raises(data.BadInput, match="same run"):
        tables.read_groups(tmp_path)
    made("b/one")
    made("b/two", "--regime", "both_full")
    with pytest.raises(data.BadInput, match="more than its seed"):
        tables.read_groups(tmp_path / "b")
    with pytest.raises(data.BadInput, match="no run"):
        tables.read_groups(tmp_path / "c")


def test_wilson_interval():
    """From the formula: n / (n + z^2) is the lower end of n of n."""
    assert tables.wilson(16, 16) == (pytest.approx(0.806, abs=0.001), 1.0)
    assert tables.wilson(0, 18) == (0.0, pytest.approx(0.176, abs=0.001))
    assert tables.wilson(0, 0) == (0, 1)


def test_alikeness_of_maps():
    a = np.zeros((2, 2, 3))
    a[0, 1, 1] = a[1, 0, 2] = 1
    assert tables.alike(a, a) == 1 and tables.alike(a, 1 - a) == 0
    assert tables.alike(a, a / 2) == pytest.approx(0.5)
    free = np.ones(a.shape, bool)
    assert 0 < tables.alike_shuffled(a, a, free) < 0.5
    assert tables.alike_shuffled(a, a, a > 2) == 1  # nothing is free to move


def test_spread_counts_the_seeds_that_never_got_there():
    assert tables.spread([1, 2, 3], 0) == "2 (1 to 3)"
    assert tables.spread([1, None, 3], 0) == "2 (1 to 3; 1 never)"
    assert tables.spread([None, None]) == "never" and tables.spread([]) == ""
    assert tables.spread([0.5]) == "0.50"


def test_a_pause_does_not_make_a_step_longer(groups):
    run = groups["growth/100"][0]
    paused = [dict(line) for line in run.history]
    for line in paused[7:]:
        line["seconds"] += 3600
    again = tables.step_time(run._replace(history=paused))
    assert again == pytest.approx(tables.step_time(run), rel=0.05)
    end = run.history[-1]
    assert again == pytest.approx(1000 * end["seconds"] / end["step"], rel=0.2)


def test_growth_is_in_the_order_of_size(groups):
    head, *rows = tables.growth(tables.choose(groups, "growth/", "tiny/natural"))
    sizes = [row[1] for row in rows]
    assert sizes == sorted(sizes) and len(rows) >= 7
    run = groups["growth/100"][0]
    row = next(row for row in rows if row[0] == "growth/100")
    column = head.index("training >= .99")
    assert str(first_step(run.history, 0.99, "train_inferred")) in row[column]


def test_new_facts_serve_as_hop_1_where_they_are_written_in_time(groups):
    head, *rows = tables.written(tables.choose(groups, "tune/"))
    rows = {row[0].removeprefix("tune/"): row for row in rows}
    grokked = [value.split()[0] for value in rows["small_natural_grokked"][-3:-1]]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    said = "serve {} of their compositions, others {} (grokked, three seeds).".format(*grokked)
    assert said in readme
    mean = {}
    for name, row in rows.items():
        mean[name] = [float(cell.split()[0]) for cell in row[3:]]
    for name in ("small_natural_before", "small_natural_grokked", "flat_natural_before_all",
                 "flat_natural_grokked_all"):
        old, new, state, _, in_time, late, mended = mean[name]
        assert old > new + 0.3 and state > 0.9 and in_time > 0.8 > 0.55 > late, name
        assert old > 0.5 and (new < 0.51 or name == "flat_natural_before_all"), name
        assert mended > 0.98, name
    assert mean["flat_scratch_all"][1] > 0.8
    overtakes = []
    for scratch, grokked in zip(groups["tune/flat_scratch_all"],
                                groups["tune/flat_natural_grokked_all"]):
        overtakes.append(all(tables.last(scratch, kind) > tables.last(grokked, kind)
                             for kind in ("new_old", "old_new", "new_new")))
    assert sorted(overtakes) == [False, True, True]


def test_where_a_new_fact_is_looked_up(groups):
    """Alone and, from grokked, in part as hop 2 in the last loop; as hop 1 hardly there."""
    head, *rows = tables.unlearnt(tables.choose(groups, "tune/"))
    rows = {row[0].removeprefix("tune/"): dict(zip(head, row)) for row in rows}
    for name in ("small_natural_grokked", "flat_natural_grokked_all", "early_natural_grokked"):
        row = rows[name]
        assert row["alone, last loop"] == row["fact alone"] and row["at"]
        alone, hop1, hop2, old = (float(row[key].split()[0]) for key in (
            "alone, last loop", "hop 1, last loop", "hop 2, last loop", "old compositions, most"))
        assert min(alone, hop2) >= 0.5 > 0.15 > hop1 and old < 0.1, name
    assert float(rows["small_natural_before"]["hop 2, last loop"].split()[0]) < 0.5


def test_graded_a_loop_earlier_every_grokked_start_gives_the_papers_direction(groups):
    for regime in data.REGIMES:
        late, early = (groups[f"tune/{kind}_{regime}_grokked"] for kind in ("small", "early"))
        assert len(early) == 3
        for run in early:
            assert tables.last(run, "new_old") > tables.last(run, "old_new") + 0.2, run.folder
        usual = np.mean([tables.last(run, "old_new") for run in late])
        most = 0.6 if regime in ("first_full", "both_half") else 0.5
        assert np.mean([tables.last(run, "old_new") for run in early]) < most * usual
    kept = [tables.last(run, "old_new") for run in groups["tune/early_answer_natural_grokked"]]
    assert np.mean(kept) > 0.5                          # the answer alone graded: hop 2 is there


def test_a_block_drawn_afresh_takes_in_more_and_an_embedding_does_not(groups):
    head, *rows = tables.fresh(groups)
    served = {}
    for part, seeds, *cells in rows:
        served[part] = [float(cell.split()[0]) for cell in cells]
    assert [row[1] for row in rows] == ["", *[3] * 7]
    for part in ("mixing", "mlp"):
        assert all(served[part][i] > served["nothing"][i] + 0.1 for i in range(3)), part
        assert served[part][1] > served["everything"][1] + 0.1     # what was kept helps hop 2
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    fresh = next(tables.narrow(cells) for part, seeds, *cells in rows if part == "mlp")
    said = "serve {} as hop 1, {} as hop 2; kept, {:.2f} and {:.2f} (".format(
        *fresh.strip("| ").split(" | ")[:2], *served["nothing"][:2])
    assert said in readme
    for one, other in zip(groups["fresh/mlp"], groups["fresh/mlp_before"]):     # what the wait buys
        assert tables.last(one, "old_new") > tables.last(other, "old_new")
    assert served["embedding"] == pytest.approx(served["nothing"], abs=0.1)


def test_with_few_old_facts_kept_every_start_ends_in_the_papers_direction(groups):
    """Not so with all kept; and the circuit still serves old facts."""
    head, *rows = tables.at_length(groups)
    grokked = [f"{regime}, grokked" for regime in data.REGIMES]
    assert [row[0] for row in rows] == ["r2 alone", "scratch", "natural, before", *grokked]
    assert all(row[1] == 3 for row in rows[1:])
    ahead = sum(row[head.index("new + old ahead")] for row in rows if "grokked" in row[0])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"[{ahead} of {3 * len(grokked)}](" in readme
    for start, seeds, *cells, n in rows[1:]:
        early1, early2, late1, late2, _, _, old, held = (float(str(cell).split()[0])
                                                         for cell in cells)
        assert n > 500
        assert late1 > late2 + 0.15 and old < 0.3, start
        if "grokked" in start:
            assert late2 < 0.75 * early2 and held > 0.9, start
    for regime in data.REGIMES:
        for run in groups[f"tune/flat_{regime}_grokked_all"]:
            at = {line["step"]: line["accuracy"]["old_new"] for line in run.history}
            assert at[6000] > at[400] - 0.1, run.folder
    for run in groups["tune/flat_natural_grokked"]:
        assert tables.late(run, "new_old") > tables.late(run, "old_new") + 0.1, run.folder
        assert max(line["step"] for line in run.history) == 6000


def test_with_all_old_facts_and_time_the_start_from_before_ends_ahead_of_grokked(groups):
    pairs = zip(groups["tune/flat_natural_before_all"], groups["tune/flat_natural_grokked_all"])
    for before, grokked in pairs:
        assert before.history[-1]["step"] == 24000
        for kind in ("new_old", "old_new", "new_new"):
            assert tables.last(before, kind) > tables.last(grokked, kind), before.folder
