"""CLIPScore by open_clip: patches in one batch, prompts once, preprocessing as the model's; training a small one."""

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from datamodules.captions import CaptionsDataModule
from datamodules.shapes.caption_pairs import CaptionPairs
from datamodules.shapes.prompts import vocabulary
from datamodules.shapes.scenes import ShapesStream
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Request
from lightning_modules.backbone.image_tokenizer import upsample_patches
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.backbone.text import WordTokenizer
from lightning_modules.contrastive import ContrastiveModule
from lightning_modules.decoding.regions import PatchCLIPScore, Region
from lightning_modules.decoding.sample import Sample
from lightning_modules.rewards.clip_score import CLIPScore, cells
from tests.helpers.models import TEXT, VISION, make_clip

PROMPTS = ["a photo of a star", "a photo of a ring", "a photo of a star"]


@pytest.fixture
def clip() -> torch.nn.Module:
    return make_clip()


@pytest.fixture
def score(clip: torch.nn.Module) -> CLIPScore:
    return CLIPScore(clip, WordTokenizer(vocabulary(), 12), batch_size=5)


def test_a_patch_scores_as_the_image_it_is(score: CLIPScore) -> None:
    pixels = torch.rand(3, 3, 64, 64)
    patches = score.patches(PROMPTS, pixels, 4)
    assert patches.shape == (3, 4, 4)
    alone = score([{"prompt": prompt} for prompt in PROMPTS], pixels[:, :, 16:32, 48:])
    torch.testing.assert_close(patches[:, 1, 3].clamp(min=0), alone)
    assert patches.std() > 0.01
    with pytest.raises(ValueError, match="images of 64x64 pixels have no 3x3 patches"):
        score.patches(PROMPTS, pixels, 3)


def test_it_is_the_clipped_and_scaled_cosine(score: CLIPScore, clip: torch.nn.Module) -> None:
    pixels = torch.rand(3, 3, 64, 64)
    config = open_clip.model.get_model_preprocess_cfg(clip)
    assert config["size"] == (64, 64)
    mean, std = (torch.tensor(getattr(open_clip, f"OPENAI_DATASET_{name}")).view(3, 1, 1) for name in ("MEAN", "STD"))
    image = clip.encode_image((pixels - mean) / std)
    text = clip.encode_text(score.tokenizer(PROMPTS))
    expected = 2.5 * torch.cosine_similarity(image, text).clamp(min=0)
    torch.testing.assert_close(score([{"prompt": prompt} for prompt in PROMPTS], pixels), expected)


def test_each_prompt_is_encoded_once(score: CLIPScore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    encode = score.clip.encode_text
    monkeypatch.setattr(score.clip, "encode_text", lambda text, **kw: asked.append(len(text)) or encode(text, **kw))
    pixels = torch.rand(3, 3, 64, 64)
    first, second = score.patches(PROMPTS, pixels, 2), score.patches(PROMPTS, pixels, 2)
    assert asked == [2]
    assert torch.equal(first, second)


def test_a_model_in_a_folder_is_read_as_open_clip_reads_it(tmp_path: Path) -> None:
    """Published models come as a folder or by name; images are resized and normalised as their own transform does."""
    config = {"embed_dim": 16, "vision_cfg": VISION | {"image_size": 32}, "text_cfg": TEXT | {"vocab_size": 49408}}
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    about = {"model_cfg": config, "preprocess_cfg": {"mean": mean, "std": std}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(about))
    save_file(open_clip.CLIP(**config).state_dict(), tmp_path / "open_clip_model.safetensors")
    name = f"local-dir:{tmp_path}"
    clip, _, transform = open_clip.create_model_and_transforms(name)
    tokenizer = open_clip.get_tokenizer(name)
    image = np.asarray(Image.fromarray(np.random.default_rng(0).integers(0, 255, (8, 8, 3), np.uint8)).resize((64, 64)))
    with torch.no_grad():
        own = clip.eval().encode_image(transform(Image.fromarray(image))[None]), clip.encode_text(tokenizer(["a cat"]))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None] / 255
    found = CLIPScore(clip, tokenizer)([{"prompt": "a cat"}], pixels)
    torch.testing.assert_close(found, 2.5 * torch.cosine_similarity(*own).clamp(min=0), atol=0.01, rtol=0)


def test_reflection_looks_at_the_patches_that_score_lowest(
    decoder: CompactDecoder, rows: list, score: CLIPScore
) -> None:
    image = Sample(Sampling()).decode(decoder, {}, Request(rows, range(len(rows))))
    found = Region(PatchCLIPScore(2), quantile=0.25)(decoder, {"clip": score}, Request(rows, range(len(rows))), image)
    patches = score.patches([row["prompt"] for row in rows], decoder.image_tokenizer.decode(image.tokens), 2)
    lowest = torch.zeros(len(rows), 4, dtype=torch.bool)
    lowest[torch.arange(len(rows)), patches.flatten(1).argmin(1)] = True
    assert torch.equal(found, upsample_patches(lowest.view(-1, 2, 2), 4))
    assert image.cost.verifier_calls == 4 * len(rows)


def test_training_tells_captions_apart(clip: torch.nn.Module) -> None:
    pairs = CaptionPairs(ShapesStream(seed=5), 12, 8)
    batch = CaptionsDataModule.collate([(i, pairs[i]) for i in range(6)])
    with pytest.raises(ValueError, match=r"module\.grids: images of 64 pixels cannot be cut into 3x3 patches"):
        ContrastiveModule(clip, WordTokenizer(vocabulary(), 12), torch.optim.AdamW, 0, [2, 3])
    module = ContrastiveModule(clip, WordTokenizer(vocabulary(), 12), torch.optim.AdamW, 0, [2])
    logged: dict[str, torch.Tensor] = {}
    module.log_dict = lambda metrics, **_: logged.update(metrics)  # type: ignore[method-assign]
    optimizer = torch.optim.AdamW(module.parameters(), 3e-3)
    torch.manual_seed(0)
    for _ in range(60):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    module.validation_step(batch, 0)
    assert logged["val/accuracy"] == logged["val/accuracy_2x2"] == 1
    # What is true as well is no negative: the loss does not mind how much an image goes with it.
    torch.manual_seed(0)
    strict = module.training_step(batch, 0)
    torch.manual_seed(0)
    assert module.training_step(batch | {"correct": torch.ones(12)}, 0) < strict


def test_cells_go_row_by_row() -> None:
    pixels = torch.arange(16.0).view(1, 1, 4, 4).expand(1, 3, 4, 4)
    assert cells(pixels, 2)[0, :, 0].flatten(1).tolist() == [
        [0, 1, 4, 5],
        [2, 3, 6, 7],
        [8, 9, 12, 13],
        [10, 11, 14, 15],
    ]
