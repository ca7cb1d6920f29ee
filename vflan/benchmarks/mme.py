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
    pairs = {}
    for i, s in enumerate(samples):
        pairs.setdefault((s["category"], str(s["image"])), []).append(i)
    for (task, image), members in pairs.items():
        if len(members) != 2:
            raise ValueError(f"MME asks two questions an image; {image} of {task} has {len(members)}.")
    heads = [samples[first] for first, _ in pairs.values()]
    both = np.array([right[members].all() for members in pairs.values()], float)
    mean = np.array([right[members].mean() for members in pairs.values()])
    score = metrics("score", (mean + both) / 2, heads)
    whole, tasks = score["score"], len({s["category"] for s in samples})
    total = Metric(whole.num * 2 * tasks, whole.den, whole.group, whole.cluster)
    return metrics("accuracy", right, samples) | metrics("accuracy_plus", both, heads) | score | {"total": total}


def yes(samples):
    return ["yes"] * len(samples)


MME = Benchmark("mme", "score", parse, items, partial(load_questions, name="mme"), blind=yes, paper="MME")
