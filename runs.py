"""A run's files and its settings, as train.py leaves them and the other scripts find them.

Imports data and hybrid; eval, train, bench and inside use it.
"""

import json
import math
import os
import warnings

import torch
import torch.distributed as dist

from data import check_task
from hybrid import build_model

RESUME = ".resume.pt"  # what a run that is not finished is saved under


def short_errors(parser):
    """Make a parser answer a wrong command, also an abbreviated flag, with one sentence and status 2."""
    parser.allow_abbrev = False
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    return parser


def pick_device(name=None):
    """The torch.device of that name, or the best one here, made the current one. Raises ValueError if it is not here."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError, ImportError):        # which one depends on how torch was built
        device = None
    if device is None or device.type not in ("cuda", "mps", "cpu"):
        raise ValueError(f"--device is {name!r}, but torch {torch.__version__} finds no such device here")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)                          # graphs and timers are on the current one
    return device


def write_atomically(path, write):
    """Call write(a temporary path) and move the file to its place: at any moment the old file or the new one, whole."""
    temporary = path + ".tmp"
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def write_json(path, record):
    def write(temporary):
        with open(temporary, "w") as f:
            json.dump(record, f)
            f.write("\n")
    write_atomically(path, write)


def model_from(config):
    options = {k: config[k] for k in ("n_heads", "d_state", "learn_embedding") if k in config}  # old files lack some
    return build_model(config["model"], config["K"], config["d"], config["L"], **options)


def check(config):
    """Raise a ValueError, in one sentence, for a run that cannot be made. Nothing is written before this has passed."""
    for flag in ("d", "L", "n_heads", "d_state", "batch_size", "steps"):
        if config[flag] < 1:
            raise ValueError(f"--{flag.replace('_', '-')} is {config[flag]}, but it must be at least 1")
    if not (config["lr"] > 0 and math.isfinite(config["lr"])):
        raise ValueError(f"--lr is {config['lr']}, but it must be above 0 and finite")
    if not (config["weight_decay"] >= 0 and math.isfinite(config["weight_decay"])):
        raise ValueError(f"--weight-decay is {config['weight_decay']}, but it must be 0 or more and finite")
    if not 0 <= config["seed"] < 2**32:
        raise ValueError(f"--seed is {config['seed']}, but it must be from 0 to 2^32 - 1")
    check_task(config["L"], config["K"], config["M"], config["tau"])
    try:
        with torch.device("meta"):
            model_from(config)
    except (RuntimeError, MemoryError):
        raise ValueError(f"--K {config['K']} and --d {config['d']} make a model that does not fit into memory") from None


def load_run(path, device="cpu"):
    """Read a finished run's checkpoint and its JSON -> model, record. Raises ValueError, in one sentence, if it is none."""
    record_path = os.path.splitext(path)[0] + ".json"
    if not os.path.exists(path):
        raise ValueError(f"{path} is not there; train.py writes it when a run is finished")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            model = model_from(checkpoint["config"])
            model.load_state_dict(checkpoint["model"])
    except Exception:  # there is no telling how a file that is something else will fail
        raise ValueError(f"{path} is not a whole checkpoint of train.py") from None
    try:
        with open(record_path) as f:
            record = json.load(f)
        if not (record["config"] == checkpoint["config"] and record["seconds"]["eval"] >= 0
                and len(record["eval"]["length"]) == len(record["eval"]["accuracy"]) and record["eval"]["sequences"]):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{record_path}, which train.py writes beside {path}, is missing or not of the same run") from None
    return model.to(device).eval(), record


def processes():
    """This process's number and how many share the run: (0, 1) unless torchrun started several."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def load_saved(path, config, device):
    """What this very run had saved when it was killed, or None. Raises ValueError rather than lose another run's work."""
    saved = path + RESUME
    if not os.path.exists(saved):
        return None
    try:
        state = torch.load(saved, map_location=device, weights_only=True)
        same = same_run(state["config"], config)
    except Exception:  # there is no telling how a file that is something else will fail
        same = None
    if same:
        return state
    if same is False and not config["overwrite"]:
        raise ValueError(f"{saved} is of an unfinished run with other flags; finish it, give this one its own --out, or --overwrite it")
    if processes()[0] == 0:
        print(f"{saved} is not of a run with these flags, so this one starts from the beginning")


def remove_saved(path):
    """Forget what an unfinished run has saved, and what it was saving when it was killed."""
    for name in (path + RESUME, path + RESUME + ".tmp"):
        if os.path.exists(name):
            os.remove(name)


def is_finished(path):
    """Whether a run has its result, and is not being repeated."""
    return os.path.exists(path + ".json") and not os.path.exists(path + RESUME)


def same_run(a, b):
    """Whether two configs make the same run: where its result goes, and on which of several GPUs it is, do not change it."""
    def what(config):
        return {**config, "device": str(config.get("device")).split(":")[0], "out": None, "overwrite": None}
    return what(a) == what(b)


def config_of(path):
    """The config of a finished run, or an empty one if the file is not a result."""
    try:
        with open(path) as f:
            return dict(json.load(f)["config"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
