"""eval.py as a command: what it prints, what it saves, and what it refuses."""

import io
import itertools
import json
import os
import shutil
import threading
import time

import pytest
import torch

import eval as evaluation
import output
import runs
import train
from conftest import names, tiny
from hybrid import build_model
from runs import load_run

LEARNED, HYBRID = (f"{name}_M2_tau2_K16_d8_L8_batch-size4_steps2_seed0"
                   for name in ("learned", "hybrid-b"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "TEST_SEQUENCES", 32)
        patch.setattr(train, "EVAL_SEQUENCES", 16)
        train.main(tiny("--model", "learned", "hybrid-b", "--M", 2, "--tau", 2, "--steps", 2,
                        "--out", folder))
    return folder


@pytest.fixture
def folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "results")


def test_positions_that_are_not_trained_are_the_same_every_time(folder):
    def rows(seed):
        model, config = load_run(str(folder / (LEARNED + ".pt")))
        evaluation.evaluate(model, config, [60], 10, torch.device("cpu"), seed)
        return model.layers[0].extra_rows

    first = rows(0)
    torch.rand(3)
    assert len(first) > 30 and torch.equal(rows(0), first) and not torch.equal(rows(1), first)


def result_of(folder, name=HYBRID):
    return json.loads((folder / (name + ".json")).read_text())


def test_lengths_are_added_to_the_result(folder, capsys):
    before = result_of(folder)
    pt = str(folder / (HYBRID + ".pt"))
    (lengths, accuracies), = evaluation.main([pt, "--lengths", "50", "10", "3", "--sequences", "40",
                                              "--device", "cpu"])
    after = result_of(folder)
    assert lengths == [3, 10, 50]
    assert after["eval"]["length"] == [*range(3, 25), 50]
    assert after["eval"]["sequences"] == [
        40 if n in (3, 10, 50) else 16 for n in after["eval"]["length"]]
    accuracy = dict(zip(after["eval"]["length"], after["eval"]["accuracy"]))
    assert [accuracy[n] for n in lengths] == accuracies
    for n, a in zip(before["eval"]["length"], before["eval"]["accuracy"]):
        assert n in (3, 10) or accuracy[n] == a
    assert {**after, "eval": 0, "seconds": 0} == {**before, "eval": 0, "seconds": 0}
    assert after["seconds"]["train"] == before["seconds"]["train"]
    path, first, second, last = capsys.readouterr().out.splitlines()
    assert path == pt and first.split() == ["length", "3", "10", "50"]
    assert second.split() == ["accuracy", *(f"{a:.3f}" for a in accuracies)]
    assert names(folder) == sorted(
        name + end for name in (LEARNED, HYBRID) for end in (".json", ".pt"))


@pytest.mark.parametrize("task", ["recall", "parity"])
def test_without_a_terminal_long_tests_say_how_far_they_are(task, monkeypatch, capsys):
    model, config = build_model("mamba", L=8), dict(K=16, M=2, tau=2, task=task)

    def lines(bar, lengths=range(3, 25)):
        evaluation.evaluate(model, config, list(lengths), 16, "cpu", bar=bar)
        return capsys.readouterr().out.splitlines()
    assert lines(True) == []                                    # too quick for that
    monkeypatch.setattr(output, "SAY_SECONDS", -1)
    shown = lines(True)
    shares = [int(line.split()[-1].rstrip("%")) for line in shown]
    assert len(shares) > 5 and shares == sorted(shares) and shares[-1] == 100
    assert lines(False) == []
    monkeypatch.setattr(output, "SAY_SECONDS", 10**6)
    assert lines(True) == []


def test_a_terminal_without_a_character_shows_another(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(output.sys, "stdout", stream)
    output.say("é: 1")
    output.say("more")
    assert stream.buffer.getvalue() == b"?: 1\nmore\n"


def test_lines_of_progress_are_half_a_minute_apart(monkeypatch, capsys):
    clock = itertools.count(0, 10)
    monkeypatch.setattr(output.time, "monotonic", lambda: next(clock))
    progress = output.Progress(9)
    for n in range(9):
        progress.report(f"line {n}")
    assert capsys.readouterr().out.splitlines() == ["line 3", "line 7"]


@pytest.mark.parametrize("rank, shown", [("0", True), ("1", False)])
def test_under_torchrun_the_first_process_alone_shows_progress(rank, shown, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("RANK", rank)
    terminal = Terminal()
    progress = output.Progress(2, file=terminal, mininterval=0)
    progress.report("step 1")
    progress.update()
    progress.close()
    assert ("step 1" in terminal.getvalue()) == shown


def test_default_lengths_repeat_what_train_measured(folder):
    before = result_of(folder), result_of(folder, LEARNED)
    paths = [str(folder / (name + ".pt")) for name in (HYBRID, LEARNED)]
    evaluation.main([*paths, "--device", "cpu", "--sequences", "16"])
    assert [result_of(folder)["eval"], result_of(folder, LEARNED)["eval"]] == [
        result["eval"] for result in before]


def test_no_save(folder):
    before = (folder / (HYBRID + ".json")).read_bytes()
    pt = str(folder / (HYBRID + ".pt"))
    found = evaluation.main(["--no-save", "--lengths", "5", pt, "--sequences", "900", "--device",
                             "cpu"])
    assert len(found) == 1 and found[0][0] == [5]         # a checkpoint after --lengths, too
    assert (folder / (HYBRID + ".json")).read_bytes() == before


def test_lengths_given_twice_are_all_tested(folder):
    pt = str(folder / (HYBRID + ".pt"))
    found = evaluation.main(["--lengths", "5", pt, "--lengths", "7", "--no-save", "--sequences",
                             "4", "--device", "cpu"])
    assert found[0][0] == [5, 7]


def test_fewer_sequences_replace_nothing(folder):
    before = result_of(folder)
    evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "5", "--sequences", "1",
                     "--device", "cpu"])
    assert result_of(folder)["eval"] == before["eval"]


def test_unfinished_runs_and_repeated_paths_are_skipped(folder):
    pt = folder / (HYBRID + ".pt")
    (folder / (HYBRID + ".resume.pt")).write_bytes(b"progress")
    found = evaluation.main([str(pt), str(folder / (HYBRID + ".resume.pt")), str(pt), "--lengths",
                             "5", "--sequences", "4", "--device", "cpu"])
    assert len(found) == 1


def test_a_checkpoint_alone_is_enough(folder):
    (folder / (HYBRID + ".json")).unlink()
    found = evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "5", "--sequences", "4",
                             "--device", "cpu"])
    assert found[0][0] == [5] and not (folder / (HYBRID + ".json")).exists()


def test_a_model_of_another_run_is_only_tested(folder, capsys):
    before = (folder / (HYBRID + ".json")).read_text()
    shutil.copy(folder / (LEARNED + ".pt"), folder / (HYBRID + ".pt"))
    evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "5", "--sequences", "4",
                     "--device", "cpu"])
    assert (folder / (HYBRID + ".json")).read_text() == before
    assert "of another model: only printed" in capsys.readouterr().out


def test_numbers_of_other_code_do_not_join_a_result(folder, capsys, monkeypatch):
    before = (folder / (HYBRID + ".json")).read_text()
    monkeypatch.setattr(runs, "code_digest", lambda: "that of changed code")
    evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "5", "--sequences", "4096",
                     "--device", "cpu"])
    assert (folder / (HYBRID + ".json")).read_text() == before
    said = capsys.readouterr().out
    assert "the code has changed since" in said
    assert "of another version of the code: only printed" in said


def test_a_result_made_before_a_flag_existed_takes_new_numbers(folder):
    path = folder / (HYBRID + ".json")
    result = json.loads(path.read_text())
    del result["config"]["learn_embedding"]
    path.write_text(json.dumps(result))
    evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "30", "--sequences", "4",
                     "--device", "cpu"])
    assert 30 in json.loads(path.read_text())["eval"]["length"]


def test_a_lock_that_cannot_be_taken_is_one_sentence(folder):
    (folder / ".locks" / HYBRID).unlink()
    (folder / ".locks" / HYBRID).mkdir()
    with pytest.raises(SystemExit, match="the numbers of .* were not written: Is a directory"):
        evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "5", "--sequences", "4",
                         "--device", "cpu"])


def test_the_table_has_the_lengths_of_the_task(capsys):
    """Parity ignores tau; its lengths begin at 1."""
    tested = {"length": [1, 8, 24], "accuracy": [1, 1, 1]}
    evaluation.print_table({"config": {"task": "parity", "L": 8, "tau": 50}, "eval": tested})
    assert capsys.readouterr().out.splitlines()[0].split() == ["length", "1", "8", "24"]


@pytest.mark.parametrize("text", ["", "[1, 2]", "{}", '{"config": {}, "eval": {"length": [1], '
                                  '"accuracy": [0.5]}}', "\0" * 50])
def test_a_json_that_is_no_result_is_left_alone(text, folder, capsys):
    path = folder / (HYBRID + ".json")
    path.write_text(text)
    evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "5", "--sequences", "4",
                     "--device", "cpu"])
    assert path.read_text() == text
    said = capsys.readouterr().out
    assert f"{path} is damaged or of another model: only printed" in said


@pytest.mark.parametrize("sequences", ["many", [16], 0, [16] * 21 + ["16"], None])
def test_a_json_with_wrong_numbers_of_sequences_is_left_alone(sequences, folder, capsys):
    path, result = folder / (HYBRID + ".json"), result_of(folder)
    result["eval"]["sequences"] = sequences
    path.write_text(json.dumps(result))
    before = path.read_text()
    evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "5", "--sequences", "4",
                     "--device", "cpu"])
    assert path.read_text() == before and "only printed" in capsys.readouterr().out


def test_numbers_of_a_model_that_was_replaced_meanwhile_are_only_printed(folder, monkeypatch):
    """The run was trained again, with the same flags, while its old model was tested."""
    path, evaluate = folder / (HYBRID + ".json"), evaluation.evaluate

    def slowly(*words, **options):
        path.write_text(json.dumps({**result_of(folder), "checkpoint": "another"}))
        return evaluate(*words, **options)

    monkeypatch.setattr(evaluation, "evaluate", slowly)
    evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "50", "--sequences", "4",
                     "--device", "cpu"])
    assert 50 not in result_of(folder)["eval"]["length"]


def test_one_json_that_cannot_be_written_does_not_end_the_others(folder, monkeypatch, capsys):
    write = evaluation.write_json

    def full_for_one(path, result):
        if HYBRID in path:
            raise OSError(28, "No space left on device")
        write(path, result)

    monkeypatch.setattr(evaluation, "write_json", full_for_one)
    with pytest.raises(SystemExit, match="hybrid-b.* were not written: No space left"):
        evaluation.main([*(str(folder / (name + ".pt")) for name in (HYBRID, LEARNED)),
                         "--lengths", "50", "--sequences", "4", "--device", "cpu"])
    assert 50 in result_of(folder, LEARNED)["eval"]["length"]


def test_a_disk_that_is_full_is_one_sentence(folder, monkeypatch, capsys):
    before = (folder / (HYBRID + ".json")).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "5", "--sequences", "4",
                         "--device", "cpu"])
    captured = capsys.readouterr()
    sentence = captured.err + (stop.value.code if isinstance(stop.value.code, str) else "")
    assert "No space left" in sentence and "Traceback" not in sentence
    assert "accuracy" in captured.out, "the numbers are printed"
    assert (folder / (HYBRID + ".json")).read_bytes() == before and len(names(folder)) == 4


@pytest.mark.parametrize("flags, sentence", [
    ("--lengths 9 99999999999999999999", "to 67,108,864"), ("--lengths 2", "--lengths has 2, but"),
    ("--lengths 8 0", "--lengths has 0"), ("--lengths -5 9", "--lengths has -5"),
    ("--lengths 1.5", "1.5"), ("--lengths 8,16", "--lengths has '8,16'"),
    ("--lengths", "--lengths"), ("--sequences 0", "--sequences is 0"),
    ("--seed x", "--seed"), ("--seed -1", "--seed is -1"), ("--seed 1073741824", "--seed is"),
    ("--length 3", "--length"), ("--device cuda:77", "--device is 'cuda:77'"),
    ("--device nonsense", "--device is 'nonsense'")])
def test_wrong_flags(flags, sentence, folder, refuses):
    before = (folder / (LEARNED + ".json")).read_bytes()
    argv = [folder / (LEARNED + ".pt"), "--device", "cpu", *flags.split()]
    assert sentence in refuses(evaluation.main, argv)
    assert (folder / (LEARNED + ".json")).read_bytes() == before and len(names(folder)) == 4


def test_no_checkpoint(refuses):
    assert "RUN.pt" in refuses(evaluation.main, [])
    assert "none.pt is not there" in refuses(evaluation.main, ["none.pt"])
    assert ". is not a whole checkpoint of train.py, a .pt file" in refuses(evaluation.main, [os.curdir])


def test_two_at_once_lose_nothing(train_tiny, tmp_path, monkeypatch):
    train_tiny("--model", "rope", "--L", 8)
    path = next(str(p) for p in (tmp_path / "out").glob("*.pt"))
    read = evaluation.read_result

    def slowly(*arguments):
        result = read(*arguments)
        time.sleep(0.2)
        return result

    monkeypatch.setattr(evaluation, "read_result", slowly)
    monkeypatch.setattr(evaluation, "evaluate", lambda model, config, lengths, *rest, **more: [0.5])
    threads = [threading.Thread(target=evaluation.main, args=([path, "--lengths", str(n)],))
               for n in (50, 60, 70)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {50, 60, 70} <= set(read(path.replace(".pt", ".json"))["eval"]["length"])


def test_a_checkpoint_alone_is_only_tested(folder, capsys):
    (folder / (HYBRID + ".json")).unlink()
    evaluation.main([str(folder / (HYBRID + ".pt")), "--lengths", "5", "--sequences", "4",
                     "--device", "cpu"])
    assert f"{HYBRID}.json is not there: only printed" in capsys.readouterr().out
    assert not (folder / (HYBRID + ".json")).exists()
