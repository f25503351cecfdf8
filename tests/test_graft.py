"""What extras/graft.py promises: one part is the donor's, the rest is the run's own."""
import shutil

import torch

import grok
from extras import graft


def weights(folder):
    return grok.load_run(folder)[0].state_dict()


def test_each_start_has_one_part_of_the_donor_and_is_trained(tmp_path, monkeypatch):
    for seed in "01":
        assert grok.main(["--preset", "smoke", "--layout", "bidirectional", "--mixing", "tokens",
                          "--tied", "false", "--steps", "1", "--lr", "0", "--seed", seed,
                          "--out", str(tmp_path / seed)]) == 0
    commands = []
    monkeypatch.setattr(grok, "main", lambda argv: commands.append(argv) or 0)
    one, other = tmp_path / "0", tmp_path / "1"
    assert graft.main([str(one), str(other), "-o", str(tmp_path)]) == 0
    assert len(commands) == 2 * len(graft.PARTS)
    changed = []
    for command in commands:
        given = grok.parse(command)
        own, donor = (one, other) if given["seed"] == 0 else (other, one)
        mixed = weights(given["start"])
        for name, weight in mixed.items():
            is_own, is_donors = (torch.equal(weight, weights(f)[name]) for f in (own, donor))
            assert is_own != is_donors
            changed += [name] if is_donors else []
    for name in weights(one):                                    # as often as parts hold it
        assert changed.count(name) == (4 if ".mix." in name else 2)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}
    assert graft.main([str(one), str(other), "-o", str(tmp_path)]) == 0      # twice: the same
    torch.save({"step": 1, "weights": weights(other)}, one / "after.pt")
    files[one / "after.pt"] = (one / "after.pt").read_bytes()
    assert graft.main([str(one), str(other), "-o", str(tmp_path)]) == 2      # others: refused
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*.pt")}


def test_a_part_drawn_afresh_is_that_of_the_first_weights(tmp_path, monkeypatch):
    smoke = ["--preset", "smoke", "--layout", "bidirectional", "--mixing", "tokens",
             "--tied", "false", "--seed", "11"]
    run, first, early = (tmp_path / name for name in ("run", "first", "early"))
    assert grok.main([*smoke, "--steps", "1", "--lr", "0", "--out", str(first)]) == 0
    assert grok.main([*smoke, "--steps", "5", "--out", str(early)]) == 0
    assert grok.main([*smoke, "--steps", "20", "--out", str(run)]) == 0
    shutil.copy(early / "after.pt", run / "before.pt")
    commands = []
    monkeypatch.setattr(grok, "main", lambda argv: commands.append(argv) or 0)
    assert graft.main([str(run), str(first), "-o", str(tmp_path), "--tune"]) == 0
    begins = {"embedding": "embedding", "mixing": "blocks.0.mix.", "mlp": "blocks.0.",
              "mlp_before": "blocks.0."}
    own = {part: weights(run) for part in begins}
    own["mlp_before"] = grok.load_run(run, "before")[0].state_dict()
    assert len(commands) == len(graft.FRESH) == len(begins)
    for part, command in zip(graft.FRESH, commands):
        given = grok.parse(command)
        assert given["out"] == str(tmp_path / "fresh" / part / "seed11")
        assert (given["preset"], given["seed"], given["kept"]) == ("tune", 11, 1)
        for name, weight in weights(given["start"]).items():
            fresh = name.startswith(begins[part]) and (part[:3] != "mlp" or ".mix." not in name)
            assert torch.equal(weight, (weights(first) if fresh else own[part])[name])
            assert not torch.equal(weights(first)[name], own[part][name])
