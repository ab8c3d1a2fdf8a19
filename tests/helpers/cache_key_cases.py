"""What decides the results of each class, for `test_identity`: things that differ in it, and things that do not."""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import nn

from datamodules.pairs import PairRule
from datamodules.photographs import Photographs
from datamodules.shapes.detector import ShapesDetector
from datamodules.shapes.prompts import vocabulary
from datamodules.shapes.scenes import ShapesStream
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.diffusion import DiffusionDecoder
from lightning_modules.backbone.emu3 import Emu3
from lightning_modules.backbone.flow import FlowDecoder
from lightning_modules.backbone.janus import Janus
from lightning_modules.backbone.janus_text import JanusTokenizer
from lightning_modules.backbone.llamagen import LlamaGen
from lightning_modules.backbone.mask_likelihood import MaskEstimate
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.mask_token import MaskTokenDecoder
from lightning_modules.backbone.pipelines.decoder import PipelineDecoder
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.backbone.showo import ShowO
from lightning_modules.backbone.t5 import T5Text
from lightning_modules.backbone.text import PublishedTokenizer, WordTokenizer
from lightning_modules.backbone.tiny_pipeline import save_tiny_sd3
from lightning_modules.backbone.tiny_t5 import save_tiny_t5
from lightning_modules.backbone.tiny_text_tokenizer import save_tiny_text_tokenizer
from lightning_modules.decoding.beam import Beam
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.particles import Particles
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.pruning import Pruning
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import PatchCLIPScore, RandomScores, Region, TokenConfidence, ValueGain
from lightning_modules.decoding.remembered import Remembered
from lightning_modules.decoding.rollover import Rollover
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.verified import Verified
from lightning_modules.rewards.clip_score import CLIPScore
from lightning_modules.rewards.color import CLIPColors
from lightning_modules.rewards.fid import FID, CLIPFeatures
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.mask2former import Mask2FormerDetector
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.self_test import SelfTest
from lightning_modules.rewards.stored_detections import StoredDetections
from lightning_modules.rewards.tiny_geneval import save_tiny_clip, save_tiny_mask2former
from lightning_modules.rewards.tiny_judge import save_tiny_judge
from lightning_modules.rewards.verifier import Likelihood
from lightning_modules.rewards.vision_language import Questions, VisionLanguageJudge
from tests.helpers.emu3 import load_emu3
from tests.helpers.janus import SPECIAL, make_janus
from tests.helpers.llamagen import make_llamagen
from tests.helpers.models import make_clip, make_decoder, make_flow, make_masked, make_parm, make_showo, write_tokenizer
from tests.helpers.overrides import WITHOUT

NOISE = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ROWS = [{"prompt": "a photo of a star"}, {"prompt": "a photo of a ring"}]
SAMPLING = Sampling(temperature=0.5)
PLAIN = Sample(SAMPLING)


@dataclass(frozen=True)
class Case:
    """A thing, others that give other results, some that give the same, and a way to use the thing."""

    thing: Any
    others: Mapping[str, Any]
    same: Mapping[str, Any] = field(default_factory=dict)
    use: Callable[[], Any] = bool


CASES: dict[type, Callable[[Path], Case]] = {}


def case(kind: type) -> Callable[[Callable[[Path], Case]], Callable[[Path], Case]]:
    def add(make: Callable[[Path], Case]) -> Callable[[Path], Case]:
        CASES[kind] = make
        return make

    return add


def by_fields(thing: Any, free: Mapping[str, Any] | None = None, **others: Any) -> None:
    """A case of a dataclass: another value of every field that decides results, and of every one that does not."""
    free = free or {}
    assert {entry.name for entry in fields(thing)} == {*others, *free}, type(thing)
    changed, same = ({name: replace(thing, **{name: value}) for name, value in each.items()} for each in (others, free))
    CASES[type(thing)] = lambda _: Case(thing, changed, same | {"made twice": copy.deepcopy(thing)})


hotter = Sampling(temperature=1)
by_fields(SAMPLING, temperature=1.0, top_k=5, top_p=0.5, guidance=1.0, guided_tokens=3)
by_fields(MaskSampling(), steps=4, guidance=1.0, temperature=0.0, score_remasked=True)
by_fields(PLAIN, sampling=hotter)
by_fields(Verified(SAMPLING, 4), sampling=hotter, k=2, stride=2, verifier="likelihood", distinct=True, choose="sample",
          value_weight=2.0, prior_weight=1.0, random_stop=True)  # fmt: skip
by_fields(Beam(SAMPLING, 2, 3), sampling=hotter, n=3, k=2, verifier="likelihood", prior_weight=1.0)
by_fields(Rollover(SAMPLING, 4), sampling=hotter, k=2, verifier="likelihood")
by_fields(Particles(SAMPLING, 4), sampling=hotter, n=2, stride=4, verifier="likelihood", value_weight=2.0)
by_fields(Pruning(SAMPLING, 4, 0.5), sampling=hotter, n=2, share=0.25, stride=4, verifier="likelihood")
by_fields(Potential(MaskSampling(), 4, "a"), sampling=MaskSampling(4), n=2, judge="b", prune=False, stride=2,
          reset_temperature=False)  # fmt: skip
by_fields(BestOfN(PLAIN, 2, "parm"), strategy=Sample(hotter), n=3, judge="clip")
by_fields(Remembered(PLAIN), strategy=Sample(hotter), free={"_made": {"one": Remembered}})
by_fields(Reflection(PLAIN, PLAIN, Region(ValueGain(), 0.5), 2),
          strategy=Sample(hotter), redecoder=Verified(SAMPLING, 2),
          region_selector=Region(RandomScores(), 0.5), rounds=3, judge="clip", stop_score=-0.05, accept="always",
          epsilon=0.5, critique_template="{prompt}, {critique}")  # fmt: skip
by_fields(Region(RandomScores(), threshold=0.5), scorer=TokenConfidence(), threshold=0.25, patches=4, rewind=True,
          free={"quantile": None})  # fmt: skip
by_fields(PatchCLIPScore(4), patches=2, judge="other")
by_fields(ValueGain(), verifier="likelihood", patches=2)
by_fields(TokenConfidence())
by_fields(RandomScores())
by_fields(PairRule(), per_prompt=None, min_margin=0.5, surplus_penalty=0.5, weigh_margins=True, max_weight=2.0)
by_fields(ShapesDetector(), free={"batch_size": 3})
by_fields(ShapesStream(), split="test", seed=1, vagueness={"colors": 0.5}, relations=["above"],
          task_weights=dict(reversed(ShapesStream().task_weights.items())))  # fmt: skip


def another_weight(module: Any) -> Any:
    """A copy of a network one of whose numbers is another by a little."""
    other = copy.deepcopy(module)
    with torch.no_grad():
        next(other.parameters()).flatten()[0].add_(1e-3)
    return other


@case(CompactDecoder)
def _(_: Path) -> Case:
    decoder = make_decoder()
    words = copy.deepcopy(decoder)
    words.text_tokenizer = WordTokenizer(list(reversed(vocabulary())), 12)
    depths, heads, eps = copy.deepcopy(decoder), copy.deepcopy(decoder), copy.deepcopy(decoder)
    depths.feature_layers = (2, 3)
    heads.transformer.config = replace(heads.transformer.config, heads=2)
    eps.norm.eps = 1e-3
    memory = copy.deepcopy(decoder)
    memory.transformer.config = replace(decoder.transformer.config, checkpointing=True)
    others = {
        "weights": another_weight(decoder), "words": words, "depths": depths, "heads": heads, "eps": eps,
        "precision": copy.deepcopy(decoder).bfloat16(), "tokenizer": copy.deepcopy(decoder),
    }  # fmt: skip
    others["tokenizer"].image_tokenizer = another_weight(decoder.image_tokenizer)
    prompts = [row["prompt"] for row in ROWS]
    same = {"made twice": make_decoder(), "memory": memory, "frozen": make_decoder().requires_grad_(False)}
    return Case(
        decoder, others, same,
        lambda: decoder.train().eval().features(prompts, torch.zeros(2, 16, dtype=torch.int64)),
    )  # fmt: skip


@case(FlowDecoder)
def _(_: Path) -> Case:
    decoder, times, words, depths = (make_flow() for _ in range(4))
    times.time_mean = 0.0
    words.text_tokenizer = WordTokenizer(list(reversed(vocabulary())), 12)
    depths.feature_layers = (1,)
    return Case(decoder, {"weights": another_weight(decoder), "times": times, "words": words, "depths": depths})


@case(MaskTokenDecoder)
def _(_: Path) -> Case:
    decoder, dims, words, depths = (make_masked() for _ in range(4))
    dims.rotary_dims = 2
    words.text_tokenizer = WordTokenizer(list(reversed(vocabulary())), 12)
    depths.feature_layers = (2, 3)
    others = {"weights": another_weight(decoder), "rotary": dims, "words": words, "depths": depths}
    return Case(decoder, others, {"estimate": make_masked(MaskEstimate(n_masks=8))})


@case(ShowO)
def _(tmp_path: Path) -> Case:
    text = PublishedTokenizer(write_tokenizer(tmp_path, ["<|endoftext|>", "a", "photo"]))

    def showo(**sizes: Any) -> ShowO:
        torch.manual_seed(0)
        decoder = make_showo(**sizes)
        decoder.image_tokenizer = nn.Module()  # type: ignore[assignment]
        decoder.text_tokenizer = text
        return decoder

    decoder = showo()
    return Case(
        decoder,
        {"weights": another_weight(decoder), "rotary": showo(rotary_dims=2), "longer": showo(max_text=5)},
        {"made twice": showo(), "memory": showo(checkpointing=True), "compiled": showo(compiled=True)},
    )


@case(Janus)
def _(_: Path) -> Case:
    def janus(**options: Any) -> Janus:
        torch.manual_seed(0)
        decoder = make_janus(**options)
        decoder.image_tokenizer = nn.Module()  # type: ignore[assignment]
        return decoder

    decoder, base = janus(), janus()
    base.rotary_base = 500.0
    others = {"weights": another_weight(decoder), "rotary": base, "depths": janus(feature_layers=[1])}
    same = {"made twice": janus(), "memory": janus(checkpointing=True), "compiled": janus(compiled=True)}
    return Case(decoder, others, same)


@case(JanusTokenizer)
def _(tmp_path: Path) -> Case:
    folder, other = (save_tiny_text_tokenizer(f"{tmp_path}/{i}", SPECIAL[: 3 + i]) for i in (1, 2))
    moved = shutil.copytree(folder, tmp_path / "moved")
    others = {
        "tokenizer": JanusTokenizer(other),
        "template": JanusTokenizer(folder, "janus"),
        "longest": JanusTokenizer(folder, max_text=9),
    }
    return Case(JanusTokenizer(folder), others, {"moved": JanusTokenizer(str(moved))})


@case(Emu3)
def _(tmp_path: Path) -> Case:
    def emu3(**options: Any) -> Emu3:
        torch.manual_seed(0)
        decoder = load_emu3(tmp_path, **options)
        decoder.image_tokenizer = nn.Module()  # type: ignore[assignment]
        return decoder

    decoder = emu3()
    others = {
        "weights": another_weight(decoder),
        "rotary": emu3(rotary_base=500.0),
        "negative prompt": emu3(negative_prompt="drawn"),
        "depths": emu3(feature_layers=[1]),
    }
    return Case(decoder, others, {"made twice": emu3(), "compiled": emu3(compiled=True)})


@case(T5Text)
def _(tmp_path: Path) -> Case:
    folder, moved, wider = save_tiny_t5(f"{tmp_path}/a"), tmp_path / "b", save_tiny_t5(f"{tmp_path}/c", width=32)
    shutil.copytree(folder, moved)

    def text(checkpoint: str = folder, width: int = 24, dtype: Any = "float32", **settings: Any) -> T5Text:
        return T5Text(checkpoint, width, dtype=dtype, **settings)

    first, others = text(), {"network": text(wider, 32), "cut": text(max_tokens=9), "precision": text(dtype="bfloat16")}
    device = torch.device("cpu")
    return Case(first, others, {"moved": text(str(moved))}, lambda: first.features(["a dog"], device))


@case(LlamaGen)
def _(tmp_path: Path) -> Case:
    text, cut = (T5Text(save_tiny_t5(f"{tmp_path}/t5"), 24, most, "float32") for most in (12, 9))

    def llamagen(text: T5Text = text, **more: Any) -> LlamaGen:
        torch.manual_seed(0)
        decoder = make_llamagen(text, **more)
        decoder.image_tokenizer = nn.Module()  # type: ignore[assignment]
        return decoder

    decoder = llamagen()
    others = {"weights": another_weight(decoder), "text": llamagen(cut), "depths": llamagen(feature_layers=[1])}
    same = {"made twice": llamagen(), "memory": llamagen(checkpointing=True), "compiled": llamagen(compiled=True)}
    return Case(decoder, others, same)


@case(DiffusionDecoder)
def _(tmp_path: Path) -> Case:
    checkpoint, moved, other = save_tiny_sd3(f"{tmp_path}/a"), tmp_path / "b", tmp_path / "c"
    shutil.copytree(checkpoint, moved)
    shutil.copytree(checkpoint, other)
    scheduler = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | {"shift": 3.0}))
    decoder = DiffusionDecoder(checkpoint, "float32", WITHOUT)
    others = {
        "precision": DiffusionDecoder(checkpoint, "bfloat16", WITHOUT),
        "scheduler": DiffusionDecoder(str(other), "float32", WITHOUT),
        "weights": DiffusionDecoder(checkpoint, "float32", WITHOUT),
    }
    with torch.no_grad():
        next(others["weights"].parameters()).add_(1)
    return Case(decoder, others, {"moved": DiffusionDecoder(str(moved), "float32", WITHOUT)})


@case(PipelineDecoder)
def _(tmp_path: Path) -> Case:
    checkpoint, moved, other = save_tiny_sd3(f"{tmp_path}/a"), tmp_path / "b", tmp_path / "c"
    shutil.copytree(checkpoint, moved)
    shutil.copytree(checkpoint, other)
    scheduler = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | {"shift": 3.0}))
    decoder = PipelineDecoder(checkpoint, 32, "float32", WITHOUT)
    others = {
        "size": PipelineDecoder(checkpoint, 64, "float32", WITHOUT),
        "precision": PipelineDecoder(checkpoint, 32, "bfloat16", WITHOUT),
        "scheduler": PipelineDecoder(str(other), 32, "float32", WITHOUT),
        "weights": PipelineDecoder(checkpoint, 32, "float32", WITHOUT),
        "autoencoder": PipelineDecoder(checkpoint, 32, "float32", WITHOUT),
    }
    with torch.no_grad():
        next(others["weights"].networks.parameters()).add_(1)
        next(others["autoencoder"].image_tokenizer.parameters()).add_(1)
    return Case(decoder, others, {"moved": PipelineDecoder(str(moved), 32, "float32", WITHOUT)})


@case(WordTokenizer)
def _(_: Path) -> Case:
    return Case(
        WordTokenizer(["a", "b"], 3),
        {"order": WordTokenizer(["b", "a"], 3), "length": WordTokenizer(["a", "b"], 4)},
        {"made twice": WordTokenizer(("a", "b"), 3)},
    )


@case(PublishedTokenizer)
def _(tmp_path: Path) -> Case:
    folders = [tmp_path / name for name in "abc"]
    for folder, words in zip(folders, (["<|endoftext|>", "a", "b"],) * 2 + (["<|endoftext|>", "b", "a"],), strict=True):
        folder.mkdir()
        write_tokenizer(folder, words)
    first, moved, other = (PublishedTokenizer(str(folder)) for folder in folders)
    others = {
        "words": other,
        "end": PublishedTokenizer(str(folders[0]), end_of_text="a"),
        "longest": PublishedTokenizer(str(folders[0]), max_text=9),
    }
    return Case(first, others, {"moved": moved}, lambda: first.encode(["a b"]))


@case(Likelihood)
def _(_: Path) -> Case:
    return Case(Likelihood(), {}, {"made twice": Likelihood()})


@case(PARM)
def _(_: Path) -> Case:
    decoder = make_decoder()
    parm = make_parm(decoder)
    heads = copy.deepcopy(parm)
    heads.transformer.config = replace(heads.transformer.config, heads=2)
    others = {"weights": another_weight(parm), "input_features": make_parm(decoder, "embeddings"), "heads": heads}
    features = decoder.features([row["prompt"] for row in ROWS], torch.zeros(2, 16, dtype=torch.int64))
    return Case(parm, others, {"made twice": make_parm(decoder)}, lambda: parm.values(features, [16]))


def with_preprocessing(**changes: Any) -> nn.Module:
    clip = make_clip()
    clip.visual.preprocess_cfg = changes  # type: ignore[union-attr, assignment]
    return clip


@case(CLIPScore)
def _(tmp_path: Path) -> Case:
    words = WordTokenizer(vocabulary(), 12)

    def score(clip: nn.Module, tokenizer: Any = words, **settings: Any) -> CLIPScore:
        return CLIPScore(clip, tokenizer, **settings)

    first = score(make_clip())
    published = open_clip.get_tokenizer(save_tiny_clip(f"{tmp_path}/clip"))
    longer, cleaned = (
        open_clip.SimpleTokenizer(**more) for more in ({"context_length": 50}, {"clean": "canonicalize"})
    )
    others = {
        "weights": score(another_weight(make_clip())),
        "activation": score(make_clip(activation=True)),
        "heads": score(make_clip(head_width=8)),
        "precision": score(make_clip().half()),
        "mean": score(with_preprocessing(size=(64, 64), mean=(0.5, 0.5, 0.5))),
        "size": score(with_preprocessing(size=(32, 32))),
        "words": score(make_clip(), WordTokenizer(list(reversed(vocabulary())), 12)),
        "open_clip's words": score(make_clip(), published),
        "their number": score(make_clip(), longer),
        "their cleaning": score(make_clip(), cleaned),
    }
    same = {"batches": score(make_clip(), batch_size=3), "training": score(make_clip().train())}
    return Case(first, others, same, lambda: first(ROWS, NOISE))


@case(CLIPFeatures)
def _(_: Path) -> Case:
    first = CLIPFeatures(make_clip())
    others = {
        "weights": CLIPFeatures(another_weight(make_clip())),
        "mean": CLIPFeatures(with_preprocessing(size=(64, 64), mean=(0.5, 0.5, 0.5))),
    }
    return Case(first, others, {"made twice": CLIPFeatures(make_clip())}, lambda: first(NOISE))


@case(FID)
def _(_: Path) -> Case:
    def fid(seed: int = 0, count: int = 4, clip: nn.Module | None = None, **more: Any) -> FID:
        return FID(ShapesStream(seed=seed), count, CLIPFeatures(clip or make_clip()), **more)

    first = fid()
    features = fid(clip=another_weight(make_clip()))
    others = {"references": fid(seed=1), "count": fid(count=5), "features": features}
    return Case(first, others, {"batches": fid(batch_size=2)}, lambda: first.start("cpu", 0, 1))


@case(Photographs)
def _(tmp_path: Path) -> Case:
    images = [Image.fromarray((255 * NOISE[i].permute(1, 2, 0)).byte().numpy()) for i in range(2)]
    for name, order in (("a", (0, 1)), ("moved", (0, 1)), ("reordered", (1, 0)), ("other", (0, 0))):
        (tmp_path / name).mkdir()
        for file, i in zip(("1.png", "2.png"), order, strict=True):
            images[i].save(tmp_path / name / file)
    first = Photographs(str(tmp_path / "a"), 32)
    others = {
        "size": Photographs(str(tmp_path / "a"), 16),
        **{name: Photographs(str(tmp_path / name), 32) for name in ("reordered", "other")},
    }
    return Case(first, others, {"moved": Photographs(str(tmp_path / "moved"), 32)}, lambda: first[0])


@case(CLIPColors)
def _(tmp_path: Path) -> Case:
    first, moved, other = (save_tiny_clip(f"{tmp_path}/{name}") for name in "abc")
    config = json.loads((tmp_path / "c" / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"] = [0.1, 0.1, 0.1]
    (tmp_path / "c" / "open_clip_config.json").write_text(json.dumps(config))

    def colors(model: str = first, **settings: Any) -> CLIPColors:
        return CLIPColors(model, pretrained=None, **settings)

    weights, used = colors(), colors()
    weights.clip = another_weight(weights.clip)
    others = {
        "preprocessing": colors(other), "weights": weights, "background": colors(background="#000"),
        "whole": colors(to_box=False),
    }  # fmt: skip
    same = {"moved": colors(moved), "batches": colors(batch_size=3), "placed": colors().to("cpu")}
    return Case(used, others, same, lambda: used([Image.new("RGB", (9, 9))], ["cup"]))


@case(Mask2FormerDetector)
def _(tmp_path: Path) -> Case:
    checkpoint = save_tiny_mask2former(f"{tmp_path}/a")
    shutil.copytree(checkpoint, tmp_path / "moved")
    shutil.copytree(checkpoint, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["backbone_config"]["hidden_act"] = "relu"
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))

    def detector(name: str = "a", **settings: Any) -> Mask2FormerDetector:
        return Mask2FormerDetector(str(tmp_path / name), **{"shortest": 64, "longest": 96} | settings)

    first, weights = detector(), detector()
    weights.model = another_weight(weights.model)
    others = {
        "weights": weights, "activation": detector("other"), "precision": detector(dtype="bfloat16"),
        "shortest": detector(shortest=32), "longest": detector(longest=80), "objects": detector(max_objects=3),
    }  # fmt: skip
    same = {"moved": detector("moved"), "batches": detector(batch_size=1), "placed": detector().to("cpu")}
    return Case(first, others, same, lambda: first(np.zeros((1, 50, 70, 3), np.uint8)))


@case(StoredDetections)
def _(tmp_path: Path) -> Case:
    def stored(name: str, score: float = 0.9, classes: tuple[str, ...] = ("star", "ring")) -> StoredDetections:
        row = {
            "filename": "00000/samples/0000.png",
            "detections": [{"class": "star", "score": score, "bbox": [0, 0, 9, 9]}],
        }
        (tmp_path / name).write_text(json.dumps(row))
        return StoredDetections(str(tmp_path / name), classes)

    first = stored("a.jsonl")
    others = {"score": stored("b.jsonl", 0.8), "classes": stored("c.jsonl", classes=("ring", "star"))}
    return Case(first, others, {"moved": stored("d.jsonl")}, lambda: first.of(["x/00000/samples/0000.png"]))


@case(GenEvalReward)
def _(tmp_path: Path) -> Case:
    detections = tmp_path / "a.jsonl"
    detections.write_text('{"filename": "00000/samples/0000.png", "detections": []}')
    first = GenEvalReward(ShapesDetector())
    others = {
        "kind": GenEvalReward(ShapesDetector(), kind="strict"),
        "rules": GenEvalReward(ShapesDetector(), options={"threshold": 0.1}),
        "detector": GenEvalReward(StoredDetections(str(detections), ShapesDetector.class_names)),
        "colors": GenEvalReward(ShapesDetector(), CLIPColors(save_tiny_clip(f"{tmp_path}/clip"), None)),
    }
    same = {
        "official rules": GenEvalReward(ShapesDetector(), options={"threshold": 0.3}),
        "batches": GenEvalReward(ShapesDetector(3)),
        "tested": GenEvalReward(ShapesDetector(), self_test=SelfTest("bundled:shapes_self_test")),
    }
    return Case(first, others, same, lambda: first.detect([np.zeros((64, 64, 3), np.uint8)]))


@case(VisionLanguageJudge)
def _(tmp_path: Path) -> Case:
    save_tiny_judge(str(tmp_path / "a"))
    for name in ("moved", "template", "mean"):
        shutil.copytree(tmp_path / "a", tmp_path / name)
    template = tmp_path / "template" / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant", "Assistant"))
    (processor,) = (path for path in (tmp_path / "mean").glob("*processor*.json") if "image_mean" in path.read_text())
    processor.write_text(processor.read_text().replace("0.48145466", "0.5"))

    def judge(name: str = "a", **settings: Any) -> VisionLanguageJudge:
        return VisionLanguageJudge(str(tmp_path / name), **{"dtype": "float32"} | settings)

    first, weights = judge(), judge()
    weights.model = another_weight(weights.model)
    asked = {entry.name: Questions(**{entry.name: "What of {prompt}?"}) for entry in fields(Questions)}
    others = {
        **{f"question {name}": judge(questions=questions) for name, questions in asked.items()},
        "yes": judge(yes="no", no="yes"), "critique": judge(critique_tokens=3), "precision": judge(dtype="bfloat16"),
        "weights": weights, "template": judge("template"), "mean": judge("mean"),
    }  # fmt: skip
    same = {"moved": judge("moved"), "batches": judge(batch_size=1)}
    return Case(first, others, same, lambda: (first(ROWS, NOISE), first.critique(["a star"] * 2, NOISE)))
