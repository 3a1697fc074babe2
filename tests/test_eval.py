"""Accuracy against length: right for a model that knows the answer, and as certain as it says."""

import types

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from conftest import assert_uniform
from data import stream
from eval import accuracy_by_length, accuracy_one_by_one, evaluate, groups, merged
from hybrid import build_model
from summary import DEFAULTS, GRID


class Oracle:
    """Solves recall by looking the answer up, with the interface of a Model.

    It notes what it was asked: length -> rows of (q, its position, its value, how often q occurs).
    """
    embedding, layers = torch.nn.Embedding(1, 8), []

    def __init__(self, K, tau):
        self.K, self.tau, self.asked = K, tau, {}

    def run_layers(self, tokens, states=None, last_only=False):
        if states:
            tokens = torch.cat([states[0], tokens], dim=1)                 # (B, all tokens so far)
        context, q = tokens[:, :-1], tokens[:, -1:]
        is_q = context == q
        i = is_q.int().argmax(1) if context.shape[1] else tokens.new_zeros(len(tokens))
        last = tokens.shape[1] - 1
        value = tokens.gather(1, (i + self.tau).clamp(max=last)[:, None])[:, 0]
        seen = is_q.any(1) & (i + self.tau < last)
        x = torch.stack([q[:, 0], i, value, is_q.sum(1), seen, torch.full_like(i, last)], dim=-1)
        return x[:, None], [tokens]

    def head(self, x):
        self.asked.setdefault(int(x[0, 5]), []).append(x[x[:, 4] > 0, :4])
        return F.one_hot(x[:, 2], self.K)

    def extend_positions(self, positions):
        pass


def ask_oracle(lengths, K, M, tau, sequences, seed=0):
    oracle = Oracle(K, tau)
    accuracies = accuracy_by_length(oracle, lengths, K, M, tau, sequences, seed=seed)
    return accuracies, {length: torch.cat(rows) for length, rows in oracle.asked.items()}


# ---- the measurement -----------------------------------------------------------------------------

@pytest.mark.parametrize("lengths, tau", [
    (range(2, 193), 1), (range(6, 97), 5), ([2], 1), ([2, 700], 1), ([50, 3, 50, 9], 2),
    ([2**k for k in range(6, 21)], 1)])
def test_groups(lengths, tau):
    found = list(groups(lengths, tau))
    assert sorted(sum(found, [])) == sorted(set(lengths))              # each length in one group
    for group in found:
        assert group == sorted(group)
        assert group[-1] - tau <= 2 * (group[0] - tau)
    group_of = {length: k for k, group in enumerate(found) for length in group}
    for length in group_of:
        assert len(group_of) < 12 or group_of[length] != group_of.get(length + 1)
    assert len(found) < 60


@pytest.mark.parametrize("M, tau, lengths", [
    (1, 1, range(2, 25)), (4, 5, range(6, 25)), (16, 2, [3, 4, 9, 30]), (3, 1, [2]), (3, 7, [50]),
    (2, 1, [2, 700])])
def test_a_model_that_knows_the_answer_is_always_right(M, tau, lengths):
    accuracies, asked = ask_oracle(list(lengths), 16, M, tau, 300)
    assert accuracies == [1.0] * len(lengths)
    assert sorted(asked) == list(lengths)
    for length, rows in asked.items():
        q, i, _, count = rows.T
        assert len(rows) >= 300 and (count == 1).all()             # whole tasks, enough of them
        assert q.max() < M and i.max() < length - tau


def test_labels_of_one_answer_may_have_a_dimension_for_it():
    model, tokens = build_model("nope", L=8), torch.randint(16, (40, 9))
    labels = model(tokens).argmax(-1)                        # (40,): all are right
    labels[:10] = (labels[:10] + 1) % 16
    for shape in (40,), (40, 1):
        assert evaluation.batch_accuracy(model, tokens, labels.view(shape), None) == 0.75
    with pytest.raises(RuntimeError):
        evaluation.batch_accuracy(model, tokens, labels.repeat(2), None)


def test_accuracy_is_the_share_of_right_answers():
    oracle = Oracle(16, 1)
    oracle.head = lambda x: F.one_hot(torch.where(x[:, 1] == 0, (x[:, 2] + 1) % 16, x[:, 2]), 16)
    accuracies = accuracy_by_length(oracle, [2, 3, 5, 11], 16, 4, 1, 4000)     # wrong at i = 0
    assert accuracies == pytest.approx([0, 1 / 2, 3 / 4, 9 / 10], abs=0.002)


@pytest.mark.parametrize("lengths", [list(range(4, 13)), [4, 5, 12], list(range(20, 40))])
def test_queries_positions_and_values_are_uniform_at_each_length(lengths):
    _, asked = ask_oracle(lengths, 5, 3, 3, 3000)
    for length, rows in asked.items():
        q, i, value, _ = rows.T
        counts = torch.bincount(i, minlength=length - 3)
        assert len(counts) == length - 3
        assert counts.max() == counts.min(), "positions are spread evenly"
        assert_uniform(q * 4 + value - (value > q).long(), 12)
        assert_uniform(i * 3 + q, 3 * (length - 3))


def test_neighbouring_lengths_have_contexts_of_their_own():
    _, asked = ask_oracle([60, 61], 16, 4, 1, 8)
    i, j = (asked[length][:8, 1] for length in (60, 61))
    assert ((i - j).abs() > 1).any(), "not the same places in both"


class Guess:
    """Guesses one of the two possible values, once for a context: its luck is the same at every
    length that shares the context."""
    generator = torch.Generator().manual_seed(0)
    embedding, layers = torch.nn.Embedding(1, 8), []

    def run_layers(self, tokens, states=None, last_only=False):
        if states is None:
            states = torch.randint(1, 3, (len(tokens),), generator=self.generator)
        return F.one_hot(states, 3)[:, None], states

    def head(self, x):
        return x


def test_a_curve_is_as_certain_as_it_claims(monkeypatch):
    """The standard deviation of a curve's mean beyond the training length, over 80 repetitions."""
    def contexts(n, L, K, M, tau, device, generator, i):
        labels = torch.randint(1, 3, (n,), generator=generator)
        return torch.zeros(1, L + 1).expand(n, L + 1), labels
    monkeypatch.setattr(evaluation, "recall_batch", contexts)
    means = []
    for seed in range(80):
        curve = accuracy_by_length(Guess(), range(48, 193), 3, 1, 1, 1024, seed=seed)
        assert 0.4 < min(curve) < max(curve) < 0.6
        means.append(sum(curve[16:]) / len(curve[16:]))
    assert torch.tensor(means).std() < 0.004


@pytest.fixture(scope="module")
def half_trained():
    """A model that is right in some cases and wrong in others, and more so the longer they are."""
    torch.manual_seed(0)
    model, generator = build_model("hybrid-a", d=16), stream(0, "training")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(120):
        tokens, labels = evaluation.recall_batch(32, 12, 16, 8, 1, generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(tokens), labels).backward()
        optimizer.step()
    return model.eval()


def test_agrees_with_the_definition(half_trained):
    lengths = list(range(2, 25))
    shared = accuracy_by_length(half_trained, lengths, 16, 8, 1, 2000)
    single = accuracy_one_by_one(half_trained, lengths, 16, 8, 1, 2000, seed=1)
    assert 0.3 < min(single) < max(single) < 0.9, "half-trained"
    errors = []
    for a, b in zip(shared, single):
        sigma = (2 * max(b * (1 - b), 0.01) / 2000) ** 0.5
        errors.append((a - b) / sigma)
    assert max(map(abs, errors)) < 4
    assert abs(sum(errors)) / 23 < 1.5


def test_the_definition_asks_for_each_length():
    seen = []

    def model(tokens, at):
        seen.append(tuple(tokens.shape))
        position = (tokens[:, :-1] == tokens[:, -1:]).int().argmax(1)
        return F.one_hot(tokens.gather(1, position[:, None] + 2)[:, 0], 16)
    model.embedding, model.layers = torch.nn.Embedding(1, 8), []
    assert accuracy_one_by_one(model, [5, 3], 16, 4, 2, 100) == [1.0, 1.0]
    assert seen == [(100, 6), (100, 4)]


def test_order_and_duplicates_of_lengths(half_trained):
    lengths = [3, 7, 8, 20]
    accuracy = dict(zip(lengths, accuracy_by_length(half_trained, lengths, 16, 4, 1, 200)))
    assert len(set(accuracy.values())) > 1
    mixed = [20, 3, 8, 3, 7, 20]
    assert accuracy_by_length(half_trained, mixed, 16, 4, 1, 200) == [accuracy[n] for n in mixed]


def test_seeds(half_trained):
    one, again, other = (accuracy_by_length(half_trained, range(2, 20), 16, 4, 1, 200, seed=seed)
                         for seed in (0, 0, 1))
    assert one == again != other


@pytest.mark.parametrize("name", ["learned", "rope", "mamba", "hybrid-b"])
def test_neither_segments_nor_batches_change_the_numbers(name, monkeypatch):
    torch.manual_seed(0)
    model, lengths = build_model(name), [2, 11, 12, 40]
    in_one = accuracy_by_length(model, lengths, 16, 8, 1, 200)
    assert any(in_one)
    monkeypatch.setattr(evaluation, "SEGMENT", 3)
    assert accuracy_by_length(model, lengths, 16, 8, 1, 200) == in_one


def test_batches_are_bounded(monkeypatch):
    """Neither the tokens in a batch nor the numbers in a call exceed their bounds."""
    drawn, recall_batch = [], evaluation.recall_batch

    def noted(*arguments, **options):
        drawn.append(arguments[:2])
        return recall_batch(*arguments, **options)
    monkeypatch.setattr(evaluation, "recall_batch", noted)
    monkeypatch.setattr(evaluation, "HELD_TOKENS", 4000)
    assert ask_oracle([2, 3, 100, 500], 16, 4, 1, 60)[0] == [1.0] * 4
    assert 2000 < max(rows * length for rows, length in drawn) <= 4000
    drawn.clear()
    monkeypatch.setattr(evaluation, "SEGMENT", 100)
    monkeypatch.setattr(evaluation, "CALL_FLOATS", 2000)
    assert ask_oracle([2, 3, 100, 500], 16, 4, 1, 60)[0] == [1.0] * 4
    d = Oracle.embedding.embedding_dim
    assert max(rows * min(length, 100) * d for rows, length in drawn) <= 2000


def test_scores_that_attention_stores_are_bounded(monkeypatch):
    """Attention stores a score for each token of a call and each token so far."""
    class Attends(Oracle):
        layers = [types.SimpleNamespace(attends=True)]

        def run_layers(self, tokens, states=None, last_only=False):
            x, after = super().run_layers(tokens, states, last_only)
            scores.append(tokens.numel() * after[0].shape[1])
            return x, after

    scores = []
    monkeypatch.setattr(evaluation, "CALL_FLOATS", 2000)
    monkeypatch.setattr(evaluation, "SCORES_PER_FLOAT", 4)
    assert accuracy_by_length(Attends(16, 1), [3, 100, 500], 16, 4, 1, 60) == [1.0] * 3
    assert 4000 < max(scores) <= 2000 * 4 + 500


def test_evaluation_leaves_the_global_generator_alone():
    config = {**DEFAULTS, **GRID, "L": 8}
    for name in "rope", "learned":
        torch.manual_seed(5)
        model = build_model(name, L=8)
        before = torch.get_rng_state()
        evaluate(model, config, [8, 40], 16, torch.device("cpu"))
        assert torch.equal(torch.get_rng_state(), before)


def test_evaluation_reads_its_own_stream(half_trained, monkeypatch):
    asked = []
    monkeypatch.setattr(evaluation, "stream", lambda *words: asked.append(words) or stream(*words))
    accuracy_by_length(half_trained, [3], 16, 4, 1, 10, seed=5)
    accuracy_one_by_one(half_trained, [3], 16, 4, 1, 10, seed=5)
    assert {words[:2] for words in asked} == {(5, "evaluation"), (5, "places")}


def test_lengths_to_test():
    assert evaluation.lengths_to_test(64, tau=5) == list(range(6, 193))
    assert evaluation.lengths_to_test(256) == list(range(2, 769))
    many = evaluation.lengths_to_test(20000)
    assert len(many) < 800 and many[-1] == 60000 and 20000 in many and 2 in many
    for task in ("mqar", "copy", "parity"):
        few = evaluation.lengths_to_test(64, 4, 1, task)
        assert len(few) < 35 and 64 in few and 192 in few


def test_accuracy_during_training_goes_in_parts(half_trained, monkeypatch):
    config = {"task": "recall", "K": 16, "M": 8, "tau": 1, "L": 12}
    whole = evaluation.training_accuracy(half_trained, config, stream(3, "test"))
    d = half_trained.embedding.embedding_dim
    monkeypatch.setattr(evaluation, "CALL_FLOATS", 13 * 5 * d)
    sizes, forward = [], half_trained.forward

    def noted(tokens, at=None):
        sizes.append(len(tokens))
        return forward(tokens, at)
    monkeypatch.setattr(half_trained, "forward", noted)
    again = evaluation.training_accuracy(half_trained, config, stream(3, "test"))
    assert again == whole and set(sizes) == {4}                      # a power of two, at most 5
    tokens, labels = evaluation.recall_batch(512, 12, 16, 8, 1, generator=stream(3, "test"))
    assert whole == (forward(tokens).argmax(-1) == labels).float().mean().item()


def test_merged_keeps_the_number_from_more_sequences():
    old = {"length": [2, 3, 4], "accuracy": [0.2, 0.3, 0.4], "sequences": 100}
    assert merged(old, [9, 3], [0.9, 0.33], 100) == {
        "length": [2, 3, 4, 9], "accuracy": [0.2, 0.33, 0.4, 0.9], "sequences": 100}
    fewer = merged(old, [1, 3], [0.1, 0.0], 1)
    assert fewer == {"length": [1, 2, 3, 4], "accuracy": [0.1, 0.2, 0.3, 0.4],
                     "sequences": [1, 100, 100, 100]}
    assert merged(fewer, [1, 3], [0.11, 0.31], 200) == {
        "length": [1, 2, 3, 4], "accuracy": [0.11, 0.2, 0.31, 0.4],
        "sequences": [200, 100, 200, 100]}
