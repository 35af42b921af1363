#!/usr/bin/env bash
# Show where a step's time goes. With a GPU and nsys, Nsight Systems shows the library's ranges; otherwise torch.profiler runs.
#
#     benchmarks/profile.sh [arguments of benchmarks/profiled.py]
#
# Nsight writes profile/guided.nsys-rep, and prints the sums of time by range, on the host and projected on the GPU.
# No GPU has run the Nsight half yet (docs/gpu.md).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if command -v nsys > /dev/null && "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then
  mkdir -p profile
  export GENARM_FAST_NVTX=1
  nsys profile --trace=cuda,nvtx,osrt --cuda-graph-trace=node --force-overwrite=true --output=profile/guided \
    "$python" benchmarks/profiled.py --nsight "$@"
  nsys stats --report nvtx_sum,nvtx_gpu_proj_sum,cuda_gpu_kern_sum profile/guided.nsys-rep
else
  "$python" benchmarks/profiled.py "$@"
fi
