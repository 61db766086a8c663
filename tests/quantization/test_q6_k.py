"""Q6_K against its definition in float64, block by block, and against the gguf package's own reader."""

from __future__ import annotations

import numpy
import pytest
import torch

from distill.core.errors import InputError
from distill.quantization import Q6K


def weights() -> torch.Tensor:
    weight = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[1] = 0  # no scale at all
    weight[2, 16:32] = 0  # a sub-block without one
    weight[3, 40] = -3.0  # one that makes the scales of the others coarse
    return weight


def test_codes_and_scales_are_those_of_the_definition() -> None:
    weight = weights()
    codes = Q6K().quantize(weight)
    for row, values, scales in zip(weight.double().numpy(), codes.values, codes.scale, strict=True):
        for block in range(2):
            subs = row[256 * block :][:256].reshape(16, 16)
            steps = numpy.array([sub[numpy.abs(sub).argmax()] / -32 for sub in subs])
            d = steps[numpy.abs(steps).argmax()] / -128
            half = float(numpy.float16(d))
            whole = numpy.clip(numpy.round(steps / d), -128, 127) if d else numpy.zeros(16)
            assert scales[16 * block :][:16].tolist() == (half * whole).tolist()
            for j, (sub, scale) in enumerate(zip(subs, half * whole, strict=True)):
                exact = sub / scale if scale else numpy.zeros(16)
                assert values[256 * block + 16 * j :][:16].tolist() == numpy.clip(numpy.round(exact), -32, 31).tolist()


def test_a_gguf_file_reads_the_same_weights() -> None:
    quants = pytest.importorskip("gguf").quants
    from gguf import GGMLQuantizationType

    from distill.exporters.gguf_blocks import code_blocks, plain_blocks

    codes = Q6K().quantize(weights())
    stored = code_blocks("w", codes)
    assert stored.format == "Q6_K"
    assert stored.data.shape == (5, 2 * 210)
    read = quants.dequantize(stored.data, GGMLQuantizationType.Q6_K)
    assert numpy.array_equal(read, Q6K().dequantize(codes).numpy())
    assert numpy.array_equal(read, stored.values)
    rounded = plain_blocks("w", weights(), "q6_k")
    assert numpy.array_equal(rounded.data, stored.data)
    assert not rounded.from_codes


def test_scales_that_the_format_cannot_hold_are_refused() -> None:
    pytest.importorskip("gguf")
    from distill.exporters.gguf_blocks import code_blocks

    codes = Q6K().quantize(weights())
    codes.scale[0, 3] *= 1.001
    with pytest.raises(InputError, match=r"w: GGUF's Q6_K stores scales as multiples .*; train with q6_k"):
        code_blocks("w", codes)


def test_rows_of_another_width_are_told_of_q8_0() -> None:
    with pytest.raises(InputError, match=r"Q6_K needs rows \(576\) to be a multiple .*\(256\); use q8_0"):
        Q6K().quantize(torch.zeros(2, 576))
