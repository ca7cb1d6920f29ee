"""The benchmarks, one file a family: how questions are read, asked and scored. Only here are
answers parsed.

In: a folder of questions, and the text of each answer. Out: metrics, one entry for each question.
A new file that defines a Benchmark is found by itself; nothing else has to be edited.
"""

from vflan.evaluation.benchmarks.benchmark import Benchmark, Metric
from vflan.evaluation.benchmarks.registry import read_package

# The order of tables and of the panels in a figure; other benchmarks of this folder come after
# these.
_ORDER = (
    "heldin heldout mmbench mme pope llava_bench forgetting mm_vet mmmu mmbench_cn seed vqav2 gqa "
    "vizwiz scienceqa textvqa cifar10 cifar100 mnist miniimagenet textocr wit"
).split()
BENCHMARKS = read_package(__name__, __path__, _ORDER)

__all__ = ["BENCHMARKS", "Benchmark", "Metric"]
