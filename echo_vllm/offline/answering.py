# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Lets an engine of this process answer many prompts, each answer handed over when it is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from echo_vllm.offline.engine import prepare_environment


@dataclass(frozen=True)
class Question:
    """One request.

    Attributes:
        name: of the request, unique.
        prompt_ids: token ids.
        temperature: 0 is greedy.
        top_p: as in vLLM.
        max_tokens: of the answer.
        seed: of sampling.
    """

    name: str
    prompt_ids: list[int]
    temperature: float
    top_p: float
    max_tokens: int
    seed: int


class Answering:
    """A plain engine, without speculation."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_model_len: int | None,
        concurrency: int,
        engine_args: Mapping[str, Any] | None = None,
    ) -> None:
        """Load the target; to be called once in a process that has not imported vLLM before.

        Args:
            model: a folder or a name.
            dtype: as in vLLM.
            max_model_len: tokens of a request; None for the model's own.
            concurrency: requests at once.
            engine_args: more of vLLM's EngineArgs, or others in the place of these.

        Raises:
            ValueError, OSError, RuntimeError: vLLM's own, if the target does not load.
        """
        prepare_environment(model)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import EngineArgs, LLMEngine

        self._concurrency = concurrency
        arguments: dict[str, Any] = {
            "model": model,
            "dtype": dtype,
            "max_model_len": max_model_len,
            "max_num_seqs": concurrency,
            "enforce_eager": True,
            "disable_log_stats": True,
            **(engine_args or {}),
        }
        self._engine: Any = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self.max_model_len = int(self._engine.model_config.max_model_len)

    def answer(
        self,
        questions: Iterable[Question],
        on_answer: Callable[[Question, list[int], bool], Question | None],
    ) -> None:
        """Answer all questions.

        Args:
            questions: read as the engine gets free.
            on_answer: called with a question, the answer's token ids, and whether the target ended
                it by itself; may return another question, which is answered, too.
        """
        waiting: Iterator[Question] = iter(questions)
        running: dict[str, Question] = {}
        while True:
            while len(running) < 2 * self._concurrency:
                question = next(waiting, None)
                if question is None:
                    break
                self._add(question, running)
            if not running:
                return
            for output in self._engine.step():
                if not output.finished:
                    continue
                question = running.pop(output.request_id)
                completion = output.outputs[0]
                more = on_answer(
                    question, list(completion.token_ids), completion.finish_reason == "stop"
                )
                if more is not None:
                    self._add(more, running)

    def close(self) -> None:
        """End the engine."""
        self._engine.engine_core.shutdown()

    def _add(self, question: Question, running: dict[str, Question]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self._engine.add_request(
            question.name,
            {"prompt_token_ids": question.prompt_ids},
            SamplingParams(
                temperature=question.temperature,
                top_p=question.top_p,
                max_tokens=question.max_tokens,
                seed=question.seed if question.temperature > 0 else None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,  # No output each step, which takes time.
            ),
        )
        running[question.name] = question
