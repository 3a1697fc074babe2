"""Printing and writing: text for figures, short error messages, a progress bar, atomic files.

Works without torch, like plot.py.
"""

import argparse
import contextlib
import difflib
import io
import os
import sys
import tempfile
import time

from tqdm import tqdm

SAY_SECONDS = 30      # between lines of progress where there is no terminal
GREY = "0.35"         # of axes and small print in figures
RC_PARAMS = {         # of matplotlib, for all figures
    "font.size": 11, "axes.titlesize": 11, "axes.edgecolor": GREY, "xtick.color": GREY,
    "ytick.color": GREY, "xtick.labelsize": 9, "axes.spines.top": False,
    "axes.spines.right": False, "text.usetex": False}


def text(value, most=40):
    """A name or number that is safe to show: short, printable, and without $, which starts
    mathematics in a figure."""
    value = f"{value:g}" if isinstance(value, float) else str(value)
    value = "".join(c if c.isprintable() and c != "$" else "?" for c in value)
    return value if len(value) <= most else value[:most - 1] + "…"


def listed(names):
    """Join names as English does."""
    *others, last = names
    return f"{', '.join(others)} and {last}" if others else last


def numbered(numbers):
    """Whole numbers as text: "0, 1, 2", or "first to last" for more than three, or for more than
    eight if they have gaps."""
    numbers = sorted(set(numbers))
    gaps = numbers[-1] - numbers[0] >= len(numbers)
    words = [f"{n:,}" for n in numbers]
    return ", ".join(words) if len(words) <= (8 if gaps else 3) else f"{words[0]} to {words[-1]}"


def length(word):
    """A context length on the command line, as a `type` of argparse."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{text(word)} is not a context length, a whole number of "
                                         "at least 1; files come before the flag")
    return int(word)


def short_errors(parser):
    """Make a parser answer a wrong command with one sentence and status 2."""
    def error(message):
        if message.startswith("unrecognized arguments: --"):
            flag = message.split()[2].split("=")[0]
            known = {name.lower(): name for name in parser._option_string_actions}
            near = difflib.get_close_matches(flag.lower(), known, 1)
            message += f"; did you mean {known[near[0]]}?" if near else "; --help lists the flags"
        elif message.startswith("unrecognized arguments"):
            message += "; a value needs its flag, and --help says what takes several values"
        elif message.startswith("the following arguments are required"):
            message += "; they come before flags that take several values"
        parser.exit(2, f"{parser.prog}: {text(message, 2000)}\n")

    parser.allow_abbrev, parser.error = False, error
    return parser


def end_with(parser, written, left_out):
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
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"      # may lack a character
        tqdm.write(line.encode(encoding, "replace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        sys.stdout = open(os.devnull, "w")


def rank_and_processes():
    """This process's rank, and how many processes torchrun started; without it, 0 and 1."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Progress(tqdm):
    """A progress bar; where there is no terminal, a line now and then instead.

    quiet: neither. Under torchrun only the first process shows one, because all would write on the
    same line.
    """

    def __init__(self, total, quiet=False, **options):
        quiet = quiet or rank_and_processes()[0] > 0
        super().__init__(total=total, leave=False, dynamic_ncols=True, disable=quiet or None,
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
    """Heights of labels that do not touch, near those wanted, which fall from first to last."""
    heights, gap = list(heights), min(0.065, (high - low) / max(1, len(heights)))
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
    inches = ax.figure.dpi_scale_trans + ScaledTranslation(1, 0, ax.transAxes)   # from the edge on
    ends = sorted(ends, key=lambda end: -round(end[1], 2))         # equals stay in their order
    heights = spread([y for _, y, _, _ in ends], ax.get_ylim()[0] + 0.04, 1.01)
    for (x, y, name, (colour, dashes)), height in zip(ends, heights):
        beside = dict(color=colour, clip_on=False,
                      transform=blended_transform_factory(inches, ax.transData))
        ax.plot([x, ax.get_xlim()[1]], [y, y], lw=0.8, ls=":", color=colour, alpha=0.4)
        ax.plot([0, 0.12], [y, height], lw=0.8, **beside)
        ax.plot([0.12, 0.54], [height, height], lw=2, ls=dashes, **beside)
        ax.text(0.6, height, name, va="center_baseline", **beside)


def write_figure(path, fig):
    """Write a figure of matplotlib as PNG, in a folder that is made if it is not there."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    image = io.BytesIO()
    fig.savefig(image, format="png", dpi=150)
    write_file(path, image.getvalue())


def write_file(path, data):
    """Write bytes. Even after a power cut, the path holds the whole old or the whole new file."""
    folder, name = os.path.split(path)
    f = tempfile.NamedTemporaryFile(dir=folder or ".", prefix=name + ".", suffix=".tmp",
                                    delete=False)
    try:
        with f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(f.name, 0o644)
        os.replace(f.name, path)                 # after closing: Windows renames no open file
    except BaseException:
        with contextlib.suppress(FileNotFoundError):         # Ctrl-C after the file was renamed
            os.unlink(f.name)
        raise


def remove(*paths):
    """Remove those of the files that exist, as far as the system permits."""
    for path in paths:
        try:
            os.remove(path)
        except OSError:
            pass
