"""Linear attention, one idea at a time: fixed decay, decay per token, delta rule, rotation.

The layers of family/ differ in many things at once. These four form a ladder: each rung changes one
thing in the recurrence of the one before. Projections of q, k and v, norm and gate are the same.

    linear-fixed      S_t = gamma S_{t-1} + beta_t v_t k_t^T       a fixed decay
    linear-decay      S_t = a_t S_{t-1} + beta_t v_t k_t^T         a decay that the token sets
    gated-deltanet    S_t = a_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T       delta rule
    linear-rotation   the same, but q_t and k_t are rotated by the sum of all angles up to t

    symbol   meaning
    q, k     queries and keys (b, L, H, N): k of length 1, q of length 1 / sqrt(N)
    v, y     values and outputs (b, L, H, P); y_t = S_t q_t in all rungs
    beta     weight of a value, or how much of the old one it replaces (b, L, H), in 0 ... 1
    a        decay (b, L, H); gamma is 1 - 2^-5 in the first head, 1 - 2^-6 in the second, ...
    S        state (b, H, P, N)

Other symbols are those of deltanet.py.

The decay of the first is RetNet's (Sun et al. 2023, arXiv 2307.08621), that of the second Mamba-2's
(Dao and Gu 2024, arXiv 2405.21060), one number per head; in gated linear attention it is one per
key channel (Yang et al. 2023, arXiv 2312.06635). The third is Gated DeltaNet (arXiv 2412.06464),
the rotation Mamba-3's (arXiv 2603.15569, section 3.2). With the suffix -noconv, a rung has no short
convolution.

`python -m family.linear_attention` writes two values under one key and prints what three rules
read. Then it checks single steps against one call.
"""

import math
from typing import NamedTuple

import torch
import torch.nn as nn

from family.chunks import show_steps
from family.deltanet import GatedDeltaNet, delta_rule
from family.ladder import log_gamma
from family.mamba2 import ssd
from family.mamba3 import rotate, summed_angles


class RungState(NamedTuple):
    """All that a LinearAttention layer keeps of the tokens so far, however many there were."""
    conv: torch.Tensor   # as in DeltaState
    S: torch.Tensor      # (b, H, P, N)
    angle: torch.Tensor  # (b, H, N / 2), all angles summed, modulo 2 pi; `widest`; empty if none


class LinearAttention(GatedDeltaNet):
    """A rung of the ladder: Gated DeltaNet with parts of its recurrence taken away or added.

    Without options it is linear-decay, which adds values and replaces none. fixed_decay: gamma
    instead of a_t, linear-fixed. rotation: the delta rule, and q and k rotate, linear-rotation.
    (The rung between, gated-deltanet, is GatedDeltaNet itself.) d_conv: taps of the convolution,
    None for none. For the rest see GatedDeltaNet.
    """

    def __init__(self, d_model, n_heads=1, d_state=16, expand=2, fixed_decay=False, rotation=False,
                 d_conv=4):
        if fixed_decay and rotation:
            raise ValueError("rotation needs a decay per token, whose step size scales the angles")
        if rotation and d_state < 2:
            raise ValueError("--d-state is 1, but rotation turns pairs of states")
        super().__init__(d_model, n_heads, d_state, expand, gated=True, d_conv=d_conv)
        self.fixed_decay = fixed_decay
        if fixed_decay:                  # it needs no maps for a decay per token
            del self.a_proj, self.A_log, self.dt_bias
        self.angle_proj = None
        if rotation:
            self.angle_proj = nn.Linear(d_model, n_heads * (d_state // 2), bias=False)

    def log_decay(self, x):
        """x (b, L, d) -> log a (b, L, H)."""
        if not self.fixed_decay:
            return super().log_decay(x)
        return log_gamma(self.n_heads, x).expand(*x.shape[:2], -1)

    def rotated(self, q, k, x, start):
        """q and k (b, L, H, N), rotated by the sum of all angles up to each token, and the last sum
        (b, H, N / 2). start: the sum before the first token, None for 0.

        As in Mamba-3, but each head has rates of its own; dt and so the angles start small.
        """
        rate = self.angle_proj(x).unflatten(-1, (self.n_heads, -1))      # (b, L, H, N / 2)
        angles = summed_angles(rate, self.step_size(x), start)           # (b, L, H, N / 2)
        last = angles[:, -1].clone()
        angles = angles.to(torch.promote_types(q.dtype, torch.float32))  # bfloat16 is too coarse
        return rotate(q, angles), rotate(k, angles), last

    def forward(self, x, state=None):
        """As GatedDeltaNet.forward, with a RungState."""
        if x.shape[1] == 0:
            return x, state
        window, S, start = (None, None, None) if state is None else state
        q, k, v, window = self.qkv_of(x, window)
        if self.angle_proj is None:
            rule, angle = additive_rule, x.new_zeros(len(x), self.n_heads, 0)
        else:
            rule = delta_rule
            q, k, angle = self.rotated(q, k, x, start)
        beta = torch.sigmoid(self.b_proj(x))                             # (b, L, H)
        y, S = rule(q / self.d_state**0.5, k, v, beta, self.log_decay(x), S)
        return self.output(y, x), RungState(window, S, angle)


def additive_rule(q, k, v, beta, log_a, S=None):
    """S_t = a_t S_{t-1} + beta_t v_t k_t^T, in chunks; arguments and results as in delta_rule.

    It is Mamba-2's scan with x = beta v, B = k, C = q, dt = 1, and A = log a_t, one per token. (In
    Mamba-2 itself, dt scales both the write and the decay.)
    """
    return ssd(beta[..., None] * v, torch.ones_like(beta), log_a, k, q, S)


@torch.no_grad()
def main():
    """Write 3 and then 5 under one key and read S; then one call and single steps of each rung."""
    key, others = torch.eye(4).split([1, 3])                             # orthogonal keys
    print("3, then 5, written under one key with beta = 1, and what is read under it:\n"
          "8 is their sum, less than 8 a decayed sum, 5 the last value\n")
    print(f"{'more tokens in between':<22}{0:>6}{10:>8}{40:>8}")
    for name, log_a, rule in [("linear-fixed", math.log(1 - 2**-5), additive_rule),
                              ("linear-decay, a = 1", 0.0, additive_rule),
                              ("gated-deltanet, a = 1", 0.0, delta_rule)]:
        read = []
        for delay in (0, 10, 40):
            # The other tokens have other keys and the value 0: they only let the state decay.
            L = 2 + delay
            fillers = others[torch.arange(delay) % 3]                    # (delay, 4)
            keys = torch.cat([key, key, fillers])[None, :, None]         # (1, L, 1, 4)
            values = torch.tensor([3.0, 5.0] + [0.0] * delay).view(1, L, 1, 1)
            _, S = rule(keys, keys, values, torch.ones(1, L, 1), torch.full((1, L, 1), log_a))
            read.append((S[0, 0, 0] @ key[0]).item())
        print(f"{name:<22}{read[0]:6.2f}{read[1]:8.2f}{read[2]:8.2f}")
    print()
    torch.manual_seed(0)
    for name, layer in [("linear-fixed", LinearAttention(32, fixed_decay=True)),
                        ("linear-decay", LinearAttention(32)),
                        ("gated-deltanet", GatedDeltaNet(32)),
                        ("linear-rotation", LinearAttention(32, rotation=True))]:
        show_steps(layer, torch.randn(2, 64, 32), name)


if __name__ == "__main__":
    main()
