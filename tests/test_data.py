"""The tasks: every statement of their definitions, their distributions, and the embedding table."""

import itertools

import numpy as np
import pytest
import torch

from conftest import assert_uniform
from data import (TASKS, check_task, embedding_table, recall_batch, shortest, show, show_answers,
                  stream)

# Every recall task with K = 4 and at most 6 context tokens.
SMALL = [(M, tau, L) for L in range(2, 7) for tau in range(1, L) for M in range(1, 5)]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def assert_recall(tokens, labels, K, M, tau):
    """The task's statements for tokens (B, L + 1). Returns the positions of q, counted from 0."""
    context, q = tokens[:, :-1], tokens[:, -1]
    assert tokens.dtype == labels.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < K
    assert (q < M).all()
    is_q = context == q[:, None]
    assert (is_q.sum(1) == 1).all()                 # the query is once in the context
    i = is_q.int().argmax(1)
    assert (i + tau < context.shape[1]).all()       # and its value as well
    assert (context[torch.arange(len(i)), i + tau] == labels).all()
    assert (labels != q).all()
    return i


# ---- associative recall --------------------------------------------------------------------------

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
        # The K - 1 tokens that are not the query, as 0 ... K-2.
        rank = tokens[mine] - (tokens[mine] > query).long()
        value = labels[mine] - (labels[mine] > query).long()
        assert_uniform(i[mine] * (K - 1) + value, (L - tau) * (K - 1))     # position and value
        for t in range(L):
            other = (i[mine] != t) & (i[mine] + tau != t)
            assert_uniform(rank[other, t], K - 1)
        late = i[mine] > 1
        assert_uniform(rank[late, 0] * (K - 1) + rank[late, 1], (K - 1)**2)     # two tokens


def test_a_batch_is_decided_by_its_generator():
    first, again = (recall_batch(64, 9, M=4, generator=generator(3)) for _ in range(2))
    assert all(map(torch.equal, first, again))
    assert not torch.equal(first[0], recall_batch(64, 9, M=4, generator=generator(4))[0])
    one = generator(3)
    recall_batch(64, 9, M=4, generator=one)
    assert not torch.equal(first[0], recall_batch(64, 9, M=4, generator=one)[0])


def test_global_generator_is_left_alone():
    before = torch.get_rng_state()
    for task in TASKS.values():
        task(8, 9, M=2, generator=generator())
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


def test_positions_are_uniform_at_each_of_several_lengths():
    L, tau = 8, 2
    lengths = torch.arange(tau + 1, L + 1).repeat(4000)
    tokens, labels = recall_batch(len(lengths), L, 16, 4, tau, generator=generator(),
                                  lengths=lengths)
    for length in range(tau + 1, L + 1):
        rows = lengths == length
        i = assert_recall(tokens[rows, :length + 1], labels[rows], 16, 4, tau)
        assert_uniform(i, length - tau)


def test_given_positions():
    i = torch.arange(6).repeat(20)
    tokens, labels = recall_batch(120, 8, 4, 2, 2, generator=generator(), i=i)
    assert torch.equal(assert_recall(tokens, labels, 4, 2, 2), i)


# ---- streams -------------------------------------------------------------------------------------

def test_streams_share_no_draws():
    """Eight consecutive draws of one stream occur nowhere in 4,000 draws of any other."""
    seeds = [*range(9), 2**16, 2**29, 2**29 + 1, 2**30 - 2, 2**30 - 1]
    seen = {}
    for seed, purpose in itertools.product(seeds, ["training", "test", "evaluation"]):
        draws = torch.randint(2**31 - 1, (4000,), generator=stream(seed, purpose)).tolist()
        for window in zip(*(draws[k:] for k in range(8))):
            assert seen.setdefault(window, (seed, purpose)) == (seed, purpose)
    assert len(seen) == len(seeds) * 3 * (4000 - 7)


def test_a_stream_repeats():
    first, again = (torch.rand(5, generator=stream(7, "test")) for _ in range(2))
    assert torch.equal(first, again)


# ---- the tasks as train.py wants them ------------------------------------------------------------

def test_recall():
    tokens, labels, at = TASKS["recall"](50, 9, 16, 4, 2, generator=generator())
    assert at is None
    assert_recall(tokens, labels, 16, 4, 2)
    tokens, labels, at = TASKS["recall"](6000, 9, 16, 4, 2, generator=generator(), uniform=True)
    assert_uniform(at - 3, 7)                       # lengths 3 ... 9
    for length in range(3, 10):
        assert_recall(tokens[at == length, :length + 1], labels[at == length], 16, 4, 2)


@pytest.mark.parametrize("K, M, L", [(16, 3, 20), (5, 2, 6), (16, 8, 24)])
def test_mqar(K, M, L):
    tokens, labels, at = TASKS["mqar"](300, L, K, M, generator=generator())
    assert tokens.shape == (300, L) and labels.shape == at.shape == (300, M)
    for row, answers, places in zip(tokens.tolist(), labels.tolist(), at.tolist()):
        value_of = dict(zip(row[:2 * M:2], row[1:2 * M:2]))
        assert len(value_of) == M                                   # no two keys are alike
        assert max(value_of) < K // 2 <= min(value_of.values())
        assert len(set(places)) == M and min(places) >= 2 * M
        assert sorted(row[t] for t in places) == sorted(value_of)   # each key is asked once
        assert answers == [value_of[row[t]] for t in places]
        others = [row[t] for t in range(2 * M, L) if t not in places]
        assert all(K // 2 <= token < K for token in others)
    assert_uniform(tokens[:, 0], K // 2)
    if L > 3 * M:
        assert_uniform(at[:, 0] - 2 * M, L - 2 * M)


def test_copy():
    K, M, L = 6, 3, 9
    tokens, labels, at = TASKS["copy"](2000, L, K, M, generator=generator())
    assert tokens.shape == (2000, L + M)
    for row, answers, places in zip(tokens.tolist(), labels.tolist(), at.tolist()):
        content = [token for token in row[:L] if token != K - 1]
        assert len(content) == M and max(content) < K - 2
        assert row[L:] == [K - 2] * M and places == [L, L + 1, L + 2]
        assert answers == content
    assert_uniform(labels[:, 1], K - 2)
    places = (tokens[:, :L] != K - 1).nonzero()[:, 1]
    assert_uniform(places, L)


def test_parity():
    tokens, labels, at = TASKS["parity"](2000, 9, generator=generator())
    for row, answers, places in zip(tokens.tolist(), labels.tolist(), at.tolist()):
        odd, expected = 0, []
        for token in row:
            odd ^= token
            expected.append(odd)
        assert answers == expected and places == list(range(9))
    assert_uniform(tokens, 2)


@pytest.mark.parametrize("task, M, tau", [
    ("recall", 4, 3), ("mqar", 4, 1), ("copy", 4, 1), ("parity", 1, 1)])
def test_the_shortest_context_exists_and_no_shorter_one(task, M, tau):
    L = shortest(M, tau, task)
    check_task(L, 16, M, tau, task)
    tokens, labels, at = TASKS[task](20, L, 16, M, tau, generator=generator())
    assert tokens.shape[0] == len(labels) == 20
    assert at is None or at.shape == labels.shape
    with pytest.raises(ValueError, match="^--L is"):
        check_task(L - 1, 16, M, tau, task)


@pytest.mark.parametrize("wrong, flag", [
    (dict(K=1), "--K"), (dict(K=0), "--K"), (dict(M=0), "--M"), (dict(M=17), "--M"),
    (dict(M=-1), "--M"), (dict(tau=0), "--tau"), (dict(tau=-1), "--tau"), (dict(L=1), "--L"),
    (dict(L=0), "--L"), (dict(L=5, tau=5), "--L")])
def test_impossible_recall(wrong, flag):
    with pytest.raises(ValueError, match=f"^{flag} is {wrong[flag[2:]]}, ") as error:
        recall_batch(4, **{"L": 8, **wrong})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong, flag", [
    (dict(task="sort"), "--task"), (dict(task="mqar", M=9, L=64), "--M"),
    (dict(task="copy", K=2), "--K")])
def test_impossible_other_tasks(wrong, flag):
    with pytest.raises(ValueError, match=f"^{flag} is {wrong[flag[2:]]!r}, "):
        check_task(**{"L": 8, **wrong})


@pytest.mark.parametrize("wrong", [
    dict(lengths=torch.tensor([3, 99])), dict(lengths=torch.tensor([1, 3])),
    dict(i=torch.tensor([9, 9])), dict(i=torch.tensor([0, -1])), dict(i=torch.tensor([0, 7]))])
def test_impossible_lengths_and_positions(wrong):
    with pytest.raises(ValueError):
        recall_batch(2, 8, **wrong)


# ---- the embedding, and something to look at -----------------------------------------------------

@pytest.mark.parametrize("K, d", [(16, 8), (16, 64), (5, 3)])
def test_embedding_table(K, d):
    np.random.seed(7)
    before = np.random.get_state()[1].copy(), np.random.get_state()[2]
    table = embedding_table(K, d)
    assert (np.random.get_state()[1] == before[0]).all()
    assert np.random.get_state()[2] == before[1]
    np.random.seed(0)
    V = np.random.randn(K, d)
    V /= np.sqrt((V**2).sum(1, keepdims=True))
    assert table.shape == (K, d) and table.dtype == torch.float32
    assert np.allclose(table.numpy(), V, rtol=1e-6, atol=0)


def test_show_marks_the_query_and_its_value():
    tokens = torch.tensor([5, 6, 1, 7, 9, 8, 1])
    assert show(tokens, 2).split() == ["5", "6", "(1)", "7", "[9]", "8", "(1)"]
    far = show(torch.tensor([0, *[3] * 50, 4, *[3] * 50, 0]), 51).split()
    assert far.count("...") == 2 and far.count("[4]") == 1 and far.count("(0)") == 2
    assert len(far) < 20


@pytest.mark.parametrize("L, tau", [(3, 1), (12, 5), (13, 5), (64, 1), (256, 40)])
def test_answers_fit_into_80_columns(L, tau, capsys):
    config = {"L": L, "K": 16, "M": 16, "tau": tau}
    for seed in range(30):
        model = lambda tokens: torch.nn.functional.one_hot(torch.full((3,), 10), 16)
        show_answers(model, {**config, "seed": seed}, "cpu")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 90 and max(map(len, lines)) <= 80
    assert any("wrong" in line for line in lines)
