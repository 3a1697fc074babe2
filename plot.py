"""Figures and tables of results, from the JSON of train.py and eval.py.

    python plot.py results/*.json       accuracy against length and step
      --panels d M       a panel for each d and M (default: for each M)
      --panels model     a panel for each model, a curve for each M
      --against lr       accuracy at the training length against any flag
      --against model    a row for each model: at L, and the lowest to 3L
      --against state    accuracy against bytes of state
      --against d --lowest            the lowest accuracy to 3L, not that at L
      --table [16 64]    a Markdown table [of the accuracy at 16 and 64]
"""

import argparse
import os
import signal
import textwrap

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C prints no traceback, even in imports

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MultipleLocator, NullLocator

from output import end_with, length, say, short_errors, text, write_figure
from summary import (COLOURS, IGNORED, ORDER, REACH, TASK, caption, file_name, finding, group,
                     median, middle, n_answers, name_of, read, sort_key, table)

LONG = 18         # characters in a curve's name, beyond which panels are wider
AXES = {"at": "accuracy at L", "lowest": "lowest accuracy from L to 3L"}
UNNAMED = ["black", "#E31A1C", "#6A3D9A", "#33A02C", "#B15928", "#1F78B4", "#FF7F00"]  # of others
DASHES = ["-", (0, (7, 2)), (0, (4.5, 4.5)), (0, (1.5, 3))]  # gaps show the curves below
GREY, RAISED = "0.35", str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
RC_PARAMS = {"font.size": 11, "axes.titlesize": 11, "axes.edgecolor": GREY, "xtick.color": GREY,
             "ytick.color": GREY, "xtick.labelsize": 9, "axes.spines.top": False,
             "axes.spines.right": False, "text.parse_math": False, "text.usetex": False}


def curve_styles(cells, flag, stacks=()):
    """{curve: (colour, dashes)}: models of COLOURS have theirs; variants have other dashes."""
    found, bases = {}, list(dict.fromkeys(base for _, (base, _), _ in cells))
    for base, extra in dict.fromkeys(curve for _, curve, _ in cells):
        dashes = sum(other == base for other, _ in found)
        if flag != "model":
            colour = matplotlib.colormaps["viridis"](0.9 * bases.index(base) / len(bases))
        elif base in COLOURS:
            colour, dashes = COLOURS[base], dashes + max(0, ORDER.index(base) - 2)
        else:
            colour = UNNAMED[list(stacks).index(base) % len(UNNAMED)]
        found[base, extra] = colour, DASHES[dashes % len(DASHES)]
    return found


def spread(heights, low, high):
    """Heights of labels that do not touch, near those wanted, which fall from first to last."""
    gap, placed = min(0.065, (high - low) / max(1, len(heights))), []
    for y in heights:
        placed.append(min(y, placed[-1] - gap if placed else high))
    for i in reversed(range(len(placed))):
        placed[i] = max(placed[i], placed[i + 1] + gap if i + 1 < len(placed) else low)
    return placed


def label_ends(ax, ends):
    """Name the curves at the right of the axes. ends: [(x, y, name, (colour, dashes)), ...]."""
    ends = sorted(ends, key=lambda end: -round(end[1], 2))         # equals stay in their order
    right, key = ax.get_xlim()[1], 1.1 if ax.get_gridspec().ncols == 1 else 1.18
    heights = spread([y for _, y, _, _ in ends], ax.get_ylim()[0] + 0.04, 1.01)
    for (x, y, name, (colour, dashes)), height in zip(ends, heights):
        beside = dict(color=colour, clip_on=False, transform=ax.get_yaxis_transform())
        ax.plot([x, right], [y, y], lw=0.8, ls=":", color=colour, alpha=0.4)
        ax.plot([1, 1.04], [y, height], lw=0.8, **beside)
        ax.plot([1.04, key], [height, height], lw=2, ls=dashes, **beside)
        ax.text(key + 0.02, height, name, va="center_baseline", **beside)


def mark(ax, runs, kind, guesses):
    """Draw chance, dotted, and the training length, dashed. guesses: {x: accuracy of a guess}."""
    L, small = runs[0]["config"]["L"], dict(textcoords="offset points", color=GREY, fontsize=9)
    lowest, dotted = min(guesses.values()), dict(color=GREY, lw=1, ls=":")
    if lowest == max(guesses.values()):
        ax.axhline(lowest, **dotted)
    else:
        ax.plot(*zip(*sorted(guesses.items())), **dotted)
    ax.annotate(f"chance 1/{round(1 / lowest)}", (1, lowest), (-2, -3), ax.get_yaxis_transform(),
                ha="right", va="top", **small)
    ax.set(ylim=(min(0, lowest - 0.09), 1.05), ylabel="accuracy")
    if kind == "length":
        mixed = any(run["config"]["train_lengths"] == "uniform" for run in runs)
        words = "trained up to" if mixed else "trained at"
        ax.axvline(L, color=GREY, lw=1, ls="--")
        ax.annotate(f"{words} {L}", (L, 1), (0, 2), ax.get_xaxis_transform(), ha="center", **small)


def scale_x(ax, kind, runs, L):
    """Limits and ticks of the x axis, the same in all panels; of lengths, in those of one L."""
    if kind == "state":
        xs = [size * air for run in runs for size in run["state"].values() for air in (0.7, 1.4)]
    else:
        alike = [run for run in runs if kind == "training" or run["config"]["L"] == L]
        xs = np.concatenate([run[kind][0] for run in alike])
    low, high = min(xs), max(xs)
    ax.set_xlabel("training step" if kind == "training" else "context length")
    if kind == "training":
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high <= 300 * low else (1,)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1000 else f"{x / 1000:g}k")
    elif kind == "state" or high > 8 * L:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_locator(LogLocator(base=4))
        ax.xaxis.set_major_formatter(lambda x, _: f"2{str(round(np.log2(x))).translate(RAISED)}")
    else:
        low = 0
        ax.xaxis.set_major_locator(MultipleLocator(L))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(low, high if high > low else 2 * low)


def draw_curves(ax, curves, styles, flag, kind):
    """Accuracy against context length or training step: each seed thin, their median thick."""
    ends = []
    for (curve, _), runs in curves.items():
        colour, dashes = styles[curve]
        for run in runs if len(runs) > 1 else ():            # alone, it would fill the dashes
            ax.plot(*run[kind], color=colour, lw=0.6, alpha=0.6, clip_on=False, zorder=2)
        x, y = median(runs, kind)
        few = len(x) == 1 or (kind == "length" and len(x) < 30)     # points: say where they are
        ax.plot(x, y, color=colour, ls=dashes, lw=2, marker="o" if few else None, ms=5,
                clip_on=False, zorder=3)
        name, steps = name_of(flag, curve), middle(runs, "steps")
        if kind == "training":
            name += ": never" if steps == np.inf else f": {steps:,.0f}"
        if len(x):
            ends.append((steps if kind == "training" else 0, (x[-1], y[-1], name, styles[curve])))
    label_ends(ax, [end for _, end in sorted(ends, key=lambda end: end[0])])   # the fastest first


def draw_points(ax, curves, styles, flag, position, what):
    """Accuracy, each seed small, their median large. position(curve, x, runs): its x."""
    lines = {}
    for (curve, x), runs in curves.items():
        at = position(curve, x, runs)
        ax.plot([at] * len(runs), [run[what] for run in runs], ls="", marker=".", alpha=0.6,
                color=styles[curve][0], clip_on=False)
        lines.setdefault(curve, []).append((at, middle(runs, what)))
    for curve, line in lines.items():
        colour, dashes = styles[curve]
        ax.plot(*zip(*sorted(line)), color=colour, ls=dashes, lw=2, marker="o", clip_on=False)
    label_ends(ax, [(*max(line), name_of(flag, c), styles[c]) for c, line in lines.items()])


def draw_rows(ax, curves, styles):
    """A row for each model: a dot for the accuracy at L, a diamond for the lowest from L to 3L."""
    for (curve, _), runs in curves.items():
        row, colour = list(styles).index(curve), styles[curve][0]
        for what, y, dot, face in ("at", row - 0.17, "o", colour), ("lowest", row + 0.17, "D", "w"):
            style = dict(ls="", ms=7, color=colour, mfc=face, clip_on=False)
            ax.plot([run[what] for run in runs], [y] * len(runs), marker="|", **style)
            ax.plot(middle(runs, what), y, marker=dot, **style)
    ax.axvline(1 / n_answers(next(iter(curves.values()))[0]["config"]), color=GREY, lw=1, ls=":")
    ax.set_yticks(range(len(styles)), [name_of("model", curve) for curve in styles])
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(len(styles) - 0.4, -0.6), xlabel="accuracy")
    ax.grid(axis="y", color="0.92", zorder=-1)


def draw(kind, cells, panels, curve, across=(), stacks=(), published=(), what="at", title=None):
    """The figure of a `group`, of the kind length, training, against, state or model."""
    places = [(panel, tokens) for panel in dict.fromkeys(panel for panel, _, _ in cells)
              for tokens in ((64, 4096) if kind == "state" else (None,))]
    xs = sorted({x for _, _, x in cells}, key=sort_key)
    if kind == "against" and len(xs) == 1:
        raise ValueError(f"all runs have {across[0]} = {xs[0][0]}")
    if len(places) > 40:
        raise ValueError(f"a figure of {len(places)} panels, 40 are the most")
    columns = 2 if kind == "state" or len(places) == 4 else min(3 + len(places) // 10, len(places))
    styles, rows = curve_styles(cells, curve, stacks), -(-len(places) // columns)
    # Inches: the width follows the longest name, the height the number of names and the title.
    longest = 0 if kind == "model" else max(len(name_of(curve, name)) for name in styles)
    wide = max(8, columns * (4.6 + 0.09 * max(0, longest - LONG)))
    flags = (*panels, curve, *across)
    title = (title or finding(cells, flags, kind, what)).replace(" = ", "\u00a0=\u00a0")  # unbroken
    title = textwrap.fill(title, int(9.5 * wide), break_on_hyphens=False, max_lines=6)
    height = 0.42 * len(styles) + 0.8 if kind == "model" else max(3.8, 0.22 * len(styles))
    tall = 1.2 + rows * height + 0.22 * max(0, title.count("\n") - 2)
    fig = Figure(figsize=(wide, tall), layout="constrained")
    fig.suptitle(title, fontsize=13, x=0.02, ha="left")
    axes = [fig.add_subplot(rows, columns, 1 + i) for i in range(len(places))]
    runs, sources = [run for seeds in cells.values() for run in seeds], {}
    for ax, (panel, tokens) in zip(axes, places):
        shown = {(c, x): seeds for (p, c, x), seeds in cells.items() if p == panel}
        config = next(run["config"] for seeds in shown.values() for run in seeds)
        words = [name_of(flag, (value, ())) for flag, value in zip(panels, panel)]
        words += [f"after {tokens:,} tokens"] if tokens else []
        ax.set_title(", ".join(words) if len(places) > 1 else "", pad=18 if kind == "length" else 6)
        if kind == "model":
            draw_rows(ax, shown, styles)
            continue
        mark(ax, sum(shown.values(), []), kind, {xs.index(x): 1 / n_answers(seeds[0]["config"])
                                                 for (_, x), seeds in shown.items()})
        if kind == "against":
            apart = min(0.04, 0.7 / len(styles))             # so that no column reaches the next
            aside = {c: apart * (i - (len(styles) - 1) / 2) for i, c in enumerate(styles)}
            ax.set(xlim=(-0.4, len(xs) - 0.6), xlabel=across[0], ylabel=AXES[what])
            names = [text(x[0]) for x in xs]                 # upright if they would touch
            ax.set_xticks(range(len(xs)), names, rotation=90 if len(" ".join(names)) > 36 else 0)
            draw_points(ax, shown, styles, curve, lambda c, x, seeds: xs.index(x) + aside[c], what)
            for c in {c for c, _ in shown if c[0] in REACH} if across == ("tau",) else ():
                ax.axvline(sum(x[0] <= REACH[c[0]] for x in xs) - 0.5, color=styles[c][0], ls="--")
                sources["; dashed: how far each convolution reaches"] = True
            continue
        scale_x(ax, kind, runs, config["L"])
        if kind == "state":
            ax.set(xlabel=f"bytes of state after {tokens:,} tokens", ylabel=AXES[what])
            draw_points(ax, shown, styles, curve, lambda c, x, s: s[0]["state"][tokens], what)
            continue
        draw_curves(ax, shown, styles, curve, kind)
        for source in published if kind == "length" else ():
            same_task = source["task"].items() <= config.items()
            for name, (x, y) in source["curves"].items() if same_task else ():
                sources[f"; hollow points: {source['published']}"] = True
                if curve == "model" or name == config["model"]:
                    ax.plot(x, y, color=COLOURS.get(name, GREY), ls="", marker="o", mfc="white",
                            ms=6, clip_on=False, zorder=4)
    lines = (caption(cells, flags, kind) + "".join(sources)).split("\n")
    words = "\n".join(textwrap.fill(line, int(14 * wide)) for line in lines)
    fig.supxlabel(words, fontsize=9, color=GREY, x=0.02, ha="left")
    fig.draw_without_rendering()                             # the layout takes two passes
    return fig


def main(argv=None):
    """Draw what argv asks for -> paths of the figures. SystemExit 2 if there is nothing to draw."""
    parser = short_errors(argparse.ArgumentParser(
        "plot.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter))
    add = parser.add_argument
    add("results", nargs="+", metavar="RUN.json", help="results of train.py")
    flag = dict(metavar="FLAG", type=lambda word: word.replace("-", "_"))
    add("--panels", nargs="+", default=["M"], **flag, help="flags of panels (default: M)")
    add("--against", **flag, help="a flag of train.py, model, or state")
    add("--lowest", dest="what", action="store_const", const="lowest", default="at",
        help="with --against: see above")
    add("--title", help="of the figures (default: what they show)")
    add("--table", nargs="*", type=length, metavar="LENGTH", help="print a table")
    add("--name", help="name of a figure's file (default: what it shows)")
    add("--out", default="figures", metavar="DIR", help="folder of figures (default: figures)")
    args = parser.parse_args(argv)
    if args.what == "lowest" and args.against in (None, "model"):
        parser.error("--lowest needs --against state or --against FLAG")
    if args.table is not None and args.against:
        parser.error("--table prints a table and draws nothing, so it takes no --against")
    runs, published, left_out = read(args.results)
    if args.table is not None and runs:
        say(table(runs, args.table))
        tested = set().union(*(run["length"][0] for run in runs))
        left_out += [f"no run was tested at {n} tokens" for n in args.table if n not in tested]
        end_with(parser, True, left_out)
        return []
    known = set().union(*(run["config"] for run in runs)) - IGNORED | {"model", "seed", "state"}
    unknown = sorted({*args.panels, args.against or "state"} - known)
    if runs and unknown:
        parser.error(f"{unknown[0]!r} is no flag of these runs: {', '.join(sorted(known))}"
                     .replace("_", "-"))
    across = {None: (), "model": (), "state": ("d",)}.get(args.against, (args.against,))
    panels = tuple(flag for flag in args.panels if flag not in (args.against, *across))
    curve = next(flag for flag in ("model", "M", *TASK) if flag not in (*panels, *across))
    fixed = [flag for flag in TASK if flag not in (*panels, curve, *across)]
    kinds = {None: ["length", "training"], "model": ["model"], "state": ["state"]}
    kinds = kinds.get(args.against, ["against"])
    for run in list(runs) if args.against else []:
        if np.isnan(run[args.what]) or (args.against == "state" and not run["state"]):
            left_out.append(f"{run['path']} was not tested at L or to 3L, or has no bytes of state")
            runs.remove(run)
    if args.against == "model" and "d" in fixed:
        fixed.remove("d")
        for run in runs:
            run["changed"]["d"] = run["config"]["d"]             # part of the names
    stacks, written = sorted({run["config"]["model"] for run in runs} - set(ORDER)), []
    for cells in group(runs, fixed, panels, curve, across):
        for kind in kinds:
            path = os.path.join(args.out, file_name(kind, cells, args))
            try:
                if path in written:
                    raise ValueError("another figure has this name; --name is for one figure")
                with matplotlib.rc_context(RC_PARAMS):
                    fig = draw(kind, cells, panels, curve, across, stacks, published, args.what,
                               None if kind == "training" else args.title)
                    write_figure(path, fig)
                written.append(path)
                say(path)
            except ValueError as error:
                left_out.append(f"{path}: {error}")
            except OSError as error:
                parser.error(f"--out is {args.out!r}, but it cannot be written: {error.strerror}")
    end_with(parser, written, left_out)
    return written


if __name__ == "__main__":
    main()
