"""Draws docs/one-scene.png, which opens notebook 01: one picture and three tasks about it.

python docs/one_scene_figure.py
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from vflan import plots, world  # noqa: E402
from vflan.world import scene  # noqa: E402

KINDS = ("color_of", "count_shape", "choose_color", "describe_shape")


def figure() -> plt.Figure:
    """The picture on the left; on the right the name, instruction and answer of each task."""
    truth = scene.sample_scene(scene.rng_of("one-scene", 11), "objects", n=4)
    plots.style()
    fig, (left, right) = plt.subplots(1, 2, figsize=(8, 2.9), width_ratios=(1, 2.4))
    left.imshow(scene.render(truth), interpolation="nearest")
    left.set_axis_off()
    right.set_axis_off()
    y = 0.98
    for name in KINDS:
        asked = world.KINDS[name].make(truth, scene.rng_of(name))
        if not asked:
            continue
        question, answer = asked
        plots.write(right, 0, y, name.replace("_", " "), fontsize=9, color=plots.GREY)
        text = plots.wrap(question, 62, 2)
        plots.write(right, 0, y - 0.085, text, fontsize=10)
        y -= 0.085 * (2 + text.count("\n"))
        plots.write(right, 0, y, answer, fontsize=10, color=plots.COLORS[0], weight="bold")
        y -= 0.13
    return fig


if __name__ == "__main__":
    figure().savefig(HERE / "one-scene.png", dpi=110, metadata={"Software": None})
