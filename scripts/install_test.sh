#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Installs what `make wheel` made as a user would, with pip into a fresh environment and outside of
# the checkout: echo-vllm[cpu] from the wheel, the patches, `doctor`, `vllm serve` with trees and one
# answer; then the same wheel built from the source distribution. Called by `make install-test`.
#
# Environment: PYTHON (an interpreter), PORT, TORCH_INDEX (one with PyTorch's builds for CPUs, such
# as https://download.pytorch.org/whl/cpu; without it, what `doctor` says is done).

set -euo pipefail
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
readonly checkout PORT=${PORT:-8011}
readonly target=$checkout/models/smollm2-135m-instruct head=$checkout/models/smollm2-135m-eagle3
folder=$(mktemp -d)
server=
trap '[[ -z $server ]] || kill "$server" 2>/dev/null; wait; rm -rf "$folder"' EXIT

say() { printf '[install-test] %s\n' "$*"; }

cd "$folder"
wheel=$(ls -t "$checkout"/dist/echo_vllm-*.whl | head -1)
archive=$(ls -t "$checkout"/dist/echo_vllm-*.tar.gz | head -1)

say "pip install '${wheel##*/}[cpu]'"
"${PYTHON:-$checkout/.venv/bin/python}" -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check "$wheel[cpu]" \
  ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"}
export PATH=$folder/venv/bin:$PATH HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1

say "echo-vllm patch apply"
echo-vllm patch apply
say "echo-vllm doctor"
if ! COLUMNS=400 echo-vllm doctor >doctor.txt; then
  cat doctor.txt
  remedy=$(grep -o 'pip uninstall[a-z ]*' doctor.txt) || exit 1
  say "as doctor says: $remedy"
  venv/bin/python -m pip ${remedy#pip } --yes
  COLUMNS=400 echo-vllm doctor >doctor.txt
fi
cat doctor.txt

say "vllm serve"
echo-vllm example echo --head "$head" >echo.json
vllm serve "$target" --served-model-name demo --speculative-config echo.json --port "$PORT" \
  --host 127.0.0.1 --max-model-len 1024 --enforce-eager --kv-cache-memory-bytes 1G >server.log 2>&1 &
server=$!
until curl -sf "http://127.0.0.1:$PORT/health" >/dev/null; do
  kill -0 "$server" 2>/dev/null || { tail -30 server.log; say "the server did not start"; exit 1; }
  sleep 1
done
curl -sf "http://127.0.0.1:$PORT/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "model": "demo", "temperature": 0, "max_tokens": 40,
  "messages": [{"role": "user", "content": "What is the capital of France?"}]}' | grep -o '"content":"[^"]*"' |
  tee answer.txt
grep -q Paris answer.txt
curl -sf "http://127.0.0.1:$PORT/metrics" | grep '^vllm:echo_accepted_tokens_total' | tee accepted.txt
! grep -q ' 0.0$' accepted.txt || { say "no draft was accepted"; exit 1; }
kill "$server"
wait "$server" || true
server=

say "${archive##*/}"
# The extension is compiled against the torch that is there, so without isolation.
venv/bin/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
  --wheel-dir built "$archive"
venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall built/*.whl
COLUMNS=400 echo-vllm doctor >doctor.txt || { cat doctor.txt; exit 1; }
say "all good"
