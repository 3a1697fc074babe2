"""A fast training step on a GPU: captured in a CUDA graph, and compiled when that pays.

A small model launches hundreds of kernels per step. Each runs for a few microseconds, less than the
host needs to launch it. A captured step is launched as a whole: rope at d = 8 takes 0.5 ms instead
of 8. Compiled, with fewer kernels, it takes 0.2 ms, but compiling takes 40 s. So `FastStep` first
captures the plain step, and compiles later if the work is then likely to end sooner.
"""

import contextlib
import importlib.util
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_scan import compile_each_shape, compiled_scan
from output import say
from runs import shape_of

CAPTURE_AFTER = 3      # steps: they allocate the memory that the graph uses
COMPILE_SECONDS = 40   # a guess, until this process has compiled a shape and timed it
SPEEDUP = 2.5          # of compiling, a guess: from 2.6 (rope) to 9 (mamba) on an H100
SMALL_D, SMALL_L = 16, 256
compiled_shapes = {}   # shape -> seconds that this process took to compile it


def has_compiler():
    return importlib.util.find_spec("triton") is not None


def compile_small(function, config):
    """torch.compile for a function that gets the same shapes at every step of a run.

    In small models, independent kernels are launched as one, and matmuls are written as sums, which
    fuse with the operations around them (rope at d = 8: 0.22 instead of 0.27 ms). Mamba-2 keeps its
    matmuls, which are many and wide (0.33 instead of 0.37 ms).
    """
    from torch._inductor import config as inductor       # here, because importing it takes a second
    small = config["d"] <= SMALL_D and config["L"] <= SMALL_L
    sums = {"decompose_mm_pass": {"min_first_dimension_decomposition": 1,
                                  "max_other_dimension_decomposition": 10**9}}
    # The pass reads its two numbers from the global setting alone, and once; whether it runs, from
    # the options of the compilation.
    inductor.post_grad_fusion_options = sums
    options = {"combo_kernels": small, "comprehensive_padding": not small,
               "post_grad_fusion_options": {}}
    if small and "mamba2" not in config["model"]:
        options["post_grad_fusion_options"] = sums
    return compile_each_shape(function, options)


def capture(function, generator):
    """Capture a call of `function` in a CUDA graph -> a function that replays it, see Captured.

    The graph remembers addresses, so the tensors that it uses must stay where they are.
    """
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        result = function()

    def replay():
        graph.replay()
        return result
    return replay


class Captured:
    """A function without arguments, captured in a CUDA graph at its fourth call and then replayed.

    It must do the same operations on the same tensors at every call, must not wait for the GPU, and
    must draw its random numbers from `generator`. A replay overwrites the tensor that it returns.
    """

    def __init__(self, function, generator):
        self.function, self.generator = function, generator
        self.calls, self.replay = 0, None

    def __call__(self):
        if self.calls == CAPTURE_AFTER:
            self.replay = capture(self.function, self.generator)
        self.calls += 1
        return self.replay() if self.replay else self.function()


class FastStep(Captured):
    """A training step on a GPU: a call does what step(*functions) does, and returns its loss.

    step(*functions) takes one training step and uses these functions, which may be replaced by
    compiled ones; generator: the torch.Generator that the step draws from; config: the run's, whose
    "compile" is auto, on or off. Losses are those of `step`, up to rounding.
    """

    def __init__(self, step, functions, generator, config):
        super().__init__(self.launch, generator)
        self.step, self.functions = step, functions
        self.config, self.shape = config, shape_of(config)
        small = config["d"] <= SMALL_D and config["L"] <= SMALL_L
        # Small models use attention's plain formula, because the compiler can fuse it.
        self.backends = [SDPBackend.MATH] if small else None
        self.compiled = False
        self.began = time.monotonic()
        self.undecided = config["compile"] == "auto" and has_compiler()
        if config["compile"] == "on" or (self.undecided and self.shape in compiled_shapes):
            self.compile()

    def __call__(self):
        loss = super().__call__()
        if self.calls == CAPTURE_AFTER + 1:                  # it has just been captured
            torch.cuda.synchronize()
            if self.compiled and self.shape not in compiled_shapes:
                compiled_shapes[self.shape] = time.monotonic() - self.began
            self.began = time.monotonic()
        return loss

    def launch(self):
        """The step, with its kernels launched one by one."""
        backends = sdpa_kernel(self.backends) if self.backends else contextlib.nullcontext()
        with compiled_scan(self.compiled), backends:
            return self.step(*self.functions)

    def compile(self):
        """Replace the functions by compiled ones. The next calls compile, then capture again."""
        self.functions = [compile_small(function, self.config) for function in self.functions]
        self.calls, self.replay, self.compiled, self.undecided = 0, None, True, False
        self.began = time.monotonic()

    def compile_if_it_pays(self, step, last, runs_left):
        """Compile if the work is then likely to end sooner. Call it when the GPU is idle.

        step, last: the steps taken, and the most that the run can take; runs_left: how many runs of
        this shape follow. A run ends when its task is solved, so the steps left are unknown. We
        guess that this run is half over, and that the others will take as many steps.
        """
        if not self.undecided or self.calls < CAPTURE_AFTER + 2:
            return
        seconds = (time.monotonic() - self.began) / (self.calls - CAPTURE_AFTER - 1)
        to_go = min(step, last - step)
        steps_left = to_go + runs_left * (step + to_go)
        cost = min(compiled_shapes.values(), default=COMPILE_SECONDS)
        if steps_left * seconds * (1 - 1 / SPEEDUP) > cost:
            say(f"{1e3 * seconds:.2f} ms per step, captured; compiling now, which takes about "
                f"{cost:.0f} s and pays within {steps_left:,} steps")
            self.compile()
