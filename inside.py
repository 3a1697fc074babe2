"""What a trained model does on one sequence: where attention looks, and what Mamba writes, keeps and forgets.

    python plot.py --inside results/X.pt                look(path) finds it, draw(look) is the figure

Nothing here changes a model: hooks on two of its linear maps see what goes through them, and the rest is recomputed.

Imports attention, data, mamba and runs; plot imports it for --inside only.
"""

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from attention import Attention, rotary
from data import recall_batch
from mamba import Mamba
from runs import load_run

CONTEXT = 24  # tokens before the query: few enough to see each of them
MARKS = {"q": "#D55E00", "v": "#009E73"}  # the query and its value in a sequence


def attention_maps(layer, qkv):
    """The weights that scaled_dot_product_attention has no way to return: softmax of q k / sqrt(P), causal.

    layer: an Attention; qkv (L, ...): what its Linear of that name made of a sequence that starts at position 0.
    Returns (H, L, L): for each head how much query t (row) takes of key s (column). Rows sum to 1.
    """
    L = len(qkv)
    q, k, _ = qkv.split(layer.sizes, dim=-1)
    q, k = (u.view(L, heads, -1).transpose(0, 1) for u, heads in ((q, layer.n_heads), (k, layer.kv_heads)))    # (H or G, L, P)
    if layer.position == "rope":
        q, k = rotary(q, 0), rotary(k, 0)
    k = k.repeat_interleave(layer.n_heads // layer.kv_heads, 0)                        # (H, L, P)
    scores = q @ k.mT / q.shape[-1]**0.5                                               # (H, L, L)
    unseen = torch.ones(L, L, dtype=torch.bool, device=qkv.device).triu(1)
    if layer.window is not None:
        unseen |= ~unseen.new_ones(L, L).triu(1 - layer.window)
    return scores.masked_fill(unseen, -torch.inf).softmax(-1)


def what_is_left(dt, A):
    """How much of what token t wrote into the state is left of it after the last token.

    Unrolled, h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t says that the state at the end is a sum over the tokens,

        h = sum over t of exp(A * (dt_{t+1} + dt_{t+2} + ... + dt_last)) dt_t B_t x_t

    and its first factor is returned: dt (L, D), A (D, N) negative -> (L, D, N), 1 for the last token.
    """
    later = dt.flip(0).cumsum(0).flip(0) - dt                                          # (L, D), sums over s > t
    return torch.exp(later[:, :, None] * A)


def holding(dt, q, v):
    """How many channels write at v and hold it for a million tokens, or None if the context is too short: dt (D, L + 1).

    They step by more than 0.1 where the convolution sees v, and by less than 1e-6 in the mean over the tokens that do not
    matter: all but those where it sees q or v, its first tokens and the last q.
    """
    idle = np.ones(dt.shape[1], bool)
    idle[:3] = idle[q:v + 4] = idle[-1] = False
    return int(((dt[:, v:v + 4].max(1) > 0.1) & (dt[:, idle].mean(1) < 1e-6)).sum()) if idle.any() else None


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
        x, _ = model.run_layers(tokens[None])                                              # (1, L, d)
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


# ---- the figure ----

def images(layer, found):
    """The images that show a layer, from the top -> a list of (title, image, label of the colour bar, colours)."""
    share = dict(vmin=0, vmax=1)
    if "maps" in layer:
        shown, q, v, last = [], found["q"], found["v"], len(found["tokens"]) - 1
        for head, w in enumerate(layer["maps"], 1):
            title = f"v looks at q: {w[v, q]:.2f}\nlast q looks at v: {w[last, v]:.2f}"
            shown.append((f"head {head}: {title}" if len(layer["maps"]) > 1 else title, np.where(np.tri(last + 1), w, np.nan),
                          "attention weight (grey: later tokens, not seen)", share))
        return shown
    rows = np.ptp(layer["dt"], axis=1).argsort()[::-1]  # the channels that choose among tokens stand together, on top
    dt, left = layer["dt"][rows], layer["left"][rows]
    step, count = dict(norm=LogNorm(1e-3, 3, clip=True)), holding(dt, found["q"], found["v"])
    held = "" if count is None else f"\n> 0.1 at v and < 1e-6 elsewhere: {count} of {len(dt)}"
    return [(f"step Δ (channels sorted by its range)\npale: passes a token by, dark: resets the state{held}", dt, "Δ", step),
            ("what is left of each token at the end\npale: forgotten, dark: kept", left, "left, mean over states", share),
            ("weight of each token in the state at the end:\nthe product of the two above", dt * left, "Δ times what is left",
             step)]


def mark(ax, found, rows):
    """Frame the columns of q, v and the last q in an image, and if rows is true, their rows too."""
    for place, name in ((found["q"], "q"), (found["v"], "v"), (len(found["tokens"]) - 1, "q")):
        text = dict(textcoords="offset points", color=MARKS[name], fontsize=10, fontweight="bold")
        ax.annotate(name, (place, 1), (0, 2), ax.get_xaxis_transform(), ha="center", **text)
        if rows:
            ax.annotate(name, (1, place), (3, 0), ax.get_yaxis_transform(), va="center_baseline", **text)
        for edge in (place - 0.5, place + 0.5):
            ax.axvline(edge, color=MARKS[name], lw=0.7)
            if rows:
                ax.axhline(edge, color=MARKS[name], lw=0.7)


def draw(found):
    """The figure of what look found: a column for each layer, in which tokens go from left to right."""
    tokens, config = found["tokens"], found["config"]
    columns = [(depth, layer) for depth, layer in enumerate(found["layers"], 1) if layer]
    height = 4.6  # of a map, in inches; three images of a Mamba layer share 7.4
    tall = max(height * len(layer["maps"]) if "maps" in layer else 7.4 for _, layer in columns)
    fig = Figure(figsize=(max(7, 4 * len(columns)), tall + 1), layout="constrained")
    for (depth, layer), part in zip(columns, np.atleast_1d(fig.subfigures(1, len(columns), wspace=0.02))):
        attends, shown = "maps" in layer, images(layer, found)
        part.suptitle(f"layer {depth} of {len(found['layers'])}: {'attention' if attends else 'Mamba'}", fontsize=12)
        heights = [height] * len(shown)
        if attends and tall > sum(heights):  # another layer's images are taller together: leave room below
            heights.append(tall - sum(heights))
        axes = part.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for ax in axes[len(shown):]:
            ax.set_axis_off()
        for ax, (title, image, label, colours) in zip(axes, shown):
            bar = dict(location="bottom", aspect=30) if attends else dict(pad=0.02)
            drawn = ax.imshow(image, cmap="Blues", aspect="auto", interpolation="nearest", **colours)
            part.colorbar(drawn, ax=ax, label=label, **bar)
            ax.set_title(title, pad=19, fontsize=10)
            ax.set_facecolor("0.9")
            ax.set_xticks(range(len(tokens)), tokens, fontsize=8, rotation=90)
            if attends:
                ax.set_yticks(range(len(tokens)), tokens, fontsize=8)
                ax.set(xlabel="token looked at (key)", ylabel="token that looks (query)")
            else:
                ax.set(yticks=[], ylabel=f"{len(image)} channels")
                ax.tick_params(labelbottom=ax is axes[-1])
            mark(ax, found, rows=attends)
        if not attends:
            axes[-1].set_xlabel("token, mixed by the convolution\nwith those just before it")
    verdict = "right" if found["answer"] == found["label"] else "wrong"
    fig.suptitle("{model}, M = {M}, delay tau = {tau}, d = {d}, seed {seed}\n".format(**config)
                 + f"{len(tokens) - 1} tokens, then the query: answer {found['answer']}, label v = {found['label']}, {verdict}",
                 fontsize=12)
    return fig
