"""Trainings that differ in all that a resume must get right.

A cell is one choice of what is trained, from which text, by how many processes, killed when; :func:`pairs` picks cells
so that any two choices meet in one of them. :mod:`~distill.testing.resumes` runs them.
"""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import yaml

from distill.testing.workers import Workers

STAGE = "train"
_LORA = {"r": 2, "dropout": 0.1}
_LEARN = {"student": "{student}", "teacher": "{teacher}", "losses": ["cross_entropy", "forward_kl"]}
_LEARNED = {"kind": "int_group", "bits": 3, "group_size": 8, "scale": "learned"}
_OWN = {"share": 0.5, "prompt_tokens": 4, "max_new_tokens": 8}
TRAINED: dict[str, dict[str, Any]] = {
    "text alone": {"kind": "finetune", "model": "{student}"},
    "distilled": {"kind": "distill"} | _LEARN,
    "LoRA": {"kind": "distill", "lora": _LORA} | _LEARN,
    "LoRA, its own teacher": {"kind": "distill", "lora": _LORA} | _LEARN | {"teacher": "self"},
    "QAT": {"kind": "quantize", "quantizer": {"kind": "int8_channel"}, "from_step": 2, "freeze_scales": 0.6} | _LEARN,
    "QAT, learned scales": {"kind": "quantize", "quantizer": _LEARNED} | _LEARN,
    "QAT, LoRA": {"kind": "quantize", "quantizer": _LEARNED | {"scale": "absmax"}, "lora": {"r": 2}} | _LEARN,
    "QAT, static inputs": {"kind": "quantize", "quantizer": {"kind": "int8_channel"}, "activations": "static_int8"}
    | _LEARN,
    "inner states": {"kind": "distill"} | _LEARN | {"losses": ["forward_kl", "hidden_mse"]},
    "own sequences": {"kind": "distill", "on_policy": _OWN} | _LEARN | {"losses": ["forward_kl"]},
    "cached teacher": {"kind": "distill"} | _LEARN | {"teacher": "cache"},
}
DATA = ("wrapped", "documents", "best_fit", "padded", "stream")
WORLDS = ("1 process", "2, ddp", "2, fsdp")
KILLED = ("mid-epoch", "epoch's edge", "five times")
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
        return (self.trained, self.world) != ("own sequences", "2, fsdp") and (self.trained, self.data) != (
            "cached teacher",
            "stream",
        )

    def steps(self) -> list[int]:
        """After which steps the run is killed, each right after their checkpoint."""
        edge = 2 * EDGE if self.data == "padded" else EDGE
        return {"mid-epoch": [edge + 1], "epoch's edge": [edge], "five times": [1, 2, 3, 4, 5]}[self.killed]

    def recipe(self, text: Text) -> str:
        """As YAML."""
        stage = yaml.safe_load(
            yaml.safe_dump(TRAINED[self.trained])
            .replace("{student}", str(text.model("small" if self.dropout else "dry")))
            .replace("{teacher}", str(text.model("large")))
        )
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


@dataclass(frozen=True)
class Text:
    """What cells train on: 24 documents of 8 tokens, which are a whole number of batches however they are packed.

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
        return {
            "train": train,
            "validation": {"kind": "jsonl", "path": str(self.folder / "validation.jsonl")},
            "sequence_length": 16,
            "validation_tokens": 64,
            "packing": "wrapped" if packing == "stream" else packing,
            "calibration_sequences": 4,
            "tokenizer": str(self.model("small")) if self.model("small").exists() else {"vocab_size": 258},
        }

    def make(self, workers: Workers) -> Text:
        """Write the text, and train each model for a step."""
        (self.folder / "train").mkdir(parents=True)
        for name, start, count in (("train/train", 10, 24), ("validation", 60, 8)):
            rows = [json.dumps({"text": f"{i}: {i * i:03d}"[:7].ljust(7, "x")}) for i in range(start, start + count)]
            (self.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
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
