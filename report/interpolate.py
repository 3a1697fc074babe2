"""Test rotary attention with position interpolation (Chen et al. 2023, arXiv 2306.15595).

    python train.py --model rope --M 4 --seed 0 1 2 3 4
    python report/interpolate.py results/rope_M4_*.pt

In a context of n tokens, n > L, positions are multiplied by L / n: all angles between two tokens
are then among those of the training. The published method trains the model a little longer with
such positions; this is the test alone. Writes results/rope-interpolated_....json beside each run,
for plot.py; its accuracies up to L are those of the run.
"""

import argparse
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch

from attention import Attention
from eval import evaluate
from output import Progress, short_errors
from runs import environment, load_run, pick_device, read_result, write_json


def interpolated(model, config, lengths, sequences, device):
    """The accuracy of a run's model at these lengths > L, with positions scaled to fit into L."""
    rotated = [layer for layer in model.layers
               if isinstance(layer, Attention) and layer.position == "rope" and not layer.window]
    if not rotated:
        raise ValueError(f"--model is {config['model']!r}, but it has no rotary attention")
    accuracies, progress = [], Progress(sum(lengths), desc="testing")
    for n in lengths:
        for layer in rotated:
            layer.scale = config["L"] / n
        accuracies += evaluate(model, config, [n], sequences, device)
        progress.update(n)
        progress.report(f"testing: {progress.n / progress.total:.0%}")
    progress.close()
    return accuracies


def main(argv=None):
    """Test each checkpoint in argv, and write the results -> list of their paths."""
    parser = short_errors(argparse.ArgumentParser(description=__doc__.split("\n")[0]))
    parser.add_argument("checkpoints", nargs="+", metavar="RUN.pt", help="models of train.py")
    parser.add_argument("--device", help="cuda, cuda:1, mps or cpu (default: the best one here)")
    args = parser.parse_args(argv)
    written = []
    try:
        device = pick_device(args.device)
        for path in args.checkpoints:
            model, config = load_run(path, device)
            folder, name = os.path.split(path.removesuffix(".pt"))
            result = read_result(os.path.join(folder, name + ".json"))
            if not result:
                raise ValueError(f"{path!r} has no result {name}.json beside it")
            old = dict(zip(result["eval"]["length"], result["eval"]["accuracy"]))
            longer = [n for n in old if n > config["L"]]
            new = interpolated(model, config, longer, result["eval"]["sequences"], device)
            result["eval"]["accuracy"] = list({**old, **dict(zip(longer, new))}.values())
            model_name = config["model"] + "-interpolated"
            result["config"]["model"] = model_name
            result["env"] = {**result["env"], "interpolated": environment(device)}
            written.append(os.path.join(folder, name.replace(config["model"], model_name, 1)
                                        + ".json"))
            write_json(written[-1], result)
            print(written[-1])
    except ValueError as error:
        parser.error(str(error))
    return written


if __name__ == "__main__":
    torch.set_num_threads(1)      # operations are small: more threads are slower on a busy machine
    main()
