"""Associative recall: the sequences and the fixed embedding table.

A sequence is L context tokens followed by one query token. The query q stands once in the context, at
position i (counting from 1), its value v stands tau tokens later, and the label is v:

    position    1   2  ...  i  ...  i+tau  ...  L  |  L+1
    token       .   .       q         v         .  |   q      -> v

Imports nothing of this repository.
"""

import numpy as np
import torch


def check_task(L, K=16, M=1, tau=1):
    """Raise a ValueError, in one sentence, unless the four numbers describe a task that exists."""
    if K < 2:
        raise ValueError(f"--K is {K}, but the vocabulary needs at least 2 tokens: a query and a value")
    if not 1 <= M <= K:
        raise ValueError(f"--M is {M}, but the number of possible queries is from 1 to K = {K}")
    if tau < 1:
        raise ValueError(f"--tau is {tau}, but the value comes at least 1 token after the query")
    if L < tau + 1:
        raise ValueError(f"--L is {L}, but query and value need at least tau + 1 = {tau + 1} context tokens")


def recall_batch(batch_size, L, K=16, M=1, tau=1, device="cpu", generator=None, lengths=None,
                 i=None):
    """Draw a batch of associative-recall sequences (Definition 1 and the sampling steps of the assignment).

    The query is uniform over the first M tokens of the vocabulary {0 ... K-1}, its position i is uniform over
    1 ... L - tau, and the value and every other context token are uniform over the vocabulary without q.

    lengths: None, or (B,) int64, a context length from tau + 1 to L for each sequence. The sequence in row b then
        ends with its query at index lengths[b], and what stands behind it is padding that a causal model
        cannot see from there.
    i: None, or (B,) int64, the position of each query in the context, here counted from 0, in place of a random one.
    generator: a torch.Generator on `device`, for batches that can be drawn again.

    Returns tokens (B, L + 1) int64 and labels (B,) int64. Raises ValueError if the task cannot exist.
    """
    check_task(L, K, M, tau)
    draw = dict(device=device, generator=generator)
    q = torch.randint(M, (batch_size, 1), **draw)                             # (B, 1)
    others = torch.randint(K - 1, (batch_size, L + 1), **draw)                # (B, L+1)
    if lengths is None:
        lengths = torch.full((batch_size,), L, device=device)
    if i is None:
        i = torch.randint(2**31 - 1, (batch_size,), **draw) % (lengths - tau)         # (B,), from 0; uniform to L / 2^31
    i, end = i[:, None], lengths[:, None]                                     # (B, 1), where the query stands

    tokens = others + (others >= q)         # 0 ... K-2 with a gap left at q: uniform over the tokens that are not q
    labels = tokens.gather(1, i + tau)[:, 0]     # v is any token but q, which is what already stands there
    position = torch.arange(L + 1, device=device)
    tokens = torch.where((position == i) | (position == end), q, tokens)
    return tokens, labels


def embedding_table(K, d):
    """The fixed embedding: K x d standard normal numbers from numpy's seed 0, each row scaled to length 1.

    Returns (K, d) float32. Same numbers as numpy.random.seed(0); numpy.random.randn(K, d), but numpy's global
    generator is left alone.
    """
    V = np.random.RandomState(0).randn(K, d)
    return torch.tensor(V / np.linalg.norm(V, axis=1, keepdims=True), dtype=torch.float32)


STREAMS = {"training": 0, "test": 1, "evaluation": 2}


def stream(seed, purpose, device="cpu"):
    """A torch.Generator for one purpose of a run, training, test or evaluation, seed from 0 to 2^30 - 1.

    No two pairs of seed and purpose share their draws. A CPU generator keeps 32 bits of its seed, which is
    why there is a limit.
    """
    return torch.Generator(device).manual_seed(4 * seed + STREAMS[purpose])
