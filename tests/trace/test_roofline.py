"""Least times by hand, for operations whose figures are round."""

from __future__ import annotations

import pytest

from distill.core.errors import InputError
from distill.core.world import World
from distill.trace.figures import Figures, Work
from distill.trace.gpus import GPUS, NETWORK_BANDWIDTH, REACHED_BANDWIDTH, REACHED_FLOPS, gpu_named
from distill.trace.roofline import collective_seconds, part, step_time

H100 = GPUS["H100"]
COPY = Work(0, "backward", "copy_", "kernel", int(3.35e9), 0, True, 2)
PRODUCT = Work(0, "backward", "mm", "kernel", 10, int(989e9), True, 3)
REDUCE = Work(1, "backward", "all_reduce", "collective", int(4.5e9), 0, False, 1)


def test_a_kernel_is_bound_by_memory_or_by_products() -> None:
    assert part([COPY], H100).seconds == pytest.approx(2e-3 / REACHED_BANDWIDTH)
    assert part([PRODUCT], H100).seconds == pytest.approx(3e-3 / REACHED_FLOPS)
    both = part([COPY, PRODUCT], H100)
    assert (both.kernels, both.num_bytes, both.flops) == (5, 2 * int(3.35e9) + 30, 3 * int(989e9))
    assert both.of_products == pytest.approx((3e-3 / REACHED_FLOPS) / both.seconds)


def test_rings_between_machines_are_bound_by_the_network() -> None:
    of_eight = collective_seconds([REDUCE], H100, World(0, 8, 0, 8))
    assert of_eight == pytest.approx(2 * 7 / 8 * 4.5e9 / (450e9 * REACHED_BANDWIDTH))
    of_two = collective_seconds([REDUCE], H100, World(0, 4, 0, 2))
    assert of_two == pytest.approx(2 * 3 / 4 * 4.5e9 / (2 * NETWORK_BANDWIDTH * REACHED_BANDWIDTH))
    assert collective_seconds([REDUCE], H100, World()) == 0.0


def test_what_the_last_micro_batch_does_is_not_repeated() -> None:
    once = Work(1, "optimizer", "_fused_adamw_", "kernel", int(3.35e9), 0, False, 1)
    figures = Figures(0, "", {}, 0, 0, 2, 100, [COPY, once, REDUCE], [], 1e6, 0.0)
    world = World(0, 8, 0, 8)
    two, ten = (step_time(figures, H100, world, number) for number in (2, 10))
    assert two.kernel_seconds == pytest.approx((2e-3 + 1e-3) / REACHED_BANDWIDTH)
    assert ten.kernel_seconds == pytest.approx((9 * 2e-3 + 1e-3) / REACHED_BANDWIDTH)
    assert ten.collective_seconds == two.collective_seconds
    assert ten.tokens == 8 * 1000
    assert two.seconds == max(two.kernel_seconds, two.collective_seconds)
    assert ten.mfu == pytest.approx(1000 * 1e6 / ten.seconds / 989e12)


def test_names_of_gpus() -> None:
    assert gpu_named("rtx4090") is gpu_named("4090") is GPUS["RTX 4090"]
    with pytest.raises(InputError, match=r"--gpu A100: not known, expected one of H100"):
        gpu_named("A100")
