"""In which of llama.cpp's formats the weights of a GGUF file are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from gguf import GGUFReader


def formats_of(file: Path) -> tuple[str, str]:
    """(most frequent format of the layers, format of the embeddings), such as ``("Q4_0", "Q8_0")``."""
    found = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    embeddings = found.pop("token_embd.weight")
    found.pop("output.weight", None)
    layers = Counter(found.values()).most_common(1)
    return layers[0][0] if layers else embeddings, embeddings
