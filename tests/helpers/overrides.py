"""Overrides that make the project's jobs small enough for a test."""

import json
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
# For any experiment of the shapes world: networks of random weights.
TINY = [
    "tokenizer.module.width=16",
    "tokenizer.checkpoint=null",
    "decoder.checkpoint=null",
    "decoder.module.transformer.dim=32",
    "decoder.module.transformer.depth=2",
    "decoder.module.feature_layers=[1,2]",
    "parm.checkpoint=null",
    "parm.module.transformer.dim=32",
    "parm.module.transformer.depth=1",
    "clip.checkpoint=null",
]
SMALL = [
    *TINY,
    "logger=csv",
    "trainer.accelerator=cpu",
    "geneval.train_prompts.per_task=2",
    "geneval.validation_prompts.per_task=1",
    "geneval.test_prompts.per_task=1",
    "strategies.best_of_8_likelihood.n=2",
    "evaluator.batch_size=8",
]
SMALL_STRATEGIES = [
    "strategies.best_of_8_parm.n=2",
    "strategies.verified_best_of_4.n=2",
    "strategies.verified_reflection.rounds=1",
    "strategies.verified_reflection.strategy.n=2",
]
SMALL_PARM = [
    *SMALL,
    *SMALL_STRATEGIES,
    "callbacks.geneval.before_training=false",
    "data.train.plain.samples=2",
    "data.train.verified.samples=1",
    "data.train.verified.from_epoch=1",
    "data.validation.samples=2",
    "data.test.samples=2",
    "data.batch_size=8",
    "data.collect_batch_size=12",
    "trainer.max_steps=5",
    "trainer.check_val_every_n_epoch=1",
]
# The bundled weights, which draw what the detector finds.
BUNDLED = [item for item in SMALL_PARM if not item.startswith(("tokenizer", "decoder", "parm"))]
# Show-o with few layers, too.
TINY_SHOWO = ["+debug=tiny_showo", "decoder.module.transformer.depth=4", "decoder.module.feature_layers=[1,2,4]"]
# Preferences need a decoder that is sometimes right: the bundled one, on few prompts.
SMALL_DPO = [
    *(item for item in SMALL if not item.startswith(("tokenizer", "decoder", "parm"))),
    *SMALL_STRATEGIES,
    "data.train.plain.samples=4",
    "data.validation.samples=4",
    "trainer.log_every_n_steps=1",
]
# Groups need it too: those of one that is never right have no spread. Two epochs of two steps of 16 images.
SMALL_GRPO = [
    *(item for item in SMALL_DPO if not item.startswith(("data.", "geneval.train_prompts"))),
    "geneval.train_prompts.per_task=8",
    "data.spec.per_round={two_object: 1, counting: 2, colors: 1}",
    "data.spec.samples=4",
    "data.spec.refills=1",
    "data.batch_size=16",
    "data.rounds=2",
    "module.warmup_steps=1",
    "trainer.max_epochs=2",
    "callbacks.geneval.test_strategies=[sample]",
]
# Training that is sharded over two processes, and what decodes while a model trains.
SHARDED = ["devices=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.precision=32-true",
           "trainer.strategy._target_=tests.helpers.sharding.FSDPOnCPU"]  # fmt: skip
DECODE_NOTHING = ["~callbacks.geneval", "~callbacks.checkpoint_best", "~callbacks.early_stop"]
# The parts that the tiny Stable Diffusion 3 lacks.
WITHOUT = ["text_encoder_3", "tokenizer_3"]


def here(tmp_path: Path) -> list[str]:
    """Overrides that leave everything in a temporary folder."""
    return [f"hydra.run.dir={tmp_path}/run", f"rollouts_dir={tmp_path}/rollouts"]


def pair_files(folder: Path, tokens: int = 64) -> list[str]:
    """Overrides that name a file of eight pairs of images, each of so many tokens of 64 kinds, and two prompts."""
    made = torch.randint(64, (8, 2, tokens), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = ["a photo of a star", "a photo of two red stars"] * 4
    rows = [{"prompt": p, "chosen": c, "rejected": r} for p, (c, r) in zip(prompts, made, strict=True)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [f"data.{split}.path={folder}/pairs.jsonl" for split in ("train", "validation")]
