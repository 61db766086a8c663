"""Teachers of the recipes, twice: with the real sizes as a config alone, and tiny with random weights."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distill.core.spec import Spec
from distill.data.csv import Csv
from distill.data.mixture import Mixture
from distill.data.spec import DataSpec
from distill.recipe import Recipe
from distill.training.spec import BudgetSpec

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
BERT: dict[str, Any] = {
    "model_type": "bert", "vocab_size": 30522, "max_position_embeddings": 512, "type_vocab_size": 2
}  # fmt: skip
TINY_BERT = {"hidden_size": 32, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 4}
TEACHERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "meta-llama/Llama-3.1-8B": (
        {
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        SIZES,
    ),
    "mistralai/Mistral-Nemo-Base-2407": (
        {
            "model_type": "mistral",
            "vocab_size": 131072,
            "hidden_size": 5120,
            "intermediate_size": 14336,
            "num_hidden_layers": 40,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,  # not hidden size over heads
            "sliding_window": None,
        },
        SIZES | {"hidden_size": 80, "head_dim": 16},
    ),
    "HuggingFaceTB/SmolLM2-1.7B": (
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "tie_word_embeddings": True,
        },
        SIZES | {"intermediate_size": 96, "num_key_value_heads": 4},
    ),
    "HuggingFaceTB/SmolLM2-360M": (
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 960,
            "intermediate_size": 2560,
            "num_hidden_layers": 32,
            "num_attention_heads": 15,
            "num_key_value_heads": 5,
            "tie_word_embeddings": True,
        },
        SIZES | {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3},
    ),
    "Qwen/Qwen3-8B": (
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        SIZES | {"intermediate_size": 96, "head_dim": 16},
    ),
    "Qwen/Qwen3-4B-Instruct-2507": (
        {
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        },
        SIZES | {"intermediate_size": 96, "head_dim": 16, "max_position_embeddings": 2048},
    ),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (
        {
            "model_type": "llama",
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
        },
        # rows of llama.cpp's blocks of 32
        SIZES | {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 3, "max_position_embeddings": 2048},
    ),
    "google-bert/bert-base-uncased": (
        BERT
        | {
            "architectures": ["BertForMaskedLM"],
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "tie_word_embeddings": True,
        },
        TINY_BERT,
    ),
    "sentence-transformers/all-MiniLM-L6-v2": (
        BERT
        | {
            "architectures": ["BertModel"],
            "hidden_size": 384,
            "intermediate_size": 1536,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
        },
        TINY_BERT,
    ),
    "builtin:quickstart-teacher": (
        {
            "model_type": "llama",
            "vocab_size": 2048,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "tie_word_embeddings": True,
        },
        {"hidden_size": 64, "num_hidden_layers": 2},
    ),
}
"""Reference -> (the real config's sizes, what the tiny twin has in their place: the same shape, the same grouping)."""

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + (eos_token if m.role == 'assistant' else '\n') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
"""Chat template of the tiny teachers."""

WORDS = (
    "the",
    "a",
    "small",
    "model",
    "learns",
    "from",
    "its",
    "large",
    "teacher",
    "what",
    "it",
    "knows",
    "import",
    "def",
)


def _text(number: int) -> str:
    return " ".join(WORDS[(number * 5 + i * (number % 7 + 1)) % len(WORDS)] for i in range(30)) + f" {number}."


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training and a validation file, JSON Lines; with labels, which recipes of encoders read."""
    folder = tmp_path_factory.mktemp("texts")
    for name, numbers in (("train", range(120)), ("validation", range(120, 140))):
        rows = "".join(
            json.dumps({"text": _text(n), "sentence": _text(n), "label": n % 2, "label_coarse": n % 3}) + "\n"
            for n in numbers
        )
        (folder / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    return folder / "train.jsonl", folder / "validation.jsonl"


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A training and a validation file of conversations, JSON Lines."""
    folder = tmp_path_factory.mktemp("chats")
    for name, numbers in (("train", range(120)), ("validation", range(120, 140))):
        rows = [{"prompt": f"the {number}?", "response": _text(number)[:12]} for number in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "train.jsonl", folder / "validation.jsonl"


@pytest.fixture(scope="session")
def real_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Reference -> a folder that holds a config with the teacher's real sizes, and nothing else."""

    def write(reference: str) -> Path:
        folder = tmp_path_factory.mktemp("config")
        (folder / "config.json").write_text(json.dumps(TEACHERS[reference][0]), encoding="utf-8")
        if "Instruct" in reference:
            (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
        return folder

    return write


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Reference -> a tiny model of the teacher's architecture with random weights and a tokenizer; made once each."""
    from distill.data.tokenizer import train_tokenizer
    from distill.models.load import new_config, new_model

    made: dict[str, Path] = {}

    def make(reference: str) -> Path:
        if reference not in made:
            folder = made[reference] = tmp_path_factory.mktemp("teacher")
            if TEACHERS[reference][0]["model_type"] == "bert":
                return _encoder(folder, reference)
            tokenizer = train_tokenizer(map(_text, range(120)), 300, folder)
            real, tiny = TEACHERS[reference]
            keys = {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "eos_token_id": tokenizer.eos_token_id}
            new_model(new_config(real | keys | tiny), seed=0).bfloat16().save_pretrained(folder)
            tokenizer.chat_template = TEMPLATE if "Instruct" in reference else None
            tokenizer.save_pretrained(folder)
        return made[reference]

    return make


def _encoder(folder: Path, reference: str) -> Path:
    """A tiny encoder whose tokens are words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from distill.models.head_names import named_head
    from distill.models.load import new_config, new_model

    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(tokens)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    real, tiny = TEACHERS[reference]
    keys = {key: value for key, value in real.items() if key != "architectures"}
    config = new_config(keys | {"vocab_size": len(tokens), "max_position_embeddings": 64} | tiny)
    head = named_head(real)
    assert head is not None
    new_model(config, seed=0, task=head).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, **named).save_pretrained(folder)
    return folder


@pytest.fixture
def shrink(
    tiny_teacher: Callable[[str], Path], texts: tuple[Path, Path], chats: tuple[Path, Path]
) -> Callable[[Path], list[str]]:
    """Recipe file -> the ``set`` that makes it run offline in seconds, and leaves its stages and their order alone."""

    def overrides(file: Path) -> list[str]:
        recipe = Recipe.load(file)
        kind, files, length = ("chat", chats, 64) if recipe.data.holds_conversations else ("jsonl", texts, 16)
        if any(stage.makes_data for stage in recipe.stages.values()):
            length = 512  # the questions on a document are longer than the files' rows
        train, validation = (f"{{kind: {kind}, path: {path}}}" for path in files)
        if isinstance(recipe.data.train, Csv):  # read as the recipe says, from a small file with its columns
            found = [f"data.train.path={_table(files[0], recipe.data.train.columns or ['text'])}"]
        elif isinstance(recipe.data.train, Mixture):
            kinds = {name: one.holds_conversations() for name, one in recipe.data.train.sources.items()}
            own = {name: ("chat", chats) if is_chat else ("jsonl", texts) for name, is_chat in kinds.items()}
            found = [f"data.train.sources.{n}={{kind: {kind}, path: {path}}}" for n, (kind, (path, _)) in own.items()]
            held_out = ", ".join(f"{n}: {{kind: {kind}, path: {path}}}" for n, (kind, (_, path)) in own.items())
            found.append(f"data.train.validation={{{held_out}}}")
        else:
            found = [f"data.train={train}"]
        found += [f"data.sequence_length={length}", "data.validation_tokens=200"]
        if not recipe.task.is_causal:  # random weights reach nothing
            found.append("require={}")
        found += ["data.calibration_sequences=8", "logging.wandb=disabled", "compute.micro_batch_size=1"]
        if recipe.data.validation is not None:
            found.append(f"data.validation={validation}")
        if not isinstance(recipe.data.tokenizer, str):
            found.append("data.tokenizer.vocab_size=300")
        real, tiny = TEACHERS.get(recipe.teacher or "", ({}, {}))
        if recipe.teacher is not None:
            found.append(f"teacher={tiny_teacher(recipe.teacher)}")
        for name, stage in recipe.stages.items():
            at = f"stages.{name}"
            own = getattr(stage, "data", None)
            # a mixture of rows that a stage makes takes the rest from the recipe
            if isinstance(own, DataSpec) and not isinstance(own.train, Mixture):
                found += [f"{at}.data.train={train}", f"{at}.data.sequence_length={length}"]
            if isinstance(stage, BudgetSpec) and stage.steps(recipe.data.sequence_length):
                found += [f"{at}.{budget}=null" for budget in ("num_tokens", "num_epochs")]
                found += [f"{at}.num_steps=2", f"{at}.batch_size=2"]
            if getattr(stage, "on_policy", None):
                found += [f"{at}.on_policy.max_new_tokens=8"]
                found += [f"{at}.on_policy.prompt_tokens=4"] * (kind == "jsonl")
            if getattr(stage, "lora", None):
                found += [f"{at}.lora.r=2", f"{at}.lora.alpha=2"]
            if getattr(stage, "search", None):
                steps = (
                    "multiple_of.hidden_size=8",
                    "num_measured=2",
                    "train={num_candidates: 2, num_steps: 2, batch_size: 2}",
                )
                found += [f"{at}.search.{change}" for change in (*steps, "num_sequences=4", "budget.tolerance=0.5")]
            elif stage.kind == "prune":
                found.append(f"{at}.keep={json.dumps(_scaled(stage.keep, real, real | tiny))}")
            if isinstance(getattr(stage, "model", None), Spec):
                sizes = SIZES | {"vocab_size": 300, "max_position_embeddings": 64}
                found += [f"{at}.model.config.{key}={size}" for key, size in sizes.items()]
            if stage.kind == "evaluate":
                # Speed takes a process a model, so it is measured where there are few.
                few = sum(stage.makes_model for stage in recipe.stages.values()) < 3 and stage.speed is not None
                speed = "{prompt_tokens: 4, new_tokens: 2, repeats: 1, rounds: 1}" if few else "null"
                found.append(f"{at}.speed={speed}")
            if stage.makes_data:  # a random model ends an answer by chance, and writes no question
                new = {"answers": "max_new_tokens=300", "qna": "max_new_tokens=8"}[stage.make.kind]
                found += [f"{at}.filters={{min_yield: 0, answer_words: [0, 400]}}", f"{at}.make.{new}"]
                few = {"answers": ["num_prompts=24", "num_samples=2"], "qna": ["answer_tokens=8", "rounds=1"]}
                found += [f"{at}.make.{one}" for one in few[stage.make.kind]]
            if stage.kind == "exam":
                found.append(f"{at}.max_new_tokens=4")
            if stage.kind == "report":
                found.append(f"{at}.new_tokens=4")
        return found

    return overrides


def _table(file: Path, columns: list[str]) -> Path:
    """The texts of a JSON Lines file as a CSV file without a header, one in each column."""
    with file.with_suffix(".csv").open("w", newline="", encoding="utf-8") as stream:
        for line in file.read_text(encoding="utf-8").splitlines():
            csv.writer(stream).writerow([json.loads(line)["text"]] * len(columns))
    return file.with_suffix(".csv")


def _scaled(keep: Any, real: dict[str, int], tiny: dict[str, int]) -> dict[str, Any]:
    """The same shares of the tiny model as the recipe keeps of the real one."""
    if keep.layers is not None:
        return {"layers": [0, tiny["num_hidden_layers"] - 1]}
    sizes = keep.model_dump(exclude_defaults=True)
    return {k: v * tiny[k] // real[k] if isinstance(v, int) else v for k, v in sizes.items()}
