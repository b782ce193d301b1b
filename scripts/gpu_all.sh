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

# wanted STAGE...: whether one of them is.
wanted() {
  local name
  for name in "$@"; do
    [[ " $STAGES " == *" $name "* ]] && return
  done
  return 1
}

say() { printf '[gpu %3d s] %s\n' "$SECONDS" "$*"; }

# stage NAME SECONDS COMMAND...: its output goes to $LOGS/NAME.log and the result to summary.txt.
stage() {
  local name=$1 most=$2 left=$((LIMIT - SECONDS)) begin=$SECONDS code=0
  shift 2
  ((left < most)) && most=$left
  if ((most < 5)); then
    echo "$name: not run, no time left" | tee -a "$OUT/summary.txt"
    return 1
  fi
  say "$name (at most $most s)"
  timeout --kill-after=5 "$most" "$@" >"$LOGS/$name.log" 2>&1 || code=$?
  echo "$name: exit $code after $((SECONDS - begin)) s; $(tail -n 1 "$LOGS/$name.log" | cut -c 1-200)" |
    tee -a "$OUT/summary.txt"
  return "$code"
}

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

mkdir -p "$OUT" "$LOGS"
: >"$OUT/summary.txt"
trap 'tar -C "$LOGS" -czf "$OUT/logs.tar.gz" .' EXIT
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA GPU"' || exit 1
{
  nvidia-smi
  "$PYTHON" -c 'import torch; print(torch.__version__, torch.version.cuda)'
} >"$LOGS/machine.txt" 2>&1

if [[ -z ${ECHO_CUDA_ARCHS:-} ]]; then
  ECHO_CUDA_ARCHS=$("$PYTHON" -c 'import torch
major, minor = torch.cuda.get_device_capability()
print(f"{major}{minor}" + ("a" if major == 9 else ""))')
  export ECHO_CUDA_ARCHS
fi

# The entry points, by which vLLM finds the plug-in.
"$PYTHON" setup.py -q egg_info >"$LOGS/egg-info.log" 2>&1 || exit 1
stage build 300 "$PYTHON" setup.py build_ext --inplace || exit 1

with_engine=0
if wanted engine engine-benchmark; then
  if missing=$("$PYTHON" -c 'import vllm.v1.worker.gpu_model_runner' 2>&1); then
    stage patches 30 "$PYTHON" -c 'from echo_vllm.patching import *
print(PatchState(find_installation(), load_series()).apply()[0])' && with_engine=1
  else
    echo "engine: not run, vLLM cannot be imported: ${missing##*$'\n'}" | tee -a "$OUT/summary.txt"
  fi
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

if grep -E "exit [1-9]|not run" "$OUT/summary.txt"; then
  say "not all is good"
  exit 1
fi
say "all good"
