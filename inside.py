"""What a trained model does on one sequence: where attention looks, and what Mamba writes, keeps and forgets.

    python plot.py --inside results/X.pt                draws what look(path) returns

Nothing here changes a model: hooks on two of its linear maps see what goes through them, and the rest is recomputed.

Imports attention, data, eval and mamba; plot imports it for --inside only.
"""

import torch
import torch.nn.functional as F

from attention import Attention, rotary
from data import recall_batch
from eval import load_run
from mamba import Mamba

CONTEXT = 24  # tokens before the query: few enough to see each of them


def attention_maps(layer, qkv):
    """The weights that scaled_dot_product_attention has no way to return: softmax of q k / sqrt(P), causal.

    layer: an Attention; qkv (L, 3d): what its Linear of that name made of a sequence that starts at position 0.
    Returns (H, L, L): for each head how much query t (row) takes of key s (column). Rows sum to 1.
    """
    L = len(qkv)
    q, k, _ = qkv.view(L, 3, layer.n_heads, -1).permute(1, 2, 0, 3)                    # (H, L, P) each
    if layer.position == "rope":
        q, k = rotary(q, 0), rotary(k, 0)
    scores = q @ k.mT / q.shape[-1]**0.5                                               # (H, L, L)
    future = torch.ones(L, L, dtype=torch.bool, device=qkv.device).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


def what_is_left(dt, A):
    """How much of what token t wrote into the state is left of it after the last token.

    Unrolled, h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t says that the state at the end is a sum over the tokens,

        h = sum over t of exp(A * (dt_{t+1} + dt_{t+2} + ... + dt_last)) dt_t B_t x_t

    and its first factor is returned: dt (L, D), A (D, N) negative -> (L, D, N), 1 for the last token.
    """
    later = dt.flip(0).cumsum(0).flip(0) - dt                                          # (L, D), sums over s > t
    return torch.exp(later[:, :, None] * A)


@torch.no_grad()
def look_at(model, tokens):
    """Run the model on tokens (L,), the query among them -> logits (K,), a list with an entry for each layer:

    attention   {"maps": (H, L, L)}, as attention_maps
    Mamba       {"dt": (D, L), the step of each channel at each token,
                 "left": (D, L), what_is_left, the mean over the N states of a channel}
    other       {}
    """
    seen, hooks = {}, []
    for layer in model.layers:
        if isinstance(layer, (Attention, Mamba)):
            inner = layer.qkv if isinstance(layer, Attention) else layer.dt_proj
            hooks.append(inner.register_forward_hook(lambda _, inputs, output, layer=layer: seen.update({layer: output[0]})))
    try:
        x, _ = model.stream(tokens[None])                                              # (1, L, d)
    finally:
        for hook in hooks:
            hook.remove()

    layers = []
    for layer in model.layers:
        found = {}
        if isinstance(layer, Attention):
            found["maps"] = attention_maps(layer, seen[layer])
        elif isinstance(layer, Mamba):
            dt = F.softplus(seen[layer])                                               # (L, D)
            left = what_is_left(dt, -torch.exp(layer.A_log)).mean(-1)                  # (L, D)
            found["dt"], found["left"] = dt.T, left.T
        layers.append({name: value.numpy() for name, value in found.items()})
    return model.head(x[0, -1]).numpy(), layers


def look(path):
    """Look into the checkpoint of a finished run on one sequence, the same for all models of a task.

    Returns {"config", "tokens" (L + 1,), "q" and "v", the index of both in the context, "label", "answer", "layers" as
    in look_at}. The query stands in the middle of the context. Raises ValueError, in one sentence.
    """
    model, record = load_run(path)
    config = record["config"]
    K, M, tau = config["K"], config["M"], config["tau"]
    L = min(max(CONTEXT, 2 * tau), config["L"])                                        # no longer than in training
    q = (L - tau) // 2
    tokens, label = recall_batch(1, L, K, M, tau, generator=torch.Generator().manual_seed(0), i=torch.tensor([q]))
    logits, layers = look_at(model, tokens[0])
    if not any(layers):
        raise ValueError(f"{path} has neither an attention nor a Mamba layer, so there is nothing to look at")
    return {"config": config, "tokens": tokens[0].numpy(), "q": q, "v": q + tau, "label": label.item(),
            "answer": int(logits.argmax()), "layers": layers}
