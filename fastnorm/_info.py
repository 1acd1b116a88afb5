"""What was built and what is in use."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from ._library import extension, read_build

try:
    __version__ = version("fastnorm")
except PackageNotFoundError:  # run from a source folder that was built in place
    __version__ = "0+unknown"


def info() -> dict[str, Any]:
    """What this installation of fastnorm was built with and what it uses.

    Returns:
        dict with ``version``, ``cpu_isas`` (the instruction sets that CPU kernels were compiled for), ``cpu_isa`` (the
        one in use; ATEN_CPU_CAPABILITY chooses), ``cuda`` (the CUDA version, or None without CUDA kernels),
        ``cuda_archs``, ``built_for_torch``, ``torch`` (the installed one), ``compiler``, ``threads``.

    Example:
        >>> info()["cpu_isa"] in info()["cpu_isas"]
        True
    """
    build = read_build()
    return {
        "version": __version__,
        "cpu_isas": build.get("isas", []),
        "cpu_isa": extension.isa(),
        "cuda": build.get("cuda"),
        "cuda_archs": build.get("cuda_archs", []),
        "built_for_torch": build.get("torch"),
        "torch": torch.__version__,
        "compiler": build.get("compiler"),
        "threads": torch.get_num_threads(),
    }
