"""The benchmarks: one file a family; load, prompt, parse and score together. The only place that reads answers."""

from vflan.benchmarks.benchmark import Benchmark, Metric
from vflan.benchmarks.forgetting import FORGETTING
from vflan.benchmarks.llava_bench import LLAVA_BENCH
from vflan.benchmarks.mmbench import MMBENCH
from vflan.benchmarks.mme import MME
from vflan.benchmarks.pope import POPE
from vflan.benchmarks.tasks import HELDIN, HELDOUT

BENCHMARKS = {b.name: b for b in (HELDIN, HELDOUT, MMBENCH, MME, POPE, LLAVA_BENCH, FORGETTING)}

__all__ = ["BENCHMARKS", "Benchmark", "Metric"]
