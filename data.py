"""The tasks, sequences of tokens with answers, and the fixed embedding table.

Associative recall, the task of this repository, shows a query token q once in a context of L
tokens, at position i, its value v tau tokens later, and then asks for q again:

    position    1   2  ...  i  ...  i+tau  ...  L  |  L+1
    token       .   .       q         v         .  |   q      -> v

M tokens can be the query, of a vocabulary of K. Positions count from 1 in this picture, from 0 in
the code. `python data.py` shows sequences of every task.
"""

import numpy as np
import torch

from output import say

STREAMS = {"training": 0, "test": 1, "evaluation": 2, "places": 3}       # places: of queries
WHOLE = 10               # `show` prints contexts up to this length in full,
NEAR = 1                 # and of longer ones this many tokens around each mark


def stream(seed, purpose, device="cpu"):
    """A torch.Generator on `device` for one purpose of a run, a key of STREAMS.

    Any two pairs of seed and purpose draw different numbers, for seeds from 0 to 2^30 - 1. Seeds
    cannot be larger, because a CPU generator uses only 32 bits of the number it is seeded with.
    """
    return torch.Generator(device).manual_seed(4 * seed + STREAMS[purpose])


# ---- associative recall --------------------------------------------------------------------------
#
# The text of the assignment that this task comes from allows v = q, its Definition 1 does not; here
# v is never q. L does not count the query at the end: otherwise the positions 1 ... L - tau of the
# assignment, and its shortest length, tau + 1, would not fit.

def recall_batch(batch_size, L, K=16, M=1, tau=1, device="cpu", generator=None, lengths=None,
                 i=None):
    """Draw a batch of associative recall.

    The query is uniform over the first M tokens of the vocabulary {0 ... K-1}, and, unless `i` is
    given, its position is uniform over those that leave room for the value. The value and all other
    context tokens are uniform over the vocabulary without the query, so it appears exactly twice.

    lengths: None, or (B,) int64, a context length from tau + 1 to L for each sequence. Sequence b
        ends with its query at index lengths[b]; a causal model cannot see the padding after it.
    i: None, or (B,) int64, the position of each query in the context, counted from 0, instead of a
        random one.
    generator: a torch.Generator on `device`.

    Returns tokens (B, L + 1) int64 and labels (B,) int64. Raises ValueError for numbers that
    describe no task.
    """
    check_task(L, K, M, tau)
    draw = dict(device=device, generator=generator)
    q = torch.randint(M, (batch_size, 1), **draw)                        # (B, 1)
    others = torch.randint(K - 1, (batch_size, L + 1), **draw)           # (B, L+1)
    # lengths and i are checked on a CPU only: asking a GPU for values would break a CUDA graph.
    if lengths is None:
        lengths = torch.full((batch_size,), L, device=device)
    elif lengths.device.type == "cpu" and not ((lengths > tau) & (lengths <= L)).all():
        raise ValueError(f"lengths must be from tau + 1 = {tau + 1} to L = {L}")
    if i is None:
        # randint has one bound for all rows, so take a remainder. Its bias is at most L / 2^31.
        i = torch.randint(2**31 - 1, (batch_size,), **draw) % (lengths - tau)            # (B,)
    elif i.device.type == "cpu" and not ((i >= 0) & (i < lengths - tau)).all():
        raise ValueError("i must be from 0 to lengths - tau - 1: the value comes tau tokens later")
    i, end = i[:, None], lengths[:, None]        # (B, 1) each: where q is, and where it is asked

    tokens = others + (others >= q)              # skip q: 0 ... K-2 become all tokens except q
    labels = tokens.gather(1, i + tau)[:, 0]     # that token is uniform without q: it can be v
    position = torch.arange(L + 1, device=device)
    tokens = torch.where((position == i) | (position == end), q, tokens)
    return tokens, labels


# ---- tasks as train.py wants them ----------------------------------------------------------------
#
# task(batch_size, L, K, M, tau, device, generator, uniform) -> tokens (B, T), labels, at
#
# at (B, Q) int64 are the positions to answer at, labels (B, Q) the answers. If there is one answer
# per sequence, labels are (B,), and at is (B,), or None for the last token. `uniform` is for recall
# alone: other tasks get False. On a GPU a task is captured in a CUDA graph, so it must draw from
# `generator` alone and not ask for values (.item()).
#
# L is the length of the context, which tests vary. If there are M things to remember whatever L is,
# fill the context with blanks, as copy does; marks after it do not count towards L.
#
# To add a task, write such a function and give it a name in TASKS: train.py and eval.py do the
# rest. Its limits belong in check_task and shortest, its number of answers in n_answers.

def recall(batch_size, L, K=16, M=1, tau=1, device="cpu", generator=None, uniform=False):
    """recall_batch. uniform: each sequence has a random length of its own, from tau + 1 to L.

    In a longer context, q has more possible positions, and v has to be kept for longer. So short
    contexts help training to start.
    """
    lengths = None
    if uniform:
        lengths = torch.randint(tau + 1, L + 1, (batch_size,), device=device, generator=generator)
    tokens, labels = recall_batch(batch_size, L, K, M, tau, device, generator, lengths)
    return tokens, labels, lengths       # the query follows the context: its index is the length


def mqar(batch_size, L, K=16, M=1, tau=1, device="cpu", generator=None, uniform=False):
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927).

    First come M keys, each followed by its value. Among the L - 2M tokens after them, every key
    comes once more, in random order and at random places, and the answer there is its value. Keys
    are from the lower half of the vocabulary and all different; values and all other tokens are
    from the upper half. In a longer context, the queries are farther from the pairs.
    Returns tokens (B, L), labels and at (B, M); tau and uniform have no effect.
    """
    draw = dict(device=device, generator=generator)
    half = K // 2
    # The first M of a random permutation: M different keys.
    keys = torch.rand(batch_size, half, **draw).argsort(1)[:, :M]                    # (B, M)
    values = torch.randint(half, K, (batch_size, M), **draw)                         # (B, M)
    pairs = torch.stack([keys, values], dim=2).flatten(1)                            # (B, 2M)
    rest = torch.randint(half, K, (batch_size, L - 2 * M), **draw)                   # (B, L - 2M)
    places = torch.rand(batch_size, L - 2 * M, **draw).argsort(1)[:, :M]             # (B, M)
    rest = rest.scatter(1, places, keys)
    return torch.cat([pairs, rest], dim=1), values, places + 2 * M


def copy(batch_size, L, K=16, M=1, tau=1, device="cpu", generator=None, uniform=False):
    """Selective copying (Gu and Dao 2023, section 4.1.1): repeat M tokens scattered among blanks.

    A context of L tokens has M tokens from {0 ... K-3} at random places and blanks (K-1) elsewhere.
    After it come M marks (K-2), at which the model answers the M tokens in order. In a longer
    context, there are more blanks to ignore.
    Returns tokens (B, L + M), labels and at (B, M); tau and uniform have no effect.
    """
    if L < M:
        raise ValueError(f"{L} context tokens have no room for M = {M} tokens to copy")
    draw = dict(device=device, generator=generator)
    content = torch.randint(K - 2, (batch_size, M), **draw)                          # (B, M)
    places = torch.rand(batch_size, L, **draw).argsort(1)[:, :M].sort(1).values      # (B, M)
    context = torch.full((batch_size, L), K - 1, device=device).scatter(1, places, content)
    marks = torch.full((batch_size, M), K - 2, device=device)
    at = torch.arange(L, L + M, device=device).expand(batch_size, M)
    return torch.cat([context, marks], dim=1), content, at


def parity(batch_size, L, K=16, M=1, tau=1, device="cpu", generator=None, uniform=False):
    """Parity: at every token, is the number of ones so far odd? Tokens and answers are 0 and 1.

    The model has to count, not to recall. A state that only decays cannot do it; a state that can
    change its sign at each token can. In a longer context there are more positions to answer at.
    Returns tokens, labels and at, (B, L) each; K, M, tau and uniform have no effect.
    """
    tokens = torch.randint(2, (batch_size, L), device=device, generator=generator)   # (B, L)
    at = torch.arange(L, device=device).expand(batch_size, L)
    return tokens, tokens.cumsum(1) % 2, at


TASKS = {"recall": recall, "mqar": mqar, "copy": copy, "parity": parity}


# ---- limits of the tasks -------------------------------------------------------------------------

def check_task(L, K=16, M=1, tau=1, task="recall"):
    """Raise a ValueError of one sentence if no task has these numbers."""
    if task not in TASKS:
        raise ValueError(f"--task is {task!r}, but it must be one of {', '.join(TASKS)}")
    if K < 2:
        raise ValueError(f"--K is {K}, but the vocabulary needs at least 2 tokens")
    if M < 1:
        raise ValueError(f"--M is {M}, but it must be at least 1")
    if tau < 1:
        raise ValueError(f"--tau is {tau}, but the value comes at least 1 token after the query")
    if task == "recall" and M > K:
        raise ValueError(f"--M is {M}, but the number of possible queries is at most K = {K}")
    if task == "mqar" and 2 * M > K:
        raise ValueError(f"--M is {M}, but mqar takes its keys from half of the K = {K} tokens")
    if task == "copy" and K < 3:
        raise ValueError(f"--K is {K}, but copy needs a blank, a mark and at least one other token")
    if L < shortest(M, tau, task):
        raise ValueError(f"--L is {L}, but {task} with M = {M} and tau = {tau} needs at least "
                         f"{shortest(M, tau, task)} context tokens")


def shortest(M=1, tau=1, task="recall"):
    """The shortest context of a task, in tokens."""
    return {"recall": tau + 1, "mqar": 3 * M, "copy": M}.get(task, 1)


def n_answers(task, K):
    """The number of possible answers; infinity if not known. Chance is 1 over it. Recall has K,
    although v is never q."""
    known = {"recall": K, "mqar": K - K // 2, "copy": max(1, K - 2), "parity": 2}
    return known.get(task, float("inf"))


# ---- the embedding, and sequences as text --------------------------------------------------------

def embedding_table(K, d):
    """The fixed embedding: standard normal numbers, each row scaled to length 1.

    Returns (K, d) float32. The numbers are those of numpy.random.seed(0); numpy.random.randn(K, d),
    but numpy's global generator is left alone.
    """
    V = np.random.RandomState(0).randn(K, d)
    return torch.tensor(V / np.linalg.norm(V, axis=1, keepdims=True), dtype=torch.float32)


def show(tokens, tau):
    """A sequence of recall as a line of text, with (q) and [v] marked; far tokens are left out."""
    tokens = [int(token) for token in tokens]
    last = len(tokens) - 1
    i = tokens.index(tokens[last])
    marks = {i: "({})", i + tau: "[{}]", last: "({})"}
    words = []
    for t, token in enumerate(tokens):
        if last <= WHOLE or min(abs(t - marked) for marked in marks) <= NEAR:
            words.append(marks.get(t, " {} ").format(token))
        elif words[-1:] != ["..."]:
            words.append("...")
    return " ".join(f"{word:>4}" for word in words)


@torch.no_grad()
def show_answers(model, config, device):
    """Print three sequences of recall, with the model's answers."""
    L, K, M, tau, seed = (config[flag] for flag in ("L", "K", "M", "tau", "seed"))
    tokens, labels = recall_batch(3, L, K, M, tau, device, stream(seed, "evaluation", device))
    answers = model(tokens).argmax(-1)
    for row, answer, label in zip(tokens, answers.tolist(), labels.tolist()):
        verdict = "right" if answer == label else f"wrong, it is {label}"
        say(f"{show(row, tau)}  ->  {answer}, {verdict}")


if __name__ == "__main__":
    rules = {"mqar": "pairs of key and value, then each key asks for its value",
             "copy": "repeat the tokens among the blanks (15) at the marks (14)",
             "parity": "is the number of ones so far odd?"}
    print("recall, L = 10, M = 4, tau = 2: (q) and its value [v], then (q) again -> v")
    tokens, labels = recall_batch(3, 10, M=4, tau=2, generator=stream(0, "training"))
    for row, label in zip(tokens, labels):
        print(show(row, 2), " -> ", label.item())
    for name, task in TASKS.items():
        if name != "recall":
            setting = "L = 12" if name == "parity" else "L = 12, M = 3"
            print(f"\n{name}, {setting}: {rules.get(name, 'tokens, and the answers below them')}")
            tokens, labels, at = task(1, 12, M=3, generator=stream(0, "training"))
            at = torch.tensor([[tokens.shape[1] - 1]]) if at is None else at     # the last token
            answers = dict(zip(at.reshape(-1).tolist(), labels.reshape(-1).tolist()))
            print(" ".join(f"{token:>3}" for token in tokens[0].tolist()))
            print(" ".join(f"{answers.get(t, ''):>3}" for t in range(tokens.shape[1])))
