"""Look inside a trained model on one sequence: attention weights, what Mamba writes and keeps.

    python inside.py results/X.pt             draws figures/inside_X.png
    python inside.py report/checkpoints/*.pt --out figures

Hooks record q, k and v of attention, and Mamba's step sizes before the softplus. The rest follows
from them. The model is not changed.
"""

import os
import signal
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C prints no traceback, even in imports

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from attention import Attention
from data import recall_batch
from mamba import Mamba
from output import RC_PARAMS, Parser, report_left_out, say, text, write_figure
from runs import load_run

CONTEXT = 24                               # tokens before the query: few enough to see each of them
MARKS = {"q": "#D55E00", "v": "#009E73"}   # the query and its value in a sequence
# A channel can hold v for a million tokens if dt exceeds WRITES near v and the mean of dt elsewhere
# is below IDLE: then a million steps sum to less than 1, and a state with A = -1 keeps over 1/e.
WRITES, IDLE = 0.1, 1e-6
MAP_INCHES, MAMBA_INCHES = 5.2, 8.6        # heights: of an attention map, of all images of a Mamba


# ---- what the layers do --------------------------------------------------------------------------

def attention_maps(layer, qkv):
    """The attention weights, softmax over s <= t of q_t . k_s / sqrt(P); layers do not return them.

    layer: an Attention; qkv (L, ...): the output of layer.qkv, from position 0 on.
    Returns (H, L, L), the weight of key s (column) for query t (row); rows sum to 1.
    """
    q, k, _ = layer.heads(qkv[None])                                        # (1, H, L, P) each
    if layer.position == "rope":
        q, k = layer.rotate(q, 0), layer.rotate(k, 0)
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)                    # in grouped attention
    scores = (q @ k.mT)[0] / q.shape[-1]**0.5                               # (H, L, L)
    seen = layer.mask(len(qkv), len(qkv), qkv.device)                       # (L, L)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def share_kept(dt, A):
    """The share of token t's contribution to the state that is kept to the end, from 0 to 1.

    Unrolled, h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t makes the last state a sum over tokens,

        h = sum over t of exp(A * (dt_{t+1} + dt_{t+2} + ... + dt_last)) dt_t B_t x_t

    Returns the exp: dt (L, D), A (D, N) negative -> (L, D, N), which is 1 for the last token.
    """
    later = dt.flip(0).cumsum(0).flip(0) - dt                          # (L, D), sums over s > t
    return torch.exp(later[:, :, None] * A)


@torch.no_grad()
def inspect_layers(model, tokens):
    """Run the model on tokens (L,) -> logits (K,), a list of one dict per layer:

    attention   {"maps": (H, L, L)}
    Mamba       {"dt": (D, L), step sizes, "kept": (D, L), share_kept averaged over the N states,
                 "taps": the number of taps of its convolution}
    other       {}
    """
    outputs = {}

    def record(module, inputs, output):
        outputs[module] = output[0]

    watched = [layer.qkv if isinstance(layer, Attention) else layer.dt_proj
               for layer in model.layers if isinstance(layer, (Attention, Mamba))]
    hooks = [module.register_forward_hook(record) for module in watched]
    try:
        logits = model(tokens[None])[0]
    finally:
        for hook in hooks:
            hook.remove()

    layers = []
    for layer in model.layers:
        if isinstance(layer, Attention):
            maps = attention_maps(layer, outputs[layer.qkv])                # (H, L, L)
            layers.append({"maps": maps.numpy()})
        elif isinstance(layer, Mamba):
            dt = F.softplus(outputs[layer.dt_proj])                         # (L, D)
            kept = share_kept(dt, -torch.exp(layer.A_log)).mean(-1)         # (L, D)
            layers.append({"dt": dt.T.numpy(), "kept": kept.T.numpy(), "taps": layer.d_conv})
        else:
            layers.append({})
    return logits.numpy(), layers


def inspect_run(path):
    """Run a checkpoint on one sequence, the same for all models of a task. Raises ValueError.

    Returns a dict: "config", "tokens" (L + 1,), "q" and "v" (indices, in the middle of the
    context), "label", "answer", and "layers" as in inspect_layers.
    """
    model, config = load_run(path)
    K, M, tau = config["K"], config["M"], config["tau"]
    if config["task"] != "recall":
        raise ValueError(f"{path} was trained on {config['task']}, but only recall can be drawn")
    L = min(max(CONTEXT, 2 * tau), config["L"])                        # as long as training at most
    q = (L - tau) // 2
    generator = torch.Generator().manual_seed(0)
    tokens, label = recall_batch(1, L, K, M, tau, generator=generator, i=torch.tensor([q]))
    logits, layers = inspect_layers(model, tokens[0])
    if not any(layers):
        raise ValueError(f"{path} has no layer that can be drawn: only Attention and Mamba can")
    return {"config": config, "tokens": tokens[0].numpy(), "q": q, "v": q + tau,
            "label": label.item(), "answer": int(logits.argmax()), "layers": layers}


def count_keepers(dt, q, v, taps):
    """How many channels could hold v for a million tokens. dt (D, L + 1).

    In such a channel, dt exceeds WRITES at a token where the convolution sees v, and its mean over
    the other tokens is below IDLE. Left out: the first few, whose convolution sees padding; those
    from q on whose convolution sees q or v; and the last query.
    """
    idle = np.ones(dt.shape[1], bool)
    idle[:taps - 1] = False                              # here the convolution sees padding
    idle[q:v + taps] = False                             # from q until it no longer sees v
    idle[-1] = False                                     # the last q
    if not idle.any():                                                      # too short to tell
        return 0
    writes = dt[:, v:v + taps].max(1) > WRITES                              # (D,)
    holds = dt[:, idle].mean(1) < IDLE                                      # (D,)
    return int((writes & holds).sum())


# ---- the figure ----------------------------------------------------------------------------------

class Panel(NamedTuple):
    """An image of a layer, a token per column."""
    title: str
    image: np.ndarray
    label: str          # of its colour bar
    colours: dict       # options of imshow


def panels(layer, found):
    """The images of a layer, from top to bottom."""
    q, v, last = found["q"], found["v"], len(found["tokens"]) - 1
    share = dict(vmin=0, vmax=1)
    if "maps" in layer:
        shown = []
        for head, weights in enumerate(layer["maps"], 1):
            title = f"v looks at q: {weights[v, q]:.2f}\nlast q looks at v: {weights[last, v]:.2f}"
            title = f"head {head}: {title}" if len(layer["maps"]) > 1 else title
            seen = np.where(np.tri(last + 1), weights, np.nan)
            shown.append(Panel(title, seen, "attention weight (grey: later tokens)", share))
        return shown
    rows = np.ptp(layer["dt"], axis=1).argsort()[::-1]     # the most selective channels on top
    dt, kept = layer["dt"][rows], layer["kept"][rows]
    step = dict(norm=LogNorm(1e-3, 3, clip=True))
    count = count_keepers(dt, q, v, layer["taps"])
    idle = np.format_float_scientific(IDLE, exp_digits=1, trim="-")                     # 1e-6
    holds = (f"\n{count} of {len(dt)} could hold v for a million tokens if A = -1:\n"
             f"Δ > {WRITES:g} at v or soon after, mean Δ < {idle} elsewhere") if count else ""
    return [Panel(f"step size Δ, widest range on top\npale: state kept, dark: overwritten{holds}",
                  dt, "Δ", step),
            Panel("share of each token kept to the end\npale: forgotten, dark: kept",
                  kept, "share kept", share),
            Panel("weight of each token at the end, without B:\nΔ times the share kept",
                  dt * kept, "weight", step)]


def mark(ax, found, rows):
    """Frame the columns of q, v and the last q in an image, and their rows too if `rows`."""
    for place, name in ((found["q"], "q"), (found["v"], "v"), (len(found["tokens"]) - 1, "q")):
        line = dict(color=MARKS[name], lw=0.7)
        bold = dict(color=MARKS[name], fontweight="bold", textcoords="offset points")
        ax.axvline(place - 0.5, **line)
        ax.axvline(place + 0.5, **line)
        ax.annotate(name, (place, 1), xytext=(0, 2), xycoords=ax.get_xaxis_transform(),
                    ha="center", **bold)
        if rows:
            ax.axhline(place - 0.5, **line)
            ax.axhline(place + 0.5, **line)
            ax.annotate(name, (1, place), xytext=(3, 0), xycoords=ax.get_yaxis_transform(),
                        va="center", **bold)


def draw_layer(part, layer, found, height):
    """Draw the images of a layer, a column of a figure. part: a subfigure, `height` inches high."""
    attends, shown = "maps" in layer, panels(layer, found)
    tokens = found["tokens"]
    heights = [MAP_INCHES] * len(shown)
    if attends and height > sum(heights):          # an empty row, where another layer is taller
        heights.append(height - sum(heights))
    axes = part.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for ax in axes[len(shown):]:
        ax.set_axis_off()
    for ax, panel in zip(axes, shown):
        bar = dict(location="bottom", aspect=30) if attends else dict(pad=0.02, format="{x:g}")
        image = ax.imshow(panel.image, cmap="Blues", aspect="auto", interpolation="nearest",
                          **panel.colours)
        part.colorbar(image, ax=ax, label=panel.label, **bar).minorticks_off()
        ax.set_title(panel.title, pad=20, fontsize=11)
        ax.set_facecolor("0.9")
        places = range(0, len(tokens), -(-len(tokens) // 40))    # more than 40 names would touch
        names = [tokens[k] for k in places]
        ax.set_xticks(places, names, fontsize=9, rotation=90)
        if attends:
            ax.set_yticks(places, names, fontsize=9)
            ax.set(xlabel="token looked at (key)", ylabel="token that looks (query)")
        else:
            ax.set(ylabel=f"{len(panel.image)} channels", yticks=[])
        mark(ax, found, rows=attends)
    if not attends:
        before = layer["taps"] - 1
        mixed = f", mixed by the convolution with the {before} before it" if before else ""
        axes[-1].set_xlabel(f"token{mixed}")


def draw(found):
    """The figure of what inspect_run found: a column for each layer, tokens from left to right."""
    tokens, config = found["tokens"], found["config"]
    columns = [(depth, layer) for depth, layer in enumerate(found["layers"], 1) if layer]
    height = max(MAP_INCHES * len(layer["maps"]) if "maps" in layer else MAMBA_INCHES
               for _, layer in columns)
    fig = Figure(figsize=(max(7.5, 5 * len(columns)), height + 1), layout="constrained")
    parts = fig.subfigures(1, len(columns), squeeze=False, wspace=0.02)[0]
    for (depth, layer), part in zip(columns, parts):
        kind = "attention" if "maps" in layer else "Mamba"
        part.suptitle(f"layer {depth} of {len(found['layers'])}: {kind}")
        draw_layer(part, layer, found, height)
    verdict = "right" if found["answer"] == found["label"] else "wrong"
    M, tau, d, L, seed = (config[flag] for flag in ("M", "tau", "d", "L", "seed"))
    fig.suptitle(f"{text(config['model'])}, M = {M}, tau = {tau}, d = {d}, L = {L}, seed {seed}\n"
                 f"{len(tokens) - 1} tokens, then the query: answer {found['answer']}, "
                 f"label v = {found['label']}, {verdict}", fontsize=13)
    return fig


def main(argv=None):
    """Draw a figure for each checkpoint in argv -> the paths of the figures.

    A file that cannot be drawn is left out, and one sentence says why. SystemExit with status 2 if
    no file can be drawn or argv is wrong.
    """
    about = __doc__.split("\n")[0]
    parser = Parser("inside.py", description=about)
    parser.add_argument("checkpoints", nargs="+", metavar="RUN.pt", help="models of train.py")
    parser.add_argument("--out", default="figures", metavar="DIR", help="(default: figures)")
    args = parser.parse_args(argv)
    written, left_out = [], []
    for path in dict.fromkeys(map(os.path.normpath, args.checkpoints)):
        name = os.path.splitext(os.path.basename(path))[0]
        target = os.path.join(args.out, f"inside_{name}.png")
        try:
            if target in written:
                raise ValueError(f"{path} would overwrite another figure; use its own --out")
            with matplotlib.rc_context(RC_PARAMS):
                fig = draw(inspect_run(path))
                write_figure(target, fig)
        except ValueError as error:
            left_out.append(str(error))
            continue
        except OSError as error:
            parser.error(f"--out is {args.out!r}, but it cannot be written to: {error.strerror}")
        written.append(target)
        say(target)
    report_left_out(parser, written, left_out)
    return written


if __name__ == "__main__":
    main()
