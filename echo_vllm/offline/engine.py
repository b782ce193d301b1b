# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A real engine inside this process: of calibration, training, benchmarks and tests.

Its core lives in this process too (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), so that its scheduler and
its model runner can be seen, and no time goes from process to process.
"""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Self

from echo_vllm.conversations import Chat, Question


class LocalEngine:
    """A `vllm.LLM` and what is inside it; leaving its `with` block tears it down.

    Attributes:
        llm: for whoever wants answers to a list of prompts.
        engine: its `LLMEngine`, for whoever counts steps.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        """Load the model; in a process that has not imported vLLM before, or made one of these.

        Where the environment does not say otherwise vLLM warns only, has 1 GiB of KV cache on a
        CPU, and does not look at the network for a model in a folder.

        Args:
            model: a folder or a name.
            options: of `vllm.LLM`; eager mode unless they say otherwise.

        Raises:
            ValueError, OSError, RuntimeError, TypeError: vLLM's own, if the model does not load.
        """
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if Path(model).is_dir():
            os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from vllm import LLM

        # vLLM collects garbage five times while it starts, and would look at every object that an
        # import has made: half a second each time. At its end it takes this back itself.
        gc.freeze()
        self.llm: Any = LLM(str(model), **{"enforce_eager": True, **options})
        self.engine: Any = self.llm.llm_engine
        self._model = str(model)

    @property
    def scheduler(self) -> Any:
        """vLLM's scheduler, or this project's."""
        return self.engine.engine_core.engine_core.scheduler

    @property
    def runner(self) -> Any:
        """The model runner of the only rank."""
        core = self.engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    @functools.cached_property
    def chat(self) -> Chat:
        """The model's tokenizer and chat template."""
        return Chat(self._model)

    @property
    def max_model_len(self) -> int:
        """Tokens of a request at most, prompt and answer."""
        return int(self.engine.model_config.max_model_len)

    def counters(self) -> dict[str, Any]:
        """What vLLM has counted so far, by name without `vllm:`: numbers, and lists of them."""
        found = {}
        for metric in self.llm.get_metrics():
            value = getattr(metric, "value", getattr(metric, "values", None))
            if value is not None:
                found[metric.name.removeprefix("vllm:")] = value
        return found

    def add(self, question: Question) -> None:
        """Give the engine a request, of which only the whole answer comes out."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.engine.add_request(
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
        waiting = iter(questions)
        running: dict[str, Question] = {}
        # As many again as are in a batch, so that none is ever missing.
        most = 2 * self.scheduler.scheduler_config.max_num_seqs

        def begin(question: Question | None) -> bool:
            if question is not None:
                self.add(question)
                running[question.name] = question
            return question is not None

        while True:
            while len(running) < most and begin(next(waiting, None)):
                pass
            if not running:
                return
            for output in self.engine.step():
                if output.finished:
                    question, answer = running.pop(output.request_id), output.outputs[0]
                    stopped = answer.finish_reason == "stop"
                    begin(on_answer(question, list(answer.token_ids), stopped))

    def answer_each(
        self,
        prompts: Sequence[list[int]],
        max_tokens: int,
        temperature: float,
        on_finished: Callable[[], None] = lambda: None,
    ) -> list[list[int]]:
        """Token ids of an answer to each of `prompts`, token ids; seeds are the prompts' numbers.

        `on_finished` is called for each request that ends.
        """
        answers: dict[str, list[int]] = {}

        def keep(question: Question, ids: list[int], stopped: bool) -> None:
            answers[question.name] = ids
            on_finished()

        self.answer(
            (
                Question(str(i), ids, max_tokens, temperature, seed=i)
                for i, ids in enumerate(prompts)
            ),
            keep,
        )
        return [answers[str(i)] for i in range(len(prompts))]

    def close(self) -> None:
        """End the engine and free its memory."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self.engine.engine_core.shutdown()
        del self.engine, self.llm
        cleanup_dist_env_and_memory()  # collects garbage

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
