# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What happens to vLLM's configuration at start-up when the method is `echo`.

The patched vLLM calls three functions of this module, and nothing else of the package, before any
weight is loaded: `check_engine_args` looks at the options that vLLM would refuse in other words,
`normalise_speculative_config` turns the user's speculative config into the eagle3 config that
vLLM's own machinery understands, `configure_engine` chooses worker and scheduler. All refuse what
tree speculation cannot work with: every refusal is an EchoConfigError, one sentence that names the
option or the model, and what to do.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch
from pydantic import TypeAdapter, ValidationError
from vllm.logger import init_logger

from echo_vllm import ops
from echo_vllm.config import (
    SECTION,
    EchoConfig,
    EchoConfigError,
    check_num_nodes,
    closest,
    show,
    show_name,
)
from echo_vllm.ops import attention_table, dispatch
from echo_vllm.policies import parse_section
from echo_vllm.policies.registry import field_names
from echo_vllm.startup.head import (
    FIELD,
    Head,
    Target,
    check_arithmetic,
    check_weights,
    read_head,
    weights_folder,
)
from echo_vllm.startup.profiles import check_files

if TYPE_CHECKING:
    from vllm.config import ModelConfig, ParallelConfig, VllmConfig

logger = init_logger(f"vllm.{__name__}")

CPU_WORKER = "echo_vllm.step.v1.cpu.EchoCPUWorker"
CUDA_WORKER = "echo_vllm.step.v1.cuda.EchoWorker"
SCHEDULER = "echo_vllm.step.scheduler.EchoScheduler"

# On Model Runner V2, for who asks for it.
CPU_WORKER_V2 = "echo_vllm.step.v2.worker.EchoCPUWorkerV2"
CUDA_WORKER_V2 = "echo_vllm.step.v2.worker.EchoWorkerV2"
SCHEDULER_V2 = "echo_vllm.step.v2.scheduler.EchoSchedulerV2"
ASYNC_SCHEDULER_V2 = "echo_vllm.step.v2.scheduler.EchoAsyncSchedulerV2"

_HEAD_FIELDS = (
    *("model", "revision", "code_revision"),
    *("target_model_config", "target_parallel_config"),
)

MAX_HEAD_SIZE = 256
"""Of `ops.tree_attention` on a GPU."""

# Fields of vLLM's SpeculativeConfig that mean for method echo what they mean for eagle3. The last
# line is filled in by vLLM, never by the user.
PASSED_ON = frozenset(
    {
        *("method", "model", "num_speculative_tokens", "echo"),
        *("revision", "code_revision", "quantization", "draft_load_config", "moe_backend"),
        *("enforce_eager", "draft_tensor_parallel_size", "disable_eagle_block_drop"),
        *("target_model_config", "target_parallel_config"),
        *("draft_model_config", "draft_parallel_config"),
    }
)

_TYPED_BY_VLLM = frozenset(
    {
        *("revision", "code_revision", "quantization", "draft_load_config", "moe_backend"),
        *("enforce_eager", "draft_tensor_parallel_size", "disable_eagle_block_drop"),
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
    # From vLLM 0.33.0 on.
    "disable_lookahead_block_hashes": (
        False,
        "the draft head needs the tokens behind a block that it takes from the prefix cache",
    ),
    "draft_lm_head_quantization": (None, "candidates are ranked by the head's own scores"),
    "xpress_topc": (None, "it belongs to XPress heads"),
    "fly_window_size": (None, "verification is never lossy"),
    "fly_entropy_threshold": (0.3, "verification is never lossy"),
    "fly_entropy_top_k": (3, "verification is never lossy"),
}


def check_engine_args(engine_args: Any) -> None:
    """Refuse what vLLM finds out when it makes the parts of its configuration, or later.

    Args:
        engine_args: vLLM's EngineArgs, as the user gave them.

    Raises:
        EchoConfigError: in one sentence.
    """
    from vllm.platforms import current_platform

    if engine_args.data_parallel_backend == "ray" and current_platform.is_cpu():
        refuse("--data-parallel-backend ray on a CPU", "remove it, each rank is a process then")
    if engine_args.distributed_executor_backend != "ray":
        return
    option = "--distributed-executor-backend ray"
    if importlib.util.find_spec("ray") is None:
        refuse(f"{option} where the package ray is not installed", "install ray, or remove it")
    if current_platform.is_cpu() and not _is_switched_on("VLLM_USE_RAY_V2_EXECUTOR_BACKEND"):
        refuse(
            f"{option} and VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 on a CPU",
            "unset the variable",
        )


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
    model = _checked_model(values.get("model"))
    num_nodes = check_num_nodes(values.get("num_speculative_tokens"))
    section = values.get("echo")
    config = parse_section({} if section is None else section, num_speculative_tokens=num_nodes)
    # vLLM always gives both; a config made by hand, without an engine, may lack them.
    if (parallel := values.get("target_parallel_config")) is not None:
        _check_parallelism(parallel, values.get("draft_tensor_parallel_size"))
    if (target := values.get("target_model_config")) is not None:
        check_target(target)
        _read_head({**values, "model": model})
    check_files(config, model, values.get("revision"))
    return {
        # As many tokens from the prefix cache as without speculation. vLLM's drafters have the last
        # block computed again, for one position whose next token may be another.
        "disable_eagle_block_drop": True,
        **values,
        "method": "eagle3",
        "disable_padded_drafter_batch": True,
        "echo": config,
    }


def _check_field(name: str, value: object) -> None:
    if name in PASSED_ON:
        if name in _TYPED_BY_VLLM:
            _check_type(name, value)
        return
    from vllm.config import SpeculativeConfig

    fields = SpeculativeConfig.__pydantic_fields__
    known = [field for field in (*PASSED_ON, *FIXED) if field in fields]
    if name not in known and name.replace("-", "_") in field_names():
        raise EchoConfigError(
            f"speculative_config.{name} is a field of {SECTION}, got {show(value)}; move it there."
        )
    if name not in known:
        raise EchoConfigError(
            f"speculative_config.{show_name(name)} is not a known field, got {show(value)}"
            f"{closest(name, known)}; remove it."
        )
    accepted, why = FIXED[name]
    if value != accepted:
        raise EchoConfigError(
            f"speculative_config.{name} must be {show(accepted)} with method echo because {why}, "
            f"got {show(value)}; remove it."
        )


def _check_type(name: str, value: object) -> None:
    """Check against vLLM's own annotation, to say in one sentence what vLLM says in many lines."""
    from vllm.config import SpeculativeConfig

    field = SpeculativeConfig.__pydantic_fields__[name]
    annotation: Any = field.annotation
    if field.metadata:
        annotation = Annotated[(annotation, *field.metadata)]
    try:
        TypeAdapter(annotation).validate_python(value)
    except ValidationError as error:
        report = error.errors(include_url=False)[0]
        what = report["msg"][0].lower() + report["msg"][1:]
        raise EchoConfigError(
            f"speculative_config.{name} is not valid: {what}, got {show(value)}; correct it, or "
            "remove it."
        ) from None


def _checked_model(model: object) -> str:
    if not isinstance(model, str) or not model:
        raise EchoConfigError(
            "speculative_config.model is required with method echo and must name an EAGLE-3 head, "
            f"got {show(model)}; set it to the folder or the Hugging Face id of the head."
        )
    return model


def configure_engine(vllm_config: VllmConfig) -> None:
    """Choose what runs tree speculation, or refuse the configuration.

    Called at the top of VllmConfig.__post_init__ when the method is echo; vLLM copies configs, so
    a second call on the result must change nothing.

    Raises:
        EchoConfigError: for the first thing that cannot work, in one sentence.
    """
    spec = vllm_config.speculative_config
    assert spec is not None
    _check_parallelism(vllm_config.parallel_config, spec.draft_tensor_parallel_size)
    check_target(spec.target_model_config)
    check_features(vllm_config)
    _check_head_weights(vllm_config)
    _choose_classes(vllm_config)
    # One sequence's prefix is not attended to for the whole batch when rows are trees.
    spec.target_model_config.disable_cascade_attn = True


def refuse(what: str, remedy: str) -> NoReturn:
    """Raise the one sentence that says what speculative method echo does not work with."""
    raise EchoConfigError(f"speculative_config.method echo does not work with {what}; {remedy}.")


# --- the target model -------------------------------------------------------------------------

# Property of vLLM's ModelConfig -> what it means; true refuses the model.
_UNSUPPORTED_MODELS = {
    "is_encoder_decoder": "an encoder-decoder model",
    "is_diffusion": "a diffusion model",
    "is_attention_free": "a model without attention",
    "is_hybrid": "a hybrid model (state-space layers beside attention)",
    "has_inner_state": "a state-space model",
    "use_mla": "multi-head latent attention (MLA)",
    "uses_alibi": "ALiBi positions",
}


def check_target(model_config: ModelConfig) -> None:
    """Refuse a target whose attention or inputs tree speculation does not know.

    Raises:
        EchoConfigError: with one sentence.
    """
    name = f"--model {show(model_config.model)}"
    another = "choose a text model with plain attention, or another speculative method"
    if model_config.runner_type != "generate":
        refuse(f"--runner {model_config.runner_type}", "set it to generate")
    for attribute, meaning in _UNSUPPORTED_MODELS.items():
        if getattr(model_config, attribute):
            refuse(f"{name}, which is or has {meaning}", another)
    if model_config.attention_chunk_size is not None:
        refuse(f"{name}, which has chunked local attention", another)
    if model_config.is_multimodal_model and not model_config.multimodal_config.language_model_only:
        refuse(
            f"{name}, which is a multimodal model", "serve it as text, with --language-model-only"
        )
    # vLLM's property does not know of it.
    if "Step1ForCausalLM" in (model_config.architectures or ()):
        refuse(f"{name}, which is or has {_UNSUPPORTED_MODELS['uses_alibi']}", another)
    if getattr(model_config.hf_text_config, "num_kv_shared_layers", 0):
        refuse(f"{name}, whose layers share keys and values", another)
    value_size = getattr(model_config.hf_text_config, "v_head_dim", None)
    if value_size is not None and value_size != model_config.get_head_size():
        refuse(f"{name}, whose values are of another size than its keys", another)
    if not _supports_eagle3(model_config):
        refuse(
            f"{name}, because vLLM's {', '.join(model_config.architectures)} does not hand out "
            "the hidden states that an EAGLE-3 head reads",
            another,
        )
    if model_config.enable_prompt_embeds:
        refuse("--enable-prompt-embeds", "remove it")
    if model_config.logits_processors:
        refuse(f"--logits-processors {show(model_config.logits_processors)}", "remove it")
    for plugin in importlib.metadata.entry_points(group="vllm.logits_processors"):
        refuse(
            f"the logits processor {plugin.value}, which an installed package adds",
            "uninstall that package",
        )


def check_layers(layers: Mapping[str, Any], builder: type) -> None:
    """Refuse a loaded model with an attention layer that does not see trees.

    Args:
        layers: vLLM's attention layers by name.
        builder: that the metadata builder of every layer's backend must derive from.

    Raises:
        EchoConfigError: with one sentence.
    """
    for name, layer in layers.items():
        backend = layer.get_attn_backend()
        reasons = {
            "ALiBi positions": getattr(layer.impl, "alibi_slopes", None) is not None,
            "the keys and values of another layer": (
                getattr(layer, "kv_sharing_target_layer_name", None) is not None
            ),
            f"attention backend {backend.get_name()}": not issubclass(
                backend.get_builder_cls(), builder
            ),
        }
        for what, is_true in reasons.items():
            if is_true:
                refuse(f"the layer {name}, which has {what}", "choose another model")


def _supports_eagle3(model_config: ModelConfig) -> bool:
    """Whether the model's class has vLLM's EAGLE-3 interface.

    Only on a CPU: the front end must not import model code where that could start CUDA, so there
    the worker finds out.
    """
    from vllm.model_executor.models.interfaces import supports_eagle3
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return True
    model_class, _ = model_config.registry.resolve_model_cls(
        model_config.architectures, model_config
    )
    return bool(supports_eagle3(model_class))


# --- the draft head ---------------------------------------------------------------------------


def _read_head(values: Mapping[str, Any]) -> Head | None:
    """The head that a speculative config names, checked against the target; None where only vLLM
    can read its config."""
    model, revision = values["model"], values.get("revision")
    target: ModelConfig = values["target_model_config"]
    if "://" in model or _is_switched_on("VLLM_USE_MODELSCOPE"):
        return None
    if model == target.model:
        raise EchoConfigError(
            f"{FIELD} {show(model)} is the target itself; set it to the folder or the Hugging Face "
            "id of an EAGLE-3 head for it."
        )
    from vllm.config import SpeculativeConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.transformers_utils.config import get_config

    def complete() -> dict[str, Any]:
        config = get_config(
            model,
            trust_remote_code=target.trust_remote_code,
            revision=revision,
            code_revision=values.get("code_revision"),
            config_format=target.config_format,
            hf_overrides_fn=SpeculativeConfig.hf_config_override,
        )
        return vars(config)

    parallel: ParallelConfig | None = values.get("target_parallel_config")
    return read_head(
        model,
        revision=revision,
        target=Target(
            hidden_size=target.get_hidden_size(),
            vocab_size=target.get_vocab_size(),
            num_layers=target.get_total_num_hidden_layers(),
            num_ranks=1 if parallel is None else parallel.tensor_parallel_size,
        ),
        architectures={name for name in ModelRegistry.get_supported_archs() if "Eagle3" in name},
        model_types=_model_types(),
        complete=complete,
    )


def _model_types() -> set[str]:
    """Those that vLLM can make a configuration of."""
    from transformers import CONFIG_MAPPING
    from vllm.transformers_utils import config

    return {*CONFIG_MAPPING.keys(), *getattr(config, "_CONFIG_REGISTRY", ())}


def _check_head_weights(vllm_config: VllmConfig) -> None:
    """Check the head's files, if they are on this machine, and say what is odd about it."""
    spec = vllm_config.speculative_config
    assert spec is not None
    assert spec.model is not None
    head = _read_head({name: getattr(spec, name) for name in _HEAD_FIELDS})
    if head is None:
        return
    remarks = list(head.remarks)
    load = spec.draft_load_config or vllm_config.load_config
    folder = weights_folder(spec.model, spec.revision, load.download_dir)
    if load.load_format in ("auto", "hf", "safetensors") and folder is not None:
        remarks += check_weights(head, folder)
    check_arithmetic(head, _target_dtype(vllm_config), has_amx=_has_amx())
    for remark in remarks:
        logger.warning_once("The draft head %s %s.", spec.model, remark)


def _has_amx() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu() and torch.cpu._is_amx_tile_supported()


# --- the engine -------------------------------------------------------------------------------


def _check_parallelism(parallel: ParallelConfig, draft_size: int | None) -> None:
    for name in (
        "pipeline_parallel_size",
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
    ):
        if (size := getattr(parallel, name)) > 1:
            option = f"--{name.replace('_', '-')} {size}"
            refuse(option, "remove it and use --tensor-parallel-size")
    if parallel.enable_dbo:
        refuse("--enable-dbo", "remove it")
    size = parallel.tensor_parallel_size
    if draft_size not in (None, size):
        raise EchoConfigError(
            "speculative_config.draft_tensor_parallel_size must equal --tensor-parallel-size "
            f"({size}) with method echo, got {show(draft_size)}; remove it."
        )


def check_features(vllm_config: VllmConfig) -> None:
    """Refuse options of the engine that tree speculation does not know.

    Raises:
        EchoConfigError: with one sentence.
    """
    on_v2 = _is_switched_on("VLLM_USE_V2_MODEL_RUNNER")
    if on_v2:
        _check_v2(vllm_config)
    if _is_switched_on("VLLM_BATCH_INVARIANT"):
        refuse("VLLM_BATCH_INVARIANT=1", "unset the variable")
    given: tuple[tuple[str, object], ...] = (
        ("--enable-lora", vllm_config.lora_config),
        ("--kv-transfer-config", vllm_config.kv_transfer_config),
        ("--kv-offloading-size", vllm_config.cache_config.kv_offloading_size),
        ("--ec-transfer-config", vllm_config.ec_transfer_config),
        ("--watermark-config", vllm_config.watermark_config),
        ("--async-scheduling", vllm_config.scheduler_config.async_scheduling and not on_v2),
    )
    for option, value in given:
        if value:
            refuse(option, "remove it")
    dtype = _target_dtype(vllm_config)
    _check_environment(dtype)
    if vllm_config.cache_config.cache_dtype not in ("auto", dtype):
        _check_narrow_cache(vllm_config, dtype)
    if vllm_config.parallel_config.data_parallel_size > 1:
        _check_data_parallelism(vllm_config)
    if vllm_config.parallel_config.enable_expert_parallel:
        _check_expert_parallelism(vllm_config)


def _check_data_parallelism(vllm_config: VllmConfig) -> None:
    spec = vllm_config.speculative_config
    assert spec is not None
    if spec.echo.trace is not None:
        option = f"--data-parallel-size {vllm_config.parallel_config.data_parallel_size}"
        refuse(f"echo.trace and {option}, whose ranks would write one file", "remove either")


def _check_expert_parallelism(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    spec = vllm_config.speculative_config
    assert spec is not None
    quantization = spec.target_model_config.quantization
    if quantization is not None and current_platform.is_cpu():
        refuse(
            f"--enable-expert-parallel and a model in {quantization} on a CPU, where vLLM's "
            "kernels for it want all experts",
            "remove --enable-expert-parallel, each rank has a slice of every expert then",
        )


def _check_v2(vllm_config: VllmConfig) -> None:
    """Refuse what the trees of Model Runner V2 do not know, though those of V1 do."""
    from vllm.triton_utils import HAS_TRITON

    runner = "Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1)"
    spec = vllm_config.speculative_config
    assert spec is not None
    if not HAS_TRITON:
        refuse(f"{runner} without Triton", "unset the variable, or set it to 0")
    size = vllm_config.parallel_config.data_parallel_size
    cache = vllm_config.cache_config.cache_dtype
    others = {
        f"--data-parallel-size {size}": size > 1,
        "a target with multi-dimensional rotary positions (M-RoPE)": (
            spec.target_model_config.uses_mrope
        ),
        f"--kv-cache-dtype {cache}": cache.startswith("fp8"),
    }
    for what, is_true in others.items():
        if is_true:
            refuse(f"{runner} and {what}", "unset the variable")


def _check_narrow_cache(vllm_config: VllmConfig, dtype: str) -> None:
    """Refuse a paged cache of other numbers than the model's, but FP8 (e4m3) where vLLM's kernels
    on a CPU and this project's have it."""
    from vllm.platforms import current_platform

    option = f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype}"
    remedy = "remove --kv-cache-dtype, the cache then has the type of the model"
    is_e4m3 = vllm_config.cache_config.cache_dtype in ("fp8", "fp8_e4m3")
    if not is_e4m3 or not current_platform.is_cpu():
        refuse(f"{option} and --dtype {dtype}", remedy)
    if not torch.cpu._is_avx512_supported():
        refuse(f"{option} on a CPU without AVX-512", remedy)
    if _has_amx() and dtype == "bfloat16":
        refuse(
            f"{option} and --dtype bfloat16 on a CPU with AMX", f"set --dtype float32, or {remedy}"
        )
    spec = vllm_config.speculative_config
    assert spec is not None
    for whose, model in (("target", spec.target_model_config), ("head", spec.draft_model_config)):
        if (size := model.get_head_size()) % 32:
            refuse(f"{option} and attention heads of size {size} (the {whose}'s)", remedy)


def _check_environment(dtype: str) -> None:
    """Refuse what the operators would refuse in the first step.

    On a GPU only the names and the target's dtype: what else can run there the worker finds out.
    """
    from vllm.platforms import current_platform

    try:
        forced = dispatch.forced_implementation()
        if reason := dispatch.LACKS.get(forced, {}).get(dtype):
            raise RuntimeError(f"{dispatch.VARIABLE}={forced} and --dtype {dtype}: {reason}")
        if current_platform.is_cpu():
            for op in dispatch.ORDER:
                dispatch.choose(op, "cpu")
    except (ValueError, RuntimeError) as error:
        raise EchoConfigError(f"{error}; unset {dispatch.VARIABLE}.") from None
    try:
        attention_table.check_file()
    except ValueError as error:
        raise EchoConfigError(f"{error}.") from None
    if isa := os.environ.get("ECHO_VLLM_CPU_ISA"):
        known = ops.supported_cpu_isas()
        if isa not in known:
            raise EchoConfigError(
                f"ECHO_VLLM_CPU_ISA must be one of {', '.join(known)} on this machine, got "
                f"{show(isa)}; unset it for the fastest."
            )


def _target_dtype(vllm_config: VllmConfig) -> str:
    """The type that the target computes in, such as "float32"."""
    assert vllm_config.speculative_config is not None
    dtype = vllm_config.speculative_config.target_model_config.dtype
    return str(dtype).removeprefix("torch.")


def _is_switched_on(name: str) -> bool:
    """Whether one of vLLM's environment variables is switched on."""
    from vllm import envs

    return bool(getattr(envs, name))


def _choose_classes(vllm_config: VllmConfig) -> None:
    from vllm.platforms import current_platform

    on_v2 = _is_switched_on("VLLM_USE_V2_MODEL_RUNNER")
    if current_platform.is_cpu():
        worker = CPU_WORKER_V2 if on_v2 else CPU_WORKER
    elif current_platform.is_cuda():
        worker = CUDA_WORKER_V2 if on_v2 else CUDA_WORKER
        _check_gpu(vllm_config)
        _choose_attention_backend(vllm_config)
        if on_v2:
            _check_captured_attention(vllm_config)
        else:
            _choose_piecewise_graphs(vllm_config)
    else:
        refuse(f"device {show(current_platform.device_type)}", "run on a CPU or an NVIDIA GPU")
    _choose(vllm_config.parallel_config, "worker_cls", "auto", worker)
    config = vllm_config.scheduler_config
    if on_v2:
        assert vllm_config.speculative_config is not None
        # V2 has no unpadded drafts, and vLLM refuses them with asynchronous scheduling.
        vllm_config.speculative_config.disable_padded_drafter_batch = False
        if config.async_scheduling is None:  # as vLLM decides it
            config.async_scheduling = not current_platform.is_cpu()
        scheduler = ASYNC_SCHEDULER_V2 if config.async_scheduling else SCHEDULER_V2
    else:
        config.async_scheduling = False
        scheduler = SCHEDULER
    _choose(config, "scheduler_cls", None, scheduler)


def _check_gpu(vllm_config: VllmConfig) -> None:
    """Refuse GPUs and head sizes that the CUDA kernels were not made for."""
    from vllm.platforms import current_platform

    if not current_platform.has_device_capability(80):
        found = current_platform.get_device_capability()
        version = "below 8.0" if found is None else found.as_version_str()
        refuse(
            f"an NVIDIA GPU of compute capability {version}",
            "use one of 8.0 (Ampere) or later",
        )
    spec = vllm_config.speculative_config
    assert spec is not None
    for whose, model in (("target", spec.target_model_config), ("head", spec.draft_model_config)):
        size = model.get_head_size()
        if size > MAX_HEAD_SIZE or size % 16:
            refuse(
                f"attention heads of size {size} on a GPU (the {whose}'s)",
                f"choose a model whose head size is a multiple of 16 up to {MAX_HEAD_SIZE}",
            )


def _choose_attention_backend(vllm_config: VllmConfig) -> None:
    """On a GPU, target and drafter get the backend that the worker registers as CUSTOM."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    spec, attention = vllm_config.speculative_config, vllm_config.attention_config
    assert spec is not None
    for name in ("backend_per_kind", "hisparse_config"):
        if getattr(attention, name):
            refuse(f"attention_config.{name}", "remove it")
    dtype = _target_dtype(vllm_config)
    stock = "TRITON_ATTN" if dtype == "float32" else "FLASH_ATTN"
    custom = AttentionBackendEnum.CUSTOM
    if attention.backend not in (None, custom, AttentionBackendEnum[stock]):
        refuse(
            f"--attention-backend {attention.backend.name} and --dtype {dtype}",
            f"remove it, or set it to {stock}, which tree attention builds on",
        )
    attention.backend = spec.attention_backend = custom


def _choose(config: Any, name: str, unset: str | None, ours: str) -> None:
    given = getattr(config, name)
    if given not in (unset, ours):
        shown = given if isinstance(given, str) else f"{given.__module__}.{given.__qualname__}"
        refuse(f"--{name.replace('_', '-')} {show(shown)}", f"remove it, {ours} is used")
    setattr(config, name, ours)


def _choose_piecewise_graphs(vllm_config: VllmConfig) -> None:
    from vllm.config import CUDAGraphMode

    compilation = vllm_config.compilation_config
    if compilation.cudagraph_mode is None:
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
    elif compilation.cudagraph_mode.has_full_cudagraphs():
        refuse(
            f"cudagraph_mode {compilation.cudagraph_mode.name}, because the rows of a step change "
            "with the trees",
            "set it to PIECEWISE or NONE",
        )


def _check_captured_attention(vllm_config: VllmConfig) -> None:
    """Refuse attention that full graphs cannot hold, where there will be full graphs."""
    from vllm.config.vllm import OPTIMIZATION_LEVEL_TO_CONFIG

    forced = dispatch.forced_implementation()
    if forced not in dispatch.WAITING or vllm_config.model_config.enforce_eager:
        return
    mode = vllm_config.compilation_config.cudagraph_mode
    if mode is None:  # vLLM fills it in later.
        defaults = OPTIMIZATION_LEVEL_TO_CONFIG[vllm_config.optimization_level]
        mode = defaults["compilation_config"]["cudagraph_mode"]
    if mode.has_full_cudagraphs():
        refuse(
            f"cudagraph_mode {mode.name} and {dispatch.VARIABLE}={forced}, whose attention waits "
            "for the device",
            f"set cudagraph_mode to PIECEWISE or NONE, or unset {dispatch.VARIABLE}",
        )
