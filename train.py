"""Train a model on a task, test it against context length, and write the result as JSON.

    python train.py --model rope --M 4 --tau 1
    python train.py --model rope mamba --M 4 16 --seed 0 1 2     all combinations, one after another
    torchrun --nproc-per-node 8 -- train.py --seed 0 1 2 3 4 5 6 7      eight runs at a time

A run writes OUT/NAME.json, the result, and OUT/NAME.pt, the model. Give the same command again to
continue after it was killed; finished runs are not repeated unless --overwrite says so.
"""

import argparse
import math
import os
import signal
import time

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C prints no traceback, even in imports

import torch

import gpu
import runs
from data import TASKS, show_answers, stream
from eval import evaluate, lengths_to_test, print_table, training_accuracy
from grid import configs_of, make_all, prepare_folder
from hybrid import FAMILY, LAYERS, MODELS, state_bytes
from output import Parser, Progress, remove, say
from summary import DEFAULTS, GRID, SOLVED

WARMUP = 400             # steps in which the learning rate rises
BETAS = (0.9, 0.98)      # of AdamW
CLIP = 0.2               # maximum norm of the gradient
TESTS = 200              # about so many in a run of 2,000 steps or more,
STEPS_APART = 10         # in a shorter one a test every 10 steps, or 20 in all if that is more
SOLVED_TESTS = 3         # a task is solved when this many tests in a row reach SOLVED, 0.99
COOLDOWN_SHARE = 1 / 5   # the learning rate falls over this share of a run, or COOLDOWN_STEPS if
COOLDOWN_STEPS = 1000    # that is more, but at most over its last quarter
EVAL_SEQUENCES = 1024    # of each length, after training
STATE_TOKENS = 64, 4096  # contexts after which the size of the state is reported
SAVE_SECONDS = 5         # at least, between saves of an unfinished run


def parse(argv):
    """Parse the flags -> the parser, for its error messages, and args with every flag set."""
    parser = Parser(
        description="Train a model on a task and test it against context length.",
        epilog="Flags marked * take several values and run all combinations of them.")
    several = dict(type=int, nargs="+", action="extend", metavar="N")
    add = parser.add_argument_group("the model").add_argument
    add("--model", nargs="+", action="extend", metavar="NAME",
        help=f"* {', '.join([*MODELS, *FAMILY])}; or a stack such as mamba+attention, of "
             f"{', '.join(LAYERS)} (default: rope)")
    add("--d", **several, help="* width (default: 8)")
    add("--n-heads", type=int, metavar="N", help="heads, for models that have them (default: 1)")
    add("--d-state", type=int, metavar="N", help="size of the state, likewise (default: 16)")
    add("--learn-embedding", action="store_true", help="train the embedding table too")

    add = parser.add_argument_group("the task").add_argument
    add("--task", choices=TASKS, help="default: recall")
    add("--M", **several, help="* possible queries; mqar: keys; copy: tokens (default: 1)")
    add("--tau", **several, help="* in recall: tokens from query to value (default: 1)")
    add("--K", **several, help="* size of the vocabulary (default: 16)")
    add("--L", **several, help="* context length in training (default: 64)")
    add("--train-lengths", choices=["fixed", "uniform"], help="L, or any up to L (default: fixed)")

    add = parser.add_argument_group("training").add_argument
    add("--seed", **several, help="* seed of weights and data (default: 0)")
    add("--steps", type=int, metavar="N", help="maximum number of training steps (default: 20000)")
    add("--batch-size", type=int, metavar="N", help="sequences per step (default: 64)")
    add("--lr", type=float, metavar="X", help=f"learning rate, after a rise of {WARMUP} steps; "
        "lower in runs of about 500 or fewer (default: min(0.008, 0.128 / d))")
    add("--weight-decay", type=float, metavar="X", help="of AdamW (default: 0)")
    add("--stop-early", action=argparse.BooleanOptionalAction,
        help="cool down and stop once the task is solved (default: on)")

    add = parser.add_argument_group("the machine").add_argument
    add("--device", help="cuda, cuda:1, mps or cpu (default: the best one here)")
    add("--compile", choices=["auto", "on", "off"], default="auto",
        help="torch.compile on CUDA; auto: when it ends the work sooner (default: auto)")
    add("--out", default="results", metavar="DIR", help="folder of results (default: results)")
    add("--overwrite", action="store_true", help="repeat runs that are finished")
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args(argv)
    # Set here, because action="extend" appends to a default. dict.fromkeys drops repeated values.
    for flag, value in GRID.items():
        setattr(args, flag, list(dict.fromkeys(getattr(args, flag) or [value])))
    return parser, args


def learning_rate(step, last, highest):
    """A linear rise, a plateau, and a linear fall to zero at the step `last`.

    Recall is learned suddenly, at a step that nobody can foresee; a schedule that falls from the
    start has to guess it. `last` is --steps; once the task is solved, last_step makes it earlier.
    """
    fall = min(last / 4, max(COOLDOWN_STEPS, COOLDOWN_SHARE * last))
    return highest * min(1, (step + 1) / WARMUP, (last - step) / fall)


def solved_at(curves, tests=SOLVED_TESTS):
    """The first step at which the last `tests` tests all reached SOLVED, or None."""
    for k in range(tests, len(curves["step"]) + 1):
        if min(curves["accuracy"][k - tests:k]) >= SOLVED:
            return curves["step"][k - 1]
    return None


def last_step(curves, config):
    """Where a run ends: at --steps, but with --stop-early, if it is solved at step s, at s + 1,000
    or 5/4 s, whichever is later.

    So the learning rate falls only after s, unless the fall at the end of --steps has begun.
    """
    solved = solved_at(curves)
    if solved is None or not config["stop_early"]:
        return config["steps"]
    return min(config["steps"], max(solved + COOLDOWN_STEPS, round(solved / (1 - COOLDOWN_SHARE))))


def make_optimizer(model, config, device):
    """AdamW. Parameters of two or more dimensions decay, except A_log, which sets time scales."""
    decayed, others = [], []
    for name, p in model.named_parameters():
        group = decayed if p.dim() > 1 and not name.endswith("A_log") else others
        group.append(p)
    lr = torch.tensor(config["lr"], device=device)       # a CUDA graph reads it from memory
    groups = [{"params": decayed, "lr": lr, "weight_decay": config["weight_decay"]},
              {"params": others, "lr": lr, "weight_decay": 0.0}]
    return gpu.AdamW(groups, lr=lr, betas=BETAS, fused=True, capturable=device.type == "cuda")


def make_training_step(model, optimizer, config, generator):
    """-> training_step and its arguments: three functions, so that gpu.py can compile each."""
    B, L, K, M, tau = (config[flag] for flag in ("batch_size", "L", "K", "M", "tau"))
    uniform, device = config["train_lengths"] == "uniform", generator.device

    def compute_loss(tokens, labels, at):
        logits = model(tokens, at)       # (B, K) or (B, Q, K): only at the positions that count
        return torch.nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())

    def training_step(draw_batch, compute_loss, clip):   # it must draw from `generator` alone
        tokens, labels, at = draw_batch(B, L, K, M, tau, device, generator, uniform)
        loss = compute_loss(tokens, labels, at)
        optimizer.zero_grad()
        loss.backward()
        clip([p for p in model.parameters() if p.requires_grad], CLIP)
        optimizer.step()
        return loss.detach()

    return training_step, (TASKS[config["task"]], compute_loss, torch.nn.utils.clip_grad_norm_)


def train_one(config, path, title="", runs_left=0):
    """Train one model, test it, and write path.pt and path.json.

    title: prefix of its lines of progress; runs_left: how many runs with its shapes follow. Raises
    FloatingPointError if the loss becomes NaN or infinite, OSError if the result cannot be written.
    """
    device, steps = torch.device(config["device"]), config["steps"]

    # The model, its optimizer, and the random streams of training and of tests.
    torch.manual_seed(config["seed"])
    model = runs.model_from(config).to(device)
    optimizer = make_optimizer(model, config, device)
    rate = optimizer.param_groups[0]["lr"]       # the tensor of both groups, also in a resumed run
    draws = stream(config["seed"], "training", device)
    test_draws = stream(config["seed"], "test", device)

    # Continue a run that was killed.
    kept = {"model": model, "optimizer": optimizer, "training": draws, "testing": test_draws,
            "layers": gpu.default_generator(device)}         # nn.Dropout draws from it
    step, curves, seconds = runs.load_progress(path, kept, device, title)

    # next_step() is training_step, above, and next_test() a test. On CUDA they become graphs.
    training_step, functions = make_training_step(model, optimizer, config, draws)
    next_step = gpu.Captured("training step", training_step, functions, draws, config)
    next_test = gpu.Captured("test", lambda model: training_accuracy(model, config, test_draws),
                             [model], test_draws, config)

    every = max(1, steps // TESTS, min(STEPS_APART, steps // 20))
    last = last_step(curves, config)
    began = saved_at = time.monotonic()
    bar = Progress(steps, initial=step, desc=title)
    while step < last:
        # Set the learning rate, then draw a batch, compute the loss and its gradient, step AdamW.
        rate.fill_(learning_rate(step, last, config["lr"]))
        loss = next_step()
        step += 1
        bar.update()

        # Every `every` steps and at the end, test on fresh sequences: that decides when a run ends.
        if step % every and step < last:
            continue
        loss, accuracy = float(loss), float(next_test())
        if not math.isfinite(loss):
            bar.close()
            remove(path + ".resume.pt")
            raise FloatingPointError(f"the loss is {loss} by step {step}; a lower --lr than "
                                     f"{config['lr']:g} may help")
        for name, value in {"step": step, "loss": loss, "accuracy": accuracy}.items():
            curves[name].append(value)
        last = bar.total = last_step(curves, config)
        to_go = gpu.steps_left(step, last, runs_left)
        next_step.compile_if_it_pays(to_go)
        next_test.compile_if_it_pays(to_go // every)

        # Report progress, and save what a killed run needs to continue.
        bar.report(f"{title}step {step:,} of {last:,}, accuracy {accuracy:.3f}, loss {loss:.4f}")
        now = time.monotonic()
        if now - saved_at > SAVE_SECONDS and step < last:
            saved_at = now
            runs.save_progress(path, kept, step=step, curves=curves, seconds=seconds + now - began)
    bar.close()
    seconds += time.monotonic() - began

    # The test against context length. The result is written last: it marks a finished run.
    began = time.monotonic()
    lengths = lengths_to_test(config["L"], config["M"], config["tau"], config["task"])
    model.eval()
    accuracies = evaluate(model, config, lengths, EVAL_SEQUENCES, device, bar=True)
    checkpoint = runs.write_checkpoint(path + ".pt", model, config)
    result = {
        "config": config, "params": model.n_params(), "checkpoint": checkpoint, "train": curves,
        "state_bytes": {str(n): state_bytes(model, n) for n in STATE_TOKENS},
        "eval": {"length": lengths, "accuracy": accuracies, "sequences": EVAL_SEQUENCES},
        "env": runs.environment(device),
        "seconds": {"train": round(seconds, 3), "eval": round(time.monotonic() - began, 3)}}
    runs.write_json(path + ".json", result)
    remove(path + ".resume.pt")
    first, solved = solved_at(curves, tests=1), solved_at(curves)
    ended = f"stopped at step {step:,}, not solved; more --steps may help"
    if solved:
        ended = f"first {SOLVED} at step {first:,}, solved at step {solved:,}, stopped at {step:,}"
    say(f"{title}{ended}\n{title}wrote {path}.json")
    print_table(result)
    if not title and config["task"] == "recall":             # a command's only run has no title
        show_answers(model, config, device)


def configs_from(argv=None):
    """Parse a command -> a config for each run. Makes their folder, sets torch's threads."""
    parser, args = parse(argv)
    try:
        configs = configs_of(args)
        prepare_folder(args.out)
    except ValueError as error:
        parser.error(str(error))
    if configs[0]["device"] == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)     # on small models more gain little, and slow other programs
    return configs


def main(argv=None):
    """Make the runs of a command; returns their results."""
    return make_all(configs_from(argv), train_one, print_table)


if __name__ == "__main__":
    main()
