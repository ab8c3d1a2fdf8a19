"""GenEval's rules as a reward: detect the objects of an image, then apply the rules."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol, Self, get_args

import numpy as np
import torch
from torch import Tensor

from lightning_modules.cache_key import class_name, fields_key
from lightning_modules.rewards.color import CLIPColors, LazyColors, name_colors
from lightning_modules.rewards.geneval_rules import Detections, GenEvalRules, Verdict
from lightning_modules.rewards.self_test import SelfTest
from lightning_modules.rewards.stored_detections import StoredDetections
from lightning_modules.rewards.verifier import Reward

Images = Sequence[np.ndarray] | np.ndarray
Kind = Literal["correct", "strict", "clauses"]


class Detector(Protocol):
    """Finds objects in images, uint8 [B, H, W, 3]; its `cache_key` is that of its detections."""

    class_names: tuple[str, ...]  # in the order in which results list them
    image_size: int | None  # pixels along each side that images must have; None for any
    name: str  # what reports call it

    def cache_key(self) -> dict[str, Any]: ...

    def to(self, device: torch.device | str) -> Self: ...

    def __call__(self, images: np.ndarray) -> list[Detections]: ...


def to_uint8(pixels: Tensor) -> np.ndarray:
    """Pixels [B, 3, H, W] in [0, 1] -> uint8 [B, H, W, 3]; truncated, as Show-o's scripts do."""
    return (pixels * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def by_size(images: Images) -> list[list[int]]:
    """Indices of images of one size each, uint8 [H, W, 3]: these can be detected together."""
    sizes: dict[tuple[int, ...], list[int]] = {}
    for i, image in enumerate(images):
        sizes.setdefault(image.shape, []).append(i)
    return list(sizes.values())


class GenEvalReward(Reward):
    """The verdict of GenEval's rules on an image, as a reward.

    Args:
        detector: finds the objects; its classes are the ones that prompts may name.
        colors: names the colours of objects; None where the detector does.
        self_test: a known picture to judge before all others; None skips it.
        options: of `GenEvalRules`.
        kind: the reward: `correct`, 1 or 0; `strict`, the same with exact counts; `clauses`, `Verdict.share`.
    """

    def __init__(
        self,
        detector: Detector | StoredDetections,
        colors: CLIPColors | None = None,
        self_test: SelfTest | None = None,
        options: Mapping[str, Any] | None = None,
        kind: Kind = "correct",
    ) -> None:
        if kind not in get_args(Kind):
            raise ValueError(f"a GenEval reward is one of {', '.join(get_args(Kind))}, not {kind!r}")
        self.detector, self.colors, self.self_test = detector, colors, self_test
        self.rules = GenEvalRules.with_options(detector.class_names, options or {})
        self.kind = kind

    def cache_key(self) -> dict[str, Any]:
        """The key of verdicts, and which of their numbers is the reward."""
        return {"class": class_name(self), "kind": self.kind, **self.verdict_key()}

    def verdict_key(self) -> dict[str, Any]:
        """The key of verdicts: the detector, the colour model, the rules. The self-test only refuses."""
        return {
            "detector": self.detector.cache_key(),
            "colors": self.colors and self.colors.cache_key(),
            "rules": fields_key(self.rules),
        }

    @property
    def judged_by(self) -> dict[str, Any]:
        """The key of verdicts for reports: with the names of models, and without options at their official values."""
        key = self.verdict_key()
        official = fields_key(GenEvalRules(self.detector.class_names))
        return {
            "detector": {"name": self.detector.name, **key["detector"]},
            "colors": self.colors and {"name": self.colors.name, **key["colors"]},
            "options": {name: value for name, value in key["rules"].items() if value != official[name]},
        }

    def kinds(self) -> dict[str, "GenEvalReward"]:
        """This reward as `geneval`, and its other kinds by name, all with the same detector."""
        others = {kind: copy.copy(self) for kind in get_args(Kind) if kind != "correct"}
        for kind, other in others.items():
            other.kind = kind
        return {"geneval": self, **others}

    def prepare(self, device: torch.device | str) -> None:
        """Move to a device, and judge the known picture there; raises ValueError if it is misjudged."""
        self.detector.to(device)
        if self.colors is not None:
            self.colors.to(device)
        self._test()

    def _test(self) -> None:
        if self.self_test is not None:
            self.self_test.check(self.verdicts, self.detector.class_names)

    def detect(self, images: Images, files: Sequence[str] | None = None) -> list[Detections]:
        """Find the objects of B images, uint8 [H, W, 3]; `files` are their names, for detections made elsewhere.

        Raises:
            ValueError: the detector fails its self-test, which comes first.
        """
        self._test()
        if isinstance(self.detector, StoredDetections):
            found = self.detector.of(files)
        else:
            of_image: dict[int, Detections] = {}
            for indices in by_size(images):
                of_image |= dict(zip(indices, self.detector(np.stack([images[i] for i in indices])), strict=True))
            found = [of_image[i] for i in range(len(images))]
        if self.colors is None:
            return found
        pairs = zip(images, found, strict=True)
        return [replace(each, colors=LazyColors(self.colors, image, each)) for image, each in pairs]

    def verdicts(
        self, prompts: Sequence[Mapping[str, Any]], images: Images, files: Sequence[str] | None = None
    ) -> list[Verdict]:
        """GenEval metadata of B prompts and uint8 images [H, W, 3] -> what the rules say of each; see `detect`."""
        return self.judge(prompts, self.detect(images, files))

    def judge(self, prompts: Sequence[Mapping[str, Any]], found: Sequence[Detections]) -> list[Verdict]:
        """Apply the rules to the detections of images; colours that take a network are named in one pass.

        Raises:
            ValueError: a prompt has no `tag`.
        """
        if (bare := next((row for row in prompts if "tag" not in row), None)) is not None:
            raise ValueError(f"GenEval cannot judge the prompt {bare.get('prompt')!r}: it has no tag and no include")
        pairs = list(zip(prompts, found, strict=True))
        lazy = [(each.colors, row, each) for row, each in pairs if isinstance(each.colors, LazyColors)]
        name_colors([(colors, self.rules.colors_asked(row, each)) for colors, row, each in lazy])
        return [self.rules.evaluate(row, detections) for row, detections in pairs]

    def __call__(self, prompts: Sequence[Mapping[str, Any]], pixels: Tensor) -> Tensor:
        return self.of_verdicts(self.verdicts(prompts, to_uint8(pixels))).to(pixels.device)

    def of_verdicts(self, verdicts: Sequence[Verdict]) -> Tensor:
        """Return the reward of each of B verdicts, [B], on the CPU."""
        values = [verdict.share if self.kind == "clauses" else getattr(verdict, self.kind) for verdict in verdicts]
        return torch.tensor(values, dtype=torch.float32)
