import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize as reference
from pydantic import TypeAdapter, ValidationError

from distill.core.errors import InputError
from distill.quantization import QUANTIZERS, Int8Channel, IntGroup
from distill.quantization.base import QuantizerSpec

BOTH = [IntGroup(group_size=16), Int8Channel()]


def test_codes_against_an_independent_computation() -> None:
    weight = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    codes = IntGroup(group_size=32).quantize(weight)
    assert codes.scale.shape == (6, 2)
    for row in range(6):
        for group in range(2):
            values = weight[row, 32 * group : 32 * group + 32].tolist()
            scale = torch.tensor(max(map(abs, values)) / 7.5).bfloat16().item()
            assert codes.scale[row, group].item() == scale
            # Python rounds half to even
            expected = [max(-8, min(7, round(value / scale))) for value in values]
            assert codes.values[row, 32 * group : 32 * group + 32].tolist() == expected


@pytest.mark.parametrize("spec", BOTH, ids=lambda spec: spec.kind)
def test_the_grid_is_that_of_compressed_tensors(spec: QuantizerSpec) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3))
    codes = spec.quantize(weight)
    group = {"strategy": "group", "group_size": 16} if isinstance(spec, IntGroup) else {"strategy": "channel"}
    arguments = QuantizationArgs(num_bits=spec.num_bits(), symmetric=True, **group)
    scale = codes.scale.float()
    assert torch.equal(spec.dequantize(codes), reference(weight, scale, torch.zeros_like(scale), arguments))


@pytest.mark.parametrize("spec", BOTH, ids=lambda spec: spec.kind)
def test_a_dequantized_weight_has_the_same_codes_on_the_same_scale(spec: QuantizerSpec) -> None:
    codes = spec.quantize(torch.randn(32, 64, generator=torch.Generator().manual_seed(4)))
    again = spec.quantize(spec.dequantize(codes), scale=codes.scale)
    assert torch.equal(again.values, codes.values)
    assert torch.equal(spec.dequantize(again), spec.dequantize(codes))


def test_a_new_scale_for_a_dequantized_weight_is_another_grid() -> None:
    # why nothing may be quantized twice: -7.5 steps round to -8, whose absolute maximum gives a wider scale
    weight = torch.tensor([[-7.5, *range(-7, 8)]])
    spec = IntGroup(group_size=16)
    codes = spec.quantize(weight)
    assert codes.scale.item() == 1.0
    assert spec.quantize(spec.dequantize(codes)).scale.item() > 1.0


@pytest.mark.parametrize(
    ("in_features", "group_size", "proposal"),
    [
        (4096, 96, "try 64 or 128"),
        (96, 64, "try 32$"),
        (48, 32, "no group size of 32"),
        (100, 32, "no group size of 32"),
    ],
)
def test_a_group_size_that_does_not_divide_is_refused(in_features: int, group_size: int, proposal: str) -> None:
    with pytest.raises(
        InputError, match=rf"group_size \({group_size}\) must divide in_features \({in_features}\); {proposal}"
    ):
        IntGroup(group_size=group_size).groups(in_features)


def test_family_reads_a_kind_and_refuses_nonsense() -> None:
    from typing import Annotated

    adapter = TypeAdapter(Annotated[QuantizerSpec, QUANTIZERS])
    assert adapter.validate_python("int8_channel") == Int8Channel()
    assert adapter.validate_python({"kind": "int_group", "group_size": 64, "skip": []}) == IntGroup(
        group_size=64, skip=()
    )
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "int_group", "group_size": 0})
    with pytest.raises(ValidationError):
        adapter.validate_python({"kind": "int8_channel", "group_size": 32})


def test_specs_import_without_torch() -> None:
    import subprocess
    import sys

    code = (
        "import distill.quantization, distill.exporters, sys; "
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
