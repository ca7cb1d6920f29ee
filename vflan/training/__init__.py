"""Training: one run.

In: a recipe. Out: a run folder (run.py). The loop is in trainer.py. You may change how rows become
batches (batching.py), or how processes share the work (distributed.py), without looking at data or
models: tokens, labels and the loss are decided there.
"""
