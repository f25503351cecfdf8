"""The world: a random knowledge graph, the questions that chain two of its facts, and the splits
that a model is trained and tested on (paper, Section 3 and Appendix C; the task is that of Wang et
al. 2024).

"In which city does Ada's mother live?" chains two facts, through an entity that it never names:

    fact          (h, r, t)           head entity, relation, tail entity: (Ada, mother, Bea)
    composition   (h, r1, r2) -> t    (Ada, mother, city) -> Bern; its hop 1 is the fact (h, r1, b),
                                      (Ada, mother, Bea), its hop 2 the fact (b, r2, t)
    bridge        b                   where hop 1 ends and hop 2 begins: Bea
    ID fact                           trained alone, and in compositions with other ID facts
    OOD fact                          trained alone only (but see REGIMES)

A fact is known by its number, its row in `World.facts`; a composition by the numbers of its two
facts, `first` and `second`. The `config` of these functions is a grok.Config.
"""
import io
import json
import pickle
import zipfile
import zlib
from collections import namedtuple
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SPLITS = ("id_atomic", "ood_atomic", "train_inferred", "test_id", "test_ood",
          "test_id_ood", "test_ood_id")  # test_id_ood: hop 1 is an ID fact, hop 2 an OOD fact
GIVEN_SPLITS = ("train_inferred", "test_id", "test_ood")  # the others follow from these
TRAINED = ("id_atomic", "ood_atomic", "kept_atomic", "new_atomic", "train_inferred")

# Appendix C: of the OOD facts that are hop 1 of an OOD test composition, a share (hop1) is also
# trained as hop 1 before an ID fact, each in up to k compositions; likewise (hop2) as hop 2.
REGIMES = {"natural": (0.0, 0.0, 18),  # (hop1, hop2, k)
           "both_full": (1.0, 1.0, 18),
           "both_half": (0.5, 0.5, 9),
           "first_full": (1.0, 0.0, 18),
           "second_full": (0.0, 1.0, 18)}

MOST = 50_000_000  # compositions, or cells of `World.index`; 60 times those of the paper's world
HEADERS = (("head", "relation", "tail"), ("h", "r", "t"), ("subject", "predicate", "object"))
ZIP = b"PK\x03\x04"  # how a zip archive begins, and therefore an .npz file
READ_ERRORS = (OSError, ValueError, KeyError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile,
               zlib.error, RuntimeError)  # the last: locked zips, JSON too deep, torch's own files


class BadInput(ValueError):
    """A setting or a file that cannot be used; its text is the one line that the user reads."""
    def __str__(self):
        return " ".join(str(self.args[0]).split())  # an error that it quotes may have several lines


def regime_name(config):
    """The paper's name for the shares hop1 and hop2 and the count k, or a name made of them; a data
    set that came with its splits is called "data"."""
    if config.facts == "facts.npz":
        return "data"
    if config.hop1 == 0 and config.hop2 == 0:
        return "natural"
    for name, regime in REGIMES.items():
        if regime == (config.hop1, config.hop2, config.k):
            return name
    return f"hop1_{config.hop1:g}_hop2_{config.hop2:g}_k_{config.k}"


def shares_of_regime(regime):
    """{"hop1", "hop2", "k"} of one of the paper's five names."""
    if regime not in REGIMES:
        raise BadInput(f"regime = {regime}: must be one of {', '.join(REGIMES)}")
    hop1, hop2, k = REGIMES[regime]
    return {"hop1": hop1, "hop2": hop2, "k": k}


# ---------------------------------------------------------------- the world
@dataclass(frozen=True)
class World:
    """A knowledge graph of E entities, R relations and F facts, which are sorted by head."""
    facts: np.ndarray   # (F, 3) int, rows (h, r, t)
    is_ood: np.ndarray  # (F,) bool
    is_new: np.ndarray  # (F,) bool, added for fine-tuning; such a world has no OOD facts
    index: np.ndarray   # (E, R) int, the number of the fact (h, r), -1 where there is none
    n_entities: int     # E
    n_relations: int    # R
    entity_names: tuple
    relation_names: tuple


class Queries(namedtuple("Queries", "h r1 r2 b t")):
    """N questions and their answers, one (N,) int array a column; r2 = b = -1 in a fact's."""
    def take(self, rows):
        """The Queries of these rows, in this order."""
        return Queries(*(column[rows] for column in self))

    def shuffled(self, rng):
        """The same Queries in random order."""
        return self.take(rng.permutation(len(self.h)))


def make_world(config):
    """A random World; BadInput if it would be too large."""
    E = config.n_entities
    R = config.n_relations
    K = config.out_degree
    if E * max(R, K * K) > MOST:
        raise BadInput(f"n_entities = {E}: makes over {MOST} compositions or table cells")
    rng = np.random.default_rng([config.data_seed, 0])
    # Section 3: from every entity lead K different relations, each to a uniformly random entity.
    heads = np.arange(E).repeat(K)                                              # (F,)
    relations = different_relations(E, R, K, rng)                               # (E, K)
    tails = rng.integers(0, E, E * K)                                           # (F,)
    facts = np.stack([heads, relations.ravel(), tails], axis=1)                 # (F, 3)
    is_ood = draw_ood(len(facts), config, rng)
    entity_names = [f"e_{number}" for number in range(E)]
    relation_names = [f"r_{number}" for number in range(R)]
    return build_world("this world", facts, is_ood, entity_names, relation_names)


def different_relations(E, R, K, rng):
    """(E, K) int: K different ones of R relations for each of E heads, every choice alike.

    A head draws a random number for every relation; the K smallest numbers are in:
        relations  0   1   2   3
        numbers   .7  .1  .9  .4    sorted: relations 1, 3, 0, 2; of these the first K
    """
    numbers = rng.random((E, R))
    return numbers.argsort(axis=1, kind="stable")[:, :K]


def draw_ood(F, config, rng):
    """(F,) bool: round(ood_fraction * F) of F facts are OOD, drawn without replacement."""
    n_ood = round(config.ood_fraction * F)
    is_ood = np.zeros(F, bool)
    is_ood[rng.permutation(F)[:n_ood]] = True
    return is_ood


def build_world(source, facts, is_ood, entity_names, relation_names, is_new=None):
    """The World of (F, 3) int rows (h, r, t), sorted by head; no fact is new unless `is_new` says
    so. BadInput, which names the source, if it has more than MOST compositions or table cells."""
    E = len(entity_names)
    R = len(relation_names)
    if E * R > MOST or count_paths(facts, E) > MOST:
        raise BadInput(f"{source}: makes over {MOST} compositions or table cells")
    if is_new is None:
        is_new = np.zeros(len(facts), bool)
    index = np.full((E, R), -1)
    index[facts[:, 0], facts[:, 1]] = np.arange(len(facts))
    return World(facts, is_ood, is_new, index, E, R, tuple(entity_names), tuple(relation_names))


def count_paths(facts, n_entities):
    """How many compositions (F, 3) facts have: each goes on with every fact of its tail."""
    out_degree = np.bincount(facts[:, 0], minlength=n_entities)                 # (E,)
    return int(out_degree[facts[:, 2]].sum())


def describe_world(world):
    """What a World holds, in one line."""
    n_paths = count_paths(world.facts, world.n_entities)
    return (f"{world.n_entities} entities, {world.n_relations} relations, "
            f"{len(world.facts)} facts, {n_paths} two-step questions")


def compositions(world):
    """All two-hop paths as fact numbers (first, second), each (N,) int, in increasing order.

    Facts are sorted by head, so those that go on from (Ada, mother, Bea) stand side by side: they
    are the facts begin[Bea], ..., begin[Bea + 1] - 1, all that Bea is the head of.
    """
    bridges = world.facts[:, 2]                                                 # (F,)
    begin = np.searchsorted(world.facts[:, 0], np.arange(world.n_entities + 1))  # (E + 1,)
    n_paths = begin[bridges + 1] - begin[bridges]                               # (F,)
    first = np.arange(len(bridges)).repeat(n_paths)                             # (N,)
    second = [np.arange(0)]  # so that no fact at all gives no composition
    for b in bridges:
        second.append(np.arange(begin[b], begin[b + 1]))
    return first, np.concatenate(second)


def queries(world, first, second=None):
    """The Queries of compositions (first, second), or of the facts `first` alone; (N,) int each."""
    h, r1, tail = world.facts[first].T
    if second is None:
        nothing = np.full_like(h, -1)
        return Queries(h, r1, r2=nothing, b=nothing, t=tail)
    return Queries(h, r1, r2=world.facts[second, 1], b=tail, t=world.facts[second, 2])


def question_numbers(world, questions):
    """(N,) int, one number a question (h, r1, r2): those of two are equal if the questions are.

    With R = 40 relations, as if h, r1 and r2 were digits to the base 40:
        (0, 0, 7) ->  7
        (0, 1, 7) ->  1 * 40 + 7 = 47
        (2, 1, 7) -> (2 * 40 + 1) * 40 + 7 = 3247
    """
    R = world.n_relations
    return (questions.h * R + questions.r1) * R + questions.r2


# ---------------------------------------------------------------- splits and regimes
def make_splits(world, config):
    """The seven disjoint SPLITS of a World, as {name: Queries}.

    Uses config.phi, the training compositions for each ID fact; config.hop1, hop2 and k, the regime
    (see REGIMES); data_seed. A regime only moves compositions from the two mixed splits to
    `train_inferred`. BadInput if phi is out of range, or if there is nothing to train or to test.
    """
    rng = np.random.default_rng([config.data_seed, 1])
    first, second = compositions(world)
    ood1 = world.is_ood[first]                                                  # (N,) bool
    ood2 = world.is_ood[second]                                                 # (N,) bool
    id_id = rng.permutation(np.flatnonzero(~ood1 & ~ood2))
    id_ood = np.flatnonzero(~ood1 & ood2)
    ood_id = np.flatnonzero(ood1 & ~ood2)
    ood_ood = np.flatnonzero(ood1 & ood2)  # never trained, whatever the regime (Appendix C)
    n_train = count_training(world, config, len(id_id), len(ood_ood))
    as_hop1 = supervise(ood_id, first, ood_ood, config.hop1, config.k, rng)
    as_hop2 = supervise(id_ood, second, ood_ood, config.hop2, config.k, rng)
    train = np.concatenate([id_id[:n_train], as_hop1, as_hop2])
    test_id = id_id[n_train:]
    return all_splits(world,
                      (first[train], second[train]),
                      (first[test_id], second[test_id]),
                      (first[ood_ood], second[ood_ood]))


def count_training(world, config, n_id_id, n_ood_ood):
    """How many of the n_id_id compositions of two ID facts are trained; BadInput if too few are
    there, or if phi asks for none or for more than can be spared."""
    n_id = np.count_nonzero(~world.is_ood)
    # Section 3: phi training compositions for each ID fact; .5 % or more are held out as ID test.
    n_train = round(config.phi * n_id)
    most = int(0.995 * n_id_id)
    if most == 0 or n_ood_ood == 0:
        raise BadInput(f"ood_fraction = {config.ood_fraction:g}: too few ID or OOD compositions")
    if not 1 <= n_train <= most:  # nine digits: the limits are legal as printed
        raise BadInput(f"phi = {config.phi:g}: must lie in [{1 / n_id:.9g}, {most / n_id:.9g}]")
    return n_train


def supervise(mixed, hop, ood_ood, share, k, rng):
    """Rows of the training compositions that a regime adds for one hop (Appendix C).

    mixed    rows of the compositions that have an OOD fact at this hop and an ID fact at the other
    hop      (N,) int, the fact at this hop, of every composition
    ood_ood  rows of the OOD test compositions
    """
    tested = np.unique(hop[ood_ood])  # the paper's F1 for hop 1, F2 for hop 2
    n_chosen = round(share * len(tested))
    chosen = rng.permutation(tested)[:n_chosen]
    rows = mixed[np.isin(hop[mixed], chosen)]
    return up_to_k(rows, hop, k, rng)


def up_to_k(rows, hop, k, rng):
    """For each fact at this hop k random ones of its rows, or all if they are fewer: (n,) int, fact
    after fact; hop (N,) int is the fact of every row there is."""
    rows_of = {}  # fact: its chosen rows
    for row in rng.permutation(rows).tolist():
        chosen = rows_of.setdefault(int(hop[row]), [])
        if len(chosen) < k:
            chosen.append(row)
    result = []
    for fact in sorted(rows_of):
        result.extend(rows_of[fact])
    return np.array(result, dtype=int)


def all_splits(world, train, test_id, test_ood):
    """The seven SPLITS, as {name: Queries}. The three GIVEN_SPLITS are fact numbers (first,
    second); a mixed split is all compositions of its kind that are not trained."""
    first, second = compositions(world)
    ood1 = world.is_ood[first]                                                  # (N,) bool
    ood2 = world.is_ood[second]                                                 # (N,) bool
    numbers = question_numbers(world, queries(world, first, second))            # (N,)
    trained_numbers = question_numbers(world, queries(world, *train))
    untrained = ~np.isin(numbers, trained_numbers)                              # (N,) bool
    id_ood = untrained & ~ood1 & ood2
    ood_id = untrained & ood1 & ~ood2
    return {"id_atomic": queries(world, np.flatnonzero(~world.is_ood)),
            "ood_atomic": queries(world, np.flatnonzero(world.is_ood)),
            "train_inferred": queries(world, *train),
            "test_id": queries(world, *test_id),
            "test_ood": queries(world, *test_ood),
            "test_id_ood": queries(world, first[id_ood], second[id_ood]),
            "test_ood_id": queries(world, first[ood_id], second[ood_id])}


# ---------------------------------------------------------------- new facts
def add_facts(world, splits, config):
    """(world, splits) for fine-tuning on new facts and kept old ones (paper, Finding 3). That Bea
    lives in Bern, say, is new, and who Ada's mother is was kept: (Ada, mother, city) is old + new.

    kept_atomic, new_atomic    trained: facts alone
    train_inferred             trained: old training compositions of kept facts; those of `expose`
    new_old, old_new, new_new  tested: compositions, by hop 1 and hop 2, of unexposed new facts
    exposed_old, old_exposed   tested, if config.exposed > 0: untrained ones of exposed new facts
    old_atomic, old_inferred   may be forgotten: the old world's id_atomic and test_id, whole
    """
    rng = np.random.default_rng([config.data_seed, 2])
    world = change_facts(world, config, rng)
    first, second = compositions(world)
    paths = queries(world, first, second)
    old_numbers = question_numbers(world, splits["train_inferred"])
    remains = np.isin(question_numbers(world, paths), old_numbers)              # (N,) bool
    if not remains.any() or not (world.is_new[first] & world.is_new[second]).any():
        raise BadInput(f"new_facts = {config.new_facts}, kept = {config.kept:g}: too few facts")
    exposed, added = expose(world, first, second, config, rng)
    trained = np.concatenate([np.flatnonzero(remains), added])
    old = ~world.is_new                                                         # (F,) bool
    new = world.is_new & ~exposed                                               # (F,) bool

    def tested(hop1, hop2):
        rows = np.flatnonzero(hop1[first] & hop2[second])
        return paths.take(np.setdiff1d(rows, trained))

    # Evaluation draws from one split after another: in another order it would draw others.
    new_splits = {"kept_atomic": queries(world, np.flatnonzero(old)),
                  "new_atomic": queries(world, np.flatnonzero(world.is_new)),
                  "new_old": tested(new, old),
                  "old_new": tested(old, new),
                  "new_new": tested(new, new),
                  "train_inferred": paths.take(trained),
                  "old_atomic": splits["id_atomic"],
                  "old_inferred": splits["test_id"]}
    if config.exposed > 0:
        new_splits["exposed_old"] = tested(exposed, old)
        new_splits["old_exposed"] = tested(old, exposed)
    return world, new_splits


def change_facts(world, config, rng):
    """The World of round(kept * n) of the n ID facts, and of `new_facts` new ones: pairs (h, r)
    that had no fact, random tails. The OOD facts go. BadInput if there are not enough such pairs.

    Finding 3: the paper adds 2,000 new facts and, by its text, keeps 8,000 of 38,000 ID facts.
    """
    free = np.argwhere(world.index < 0)                                         # (n, 2)
    if config.new_facts > len(free):
        raise BadInput(f"new_facts = {config.new_facts}: must lie in [0, {len(free)}]")
    pairs = rng.permutation(free)[:config.new_facts]
    tails = rng.integers(0, world.n_entities, len(pairs))
    new = np.column_stack([pairs, tails])                                       # (new_facts, 3)
    old = rng.permutation(world.facts[~world.is_ood])
    kept = old[:round(config.kept * len(old))]
    facts = np.concatenate([kept, new])                                         # (F, 3)
    is_new = np.arange(len(facts)) >= len(kept)
    by_head = facts[:, 0].argsort(kind="stable")
    return build_world(f"new_facts = {config.new_facts}", facts[by_head],
                       np.zeros(len(facts), bool), world.entity_names, world.relation_names,
                       is_new[by_head])


def expose(world, first, second, config, rng):
    """(exposed (F,) bool, rows (n,) int of the compositions that expose them): round(exposed * n)
    of the n new facts are trained with kept ones, in up to exposed_k compositions for each hop."""
    new_facts = rng.permutation(np.flatnonzero(world.is_new))
    n_exposed = round(config.exposed * len(new_facts))
    if config.exposed > 0 and n_exposed == 0:
        raise BadInput(f"exposed = {config.exposed:g}: is less than one of {len(new_facts)} new "
                       f"facts; must be 0 or lie in [{1 / len(new_facts):.9g}, 1]")
    exposed = np.zeros(len(world.facts), bool)
    exposed[new_facts[:n_exposed]] = True
    old = ~world.is_new
    exposed_old = np.flatnonzero(exposed[first] & old[second])
    old_exposed = np.flatnonzero(old[first] & exposed[second])
    as_hop1 = up_to_k(exposed_old, first, config.exposed_k, rng)
    as_hop2 = up_to_k(old_exposed, second, config.exposed_k, rng)
    return exposed, np.concatenate([as_hop1, as_hop2])


# ---------------------------------------------------------------- files
@contextmanager
def reading(path, problem="is damaged, or another kind of file"):
    """Turns an error of reading a file into one line, a BadInput. Only what reads belongs inside:
    a mistake of ours keeps its traceback."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{path}: {error}")
    except READ_ERRORS as error:
        strerror = getattr(error, "strerror", None)  # "No such file or directory", and the like
        raise BadInput(f"{path}: {strerror or f'{problem} ({error})'}")


def read_bytes(path):
    """The bytes of a file, or of a pipe, which can be read only once."""
    with reading(path):
        return Path(path).read_bytes()


def parse_source(content, path, config):
    """(world, splits) from the bytes of an .npz file (see `parse_data`), or (world, None) from
    those of a text of facts (see `parse_facts`); the path is for messages alone."""
    if content.startswith(ZIP):
        return parse_data(content, path)
    return parse_facts(content, path, config), None


def parse_facts(content, path, config):
    """A World from lines of head, relation and tail, separated by tabs, in UTF-8:

        Ada     mother  Bea
        Bea     city    Bern

    Names are numbered as they come; config.ood_fraction of the facts, drawn at random, are OOD.
    BadInput for a header, or if a pair (head, relation) has two tails, or no fact follows another.
    """
    tails = {}      # (h, r): t
    entities = {}   # name: number
    relations = {}  # name: number
    for number, line in enumerate(decode(content, path).rstrip().split("\n"), 1):
        place = f"{path}, line {number}"
        head, relation, tail = split_line(line, place, may_be_header=number == 1)
        h = entities.setdefault(head, len(entities))
        t = entities.setdefault(tail, len(entities))
        r = relations.setdefault(relation, len(relations))
        if tails.setdefault((h, r), t) != t:
            raise BadInput(f"{place}: another tail of ({head}, {relation})")
    facts = np.array([(h, r, t) for (h, r), t in tails.items()])                # (F, 3)
    facts = facts[facts[:, 0].argsort(kind="stable")]
    if count_paths(facts, len(entities)) == 0:
        raise BadInput(f"{path}: has no two-hop path, as no tail is the head of a fact")
    is_ood = draw_ood(len(facts), config, np.random.default_rng([config.data_seed, 0]))
    return build_world(path, facts, is_ood, entities, relations)


def decode(content, path):
    """The text of UTF-8 bytes, without the mark that editors put first; lines end with a \\n."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = error.object[:error.start].count(b"\n") + 1
        raise BadInput(f"{path}, line {number}: is not UTF-8 text ({error}); save it as UTF-8")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def split_line(line, place, may_be_header):
    """[head, relation, tail] of a line, without spaces around them."""
    names = [name.strip() for name in line.split("\t")]
    if len(names) != 3 or "" in names:
        raise BadInput(f"{place}: needs head, relation and tail, tab-separated")
    if may_be_header and tuple(name.lower() for name in names) in HEADERS:
        raise BadInput(f"{place}: looks like a header ({', '.join(names)}); remove this line")
    return names


def parse_data(content, path):
    """(world, splits) of an .npz file of these arrays; BadInput if it breaks a rule:

    facts    (F, 3) int, rows (h, r, t), sorted by head, each (h, r) once
    is_ood   (F,) bool
    names    JSON: [list of entity names, list of relation names, name of the regime]
    train_inferred, test_id, test_ood    (N, 2) int, fact numbers of hop 1 and hop 2
    """
    if not content.startswith(ZIP):
        raise BadInput(f"{path}: is no data file (it does not begin as an .npz file does)")
    with reading(path, "is no data file"), np.load(io.BytesIO(content), allow_pickle=False) as file:
        entity_names, relation_names = read_names(file)
        E = len(entity_names)
        facts = read_table(file, "facts", (E, len(relation_names), E))
        F = len(facts)
        given = [read_table(file, name, (F, F)).T for name in GIVEN_SPLITS]     # (2, N) each
        is_ood = np.asarray(file["is_ood"])
        if is_ood.dtype != bool or is_ood.shape != (F,):
            raise ValueError("is_ood must be bool, one a fact")
        if (np.diff(facts[:, 0]) < 0).any() or len(np.unique(facts[:, :2], axis=0)) < F:
            raise ValueError("facts must be sorted by head, and each (h, r) have one tail")
        for first, second in given:
            if (facts[first, 2] != facts[second, 0]).any():
                raise ValueError("hop 2 must begin where hop 1 ends")
    world = build_world(path, facts, is_ood, entity_names, relation_names)
    return world, all_splits(world, *given)


def read_names(file):
    """(entity names, relation names) of an open .npz file; ValueError if they are not."""
    names = json.loads(str(file["names"]))
    if not isinstance(names, list) or [type(part) for part in names] != [list, list, str]:
        raise ValueError("names must be two lists and a text")
    return names[:2]


def read_table(file, name, limits):
    """(N, columns) int, an array of an open .npz file; ValueError unless it has a row and every
    number is at least 0 and below the limit of its column."""
    table = np.asarray(file[name])
    if table.dtype.kind not in "iu" or table.ndim != 2 or table.shape[1] != len(limits):
        raise ValueError(f"{name} must be whole numbers in {len(limits)} columns")
    if len(table) == 0 or (table < 0).any() or (table >= limits).any():
        raise ValueError(f"{name} is empty, or a number in it out of range")
    return table.astype(np.int64)
