"""Where is a fact asked alone looked up, and does a composition use the same place and code?

    python -m extras.facts RUN...       facts.json beside the weights of each run

A fact asked alone is (h, r, blank). Its answer's code at a site is the mean value there of all
facts with that tail (`codes`), so adding code[t'] - code[t] asks the site for t' in place of t.
Three maps:

alone    in the fact itself: does the answer become t'? There the fact has been looked up.
hop1     in a composition, at the same site, with the bridge's code: does the bridge become b'?
hop2     in a composition, with the answer's code: does the answer become t'?

Where alone and hop1 are both high, a fact that is only ever asked alone can serve as hop 1; where
alone and hop2 are, as hop 2. And when is hop 1 looked up? "pair" swaps the states at h and r1:

question donors A (for h) and B (for r1) share a bridge: does the fact (h of A, r1 of B) decide?
bridge   or does the bridge that both came with?

A swap asks for the fact (donor's bridge, r2), in OOD queries, too, most often an ID fact. "swapped"
parts swaps that ask for ID facts and for OOD facts: only these show an OOD fact as hop 2.

After fine-tuning on new facts, "mended" denoises: into wrong answers the value of an old
composition with the right bridge is put. If that mends them, hop 1 had failed. "asked_alone"
asks where a probe that was fitted on old facts reads the answers of new ones. "unlearnt" gives the
MLP back its weights from before the fine-tuning, at one site: which answers are lost? And
"held_out" asks whether the circuit still serves old facts that were kept.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from analyze import (codes, fit, means, other_r2, pairs, patch, patch_map, pick_donors, prepared,
                     predict, read, right_only, tail, values_of)
from data import BadInput
from grok import load_run, read_config, say, to_tokens, WEIGHTS, write_file


def shared_places(model, world, facts, asked, n=300):
    """{"alone", "hop1", "hop2": patch_map} for Queries of facts and of compositions."""
    rng, layout = np.random.default_rng(0), model.config.layout
    tokens, answers = to_tokens(facts, world, layout)
    code = codes(model, tokens, answers, world.n_entities)             # (n_loops, 2, E, T, D)
    some = rng.permutation(len(tokens))[:n]
    alone, t = tokens[some], answers[some]
    other = torch.from_numpy(rng.permutation(facts.t)[:n])             # another fact's answer
    apart = t != other
    alone, t, other = alone[apart], t[apart], other[apart]
    clean, donor, to_bridge = other_r2(world, asked.take(slice(n)), asked, rng)
    queries, _ = to_tokens(clean, world, layout)
    values = values_of(model, queries)
    return {"alone": moved(model, alone, values_of(model, alone), code, t, other, other),
            "hop1": moved(model, queries, values, code, clean.b, donor.b,
                          torch.from_numpy(to_bridge)),
            "hop2": moved(model, queries, values, code, clean.t, donor.t,
                          torch.from_numpy(donor.t))}


def moved(model, tokens, values, code, old, new, predicted):
    """The patch_map of values whose code of the entities `old` is made that of `new`, (N,) each."""
    return patch_map(model, tokens, values + code[:, :, new] - code[:, :, old], predicted)


def pair_of_states(model, world, pool, n):
    """Do the states at h and r1 hold the bridge together, or the question that leads to it?

    {"n", "n_two", "one", "bridge", "question"}: shares, one a loop after which both are swapped.
    "one": both are a donor A's, and A's bridge decides the answer. The others: h's is A's, r1's
    that of a B with A's bridge; this bridge, or the fact (h of A, r1 of B) decides the answer.
    """
    rng = np.random.default_rng(0)
    clean, a, bridge = other_r2(world, pool.take(slice(n)), pool, rng)
    one = pair_swap(model, world, clean, a, a) == bridge                # (n_loops, N)
    c, d = pairs(a, pool)
    both = tail(world, c.h, d.r1)                                       # what A and B ask together
    allowed = (c.b == d.b) & (c.h != d.h) & (c.r1 != d.r1) & (both >= 0) & (both != c.b)
    two, bridge = clean.take(allowed.any(1)), bridge[allowed.any(1)]
    a, b = pick_donors(a, pool, allowed, rng)
    got = pair_swap(model, world, two, a, b)                            # (n_loops, N_two)
    asked = tail(world, tail(world, a.h, b.r1), two.r2)
    apart = (asked >= 0) & (asked != bridge) & (asked != two.t)
    return {"n": len(clean.h), "n_two": int(apart.sum()), "one": means(one),
            "bridge": means((got == bridge)[:, apart]), "question": means((got == asked)[:, apart])}


def pair_swap(model, world, clean, at_h, at_r1):
    """Answers (n_loops, N) with h's state from at_h, r1's from at_r1, after each loop in turn."""
    tokens, answers = to_tokens(clean, world, model.config.layout)[0], []
    _, first, second = prepared(model, world, at_h, at_r1)
    for loop in range(len(first)):
        new = {(loop, 1, 0): first[loop, 1, :, 0], (loop, 1, 1): second[loop, 1, :, 1]}
        answers.append(patch(model, tokens, new).argmax(-1).numpy())
    return np.array(answers)


def swapped(model, world, known, pool, n=500):
    """Does a swap in queries answered rightly, `pool`, redirect to ID and OOD facts alike?

    {"queries": how many these are, "n": [swaps that ask for an ID fact, for an OOD fact], up to n
     each, "facts": [how many ID facts these are, OOD facts], "donor", "code": [share redirected to
     the ID fact, to the OOD fact], at the site where most are to ID facts, [] if there are none};
     codes are from the ID queries `known`.
    """
    rng, layout, E = np.random.default_rng(0), model.config.layout, world.n_entities
    # one swap in eight asks for an OOD fact: so as many clean queries, some of them again
    clean = pool.take(rng.integers(0, len(pool.h), 8 * n if len(pool.h) else 0))
    clean, donor, predicted = other_r2(world, clean, pool, rng)
    code = codes(model, to_tokens(known, world, layout)[0], torch.from_numpy(known.b), E)
    asked = world.index[donor.b, clean.r2]                              # (N,) fact numbers
    found = {"queries": len(pool.h), "n": [], "facts": [], "donor": [], "code": []}
    maps = {"donor": [], "code": []}                                    # each [ID, OOD]
    for kind in (False, True):
        rows = np.flatnonzero(world.is_ood[asked] == kind)[:n]
        c, d, wanted = clean.take(rows), donor.take(rows), torch.from_numpy(predicted[rows])
        tokens, ours, theirs = prepared(model, world, c, d)
        maps["donor"].append(patch_map(model, tokens, theirs, wanted))
        maps["code"].append(moved(model, tokens, ours, code, c.b, d.b, wanted))
        found["n"].append(len(rows))
        found["facts"].append(len(np.unique(asked[rows])))
    for name, (to_id, to_ood) in maps.items():
        if all(found["n"]):
            to_id, to_ood = (np.array(shares["redirected"]) for shares in (to_id, to_ood))
            site = np.unravel_index(to_id.argmax(), to_id.shape)
            found[name] = [float(to_id[site]), float(to_ood[site])]
    return found


def mended(model, world, asked, old, n=500):
    """{"n", "share", "mixed"}: how many wrong answers of `asked` were tried, n at most, and what
    share of these the best site mends, the best in what is mixed at r2, when it gets an old
    composition's value with the same bridge and another r2."""
    rng, tokens = np.random.default_rng(0), to_tokens(asked, world, model.config.layout)[0]
    wrong = asked.take((predict(model, tokens).numpy() != asked.t)).take(slice(n))
    c, d = pairs(wrong, old)
    clean, donor = pick_donors(wrong, old, (c.b == d.b) & (c.r2 != d.r2), rng)
    tokens, _, theirs = prepared(model, world, clean, donor)
    found = patch_map(model, tokens, theirs, torch.from_numpy(clean.t))
    if not found["n"]:
        return {"n": 0, "share": None, "mixed": None}
    shares = np.array(found["redirected"])                              # (n_loops, 2, T)
    return {"n": found["n"], "share": float(shares.max()), "mixed": float(shares[:, 0, 2].max())}


def guessed(world, splits):
    """{kind: share right} of compositions with new facts if the answer is the one that r2 had most
    often in training: it takes no hop 1, and no new fact."""
    trained, found = splits["train_inferred"], {}
    counts = np.zeros((world.n_relations, world.n_entities))
    np.add.at(counts, (trained.r2, trained.t), 1)
    for kind in ("new_old", "old_new", "new_new"):
        asked = splits[kind]
        found[kind] = means(counts.argmax(1)[asked.r2] == asked.t)
    return found


def held_out(model, world, splits):
    """{"n", "right"}: the share answered of old compositions that no training showed, where both
    facts are kept."""
    facts, asked = splits["kept_atomic"], splits["old_inferred"]
    kept = np.zeros(world.index.shape, bool)                                    # (E, R)
    kept[facts.h, facts.r1] = True
    asked = asked.take(kept[asked.h, asked.r1] & kept[asked.b, asked.r2])
    tokens, answers = to_tokens(asked, world, model.config.layout)
    return {"n": len(tokens), "right": means(predict(model, tokens) == answers)}


def asked_alone(model, world, splits):
    """Where does the answer of a fact asked alone stand? A probe is fitted on half of old facts.

    {"old" (the other half), "new": maps (n_loops, 2, T) of the share of answers that it reads;
     "n": compositions of new + old, "right": share of them answered, each [where it reads the new
     fact in what the last loop mixed at the answer position, where it does not]}
    """
    old, new, layout = splits["kept_atomic"], splits["new_atomic"], model.config.layout
    old = old.take(np.random.default_rng(0).permutation(len(old.h)))
    fitted, held = old.take(slice(len(old.h) // 2)), old.take(slice(len(old.h) // 2, None))
    tokens, answers = to_tokens(fitted, world, layout)
    weights, place = fit(model, tokens, torch.eye(world.n_entities)[answers]), {}
    for name, some in (("old", held), ("new", new)):
        tokens, answers = to_tokens(some, world, layout)
        place[name] = read(model, tokens, weights).argmax(-1) == answers        # (..., T, N)
    early = place["new"][-1, 0, model.answer_position(tokens)[0]].numpy()       # (N,)
    asked = splits["new_old"]
    tokens, answers = to_tokens(asked, world, layout)
    right = (predict(model, tokens) == answers).numpy()
    number = np.searchsorted(world.index[new.h, new.r1], world.index[asked.h, asked.r1])
    groups = right[early[number]], right[~early[number]]
    return {**{name: means(shown) for name, shown in place.items()},
            "n": [len(some) for some in groups], "right": [means(some) for some in groups]}


def unlearnt(model, start, world, splits, n=500):
    """Where is a new fact looked up? At one site after another the MLP is that of `start`, the
    model before its fine-tuning: what it learned is lost there, and the rest is as it was.

    {split: {"n": queries answered right, of up to n, "lost": (n_loops, T) share now wrong}}, for
     new facts alone, as hop 1, as hop 2, and for old compositions, which are to lose nothing.
    """
    found = {}
    for name in ("new_atomic", "new_old", "old_new", "train_inferred"):
        asked = right_only(model, world, splits[name]).take(slice(n))
        tokens, answers = to_tokens(asked, world, model.config.layout)
        lost = []                                                       # (n_loops, T)
        for loop in range(model.config.n_loops):
            lost.append([])
            for position in range(tokens.shape[1]):
                got = with_old_mlp(model, start, tokens, loop, position)
                lost[-1].append(means(got != answers))
        found[name] = {"n": len(tokens), "lost": lost}
    return found


@torch.no_grad()
def with_old_mlp(model, start, tokens, loop, position):
    """Answers (B,) with the MLP of another model at one site, on what `model` mixed there."""
    block, seen = start.blocks[loop % len(start.blocks)], {"state": model.embed(tokens)}
    x = seen["state"]                                                           # (B, T, D)

    def edit(at, part, value):
        if (at, part) == (loop, "state"):
            base = x if model.config.restart else seen["state"]
            value = value.clone()
            value[:, position] = block.look_up(base + seen["mixed"])[:, position]
        seen[part] = value
        return value

    return model(tokens, edit=edit).argmax(-1)


def measure(model, world, splits, start=None):
    """Everything that facts.json holds of one stage of a run; `start`: the model it began as."""
    some = {name: asked.take(np.random.default_rng(0).permutation(len(asked.h))[:2000])
            for name, asked in splits.items()}
    if "new_old" in splits:
        return {"mended": {kind: mended(model, world, some[kind], some["train_inferred"])
                           for kind in ("new_old", "old_new")},
                "asked_alone": asked_alone(model, world, splits),
                "held_out": held_out(model, world, splits),
                "unlearnt": unlearnt(model, start, world, some) if start else None}
    parts = [splits[name] for name in ("id_atomic", "ood_atomic")]
    facts = type(parts[0])(*map(np.concatenate, zip(*parts)))
    asked = right_only(model, world, splits["test_id"])
    known, other = (splits["test_id"].take(slice(first, 4000, 2)) for first in (0, 1))
    pools = {"test_id": other, "test_ood": splits["test_ood"].take(slice(2000))}
    return {**shared_places(model, world, facts, asked),
            "pair": pair_of_states(model, world, asked, n=500),
            "swapped": {split: swapped(model, world, known, right_only(model, world, pool))
                        for split, pool in pools.items()}}


def begun_as(folder):
    """The model that a run was fine-tuned from, or None."""
    start = read_config(folder).get("start", {"weights": "none"})
    if start["weights"] in WEIGHTS:
        return load_run(folder / start["path"], start["weights"])[0]


def main(argv=None):
    """Measure where facts are looked up; exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="extras.facts", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    try:
        for folder in parser.parse_args(argv).runs:
            found, start = {}, begun_as(folder)
            for stage, file in WEIGHTS.items():
                if (folder / file).exists():
                    found[stage] = measure(*load_run(folder, stage), start)
            if not found:
                raise BadInput(f"{folder}: holds no weights")
            write_file(folder / "facts.json", json.dumps(found).encode())
            say(f"{folder}: " + ", ".join(found))
    except (BadInput, OSError) as error:
        print(f"extras.facts: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
