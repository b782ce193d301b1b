# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the echo-vllm project
"""An engine with trees has this project's linear layers and norms, and no other engine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

from echo_vllm import ops
from echo_vllm.startup.linear import packed_linear_is_faster, packed_linears
from echo_vllm.startup.norm import fuse_norms
from tests.engine.conftest import TinyModel
from tests.engine.engines import echo, engine, generate, runner
from tests.engine.test_exactness import greedy, tiny_prompts

HAS_AVX2 = "avx2" in ops.supported_cpu_isas()
OURS = "echo_vllm.startup.linear"


def layers_of(llm: Any) -> list[Any]:
    """All modules of target and drafter."""
    made = runner(llm)
    models = [made.model] + ([made.drafter.model] if hasattr(made, "drafter") else [])
    return [module for model in models for module in model.modules()]


def makers(llm: Any) -> set[str]:
    """The modules that made the linear layers of target and drafter."""
    layers = [m for m in layers_of(llm) if hasattr(m, "cpu_linear")]
    assert len(layers) >= 4
    return {layer.cpu_linear.__module__ for layer in layers}


def norms(llm: Any) -> set[str]:
    """The modules whose functions the norms of target and drafter run."""
    layers = [m for m in layers_of(llm) if isinstance(m, RMSNorm)]
    assert len(layers) >= 5
    return {layer._forward_method.__module__ for layer in layers}


@pytest.mark.full
@pytest.mark.skipif(not HAS_AVX2, reason="this processor has no AVX2: vLLM's layers stay")
def test_only_engines_with_trees_have_packed_layers(tiny: TinyModel) -> None:
    options = {"skip_tokenizer_init": True, "max_model_len": 256}
    prompts = tiny_prompts(8)
    texts, found, normed = [], [], []
    for spec in (
        echo(tiny.head, 8, max_depth=3, top_k=3),
        echo(tiny.head, 8, max_depth=3, top_k=3, linear="stock"),
        None,
    ):
        with engine(tiny.target, spec, **options) as llm:
            found.append(makers(llm))
            normed.append(norms(llm))
            texts.append(generate(llm, prompts, greedy(40)))
    assert found[0] == {OURS}
    assert OURS not in found[1] | found[2]
    assert normed[0] == {"echo_vllm.startup.norm"}
    assert "echo_vllm.startup.norm" not in normed[1] | normed[2]
    assert texts[0] == texts[1] == texts[2]


def test_other_weights_stay_with_vllm() -> None:
    assert packed_linear_is_faster(torch.zeros(4, 4)) == HAS_AVX2
    is_fast = "avx512_bf16" in ops.supported_cpu_isas()
    assert packed_linear_is_faster(torch.zeros(4, 4).bfloat16()) == is_fast
    for other in (
        torch.zeros(4, 4).half(),
        torch.zeros(4, 4, 4),
        torch.zeros(4, 4, device="meta"),
    ):
        assert not packed_linear_is_faster(other)


@pytest.mark.skipif(not HAS_AVX2, reason="this processor has no AVX2: vLLM's layers stay")
def test_a_layer_gives_what_it_gave_and_keeps_its_shape() -> None:
    from vllm.model_executor.layers import utils

    layer = torch.nn.Linear(48, 20)
    layer.requires_grad_(False)
    x = torch.randn(2, 3, 48)
    wanted = layer(x)
    with packed_linears():
        utils.dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0
    found = utils.cpu_unquantized_gemm(layer, x, layer.weight, layer.bias)
    torch.testing.assert_close(found, wanted)


def test_a_norm_is_fused_where_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with set_current_vllm_config(VllmConfig()), torch.inference_mode():
        plain, other, partial = RMSNorm(48), GemmaRMSNorm(48), RMSNorm(48, var_hidden_size=16)
        plain.weight.data = torch.randn(48)
        stock = plain._forward_method
        x, residual = torch.randn(2, 5, 48)
        wanted = plain(x.clone(), residual.clone())
        model = torch.nn.ModuleList([plain, other, partial])
        with monkeypatch.context() as planted:
            planted.setattr(plain, "variance_epsilon", 1e-2)
            planted.setattr(plain, "forward_native", RMSNorm(48).forward_native)
            fuse_norms([model])
            assert plain._forward_method == stock
        untouched = [layer._forward_method for layer in (other, partial)]
        fuse_norms([model])
        assert plain._forward_method != stock
        assert [layer._forward_method for layer in (other, partial)] == untouched
        found = plain(x.clone(), residual.clone())
        assert all(map(torch.equal, found, wanted))
        # Rows that are no matrix, as heads of a query are, stay with vLLM.
        heads = torch.randn(5, 3, 48)
        assert torch.equal(plain(heads), plain.forward_native(heads))
