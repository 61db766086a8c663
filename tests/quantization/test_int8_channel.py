import numpy as np
import torch

from distill.quantization import Int8Channel


def test_codes_are_torchs_fake_quantize_where_the_scale_is_exact() -> None:
    # the largest magnitude is 127.5 / 512, so the scale is 2^-9 and torch's multiplication by 1 / scale is exact too
    weight = (torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1) * (127.0 / 512)
    weight[:, 3] = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0]) * 127.5 / 512
    spec = Int8Channel()
    codes = spec.quantize(weight)
    assert codes.scale.tolist() == [[2.0**-9]] * 5
    expected = torch.fake_quantize_per_channel_affine(
        weight, torch.full((5,), 2.0**-9), torch.zeros(5, dtype=torch.int32), 0, -128, 127
    )
    assert torch.equal(spec.dequantize(codes), expected)


def test_codes_against_an_independent_computation() -> None:
    weight = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    codes = Int8Channel().quantize(weight)
    assert codes.values.dtype == torch.int8
    assert codes.scale.dtype == torch.bfloat16
    assert codes.scale.shape == (16, 1)
    array = weight.numpy()
    # float32 -> bfloat16, half to even, on the bits
    bits = (np.abs(array).max(1, keepdims=True) / np.float32(127.5)).view(np.uint32)
    scale = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    expected = np.clip(np.rint(array.astype(np.float64) / scale), -128, 127)
    assert np.array_equal(codes.scale.float().numpy(), scale)
    assert np.array_equal(codes.values.numpy(), expected)


def test_error_is_half_a_step_at_most() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    spec = Int8Channel()
    codes = spec.quantize(weight)
    inside = codes.values < 127  # the top code stands for all up to 127.5 * 1.004 steps
    steps = (spec.dequantize(codes) - weight).abs() / codes.scale.float()
    assert steps[inside].max() <= 0.5 + 1e-4
    assert steps.max() < 1.1


def test_a_row_of_zeros_stays_zero() -> None:
    spec = Int8Channel()
    codes = spec.quantize(torch.zeros(2, 8))
    assert torch.equal(spec.dequantize(codes), torch.zeros(2, 8))
