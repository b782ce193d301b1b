# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""T = 0, FP32, the demo model: the very tokens of the same engine without speculation.

`python -m tests.engine.exactness` runs the whole matrix of policies and conditions on this model;
`test_exactness.py` runs it on a tiny one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine.engines import counters, echo, engine, generate
from tests.engine.prompts import chat, project_prompts
from tests.engine.test_exactness import check_forests, greedy


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_demo_model_is_token_identical_on_the_projects_prompts(
    demo_target: Path, demo_head: Path
) -> None:
    """Every tenth prompt x 128 tokens, prefix caching on; some of them again one by one."""
    prompts = chat(demo_target, project_prompts()[::10])
    assert len(prompts) == 12
    options = {"max_model_len": 1536, "max_num_seqs": 16}
    with engine(demo_target, None, **options) as llm:
        wanted = generate(llm, prompts, greedy())
    with engine(demo_target, echo(demo_head, 8, max_depth=4, top_k=3), **options) as llm:
        check_forests(llm, 8)
        assert generate(llm, prompts, greedy()) == wanted
        some = slice(0, len(prompts), 8)
        assert generate(llm, prompts[some], greedy(), one_by_one=True) == wanted[some]
        found = counters(llm)
    assert found["spec_decode_num_accepted_tokens"] > 0.4 * found["spec_decode_num_drafts"]
