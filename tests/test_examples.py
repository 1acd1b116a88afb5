"""Every example runs in its short setting; each asserts its finding itself."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NEEDS_OPS = {"detection"}
NAMES = sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem not in ("common", "demo"))


@pytest.mark.parametrize("name", NAMES)
def test_example(name, tmp_path, subprocess_environment):
    if name in NEEDS_OPS and importlib.util.find_spec("fastnorm.ops") is None:
        pytest.skip("fastnorm.ops is not there")
    plot = tmp_path / "plot.png"
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--quick", "--plot", plot], cwd=tmp_path, capture_output=True,
        text=True, env=subprocess_environment | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "found: " in result.stdout and "NOT found" not in result.stdout
    assert plot.read_bytes()[:4] == b"\x89PNG"
    assert "100%" in result.stderr  # the progress bar
