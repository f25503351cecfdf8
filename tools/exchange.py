"""Data sets in the layout of the public GrokkedTransformer code (Wang et al. 2024), to and from the
one file that `python grok.py --facts FILE` reads.

    python -m tools.exchange read FOLDER -o FILE
    python -m tools.exchange write FOLDER [--facts FILE | world settings]

A folder holds four files, each a JSON list:

    vocab.json   tokens: entities, then relations, then marks
    train.json   items: all facts, then the training compositions
    valid.json   items: OOD test compositions, or a sample of them
    test.json    items with a type: facts and compositions of all kinds, or a sample of them

An item asks a question; that of a fact has no <r2>. Ada's mother's city:

    {"input_text": "<Ada><mother><city>", "target_text": "<Ada><mother><city><Bern></a>",
     "type": "test_inferred_iid"}

The mixed splits, test_id_ood and test_ood_id, are in no file: they follow from the others.
"""
import io
import json
import os
import re
import shutil
import sys
from collections import Counter, namedtuple
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

if not __package__:  # an editor's Run button starts this file and not the module
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (GIVEN_SPLITS, REGIMES, BadInput, all_splits, build_world, decode, describe_world,
                  queries, read_bytes, reading, shares_of_regime)
from grok import Config, Parser, command, make_data, say, settings_of, take_facts, write_file

TOKEN = "(<[^<>]+>)"
ITEM = re.compile(f"({TOKEN}{TOKEN}{TOKEN}?){TOKEN}</a>")  # h, r1, r2 if there is one; t
MARKS = ["<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>"]

TYPES = {"id_atomic": "id_atomic",  # split: the type of its items
         "ood_atomic": "ood_atomic",
         "train_inferred": "train_inferred",
         "test_id": "test_inferred_iid",
         "test_ood": "test_inferred_ood"}
SPLIT_OF_TYPE = {item_type: split for split, item_type in TYPES.items()}
UNTYPED = {"train": ("atomic", "train_inferred"),  # file: the kinds of a fact and of a composition
           "valid": (None, "test_ood"),            # that carry no type
           "test": (None, None)}
SAYS_OOD = {"id_atomic": False,  # kind: whether the facts of such items are OOD; the later prevail,
            "train_inferred": False,  # for a regime trains OOD facts in compositions, too
            "test_id": False,
            "ood_atomic": True,
            "test_ood": True}
SETTINGS = ("n_entities", "n_relations", "out_degree", "ood_fraction", "phi", "data_seed",
            "hop1", "hop2", "k")

# N items of all files, by number of their token in vocab.json: (N,) int each, r2 = -1 in a fact
# places    where each stands, to say so
# kinds     (N,) str: a name of TYPES; "atomic" for a fact of train.json; or "train_copy" for an
#           item that calls itself a training composition, which those of train.json alone are
Items = namedtuple("Items", "places kinds h r1 r2 t")


# ---------------------------------------------------------------- writing
@contextmanager
def writing(path):
    """Turns an error of writing into one line, a BadInput."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: cannot be written ({error.strerror})")


def write_json(world, splits, folder):
    """Write the four files to a new folder; killed by an error, or by Ctrl-C, it leaves none.

    BadInput if the folder is there already, which is not ours to write to or to remove, or if names
    would be misread."""
    folder = Path(os.path.abspath(folder))  # "new/.." is there, and need not be made
    files = make_files(world, splits)
    with writing(folder):
        folder.mkdir(parents=True)
        try:
            for name, content in files.items():
                (folder / f"{name}.json").write_bytes(json.dumps(content).encode())
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def make_files(world, splits):
    """{name: list} of the four files."""
    vocab = make_vocabulary(world)
    facts = queries(world, np.arange(len(world.facts)))
    test = []
    for split, item_type in TYPES.items():
        for item in make_items(splits[split], world, vocab):
            test.append({**item, "type": item_type})
    training = make_items(splits["train_inferred"], world, vocab)
    return {"vocab": vocab,
            "train": make_items(facts, world, vocab) + training,
            "valid": make_items(splits["test_ood"], world, vocab),
            "test": test}


def make_vocabulary(world):
    """The tokens: E entities, R relations, marks; BadInput unless they can be told apart."""
    vocab = [f"<{name}>" for name in world.entity_names + world.relation_names] + MARKS
    if not are_tokens(vocab):
        raise BadInput("names must differ from each other and from mask, sep, a and q, and hold "
                       "neither < nor >")
    return vocab


def are_tokens(tokens):
    """Whether these are different texts like <Ada>."""
    if not all(isinstance(token, str) for token in tokens):
        return False
    return re.findall(TOKEN, "".join(tokens)) == tokens and len(set(tokens)) == len(tokens)


def make_items(split, world, vocab):
    """[{"input_text", "target_text"}], one for each of the Queries."""
    relations = vocab[world.n_entities:]
    items = []
    for h, r1, r2, _, t in np.stack(split, axis=1).tolist():
        text = vocab[h] + relations[r1]
        if r2 >= 0:
            text += relations[r2]
        items.append({"input_text": text, "target_text": f"{text}{vocab[t]}</a>"})
    return items


def write_data(path, world, splits, regime):
    """Write the file that data.parse_data reads, whole or not at all, and exactly there: what it is
    follows from its content, so it may have any suffix, or none. `regime` is any text."""
    path = Path(path)
    arrays = {"facts": world.facts, "is_ood": world.is_ood}
    arrays["names"] = json.dumps([world.entity_names, world.relation_names, regime])
    for name in GIVEN_SPLITS:
        arrays[name] = path_numbers(world, splits[name])
    buffer = io.BytesIO()  # given a name, numpy would append .npz to it
    np.savez_compressed(buffer, **arrays)
    if path.is_dir():
        raise BadInput(f"{path}: cannot be written (is a folder)")
    with writing(path):
        write_file(path, buffer.getvalue())


def path_numbers(world, split):
    """(N, 2) int, the fact numbers of hop 1 and hop 2 of the Queries of compositions."""
    first = world.index[split.h, split.r1]                                      # (N,)
    second = world.index[split.b, split.r2]                                     # (N,)
    return np.stack([first, second], axis=1)


# ---------------------------------------------------------------- reading
def read_json(folder):
    """(world, splits, regime) of a folder; the regime is "natural", or "injected" if compositions
    of an ID and an OOD fact are trained.

    A fact without a type is OOD if no ID composition in the files uses it; how many have none is
    said on stderr, and so is how many items of unknown types were skipped. BadInput, which names
    file and item (counted from 0), for what is malformed or contradicts another item."""
    folder = Path(folder).as_posix()
    names = read_vocabulary(f"{folder}/vocab.json")
    items = read_items(folder, names)
    world = read_world(folder, items, names)
    first, second = follow(items, world)
    world = replace(world, is_ood=mark_ood(world, items, first, second))
    report_untyped(folder, world, items, first)
    check_kinds(world, items, first, second)
    splits = list_splits(folder, world, items, first, second)
    trained = path_numbers(world, splits["train_inferred"])                     # (N, 2)
    regime = "injected" if world.is_ood[trained].any() else "natural"
    return world, splits, regime


def read_vocabulary(path):
    """The tokens of entities and relations."""
    names = [token for token in read_list(path) if token not in MARKS]
    if not are_tokens(names):
        raise BadInput(f"{path}: must be a list of different tokens like <e_0>")
    return names


def read_list(path):
    """The JSON list, not empty, in a UTF-8 file."""
    text = decode(read_bytes(path), path)
    with reading(path, "is no JSON"):
        values = json.loads(text)
    if not isinstance(values, list) or not values:
        raise BadInput(f"{path}: must be a JSON list that is not empty")
    return values


def read_items(folder, names):
    """The Items of all files. An item of train.json that carries a type stands twice, as what it is
    there and as what its type says."""
    numbers = {name: number for number, name in enumerate(names)}
    places = []
    kinds = []
    tokens = []
    for file, place, item in list_items(folder):
        item_tokens = read_tokens(item, place, numbers)
        for kind in read_kinds(item, place, file, item_tokens[2] >= 0):
            places.append(place)
            kinds.append(kind)
            tokens.append(item_tokens)
    h, r1, r2, t = np.array(tokens, dtype=int).reshape(-1, 4).T                 # (N,) each
    return Items(places, np.array(kinds, dtype=str), h, r1, r2, t)


def list_items(folder):
    """Yield (file, place, item) for all files; skips items of unknown types, and says so."""
    skipped = Counter()
    for file in UNTYPED:
        for number, item in enumerate(read_list(f"{folder}/{file}.json")):
            if has_unknown_type(item):
                skipped[item["type"]] += 1
            else:
                yield file, f"{folder}/{file}.json, item {number}", item
    report_skipped(folder, skipped)


def has_unknown_type(item):
    """Whether an item's type is a text that we do not know."""
    item_type = item.get("type") if isinstance(item, dict) else None
    return isinstance(item_type, str) and item_type not in SPLIT_OF_TYPE


def report_skipped(folder, skipped):
    """Say on stderr how many items of which types were skipped, by a Counter of types."""
    if skipped:
        counts = [f"{count} items of type {item_type!a}" for item_type, count in skipped.items()]
        print(f"{folder}: skipped {', '.join(counts)}, unknown here", file=sys.stderr)


def read_tokens(item, place, numbers):
    """[h, r1, r2, t] of an item, by number in vocab.json; r2 = -1 in a fact."""
    match = match_item(item)
    if match is None:
        raise BadInput(f"{place}: must be <h><r1> or <h><r1><r2>, and the same with <t></a>")
    tokens = []
    for token in match.groups()[1:]:
        if token is not None and token not in numbers:
            raise BadInput(f"{place}: token {token} is not in vocab.json")
        tokens.append(-1 if token is None else numbers[token])
    return tokens


def match_item(item):
    """The match of ITEM with an item's target text, None if the item is malformed."""
    if not isinstance(item, dict) or not isinstance(item.get("target_text"), str):
        return None
    match = ITEM.fullmatch(item["target_text"])
    if match is None or match[1] != item.get("input_text"):
        return None
    return match


def read_kinds(item, place, file, is_composition):
    """The kinds of an item (see Items): one, or two if it stands in train.json with a type."""
    kinds = [UNTYPED[file][is_composition]]
    if "type" in item:
        kind = SPLIT_OF_TYPE[item["type"]] if isinstance(item["type"], str) else None
        if kind == "train_inferred":
            kind = "train_copy"
        kinds = [*kinds, kind] if file == "train" else [kind]
    for kind in kinds:
        if kind is None or ("atomic" in kind) == is_composition:
            raise BadInput(f"{place}: must be of a type that fits; type = {item.get('type')!r}")
    return kinds


def read_world(folder, items, names):
    """The World of the facts of train.json, nothing in it OOD yet. The entities are all tokens
    up to the last that a fact has as head or tail; the relations are the others."""
    is_fact = items.kinds == "atomic"                                           # (N,) bool
    if not is_fact.any():
        raise BadInput(f"{folder}/train.json: holds no fact")
    E = int(1 + max(items.h[is_fact].max(), items.t[is_fact].max()))
    refuse(items, is_fact & (items.r1 < E),
           f"its relation precedes {names[E - 1]}, an entity, in vocab.json")
    refuse(items, mark_repeated(items, is_fact), "its head and relation have a tail already")
    facts = np.stack([items.h, items.r1 - E, items.t], axis=1)[is_fact]         # (F, 3)
    facts = facts[facts[:, 0].argsort(kind="stable")]
    plain = [name[1:-1] for name in names]
    return build_world(folder, facts, np.zeros(len(facts), bool), plain[:E], plain[E:])


def mark_repeated(items, is_fact):
    """(N,) bool: the facts whose head and relation a fact before them has."""
    is_repeated = np.zeros(len(is_fact), bool)
    pairs = set()
    for row in np.flatnonzero(is_fact):
        pair = (items.h[row], items.r1[row])
        is_repeated[row] = pair in pairs
        pairs.add(pair)
    return is_repeated


def refuse(items, is_bad, why):
    """BadInput for the first of the items that are bad, (N,) bool, if there is one."""
    if is_bad.any():
        raise BadInput(f"{items.places[is_bad.argmax()]}: {why}")


def follow(items, world):
    """The path of each item through the facts, as fact numbers (first, second), (N,) int each; an
    item that is a fact has the same twice. BadInput if it breaks off or leads elsewhere."""
    E = world.n_entities
    tails = world.facts[:, 2]                                                   # (F,)
    first = fact_numbers(world, items.h, items.r1 - E)
    second = fact_numbers(world, tails[first], items.r2 - E)
    second = np.where(items.r2 < 0, first, second)
    refuse(items, (first < 0) | (second < 0), "train.json lacks a fact of its path")
    refuse(items, tails[second] != items.t, "the facts of train.json lead to another answer")
    return first, second


def fact_numbers(world, h, r):
    """(N,) int: the numbers of the facts (h, r), (N,) int each; -1 where there is none, or where
    h is no entity or r no relation."""
    is_pair = (h < world.n_entities) & (r >= 0) & (r < world.n_relations)
    numbers = np.full(len(h), -1)
    numbers[is_pair] = world.index[h[is_pair], r[is_pair]]
    return numbers


def mark_ood(world, items, first, second):
    """(F,) bool: the facts that are OOD, as the items say; OOD where they say nothing."""
    is_ood = np.ones(len(world.facts), bool)
    for kind, says_ood in SAYS_OOD.items():
        rows = items.kinds == kind
        is_ood[first[rows]] = says_ood
        is_ood[second[rows]] = says_ood
    return is_ood


def report_untyped(folder, world, items, first):
    """Say on stderr how many facts carry no type, if there are any."""
    F = len(world.facts)
    is_typed = np.isin(items.kinds, ("id_atomic", "ood_atomic"))                # (N,) bool
    n_typed = len(np.unique(first[is_typed]))
    if n_typed < F:
        print(f"{folder}: {F - n_typed} of {F} facts carry no type, and count as OOD if no ID "
              f"composition uses them; so {world.is_ood.sum()} facts are OOD", file=sys.stderr)


def check_kinds(world, items, first, second):
    """BadInput for an item whose kind contradicts that of another."""
    ood1 = world.is_ood[first]                                                  # (N,) bool
    ood2 = world.is_ood[second]                                                 # (N,) bool
    says_id = np.isin(items.kinds, ("id_atomic", "test_id"))
    refuse(items, says_id & (ood1 | ood2), "is ID, but OOD elsewhere")
    is_tested = np.isin(items.kinds, ("test_id", "test_ood"))
    is_trained = items.kinds == "train_inferred"
    paths = first * len(world.facts) + second  # one number for each composition
    is_both = is_tested & np.isin(paths, paths[is_trained])
    refuse(items, is_both, "is a training composition, too")
    refuse(items, is_trained & ood1 & ood2, "is trained, but both its facts are OOD elsewhere")


def list_splits(folder, world, items, first, second):
    """{split: Queries}: three as the files list them, each composition once; the others whole."""
    listed = []
    for split in GIVEN_SPLITS:
        rows = items.kinds == split
        if not rows.any():
            raise BadInput(f"{folder}: lists nothing for {split}")
        paths = dict.fromkeys(zip(first[rows].tolist(), second[rows].tolist()))
        listed.append(np.array(list(paths)).T)                                  # (2, n)
    return all_splits(world, *listed)


# ---------------------------------------------------------------- the command line
def parse(argv=None):
    """The options, as a namespace; what is not given is None."""
    parser = Parser(prog="python -m tools.exchange",
                    description="Data sets in the JSON layout of the public GrokkedTransformer "
                    "code, to and from one file for grok.py --facts.",
                    epilog="read --help and write --help list their options")
    commands = parser.add_subparsers(dest="command", required=True, metavar="read or write")
    read = commands.add_parser("read", help="a folder, into one data file")
    read.add_argument("folder", help="holds vocab.json, train.json, valid.json and test.json")
    read.add_argument("-o", "--out", required=True, metavar="FILE", help="the file to make")
    write = commands.add_parser("write", help="a new folder")
    write.add_argument("folder", help="the folder to make")
    write.add_argument("--facts", metavar="FILE", help="what to write, a data file or a text of "
                       "facts (a random world)")
    write.add_argument("--regime", metavar="V", help="hop1, hop2 and k by the paper's names "
                       f"[{', '.join(REGIMES)}]")
    for item in fields(Config):
        if item.name in SETTINGS:
            write.add_argument("--" + item.name.replace("_", "-"), type=item.type, metavar="V",
                               help=f"{item.metadata['help']} ({item.default})")
    return parser.parse_args(argv)


def read_folder(folder, out):
    """Write the data set of a folder to the one file `out`, which must be none of the folder's."""
    world, splits, regime = read_json(folder)
    for name in ("vocab", *UNTYPED):
        source = Path(folder, f"{name}.json")
        if Path(out).exists() and source.samefile(out):
            raise BadInput(f"out = {out}: is part of the data set itself; choose another")
    write_data(out, world, splits, regime)
    say(f"{Path(out).as_posix()}: {describe_world(world)}")


def choose_data(given):
    """(world, splits) to write: those of a file or a random world, from {flag: value or None}."""
    values = {name: given[name] for name in SETTINGS if given[name] is not None}
    if given["regime"] is not None:
        values = {**shares_of_regime(given["regime"]), **values}
    files = {}
    if given["facts"] is not None:
        not_given = dict.fromkeys(settings_of("the world"))  # new facts, say, have no flag here
        values, files = take_facts(given["facts"], values, {**not_given, **given})
    return make_data(Config(**values), files)


@command("exchange")
def main(argv=None):
    """Read or write a data set; exit status 0, 2 for bad input, 130 when stopped."""
    given = parse(argv)
    if given.command == "read":
        read_folder(given.folder, given.out)
    else:
        world, splits = choose_data(vars(given))
        write_json(world, splits, given.folder)


if __name__ == "__main__":
    sys.exit(main())
