"""Where is a fact asked alone looked up, and does a composition use the same place and code?

    python -m extras.facts RUN...       facts.json beside the weights of each run

A fact asked alone is (h, r, blank). Its answer's code at a site is the mean value there of all
facts with that tail (`codes`), so adding code[t'] - code[t] asks the site for t' in place of t.
Three maps:

alone    in the fact itself: does the answer become t'? There the fact has been looked up.
hop1     in a composition, at the same site, with the bridge's code: does the bridge become b'?
hop2     in a composition, with the answer's code: does the answer become t'?

Where alone and hop1 are both high, a fact that is only ever asked alone can serve as hop 1; where
alone and hop2 are, as hop 2.
"""
import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch

from analyze import codes, other_r2, patch_map, right_only, values_of
from data import BadInput
from grok import load_run, say, to_tokens, WEIGHTS, write_file

KNOWN = ("id_atomic", "ood_atomic", "kept_atomic", "new_atomic")


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


def main(argv=None):
    """Measure where facts are looked up; exit status 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="extras.facts", description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    try:
        for folder in parser.parse_args(argv).runs:
            found = {}
            for stage, file in WEIGHTS.items():
                if (folder / file).exists():
                    model, world, splits = load_run(folder, stage)
                    parts = [splits[name] for name in KNOWN if name in splits]
                    facts = type(parts[0])(*map(np.concatenate, zip(*parts)))
                    asked = right_only(model, world, splits["test_id"])
                    found[stage] = shared_places(model, world, facts, asked)
            write_file(folder / "facts.json", json.dumps(found).encode())
            say(f"{folder}: " + ", ".join(found))
    except (BadInput, OSError) as error:
        print(f"extras.facts: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
