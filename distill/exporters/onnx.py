"""An ONNX graph for ONNX Runtime, with int8 (default) or float32 weights, and the tokenizer.

    int8:  w_oi ~ scale_o * code_oi, code in int8;  activations in uint8, with a scale computed at run time

Embeddings and output head are int8 as well, with activations in float32: the trained codes, or rounded per row.

Use it for services and languages without Python, and for encoders such as BERT, with a masked-language-modelling or
classification head. By default the graph maps whole texts (``input_ids`` and ``attention_mask``, and ``token_type_ids``
for encoders of text pairs) to ``logits`` without a KV cache, which suits scoring and classification. With
``keys_and_values: cached`` the graph of a decoder has the KV cache as input and output, which suits generation; on a
CPU :mod:`gguf <distill.exporters.gguf>` generates faster. ONNX Runtime's dynamic quantization rounds weights and
activations after training, so it costs more quality than int8 weights alone.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill.exporters.base import (
    CardFacts,
    ExporterSpec,
    VerifyResult,
    new_folder,
    require_close,
    require_engine,
    require_writers,
)
from distill.exporters.deliver import files_to_copy
from distill.exporters.onnx_names import DATA, FILE, inputs_of
from distill.models.head_names import HUB_TASKS
from distill.models.load import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

OPEN = f"""```python
import numpy
import onnxruntime
from transformers import AutoTokenizer  # for the tokenizer alone

tokenizer = AutoTokenizer.from_pretrained(".")
session = onnxruntime.InferenceSession("{FILE}")
text = tokenizer(["Once upon a time"], return_tensors="np")
"""
WRITE = """ids, mask = text["input_ids"], text["attention_mask"]
past = [asked for asked in session.get_inputs() if asked.name.startswith("past_key_values")]
state = {asked.name: numpy.zeros((len(ids), asked.shape[1], 0, asked.shape[3]), "float32") for asked in past}
for _ in range(32):  # tokens, each the likeliest
    logits, *present = session.run(None, {"input_ids": ids, "attention_mask": mask, **state})
    state = dict(zip(state, present))
    ids = logits[:, -1:].argmax(-1)
    mask = numpy.concatenate([mask, numpy.ones_like(ids)], 1)
    print(tokenizer.decode(ids[0]), end="")
```"""


class Onnx(ExporterSpec):
    """An ONNX graph, run by ONNX Runtime."""

    engine: ClassVar[str] = "ONNX Runtime"
    engine_module: ClassVar[str | None] = "onnxruntime"
    extra: ClassVar[str | None] = "onnx"
    tasks: ClassVar[tuple[Task, ...]] = ("causal_lm", "masked_lm", "classification")
    runs_in: ClassVar[str] = "distill.exporters.onnx_engine"

    kind: Literal["onnx"] = "onnx"
    weights: Literal["int8", "float32"] = "int8"
    """int8: ONNX Runtime's dynamic quantization rounds weights and activations; float32: no rounding."""
    embeddings: Literal["int8", "float32"] | None = None
    """int8: the trained codes of embeddings and output head, or rounded with one scale per row if they have no codes;
    float32: no rounding; null: as weights. Tied embeddings are stored once, or twice in float32."""
    keys_and_values: Literal["recomputed", "cached"] = "recomputed"
    """recomputed: the graph reads whole texts, for scoring and classification; cached: the KV cache
    (``past_key_values.N.key`` and ``.value``) is an input and output, for generation token by token (decoders only)."""
    max_kl: float = Field(0.2, ge=0)
    """Bound on the KL divergence of any token between the trained model and the graph in ONNX Runtime, in nats. 8-bit
    activations cost a few hundredths at the worst token of a small model, float32 less than 1e-6. 0 requires equal
    probabilities."""

    def bytes_per_weight(self) -> float:
        """That of the weights' type."""
        return 4.0 if self.weights == "float32" else 1.0

    def writers(self) -> tuple[str, ...]:
        return ("onnx", "onnxscript", *(["onnxruntime"] if self.weights == "int8" else []))

    def check_files(self, folder: Path) -> None:
        files_to_copy(folder)

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        require_writers(self)
        from distill.exporters.onnx_file import write

        new_folder(source_folder, folder)
        return write(
            source_folder,
            folder,
            rounds=self.weights == "int8",
            rounds_ends=(self.embeddings or self.weights) == "int8",
            caches=self.keys_and_values == "cached",
            tasks=self.tasks,
        )

    def verify(
        self,
        source_model: PreTrainedModel,
        folder: Path,
        batches: Iterable[Mapping[str, Tensor]],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> VerifyResult:
        require_engine(self)
        from distill.exporters.compare_logits import compare, plain_logits
        from distill.exporters.onnx_runtime import OnnxRuntime, encoder_logits, padded
        from distill.models.load import task_of

        num_bytes = self.num_bytes(folder)
        engine = OnnxRuntime(folder / FILE)
        if task_of(source_model.config) == "causal_lm":
            with plain_logits(source_model) as source:
                whole = ({name: batch[name] for name in ("input_ids", "mask")} for batch in batches)
                result = compare(source, engine.logits, whole, folder, num_bytes)
        else:
            cut = (padded(batch, source_model) for batch in batches)
            result = compare(partial(encoder_logits, source_model), engine.logits, cut, folder, num_bytes)
        return require_close(result, self.max_kl, folder)

    def label(self, folder: Path) -> str:
        return f"ONNX {self.weights}"

    def num_bytes(self, folder: Path) -> int:
        return sum(file.stat().st_size for file in (folder / FILE, folder / DATA) if file.is_file())

    def card(self, folder: Path) -> CardFacts:
        from distill.models.load import load_config, task_of

        config = load_config(str(folder))
        task = task_of(config)
        return CardFacts(
            library="onnxruntime",
            tags=("onnx",),
            quantized=self.weights == "int8",
            how_to_load=OPEN + (WRITE if self.keys_and_values == "cached" else _read(inputs_of(config), task)),
            task=HUB_TASKS[task],
        )


def _read(inputs: Sequence[str], task: Task) -> str:
    """Example code for a graph without a KV cache."""
    names = ", ".join(f'"{name}"' for name in inputs)
    shape = "[batch, classes]" if task == "classification" else "[batch, sequence, vocabulary]"
    return (
        f"inputs = {{name: text[name] for name in ({names})}}\n"
        f'(logits,) = session.run(["logits"], inputs)  # {shape}\n```'
    )
