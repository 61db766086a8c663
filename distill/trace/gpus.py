"""The GPUs that a trace can be timed for, by the figures of their data sheets.

Sources: NVIDIA's data sheets of H100 (SXM5), H200 (SXM), DGX B200 and L4, and the white paper of the Ada architecture
for the GeForce RTX 4090. FLOP/s are of dense products that are summed in fp32; the link is one GPU's, in one direction.
"""

from __future__ import annotations

from dataclasses import dataclass

from distill.core.errors import InputError
from distill.core.source import suggest
from distill.training.gpu_peaks import peak_of

REACHED_FLOPS, REACHED_BANDWIDTH = 0.8, 0.9
"""Shares of the peak that large products and plain passes over memory reach with the libraries' kernels."""
NETWORK_BANDWIDTH = 50e9
"""Bytes/s of one GPU's network card between machines: 400 Gb/s, as in a DGX H100."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        name: of :data:`GPUS`.
        single_flops: FLOP/s of products in fp32.
        bandwidth: bytes/s of its memory.
        memory_bytes: of it.
        link_bandwidth: bytes/s to other GPUs of its machine.
    """

    name: str
    single_flops: float
    bandwidth: float
    memory_bytes: float
    link_bandwidth: float

    @property
    def half_flops(self) -> float:
        """FLOP/s of products in bf16."""
        peak = peak_of(self.name)
        assert peak is not None
        return peak


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("H100", 67e12, 3.35e12, 80e9, 450e9),  # 51 TFLOP/s and 2 TB/s as a PCIe board
        Gpu("H200", 67e12, 4.8e12, 141e9, 450e9),
        Gpu("B200", 75e12, 8.0e12, 180e9, 900e9),
        Gpu("L4", 30.3e12, 0.3e12, 24e9, 32e9),  # PCIe 4.0 x16
        Gpu("RTX 4090", 82.6e12, 1.008e12, 24e9, 32e9),
    )
}


def gpu_named(name: str) -> Gpu:
    """A GPU by its name, in any case, with or without spaces or dashes.

    Raises:
        InputError: it is not in the table.
    """
    for gpu in GPUS.values():
        if _plain(name) in (_plain(gpu.name), _plain(gpu.name).removeprefix("rtx")):
            return gpu
    raise InputError(f"--gpu {name}: not known, expected one of {', '.join(GPUS)}{suggest(name, GPUS)}")


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").replace("_", "")
