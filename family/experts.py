"""Layers that look at one token at a time: the gated MLP, and a mixture of experts that uses a few of many such MLPs.

Imports nothing of this repository; hybrid stacks them between layers that mix tokens.

Letters: B batch, L tokens, d width, F hidden width, E experts, n = B L tokens in all, of which each goes to k experts.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from mamba import Mamba


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6): W2 (SiLU(W1 x) * W3 x), hidden width 8/3 d, no biases."""

    def __init__(self, d_model, hidden=None):
        super().__init__()
        hidden = round(8 * d_model / 3) if hidden is None else hidden
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)   # W1 and W3
        self.down = nn.Linear(hidden, d_model, bias=False)     # W2

    def forward(self, x, state=None, extra=0.0):
        """x (B, L, d) -> y (B, L, d), and None: there is nothing to remember. extra is added to W1 x and W3 x, side by side."""
        gate, up = (self.up(x) + extra).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up), None


class MixtureOfExperts(nn.Module):
    """Several MLPs, of which each token uses the top_k that a router likes best (Shazeer et al. 2017, arXiv 1701.06538).

    The weights of those are a softmax over their scores alone, as in Mixtral (Jiang et al. 2024, arXiv 2401.04088, section 2.1),
    so top_k must be 2 or more for the router to learn. Left out: the noise on the scores and the loss that keep a few experts
    from winning everything.

    Each token costs top_k MLPs, however many experts there are. Which expert gets how many tokens is not known beforehand, but
    a CUDA graph needs fixed shapes. So sort the n k pairs of token and expert by expert and fill each expert's share up to
    whole blocks of rows: at most n k / block + E blocks, all of one size and each with one expert, which one batched product
    computes. Three tokens that want the experts 1, 0 and 1 go to the rows 2, 0 and 3 of two blocks of two.
    """

    def __init__(self, d_model, experts=4, top_k=2):
        super().__init__()
        hidden = round(8 * d_model / 3)
        self.experts, self.top_k = experts, top_k
        self.router = nn.Linear(d_model, experts, bias=False)
        mlps = [MLP(d_model, hidden) for _ in range(experts)]                          # for their usual start
        self.up = nn.Parameter(torch.stack([mlp.up.weight.detach().T for mlp in mlps]))        # (E, d, 2F)
        self.down = nn.Parameter(torch.stack([mlp.down.weight.detach().T for mlp in mlps]))    # (E, F, d)

    def forward(self, x, state=None):
        """x (B, L, d) -> y (B, L, d), and None: there is nothing to remember."""
        tokens = x.flatten(0, 1)                                                       # (n, d)
        scores, chosen = self.router(tokens).topk(self.top_k)                          # (n, k) each
        expert, pair = chosen.flatten().sort(stable=True)                              # (n k,): pair is token * k + choice
        experts = torch.arange(self.experts, device=x.device)
        counts = (expert[:, None] == experts).sum(0)                                   # (E,) pairs of each expert
        block = max(16, len(expert) // (8 * self.experts))     # rows; few blocks, for each takes a copy of its expert's weights
        filled = (counts + block - 1) // block * block                                 # (E,) rows of each expert
        end = filled.cumsum(0)
        rank = torch.arange(len(expert), device=x.device) - (counts.cumsum(0) - counts)[expert]        # within its expert
        row = (end - filled)[expert] + rank                                            # (n k,) where each pair is put

        blocks = len(expert) // block + self.experts           # at least as many as are needed
        rows = x.new_zeros(blocks * block, x.shape[-1]).index_copy(0, row, tokens[pair // self.top_k])
        first = torch.arange(blocks, device=x.device) * block                          # the first row of each block
        owner = (first[:, None] >= end).sum(1).clamp(max=self.experts - 1)             # and its expert
        # index_select, whose gradient is added up in the same order every time; that of indexing is not.
        gate, up = (rows.view(blocks, block, -1) @ self.up.index_select(0, owner)).chunk(2, dim=-1)
        y = ((F.silu(gate) * up) @ self.down.index_select(0, owner)).flatten(0, 1)[row]        # (n k, d), sorted by expert
        y = torch.empty_like(y).index_copy(0, pair, y).view(len(tokens), self.top_k, -1)
        return (scores.softmax(-1)[..., None] * y).sum(1).view_as(x), None


class NormedMamba(Mamba):
    """Mamba with an RMSNorm on dt, B and C, which Jamba adds (Lieber et al. 2024, arXiv 2403.19887, section 6.4)."""

    def __init__(self, d_model, d_state=16, dt_rank=None):
        super().__init__(d_model, d_state, dt_rank=dt_rank)
        self.inner_norms = nn.ModuleList(map(nn.RMSNorm, (self.dt_rank, d_state, d_state)))

    def dt_B_C(self, x):
        return (norm(v) for norm, v in zip(self.inner_norms, super().dt_B_C(x)))
