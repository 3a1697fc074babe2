"""Figures and tables of results, from the JSON of train.py and eval.py.

    python plot.py results/*.json       accuracy against length and step
      --panels d M       a panel for each d and M (default: for each M)
      --panels model     a panel for each model, a curve for each M
      --against lr       accuracy at the training length against any flag
      --against model    a row for each model: at L, and the lowest to 3L
      --against state    accuracy against bytes of state
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

from output import (COLOURS, GREY, ORDER, RC_PARAMS, Parser, label_ends, length, report_left_out,
                    say, text, write_figure)
from summary import (IGNORED, TASK, View, by_curve, caption, chance, different, file_name, finding,
                     group, median_curve, median_of, name_curves, name_of, read, table)

CURVES = ["model", "M", "tau", "d"]      # not task, K or L: a panel marks one chance and one L
MEASURES = {"at": "accuracy at L", "lowest": "lowest accuracy from L to 3L"}
MORE_COLOURS = ["black", "#E31A1C", "#6A3D9A", "#33A02C", "#B15928", "#1F78B4", "#FF7F00"]
DASHES = {"-": "o", (0, (7, 2)): "s", (0, (4.5, 4.5)): "D", (0, (1.5, 3)): "^"}      # and markers
SMALL = dict(textcoords="offset points", color=GREY, fontsize=9,
             bbox=dict(fc="white", ec="none", alpha=0.7, pad=1))     # readable over curves


def curve_styles(curves):
    """{curve: (colour, dashes)}. Models after rope, and variants of a model, differ in dashes."""
    styles, leading = {}, list(dict.fromkeys(curve[0] for curve in curves))
    unlisted = [pair for pair in leading if pair[1] not in COLOURS]
    for k, curve in enumerate(curves):
        flag, value = curve[0]
        dashes = sum(other[0] == curve[0] for other in styles)
        if flag != "model" or len(leading) == 1 < len(curves):       # or variants of one model
            place = k / len(curves) if len(leading) == 1 else leading.index(curve[0]) / len(leading)
            colour = matplotlib.colormaps["viridis"](0.9 * place)
        elif value in COLOURS:
            colour, dashes = COLOURS[value], dashes + max(0, ORDER.index(value) - 2)
        else:
            colour = MORE_COLOURS[unlisted.index(curve[0]) % len(MORE_COLOURS)]
            dashes += unlisted.index(curve[0])
        styles[curve] = colour, list(DASHES)[dashes % len(DASHES)]
    return styles


# ---- the contents of a panel ---------------------------------------------------------------------

def mark_chance(ax, guesses):
    """Draw chance as a dotted line. guesses: {x: chance there}, 0 if it is not known."""
    lowest = min(guesses.values())
    ax.set(ylim=(min(0, lowest - 0.09), 1.05), ylabel="accuracy")
    if lowest == 0:
        return
    if lowest == max(guesses.values()):
        ax.axhline(lowest, color=GREY, lw=1, ls=":")
    else:
        ax.plot(*zip(*sorted(guesses.items())), color=GREY, lw=1, ls=":")
    ax.annotate(f"chance 1/{round(1 / lowest)}", (1, lowest), (-2, -3), **SMALL, ha="right",
                va="top", xycoords=ax.get_yaxis_transform(), zorder=5)


def step_axis(ax, runs):
    """A log axis of training steps, the same in all panels."""
    steps = np.concatenate([run["training"][0] for run in runs])
    low, high = min(steps), max(steps)
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high <= 300 * low else (1,)))
    ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1000 else f"{x / 1000:g}k")
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set(xlim=(low, high if high > low else 2 * low), xlabel="training step")


def length_axis(ax, runs, all_runs):
    """Context lengths up to the longest in any panel with this training length, which is marked."""
    L = runs[0]["config"]["L"]
    lengths = np.concatenate([run["length"][0] for run in all_runs if run["config"]["L"] == L])
    long = max(lengths) > 8 * L
    if long:
        ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(base=4) if long else MultipleLocator(L))
    ax.set(xlim=(min(lengths) if long else 0, max(lengths)), xlabel="context length")
    ax.axvline(L, color=GREY, lw=1, ls="--")
    how = {"up to" if run["config"].get("train_lengths") == "uniform" else "at" for run in runs}
    ax.annotate(f"trained {' or '.join(sorted(how))} {L}", (L, 1), (0, 2), **SMALL, ha="center",
                xycoords=ax.get_xaxis_transform())


def draw_curves(ax, runs, kind, styles):
    """Accuracy against context length or training step: each seed thin, their median thick."""
    mark_chance(ax, {0: chance(runs[0])})
    curves, ends = by_curve(runs).items(), []
    if kind == "training":                                   # the fastest first
        curves = sorted(curves, key=lambda item: median_of(item[1], "steps"))
    for curve, seeds in curves:
        colour, dashes = styles[curve]
        if len(seeds) > 1:                                   # a single one would fill the gaps
            for run in seeds:
                ax.plot(*run[kind], color=colour, lw=0.6, alpha=0.6, clip_on=False, zorder=2)
        x, y = median_curve(seeds, kind)
        sparse = len(x) < (30 if kind == "length" else 2)    # then mark the points
        ax.plot(x, y, color=colour, ls=dashes, lw=2, marker="o" if sparse else None, ms=5,
                clip_on=False, zorder=3 + 0.1 * list(DASHES).index(dashes))      # gaps on top
        name, steps = name_of(curve), median_of(seeds, "steps")
        if kind == "training":
            name += ": never" if steps == np.inf else f": {steps:,.0f}"
        if len(x):
            ends.append((x[-1], y[-1], name, styles[curve]))
    label_ends(ax, ends)


def draw_points(ax, runs, measure, styles, x_of):
    """Accuracy against x_of(run), each seed small, their median large."""
    ends = []
    for curve, same in by_curve(runs).items():
        (colour, dashes), columns = styles[curve], group(same, x_of)
        for x, seeds in columns.items():
            ax.plot([x] * len(seeds), [run[measure] for run in seeds], ls="", marker=".", alpha=0.6,
                    color=colour, clip_on=False)
        line = [(x, median_of(seeds, measure)) for x, seeds in columns.items()]
        ax.plot(*zip(*line), color=colour, ls=dashes, lw=2, marker=DASHES[dashes], clip_on=False,
                zorder=3 + 0.1 * list(DASHES).index(dashes))
        ends.append((*line[-1], name_of(curve), styles[curve]))
    label_ends(ax, ends)


def draw_against(ax, runs, view, styles, xs):
    """Accuracy against a flag, which has the values xs."""
    place, config = {x: i for i, x in enumerate(xs)}, runs[0]["config"]
    mark_chance(ax, {i: chance({"config": {**config, view.x: x}}) for x, i in place.items()})
    names = [text(x) for x in xs]                            # upright if they would touch
    ax.set_xticks(range(len(xs)), names, rotation=90 if len(" ".join(names)) > 36 else 0)
    ax.set(xlim=(-0.4, len(xs) - 0.6), xlabel=view.x, ylabel=MEASURES[view.measure])
    apart = min(0.04, 0.7 / len(styles))                     # so that no column reaches the next
    aside = {curve: apart * (i - (len(styles) - 1) / 2) for i, curve in enumerate(styles)}
    draw_points(ax, runs, view.measure, styles,
                lambda run: place[run["config"].get(view.x)] + aside[run["curve"]])


def draw_state(ax, runs, measure, styles, tokens, all_runs):
    """Accuracy against bytes of state after so many tokens."""
    mark_chance(ax, {0: chance(runs[0])})
    sizes = [size for run in all_runs for size in run["state"].values()]
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(base=4 if max(sizes) > 64 * min(sizes) else 2))
    ax.set(xlim=(0.7 * min(sizes), 1.4 * max(sizes)), ylabel=MEASURES[measure],
           xlabel=f"bytes of state after {tokens:,} tokens")
    draw_points(ax, runs, measure, styles, lambda run: run["state"][tokens])


def draw_rows(ax, runs, styles):
    """A row for each curve: a dot for the accuracy at L, a diamond for the lowest from L to 3L."""
    rows = {curve: row for row, curve in enumerate(styles)}
    for curve, seeds in by_curve(runs).items():
        colour = styles[curve][0]
        for what, shift, dot, face in ("at", -0.17, "o", colour), ("lowest", 0.17, "D", "white"):
            y, style = rows[curve] + shift, dict(ls="", ms=7, color=colour, mfc=face, clip_on=False)
            ax.plot([run[what] for run in seeds], [y] * len(seeds), marker="|", **style)
            ax.plot(median_of(seeds, what), y, marker=dot, **style)
    ax.axvline(chance(runs[0]), color=GREY, lw=1, ls=":")
    ax.set_yticks(range(len(rows)), map(name_of, rows))
    ax.set(xlim=(0, 1), xticks=[0, 0.5, 1], ylim=(len(rows) - 0.4, -0.6), xlabel="accuracy")
    ax.grid(axis="y", color="0.92", zorder=-1)


# ---- a figure ------------------------------------------------------------------------------------

def draw(runs, view, title=None):
    """The figure of these runs. title: instead of `finding`."""
    name_curves(runs, view)
    styles = curve_styles(by_curve(runs))
    xs = different(runs, view.x) if view.kind == "against" else []
    if len(xs) == 1:
        raise ValueError(f"all runs have {view.x} = {xs[0]}")
    # One panel per setting; for state two, after 64 and after 4,096 tokens.
    places = [(setting, own, tokens) for setting, own in group(runs, view.panels).items()
              for tokens in ((64, 4096) if view.kind == "state" else (None,))]
    if len(places) > 40:
        raise ValueError(f"a figure of {len(places)} panels, 40 are the most")
    # Inches: the width follows the longest name, the height the number of names and the title.
    columns = 2 if view.kind == "state" or len(places) == 4 else min(3, len(places))
    rows = -(-len(places) // columns)
    wide = max(8, columns * max(4.6, 3.8 + 0.09 * max(len(name_of(curve)) for curve in styles)))
    title = (finding(runs, view) if title is None else title).replace(" = ", "\u00a0=\u00a0")
    title = textwrap.fill(title, int(9.5 * wide), break_on_hyphens=False, max_lines=6)
    height = 0.42 * len(styles) + 0.8 if view.kind == "model" else max(3.8, 0.22 * len(styles))
    tall = 1.2 + rows * height + 0.22 * max(0, title.count("\n") - 2)
    fig = Figure(figsize=(wide, tall), layout="constrained")
    fig.suptitle(title, fontsize=13, x=0.02, ha="left")
    words = [textwrap.fill(line, int(14 * wide)) for line in caption(runs, view)]
    fig.supxlabel("\n".join(words), fontsize=9, color=GREY, x=0.02, ha="left")

    for i, (setting, own, tokens) in enumerate(places):
        ax = fig.add_subplot(rows, columns, 1 + i)
        names = [name_of([pair]) for pair in zip(view.panels, setting)]
        names += [f"after {tokens:,} tokens"] if tokens else []
        ax.set_title(", ".join(names) if len(places) > 1 else "",
                     pad=18 if view.kind == "length" else 6)
        if view.kind == "model":
            draw_rows(ax, own, styles)
        elif view.kind == "against":
            draw_against(ax, own, view, styles, xs)
        elif view.kind == "state":
            draw_state(ax, own, view.measure, styles, tokens, runs)
        elif view.kind == "training":
            step_axis(ax, runs)
            draw_curves(ax, own, "training", styles)
        else:
            length_axis(ax, own, runs)
            draw_curves(ax, own, "length", styles)
    return fig


def views_of(args):
    """The views that args ask for, and the flags of which each value gets figures of its own."""
    x, panels = args.against, [flag for flag in args.panels if flag != args.against]
    if x in ("model", "state"):
        curves = ["model", "d"] if x == "model" and "d" not in panels else ["model"]
        views, varying = [View(x, panels, curves, measure=args.measure)], {"d", *panels}
    else:
        curve = next((flag for flag in CURVES if flag not in (*panels, x)), "seed")
        kinds = ["against"] if x else ["length", "training"]
        views = [View(kind, panels, [curve], x or "", args.measure) for kind in kinds]
        varying = {x, curve, *panels}                        # within a figure
    return views, [flag for flag in TASK if flag not in varying]


def main(argv=None, add_to=lambda fig, runs, view: None):
    """Draw what argv asks for -> paths of the figures. SystemExit 2 if there is nothing to draw.
    add_to(fig, runs, view) may add to a figure before it is written; report/make.py does."""
    parser = Parser("plot.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    flag = dict(metavar="FLAG", type=lambda word: word.replace("-", "_"))
    add("results", nargs="+", metavar="RUN.json", help="results of train.py")
    add("--panels", nargs="+", default=["M"], **flag, help="flags of panels (default: M)")
    add("--against", **flag, help="accuracy against a flag of train.py, model, or state")
    add("--lowest", dest="measure", action="store_const", const="lowest", default="at",
        help="with --against: the lowest accuracy from L to 3L, not that at L")
    add("--title", type=lambda word: text(word, 999), help="of the figures, but not of training")
    add("--table", nargs="*", type=length, metavar="LENGTH", help="print a table")
    add("--name", help="of the figure's file, without .png (default: made from its settings)")
    add("--format", choices=["png", "pdf", "svg"], default="png", help="default: png")
    add("--out", default="figures", metavar="DIR", help="folder of figures (default: figures)")
    args = parser.parse_args(argv)
    if args.measure == "lowest" and args.against in (None, "model"):
        parser.error("--lowest needs --against state or --against FLAG")
    if args.table is not None and args.against:
        parser.error("--table prints a table and draws nothing, so it takes no --against")
    runs, left_out = read(args.results)
    if args.table is not None and runs:
        say(table(runs, args.table))
        tested = set().union(*(run["length"][0] for run in runs))
        left_out += [f"no run was tested at {n} tokens" for n in args.table if n not in tested]
        report_left_out(parser, True, left_out)
        return []
    known = set().union(*(run["config"] for run in runs)) - IGNORED
    unknown = {*args.panels, *({args.against} - {None, "state"})} - known
    if runs and unknown:
        parser.error(f"{unknown.pop()!r} is no flag of these runs: {', '.join(sorted(known))}"
                     .replace("_", "-"))
    def lacks(run):
        if args.against == "state" and not (run["state"] and run["state"][64]):
            return "has no bytes of state"                   # a log axis has no 0
        return np.isnan(run[args.measure]) and f"has no {MEASURES[args.measure]}"
    left_out += [f"{run['path']} {lacks(run)}" for run in runs if args.against and lacks(run)]
    drawn = [run for run in runs if not (args.against and lacks(run))]
    (views, split_by), written = views_of(args), []
    for of_figure in group(drawn, split_by).values():
        for view in views:
            path = os.path.join(args.out, f"{file_name(of_figure, view, args)}.{args.format}")
            try:
                if path in written:
                    raise ValueError("another figure has this name; --name is for one figure")
                with matplotlib.rc_context(RC_PARAMS):
                    fig = draw(of_figure, view, None if view.kind == "training" else args.title)
                    add_to(fig, of_figure, view)
                    write_figure(path, fig)
                written.append(path)
                say(path)
            except ValueError as error:
                left_out.append(f"{path}: {error}")
            except OSError as error:
                parser.error(f"--out is {args.out!r}, but it cannot be written: {error.strerror}")
    report_left_out(parser, written, left_out)
    return written


if __name__ == "__main__":
    main()
