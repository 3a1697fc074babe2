"""A short convolution and nothing else: the ablation that a hybrid of Mamba and attention needs.

Every Mamba layer contains a depthwise convolution of four taps. In front of attention, does the hybrid
need the state, or is the convolution enough? `--model conv+attention` beside `--model mamba+attention`
tells. The convolution reaches taps - 1 tokens back and no further: for a value that comes tau tokens
after its query, it is enough as long as tau < taps.

    y_t = sum over k = 0 ... taps - 1 of w_k x_{t-k} + bias        for each channel by itself
"""

import torch
import torch.nn as nn

from mamba import causal_conv


class ShortConv(nn.Module):
    """A depthwise causal convolution (in Allen-Zhu 2025, arXiv 2512.17351, a "Canon" layer).

    Its state is the window of the last taps - 1 inputs, (b, d, taps - 1).
    """

    def __init__(self, d_model, taps=4):
        super().__init__()
        self.conv1d = nn.Conv1d(d_model, d_model, taps, groups=d_model, padding=taps - 1)

    def forward(self, x, state=None):
        """x (b, L, d), the window or None -> y (b, L, d), the next window."""
        return causal_conv(x, self.conv1d, state)


if __name__ == "__main__":
    torch.manual_seed(0)
    layer, x = ShortConv(8), torch.randn(2, 12, 8)
    whole, _ = layer(x)
    first, window = layer(x[:, :5])
    second, _ = layer(x[:, 5:], window)
    difference = (torch.cat([first, second], dim=1) - whole).abs().max().item()
    print(f"one call and two segments differ by {difference:.1e}")
