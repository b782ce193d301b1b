# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""EAGLE-3 drafting of trees, level by level, for all requests of a batch at once.

The first forward brings the drafter's paged cache up to date with what the target committed, as
in vLLM's own EAGLE drafter. Each further forward expands one level: its rows are the frontier
nodes of every request, their keys and values go to a scratch buffer (`DraftScratch`), and they see
the committed context plus their own ancestors. A draft therefore leaves no trace in any cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode.eagle import EagleProposer
from vllm.v1.spec_decode.utils import PADDING_SLOT_ID
from vllm.v1.worker.dp_utils import skip_dp_coordination

from echo_vllm.config import EchoConfigError
from echo_vllm.policies import DraftBatch, DraftPolicy
from echo_vllm.step.attention.backend import TreeAttentionMetadata
from echo_vllm.step.frontier import Frontier, LevelRows
from echo_vllm.step.head_limits import limit_head
from echo_vllm.transfer import upload
from echo_vllm.trees.drawn import DrawnPool
from echo_vllm.trees.forest import DraftForest
from echo_vllm.trees.pool import CandidatePool
from echo_vllm.trees.store import Ints, owners


@dataclass(frozen=True)
class CatchUpRows:
    """Committed tokens for the drafter, on the host, request after request.

    Attributes:
        counts: [U] tokens of each request.
        token_ids: [n] the token AFTER each position.
        positions: [n] in the request.
        slot_mapping: [n] where their keys and values go in the paged cache.
        lengths: [U] tokens of each request that its rows may see, the last row's own among them.
    """

    counts: Ints
    token_ids: Ints
    positions: Ints
    slot_mapping: Ints
    lengths: Ints


@dataclass
class DraftReport:
    """What the last drafting did.

    Attributes:
        committed: tokens that went through the drafter to bring its cache up to date.
        level_rows: rows of each further forward.
        pool: all candidates, None if nothing was drafted.
        forest: those that were selected.
        probes: of the batch that was drafted for.
        drawn_pool, drawn_probes: the same of requests whose candidates are drawn.
        drawn_places: [r] int64, which of all requests that drafted these are, ascending.
    """

    committed: int = 0
    level_rows: list[int] = field(default_factory=list)
    pool: CandidatePool | None = None
    forest: DraftForest | None = None
    probes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    drawn_pool: DrawnPool | None = None
    drawn_probes: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    drawn_places: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class EchoProposer(EagleProposer):
    """vLLM's EAGLE-3 proposer with a tree in place of the chain."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, runner: Any, policy: DraftPolicy
    ) -> None:
        super().__init__(vllm_config, device, runner)
        self.num_speculative_tokens: int
        self.policy = policy
        self.max_draft_len = self.max_model_len
        """Positions from here on are beyond what the drafter can be asked about."""
        self.report = DraftReport()

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        self.max_draft_len = limit_head(
            self.model,
            vocab_size=self.vllm_config.model_config.get_vocab_size(),
            max_len=self.max_model_len,
            trained_len=self.draft_model_config.max_model_len or self.max_model_len,
        )

    def beyond(self, positions: Ints) -> NDArray[np.bool_]:
        """[n] whether the head is too short, though the engine is not, for each of `positions`."""
        limit = self.max_draft_len if self.max_draft_len < self.max_model_len else np.inf
        return np.greater_equal(positions, limit)

    def dummy_run(self, num_tokens: int, *args: Any, **kwargs: Any) -> None:
        """One forward: vLLM would run one a speculative token, as if the tree were a chain."""
        nodes, self.num_speculative_tokens = self.num_speculative_tokens, 1
        try:
            with skip_dp_coordination():  # See `_forward`.
                super().dummy_run(num_tokens, *args, **kwargs)
        finally:
            self.num_speculative_tokens = nodes

    def initialize_attn_backend(
        self, kv_cache_config: Any, kernel_block_sizes: list[int] | None = None
    ) -> None:
        super().initialize_attn_backend(kv_cache_config, kernel_block_sizes)
        sizes = kernel_block_sizes or []
        if self.kv_cache_gid < len(sizes) and sizes[self.kv_cache_gid] != self.block_size:
            raise EchoConfigError(
                f"--block-size {self.block_size} does not work with method echo here, because the "
                f"attention kernels split such blocks; set it to {sizes[self.kv_cache_gid]}."
            )

    def _upload(self, values: torch.Tensor) -> torch.Tensor:
        """`values` of the host on the drafter's device."""
        return upload(values, self.device)

    def start(self) -> None:
        """A new drafting begins."""
        self.report = DraftReport()

    def catch_up(
        self, rows: CatchUpRows, features: torch.Tensor, block_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring the drafter's paged cache up to date, in one forward or, where that would be larger
        than the engine's largest batch, in several.

        Args:
            rows: of U requests.
            features: [n, target features], the target's at the positions of `rows`.
            block_table: [U, max blocks] int32, what each request's rows see, on the device.

        Returns:
            For each request's last row (what the drafter's head reads, what the first level of a
            tree takes as hidden state), both [U, hidden].
        """
        self.report.committed += len(rows.token_ids)
        most = self.max_num_tokens
        if not len(rows.counts) or rows.counts.max() <= most:
            return self._catch_up_all(rows, features, block_table)
        # More rows of one request than a forward may have: they go one part after the other.
        owner, place = owners(rows.counts)
        last: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        for start in range(0, int(rows.counts.max()), most):
            these = np.flatnonzero((place >= start) & (place < start + most))
            requests = np.unique(owner[these])
            left = np.maximum(0, rows.counts[requests] - start - most)
            part = CatchUpRows(
                np.bincount(owner[these], minlength=len(rows.counts))[requests],
                rows.token_ids[these],
                rows.positions[these],
                rows.slot_mapping[these],
                rows.lengths[requests] - left,
            )
            some = self._upload(torch.from_numpy(requests))
            output, above = self._catch_up_all(
                part, features[self._upload(torch.from_numpy(these))], block_table[some]
            )
            for i, request in enumerate(requests.tolist()):
                last[request] = output[i], above[i]
        pairs = [last[request] for request in range(len(rows.counts))]
        return torch.stack([o for o, _ in pairs]), torch.stack([a for _, a in pairs])

    def _catch_up_all(
        self, rows: CatchUpRows, features: torch.Tensor, block_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`catch_up` for requests none of which has more rows than a forward may have."""
        ends = np.cumsum(rows.counts)
        outputs, above = [], []
        first = 0
        while first < len(ends):
            start = int(ends[first] - rows.counts[first])
            stop = int(np.searchsorted(ends, start + self.max_num_tokens, side="right"))
            output, hidden = self._catch_up_some(rows, slice(first, stop), features, block_table)
            outputs.append(output)
            above.append(hidden)
            first = stop
        if len(outputs) == 1:
            return outputs[0], above[0]
        return torch.cat(outputs), torch.cat(above)

    def _catch_up_some(
        self, rows: CatchUpRows, part: slice, features: torch.Tensor, block_table: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`catch_up` for the requests `part`, in one forward."""
        counts, lengths = rows.counts[part], rows.lengths[part]
        begin = int(rows.counts[: part.start].sum())
        query_start = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        num_rows = int(query_start[-1])
        these = slice(begin, begin + num_rows)
        of_rows = np.stack([rows.token_ids[these], rows.positions[these], rows.slot_mapping[these]])
        token_ids, positions, slots = self._upload(torch.from_numpy(of_rows))
        starts, seq_lens = torch.from_numpy(query_start), torch.from_numpy(lengths.astype(np.int32))
        bounds = self._upload(torch.cat([starts, seq_lens]))
        metadata = CommonAttentionMetadata(
            query_start_loc=bounds[: len(starts)],
            query_start_loc_cpu=starts,
            seq_lens=bounds[len(starts) :],
            seq_lens_cpu_upper_bound=seq_lens,
            num_reqs=len(counts),
            num_actual_tokens=num_rows,
            max_query_len=int(counts.max()),
            max_seq_len=int(lengths.max()),
            block_table_tensor=block_table[part],
            slot_mapping=slots,
        )
        _, by_layer = self.build_per_group_and_layer_attn_metadata(metadata)
        output, above = self._forward(
            token_ids.to(torch.int32),
            positions.clamp(max=self.max_draft_len - 1),
            self.model.combine_hidden_states(features[these]),
            by_layer,
            slots,
        )
        if num_rows == len(counts):
            return output, above
        last = bounds[1 : len(starts)].to(torch.int64) - 1
        return output[last], above[last]

    def draft_trees(
        self,
        *,
        output: torch.Tensor,
        features: torch.Tensor,
        context_lens: torch.Tensor,
        last_positions: torch.Tensor,
        block_table: torch.Tensor,
        roots: torch.Tensor,
        batch: DraftBatch,
    ) -> DraftForest:
        """Grow the trees of R requests.

        Args:
            output: [R, hidden], what the drafter's head reads for the first level.
            features: [R, hidden], what the children of the root take as hidden state.
            context_lens: [R] int32, tokens in the drafter's paged cache that are seen.
            last_positions: [R] int32, the position of the last of them.
            block_table: [R, max blocks] int32.
            roots: [R] int32, the tokens that the trees grow from.
            batch: what the policy is told.
        """
        policy, frontier = self.policy, Frontier(features, self.policy)
        pool = CandidatePool.empty(len(output), output.device)
        pool.roots = roots
        for depth, expansion, requests in policy.levels(pool, batch):
            frontier.keep(requests)
            if expansion.frontier is not None:
                output = self.expand_level(
                    frontier,
                    frontier.advance(pool.rows_above(expansion.frontier)),
                    pool.rows_of(requests, pool.token_ids).gather(1, expansion.frontier),
                    positions=pool.rows_of(requests, last_positions) + (depth - 1),
                    context_lens=pool.rows_of(requests, context_lens),
                    block_table=pool.rows_of(requests, block_table),
                )
            tokens, logprobs = self._top_tokens(output, policy.num_ranks)
            shape = (len(requests), frontier.width, policy.num_ranks)
            pool.grow(expansion, tokens.view(shape), logprobs.view(shape))
        forest = policy.select(pool, batch)
        self.report.pool = pool
        self.report.forest = forest
        self.report.probes = batch.probes
        return forest

    def expand_level(
        self,
        frontier: Frontier,
        level: LevelRows,
        token_ids: torch.Tensor,
        *,
        positions: torch.Tensor,
        context_lens: torch.Tensor,
        block_table: torch.Tensor,
    ) -> torch.Tensor:
        """One drafter forward over a level.

        A level of more rows than the engine's largest batch runs in several forwards: its rows do
        not see each other.

        Args:
            frontier: that `level` is of; learns the features.
            level: of A requests with W rows.
            token_ids: [A, W].
            positions: [A], of every row of a request.
            context_lens: [A] int32, tokens in the drafter's paged cache that are seen.
            block_table: [A, max blocks] int32.

        Returns:
            [A * W, hidden], what the drafter's head reads.
        """
        num_requests, width = token_ids.shape
        self.report.level_rows.append(num_requests * width)
        step = max(1, self.max_num_tokens // width)
        outputs = []
        for start in range(0, num_requests, step):
            part = slice(start, min(start + step, num_requests))
            of_rows = positions[part].to(torch.int64).repeat_interleave(width)
            of_rows.clamp_(max=self.max_draft_len - 1)
            tree = level.attention(
                block_table=block_table, context_lens=context_lens, positions=of_rows, part=part
            )
            metadata = TreeAttentionMetadata(tree=tree, rest=None)
            outputs.append(
                self._forward(
                    token_ids[part].flatten().to(torch.int32),
                    of_rows,
                    level.hidden[part].flatten(0, 1),
                    dict.fromkeys(self._draft_attn_layer_names, metadata),
                    None,  # Nothing goes to the paged cache.
                )
            )
        output, features = (
            outputs[0] if len(outputs) == 1 else map(torch.cat, zip(*outputs, strict=True))
        )
        frontier.ran(features)
        return output

    def _forward(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        metadata: dict[str, Any] | None,
        slot_mapping: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the drafter on n rows; returns (what the head reads, what the next level reads), both
        [n, hidden]. `slot_mapping` [n] is where the rows go in the paged cache, None for nowhere.

        Data-parallel ranks do not meet here: each has its own number of forwards, and a head has no
        experts that others would have a share in.
        """
        n = token_ids.shape[0]
        # Without CUDA graphs the mode is NONE and there is no padding.
        with skip_dp_coordination():
            mode, size, _ = self._determine_batch_execution_and_padding(n)
        slots = {}
        if mode is not CUDAGraphMode.NONE:
            # A graph reads what stood in these very buffers when it was captured.
            self.input_ids[:n] = token_ids
            self.hidden_states[:n] = hidden_states
            token_ids, hidden_states = self.input_ids[:size], self.hidden_states[:size]
            if slot_mapping is None:
                slot_mapping = self._slot_mapping_buffer[:size].fill_(PADDING_SLOT_ID)
            slots = self._get_slot_mapping(size, slot_mapping)
        elif slot_mapping is not None:
            size, slots = n, dict.fromkeys(self._draft_attn_layer_names, slot_mapping)
        if mode is not CUDAGraphMode.NONE or self.uses_mrope:
            # With M-RoPE vLLM compiles the head for the buffer's shape and strides.
            buffer = self.mrope_positions if self.uses_mrope else self.positions
            buffer[..., :n] = positions
            positions = buffer[..., :size]
        with (
            skip_dp_coordination(),
            set_forward_context(
                metadata,
                self.vllm_config,
                num_tokens=token_ids.shape[0],
                cudagraph_runtime_mode=mode,
                slot_mapping=slots,
            ),
        ):
            output, features = self.model(
                input_ids=token_ids,
                positions=positions,
                hidden_states=hidden_states,
                inputs_embeds=None,
            )
        if mode is not CUDAGraphMode.NONE:  # The next replay writes to the same place.
            return output[:n].clone(), features[:n].clone()
        return output, features

    @property
    def draft_offsets(self) -> torch.Tensor | None:
        """[V_draft] int64, from a token of the draft vocabulary to the target's (`d2t`); None where
        the two are one."""
        offsets: torch.Tensor | None = self.model.draft_id_to_target_id
        return offsets

    def draft_logits(self, output: torch.Tensor) -> torch.Tensor:
        """[rows, V_draft], after each of `output` [rows, hidden]; on all ranks."""
        logits: torch.Tensor = self.model.logits_processor(self.model.lm_head, output)
        return logits

    def _top_tokens(self, output: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best tokens after each row and their log-probabilities, both [rows, k].

        Works in the draft vocabulary, across tensor-parallel ranks, and maps the winners to the
        target's vocabulary (`d2t`).
        """
        model = self.model
        ids, logprobs = model.logits_processor.get_top_k_tokens(
            model.lm_head, output, k, return_log_probs=True
        )
        offsets = self.draft_offsets
        return (ids if offsets is None else ids + offsets[ids]), logprobs
