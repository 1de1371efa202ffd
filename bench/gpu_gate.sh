#!/usr/bin/env bash
# The gate: correctness of every kernel on the GPU here, then timings and memory, in 9 minutes.
# Needs torch, triton, transformers and pytest; no network, nothing installed. Results: $1.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=.:python
python3 -c "import torch, triton, transformers, pytest" || exit 2
exec python3 -m bench.gpu_gate --output "${1:-bench/results/gpu}"
