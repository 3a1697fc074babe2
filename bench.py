"""How fast it is, on the machine it is on: the scan in all its forms, a training step of each model, and what length costs.

    python bench.py                       a training step of the six models, and the scan in all its forms
    python bench.py --tables length       what length costs; takes longer, and so does the next
    python bench.py --tables family       a training step, parameters and state of all models at d 16

Beside the scan stand mamba2.py's in heads of 64 channels, mambapy's pscan, and mamba_ssm's kernel with the transposed copies that
it needs here, the last two if they can be imported. On CUDA scans and training steps are recorded as a graph and replayed, so
that what the host needs to launch them is left out, as it is in train.py; ten scans are one replay. Ten training steps in a row
are timed together, as they follow each other in a run (in the table length each by itself). Times are medians of several calls
after a few that do not count, from 2^18 tokens on of one call. Memory is counted on CUDA, beyond what the program held before.
With --out the numbers are written as JSON too.

Imports data, eval, hybrid, mamba, mamba2, runs and train.
"""

import argparse
import functools
import gc
import math
import os
import statistics
import time

import torch

import mamba
import train
from data import recall_batch
from eval import PIECE
from hybrid import FAMILY, MODELS, build_model
from family.mamba2 import ssd
from runs import pick_device, short_errors, write_json

SHAPES = {  # (b, L, D, N)
    "cpu": [(64, 64, 16, 16), (64, 64, 128, 16), (8, 1024, 128, 16)],
    "cuda": [(64, 64, 16, 16), (64, 64, 128, 16), (64, 256, 128, 16), (8, 2048, 1536, 16)]}
FAMILY_TOKENS = 64, 4096
FEWEST_TOKENS = 2**10
MOST_TOKENS = {  # each length is four times the one before; on CUDA each is compiled anew, so there are fewer models
    "cpu": {name: 2**16 if name == "mamba" else 2**14 for name in MODELS},
    "cuda": {"rope": 2**16, "hybrid-a": 2**16, "mamba": 2**20}}


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(call, device, repeats=9, graph=True, warm=2, in_a_row=1):
    """Milliseconds of call(): median, lowest, highest. The first `warm` calls, which may compile, are left out."""
    def calls():
        for _ in range(in_a_row):
            call()
    for _ in range(warm):
        call()
    if device.type == "cuda" and graph:
        cuda_graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(cuda_graph):
            calls()
        calls = cuda_graph.replay
        calls()                                                # the first replay loads the graph
    took = []
    for _ in range(repeats):
        sync(device)
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(), calls(), end.record(), sync(device)
            took.append(start.elapsed_time(end) / in_a_row)
        else:
            start = time.perf_counter()
            calls()
            took.append(1e3 * (time.perf_counter() - start) / in_a_row)
    return statistics.median(took), min(took), max(took)


def fill_workspaces(device):
    """Make the library of matrix products take what it keeps for each stream and thread, before memory is counted."""
    v = torch.ones(8, 8, device=device, requires_grad=True)
    timed(lambda: torch.autograd.grad((v @ v).sum(), v), device)


def bytes_held(device):
    """What the program holds on the device; None where torch does not count it."""
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else None


def peak_megabytes(call, device, before):
    """The most memory that is held during call(), beyond the bytes held before there was anything that it needs."""
    if before is None:
        return None
    gc.collect(), torch.cuda.empty_cache(), torch.cuda.reset_peak_memory_stats()
    call(), sync(device)
    return (torch.cuda.max_memory_allocated() - before) / 1e6


# ---- the scan ----

def mambapy_scan():
    """mambapy's parallel scan with what stands around it there: it scans a and b of shape (b, L, D, N)."""
    from mambapy.pscan import pscan

    def scan(x, dt, A, B, C):
        h = pscan(torch.exp(dt[..., None] * A), (dt * x)[..., None] * B[:, :, None])   # (b, L, D, N)
        return (h @ C[..., None])[..., 0]
    return scan


def official_scan():
    """mamba_ssm's CUDA kernel, which takes (b, D, L)."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    return lambda x, dt, A, B, C: selective_scan_fn(x.mT, dt.mT, A, B.mT, C.mT).mT


def scans(device, shape):
    """name -> scan(x, dt, A, B, C) -> y, or the reason why there is none."""
    on_cpu = device.type == "cpu"
    ours = {"recurrence": mamba.selective_scan_ref, "chunked": mamba.ChunkedScan.apply,
            "parallel": functools.partial(mamba.parallel_scan, off=on_cpu)}
    found = {name: lambda *inputs, scan=scan: scan(*inputs, None)[0] for name, scan in ours.items()}
    if math.prod(shape) > 2**22:
        found["recurrence"] = "too slow here"
    chunks = lambda *inputs: ssd(*inputs)[0]
    found["mamba-2"] = chunks if on_cpu else train.compiled(chunks)
    for name, get in [("mambapy", mambapy_scan), ("mamba_ssm", official_scan)]:
        try:
            found[name] = "CUDA only" if on_cpu and name == "mamba_ssm" else get()
        except ImportError:
            found[name] = "not installed"
    return found


def operands(device, b, L, D, N, in_heads=False):
    """x, dt (b, L, D), A (D, N), B, C (b, L, N), or the same for Mamba-2's scan in heads of P channels, 64 as a rule."""
    x, dt = torch.randn(b, L, D, device=device), torch.rand(b, L, D, device=device)
    A, B, C = -torch.rand(D, N, device=device) * N, *(torch.randn(b, L, N, device=device) for _ in "BC")
    if in_heads:
        P = math.gcd(D, 64)
        x, dt, A, B, C = x.unflatten(-1, (-1, P)), dt[..., ::P].contiguous(), A[::P, 0].contiguous(), B[:, :, None], C[:, :, None]
    return [v.requires_grad_() for v in (x, dt, A, B, C)]


def scan_row(name, scan, shape, device):
    """What one form costs. A function of its own, or what one row leaves behind would count as held before the next."""
    before = bytes_held(device)
    inputs = operands(device, *shape, in_heads=name == "mamba-2")
    dy = torch.randn_like(inputs[0])
    call = lambda: torch.autograd.grad(scan(*inputs), inputs, dy)
    row, began = {"shape": list(shape), "form": name}, time.time()
    call(), sync(device)
    row["first_call_s"] = time.time() - began
    row["ms"], row["ms_lowest"], row["ms_highest"] = timed(call, device, in_a_row=10 if device.type == "cuda" else 1)
    row["megabytes"] = peak_megabytes(call, device, before)
    return row


def scan_table(device):
    counted = device.type == "cuda"
    print("The scan, forward and backward, float32: milliseconds (lowest to highest)" + ", peak memory" * counted)
    rows = []
    for shape in SHAPES[device.type]:
        for name, scan in scans(device, shape).items():
            print(f"  {str(shape):20} {name:11}", end=" ", flush=True)
            if isinstance(scan, str):
                print(scan)
                continue
            row = scan_row(name, scan, shape, device)
            memory = f"{row['megabytes']:7.0f} MB" if counted else ""
            print(f"{row['ms']:9.3f} ({row['ms_lowest']:.3f} to {row['ms_highest']:.3f}){memory}"
                  f"    first call {row['first_call_s']:.1f} s", flush=True)
            rows.append(row)
    return rows


# ---- a training step ----

def config_for(model, **changes):
    """train.py's config for its default flags, but for the changes."""
    _, args = train.parse([])
    single = {flag: values[0] for flag, values in vars(args).items() if isinstance(values, list)}
    config = {**vars(args), **single, "model": model, **changes}
    return {**config, "lr": train.default_lr(config["d"])}


def recorded(step, generator, device):
    """A training step as train.py takes it after three others."""
    return train.record(step, generator) if device.type == "cuda" else step


def step_row(name, d, device):
    began = time.time()
    generator, step = train.prepare(config_for(name, d=d), device)[2:]
    step(), step(), step(), sync(device)
    row = {"model": name, "first_call_s": time.time() - began}
    row["ms"], row["ms_lowest"], row["ms_highest"] = timed(recorded(step, generator, device), device, graph=False, in_a_row=10)
    print(f"  {name:13} {row['ms']:8.3f} ({row['ms_lowest']:.3f} to {row['ms_highest']:.3f})"
          f"    first steps {row['first_call_s']:5.1f} s", end="", flush=True)
    return row


def step_table(device):
    print("A training step, K 16, d 8, L 64, batch 64: milliseconds (lowest to highest)")
    rows = []
    for name in MODELS:
        rows.append(step_row(name, 8, device))
        print()
    return rows


def family_table(device):
    print("All models, K 16, d 16, L 64, batch 64: milliseconds of a training step (lowest to highest), parameters, and for one\n"
          f"sequence bytes of state after {' and '.join(map(str, FAMILY_TOKENS))} tokens")
    rows = []
    for name in [*MODELS, *FAMILY]:
        row, model = step_row(name, 16, device), build_model(name, d=16, L=FAMILY_TOKENS[0])
        row["params"] = model.n_params()
        model.extend_positions(FAMILY_TOKENS[-1])
        with torch.no_grad():
            row["state_bytes"] = [state_bytes(model.run_layers(torch.zeros(1, L, dtype=torch.int64))[1]) for L in FAMILY_TOKENS]
        print(f"    {row['params']:6} parameters    state {' '.join(f'{n:7}' for n in row['state_bytes'])}", flush=True)
        rows.append(row)
    return rows


# ---- what length costs ----

def state_bytes(states):
    """Bytes that a model remembers: of the tensors in the states of its layers."""
    if torch.is_tensor(states):
        return states.nbytes
    return sum(map(state_bytes, states)) if isinstance(states, (tuple, list)) else 0


def length_row(name, L, device):
    """What L tokens cost a model. A function of its own, or what one row leaves behind would count as the next one's memory."""
    before = bytes_held(device)
    row, how = {"model": name, "length": L}, dict(graph=False, warm=1, repeats=9 if L < 2**14 else 3 if L < 2**18 else 1)
    generator, step = train.prepare(config_for(name, d=64, L=L - 1, batch_size=1), device)[2:]
    step(), step()
    row["train_megabytes"] = peak_megabytes(step, device, before)
    row["train_us"] = 1e3 * timed(recorded(step, generator, device), device, **how)[0] / L
    del step
    model = build_model(name, d=64, L=L).to(device)
    tokens = recall_batch(1, L - 1, device=device)[0]                                  # (1, L), the query among them

    def read():
        states = None
        for piece in tokens.split(PIECE, dim=1):
            _, states = model.run_layers(piece, states)
        return states
    with torch.no_grad():
        row["read_megabytes"] = peak_megabytes(read, device, before)
        row["read_us"] = 1e3 * timed(read, device, **how)[0] / L
        states = read()
        row["token_ms"] = timed(lambda: model.run_layers(tokens[:, -1:], states), device, 51, graph=False)[0]
        row["state_bytes"] = state_bytes(states)
    return row


def length_table(device):
    print("d 64, one sequence: microseconds a token and peak memory, in training and when read in pieces;\n"
          "and with so much context, one token more: milliseconds, and bytes of state")
    rows = []
    for name, most in MOST_TOKENS[device.type].items():
        L = FEWEST_TOKENS
        while L <= most:
            row = length_row(name, L, device)
            memory = "  ".join(f"{row[k]:7.0f} MB" if row[k] else "" for k in ("train_megabytes", "read_megabytes"))
            print(f"  {name:8} {L:8}  train {row['train_us']:8.2f}  read {row['read_us']:8.3f}  {memory}"
                  f"  one more {row['token_ms']:.3f}  state {row['state_bytes']}", flush=True)
            rows.append(row)
            L *= 4
    return rows


TABLES = {  # the step first: what train.compiled sets, torch reads once, before it compiles anything
    "step": step_table, "scan": scan_table, "length": length_table, "family": family_table}


def main(argv=None):
    parser = short_errors(argparse.ArgumentParser(description="Time the scan, the training step and what length costs."))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=["step", "scan"],
                        metavar="TABLE", help=f"which of {', '.join(TABLES)} (default: step scan)")
    parser.add_argument("--device", help="cuda, cuda:1 or cpu (default: the best one here)")
    parser.add_argument("--out", metavar="FILE.json", help="write the numbers there too")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device or (None if torch.cuda.is_available() else "cpu"))
        if device.type not in SHAPES:
            raise ValueError(f"--device is {args.device or device.type!r}, but bench.py times cuda and cpu")
        if args.out and (os.path.isdir(args.out) or not os.access(os.path.dirname(args.out) or ".", os.W_OK)):
            raise ValueError(f"--out is {args.out!r}, but it cannot be written to")
    except ValueError as error:
        parser.error(str(error))
    torch.manual_seed(0)
    env = {"torch": torch.__version__, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
           "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}
    print(", ".join(f"{key} {value}" for key, value in env.items()))
    fill_workspaces(device)
    tables = {name: table(device) for name, table in TABLES.items() if name in args.tables}
    if args.out:
        write_json(args.out, {"bench": tables, "env": env})


if __name__ == "__main__":
    main()
