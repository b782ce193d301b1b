#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# The demo's draft head, made on one GPU in minutes: the target chats with itself for some minutes,
# then a head is trained on that, from the weights of an older one, with a larger draft vocabulary.
# Needs speculators, and no vLLM.
#
#     scripts/gpu_demo_head.sh TARGET HEAD OLD_HEAD
#
# Environment: PYTHON; PROMPTS (a file of prompts, made by scripts/demo_prompts.py if not given),
# ANSWER_SECONDS (190), MORE_ROWS (a file of rows to train on besides), HOURS of training (0.1),
# DRAFT_VOCAB (16384), BATCH_TOKENS (16384), LEARNING_RATE (1.5e-3), KEEP_GB (45) of hidden states in
# the GPU's memory.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly TARGET=$1 HEAD=$2 OLD_HEAD=$3
readonly PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

say() { printf '[head %3d s] %s\n' "$SECONDS" "$*"; }
drafter() { "$PYTHON" -m echo_vllm.cli train-drafter "$@"; }

mkdir -p "$HEAD.data"
prompts=${PROMPTS:-$HEAD.data/prompts.jsonl}
if [[ -z ${PROMPTS:-} ]]; then
  "$PYTHON" scripts/demo_prompts.py --count 45000 --seed 2 --library --wide >"$prompts"
fi
say "answers"
"$PYTHON" scripts/gpu_answers.py "$TARGET" --prompts "$prompts" \
  --seconds "${ANSWER_SECONDS:-190}" --seed 2 -o "$HEAD.data/rows.jsonl"
if [[ -n ${MORE_ROWS:-} ]]; then
  cat "$MORE_ROWS" >>"$HEAD.data/rows.jsonl"
fi
say "rows"
drafter data "$TARGET" -o "$HEAD" --rows "$HEAD.data/rows.jsonl"
say "training"
drafter train "$TARGET" -o "$HEAD" --init "$OLD_HEAD" --dtype bfloat16 --keep-gb "${KEEP_GB:-45}" \
  --epochs 100 --hours "${HOURS:-0.1}" --batch-tokens "${BATCH_TOKENS:-16384}" \
  --learning-rate "${LEARNING_RATE:-1.5e-3}" --ttt-steps 4 --held-out 0.01 \
  --draft-vocab "${DRAFT_VOCAB:-16384}" --checkpoint-minutes 1
say "done"
