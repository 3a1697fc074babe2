"""Which device, and a fast training step on a GPU: captured in a CUDA graph, compiled if it pays.

A small model launches hundreds of kernels per step. Each runs for a few microseconds, less than the
host needs to launch it. A captured step is launched as a whole: rope at d = 8 takes 0.4 ms instead
of 8. Compiled, with fewer kernels, it takes 0.2 ms, but compiling takes 20 s. So `Captured` first
captures the plain step, and compiles later if the work is then likely to end sooner. The same goes
for the tests during training.
"""

import contextlib
import importlib.util
import inspect
import os
import shutil
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_scan import compile_each_shape, compiled_scan
from output import say

WARMUP_CALLS = 3       # launched one kernel at a time: they allocate memory, and may compile
FIRST_CALLS = WARMUP_CALLS + 2       # then one captures and replays, and one is timed
GUESSED_SECONDS = {"training step": 25, "test": 15}     # to compile, until this has been measured
SPEEDUP = 2.5          # a guess; compiled, rope is 2.4 times as fast, mamba 8 times, on an H100
SMALL_D, SMALL_L = 16, 256     # up to this width and length, launching costs more than computing
measured_seconds = {}  # (name, shape) -> what this process took to compile it


def pick_device(name=None):
    """The torch.device of that name, or the best one here. Raises ValueError.

    Under torchrun, local process r gets GPU r modulo the number of GPUs, whatever index was named.
    """
    if name is None and torch.cuda.is_available():
        name = "cuda"
    elif name is None:
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        known = device.type in ("cuda", "mps") or name == "cpu"
    except (AssertionError, RuntimeError, ImportError):      # it depends on how torch was built
        known = False
    if not known:
        raise ValueError(f"--device is {name!r}, but it must be a cuda, mps or cpu of this machine")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)                # graphs and synchronize() use the current one
    return device


def default_generator(device):
    """The generator of nn.Dropout and the like; for Apple's GPUs, which hide theirs, the CPU's."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator


def has_compiler():
    """Whether torch.compile can work: it needs Triton, and Triton a C compiler."""
    compilers = [os.environ.get("CC", "cc"), "gcc", "clang"]
    has_c = any(shutil.which(name) for name in compilers)
    return has_c and importlib.util.find_spec("triton") is not None


def shape_of(config):
    """The settings that compiled kernels depend on. Runs that agree in them share kernels."""
    flags = "task model K d L batch_size n_heads d_state train_lengths learn_embedding".split()
    if config["task"] != "recall":                           # there M fixes shapes, too
        flags.append("M")
    return tuple(config[flag] for flag in flags)


def is_small(config):
    """Whether a model is so small that launching its kernels takes longer than running them."""
    return config["d"] <= SMALL_D and config["L"] <= SMALL_L


def compile_part(function, config):
    """torch.compile for a function that gets the same shapes at every step of a run.

    In small models, independent kernels are launched as one, and matmuls are written as sums, which
    fuse with the operations around them: rope at d = 8 takes a fifth less time. Models named after
    Mamba-2 or DeltaNet keep their matmuls (mamba2: 0.33 instead of 0.37 ms). Other models that
    contain these layers, such as zamba2, gain nothing from that (report/LOG.md).
    """
    from torch._inductor import config as inductor       # here, because importing it takes a second
    small = is_small(config)
    sums = {"decompose_mm_pass": {"min_first_dimension_decomposition": 1,
                                  "max_other_dimension_decomposition": 10**9}}
    # A quirk of torch: this pass takes its two numbers from the global setting, once per process,
    # but the options of a compilation say whether it runs. So both are set.
    inductor.post_grad_fusion_options = sums
    keeps_matmuls = any(word in config["model"] for word in ("mamba2", "deltanet"))
    return compile_each_shape(function, {
        "combo_kernels": small,
        "comprehensive_padding": not small,      # with it, hybrid-b takes 0.41 ms, not 0.37
        "post_grad_fusion_options": sums if small and not keeps_matmuls else {}})


def capture(function, generator=None):
    """Capture a call of `function` in a CUDA graph -> a function that replays it and returns its
    result. generator: the torch.Generator that the call draws from, if it does.

    The graph remembers addresses, so the tensors that it uses must stay where they are.
    """
    graph = torch.cuda.CUDAGraph()
    if generator:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = function()

    def replay():
        graph.replay()
        return result
    return replay


class Captured:
    """A function that is called many times: captured in a CUDA graph, and compiled when that pays.

        step = Captured("training step", function, [g, h], generator, config)
        loss = step()           # what function(g, h) returns

    A call does what function(*parts) does, up to rounding, and returns its result, a tensor that
    the next call overwrites. On other devices than CUDA, that is all. The function must do the same
    operations on the same tensors every time, because a replay runs no Python; it must not wait for
    the GPU, and must draw from `generator` alone, or from default_generator.

    name: "training step" or "test"
    parts: the functions that it calls, later replaced by compiled ones
    config: the run's, whose "compile" is auto, on or off
    """

    def __init__(self, name, function, parts, generator, config):
        self.name, self.function, self.parts = name, function, parts
        self.generator, self.config = generator, config
        self.key = name, shape_of(config)
        self.on_cuda = generator.device.type == "cuda"
        self.compiled = False
        self.restart()
        mode = config["compile"] if self.on_cuda else "off"
        self.may_compile = mode == "auto" and has_compiler()
        if mode == "on" or (self.may_compile and self.key in measured_seconds):    # kernels exist
            self.compile()

    def restart(self):
        """Forget the graph: the next FIRST_CALLS calls capture a new one."""
        self.calls, self.replay = 0, None
        self.last_seconds = 0.0       # of the latest call; after FIRST_CALLS, of a replay
        self.total_seconds = 0.0      # of all FIRST_CALLS: if compiled, mostly compiling

    def __call__(self):
        if not self.on_cuda:
            return self.function(*self.parts)
        if self.calls == FIRST_CALLS:            # from now on, only replay
            return self.replay()
        self.calls += 1
        torch.cuda.synchronize()
        began = time.monotonic()
        if self.calls == WARMUP_CALLS + 1:       # capturing runs no kernel; the first replay does
            self.replay = capture(self.launch, self.generator)
        result = self.replay() if self.replay else self.launch()
        torch.cuda.synchronize()
        self.last_seconds = time.monotonic() - began
        self.total_seconds += self.last_seconds
        if self.compiled and self.calls == FIRST_CALLS:
            measured_seconds.setdefault(self.key, self.total_seconds)
        return result

    def launch(self):
        """Run the function in Python: its kernels are launched one by one, or captured."""
        # Small models use attention's plain formula, which the compiler can fuse; also when
        # uncompiled, so that both forms compute the same.
        small = is_small(self.config)
        formula = sdpa_kernel(SDPBackend.MATH) if small else contextlib.nullcontext()
        with compiled_scan(self.compiled), formula:
            return self.function(*self.parts)

    def compile(self):
        """Replace the parts by compiled ones. The next calls compile, then capture again."""
        self.parts = [compile_part(part, self.config) for part in self.parts]
        self.compiled, self.may_compile = True, False
        self.restart()

    def compile_if_it_pays(self, calls_left):
        """Compile if that is likely to save time over the next `calls_left` calls."""
        if not self.may_compile or self.calls < FIRST_CALLS:
            return
        measured = [took for (name, _), took in measured_seconds.items() if name == self.name]
        cost = min(measured, default=GUESSED_SECONDS[self.name])
        if calls_left * self.last_seconds * (1 - 1 / SPEEDUP) > cost:
            say(f"{1e3 * self.last_seconds:.2f} ms per {self.name}, captured; compiling it now, "
                f"which takes about {cost:.0f} s and should pay: about {calls_left:,} are left")
            self.compile()


def steps_left(step, last, runs_left):
    """A guess of the steps to go in this run and in the runs of its shape that follow.

    A run ends when its task is solved, which nobody can foresee. The guess: this run is half done,
    it ends by step `last`, and each later run takes as long.
    """
    to_go = min(step, last - step)
    return to_go + runs_left * (step + to_go)


# ---- a faster start ------------------------------------------------------------------------------

class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW without the wrappers that import torch's compiler.

    That import takes 1.2 s, a tenth of a short run. The wrapper of `step` also turns gradients off;
    here no_grad does. Not for use inside torch.compile, nor with differentiable=True.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)
    state_dict = inspect.unwrap(torch.optim.AdamW.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.AdamW.load_state_dict)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
