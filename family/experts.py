"""The gated MLP, a mixture of experts, and Jamba's Mamba.

A mixture of experts has E MLPs, and a router that chooses k of them for each token. It has the
parameters of E MLPs but, for many tokens, the cost of k. Jamba joins these with attention and
Mamba; NormedMamba is its Mamba.

    symbol   meaning
    b, L     sequences in the batch, tokens in this call
    d, f     width of the tokens, hidden width of an MLP
    E, k     experts, and how many of them each token uses
    n        b L, all tokens

`python -m family.experts` compares the mixture with its definition, token by token.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from family.chunks import difference
from mamba import Mamba


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, equation 6): W2 (SiLU(W1 x) * W3 x), no biases.

    With f = 8/3 d, it has the 8 d^2 parameters of an MLP of two maps whose hidden width is 4 d.
    """

    def __init__(self, d_model):
        super().__init__()
        hidden = round(8 * d_model / 3)
        self.up = nn.Linear(d_model, 2 * hidden, bias=False)             # W1 and W3
        self.down = nn.Linear(hidden, d_model, bias=False)               # W2

    def forward(self, x, state=None, lora=None):
        """x (b, L, d) -> y (b, L, d), and None: there is nothing to remember. lora: a map whose
        result is added to that of the first map, or None."""
        hidden = self.up(x)                                              # (b, L, 2 f)
        if lora is not None:
            hidden = hidden + lora(x)
        gate, up = hidden.chunk(2, dim=-1)                               # (b, L, f) each
        return self.down(F.silu(gate) * up), None


def mixture_ref(layer, x):
    """The definition, one token and one expert at a time: x (b, L, d) -> y (b, L, d)."""
    y = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            w = layer.router(x[b, t]).softmax(0)                         # (E,)
            for e in w.topk(layer.top_k).indices:
                gate, up = (x[b, t] @ layer.up[e]).chunk(2)
                y[b, t] += w[e] * ((F.silu(gate) * up) @ layer.down[e])
    return y


class MixtureOfExperts(nn.Module):
    """E MLPs, of which each token uses the k that a router gives the largest weights.

        w = softmax(router(x))                             (E,)
        y = sum over the k largest w_e of w_e MLP_e(x)

    As in Jamba (Lieber et al. 2024, arXiv 2403.19887), the k weights are not scaled to sum to 1;
    Mixtral scales them. Left out: the load-balancing loss. `forward` sorts the tokens by expert, so
    that one batched matmul computes them all; `mixture_ref` is the definition.
    """

    def __init__(self, d_model, experts=4, top_k=2):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k is {top_k}, but a token uses from 1 to all {experts} experts")
        self.experts, self.top_k = experts, top_k
        self.router = nn.Linear(d_model, experts, bias=False)
        mlps = [MLP(d_model) for _ in range(experts)]                    # for their initial values
        self.up = nn.Parameter(torch.stack([mlp.up.weight.detach().T for mlp in mlps]))
        self.down = nn.Parameter(torch.stack([mlp.down.weight.detach().T for mlp in mlps]))
        # up (E, d, 2 f), down (E, f, d)

    def route(self, tokens):
        """tokens (n, d) -> the k chosen experts' weights, and which they are, (n, k) each."""
        return self.router(tokens).softmax(-1).topk(self.top_k)

    def forward(self, x, state=None):
        """x (b, L, d) -> y (b, L, d), and None: there is nothing to remember."""
        tokens = x.flatten(0, 1)                                         # (n, d)
        weights, chosen = self.route(tokens)                             # (n, k) each

        # Sort the (token, expert) pairs by expert. pair = token * top_k + choice.
        expert, pair = chosen.flatten().sort(stable=True)                # (n k,) each
        row, owner, block = blocks_of_rows(expert, self.experts)
        inputs = x.new_zeros(len(owner) * block, x.shape[-1])
        inputs = inputs.index_copy(0, row, tokens[pair // self.top_k]).view(len(owner), block, -1)

        # The MLPs of all blocks, then back to the order of tokens. index_select: on a CPU, unlike
        # indexing, its gradient adds up in the same order each time.
        up_maps, down_maps = self.up.index_select(0, owner), self.down.index_select(0, owner)
        gate, up = (inputs @ up_maps).chunk(2, dim=-1)                   # (blocks, block, f) each
        y = ((F.silu(gate) * up) @ down_maps).flatten(0, 1)[row]         # (n k, d), by expert
        y = torch.empty_like(y).index_copy(0, pair, y)                   # (n k, d), by token
        y = weights[..., None] * y.view(*chosen.shape, x.shape[-1])      # (n, k, d)
        return y.sum(1).view_as(x), None


def blocks_of_rows(expert, E):
    """Place the n k (token, expert) pairs in rows, whole blocks of rows for each expert.

    How many tokens an expert gets is known only at run time, but a CUDA graph needs fixed shapes.
    So there are always n k // block + E blocks. Say, blocks of two rows, and three pairs with
    experts 0, 1, 1: expert 0 gets rows 0 and 1, of which one stays empty, expert 1 gets rows 2 and
    3, and a third block stays unused. The pairs go to rows 0, 2 and 3.

    expert (n k,), sorted -> the row of each pair (n k,), the expert of each block (blocks,), and
    the number of rows in a block. Unused blocks at the end get the last expert.
    """
    counts = (expert[:, None] == torch.arange(E, device=expert.device)).sum(0)   # (E,) pairs each
    # Each block copies its expert's weights, so many are expensive; few large ones waste rows. So
    # about 8 blocks per expert, of at least 16 rows.
    block = max(16, len(expert) // (8 * E))
    rows = (counts + block - 1) // block * block                         # (E,) rows per expert
    end = rows.cumsum(0)                                                 # (E,) end of its rows
    first_pair = counts.cumsum(0) - counts                               # (E,)
    within = torch.arange(len(expert), device=expert.device) - first_pair[expert]
    row = (end - rows)[expert] + within                                  # (n k,)
    first_row = torch.arange(len(expert) // block + E, device=expert.device) * block     # (blocks,)
    owner = (first_row[:, None] >= end).sum(1).clamp(max=E - 1)          # (blocks,)
    return row, owner, block


class NormedMamba(Mamba):
    """Mamba with an RMSNorm on dt, B and C, which Jamba adds (arXiv 2403.19887, section 6.4).

    dt has rank d_model: with rank 1, Mamba's if d_model <= 16, the norm would leave only its sign.
    """

    def __init__(self, d_model, d_state=16):
        super().__init__(d_model, d_state, dt_rank=d_model)
        eps, sizes = torch.finfo(torch.float32).eps, (d_model, d_state, d_state)
        self.inner_norms = nn.ModuleList([nn.RMSNorm(size, eps=eps) for size in sizes])

    def low_rank_dt_B_C(self, x):
        """x (b, L, d_inner) -> low_rank_dt (b, L, dt_rank); B, C (b, L, d_state)."""
        low_rank_dt, B, C = super().low_rank_dt_B_C(x)
        norm_dt, norm_B, norm_C = self.inner_norms
        return norm_dt(low_rank_dt), norm_B(B), norm_C(C)


@torch.no_grad()
def main():
    """Show that the two forms agree."""
    torch.manual_seed(0)
    layer, x = MixtureOfExperts(64), torch.randn(8, 64, 64)
    exact = mixture_ref(layer, x)
    print(f"4 experts, 2 per token: blocks, one token at a time: {difference(layer(x)[0], exact)}")


if __name__ == "__main__":
    main()
