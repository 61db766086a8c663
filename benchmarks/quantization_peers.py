"""Quantizes the same student with peers, in a separate environment. If a peer fails, its error message is recorded.

    PYTHONPATH=. WORK/peers-quant/bin/python -m benchmarks.quantization_peers --corpus BOOKS --work WORK

Each attempt is a separate process with a time limit. It evaluates its model on the same text and with the same code as
the benchmark does. torchao's fake-quantized layers are trained by distill on the same batches, with a learning rate
that is chosen in the same way. The student must exist (``benchmarks.quantization``), which also shows the results in
WORK.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.quantization_grids import BATCH_SIZE, FIRST_RATES, NUM_TOKENS, SEARCH_TOKENS
from distill.data.micro_batches import MicroBatches
from distill.pretrained import model_from

TIME_LIMIT_S = 7200
RECORD = "peer.json"
FIGURES = ("perplexity", "kl_to_student", "kl_to_teacher", "top1_agreement")


@dataclass(frozen=True)
class Peer:
    """An attempt: name, outcome, and the figures of each seed if it succeeded."""

    name: str
    outcome: str
    figures: list[dict[str, float]] = field(default_factory=list)


def _folder(work: Path, num_tokens: int) -> Path:
    return work / "quantization" / f"peers-{num_tokens}"


def found(work: Path, num_tokens: int) -> list[Peer]:
    """The attempts with ``num_tokens`` tokens that :func:`main` has recorded."""
    records = sorted(_folder(work, num_tokens).glob(f"*/{RECORD}"))
    return [Peer(**json.loads(file.read_text(encoding="utf-8"))) for file in records]


@dataclass
class Bench:
    """Student, teacher and text of the benchmark."""

    corpus: Path
    work: Path
    num_tokens: int
    search_tokens: int
    num_seeds: int

    def student(self) -> Any:
        """A new copy of the unquantized student."""
        from transformers import AutoModelForCausalLM

        place = self.work / "quantization" / "start" / "student" / "model"
        return model_from(str(place), AutoModelForCausalLM, dtype="float32")

    @cached_property
    def teacher(self) -> Any:
        """The teacher of the student."""
        from transformers import AutoModelForCausalLM

        return model_from(str(self.work / "books-teacher-final"), AutoModelForCausalLM, dtype="float32").eval()

    def text(self, split: str, seed: int = 0) -> Any:
        """The tokens of the benchmark, in its order."""
        from benchmarks import books
        from distill.data.corpus import Corpus
        from distill.data.spec import DataSpec
        from distill.data.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(str(self.work / "books-teacher-final"))
        data = DataSpec.model_validate({**books.data(self.corpus, split), "calibration_sequences": 32})  # type: ignore[arg-type]
        return Corpus.open(data, tokenizer, self.work / "quantization" / "tokens", seed, len(tokenizer))

    def calibration(self) -> list[dict[str, Any]]:
        """The batches on which distill calibrates its own rounding."""
        return list(self.text("test").calibration_loader(batch_size=4))

    def measure(self, model: Any, split: str = "test") -> dict[str, float]:
        """All figures on the test books, or only the perplexity on the validation books."""
        from distill.evaluation.quality import measure_quality

        corpus = self.text(split)
        if split == "valid":
            return {"perplexity": measure_quality(model, None, corpus.validation_loader(8)).perplexity}
        quality = measure_quality(model, self.teacher, corpus.validation_loader(8))
        beside = measure_quality(model, self.student().eval(), corpus.validation_loader(8))
        figures = (quality.perplexity, beside.kl_to_teacher, quality.kl_to_teacher, quality.top1_agreement)
        return dict(zip(FIGURES, figures, strict=True))  # type: ignore[arg-type]

    def train(self, model: Any, loss: str, num_tokens: int, lr: float, seed: int) -> None:
        """Train with distill's training module, with its optimizer, schedule and order of the text."""
        import pytorch_lightning as pl

        from benchmarks import books
        from distill.losses import CrossEntropy, ForwardKL
        from distill.training.module import DistillationModule
        from distill.training.spec import OptimizerSpec

        losses, teacher = ([CrossEntropy()], None) if loss == "cross-entropy" else ([ForwardKL()], self.teacher)
        num_steps = num_tokens // (BATCH_SIZE * books.SEQUENCE_LENGTH)
        module = DistillationModule(model.train(), losses, teacher, optimizer=OptimizerSpec(lr=lr), num_steps=num_steps)
        trainer = pl.Trainer(
            accelerator="cpu", max_steps=num_steps, max_epochs=-1, gradient_clip_val=1.0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, train_dataloaders=self.text("test", seed).train_loader(MicroBatches(BATCH_SIZE)))


def attempts() -> dict[str, Callable[[Bench], Iterator[Any]]]:
    """Name -> function of a bench that yields a quantized model per seed (only one if nothing is trained)."""
    ways: dict[str, Callable[[Bench], Iterator[Any]]] = {}
    for grid in ("int4", "int3", "int2", "int4, int8 activations"):
        ways[f"torchao {grid}"] = _torchao(grid, None)
    for bits in (4, 3, 2):
        ways[f"llm-compressor nearest int{bits}"] = _llm_compressor("QuantizationModifier", bits)
        ways[f"llm-compressor GPTQ int{bits}"] = _llm_compressor("GPTQModifier", bits)
    ways["llm-compressor AWQ int4"] = _llm_compressor("AWQModifier", 4)
    for name in ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", "INT4_AWQ_CFG", "INT8_WEIGHT_ONLY_CFG", "INT8_SMOOTHQUANT_CFG"):
        ways[f"Model-Optimizer {name.removesuffix('_CFG')}"] = _model_optimizer(name)
    for grid in ("int4", "int2", "int4, int8 activations"):
        for loss in ("distillation", "cross-entropy"):
            ways[f"torchao QAT {grid}, {loss}"] = _torchao(grid, loss)
    return ways


def _torchao(grid: str, loss: str | None) -> Callable[[Bench], Iterator[Any]]:
    def quantized(bench: Bench) -> Iterator[Any]:
        import torch
        from torchao.quantization import Int8DynamicActivationIntxWeightConfig, IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup
        from torchao.quantization.qat import QATConfig

        from benchmarks.losses import next_rate

        kind = Int8DynamicActivationIntxWeightConfig if "activations" in grid else IntxWeightOnlyConfig
        config = kind(weight_dtype=getattr(torch, grid.split(",")[0]), **_grouped(kind, PerGroup(32)))

        def linear(module: Any, name: str) -> bool:
            return isinstance(module, torch.nn.Linear) and name != "lm_head"

        def trained(num_tokens: int, lr: float, seed: int) -> Any:
            model = bench.student()
            quantize_(model, QATConfig(config, step="prepare"), linear)
            bench.train(model, str(loss), num_tokens, lr, seed)
            quantize_(model, QATConfig(config, step="convert"), linear)
            return model.eval()

        if loss is None:
            model = bench.student().eval()
            quantize_(model, config, linear)
            yield model
            return
        rates: dict[float, float] = {}
        while (lr := next_rate(rates, FIRST_RATES)) is not None:
            rates[lr] = bench.measure(trained(bench.search_tokens, lr, 0), "valid")["perplexity"]
        for seed in range(bench.num_seeds):
            yield trained(bench.num_tokens, min(rates, key=rates.__getitem__), seed)

    return quantized


def _grouped(kind: Any, group: Any) -> dict[str, Any]:
    """The group size, under the name that this config uses."""
    return {"weight_granularity" if "weight_granularity" in kind.__dataclass_fields__ else "granularity": group}


def _llm_compressor(modifier: str, bits: int) -> Callable[[Bench], Iterator[Any]]:
    def quantized(bench: Bench) -> Iterator[Any]:
        import datasets
        from llmcompressor import oneshot
        from llmcompressor.modifiers import awq, quantization

        model = bench.student().eval()
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
        group = {"targets": ["Linear"], "weights": weights}
        kind = getattr(quantization, modifier, None) or getattr(awq, modifier)
        recipe = kind(config_groups={"group_0": group}, ignore=["lm_head"])
        rows = [ids.tolist() for batch in bench.calibration() for ids in batch["input_ids"]]
        text = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        reads = {} if modifier == "QuantizationModifier" else {"dataset": text, "num_calibration_samples": len(rows)}
        oneshot(model=model, recipe=recipe, **reads)
        yield model

    return quantized


def _model_optimizer(name: str) -> Callable[[Bench], Iterator[Any]]:
    def quantized(bench: Bench) -> Iterator[Any]:
        import copy

        import modelopt.torch.quantization as mtq

        model, config = bench.student().eval(), copy.deepcopy(getattr(mtq, name))
        for entry in config["quant_cfg"]:
            if "block_sizes" in entry.get("cfg", {}):
                entry["cfg"]["block_sizes"][-1] = 32  # as for the other peers; the default is 128

        def forward(model: Any) -> None:
            for batch in bench.calibration():
                model(input_ids=batch["input_ids"])

        mtq.quantize(model, config, forward)
        yield model

    return quantized


def attempt(name: str, bench: Bench) -> Peer:
    """Run one attempt in its own process; the outcome is its last line of output, or that the time is up."""
    folder = _folder(bench.work, bench.num_tokens) / name.replace(",", "").replace(" ", "-")
    if (folder / RECORD).is_file():
        return Peer(**json.loads((folder / RECORD).read_text(encoding="utf-8")))
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, *sys.orig_argv[1:], "--one", name, str(folder)]
    figures: list[dict[str, float]] = []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=False)
        printed = [line for line in (done.stdout if done.returncode == 0 else done.stderr).splitlines() if line.strip()]
        outcome = printed[-1] if printed else f"exit code {done.returncode} and nothing printed"
        if done.returncode == 0:
            figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    except subprocess.TimeoutExpired:
        outcome = f"no result in {TIME_LIMIT_S} s"
    peer = Peer(name, outcome.replace(str(bench.work), "WORK"), figures)
    (folder / RECORD).write_text(json.dumps(asdict(peer), indent=2), encoding="utf-8")
    return peer


def main() -> None:
    """Make all attempts that were not made before."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, help="as in the benchmark (default: %(default)s)")
    parser.add_argument("--search-tokens", type=int, default=SEARCH_TOKENS, help="as in the benchmark (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="as in the benchmark (default: %(default)s)")
    parser.add_argument("--only", default="", help="only attempts with this text in their name (default: all)")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    bench = Bench(options.corpus, options.work, options.tokens, options.search_tokens, options.seeds)
    if options.one:
        name, folder = options.one
        figures = [bench.measure(model) for model in attempts()[name](bench)]
        (Path(folder) / "figures.json").write_text(json.dumps(figures), encoding="utf-8")
        print(f"perplexity {statistics.fmean(one['perplexity'] for one in figures):.2f}")
        return
    for name in (name for name in attempts() if options.only in name):
        peer = attempt(name, bench)
        print(f"{peer.name}: {peer.outcome}", flush=True)


if __name__ == "__main__":
    main()
