"""Accuracy of a trained model against context length, up to a million tokens for Mamba.

    python eval.py results/X.pt                         lengths up to 3L: all if L is at most 256
    python eval.py results/X.pt --lengths 64 1024 65536

The numbers are printed, and added to results/X.json unless it has some from more sequences.
"""

import argparse
import math
import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C prints no traceback, even in imports

import torch

from data import TASKS, recall_batch, shortest, show, stream
from grid import locked
from output import Progress, say, short_errors
from runs import load_run, pick_device, read_result, write_json
from summary import DEFAULTS, TEST_SEQUENCES

SEGMENT = 4096       # most tokens per call when a long context is processed
BATCH_ROWS = 512     # most contexts drawn together on a CPU,
HELD_TOKENS = 2**20  # and most tokens: a context of a million is drawn alone
CUDA_FACTOR = 16     # on CUDA, both limits are this many times as high
CALL_FLOATS = 2**22  # most rows x tokens x d per call: Mamba needs a kilobyte for each, 4 GB in all
MOST_LENGTHS = 768   # tested after training; up to L = 256 these are all lengths to 3L
MOST_LENGTHS_ALONE = 24      # of tasks whose lengths cannot share contexts
STRIDE = 8           # neighbouring lengths go into eight different groups: see `groups`


@torch.no_grad()
def accuracy_one_by_one(model, lengths, K, M, tau, sequences=1024, device="cpu", seed=0,
                        task="recall", bar=False):
    """Accuracy at each length, from sequences of exactly that length: a list like `lengths`.

    This is the definition. For 191 lengths it processes 19 million tokens; `accuracy_by_length`
    processes fewer than 6 million.
    """
    generator, accuracies = stream(seed, "evaluation", device), []
    progress = Progress(sum(lengths), quiet=not bar, desc="testing")
    for length in lengths:
        batch = TASKS[task](sequences, length, K, M, tau, device, generator, False)
        accuracies.append(accuracy_of(model, *batch).item())
        progress.update(length)
        progress.report(f"testing: {progress.n / progress.total:.0%}")
    progress.close()
    return accuracies


def accuracy_of(model, tokens, labels, at):
    """Accuracy on a batch, a tensor (). The batch is split, to limit memory."""
    rows, right = rows_per_call(model, tokens.shape[1]), []
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        answers = model(tokens[part], None if at is None else at[part]).argmax(-1)
        right.append(answers == labels[part].view_as(answers))
    return torch.cat(right).float().mean()


def rows_per_call(model, tokens):
    """The number of sequences of this length per call: a power of two, so that the parts of a test
    have one shape, and a compiler compiles once."""
    rows = CALL_FLOATS // (model.embedding.embedding_dim * tokens)
    return 2 ** (max(1, rows).bit_length() - 1)


def groups(lengths, tau):
    """Split lengths into groups that can share their contexts: lists of lengths, sorted.

    In a group, the longest has at most about twice as many positions for the query as the shortest.
    Neighbours are in different groups, because lengths that share contexts share their error: in a
    single group, the mean of a curve would be as uncertain as one of its points. With eight groups
    for each factor of two, the mean to 3L of 1,024 sequences each has a deviation below 0.004.
    """
    lengths = sorted(set(lengths))
    while lengths:
        block = [length for length in lengths if lengths[-1] - tau <= 2 * (length - tau) + 1]
        lengths = lengths[:-len(block)]
        for first in range(min(STRIDE, len(block))):
            yield block[first::STRIDE]


@torch.no_grad()
def accuracy_by_length(model, lengths, K, M, tau, sequences=1024, device="cpu", seed=0, bar=False):
    """Accuracy at each length, from at least `sequences` contexts: a list like `lengths`.

    The first tokens of a context are a shorter context, provided that its value is among them, and
    the query's position in it is uniform too. So, for each group of lengths:

    1. draw contexts of its longest length, with the query's positions spread evenly;
    2. read them once, and ask the query at every length of the group;
    3. at each length, count only the contexts whose value has come by then.
    """
    generator, accuracy = stream(seed, "evaluation", device), {}
    scale = CUDA_FACTOR if torch.device(device).type == "cuda" else 1
    plan = [(group, n_contexts(group, tau, sequences)) for group in groups(lengths, tau)]
    progress = Progress(sum(n * group[-1] for group, n in plan), quiet=not bar, desc="testing")
    for group, n in plan:
        longest, positions = group[-1], group[-1] - tau
        # 1. Contexts; each nth part of the positions has one query, at a random place.
        jitter = torch.rand(n, dtype=torch.float64, generator=stream(seed, "evaluation"))
        i = ((torch.arange(n) + jitter) / n * positions).long().clamp(max=positions - 1).to(device)
        correct, asked = torch.zeros(2, len(group), dtype=torch.int64, device=device)
        rows = max(1, min(scale * BATCH_ROWS, scale * HELD_TOKENS // longest))
        for i_b in i.split(min(rows, rows_per_call(model, min(longest, SEGMENT)))):
            tokens, labels = recall_batch(len(i_b), longest, K, M, tau, device, generator, i=i_b)
            for k, answers in enumerate(answers_at(model, tokens, group, progress)):      # 2
                has_come = i_b + tau < group[k]                                           # 3
                correct[k] += ((answers == labels) & has_come).sum()
                asked[k] += has_come.sum()
        accuracy.update(zip(group, (correct / asked).tolist()))
    progress.close()
    return [accuracy[length] for length in lengths]


def n_contexts(group, tau, sequences):
    """How many contexts of the longest length a group needs: in `sequences` of them or more, the
    value has come by the shortest. If there are many, each position occurs equally often."""
    positions = group[-1] - tau
    n = math.ceil(sequences * positions / (group[0] - tau)) + 1          # + 1 against rounding
    return math.ceil(n / positions) * positions if n > 4 * positions else n


def answers_at(model, tokens, lengths, progress):
    """Read tokens (n, L + 1) once, and yield the answers (n,) to its query after each length."""
    states, start = None, 0
    for length in lengths:
        for segment in tokens[:, start:length].split(SEGMENT, dim=1):
            # Only the states are needed: the last layer may leave out most outputs.
            _, states = model.run_layers(segment, states, last_only=True)
            progress.update(segment.numel())
            progress.report(f"testing: {progress.n / progress.total:.0%}")
        start = length
        x, _ = model.run_layers(tokens[:, -1:], states)      # the query; its state is dropped
        yield model.head(x[:, -1]).argmax(-1)


@torch.no_grad()
def accuracy_now(model, config, generator, device):
    """During training: accuracy on TEST_SEQUENCES sequences of the training length, a tensor ()."""
    K, M, tau, L = (config[flag] for flag in ("K", "M", "tau", "L"))
    batch = TASKS[config["task"]](TEST_SEQUENCES, L, K, M, tau, device, generator, False)
    model.eval()
    accuracy = accuracy_of(model, *batch)
    model.train()
    return accuracy


def evaluate(model, config, lengths, sequences, device, seed=0, bar=False):
    """Accuracy of a run's model at these lengths, on its own task: a list like `lengths`."""
    K, M, tau, task = (config[flag] for flag in ("K", "M", "tau", "task"))
    tokens, _, _ = TASKS[task](1, max(lengths), K, M, tau, "cpu", None, False)
    torch.manual_seed(seed)                                  # for rows that extend_positions adds
    model.extend_positions(tokens.shape[1])
    if task == "recall":
        return accuracy_by_length(model, lengths, K, M, tau, sequences, device, seed, bar)
    return accuracy_one_by_one(model, lengths, K, M, tau, sequences, device, seed, task, bar)


def lengths_to_test(L, M=1, tau=1, task="recall"):
    """Every length from the shortest to 3L, or about MOST_LENGTHS of them.

    For other tasks than recall, about MOST_LENGTHS_ALONE: eight up to L, sixteen beyond.
    """
    least = shortest(M, tau, task)
    lengths = range(least, 3 * L + 1)
    most = MOST_LENGTHS if task == "recall" else MOST_LENGTHS_ALONE
    if len(lengths) <= most:
        return list(lengths)
    chosen = {round(3 * L * k / most) for k in range(1, most + 1)} | set(some_lengths(L, least))
    return sorted(n for n in chosen if n in lengths)


def some_lengths(L, least):
    """A few lengths below, at and beyond L, for a table that fits into a terminal."""
    lengths = least, L // 8, L // 4, L // 2, L, 3 * L // 2, 2 * L, 3 * L
    return sorted({n for n in lengths if n >= least})


def print_table(result, lengths=None):
    """Print a result's accuracies, eight per line, at these lengths or a few."""
    L, evaluation = result["config"]["L"], result["eval"]
    accuracy = dict(zip(evaluation["length"], evaluation["accuracy"]))
    lengths = [n for n in lengths or some_lengths(L, min(accuracy)) if n in accuracy]
    for k in range(0, len(lengths), 8):
        say("length   " + " ".join(f"{n:>7}" for n in lengths[k:k + 8]))
        say("accuracy " + " ".join(f"{accuracy[n]:7.3f}" for n in lengths[k:k + 8]))
    say(f"(trained at {L})")


def show_answers(model, config, device):
    """Print three sequences of recall, with the model's answers."""
    if config["task"] != "recall":
        return
    L, K, M, tau, seed = (config[flag] for flag in ("L", "K", "M", "tau", "seed"))
    tokens, labels = recall_batch(3, L, K, M, tau, device, stream(seed, "evaluation", device))
    with torch.no_grad():
        answers = model(tokens).argmax(-1)
    for row, answer, label in zip(tokens, answers.tolist(), labels.tolist()):
        verdict = "right" if answer == label else f"wrong, the value is {label}"
        say(f"{show(row, tau)}  ->  {answer}, {verdict}")


def main(argv=None):
    """Test checkpoints; returns a list of (lengths, accuracies), one for each."""
    parser = short_errors(argparse.ArgumentParser(
        description="Accuracy of trained models against context length. The numbers go into each "
                    "run's JSON, unless it has numbers from more sequences."))
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="RUN.pt", help="checkpoints of train.py")
    add("--lengths", nargs="+", default=[], metavar="N",
        help="context lengths (default: up to 3L, all if L is at most 256)")
    add("--sequences", type=int, default=1024, metavar="N",
        help="least number of sequences per length (default: 1024)")
    add("--seed", type=int, default=0, metavar="N", help="of the test sequences (default: 0)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the best one here)")
    add("--no-save", action="store_true", help="leave the JSON as it is")
    args = parser.parse_intermixed_args(argv)
    # In `--lengths 5 X.pt`, argparse takes X.pt for a length, so sort them out here.
    numbers = [word for word in args.lengths if word.removeprefix("-").isdecimal()]
    others = [word for word in args.lengths if word not in numbers]
    lengths = sorted(set(map(int, numbers)))
    paths = [p for p in dict.fromkeys(args.checkpoints + others) if not p.endswith(".resume.pt")]
    try:
        device = pick_device(args.device)
        if not paths:
            raise ValueError("RUN.pt is missing: name at least one checkpoint of a finished run")
        for word in others:
            if not word.endswith(".pt"):
                raise ValueError(f"--lengths has {word!r}, but lengths are whole numbers: 64 128")
        if args.sequences < 1:
            raise ValueError(f"--sequences is {args.sequences}, but it must be at least 1")
        if not 0 <= args.seed < 2**30:
            raise ValueError(f"--seed is {args.seed}, but it must be from 0 to 2^30 - 1")
        if lengths and lengths[-1] >= 2**31:
            raise ValueError(f"--lengths has {lengths[-1]}, but it must be below 2^31")
        checkpoints = [(path, *load_run(path, device)) for path in paths]
        for path, _, c in checkpoints:
            least = shortest(c["M"], c["tau"], c["task"])
            if lengths and lengths[0] < least:
                raise ValueError(f"--lengths has {lengths[0]}, but {path} needs at least {least}")
            if not args.no_save and not os.access(os.path.dirname(path) or ".", os.W_OK):
                raise ValueError(f"{path} is in a read-only folder; --no-save only prints")
    except ValueError as error:
        parser.error(str(error))

    found = []
    for path, model, c in checkpoints:
        tested = lengths or lengths_to_test(c["L"], c["M"], c["tau"], c["task"])
        torch.set_flush_denormal(True)       # a CPU computes denormal floats 10 to 50 times slower
        try:
            accuracies = evaluate(model, c, tested, args.sequences, device, args.seed, bar=True)
        finally:
            torch.set_flush_denormal(False)
        found.append((tested, accuracies))
        say(path)
        print_table({"config": c, "eval": {"length": tested, "accuracy": accuracies}}, lengths)
        stem = os.path.splitext(path)[0]
        if args.no_save:
            continue
        try:
            with locked(stem):                       # two processes must not overwrite each other
                result = read_result(stem + ".json")
                if result is None or {**DEFAULTS, **result["config"]} != c:
                    say(f"{stem}.json is missing, damaged or of another run: only printed")
                    continue
                result["eval"] = merged(result["eval"], tested, accuracies, args.sequences)
                write_json(stem + ".json", result)
        except OSError as error:
            sys.exit(f"eval.py: the numbers of {path} were not written: {error.strerror}")
    return found


def merged(old, lengths, accuracies, sequences):
    """The eval section with new numbers, except where an old one comes from more sequences.

    In the result, "sequences" is one number if all lengths agree, otherwise a list like "length".
    """
    counts = old["sequences"]
    if not isinstance(counts, list):
        counts = [counts] * len(old["length"])
    rows = dict(zip(old["length"], zip(old["accuracy"], counts)))
    for n, accuracy in zip(lengths, accuracies):
        if n not in rows or rows[n][1] <= sequences:
            rows[n] = accuracy, sequences
    accuracies, counts = zip(*(rows[n] for n in sorted(rows)))
    return {"length": sorted(rows), "accuracy": list(accuracies),
            "sequences": counts[0] if len(set(counts)) == 1 else list(counts)}


if __name__ == "__main__":
    main()
