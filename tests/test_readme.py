"""Every command in the README runs, made small, in the order in which it stands there."""

import glob
import json
import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import plot
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = "--steps 2 --L 12 --seed 0 --batch-size 4 --device cpu".split()


def commands():
    """The python commands of the README, in code blocks and in line, without what stands before an &&."""
    found = re.findall(r"python (?:train|eval|plot)\.py[^`\n]*", README)
    assert len(found) >= 10
    return found


def test_every_command_runs(tmp_path, monkeypatch, capsys):
    (tmp_path / "results").mkdir()
    for folder in "reference", "bench":
        (tmp_path / "results" / folder).symlink_to(ROOT / "results" / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "TEST_SEQUENCES", 8)
    monkeypatch.setattr(train, "TEST_BATCH", 8)
    for command in commands():
        script, *words = shlex.split(command)[1:]
        words = [re.sub(r"_L\d+_(.+\.pt)$", r"_L12_\1", word) for word in words]
        for name in words:
            if name.endswith(".pt") and not Path(name).exists():
                model, M, tau, d = re.match(r"results/(.+)_M(\d+)_tau(\d+)_K16_d(\d+)_", name).groups()
                train.main(["--model", model, "--M", M, "--tau", tau, "--d", d] + SMALL)
        if script == "train.py":
            train.main(words + SMALL)
        elif script == "plot.py":
            plot.main([f for word in words for f in (sorted(glob.glob(word)) or [word])])
        else:
            evaluation.main([words[0], "--sequences", "4", "--lengths", "13", "200"])
    assert list(tmp_path.glob("results/rope_M4_tau1_*.json")) and list(tmp_path.glob("figures/*.png"))


@pytest.mark.parametrize("script", [train, evaluation, plot])
def test_help_names_every_flag_that_the_readme_uses(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    name = {train: "train", evaluation: "eval", plot: "plot"}[script]
    flags = {flag for command in commands() if f"{name}.py" in command for flag in re.findall(r"--[\w-]+", command)}
    assert flags <= set(re.findall(r"--[\w-]+", text))


def test_readme_names_every_script_and_nothing_that_is_not_there():
    scripts = {path.name for path in ROOT.glob("*.py")}
    assert scripts == set(re.findall(r"`(\w+\.py)`", README))
    for figure in re.findall(r"\]\((\S+?\.png)\)", README):
        assert (ROOT / figure).exists(), figure


def results():
    """The reference runs, by model, M and tau: a list of results, one for each seed."""
    runs = {}
    for path in sorted(ROOT.glob("results/reference/*.json")):
        result = json.loads(path.read_text())
        runs.setdefault(tuple(result["config"][flag] for flag in ("model", "M", "tau")), []).append(result)
    return runs


def test_every_number_of_the_results_table_is_the_one_in_results():
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d+) \| (.+) \|$", README, re.M)
    assert len(rows) >= 10
    runs = results()
    assert {(model, int(M), int(tau)) for model, M, tau, *_ in rows} == set(runs)
    for model, M, tau, seeds, numbers in rows:
        of_setting = runs[model, int(M), int(tau)]
        assert int(seeds) == len(of_setting)
        solved, at, beyond = [], [], []
        for run in of_setting:
            accuracy = dict(zip(run["eval"]["length"], run["eval"]["accuracy"]))
            curve = zip(run["train"]["step"], run["train"]["accuracy"])
            solved.append(min((step for step, a in curve if a >= 0.99), default=float("inf")))
            at.append(accuracy[64])
            beyond.append(min(a for n, a in accuracy.items() if 64 <= n <= 192))
        steps = "never" if median(solved) == float("inf") else f"{median(solved):.0f}"
        expected = [f"{number:.3f}" for number in (median(at), min(at), median(beyond), min(beyond))]
        assert numbers.split(" | ") == [steps, *expected], (model, M, tau)


def test_every_time_on_a_cpu_is_the_one_that_was_measured():
    tables = json.loads((ROOT / "results" / "bench" / "cpu.json").read_text())["bench"]
    forms = ["recurrence", "chunked", "parallel", "mambapy"]
    measured = {(tuple(row["shape"]), row["form"]): f"{row['ms']:.1f}" for row in tables["scan"]}
    rows = re.findall(r"^\| (\d+), (\d+), (\d+), (\d+) \| (.+) \|$", README.split("On 2 CPU cores")[1], re.M)
    assert len(rows) == 3
    for *shape, times in rows:
        expected = [measured.get((tuple(map(int, shape)), form), "") for form in forms]
        assert [time.strip() for time in times.split("|")] == expected
    steps = re.search(r"A training step there takes (.+?) ms", README.replace("\n", " ")).group(1)
    assert steps == ", ".join(f"{row['ms']:.1f} (`{row['model']}`)" for row in tables["step"])


def test_results_are_of_the_present_defaults():
    _, defaults = train.parse([])
    own = {"model", "M", "tau", "seed", "device", "out", "overwrite"}
    for runs in results().values():
        for run in runs:
            for flag, value in vars(defaults).items():
                assert flag in own or run["config"][flag] == (value[0] if isinstance(value, list) else value), flag
            every, last = run["config"]["steps"] // train.POINTS, train.last_step(run["train"], run["config"])
            assert run["train"]["step"][-1] == last - last % every, "this run ended when a former version would have ended it"


def median(values):
    values = sorted(values)
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2
