"""MME: two yes/no questions an image, one with each answer; a sub-task scores accuracy plus accuracy of whole pairs.

`total` is the official sum over sub-tasks, at most 200 each (2000 for the ten perception tasks of the paper, fewer
here); `score` is the same on a scale of 0 to 100, which the mini world and the paper can share.
"""

from functools import partial

import numpy as np

from vflan.benchmarks.benchmark import Benchmark, Metric, load_questions, metrics


def parse(answer, sample=None):
    """'yes', 'no' or 'other': exactly that, or whichever stands in the first four characters (the official rule)."""
    answer = str(answer).lower()
    head = answer if answer in ("yes", "no") else answer[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def items(samples, answers):
    right = np.array([parse(a) == s["label"].lower() for s, a in zip(samples, answers)], float)
    keys = [(s["category"], str(s["image"])) for s in samples]
    pairs = {}
    for i, key in enumerate(keys):
        pairs.setdefault(key, []).append(i)
    odd = [key for key, members in pairs.items() if len(members) != 2]
    if odd:
        raise ValueError(f"MME asks two questions an image; {odd[0][1]} of {odd[0][0]} has {len(pairs[odd[0]])}.")
    both = np.array([right[pairs[key]].all() for key in keys], float)  # each pair twice: the ratio is that of the pairs
    out = metrics("accuracy", right, samples) | metrics("accuracy_plus", both, samples)
    score = metrics("score", (right + both) / 2, samples)
    tasks = len(set(s["category"] for s in samples))
    whole = score["score"]
    total = Metric(whole.num * 2 * tasks, whole.den, whole.group, whole.cluster)
    return out | score | {"total": total}


def yes(samples):
    return ["yes"] * len(samples)


MME = Benchmark("mme", "score", parse, items, partial(load_questions, name="mme"), blind=yes, paper="MME")
