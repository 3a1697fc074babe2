"""How fast it is on this machine: a training step, the scan, and what a longer context costs.

    python bench.py                             a training step of the six models, and the scan
    python bench.py --tables step --model jamba mamba2+mlp        other models
    python bench.py --tables scan --dtype bfloat16                the scan in half precision
    python bench.py --tables length --out length.json             what a longer context costs
    python bench.py --draw length.json                            its figure, length.png

Peers are timed beside ours, in the same run, where they can be imported: mambapy's parallel scan,
and on CUDA the kernels of mamba_ssm for Mamba and Mamba-2. On CUDA every time is that of a CUDA
graph, so the time to launch kernels is left out, as it is in training. Times are medians; memory is
the most that is held during a call, beyond what the program held before, and is counted on CUDA
only.
"""

import argparse
import gc
import json
import math
import os
import statistics
import time

import torch
import torch.nn.functional as F

import gpu
import mamba
import runs
from data import recall, recall_batch
from eval import SEGMENT
from family.mamba2 import ssd
from hybrid import MODELS, state_bytes
from train import make_optimizer, set_learning_rate

SHAPES = {  # (b, L, D, N)
    "cpu": [(64, 64, 16, 16), (64, 64, 128, 16), (8, 1024, 128, 16)],
    "cuda": [(64, 64, 16, 16), (64, 64, 128, 16), (64, 256, 128, 16), (8, 2048, 1536, 16)]}
LENGTHS = {"cpu": [2**10, 2**12, 2**14], "cuda": [2**10, 2**12, 2**14, 2**16, 2**18, 2**20]}
LONGEST = {"mamba": 2**20}   # others stop at 2^16, where a training step of attention takes seconds
COSTS = {"train us/token": "training, μs per token", "prefill us/token": "prefill, μs per token",
         "decode ms": "decode step, ms", "state bytes": "state, bytes"}


# ---- measuring -----------------------------------------------------------------------------------

def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def captured(call, device):
    """A call, on CUDA as a graph. Three calls come before it: they may compile."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()                                           # the first replay loads the graph
    return graph.replay


def timed(call, device, repeats=9, in_a_row=10):
    """Milliseconds of call(): median, lowest, highest of the repeats."""
    took = []
    for _ in range(repeats):
        sync(device)
        start = time.perf_counter()
        for _ in range(in_a_row):
            call()
        sync(device)
        took.append(1e3 * (time.perf_counter() - start) / in_a_row)
    return statistics.median(took), min(took), max(took)


def peak_megabytes(call, inputs, device):
    """The most memory held during call(), its inputs included; None on a CPU."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() - sum(v.nbytes for v in inputs)
    call()
    sync(device)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def first_call(call, device):
    """Seconds of the first call, which may compile."""
    start = time.perf_counter()
    call()
    sync(device)
    return time.perf_counter() - start


def table(title, rows):
    """Print rows, dicts with the same keys, as they come; returns them as a list."""
    print(f"\n{title}")
    found = []
    for row in rows:
        words = []
        for key, value in row.items():
            text = "-" if value is None else str(value)
            if isinstance(value, float):
                text = f"{value:.3f}" if value < 100 else f"{value:.0f}"
            words.append((f"{key:>{max(8, len(key))}}", f"{text:>{max(8, len(key))}}"))
        if not found:
            print("  ".join(key for key, _ in words))
        print("  ".join(text for _, text in words), flush=True)
        found.append(row)
    return found


# ---- the scan ------------------------------------------------------------------------------------

def mambapy_scan(x, dt, A, B, C):
    """mambapy's parallel scan, with what it leaves to its caller: it scans a and b (b, L, D, N)."""
    from mambapy.pscan import pscan
    h = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None])      # (b, L, D, N)
    return (h @ C[..., None])[..., 0]


def official_scan(x, dt, A, B, C):
    """The CUDA kernel of mamba_ssm, which takes (b, D, L)."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return selective_scan_fn(x.mT, dt.mT, A, B.mT, C.mT).mT


def official_ssd(x, dt, A, B, C):
    """The Triton kernels of mamba_ssm for Mamba-2."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined
    return mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size=256)


def y_of(scan):
    return lambda *inputs: scan(*inputs)[0]


def forms(device):
    """The scans to time: name -> scan(x, dt, A, B, C) -> y."""
    ours = {"ours": y_of(mamba.selective_scan), "mambapy": mambapy_scan}
    if device.type == "cpu":
        return {**ours, "ours 2": y_of(ssd)}
    return {**ours, "mamba_ssm": official_scan, "mamba_ssm 2": official_ssd,
            "ours 2": gpu.compile_each_shape(y_of(ssd), {})}


def operands(device, name, shape, dtype):
    """x, dt (b, L, D), A (D, N), B, C (b, L, N); for Mamba-2 ("2") in heads of 64 channels."""
    b, L, D, N = shape
    x, dt = torch.randn(b, L, D, device=device), torch.rand(b, L, D, device=device)
    A, B, C = -N * torch.rand(D, N, device=device), *torch.randn(2, b, L, N, device=device)
    if name.endswith("2"):
        P = math.gcd(D, 64)
        x, dt, A = x.unflatten(-1, (-1, P)), dt[..., ::P].contiguous(), A[::P, 0].contiguous()
        B, C = B[:, :, None], C[:, :, None]
    elif name == "mamba_ssm":
        x, dt, B, C = (v.mT.contiguous().mT for v in (x, dt, B, C))      # its own layout
    x, dt, B, C = (v.to(dtype) for v in (x, dt, B, C))
    return [v.requires_grad_() for v in (x, dt, A, B, C)]


def scan_row(name, scan, shape, device, dtype):
    """What one form costs, forward and backward."""
    inputs = operands(device, name, shape, dtype)
    dy = torch.randn_like(inputs[0])

    def call():
        return torch.autograd.grad(scan(*inputs), inputs, dy)

    row = {"b, L, D, N": "{} {} {} {}".format(*shape), "form": name}
    seconds = first_call(call, device)
    calls = captured(lambda: [call() for _ in range(10)], device)        # in one graph
    times = timed(calls, device, in_a_row=1)
    row["ms"], row["lowest"], row["highest"] = (ms / 10 for ms in times)
    return {**row, "MB": peak_megabytes(call, [*inputs, dy], device), "first s": seconds}


def scan_rows(device, args):
    for shape in SHAPES[device.type]:
        for name, scan in forms(device).items():
            try:
                yield scan_row(name, scan, shape, device, getattr(torch, args.dtype))
            except ImportError:
                pass


# ---- a training step, and what length costs ------------------------------------------------------

def training_step(model, config, device):
    """The step of train.py as a call without arguments; on CUDA as config["compile"] says."""
    optimizer, trained = make_optimizer(model, config, device)
    set_learning_rate(optimizer, config["lr"])
    generator = torch.Generator(device)

    def loss_of(tokens, labels):
        return F.cross_entropy(model(tokens), labels)

    def step(draw, loss_of, clip):
        tokens, labels, _ = draw(config["batch_size"], config["L"], device=device,
                                 generator=generator)
        loss = loss_of(tokens, labels)
        optimizer.zero_grad()
        loss.backward()
        clip(trained, 0.2)
        optimizer.step()
        return loss.detach()

    functions = recall, loss_of, torch.nn.utils.clip_grad_norm_
    if device.type == "cuda":
        return gpu.FastStep(step, functions, generator, config)
    return lambda: step(*functions)


def config_for(name, **changes):
    return {**runs.DEFAULTS, "model": name, "K": 16, "d": 8, "L": 64, "M": 1, "tau": 1, "seed": 0,
            "lr": 1e-3, "compile": "off", **changes}


def step_rows(device, args):
    for name in args.model:
        for mode in ["off", "on"] if device.type == "cuda" else ["off"]:
            config = config_for(name, d=args.d, compile=mode)
            model = runs.model_from(config).to(device)
            step = training_step(model, config, device)
            row = {"model": f"{name:>14}", "compiled": mode}
            seconds = first_call(lambda: [step() for _ in range(4)], device)
            row["ms"], row["lowest"], row["highest"] = timed(step, device)
            row.update({"first s": seconds, "params": model.n_params()})
            yield {**row, **{f"state {n}": state_bytes(model, n) for n in (64, 4096)}}


@torch.no_grad()
def prefill(model, tokens):
    """The states of a model after tokens (1, L)."""
    states = None
    for segment in tokens.split(SEGMENT, dim=1):
        _, states = model.run_layers(segment, states)
    return states


@torch.no_grad()
def decode(model, token, states):
    return model.head(model.run_layers(token, states)[0])


def length_rows(device, args):
    for name in args.model:
        for L in LENGTHS[device.type]:
            if L > LONGEST.get(name, 2**16):
                continue
            config = config_for(name, d=64, L=L - 1, batch_size=1)
            model = runs.model_from(config).to(device)
            tokens = recall_batch(1, L - 1, device=device)[0]                         # (1, L)
            step = training_step(model, config, device)
            for _ in range(4):
                step()
            often = 3 if L <= 2**16 else 1
            train_ms, _, _ = timed(step, device, often, 1)
            read_ms, _, _ = timed(lambda: prefill(model, tokens), device, often, 1)
            states = prefill(model, tokens)
            call = captured(lambda: decode(model, tokens[:, -1:], states), device)
            yield {"model": f"{name:>14}", "length": L, "train us/token": 1e3 * train_ms / L,
                   "prefill us/token": 1e3 * read_ms / L, "decode ms": timed(call, device)[0],
                   "state bytes": state_bytes(model, L)}
            del step, call


def draw_lengths(path, out):
    """The figure of what length costs, from a file that --out wrote."""
    from matplotlib.figure import Figure

    from plot import COLOURS
    with open(path) as f:
        result = json.load(f)
    rows = result["length"]
    fig = Figure(figsize=(10, 7), layout="constrained")
    for ax, (cost, title) in zip(fig.subplots(2, 2, sharex=True).flat, COSTS.items()):
        for name in dict.fromkeys(row["model"] for row in rows):
            x, y = zip(*[(row["length"], row[cost]) for row in rows if row["model"] == name])
            colour = COLOURS.get(name.strip(), "black")
            ax.plot(x, y, marker="o", color=colour, label=name.strip())
        ax.set(title=title, yscale="log")
        ax.set_xscale("log", base=2)
        ax.spines[["top", "right"]].set_visible(False)
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    fig.supxlabel("context length, tokens")
    fig.suptitle(f"What a longer context costs: d = 64, one sequence, {result['env']['device']}")
    fig.savefig(out, dpi=150)
    print(out)


TABLES = {  # name: title, rows; the step first, because torch reads some of gpu.py's options once
    "step": ("A training step, K 16, L 64, batch 64: ms, seconds of the first 4, bytes of state",
             step_rows),
    "scan": ("The scan (2: Mamba-2's), forward and backward: ms, seconds of the first call",
             scan_rows),
    "length": ("What length costs: d 64, one sequence", length_rows)}


def main(argv=None):
    """Print the tables asked for; returns them as {"env": ..., table: list of rows}."""
    parser = runs.short_errors(argparse.ArgumentParser(
        description="Time the training step, the scan and what length costs."))
    add = parser.add_argument
    add("--tables", nargs="+", choices=TABLES, default=["step", "scan"], help="default: step scan")
    add("--model", nargs="+", default=list(MODELS), metavar="NAME", help="default: the six models")
    add("--d", type=int, default=8, metavar="N", help="width in the table step (default: 8)")
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the scan's inputs")
    add("--device", help="cuda, cuda:1 or cpu (default: the best one here)")
    add("--out", metavar="FILE.json", help="write the numbers there too")
    add("--draw", metavar="FILE.json", help="draw the table length of this file, and time nothing")
    args = parser.parse_args(argv)
    try:
        if args.draw:
            return draw_lengths(args.draw, os.path.splitext(args.draw)[0] + ".png")
        device = runs.pick_device(args.device or (None if torch.cuda.is_available() else "cpu"))
        if device.type not in SHAPES:
            raise ValueError(f"--device is {args.device!r}, but bench.py times cuda and cpu")
        for name in args.model:
            runs.check(config_for(name, d=args.d))
        if args.out is not None:
            runs.write_json(args.out, {})
    except OSError as error:
        flag, path = ("--draw", args.draw) if args.draw else ("--out", args.out)
        parser.error(f"{flag} is {path!r}: {error.strerror}")
    except (ValueError, KeyError) as error:
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
