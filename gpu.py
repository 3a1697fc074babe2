"""What makes a training step fast on a GPU: one CUDA graph, and torch.compile when it pays.

Small models launch hundreds of kernels of a few microseconds, and launching one takes the host
longer than running it. A captured step is replayed as a whole: rope at d = 8 takes 0.5 ms instead
of 8. Compiled, with fewer kernels, it takes 0.2 ms, but compiling takes 40 s. `FastStep` therefore
captures the plain step first and compiles later, when that ends the work sooner.
"""

import contextlib
import importlib.util
import time

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_scan import compile_each_shape, compiled_scan
from runs import say

WARM_UP = 3            # steps before a capture: they allocate what the graph will use
COMPILE_SECONDS = 40   # what compiling a shape takes, until one has been timed here
SPEEDUP = 2.5          # what it brings, likewise: 2.6 (rope) to 9 times (mamba) on an H100
SMALL_D, SMALL_L = 16, 256
compiled_shapes = {}   # shape -> seconds that it took to compile, in this process


def has_compiler():
    return importlib.util.find_spec("triton") is not None


def compile_small(function, config):
    """torch.compile for a function that meets the same shapes at every step of a run.

    Small models: kernels that do not need each other are launched as one, and matmuls are written
    as sums, which fuse with their surroundings (rope at d = 8: 0.22 instead of 0.27 ms). Mamba-2
    keeps its matmuls, which are many and wide (0.33 instead of 0.37 ms).
    """
    from torch._inductor import config as inductor       # here, because importing it takes a second
    small = config["d"] <= SMALL_D and config["L"] <= SMALL_L
    sums = {"decompose_mm_pass": {"min_first_dimension_decomposition": 1,
                                  "max_other_dimension_decomposition": 10**9}}
    inductor.post_grad_fusion_options = sums                 # torch reads these two numbers once
    options = {"combo_kernels": small, "comprehensive_padding": not small,
               "post_grad_fusion_options": {}}
    if small and "mamba2" not in config["model"]:
        options["post_grad_fusion_options"] = sums
    return compile_each_shape(function, options)


def capture(step, generator):
    """Capture a training step as a CUDA graph -> a function that replays it and returns its loss.

    Everything the step reads must keep its place in memory.
    """
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        loss = step()

    def replay():
        graph.replay()
        return loss
    return replay


class FastStep:
    """A training step on a GPU: called like `step`, it returns the same losses, to rounding.

    step(*functions) takes one training step with these functions; generator: the torch.Generator
    that it draws from; config: the run's, whose "compile" is auto, on or off.
    """

    def __init__(self, step, functions, generator, config):
        self.step, self.functions, self.generator = step, functions, generator
        self.config = config
        self.shape = tuple(config[flag] for flag in (
            "task", "model", "K", "d", "L", "batch_size", "n_heads", "d_state", "train_lengths"))
        small = config["d"] <= SMALL_D and config["L"] <= SMALL_L
        # The plain formula of attention, which the compiler can fuse, not the library's kernels.
        self.attention = [SDPBackend.MATH] if small else None
        self.calls, self.replay, self.began, self.compiled = 0, None, time.monotonic(), False
        self.undecided = config["compile"] == "auto" and has_compiler()
        if config["compile"] == "on" or (self.undecided and self.shape in compiled_shapes):
            self.compile()

    def __call__(self):
        if self.calls == WARM_UP:
            self.replay = capture(self.plain, self.generator)
            torch.cuda.synchronize()
            if self.compiled and self.shape not in compiled_shapes:
                compiled_shapes[self.shape] = time.monotonic() - self.began
            self.began = time.monotonic()
        self.calls += 1
        return self.replay() if self.replay else self.plain()

    def plain(self):
        """The step, its kernels launched one by one."""
        attention = sdpa_kernel(self.attention) if self.attention else contextlib.nullcontext()
        with compiled_scan(self.compiled), attention:
            return self.step(*self.functions)

    def compile(self):
        """Compile the step: the next calls compile, and then it is captured anew."""
        self.functions = [compile_small(function, self.config) for function in self.functions]
        self.calls, self.replay, self.compiled, self.undecided = 0, None, True, False
        self.began = time.monotonic()

    def compile_if_it_pays(self, step, last, runs_left):
        """Decide anew at `step`, a moment at which the GPU has caught up with the host.

        What is left is not known: a run ends when its task is solved. The best guess for something
        that has lasted so long is that it is half over, and that the other runs of this shape will
        be like it.
        """
        if not self.undecided or not self.replay or self.calls <= WARM_UP:
            return
        seconds = (time.monotonic() - self.began) / (self.calls - WARM_UP)
        to_go = min(step, last - step)
        steps_left = to_go + runs_left * (step + to_go)
        cost = min(compiled_shapes.values(), default=COMPILE_SECONDS)
        if steps_left * seconds * (1 - 1 / SPEEDUP) > cost:
            say(f"{1e3 * seconds:.2f} ms per step, captured; compiling now, which takes about "
                     f"{cost:.0f} s and pays within {steps_left:,} steps")
            self.compile()
