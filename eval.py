"""Accuracy of a trained model against context length, to a million tokens for models without attention.

    python eval.py results/X.pt                         every length from tau + 1 to 3L
    python eval.py results/X.pt --lengths 64 1024 65536

The numbers are printed and added to the run's JSON, results/X.json.
"""

import argparse
import math
import os
import time

import torch
from tqdm import tqdm

from data import recall_batch, stream
from runs import load_run, pick_device, short_errors, write_json

SEGMENT = 4096       # tokens of a context that are read in one call
BATCH_ROWS = 512     # contexts in a batch,
HELD_TOKENS = 2**22  # and the most tokens in a batch, which bounds memory; four times as many on CUDA
STRIDE = 6           # lengths of one group: every sixth of a block


def accuracy_one_by_one(model, lengths, K, M, tau, sequences=1024, device="cpu", seed=0):
    """Accuracy at each length, from sequences of exactly that length: a list like `lengths`.

    The definition. For 191 lengths it reads 20 million tokens; `accuracy_by_length` reads 5 million.
    """
    generator, accuracies = stream(seed, "evaluation", device), []
    for length in lengths:
        tokens, labels = recall_batch(sequences, length, K, M, tau, device, generator)
        with torch.no_grad():
            answers = model(tokens).argmax(-1)
        accuracies.append((answers == labels).float().mean().item())
    return accuracies


def groups(lengths, tau):
    """Split lengths into groups that can share their contexts: lists of lengths, sorted.

    In a group the longest has at most twice as many positions for the query as the shortest. Neighbours are
    in different groups: lengths that share contexts also share their luck, and the mean of a curve over
    many lengths would be as uncertain as a single point of it. With six groups for each factor of two, its
    standard deviation is below 0.004 for 1,024 sequences at each length.
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

    A context cut short is again a context, as long as its value has been seen, and the query's position is
    uniform among those that are. So draw contexts of the longest length of a group with positions spread
    evenly, read them once, and ask the query at every length of the group on the way.
    """
    generator, accuracy = stream(seed, "evaluation", device), {}
    held = HELD_TOKENS * (4 if torch.device(device).type == "cuda" else 1)
    plan = list(groups(lengths, tau))
    progress = tqdm(total=sum(group[-1] for group in plan), desc="testing", unit=" tokens", leave=False,
                    disable=None if bar else True)
    for group in plan:
        longest, positions = group[-1], group[-1] - tau
        n = math.ceil(sequences * positions / (group[0] - tau)) + 1
        spread = torch.rand(n, dtype=torch.float64, device="cpu", generator=stream(seed, "evaluation"))
        i = ((torch.arange(n) + spread) / n * positions).long().clamp(max=positions - 1).to(device)
        correct, asked = torch.zeros(2, len(group), dtype=torch.int64, device=device)
        for i_b in i.split(max(1, min(BATCH_ROWS, held // longest))):
            tokens, labels = recall_batch(len(i_b), longest, K, M, tau, device, generator, i=i_b)
            states, start = None, 0
            for k, length in enumerate(group):
                for segment in tokens[:, start:length].split(SEGMENT, dim=1):
                    _, states = model.run_layers(segment, states)
                start = length
                x, _ = model.run_layers(tokens[:, -1:], states)          # the query; its state is dropped
                right = model.head(x[:, -1]).argmax(-1) == labels
                seen = i_b + tau < length
                correct[k] += (right & seen).sum()
                asked[k] += seen.sum()
            progress.update(longest * len(i_b) / n)
        accuracy.update(zip(group, (correct / asked).tolist()))
    progress.close()
    return [accuracy[length] for length in lengths]


def print_table(lengths, accuracies, L):
    print("context length  " + " ".join(f"{n:>7}" for n in lengths))
    print("accuracy        " + " ".join(f"{a:7.3f}" for a in accuracies) + f"    (trained at {L})")


def some_lengths(L, tau):
    """A few lengths below, at and beyond L, for a table that fits a terminal."""
    return sorted({n for n in (tau + 1, L // 8, L // 4, L // 2, L, 3 * L // 2, 2 * L, 3 * L) if n > tau})


def main(argv=None):
    parser = short_errors(argparse.ArgumentParser(description="Accuracy of a trained model against context length."))
    parser.add_argument("checkpoints", nargs="+", metavar="RUN.pt", help="checkpoints that train.py wrote")
    parser.add_argument("--lengths", type=int, nargs="+", metavar="N",
                        help="context lengths (default: every length from tau + 1 to 3L)")
    parser.add_argument("--sequences", type=int, default=1024, metavar="N", help="sequences of each length (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the test sequences (default: 0)")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best one here)")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        if args.sequences < 1:
            raise ValueError(f"--sequences is {args.sequences}, but it must be at least 1")
        if not 0 <= args.seed < 2**32:
            raise ValueError(f"--seed is {args.seed}, but it must be from 0 to 2^32 - 1")
        runs = [(path, *load_run(path, device)) for path in args.checkpoints]
        for path, _, record in runs:
            tau = record["config"]["tau"]
            if min(args.lengths or [tau + 1]) <= tau:
                raise ValueError(f"--lengths has {min(args.lengths)}, but {path} needs at least tau + 1 = {tau + 1}")
            if max(args.lengths or [0]) >= 2**31:
                raise ValueError(f"--lengths has {max(args.lengths)}, but it must be below 2^31")
    except ValueError as error:
        parser.error(str(error))

    torch.set_flush_denormal(True)                             # a CPU is slow with numbers that are next to nothing
    for path, model, record in runs:
        c, began = record["config"], time.time()
        lengths = sorted(set(args.lengths or range(c["tau"] + 1, 3 * c["L"] + 1)))
        torch.manual_seed(args.seed)
        model.reach(lengths[-1] + 1)
        accuracies = accuracy_by_length(model, lengths, c["K"], c["M"], c["tau"], args.sequences, device, args.seed)
        record["eval"] = merged(record["eval"], lengths, accuracies, args.sequences)
        record["seconds"]["eval"] = time.time() - began
        write_json(os.path.splitext(path)[0] + ".json", record)
        print(path)
        shown = args.lengths or some_lengths(c["L"], c["tau"])
        print_table(shown, [accuracies[lengths.index(n)] for n in shown], c["L"])


def merged(old, lengths, accuracies, sequences):
    """The eval section with new lengths added and measured ones replaced; `sequences` is one number where all agree."""
    counts = old["sequences"] if isinstance(old["sequences"], list) else [old["sequences"]] * len(old["length"])
    rows = {n: (a, s) for n, a, s in zip(old["length"], old["accuracy"], counts)}
    rows.update({n: (a, sequences) for n, a in zip(lengths, accuracies)})
    length = sorted(rows)
    counts = [rows[n][1] for n in length]
    return {"length": length, "accuracy": [rows[n][0] for n in length],
            "sequences": counts[0] if len(set(counts)) == 1 else counts}


if __name__ == "__main__":
    main()
