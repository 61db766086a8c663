"""What the project's own tests of killed and distributed runs are made of, for tests of your own parts.

:mod:`~distill.testing.workers` starts runs in processes that need not import anything any more;
:mod:`~distill.testing.chaos` kills them at chosen moments, :mod:`~distill.testing.campaign` again and again;
:mod:`~distill.testing.cells` are trainings that differ in what a resume must get right, and
:mod:`~distill.testing.resumes` finds out whether they do.
"""
