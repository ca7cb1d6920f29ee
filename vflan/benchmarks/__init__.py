"""The benchmarks: one file a family; load, prompt, parse and score together. The only place that reads answers."""

from vflan.benchmarks.benchmark import Benchmark, Metric
from vflan.benchmarks.case_studies import TEXTOCR, WIT
from vflan.benchmarks.forgetting import CIFAR10, CIFAR100, FORGETTING, MINIIMAGENET, MNIST
from vflan.benchmarks.gqa import GQA
from vflan.benchmarks.llava_bench import LLAVA_BENCH
from vflan.benchmarks.mm_vet import MM_VET
from vflan.benchmarks.mmbench import MMBENCH, MMBENCH_CN
from vflan.benchmarks.mme import MME
from vflan.benchmarks.mmmu import MMMU
from vflan.benchmarks.pope import POPE
from vflan.benchmarks.scienceqa import SCIENCEQA
from vflan.benchmarks.seed import SEED
from vflan.benchmarks.tasks import HELDIN, HELDOUT
from vflan.benchmarks.vqa import TEXTVQA, VIZWIZ, VQAV2

_ALL = (HELDIN, HELDOUT, MMBENCH, MME, POPE, LLAVA_BENCH, FORGETTING, MM_VET, MMMU, MMBENCH_CN, SEED, VQAV2, GQA, VIZWIZ,
        SCIENCEQA, TEXTVQA, CIFAR10, CIFAR100, MNIST, MINIIMAGENET, TEXTOCR, WIT)  # fmt: skip
BENCHMARKS = {b.name: b for b in _ALL}

__all__ = ["BENCHMARKS", "Benchmark", "Metric"]
