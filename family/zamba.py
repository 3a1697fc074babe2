"""One block of attention and MLP whose weights are used several times: Zamba and Zamba2.

Zamba: Glorioso et al. 2024, arXiv 2405.16712, section II and figure 2. Zamba2: the same, arXiv 2411.15242, figure 2.

A block of attention and MLP has many parameters, and all its uses share them; each has a cache of its own. A use differs from
another in what it is fed, the stream beside the token's embedding, in the map that brings its result back into the stream,
and, in Zamba2, in a small correction of its own to the shared MLP (LoRA, Hu et al. 2021, arXiv 2106.09685).

What differs from the published models: there the result is added to the input of the next Mamba layer only, here it stays in
the stream; there the block has no residuals of its own and an MLP of width d with GELU, here two residuals and SwiGLU at 2d.

Imports attention and mlp; hybrid places the uses.
"""

import torch
import torch.nn as nn

from attention import Attention
from family.experts import MLP


class SharedBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on vectors of width 2d: the weights that all uses have in common."""

    def __init__(self, width, n_heads=1, position="none"):
        super().__init__()
        self.norms = nn.ModuleList([nn.RMSNorm(width), nn.RMSNorm(width)])
        self.attention, self.mlp = Attention(width, n_heads, position), MLP(width)

    def forward(self, x, state, correction):
        y, state = self.attention(self.norms[0](x), state)
        x = x + y
        u = self.norms[1](x)
        return x + self.mlp(u, extra=correction(u))[0], state


class SharedUse(nn.Module):
    """One use of a SharedBlock. Its state is a KVCache of its own: the weights are shared, the memory is not.

    rank: of the correction to the MLP's first map, 0 for none, as in Zamba. The 1.2B Zamba2 corrects its attention as well.
    """

    attends = norms_itself = needs_embedding = True

    def __init__(self, d_model, before, n_heads=1, blocks=1, rank=0, position="none"):
        super().__init__()
        uses = [layer for layer in before if isinstance(layer, SharedUse)]
        block = uses[-blocks].block if len(uses) >= blocks else SharedBlock(2 * d_model, n_heads, position)
        self.block, self.rank = block, rank
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)
        if rank:
            self.lora_a = nn.Linear(2 * d_model, rank, bias=False)
            self.lora_b = nn.Linear(rank, block.mlp.up.out_features, bias=False)
            nn.init.zeros_(self.lora_b.weight)                 # all uses start alike

    def forward(self, x, state=None, embedding=None):
        """x and the embedding of the same tokens, (b, L, d) each -> y (b, L, d), the next state."""
        correction = (lambda u: self.lora_b(self.lora_a(u))) if self.rank else (lambda u: 0.0)
        y, state = self.block(torch.cat([x, embedding], dim=-1), state, correction)
        return self.out_proj(y), state
