"""The verdicts on the paper's claims, a small function each.

A verdict is computed from the numbers of a Book (experiments/book.py), once for `small` and once
for `trm`. The second paragraph of a function's docstring is its rule, which verdicts.csv repeats:

    holds    as the paper says        partly   with another instrument, threshold or ceiling
    differs  not so                   open     a run or a measurement is missing, or decides nothing
"""
import inspect
import math

HOLDS = "holds"
PARTLY = "partly"
DIFFERS = "differs"
OPEN = "open"
FAILS = "fails"  # a prediction

TOO_FEW = 20     # queries a run; a swap on fewer decides nothing
SHARES = (0, 0.25, 0.5, 0.75, 1)  # of OOD facts supervised, in the map
LONGEST = {"small": "long/natural", "trm": "trm/natural"}              # natural training
SECOND = {"small": "small/second_full", "trm": "trm/second_full"}       # hop 2 supervised
EARLY = {"small": "tune/small_natural_end", "trm": "tune/trm_natural"}  # new facts, 500 steps
LATE = {"small": "tune/long_natural_end", "trm": "tune/trm_long_natural"}  # 6,000 steps


class Missing(Exception):
    """A verdict needs a number that is not there."""


def all_or_some(facts):
    """HOLDS if all of these are so, PARTLY if some are, else DIFFERS."""
    if all(facts):
        return HOLDS
    return PARTLY if any(facts) else DIFFERS


def judge_sooner(book, preset):
    """Both hops supervised: nine answers in ten, before natural training has them.

    Holds if every run with both hops supervised has .9 before any natural run; partly if some do.
    """
    both = book.need(f"training {preset}/both_full answer_.9")
    natural = book.need(f"training {LONGEST[preset]} answer_.9")
    first = min(natural.have, default=math.inf)
    return all_or_some([step is not None and step < first for step in both.values])


def judge_stages(book, preset):
    """Natural: the training is fitted, then the bridge is seen in half, then half is answered.

    Holds if every run is fitted, then the lens sees half, then half is answered (or not yet);
    partly if the nearest code, another instrument, gives this order.
    """
    by_lens = [book.need(f"training {LONGEST[preset]} {name}")
               for name in ("fit", "lens_.5", "answer_.5")]
    if in_order(*by_lens):
        return HOLDS
    by_code = [book.need(f"film {preset}/natural {name}")
               for name in ("fit", "aim_.5", "answer_.5")]
    return PARTLY if in_order(*by_code) else DIFFERS


def in_order(fit, bridge, answer):
    """Whether in every run the bridge came after the fit, and before the answer (if that came)."""
    for fitted, seen, answered in zip(fit.values, bridge.values, answer.values):
        if fitted is None or seen is None or seen <= fitted:
            return False
        if answered is not None and answered <= seen:
            return False
    return True


def judge_folds(book, preset):
    """Natural, at the end: the swap at the site of ID questions redirects OOD answers, too.

    Holds if the swap redirects .8 and as many are answered as in the paper; partly if fewer are;
    open below .1 answered or 20 swapped answers a run.
    """
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
    """Second hop supervised, at the end: answered, not seen, and no swap redirects.

    Holds if the lens sees no more than the paper's and a swap redirects less than half; differs if
    a swap redirects .8; open while less than half is answered.
    """
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
    """Both hops supervised: half is answered before the lens sees half of the bridges.

    Holds if it is so in every run, partly if in some.
    """
    answers = book.need(f"training {preset}/both_full answer_.5").values
    bridges = book.need(f"training {preset}/both_full lens_.5").values
    return all_or_some([answer is not None and (bridge is None or answer < bridge)
                        for answer, bridge in zip(answers, bridges)])


def judge_new_facts(book, preset):
    """New + old is ahead of old + new by .1 or more, early and late.

    Holds if in every run hop 1 is ahead by .1 after 500 steps and after 6,000; partly if on average
    at one of the two.
    """
    in_every_run = []
    on_average = []
    for where in (f"{EARLY[preset]} 500", f"{LATE[preset]} end"):
        hop1 = book.need(f"new_facts {where} new_old")
        hop2 = book.need(f"new_facts {where} old_new")
        leads = [first - second for first, second in zip(hop1.have, hop2.have)]
        in_every_run.append(min(leads) >= 0.1)
        on_average.append(hop1.mean - hop2.mean >= 0.1)
    if all(in_every_run):
        return HOLDS
    return PARTLY if any(on_average) else DIFFERS


def judge_r2_alone(book, preset):
    """New + old, late, exceeds what r2 alone gives by .1 or more, in every run.

    Holds if hop 1 is ahead of guessing by .1 in every run after 6,000 steps, partly if on average.
    """
    answers = book.need(f"new_facts {LATE[preset]} end new_old")
    guess = book.need(f"new_facts {LATE[preset]} r2_alone new_old").mean
    return all_or_some([answers.least - guess >= 0.1, answers.mean - guess >= 0.1])


def judge_ordinary(book, preset):
    """Four blocks of their own fail, graded once or after several loops. Of `tiny` alone.

    Holds if less than half is answered with both losses, partly if with one of them.
    """
    return all_or_some([book.need(f"training tiny/{group} test_ood").mean < 0.5
                        for group in ("own_blocks_last_loop", "own_blocks")])


def judge_separate(book, preset):
    """At the fit, hop 1 supervised gives aim and no store, hop 2 supervised store and less aim.

    Holds if at the fit hop 1 supervised gives an aim of .8 and a store below half, and hop 2
    supervised the reverse; partly if one does.
    """
    aim, store = aim_and_store(book, f"{preset}/first_full fit")
    hop1 = aim.mean >= 0.8 and store.mean < 0.5
    aim, store = aim_and_store(book, f"{preset}/second_full fit")
    hop2 = aim.mean < 0.8 and store.mean >= 0.8
    return all_or_some([hop1, hop2])


def aim_and_store(book, where):
    """(aim, store) of OOD questions, two Cells; where = "GROUP WEIGHTS"."""
    place = f"aim_and_store {where} test_ood"
    return book.need(f"{place} nearest_right"), book.need(f"{place} own_code")


def judge_blind(book, preset):
    """With the answer alone graded the lens sees half of the bridges.

    Holds if grading the answer alone lets the lens see half; partly if another change does so, too.
    """
    if book.need("training dial/answer_only test_ood_lens").mean < 0.5:
        return DIFFERS
    for group in ("dial/tied", "dial/attention", "dial/own_blocks"):
        fits = book.need(f"training {group} fit").values
        rates = book.need(f"training {group} test_ood_lens").values
        if any(fit is not None and rate >= 0.5 for fit, rate in zip(fits, rates)):
            return PARTLY
    return HOLDS


def judge_lacks(book, preset):
    """Four blocks of their own, one loss: hop 2 is stored, and hop 1 does not aim. Of `tiny` alone.

    Holds if in every run the store is .8 and the aim below half; partly if one is so.
    """
    aim, store = aim_and_store(book, "tiny/own_blocks_last_loop end")
    return all_or_some([store.least >= 0.8, aim.most < 0.5])


JUDGES = {"sooner": judge_sooner, "stages": judge_stages, "folds": judge_folds, "fake": judge_fake,
          "before": judge_before, "new_facts": judge_new_facts, "r2_alone": judge_r2_alone,
          "ordinary": judge_ordinary, "separate": judge_separate, "blind": judge_blind,
          "lacks": judge_lacks}
ONCE = ("ordinary", "blind", "lacks")  # of runs that trm has none of


def rule_of(name):
    """The rule of a verdict, in one line."""
    return " ".join(inspect.getdoc(JUDGES[name]).split("\n\n")[1].split())


def combine(small, trm):
    """The verdict over both models: one word where they agree or one of them was not tried."""
    if trm is None or small == trm:
        return small
    return f"{small} in `small`, {trm} in `trm`"


def judge_all(book):
    """{name: verdict} of JUDGES; those of "fake", of "fake small" and "fake trm"."""
    verdicts = {}
    for name, judge in JUDGES.items():
        for preset in ("small", "trm"):
            try:
                verdict = None if name in ONCE and preset == "trm" else judge(book, preset)
            except Missing:
                verdict = OPEN
            verdicts[f"{name} {preset}"] = verdict
        verdicts[name] = combine(verdicts[f"{name} small"], verdicts[f"{name} trm"])
    return verdicts
