"""An ONNX graph for ONNX Runtime, with int8 weights unless float32 is asked for, and its tokenizer.

    int8:  w_oi ~ scale_o * code_oi, code in int8;  activations in uint8, with a scale that each call finds anew

The deliverable of choice for services and languages without Python, and the one for encoders: BERT and its like, with a
head for masked words or for classes. The graph reads whole texts (``input_ids`` and ``attention_mask``, and
``token_type_ids`` where an encoder reads pairs) to ``logits``, without a cache of keys and values: right for scoring
and classification, slow for long answers, for which :mod:`gguf <distill.exporters.gguf>` is made. ONNX Runtime's
dynamic quantization rounds after training, activations too, and costs more than 8 bits of weights alone would.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill.core.errors import DistillError
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
from distill.exporters.onnx_graph import DATA, FILE, inputs_of, num_layers, quantize_graph, quiet, write_graph
from distill.models.load import Task

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

DELIVERED = {".json", ".jinja", ".txt", ".model"}
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
        from distill.models.load import task_of

        num_bytes = sum(file.stat().st_size for file in (folder / FILE, folder / DATA) if file.is_file())
        logits = _engine(folder / FILE)
        if task_of(source_model.config) == "causal_lm":
            with plain_logits(source_model) as source:
                result = compare(
                    source, lambda batch: logits({"input_ids": batch["input_ids"]}), batches, folder, num_bytes
                )
        else:
            padded = [_padded(batch, source_model) for batch in batches]
            result = compare(partial(_logits, source_model), logits, padded, folder, num_bytes)
        return require_close(result, self.max_kl, folder)

    def card(self, folder: Path) -> CardFacts:
        from distill.models.load import load_config, task_of

        config = load_config(str(folder))
        task = task_of(config)
        names = ", ".join(f'"{name}"' for name in inputs_of(config))
        shape = "[batch, classes]" if task == "classification" else "[batch, sequence, vocabulary]"
        return CardFacts(
            library="onnxruntime",
            tags=("onnx",),
            quantized=self.weights == "int8",
            how_to_load=(
                "```python\nimport onnxruntime\nfrom transformers import AutoTokenizer  # for the tokenizer alone\n\n"
                'tokenizer = AutoTokenizer.from_pretrained(".")\n'
                f'session = onnxruntime.InferenceSession("{FILE}")\n'
                'text = tokenizer(["Once upon a time"], return_tensors="np")\n'
                f"inputs = {{name: text[name] for name in ({names})}}\n"
                f'(logits,) = session.run(["logits"], inputs)  # {shape}\n```'
            ),
            task=HUB_TASKS[task],
        )


def _copy_the_rest(source_folder: Path, folder: Path) -> None:
    """Tokenizer and config; the config's words on low-bit weights are those of other files."""
    for file in sorted(source_folder.iterdir()):
        if file.is_file() and file.suffix in DELIVERED and not file.name.startswith(("distill", "model.", ".")):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _engine(file: Path) -> Any:
    """Batch -> logits, computed by ONNX Runtime on the CPU.

    Raises:
        DistillError: it does not load the graph.
    """
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no base of their own
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise DistillError(f"{file}: ONNX Runtime does not load it ({first.strip()})") from error

    def logits(batch: Mapping[str, Tensor]) -> Tensor:
        every = {"attention_mask": torch.ones_like(batch["input_ids"]), **batch}
        inputs = {wanted.name: every[wanted.name].cpu().numpy() for wanted in session.get_inputs()}
        return _by_position(torch.from_numpy(session.run(["logits"], inputs)[0]))

    return logits


def _padded(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """A batch whose last text ends half way, and is a second text from its third token on where there are such; an
    encoder reads all of a text at once, so what is not attended to shows everywhere."""
    import torch

    from distill.models.load import task_of

    ids = batch["input_ids"].to(model.device)
    attended, second = torch.ones_like(ids), torch.zeros_like(ids)
    attended[-1, (ids.shape[-1] + 1) // 2 :] = 0
    second[-1, 2:] = 1
    every = {"input_ids": ids, "attention_mask": attended, "token_type_ids": second}
    mask = attended.bool() & batch["mask"].to(model.device)
    named = {name: every[name] for name in inputs_of(model.config)}
    return named | {"mask": mask.any(-1, keepdim=True) if task_of(model.config) == "classification" else mask}


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    return _by_position(model(**{name: batch[name] for name in inputs_of(model.config)}).logits.float())


def _by_position(logits: Tensor) -> Tensor:
    """A class is predicted for a text, not for each of its tokens: [batch, 1, classes]."""
    return logits if logits.ndim > 2 else logits.unsqueeze(1)
