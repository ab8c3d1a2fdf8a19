"""The cached step against the full pass; blocks of Llama's make against transformers' own."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lightning_modules.backbone.attention import attend
from lightning_modules.backbone.kv_cache import MANY, KVCache
from lightning_modules.backbone.linear import Linear
from lightning_modules.backbone.lora import LoRA
from lightning_modules.backbone.rotary import Rotary
from lightning_modules.backbone.transformer import Transformer, TransformerConfig


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(dim=16, depth=3, heads=2)).double()


@pytest.fixture(params=[8, MANY])
def capacity(request: pytest.FixtureRequest) -> int:
    """Of caches that lie in memory in either way."""
    return int(request.param)


@pytest.mark.parametrize("length", [3, MANY + 2])
def test_steps_against_the_cache_equal_the_full_causal_pass(model: Transformer, capacity: int, length: int) -> None:
    x = torch.randn(2, length + 4, 16, dtype=torch.float64)
    full = model(x, causal=True)
    cache = KVCache(capacity)
    prefix = model(x[:, :length], causal=True, cache=cache)
    torch.testing.assert_close(prefix[-1], full[-1][:, :length])
    for t in range(length, length + 4):
        step = model.step(x[:, t : t + 1], cache)
        for got, expected in zip(step, full, strict=True):
            torch.testing.assert_close(got[:, 0], expected[:, t])
        cache.commit(torch.zeros(2, dtype=torch.int64))


def test_candidates_do_not_see_each_other_and_the_chosen_one_stays(model: Transformer, capacity: int) -> None:
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    candidates = torch.randn(2, 5, 16, dtype=torch.float64)
    after = torch.randn(2, 1, 16, dtype=torch.float64)
    choice = torch.tensor([3, 1])
    cache = KVCache(capacity)
    model(x, causal=True, cache=cache)
    together = model.step(candidates, cache)[-1]
    cache.commit(choice)
    following = model.step(after, cache)[-1]
    for k in range(5):
        alone = model(torch.cat([x, candidates[:, k : k + 1]], 1), causal=True)[-1][:, -1]
        torch.testing.assert_close(together[:, k], alone)
    chosen = candidates[torch.arange(2), choice, None]
    expected = model(torch.cat([x, chosen, after], 1), causal=True)[-1][:, -1:]
    torch.testing.assert_close(following, expected)


def test_selected_rows_are_independent_of_the_original_cache(model: Transformer, capacity: int) -> None:
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    cache = KVCache(capacity)
    model(x, causal=True, cache=cache)
    twin = cache.select(torch.tensor([1, 1, 0]))
    model.step(torch.randn(3, 1, 16, dtype=torch.float64), twin)
    twin.commit(torch.zeros(3, dtype=torch.int64))
    assert (twin.length, cache.length) == (5, 4)
    torch.testing.assert_close(twin.keys[0][2, :, :4], cache.keys[0][0, :, :4])
    torch.testing.assert_close(twin.values[0][2, :, :4], cache.values[0][0, :, :4])
    assert not cache.keys[0][:, :, 4].any()


@pytest.mark.parametrize("extra", [0, MANY])
def test_layers_that_move_to_make_room_keep_what_they_hold(model: Transformer, extra: int) -> None:
    x = torch.randn(2, 23 + extra, 16, dtype=torch.float64)
    full = model(x, causal=True)[-1]
    cache = KVCache(capacity=12 + extra)  # more come than were announced
    model(x[:, : 2 + extra], causal=True, cache=cache)
    for t in range(2 + extra, 23 + extra):
        torch.testing.assert_close(model.step(x[:, t : t + 1], cache)[-1][:, 0], full[:, t])
        cache.commit(torch.zeros(2, dtype=torch.int64))
    memory = {layer.untyped_storage().data_ptr() for layer in cache.keys + cache.values}
    assert len(memory) == 6, "layers share memory"


def test_rows_extended_by_different_numbers_equal_the_full_causal_pass(model: Transformer, capacity: int) -> None:
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    full = model(x, causal=True)[-1]
    cache = KVCache(capacity)
    model(x[:, :2], causal=True, cache=cache)
    counts = torch.tensor([1, 4])
    extended = model.extend(x[:, 2:6], counts, cache)[-1]
    torch.testing.assert_close(extended[0, :1], full[0, 2:3])
    torch.testing.assert_close(extended[1], full[1, 2:6])
    assert cache.lengths.tolist() == [3, 6]
    following = model.step(torch.stack([x[0, 3], x[1, 6]])[:, None], cache)[-1]
    torch.testing.assert_close(following[:, 0], torch.stack([full[0, 3], full[1, 6]]))
    cache.commit(torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(
        model.extend(x[:1, 4:7].repeat(2, 1, 1), torch.tensor([3, 0]), cache)[-1][0], full[0, 4:]
    )


@pytest.mark.parametrize("causal", [True, False])
def test_attention_by_matrix_products_is_scaled_dot_product_attention(causal: bool) -> None:
    q, k, v = torch.randn(3, 2, 4, 7, 8, dtype=torch.float64)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    torch.testing.assert_close(attend(q, k, v, causal), expected)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"dim=10 is not a multiple of heads=4"):
        TransformerConfig(dim=10, depth=1, heads=4)


def test_blocks_of_llama_s_make_are_those_of_transformers() -> None:
    """Rows of several lengths, padded on the left; weights of q, k, v and of gate and up are joined."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4}
    theirs = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=8, rms_norm_eps=1e-6, **sizes)).eval()
    config = TransformerConfig(32, 2, 4, 2.5, rms_norm=True, swiglu=True, bias=False, norm_eps=1e-6)
    ours, norm = Transformer(config), config.norm()
    for block, layer in zip(ours.blocks, theirs.layers, strict=True):
        for weight in (layer.input_layernorm.weight, layer.post_attention_layernorm.weight):
            torch.nn.init.uniform_(weight)
        attention, mlp = layer.self_attn, layer.mlp
        joined = {
            "attention_norm": [layer.input_layernorm],
            "attention.qkv": [attention.q_proj, attention.k_proj, attention.v_proj],
            "attention.proj": [attention.o_proj],
            "mlp_norm": [layer.post_attention_layernorm],
            "mlp.0": [mlp.gate_proj, mlp.up_proj],
            "mlp.2": [mlp.down_proj],
        }
        block.load_state_dict({f"{key}.weight": torch.cat([p.weight for p in parts]) for key, parts in joined.items()})
    x, padding = torch.randn(3, 9, 32), torch.tensor([0, 4, 7])
    real = torch.arange(9) >= padding[:, None]
    expected = theirs(inputs_embeds=x, attention_mask=real.long()).last_hidden_state
    found = norm(ours(x, causal=True, rotary=Rotary.at(torch.arange(-9, 0), 8), padding=padding)[-1])
    torch.testing.assert_close(found[real], expected[real], atol=2e-5, rtol=1e-4)


def test_interleaved_pairs_turn_as_complex_numbers_do() -> None:
    x, angles = torch.randn(2, 3, 5, 8), torch.randn(5, 4)
    turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones(5, 4), angles)
    found = Rotary(angles.cos(), angles.sin(), interleaved=True)(x)
    torch.testing.assert_close(found, torch.view_as_real(turned).flatten(-2))
    nothing = torch.zeros(5, 4)
    assert not Rotary(nothing, nothing, interleaved=True)(x).any()


@pytest.mark.parametrize("width", [256, 2048])
@pytest.mark.parametrize("bias", [False, True])
def test_large_layers_give_the_same_for_few_rows(width: int, bias: bool) -> None:
    layer = Linear(width, 1024, bias=bias)
    for rows in range(1, 6):
        x = torch.randn(rows, 1, width)
        expected = layer(x)  # with gradients: as any linear layer
        with torch.no_grad():
            found = layer(x)
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("inputs", "outputs"), [(96, 384), (384, 96)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [16, 50])
def test_products_of_many_rows_and_their_gradients_are_those_of_any_linear_layer(
    inputs: int, outputs: int, bias: bool, rows: int
) -> None:
    torch.manual_seed(0)
    layer = Linear(inputs, outputs, bias=bias)
    x, gradient = torch.randn(2, rows, inputs, requires_grad=True), torch.randn(2, rows, outputs)

    def run(function: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
        output = function(x)
        return [output, *torch.autograd.grad(output, [x, *layer.parameters()], gradient)]

    def plain(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, layer.weight, layer.bias)

    assert "_Product" in str(layer(x).grad_fn)
    for found, expected in zip(run(layer), run(plain), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def test_adapters_stand_beside_gated_layers_too() -> None:
    model = Transformer(TransformerConfig(32, 2, 4, 2.5, rms_norm=True, swiglu=True, bias=False))
    x = torch.randn(2, 5, 32)
    before = model(x, causal=True)[-1]
    adapters = LoRA(rank=2)
    adapters.inject(model)
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    assert len(trained) == 2 * 4 * 2 and all(map(adapters.is_adapter, trained))
    with torch.no_grad():
        for weight in trained.values():
            weight.normal_(std=0.1)
    adapted = model(x, causal=True)[-1]
    assert not torch.allclose(adapted, before, atol=1e-3)
    adapters.merge(model)
    torch.testing.assert_close(model(x, causal=True)[-1], adapted, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_inputs_of_another_width_are_refused_as_by_any_linear_layer() -> None:
    layer = Linear(1024, 1024)
    for shape in ((2, 512), (4, 512), (2, 2048), (64, 512)):
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            layer(torch.randn(shape))
    assert layer(torch.randn(1024)).shape == (1024,) and layer(torch.randn(0, 1024)).shape == (0, 1024)


def test_gradients_of_products_are_themselves_not_differentiated() -> None:
    layer, x = Linear(1024, 1024), torch.randn(64, 1024, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    layer(torch.randn(1024)).sum().backward()  # of a single row as of many
    assert layer.weight.grad is not None


def test_frozen_weights_keep_no_inputs_for_the_backward_pass() -> None:
    layer, kept = Linear(1024, 1024).requires_grad_(False), []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.shape), lambda shape: None):
        layer(torch.randn(64, 1024, requires_grad=True))
    assert kept == [(1024, 1024)]
