"""Images from which several strategies start, made once: the candidates of best-of-n, what reflection begins with."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.cache_key import digest
from lightning_modules.decoding.strategy import Decoded, Judges, Strategy

Runs = Mapping[str, tuple[Strategy, Judges]]


@dataclass(frozen=True)
class Remembered(Strategy):
    """A strategy that makes the images of a request once; their cost, time included, counts each time."""

    strategy: Strategy
    _made: dict[str, Decoded] = field(default_factory=dict, compare=False)

    def cache_key(self) -> Any:
        """That of the strategy: to remember changes nothing."""
        return self.strategy.cache_key()

    @property
    def parts(self) -> Mapping[str, Strategy]:
        return {"strategy": self.strategy}

    @property
    def judge_names(self) -> Sequence[str]:
        return self.strategy.judge_names

    @property
    def reflection_rounds(self) -> int:
        return self.strategy.reflection_rounds

    @property
    def images_at_once(self) -> int:
        return self.strategy.images_at_once

    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        key, begun = digest([request.prompts, request.seeds]), time.perf_counter()
        if key in self._made:
            return replace(self._made[key], cost=replace(self._made[key].cost))
        made = self.strategy.decode(decoder, judges, request)
        seconds = made.cost.seconds + time.perf_counter() - begun
        self._made[key] = replace(made, cost=replace(made.cost, seconds=seconds))
        return made


def _key(strategy: Strategy, copies: int, judges: Judges) -> Any:
    asked = [(name, id(judges[name])) for name in strategy.judge_names if name in judges]
    return digest([strategy.cache_key(), copies, asked])


def remembering(runs: Runs) -> Runs:
    """Return strategies, with their judges, that share the images from which more than one of them starts."""
    own = {name: _key(strategy, 1, judges) for name, (strategy, judges) in runs.items()}
    starts = {name: _key(*strategy.start, judges) for name, (strategy, judges) in runs.items() if strategy.start}
    counts, shared = Counter([*own.values(), *starts.values()]), dict[str, Remembered]()

    def share(key: str, strategy: Strategy) -> Strategy:
        return shared.setdefault(key, Remembered(strategy)) if counts[key] > 1 else strategy

    found: dict[str, tuple[Strategy, Judges]] = {}
    for name, (strategy, judges) in runs.items():
        if strategy.start:
            start: Any = {"strategy": share(starts[name], strategy.start[0])}
            strategy = replace(strategy, **start)  # type: ignore[type-var]
        found[name] = share(own[name], strategy), judges
    return found
