"""Results that a change which is not meant to move numbers must leave byte for byte.

`python -m tests.helpers.pinned` runs everything again and compares; `--write` writes down what is now. With names, only
these runs. Hashes hold for one processor and one release of torch, so compare on the machine that wrote them.
"""

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.helpers.launch import launch

STORED = Path(__file__).parents[1] / "golden" / "pinned.json"
BOTH = ["logger=csv", "trainer.accelerator=cpu", "trainer.precision=32-true"]
FEW = [*BOTH, "geneval.test_prompts.per_task=1", "geneval.validation_prompts.per_task=1"]
MEASURED = [*FEW, "task=evaluate", "module=evaluation", "~data", "callbacks.geneval.test_strategies=null"]
PARM = [*FEW, "geneval.train_prompts.per_task=2", "data.train.plain.samples=2", "data.train.verified.from_epoch=1",
        "data.validation.samples=2", "data.test.samples=2", "data.batch_size=8", "trainer.max_steps=8",
        "callbacks.geneval.test_strategies=[sample,verified_best_of_4]"]  # fmt: skip
DPO = [*FEW, "geneval.train_prompts.per_task=2", "data.batch_size=2", "data.validation.samples=4",
       "strategies.verified_best_of_4.n=2", "trainer.max_epochs=2", "module.warmup_steps=2",
       "data.train.plain.per_round={two_object: 1, counting: 2, colors: 1, position: 1, color_attr: 1}",
       "callbacks.geneval.test_strategies=[sample]"]  # fmt: skip
RUNS: dict[str, list[str]] = {
    "minutes": ["+debug=minutes", *BOTH],
    **{f"shapes/{name}": [f"strategies={name}", *MEASURED] for name in ("parm", "reflection", "search", "compute")},
    "shapes/best_of_n": ["strategies=best_of_n", *MEASURED],
    "masked/masked": ["strategies=masked", "decoder=shapes_masked", *MEASURED],
    "parm": PARM,
    "masked_parm": [
        "experiment=shapes_masked_parm",
        *PARM,
        "data.train.plain.samples=2",
        "callbacks.geneval.test_strategies=[sample,verified_best_of_2]",
    ],
    "dpo_iterative": ["experiment=dpo_iterative", *DPO],
    "dpo_guided": ["experiment=dpo_guided", *DPO, "data.train.guided.samples=1"],
    "masked_dpo": ["experiment=shapes_masked_dpo", *DPO],
    "showo": ["experiment=showo_evaluate", "+debug=tiny_showo", *BOTH],
}


def digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def results(run: Path) -> dict[str, str]:
    """A hash of the rows of every strategy, of their prompts and verdicts, and of the last weights."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for line in (run / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        strategy, _, row["filename"] = row["filename"].partition("/")
        rows.setdefault(strategy, []).append(row)
    found = {strategy: digest(json.dumps(each)) for strategy, each in rows.items()}
    if (last := run / "checkpoints" / "last.ckpt").exists():
        weights = torch.load(last, weights_only=True)["state_dict"]
        found["weights"] = digest(b"".join(weights[key].contiguous().numpy().tobytes() for key in sorted(weights)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    stored = json.loads(STORED.read_text()) if STORED.exists() else {}
    moved = []
    for name in given.names or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            places = [f"{key}={folder}/{key}" for key in ("rollouts_dir", "scores_dir", "hydra.run.dir")]
            done = launch([*RUNS[name], *places], Path(folder), timeout=3600)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-3000:]}")
            found = results(Path(folder) / "hydra.run.dir")
        differ = [key for key in {**stored.get(name, {}), **found} if stored.get(name, {}).get(key) != found.get(key)]
        print(f"{name}: {len(found)} hashes, {f'these differ: {differ}' if differ else 'all equal'}", flush=True)
        moved += differ
        stored[name] = found
    if given.write:
        STORED.write_text(json.dumps(stored, indent=2) + "\n")
    elif moved:
        sys.exit(1)


if __name__ == "__main__":
    main()
