"""Measuring and reporting that every op's benchmark shares.

A case is one computation done by fastnorm and by others. Its results are compared before anything is timed. Times are
taken in turn in one process, and the speed-up is the median of the paired ratios, so that a busy machine disturbs both
sides alike. `floor` is the fewest bytes that the computation has to move (every input read once, every output written
once): over the time it gives GB/s, to be seen beside what a plain copy of the same tensor reaches in the same run.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

Run = Callable[[], Any]


@dataclass
class Case:
    op: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    what: str
    floor: int  # bytes
    ours: Run
    theirs: dict[str, Run]  # "eager", "compile", ...
    tolerance: float
    copy: Run  # of a tensor of copy_bytes / 2
    copy_bytes: int


@dataclass
class Row:
    op: str
    shape: tuple[int, ...]
    layout: str
    dtype: str
    what: str
    ms: float
    gb_per_s: float
    share_of_copy: float
    floor: int
    speedup: dict[str, float] = field(default_factory=dict)
    their_ms: dict[str, float] = field(default_factory=dict)
    warm_ms: float | None = None  # CUDA: without flushing the L2 cache
    extra_mb: float | None = None  # CPU: the most that a call holds beside its arguments and results


def torchvision() -> Any:
    """The library, or None where it is not installed or does not go with this torch."""
    try:
        import torchvision
    except (ImportError, RuntimeError):
        return None
    return torchvision


def check(case: Case) -> None:
    """Raises AssertionError where the two sides do not compute the same: |a - b| / |b| in the Euclidean norm."""
    flatten = torch.utils._pytree.tree_leaves
    ours = flatten(case.ours())
    for name, theirs in case.theirs.items():
        for i, (a, b) in enumerate(zip(ours, flatten(theirs()), strict=True)):
            error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
            assert error <= case.tolerance, (
                f"{case.op} {case.shape} {case.layout} {case.dtype} {case.what}: result {i} differs from {name}'s by "
                f"{error:.1e}, more than {case.tolerance:.1e}"
            )


def peak_bytes(run: Run) -> int:
    """The most memory that a call holds at once, beyond what was there before it (on the CPU, from the profiler)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = most = 0
    waiting = list(recorded.profiler.kineto_results.experimental_event_tree())
    allocations = []
    while waiting:
        event = waiting.pop()
        waiting += event.children
        if event.name == "[memory]":
            allocations.append((event.start_time_ns, event.extra_fields.alloc_size))
    for _, size in sorted(allocations):
        now += size
        most = max(most, now)
    return most


def result_bytes(results: Any) -> int:
    tensors = (t for t in torch.utils._pytree.tree_leaves(results) if isinstance(t, torch.Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)


def _seconds(run: Run, threads: int) -> float:
    return Timer("run()", globals={"run": run}, num_threads=threads).timeit(1).mean


def time_cpu(ours: Run, theirs: Run, threads: int, seconds: float) -> tuple[float, float, float]:
    """Median seconds of ours, of theirs, and of the paired ratio theirs / ours."""
    for _ in range(3):
        ours(), theirs()
    repeats = max(1, int(2e-4 / max(_seconds(ours, threads), 1e-7)))  # short ones several at a time
    timers = [Timer("run()", globals={"run": run}, num_threads=threads) for run in (ours, theirs)]
    pairs = []
    end = time.perf_counter() + seconds
    while len(pairs) < 7 or time.perf_counter() < end:
        order = (0, 1) if len(pairs) % 2 else (1, 0)
        taken = {i: timers[i].timeit(repeats).mean for i in order}
        pairs.append((taken[0], taken[1]))
    return (
        statistics.median(p[0] for p in pairs),
        statistics.median(p[1] for p in pairs),
        statistics.median(p[1] / p[0] for p in pairs),
    )


def time_cuda(run: Run, seconds: float) -> float:
    """Median seconds on a GPU, the L2 cache flushed before every run."""
    from triton.testing import do_bench

    return do_bench(run, warmup=max(1, int(seconds * 250)), rep=max(1, int(seconds * 500)), return_mode="median") / 1e3


def measure(
    cases: Iterable[Case], *, device: str, threads: int, seconds: float, done: Callable[[Row], None] | None = None
) -> list[Row]:
    """Checks and times every case; done(row) is called as each one is, so that a run cut short has said what it saw."""
    from tqdm import tqdm

    cases = tqdm(list(cases), unit="case", dynamic_ncols=True, disable=None)
    copies: dict[tuple[int, str], float] = {}  # a copy's seconds, which depend on no more than these
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    rows = []
    try:
        for case in cases:
            cases.set_description(f"{case.op} {'x'.join(map(str, case.shape))} {case.layout} {case.what}")
            check(case)
            row = Row(case.op, case.shape, case.layout, case.dtype, case.what, 0, 0, 0, case.floor)
            key = (case.copy_bytes, case.layout)
            if device == "cuda":
                ours_s = time_cuda(case.ours, seconds)
                row.warm_ms = (
                    1e3 * Timer("run()", globals={"run": case.ours}).blocked_autorange(min_run_time=0.05).median
                )
                for name, theirs in case.theirs.items():
                    row.their_ms[name] = time_cuda(theirs, seconds) * 1e3
                    row.speedup[name] = row.their_ms[name] / (ours_s * 1e3)
                if key not in copies:
                    copies[key] = time_cuda(case.copy, 0.1)
                copy_s = copies[key]
            else:
                row.extra_mb = max(0, peak_bytes(case.ours) - result_bytes(case.ours())) / 1e6
                for name, theirs in case.theirs.items():
                    ours_s, theirs_s, row.speedup[name] = time_cpu(case.ours, theirs, threads, seconds)
                    row.their_ms[name] = theirs_s * 1e3
                copy_s = time_cpu(case.copy, case.copy, threads, 0.05)[0]
            row.ms = ours_s * 1e3
            row.gb_per_s = case.floor / row.ms / 1e6
            row.share_of_copy = row.gb_per_s / (case.copy_bytes / copy_s / 1e9)
            rows.append(row)
            if done:
                done(row)
    finally:
        torch.set_num_threads(before)
    return rows


# ---- Reporting ------------------------------------------------------------------------------------------------------


def machine(device: str, threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    import fastnorm

    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    about = {
        "cpu": name,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "fastnorm": fastnorm.__version__,
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }
    if device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return about


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    others = list(dict.fromkeys(name for row in rows for name in row.speedup))
    head = ["op", "shape", "layout", "dtype", "what", "ms", *(f"vs {o}" for o in others), "GB/s", "of copy", "extra MB"]
    body = [
        [
            row.op,
            "x".join(map(str, row.shape)),
            row.layout,
            row.dtype,
            row.what,
            f"{row.ms:.3f}",
            *(f"{row.speedup[o]:.2f}x" if o in row.speedup else "-" for o in others),
            f"{row.gb_per_s:.0f}",
            f"{row.share_of_copy:.0%}",
            "-" if row.extra_mb is None else f"{row.extra_mb:.1f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    left = 5  # columns of text; the others are numbers

    def line(cells: list[str]) -> str:
        return "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        )

    return "\n".join([line(head), *map(line, body)])


def write_json(path: str, rows: list[Row], about: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps({"machine": about, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")


def plot(path: str, rows: list[Row], about: dict[str, Any]) -> None:
    """Speed-up bars, and every case's bandwidth against the copy's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, roof) = plt.subplots(
        1, 2, figsize=(15, 2 + 0.24 * len(rows)), width_ratios=(2, 1), layout="constrained"
    )
    names = [f"{r.op} {'x'.join(map(str, r.shape))} {r.layout} {r.dtype} {r.what}" for r in rows]
    others = list(dict.fromkeys(name for row in rows for name in row.speedup))
    height = 0.8 / len(others)
    for k, other in enumerate(others):
        places = [i + (k - (len(others) - 1) / 2) * height for i in range(len(rows))]
        drawn = bars.barh(places, [r.speedup.get(other, 0) for r in rows], height, label=f"against {other}")
        bars.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
    bars.set_yticks(range(len(rows)), names, fontsize=7)
    bars.invert_yaxis()
    bars.axvline(1, color="black", linewidth=0.8)
    bars.set_xlabel("speed-up (times faster)")
    bars.legend(loc="lower right")
    roof.set_title("bandwidth, as a share of a copy")
    for layout in dict.fromkeys(r.layout for r in rows):
        chosen = [r for r in rows if r.layout == layout]
        roof.scatter([r.floor / 1e6 for r in chosen], [r.share_of_copy for r in chosen], label=layout, s=18)
    roof.axhline(1, color="black", linewidth=0.8)
    roof.set_xscale("log")
    roof.set_ylim(bottom=0)
    roof.set_xlabel("bytes that have to be moved (MB)")
    roof.legend()
    figure.suptitle(", ".join(f"{k} {v}" for k, v in about.items()), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
