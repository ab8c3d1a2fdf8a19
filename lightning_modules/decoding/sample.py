"""Plain sampling: one candidate a step, taken as it comes."""

from dataclasses import dataclass

from lightning_modules.backbone.decoder import Decoder, Request
from lightning_modules.decoding.paths import Paths
from lightning_modules.decoding.strategy import Decoded, Judges, PathStrategy


@dataclass(frozen=True)
class Sample(PathStrategy):
    """Plain sampling, with the settings of the decoder's kind."""

    judge_names = ()
    images_at_once = 1

    def decode(self, decoder: Decoder, judges: Judges, request: Request) -> Decoded:
        paths = Paths(decoder, request, self.sampling)
        while not paths.is_done:
            paths.commit(paths.propose())
        return paths.finish()
