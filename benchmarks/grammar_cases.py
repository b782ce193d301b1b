# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Requests whose answers have a schema, and the task of answering them, for an `EngineProcess`."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from typing import Any

from echo_vllm.offline.engine import LocalEngine


def text(most: int = 24) -> dict[str, Any]:
    """A schema of at most so many characters."""
    return {"type": "string", "pattern": f"^[A-Za-z ]{{1,{most}}}$"}


def whole_number(least: int, most: int) -> dict[str, Any]:
    """A schema of an integer."""
    return {"type": "integer", "minimum": least, "maximum": most}


def listed(of: dict[str, Any], most: int) -> dict[str, Any]:
    """A schema of 1 to `most` items."""
    return {"type": "array", "items": of, "minItems": 1, "maxItems": most}


def record(**fields: dict[str, Any]) -> dict[str, Any]:
    """A schema of an object that has these fields and no other."""
    return {
        "type": "object",
        "properties": fields,
        "required": list(fields),
        "additionalProperties": False,
    }


RECORDS = {
    "a person": record(name=text(), age=whole_number(0, 120), city=text()),
    "a recipe": record(title=text(40), minutes=whole_number(1, 300), ingredients=listed(text(), 4)),
    "a book": record(title=text(40), author=text(), year=whole_number(1500, 2030)),
    "a review": record(stars=whole_number(1, 5), verdict={"enum": ["good", "bad"]}, why=text(60)),
    "an event": record(name=text(), day={"enum": ["Monday", "Friday", "Sunday"]}, place=text()),
    "a product": record(name=text(), price=whole_number(1, 9999), in_stock={"type": "boolean"}),
    "a trip": record(start=text(), end=text(), stops=listed(record(place=text()), 3)),
    "a task": record(title=text(40), done={"type": "boolean"}, tags=listed(text(12), 3)),
}
SUBJECTS = ("music", "the sea", "winter", "cats", "Paris", "football", "coffee", "the moon")

TOOLS = {
    "get_weather": record(city=text(), unit={"enum": ["celsius", "fahrenheit"]}),
    "book_table": record(restaurant=text(), people=whole_number(1, 12)),
    "send_message": record(to=text(), subject=text(40), urgent={"type": "boolean"}),
    "play_song": record(title=text(40), volume=whole_number(0, 10)),
}
WISHES = (
    "What is the weather in Rome?",
    "Book a table for four at Luigi's.",
    "Tell Anna that the meeting is off.",
    "Play Yesterday, not too loud.",
    "Will it rain in Oslo tomorrow?",
    "We are six and want to eat Thai food.",
    "Let Tom know that I am late.",
    "I would like to hear some jazz.",
)
PEOPLE = ("", "Please. ", "Quickly: ", "I am Eva. ", "Hello! ", "Good morning. ", "Sorry. ", "Hm. ")


def cases() -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Kind -> 64 of (what the user says, the answer's schema)."""
    # What vLLM makes of `tool_choice` "required".
    call = {
        "anyOf": [
            record(name={"const": name}, parameters=parameters)
            for name, parameters in TOOLS.items()
        ]
    }
    return {
        "JSON schema": [
            (f"Make up {thing} about {subject}, as JSON.", schema)
            for (thing, schema), subject in itertools.product(RECORDS.items(), SUBJECTS)
        ],
        "tool call": [
            (f"{person}{wish} Answer with a call of one tool: {', '.join(TOOLS)}.", listed(call, 1))
            for person, wish in itertools.product(PEOPLE, WISHES)
        ],
    }


@dataclass(frozen=True)
class Answers:
    """Of one run, in the order of its prompts.

    Attributes:
        token_ids, texts: the answers.
        ended: whether each came to its end.
        seconds: of the run.
        tokens_per_step: of a request, in the steps that gave it any.
    """

    token_ids: list[list[int]]
    texts: list[str]
    ended: list[bool]
    seconds: float
    tokens_per_step: float

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(map(len, self.token_ids))


@dataclass(frozen=True)
class Constrained:
    """Answer prompts (token ids), each under its JSON schema, as many at once as the engine has
    places for."""

    prompts: list[list[int]]
    schemas: list[dict[str, Any]]
    max_tokens: int

    def run(self, local: LocalEngine) -> Answers:
        from vllm import SamplingParams
        from vllm.sampling_params import StructuredOutputsParams

        local.engine.reset_prefix_cache()
        for place, (ids, schema) in enumerate(zip(self.prompts, self.schemas, strict=True)):
            params = SamplingParams(
                temperature=0.0,
                max_tokens=self.max_tokens,
                structured_outputs=StructuredOutputsParams(
                    json=schema, disable_any_whitespace=True
                ),
            )
            local.engine.add_request(str(place), {"prompt_token_ids": ids}, params)
        found: dict[int, Any] = {}
        request_steps = 0
        start = time.perf_counter()
        while local.engine.has_unfinished_requests():
            outputs = local.engine.step()
            request_steps += len(outputs)
            found |= {int(o.request_id): o.outputs[0] for o in outputs if o.finished}
        seconds = time.perf_counter() - start
        answers = [found[place] for place in range(len(self.prompts))]
        token_ids = [list(answer.token_ids) for answer in answers]
        return Answers(
            token_ids,
            [answer.text for answer in answers],
            [answer.finish_reason == "stop" for answer in answers],
            seconds,
            sum(map(len, token_ids)) / request_steps,
        )
