"""The runs of one command: all combinations of its flags, shared between processes.

Each process takes the next free run, so eight processes train eight runs at a time: `torchrun
--nproc-per-node 8 -- train.py ...`, on one machine or on several with the same folder. To take a
run is to lock the file OUT/.locks/NAME. So separate commands, too, never make the same run at once.
The system frees the lock of a process that dies: another command, or the same one given again,
continues its run. Without file locks (Windows, some network folders), use one process.
"""

import contextlib
import datetime
import glob
import itertools
import os
import signal
import sys
import tempfile
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:                              # Windows
    fcntl = None

from gpu import has_compiler, pick_device
from output import say
from runs import check, is_finished, read_result, remove, run_name, shape_of
from summary import DEFAULTS, GRID, IGNORED, default_lr

FAILURES = FloatingPointError, OSError, torch.OutOfMemoryError   # of a run; they end no other


def configs_of(args):
    """The configs of all combinations of the flags, checked. Raises ValueError, in one sentence."""
    device = pick_device(args.device)
    if args.compile == "on" and not (device.type == "cuda" and has_compiler()):
        raise ValueError("--compile is on, but needs a CUDA device, triton and a C compiler")
    unnamed = set(vars(args)) - {*GRID, *DEFAULTS, *IGNORED}
    if unnamed:
        flag = min(unnamed).replace("_", "-")
        raise ValueError(f"--{flag} has no default in DEFAULTS in summary.py, so "
                         "runs that differ in it would share a name")
    configs = []
    for values in itertools.product(*(getattr(args, flag) for flag in GRID)):
        config = {**vars(args), **dict(zip(GRID, values)), "device": str(device)}
        if config["lr"] is None:
            config["lr"] = default_lr(config["d"])
        check(config)
        configs.append(config)
    return configs


def prepare_folder(out):
    """Make the folder of results. Raises ValueError if it cannot be written to."""
    try:
        os.makedirs(out, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"--out is {out!r}, but it cannot be written to: {reason}") from None


class Run(NamedTuple):
    config: dict
    path: str         # OUT/NAME, without an ending
    title: str        # such as "[3/8] ", before every printed line


def make_all(configs, make, show=None):
    """Make the runs that are not finished -> the results of all.

    make(config, path, title, runs_left) makes one. If it raises one of FAILURES, the others are
    made all the same, and then the program ends with status 1; after Ctrl-C, with 130. runs_left:
    about how many runs of the same shape this process will make after it. show(result) is called
    for runs that were finished before.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    grid, of_shape = [], {}
    for number, config in enumerate(configs, 1):
        title = f"[{number}/{len(configs)}] " if len(configs) > 1 else ""
        grid.append(Run(config, os.path.join(config["out"], run_name(config)), title))
        of_shape.setdefault(shape_of(config), []).append(grid[-1])
    with contextlib.suppress(ValueError):        # of a thread, which gets no signals
        signal.signal(signal.SIGINT, signal.default_int_handler)         # KeyboardInterrupt, below
    try:
        if rank == 0:                            # forget what must not be there when others begin
            for run in grid:
                remove(failure_of(run))
                if run.config["overwrite"]:
                    remove(run.path + ".json", run.path + ".resume.pt")
        barrier()
        for run in grid if rank == 0 else ():
            if is_finished(run.path):
                say(f"{run.title}{run.path}.json is finished; --overwrite repeats it")
                if show:
                    show(read_result(run.path + ".json"))

        # The first run of a shape may have to compile. So a process stays with a shape while there
        # are runs of it, and process r begins with shape r.
        shapes = list(of_shape)
        first = rank % len(shapes)
        waiting = [run for shape in shapes[first:] + shapes[:first] for run in of_shape[shape]]
        sharing = -(-processes // len(shapes))               # processes per shape, rounded up
        said = False
        while waiting:
            taken = []                                       # by other processes
            for run in waiting:
                others = [other for other in of_shape[shape_of(run.config)] if other is not run]
                left = sum(not os.path.exists(other.path + ".json") for other in others)
                if not make_if_free(run, make, left // sharing):
                    taken.append(run)
            if len(taken) == len(waiting):       # others are making all that are left
                if rank == 0 and not said:
                    say(f"waiting for runs that other processes are making: {len(taken)} left")
                said = True
                time.sleep(1)
            waiting = taken
    except KeyboardInterrupt:
        if rank == 0:
            print("\nstopped; the same command without --overwrite continues from the last save, "
                  "if there is one", file=sys.stderr)
        sys.exit(130)
    results = [read_result(run.path + ".json") for run in grid]
    if None in results:
        sys.exit(f"train.py: {results.count(None)} of {len(grid)} runs failed")
    return results


def make_if_free(run, make, runs_left):
    """Make a run, unless it is finished or has failed -> False if another process has it."""
    if is_finished(run.path):
        return True
    try:
        with locked(run.path) as mine:
            if mine and not is_finished(run.path) and not os.path.exists(failure_of(run)):
                remove(*glob.glob(glob.escape(run.path) + ".*.tmp"))     # of a killed process
                try:
                    make(run.config, run.path, run.title, runs_left)
                except FAILURES:                 # tell the others, before the lock is free
                    with contextlib.suppress(OSError):       # the disk may be full
                        open(failure_of(run), "w").close()
                    raise
            return mine
    except FAILURES as error:                    # of the run, or of its lock
        say(f"{run.title}{run.path} failed: {error}")
        return True


def lock_file(path):
    """OUT/NAME -> OUT/.locks/NAME."""
    folder, name = os.path.split(path)
    return os.path.join(folder, ".locks", name)


def failure_of(run):
    """The file that says that a run has failed, since rank 0 last removed it."""
    return lock_file(run.path) + ".failed"


@contextlib.contextmanager
def locked(path, wait=False):
    """`with locked(path) as mine:` holds a run, if mine is True; if not, another process has it.

    wait: until that process is done. The file stays: if it were removed, a process that had just
    opened it would lock a file that a third one no longer sees.
    """
    os.makedirs(os.path.dirname(lock_file(path)), exist_ok=True)
    with open(lock_file(path), "a") as file:
        mine = lock(file)
        if wait and not mine:
            say(f"waiting for the process that has {path}")
            mine = lock(file, wait)
        yield mine


def lock(file, wait=False):
    """Lock an open file, until it is closed or the process ends -> whether that succeeded."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:                              # a file system without locks
        pass
    return True


def barrier():
    """Wait for all processes that torchrun started together."""
    if "RANK" in os.environ:
        if not dist.is_initialized():            # once: a second group would meet stale addresses
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=30))
        dist.barrier()
