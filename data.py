"""The world: a random knowledge graph, its two-hop compositions, and the splits a model is trained
and tested on (paper, Section 3 and Appendix C; the task is that of Wang et al. 2024).

    fact          (h, r, t)           head entity, relation, tail entity; ID or OOD
    composition   (h, r1, r2) -> t    hop 1 is the fact (h, r1, b), hop 2 the fact (b, r2, t)
    bridge        b                   where hop 1 ends and hop 2 begins; no question names it
    ID / OOD      an OOD fact is trained alone, never in a composition (but for injected ones)

A fact is known by its number, its row in `World.facts`; a composition by those of its two hops.
"""
import inspect
import json
import re
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

SPLITS = ("id_atomic", "ood_atomic", "train_inferred", "test_id", "test_ood",
          "test_id_ood", "test_ood_id")  # the last two: ID hop 1 + OOD hop 2, and the reverse
LISTED = SPLITS[2:5]  # the others follow from these
TRAINED = ("id_atomic", "ood_atomic", "kept_atomic", "new_atomic", "train_inferred")
# share of the OOD test facts injected as hop 1, as hop 2; compositions for each (App. C)
REGIMES = {"natural": (0.0, 0.0, 0), "both_full": (1.0, 1.0, 18), "both_half": (0.5, 0.5, 9),
           "first_full": (1.0, 0.0, 18), "second_full": (0.0, 1.0, 18)}


@dataclass(frozen=True)
class WorldConfig:
    """The knowledge graph and how much of it is trained (paper, Section 3)."""
    n_entities: int = 40         # entities E
    n_relations: int = 40        # relations R
    out_degree: int = 28         # facts per head entity, each with its own relation
    ood_fraction: float = 0.125  # share of facts that are OOD
    phi: float = 18.0            # training compositions per ID fact
    data_seed: int = 0           # seed of graph and splits, apart from the model's
    new_facts: int = 0           # facts added for fine-tuning, in place of the OOD facts
    kept: float = 1.0            # share of the ID facts kept when fine-tuning
    new_k1: int = 0              # compositions trained for each new fact as hop 1: new + old
    new_k2: int = 0              # compositions trained for each new fact as hop 2: old + new
    whole_rows: bool = False     # keep all old training compositions of a kept fact (paper's code)


class BadInput(ValueError):
    """A setting or a file that cannot be used; its text is the one line the user reads."""
    def __str__(self):
        return " ".join(str(self.args[0]).split())  # what it quotes may have several


# ---------------------------------------------------------------- the world
@dataclass(frozen=True)
class World:
    """A knowledge graph of E entities, R relations and F facts, which are sorted by head."""
    facts: np.ndarray   # (F, 3) int, rows (h, r, t)
    is_ood: np.ndarray  # (F,) bool; with new facts these, not OOD ones
    index: np.ndarray   # (E, R) int, the number of the fact (h, r), -1 where there is none
    n_entities: int     # E
    n_relations: int    # R
    entity_names: tuple
    relation_names: tuple


class Queries(namedtuple("Queries", "h r1 r2 b t")):
    """N questions and their answers, one (N,) int array a column; r2 = b = -1 in atomic ones."""
    def take(self, rows):
        return Queries(*(column[rows] for column in self))


def make_world(config):
    """A random graph: `out_degree` distinct relations a head, each to a uniformly random tail."""
    check_settings(config, LIMITS)
    E, R, K = config.n_entities, config.n_relations, config.out_degree
    if K > R:
        raise BadInput(f"out_degree = {K}: must lie in [1, n_relations = {R}]")
    if E * max(R, K * K) > MOST:
        raise BadInput(f"n_entities = {E}: makes over {MOST} compositions or table cells")
    rng = np.random.default_rng([config.data_seed, 0])
    relations = rng.random((E, R)).argsort(axis=1, kind="stable")[:, :K]        # (E, K)
    heads, tails = np.arange(E).repeat(K), rng.integers(0, E, E * K)            # (F,)
    facts = np.stack([heads, relations.ravel(), tails], axis=1)
    names = [f"e_{i}" for i in range(E)], [f"r_{i}" for i in range(R)]
    return build_world("this world", facts, draw_ood(len(facts), config, rng), *names)


def draw_ood(F, config, rng):
    """(F,) bool: round(ood_fraction * F) facts are OOD, drawn without replacement."""
    return np.isin(np.arange(F), rng.permutation(F)[:round(config.ood_fraction * F)])


def build_world(source, facts, is_ood, entity_names, relation_names):
    """The World of (F, 3) int rows (h, r, t), sorted by head; BadInput if it is too large."""
    E, R = len(entity_names), len(relation_names)
    n_paths = np.bincount(facts[:, 0], minlength=E)[facts[:, 2]].sum()
    if max(E * R, n_paths) > MOST:
        raise BadInput(f"{source}: makes over {MOST} compositions or table cells")
    index = np.full((E, R), -1)
    index[facts[:, 0], facts[:, 1]] = np.arange(len(facts))
    return World(facts, is_ood, index, E, R, tuple(entity_names), tuple(relation_names))


def compositions(world):
    """All two-hop paths as fact numbers (first, second), each (N,) int, in increasing order."""
    head, _, bridge = world.facts.T
    begin, end = (np.searchsorted(head, bridge, side) for side in ("left", "right"))
    first = np.arange(len(head)).repeat(end - begin)             # (N,)
    way = np.arange(len(first)) - np.searchsorted(first, first)  # 0, 1, ... for each first fact
    return first, begin[first] + way


def queries(world, first, second=None):
    """The Queries of compositions (first, second), or of the facts `first` alone; (N,) int each."""
    h, r1, b = world.facts[first].T
    if second is None:
        return Queries(h, r1, np.full_like(h, -1), np.full_like(h, -1), b)
    return Queries(h, r1, world.facts[second, 1], b, world.facts[second, 2])


# ---------------------------------------------------------------- splits, regimes, new facts
def make_splits(world, config, regime="natural"):
    """The seven disjoint SPLITS as {name: Queries}. phi * (ID facts) of the ID compositions are
    trained, the others (0.5 % or more) are `test_id`; a regime only moves compositions from the
    mixed splits to `train_inferred`."""
    if regime not in REGIMES:
        raise BadInput(f"regime = {regime}: must be one of {', '.join(REGIMES)}")
    rng = np.random.default_rng([config.data_seed, 1])
    first, second = compositions(world)
    ood1, ood2 = world.is_ood[first], world.is_ood[second]                      # (N,) bool
    id_id, ood_ood = rng.permutation(np.flatnonzero(~ood1 & ~ood2)), np.flatnonzero(ood1 & ood2)
    n_id, most = (~world.is_ood).sum(), int(0.995 * len(id_id))
    n_train = round(config.phi * n_id)
    if not most or not len(ood_ood):
        raise BadInput(f"ood_fraction = {config.ood_fraction:g}: too few ID or OOD compositions")
    if not 1 <= n_train <= most:  # nine digits: the limits are legal as printed
        raise BadInput(f"phi = {config.phi:g}: must lie in [{1 / n_id:.9g}, {most / n_id:.9g}]")
    share1, share2, k = REGIMES[regime]
    train = [id_id[:n_train]]  # then the injected ones, with OOD hop 1 and with OOD hop 2 (App. C)
    for mixed, hop, share in ((ood1 & ~ood2, first, share1), (~ood1 & ood2, second, share2)):
        pool = np.unique(hop[ood_ood])                           # the paper's F1, or F2
        chosen = rng.permutation(pool)[:round(share * len(pool))]
        train.append(up_to_k(np.flatnonzero(mixed & np.isin(hop, chosen)), hop, k, rng))
    rows = np.concatenate(train), id_id[n_train:], ood_ood
    return all_splits(world, [(first[chosen], second[chosen]) for chosen in rows])


def up_to_k(rows, fact, k, rng):
    """Up to k random ones of the rows that share a value of fact[row]."""
    rows = rng.permutation(rows)
    rows = rows[np.argsort(fact[rows], kind="stable")]           # one group a fact, each shuffled
    return rows[np.arange(len(rows)) - np.searchsorted(fact[rows], fact[rows]) < k]


def all_splits(world, listed):
    """The seven splits, from the (first, second) of each split of LISTED."""
    first, second = compositions(world)
    ood1, ood2, F = world.is_ood[first], world.is_ood[second], len(world.facts)
    trained1, trained2 = listed[0]
    untrained = ~np.isin(first * F + second, trained1 * F + trained2)           # (N,) bool
    id_ood, ood_id = untrained & ~ood1 & ood2, untrained & ood1 & ~ood2
    hops = [(np.flatnonzero(~world.is_ood),), (np.flatnonzero(world.is_ood),), *listed,
            (first[id_ood], second[id_ood]), (first[ood_id], second[ood_id])]
    return {name: queries(world, *numbers) for name, numbers in zip(SPLITS, hops)}


def add_facts(world, splits, config):
    """(world, splits) for fine-tuning on new facts and kept old ones (paper, Finding 3).

    kept_atomic, new_atomic      trained: facts
    train_inferred               trained: old training compositions that remain; new_k1, new_k2
    new_old, old_new, new_new    tested: the untrained ones, by the kinds of hop 1 and hop 2
    old_atomic, old_inferred     may be forgotten: the old world's id_atomic and test_id, whole"""
    rng = np.random.default_rng([config.data_seed, 2])
    world, is_kept = change_facts(world, config, rng)
    first, second = compositions(world)
    asked, is_new = queries(world, first, second), world.is_ood
    shape = world.n_entities, world.n_relations, world.n_relations              # of (h, r1, r2)
    keys = [np.ravel_multi_index(some[:3], shape) for some in (asked, splits["train_inferred"])]
    remains = np.isin(*keys) & (is_kept[first] | is_kept[second])               # (N,) bool
    new_old = np.flatnonzero(is_new[first] & is_kept[second])
    old_new = np.flatnonzero(is_kept[first] & is_new[second])
    new_new = np.flatnonzero(is_new[first] & is_new[second])
    if not remains.any() or not len(new_new):
        raise BadInput(f"new_facts = {config.new_facts}, kept = {config.kept:g}: too few facts")
    injected2 = up_to_k(old_new, second, config.new_k2, rng)
    injected1 = up_to_k(new_old, first, config.new_k1, rng)
    trained = np.concatenate([np.flatnonzero(remains), injected2, injected1])
    return world, {"kept_atomic": queries(world, np.flatnonzero(is_kept)),
                   "new_atomic": queries(world, np.flatnonzero(is_new)),
                   "new_old": asked.take(np.setdiff1d(new_old, injected1)),
                   "old_new": asked.take(np.setdiff1d(old_new, injected2)),
                   "new_new": asked.take(new_new), "train_inferred": asked.take(trained),
                   "old_atomic": splits["id_atomic"], "old_inferred": splits["test_id"]}


def change_facts(world, config, rng):
    """(world, is_kept (F,) bool): the kept ID facts, and new ones, which its `is_ood` marks: pairs
    (h, r) without a fact so far, random tails. `whole_rows` leaves all ID facts in the world."""
    free = np.argwhere(world.index < 0)                                         # (N, 2)
    if config.new_facts > len(free):
        raise BadInput(f"new_facts = {config.new_facts}: must lie in [0, {len(free)}]")
    pairs = rng.permutation(free)[:config.new_facts]
    new = np.column_stack([pairs, rng.integers(0, world.n_entities, len(pairs))])
    old = rng.permutation(world.facts[~world.is_ood])
    n_kept = round(config.kept * len(old))
    old = old if config.whole_rows else old[:n_kept]
    facts = np.concatenate([old, new])
    by_head = facts[:, 0].argsort(kind="stable")                                # (F,)
    return build_world(f"new_facts = {config.new_facts}", facts[by_head], by_head >= len(old),
                       world.entity_names, world.relation_names), by_head < n_kept


# ---------------------------------------------------------------- files
@contextmanager
def reading(path, problem="is damaged, or another kind of file"):
    """Says in one line what is wrong with a file: reading one raises a dozen kinds of error."""
    try:
        yield
    except Exception as error:
        raise BadInput(f"{path}: {getattr(error, 'strerror', None) or f'{problem} ({error})'}")


def read_facts(path, config):
    """A World from lines of head, relation, tail (UTF-8, tab-separated); OOD facts are drawn. A
    line that names another tail of a (head, relation) is refused."""
    with reading(path):
        text = Path(path).read_text(encoding="utf-8-sig")  # without the mark some editors put first
    tails, entities, relations = {}, {}, {}
    for number, line in enumerate(text.rstrip().split("\n"), 1):
        names = [name.strip() for name in line.split("\t")]
        if len(names) != 3 or not all(names):
            raise BadInput(f"{path}, line {number}: needs head, relation and tail, tab-separated")
        h, t = (entities.setdefault(name, len(entities)) for name in names[::2])  # as they come
        r = relations.setdefault(names[1], len(relations))
        if tails.setdefault((h, r), t) != t:
            raise BadInput(f"{path}, line {number}: another tail of ({names[0]}, {names[1]})")
    facts = np.array([(h, r, t) for (h, r), t in tails.items()])
    facts = facts[facts[:, 0].argsort(kind="stable")]            # (F, 3)
    is_ood = draw_ood(len(facts), config, np.random.default_rng([config.data_seed, 0]))
    return build_world(path, facts, is_ood, entities, relations)


def read_data(path):
    """(world, splits, regime) from an .npz of facts (F, 3), is_ood (F,), names (JSON) and (N, 2)
    fact numbers for each of LISTED, as `write_data` of extras/exchange.py makes it."""
    with reading(path, "is no data file"), np.load(path, allow_pickle=False) as file:
        facts, is_ood, *pairs = (file[name] for name in ("facts", "is_ood", *LISTED))
        entities, relations, regime = json.loads(str(file["names"]))
        world = build_world(path, facts, is_ood, entities, relations)
        return world, all_splits(world, [pair.T for pair in pairs]), regime


# ---------------------------------------------------------------- settings
LIMITS = {"n_entities": (2, 10**6), "n_relations": (1, 10**5), "out_degree": (1, 10**5),
          "ood_fraction": (0, 1), "phi": (0, 10**5), "data_seed": (0, 2**63 - 1),
          "new_facts": (0, 10**7), "kept": (0, 1), "new_k1": (0, 10**5), "new_k2": (0, 10**5)}
MOST = 50_000_000  # 60 times the compositions of the paper's world


def check_settings(config, limits):
    """The config; BadInput for a field of another type, or outside (least, most) or (choices)."""
    for field in fields(config):
        name, kind, value = field.name, field.type, getattr(config, field.name)
        if type(value) is not kind and (type(value), kind) != (int, float):
            raise BadInput(f"{name} = {value!r}: must be {kind.__name__}")
        if kind is str and value not in limits[name]:
            raise BadInput(f"{name} = {value}: must be one of {', '.join(limits[name])}")
        if kind in (int, float) and not limits[name][0] <= value <= limits[name][1]:
            raise BadInput(f"{name} = {value}: must lie in [{limits[name][0]}, {limits[name][1]}]")
    return config


def describe_fields(cls):
    """{field: its comment in the source of the settings dataclass}."""
    return dict(re.findall(r"^ +(\w+): .*?# (.*)$", inspect.getsource(cls), re.MULTILINE))
