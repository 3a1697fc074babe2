"""Figures of mixed trainings: no text runs into another or over the edge."""

import io

import pytest
from test_plot import figures, write  # noqa: F401: figures is a fixture

LRS = [1e-4, 2.5e-4, 5e-4, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.0056789, 0.0123]


def assert_apart(words):
    found = [word.get_window_extent() for word in words]
    assert len(found) > 1
    for i, box in enumerate(found):
        assert not any(box.overlaps(other) for other in found[:i]), words[i].get_text()


def ticks(ax):
    low, high = ax.get_xlim()
    return [t for t in ax.get_xticklabels() if low <= t.get_position()[0] <= high]


def drawn(fig):
    """The figure after the layout that output.write_figure makes."""
    fig.savefig(io.BytesIO())
    return fig


def test_ticks_of_training_steps(tmp_path, figures):  # noqa: F811
    """A short trial beside a long run, in three panels."""
    paths = [write(tmp_path, M=M, steps=steps, seed=seed) for M in (1, 4, 16)
             for seed, steps in enumerate([[10, 20, 50, 100], [100, 1000, 20000]])]
    fig = drawn(figures(*paths)["training_tau1_K16_d8_L64_M1-4-16.png"])
    for ax in fig.axes:
        assert_apart(ticks(ax))


@pytest.mark.parametrize("values, flag", [(LRS, "lr"), ([8, 16, 32, 64], "d")])
def test_ticks_of_values(values, flag, tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, M=M, **{flag: value}) for M in (1, 4, 16) for value in values]
    fig, = figures(*paths, "--against", flag).values()
    for ax in drawn(fig).axes:
        assert len(ticks(ax)) == len(values)
        assert_apart(ticks(ax))
    assert {t.get_rotation() for ax in fig.axes for t in ticks(ax)} == {90 if flag == "lr" else 0}


def test_each_training_length_has_its_own_range(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, model, L=L) for L in (8, 16, 128) for model in ("rope", "mamba")]
    fig = drawn(figures(*paths, "--panels", "L")["length_by_L_tau1_K16_d8_L8-16-128_M1.png"])
    assert [ax.get_xlim() for ax in fig.axes] == [(0, 24), (0, 48), (0, 384)]
    assert fig.get_suptitle() == "At least 0.95 from L on: rope and mamba"
    for ax in fig.axes:
        assert ax.get_xscale() == "linear"
        assert_apart(ticks(ax))


def test_many_long_names(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, lr=lr, batch_size=16 + n, n_heads=2 + n, train_lengths="uniform")
             for n, lr in enumerate([*LRS, *(10 * lr for lr in LRS)])]
    paths += [write(tmp_path), write(tmp_path, "mamba")]
    fig = drawn(figures(*paths)["length_tau1_K16_d8_L64_M1.png"])
    ax, = fig.axes
    names = ax.texts[2:]                                    # after chance and the training length
    assert len(names) == 22
    assert_apart(names)
    assert max(name.get_window_extent().x1 for name in names) <= fig.bbox.width
    assert ax.get_window_extent().width > 2 * fig.dpi       # inches


def test_a_title_does_not_break_within_a_name(tmp_path, figures):  # noqa: F811
    names = [f"2x{'linear-fixed-noconv'[:n]}" for n in range(5, 20)]
    for fig in figures(*[write(tmp_path, name) for name in names]).values():
        assert set(names) <= set(fig.get_suptitle().replace(",", "").split())
