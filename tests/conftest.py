"""What several test files share: the way to the scripts, runs that take a moment, and the checks that repeat."""

import json
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # the tensors are tiny; processes that the tests start inherit it
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import pytest
import torch

import train

torch.set_num_threads(1)
TINY = ["--d", "8", "--L", "8", "--steps", "40", "--batch-size", "4", "--device", "cpu"]
collect_ignore = [] if torch.cuda.is_available() else ["test_cuda.py"]


def assert_uniform(values, n):
    """values, int64, look like draws from 0 ... n-1: the chi-square statistic is within about 5 sigma of its mean."""
    assert values.min() >= 0 and values.max() < n
    counts, expected = torch.bincount(values.flatten(), minlength=n).double(), values.numel() / n
    assert expected >= 5, "too few draws to say anything"
    assert ((counts - expected) ** 2 / expected).sum() < n - 1 + 5 * (2 * n) ** 0.5


def relative(a, b):
    """How far a is from b, as a share of b's norm."""
    a, b = a.detach().double(), b.detach().double()
    return ((a - b).norm() / b.norm().clamp(min=1e-30)).item()


def in_pieces(layer, x, sizes, state=None):
    """Feed x (B, L, ...) in pieces of these sizes, and what is left one token at a time."""
    sizes = [*sizes, *[1] * (x.shape[1] - sum(sizes))]
    y = []
    for piece in x.split(sizes, dim=1):
        out, state = layer(piece, state)
        y.append(out)
    return torch.cat(y, dim=1), state


@pytest.fixture
def train_tiny(tmp_path, monkeypatch):
    """train_tiny(*flags) trains tiny models in-process and returns the results, in the order of their names."""
    monkeypatch.setattr(train, "TEST_SEQUENCES", 32)
    monkeypatch.setattr(train, "TEST_BATCH", 32)

    def call(*flags, out=tmp_path / "out"):
        train.main([*TINY, *map(str, flags), "--out", str(out)])
        return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    return call


@pytest.fixture
def refuses(capsys, recwarn):
    """refuses(main, argv): main ends with status 2 and a single line on stderr, which is returned."""
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
