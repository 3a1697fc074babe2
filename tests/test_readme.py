"""Every command in the README runs, made small, in the order in which it stands there."""

import glob
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import eval as evaluation
import plot
import train
from hybrid import FAMILY, MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SMALL = "--steps 2 --L 12 --seed 0 --batch-size 4 --device cpu".split()


def commands():
    """The python commands of the README, in code blocks and in line, without what stands before an &&."""
    found = re.findall(r"python (?:train|eval|plot)\.py[^`\n]*", README)
    assert len(found) >= 10
    return found


def test_every_command_runs(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "TEST_SEQUENCES", 8)
    monkeypatch.setattr(train, "TEST_BATCH", 8)
    for command in commands():
        script, *words = shlex.split(command)[1:]
        words = [re.sub(r"_L\d+_(.+\.pt)$", r"_L12_\1", word) for word in words]
        for name in words:
            if name.endswith(".pt") and not Path(name).exists():
                folder, model, M, tau, d = re.match(r"(results.*)/(.+)_M(\d+)_tau(\d+)_K16_d(\d+)_", name).groups()
                train.main(["--model", model, "--M", M, "--tau", tau, "--d", d, "--out", folder] + SMALL)
        if script == "train.py":
            train.main(words + SMALL)
        elif script == "plot.py":
            plot.main([f for word in words for f in (sorted(glob.glob(word)) or [word])])
        else:
            evaluation.main([words[0], "--sequences", "4", "--lengths", "13", "200"])
    assert list(tmp_path.glob("results/rope_M4_tau1_*.json"))
    drawn = {path.name for path in tmp_path.glob("figures/*.png")}
    shown = {name for name in re.findall(r"\(figures/(\S+?\.png)\)", README) if not name.startswith("inside_")}
    assert shown <= drawn, "a figure of the README that no command of the README draws"


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


def results(*folders):
    """The runs in folders of results/, by model, d, M and tau: a list of results, one for each seed."""
    runs = {}
    for folder in folders:
        for path in sorted(ROOT.glob(f"results/{folder}/*.json")):
            result = json.loads(path.read_text())
            runs.setdefault(tuple(result["config"][flag] for flag in ("model", "d", "M", "tau")), []).append(result)
    return runs


def accuracies(run):
    return dict(zip(run["eval"]["length"], run["eval"]["accuracy"]))


def lowest_beyond(run):
    return min(a for n, a in accuracies(run).items() if 64 <= n <= 192)


def steps_to_solve(runs):
    """The median of the steps after which a test batch was first at 0.99, in words."""
    curves = [zip(run["train"]["step"], run["train"]["accuracy"]) for run in runs]
    steps = median([min((step for step, a in curve if a >= 0.99), default=float("inf")) for curve in curves])
    return "never" if steps == float("inf") else f"{steps:.0f}"


def test_every_number_of_the_results_table_is_the_one_in_results():
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (.+) \| ([\d.]*) *\|$", README, re.M)
    assert len(rows) >= 20
    runs, on_cpu = results("problem1", "problem2", "problem3"), results("reference")
    assert {(model, *map(int, setting)) for model, *setting, _, _, _ in rows} == set(runs)
    for model, *setting, seeds, numbers, cpu in rows:
        setting = (model, *map(int, setting))
        assert int(seeds) == len(runs[setting])
        at, beyond = ([measure(run) for run in runs[setting]] for measure in (lambda run: accuracies(run)[64], lowest_beyond))
        expected = [f"{number:.3f}" for number in (median(at), min(at), median(beyond), min(beyond))]
        assert numbers.split(" | ") == [steps_to_solve(runs[setting]), *expected], setting
        assert cpu == (f"{median(map(lowest_beyond, on_cpu[setting])):.3f}" if setting in on_cpu else ""), setting


def at_and_beyond(runs):
    """The cells of the family's tables: median and worst at 64, then to 192, and the median of the steps to 0.99."""
    pairs = [[measure(run) for run in runs] for measure in (lambda run: accuracies(run)[64], lowest_beyond)]
    return [*(f"{median(values):.2f} / {min(values):.2f}" for values in pairs), steps_to_solve(runs)]


def test_the_numbers_of_the_family_are_those_in_results():
    family, equal = results("family"), results("family_equal")
    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d\.\d\d / .+) \|$", README, re.M)
    assert [row[0] for row in rows] == [*MODELS, *FAMILY]
    measured = {row["model"]: row for row in json.loads((ROOT / "report/bench/h200.json").read_text())["bench"]["family"]}
    for model, params, cells in rows:
        runs = [family[model, 16, M, 1] for M in (1, 4, 16)]
        assert all(len(of_M) == 5 and {run["params"] for run in of_M} == {int(params)} for of_M in runs)
        bench = measured[model]
        expected = [*sum(map(at_and_beyond, runs), []), f"{bench['ms']:.2f}", *map(str, bench["state_bytes"])]
        assert cells.split(" | ") == expected and bench["params"] == int(params), model

    rows = re.findall(r"^\| `([\w-]+)` \| (\d+) \| (\d+) \| (\d\.\d\d / .+) \|$", README, re.M)
    assert {row[0] for row in rows} == {*MODELS, *FAMILY} - {"rnn"}
    for model, d, params, cells in rows:
        runs = [(family if model == "mamba2-hybrid" else equal)[model, int(d), M, 1] for M in (1, 4, 16)]
        assert all(len(of_M) == 5 and {run["params"] for run in of_M} == {int(params)} for of_M in runs)
        assert cells.split(" | ") == sum(map(at_and_beyond, runs), []), model


def test_the_numbers_beside_the_project_page_are_those_in_results():
    rows = re.findall(r"^\| (\d) \| `([\w-]+)` \| (.+) \| ([\d.]+) million \|$", README, re.M)
    assert len(rows) == 12
    for tau, model, numbers, millions in rows:
        runs = results("page")[model, 8, 1, int(tau)]
        assert len(runs) == 5
        curve = json.loads((ROOT / f"report/published/page_tau{tau}.json").read_text())["curves"][model]
        expected = [f"{median(accuracies(run)[length] for run in runs):.2f} / {theirs:.2f}"
                    for length, theirs in zip(curve["length"], curve["accuracy"])]
        assert numbers.split(" | ") == expected and curve["length"] == [7, 15, 31, 63, 95, 127]
        assert millions == f"{median(run['train']['step'][-1] * run['config']['batch_size'] for run in runs) / 1e6:.2f}"


def training_steps():
    """What the README says of a training step, on the GPU and on the CPU."""
    return re.findall(r"A training step there,? [a-z ,]*?takes (.+?) ms", README.replace("\n", " "))


def test_every_time_on_a_gpu_is_the_one_that_was_measured():
    tables = json.loads((ROOT / "results" / "bench" / "h200.json").read_text())["bench"]
    assert training_steps()[0] == ", ".join(f"{row['ms']:.2f} (`{row['model']}`)" for row in tables["step"])
    rows = tables["scan"]
    measured = {(tuple(row["shape"]), row["form"]): row for row in rows}
    text = README.split("On an NVIDIA H200 (")[1].split("On 2 CPU cores")[0]
    table = re.findall(r"^\| (\d+), (\d+), (\d+), (\d+) \| (.+) \| (\d+) \|$", text, re.M)
    assert len(table) == 4
    for *shape, times, megabytes in table:
        shape = tuple(map(int, shape))
        found = [measured.get((shape, form)) for form in ("recurrence", "chunked", "parallel", "mamba-2", "mambapy")]
        assert [time.strip() for time in times.split("|")] == ["" if row is None else f"{row['ms']:.3f}" for row in found]
        assert int(megabytes) == round(found[2]["megabytes"])
    first = [row["first_call_s"] for row in rows if row["form"] == "parallel"]
    text = " ".join(README.split())
    assert f"compiles, for {min(first):.0f} to {max(first):.0f} seconds" in text
    of = {row["model"]: row["first_call_s"] for row in tables["step"]}
    assert f"are compiled, which took up to {max(of.values()):.0f} seconds" in text
    others = [seconds for model, seconds in of.items() if model != "mamba"]
    assert f"took {of['mamba']:.0f} seconds for `mamba` and {min(others):.0f} to {max(others):.0f} for the others" in text


def test_what_was_measured_by_hand_is_as_it_was_written_down():
    rows = {row["what"]: row for row in json.loads((ROOT / "report/bench/by_hand.json").read_text())["by_hand"]}
    find = lambda *words: next(row for what, row in rows.items() if all(word in what for word in words))
    text = " ".join(README.split())
    fresh, kept = (median(us) for us in find("C library")["us"])
    assert f"it was {kept:.0f} in place of {fresh:.0f}" in text
    for model in ("mamba", "rope"):
        one, two = find("one and on two GPUs", model)["ms"]
        assert re.search(rf"a step of `{model}` (takes )?{two:g} (ms )?in place of {one:g}", text), model
    assert find("bench.py, from the shell")["s"] < 5 * 60
    assert f"in less than five minutes ({find('bench.py, from the shell')['s']} seconds," in text
    assert "took {:.0f} seconds on one and {:.0f} on two".format(*find("one and on two GPUs", "mamba")["first_call_s"]) in text
    row = find("mamba_ssm's CUDA kernel")
    kernel = "{:.3f}, {:.3f}, {:.3f} and {:.2f} ms".format(*row["ms"])
    assert f"`mamba_ssm` took {kernel} at these shapes, and {row['megabytes']} MB at the last" in text
    ours = [row for row in json.loads((ROOT / "report/bench/h200.json").read_text())["bench"]["scan"] if row["form"] == "parallel"]
    assert all(a["ms"] <= b for a, b in zip(ours, row["ms"], strict=True)), "at least as fast here"
    row = find("compiled for the CPU")
    compiled, chunked = ("{:.1f}, {:.1f} and {:.1f}".format(*of_shapes) for of_shapes in row["ms"])
    first = row["first_call_s"]
    assert (f"Compiled for the CPU, in {min(first):.0f} to {max(first):.0f} seconds, it took {compiled} ms, and the chunked "
            f"form in the same process {chunked}:") in text
    process = find("most memory of eval.py")["megabytes"]
    assert f"takes {process[0]} MB for 2^10 tokens, {process[1]} for 2^12 and {process[-1]} for 2^20" in text
    runs = [f"{min(ms):.2f} to {max(ms):.2f}" for ms in find("four runs of bench.py")["ms"]]
    assert "`rope` took {} ms, `mamba` {} and `hybrid-b` {}.".format(*runs) in text
    chunked, mambapy = (sorted(ms)[1:] for ms in find("runs of bench.py", "mambapy")["ms"])        # but for the fastest run
    assert f"took {chunked[0]:.1f} to {chunked[-1]:.1f} ms in the first line and `mambapy` {mambapy[0]:.1f} to {mambapy[-1]:.1f}" in text
    commands = find("train.py --model rope")["s"], find("train.py --model mamba")["s"]
    assert f"it took {commands[0]} seconds, and {commands[1]} seconds" in text


def test_every_time_on_a_cpu_is_the_one_that_was_measured():
    tables = json.loads((ROOT / "results" / "bench" / "cpu.json").read_text())["bench"]
    forms = ["recurrence", "chunked", "parallel", "mamba-2", "mambapy"]
    measured = {(tuple(row["shape"]), row["form"]): f"{row['ms']:.1f}" for row in tables["scan"]}
    rows = re.findall(r"^\| (\d+), (\d+), (\d+), (\d+) \| (.+) \|$", README.split("On 2 CPU cores")[1], re.M)
    assert len(rows) == 3
    for *shape, times in rows:
        expected = [measured.get((tuple(map(int, shape)), form), "") for form in forms]
        assert [time.strip() for time in times.split("|")] == expected
    assert training_steps()[1] == ", ".join(f"{row['ms']:.1f} (`{row['model']}`)" for row in tables["step"])


def test_the_numbers_of_table_2_are_those_in_results():
    lines = re.findall(r"^\| `(\w+)`(, slower|, mixed|, the paper)? \| (\d+) \| ([\d.]+) million \| (.+)\|$", README, re.M)
    assert len(lines) == 8
    powers = [int(power) for power in re.search(r"^\| model \| runs \| sequences \|(.+)$", README, re.M).group(1).replace(
        "|", " ").replace("2^", "").split()]
    published = json.loads((ROOT / "report/published/table2.json").read_text())["curves"]
    for model, kind, count, millions, cells in lines:
        if kind == ", the paper":
            runs = [published[model]]
        else:
            runs = results({"": "table2", ", slower": "table2_slow", ", mixed": "table2_uniform"}[kind])[model, 64, 1, 1]
            runs = [run for run in runs if max(run["eval"]["length"]) > 768 and run["train"]["accuracy"][-1] > 0.9]
            assert millions == f"{median(run['train']['step'][-1] * run['config']['batch_size'] for run in runs) / 1e6:.2f}"
            runs = [run["eval"] for run in runs]
        assert int(count) == len(runs)
        curves = [dict(zip(run["length"], run["accuracy"])) for run in runs]
        found = [[curve[2**power] for curve in curves if 2**power in curve] for power in powers]
        assert [cell.strip() for cell in cells.split("|")] == [f"{median(a):.2f}" if a else "" for a in found], (model, kind)
    perfect = [run["eval"] for run in results("table2")["mamba", 64, 1, 1] if run["eval"]["length"][-1] == 2**20]
    assert len(perfect) == 3
    assert all(a == 1 for run in perfect for n, a in zip(run["length"], run["accuracy"]) if n >= 64 and n & (n - 1) == 0)


OWN_FLAGS = {  # of the runs in a folder of results/, beside those that name a run
    "reference": {}, "problem1": {}, "problem2": {}, "problem3": {}, "page": {}, "capacity": {},
    "family": {}, "family_equal": {}, "uniform": {"train_lengths": "uniform"},
    "capacity_states": {"d_state": 4}, "capacity_states64": {"d_state": 64}, "capacity_mimetic": {"init": "mimetic"},
    "table2": {"batch_size": 16, "steps": 10000, "stop_early": False, "lr": 0.008},
    "table2_uniform": {"batch_size": 16, "steps": 10000, "stop_early": False, "lr": 0.008, "train_lengths": "uniform"},
    "table2_slow": {"batch_size": 8, "stop_early": False}}


def test_results_are_of_the_present_defaults():
    _, defaults = train.parse([])
    folders = {path.parent.name for path in ROOT.glob("results/*/*_seed*.json")}
    assert folders == set(OWN_FLAGS)
    for folder, own in OWN_FLAGS.items():
        for run in (run for runs in results(folder).values() for run in runs):
            config = {"d_state": 16, "init": "official", **run["config"]}              # flags that came after some of the runs
            changed = own if folder != "table2" or config["model"] == "mamba" else {}
            expected = {**vars(defaults), "lr": train.default_lr(config["d"]), **changed}
            for flag in set(expected) - {*train.GRID, "device", "out", "overwrite"}:
                assert config[flag] == expected[flag], (folder, flag)
            every, last = config["steps"] // train.POINTS, train.last_step(run["train"], config)
            assert run["train"]["step"][-1] == last - last % every, "this run ended when a former version would have ended it"


def median(values):
    values = sorted(values)
    half = len(values) // 2
    return values[half] if len(values) % 2 else (values[half - 1] + values[half]) / 2
