"""Runs tests under the sanitizers: python tests/sanitize.py [emulator-address] [emulator-thread] [cpu] [-- PYTEST ARGS]

emulator-address   the CUDA kernels on the CPU emulator, under AddressSanitizer and UndefinedBehaviorSanitizer
emulator-thread    the same under ThreadSanitizer, which sees races between threads, blocks and clusters
cpu                the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, built into build/sanitize

Without names all three.  The tests are those whose id names the backend; PYTEST ARGS choose among them (-k is taken).
Reports go to files, as pytest swallows what a test prints, and are shown at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from cuda_emulator import build

ROOT = build.ROOT
WORK = ROOT / "build/sanitize"
# The variant, and what is in the ids of its tests.  Without torch.compile and export, which start compilers: they would
# run with the sanitizer too.
RUNS = {
    "emulator-address": ("address", "cuda_emulation"),
    "emulator-thread": ("thread", "cuda_emulation"),
    "cpu": ("address", "cpu"),
}


def run_tests(name: str, arguments: list[str]) -> bool:
    variant, backend = RUNS[name]
    reports = WORK / f"reports.{name}"
    shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(parents=True)
    environment = dict(os.environ)
    if name == "cpu":
        package = build_package()
        environment["PYTHONPATH"] = str(package)
    else:
        environment["FASTNORM_EMULATOR_LIBRARY"] = str(build.build_module(variant))
    environment |= build.sanitizer_environment(variant)
    for options in ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS"):
        environment[options] += f":log_path={reports}/report"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        ROOT / "pyproject.toml",
        "--rootdir",
        ROOT,
        "-p",
        "no:cacheprovider",
    ]
    command += ["-k", f"{backend} and not compile and not export", *(arguments or [ROOT / "tests"])]
    # Not in ROOT, whose fastnorm would come before the one that was built for this; some tests use the benchmarks.
    with contextlib.suppress(FileExistsError):
        (WORK / "benchmarks").symlink_to(ROOT / "benchmarks")
    status = subprocess.run(command, cwd=WORK, env=environment).returncode
    found = sorted(reports.iterdir())
    for report in found[:5]:
        print(f"---- {name}: {report.name}\n{report.read_text()[:6000]}")
    if status == 5:
        print(f"{name}: no test has {backend} in its id")
    elif status < 0 or status > 5:
        print(f"{name}: the process ended with status {status}")
    return status == 0 and not found


def build_package() -> Path:
    """A copy of the package whose extension is built with the sanitizers."""
    environment = {**os.environ, "FASTNORM_SANITIZE": "address", "FASTNORM_CUDA": "0"}
    package, log = WORK / "lib", WORK / "build.log"
    command = [sys.executable, "setup.py", "build", "--build-lib", package, "--build-temp", WORK / "temp"]
    with open(log, "w") as file:
        status = subprocess.run(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    if status != 0:
        sys.exit(f"building fastnorm with sanitizers failed:\n{log.read_text()[-6000:]}")
    extension = next((package / "fastnorm").glob("_C*"))
    if b"__asan_init" not in extension.read_bytes():
        sys.exit("setup.py did not heed FASTNORM_SANITIZE=address")
    return package


def main() -> int:
    arguments = sys.argv[1:]
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, rest = arguments[:split] or list(RUNS), arguments[split + 1 :]
    if unknown := set(names) - set(RUNS):
        print(__doc__, f"\nunknown: {', '.join(sorted(unknown))}")
        return 2
    failed = []
    for name in names:
        started = time.perf_counter()
        print(f"==== {name}", flush=True)
        try:
            good = run_tests(name, rest)
        except build.Unavailable as reason:
            print(f"{name}: not run: {reason}")
            continue
        print(f"==== {name}: {'ok' if good else 'FAILED'}, {time.perf_counter() - started:.0f} s", flush=True)
        failed += [] if good else [name]
    print(f"sanitize: {'failed: ' + ', '.join(failed) if failed else 'ok'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
