"""Which values the fields of a Recipe may have, and which of them contradict each other.

config.py imports this file, so that it cannot import the class.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

_CHOICES = {
    "stage": ("projector", "base", "chat"),
    "template": ("plain", "vicuna_v1"),
    "image_aspect_ratio": ("pad", "crop"),
    "bits": (16, 8, 4),
    "schedule": ("cosine", "constant"),
    "optimizer": ("adamw", "adamw_8bit"),
    "precision": ("fp32", "bf16"),
    "packing": ("auto", "packed", "padded"),
    "loss_average": ("tokens", "micro_batches"),
    "sharding": ("auto", "none", "fsdp2", "zero2", "zero3"),
}
_TRACKERS = ("tensorboard", "wandb", "trackio")
# The smallest value of each number.
_MINIMUM = {"temperature": 0.1, "max_length": 2, "pack_tokens": 2}
_MINIMUM |= dict.fromkeys("num_tasks per_task num_samples max_steps".split(), 1)
_MINIMUM |= dict.fromkeys("global_batch micro_batch".split(), 1)
_MINIMUM |= dict.fromkeys("lr projector_lr epochs warmup_ratio weight_decay seed".split(), 0)
_MINIMUM |= dict.fromkeys("max_grad_norm lora_r lora_alpha lora_dropout max_bad_share".split(), 0)
_MINIMUM |= dict.fromkeys("save_every heldout_rows evaluate_every".split(), 0)


def check_fields(recipe: Any) -> None:
    """Raise ValueError if a value of a Recipe is impossible or contradicts another."""
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if problem := _invalid_value(field, value):
            raise ValueError(f"{field.name}={value!r}: {problem}")
    for problem in _contradictions(recipe):
        raise ValueError(problem)


def _invalid_value(field: dataclasses.Field, value) -> str | None:
    """What is wrong with a value by its field's type, choices and minimum; None if nothing is."""
    if field.type == tuple[str, ...]:
        is_list = isinstance(value, tuple) and all(map(_is_text, value))
        return None if is_list else "a list of texts is needed."
    if field.type is str and not _is_text(value):
        return "some text is needed."
    if field.type is bool and not isinstance(value, bool):
        return "True or False is needed."
    if field.name in _CHOICES and value not in _CHOICES[field.name]:
        return f"choose one of {', '.join(map(str, _CHOICES[field.name]))}."
    if field.name not in _MINIMUM or value is None and field.default is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN and infinity fail this comparison too.
    if not is_number or not _MINIMUM[field.name] <= value < 1e18:
        return f"a number of at least {_MINIMUM[field.name]} is needed."
    if "int" in str(field.type) and value != int(value):
        return "a whole number is needed."
    return None


def _contradictions(recipe) -> Iterator[str]:
    """A sentence for each pair of fields that cannot go together."""
    tunes_language = "language_model" in recipe.tune
    quantised = recipe.bits < 16
    if not recipe.tune or not set(recipe.tune) <= {"projector", "language_model"}:
        yield f"tune={recipe.tune}: name projector, language_model or both; the tower is frozen."
    if tunes_language and quantised and not recipe.lora_r:
        yield f"bits={recipe.bits}: a quantised language model learns only by LoRA; set lora_r."
    if (recipe.temperature or recipe.weights) and not recipe.num_samples:
        yield "temperature and task_weights share out rows: say with num_samples how many."
    if recipe.temperature and recipe.weights:
        yield "temperature and task_weights both decide the shares: give one of them."
    if recipe.lora_r and not tunes_language:
        yield f"lora_r={recipe.lora_r}: LoRA tunes the language model, which is not in tune."
    if recipe.pack_tokens and recipe.pack_tokens < recipe.max_length:
        yield (
            f"pack_tokens={recipe.pack_tokens} is below max_length={recipe.max_length}, "
            "so the longest conversation would not fit; raise it or lower max_length."
        )
    shards = recipe.sharding not in ("auto", "none")
    if shards and (quantised or recipe.optimizer == "adamw_8bit"):
        yield (
            f"sharding={recipe.sharding!r}: quantised weights and the 8-bit optimiser cannot be "
            "shared out over processes; set sharding='none', or bits=16 and optimizer='adamw'."
        )
    if not set(recipe.trackers) <= set(_TRACKERS):
        yield f"trackers={recipe.trackers}: choose among {', '.join(_TRACKERS)}."
    if recipe.evaluate_every and not recipe.heldout_rows:
        yield f"evaluate_every={recipe.evaluate_every} has no rows to measure; set heldout_rows."
    if recipe.lora_r and not recipe.lora_alpha:
        usual = 2 * recipe.lora_r
        yield f"lora_alpha is 0: LoRA would do nothing; twice lora_r is usual, {usual}."


def _is_text(value) -> bool:
    """Whether a value is text that UTF-8 and file names can hold."""
    if not isinstance(value, str):
        return False
    # UTF-8 cannot hold half a surrogate pair, and no path holds a null byte.
    return "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)
