# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What is replayed: policies as a user configures them, plain decoding, and who knows too much."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echo_vllm.config import MAX_NODES, SECTION, EchoConfig, EchoConfigError
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.policies import DraftPolicy, make_policy, parse_section, policy_class
from echo_vllm.trace_format import TraceError

PLAIN = "plain"


@dataclass(frozen=True)
class Contender:
    """A policy.

    Attributes:
        name: for tables.
        config: of its policy, None for plain decoding, without a drafter.
        num_nodes: num_speculative_tokens.
        profile: of the drafter.
    """

    name: str
    config: EchoConfig | None = None
    num_nodes: int = 0
    profile: DrafterProfile | None = None

    def policy(self) -> DraftPolicy | None:
        """A new one, which has learned nothing yet."""
        if self.config is None:
            return None
        return make_policy(self.config, self.num_nodes, self.profile)

    @classmethod
    def of(
        cls,
        name: str,
        section: object,
        num_speculative_tokens: int,
        profile: DrafterProfile | None = None,
    ) -> Contender:
        """From an echo section as a user writes it.

        Raises:
            EchoConfigError: the section is wrong.
        """
        config = parse_section(section, num_speculative_tokens=num_speculative_tokens)
        if (reason := policy_class(config.policy).not_traced) is not None:
            raise EchoConfigError(
                f"{SECTION}.policy must be one that a trace can replay, got {config.policy}, "
                f"because {reason}; choose another."
            )
        return cls(name, config, num_speculative_tokens, profile)

    @classmethod
    def chain(cls, length: int) -> Contender:
        """A chain of fixed length; of none, plain decoding."""
        if not length:
            return cls(PLAIN)
        return cls.of(f"chain:{length}", {"policy": "chain"}, length)


@dataclass(frozen=True)
class Oracle:
    """Knows before drafting which of the recorded candidates the target accepts.

    It drafts for each request a length of its own, none as well, so that the whole run makes the
    most tokens a second (`oracle.best_lengths`); its drafter passes one row a node.

    Attributes:
        knows: `chain` takes the drafter's best tokens alone, `tree` the accepted path wherever it
            goes in the recorded tree: the best of all trees of recorded candidates.
    """

    knows: Literal["chain", "tree"]

    @property
    def name(self) -> str:
        return "oracle" if self.knows == "chain" else "oracle tree"


@dataclass(frozen=True)
class BestTable:
    """The fastest fixed chain for each number of requests, none as well, in hindsight."""

    name: str = "best table"


AnyContender = Contender | Oracle | BestTable
KNOWING: dict[str, AnyContender] = {
    found.name: found for found in (BestTable(), Oracle("chain"), Oracle("tree"))
}


def parse_contender(text: str, profile: DrafterProfile | None = None) -> AnyContender:
    """From a command line: `plain`, `oracle`, `oracle tree`, `best table`, `NAME:N`, `NAME:N:{...}`
    with more fields of the echo section as JSON, or the name of a JSON file with a speculative
    config.

    Raises:
        EchoConfigError: a field of the section is wrong.
        TraceError: the text is none of these.
    """
    if text == PLAIN:
        return Contender(PLAIN)
    if text in KNOWING:
        return KNOWING[text]
    wrong = TraceError(
        f"a policy must be plain, {', '.join(KNOWING)}, NAME:N, NAME:N:{{...}} or a JSON file, got "
        f'{text!r}; write it as topn:16, or as echo:16:{{"k_max": 64}}.'
    )
    if text.endswith(".json"):
        try:
            spec = json.loads(Path(text).read_text(encoding="utf-8"))
            section, nodes = spec.get("echo", {}), spec["num_speculative_tokens"]
            return Contender.of(Path(text).stem, section, nodes, profile)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if hasattr(error, "is_echo_config_error"):
                raise
            raise wrong from None
    policy, _, rest = text.partition(":")
    number, _, fields = rest.partition(":")
    if not (number.isdecimal() and 1 <= int(number) <= MAX_NODES):
        raise wrong
    try:
        more = json.loads(fields) if fields else {}
        section = {**more, "policy": policy}
    except (ValueError, TypeError):
        raise wrong from None
    return Contender.of(text, section, int(number), profile)
