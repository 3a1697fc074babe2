"""Each file that shows a layer, when run, finds that its forms agree."""

import re
import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
FILES = ["mamba", "attention", "family/ladder", "family/linear_attention", "family/mamba2",
         "family/mamba3", "family/deltanet", "family/triangular", "family/attention_variants",
         "family/decay_attention", "family/experts", "family/zamba", "family/between"]


@pytest.mark.parametrize("name", FILES)
def test_forms_agree(name, capsys):
    threads = torch.get_num_threads()
    try:
        runpy.run_path(f"{ROOT / name}.py", run_name="__main__")
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    differences = [float(found) for found in re.findall(r"\d(?:\.\d+)?e[+-]\d+", printed)]
    assert differences and max(differences) < 1e-4
