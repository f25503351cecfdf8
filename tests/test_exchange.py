"""What tools/exchange.py promises: `pytest tests/test_exchange.py`.

The oracle is a world made by data.py, of which the files are written, read, or changed by hand.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections import Counter
from dataclasses import replace
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import given, strategies as st

import grok
from data import (GIVEN_SPLITS, REGIMES, SPLITS, BadInput, make_splits, make_world, parse_data,
                  parse_facts, parse_source, read_bytes, shares_of_regime)
from grok import Config
from tools.exchange import main, read_json, write_data, write_json

HERE = Path(__file__).resolve().parent.parent
SMALL = Config(n_entities=15, n_relations=9, out_degree=6, ood_fraction=0.25, phi=2.5)
OPTIONS = ["--n-entities", "15", "--n-relations", "9", "--out-degree=6", "--ood-fraction", "0.25",
           "--phi", "2.5"]


def small_data(regime="natural"):
    config = replace(SMALL, **shares_of_regime(regime))
    world = make_world(config)
    return world, make_splits(world, config)


def assert_same_data(one, two):
    """Worlds and splits equal to the last row, order and names included."""
    for name in ("facts", "is_ood", "index"):
        np.testing.assert_array_equal(getattr(one[0], name), getattr(two[0], name))
    assert one[0].entity_names == two[0].entity_names
    assert one[0].relation_names == two[0].relation_names
    assert set(one[1]) == set(two[1]) == set(SPLITS)
    for name in SPLITS:
        np.testing.assert_array_equal(np.stack(one[1][name]), np.stack(two[1][name]))


def read_facts(path, config):
    return parse_facts(read_bytes(path), path, config)


def read_data(path):
    return parse_data(read_bytes(path), path)


def rows(split):
    return [tuple(row) for row in np.stack(split, axis=1).tolist()]


def load(folder):
    return {path.stem: json.loads(path.read_text(encoding="utf-8"))
            for path in Path(folder).iterdir()}


def save(folder, files):
    for name, content in files.items():
        (Path(folder) / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def make_item(text, answer, **more):
    return {"input_text": text, "target_text": f"{text}<{answer}></a>", **more}


def of_type(items, item_type):
    return [item for item in items if item.get("type") == item_type]


@pytest.fixture
def folder(tmp_path):
    """The small world's data set."""
    write_json(*small_data(), tmp_path / "set")
    return tmp_path / "set"


# ---------------------------------------------------------------- there and back
@pytest.mark.parametrize("regime", REGIMES)
def test_what_is_written_is_read_back_exactly(regime, tmp_path, capsys, monkeypatch):
    """From settings to a folder, to a data file, to another folder of the same files; the regime is
    recorded as far as the files tell it."""
    monkeypatch.chdir(tmp_path)
    assert main(["write", "set", "--regime", regime, *OPTIONS]) == 0
    assert main(["read", "set", "-o", "set.npz"]) == 0
    assert "15 entities, 9 relations, 90 facts, 540 two-step questions" in capsys.readouterr().out
    assert_same_data(read_data("set.npz"), small_data(regime))
    with np.load("set.npz") as file:
        written = json.loads(str(file["names"]))[2]
    assert written == ("natural" if regime == "natural" else "injected")
    assert main(["write", "again", "--facts", "set.npz"]) == 0
    assert load("again") == load("set")
    assert capsys.readouterr().err == ""


def test_a_regime_without_a_name_comes_from_its_shares(tmp_path):
    shares = ["--hop1", "0.25", "--hop2", "0.5", "--k", "3"]
    assert main(["write", str(tmp_path / "set"), *shares, *OPTIONS]) == 0
    config = replace(SMALL, hop1=0.25, hop2=0.5, k=3)
    world = make_world(config)
    assert_same_data(read_json(tmp_path / "set"), (world, make_splits(world, config)))


@pytest.mark.parametrize("name", ["world", "world.txt", "world.tsv", "a.b.npz", ".hidden"])
def test_a_data_file_may_have_any_name_and_is_written_exactly_there(name, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert main(["read", "set", "-o", name]) == 0
    assert {path.name for path in folder.parent.iterdir()} == {"set", name}
    assert_same_data(parse_source(read_bytes(name), name, SMALL), small_data())
    assert main(["write", "again", "--facts", name]) == 0
    assert load("again") == load("set")


def test_grok_trains_on_what_was_read(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert main(["read", "set", "-o", "world"]) == 0
    assert grok.main(["--facts", "world", "--preset", "smoke", "--steps", "1", "--device", "cpu",
                      "--out", "run"]) == 0
    _, world, splits = grok.load_run("run")
    assert_same_data((world, splits), small_data())


def test_files_have_the_layout_of_the_field(tmp_path):
    world, splits = small_data()
    write_json(world, splits, tmp_path / "a" / "set")
    files = load(tmp_path / "a" / "set")
    entities = [f"<e_{number}>" for number in range(15)]
    relations = [f"<r_{number}>" for number in range(9)]
    marks = ["<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>"]
    assert files["vocab"] == entities + relations + marks
    n_facts = len(world.facts)
    n_ood = world.is_ood.sum()
    for item, (h, r, t) in zip(files["train"], world.facts.tolist()):
        assert item == make_item(f"<e_{h}><r_{r}>", f"e_{t}")
    items = {name: [] for name in GIVEN_SPLITS}
    for name in GIVEN_SPLITS:
        for h, r1, r2, _, t in rows(splits[name]):
            items[name].append(make_item(f"<e_{h}><r_{r1}><r_{r2}>", f"e_{t}"))
    assert files["train"][n_facts:] == items["train_inferred"]
    assert files["valid"] == items["test_ood"]
    typed = [{**item, "type": "test_inferred_iid"} for item in items["test_id"]]
    assert of_type(files["test"], "test_inferred_iid") == typed
    assert Counter(item["type"] for item in files["test"]) == {
        "id_atomic": n_facts - n_ood, "ood_atomic": n_ood,
        "train_inferred": len(items["train_inferred"]),
        "test_inferred_iid": len(items["test_id"]), "test_inferred_ood": len(items["test_ood"])}


def test_ood_facts_are_recovered_from_a_sample(folder, capsys):
    """The public generator types at most 3,000 items of a kind and lists facts in any order."""
    world, splits = small_data()
    files = load(folder)
    n_facts = len(world.facts)
    order = np.random.default_rng(0).permutation(n_facts)
    files["train"][:n_facts] = [files["train"][number] for number in order]
    most = {"id_atomic": 4, "ood_atomic": 5, "test_inferred_iid": 4, "test_inferred_ood": 4}
    sample = []
    for item_type, count in most.items():
        sample += of_type(files["test"], item_type)[:count]
    save(folder, {**files, "test": sample})
    world_read, splits_read, _ = read_json(folder)
    ood_read = world_read.facts[world_read.is_ood].tolist()
    assert sorted(ood_read) == sorted(world.facts[world.is_ood].tolist())
    assert f"{n_facts - 9} of {n_facts} facts" in capsys.readouterr().err
    assert rows(splits_read["test_id"]) == rows(splits["test_id"])[:4]
    for name in set(SPLITS) - {"test_id"}:
        assert set(rows(splits_read[name])) == set(rows(splits[name]))


def test_a_type_counts_in_whichever_file_it_stands(folder, capsys):
    """All facts typed in train.json alone, the ID test in valid.json: the same data."""
    files = load(folder)
    types = {item["input_text"]: item["type"] for item in files["test"]}
    files["train"] = [{**item, "type": types[item["input_text"]]} for item in files["train"]]
    files["valid"] += of_type(files["test"], "test_inferred_iid")
    files["test"] = of_type(files["test"], "test_inferred_ood")
    save(folder, files)
    assert_same_data(read_json(folder), small_data())
    assert capsys.readouterr().err == ""


def test_an_id_fact_in_no_composition_listed_is_id_if_its_type_says_so(folder):
    files = load(folder)
    n_ood = small_data()[0].is_ood.sum()
    files["vocab"][15:15] = ["<e_new>"]
    lonely = make_item("<e_new><r_0>", "e_new")
    files["train"].insert(0, lonely)
    for item_type, more in (("id_atomic", 0), ("ood_atomic", 1)):
        save(folder, {**files, "test": [{**lonely, "type": item_type}, *files["test"]]})
        assert read_json(folder)[0].is_ood.sum() == n_ood + more


def test_items_of_unknown_types_are_skipped_and_counted(folder, capsys):
    """Those that the fine-tuning data sets of the paper add, tokens of their own included."""
    files = load(folder)
    for _ in range(3):
        files["test"].append(make_item("<e_99><r_1>", "e_1", type="atomic_new"))
    files["train"].insert(4, make_item("<e_1><r_1><r_2>", "e_1", type="test_inferred_new"))
    save(folder, files)
    assert_same_data(read_json(folder), small_data())
    err = capsys.readouterr().err
    assert "1 items of type 'test_inferred_new'" in err and "3 items of type 'atomic_new'" in err


def test_a_byte_order_mark_changes_nothing(folder):
    for path in folder.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert_same_data(read_json(folder), small_data())


# ---------------------------------------------------------------- own facts
@pytest.fixture
def own_facts(tmp_path):
    """A text of facts, with rows of different length."""
    lines = []
    for h in range(9):
        for k in range(3 + h % 3):
            lines.append(f"p{h}\tr{k}\tp{(3 * h + k * k) % 9}")
    (tmp_path / "facts.tsv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "facts.tsv"


def test_own_facts_survive_the_fields_layout(own_facts):
    """Names, rows of different length and order, too; from Python and from the command line."""
    config = Config(ood_fraction=0.3, phi=1.0)
    world = read_facts(own_facts, config)
    splits = make_splits(world, config)
    folder = own_facts.parent
    write_json(world, splits, folder / "set")
    assert_same_data(read_json(folder / "set"), (world, splits))
    assert main(["write", str(folder / "again"), "--facts", str(own_facts),
                 "--ood-fraction", "0.3", "--phi", "1"]) == 0
    assert load(folder / "again") == load(folder / "set")


def test_names_that_would_be_misread_are_refused(own_facts):
    config = Config(ood_fraction=0.3, phi=1.0)
    world = read_facts(own_facts, config)
    splits = make_splits(world, config)
    for name in ("a>b", "p1", "r1", "mask"):
        bad = replace(world, entity_names=(name, *world.entity_names[1:], "p1"))
        with pytest.raises(BadInput, match="names must differ"):
            write_json(bad, splits, own_facts.parent / "other")
    assert not (own_facts.parent / "other").exists()


def test_settings_that_come_with_the_facts_are_refused(own_facts, folder, capsys):
    data_file = folder / "set.npz"
    assert main(["read", str(folder), "-o", str(data_file)]) == 0
    for path, flags in ((own_facts, ["--n-entities", "9"]), (data_file, ["--phi", "2"]),
                        (data_file, ["--regime", "natural"]), (data_file, ["--k", "18"])):
        assert main(["write", str(folder / "new"), "--facts", str(path), *flags]) == 2
        setting = flags[0].removeprefix("--").replace("-", "_")
        assert f"{setting} = " in capsys.readouterr().err
        assert not (folder / "new").exists()


# ---------------------------------------------------------------- what is refused
BAD_ITEMS = [  # file, item number, what replaces it, what is said
    ("train", 3, make_item("<e_0><r_99>", "e_1"), "train.json, item 3: token <r_99> is not in voc"),
    ("train", 5, make_item("<r_1><e_0>", "e_1"), "train.json, item"),
    ("train", 5, make_item("<e_0><r_1>", "r_2"), "train.json, item"),
    ("train", 9, make_item("<e_0><r_1><r_2><r_3>", "e_1"), "train.json, item 9: must be <h><r1>"),
    ("train", 9, {"input_text": "<e_0>", "target_text": ["<e_0>"]}, "train.json, item 9: must be"),
    ("train", 9, "<e_0><r_1>", "train.json, item 9: must be"),
    ("test", 9, {"input_text": "<e_0><r_2>", "target_text": "<e_0><r_1><e_1></a>"}, "item 9: must"),
    ("test", 9, {"input_text": "<e_0><r_1>", "target_text": "<e_0><r_1><e_2>"}, "item 9: must be"),
    ("test", 0, make_item("<e_0><r_1>", "e_1"), "item 0: must be of a type that fits; type = None"),
    ("test", 0, make_item("<e_0><r_1>", "e_1", type=["id_atomic"]), "item 0: must be of a type"),
    ("test", 0, make_item("<e_0><r_1>", "e_1", type="train_inferred"), "item 0: must be of a type"),
    ("valid", 0, make_item("<e_0><r_1>", "e_1"), "valid.json, item 0: must be of a type that fits"),
    ("vocab", 0, "Anna", "vocab.json: must be a list of different tokens"),
    ("vocab", 1, "<e_0>", "vocab.json: must be a list of different tokens")]


def two_tails(files):
    fact = files["train"][0]
    files["train"].insert(1, make_item(fact["input_text"], "e_14"))


def fact_twice(files):
    files["train"].insert(7, files["train"][0])


def missing_bridge(files):
    """Leave out the facts of e_3, which are the items with two tokens that begin with it."""
    files["train"] = [item for item in files["train"] if item["input_text"].count("<") > 2
                      or not item["input_text"].startswith("<e_3>")]


def another_answer(files):
    third = files["valid"][2]
    other = "e_1" if "<e_0></a>" in third["target_text"] else "e_0"
    third.update(make_item(third["input_text"], other))


def trained_ood(files):
    moved = files["valid"].pop()
    files["train"].append(moved)
    files["test"] = [item for item in files["test"] if item["input_text"] != moved["input_text"]]


def trained_and_tested(files):
    files["test"].append({**files["train"][-1], "type": "test_inferred_iid"})


def trained_and_called_test(files):
    files["train"][-1]["type"] = "test_inferred_iid"


def id_composition_called_ood(files):
    files["test"].append({**files["train"][-1], "type": "test_inferred_ood"})


def ood_fact_called_id(files):
    fact = of_type(files["test"], "ood_atomic")[0]
    files["test"].append({**fact, "type": "id_atomic"})


def not_a_list(files):
    files["valid"] = {"a": 1}


def empty_list(files):
    files["train"] = []


def no_facts(files):
    files["train"] = files["train"][-1:]


def all_skipped(files):
    for name in ("train", "valid", "test"):
        files[name] = [{"type": "x"}]


def no_training(files):
    files["train"] = files["train"][:90]


def no_id_test(files):
    files["test"] = [item for item in files["test"] if item["type"] != "test_inferred_iid"]


def no_relations(files):
    files["vocab"] = [token for token in files["vocab"] if "r_" not in token]


def no_entities(files):
    files["vocab"] = [token for token in files["vocab"] if "e_" not in token]


def another_order(files):
    files["vocab"].reverse()


def numbers_for_tokens(files):
    files["vocab"] = [1, 2]


BAD_CHANGES = [
    (two_tails, "train.json, item 1: its head"),
    (fact_twice, "item 7: its head"),
    (missing_bridge, "lacks a fact of its path"),
    (another_answer, "valid.json, item 2: the facts of"),
    (trained_ood, "both its facts are OOD"),
    (trained_and_tested, "is a training composition, too"),
    (trained_and_called_test, "is a training composition, too"),
    (id_composition_called_ood, "test.json, item"),
    (ood_fact_called_id, "is ID, but OOD elsewhere"),
    (not_a_list, "valid.json: must be a JSON list"),
    (empty_list, "train.json: must be a JSON list"),
    (no_facts, "holds no fact"),
    (all_skipped, "holds no fact"),
    (no_training, "for train_inferred"),
    (no_id_test, "lists nothing for test_id"),
    (no_relations, "is not in vocab.json"),
    (no_entities, "is not in vocab.json"),
    (another_order, "precedes"),
    (numbers_for_tokens, "vocab.json: must be a list of")]


def assert_refused(folder, said, capsys):
    """`read` says one line that holds `said`, exits with status 2, and writes nothing."""
    capsys.readouterr()
    assert main(["read", str(folder), "-o", str(folder / "out.npz")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("exchange: ") and said in lines[-1]
    assert all("skipped" in line for line in lines[:-1])
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize("name, number, content, said", BAD_ITEMS)
def test_a_bad_item_is_refused_with_file_and_number(name, number, content, said, folder, capsys):
    files = load(folder)
    files[name][number] = content
    save(folder, files)
    assert_refused(folder, said, capsys)


@pytest.mark.parametrize("change, said", BAD_CHANGES)
def test_a_data_set_that_contradicts_itself_is_refused(change, said, folder, capsys):
    files = load(folder)
    change(files)
    save(folder, files)
    assert_refused(folder, said, capsys)


@pytest.mark.parametrize("name", ["train", "valid", "test", "vocab"])
def test_a_file_that_is_no_data_set_is_refused(name, folder, capsys):
    for content in (b"", b"[", b"[" * 10**6, b'{"a": 1}', b"null", b"\xff\xfe\x00", b'["\\ud800"]',
                    b"[[]]", b"[1e999]", '["é"]'.encode("latin-1"), '["é"]'.encode("utf-16")):
        (folder / f"{name}.json").write_bytes(content)
        assert_refused(folder, f"{name}.json", capsys)
    (folder / f"{name}.json").unlink()
    assert_refused(folder, f"{name}.json: No such file", capsys)


@pytest.mark.parametrize("noise", [
    np.random.default_rng(0).bytes(10**7), b"[0," * (10**7 // 3), b"1" * 10**7,
    b'"' + b"a" * 10**7], ids=["bytes", "lists", "number", "text"])
def test_ten_megabytes_of_noise_are_refused_quickly_in_modest_memory(noise, folder):
    path = folder / "train.json"
    path.write_bytes(noise)
    for read, source in ((read_json, [folder]), (read_facts, [path, SMALL]), (read_data, [path])):
        began = time.perf_counter()
        tracemalloc.start()
        with pytest.raises(BadInput, match="train.json"):
            read(*source)
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
        assert time.perf_counter() - began < 3


@given(name=st.sampled_from(["train", "valid", "test", "vocab"]), at=st.floats(0, 1),
       cut=st.integers(0, 30), put=st.binary(max_size=6))
@hypothesis.settings(max_examples=60, deadline=None)
def test_random_damage_is_refused_or_harmless(name, at, cut, put):
    """Whatever bytes are lost or put in, nothing but BadInput is raised, and no answer is wrong."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(*small_data(), Path(folder) / "set")
        path = Path(folder) / "set" / f"{name}.json"
        content = path.read_bytes()
        start = int(at * len(content))
        path.write_bytes(content[:start] + put + content[start + cut:])
        try:
            world, splits, regime = read_json(path.parent)
        except BadInput as error:
            assert "\n" not in str(error)
            return
        tails = {(h, r): t for h, r, t in world.facts.tolist()}
        for split in GIVEN_SPLITS:
            for h, r1, r2, b, t in rows(splits[split]):
                assert tails[h, r1] == b and tails[b, r2] == t
        write_data(path, world, splits, regime)  # sound enough for the file, too
        assert_same_data(read_data(path), (world, splits))


# ---------------------------------------------------------------- the command line
@pytest.mark.parametrize("command, said", [
    ("", "read or write"), ("read set", "-o/--out"), ("read", "folder"), ("write", "folder"),
    ("read nowhere -o x.npz", "nowhere/vocab.json: No such file or directory"),
    ("read set -o set", "set: cannot be written"), ("read set -o .", "cannot be written"),
    ("read set -o no/x.npz", "x.npz: cannot be written"),
    ("read set -o set/train.json", "out = set/train.json: is part of the data set"),
    ("write set", "set: cannot be written"), ("write .", "cannot be written"),
    ("write ..", "cannot be written"), ("write set/..", "cannot be written"),
    ("write new/..", "cannot be written"), ("write set/vocab.json/x", "x: cannot be written"),
    ("write new --regime none", "regime = none: must be one of natural"),
    ("write new --out-degree 41", "out_degree = 41: must lie in [1, n_relations = 40]"),
    ("write new --n-entities 1", "n_entities = 1: must lie in [2, 1000000]"),
    ("write new --phi 500", "phi = 500: must lie in"),
    ("write new --phi x", "--phi: invalid float value: 'x'"),
    ("write new --k 3", "k = 3: needs hop1 or hop2"),
    ("write new --steps 5", "unrecognized arguments: --steps 5"),
    ("write new --new-facts 3", "unrecognized arguments: --new-facts 3"),
    ("write new --facts set", "set: Is a directory"),
    ("write new --facts nowhere", "nowhere: No such file"),
    ("write new --facts set/vocab.json", "set/vocab.json, line 1: needs head, relation and tail")])
def test_a_command_that_cannot_be_used_is_refused_in_one_line(command, said, folder, capsys,
                                                              monkeypatch):
    monkeypatch.chdir(folder.parent)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("exchange: ") and err.count("\n") == 1 and said in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error, status", [(OSError(28, "No space left on device"), 2),
                                           (KeyboardInterrupt(), 130)])
def test_a_folder_that_cannot_be_finished_is_removed(error, status, tmp_path, monkeypatch, capsys):
    usual = Path.write_bytes

    def write_two(path, content):
        if path.name == "valid.json":
            raise error
        return usual(path, content)

    monkeypatch.setattr(Path, "write_bytes", write_two)
    assert main(["write", str(tmp_path / "new"), *OPTIONS]) == status
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_folders_with_dots_in_their_names_are_like_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(*small_data(), "new/../set.json")
    for name in ("v1.2", ".hidden", "./other."):
        write_json(*small_data(), name)
        assert main(["read", name, "-o", "out.v1.npz"]) == 0
        assert_same_data(read_data("out.v1.npz"), small_data())
    assert main(["read", "v1.2/.", "-o", "v1.2/x"]) == 0
    monkeypatch.chdir("v1.2")
    assert main(["read", ".", "-o", "y"]) == 0
    assert Path("x").read_bytes() == Path("y").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"v1.2", ".hidden", "other.",
                                                          "set.json", "out.v1.npz"}


@pytest.mark.parametrize("command, flags", [
    (["--help"], ["read", "write"]), (["read", "--help"], ["--out"]),
    (["write", "--help"], ["--facts", "--regime", "--phi", "--hop1", "--data-seed"])])
def test_the_help_names_every_option(command, flags, capsys):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in flags)


def run_python(*words, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment,
                          capture_output=True, text=True, timeout=120)


def test_it_runs_as_a_module_and_as_a_file_from_anywhere(folder):
    """As an editor's Run button starts it; and without docstrings and asserts."""
    done = run_python("-m", "tools.exchange", "read", "nowhere", "-o", "x", cwd=HERE)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    done = run_python("-OO", HERE / "tools" / "exchange.py", "read", "set", "-o", "world",
                      cwd=folder.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_data(read_data(folder.parent / "world"), small_data())
