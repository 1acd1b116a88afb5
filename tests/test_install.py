"""What a user reads where an installation is wrong; and that what is installed does not tell where it was built."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import instruction_sets

import fastnorm

PACKAGE = Path(fastnorm.__file__).parent
ROOT = Path(__file__).parents[1]


def import_copy(tmp_path, environment, with_extension=True, build=None):
    """Imports a copy of the package that lacks the extension, or says that it was built for something else."""
    target = tmp_path / "fastnorm"
    ignored = shutil.ignore_patterns("__pycache__", *([] if with_extension else ["_C.*"]), "_build.json")
    shutil.copytree(PACKAGE, target, ignore=ignored)
    if build:
        (target / "_build.json").write_text(json.dumps(build))
    environment = environment | {"PYTHONPATH": str(tmp_path)}
    # Without the finder of an editable installation, which would find what the copy lacks.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; import fastnorm"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    return result.stderr.strip().splitlines()[-1]


def test_built_for_another_torch(tmp_path, subprocess_environment):
    line = import_copy(tmp_path, subprocess_environment, build={"torch": "1.2.3+cpu"})
    assert line.startswith("ImportError: fastnorm was built for torch 1.2.3+cpu, but torch")
    assert torch.__version__ in line and "pip install --no-build-isolation" in line


def test_not_built(tmp_path, subprocess_environment):
    line = import_copy(tmp_path, subprocess_environment, with_extension=False)
    assert line.startswith("ImportError: fastnorm's extension is not built")
    assert torch.__version__ in line and "pip install --no-build-isolation" in line


def test_extension_that_does_not_load(tmp_path, subprocess_environment):
    build = {"torch": torch.__version__}
    line = import_copy(tmp_path, subprocess_environment, with_extension=False, build=build)
    assert line.startswith("ImportError: fastnorm's extension, built for torch") and "Rebuild it" in line


def run_setup(tmp_path, *options, **environment):
    """setup.py in an empty copy of the source folder; returns its exit status and last line."""
    shutil.copy(ROOT / "setup.py", tmp_path / "setup.py")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    (tmp_path / "fastnorm/nn").mkdir(parents=True)
    for extra in ("README.md", "LICENSE", "fastnorm/__init__.py", "fastnorm/nn/__init__.py"):
        (tmp_path / extra).touch()
    command = [sys.executable, *options, "setup.py", "build_ext", "--inplace"]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)} | environment
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]


def test_missing_torch_is_one_line(tmp_path):
    blocker = tmp_path / "blocker/torch"
    blocker.mkdir(parents=True)
    (blocker / "__init__.py").write_text("raise ImportError('hidden, as by build isolation')")
    line = run_setup(tmp_path, PYTHONPATH=str(blocker.parent))
    assert line.startswith("fastnorm: building needs torch") and "--no-build-isolation" in line


def test_missing_compiler_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    line = run_setup(tmp_path, PATH=str(tmp_path / "empty"), FASTNORM_CUDA="0")
    assert line.startswith("fastnorm: no C++ compiler was found") and "To mend it" in line


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built for CUDA")
def test_cuda_wanted_without_a_cuda_torch_is_one_line(tmp_path):
    line = run_setup(tmp_path, FASTNORM_CUDA="1")
    assert line.startswith("fastnorm: FASTNORM_CUDA=1, but there is no") and "To mend it" in line


def test_the_extension_holds_no_paths_of_this_machine():
    contents = Path(fastnorm._library.extension.__file__).read_bytes()
    folders = {str(ROOT), str(Path(torch.__file__).parents[1]), str(Path.home())} - {"/"}
    found = [f for f in folders if len(f) > 5 and re.search(re.escape(f.encode()) + rb"/", contents)]
    assert not found


def test_info_names_what_is_in_use():
    info = fastnorm.info()
    assert info["torch"] == torch.__version__ and info["threads"] == torch.get_num_threads()
    assert info["cpu_isa"] in info["cpu_isas"] and info["built_for_torch"] and info["compiler"]


@pytest.mark.parametrize("isa", instruction_sets())
def test_the_environment_or_a_test_chooses_the_instruction_set(isa, subprocess_environment):
    extension, chosen = fastnorm._library.extension, fastnorm.info()["cpu_isa"]
    try:
        extension.force_isa(isa)
        assert fastnorm.info()["cpu_isa"] == isa
    finally:
        extension.force_isa(None)
    assert fastnorm.info()["cpu_isa"] == chosen
    command = [sys.executable, "-c", "import fastnorm; print(fastnorm.info()['cpu_isa'])"]
    environment = subprocess_environment | {"ATEN_CPU_CAPABILITY": isa.lower()}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.split()[-1:] == [isa], result.stderr[-2000:]


def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match="this processor has no AVX1024"):
        fastnorm._library.extension.force_isa("AVX1024")


def test_the_command_prints_it(subprocess_environment):
    result = subprocess.run(
        [sys.executable, "-m", "fastnorm"], env=subprocess_environment, capture_output=True, text=True
    )
    assert result.returncode == 0 and torch.__version__ in result.stdout and "cpu isa" in result.stdout
