"""Damaged resume files, planted links, and disks that fail: one sentence each."""

import hashlib
import io
import json
import os
import re
import shutil

import pytest
import torch

import runs
import train
from conftest import ROOT, names, numbers, stopped_run

NAME = "rope_M1_tau1_K16_d8_L8_batch-size4_steps20_seed0"
NO_SPACE = OSError(28, "No space left on device")


# ---- damaged and planted files -------------------------------------------------------------------

def flip_a_bit(path):
    """The lowest bit of a weight, which no file format notices."""
    data = bytearray(path.read_bytes())
    saved = torch.load(io.BytesIO(data[32:]), weights_only=True)
    place = data.index(saved["model"]["layers.0.qkv.weight"].numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_a_bit_of_the_checksum(path):
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def with_saved(change):
    def damage(path):
        """As another version of the repository would have written it, with a right checksum."""
        saved = torch.load(io.BytesIO(path.read_bytes()[32:]), weights_only=True)
        change(saved)
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        data = buffer.getvalue()
        path.write_bytes(hashlib.sha256(data).digest() + data)
    return damage


@pytest.mark.parametrize("damage", [
    flip_a_bit, flip_a_bit_of_the_checksum, cut, empty,
    with_saved(lambda s: s.pop("testing")), with_saved(lambda s: s.pop("curves")),
    with_saved(lambda s: s["model"].popitem()),
    with_saved(lambda s: s["optimizer"]["param_groups"].pop()),
    with_saved(lambda s: s.update(training=torch.zeros(7, dtype=torch.uint8)))])
def test_a_damaged_resume_file_starts_anew(damage, train_tiny, monkeypatch, tmp_path, capsys):
    stopped_run(train_tiny, monkeypatch, [], 12)
    damage(tmp_path / "out" / (NAME + ".resume.pt"))
    capsys.readouterr()
    result, = train_tiny()
    line, = [line for line in capsys.readouterr().out.splitlines() if ".resume.pt" in line]
    assert "starts from the beginning" in line
    assert numbers(result) == numbers(train_tiny(out=tmp_path / "whole")[0])
    assert names(tmp_path / "out") == [NAME + ".json", NAME + ".pt"]


def test_progress_that_does_not_fit_into_memory_is_kept(train_tiny, monkeypatch, tmp_path, capsys):
    """It may be whole: the run fails with one sentence."""
    stopped_run(train_tiny, monkeypatch, [], 12)
    path = tmp_path / "out" / (NAME + ".resume.pt")
    before = path.read_bytes()

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    capsys.readouterr()
    ended = pytest.raises(SystemExit, match="1 of 1 runs ended without a result")
    with monkeypatch.context() as patch, ended:
        patch.setattr(torch, "load", full)
        train_tiny()
    line, = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert "CUDA out of memory" in line and path.read_bytes() == before
    assert numbers(train_tiny()[0]) == numbers(train_tiny(out=tmp_path / "whole")[0])


def test_progress_that_cannot_be_read_is_one_sentence(train_tiny, tmp_path, capsys):
    (tmp_path / "out" / (NAME + ".resume.pt")).mkdir(parents=True)
    with pytest.raises(SystemExit, match="1 of 1 runs ended without a result"):
        train_tiny()
    line, = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert "Is a directory" in line and ".resume.pt" in line


def test_an_optimizer_of_another_device_or_version_goes_on(train_tiny, monkeypatch, tmp_path):
    def change(saved):
        for group in saved["optimizer"]["param_groups"]:
            group.update(lr=0.5, betas=(0.5, 0.5), fused=False, foreach=False)

    stopped_run(train_tiny, monkeypatch, [], at=8)
    with_saved(change)(tmp_path / "out" / f"{NAME}.resume.pt")
    resumed, = train_tiny()
    whole, = train_tiny(out=tmp_path / "whole")
    assert numbers(resumed) == numbers(whole)


def test_a_run_saved_by_other_code_continues_and_says_so(train_tiny, monkeypatch, tmp_path, capsys):
    for change, told in (lambda saved: None, False), (lambda saved: saved.update(code="x"), True), \
            (lambda saved: saved.pop("code"), True):
        stopped_run(train_tiny, monkeypatch, ["--overwrite"], at=8)
        with_saved(change)(tmp_path / "out" / f"{NAME}.resume.pt")
        capsys.readouterr()
        result, = train_tiny()
        line, = [line for line in capsys.readouterr().out.splitlines() if "continues at" in line]
        assert ("the code has changed" in line) == told
        at = [int(line.split("at step ")[1].split(":")[0])] if told else None
        assert result["train"].get("code_changed_at") == at


def test_a_result_of_other_code_is_finished_and_says_so(train_tiny, monkeypatch, tmp_path, capsys):
    """So does its checkpoint when it is loaded; a result that does not say its code counts as
    current."""
    result, = train_tiny()
    path = tmp_path / "out" / f"{NAME}.json"
    code = result["env"]["code"]
    for saved, told in (code, False), (None, False), ("x", True):
        result["env"]["code"] = saved
        path.write_text(json.dumps({**result, "env": {} if saved is None else result["env"]}))
        capsys.readouterr()
        train_tiny()
        line, = [line for line in capsys.readouterr().out.splitlines() if "is finished" in line]
        assert ("the code has changed since" in line) == told
    runs.load_run(str(path.with_suffix(".pt")))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(runs, "code_digest", lambda: "new")
    runs.load_run(str(path.with_suffix(".pt")))
    line, = capsys.readouterr().out.splitlines()
    assert str(path.with_suffix(".pt")) in line and "the code has changed since" in line


def test_code_digest_changes_with_the_files_that_a_run_depends_on(tmp_path, monkeypatch):
    (tmp_path / "family").mkdir()
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))
    seen = set()
    for name in ("train.py", "runs.py", "family/ladder.py", "family/ladder.py", "notes.txt",
                 "plot.py", "scratch.py", "family/notes.txt"):
        path = tmp_path / name
        path.write_text(path.read_text() + "x" if path.exists() else "x")
        seen.add(runs.code_digest.__wrapped__())
    assert len(seen) == 4                # no run depends on plot.py or on a script of one's own


def test_the_sources_are_all_that_train_imports():
    """But for files that only lock, print and write."""
    found, waiting = set(), ["train"]
    while waiting:
        name = waiting.pop()
        path = os.path.join(ROOT, *name.split(".")) + ".py"
        if name not in found and os.path.exists(path):
            found.add(name)
            with open(path, encoding="utf-8") as f:
                waiting += re.findall(r"^ *(?:from|import) ([\w.]+)", f.read(), re.M)
    top = {name for name in found if "." not in name}
    assert top - {"grid", "output"} == set(runs.SOURCES)


def test_code_digest_changes_with_the_file_of_a_layer(tmp_path, monkeypatch):
    """One's own layer may be in any file."""
    path = tmp_path / "layer_of_mine.py"
    path.write_text("class Mine:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import layer_of_mine
    monkeypatch.setitem(runs.LAYERS, "mine", layer_of_mine.Mine)
    before = runs.code_digest.__wrapped__()
    path.write_text("class Mine:\n    other = 1\n")
    assert runs.code_digest.__wrapped__() != before
    monkeypatch.setitem(runs.LAYERS, "mine", type("Typed", (), {"__module__": "nowhere"}))
    runs.code_digest.__wrapped__()


def test_planted_links_are_not_followed(train_tiny, monkeypatch, tmp_path):
    out, target = tmp_path / "out", tmp_path / "mine"
    out.mkdir()
    target.write_text("mine")
    for ending in (".json.tmp", ".pt.tmp", ".resume.pt.tmp", ".tmp", ".json", ".pt", ".resume.pt"):
        (out / (NAME + ending)).symlink_to(target)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    train_tiny()
    assert target.read_text() == "mine"
    assert not (out / (NAME + ".json")).is_symlink() and not (out / (NAME + ".pt")).is_symlink()


def test_a_lock_that_cannot_be_opened_is_one_sentence(train_tiny, tmp_path, capsys):
    (tmp_path / "out/.locks" / NAME).mkdir(parents=True)
    with pytest.raises(SystemExit, match="1 of 2 runs ended without a result"):
        train_tiny("--seed", 0, 1)
    line, = [line for line in capsys.readouterr().out.splitlines() if "failed" in line]
    assert ".locks" in line and "Is a directory" in line
    assert (tmp_path / "out" / (NAME[:-1] + "1.json")).exists(), "the other run is made"


# ---- a disk that fails ---------------------------------------------------------------------------

def test_a_disk_that_is_full_does_not_end_a_run_that_can_go_on(train_tiny, monkeypatch, tmp_path,
                                                               capsys):
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) < 6:
            raise NO_SPACE
        fsync(file)
    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    result, = train_tiny()
    lines = [line for line in capsys.readouterr().out.splitlines() if "No space left" in line]
    assert len(lines) == 5 and all("the run continues" in line for line in lines)
    assert len(names(tmp_path / "out")) == 2 and len(result["train"]["step"]) == 20


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_result_that_cannot_be_written_is_one_sentence(function, train_tiny, monkeypatch,
                                                         tmp_path, capsys):
    def full(*_):
        raise NO_SPACE
    with monkeypatch.context() as patch:
        patch.setattr(os, function, full)
        with pytest.raises(SystemExit) as stop:
            train_tiny("--seed", 0, 1)
    assert "2 of 2 runs ended without a result" in stop.value.code
    lines = [line for line in capsys.readouterr().out.splitlines() if "No space left" in line]
    assert len(lines) == 2 and names(tmp_path / "out") == []
    assert len(train_tiny("--seed", 0, 1)) == 2


def test_a_folder_that_disappears_during_a_run_is_made_again(train_tiny, monkeypatch, tmp_path):
    out, evaluate = tmp_path / "out", train.evaluate

    def delete(*words, **options):
        shutil.rmtree(out)
        return evaluate(*words, **options)
    monkeypatch.setattr(train, "evaluate", delete)
    result, = train_tiny()
    assert names(out) == [NAME + ".json", NAME + ".pt"]
    assert json.loads((out / (NAME + ".json")).read_text()) == result
