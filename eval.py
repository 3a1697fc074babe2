"""Accuracy of a trained model against context length, up to a million tokens for models of Mamba layers alone.

    python eval.py results/X.pt                         every length from tau + 1 to 3L
    python eval.py results/X.pt --lengths 64 1024 65536

The numbers are printed and added to the run's JSON, results/X.json.

Imports data and runs; train tests with it. All models are causal, which is what makes this cheap: sequences of different
lengths share a forward pass, each read at its own last token, and long sequences go through in pieces.
"""

import argparse
import os
import time

import torch

from data import recall_batch
from runs import load_run, pick_device, short_errors, write_json

BATCH_ROWS = 2048    # contexts that go through the model together,
HELD_TOKENS = 2**22  # but no more tokens than this (on CUDA four times as many), which bounds the memory beside the model's
PIECE = 4096         # tokens of a context that go through the model at once


@torch.no_grad()
def accuracy_by_length(model, lengths, K, M, tau, sequences=1024, device="cpu", seed=0):
    """The share of sequences of each context length whose most likely answer is the label: a list like `lengths`.

    Every length is tested on `sequences` independent draws of the task, but a draw of one length can serve the next:
    cut off after l tokens and followed by its query, a longer context is a context of length l, so long as the
    value has been seen. Only the query's position must stay uniform over 1 ... l - tau. Going from l0 to l, it does if a
    sequence is kept with probability (l0 - tau) / (l - tau) and otherwise replaced by a fresh one with its query in
    the part that is new (reservoir sampling). So 1024 sequences at each of 191 lengths need 6,000 contexts, not 200,000.
    """
    generator = torch.Generator(device).manual_seed(2**40 + seed)                      # no training run draws from this
    held = HELD_TOKENS * (4 if torch.device(device).type == "cuda" else 1)
    order = sorted(set(lengths))
    new = torch.tensor(order, device=device) - tau                                     # positions allowed at each length
    old = torch.cat([new.new_zeros(1), new[:-1]])                                      # and at the length before it
    uniform = torch.rand(2, sequences, len(order), device=device, generator=generator)
    fresh = uniform[0] >= old / new                                                    # (sequences, lengths)
    i = old + (uniform[1] * (new - old)).long().clamp(max=new - old - 1)               # from 0, if fresh
    begin = fresh.flatten().nonzero()[:, 0]              # a context serves the cells from here to where the next begins
    end = torch.cat([begin[1:], begin.new_tensor([fresh.numel()])]) - 1
    i, first, last = i.flatten()[begin], begin % len(order), end % len(order)          # of every context

    correct = torch.zeros(len(order), dtype=torch.long, device=device)
    rank = last.argsort(stable=True, descending=True)                                  # so that a batch ends together
    while len(rank):
        longest = order[last[rank[0]]]
        batch, rank = rank.tensor_split([max(1, min(BATCH_ROWS, held // longest))])
        final = int(last[batch].max())
        tokens, labels = recall_batch(len(batch), order[final], K, M, tau, device, generator, i=i[batch])
        states, start = None, 0
        for k, length in enumerate(order[:final + 1]):
            for piece in tokens[:, start:length].split(PIECE, dim=1):
                _, states = model.stream(piece, states)
            start = length
            asked = ((first[batch] <= k) & (k <= last[batch])).nonzero()[:, 0]         # the contexts that serve this length
            if len(asked):
                x, _ = model.stream(tokens[asked, -1:], model.select(states, asked))
                correct[k] += (model.head(x[:, -1]).argmax(-1) == labels[asked]).sum()
    accuracy = {length: count / sequences for length, count in zip(order, correct.tolist())}
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
