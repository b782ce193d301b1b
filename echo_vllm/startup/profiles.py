# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Finds the drafter's profile and checks the files that the `echo` section names."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from huggingface_hub import hf_hub_download
from vllm.logger import init_logger

from echo_vllm.config import SECTION, EchoConfig, EchoConfigError, show
from echo_vllm.forecast.drafter_profile import FILE_NAME, DrafterProfile
from echo_vllm.policies import policy_class
from echo_vllm.startup.head import local_file

logger = init_logger(f"vllm.{__name__}")


def find_profile(
    config: EchoConfig, head: str, revision: str | None = None
) -> DrafterProfile | None:
    """The profile that the policy uses; None, with a warning, if there is none.

    Args:
        config: the echo section.
        head: the EAGLE-3 head as the user named it; its folder is searched, or its repository in
            the Hugging Face cache.
        revision: of the Hugging Face repository.

    Raises:
        EchoConfigError: the profile that the section names cannot be used.
    """
    without = policy_class(config.policy).without_profile
    if without is None:
        return None
    given: str | None = getattr(config, "profile", None)
    if given is not None:
        profile = DrafterProfile.load(given)
        if Path(profile.drafter).name != Path(head).name:
            logger.warning_once(
                "The profile %s was made for the draft head %s, and the head is %s: what it says "
                "of confidence may not be true. `echo-vllm calibrate` makes one for this head.",
                given,
                profile.drafter,
                head,
            )
        return profile
    beside = local_file(head, FILE_NAME, revision)
    if beside is not None:
        return DrafterProfile.load(beside)
    logger.warning_once(
        "No profile of the draft head %s: policy %s works, but %s. `echo-vllm calibrate` makes "
        "one.",
        head,
        config.policy,
        without,
    )
    return None


def check_files(config: EchoConfig, head: str, revision: str | None = None) -> None:
    """Refuse a profile that cannot be read and a trace that cannot be written.

    Raises:
        EchoConfigError: in one sentence.
    """
    if policy_class(config.policy).without_profile is not None and not Path(head).is_dir():
        # vLLM downloads only what it reads itself; without a connection the cache has to do.
        with suppress(Exception):
            hf_hub_download(head, FILE_NAME, revision=revision)
    find_profile(config, head, revision)
    if config.trace is None:
        return
    try:
        file = Path(config.trace)
        is_new = not file.exists()
        with file.open("a", encoding="utf-8"):
            pass
        if is_new:
            file.unlink()
    except (OSError, ValueError):
        raise EchoConfigError(
            f"{SECTION}.trace must name a file in a folder that exists and is writable, got "
            f"{show(config.trace)}; make the folder, or choose another."
        ) from None
