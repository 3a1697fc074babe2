"""Test rotary attention with position interpolation, after Chen et al. 2023, arXiv 2306.15595.

    python train.py --model rope --M 4 --seed 0 1 2 3 4
    python report/interpolate.py results/rope_M4_*.pt

In a context of n tokens, n > L, positions are multiplied by L / n. All distances between two tokens
are then at most L, but most are fractions, which training never had. The published method has one
factor for all lengths, and trains a little longer with it; this is the test alone.

Writes rope-interpolated_....json beside each run, for plot.py. All but its name and its accuracies
beyond L is that of the run; "tested" says where they were measured.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

from attention import Attention
from eval import evaluate
from gpu import pick_device
from output import Parser, Progress
from runs import environment, load_run, read_result, run_name, write_json


def load(path, device):
    """A trained run -> its model, its rotary layers, and its result. Raises ValueError."""
    model, config = load_run(path, device)
    result = read_result(path.removesuffix(".pt") + ".json")
    layers = [layer for layer in model.modules()
              if isinstance(layer, Attention) and layer.position == "rope"]
    if result is None:
        raise ValueError(f"{path!r} has no result beside it")
    if not layers:
        raise ValueError(f"--model is {config['model']!r}, but it has no rotary attention")
    if max(result["eval"]["length"]) <= config["L"]:
        raise ValueError(f"{path!r} was tested at no length above {config['L']}")
    return model, layers, result


def accuracies_of(model, layers, config, lengths, sequences, device):
    """The accuracy at each of these lengths > L, with positions scaled to fit into L."""
    accuracies, progress = [], Progress(sum(lengths), desc="testing")
    try:
        for n in lengths:
            for layer in layers:
                layer.scale = config["L"] / n
            accuracies += evaluate(model, config, [n], sequences, device, seed=n)
            progress.update(n)
            progress.report(f"testing: {progress.n / progress.total:.0%}")
    finally:
        progress.close()
        for layer in layers:
            layer.scale = 1.0
    return accuracies


def main(argv=None):
    """Test each checkpoint in argv, and write the results -> list of their paths."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", metavar="RUN.pt", help="models of train.py")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best one here)")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        loaded = [load(path, device) for path in args.checkpoints]
    except ValueError as error:
        parser.error(str(error))
    written = []
    for path, (model, layers, result) in zip(args.checkpoints, loaded):
        config, tested = result["config"], result["eval"]
        longer = [n for n in tested["length"] if n > config["L"]]
        new = accuracies_of(model, layers, config, longer, tested["sequences"], device)
        found = dict(zip(longer, new))
        tested["accuracy"] = [found.get(n, accuracy)
                              for n, accuracy in zip(tested["length"], tested["accuracy"])]
        config["model"] += "-interpolated"
        result["tested"] = environment(device)
        written.append(os.path.join(os.path.dirname(path), run_name(config) + ".json"))
        write_json(written[-1], result)
        print(written[-1])
    return written


if __name__ == "__main__":
    torch.set_num_threads(1)      # operations are small: more threads are slower on a busy machine
    main()
