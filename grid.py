"""The runs of one command: all combinations of its flags, shared between processes.

Each process takes a free run, of the shape that it compiled last if there is one. So eight
processes train eight runs at a time: `torchrun --nproc-per-node 8 -- train.py ...`, on one machine
or on several with the same folder. To take a run is to lock the file OUT/.locks/NAME, so two
commands never make the same run at once either. The system frees the lock of a process that dies:
another command, or the same one given again, continues its run. Without file locks (Windows, some
network folders), use one process.
"""

import contextlib
import functools
import glob
import itertools
import math
import os
import signal
import sys
import tempfile
import time
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

try:
    import fcntl
except ImportError:                              # Windows
    fcntl = None

from gpu import has_compiler, pick_device, shape_of
from output import rank_and_processes, remove, say
from runs import check, is_current, path_of, read_result
from summary import DEFAULTS, GRID, IGNORED, defaults_at

LOCKS = ".locks"      # the folder of lock files, inside the results folder
CONNECT_SECONDS = 300      # for all processes to start; torch may try for twice as long
# These errors end one run, but not the others. Any other is a mistake in the code, and ends all.
FAILURES = FloatingPointError, OSError, torch.OutOfMemoryError


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
            config["lr"] = defaults_at(config["d"])["lr"]
        check(config)
        configs.append(config)
    return configs


def prepare_folder(out):
    """Make the folders of results and locks. Raises ValueError if they cannot be written to."""
    try:
        for folder in out, os.path.join(out, LOCKS):
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror
        raise ValueError(f"--out is {out!r}, but it cannot be written to: {reason}") from None


class Run(NamedTuple):
    config: dict
    path: str         # OUT/NAME, without an ending
    title: str        # such as "[3/8] ", before every printed line; empty for a single run


def make_all(configs, train_one, show=None):
    """Make the runs that are not finished -> the results of all.

    train_one(config, path, title, runs_left) makes a run; runs_left: a guess of how many more of
    its shape this process will make. If it raises one of FAILURES, that is reported, the other runs
    are made, and the program ends with status 1 (130 after Ctrl-C). In the first process,
    show(result) is called for runs that were finished before.
    """
    rank, processes = rank_and_processes()
    grid, of_shape = [], {}
    for number, config in enumerate(configs, 1):
        title = f"[{number}/{len(configs)}] " if len(configs) > 1 else ""
        grid.append(Run(config, path_of(config), title))
        of_shape.setdefault(shape_of(config), []).append(grid[-1])
    # The first run of a shape may have to compile, so a process stays with a shape while there are
    # runs of it; process r begins with shape r modulo their number.
    shapes = list(of_shape)
    first = rank % len(shapes)
    waiting = [run for shape in shapes[first:] + shapes[:first] for run in of_shape[shape]]
    sharing = math.ceil(processes / len(shapes))             # processes per shape, at most

    def count_left(run):                 # gpu.py asks whether compiling will pay
        left = [other for other in of_shape[shape_of(run.config)]
                if other is not run and not os.path.exists(other.path + ".json")]
        return len(left) // sharing

    with keyboard_interrupts():
        connect()
        if rank == 0:
            for run in grid:
                clear(run)
                report_if_finished(run, show)
        barrier()                                # else rank 0 could remove what others just wrote
        said_so = False
        while waiting:
            busy = []                            # runs that other processes are making
            for run in waiting:
                if not make_if_free(run, train_one, count_left):
                    busy.append(run)
            if len(busy) == len(waiting):
                if rank == 0 and not said_so:
                    say(f"waiting for runs that other processes are making: {len(busy)} left")
                said_so = True
                time.sleep(1)
            waiting = busy
        results = [read_result(run.path + ".json") for run in grid]
    if None in results:
        missing = grid[results.index(None)].path
        sys.exit(f"train.py: {results.count(None)} of {len(grid)} runs ended without a result, the "
                 f"first {missing}: they failed, or another command removed their files")
    return results


@contextlib.contextmanager
def keyboard_interrupts():
    """After Ctrl-C, say how to continue, and end the program with status 130."""
    before = None
    try:
        with contextlib.suppress(ValueError):                # raised outside the main thread
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
        yield
    except KeyboardInterrupt:
        if rank_and_processes()[0] == 0:
            print("\nstopped; the same command without --overwrite continues from the last save, "
                  "if there is one", file=sys.stderr)
        sys.exit(130)
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def clear(run):
    """Remove the mark of an earlier failure and, with --overwrite, the result and the save."""
    remove(failure_of(run))
    if run.config["overwrite"]:
        with contextlib.suppress(OSError), locked(run.path, wait=True):
            remove(run.path + ".json", run.path + ".resume.pt")


def report_if_finished(run, show):
    """Say so, also if the code has changed since, and show the result."""
    result = finished_result(run)
    if result:
        current = is_current(result["env"].get("code"))
        changed = "" if current else ", but the code has changed since"
        say(f"{run.title}{run.path}.json is finished{changed}; --overwrite repeats it")
        if show:
            show(result)


def finished_result(run):
    """The run's result, if its model is there, too; otherwise None. A copy of another run's files
    does not count."""
    result = read_result(run.path + ".json") if os.path.exists(run.path + ".pt") else None
    found = {**DEFAULTS, **result["config"]} if result else {}
    own = result and all(found[flag] == run.config[flag] for flag in (*GRID, *DEFAULTS))
    return result if own else None


def make_if_free(run, train_one, count_left):
    """Make a run, unless that is done already.

    False: another process is working on it. True: nothing is left to do, because it is finished or
    has failed, now or before.
    """
    if finished_result(run):                     # needs no lock
        return True
    try:
        with locked(run.path) as mine:
            # Ask again: another process may have finished the run before this one got the lock.
            if mine and not finished_result(run) and not os.path.exists(failure_of(run)):
                remove(*glob.glob(glob.escape(run.path) + ".*.tmp"))     # of a killed process
                try:
                    train_one(run.config, run.path, run.title, count_left(run))
                except FAILURES as error:
                    # While the lock is held: once it is free, the others may find no run left and
                    # exit, and torchrun ends all processes when one exits with status 1.
                    say(f"{run.title}{run.path} failed: {error}")
                    with contextlib.suppress(OSError):       # the disk may be full
                        open(failure_of(run), "w").close()
            return mine                          # not mine: another process is making it
    except OSError as error:                     # the lock file cannot be made
        say(f"{run.title}{run.path} failed: {error}")
        return True


def lock_file(path):
    """OUT/NAME -> OUT/.locks/NAME."""
    folder, name = os.path.split(path)
    return os.path.join(folder, LOCKS, name)


def failure_of(run):
    """This file exists if the run has failed since the latest command on its folder began."""
    return lock_file(run.path) + ".failed"


@contextlib.contextmanager
def locked(path, wait=False):
    """`with locked(path) as mine:` tries to lock a run; mine is True if that worked. With `wait`,
    it waits until the lock is free.

    The file is never removed: otherwise one process could hold a lock on the removed file while
    another creates it anew and locks that.
    """
    os.makedirs(os.path.dirname(lock_file(path)), exist_ok=True)
    with open(lock_file(path), "a") as file:
        mine = lock(file)
        if wait and not mine:
            say(f"waiting for the process that has {path}")
            mine = lock(file, wait=True)
        yield mine


def lock(file, wait=False):
    """Lock an open file, until it is closed or the process ends -> whether that succeeded."""
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:                              # a file system without locks: see the top
        pass
    return True


@functools.cache
def connect():
    """Connect the processes that torchrun started together -> their group; None for a single one.

    Raises RuntimeError if they do not all come within CONNECT_SECONDS: torchrun was killed.
    """
    if rank_and_processes()[1] == 1:
        return None
    dist.init_process_group("gloo", timeout=timedelta(seconds=CONNECT_SECONDS))
    return dist.new_group(timeout=timedelta(days=30))        # another command may make a long run


def barrier():
    """Wait for all processes that torchrun started together."""
    group = connect()
    if group:
        dist.barrier(group)
