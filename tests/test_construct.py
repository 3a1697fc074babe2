"""report/construct.py: a narrow Mamba that recalls sixteen queries exists."""

import os
import sys

import pytest
import torch

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
                                "report"))
import construct
from data import recall_batch
from eval import accuracy_one_by_one
from hybrid import build_model


@pytest.fixture(scope="module")
def model():
    return construct.build().eval()


def test_it_recalls_all_queries(model):
    assert accuracy_one_by_one(model, [2, 8, 64, 192], 16, M=16, tau=1) == [1.0] * 4


def test_every_query_with_every_value(model):
    """240 contexts of 30 tokens: q at 12, v after it, and the same other tokens everywhere."""
    q, v = (pairs.flatten() for pairs in torch.meshgrid(*2 * [torch.arange(16)], indexing="ij"))
    q, v = q[q != v], v[q != v]
    others, _ = recall_batch(1, 30, 16, 16, 1)
    tokens = others.repeat(240, 1)
    tokens = torch.where(tokens == q[:, None], (tokens + 1) % 16, tokens)
    tokens[:, 12], tokens[:, 13], tokens[:, -1] = q, v, q
    assert torch.equal(model(tokens).argmax(-1), v)


def test_it_is_the_mamba_that_is_trained(model):
    trained = build_model("mamba")
    assert model.n_params() == trained.n_params() == 2760
    for ours, theirs in zip(model.state_dict().items(), trained.state_dict().items(), strict=True):
        assert ours[0] == theirs[0] and ours[1].shape == theirs[1].shape
    assert torch.equal(model.embedding.weight, trained.embedding.weight)


def test_demo(capsys):
    construct.main(["--lengths", "8", "2"])
    assert capsys.readouterr().out.splitlines()[1:] == ["      2 tokens: 1.000",
                                                        "      8 tokens: 1.000"]
