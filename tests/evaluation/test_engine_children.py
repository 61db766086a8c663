"""A model in its engine, in a process of its own: it says what the model says, and its end ends nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from distill.core.batch import causal_batch
from distill.core.errors import MachineError
from distill.data.chat_spec import ChatSpec
from distill.evaluation import model_process
from distill.evaluation.engine import Opening
from distill.evaluation.engine_process import EngineProcess
from distill.evaluation.meter import Meter
from distill.evaluation.quality import compare_predictions, measure_quality, predictions_of
from distill.evaluation.side_by_side import answers_in_engine, answers_of
from distill.evaluation.speed import measure_speed
from distill.evaluation.speed_child import measure
from distill.evaluation.speed_settings import SpeedSettings
from distill.evaluation.tasks.in_engine import ModelInEngine
from distill.evaluation.tasks.in_memory import ModelInMemory
from distill.models.load import load_model
from distill.pretrained import tokenizer_from


@pytest.fixture(scope="module")
def process(tiny_folders: list[Path]) -> Iterator[EngineProcess]:
    with EngineProcess(Opening(str(tiny_folders[0]), dtype="float32"), "tiny") as opened:
        yield opened


def test_quality_in_an_engine_is_that_of_the_model(process: EngineProcess, tiny_folders: list[Path]) -> None:
    """Documents that share a row are apart in both, and no piece of one batch is taken for the next one's."""
    model, teacher = (load_model(str(folder), dtype="float32") for folder in tiny_folders)
    generator = torch.Generator().manual_seed(3)
    batches = []
    for rows, length in ((2, 40), (1, 9), (3, 21)):
        ids = torch.randint(256, (rows, length), generator=generator)
        mask = torch.rand(rows, length, generator=generator) < 0.6
        places = torch.arange(length).repeat(rows, 1)
        places[0, 5:] -= 5
        places[0, 6:] -= 1 * (length > 30)  # documents of 5 tokens, of one, and the rest
        mask[:, -1] = mask[0, 4] = mask[0, 5] = False
        batches.append(causal_batch(ids, mask, position_ids=places.clamp(min=0)))
    found = compare_predictions(process.predictions, predictions_of(teacher), batches, 100, chunk_tokens=11)
    expected = measure_quality(model, teacher, batches, 100)
    assert found.tokens == expected.tokens
    for figure in ("loss_nats", "kl_to_teacher", "top1_agreement", "bits_per_byte"):
        assert getattr(found, figure) == pytest.approx(getattr(expected, figure), rel=1e-5), figure


def test_questions_in_an_engine_are_answered_as_by_the_model(process: EngineProcess, tiny_folders: list[Path]) -> None:
    tokenizer, model = tokenizer_from(str(tiny_folders[0])), load_model(str(tiny_folders[0]), dtype="float32")
    tokenizer.eos_token = "a"
    whole: dict[str, Any] = {"chat": ChatSpec()}
    memory = ModelInMemory(model, tokenizer, batch_tokens=64, **whole)
    engine = ModelInEngine(process, tokenizer, positions=memory.positions, ends=[tokenizer.eos_token_id], **whole)
    asked = [("the sky is", " blue"), ("the sky is", " x"), ("a longer question about", " blue"), ("z", "?")]
    for one, other in zip(engine.log_likelihoods(asked), memory.log_likelihoods(asked), strict=True):
        assert one.nats == pytest.approx(other.nats, abs=1e-4)
        assert (one.is_greedy, one.cut) == (other.is_greedy, other.cut)
    for stops in ([], [memory.written(["the sky"], new_tokens=12, stops=[])[0][0][1:2]]):
        prompts = ["the sky", "a longer question"]
        written = [one.written(prompts, new_tokens=12, stops=stops) for one in (engine, memory)]
        assert written[0] == written[1]
    answers = answers_of(tiny_folders[0], prompts, new_tokens=9, dtype="float32")
    in_engine = answers_in_engine(process, tokenizer, prompts, new_tokens=9, ends=[])
    assert [(one.text, one.ends) for one in in_engine] == [(one.text, one.ends) for one in answers]


ENDS = """
import os, signal
def open_engine(opening):
    os.kill(os.getpid(), signal.SIGILL)
"""


def test_an_engine_built_for_another_processor_is_a_line_that_names_the_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "engine_that_ends.py").write_text(ENDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(
        model_process.FIXES, "engine_that_ends", model_process.FIXES["distill.exporters.llama_cpp_engine"]
    )
    with pytest.raises(MachineError, match="speed cannot be measured: the engine ended by an instruction") as caught:
        measure_speed(tmp_path, module="engine_that_ends")
    assert "CMAKE_ARGS=-DGGML_NATIVE=OFF pip install" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(MachineError, match=r"^x: the engine ended by an instruction.*GGML_NATIVE=OFF"):
        EngineProcess(Opening(str(tmp_path), "engine_that_ends"), "x")


class Counters:
    """Each look finds 20 J more; of the work between two of them nothing is known."""

    def __init__(self) -> None:
        self.spent = 0.0

    def joules(self) -> dict[str, float]:
        self.spent += 10.0
        return {"cpu": self.spent, "gpu": self.spent}

    def gpus(self) -> list[dict[str, Any]]:
        return [{"index": 0, "utilization": 40, "memory": 7}, {"index": 1, "utilization": 60, "memory": 8}]


class Nothing:
    """A machine without a counter."""

    def joules(self) -> dict[str, float]:
        return {}

    def gpus(self) -> list[dict[str, Any]]:
        return []


class Engine:
    """Writes down what it is asked to do."""

    name, device, dtype, threads, vocabulary = "engine 1", "a card", "Q4_0", 2, 5

    def __init__(self, decodes: bool = True) -> None:
        self.decodes, self.did = decodes, list[tuple[str, int, int]]()

    def open(self) -> Engine:
        return self

    def reserve(self, batch: int, tokens: int) -> None:
        self.did.append(("reserve", batch, tokens))

    def prefill(self, ids: numpy.ndarray) -> numpy.ndarray:
        self.did.append(("prefill", *ids.shape))
        return numpy.eye(5)[: len(ids)]

    def step(self, ids: numpy.ndarray) -> numpy.ndarray:
        self.did.append(("step", len(ids), 1))
        return numpy.eye(5)[: len(ids)]

    def device_memory(self) -> int | None:
        return 1234


def _measured(engine: Engine, counters: Any, **settings: Any) -> dict[str, Any]:
    opening: Any = type("Opening", (), {"open": engine.open, "threads": None, "device": "cuda"})()
    return measure(opening, SpeedSettings(4, 3, 2, 2, energy_s=0.0, **settings), counters)


def test_each_batch_size_meets_each_length_and_each_has_room() -> None:
    engine = Engine()
    found = _measured(engine, Nothing, grid=((2, 4), (1, 9), (3, 4), (2, 4)))
    assert [(point["batch"], point["prompt_tokens"]) for point in found["points"]] == [(2, 4), (1, 9), (3, 4)]
    assert [did for did in engine.did if did[0] == "reserve"] == [
        ("reserve", 2, 7), ("reserve", 2, 7), ("reserve", 1, 12), ("reserve", 3, 7),
    ]  # fmt: skip
    assert engine.did.count(("prefill", 1, 9)) == 3, "a warm-up and two repeats"
    assert engine.did.count(("step", 3, 1)) == 3 * 3
    main = found["points"][0]
    assert found["decode_tokens_per_s_p50"] == main["decode_tokens_per_s_p50"] > 0
    assert found["peak_memory_bytes"] == 1234


def test_memory_of_a_device_that_nothing_reads_is_not_measured() -> None:
    class Silent(Engine):
        def device_memory(self) -> int | None:
            return None

    found = _measured(Silent(), Nothing, grid=((1, 4),))
    assert (found["peak_memory_bytes"], found["memory_above_start_bytes"]) == (None, None)
    assert found["points"][0]["peak_memory_bytes"] is None


def test_an_engine_that_keeps_no_keys_and_values_has_no_speed_of_decoding() -> None:
    engine = Engine(decodes=False)
    found = _measured(engine, Nothing)
    assert "decode_tokens_per_s_p50" not in found
    assert not any(what == "step" for what, *_ in engine.did)
    assert found["prefill_tokens_per_s"] > 0


def test_energy_is_that_of_counters_or_not_measured() -> None:
    found = _measured(Engine(), Counters)
    # an answer is one window of 20 J over 2 x 3 new tokens, the prompt another over 2 x 4 tokens
    assert found["decode_joules_per_1000"] == pytest.approx(20 / 6 * 1000)
    assert found["prefill_joules_per_1000"] == pytest.approx(20 / 8 * 1000)
    assert found["gpu_load"] == 50
    without = _measured(Engine(), Nothing)
    assert [without[key] for key in ("decode_joules_per_1000", "prefill_joules_per_1000", "gpu_load")] == [None] * 3
    assert without["cpu_load"] >= 0
    assert _measured(Engine(), None)["decode_joules_per_1000"] is None


def test_work_goes_on_until_a_counter_can_tell() -> None:
    meter, pieces = Meter(Counters()), 0

    def work() -> None:
        nonlocal pieces
        pieces += 1
        with meter.over(tokens=10):
            pass

    meter.lasts(work, 1e-3)
    assert meter.seconds >= 1e-3
    assert meter.tokens == 10 * pieces
    assert meter.joules_per_1000_tokens() == pytest.approx(2000)
