"""An ONNX graph for ONNX Runtime, with int8 weights unless float32 is asked for, and its tokenizer.

    int8:  w_oi ~ scale_o * code_oi, code in int8;  activations in uint8, with a scale that each call finds anew

The deliverable of choice for services and languages without Python. The graph reads whole texts (``input_ids`` and
``attention_mask`` to ``logits``) without a cache of keys and values: right for scoring and classification by logits,
slow for long answers, for which :mod:`gguf <distill.exporters.gguf>` is made. ONNX Runtime's dynamic quantization
rounds after training, activations too, and costs more than 8 bits of weights alone would.

Source: https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from distill.core.errors import DistillError, InputError
from distill.exporters.base import (
    CardFacts,
    ExporterSpec,
    VerifyResult,
    new_folder,
    require_close,
    require_engine,
    require_writers,
)

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FILE, DATA = "model.onnx", "model.onnx.data"
DELIVERED = {".json", ".jinja", ".txt", ".model"}
# a protobuf holds no more than 2 GB; larger weights lie in a file beside it
EXTERNAL_ABOVE_BYTES = 1_500_000_000


class Onnx(ExporterSpec):
    """An ONNX graph, run by ONNX Runtime."""

    engine: ClassVar[str] = "ONNX Runtime"
    engine_module: ClassVar[str | None] = "onnxruntime"
    extra: ClassVar[str | None] = "onnx"

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
        model = load_model(str(source_folder), dtype="float32")
        with _quiet(), TemporaryDirectory(dir=folder) as temporary:
            plain = folder if self.weights == "float32" else Path(temporary)
            _write_graph(model, plain / FILE)
            if self.weights == "int8":
                _quantize(plain / FILE, folder / FILE, _num_layers(model))
        _copy_the_rest(source_folder, folder)
        if self.weights == "float32":
            return ["all weights in float32" + f"; {low_bit} layers hold the values of their codes" * bool(low_bit)]
        again = f"; {low_bit} layers were low-bit before, and are rounded a second time" if low_bit else ""
        return [
            f"linear layers: int8 a channel, activations uint8, rounded by ONNX Runtime after training{again}; "
            "embeddings and head: float32"
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

        num_bytes = sum(file.stat().st_size for file in (folder / FILE, folder / DATA) if file.is_file())
        logits = _engine(folder / FILE)
        with plain_logits(source_model) as source:
            result = compare(source, logits, batches, folder, num_bytes)
        return require_close(result, self.max_kl, folder)

    def card(self, folder: Path) -> CardFacts:
        return CardFacts(
            library="onnxruntime",
            tags=("onnx",),
            quantized=self.weights == "int8",
            how_to_load=(
                "```python\nimport onnxruntime\nfrom transformers import AutoTokenizer  # for the tokenizer alone\n\n"
                'tokenizer = AutoTokenizer.from_pretrained(".")\n'
                f'session = onnxruntime.InferenceSession("{FILE}")\n'
                'text = tokenizer(["Once upon a time"], return_tensors="np")\n'
                'inputs = {name: text[name] for name in ("input_ids", "attention_mask")}\n'
                '(logits,) = session.run(["logits"], inputs)  # [batch, sequence, vocabulary]\n```'
            ),
        )


def _write_graph(model: PreTrainedModel, file: Path) -> None:
    """Trace a model into a graph of any batch and sequence length."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

    # neither one row nor one token, which a trace would take for constants
    ids = torch.arange(24).remainder(model.config.get_text_config().vocab_size).view(2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    try:
        program = torch.onnx.export(
            Logits().eval(),
            (),
            kwargs=inputs,
            dynamo=True,
            input_names=list(inputs),
            output_names=["logits"],
            dynamic_shapes=dict.fromkeys(inputs, free),
            opset_version=18,
            verbose=False,
        )
    except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"{model.config.model_type}: torch cannot write this model as ONNX ({first.strip()})"
        ) from error
    assert program is not None
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    program.save(str(file), external_data=num_bytes > EXTERNAL_ABOVE_BYTES)


def _num_layers(model: PreTrainedModel) -> int:
    """Linear layers without the output head."""
    import torch

    head = model.get_output_embeddings()
    return sum(isinstance(module, torch.nn.Linear) and module is not head for module in model.modules())


def _quantize(plain: Path, file: Path, num_layers: int) -> None:
    """Round every linear layer but the output head, which a tied model shares with its embeddings.

    Raises:
        DistillError: ONNX Runtime did not find all of them.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(str(plain), load_external_data=False).graph
    quantize_dynamic(
        plain,
        file,
        per_channel=True,
        weight_type=QuantType.QInt8,
        nodes_to_exclude=[node.name for node in graph.node if "logits" in node.output],
        use_external_data_format=plain.with_name(DATA).is_file(),
    )
    rounded = onnx.load(str(file), load_external_data=False).graph
    found = sum(node.op_type == "MatMulInteger" for node in rounded.node)
    if found != num_layers:
        raise DistillError(f"{file}: ONNX Runtime rounded {found} linear layers of {num_layers}; set weights: float32")


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
        ids = batch["input_ids"].cpu()
        inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()}
        return torch.from_numpy(session.run(["logits"], inputs)[0])

    return logits


@contextmanager
def _quiet() -> Iterator[None]:
    """Warnings of the exporters (of operators and steps that are not used) stay out of our progress; errors raise."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
