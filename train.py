"""Compose the config, check it, do its task. `python train.py --help` says what there is."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lightning_modules.runs.checkpoints import forget_refused
from lightning_modules.runs.command_line import explaining_refusals, restore_tracebacks
from lightning_modules.runs.messages import MENDABLE, sentence
from lightning_modules.runs.preflight import refuse_settings
from lightning_modules.runs.processes import is_first


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    restore_tracebacks()
    unresolved: Any = OmegaConf.to_container(config)
    try:
        refuse_settings(config)
        gc.enable()
        from lightning_modules.tasks.run import run  # imports torch and Lightning, which takes seconds

        run(config)
    except MENDABLE as error:  # HYDRA_FULL_ERROR=1 shows where it came from
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        hydra_config = HydraConfig.get()
        folder = hydra_config.runtime.output_dir
        if is_first():
            forget_refused(Path(folder))
            if hydra_config.mode == RunMode.MULTIRUN:
                forget_refused(Path(hydra_config.sweep.dir))
        sys.exit(f"Error: {sentence(error, unresolved | {'hydra': {'run': {'dir': folder}}})}")


if __name__ == "__main__":
    gc.disable()  # composing makes many objects and little rubbish: to look for it takes a third of a refusal's time
    with explaining_refusals(sys.argv[1:]):
        main()
