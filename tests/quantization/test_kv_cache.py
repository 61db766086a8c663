"""Keys and values against blocks and rotations written out, in fp64."""

import pytest
import torch

from distill.core.errors import InputError
from distill.quantization import Q40, Q80
from distill.quantization.kv_cache import CacheType, check_cache, rotation, round_keys, round_values

GRIDS = {"q8_0": Q80(), "q4_0": Q40()}


def states(head_dim: int) -> torch.Tensor:
    made = torch.randn(2, 3, 5, head_dim, generator=torch.Generator().manual_seed(head_dim))
    made[..., 3] *= 20  # a channel that a block's scale would pay for
    return made


def signs(width: int) -> torch.Tensor:
    """By its other definition: an entry is negative where row and column share an odd number of bits."""
    entries = [[-1.0 if (i & j).bit_count() % 2 else 1.0 for j in range(width)] for i in range(width)]
    return torch.tensor(entries, dtype=torch.float64) / width**0.5


@pytest.mark.parametrize("width", [64, 128])
def test_the_rotation_is_its_own_inverse(width: int) -> None:
    torch.testing.assert_close(rotation(width).double(), signs(width))
    torch.testing.assert_close(rotation(width) @ rotation(width), torch.eye(width))


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize(
    ("head_dim", "of_keys", "of_values"), [(32, 1, 1), (96, 1, 1), (64, 64, 64), (128, 128, 64), (192, 64, 64)]
)
def test_against_blocks_that_are_rotated_by_hand(kind: CacheType, head_dim: int, of_keys: int, of_values: int) -> None:
    made, spec = states(head_dim), GRIDS[kind]
    for got, width in ((round_keys(made, kind), of_keys), (round_values(made, kind), of_values)):
        matrix = torch.block_diag(*[signs(width)] * (head_dim // width))
        rotated = (made.double() @ matrix).float().reshape(-1, head_dim)
        expected = (spec.dequantize(spec.quantize(rotated)).double() @ matrix).view_as(made)
        step = expected.abs().max() / (64 if kind == "q8_0" else 4)
        assert (got.double() - expected).abs().mean() < 1e-3 * step  # a code at a half may fall to either side
        assert not torch.equal(got, made)


@pytest.mark.parametrize("head_dim", [64, 96])
def test_an_engine_with_the_halves_of_a_head_by_turns(head_dim: int) -> None:
    keys = states(head_dim)
    turns = torch.arange(head_dim).view(2, -1).T.flatten()
    got = round_keys(keys, "q4_0", interleaved=True)
    assert torch.equal(got[..., turns], round_keys(keys[..., turns].contiguous(), "q4_0"))
    assert not torch.equal(got, round_keys(keys, "q4_0"))


def test_a_rotation_helps_where_channels_are_uneven() -> None:
    keys = states(64)
    plain = Q40().dequantize(Q40().quantize(keys.view(-1, 64))).view_as(keys)
    assert (round_keys(keys, "q4_0") - keys).square().mean() < 0.5 * (plain - keys).square().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_passes_and_a_token_is_rounded_alone(dtype: torch.dtype) -> None:
    keys = states(64).to(dtype).requires_grad_()
    upstream = torch.randn(keys.shape, dtype=dtype)
    got = round_keys(keys, "q8_0", interleaved=True)
    assert got.dtype == dtype
    got.backward(upstream)
    torch.testing.assert_close(keys.grad, upstream, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)
    assert torch.equal(round_values(keys[:, :, :2], "q8_0"), round_values(keys, "q8_0")[:, :, :2])


def test_what_no_cache_holds_is_refused() -> None:
    check_cache("q8_0", 96)
    with pytest.raises(InputError, match=r"q8_0 needs head_dim \(80\) to be a multiple of its block size \(32\)"):
        check_cache("q8_0", 80)
    with pytest.raises(InputError, match="kv_cache: got 'int3', expected one of q8_0, q4_0"):
        check_cache("int3", 64)
