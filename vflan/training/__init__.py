"""One run: packed batches, the steps, distributed processes, checkpoints, and what all this costs before it begins.

Comes in: a recipe. Goes out: a run folder (run.py). How rows become batches (batching.py) decides nothing about their tokens.
"""
