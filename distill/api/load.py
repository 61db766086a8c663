"""Load a model with its tokenizer, by the loader that recipes use."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from distill.data.tokenizer import load_tokenizer
from distill.models.load import load_model, locate


def load(reference: str, *, dtype: str = "float32") -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load a causal language model and its tokenizer. Code that comes with a model is never run.

    Models that you have loaded yourself, such as by ``AutoModelForCausalLM``, work as well.

    Args:
        reference: a folder, a Hub id, or ``builtin:quickstart-teacher``, a Llama of 1.4M parameters that comes with
            distill.
        dtype: of the weights in memory, such as ``"bfloat16"``; ``"auto"`` is that of the files.

    Returns:
        The model in evaluation mode on the CPU, and its tokenizer.

    Raises:
        InputError: one of them is not there, is damaged, or is not supported.

    Examples:
        >>> import distill
        >>> teacher, tokenizer = distill.load("builtin:quickstart-teacher")
        >>> teacher.num_parameters()
        1443456
    """
    location = locate(reference)
    return load_model(location, dtype=dtype), load_tokenizer(location)
