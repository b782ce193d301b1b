#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Without arguments, serves the demo; with arguments, is `vllm serve` with them, as in vLLM's own
# images.

set -euo pipefail
mkdir -p "${TMPDIR:-/tmp}"
if (($#)); then
  exec vllm serve "$@"
fi
vllm=$(command -v vllm)
PREFIX=${vllm%/bin/vllm} exec /opt/echo-vllm/scripts/serve.sh
