"""A signal at the worst moments of a run: in a library that catches every error, in one that waits, between stages."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import wandb

from distill.core import listener, stop
from distill.core.errors import Interrupted, Preempted, Stopped
from distill.core.run_folder import Run
from distill.recipe import Recipe
from distill.runner import run
from distill.tracking import wandb as tracking

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
    num_steps: 4
    batch_size: 2
    model:
      config: {{model_type: llama, hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 32}}
  export: {{model: first}}
compute: {{accelerator: cpu, micro_batch_size: 2}}
logging: {{wandb: offline}}
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("recipe")
    rows = [{"text": f"row {i} of the text that a small model reads, and {i * i} more words"} for i in range(40)]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(RECIPE.format(text=folder / "text.jsonl"))
    return Recipe.load(folder / "tiny.yaml")


def go_on(recipe: Recipe, folder: Path) -> list[str]:
    said: list[str] = []
    run(recipe, folder, say=said.append)
    return said


def weights(folder: Path) -> bytes:
    return (folder / "first" / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    go_on(recipe, folder)
    return folder


@pytest.fixture(autouse=True)
def _soon(as_on_a_terminal: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits is left in a second instead of ten."""
    monkeypatch.setattr(listener, "PATIENCE_S", 1.0)


def signalled(number: int, call: Callable[..., Any], *, waits: bool = False, at: int = 1) -> Callable[..., Any]:
    """The call, at whose beginning a signal comes; one that waits then does not return."""
    left = at

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), number)
            time.sleep(600 if waits else 0)
        return call(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(("number", "kind"), [(signal.SIGTERM, Preempted), (signal.SIGINT, Interrupted)])
def test_while_wandb_opens(
    number: int, kind: type[Stopped], waits: bool, recipe: Recipe, undisturbed: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr("wandb.init", signalled(number, wandb.init, waits=waits))
        with pytest.raises(kind):
            go_on(recipe, tmp_path / "run")
    assert "cannot be opened" not in caplog.text
    assert not (tmp_path / "run" / "first" / "DONE").exists()
    go_on(recipe, tmp_path / "run")
    assert weights(tmp_path / "run") == weights(undisturbed)


def test_while_wandb_is_told_the_end(recipe: Recipe, undisturbed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """All stages are done by then: nothing is left to go on with, so that this is a success."""
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 60.0)
    finish = signalled(signal.SIGTERM, tracking.finish)
    monkeypatch.setattr(tracking, "finish", finish)
    assert any("to send this run" in line for line in go_on(recipe, tmp_path / "run"))
    assert (tmp_path / "run" / "export" / "DONE").exists()


def test_while_a_tokenizer_is_loaded(recipe: Recipe, undisturbed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Once taken for a tokenizer that cannot be loaded: exit code 2."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    (folder / "export" / "DONE").unlink()
    load = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", signalled(signal.SIGHUP, load, waits=True))
    with pytest.raises(Preempted, match="stopped by SIGHUP; the same command goes on"):
        go_on(recipe, folder)


def test_while_a_checkpoint_is_read(recipe: Recipe, undisturbed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Once taken for a damaged one, and passed over."""
    from distill.training.module import DistillationModule

    step = DistillationModule.training_step
    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "training_step", signalled(signal.SIGUSR1, step, at=3))
        with pytest.raises(Preempted, match="first: stopped by SIGUSR1 at step 3 of 4"):
            go_on(recipe, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", signalled(signal.SIGINT, torch.load, waits=True))
        with pytest.raises(Interrupted):
            go_on(recipe, tmp_path / "run")
    said = go_on(recipe, tmp_path / "run")
    assert any("resuming from step 3 of 4" in line for line in said)
    assert not any("damaged" in line for line in said)
    assert weights(tmp_path / "run") == weights(undisturbed)


def test_while_an_export_is_verified(recipe: Recipe, undisturbed: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Once taken for an export that does not load: exit code 1."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "export")
    with monkeypatch.context() as patch:
        load = transformers.AutoModelForCausalLM.from_pretrained
        second = signalled(signal.SIGTERM, load, waits=True, at=2)  # the first loads what it is compared with
        patch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", second)
        with pytest.raises(Preempted, match="export: stopped by SIGTERM;"):
            go_on(recipe, folder)
    assert not list((folder / "export").glob("tiny-*")), "what is not verified does not take its place"
    go_on(recipe, folder)
    assert (folder / "export" / "DONE").exists()


def test_while_python_drops_whatever_is_raised(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(600)

    def drop(session: Any, name: str) -> None:
        held = Library()
        del held

    monkeypatch.setattr("sys.unraisablehook", lambda dropped: None)
    monkeypatch.setattr("distill.runner._seed", drop)
    with pytest.raises(Preempted):
        go_on(recipe, tmp_path / "run")
    assert not (tmp_path / "run" / "first" / "DONE").exists()


def test_between_two_stages(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is done stays done."""
    monkeypatch.setattr(Run, "finish", signalled(signal.SIGTERM, Run.finish))
    with pytest.raises(Preempted):
        go_on(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "first" / "DONE").exists()
    assert not (tmp_path / "run" / "export").exists()


def of_quality(ask: Callable[[], None]) -> list[object]:
    """The batches of a measurement of quality."""
    from distill.evaluation.quality import compare_predictions

    def predict(batch: dict[str, torch.Tensor]) -> Callable[[slice], torch.Tensor]:
        begun.append(batch)
        ask()
        return lambda piece: torch.zeros(piece.stop - piece.start, 4)

    begun: list[object] = []
    batch = {"targets": torch.zeros(1, 2, dtype=torch.long), "mask": torch.ones(1, 2, dtype=torch.bool)}
    with pytest.raises(Stopped):
        compare_predictions(predict, None, [batch] * 3)
    return begun


def of_documents(ask: Callable[[], None]) -> list[object]:
    """The documents that are tokenized."""
    from distill.data.packing import batches

    class Read:
        @property
        def text(self) -> str:
            begun.append(self)
            ask()
            return "text"

    begun: list[object] = []
    with pytest.raises(Stopped):
        list(batches([Read() for _ in range(3)]))  # type: ignore[type-var]
    return begun


def of_exported_tensors(ask: Callable[[], None], folder: Path) -> list[object]:
    """The tensors that every exporter reads."""
    from distill.exporters.stored_weights import stored_weights

    def read() -> None:
        for name, _ in stored_weights(folder):
            begun.append(name)
            ask()

    begun: list[object] = []
    with pytest.raises(Stopped):
        read()
    return begun


def of_trained_candidates(ask: Callable[[], None]) -> list[object]:
    """The candidates that a search trains."""
    from distill.pruning.search import Candidate
    from distill.stages.prune.search.budget_search import Search

    def trained(candidate: Candidate) -> dict[str, float]:
        begun.append(candidate.name)
        ask()
        return {"kl": 1.0}

    begun: list[object] = []
    search = Search.__new__(Search)
    search.spec = SimpleNamespace(train=SimpleNamespace(num_candidates=3))  # type: ignore[assignment]
    search.context = SimpleNamespace(say=lambda line: None)  # type: ignore[assignment]
    ranked = [SimpleNamespace(name=f"candidate {i}") for i in range(3)]
    with pytest.raises(Stopped):
        search._train(SimpleNamespace(trained=trained), ranked, ranked[0])  # type: ignore[arg-type]
    return begun


@pytest.mark.parametrize("units", [of_quality, of_documents, of_exported_tensors, of_trained_candidates])
def test_no_further_unit_is_begun(units: Callable[..., list[object]], tiny_folders: list[Path]) -> None:
    """The stop is asked for within the first one."""
    given = [tiny_folders[1]] if units is of_exported_tensors else []
    with pytest.raises(Stopped), stop.listening(), stop.patient(600):
        begun = units(lambda: stop.ask(signal.SIGTERM), *given)
    assert len(begun) == 1
