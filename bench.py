"""Speed on this machine: a training step, the scans, and what a longer context costs.

    python bench.py                             a training step of the six models, then the scans
    python bench.py --tables step --model jamba mamba2+mlp        other models
    python bench.py --tables scan ssd --dtype bfloat16            of Mamba (scan), of Mamba-2 (ssd)
    python bench.py --tables length --out length.json             what a longer context costs
    python bench.py --draw length.json                            its figure, length.png

Other implementations, if installed, are timed in the same run: mambapy's scan and, on CUDA,
mamba_ssm's kernels. Times are medians; on CUDA, of replays of a CUDA graph, except for prefill.
"""

import gc
import itertools
import json
import os
import signal
import statistics
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C prints no traceback, even in imports

import matplotlib.figure
import torch

import gpu
import mamba
import runs
from data import recall_batch
from eval import SEGMENT
from family.deltanet import delta_rule, unit
from family.mamba2 import ssd
from hybrid import MODELS, state_bytes
from output import COLOURS, RC_PARAMS, Parser, write_figure
from summary import DEFAULTS, GRID
from train import make_optimizer, make_training_step

SCAN_SHAPES = {  # (b, L, D, N)
    "cpu": [(64, 64, 16, 16), (64, 64, 128, 16), (8, 1024, 128, 16)],
    "cuda": [(64, 64, 16, 16), (64, 64, 128, 16), (64, 256, 128, 16), (8, 2048, 1536, 16)]}
SSD_SHAPES = {  # (b, L, H, P, N)
    "cpu": [(64, 64, 1, 16, 16), (64, 64, 2, 64, 16), (8, 1024, 2, 64, 16)],
    "cuda": [(64, 64, 1, 16, 16), (64, 256, 2, 64, 16), (8, 2048, 24, 64, 128)]}
LENGTHS = {"cpu": [2**10, 2**12, 2**14, 2**16], "cuda": [2**10, 2**12, 2**14, 2**16, 2**18, 2**20]}
LONG = {"cpu": 2**14, "cuda": 2**16}     # beyond it mamba alone: attention takes too long
COSTS = {"train us/token": "training, μs per token", "prefill us/token": "prefill, μs per token",
         "decode ms": "decode step, ms", "state bytes": "state, bytes"}


def captured(call, device):
    """The call itself; on CUDA, the replay of a CUDA graph of it."""
    if device.type != "cuda":
        return call
    seconds(call, device, times=gpu.WARMUP_CALLS)            # the first calls may compile
    return gpu.capture(call)


def seconds(call, device, times=1):
    """The seconds that this many calls take."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    start = time.perf_counter()
    for _ in range(times):
        call()
    sync()
    return time.perf_counter() - start


def timed(call, device, repeats=9, in_a_row=10):
    """Milliseconds per call, the median of the repeats after a first call."""
    call()                                                   # a graph's first replay loads it
    took = statistics.median(seconds(call, device, in_a_row) for _ in range(repeats))
    return 1e3 * took / in_a_row


def peak_megabytes(call):
    """Peak CUDA memory of a call, beyond what was allocated before, such as its inputs."""
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def table(title, rows):
    """Print each row, a dict, as soon as it is measured; returns the list of rows."""
    print(f"\n{title}")
    found = []
    for row in rows:
        cells = [f"{v:.3f}" if isinstance(v, float) else str(v) for v in row.values()]
        for line in [cells] if found else [list(row), cells]:
            print(f"{line[0]:<20}" + "".join(f"{cell:>15}" for cell in line[1:]), flush=True)
        found.append(row)
    return found


# ---- the scans -----------------------------------------------------------------------------------

def mambapy_scan(x, dt, A, B, C):
    """mambapy's parallel scan. It takes decays and inputs and returns states, (b, L, D, N) each."""
    from mambapy.pscan import pscan
    h = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None])
    return (h @ C[..., None])[..., 0]


def official_scan(x, dt, A, B, C):          # takes (b, D, L)
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return selective_scan_fn(x.mT, dt.mT, A, B.mT, C.mT).mT


def official_ssd(x, dt, A, B, C):           # in Triton
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)


def scan_rows(device, args):
    """Mamba's scan, at each shape by each implementation."""
    forms = {"ours": lambda *v: mamba.selective_scan(*v)[0], "mambapy": mambapy_scan,
             "mamba_ssm": official_scan}
    for b, L, D, N in SCAN_SHAPES[device.type]:
        x, dt = torch.randn(b, L, D, device=device), torch.rand(b, L, D, device=device)
        A = -N * torch.rand(D, N, device=device)
        B, C = torch.randn(2, b, L, N, device=device)
        yield from time_forms("b, L, D, N", (b, L, D, N), forms, (x, dt, A, B, C), args.dtype)


def ssd_rows(device, args):
    """Mamba-2's scan, with one B and C for all heads and with one for each, and the delta rule."""
    per_head = {"ours": lambda *v: ssd(*v)[0],
                "delta rule": lambda x, dt, A, B, C: delta_rule(C, B, x, dt, dt * A)[0]}
    if device.type == "cuda":
        options = {"post_grad_fusion_options": {}}           # not gpu.py's, which are set globally
        per_head = {name: gpu.compile_each_shape(form, options) for name, form in per_head.items()}
    for_all_heads = {"ours": per_head["ours"]}
    if device.type == "cuda":
        for_all_heads["mamba_ssm"] = official_ssd
        torch.set_float32_matmul_precision("high")           # TF32, which mamba_ssm always uses
    for b, L, H, P, N in SSD_SHAPES[device.type]:
        x, dt = torch.randn(b, L, H, P, device=device), torch.rand(b, L, H, device=device)
        A = -torch.rand(H, device=device)
        for G, forms in ((1, for_all_heads), (H, per_head)):
            B, C = unit(torch.randn(2, b, L, G, N, device=device))
            yield from time_forms("b, L, H, P, G, N", (b, L, H, P, G, N), forms,
                                  (x, dt, A, B, C), args.dtype)
    torch.set_float32_matmul_precision("highest")


def time_forms(title, shape, forms, inputs, dtype):
    """A row for each form, scan(x, dt, A, B, C) -> y, forward and backward; the first is ours."""
    device, ours = inputs[0].device, None
    for name, scan in list(forms.items()):
        x, dt, A, B, C = inputs
        if scan is official_scan:
            # Its own layout, (b, D, L) in memory: otherwise its time would include a copy.
            x, dt, B, C = (v.mT.contiguous().mT for v in (x, dt, B, C))
        x, dt, B, C = (v.to(getattr(torch, dtype)) for v in (x, dt, B, C))
        operands = [v.detach().requires_grad_() for v in (x, dt, A, B, C)]
        dy = torch.randn_like(x)
        def call():
            return torch.autograd.grad(scan(*operands), operands, dy)
        try:
            first = seconds(call, device)
        except (ImportError, RuntimeError) as error:         # mamba_ssm may lack its kernels
            if name in ("ours", "delta rule"):
                raise
            print(f"(without {name}: {error})")
            del forms[name]                                  # said once, not at every shape
            continue
        ten_calls = captured(lambda: [call() for _ in range(10)], device)
        ms = timed(ten_calls, device, in_a_row=1) / 10
        ours = ours or ms
        yield {title: " ".join(map(str, shape)), "form": name, "ms": ms, "of ours": ms / ours,
               "first s": first, **({"MB": peak_megabytes(call)} if device.type == "cuda" else {})}


# ---- a training step, and the cost of a longer context -------------------------------------------

def model_and_step(config, device):
    """A new model, and its training step as a call without arguments."""
    model, draws = runs.model_from(config).to(device), torch.Generator(device)
    step = make_training_step(model, make_optimizer(model, config, device), config, draws)
    return model, gpu.Captured("training step", *step, draws, config)


def config_for(name, **changes):
    return {**DEFAULTS, **GRID, "model": name, "lr": 1e-3, "compile": "off", **changes}


def step_rows(device, args):
    """A training step of each model: not compiled and, on CUDA, compiled."""
    modes = ["off", "on"] if device.type == "cuda" and gpu.has_compiler() else ["off"]
    for name, mode in itertools.product(args.model, modes):
        model, step = model_and_step(config_for(name, d=args.d, compile=mode), device)
        first = seconds(step, device, times=gpu.FIRST_CALLS)
        yield {"model": name, "compiled": mode, "ms": timed(step, device), "first s": first,
               "params": model.n_params(), "state 64": state_bytes(model, 64),
               "state 4096": state_bytes(model, 4096)}


def prefill(model, tokens):
    """The states of a model after tokens (1, L)."""
    states = None
    for segment in tokens.split(SEGMENT, dim=1):
        _, states = model.run_layers(segment, states)
    return states


def length_rows(device, args):
    """The costs of each model at each length L, which counts the query, too."""
    for name, L in itertools.product(args.model, LENGTHS[device.type]):
        if L > LONG[device.type] and name != "mamba":
            continue
        model, step = model_and_step(config_for(name, d=64, L=L - 1, batch_size=1), device)
        tokens = recall_batch(1, L - 1, device=device)[0]                             # (1, L)
        seconds(step, device, times=gpu.FIRST_CALLS)         # on CUDA, captures the step
        repeats = 3 if L <= LONG[device.type] else 1
        train_ms = timed(step, device, repeats, in_a_row=1)
        with torch.no_grad():
            prefill_ms = timed(lambda: prefill(model, tokens), device, repeats, in_a_row=1)
            states, last = prefill(model, tokens), tokens[:, -1:]
            decode = captured(lambda: model.head(model.run_layers(last, states)[0]), device)
            decode_ms = timed(decode, device)
        yield {"model": name, "length": L, "train us/token": 1e3 * train_ms / L,
               "prefill us/token": 1e3 * prefill_ms / L, "decode ms": decode_ms,
               "state bytes": state_bytes(model, L)}
        del step, decode                                 # frees their graphs before the next length


@matplotlib.rc_context({**RC_PARAMS, "axes.formatter.min_exponent": 3})      # 0.1, not 10^-1
def draw_lengths(path, out):
    """Draw the table "length" of a file that --out wrote."""
    try:
        with open(path) as f:
            result = json.load(f)
        machine, curves = result["env"]["device"], {cost: {} for cost in COSTS}
        for row, cost in itertools.product(result["length"] or [{}], COSTS):     # {} lacks keys
            curves[cost].setdefault(row["model"], []).append((row["length"], row[cost]))
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--draw is {path!r}, but that is no file of --tables length") from None
    fig = matplotlib.figure.Figure(figsize=(10, 7), layout="constrained")
    for ax, (cost, title) in zip(fig.subplots(2, 2, sharex=True).flat, COSTS.items()):
        for name, points in curves[cost].items():
            width = 3.5 - 2 * len(ax.lines) / len(curves[cost])      # later curves are thinner
            ax.semilogx(*zip(*points), "o-", base=2, color=COLOURS.get(name, "black"), label=name,
                        lw=width, ms=3 * width)
        ax.set(title=title, yscale="log")
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    fig.supxlabel(f"context length, tokens (a single sequence, d = 64, {machine})")
    fig.suptitle("Attention's state grows with the context, Mamba's does not")
    write_figure(out, fig)
    print(out)


TABLES = {  # name: title, rows. The step comes first: torch reads some options of gpu.py only once
    "step": ("A training step, K 16, L 64, batch 64; first s: 5 steps; state: bytes", step_rows),
    "scan": ("Mamba's scan, forward and backward; first s: one call", scan_rows),
    "ssd": ("Mamba-2's scan, and the delta rule with the same operands", ssd_rows),
    "length": ("A longer context: d 64, one sequence", length_rows)}


def main(argv=None):
    """Print the tables of --tables -> {"env": ..., table: its rows}. None with --draw."""
    parser = Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=list(TABLES)[:3], help="default: not length")
    add("--model", nargs="+", default=list(MODELS), metavar="NAME", help="default: the six models")
    add("--d", type=int, default=8, metavar="N", help="width in the table step (default: 8)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the scans' inputs")
    add("--device", help="cuda, cuda:1 or cpu (default: the best one here)")
    add("--out", metavar="FILE", help="write the numbers too; with --draw, the figure")
    add("--draw", metavar="FILE.json", help="only draw the table length of this file")
    args = parser.parse_args(argv)
    try:
        if args.draw:
            return draw_lengths(args.draw, args.out or os.path.splitext(args.draw)[0] + ".png")
        device = gpu.pick_device(args.device or (None if torch.cuda.is_available() else "cpu"))
        if device.type not in LENGTHS:
            raise ValueError(f"--device is {args.device!r}, but bench.py times cuda and cpu")
        for name in args.model:
            runs.check(config_for(name, d=args.d))
        os.makedirs(os.path.dirname(args.out or "") or ".", exist_ok=True)
        open(args.out or os.devnull, "a").close()            # a wrong path fails before measuring
    except OSError as error:
        parser.error(f"--out: {error.filename2 or error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    result = {"env": {**runs.environment(device), "date": time.strftime("%Y-%m-%d")}}
    print(", ".join(f"{key} {value}" for key, value in result["env"].items()))
    for name, (title, rows) in TABLES.items():
        if name in args.tables:
            result[name] = table(title, rows(device, args))
    if args.out:
        runs.write_json(args.out, result)
    return result


if __name__ == "__main__":
    main()
