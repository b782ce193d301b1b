# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""What the patched vLLM makes of a speculative config with method echo."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import pickle
import re
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from echo_vllm.config import EchoConfigError
from echo_vllm.policies.topn import TopNConfig
from echo_vllm.startup import validation
from echo_vllm.startup.profiles import find_profile
from tests.startup import head_forms
from tests.startup.models import CONFIG, TENSORS, write_head, write_target, write_weights

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., Any]


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_head(tmp_path_factory.mktemp("models") / "head")


@pytest.fixture
def make_config(target: Path, head: Path) -> MakeConfig:
    """A VllmConfig: keyword arguments change the engine's, `spec` the speculative config."""
    from vllm.engine.arg_utils import EngineArgs

    def make(spec: dict[str, Any] | None = None, **engine: Any) -> Any:
        speculative = {"method": "echo", "model": str(head), "num_speculative_tokens": 16}
        speculative |= spec or {}
        speculative = {name: value for name, value in speculative.items() if value is not ...}
        arguments = {"model": str(target), "speculative_config": speculative, **engine}
        return EngineArgs(**arguments).create_engine_config()

    return make


def test_method_echo_becomes_eagle3_with_the_section_attached(make_config: MakeConfig) -> None:
    config = make_config({"echo": {"policy": "topn", "top_k": 5}})
    spec = config.speculative_config
    assert spec.method == "eagle3"
    assert spec.use_eagle()
    assert spec.disable_padded_drafter_batch
    assert not spec.use_eagle_block_drop()
    assert spec.num_speculative_tokens == config.num_lookahead_tokens == 16
    assert spec.echo == TopNConfig(max_depth=6, top_k=5)
    assert config.parallel_config.worker_cls == validation.CPU_WORKER
    assert config.scheduler_config.scheduler_cls == validation.SCHEDULER
    assert config.scheduler_config.async_scheduling is False
    assert config.use_v2_model_runner is False
    assert config.model_config.disable_cascade_attn is True


def test_vllms_way_with_the_last_cached_block_is_there_for_who_asks_for_it(
    make_config: MakeConfig,
) -> None:
    config = make_config({"disable_eagle_block_drop": False})
    assert config.speculative_config.use_eagle_block_drop()


def test_ray_is_refused_before_vllm_looks_for_it(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = "--distributed-executor-backend ray"
    two_ranks = {"distributed_executor_backend": "ray", "tensor_parallel_size": 2}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(EchoConfigError) as error:
        make_config(**two_ranks)
    assert str(error.value) == (
        f"{METHOD} {option} where the package ray is not installed; install ray, or remove it."
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: SimpleNamespace())
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    with pytest.raises(EchoConfigError) as error:
        make_config(**two_ranks)
    assert str(error.value) == (
        f"{METHOD} {option} and VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0 on a CPU; unset the variable."
    )
    monkeypatch.undo()
    with pytest.raises(EchoConfigError) as error:
        make_config(data_parallel_backend="ray", data_parallel_size=2)
    assert str(error.value) == (
        f"{METHOD} --data-parallel-backend ray on a CPU; remove it, each rank is a process then."
    )


def test_the_section_may_be_left_out(make_config: MakeConfig) -> None:
    assert make_config().speculative_config.echo.policy == "auto"
    assert make_config({"echo": None}).speculative_config.echo.policy == "auto"


def test_the_config_survives_copies_and_processes(make_config: MakeConfig) -> None:
    """vLLM pickles it to its processes, and copies it for the draft model."""
    from vllm.config.utils import replace

    config = make_config({"echo": {"max_depth": 3}})
    for other in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        replace(config, attention_config=replace(config.attention_config, backend=None)),
    ):
        assert other.speculative_config.echo == config.speculative_config.echo
        assert other.parallel_config.worker_cls == validation.CPU_WORKER
        assert other.scheduler_config.scheduler_cls == validation.SCHEDULER
        assert other.compute_hash() == config.compute_hash()


def test_only_what_changes_the_graph_compiles_the_target_anew(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    section = {"policy": "echo", "k_max": 8, "max_depth": 3}
    key = make_config({"echo": section}).compute_hash()
    for same in (
        {"k_max": 9},
        {"max_depth": 4},
        {"policy": "auto"},
        {"trace": str(tmp_path / "trace.jsonl")},
    ):
        assert make_config({"echo": section | same}).compute_hash() == key, same
    assert make_config({"echo": section | {"linear": "stock"}}).compute_hash() != key


def test_other_methods_are_left_alone(make_config: MakeConfig, target: Path, head: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    for speculative in (
        None,
        {"method": "eagle3", "model": str(head), "num_speculative_tokens": 2},
        {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3},
    ):
        arguments = EngineArgs(model=str(target), speculative_config=speculative)
        config = arguments.create_engine_config()
        assert config.scheduler_config.scheduler_cls is None
        assert config.parallel_config.worker_cls.startswith("vllm.")
        if speculative is not None:
            assert config.speculative_config.echo is None
            assert config.speculative_config.disable_padded_drafter_batch is False


def vllms_fields() -> dict[str, dataclasses.Field[Any]]:
    from vllm.config import SpeculativeConfig

    return {field.name: field for field in dataclasses.fields(SpeculativeConfig)}


def test_every_field_of_vllms_config_is_decided_on() -> None:
    """A field that vLLM adds must be passed on or refused, never ignored."""
    fields, fixed = vllms_fields(), validation.FIXED
    assert validation.PASSED_ON.isdisjoint(fixed)
    assert fields.keys() <= validation.PASSED_ON | fixed.keys()
    for name in fields.keys() & fixed.keys():
        accepted = fixed[name][0]
        default = fields[name].default
        default = getattr(default, "default", default)
        # The one field whose default does not fit trees.
        expected = True if name == "disable_padded_drafter_batch" else default
        assert accepted == expected, name


@pytest.mark.parametrize("name", sorted(validation.FIXED))
def test_a_field_that_does_not_fit_is_refused_and_its_neutral_value_is_not(
    make_config: MakeConfig, name: str
) -> None:
    accepted, why = validation.FIXED[name]
    if name not in vllms_fields():  # of a later release than the installed one
        with pytest.raises(EchoConfigError, match=f"{name} is not a known field"):
            make_config({name: accepted})
        return
    make_config({name: accepted})
    given = {True: False, False: True}.get(accepted, 7) if isinstance(accepted, bool) else 7
    with pytest.raises(EchoConfigError) as error:
        make_config({name: given})
    assert str(error.value) == (
        f"speculative_config.{name} must be {json.dumps(accepted)} with method echo because {why}, "
        f"got {json.dumps(given)}; remove it."
    )


METHOD = "speculative_config.method echo does not work with"


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (
            {"echo": {"top_k": 0}},
            "speculative_config.echo.top_k must be between 1 and 16, got 0; set it in that range, "
            "or remove it for the default of 4.",
        ),
        (
            {"method": "eagle3", "echo": {}},
            'speculative_config.echo belongs to method echo, got method "eagle3"; set '
            "speculative_config.method to echo, or remove the section.",
        ),
        (
            {"method": ..., "echo": {}},
            "speculative_config.echo belongs to method echo, got method null; set "
            "speculative_config.method to echo, or remove the section.",
        ),
        *[
            (
                {"model": value},
                "speculative_config.model is required with method echo and must name an EAGLE-3 "
                f"head, got {shown}; set it to the folder or the Hugging Face id of the head.",
            )
            for value, shown in ((..., "null"), (None, "null"), ("", '""'), (7, "7"))
        ],
        *[
            (
                {"num_speculative_tokens": value},
                "speculative_config.num_speculative_tokens is required with method echo and must "
                f"be an integer between 1 and 256, got {shown}; set it to the nodes that one "
                "request's tree may have.",
            )
            for value, shown in (
                (..., "null"),
                (0, "0"),
                (257, "257"),
                (True, "true"),
                ("16", '"16"'),
            )
        ],
        (
            {"max_depth": 3},
            "speculative_config.max_depth is a field of speculative_config.echo, got 3; move it "
            "there.",
        ),
        (
            {"num_speculative_token": 3},
            "speculative_config.num_speculative_token is not a known field, got 3; did you mean "
            "num_speculative_tokens?; remove it.",
        ),
        (
            {"revision": 3},
            "speculative_config.revision is not valid: input should be a valid string, got 3; "
            "correct it, or remove it.",
        ),
        (
            {"draft_tensor_parallel_size": 0},
            "speculative_config.draft_tensor_parallel_size is not valid: input should be greater "
            "than or equal to 1, got 0; correct it, or remove it.",
        ),
        (
            {"draft_tensor_parallel_size": 2},
            "speculative_config.draft_tensor_parallel_size must equal --tensor-parallel-size (1) "
            "with method echo, got 2; remove it.",
        ),
        (
            {"model": "/no/such/folder"},
            'speculative_config.model "/no/such/folder" does not exist; set it to the folder or '
            "the Hugging Face id of an EAGLE-3 head.",
        ),
    ],
)
def test_a_wrong_speculative_config_is_one_sentence(
    make_config: MakeConfig, spec: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(EchoConfigError) as error:
        make_config(spec)
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (
            {"worker_cls": "my.Worker"},
            f'{METHOD} --worker-cls "my.Worker"; remove it, {validation.CPU_WORKER} is used.',
        ),
        (
            {"scheduler_cls": "my.Scheduler"},
            f'{METHOD} --scheduler-cls "my.Scheduler"; remove it, {validation.SCHEDULER} is used.',
        ),
        ({"async_scheduling": True}, f"{METHOD} --async-scheduling; remove it."),
        (
            {"pipeline_parallel_size": 2},
            f"{METHOD} --pipeline-parallel-size 2; remove it and use --tensor-parallel-size.",
        ),
        (
            {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
            f"{METHOD} --decode-context-parallel-size 2; remove it and use --tensor-parallel-size.",
        ),
        (
            {"prefill_context_parallel_size": 2},
            f"{METHOD} --prefill-context-parallel-size 2; remove it and use "
            "--tensor-parallel-size.",
        ),
        ({"enable_dbo": True}, f"{METHOD} --enable-dbo; remove it."),
        ({"enable_lora": True}, f"{METHOD} --enable-lora; remove it."),
        ({"kv_offloading_size": 1.0}, f"{METHOD} --kv-offloading-size; remove it."),
        ({"enable_prompt_embeds": True}, f"{METHOD} --enable-prompt-embeds; remove it."),
        (
            {"logits_processors": ["my:Processor"]},
            f'{METHOD} --logits-processors ["my:Processor"]; remove it.',
        ),
        (
            {"kv_cache_dtype": "fp8_e5m2"},
            f"{METHOD} --kv-cache-dtype fp8_e5m2 and --dtype bfloat16; remove --kv-cache-dtype, "
            "the cache then has the type of the model.",
        ),
        (
            {"kv_cache_dtype": "bfloat16", "dtype": "float32"},
            f"{METHOD} --kv-cache-dtype bfloat16 and --dtype float32; remove --kv-cache-dtype, the "
            "cache then has the type of the model.",
        ),
        ({"runner": "pooling"}, f"{METHOD} --runner pooling; set it to generate."),
    ],
)
def test_an_engine_option_that_does_not_work_is_one_sentence(
    make_config: MakeConfig, engine: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(EchoConfigError) as error:
        make_config(**engine)
    assert str(error.value) == sentence


def test_a_kv_connector_is_refused(make_config: MakeConfig) -> None:
    from vllm.config import KVTransferConfig

    connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    with pytest.raises(EchoConfigError, match=r"--kv-transfer-config; remove it\.$"):
        make_config(kv_transfer_config=connector)


@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        (
            "VLLM_USE_V2_MODEL_RUNNER",
            f"{METHOD} Model Runner V2 (VLLM_USE_V2_MODEL_RUNNER=1) without Triton; unset the "
            "variable, or set it to 0.",
        ),
        ("VLLM_BATCH_INVARIANT", f"{METHOD} VLLM_BATCH_INVARIANT=1; unset the variable."),
    ],
)
def test_an_environment_variable_that_does_not_work_is_one_sentence(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, variable: str, sentence: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(EchoConfigError) as error:
        make_config()
    assert str(error.value) == sentence


@pytest.mark.parametrize(
    ("avx512", "amx", "dtype", "what"),
    [
        # Nothing but the size of these models' heads is in the way.
        (True, False, "bfloat16", r" and attention heads of size 16 \(the target's\)"),
        (True, True, "float32", r" and attention heads of size 16 \(the target's\)"),
        (False, False, "float32", " on a CPU without AVX-512"),
        (True, True, "bfloat16", " and --dtype bfloat16 on a CPU with AMX"),
    ],
)
def test_an_fp8_cache_needs_kernels_of_vllm_and_of_ours(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    avx512: bool,
    amx: bool,
    dtype: str,
    what: str,
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_supported", lambda: avx512)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    with pytest.raises(EchoConfigError, match=f"--kv-cache-dtype fp8{what}; "):
        make_config(kv_cache_dtype="fp8", dtype=dtype)


def test_whole_experts_of_a_quantized_model_are_refused_on_a_cpu(make_config: MakeConfig) -> None:
    config = make_config(tensor_parallel_size=2, distributed_executor_backend="mp")
    config.parallel_config.enable_expert_parallel = True
    validation.check_features(config)
    config.speculative_config.target_model_config.quantization = "fp8"
    with pytest.raises(EchoConfigError, match="--enable-expert-parallel and a model in fp8"):
        validation.check_features(config)


def test_data_parallel_ranks_have_no_trace(make_config: MakeConfig, tmp_path: Path) -> None:
    make_config(data_parallel_size=2)
    trace = {"echo": {"trace": str(tmp_path / "trace.jsonl")}}
    with pytest.raises(EchoConfigError) as error:
        make_config(trace, data_parallel_size=2)
    assert str(error.value) == (
        f"{METHOD} echo.trace and --data-parallel-size 2, whose ranks would write one file; "
        "remove either."
    )


def test_float16_and_float32_work_too(make_config: MakeConfig) -> None:
    for dtype in ("float16", "float32", "bfloat16"):
        assert str(make_config(dtype=dtype).model_config.dtype) == f"torch.{dtype}"
        make_config(dtype=dtype, kv_cache_dtype=dtype if dtype != "float32" else "auto")


def test_graphs_are_piecewise_where_there_are_graphs() -> None:
    """On CUDA; full graphs need the same number of rows in every step."""
    from vllm.config import CUDAGraphMode

    def choose(mode: Any) -> Any:
        compilation = types.SimpleNamespace(cudagraph_mode=mode)
        config: Any = types.SimpleNamespace(compilation_config=compilation)
        validation._choose_piecewise_graphs(config)
        return compilation.cudagraph_mode

    assert choose(None) is CUDAGraphMode.PIECEWISE
    assert choose(CUDAGraphMode.PIECEWISE) is CUDAGraphMode.PIECEWISE
    assert choose(CUDAGraphMode.NONE) is CUDAGraphMode.NONE
    with pytest.raises(EchoConfigError, match="cudagraph_mode FULL_AND_PIECEWISE, because"):
        choose(CUDAGraphMode.FULL_AND_PIECEWISE)


class PretendedGPU:
    """What validation asks vLLM's platform."""

    device_type = "cuda"

    def __init__(self, major: int = 9, minor: int = 0) -> None:
        self.version = (major, minor)

    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True

    def has_device_capability(self, capability: int) -> bool:
        return self.version[0] * 10 + self.version[1] >= capability

    def get_device_capability(self) -> Any:
        from vllm.platforms.interface import DeviceCapability

        return DeviceCapability(*self.version)


def choose_on_gpu(
    monkeypatch: pytest.MonkeyPatch,
    gpu: PretendedGPU,
    *,
    dtype: str = "bfloat16",
    backend: str | None = None,
    per_kind: dict[str, Any] | None = None,
    head_size: int = 128,
    graphs: str | None = None,
    level: int = 2,
    enforce_eager: bool = False,
) -> Any:
    """The engine's config after `_choose_classes`, as it looks to that function."""
    import torch
    import vllm.config  # before the platform is pretended
    import vllm.platforms
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.setattr(vllm.platforms, "_current_platform", gpu)
    model = types.SimpleNamespace(dtype=getattr(torch, dtype), get_head_size=lambda: head_size)
    config: Any = types.SimpleNamespace(
        speculative_config=types.SimpleNamespace(
            target_model_config=model, draft_model_config=model, attention_backend=None
        ),
        attention_config=types.SimpleNamespace(
            backend=backend and AttentionBackendEnum[backend],
            backend_per_kind=per_kind or {},
            hisparse_config=None,
        ),
        compilation_config=types.SimpleNamespace(
            cudagraph_mode=graphs and vllm.config.CUDAGraphMode[graphs]
        ),
        optimization_level=vllm.config.vllm.OptimizationLevel(level),
        model_config=types.SimpleNamespace(enforce_eager=enforce_eager),
        parallel_config=types.SimpleNamespace(worker_cls="auto"),
        scheduler_config=types.SimpleNamespace(scheduler_cls=None, async_scheduling=None),
    )
    validation._choose_classes(config)
    return config


@pytest.mark.parametrize(
    ("dtype", "backend"), [("bfloat16", "FLASH_ATTN"), ("float16", None), ("float32", None)]
)
def test_a_gpu_gets_its_worker_and_one_backend_for_both_models(
    monkeypatch: pytest.MonkeyPatch, dtype: str, backend: str | None
) -> None:
    config = choose_on_gpu(monkeypatch, PretendedGPU(), dtype=dtype, backend=backend)
    assert config.parallel_config.worker_cls == validation.CUDA_WORKER
    assert config.scheduler_config.async_scheduling is False
    assert config.compilation_config.cudagraph_mode.name == "PIECEWISE"
    assert config.attention_config.backend.name == "CUSTOM"
    assert config.speculative_config.attention_backend.name == "CUSTOM"


def test_model_runner_v2_is_for_who_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asynchronous as everywhere on V2; `tests/v2` has the synchronous one and the CPU's."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    config = choose_on_gpu(monkeypatch, PretendedGPU())
    assert config.parallel_config.worker_cls == validation.CUDA_WORKER_V2
    assert config.scheduler_config.scheduler_cls == validation.ASYNC_SCHEDULER_V2
    assert config.scheduler_config.async_scheduling is True
    assert config.speculative_config.disable_padded_drafter_batch is False


@pytest.mark.parametrize("forced", ["xformers", "reference"])
def test_attention_that_no_graph_can_hold_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, forced: str
) -> None:
    """On V2, which has full graphs, unless they are off; what waits for nothing may have them."""
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
    monkeypatch.setenv("ECHO_VLLM_OPS", forced)
    for graphs in (None, "FULL_DECODE_ONLY"):
        with pytest.raises(EchoConfigError) as error:
            choose_on_gpu(monkeypatch, PretendedGPU(), graphs=graphs)
        assert str(error.value) == (
            f"{METHOD} cudagraph_mode {graphs or 'FULL_AND_PIECEWISE'} and ECHO_VLLM_OPS={forced}, "
            "whose attention waits for the device; set cudagraph_mode to PIECEWISE or NONE, or "
            "unset ECHO_VLLM_OPS."
        )
    choose_on_gpu(monkeypatch, PretendedGPU(), graphs="PIECEWISE")
    choose_on_gpu(monkeypatch, PretendedGPU(), level=1)
    choose_on_gpu(monkeypatch, PretendedGPU(), enforce_eager=True)
    for other in ("triton", "flash"):
        monkeypatch.setenv("ECHO_VLLM_OPS", other)
        choose_on_gpu(monkeypatch, PretendedGPU(), graphs="FULL")


@pytest.mark.parametrize(
    ("gpu", "options", "sentence"),
    [
        (PretendedGPU(7, 5), {}, "an NVIDIA GPU of compute capability 7.5; use one of 8.0"),
        (PretendedGPU(), {"backend": "FLASHINFER"}, "--attention-backend FLASHINFER and --dtype"),
        (
            PretendedGPU(),
            {"backend": "FLASH_ATTN", "dtype": "float32"},
            "FLASH_ATTN and --dtype float32; remove it, or set it to TRITON_ATTN",
        ),
        (PretendedGPU(), {"per_kind": {"mla_attention": 1}}, "attention_config.backend_per_kind"),
        (PretendedGPU(), {"head_size": 512}, "heads of size 512 on a GPU"),
        (PretendedGPU(), {"head_size": 40}, "heads of size 40 on a GPU"),
    ],
)
def test_what_a_gpu_cannot_run_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, gpu: PretendedGPU, options: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(EchoConfigError, match=re.escape(sentence)):
        choose_on_gpu(monkeypatch, gpu, **options)


class FakeTarget:
    """A ModelConfig of which only what `check_target` asks is true; False or None by default."""

    def __init__(self, **attributes: Any) -> None:
        self.model = "some/model"
        self.runner_type = "generate"
        self.architectures = ["LlamaForCausalLM"]
        self.attention_chunk_size = None
        self.__dict__.update(attributes)

    def __getattr__(self, name: str) -> Any:
        from vllm.config import ModelConfig

        fields = {field.name for field in dataclasses.fields(ModelConfig)}
        assert name in fields or hasattr(ModelConfig, name), f"vLLM has no {name} any more"
        if name == "registry":
            raise AssertionError("the class must only be asked for after all properties")
        return False


PLAIN = "choose a text model with plain attention, or another speculative method."


@pytest.mark.parametrize(
    ("attributes", "what"),
    [
        *[
            ({name: True}, f", which is or has {meaning}")
            for name, meaning in validation._UNSUPPORTED_MODELS.items()
        ],
        ({"attention_chunk_size": 8192}, ", which has chunked local attention"),
        ({"architectures": ["Step1ForCausalLM"]}, ", which is or has ALiBi positions"),
        (
            {"hf_text_config": SimpleNamespace(num_kv_shared_layers=2)},
            ", whose layers share keys and values",
        ),
        (
            {
                "hf_text_config": SimpleNamespace(v_head_dim=128),
                "get_head_size": lambda: 192,
            },
            ", whose values are of another size than its keys",
        ),
    ],
)
def test_a_target_that_does_not_work_is_one_sentence(attributes: dict[str, Any], what: str) -> None:
    with pytest.raises(EchoConfigError) as error:
        validation.check_target(FakeTarget(**attributes))
    assert str(error.value) == f'{METHOD} --model "some/model"{what}; {PLAIN}'


def test_a_multimodal_target_is_one_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "_supports_eagle3", lambda config: True)
    text = SimpleNamespace(language_model_only=True)
    target = FakeTarget(is_multimodal_model=True, uses_mrope=True, multimodal_config=text)
    validation.check_target(target)
    text.language_model_only = False
    with pytest.raises(EchoConfigError) as error:
        validation.check_target(target)
    assert str(error.value) == (
        f'{METHOD} --model "some/model", which is a multimodal model; serve it as text, with '
        "--language-model-only."
    )


class Seen:
    """Stands for the builder whose metadata knows trees."""


class Unseen:
    pass


def attention_layer(builder: type = Seen, **attributes: Any) -> Any:
    implementation = {"alibi_slopes": None} | attributes
    backend = SimpleNamespace(get_name=lambda: "SOME", get_builder_cls=lambda: builder)
    return SimpleNamespace(
        impl=SimpleNamespace(**implementation),
        get_attn_backend=lambda: backend,
        kv_sharing_target_layer_name=attributes.get("shared"),
    )


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (attention_layer(alibi_slopes=[1.0]), "ALiBi positions"),
        (attention_layer(shared="model.layers.0"), "the keys and values of another layer"),
        (attention_layer(Unseen), "attention backend SOME"),
    ],
)
def test_a_layer_that_does_not_see_trees_is_one_sentence(layer: Any, what: str) -> None:
    with pytest.raises(EchoConfigError) as error:
        validation.check_layers({"first": attention_layer(), "second": layer}, Seen)
    assert str(error.value) == (
        f"{METHOD} the layer second, which has {what}; choose another model."
    )


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ECHO_VLLM_OPS", "fast", "ECHO_VLLM_OPS must be unset or one of extension, triton"),
        ("ECHO_VLLM_OPS", "triton", "ECHO_VLLM_OPS=triton: tree_attention cannot run so on cpu"),
        ("ECHO_VLLM_CPU_ISA", "avx1024", "ECHO_VLLM_CPU_ISA must be one of portable"),
        ("ECHO_VLLM_ATTENTION_TABLE", "no.json", "no.json is no table of attention times"),
    ],
)
def test_what_no_operator_can_run_with_is_refused_at_the_start(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(EchoConfigError) as error:
        make_config()
    assert str(error.value).startswith(sentence)
    assert f"unset {name}" in str(error.value) or "unset it" in str(error.value)


@pytest.mark.parametrize("name", ["flash", "xformers"])
def test_kernels_without_float32_are_refused_for_a_float32_model(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("ECHO_VLLM_OPS", name)
    with pytest.raises(EchoConfigError) as error:
        make_config(dtype="float32")
    assert str(error.value).startswith(f"ECHO_VLLM_OPS={name} and --dtype float32: ")
    assert str(error.value).endswith("unset ECHO_VLLM_OPS.")


def test_the_target_is_no_head(make_config: MakeConfig, target: Path) -> None:
    with pytest.raises(EchoConfigError, match="is the target itself; set it to the folder"):
        make_config({"model": str(target)})


REAL_MODELS: dict[str, tuple[dict[str, Any], str]] = {
    "MLA": (
        {
            "architectures": ["DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v2",
            "kv_lora_rank": 32,
            "q_lora_rank": None,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 16,
        },
        "multi-head latent attention (MLA)",
    ),
    "hybrid": (
        {
            "architectures": ["JambaForCausalLM"],
            "model_type": "jamba",
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        "a hybrid model",
    ),
    "no EAGLE-3 interface": (
        {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_head": 4, "n_embd": 64},
        "does not hand out the hidden states that an EAGLE-3 head reads",
    ),
    "encoder-decoder": (
        {"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"},
        "an encoder-decoder model",
    ),
}


@pytest.mark.full
@pytest.mark.parametrize("kind", REAL_MODELS)
def test_real_architectures_are_recognised(
    make_config: MakeConfig, tmp_path: Path, kind: str
) -> None:
    changes, what = REAL_MODELS[kind]
    folder = write_target(tmp_path / "target", **changes)
    with pytest.raises(EchoConfigError) as error:
        make_config(model=str(folder), skip_tokenizer_init=True)
    assert what in str(error.value)
    assert PLAIN in str(error.value)


def test_llm_raises_the_sentence_as_a_value_error(target: Path, head: Path) -> None:
    from vllm import LLM

    with pytest.raises(ValueError, match=r"^speculative_config") as error:
        LLM(
            model=str(target),
            speculative_config={
                "method": "echo",
                "model": str(head),
                "num_speculative_tokens": 16,
                "echo": {"policy": "best"},
            },
        )
    assert str(error.value) == (
        "speculative_config.echo.policy must be one of chain, static, topn, echo, auto, "
        'evict, graft, got "best"; set it to one of them.'
    )


def test_a_refusal_of_the_engine_is_a_plain_value_error_too(target: Path, head: Path) -> None:
    """It is raised inside pydantic, which would wrap it in a report of its own."""
    from vllm import LLM

    with pytest.raises(ValueError, match="--async-scheduling") as error:
        LLM(
            model=str(target),
            async_scheduling=True,
            speculative_config={
                "method": "echo",
                "model": str(head),
                "num_speculative_tokens": 16,
            },
        )
    assert str(error.value) == f"{METHOD} --async-scheduling; remove it."


# --- the command line's argument --------------------------------------------------------------


@pytest.fixture(scope="module")
def parse_argument() -> Callable[[str], Any]:
    """What `vllm serve --speculative-config` makes of a value."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(exit_on_error=False))

    def parse(*values: str) -> Any:
        arguments = [part for value in values for part in ("--speculative-config", value)]
        return parser.parse_args(arguments).speculative_config

    return parse


def test_the_argument_takes_a_path_or_inline_json(
    parse_argument: Callable[[str], Any], tmp_path: Path
) -> None:
    example = ROOT / "examples" / "echo.json"
    expected = json.loads(example.read_text())
    assert parse_argument(str(example)) == expected
    assert parse_argument(example.read_text()) == expected
    assert parse_argument('  {"method": "ngram"}') == {"method": "ngram"}
    awkward = tmp_path / "a name with .dots and blanks"
    awkward.write_text('{"method": "ngram"}')
    assert parse_argument(str(awkward)) == {"method": "ngram"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is neither inline JSON ({...}) nor a readable file: No such file or directory"),
        ("{", "is not valid JSON: Expecting property name"),
        ("[1]", "must hold one JSON object {...} with fields"),
        ("{}", "must hold one JSON object {...} with fields"),
        ("[" * 100_000, "is not valid JSON: maximum recursion depth exceeded"),
        ('{"echo": {"top_k": 2, "top_k": 3}}', "is not valid JSON: field 'top_k' stands twice"),
        (b"\xff\xfe", "is not valid JSON: 'utf-8' codec can't decode"),
    ],
)
def test_a_file_that_cannot_be_used_is_an_error_of_the_argument(
    parse_argument: Callable[[str], Any],
    tmp_path: Path,
    content: str | bytes | None,
    complaint: str,
) -> None:
    file = tmp_path / "echo.json"
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(argparse.ArgumentError) as error:
        parse_argument(str(file))
    assert f"{str(file)!r} {complaint}" in str(error.value)


def test_broken_inline_json_is_an_error_of_the_argument(
    parse_argument: Callable[[str], Any],
) -> None:
    with pytest.raises(argparse.ArgumentError, match="is not valid JSON: Expecting"):
        parse_argument('{"method": "echo",}')


def parse(*arguments: str) -> Any:
    """The engine's configuration as the `vllm` command line makes it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return EngineArgs.from_cli_args(parser.parse_args(arguments)).create_engine_config()


@pytest.fixture
def speculator(target: Path, tmp_path: Path) -> Path:
    """A head in speculators format, which names its target."""
    form = head_forms.FORMS["Eagle3Speculator"]
    layer = CONFIG | {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
    verifier = {"name_or_path": str(target), "architectures": ["LlamaForCausalLM"]}
    config = form.config | {
        "speculators_config": form.config["speculators_config"] | {"verifier": verifier},
        "transformer_layer_config": layer,
        "draft_vocab_size": CONFIG["draft_vocab_size"],
    }
    folder = tmp_path / "speculator"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(
        folder / "model.safetensors",
        {name.replace("midlayer", "layers.0"): shape for name, shape in TENSORS.items()},
    )
    return folder


@pytest.mark.parametrize("given", ["inline", "with a section", "file", "options"])
def test_a_head_in_speculators_format_may_be_the_model(
    speculator: Path, target: Path, tmp_path: Path, given: str
) -> None:
    spec = {"method": "echo", "num_speculative_tokens": 8}
    if given == "with a section":
        spec |= {"echo": {"policy": "topn"}}
    text = json.dumps(spec)
    if given == "file":
        # It names another head; the model's own is what is served.
        text = str(ROOT / "examples" / "echo.json")
    more = ["--speculative-config.echo.policy", "topn"] if given == "options" else []
    config = parse("--model", str(speculator), "--speculative-config", text, *more)
    found = config.speculative_config
    assert config.model_config.model == str(target)
    assert found.model == str(speculator)
    assert found.num_speculative_tokens == (16 if given == "file" else 8)
    assert found.echo.policy == ("topn" if "section" in given or more else "auto")
    assert config.scheduler_config.scheduler_cls == validation.SCHEDULER


def test_the_number_of_nodes_may_be_that_of_the_speculators_format(speculator: Path) -> None:
    config = parse("--model", str(speculator), "--speculative-config", '{"method": "echo"}')
    assert config.speculative_config.num_speculative_tokens == 5


def test_a_speculator_of_another_kind_is_refused_as_the_model(speculator: Path) -> None:
    file = speculator / "config.json"
    config = json.loads(file.read_text()) | {"speculators_model_type": "peagle", "mask_token_id": 3}
    file.write_text(json.dumps(config))
    spec = '{"method": "echo", "num_speculative_tokens": 8}'
    with pytest.raises(EchoConfigError) as error:
        parse("--model", str(speculator), "--speculative-config", spec)
    assert str(error.value) == (
        f'speculative_config.model "{speculator}" has speculators_model_type "peagle" in its '
        'config.json, which is not "eagle3"; choose an EAGLE-3 head.'
    )


def test_a_head_given_as_the_model_stays_stock_without_method_echo(speculator: Path) -> None:
    config = parse("--model", str(speculator))
    assert config.speculative_config.method == "eagle3"
    assert config.speculative_config.echo is None


def test_a_head_of_the_hub_cache_has_its_profile_and_is_checked(
    head: Path, make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--someone--a-head"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    shutil.copytree(head, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    spec = {"model": "someone/a-head", "echo": {"policy": "echo"}}
    make_config(spec)
    assert find_profile(make_config(spec).speculative_config.echo, "someone/a-head") is None
    shutil.copy(ROOT / "models/smollm2-135m-eagle3/echo_profile.json", snapshot)
    assert find_profile(make_config(spec).speculative_config.echo, "someone/a-head") is not None
    write_weights(snapshot / "model.safetensors", {**TENSORS, "norm.weight": [65]})
    with pytest.raises(EchoConfigError, match=r"has a tensor norm\.weight of shape \[65\]"):
        make_config(spec)
