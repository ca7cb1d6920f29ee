"""The three stages of a preset in as many processes as torchrun has started; in one, without it.

    python examples/train.py tiny
    examples/torchrun.sh full_13b --changes '{"save_every": 500}'

A finished stage is read, not trained again, so the same line goes on where a job ended.
"""

import argparse
import json

import vflan

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", help="a name, or a .py file of your own")
    parser.add_argument(
        "--changes", type=json.loads, default={}, help="Recipe fields for all three stages, as JSON"
    )
    asked = parser.parse_args()
    run, recipes = None, vflan.preset(asked.preset, **asked.changes)
    for recipe in recipes:
        run = vflan.train(recipe, init=run)
