"""plot.py --lowest and --title, the order and colours of models, and chance."""

import pytest
from matplotlib.colors import to_hex
from test_plot import constants, figures, texts, thick, write  # noqa: F401: figures is a fixture

import plot
import summary
from data import TASKS, n_answers
from output import sort_key


def test_lowest(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, d=d, at=1.0, beyond=low) for d, low in ((8, 0.25), (16, 0.995))]
    at = figures(*paths, "--against", "d")["against_d_tau1_K16_d8-16_L64_M1.png"]
    drawn = figures(*paths, "--against", "d", "--lowest")
    lowest = drawn["against_d_lowest_tau1_K16_d8-16_L64_M1.png"]
    colour = plot.COLOURS["rope"].lower()
    assert list(thick(at.axes[0])[colour][1]) == [1.0, 1.0]
    assert list(thick(lowest.axes[0])[colour][1]) == [0.25, 0.995]
    assert at.axes[0].get_ylabel() == "accuracy at L"
    assert lowest.axes[0].get_ylabel() == "lowest accuracy from L to 3L"
    assert at.get_suptitle().replace("\u00a0", " ") == "0.99 or more at 64 tokens: rope"
    title = lowest.get_suptitle().replace("\u00a0", " ")
    assert title == "0.99 or more from L to 3L: none; in part: rope (1 of 2)"


def test_against_a_flag_that_some_runs_lack(tmp_path, figures):  # noqa: F811
    """As after adding a flag to train.py: older runs do not have it."""
    paths = [write(tmp_path), write(tmp_path, dropout=0.5)]
    fig, = figures(*paths, "--against", "dropout").values()
    assert [label.get_text() for label in fig.axes[0].get_xticklabels()] == ["0.5", "None"]


def test_lowest_needs_points(tmp_path, refuses):
    for flags in [], ["--against", "model"]:
        assert "--lowest needs" in refuses(plot.main, [write(tmp_path), "--lowest", *flags])


def test_a_table_draws_nothing(tmp_path, refuses):
    flags = ["--against", "lr", "--table"]
    assert "it takes no --against" in refuses(plot.main, [write(tmp_path), *flags])


def test_files_come_before_flags_of_several_values(tmp_path, refuses):
    error = refuses(plot.main, ["--panels", "d", write(tmp_path)])
    assert "RUN.json; they come before flags that take several values" in error


def test_a_folder_is_not_a_result(tmp_path, refuses):
    error = refuses(plot.main, [str(tmp_path)])
    assert f"{tmp_path} cannot be read: name the .json files in it" in error


def test_title(tmp_path, figures):  # noqa: F811
    drawn = figures(write(tmp_path), "--name", "x", "--title", "What was found")
    assert drawn["x.png"].get_suptitle() == "What was found"
    assert drawn["x_training.png"].get_suptitle() != "What was found"      # shows something else


@pytest.mark.parametrize("ending, begins", [("png", b"\x89PNG"), ("pdf", b"%PDF"),
                                            ("svg", b"<?xml")])
def test_format(tmp_path, ending, begins):
    flags = "--format", ending, "--name", "x", "--out", str(tmp_path)
    path, _ = plot.main([write(tmp_path), *flags])
    assert path == str(tmp_path / f"x.{ending}")
    assert (tmp_path / f"x.{ending}").read_bytes().startswith(begins)


def test_listed_stacks_have_a_place_and_a_colour():
    assert len(set(plot.ORDER)) == len(plot.ORDER) == len(plot.COLOURS)
    order = ["2xlinear-fixed", "2xlinear-decay", "2xgated-deltanet", "2xlinear-rotation"]
    assert sorted(reversed(order), key=sort_key) == order
    assert sort_key("rope") < sort_key("2xrope") < sort_key("2xunknown")


@pytest.mark.parametrize("name", ["mamba+attention", "hybrid-a"])
def test_two_names_of_one_model_have_one_colour(name):
    assert plot.COLOURS[name] == "#009E73"


def test_an_unknown_flag_is_answered_with_the_known(tmp_path, figures, refuses):  # noqa: F811
    path = write(tmp_path, device="cuda", out="x", overwrite=False, compile="auto", n_heads=2)
    listed = refuses(plot.main, [path, "--against", "foo_bar"]).strip().split(": ")[-1].split(", ")
    assert {"lr", "n-heads", "seed", "model", "M", "stop-early"} <= set(listed)
    assert not {"device", "out", "overwrite", "compile", "n_heads"} & set(listed)
    for flag in listed:
        if flag == "model":
            assert len(figures(path, "--against", flag)) == 1
        else:
            assert "all runs have" in refuses(plot.main, [path, "--against", flag])


def test_a_title_of_rows_leaves_out_who_fails(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, "mamba", M=M) for M in (1, 4)]
    paths += [write(tmp_path, "rope", M=M, beyond=0.5 if M == 4 else None) for M in (1, 4)]
    lost = [write(tmp_path, "nope", M=M, beyond=0.5) for M in (1, 4)]
    fig, = figures(*paths, *lost, "--against", "model").values()
    title = fig.get_suptitle().replace("\u00a0", " ")
    assert title == "At least 0.95 from L to 3L: mamba; in part: rope (1 of 2)"
    fig, = figures(*lost, "--against", "model").values()
    assert fig.get_suptitle() == "At least 0.95 from L to 3L: none"


def test_no_title_speaks_of_lengths_that_were_not_tested(tmp_path, figures):  # noqa: F811
    at_L = [write(tmp_path, "mamba", lengths=[32, 64], seed=seed) for seed in (0, 1)]
    assert figures(*at_L)["length_tau1_K16_d8_L64_M1.png"].get_suptitle() == ""
    fig, = figures(*at_L, "--against", "model").values()
    assert fig.get_suptitle() == ""
    half = [write(tmp_path, beyond=0.7, seed=1), write(tmp_path, lengths=[64], seed=2)]
    assert figures(*half)["length_tau1_K16_d8_L64_M1.png"].get_suptitle() == ""


def test_lowest_leaves_out_what_was_not_tested(tmp_path, figures, capsys):  # noqa: F811
    paths = [write(tmp_path, lr=lr) for lr in (0.004, 0.008)]
    short = write(tmp_path, "mamba", lengths=[64])
    fig, = figures(*paths, short, "--against", "lr", "--lowest").values()
    assert "mamba" not in texts(fig.axes[0]) and "mamba" not in fig.get_supxlabel()
    assert f"{short} has no lowest accuracy from L to 3L" in capsys.readouterr().err


def test_a_long_title_is_cut(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, f"{n}x{'mamba+' * 9}mlp") for n in range(20)]
    fig, _ = figures(*paths).values()
    assert fig.get_suptitle().count("\n") == 5 and fig.get_suptitle().endswith("[...]")


def test_the_flag_that_differs_is_named_and_several_unless_at_their_default(  # noqa: F811
        tmp_path, figures):
    paths = [write(tmp_path), write(tmp_path, "mamba"), write(tmp_path, "mamba", d_state=4)]
    ax, = figures(*paths)["length_tau1_K16_d8_L64_M1.png"].axes
    assert set(texts(ax)[2:]) == {"rope", "mamba (d_state = 4)", "mamba (d_state = 16)"}
    paths.append(write(tmp_path, "mamba", lr=0.004))
    ax, = figures(*paths)["length_tau1_K16_d8_L64_M1.png"].axes
    assert set(texts(ax)[2:]) == {"rope", "mamba", "mamba (d_state = 4)", "mamba (lr = 0.004)"}


def test_variants_of_one_model_differ_in_colour(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, "mamba", lr=lr) for lr in (0.002, 0.004, 0.02)]
    for fig in figures(*paths).values():
        names = [text for text in fig.axes[0].texts if "lr = " in text.get_text()]
        assert len({to_hex(text.get_color()) for text in names}) == 3


def test_a_figure_against_seeds_has_each_seed_once(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, seed=seed) for seed in range(2)]
    fig, = figures(*paths, "--against", "seed", "--panels", "L").values()
    assert "seeds: 0, 1;" in fig.get_supxlabel()


def test_a_name_of_a_file_has_few_numbers(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, M=M, lengths=[64], steps=[1]) for M in range(1, 7)]
    assert list(figures(*paths, "--against", "M")) == ["against_M_tau1_K16_d8_L64_M1-to-6.png"]
    again = figures(*paths, "--against", "M", "--panels", "M", "d")
    assert list(again) == ["against_M_by_d_tau1_K16_d8_L64_M1-to-6.png"]


def test_mixed_lengths_are_marked(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path), write(tmp_path, "mamba", train_lengths="uniform")]
    for shown, words in ((paths, "at or up to 64"), (paths[:1], "at 64"), (paths[1:], "up to 64")):
        fig = figures(*shown)["length_tau1_K16_d8_L64_M1.png"]
        assert f"trained {words}" in texts(fig.axes[0])


def test_dashed_medians_lie_above_solid_ones(tmp_path, figures):  # noqa: F811
    """Where curves coincide, the gaps of the upper one show the lower one."""
    paths = [write(tmp_path, name) for name in ("rope", "mamba", "own", "other")]
    for flags in ((), ("--against", "seed", "--panels", "L")):
        paths += [write(tmp_path, name, seed=1) for name in ("rope", "mamba")]
        for fig in figures(*paths, *flags).values():
            medians = [line for line in fig.axes[0].lines if line.get_linewidth() == 2
                       and line.get_transform() == fig.axes[0].transData]
            solid = [line.get_zorder() for line in medians if line.get_linestyle() == "-"]
            dashed = [line.get_zorder() for line in medians if line.get_linestyle() != "-"]
            assert len(dashed) >= 2 and min(dashed) > max(solid)


def test_widths_in_panels_are_not_in_the_rows(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, d=8), write(tmp_path, d=16)]
    fig, = figures(*paths, "--against", "model", "--panels", "d").values()
    assert [[t.get_text() for t in ax.get_yticklabels()] for ax in fig.axes] == [["rope"]] * 2


def test_columns_of_many_models_do_not_meet(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, f"{n}xmlp", lr=lr) for n in range(1, 31) for lr in (0.004, 0.008)]
    fig, = figures(*paths, "--against", "lr").values()
    places = sorted(x for x, _ in (line.get_xydata()[0] for line in fig.axes[0].lines
                                   if line.get_marker() == "."))
    assert max(x for x in places if x < 0.5) < 0.4 and min(x for x in places if x > 0.5) > 0.6
    assert len(set(places)) == 60
    assert set(texts(fig.axes[0])[1:]) == {f"{n}xmlp" for n in range(1, 31)}    # lr is in no name


def test_seeds_with_gaps_are_listed(tmp_path, figures):  # noqa: F811
    caption = figures(*(write(tmp_path, seed=seed) for seed in (0, 3, 20, 99))).popitem()[1]
    assert "seeds: 0, 3, 20, 99" in caption.get_supxlabel()
    caption = figures(*(write(tmp_path, seed=seed) for seed in range(4))).popitem()[1]
    assert "seeds: 0 to 3" in caption.get_supxlabel()


def test_a_caption_says_if_settings_have_other_seeds(tmp_path, figures):  # noqa: F811
    """Seeds 0 to 2 at M = 1, 1 to 3 at M = 2; per model, if that says it all."""
    paths = [write(tmp_path, M=M, seed=M + seed - 1) for M in (1, 2) for seed in range(3)]
    words = figures(*paths)["length_tau1_K16_d8_L64_M1-2.png"].get_supxlabel()
    assert "seeds: 0 to 3 (not all of them in each setting);" in words.replace("\n", " ")
    paths = paths[:3] + [write(tmp_path, "mamba", seed=0)]
    words = figures(*paths)["length_tau1_K16_d8_L64_M1.png"].get_supxlabel()
    assert "seeds: 0, 1, 2 (mamba: 0);" in words.replace("\n", " ")


def test_a_caption_speaks_of_a_median_where_there_is_one(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, seed=seed) for seed in (0, 1)]
    caption = figures(*paths, "--panels", "seed")["length_by_seed_tau1_K16_d8_L64_M1.png"]
    assert "seeds: 0, 1;" in caption.get_supxlabel() and "median" not in caption.get_supxlabel()
    assert "their median" in figures(*paths).popitem()[1].get_supxlabel()


def test_a_figure_that_is_left_out_is_named(tmp_path, figures, capsys):  # noqa: F811
    paths = [write(tmp_path, lr=0.004), write(tmp_path), write(tmp_path, tau=5)]
    figures(*paths, "--against", "lr")
    assert "against_lr_tau5_K16_d8_L64_M1.png: all runs have lr = 0.008" in capsys.readouterr().err


def vertical_lines(ax):
    """{colour: x} of the lines of two points, from the bottom of the axes to the top."""
    return {line.get_color(): line.get_xdata()[0] for line in ax.lines
            if list(line.get_ydata()) == [0, 1] and len(set(line.get_xdata())) == 1}


@pytest.mark.parametrize("task, guess", [("parity", 2), ("mqar", 8), ("recall", 16)])
def test_rows_mark_the_chance_of_their_task(tmp_path, figures, task, guess):  # noqa: F811
    fig, = figures(write(tmp_path, task=task), "--against", "model").values()
    assert list(vertical_lines(fig.axes[0]).values()) == [1 / guess]


def test_mqar_answers_with_the_upper_half_of_the_vocabulary():
    for K in (5, 16):
        _, labels, _ = TASKS["mqar"](400, 6, K, 2)
        assert len(labels.unique()) == n_answers("mqar", K)


def test_an_unknown_chance_is_not_marked(tmp_path, figures):  # noqa: F811
    """Of a task of one's own, until n_answers has its number of answers."""
    path = write(tmp_path, task="majority")
    for flags in ((), ("--against", "model"), ("--against", "state")):
        for fig in figures(path, *flags).values():
            for ax in fig.axes:
                assert not any("chance" in word for word in texts(ax))
                assert constants(ax, ":") in ([], [(0, 0, 0, 1)])


def test_chance_depends_on_the_vocabulary(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, K=K, M=4) for K in (4, 16, 64)]
    fig, = figures(*paths, "--against", "K").values()
    ax, = fig.axes
    grey = [line for line in ax.lines if to_hex(line.get_color()) == to_hex(plot.GREY)]
    assert [line.get_xydata().tolist() for line in grey] == [[[0, 1 / 4], [1, 1 / 16], [2, 1 / 64]]]
    assert "chance 1/64" in texts(ax)
    # A panel that lacks some K has the same line: its places stand for the same K.
    paths = [write(tmp_path, K=K, M=M) for K, M in ((4, 1), (16, 1), (64, 1), (64, 2))]
    fig, = figures(*paths, "--against", "K").values()
    lines = [[line.get_xydata().tolist() for line in ax.lines
              if to_hex(line.get_color()) == to_hex(plot.GREY)] for ax in fig.axes]
    assert lines == [[[[0, 1 / 4], [1, 1 / 16], [2, 1 / 64]]]] * 2


def test_captions_name_a_flag_once_if_all_models_have_it(tmp_path, figures):  # noqa: F811
    paths = [write(tmp_path, "rope", lr=0.004), write(tmp_path, "mamba", lr=0.004, d_state=4)]
    fig = figures(*paths)["length_tau1_K16_d8_L64_M1.png"]
    words = fig.get_supxlabel().replace("\n", " ")
    assert words.count("lr = 0.004") == 1 and "lr = 0.004 (" not in words
    assert "d_state = 4 (mamba)" in words


def test_a_name_of_a_figure_has_no_folder(tmp_path, figures):  # noqa: F811
    assert "a-b.png" in figures(write(tmp_path), "--name", "a/b")


def test_a_length_of_a_table_is_at_least_1(refuses):
    error = refuses(plot.main, ["X.json", "--table", "64", "0"])
    assert "--table: 0 is not a context length" in error
    assert "files come before the flag" in refuses(plot.main, ["--table", "X.json"])


def test_panels_of_every_flag(tmp_path, figures, refuses):  # noqa: F811
    """Then seeds are curves; and state is no flag of panels."""
    paths = [write(tmp_path, seed=seed) for seed in (0, 1)]
    flags = ["model", "M", "task", "tau", "K", "d", "L"]
    ax, = figures(*paths, "--panels", *flags).popitem()[1].axes
    assert {"seed = 0: 500", "seed = 1: 500"} <= set(texts(ax))
    assert "'state' is no flag" in refuses(plot.main, [paths[0], "--panels", "state"])


def test_a_title_of_ones_own_is_text(tmp_path, figures):  # noqa: F811
    for fig in figures(write(tmp_path), "--against", "state", "--title", "a $\\foo$").values():
        assert fig.get_suptitle() == "a ?\\foo?"


def test_many_panels(tmp_path, figures, capsys):  # noqa: F811
    paths = [write(tmp_path, M=M, K=64, lengths=[64], steps=[1]) for M in range(1, 42)]
    assert len(figures(*paths, write(tmp_path, tau=5))) == 2                 # tau = 5 is drawn
    assert "41 panels" in capsys.readouterr().err


def test_a_single_size_of_state_has_a_tick(tmp_path, figures):  # noqa: F811
    fig, = figures(write(tmp_path, state=(2432, 2432)), "--against", "state").values()
    for ax in fig.axes:
        low, high = ax.get_xlim()
        assert any(low < tick < high for tick in ax.get_xticks())


def test_two_flags_of_ones_own_are_two_settings(tmp_path, figures, capsys):  # noqa: F811
    paths = [write(tmp_path, dropout=0.5), write(tmp_path, gain=0.5)]
    ax, = figures(*paths)["length_tau1_K16_d8_L64_M1.png"].axes
    assert set(texts(ax)[2:]) == {"rope (dropout = 0.5)", "rope (gain = 0.5)"}
    assert "left out" not in capsys.readouterr().err
