"""Two processes over gloo do what one does: the same weights, the same figures, resumed by any number of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.training.metrics import read_rows
from tests.faults.workers import Workers, World

DEVICES = ["--set", "compute.devices=2"]
BOUND_S = 240


def arguments(recipe: Path, folder: Path, *more: str) -> list[str]:
    return ["run", str(recipe), "--run-dir", str(folder), *more]


def finished(workers: Workers, recipe: Path, folder: Path, *more: str, size: int = 1) -> Path:
    world = workers.start(arguments(recipe, folder, *more), size=size, log=folder.with_suffix(".finished"))
    codes = world.wait(BOUND_S)
    assert codes == [0] * size, world.said()
    for log in world.logs[1:]:
        assert log.read_text() == "", "only the first process speaks"
    return folder


@pytest.fixture(scope="module")
def alone(workers: Workers, quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(workers, quickstart, tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def together(workers: Workers, quickstart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(workers, quickstart, tmp_path_factory.mktemp("together") / "run", *DEVICES, size=2)


def weights(folder: Path, stage: str) -> dict[str, torch.Tensor]:
    return load_file(folder / stage / "model" / "model.safetensors")


def figures(folder: Path, stage: str) -> list[dict[str, float]]:
    measured = ("perf/", "memory/")
    return [{k: v for k, v in row.items() if not k.startswith(measured)} for row in read_rows(folder / stage)]


def trained(folder: Path) -> list[dict[str, float]]:
    """Without looks at the validation split, which a stop does not wait for."""
    return [row for row in figures(folder, "distill") if "lr" in row]


def assert_alike(folder: Path, other: Path, stage: str = "distill") -> None:
    ours, theirs = figures(folder, stage), figures(other, stage)
    assert len(ours) == len(theirs) > 4
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)
    expected = weights(other, stage)
    for name, weight in weights(folder, stage).items():
        assert (weight - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def test_ddp_is_as_one(alone: Path, together: Path) -> None:
    assert_alike(together, alone)
    assert figures(together, "int4") == [pytest.approx(row, rel=1e-2, abs=1e-5) for row in figures(alone, "int4")]
    # what is written down and read is the whole model
    assert {p.name for p in (together / "distill" / "model").iterdir()} == {
        p.name for p in (alone / "distill" / "model").iterdir()
    }


@pytest.mark.exhaustive
def test_a_cut_vocabulary_and_scales_that_learn_late(workers: Workers, quickstart: Path, tmp_path: Path) -> None:
    """All processes read the text in the student's own tokens; a scale without a gradient yet stops nobody."""
    cut = ["--set", "stages.prune.keep.vocabulary=used"]
    late = ["--set", "stages.int4.quantizer={kind: int_group, scale: learned}", "--set", "stages.int4.from_step=2"]
    late += ["--set", "stages.int4.freeze_scales=0.75"]
    one = finished(workers, quickstart, tmp_path / "one", *cut, *late)
    two = finished(workers, quickstart, tmp_path / "two", *cut, *late, *DEVICES, size=2)
    assert_alike(two, one)
    assert figures(two, "int4") == [pytest.approx(row, rel=1e-2, abs=1e-5) for row in figures(one, "int4")]


@pytest.mark.exhaustive
def test_a_search_is_the_work_of_the_first(workers: Workers, quickstart: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load(quickstart.read_text())
    train = {"num_candidates": 2, "num_steps": 2, "batch_size": 4}
    search = {"budget": {"non_embedding_parameters": "50%"}, "train": train}
    recipe["stages"] = {"prune": {"search": search}}
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    found = [
        json.loads((finished(workers, file, tmp_path / name, *more, size=size) / "prune" / "search.json").read_text())
        for name, more, size in (("one", [], 1), ("two", DEVICES, 2))
    ]
    first, second = ([row["keep"] for row in one["ranking"]] for one in found)
    assert first == second


def test_fsdp_is_as_one(workers: Workers, quickstart: Path, alone: Path, tmp_path: Path) -> None:
    more = [*DEVICES, "--set", "compute.strategy=fsdp"]
    folder = finished(workers, quickstart, tmp_path / "run", *more, size=2)
    assert_alike(folder, alone)
    assert figures(folder, "int4") == [pytest.approx(row, rel=1e-2, abs=1e-5) for row in figures(alone, "int4")]


@pytest.mark.exhaustive
def test_fsdp_is_as_one_where_the_head_is_more_than_a_product(
    workers: Workers, quickstart: Path, tmp_path: Path
) -> None:
    """Gemma caps its logits and ties its weights; an adapter makes another head. Gradients are of the whole weights."""
    recipe = yaml.safe_load(quickstart.read_text())
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 2048, "head_dim": 16}
    shared = {**sizes, "num_attention_heads": 2, "num_key_value_heads": 1}
    shared |= {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    capped = {"model_type": "gemma2", "final_logit_softcapping": 3.0, **shared}
    few = {"kind": "finetune", "num_steps": 4, "batch_size": 4, "validate_every_steps": 2, "optimizer": {"lr": 1e-2}}
    adapters = {"r": 2, "target_modules": ["lm_head", "q_proj"]}
    recipe["stages"] = {
        "capped": {**few, "model": {"config": capped}},
        "plain": {**few, "model": {"config": {"model_type": "llama", "tie_word_embeddings": False, **shared}}},
        "adapted": {**few, "model": "plain", "lora": adapters},
    }
    file = tmp_path / "heads.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    one = finished(workers, file, tmp_path / "one")
    two = finished(workers, file, tmp_path / "two", *DEVICES, "--set", "compute.strategy=fsdp", size=2)
    for stage in recipe["stages"]:
        assert_alike(two, one, stage)


def started_until_saved(workers: Workers, recipe: Path, folder: Path, *more: str) -> World:
    """A world of two, whose second stage has just written its first checkpoint."""
    world = workers.start(arguments(recipe, folder, *DEVICES, *more), size=2, log=folder.with_suffix(".log"))
    until = time.monotonic() + BOUND_S
    while not any((folder / "distill" / "checkpoints").glob("step=*.ckpt")):
        assert world.running(), world.said()
        assert time.monotonic() < until, world.said()
        time.sleep(0.002)
    return world


@pytest.fixture
def pruned(alone: Path, tmp_path: Path) -> Path:
    """A run whose first stage is done."""
    shutil.copytree(alone / "prune", tmp_path / "run" / "prune")
    shutil.copytree(alone / "data", tmp_path / "run" / "data")
    return tmp_path / "run"


def test_a_killed_rank_ends_the_other_and_one_process_goes_on(
    workers: Workers, quickstart: Path, pruned: Path, together: Path, tmp_path: Path
) -> None:
    """Checkpoints of two processes are taken up by one: the same steps, but for the order of sums."""
    world = started_until_saved(workers, quickstart, pruned, "--set", "compute.checkpoint_every_steps=1")
    world.send(signal.SIGKILL, rank=1)
    codes = world.wait(60)
    assert codes == [1, -signal.SIGKILL]
    assert "rank 0: another process is gone" in world.said() or "has sent no heartbeat" in world.said()
    assert "Traceback" not in world.said().split("Current thread")[0]
    finished(workers, quickstart, pruned, "--set", "compute.checkpoint_every_steps=1")
    assert "resuming from step" in (pruned.with_suffix(".finished") / "rank-0.log").read_text()
    for row, expected in zip(trained(pruned), trained(together), strict=True):
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("number", "write"),
    [
        (signal.SIGTERM, "at_once"),
        pytest.param(signal.SIGUSR1, "behind", marks=pytest.mark.exhaustive),
    ],
)
def test_a_preempted_rank_saves_for_all_and_two_go_on_to_the_last_bit(
    number: signal.Signals, write: str, workers: Workers, quickstart: Path, pruned: Path, together: Path
) -> None:
    """The signal reaches one of the two, as when a machine of several is taken back."""
    world = started_until_saved(workers, quickstart, pruned, "--set", f"compute.write_checkpoints={write}")
    world.send(number, rank=1)
    assert world.wait(120) == [75, 75], world.said()
    assert f"stopped by {number.name} at step" in world.said()
    finished(workers, quickstart, pruned, *DEVICES, size=2)
    ours, theirs = weights(pruned, "distill"), weights(together, "distill")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert trained(pruned) == trained(together)


@pytest.mark.exhaustive
def test_shards_are_taken_up_by_two_and_by_one(
    workers: Workers, quickstart: Path, pruned: Path, alone: Path, tmp_path: Path
) -> None:
    sharded = ["--set", "compute.strategy=fsdp", "--set", "compute.write_checkpoints=behind"]
    world = started_until_saved(workers, quickstart, pruned, *sharded)
    world.send(signal.SIGTERM, rank=0)
    assert world.wait(BOUND_S) == [75, 75], world.said()
    by_one = tmp_path / "by-one"
    shutil.copytree(pruned, by_one)
    finished(workers, quickstart, pruned, *DEVICES, *sharded, size=2)
    finished(workers, quickstart, by_one)
    for folder in (pruned, by_one):
        assert "resuming from step" in (folder.with_suffix(".finished") / "rank-0.log").read_text()
        for row, expected in zip(trained(folder), trained(alone), strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_frozen_rank_is_found(workers: Workers, quickstart: Path, pruned: Path) -> None:
    world = started_until_saved(workers, quickstart, pruned, "--set", "compute.silence_s=10")
    world.send(signal.SIGSTOP, rank=1)
    try:
        world.processes[0].join(60)
        assert world.processes[0].exitcode == 1, world.said()
        assert "rank 1 (process" in world.said()
        assert "has sent no heartbeat for 10 s" in world.said()
    finally:
        world.send(signal.SIGKILL, rank=1)
    world.wait(10)


def test_a_mistake_is_told_once(workers: Workers, quickstart: Path, tmp_path: Path) -> None:
    more = ["--set", "stages.distill.batch_size=3", *DEVICES]
    world = workers.start(arguments(quickstart, tmp_path / "run", *more), size=2, log=tmp_path / "log")
    codes = world.wait(BOUND_S)
    assert codes == [2, 2], world.said()
    assert "batch_size (3) must be a multiple of the 2 processes" in world.logs[0].read_text()


def test_the_command_starts_its_own_processes(chaos: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "distill", "run", str(chaos), "--run-dir", str(tmp_path / "run")]
    short = ["--set", "stages.train.num_steps=4", *DEVICES]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *short], env=environment, capture_output=True, text=True, timeout=BOUND_S)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("train step 4/4") == 1
    assert f"2 processes: the first speaks here, the others in {tmp_path / 'run' / 'logs'}/rank-N.log" in done.stdout
    assert (tmp_path / "run" / "train" / "model" / "model.safetensors").exists()
    assert {path.name for path in (tmp_path / "run" / "logs").iterdir()} == {"rank-1.log"}


@pytest.mark.exhaustive
def test_questions_of_a_student_that_learns_from_its_own_sequences(
    workers: Workers, quickstart: Path, tmp_path: Path
) -> None:
    """All count the sampled tokens together, the first asks; what is required and missed ends them all alike."""
    questions = tmp_path / "questions.jsonl"
    rows = [{"query": f"row {i}", "choices": ["text", "words"], "gold": i % 2} for i in range(4)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = {"words": {"kind": "multiple_choice", "path": str(questions)}}
    recipe = yaml.safe_load(quickstart.read_text())
    own = {"share": 0.5, "prompt_tokens": 4, "max_new_tokens": 4}
    learn = {"student": "teacher", "losses": ["forward_kl"], "on_policy": own, "num_steps": 4, "batch_size": 4}
    recipe["stages"] = {
        "distill": learn | {"evaluate_every": {"num_steps": 2, "tasks": tasks}},
        "evaluate": {"speed": None, "tasks": tasks},
    }
    recipe["require"] = {"words": "> 100 %"}
    file = tmp_path / "asked.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    world = workers.start(arguments(file, tmp_path / "run", *DEVICES), size=2, log=tmp_path / "log")
    codes = world.wait(BOUND_S)
    assert codes[0] == 3, world.said()
    assert "require.words: > 100 % is not reached" in world.logs[0].read_text()
    assert codes[1] in (0, 3), world.said()
    asked = [row for row in read_rows(tmp_path / "run" / "distill") if "task/words" in row]
    assert [row["step"] for row in asked] == [2, 4]
    assert 0 < asked[0]["tokens"] < asked[1]["tokens"]
