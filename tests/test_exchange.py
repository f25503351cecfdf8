"""What extras/exchange.py promises: `pytest extras/test_exchange.py`.

The oracle is a world made by data.py, of which the files are written, read, or changed by hand.
"""
import json
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

from data import (LISTED, REGIMES, SPLITS, BadInput, WorldConfig, make_splits, make_world,
                  read_data, read_facts)
from extras.exchange import main, read_json, write_data, write_json

SMALL = WorldConfig(n_entities=15, n_relations=9, out_degree=6, ood_fraction=0.25, phi=2.5)
OPTIONS = ["--n-entities", "15", "--n_relations", "9", "--out-degree=6", "--ood-fraction", "0.25",
           "--phi", "2.5"]


def small_data(regime="natural"):
    world = make_world(SMALL)
    return world, make_splits(world, SMALL, regime)


def assert_same_data(one, two):
    """Worlds and splits equal to the last row, order and names included."""
    for name in ("facts", "is_ood", "index"):
        np.testing.assert_array_equal(getattr(one[0], name), getattr(two[0], name))
    assert one[0].entity_names == two[0].entity_names
    assert one[0].relation_names == two[0].relation_names
    assert set(one[1]) == set(two[1]) == set(SPLITS)
    for name in SPLITS:
        np.testing.assert_array_equal(np.stack(one[1][name]), np.stack(two[1][name]))


def rows(split):
    return [tuple(row) for row in np.stack(split, axis=1).tolist()]


def load(folder):
    return {path.stem: json.loads(path.read_text()) for path in Path(folder).iterdir()}


def save(folder, files):
    for name, content in files.items():
        (Path(folder) / f"{name}.json").write_text(json.dumps(content))


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
    *made, found_regime = read_data("set.npz")
    assert_same_data(made, small_data(regime))
    assert found_regime == ("natural" if regime == "natural" else "injected")
    assert main(["write", "again", "--data", "set.npz"]) == 0
    assert load("again") == load("set")
    assert capsys.readouterr() == ("", "")


def test_files_have_the_layout_of_the_field(tmp_path):
    world, splits = small_data()
    write_json(world, splits, tmp_path / "a" / "set")
    files = load(tmp_path / "a" / "set")
    assert files["vocab"] == [*(f"<e_{i}>" for i in range(15)), *(f"<r_{i}>" for i in range(9)),
                              "<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>"]
    n_facts, n_ood = len(world.facts), world.is_ood.sum()
    for item, (h, r, t) in zip(files["train"], world.facts.tolist()):
        assert item == {"input_text": f"<e_{h}><r_{r}>",
                        "target_text": f"<e_{h}><r_{r}><e_{t}></a>"}
    items = {name: [] for name in LISTED}
    for name in LISTED:
        for h, r1, r2, _, t in rows(splits[name]):
            text = f"<e_{h}><r_{r1}><r_{r2}>"
            items[name].append({"input_text": text, "target_text": f"{text}<e_{t}></a>"})
    assert files["train"][n_facts:] == items["train_inferred"]
    assert files["valid"] == items["test_ood"]
    assert [item for item in files["test"] if item["type"] == "test_inferred_iid"] == [
        {**item, "type": "test_inferred_iid"} for item in items["test_id"]]
    assert Counter(item["type"] for item in files["test"]) == {
        "id_atomic": n_facts - n_ood, "ood_atomic": n_ood,
        "train_inferred": len(items["train_inferred"]),
        "test_inferred_iid": len(items["test_id"]), "test_inferred_ood": len(items["test_ood"])}


def test_ood_facts_are_recovered_from_a_sample(folder, capsys):
    """The public generator types at most 3,000 items of a kind and lists facts in any order."""
    world, splits = small_data()
    files, n_facts, rng = load(folder), len(world.facts), np.random.default_rng(0)
    files["train"][:n_facts] = [files["train"][i] for i in rng.permutation(n_facts)]
    taken = Counter()
    for item in files.pop("test"):
        taken[item["type"]] += item["type"] != "train_inferred"
        if 1 <= taken[item["type"]] <= (5 if item["type"] == "ood_atomic" else 4):
            files.setdefault("test", []).append(item)
    save(folder, files)
    found, listed, _ = read_json(folder)
    assert {tuple(fact) for fact in found.facts[found.is_ood].tolist()} == {
        tuple(fact) for fact in world.facts[world.is_ood].tolist()}
    assert f"{n_facts - 9} of {n_facts} facts carry no type" in capsys.readouterr().err
    assert rows(listed["test_id"]) == rows(splits["test_id"])[:4]
    for name in set(SPLITS) - {"test_id"}:
        assert set(rows(listed[name])) == set(rows(splits[name]))


def test_a_type_counts_in_whichever_file_it_stands(folder, capsys):
    """All facts typed in train.json alone, the ID test in valid.json: the same data."""
    files, kind_of = load(folder), {}
    for item in files["test"]:
        kind_of[item["input_text"]] = item["type"]
    files["train"] = [{**item, "type": kind_of[item["input_text"]]} for item in files["train"]]
    ids = [item for item in files["test"] if item["type"] == "test_inferred_iid"]
    files["test"] = [item for item in files["test"] if item["type"] == "test_inferred_ood"]
    files["valid"] += ids
    save(folder, files)
    assert_same_data(read_json(folder), small_data())
    assert capsys.readouterr().err == ""


def test_an_id_fact_in_no_composition_listed_is_id_if_its_type_says_so(folder):
    files, (world, _) = load(folder), small_data()
    files["vocab"][15:15] = ["<e_new>"]
    lonely = item("<e_new><r_0>", "e_new")
    files["train"].insert(0, lonely)
    for kind, n_ood in (("id_atomic", 0), ("ood_atomic", 1)):
        save(folder, {**files, "test": [{**lonely, "type": kind}, *files["test"]]})
        assert read_json(folder)[0].is_ood.sum() == world.is_ood.sum() + n_ood


def test_items_of_unknown_types_are_skipped_and_counted(folder, capsys):
    """Those that the fine-tuning data sets of the paper add, tokens of their own included."""
    files = load(folder)
    for _ in range(3):
        files["test"].append({**item("<e_99><r_1>", "e_1"), "type": "atomic_new"})
    files["train"].insert(4, {**item("<e_1><r_1><r_2>", "e_1"), "type": "test_inferred_new"})
    save(folder, files)
    assert_same_data(read_json(folder), small_data())
    assert capsys.readouterr().err == (f"{folder}: skipped 1 items of type 'test_inferred_new', "
                                       "3 items of type 'atomic_new', unknown here\n")


def test_own_facts_survive_the_fields_layout(tmp_path):
    """Names, rows of different length and order, too; names that would be misread are refused."""
    lines = [f"p{h}\tr{k}\tp{(3 * h + k * k) % 9}" for h in range(9) for k in range(3 + h % 3)]
    (tmp_path / "facts.tsv").write_text("\n".join(lines))
    config = WorldConfig(ood_fraction=0.3, phi=1.0)
    world = read_facts(tmp_path / "facts.tsv", config)
    made = world, make_splits(world, config)
    write_json(*made, tmp_path / "set")
    assert_same_data(read_json(tmp_path / "set"), made)
    for name in ("a>b", "p1", "r1", "mask"):
        with pytest.raises(BadInput, match="names must differ"):
            write_json(replace(world, entity_names=(name, *world.entity_names[1:], "p1")), made[1],
                       tmp_path / "other")
    assert not (tmp_path / "other").exists()


# ---------------------------------------------------------------- what is refused

def item(text, answer, **more):
    return {"input_text": text, "target_text": f"{text}<{answer}></a>", **more}


def without_facts_of_e_3(files):
    files["train"] = [i for i in files["train"] if i["input_text"].count("<") > 2
                      or not i["input_text"].startswith("<e_3>")]


def with_another_answer(files):
    third = files["valid"][2]
    other = "e_0" if "<e_0></a>" not in third["target_text"] else "e_1"
    third.update(item(third["input_text"], other))


def with_trained_ood(files):
    moved = files["valid"].pop()
    files["train"].append(moved)
    files["test"] = [i for i in files["test"] if i["input_text"] != moved["input_text"]]


BAD_SETS = [  # file, item number, what replaces or (where "+") precedes it, what is said
    ("train", 3, item("<e_0><r_99>", "e_1"), "train.json, item 3: token <r_99> is not in vocab"),
    ("train", 5, item("<r_1><e_0>", "e_1"), "train.json, item"),
    ("train", 5, item("<e_0><r_1>", "r_2"), "train.json, item"),
    ("train", 9, item("<e_0><r_1><r_2><r_3>", "e_1"), "train.json, item 9: must be <h><r1>"),
    ("train", 9, {"input_text": "<e_0>", "target_text": ["<e_0>"]}, "train.json, item 9: must be"),
    ("train", 9, "<e_0><r_1>", "train.json, item 9: must be"),
    ("test", 9, {**item("<e_0><r_1>", "e_1"), "input_text": "<e_0><r_2>"}, "item 9: must be"),
    ("test", 9, {"input_text": "<e_0><r_1>", "target_text": "<e_0><r_1><e_2>"}, "item 9: must be"),
    ("test", 0, item("<e_0><r_1>", "e_1"), "item 0: must be of a type that fits; type = None"),
    ("test", 0, item("<e_0><r_1>", "e_1", type=["id_atomic"]), "item 0: must be of a type that"),
    ("test", 0, item("<e_0><r_1>", "e_1", type="train_inferred"), "item 0: must be of a type that"),
    ("valid", 0, item("<e_0><r_1>", "e_1"), "valid.json, item 0: must be of a type that fits"),
    ("vocab", 0, "Anna", "vocab.json: must be a list of different tokens"),
    ("vocab", 1, "<e_0>", "vocab.json: must be a list of different tokens")]

BAD_CHANGES = {
    "two tails": (lambda files: files["train"].insert(1, {**files["train"][0], "target_text":
                  files["train"][0]["input_text"] + "<e_14></a>"}), "train.json, item 1: its head"),
    "fact twice": (lambda files: files["train"].insert(7, files["train"][0]), "item 7: its head"),
    "missing bridge": (without_facts_of_e_3, "lacks a fact of its path"),
    "other answer": (with_another_answer, "valid.json, item 2: the facts of"),
    "trained OOD": (with_trained_ood, "both its facts are OOD"),
    "training item tested": (lambda files: files["test"].append(
        {**files["train"][-1], "type": "test_inferred_iid"}), "is a training composition, too"),
    "typed so in train": (lambda files: files["train"][-1].update(type="test_inferred_iid"),
                          "is a training composition, too"),
    "ID composition as OOD": (lambda files: files["test"].append(
        {**files["train"][-1], "type": "test_inferred_ood"}), "test.json, item"),
    "OOD fact as ID": (lambda files: files["test"].append({**next(
        i for i in files["test"] if i["type"] == "ood_atomic"), "type": "id_atomic"}),
        "is ID, but OOD elsewhere"),
    "not a list": (lambda files: files.update(valid={"a": 1}), "valid.json: must be a JSON list"),
    "empty list": (lambda files: files.update(train=[]), "train.json: must be a JSON list"),
    "no facts": (lambda files: files.update(train=files["train"][-1:]), "holds no fact"),
    "all skipped": (lambda files: files.update({name: [{"type": "x"}] for name in (
        "train", "valid", "test")}), "holds no fact"),
    "no training": (lambda files: files.update(train=files["train"][:90]), "for train_inferred"),
    "no ID test": (lambda files: files.update(test=[i for i in files["test"] if i["type"] !=
                   "test_inferred_iid"]), "lists nothing for test_id"),
    "no relations": (lambda files: files.update(vocab=[
        t for t in files["vocab"] if "r_" not in t]), "is not in vocab.json"),
    "no entities": (lambda files: files.update(vocab=[
        t for t in files["vocab"] if "e_" not in t]), "is not in vocab.json"),
    "another order": (lambda files: files["vocab"].reverse(), "precedes"),
    "numbers": (lambda files: files.update(vocab=[1, 2]), "vocab.json: must be a list of"),
}


def refused(folder, said, capsys):
    """`read` says one line that holds `said`, exits with status 2, and writes nothing."""
    capsys.readouterr()
    assert main(["read", str(folder), "-o", str(folder / "out.npz")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("exchange: ") and said in lines[-1]
    assert all("skipped" in line for line in lines[:-1])
    assert not list(folder.glob("out*"))


@pytest.mark.parametrize("name, number, content, said", BAD_SETS)
def test_a_bad_item_is_refused_with_file_and_number(name, number, content, said, folder, capsys):
    files = load(folder)
    files[name][number] = content
    save(folder, files)
    refused(folder, said, capsys)


@pytest.mark.parametrize("change, said", BAD_CHANGES.values(), ids=BAD_CHANGES)
def test_a_data_set_that_contradicts_itself_is_refused(change, said, folder, capsys):
    files = load(folder)
    change(files)
    save(folder, files)
    refused(folder, said, capsys)


@pytest.mark.parametrize("name", ["train", "valid", "test", "vocab"])
def test_a_file_that_is_no_data_set_is_refused(name, folder, capsys):
    for content in (b"", b"[", b"[" * 10**6, b'{"a": 1}', b"null", b"\xff\xfe\x00", b'["\\ud800"]',
                    b"[[]]", b"[1e999]"):
        (folder / f"{name}.json").write_bytes(content)
        refused(folder, f"{name}.json", capsys)
    (folder / f"{name}.json").unlink()
    refused(folder, f"{name}.json: No such file", capsys)


@pytest.mark.parametrize("noise", [
    np.random.default_rng(0).bytes(10**7), b"[0," * (10**7 // 3), b"1" * 10**7,
    b'"' + b"a" * 10**7], ids=["bytes", "lists", "number", "text"])
def test_ten_megabytes_of_noise_are_refused_quickly_in_modest_memory(noise, folder):
    (folder / "train.json").write_bytes(noise)
    for read in (lambda: read_json(folder), lambda: read_facts(folder / "train.json", SMALL),
                 lambda: read_data(folder / "train.json")):
        began = time.perf_counter()
        tracemalloc.start()
        with pytest.raises(BadInput, match="train.json"):
            read()
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
        for split in LISTED:
            for h, r1, r2, b, t in rows(splits[split]):
                assert tails[h, r1] == b and tails[b, r2] == t
        write_data(path, world, splits, regime)  # sound enough for the file, too
        assert_same_data(read_data(path), (world, splits))


@pytest.mark.parametrize("command, said", [
    ("", "read or write"), ("read set", "-o/--out"), ("read", "folder"), ("write", "folder"),
    ("read nowhere -o x.npz", "nowhere/vocab.json: No such file or directory"),
    ("read set -o set", "set: cannot be written (Is a directory)"),
    ("read set -o no/x.npz", "no/x.npz: cannot be written (No such file or directory)"),
    ("write set", "set: cannot be made (File exists)"),
    ("write .", "cannot be made (File exists)"), ("write ..", "cannot be made (File exists)"),
    ("write set/..", "cannot be made (File exists)"),
    ("write new/..", "cannot be made (File exists)"),
    ("write set/vocab.json/x", "set/vocab.json/x: cannot be made (Not a directory)"),
    ("write new --regime none", "regime = none: must be one of natural"),
    ("write new --out-degree 41", "out_degree = 41: must lie in [1, n_relations = 40]"),
    ("write new --n-entities 1", "n_entities = 1: must lie in [2, 1000000]"),
    ("write new --phi 500", "phi = 500: must lie in"),
    ("write new --phi x", "--phi: invalid float value: 'x'"),
    ("write new --steps 5", "unrecognized arguments: --steps 5"),
    ("write new --new-facts 3", "unrecognized arguments: --new-facts 3"),
    ("write new --data set", "set: Is a directory"),
    ("write new --data set/vocab.json", "set/vocab.json: is no data file"),
    ("write new --data a.npz --phi 2 --regime natural", "leave out regime, phi")])
def test_a_command_that_cannot_be_used_is_refused_in_one_line(command, said, folder, capsys,
                                                              monkeypatch):
    monkeypatch.chdir(folder.parent)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert main(command.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("exchange: ") and err.count("\n") == 1 and said in err
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert list(folder.parent.iterdir()) == [folder]


def test_folders_with_dots_in_their_names_are_like_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_json(*small_data(), "new/../set.json")
    for name in ("v1.2", ".hidden", "./other."):
        write_json(*small_data(), name)
        assert main(["read", name, "-o", "out.v1.npz"]) == 0
        assert_same_data(read_data("out.v1.npz")[:2], small_data())
    assert main(["read", "v1.2/.", "-o", "v1.2/x"]) == 0
    monkeypatch.chdir("v1.2")
    assert main(["read", ".", "-o", "y"]) == 0
    assert Path("x").read_bytes() == Path("y").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"v1.2", ".hidden", "other.",
                                                          "set.json", "out.v1.npz"}


def test_the_command_itself_and_its_help():
    for options, status in ((["--help"], 0), (["read", "--help"], 0), (["write", "--help"], 0),
                            (["read", "nowhere", "-o", "x"], 2)):
        result = subprocess.run([sys.executable, "-m", "extras.exchange", *options],
                                capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert result.returncode == status and "Traceback" not in result.stderr
        assert result.stderr.count("\n") == (status == 2)
        named = {"--help": ["read", "write", "--regime"], "read": ["--out"],
                 "write": ["--data", "--regime", "--phi", "training compositions per ID fact"]}
        assert all(word in result.stdout + result.stderr for word in named[options[0]]
                   if status == 0)
