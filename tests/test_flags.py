"""Commands that train.py refuses: one sentence, status 2, and nothing created."""

import pytest
import torch

import runs
import train
from conftest import names, tiny
from data import TASKS
from hybrid import FAMILY, LAYERS, MODELS

ABSURD = ["--L 1000000000", "--batch-size 1000000000", "--d 1000000", "--d 100000000",
          "--K 1000000000", "--model mamba --d-state 1000000000", "--model 100000xmamba",
          *(f"--{flag} {10**19}" for flag in ("L", "K", "d", "M", "tau", "d-state", "batch-size",
                                              "steps", "seed", "n-heads"))]


@pytest.mark.parametrize("flags, sentence", [
    ("--M 17", "--M is 17"), ("--M 5 --K 4", "--M is 5"), ("--M 0", "--M is 0"),
    ("--M -1", "--M is -1"), ("--M 1 17", "--M is 17"), ("--M 1 --M 17", "--M is 17"),
    ("--tau 8", "at least 9"), ("--tau 0", "--tau is 0"), ("--tau x", "--tau"),
    ("--K 0", "--K is 0"), ("--K 1", "--K is 1"), ("--d 0", "--d is 0"), ("--d -8", "--d is -8"),
    ("--L 0", "--L is 0"), ("--L 1", "--L is 1"), ("--batch-size 0", "--batch-size is 0"),
    ("--steps 0", "--steps is 0"), ("--steps 1.5", "--steps"), ("--lr 0", "--lr is 0"),
    ("--lr -0.1", "--lr is -0.1"), ("--lr nan", "--lr is nan"), ("--lr inf", "--lr is inf"),
    ("--lr 1e300", "--lr is 1e+300"),
    ("--weight-decay -1", "--weight-decay is -1"), ("--weight-decay nan", "--weight-decay is nan"),
    ("--seed -1", "--seed is -1"), ("--seed 1073741824", "--seed is 1073741824"),
    ("--model gpt", "hybrid-a, hybrid-b"), ("--model rope gpt", "'gpt'"),
    ("--model rope --d 6 --n-heads 2", "--n-heads 2"), ("--model rope --d 7", "odd size 7"),
    ("--model grouped --d 10", "--d is 10"), ("--model retention --d 10", "--d is 10"),
    ("--model nope --n-heads 3", "3"), ("--model jamba --d 6", "4"),
    ("--model 2xrope-half --d 2", "heads of at least 4"),
    ("--model nope --n-heads 0", "--n-heads is 0"), ("--model mamba --d-state 0", "--d-state is 0"),
    ("--train-lengths some", "--train-lengths"), ("--step 20", "did you mean --steps?"),
    ("--m 4", "did you mean --M?"), ("--nonsense 0.1", "--help lists the flags"),
    ("--lr 0.004 0.008", "only some flags take several"), ("--M 4,16", "separated by spaces"),
    ("--seed", "--seed"),
    ("--task sort", "--task"), ("--task mqar --M 9 --L 64", "--M is 9"),
    ("--task copy --train-lengths uniform", "--train-lengths"), ("--compile maybe", "--compile"),
    ("--model " + "+".join(["mamba"] * 40), "too long"),
    ("--device cuda:77", "--device is 'cuda:77'"), ("--device nonsense", "--device is 'nonsense'"),
    ("--device meta", "--device is 'meta'"), ("--device cpu:3", "--device is 'cpu:3'"),
    *[(flags, " ".join(flags.split()[-2:-1])) for flags in ABSURD]])
def test_wrong_flags(flags, sentence, refuses, tmp_path):
    error = refuses(train.main, tiny("--out", tmp_path / "out", *flags.split()))
    assert sentence in error and names(tmp_path) == []


def test_the_hint_about_spaces_is_for_numbers_with_commas(refuses):
    assert "separated by spaces" in refuses(train.main, ["--lr", "0.1,0.2"])
    assert "spaces" not in refuses(train.main, ["--compile", "maybe"])       # lists choices


def test_a_flag_without_a_default_is_refused(refuses, tmp_path, monkeypatch):
    """Its value would not be part of a run's name."""
    parse = train.parse

    def parse_more(argv):
        parser, args = parse(argv)
        args.label_noise = 0.1
        return parser, args

    monkeypatch.setattr(train, "parse", parse_more)
    error = refuses(train.main, tiny("--out", tmp_path / "out"))
    assert "--label-noise has no default" in error and names(tmp_path) == []


def short_task(batch_size, L, K, M, tau, device, generator, uniform):
    """A task of at most 20 tokens: it can be trained with 8, but not tested with 24."""
    if L > 20:
        raise ValueError("at most 20 tokens")
    tokens = torch.randint(K, (batch_size, L), device=device, generator=generator)
    return tokens, tokens[:, 0], None


def no_uniform(batch_size, L, K, M, tau, device, generator):
    return short_task(batch_size, 8, K, M, tau, device, generator, False)


def two_results(batch_size, L, K, M, tau, device, generator, uniform):
    return short_task(batch_size, 8, K, M, tau, device, generator, False)[:2]


def token_K(batch_size, L, K, M, tau, device, generator, uniform):
    return torch.full((batch_size, L + 1), K), torch.zeros(batch_size, dtype=torch.int64), None


def float_labels(batch_size, L, K, M, tau, device, generator, uniform):
    return torch.zeros(batch_size, L + 1, dtype=torch.int64), torch.zeros(batch_size), None


def label_below_0(batch_size, L, K, M, tau, device, generator, uniform):
    tokens = torch.zeros(batch_size, L + 1, dtype=torch.int64)
    return tokens, tokens[:, 0] - 1, None


def transposed_labels(batch_size, L, K, M, tau, device, generator, uniform):
    tokens = torch.zeros(batch_size, L, dtype=torch.int64)
    return tokens, tokens.T, torch.arange(L).expand(batch_size, L)


def a_list(batch_size, L, K, M, tau, device, generator, uniform):
    return [[0] * (L + 1)] * batch_size, [0] * batch_size, None


@pytest.mark.parametrize("task, sentence", [
    (token_K, "fails with 1 context tokens (tokens and labels must be int64, from 0 to 15"),
    (float_labels, "fails with 1 context tokens (tokens and labels must be int64"),
    (label_below_0, "fails with 1 context tokens (tokens and labels must be int64"),
    (transposed_labels, "fails with 1 context tokens (labels need the shape of at"),
    (a_list, "fails with 1 context tokens ('list'"),
    (short_task, "fails with 24 context tokens (at most 20"), (no_uniform, "fails with 1 context"),
    (two_results, "fails with 1 context tokens (not enough values")])
def test_a_task_that_cannot_work_is_refused_before_training(task, sentence, refuses, tmp_path,
                                                            monkeypatch):
    monkeypatch.setitem(TASKS, "mine", task)
    error = refuses(train.main, tiny("--out", tmp_path / "out", "--task", "mine"))
    assert f"--task mine {sentence}" in error and names(tmp_path) == []


@pytest.mark.parametrize("value", ["-1e-3", "-.5", "-0", "-3E-1"])
def test_a_negative_number_is_a_value_not_a_flag(value, refuses):
    error = refuses(train.main, ["--model", "rope", "--lr", value])
    assert f"--lr is {float(value)!r}, but" in error


def after_tau(batch_size, L, K, M, tau, device="cpu", generator=None, uniform=False):
    """A task that needs tau + 2 tokens, which its author did not write into data.shortest."""
    at = torch.randint(tau + 2, L + 1, (batch_size,), device=device, generator=generator)
    tokens = torch.randint(K, (batch_size, L + 1), device=device, generator=generator)
    return tokens, tokens.gather(1, at[:, None])[:, 0], at


def test_a_task_that_cannot_be_tested_is_refused_before_training(refuses, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "after", after_tau)
    flags = tiny("--out", tmp_path / "out", "--task", "after", "--tau", 5)
    error = refuses(train.main, flags)
    assert "--task after fails with 1 context tokens" in error and names(tmp_path) == []
    monkeypatch.setattr(runs, "shortest", lambda M, tau, task: tau + 2)
    train.configs_of(train.parse(flags)[1])


def test_unknown_words_are_answered_with_the_known_ones(refuses, tmp_path):
    error = refuses(train.main, tiny("--out", tmp_path / "out", "--model", "mamba+gpt"))
    for known in [*MODELS, *FAMILY, *LAYERS]:
        assert known in error


def test_out_that_cannot_be_written(refuses, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "below", tmp_path / "file"):
        assert f"--out is '{out}'" in refuses(train.main, tiny("--out", out))
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "mine"
