"""The mini world of the claims: `tiny`, on other scenes and with other kinds of task held out, drawn by lot.

Everything in the mini world was tried out and chosen on the scenes and kinds of `tiny`. This world (vflan.world.WORLDS) and
the seeds that `make paper` trains with were fixed before anything was run on them, and are used once, for data/claims.csv.
Hardware and expectations: those of `tiny`. `make paper` took about two hours on two cores, with other work beside it.
"""

from vflan.config import Preset, replace
from vflan.presets.tiny import preset as tiny


def preset() -> Preset:
    return Preset(
        *(
            replace(
                recipe,
                samples=recipe.samples.replace("data/tiny/", "data/frozen/"),
                images="data/frozen/samples/images",
                benchmarks="data/frozen/benchmarks",
                runs="runs/tiny_frozen",
            )
            for recipe in tiny()
        )
    )
