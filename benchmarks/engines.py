"""Size, memory and speed of one model in the engines to which distill exports.

A Llama with random weights is exported by distill in every format, once. Each engine then reads a prompt and generates
tokens in its own process. The engines take turns, in several rounds. Ratios to transformers in float32 are computed
within a round, and their median is reported. This needs the extras gguf, torchao and onnx; engines that are not
installed are skipped and named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import hardware, result, tables

BASE = "transformers, float32"
WEIGHTS = (".safetensors", ".gguf", ".onnx", ".data")
VOCABULARY = Path(__file__).parents[1] / "distill" / "assets" / "quickstart-teacher"


@dataclass(frozen=True)
class Contender:
    """An engine with a format.

    Attributes:
        runs: function that measures it: transformers, llama_cpp or onnxruntime.
        needs: module of the engine.
        folder: folder of the exported model.
        dtype: dtype in which transformers computes.
    """

    runs: str
    needs: str
    folder: str
    dtype: str = "auto"


CONTENDERS = {
    BASE: Contender("transformers", "transformers", "float32"),
    "transformers, bfloat16": Contender("transformers", "transformers", "bfloat16"),
    "torchao, int8": Contender("transformers", "torchao", "torchao-int8", "float32"),
    "ONNX Runtime, float32": Contender("onnxruntime", "onnxruntime", "onnx-float32-cached"),
    "ONNX Runtime, int8": Contender("onnxruntime", "onnxruntime", "onnx-int8-cached"),
    "llama.cpp, F16": Contender("llama_cpp", "llama_cpp", "gguf-f16"),
    "llama.cpp, Q8_0": Contender("llama_cpp", "llama_cpp", "gguf-q8_0"),
    "llama.cpp, Q4_0": Contender("llama_cpp", "llama_cpp", "gguf-q4_0"),
    "llama.cpp, TQ2_0": Contender("llama_cpp", "llama_cpp", "gguf-tq2_0"),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of the model, and numbers of tokens to read and to generate."""

    hidden: int
    layers: int
    prompt_tokens: int
    new_tokens: int
    repeats: int


def make(work: Path, shape: Shape) -> int:
    """Write the model and all exports that do not exist yet; returns the number of parameters."""
    from distill.exporters.gguf import Gguf
    from distill.exporters.onnx import Onnx
    from distill.exporters.torchao import Torchao
    from distill.quantization import Ternary

    torch.manual_seed(0)
    parameters = 0
    for dtype in ("float32", "bfloat16"):
        parameters = _write(work / dtype, lambda folder, dtype=dtype: _new_model(shape, dtype).save_pretrained(folder))
    _write(work / "ternary", lambda folder: _rounded(work / "bfloat16", folder, Ternary(group_size=256)))
    exports: dict[str, tuple[str, Any]] = {
        "torchao-int8": ("bfloat16", Torchao(round_to="int8")),
        "onnx-float32-cached": ("bfloat16", Onnx(weights="float32", keys_and_values="cached")),
        "onnx-int8-cached": ("bfloat16", Onnx(keys_and_values="cached")),
        "gguf-f16": ("bfloat16", Gguf()),
        "gguf-q8_0": ("bfloat16", Gguf(round_to="q8_0", embeddings="q8_0")),
        "gguf-q4_0": ("bfloat16", Gguf(round_to="q4_0", embeddings="q8_0")),
        "gguf-tq2_0": ("ternary", Gguf(embeddings="q8_0")),
    }
    for name, (source, target) in exports.items():
        if installed(name):
            _write(work / name, lambda folder, s=source, t=target: t.export(work / s, folder, title="model"))
    return parameters


def installed(folder: str) -> bool:
    """Whether the engine of a format is installed."""
    return all(find_spec(one.needs) is not None for one in CONTENDERS.values() if one.folder == folder)


def _write(folder: Path, write: Callable[[Path], Any]) -> int:
    """Write a model folder with a tokenizer, atomically; returns its number of parameters, or 0 if unknown."""
    from distill.core.artifact import replacing
    from distill.data.tokenizer import load_tokenizer

    if not folder.is_dir():
        with replacing(folder) as place:
            write(place)
            load_tokenizer(VOCABULARY).save_pretrained(place)
    from distill.models.size import measure_size

    return measure_size(folder).parameters if any(folder.glob("*.safetensors")) else 0


def _new_model(shape: Shape, dtype: str) -> Any:
    from distill.data.tokenizer import load_tokenizer
    from distill.models.load import new_config, new_model

    sizes = {"hidden_size": shape.hidden, "intermediate_size": 3 * shape.hidden, "num_hidden_layers": shape.layers}
    heads = {"num_attention_heads": shape.hidden // 64, "num_key_value_heads": max(1, shape.hidden // 256)}
    tokens = {"vocab_size": len(load_tokenizer(VOCABULARY)), "bos_token_id": 0, "eos_token_id": 0}
    config = new_config({"model_type": "llama", **sizes, **heads, **tokens, "max_position_embeddings": 1024})
    return new_model(config, seed=0).to(getattr(torch, dtype))


def _rounded(source: Path, folder: Path, grid: Any) -> None:
    from distill.exporters.compressed_tensors import save
    from distill.models.load import load_model
    from distill.quantization.prepare import prepare

    model = load_model(str(source), dtype="float32")
    prepare(model, grid)
    save(model, folder)


def measure(contender: Contender, folder: Path, shape: Shape, threads: int) -> dict[str, Any]:
    """Measure one engine in this process: prefill in ms, decoding in tokens per second, additional memory."""
    torch.set_num_threads(threads)
    return {"transformers": _transformers, "llama_cpp": _llama_cpp, "onnxruntime": _onnxruntime}[contender.runs](
        contender, folder, shape, threads
    )


def _transformers(contender: Contender, folder: Path, shape: Shape, threads: int) -> dict[str, Any]:
    import transformers.models.llama.modeling_llama  # noqa: F401 (so that its import is not counted as memory)

    from distill.evaluation.engine import Opening
    from distill.evaluation.speed_child import measure
    from distill.evaluation.speed_settings import SpeedSettings

    start = _peak_memory()
    lengths = {"prompt_tokens": shape.prompt_tokens, "new_tokens": shape.new_tokens, "repeats": shape.repeats}
    opening = Opening(str(folder), dtype=contender.dtype, threads=threads)
    found = measure(opening, SpeedSettings(**lengths))
    return {
        "prefill_ms": found["prefill_ms_p50"],
        "decode_tokens_per_s": found["decode_tokens_per_s_p50"],
        "memory_mb": (_peak_memory() - start) / 1e6,
    }


def _llama_cpp(contender: Contender, folder: Path, shape: Shape, threads: int) -> dict[str, Any]:
    from llama_cpp import Llama

    start = _peak_memory()
    length = shape.prompt_tokens + shape.new_tokens
    settings: dict[str, Any] = {"n_ctx": length, "n_batch": shape.prompt_tokens, "verbose": False}
    llama = Llama(str(next(folder.glob("*.gguf"))), n_threads=threads, n_threads_batch=threads, **settings)

    def read(ids: list[int]) -> None:
        llama.eval(ids)

    return _timed(read, llama.reset, shape) | {"memory_mb": (_peak_memory() - start) / 1e6}


def _onnxruntime(contender: Contender, folder: Path, shape: Shape, threads: int) -> dict[str, Any]:
    import numpy
    import onnxruntime

    start = _peak_memory()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])

    asked = [one for one in session.get_inputs() if one.name.startswith("past_key_values")]
    names = ["logits", *(one.name.replace("past_key_values", "present") for one in asked)]
    past: dict[str, Any] = {}

    def reset() -> None:
        past.update({one.name: numpy.zeros((1, one.shape[1], 0, one.shape[3]), numpy.float32) for one in asked})

    def read(ids: list[int]) -> None:
        length = len(ids) + past[asked[0].name].shape[2]
        inputs = {"input_ids": numpy.array([ids]), "attention_mask": numpy.ones((1, length), numpy.int64)}
        past.update(zip(list(past), session.run(names, inputs | past)[1:], strict=True))

    return _timed(read, reset, shape) | {"memory_mb": (_peak_memory() - start) / 1e6}


def _timed(read: Callable[[list[int]], None], reset: Callable[[], None], shape: Shape) -> dict[str, float]:
    """Medians over the repeats, after one warm-up."""
    prompt = torch.randint(2000, (shape.prompt_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    prefill: list[float] = []
    steps: list[float] = []
    for repeat in range(shape.repeats + 1):
        reset()
        started = time.perf_counter()
        read(prompt)
        times = [time.perf_counter() - started]
        for token in prompt[: shape.new_tokens]:
            started = time.perf_counter()
            read([token])
            times.append(time.perf_counter() - started)
        if repeat:
            prefill.append(times[0])
            steps.extend(times[1:])
    return {"prefill_ms": 1e3 * statistics.median(prefill), "decode_tokens_per_s": 1 / statistics.median(steps)}


def _peak_memory() -> int:
    """Peak memory of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM:")).split()[1])


def rounds(work: Path, shape: Shape, num_rounds: int, threads: int) -> Iterator[dict[str, dict[str, Any]]]:
    """In each round, measure every installed engine in a new process; yields the results of a round."""
    for _ in range(num_rounds):
        found = {}
        for name, contender in CONTENDERS.items():
            if installed(contender.folder):
                command = [sys.executable, "-m", "benchmarks.engines", *sys.argv[1:], "--one", name]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                found[name] = json.loads(output.splitlines()[-1])
        yield found


def rows(work: Path, found: list[dict[str, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One row per engine: bytes, memory, medians, and the medians of its ratios to the first engine."""
    base_bytes = size_of(work / CONTENDERS["transformers, bfloat16"].folder)
    for name in found[0]:
        num_bytes = size_of(work / CONTENDERS[name].folder)
        row = {"table": "engines", "engine": name, "file_mb": num_bytes / 1e6, "of_bfloat16": num_bytes / base_bytes}
        for key in ("memory_mb", "prefill_ms", "decode_tokens_per_s"):
            row[key] = statistics.median(one[name][key] for one in found)
        for key, ratio in (("prefill_speed", _prefill_speed), ("decode_speed", _decode_speed)):
            row[key] = statistics.median(ratio(one[name], one[BASE]) for one in found)
        yield row


def _prefill_speed(one: Mapping[str, float], base: Mapping[str, float]) -> float:
    return base["prefill_ms"] / one["prefill_ms"]


def _decode_speed(one: Mapping[str, float], base: Mapping[str, float]) -> float:
    return one["decode_tokens_per_s"] / base["decode_tokens_per_s"]


def llama_cpp_version() -> dict[str, str]:
    """Version of llama-cpp-python, from its module, because a local build has no metadata."""
    if find_spec("llama_cpp") is None:
        return {}
    import llama_cpp

    return {"llama-cpp-python": llama_cpp.__version__}


def size_of(folder: Path) -> int:
    """Total size of the weight files, in bytes."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in WEIGHTS)


def main() -> None:
    """Export, measure in turn, and write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for the model and its exports (2 GB)")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5, help="measurements per process, after one warm-up")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = Shape(options.hidden, options.layers, options.prompt_tokens, options.new_tokens, options.repeats)
    work = options.work / "engines" / f"{shape.hidden}x{shape.layers}"
    if options.one:
        contender = CONTENDERS[options.one]
        print(json.dumps(measure(contender, work / contender.folder, shape, options.threads)))
        return
    torch.set_num_threads(options.threads)
    parameters = make(work, shape)
    missing = sorted({one.needs for one in CONTENDERS.values() if find_spec(one.needs) is None})
    found: list[dict[str, dict[str, Any]]] = []
    for one in rounds(work, shape, options.rounds, options.threads):
        found.append(one)
        result.write(
            "engines",
            command="python -m benchmarks.engines --work WORK",
            hardware=hardware.describe(options.threads),
            versions=hardware.versions("torchao", "onnxruntime") | llama_cpp_version(),
            rows=rows(work, found),
            notes=[
                f"A Llama of {parameters:,} random parameters; a prompt of {shape.prompt_tokens} tokens and "
                f"{shape.new_tokens} generated tokens, {shape.repeats} times per process, {len(found)} rounds, "
                f"{options.threads} threads. Memory is that of the process, without its memory at the start.",
                *([f"Not installed: {', '.join(missing)}."] if missing else []),
            ],
        )
    print(tables.table(list(rows(work, found))))


if __name__ == "__main__":
    main()
