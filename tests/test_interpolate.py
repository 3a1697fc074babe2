"""report/interpolate.py: the longer contexts alone are tested with positions that fit into L."""

import json
import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                                "report"))
import interpolate
import train
from data import recall_batch
from runs import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    train.main(["--model", "rope", "--L", "10", "--K", "6", "--steps", "20", "--out", folder])
    [name] = [name for name in os.listdir(folder) if name.endswith(".pt")]
    return os.path.join(folder, name)


def test_only_the_longer_contexts_differ(run):
    [path] = interpolate.main([run, "--device", "cpu"])
    assert os.path.basename(path) == "rope-interpolated_M1_tau1_K6_d8_L10_steps20_seed0.json"
    with open(path) as f, open(run[:-3] + ".json") as g:
        new, old = json.load(f), json.load(g)
    assert new["config"] == {**old["config"], "model": "rope-interpolated"}
    assert new["train"] == old["train"] and new["eval"]["length"] == old["eval"]["length"]
    pairs = list(zip(new["eval"]["length"], new["eval"]["accuracy"], old["eval"]["accuracy"]))
    assert all(a == b for length, a, b in pairs if length <= 10)
    assert any(a != b for length, a, b in pairs if length > 10)


def test_the_accuracy_is_that_of_a_model_with_scaled_positions(run):
    model, config = load_run(run)
    [accuracy] = interpolate.interpolated(model, config, [30], 1024, "cpu")
    assert [layer.scale for layer in model.layers] == [1 / 3, 1 / 3]
    generator = torch.Generator().manual_seed(1)
    tokens, labels = recall_batch(4000, 30, 6, 1, 1, generator=generator)
    right = (model(tokens).argmax(-1) == labels).double().mean().item()
    assert abs(accuracy - right) < 0.08                  # five standard errors of 1,024 sequences


@pytest.mark.parametrize("model", ["mamba", "window"])
def test_a_model_without_rotary_attention_is_one_sentence(model, tmp_path, capsys):
    train.main(["--model", model, "--steps", "2", "--L", "8", "--out", str(tmp_path)])
    [name] = [name for name in os.listdir(tmp_path) if name.endswith(".pt")]
    with pytest.raises(SystemExit) as stopped:
        interpolate.main([str(tmp_path / name)])
    assert stopped.value.code == 2
    assert "no rotary attention" in capsys.readouterr().err
