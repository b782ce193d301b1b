# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""Whether an EAGLE-3 head fits the target, told from its config.json and its tensors' shapes.

Called at start-up, before any weight is loaded: a head that vLLM would load wrongly or only fail
on minutes later is refused in one sentence. A head that stock vLLM runs must pass; what is odd
about it is a remark. Nothing here imports vLLM.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from echo_vllm.config import EchoConfigError, show

FIELD = "speculative_config.model"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_OWN_LAYER = "transformer_layer_config"
_ANOTHER = "choose a head that was trained for this target"
_REPAIR = "repair the file or choose another head"
_DOWNLOAD = "choose another head, or download it again"

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)
"""The names under which a file may hold a layer's tensor together with others."""

# What vLLM reads past in the weights of a head that is not quantised.
_NOT_READ = re.compile(
    r"t2d|mask_hidden|rotary_(pos_)?emb\.inv_freq|rotary_emb\.(cos|sin)_cached|\binput_norm\."
)
# Of weights, in the order in which vLLM looks for them.
_PATTERNS = ("*.safetensors", "*.bin", "*.pt")
# Beside the weights, with the same endings.
_NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt")

# Kinds of rotary positions that vLLM makes a table for, and the fields that it cannot do without.
_ROPE: dict[str, tuple[str, ...]] = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "linear": ("factor",),
    "ntk": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
} | dict.fromkeys(("proportional", "mllama4", "bailing_mrope", "openpangu", "deepseek_yarn"), ())


@dataclass(frozen=True)
class Target:
    """The facts of the target that a head must fit, and over how many ranks both are split."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    num_ranks: int = 1


@dataclass(frozen=True)
class Head:
    """An EAGLE-3 head as its config.json describes it.

    Attributes:
        model: as the user named it.
        vocab_size: tokens it can read.
        draft_vocab_size: tokens it can draft.
        required: the tensors that its weights must have, with their shapes.
        optional: those that vLLM shares with the target, or takes as it makes them, where the
            weights lack them.
        is_quantised: its tensors have names and shapes of their own, which only vLLM knows.
        is_int8: some of its layers multiply integers of eight bits.
        remarks: what the user should know of a head that works.
    """

    model: str
    vocab_size: int
    draft_vocab_size: int
    required: Shapes
    optional: Shapes
    is_quantised: bool = False
    is_int8: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Fields:
    """The fields of a head's config.json, as vLLM completes it, by names that a user finds there.

    Attributes:
        model: as the user named it.
        values: the fields.
        section: which object of the file they stand in, if not in the outermost.
    """

    model: str
    values: Mapping[str, Any]
    section: str = ""

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def where(self) -> str:
        return f"{self.section} of its config.json" if self.section else "its config.json"

    def wrong(self, name: str, what: str, remedy: str = _REPAIR) -> NoReturn:
        """`what` follows the name and the value of a field."""
        value = show(self.get(name))
        _reject(self.model, f"has {name} {value} in {self.where()}, which {what}", remedy)

    def positive(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.wrong(name, "must be a positive integer")
        return value

    def object(self, name: str) -> Mapping[str, Any]:
        """A section of config.json; empty where there is none."""
        value = self.get(name)
        if not isinstance(value, Mapping | None):
            self.wrong(name, "must be an object")
        return value or {}


@dataclass
class _Found:
    """Tensors that a head has, as they are found out."""

    required: dict[str, Shape] = field(default_factory=dict)
    optional: dict[str, Shape] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def read_head(
    model: str,
    *,
    revision: str | None,
    target: Target,
    architectures: Collection[str],
    model_types: Collection[str],
    complete: Callable[[], Mapping[str, Any]],
) -> Head:
    """Read config.json and check it against the target.

    Args:
        model: a folder or a Hugging Face id.
        revision: of the Hugging Face repository.
        target: what it must fit.
        architectures: the EAGLE-3 architectures that vLLM implements.
        model_types: those whose config.json vLLM can read.
        complete: gives the fields of config.json as vLLM reads them, with its defaults.

    Raises:
        EchoConfigError: with one sentence on what does not fit.
    """
    written = _Fields(model, _read_config(model, revision))
    is_speculator = "speculators_model_type" in written.values
    if is_speculator:
        _check_speculator(written)
    else:
        _check_architecture(written, architectures)
        if written.get("model_type") not in model_types:
            written.wrong(
                "model_type",
                "is none that vLLM knows",
                "repair the file (it is that of the head's layers, such as llama) or choose "
                "another head",
            )
        if "target_hidden_size" in written.values and written.get("target_hidden_size") is None:
            written.wrong("target_hidden_size", "vLLM cannot read", "remove the field")
    try:
        values = complete()
    except Exception as error:
        # transformers, pydantic and vLLM raise many kinds here, all of them about the file.
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2]).rstrip(".")
        _reject(model, f"has a config.json that vLLM cannot read ({reason})", _REPAIR)
    fields = _Fields(model, values, _OWN_LAYER if is_speculator else "")
    found = _Found()
    hidden = fields.positive("hidden_size")
    vocab = fields.positive("vocab_size")
    target_hidden = _checked_target_hidden(fields, hidden, target)
    draft = fields.get("draft_vocab_size")
    draft = vocab if draft is None else draft
    if not isinstance(draft, int) or not 1 <= draft <= vocab:
        written.wrong("draft_vocab_size", f"must be between 1 and its vocab_size {vocab}")
    if vocab != target.vocab_size:
        found.remarks.append(
            f"was made for a vocabulary of {vocab} tokens and the target's has "
            f"{target.vocab_size}: it drafts well only where they differ by added tokens"
        )
    _layers(fields, found, hidden, target)
    _features(fields, found, hidden, target_hidden, target.num_layers)
    _check_scalars(fields)
    found.optional["norm.weight"] = (hidden,)
    # What the target can lend, if its embeddings are as wide: its own rows, so all of them.
    lends = hidden == target.hidden_size
    lent = found.optional if lends else found.required
    lent["embed_tokens.weight"] = (vocab, hidden)
    (lent if draft == vocab else found.required)["lm_head.weight"] = (draft, hidden)
    if draft != target.vocab_size:
        found.optional["d2t"] = (draft,)
    return Head(
        model=model,
        vocab_size=vocab,
        draft_vocab_size=draft,
        required=found.required,
        optional=found.optional,
        is_quantised=bool(fields.get("quantization_config")),
        is_int8=_is_int8(fields.object("quantization_config")),
        remarks=tuple(found.remarks),
    )


def _is_int8(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` (of compressed-tensors) has weights and inputs in int8."""
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping):
        return False

    def is_int8(numbers: object) -> bool:
        return isinstance(numbers, Mapping) and (
            (numbers.get("type", "int"), numbers.get("num_bits")) == ("int", 8)
        )

    return any(
        isinstance(group, Mapping)
        and is_int8(group.get("weights"))
        and is_int8(group.get("input_activations"))
        for group in groups.values()
    )


def check_arithmetic(head: Head, dtype: str, *, has_amx: bool) -> None:
    """Refuse layers that vLLM loads and cannot run.

    Args:
        head: that was read.
        dtype: of the model, such as "float32".
        has_amx: whether the engine runs on a CPU with AMX, where vLLM takes another product of
            integers.

    Raises:
        EchoConfigError: with one sentence.
    """
    if head.is_int8 and has_amx and dtype == "float32":
        _reject(
            head.model,
            "has layers in int8 (quantization_config in its config.json), which vLLM cannot "
            "multiply with --dtype float32 on a CPU with AMX",
            "set --dtype bfloat16, or choose another head",
        )


def check_weights(head: Head, folder: Path) -> list[str]:
    """Check the tensors in the folder of a head by their names and shapes.

    Returns:
        Remarks on tensors that are not there and that vLLM makes up.

    Raises:
        EchoConfigError: with one sentence on what is missing, unknown or of another shape.
    """
    written: dict[str, Shape] = {}
    for file in _weight_files(head.model, folder):
        written |= _read_shapes(head, file)
    shapes = {name.replace("midlayer.", "layers.0."): shape for name, shape in written.items()}
    numbered = not any("midlayer." in name for name in written)

    def shown(name: str) -> str:
        return name if numbered else name.replace("layers.0.", "midlayer.")

    if head.is_quantised:
        # Packed weights and scales have other names, but begin alike.
        shapes |= {f"{name.rpartition('.')[0]}.weight": shape for name, shape in shapes.items()}
    for name in head.required:
        if name not in shapes and _fused(name) not in shapes:
            _reject_missing(head, shown(name))
    if head.is_quantised:
        return []
    known = {**head.optional, **head.required}
    fused = {_fused(name) for name in known}
    for name, shape in shapes.items():
        if name not in known:
            is_read = name not in fused and not _NOT_READ.search(name)
            if is_read and ("fc.weight" in known or not name.startswith("fc.")):
                _reject_unknown(head, shown(name))
        elif shape != known[name]:
            _reject(
                head.model,
                f"has a tensor {shown(name)} of shape {list(shape)}, but its config.json means "
                f"{list(known[name])}",
                _DOWNLOAD,
            )
    missing = [shown(name) for name in head.optional if name not in shapes]
    norms = ", ".join(name for name in missing if "norm" in name)
    remarks = [f"has no {norms} in its weights: vLLM takes ones"] if norms else []
    if "d2t" in missing and head.draft_vocab_size < head.vocab_size:
        remarks.append(
            f"has no d2t in its weights: vLLM takes its tokens for the first "
            f"{head.draft_vocab_size} of the target"
        )
    return remarks


def _fused(name: str) -> str:
    """What `name` is called where it lies in one tensor with others; else `name`."""
    return re.sub(r"\b[a-z]+_proj\b", lambda match: _FUSED.get(match[0], match[0]), name)


def _reject_missing(head: Head, name: str) -> NoReturn:
    why = ""
    if name.startswith(("embed_tokens.", "lm_head.")):
        why = ", and the target's do not fit it"
    _reject(
        head.model,
        f"is not complete: its weights lack {name}{why}",
        "download it again, with all its files, or choose another head",
    )


def _reject_unknown(head: Head, name: str) -> NoReturn:
    """A tensor that vLLM has no place for."""
    remedy = "remove the tensor, or choose another head"
    for part, switch in (
        ("fc_norm.", "fc_norm"),
        ("_proj.bias", "mlp_bias" if ".mlp." in name else "attention_bias"),
    ):
        if part in name:
            remedy = f"set {switch} to true in its config.json, or choose another head"
    if name == "d2t":
        _reject(
            head.model,
            f"has a tensor d2t although it drafts the target's whole vocabulary (draft_vocab_size "
            f"{head.draft_vocab_size} in its config.json), which vLLM cannot load",
            "remove d2t and t2d from its weights if d2t is all zeros, or choose another head",
        )
    _reject(
        head.model,
        f"has a tensor {name} in its weights, which vLLM does not know in a head with its "
        "config.json",
        remedy,
    )


def _reject(model: str, what: str, remedy: str) -> NoReturn:
    raise EchoConfigError(f"{FIELD} {show(model)} {what}; {remedy}.")


# --- config.json ------------------------------------------------------------------------------


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


def _check_speculator(fields: _Fields) -> None:
    """A head in the format of the speculators library keeps its layer's config apart."""
    if fields.get("speculators_model_type") != "eagle3":
        fields.wrong("speculators_model_type", 'is not "eagle3"', "choose an EAGLE-3 head")
    layer = _Fields(fields.model, fields.object(_OWN_LAYER), _OWN_LAYER)
    if not layer.values:
        fields.wrong(_OWN_LAYER, "must describe its layers")
    if layer.values.get("model_type", "llama") not in ("llama", "qwen3"):
        layer.wrong("model_type", "must be llama or qwen3 for vLLM")


def _check_architecture(fields: _Fields, architectures: Collection[str]) -> None:
    given = fields.get("architectures")
    if not isinstance(given, list) or not given or not isinstance(given[0], str):
        _reject(
            fields.model,
            f"has architectures {show(given)} in its config.json",
            "choose an EAGLE-3 head",
        )
    name = given[0]
    if "Deepseek" in name and "Eagle3" in name:
        _reject(
            fields.model,
            f"has architecture {name} in its config.json, whose multi-head latent attention (MLA) "
            "knows no trees",
            "choose an EAGLE-3 head with plain attention",
        )
    # vLLM's rule: the name of the base model with Eagle3 before or after it; bare means before.
    full = name if name.startswith("Eagle3") or name.endswith("Eagle3") else f"Eagle3{name}"
    if full not in architectures:
        plain = sorted(known for known in architectures if "Deepseek" not in known)
        _reject(
            fields.model,
            f"has architecture {name} in its config.json, which is not an EAGLE-3 head that vLLM "
            "implements",
            f"choose an EAGLE-3 head (one of {', '.join(plain)})",
        )


def _is_qwen3(fields: _Fields) -> bool:
    """Whether vLLM runs it with its Qwen3 head; the other is Llama's."""
    return str(fields.get("architectures")[0]) in ("Qwen3ForCausalLM", "Eagle3Qwen3ForCausalLM")


def _checked_target_hidden(fields: _Fields, hidden: int, target: Target) -> int:
    name = "target_hidden_size" if fields.get("target_hidden_size") else "hidden_size"
    size = fields.get("target_hidden_size") or hidden
    if size != target.hidden_size:
        _reject(
            fields.model,
            f"was made for a target with hidden size {size} ({name} in its config.json), but the "
            f"target's is {target.hidden_size}",
            _ANOTHER,
        )
    return target.hidden_size


def _layers(fields: _Fields, found: _Found, hidden: int, target: Target) -> None:
    """The tensors of the decoder layers, the first of which reads embeddings beside features."""
    is_qwen3 = _is_qwen3(fields)
    heads = fields.positive("num_attention_heads")
    keys = (
        fields.positive("num_key_value_heads") if "num_key_value_heads" in fields.values else heads
    )
    size = fields.positive("head_dim") if fields.get("head_dim") else hidden // heads
    mlp = fields.positive("intermediate_size")
    ranks = target.num_ranks
    for name, number in (
        ("num_attention_heads", heads),
        ("num_key_value_heads", max(keys, ranks) if ranks % keys == 0 else keys),
        ("intermediate_size", mlp),
    ):
        if number % ranks:
            fields.wrong(
                name,
                f"cannot be split over --tensor-parallel-size {ranks}",
                "choose a size that divides it",
            )
    for i in range(fields.positive("num_hidden_layers")):
        width = 2 * hidden if i == 0 else hidden
        layer = f"layers.{i}."
        linears = {
            "self_attn.q_proj": (heads * size, width),
            "self_attn.k_proj": (keys * size, width),
            "self_attn.v_proj": (keys * size, width),
            "self_attn.o_proj": (hidden, heads * size),
            "mlp.gate_proj": (mlp, hidden),
            "mlp.up_proj": (mlp, hidden),
            "mlp.down_proj": (hidden, mlp),
        }
        found.required |= {f"{layer}{name}.weight": shape for name, shape in linears.items()}
        biased = []
        if fields.get("attention_bias"):
            biased += ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
        if not is_qwen3 and (fields.get("attention_bias") or fields.get("bias")):
            biased.append("self_attn.o_proj")
        if not is_qwen3 and fields.get("mlp_bias"):
            biased += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
        found.required |= {f"{layer}{name}.bias": linears[name][:1] for name in biased}
        norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        found.optional |= {f"{layer}{name}.weight": (hidden,) for name in norms}
        if is_qwen3:
            found.optional |= {f"{layer}self_attn.{n}_norm.weight": (size,) for n in "qk"}


def _features(
    fields: _Fields, found: _Found, hidden: int, target_hidden: int, num_layers: int
) -> None:
    """What joins the features of the target's layers, which must be layers that the target has."""
    eagle = fields.object("eagle_config")
    if not eagle.get("use_aux_hidden_state", True):
        return
    name = "eagle_aux_hidden_state_layer_ids"
    own, nested = fields.get(name), eagle.get(name)
    layers = own or nested
    source = f"{name} in its config.json"
    if not layers:
        # What vLLM chooses where the head does not say.
        layers = [2, num_layers // 2, num_layers - 3]
        source = "the default"
        found.remarks.append(
            f"does not say which layers of the target it reads: vLLM takes {layers}; if it was "
            f"trained on others, write them into {name} of its config.json"
        )
    is_qwen3 = _is_qwen3(fields)
    said = (fields.get("num_aux_layers") if is_qwen3 else None) or fields.get(
        "num_aux_hidden_states"
    )
    counted = (own if is_qwen3 else None) or nested
    number = said or (len(counted) if isinstance(counted, list) and counted else 3)
    if not isinstance(number, int):
        fields.wrong("num_aux_hidden_states", "must be a positive integer")
    fits = isinstance(layers, list) and all(
        isinstance(layer, int) and 0 <= layer <= num_layers for layer in layers
    )
    if not fits or len(set(layers)) != number:
        remedy = (
            f"name other layers in {name} of its config.json, or choose a head that was trained "
            "for this target"
        )
        if fits and len(set(layers)) == len(layers) and not said and not is_qwen3:
            remedy = f"set num_aux_hidden_states to {len(layers)} in {fields.where()}"
        _reject(
            fields.model,
            f"reads the target after layers {show(layers)} ({source}), which are not {number} "
            f"different layers of a target with {num_layers}",
            remedy,
        )
    joined = number * target_hidden
    found.required["fc.weight"] = (hidden, joined)
    if eagle.get("norm_before_fc", fields.get("norm_before_fc")):
        found.optional["input_norm.weight"] = (joined,)
    if fields.get("fc_norm"):
        found.optional |= {f"fc_norm.{i}.weight": (target_hidden,) for i in range(number)}


def _check_scalars(fields: _Fields) -> None:
    """Values that vLLM would only choke on while it builds the head."""
    if fields.get("hidden_act") != "silu":
        fields.wrong("hidden_act", 'must be "silu" for vLLM')
    for name, default in (("rms_norm_eps", None), ("logit_scale", 1.0)):
        value = fields.values.get(name, default)
        if not isinstance(value, int | float) or value <= 0:
            fields.wrong(name, "must be a positive number")
    if _is_qwen3(fields) or "max_position_embeddings" in fields.values:
        fields.positive("max_position_embeddings")
    rope = fields.object("rope_parameters")
    kind = rope.get("rope_type", "default")
    if kind not in _ROPE:
        fields.wrong("rope_parameters", f"has none of the rope_type {', '.join(_ROPE)}")
    needed = _ROPE[kind] if "alpha" not in rope else ()
    for name in ("rope_theta", *needed):
        if rope.get(name, 0 if name == "rope_theta" else None) is None:
            inside = _Fields(fields.model, rope, fields.section)
            inside.wrong(name, f"rotary positions of type {kind} need", "set it to the target's")
    kinds = fields.get("layer_types")
    if kinds and len(kinds) < fields.positive("num_hidden_layers"):
        fields.wrong("layer_types", "must name a type for each of num_hidden_layers")
    if kinds and "sliding_attention" in kinds and not fields.get("sliding_window"):
        fields.wrong("sliding_window", "its layer_types need")


# --- weights ----------------------------------------------------------------------------------


def local_file(
    model: str, name: str, revision: str | None = None, cache: str | None = None
) -> Path | None:
    """A file of a head, in its folder or, for a Hugging Face id, in the cache of downloads
    (`cache`, by default the user's); None where it is not on this machine."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(model)
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    if not _HUB_ID.fullmatch(model):
        return None
    file = try_to_load_from_cache(model, name, cache_dir=cache, revision=revision)
    return Path(file) if isinstance(file, str) else None


def weights_folder(model: str, revision: str | None, cache: str | None = None) -> Path | None:
    """Where a head's weights are on this machine; None where vLLM is yet to download them."""
    config = local_file(model, "config.json", revision, cache)
    if config is None:
        return None
    files = (file for pattern in _PATTERNS for file in config.parent.glob(pattern))
    return config.parent if Path(model).is_dir() or any(files) else None


def _weight_files(model: str, folder: Path) -> list[Path]:
    """The files that vLLM would load: of the first kind that there is."""
    for pattern in _PATTERNS:
        files = [file for file in sorted(folder.glob(pattern)) if file.name not in _NO_WEIGHTS]
        index = folder / "model.safetensors.index.json"
        if files and pattern == "*.safetensors" and index.is_file():
            try:
                listed = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
                _reject(model, f"has a file {index.name} that cannot be read ({error})", _DOWNLOAD)
            if absent := sorted(listed - {file.name for file in files}):
                _reject(model, f"is not complete: it lacks the file {absent[0]}", _DOWNLOAD)
            files = [file for file in files if file.name in listed]
        if files:
            return files
    _reject(
        model,
        "has no weights: there is no *.safetensors or *.bin file in its folder",
        "complete the folder, for instance by downloading the head again",
    )


def _read_shapes(head: Head, file: Path) -> dict[str, Shape]:
    """Name and shape of every tensor; reads no tensor but `d2t`."""
    import torch
    from safetensors import SafetensorError, safe_open

    d2t = None
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                names = list(tensors.keys())
                shapes = {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
                if "d2t" in shapes:
                    d2t = tensors.get_tensor("d2t")
        else:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            shapes = {name: tuple(tensor.shape) for name, tensor in loaded.items()}
            d2t = loaded.get("d2t")
    except (OSError, SafetensorError, RuntimeError, ValueError, AttributeError) as error:
        kind = "safetensors" if file.suffix == ".safetensors" else "PyTorch's"
        reason = str(error).partition("\n")[0].rstrip(".")
        _reject(
            head.model,
            f"has a file {file.name} that is not in {kind} format, or not whole ({reason})",
            "download the head again, with Git LFS where it comes from a Git repository",
        )
    if d2t is not None:
        tokens = d2t + torch.arange(len(d2t))
        wrong = tokens[(tokens < 0) | (tokens >= head.vocab_size)]
        if len(wrong):
            _reject(
                head.model,
                f"has a d2t that names token {int(wrong[0])} of a vocabulary of {head.vocab_size} "
                "(vocab_size in its config.json)",
                _DOWNLOAD,
            )
    return shapes
