"""A run that is killed or stopped in the middle ends, when it is run again, in the very weights of one that was not."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distill.compare import report_runs
from distill.core.errors import InputError
from distill.recipe import Recipe
from distill.runner import run
from tests.faults.chaos import as_on_a_terminal

RECIPE = """\
name: tiny
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  tokenizer: {{vocab_size: 270}}
stages:
  first:
    kind: finetune
    num_steps: 2
    batch_size: 2
    model:
      config:
        model_type: llama
        hidden_size: 32
        intermediate_size: 64
        num_hidden_layers: 2
        num_attention_heads: 4
        num_key_value_heads: 2
        max_position_embeddings: 32
        attention_dropout: 0.2         # so that the random state matters
  second:
    {{kind: distill, student: first, teacher: first, num_steps: 60, batch_size: 4, losses: [cross_entropy, forward_kl]}}
compute: {{accelerator: cpu, micro_batch_size: 2, checkpoint_every_steps: 3}}
logging: {{wandb: disabled}}
"""
STEPS = 60


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"text": f"row {i} of the text that a small model reads, and {i * i} more words"} for i in range(80)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(RECIPE.format(text=folder / "text.jsonl"))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def finished(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    return run(Recipe.load(recipe), tmp_path_factory.mktemp("undisturbed") / "run").folder


@pytest.fixture(scope="module")
def undisturbed(finished: Path) -> bytes:
    """Its weights."""
    return weights(finished)


def weights(folder: Path) -> bytes:
    return (folder / "second" / "model" / "model.safetensors").read_bytes()


def started(recipe: Path, folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distill", "run", str(recipe), "--run-dir", str(folder), *options]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, preexec_fn=as_on_a_terminal, **pipes)


def disturbed(recipe: Path, folder: Path, number: signal.Signals) -> subprocess.CompletedProcess[str]:
    """Run the command and send it a signal as soon as its second stage has a checkpoint."""
    process = started(recipe, folder)
    until = time.monotonic() + 120
    while not any((folder / "second" / "checkpoints").glob("step=*.ckpt")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "no checkpoint in two minutes"
        time.sleep(0.001)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def finish(recipe: Path, folder: Path) -> list[str]:
    said: list[str] = []
    run(Recipe.load(recipe), folder, say=said.append)
    return said


@pytest.fixture(scope="module")
def killed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed in its second stage."""
    folder = tmp_path_factory.mktemp("killed") / "run"
    assert disturbed(recipe, folder, signal.SIGKILL).returncode == -signal.SIGKILL
    return folder


@pytest.fixture(scope="module")
def stopped(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped by Ctrl-C in its second stage."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    done = disturbed(recipe, folder, signal.SIGINT)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
    assert f"of {STEPS}, which is saved; the same command goes on\n" in done.stderr
    return folder


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_goes_on_to_the_same_weights(
    recipe: Path, undisturbed: bytes, tmp_path: Path, request: pytest.FixtureRequest, how: str
) -> None:
    folder = shutil.copytree(request.getfixturevalue(how), tmp_path / "run")
    assert not (folder / "second" / "DONE").exists(), "the signal came too late to test anything"
    assert any((folder / "second" / "checkpoints").glob("step=*.ckpt"))

    said = finish(recipe, folder)
    assert [line for line in said if "first" in line and "finished before" in line]
    going_on = next(line for line in said if "resuming from step" in line)
    assert 0 < int(going_on.split("step ")[1].split()[0]) < STEPS
    assert weights(folder) == undisturbed

    rows = [json.loads(line) for line in (folder / "second" / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "lr" in row]
    assert steps == sorted(set(steps))
    assert steps[-1] == STEPS
    assert not list((folder / "second").rglob("*.ckpt"))


def test_a_damaged_checkpoint_is_passed_over(recipe: Path, undisturbed: bytes, tmp_path: Path, stopped: Path) -> None:
    """As a disk or a foreign hand may leave it; ours are written whole."""
    folder = shutil.copytree(stopped, tmp_path / "run")
    whole = max((folder / "second" / "checkpoints").glob("step=*.ckpt"))
    newest = whole.with_name(f"step={int(whole.stem[5:]) + 1:08d}.ckpt")
    newest.write_bytes(whole.read_bytes()[:1000])
    said = finish(recipe, folder)
    assert [line for line in said if "damaged" in line and newest.name in line]
    assert weights(folder) == undisturbed


def test_another_recipe_is_not_gone_on_with(recipe: Path, tmp_path: Path, stopped: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    said: list[str] = []
    before = (folder / "recipe.yaml").read_text()
    changes = ["stages.second.optimizer.lr=0.5", "compute.num_workers=1"]
    with pytest.raises(InputError, match=r"would start again; .* or discard the saved progress with --from second"):
        run(Recipe.load(recipe, changes), folder, say=said.append)
    with pytest.raises(InputError, match=r"stages.first: .*, and second, which was left .* --from first"):
        run(Recipe.load(recipe, ["stages.first.num_steps=3"]), folder, say=said.append)
    assert (folder / "recipe.yaml").read_text() == before
    assert {
        "  changed since it last ran: stages.second.optimizer.lr: 0.0001 -> 0.5",
        "  changed since it last ran: compute.num_workers: 0 -> 1",
        "  changed since it last ran: stages.first.num_steps: 2 -> 3",
    } == {line for line in said if "changed since it last ran" in line}
    assert any((folder / "second" / "checkpoints").glob("step=*.ckpt"))


def test_the_same_text_elsewhere_is_gone_on_with_and_another_one_is_not(
    recipe: Path, undisturbed: bytes, tmp_path: Path, stopped: Path
) -> None:
    folder, there = shutil.copytree(stopped, tmp_path / "run"), tmp_path / "another machine" / "data"
    there.mkdir(parents=True)
    shutil.copy(recipe.parent / "text.jsonl", there / "rows.jsonl")
    moved = [f"data.train.path={there}/rows.jsonl"]
    said: list[str] = []
    run(Recipe.load(recipe, moved), shutil.copytree(folder, tmp_path / "moved"), say=said.append)
    assert [line for line in said if "resuming from step" in line]
    assert [line for line in said if f"data.train.path: {recipe.parent}/text.jsonl -> {there}/rows.jsonl" in line]
    assert weights(tmp_path / "moved") == undisturbed
    with (there / "rows.jsonl").open("a") as stream:
        stream.write('{"text": "one more row"}\n')
    with pytest.raises(InputError, match=r"what it reads \(its keys, the text or a model\) has changed"):
        run(Recipe.load(recipe, moved), folder, say=said.append)


@pytest.mark.parametrize(
    ("moment", "number", "code"),
    [
        ("first/INPUT", signal.SIGINT, 130),
        pytest.param("wandb-id", signal.SIGTERM, 75, marks=pytest.mark.exhaustive),  # as test_stops.py does in process
    ],
    ids=["the heavy imports come next", "wandb is imported and opened next"],
)
def test_a_signal_outside_of_training_is_no_success(
    moment: str, number: signal.Signals, code: int, recipe: Path, tmp_path: Path
) -> None:
    process = started(recipe, tmp_path / "run", "--set", "logging.wandb=offline")
    until = time.monotonic() + 120
    while not (tmp_path / "run" / moment).exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "the same command goes on" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run" / "second" / "DONE").exists()


def test_a_run_goes_on_when_nobody_reads_what_it_prints(recipe: Path, undisturbed: bytes, tmp_path: Path) -> None:
    process = started(recipe, tmp_path / "run")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == f"tiny: 2 stages into {tmp_path / 'run'}\n"
    process.stdout.close()
    assert process.stderr.read() == "nobody reads standard output any more; the run goes on without it\n"
    assert process.wait(120) == 0
    assert weights(tmp_path / "run") == undisturbed


def test_another_command_ends_with_its_reader() -> None:
    command = [sys.executable, "-m", "distill", "schema"]
    ours, theirs = os.pipe()
    fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 4096)  # else all of it may fit into the pipe
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        os.read(ours, 1)
        os.close(ours)
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_model_that_is_gone_is_made_again(recipe: Path, finished: Path, undisturbed: bytes, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "second" / "model" / "model.safetensors").write_bytes(b"cut short")
    said = finish(recipe, tmp_path / "run")
    assert any("second" in line and "is now second.old-1" in line for line in said), said
    assert weights(tmp_path / "run") == undisturbed


def test_a_refused_command_leaves_the_runs_recipe_alone(recipe: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    other = Recipe.load(recipe, ["stages.first.num_steps=3"])
    with pytest.raises(InputError, match="is not finished"):
        run(other, tmp_path / "run", only="second", say=lambda line: None)
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before


def test_runs_of_other_texts_are_not_compared(recipe: Path, tmp_path: Path) -> None:
    for name, change in (("a", "seed=0"), ("b", "data.validation_tokens=90")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.yaml").write_text(Recipe.load(recipe, [change]).dump())
    with pytest.raises(InputError, match="differ in data"):
        report_runs([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    with pytest.raises(InputError, match="given twice"):
        report_runs([tmp_path / "a", tmp_path / "a"], tmp_path / "out")
