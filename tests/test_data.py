"""The task: every statement of its definition, its distributions, and the fixed embedding table."""

import numpy as np
import pytest
import torch

from conftest import assert_uniform
from data import embedding_table, recall_batch

SMALL = [(M, tau, L) for L in range(2, 7) for tau in range(1, L) for M in range(1, 5)]  # all that exist at K = 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_recall(tokens, labels, K, M, tau):
    """The statements of the task for tokens (B, L + 1). Returns the query's positions, counted from 0."""
    context, q = tokens[:, :-1], tokens[:, -1]
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < K
    assert (q < M).all()
    is_q = context == q[:, None]
    assert (is_q.sum(1) == 1).all()                 # the query stands once in the context
    i = is_q.int().argmax(1)
    assert (i + tau < context.shape[1]).all()       # and its value inside it
    assert (context[torch.arange(len(i)), i + tau] == labels).all()
    assert (labels != q).all()
    return i


@pytest.mark.parametrize("M, tau, L", SMALL)
def test_statements(M, tau, L):
    tokens, labels = recall_batch(500, L, 4, M, tau, generator=generator())
    assert tokens.shape == (500, L + 1) and labels.shape == (500,)
    i = assert_recall(tokens, labels, 4, M, tau)
    assert set(i.tolist()) == set(range(L - tau))   # every position that can be, and no other
    assert set(tokens[:, -1].tolist()) == set(range(M))


def test_distributions():
    K, M, tau, L = 5, 3, 2, 7
    tokens, labels = recall_batch(60000, L, K, M, tau, generator=generator(1))
    i, q = assert_recall(tokens, labels, K, M, tau), tokens[:, -1]
    assert_uniform(q, M)
    for query in range(M):
        mine = q == query
        rank = tokens[mine] - (tokens[mine] > query).long()      # 0 ... K-2 for the tokens that are not the query
        value = labels[mine] - (labels[mine] > query).long()
        assert_uniform(i[mine] * (K - 1) + value, (L - tau) * (K - 1))   # position and value, and independent
        for t in range(L):
            filler = (i[mine] != t) & (i[mine] + tau != t)
            assert_uniform(rank[filler, t], K - 1)
        assert_uniform(rank[:, 0][i[mine] > 1] * (K - 1) + rank[:, 1][i[mine] > 1], (K - 1)**2)  # two fillers


def test_same_generator_same_batch():
    a, b = generator(3), generator(3)
    first, again = recall_batch(64, 9, M=4, generator=a), recall_batch(64, 9, M=4, generator=b)
    assert all(torch.equal(x, y) for x, y in zip(first, again))
    assert not torch.equal(first[0], recall_batch(64, 9, M=4, generator=a)[0])
    assert not torch.equal(first[0], recall_batch(64, 9, M=4, generator=generator(4))[0])


def test_generator_leaves_the_global_one_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    recall_batch(8, 9, generator=generator(), lengths=torch.full((8,), 5))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("M, tau, L", SMALL)
def test_lengths(M, tau, L):
    lengths = torch.randint(tau + 1, L + 1, (800,), generator=generator(2))
    tokens, labels = recall_batch(800, L, 4, M, tau, generator=generator(), lengths=lengths)
    assert tokens.shape == (800, L + 1)
    for length in range(tau + 1, L + 1):
        rows = lengths == length
        i = assert_recall(tokens[rows, :length + 1], labels[rows], 4, M, tau)
        assert set(i.tolist()) == set(range(length - tau))


def test_lengths_positions_are_uniform():
    L, tau = 8, 2
    lengths = torch.arange(tau + 1, L + 1).repeat(4000)
    tokens, labels = recall_batch(len(lengths), L, 16, 4, tau, generator=generator(), lengths=lengths)
    for length in range(tau + 1, L + 1):
        rows = lengths == length
        assert_uniform(assert_recall(tokens[rows, :length + 1], labels[rows], 16, 4, tau), length - tau)


def test_given_positions():
    i = torch.arange(6).repeat(20)
    tokens, labels = recall_batch(120, 8, 4, 2, 2, generator=generator(), i=i)
    assert torch.equal(assert_recall(tokens, labels, 4, 2, 2), i)


@pytest.mark.parametrize("wrong, flag", [
    (dict(K=1), "--K"), (dict(K=0), "--K"), (dict(M=0), "--M"), (dict(M=17), "--M"), (dict(M=-1), "--M"),
    (dict(tau=0), "--tau"), (dict(tau=-1), "--tau"), (dict(L=1), "--L"), (dict(L=0), "--L"), (dict(L=5, tau=5), "--L")])
def test_impossible_tasks(wrong, flag):
    with pytest.raises(ValueError, match=f"^{flag} is {wrong[flag[2:]]}, "):
        recall_batch(4, **{"L": 8, **wrong})


@pytest.mark.parametrize("K, d", [(16, 8), (16, 64), (5, 3)])
def test_embedding_table(K, d):
    np.random.seed(7)
    before = np.random.get_state()[1].copy(), np.random.get_state()[2]
    table = embedding_table(K, d)
    assert (np.random.get_state()[1] == before[0]).all() and np.random.get_state()[2] == before[1]
    np.random.seed(0)
    V = np.random.randn(K, d)
    V /= np.sqrt((V**2).sum(1, keepdims=True))
    assert table.shape == (K, d) and table.dtype == torch.float32
    assert np.allclose(table.numpy(), V, rtol=1e-6, atol=0)
