"""What a longer context costs, drawn from the JSON that bench.py writes.

Imports look; plot.py draws with it.
"""

import json

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from look import order, spread, style

COSTS = {  # what bench.py measures at each length: the title of its panel
    "train_us": "training: μs a token", "read_us": "reading: μs a token", "token_ms": "one token more: ms",
    "state_bytes": "state: bytes", "train_megabytes": "training: memory, MB", "read_megabytes": "reading: memory, MB"}


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
    fig.suptitle(f"What a longer context costs: d = 64, one sequence\n{where}, torch {env['torch']}", fontsize=12)
    return fig
