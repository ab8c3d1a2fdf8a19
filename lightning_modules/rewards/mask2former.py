"""GenEval's object detector for photographs: Mask2Former through transformers.

The way from an image to objects is that of mmdetection, in which the official evaluation runs it: transformers' own
post-processing squashes masks to a fixed size and gives no boxes.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.backbone.checkpoint_folder import resolve
from lightning_modules.backbone.loading import fingerprint
from lightning_modules.broken_files import refuse_broken_folder
from lightning_modules.cache_key import Keyed, class_name, digest, published_key
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES
from lightning_modules.rewards.geneval_rules import Detections
from lightning_modules.rewards.open_clip_weights import how_to_download

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of ImageNet, red, green, blue, pixels in 0..255
GREY, MULTIPLE = 128.0, 32  # images are padded with this to a multiple of that
CHUNK = 20  # masks that are brought to the size of the image together: bounds the memory, changes no result


class Mask2FormerDetector(Keyed):
    """Finds the objects of COCO's 80 classes, under GenEval's names.

    Args:
        checkpoint: a folder, or OWNER/NAME on the hub, with safetensors; code that comes with it is not run.
        dtype: of the network; what follows its logits is float32.
        batch_size: images in a forward pass.
        shortest, longest: images are resized so that their shorter side has `shortest` pixels, unless their longer
            one would exceed `longest`.
        max_objects: pairs of mask and class that are kept of an image.

    Raises:
        ImportError, FileNotFoundError: transformers is not installed; there is no such checkpoint.
        ValueError: it is another kind of model, or one of other classes, or lacks weights.
    """

    class_names = CLASS_NAMES
    image_size = None

    def __init__(
        self,
        checkpoint: str = "facebook/mask2former-swin-small-coco-instance",
        dtype: str = "float32",
        batch_size: int = 8,
        shortest: int = 800,
        longest: int = 1333,
        max_objects: int = 100,
    ) -> None:
        try:
            from transformers import AutoConfig, Mask2FormerForUniversalSegmentation
        except ImportError as error:
            raise ImportError("Mask2FormerDetector needs transformers: pip install -e '.[geneval]'") from error
        folder = resolve(
            checkpoint,
            f"run `hf download {checkpoint} --local-dir FOLDER`, then set geneval.reward.detector.checkpoint=FOLDER, "
            f"and for colors {how_to_download('geneval.reward.colors', 'ViT-L-14-quickgelu', 'openai')}",
        )
        refuse_broken_folder(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if config.model_type != "mask2former":
            raise ValueError(f"detector {checkpoint!r} must be a mask2former model; it is a {config.model_type} model")
        if config.num_labels != len(CLASS_NAMES):
            classes = f"{config.num_labels} classes instead of the {len(CLASS_NAMES)} of COCO's instances"
            raise ValueError(f"detector {checkpoint!r} knows {classes}")
        load: Any = Mask2FormerForUniversalSegmentation.from_pretrained
        options = {"dtype": dtype, "trust_remote_code": False, "use_safetensors": True}
        self.model, loaded = load(folder, **options, output_loading_info=True)
        # Whatever is not in the file is random by now, and would find next to nothing without a word.
        if wrong := sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}):
            raise ValueError(f"detector {checkpoint!r} has no tensor {wrong[0]!r} of the right shape")
        self.model.eval().requires_grad_(False)
        self.name, self.batch_size, self.max_objects = checkpoint, batch_size, max_objects
        self.shortest, self.longest = shortest, longest

    def cache_key(self) -> dict[str, Any]:
        """The network, the sizes of its images, and how many objects are kept."""
        network = {"weights": fingerprint(self.model), "config": digest(published_key(self.model.config.to_dict()))}
        sizes = {"shortest": self.shortest, "longest": self.longest, "max_objects": self.max_objects}
        return {"class": class_name(self), **network, **sizes}

    def to(self, device: torch.device | str) -> Self:
        """Move the network."""
        self.model.to(device)
        return self

    def __call__(self, images: NDArray[np.uint8]) -> list[Detections]:
        """Detect the objects of each image, uint8 [B, H, W, 3]; in a box, x2 and y2 are the last pixel + 1."""
        parts = [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]
        return [found for part in parts for found in self._detect(part)]

    @torch.no_grad()
    def _detect(self, images: NDArray[np.uint8]) -> list[Detections]:
        inputs, inner = self._inputs(torch.from_numpy(images).to(self.model.device))
        output = self.model(pixel_values=inputs.to(self.model.dtype), output_auxiliary_logits=False)
        probs = output.class_queries_logits.float().softmax(-1)[..., :-1]  # the last class is "no object"
        rows = zip(probs, output.masks_queries_logits.float(), strict=True)
        upsample = partial(_upsampled, padded=inputs.shape[2:], inner=inner, size=images.shape[1:3])
        return [self._objects(prob, masks, upsample) for prob, masks in rows]

    def _inputs(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images [B, H, W, 3] -> what the network reads [B, 3, H', W'], and the size without the padding."""
        pixels = images.permute(0, 3, 1, 2).float()
        sides = pixels.shape[2:]
        scale = min(self.longest / max(sides), self.shortest / min(sides))
        height, width = (int(side * scale + 0.5) for side in sides)
        pixels = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False).round()
        pixels = F.pad(pixels, (0, -width % MULTIPLE, 0, -height % MULTIPLE), value=GREY)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, STD))
        return (pixels - mean) / std, (height, width)

    def _objects(self, probs: Tensor, masks: Tensor, upsample: Callable[[Tensor], Tensor]) -> Detections:
        """Class probabilities [Q, C] and mask logits [Q, h, w] of an image, upsampled to its size -> its objects."""
        scores, pairs = probs.flatten().topk(min(self.max_objects, probs.numel()))
        queries, of_query = (pairs // probs.shape[1]).unique(return_inverse=True)
        own = masks[queries]
        measured = [_measure(upsample(part)) for part in own.split(CHUNK)]
        sure, boxes = (torch.cat(parts) for parts in zip(*measured, strict=True))

        def pixels(indices: Any) -> NDArray[np.bool_]:
            return (upsample(own[of_query[list(indices)]]) > 0).cpu().numpy()

        classes = (pairs % probs.shape[1]).tolist()
        scores = scores * sure[of_query]
        names, boxes = [CLASS_NAMES[i] for i in classes], boxes[of_query]
        return Detections(names, scores.cpu().numpy(), boxes.cpu().numpy(), masks=pixels)


def _upsampled(masks: Tensor, padded: Sequence[int], inner: Sequence[int], size: Sequence[int]) -> Tensor:
    """Mask logits [N, h, w] of an input of size `padded`, `inner` without padding, at that of the image, [N, H, W]."""
    grown = F.interpolate(masks[:, None], list(padded), mode="bilinear", align_corners=False)
    cut = grown[..., : inner[0], : inner[1]]
    return F.interpolate(cut, list(size), mode="bilinear", align_corners=False)[:, 0]


def _measure(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Mask logits [N, H, W] -> how sure the mask is of its own pixels [N], and its box [N, 4]; 0 for empty masks."""
    inside = logits > 0
    sure = (logits.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)
    corners = []
    for along in (inside.any(1), inside.any(2)):  # columns, rows
        first = along.int().argmax(1)
        beyond = along.shape[1] - along.flip(1).int().argmax(1)
        corners.append(torch.stack([first, beyond], 1) * along.any(1, keepdim=True))
    (x1, x2), (y1, y2) = (pair.unbind(1) for pair in corners)
    return sure, torch.stack([x1, y1, x2, y2], 1).float()
