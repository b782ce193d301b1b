# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""How a request's tree is verified where its tokens are sampled during the walk.

`ops.sample_path` takes one rule a request, so that one call serves a batch of all kinds.
"""

from __future__ import annotations

from enum import IntEnum


class AcceptRule(IntEnum):
    """What a row of the target's logits is asked for, and which child goes on.

    GREEDY: the best token; the child that holds it. Temperature 0, any candidates.
    BEST: a token sampled from the target; the child that holds it. For candidates that are
        certain given the past, such as the drafter's best tokens.
    DRAWN: recursive rejection. For children drawn from the drafter's distribution without
        replacement, in the order in which they were drawn.
    """

    GREEDY = 0
    BEST = 1
    DRAWN = 2
