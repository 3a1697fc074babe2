"""One block of attention and MLP whose weights are used several times: Zamba and Zamba2.

Zamba: Glorioso et al. 2024, arXiv 2405.16712, section II. Zamba2: arXiv 2411.15242, figure 2.

A block of attention and MLP on vectors of width 2d has 48 d^2 parameters, as many as eight Mamba
layers. Here all uses of a block share them. A use of the block at depth l computes

    y_l = out_proj_l(block([x_l, e]))

from the residual stream x_l and the token's embedding e, concatenated. A use owns its cache,
out_proj_l (2 d^2 parameters) and, in Zamba2, a small correction to the block's MLP (LoRA, Hu et al.
2021, arXiv 2106.09685).

    symbol   meaning
    b, L     sequences in the batch, tokens in this call
    d, f     width of x and e; hidden width of the block's MLP. The block has width 2 d

Differs from the published models:

    part               here                               there
    y_l                added to the residual stream       to the next Mamba layer's input only
    width of the block 2d                                 attention returns to d, the MLP has d
    residuals in it    two                                none
    attention          biases; scores / sqrt(head size)   none; / sqrt(half the head size)
    MLP                SwiGLU, hidden width 8/3 of 2d     gated GELU, 4d
    Zamba's Mamba      one head                           two

`python -m family.zamba` counts the parameters of three uses and shows that single steps agree.
"""

import torch
import torch.nn as nn

from attention import Attention
from family.chunks import show_steps
from family.experts import MLP


class SharedBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), on vectors of width 2d. All uses share it."""

    def __init__(self, width, n_heads=1, position="none"):
        super().__init__()
        if n_heads < 1 or width % n_heads:
            raise ValueError(f"--n-heads is {n_heads}, but it must divide 2 d = {width}, "
                             "the width of the shared block")
        eps = torch.finfo(torch.float32).eps                     # torch's depends on the dtype
        self.norms = nn.ModuleList([nn.RMSNorm(width, eps=eps) for _ in range(2)])
        self.attention = Attention(width, n_heads, position)
        self.mlp = MLP(width)

    def forward(self, x, state, lora=None):
        """x (b, L, 2d), state a KVCache or None -> y (b, L, 2d), the next KVCache.

        lora: see MLP.forward.
        """
        y, state = self.attention(self.norms[0](x), state)
        x = x + y                                                        # (b, L, 2d)
        y, _ = self.mlp(self.norms[1](x), lora=lora)
        return x + y, state


class SharedUse(nn.Module):
    """One use of a SharedBlock. Its state is a KVCache of its own.

    earlier: the layers below this one. Uses with equal arguments share blocks: the first `blocks`
        create one each; use i takes that of use i - blocks.
    blocks: how many blocks there are; Zamba2 has two.
    rank: of the correction to the MLP's first map, 0 for none, as in Zamba. Zamba2's 1.2B model
        corrects its attention too, which is left out.
    """

    attends = skips_norm = needs_embedding = True      # class attributes that hybrid.py explains

    def __init__(self, d_model, earlier, n_heads=1, blocks=1, rank=0, position="none"):
        super().__init__()
        self.kind = (d_model, n_heads, blocks, rank, position)
        uses = [layer for layer in earlier if getattr(layer, "kind", None) == self.kind]
        if len(uses) < blocks:
            self.block = SharedBlock(2 * d_model, n_heads, position)
        else:
            # This use has the block of the use `blocks` places before it. It is not registered as
            # a submodule: the first use has it, and parameters(), state_dict() and
            # torch.func.functional_call must find it once. So a later use cannot be moved, saved or
            # replicated without the first.
            object.__setattr__(self, "block", uses[-blocks].block)
        self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)
        self.lora = None
        if rank:
            hidden = self.block.mlp.up.out_features
            down = nn.Linear(2 * d_model, rank, bias=False)
            self.lora = nn.Sequential(down, nn.Linear(rank, hidden, bias=False))
            nn.init.zeros_(self.lora[1].weight)          # all uses start with the block as it is

    def forward(self, x, state=None, embedding=None):
        """x and the tokens' embedding, (b, L, d) each -> y (b, L, d), the next KVCache."""
        if x.shape[1] == 0:
            return x, state
        y, state = self.block(torch.cat([x, embedding], dim=-1), state, self.lora)
        return self.out_proj(y), state


@torch.no_grad()
def main():
    """Show what sharing saves, and that one call equals single steps."""
    torch.manual_seed(0)
    layers = []
    for _ in range(3):
        layers.append(SharedUse(16, layers))
    shared = sum(p.numel() for p in nn.ModuleList(layers).parameters())
    alone = sum(p.numel() for p in layers[0].parameters())
    print(f"three uses have {shared:,} parameters; three blocks would have {3 * alone:,}")
    x = torch.randn(2, 64, 16)
    show_steps(lambda x, state=None: layers[2](x, state, embedding=x), x, "third use")


if __name__ == "__main__":
    main()
