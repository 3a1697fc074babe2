"""The figures, from the JSON files that train.py, eval.py and bench.py write.

    python plot.py results/*.json                       all figures, into figures/
    python plot.py results/*_M1_tau1_*.json --out .     those of one task
    python plot.py results/bench/cpu.json               what a longer context costs, as bench.py measured it
    python plot.py --inside results/X.pt                what a trained model does on one sequence

Runs of one task (tau, K, d, L, train-lengths) share two figures: length_*.png, accuracy against context length, and
training_*.png, accuracy against training step. Each M is a panel, each model a curve: the median over its seeds, in a
band from the lowest to the highest. Each file of bench.py has a figure of its own, cost_*.png, and so has each checkpoint
given to --inside, inside_*.png.

Imports nothing of this repository and needs no torch, for it reads JSON only. But --inside runs a model: for that alone,
when it is asked for, inside.py is imported, and torch with it.
"""

import argparse
import json
import os

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator

GRID = ["model", "M", "tau", "K", "d", "L", "seed"]  # what names a run, as in train.py
TASK = ["tau", "K", "d", "L", "train_lengths"]       # what the panels of a figure have in common

# Colours of Okabe and Ito, which the colour-blind can tell apart. Later lines lie on earlier ones and are thinner or broken,
# so that models which are all at 1 can all be seen.
STYLES = {  # model: colour, line width, dashes
    "nope":     ("#56B4E9", 4.4, "-"),
    "learned":  ("#E69F00", 3.0, "-"),
    "rope":     ("#0072B2", 1.8, "-"),
    "mamba":    ("#D55E00", 1.8, (0, (7, 2))),
    "hybrid-a": ("#009E73", 1.8, (0, (4.5, 4.5))),
    "hybrid-b": ("#CC79A7", 1.8, (0, (1.5, 3))),
}
COSTS = {  # what bench.py measures at each length: the title of its panel
    "train_us": "training: μs a token", "read_us": "reading: μs a token", "token_ms": "one token more: ms",
    "state_bytes": "state: bytes", "train_megabytes": "training: memory, MB", "read_megabytes": "reading: memory, MB"}
LETTERS = {"M": 6, "R": 4, "P": 2.5, "A": 1}  # other models are black, with a dash for each letter of their pattern
GREY = "0.35"
LOOK = {"font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
LABEL_GAP = 0.062    # between the labels at the curves' ends, in units of accuracy or of the height of the axes


def style(model):
    """Colour, width and dashes of a model: they depend on its name only, so they are the same in every figure."""
    dashes = [length for letter in model for length in (LETTERS.get(letter, 3), 1.5)]
    return STYLES.get(model, ("black", 1.6, (0, (*dashes[:-1], 4.5))))


def order(model):
    return list(STYLES).index(model) if model in STYLES else len(STYLES), model


def points(section, x):
    """A curve of a record -> x, accuracy: arrays of one shape (n,). Raises ValueError if it is no curve."""
    x, y = np.array(section[x], float), np.array(section["accuracy"], float)
    if not (x.ndim == 1 and x.shape == y.shape and len(x) and 0 < x[0] and x[-1] < np.inf
            and (np.diff(x) > 0).all() and ((0 <= y) & (y <= 1)).all()):
        raise ValueError
    return x, y


def load(path):
    """Read a result -> {"config": ..., "length": (x, y), "training": (x, y)}. Raises ValueError, in one sentence."""
    try:
        with open(path, encoding="utf-8") as f:
            record = json.load(f)
        config = {flag: record["config"][flag] for flag in GRID}
        config["train_lengths"] = record["config"].get("train_lengths", "fixed")
        if not (isinstance(config["model"], str) and config["model"] and all(type(config[flag]) is int for flag in GRID[1:])
                and min(config[flag] for flag in GRID[1:-1]) > 0 and config["train_lengths"] in ("fixed", "uniform")):
            raise ValueError
        return {"config": config, "length": points(record["eval"], "length"), "training": points(record["train"], "step")}
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; train.py writes it when a run is finished") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{path} is not a whole result of train.py") from None


def group(paths):
    """Read the files -> {task: {M: {model: [run, ...]}}}, sorted, with the values of TASK as the task. Raises ValueError."""
    seen, figures = {}, {}
    for path in dict.fromkeys(paths):
        run = load(path)
        config = run["config"]
        task = tuple(config[flag] for flag in TASK)
        name = (*task, config["M"], config["model"], config["seed"])
        if name in seen:
            raise ValueError(f"{path} and {seen[name]} are the same run, of which one is enough")
        seen[name] = path
        figures.setdefault(task, {}).setdefault(config["M"], {}).setdefault(config["model"], []).append(run)
    return {task: {M: {model: panels[M][model] for model in sorted(panels[M], key=order)} for M in sorted(panels)}
            for task, panels in sorted(figures.items())}


def curve(runs, kind):
    """The runs of one model, which differ in their seed -> x (n,), accuracy (seeds, n). Raises ValueError, in one sentence.

    A seed that has solved the task ends before the others: from there on it holds its last accuracy. Context lengths are
    those that all seeds were tested at.
    """
    curves = [run[kind] for run in runs]
    if kind == "length":
        x = np.array(sorted(set.intersection(*(set(x) for x, _ in curves))))
        if not len(x):
            c = runs[0]["config"]
            raise ValueError(f"the seeds of {c['model']} at M = {c['M']}, tau = {c['tau']} have no context length in common")
    else:
        x = np.unique(np.concatenate([x for x, _ in curves]))
        x = x[x >= max(x[0] for x, _ in curves)]
    return x, np.stack([np.interp(x, *seed) for seed in curves])


def spread(heights, low, high):
    """Heights of labels, at least LABEL_GAP apart and near the heights wanted, which fall from the first to the last."""
    placed = []
    for y in heights:
        placed.append(min(y, high if not placed else placed[-1] - LABEL_GAP))
    for i in reversed(range(len(placed))):
        placed[i] = max(placed[i], low if i + 1 == len(placed) else placed[i + 1] + LABEL_GAP)
    return placed


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


def draw(task, panels, kind):
    """The figure of one task, kind "length" or "training". panels: {M: {model: [run, ...]}}. Raises ValueError."""
    tau, K, d, L, train_lengths = task
    curves = {M: {model: curve(runs, kind) for model, runs in models.items()} for M, models in panels.items()}
    drawn = [xy for models in curves.values() for xy in models.values()]
    right = max([x[-1] for x, _ in drawn] + [L] * (kind == "length"))
    logarithmic = kind == "training" or right > 8 * L          # some models learn in a twentieth of another's steps
    left = min([x[0] for x, _ in drawn] + [right / 2] + [L] * (kind == "length")) if logarithmic else 0

    fig = Figure(figsize=(max(9, 1 + 3.1 * len(panels)), 5), layout="constrained")
    fig.get_layout_engine().set(w_pad=0.08)
    axes = fig.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    small = dict(textcoords="offset points", color=GREY, fontsize=10, zorder=50,
                 path_effects=[withStroke(linewidth=3, foreground="white")])  # to be read where curves pass
    for ax, (M, models) in zip(axes, curves.items()):
        ax.set(xlim=(left, right), ylim=(min(0, 1 / K - 0.09), 1.05))
        ax.axhline(1 / K, color=GREY, lw=1, ls=":")
        ax.annotate(f"chance 1/{K}", (1, 1 / K), (-2, -3), ax.get_yaxis_transform(), ha="right", va="top", **small)
        if kind == "length":
            ax.axvline(L, color=GREY, lw=1, ls="--")
            ax.annotate(f"trained at {L}", (L, 1), (0, 2), ax.get_xaxis_transform(), ha="center", **small)
            ax.xaxis.set_major_locator(MultipleLocator(L))
        if logarithmic:
            ax.set_xscale("log", base=2 if kind == "length" else 10)
            ax.xaxis.set_minor_locator(NullLocator())
        if kind == "training":
            ax.xaxis.set_major_formatter("{x:,.0f}")
        if len(panels) > 1:
            ax.set_title(f"M = {M}", pad=18 if kind == "length" else 6)
        draw_curves(ax, models, kind, right, reach=0.1 if len(panels) == 1 else 0.23)
    axes[0].set_ylabel("accuracy")
    label, dot = {"length": ("context length", "longest tested"), "training": ("training step", "the last seed ended")}[kind]
    fig.supxlabel(label + (f" (large dot: {dot})" if any(x[-1] < right for x, _ in drawn) else ""), fontsize=11)

    queries = ", ".join(map(str, panels)) + (" query" if list(panels) == [1] else " queries")
    trained = f"L = {L}" if train_lengths == "fixed" else f"lengths up to L = {L}"
    fewest, most = (f(len(y) for _, y in drawn) for f in (min, max))
    seeds = f"{fewest} to {most} seeds" if fewest < most else f"{most} seed{'s' * (most > 1)}"
    fig.suptitle(f"Associative recall: M = {queries}, delay tau = {tau}, trained at {trained}, d = {d}\n"
                 + (f"median of {seeds}, band from lowest to highest" if most > 1 else seeds), fontsize=12)
    return fig


def load_costs(path):
    """Read a file of bench.py -> {model: {cost: (2, n), lengths and costs}}, env; None if it is another. Raises ValueError."""
    try:
        with open(path, encoding="utf-8") as f:
            record = json.load(f)
        rows = record["bench"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    try:
        costs = {}
        for row in rows["length"]:
            if not (isinstance(row["model"], str) and row["model"]):
                raise ValueError
            for cost in COSTS:
                if row[cost] is not None:
                    costs.setdefault(row["model"], {}).setdefault(cost, []).append((row["length"], row[cost]))
        for of_model in costs.values():
            for cost, measured in of_model.items():
                x, y = of_model[cost] = np.array(sorted(measured), float).T
                if not (x[0] > 0 and (np.diff(x) > 0).all() and (y > 0).all() and np.isfinite([x, y]).all()):
                    raise ValueError
        if not costs:
            raise ValueError
        return costs, {key: record["env"][key] for key in ("device", "torch", "threads")}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
        raise ValueError(f"{path} is of bench.py, but has no whole table of what length costs") from None


def draw_costs(costs, env):
    """The figure of what load_costs returns: a panel for each cost, both axes logarithmic, each model a line."""
    shown = [cost for cost in COSTS if any(cost in of_model for of_model in costs.values())]
    fig = Figure(figsize=(10, 3.4 * -(-len(shown) // 2) + 0.8), layout="constrained")
    axes = fig.subplots(-(-len(shown) // 2), 2, squeeze=False, sharex=True).ravel()
    right = max(x[-1] for of_model in costs.values() for x, _ in of_model.values())
    for ax in axes[len(shown):]:
        ax.set_axis_off()
    for ax, cost in zip(axes, shown):
        drawn = {model: costs[model][cost] for model in sorted(costs, key=order) if cost in costs[model]}
        low, high = (f(f(y) for _, y in drawn.values()) for f in (min, max))
        span = max(10, high / low) ** 0.06                     # a little air, and a decade at least
        low, high = low / span, max(high, 10 * low) * span
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", ylim=(low, high), title=COSTS[cost])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        ax.yaxis.set_major_formatter(lambda y, _: f"{y:g}" if y < 1e3 else f"{y / 1e3:g} k" if y < 1e6 else f"{y / 1e6:g} M")
        ax.xaxis.set_minor_locator(NullLocator()), ax.yaxis.set_minor_locator(NullLocator())
        ends = sorted(((np.log(y[-1] / low) / np.log(high / low), model) for model, (_, y) in drawn.items()), reverse=True)
        for model, (x, y) in drawn.items():
            colour, width, dashes = style(model)
            ax.plot(x, y, color=colour, lw=width, ls=dashes, marker="o", ms=width + 2.5)
        for (_, model), height in zip(ends, spread([end for end, _ in ends], 0.03, 0.97)):
            x = drawn[model][0][-1] * 1.25
            ax.text(x, height, model, color=style(model)[0], va="center_baseline", transform=ax.get_xaxis_transform())
        ax.set_xlim(right=right * 2.5)                         # room for the labels
    fig.supxlabel("context length", fontsize=11)
    where = f"CPU, threads: {env['threads']}" if env["device"] == "cpu" else env["device"]
    fig.suptitle(f"What a longer context costs: two layers, d = 64, one sequence\n{where}, torch {env['torch']}", fontsize=12)
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


def figures_of_results(paths):
    """Read results of train.py and bench.py -> {file name: figure}. Raises ValueError, in one sentence."""
    costs = {path: found for path in dict.fromkeys(paths) if (found := load_costs(path))}
    figures = {name: draw_costs(*costs[path]) for name, path in named("cost", costs).items()}
    for task, panels in group([path for path in paths if path not in costs]).items():
        for kind in ("length", "training"):
            name = "{}_tau{}_K{}_d{}_L{}_M{}".format(kind, *task[:4], "-".join(map(str, panels)))
            figures[name + (".png" if task[4] == "fixed" else f"_{task[4]}.png")] = draw(task, panels, kind)
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
    parser.add_argument("--inside", nargs="+", default=[], metavar="RUN.pt",
                        help="checkpoints that train.py wrote: draw what each model does on one sequence, without results")
    parser.add_argument("--out", default="figures", metavar="DIR", help="where the figures go (default: figures)")
    args = parser.parse_args(argv)
    if bool(args.results) == bool(args.inside):
        parser.error("give it either results, RUN.json ..., or checkpoints, --inside RUN.pt ...")
    matplotlib.rcParams.update(LOOK)
    try:
        figures = figures_of_insides(args.inside) if args.inside else figures_of_results(args.results)
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
