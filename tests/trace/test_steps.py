"""The real training step on fake GPUs: its memory is as forecast, and its work does not grow unseen."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Literal

import pytest
from torch import Tensor

from distill.losses import ForwardKL
from distill.losses.tile import LogitTile
from distill.trace.device_guard import COMPILERS
from distill.trace.figures import Figures
from distill.trace.trace_process import Tracer
from tests.trace.cases import CORE, RECORDED, case, cases, figures_of

pytestmark = pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="tracing needs a C++ compiler")
CASES, LIMITS = cases(), json.loads(RECORDED.read_text())
NAMES = [pytest.param(name, marks=() if name in CORE else pytest.mark.trace) for name in CASES]


@pytest.fixture(scope="module")
def tracer() -> Iterator[Tracer]:
    with Tracer() as one:
        yield one


def _within(name: str, figures: Figures) -> None:
    found = figures_of(figures)
    more = {key: (value, LIMITS[name][key]) for key, value in found.items() if value > LIMITS[name][key]}
    assert not more, f"{name}: more than recorded {more}; if that is meant, run python -m tests.trace.cases"


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_as_forecast_and_work_does_not_grow(name: str, tracer: Tracer) -> None:
    figures = tracer.trace(CASES[name])
    assert CASES[name].memory.memory().total == pytest.approx(figures.peak_bytes, rel=0.15)
    assert figures.waits_per_micro_batch() <= 1
    _within(name, figures)


def test_every_case_is_recorded() -> None:
    assert LIMITS.keys() == CASES.keys()
    assert {*CORE} <= CASES.keys()


class OnTheCPU(ForwardKL):
    """A loss that forgets to move what it multiplies with."""

    kind: Literal["forward_kl"] = "forward_kl"

    @property
    def has_in_place(self) -> bool:
        return False

    def value_and_gradient(self, tile: LogitTile) -> tuple[Tensor, Tensor]:
        value, gradient = super().value_and_gradient(tile)
        return value, gradient * gradient.new_ones(gradient.shape[-1]).to("cpu")


def test_a_tensor_on_the_wrong_device_is_found(tracer: Tracer) -> None:
    with pytest.raises(RuntimeError, match=r"wrong device: FakeTensorDeviceMismatchError|two different devices"):
        tracer.trace(case("wrong device", losses=[OnTheCPU()]))
    assert tracer.trace(CASES["distill"]).peak_bytes  # the process goes on


def test_ddp_holds_gradients_once(tracer: Tracer) -> None:
    """Beside its buckets there is no second copy of them while micro-batches accumulate."""
    one, of_eight = (tracer.trace(CASES[name]).peak_bytes for name in ("distill", "ddp 8"))
    assert of_eight == pytest.approx(one, rel=0.01)


def test_the_end_of_a_training_moves_only_the_model_to_the_host(tracer: Tracer) -> None:
    """Not the optimizer's moments, which each process of a machine would hold there."""
    for name in ("distill", "ddp 8"):
        assert tracer.trace(CASES[name]).host_bytes == pytest.approx(CASES[name].memory.memory().student, rel=0.01)


def test_products_in_bf16_are_timed_as_such(tracer: Tracer) -> None:
    """All of the step but AdamW's; the backward pass of attention reads fp32 as well."""
    works = [work for work in tracer.trace(CASES["distill"]).works if work.flops]
    assert {work.name for work in works} >= {"mm", "_scaled_dot_product_flash_attention_backward"}
    assert [work.name for work in works if not work.is_half] == []
