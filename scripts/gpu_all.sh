#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Everything that needs a GPU, in one go of at most ten minutes: build, tests/gpu, Triton's,
# compute-sanitizer over the kernels' tests, benchmarks; and the engine, which takes a call of its
# own. Runs without network and without a set-up checkout. The engine needs vLLM 0.32.0 for CUDA, to
# whose files it applies this project's patches.
#
#     scripts/gpu_all.sh           # build, tests, triton, sanitizer, benchmarks
#     scripts/gpu_all.sh engine    # build, the engine's tests and benchmark
#     scripts/gpu_all.sh STAGE...  # of: tests triton sanitizer benchmarks engine
#
# Environment: PYTHON (an interpreter with a CUDA build of torch, pytest and hypothesis), OUT (a
# folder for results; what is there when time runs out is kept), ECHO_CUDA_ARCHS, LIMIT (seconds in
# all). In OUT are summary.txt, the benchmarks' *.json and logs.tar.gz.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON="${PYTHON:-python3}"
readonly OUT="${OUT:-.build/gpu}"
readonly LIMIT="${LIMIT:-580}"
export ECHO_CUDA=1
readonly STAGES="${*:-tests triton sanitizer benchmarks}"
readonly LOGS=.build/gpu-logs
failed=()

# wanted STAGE
wanted() { [[ " $STAGES " == *" $1 "* ]]; }

say() { printf '[gpu %3d s] %s\n' "$SECONDS" "$*"; }

# stage NAME SECONDS COMMAND...: its output goes to $LOGS/NAME.log and the result to summary.txt.
stage() {
  local name=$1 most=$2 left=$((LIMIT - SECONDS)) begin=$SECONDS code=0
  shift 2
  ((left < most)) && most=$left
  if ((most < 5)); then
    say "$name: no time left"
    echo "$name: not run, no time left" >>"$OUT/summary.txt"
    failed+=("$name")
    return 1
  fi
  say "$name (at most $most s)"
  timeout --kill-after=5 "$most" "$@" >"$LOGS/$name.log" 2>&1 || code=$?
  echo "$name: exit $code after $((SECONDS - begin)) s" | tee -a "$OUT/summary.txt"
  tail -n 15 "$LOGS/$name.log"
  tar -C "$LOGS" -czf "$OUT/logs.tar.gz" .
  ((code == 0)) || failed+=("$name")
  return "$code"
}

# pytest without the project's settings, which ask for plug-ins.
readonly PYTEST=("$PYTHON" -m pytest -c /dev/null --rootdir . --import-mode importlib -q
  -p no:cacheprovider)
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
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 stage "$tool" 60 "$sanitizer" --tool "$tool" \
    --report-api-errors no --error-exitcode 9 --target-processes all "$@" "${PYTEST[@]}" tests/gpu/test_kernels.py -k sanitized
}

# The real engine: its exactness first, then the price of a tree step.
engine() {
  local missing
  if ! missing=$("$PYTHON" -c 'import vllm.v1.worker.gpu_model_runner' 2>&1); then
    echo "engine: not run, vLLM cannot be imported: ${missing##*$'\n'}" | tee -a "$OUT/summary.txt"
    return
  fi
  stage patches 30 "$PYTHON" -c 'from echo_vllm.patching import *
print(PatchState(find_installation(), load_series()).apply()[0])' || return
  stage engine-tests 240 "${PYTEST[@]}" tests/gpu/test_engine.py --junitxml="$LOGS/engine.xml"
  stage engine-benchmark 300 "$PYTHON" -m benchmarks.gpu_engine --out "$OUT/engine.json"
}

mkdir -p "$OUT" "$LOGS"
: >"$OUT/summary.txt"
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

stage build 240 "$PYTHON" setup.py build_ext --inplace || exit 1
if wanted tests; then
  stage tests 150 "${PYTEST[@]}" tests/gpu/test_kernels.py --junitxml="$LOGS/tests.xml"
fi
if wanted triton; then
  stage triton 100 "${PYTEST[@]}" tests/triton/test_triton.py -k on_a_gpu
fi
if wanted sanitizer; then
  sanitize memcheck --kernel-regex kns=echo_vllm
  sanitize racecheck --kernel-regex kns=echo_vllm
  sanitize initcheck # it must see torch's kernels too, which write what ours read
fi
if wanted benchmarks; then
  stage benchmarks 120 "$PYTHON" -m benchmarks.gpu --out "$OUT/benchmarks.json" \
    --table "$OUT/attention-table.json" --seconds 70
fi
if wanted engine; then
  engine
fi

if ((${#failed[@]})); then
  say "failed: ${failed[*]}"
  exit 1
fi
say "all good"
