"""Builds the test-only module that runs csrc/cuda/*.cu on the CPU: python tests/cuda_emulator/build.py [VARIANT ...].

The kernels and the host files are compiled with -DFASTNORM_CUDA_EMULATION against cuda_emulator.h.  Of CUDA only its
headers are needed: from CUDA_HOME, the toolkit behind the nvcc on PATH, or the PyPI packages named by HEADER_PACKAGES.
Results are kept in build/emulator and made again when what they were made from has changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = Path(os.environ.get("FASTNORM_EMULATOR_CACHE", ROOT / "build/emulator"))
HEADER_PACKAGES = "nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.* nvidia-cuda-cccl==13.0.*"

# What AddressSanitizer sees as well, UBSan need not check: it takes most of the time to compile.
UNCHECKED = "-fno-sanitize=vptr,null,object-size"

# The sanitizers' libraries have to be in the process from its start: see sanitizer_environment().
VARIANTS = {
    "plain": ["-O1"],
    "address": ["-O1", "-g1", "-fsanitize=address,undefined", UNCHECKED, "-fno-omit-frame-pointer"],
    "thread": ["-O1", "-g1", "-gdwarf-4", "-fsanitize=thread"],
}


class Unavailable(Exception):
    """The emulator cannot be built on this machine; the message says what is missing and how to get it."""


@cache
def compiler() -> str:
    """GCC by choice, as sanitizer_environment() knows where its libraries are."""
    for name in ("g++", os.environ.get("CXX"), "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise Unavailable("the CUDA emulator needs a C++ compiler: apt-get install g++")


@cache
def cuda_headers() -> list[str]:
    """Folders for the compiler to find CUDA's headers in."""
    candidates = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    if nvcc := shutil.which("nvcc"):  # it may be a wrapper script somewhere else, so ask it where its toolkit is
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        candidates += [Path(top) / "include" for top in re.findall(r"^#\$ TOP=(.+)$", dry_run, re.M)]
    candidates.append(Path("/usr/local/cuda/include"))
    candidates += sorted(found for p in sys.path if p for found in Path(p).glob("nvidia/cu1[3-9]/include"))
    for folder in candidates:
        folders = [folder.resolve(), folder.resolve() / "cccl"]
        wanted = ("cuda_runtime_api.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h", "nv/target")
        if all(any((f / name).exists() for f in folders) for name in wanted):
            return [str(f) for f in folders if f.is_dir()]
    raise Unavailable(f"the CUDA emulator needs CUDA's headers: set CUDA_HOME, or pip install {HEADER_PACKAGES}")


def unavailable_reason() -> str | None:
    try:
        compiler(), cuda_headers()
    except Unavailable as reason:
        return str(reason)
    return None


def sanitizer_environment(variant: str) -> dict[str, str]:
    """What a process needs in its environment to load a sanitized module."""
    if variant == "plain":
        return {}
    libraries = ["libtsan.so"] if variant == "thread" else ["libasan.so", "libubsan.so"]
    paths = []
    for name in [*libraries, "libstdc++.so"]:  # they look for libstdc++'s functions as soon as they are loaded
        path = subprocess.check_output([compiler(), f"-print-file-name={name}"], text=True).strip()
        if not os.path.isabs(path):
            raise Unavailable(f"{compiler()} has no {name}, which the {variant} variant needs")
        paths.append(os.path.realpath(path))
    return {
        "LD_PRELOAD": ":".join(paths),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "TSAN_OPTIONS": "exitcode=66:ignore_noninstrumented_modules=1:report_signal_unsafe=0:atexit_sleep_ms=0",
    }


# ---- Compiling what has changed -------------------------------------------------------------------------------------


def digest(*parts: bytes | str) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part.encode() if isinstance(part, str) else part)
        hasher.update(b"\0")
    return hasher.hexdigest()[:16]


def hash_file(path: str) -> str:
    try:
        return digest(Path(path).read_bytes())
    except OSError:
        return "missing"


@cache
def compiler_version() -> str:
    return subprocess.check_output([compiler(), "--version"], text=True)


@contextlib.contextmanager
def locked(name: str):
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / f"{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def make(output: Path, command: list[str], inputs: list[str] | None = None, version: str = "") -> None:
    """Runs the command with -o output, unless its inputs are what they were when output was made.

    Without `inputs` the compiler is asked for them (-MMD); `version` stands for system headers, which it does not name.
    """
    record = output.with_name(output.name + ".json")
    key = digest(*command, compiler_version(), version)
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads(record.read_text())
        if known["key"] == key and output.exists() and all(hash_file(p) == h for p, h in known["inputs"].items()):
            return
    fresh = output.with_name(f"{output.name}.{os.getpid()}")
    dependencies = fresh.with_name(fresh.name + ".d")
    extra = ["-MMD", "-MF", str(dependencies)] if inputs is None else []
    started = time.perf_counter()
    result = subprocess.run([*command, *extra, "-o", str(fresh)], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"building {output.name} failed:\n{' '.join(command)}\n{result.stderr}")
    if inputs is None:
        text = dependencies.read_text().replace("\\\n", " ").partition(":")[2]
        inputs = [p.replace("\0", " ") for p in text.replace("\\ ", "\0").split()]
        dependencies.unlink()
    hashes = {p: hash_file(p) for p in inputs}
    os.replace(fresh, output)
    record.write_text(json.dumps({"key": key, "inputs": hashes}))
    print(f"built {output.name} in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)


def kernel_flags(variant: str) -> list[str]:
    flags = [*VARIANTS[variant], "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
    flags += ["-Wall", "-Wno-unknown-pragmas", "-DFASTNORM_CUDA", "-DFASTNORM_CUDA_EMULATION"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}", f"-I{HERE}"]
    return flags + [f"-isystem{folder}" for folder in cuda_headers()]


@cache
def torch_flags() -> tuple[list[str], list[str]]:
    import torch
    from torch.utils import cpp_extension

    compiling = [f"-isystem{p}" for p in [*cpp_extension.include_paths(), sysconfig.get_path("include")]]
    compiling.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    linking = [flag for p in cpp_extension.library_paths() for flag in (f"-L{p}", f"-Wl,-rpath,{p}")]
    return compiling, [*linking, "-lc10", "-ltorch_cpu", "-ltorch"]


@cache
def torch_version() -> str:
    import torch

    return torch.__version__


def build_module(
    variant: str = "plain",
    replace: dict[str, Path] | None = None,
    name: str = "fastnorm_emu",
    ops: tuple[str, ...] = ("",),
) -> Path:
    """Builds the module of torch.ops.fastnorm_emu and returns its path.

    `replace` has other files to compile instead of some in csrc/cuda, by their name there: tests put faults into them.
    `ops` are the beginnings of the names of the files that are wanted; all by default.
    """
    kernels = {p.name: p for p in sorted((ROOT / "csrc/cuda").glob("*.cu"))}
    kernels.update(replace or {})
    kernels = {key: source for key, source in kernels.items() if key.startswith(ops)}
    if not kernels:
        raise Unavailable("there are no kernels in csrc/cuda")
    host_files = [p for p in sorted((ROOT / "csrc").glob("*.cpp")) if p.name.startswith(ops)]
    host_files = [p for p in host_files if p.name != "library.cpp"]
    compile_torch, link_torch = torch_flags()
    jobs = []
    for key, source in kernels.items():
        prefix = f"{name}." if key in (replace or {}) else ""
        command = [compiler(), *kernel_flags(variant), "-x", "c++", "-c", str(source)]
        jobs.append((CACHE / f"{prefix}{Path(key).stem}.kernel.{variant}.o", command, ""))
    for source in host_files:
        command = [compiler(), *kernel_flags(variant), *compile_torch, "-c", str(source)]
        jobs.append((CACHE / f"{source.stem}.host.{variant}.o", command, torch_version()))
    library = CACHE / f"{name}.{variant}.so"
    with locked(variant), ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        list(pool.map(lambda job: make(job[0], job[1], version=job[2]), jobs))
        objects = [str(path) for path, *_ in jobs]
        linking = [compiler(), *VARIANTS[variant], "-shared", *objects, "-Wl,--no-undefined", *link_torch]
        make(library, linking, objects, torch_version())
    return library


def build_cases(variant: str = "plain") -> Path:
    """Builds the program with the emulator's own test kernels; it needs no torch."""
    program = CACHE / f"cases.{variant}"
    with locked(f"cases.{variant}"):
        make(program, [compiler(), *kernel_flags(variant), "-x", "c++", str(HERE / "cases.cu")])
    return program


if __name__ == "__main__":
    for chosen in sys.argv[1:] or ["plain"]:
        print(build_module(chosen))
