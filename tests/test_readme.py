"""The examples in README.md run, and its commands are understood."""

import os
import re
import shlex
from pathlib import Path

import pytest

import eval as evaluation
import hybrid
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


def test_there_are_examples_and_commands():
    assert len(EXAMPLES) >= 2 and len(COMMANDS) >= 3


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_command(script, flags):
    assert os.path.exists(os.path.join(ROOT, script))
    if script == "train.py" and "--help" not in flags:
        train.parse(shlex.split(flags))
