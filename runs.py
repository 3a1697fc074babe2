"""A run's name, its settings, and its files: how train.py leaves them and the other scripts find them.

    OUT/NAME.json         the result, written last: where it is, the run is finished
    OUT/NAME.pt           the trained model and its config
    OUT/NAME.resume.pt    the progress of a run that is not finished
    OUT/NAME.lock         held by the process that is making the run
"""

import hashlib
import io
import json
import math
import os
import platform
import subprocess
import tempfile
import time
import warnings

import torch
import torch.distributed as dist

from data import check_task
from hybrid import build_model

GRID = ["model", "M", "tau", "K", "d", "L", "seed"]          # flags that take several values
DEFAULTS = {                                                 # the other flags that make a run what it is
    "task": "recall", "batch_size": 64, "steps": 20000, "lr": None, "weight_decay": 0.0, "n_heads": 1,
    "d_state": 16, "train_lengths": "fixed", "learn_embedding": False, "stop_early": True}


def short_errors(parser):
    """Make a parser answer a wrong command, or an abbreviated flag, with one sentence and status 2."""
    parser.allow_abbrev = False
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    return parser


def pick_device(name=None):
    """The torch.device of that name, or the best one here, made the current one. Raises ValueError."""
    if name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else name
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError, ImportError):      # which one depends on how torch was built
        device = None
    if device is None or device.type not in ("cuda", "mps", "cpu") or (device.type == "cpu" and device.index):
        raise ValueError(f"--device is {name!r}, but torch {torch.__version__} finds no such device here")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)                        # graphs and timers are on the current one
    return device


# ---- what a run is -------------------------------------------------------------------------------

def default_lr(d):
    """8e-3 as far as that works; wider models need less: at d = 32, rope learned M = 16 in 0 of 5 runs."""
    return min(8e-3, 0.128 / d)


def run_name(config):
    """A run's name: its task unless that is recall, the flags of GRID, and every other flag off its default."""
    task = "" if config["task"] == "recall" else config["task"] + "_"
    name = task + "{model}_M{M}_tau{tau}_K{K}_d{d}_L{L}".format(**config)
    for flag, default in DEFAULTS.items():
        value = config[flag]
        if flag == "lr":
            default = default_lr(config["d"])
        if flag == "task" or value == default:
            continue
        flag = flag.replace("_", "-")
        if isinstance(value, bool):
            name += f"_{flag}" if value else f"_no-{flag}"
        else:
            name += f"_{flag}{value}"
    return f"{name}_seed{config['seed']}"


def model_from(config):
    """The model of a config, with new weights."""
    options = {flag: config[flag] for flag in ("n_heads", "d_state", "learn_embedding")}
    return build_model(config["model"], config["K"], config["d"], config["L"], **options)


def check(config):
    """Raise a ValueError, in one sentence, for a run that cannot be made, before anything is built."""
    for flag in ("d", "L", "K", "M", "tau", "n_heads", "d_state", "batch_size", "steps", "seed"):
        at_least = 0 if flag == "seed" else 1
        value, word = config[flag], flag.replace("_", "-")
        if type(value) is not int:
            raise ValueError(f"--{word} is {value!r}, but it must be a whole number")
        if value < at_least:
            raise ValueError(f"--{word} is {value}, but it must be at least {at_least}")
        if value >= (2**30 if flag == "seed" else 2**31):
            raise ValueError(f"--{word} is {value}, but it must be below 2^{30 if flag == 'seed' else 31}")
    for flag in ("lr", "weight_decay"):
        value, word = config[flag], flag.replace("_", "-")
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise ValueError(f"--{word} is {value!r}, but it must be a number of at least 0")
    if config["lr"] == 0:
        raise ValueError("--lr is 0, but it must be above 0")
    if config["train_lengths"] not in ("fixed", "uniform"):
        raise ValueError(f"--train-lengths is {config['train_lengths']!r}, but it must be fixed or uniform")
    if not isinstance(config["model"], str):
        raise ValueError(f"--model is {config['model']!r}, but it must be a name")
    if len(run_name(config)) > 200:
        raise ValueError(f"--model is {config['model'][:40]!r} ..., but a run's name has at most 200 characters")
    check_task(config["L"], config["K"], config["M"], config["tau"], config["task"])
    if config["task"] != "recall" and config["train_lengths"] != "fixed":
        raise ValueError(f"--train-lengths is uniform, but --task {config['task']} has one length only")
    check_memory(config)


def check_memory(config):
    """Refuse what cannot fit: a lower bound of the bytes that training needs against the bytes there are."""
    available = memory()
    what = "--K {K}, --d {d}, --L {L}, --d-state {d_state}, --batch-size {batch_size}".format(**config)
    bound = 8 * config["K"] * config["d"]                    # the embedding table
    if bound < available:
        try:
            with torch.device("meta"):
                model = model_from(config)
            bound += 16 * model.n_params()                   # weights, gradients, two moments
            bound += 32 * config["batch_size"] * config["L"] * config["d"] * len(model.layers)
        except (RuntimeError, MemoryError, OverflowError):
            bound = available
    if bound >= available:
        raise ValueError(f"{what} need at least {bound / 2**30:,.0f} GiB, but there are "
                         f"{available / 2**30:,.0f} GiB of memory")


def memory():
    """Bytes of memory of this machine, or of its GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**36                                         # unknown: refuse only the absurd


def environment(device):
    """What a result says of the machine and the code that made it."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "python": platform.python_version(), "system": platform.platform(),
            "device": name, "threads": torch.get_num_threads(), "commit": commit()}


def commit():
    """The commit of this repository, with + for uncommitted changes; "unknown" outside of git."""
    folder = os.path.dirname(os.path.abspath(__file__))
    try:
        run = lambda *words: subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True,
                                            check=True, timeout=10).stdout.strip()
        return run("rev-parse", "--short", "HEAD") + ("+" if run("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# ---- files ---------------------------------------------------------------------------------------

def write_file(path, data):
    """Write bytes: at any moment, also after a power cut, there is the old file or the new one, whole."""
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path) or ".", suffix=".tmp", delete=False) as f:
        try:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
            os.chmod(f.name, 0o644)
            os.replace(f.name, path)
        except BaseException:
            os.unlink(f.name)
            raise


def write_json(path, value):
    write_file(path, (json.dumps(value) + "\n").encode())


def write_checkpoint(path, model, config):
    """Write a trained model and its config, and return the SHA-256 of the file."""
    buffer = io.BytesIO()
    weights = {name: p.cpu() for name, p in model.state_dict().items()}
    torch.save({"config": config, "model": weights}, buffer)
    write_file(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def load_run(path, device="cpu"):
    """Read a checkpoint of train.py -> model, config. Raises ValueError, in one sentence, if it is none."""
    if not os.path.exists(path):
        raise ValueError(f"{path} is not there; train.py writes it when a run is finished")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            config = {**DEFAULTS, **checkpoint["config"]}
            check(config)
            model = model_from(config)
            model.load_state_dict(checkpoint["model"])
    except Exception:     # there is no telling how a file that is something else will fail
        raise ValueError(f"{path} is not a whole checkpoint of train.py") from None
    return model.to(device).eval(), config


def read_result(path):
    """The result in a JSON file of train.py, or None if it is missing, cut short or something else."""
    try:
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        evaluation = result["eval"]
        if len(evaluation["length"]) == len(evaluation["accuracy"]) > 0 and isinstance(result["config"], dict):
            return result
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return None


def is_finished(path):
    """Whether the run has its result and its model. path: without an ending."""
    return read_result(path + ".json") is not None and os.path.exists(path + ".pt")


# ---- an unfinished run ---------------------------------------------------------------------------

def save_progress(path, say, state):
    """Keep the state of an unfinished run, behind a checksum. A disk that is full does not end the run."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        write_file(path + ".resume.pt", hashlib.sha256(buffer.getvalue()).digest() + buffer.getvalue())
    except OSError as error:
        say(f"{path}.resume.pt was not saved: {error.strerror}; the run goes on")


def load_progress(path, device, say):
    """What a run had saved when it was killed, or None, saying why if there is a file."""
    try:
        with open(path + ".resume.pt", "rb") as f:
            digest, data = f.read(32), f.read()
        if hashlib.sha256(data).digest() != digest:
            raise ValueError
        return torch.load(io.BytesIO(data), map_location=device, weights_only=True)
    except FileNotFoundError:
        return None
    except Exception:     # there is no telling how a damaged file will fail
        say(f"{path}.resume.pt is damaged; the run starts from the beginning")
        return None


def remove(*paths):
    """Remove files, those that are there."""
    for path in paths:
        try:
            os.remove(path)
        except OSError:
            pass


def claim(path):
    """Take a run: a file that stays locked until it is closed or the process ends. None: it is taken.

    Processes that share a grid, also on other machines with the same folder, make each run once.
    """
    try:
        import fcntl
    except ImportError:                                      # Windows: one process makes the whole grid
        return open(os.devnull)
    lock = os.fdopen(os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lock
    except BlockingIOError:
        lock.close()
        return None
    except OSError:                                          # a file system without locks
        return lock


# ---- the runs of a command -----------------------------------------------------------------------

def prepare_folder(out):
    """Make the folder of results. Raises ValueError, in one sentence, if it cannot be written to."""
    try:
        os.makedirs(out, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise ValueError(f"--out is {out!r}, but it cannot be written to: {error.strerror}") from None


def to_make(configs, out, overwrite, say):
    """Yield (config, path, title, runs left of its shape) for the runs that are still to be made.

    Processes started together by torchrun share the runs, and so do commands started one after another:
    each takes the next run that none has taken. A run whose process died is taken by another.
    """
    paths = [os.path.join(out, run_name(config)) for config in configs]
    first = os.environ.get("RANK", "0") == "0"
    if overwrite:
        if first:                                            # forget the old results before anyone begins
            remove(*[path + ending for path in paths for ending in (".json", ".resume.pt")])
        if "RANK" in os.environ:
            dist.init_process_group("gloo")
            dist.barrier()
            dist.destroy_process_group()

    def title(number):
        return f"[{number}/{len(configs)}] " if len(configs) > 1 else ""

    waiting = list(enumerate(zip(configs, paths), 1))
    for number, (_, path) in waiting:
        if is_finished(path) and first:
            say(f"{title(number)}{path}.json is finished; --overwrite repeats it")
    while waiting:
        taken = []
        for number, (config, path) in waiting:
            if is_finished(path):
                continue
            lock = claim(path)
            if lock is None:
                taken.append((number, (config, path)))
                continue
            with lock:
                if not is_finished(path):
                    yield config, path, title(number), runs_left(config, configs[number:])
                remove(path + ".lock")
        if len(taken) == len(waiting):
            time.sleep(1)
        waiting = taken


def runs_left(config, later):
    """How many of the later runs have the shape of this one, and so its compiled step."""
    shape = [config[flag] for flag in ("model", "K", "d", "L")]
    share = int(os.environ.get("WORLD_SIZE", "1"))
    return sum(shape == [other[flag] for flag in ("model", "K", "d", "L")] for other in later) // share
