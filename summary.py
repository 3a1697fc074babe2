"""Results of train.py: read from JSON, grouped into the seeds of a setting, put into words.

plot.py draws them. All flags have their defaults here. Only `chance` may import torch.
"""

import json
import os
from typing import NamedTuple

import numpy as np

from output import listed, numbered, text

GRID = dict(model="rope", M=1, tau=1, K=16, d=8, L=64, seed=0)     # flags that take several values
DEFAULTS = dict(  # of the other flags that change a run; lr: default_lr
    task="recall", batch_size=64, steps=20000, lr=None, weight_decay=0.0, n_heads=1, d_state=16,
    train_lengths="fixed", learn_embedding=False, stop_early=True)
IGNORED = {"device", "compile", "out", "overwrite"}          # change no run
TASK = ["task", "tau", "K", "d", "L", "M"]                   # the flags that say what is learned
COLOURS = {  # in the order of figures; the first six for colour-blind readers (Okabe, Ito)
    "nope": "#56B4E9", "learned": "#E69F00", "rope": "#0072B2", "mamba": "#D55E00",
    "hybrid-a": "#009E73", "hybrid-b": "#CC79A7", "rnn": "#999999", "lti": "#666666",
    "retention": "#8C6D31", "griffin": "#5C4A1F", "mamba2": "#A50F15", "samba": "#1B7837",
    "mamba2-hybrid": "#54278F", "jamba": "#01665E", "zamba": "#35978F", "zamba2": "#756BB1",
    "zamba2-mini": "#9E9AC8", "mamba3": "#DD1C77", "deltanet": "#66A61E",
    "gated-deltanet": "#17BECF", "alibi": "#8C564B", "forgetting": "#5F7A8A",
    "conv2+attention": "#E69F00", "conv+attention": "#333333", "conv8+attention": "#CC79A7",
    "mamba-noconv+attention": "#D55E00", "mamba+attention": "#009E73", "2xattention": "#56B4E9",
    "2xrope": "#0072B2", "2xalibi": "#8C564B", "2xforgetting": "#5F7A8A", "2xwindow": "#BCBD22",
    "2xlinear-fixed-noconv": "#C7A76C", "2xlinear-fixed": "#8C6D31",
    "2xlinear-decay-noconv": "#F4A582", "2xlinear-decay": "#CA0020",
    "2xgated-deltanet-noconv": "#9EDAE5", "2xgated-deltanet": "#17BECF",
    "2xlinear-rotation-noconv": "#E6C35C", "2xlinear-rotation": "#B8860B"}
ORDER = list(COLOURS)        # of models in figures and tables
TEST_SEQUENCES = 512         # of a test during training
SOLVED = 0.99                # a task is solved when tests reach this accuracy
KEPT = 0.95                  # a model that stays above it from L on does not fade


def default_lr(d):
    return min(8e-3, 0.128 / max(1, d))     # with 8e-3 at d = 32, rope failed M = 16 in 5 of 5 runs


def load(path):
    """Read a result of train.py -> a run, a dict. Raises ValueError for other files.

    A run has "path"; "config", all flags; "changed", those not at their default, without GRID and
    the task; the curves "length" and "training" (x, accuracy); "at" and "lowest", its accuracy at L
    and the lowest from L to 3L, NaN if not tested; "steps", the first with a test at SOLVED, or
    infinite; "state", {tokens: bytes} or None; "sequences" per length.
    """
    try:
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        flags = {**GRID, **result["config"]}
        if any(isinstance(flags[flag], str) != (flag == "model") for flag in GRID):
            raise ValueError
        defaults = {**DEFAULTS, "lr": default_lr(flags["d"])}
        config, L = {**defaults, **flags}, flags["L"]
        changed = {flag: value for flag, value in config.items()
                   if flag not in {"task", *GRID, *IGNORED} and value != defaults.get(flag, False)}
        hash(tuple(config.values()))                         # a TypeError if one is a list
        x, y = points(result["eval"], "length")
        step, test = points(result["train"], "step")
        sizes = result.get("state_bytes")
        to_3L = y[(x >= L) & (x <= 3 * L)] if L in x and x[-1] >= 3 * L else [np.nan]
        return {"path": path, "config": config, "changed": changed, "length": (x, y),
                "training": (step, test), "at": y[x == L][0] if L in x else np.nan,
                "lowest": min(to_3L), "steps": min(step[test >= SOLVED], default=np.inf),
                "state": sizes and {n: sizes[str(n)] for n in (64, 4096)},
                "sequences": np.ravel(result["eval"]["sequences"])}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        hint = f"; its result is {path[:-3]}.json" if path.endswith(".pt") else ""
        raise ValueError(f"{path} is no result of train.py{hint}") from None


def points(section, x):
    """A curve of a result -> x, accuracy, both (n,). Raises ValueError if it is not one."""
    x, y = np.array(section[x], float), np.array(section["accuracy"], float)
    if not (len(x) > 0 and x.shape == y.shape == (len(x),) and np.all(np.diff(x) > 0)):
        raise ValueError
    return x, y


def read(paths):
    """Read files -> runs, and a sentence for each file that is left out."""
    runs, left_out = {}, []
    for path in dict.fromkeys(paths):
        try:
            found = load(path)
        except ValueError as error:
            left_out.append(str(error))
            continue
        key = values(found, sorted(set(found["config"]) - IGNORED))
        if key in runs and not os.path.samefile(path, runs[key]["path"]):
            left_out.append(f"{path} has the model, settings and seed of {runs[key]['path']}")
        runs.setdefault(key, found)
    return list(runs.values()), left_out


def values(run, flags):
    """The values of these flags in a run, None where a flag is missing."""
    return tuple(run["config"].get(flag) for flag in flags)


def sort_key(value):
    """A sort key: numbers by size, models as in ORDER, everything else by name."""
    if isinstance(value, tuple):
        return tuple(sort_key(part) for part in value)
    if isinstance(value, (int, float)):
        return 0, value, ""
    return 1, ORDER.index(value) if value in ORDER else len(ORDER), str(value)


def group(runs, key):
    """Group runs by key(run), or by the values of a list of flags -> {key: its runs}, sorted."""
    found = {}
    for run in runs:
        found.setdefault(key(run) if callable(key) else values(run, key), []).append(run)
    return dict(sorted(found.items(), key=lambda item: sort_key(item[0])))


def by_curve(runs):
    return group(runs, lambda run: run["curve"])


def median_of(seeds, what):
    return np.median([run[what] for run in seeds])


def chance(run):
    """The accuracy of a guess among the possible answers, to a good approximation."""
    task, K = values(run, ["task", "K"])
    if task == "recall":
        return 1 / K
    from data import n_answers       # here, because importing torch takes a second or two
    return 1 / n_answers(task, K)


def median_curve(seeds, kind):
    """The median curve of seeds -> x, y. Of "length": at lengths at which all were tested."""
    x = np.unique(np.concatenate([run[kind][0] for run in seeds]))
    if kind == "length":
        x = x[[all(n in run[kind][0] for run in seeds) for n in x]]
    else:
        x = x[x >= max(run[kind][0][0] for run in seeds)]    # interp repeats an ended run's last
    return x, np.median([np.interp(x, *run[kind]) for run in seeds], axis=0)


# ---- the words of a figure -----------------------------------------------------------------------

MARKS = {"model": "ticks: seeds, dots (at L), diamonds (lowest to 3L): medians, dotted: chance",
         **dict.fromkeys(("length", "training"), "thin: seeds, thick: their median"),
         **dict.fromkeys(("against", "state"), "small: seeds, large: their median")}


class View(NamedTuple):
    """What a figure shows of its runs."""
    kind: str         # length, training, against, state or model
    panels: list      # flags: a panel for each combination of their values
    curves: list      # flags: a curve for each combination
    x: str = ""       # "against": the flag of the x axis
    measure: str = "at"      # of the kinds against and state: "at" or "lowest"


def name_curves(runs, view):
    """Give each run of a figure its "curve": ((flag, value), ...).

    First the flags of view.curves, without those after the first that do not vary; then the flags
    in which any two runs that are equal there differ, unless at their default.
    """
    flags = [flag for flag in view.curves
             if flag == view.curves[0] or len(group(runs, [flag])) > 1]
    named = set()
    for same in group(runs, flags).values():
        changed = [set(run["changed"].items()) for run in same]
        named |= {flag for flag, _ in set.union(*changed) - set.intersection(*changed)}
    named -= {*view.panels, view.x}
    for run in runs:
        more = sorted(pair for pair in run["changed"].items() if pair[0] in named)
        run["curve"] = (*zip(flags, values(run, flags)), *more)


def name_of(curve):
    """(("model", "rope"), ("lr", 0.001)) -> "rope (lr = 0.001)"."""
    first, *more = [text(value) if flag == "model" else f"{flag} = {text(value)}"
                    for flag, value in curve]
    return f"{first} ({', '.join(more)})" if more else first


def settings_of(runs, view):
    """{(model, curve, other flags): seeds}: what a figure shows as one curve or point."""
    return group(runs, lambda run: (run["config"]["model"], run["curve"],
                                    values(run, [*TASK, *view.panels, view.x])))


def finding(runs, view):
    """A title: the models that do well in all settings that the figure shows, in some, in none."""
    verdicts, lengths = {}, {run["config"]["L"] for run in runs}
    L = f"{min(lengths)} tokens" if len(lengths) == 1 else "L"
    for (model, curve, _), seeds in settings_of(runs, view).items():
        name = name_of((("model", model), *curve[1:]))
        verdicts.setdefault(name, []).append(does_well(seeds, view))
    share = {name: np.mean(found) for name, found in verdicts.items() if None not in found}
    counts = {n: f" ({sum(verdicts[n])}\u00a0of\u00a0{len(verdicts[n])})" for n in share}
    alike = len({len(verdicts[name]) for name in share}) == 1         # as many settings for each
    well = [name + ("" if alike else counts[name]) for name in share if share[name] == 1]
    partly = [name + counts[name] for name in share if 0 < share[name] < 1]
    some, never = well + partly, [name for name in share if share[name] == 0]
    phrase = {"length": f"Above {KEPT} from {L} on", "model": f"Above {KEPT} from L to 3L",
              "training": f"Reached {SOLVED}"}.get(view.kind, f"{SOLVED} or more")
    if view.kind in ("against", "state"):
        phrase += f" at {L}" if view.measure == "at" else " from L to 3L"
    parts = [f"{phrase}: {listed(well or ['none'])}"] if share else []
    parts += [f"in part: {listed(partly)}"] if partly else []
    parts += [f"not: {listed(never)}"] if never and some and view.kind != "model" else []
    return "; ".join(parts)


def does_well(seeds, view):
    """Whether the seeds of a setting do well, in the median; None if they were not tested."""
    if view.kind == "training":
        return median_of(seeds, "steps") < np.inf
    if view.kind in ("against", "state"):
        return median_of(seeds, view.measure) >= SOLVED
    lowest, L = median_of(seeds, "lowest"), seeds[0]["config"]["L"]
    if view.kind == "length":                                # as far as the figure goes, not to 3L
        x, y = median_curve(seeds, "length")
        lowest = min(y[x >= L]) if L in x and x[-1] > L else np.nan
    return None if np.isnan(lowest) else lowest >= KEPT


def caption(runs, view):
    """The settings behind a figure, and what its marks mean: two lines."""
    changed, models = {}, group(runs, ["model"])             # (flag, value): models
    for run in runs:
        for pair in run["changed"].items():
            if pair not in run["curve"] and pair[0] not in (*view.panels, view.x):
                changed.setdefault(pair, set()).add(run["config"]["model"])
    settings = [f"{flag} = {text(', '.join(str(x) for x, in group(runs, [flag])))}"
                for flag in TASK[1:]]
    for (flag, value), whose in sorted(changed.items(), key=lambda item: sort_key(item[0])):
        some = f" ({listed(sorted(map(text, whose), key=sort_key))})"
        settings.append(f"{flag} = {text(value)}{some if len(whose) < len(models) else ''}")
    seeds = numbered(run["config"]["seed"] for run in runs)
    of_model = {model: numbered(run["config"]["seed"] for run in own)
                for (model,), own in models.items()}
    fewer = [f"{text(model)}: {found}" for model, found in of_model.items() if found != seeds]
    notes = [f"seeds: {seeds}" + (f" ({', '.join(fewer)})" if fewer else "")]
    if max(map(len, settings_of(runs, view).values())) > 1 or view.kind == "model":
        notes.append(MARKS[view.kind])
    if view.kind == "training":
        notes.append(f"numbers: median steps to {SOLVED}")
    else:
        tests = numbered(np.concatenate([run["sequences"] for run in runs]).tolist())
        notes.append(f"test sequences per length: {tests}")
    tasks = text(", ".join(task for task, in group(runs, ["task"])))
    return f"task {tasks}: {', '.join(settings)}", "; ".join(notes)


def file_name(runs, view, args):
    """The name of a figure: what it shows, or --name."""
    if args.name:
        return args.name.replace(os.sep, "-") + ("_training" if view.kind == "training" else "")
    parts = [f"against_{args.against}" if args.against else view.kind]
    parts += ["lowest"] if view.measure == "lowest" else []
    parts += [f"by_{'-'.join(view.panels)}"] if view.panels and view.panels != ["M"] else []
    for flag in TASK:
        found = [str(x) for x, in group(runs, [flag])]
        parts.append(flag + "-".join(found if len(found) < 6 else [found[0], "to", found[-1]]))
    return text("_".join(parts).replace("taskrecall_", "").replace(os.sep, "-"), 200)


def table(runs, lengths=None):
    """A Markdown table, a row for each setting.

    Without `lengths`, its columns are steps, accuracy at L and the lowest from L to 3L; with them,
    the median accuracy at each length at which all seeds were tested.
    """
    flags = ["model", "d", "M", "tau"]
    flags += [flag for flag in ("task", "K", "L") if len(group(runs, [flag])) > 1]
    varied = {pair for run in runs for pair in run["changed"].items()}
    flags += sorted({flag for flag, _ in varied if len(group(runs, [flag])) > 1})
    titles = [f"median steps to {SOLVED}", "at L: median", "at L: worst",
              "lowest to 3L: median", "lowest to 3L: worst"]
    header = [*flags, "seeds", *map(str, lengths or titles)]
    lines, order = [header, ["---"] * len(header)], ["task", "K", "L", "tau", "M", "model", "d"]
    for _, seeds in group(runs, order + flags).items():
        setting, (x, y) = values(seeds[0], flags), median_curve(seeds, "length")
        cells = [f"{y[x == length][0]:.3f}" if length in x else "" for length in lengths or ()]
        if not lengths:
            steps = median_of(seeds, "steps")
            cells = [f"{steps:,.0f}" if steps < np.inf else "never"]
            for what in ("at", "lowest"):
                cells += [f"{f([run[what] for run in seeds]):.3f}" for f in (np.median, np.min)]
        lines.append([f"`{text(setting[0])}`", *map(text, setting[1:]), str(len(seeds)),
                      *(cell.replace("nan", "") for cell in cells)])
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
