#!/usr/bin/env bash
# The gate: correctness of every kernel on the GPU here, then timings and memory, in 9 minutes.
# Needs torch, triton, transformers and pytest, and a C compiler for triton's launchers; no network,
# nothing installed. $1: the folder for the results; more goes to bench/gpu/gate.py. $PYTHON: the
# interpreter (python3).
set -euo pipefail
python=${PYTHON:-python3}
output=$(realpath -m "${1:-$(dirname "$0")/results/gpu}")
cd "$(dirname "$0")/.."
if ! "$python" -c "import torch, triton, transformers, pytest" 2>/dev/null; then
    echo "$0: expected torch, triton, transformers and pytest in $python; PYTHON= names another" >&2
    exit 2
fi
export PYTHONPATH=.:python${PYTHONPATH:+:$PYTHONPATH}
exec "$python" -m bench.gpu.gate --output "$output" "${@:2}"
