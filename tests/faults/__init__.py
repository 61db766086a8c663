"""What the tests of killed and distributed runs, and the benchmark of faults, are made of.

:mod:`~tests.faults.workers` starts runs in processes that need not import anything any more;
:mod:`~tests.faults.chaos` kills them at chosen moments, :mod:`~tests.faults.campaign` again and again;
:mod:`~tests.faults.cells` are trainings that differ in what a resume must get right, and
:mod:`~tests.faults.resumes` finds out whether they do.
"""
