"""Compose the config, build the parts, call the Trainer. `python train.py --help` says what there is."""

import os
import sys
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning import LightningModule, seed_everything
from omegaconf import DictConfig, OmegaConf

from lightning_modules.backbone.loading import export, write_text


def build(node: DictConfig | None) -> Any:
    """Instantiate a node with everything below it; plain containers, since dataclasses inside must stay objects."""
    return instantiate(node, _convert_="all")


def run(config: DictConfig) -> None:
    """Do the task of a config."""
    if config.task not in ("fit", "evaluate", "rollout", "export", "ladder"):
        raise ValueError(f"task must be fit, evaluate, rollout, export or ladder, not {config.task!r}")
    if config.task == "ladder":
        build(config.ladder).run()
        return
    if config.task == "export" and config.ckpt_path is None:
        raise ValueError("task=export needs ckpt_path, the checkpoint to export")
    if config.task in ("fit", "rollout") and config.get("data") is None:
        raise ValueError(
            f"task={config.task} needs data, and here is none to train on; this config is for task=evaluate"
        )
    if missing := OmegaConf.missing_keys(config):
        raise ValueError(f"{min(missing)} needs a value")
    if config.ckpt_path is not None and not Path(config.ckpt_path).is_file():
        raise FileNotFoundError(f"ckpt_path: there is no file {config.ckpt_path}")
    seed_everything(config.seed, workers=True, verbose=False)
    plain = OmegaConf.to_container(config, resolve=True)
    write_text(Path(HydraConfig.get().runtime.output_dir) / "config.yaml", OmegaConf.to_yaml(config, resolve=True))
    module = build(config.module)
    if config.task == "export":
        load_checkpoint(module, config.ckpt_path)
        for node, part in module.exported.items():
            folder = Path(config.export_dir) / (node if len(module.exported) > 1 else "")
            export(part, folder, plain[node])
            print(f"Exported {type(part).__name__} to {folder}")
        return
    data = build(config.get("data"))
    if config.task == "rollout":
        load_checkpoint(module, config.ckpt_path)
        data.collect_all(module)
        return
    callbacks = list(build(config.callbacks).values())
    loggers = list(build(config.logger).values())
    for logger in loggers:
        logger.log_hyperparams(plain)
    trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    if config.task == "fit":
        trainer.fit(module, data, ckpt_path=config.ckpt_path)
        trainer.test(module, data, ckpt_path=config.test_ckpt_path, verbose=False)
    else:
        trainer.test(module, data, ckpt_path=config.ckpt_path, verbose=False)


def load_checkpoint(module: LightningModule, ckpt_path: str | None) -> None:
    """Load a Lightning checkpoint into a module outside of any Trainer."""
    if ckpt_path is not None:
        checkpoint: dict[str, Any] = torch.load(ckpt_path, map_location="cpu", weights_only=True)
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    try:
        run(config)
    except (ValueError, FileNotFoundError, InstantiationException) as error:
        # One sentence for what the user can mend; HYDRA_FULL_ERROR=1 shows where it came from.
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        sys.exit(f"Error: {error.__cause__ or error}")


if __name__ == "__main__":
    main()
