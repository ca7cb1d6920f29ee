"""The benchmarks: one file a family; load, prompt, parse and score together. The only place that reads answers."""

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric
from vflan.evaluation.benchmarks.case_studies import TEXTOCR, WIT
from vflan.evaluation.benchmarks.forgetting import (
    CIFAR10,
    CIFAR100,
    FORGETTING,
    MINIIMAGENET,
    MNIST,
)
from vflan.evaluation.benchmarks.gqa import GQA
from vflan.evaluation.benchmarks.llava_bench import LLAVA_BENCH
from vflan.evaluation.benchmarks.mm_vet import MM_VET
from vflan.evaluation.benchmarks.mmbench import MMBENCH, MMBENCH_CN
from vflan.evaluation.benchmarks.mme import MME
from vflan.evaluation.benchmarks.mmmu import MMMU
from vflan.evaluation.benchmarks.pope import POPE
from vflan.evaluation.benchmarks.scienceqa import SCIENCEQA
from vflan.evaluation.benchmarks.seed import SEED
from vflan.evaluation.benchmarks.tasks import HELDIN, HELDOUT
from vflan.evaluation.benchmarks.vqa import TEXTVQA, VIZWIZ, VQAV2

_ALL = (HELDIN, HELDOUT, MMBENCH, MME, POPE, LLAVA_BENCH, FORGETTING, MM_VET, MMMU, MMBENCH_CN, SEED, VQAV2, GQA, VIZWIZ,
        SCIENCEQA, TEXTVQA, CIFAR10, CIFAR100, MNIST, MINIIMAGENET, TEXTOCR, WIT)  # fmt: skip
BENCHMARKS = {b.name: b for b in _ALL}

__all__ = ["BENCHMARKS", "Benchmark", "Metric"]
