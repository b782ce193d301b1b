#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
#
# Succeeds if the server in this container answers GET /health with 200.

set -euo pipefail
exec 3<>"/dev/tcp/127.0.0.1/${PORT:-8000}"
printf 'GET /health HTTP/1.0\r\n\r\n' >&3
IFS= read -r -t 4 status <&3
[[ $status == *" 200 "* ]]
