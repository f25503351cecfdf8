"""The world: a random knowledge graph, its two-hop compositions, and the splits a model is
trained and tested on (paper, Section 3 and Appendix C; the task is that of Wang et al. 2024).

    fact          (h, r, t)           head entity, relation, tail entity
    composition   (h, r1, r2) -> t    through the bridge b: (h, r1, b) and (b, r2, t) are facts
    ID / OOD      an OOD fact is trained alone, never as part of a composition (natural regime)

A fact is known by its index f = h * K + k, its place in the flattened (E, K) arrays of the world.
Only numpy here: the world depends on no model, no device and no global random state.
"""
import argparse
import json
import re
import shutil
import sys
from collections import namedtuple
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

SPLITS = ("id_atomic", "ood_atomic", "train_inferred", "test_id", "test_ood",
          "test_id_ood", "test_ood_id")  # the last two: ID hop 1 + OOD hop 2, and the reverse
# share of the OOD test facts injected as first hop, as second hop; compositions for each (App. C)
REGIMES = {"natural": (0.0, 0.0, 0), "both_full": (1.0, 1.0, 18), "both_half": (0.5, 0.5, 9),
           "first_full": (1.0, 0.0, 18), "second_full": (0.0, 1.0, 18)}


class BadInput(ValueError):
    """A setting or a file that cannot be used; its text is the one line the user reads."""
    __str__ = lambda self: " ".join(str(self.args[0]).split())  # names may hold line breaks


# ---------------------------------------------------------------- settings and command line
def setting(default, low, high, about, choices=None):
    """A dataclass field that carries its legal values and its line of --help."""
    return field(default=default, metadata=dict(low=low, high=high, choices=choices, about=about))


def check_settings(config):
    """The settings dataclass given; BadInput for its first field outside its type or range."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    for f in fields(config):
        value, kinds = getattr(config, f.name), (int, float) if f.type is float else f.type
        low, high, choices = (f.metadata[name] for name in ("low", "high", "choices"))
        if not isinstance(value, kinds) or isinstance(value, bool) != (f.type is bool):
            raise BadInput(f"{f.name} = {value!r}: must be {words[f.type]}")
        if choices and value not in choices:
            raise BadInput(f"{f.name} = {value}: must be one of {', '.join(choices)}")
        if low is not None and not low <= value <= high:
            raise BadInput(f"{f.name} = {value}: must lie in [{low}, {high}]")
    return config


def settings(cls, given):
    """A checked `cls` from those entries of `given` that name its fields and are not None."""
    known = {f.name: given[f.name] for f in fields(cls) if given.get(f.name) is not None}
    return check_settings(cls(**known))


class Parser(argparse.ArgumentParser):
    """argparse whose options are dataclass fields and whose errors are one line (BadInput)."""
    def error(self, message):
        raise BadInput(message)

    def add_settings(self, cls, title):
        group = self.add_argument_group(title)
        truth = lambda text: {"true": True, "false": False}.get(text.lower(), text)
        for f in fields(cls):
            kind, text = truth if f.type is bool else f.type, f"{f.metadata['about']} ({f.default})"
            group.add_argument("--" + f.name.replace("_", "-"), type=kind, metavar="V", help=text)

    def parse(self, argv):
        """The settings given on the command line; --out_degree and --out-degree are the same."""
        hyphens = lambda name: name[0].replace("_", "-")
        return vars(self.parse_args([re.sub("^--[^=]*", hyphens, word) for word in argv]))


@dataclass(frozen=True)
class WorldConfig:
    """The knowledge graph and how much of it is trained (paper, Section 3)."""
    n_entities: int = setting(40, 2, 10**6, "entities")
    n_relations: int = setting(40, 1, 10**5, "relations")
    out_degree: int = setting(28, 1, 10**5, "facts per head entity, each with its own relation")
    ood_fraction: float = setting(0.125, 0.0, 1.0, "share of facts that are OOD")
    phi: float = setting(18.0, 0.0, 10**5, "training compositions per ID fact")
    data_seed: int = setting(0, 0, 2**63 - 1, "seed of graph and splits, apart from the model's")
    new_facts: int = setting(0, 0, 10**7, "facts added for fine-tuning, in place of the OOD facts")
    kept: float = setting(1.0, 0.0, 1.0, "share of the ID facts kept when fine-tuning")
    new_k: int = setting(0, 0, 10**5, "compositions trained for each new fact, as second hop")


# ---------------------------------------------------------------- the graph
@dataclass(frozen=True)
class World:
    """A knowledge graph of E entities with up to K facts each; relation -1 pads a shorter row."""
    relations: np.ndarray  # (E, K) int, distinct within a row
    tails: np.ndarray      # (E, K) int
    is_ood: np.ndarray     # (E, K) bool
    entity_names: tuple
    relation_names: tuple
    n_entities = property(lambda world: len(world.entity_names))
    n_relations = property(lambda world: len(world.relation_names))
    facts = property(lambda world: np.flatnonzero(world.relations.ravel() >= 0))  # indices, (F,)

    def find(self, h, r):
        """Index of the fact with head h and relation r, -1 where there is none; (N,) int each."""
        stride = self.n_relations + 1  # one more than needed: no r >= 0 meets the -1 of padding
        keys = (np.arange(self.n_entities)[:, None] * stride + self.relations).ravel()
        order, wanted = keys.argsort(), h * stride + r
        fact = order[np.searchsorted(keys, wanted, sorter=order) % len(keys)]
        return np.where((keys[fact] == wanted) & (r >= 0), fact, -1)


class Queries(namedtuple("Queries", "h r1 r2 b t")):
    """N questions and their answers, one (N,) int array a column; r2 = b = -1 in atomic ones."""
    def take(self, rows):
        return Queries(*(column[rows] for column in self))


def make_world(config):
    """A random graph: `out_degree` distinct relations a head, each to a uniformly random tail."""
    check_settings(config)
    E, R, K = config.n_entities, config.n_relations, config.out_degree
    if K > R:
        raise BadInput(f"out_degree = {K}: must lie in [1, n_relations = {R}]")
    if E * max(R, K * K) > 50_000_000:  # 60 times the compositions of the paper's world
        raise BadInput(f"n_entities = {E}: times n_relations or out_degree^2 must be <= 50000000")
    rng = np.random.default_rng([config.data_seed, 0])
    relations = rng.random((E, R)).argsort(axis=1, kind="stable")[:, :K]
    tails = rng.integers(0, E, (E, K))
    world = World(relations, tails, np.zeros((E, K), bool), tuple(f"e_{i}" for i in range(E)),
                  tuple(f"r_{i}" for i in range(R)))
    return choose_ood(world, config, rng)


def choose_ood(world, config, rng):
    """Make exactly round(ood_fraction * F) facts of the world OOD, drawn without replacement."""
    facts = rng.permutation(world.facts)
    world.is_ood.ravel()[facts[:round(config.ood_fraction * len(facts))]] = True
    return world


def compositions(world):
    """All two-hop paths as fact indices (first, second), each (N,) int."""
    width = world.relations.shape[1]
    first = world.facts.repeat(width)                                                  # (F * K,)
    second = world.tails.ravel()[first] * width + np.arange(len(first)) % width  # every fact of b
    real = world.relations.ravel()[second] >= 0
    return first[real], second[real]


def queries(world, first, second=None):
    """Columns of the compositions (first, second), or of the atomic facts `first` alone."""
    relation, tail = world.relations.ravel(), world.tails.ravel()
    head, r1, b = first // world.relations.shape[1], relation[first], tail[first]
    if second is None:
        return Queries(head, r1, np.full_like(first, -1), np.full_like(first, -1), b)
    return Queries(head, r1, relation[second], b, tail[second])


# ---------------------------------------------------------------- splits and regimes
def make_splits(world, config, regime="natural"):
    """The seven splits of SPLITS as {name: Queries}, disjoint, for one regime of REGIMES.
    phi * (ID facts) of the ID compositions are trained, the others (0.5 % or more) are `test_id`.
    Graph, OOD facts and both test sets are the same in all regimes; injected compositions move from
    the mixed splits to `train_inferred`.
    """
    if regime not in REGIMES:
        raise BadInput(f"regime = {regime}: must be one of {', '.join(REGIMES)}")
    rng = np.random.default_rng([config.data_seed, 1])
    ood = world.is_ood.ravel()
    first, second = compositions(world)
    where = lambda hop1, hop2: np.flatnonzero((ood[first] == hop1) & (ood[second] == hop2))
    id_id, ood_ood = rng.permutation(where(False, False)), where(True, True)
    id_facts = len(world.facts) - ood.sum()
    n_train, most = round(config.phi * id_facts), int(0.995 * len(id_id))
    if not 1 <= n_train <= most or not len(ood_ood):
        raise BadInput(f"phi = {config.phi:g}, ood_fraction = {config.ood_fraction:g}: too few "
                       f"compositions; this world has {len(id_id)} ID ones (for a phi up to "
                       f"{most / max(id_facts, 1):.2f}) and {len(ood_ood)} OOD ones (1 or more)")
    injected = inject(first, second, where(True, False), where(False, True), ood_ood, regime, rng)
    return all_splits(world, first, second, {
        "train_inferred": np.concatenate([id_id[:n_train], injected]),
        "test_id": id_id[n_train:], "test_ood": ood_ood})


def inject(first, second, ood_id, id_ood, ood_ood, regime, rng):
    """Rows of mixed compositions a regime trains (App. C): up to k, the other hop ID, for a share
    of the facts of the OOD test, F1 as first hop and F2 as second. Never two OOD hops."""
    share1, share2, k = REGIMES[regime]
    injected = []
    for fact, rows, share in ((first, ood_id, share1), (second, id_ood, share2)):
        pool = np.unique(fact[ood_ood])                          # F1, F2
        chosen = rng.permutation(pool)[:round(share * len(pool))]
        injected.append(up_to_k(rows[np.isin(fact[rows], chosen)], fact, k, rng))
    return np.concatenate(injected)


def up_to_k(rows, fact, k, rng):
    """Up to k random ones of the rows that share a value of fact[row]."""
    rows = rng.permutation(rows)
    rows = rows[np.argsort(fact[rows], kind="stable")]           # one group a fact, each shuffled
    return rows[np.arange(len(rows)) - np.searchsorted(fact[rows], fact[rows]) < k]


def all_splits(world, first, second, rows):
    """All seven splits; `rows` of the compositions (first, second) make up three of them."""
    ood, facts = world.is_ood.ravel(), world.facts
    untrained = np.ones(len(first), bool)
    untrained[rows["train_inferred"]] = False
    rows = {**rows, "test_id_ood": untrained & ~ood[first] & ood[second],
            "test_ood_id": untrained & ood[first] & ~ood[second]}
    return {"id_atomic": queries(world, facts[~ood[facts]]),
            "ood_atomic": queries(world, facts[ood[facts]]),
            **{name: queries(world, first[r], second[r]) for name, r in rows.items()}}


def add_facts(world, splits, config):
    """(world, splits) for fine-tuning on new facts and kept old data (paper, Finding 3).

    The world is made of the share `kept` of the ID facts and of `new_facts` others, with (h, r) not
    used so far and random tails, which stand where the OOD facts stood: `test_ood_id` asks new +
    old, `test_id_ood` old + new, `test_ood` new + new. Trained are all its facts, the old
    compositions that remain, and up to `new_k` of old + new for each new fact. `old_atomic` and
    `test_id` are the old world's, whole: what is forgotten.
    """
    rng, E, R = np.random.default_rng([config.data_seed, 2]), world.n_entities, world.n_relations
    known, old = queries(world, world.facts), splits["id_atomic"]
    free = np.ones((E, R), bool)
    free[known.h, known.r1] = False
    if config.new_facts > free.sum():
        raise BadInput(f"new_facts = {config.new_facts}: must lie in [0, {free.sum()}], the pairs "
                       "of head and relation without a fact")
    h, r = rng.permutation(np.argwhere(free))[:config.new_facts].T
    new = np.stack([h, r, rng.integers(0, E, len(h))], axis=1)
    kept = old.take(rng.permutation(len(old.h))[:round(config.kept * len(old.h))])
    world = world_from_facts(np.concatenate([np.stack([kept.h, kept.r1, kept.t], 1), new]),
                             world.entity_names, world.relation_names)
    world.is_ood.ravel()[world.find(h, r)] = True
    first, second = compositions(world)
    key = lambda asked: (asked.h * R + asked.r1) * R + asked.r2
    old_rows = np.isin(key(queries(world, first, second)), key(splits["train_inferred"]))
    ood = world.is_ood.ravel()
    injected = up_to_k(np.flatnonzero(~ood[first] & ood[second]), second, config.new_k, rng)
    rows = {"train_inferred": np.concatenate([np.flatnonzero(old_rows), injected]),
            "test_ood": np.flatnonzero(ood[first] & ood[second])}
    if not all(map(len, rows.values())):
        raise BadInput(f"new_facts = {config.new_facts}, kept = {config.kept:g}: too few, no "
                       "composition of two new facts or of two old ones is left")
    return world, {**all_splits(world, first, second, rows), "test_id": splits["test_id"],
                   "old_atomic": splits["id_atomic"]}


# ---------------------------------------------------------------- own facts, the field's JSON
TOKEN = "(<[^<>]+>)"
ITEM = re.compile(f"({TOKEN}{TOKEN}{TOKEN}?){TOKEN}</a>")  # h, r1, r2 if there is one; t
SPECIAL = ["<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>"]
TYPES = {"id_atomic": "id_atomic", "ood_atomic": "ood_atomic", "train_inferred": "train_inferred",
         "test_id": "test_inferred_iid", "test_ood": "test_inferred_ood"}


def read_text(path, parse=str):
    """The text of a UTF-8 file, without the mark that some editors put at its start, parsed."""
    try:
        return parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or error}")


def world_from_facts(triples, entity_names, relation_names):
    """A World, nothing in it OOD yet, from an (F, 3) int array of (h, r, t) rows, order kept."""
    h, r, t = triples[np.argsort(triples[:, 0], kind="stable")].T
    k = np.arange(len(h)) - np.searchsorted(h, h)                # 0, 1, 2... within each head
    relations = np.full((len(entity_names), k.max() + 1), -1)
    tails, is_ood = np.zeros_like(relations), np.zeros(relations.shape, bool)
    relations[h, k], tails[h, k] = r, t
    return World(relations, tails, is_ood, tuple(entity_names), tuple(relation_names))


def read_facts(path, config):
    """A World from lines of head, relation, tail (UTF-8, tab-separated); every tail is a head."""
    lines = read_text(path).split("\n")
    heads = {line.split("\t")[0].strip() for line in lines}
    entities, relations, seen, triples = {}, {}, {}, []
    for number, line in enumerate(lines, 1):
        place, names = f"{path}, line {number}", [name.strip() for name in line.split("\t")]
        if not any(names):
            continue
        if len(names) != 3 or not all(names):
            raise BadInput(f"{place}: needs head, relation and tail, tab-separated")
        h, r, t = names
        if (h, r) in seen:
            raise BadInput(f"{place}: ({h}, {r}) has a tail already, in line {seen[h, r]}")
        if t not in heads:
            raise BadInput(f"{place}: {t} is never a head; add a fact that starts there")
        seen[h, r] = number
        triples.append([known.setdefault(name, len(known))
                        for known, name in zip((entities, relations, entities), names)])
    if not triples:
        raise BadInput(f"{path}: holds no fact")
    world = world_from_facts(np.array(triples), entities, relations)
    return choose_ood(world, config, np.random.default_rng([config.data_seed, 0]))


def write_json(world, splits, folder):
    """Write train, valid, test and vocab.json, in the layout of Wang et al.'s public code, to a
    new folder. The mixed splits are left out: they follow from the others."""
    vocab = [f"<{name}>" for name in world.entity_names + world.relation_names] + SPECIAL
    if re.findall(TOKEN, "".join(vocab)) != vocab or len(set(vocab)) < len(vocab):
        raise BadInput(f"{folder}: names must differ from each other and hold neither < nor >")
    relation = vocab[world.n_entities:]
    def items(split, **kind):
        for h, r1, r2, _, t in zip(*(column.tolist() for column in split)):
            text = vocab[h] + relation[r1] + (relation[r2] if r2 >= 0 else "")
            yield {"input_text": text, "target_text": f"{text}{vocab[t]}</a>", **kind}
    files = {"train": [*items(queries(world, world.facts)), *items(splits["train_inferred"])],
             "valid": [*items(splits["test_ood"])], "vocab": vocab,
             "test": [item for name in TYPES for item in items(splits[name], type=TYPES[name])]}
    try:
        Path(folder).mkdir(parents=True)
        for name, content in files.items():
            (Path(folder) / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        if not isinstance(error, FileExistsError):  # what was there before is not ours to remove
            shutil.rmtree(folder, ignore_errors=True)
        raise BadInput(f"{folder}: cannot be written ({error.strerror})")


def read_json(folder):
    """(world, splits) from a folder in that layout, of which test and valid may be a sample.
    A fact without a type is OOD if no ID composition listed uses it; how many have none is said on
    stderr. Refuses, with file and item (counted from 0), what is malformed or contradicts another.
    """
    names = [token for token in read_list(f"{folder}/vocab.json") if token not in SPECIAL]
    if re.findall(TOKEN, "".join(map(str, names))) != names or len(set(names)) < len(names):
        raise BadInput(f"{folder}/vocab.json: must be a list of different tokens like <e_0>")
    places, kinds, *tokens = zip(*read_items(folder, names))
    kinds, (h, r1, r2, t) = np.array(kinds), np.array(tokens)
    def refuse(bad, why):
        if bad.any():
            raise BadInput(f"{places[bad.argmax()]}: {why}")
    facts = kinds == "atomic"
    if not facts.any():
        raise BadInput(f"{folder}/train.json: holds no fact")
    E = 1 + max(h[facts].max(), t[facts].max())
    refuse(facts & (r1 < E), f"its relation precedes {names[E - 1]}, an entity, in vocab.json")
    once = np.unique(np.where(facts, h * len(names) + r1, -1), return_index=True)[1]
    refuse(facts & ~np.isin(np.arange(len(h)), once), "its head and relation have a tail already")
    plain = [name[1:-1] for name in names]
    world = world_from_facts(np.stack([h, r1 - E, t], 1)[facts], plain[:E], plain[E:])
    first, tail = world.find(h, r1 - E), world.tails.ravel()
    second = np.where(r2 < 0, first, world.find(tail[first], r2 - E))
    refuse((first < 0) | (second < 0), "train.json lacks a fact of its path")
    refuse(tail[second] != t, "the facts of train.json lead to another answer")
    splits = listed_splits(world, first, second, kinds, refuse)
    typed = len(np.unique(first[np.isin(kinds, ("id_atomic", "ood_atomic"))]))
    if typed < facts.sum():
        print(f"{folder}: {facts.sum() - typed} of {facts.sum()} facts carry no type; with those "
              f"in no ID composition {world.is_ood.sum()} count as OOD", file=sys.stderr)
    return world, splits


def listed_splits(world, first, second, kinds, refuse):
    """The splits that items (first, second) of these kinds list; the mixed ones are complete."""
    ood, of = world.is_ood.ravel(), lambda *wanted: np.isin(kinds, wanted)
    ood[world.facts] = True
    for kind in ("train_inferred", "test_id", "ood_atomic", "test_ood"):  # the later ones prevail
        ood[first[kinds == kind]] = ood[second[kinds == kind]] = "ood" in kind
    refuse(of("id_atomic", "test_id") & (ood[first] | ood[second]), "is ID, but OOD elsewhere")
    paths, width = compositions(world), world.relations.shape[1]
    number = lambda first, second: first * width + second % width  # second starts at first's tail
    row = np.searchsorted(number(*paths), number(first, second))
    trained = np.isin(row, row[of("train_inferred")])
    refuse(of("test_id", "test_ood") & trained, "is a training composition, too")
    listed = {name: list(dict.fromkeys(row[of(name)].tolist())) for name in SPLITS[2:5]}
    for name in listed:
        if not listed[name]:
            raise BadInput(f"the data set lists nothing for {name}")
    return all_splits(world, *paths, listed)


def read_list(path):
    items = read_text(path, json.loads)
    if not isinstance(items, list) or not items:
        raise BadInput(f"{path}: must be a JSON list that is not empty")
    return items


def read_items(folder, names):
    """Yield (place, kind, h, r1, r2, t) for every item; tokens by number, -1 for no r2."""
    number_of = {None: -1, **{name: number for number, name in enumerate(names)}}
    split_of = {**{kind: name for name, kind in TYPES.items()}, "train_inferred": "copy"}
    untyped = {"train": ("atomic", "train_inferred"), "valid": (None, "test_ood"), "test": None}
    for file, assumed in untyped.items():
        for i, item in enumerate(read_list(f"{folder}/{file}.json")):
            place = f"{folder}/{file}.json, item {i}"
            try:
                text, h, r1, r2, t = ITEM.fullmatch(item.get("target_text")).groups()
                kind = assumed[r2 is not None] if assumed else split_of.get(item.get("type"))
                if text != item.get("input_text") or ("atomic" in kind) != (r2 is None):
                    raise ValueError
                yield place, kind, number_of[h], number_of[r1], number_of[r2], number_of[t]
            except KeyError as error:
                raise BadInput(f"{place}: token {error.args[0]} is not in vocab.json")
            except (AttributeError, TypeError, ValueError):
                raise BadInput(f"{place}: must be <h><r1> or <h><r1><r2>, then <t></a>; type fit")


def main(argv=None):
    """Write a data set in the layout of the public GrokkedTransformer; 2 for bad input, else 0."""
    parser = Parser(prog="data.py", allow_abbrev=False, description=main.__doc__.split(";")[0])
    parser.add_argument("--export", required=True, metavar="DIR", help="a folder to make")
    parser.add_argument("--regime", default="natural", help=f"{', '.join(REGIMES)} (natural)")
    parser.add_settings(WorldConfig, "world")
    try:
        given = parser.parse(sys.argv[1:] if argv is None else argv)
        config = settings(WorldConfig, given)
        if config.new_facts:
            raise BadInput(f"new_facts = {config.new_facts}: must be 0 here, for grok.py adds them")
        world = make_world(config)
        write_json(world, make_splits(world, config, given["regime"]), given["export"])
    except BadInput as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
