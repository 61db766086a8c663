"""Tiny recipes that together cover all code whose arithmetic must not change: training, pruning, quantization, caches.

The first recipe makes the models of all others. The text consists of random words, with different words for validation.
No two documents are similar, so that deduplication does not change what a recipe reads.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

MODELS = "finetune"
"""The recipe that makes the models of the others."""
_SHAPE = {
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
_NEW: dict[str, dict[str, Any]] = {
    "large": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4},
    "small": {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "attention_dropout": 0.1,
        "tie_word_embeddings": True,
    },
    "padded": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 320},
}
"""Models that are trained from random weights for three steps; the head of ``padded`` is wider than the vocabulary."""
_FEW = {"num_steps": 4, "batch_size": 4, "validate_every_steps": 2, "optimizer": {"lr": 3e-3}}
_SMALL = {"kind": "distill", "student": "{small}", "teacher": "{large}"} | _FEW
_INT4 = {"kind": "int_group", "bits": 4, "group_size": 8}
_KEEP = {"embeddings": "keep"}  # as they were when the figures were recorded
_QAT = {"kind": "quantize", "student": "{large}", "teacher": "{large}"} | _FEW
_EVALUATE = {"kind": "evaluate", "teacher": "{large}", "speed": None}
_LATER = {"kind": "linear", "start": 4.0, "end": 1.0, "share": 0.5}


def _packed(packing: str) -> dict[str, Any]:
    """A training with four micro-batches per step, with this packing."""
    stages = {"distill": _SMALL | {"losses": ["forward_kl", "cross_entropy"], "num_steps": 6}}
    return {"data": {"packing": packing}, "stages": stages, "compute": {"micro_batch_size": 1}}


RECIPES: dict[str, dict[str, Any]] = {
    MODELS: {
        "data": {"tokenizer": {"vocab_size": 300}},
        "stages": {
            name: {"kind": "finetune", "model": {"config": _SHAPE | config}} | _FEW | {"num_steps": 3}
            for name, config in _NEW.items()
        },
    },
    "forward-kl": {
        "stages": {
            "tied": _SMALL,
            "padded": _SMALL | {"student": "{padded}"},
            "warm": _SMALL | {"losses": [{"kind": "forward_kl", "temperature": 2.0, "weight": 0.5}]},
            "evaluate": _EVALUATE,
        }
    },
    "mixed-losses": {
        "stages": {
            "scheduled": _SMALL
            | {
                "losses": [
                    {"kind": "reverse_kl", "temperature": _LATER},
                    {"kind": "skewed_forward_kl", "weight": 0.5},
                    {"kind": "jensen_shannon", "beta": {"kind": "cosine", "start": 0.2, "end": 0.8}},
                    {"kind": "cross_entropy", "weight": _LATER | {"start": 0.0}},
                ]
            },
            "others": _SMALL
            | {
                "student": "{padded}",
                "losses": [
                    {"kind": "skewed_reverse_kl", "temperature": 2.0},
                    "adaptive_kl",
                    "total_variation",
                    {"kind": "standardized_kl", "temperature": 0.5},
                    {"kind": "decoupled_kd", "beta": 2.0},
                    "forward_kl",
                ],
            },
            "alone": _SMALL | {"losses": ["standardized_kl"], "num_steps": 2},
        }
    },
    "inner-states": {
        "stages": {
            "narrower": _SMALL | {"losses": ["forward_kl", "hidden_mse", "attention_relation"]},
            "cosine": _SMALL | {"losses": ["forward_kl", {"kind": "hidden_cosine", "layers": [[0, 1], [1, 3]]}]},
        },
        "data": {"packing": "documents"},
    },
    "own-teacher": {
        "stages": {
            "lora": _SMALL
            | {
                "student": "{large}",
                "teacher": "self",
                "lora": {"r": 2, "dropout": 0.1},
                "losses": ["cross_entropy", "forward_kl"],
            }
        }
    },
    "cached-teacher": {
        "stages": {
            stage: settings
            for codec in ({"kind": "top_k", "k": 8}, {"kind": "sampled", "draws": 20}, {"kind": "hidden"})
            for stage, settings in (
                (f"cache_{codec['kind']}", {"kind": "cache_teacher", "teacher": "{large}", "codec": codec}),
                (
                    f"from_{codec['kind']}",
                    _SMALL
                    | {"teacher": f"cache_{codec['kind']}", "losses": ["forward_kl", "cross_entropy"]}
                    | ({"student": "{padded}"} if codec["kind"] == "top_k" else {}),
                ),
            )
        }
    },
    "on-policy": {
        "stages": {
            "distill": _SMALL
            | {
                "losses": ["reverse_kl", "cross_entropy"],
                "on_policy": {"share": 0.6, "prompt_tokens": 4, "max_new_tokens": 8},
            }
        }
    },
    "prune": {
        "stages": {
            "width": {
                "kind": "prune",
                "model": "{large}",
                "keep": {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2},
                "reconstruct": {"num_sequences": 8},
            },
            "depth": {
                "kind": "prune",
                "model": "width",
                "keep": {"num_hidden_layers": 2},
                "depth_criterion": {"kind": "leave_one_out", "loss": "kl"},
            },
            "taylor": {
                "kind": "prune",
                "model": "{large}",
                "keep": {"intermediate_size": 40},
                "criterion": "taylor",
            },
            "distill": _SMALL | {"student": "depth", "losses": ["forward_kl", "hidden_mse"]},
            "evaluate": _EVALUATE | {"models": ["width", "distill"]},
        }
    },
    "quantize": {
        "stages": {
            "trained": _QAT | _KEEP | {"quantizer": _INT4 | {"scale": "learned"}, "losses": ["forward_kl"]},
            "gptq": _KEEP
            | {"kind": "quantize", "student": "{large}", "num_tokens": 0, "quantizer": _INT4, "rounding": "gptq"},
            "scanned": _KEEP
            | {
                "kind": "quantize",
                "student": "{large}",
                "num_tokens": 0,
                "quantizer": _INT4,
                "mixed": {"bits": 6, "also": ["int8_channel"]},
            },
            "export": {"model": "trained", "verify_sequences": 4},
            "evaluate": _EVALUATE | {"models": ["trained", "gptq"]},
        },
    },
    "bf16": {
        "stages": {"distill": _SMALL, "skewed": _SMALL | {"losses": ["skewed_reverse_kl", "cross_entropy"]}},
        "compute": {"precision": "bf16-mixed", "teacher_precision": "bfloat16"},
    },
    "documents": _packed("documents"),
    "best-fit": _packed("best_fit"),
    "padded": _packed("padded"),
}
"""Name -> settings of a recipe in addition to the common data and machine; models of :data:`MODELS` are in braces."""


def write_text_files(folder: Path) -> None:
    """Write documents of 4 to 40 words, for training and for validation."""
    for name, letters, count in (("train", "aeiourstn", 60), ("validation", "bcdfghklmpwyz", 12)):
        drawn = random.Random(name)
        words = ["".join(letters[int(drawn.random() * len(letters))] for _ in range(2 + i % 5)) for i in range(200)]
        rows = [" ".join(words[int(drawn.random() * 200)] for _ in range(4 + i * 7 % 37)) for i in range(count)]
        text = "".join(json.dumps({"text": row}) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def as_yaml(name: str, texts: Path, models: Path) -> str:
    """A recipe of :data:`RECIPES`.

    Args:
        name: name of the recipe.
        texts: folder of :func:`write_text_files`.
        models: run folder of the recipe :data:`MODELS`.
    """
    recipe = RECIPES[name]
    data = {
        "train": {"kind": "jsonl", "path": str(texts / "train.jsonl")},
        "validation": {"kind": "jsonl", "path": str(texts / "validation.jsonl")},
        "sequence_length": 24,
        "validation_tokens": 150,
        "calibration_sequences": 8,
        "tokenizer": "{large}",
    }
    compute = {"accelerator": "cpu", "micro_batch_size": 2, "log_every_steps": 1, "checkpoint_every_steps": 100}
    whole = {
        "name": name,
        "data": data | recipe.get("data", {}),
        "stages": recipe["stages"],
        "compute": compute | recipe.get("compute", {}),
        "logging": {"wandb": "disabled"},
    }
    text = yaml.safe_dump(whole, sort_keys=False)
    for model in _NEW:
        text = text.replace(f"{{{model}}}", str(models / model / "model"))
    return text
