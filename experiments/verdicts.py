"""The verdicts on the paper's claims, a small function each.

A verdict is computed from the Cells of a Book (experiments/book.py), once for `small` and once for
`trm`. The second paragraph of a function's docstring is its rule, which verdicts.csv repeats:

    holds    as the paper says
    partly   with another instrument, in some of the runs, or at one of two times
    differs  not so
    open     a run or a measurement is missing, or decides nothing
"""
import inspect
import math

HOLDS = "holds"
PARTLY = "partly"
DIFFERS = "differs"
OPEN = "open"
FAILS = "fails"  # a prediction

TOO_FEW = 20     # queries a run: a swap on fewer does not decide `folds`
NATURAL = {"small": "long/natural", "trm": "trm/natural"}              # natural training
SECOND = {"small": "small/second_full", "trm": "trm/second_full"}       # hop 2 supervised
EARLY = {"small": "tune/small_natural_end", "trm": "tune/trm_natural"}  # new facts, 500 steps
LATE = {"small": "tune/long_natural_end", "trm": "tune/trm_long_natural"}  # 6,000 steps


class Missing(Exception):
    """A verdict needs a number that is not there."""


def verdict_of(cases):
    """HOLDS if all of these cases are so, PARTLY if one is, else DIFFERS."""
    if all(cases):
        return HOLDS
    return PARTLY if any(cases) else DIFFERS


def every(book, place):
    """The values at a place, of every run; Missing if one was not measured."""
    values = book.need(place).values
    if None in values:
        raise Missing(place)
    return values


def judge_sooner(book, preset):
    """Both hops supervised: nine answers in ten, before natural training has them.

    Holds if every run with both hops supervised has .9 before any natural run; partly if some do.
    """
    both = every(book, f"{preset}/both_full step answer_.9")
    natural = min(every(book, f"{NATURAL[preset]} step answer_.9"))
    return verdict_of([step < natural for step in both])


def judge_stages(book, preset):
    """Natural: the training is fitted, then the bridge is seen in half, then half is answered.

    Holds if every run is fitted, then the lens sees half, then half is answered (or not yet);
    partly if the nearest code, another instrument, gives this order.
    """
    by_lens = [every(book, f"{NATURAL[preset]} step {name}")
               for name in ("fit", "lens_.5", "answer_.5")]
    if in_order(*by_lens):
        return HOLDS
    by_code = [every(book, f"{preset}/natural film {name}")
               for name in ("fit", "aim_.5", "answer_.5")]
    return PARTLY if in_order(*by_code) else DIFFERS


def in_order(fit, bridge, answer):
    """Whether in every run the bridge came after the fit, and before the answer (if that came)."""
    for fitted, seen, answered in zip(fit, bridge, answer):
        if not fitted < seen < math.inf or answered <= seen:
            return False
    return True


def judge_folds(book, preset):
    """Natural, at the end: the swap at the site of ID questions redirects OOD answers, too.

    Holds if the swap redirects .8 and as many are answered as in the paper; partly if fewer are;
    open below .1 answered or 20 swapped answers a run.
    """
    swap = book.need(f"{preset}/natural end site test_ood donor")
    answer = book.need(f"{preset}/natural end aim test_ood as_is")
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
    answer = book.need(f"{SECOND[preset]} end aim test_ood as_is")
    seen = book.need(f"{SECOND[preset]} end test_ood seen paper any")
    swap = book.need(f"{SECOND[preset]} end site test_ood donor")
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
    answers = every(book, f"{preset}/both_full step answer_.5")
    bridges = every(book, f"{preset}/both_full step lens_.5")
    return verdict_of([answer < bridge for answer, bridge in zip(answers, bridges)])


def judge_new_facts(book, preset):
    """New + old is ahead of old + new by .1 or more, early and late.

    Holds if in every run hop 1 is ahead by .1 after 500 steps and after 6,000; partly if on average
    at one of the two.
    """
    in_every_run = []
    on_average = []
    for line in (f"{EARLY[preset]} 500", f"{LATE[preset]} last"):
        hop1 = every(book, f"{line} accuracy new_old")
        hop2 = every(book, f"{line} accuracy old_new")
        leads = [first - second for first, second in zip(hop1, hop2)]
        in_every_run.append(min(leads) >= 0.1)
        on_average.append(sum(leads) / len(leads) >= 0.1)
    if all(in_every_run):
        return HOLDS
    return PARTLY if any(on_average) else DIFFERS


def judge_r2_alone(book, preset):
    """New + old, late, exceeds what r2 alone gives by .1 or more, in every run.

    Holds if hop 1 is ahead of guessing by .1 in every run after 6,000 steps, partly if on average.
    """
    answers = book.need(f"{LATE[preset]} last accuracy new_old")
    guess = book.need(f"{LATE[preset]} r2_alone new_old").mean
    return verdict_of([answers.least - guess >= 0.1, answers.mean - guess >= 0.1])


def judge_ordinary(book, preset):
    """Four blocks of their own fail, graded once or after several loops. Of `tiny` alone.

    Holds if less than half is answered with both losses, partly if with one of them.
    """
    return verdict_of([book.need(f"tiny/{group} last accuracy test_ood").mean < 0.5
                        for group in ("own_blocks_last_loop", "own_blocks")])


JUDGES = {"sooner": judge_sooner, "stages": judge_stages, "folds": judge_folds, "fake": judge_fake,
          "before": judge_before, "new_facts": judge_new_facts, "r2_alone": judge_r2_alone,
          "ordinary": judge_ordinary}
ONCE = ("ordinary",)  # of runs that trm has none of


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
