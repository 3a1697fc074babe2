"""The runs of one command: all combinations of its flags, shared between processes.

Each process takes the next free run, so eight processes train eight runs at a time: `torchrun
--nproc-per-node 8 -- train.py ...`, on one machine or on several with the same folder. A process
takes a run by locking OUT/NAME.lock. The system frees the lock of a process that dies, so its run
goes to another, or to the same command given again. Under torchrun, a run that fails leaves
OUT/NAME.failed, so that the other processes do not try it. Without file locks (Windows, some
network folders), use one process.
"""

import contextlib
import glob
import itertools
import os
import sys
import tempfile
import time
from typing import NamedTuple

import torch.distributed as dist

from output import say
from runs import check, is_finished, read_result, remove, run_name, shape_of
from summary import DEFAULTS, GRID, IGNORED, default_lr

STARTED = time.time() - 1     # when this process started; file systems round times


def configs_of(args, device):
    """The configs of all combinations of the flags, checked. Raises ValueError, in one sentence."""
    unnamed = set(vars(args)) - {*GRID, *DEFAULTS, *IGNORED}
    if unnamed:
        flag = min(unnamed).replace("_", "-")
        raise ValueError(f"--{flag} has no default in DEFAULTS in summary.py, so "
                         "runs that differ in it would share a name")
    configs = []
    for values in itertools.product(*(getattr(args, flag) for flag in GRID)):
        config = {**vars(args), **dict(zip(GRID, values)), "device": str(device)}
        if config["lr"] is None:
            config["lr"] = default_lr(max(1, config["d"]))     # `check` refuses a d below 1
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


def claim(path):
    """Take a run: a file, locked until it is closed or the process ends; None if it is taken.

    Processes that share a grid, also on other machines with the same folder, make each run once.
    """
    try:
        import fcntl
    except ImportError:                          # Windows: one process makes the whole grid
        return open(os.devnull)
    while True:
        lock = os.fdopen(os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError:                          # a file system without locks
            return lock
        # Its owner may have removed the file after we opened it. Then nobody else sees our lock.
        try:
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(path + ".lock")):
                return lock
        except FileNotFoundError:
            pass
        lock.close()


@contextlib.contextmanager
def locked(path):
    """Hold a run, after waiting for the process that has it."""
    lock = claim(path)
    if lock is None:
        say(f"waiting for the process that holds {path}.lock")
    while lock is None:
        time.sleep(0.1)
        lock = claim(path)
    with lock:
        try:
            yield
        finally:
            remove(path + ".lock")


def barrier():
    """Wait for all processes that torchrun started together."""
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
        dist.barrier()
        dist.destroy_process_group()


class Run(NamedTuple):
    config: dict
    path: str              # OUT/NAME, without an ending
    title: str             # such as "[3/8] ", before every printed line
    shape_number: int      # runs with the same one share compiled kernels


def make_all(configs, out, overwrite, make, wait=True, show=None):
    """Call make(config, path, title, runs left of its shape) for the runs that are still to be
    made; returns the results of all, None for a run that is not finished.

    Processes started together by torchrun share the runs, and so do commands started one after
    another. They begin with different shapes, and each stays with a shape while there are runs of
    it, because the first run of a shape may have to compile.

    wait: whether to stay until runs that other processes have taken are finished. show(result) is
    called for runs that were finished before. A run that fails, with FloatingPointError or OSError,
    does not keep others from being made.
    SystemExit: with status 1 if one failed, 130 after Ctrl-C.
    """
    grid, shapes = [], {}
    for number, config in enumerate(configs, 1):
        title = f"[{number}/{len(configs)}] " if len(configs) > 1 else ""
        path = os.path.join(out, run_name(config))
        shape_number = shapes.setdefault(shape_of(config), len(shapes))
        grid.append(Run(config, path, title, shape_number))

    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if overwrite:
        if rank == 0:                            # forget the old results before anyone begins
            remove(*[run.path + ending for run in grid for ending in (".json", ".resume.pt")])
        barrier()
    for run in grid:
        if rank == 0 and is_finished(run.path):
            say(f"{run.title}{run.path}.json is finished; --overwrite repeats it")
            if show:
                show(read_result(run.path + ".json"))

    def count_left(this):
        """About how many more runs of this shape this process will make."""
        same = [run for run in grid if run.shape_number == this.shape_number and run is not this]
        sharing = -(-processes // len(shapes))           # processes per shape, rounded up
        return sum(not os.path.exists(run.path + ".json") for run in same) // sharing

    failed = []                                          # paths
    # Process r begins with shape r, so that few processes compile the same one.
    waiting = sorted(grid, key=lambda run: (run.shape_number - rank) % len(shapes))
    said = False
    try:
        while waiting:
            taken = []                                   # by other processes
            for run in waiting:
                if not make_if_free(run, make, count_left, failed):
                    taken.append(run)
            if len(taken) == len(waiting):               # others are making all that are left
                if not wait:
                    break
                if rank == 0 and not said:
                    said = True
                    say(f"waiting for runs that other processes are making: {len(taken)} left")
                time.sleep(1)
            waiting = taken
    except KeyboardInterrupt:
        print("\nstopped; the same command without --overwrite continues from the last save, "
              "if there is one", file=sys.stderr)
        sys.exit(130)
    if failed:
        sys.exit(f"train.py: {len(failed)} of {len(configs)} runs failed")
    return [read_result(run.path + ".json") for run in grid]


def make_if_free(run, make, count_left, failed):
    """Make a run, unless it is finished -> False if another process has it.

    If it fails, or has failed in a process of torchrun since this one started, its path goes into
    `failed`.
    """
    # A lock that was left by a process that died is claimed below, and then removed.
    if is_finished(run.path) and not os.path.exists(run.path + ".lock"):
        return True
    try:
        lock = claim(run.path)
    except OSError as error:
        failed.append(run.path)
        say(f"{run.title}{run.path}.lock cannot be made: {error.strerror}")
        return True
    if lock is None:
        return False
    with lock:
        try:
            remove(*glob.glob(glob.escape(run.path) + ".*.tmp"))         # of a killed process
            if "RANK" in os.environ and has_failed(run.path):
                failed.append(run.path)
            elif not is_finished(run.path):
                remove(run.path + ".failed")
                make(run.config, run.path, run.title, count_left(run))
        except (FloatingPointError, OSError) as error:
            failed.append(run.path)
            say(f"{run.title}{run.path} failed: {error}")
            if "RANK" in os.environ:                     # tell the others
                with contextlib.suppress(OSError):       # the disk may be full
                    open(run.path + ".failed", "x").close()
        finally:                                 # also after Ctrl-C, or a mistake in a new layer
            remove(run.path + ".lock")
    return True


def has_failed(path):
    """Whether a run has failed since this process started, in this process or another."""
    try:
        return os.path.getmtime(path + ".failed") >= STARTED
    except OSError:
        return False
