"""The cached step against the full pass."""

import pytest
import torch

from lightning_modules.backbone.attention import attend
from lightning_modules.backbone.kv_cache import KVCache
from lightning_modules.backbone.transformer import Transformer, TransformerConfig


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    return Transformer(TransformerConfig(dim=16, depth=3, heads=2)).double()


def test_steps_against_the_cache_equal_the_full_causal_pass(model: Transformer) -> None:
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    full = model(x, causal=True)
    cache = KVCache(capacity=8)
    prefix = model(x[:, :3], causal=True, cache=cache)
    torch.testing.assert_close(prefix[-1], full[-1][:, :3])
    for t in range(3, 7):
        step = model.step(x[:, t : t + 1], cache)
        for got, expected in zip(step, full, strict=True):
            torch.testing.assert_close(got[:, 0], expected[:, t])
        cache.commit(torch.zeros(2, dtype=torch.int64))


def test_candidates_do_not_see_each_other_and_the_chosen_one_stays(model: Transformer) -> None:
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    candidates = torch.randn(2, 5, 16, dtype=torch.float64)
    after = torch.randn(2, 1, 16, dtype=torch.float64)
    choice = torch.tensor([3, 1])
    cache = KVCache(capacity=8)
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


def test_selected_rows_are_independent_of_the_original_cache(model: Transformer) -> None:
    x = torch.randn(2, 4, 16, dtype=torch.float64)
    cache = KVCache(capacity=8)
    model(x, causal=True, cache=cache)
    twin = cache.select(torch.tensor([1, 1, 0]))
    model.step(torch.randn(3, 1, 16, dtype=torch.float64), twin)
    twin.commit(torch.zeros(3, dtype=torch.int64))
    assert (twin.length, cache.length) == (5, 4)
    torch.testing.assert_close(twin.keys[0][2, :, :4], cache.keys[0][0, :, :4])
    assert not cache.keys[0][:, :, 4].any()


def test_layers_that_move_to_make_room_keep_what_they_hold(model: Transformer) -> None:
    x = torch.randn(2, 23, 16, dtype=torch.float64)
    full = model(x, causal=True)[-1]
    cache = KVCache(capacity=12)  # more come than were announced
    model(x[:, :2], causal=True, cache=cache)
    for t in range(2, 23):
        torch.testing.assert_close(model.step(x[:, t : t + 1], cache)[-1][:, 0], full[:, t])
        cache.commit(torch.zeros(2, dtype=torch.int64))
    memory = {layer.untyped_storage().data_ptr() for layer in cache.keys + cache.values}
    assert len(memory) == 6, "layers share memory"


def test_rows_extended_by_different_numbers_equal_the_full_causal_pass(model: Transformer) -> None:
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    full = model(x, causal=True)[-1]
    cache = KVCache(capacity=8)
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
