"""report/probe.py: what is in a state, and which query a model answers."""

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                                "report"))
import construct
import probe
import train
from data import recall_batch


def test_a_probe_finds_what_is_there_and_nothing_else():
    torch.manual_seed(0)
    v = torch.randint(5, (800,))
    table, noise = torch.randn(5, 12), torch.randn(800, 12)
    assert probe.probe(table[v] + 0.1 * noise, v, 5) > 0.99
    assert probe.probe(noise, v, 5) < 0.35                           # chance is 0.2
    assert probe.probe(1000 + 1e-3 * (table[v] + 0.1 * noise), v, 5) > 0.99


def test_states_are_those_after_the_context():
    """The model sees L tokens and not the query: what follows does not change its states."""
    model, config = construct.build().eval(), dict(L=20, K=16, M=3, tau=1, model="mamba")
    q, v, answers, states = probe.read(model, config, 1200)          # in two calls
    assert q.shape == v.shape == answers.shape == (1200,) and set(q.tolist()) == {0, 1, 2}
    assert {i: h.shape for i, h in states.items()} == {1: (1200, 256), 2: (1200, 256)}
    tokens, label = recall_batch(1200, 20, 16, 3, 1, generator=torch.Generator().manual_seed(0))
    assert torch.equal(label, v) and torch.equal(tokens[:, -1], q) and torch.equal(answers, v)
    last = model.run_layers(tokens[-7:, :20])[1]
    assert all(torch.equal(states[i][-7:], last[i - 1].h.flatten(1)) for i in (1, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs"))
    argv = ["--steps", "1", "--L", "6", "--M", "2", "--device", "cpu", "--out", folder]
    train.main([*argv, "--model", "mamba+attention", "rope"])
    return os.path.join(folder, "{}_M2_tau1_K16_d8_L6_steps1_seed0.pt").format


def test_command(run, tmp_path, capsys):
    [(config, rows)] = probe.main([run("mamba+attention"), "--sequences", "100",
                                   "--out", str(tmp_path)])
    assert list(rows) == ["answers", "layer 1"] and config["M"] == 2
    assert all(len(shares) == 2 and 0 <= min(shares) for shares in rows.values())
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["query", "0", "1"]
    assert lines[2].split()[1:] == [f"{100 * share:.0f}" for share in rows["answers"]]
    assert (tmp_path / "probe.png").stat().st_size > 5000


@pytest.mark.parametrize("argv, message", [
    (["--sequences", "9"], "--sequences is 9, but a probe needs 100 or more"),
    ([], "--model is 'rope', but none of its layers has a state h"),
    (["mamba+attention", "--out", "x"], "--out draws runs of one model, M and d"),
    (["nothing"], "nothing_M2_tau1_K16_d8_L6_steps1_seed0.pt is not there")])
def test_wrong_commands(run, argv, message, capsys):
    """Also those that name several runs are refused before the first is probed."""
    if argv and not argv[0].startswith("--"):
        argv = [run(argv[0]), *argv[1:]]
    with pytest.raises(SystemExit) as stopped:
        probe.main([run("rope"), *argv])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
