# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""One prompt through an engine of this process, with every step's tree kept: what was drafted, what
of it the target verified, and the path that it accepted. `echo-vllm show` draws it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from echo_vllm.offline.engine import LocalEngine

ROOT = -1


@dataclass(frozen=True)
class Candidate:
    """A drafted token.

    Attributes:
        token: its text.
        parent: index of another candidate of the step, or ROOT.
        depth: distance from the root, at least 1.
        probability: of the path from the root, by the drafter.
        verified, accepted: by the target.
    """

    token: str
    parent: int
    depth: int
    probability: float
    verified: bool = False
    accepted: bool = False


@dataclass(frozen=True)
class ShownStep:
    """One step of decoding.

    Attributes:
        root: the text of the last token before it.
        candidates: all that were drafted, a parent before its children; none where the plan rested.
        tokens: texts of what the step generated: the accepted path, then the target's own token.
        num_accepted: draft tokens among them.
        rows: of the target's forward.
        verify_s, draft_s: seconds of the verification, and of the drafting before it.
        max_depth: levels that the plan allowed; None where the policy is free.
        price: what a second was worth when it was drafted, in tokens; 0 if unknown.
    """

    root: str = ""
    candidates: tuple[Candidate, ...] = ()
    tokens: tuple[str, ...] = ()
    num_accepted: int = 0
    rows: int = 0
    verify_s: float = 0.0
    draft_s: float = 0.0
    max_depth: int | None = None
    price: float = 0.0

    @property
    def num_verified(self) -> int:
        return sum(candidate.verified for candidate in self.candidates)

    @property
    def depth(self) -> int:
        """Of the verified tree."""
        return max((c.depth for c in self.candidates if c.verified), default=0)


@dataclass(frozen=True)
class Shown:
    """A prompt, its answer, and the steps that made it; the first one read the prompt."""

    model: str
    prompt: str
    config: Mapping[str, Any]
    steps: tuple[ShownStep, ...]

    @property
    def answer(self) -> str:
        return "".join(token for step in self.steps for token in step.tokens)


@dataclass
class TreeRecorder:
    """Stands where the runner's trace recorder would (`echo_vllm.step.tracing`), for one request.

    Attributes:
        step: what is known of the step that is running, without its tokens' texts.
    """

    decode: Any
    step: ShownStep = field(default_factory=ShownStep)
    _drafted: ShownStep = field(default_factory=ShownStep)
    _columns: list[int] = field(default_factory=list)

    def drafted(
        self, req_ids: list[str], context_lens: list[int], report: Any, batch: Any, seconds: float
    ) -> None:
        """Keep the candidates until the next step verifies some of them."""
        plan = batch.plan
        self._drafted = ShownStep(draft_s=seconds, max_depth=plan.max_depth, price=plan.price)
        self._columns = []
        if report.pool is None or report.forest is None or not req_ids:
            return
        pool = report.pool.on_host()
        scores = pool.path_logprobs[0]
        exists = (scores > float("-inf")).nonzero().flatten().tolist()
        place = {column: i for i, column in enumerate(exists)} | {ROOT: ROOT}
        self._columns = [place[column] for column in report.forest.columns.tolist()]
        parents = pool.parents[0].tolist()
        candidates: list[Candidate] = []
        for column in exists:
            parent = place[parents[column]]
            depth = 1 if parent == ROOT else candidates[parent].depth + 1
            token = self.decode(int(pool.token_ids[0, column]))
            candidates.append(Candidate(token, parent, depth, float(scores[column].exp())))
        self._drafted = replace(self._drafted, candidates=tuple(candidates))

    def verified(
        self,
        req_ids: list[str],
        forest: Any,
        accepted_rows: Any,
        num_accepted: Any,
        *,
        rows: int,
        decoding: int,
    ) -> None:
        """Mark what this step verified and accepted."""
        self.step = replace(self._drafted, rows=rows)
        self._drafted = ShownStep()
        if not self.step.candidates:
            return
        num = int(num_accepted[0])
        verified = set(self._columns[: forest.num_nodes])
        accepted = {self._columns[row - 1] for row in accepted_rows[0, 1 : num + 1].tolist()}
        marked = tuple(
            replace(candidate, verified=i in verified, accepted=i in accepted)
            for i, candidate in enumerate(self.step.candidates)
        )
        self.step = replace(self.step, candidates=marked, num_accepted=num)

    def write(self, verify_s: float) -> None:
        """The step's time is known."""
        self.step = replace(self.step, verify_s=verify_s)

    def close(self) -> None:
        """Nothing is open."""


def steps_of_prompt(
    model: str,
    speculation: Mapping[str, Any],
    prompt: str,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    dtype: str,
    max_model_len: int = 2048,
) -> Iterator[ShownStep]:
    """Answer `prompt` as a chat, or as it is where the model has no chat template; every step as it
    ends.

    Raises:
        ValueError, OSError, RuntimeError: vLLM's own.
    """
    # On Model Runner V2 a step's tree is heard of when the next one has begun.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    options = {
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": 1,
        "speculative_config": dict(speculation),
    }
    with LocalEngine(model, **options) as local:
        from vllm import SamplingParams

        tokenizer, engine = local.llm.get_tokenizer(), local.engine
        recorder = TreeRecorder(lambda token: str(tokenizer.decode([token])))
        local.runner.recorder = recorder
        if tokenizer.chat_template:
            ids = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer.encode(prompt)
        seeded = seed if temperature > 0 else None
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seeded)
        engine.add_request("shown", {"prompt_token_ids": list(ids)}, sampling)
        known: list[int] = []
        root = str(tokenizer.decode(list(ids)[-1:]))
        while engine.has_unfinished_requests():
            recorder.step = ShownStep()
            for output in engine.step():
                tokens = list(output.outputs[0].token_ids)
                texts = tuple(recorder.decode(token) for token in tokens[len(known) :])
                known = tokens
                yield replace(recorder.step, root=root, tokens=texts)
                root = texts[-1] if texts else root
