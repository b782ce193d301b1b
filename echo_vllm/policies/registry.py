# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""From names to policies, and from the section that a user wrote to a policy's own model.

The policies of this project are imported; a package of somebody else adds one by an entry point of
the group `echo_vllm.policies`, whose name is the policy's and whose object is a `DraftPolicy`. An
entry point is loaded when a section names its policy, and never instead of a policy of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from importlib.metadata import entry_points
from operator import or_
from typing import Annotated, Any

from pydantic import Field, ValidationError

from echo_vllm.config import SECTION, EchoConfig, EchoConfigError, closest, either, show, show_name
from echo_vllm.forecast.drafter_profile import DrafterProfile
from echo_vllm.policies.auto import AutoPolicy
from echo_vllm.policies.base import DraftPolicy
from echo_vllm.policies.chain import ChainPolicy
from echo_vllm.policies.echo import EchoPolicy
from echo_vllm.policies.evict import EvictPolicy
from echo_vllm.policies.graft import GraftPolicy
from echo_vllm.policies.static import StaticPolicy
from echo_vllm.policies.topn import TopNPolicy

GROUP = "echo_vllm.policies"
"""Of the entry points."""

DEFAULT = "auto"

BUILT_IN: dict[str, type[DraftPolicy]] = {
    policy.Config.model_fields["policy"].default: policy
    for policy in (
        ChainPolicy,
        StaticPolicy,
        TopNPolicy,
        EchoPolicy,
        AutoPolicy,
        EvictPolicy,
        GraftPolicy,
    )
}


def policy_names() -> list[str]:
    """All policies that a section may name: ours, then those of other packages."""
    others = {point.name for point in entry_points(group=GROUP)}
    return [*BUILT_IN, *sorted(others - BUILT_IN.keys())]


def policy_class(name: object) -> type[DraftPolicy]:
    """The class of the policy `name`.

    Raises:
        EchoConfigError: there is none, or another package's cannot be used; one sentence.
    """
    if isinstance(name, str):
        if name in BUILT_IN:
            return BUILT_IN[name]
        for point in entry_points(group=GROUP, name=name):
            return _loaded(point)
    names = policy_names()
    hint = closest(name, names) if isinstance(name, str) else ""
    raise EchoConfigError(
        f"{SECTION}.policy must be one of {', '.join(names)}, got {show(name)}{hint}; set it to "
        "one of them."
    )


def _loaded(point: Any) -> type[DraftPolicy]:
    def refuse(reason: str) -> EchoConfigError:
        return EchoConfigError(
            f"{SECTION}.policy {point.name} is the entry point {point.value} of another package, "
            f"which cannot be used ({reason}); repair or uninstall that package, or choose "
            "another policy."
        )

    try:
        policy = point.load()
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise refuse(reason) from error
    if not (isinstance(policy, type) and issubclass(policy, DraftPolicy)):
        raise refuse(f"it is no subclass of {DraftPolicy.__module__}.{DraftPolicy.__name__}")
    model = getattr(policy, "Config", None)
    if not (isinstance(model, type) and issubclass(model, EchoConfig)):
        raise refuse("its Config is no subclass of echo_vllm.config.EchoConfig")
    if model.model_fields["policy"].default != point.name:
        raise refuse(f'the default of its Config\'s field policy is not "{point.name}"')
    return policy


def section_models() -> dict[str, type[EchoConfig]]:
    """The model of every policy's section by its name; a package that cannot be used has none."""
    models = {}
    for name in policy_names():
        try:
            models[name] = policy_class(name).Config
        except EchoConfigError:
            continue
    return models


def section_type() -> Any:
    """The `echo` section as one type: the union of all models, told apart by `policy`.

    For a schema and a reference of the fields: `pydantic.TypeAdapter(section_type())`.
    """
    return Annotated[reduce(or_, section_models().values()), Field(discriminator="policy")]


def field_names() -> list[str]:
    """The fields of all policies' sections, each once."""
    models = section_models().values()
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def parse_section(section: object, *, num_speculative_tokens: int) -> EchoConfig:
    """Validate the `echo` section as the user wrote it, and fill in every default.

    Args:
        section: the parsed JSON value; must be an object.
        num_speculative_tokens: nodes that one request's tree may have, 1 to MAX_NODES.

    Returns:
        The policy's own model.

    Raises:
        EchoConfigError: with one sentence on the first thing that is wrong.
    """
    if not isinstance(section, Mapping):
        raise EchoConfigError(
            f"{SECTION} must be a JSON object, got {show(section)}; "
            "leave it out, or write {}, for the defaults."
        )
    # vLLM takes dashes for underscores in the names of its own config's fields.
    fields = {str(name).replace("-", "_"): value for name, value in section.items()}
    if len(fields) < len(section):
        raise EchoConfigError(
            f"{SECTION} must not name a field twice, got {show(list(section))}; remove one of "
            "the two spellings."
        )
    policy = policy_class(fields.setdefault("policy", DEFAULT))
    own = policy.Config.model_fields
    for name in [name for name in fields if name not in own]:
        _check_foreign(name, fields.pop(name), fields["policy"])
    try:
        config = policy.Config.model_validate(fields)
    except ValidationError as error:
        report = error.errors(include_url=False)[0]
        if not report["loc"]:  # A check of the whole section.
            raise EchoConfigError(
                f"{SECTION} is not valid ({report['msg']}); correct it."
            ) from None
        raise EchoConfigError(
            policy.Config.refusal(report["loc"], report["input"], report["type"], report["msg"])
        ) from None
    if config.trace is not None and policy.not_traced is not None:
        raise EchoConfigError(
            f"{SECTION}.trace does not work with policy {config.policy}, because "
            f"{policy.not_traced}, got {show(config.trace)}; remove it, or choose another policy."
        )
    if config.candidates == "drawn" and not policy.draws:
        names = either([name for name, each in BUILT_IN.items() if each.draws])
        raise EchoConfigError(
            f"{SECTION}.candidates drawn needs a policy that gives out nodes before their tokens "
            f'are drawn, got policy {config.policy}; set it to "auto" or "best", or '
            f"{SECTION}.policy to {names}."
        )
    return config.filled(num_speculative_tokens)


def draws_of(config: EchoConfig) -> bool:
    """Whether requests with a temperature may get drawn candidates."""
    return config.candidates != "best" and policy_class(config.policy).draws


def _check_foreign(name: str, value: object, policy: str) -> None:
    """Refuse a field that `policy` would ignore, unless it has the value that it has anyway.

    Raises:
        EchoConfigError: it belongs to other policies, or to none.
    """
    owners = {
        owner: model.model_fields[name]
        for owner, model in section_models().items()
        if name in model.model_fields
    }
    where, got = f"{SECTION}.{show_name(name)}", show(value)
    if not owners:
        names = field_names()
        raise EchoConfigError(
            f"{where} is not a known field, got {got}{closest(name, names)}; the fields are "
            f"{', '.join(names)}."
        )
    defaults = [field.default for field in owners.values()]
    if any(type(value) is type(default) and value == default for default in defaults):
        return
    raise EchoConfigError(
        f"{where} belongs to policy {either(list(owners))}, got policy {policy}; remove "
        f"{where}, or set {SECTION}.policy to {next(iter(owners))}."
    )


def make_policy(
    config: EchoConfig, num_speculative_tokens: int, profile: DrafterProfile | None = None
) -> DraftPolicy:
    """The policy that `config` names.

    Args:
        config: the validated section.
        num_speculative_tokens: the most nodes a request may have (N).
        profile: of the drafter, for a policy that reads one; None takes built-in values.
    """
    return policy_class(config.policy)(config, num_speculative_tokens, profile)
