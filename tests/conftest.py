"""What several test files share: the way to the scripts, tiny runs, and checks that repeat."""

import json
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"   # the tensors are tiny; processes started by tests inherit it
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest
import torch

import eval as evaluation
import runs
import train

torch.set_num_threads(1)
TINY = {"--d": 8, "--L": 8, "--steps": 20, "--batch-size": 4, "--device": "cpu"}
collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]


def pytest_configure(config):
    """Leave out the warnings that torch's own code gives; none of them is about this repository."""
    for message in ("`torch.jit.script", "Mismatch dtype between input and weight"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


def assert_uniform(values, n):
    """values, int64, look like draws from 0 ... n-1: chi-square within 5 sigma of its mean."""
    assert values.min() >= 0 and values.max() < n
    counts, expected = torch.bincount(values.flatten(), minlength=n).double(), values.numel() / n
    assert expected >= 5, "too few draws to say anything"
    assert ((counts - expected) ** 2 / expected).sum() < n - 1 + 5 * (2 * n) ** 0.5


def relative(a, b):
    """The norm of a - b, as a share of b's norm. Less than 1e-20 counts as 0: the scans clamp
    decays that would be below 2e-35."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp(min=1e-20)).item()


def embedding_for(layer, x):
    """The arguments of a layer besides x and its state: an embedding of zeros, if it needs one."""
    return {"embedding": torch.zeros_like(x)} if getattr(layer, "needs_embedding", False) else {}


def in_segments(layer, x, sizes, state=None):
    """Feed x (B, L, ...) in segments of these sizes, and the rest one token at a time."""
    sizes = [*sizes, *[1] * (x.shape[1] - sum(sizes))]
    y = []
    for segment in x.split(sizes, dim=1):
        out, state = layer(segment, state)
        y.append(out)
    return torch.cat(y, dim=1), state


def tiny(*flags):
    """The flags of a run that takes a moment, and these, which come before TINY's."""
    flags = [str(word) for word in flags]
    for flag, value in TINY.items():
        if flag not in flags:
            flags += [flag, str(value)]
    return flags


def names(folder):
    """What is in a folder, without temporary files and the folder of locks."""
    return sorted(name for name in os.listdir(folder)
                  if not name.endswith(".tmp") and name != ".locks")


def numbers(result):
    """What a run found, without its times and its folder."""
    return json.dumps([result["train"], result["eval"]])


class Stop(BaseException):
    """What a kill looks like from inside: nothing catches it."""


def stopped_run(train_tiny, monkeypatch, flags, at, exception=Stop):
    """Start a run that saves after every test, and end it at its so-many-th write of a file."""
    count, replace = [0], os.replace

    def counted(source, target):
        count[0] += 1
        if count[0] == at:
            raise exception
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_SECONDS", -1)
        patch.setattr(os, "replace", counted)
        with pytest.raises((exception, SystemExit)) as stop:
            train_tiny(*flags)
    return stop.value


@pytest.fixture
def train_tiny(tmp_path, monkeypatch):
    """train_tiny(*flags) trains tiny models in this process; returns their results."""
    monkeypatch.setattr(evaluation, "TEST_SEQUENCES", 32)
    monkeypatch.setattr(train, "EVAL_SEQUENCES", 16)
    monkeypatch.setattr(runs, "commit", lambda: "unknown")

    def call(*flags, out=tmp_path / "out"):
        return train.main(tiny(*flags, "--out", out))
    return call


@pytest.fixture
def refuses(capsys, recwarn):
    """refuses(main, argv): main ends with status 2 and one line on stderr, which is returned."""
    def call(main, argv):
        capsys.readouterr()
        recwarn.clear()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert error.count("\n") == 1 and error.endswith("\n"), error
        assert not recwarn.list, "warnings go to stderr too"
        return error
    return call
