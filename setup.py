"""Builds fastnorm._C: csrc/*.cpp, csrc/cpu/*.cpp once per instruction set, csrc/cuda/*.cu where CUDA is found.

Environment variables:
  FASTNORM_CUDA=0|1        without / with the CUDA kernels; default: where a toolkit and a CUDA torch are found
  TORCH_CUDA_ARCH_LIST     the GPU architectures, as for torch's own extensions
  CUDA_HOME                the toolkit; default: the one behind the nvcc on PATH
  FASTNORM_SANITIZE=address   AddressSanitizer and UndefinedBehaviorSanitizer, for the tests
  MAX_JOBS                 compilers at once
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
DEFAULT_CUDA_ARCHS = "7.5;8.0;8.6;9.0;10.0;12.0+PTX"
X86_ISAS = {
    "DEFAULT": ["-O1"],  # processors without AVX2 are rare, and a third of the build's time
    "AVX2": ["-DCPU_CAPABILITY_AVX2", "-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-DCPU_CAPABILITY_AVX512", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


def stop(what: str, mend: str) -> None:
    sys.exit(f"fastnorm: {what}. To mend it: {mend}")


try:
    import torch
except ImportError:
    stop(
        "building needs torch in this environment, and pip's build isolation hides it",
        "pip install torch==2.13.0 'setuptools>=77' ninja pybind11 && pip install --no-build-isolation .",
    )


def find_cuda_home() -> Path | None:
    """The toolkit's folder: the nvcc on PATH may be a wrapper script elsewhere, so ask nvcc itself."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
        if top := re.search(r"^#\$ TOP=(.+)$", dry_run, re.M):
            candidates.append(top[1])
    candidates.append("/usr/local/cuda")
    for candidate in filter(None, candidates):
        if (Path(candidate) / "include/cuda_runtime.h").exists() and (Path(candidate) / "bin/nvcc").exists():
            return Path(candidate).resolve()
    return None


def cuda_flags(archs: str) -> list[str]:
    """nvcc's -gencode flags for a TORCH_CUDA_ARCH_LIST such as "8.0;9.0+PTX"."""
    flags = []
    for arch in archs.replace(" ", ";").split(";"):
        number = arch.removesuffix("+PTX").replace(".", "")
        if not number:
            continue
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


class NinjaBuild(build_ext):
    """Writes build.ninja and runs it: setuptools alone has no flags per source and no parallel, incremental builds."""

    def build_extension(self, ext: Extension) -> None:
        import ninja
        import pybind11
        from ninja import ninja_syntax
        from torch.utils import cpp_extension

        cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if not cxx:
            stop("no C++ compiler was found (CXX, c++, g++, clang++)", "apt-get install g++, or set CXX")
        cuda_home = find_cuda_home()
        wanted = os.environ.get("FASTNORM_CUDA")
        with_cuda = wanted != "0" and torch.version.cuda is not None and cuda_home is not None
        if wanted == "1" and not with_cuda:
            missing = "a CUDA toolkit (nvcc)" if cuda_home is None else "a torch built for CUDA"
            stop(f"FASTNORM_CUDA=1, but there is no {missing}", "install it (or set CUDA_HOME), or unset FASTNORM_CUDA")

        torch_include = Path(torch.__file__).parent / "include"
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        isas = X86_ISAS if x86 else {"DEFAULT": []}
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_CUDA_ARCHS

        # The library must not tell where it was built.
        prefix_maps = [f"-ffile-prefix-map={ROOT}=.", f"-ffile-prefix-map={torch_include}=torch/include"]
        prefix_maps.append(f"-ffile-prefix-map={pybind11.get_include()}=pybind11/include")
        common = ["-std=c++20", "-O3", "-fPIC", "-DNDEBUG", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
        common += (
            ["-Wno-uninitialized", "-Wno-psabi", "-Wno-maybe-uninitialized"] if "clang" not in cxx else []
        )  # false alarms from intrinsics headers
        common += [
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            f"-I{ROOT / 'csrc'}",
            *prefix_maps,
        ]
        common += [
            f"-isystem{p}"
            for p in (*cpp_extension.include_paths(), pybind11.get_include(), sysconfig.get_path("include"))
        ]
        common += ["-DFASTNORM_X86"] if x86 else []
        link = [f"-L{p}" for p in cpp_extension.library_paths()] + ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        if sys.platform == "darwin":
            link += ["-undefined", "dynamic_lookup"]
        else:
            common.append("-fopenmp")
            link.append("-fopenmp")
        if with_cuda:
            common += ["-DFASTNORM_CUDA", f"-isystem{cuda_home / 'include'}"]
            link += ["-lc10_cuda", "-ltorch_cuda", f"-L{cuda_home / 'lib64'}", "-lcudart"]
        if os.environ.get("FASTNORM_SANITIZE") == "address":
            sanitize = [
                "-g1",
                "-fsanitize=address,undefined",
                "-fno-sanitize=vptr,null,object-size",
                "-fno-omit-frame-pointer",
            ]
            common += ["-O1", *sanitize]
            link += sanitize

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        objects = []
        with open(build / "build.ninja", "w") as file:
            out = ninja_syntax.Writer(file)
            out.variable("builddir", str(build))
            out.rule(
                "cxx",
                f"{cxx} -MMD -MF $out.d -c $in -o $out {' '.join(common)} $flags",
                depfile="$out.d",
                deps="gcc",
                description="C++ $out",
            )
            out.rule("link", f"{cxx} -shared $in -o $out {' '.join(link)}", description="link $out")
            for source in sorted(ROOT.glob("csrc/*.cpp")):
                objects += out.build(str(build / f"{source.stem}.o"), "cxx", str(source.relative_to(ROOT)))
            for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
                for isa, flags in isas.items():
                    isa_flags = " ".join([f"-DCPU_CAPABILITY={isa}", "-ffp-contract=off", *flags])
                    target_object = str(build / f"{source.stem}.{isa}.o")
                    objects += out.build(
                        target_object, "cxx", str(source.relative_to(ROOT)), variables={"flags": isa_flags}
                    )
            if with_cuda:
                out.rule(
                    "nvcc",
                    f"{cuda_home / 'bin/nvcc'} -MD -MF $out.d -c $in -o $out -std=c++20 -O3 -DFASTNORM_CUDA "
                    f"-Xcompiler -fPIC,-fvisibility=hidden -I{ROOT / 'csrc'} --threads 2 {' '.join(cuda_flags(archs))}",
                    depfile="$out.d",
                    deps="gcc",
                    description="CUDA $out",
                )
                for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
                    objects += out.build(str(build / f"{source.stem}.cuda.o"), "nvcc", str(source.relative_to(ROOT)))
            out.build(str(target), "link", objects)
            out.default(str(target))
        command = [Path(ninja.BIN_DIR) / "ninja", "-f", build / "build.ninja"]
        command += ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        if subprocess.run(command, cwd=ROOT).returncode != 0:
            stop("compiling failed; the compiler's messages are above", "fix what it names, then install again")

        about = {
            "torch": torch.__version__,
            "isas": list(isas),
            "cuda_archs": [a for a in archs.replace(" ", ";").split(";") if a] if with_cuda else [],
            "cuda": torch.version.cuda if with_cuda else None,
            "compiler": subprocess.run([cxx, "--version"], capture_output=True, text=True).stdout.partition("\n")[0],
        }
        (target.parent / "_build.json").write_text(json.dumps(about, indent=1) + "\n")

    def copy_extensions_to_source(self) -> None:  # for in-place builds
        super().copy_extensions_to_source()
        shutil.copy(Path(self.build_lib) / "fastnorm/_build.json", ROOT / "fastnorm")


setup(ext_modules=[Extension("fastnorm._C", sources=[])], cmdclass={"build_ext": NinjaBuild})
