"""What the results page reads of a run, beside its metrics.

    python -m experiments.measure RUN...        inside.json in each of these run folders
    python -m experiments.measure --film RUN    film.json in RUN: trains it anew, and looks inside
                                                at every evaluation
    python -m experiments.measure --frames RUN  frames.npz: the same, for the moving picture

inside.json holds what `analyze.inference_path` finds at the fit and at the end, without its maps:
{"fit", "end": {"site", "test_id", "test_ood", "aim"}}. Of a run on new facts it holds what
`look_at_new_facts` finds, and "r2_alone": how many of its test questions are right if one answers
each with what its second relation had most often in training. That needs no weights.
"""
import io
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from analyze import (aim_and_store, bridge_site, check_writable, codes, donor_map, fit_on,
                     inference_path, logit_lens, other_r2, plain, right_only, swap_maps)
from data import BadInput, reading
from grok import (PARTS, Parser, Trainer, WEIGHTS, command, load_data, load_run, read_run, say,
                  to_tokens, write_file)

NEW = ("new_old", "old_new", "new_new", "exposed_old", "old_exposed")


# ---------------------------------------------------------------- runs as they were trained
def look_into(folder):
    """What inside.json holds of a run."""
    config, world, splits = load_data(folder)
    measured = {}
    if config.new_facts:
        measured["r2_alone"] = r2_alone(world, splits)
    for stage in WEIGHTS:
        if (folder / f"{stage}.pt").exists():
            model, world, splits = load_run(folder, stage)
            if config.new_facts:
                measured[stage] = look_at_new_facts(model, world, splits)
            else:
                measured[stage] = without_maps(inference_path(model, world, splits))
    if not measured:
        raise BadInput(f"{folder}: holds no weights to look into")
    return measured


def without_maps(tree):
    """The same nested dict without "used" and "map", which only pictures of one run need."""
    if not isinstance(tree, dict):
        return tree
    return {name: without_maps(inner) for name, inner in tree.items()
            if name not in ("used", "map")}


# ---------------------------------------------------------------- new facts
def r2_alone(world, splits):
    """{split: share right} of compositions with new facts if the answer is always the one that r2
    had most often in training. It takes no hop 1 and no new fact: the chance level of Finding 3."""
    trained = splits["train_inferred"]
    counts = np.zeros((world.n_relations, world.n_entities))
    for r2, t in zip(trained.r2, trained.t):
        counts[r2, t] += 1
    most_frequent = counts.argmax(1)                                                   # (R,)
    result = {}
    for name in NEW:
        if name in splits and len(splits[name].h):
            result[name] = float((most_frequent[splits[name].r2] == splits[name].t).mean())
    return result


def look_at_new_facts(model, world, splits):
    """{"site", "aim": {split: see `aim_and_store`}} of a model that was fine-tuned. Site and codes
    are those of the training compositions; with them the splits with new facts are tried."""
    rng = np.random.default_rng(0)
    old = splits["train_inferred"].shuffled(rng)
    half = min(2000, len(old.h) // 2)
    _, code, known = fit_on(model, world, old.take(slice(half)))
    right = right_only(model, world, old.take(slice(half, half + 1000)))
    used = swap_maps(model, world, right.take(slice(150)), right, code, rng)["other_r2"]
    site = bridge_site(model, world, right.take(slice(150)), used, {}, code)
    aim = {}
    for name in NEW:
        if name in splits and len(splits[name].h):
            queries = splits[name].shuffled(rng)
            aim[name] = aim_and_store(model, world, queries, site["sites"], code, known)
    return {"site": site, "aim": aim}


# ---------------------------------------------------------------- along training
def trainer_of(folder):
    """(a Trainer at the first step of the finished run in this folder, world, splits): with it the
    run can be trained anew, on the CPU."""
    config, _ = read_run(folder)  # an unfinished one is refused
    if config.new_facts:
        raise BadInput(f"{folder}: is a run on new facts, which is not trained anew")
    config, world, splits = load_data(folder)
    torch.set_num_threads(1)  # more would take sums in another order: another run
    return Trainer(replace(config, device="cpu"), world, splits), world, splits


def evaluations(trainer):
    """Train to the end, and yield every evaluation: a line of metrics.jsonl."""
    steps = trainer.config.steps
    while trainer.step < steps:
        trainer.train_step()
        if trainer.is_at_evaluation():
            yield trainer.measure()
            say(f"step {trainer.step} of {steps}")


def check_same_end(folder, line):
    """Refuse a run that, trained anew, ends otherwise than its metrics.jsonl says."""
    _, history = read_run(folder)
    now = line["accuracy"]["test_ood"]
    then = history[-1]["accuracy"]["test_ood"]
    if abs(now - then) > 1e-4:
        raise BadInput(f"{folder}: trained anew it ends otherwise; this machine rounds otherwise")


def film(folder):
    """Train the run of this folder anew; film.json holds, for every evaluation, {"step", "fitted":
    the training, split: see `aim_and_store`}, at the site that its last weights use.
    Every value is from the averaged weights, as the run's metrics are."""
    trainer, world, splits = trainer_of(folder)
    sites = sites_at_the_end(folder)
    rng = np.random.default_rng(0)
    pools = {name: splits[name].shuffled(rng) for name in ("test_id", "test_ood")}
    half = len(pools["test_id"].h) // 2
    fitted = pools["test_id"].take(slice(half, half + 2000))
    pools["test_id"] = pools["test_id"].take(slice(half))
    frames = []
    for line in evaluations(trainer):
        frames.append({"step": line["step"], "fitted": line["accuracy"]["train_inferred"],
                       **frame(trainer.average, world, pools, fitted, sites)})
    check_same_end(folder, line)
    return frames


def sites_at_the_end(folder):
    """Where the last weights of a run hold the bridge, by its inside.json."""
    inside = read_json(folder / "inside.json", dict)
    if "end" not in inside:
        raise BadInput(f"{folder}: was not measured; experiments.measure without --film does so")
    return [tuple(site) for site in inside["end"]["site"]["sites"]]


def frame(model, world, pools, fitted, sites):
    """{split: the numbers of aim and store now}."""
    tokens, _ = to_tokens(fitted, world, model.config.layout)
    bridges = torch.from_numpy(fitted.b)
    code = codes(model, tokens, bridges, world.n_entities)
    known = np.unique(fitted.b)
    return {name: aim_and_store(model, world, queries, sites, code, known)
            for name, queries in pools.items()}


def film_maps(folder, n=100):
    """Train the run of this folder anew, on the CPU; the bytes of frames.npz, which holds "step"
    (S,), one an evaluation; "answer" (S,), the share of OOD questions answered; and in
    (S, n_loops, 2, T), the parts in the order of PARTS, "seen", the share of n OOD questions whose
    bridge is top-1 there, and "used", the share that a donor of another r2 redirects."""
    trainer, world, splits = trainer_of(folder)
    rng = np.random.default_rng(0)
    pool = splits["test_ood"].shuffled(rng)
    swapped = other_r2(world, pool.take(slice(n)), pool, rng)
    frames = []
    for line in evaluations(trainer):
        frames.append({"step": line["step"], "answer": line["accuracy"]["test_ood"],
                       **maps_of_moment(trainer.average, world, *swapped)})
    check_same_end(folder, line)
    content = io.BytesIO()
    arrays = {}
    for name in frames[0]:
        arrays[name] = np.array([frame[name] for frame in frames])
    np.savez_compressed(content, **arrays)
    return content.getvalue()


def maps_of_moment(model, world, clean, donor, predicted):
    """{"seen", "used": (n_loops, 2, T)} of one moment."""
    tokens, _ = to_tokens(clean, world, model.config.layout)
    redirected = donor_map(model, world, clean, donor, predicted)["redirected"]
    top = logit_lens(model, tokens)
    bridges = torch.from_numpy(clean.b)[:, None]                                # (N, 1)
    seen = [(top[part] == bridges).float().mean(1).numpy() for part in PARTS]
    used = [redirected[part].astype(np.float32) for part in PARTS]
    return {"seen": np.stack(seen, axis=1), "used": np.stack(used, axis=1)}


# ---------------------------------------------------------------- files beside a run
def read_json(path, kind):
    """The dict or list in a file; an empty one if there is no file."""
    if not path.exists():
        return kind()
    with reading(path):
        content = json.loads(path.read_bytes())
        if not isinstance(content, kind):
            raise ValueError(f"holds no {kind.__name__}")
    return content


def write_each(program, folders, file, measure):
    """Write, into each folder of a finished run, a file of what measure(folder) gives, bytes or
    what JSON can hold; returns the exit status, 2 if one of the runs cannot be used. The next one
    is tried all the same."""
    status = 0
    for folder in folders:
        try:
            read_run(folder)  # an unfinished one is refused
            check_writable(folder)
            content = measure(folder)
            if not isinstance(content, bytes):
                content = json.dumps(plain(content)).encode()
            write_file(folder / file, content)
            say(f"{folder.as_posix()}: {file}")
        except (BadInput, OSError) as error:
            print(f"{program}: {error}", file=sys.stderr)
            status = 2
    return status


# ---------------------------------------------------------------- the command line
@command("experiments.measure")
def main(argv=None):
    """Measure runs; exit status 0, or 2 if one of them cannot be used."""
    parser = Parser(prog="experiments.measure", description="What the results page reads.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    anew = parser.add_mutually_exclusive_group()
    anew.add_argument("--film", action="store_true", help="train anew: aim and store")
    anew.add_argument("--frames", action="store_true", help="train anew: the moving picture")
    args = parser.parse_args(argv)
    program = "experiments.measure"
    if args.film:
        return write_each(program, args.runs, "film.json", film)
    if args.frames:
        return write_each(program, args.runs, "frames.npz", film_maps)
    return write_each(program, args.runs, "inside.json", look_into)


if __name__ == "__main__":
    sys.exit(main())
