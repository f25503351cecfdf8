"""Data sets in the layout of the public GrokkedTransformer code (Wang et al. 2024), to and from the
one file that `python grok.py --data FILE` reads.

    python -m extras.exchange read FOLDER -o FILE.npz
    python -m extras.exchange write FOLDER [--data FILE.npz | --regime R and world settings]

A folder holds vocab.json (tokens: entities, relations, marks), train.json (all facts, then training
compositions), valid.json (OOD compositions) and test.json (items with a type), of which test and
valid may be a sample. An item is
    {"input_text": "<h><r1><r2>", "target_text": "<h><r1><r2><t></a>", "type": "test_inferred_iid"}
and a fact's has no r2. The mixed splits are not written: they follow from the others.
"""
import argparse
import json
import os
import re
import shutil
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from data import (LIMITS, LISTED, REGIMES, BadInput, WorldConfig, all_splits, build_world,
                  check_settings, describe_fields, make_splits, make_world, queries, read_data)

TOKEN = "(<[^<>]+>)"
ITEM = re.compile(f"({TOKEN}{TOKEN}{TOKEN}?){TOKEN}</a>")  # h, r1, r2 if there is one; t
MARKS = ["<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>"]
TYPES = {"id_atomic": "id_atomic", "ood_atomic": "ood_atomic", "train_inferred": "train_inferred",
         "test_id": "test_inferred_iid", "test_ood": "test_inferred_ood"}
# what an item without a type is, a fact and a composition; in train.json a type comes on top
UNTYPED = {"train": ("atomic", "train_inferred"), "valid": (None, "test_ood"), "test": (None, None)}
SETTINGS = ("n_entities", "n_relations", "out_degree", "ood_fraction", "phi", "data_seed")


# ---------------------------------------------------------------- writing
def write_json(world, splits, folder):
    """Write train, valid, test and vocab.json to a new folder."""
    folder = Path(os.path.abspath(folder))
    vocab = [f"<{name}>" for name in world.entity_names + world.relation_names] + MARKS
    if re.findall(TOKEN, "".join(vocab)) != vocab or len(set(vocab)) < len(vocab):
        raise BadInput(f"{folder}: names must differ from each other and hold neither < nor >")
    facts = queries(world, np.arange(len(world.facts)))
    test = []
    for name, kind in TYPES.items():
        test += [{**item, "type": kind} for item in make_items(splits[name], world, vocab)]
    files = {"vocab": vocab, "valid": make_items(splits["test_ood"], world, vocab), "test": test,
             "train": make_items(facts, world, vocab)
             + make_items(splits["train_inferred"], world, vocab)}
    try:
        folder.mkdir(parents=True)  # what was there before is not ours to write to or remove
    except OSError as error:
        raise BadInput(f"{folder}: cannot be made ({error.strerror})")
    try:
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise BadInput(f"{folder}: cannot be written ({error.strerror})")


def make_items(split, world, vocab):
    """[{"input_text", "target_text"}] of Queries."""
    relation, items = vocab[world.n_entities:], []
    for h, r1, r2, _, t in zip(*(column.tolist() for column in split)):
        text = vocab[h] + relation[r1] + (relation[r2] if r2 >= 0 else "")
        items.append({"input_text": text, "target_text": f"{text}{vocab[t]}</a>"})
    return items


def write_data(path, world, splits, regime):
    """The .npz that data.read_data reads: facts (F, 3), is_ood (F,), names (JSON of entity and
    relation names and regime) and each split of LISTED as (N, 2) fact numbers; whole or not at all.
    """
    arrays = {"facts": world.facts, "is_ood": world.is_ood, "names": np.array(
        json.dumps([world.entity_names, world.relation_names, regime]))}
    for name in LISTED:
        h, r1, r2, b, _ = splits[name]
        arrays[name] = np.stack([world.index[h, r1], world.index[b, r2]], axis=1)
    temporary = f"{path}.{os.getpid()}"
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})")
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


# ---------------------------------------------------------------- reading
def read_json(folder):
    """(world, splits, regime) of a folder; the regime is natural, or injected if compositions of an
    ID and an OOD fact are trained.

    A fact without a type is OOD if no ID composition listed uses it; how many have none is said on
    stderr, and so is how many items of unknown types were skipped. Refuses, with file and item
    (counted from 0), what is malformed or contradicts another.
    """
    names = read_vocabulary(folder)
    places, kinds, tokens = read_items(folder, names)
    h, r1, r2, t = tokens
    is_fact = kinds == "atomic"
    world = read_world(folder, names, places, is_fact, tokens)
    E, tail = world.n_entities, world.facts[:, 2]
    first = find(world, h, r1 - E)                                              # (N,)
    second = np.where(r2 < 0, first, find(world, tail[first], r2 - E))
    refuse(places, (first < 0) | (second < 0), "train.json lacks a fact of its path")
    refuse(places, tail[second] != t, "the facts of train.json lead to another answer")
    world = replace(world, is_ood=mark_ood(len(tail), kinds, first, second))
    typed = len(np.unique(first[np.isin(kinds, ("id_atomic", "ood_atomic"))]))
    if typed < len(tail):
        print(f"{folder}: {len(tail) - typed} of {len(tail)} facts carry no type; with those in "
              f"no ID composition {world.is_ood.sum()} count as OOD", file=sys.stderr)
    return world, *list_splits(folder, world, places, kinds, first, second)


def read_world(folder, names, places, is_fact, tokens):
    """The World of the facts of train.json, nothing in it OOD yet."""
    h, r, _, t = tokens
    if not is_fact.any():
        raise BadInput(f"{folder}/train.json: holds no fact")
    E = int(1 + max(h[is_fact].max(), t[is_fact].max()))
    refuse(places, is_fact & (r < E),
           f"its relation precedes {names[E - 1]}, an entity, in vocab.json")
    once = np.unique(np.where(is_fact, h * len(names) + r, -1), return_index=True)[1]
    again = is_fact & ~np.isin(np.arange(len(h)), once)
    refuse(places, again, "its head and relation have a tail already")
    facts = np.stack([h, r - E, t], axis=1)[is_fact]
    facts = facts[facts[:, 0].argsort(kind="stable")]
    plain = [name[1:-1] for name in names]
    return build_world(folder, facts, np.zeros(len(facts), bool), plain[:E], plain[E:])


def find(world, h, r):
    """Fact numbers of (h, r), -1 where there is none or a number is no entity's or relation's."""
    known = (h < world.n_entities) & (r >= 0) & (r < world.n_relations)
    return np.where(known, world.index[np.where(known, h, 0), np.where(known, r, 0)], -1)


def mark_ood(n_facts, kinds, first, second):
    """(F,) bool: which facts are OOD, from the compositions and the typed facts listed."""
    is_ood = np.ones(n_facts, bool)
    for kind in ("id_atomic", "train_inferred", "test_id", "ood_atomic", "test_ood"):
        for hop in (first, second):  # the later kinds prevail
            is_ood[hop[kinds == kind]] = "ood" in kind
    return is_ood


def list_splits(folder, world, places, kinds, first, second):
    """(splits, regime): three splits as the items list them; the mixed ones are complete."""
    ood1, ood2, F = world.is_ood[first], world.is_ood[second], len(world.facts)
    trained, composition = kinds == "train_inferred", first * F + second
    said_id = np.isin(kinds, ("id_atomic", "test_id"))
    tested = np.isin(kinds, ("test_id", "test_ood"))
    refuse(places, said_id & (ood1 | ood2), "is ID, but OOD elsewhere")
    refuse(places, tested & np.isin(composition, composition[trained]),
           "is a training composition, too")
    refuse(places, trained & ood1 & ood2, "is trained, but both its facts are OOD elsewhere")
    listed = []
    for name in LISTED:
        once = list(dict.fromkeys(composition[kinds == name].tolist()))
        if not once:
            raise BadInput(f"{folder}: lists nothing for {name}")
        listed.append(np.divmod(np.array(once), F))
    regime = "injected" if (trained & (ood1 | ood2)).any() else "natural"
    return all_splits(world, listed), regime


def refuse(places, bad, why):
    """BadInput for the first of the items that are bad, (N,) bool."""
    if bad.any():
        raise BadInput(f"{places[bad.argmax()]}: {why}")


def read_vocabulary(folder):
    """The names of entities and relations, as tokens."""
    names = [token for token in read_list(f"{folder}/vocab.json") if token not in MARKS]
    if re.findall(TOKEN, "".join(map(str, names))) != names or len(set(names)) < len(names):
        raise BadInput(f"{folder}/vocab.json: must be a list of different tokens like <e_0>")
    return names


def read_list(path):
    """The JSON list, not empty, in a UTF-8 file."""
    try:
        items = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}")
    if not isinstance(items, list) or not items:
        raise BadInput(f"{path}: must be a JSON list that is not empty")
    return items


def read_items(folder, names):
    """All items as (places, kinds (N,), tokens (4, N)): h, r1, r2 and t, -1 for no r2. An item of
    train.json that carries a type stands twice, as what it is there and as what its type says."""
    number_of = {None: -1, **{name: number for number, name in enumerate(names)}}
    rows, skipped = [], Counter()
    for file in UNTYPED:
        for i, item in enumerate(read_list(f"{folder}/{file}.json")):
            place = f"{folder}/{file}.json, item {i}"
            kind = item.get("type") if isinstance(item, dict) else None
            if isinstance(kind, str) and kind not in TYPES.values():
                skipped[kind] += 1
                continue
            tokens = read_tokens(item, place, number_of)
            for kind in read_kinds(item, place, file, tokens[2] >= 0):
                rows.append((place, kind, tokens))
    if skipped:
        said = ", ".join(f"{n} items of type {kind!a}" for kind, n in skipped.items())
        print(f"{folder}: skipped {said}, unknown here", file=sys.stderr)
    places, kinds, tokens = zip(*rows) if rows else ((), (), np.empty((0, 4), int))
    return places, np.array(kinds, dtype=str), np.array(tokens).T


def read_tokens(item, place, number_of):
    """(h, r1, r2, t) of an item, by number."""
    texts = (item.get("input_text"), item.get("target_text")) if isinstance(item, dict) else ()
    match = ITEM.fullmatch(texts[1]) if texts and isinstance(texts[1], str) else None
    if not match or match[1] != texts[0]:
        raise BadInput(f"{place}: must be <h><r1> or <h><r1><r2>, and the same with <t></a>")
    for token in match.groups()[1:]:
        if token not in number_of:
            raise BadInput(f"{place}: token {token} is not in vocab.json")
    return [number_of[token] for token in match.groups()[1:]]


def read_kinds(item, place, file, is_composition):
    """What an item is: a name of TYPES, "atomic" for a fact of train.json, "copy" for a training
    composition outside it."""
    kinds = [UNTYPED[file][is_composition]]
    if "type" in item:
        names = {kind: name for name, kind in TYPES.items()}
        named = names[item["type"]] if isinstance(item["type"], str) else None
        named = "copy" if named == "train_inferred" else named
        kinds = [*kinds, named] if file == "train" else [named]
    for kind in kinds:
        if kind is None or ("atomic" in kind) == is_composition:
            raise BadInput(f"{place}: must be of a type that fits; type = {item.get('type')!r}")
    return kinds


# ---------------------------------------------------------------- the command line
class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""
    def error(self, message):
        raise BadInput(message)


def parse(argv):
    """The options given, as a namespace; world settings that are not given are None."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("extras.exchange", description=__doc__, formatter_class=raw, allow_abbrev=False,
                    epilog="read --help and write --help list their options")
    commands = parser.add_subparsers(dest="command", required=True, metavar="read or write")
    read = commands.add_parser("read", help="a folder, into one data file", allow_abbrev=False)
    read.add_argument("folder", help="holds vocab.json, train.json, valid.json and test.json")
    read.add_argument("-o", "--out", required=True, metavar="FILE.npz", help="the file to make")
    write = commands.add_parser("write", help="a new folder", allow_abbrev=False)
    write.add_argument("folder", help="the folder to make")
    write.add_argument("--data", metavar="FILE.npz", help="what to write (a world made here)")
    write.add_argument("--regime", metavar="R", help=f"{', '.join(REGIMES)} (natural)")
    comments = describe_fields(WorldConfig)
    for field in fields(WorldConfig):
        if field.name in SETTINGS:
            write.add_argument("--" + field.name.replace("_", "-"), type=field.type, metavar="V",
                               help=f"{comments[field.name]} ({field.default})")
    words = []
    for word in argv:  # --out_degree and --out-degree are the same
        name, equals, value = word.partition("=")
        words.append((name.replace("_", "-") if name[:2] == "--" else name) + equals + value)
    return parser.parse_args(words)


def make_data(given):
    """(world, splits) of a data file, or of a world made here."""
    chosen = {name: getattr(given, name) for name in ("regime", *SETTINGS)}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if given.data is not None and chosen:
        raise BadInput(f"data = {given.data}: brings its world and regime; leave out "
                       f"{', '.join(chosen)}")
    if given.data is not None:
        return read_data(given.data)[:2]
    regime = chosen.pop("regime", "natural")
    config = check_settings(WorldConfig(**chosen), LIMITS)
    world = make_world(config)
    return world, make_splits(world, config, regime)


def main(argv=None):
    """Run the command line; returns the exit status: 0, or 2 for bad input."""
    try:
        given = parse(sys.argv[1:] if argv is None else argv)
        if given.command == "read":
            write_data(given.out, *read_json(given.folder))
        else:
            write_json(*make_data(given), given.folder)
    except BadInput as error:
        print(f"exchange: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
