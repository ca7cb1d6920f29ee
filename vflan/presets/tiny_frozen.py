"""The mini world of the claims: `tiny` with other scenes and other held-out kinds, drawn by lot.

Everything in the mini world was tried out and chosen on the scenes and kinds of `tiny`. This world
(vflan.world.WORLDS) and the seeds of `make paper` were fixed before anything ran on them, and are
used once, for data/claims.csv.
Hardware and expectations: those of `tiny`. docs/claims.md declares what `make paper` measures.
"""

from vflan.config import Preset, replace
from vflan.presets.tiny import preset as tiny


def preset() -> Preset:
    """The stages projector, base and chat."""
    common = dict(images="data/frozen/samples/images", benchmarks="data/frozen/benchmarks")
    common["runs"] = "runs/tiny_frozen"
    samples = [recipe.samples.replace("data/tiny/", "data/frozen/") for recipe in tiny()]
    return Preset(*(replace(r, samples=file, **common) for r, file in zip(tiny(), samples)))
