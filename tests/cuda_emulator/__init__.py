"""CUDA kernels on the CPU: a build of the CUDA operators for CPU tensors, to be put in place of the CPU operators.

    with cuda_emulator.emulation():
        cuda_emulator.configure(schedule="reverse")
        fastnorm.functional.batch_norm(...)   # runs csrc/cuda/batch_norm.cu

FASTNORM_EMULATOR chooses the variant: plain, address or thread.  The last two need a process that was started with
build.sanitizer_environment().
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from functools import cache
from pathlib import Path

from . import build
from .build import unavailable_reason

__all__ = ["SCHEDULES", "configure", "emulation", "library", "unavailable_reason"]

SCHEDULES = ("forward", "reverse", "random")


@cache
def library() -> ctypes.CDLL:
    """The emulator's module, built where it has to be; its operators are torch.ops.fastnorm_emu."""
    import torch

    given = os.environ.get("FASTNORM_EMULATOR_LIBRARY")
    path = Path(given) if given else build.build_module(os.environ.get("FASTNORM_EMULATOR", "plain"))
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(str(path))
    loaded.fastnorm_emulator_configure.argtypes = [
        ctypes.c_int,
        ctypes.c_uint64,
        ctypes.c_uint,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_size_t,
    ]
    return loaded


def configure(
    schedule: str = "random",
    seed: int = 1,
    blocks_at_once: int = 1,
    sm_count: int = 4,
    compute_capability: int = 90,
    l2_bytes: int = 64 << 10,
) -> None:
    """Sets the order in which threads run, and the device that launch code is told of, until the next call.

    schedule: "forward" and "reverse" start threads and blocks in that order and go on with the first or the last that
        is ready; "random" mostly goes on with the last, by `seed`.
    blocks_at_once: how many blocks take turns; a cluster's always do.
    sm_count, compute_capability, l2_bytes: of the device; 90 is sm_90, the first with clusters.
    """
    order = SCHEDULES.index(schedule)
    library().fastnorm_emulator_configure(order, seed, blocks_at_once, sm_count, compute_capability, l2_bytes)


def operator_names(namespace: str) -> list[str]:
    import torch

    names = torch._C._dispatch_get_all_op_names()
    return sorted(name.partition("::")[2] for name in names if name.startswith(f"{namespace}::"))


def below_autograd(operator):
    """The operator without autograd, which torch.ops.fastnorm's own kernels have done before they come to it."""
    import torch

    def call(*args, **options):
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args, **options)

    return call


@contextlib.contextmanager
def emulation():
    """Meanwhile the operators of torch.ops.fastnorm run the emulated CUDA kernels for CPU tensors."""
    import torch

    library()
    override = torch.library.Library("fastnorm", "IMPL", "CPU")
    try:
        for name in operator_names("fastnorm_emu"):
            base, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.fastnorm_emu, base), overload or "default")
            override.impl(name, below_autograd(operator), allow_override=True)
        configure()
        yield
    finally:
        override._destroy()
