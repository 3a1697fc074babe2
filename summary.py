"""Results of train.py in numbers and words: read, put together by what they have in common, summarized.

plot.py draws what is here, and prints the tables (`python plot.py results/*.json --table`). Needs no torch.

A run is a dict made by `load`. The seeds of a setting are the runs that differ in nothing but the seed: a
flag in which runs differ, such as --lr, always tells them apart.
"""

import json
import os

import numpy as np

DEFAULTS = {  # of train.py, for files that lack a flag; any other flag was off before it came
    "task": "recall", "batch_size": 64, "steps": 20000, "n_heads": 1, "d_state": 16,
    "train_lengths": "fixed", "init": "official", "stop_early": True}
TASK = ["task", "tau", "K", "d", "L", "M"]                   # the flags that say what is learned
IGNORED = {"seed", "device", "compile", "out", "overwrite"}  # flags that do not change what is learned
MODELS = [  # in the order of figures and tables
    "nope", "learned", "rope", "mamba", "hybrid-a", "hybrid-b", "rnn", "lti", "retention", "griffin",
    "mamba2", "samba", "mamba2-hybrid", "jamba", "zamba", "zamba2", "zamba2-mini"]
TEST_BATCH = 512  # sequences of a test during training, as in train.py
SOLVED = 0.99     # the accuracy to which steps are counted
KEPT = 0.95       # a model that stays above it from L to 3L does not fade
TABLE = [f"steps to {SOLVED}", "at L, median", "at L, worst", "to 3L, median", "to 3L, worst"]


# ---- reading ----

def load(path):
    """Read a result of train.py -> a run, or a file of published numbers as it is. Raises ValueError.

    path, config       the file; its flags, with defaults for those that it lacks
    off                those of its flags that are off their defaults, without TASK and the model
    length, training   curves (x, accuracy), against context length and training step
    at, lowest         accuracy at length L, and the lowest from L to 3L; NaN where that was not tested
    steps              the first training step at which a test reached 0.99; infinite if none did
    state              {64: bytes, 4096: bytes} of the model's state after so many tokens, or None
    sequences          how many sequences stand behind the accuracy at a length, an array
    """
    try:
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        if "published" in result:
            curves = {name: points(curve, "length") for name, curve in result["curves"].items()}
            return {"published": text(result["published"]), "task": dict(result["task"]), "curves": curves}
        config = {flag: value if isinstance(value, (int, float)) else str(value)
                  for flag, value in {**DEFAULTS, **result["config"]}.items() if value is not None}
        numbers = [config[flag] for flag in ("seed", "tau", "K", "d", "L", "M")]
        if not all(type(n) is int and 0 <= n < 2**53 for n in numbers) or min(numbers[1:]) == 0:
            raise ValueError
        defaults = {**DEFAULTS, "lr": min(8e-3, 0.128 / config["d"])}       # of lr as in train.py
        config = {"lr": defaults["lr"], **config}
        off = {flag: value for flag, value in config.items()
               if (value or 0) != (defaults.get(flag) or 0) and flag not in {"model", *TASK} | IGNORED}

        L = config["L"]
        x, y = points(result["eval"], "length")
        step, test = points(result["train"], "step")
        tested = L in x and x[-1] >= 3 * L
        return {"path": path, "config": config, "off": off, "length": (x, y), "training": (step, test),
                "at": y[x == L][0] if L in x else np.nan,
                "lowest": y[(x >= L) & (x <= 3 * L)].min() if tested else np.nan,
                "steps": min(step[test >= SOLVED], default=np.inf),
                "state": state_bytes(config, result.get("state_bytes")),
                "sequences": np.ravel(result["eval"].get("sequences", 0)).astype(int)}
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        raise ValueError(f"{path} is no result of train.py") from None


def read(paths, complain):
    """Read files -> runs, published numbers. What is no result, or the same run again, is left out, and
    complain(sentence) says so."""
    runs, published = {}, []
    files = {}
    for path in paths:
        files.setdefault(os.path.realpath(path), path)
    for path in files.values():
        try:
            found = load(path)
        except ValueError as error:
            complain(f"{error}; left out")
            continue
        if "published" in found:
            published.append(found)
            continue
        key = values(found, ["model", *TASK, "seed"]), tuple(sorted(found["off"].items()))
        if key in runs:
            complain(f"{path} is left out: {runs[key]['path']} has the same model, settings and seed")
        runs.setdefault(key, found)
    return list(runs.values()), published


def points(section, x):
    """A curve of a result -> x, accuracy, both (n,). Raises ValueError if it is none."""
    x, y = np.array(section[x], float), np.array(section["accuracy"], float)
    if x.ndim != 1 or x.shape != y.shape or len(x) == 0:
        raise ValueError
    if not (0 < x[0] and x[-1] < np.inf and (np.diff(x) > 0).all() and ((0 <= y) & (y <= 1)).all()):
        raise ValueError
    return x, y


def state_bytes(config, written):
    """{tokens: bytes of state after them}, float32: as the file says, or computed for the six models.

    Attention keeps a key and a value of d numbers for each token. Mamba keeps, for each of its 2d channels,
    d_state numbers and the last 3 inputs of the convolution.
    """
    layers = {"nope": (0, 2), "learned": (0, 2), "rope": (0, 2), "mamba": (2, 0), "hybrid-a": (1, 1),
              "hybrid-b": (2, 1)}                            # how many of Mamba, how many of attention
    if written:
        return {n: int(written[str(n)]) for n in (64, 4096)}
    if config["model"] not in layers:
        return None
    mambas, attentions = layers[config["model"]]
    d, N = config["d"], config["d_state"]
    return {n: 4 * (mambas * 2 * d * (N + 3) + attentions * 2 * d * n) for n in (64, 4096)}


# ---- which runs belong together ----

def rank(value):
    """A sort key: numbers by size, models in the order of MODELS, everything else after them by name."""
    if isinstance(value, tuple):
        return tuple(rank(part) for part in value)
    if isinstance(value, (int, float)):
        return 0, value, ""
    return 1, MODELS.index(value) if value in MODELS else len(MODELS), str(value)


def values(run, flags):
    return tuple(run["config"].get(flag) for flag in flags)


def group(runs, fixed, panels, curve, across=()):
    """Put runs into figures -> a list of {(panel, curve, x): its seeds}, sorted.

    A figure, a panel and an x are the values of the flags in fixed, panels and across. A curve is (value of
    the flag `curve`, extra), where extra are (flag, value) of its other flags: those off the default in
    which it differs from runs with the same value.
    """
    figures, found = {}, []
    for run in runs:
        figures.setdefault(values(run, fixed), []).append(run)
    for key in sorted(figures, key=rank):
        cells = {}
        for run in figures[key]:
            base, extra = run["config"].get(curve), []
            same = [other for other in figures[key] if other["config"].get(curve) == base]
            for flag, value in sorted(run["off"].items()):
                others = figures[key] if flag == "d" else same               # see plot.py --against model
                differs = any(other["off"].get(flag) != value for other in others)
                if differs and flag not in (*panels, curve, *across):
                    extra.append((flag, value))
            cell = values(run, panels), (base, tuple(extra)), values(run, across)
            cells.setdefault(cell, []).append(run)
        found.append(dict(sorted(cells.items(), key=lambda item: rank(item[0]))))
    return found


def middle(runs, what):
    return np.median([run[what] for run in runs])


def median(runs, kind):
    """The median curve of some seeds -> x, y. kind: "length", at lengths that all were tested at, or
    "training", where a seed that has stopped keeps its last accuracy."""
    x = np.unique(np.concatenate([run[kind][0] for run in runs]))
    if kind == "length":
        x = x[[all(n in run[kind][0] for run in runs) for n in x]]
    else:
        x = x[x >= max(run[kind][0][0] for run in runs)]
    return x, np.median([np.interp(x, *run[kind]) for run in runs], axis=0)


# ---- words ----

def text(value, most=40):
    """A name or number as it may be shown: without control characters, shortened."""
    value = f"{value:g}" if isinstance(value, float) else str(value)
    value = "".join(c if c.isprintable() else "?" for c in value)
    return value if len(value) <= most else value[:most - 1] + "…"


def name_of(flag, curve):
    """What a curve of `group` is called."""
    base, extra = curve
    first = text(base) if flag == "model" else f"{flag} = {text(base)}"
    return ", ".join([first, *(f"{flag} = {text(value)}" for flag, value in extra)])


def finding(cells, flags, kind):
    """A figure's title: what the medians say of each model, and in which settings, if not in all of them.

    flags: what the values in a cell are, those of its panel, its curve and its x in this order. kind:
    "training" (who is first at 0.99, who never), "against" (who is at 0.99 at L), "length" (who fades as
    far as it was tested), or "model" (who stays from L to 3L everywhere).
    """
    settings = {cell: dict(zip(flags, (*cell[0], cell[1][0], *cell[2]))) for cell in cells}
    shown = [flag for flag in flags if len({setting[flag] for setting in settings.values()}) > 1]
    L = " or ".join(str(n) for n in sorted({runs[0]["config"]["L"] for runs in cells.values()})[:3])
    everywhere, found, lowest, fastest = {}, {}, 1.0, {}
    for cell, runs in cells.items():
        name = name_of("model", (runs[0]["config"]["model"], cell[1][1]))
        place = tuple((flag, text(settings[cell][flag])) for flag in shown if flag != "model")
        at, low, steps = middle(runs, "at"), middle(runs, "lowest"), middle(runs, "steps")
        if kind == "length":
            x, y = median(runs, "length")
            low = min(y[x >= runs[0]["config"]["L"]], default=np.nan)
        if kind == "training":
            verdict = "never" if steps == np.inf else "solved"
            fastest[place] = min(fastest.get(place, (np.inf, "")), (steps, name))
        elif np.isnan(at + low):
            continue                                         # not tested there
        elif kind == "against":
            verdict = "good" if at >= SOLVED else "bad"
        else:
            verdict = "stay" if low >= KEPT else "fade" if at >= KEPT else "miss"
            lowest = min(lowest, low) if verdict == "fade" else lowest
        everywhere.setdefault(name, []).append(place)
        found.setdefault(verdict, {}).setdefault(name, []).append(place)
    for place, (_, name) in fastest.items():
        if name:
            found.setdefault("first", {}).setdefault(name, []).append(place)
    if kind == "model":
        stay = [name for name, places in found.get("stay", {}).items() if places == everywhere[name]]
        return f"At {KEPT} or more from L to 3L in every panel: {listed(stay)}"

    parts = []
    for verdict, words in {
            "fade": f"Beyond {L} tokens {{}} fade{{}} (to {lowest:.2f})", "stay": "{} stay{}",
            "miss": f"below {KEPT} at {L} already: {{}}", "first": f"First to {SOLVED}: {{}}",
            "never": "never: {}", "good": f"At {SOLVED} or more after {L} tokens: {{}}",
            "bad": "below: {}"}.items():
        names = []
        for name, places in found.get(verdict, {}).items():
            some = "; ".join(", ".join(f"{flag} = {value}" for flag, value in place) for place in places)
            if len(places[0]) == 1:
                some = f"{places[0][0][0]} = {', '.join(place[0][1] for place in places)}"
            names.append(f"{name} ({some})" if places != everywhere[name] else name)
        if names:
            parts.append(words.format(listed(names), "s" if len(names) == 1 else ""))
    return "; ".join(parts)


def state_finding(cells):
    """The same for --against state: the smallest state with which the median of a model is at 0.99."""
    smallest = {}
    for (_, (_, extra), _), runs in cells.items():
        if middle(runs, "at") >= SOLVED:
            name = name_of("model", (runs[0]["config"]["model"], extra))
            state = runs[0]["state"][64] / 1024, runs[0]["state"][4096] / 1024
            smallest[name] = min(smallest.get(name, state), state)
    sizes = [f"{name} {short:.3g}" + (f" → {long:.3g} KiB" if long > short else " KiB")
             for name, (short, long) in smallest.items()]
    return f"State needed for {SOLVED}, after 64 → 4,096 tokens: {listed(sizes)}"


def caption(cells, flags, kind):
    """The settings behind all panels, and what a curve stands for. flags: those that the figure shows."""
    runs = [run for seeds in cells.values() for run in seeds]
    words = []
    for flag in TASK[1:]:
        words.append(f"{flag} = " + text(", ".join(map(str, sorted({run["config"][flag] for run in runs})))))
    named = {flag for _, (_, extra), _ in cells for flag, _ in extra}
    for flag in sorted({flag for run in runs for flag in run["off"]} - named - set(flags)):
        found = {(run["off"][flag], run["config"]["model"]) for run in runs if flag in run["off"]}
        words += [f"{flag} = {text(value)} ({text(model)})" for value, model in sorted(found, key=rank)]
    task = text(", ".join({run["config"]["task"] for run in runs}))
    first = f"{task.replace('recall', 'associative recall')}: {', '.join(words)}"

    seeds = {}
    for (_, (base, _), _), of_cell in cells.items():
        seeds.setdefault(text(base), set()).update(run["config"]["seed"] for run in of_cell)
    everyone = set().union(*seeds.values())
    words = [f"thin or small: seeds {numbered(everyone)}, thick or large: their median"]
    words += [f"{name} has seeds {numbered(found)} only" for name, found in seeds.items() if found != everyone]
    if kind == "training":
        batches = numbered({run["config"]["batch_size"] for run in runs})
        words.append(f"batches of {batches}, tests of {TEST_BATCH} sequences, numbers: median steps to {SOLVED}")
    else:
        tests = np.concatenate([run["sequences"] for run in runs])
        words.append(f"test sequences per length: {numbered(tests.tolist())}")
    if kind == "model":
        words.append("dots: at L, diamonds: the lowest from L to 3L, dotted: chance")
    return first + "\n" + "; ".join(words)


def listed(names):
    """Names in words, which do not break within a name."""
    names = [name.replace(" ", "\u00a0") for name in names] or ["none"]
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def numbered(numbers):
    """Whole numbers in words: all of them, or the first and the last if they are many."""
    numbers = sorted(set(numbers))
    many = len(numbers) > 3
    return f"{numbers[0]:,} to {numbers[-1]:,}" if many else ", ".join(f"{n:,}" for n in numbers)


# ---- tables ----

def table(runs, lengths=None, published=()):
    """A Markdown table with a row for each setting, as a string.

    Without lengths: median steps to 0.99, then median and worst accuracy at L and of the lowest from L to
    3L. With lengths: the median accuracy at each, empty unless all seeds were tested there; published
    numbers have rows of their own.
    """
    differing = [flag for flag in ("task", "K", "L") if len({run["config"][flag] for run in runs}) > 1]
    for flag in sorted({flag for run in runs for flag in run["off"]}):
        if len({run["off"].get(flag) for run in runs}) > 1:
            differing.append(flag)
    flags = ["model", "d", "M", "tau", *differing]
    order = ["task", "K", "L", "tau", "M", "model", "d", *differing]
    rows = {}
    for run in sorted(runs, key=lambda run: rank(values(run, order))):
        rows.setdefault(values(run, flags), []).append(run)

    lines = [[*flags, "seeds", *map(str, lengths or TABLE)]]
    for setting, seeds in rows.items():
        cells = []
        for length in lengths or ():
            x, y = median(seeds, "length")
            cells.append(f"{y[x == length][0]:.3f}" if length in x else "")
        if not lengths:
            steps, at, lowest = ([run[what] for run in seeds] for what in ("steps", "at", "lowest"))
            cells.append(f"{np.median(steps):,.0f}" if np.median(steps) < np.inf else "never")
            cells += [f"{f(v):.3f}".replace("nan", "") for v in (at, lowest) for f in (np.median, min)]
        lines.append([f"`{text(setting[0])}`", *map(text, setting[1:]), str(len(seeds)), *cells])
    for source in published if lengths else ():
        for name, (x, y) in source["curves"].items():
            setting = [text(source["task"].get(flag, "")) for flag in flags[1:]]
            cells = [f"{y[x == length][0]:.3f}" if length in x else "" for length in lengths]
            lines.append([f"`{text(name)}`, {source['published']}", *setting, "", *cells])
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


