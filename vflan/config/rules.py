"""Which values the fields of a Recipe may have, and which of them contradict each other.

`vflan.config` imports this file, so that it cannot import the class. A value of a wrong type,
beyond its range, or without sense is refused in one sentence when a Recipe is made: before anything
is read.
"""

import dataclasses
import re
import unicodedata
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
    "device": ("auto", "cpu"),
    "packing": ("auto", "packed", "padded"),
    "loss_average": ("tokens", "micro_batches"),
    "sharding": ("auto", "none", "fsdp2", "zero2", "zero3"),
}
_TRACKERS = ("tensorboard", "wandb", "trackio")
# The smallest and the largest value of each number. What is larger is a slip of the keyboard: no
# paper comes near, and most of it would fill the memory before it fails.
_RANGES = {"temperature": (0.1, 10**18), "seed": (0, 10**18), "epochs": (0, 10**6)}
_RANGES |= dict.fromkeys("num_tasks per_task num_samples".split(), (1, 10**8))
_RANGES |= {"max_steps": (1, 10**9), "heldout_rows": (0, 10**8)}
_RANGES |= dict.fromkeys("save_every evaluate_every".split(), (0, 10**9))
_RANGES |= dict.fromkeys("global_batch micro_batch".split(), (1, 10**5))
_RANGES |= {"max_length": (2, 10**6), "pack_tokens": (2, 10**7)}
_RANGES |= {"lora_r": (0, 4096), "lora_alpha": (0, 10**5), "lora_dropout": (0, 0.99)}
_RANGES |= dict.fromkeys("lr projector_lr weight_decay".split(), (0, 10))
_RANGES |= dict.fromkeys("warmup_ratio max_bad_share".split(), (0, 1))
_RANGES |= {"max_grad_norm": (0, 10**6), "max_pixels": (1, 178_000_000)}  # Pillow's own limit
_LONGEST = 4000  # characters of a text: Linux allows a path 4,096 bytes
_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL"}
_WINDOWS_DEVICES |= {f"{port}{number}" for port in ("COM", "LPT") for number in range(1, 10)}


def plain_value(field: dataclasses.Field, value: Any) -> Any:
    """A field's value as recipe.json can hold it: a tuple of texts, Python's own numbers."""
    # JSON and notebooks give lists, or one text in place of a list of one.
    if field.type == tuple[str, ...] and isinstance(value, (str, list)):
        return (value,) if isinstance(value, str) else tuple(value)
    # A number of NumPy or PyTorch, such as each one of np.arange(3).
    return value.item() if getattr(value, "shape", None) == () else value


def check_fields(recipe: Any) -> None:
    """Raise ValueError if a value of a Recipe is impossible or contradicts another."""
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        if problem := _invalid_value(field, value):
            raise ValueError(f"{field.name}={in_brief(value)}: {problem}")
    for problem in _contradictions(recipe):
        raise ValueError(problem)


def in_brief(value: Any) -> str:
    """A value for a message: in one line, of at most 100 characters, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    # Some values have no text: a whole number of 5,000 digits, an object whose repr() fails.
    except Exception:
        text = f"a value of the type {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def folder_name(name: str, what: str = "name") -> str:
    """`name`, if it is a plain folder name on every system; else ValueError says why it is not.

    Letters of any script are allowed. Not allowed: path separators, `.` and `..`, control and
    direction characters, what Windows drops or reserves, over 100 characters or 200 bytes.
    """
    problem = None
    if not isinstance(name, str) or not name:
        problem = "some text is needed"
    elif bad := next((c for c in name if c in '/\\:*?"<>|' or not c.isprintable()), None):
        problem = f"it holds the character {ascii(bad)}"
    elif name != name.strip() or name.startswith(".") or name.endswith("."):
        problem = "it begins or ends with a dot or a space"
    elif len(name) > 100 or len(name.encode()) > 200:
        problem = f"it has {len(name)} characters ({len(name.encode())} bytes), more than 100 (200)"
    elif name.split(".")[0].rstrip().upper() in _WINDOWS_DEVICES:
        problem = "Windows reserves it"
    if problem:
        raise ValueError(
            f"{what}={in_brief(name)}: it becomes a folder, so it must be one plain folder name; "
            f"{problem}."
        )
    return name


def _invalid_value(field: dataclasses.Field, value) -> str | None:
    """What is wrong with a value by its field's type, choices and range; None if nothing is."""
    if field.type == tuple[str, ...]:
        if not isinstance(value, tuple) or not all(isinstance(text, str) for text in value):
            return "a list of texts is needed."
        return next(filter(None, map(_invalid_text, value)), None)
    if field.type is str and (problem := _invalid_text(value)):
        return problem
    if field.type is bool and not isinstance(value, bool):
        return "True or False is needed."
    if choices := _CHOICES.get(field.name):
        # 16.0 and True are equal to whole numbers.
        chosen = type(value) is type(choices[0]) and value in choices
        return None if chosen else f"choose one of {', '.join(map(str, choices))}."
    if field.name not in _RANGES or value is None and field.default is None:
        return None
    low, high = _RANGES[field.name]
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN fails this comparison too.
    if not is_number or not low <= value <= high:
        return f"a number of at least {low} and at most {high:,} is needed."
    # 2.0 too: a loop over it would fail later.
    if "int" in str(field.type) and not isinstance(value, int):
        return "a whole number is needed."
    return None


def _invalid_text(value) -> str | None:
    """What is wrong with a text that files and messages have to hold; None if nothing is."""
    if not isinstance(value, str):
        return "some text is needed."
    if len(value) > _LONGEST:
        return f"text of at most {_LONGEST:,} characters is needed."
    # Cc: a null byte, which no path can hold, or a new line, which no message can. Cs: half a
    # surrogate pair, which UTF-8 cannot hold.
    bad = next((c for c in value if unicodedata.category(c) in ("Cc", "Cs")), None)
    if bad:
        return f"text without the character {ascii(bad)} is needed."
    # No disk holds a longer name of a file or folder.
    longest = max(len(part.encode()) for part in value.split("/"))
    return "a name of at most 255 bytes between slashes is needed." if longest > 255 else None


def _contradictions(recipe) -> Iterator[str]:
    """A sentence for each entry that cannot be read, and each pair that cannot go together."""
    tunes_language = "language_model" in recipe.tune
    quantised = recipe.bits < 16
    tune, trackers = in_brief(recipe.tune), in_brief(recipe.trackers)
    if not recipe.tune or not set(recipe.tune) <= {"projector", "language_model"}:
        yield f"tune={tune}: name projector, language_model or both; the tower is frozen."
    if tunes_language and quantised and not recipe.lora_r:
        yield f"bits={recipe.bits}: a quantised language model learns only by LoRA; set lora_r."
    for entry in recipe.more_samples:
        if not re.fullmatch(r"[^#]+(#[1-9][0-9]{0,7})?", entry):
            yield f"more_samples={in_brief(entry)}: write it as file or file#rows, file.json#1000."
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
        yield f"trackers={trackers}: choose among {', '.join(_TRACKERS)}."
    if recipe.evaluate_every and not recipe.heldout_rows:
        yield f"evaluate_every={recipe.evaluate_every} has no rows to measure; set heldout_rows."
    if recipe.lora_r and not recipe.lora_alpha:
        usual = 2 * recipe.lora_r
        yield f"lora_alpha is 0: LoRA would do nothing; twice lora_r is usual, {usual}."
