"""Layers stacked by a pattern into the models that `--model` names.

A pattern is a string with one letter for each layer, first layer first. To add a model, add a line to MODELS; to add a layer,
add a letter to LAYERS: its module maps x (B, L, d) and a state (None at the start) to y (B, L, d) and the next state. It must
be causal; its state is a tensor or a tuple of tensors, batch first, or has nothing per row, such as a count of tokens.

Imports attention, data, ladder, mamba, mamba2, mlp and zamba.
"""

import math

import torch
import torch.nn as nn

from attention import Attention, LearnedPosition
from data import embedding_table
from ladder import LTI, RGLRU, RNN, Retention
from mamba import Mamba
from mamba2 import Mamba2, normed
from mlp import MLP, MixtureOfExperts
from zamba import SharedBlock, SharedUse


def shared(blocks, rank=0, position="none"):
    """How to build uses of that many shared blocks in turn: o["shared"] has a model's uses so far."""
    def use(d, o):
        uses = o["shared"].setdefault(o["letter"], [])
        block = uses[-blocks].block if len(uses) >= blocks else SharedBlock(2 * d, o["n_heads"], position)
        uses.append(SharedUse(d, block, rank))
        return uses[-1]
    return use


LAYERS = {  # letter: how to build the layer; d is the width, o the other options and the layer's place: see build_model
    # the six models of the study
    "A": lambda d, o: Attention(d, o["n_heads"]),
    "R": lambda d, o: Attention(d, o["n_heads"], "rope", recency=2.0 if o["depth"] == 0 else None),
    "P": lambda d, o: LearnedPosition(d, 3 * o["L"] + 1),
    "M": lambda d, o: Mamba(d, o["d_state"]),
    # the ladder
    "N": lambda d, o: RNN(d),
    "L": lambda d, o: LTI(d, o["d_state"]),
    "T": lambda d, o: Retention(d),
    "U": lambda d, o: RGLRU(d),
    # the hybrids
    "2": lambda d, o: Mamba2(d, o["d_state"], headdim=math.gcd(2 * d, 8)),             # 8 channels in a head, where it can be
    "F": lambda d, o: MLP(d),
    "E": lambda d, o: MixtureOfExperts(d),
    "J": lambda d, o: Mamba(d, o["d_state"], dt_rank=d, inner_norms=True),             # a norm of ceil(d / 16) = 1 number is a sign
    "G": lambda d, o: Attention(d, n_heads=4, kv_heads=2),
    "S": lambda d, o: Attention(d, o["n_heads"], "rope", recency=2.0 if o["depth"] == 0 else None, window=max(2, o["L"] // 4)),
    "Z": shared(1),
    "Y": shared(2, rank=4),
    "X": shared(1, rank=4, position="rope"),
}
MODELS = {  # the six of the study
    "nope": "AA",
    "learned": "PAA",
    "rope": "RR",
    "mamba": "MM",
    "hybrid-a": "MA",
    "hybrid-b": "MAM",
}
FAMILY = {  # and their relatives: the order of layers that each is known for, not its sizes
    "rnn": "NN",
    "lti": "LL",
    "retention": "TT",
    "griffin": "UFUFSF",               # De et al. 2024, arXiv 2402.19427; there with GeGLU and one head of keys and values
    "mamba2": "22",
    "samba": "MFSF",                   # Ren et al. 2024, arXiv 2406.07522
    "mamba2-hybrid": "2F2FGF2F",       # Waleffe et al. 2024, arXiv 2406.07887; there 24 Mamba-2, 4 attention, 28 MLPs
    "jamba": "JFJEJFJEGFJEJFJE",       # Lieber et al. 2024, arXiv 2403.19887; there with 16 experts
    "zamba": "MMZMMZ",                 # Glorioso et al. 2024, arXiv 2405.16712
    "zamba2": "22Y22Y22Y",             # arXiv 2411.15242, the 2.7B model
    "zamba2-mini": "22X22X",           # the same, the 1.2B model
}


class RMSNorm(nn.Module):
    """mamba2.normed times a weight, as nn.RMSNorm, and a bias where one is asked for.

    bias: the standard deviation with which a bias starts, for layers that have none of their own; None for no bias.
    Embeddings are fixed and of length 1, so no direction is shared by all tokens. Without a bias, a Mamba layer's gate cannot
    be open for every token, and what it passes on from the token before depends on the token that stands here.
    """

    def __init__(self, d, bias=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = None if bias is None else nn.Parameter(bias * torch.randn(d))

    def forward(self, x):
        x = normed(x, torch.finfo(x.dtype).eps) * self.weight
        return x if self.bias is None else x + self.bias


class Model(nn.Module):
    """Embedding, then for each layer x = x + layer(norm(x)), then a norm and a linear map to the vocabulary.

    The norm is RMSNorm, before each layer (pre-norm), but not before positions and shared blocks. The embedding is the fixed
    table of data.py unless learn_embedding trains it.
    """

    def __init__(self, layers, K, d, learn_embedding=False):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embedding_table(K, d), freeze=not learn_embedding)
        self.layers = nn.ModuleList(layers)
        attends = any(isinstance(layer, (Attention, SharedUse)) for layer in layers)
        bias = 0.5 if attends else 0.0                         # Mamba alone learns better from zero
        self.norms = nn.ModuleList(                            # a position does not look at its input, a shared block norms it itself
            nn.Identity() if isinstance(layer, (LearnedPosition, SharedUse))
            else RMSNorm(d, bias if isinstance(layer, (Mamba, Mamba2)) else None) for layer in layers)
        self.head = nn.Sequential(RMSNorm(d), nn.Linear(d, K, bias=False))

    def stream(self, tokens, states=None, only_last=False):
        """Run a piece of a sequence: tokens (B, L), states as an earlier piece left them, or None at the start.

        Returns x (B, L, d) before the head, or (B, 1, d) if only the last token's is wanted, and the list of states, one for
        each layer. Pieces give what the whole gives.
        """
        x = embedding = self.embedding(tokens)                                         # (B, L, d)
        states = list(states or [None] * len(self.layers))
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers)):
            asks = {"queries": 1} if only_last and layer is self.layers[-1] and isinstance(layer, Attention) else {}
            if isinstance(layer, SharedUse):
                asks = {"embedding": embedding}
            y, states[i] = layer(norm(x), states[i], **asks)
            x = x[:, x.shape[1] - y.shape[1]:] + y
        return x[:, -1:] if only_last else x, states

    @staticmethod
    def select(states, rows):
        """The states of some rows of the batch: rows (n,) int64."""
        def of_layer(state):
            if torch.is_tensor(state):
                return state[rows]
            if not isinstance(state, tuple):
                return state
            chosen = [v[rows] for v in state]
            return type(state)(*chosen) if hasattr(state, "_fields") else tuple(chosen)
        return [of_layer(state) for state in states]

    def size(self):
        """The number of trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def reach(self, positions):
        """Make room for so many tokens where a layer has a table of positions: its new rows are untrained."""
        for layer in self.layers:
            if isinstance(layer, LearnedPosition):
                layer.reach(positions)

    def forward(self, tokens, last=None):
        """tokens (B, L + 1) int64 -> logits (B, K) at the last token, or in row b at token last[b]."""
        x, _ = self.stream(tokens, only_last=last is None)                             # (B, 1 or L+1, d)
        return self.head(x[:, -1] if last is None else x[torch.arange(len(x), device=x.device), last])


def build_model(name, K=16, d=8, L=64, n_heads=1, d_state=16, init="official", learn_embedding=False):
    """Build a model by its name in MODELS or FAMILY, or by its pattern, such as "MAM". L is the training length.

    init: "official", or "mimetic" for Mamba layers that start out near linear attention (Mamba.start_as_linear_attention).
    Raises ValueError for an unknown name, or an option that a layer cannot have.
    """
    known = {**MODELS, **FAMILY}
    pattern = known.get(name, name)
    unknown = sorted(set(pattern) - set(LAYERS))
    if unknown or not pattern:
        raise ValueError(f"--model is {name!r}, but it must be one of {', '.join(known)}, "
                         f"or a pattern of the letters {', '.join(LAYERS)}")
    options, blocks = dict(L=L, n_heads=n_heads, d_state=d_state), {}
    layers = [LAYERS[letter](d, dict(options, depth=depth, letter=letter, shared=blocks)) for depth, letter in enumerate(pattern)]
    if init == "mimetic":
        starting = [layer for layer in layers if isinstance(layer, Mamba)]
        if not starting:
            raise ValueError(f"--init mimetic is for Mamba layers, and --model {name} has none")
        for layer in starting:
            layer.start_as_linear_attention()
    return Model(layers, K, d, learn_embedding)
