"""An ONNX graph for ONNX Runtime, with int8 weights unless float32 is asked for, and its tokenizer.

    int8:  w_oi ~ scale_o * code_oi, code in int8;  activations in uint8, with a scale that each call finds anew

The deliverable of choice for services and languages without Python, and the one for encoders: BERT and its like, with a
head for masked words or for classes. The graph reads whole texts (``input_ids`` and ``attention_mask``, and
``token_type_ids`` where an encoder reads pairs) to ``logits``, without a cache of keys and values: right for scoring
and classification. With ``keys_and_values: cached`` a decoder takes them in and gives them back, and so writes long
answers; on a CPU :mod:`gguf <distill.exporters.gguf>` writes them faster. ONNX Runtime's dynamic quantization rounds
after training, activations too, and costs more than 8 bits of weights alone would.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from distill.exporters.base import (
    CardFacts,
    ExporterSpec,
    VerifyResult,
    cache_notes,
    new_folder,
    require_close,
    require_engine,
    require_writers,
)
from distill.exporters.onnx_graph import (
    DATA,
    FILE,
    inputs_of,
    num_layers,
    quantize_graph,
    quiet,
    write_decoder,
    write_graph,
)
from distill.models.load import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DELIVERED = {".json", ".jinja", ".txt", ".model"}
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
HUB_TASKS = {"causal_lm": "text-generation", "masked_lm": "fill-mask", "classification": "text-classification"}


class Onnx(ExporterSpec):
    """An ONNX graph, run by ONNX Runtime."""

    engine: ClassVar[str] = "ONNX Runtime"
    engine_module: ClassVar[str | None] = "onnxruntime"
    extra: ClassVar[str | None] = "onnx"
    tasks: ClassVar[tuple[Task, ...]] = ("causal_lm", "masked_lm", "classification")

    kind: Literal["onnx"] = "onnx"
    weights: Literal["int8", "float32"] = "int8"
    """int8: weights and activations are rounded by ONNX Runtime's dynamic quantization; float32: nothing is."""
    keys_and_values: Literal["recomputed", "cached"] = "recomputed"
    """recomputed: the graph reads whole texts, for scoring and classification; cached: it also takes and gives back
    ``past_key_values.N.key`` and ``.value``, so that a text is written a token at a time (decoders only)."""
    max_kl: float = Field(0.2, ge=0)
    """Largest KL, in nats, of any token between the trained model and the graph in ONNX Runtime; activations in 8 bits
    cost some hundredths at the worst token of a small model, float32 less than 1e-6; 0 demands equal probabilities."""

    def writers(self) -> tuple[str, ...]:
        return ("onnx", "onnxscript", *(["onnxruntime"] if self.weights == "int8" else []))

    def export(self, source_folder: Path, folder: Path, *, title: str) -> list[str]:
        require_writers(self)
        from distill.exporters.stored import bits_of
        from distill.models.load import load_model

        new_folder(source_folder, folder)
        low_bit = len(bits_of(source_folder))
        model = load_model(str(source_folder), dtype="float32", tasks=self.tasks)
        with quiet(), TemporaryDirectory(dir=folder) as temporary:
            plain = folder if self.weights == "float32" else Path(temporary)
            if self.keys_and_values == "cached":
                write_decoder(model, plain / FILE)
            else:
                write_graph(model, plain / FILE)
            if self.weights == "int8":
                quantize_graph(plain / FILE, folder / FILE, num_layers(model))
        _copy_the_rest(source_folder, folder)
        cache = cache_notes(source_folder, "which this graph does not have: it rounds neither")
        if self.weights == "float32":
            codes = f"; {low_bit} layers hold the values of their codes" * bool(low_bit)
            return [f"all weights in float32{codes}", *cache]
        again = f"; {low_bit} layers were low-bit before, and are rounded a second time" if low_bit else ""
        return [
            f"linear layers: int8 a channel, activations uint8, rounded by ONNX Runtime after training{again}; "
            "embeddings and head: float32",
            *cache,
        ]

    def verify(
        self,
        source_model: PreTrainedModel,
        folder: Path,
        batches: Iterable[Mapping[str, Tensor]],
        tokenizer: PreTrainedTokenizerFast | None = None,
    ) -> VerifyResult:
        require_engine(self)
        from distill.exporters.compare import compare, plain_logits
        from distill.exporters.onnx_runtime import OnnxRuntime, encoder_logits, padded
        from distill.models.load import task_of

        num_bytes = sum(file.stat().st_size for file in (folder / FILE, folder / DATA) if file.is_file())
        engine = OnnxRuntime(folder / FILE)
        if task_of(source_model.config) == "causal_lm":
            with plain_logits(source_model) as source:
                whole = ({name: batch[name] for name in ("input_ids", "mask")} for batch in batches)
                result = compare(source, engine.logits, whole, folder, num_bytes)
        else:
            cut = (padded(batch, source_model) for batch in batches)
            result = compare(partial(encoder_logits, source_model), engine.logits, cut, folder, num_bytes)
        return require_close(result, self.max_kl, folder)

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
    """Code for a graph of whole texts."""
    names = ", ".join(f'"{name}"' for name in inputs)
    shape = "[batch, classes]" if task == "classification" else "[batch, sequence, vocabulary]"
    return (
        f"inputs = {{name: text[name] for name in ({names})}}\n"
        f'(logits,) = session.run(["logits"], inputs)  # {shape}\n```'
    )


def _copy_the_rest(source_folder: Path, folder: Path) -> None:
    """Tokenizer and config; the config's words on low-bit weights are those of other files."""
    for file in sorted(source_folder.iterdir()):
        if file.is_file() and file.suffix in DELIVERED and not file.name.startswith(("distill", "model.", ".")):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
