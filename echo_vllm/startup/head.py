# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Whether an EAGLE-3 head fits the target, told from its config.json and its tensors' shapes.

Called at start-up, before any weight is loaded: a head that vLLM would load wrongly or only fail
on minutes later is refused in one sentence. A head that stock vLLM runs must pass. Nothing here
imports vLLM.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from echo_vllm.config import EchoConfigError, show

FIELD = "speculative_config.model"
_MAX_HEADER = 100 * 2**20
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_QKV, _GATE_UP = ("self_attn.qkv_proj.weight",), ("mlp.gate_up_proj.weight",)
_FUSED = {
    "self_attn.q_proj.weight": _QKV,
    "self_attn.k_proj.weight": _QKV,
    "self_attn.v_proj.weight": _QKV,
    "mlp.gate_proj.weight": _GATE_UP,
    "mlp.up_proj.weight": _GATE_UP,
}
"""The names under which a file may hold a layer's tensor together with others."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Target:
    """The facts of the target that a head must fit."""

    hidden_size: int
    vocab_size: int
    num_layers: int


@dataclass(frozen=True)
class Head:
    """An EAGLE-3 head as its config.json describes it.

    Attributes:
        model: as the user named it.
        hidden_size: of the head's own layers.
        vocab_size: tokens it can read.
        draft_vocab_size: tokens it can draft.
        num_features: how many of the target's layers it reads; 0 if only the last.
        target_hidden_size: hidden size of the target it was trained for.
        layer: the tensors that its first layer must have and their shapes; empty where they are not
            known (quantised, or no Llama or Qwen3 layer).
    """

    model: str
    hidden_size: int
    vocab_size: int
    draft_vocab_size: int
    num_features: int
    target_hidden_size: int
    layer: Shapes = field(default_factory=dict)


def read_head(
    model: str,
    *,
    revision: str | None,
    target: Target,
    architectures: Collection[str],
    model_types: Collection[str],
) -> Head:
    """Read config.json and check it against the target.

    Args:
        model: a folder or a Hugging Face id.
        revision: of the Hugging Face repository.
        target: what it must fit.
        architectures: the EAGLE-3 architectures that vLLM implements.
        model_types: those whose config.json vLLM can read.

    Raises:
        EchoConfigError: with one sentence on what does not fit.
    """
    config = _flatten(model, _read_config(model, revision))
    _check_architecture(model, config, architectures)
    kind = config.get("model_type")
    if kind not in model_types and "speculators_model_type" not in config:
        _reject(
            model,
            f"has model_type {show(kind)} in its config.json, which is none that vLLM knows",
            "repair the file (it is that of the head's layers, such as llama) or choose another "
            "head",
        )
    hidden_size = _positive(model, config, "hidden_size")
    heads = config.get("num_attention_heads")
    if heads is not None and not config.get("head_dim"):
        heads = _positive(model, config, "num_attention_heads")
        if hidden_size % heads:
            _reject(
                model,
                f"has num_attention_heads {heads} in its config.json, which does not divide its "
                f"hidden_size {hidden_size}",
                "repair the file or choose another head",
            )
    vocab_size = _positive(model, config, "vocab_size")
    target_hidden_size = config.get("target_hidden_size") or hidden_size
    draft_vocab_size = config.get("draft_vocab_size") or vocab_size
    if target_hidden_size != target.hidden_size:
        name = "target_hidden_size" if config.get("target_hidden_size") else "hidden_size"
        _reject(
            model,
            f"was made for a target with hidden size {target_hidden_size} ({name} in its "
            f"config.json), but the target's is {target.hidden_size}",
            "choose a head that was trained for this target",
        )
    if vocab_size != target.vocab_size:
        _reject(
            model,
            f"was made for a vocabulary of {vocab_size} tokens (vocab_size in its config.json), "
            f"but the target's has {target.vocab_size}",
            "choose a head that was trained for this target",
        )
    if not isinstance(draft_vocab_size, int) or not 1 <= draft_vocab_size <= vocab_size:
        _reject(
            model,
            f"has draft_vocab_size {show(draft_vocab_size)} in its config.json, which must be "
            f"between 1 and its vocab_size {vocab_size}",
            "repair the file or choose another head",
        )
    return Head(
        model=model,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        draft_vocab_size=draft_vocab_size,
        num_features=_checked_features(model, config, target.num_layers),
        target_hidden_size=target_hidden_size,
        layer=_layer_shapes(model, config, hidden_size),
    )


def check_weights(head: Head, folder: Path) -> None:
    """Check the tensors in the folder of a head by their names and shapes; reads headers only.

    Heads in a format without such a header are left to vLLM.

    Raises:
        EchoConfigError: with one sentence on what is missing or has another shape.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            return
        _reject(
            head.model,
            "has no weights: there is no *.safetensors file in its folder",
            "complete the folder, for instance by downloading the head again",
        )
    shapes = {name: shape for file in files for name, shape in _read_shapes(head.model, file)}
    hidden, draft_vocab = head.hidden_size, head.draft_vocab_size
    needed = [("fc.", "fc.weight")] if head.num_features else []
    needed += [("midlayer.", "midlayer.*"), ("norm.", "norm.weight")]
    if draft_vocab != head.vocab_size:
        needed += [("d2t", "d2t"), ("lm_head.", "lm_head.weight")]
    for prefix, shown in needed:
        # Heads with several decoder layers number them.
        prefixes = (prefix, "layers.") if prefix == "midlayer." else (prefix,)
        if not any(name.startswith(prefixes) for name in shapes):
            _reject(
                head.model,
                f"is not an EAGLE-3 head that fits its config.json: its weights lack {shown}",
                "choose another head, or download it again",
            )
    _check_layer(head, shapes)
    features = head.num_features * head.target_hidden_size
    expected = {
        "fc.weight": (hidden, features),
        "norm.weight": (hidden,),
        "lm_head.weight": (draft_vocab, hidden),
        "embed_tokens.weight": (head.vocab_size, hidden),
        "d2t": (draft_vocab,),
        "t2d": (head.vocab_size,),
    }
    for name, shape in expected.items():
        _check_shape(head.model, name, shapes.get(name, shape), shape)


def _check_layer(head: Head, shapes: Shapes) -> None:
    """The first layer: vLLM would leave what is missing there as it was allocated."""
    layers = sorted(
        {match[0] for name in shapes if (match := re.match(r"midlayer\.|layers\.\d+\.", name))},
        key=lambda prefix: (prefix != "midlayer.", len(prefix), prefix),
    )
    prefix = next(iter(layers), "midlayer.")
    for name, shape in head.layer.items():
        full = f"{prefix}{name}"
        if full in shapes:
            _check_shape(head.model, full, shapes[full], shape)
        elif not any(f"{prefix}{fused}" in shapes for fused in _FUSED.get(name, ())):
            _reject(
                head.model,
                f"is not complete: its weights lack {full}",
                "download it again, with all its files",
            )


def _check_shape(model: str, name: str, actual: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if actual != expected:
        _reject(
            model,
            f"has a tensor {name} of shape {list(actual)}, but its config.json means "
            f"{list(expected)}",
            "choose another head, or download it again",
        )


def _reject(model: str, what: str, remedy: str) -> NoReturn:
    raise EchoConfigError(f"{FIELD} {show(model)} {what}; {remedy}.")


def _read_config(model: str, revision: str | None) -> dict[str, Any]:
    remedy = "set it to the folder or the Hugging Face id of an EAGLE-3 head"
    path = Path(model)
    try:
        is_folder, exists = path.is_dir(), path.exists()
        file = path / "config.json"
        if is_folder and not file.is_file():
            _reject(model, "is a folder without a config.json", remedy)
    except OSError as error:  # A name that is too long, a folder that is not ours to read.
        _reject(model, f"cannot be looked at ({error.strerror})", remedy)
    if exists and not is_folder:
        _reject(model, "is a file", remedy)
    if not exists:
        if not _HUB_ID.fullmatch(model):
            _reject(model, "does not exist", remedy)
        file = _download(model, revision, "config.json")
    try:
        config = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        _reject(model, f"has a config.json that cannot be read: {error}", "repair the file")
    if not isinstance(config, dict):
        _reject(model, "has a config.json that holds no JSON object", "repair the file")
    return config


def _download(model: str, revision: str | None, name: str) -> Path:
    from huggingface_hub import errors, hf_hub_download

    try:
        return Path(hf_hub_download(model, name, revision=revision))
    except errors.LocalEntryNotFoundError:
        reason = "it is not in the local cache, and there is no connection or HF_HUB_OFFLINE is set"
    except errors.RepositoryNotFoundError:
        reason = "there is none of that name, or it needs a token"
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision}"
    except errors.EntryNotFoundError:
        reason = f"it has no {name}"
    except Exception as error:
        # What else the library raises comes from several unrelated families of exceptions.
        reason = str(error).strip().partition("\n")[0].rstrip(".")
    _reject(
        model,
        f"is neither a folder nor a Hugging Face repository that can be read ({reason})",
        "set it to the folder or the Hugging Face id of an EAGLE-3 head",
    )


def _flatten(model: str, config: dict[str, Any]) -> dict[str, Any]:
    """A head in the format of the speculators library keeps its layer's config apart."""
    kind = config.get("speculators_model_type")
    if kind is None:
        return config
    if kind != "eagle3":
        _reject(
            model,
            f"is a speculator of type {show(kind)}",
            "choose an EAGLE-3 head",
        )
    return {
        **_object(model, config, "transformer_layer_config"),
        **{name: value for name, value in config.items() if value is not None},
        "architectures": ["Eagle3Speculator"],
    }


def _check_architecture(
    model: str, config: Mapping[str, Any], architectures: Collection[str]
) -> None:
    given = config.get("architectures")
    if not isinstance(given, list) or not given or not isinstance(given[0], str):
        _reject(
            model,
            f"has architectures {show(given)} in its config.json",
            "choose an EAGLE-3 head",
        )
    name = given[0]
    if name == "Eagle3Speculator":
        return
    # vLLM's rule: the name of the base model with Eagle3 before or after it; bare means before.
    full = name if name.startswith("Eagle3") or name.endswith("Eagle3") else f"Eagle3{name}"
    if full not in architectures:
        _reject(
            model,
            f"has architecture {name} in its config.json, which is not an EAGLE-3 head that vLLM "
            "implements",
            f"choose an EAGLE-3 head (one of {', '.join(sorted(architectures))})",
        )


def _object(model: str, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A section of config.json; empty where there is none."""
    value = config.get(name)
    if not isinstance(value, dict | None):
        _reject(
            model,
            f"has {name} {show(value)} in its config.json, which must be an object",
            "repair the file or choose another head",
        )
    return value or {}


def _positive(model: str, config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _reject(
            model,
            f"has {name} {show(value)} in its config.json, which must be a positive integer",
            "repair the file or choose another head",
        )
    return value


def _checked_features(model: str, config: Mapping[str, Any], num_layers: int) -> int:
    """How many of the target's layers the head reads, if the target has them."""
    eagle = _object(model, config, "eagle_config")
    if not eagle.get("use_aux_hidden_state", True):
        return 0
    layers = config.get("eagle_aux_hidden_state_layer_ids") or eagle.get(
        "eagle_aux_hidden_state_layer_ids"
    )
    source = "eagle_aux_hidden_state_layer_ids in its config.json"
    if not layers:
        # What vLLM chooses where the head does not say.
        layers = [2, num_layers // 2, num_layers - 3]
        source = "the default"
    named = eagle.get("eagle_aux_hidden_state_layer_ids")
    expected = config.get("num_aux_hidden_states") or (
        len(named) if named and isinstance(named, list) else 3
    )
    fits = isinstance(layers, list) and all(
        isinstance(layer, int) and 0 <= layer <= num_layers for layer in layers
    )
    if not fits or len(set(layers)) != expected:
        _reject(
            model,
            f"reads the target after layers {show(layers)} ({source}), which are not {expected} "
            f"different layers of a target with {num_layers}",
            "name other layers in eagle_aux_hidden_state_layer_ids of its config.json, or choose a "
            "head that was trained for this target",
        )
    return int(expected)


def _layer_shapes(model: str, config: Mapping[str, Any], hidden: int) -> Shapes:
    """The tensors of the first layer, which reads embeddings beside the features."""
    if config.get("quantization_config") or not re.search(
        r"Llama|Qwen3|Speculator", str(config["architectures"][0])
    ):
        return {}
    # What transformers takes where config.json does not say.
    given = {"num_attention_heads": 32, **{k: v for k, v in config.items() if v is not None}}
    heads = _positive(model, given, "num_attention_heads")
    is_qwen3 = config.get("model_type") == "qwen3"
    defaults = (
        {"num_key_value_heads": 32, "head_dim": 128, "intermediate_size": 22016}
        if is_qwen3
        else {"num_key_value_heads": heads, "head_dim": hidden // heads, "intermediate_size": 11008}
    )
    given = {**defaults, **given}
    size = _positive(model, given, "head_dim")
    queries, keys = heads * size, _positive(model, given, "num_key_value_heads") * size
    feed_forward = _positive(model, given, "intermediate_size")
    return {
        "self_attn.q_proj.weight": (queries, 2 * hidden),
        "self_attn.k_proj.weight": (keys, 2 * hidden),
        "self_attn.v_proj.weight": (keys, 2 * hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (feed_forward, hidden),
        "mlp.up_proj.weight": (feed_forward, hidden),
        "mlp.down_proj.weight": (hidden, feed_forward),
        "input_layernorm.weight": (hidden,),
        "hidden_norm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }


def _read_shapes(model: str, file: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor, from the header of a safetensors file."""
    try:
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            if size > _MAX_HEADER:
                raise ValueError("its header is too long")
            header = json.loads(stream.read(size))
        _check_length(header, file.stat().st_size - 8 - size)
        shapes = {
            name: tuple(tensor["shape"])
            for name, tensor in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, struct.error, AttributeError, TypeError, KeyError) as error:
        _reject(
            model,
            f"has a file {file.name} that is not in safetensors format ({error})",
            "download the head again, with Git LFS where it comes from a Git repository",
        )
    yield from shapes.items()


def _check_length(header: Mapping[str, Any], length: int) -> None:
    """Whether `length` bytes after the header hold all tensors, as a broken download does not."""
    end = max((t.get("data_offsets", [0, 0])[1] for t in header.values()), default=0)
    if end > length:
        raise ValueError(f"it ends after {length} of {end} bytes of tensors")
