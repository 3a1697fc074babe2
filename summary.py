"""The flags' defaults, and results of train.py: read from JSON, grouped by setting, put into words.

plot.py draws them. Only `chance` may import torch.
"""

import json
import os
from typing import NamedTuple

import numpy as np

from output import listed, numbered, sort_key, text

GRID = dict(model="rope", M=1, tau=1, K=16, d=8, L=64, seed=0)     # flags that take several values
DEFAULTS = dict(  # of the other flags that change a run; lr: see defaults_at
    task="recall", batch_size=64, steps=20000, lr=None, weight_decay=0.0, n_heads=1, d_state=16,
    train_lengths="fixed", learn_embedding=False, stop_early=True)
IGNORED = {"device", "compile", "out", "overwrite"}          # in no name of a run
TASK = ["task", "tau", "K", "d", "L", "M"]                   # the flags that say what is learned
SOLVED = 0.99                # a task is solved when three tests in a row reach this accuracy
KEPT = 0.95                  # a model that keeps at least this from L on does not fade


def defaults_at(d):      # with 8e-3 at width 32, rope failed M = 16 in 5 of 5 runs
    return {**DEFAULTS, "lr": min(8e-3, 0.128 / max(1, d))}


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
        if [flag for flag in GRID if isinstance(flags[flag], str)] != ["model"]:
            raise ValueError
        defaults = defaults_at(flags["d"])
        config, L = {**defaults, **flags}, flags["L"]
        changed = {flag: value for flag, value in config.items()
                   if flag not in {"task", *GRID, *IGNORED} and value != defaults.get(flag, False)}
        hash(tuple(config.values()))                         # a TypeError, if one is a list
        x, y = points(result["eval"], "length")
        step, test = points(result["train"], "step")
        sizes = result.get("state_bytes")
        lowest = min(y[(x >= L) & (x <= 3 * L)]) if L in x and x[-1] >= 3 * L else np.nan
        return {"path": path, "config": config, "changed": changed, "length": (x, y),
                "training": (step, test), "at": y[x == L][0] if L in x else np.nan,
                "lowest": lowest, "steps": min(step[test >= SOLVED], default=np.inf),
                "state": sizes and {n: sizes[str(n)] for n in (64, 4096)},
                "sequences": np.ravel(result["eval"]["sequences"])}
    except OSError as error:
        reason = "name the .json files in it" if os.path.isdir(path) else error.strerror
        raise ValueError(f"{path} cannot be read: {reason}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        hint = f"; its result would be {path[:-3]}.json" if path.endswith(".pt") else ""
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
        key = frozenset(pair for pair in found["config"].items() if pair[0] not in IGNORED)
        if key in runs and not os.path.samefile(path, runs[key]["path"]):
            left_out.append(f"{path} has the model, settings and seed of {runs[key]['path']}")
        runs.setdefault(key, found)
    return list(runs.values()), left_out


def values(run, flags):
    """The values of these flags in a run, None where a flag is missing."""
    return tuple(run["config"].get(flag) for flag in flags)


def group(runs, key):
    """Group runs by key(run), or by the values of a list of flags -> {key: its runs}, sorted."""
    found = {}
    for run in runs:
        found.setdefault(key(run) if callable(key) else values(run, key), []).append(run)
    return dict(sorted(found.items(), key=lambda item: sort_key(item[0])))


def different(runs, flag):
    """The values of a flag in these runs, each once, sorted; None for runs without it."""
    return sorted({run["config"].get(flag) for run in runs}, key=sort_key)


def by_curve(runs):
    """{curve: its runs}, sorted. The runs have their "curve" from name_curves."""
    return group(runs, lambda run: run["curve"])


def median_of(seeds, what):          # what: a number that each run has, "at" or "steps"
    return np.median([run[what] for run in seeds])


def chance(run):
    """The accuracy of a guess among the possible answers, about; 0 if their number is unknown."""
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
    else:                                        # np.interp holds the last value of an ended run
        x = x[x >= max(run[kind][0][0] for run in seeds)]
    return x, np.median([np.interp(x, *run[kind]) for run in seeds], axis=0)


# ---- the words of a figure -----------------------------------------------------------------------

MARKS = {"model": "ticks: seeds; medians: dots at L, diamonds for the lowest to 3L; dotted: chance",
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
    """Give each run its "curve": ((flag, value), ...), which says how it differs from the others.

    It has the first flag of view.curves, and the others that vary. If runs with different settings
    would still share a name, the flags in which they differ are added: a single one always, several
    where they are not at their default.
    """
    flags = [flag for flag in view.curves
             if flag == view.curves[0] or len(different(runs, flag)) > 1]
    groups = group(runs, flags).values()

    def differing(same):
        changed = [set(run["changed"].items()) for run in same]
        found = {flag for flag, _ in set.union(*changed) - set.intersection(*changed)}
        return found - {*view.panels, view.x}

    named = set().union(*map(differing, groups))
    for same in groups:
        single = differing(same) if len(differing(same)) == 1 else set()
        for run in same:
            shown = single | (named & set(run["changed"]))
            more = sorted(pair for pair in run["config"].items() if pair[0] in shown)
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
    """A title: the models that do well in all settings shown, in some and, mostly, in none."""
    verdicts, settings = {}, settings_of(runs, view)         # key: True or False per setting
    for (model, curve, _), seeds in settings.items():
        key = ("model", model), *curve[1:]                   # names can coincide, shortened
        verdicts.setdefault(key, []).append(does_well(seeds, view))
    verdicts = [(name_of(key), passed) for key, passed in verdicts.items() if None not in passed]
    if not verdicts:                                         # not tested: no claim
        return ""
    alike = len({len(passed) for _, passed in verdicts}) == 1      # as many settings for each
    def counted(name, passed):
        return f"{name}\u00a0({sum(passed)}\u00a0of\u00a0{len(passed)})"
    well = [name if alike else counted(name, passed) for name, passed in verdicts if all(passed)]
    partly = [counted(name, passed) for name, passed in verdicts if any(passed) and not all(passed)]
    never = [name for name, passed in verdicts if not any(passed)]
    lengths = different(runs, "L")
    L = f"{lengths[0]} tokens" if len(lengths) == 1 else "L"
    where = f"at {L}" if view.measure == "at" else "from L to 3L"
    phrase = {"length": f"At least {KEPT} from {L} on", "model": f"At least {KEPT} from L to 3L",
              "training": f"Reached {SOLVED}"}.get(view.kind, f"{SOLVED} or more {where}")
    if max(map(len, settings.values())) > 1:
        phrase = f"In the median, {phrase[0].lower()}{phrase[1:]}"
    title = f"{phrase}: {listed(well or ['none'])}"
    if partly:
        title += f"; in part: {listed(partly)}"
    if never and (well or partly) and view.kind != "model":
        title += f"; not: {listed(never)}"
    return title


def does_well(seeds, view):
    """Whether the seeds of a setting do well, in the median; None if they were not tested."""
    if view.kind == "training":
        return median_of(seeds, "steps") < np.inf
    if view.kind in ("against", "state"):
        return median_of(seeds, view.measure) >= SOLVED
    lowest = median_of(seeds, "lowest")                      # the median of each seed's lowest
    if view.kind == "length":            # the lowest of their median, as far as the figure goes
        L, (x, y) = seeds[0]["config"]["L"], median_curve(seeds, "length")
        lowest = min(y[x >= L]) if L in x and x[-1] > L else np.nan
    return None if np.isnan(lowest) else lowest >= KEPT


def caption(runs, view):
    """The settings behind a figure, and what its marks mean: two lines."""
    changed, models = {}, group(runs, ["model"])             # (flag, value): models
    for run in runs:
        for pair in run["changed"].items():
            if pair not in run["curve"] and pair[0] not in (*view.panels, view.x):
                changed.setdefault(pair, set()).add(run["config"]["model"])
    settings = [f"{flag} = {text(', '.join(map(str, different(runs, flag))))}"
                for flag in TASK[1:]]
    for (flag, value), whose in sorted(changed.items(), key=lambda item: sort_key(item[0])):
        some = f" ({listed(sorted(map(text, whose), key=sort_key))})"
        settings.append(f"{flag} = {text(value)}{some if len(whose) < len(models) else ''}")
    seeds = numbered(run["config"]["seed"] for run in runs)
    found = {(text(model), numbered(run["config"]["seed"] for run in own))
             for (model, *_), own in settings_of(runs, view).items()}
    other = [": ".join(pair) for pair in sorted(found, key=sort_key) if pair[1] != seeds]
    if "seed" in (view.x, *view.panels):                     # one in each place
        other = []
    elif len(found) > len(models):                           # a model has other seeds elsewhere
        other = ["not all of them in each setting"]
    notes = [f"seeds: {seeds}" + (f" ({', '.join(other)})" if other else "")]
    if max(map(len, settings_of(runs, view).values())) > 1 or view.kind == "model":
        notes.append(MARKS[view.kind])
    if view.kind == "training":
        notes.append(f"numbers: median steps to {SOLVED}")
    else:
        tests = numbered(np.concatenate([run["sequences"] for run in runs]).tolist())
        notes.append(f"test sequences per length: {tests}")
    tasks, settings = text(", ".join(different(runs, "task"))), ", ".join(settings)
    return f"task {tasks}: {settings}", "; ".join(notes)


def file_name(runs, view, args):
    """The name of a figure: what it shows, or --name."""
    if args.name:
        return args.name.replace(os.sep, "-") + ("_training" if view.kind == "training" else "")
    parts = [f"against_{args.against}" if args.against else view.kind]
    parts += ["lowest"] if view.measure == "lowest" else []
    parts += [f"by_{'-'.join(view.panels)}"] if view.panels and view.panels != ["M"] else []
    for flag in TASK:
        found = [str(value) for value in different(runs, flag)]
        parts.append(flag + "-".join(found if len(found) < 6 else [found[0], "to", found[-1]]))
    return text("_".join(parts).replace("taskrecall_", "").replace(os.sep, "-"), 200)


def table(runs, lengths=None):
    """A Markdown table, a row per setting, and a line of what all rows have in common. lengths: a
    column for each, the median accuracy where all seeds were tested, instead of steps and so on."""
    changed = sorted({flag for run in runs for flag in run["changed"]})
    settings, rows = ["model", "task", "d", "M", "tau", "K", "L", *changed], []
    for seeds in group(runs, ["task", "K", "L", "tau", "M", "model", "d", *changed]).values():
        row = dict(zip(settings, map(text, values(seeds[0], settings))), seeds=len(seeds))
        row["model"] = f"`{row['model']}`"
        if lengths:
            accuracy = dict(zip(*median_curve(seeds, "length")))
            row |= {n: f"{accuracy[n]:.3f}" if n in accuracy else "" for n in lengths}
        else:
            steps = median_of(seeds, "steps")
            row[f"median steps to {SOLVED}"] = f"{steps:,.0f}" if steps < np.inf else "never"
            for what, title in ("at", "at L"), ("lowest", "lowest to 3L"):
                for word, pick in ("median", np.median), ("worst", np.min):
                    accuracy = pick([run[what] for run in seeds])
                    row[f"{title}: {word}"] = "" if np.isnan(accuracy) else f"{accuracy:.3f}"
        rows.append(row)
    same = [name for name in (*settings[1:], "seeds") if len({row[name] for row in rows}) == 1]
    columns = [name for name in rows[0] if name not in same]
    cells = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    lines = [" | ".join(str(cell).replace("|", "/") for cell in line) for line in cells]
    common = ", ".join(f"{name} = {rows[0][name]}" for name in same)
    return "\n".join([f"| {line} |" for line in lines] + ["", f"All rows: {common}."])
