"""An export in a run: what it lacks is said before the run starts, and what was not verified is verified later."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from distill.core.errors import DistillError, InputError, RecipeError
from distill.exporters.base import EngineMissing, require_engine
from distill.exporters.huggingface import HuggingFace
from distill.forecast import describe
from distill.recipe import Recipe
from distill.runner import run

RECIPE = """\
name: tiny
teacher: {teacher}
data:
  train: {{kind: jsonl, path: {text}}}
  sequence_length: 16
  validation_tokens: 100
  calibration_sequences: 4
stages:
  evaluate: {{models: [teacher], speed: null}}
  export: {{model: teacher, target: {target}, title: small, verify_sequences: 1}}
  report: {{prompts: []}}
compute: {{accelerator: cpu}}
logging: {{wandb: disabled}}
"""


@pytest.fixture
def recipe_of(teacher: Path, text: Path) -> Callable[[str], Recipe]:
    return lambda target: Recipe.from_text(RECIPE.format(teacher=teacher, text=text, target=target))


def lacking(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """As if these were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr("distill.exporters.base.find_spec", lambda name: None if name in modules else find(name))


def test_what_is_not_installed_is_said_before_the_run(
    recipe_of: Callable[[str], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of("onnx")
    lacking(monkeypatch, "onnxruntime", "onnxscript")
    missing = "stages.export: target onnx needs onnxscript, which is not installed: pip install 'distill-lm[onnx]'"
    assert describe(recipe).splitlines()[-1] == f"  before this runs here: {missing}"
    with pytest.raises(InputError) as refusal:
        run(recipe, tmp_path / "run")
    assert str(refusal.value) == f"tiny: {missing}"
    assert not (tmp_path / "run" / "evaluate").exists()
    lacking(monkeypatch, "llama_cpp")
    monkeypatch.setattr("distill.exporters.gguf.Gguf.writers", lambda self: ())
    unverified = (
        "gguf, not verified in llama.cpp, which is not installed: "
        "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install 'distill-lm[gguf]', then run the same command again"
    )
    assert unverified in describe(recipe_of("gguf"))


@pytest.mark.parametrize(
    ("grid", "target", "message"),
    [
        (
            "quantizer: {kind: int_group, symmetry: asymmetric}",
            "gguf",
            "no format for int4, group 32, asymmetric; train",
        ),
        ("quantizer: {kind: int_group, group_size: 16}", "gguf", "set group_size to a multiple of 32"),
        ("quantizer: q4_0, layers: [{match: q_proj, quantizer: fp8}]", "gguf", "no format for fp8"),
        ("quantizer: q4_0", "{kind: gguf, round_to: q4_0}", "low-bit already; remove round_to"),
        ("quantizer: fp8", "torchao", "supports integer codes only (got fp8"),
        ("quantizer: int8_channel, activations: dynamic_int8", "torchao", "no quantized activations (got dynamic_int8"),
        ("quantizer: q4_0", "{kind: gguf, embeddings: f16}", "embeddings are Q8_0 already; remove embeddings from the"),
        ("embeddings: int8", "{kind: torchao, embeddings: int8}", "embeddings are int8, per channel already; remove"),
        (None, "torchao", "not low-bit; set round_to: int8"),
    ],
)
def test_what_the_format_cannot_hold_is_said_before_it_is_trained(
    teacher: Path, text: Path, grid: str | None, target: str, message: str
) -> None:
    stage = "finetune: {model: teacher" if grid is None else f"quantize: {{student: teacher, {grid}"
    stages = f"{stage}, num_steps: 1, batch_size: 4}}\n  export: {{model: {stage.split(':')[0]}, target: {target}}}"
    recipe = RECIPE[: RECIPE.index("  evaluate")] + "  {stages}\ncompute: {{accelerator: cpu}}\n"
    with pytest.raises(RecipeError, match=rf"tiny: stages.export: target \w+: .*{re.escape(message)}"):
        describe(Recipe.from_text(recipe.format(teacher=teacher, text=text, stages=stages)))


def test_what_was_not_verified_is_verified_once_its_engine_is_there(
    recipe_of: Callable[[str], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, verify = recipe_of("huggingface"), HuggingFace.verify
    monkeypatch.setattr(HuggingFace, "engine_module", "a_slow_engine")
    monkeypatch.setattr(HuggingFace, "verify", lambda self, *given: require_engine(self) or verify(self, *given))

    def lines(name: str) -> list[str]:
        said: list[str] = []
        run(recipe, tmp_path / "run", say=said.append)
        return [line for line in said if name in line]

    assert "not verified in plain transformers, in fp32, which is not installed" in lines("small: ")[0]
    assert [line.split(" s: ")[1] for line in lines(" s: ")] == [
        str(tmp_path / "run" / "export" / "small"),
        str(tmp_path / "run" / "report" / "index.html"),
    ]
    monkeypatch.setattr("distill.exporters.base.find_spec", lambda module: object())
    assert lines("made again") == ["[2/3] export: made again, as a_slow_engine is installed now"]
    assert "Loaded in plain transformers" in (tmp_path / "run" / "export" / "small" / "README.md").read_text()
    assert len(lines("finished before")) == 3

    monkeypatch.setattr(HuggingFace, "writers", lambda self: ("gone",))  # only what is finished can do without
    lacking(monkeypatch, "gone")
    assert len(lines("finished before")) == 3
    for refused in ({"start": "export"}, {"only": "export"}, {"start": "evaluate"}):
        with pytest.raises(InputError, match=r"stages\.export: target huggingface needs gone"):
            run(recipe, tmp_path / "run", **refused)
    assert len(lines("finished before")) == 3
    changed = Recipe.from_text(recipe.dump().replace("verify_sequences: 1", "verify_sequences: 2"))
    with pytest.raises(InputError, match=r"stages\.export: target huggingface needs gone"):
        run(changed, tmp_path / "run")


def test_the_stage_prints_what_the_comparison_found(recipe_of: Callable[[str], Recipe], tmp_path: Path) -> None:
    said: list[str] = []
    run(recipe_of("huggingface"), tmp_path / "run", say=said.append)
    place, number = re.escape(str(tmp_path / "run" / "export" / "small")), r"[\d.e+-]+"
    expected = (
        rf" *{place}: {number} MB; run by plain transformers, in fp32: logit difference {number} at most, "
        rf"{number} in the mean; KL {number}, {number} at worst; same first token 100.0%"
    )
    assert [line for line in said if re.fullmatch(expected, line)], said


@pytest.mark.parametrize("outcome", [None, EngineMissing("not verified"), DistillError("KL 0.5 is above max_kl")])
def test_only_a_verified_export_is_uploaded(
    recipe_of: Callable[[str], Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcome: Exception | None
) -> None:
    uploaded: list[tuple[Path, str]] = []
    monkeypatch.setattr("distill.exporters.upload.check_token", lambda repository: None)
    monkeypatch.setattr("distill.exporters.upload.upload", lambda *given: uploaded.append(given))
    if outcome is not None:

        def verify(*given: object) -> None:
            raise outcome

        monkeypatch.setattr(HuggingFace, "verify", verify)
    text = recipe_of("huggingface").dump()
    stages = "stages: {export: {model: teacher, title: small, push_to_hub: org/name, upload: true}}\n"
    recipe = Recipe.from_text(text[: text.index("stages:")] + stages)
    is_wrong = outcome is not None and not isinstance(outcome, EngineMissing)
    with pytest.raises(DistillError, match="max_kl") if is_wrong else nullcontext():
        run(recipe, tmp_path / "run", say=lambda line: None)
    assert uploaded == ([(tmp_path / "run" / "export" / "small", "org/name")] if outcome is None else [])


def test_an_encoder_is_exported_and_else_refused(text: Path, tmp_path: Path) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install 'distill-lm[test]'")
    encoder, stages = make_encoder(tmp_path / "bert"), RECIPE
    for line in ("  evaluate: {{models: [teacher], speed: null}}\n", "  report: {{prompts: []}}\n"):
        stages = stages.replace(line, "")
    recipe = Recipe.from_text(stages.format(teacher=encoder, text=text, target="onnx"))
    assert "export" in describe(recipe)
    done = run(recipe, tmp_path / "run").done("export")
    assert done.figures["tokens"] == 8  # of sixteen, half of which are cut off
    assert done.figures["kl"] < 0.05
    card = (tmp_path / "run" / "export" / "small" / "README.md").read_text()
    assert "pipeline_tag: fill-mask" in card
    assert '"token_type_ids"' in card
    with pytest.raises(RecipeError, match="bert is an encoder, which predicts masked tokens, which needs a task"):
        describe(Recipe.from_text(RECIPE.format(teacher=encoder, text=text, target="onnx")))


def make_encoder(folder: Path) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "row", "of", "the", "text", "that", "a", "small", "model", "reads", "and", "more", "words", ","]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)  # fmt: skip
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=32, initializer_range=0.2,
    )  # fmt: skip
    BertForMaskedLM(config).save_pretrained(folder)
    return folder
