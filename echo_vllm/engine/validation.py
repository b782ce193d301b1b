# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What happens to vLLM's configuration at start-up when the method is `echo`.

The patched vLLM calls two functions of this module, and nothing else of the package, before any
weight is loaded: `normalise_speculative_config` turns the user's speculative config into the
eagle3 config that vLLM's own machinery understands, `configure_engine` chooses worker and
scheduler and refuses what tree speculation cannot work with. Both raise EchoConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from echo_vllm.config import MAX_NODES, EchoConfig, EchoConfigError, closest, show

if TYPE_CHECKING:
    from vllm.config import VllmConfig

CPU_WORKER = "echo_vllm.engine.worker.EchoCPUWorker"
CUDA_WORKER = "echo_vllm.engine.worker.EchoWorker"
SCHEDULER = "echo_vllm.engine.scheduler.EchoScheduler"

# Fields of vLLM's SpeculativeConfig that mean for method echo what they mean for eagle3. The last
# line is filled in by vLLM, never by the user.
PASSED_ON = frozenset(
    {
        *("method", "model", "num_speculative_tokens", "echo"),
        *("revision", "code_revision", "quantization", "draft_load_config", "moe_backend"),
        *("enforce_eager", "draft_tensor_parallel_size"),
        *("target_model_config", "target_parallel_config"),
        *("draft_model_config", "draft_parallel_config"),
    }
)

# All other fields: the only value that is accepted with method echo, and why no other is.
FIXED: dict[str, tuple[object, str]] = {
    "disable_padded_drafter_batch": (True, "trees of different sizes share a batch"),
    "tensor_parallel_size": (None, "vLLM calls it draft_tensor_parallel_size"),
    "attention_backend": (None, "the draft head uses the tree attention of the target"),
    "kv_cache_dtype": (None, "the draft head's cache has the target's type"),
    "max_model_len": (None, "the draft head covers the target's max_model_len"),
    "index_share_for_mtp_iteration": (None, "it belongs to method mtp"),
    "disable_eagle_block_drop": (False, "the draft head needs the dropped block recomputed"),
    "use_local_argmax_reduction": (False, "a tree needs more than the best token of a node"),
    "use_heterogeneous_vocab": (False, "it belongs to method draft_model"),
    "prompt_lookup_max": (None, "it belongs to method ngram"),
    "prompt_lookup_min": (None, "it belongs to method ngram"),
    "parallel_drafting": (False, "a tree is drafted level by level"),
    "num_speculative_tokens_per_batch_size": (None, "the policy decides how much is drafted"),
    "suffix_decoding_max_tree_depth": (24, "it belongs to method suffix"),
    "suffix_decoding_max_cached_requests": (10000, "it belongs to method suffix"),
    "suffix_decoding_max_spec_factor": (1.0, "it belongs to method suffix"),
    "suffix_decoding_min_token_prob": (0.1, "it belongs to method suffix"),
    "rejection_sample_method": (
        "standard",
        "every row is sampled from the target's own distribution, without rejection sampling",
    ),
    "synthetic_acceptance_rates": (None, "acceptance is never synthetic"),
    "synthetic_acceptance_length": (None, "acceptance is never synthetic"),
    "enable_adaptive_verification": (False, "it belongs to method dspark"),
    "draft_sample_method": ("greedy", "the candidates are the draft head's best tokens"),
    "dspark_draft_topk": (None, "it belongs to method dspark"),
}


def normalise_speculative_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of a SpeculativeConfig with method echo, for vLLM's eagle3 machinery.

    Args:
        values: what SpeculativeConfig was called with. A config that this function made before
            (vLLM copies configs) passes through.

    Returns:
        The same arguments with method "eagle3", unpadded draft batches, and the validated
        EchoConfig in `echo`.

    Raises:
        EchoConfigError: for the first thing that cannot work, in one sentence.
    """
    if isinstance(values.get("echo"), EchoConfig):
        return dict(values)
    method = values.get("method")
    if method != "echo":
        raise EchoConfigError(
            f"speculative_config.echo belongs to method echo, got method {show(method)}; set "
            "speculative_config.method to echo, or remove the section."
        )
    for name, value in values.items():
        _check_field(name, value)
    _check_model(values.get("model"))
    num_nodes = _checked_num_nodes(values.get("num_speculative_tokens"))
    section = values.get("echo")
    config = EchoConfig.from_section(
        {} if section is None else section, num_speculative_tokens=num_nodes
    )
    return {
        **values,
        "method": "eagle3",
        "disable_padded_drafter_batch": True,
        "echo": config,
    }


def _check_field(name: str, value: object) -> None:
    if name in PASSED_ON:
        return
    if name not in FIXED:
        known = (*PASSED_ON, *FIXED)
        raise EchoConfigError(
            f"speculative_config.{name} is not a known field, got {show(value)}"
            f"{closest(name, known)}; remove it."
        )
    accepted, why = FIXED[name]
    if value != accepted:
        raise EchoConfigError(
            f"speculative_config.{name} must be {show(accepted)} with method echo because {why}, "
            f"got {show(value)}; remove it."
        )


def _check_model(model: object) -> None:
    if not isinstance(model, str) or not model:
        raise EchoConfigError(
            "speculative_config.model is required with method echo and must name an EAGLE-3 head, "
            f"got {show(model)}; set it to the folder or the Hugging Face id of the head."
        )


def _checked_num_nodes(num_nodes: object) -> int:
    if (
        isinstance(num_nodes, bool)
        or not isinstance(num_nodes, int)
        or not (1 <= num_nodes <= MAX_NODES)
    ):
        raise EchoConfigError(
            "speculative_config.num_speculative_tokens is required with method echo and must be "
            f"an integer between 1 and {MAX_NODES}, got {show(num_nodes)}; set it to the nodes "
            "that one request's tree may have."
        )
    return num_nodes


def configure_engine(vllm_config: VllmConfig) -> None:
    """Choose what runs tree speculation, or refuse the configuration.

    Called at the top of VllmConfig.__post_init__ when the method is echo; vLLM copies configs, so
    a second call on the result must change nothing.

    Raises:
        EchoConfigError: for the first thing that cannot work, in one sentence.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        worker = CPU_WORKER
    elif current_platform.is_cuda():
        worker = CUDA_WORKER
    else:
        refuse("the device", current_platform.device_type, "run on a CPU or an NVIDIA GPU")
    _choose(vllm_config.parallel_config, "worker_cls", "auto", worker)
    _choose(vllm_config.scheduler_config, "scheduler_cls", None, SCHEDULER)
    if vllm_config.scheduler_config.async_scheduling:
        refuse("--async-scheduling", True, "remove it")
    vllm_config.scheduler_config.async_scheduling = False
    if current_platform.is_cuda():
        _choose_piecewise_graphs(vllm_config)


def refuse(what: str, value: object, remedy: str) -> NoReturn:
    """Raise the one sentence that says what speculative method echo does not work with."""
    raise EchoConfigError(
        f"speculative_config.method echo does not work with {what} {show(value)}; {remedy}."
    )


def _choose(config: Any, name: str, unset: str | None, ours: str) -> None:
    given = getattr(config, name)
    if given not in (unset, ours):
        shown = given if isinstance(given, str) else f"{given.__module__}.{given.__qualname__}"
        refuse(f"--{name.replace('_', '-')}", shown, f"remove it, {ours} is used")
    setattr(config, name, ours)


def _choose_piecewise_graphs(vllm_config: VllmConfig) -> None:
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    elif compilation.cudagraph_mode.has_full_cudagraphs():
        refuse(
            "cudagraph_mode",
            compilation.cudagraph_mode.name,
            "set it to PIECEWISE or NONE, because the rows of a step change with the trees",
        )
