"""The text of `python train.py --help`."""

import re
from textwrap import fill

from lightning_modules.runs.settings_tree import CONF, GROUPS, options

_START = """\
image-cot trains, verifies, aligns and measures image generation step by step.

python train.py                               train PARM on the shapes world, print the GenEval table
python train.py +debug=minutes                the same in a minute, to see that it works
python train.py experiment=NAME               another job
python train.py ckpt_path=auto                resume the newest run of that name
python train.py task=evaluate ckpt_path=PATH  GenEval of a checkpoint, or of a folder of checkpoints
python train.py task=generate images=DIR      make images of the evaluation prompts, in GenEval's layout
python train.py task=score images=DIR         GenEval of such a folder, whoever made it
python train.py task=rollout                  make the rollouts alone
python train.py task=export ckpt_path=PATH    write model.safetensors and config.json
"""
_END = """\
Change a value with key=value. Keys at the top: name, task, seed, ckpt_path, test_ckpt_path, images, scores_dir,
rollouts_dir, export_dir. All keys: python train.py --cfg job. Sweeps: conf/sweep, docs/commands.md.
An error is one sentence; HYDRA_FULL_ERROR=1 python train.py ... shows where it comes from.
"""
# Groups that are chosen in another way than GROUP=OPTION, and those whose files other files choose.
_WRITTEN = {"strategy": "+strategy@strategies.NAME", "debug": "+debug"}
_INNER = ("experiment", "generating", "hydra", "scoring", "sweep")


def text() -> str:
    """Write what there is to choose, with one line for each experiment, which its file begins with."""
    width = max(map(len, options("experiment")))
    jobs = "".join(f"  {name:{width}}  {description(name)}\n" for name in options("experiment"))
    chosen = {_WRITTEN.get(group, group): ", ".join(options(group)) for group in GROUPS if group not in _INNER}
    width = max(map(len, chosen))
    indent = " " * (width + 4)
    listed = (
        fill(files, 120, initial_indent=f"  {group:{width}}  ", subsequent_indent=indent)
        for group, files in chosen.items()
    )
    groups = "".join(f"{line}\n" for line in listed)
    return f"{_START}\nexperiment=NAME\n{jobs}\nGROUP=OPTION\n{groups}\n{_END}"


def description(experiment: str) -> str:
    """Return what an experiment does, from the second line of its file, after its command."""
    command = (CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8").splitlines()[1]
    found = re.search(r"    \((.+)\)$", command)
    return found[1] if found else ""
