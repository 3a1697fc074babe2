"""report/interpolate.py: the longer contexts alone are tested with positions that fit into L."""

import json
import os
import shutil
import sys

import pytest
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                                "report"))
import interpolate
import train
from data import recall_batch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    train.main(["--model", "rope", "--L", "10", "--K", "6", "--M", "3", "--steps", "60",
                "--out", folder])
    [name] = [name for name in os.listdir(folder) if name.endswith(".pt")]
    return os.path.join(folder, name)


def test_only_the_longer_contexts_differ(run):
    [path] = interpolate.main([run, "--device", "cpu"])
    assert os.path.basename(path) == "rope-interpolated_M3_tau1_K6_d8_L10_steps60_seed0.json"
    with open(path) as f, open(run[:-3] + ".json") as g:
        new, old = json.load(f), json.load(g)
    assert new["config"] == {**old["config"], "model": "rope-interpolated"}
    assert new["train"] == old["train"] and new["eval"]["length"] == old["eval"]["length"]
    pairs = list(zip(new["eval"]["length"], new["eval"]["accuracy"], old["eval"]["accuracy"]))
    assert all(a == b for length, a, b in pairs if length <= 10)
    assert any(a != b for length, a, b in pairs if length > 10)
    assert new["tested"]["device"] == "cpu"


def test_the_accuracy_is_that_of_a_model_with_scaled_positions(run, monkeypatch):
    model, layers, result = interpolate.load(run, "cpu")
    assert layers == list(model.layers)
    scales, evaluate = [], interpolate.evaluate

    def watched(*arguments, **options):
        scales.append([layer.scale for layer in layers])
        return evaluate(*arguments, **options)
    monkeypatch.setattr(interpolate, "evaluate", watched)
    found = interpolate.accuracies_of(model, layers, result["config"], [20, 30], 1024, "cpu")
    assert scales == [[0.5, 0.5], [1 / 3, 1 / 3]] and [layer.scale for layer in layers] == [1, 1]
    tokens, labels = recall_batch(4000, 30, 6, 3, 1, generator=torch.Generator().manual_seed(1))
    for layer in layers:
        layer.scale = 1 / 3
    right = (model(tokens).argmax(-1) == labels).double().mean().item()
    assert abs(found[1] - right) < 0.08                  # five standard errors of 1,024 sequences


def test_a_checkpoint_of_another_name_keeps_its_result(run, tmp_path):
    for ending in (".pt", ".json"):
        shutil.copy(run[:-3] + ending, tmp_path / ("mine" + ending))
    before = (tmp_path / "mine.json").read_bytes()
    interpolate.main([str(tmp_path / "mine.pt"), "--device", "cpu"])
    assert (tmp_path / "mine.json").read_bytes() == before and len(os.listdir(tmp_path)) == 3


def test_wrong_runs_are_one_sentence(run, tmp_path, capsys):
    train.main(["--model", "mamba", "--steps", "2", "--L", "8", "--out", str(tmp_path / "a")])
    [mamba] = (tmp_path / "a").glob("*.pt")
    shutil.copy(run, tmp_path / "alone.pt")
    shutil.copy(run, tmp_path / "short.pt")
    with open(run[:-3] + ".json") as f:
        result = json.load(f)
    result["eval"] = {"length": [10], "accuracy": [0.5], "sequences": 1024}
    (tmp_path / "short.json").write_text(json.dumps(result))
    for path, sentence in ((mamba, "no rotary attention"), (tmp_path / "alone.pt", "no result"),
                           (tmp_path / "short.pt", "no length above 10")):
        with pytest.raises(SystemExit) as stopped:
            interpolate.main([str(path)])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err
