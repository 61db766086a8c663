"""A training step traced on GPUs that are not there: memory, kernels, waits of the CPU, traffic, a bound of its time.

The real training - Lightning's loop, the module, its losses, AdamW, DDP or FSDP2 - runs on fake CUDA tensors, which
have shapes and no numbers, in a process of its own:

    1. :mod:`~distill.trace.jobs` makes a job of each training stage of a recipe       (as ``distill check`` plans it)
    2. :mod:`~distill.trace.device_guard` compiles what a CPU build of PyTorch lacks to hold tensors of a GPU, once
    3. :mod:`~distill.trace.trace_process` builds the models and has :mod:`~distill.trace.traced_training` train each
    4. :mod:`~distill.trace.counter` sees every operation of one optimizer step        (:mod:`~distill.trace.figures`)
    5. :mod:`~distill.trace.roofline` says how long a GPU needs for them at least      (:mod:`~distill.trace.report`)

What it cannot say: what depends on numbers (checkpoints, generation, a loss scale), how kernels overlap, what the
allocator loses to fragments, and the memory of the CUDA context and of libraries.
"""
