"""Make an experiment of the report: its runs, its tests (table2: to a million tokens), its figures.

    python report/make.py                                  the experiments and their flags
    python report/make.py problem1                         one seed, on a laptop: runs and figures
    python report/make.py problem1 --seed 0 1 2 3 4        the five seeds of the report
    torchrun --nproc-per-node 8 -- report/make.py problem1 problem2       eight runs at a time

Runs go to results/EXPERIMENT/, figures to figures/; --out and --figures name other folders. With
--out report, figures have the titles of the report. The same command resumes a killed one. Other
flags, such as --device, come after the names; they are passed on to train.py and override those of
an experiment. Values of a flag that an experiment varies cannot be added.
"""

import glob
import json
import os
import shlex
import signal
import sys
from fnmatch import fnmatch

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C is no traceback, also during imports

os.chdir(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, os.getcwd())

import eval as evaluation
import plot
import train
from experiments import EXPERIMENTS
from grid import barrier, make_all
from output import COLOURS, GREY, Parser, rank_and_processes, report_left_out
from runs import path_of
from summary import GRID, group


def share(paths):
    """This process's share of a list, if torchrun started several."""
    rank, processes = rank_and_processes()
    return sorted(paths)[rank::processes]


def main(argv=None):
    parser = Parser(description="Make experiments of the report.")
    parser.add_argument("names", nargs="*", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--seed", nargs="+", default=["0"], help="seeds (default: 0)")
    parser.add_argument("--out", default="results", help="folder of the runs (default: results)")
    parser.add_argument("--draw", action="store_true", help="draw existing runs, make none")
    parser.add_argument("--figures", default="figures", help="folder of figures (default: figures)")
    args, flags = parser.parse_known_intermixed_args(argv)
    args.out = os.path.normpath(args.out)
    for name in args.names:
        if name not in EXPERIMENTS:
            hint = "; flags of train.py come after the names" if flags else ""
            parser.error(f"{name!r} is none of the experiments {', '.join(EXPERIMENTS)}{hint}")
    if not args.names:
        for name, experiment in EXPERIMENTS.items():
            print(name)
            for line in experiment["train"]:
                print(f"    train.py {line}")
        return
    if args.draw and flags:
        parser.error(f"--draw trains nothing, so it takes no {flags[0]}")
    given = {word.split("=")[0] for word in flags} & {f"--{flag}" for flag in GRID}
    for name in args.names:
        for flag in given.intersection(" ".join(EXPERIMENTS[name]["train"]).split()):
            parser.error(f"{flag} is set by {name}; train.py makes runs with other values")
    failed, written, left_out = None if args.draw else make(args, flags), [], []
    if rank_and_processes()[0] == 0:
        for name in args.names:
            if args.draw and "draw" not in EXPERIMENTS[name]:
                print(f"{name} has no figure of its own")
            for line, title in EXPERIMENTS[name].get("draw", {}).items():
                more = ["--title", title] if args.out == "report" else []
                try:
                    written += draw(line, args.out, [*more, "--out", args.figures])
                except ValueError as error:
                    left_out.append(str(error))
                except SystemExit:                               # of plot.py, which says why
                    left_out.append(f"no figure of {line.replace('{}', args.out)}")
    barrier()                            # torchrun ends all processes when the first one fails
    if left_out:
        report_left_out(parser, written or failed, left_out)
    if failed:
        sys.exit(failed)


def make(args, flags):
    """The runs and tests of the experiments named -> a sentence if runs have no result, or None."""
    configs, failed = [], None
    for name in args.names:
        for line in EXPERIMENTS[name]["train"]:
            words = [*line.split(), "--seed", *args.seed, "--out", f"{args.out}/{name}", *flags]
            configs += train.configs_from(words)
    try:
        make_all(configs, train.train_one, train.print_table)
    except SystemExit as error:
        if error.code == 130:                                    # Ctrl-C
            raise
        failed = error.code
    for name in args.names:
        for pattern, line in EXPERIMENTS[name].get("test", ()):
            own = [path_of(c) for c in configs if c["out"] == f"{args.out}/{name}"]
            own = [f"{path}.pt" for path in own if fnmatch(os.path.basename(path), pattern)]
            paths = share(filter(os.path.exists, own))
            if paths:
                evaluation.main([*paths, *line.split()])
    barrier()                                                # figures need the tests of all
    return failed


def draw(line, out, more):
    """Run plot.py with the flags of a line and the files of its patterns, where {} is the folder
    `out` -> the paths of the figures. Raises ValueError if there are no such files."""
    words, published = [], []
    for word in shlex.split(line):
        word = word.replace("{}", glob.escape(out))
        found = sorted(path for path in glob.glob(word) if path.endswith(".json"))
        if "/published/" in word:
            published += found or [word]                     # missing: an error when it is opened
        else:
            words += found if "*" in word else [word]
    if not any(word.endswith(".json") for word in words):
        patterns = line.split(" --")[0].replace("{}", out)
        raise ValueError(f"no runs to draw: {patterns}; the report's have --out report")

    def add_to(fig, runs, view):
        """Add what only the report shows: published numbers, the reach of convolutions."""
        notes = []
        for ax, own in zip(fig.axes, group(runs, view.panels).values()):
            if view.kind == "length":
                notes += [add_published(ax, path, own) for path in published]
            if view.x == "tau":
                notes += [mark_reach(ax, own, sorted({run["config"]["tau"] for run in runs}))]
        words = [fig.get_supxlabel(), "; ".join(dict.fromkeys(filter(None, notes)))]
        fig.supxlabel("\n".join(filter(None, words)), fontsize=9, color=GREY, x=0.02, ha="left")

    return plot.main([*words, *more], add_to)


def add_published(ax, path, runs):
    """Draw published accuracies on the task of these runs as hollow points -> a note, or None.

    The file has "published", the source; "task", flags; "curves", {model: {"length": [...],
    "accuracy": [...]}}.
    """
    with open(path) as f:
        source = json.load(f)
    if not source["task"].items() <= runs[0]["config"].items():
        return None
    for model, points in source["curves"].items():
        ax.plot(points["length"], points["accuracy"], color=COLOURS[model], ls="", marker="o",
                mfc="white", ms=6, clip_on=False, zorder=4)
    return f"hollow points: {source['published']}"


def mark_reach(ax, runs, delays):
    """Mark how far convolutions before attention reach, on an axis of delays -> a note, or None."""
    reach = {"conv2+attention": 1, "conv+attention": 3, "conv8+attention": 7}    # taps - 1
    models = [model for model in reach if (model,) in group(runs, ["model"])]
    for model in models:
        ax.axvline(sum(tau <= reach[model] for tau in delays) - 0.5, color=COLOURS[model], ls="--")
    return "vertical dashed lines: how far each convolution reaches" if models else None


if __name__ == "__main__":
    main()
