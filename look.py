"""How the figures look: the colour and dashes of each model, and labels that do not lie on each other.

Imports nothing of this repository; plot, costs and records use it.
"""

# Colours of Okabe and Ito, which the colour-blind can tell apart. Later lines lie on earlier ones and are thinner or broken,
# so that models which are all at 1 can all be seen.
STYLES = {  # model: colour, line width, dashes
    "nope":     ("#56B4E9", 4.4, "-"),
    "learned":  ("#E69F00", 3.0, "-"),
    "rope":     ("#0072B2", 1.8, "-"),
    "mamba":    ("#D55E00", 1.8, (0, (7, 2))),
    "hybrid-a": ("#009E73", 1.8, (0, (4.5, 4.5))),
    "hybrid-b": ("#CC79A7", 1.8, (0, (1.5, 3))),
    # their relatives: the ladder in browns and greys, those with Mamba-2 in reds and violets, the others in greens
    "rnn":           ("#999999", 1.4, "-"),
    "lti":           ("#666666", 1.4, "-"),
    "retention":     ("#8C6D31", 1.4, "-"),
    "griffin":       ("#5C4A1F", 1.4, (0, (4, 1.5))),
    "mamba2":        ("#A50F15", 1.4, (0, (7, 2))),
    "samba":         ("#1B7837", 1.4, (0, (4, 1.5))),
    "mamba2-hybrid": ("#54278F", 1.4, (0, (4, 1.5))),
    "jamba":         ("#01665E", 1.4, (0, (2, 1.5))),
    "zamba":         ("#35978F", 1.4, (0, (6, 1.5, 1, 1.5))),
    "zamba2":        ("#756BB1", 1.4, (0, (6, 1.5, 1, 1.5))),
    "zamba2-mini":   ("#9E9AC8", 1.4, (0, (6, 1.5, 1, 1.5))),
}
LETTERS = {"M": 6, "R": 4, "P": 2.5, "A": 1}  # patterns without a name are black, with a dash for each of their letters
GREY = "0.35"
LOOK = {"font.size": 11, "axes.titlesize": 11, "axes.spines.top": False, "axes.spines.right": False,
        "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY}
LABEL_GAP = 0.062    # between the labels at the curves' ends, in units of accuracy or of the height of the axes


def style(model):
    """Colour, width and dashes of a model: they depend on its name only, so they are the same in every figure.

    What follows a comma is its width or how it started; it has the model's colour.
    """
    model, _, variant = model.partition(", ")
    if variant:
        return style(model)[0], 1.2, (0, (1, 1))
    dashes = [length for letter in model for length in (LETTERS.get(letter, 3), 1.5)]
    return STYLES.get(model, ("black", 1.6, (0, (*dashes[:-1], 4.5))))


def order(model):
    known = model.partition(", ")[0]
    rank = list(STYLES).index(known) if known in STYLES else len(STYLES)
    return rank, known, len(model), model                      # d = 8 before d = 64


def spread(heights, low, high):
    """Heights of labels, at least LABEL_GAP apart and near the heights wanted, which fall from the first to the last."""
    placed = []
    for y in heights:
        placed.append(min(y, high if not placed else placed[-1] - LABEL_GAP))
    for i in reversed(range(len(placed))):
        placed[i] = max(placed[i], low if i + 1 == len(placed) else placed[i + 1] + LABEL_GAP)
    return placed
