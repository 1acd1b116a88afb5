"""Kernel benchmarks: ``python -m benchmarks --help``."""
