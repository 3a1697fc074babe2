"""The examples in README.md run, and its commands are understood."""

import inspect
import os
import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import hybrid
import test_hybrid
import train
from conftest import ROOT

TEXT = (Path(ROOT) / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
COMMANDS = re.findall(r"python (\w+\.py)([^\n`&|>]*)", TEXT)


@pytest.fixture
def run_example(tmp_path, monkeypatch):
    """A function that runs an example as a script, as if from the repository's folder."""
    monkeypatch.setattr(evaluation, "TEST_SEQUENCES", 32)
    monkeypatch.setattr(train, "EVAL_SEQUENCES", 16)
    monkeypatch.chdir(tmp_path)
    os.symlink(os.path.join(ROOT, "report"), "report")
    return lambda text: exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example, run_example, monkeypatch, capsys):
    monkeypatch.setattr(hybrid, "LAYERS", dict(hybrid.LAYERS))
    run_example(example)
    assert capsys.readouterr().out.strip(), "it shows something"


def checks_of_every_word():
    """The tests that `pytest -k WORD` runs for a new word in LAYERS, and that need nothing else."""
    for name, check in vars(test_hybrid).items():
        marks = getattr(check, "pytestmark", [])
        words = [mark.args[1] for mark in marks if mark.args[:1] == ("word",)]
        if test_hybrid.EVERY_WORD in words and [*inspect.signature(check).parameters] == ["word"]:
            yield check


def test_the_layer_of_the_example_passes_the_tests_of_layers(run_example):
    words = dict(hybrid.LAYERS)
    example, = [example for example in EXAMPLES if "LAYERS" in example]
    run_example(example)
    try:
        new, = set(hybrid.LAYERS) - set(words)
        checks = list(checks_of_every_word())
        assert len(checks) >= 5
        for check in checks:
            check(new)
    finally:
        hybrid.LAYERS.pop(new)


def test_there_are_examples_and_commands():
    assert len(EXAMPLES) >= 2 and len(COMMANDS) >= 3


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_command(script, flags):
    assert os.path.exists(os.path.join(ROOT, script))
    if script == "train.py" and "--help" not in flags:
        train.parse(shlex.split(flags))
