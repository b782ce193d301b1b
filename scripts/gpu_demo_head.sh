#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# The demo's draft head, made on one GPU in minutes: the target chats with itself for some seconds,
# then a head is trained on that, from the weights of an older one. Needs speculators, and no vLLM.
#
#     scripts/gpu_demo_head.sh TARGET HEAD OLD_HEAD
#
# Environment: PYTHON, ANSWER_SECONDS (65), HOURS of training (0.036), MORE_ROWS (a file of rows to
# train on besides).

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TARGET=$1 HEAD=$2 OLD_HEAD=$3
readonly PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '[head %3d s] %s\n' "$SECONDS" "$*"; }
drafter() { "$PYTHON" -m echo_vllm.cli train-drafter "$@"; }

mkdir -p "$HEAD.data"
"$PYTHON" scripts/demo_prompts.py --count 12000 --seed 1 --library >"$HEAD.data/prompts.jsonl"
say "answers"
"$PYTHON" scripts/gpu_answers.py "$TARGET" --prompts "$HEAD.data/prompts.jsonl" \
  --seconds "${ANSWER_SECONDS:-65}" --seed 1 -o "$HEAD.data/rows.jsonl"
if [[ -n ${MORE_ROWS:-} ]]; then
  cat "$MORE_ROWS" >>"$HEAD.data/rows.jsonl"
fi
drafter data "$TARGET" -o "$HEAD" --rows "$HEAD.data/rows.jsonl"
say "training"
drafter train "$TARGET" -o "$HEAD" --init "$OLD_HEAD" --dtype bfloat16 --keep-gb 0 --epochs 100 \
  --hours "${HOURS:-0.036}" --batch-tokens 4096 --learning-rate 8e-4 --ttt-steps 4 \
  --held-out 0.02 --draft-vocab 8192 --checkpoint-minutes 0.7
say "done"
