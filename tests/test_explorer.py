"""What tools/explorer.py promises: `pytest tests/test_explorer.py`.

The oracles are PyTorch, analyze.py and an HTML parser; the page's own scripts run under Node.js,
and the tests that need it are skipped where there is none.
"""
import itertools
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
import grok
from data import Queries, compositions, queries
from tools import explorer

ROOT = Path(explorer.__file__).resolve().parent.parent
NAMES = ["<script>alert(1)</script>", "</script>", "<!--", "<b>bold</b>", 'Zoë & "co"', "a  b",
         "a\u2028b", "'", "\\u003c", "@DATA@", "${x}", "ok"]
RUNS = {  # each dial of the looped model at least once in either position
    "causal": [],
    "tokens": "--layout bidirectional --mixing tokens --tied false --copy true".split(),
    "two blocks": "--layout bidirectional --n-blocks 2 --logit-scale 0.5".split()}


def train(folder, *options, steps=60):
    argv = ["--preset", "smoke", "--device", "cpu", "--steps", str(steps), "--out", str(folder)]
    assert grok.main([*argv, *map(str, options)]) == 0


def write_facts(path):
    """Facts with NAMES, five a head."""
    rng = np.random.default_rng(0)
    lines = []
    for head in NAMES:
        for relation in rng.permutation(7)[:5]:
            tail = NAMES[rng.integers(len(NAMES))]
            lines.append(f"{head}\t<r{relation}>\t{tail}\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_fit(folder):
    """Weights for fit.pt: those at the end, and a little noise."""
    saved = torch.load(folder / "end.pt", weights_only=True)
    generator = torch.Generator().manual_seed(0)
    for name, weight in saved["weights"].items():
        noise = torch.randn(weight.shape, generator=generator)
        saved["weights"][name] = weight + 0.1 * noise
    torch.save(saved, folder / "fit.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: folder of a run}, the first with facts of its own."""
    root = tmp_path_factory.mktemp("runs")
    write_facts(root / "facts.tsv")
    folders = {}
    for name, options in RUNS.items():
        own = ["--phi", 2, "--facts", root / "facts.tsv"] if name == "causal" else []
        folders[name] = root / name
        train(folders[name], *options, *own)
        write_fit(folders[name])
    return folders


@pytest.fixture(scope="module")
def pages(runs):
    return {name: explorer.make_page([folder]) for name, folder in runs.items()}


@pytest.fixture(scope="module")
def shipped_page():
    return (ROOT / "figures" / "explorer.html").read_bytes()


class Page(HTMLParser):
    """The elements of a page [(tag, attributes)], and the text of its scripts by id."""

    def __init__(self, page):
        super().__init__()
        self.elements = []
        self.scripts = {}
        self.feed(page.decode())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag == "script" and text.strip():
            name = attributes["id"]
            self.scripts[name] = self.scripts.get(name, "") + text


def data_of(page):
    return json.loads(Page(page).scripts["data"])


def run_node(page, program, tmp_path):
    """The JSON of what a JavaScript function body returns after the page's model and patching; it
    knows the page's `data` and its first run as `run`."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js here to run the page's script")
    scripts = Page(page).scripts
    (tmp_path / "data.json").write_text(scripts["data"], encoding="utf-8")
    text = scripts["model"] + scripts["patching"] + f"""
        const data = JSON.parse(require("fs").readFileSync("data.json"));
        const run = data.runs[0];
        console.log(JSON.stringify((() => {{ {program} }})()));"""
    (tmp_path / "run.js").write_text(text, encoding="utf-8")
    done = subprocess.run([node, "run.js"], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def as_queries(rows, world):
    """Queries from rows (h, r1, r2, ...), by looking the facts up."""
    h, r1, r2 = np.array(rows)[:, :3].T
    b = world.facts[world.index[h, r1], 2]
    return Queries(h, r1, r2, b, world.facts[world.index[b, r2], 2])


def rows_of(asked):
    return np.column_stack([asked.h, asked.r1, asked.r2]).tolist()


def all_sites(model):
    """The sites in the page's order."""
    positions = range(grok.LENGTH[model.config.layout])
    return list(itertools.product(range(model.n_loops), grok.PARTS, positions))


def swapped_logits(model, world, clean, donor, sites):
    """The logits (N, V) of clean queries, each with its donor's value at a site of its own."""
    tokens, _ = grok.to_tokens(clean, world, model.config.layout)
    logits = []
    for i, site in enumerate(sites):
        put = analyze.values_at(model, world, donor.take([i]), [site])
        logits.append(analyze.patch(model, tokens[i:i + 1], put)[0])
    return torch.stack(logits)


# ---------------------------------------------------------------- the numbers
@pytest.mark.parametrize("weights", grok.WEIGHTS)
@pytest.mark.parametrize("name", RUNS)
def test_logits_are_those_of_pytorch_on_50_queries_and_50_swapped_ones(runs, pages, name, weights,
                                                                      tmp_path):
    model, world, _ = explorer.load_rounded(runs[name], weights)
    paths = queries(world, *compositions(world))
    paths = paths.take(np.random.default_rng(0).permutation(len(paths.h)))
    clean = paths.take(slice(50))
    donor = paths.take(slice(50, 100))
    sites = all_sites(model)
    sites_used = [sites[i % len(sites)] for i in range(50)]             # another for each query
    wanted = swapped_logits(model, world, clean, donor, sites_used)
    tokens, _ = grok.to_tokens(clean, world, model.config.layout)
    logits = model(tokens)
    result = run_node(pages[name], f"""
        const model = load_model(run, "{weights}");
        const sites = sites_of(model);
        const clean = {rows_of(clean)}.map(row => to_tokens(run, as_query(run, row)));
        const donors = {rows_of(donor)}.map(row => to_tokens(run, as_query(run, row)));
        const swapped = clean.map((query, i) => {{
          const theirs = values_of(model, [donors[i]]);
          return [...model.forward([query], swap(model, sites[i % sites.length], theirs))];
        }});
        const values = values_of(model, clean);
        const read = first => sites.map(
          site => logit_lens(model, at_site(model, values, site), first));
        return {{sites, logits: [...model.forward(clean)], swapped,
                 all: read(undefined), entities: read(run.entities.length)}};""", tmp_path)
    assert [(one["loop"], one["part"], one["position"]) for one in result["sites"]] == sites
    assert logits.std() > 0.1 and not torch.allclose(wanted, logits, atol=0.1)
    got = torch.tensor(result["logits"]).view(logits.shape)
    torch.testing.assert_close(got, logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(result["swapped"]), wanted, atol=1e-3, rtol=0)
    values = analyze.values_of(model, tokens)
    for lens, first in (("all", None), ("entities", world.n_entities)):
        top = analyze.logit_lens(model, tokens, first)
        wanted_top = [top[part][loop, :, position].tolist() for loop, part, position in sites]
        shown = [[one["token"] for one in site] for site in result[lens]]
        assert np.mean(np.array(shown) == wanted_top) > 0.999           # but for a tie
        last = model.unembed(values["state"][-1, :, -1])[:, :first].softmax(-1).amax(-1)
        shares = [one["probability"] for one in result[lens][-1]]
        np.testing.assert_allclose(shares, last, atol=1e-3)


@pytest.mark.parametrize("name", [*RUNS, "shipped"])
def test_verdicts_are_those_of_pytorch(runs, pages, shipped_page, name, tmp_path):
    """Of up to ten pairs, at every site: what became of the answer, and what is said of it."""
    page = {**pages, "shipped": shipped_page}[name]
    model, world, _ = explorer.load_rounded({**runs, "shipped": explorer.DEFAULT[0]}[name], "end")
    run = data_of(page)["runs"][0]
    pairs, verdicts = run_node(page, """
        const model = load_model(run, "end");
        const names = [...run.entities, ...run.relations, "blank"];
        const pairs = pairs_of(run, queries_of(run, "ID", "end"), 10);
        return [pairs, pairs.flatMap(([clean, donor]) => sites_of(model).map(site => {
          const tokens = [to_tokens(run, clean)];
          const theirs = values_of(model, [to_tokens(run, donor)]);
          const edited = values_of(model, tokens, swap(model, site, theirs));
          const answer = logit_lens(model, model.read(edited.state.at(-1), tokens))[0];
          const shown = logit_lens(model, at_site(model, theirs, site))[0].token;
          return {outcome: outcome_of(run, clean, donor, answer.token), shown,
                  said: explain(run, names, clean, donor, answer.token, answer.probability, shown)};
        }))];""", tmp_path)
    clean, donor = sides_of(pairs, world)
    sites = all_sites(model)
    rows = np.arange(len(pairs)).repeat(len(sites))                     # each pair at every site
    clean = clean.take(rows)
    donor = donor.take(rows)
    logits = swapped_logits(model, world, clean, donor, sites * len(pairs))
    predicted = analyze.tail(world, donor.b, clean.r2)
    words = {"redirected": "Redirected.", "unchanged": "Unchanged.", "else": "Something else."}
    for i, (verdict, answer) in enumerate(zip(verdicts, logits.argmax(-1).tolist())):
        wanted = "else"
        if answer == predicted[i]:
            wanted = "redirected"
        elif answer == clean.t[i]:
            wanted = "unchanged"
        word, text = verdict["said"]
        assert (verdict["outcome"], word) == (wanted, words[wanted])
        assert f"{[*run['entities'], *run['relations'], 'blank'][answer]} (" in text
        is_seen = verdict["shown"] == donor.b[i]
        assert ("seen, but not used" in text) == (wanted == "unchanged" and is_seen)
        assert ("used, and seen" in text) == (wanted == "redirected" and is_seen)
        assert ("used, but not seen" in text) == (wanted == "redirected" and not is_seen)
    outcomes = {verdict["outcome"] for verdict in verdicts}
    assert len(verdicts) == len(rows) and {"unchanged", "else"} <= outcomes
    assert name != "shipped" or "redirected" in outcomes


def sides_of(pairs, world):
    """The page's pairs [[clean, donor], ...] of {h, r1, r2} as two Queries."""
    sides = []
    for side in (0, 1):
        rows = [[pair[side]["h"], pair[side]["r1"], pair[side]["r2"]] for pair in pairs]
        sides.append(as_queries(rows, world))
    return sides


@pytest.mark.parametrize("name", RUNS)
def test_maps_are_those_of_analyze_and_pairs_are_fair(runs, pages, name, tmp_path):
    model, world, _ = explorer.load_rounded(runs[name], "end")
    pairs, counts = run_node(pages[name], """
        const model = load_model(run, "end");
        const pairs = pairs_of(run, queries_of(run, "ID", "end"), 30);
        return [pairs, [...count_sites(run, model, pairs)].at(-1).counts];""", tmp_path)
    clean, donor = sides_of(pairs, world)
    t = analyze.tail(world, donor.b, clean.r2)
    assert len(pairs) > 1 and (t >= 0).all()
    for ours, theirs in ((clean.r2, donor.r2), (clean.b, donor.b), (clean.t, donor.t), (t, clean.t),
                         (t, donor.t)):
        assert (ours != theirs).all()
    tokens, _ = grok.to_tokens(clean, world, model.config.layout)
    donor_tokens, _ = grok.to_tokens(donor, world, model.config.layout)
    theirs = analyze.values_of(model, donor_tokens)
    redirected = analyze.patch_map(model, tokens, theirs, t)["redirected"]
    unchanged = analyze.patch_map(model, tokens, theirs, analyze.predict(model, tokens))[
        "redirected"]
    lens = analyze.seen(model, world, clean)
    assert lens["left_out"] == 0
    for count in counts:
        site = count["site"]
        at = (site["loop"], site["position"])
        wanted = {"redirected": redirected[site["part"]][at],
                  "unchanged": unchanged[site["part"]][at]}
        wanted["else"] = 1 - wanted["redirected"] - wanted["unchanged"]
        for key, kind in (("all", "bridge"), ("entities", "entity")):
            wanted[key] = lens[site["part"]][kind]["map"][at[0]][at[1]]
        for key, share in wanted.items():
            assert count[key] / len(pairs) == pytest.approx(share, abs=1e-6), (key, site)
    bridges = torch.from_numpy(clean.b).roll(1)
    top = analyze.logit_lens(model, tokens)
    for count in counts:
        site = count["site"]
        shown = top[site["part"]][site["loop"], :, site["position"]]    # (N,)
        assert count["all_chance"] == (shown == bridges).sum().item()


def test_the_most_seen_site_without_use_lies_below_the_last_loop(pages, tmp_path):
    """Of ten pairs: how many answers a swap leaves as they are, how many bridges the lens shows."""
    numbers = {"seldom seen": (0, 10, 1), "seen, unused": (0, 10, 7), "used": (0, 9, 10),
               "in the last loop": (1, 10, 10)}
    counts = []
    for name, (loop, unchanged, seen) in numbers.items():
        counts.append({"name": name, "site": {"loop": loop}, "unchanged": unchanged, "all": seen})
    best, none = run_node(pages["tokens"], f"""
        const counts = {json.dumps(counts)};
        return [most_seen_unused(counts, 10, "all"), most_seen_unused(counts.slice(2), 10, "all")];
        """, tmp_path)
    assert best["name"] == "seen, unused" and none is None


def test_sites_are_named_as_analyze_names_them(runs, pages, tmp_path):
    model, _, _ = explorer.load_rounded(runs["tokens"], "end")
    said = run_node(pages["tokens"], 'return sites_of(load_model(run, "end")).map(site_name);',
                    tmp_path)
    assert said == [analyze.name_sites([site], model.loop_names) for site in all_sites(model)]


@pytest.mark.parametrize("name", RUNS)
def test_queries_are_of_their_split_and_answered_rightly(runs, pages, name):
    run = data_of(pages[name])["runs"][0]
    for split, kind in analyze.EXAMINED.items():
        rows = run["queries"][kind]
        for weights in grok.WEIGHTS:
            model, world, splits = explorer.load_rounded(runs[name], weights)
            if not rows:
                continue
            asked = as_queries(rows, world)
            assert (asked.b != asked.h).all()
            tokens, answers = grok.to_tokens(asked, world, model.config.layout)
            right = (analyze.predict(model, tokens) == answers).tolist()
            assert right == [weights == "end" or row[3] == 1 for row in rows]
        known = {tuple(row) for row in rows_of(splits[split])}
        assert len({tuple(row[:3]) for row in rows} & known) == len(rows) <= 300
    assert run["queries"]["ID"]


# ---------------------------------------------------------------- the opening pair
def check_opening(run):
    """The eleven names stand for eleven things; the swap is fair."""
    h, r1, r2 = run["opening"]["clean"]
    other_h, other_r1, other_r2 = run["opening"]["donor"]
    b = run["tails"][h][r1]
    other_b = run["tails"][other_h][other_r1]
    entities = [h, b, run["tails"][b][r2], other_h, other_b, run["tails"][other_b][other_r2],
                run["tails"][other_b][r2]]
    relations = [r1, r2, other_r1, other_r2]
    assert [run["entities"][one] for one in entities] == list(explorer.ENTITIES)
    assert [run["relations"][one] for one in relations] == list(explorer.RELATIONS)
    assert len(set(entities)) == 7 and len(set(relations)) == 4
    assert -1 not in entities
    first, second = run["queries"][run["opening"]["kind"]][:2]
    assert [first[:3], second[:3]] == [run["opening"]["clean"], run["opening"]["donor"]]
    assert len(set(run["entities"])) == len(run["entities"])


def test_the_shipped_page_opens_with_one_pair_that_works_in_both_models(shipped_page, tmp_path):
    runs = data_of(shipped_page)["runs"]
    assert [run["name"] for run in runs] == ["small, second_full, seed 0", "tiny, natural, seed 0"]
    assert analyze.name_sites([runs[0]["site"]], ["loop 1", "loop 2", "loop 3"]) == (
        "mixed, loop 3, r2")
    assert runs[0]["opening"] == runs[1]["opening"] and runs[0]["opening"]["named"]
    for run in runs:
        check_opening(run)
    outcomes = run_node(shipped_page, """
        return data.runs.map(run => {
          const model = load_model(run, "end");
          const [loop, part, position] = run.site;
          const clean = as_query(run, run.opening.clean);
          const donor = as_query(run, run.opening.donor);
          const theirs = values_of(model, [to_tokens(run, donor)]);
          const edit = swap(model, {loop, part, position}, theirs);
          const logits = model.forward([to_tokens(run, clean)], edit);
          const [answer] = top_1(logits, model.blank + 1);
          return [outcome_of(run, clean, donor, answer), run.entities[answer]];
        });""", tmp_path)
    assert outcomes == [["redirected", "Oslo"]] * 2


def test_the_shipped_page_answers_its_own_question(shipped_page, tmp_path):
    """A site that shows the bridge and redirects nothing: with the lens over entities alone."""
    n, all_tokens, entities, used = run_node(shipped_page, """
        const model = load_model(run, "end");
        const pairs = pairs_of(run, queries_of(run, "OOD", "end"), 100);
        const {n, counts} = [...count_sites(run, model, pairs)].at(-1);
        return [n, most_seen_unused(counts, n, "all"), most_seen_unused(counts, n, "entities"),
                most(counts, "redirected")];""", tmp_path)
    assert n == 100
    assert all_tokens["all"] < 10
    assert entities["site"] == {"loop": 1, "part": "state", "position": 2}      # state, loop 2, r2
    assert entities["entities"] >= 50 and entities["redirected"] == 0
    assert used["site"] == {"loop": 2, "part": "mixed", "position": 2}
    assert used["redirected"] >= 90


def test_own_facts_keep_their_names(pages):
    run = data_of(pages["causal"])["runs"][0]
    assert sorted(run["entities"]) == sorted(NAMES)
    assert not run["opening"]["named"]


# ---------------------------------------------------------------- the page
def test_forward_pass_has_the_names_and_the_order_of_grok(pages):
    script = Page(pages["causal"]).scripts["model"].strip()
    assert len(script.splitlines()) <= 200
    python = (ROOT / "grok.py").read_text(encoding="utf-8")
    wanted = ["unchanged", "TwoHopModel", "embed", "answer_position", "read", "unembed",
              "LoopedTransformer", "Block", "mlp", "rms_norm", "gated", "Attention", "rotate",
              "attend", "TokenMixing"]
    for pattern, text in ((r"^(?:def|class) (\w+)|^    def (\w+)", python),
                          (r"^(?:function|class) (\w+)|^  (\w+)\(.*\{", script)):
        names = []
        for first, second in re.findall(pattern, text, re.MULTILINE):
            name = first or second
            if name in wanted and name not in names:
                names.append(name)
        assert names == wanted


def test_loop_1_is_drawn_at_the_bottom(pages):
    page = Page(pages["tokens"]).scripts["page"]
    assert "for (let loop = n_loops - 1; loop >= 0; loop--)" in page
    assert 'for (const part of ["state", "mixed"])' in page


def test_names_stay_text(pages):
    page = Page(pages["causal"])
    assert [tag for tag, _ in page.elements].count("script") == 4
    assert "<" not in page.scripts["data"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.wr", page.scripts["page"])


def test_page_is_small_and_loads_nothing(pages, shipped_page):
    for page in (*pages.values(), shipped_page):
        assert len(page) < 1_000_000 and b"@import" not in page and b"url(" not in page
        elements = Page(page).elements
        assert not any({"src", "href", "srcset", "action"} & attributes.keys()
                       for _, attributes in elements)
        assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in elements}
        assert not re.search(rb"https?:|fetch\(|XMLHttpRequest|import\(|WebSocket", page)


def test_page_is_remade_byte_for_byte(runs, pages, tmp_path, capsys):
    again = tmp_path / "figures" / "explorer.html"
    again.parent.mkdir()
    for _ in range(2):
        assert explorer.main([str(runs["tokens"]), "-o", str(again)]) == 0
        link = data_of(again.read_bytes())["notebook"]
        assert (again.parent / link).resolve() == ROOT / "tutorial.ipynb"
        page = again.read_bytes().replace(json.dumps(link).encode(), b'"../tutorial.ipynb"')
        assert page == pages["tokens"]
    assert "KB" in capsys.readouterr().out


def test_several_runs_in_one_page_and_weights_at_the_end_alone(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["tokens"], folder)
    (folder / "fit.pt").unlink()
    shown = data_of(explorer.make_page([runs["causal"], folder]))["runs"]
    assert [list(run["weights"]) for run in shown] == [["fit", "end"], ["end"]]
    assert len(shown[1]["right"]["end"]) == 2


# ---------------------------------------------------------------- refusals
def refusal(argv, tmp_path, capsys):
    """The one line said; nothing is written."""
    capsys.readouterr()
    assert explorer.main([*map(str, argv), "-o", str(tmp_path / "page.html")]) == 2
    assert not list(tmp_path.glob("page.html*"))
    line = capsys.readouterr().err
    assert line.startswith("tools.explorer: ") and line.count("\n") == 1
    return line


def test_what_is_too_large_is_refused(tmp_path, capsys):
    train(tmp_path / "run", "--d-model", 144, "--n-blocks", 3, steps=1)
    assert "too large" in refusal([tmp_path / "run"], tmp_path, capsys)


def test_fine_tuned_and_recursive_runs_are_refused(tmp_path, capsys):
    train(tmp_path / "run", steps=1)
    tune = ["--start", tmp_path / "run", "--new-facts", 20, "--kept", 0.5, "--steps", 1,
            "--device", "cpu", "--out", tmp_path / "tuned"]
    assert grok.main([*map(str, tune)]) == 0
    assert "fine-tuned" in refusal([tmp_path / "tuned"], tmp_path, capsys)
    recursive = "--preset trm --n-entities 12 --n-relations 8 --out-degree 6 --ood-fraction 0.2"
    recursive += " --phi 4 --d-model 16 --steps 1 --device cpu --out"
    assert grok.main([*recursive.split(), str(tmp_path / "trm")]) == 0
    assert "model = recursive" in refusal([tmp_path / "trm"], tmp_path, capsys)


def test_unfinished_damaged_and_missing_runs_are_refused(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs["tokens"], folder)
    saved = torch.load(folder / "end.pt", weights_only=True)
    saved["weights"] = {name: 0 * weight for name, weight in saved["weights"].items()}
    torch.save(saved, folder / "end.pt")
    assert "fair pair" in refusal([folder], tmp_path, capsys)
    (folder / "end.pt").write_bytes(b"no weights")
    assert "end.pt" in refusal([folder], tmp_path, capsys)
    (folder / "end.pt").unlink()
    assert "end.pt" in refusal([folder], tmp_path, capsys)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text(lines[0] + "\n")
    assert "not finished" in refusal([folder], tmp_path, capsys)
    assert "nowhere" in refusal([runs["tokens"], tmp_path / "nowhere"], tmp_path, capsys)
    assert "--sed" in refusal(["--sed", "1"], tmp_path, capsys)


def test_it_runs_as_a_file_and_without_docstrings(runs, tmp_path):
    out = tmp_path / "page.html"
    argv = ["-OO", str(Path("tools", "explorer.py")), str(runs["tokens"]), "-o", str(out)]
    done = subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert data_of(out.read_bytes())["runs"][0]["config"]["mixing"] == "tokens"


# ---------------------------------------------------------------- what is shipped
def test_the_shipped_page_is_the_one_that_the_command_writes(shipped_page):
    assert explorer.make_page(explorer.DEFAULT) == shipped_page
