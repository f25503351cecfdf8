"""The checks of the exercises in tutorial.ipynb: each prints "right: ..." or "not yet: ...".

A check loads what it needs itself, so nothing that was changed in the notebook can mislead it. What
a student wrote is either a value, of which anything is accepted and judged, or a function, whose
own errors keep their traceback.
"""
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

import analyze
import data
import grok

SHIPPED = Path(__file__).resolve().parent.parent / "runs" / "shipped"
BRIDGE_IN_TINY = (2, "state", 1)   # loop 3, state, r1
BRIDGE_IN_SMALL = (2, "mixed", 2)  # loop 3, mixed, r2
MAP_STEPS = 3000
MAP_SHARES = (0, 0.25, 0.5, 0.75, 1)


# ---------------------------------------------------------------- what the checks share
def verdict(right, result, missing):
    """Print the result if the answer is right, else what is missing."""
    print(f"right: {result}" if right else f"not yet: {missing}")


@lru_cache
def load(run, split):
    """(model, world, Queries of this split in random order) of a shipped run."""
    model, world, splits = grok.load_run(SHIPPED / run)
    queries = splits[split]
    return model, world, queries.take(np.random.default_rng(0).permutation(len(queries.h)))


@lru_cache
def known_to_tiny(split="test_id", most=1000):
    """(model, world, those of `most` Queries that it answers rightly) of the shipped tiny run."""
    model, world, queries = load("tiny/natural/seed0", split)
    return model, world, analyze.right_only(model, world, queries.take(slice(most)))


@lru_cache
def pairs_in_tiny():
    """(clean, donors, predicted answers) of 300 questions that tiny answers rightly."""
    _, world, known = known_to_tiny()
    return analyze.other_r2(world, known.take(slice(300)), known, np.random.default_rng(0))


def numbers(given):
    """Whatever was given as floats, or None if it is no such thing."""
    try:
        return np.asarray(given, float)
    except (TypeError, ValueError):
        return None


def close(given, wanted):
    """Whether what was given are these numbers, to two digits."""
    given = numbers(given)
    wanted = np.asarray(wanted, float)
    return (given is not None and given.size == wanted.size
            and np.allclose(given.ravel(), wanted.ravel(), atol=0.0051))


# ---------------------------------------------------------------- the exercises, in their order
def own_facts(facts, left_out, n_questions):
    """Exercise 1: `left_out` are two of the facts, which chain through a bridge of other chains."""
    try:
        lines = ["\t".join(fact) for fact in facts]
        world = data.parse_facts("\n".join(lines).encode(), "your facts", grok.Config())
        chosen = {tuple(fact) for fact in left_out}
    except data.BadInput as error:
        return verdict(False, "", str(error))
    except TypeError:
        return verdict(False, "", "facts are triples of names: (head, relation, tail)")
    named = [(world.entity_names[h], world.relation_names[r], world.entity_names[t])
             for h, r, t in world.facts]
    is_ood = np.array([fact in chosen for fact in named])
    first, second = data.compositions(world)
    bridges = world.facts[first, 2]
    is_ood_question = is_ood[first] & is_ood[second]
    trained = ~is_ood[first] & ~is_ood[second]
    if len(named) < 8:
        return verdict(False, "", f"{len(named)} facts; write eight or more")
    if is_ood.sum() != 2 or not is_ood_question.any():
        return verdict(False, "", "left_out are two of your facts, and the second begins where the "
                       "first one ends")
    if not np.isin(bridges[is_ood_question], bridges[trained]).any():
        return verdict(False, "", "no chain of two other facts goes through this bridge: more than "
                       "the pair would be new")
    verdict(close(n_questions, len(first)),
            f"{len(first)} questions, of which {is_ood_question.sum()} OOD. Joined by tabs, a "
            "fact a line, your facts are a file for python grok.py --facts (which needs many more "
            "of them)",
            "count again: every fact goes on with every fact of its tail")


def control(function):
    """Exercise 2: values that are foreign, as large as true ones, and bring no donor's bridge."""
    model, world, _ = known_to_tiny()
    clean, donor, predicted = pairs_in_tiny()
    site = BRIDGE_IN_TINY
    ours = analyze.values_at(model, world, clean, [site])[site]             # (N, D)
    theirs = analyze.values_at(model, world, donor, [site])[site]           # (N, D)
    given = numbers(function(ours.clone(), theirs.clone()))
    if given is None or given.shape != tuple(ours.shape) or not np.isfinite(given).all():
        return verdict(False, "", f"return finite numbers of the shape {tuple(ours.shape)}")
    given = torch.from_numpy(given).float()
    away = (given - ours).norm(dim=1) / ours.norm(dim=1)                    # (N,)
    size = (given.norm(dim=1) / theirs.norm(dim=1)).mean()
    usual = analyze.share_becoming(predicted, model, world, clean, {site: theirs})
    moved = analyze.share_becoming(predicted, model, world, clean, {site: given})
    if (away < 0.3).float().mean() > 0.1:
        return verdict(False, "", "too near to the clean question's own values to be foreign")
    if not 0.9 < size < 1.1:
        return verdict(False, "", f"{size:.2f} times as large as true values")
    verdict(moved < 0.1, f"{moved:.2f} redirected, by the donors {usual:.2f}",
            f"{moved:.2f} redirected: this brings the donor's bridge")


def map_point(guess, trainer):
    """Exercise 3: a guess, and a trainer that went as far as the runs of the map."""
    number = numbers(guess)
    if number is None or number.size != 1 or not 0 <= number.item() <= 1:
        return verdict(False, "", "write your guess first, a share from 0 to 1")
    if not isinstance(trainer, grok.Trainer):
        return verdict(False, "", "my_trainer is the grok.Trainer that you trained")
    config = trainer.config
    settings = {**grok.PRESETS["small"][2], "steps": config.steps}
    is_small = all(getattr(config, name) == value for name, value in settings.items())
    if not is_small or config.hop1 + config.hop2 == 0:
        return verdict(False, "", "train the preset small, with hop1 or hop2 above 0")
    if config.hop1 in MAP_SHARES and config.hop2 in MAP_SHARES:
        return verdict(False, "", "the map of part 9 has this point; choose one between its points")
    if trainer.step < MAP_STEPS or not trainer.history or trainer.history[-1]["step"] < MAP_STEPS:
        return verdict(False, "", f"train {MAP_STEPS:,} steps, then call measure()")
    answer = trainer.history[-1]["accuracy"]["test_ood"]
    miss = abs(answer - number.item())
    verdict(True, f"you guessed {number.item():.2f}, your run answers {answer:.2f}, {miss:.2f} "
            "away. What did you misjudge: the aim, the store, or how far seeds differ?", "")


def loops(right, fewest):
    """Exercise 4: the shares answered after 1 to 8 loops, and the fewest loops with .9."""
    model, world, queries = load("tiny/natural/seed0", "test_ood")
    tokens, answers = grok.to_tokens(queries, world, "causal")
    shares = {}
    for n in range(1, 9):
        shares[n] = (model(tokens, n_loops=n).argmax(-1) == answers).float().mean().item()
    given = [right.get(n) for n in shares] if isinstance(right, dict) else None
    enough = min(n for n in shares if shares[n] >= 0.9)
    verdict(close(given, list(shares.values())) and close(fewest, enough),
            f"{enough} loops are enough, and more do no harm",
            "right needs eight shares, n = 1 to 8, and fewest the smallest n that reaches .9")


def site_moves(site):
    """Exercise 5: where a swapped state redirects if tiny runs six loops."""
    where = numbers(site)
    if where is None or where.size != 2 or not np.isin(where, range(6)).all():
        return verdict(False, "", "a site is (loop, position), loop 0 to 5, position 0 to 2")
    loop, position = where.ravel().astype(int)
    model, world, _ = known_to_tiny()
    clean, donor, predicted = pairs_in_tiny()
    clean_tokens, _ = grok.to_tokens(clean, world, "causal")
    donor_tokens, _ = grok.to_tokens(donor, world, "causal")
    if position >= clean_tokens.shape[1]:
        return verdict(False, "", "there are three positions, 0 to 2")
    kept = {}

    def keep(at, part, value):
        kept[at, part] = value
        return value

    def put_in(at, part, value):
        if (at, part) == (loop, "state"):
            value = value.clone()
            value[:, position] = kept[at, part][:, position]
        return value

    model(donor_tokens, n_loops=6, edit=keep)
    answers = model(clean_tokens, n_loops=6, edit=put_in).argmax(-1)
    moved = (answers == torch.from_numpy(predicted)).float().mean().item()
    verdict(moved > 0.9, f"{moved:.2f} of the answers are redirected",
            f"{moved:.2f} of the answers are redirected there")


def other_head(function):
    """Exercise 6: donors with the same relations and another head, bridge and answer."""
    model, world, known = known_to_tiny()
    given = function(known.take(slice(400)), known, np.random.default_rng(0))
    if not isinstance(given, tuple) or [type(one) for one in given[:2]] != [data.Queries] * 2:
        return verdict(False, "", "return (clean, donor, predicted answers)")
    clean, donor, predicted = given
    same = (clean.r1 == donor.r1) & (clean.r2 == donor.r2)
    other = (clean.h != donor.h) & (clean.b != donor.b) & (clean.t != donor.t)
    if not (same & other & (np.asarray(predicted) == donor.t)).all():
        return verdict(False, "", "the same r1 and r2, another h, b and t, and predicted is the "
                       "donor's answer")
    if len(clean.h) <= 50:
        return verdict(False, "", f"{len(clean.h)} pairs: a donor for every question that has one")
    put = analyze.values_at(model, world, donor, [(1, "state", 0)])
    moved = analyze.share_becoming(predicted, model, world, clean, put)
    verdict(moved > 0.8, f"{len(clean.h)} pairs, {moved:.2f} redirected at h after loop 2",
            f"{moved:.2f} redirected at h after loop 2")


def mean_ablation(function):
    """Exercise 7: the mean over questions; it is needed at r1 after loop 3 and not after loop 1."""
    tried = numbers(function(torch.arange(6.0).view(3, 2)))
    shapes = ((2,), (1, 2), (3, 2))
    if tried is None or tried.shape not in shapes or not (tried == np.array([[2.0, 3.0]])).all():
        return verdict(False, "", "of the rows (0, 1), (2, 3), (4, 5) the average is (2, 3)")
    model, world, known = known_to_tiny()
    clean = known.take(slice(300))
    unchanged = []
    for loop in range(4):
        site = (loop, "state", 1)
        values = analyze.values_at(model, world, clean, [site])[site]
        new = torch.from_numpy(numbers(function(values))).float().expand(values.shape)
        unchanged.append(analyze.share_becoming(clean.t, model, world, clean, {site: new}))
    said = ", ".join(f"{share:.2f}" for share in unchanged)
    verdict(unchanged[2] < 0.5 < unchanged[0], f"unchanged at r1 after loops 1 to 4: {said}",
            f"unchanged at r1 after loops 1 to 4: {said}")


@lru_cache
def runs_with_another_head():
    """(tokens, answers, our states, their states): what tiny knows, and the same with other heads;
    states are (n_loops, N, T, D)."""
    model, world, known = known_to_tiny()
    tokens, answers = grok.to_tokens(known, world, "causal")
    others = tokens.clone()
    others[:, 0] = (others[:, 0] + 7) % world.n_entities
    ours = analyze.values_of(model, tokens)["state"]
    theirs = analyze.values_of(model, others)["state"]
    return tokens, answers, ours, theirs


def path_patching(function):
    """Exercise 8: theirs at (loop 2, h), ours back at (loop 3, r1), and the answer comes back."""
    model, world, known = known_to_tiny()
    tokens, answers, ours, theirs = runs_with_another_head()
    kept = {}

    def watched(loop, part, value):
        kept[loop, part] = function(loop, part, value)
        return kept[loop, part]

    back = (model(tokens, edit=watched).argmax(-1) == answers).float().mean().item()
    broken = analyze.share_becoming(answers, model, world, known,
                                    {(1, "state", 0): theirs[1, :, 0]})
    done = (torch.allclose(kept[1, "state"][:, 0], theirs[1, :, 0])
            and torch.allclose(kept[2, "state"][:, 1], ours[2, :, 1]))
    verdict(done and back > 0.7,
            f"{broken:.2f} answered with the first patch alone, {back:.2f} with both",
            "the state after loop 2 (index 1) at h gets theirs, that after loop 3 at r1 gets ours")


@lru_cache
def hidden_bridges():
    """(ID Queries, what the site holds in them, (clean, donors, predicted) of OOD Queries, what the
    site holds in the clean ones) of the model in which the lens is blind."""
    site = BRIDGE_IN_SMALL
    model, world, fitted = load("small/second_full/seed0", "test_id")
    _, _, tested = load("small/second_full/seed0", "test_ood")
    fitted = fitted.take(slice(2000))
    known = analyze.right_only(model, world, tested)
    pairs = analyze.other_r2(world, known.take(slice(300)), known, np.random.default_rng(0))
    held = analyze.values_at(model, world, fitted, [site])[site]            # (2000, D)
    own = analyze.values_at(model, world, pairs[0], [site])[site]           # (300, D)
    return fitted, held, pairs, own


def hidden_code(function):
    """Exercise 9: a vector for each entity, learned on ID questions, that redirects OOD ones."""
    model, world, _ = load("small/second_full/seed0", "test_id")
    fitted, held, (clean, donor, predicted), own = hidden_bridges()
    vectors = numbers(function(held, torch.from_numpy(fitted.b), world.n_entities))
    if vectors is None or vectors.shape != (world.n_entities, held.shape[1]):
        return verdict(False, "", f"return {world.n_entities} vectors of width {held.shape[1]}")
    vectors = torch.from_numpy(vectors).float()
    new = own + vectors[donor.b] - vectors[clean.b]
    moved = analyze.share_becoming(predicted, model, world, clean, {BRIDGE_IN_SMALL: new})
    verdict(moved > 0.8, f"{moved:.2f} redirected", f"{moved:.2f} of the answers are redirected")
