"""Layers stacked into the models that `--model` names.

    mamba+attention            a stack of layers, first layer first: words joined by +
    3xmamba+attention+2xmlp    a count in front of a word repeats its layer
    hybrid-a                   a stack that has a name: see MODELS and FAMILY
    mamba                      the model of two Mamba layers; for a single one, write 1xmamba

To add a layer, write a module and give it a word: LAYERS["average"] = RunningMean. It is built with
a width d, and with those values of `build_layer` that its constructor names. A layer

  - maps x (B, L, d) and a state, None at the start of a sequence, to y (B, L, d), or (1, L, d) if
    it is the same for all sequences, and the next state, a tensor, an int or a tuple of these;
  - is causal, and segments of a sequence give what one call gives, whatever dtype a state has;
  - draws random numbers, as dropout does, from torch's own generator alone: it is saved with a run;
  - never asks for values (.item()), so that a CUDA graph can capture it;
  - if it loops over tokens, uses x.unbind(1): the backward pass of x[:, t] allocates zeros like x.

Class attributes, False unless a layer sets them, tell the model how to treat it:

    takes_bias        the norm before it has a bias, because its own input projection has none
    attends           it is attention: the norms' biases in its model start random, not at 0
    skips_norm        no norm comes before it: it needs none, or has its own
    needs_embedding   forward takes embedding=, the embeddings of the same tokens
    answers_last      forward takes last_only=True and then returns y of the last token, (B, 1, d)
"""

import difflib
import inspect
import math
import re
from functools import partial

import torch
import torch.nn as nn

from attention import Attention, LearnedPosition
from data import embedding_table
from family.attention_variants import GroupedAttention, RotaryVariant, SlidingWindow
from family.between import Mamba2Shared, MambaOwn
from family.decay_attention import DecayAttention
from family.deltanet import GatedDeltaNet
from family.experts import MLP, MixtureOfExperts, NormedMamba
from family.ladder import LTI, RGLRU, RNN, Retention, ShortConv
from family.linear_attention import LinearAttention
from family.mamba2 import Mamba2
from family.mamba3 import Mamba3
from family.zamba import SharedUse
from mamba import Mamba


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, x / sqrt(mean of x^2) times a weight, plus a bias unless `bias_std` is None.

    bias_std: the standard deviation of its initial values. Why Mamba needs it: see mamba.Mamba.
    """

    def __init__(self, d, bias_std=None):
        super().__init__(d, eps=torch.finfo(torch.float32).eps)
        self.bias = None if bias_std is None else nn.Parameter(bias_std * torch.randn(d))

    def forward(self, x):
        x = super().forward(x)
        return x if self.bias is None else x + self.bias


class Model(nn.Module):
    """Embed the tokens; for each layer, x = x + layer(norm(x)); a norm; a map to the vocabulary.

    layers: a list of modules as described at the top of this file. The embedding is the fixed table
    of data.py unless learn_embedding trains it.
    """

    def __init__(self, layers, K=16, d=8, learn_embedding=False):
        super().__init__()
        table = embedding_table(K, d)                                            # (K, d)
        self.embedding = nn.Embedding.from_pretrained(table, freeze=not learn_embedding)
        self.layers = nn.ModuleList(layers)
        # Chosen by trial. Without attention, `mamba` at M = 4 reached 0.99 in 11 of 12 runs with
        # biases that start at 0, and in 8 with 0.5. With attention, only 0.5 was tried.
        bias_std = 0.5 if any(getattr(layer, "attends", False) for layer in layers) else 0.0
        self.norms = nn.ModuleList()
        for layer in layers:
            std = bias_std if getattr(layer, "takes_bias", False) else None
            skips_norm = getattr(layer, "skips_norm", False)
            self.norms.append(nn.Identity() if skips_norm else RMSNorm(d, std))
        self.head = nn.Sequential(RMSNorm(d), nn.Linear(d, K, bias=False))

    def run_layers(self, tokens, states=None, last_only=False):
        """Run a segment of a sequence through the layers, continuing from `states`.

        tokens (B, L) int64; states: the list returned for the previous segment, None at the start.
        Returns x, the input of the head, and the list of states, one for each layer. x is
        (B, L, d), or (B, 1, d) for the last token if last_only.
        """
        x = embedding = self.embedding(tokens)                                   # (B, L, d)
        states = list(states or [None] * len(self.layers))
        for i, (norm, layer, state) in enumerate(zip(self.norms, self.layers, states, strict=True)):
            options = {}
            if getattr(layer, "needs_embedding", False):
                options["embedding"] = embedding
            # Only the last layer may leave tokens out: the outputs of the others are read.
            if last_only and i == len(self.layers) - 1 and getattr(layer, "answers_last", False):
                options["last_only"] = True
            normed = norm(x)                                                     # (B, L, d)
            if "last_only" in options:
                x = x[:, -1:]                                                    # (B, 1, d)
            y, states[i] = checked(layer, layer(normed, state, **options), x.shape)
            x = x + y
        return x[:, -1:] if last_only else x, states

    def forward(self, tokens, at=None):
        """tokens (B, L) int64 -> logits (B, K) of the last token, if `at` is None.

        at: the positions to answer at, int64: (B,), one per sequence -> (B, K); (B, Q), several ->
        (B, Q, K).
        """
        x, _ = self.run_layers(tokens, last_only=at is None)                     # (B, 1 or L, d)
        if at is None:
            return self.head(x[:, -1])                                           # (B, K)
        rows = torch.arange(len(x), device=x.device)
        if at.dim() == 1:
            return self.head(x[rows, at])                                        # (B, K)
        return self.head(x[rows[:, None], at])                                   # (B, Q, K)

    def n_params(self):
        """The number of trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def extend_positions(self, positions):
        """Enlarge tables of positions to this many tokens; the new rows stay untrained."""
        for layer in self.layers:
            if hasattr(layer, "extend_positions"):
                layer.extend_positions(positions)


def checked(layer, returned, shape):
    """A layer's y and next state, if y has this shape, or B = 1. Raises ValueError."""
    name = type(layer).__name__
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise ValueError(f"{name} must return y and its next state")
    if returned[0].shape[1:] != shape[1:] or returned[0].shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} returned y {tuple(returned[0].shape)}, not {tuple(shape)}")
    return returned


# ---- from words to layers ------------------------------------------------------------------------

MODELS = {
    "nope": "2xattention",
    "learned": "position+2xattention",
    "rope": "2xrope",
    "mamba": "2xmamba",
    "hybrid-a": "mamba+attention",
    "hybrid-b": "mamba+attention+mamba",
}
FAMILY = {  # after published models, much smaller; those written 2x... without their MLPs
    "rnn": "2xrnn",
    "lti": "2xlti",
    "retention": "2xretention",
    "griffin": "rglru+mlp+rglru+mlp+window+mlp",    # De et al. 2024, arXiv 2402.19427
    "mamba2": "2xmamba2",
    "mamba3": "2xmamba3",
    "deltanet": "2xdeltanet",
    "gated-deltanet": "2xgated-deltanet",
    "alibi": "2xalibi",
    "forgetting": "2xforgetting",
    "samba": "mamba+mlp+window+mlp",                # Ren et al. 2024, arXiv 2406.07522
    # Waleffe et al. 2024, arXiv 2406.07887
    "mamba2-hybrid": "mamba2+mlp+mamba2+mlp+grouped+mlp+mamba2+mlp",
    # Lieber et al. 2024, arXiv 2403.19887
    "jamba": "normed-mamba+mlp+normed-mamba+experts+normed-mamba+mlp+normed-mamba+experts+"
             "grouped+mlp+normed-mamba+experts+normed-mamba+mlp+normed-mamba+experts",
    # Glorioso et al. 2024, arXiv 2405.16712; Zamba2-2.7B and, mini, -1.2B: arXiv 2411.15242
    "zamba": "2xmamba+zamba+2xmamba+zamba",
    "zamba2": "2xmamba2+zamba2+2xmamba2+zamba2+2xmamba2+zamba2",
    "zamba2-mini": "2xmamba2+zamba2-mini+2xmamba2+zamba2-mini",
}
LAYERS = {  # word -> the layer's class, with the arguments that the word stands for
    "attention": Attention,
    "rope": partial(Attention, position="rope"),
    "rope-fast": partial(RotaryVariant, base=100.0),
    "rope-slow": partial(RotaryVariant, base=1e6),
    "rope-half": partial(RotaryVariant, rotated=0.5),
    "position": LearnedPosition,
    "window": SlidingWindow,
    "grouped": partial(GroupedAttention, n_heads=4, kv_heads=2),     # heads share keys and values
    "alibi": partial(DecayAttention, decay="alibi"),
    "forgetting": partial(DecayAttention, decay="forgetting"),
    "conv": ShortConv,                                               # a filter of 4 taps
    "conv2": partial(ShortConv, d_conv=2),
    "conv8": partial(ShortConv, d_conv=8),
    "rnn": RNN,
    "lti": LTI,
    "retention": partial(Retention, n_heads=4),
    "rglru": RGLRU,
    "mamba": Mamba,
    "mamba-noconv": partial(Mamba, d_conv=1),                        # the state alone
    "mamba-own": MambaOwn,                                           # B and C as in Mamba-2
    "normed-mamba": NormedMamba,                                     # Jamba's
    "mamba2": Mamba2,
    "mamba2-shared": Mamba2Shared,                                   # B and C as in Mamba
    "mamba3": Mamba3,
    "mamba3-mimo": partial(Mamba3, is_mimo=True),
    "deltanet": partial(GatedDeltaNet, gated=False),
    "gated-deltanet": GatedDeltaNet,
    "linear-fixed": partial(LinearAttention, fixed_decay=True),      # the decay is a constant
    "linear-decay": LinearAttention,                                 # the token sets the decay
    "linear-rotation": partial(LinearAttention, rotation=True),
    "linear-fixed-noconv": partial(LinearAttention, fixed_decay=True, d_conv=None),
    "linear-decay-noconv": partial(LinearAttention, d_conv=None),
    "gated-deltanet-noconv": partial(GatedDeltaNet, d_conv=None),
    "linear-rotation-noconv": partial(LinearAttention, rotation=True, d_conv=None),
    "mlp": MLP,
    "experts": MixtureOfExperts,
    "zamba": SharedUse,
    "zamba2": partial(SharedUse, blocks=2, rank=4),
    "zamba2-mini": partial(SharedUse, rank=4, position="rope"),
}
OPTIONS = {"n_heads": 1, "d_state": 16}  # flags for layers whose constructors name them: defaults
RECENCY = 2.0            # initial biases of q and k in a rotary first layer: see Attention
MOST_LAYERS = 256


def accepts(word, name):
    """Whether the layer's constructor has this argument, and the word does not fix it."""
    fixed = getattr(LAYERS[word], "keywords", {})    # a partial's signature still has them
    return name in inspect.signature(LAYERS[word]).parameters and name not in fixed


def build_layer(word, d, L, earlier=(), **options):
    """The layer of this word. L: training length; earlier: layers in front; options: of OPTIONS."""
    values = {
        **OPTIONS, **options,
        "headdim": math.gcd(2 * d, 8),       # of Mamba-2 and Mamba-3: 8, if it divides 2 d
        "window": max(2, L // 4),
        "positions": 3 * L + 1,              # tests go to 3L, and the query comes after
        "recency": None if earlier else RECENCY,
        "earlier": earlier,                  # where Zamba finds its shared block
    }
    return LAYERS[word](d, **{name: v for name, v in values.items() if accepts(word, name)})


def layer_words(name):
    """A model's name or stack -> the words of its layers, "2xmamba" as two. Raises ValueError."""
    words = []
    for part in {**MODELS, **FAMILY}.get(name, name).split("+"):
        count, word = re.fullmatch(r"(?:(\d+)x)?(.*)", part, re.DOTALL).groups()
        repeats = int(count or 1)
        if word not in LAYERS:
            known = [*MODELS, *FAMILY] if name == word else []      # names stand alone
            near = difflib.get_close_matches(word.lower(), [*known, *LAYERS], 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"--model is {name!r}, but {part!r} is no layer; {hint}--model takes one of "
                f"{', '.join([*MODELS, *FAMILY])} alone, or layers joined by + without spaces, as "
                f"in 2xmamba+mlp, of {', '.join(LAYERS)}; hybrid.py says how to add one")
        if not 0 < repeats <= MOST_LAYERS - len(words):
            raise ValueError(f"--model is {name!r}, but a count must be at least 1, and a stack "
                             f"has at most {MOST_LAYERS} layers")
        words += [word] * repeats
    return words


def build_model(name, K=16, d=8, L=64, learn_embedding=False, **options):
    """Build a model from its name or stack. L is the training length; options are of OPTIONS.

    Raises ValueError for an unknown name, or an option that no layer takes or that one rejects.
    """
    if min(K, d, L, options.get("n_heads", 1), options.get("d_state", 1)) < 1:
        raise ValueError("K, d, L, n_heads and d_state must be at least 1")
    words, layers = layer_words(name), []
    for flag, value in options.items():
        if value != OPTIONS[flag] and not any(accepts(word, flag) for word in words):
            flag = flag.replace("_", "-")
            raise ValueError(f"--{flag} is {value}, but no layer of {name} takes it")
    for word in words:
        layers.append(build_layer(word, d, L, layers, **options))
    return Model(layers, K, d, learn_embedding)


@torch.no_grad()
def state_bytes(model, tokens):
    """The bytes of state that a model keeps for one sequence after this many tokens.

    It enlarges the model's table of positions, as evaluation does.
    """
    def count(state):
        if torch.is_tensor(state):
            return state.nbytes
        return sum(map(count, state)) if isinstance(state, (tuple, list)) else 0

    model.extend_positions(tokens)
    zeros = torch.zeros(1, tokens, dtype=torch.int64, device=model.embedding.weight.device)
    return count(model.run_layers(zeros)[1])


if __name__ == "__main__":
    print(f"{'--model, d = 8':<15}{'parameters':>10}   layers, first layer first")
    for name, stack in {**MODELS, **FAMILY}.items():
        print(f"{name:<15}{build_model(name).n_params():>10,}   {stack}")
