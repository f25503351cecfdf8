"""Looking inside a trained model: is the bridge seen, is it present, is it used?

    python analyze.py RUN...              look into these runs: paths.json, mixed.png, state.png
    python analyze.py RUN... -o FOLDER    the same, written into another folder

"In which city does Ada's mother live?" has the bridge Bea and the answer Bern. At some place in the
model, Bea is

    seen     if the logit lens reads her there, ahead of every other token (paper, Section 4)
    present  if a probe reads her there, a linear map that was fitted on other queries
    used     if a swap there redirects the answer. Take what the model holds while it answers "In
             which street does Carl's boss live?", whose bridge is Dora, and put it in that place:
             now Ada's mother should live in Oslo, the city of Dora.

The swap is an interchange intervention (activation patching). Wang et al. 2024, whom the paper
follows, count every changed answer; here the answer must become the *predicted* one.

A site is (loop, part, position), counted from 0: part "mixed" is what mixing the positions gave in
that loop, just before the MLP, and "state" is what the loop hands on, just after it.

    values   {part: (n_loops, N, T, D)}   what N queries hold at every site
    maps     {part: (n_loops, T)}         one number a site
"""
import json
import os
import shlex
import sys
import tempfile
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data import BadInput, regime_name
from grok import (LENGTH, PARTS, WEIGHTS, Parser, command, lens_rates, load_run, read_run,
                  run_values, say, to_tokens, write_file)

POSITIONS = ("h", "r1", "r2", "answer")  # scratch slots come after these
EXAMINED = {"test_id": "ID", "test_ood": "OOD"}
COMPOSITIONS = ("test_id", "test_ood", "test_id_ood", "test_ood_id")
BATCH = 256   # queries at a time
ENOUGH = 0.5  # the share of answers that a swap redirects at one site, or the site is none


# ---------------------------------------------------------------- what a site shows
@torch.no_grad()
def values_of(model, tokens):
    """The values at every site, {part: (n_loops, N, T, D)}, for tokens (N, T)."""
    batches = {part: [] for part in PARTS}
    for batch in tokens.split(BATCH):
        for part, value in run_values(model, batch).items():
            batches[part].append(value)
    return {part: torch.cat(values, dim=1) for part, values in batches.items()}


def logit_lens(model, tokens, first=None, turned=False):
    """The top-1 token at every site, {part: (n_loops, N, T)}: the lens of the paper, Section 4.
    With `first` only so many tokens compete; with n_entities the entities alone, so that a site
    that shows its own relation loudest still shows which entity comes next. With the lens `turned`
    it is the last token: a value may as well point away from what it means."""
    sign = -1 if turned else 1
    values = values_of(model, tokens)
    return {part: (sign * model.unembed(values[part])[..., :first]).argmax(-1) for part in PARTS}


def seen(model, world, queries):
    """What the lens shows of Queries, which have to come in random order (for the chance level).

    {"n", "left_out", part: {"bridge", "entity", "last_entity", "answer": rates},
     "paper": {"any", "any_chance"}}
    "bridge": it is top-1 of all tokens; "entity": of the entities; "last_entity": it is the last of
    the entities; "answer": it is top-1 of all tokens.
    "paper": the bridge is top-1 at any token's position in any state between passes, the paper's
    measure; scratch slots are not looked at.
    Left out are queries whose bridge is their head: there the query shows its own token.
    """
    hidden = queries.take(queries.b != queries.h)
    tokens, answers = to_tokens(hidden, world, model.config.layout)
    bridges = torch.from_numpy(hidden.b)
    top = logit_lens(model, tokens)
    top_entity = logit_lens(model, tokens, world.n_entities)
    last_entity = logit_lens(model, tokens, world.n_entities, turned=True)
    result = {"n": len(tokens), "left_out": len(queries.h) - len(tokens)}
    for part in PARTS:
        result[part] = {"bridge": rates(top[part], bridges),
                        "entity": rates(top_entity[part], bridges),
                        "last_entity": rates(last_entity[part], bridges),
                        "answer": rates(top[part], answers)}
    between_passes = rates(top["state"][model.stages][:, :, :tokens.shape[1]], bridges)
    result["paper"] = {name: between_passes[name] for name in ("any", "any_chance")}
    return result


def rates(top, wanted):
    """`lens_rates` of top (n_loops, N, T), with "any_chance" and "best_chance": the same for what
    the query before wanted. Without queries, None for each."""
    if len(wanted) == 0:
        return dict.fromkeys(("map", "any", "any_chance", "best", "best_site", "best_chance"))
    result = lens_rates(top, wanted)
    chance = lens_rates(top, wanted.roll(1))
    result["any_chance"] = chance["any"] if len(wanted) > 1 else None
    result["best_chance"] = chance["best"]
    return result


# ---------------------------------------------------------------- what is present
def fit_probe(model, tokens, targets, ridge=1.0):
    """Ridge regression at every site, in closed form: weights {part: (n_loops, T, D + 1, K)} from
    the values of tokens (N, T), and a constant 1, to targets (N, K)."""
    gram = dict.fromkeys(PARTS, 0.0)
    moment = dict.fromkeys(PARTS, 0.0)
    for batch, wanted in zip(tokens.split(BATCH), targets.split(BATCH)):
        for part, value in values_of(model, batch).items():
            x = with_constant(value)                                    # (n_loops, T, B, D + 1)
            gram[part] = gram[part] + x.mT @ x
            moment[part] = moment[part] + x.mT @ wanted
    weights = {}
    for part in PARTS:
        penalty = ridge * torch.eye(gram[part].shape[-1])
        weights[part] = torch.linalg.solve(gram[part] + penalty, moment[part])
    return weights


def with_constant(value):
    """(n_loops, N, T, D) -> (n_loops, T, N, D + 1): a matrix a site, and a constant 1 beside it."""
    return F.pad(value.transpose(1, 2), (0, 1), value=1.0)


def apply_probe(model, tokens, weights):
    """What the weights of `fit_probe` make of tokens (N, T): {part: (n_loops, N, T, K)}."""
    values = values_of(model, tokens)
    return {part: (with_constant(values[part]) @ weights[part]).transpose(1, 2) for part in PARTS}


def present(model, world, queries, probe):
    """Where a probe that was fitted on bridges reads the bridge of Queries: {"n", part: {"map",
    "best", "best_site"}}, these as in `lens_rates`; left out are the same queries as in `seen`."""
    hidden = queries.take(queries.b != queries.h)
    tokens, _ = to_tokens(hidden, world, model.config.layout)
    scores = apply_probe(model, tokens, probe)
    result = {"n": len(tokens)}
    for part in PARTS:
        reads = rates(scores[part].argmax(-1), torch.from_numpy(hidden.b))
        result[part] = {name: reads[name] for name in ("map", "best", "best_site")}
    return result


# ---------------------------------------------------------------- what is used
@torch.no_grad()
def predict(model, tokens):
    """The model's answers (N,) to tokens (N, T)."""
    return torch.cat([model(batch).argmax(-1) for batch in tokens.split(BATCH)])


def patch(model, tokens, new):
    """Logits (N, V) on tokens (N, T) with values put in: new = {(loop, part, position): (N, D)}."""
    def edit(loop, part, value):
        for (at_loop, at_part, position), put in new.items():
            if (at_loop, at_part) == (loop, part):
                value = value.clone()
                value[:, position] = put
        return value
    return model(tokens, edit=edit)


def patch_map(model, tokens, new, predicted):
    """Put the values new {part: (n_loops, N, T, D)} into the runs on tokens (N, T), one site at a
    time: {"n", "redirected": maps of the share of answers that become the predicted ones (N,), or
    None without queries}."""
    if len(tokens) == 0:
        return {"n": 0, "redirected": None}
    n_loops, _, T, _ = new["state"].shape
    maps = {part: np.zeros((n_loops, T)) for part in PARTS}
    predicted = torch.as_tensor(predicted)
    for loop, part, position in product(range(n_loops), PARTS, range(T)):
        put = new[part][loop, :, position]                              # (N, D)
        answers = patch(model, tokens, {(loop, part, position): put}).argmax(-1)
        maps[part][loop, position] = share(answers == predicted)
    return {"n": len(tokens), "redirected": maps}


def share(hits):
    """The mean of hits (N,) bool; None where N is 0: what was not measured is not zero."""
    return hits.float().mean().item() if len(hits) else None


def share_becoming(wanted, model, world, queries, new):
    """The share of the answers to Queries that are `wanted` (N,) with the values `new` put in."""
    tokens, _ = to_tokens(queries, world, model.config.layout)
    return share(patch(model, tokens, new).argmax(-1) == torch.as_tensor(wanted))


def take_sites(values, sites):
    """{site: (N, D)}: the values at these sites; of codes, {site: (E, D)}."""
    return {(loop, part, position): values[part][loop, :, position]
            for loop, part, position in sites}


def values_at(model, world, queries, sites):
    """What the model holds at these sites while it answers Queries, {site: (N, D)}."""
    tokens, _ = to_tokens(queries, world, model.config.layout)
    return take_sites(values_of(model, tokens), sites)


def codes(model, tokens, bridges, n_entities):
    """Each entity's code: its mean value over the queries whose bridge it is, {part: (n_loops, E,
    T, D)}; 0 for an entity that is the bridge of none. Take Bea's code out of a value and put
    Dora's in: if what a site carries adds up, this moves the bridge and nothing else."""
    is_bridge = F.one_hot(bridges, n_entities).float()                  # (N, E)
    weights = is_bridge / is_bridge.sum(0).clamp(min=1)
    result = dict.fromkeys(PARTS, 0.0)
    for batch, weight in zip(tokens.split(BATCH), weights.split(BATCH)):
        for part, value in values_of(model, batch).items():
            result[part] = result[part] + torch.einsum("lntd,ne->letd", value, weight)
    return result


def noise(values):
    """Random values of the same norms: they break a run, and should redirect nothing."""
    random = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    return random * values.norm(dim=-1, keepdim=True) / random.norm(dim=-1, keepdim=True)


# ---------------------------------------------------------------- donors
def right_only(model, world, queries):
    """Those of the Queries that the model answers rightly."""
    tokens, answers = to_tokens(queries, world, model.config.layout)
    return queries.take((predict(model, tokens) == answers).numpy())


def tail(world, head, relation):
    """Tails of the facts (head, relation), -1 where there is none: tail(Bea, city) is Bern."""
    fact = world.index[head, relation]
    return np.where(fact >= 0, world.facts[fact, 2], -1)


def draw_donors(clean, pool, allowed, rng):
    """(rows of clean, rows of pool): to each clean query that has any a random donor, one of those
    for which allowed(query, pool) is True. For three queries, of which the second finds none:
    ([0, 2], [17, 4])."""
    clean_rows = []
    donor_rows = []
    for row in range(len(clean.h)):
        candidates = np.flatnonzero(allowed(clean.take(row), pool))
        if len(candidates):
            clean_rows.append(row)
            donor_rows.append(candidates[rng.integers(len(candidates))])
    return np.array(clean_rows, int), np.array(donor_rows, int)


def swap(clean, pool, rng):
    """Donors with the same r2 and another bridge: the city of Carl's boss for that of Ada's
    mother. The answer should become theirs. -> (clean, donors, predicted answers)"""
    def allowed(query, pool):
        return (pool.r2 == query.r2) & (pool.b != query.b) & (pool.t != query.t)

    rows, donor_rows = draw_donors(clean, pool, allowed, rng)
    donor = pool.take(donor_rows)
    return clean.take(rows), donor, donor.t


def same_bridge(clean, pool, rng):
    """Donors with the same bridge, reached otherwise, and another r2: the street of Gus's aunt, who
    is Bea, too. The answer becomes theirs where it is carried itself, or r2 beside the bridge;
    where Bea alone is carried nothing changes. -> (clean, donors, their answers)"""
    def allowed(query, pool):
        other_question = (pool.h != query.h) | (pool.r1 != query.r1)
        return (pool.b == query.b) & other_question & (pool.r2 != query.r2) & (pool.t != query.t)

    rows, donor_rows = draw_donors(clean, pool, allowed, rng)
    donor = pool.take(donor_rows)
    return clean.take(rows), donor, donor.t


def other_r2(world, clean, pool, rng):
    """Donors with another bridge and another r2: the street of Carl's boss. A site that carries
    Dora alone gives Dora's city, which is neither query's own answer; one that carries the answer
    gives the donor's. -> (clean, donors, predicted answers)"""
    def allowed(query, pool):
        t = tail(world, pool.b, query.r2)                               # (P,)
        is_a_third = (t >= 0) & (t != query.t) & (t != pool.t)
        return is_a_third & (pool.r2 != query.r2) & (pool.b != query.b) & (pool.t != query.t)

    rows, donor_rows = draw_donors(clean, pool, allowed, rng)
    clean = clean.take(rows)
    donor = pool.take(donor_rows)
    return clean, donor, tail(world, donor.b, clean.r2)


def mixed_donors(world, clean, pool, rng):
    """For a set of sites, two donors of one bridge: Dora is Carl's boss, and the aunt of Finn. If
    every site of the set holds the bridge, Carl's value at one and Finn's at the others still ask
    for Dora's city; if they hold pieces of the question, they no longer fit together.
    -> (clean, first donors, second donors, predicted answers)"""
    def allowed(first, pool):
        return (pool.b == first.b) & (pool.h != first.h) & (pool.r1 != first.r1)

    clean, first, predicted = other_r2(world, clean, pool, rng)
    rows, donor_rows = draw_donors(first, pool, allowed, rng)
    second = pool.take(donor_rows)
    differs = second.t != predicted[rows]  # one that carries its answer redirects nothing
    rows = rows[differs]
    return clean.take(rows), first.take(rows), second.take(differs), predicted[rows]


def donor_map(model, world, clean, donor, predicted):
    """`patch_map` of the clean Queries, with what the model holds for their donors put in."""
    tokens, _ = to_tokens(clean, world, model.config.layout)
    donor_tokens, _ = to_tokens(donor, world, model.config.layout)
    return patch_map(model, tokens, values_of(model, donor_tokens), predicted)


def swap_maps(model, world, clean, pool, code, rng):
    """The maps of three swaps for the Queries `clean`, {kind: patch_map}: the value of a donor from
    the pool with another r2, the code of that donor's bridge in place of our own bridge's, and the
    value of a donor with the same bridge."""
    queries, donor, predicted = other_r2(world, clean, pool, rng)
    maps = {"other_r2": donor_map(model, world, queries, donor, predicted)}
    tokens, _ = to_tokens(queries, world, model.config.layout)
    ours = values_of(model, tokens)
    in_code = {part: ours[part] + code[part][:, donor.b] - code[part][:, queries.b]
               for part in PARTS}
    maps["code"] = patch_map(model, tokens, in_code, predicted)
    maps["same_bridge"] = donor_map(model, world, *same_bridge(clean, pool, rng))
    return maps


# ---------------------------------------------------------------- the one site of the bridge
def bridge_site(model, world, pool, used, scoring, code):
    """Where is the bridge used? A swap decides: where donors of another r2 redirect most answers.
    `used` is their `patch_map` on queries of the `pool`; the site chosen there is scored on other
    queries, scoring = {split: Queries that are answered rightly}.

    {"where": "one site"; or "several passes", if no site redirects half of the answers and a set
              of sites does; else "spread"; None if nothing was swapped,
     "sites": [[loop, part, position], ...], the best there are; "name": "mixed, loop 3, r2",
     "n", "redirected": how many queries chose it, and the share of them redirected there,
     split: what `score_sites` says}
    """
    site = {"where": None, "sites": [], "name": "not measured (0 queries)", "n": used["n"],
            "redirected": None}
    if used["n"]:
        shares = shares_of_candidates(model, world, pool, used)
        sites = max(shares, key=shares.get)                             # the first of equals
        site["where"] = "one site" if len(sites) == 1 else "several passes"
        if shares[sites] < ENOUGH:
            site["where"] = "spread"
        site["sites"] = [list(one) for one in sites]
        site["name"] = name_sites(sites, model.loop_names)
        site["redirected"] = float(shares[sites])
    for split, queries in scoring.items():
        site[split] = score_sites(model, world, queries, site["sites"], code)
    return site


def shares_of_candidates(model, world, pool, used):
    """{sites: share redirected}: every site alone and, if none redirects half of the answers, sets
    of sites together. In the recursive model these are the same block, part and position in the
    last two passes, or in the last three, if there are so many: along the residual connection a
    bridge can arrive in instalments."""
    n_loops, T = used["redirected"]["state"].shape
    shares = {}
    for loop, part, position in product(range(n_loops), PARTS, range(T)):
        shares[((loop, part, position),)] = used["redirected"][part][loop, position]
    if max(shares.values()) >= ENOUGH or model.config.model != "recursive":
        return shares
    clean = pool.take(slice(used["n"]))
    clean, donor, predicted = other_r2(world, clean, pool, np.random.default_rng(0))
    theirs = values_of(model, to_tokens(donor, world, model.config.layout)[0])
    n_blocks = model.config.n_blocks
    for n_passes, block in product((2, 3), range(n_blocks)):
        if n_passes * n_blocks > n_loops:
            continue
        loops = range(n_loops - n_passes * n_blocks + block, n_loops, n_blocks)
        for part, position in product(PARTS, range(T)):
            sites = tuple((loop, part, position) for loop in loops)
            put = take_sites(theirs, sites)
            shares[sites] = share_becoming(predicted, model, world, clean, put)
    return shares


def score_sites(model, world, queries, sites, code, n=500):
    """What the values at the sites, all put in at once, do to the right answers of Queries:

    {"n": pairs of `other_r2`, of up to n queries, and the shares of these
       "donor", "code", "noise": redirected by the donor's value, by its bridge's code in place of
                                 our bridge's, by noise,
       "code_in_state": redirected by the code in the states just after, in the same loops: there a
                        bridge may stand beside r2, which a whole donor would bring along,
     "n_same_bridge", "same_bridge": kept with the value of a donor of the same bridge,
     "n_mixed_donors", "mixed_donors": redirected by values of two donors; of a set of sites alone,
     "n_others_swapped", "others_swapped": kept if after these loops all *other* positions hold the
                                           state of a donor with the same r2, another bridge}
    """
    rng = np.random.default_rng(0)
    tried = queries.take(slice(n if sites else 0))
    parted = tried if len(sites) > 1 else queries.take([])  # one site cannot be parted
    return {**score_other_r2(model, world, tried, queries, sites, code, rng),
            **score_same_bridge(model, world, tried, queries, sites, rng),
            **score_mixed_donors(model, world, parted, queries, sites, rng),
            **score_others_swapped(model, world, tried, queries, sites, rng)}


def score_other_r2(model, world, tried, pool, sites, code, rng):
    """The part of `score_sites` that rests on donors of another r2."""
    clean, donor, predicted = other_r2(world, tried, pool, rng)
    theirs = values_at(model, world, donor, sites)
    states = [(loop, "state", position) for loop, _, position in sites]
    random = {site: noise(value) for site, value in theirs.items()}
    result = {"n": len(clean.h)}
    for name, put in (("donor", theirs),
                      ("code", exchange_codes(model, world, clean, donor, sites, code)),
                      ("code_in_state", exchange_codes(model, world, clean, donor, states, code)),
                      ("noise", random)):
        result[name] = share_becoming(predicted, model, world, clean, put)
    return result


def score_same_bridge(model, world, tried, pool, sites, rng):
    """The part of `score_sites` that rests on donors of the same bridge."""
    clean, donor, _ = same_bridge(tried, pool, rng)
    put = values_at(model, world, donor, sites)
    return {"n_same_bridge": len(clean.h),
            "same_bridge": share_becoming(clean.t, model, world, clean, put)}


def score_mixed_donors(model, world, tried, pool, sites, rng):
    """The part of `score_sites` in which the first site gets one donor's value, the others get
    another's."""
    clean, first, second, predicted = mixed_donors(world, tried, pool, rng)
    put = values_at(model, world, first, sites[:1])
    put.update(values_at(model, world, second, sites[1:]))
    return {"n_mixed_donors": len(clean.h),
            "mixed_donors": share_becoming(predicted, model, world, clean, put)}


def score_others_swapped(model, world, tried, pool, sites, rng):
    """The part of `score_sites` in which all but the sites is swapped."""
    clean, donor, _ = swap(tried, pool, rng)
    put = values_at(model, world, donor, other_positions(sites, n_positions(model)))
    return {"n_others_swapped": len(clean.h),
            "others_swapped": share_becoming(clean.t, model, world, clean, put)}


def n_positions(model):
    """T, scratch slots included."""
    return LENGTH[model.config.layout] + model.config.slots


def exchange_codes(model, world, clean, donor, sites, code):
    """{site: (N, D)}: the clean queries' own values with the code of their bridge taken out, and
    that of the donor's bridge put in."""
    exchanged = {}
    for site, own in values_at(model, world, clean, sites).items():
        entity_codes = take_sites(code, [site])[site]                           # (E, D)
        exchanged[site] = own + entity_codes[donor.b] - entity_codes[clean.b]
    return exchanged


def other_positions(sites, T):
    """The states at all other positions after the loops of the sites: of (loop, "mixed", 2) with
    T = 4 those at positions 0, 1 and 3."""
    taken = {(loop, position) for loop, _, position in sites}
    loops = sorted({loop for loop, _, _ in sites})
    return [(loop, "state", position) for loop, position in product(loops, range(T))
            if (loop, position) not in taken]


def name_positions(T):
    """Names of T positions: the tokens, then scratch slots."""
    slots = [f"slot {number + 1}" for number in range(T - len(POSITIONS))]
    return [*POSITIONS, *slots][:T]


def name_sites(sites, loop_names):
    """"mixed, loop 3, r2"; of a set the loops are joined by "and"."""
    _, part, position = sites[0]
    loops = " and ".join(loop_names[loop] for loop, _, _ in sites)
    return f"{part}, {loops}, {name_positions(position + 1)[-1]}"


# ---------------------------------------------------------------- aim and store
def aim_and_store(model, world, queries, sites, code, known, n=500):
    """Which of the two hops fails? The whole value at the sites is replaced by an entity's code, in
    up to n Queries that come in random order, answered rightly or not. Of Ada's mother's city:

    {"n", and the shares of right answers
       "as_is"        with nothing replaced
       "own_code"     with Bea's code: what hop 2 can do at best, the *store* of hop 2
       "snapped"      with the code nearest to the value (Euclidean), whosever it is
       "random_code"  with the code of a random entity
       "mean"         with the mean of all codes,
     "nearest_right"  the share in which the nearest code is Bea's: the *aim* of hop 1}
    `known` (K,) are the entities that have a code, which was fitted on other ID queries; queries
    with another bridge are left out. Over a set of sites the squared distances are added.
    """
    n_tried = n if sites else 0
    queries = queries.take(np.isin(queries.b, known)).take(slice(n_tried))
    tokens, answers = to_tokens(queries, world, model.config.layout)
    code_at = take_sites(code, sites)                                           # {site: (E, D)}
    distance = torch.zeros(len(tokens), len(known))                     # (N, K)
    for site, value in values_at(model, world, queries, sites).items():
        distance += torch.cdist(value, code_at[site][known]).square()
    nearest = known[distance.argmin(1).numpy()]
    random = np.random.default_rng(0).choice(known, len(tokens))
    result = {"n": len(tokens), "as_is": share(predict(model, tokens) == answers)}
    for name, entities in (("own_code", queries.b), ("snapped", nearest), ("random_code", random)):
        put = {site: entity_codes[entities] for site, entity_codes in code_at.items()}
        result[name] = share_becoming(answers, model, world, queries, put)
    mean = {site: entity_codes[known].mean(0) for site, entity_codes in code_at.items()}
    result["mean"] = share_becoming(answers, model, world, queries, mean)
    result["nearest_right"] = share(torch.from_numpy(nearest == queries.b))
    return result


# ---------------------------------------------------------------- inference paths of a run
def inference_path(model, world, splits, n=500, most=2000):
    """What paths.json holds of one stage of a run, "fit" or "end", its numbers to four digits:

    {"site": see `bridge_site`; chosen on ID queries, scored on others, "test_id" and "test_ood",
     "test_id", "test_ood": {"seen": see `seen`, "present": see `present`,
                             "used": {"other_r2", "same_bridge", "code": see `patch_map`}},
     "aim": {"test_id", "test_ood", "test_id_ood", "test_ood_id": see `aim_and_store`}}
    One half of the ID queries, up to `most` or 20 an entity, fits probe and codes; all else is
    measured on the other half: lens, probe and aim on n queries, the swaps at the site on up to n
    right ones, the maps of swaps on 50 to 300.
    """
    rng = np.random.default_rng(0)
    pools = {split: splits[split].shuffled(rng) for split in COMPOSITIONS}
    half = len(pools["test_id"].h) // 2
    fitted = pools["test_id"].take(slice(half, half + max(most, 20 * world.n_entities)))
    pools["test_id"] = pools["test_id"].take(slice(half))
    probe, code, known = fit_on(model, world, fitted)
    right = {split: right_only(model, world, pools[split].take(slice(most))) for split in EXAMINED}
    # one half of the right ID queries draws the maps and chooses the site, the other scores it
    choosing = {**right, "test_id": right["test_id"].take(slice(0, None, 2))}
    scoring = {**right, "test_id": right["test_id"].take(slice(1, None, 2))}
    # each query of a map is run once a site: 300 for the 32 sites of `small`, 100 for 224 of `trm`
    n_loops, _, T, _ = code["state"].shape
    n_sites = n_loops * len(PARTS) * T
    n_maps = min(300, max(50, 22400 // n_sites))
    result = {}
    for split in EXAMINED:
        queries = pools[split].take(slice(n))
        clean = choosing[split].take(slice(n_maps))
        result[split] = {"seen": seen(model, world, queries),
                         "present": present(model, world, queries, probe),
                         "used": swap_maps(model, world, clean, choosing[split], code, rng)}
    used = result["test_id"]["used"]["other_r2"]
    result["site"] = bridge_site(model, world, choosing["test_id"], used, scoring, code)
    sites = result["site"]["sites"]
    result["aim"] = {split: aim_and_store(model, world, queries, sites, code, known, n)
                     for split, queries in pools.items()}
    return plain(result)


def fit_on(model, world, queries):
    """(probe, code, known): what is fitted on the bridges of Queries, and which these are (K,)."""
    tokens, _ = to_tokens(queries, world, model.config.layout)
    bridges = torch.from_numpy(queries.b)
    probe = fit_probe(model, tokens, F.one_hot(bridges, world.n_entities).float())
    code = codes(model, tokens, bridges, world.n_entities)
    return probe, code, np.unique(queries.b)


def plain(value):
    """Nested dicts and lists for JSON: arrays become lists, numbers keep four digits."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def report(measured, split):
    """What `inference_path` measured in one split at one stage, a sentence a finding."""
    lens = measured[split]["seen"]
    probe = measured[split]["present"]
    probe_rates = [probe[part]["best"] for part in PARTS if probe[part]["best"] is not None]
    return [f"The lens sees the bridge in {short(lens['paper']['any'])} of the {EXAMINED[split]} "
            f"queries (chance {short(lens['paper']['any_chance'])}, n = {lens['n']}).",
            f"A probe reads it in {short(max(probe_rates, default=None))}.",
            tell_swap(measured["site"], split), tell_aim(measured["aim"][split])]


def tell_swap(site, split):
    """What a swap does at the site of the bridge, in a sentence."""
    swaps = site[split]
    if swaps["n"] == 0:
        return "No swap was measured (0 queries)."
    swapping = "Swapping the value at its site"
    if site["where"] == "spread":
        swapping = "No one place holds the bridge; swapping the value at the best one"
    return (f"{swapping} ({site['name']}) for a donor's redirects {short(swaps['donor'])} "
            f"(n = {swaps['n']}); swapping all else there keeps {short(swaps['others_swapped'])}.")


def tell_aim(aim):
    """Aim and store at that site, in two sentences."""
    if aim["n"] == 0:
        return "Aim and store were not measured (0 queries)."
    return (f"There, hop 1 aims right in {short(aim['nearest_right'])}: the nearest code is the "
            f"bridge's. Hop 2 answers {short(aim['own_code'])} from the right code, "
            f"{short(aim['snapped'])} from the nearest, {short(aim['as_is'])} from the value as it "
            f"is (n = {aim['n']}).")


def short(share):
    """.14 for 0.137; words for what was not measured."""
    return "(not measured)" if share is None else f"{share:.2f}".removeprefix("0")


# ---------------------------------------------------------------- figures of one run
COLUMNS = {"bridge": "seen: the bridge is top-1",
           "entity": "seen among the entities",
           "present": "present: a probe reads it",
           "other_r2": "used: a donor redirects",
           "code": "used: its code redirects",
           "same_bridge": "more than the bridge:\na same-bridge donor redirects"}


def plot_maps(paths, part, loop_names):
    """What is seen, present and used at each site of one part, a row a stage and split; the site of
    the bridge is framed."""
    rows = list(product(paths, EXAMINED))
    height = max(1.7, 0.16 * len(loop_names))
    figure = Figure((13.2, height * len(rows) + 0.8), layout="constrained")
    grid = figure.subplots(len(rows), len(COLUMNS), squeeze=False)
    for (stage, split), row_of_axes in zip(rows, grid):
        for (kind, title), axes in zip(COLUMNS.items(), row_of_axes):
            n, values = map_of(paths[stage][split], part, kind)
            if n == 0:
                axes.set_title(f"{title}\nnot measured (0 queries)", fontsize=8)
                axes.set_axis_off()
                continue
            axes.set_title(f"{title}\nn = {n}", fontsize=8)
            draw_map(axes, values, loop_names if kind == "bridge" else None)
            for loop, site_part, position in paths[stage]["site"]["sites"]:
                if site_part == part:
                    corner = (position - 0.5, loop - 0.5)
                    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="C1", lw=2))
        row_of_axes[0].set_ylabel(f"{EXAMINED[split]}, at the {stage}", fontsize=9)
    figure.suptitle(message(paths, part), fontsize=10)
    return figure


def map_of(measured, part, kind):
    """(n, map) of a split of paths.json for one of the COLUMNS; the map is None without queries."""
    if kind == "present":
        return measured["present"]["n"], measured["present"][part]["map"]
    if kind in measured["seen"][part]:
        return measured["seen"]["n"], measured["seen"][part][kind]["map"]
    swaps = measured["used"][kind]
    return swaps["n"], swaps["redirected"][part] if swaps["n"] else None


def draw_map(axes, values, loop_names=None):
    """A map (n_loops, T) in shades, with numbers where there are few loops; the loops are named
    only if names are given."""
    values = np.asarray(values)
    n_loops, T = values.shape
    axes.imshow(values, vmin=0, vmax=1, cmap="Blues", aspect="auto", origin="lower")
    if n_loops <= 6:
        for (loop, position), value in np.ndenumerate(values):
            axes.text(position, loop, short(value), ha="center", va="center", fontsize=8,
                      color="white" if value > 0.6 else "black")
    axes.set_xticks(range(T), name_positions(T), fontsize=8, rotation=90 if T > 4 else 0)
    axes.set_yticks(range(n_loops), loop_names or [""] * n_loops, fontsize=7)


def message(paths, part):
    """The title over the maps of one part: what the last stage says of the OOD queries."""
    stage = list(paths)[-1]
    measured = paths[stage]["test_ood"]
    what = {"mixed": "What is mixed before the MLP", "state": "The state after the MLP"}[part]
    shown = short(np.max(measured["seen"][part]["bridge"]["map"]))
    said = f"{what}, at the {stage}: the lens sees at most {shown} of the OOD bridges at one site"
    used = measured["used"]["other_r2"]
    if used["n"] == 0:
        return f"{said}; no swap was measured, for none is answered rightly"
    redirected = short(np.max(used["redirected"][part]))
    return f"{said}; a donor's value redirects up to {redirected} of the answers"


# ---------------------------------------------------------------- the command line
SHIPPED = Path(__file__).resolve().parent / "runs" / "shipped"


@command("analyze.py")
def main(argv=None):
    """Look into runs; exit status 0, 2 if one of them cannot be looked into, 130 when stopped."""
    status = 0
    for output, folder in outputs_and_runs(argv).items():
        try:
            analyze_run(folder, output)
        except (BadInput, OSError) as error:  # says so, and goes on to the next
            print(f"analyze.py: {error}", file=sys.stderr)
            status = 2
    return status


def outputs_and_runs(argv):
    """{folder to write into: run folder} that the command line asks for."""
    parser = Parser(prog="analyze.py", description="Where is the bridge seen, present, used?")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders of runs")
    parser.add_argument("-o", "--out", type=Path, metavar="FOLDER",
                        help="write there (else into the runs; of shipped ones, runs/looked_into)")
    args = parser.parse_args(argv)
    folders = []
    for root in args.runs:
        folders.extend(sorted(path.parent for path in root.rglob("config.json")) or [root])
    outputs = {}
    for folder in folders:
        output = folder
        if args.out:
            output = args.out / below_all(folder, folders)
        elif SHIPPED in folder.resolve().parents:  # the shipped files stay as they are
            output = SHIPPED.parent / "looked_into" / folder.resolve().relative_to(SHIPPED)
        outputs[output] = folder
    return outputs


def below_all(folder, folders):
    """The path of one of the folders from the place where their ways part: of one alone "."."""
    try:
        above = os.path.commonpath([one.resolve() for one in folders])
    except ValueError:
        raise BadInput("out: runs on two drives have no place in common; name them one at a time")
    return folder.resolve().relative_to(above)


def analyze_run(folder, output):
    """Look into one run: paths.json, mixed.png and state.png into the output folder, and a sentence
    a finding."""
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder}: holds no run")
    config, _ = read_run(folder)
    stages = [stage for stage in WEIGHTS if (folder / f"{stage}.pt").exists()]
    if not stages:
        raise BadInput(f"{folder}: holds no weights")
    loaded = {stage: load_run(folder, stage) for stage in stages}
    model, world, splits = loaded[stages[0]]
    for split, kind in EXAMINED.items():
        n = len(splits[split].h) if split in splits else 0
        if n < 4:
            raise BadInput(f"{folder}: has {n} {kind} test compositions; 4 are needed")
    check_writable(output)
    say(f"\n{folder.as_posix()}: {config.preset}, {regime_name(config)}, seed {config.seed}")
    paths = {}
    for stage, (model, world, splits) in loaded.items():
        paths[stage] = inference_path(model, world, splits)
        for split, kind in EXAMINED.items():
            say(f"\nAt the {stage}, {kind}:")
            for sentence in report(paths[stage], split):
                say(f"  {sentence}")
    write_file(output / "paths.json", json.dumps(paths).encode())
    for part in PARTS:
        plot_maps(paths, part, model.loop_names).savefig(output / f"{part}.png", dpi=130)
    say(f"\nThe maps are in {shlex.quote(output.as_posix())}: mixed.png, state.png, paths.json.")


def check_writable(folder):
    """Refuse, before anything is computed, a folder that cannot be written into."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"{folder}: cannot be written ({error.strerror}); choose another -o FOLDER")


if __name__ == "__main__":
    sys.exit(main())
