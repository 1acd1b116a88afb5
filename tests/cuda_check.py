"""Checks the CUDA code on a machine without a GPU: python tests/cuda_check.py [--archs 80,90] [FILE.cu ...].

* nvcc compiles every kernel file for every architecture, with warnings, register spills and local memory as errors.
* Of each kernel a table shows registers, stack, static shared memory and how many of its accesses to global memory
  move 16 bytes at once.  A kernel that is a template goes through tensors, so it must have such loads; one that is not
  a template, or whose last template argument is 1 (a vector width), may do without.  Floating-point atomics are errors,
  as their order changes from run to run (so are 64-bit ones in shared memory, which are the same instructions).
* The host files are compiled as in a CUDA build, beside whatever torch there is.

The machine code is read by cuobjdump, from the toolkit, from PATH or from PyPI (nvidia-cuda-cuobjdump together with
nvidia-cuda-nvdisasm).  Without nvcc there is nothing to do; a line says so.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ARCHS = (75, 80, 86, 90, 100, 120)
NVCC_FLAGS = ["-std=c++20", "-O3", "-DFASTNORM_CUDA", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda'}", "-lineinfo"]
NVCC_FLAGS += ["-Werror", "all-warnings", "-Xptxas", "-v,-warn-spills,-warn-lmem-usage"]
NVCC_FLAGS += ["-Xcompiler", "-Wall,-Wextra,-Wno-unknown-pragmas"]


@dataclass
class Kernel:
    """One kernel on one architecture."""

    registers: int = 0
    stack: int = 0
    shared: int = 0
    loads: int = 0
    wide_loads: int = 0
    stores: int = 0
    wide_stores: int = 0
    local: int = 0
    float_atomics: int = 0
    disassembled: bool = False


def find_tool(name: str, nvcc: str | None = None) -> str | None:
    folders = [Path(os.environ[v]) / "bin" for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
    if nvcc:  # it may be a wrapper script somewhere else, so ask it where its toolkit is
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        folders += [Path(top) / "bin" for top in re.findall(r"^#\$ TOP=(.+)$", dry_run, re.M)]
    folders += [Path(p) for p in os.get_exec_path()]
    folders.append(Path("/usr/local/cuda/bin"))
    folders += [found for p in sys.path if p for found in sorted(Path(p).glob("nvidia/cu*/bin"))]
    return next((str(f / name) for f in folders if os.access(f / name, os.X_OK) and not (f / name).is_dir()), None)


def run(command: list[str], **options) -> str:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode != 0:
        raise Failed(result.stdout + result.stderr)
    return result.stdout + result.stderr


def read_ptxas(text: str) -> dict[str, Kernel]:
    """What ptxas -v says of each kernel."""
    kernels = {}
    for part in re.split(r"Compiling entry function ", text)[1:]:
        name = re.match(r"'(\S+)'", part)[1]
        number = {what: re.search(rf"(\d+) {what}", part) for what in ("registers", "bytes stack frame", "bytes smem")}
        kernels[name] = Kernel(*(int(found[1]) if found else 0 for found in number.values()))
    return kernels


def read_sass(text: str, kernels: dict[str, Kernel]) -> None:
    """Counts the memory instructions of each kernel."""
    for part in re.split(r"^\s*Function : ", text, flags=re.M)[1:]:
        kernel = kernels.get(part.split(maxsplit=1)[0])
        if kernel is None:
            continue
        kernel.disassembled = True
        for opcode in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]+)", part, re.M):
            base, *modifiers = opcode.split(".")
            wide = "128" in modifiers or "256" in modifiers
            if base in ("LDG", "LDGSTS", "LD"):
                kernel.loads += 1
                kernel.wide_loads += wide
            elif base in ("STG", "ST"):
                kernel.stores += 1
                kernel.wide_stores += wide
            elif base in ("LDL", "STL"):
                kernel.local += 1
            elif re.match(r"(ATOM|RED)(?!UX)", base):
                # A float sum in shared memory is a loop around ATOMS.CAST.
                kernel.float_atomics += "CAST" in modifiers or any(re.match(r"B?F(16|32|64)", m) for m in modifiers)


class Failed(Exception):
    """A compiler's messages, and what it told of the kernels before it failed."""

    def __init__(self, text: str):
        lines = [x for x in text.splitlines() if not re.match(r"ptxas info|\s+\d+ bytes stack", x)]
        super().__init__("\n".join(dict.fromkeys(lines)))
        self.kernels = read_ptxas(text)


def compile_kernels(nvcc: str, cuobjdump: str | None, source: Path, arch: int, folder: Path) -> dict[str, Kernel]:
    output = folder / f"{source.stem}.sm_{arch}.o"
    kind = ["-cubin", f"-arch=sm_{arch}"]
    if arch == ARCHS[0]:  # with the launch code, which is the same for all architectures
        kind = ["-c", f"-gencode=arch=compute_{arch},code=sm_{arch}"]
    kernels = read_ptxas(run([nvcc, *NVCC_FLAGS, *kind, str(source), "-o", str(output)]))
    if cuobjdump:
        read_sass(run([cuobjdump, "-sass", str(output)]), kernels)
    output.unlink()
    return kernels


def compile_host(nvcc: str, source: Path) -> dict[str, Kernel]:
    """The CUDA side of a host file; nothing is linked, so a torch for CPUs will do."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    cxx = os.environ.get("CXX") or shutil.which("g++") or "c++"
    includes = [*cpp_extension.include_paths(), pybind11.get_include(), sysconfig.get_path("include")]
    includes += [str(p) for p in Path(find_tool("ptxas", nvcc)).parents[1].glob("include")]
    flags = ["-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'csrc'}"]
    flags += ["-DFASTNORM_CUDA"]
    flags.append(f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}")
    if torch.version.cuda is None:
        flags.append("-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE")  # a header that only a torch for CUDA has
    run([cxx, *flags, *(f"-isystem{p}" for p in includes), str(source)])
    return {}


def plain_text(text: str) -> str:
    """With demangled names, without what all of them share."""
    if filt := shutil.which("c++filt"):
        text = subprocess.run([filt], input=text, capture_output=True, text=True).stdout
    return re.sub(r"\(anonymous namespace\)::|fastnorm::|\bvoid |\b__nv_", "", text).strip()


@cache
def plain_name(symbol: str) -> str:
    """batch_norm_apply_kernel<float, 4>, without the parameters."""
    text = plain_text(symbol)
    return text[: text.rindex(">") + 1] if ">" in text else text.partition("(")[0]


def needs_wide_loads(name: str) -> bool:
    return "<" in name and not re.search(r"[<, ]1>$", name)


def faults(name: str, by_arch: dict[int, Kernel]) -> list[str]:
    found = defaultdict(list)
    for arch, kernel in sorted(by_arch.items()):
        if kernel.stack or kernel.local:
            found["local memory"].append(arch)
        if kernel.disassembled and needs_wide_loads(name) and not kernel.wide_loads:
            found["no 16-byte loads"].append(arch)
        if kernel.float_atomics:
            found["floating-point atomics"].append(arch)
    return [f"{name}: {fault} on sm_{'/'.join(map(str, archs))}" for fault, archs in found.items()]


def print_table(table: dict[str, dict[int, Kernel]], archs: list[int]) -> None:
    width = max((len(name) for name in table), default=0)
    columns = "registers on sm_" + "/".join(map(str, archs))
    print(f"\n{'kernel':{width}}  {columns}  stack  shared  16-byte loads  16-byte stores")
    for name, by_arch in sorted(table.items()):
        registers = "/".join(str(by_arch[a].registers) if a in by_arch else "-" for a in archs)
        stack, shared = (max(getattr(k, what) for k in by_arch.values()) for what in ("stack", "shared"))
        loads = stores = "?"
        if read := [k for k in by_arch.values() if k.disassembled]:  # where architectures differ, the worst one
            loads = "{0.wide_loads} of {0.loads}".format(min(read, key=lambda k: k.wide_loads))
            stores = "{0.wide_stores} of {0.stores}".format(min(read, key=lambda k: k.wide_stores))
        print(f"{name:{width}}  {registers:{len(columns)}}  {stack:5}  {shared:6}  {loads:>13}  {stores:>14}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="*", type=Path, help="kernel files; default: csrc/cuda/*.cu and the host files")
    parser.add_argument("--archs", default=",".join(map(str, ARCHS)), help="default: %(default)s")
    options = parser.parse_args()
    archs = [int(a) for a in options.archs.split(",")]
    nvcc = find_tool("nvcc")
    if not nvcc:
        print("cuda-check: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda, so the CUDA code was not compiled")
        return 0
    cuobjdump = find_tool("cuobjdump", nvcc)
    kernel_files = options.files or sorted((ROOT / "csrc/cuda").glob("*.cu"))
    host_files = [] if options.files else sorted((ROOT / "csrc").glob("*.cpp"))
    if host_files and not importlib.util.find_spec("torch"):
        print("cuda-check: no torch here, so the host files are not compiled")
        host_files = []

    started = time.perf_counter()
    bad: list[str] = []
    table: dict[str, dict[int, Kernel]] = defaultdict(dict)
    workers = int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        jobs = {}
        for source in kernel_files:
            for arch in archs:
                job = pool.submit(compile_kernels, nvcc, cuobjdump, source, arch, Path(folder))
                jobs[job] = (f"{source.name} for sm_{arch}", arch)
        for source in host_files:
            jobs[pool.submit(compile_host, nvcc, source)] = (f"{source.name} with CUDA", 0)
        for done, job in enumerate(as_completed(jobs), 1):
            what, arch = jobs[job]
            error = job.exception()
            if error and not isinstance(error, Failed):
                raise error
            kernels = error.kernels if error else job.result()
            if error:
                bad.append(f"{what}:\n{plain_text(str(error))}")
            for symbol, kernel in kernels.items():
                table[plain_name(symbol)][arch] = kernel
            outcome = "FAILED" if error else "ok"
            print(f"[{done}/{len(jobs)}] {time.perf_counter() - started:4.0f} s  {what}: {outcome}", flush=True)
    print_table(table, archs)
    for name, by_arch in sorted(table.items()):
        bad += faults(name, by_arch)
    print("".join(f"\nerror: {line}" for line in bad))
    if not cuobjdump:
        print("16-byte accesses and atomics were not checked: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    print(f"cuda-check: {f'{len(bad)} errors' if bad else 'ok'}: {len(table)} kernels, {len(archs)} architectures")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
