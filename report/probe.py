"""Of which queries a trained Mamba has stored the value, and in which layer.

    python report/probe.py report/probe/mamba_M16*.pt                a table, a minute per run
    python report/probe.py report/probe/mamba_M16*.pt --out figures  and a figure, probe.png

A model reads contexts without their final query, and for each query `q` a linear classifier, the
probe, is trained to tell the value from the state of one layer. If it can, the layer has stored the
value of that query. If it cannot, the state may still hold the value in a form that is not linear;
the model's own answers tell.

Works for layers whose state has an `h`: Mamba and Mamba-2.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from data import recall_batch
from output import RC_PARAMS, Parser, text, write_figure
from runs import load_run

BATCH = 1000        # contexts per call of the model


@torch.no_grad()
def read(model, config, n):
    """Run the model on n contexts -> q, v (n,), its answers (n,), and a dict that has for each
    layer with a state h, counted from 1, that state after the context (n, D N)."""
    generator = torch.Generator().manual_seed(0)
    tokens, v = recall_batch(n, config["L"], config["K"], config["M"], config["tau"],
                             generator=generator)
    answers, by_batch = [], []
    for batch in tokens.split(BATCH):
        answers.append(model(batch).argmax(-1))
        _, states = model.run_layers(batch[:, :-1])
        by_batch.append({i: state.h.flatten(1) for i, state in enumerate(states, 1)
                         if hasattr(state, "h")})
    if not by_batch[0]:
        raise ValueError(f"--model is {config['model']!r}, but none of its layers has a state h")
    states = {i: torch.cat([hs[i] for hs in by_batch]) for i in by_batch[0]}
    return tokens[:, -1], v, torch.cat(answers), states


def probe(h, v, K):
    """The accuracy with which a linear classifier tells v (n,) from h (n, features): logistic
    regression, trained on three quarters of the rows and tested on the others."""
    h = (h - h.mean(0)) / (h.std(0) + 1e-8)
    cut = len(h) * 3 // 4
    weight = torch.zeros(h.shape[1], K, requires_grad=True)
    bias = torch.zeros(K, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        loss = F.cross_entropy(h[:cut] @ weight + bias, v[:cut]) + 1e-4 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(loss)
    answers = (h[cut:] @ weight + bias).argmax(-1)
    return (answers == v[cut:]).double().mean().item()


def rows_of(model, config, sequences):
    """Rows {name: [accuracy for q = 0, ..., M - 1]} of a trained run: the answers of the model, and
    the probes of its layers. sequences: contexts per query, on average."""
    q, v, answers, states = read(model, config, sequences * config["M"])
    queries = [q == k for k in range(config["M"])]
    rows = {"answers": [(answers == v)[mask].double().mean().item() for mask in queries]}
    for i, h in states.items():
        rows[f"layer {i}"] = [probe(h[mask], v[mask], config["K"]) for mask in queries]
    return rows


def draw(found, title):
    """A figure: for each run a strip with a row for the answers and for each layer. All runs must
    be of one model, M and d."""
    fig = Figure(figsize=(8, 0.9 + 1.1 * len(found)), layout="constrained")
    for ax, (config, rows) in zip(fig.subplots(len(found), 1, squeeze=False)[:, 0], found):
        image = ax.imshow(list(rows.values()), cmap="Blues", vmin=0, vmax=1, aspect="auto")
        ax.set_yticks(range(len(rows)), rows)
        ax.set_xticks(range(config["M"]))
        ax.set_ylabel(f"seed {config['seed']}", rotation=0, ha="right", va="center")
        ax.spines[:].set_visible(False)
    ax.set_xlabel("query")
    fig.colorbar(image, ax=fig.axes, label=f"accuracy; chance is {1 / (config['K'] - 1):.2f}")
    fig.suptitle(title, fontsize=11)
    model, M, d = (config[flag] for flag in ("model", "M", "d"))
    fig.supxlabel(f"{text(model)}, M = {M}, d = {d}: what the model answers, and what a probe of "
                  "each layer's state answers", fontsize=9)
    return fig


def main(argv=None):
    """Print a table for each checkpoint in argv; with --out, draw them -> list of config, rows."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="RUN.pt", help="models of train.py")
    parser.add_argument("--sequences", type=int, default=8000, metavar="N",
                        help="contexts per query, on average (default: 8000)")
    parser.add_argument("--out", metavar="DIR", help="also draw them: DIR/probe.png")
    parser.add_argument("--title", default="Which values a layer's state holds", metavar="TEXT")
    args = parser.parse_args(argv)
    if args.sequences < 100:
        parser.error(f"--sequences is {args.sequences}, but a probe needs 100 or more")
    found = []
    try:
        loaded = [load_run(path) for path in args.checkpoints]
    except ValueError as error:
        parser.error(str(error))
    if args.out and len({(c["model"], c["M"], c["d"]) for _, c in loaded}) > 1:
        parser.error("--out draws runs of one model, M and d")
    for path, (model, config) in zip(args.checkpoints, loaded):
        try:
            rows = rows_of(model, config, args.sequences)
        except ValueError as error:
            parser.error(str(error))
        found.append((config, rows))
        print(f"{os.path.basename(path)}: accuracy for each query, %")
        print("query    " + "".join(f"{k:4}" for k in range(config["M"])))
        for name, shares in rows.items():
            print(f"{name:9}" + "".join(f"{100 * share:4.0f}" for share in shares), flush=True)
    if args.out:
        with matplotlib.rc_context(RC_PARAMS):
            write_figure(os.path.join(args.out, "probe.png"), draw(found, args.title))
        print(os.path.join(args.out, "probe.png"))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)      # operations are small: more threads are slower on a busy machine
    main()
