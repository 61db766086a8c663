"""What would fail after a training is found before it; what fails there all the same costs no step."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi

from distill.core.errors import InputError, MachineError
from distill.exporters import upload
from distill.recipe import Recipe
from distill.runner import run

HEAD = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
stages:
"""
TAIL = "compute: {accelerator: cpu}\nlogging: {wandb: disabled}\n"
TRAINED = """\
  tuned: {kind: finetune, model: teacher, num_steps: 2, batch_size: 2}
  distilled: {kind: distill, student: tuned, lora: {r: 2}, num_steps: 2, batch_size: 2}
  rounded:
    {kind: quantize, student: distilled, quantizer: int8_channel, num_steps: 2, batch_size: 2, validate_every_steps: 2}
"""
TUNED = "  tuned: {kind: finetune, model: teacher, num_steps: 1, batch_size: 2}\n"
CUT = "  cut: {kind: prune, model: tuned, keep: {intermediate_size: 32}}\n"
SHAPE = "model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 4"
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(teacher: Path, text: Path) -> Make:
    def make(stages: str, **names: Any) -> Recipe:
        return Recipe.from_text(HEAD.format(**{"teacher": teacher, "text": text} | names) + stages + TAIL)

    return make


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry an optimizer step that is made."""
    made: list[int] = []
    step = torch.optim.AdamW.step

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        made.append(1)
        return step(self, *given, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    return made


def quiet(line: str) -> None:
    """Nobody listens."""


def test_what_fails_after_the_last_step_costs_no_step(
    recipe: Make, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when each of three models is to take its place; then it is not."""
    straight = run(recipe(TRAINED), tmp_path / "straight", say=quiet).folder
    assert len(steps) == 6
    steps.clear()
    replace = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == "model" and Path(target).parent.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    folder = tmp_path / "late"
    for done, failing in enumerate(("tuned", "distilled", "rounded"), 1):
        with pytest.raises(MachineError, match=rf"stages.{failing}: .*model: cannot be written \(No space left"):
            run(recipe(TRAINED), folder, say=quiet)
        assert len(steps) == 2 * done
        assert [file.name for file in (folder / failing / "checkpoints").iterdir()] == ["step=00000002.ckpt"]
    kept = torch.load(folder / "rounded" / "checkpoints" / "step=00000002.ckpt", weights_only=True)
    failing = ""
    said: list[str] = []
    run(recipe(TRAINED), folder, say=said.append)
    assert "  resuming from step 2 of 2 (step=00000002.ckpt)" in said
    assert len(steps) == 6
    figures = json.loads((folder / "rounded" / "DONE").read_text())["figures"]
    assert figures["training_seconds"] >= round(kept["seconds"], 1), "those of the process before are counted"
    for stage in ("tuned", "distilled", "rounded"):
        ours, theirs = (place / stage / "model" / "model.safetensors" for place in (folder, straight))
        assert ours.read_bytes() == theirs.read_bytes(), stage
        rows = [json.loads(row) for row in (folder / stage / "metrics.jsonl").read_text().splitlines()]
        assert sum("val/cross_entropy" in row and row["step"] == 2 for row in rows) == 1
        assert not (folder / stage / "checkpoints").exists()


def test_what_failed_in_the_last_validation_is_done_by_the_next_run(
    recipe: Make, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distill.training.module import DistillationModule

    stage = "  tuned: {kind: finetune, model: teacher, num_steps: 2, batch_size: 2, validate_every_steps: 2}\n"
    with monkeypatch.context() as patch:
        patch.setattr(DistillationModule, "validation_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(recipe(stage), tmp_path, say=quiet)
    assert len(steps) == 2
    run(recipe(stage), tmp_path, say=quiet)
    assert len(steps) == 2
    assert '"val/cross_entropy"' in (tmp_path / "tuned" / "metrics.jsonl").read_text()


@pytest.fixture
def another(teacher: Path, tmp_path: Path) -> Path:
    """A copy of the teacher, to be spoilt."""
    return Path(shutil.copytree(teacher, tmp_path / "another"))


def refused(recipe: Recipe, folder: Path, kind: type[Exception] = InputError) -> str:
    """The line with which a run is refused before anything is made."""
    with pytest.raises(kind) as refusal:
        run(recipe, folder, say=quiet)
    assert "\n" not in str(refusal.value)
    left = [place.name for place in folder.iterdir() if place.name not in ("data", ".lock")]
    assert left == [], "neither a stage's folder nor a trial's"
    return str(refusal.value)


USES = {
    "prune": "{kind: prune, model: %s, keep: {intermediate_size: 32}}",
    "sparsify": "{kind: sparsify, model: %s}",
    "finetune": "{kind: finetune, model: %s, num_steps: 1, batch_size: 2}",
    "distill": "{kind: distill, student: %s, num_steps: 1, batch_size: 2}",
    "quantize": "{kind: quantize, student: %s, quantizer: int8_channel, num_tokens: 0}",
}


@pytest.mark.parametrize("kind", USES)
def test_a_generation_config_that_does_not_load_is_found_before_any_stage(
    recipe: Make, steps: list[int], another: Path, tmp_path: Path, kind: str
) -> None:
    """Also where the stage that reads it is the last one."""
    (another / "generation_config.json").write_text(json.dumps({"max_new_tokens": 0}))
    first = "  first: {kind: finetune, model: teacher, num_steps: 1, batch_size: 2}\n"
    line = refused(recipe(f"{first}  last: {USES[kind] % another}\n"), tmp_path / "run")
    assert line.startswith(f"stages.last: {another}: cannot load the generation config (`max_new_tokens` must be")
    assert steps == []


def test_it_is_found_for_a_stage_whose_own_model_is_not_made_yet(recipe: Make, another: Path, tmp_path: Path) -> None:
    (another / "generation_config.json").write_text(json.dumps({"max_new_tokens": 0}))
    cut = f"  cut: {USES['sparsify'] % 'teacher'}\n  last: {USES['distill'] % 'cut'}\n"
    assert refused(recipe(cut, teacher=another), tmp_path / "run").startswith(f"stages.cut: {another}: ")


def test_a_tokenizer_that_would_be_read_back_as_another_one_is_found_before_any_stage(
    text: Path, steps: list[int], another: Path, tmp_path: Path
) -> None:
    """Of a Qwen 2, transformers reads every tokenizer with the architecture's own way to cut text."""
    config = json.loads((another / "config.json").read_text()) | {"vocab_size": 400}
    (another / "config.json").write_text(json.dumps(config | {"model_type": "qwen2", "architectures": None}))
    last = f"  last: {{kind: finetune, model: {another}, weights: random, num_steps: 1, batch_size: 2}}\n"
    new = TUNED.replace("model: teacher", f"model: {{config: {{{SHAPE}}}}}")
    head = HEAD.format(teacher="", text=text).replace("teacher: \n", "")
    head = head.replace("stages", "  tokenizer: {vocab_size: 400}\nstages")
    line = refused(Recipe.from_text(head + new + last + TAIL), tmp_path / "run")
    assert line.startswith(
        f"stages.last: {another}: a model made from it could not be saved in the end: the tokenizer "
    )
    assert "is read back with another way to cut text; set data.tokenizer to one" in line
    assert steps == []


def test_settings_of_which_transformers_only_warns_survive_a_cut_vocabulary(
    recipe: Make, another: Path, tmp_path: Path
) -> None:
    """Sampling settings beside greedy decoding: many published models have them, and they are saved as they came."""
    settings = json.loads((another / "generation_config.json").read_text())
    (another / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.6, "pad_token_id": 268}))
    run(recipe("  cut: {kind: prune, model: teacher, keep: {vocabulary: 264}}\n", teacher=another), tmp_path, say=quiet)
    kept = json.loads((tmp_path / "cut" / "model" / "generation_config.json").read_text())
    assert kept["temperature"] == 0.6
    assert kept["pad_token_id"] < 268, "nothing of it was changed"


@pytest.mark.parametrize("kind", USES)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_folder_with_an_adapter_in_it_is_refused_before_anything_runs(
    recipe: Make, another: Path, tmp_path: Path, kind: str, role: str
) -> None:
    from peft import LoraConfig, get_peft_model

    from distill.forecast import describe
    from distill.models.load import load_config, load_model

    adapted = get_peft_model(load_model(str(another)), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(another)
    assert {"config.json", "model.safetensors", "adapter_config.json"} <= {file.name for file in another.iterdir()}
    named = recipe(f"  last: {USES[kind] % another}\n") if role == "student" else None
    of = named or recipe(f"  last: {USES[kind] % 'teacher'}\n", teacher=another)
    line = rf"holds an adapter \(adapter_config.json\); merge it .* by peft, .*{re.escape(repr(str(another)))}"
    for use in (lambda: describe(of), lambda: run(of, tmp_path / "run"), lambda: load_config(str(another))):
        with pytest.raises(InputError, match=line):
            use()
    assert not (tmp_path / "run" / "last").exists()


def test_a_card_that_cannot_be_read_costs_a_line_and_no_training(
    recipe: Make, steps: list[int], another: Path, tmp_path: Path
) -> None:
    (another / "README.md").write_text("---\nlicense: [\n---\n")
    said: list[str] = []
    run(recipe(TUNED, teacher=another), tmp_path / "run", say=said.append)
    assert len(steps) == 1
    assert sum("README.md: the licence cannot be read" in line for line in said) == 1
    assert json.loads((tmp_path / "run" / "tuned" / "model" / "distill.json").read_text())["licence"] is None


@pytest.mark.parametrize("stages", [TUNED, TUNED + "  evaluate: {speed: null}\n"])
def test_a_validation_text_of_one_token_is_refused_at_the_start(
    teacher: Path, text: Path, steps: list[int], tmp_path: Path, stages: str
) -> None:
    one = tmp_path / "one.jsonl"
    one.write_text('{"text": "a"}\n')
    head = HEAD.format(teacher=teacher, text=text).replace(
        "  seq", f"  validation: {{kind: jsonl, path: {one}}}\n  seq"
    )
    line = refused_in(Recipe.from_text(head + stages + TAIL), tmp_path / "run")
    assert "data.validation: nothing to measure on: no token of text is predicted from another in 2 tokens of 1" in line
    assert steps == []


def refused_in(recipe: Recipe, folder: Path) -> str:
    """As above, where the first stage may have begun."""
    with pytest.raises(InputError) as refusal:
        run(recipe, folder, say=quiet)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_an_export_that_cannot_be_written_is_found_before_the_training(
    recipe: Make, steps: list[int], another: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.exporters.gguf.Gguf.writers", lambda self: ())
    export = "  out: {kind: export, model: tuned, target: gguf}\n"
    tokenizer = json.loads((another / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (another / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refused(recipe(TUNED + export, teacher=another), tmp_path / "run")
    assert line.startswith("stages.out: tokenizer: cannot be written as GGUF: it normalizes text (Lowercase)")
    config = json.loads((another / "config.json").read_text())
    (another / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    line = refused(recipe(TUNED + export, teacher=another), tmp_path / "run")
    assert line.startswith(f"stages.out: {another}: cannot be written as GGUF: llama with hidden_act 'gelu'")
    assert steps == []


def test_an_upload_without_a_token_is_refused_before_the_training(
    recipe: Make, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_google_colab", lambda: None)
    export = "  out: {kind: export, model: tuned, push_to_hub: some/model, upload: %s}\n"
    line = refused(recipe(TUNED + export % "true"), tmp_path / "run")
    assert line == "stages.out: push_to_hub: some/model: no token; set HF_TOKEN, or run hf auth login"
    assert steps == []
    (tmp_path / "token").write_text("hf_abcdefghijklmnop\n")
    upload.check_token("some/model")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *given, **named: pytest.fail("before the training"))
    run(recipe(TUNED + export % "false"), tmp_path / "run", say=quiet)  # which only says what it would send
    assert steps == [1]


@pytest.mark.parametrize("target", ["huggingface", "onnx"])
def test_a_link_that_is_not_exported_is_found_before_the_training(
    recipe: Make, steps: list[int], another: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr("distill.exporters.onnx.Onnx.missing", lambda self: None)
    (another / "tokenizer_config.json").rename(tmp_path / "elsewhere.json")
    (another / "tokenizer_config.json").symlink_to(tmp_path / "elsewhere.json")
    export = f"  out: {{kind: export, model: {another}, target: {target}}}\n"
    line = refused(recipe(TUNED + export), tmp_path / "run")
    assert line.startswith(f"stages.out: {another / 'tokenizer_config.json'}: a link to {tmp_path / 'elsewhere.json'}")
    assert steps == []
    out = f"  out: {{kind: export, model: tuned, target: {target}}}\n"
    run(recipe(TUNED + out), tmp_path / "run", only="tuned", say=quiet)  # what a stage writes has no link in it
    assert steps == [1]


@pytest.mark.plots
@pytest.mark.parametrize("stages", [TUNED + "  evaluate: {speed: null}\n  report: {prompts: []}\n", TUNED + CUT])
def test_a_plot_that_cannot_be_drawn_is_found_before_the_training(
    recipe: Make, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: str
) -> None:
    from matplotlib.figure import Figure

    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no font can be found")

    monkeypatch.setattr(Figure, "savefig", broken)
    line = refused(recipe(stages), tmp_path / "run", MachineError)
    assert line.endswith(": plots cannot be drawn here (no font can be found); is matplotlib whole?")
    assert steps == []


def test_a_disk_without_room_for_the_end_is_refused_at_the_start(
    recipe: Make, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10
    usage = lambda _: type("Usage", (), {"free": free})  # noqa: E731
    monkeypatch.setattr("distill.stages.rehearsal.shutil.disk_usage", usage)
    with pytest.raises(MachineError, match=r"stages.tuned: .*the last checkpoint .* have no room in the 0.00 GB"):
        run(recipe(TUNED), tmp_path, say=quiet)
    assert steps == []
    size = 4 * sum(w.numel() for w in weights_of(recipe(TUNED).teacher))
    free = 3 * size + size // 2
    run(recipe(TUNED), tmp_path, say=quiet)
    assert len(steps) == 1


def weights_of(folder: str | None) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    return list(load_file(Path(str(folder)) / "model.safetensors").values())


@pytest.mark.parametrize("spoil", ["flip", "drop", "cast", "cut"])
def test_what_was_written_is_compared_with_what_was_trained(
    recipe: Make, steps: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spoil: str
) -> None:
    """As a disk, or a library, might write it; the next run writes it again from the checkpoint."""
    import safetensors.torch
    from transformers import modeling_utils

    save = safetensors.torch.save_file

    def spoilt(tensors: dict[str, torch.Tensor], file: Any, **more: Any) -> None:
        name = "model.layers.1.mlp.up_proj.weight"
        if spoil == "flip":
            tensors[name] = tensors[name].clone()
            tensors[name].view(torch.int32)[3, 3] ^= 1
        elif spoil == "drop":
            del tensors[name]
        elif spoil == "cast":
            tensors[name] = tensors[name].bfloat16()
        else:
            tensors[name] = tensors[name][:-1].clone()
        save(tensors, file, **more)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_utils, "safe_save_file", spoilt)
        with pytest.raises(
            Exception, match=r"the saved model differs from the model in memory: .*up_proj.weight is .*check the disk"
        ):
            run(recipe(TUNED), tmp_path, say=quiet)
    assert not (tmp_path / "tuned" / "model").exists()
    run(recipe(TUNED), tmp_path, say=quiet)
    assert len(steps) == 1


@pytest.mark.parametrize(
    "last",
    [
        "{kind: distill, student: tuned, teacher: %s, num_steps: 1, batch_size: 2}",
        "{kind: quantize, student: tuned, teacher: %s, quantizer: int8_channel, num_steps: 1, batch_size: 2}",
        "{kind: cache_teacher, teacher: %s}",
        "{kind: evaluate, models: [tuned, %s], speed: null}",
        "{kind: evaluate, models: [tuned], teacher: %s, speed: null}",
        *USES.values(),
    ],
)
def test_a_model_of_other_tokens_is_found_before_any_stage(
    recipe: Make, steps: list[int], tmp_path: Path, new_teacher: Callable[..., Path], last: str
) -> None:
    other = new_teacher(tmp_path / "other", 1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = refused(recipe(f"{TUNED}  last: {last % other}\n"), tmp_path / "run")
    assert line.startswith("stages.last: vocabulary: student has 270 tokens, teacher 270; the first that differs is ")
    assert steps == []


def test_what_a_report_lacks_is_found_before_the_training(recipe: Make, steps: list[int], tmp_path: Path) -> None:
    line = refused(recipe(TUNED + "  report: {}\n"), tmp_path / "run")
    assert line == "stages.report: there is nothing to report: no evaluate stage stands before this one"
    measured = TUNED + "  evaluate: {speed: null}\n  report: {prompts: [a, '']}\n"
    line = refused(recipe(measured), tmp_path / "run")
    assert line == "stages.report: prompts: '' has no tokens; give a text of at least one token"
    assert steps == []


def test_every_stage_that_makes_a_model_says_what_its_end_needs() -> None:
    from distill.stages import STAGES
    from distill.stages.base import StageSpec

    made = [spec for _, spec in STAGES.items() if issubclass(spec, StageSpec) and spec.makes_model]
    assert len(made) >= 5
    assert [spec.__name__ for spec in made if spec.rehearse is StageSpec.rehearse] == []
