"""Results of train.py in numbers and words: read, grouped into the seeds of a setting, summarized.

plot.py draws what is here and prints the table. A run is a dict, see `load`. Needs no torch.
"""

import json
import os

import numpy as np

from output import listed, numbered, text

DEFAULTS = dict(  # of flags that change a run, except GRID in grid.py; lr: default_lr
    task="recall", batch_size=64, steps=20000, lr=None, weight_decay=0.0, n_heads=1, d_state=16,
    train_lengths="fixed", learn_embedding=False, stop_early=True)
TASK = ["task", "tau", "K", "d", "L", "M"]                   # the flags that say what is learned
IGNORED = {"model", "seed", "device", "compile", "out", "overwrite"}       # change no run
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
REACH = {"conv2+attention": 1, "conv+attention": 3, "conv8+attention": 7}   # tokens back: taps - 1
TEST_SEQUENCES = 512    # of a test during training
SOLVED = 0.99           # a task is solved when tests reach this accuracy
KEPT = 0.95             # a model that stays above it beyond L does not fade
REACHED = {"at": " at L = {}", "lowest": " from L to 3L"}                      # in titles


def default_lr(d):
    return min(8e-3, 0.128 / d)     # at d = 32, with 8e-3, rope failed M = 16 in 5 of 5 runs


def n_answers(config):
    """The number of possible answers; chance is about 1 over it."""
    K = config["K"]
    return {"mqar": K - K // 2, "copy": max(1, K - 2), "parity": 2}.get(config["task"], K)


def load(path):
    """Read a result of train.py -> a run; or published numbers. ValueError for other files.

    A run has "path", "config" with defaults for flags that the file lacks, "changed" (flags that
    are not at their defaults, without those of TASK), curves "length" and "training" (x, accuracy),
    "at" and "lowest" (accuracy at L, the lowest from L to 3L; NaN if not tested), "steps" (the
    first with a test at SOLVED, or infinite), "state" ({tokens: bytes} or None), "sequences".
    """
    try:
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        if "published" in result:
            curves = {name: points(curve, "length") for name, curve in result["curves"].items()}
            return {"published": text(result["published"]), "task": dict(result["task"]),
                    "curves": curves}
        defaults = {**DEFAULTS, "lr": default_lr(max(1, result["config"]["d"]))}
        config = {flag: value if isinstance(value, (int, float)) else str(value)
                  for flag, value in {**defaults, **result["config"]}.items() if value is not None}
        whole = all(type(config[flag]) is int and 0 < config[flag] < 2**53 for flag in TASK[1:])
        if not (whole and type(config["seed"]) is int and type(result["config"]["model"]) is str):
            raise ValueError
        changed = {flag: value for flag, value in config.items()
                   if flag not in IGNORED.union(TASK) and value != defaults.get(flag, False)}
        L = config["L"]
        x, y = points(result["eval"], "length")
        step, test = points(result["train"], "step")
        sizes = result.get("state_bytes")
        beyond = y[(x >= L) & (x <= 3 * L)] if L in x and x[-1] >= 3 * L else [np.nan]
        return {"path": path, "config": config, "changed": changed, "length": (x, y),
                "training": (step, test), "at": y[x == L][0] if L in x else np.nan,
                "lowest": min(beyond), "steps": min(step[test >= SOLVED], default=np.inf),
                "state": sizes and {n: int(sizes[str(n)]) for n in (64, 4096)},
                "sequences": np.ravel(result["eval"].get("sequences", 0)).astype(int)}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        hint = f"; its result is {path[:-3]}.json" if path.endswith(".pt") else ""
        raise ValueError(f"{path} is no result of train.py{hint}") from None


def points(section, x):
    """A curve of a result -> x, accuracy, both (n,). Raises ValueError if it is not one."""
    x, y = np.array(section[x], float), np.array(section["accuracy"], float)
    rising = x.ndim == 1 and len(x) > 0 and np.all(np.diff(x) > 0) and 0 < x[0] and x[-1] < np.inf
    if not (rising and x.shape == y.shape and np.all((0 <= y) & (y <= 1))):
        raise ValueError
    return x, y


def read(paths):
    """Read files -> runs, published numbers, and a sentence for each file that is left out."""
    runs, published, left_out = {}, [], []
    for path in dict.fromkeys(paths):
        try:
            found = load(path)
        except ValueError as error:
            left_out.append(str(error))
            continue
        if "published" in found:
            published.append(found)
            continue
        key = values(found, ["model", *TASK, "seed"]), tuple(sorted(found["changed"].items()))
        if key in runs and not os.path.samefile(path, runs[key]["path"]):
            left_out.append(f"{path} has the model, settings and seed of {runs[key]['path']}")
        runs.setdefault(key, found)
    return list(runs.values()), published, left_out


def sort_key(value):
    """A sort key: numbers by size, models as in ORDER, everything else by name."""
    if isinstance(value, tuple):
        return tuple(sort_key(part) for part in value)
    if isinstance(value, (int, float)):
        return 0, value, ""
    return 1, ORDER.index(value) if value in ORDER else len(ORDER), str(value)


def values(run, flags):
    """The values of these flags in a run, None for those that it lacks."""
    return tuple(run["config"].get(flag) for flag in flags)


def group(runs, fixed, panels, curve, across=()):
    """Put runs into figures -> a list of {(panel, curve, x): its seeds}, sorted.

    A figure, a panel and an x are the values of the flags in fixed, panels and across. A curve is
    (value of `curve`, extra): extra has (flag, value) of the other flags that tell curves apart.
    """
    figures, found = {}, []
    for run in runs:
        figures.setdefault(values(run, fixed), []).append(run)
    for key in sorted(figures, key=sort_key):
        cells, seen = {}, {}
        for flag in {flag for run in figures[key] for flag in run["changed"]}:
            for run in figures[key]:
                base = None if flag == "d" else run["config"].get(curve)     # d: of all curves
                seen.setdefault((flag, base), set()).add(run["changed"].get(flag))
        named = {flag for (flag, _), different in seen.items() if len(different) > 1}
        for run in figures[key]:
            base, told = run["config"].get(curve), named & set(run["changed"])
            if len(named) == 1 and len(seen.get((*named, base), ())) > 1:    # name its default, too
                told |= named - {"train_lengths"}
            extra = tuple((flag, run["config"][flag]) for flag in sorted(told)
                          if flag not in (*panels, curve, *across))
            cell = values(run, panels), (base, extra), values(run, across)
            cells.setdefault(cell, []).append(run)
        found.append(dict(sorted(cells.items(), key=lambda item: sort_key(item[0]))))
    return found


def middle(runs, what):
    return np.median([run[what] for run in runs])


def median(runs, kind):
    """The median curve of seeds -> x, y. Of "length": at lengths at which all were tested."""
    x = np.unique(np.concatenate([run[kind][0] for run in runs]))
    if kind == "length":
        x = x[[all(n in run[kind][0] for run in runs) for n in x]]
    else:
        x = x[x >= max(run[kind][0][0] for run in runs)]     # interp repeats an ended run's last
    return x, np.median([np.interp(x, *run[kind]) for run in runs], axis=0)


def name_of(flag, curve):
    """The label of a curve of `group`."""
    base, extra = curve
    first = text(base) if flag == "model" else f"{flag} = {text(base)}"
    return ", ".join([first, *(f"{flag} = {text(value)}" for flag, value in extra)])


def verdict(runs, kind, what="at"):
    """The verdict on some seeds' median: a key of the phrases in `finding`, or None: not tested."""
    x, y = median(runs, "length")
    at, lowest = middle(runs, "at"), middle(runs, "lowest")
    if kind == "length":                                     # as far as the figure goes, not to 3L
        lowest = min(y[x > runs[0]["config"]["L"]], default=np.nan)
    if kind == "training":
        return "good" if middle(runs, "steps") < np.inf else "bad"
    if kind in ("against", "state"):
        return "good" if middle(runs, what) >= SOLVED else "bad"
    if np.isnan(at + lowest):
        return None
    if at < KEPT:
        return "miss"
    return "stay" if lowest >= KEPT else "fade"


def finding(cells, flags, kind, what="at"):
    """A figure's title: the verdict on each model. flags: of a cell's panel, curve and x."""
    rows = [(*panel, base, *x) for panel, (base, _), x in cells]
    shown = [i for i, flag in enumerate(flags)
             if flag != "model" and len({row[i] for row in rows}) > 1]
    everywhere, found = {}, {}
    for row, ((_, (_, extra), _), runs) in zip(rows, cells.items()):
        name = name_of("model", (runs[0]["config"]["model"], extra)).replace(", ", " with ", 1)
        place = [f"{flags[i]} = {text(row[i])}" for i in shown]
        everywhere.setdefault(name, []).append(place)
        found.setdefault(verdict(runs, kind, what), {}).setdefault(name, []).append(place)
    parts = []
    L = numbered(runs[0]["config"]["L"] for runs in cells.values())
    after = "" if kind == "training" else REACHED[what].format(L)
    panels = len({panel for panel, _, _ in cells})
    stay = f"above {KEPT} " + ("from L to 3L" if kind == "model" else f"beyond {L} tokens")
    stay += " in every panel" if kind == "model" and panels > 1 else ""
    for key, phrase in {
            "stay": f"{{}} stay{{}} {stay}", "fade": f"{{}} fade{{}} beyond {L}",
            "miss": f"below {KEPT} at {L} already: {{}}",
            "good": f"reached {SOLVED}{after}: {{}}", "bad": f"below {SOLVED}: {{}}"}.items():
        names = []
        for name, places in found.get(key, {}).items():
            some = "; ".join(", ".join(place) for place in places)
            if len(shown) == 1:                              # M = 4; M = 8 -> M = 4, 8
                some = some.replace(f"; {flags[shown[0]]} =", ",")
            if len(places) == panels or kind != "model":     # rows: who stays in all panels
                names.append(name if places == everywhere[name] else f"{name} ({some})")
        if not parts and not phrase.startswith("{}"):
            phrase = phrase[0].upper() + phrase[1:]
        if names and (kind != "model" or key == "stay"):
            parts.append(phrase.format(listed(names), "s" if len(names) == 1 else ""))
    return "; ".join(parts) if parts or kind != "model" or None in found else f"none stays {stay}"


def caption(cells, flags, kind):
    """The settings behind all panels, and what the marks mean. flags: those the figure shows."""
    runs = [run for seeds in cells.values() for run in seeds]
    config = {flag: sorted({run["config"][flag] for run in runs}, key=sort_key)
              for flag in (*TASK, "batch_size")}
    words = [f"{flag} = {text(', '.join(map(str, config[flag])))}" for flag in TASK[1:]]
    shown = {flag for _, (_, extra), _ in cells for flag, _ in extra} | {*flags, "d"}
    alike = set.intersection(*(set(run["changed"].items()) for run in runs))
    notes = {(*note, "" if note in alike else f" ({text(run['config']['model'])})")
             for run in runs for note in run["changed"].items()}
    words += [f"{flag} = {text(value)}{whose}" for flag, value, whose in sorted(notes, key=sort_key)
              if flag not in shown]
    seeds = {}
    for run in runs:
        seeds.setdefault(run["config"]["model"], set()).add(run["config"]["seed"])
    everyone = set().union(*seeds.values())
    small = "ticks" if kind == "model" else "thin or small"
    several = f"{small}: seeds {numbered(everyone)}, thick or large: their median"
    marks = [several if max(map(len, cells.values())) > 1 else f"seed {numbered(everyone)}"]
    marks += [f"{text(model)} has seeds {numbered(found)} only" for model, found in seeds.items()
              if found != everyone]
    tests = numbered(np.concatenate([run["sequences"] for run in runs]).tolist())
    marks.append(f"test sequences per length: {tests}")
    if kind == "training":
        B = text(", ".join(map(str, config["batch_size"])))
        marks[-1] = f"batch size {B}, tests of {TEST_SEQUENCES}, numbers: median steps to {SOLVED}"
    if kind == "model":
        marks.append("dots: at L, diamonds: the lowest from L to 3L, dotted: chance")
    return f"task {text(', '.join(config['task']))}: {', '.join(words)}\n{'; '.join(marks)}"


def file_name(kind, cells, args):
    """The name of a figure: what it shows, or --name."""
    if args.name:
        return args.name.replace(os.sep, "-") + ("_training" if kind == "training" else "") + ".png"
    parts = [f"against_{args.against}" if args.against else kind]
    parts += ["lowest"] if args.what == "lowest" else []
    parts += [f"by_{'-'.join(args.panels)}"] if args.panels != ["M"] else []
    for flag in TASK:
        found = sorted({run["config"][flag] for runs in cells.values() for run in runs})
        found = found if len(found) < 6 else [found[0], "to", found[-1]]
        parts.append(flag + "-".join(map(str, found)))
    return text("_".join(parts).replace("taskrecall_", "").replace(os.sep, "-"), 200) + ".png"


def table(runs, lengths=None):
    """A Markdown table, a row for each setting; or medians at `lengths` where all were tested."""
    flags = ["model", "d", "M", "tau"]
    flags += [flag for flag in ("task", "K", "L") if len({run["config"][flag] for run in runs}) > 1]
    flags += [flag for flag in sorted({flag for run in runs for flag in run["changed"]})
              if len({run["changed"].get(flag) for run in runs}) > 1]
    rows, order = {}, ["task", "K", "L", "tau", "M", "model", "d", *flags]
    for run in sorted(runs, key=lambda run: sort_key(values(run, order))):
        rows.setdefault(values(run, flags), []).append(run)
    titles = [f"steps to {SOLVED}", "at L, median", "at L, worst", "to 3L, median", "to 3L, worst"]
    header = [*flags, "seeds", *map(str, lengths or titles)]
    lines = [header, ["---"] * len(header)]
    for setting, seeds in rows.items():
        x, y = median(seeds, "length")
        cells = [f"{y[x == length][0]:.3f}" if length in x else "" for length in lengths or ()]
        if not lengths:
            steps = middle(seeds, "steps")
            cells = [f"{steps:,.0f}" if steps < np.inf else "never"]
            for what in ("at", "lowest"):
                cells += [f"{f([run[what] for run in seeds]):.3f}" for f in (np.median, np.min)]
        lines.append([f"`{text(setting[0])}`", *map(text, setting[1:]), str(len(seeds)),
                      *(cell.replace("nan", "") for cell in cells)])
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
