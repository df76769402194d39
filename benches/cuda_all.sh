#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one call: the tests marked `cuda`, then the benchmark of
# capturing from it. Takes a few minutes. `PYTHON` is the interpreter that has lamina.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
[ -x "$(command -v "$PYTHON")" ] || PYTHON=python3
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch finds no NVIDIA GPU"; print(torch.__version__, torch.cuda.get_device_name())'
"$PYTHON" -m pytest -m cuda -ra --timeout 300 tests
PYTHONPATH=benches "$PYTHON" benches/cuda_capture.py "$@"
