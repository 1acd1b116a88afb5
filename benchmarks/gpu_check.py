"""Everything that needs a GPU, in one run of under nine minutes: build, tests, compute-sanitizer, benchmarks.

    python benchmarks/gpu_check.py [--out FOLDER]

Uses the interpreter that it is run with and installs nothing. Writes FOLDER/gpu_check.json (steps, their outcome and
time, benchmark rows, what they were measured on), a log per step, and prints a summary; exits with 1 if a step failed.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# The cases of the backend "cuda", not those that need no GPU and run elsewhere on every change.
CUDA_TESTS = "cuda and not emulat and not faults and not check and not variants"
# Each variant of the kernels once: a block a channel, several channels a block, clusters, streamed, odd and unaligned.
SMALL_SHAPES = ((2, 3, 1, 1), (3, 7, 5, 5), (4, 65, 7, 7), (2, 6, 28, 28), (2, 2, 150, 150), (33, 130, 3, 3))


def small_cases() -> None:
    """A few small launches of every kernel: what the sanitizers run."""
    import fastnorm
    from fastnorm.functional import (
        add_layer_norm,
        avg_pool2d,
        batch_norm,
        group_norm,
        layer_norm,
        max_pool2d,
        max_unpool2d,
        rms_norm,
    )
    from fastnorm.ops import nms_padded, soft_nms

    layouts = (torch.contiguous_format, torch.channels_last)
    for shape, dtype, layout in itertools.product(SMALL_SHAPES, (torch.float32, torch.bfloat16), layouts):

        def tensor(shape=shape, dtype=dtype, layout=layout) -> torch.Tensor:
            return torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)

        x, residual, dy = tensor().requires_grad_(), tensor(), tensor()
        c, row = shape[1], shape[-1:]
        weight, bias, scale = (torch.rand(n, device="cuda").requires_grad_() for n in (c, c, row[0]))
        running = torch.zeros(c, device="cuda"), torch.ones(c, device="cuda")
        channels = fastnorm.LayerNorm2d(c, device="cuda")
        for activation, added in ((None, None), ("relu", None), ("relu", residual), ("silu", residual)):
            fused = {"activation": activation, "residual": added}
            outputs = [
                batch_norm(x, *running, weight, bias, False, **fused),
                layer_norm(x, row, scale, **fused),
                rms_norm(x, row, scale, **fused),
                add_layer_norm(x, residual, row, scale)[0],
                channels(x, added),
            ]
            if shape[0] * shape[2] * shape[3] > 1:
                outputs.append(batch_norm(x, *running, weight, bias, True, **fused))
                outputs += [group_norm(x, groups, weight, bias, **fused) for groups in (1, c)]
            for y in outputs:
                grads = torch.autograd.grad(y, (x, weight, bias, scale), dy, allow_unused=True)
                assert all(t.isfinite().all() for t in (y, *grads) if t is not None), (shape, dtype, activation)
        image = x.repeat(1, 1, 2, 4).contiguous(memory_format=layout)  # in part wide enough for whole vectors
        for window in ((3, 2, 1), (2, 2), (3, 1, 1), (3, 2, 0, 1, True), (2, 1, 1)):
            y, indices = max_pool2d(image, *window, return_indices=True)
            torch.autograd.grad(y, x, torch.randn_like(y), retain_graph=True)
            if window == (2, 2):
                max_unpool2d(y, indices, 2)
        for window in ((2,), (3, 1, 1), (3, 2, 1, True, False), (image.shape[2:],)):
            y = avg_pool2d(image, *window)
            torch.autograd.grad(y, x, torch.randn_like(y), retain_graph=True)
    for n, dtype in itertools.product((1, 70, 1100, 2300), (torch.float64, torch.float16)):  # up to three chunks
        boxes = torch.rand(2, n, 4, device="cuda", dtype=dtype)
        boxes[..., 2:] += boxes[..., :2]
        scores, idxs = torch.rand(2, n, device="cuda", dtype=dtype), torch.randint(3, (2, n), device="cuda")
        for labels in (None, idxs):
            nms_padded(boxes, scores, 0.9, 50, idxs=labels)
        soft_nms(boxes[0], scores[0], max_output=20)
    torch.cuda.synchronize()
    print("small cases: done")


def summary(report: dict) -> str:
    lines = [f"{s['name']:28} {'ok' if s['ok'] else 'FAILED':7} {s['seconds']:6.1f} s" for s in report["steps"]]
    for row in report.get("rows", []):
        against = ", ".join(f"{v:.2f}x {k}" for k, v in row["speedup"].items())
        lines.append(
            f"{row['op']} {'x'.join(map(str, row['shape']))} {row['layout']} {row['dtype']} {row['what']}: "
            f"{row['ms'] * 1e3:.1f} us, {row['gb_per_s']:.0f} GB/s, {row['share_of_copy']:.0%} of copy, {against}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu_check")
    parser.add_argument("--small-cases", action="store_true", help="only run a few small launches (for the sanitizers)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("fastnorm: gpu_check needs a GPU and a CUDA torch; without them run: make cuda-check test")
    if args.small_cases:
        small_cases()
        return
    args.out.mkdir(parents=True, exist_ok=True)
    major, minor = torch.cuda.get_device_capability()
    environment = os.environ | {
        "FASTNORM_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PYTHONUNBUFFERED": "1",
    }
    report: dict = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
                    "date": time.strftime("%Y-%m-%d"), "steps": []}  # fmt: skip

    def step(name: str, command: list, limit: int) -> bool:
        begin = time.perf_counter()
        with open(args.out / f"{name.replace(' ', '_')}.log", "w") as log:
            try:
                code = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit
                ).returncode
            except subprocess.TimeoutExpired:
                code = 124
        seconds = time.perf_counter() - begin
        report["steps"].append({"name": name, "ok": code == 0, "code": code, "seconds": round(seconds, 1)})
        print(f"{name}: {'ok' if code == 0 else f'FAILED ({code})'} in {seconds:.0f} s", flush=True)
        if code:
            print("".join((args.out / f"{name.replace(' ', '_')}.log").read_text().splitlines(True)[-40:]), flush=True)
        return code == 0

    python = sys.executable
    if step("build", [python, "setup.py", "build_ext", "--inplace"], 150):
        step(
            "tests on cuda",
            [python, "-m", "pytest", "tests", "-k", CUDA_TESTS, "--maxfail=20"],
            150,
        )
        sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        for tool in ("memcheck", "racecheck"):
            if Path(sanitizer).exists():
                command = [sanitizer, "--tool", tool, "--error-exitcode", "1", python, __file__, "--small-cases"]
                step(f"compute-sanitizer {tool}", command, 75)
            else:
                print(f"compute-sanitizer {tool}: not run, there is no compute-sanitizer on this machine")
        figures = args.out / "benchmarks.json"
        command = [python, "-m", "benchmarks", "--device", "cuda", "--against", "eager,compile", "--seconds", "0.1"]
        command += ["--dtype", "float32,bfloat16", "--json", figures, "--plot", args.out / "benchmarks.png"]
        if step("benchmarks", command, 180):
            report |= json.loads(figures.read_text())
    (args.out / "gpu_check.json").write_text(json.dumps(report, indent=1) + "\n")
    print(summary(report))
    sys.exit(any(not s["ok"] for s in report["steps"]))


if __name__ == "__main__":
    main()
