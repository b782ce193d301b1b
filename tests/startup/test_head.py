# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""A head that does not fit is refused by its config and its tensors' shapes, in one sentence."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from echo_vllm.config import EchoConfigError
from echo_vllm.startup.head import Head, Target, check_weights, read_head
from tests.startup.models import CONFIG, TENSORS, write_head, write_weights

TARGET = Target(hidden_size=64, vocab_size=1000, num_layers=12)
LAYER = [name for name in TENSORS if name.startswith("midlayer.")]
ARCHITECTURES = ("Eagle3LlamaForCausalLM", "LlamaForCausalLMEagle3")


@pytest.fixture
def head(tmp_path: Path) -> Path:
    """The folder of a head that fits TARGET."""
    return write_head(tmp_path / "head")


def read(folder: Path | str, target: Target = TARGET) -> Head:
    return read_head(
        str(folder),
        revision=None,
        target=target,
        architectures=ARCHITECTURES,
        model_types=("llama", "qwen3"),
    )


def check(folder: Path, target: Target = TARGET) -> Head:
    head = read(folder, target)
    check_weights(head, folder)
    return head


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def write_without(folder: Path, *left_out: str) -> None:
    """The weights, but for the tensors `left_out`."""
    kept = {name: shape for name, shape in TENSORS.items() if name not in left_out}
    write_weights(folder / "model.safetensors", kept)


def test_a_head_that_fits_is_accepted(head: Path) -> None:
    facts = check(head)
    layer = {name: tuple(TENSORS[f"midlayer.{name}"]) for name in facts.layer}
    assert len(layer) == 10
    assert facts == Head(str(head), 64, 1000, 100, 3, 64, layer)


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
    kept = {"fc.weight": [32, 192], "t2d": [1000], "d2t": [100]}
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
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def speculators_format(folder: Path) -> None:
    sizes = ("hidden_size", "vocab_size", "intermediate_size")
    heads = ("num_attention_heads", "num_key_value_heads")
    layer = {name: CONFIG[name] for name in (*sizes, *heads)}
    config = {
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
    check(head)


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
            'is a speculator of type "dflash"; choose an EAGLE-3 head.',
        ),
        (
            {"hidden_size": ...},
            f"has hidden_size null in its config.json, which must be a positive integer; {REPAIR}",
        ),
        (
            {"vocab_size": "many"},
            'has vocab_size "many" in its config.json, which must be a positive integer; ' + REPAIR,
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
            {"vocab_size": 32000},
            "was made for a vocabulary of 32000 tokens (vocab_size in its config.json), but the "
            f"target's has 1000; {ANOTHER}",
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
            {"intermediate_size": "wide"},
            'has intermediate_size "wide" in its config.json, which must be a positive integer; '
            + REPAIR,
        ),
        (
            {"num_attention_heads": 7},
            "has num_attention_heads 7 in its config.json, which does not divide its hidden_size "
            f"64; {REPAIR}",
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


@pytest.mark.parametrize("num_layers", [1, 2, 4, 5, 6])
def test_the_default_layers_of_a_small_target_collapse(head: Path, num_layers: int) -> None:
    with pytest.raises(EchoConfigError, match=f"3 different layers of a target with {num_layers}"):
        check(head, Target(64, 1000, num_layers))
    edit(head, eagle_aux_hidden_state_layer_ids=[0, 1, num_layers])
    if num_layers > 1:
        check(head, Target(64, 1000, num_layers))


@pytest.mark.parametrize(
    ("missing", "shown"),
    [
        ("fc.weight", "fc.weight"),
        ("norm.weight", "norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("d2t", "d2t"),
    ],
)
def test_a_missing_tensor_is_refused(head: Path, missing: str, shown: str) -> None:
    write_without(head, missing)
    with pytest.raises(EchoConfigError) as error:
        check(head)
    assert str(error.value) == (
        f'speculative_config.model "{head}" is not an EAGLE-3 head that fits its config.json: its '
        f"weights lack {shown}; choose another head, or download it again."
    )


def test_weights_without_a_layer_are_refused(head: Path) -> None:
    write_without(head, *LAYER)
    with pytest.raises(EchoConfigError, match=r"its weights lack midlayer\.\*; choose another"):
        check(head)


@pytest.mark.parametrize("missing", LAYER)
def test_a_layer_that_is_not_whole_is_refused(head: Path, missing: str) -> None:
    write_without(head, missing)
    with pytest.raises(EchoConfigError) as error:
        check(head)
    assert str(error.value) == (
        f'speculative_config.model "{head}" is not complete: its weights lack {missing}; download '
        "it again, with all its files."
    )


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
        ("t2d", [100], [1000]),
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
    with pytest.raises(EchoConfigError, match=r"has no weights: there is no \*\.safetensors file"):
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
def test_a_file_that_is_not_safetensors_is_refused(head: Path, content: bytes) -> None:
    (head / "model.safetensors").write_bytes(content)
    with pytest.raises(EchoConfigError, match=r"model\.safetensors that is not in safetensors"):
        check(head)


def test_a_file_that_was_cut_off_is_refused(head: Path) -> None:
    file = head / "model.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in TENSORS.items()}, file)
    check(head)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(EchoConfigError) as error:
        check(head)
    length = 4 * sum(math.prod(shape) for shape in TENSORS.values())
    assert f"(it ends after {length - 1} of {length} bytes of tensors)" in str(error.value)


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
