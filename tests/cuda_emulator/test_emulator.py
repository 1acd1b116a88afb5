"""The emulator itself, on small kernels (cases.cu): right ones run in every schedule, wrong ones are caught."""

import os
import re
import subprocess

import pytest

from . import SCHEDULES, build

pytestmark = pytest.mark.skipif(build.unavailable_reason() is not None, reason=str(build.unavailable_reason()))

RIGHT = ["shuffles", "barriers", "clusters", "last_block", "async_copies", "bad_launches"]

# What every schedule and variant catches, and what it says.
MISUSE = {
    "divergent_barrier": r"cases.cu:\d+: __syncthreads() not reached by all threads",
    "two_barriers": r"cases.cu:\d+: __syncthreads() while other threads are in __syncthreads() at cases.cu:\d+",
    "divergent_shuffle": r"16 threads wait in __shfl_sync() at cases.cu:\d+, 16 threads wait in __syncthreads()",
    "foreign_mask": "__syncwarp() with a mask that lacks the calling lane",
    "early_peer": "cluster_shared() before a first cluster_sync()",
    "arrive_only": "cluster_arrive_relaxed() without a cluster_wait()",
    "too_much_shared": "more than 48 KB of static shared memory",
    "trap": "__trap(), block (1, 0, 0), thread (2, 0, 0)",
}

# What needs one of the sanitizers.
SANITIZED = {
    "address": {
        "past_shared": "heap-buffer-overflow",
        "past_global": "heap-buffer-overflow",
        "misaligned": "misaligned address",
    },
    "thread": {
        "missing_barrier": "data race",
        "two_blocks_one_output": "data race",
        "missing_fence": "data race",
        "late_peer": r"data race|cluster_shared() of a block that has ended",
    },
}


@pytest.fixture(scope="module", params=build.VARIANTS)
def variant(request):
    return request.param


def run_case(variant: str, case: str, schedule: str, seed: int = 1, blocks_at_once: int = 1) -> tuple[bool, str]:
    try:
        program = build.build_cases(variant)
    except RuntimeError as error:
        if variant != "plain" and "cannot find" in str(error):
            pytest.skip(f"the compiler has no {variant} sanitizer")
        raise
    command = [program, case, str(SCHEDULES.index(schedule)), str(seed), str(blocks_at_once)]
    environment = {**os.environ, **build.sanitizer_environment(variant)}
    environment.pop("LD_PRELOAD", None)  # the program itself is linked with the sanitizer
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    return result.returncode == 0, result.stdout + result.stderr


def matches(pattern: str, output: str) -> bool:
    return re.search(pattern.replace("(", r"\(").replace(")", r"\)"), output) is not None


@pytest.mark.parametrize("case", RIGHT)
def test_right_kernels(variant, case):
    for schedule, seed, blocks in [("forward", 1, 1), ("reverse", 1, 3), ("random", 1, 1), ("random", 2, 3)]:
        good, output = run_case(variant, case, schedule, seed, blocks)
        assert good and output == "ok\n", (schedule, seed, blocks, output)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", MISUSE)
def test_misuse(variant, case, schedule):
    good, output = run_case(variant, case, schedule)
    assert not good and matches(MISUSE[case], output), output
    assert "Sanitizer" not in output  # which has nothing to report where the emulator stops


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("sanitizer", "case"), [(s, case) for s, cases in SANITIZED.items() for case in cases])
def test_sanitizers(sanitizer, case, schedule):
    good, output = run_case(sanitizer, case, schedule)
    assert not good and matches(SANITIZED[sanitizer][case], output), output


def test_a_missing_barrier_gives_a_wrong_result_in_some_schedule():
    results = {run_case("plain", "missing_barrier", schedule)[1] for schedule in SCHEDULES}
    assert "wrong result\n" in results


def test_schedules_differ_and_repeat():
    traces = [run_case("plain", "trace", schedule, seed)[1] for schedule in SCHEDULES for seed in (1, 1, 2)]
    forward, reverse, random, other_seed = traces[0], traces[3], traces[6], traces[8]
    assert traces[0] == traces[1] == traces[2] and traces[3] == traces[5] and traces[6] == traces[7]
    assert len({forward, reverse, random, other_seed}) == 4
    assert forward.splitlines()[-1] == "ok"
