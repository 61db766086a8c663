"""What the project's own tests of killed and distributed runs are made of, for tests of your own parts.

:mod:`~distill.testing.workers` starts runs in processes that need not import anything any more;
:mod:`~distill.testing.chaos` kills them at chosen moments.
"""
