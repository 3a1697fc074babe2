"""Layers stacked by a pattern into the models that `--model` names.

A pattern is a string with one letter for each layer, first layer first. To add a model, add a line to MODELS; to add a layer,
add a letter to LAYERS: its module maps x (B, L, d) and a state (None at the start) to y (B, L, d) and the next state.

Imports attention, mamba and data; imported by eval and train.
"""

import torch
import torch.nn as nn

from attention import Attention, LearnedPosition
from data import embedding_table
from mamba import Mamba

LAYERS = {  # letter: how to build the layer; d is the width, o the other options of build_model
    "A": lambda d, o: Attention(d, o["n_heads"]),
    "R": lambda d, o: Attention(d, o["n_heads"], position="rope"),
    "P": lambda d, o: LearnedPosition(d, 3 * o["L"] + 1),
    "M": lambda d, o: Mamba(d),
}
MODELS = {
    "nope": "AA",
    "learned": "PAA",
    "rope": "RR",
    "mamba": "MM",
    "hybrid-a": "MA",
    "hybrid-b": "MAM",
}


class Model(nn.Module):
    """Embedding, then for each layer x = x + layer(norm(x)), then a norm and a linear map to the vocabulary.

    The norm is RMSNorm, before each layer (pre-norm). The embedding is the fixed table of data.py unless
    learn_embedding trains it.
    """

    def __init__(self, layers, K, d, learn_embedding=False):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(embedding_table(K, d), freeze=not learn_embedding)
        self.norms = nn.ModuleList(nn.RMSNorm(d) for _ in layers)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Sequential(nn.RMSNorm(d), nn.Linear(d, K, bias=False))

    def stream(self, tokens, states=None):
        """Run a piece of a sequence: tokens (B, L), states as an earlier piece left them, or None at the start.

        Returns x (B, L, d) before the head and the list of states, one for each layer. Pieces give what the whole gives.
        """
        x = self.embedding(tokens)                                                     # (B, L, d)
        states = list(states or [None] * len(self.layers))
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers)):
            y, states[i] = layer(norm(x), states[i])
            x = x + y
        return x, states

    def forward(self, tokens, last=None):
        """tokens (B, L + 1) int64 -> logits (B, K) at the last token, or in row b at token last[b]."""
        x, _ = self.stream(tokens)
        if last is None:
            return self.head(x[:, -1])
        return self.head(x[torch.arange(len(x), device=x.device), last])


def build_model(name, K=16, d=8, L=64, n_heads=1, learn_embedding=False):
    """Build a model by its name in MODELS, or by its pattern, such as "MAM". L is the training length.

    Raises ValueError for an unknown name, or an option that a layer cannot have.
    """
    pattern = MODELS.get(name, name)
    unknown = sorted(set(pattern) - set(LAYERS))
    if unknown or not pattern:
        raise ValueError(f"--model is {name!r}, but it must be one of {', '.join(MODELS)}, "
                         f"or a pattern of the letters {', '.join(LAYERS)}")
    options = dict(L=L, n_heads=n_heads)
    return Model([LAYERS[letter](d, options) for letter in pattern], K, d, learn_embedding)
