# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A head that does not fit is refused by its config and its tensors' shapes, in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from echo_vllm.config import EchoConfigError
from echo_vllm.startup.head import (
    Head,
    Target,
    check_arithmetic,
    check_weights,
    local_file,
    read_head,
    weights_folder,
)
from tests.startup.models import CONFIG, TENSORS, write_head, write_weights

TARGET = Target(hidden_size=64, vocab_size=1000, num_layers=12)
LINEARS = [name for name in TENSORS if name.startswith("midlayer.") and "_proj" in name]
NORMS = [name for name in TENSORS if "norm" in name]
ARCHITECTURES = ("Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3")


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """The folder of a head that fits TARGET."""
    return write_head(tmp_path / "head")


def read(folder: Path | str, target: Target = TARGET) -> Head:
    def complete() -> dict[str, Any]:
        from vllm.transformers_utils.config import get_config

        fields: dict[str, Any] = vars(get_config(folder, trust_remote_code=False))
        return fields

    return read_head(
        str(folder),
        revision=None,
        target=target,
        architectures=ARCHITECTURES,
        model_types=("llama", "qwen3"),
        complete=complete,
    )


def check(folder: Path, target: Target = TARGET) -> list[str]:
    """The remarks on a head that is accepted, but for the one on layers that it does not name."""
    head = read(folder, target)
    remarks = [*head.remarks, *check_weights(head, folder)]
    return [remark for remark in remarks if not remark.startswith("does not say which layers")]


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def write_without(folder: Path, *left_out: str) -> None:
    """The weights, but for the tensors `left_out`."""
    kept = {name: shape for name, shape in TENSORS.items() if name not in left_out}
    write_weights(folder / "model.safetensors", kept)


def test_a_head_that_fits_is_accepted(head: Path) -> None:
    assert check(head) == []
    facts = read(head)
    shapes = {name: tuple(shape) for name, shape in TENSORS.items() if name != "t2d"}
    named = {
        name.replace("layers.0.", "midlayer."): shape
        for name, shape in {**facts.required, **facts.optional}.items()
    }
    assert named == shapes | {"embed_tokens.weight": (1000, 64)}
    assert facts.remarks == (
        "does not say which layers of the target it reads: vLLM takes [2, 6, 9]; if it was trained "
        "on others, write them into eagle_aux_hidden_state_layer_ids of its config.json",
    )


def whole_vocabulary(folder: Path) -> None:
    """No d2t, no t2d, no lm_head: the target's is shared."""
    edit(folder, draft_vocab_size=...)
    write_without(folder, "d2t", "t2d", "lm_head.weight")


def bare_architecture(folder: Path) -> None:
    edit(folder, architectures=["LlamaForCausalLM"])


def several_layers_in_several_files(folder: Path) -> None:
    tensors = {name.replace("midlayer", "layers.0"): shape for name, shape in TENSORS.items()}
    write_weights(folder / "a.safetensors", {"fc.weight": tensors.pop("fc.weight")})
    write_weights(folder / "model.safetensors", tensors)


def narrower_head(folder: Path) -> None:
    edit(folder, hidden_size=32, target_hidden_size=64)
    narrow = {
        name: [{64: 32, 128: 64 if "self_attn" in name else 128}.get(size, size) for size in shape]
        for name, shape in TENSORS.items()
    }
    keys = {f"midlayer.self_attn.{kind}_proj.weight": [16, 64] for kind in "kv"}
    kept = {
        "fc.weight": [32, 192],
        "t2d": [1000],
        "d2t": [100],
        "embed_tokens.weight": [1000, 32],
    }
    write_weights(folder / "model.safetensors", narrow | keys | kept)


def fused_projections(folder: Path) -> None:
    tensors = {
        name: shape
        for name, shape in TENSORS.items()
        if not any(part in name for part in ("q_proj", "k_proj", "v_proj", "gate_", "up_"))
    }
    fused = {
        "midlayer.self_attn.qkv_proj.weight": [128, 128],
        "midlayer.mlp.gate_up_proj.weight": [256, 64],
    }
    write_weights(folder / "model.safetensors", tensors | fused)


def sizes_by_default(folder: Path) -> None:
    """What a config.json does not say is what transformers takes."""
    edit(folder, num_attention_heads=..., num_key_value_heads=..., intermediate_size=...)
    changed = {
        "self_attn.k_proj": [64, 128],
        "self_attn.v_proj": [64, 128],
        "mlp.gate_proj": [11008, 64],
        "mlp.up_proj": [11008, 64],
        "mlp.down_proj": [64, 11008],
    }
    named = {f"midlayer.{name}.weight": shape for name, shape in changed.items()}
    write_weights(folder / "model.safetensors", TENSORS | named)


def four_features(folder: Path) -> None:
    edit(folder, eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 3, 6, 12]})
    write_weights(folder / "model.safetensors", TENSORS | {"fc.weight": [64, 256]})


def last_layer_only(folder: Path) -> None:
    edit(folder, eagle_config={"use_aux_hidden_state": False})
    write_without(folder, "fc.weight")


def quantised(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq"})
    tensors = {
        name.replace("fc.weight", "fc.qweight").replace("proj.weight", "proj.qweight"): shape
        for name, shape in TENSORS.items()
    }
    write_weights(folder / "model.safetensors", tensors | {"fc.qweight": [8, 192]})


def pickled_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_weights(folder / "pytorch_model.bin", TENSORS)
    (folder / "training_args.bin").write_text("not read")


def speculators_format(folder: Path) -> None:
    sizes = ("hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers")
    heads = ("num_attention_heads", "num_key_value_heads")
    layer = {name: CONFIG[name] for name in (*sizes, *heads)}
    layer |= {"model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5}
    config = {
        "speculators_config": {"algorithm": "eagle3"},
        "speculators_model_type": "eagle3",
        "architectures": ["Eagle3Speculator"],
        "draft_vocab_size": 100,
        "target_hidden_size": None,
        "transformer_layer_config": layer,
    }
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "change",
    [
        whole_vocabulary,
        bare_architecture,
        several_layers_in_several_files,
        narrower_head,
        fused_projections,
        sizes_by_default,
        four_features,
        last_layer_only,
        quantised,
        pickled_weights,
        speculators_format,
    ],
)
def test_all_kinds_of_heads_that_vllm_runs_are_accepted(
    head: Path, change: Callable[[Path], None]
) -> None:
    change(head)
    assert check(head) == []


@pytest.mark.parametrize(
    ("bits", "dtype", "has_amx", "is_refused"),
    [
        (8, "float32", True, True),
        (8, "bfloat16", True, False),
        (8, "float32", False, False),
        (4, "float32", True, False),
    ],
)
def test_integers_of_eight_bits_need_a_dtype_that_vllm_multiplies_them_for(
    head: Path, bits: int, dtype: str, has_amx: bool, is_refused: bool
) -> None:
    numbers = {"num_bits": bits, "type": "int"}
    groups = {"group_0": {"weights": numbers, "input_activations": numbers}}
    edit(head, quantization_config={"quant_method": "compressed-tensors", "config_groups": groups})
    found = read(head)
    if not is_refused:
        check_arithmetic(found, dtype, has_amx=has_amx)
        return
    with pytest.raises(EchoConfigError) as error:
        check_arithmetic(found, dtype, has_amx=has_amx)
    assert str(error.value) == (
        f'speculative_config.model "{head}" has layers in int8 (quantization_config in its '
        "config.json), which vLLM cannot multiply with --dtype float32 on a CPU with AMX; set "
        "--dtype bfloat16, or choose another head."
    )


def test_the_demo_head_fits_the_demo_target(demo_head: Path) -> None:
    check(demo_head, Target(hidden_size=576, vocab_size=49152, num_layers=30))


ANOTHER = "choose a head that was trained for this target."
REPAIR = "repair the file or choose another head."
SET_IT = "set it to the folder or the Hugging Face id of an EAGLE-3 head."
LAYERS = (
    "name other layers in eagle_aux_hidden_state_layer_ids of its config.json, or choose a head "
    "that was trained for this target."
)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        (
            {"architectures": ...},
            "has architectures null in its config.json; choose an EAGLE-3 head.",
        ),
        ({"architectures": []}, "has architectures [] in its config.json; choose an EAGLE-3 head."),
        (
            {"architectures": ["BertModel"]},
            "has architecture BertModel in its config.json, which is not an EAGLE-3 head that vLLM "
            "implements; choose an EAGLE-3 head (one of Eagle3LlamaForCausalLM, "
            "LlamaForCausalLMEagle3).",
        ),
        (
            {"speculators_model_type": "dflash"},
            'has speculators_model_type "dflash" in its config.json, which is not "eagle3"; choose '
            "an EAGLE-3 head.",
        ),
        (
            {"hidden_size": 128},
            "was made for a target with hidden size 128 (hidden_size in its config.json), but the "
            f"target's is 64; {ANOTHER}",
        ),
        (
            {"target_hidden_size": 96},
            "was made for a target with hidden size 96 (target_hidden_size in its config.json), "
            f"but the target's is 64; {ANOTHER}",
        ),
        (
            {"model_type": ...},
            "has model_type null in its config.json, which is none that vLLM knows; repair the "
            "file (it is that of the head's layers, such as llama) or choose another head.",
        ),
        (
            {"eagle_config": "x"},
            f'has eagle_config "x" in its config.json, which must be an object; {REPAIR}',
        ),
        (
            {"speculators_model_type": "eagle3", "transformer_layer_config": [1]},
            "has transformer_layer_config [1] in its config.json, which must be an object; "
            + REPAIR,
        ),
        (
            {"eagle_aux_hidden_state_layer_ids": 5},
            "reads the target after layers 5 (eagle_aux_hidden_state_layer_ids in its "
            f"config.json), which are not 3 different layers of a target with 12; {LAYERS}",
        ),
        (
            {"draft_vocab_size": 1001},
            "has draft_vocab_size 1001 in its config.json, which must be between 1 and its "
            f"vocab_size 1000; {REPAIR}",
        ),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 2, 13]},
            "reads the target after layers [1, 2, 13] (eagle_aux_hidden_state_layer_ids in its "
            f"config.json), which are not 3 different layers of a target with 12; {LAYERS}",
        ),
        (
            {"eagle_aux_hidden_state_layer_ids": [1, 2, 2]},
            "reads the target after layers [1, 2, 2] (eagle_aux_hidden_state_layer_ids in its "
            f"config.json), which are not 3 different layers of a target with 12; {LAYERS}",
        ),
    ],
)
def test_a_config_that_does_not_fit_is_refused(
    head: Path, changes: dict[str, Any], what: str
) -> None:
    edit(head, **changes)
    with pytest.raises(EchoConfigError) as error:
        check(head)
    assert str(error.value) == f'speculative_config.model "{head}" {what}'


@pytest.mark.parametrize("changes", [{"vocab_size": "many"}, {"num_attention_heads": 7}])
def test_a_config_that_vllm_cannot_read_is_refused(head: Path, changes: dict[str, Any]) -> None:
    edit(head, **changes)
    with pytest.raises(EchoConfigError) as error:
        check(head)
    assert str(error.value).startswith(
        f'speculative_config.model "{head}" has a config.json that vLLM cannot read ('
    )
    assert str(error.value).endswith(f"; {REPAIR}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [900, 1100])
def test_another_vocabulary_is_a_remark(head: Path, size: int) -> None:
    """Targets get tokens added, or their embeddings cut to the tokenizer's."""
    assert check(head, Target(64, size, 12)) == [
        f"was made for a vocabulary of 1000 tokens and the target's has {size}: it drafts well "
        "only where they differ by added tokens"
    ]


def test_sizes_that_cannot_be_split_are_refused(head: Path) -> None:
    check(head, Target(64, 1000, 12, num_ranks=4))
    with pytest.raises(EchoConfigError, match=r"has num_attention_heads 4 .* cannot be split over"):
        check(head, Target(64, 1000, 12, num_ranks=8))


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5, 6])
def test_the_default_layers_of_a_small_target_collapse(head: Path, num_layers: int) -> None:
    with pytest.raises(EchoConfigError, match=f"3 different layers of a target with {num_layers}"):
        check(head, Target(64, 1000, num_layers))
    edit(head, eagle_aux_hidden_state_layer_ids=[0, 1, num_layers])
    if num_layers > 1:
        check(head, Target(64, 1000, num_layers))


@pytest.mark.parametrize("missing", ["fc.weight", "lm_head.weight", *LINEARS])
def test_a_missing_tensor_is_refused(head: Path, missing: str) -> None:
    write_without(head, missing)
    with pytest.raises(EchoConfigError) as error:
        check(head)
    why = ", and the target's do not fit it" if "lm_head" in missing else ""
    assert str(error.value) == (
        f'speculative_config.model "{head}" is not complete: its weights lack {missing}{why}; '
        "download it again, with all its files, or choose another head."
    )


@pytest.mark.parametrize("missing", NORMS)
def test_a_missing_norm_is_a_remark(head: Path, missing: str) -> None:
    write_without(head, missing)
    assert check(head) == [f"has no {missing} in its weights: vLLM takes ones"]


def test_a_missing_map_is_a_remark(head: Path) -> None:
    write_without(head, "d2t")
    assert check(head) == [
        "has no d2t in its weights: vLLM takes its tokens for the first 100 of the target"
    ]


def test_a_map_to_no_token_is_refused(head: Path) -> None:
    edit(head, vocab_size=99, draft_vocab_size=99)
    with pytest.raises(
        EchoConfigError, match="has a d2t that names token 99 of a vocabulary of 99"
    ):
        check(head)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("adapter.lora_A.weight", "remove the tensor, or choose another head"),
        ("fc_norm.0.weight", "set fc_norm to true in its config.json, or choose another head"),
        (
            "midlayer.self_attn.q_proj.bias",
            "set attention_bias to true in its config.json, or choose another head",
        ),
        (
            "midlayer.mlp.up_proj.bias",
            "set mlp_bias to true in its config.json, or choose another head",
        ),
    ],
)
def test_a_tensor_that_vllm_does_not_know_is_refused(head: Path, name: str, remedy: str) -> None:
    write_weights(head / "another.safetensors", {name: [64]})
    with pytest.raises(EchoConfigError) as error:
        check(head)
    assert str(error.value) == (
        f'speculative_config.model "{head}" has a tensor {name} in its weights, which vLLM does '
        f"not know in a head with its config.json; {remedy}."
    )


def test_an_index_says_which_files_count(head: Path) -> None:
    write_weights(head / "another.safetensors", {"adapter.lora_A.weight": [64]})
    index = head / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}))
    assert check(head) == []
    index.write_text(json.dumps({"weight_map": {"fc.weight": "lost.safetensors"}}))
    with pytest.raises(EchoConfigError, match=r"is not complete: it lacks the file lost\.safet"):
        check(head)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("midlayer.self_attn.k_proj.weight", [64, 128], [32, 128]),
        ("midlayer.self_attn.q_proj.weight", [64, 64], [64, 128]),
        ("midlayer.mlp.down_proj.weight", [64, 256], [64, 128]),
        ("fc.weight", [64, 128], [64, 192]),
        ("norm.weight", [65], [64]),
        ("lm_head.weight", [1000, 64], [100, 64]),
        ("d2t", [99], [100]),
        ("embed_tokens.weight", [1000, 32], [1000, 64]),
    ],
)
def test_a_tensor_of_another_shape_is_refused(
    head: Path, name: str, shape: list[int], expected: list[int]
) -> None:
    write_weights(head / "model.safetensors", TENSORS | {name: shape})
    with pytest.raises(EchoConfigError) as error:
        check(head)
    assert str(error.value) == (
        f'speculative_config.model "{head}" has a tensor {name} of shape {shape}, but its '
        f"config.json means {expected}; choose another head, or download it again."
    )


def test_a_folder_without_weights_is_refused(head: Path) -> None:
    (head / "model.safetensors").unlink()
    with pytest.raises(
        EchoConfigError, match=r"has no weights: there is no \*\.safetensors or \*\.bin"
    ):
        check(head)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        b"",
        b"\x02\x00\x00\x00\x00\x00\x00\x00[]",
        b'\x09\x00\x00\x00\x00\x00\x00\x00{"a": {}}',
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_in_no_known_format_is_refused(head: Path, name: str, content: bytes) -> None:
    (head / "model.safetensors").unlink()
    (head / name).write_bytes(content)
    with pytest.raises(EchoConfigError) as error:
        check(head)
    assert f"has a file {name} that is not in " in str(error.value)
    assert "download the head again, with Git LFS where it comes from" in str(error.value)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_file_that_was_cut_off_is_refused(head: Path, name: str) -> None:
    (head / "model.safetensors").unlink()
    file = head / name
    write_weights(file, TENSORS)
    assert check(head) == []
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(EchoConfigError, match=r"that is not in .* format, or not whole"):
        check(head)


def test_a_head_in_the_hub_cache_is_checked_like_a_local_one(
    head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cache = tmp_path / "cache"
    repository = cache / "models--someone--a-head"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    snapshot = repository / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    model = "someone/a-head"
    assert weights_folder(model, None, str(cache)) is None
    (snapshot / "config.json").write_bytes((head / "config.json").read_bytes())
    assert weights_folder(model, None, str(cache)) is None
    write_weights(snapshot / "pytorch_model.bin", {})
    assert weights_folder(model, None, str(cache)) == snapshot
    assert weights_folder(model, "another-branch", str(cache)) is None
    (snapshot / "echo_profile.json").write_text("{}")
    assert local_file(model, "echo_profile.json", None, str(cache)) is not None


def test_what_is_not_a_head_folder_is_refused(head: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    missing = head / "nowhere"
    file = head / "config.json"
    empty = head / "empty"
    empty.mkdir()
    for model, what in (
        (missing, f"does not exist; {SET_IT}"),
        (file, f"is a file; {SET_IT}"),
        (empty, f"is a folder without a config.json; {SET_IT}"),
    ):
        with pytest.raises(EchoConfigError) as error:
            read(model)
        assert str(error.value) == f'speculative_config.model "{model}" {what}'
    with pytest.raises(EchoConfigError, match=r"cannot be looked at \(File name too long\); set"):
        read("x" * 300)
    file.write_text("{")
    with pytest.raises(EchoConfigError, match=r"has a config\.json that cannot be read"):
        read(head)
    file.write_text("[]")
    with pytest.raises(EchoConfigError, match=r"has a config\.json that holds no JSON object"):
        read(head)


def test_a_hub_id_that_cannot_be_read_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def fail(*args: Any, **kwargs: Any) -> str:
        raise errors.LocalEntryNotFoundError("many words")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(EchoConfigError) as error:
        read("someone/a-head")
    assert str(error.value) == (
        'speculative_config.model "someone/a-head" is neither a folder nor a Hugging Face '
        "repository that can be read (it is not in the local cache, and there is no connection or "
        f"HF_HUB_OFFLINE is set); {SET_IT}"
    )
