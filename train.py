"""Train a model on associative recall, test it against context length, and write what came out as JSON.

    python train.py --model rope --M 4 --tau 1
    python train.py --model rope mamba --tau 1 5 --seed 0 1 2       every combination, one run after another

A run writes OUT/NAME.json, the result, and OUT/NAME.pt, the model. A run that is killed goes on where it was when the same
command is given again; a run that is finished is not repeated unless --overwrite says so.

Imports data, hybrid and eval; plot.py draws what it writes.
"""

import argparse
import itertools
import json
import math
import os
import platform
import sys
import tempfile
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import mamba
from data import check_task, recall_batch
from eval import (accuracy_by_length, model_from, pick_device, print_table, short_errors, some_lengths, write_atomically,
                  write_json)

GRID = ["model", "M", "tau", "K", "d", "L", "seed"]  # the flags that take several values, and that name a run
WARMUP = 400         # steps in which the learning rate rises
BETAS = (0.9, 0.98)  # of AdamW
CLIP = 0.2           # largest norm of the gradient
TEST_BATCH = 512     # sequences of a fresh test batch during training
POINTS = 200         # times that the curves are measured in a run
SOLVED = 10, 0.99    # a run has solved its task when so many test batches in a row were at least so accurate
COOLDOWN = 1000      # and then ends after so many more steps, in which the learning rate falls
TEST_SEQUENCES = 1024  # of each length, after training
SAVE_SECONDS = 5     # between saves of a run that is not finished
RESUME = ".resume.pt"  # what a run that is not finished is saved under


def parse(argv):
    parser = short_errors(argparse.ArgumentParser(
        description="Train a model on associative recall and test it against context length.",
        epilog="Flags that take several values run every combination of them."))
    several = dict(nargs="+", metavar="N")
    parser.add_argument("--model", nargs="+", default=["rope"], metavar="NAME",
                        help="nope, learned, rope, mamba, hybrid-a, hybrid-b, or layers such as MAM (default: rope)")
    parser.add_argument("--M", type=int, default=[1], **several, help="number of possible queries (default: 1)")
    parser.add_argument("--tau", type=int, default=[1], **several, help="tokens from query to value (default: 1)")
    parser.add_argument("--K", type=int, default=[16], **several, help="size of the vocabulary (default: 16)")
    parser.add_argument("--d", type=int, default=[8], **several, help="width of the model (default: 8)")
    parser.add_argument("--L", type=int, default=[64], **several, help="context length in training (default: 64)")
    parser.add_argument("--seed", type=int, default=[0], **several, help="seed of weights and data (default: 0)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="sequences in a step (default: 64)")
    parser.add_argument("--steps", type=int, default=20000, metavar="N", help="most training steps (default: 20000)")
    parser.add_argument("--lr", type=float, default=8e-3, metavar="X", help="highest learning rate (default: 0.008)")
    parser.add_argument("--stop-early", action=argparse.BooleanOptionalAction, default=True,
                        help="cool down and stop once the task is solved, as a rule long before --steps (default: on)")
    parser.add_argument("--weight-decay", type=float, default=0.0, metavar="X", help="of AdamW (default: 0)")
    parser.add_argument("--n-heads", type=int, default=1, metavar="N", help="heads of an attention layer (default: 1)")
    parser.add_argument("--train-lengths", choices=["fixed", "uniform"], default="fixed",
                        help="train at length L, or at a length from tau + 1 to L for each sequence (default: fixed)")
    parser.add_argument("--learn-embedding", action="store_true", help="train the embedding table too")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best one here)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True,
                        help="on CUDA: fuse the scan with torch.compile and record the step as one graph")
    parser.add_argument("--out", default="results", metavar="DIR", help="where the results go (default: results)")
    parser.add_argument("--overwrite", action="store_true", help="repeat runs that are finished")
    return parser, parser.parse_args(argv)


def check(config):
    """Raise a ValueError, in one sentence, for a run that cannot be made. Nothing is written before this has passed."""
    for flag in ("d", "L", "n_heads", "batch_size", "steps"):
        if config[flag] < 1:
            raise ValueError(f"--{flag.replace('_', '-')} is {config[flag]}, but it must be at least 1")
    if not (config["lr"] > 0 and math.isfinite(config["lr"])):
        raise ValueError(f"--lr is {config['lr']}, but it must be above 0 and finite")
    if not (config["weight_decay"] >= 0 and math.isfinite(config["weight_decay"])):
        raise ValueError(f"--weight-decay is {config['weight_decay']}, but it must be 0 or more and finite")
    if not 0 <= config["seed"] < 2**32:
        raise ValueError(f"--seed is {config['seed']}, but it must be from 0 to 2^32 - 1")
    check_task(config["L"], config["K"], config["M"], config["tau"])
    with torch.device("meta"):
        model_from(config)


def learning_rate(step, last, highest):
    """A straight rise, a plateau, and a straight fall to zero at the step `last`, which takes a quarter of a short run.

    What is hard here is learned all at once, after a long wait that is different in every run. A plateau can wait; a
    schedule that falls from the start decides beforehand how long.
    """
    return highest * min(1, (step + 1) / WARMUP, (last - step) / min(COOLDOWN, last / 4))


def solved_at(curves, stop_early=True):
    """The step at which a run had solved its task, or None."""
    if not stop_early:
        return None
    batches, accuracy = SOLVED
    for k in range(batches, len(curves["step"]) + 1):
        if min(curves["accuracy"][k - batches:k]) >= accuracy:
            return curves["step"][k - 1]


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
    """Make one run and write path.pt and path.json. Raises FloatingPointError if the loss becomes NaN or infinite."""
    K, M, tau, L, steps, batch_size = (config[k] for k in ("K", "M", "tau", "L", "steps", "batch_size"))
    on_cuda = device.type == "cuda"

    # The model, its optimizer, and where the training sequences and the test batches come from.
    torch.manual_seed(config["seed"])
    model = model_from(config).to(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    decayed = [p for name, p in trained.items() if p.dim() > 1 and not name.endswith("A_log")]     # the matrices
    others = [p for name, p in trained.items() if p.dim() <= 1 or name.endswith("A_log")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": others, "weight_decay": 0.0}],
        lr=torch.zeros((), device=device) if on_cuda else 0.0,                         # a graph reads it from memory
        betas=BETAS, fused=True, capturable=on_cuda)
    training = torch.Generator(device).manual_seed(2 * config["seed"])
    testing = torch.Generator(device).manual_seed(2 * config["seed"] + 1)
    curves = {"step": [], "loss": [], "accuracy": []}
    start, seconds = 0, 0.0

    # A run that was killed goes on from what it saved, if it was the same run.
    saved = path + RESUME
    state = load_saved(saved, config, device)
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
        write_atomically(saved, lambda temporary: torch.save(state, temporary))

    def train_step():
        lengths = None
        if config["train_lengths"] == "uniform":
            lengths = torch.randint(tau + 1, L + 1, (batch_size,), device=device, generator=training)
        tokens, labels = recall_batch(batch_size, L, K, M, tau, device, training, lengths)
        loss = F.cross_entropy(model(tokens, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), CLIP)
        optimizer.step()
        return loss.detach()

    # The loop. On CUDA the step runs as it is three times, is then recorded as one graph, and from there on replayed.
    next_step = train_step
    every = max(1, steps // POINTS)
    solved = solved_at(curves, config["stop_early"])
    mamba.compile_scan = config["compile"]
    began = last_save = time.time()
    with tqdm(range(start, steps), initial=start, total=steps, unit=" steps", desc=os.path.basename(path),
              dynamic_ncols=True) as bar:
        for step in bar:
            last = steps if solved is None else min(steps, solved + COOLDOWN)
            if step == last:
                break
            lr = learning_rate(step, last, config["lr"])
            for group in optimizer.param_groups:
                group["lr"] = group["lr"].fill_(lr) if on_cuda else lr
            if on_cuda and config["compile"] and step == start + 3:
                next_step = record(train_step, training)
            loss = next_step()

            if (step + 1) % every == 0 or step + 1 == steps:
                tokens, labels = recall_batch(TEST_BATCH, L, K, M, tau, device, testing)
                with torch.no_grad():
                    accuracy = (model(tokens).argmax(-1) == labels).float().mean().item()
                curves["step"].append(step + 1)
                curves["loss"].append(loss.item())
                curves["accuracy"].append(accuracy)
                solved = solved_at(curves, config["stop_early"])
                bar.set_postfix(loss=f"{loss.item():.4f}", accuracy=f"{accuracy:.3f}")
                if not math.isfinite(loss.item()):
                    raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1} of {path}; "
                                             f"a lower --lr than {config['lr']:g} may help")
                if time.time() - last_save > SAVE_SECONDS:
                    save(step + 1)
                    last_save = time.time()
    seconds += time.time() - began

    # The test, and the result.
    began = time.time()
    lengths = list(range(tau + 1, 3 * L + 1))
    accuracies = accuracy_by_length(model.eval(), lengths, K, M, tau, TEST_SEQUENCES, device)
    shown = some_lengths(L, tau)
    print_table(shown, [accuracies[n - tau - 1] for n in shown], L)
    checkpoint = {"config": config, "model": {name: p.cpu() for name, p in model.state_dict().items()}}
    write_atomically(path + ".pt", lambda temporary: torch.save(checkpoint, temporary))
    write_json(path + ".json", {                                                       # last: it marks a finished run
        "config": config,
        "params": sum(p.numel() for p in trained.values()),
        "train": curves,
        "eval": {"length": lengths, "accuracy": accuracies, "sequences": TEST_SEQUENCES},
        "env": {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
                "device": torch.cuda.get_device_name(device) if on_cuda else device.type,
                "threads": torch.get_num_threads()},
        "seconds": {"train": round(seconds, 3), "eval": round(time.time() - began, 3)}})
    remove_saved(path)


def load_saved(saved, config, device):
    """What this very run had saved when it was killed, or None."""
    if not os.path.exists(saved):
        return None
    try:
        state = torch.load(saved, map_location=device, weights_only=True)
        if same_run(state["config"], config):
            return state
    except Exception:  # there is no telling how a file that is something else will fail
        pass
    print(f"{saved} is not of a run with these flags, so this one starts from the beginning")


def remove_saved(path):
    """Forget what an unfinished run has saved, and what it was saving when it was killed."""
    for name in (path + RESUME, path + RESUME + ".tmp"):
        if os.path.exists(name):
            os.remove(name)


def same_run(a, b):
    """Whether two configs make the same run: where the result goes does not change it."""
    return all(a.get(flag) == b[flag] for flag in b if flag not in ("out", "overwrite"))


def config_of(path):
    """The config of a finished run, or an empty one if the file is not a result."""
    try:
        with open(path) as f:
            return dict(json.load(f)["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def main(argv=None):
    parser, args = parse(argv)
    try:
        device = pick_device(args.device)
        configs = []
        for values in itertools.product(*(dict.fromkeys(getattr(args, flag)) for flag in GRID)):
            configs.append({**vars(args), **dict(zip(GRID, values)), "device": str(device)})
            check(configs[-1])
        try:
            os.makedirs(args.out, exist_ok=True)
            tempfile.TemporaryFile(dir=args.out).close()
        except OSError as error:
            raise ValueError(f"--out is {args.out!r}, but it cannot be written to: {error.strerror}") from None
    except ValueError as error:
        parser.error(str(error))

    for number, config in enumerate(configs, 1):
        path = os.path.join(args.out, "{model}_M{M}_tau{tau}_K{K}_d{d}_L{L}_seed{seed}".format(**config))
        count = f"[{number}/{len(configs)}] " if len(configs) > 1 else ""
        if os.path.exists(path + ".json") and not args.overwrite:
            note = "" if same_run(config_of(path + ".json"), config) else ", with other flags"
            print(f"{count}{path}.json is finished{note}; --overwrite repeats it")
            continue
        try:
            run(config, path, device)
        except FloatingPointError as error:
            remove_saved(path)
            sys.exit(f"train.py: {error}")
        except KeyboardInterrupt:
            print(f"stopped; the same command goes on with {path} from where it was last saved", file=sys.stderr)
            sys.exit(130)
        print(f"{count}wrote {path}.json")


if __name__ == "__main__":
    main()
