"""Parameters that the tests share: dtypes, layouts, and the backends that the operators run on.

backend: "cpu"; in modules with EVERY_ISA = True "cpu_AVX2" and so on too, the kernels of each instruction set that the
processor has; "cuda_emulation", where the CUDA kernels run on the CPU for small tensors, each test in one of the
emulator's schedules; "cuda" where there is a GPU.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from cuda_emulator import SCHEDULES, configure, emulation, library, unavailable_reason

import fastnorm
from fastnorm._library import extension

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("planes", "channels_last")


def to_layout(t: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "channels_last" and t.dim() in (4, 5):
        return t.contiguous(memory_format=torch.channels_last if t.dim() == 4 else torch.channels_last_3d)
    return t.contiguous()


@dataclass(frozen=True)
class Backend:
    name: str
    device: str

    @property
    def small(self) -> bool:
        """Whether every element costs so much that a test should use few."""
        return self.name == "cuda_emulation"


def instruction_sets() -> list[str]:
    """Those of this processor that there are CPU kernels for."""
    isas = ["DEFAULT", "AVX2", "AVX512"]
    return isas[: isas.index(extension.isa()) + 1]


def backends(every_isa: bool) -> list[str]:
    isas = instruction_sets() if every_isa else []
    with_cuda = torch.cuda.is_available() and fastnorm.info()["cuda"] is not None
    return ["cpu", *(f"cpu_{isa}" for isa in isas), "cuda_emulation", *(["cuda"] if with_cuda else [])]


@cache
def emulator_problem() -> str | None:
    """Why the emulator cannot be used on this machine; builds it."""
    if reason := unavailable_reason():
        return reason
    library()
    return None


def pytest_generate_tests(metafunc):
    if "backend" in metafunc.fixturenames:
        every_isa = getattr(metafunc.module, "EVERY_ISA", False)
        metafunc.parametrize("backend", backends(every_isa), indirect=True)


@pytest.fixture
def backend(request):
    with contextlib.ExitStack() as stack:
        if request.param == "cuda_emulation":
            if problem := emulator_problem():
                pytest.skip(problem)
            stack.enter_context(emulation())
            seed = zlib.crc32(request.node.nodeid.encode())
            configure(schedule=SCHEDULES[seed % len(SCHEDULES)], seed=seed)
        name, _, isa = request.param.partition("cpu_")
        if isa:
            name = "cpu"
            extension.force_isa(isa)
            stack.callback(extension.force_isa, None)
        yield Backend(name, "cuda" if name == "cuda" else "cpu")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """A function that sets the number of threads, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def subprocess_environment() -> dict[str, str]:
    """For an interpreter that imports the fastnorm and the tests that this one runs."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(fastnorm.__file__)))
    here = os.path.dirname(os.path.abspath(__file__))
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, here, os.environ.get("PYTHONPATH", "")])}
