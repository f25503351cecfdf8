"""The verdicts of the results page, a small function each, and what became of the predictions.

A verdict is computed from the numbers of a Book (experiments/tables.py), once for `small` and once
for `trm`, by the rule in JUDGES, which verdicts.csv repeats:

    holds    as the paper says        partly   with another instrument, threshold or ceiling
    differs  not so                   open     a run or a measurement is missing, or decides nothing

A prediction is a number and a level. Both were written down in PREDICTIONS.md before the runs;
where no level stands there ("at chance", "does not mend"), we chose it here, afterwards.
"""
from itertools import product

HOLDS = "holds"
PARTLY = "partly"
DIFFERS = "differs"
OPEN = "open"
FAILS = "fails"  # a prediction
WORDS = (HOLDS, PARTLY, DIFFERS, OPEN, FAILS)

TOO_FEW = 20     # queries a run; a swap on fewer decides nothing
SHARES = (0, 0.25, 0.5, 0.75, 1)  # of OOD facts supervised, in the map
LONGEST = {"small": "long/natural", "trm": "trm/natural"}              # natural training
SECOND = {"small": "small/second_full", "trm": "long/trm_second_full"}  # hop 2 supervised
EARLY = {"small": "tune/small_natural_end", "trm": "tune/trm_natural"}  # new facts, 500 steps
LATE = {"small": "tune/long_natural_end", "trm": "tune/trm_long_natural"}  # 6,000 steps


class Missing(Exception):
    """A verdict needs a number that is not there."""


def judge_sooner(book, preset):
    """Both hops supervised: nine answers in ten, before natural training has them."""
    both = book.need(f"training {preset}/both_full answer_.9")
    natural = book.need(f"training {LONGEST[preset]} answer_.9")
    if not both.have:
        return DIFFERS
    later = [step is None or step > both.most for step in natural.values]
    if not all(later):
        return DIFFERS
    return PARTLY if both.without else HOLDS


def judge_stages(book, preset):
    """Natural: the training is fitted, then the bridge is there in half, then half is answered."""
    by_lens = [book.need(f"training {LONGEST[preset]} {name}")
               for name in ("fit", "lens_.5", "answer_.5")]
    if in_order(*by_lens):
        return HOLDS
    by_code = [book.need(f"film {preset}/natural {name}")
               for name in ("fit", "aim_.5", "answer_.5")]
    return PARTLY if in_order(*by_code) else DIFFERS


def in_order(fit, bridge, answer):
    """Whether in every run the bridge came after the fit, and before the answer (if that came)."""
    for fitted, there, answered in zip(fit.values, bridge.values, answer.values):
        if fitted is None or there is None or there <= fitted:
            return False
        if answered is not None and answered <= there:
            return False
    return True


def judge_folds(book, preset):
    """Natural, at the end: the swap at the site of ID questions redirects OOD answers, too."""
    where = f"{preset}/natural end test_ood"
    swap = book.need(f"swaps {where} donor")
    answer = book.need(f"aim_and_store {where} as_is")
    if swap.n < TOO_FEW * swap.seeds or answer.mean < 0.1:
        return OPEN
    if swap.mean < 0.8:
        return DIFFERS
    paper = float(book.need("paper natural test_ood").values[0])
    return HOLDS if answer.mean >= paper else PARTLY


def judge_fake(book, preset):
    """Second hop supervised, at the end: answered, not seen, and no swap redirects."""
    where = f"{SECOND[preset]} end test_ood"
    answer = book.need(f"aim_and_store {where} as_is")
    seen = book.need(f"seen {where} paper")
    swap = book.need(f"swaps {where} donor")
    if answer.mean < 0.5:
        return OPEN
    if swap.mean >= 0.8:
        return DIFFERS
    paper = float(book.need("paper second_full seen").values[0])
    return HOLDS if swap.mean < 0.5 and seen.mean <= paper else PARTLY


def judge_before(book, preset):
    """Both hops supervised: half is answered before the lens sees half of the bridges."""
    answers = book.need(f"training {preset}/both_full answer_.5").values
    bridges = book.need(f"training {preset}/both_full lens_.5").values
    first = [answer is not None and (bridge is None or answer < bridge)
             for answer, bridge in zip(answers, bridges)]
    if all(first):
        return HOLDS
    return PARTLY if any(first) else DIFFERS


def judge_new_facts(book, preset):
    """New + old is ahead of old + new by .1 or more, early and late."""
    leads = []
    for where in (f"{EARLY[preset]} 500", f"{LATE[preset]} end"):
        ahead = book.need(f"new_facts {where} new_old").mean
        leads.append(ahead - book.need(f"new_facts {where} old_new").mean >= 0.1)
    if all(leads):
        return HOLDS
    return PARTLY if any(leads) else DIFFERS


def judge_r2_alone(book, preset):
    """New + old, late, exceeds what r2 alone gives by .1 or more, in every run."""
    answers = book.need(f"new_facts {LATE[preset]} end new_old")
    guesses = book.need(f"new_facts {LATE[preset]} r2_alone new_old")
    beyond = [answer - guesses.mean >= 0.1 for answer in answers.have]
    if all(beyond):
        return HOLDS
    return PARTLY if answers.mean - guesses.mean >= 0.1 else DIFFERS


def judge_ordinary(book, preset):
    """Four blocks of their own fail, graded once or after several loops. Of `tiny` alone."""
    if preset != "small":
        return None
    once = book.need("training tiny/own_blocks_last_loop test_ood").mean < 0.5
    thrice = book.need("training tiny/own_blocks test_ood").mean < 0.5
    if once and thrice:
        return HOLDS
    return PARTLY if once or thrice else DIFFERS


def judge_separate(book, preset):
    """At the fit, hop 1 supervised gives aim and no store, hop 2 supervised store and less aim."""
    aims = {}
    stores = {}
    for regime in ("first_full", "second_full"):
        where = f"aim_and_store {preset}/{regime} fit test_ood"
        aims[regime] = book.need(f"{where} nearest_right").mean
        stores[regime] = book.need(f"{where} own_code").mean
    hop1 = aims["first_full"] >= 0.8 and stores["first_full"] < 0.5
    hop2 = aims["second_full"] < 0.8 and stores["second_full"] >= 0.8
    if hop1 and hop2:
        return HOLDS
    return PARTLY if hop1 or hop2 else DIFFERS


def judge_lacks(book, preset):
    """Four blocks of their own, one loss: hop 2 is stored, .8 or more, and hop 1 aims in less than
    half; partly: either is so. Of `tiny` alone."""
    if preset != "small":
        return None
    where = "aim_and_store tiny/own_blocks_last_loop end test_ood"
    stored = book.need(f"{where} own_code").least >= 0.8
    astray = book.need(f"{where} nearest_right").most < 0.5
    if stored and astray:
        return HOLDS
    return PARTLY if stored or astray else DIFFERS


def judge_blind(book, preset):
    """With the answer alone graded the lens sees half of the bridges; partly: of the other changes,
    too, some make half visible in runs that fitted; differs: grading the answer does not."""
    if preset != "small":
        return None
    if book.need("training dial/answer_only test_ood_lens").mean < 0.5:
        return DIFFERS
    for group in ("dial/tied", "dial/attention", "dial/own_blocks"):
        fits = book.need(f"training {group} fit").values
        rates = book.need(f"training {group} test_ood_lens").values
        if any(fit is not None and rate >= 0.5 for fit, rate in zip(fits, rates)):
            return PARTLY
    return HOLDS


JUDGES = {  # name: (function, its rule in words)
    "sooner": (judge_sooner,
        "Holds if every run with both hops supervised has .9 before any natural run; partly if "
        "some do."),
    "stages": (judge_stages,
        "Holds if every run is fitted, then the lens sees half, then half is answered (or not "
        "yet); partly if the nearest code, another instrument, gives this order."),
    "folds": (judge_folds,
        "Holds if the swap redirects .8 and as many are answered as in the paper; partly if "
        "fewer are; open below .1 answered or 20 swapped answers a run."),
    "fake": (judge_fake,
        "Holds if the lens sees no more than the paper's and a swap redirects less than half; "
        "differs if a swap redirects .8; open while less than half is answered."),
    "before": (judge_before,
        "Holds if it is so in every run, partly if in some."),
    "new_facts": (judge_new_facts,
        "Holds if hop 1 is ahead by .1 after 500 steps and after 6,000, partly if at one of the "
        "two."),
    "r2_alone": (judge_r2_alone,
        "Holds if hop 1 is ahead of guessing by .1 in every run after 6,000 steps, partly if on "
        "average."),
    "ordinary": (judge_ordinary,
        "Holds if less than half is answered with both losses, partly if with one of them."),
    "separate": (judge_separate,
        "Holds if at the fit hop 1 supervised gives an aim of .8 and a store below half, and "
        "hop 2 supervised the reverse; partly if one does."),
    "blind": (judge_blind,
        "Holds if grading the answer alone lets the lens see half; partly if another change "
        "does so, too."),
    "lacks": (judge_lacks,
        "Holds if in every run the store is .8 and the aim below half; partly if one is so."),
}


def combine(small, trm):
    """The verdict over both models: one word where they agree or one of them was not tried."""
    if trm is None or small == trm:
        return small
    return f"{small} in `small`, {trm} in `trm`"


# ---------------------------------------------------------------- predictions
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


def predict_both(book):
    """How many compositions of two unexposed new facts are answered."""
    return book.need("new_facts exposed/natural_end_0.5_4 end new_new").mean, "share"


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


def predict_trm_answer(book):
    """What the worst seed answers at the end."""
    return book.need("training trm/both_full test_ood").least, "share"


def predict_trm_unseen(book):
    """How far the lens is above its chance level, at most."""
    seen = book.need("seen trm/both_full end test_ood paper")
    return seen.most - seen.chance, "share"


def predict_trm_used(book):
    """What a swap redirects in the worst seed."""
    return book.need("swaps trm/both_full end test_ood donor").least, "share"


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


def cells_against(book, phis, expected):
    """How many cells of the map of plain data, with these phi, are not of an expected class."""
    against = 0
    for phi, ood in product(phis, ("0.06", "0.125", "0.25")):
        said = book.need(f"data {phi} {ood}").values[0]
        against += not said.startswith(expected)
    return against, "count"


def predict_data_few(book):
    return cells_against(book, (3,), "memorises")


def predict_data_many(book):
    return cells_against(book, (9, 12, 18), "a circuit")


def predict_data_all(book):
    """How many cells have a circuit for all facts with phi below 12, or more than .06 OOD facts."""
    against = 0
    for phi, ood in product((3, 6, 9, 12, 18), ("0.06", "0.125", "0.25")):
        is_for_all = book.need(f"data {phi} {ood}").values[0].startswith("a circuit for all")
        against += is_for_all and (phi < 12 or ood != "0.06")
    return against, "count"


def predict_data_long(book):
    """What phi 6 answers of unseen ID questions after 12,000 steps."""
    return book.need("training long/phi_6 test_id").mean, "share"


HELD_OUT = ((6, "0.06"), (6, "0.25"), (9, "0.125"), (12, "0.125"))  # cells that test the rule


def predict_data_rule(book):
    """How many of the cells held out a threshold on phi gets wrong, which was fitted on the others:
    halfway between the largest phi that memorises and the smallest with a circuit."""
    classes = {}
    for phi, ood in product((3, 6, 9, 12, 18), ("0.06", "0.125", "0.25")):
        classes[phi, ood] = book.need(f"data {phi} {ood}").values[0]
    memorise = [phi for (phi, ood), said in classes.items()
                if said.startswith("memorises") and (phi, ood) not in HELD_OUT]
    circuit = [phi for (phi, ood), said in classes.items()
               if said.startswith("a circuit") and (phi, ood) not in HELD_OUT]
    if not memorise or not circuit:
        raise Missing("a border of the map of plain data")
    border = (max(memorise) + min(circuit)) / 2
    wrong = 0
    for phi, ood in HELD_OUT:
        expected = "a circuit" if phi > border else "memorises"
        wrong += not classes[phi, ood].startswith(expected)
    return wrong, "count"


PREDICTIONS = {  # name: (the number that decides, rule, level, what PREDICTIONS.md says)
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
    "exposed_both": (predict_both, "at most", 0.2,
        "two unexposed facts are chained in less than .2"),
    "exposed_mend": (predict_mend, "at least", 0,
        "in new + old the right code mends, the nearest does not (to spare)"),
    "exposed_quarter": (predict_quarter, "at least", 0,
        "a quarter exposed lies between none and half (to spare)"),
    "trm_answer": (predict_trm_answer, "at least", 0.95,
        "trm, both hops supervised: .95 answered in every seed (the worst)"),
    "trm_unseen": (predict_trm_unseen, "at most", 0.05,
        "trm, both hops supervised: the lens is at chance, within .05 (above it)"),
    "trm_used": (predict_trm_used, "at least", 0.8,
        "trm, both hops supervised: a swap redirects .8 in every seed (the worst)"),
    "trm_waits": (predict_trm_waits, "at least", 0,
        "trm, step 5,000: hop 2 supervised is below .5, natural below .1 (to spare)"),
    "trm_long": (predict_trm_long, "at least", 0,
        "trm, hop 2 supervised, 12,000 steps: half answered, a swap redirects .8, seen in less "
        "than half (to spare)"),
    "trm_first": (predict_trm_first, "at least", 0,
        "trm, hop 1 supervised: aim .8 or more, store below half (to spare)"),
    "graft": (predict_graft, "at most", 0,
        "the form follows the grafted weights (runs against)"),
    "ordinary_lacks": (predict_ordinary, "at most", 0.3,
        "an ordinary transformer lacks both hops: aim and store below .3 (the larger)"),
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
    "data_long": (predict_data_long, "at most", 0.5,
        "phi 6 answers less than half of the unseen ID questions after 12,000 steps (mean)"),
}


# ---------------------------------------------------------------- all of them
def judge_all(book):
    """({prediction: (number, kind)}, {name: verdict}); of JUDGES the verdicts are those of "fake",
    of "fake small" and "fake trm"."""
    verdicts = {}
    numbers = {}
    for name, (judge, _) in JUDGES.items():
        for preset in ("small", "trm"):
            try:
                verdicts[f"{name} {preset}"] = judge(book, preset)
            except Missing:
                verdicts[f"{name} {preset}"] = OPEN
        verdicts[name] = combine(verdicts[f"{name} small"], verdicts[f"{name} trm"])
    for name, (predict, rule, level, _) in PREDICTIONS.items():
        try:
            numbers[name] = predict(book)
        except Missing:
            verdicts[name] = OPEN
            continue
        number = numbers[name][0]
        came_true = number <= level if rule == "at most" else number >= level
        verdicts[name] = HOLDS if came_true else FAILS
    return numbers, verdicts
