"""Accuracy against length: exact for a model that knows the answer, the right test sequences, and the command line."""

import itertools
import json
import os
import pickle
import shutil
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

import eval
import runs
import train
from conftest import ROOT, TINY, assert_uniform
from hybrid import Model, build_model


class History(NamedTuple):
    tokens: torch.Tensor  # (B, S), all tokens so far


class Oracle:
    """Solves the task by looking the answer up, with the interface of a Model. Notes what it was asked at each length."""
    select = staticmethod(Model.select)

    def __init__(self, K, tau):
        self.K, self.tau, self.asked = K, tau, {}

    def stream(self, tokens, states=None):
        tokens = torch.cat([states[0].tokens, tokens], dim=1) if states else tokens
        context, q = tokens[:, :-1], tokens[:, -1:]
        i = (context == q).int().argmax(1) if context.shape[1] else tokens.new_zeros(len(tokens))
        value = tokens.gather(1, (i + self.tau).clamp(max=tokens.shape[1] - 1)[:, None])[:, 0]
        count = (context == q).sum(1)
        length = torch.full_like(i, context.shape[1])
        return torch.stack([q[:, 0], i, value, count, length], dim=-1)[:, None], [History(tokens)]

    def head(self, x):
        q, i, value, count, length = x.unbind(-1)
        self.asked.setdefault(int(length[0]), []).append(torch.stack([q, i, value, count], dim=-1))
        return F.one_hot(value, self.K)


def ask_oracle(lengths, K, M, tau, sequences, seed=0):
    oracle = Oracle(K, tau)
    accuracies = eval.accuracy_by_length(oracle, lengths, K, M, tau, sequences, seed=seed)
    return accuracies, {length: torch.cat(rows) for length, rows in oracle.asked.items()}


# ---- the measurement ----

@pytest.mark.parametrize("M, tau, lengths", [
    (1, 1, range(2, 25)), (4, 5, range(6, 25)), (16, 2, [3, 4, 9, 30]), (3, 1, [2]), (3, 7, [50]), (2, 1, [2, 700])])
def test_oracle_is_always_right(M, tau, lengths):
    accuracies, asked = ask_oracle(list(lengths), 16, M, tau, 300)
    assert accuracies == [1.0] * len(lengths)
    assert sorted(asked) == list(lengths)
    for length, rows in asked.items():
        q, i, _, count = rows.T
        assert len(rows) == 300 and (count == 1).all()          # each length is asked for 300 times, of whole tasks
        assert q.max() < M and i.max() < length - tau


@pytest.mark.parametrize("lengths", [list(range(4, 13)), [4, 5, 12]])
def test_queries_positions_and_values_are_uniform_at_each_length(lengths):
    _, asked = ask_oracle(lengths, 5, 3, 3, 4000)
    for length, rows in asked.items():
        q, i, value, _ = rows.T
        assert_uniform(i, length - 3)
        assert_uniform(q * 4 + value - (value > q).long(), 12)
        assert_uniform(i * 3 + q, 3 * (length - 3))


def test_chance():
    model = Oracle(16, 1)
    guesses = torch.Generator().manual_seed(0)
    model.head = lambda x: torch.rand(len(x), 16, generator=guesses)
    for accuracy in eval.accuracy_by_length(model, [2, 5, 20], 16, 4, 1, 4000):
        assert abs(accuracy - 1 / 16) < 0.016
    model.head = lambda x: F.one_hot(x[:, 0] * 0, 16)                              # answers 0, which is the query
    assert eval.accuracy_by_length(model, [2, 5, 20], 16, 1, 1, 100) == [0.0] * 3


def test_order_and_duplicates_of_lengths():
    torch.manual_seed(0)
    model, lengths = build_model("hybrid-a"), [3, 7, 8, 20]
    accuracy = dict(zip(lengths, eval.accuracy_by_length(model, lengths, 16, 16, 1, 500)))
    assert len(set(accuracy.values())) > 1
    mixed = [20, 3, 8, 3, 7, 20]
    assert eval.accuracy_by_length(model, mixed, 16, 16, 1, 500) == [accuracy[n] for n in mixed]


def test_seeds():
    torch.manual_seed(0)
    model = build_model("mamba")
    one, again, other = (eval.accuracy_by_length(model, range(2, 20), 16, 16, 1, 500, seed=seed) for seed in (0, 0, 1))
    assert one == again != other


@pytest.mark.parametrize("name", ["nope", "learned", "rope", "mamba", "hybrid-a", "hybrid-b"])
def test_pieces_change_nothing(name, monkeypatch):
    torch.manual_seed(0)
    model, lengths = build_model(name), [2, 11, 12, 40]
    in_one = eval.accuracy_by_length(model, lengths, 16, 8, 1, 200)
    assert any(in_one)
    monkeypatch.setattr(eval, "PIECE", 3)
    assert eval.accuracy_by_length(model, lengths, 16, 8, 1, 200) == in_one


def test_batches_are_bounded(monkeypatch):
    """Neither the rows nor the tokens that are held at once exceed their bounds, however uneven the lengths are."""
    drawn, recall_batch = [], eval.recall_batch
    monkeypatch.setattr(eval, "recall_batch", lambda *a, **k: drawn.append(a[:2]) or recall_batch(*a, **k))
    monkeypatch.setattr(eval, "HELD_TOKENS", 4000)
    monkeypatch.setattr(eval, "BATCH_ROWS", 50)
    assert ask_oracle([2, 3, 100, 500], 16, 4, 1, 60)[0] == [1.0] * 4
    assert max(rows for rows, _ in drawn) == 50
    assert max(rows * length for rows, length in drawn) <= 4000


def test_merged():
    old = {"length": [2, 3, 4], "accuracy": [0.2, 0.3, 0.4], "sequences": 100}
    assert eval.merged(old, [9, 3], [0.9, 0.33], 100) == {
        "length": [2, 3, 4, 9], "accuracy": [0.2, 0.33, 0.4, 0.9], "sequences": 100}
    new = eval.merged(old, [1, 3], [0.1, 0.33], 50)
    assert new == {"length": [1, 2, 3, 4], "accuracy": [0.1, 0.2, 0.33, 0.4], "sequences": [50, 100, 50, 100]}
    assert eval.merged(new, [1, 3], [0.1, 0.3], 100) == {
        "length": [1, 2, 3, 4], "accuracy": [0.1, 0.2, 0.3, 0.4], "sequences": 100}


def test_write_atomically(tmp_path):
    """The old file, whole, until the new one is."""
    path = tmp_path / "file"
    path.write_text("old")

    def broken(temporary):
        with open(temporary, "w") as f:
            f.write("half")
        assert path.read_text() == "old"
        raise RuntimeError
    with pytest.raises(RuntimeError):
        runs.write_atomically(str(path), broken)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]


# ---- the command line ----

LEARNED, HYBRID = (f"{name}_M2_tau2_K16_d8_L8_seed0" for name in ("learned", "hybrid-b"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    train.main([*TINY, "--model", "learned", "hybrid-b", "--M", "2", "--tau", "2", "--steps", "2", "--out", str(folder)])
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "results")


def record(folder, name=HYBRID):
    return json.loads((folder / (name + ".json")).read_text())


def test_command_line(folder):
    before = record(folder)
    done = subprocess.run([sys.executable, os.path.join(ROOT, "eval.py"), f"results/{HYBRID}.pt", "--device", "cpu",
                           "--lengths", "50", "10", "3", "--sequences", "200"],
                          cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    after = record(folder)
    assert after["eval"]["length"] == [*range(3, 25), 50]
    assert after["eval"]["sequences"] == [200 if n in (3, 10, 50) else 1024 for n in after["eval"]["length"]]
    accuracy = dict(zip(after["eval"]["length"], after["eval"]["accuracy"]))
    for n, a in zip(before["eval"]["length"], before["eval"]["accuracy"]):
        assert n in (3, 10) or accuracy[n] == a
    assert {k: v for k, v in after.items() if k not in ("eval", "seconds")} == \
           {k: v for k, v in before.items() if k not in ("eval", "seconds")}
    assert after["seconds"]["train"] == before["seconds"]["train"] and after["seconds"]["eval"] != before["seconds"]["eval"]
    path, lengths, accuracies = done.stdout.splitlines()
    assert path == f"results/{HYBRID}.pt" and lengths.split() == ["context", "length", "50", "10", "3"]
    assert accuracies.split()[1:4] == [f"{accuracy[n]:.3f}" for n in (50, 10, 3)] and accuracies.endswith("(trained at 8)")
    assert len(os.listdir(folder)) == 4


def test_default_lengths_repeat_what_train_measured(folder, capsys):
    before = record(folder), record(folder, LEARNED)
    eval.main([str(folder / (HYBRID + ".pt")), str(folder / (LEARNED + ".pt")), "--device", "cpu"])
    assert [record(folder)["eval"], record(folder, LEARNED)["eval"]] == [r["eval"] for r in before]
    assert capsys.readouterr().out.count("trained at 8") == 2


def spoil_record(change):
    def spoil(pt, json_path):
        content = json.loads(json_path.read_text())
        json_path.write_text(json.dumps(change(content) or content))
    return spoil


def spoil_checkpoint(change):
    def spoil(pt, json_path):
        content = torch.load(pt, weights_only=True)
        torch.save(change(content) or content, pt)
    return spoil


class Foreign:
    pass


@pytest.mark.parametrize("spoil, sentence", [
    (lambda pt, js: pt.unlink(), ".pt is not there"),
    (lambda pt, js: pt.write_bytes(b""), "not a whole checkpoint"),
    (lambda pt, js: pt.write_bytes(pt.read_bytes()[:-200]), "not a whole checkpoint"),
    (lambda pt, js: pt.write_bytes(pt.read_bytes()[:3000]), "not a whole checkpoint"),
    (lambda pt, js: pt.write_text("a line of text\n"), "not a whole checkpoint"),
    (lambda pt, js: pt.write_bytes(js.read_bytes()), "not a whole checkpoint"),
    (lambda pt, js: pt.write_bytes(pickle.dumps({"a": 1})), "not a whole checkpoint"),
    (lambda pt, js: pt.write_bytes(pickle.dumps(Foreign())), "not a whole checkpoint"),
    (lambda pt, js: (pt.unlink(), pt.mkdir()), "not a whole checkpoint"),
    (lambda pt, js: torch.save({"a": 1}, pt), "not a whole checkpoint"),
    (lambda pt, js: torch.save([1, 2], pt), "not a whole checkpoint"),
    (lambda pt, js: torch.save(torch.zeros(3), pt), "not a whole checkpoint"),
    (lambda pt, js: torch.save(Foreign(), pt), "not a whole checkpoint"),
    (spoil_checkpoint(lambda c: c["model"].popitem() and None), "not a whole checkpoint"),
    (spoil_checkpoint(lambda c: c["config"].update(d=16)), "not a whole checkpoint"),
    (spoil_checkpoint(lambda c: c["config"].update(model="gpt")), "not a whole checkpoint"),
    (spoil_checkpoint(lambda c: c.update(config=3)), "not a whole checkpoint"),
    (lambda pt, js: js.unlink(), ".json, which train.py writes"),
    (lambda pt, js: js.write_text(""), ".json, which train.py writes"),
    (lambda pt, js: js.write_text(js.read_text()[:-20]), ".json, which train.py writes"),
    (lambda pt, js: js.write_text("[1, 2]"), ".json, which train.py writes"),
    (lambda pt, js: js.write_text("{}"), ".json, which train.py writes"),
    (lambda pt, js: js.write_bytes(b"\xff\xfe\x00"), ".json, which train.py writes"),
    (spoil_record(lambda r: r.pop("eval") and None), ".json, which train.py writes"),
    (spoil_record(lambda r: r.pop("seconds") and None), ".json, which train.py writes"),
    (spoil_record(lambda r: r["config"].pop("tau") and None), ".json, which train.py writes"),
    (spoil_record(lambda r: r["config"].update(K=3, M=1)), ".json, which train.py writes"),
], ids=itertools.count())
def test_wrong_files(spoil, sentence, folder, refuses):
    pt, js = folder / (HYBRID + ".pt"), folder / (HYBRID + ".json")
    spoil(pt, js)
    before = js.read_bytes() if js.exists() else None, record(folder, LEARNED)
    # The other run comes first: nothing is measured before every file has been read.
    error = refuses(eval.main, [folder / (LEARNED + ".pt"), pt, "--lengths", 5, "--device", "cpu"])
    assert sentence in error and HYBRID in error
    assert (js.read_bytes() if js.exists() else None, record(folder, LEARNED)) == before


@pytest.mark.parametrize("flags, sentence", [
    ("--lengths 9 99999999999999999999", "below 2^31"), ("--lengths 2", "--lengths has 2, but"), ("--lengths 8 0", "--lengths has 0"), ("--lengths -5 9", "--lengths has -5"),
    ("--lengths 1.5", "--lengths"), ("--lengths", "--lengths"),
    ("--sequences 0", "--sequences is 0"), ("--seed x", "--seed"), ("--length-max 3", "--length-max"),
    ("--device cuda:77", "--device is 'cuda:77'"), ("--device nonsense", "--device is 'nonsense'")])
def test_wrong_flags(flags, sentence, folder, refuses):
    before = (folder / (LEARNED + ".json")).read_bytes()
    assert sentence in refuses(eval.main, [folder / (LEARNED + ".pt"), "--device", "cpu", *flags.split()])
    assert (folder / (LEARNED + ".json")).read_bytes() == before and len(os.listdir(folder)) == 4


def test_no_checkpoint_named(refuses):
    assert "RUN.pt" in refuses(eval.main, [])
