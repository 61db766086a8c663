"""Imports what a run needs, in the process that all workers are forked from."""

import gc

import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

import distill.runner
import distill.stages.train
import distill.training.assemble
import distill.training.module
import distill.training.trainer  # noqa: F401

gc.freeze()  # the runs collect garbage after every stage; these modules are none
