"""The results of train.py as the figures want them: read and checked, and put together by what they have in common.

A run is {"config": ..., "length": (x, y), "training": (x, y)}: accuracy y against context length and against training step.
The runs of a figure are its panels: {values of flags: {name of a curve: [run, ...]}}, the runs of a curve differing in seed.

Imports look; plot.py draws what is read here. No torch, for this reads JSON only.
"""

import json

import numpy as np

from look import order

GRID = ["model", "M", "tau", "K", "d", "L", "seed"]  # what names a run, as in train.py
OTHERS = {"train_lengths": "fixed", "d_state": 16, "init": "official"}  # what else tells runs apart, and what files without it had
TASK = ["tau", "K", "d", "L", "M", "train_lengths", "d_state"]          # what tells figures or their panels apart


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
        config.update({flag: record["config"].get(flag, value) for flag, value in OTHERS.items()})
        whole = [config[flag] for flag in (*GRID[1:], "d_state")]
        if not (isinstance(config["model"], str) and config["model"] and all(type(number) is int for number in whole)
                and min(config[flag] for flag in (*GRID[1:-1], "d_state")) > 0
                and config["train_lengths"] in ("fixed", "uniform") and config["init"] in ("official", "mimetic")):
            raise ValueError
        return {"config": config, "length": points(record["eval"], "length"), "training": points(record["train"], "step")}
    except FileNotFoundError:
        raise ValueError(f"{path} is not there; train.py writes it when a run is finished") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{path} is not a whole result of train.py or bench.py") from None


def name_of(config, width):
    """What a run's curve is called: its model, its width if asked for, and its initialisation where that is not the usual one."""
    return ", ".join([config["model"], *[f"d = {config['d']}"] * width, *[config["init"]] * (config["init"] != OTHERS["init"])])


def group(paths, flags=("M",), across_widths=False):
    """Read the files and put the runs that have the same TASK, but for these flags, into one figure.

    A curve is of one model and init, its runs of different seeds; other flags, such as --lr, are not looked at.
    across_widths: runs that differ in d are in one figure, too, and where they do, d is a part of their curve's name.
    -> {task: {values of the flags: {name: [run, ...]}}}, sorted; a task is the values of what is left of TASK, in its order.
    Raises ValueError.
    """
    values = lambda run, flags: tuple(run["config"][flag] for flag in flags)
    runs = {path: load(path) for path in paths}
    across_widths = across_widths and "d" not in flags
    left = [flag for flag in TASK if flag not in flags and not (across_widths and flag == "d")]
    seen, figures, widths = {}, {}, {}
    for run in runs.values():
        widths.setdefault(values(run, left), set()).add(run["config"]["d"])
    for path, run in runs.items():
        task, panel = values(run, left), values(run, flags)
        name = name_of(run["config"], across_widths and len(widths[task]) > 1)
        same = (*values(run, (*TASK, "seed")), name)
        if same in seen:
            raise ValueError(f"{path} and {seen[same]} have the same model, task and seed: one curve has room for one of them")
        seen[same] = path
        figures.setdefault(task, {}).setdefault(panel, {}).setdefault(name, []).append(run)
    return {task: {panel: {name: panels[panel][name] for name in sorted(panels[panel], key=order)} for panel in sorted(panels)}
            for task, panels in sorted(figures.items())}


def load_published(path):
    """Read a file of published numbers -> {"published": source, "task": ..., "curves": {model: (x, y)}}; None if it is another."""
    try:
        with open(path, encoding="utf-8") as f:
            record = json.load(f)
        curves = {model: points(curve, "length") for model, curve in record["curves"].items()}
        return {"published": str(record["published"]), "task": dict(record["task"]), "curves": curves}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


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


def shared(panels, flag):
    """The values of a flag in a figure, sorted."""
    return sorted({runs[0]["config"][flag] for curves in panels.values() for runs in curves.values()})


def from_training_length(runs, name, longest=np.inf):
    """What each run reaches at its training length and, at its lowest, from there to longest. Raises ValueError."""
    L, curves = runs[0]["config"]["L"], [run["length"] for run in runs]
    if not all((x == L).any() for x, _ in curves):
        raise ValueError(f"a run of {name} was not tested at its training length {L}")
    if longest < L:
        raise ValueError(f"{name} was trained at length {L}, but another run of the figure was tested to {longest:g} only")
    return [y[x == L][0] for x, y in curves], [y[(x >= L) & (x <= longest)].min() for x, y in curves]
