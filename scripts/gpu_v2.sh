#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Model Runner V2 on an H100 or H200, in one go of at most ten minutes: build and patches, then one part
# after the other, alone on the GPU. A part that fails or runs out of time does not stop the next one,
# and leaves what it had. Runs without network; needs vLLM 0.32.0 for CUDA.
#
#     scripts/gpu_v2.sh           # all of the parts below
#     scripts/gpu_v2.sh PART...   # of: exact demo shape rest table
#     DRY=1 scripts/gpu_v2.sh     # on a CPU: the same commands on a tiny model, whose times say nothing
#
#   exact  greedy and seeded tokens of every policy against plain V2's, in full CUDA graphs
#   demo   tokens a second of the demo's pair at 1 to 256 requests: plain, vLLM's chains of 1 and 3 and its
#          adaptive verification, our chain, topn, echo and auto            demo.json
#   shape  the same with dummy weights in Llama-3.1-8B's shape at 1 to 128  shape.json
#   rest   the time of steps that may not draft over plain decoding's       rest.json
#   table  the attention table of this GPU                                  attention-table.json, attention.json
#
# Environment: PYTHON (an interpreter with a CUDA build of torch, pytest and hypothesis; with pytest-xdist
# it is quicker), OUT (a folder for results), LIMIT (seconds in all), ECHO_CUDA_ARCHS,
# VLLM_USE_FLASHINFER_SAMPLER=0 where FlashInfer is missing. In OUT are summary.txt, logs.tar.gz and the
# files above.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly PYTHON="${PYTHON:-python3}"
readonly OUT="${OUT:-.build/gpu-v2}"
readonly LIMIT="${LIMIT:-590}"
export DRY="${DRY:-}"
PATIENCE=1
[[ -n $DRY ]] && PATIENCE=8
readonly STAGES="${*:-exact demo shape rest table}"
readonly LOGS=.build/gpu-v2-logs
export VLLM_USE_V2_MODEL_RUNNER=1 VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
# shellcheck source=scripts/gpu_stages.sh
source scripts/gpu_stages.sh

begin
readonly PYTEST=(-m pytest -c /dev/null --rootdir . --import-mode importlib -v -p no:cacheprovider
  --tb=short tests/gpu/test_engine_v2.py)
if [[ -n $DRY ]]; then
  readonly RUN=("$PYTHON" -m tests.v2.on_cpu)
  "$PYTHON" -c 'import sys
from pathlib import Path
from tests.engine.tiny import Shape, make_head, make_target
folder, shape = Path(sys.argv[1]), Shape()
if not folder.is_dir():
    folder.mkdir(parents=True)
    make_target(folder / "target", shape)
    make_head(folder / "head", shape)' "$LOGS/tiny" || exit 1
  few=(-k "every_policy and topn")
  model=(--model "$LOGS/tiny/target" --head "$LOGS/tiny/head" --dtype float32 --max-model-len 256
    --vocab 12)
  small=(--requests 1,2 --tokens 8 --rounds 1 --threads 1 --seconds 700)
  demo=("${model[@]}" "${small[@]}" --configs eagle3-k3,auto)
  shape=("${model[@]}" "${small[@]}" --configs topn-8)
  rest=("${model[@]}" --requests 2 --steps 10 --rounds 2 --threads 1)
else
  readonly RUN=("$PYTHON")
  export ECHO_CUDA=1
  build
  patch_vllm || exit 1
  few=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && few=(-n 5 --dist load)
  demo=(--compile --requests 1,4,16,64,256)
  shape=(--compile --shape llama-8b --requests 1,8,32,128 --tokens 64)
  rest=(--requests 1,8,32,128 --steps 200 --rounds 4 --compile --dtype bfloat16 --threads 4)
fi

# part NAME SECONDS COMMAND...: a stage, which may take longer on a CPU.
part() {
  local name=$1 most=$2
  shift 2
  wanted "$name" && stage "$name" "$((most * PATIENCE))" "$@"
}

# A benchmark starts nothing new some time before its part ends.
part exact 100 "${RUN[@]}" "${PYTEST[@]}" "${few[@]}"
part demo 120 "${RUN[@]}" -m benchmarks.gpu_v2 --seconds 100 "${demo[@]}" --out "$OUT/demo.json"
part shape 175 "${RUN[@]}" -m benchmarks.gpu_v2 --seconds 155 "${shape[@]}" --out "$OUT/shape.json"
part rest 60 "${RUN[@]}" -m benchmarks.rest_cost "${rest[@]}" --json "$OUT/rest.json"
if [[ -z $DRY ]]; then
  part table 55 "$PYTHON" -m benchmarks.gpu --out "$OUT/attention.json" \
    --table "$OUT/attention-table.json" --seconds 40
fi
conclude
