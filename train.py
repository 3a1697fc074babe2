"""Train a model on associative recall, test it against context length, and write what came out as JSON.

    python train.py --model rope --M 4 --tau 1
    python train.py --model rope mamba --tau 1 5 --seed 0 1 2       every combination, one run after another

    torchrun --standalone --nproc_per_node=2 -- train.py --d 1024      one run shared by two processes, each with a GPU

A run writes OUT/NAME.json, the result, and OUT/NAME.pt, the model. A run that is killed goes on where it was when the same
command is given again; a run that is finished is not repeated unless --overwrite says so.

Imports data, eval, fused_scan, hybrid, mamba, mamba2 and runs; bench times its step, and plot draws what it writes.
"""

import argparse
import contextlib
import datetime
import gc
import importlib.util
import itertools
import math
import os
import platform
import sys
import tempfile
import time

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import mamba
from data import recall_batch, stream
from eval import accuracy_by_length, print_table, some_lengths
from fused_scan import compile_each_shape
from hybrid import FAMILY, MODELS
from family.mamba2 import Mamba2
from runs import (RESUME, check, config_of, is_finished, load_saved, model_from, pick_device, processes, remove_saved,
                  same_run, short_errors, write_atomically, write_json)

GRID = ["model", "M", "tau", "K", "d", "L", "seed"]  # the flags that take several values, and that name a run
WARMUP = 400         # steps in which the learning rate rises
BETAS = (0.9, 0.98)  # of AdamW
CLIP = 0.2           # largest norm of the gradient
TEST_BATCH = 512     # sequences of a fresh test batch during training,
TEST_TOKENS = 2**18  # which are in the model together as long as they are no more tokens than this
POINTS = 200         # times that the curves are measured in a run
SOLVED = 10, 0.99    # a run has solved its task when so many test batches in a row were at least so accurate
COOLDOWN = 1000, 1 / 5  # at the end the learning rate falls, for so many steps (at most a quarter of the run), or for so
                        # much of the run if that is longer
TEST_SEQUENCES = 1024  # of each length, after training
SAVE_SECONDS = 5     # between saves of a run that is not finished
SMALL = 16, 256      # largest d and L of a small model: see prepare and compiled


def parse(argv):
    parser = short_errors(argparse.ArgumentParser(
        description="Train a model on associative recall and test it against context length.",
        epilog="Flags that take several values run every combination of them."))
    several = dict(nargs="+", metavar="N")
    parser.add_argument("--model", nargs="+", default=["rope"], metavar="NAME",
                        help=f"{', '.join([*MODELS, *FAMILY])}, or layers such as MAM (default: rope)")
    parser.add_argument("--M", type=int, default=[1], **several, help="number of possible queries (default: 1)")
    parser.add_argument("--tau", type=int, default=[1], **several, help="tokens from query to value (default: 1)")
    parser.add_argument("--K", type=int, default=[16], **several, help="size of the vocabulary (default: 16)")
    parser.add_argument("--d", type=int, default=[8], **several, help="width of the model (default: 8)")
    parser.add_argument("--L", type=int, default=[64], **several, help="context length in training (default: 64)")
    parser.add_argument("--seed", type=int, default=[0], **several, help="seed of weights and data (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="sequences in a step (default: 64)")
    parser.add_argument("--steps", type=int, default=20000, metavar="N",
                        help="most training steps, with 200 test batches on the way (default: 20000)")
    parser.add_argument("--lr", type=float, metavar="X", help="highest learning rate (default: 0.008, above d = 16 0.128 / d)")
    parser.add_argument("--stop-early", action=argparse.BooleanOptionalAction, default=True,
                        help="cool down and stop once the task is solved, as a rule long before --steps (default: on)")
    parser.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="of AdamW (default: 0)")
    parser.add_argument("--n-heads", type=int, default=1, metavar="N", help="heads of an attention layer (default: 1)")
    parser.add_argument("--d-state", type=int, default=16, metavar="N", help="states in a channel of Mamba (default: 16)")
    parser.add_argument("--train-lengths", choices=["fixed", "uniform"], default="fixed",
                        help="train at length L, or at a length from tau + 1 to L for each sequence (default: fixed)")
    parser.add_argument("--learn-embedding", action="store_true", help="train the embedding table too")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best one here)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="on CUDA: fuse kernels with torch.compile and record the step as one graph (default: on)")
    parser.add_argument("--out", default="results", metavar="DIR", help="where the results go (default: results)")
    parser.add_argument("--overwrite", action="store_true", help="repeat runs that are finished")
    return parser, parser.parse_args(argv)


def default_lr(d):
    """8e-3 as far as that works; wider models need less: at 8e-3 none of 5 runs of rope with d = 32 learned M = 16."""
    return min(8e-3, 0.128 / d)


def learning_rate(step, last, highest):
    """A straight rise, a plateau, and a straight fall to zero at the step `last`.

    What is hard here is learned all at once, after a long wait that is different in every run. A plateau can wait; a
    schedule that falls from the start decides beforehand how long.
    """
    steps, share = COOLDOWN
    return highest * min(1, (step + 1) / WARMUP, (last - step) / max(share * last, min(steps, last / 4)))


def last_step(curves, config):
    """Where a run ends: after config's steps, or when it has cooled down since it had solved its task."""
    (batches, accuracy), (steps, share) = SOLVED, COOLDOWN
    for k in range(batches, len(curves["step"]) + 1):
        if config["stop_early"] and min(curves["accuracy"][k - batches:k]) >= accuracy:
            solved = curves["step"][k - 1]
            return min(config["steps"], max(solved + steps, round(solved / (1 - share))))
    return config["steps"]


def prepare(config, device):
    """Make a config's model, and what it takes to train it -> model, optimizer, generator, step.

    step() draws the next batch from the generator, takes one training step, and returns the loss. Of several processes each
    draws the whole batch and trains on its share, so any number of them makes the same run, to rounding; the mean of what
    their step() returns is the loss.
    """
    K, M, tau, L, batch_size = (config[k] for k in ("K", "M", "tau", "L", "batch_size"))
    (rank, world), on_cuda = processes(), device.type == "cuda"

    torch.manual_seed(config["seed"])
    model = model_from(config).to(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = {}                                                # by weight decay, which vectors and A_log never have
    for name, p in trained.items():
        groups.setdefault(config["weight_decay"] if p.dim() > 1 and not name.endswith("A_log") else 0.0, []).append(p)
    optimizer = torch.optim.AdamW([{"params": group, "weight_decay": decay} for decay, group in groups.items()],
                                  lr=torch.zeros((), device=device) if on_cuda else 0.0,       # a graph reads it from memory
                                  betas=BETAS, fused=True, capturable=on_cuda)
    generator = stream(config["seed"], "training", device)

    forward = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    draw, clip = recall_batch, nn.utils.clip_grad_norm_

    def loss_of(tokens, labels, lengths):
        return F.cross_entropy(forward(tokens, lengths), labels, reduction="sum") * (world / batch_size)

    mamba.compile_scan = config["compile"]
    compiles = on_cuda and config["compile"]
    small = compiles and config["d"] <= SMALL[0] and L <= SMALL[1]
    sums = small and not any(isinstance(layer, Mamba2) for layer in model.modules())
    if compiles:
        draw, loss_of, clip = (compiled(function, small, sums) for function in (draw, loss_of, clip))

    def step():
        lengths = None
        if config["train_lengths"] == "uniform":
            lengths = torch.randint(tau + 1, L + 1, (batch_size,), device=device, generator=generator)
        tokens, labels = draw(batch_size, L, K, M, tau, device, generator, lengths)
        if world > 1:
            tokens, labels, lengths = (v if v is None else v[rank::world] for v in (tokens, labels, lengths))
        with sdpa_kernel(SDPBackend.MATH) if small else contextlib.nullcontext():
            loss = loss_of(tokens, labels, lengths)
        optimizer.zero_grad()
        loss.backward()                                        # of several processes, the mean of their gradients
        clip(list(trained.values()), CLIP)
        optimizer.step()
        return loss.detach()
    return model, optimizer, generator, step


def compiled(function, small=False, sums=False):
    """torch.compile for a function that meets the same shapes at every step of a run.

    small: put kernels that do not need each other into one, and do not pad the rows of tensors, which large products like and
    small ones pay for with copies: a step of hybrid-b at d = 8 took 0.37 ms in place of 0.41, before the scan was faster.

    sums: write matrix products out as sums. At d = 8 a product is less work than to start the library's kernel for it, and sums
    are merged with what stands around them: a step of rope took 0.22 ms in place of 0.27, before its other parts were compiled
    too (attention's products included: see step in prepare). Mamba-2 has many products and wide ones: at d = 16 a step of
    mamba2 took 0.37 as sums and 0.33 as products, one of mamba2-hybrid 0.88 and 0.74. All of it on an H200.
    """
    from torch._inductor import config as inductor             # here, because it takes a second
    products = {"decompose_mm_pass": {"min_first_dimension_decomposition": 1, "max_other_dimension_decomposition": 10**9}}
    inductor.post_grad_fusion_options = products               # torch reads these two numbers once, at the first compilation
    return compile_each_shape(function, {"combo_kernels": small, "comprehensive_padding": not small,
                                         "post_grad_fusion_options": products if sums else {}})


def record(step, generator):
    """Record a training step as one CUDA graph: launching its hundreds of small kernels one by one costs more than they do.

    Returns a function that replays it and returns its loss. What the step reads must stay where it is in memory.
    """
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        loss = step()

    def replay():
        graph.replay()
        return loss
    return replay


def run(config, path, device):
    """Make one run and write path.pt and path.json.

    Raises FloatingPointError if the loss becomes NaN or infinite, ValueError if another run is saved under this path.
    """
    K, M, tau, L, steps = (config[k] for k in ("K", "M", "tau", "L", "steps"))
    rank, world = processes()
    model, optimizer, training, next_step = prepare(config, device)
    testing = stream(config["seed"], "test", device)
    start, seconds, curves = 0, 0.0, {"step": [], "loss": [], "accuracy": []}

    # A run that was killed goes on from what it saved, if it was the same run.
    state = load_saved(path, config, device)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        training.set_state(state["training"].cpu())
        testing.set_state(state["testing"].cpu())
        start, seconds, curves = state["step"], state["seconds"], state["curves"]

    def save(step):
        state = {"config": config, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                 "training": training.get_state(), "testing": testing.get_state(), "curves": curves,
                 "seconds": seconds + time.time() - began}
        write_atomically(path + RESUME, lambda temporary: torch.save(state, temporary))

    def stop_if_not_finite(loss, step):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss} at step {step} of {path}; "
                                     f"a lower --lr than {config['lr']:g} may help")

    # The loop. On CUDA, if one process compiles, the step runs three times, is then recorded as one graph, and replayed.
    every = max(1, steps // POINTS)
    last = last_step(curves, config)
    began = last_save = time.time()
    with tqdm(range(start, steps), initial=start, total=steps, unit=" steps", desc=os.path.basename(path),
              dynamic_ncols=True, disable=rank > 0) as bar:
        for step in bar:
            if step == last:
                break
            lr = learning_rate(step, last, config["lr"])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr
            if device.type == "cuda" and config["compile"] and world == 1 and step == start + 3:
                next_step = record(next_step, training)
            loss = next_step()

            if (step + 1) % every == 0 or step + 1 == steps:
                tokens, labels = recall_batch(TEST_BATCH, L, K, M, tau, device, testing)
                with torch.no_grad(), torch.compiler.set_stance("force_eager"):        # not worth compiling for
                    answers = torch.cat([model(part).argmax(-1) for part in tokens.split(max(1, TEST_TOKENS // L))])
                measured = torch.stack([loss, (answers == labels).float().mean()])
                if world > 1:
                    dist.all_reduce(measured)                  # also makes sure that all come to the same conclusions
                loss, accuracy = (measured / world).tolist()
                for curve, value in zip(curves.values(), (step + 1, loss, accuracy)):
                    curve.append(value)
                last = last_step(curves, config)
                bar.set_postfix(loss=f"{loss:.4f}", accuracy=f"{accuracy:.3f}")
                stop_if_not_finite(loss, step + 1)
                if rank == 0 and time.time() - last_save > SAVE_SECONDS:
                    save(step + 1)
                    last_save = time.time()
    if start < last:
        stop_if_not_finite(float(loss), last)
    seconds += time.time() - began
    if rank > 0:
        return

    # The test, and the result.
    began = time.time()
    lengths = list(range(tau + 1, 3 * L + 1))
    with torch.compiler.set_stance("force_eager"):
        accuracies = accuracy_by_length(model.eval(), lengths, K, M, tau, TEST_SEQUENCES, device)
    shown = some_lengths(L, tau)
    print_table(shown, [accuracies[n - tau - 1] for n in shown], L)
    checkpoint = {"config": config, "model": {name: p.cpu() for name, p in model.state_dict().items()}}
    write_atomically(path + ".pt", lambda temporary: torch.save(checkpoint, temporary))
    write_json(path + ".json", {                                                       # last: it marks a finished run
        "config": config,
        "params": model.n_params(),
        "train": curves,
        "eval": {"length": lengths, "accuracy": accuracies, "sequences": TEST_SEQUENCES},
        "env": {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                "threads": torch.get_num_threads(), "processes": world},
        "seconds": {"train": round(seconds, 3), "eval": round(time.time() - began, 3)}})
    remove_saved(path)


def main(argv=None):
    parser, args = parse(argv)
    try:
        device = pick_device(args.device)
        if device.type == "cuda" and args.compile and importlib.util.find_spec("triton") is None:
            raise ValueError("--compile needs the package triton on CUDA, which is not installed; --no-compile does without")
        if "LOCAL_RANK" in os.environ:                         # torchrun started this process, and others
            if device.type == "cuda":
                device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo",
                                    timeout=datetime.timedelta(days=1))                # the others wait while one tests
        rank, world = processes()
        if world > max(1, args.batch_size):
            raise ValueError(f"--batch-size is {args.batch_size}, but {world} processes need at least a sequence each")
        configs = []
        for values in itertools.product(*(dict.fromkeys(getattr(args, flag)) for flag in GRID)):
            config = {**vars(args), **dict(zip(GRID, values)), "device": str(device)}
            if config["lr"] is None:
                config["lr"] = default_lr(max(1, config["d"]))
            check(config)
            configs.append(config)
        os.makedirs(args.out, exist_ok=True)
        tempfile.TemporaryFile(dir=args.out).close()
    except (ValueError, OSError) as error:
        if isinstance(error, OSError):
            error = f"--out is {args.out!r}, but it cannot be written to: {error.strerror}"
        parser.error(str(error)) if os.environ.get("RANK", "0") == "0" else sys.exit(2)       # one process says it

    say = print if rank == 0 else lambda *words, **options: None
    for number, config in enumerate(configs, 1):
        path = os.path.join(args.out, "{model}_M{M}_tau{tau}_K{K}_d{d}_L{L}_seed{seed}".format(**config))
        count = f"[{number}/{len(configs)}] " if len(configs) > 1 else ""
        if is_finished(path) and not args.overwrite:
            note = "" if same_run(config_of(path + ".json"), config) else ", with other flags"
            say(f"{count}{path}.json is finished{note}; --overwrite repeats it")
            continue
        try:
            run(config, path, device)
        except FloatingPointError as error:
            if rank == 0:
                remove_saved(path)
            sys.exit(f"train.py: {error}" if rank == 0 else 1)
        except ValueError as error:
            parser.error(str(error)) if rank == 0 else sys.exit(2)
        except KeyboardInterrupt:
            goes_on = "from where it was last saved" if os.path.exists(path + RESUME) else "from the beginning"
            command = "the same command" + " without --overwrite" * args.overwrite
            say(f"stopped; {command} goes on with {path} {goes_on}", file=sys.stderr)
            sys.exit(130)
        say(f"{count}wrote {path}.json")
    if world > 1:
        # All end together, and nothing is left that holds the group: of processes that ended one by one, some aborted.
        gc.collect(), dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
