"""A run's name, its settings and its files.

    OUT/NAME.json         the result, written last: it marks a finished run
    OUT/NAME.pt           the trained model and its config
    OUT/NAME.resume.pt    the progress of an unfinished run
    OUT/.locks/NAME       locked by the process that works on the run: see grid.py
"""

import contextlib
import copy
import functools
import glob
import hashlib
import inspect
import io
import json
import math
import os
import platform
import subprocess
import warnings

import torch

from data import TASKS, check_task, shortest
from hybrid import LAYERS, OPTIONS, build_model
from output import digest_of, remove, say, write_file
from summary import DEFAULTS, GRID, defaults_at

# The minimum of each flag that is a whole number.
LEAST = dict(d=1, L=1, K=1, M=1, tau=1, n_heads=1, d_state=1, batch_size=1, steps=1, seed=0)
SOURCES = "mamba fused_scan attention hybrid data gpu runs train eval summary".split()   # of a run


def run_name(config):
    """A run's name: the flags of GRID, and those of DEFAULTS that are not at their default."""
    task = "" if config["task"] == "recall" else config["task"] + "_"
    shown = [f"{flag}{config[flag]}" for flag in GRID if flag not in ("model", "seed")]
    name = "_".join([task + config["model"], *shown])
    for flag, default in defaults_at(config["d"]).items():
        value, word = config[flag], flag.replace("_", "-")
        if flag == "task" or value == default:
            continue
        if isinstance(value, bool):
            name += f"_{word}" if value else f"_no-{word}"
        else:
            name += f"_{word}{value}"
    return f"{name}_seed{config['seed']}"


def path_of(config):
    """Where a run's files are: OUT/NAME, without an ending."""
    return os.path.join(config["out"], run_name(config))


def model_from(config):
    """The model of a config, with new weights."""
    options = {flag: config[flag] for flag in ("learn_embedding", *OPTIONS)}
    return build_model(config["model"], config["K"], config["d"], config["L"], **options)


def check(config, training=True):
    """Raise a ValueError of one sentence if a run with this config cannot work. training: whether
    its model will be trained; a test takes less memory."""
    for flag, least in LEAST.items():
        value, word = config[flag], flag.replace("_", "-")
        if type(value) is not int or not least <= value < 2**30:
            raise ValueError(f"--{word} is {value!r}, but it must be a whole number from {least} "
                             "to 2^30 - 1")
    lr, weight_decay = config["lr"], config["weight_decay"]
    if type(lr) not in (int, float) or not 0 < lr <= 1e30:
        raise ValueError(f"--lr is {lr!r}, but it must be a number above 0, at most 1e30")
    if type(weight_decay) not in (int, float) or not 0 <= weight_decay < math.inf:
        raise ValueError(f"--weight-decay is {weight_decay!r}, but it must be a number from 0 on")
    if config["train_lengths"] not in ("fixed", "uniform"):
        raise ValueError(f"--train-lengths is {config['train_lengths']!r}, not fixed or uniform")
    if not isinstance(config["model"], str):
        raise ValueError(f"--model is {config['model']!r}, but it must be a name")
    if len(run_name(config)) > 200:
        raise ValueError(f"--model is {config['model'][:40]!r} ..., too long for a file name")
    check_task(config["L"], config["K"], config["M"], config["tau"], config["task"])
    if config["task"] != "recall" and config["train_lengths"] != "fixed":
        raise ValueError(f"--train-lengths is uniform, but --task {config['task']} has one length")
    check_model(config, training)
    K, M, tau, task = (config[flag] for flag in ("K", "M", "tau", "task"))
    for length in (shortest(M, tau, task), config["L"], 3 * config["L"]):     # tests go to 3 L
        try:
            tokens, labels, at = TASKS[task](2, length, K, M, tau, "cpu", None, False)
            if labels.shape != (tokens.shape[:1] if at is None else at.shape):
                raise ValueError("labels need the shape of at, or (B,) if at is None")
            for v in tokens, labels:
                if v.dtype != torch.int64 or v.min() < 0 or v.max() >= K:
                    raise ValueError(f"tokens and labels must be int64, from 0 to {K - 1}")
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"--task {task} fails with {length} context tokens ({error}); data.py "
                             "says what it must return, and where its limits go") from None


def check_model(config, training):
    """Raise a ValueError if the model cannot be built, because of its layers, heads or options, or
    if a run certainly needs more memory than there is."""
    available = memory(config.get("device"))
    # A lower bound: the embedding table in float64, which numpy makes even for a model on "meta",
    # and about eight float32 activations per token, channel and layer.
    activations = 32 * (config["batch_size"] if training else 1) * config["L"] * config["d"]
    needed = 8 * config["K"] * config["d"] + activations
    # "meta" takes no memory, but imports torch's compiler, for a second: small models are real.
    widest = max(config[flag] for flag in ("K", "d", "L", "d_state"))
    if needed < available:
        try:
            with torch.device("cpu" if config["d"] * widest <= 2**16 else "meta"):
                model = model_from(config)                   # a ValueError of its own goes on
            needed += activations * (len(model.layers) - 1)
            needed += 16 * model.n_params()                  # weights, gradients, two moments
        except (RuntimeError, MemoryError, OverflowError):
            needed = available
    if needed >= available:
        flags = "--K {K}, --d {d}, --L {L}, --d-state {d_state}, --batch-size {batch_size}"
        raise ValueError(f"{flags.format(**config)} need more than {needed / 2**30:,.1f} GiB, but "
                         f"this machine has {available / 2**30:,.1f} GiB")


def memory(device):
    """Bytes of memory of this machine, or of the GPU that `device` names."""
    if str(device).startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**36                                         # unknown: 64 GiB


def environment(device):
    """The machine and the version of the code, for a result."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "python": platform.python_version(),
            "system": platform.platform(), "device": name, "threads": torch.get_num_threads(),
            "commit": commit(), "code": code_digest()}


def commit():
    """The commit of this code, with + for uncommitted changes; "unknown" if git has none."""
    git = ["git", "-C", os.path.dirname(os.path.abspath(__file__))]
    options = dict(capture_output=True, text=True, check=True, timeout=10)
    try:     # the first command fails in a repository that does not have this file
        subprocess.run([*git, "ls-files", "--error-unmatch", "runs.py"], **options)
        describe = [*git, "describe", "--always", "--dirty=+", "--exclude=*"]
        return subprocess.run(describe, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


@functools.cache     # computed once: see load_progress
def code_digest():
    """The SHA-256 of the files that decide a run's numbers, and of those of one's own layers."""
    folder = os.path.dirname(os.path.abspath(__file__))
    paths = {os.path.join(folder, f"{name}.py") for name in SOURCES}
    paths |= set(glob.glob(os.path.join(glob.escape(folder), "family", "*.py")))
    for part in (*TASKS.values(), *LAYERS.values()):
        with contextlib.suppress(OSError, TypeError):        # written in no file
            paths.add(os.path.abspath(inspect.getsourcefile(getattr(part, "func", part))))
    return hashlib.sha256(str([digest_of(path) for path in sorted(paths)]).encode()).hexdigest()


def is_current(code):
    """Whether a result or checkpoint with this code_digest is of the code here, or does not say."""
    return code in (None, code_digest())


# ---- files ---------------------------------------------------------------------------------------

def write_json(path, value):
    write_file(path, (json.dumps(value) + "\n").encode())


def write_checkpoint(path, model, config):
    """Write a trained model and its config, and return the SHA-256 of the file."""
    buffer = io.BytesIO()
    weights = {name: p.cpu() for name, p in model.state_dict().items()}
    torch.save({"config": config, "model": weights, "code": code_digest()}, buffer)
    write_file(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def load_run(path, device="cpu"):
    """Read a checkpoint of train.py -> model, config. Raises ValueError if that is impossible."""
    if not os.path.exists(path):
        raise ValueError(f"{path} is not there; train.py writes it when a run is finished")
    try:
        with warnings.catch_warnings():                      # of files that are no checkpoints
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            config, weights = {**DEFAULTS, **checkpoint["config"]}, checkpoint["model"]
        check({**config, "device": str(device)}, training=False)
    except ValueError as error:                              # of check
        reason = str(error).split("; ")[0]                   # without the list of layers
        raise ValueError(f"{path} cannot be loaded: {reason}") from None
    except Exception:     # a file of another kind can fail in any way
        raise ValueError(f"{path} is not a whole checkpoint of train.py, a .pt file") from None
    model = model_from(config)
    try:
        model.load_state_dict(weights)
    except Exception:
        raise ValueError(f"{path} cannot be loaded: its weights do not fit the layers of "
                         f"{config['model']} here; was one changed?") from None
    if not is_current(checkpoint.get("code")):
        say(f"{path}: the code has changed since this model was trained")
    return model.to(device).eval(), config


def counts_of(evaluation):
    """The number of sequences at each length: a list, even if the eval section has one for all."""
    counts = evaluation["sequences"]
    return counts if isinstance(counts, list) else [counts] * len(evaluation["length"])


def read_result(path):
    """The result in a JSON file of train.py; None if it is missing, cut short or something else."""
    try:
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        evaluation = result["eval"]
        n, counts = len(evaluation["length"]), counts_of(evaluation)
        whole = n == len(evaluation["accuracy"]) == len(counts) > 0 and min(counts) > 0
        whole = whole and all(type(result[part]) is dict for part in ("config", "env", "seconds"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return result if whole and set(GRID) <= set(result["config"]) else None


# ---- an unfinished run ---------------------------------------------------------------------------

def state_of(part):
    """The state of a model, an optimizer or a generator."""
    return part.get_state() if isinstance(part, torch.Generator) else part.state_dict()


def set_states(kept, states):
    """Restore the states of `kept`, {name: model, optimizer or generator}."""
    for name, part in kept.items():
        if isinstance(part, torch.Generator):
            part.set_state(states[name].cpu())
        elif isinstance(part, torch.optim.Optimizer):
            # load_state_dict replaces the tensor lr, which train_one sets and a graph reads.
            groups = part.param_groups
            part.load_state_dict(states[name])
            part.param_groups = groups
        else:
            part.load_state_dict(states[name])


def save_progress(path, kept, step, curves, seconds):
    """Save an unfinished run, so that it can continue; the file begins with a SHA-256 of the rest.
    If the disk is full, the run goes on. kept: {name: model, optimizer or generator}."""
    buffer = io.BytesIO()
    states = {name: state_of(part) for name, part in kept.items()}
    torch.save({"code": code_digest(), "step": step, "curves": curves, "seconds": seconds,
                **states}, buffer)
    data = buffer.getvalue()
    try:
        write_file(path + ".resume.pt", hashlib.sha256(data).digest() + data)
    except OSError as error:
        say(f"{path}.resume.pt was not saved: {error.strerror}; the run continues")


def load_progress(path, kept, device, title=""):
    """Restore what save_progress wrote, and say so -> step, curves, seconds.

    Without a usable save, everything is put back as it was before, and the run is at step 0. Raises
    OSError if the save cannot be read.
    """
    start = 0, {"step": [], "loss": [], "accuracy": []}, 0.0
    code_digest()                                # now: files that are edited later do not count
    try:
        with open(path + ".resume.pt", "rb") as f:
            digest, data = f.read(32), f.read()
    except FileNotFoundError:
        return start
    before = copy.deepcopy({name: state_of(part) for name, part in kept.items()})
    try:
        if hashlib.sha256(data).digest() != digest:
            raise ValueError
        saved = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        set_states(kept, saved)
        progress = saved["step"], saved["curves"], saved["seconds"]
    except torch.OutOfMemoryError:                           # the save may be whole
        raise
    except Exception:     # damaged, or of another version of the code or kind of device
        set_states(kept, before)
        remove(path + ".resume.pt")
        say(f"{path}.resume.pt is damaged, or of another version or device; the run starts from "
            "the beginning")
        return start
    changed = ""
    if not is_current(saved.get("code", "")):
        changed = "; the code has changed since, and --overwrite starts from the beginning"
        saved["curves"].setdefault("code_changed_at", []).append(saved["step"])
    say(f"{title}continues at step {progress[0]:,}: {path}{changed}")
    return progress
