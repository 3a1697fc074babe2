"""Printing, drawing and writing: short error messages, a progress bar, colours, atomic files.

Works without torch, whose import is slow: plot.py rarely needs it.
"""

import argparse
import contextlib
import difflib
import hashlib
import io
import os
import re
import sys
import time

from tqdm import tqdm

SAY_SECONDS = 30      # between lines of progress where there is no terminal
GREY = "0.35"         # of axes and small print in figures
RC_PARAMS = {         # of matplotlib, for all figures
    "font.size": 11, "axes.titlesize": 11, "axes.edgecolor": GREY, "xtick.color": GREY,
    "ytick.color": GREY, "xtick.labelsize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "text.usetex": False}
COLOURS = {  # in the order of figures; the first six for colour-blind readers (Okabe, Ito). From
    # conv2+attention on, colours of other figures are used again.
    "nope": "#56B4E9", "learned": "#E69F00", "rope": "#0072B2", "mamba": "#D55E00",
    "hybrid-a": "#009E73", "hybrid-b": "#CC79A7", "rnn": "#999999", "lti": "#666666",
    "retention": "#8C6D31", "griffin": "#5C4A1F", "mamba2": "#A50F15", "samba": "#1B7837",
    "mamba2-hybrid": "#54278F", "jamba": "#01665E", "zamba": "#35978F", "zamba2": "#756BB1",
    "zamba2-mini": "#9E9AC8", "mamba3": "#DD1C77", "deltanet": "#66A61E",
    "gated-deltanet": "#17BECF", "alibi": "#8C564B", "forgetting": "#5F7A8A",
    "conv2+attention": "#E69F00", "conv+attention": "#333333", "conv8+attention": "#CC79A7",
    "mamba-noconv+attention": "#D55E00", "mamba+attention": "#009E73", "2xattention": "#56B4E9",
    "2xrope": "#0072B2", "2xalibi": "#8C564B", "2xforgetting": "#5F7A8A", "2xwindow": "#BCBD22",
    "2xlinear-fixed-noconv": "#C7A76C", "2xlinear-fixed": "#8C6D31",
    "2xlinear-decay-noconv": "#F4A582", "2xlinear-decay": "#CA0020",
    "2xgated-deltanet-noconv": "#9EDAE5", "2xgated-deltanet": "#17BECF",
    "2xlinear-rotation-noconv": "#E6C35C", "2xlinear-rotation": "#B8860B"}
ORDER = list(COLOURS)        # of models in figures and tables


def text(value, most=40):
    """A name or number that is safe to show: printable, without $, which starts mathematics in a
    figure, and at most `most` characters long: its beginning and its end."""
    if isinstance(value, float):
        value = f"{value:g}" if float(f"{value:g}") == value else repr(value)
    value = str(value)
    value = "".join(c if c.isprintable() and c != "$" else "?" for c in value)
    half = most // 2
    return value if len(value) <= most else value[:half] + "…" + value[1 + half - most:]


def sort_key(value):
    """A sort key: numbers by size, models as in ORDER, everything else by name."""
    if isinstance(value, tuple):
        return tuple(sort_key(part) for part in value)
    if isinstance(value, (int, float)):
        return 0, value, ""
    return 1, ORDER.index(value) if value in ORDER else len(ORDER), str(value)


def listed(names):
    """Join names as English does."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def numbered(numbers):
    """Whole numbers as text: "0, 1, 2"; "0 to 9" for more than three without gaps; "12 between 0
    and 30" for more than eight with gaps."""
    numbers = sorted(set(numbers))
    gaps = numbers[-1] - numbers[0] >= len(numbers)
    words = [f"{n:,}" for n in numbers]
    if len(words) <= (8 if gaps else 3):
        return ", ".join(words)
    if gaps:
        return f"{len(words)} between {words[0]} and {words[-1]}"
    return f"{words[0]} to {words[-1]}"


def length(word):
    """A context length on the command line, as a `type` of argparse."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{text(word)} is not a context length, a whole number of "
                                         "at least 1; files come before the flag")
    return int(word)


class Parser(argparse.ArgumentParser):
    """A parser of flags that answers a wrong command with one sentence and status 2."""

    def __init__(self, *words, **options):
        super().__init__(*words, allow_abbrev=False, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")      # -1e-3 is a value

    def error(self, message):
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].split("=")[0]
            known = {name.lower(): name for name in self._option_string_actions}
            near = difflib.get_close_matches(flag.lower(), known, 1, cutoff=0.75)
            message += f"; did you mean {known[near[0]]}?" if near else "; --help lists the flags"
        elif message.startswith("unrecognized arguments"):
            message += "; a value needs its flag, and only some flags take several: see --help"
        elif message.startswith("the following arguments are required"):
            message += "; they come before flags that take several values"
        elif " value: " in message and "," in message:
            message += "; several values are separated by spaces"
        self.exit(2, f"{self.prog}: {text(message, 2000)}\n")


def report_left_out(parser, written, left_out):
    """Say what was left out, and end with status 2 if nothing was written.

    left_out: a sentence for each file or figure. If nothing was written for a single reason, that
    reason is the error.
    """
    if not written and len(left_out) == 1:
        parser.error(left_out[0])
    for sentence in left_out:
        print(f"{parser.prog}: left out: {text(sentence, 1000)}", file=sys.stderr)
    if not written:
        parser.error("there is nothing to draw")


def say(line):
    """Print a line above the progress bar. A closed or full stdout does not stop the program."""
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"      # Windows may lack some
        tqdm.write(line.encode(encoding, "replace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        sys.stdout = open(os.devnull, "w")


def rank_and_processes():
    """This process's rank, and how many processes torchrun started; without it, 0 and 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Progress(tqdm):
    """A progress bar; where there is no terminal, a line every SAY_SECONDS instead.

    quiet: neither. Under torchrun only the first process shows one, because all would write on the
    same line.
    """

    def __init__(self, total, quiet=False, **options):
        quiet = quiet or rank_and_processes()[0] > 0
        disable = True if quiet else None        # None: tqdm shows no bar without a terminal
        super().__init__(total=total, leave=False, dynamic_ncols=True, disable=disable,
                         bar_format="{desc} |{bar}| {elapsed}<{remaining}", **options)
        self.quiet, self.said = quiet, time.monotonic()

    def update(self, n=1):
        super().update(n)
        if self.disable:      # tqdm counts only what it shows
            self.n += n

    def report(self, words):
        """Show progress: text before the bar, or a line of its own."""
        self.set_description_str(words, refresh=False)      # the next update shows them
        now = time.monotonic()
        if self.disable and not self.quiet and now - self.said > SAY_SECONDS:
            self.said = now
            say(words)


def spread(heights, low, high):
    """The heights of labels, moved apart so that they do not touch, between low and high.

    heights: those wanted, the highest first.
    """
    heights = list(heights)
    gap = min(0.065, (high - low) / max(1, len(heights)))
    for k in range(len(heights)):                                  # down, away from the one above
        above = heights[k - 1] if k else high + gap
        heights[k] = min(heights[k], above - gap)
    for k in reversed(range(len(heights))):                        # up, away from the one below
        below = heights[k + 1] if k + 1 < len(heights) else low - gap
        heights[k] = max(heights[k], below + gap)
    return heights


def label_ends(ax, ends):
    """Name the curves at the right of the axes. ends: [(x, y, name, (colour, dashes)), ...]."""
    from matplotlib.transforms import ScaledTranslation, blended_transform_factory
    # x in inches from the right edge
    inches = ax.figure.dpi_scale_trans + ScaledTranslation(1, 0, ax.transAxes)
    ends = sorted(ends, key=lambda end: -round(end[1], 2))         # ties keep their order
    heights = spread([y for _, y, _, _ in ends], ax.get_ylim()[0] + 0.04, 1.01)
    for (x, y, name, (colour, dashes)), height in zip(ends, heights):
        beside = dict(color=colour, clip_on=False,
                      transform=blended_transform_factory(inches, ax.transData))
        ax.plot([x, ax.get_xlim()[1]], [y, y], lw=0.8, ls=":", color=colour, alpha=0.4)
        ax.plot([0, 0.12], [y, height], lw=0.8, **beside)
        ax.plot([0.12, 0.54], [height, height], lw=2, ls=dashes, **beside)
        ax.text(0.6, height, name, va="center_baseline", **beside)


def write_figure(path, fig):
    """Write a figure of matplotlib, as PNG or what its path ends in."""
    image = io.BytesIO()
    fig.savefig(image, format=os.path.splitext(path)[1][1:], dpi=150)
    write_file(path, image.getvalue())


def write_file(path, data):
    """Write bytes, in a folder that is made if needed. Even after a power cut, the path holds the
    whole old or the whole new file."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}.{os.getpid()}.tmp"
    remove(temporary)                            # of a killed process with the same number
    try:
        with open(temporary, "xb") as f:         # x: never through a link that is there
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)              # after closing: Windows renames no open file
    finally:
        remove(temporary)                        # if it could not be renamed


def digest_of(path):
    """The SHA-256 of a file; None if it cannot be read."""
    try:
        with open(path, "rb") as f:
            return hashlib.sha256(f.read()).hexdigest()
    except OSError:
        return None


def remove(*paths):
    """Remove those of the files that exist, as far as the system permits."""
    for path in paths:
        with contextlib.suppress(OSError):
            os.remove(path)
