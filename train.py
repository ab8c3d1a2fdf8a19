"""Compose the config, build the parts, call the Trainer. `python train.py --help` lists what there is."""

from pathlib import Path

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    seed_everything(config.seed, workers=True, verbose=False)
    module: LightningModule = instantiate(config.module)
    data: LightningDataModule = instantiate(config.data)
    callbacks: list[Callback] = list(instantiate(config.callbacks).values())
    loggers = list(instantiate(config.logger).values())
    trainer: Trainer = instantiate(config.trainer, callbacks=callbacks, logger=loggers)
    trainer.fit(module, data, ckpt_path=config.ckpt_path)


if __name__ == "__main__":
    main()
