#!/usr/bin/env bash
# Ten minutes on one GPU of 40 GB or more, for what nothing else can show. Its lines belong into LOG.md.
#     PYTHON=.venv/bin/python bash tests/gpu.sh | tee gpu.log
# In turn: gradients against the CPU, documents by kernel and by mask, compiled against eager, experts without
# tokens (the tests marked cuda); then no step may wait for the device, the memory taken beside the memory
# planned, and the step times of three presets with random weights.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python}"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
timeout 240 "$python" -m pytest -q -m cuda tests
timeout 360 "$python" tests/gpu_checks.py siglip2-qwen2.5-0.5b siglip2-qwen2.5-1.5b llava-1.5-vicuna
