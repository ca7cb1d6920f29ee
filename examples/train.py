"""Train the three stages of a preset, in the processes that torchrun started, or in this one.

    python examples/train.py tiny
    examples/torchrun.sh full_13b --changes '{"save_every": 500}'

A finished stage is loaded, not trained again, so the same command continues a job that ended early.
"""

import argparse

import vflan

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", help="a name, or a .py file of your own")
    parser.add_argument("--changes", help="Recipe fields for all three stages, as JSON")
    arguments = parser.parse_args()
    run = None
    for recipe in vflan.preset(arguments.preset, arguments.changes):
        run = vflan.train(recipe, init=run)
