"""The Evaluator by itself: no Trainer, no config."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException

from datamodules.shapes.detector import ShapesDetector
from lightning_modules.backbone.compact import CompactDecoder
from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.backbone.diffusion import DiffusionSampling
from lightning_modules.backbone.mask_sampling import MaskSampling
from lightning_modules.backbone.sampling import Sampling
from lightning_modules.decoding.best_of_n import BestOfN
from lightning_modules.decoding.potential import Potential
from lightning_modules.decoding.reflection import Reflection
from lightning_modules.decoding.regions import PatchCLIPScore, RandomScores, Region
from lightning_modules.decoding.sample import Sample
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy
from lightning_modules.evaluator import Evaluation, Evaluator
from lightning_modules.report.results import BEFORE_TRAINING, EvaluationResult
from lightning_modules.rewards.geneval_metadata import CLASS_NAMES
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.registry import JudgeRegistry
from tests.helpers.evaluators import make_evaluator
from tests.helpers.models import make_parm

PLAIN = Sample(Sampling())


@pytest.fixture
def evaluator(decoder: CompactDecoder, tmp_path: Path) -> Evaluator:
    strategies = {"sample": PLAIN, "best": BestOfN(PLAIN, 2, "parm"), "oracle": BestOfN(PLAIN, 2, "clauses")}
    return make_evaluator(
        GenEvalReward(ShapesDetector()), {}, decoder, make_parm(decoder), strategies=strategies,
        images_per_prompt=2, batch_size=5,
        independent_judges=["parm"], unfinished=str(tmp_path),
    )  # fmt: skip


@pytest.fixture
def evaluation(decoder: CompactDecoder, rows: list) -> Evaluation:
    return Evaluation(decoder, torch.device("cpu"), rows[:4], ["sample", "best", "oracle"], {})


def rows_of(result: EvaluationResult) -> dict[str, list[dict[str, Any]]]:
    return {name: strategy.rows for name, strategy in result.strategies.items()}


def test_every_strategy_decodes_every_prompt(evaluator: Evaluator, evaluation: Evaluation) -> None:
    evaluator.prepare(evaluation)
    result = evaluator.evaluate(evaluation)
    assert list(result.strategies) == ["sample", "best", "oracle"]
    for name, found in result.strategies.items():
        assert [row["prompt"] for row in found.rows] == [row["prompt"] for row in evaluation.prompts for _ in range(2)]
        assert list(found.independent) == ([] if name == "best" else ["parm"])  # what chooses is not independent
        assert list(found.thumbnails) == list(found.traces) == [0, 1, 2, 3]
        assert list(found.traces[0].scores) == ["parm", "clauses"]
    sample, best = result.strategies["sample"], result.strategies["best"]
    assert best.decoder_passes == 2 * sample.decoder_passes and best.verifier_calls == 2
    assert result.settings["prompts"] == 4 and result.settings["images_per_prompt"] == 2
    assert result.warnings == ["oracle chooses by what it is measured by: it is a ceiling"]
    assert "val/geneval/best" in result.scores("val") and f"val/geneval/best/{best.rows[0]['tag']}" in result.scores(
        "val"
    )
    evaluator.batch_size = 3
    assert rows_of(evaluator.evaluate(evaluation)) == rows_of(result)


def test_what_training_has_added_is_shown_by_the_verifier_as_it_was(
    evaluator: Evaluator, evaluation: Evaluation, decoder: CompactDecoder
) -> None:
    untrained = evaluator.judges.copy_trained()
    assert list(untrained) == ["parm"] and untrained["parm"] is not evaluator.judges["parm"]
    result = evaluator.evaluate(replace(evaluation, untrained=untrained))
    assert list(result.strategies) == ["sample", "best" + BEFORE_TRAINING, "best", "oracle"]
    assert result.strategies["best" + BEFORE_TRAINING].rows == result.strategies["best"].rows  # the copy says the same


def test_a_judge_that_is_trained_is_not_independent(evaluator: Evaluator, decoder: CompactDecoder) -> None:
    refuse = partial(evaluator.refuse_unfit_strategies, decoder)
    refuse()
    with pytest.raises(ValueError, match=r"^evaluator\.independent_judges: 'parm' is trained$"):
        refuse(training=True)
    evaluator.independent_judges = ["clauses"]
    refuse(training=True)
    evaluator.judges.teachers.add("clauses")
    with pytest.raises(ValueError, match="'clauses' decides what is trained on"):
        refuse(training=True)


def test_an_evaluation_that_stops_resumes_where_it_was(
    evaluator: Evaluator, evaluation: Evaluation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = rows_of(evaluator.evaluate(evaluation))
    asked = iter([False, False, True])
    with pytest.raises(SIGTERMException), evaluator.resumed(evaluation, lambda: next(asked)):
        pass
    kept = sorted(tmp_path.glob("unfinished-*/*.pt"))
    assert len(kept) == 2 and "The evaluation stops; the same command resumes it" in capsys.readouterr().out
    kept[0].write_bytes(b"broken")  # is made again, as is what a file of another kind holds
    torch.save({}, kept[1])
    with evaluator.resumed(evaluation, bool) as result:
        assert rows_of(result) == whole
    assert "The evaluation resumes; batches decoded and judged before: 2" in capsys.readouterr().out
    assert not list(tmp_path.glob("*"))


def test_what_is_not_the_official_evaluation_is_said() -> None:
    sample = Sample(DiffusionSampling(steps=1, guidance=1.0, size=64))
    strategies = {"sample": sample, "best": BestOfN(sample, n=2, judge="clauses")}
    decoder: Any = torch.nn.Module()

    def warnings(class_names: tuple[str, ...]) -> Any:
        kinds: Any = {"geneval": None, "strict": None, "clauses": None}
        detector = SimpleNamespace(class_names=class_names)
        geneval: Any = SimpleNamespace(detector=detector, kinds=lambda: kinds, judged_by={})
        evaluator = make_evaluator(geneval, {}, strategies=strategies, images_per_prompt=2)
        return evaluator.evaluate(Evaluation(decoder, torch.device("cpu"), [], [], {})).warnings

    assert warnings(("star",)) == []
    assert warnings(CLASS_NAMES)[:2] == [
        "2 images of each prompt instead of the official 4",
        "not the official prompt set: 0 of 80 single_object prompts",
    ]


def test_each_name_means_one_judge() -> None:
    with pytest.raises(ValueError, match=r"judges: there are two called 'geneval': give the one in judges\.rewards"):
        JudgeRegistry(GenEvalReward(ShapesDetector()), {"geneval": GenEvalReward(ShapesDetector())})
    with pytest.raises(ValueError, match=r"judges\.rewards\.clip is no judge, but a dict"):
        JudgeRegistry(None, {"clip": {}})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"judges\.geneval is null"):
        JudgeRegistry(None, {}).geneval  # noqa: B018


@dataclass(frozen=True)
class InFullPrecision(Strategy):
    judge_names = ()
    images_at_once = 1

    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        assert not torch.is_autocast_enabled("cpu")
        return PLAIN.decode(decoder, judges, request)


def test_images_are_decoded_in_the_precision_of_the_weights_whatever_calls(
    evaluator: Evaluator, evaluation: Evaluation
) -> None:
    evaluator.strategies["sample"] = InFullPrecision()
    with torch.autocast("cpu", torch.bfloat16):  # as in a step of a Trainer with bf16-mixed
        evaluator.evaluate(replace(evaluation, strategies=["sample"]))
        evaluator.decode(evaluation.decoder, InFullPrecision(), {}, evaluation.prompts, [(0, 0)])


@pytest.mark.parametrize(
    ("strategy", "said"),
    [
        (Potential(Sampling(), 2, "parm"), "judge 'parm' cannot judge unfinished images; there are: none"),
        (
            BestOfN(Reflection(PLAIN, PLAIN, Region(RandomScores(), 0.5), 1, stop_score=0.5), 2, "parm"),
            "reflection's stop_score=0.5 is never reached",
        ),
        (Reflection(PLAIN, PLAIN, Region(PatchCLIPScore(2, "parm"), 0.5), 1), "judge 'parm' does not score patches"),
        (
            Reflection(PLAIN, PLAIN, Region(RandomScores(), 0.5, patches=3), 1),
            r"region_selector\.patches=3 does not divide the 4x4 tokens of an image",
        ),
        (
            Reflection(PLAIN, Sample(MaskSampling(8)), Region(RandomScores(), 0.5), 1),
            r"redecoder\.sampling is a MaskSampling, and a CompactDecoder takes a Sampling",
        ),
    ],
)
def test_judges_and_decoders_are_asked_for_what_they_can_do_before_any_work(
    evaluator: Evaluator, evaluation: Evaluation, strategy: Strategy, said: str
) -> None:
    evaluator.strategies["mine"] = strategy
    with pytest.raises(ValueError, match=rf"^strategies\.mine: {said}"):
        evaluator.prepare(evaluation)
