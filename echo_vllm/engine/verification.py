# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From the target's logits at every row of the super-tree to accepted tokens.

Candidates are deterministic given the past, so this rule is exact at any temperature: sample the
target's token at the root; if a child holds it, accept the child and go on from there, else stop.
The last sampled token is the bonus token.

Each level of the walk is one call of vLLM's own sampler on the rows that requests have reached, in
the state (penalties, bad words, minimum tokens, random generators) in which plain decoding
would be at that token. A request draws from its generator once per generated token, as without
speculation, so even a seeded request gets the tokens that it would get without speculation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from echo_vllm import ops
from echo_vllm.acceptance import find_child
from echo_vllm.forest import DraftForest

NO_TOKEN = -1
"""vLLM's placeholder for a token that was not generated."""


@dataclass(frozen=True)
class Verdict:
    """What verification decided for the `R` requests of a batch.

    Attributes:
        sampler_output: sampled_token_ids [R, D + 1] int32 (accepted tokens, bonus token, then
            NO_TOKEN) and the log-probabilities in the layout of vLLM's rejection sampler.
        accepted_rows: [R, D + 1] int32, the accepted path as rows of the request; the
            first is the root (0); padded with -1.
        num_accepted: [R] int32, accepted draft nodes.
    """

    sampler_output: SamplerOutput
    accepted_rows: np.ndarray
    num_accepted: np.ndarray


def verify(
    sampler: Sampler,
    logits: torch.Tensor,
    forest: DraftForest,
    sampling: SamplingMetadata,
    output_token_ids: list[list[int]],
    skipped: np.ndarray,
) -> Verdict:
    """Walk every tree from its root.

    Args:
        sampler: vLLM's sampler.
        logits: [sum of (nodes + 1), vocab], rows of request i: root, then its nodes.
        forest: the trees as verified, one a request of the batch, maybe empty.
        sampling: of the batch, vLLM's.
        output_token_ids: per request, the list that logits processors look at. It grows during
            the walk and is restored at the end.
        skipped: [R] bool, requests that generate nothing in this step (partial prefills).
    """
    max_depth = int(forest.depths.max()) if forest.num_nodes else 0
    if _samples_plain_argmax(sampling):
        return _verify_greedy(logits, forest, max_depth)
    walk = _Walk(sampler, logits, forest, sampling, output_token_ids, max_depth)
    return walk.run(np.flatnonzero(~skipped))


def _samples_plain_argmax(sampling: SamplingMetadata) -> bool:
    """Whether every row's token is the argmax of its logits, whatever path leads to it."""
    return (
        sampling.all_greedy
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.no_penalties
        and not sampling.bad_words_token_ids
        and sampling.allowed_token_ids_mask is None
        and not _has_thinking_budget(sampling)
        and not any(map(_is_active, sampling.logitsprocs.non_argmax_invariant))
    )


def _verify_greedy(logits: torch.Tensor, forest: DraftForest, max_depth: int) -> Verdict:
    """All rows in one argmax."""
    sampled = argmax_of_rows(logits)
    rows, num_accepted = ops.accept_path(
        sampled, forest.token_ids, forest.parents, forest.cu_nodes, max_depth
    )
    first_row = forest.cu_nodes[:-1].to(torch.int64) + torch.arange(forest.num_requests)
    flat = (first_row.unsqueeze(1) + rows.clamp(min=0)).flatten()
    tokens = sampled[flat].view(rows.shape).to(torch.int32)
    tokens.masked_fill_(rows < 0, NO_TOKEN)
    return Verdict(
        SamplerOutput(sampled_token_ids=tokens, logprobs_tensors=None),
        rows.numpy(),
        num_accepted.numpy(),
    )


def argmax_of_rows(logits: torch.Tensor, block: int = 1024) -> torch.Tensor:
    """[rows] int64, `logits.argmax(1)`: the first of equal maxima.

    torch finds the position of a maximum several times slower than its value on a CPU, so only the
    block of columns that holds the maximum is searched for the position.
    """
    num_columns = logits.shape[1]
    whole = num_columns // block * block
    tops = [logits[:, :whole].unflatten(1, (-1, block)).amax(2)] if whole else []
    if whole < num_columns:
        tops.append(logits[:, whole:].amax(1, keepdim=True))
    first = torch.cat(tops, dim=1).argmax(1, keepdim=True) * block
    # Past the end the last column stands again; the first of equal ones is taken.
    columns = (first + torch.arange(block)).clamp(max=num_columns - 1)
    return columns.gather(1, logits.gather(1, columns).argmax(1, keepdim=True)).squeeze(1)


class _Walk:
    """One walk, level by level, of all requests of a batch."""

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
        self.trees = forest.trees()
        num_requests = len(self.trees)
        self.first_row = forest.cu_nodes[:-1].numpy() + np.arange(num_requests)
        self.tokens = torch.full((num_requests, max_depth + 1), NO_TOKEN, dtype=torch.int32)
        self.rows = np.full((num_requests, max_depth + 1), -1, dtype=np.int32)
        self.rows[:, 0] = 0
        self.num_accepted = np.zeros(num_requests, dtype=np.int32)
        self.logprobs: LogprobsTensors | None = None

    def run(self, requests: np.ndarray) -> Verdict:
        """Walk from the roots of `requests`."""
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
            SamplerOutput(sampled_token_ids=self.tokens, logprobs_tensors=self.logprobs),
            self.rows,
            self.num_accepted,
        )

    def _step(self, level: int, requests: np.ndarray) -> np.ndarray:
        """Sample one token for each of `requests`; returns those that accepted a node."""
        processors = self.sampling.logitsprocs
        if level:
            # What a plain step would do before it samples.
            for processor in processors.all:
                processor.update_state(None)
        # A processor with per-request state indexes by batch position: give it the whole batch.
        whole = any(map(_is_active, processors.all)) or (
            level == 0 and _has_thinking_budget(self.sampling)
        )
        batch = np.arange(len(self.trees)) if whole else requests
        rows = self.first_row[batch] + self.rows[batch, np.minimum(level, self.num_accepted[batch])]
        output = self.sampler(
            logits=self.logits[torch.from_numpy(rows)],
            sampling_metadata=_sampling_of(self.sampling, batch, requests, level),
        )
        sampled = output.sampled_token_ids[:, 0]
        if whole:
            sampled = sampled[torch.from_numpy(requests)]
        self.tokens[torch.from_numpy(requests), level] = sampled.to(torch.int32)
        if output.logprobs_tensors is not None:
            where = requests if whole else np.arange(len(requests))
            self._keep_logprobs(level, requests, output.logprobs_tensors, where)
        going = []
        for request, token in zip(requests.tolist(), sampled.tolist(), strict=True):
            tokens, parents = self.trees[request]
            child = find_child(tokens, parents, int(self.rows[request, level]) - 1, token)
            if child is None:
                continue
            self.num_accepted[request] += 1
            self.rows[request, level + 1] = child + 1
            self.output_token_ids[request].append(token)
            going.append(request)
        return np.array(going, dtype=np.int64)

    def _keep_logprobs(
        self, level: int, requests: np.ndarray, new: LogprobsTensors, where: np.ndarray
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
        to = torch.from_numpy(requests * num_levels + level)
        source = torch.from_numpy(where)
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
    sampling: SamplingMetadata, batch: np.ndarray, drawing: np.ndarray, level: int
) -> SamplingMetadata:
    """The sampling metadata of the requests `batch`, of which only `drawing` may draw."""
    index = torch.from_numpy(batch)
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
