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

On a GPU each level costs one transfer of its tokens to the host. Where no request asks for anything
that depends on the path (`_samples_rows_alone`), the GPU is not waited for: every row is sampled at
once, and the walk is `ops.accept_path`. A row's token is drawn from the target's distribution
after the row's own path, so it does not matter that rows off the path drew too.
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
from echo_vllm.ops.argmax import argmax_of_rows
from echo_vllm.transfer import download, upload
from echo_vllm.trees.acceptance import find_child
from echo_vllm.trees.forest import DraftForest

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


def verify(
    sampler: Sampler,
    logits: torch.Tensor,
    forest: DraftForest,
    sampling: SamplingMetadata,
    output_token_ids: list[list[int]],
    skipped: np.ndarray,
    at_once: bool | None = None,
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
        at_once: whether all rows may be sampled at once; by default on a GPU, where it saves
            waiting. On a CPU sampling rows that the walk does not reach costs more than it saves.
    """
    max_depth = int(forest.depths.max()) if forest.num_nodes else 0
    if _samples_plain_argmax(sampling):
        return _accept(argmax_of_rows(logits), forest, max_depth)
    if at_once is None:
        at_once = logits.device.type != "cpu"
    if at_once and _samples_rows_alone(sampling):
        return _accept(_sample_rows(sampler, logits, forest, sampling), forest, max_depth)
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


def _samples_rows_alone(sampling: SamplingMetadata) -> bool:
    """Whether every row's token can be drawn without knowing the path that leads to it.

    Not with seeds: a request's generator must be drawn from once per generated token.
    """
    return (
        not sampling.generators
        and sampling.max_num_logprobs is None
        and not sampling.logprob_token_ids
        and sampling.no_penalties
        and not sampling.bad_words_token_ids
        and sampling.allowed_token_ids_mask is None
        and not _has_thinking_budget(sampling)
        and not any(map(_is_active, sampling.logitsprocs.all))
    )


def _sample_rows(
    sampler: Sampler, logits: torch.Tensor, forest: DraftForest, sampling: SamplingMetadata
) -> torch.Tensor:
    """[rows] int64, a token for every row, by the parameters of its request."""
    sizes = forest.cu_nodes.diff() + 1
    owner = torch.repeat_interleave(
        torch.arange(forest.num_requests), sizes, output_size=len(logits)
    )
    owner = upload(owner, logits.device)
    output = sampler(
        logits=logits,
        sampling_metadata=replace(
            sampling,
            temperature=_rows(sampling.temperature, owner),
            top_p=_rows(sampling.top_p, owner),
            top_k=_rows(sampling.top_k, owner),
            output_token_ids=[],
            spec_token_ids=None,
        ),
    )
    return output.sampled_token_ids[:, 0].to(torch.int64)


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
            torch.from_numpy(self.rows),
            torch.from_numpy(self.num_accepted),
        )

    def _step(self, level: int, requests: np.ndarray) -> np.ndarray:
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
        batch = np.arange(len(self.trees)) if whole else requests
        rows = self.first_row[batch] + self.rows[batch, np.minimum(level, self.num_accepted[batch])]
        output = self.sampler(
            logits=self.logits[self._upload(rows)],
            sampling_metadata=_sampling_of(
                self.sampling, batch, requests, level, self.logits.device
            ),
        )
        (sampled,) = download(output.sampled_token_ids[:, 0])
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

    def _upload(self, values: np.ndarray) -> torch.Tensor:
        return upload(torch.from_numpy(values), self.logits.device)

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
