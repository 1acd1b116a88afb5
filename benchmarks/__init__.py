"""Kernel benchmarks: ``python -m benchmarks --help``."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch's profiler writes into progress bars
