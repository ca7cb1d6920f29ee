"""Small tools of many rooms under one name, for notebooks: `from vflan import lab`.

Each is documented where it is defined.
"""

from vflan.analysis.movement import moved, weight_pairs
from vflan.analysis.sweeps import projector_arm, spread, with_samples
from vflan.config import ROOT, for_seed, output_folder, read_changes, read_json, resolve
from vflan.data.conversation import expand
from vflan.data.images import read_picture
from vflan.data.mixture import recipe_samples
from vflan.data.samples import texture
from vflan.escape import write_sheet
from vflan.evaluation.evaluator import present, scorable
from vflan.evaluation.results import difference, judged_answers, per_task
from vflan.evaluation.streaming import attention_maps, captioned, nearest_words, tower_view
from vflan.models.llava import (
    fingerprint,
    image_features,
    load_processor,
    load_tokenizer,
    parameter_counts,
    picture_tokens,
)
from vflan.models.weights import part_sizes
from vflan.tools.exploration import usable_part
from vflan.tools.parameters import checked, data_paths, is_small
from vflan.training.batching import pack
from vflan.training.trainer import learning_rate

__all__ = [
    "attention_maps", "captioned", "checked", "data_paths", "difference", "expand",
    "fingerprint", "for_seed", "image_features", "is_small", "judged_answers", "learning_rate",
    "load_processor", "load_tokenizer", "moved", "nearest_words", "output_folder", "pack",
    "parameter_counts", "part_sizes", "per_task", "picture_tokens", "present", "projector_arm",
    "read_changes", "read_json", "read_picture", "recipe_samples", "resolve", "ROOT",
    "scorable", "spread", "texture", "tower_view", "usable_part", "weight_pairs",
    "with_samples", "write_sheet",
]  # fmt: skip
