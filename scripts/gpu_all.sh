#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Everything that needs a GPU, in one go of at most ten minutes: build; then, side by side, tests/gpu,
# Triton's tests and compute-sanitizer over the kernels' tests; then the benchmarks, alone. Runs without
# network and without a set-up checkout. What needs the engine needs vLLM 0.32.0 for CUDA, to whose
# files it applies this project's patches.
#
#     scripts/gpu_all.sh           # all of the stages below
#     scripts/gpu_all.sh STAGE...  # of: tests triton sanitizer engine benchmarks engine-benchmark
#
# Environment: VLLM_USE_FLASHINFER_SAMPLER=0 where FlashInfer is missing, PYTHON (an interpreter with a
# CUDA build of torch, pytest and hypothesis; with pytest-xdist it is quicker), OUT (a folder for
# results; what is there when time runs out is kept), ECHO_CUDA_ARCHS, LIMIT (seconds in all),
# ENGINE_BENCHMARK (options of benchmarks.gpu_engine). In OUT are summary.txt, the benchmarks' *.json
# and logs.tar.gz.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON="${PYTHON:-python3}"
readonly OUT="${OUT:-.build/gpu}"
readonly LIMIT="${LIMIT:-580}"
export ECHO_CUDA=1
readonly STAGES="${*:-tests triton sanitizer engine benchmarks engine-benchmark}"
readonly LOGS=.build/gpu-logs

# shellcheck source=scripts/gpu_stages.sh
source scripts/gpu_stages.sh

# pytest without the project's settings, which ask for plug-ins.
readonly PYTEST=("$PYTHON" -m pytest -c /dev/null --rootdir . --import-mode importlib -q
  -p no:cacheprovider)
many=()
"$PYTHON" -c 'import xdist' 2>/dev/null && many=(-n 4)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# sanitize TOOL OPTION...
sanitize() {
  local tool=$1 sanitizer
  shift
  sanitizer=$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)
  if [[ ! -x $sanitizer ]]; then
    echo "$tool: skipped, compute-sanitizer was not found" | tee -a "$OUT/summary.txt"
    return
  fi
  # The caching allocator would hide an access behind the end of a tensor.
  # Calls of torch and CUDA's own libraries that return an error are not what is looked for.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 150 "$sanitizer" --tool "$tool" \
    --report-api-errors no --error-exitcode 9 --target-processes all "$@" \
    "${PYTEST[@]}" tests/gpu/test_kernels.py -k sanitized
}

begin
build
with_engine=0
if wanted engine engine-benchmark; then
  patch_vllm && with_engine=1
fi

if wanted tests; then
  stage tests 240 "${PYTEST[@]}" "${many[@]}" tests/gpu/test_kernels.py \
    --junitxml="$LOGS/tests.xml" &
fi
if wanted triton; then
  stage triton 200 "${PYTEST[@]}" tests/triton/test_triton.py -k on_a_gpu &
fi
if wanted sanitizer; then
  sanitize memcheck --kernel-regex kns=echo_vllm &
  sanitize racecheck --kernel-regex kns=echo_vllm &
  sanitize initcheck & # it must see torch's kernels too, which write what ours read
fi
if wanted engine && ((with_engine)); then
  stage engine 300 "${PYTEST[@]}" "${many[@]}" tests/gpu/test_engine.py \
    --junitxml="$LOGS/engine.xml" &
fi
wait

if wanted benchmarks; then
  stage benchmarks 120 "$PYTHON" -m benchmarks.gpu --out "$OUT/benchmarks.json" \
    --table "$OUT/attention-table.json" --seconds 70
fi
if wanted engine-benchmark && ((with_engine)); then
  # shellcheck disable=SC2086  # several options
  stage engine-benchmark 300 "$PYTHON" -m benchmarks.gpu_engine --out "$OUT/engine.json" \
    ${ENGINE_BENCHMARK:-}
fi

conclude
