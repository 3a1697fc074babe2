"""Accuracy against context length, for recall up to a million tokens.

    python eval.py results/X.pt                         every length to 3L, if not too many
    python eval.py results/X.pt --lengths 64 1024 65536

The numbers are printed and saved in results/X.json, where they replace older ones, unless those are
from more sequences. On one device, a command always draws the same sequences for a model.
`evaluate` picks a method: accuracy_by_length for recall, accuracy_one_by_one for other tasks.
"""

import argparse
import math
import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)     # Ctrl-C prints no traceback, even in imports

import torch

from data import TASKS, recall_batch, shortest, stream
from gpu import pick_device
from grid import locked
from output import Parser, Progress, say
from runs import counts_of, digest_of, is_current, load_run, read_result, write_json

TEST_SEQUENCES = 512     # of a test during training
SEGMENT = 4096           # a long context is read in segments of at most this many tokens
CALL_FLOATS = 2**18      # limit on rows x tokens x d in a call; Mamba needs 1 kB for each
SCORES_PER_FLOAT = 64    # with attention, length / 64 replaces d in this limit if it is larger
HELD_TOKENS = 2**20      # limit on rows x context length drawn together
CUDA_FACTOR = 16         # a GPU gets this many times both limits
NEIGHBOURS = 8           # neighbouring lengths go into this many different groups
EVENLY = 768             # evenly spaced lengths after training, at most,
EVENLY_ALONE = 24        # and for tasks whose lengths cannot share contexts


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
        accuracies.append(batch_accuracy(model, *batch).item())
        progress.update(length)
        progress.report(f"testing: {progress.n / progress.total:.0%}")
    progress.close()
    return accuracies


def batch_accuracy(model, tokens, labels, at):
    """Accuracy on a batch, a tensor (). The batch is split, to limit memory."""
    length, correct = tokens.shape[1], []
    rows, _ = per_call(model, length, most=length)           # a whole context is one segment
    for start in range(0, len(tokens), rows):
        part = slice(start, start + rows)
        answers = model(tokens[part], None if at is None else at[part]).argmax(-1)
        correct.append(answers == labels[part].view_as(answers))     # (B, 1) would broadcast
    return torch.cat(correct).float().mean()


def per_call(model, length, most=SEGMENT):
    """Limits of a call of the model, so that it fits into memory -> rows, segment.

    rows: contexts of this length to process together, a power of two: then a test of 512 has parts
    of one shape, compiled once. segment: how many of their tokens at a time, at most `most`."""
    factor = CUDA_FACTOR if model.embedding.weight.is_cuda else 1
    floats = model.embedding.embedding_dim                               # per token
    if any(getattr(layer, "attends", False) for layer in model.layers):
        floats = max(floats, length // SCORES_PER_FLOAT)
    segment = max(1, min(length, most, factor * CALL_FLOATS // floats))
    rows = int(factor * min(CALL_FLOATS / (segment * floats), HELD_TOKENS / length))
    return 2 ** (max(1, rows).bit_length() - 1), segment     # the power of two not above rows


# ---- many lengths at once ------------------------------------------------------------------------

@torch.no_grad()
def accuracy_by_length(model, lengths, K, M, tau, sequences=1024, device="cpu", seed=0, bar=False):
    """Accuracy on recall at each length, from at least `sequences` contexts: a list like `lengths`.

    Cut a context short after n tokens. If its value is still among them, it is distributed like a
    context of length n: the position of its query is still uniform. So, for each group of lengths:

    1. draw contexts of its longest length, with the query's positions spread evenly;
    2. read them once, and ask the query at every length of the group;
    3. at each length, count only the contexts that are complete: the value is among their tokens.
    """
    generator, accuracy = stream(seed, "evaluation", device), {}
    places = stream(seed, "places")          # of the queries; on the CPU, the same for any device
    plan = [(group, n_contexts(group, tau, sequences)) for group in groups(lengths, tau)]
    progress = Progress(sum(n * group[-1] for group, n in plan), quiet=not bar, desc="testing")
    for group, n in plan:
        # 1. Cut the positions into n equal parts, and put a query at a random place in each.
        longest, positions = group[-1], group[-1] - tau
        u = torch.arange(n) + torch.rand(n, dtype=torch.float64, generator=places)           # (n,)
        i = (u / n * positions).long().clamp(max=positions - 1).to(device)                   # (n,)
        correct, complete = torch.zeros(2, len(group), dtype=torch.int64, device=device)
        rows, segment = per_call(model, longest)
        for i_b in i.split(rows):
            tokens, labels = recall_batch(len(i_b), longest, K, M, tau, device, generator, i=i_b)
            # 2. The answers at every length. 3. The count.
            for k, answers in enumerate(answers_at(model, tokens, group, segment, progress)):
                is_complete = i_b + tau < group[k]
                correct[k] += ((answers == labels) & is_complete).sum()
                complete[k] += is_complete.sum()
        accuracy.update(zip(group, (correct / complete).tolist()))
    progress.close()
    return [accuracy[length] for length in lengths]


def groups(lengths, tau):
    """Split lengths into groups that share their contexts -> sorted lists, the longest first.

    The longest of a group has at most twice as many positions for the query as the shortest, so
    that at least half of the contexts are complete at any length. Lengths of a group share
    contexts, so their errors are correlated. Neighbours are put into different groups, so that
    errors average out along a curve: the mean to 3L, of 1,024 sequences each, has a standard
    deviation below 0.004.
    """
    lengths = sorted(set(lengths))
    while lengths:
        near = [length for length in lengths if lengths[-1] - tau <= 2 * (length - tau)]
        lengths = lengths[:-len(near)]
        for first in range(min(NEIGHBOURS, len(near))):      # dealt out like cards
            yield near[first::NEIGHBOURS]


def n_contexts(group, tau, sequences):
    """How many contexts to draw, so that at least `sequences` are complete at the shortest length.
    Above four per position, the next multiple of the positions: each is used equally often."""
    positions = group[-1] - tau
    n = math.ceil(sequences * positions / (group[0] - tau))
    return math.ceil(n / positions) * positions if n > 4 * positions else n


def answers_at(model, tokens, lengths, segment, progress):
    """Read tokens (n, L + 1) once, and yield the answers (n,) to its query after each length."""
    states, start = None, 0
    for length in lengths:
        for part in tokens[:, start:length].split(segment, dim=1):
            # Only the states are needed: the last layer may leave out most outputs.
            _, states = model.run_layers(part, states, last_only=True)
            progress.update(part.numel())
            progress.report(f"testing: {progress.n / progress.total:.0%}")
        start = length
        x, _ = model.run_layers(tokens[:, -1:], states)      # the query; its state is dropped
        yield model.head(x[:, -1]).argmax(-1)


@torch.no_grad()
def training_accuracy(model, config, generator):
    """During training: accuracy on TEST_SEQUENCES sequences of the training length, a tensor ()."""
    K, M, tau, L = (config[flag] for flag in ("K", "M", "tau", "L"))
    task = TASKS[config["task"]]
    batch = task(TEST_SEQUENCES, L, K, M, tau, generator.device, generator, False)
    model.eval()                                             # a layer may behave differently then
    accuracy = batch_accuracy(model, *batch)
    model.train()
    return accuracy


def evaluate(model, config, lengths, sequences, device, seed=0, bar=False):
    """Accuracy of a run's model at these lengths, on its own task: a list like `lengths`."""
    K, M, tau, task = (config[flag] for flag in ("K", "M", "tau", "task"))
    with torch.random.fork_rng(devices=[]):                  # the caller's generator stays as it is
        tokens, _, _ = TASKS[task](1, max(lengths), K, M, tau, "cpu", None, False)   # its length
        torch.default_generator.manual_seed(seed)            # for rows that extend_positions adds
        model.extend_positions(tokens.shape[1])
    if task == "recall":
        return accuracy_by_length(model, lengths, K, M, tau, sequences, device, seed, bar)
    return accuracy_one_by_one(model, lengths, K, M, tau, sequences, device, seed, task, bar)


def lengths_to_test(L, M=1, tau=1, task="recall"):
    """Every length from the shortest to 3L; if too many, evenly spaced ones and `some_lengths`."""
    least = shortest(M, tau, task)
    most = EVENLY if task == "recall" else EVENLY_ALONE
    apart = math.ceil((3 * L + 1 - least) / most)
    return sorted({*range(3 * L, least - 1, -apart), *some_lengths(L, least)})


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


# ---- the command ---------------------------------------------------------------------------------

def merged(old, lengths, accuracies, sequences):
    """The eval section with new numbers, except where an old one comes from more sequences.

    In the result, "sequences" is one number if all lengths agree, otherwise a list like "length".
    """
    rows = dict(zip(old["length"], zip(old["accuracy"], counts_of(old))))
    for n, accuracy in zip(lengths, accuracies):
        if n not in rows or rows[n][1] <= sequences:
            rows[n] = accuracy, sequences
    accuracies, counts = zip(*(rows[n] for n in sorted(rows)))
    return {"length": sorted(rows), "accuracy": list(accuracies),
            "sequences": counts[0] if len(set(counts)) == 1 else list(counts)}


def result_of(stem, digest):
    """The result in stem.json, if it is of the model with this SHA-256; otherwise None."""
    result = read_result(stem + ".json")
    return result if result and result.get("checkpoint") == digest else None


def save(path, digest, lengths, accuracies, sequences):
    """Add the numbers of a checkpoint, which had this SHA-256, to the JSON of the same model."""
    stem = os.path.splitext(path)[0]
    why = "damaged or of another model" if os.path.exists(stem + ".json") else "not there"
    if result_of(stem, digest):                      # else no need to wait for the lock
        with locked(stem, wait=True):                # two processes must not overwrite each other
            result = result_of(stem, digest)
            if result and is_current(result["env"].get("code")):
                result["eval"] = merged(result["eval"], lengths, accuracies, sequences)
                write_json(stem + ".json", result)
                return
            why = "of another version of the code" if result else why
    say(f"{stem}.json is {why}: only printed")


def main(argv=None):
    """Test checkpoints; returns a list of (lengths, accuracies), one for each."""
    parser = Parser("eval.py", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="*", metavar="RUN.pt", help="checkpoints of train.py")
    add("--lengths", nargs="+", action="extend", default=[], metavar="N", help="default: up to 3L")
    add("--sequences", type=int, default=1024, metavar="N", help="per length (default: 1024)")
    add("--seed", type=int, default=0, metavar="N", help="of the test sequences (default: 0)")
    add("--device", help="cuda, cuda:1, mps or cpu (default: the best one here)")
    add("--no-save", action="store_true", help="leave the JSON as it is")
    args = parser.parse_intermixed_args(argv)
    # In `--lengths 5 X.pt`, argparse takes X.pt for a length.
    files = [word for word in args.lengths if word.endswith(".pt")]
    words = [word for word in args.lengths if word not in files]
    paths = dict.fromkeys(args.checkpoints + files)
    paths = [path for path in paths if not path.endswith(".resume.pt")]      # of unfinished runs
    try:
        device = pick_device(args.device)
        if not paths:
            raise ValueError("RUN.pt is missing: name the checkpoint of a finished run")
        for word in words:
            if not word.removeprefix("-").isdecimal():
                raise ValueError(f"--lengths has {word!r}, but lengths are whole numbers: 64 128")
        lengths = sorted(set(map(int, words)))
        if args.sequences < 1:
            raise ValueError(f"--sequences is {args.sequences}, but it must be at least 1")
        if not 0 <= args.seed < 2**30:
            raise ValueError(f"--seed is {args.seed}, but it must be from 0 to 2^30 - 1")
        checkpoints = [(path, digest_of(path), *load_run(path, device)) for path in paths]
        for path, _, _, c in checkpoints:
            least = shortest(c["M"], c["tau"], c["task"])
            most = 2**26 if c["task"] == "recall" else 2**16             # for gigabytes of memory
            for n in lengths:
                if not least <= n <= most:
                    raise ValueError(f"--lengths has {n}, but {path} takes {least} to {most:,}")
    except ValueError as error:
        parser.error(str(error))
    found, unwritten = [], []
    for path, digest, model, c in checkpoints:
        tested = lengths or lengths_to_test(c["L"], c["M"], c["tau"], c["task"])
        accuracies = evaluate(model, c, tested, args.sequences, device, args.seed, bar=True)
        found.append((tested, accuracies))
        say(path)
        print_table({"config": c, "eval": {"length": tested, "accuracy": accuracies}}, lengths)
        try:
            if not args.no_save:
                save(path, digest, tested, accuracies, args.sequences)
        except OSError as error:
            unwritten.append(f"the numbers of {path} were not written: {error.strerror}")
    if unwritten:
        sys.exit("eval.py: " + "; ".join(unwritten))
    return found


if __name__ == "__main__":
    main()
