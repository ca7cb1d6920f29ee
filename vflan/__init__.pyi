from . import world
from .analysis import claims, plots, tables
from .analysis.sweeps import Arm, Swap, sweep
from .config import Recipe, preset, replace
from .data.conversation import encode
from .data.download import fetch
from .data.llava_mixture import llava_mixture
from .data.mixture import diverse, mix
from .data.samples import load_samples, save_samples
from .data.validation import check
from .evaluation import judge, stats
from .evaluation.benchmarks import BENCHMARKS
from .evaluation.evaluator import evaluate
from .evaluation.generation import answer
from .evaluation.served_model import ServedModel
from .models.llava import load_model, parts, swap_part
from .tools import exploration, lab, widgets
from .training.costs import plan
from .training.run import Run
from .training.trainer import take_projector, train

__all__ = [
    "preset", "Recipe", "replace", "load_samples", "save_samples", "mix", "diverse",
    "llava_mixture", "check", "fetch", "encode", "load_model", "parts", "swap_part", "Run",
    "plan", "train", "take_projector", "answer", "ServedModel", "evaluate", "sweep", "Arm", "Swap",
    "BENCHMARKS", "plots", "world", "stats", "judge", "widgets", "claims", "tables", "exploration",
    "lab",
]  # fmt: skip
