"""Benchmarks of speed and of student quality; see README.md in this folder. They are not part of tests or package."""
