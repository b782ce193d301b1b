# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A policy of somebody else's package: found by its entry point, and run like one of ours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import openai
import pytest
from pydantic import TypeAdapter

from echo_vllm.config import EchoConfigError
from echo_vllm.policies import make_policy, parse_section
from echo_vllm.policies.registry import policy_names, section_type
from tests.conftest import ServerFactory
from tests.engine.conftest import TinyModel
from tests.engine.engines import counters, echo, generate, runner
from tests.engine.test_exactness import check_forests, greedy, tiny_engine, tiny_prompts
from tests.server.metrics import Metrics

MODULE = """
from __future__ import annotations

from typing import Literal

from pydantic import Field

from echo_vllm.config import EchoConfig
from echo_vllm.forecast.plan import DraftPlan
from echo_vllm.policies import DraftPolicy
from echo_vllm.trees.pool import Expansion


class BrushConfig(EchoConfig):
    policy: Literal["brush"] = Field(default="brush", description="The best children of the root.")
    rest: int = Field(default=3, ge=1, le=9, description="Every how many steps nobody drafts.")

    def filled(self, num_nodes):
        return self.with_fields(max_depth=1, top_k=min(num_nodes, 16))


class BrushPolicy(DraftPolicy):
    Config = BrushConfig
    may_rest = True

    def __init__(self, config, max_nodes, profile=None):
        super().__init__(config, max_nodes, profile)
        self.rest = config.rest
        self.steps = self.accepted = 0

    def plan(self, load):
        self.steps += 1
        return DraftPlan(max_depth=0 if self.steps % self.rest == 0 else None)

    def observe(self, step):
        if step.report is not None:  # There is none after a rest.
            self.accepted += step.report["accepted"]

    def expand(self, depth, pool, batch):
        return Expansion(frontier=None, children=None) if depth == 1 else None

    def select(self, pool, batch):
        return pool.take(pool.best_first()[:, : self.max_nodes])

    def report(self, *, verified, num_accepted, pool, probes):
        return {"accepted": int(num_accepted.sum())}
"""

ENTRY_POINTS = """[echo_vllm.policies]
brush = brushes:BrushPolicy
torn = brushes:TornPolicy
other = brushes:BrushPolicy
config = brushes:BrushConfig
topn = brushes:BrushPolicy
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an installer leaves in a folder of the path."""
    (tmp_path / "brushes.py").write_text(MODULE)
    info = tmp_path / "brushes-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brushes\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "brushes", raising=False)
    return tmp_path


@pytest.mark.usefixtures("package")
def test_a_package_adds_a_policy_with_fields_of_its_own() -> None:
    assert "brush" in policy_names()
    config = parse_section({"policy": "brush", "rest": 5}, num_speculative_tokens=6)
    assert (config.policy, config.max_depth, config.top_k) == ("brush", 1, 6)
    assert type(make_policy(config, 6)).__name__ == "BrushPolicy"
    mapping = TypeAdapter(section_type()).json_schema()["discriminator"]["mapping"]
    assert "brush" in mapping
    # Ours are ours, whatever a package calls its own.
    topn = parse_section({"policy": "topn"}, num_speculative_tokens=6)
    assert type(make_policy(topn, 6)).__name__ == "TopNPolicy"


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        ({"policy": "brush", "rest": 0}, "echo.rest must be between 1 and 9, got 0; set it in"),
        ({"policy": "brush", "k_max": 4}, "echo.k_max belongs to policy echo, auto, evict or"),
        ({"policy": "topn", "rest": 4}, "echo.rest belongs to policy brush, got policy topn;"),
        ({"policy": "brsh"}, 'got "brsh"; did you mean brush?; set it to one of them.'),
        (
            {"policy": "torn"},
            "echo.policy torn is the entry point brushes:TornPolicy of another package, which "
            "cannot be used (AttributeError: module 'brushes' has no attribute 'TornPolicy'); "
            "repair or uninstall that package, or choose another policy.",
        ),
        ({"policy": "other"}, 'the default of its Config\'s field policy is not "other"'),
        ({"policy": "config"}, "it is no subclass of echo_vllm.policies.base.DraftPolicy"),
    ],
)
def test_one_sentence_says_what_is_wrong_with_it(section: dict[str, object], sentence: str) -> None:
    with pytest.raises(EchoConfigError) as error:
        parse_section(section, num_speculative_tokens=6)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.full
@pytest.mark.usefixtures("package")
def test_it_generates_what_plain_decoding_does(tiny: TinyModel) -> None:
    prompts = tiny_prompts(16)
    with tiny_engine(tiny, None) as llm:
        plain = generate(llm, prompts, greedy(48))
    with tiny_engine(tiny, echo(tiny.head, 5, policy="brush", rest=4)) as llm:
        check_forests(llm, 5)
        assert generate(llm, prompts, greedy(48)) == plain
        count = counters(llm)
        policy = llm.llm_engine.engine_core.engine_core.scheduler._policy
        assert type(runner(llm).drafter.policy) is type(policy)
    assert policy.steps > 16, "the scheduler's policy made no plans"
    assert policy.accepted == count["spec_decode_num_accepted_tokens"] > 0
    assert count["spec_decode_num_draft_tokens"] == 5 * count["spec_decode_num_drafts"]


@pytest.mark.full
def test_a_server_serves_with_it(
    package: Path, server: ServerFactory, demo_target: Path, demo_head: Path
) -> None:
    served = server(
        demo_target,
        *("--speculative-config", json.dumps(echo(demo_head, 5, policy="brush", rest=4))),
        *("--served-model-name", "demo", "--max-model-len", "256", "--enforce-eager"),
        env={"PYTHONPATH": str(package)},
    )
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=120) as client:
        answer = client.completions.create(
            model="demo", prompt="The capital of France is", max_tokens=32, temperature=0
        )
    assert "Paris" in answer.choices[0].text
    count = Metrics.read(served)
    drafts = count.total("spec_decode_num_drafts_total")
    assert count.total("spec_decode_num_draft_tokens_total") == 5 * drafts > 0
    assert count.total("spec_decode_num_accepted_tokens_total") > 0
