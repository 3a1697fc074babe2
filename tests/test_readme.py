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


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example(example, tmp_path, monkeypatch, capsys):
    """Each is a script of its own, run from the repository's folder."""
    monkeypatch.setattr(evaluation, "TEST_SEQUENCES", 32)
    monkeypatch.setattr(train, "EVAL_SEQUENCES", 16)
    monkeypatch.setattr(hybrid, "LAYERS", dict(hybrid.LAYERS))
    monkeypatch.chdir(tmp_path)
    os.symlink(os.path.join(ROOT, "report"), "report")
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.strip(), "it shows something"


def checks_of_every_word():
    """The tests that `pytest -k WORD` runs for a new word in LAYERS, and that need nothing else."""
    for name, check in vars(test_hybrid).items():
        marks = getattr(check, "pytestmark", [])
        words = [mark.args[1] for mark in marks if mark.args[:1] == ("word",)]
        if test_hybrid.EVERY_WORD in words and [*inspect.signature(check).parameters] == ["word"]:
            yield check


def test_the_layer_of_the_example_passes_the_tests_of_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "EVAL_SEQUENCES", 16)
    monkeypatch.setattr(evaluation, "TEST_SEQUENCES", 32)
    words = dict(hybrid.LAYERS)
    monkeypatch.chdir(tmp_path)
    example, = [example for example in EXAMPLES if "LAYERS" in example]
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
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
