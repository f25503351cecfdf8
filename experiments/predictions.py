"""What became of the predictions, which PREDICTIONS.md held before the runs: a number and a level
each. Where no level stands there ("at chance", "does not mend"), we chose it here, afterwards.
"""
from itertools import product

from experiments.verdicts import FAILS, HOLDS, OPEN, SHARES, Missing


def grid(book, measure):
    """{(hop1, hop2): mean} over the map; Missing unless every cell was measured."""
    return {(hop1, hop2): book.need(f"map {hop1:g} {hop2:g} {measure}").mean
            for hop1, hop2 in product(SHARES, SHARES)}


def moves(values, along):
    """How far {(hop1, hop2): value} moves at most along hop 1 (0) or hop 2 (1)."""
    ranges = []
    for fixed in SHARES:
        line = [value for place, value in values.items() if place[1 - along] == fixed]
        ranges.append(max(line) - min(line))
    return max(ranges)


def predict_aim(book):
    """How far the aim moves, at most, along hop 2's share."""
    return moves(grid(book, "aim"), along=1), "share"


def predict_store(book):
    """How far the store moves, at most, along hop 1's share."""
    return moves(grid(book, "store"), along=0), "share"


def predict_product(book):
    """By how much the answer exceeds the product of aim and store, at most, where both are low."""
    excess = []
    for hop1, hop2 in product((0, 0.25), (0, 0.25)):
        aim, store, answer = [book.need(f"map {hop1:g} {hop2:g} {measure}").mean
                              for measure in ("aim", "store", "answer")]
        excess.append(answer - aim * store)
    return max(excess), "share"


def predict_nine(book):
    """How many cells answer .9 with neither both shares at .75 nor hop 2 at 1."""
    against = [place for place, answer in grid(book, "answer").items()
               if answer >= 0.9 and min(place) < 0.75 and place[1] < 1]
    return len(against), "count"


def predict_skill(book):
    """By how much half exposed, k = 4, is ahead of none exposed: the smaller of both hops."""
    gains = []
    for split in ("new_old", "old_new"):
        half = book.need(f"new_facts exposed/natural_end_0.5_4 end {split}").mean
        none = book.need(f"new_facts tune/long_natural_end 2000 {split}").mean
        gains.append(half - none)
    return min(gains), "share"


def predict_mend(book):
    """In new + old the right code must give .9, and the nearest .05 at most: what is to spare."""
    where = "new_facts_aim exposed/natural_end_0.5_4 new_old"
    as_is, snapped, own_code = [book.need(f"{where} {measure}").mean
                                for measure in ("as_is", "snapped", "own_code")]
    return min(own_code - 0.9, as_is + 0.05 - snapped), "share"


def predict_quarter(book):
    """How far a quarter exposed lies inside the range from none to half: the least, both hops."""
    inside = []
    for split in ("new_old", "old_new"):
        none = book.need(f"new_facts tune/long_natural_end 2000 {split}").mean
        quarter = book.need(f"new_facts exposed/natural_end_0.25_4 end {split}").mean
        half = book.need(f"new_facts exposed/natural_end_0.5_4 end {split}").mean
        inside.append(min(quarter - none, half - quarter))
    return min(inside), "share"


def predict_trm_unseen(book):
    """How far the lens is above its chance level, at most."""
    seen = book.need("seen trm/both_full end test_ood paper")
    return seen.most - seen.chance, "share"


def exposure_gains(book, group):
    """How far a group with exposed facts is ahead of none exposed, {split: difference}."""
    gains = {}
    for split in ("new_old", "old_new"):
        none = book.need(f"new_facts tune/long_natural_end 2000 {split}").mean
        gains[split] = book.need(f"new_facts {group} 2000 {split}").mean - none
    return gains


def predict_once(book):
    """Exposed in one composition a hop: each hop gains less than with four, and one gains .1. What
    is to spare, at least."""
    once = exposure_gains(book, "exposed/natural_end_0.5_1")
    four = exposure_gains(book, "exposed/natural_end_0.5_4")
    less = [four[split] - once[split] for split in once]
    return min(*less, max(once.values()) - 0.1), "share"


def predict_from_fit(book):
    """Exposed from the fit: better as hop 1 than from the end, and worse as hop 2. By how much, at
    least."""
    fit = exposure_gains(book, "exposed/natural_fit_0.5_4")
    end = exposure_gains(book, "exposed/natural_end_0.5_4")
    return min(fit["new_old"] - end["new_old"], end["old_new"] - fit["old_new"]), "share"


def predict_from_nothing(book):
    """Exposed, from nothing: half as hop 1, less than half as hop 2, .2 chained. What is to spare,
    at least."""
    first, second, both = [book.need(f"new_facts exposed/scratch_0.5_4 end {split}").mean
                           for split in ("new_old", "old_new", "new_new")]
    return min(first - 0.5, 0.5 - second, 0.2 - both), "share"


def predict_trm_where(book):
    """At how many different sites the bridge is, over the seeds."""
    sites = {row["site"] for row in book.rows if row["run"].startswith("trm/both_full/")}
    if not sites:
        raise Missing("trm/both_full")
    return len(sites), "count"


def predict_trm_waits(book):
    """How far second_full and natural are below .5 and .1 at step 5,000: the smaller of both."""
    below = []
    for regime, level in (("second_full", 0.5), ("natural", 0.1)):
        fit = book.need(f"training trm/{regime} fit")
        answer = book.need(f"training trm/{regime} test_ood_at_5000")
        in_time = not fit.without and fit.most <= 2500
        below.append(level - answer.most if in_time else -1)
    return min(below), "share"


def predict_trm_long(book):
    """Hop 2 supervised, 12,000 steps: half answered, .8 of these redirected, and the lens sees less
    than half. What is to spare, at least."""
    where = "long/trm_second_full end test_ood"
    answer = book.need(f"aim_and_store {where} as_is").mean
    donor = book.need(f"swaps {where} donor").mean
    seen = book.need(f"seen {where} paper").mean
    return min(answer - 0.5, donor - 0.8, 0.5 - seen), "share"


def predict_trm_first(book):
    """Hop 1 supervised: the aim is .8 or more, the store below half. What is to spare, at least."""
    where = "aim_and_store trm/first_full end test_ood"
    aim = book.need(f"{where} nearest_right").mean
    store = book.need(f"{where} own_code").mean
    return min(aim - 0.8, 0.5 - store), "share"


def predict_trm_visible(book):
    """Both hops supervised, 15,000 steps: how far the lens is beyond .5 and a swap beyond .8."""
    where = "long/trm_both_full end test_ood"
    seen = book.need(f"seen {where} paper").mean
    donor = book.need(f"swaps {where} donor").mean
    return min(seen - 0.5, donor - 0.8), "share"


def predict_trm_long_used(book):
    """15,000 steps: whether all are fitted, and how far an exchange of codes is beyond .8."""
    fit = book.need("training long/trm_both_full fit")
    code = book.need("swaps long/trm_both_full end test_ood code")
    return -1 if fit.without else code.least - 0.8, "share"


def predict_trm_decay(book):
    """How far the worst seed's training is beyond .99, and its exchange of codes beyond .8."""
    train = book.need("training dial/trm_decay_both_full train_inferred")
    code = book.need("swaps dial/trm_decay_both_full end test_ood code")
    return min(train.least - 0.99, code.least - 0.8), "share"


SEARCHED = ("lr_0.0015", "lr_0.006", "weight_decay_0.1", "weight_decay_1", "facts_0.4",
            "decay_0.4")


def predict_trm_search(book):
    """What natural training answers at step 3,000 with the best of the settings that were tried."""
    answers = []
    for name in SEARCHED:
        try:
            answers.append(book.need(f"training search/trm_{name} test_ood").mean)
        except Missing:  # was not tried
            continue
    if not answers:
        raise Missing("search/trm_*")
    return max(answers), "share"


def predict_graft(book):
    """How many of the grafted runs have not the form of the seed that mixes their positions."""
    against = 0
    for pairs in ("parted", "alike"):
        n_pairs = book.need(f"graft small/both_full {pairs}").values[0]
        against += n_pairs - book.need(f"graft small/both_full {pairs}_follow").values[0]
    return against, "count"


def predict_ordinary(book):
    """Aim and store of an ordinary transformer with one loss: the larger of the two means."""
    where = "aim_and_store tiny/own_blocks_last_loop end test_ood"
    return max(book.need(f"{where} {measure}").mean
               for measure in ("nearest_right", "own_code")), "share"


def predict_worlds(book, measure):
    """How far the two other worlds are from the first one's mean, at most, at the end."""
    path = f"end test_ood {measure}"
    mean = book.need(f"aim_and_store small/natural {path}").mean
    away = []
    for world in ("natural_data1", "natural_data2"):
        cell = book.need(f"aim_and_store worlds/{world} {path}")
        away.extend(abs(value - mean) for value in cell.have)
    return max(away), "share"


def predict_worlds_aim(book):
    return predict_worlds(book, "nearest_right")


def predict_worlds_store(book):
    return predict_worlds(book, "own_code")


def predict_worlds_used(book):
    """What a swap redirects in the worse of the two other worlds."""
    return min(book.need(f"swaps worlds/{world} end test_ood donor").least
               for world in ("natural_data1", "natural_data2")), "share"


PHIS = (3, 6, 9, 12, 18)
OOD_SHARES = ("0.06", "0.125", "0.25")


def classes_of(book, phi, ood):
    """What each run of a square of the map of plain data has learnt, in words (book.class_of)."""
    group = f"data/phi_{phi}_ood_{ood}"
    if (phi, ood) == (18, "0.125"):  # the default of all other runs
        group = "map/hop1_0_hop2_0"
    classes = [row["class"] for row in book.rows if row["run"].startswith(f"{group}/")]
    if not classes:
        raise Missing(group)
    return classes


def are_all(classes, expected):
    """Whether every run of a square is of a class that begins so."""
    return all(word.startswith(expected) for word in classes)


def cells_against(book, phis, expected):
    """How many squares of the map of plain data, with these phi, are not of an expected class."""
    against = 0
    for phi, ood in product(phis, OOD_SHARES):
        against += not are_all(classes_of(book, phi, ood), expected)
    return against, "count"


def predict_data_few(book):
    return cells_against(book, (3,), "memorises")


def predict_data_many(book):
    return cells_against(book, (9, 12, 18), "a circuit")


def predict_data_all(book):
    """How many cells have a circuit for all facts with phi below 12, or more than .06 OOD facts."""
    against = 0
    for phi, ood in product(PHIS, OOD_SHARES):
        is_for_all = "a circuit for all facts" in classes_of(book, phi, ood)
        against += is_for_all and (phi < 12 or ood != "0.06")
    return against, "count"


HELD_OUT = ((6, "0.06"), (6, "0.25"), (9, "0.125"), (12, "0.125"))  # cells that test the rule


def predict_data_rule(book):
    """How many of the cells held out a threshold on phi gets wrong, which was fitted on the others:
    halfway between the largest phi that memorises and the smallest with a circuit."""
    classes = {place: classes_of(book, *place) for place in product(PHIS, OOD_SHARES)}
    memorise = []
    circuit = []
    for phi, ood in classes.keys() - set(HELD_OUT):
        if are_all(classes[phi, ood], "memorises"):
            memorise.append(phi)
        if are_all(classes[phi, ood], "a circuit"):
            circuit.append(phi)
    if not memorise or not circuit:
        raise Missing("a border of the map of plain data")
    border = (max(memorise) + min(circuit)) / 2
    wrong = 0
    for phi, ood in HELD_OUT:
        expected = "a circuit" if phi > border else "memorises"
        wrong += not are_all(classes[phi, ood], expected)
    return wrong, "count"


PREDICTIONS = {  # name: (the number that decides, or where it stands; rule, level, what was said)
    "map_aim": (predict_aim, "at most", 0.15,
        "along hop 2's share the aim moves by .15 at most"),
    "map_store": (predict_store, "at most", 0.15,
        "along hop 1's share the store moves by .15 at most"),
    "map_product": (predict_product, "at most", 0,
        "where both shares are low the answer lies below aim times store (what it exceeds it "
        "by)"),
    "map_nine": (predict_nine, "at most", 0,
        "nine in ten need both shares at .75, or hop 2 at 1 (squares that do with less)"),
    "exposed_skill": (predict_skill, "at least", 0.1,
        "half exposed, the others gain .1 or more in either hop"),
    "exposed_both": ("new_facts exposed/natural_end_0.5_4 end new_new mean", "at most", 0.2,
        "two unexposed facts are chained in less than .2"),
    "exposed_mend": (predict_mend, "at least", 0,
        "in new + old the right code mends, the nearest does not (to spare)"),
    "exposed_quarter": (predict_quarter, "at least", 0,
        "a quarter exposed lies between none and half (to spare)"),
    "exposed_once": (predict_once, "at least", 0,
        "half exposed in one composition a hop: less gain than with four, .1 in one hop (to "
        "spare)"),
    "exposed_fit": (predict_from_fit, "at least", 0,
        "half exposed, from the fit: better as hop 1 than from the end, worse as hop 2 (by)"),
    "exposed_scratch": (predict_from_nothing, "at least", 0,
        "half exposed, from nothing: half as hop 1, less as hop 2, .2 chained (to spare)"),
    "trm_answer": ("training trm/both_full test_ood least", "at least", 0.95,
        "trm, both hops supervised: .95 answered in every seed (the worst)"),
    "trm_unseen": (predict_trm_unseen, "at most", 0.05,
        "trm, both hops supervised: the lens is at chance, within .05 (above it)"),
    "trm_used": ("swaps trm/both_full end test_ood donor least", "at least", 0.8,
        "trm, both hops supervised: a swap redirects .8 in every seed (the worst)"),
    "trm_where": (predict_trm_where, "at least", 2,
        "trm, both hops supervised: the site differs between seeds (sites)"),
    "trm_waits": (predict_trm_waits, "at least", 0,
        "trm, step 5,000: hop 2 supervised is below .5, natural below .1 (to spare)"),
    "trm_long": (predict_trm_long, "at least", 0,
        "trm, hop 2 supervised, 12,000 steps: half answered, a swap redirects .8, seen in less "
        "than half (to spare)"),
    "trm_long_natural": ("training long/trm_natural test_ood mean", "at most", 0.5,
        "trm, natural, 12,000 steps: less than half answered"),
    "trm_first": (predict_trm_first, "at least", 0,
        "trm, hop 1 supervised: aim .8 or more, store below half (to spare)"),
    "shallow_answer": ("training dial/trm_shallow_second_full test_ood mean", "at least", 0.3,
        "trm with four loops, hop 2 supervised: .3 answered at step 3,000 (mean)"),
    "one_block_answer": ("training dial/trm_one_block_second_full test_ood mean", "at most", 0.3,
        "trm with one block, hop 2 supervised: less than .3 answered (mean)"),
    "like_small": ("training dial/trm_like_small_second_full test_ood mean", "at most", 0.5,
        "trm with one block and four loops, hop 2 supervised: less than half answered (mean)"),
    "two_blocks": ("training dial/two_blocks test_ood mean", "at most", 0.5,
        "small with two blocks in turn, hop 2 supervised: less than half answered (mean)"),
    "fast_answer": ("training dial/trm_lr_0.006_second_full test_ood mean", "at least", 0.2,
        "trm with twice the step size, hop 2 supervised: .2 answered by step 3,000"),
    "shallow_used": ("swaps dial/trm_shallow_both_full end test_ood donor least", "at least", 0.8,
        "trm with four loops, both hops supervised: a swap redirects .8 in every seed (the "
        "worst)"),
    "trm_long_used": (predict_trm_long_used, "at least", 0,
        "trm, both hops supervised, 15,000 steps: seeds 1 and 2 are fitted, and codes redirect .8 "
        "in every seed (to spare)"),
    "trm_decay": (predict_trm_decay, "at least", 0,
        "trm, both hops supervised, with a step size that falls: .99 of the training right in "
        "every seed, and codes redirect .8 (to spare)"),
    "trm_visible": (predict_trm_visible, "at least", 0,
        "trm, both hops supervised, 15,000 steps: the lens sees half, a swap redirects .8 (to "
        "spare)"),
    "trm_search": (predict_trm_search, "at most", 0.2,
        "trm, natural: no other setting brings .2 by step 3,000 (the best)"),
    "graft": (predict_graft, "at most", 0,
        "the form follows the grafted weights (runs against)"),
    "ordinary_lacks": (predict_ordinary, "at most", 0.3,
        "an ordinary transformer lacks both hops: aim and store below .3 (the larger)"),
    "ordinary_second": ("training tiny/own_blocks_second_full test_ood mean", "at most", 0.2,
        "an ordinary transformer, hop 2 supervised: less than .2 answered (mean)"),
    "ordinary_both": ("training tiny/own_blocks_both_full test_ood mean", "at least", 0.9,
        "an ordinary transformer, both hops supervised: .9 answered (mean)"),
    "worlds_aim": (predict_worlds_aim, "at most", 0.15,
        "two other worlds: the aim is within .15 of the first world's (away)"),
    "worlds_store": (predict_worlds_store, "at most", 0.15,
        "two other worlds: the store is within .15 of the first world's (away)"),
    "worlds_used": (predict_worlds_used, "at least", 0.8,
        "two other worlds: a swap redirects .8 (the worse)"),
    "data_few": (predict_data_few, "at most", 0,
        "phi 3 memorises (squares against)"),
    "data_many": (predict_data_many, "at most", 0,
        "from phi 9 on there is a circuit for ID facts (squares against)"),
    "data_all": (predict_data_all, "at most", 0,
        "a circuit for all only from phi 12 on, with .06 OOD facts (squares against)"),
    "data_rule": (predict_data_rule, "at most", 0,
        "a border in phi, fitted on eleven squares, is right in four others (wrong)"),
    "data_long": ("training long/phi_6 test_id mean", "at most", 0.5,
        "phi 6 answers less than half of the unseen ID questions after 12,000 steps (mean)"),
}


def predict_all(book):
    """({prediction: (number, kind)}, {prediction: verdict})."""
    numbers = {}
    verdicts = {}
    for name, (source, rule, level, _) in PREDICTIONS.items():
        try:
            numbers[name] = look_up(book, source) if isinstance(source, str) else source(book)
        except Missing:
            verdicts[name] = OPEN
            continue
        number = numbers[name][0]
        came_true = number <= level if rule == "at most" else number >= level
        verdicts[name] = HOLDS if came_true else FAILS
    return numbers, verdicts


def look_up(book, words):
    """(number, kind) at "TABLE KEY ... FIELD"."""
    where, _, name = words.rpartition(" ")
    cell = book.need(where)
    return getattr(cell, name), cell.kind
