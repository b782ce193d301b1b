# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""The walk from the target's sampled tokens to the accepted path, on plain lists.

`ops.accept_path` does the whole walk of a batch when every row's token is known beforehand; the
functions here serve the walk in which a row is sampled only once it is reached.
"""

from __future__ import annotations

from collections.abc import Sequence


def find_child(
    token_ids: Sequence[int], parents: Sequence[int], node: int, token: int
) -> int | None:
    """The child of `node` (ROOT for the root) that holds `token`.

    At most one child can: no token stands twice under one parent.
    """
    for child in range(node + 1, len(token_ids)):
        if parents[child] == node and token_ids[child] == token:
            return child
    return None
