"""The figures, from the JSON files that train.py, eval.py and bench.py write.

    python plot.py results/*.json                       all figures, into figures/
    python plot.py results/*_M1_tau1_*.json --out .     those of one task
    python plot.py results/*.json --panels d M          a row of panels for each d, a column for each M
    python plot.py results/*.json --against d           accuracy at the training length, against d
    python plot.py results/*.json --against model       the same and the lowest beyond it, a row for each model and d
    python plot.py results/bench/cpu.json               what a longer context costs, as bench.py measured it
    python plot.py --inside results/X.pt                what a trained model does on one sequence

Runs of one task share two figures: length_*.png, accuracy against context length, and training_*.png, accuracy against
training step. Each M, or what --panels says, is a panel, each model a curve: the median over its seeds, in a band from the
lowest to the highest. Published numbers (results/published/) are drawn beside the runs of their task, as hollow points. Each
file of bench.py has a figure of its own, cost_*.png, and so has each checkpoint given to --inside, inside_*.png.

Imports costs, look and records, and needs no torch, for it reads JSON only. But --inside runs a model: for that alone, when
it is asked for, inside.py is imported, and torch with it.
"""

import argparse
import os

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MultipleLocator, NullLocator

from costs import draw_costs, load_costs
from look import GREY, LOOK, order, spread, style
from records import OTHERS, TASK, curve, from_training_length, group, load_published, shared


def draw_curves(ax, models, kind, right, reach):
    """Draw {model: (x, accuracy)} and the labels right of the axes. reach: of the line to a label, in axes widths."""
    ends = []
    for z, (model, (x, y)) in enumerate(models.items(), 3):
        colour, width, dashes = style(model)
        middle = np.median(y, axis=0)
        look = dict(color=colour, ls=dashes, zorder=z, clip_on=False)
        marker = "o" if len(x) == 1 or kind == "length" and len(x) < 30 else None  # few: say where they are
        if len(y) > 1:
            ax.fill_between(x, y.min(0), y.max(0), facecolor=(colour, 0.18), edgecolor=(colour, 0.4), lw=0.4, zorder=2)
        ax.plot(x, middle, lw=width, marker=marker, ms=width + 2.5, **look)
        if x[-1] < right:
            ax.plot(x[-1], middle[-1], marker="o", ms=width + 5, **look)
            if kind == "training":
                ax.plot([x[-1], right], middle[[-1, -1]], lw=0.5 * width, alpha=0.6, **look)
        ends.append((middle[-1], model, kind == "training" or x[-1] == right))
    ends.sort(key=lambda end: -end[0])  # stable: equals stay in the order of the models
    low, high = ax.get_ylim()
    for (end, model, joined), height in zip(ends, spread([y for y, _, _ in ends], low + 0.03, high - 0.03)):
        colour, width, dashes = style(model)
        look = dict(color=colour, clip_on=False, transform=ax.get_yaxis_transform())  # x in axes widths, y in accuracy
        if joined:
            ax.plot([1, 1 + 0.3 * reach], [end, height], lw=0.8, **look)
        ax.plot([1 + 0.3 * reach, 1 + reach], [height] * 2, lw=width, ls=dashes, solid_capstyle="butt", **look)
        ax.text(1 + 1.12 * reach, height, model, va="center_baseline", **look)


def listed(values, between, up_to):
    """Values of a flag in a line: all of them, or, of more than five, the first and the last."""
    return between.join(map(str, values)) if len(values) <= 5 else f"{values[0]}{up_to}{values[-1]}"


def described(panels, spread_of_seeds="band from lowest to highest"):
    """What all panels of a figure are about, in words, and their seeds: the two lines above the figure."""
    M, tau, d, L, N = (shared(panels, flag) for flag in ("M", "tau", "d", "L", "d_state"))
    say = lambda values: listed(values, ", ", " to ")
    trained = {("fixed",): f"L = {say(L)}", ("uniform",): f"lengths up to L = {say(L)}",
               ("fixed", "uniform"): f"L = {say(L)} or lengths up to it"}[tuple(shared(panels, "train_lengths"))]
    counts = {len(runs) for curves in panels.values() for runs in curves.values()}
    fewest, most = min(counts), max(counts)
    seeds = f"{fewest} to {most} seeds" if fewest < most else f"{most} seed{'s' * (most > 1)}"
    return (f"Associative recall: M = {say(M)} {'query' if M == [1] else 'queries'}, delay tau = {say(tau)}, trained at "
            f"{trained}, d = {say(d)}" + (f", d_state = {say(N)}" if N != [OTHERS["d_state"]] else "") + "\n"
            + (f"median of {seeds}, {spread_of_seeds}" if most > 1 else seeds))


def title(flags, values):
    words = {"fixed": "one length", "uniform": "mixed lengths"}
    return ", ".join(words.get(value) or f"{flag} = {value}" for flag, value in zip(flags, values))


def draw(panels, kind, flags=("M",), published=()):
    """The figure of one task, kind "length" or "training". panels: {values of flags: {name: [run, ...]}}. Raises ValueError."""
    curves = {panel: {name: curve(runs, kind) for name, runs in of_panel.items()} for panel, of_panel in panels.items()}
    rows = sorted({panel[:-1] for panel in panels})            # the last flag is that of the columns
    columns = sorted({panel[-1] for panel in panels})
    drawn = [xy for of_panel in curves.values() for xy in of_panel.values()]
    lengths = shared(panels, "L") if kind == "length" else []
    right = max([x[-1] for x, _ in drawn] + lengths)
    logarithmic = kind == "training" or right > 8 * lengths[0]  # some models learn in a twentieth of another's steps
    left = min([x[0] for x, _ in drawn] + [right / 2] + lengths) if logarithmic else 0

    fig = Figure(figsize=(max(9, 1 + 3.1 * len(columns)), 1 + 4 * len(rows)), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.08)
    axes = fig.subplots(len(rows), len(columns), sharex=True, sharey=True, squeeze=False)
    small = dict(textcoords="offset points", color=GREY, fontsize=10, zorder=50,
                 path_effects=[withStroke(linewidth=3, foreground="white")])  # to be read where curves pass
    sources = []
    for ax, panel in zip(axes.ravel(), [(*row, column) for row in rows for column in columns]):
        if panel not in panels:
            ax.set_axis_off()
            continue
        task = next(iter(panels[panel].values()))[0]["config"]
        K, L = task["K"], task["L"]
        ax.set(xlim=(left, right), ylim=(min(0, 1 / K - 0.09), 1.05))
        ax.axhline(1 / K, color=GREY, lw=1, ls=":")
        ax.annotate(f"chance 1/{K}", (1, 1 / K), (-2, -3), ax.get_yaxis_transform(), ha="right", va="top", **small)
        if kind == "length":
            ax.axvline(L, color=GREY, lw=1, ls="--")
            ax.annotate(f"trained at {L}" if task["train_lengths"] == "fixed" else f"trained up to {L}", (L, 1), (0, 2),
                        ax.get_xaxis_transform(), ha="center", **small)
            ax.xaxis.set_major_locator(MultipleLocator(L))
        if logarithmic:
            ax.set_xscale("log", base=2 if kind == "length" else 10)
            ax.xaxis.set_minor_locator(NullLocator())
        if kind == "training":
            ax.xaxis.set_major_formatter("{x:,.0f}")
        if len(panels) > 1:
            ax.set_title(title(flags, panel), pad=18 if kind == "length" else 6)
        for other in published if kind == "length" else ():
            if all(task.get(flag) == value for flag, value in other["task"].items()):
                sources.append(other["published"])
                for name, (x, y) in other["curves"].items():
                    ax.plot(x, y, color=style(name)[0], lw=0.5, ls=":", marker="o", mfc="white", ms=6, mew=1.3, zorder=20,
                            clip_on=False)
        draw_curves(ax, curves[panel], kind, right, reach=0.1 if len(columns) == 1 else 0.23)
    for ax in axes[:, 0]:
        ax.set_ylabel("accuracy")
    label, dot = {"length": ("context length", "longest tested"), "training": ("training step", "the last seed ended")}[kind]
    fig.supxlabel(label + (f" (large dot: {dot})" if any(x[-1] < right for x, _ in drawn) else ""), fontsize=11)
    beside = f"; hollow points: {', '.join(dict.fromkeys(sources))}" if sources else ""
    fig.suptitle(described(panels) + beside, fontsize=12)
    return fig


def draw_against(panels, flag):
    """The figure of accuracy at the training length against a flag. panels: {(value,): {name: [run, ...]}}. Raises ValueError."""
    found = {}                                                 # {name: {value: accuracies of its seeds}}
    for (value,), of_value in panels.items():
        for name, runs in of_value.items():
            found.setdefault(name, {})[value], _ = from_training_length(runs, name)
    values = shared(panels, flag)
    fig = Figure(figsize=(8, 5), layout="constrained")
    ax = fig.subplots()
    K = shared(panels, "K")                                    # one, or one for each value
    ax.plot(values, [1 / k for k in K] * (len(values) // len(K)), color=GREY, lw=1, ls=":")
    ends, names = [], sorted(found, key=order)
    for z, name in enumerate(names):
        colour, width, dashes = style(name)
        x = [value * 1.03**(z - (len(names) - 1) / 2) for value in values]             # side by side, for all to be seen
        y = [found[name].get(value, [np.nan]) for value in values]                     # a gap where there is no run
        look = dict(color=colour, zorder=z + 3, clip_on=False)
        ax.vlines(x, list(map(min, y)), list(map(max, y)), alpha=0.3, lw=4, **look)
        for at, seeds in zip(x, y):
            ax.plot([at] * len(seeds), seeds, ls="", marker=".", ms=5, alpha=0.7, **look)
        middle = [np.median(seeds) for seeds in y]
        ax.plot(x, middle, lw=width, ls=dashes, marker="o", ms=width + 3.5, mfc="white" if ", " in name else colour, **look)
        ends.append(([m for m in middle if m == m][-1], name))
    ends.sort(key=lambda end: -end[0])
    for (_, name), height in zip(ends, spread([end for end, _ in ends], 0.0, 1.0)):
        ax.text(1.03, height, name, color=style(name)[0], va="center_baseline", transform=ax.get_yaxis_transform())
    ax.set(xscale="log", ylim=(0, 1.05), xlabel=flag, ylabel="accuracy at the training length")
    ax.set_xticks(values, map(str, values)), ax.xaxis.set_minor_locator(NullLocator())
    ax.annotate("chance" if len(K) > 1 else f"chance 1/{K[0]}", (1, 1 / K[-1]), (-2, -3), ax.get_yaxis_transform(),
                textcoords="offset points", color=GREY, fontsize=10, ha="right", va="top")
    fig.suptitle(described(panels, "small dots: each seed"), fontsize=12)
    return fig


def draw_models(panels, flags=("M",)):
    """The figure that has a row for each model and width: its accuracy at L, and the lowest from L on. Each panel is a column."""
    names = sorted({name for of_panel in panels.values() for name in of_panel}, key=order)
    longest = min(run["length"][0][-1] for models in panels.values() for runs in models.values() for run in runs)
    fig = Figure(figsize=(max(8, 2 + 3 * len(panels)), 1.5 + 0.42 * len(names)), layout="constrained")
    for ax, (panel, models) in zip(fig.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels.items()):
        for name, runs in models.items():
            at, beyond = from_training_length(runs, name, longest)
            row = names.index(name)
            for seeds, y, marker in ((at, row - 0.17, "o"), (beyond, row + 0.17, "D")):
                look = dict(color=style(name)[0], clip_on=False, zorder=3, mfc=style(name)[0] if seeds is at else "white")
                ax.plot([min(seeds), max(seeds)], [y, y], lw=4, alpha=0.25, color=style(name)[0], clip_on=False)
                ax.plot(seeds, [y] * len(seeds), ls="", marker="|", ms=7, **look)
                ax.plot(np.median(seeds), y, marker=marker, ms=7, mew=1.3, **look)
        ax.axvline(1 / next(iter(models.values()))[0]["config"]["K"], color=GREY, lw=1, ls=":")
        ax.set(xlim=(0, 1), ylim=(len(names) - 0.4, -0.6), title=title(flags, panel), xlabel="accuracy")
        ax.set_yticks(range(len(names)), names)
        ax.grid(axis="y", color="0.92"), ax.set_axisbelow(True)
        ax.tick_params(axis="y", length=0)
    fig.suptitle(described(panels, "a small line for each seed") + "\n"
                 + f"dots: at the training length; diamonds: the lowest from there to {longest:g} tokens; dotted: chance", fontsize=12)
    return fig


def save(fig, path):
    """Write a PNG and move it to its place: at any moment the old file or the new one, whole."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        fig.savefig(temporary, format="png", dpi=150)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def named(kind, paths):
    """{file name of a figure: path of the file that is drawn into it}. Raises ValueError where two would have the same."""
    names = {}
    for path in paths:
        name = f"{kind}_{os.path.splitext(os.path.basename(path))[0]}.png"
        if name in names:
            raise ValueError(f"{path} and {names[name]} would both be drawn into {name}: give each its own --out")
        names[name] = path
    return names


def file_name(kind, panels):
    parts = [flag + listed(shared(panels, flag), "-", "to") for flag in ("tau", "K", "d", "L", "M")]
    trained, N = shared(panels, "train_lengths"), shared(panels, "d_state")
    parts += ["-".join(trained)] * (trained != ["fixed"]) + ["N" + listed(N, "-", "to")] * (N != [OTHERS["d_state"]])
    return "_".join([kind, *parts]) + ".png"


def figures_of_results(paths, flags, against):
    """Read results of train.py and bench.py, and published ones -> {file name: figure}. Raises ValueError, in one sentence."""
    paths = list(dict.fromkeys(paths))
    costs = {path: found for path in paths if (found := load_costs(path))}
    published = {path: found for path in paths if (found := load_published(path))}
    figures = {name: draw_costs(*costs[path]) for name, path in named("cost", costs).items()}
    runs = [path for path in paths if path not in costs | published]
    for panels in group(runs, [against] if against not in (None, "model") else flags, against == "model").values():
        if against == "model":
            figures[file_name("against_model", panels)] = draw_models(panels, flags)
        elif against:
            figures[file_name(f"against_{against}", panels)] = draw_against(panels, against)
        else:
            for kind in ("length", "training"):
                figures[file_name(kind, panels)] = draw(panels, kind, flags, published.values())
    if not figures:
        raise ValueError("published numbers are drawn beside results of train.py, and none are given")
    return figures


def figures_of_insides(paths):
    """Read checkpoints and run their models -> {file name: figure}. Raises ValueError, in one sentence."""
    import inside  # here, because it needs torch, which nothing else in this file does

    return {name: inside.draw(inside.look(path)) for name, path in named("inside", dict.fromkeys(paths)).items()}


def main(argv=None):
    parser = argparse.ArgumentParser("plot.py", allow_abbrev=False,
                                     description="Draw the figures from the JSON files that train.py and bench.py write.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")  # one sentence, without all flags
    parser.add_argument("results", nargs="*", metavar="RUN.json", help="results that train.py or bench.py wrote")
    parser.add_argument("--panels", nargs="+", default=["M"], choices=TASK, metavar="FLAG",
                        help=f"of {', '.join(TASK)}: those whose values have a panel each, the last one in columns, "
                             "or all in one row with --against model (default: M)")
    parser.add_argument("--against", choices=["tau", "K", "d", "L", "M", "d_state", "model"], metavar="FLAG",
                        help="draw accuracy at the training length against tau, K, d, L, M or d_state instead, or against "
                             "model: a row for each model and d")
    parser.add_argument("--inside", nargs="+", default=[], metavar="RUN.pt",
                        help="checkpoints that train.py wrote: draw what each model does on one sequence, without results")
    parser.add_argument("--out", default="figures", metavar="DIR", help="where the figures go (default: figures)")
    args = parser.parse_args(argv)
    if bool(args.results) == bool(args.inside):
        parser.error("give it either results, RUN.json ..., or checkpoints, --inside RUN.pt ...")
    if args.inside and (args.against or args.panels != ["M"]) or args.panels != ["M"] and args.against not in (None, "model"):
        parser.error("--inside takes neither --panels nor --against, and --against a flag takes no --panels")
    matplotlib.rcParams.update(LOOK)
    try:
        figures = figures_of_insides(args.inside) if args.inside else figures_of_results(args.results, args.panels, args.against)
        os.makedirs(args.out, exist_ok=True)
        for name, fig in figures.items():
            path = os.path.join(args.out, name)
            save(fig, path)
            print(path)
    except ValueError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--out is {args.out!r}, but it cannot be written to: {error.strerror}")


if __name__ == "__main__":
    main()
