"""The numbers in the pages are those of the runs behind them, and what they point to is there.

    python -m pytest -q report/check_numbers.py

Not part of the tests of the code: a change of the code leaves these numbers as they are, and a run
that is added or repeated changes them. Every table that follows its command, a line of the form
`python plot.py ... --table`, is compared with what that command prints.
"""

import glob
import re
import shlex
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot
import runs
from hybrid import MODELS, build_model, state_bytes
from summary import DEFAULTS, load

PAGES = ["README.md", "report/README.md", "report/bench/README.md"]
TABLE = re.compile(r"^python plot\.py ([^\n`]*--table[^\n`]*)\n```\n\n((?:\|.*\n)+\n.*\n)", re.M)
TABLES = [(page, *found) for page in PAGES for found in
          TABLE.findall((ROOT / page).read_text(encoding="utf-8"))]
RESULTS = sorted(path for path in ROOT.glob("report/*/*.json")
                 if path.parent.name not in ("published", "bench"))


def expand(words):
    """What a shell makes of the words: the files that a pattern names, in order."""
    found = []
    for word in words:
        found += sorted(glob.glob(word)) or [word]
    return found


@pytest.mark.parametrize("page, flags, table", TABLES, ids=[flags for _, flags, _ in TABLES])
def test_table(page, flags, table, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    plot.main(expand(shlex.split(flags)))
    assert table == capsys.readouterr().out


def test_there_are_tables():
    assert len(TABLES) >= 5


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Every figure and every file that a page points to exists."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith("http"):
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_files_of_commands(page):
    """Every pattern of committed runs in a command names files."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for command in re.findall(r"^python \w+\.py ([^\n]*)", text, re.M):
        for word in shlex.split(command):
            assert not word.startswith("report/") or glob.glob(str(ROOT / word)), word


def test_every_result_is_whole():
    assert len(RESULTS) > 2500
    for path in RESULTS:
        result = runs.read_result(path)
        assert result, path
        curve, tested = result["train"], result["eval"]
        assert path.stem == runs.run_name({**DEFAULTS, **result["config"]}), path
        assert len(curve["step"]) == len(curve["loss"]) == len(curve["accuracy"]) > 0, path
        assert tested["length"] == sorted(set(tested["length"])), path
        for accuracy in curve["accuracy"] + tested["accuracy"]:
            assert 0 <= accuracy <= 1, path


@pytest.mark.parametrize("path", sorted(ROOT.glob("report/checkpoints/*.pt")), ids=str)
def test_checkpoints_load(path):
    model, config = runs.load_run(str(path))
    assert model.n_params() > 0 and config["task"] == "recall"


ROWS = re.findall(r"^\| `([\w-]+)` \| [^|]* \| ([\d,]+) \| ([\d,]+) / ([\d,]+) \| ([\d.]*) "
                  r"\| ([\d.]*) *\|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)


def lowest(folder, model, M, d=8):
    """The median over seeds of the lowest accuracy from 64 to 192, as the page writes it."""
    paths = ROOT.glob(f"report/{folder}/{model}_M{M}_tau1_K16_d{d}_L64_*.json")
    found = [load(str(path))["lowest"] for path in paths]
    return f"{statistics.median(found):.2f}" if found else ""


def test_the_models_of_the_front_page():
    assert [row[0] for row in ROWS] == list(MODELS)
    for model, params, at_64, at_4096, one, sixteen in ROWS:
        network = build_model(model)
        assert params == f"{network.n_params():,}", model
        assert at_64 == f"{state_bytes(network, 64):,}", model
        assert at_4096 == f"{state_bytes(network, 4096):,}", model
        assert one == lowest("problem1", model, 1), model
        assert sixteen == (lowest("problem2", model, 16) or lowest("sixteen", model, 16)), model


def test_the_widths_of_the_front_page():
    rows = re.findall(r"^\| (\d+)" + r" \| ([\d.]+)" * 4 + r" \|$",
                      (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert [row[0] for row in rows] == ["8", "16", "32", "64"]
    for d, rope, mamba, conv, hybrid in rows:
        folder = "problem2" if d == "8" else "width"
        found = [lowest(folder, model, 16, d) for model in ("rope", "mamba", "hybrid-a")]
        assert [rope, mamba, hybrid] == found, d
        assert conv == lowest("filter", "conv+attention", 16, d), d


REACH = re.findall(r"^\| (\d+) \| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|$",
                   (ROOT / "report" / "README.md").read_text(encoding="utf-8"), re.M)


def reach(model, M, d):
    """The longest delay at which, as at all shorter delays tried, the median of five seeds reaches
    0.99 at the training length, as the page writes it."""
    at = {}
    for path in ROOT.glob(f"report/filter/{model}_M{M}_tau*_K16_d{d}_L64_seed*.json"):
        run = load(str(path))
        at.setdefault(run["config"]["tau"], []).append(run["at"])
    assert all(len(seeds) == 5 for seeds in at.values()), (model, M, d)
    delays = sorted(at)
    recalled = [statistics.median(at[tau]) >= 0.99 for tau in delays]
    if all(recalled):
        return f"{delays[-1]} or more"
    first = recalled.index(False)
    assert delays[first] == (delays[first - 1] + 1 if first else 1), "one before was not tried"
    return str(delays[first - 1]) if first else "none"


def test_how_far_each_brings_a_query():
    assert len(REACH) == 10
    for M, d, *cells in REACH:
        models = ["conv+attention", "mamba-noconv+attention", "mamba+attention"]
        assert cells == [reach(model, M, d) for model in models], (M, d)
