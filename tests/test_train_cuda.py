"""The GPU path without a GPU: cases_cuda.py runs in a process that sees a CUDA which is not there."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from helpers_cuda import build_library

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if not shutil.which("g++"):
        warnings.warn("NO C++ COMPILER: NOTHING CHECKS THE GPU PATH. Install g++.", stacklevel=1)
        pytest.skip("needs g++")
    return build_library(tmp_path_factory.mktemp("cuda"))


@pytest.mark.slow
def test_whole_steps_on_a_cuda_that_is_not_there(library):
    environment = {**os.environ, "NO_CUDA": str(library), "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "helpers_cuda", str(HERE / "cases_cuda.py")]
    run = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout
