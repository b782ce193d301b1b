# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From the target's logits at every row of the super-tree to accepted tokens.

Candidates are deterministic given the past, so this rule is exact at any temperature: sample the
target's token at the root; if a child holds it, accept the child and go on from there, else stop.
The last sampled token is the bonus token.

There are two ways, and each request of a batch goes its own (`Drawing`):

- *at once*: a token is drawn for every row of the request, and the walk is `ops.accept_path`. A
  row's token is drawn from the target's distribution after the row's own path, so it does not
  matter that rows off the path drew too. Nobody waits for a GPU.
- *level by level*: a row is sampled only when the walk has reached it, by vLLM's own sampler in
  the state (penalties, bad words, minimum tokens, random generators) in which plain decoding would
  be at that token. A request draws from its generator once per generated token, as without
  speculation, so even a seeded request gets the tokens that it would get without speculation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.sampling_params import SamplingParams
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from echo_vllm import ops
from echo_vllm.ops.argmax import argmax_of_rows
from echo_vllm.transfer import download, upload
from echo_vllm.trees.forest import ROOT, DraftForest

NO_TOKEN = -1
"""vLLM's placeholder for a token that was not generated."""

MAX_SAMPLED_ROWS = 256
"""Rows that are sampled together: sampling copies logits, in float32 and sorted, so a piece bounds
its memory whatever the number of trees. vLLM profiles its sampler with as many rows."""


@dataclass(frozen=True)
class Verdict:
    """What verification decided for the `R` requests of a batch.

    Attributes:
        sampler_output: sampled_token_ids [R, D + 1] int32 (accepted tokens, bonus token, then
            NO_TOKEN) and the log-probabilities in the layout of vLLM's rejection sampler.
        accepted_rows: [R, D + 1] int32, the accepted path as rows of the request; the
            first is the root (0); padded with -1.
        num_accepted: [R] int32, accepted draft nodes.

    The tensors are where the logits are, or on the host already.
    """

    sampler_output: SamplerOutput
    accepted_rows: torch.Tensor
    num_accepted: torch.Tensor

    def on_host(self) -> Verdict:
        """The same verdict on the host, in one transfer; log-probabilities stay where they are."""
        output = self.sampler_output
        tokens, rows, accepted = download(
            output.sampled_token_ids, self.accepted_rows, self.num_accepted
        )
        return Verdict(replace(output, sampled_token_ids=tokens), rows, accepted)


@dataclass(frozen=True)
class Drawing:
    """How a request's tokens may be drawn, which its sampling parameters say once and for all.

    Attributes:
        is_random: its temperature is not 0.
        by_level: a row's token depends on the path that leads to it, on the request's generator, or
            is reported with log-probabilities: only the rows on the accepted path may be sampled.
        only_scales: nothing but temperature, top-k, top-p and min-p changes the distribution that
            its tokens are drawn from.
    """

    is_random: bool
    by_level: bool
    only_scales: bool

    @classmethod
    def of(cls, params: SamplingParams) -> Drawing:
        """The drawing of a request with these parameters."""
        is_random = params.temperature >= _SAMPLING_EPS
        changes_logits = (
            params.presence_penalty != 0
            or params.frequency_penalty != 0
            or params.repetition_penalty != 1
            or params.min_tokens > 0
            or any(
                (
                    params.bad_words_token_ids,
                    params.logit_bias,
                    params.allowed_token_ids,
                    params.logprob_token_ids,
                )
            )
            or params.logprobs is not None
            or params.thinking_token_budget is not None
        )
        keeps_own_order = is_random and (params.seed is not None or params.min_p > 0)
        only_scales = not changes_logits and params.structured_outputs is None
        return cls(is_random, changes_logits or keeps_own_order, only_scales)


_SAMPLING_EPS = 1e-5
"""Below this vLLM's sampler takes a temperature for 0."""


Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Children:
    """The children of one row of each of n requests.

    Attributes:
        token_ids: [K] int32, of each request's in the order of its tree.
        places: [K] int64, of each among its tree's nodes.
        counts: [n] int64, children of each row.
    """

    token_ids: NDArray[np.int32]
    places: Ints
    counts: Ints


Judge = Callable[[torch.Tensor, Ints, Ints, Children], Ints]
"""Samples where candidates were drawn: from the target's logits [n, V] float32 at one row of each
of n requests, changed by all that comes before temperature, the requests [n] of the batch, the rows
[n] of their trees, and the rows' children, the next tokens [n]."""


def verify(
    sampler: Sampler,
    logits: torch.Tensor,
    forest: DraftForest,
    sampling: SamplingMetadata,
    output_token_ids: list[list[int]],
    skipped: NDArray[np.bool_],
    by_level: NDArray[np.bool_],
    is_random: NDArray[np.bool_],
    judge: Judge | None = None,
    judged: NDArray[np.bool_] | None = None,
) -> Verdict:
    """Walk every tree from its root.

    Args:
        sampler: vLLM's sampler.
        logits: [sum of (nodes + 1), vocab], rows of request i: root, then its nodes.
        forest: the trees as verified, one a request of the batch, maybe empty; on the host.
        sampling: of the batch, vLLM's.
        output_token_ids: per request, the list that logits processors look at. It grows during
            the walk and is restored at the end.
        skipped: [R] bool, requests that generate nothing in this step (partial prefills).
        by_level: [R] bool, requests that are sampled level by level; the others' rows at once.
        is_random: [R] bool, requests whose tokens are drawn; the others take the maximum.
        judge: samples for those of `judged` ([R] bool) that are sampled level by level.
    """
    max_depth = int(forest.depths.max()) if forest.num_nodes else 0

    def walk() -> _Walk:
        steps = _Walk(sampler, logits, forest, sampling, output_token_ids, max_depth)
        if judge is not None and judged is not None:
            steps.judge, steps.judged = judge, judged
        return steps

    walking = by_level & ~skipped
    at_once = ~by_level
    if not at_once.any():
        return walk().run(np.flatnonzero(walking))
    if at_once.all():
        sampled = _sample_at_once(sampler, logits, forest, sampling, is_random)
        return _accept(sampled, forest, max_depth)
    rows = np.flatnonzero(np.repeat(at_once, forest.cu_nodes.diff().numpy() + 1))
    index = upload(torch.from_numpy(rows), logits.device)
    some = _sample_at_once(sampler, logits, forest, sampling, is_random, (rows, index))
    sampled = torch.full((len(logits),), NO_TOKEN, dtype=torch.int64, device=logits.device)
    sampled[index] = some
    verdict = _accept(sampled, forest, max_depth).on_host()
    if walking.any():
        verdict = walk().run(np.flatnonzero(walking), verdict)
    return verdict


def _sample_at_once(
    sampler: Sampler,
    logits: torch.Tensor,
    forest: DraftForest,
    sampling: SamplingMetadata,
    is_random: NDArray[np.bool_],
    only: tuple[NDArray[np.int64], torch.Tensor] | None = None,
) -> torch.Tensor:
    """[n] int64, a token for each of the rows `only`, which is on the host and on the device; for
    every row without it."""
    owner = np.repeat(np.arange(forest.num_requests), forest.cu_nodes.diff().numpy() + 1)
    if only is not None:
        owner = owner[only[0]]
    count = len(owner)
    if not is_random[owner].any() and only is None:
        return argmax_of_rows(logits)
    owners = upload(torch.from_numpy(owner), logits.device)
    pieces = []
    for start in range(0, count, MAX_SAMPLED_ROWS):
        part = slice(start, min(start + MAX_SAMPLED_ROWS, count))
        rows = logits[part] if only is None else logits[only[1][part]]
        if not is_random[owner[part]].any():
            pieces.append(argmax_of_rows(rows))
            continue
        output = sampler(
            logits=rows,
            sampling_metadata=replace(
                sampling,
                temperature=_rows(sampling.temperature, owners[part]),
                top_p=_rows(sampling.top_p, owners[part]),
                top_k=_rows(sampling.top_k, owners[part]),
                generators={},
                max_num_logprobs=None,
                logprob_token_ids=None,
                no_penalties=True,
                prompt_token_ids=None,
                output_token_ids=[],
                spec_token_ids=None,
                allowed_token_ids_mask=None,
                bad_words_token_ids={},
                logitsprocs=LogitsProcessors(),
                thinking_budget_state_holder=None,
            ),
        )
        pieces.append(output.sampled_token_ids[:, 0].to(torch.int64))
    return torch.cat(pieces)


def _accept(sampled: torch.Tensor, forest: DraftForest, max_depth: int) -> Verdict:
    """The walk, where the token of every row is known; all on the device of `sampled`."""
    nodes = forest.to(sampled.device)
    rows, num_accepted = ops.accept_path(
        sampled, nodes.token_ids, nodes.parents, nodes.cu_nodes, max_depth
    )
    first_row = nodes.cu_nodes[:-1].to(torch.int64) + torch.arange(
        nodes.num_requests, device=sampled.device
    )
    flat = (first_row.unsqueeze(1) + rows.clamp(min=0)).flatten()
    tokens = sampled[flat].view(rows.shape).to(torch.int32)
    tokens.masked_fill_(rows < 0, NO_TOKEN)
    output = SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None)
    return Verdict(output, rows, num_accepted)


class _Walk:
    """One walk, level by level, of some requests of a batch."""

    def __init__(
        self,
        sampler: Sampler,
        logits: torch.Tensor,
        forest: DraftForest,
        sampling: SamplingMetadata,
        output_token_ids: list[list[int]],
        max_depth: int,
    ) -> None:
        self.sampler = sampler
        self.logits = logits
        self.sampling = sampling
        self.output_token_ids = output_token_ids
        self.num_requests = forest.num_requests
        self.owner = forest.request_of_node().numpy()
        self.node_tokens = forest.token_ids.numpy()
        self.parents = forest.parents.numpy()
        cu_nodes = forest.cu_nodes.numpy()
        self.place = np.arange(forest.num_nodes) - cu_nodes[self.owner]
        self.first_row = cu_nodes[:-1] + np.arange(self.num_requests)
        shape = (self.num_requests, max_depth + 1)
        self.tokens = np.full(shape, NO_TOKEN, dtype=np.int32)
        self.rows = np.full(shape, -1, dtype=np.int32)
        self.rows[:, 0] = 0
        self.num_accepted = np.zeros(self.num_requests, dtype=np.int32)
        self.logprobs: LogprobsTensors | None = None
        self.judge: Judge | None = None
        self.judged = np.zeros(self.num_requests, np.bool_)

    def run(self, requests: NDArray[np.int64], others: Verdict | None = None) -> Verdict:
        """Walk from the roots of `requests`; `others`, on the host, says what the rest accepted."""
        if others is not None:
            self.tokens = others.sampler_output.sampled_token_ids.numpy().copy()
            self.rows = others.accepted_rows.numpy().copy()
            self.num_accepted = others.num_accepted.numpy().copy()
            self.tokens[requests] = NO_TOKEN
            self.rows[requests, 1:] = -1
            self.num_accepted[requests] = 0
        lengths = [len(tokens) for tokens in self.output_token_ids]
        try:
            level = 0
            while len(requests):
                requests = self._step(level, requests)
                level += 1
        finally:
            for tokens, length in zip(self.output_token_ids, lengths, strict=True):
                del tokens[length:]
        return Verdict(
            SamplerOutput(torch.from_numpy(self.tokens), logprobs_tensors=self.logprobs),
            torch.from_numpy(self.rows),
            torch.from_numpy(self.num_accepted),
        )

    def _step(self, level: int, requests: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample one token for each of `requests`; returns those that accepted a node."""
        processors = self.sampling.logitsprocs
        if level:
            # What a plain step would do before it samples.
            for processor in processors.all:
                processor.update_state(None)
        # A processor with per-request state indexes by batch position: give it the whole batch.
        # The same where log-probabilities of given tokens are asked for: how many columns they
        # take depends on who is asked about.
        whole = (
            any(map(_is_active, processors.all))
            or bool(self.sampling.logprob_token_ids)
            or (level == 0 and _has_thinking_budget(self.sampling))
        )
        batch = np.arange(self.num_requests) if whole else requests
        reached = np.minimum(level, self.num_accepted[batch])
        rows = self.first_row[batch] + self.rows[batch, reached]
        with self._judging(level, batch, requests):
            output = self.sampler(
                logits=self.logits[self._upload(rows)],
                sampling_metadata=_sampling_of(
                    self.sampling, batch, requests, level, self.logits.device
                ),
            )
        (drawn,) = download(output.sampled_token_ids[:, 0])
        sampled = drawn.numpy().astype(np.int32)
        if whole:
            sampled = sampled[requests]
        self.tokens[requests, level] = sampled
        if output.logprobs_tensors is not None:
            where = requests if whole else np.arange(len(requests))
            self._keep_logprobs(level, requests, output.logprobs_tensors, where)
        going, children = self._children(level, requests, sampled)
        self.num_accepted[going] += 1
        self.rows[going, level + 1 : level + 2] = children[:, None] + 1
        for request, token in zip(going.tolist(), self.tokens[going, level].tolist(), strict=True):
            self.output_token_ids[request].append(token)
        return going

    @contextmanager
    def _judging(self, level: int, batch: Ints, requests: Ints) -> Iterator[None]:
        """The sampler asks `judge` for the tokens of those of `requests` that it samples for."""
        places = np.flatnonzero(self.judged[batch] & np.isin(batch, requests))
        if self.judge is None or not len(places):
            yield
            return
        judge, sample = self.judge, self.sampler.sample
        own = batch[places]
        nodes = np.flatnonzero(self._is_child(level, own))
        counts = np.bincount(self.owner[nodes], minlength=self.num_requests)[own]
        children = Children(self.node_tokens[nodes], self.place[nodes], counts)

        def judged(
            logits: torch.Tensor, *args: Any, **options: Any
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            index = self._upload(places)
            before = logits[index]  # A copy: sampling changes them.
            sampled, processed = sample(logits, *args, **options)
            tokens = judge(before, own, self.rows[own, level].astype(np.int64), children)
            sampled[index] = self._upload(tokens).to(sampled.dtype)
            return sampled, processed

        self.sampler.sample = judged
        try:
            yield
        finally:
            del self.sampler.sample

    def _children(
        self, level: int, requests: NDArray[np.int64], sampled: NDArray[np.int32]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Those of `requests` that have a child with the sampled token, ascending, and the child;
        at most one has it, because no token stands twice under one parent."""
        token = np.full(self.num_requests, NO_TOKEN)
        token[requests] = sampled
        has_token = self.node_tokens == token[self.owner]
        nodes = np.flatnonzero(self._is_child(level, requests) & has_token)
        return self.owner[nodes], self.place[nodes]

    def _is_child(self, level: int, requests: Ints) -> NDArray[np.bool_]:
        """[K] bool, which nodes hang below where one of `requests` stands."""
        # As a parent; nobody's parent where it does not walk.
        at = np.full(self.num_requests, ROOT - 1)
        at[requests] = self.rows[requests, level] - 1
        is_child: NDArray[np.bool_] = self.parents == at[self.owner]
        return is_child

    def _upload(self, values: NDArray[np.int64]) -> torch.Tensor:
        return upload(torch.from_numpy(values), self.logits.device)

    def _keep_logprobs(
        self,
        level: int,
        requests: NDArray[np.int64],
        new: LogprobsTensors,
        where: NDArray[np.int64],
    ) -> None:
        """Store rows `where` of `new` as the log-probabilities of `requests` at `level`."""
        num_requests, num_levels = self.tokens.shape
        if self.logprobs is None:
            size, width = num_requests * num_levels, new.logprobs.shape[1]
            self.logprobs = LogprobsTensors(
                new.logprob_token_ids.new_zeros(size, width),
                new.logprobs.new_zeros(size, width),
                new.selected_token_ranks.new_zeros(size),
            )
        to = self._upload(requests * num_levels + level)
        source = self._upload(where)
        self.logprobs.logprob_token_ids[to] = new.logprob_token_ids[source]
        self.logprobs.logprobs[to] = new.logprobs[source]
        self.logprobs.selected_token_ranks[to] = new.selected_token_ranks[source]


def _has_thinking_budget(sampling: SamplingMetadata) -> bool:
    holder = sampling.thinking_budget_state_holder
    return holder is not None and holder.has_tracked_requests()


def _is_active(processor: object) -> bool:
    """Whether a logits processor may change any row's logits."""
    if isinstance(processor, MinPLogitsProcessor):
        return processor.min_p_count > 0
    if isinstance(processor, LogitBiasLogitsProcessor):
        return bool(processor.biases)
    if isinstance(processor, MinTokensLogitsProcessor):
        return bool(processor.min_toks)
    return True


def _sampling_of(
    sampling: SamplingMetadata,
    batch: np.ndarray,
    drawing: np.ndarray,
    level: int,
    device: torch.device,
) -> SamplingMetadata:
    """The sampling metadata of the requests `batch`, of which only `drawing` may draw."""
    index = upload(torch.from_numpy(batch), device)
    place = {request: row for row, request in enumerate(batch.tolist())}
    generators = sampling.generators
    outputs = sampling.output_token_ids
    penalties = {}
    if not sampling.no_penalties:
        penalties = {
            "frequency_penalties": sampling.frequency_penalties[index],
            "presence_penalties": sampling.presence_penalties[index],
            "repetition_penalties": sampling.repetition_penalties[index],
        }
    return replace(
        sampling,
        temperature=_rows(sampling.temperature, index),
        top_p=_rows(sampling.top_p, index),
        top_k=_rows(sampling.top_k, index),
        generators={place[r]: generators[r] for r in drawing.tolist() if r in generators},
        prompt_token_ids=_rows(sampling.prompt_token_ids, index),
        output_token_ids=[outputs[r] for r in batch.tolist()] if outputs else [],
        allowed_token_ids_mask=_rows(sampling.allowed_token_ids_mask, index),
        bad_words_token_ids=_by_row(sampling.bad_words_token_ids, place),
        logprob_token_ids=_by_row(sampling.logprob_token_ids, place) or None,
        spec_token_ids=None,
        # A request with a thinking budget has no drafts, so it never gets past its root.
        thinking_budget_state_holder=None if level else sampling.thinking_budget_state_holder,
        **penalties,
    )


def _rows(tensor: torch.Tensor | None, index: torch.Tensor) -> torch.Tensor | None:
    return None if tensor is None else tensor[index]


def _by_row(by_request: dict | None, place: dict[int, int]) -> dict:
    return {place[r]: value for r, value in (by_request or {}).items() if r in place}
