"""The GPU path without a GPU: cases_*.py run in processes that see a CUDA which is not there."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import gpu_checks
import pytest
import torch
from helpers_cuda import build_library

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    if not shutil.which("g++"):
        warnings.warn("NO C++ COMPILER: NOTHING CHECKS THE GPU PATH. Install g++.", stacklevel=1)
        pytest.skip("needs g++")
    return build_library(tmp_path_factory.mktemp("cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("cases", ["cases_cuda.py", "cases_memory.py"])
def test_whole_steps_on_a_cuda_that_is_not_there(cases, library):
    environment = {
        **os.environ,
        "NO_CUDA": str(library),
        "PYTHONPATH": f"{HERE}:{HERE.parent}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "helpers_cuda", str(HERE / cases)]
    run = subprocess.run(command, cwd=HERE.parent, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert " passed" in run.stdout and "skipped" not in run.stdout


@pytest.mark.slow
def test_what_a_gpu_has_to_show_runs_on_a_cpu():
    line = gpu_checks.measure("tiny", "false", torch.device("cpu"))
    assert "peak nan GB, planned 0.1; loss" in line and "loss nan" not in line
