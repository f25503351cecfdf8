"""What extras/explorer.py promises: `pytest extras/test_explorer.py`.

The oracles are PyTorch, analyze.py, and an HTML parser; the page's own scripts run under Node.
"""
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
import torch

import analyze
import grok
from data import compositions, queries, Queries
from extras import explorer

ROOT = Path(explorer.__file__).resolve().parent.parent
NAMES = ["<script>alert(1)</script>", "</script>", "<!--", "<b>bold</b>", 'Zoë & "co"', "a  b",
         "a\u2028b", "'", "\\u003c", "@DATA@", "${x}", "ok"]
RUNS = {  # each dial of the model at least once in either position
    "causal": "--n-heads 2",
    "tokens": "--layout bidirectional --mixing tokens --tied false --copy true --slots 2",
    "other": "--layout bidirectional --restart false --mlp-residual true --n-blocks 2 --slots 1"}


def train(folder, options, steps=60):
    argv = ["--preset", "smoke", "--device", "cpu", "--steps", str(steps), "--out", str(folder)]
    assert grok.main([*argv, *options.split()]) == 0


def write_facts(path):
    """Facts with NAMES, five a head."""
    rng, lines = np.random.default_rng(0), []
    for head in NAMES:
        for relation in rng.permutation(7)[:5]:
            lines.append(f"{head}\t<r{relation}>\t{NAMES[rng.integers(len(NAMES))]}\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_before(folder):
    """Weights for before.pt: those at the end, and a little noise."""
    saved = torch.load(folder / "after.pt", weights_only=True)
    noise = torch.Generator().manual_seed(0)
    for name, weight in saved["weights"].items():
        saved["weights"][name] = weight + 0.1 * torch.randn(weight.shape, generator=noise)
    torch.save(saved, folder / "before.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{name: folder of a run}, the first with facts of its own."""
    root = tmp_path_factory.mktemp("runs")
    write_facts(root / "facts.tsv")
    for name, options in RUNS.items():
        own = f" --phi 2 --data {root / 'facts.tsv'}" if name == "causal" else ""
        train(root / name, options + own)
        write_before(root / name)
    return {name: root / name for name in RUNS}


@pytest.fixture(scope="module")
def pages(runs):
    return {name: explorer.make_page(folder) for name, folder in runs.items()}


class Page(HTMLParser):
    """The elements of a page [(tag, attributes)], and the text of its scripts by id."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.scripts = [], {}
        self.feed(page.decode())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, text):
        tag, attributes = self.elements[-1] if self.elements else ("", {})
        if tag == "script" and text.strip():
            self.scripts[attributes["id"]] = self.scripts.get(attributes["id"], "") + text


def ask_node(page, program, tmp_path):
    """The JSON that a program prints after the page's model and patching; it knows `data`."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("no Node.js here to run the page's script")
    scripts = Page(page).scripts
    (tmp_path / "data.json").write_text(scripts["data"], encoding="utf-8")
    read = f"const data = JSON.parse(require('fs').readFileSync({json.dumps('data.json')}));\n"
    text = scripts["model"] + scripts["patching"] + read
    text += f"console.log(JSON.stringify({program}));"
    (tmp_path / "run.js").write_text(text, encoding="utf-8")
    done = subprocess.run([node, "run.js"], cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def rounded(folder, stage):
    """(model with weights in half precision, world, splits) of a run."""
    model, world, splits = grok.load_run(folder, stage)
    for weight in model.parameters():
        weight.copy_(weight.half().float())
    return model, world, splits


def as_queries(rows, world):
    """Queries from rows (h, r1, r2, ...), by looking the facts up."""
    h, r1, r2 = np.array(rows)[:, :3].T
    b = world.facts[world.index[h, r1], 2]
    return Queries(h, r1, r2, b, world.facts[world.index[b, r2], 2])


# ---------------------------------------------------------------- the numbers
@pytest.mark.parametrize("stage", grok.WEIGHTS)
@pytest.mark.parametrize("name", RUNS)
def test_logits_are_those_of_pytorch_on_50_queries_and_50_patched_ones(runs, pages, name, stage,
                                                                      tmp_path):
    model, world, _ = rounded(runs[name], stage)
    asked = queries(world, *compositions(world))
    asked = asked.take(np.random.default_rng(0).permutation(len(asked.h)))
    clean, donor = asked.take(slice(50)), asked.take(slice(50, 100))
    tokens, ours, theirs = analyze.prepared(model, world, clean, donor)
    sites = list(np.ndindex(ours.shape[0], 2, ours.shape[3]))
    wanted = []
    for i in range(50):                          # another site for each query
        loop, part, position = site = sites[i % len(sites)]
        put = {site: theirs[loop, part, i:i + 1, position]}
        wanted.append(analyze.patch(model, tokens[i:i + 1], put)[0])
    top = analyze.logit_lens(model, tokens)                              # (n_loops, 2, 50, T)
    donor_tokens, _ = grok.to_tokens(donor, world, model.config.layout)
    found = ask_node(pages[name], f"""(() => {{
        const model = load_model(data, "{stage}"), sites = sites_of(model);
        const tokens = {tokens.tolist()}, donors = {donor_tokens.tolist()};
        const theirs = donors.map(query => values_of(model, [query]));
        const patched = tokens.map((query, i) => [...model.forward(
            [query], swap(model, sites[i % sites.length], theirs[i]))]);
        const top = values_of(model, tokens).map(
            value => PARTS.map(part => logit_lens(model, value[part])));
        return {{logits: [...model.forward(tokens)], patched, top}}; }})()""", tmp_path)
    logits = model(tokens)
    got, wanted = torch.tensor(found["logits"]).view(logits.shape), torch.stack(wanted)
    assert logits.std() > 0.1 and not torch.allclose(wanted, logits, atol=0.1)
    torch.testing.assert_close(got, logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(found["patched"]), wanted, atol=1e-3, rtol=0)
    shown = []
    for part in chain.from_iterable(found["top"]):
        shown.append([one["token"] for one in part])
    assert np.mean(shown == top.flatten(2).flatten(0, 1).numpy()) > 0.999  # but for a tie
    shares = np.array([one["probability"] for one in found["top"][-1][1]]).reshape(top.shape[2:])
    last = model.unembed(analyze.values_of(model, tokens)[-1, 1]).softmax(-1).amax(-1)
    np.testing.assert_allclose(shares, last, atol=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_maps_are_those_of_analyze_and_pairs_are_fair(runs, pages, name, tmp_path):
    model, world, _ = rounded(runs[name], "grokked")
    pairs, counts = ask_node(pages[name], """(() => {
        const model = load_model(data, "grokked");
        const pairs = pairs_of(data, queries_of(data, "ID", "grokked"), 30);
        return [pairs, [...count_sites(data, model, pairs)].at(-1).counts]; })()""", tmp_path)
    columns = [itemgetter("h", "r1", "r2")(one) for pair in pairs for one in pair]
    clean, donor = as_queries(columns[::2], world), as_queries(columns[1::2], world)
    t = analyze.tail(world, donor.b, clean.r2)
    assert len(pairs) > 1 and (t >= 0).all()
    for ours, theirs in ((clean.r2, donor.r2), (clean.b, donor.b), (clean.t, donor.t), (t, clean.t),
                         (t, donor.t)):
        assert (ours != theirs).all()
    tokens, _, values = analyze.prepared(model, world, clean, donor)
    used = analyze.patch_map(model, tokens, values, torch.from_numpy(t))["redirected"]
    seen = analyze.logit_lens(model, tokens) == torch.from_numpy(clean.b)[:, None]
    for what, wanted in (("used", used), ("seen", seen.float().mean(2))):
        got = np.array([count[what] for count in counts]) / len(pairs)
        np.testing.assert_allclose(got, np.ravel(wanted), atol=1e-6)


@pytest.mark.parametrize("name", RUNS)
def test_queries_are_of_their_split_and_answered_rightly(runs, pages, name):
    data = json.loads(Page(pages[name]).scripts["data"])
    for kind, split in (("ID", "test_id"), ("OOD", "test_ood")):
        rows = data["queries"][kind]
        for stage in grok.WEIGHTS:
            model, world, splits = rounded(runs[name], stage)
            asked = as_queries(rows, world) if rows else splits[split].take(slice(0))
            tokens, answers = grok.to_tokens(asked, world, model.config.layout)
            right = (analyze.predict(model, tokens) == answers).tolist() if rows else []
            assert right == [stage == "grokked" or row[3] == 1 for row in rows]
        known = set(zip(*(column.tolist() for column in splits[split][:3])))
        assert len({tuple(row[:3]) for row in rows} & known) == len(rows) <= 300
    assert data["queries"]["ID"]


# ---------------------------------------------------------------- the page
def test_forward_pass_is_150_lines_with_the_names_and_the_order_of_grok(pages):
    script = Page(pages["causal"]).scripts["model"].strip()
    assert len(script.splitlines()) <= 150
    python = (ROOT / "grok.py").read_text(encoding="utf-8")
    for pattern, text in ((r"^(?:def|class) (\w+)|^    def (\w+)", python),
                          (r"^(?:function|class) (\w+)|^  (\w+)\(.*\{", script)):
        names = [first or second for first, second in re.findall(pattern, text, re.MULTILINE)]
        wanted = ["rms_norm", "rotate", "attend", "Attention", "TokenMixing", "Block",
                  "LoopedTransformer", "answer_position", "read", "unembed"]
        assert [name for name in names if name in wanted] == wanted


def test_names_stay_text(pages):
    page = Page(pages["causal"])
    assert [tag for tag, _ in page.elements].count("script") == 4
    assert set(json.loads(page.scripts["data"])["entities"]) == set(NAMES)
    assert "<" not in page.scripts["data"]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.wr", page.scripts["page"])


def test_page_is_small_and_loads_nothing(pages):
    for page in pages.values():
        assert len(page) < 600_000 and b"@import" not in page and b"url(" not in page
        elements = Page(page).elements
        assert not any({"src", "href", "srcset", "action"} & attributes.keys()
                       for _, attributes in elements)
        assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in elements}
        assert not re.search(rb"https?:|fetch\(|XMLHttpRequest|import\(|WebSocket", page)


def test_controls_are_native_and_the_result_is_announced(pages):
    elements = Page(pages["tokens"]).elements
    assert all("aria-label" in attributes for tag, attributes in elements if tag == "select")
    live = [about["id"] for _, about in elements if about.get("aria-live") == "polite"]
    assert live == ["said", "found"]
    assert elements[0][1] == {"lang": "en"} and "outline: none" not in pages["tokens"].decode()


def test_page_is_remade_byte_for_byte(runs, pages, tmp_path, capsys):
    again = tmp_path / "figures" / "explorer.html"
    again.parent.mkdir()
    for _ in range(2):
        assert explorer.main([str(runs["tokens"]), "-o", str(again)]) == 0
        link = json.loads(Page(again.read_bytes()).scripts["data"])["notebook"]
        assert (again.parent / link).resolve() == ROOT / "tutorial.ipynb"
        page = again.read_bytes().replace(json.dumps(link).encode(), b'"../tutorial.ipynb"')
        assert page == pages["tokens"]
    assert "KB" in capsys.readouterr().out


def test_a_run_without_before_shows_grokked_alone(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["tokens"], folder)
    (folder / "before.pt").unlink()
    data = json.loads(Page(explorer.make_page(folder)).scripts["data"])
    assert list(data["weights"]) == ["grokked"]


# ---------------------------------------------------------------- refusals
def refusal(argv, tmp_path, capsys):
    """The one line said; nothing is written."""
    capsys.readouterr()
    assert explorer.main([*map(str, argv), "-o", str(tmp_path / "page.html")]) == 2
    assert not list(tmp_path.glob("page.html*"))
    line = capsys.readouterr().err
    assert line.startswith("explorer.py: ") and line.count("\n") == 1
    return line


def test_a_run_that_is_too_large_is_refused(tmp_path, capsys):
    train(tmp_path / "run", "--d-model 128 --n-blocks 3", steps=1)
    assert "too large" in refusal([tmp_path / "run"], tmp_path, capsys)


def test_a_fine_tuned_run_is_refused(tmp_path, capsys):
    train(tmp_path / "run", "", steps=1)
    tune = ["--preset", "tune", "--start", tmp_path / "run", "--new-facts", 20, "--kept", 0.5,
            "--steps", 1, "--device", "cpu", "--out", tmp_path / "tuned"]
    assert grok.main([*map(str, tune)]) == 0
    assert "fine-tuned" in refusal([tmp_path / "tuned"], tmp_path, capsys)


def test_a_run_without_weights_or_without_right_answers_is_refused(runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(runs["tokens"], folder)
    saved = torch.load(folder / "after.pt", weights_only=True)
    saved["weights"] = {name: 0 * weight for name, weight in saved["weights"].items()}
    torch.save(saved, folder / "after.pt")
    assert "fair pair" in refusal([folder], tmp_path, capsys)
    (folder / "after.pt").unlink()
    assert "after.pt" in refusal([folder], tmp_path, capsys)
    assert "nowhere" in refusal([tmp_path / "nowhere"], tmp_path, capsys)


# ---------------------------------------------------------------- what is shipped
def test_the_shipped_page_is_the_one_that_the_command_writes():
    shipped = (ROOT / "figures" / "explorer.html").read_bytes()
    assert explorer.make_page(ROOT / explorer.DEFAULT) == shipped
