"""Trainings that differ in all that a resume must get right.

A cell is one choice of what is trained, from which text, by how many processes, killed when; :func:`pairs` picks cells
so that any two choices meet in one of them. :mod:`~tests.faults.resumes` runs them.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import yaml

from tests.faults.workers import Workers

STAGE = "train"
_LORA = {"r": 2, "dropout": 0.1}
_LEARN = {"student": "{student}", "teacher": "{teacher}", "losses": ["cross_entropy", "forward_kl"]}
_LEARNED = {"kind": "int_group", "bits": 3, "group_size": 8, "scale": "learned"}
_OWN = {"share": 0.5, "prompt_tokens": 4, "max_new_tokens": 8}
TRAINED: dict[str, dict[str, Any]] = {
    "text only": {"kind": "finetune", "model": "{student}"},
    "distilled": {"kind": "distill"} | _LEARN,
    "LoRA": {"kind": "distill", "lora": _LORA} | _LEARN,
    "LoRA, its own teacher": {"kind": "distill", "lora": _LORA} | _LEARN | {"teacher": "self"},
    "QAT": {"kind": "quantize", "quantizer": {"kind": "int8_channel"}, "from_step": 2, "freeze_scales": 0.6} | _LEARN,
    "QAT, learned scales": {"kind": "quantize", "quantizer": _LEARNED} | _LEARN,
    "QAT, LoRA": {"kind": "quantize", "quantizer": _LEARNED | {"scale": "absmax"}, "lora": {"r": 2}} | _LEARN,
    "QAT, static inputs": {"kind": "quantize", "quantizer": {"kind": "int8_channel"}, "activations": "static_int8"}
    | _LEARN,
    "hidden-state losses": {"kind": "distill"} | _LEARN | {"losses": ["forward_kl", "hidden_mse"]},
    "on-policy samples": {"kind": "distill", "on_policy": _OWN} | _LEARN | {"losses": ["forward_kl"]},
    "cached teacher": {"kind": "distill"} | _LEARN | {"teacher": "cache"},
}
_TEMPLATE = "{% for m in messages %}{{ m.content }}{{ eos_token if m.role == 'assistant' }}{% endfor %}"
"""Of a conversation of 8 tokens."""
DATA = (
    *("wrapped", "documents", "best_fit", "padded", "stream", "chat", "mixture"),
    *("by length", "by loss", "augmented"),
)
REFUSED = {
    *[("on-policy samples", "2, fsdp"), ("cached teacher", "stream"), ("on-policy samples", "mixture")],
    ("text only", "by loss"),  # which has no teacher
}
"""Choices that distill refuses together."""
WORLDS = ("1 process", "2, ddp", "2, fsdp")
KILLED = ("mid-epoch", "end of epoch", "five times")
BATCH, STEPS, EDGE = 4, 8, 3
"""Sequences in a step, steps, and the step that ends a pass over the text (but for rows that are filled up)."""


@dataclass(frozen=True)
class Cell:
    """One training and how it is killed; see the tuples of this module.

    Attributes:
        trained: key of :data:`TRAINED`.
        data: one of :data:`DATA`.
        world: one of :data:`WORLDS`.
        killed: one of :data:`KILLED`.
        micro_batches: to a step.
        num_workers: that read ahead.
        compile: whether models are compiled.
        dropout: whether the student has it.
    """

    trained: str = "distilled"
    data: str = "wrapped"
    world: str = "1 process"
    killed: str = "mid-epoch"
    micro_batches: int = 2
    num_workers: int = 0
    compile: bool = False
    dropout: bool = True

    @property
    def size(self) -> int:
        """Processes."""
        return int(self.world[0])

    def is_possible(self) -> bool:
        """Whether distill does this at all."""
        return not {(self.trained, self.world), (self.trained, self.data)} & REFUSED

    def steps(self) -> list[int]:
        """After which steps the run is killed, each right after their checkpoint."""
        edge = 2 * EDGE if self.data == "padded" else EDGE
        return {"mid-epoch": [edge + 1], "end of epoch": [edge], "five times": [1, 2, 3, 4, 5]}[self.killed]

    def recipe(self, text: Text) -> str:
        """As YAML."""
        stage = yaml.safe_load(
            yaml.safe_dump(TRAINED[self.trained])
            .replace("{student}", str(text.model("small" if self.dropout else "dry")))
            .replace("{teacher}", str(text.model("large")))
        )
        if self.data == "chat" and "on_policy" in stage:
            del stage["on_policy"]["prompt_tokens"]  # a prompt is all that stands before a turn
        stages = {STAGE: stage | {"num_steps": STEPS, "batch_size": BATCH, "validate_every_steps": EDGE}}
        if self.trained == "cached teacher":
            cache = {"kind": "cache_teacher", "teacher": str(text.model("large"))}
            stages = {"cache": cache} | stages
        recipe = {
            "name": "cell",
            "data": text.data(self.data),
            "stages": stages,
            "compute": {
                "accelerator": "cpu",
                "devices": self.size,
                "strategy": "fsdp" if "fsdp" in self.world else "auto",
                "micro_batch_size": BATCH // self.size // self.micro_batches,
                "num_workers": self.num_workers,
                "compile": self.compile,
                "checkpoint_every_steps": 1,
                "log_every_steps": 2,
                "silence_s": 30,
            },
            "logging": {"wandb": "disabled"},
        }
        return yaml.safe_dump(recipe, sort_keys=False)


def _mixture(folder: Path, validation: dict[str, Any]) -> dict[str, Any]:
    """Two sources of which a pass over each ends at the same step as one over the other texts does."""
    return {
        "kind": "mixture",
        "sources": {
            "texts": {"kind": "jsonl", "path": str(folder / "texts.jsonl")},
            "chats": {"kind": "chat", "path": str(folder / "chats.jsonl")},
        },
        "weights": {"texts": 1, "chats": 1},
        "validation": {"texts": validation, "chats": validation},
    }


def pairs() -> list[Cell]:
    """Possible cells, not compiled, so that any two choices that can meet do meet in one of them."""
    every = [
        cell
        for choice in product(TRAINED, DATA, WORLDS, KILLED, (1, 2), (0, 2))
        if (cell := Cell(*choice)).is_possible()
    ]
    met = {cell: set(combinations(enumerate(astuple(cell)), 2)) for cell in every}
    missing, chosen = set().union(*met.values()), []
    while missing:
        chosen.append(max(every, key=lambda cell: len(met[cell] & missing)))
        missing -= met[chosen[-1]]
    return chosen


LENGTHS = [5, 11, 6, 10, 7, 9, 8, 8] * 3
"""Tokens of documents that fill rows of 16, two in each."""
WORDS = [a + b + c for a in "bdf" for b in "aeiou" for c in "nt"]
"""Of three letters, so that a copy of a document has as many tokens as the document."""


def make_words(folder: Path) -> None:
    """A model whose tokenizer has each of :data:`WORDS` as a token, for ``data.augment``."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["[UNK]", "a", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


@dataclass(frozen=True)
class Text:
    """What cells train on: 24 documents or conversations of 8 tokens, a whole number of batches in every packing.

    Attributes:
        folder: of two sets of text, and of the models that are made once.
    """

    folder: Path

    def model(self, name: str) -> Path:
        """The student, ``small`` with dropout or ``dry`` without, or the ``large`` teacher."""
        return self.folder / "models" / name / "model"

    def data(self, packing: str) -> dict[str, Any]:
        """The ``data`` section of a recipe."""
        train: dict[str, Any] = {"kind": "jsonl", "path": str(self.folder / "train" / "train.jsonl")}
        if packing == "stream":
            train = {"kind": "hub", "path": str(self.folder / "train"), "streaming": True}
        more: dict[str, Any] = {"packing": "wrapped" if packing == "stream" else packing}
        if packing == "chat":
            train = {"kind": "chat", "path": str(self.folder / "chat.jsonl")}
            more = {"packing": "best_fit", "chat": {"template": _TEMPLATE}}
        if packing == "by length":
            train |= {"path": str(self.folder / "lengths.jsonl")}
            more = {"packing": "best_fit", "order": {"by": "length", "until": 0.75}}
        if packing == "by loss":
            more = {"packing": "wrapped", "order": {"by": "teacher_loss", "until": 0.75}}
        if packing == "augmented":
            train |= {"path": str(self.folder / "words.jsonl")}
            words = {"model": str(self.folder / "words"), "probability": 1, "num_candidates": 5}
            more = {"packing": "wrapped", "augment": {"replace_words": words}}
        validation = {"kind": "jsonl", "path": str(self.folder / "validation.jsonl")}
        if packing == "mixture":
            train, more = _mixture(self.folder, validation), {"packing": "best_fit", "chat": {"template": _TEMPLATE}}
        return {
            "train": train,
            "validation": None if packing == "mixture" else validation,
            "sequence_length": 16,
            "validation_tokens": 64,
            "calibration_sequences": 4,
            "tokenizer": str(self.model("small")) if self.model("small").exists() else {"vocab_size": 258},
        } | more

    def _write(self, name: str, texts: list[str]) -> None:
        rows = [json.dumps({"text": text}) + "\n" for text in texts]
        (self.folder / f"{name}.jsonl").write_text("".join(rows))

    def make(self, workers: Workers) -> Text:
        """Write the text, and train each model for a step."""
        (self.folder / "train").mkdir(parents=True)
        for name, start, count in (("train/train", 10, 24), ("validation", 60, 8)):
            rows = [json.dumps({"text": f"{i}: {i * i:03d}"[:7].ljust(7, "x")}) for i in range(start, start + count)]
            (self.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
            if name == "train/train":
                (self.folder / "texts.jsonl").write_text("\n".join(rows[:12]) + "\n")
        self._write("lengths", [f"{i}: ".ljust(size - 1, "x") for i, size in enumerate(LENGTHS, 10)])
        self._write("words", [f"{WORDS[i]} {WORDS[-1 - i]}" for i in range(12)])
        make_words(self.folder / "words")
        chats = [json.dumps({"prompt": f"{i}?", "response": f"={i * i % 1000:03d}"}) for i in range(10, 34)]
        (self.folder / "chat.jsonl").write_text("\n".join(chats) + "\n")
        (self.folder / "chats.jsonl").write_text("\n".join(chats[:12]) + "\n")
        shape: dict[str, Any] = {
            "model_type": "llama",
            "intermediate_size": 24,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        }
        models: dict[str, dict[str, Any]] = {
            "large": {"hidden_size": 24, "num_hidden_layers": 2},
            "small": {"hidden_size": 16, "num_hidden_layers": 2, "attention_dropout": 0.2},
            "dry": {"hidden_size": 16, "num_hidden_layers": 2},
        }
        recipe = {
            "name": "models",
            "data": self.data("wrapped"),
            "stages": {
                name: {
                    "kind": "finetune",
                    "model": {"config": shape | {"max_position_embeddings": 32, "initializer_range": 0.2} | config},
                    "num_steps": 1,
                    "batch_size": BATCH,
                }
                for name, config in models.items()
            },
            "compute": {"accelerator": "cpu"},
            "logging": {"wandb": "disabled"},
        }
        file = self.folder / "models.yaml"
        file.write_text(yaml.safe_dump(recipe))
        world = workers.start(
            ["run", str(file), "--run-dir", str(self.folder / "models")], log=self.folder / "models.log"
        )
        if any(world.wait(120)):
            raise RuntimeError(world.said())
        return self
