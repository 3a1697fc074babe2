"""Between Mamba and Mamba-2: where a token's B and C come from.

B says how a token is written to the state and C how the state is read: the key and the query of
attention. In Mamba, B and C are linear maps of x after the convolution, so key and value are made
from the same channels. In Mamba-2, they are channels of their own, which pass through the
convolution beside x. Is that why Mamba-2 recalls more? Largely, it seems (report/README.md, on
narrow Mambas). The two layers here move B and C, and with them what the convolution and SiLU see:

    mamba-own        Mamba, with B and C as in Mamba-2
    mamba2-shared    Mamba-2, with B and C as in Mamba

The second is close to the sequential block in the Mamba-2 paper's ablations; the first is not
published. Symbols and shapes are those of mamba.py and family/mamba2.py.
`python -m family.between` shows that one call and single steps agree.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

import mamba
from family.chunks import show_steps
from family.mamba2 import Mamba2, Mamba2State, ssd
from mamba import CausalConv1d, Mamba, MambaState


class MambaOwn(Mamba):
    """Mamba, with B and C from in_proj and the convolution; only dt is still computed from x."""

    def __init__(self, d_model, d_state=16, d_conv=4, expand=2, dt_rank=None):
        super().__init__(d_model, d_state, d_conv, expand, dt_rank)
        self.channels = self.d_inner + 2 * d_state                       # x, B and C
        # These replace the maps of Mamba, which have other sizes.
        self.in_proj = nn.Linear(d_model, self.channels + self.d_inner, bias=False)
        self.conv1d = CausalConv1d(self.channels, d_conv)
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank, bias=False)

    def forward(self, x, state=None):
        """As Mamba.forward; the window of the MambaState has `channels` channels."""
        window, h = (None, None) if state is None else state
        x, z = self.in_proj(x).split([self.channels, self.d_inner], dim=-1)
        x, window = self.conv1d(x, window)
        x, B, C = F.silu(x).split([self.d_inner, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(self.dt_proj(self.x_proj(x)))                    # (b, L, d_inner), positive
        A = -torch.exp(self.A_log)                                       # (d_inner, d_state)
        y, h = mamba.selective_scan(x, dt, A, B, C, h)                   # (b, L, d_inner)
        y = (y + self.D * x) * F.silu(z)
        return self.out_proj(y), MambaState(window, h)


class Mamba2Shared(Mamba2):
    """Mamba-2, with B and C by a map of x after the convolution and SiLU, as in Mamba. They get no
    SiLU of their own."""

    def __init__(self, d_model, d_state=128, d_conv=4, expand=2, headdim=64):
        super().__init__(d_model, d_state, d_conv, expand, headdim)
        # These replace the maps of Mamba-2, which have other sizes.
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner + self.nheads, bias=False)
        self.conv1d = CausalConv1d(self.d_inner, d_conv)
        self.x_proj = nn.Linear(self.d_inner, 2 * d_state, bias=False)

    def forward(self, x, state=None):
        """As Mamba2.forward; the window of the Mamba2State has d_inner channels."""
        if x.shape[1] == 0:
            return x, state
        window, h = (None, None) if state is None else state
        sizes = [self.d_inner, self.d_inner, self.nheads]
        z, x, dt = self.in_proj(x).split(sizes, dim=-1)
        x, window = self.conv1d(x, window)
        x = F.silu(x)                                                    # (b, L, d_inner)
        B, C = self.x_proj(x)[:, :, None].chunk(2, dim=-1)               # (b, L, 1, N), one group
        x = x.unflatten(-1, (self.nheads, self.headdim))                 # (b, L, H, P)
        dt = F.softplus(dt + self.dt_bias)                               # (b, L, H), positive
        A = -torch.exp(self.A_log)                                       # (H,), negative
        y, h = ssd(x, dt, A, B, C, h)                                    # (b, L, H, P)
        y = (y + self.D[:, None] * x).flatten(2)                         # (b, L, d_inner)
        return self.out_proj(self.norm(y, z)), Mamba2State(window, h)


@torch.no_grad()
def main():
    """Show that one call of each layer equals single steps."""
    torch.manual_seed(0)
    x = torch.randn(2, 64, 32)
    for layer in (MambaOwn(32), Mamba2Shared(32, d_state=16, headdim=16)):
        show_steps(layer, x)


if __name__ == "__main__":
    main()
