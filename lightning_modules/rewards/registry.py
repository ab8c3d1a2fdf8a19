"""JudgeRegistry: the judges of a run by name, each built once."""

import copy
from collections import UserDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_modules.backbone.decoder import Decoder
from lightning_modules.rewards.geneval_reward import GenEvalReward
from lightning_modules.rewards.parm import PARM
from lightning_modules.rewards.verifier import Judge, Likelihood


class JudgeRegistry(UserDict[str, Judge]):
    """All judges that strategies, data and evaluations can name; each name means one judge.

    Args:
        geneval: label images, and judge as `geneval`, `strict` and `clauses`. None where nothing is labelled.
        rewards: further judges.
        decoder: judges its own images as `likelihood`, if it can.

    Attributes:
        oracles: names of the judges by which results are measured.
        teachers: names of those that decide what is trained on; the data adds them.

    Raises:
        ValueError: two judges have one name.
    """

    def __init__(
        self,
        geneval: GenEvalReward | None,
        rewards: Mapping[str, Judge],
        decoder: Decoder | None = None,
        parm: PARM | None = None,
    ) -> None:
        self._geneval, self._parm = geneval, parm
        kinds = geneval.kinds() if geneval else {}
        self.oracles = frozenset(kinds)
        self.teachers: set[str] = set()
        verifiers: dict[str, Judge] = {} if parm is None else {"parm": parm}
        if decoder is not None and decoder.has_likelihood:
            verifiers["likelihood"] = Likelihood()
        super().__init__({**verifiers, **kinds})
        for name, judge in rewards.items():
            if not isinstance(judge, Judge):
                raise ValueError(f"judges.rewards.{name} is no judge, but a {type(judge).__name__}")
            if name in self:
                raise ValueError(f"judges: there are two called {name!r}: give the one in judges.rewards another name")
            self[name] = judge

    @property
    def geneval(self) -> GenEvalReward:
        """GenEval's rules; raises ValueError if there are none."""
        if self._geneval is None:
            raise ValueError("judges.geneval is null, and what is made here is labelled by it")
        return self._geneval

    def prepare(self, device: torch.device | str) -> None:
        """Move GenEval's detector, if there is one, to a device, and test it there."""
        if self._geneval is not None:
            self._geneval.prepare(device)

    def refuse_unknown(self, named: Mapping[str, Iterable[str]]) -> None:
        """Raise ValueError if a name, of those that each config key gives, is no judge's."""
        for key, names in named.items():
            for name in names:
                if name not in self:
                    raise ValueError(f"{key} names the judge {name!r}; there are: {', '.join(self)}")

    def keys_of(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the cache keys of some judges, by name."""
        return {name: self[name].cache_key() for name in sorted({*names})}

    def copy_trained(self) -> dict[str, Any]:
        """Return a copy of PARM as it is now, by name, if it is trained."""
        trained = self._parm is not None and any(weight.requires_grad for weight in self._parm.parameters())
        return {"parm": copy.deepcopy(self._parm)} if trained else {}
