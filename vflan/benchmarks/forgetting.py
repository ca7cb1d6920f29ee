"""Catastrophic forgetting, the paper's CF: the model as a plain image classifier, the mean accuracy over the sets.

The paper uses CIFAR-10, CIFAR-100, MNIST and miniImageNet and lets Vicuna-13B decide whether an answer names the class.
Prompts and splits are not printed. Here a rule decides: the label stands in the first sentence as whole words, and no
other label of the set does, so that listing every class earns nothing.
"""

from functools import partial

from vflan.benchmarks.benchmark import Benchmark, clean, contains, first_sentence, load_questions, metrics


def parse(answer, sample=None):
    return clean(first_sentence(answer))


def items(samples, answers):
    labels = {}
    for s in samples:
        labels.setdefault(s["category"], set()).add(clean(s["label"]))

    def right(sample, answer):
        named = {label for label in labels[sample["category"]] if contains(parse(answer), label)}
        own = clean(sample["label"])
        return own in named and all(other == own or contains(own, other) for other in named)

    return metrics("accuracy", [right(s, a) for s, a in zip(samples, answers)], samples)


FORGETTING = Benchmark(
    "forgetting", "accuracy", parse, items, partial(load_questions, name="forgetting"), paper="CF"
)  # fmt: skip
