"""The patch VQ autoencoder."""

import pytest
import torch

from lightning_modules.backbone.image_tokenizer import CodeVectors, PatchVQ, nearest


def blocks(n: int) -> torch.Tensor:
    """Images of 4x4 flat patches in random colours out of 8, [n, 3, 16, 16]."""
    generator = torch.Generator().manual_seed(0)
    palette = torch.rand(8, 3, generator=generator)
    grid = palette[torch.randint(8, (n, 4, 4), generator=generator)]
    return grid.permute(0, 3, 1, 2).repeat_interleave(4, 2).repeat_interleave(4, 3)


def test_k_means_finds_every_distinct_patch_and_codes_round_trip() -> None:
    pixels = blocks(32)
    tokenizer = PatchVQ(codebook_size=8, grid=4, image_size=16, width=8, blocks=1)
    error = tokenizer.fit_codebook(pixels, 5, torch.Generator().manual_seed(0))
    assert error < 1e-3
    tokens = tokenizer.encode(pixels)
    assert tokens.shape == (32, 16)
    assert len(tokens.unique()) == 8
    torch.testing.assert_close(tokenizer.decode(tokens), pixels, atol=0.01, rtol=0)  # an untrained decoder adds 0


def test_the_codebook_is_the_same_wherever_the_weights_are() -> None:
    tokenizer = PatchVQ(codebook_size=8, grid=4, image_size=16, width=8, blocks=1).to("meta")
    assert tokenizer.fit_codebook(blocks(32), 5, torch.Generator().manual_seed(0)) < 1e-3


def test_patches_are_read_row_by_row() -> None:
    tokenizer = PatchVQ(codebook_size=8, grid=4, image_size=16, width=8, blocks=1)
    tokenizer.fit_codebook(blocks(32), 5, torch.Generator().manual_seed(0))
    image = blocks(1)
    top = image.clone()
    top[:, :, :4, 4:8] = image[:, :, 12:, :4]
    changed = (tokenizer.encode(image) != tokenizer.encode(top)).flatten().nonzero().flatten().tolist()
    assert changed in ([1], [])
    assert tokenizer.encode(top)[0, 1] == tokenizer.encode(image)[0, 12]


def test_too_few_patches_for_the_codebook_are_refused() -> None:
    tokenizer = PatchVQ(codebook_size=64, grid=4, image_size=16, width=8, blocks=1)
    with pytest.raises(ValueError, match="8 distinct patches cannot fill a codebook of 64"):
        tokenizer.fit_codebook(blocks(32), 5, torch.Generator())


def test_nearest_agrees_with_the_definition_in_chunks() -> None:
    vectors, codebook = torch.randn(50, 6), torch.randn(9, 6)
    expected = torch.cdist(vectors, codebook).argmin(1)
    assert torch.equal(nearest(vectors, codebook, chunk=7), expected)


def test_any_vector_is_the_nearest_codes() -> None:
    vq = PatchVQ(codebook_size=8, grid=4, image_size=16, width=8, blocks=1)
    pixels = blocks(32)
    vq.fit_codebook(pixels, 5, torch.Generator().manual_seed(0))
    tokenizer, codes = CodeVectors(vq), vq.encode(pixels)
    tokens = tokenizer.encode(pixels)
    assert torch.equal(tokens, vq.code_vectors[codes]) and torch.equal(tokenizer.codes(tokens), codes)
    near = tokens + 0.01 * torch.randn_like(tokens)
    assert torch.equal(tokenizer.decode(near), vq.decode(codes)) and tokenizer.num_tokens == 16
