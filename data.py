"""The world: a random knowledge graph, its two-hop compositions, and the splits a model is
trained and tested on (paper, Section 3 and Appendix C; the task is that of Wang et al. 2024).

    fact          (h, r, t)           head entity, relation, tail entity
    composition   (h, r1, r2) -> t    through the bridge b: (h, r1, b) and (b, r2, t) are facts
    ID / OOD      an OOD fact is trained alone, never as part of a composition (natural regime)

A fact is known by its index f = h * K + k, its place in the flattened (E, K) arrays of the world.
Only numpy here: the world depends on no model, no device and no global random state.
"""
import argparse
import dataclasses
import json
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

SPLITS = ("id_atomic", "ood_atomic", "train_inferred", "test_id", "test_ood",
          "test_id_ood", "test_ood_id")  # the last two: ID hop 1 + OOD hop 2, and the reverse

# share of the OOD test facts injected as first hop, as second hop; compositions for each (App. C)
REGIMES = {"natural": (0.0, 0.0, 0), "both_full": (1.0, 1.0, 18), "both_half": (0.5, 0.5, 9),
           "first_full": (1.0, 0.0, 18), "second_full": (0.0, 1.0, 18)}


MOST = 50_000_000  # pairs (head, relation), compositions: 60 times those of the paper's world


class BadInput(ValueError):
    """A setting or a file that cannot be used; its text is the one line the user reads."""

    def __str__(self):
        return " ".join(super().__str__().split())  # a name from a file may hold line breaks


# ---------------------------------------------------------------- settings and command line

def setting(default, low, high, about, choices=None):
    """A dataclass field that carries its legal range and its line of --help."""
    return dataclasses.field(default=default, metadata=dict(
        low=low, high=high, choices=choices, about=about))


def check_settings(config):
    """Raise BadInput for the first field of a settings dataclass outside its type or range."""
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata
        kinds = (int, float) if field.type is float else field.type
        if not isinstance(value, kinds) or isinstance(value, bool) != (field.type is bool):
            raise BadInput(f"{field.name} = {value!r}: must be of type {field.type.__name__}")
        if rule["choices"] and value not in rule["choices"]:
            raise BadInput(f"{field.name} = {value}: must be one of {', '.join(rule['choices'])}")
        if rule["low"] is not None and not rule["low"] <= value <= rule["high"]:
            raise BadInput(f"{field.name} = {value}: must lie in [{rule['low']}, {rule['high']}]")


class Parser(argparse.ArgumentParser):
    """argparse whose options are dataclass fields and whose errors are one line (BadInput)."""

    def error(self, message):
        raise BadInput(message)

    def add_settings(self, cls, title):
        group = self.add_argument_group(title)
        for field in dataclasses.fields(cls):
            kind = _on_off if field.type is bool else field.type
            group.add_argument("--" + field.name.replace("_", "-"), type=kind, metavar="V",
                               help=f"{field.metadata['about']} ({field.default})")

    def parse(self, argv):
        """The settings given on the command line; --out_degree and --out-degree are the same."""
        names = [a.split("=", 1) for a in argv]
        names = ["=".join([n.replace("_", "-") if n.startswith("--") else n, *v])
                 for n, *v in names]
        return vars(self.parse_args(names))


def _on_off(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text}: must be true or false")
    return text.lower() == "true"


def settings(cls, given):
    """A checked `cls` from those entries of `given` that name its fields and are not None."""
    config = cls(**{f.name: given[f.name] for f in dataclasses.fields(cls)
                    if given.get(f.name) is not None})
    check_settings(config)
    return config


@dataclass(frozen=True)
class WorldConfig:
    """The knowledge graph and how much of it is trained (paper, Section 3)."""
    n_entities: int = setting(40, 2, 10**6, "entities")
    n_relations: int = setting(40, 1, 10**5, "relations")
    out_degree: int = setting(24, 1, 10**5, "facts per head entity, each with its own relation")
    ood_fraction: float = setting(0.125, 0.0, 1.0, "share of facts that are OOD")
    phi: float = setting(18.0, 0.0, 10**5, "training compositions per ID fact")
    data_seed: int = setting(0, 0, 2**63 - 1, "seed of graph and splits, apart from the model's")


# ---------------------------------------------------------------- the graph

@dataclass(frozen=True)
class World:
    """A knowledge graph of E entities with up to K facts each; relation -1 pads a shorter row."""
    relations: np.ndarray  # (E, K) int, distinct within a row
    tails: np.ndarray      # (E, K) int
    is_ood: np.ndarray     # (E, K) bool
    entity_names: tuple
    relation_names: tuple

    @property
    def n_entities(self):
        return len(self.entity_names)

    @property
    def n_relations(self):
        return len(self.relation_names)

    @property
    def facts(self):
        """Indices of all facts (padding left out), (F,) int."""
        return np.flatnonzero(self.relations.ravel() >= 0)

    def find(self, h, r):
        """Index of the fact with head h and relation r, -1 where there is none; (N,) int each."""
        facts = self.facts
        keys = facts // self.relations.shape[1] * self.n_relations + self.relations.ravel()[facts]
        order = np.argsort(keys)
        wanted = h * self.n_relations + r
        place = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
        return np.where(keys[place] == wanted, facts[place], -1)


class Queries(NamedTuple):
    """N questions and their answers, one (N,) int array a column; r2 = b = -1 in atomic ones."""
    h: np.ndarray
    r1: np.ndarray
    r2: np.ndarray
    b: np.ndarray
    t: np.ndarray

    def take(self, rows):
        return Queries(*(column[rows] for column in self))


def make_world(config):
    """A random graph: `out_degree` distinct relations a head, each to a uniformly random tail."""
    check_settings(config)
    if config.out_degree > config.n_relations:
        raise BadInput(f"out_degree = {config.out_degree}: must lie in [1, n_relations = "
                       f"{config.n_relations}]")
    if config.n_entities * max(config.n_relations, config.out_degree ** 2) > MOST:
        raise BadInput(f"n_entities = {config.n_entities}: times n_relations, or times out_degree "
                       f"squared, must be at most {MOST} to fit in memory")
    rng = np.random.default_rng([config.data_seed, 0])
    shape = (config.n_entities, config.out_degree)
    shuffled = rng.random((config.n_entities, config.n_relations)).argsort(axis=1, kind="stable")
    relations = shuffled[:, :config.out_degree]
    tails = rng.integers(0, config.n_entities, shape)
    is_ood = choose_ood(np.arange(relations.size), config, rng, shape)
    return World(relations, tails, is_ood, tuple(f"e_{i}" for i in range(config.n_entities)),
                 tuple(f"r_{i}" for i in range(config.n_relations)))


def choose_ood(facts, config, rng, shape):
    """Mark exactly round(ood_fraction * F) of the facts, drawn without replacement."""
    is_ood = np.zeros(shape, bool)
    count = round(config.ood_fraction * len(facts))
    is_ood.ravel()[rng.permutation(facts)[:count]] = True
    return is_ood


def compositions(world):
    """All two-hop paths as fact indices (first, second), each (N,) int."""
    width = world.relations.shape[1]
    facts = world.facts
    first = facts.repeat(width)                                            # (F * K,)
    bridge = world.tails.ravel()[facts]
    second = (bridge[:, None] * width + np.arange(width)).ravel()          # every fact of b
    real = world.relations.ravel()[second] >= 0
    return first[real], second[real]


def queries(world, first, second=None):
    """Columns of the compositions (first, second), or of the atomic facts `first` alone."""
    relation, tail = world.relations.ravel(), world.tails.ravel()
    head = first // world.relations.shape[1]
    if second is None:
        none = np.full(len(first), -1)
        return Queries(head, relation[first], none, none, tail[first])
    return Queries(head, relation[first], relation[second], tail[first], tail[second])


# ---------------------------------------------------------------- splits and regimes

def make_splits(world, config, regime="natural"):
    """The seven splits of SPLITS as {name: Queries}, disjoint, for one regime of REGIMES.

    phi * (ID facts) of the ID compositions are trained and the other ID ones are `test_id` (at
    least 0.5 % of them, as in the paper). Graph, OOD facts and both test sets are the same in all
    regimes; injected compositions move from the mixed splits to `train_inferred`.
    """
    if regime not in REGIMES:
        raise BadInput(f"regime = {regime}: must be one of {', '.join(REGIMES)}")
    rng = np.random.default_rng([config.data_seed, 1])
    ood = world.is_ood.ravel()
    first, second = compositions(world)
    where = lambda hop1, hop2: np.flatnonzero((ood[first] == hop1) & (ood[second] == hop2))
    id_id, ood_ood = rng.permutation(where(False, False)), where(True, True)
    id_facts = len(world.facts) - ood.sum()
    n_train = round(config.phi * id_facts)
    most = int(0.995 * len(id_id))
    if not 1 <= n_train <= most or not len(ood_ood):
        raise BadInput(f"phi = {config.phi:g}, ood_fraction = {config.ood_fraction:g}: too few "
                       f"compositions; this world has {len(id_id)} ID ones, of which phi may take "
                       f"1 to {most} (phi <= {most / max(id_facts, 1):.2f}), and {len(ood_ood)} "
                       f"OOD ones, of which it needs at least 1")
    injected = inject(first, second, where(True, False), where(False, True), ood_ood, regime, rng)
    rows = {"train_inferred": np.concatenate([id_id[:n_train], injected]),
            "test_id": id_id[n_train:], "test_ood": ood_ood,
            "test_id_ood": np.setdiff1d(where(False, True), injected),
            "test_ood_id": np.setdiff1d(where(True, False), injected)}
    made = {name: queries(world, first[r], second[r]) for name, r in rows.items()}
    return {**atomic_splits(world), **made}


def atomic_splits(world):
    is_ood = world.is_ood.ravel()[world.facts]
    return {"id_atomic": queries(world, world.facts[~is_ood]),
            "ood_atomic": queries(world, world.facts[is_ood])}


def inject(first, second, ood_id, id_ood, ood_ood, regime, rng):
    """Rows of mixed compositions a regime adds to training (App. C); never two OOD hops.

    Drawn from the facts that occur in the OOD test: F1 as first hop, F2 as second. For each chosen
    fact up to k compositions in which the other hop is ID.
    """
    share1, share2, k = REGIMES[regime]
    hop1 = _up_to_k(first, ood_id, np.unique(first[ood_ood]), share1, k, rng)
    hop2 = _up_to_k(second, id_ood, np.unique(second[ood_ood]), share2, k, rng)
    return np.concatenate([hop1, hop2])


def _up_to_k(fact, rows, pool, share, k, rng):
    chosen = rng.permutation(pool)[:round(share * len(pool))]
    rows = rng.permutation(rows[np.isin(fact[rows], chosen)])
    rows = rows[np.argsort(fact[rows], kind="stable")]           # one group a fact, each shuffled
    rank = np.arange(len(rows)) - np.searchsorted(fact[rows], fact[rows])
    return rows[rank < k]


# ---------------------------------------------------------------- files: own facts, the field's JSON

TOKEN = "(<[^<>]+>)"
ITEM = re.compile(f"{TOKEN}{TOKEN}{TOKEN}?{TOKEN}</a>")  # h, r1, r2 if there is one, t
SPECIAL = ["<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>"]
TYPES = {"id_atomic": "id_atomic", "ood_atomic": "ood_atomic", "train_inferred": "train_inferred",
         "test_id": "test_inferred_iid", "test_ood": "test_inferred_ood"}
KINDS = ("fact", "id_atomic", "ood_atomic",  # what an item can be: a fact, or else a composition
         "trained", "train_inferred", "test_inferred_iid", "test_inferred_ood")


def world_from_facts(triples, entity_names, relation_names):
    """A World, nothing in it OOD yet, from an (F, 3) int array of (h, r, t) rows, order kept."""
    heads = triples[:, 0]
    order = np.argsort(heads, kind="stable")
    degree = np.bincount(heads, minlength=len(entity_names))
    column = np.arange(len(heads)) - (degree.cumsum() - degree).repeat(degree)
    relations = np.full((len(entity_names), degree.max()), -1)
    tails = np.zeros_like(relations)
    relations[heads[order], column], tails[heads[order], column] = triples[order, 1:].T
    return World(relations, tails, np.zeros(relations.shape, bool), tuple(entity_names),
                 tuple(relation_names))


def read_facts(path, config):
    """A World from a file of tab-separated lines: head, relation, tail (UTF-8 names).

    Raises BadInput, with the line's number, for a line of another form, a (head, relation) with
    two tails, and an entity that never is a head (no composition could pass through it).
    """
    entities, relations, seen, triples = {}, {}, {}, []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        names = [name.strip() for name in line.split("\t")]
        if len(names) != 3 or not all(names):
            raise BadInput(f"{path}, line {number}: needs head, relation and tail, tab-separated")
        h, t = (entities.setdefault(name, len(entities)) for name in (names[0], names[2]))
        r = relations.setdefault(names[1], len(relations))
        if (h, r) in seen:
            raise BadInput(f"{path}, line {number}: ({names[0]}, {names[1]}) has a tail already, "
                           f"in line {seen[h, r]}")
        seen[h, r] = number
        triples.append((h, r, t))
    if not triples:
        raise BadInput(f"{path}: holds no fact")
    heads = {h for h, _ in seen}
    for (h, r, t), number in zip(triples, seen.values()):
        if t not in heads:
            raise BadInput(f"{path}, line {number}: {list(entities)[t]} is never a head; "
                           "add a fact that starts there")
    world = world_from_facts(np.array(triples), entities, relations)
    rng = np.random.default_rng([config.data_seed, 0])
    return dataclasses.replace(
        world, is_ood=choose_ood(world.facts, config, rng, world.relations.shape))


def read_text(path):
    """The text of a UTF-8 file, without the mark that some editors put at its start."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or 'is not UTF-8 text'}")


def write_json(world, splits, folder):
    """Write train, valid, test and vocab.json in the layout of Wang et al.'s public code.

    The folder must be new. The mixed splits are not written: they follow from the others.
    """
    entity = [f"<{name}>" for name in world.entity_names]
    relation = [f"<{name}>" for name in world.relation_names]

    def items(name):
        for h, r1, r2, _, t in zip(*(c.tolist() for c in splits[name])):
            text = entity[h] + relation[r1] + (relation[r2] if r2 >= 0 else "")
            yield {"input_text": text, "target_text": f"{text}{entity[t]}</a>"}

    vocab = entity + relation + SPECIAL
    if len(set(vocab)) < len(vocab) or not all(re.fullmatch(TOKEN, token) for token in vocab):
        raise BadInput(f"{folder}: names must differ from each other and hold neither < nor >")
    splits = {**splits, "atomic": queries(world, world.facts)}
    typed = [{**item, "type": kind} for name, kind in TYPES.items() for item in items(name)]
    try:
        Path(folder).mkdir(parents=True)
        for name, content in (("train", [*items("atomic"), *items("train_inferred")]),
                              ("valid", list(items("test_ood"))), ("test", typed),
                              ("vocab", vocab)):
            (Path(folder) / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        if not isinstance(error, FileExistsError):  # what was there before is not ours to remove
            shutil.rmtree(folder, ignore_errors=True)
        raise BadInput(f"{folder}: cannot be written ({error.strerror})")


def read_json(folder):
    """(world, splits) from a folder in that layout, of which test and valid may be a sample.

    A fact without a type is OOD if no ID composition listed uses it; how many have none is said on
    stderr. The mixed splits are all that the world has. Raises BadInput, with file and item
    (counted from 0), for what is malformed or contradicts train.json or another item.
    """
    paths = [Path(folder) / f"{name}.json" for name in ("train", "valid", "test")]
    names = [token for token in read_list(paths[0].with_name("vocab.json")) if token not in SPECIAL]
    if (not all(isinstance(name, str) and re.fullmatch(TOKEN, name) for name in names)
            or len(set(names)) < len(names)):
        raise BadInput(f"{folder}/vocab.json: must be a list of different tokens like <e_0>")
    tables, kinds = zip(*(read_items(path, names) for path in paths))
    (h, r1, r2, t), kinds = np.concatenate(tables).T, np.concatenate(kinds)
    of = lambda *wanted: np.isin(kinds, wanted)

    def refuse(bad, why):
        if bad.any():
            item, file = bad.argmax(), 0
            while item >= len(tables[file]):
                item, file = item - len(tables[file]), file + 1
            raise BadInput(f"{paths[file]}, item {item}: {why}")

    facts, again = np.flatnonzero(of("fact")), of("fact")
    if not len(facts):
        raise BadInput(f"{paths[0]}: holds no fact")
    E = 1 + max(h[facts].max(), t[facts].max())
    refuse(again & (r1 < E), f"its relation precedes {names[E - 1]}, an entity, in vocab.json")
    again[facts[np.unique(h[facts] * len(names) + r1[facts], return_index=True)[1]]] = False
    refuse(again, "its head and relation have a tail already")
    world = world_from_facts(np.stack([h, r1 - E, t], 1)[facts],
                             *([name[1:-1] for name in part] for part in (names[:E], names[E:])))
    tail, ood = world.tails.ravel(), world.is_ood.ravel()
    first = np.where(r1 >= E, world.find(h, r1 - E), -1)
    second = np.where(r2 >= E, world.find(tail[first], r2 - E), np.where(r2 < 0, first, -1))
    refuse((first < 0) | (second < 0), "train.json lacks a fact of its path")
    refuse(tail[second] != t, "the facts of train.json lead to another answer")
    ood[world.facts] = True
    for wanted, value in ((of("trained", "test_inferred_iid"), False),
                          (of("ood_atomic", "test_inferred_ood"), True)):
        ood[first[wanted]] = ood[second[wanted]] = value
    refuse(of("id_atomic", "test_inferred_iid") & (ood[first] | ood[second]),
           "is ID by its type, but a fact of it is OOD in another item")
    untyped = len(facts) - len(np.unique(first[of("id_atomic", "ood_atomic")]))
    splits = listed_splits(world, first, second, kinds, refuse)
    if untyped:
        print(f"{folder}: {untyped} of {len(facts)} facts carry no type; with those in no ID "
              f"composition {ood.sum()} count as OOD", file=sys.stderr)
    return world, splits


def listed_splits(world, first, second, kinds, refuse):
    """The splits that items (first, second) of these kinds make, (N,) each; mixed ones complete."""
    width, ood, trained = world.relations.shape[1], world.is_ood.ravel(), kinds == "trained"
    number = lambda first, second: first * width + second % width  # second starts at first's tail
    key, known = number(first, second), np.zeros(world.relations.size * width, bool)
    known[key[trained]] = True
    splits = atomic_splits(world)
    for name, kind in (("train_inferred", "trained"), *list(TYPES.items())[3:]):
        rows = np.flatnonzero(kinds == kind)
        refuse((kinds == kind) & known[key] & ~trained, "is a training composition, too")
        if not len(rows):
            raise BadInput(f"the data set lists nothing for {name}")
        rows = rows[np.sort(np.unique(key[rows], return_index=True)[1])]
        splits[name] = queries(world, first[rows], second[rows])
    hop1, hop2 = compositions(world)
    new = ~known[number(hop1, hop2)]
    for name, a, b in (("test_id_ood", False, True), ("test_ood_id", True, False)):
        rows = new & (ood[hop1] == a) & (ood[hop2] == b)
        splits[name] = queries(world, hop1[rows], hop2[rows])
    return splits


def read_list(path):
    text = read_text(path)
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        raise BadInput(f"{path}: is not JSON")
    if not isinstance(items, list) or not items:
        raise BadInput(f"{path}: must be a JSON list that is not empty")
    return items


def read_items(path, names):
    """Tokens h, r1, r2, t of a file's items as places in `names`, (N, 4); and their kinds, (N,)."""
    index = {None: -1, **{name: place for place, name in enumerate(names)}}  # a fact has no r2
    untyped = {"train": ("fact", "trained"), "valid": (None, KINDS[-1])}.get(path.stem)
    rows, kinds = [], []
    for number, item in enumerate(read_list(path)):
        try:
            text, target = item.get("input_text"), item.get("target_text")
            h, r1, r2, t = ITEM.fullmatch(target).groups()
            kind = untyped[r2 is not None] if untyped else item.get("type")
            if target != text + t + "</a>" or kind not in (KINDS[3:] if r2 else KINDS[:3]):
                raise ValueError
            rows.append((index[h], index[r1], index[r2], index[t]))
        except KeyError as error:
            raise BadInput(f"{path}, item {number}: token {error.args[0]} is not in vocab.json")
        except (AttributeError, TypeError, ValueError):
            raise BadInput(f'{path}, item {number}: must be {{"input_text": "<h><r1><r2>", "target_'
                           'text": "<h><r1><r2><t></a>"} or the same without r2, and its type fit')
        kinds.append(kind)
    return np.array(rows), np.array(kinds)


# ---------------------------------------------------------------- the command line

def main(argv=None):
    """Write a data set: `python data.py --export DIR`. Returns the exit status, 2 for bad input."""
    parser = Parser(prog="data.py", allow_abbrev=False,
                    description="Write a data set in the layout of the public GrokkedTransformer.")
    parser.add_argument("--export", required=True, metavar="DIR", help="a folder to make")
    parser.add_argument("--regime", default="natural", help=f"{', '.join(REGIMES)} (natural)")
    parser.add_settings(WorldConfig, "world")
    try:
        given = parser.parse(sys.argv[1:] if argv is None else argv)
        config = settings(WorldConfig, given)
        world = make_world(config)
        write_json(world, make_splits(world, config, given["regime"]), given["export"])
    except BadInput as error:
        print(f"data.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
