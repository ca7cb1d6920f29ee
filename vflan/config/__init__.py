"""A Recipe holds everything that decides a training run; a preset is three of them.

This file also knows the project folder, and reads and writes the small JSON files of runs.
"""

import ast
import dataclasses
import difflib
import html
import json
import os
import subprocess
from collections.abc import Callable
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path, PurePath
from typing import Any, NamedTuple, Self

from vflan.config.preset_file import run_preset_file
from vflan.config.rules import check_fields, folder_name, in_brief, plain_value

_PACKAGE = Path(__file__).resolve().parents[1]
# A wheel holds copies of the files below in vflan/shipped (setup.py); a clone has no such folder.
INSTALLED = (_PACKAGE / "shipped").is_dir()
# Files that come with vflan are read from here. Only in a clone is anything written below it.
SHIPPED = _PACKAGE / "shipped" if INSTALLED else _PACKAGE.parent
if INSTALLED and not os.environ.get("VFLAN_HOME"):
    os.environ["VFLAN_HOME"] = str(Path.cwd())
# Child processes and notebook kernels start in other working directories, and must agree.
for _name in ("VFLAN_HOME", "VFLAN_CACHE"):
    if _folder := os.environ.get(_name):
        os.environ[_name] = str(Path(_folder).expanduser().absolute())
# The project folder: relative paths start here, and everything is written below it. A clone is its
# own project folder; an installed package takes the working directory at import.
ROOT = Path(os.environ.get("VFLAN_HOME") or SHIPPED)
# Files and whole folders that come with vflan: patterns, relative to SHIPPED.
SHIPPED_FILES = (
    *("data/*.csv", "data/README.md", "data/results", "data/tiny/backbones.json"),
    *("data/tiny/language_model", "data/tiny/second_language_model"),
    *("data/tiny/vision_tower", "data/tiny/projector"),
    *("figures/vflan.mplstyle", "figures/tiny_frozen", "notebooks"),
)
# What can be computed again: Arrow tables, verdicts of judges, image features.
CACHE = Path(os.environ.get("VFLAN_CACHE") or ROOT / "data" / "cache")

# Fields that say how a run is watched or begun, and do not change what comes out of it.
# `max_bad_share` only decides whether a run starts: a finished one stays as it is.
_MONITORING = ("save_every", "evaluate_every", "trackers", "max_bad_share")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training stage. A path is relative to the project folder `ROOT`, absolute, or a hub id.

    ValueError says in one sentence which value is impossible, or which two contradict each other.
    """

    name: str  # of the run folder, `runs`/`name`
    stage: str  # projector, base or chat: what the run makes
    vision_tower: str
    language_model: str
    samples: str  # training data as LLaVA JSON
    images: str  # the folder that the paths of its pictures are relative to
    runs: str  # the folder of all run folders
    benchmarks: str = ""  # the folder of all benchmarks
    template: str = "vicuna_v1"  # the projector stage uses `plain`: picture, caption, newline
    image_aspect_ratio: str = "pad"  # `crop` in the projector stage, as LLaVA-1.5 really did
    num_tasks: int | None = None  # how many tasks of `samples` to take; None: all
    per_task: int | None = None  # samples of each task
    # Tasks to leave out, by name or by flag of data/tasks.csv: benchmark, overlaps, faces.
    exclude: tuple[str, ...] = ()
    num_samples: int | None = None  # a random subset of `samples`, after the three fields above
    # How the tasks share `num_samples`: in proportion to n ** (1 / temperature), or to weights
    # such as "task=2". A task that is not named has weight 1.
    temperature: float | None = None
    task_weights: tuple[str, ...] = ()
    # Further sample files to mix in; "file.json#1000" takes 1000 random rows of it.
    more_samples: tuple[str, ...] = ()
    # Of a projector stage: a projector of the same shape that was trained longer, as LLaVA's
    # mm_projector.bin. Where nothing else is said, notebooks start Base from it, as the paper does.
    pretrained: str = ""
    # Which parts learn. The vision tower never does (paper, section 3).
    tune: tuple[str, ...] = ("projector",)
    bits: int = 16  # 8 or 4 quantises the language model; LoRA is then needed to tune it
    lora_r: int = 0  # LoRA's rank; 0: the language model is tuned in full
    lora_alpha: float = 0
    lora_dropout: float = 0.0
    lr: float = 1e-3
    projector_lr: float | None = None  # None: `lr`
    schedule: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0  # 0: no clipping, as published
    optimizer: str = "adamw"
    epochs: float = 1.0
    max_steps: int | None = None  # takes the place of `epochs` where it is given
    global_batch: int = 16  # samples of an optimiser step, over all processes
    micro_batch: int = 16  # samples of a forward pass of one process
    max_length: int = 2048  # tokens of a conversation, the picture's included
    # Whether several conversations share a row: on CUDA (auto), always (packed), never (padded).
    packing: str = "auto"
    # Tokens of a packed row at most, in place of micro_batch; None: max_length.
    pack_tokens: int | None = None
    # `tokens`: each learned token of a global batch weighs the same. LLaVA averages micro_batches.
    loss_average: str = "tokens"
    # Keep the vision tower's features on disk for later runs (1.2 MB a picture at 7B).
    feature_cache: bool = False
    precision: str = "fp32"
    # auto: a GPU if PyTorch can use one, which `precision="bf16"` needs. cpu: the CPU, in fp32.
    device: str = "auto"
    gradient_checkpointing: bool = False
    # torch.compile for the language model: a minute more at the start, faster steps on a GPU.
    compile: bool = False
    seed: int = 0
    # Over several processes. auto: fsdp2 for full tuning on GPUs, else each holds the whole model.
    sharding: str = "auto"
    save_every: int = 0  # steps between checkpoints to resume from; 0: none
    # Rows never trained on: their loss is measured by task, and a few of them are answered.
    heldout_rows: int = 0
    evaluate_every: int = 0  # steps between measurements on held-out rows; 0: one, at the end
    trackers: tuple[str, ...] = ()  # tensorboard, wandb, trackio, beside metrics.jsonl
    max_bad_share: float = 0.01  # the run does not start if a larger share of its rows is bad
    # A row whose picture has more pixels is bad; of a JPEG with more, a smaller picture is decoded.
    max_pixels: int = 40_000_000

    def __post_init__(self):
        for name, field in _FIELDS.items():
            object.__setattr__(self, name, plain_value(field, getattr(self, name)))
        check_fields(self)
        folder_name(self.name)

    def _repr_html_(self) -> str:
        return _html_table([self])

    @property
    def folder(self) -> Path:
        """The run folder."""
        return output_path(self.runs) / self.name

    @property
    def weights(self) -> dict[str, float]:
        """`task_weights` as numbers."""
        return dict(map(_task_weight, self.task_weights))

    def to_dict(self) -> dict[str, Any]:
        """The fields as recipe.json holds them: tuples become lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The recipe of a recipe.json; ValueError for a field that Recipe does not have."""
        _check_names(values)
        if missing := [name for name in _FIELDS if name not in DEFAULTS and name not in values]:
            raise ValueError(f"A recipe needs {', '.join(missing)}; recipe.json lacks it.")
        return cls(**values)


_FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
_OPTIONAL = [field for field in _FIELDS.values() if field.default is not dataclasses.MISSING]
# As a recipe.json holds them, with lists in place of tuples.
DEFAULTS = json.loads(json.dumps({field.name: field.default for field in _OPTIONAL}))


class Preset(NamedTuple):
    """The three stages, in the order they are trained."""

    projector: Recipe
    base: Recipe
    chat: Recipe

    def _repr_html_(self) -> str:
        return _html_table(self)


def _html_table(recipes) -> str:
    """A column for each recipe, and a row for each field that differs from its default in one."""
    columns = [recipe.to_dict() for recipe in recipes]
    lines = [["stage", *(column.pop("stage") for column in columns)]]
    for name in columns[0]:
        values = [column[name] for column in columns]
        if name not in DEFAULTS or any(value != DEFAULTS[name] for value in values):
            joined = [", ".join(value) if isinstance(value, list) else value for value in values]
            lines.append([name, *joined])
    cells = ["".join(f"<td>{html.escape(str(text))}</td>" for text in line) for line in lines]
    rows = "".join(f"<tr>{row}</tr>" for row in cells)
    return f"<table><caption>All other fields have their defaults.</caption>{rows}</table>"


def one_recipe(recipe: Any) -> None:
    """Raise TypeError, with what to write, where a preset or something else is no recipe."""
    if isinstance(recipe, Preset):
        raise TypeError(
            "This is a preset, three recipes: give one of them, "
            "preset.projector, preset.base or preset.chat."
        )
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"This takes a vflan.Recipe, not {type(recipe).__name__}; "
            "vflan.preset('tiny').base is one."
        )


def replace(recipe: Recipe, **changes: Any) -> Recipe:
    """The recipe with some fields changed; a sweep is plain Python around it."""
    one_recipe(recipe)
    _check_names(changes)
    return dataclasses.replace(recipe, **changes)


def for_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another seed: `base` names the run of seed 0, `base-seed1` that of seed 1."""
    name = recipe.name if seed == 0 else f"{recipe.name}-seed{seed}"
    return replace(recipe, seed=seed, name=name)


def preset(name: str, changes: dict[str, Any] | str = "{}", /, **more: Any) -> Preset:
    """The three recipes of a preset.

    name: a file of `vflan/presets`, or the path of a .py file that defines `preset()`.
    changes, more: Recipe fields, for all three stages. `changes` may be JSON text, as
    `papermill -p` passes it.
    """
    changes = read_changes(changes) | more
    for field in {"name", "stage"} & changes.keys():
        raise ValueError(
            f"{field}={in_brief(changes[field])}: the three stages cannot share one; "
            "change it with replace()."
        )
    if str(name).endswith(".py"):
        recipes = [Recipe.from_dict(values) for values in run_preset_file(_preset_path(name))]
    else:
        recipes = _known_preset(name)()
    return Preset(*(replace(recipe, **changes) for recipe in recipes))


def _preset_path(name: str) -> Path:
    """The absolute path of a .py file, in the working directory or in the project folder."""
    try:
        path = next(path for path in (Path(name), resolve(name)) if os.path.lexists(path))
    # Nothing is there, or the name is too long or holds a null byte.
    except (StopIteration, OSError, ValueError):
        raise FileNotFoundError(
            f"{in_brief(str(name))}: no such preset file; "
            "copy one of vflan/presets and point to it."
        ) from None
    return path.absolute()


def _known_preset(name: str) -> Callable:
    """The function `preset` of a file in vflan/presets."""
    known = preset_names()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"There is no preset {in_brief(name)}{hint}; known ones are {', '.join(known)}, "
            "or give a .py file of your own."
        )
    return import_module(f"vflan.presets.{name}").preset


def read_changes(changes: dict[str, Any] | str | None) -> dict[str, Any]:
    """Recipe fields and their values, from a dict or its text; ValueError for an unknown field."""
    if isinstance(changes, str):
        text, changes = changes, read_value(changes or "{}")
        if isinstance(changes, str):
            problem = "is no json; write it as '{\"max_steps\": 40}'."
            raise ValueError(f"changes={in_brief(text)} {problem}")
    changes = {} if changes is None else changes
    _check_names(changes)
    return changes


def read_value(text: str) -> Any:
    """The value of a text in JSON or Python syntax; the text itself if it is neither."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        # TypeError: a list as a key, which Python cannot have.
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def preset_names() -> list[str]:
    """The presets that come with vflan."""
    names = {path.stem for path in (_PACKAGE / "presets").glob("*.py")}
    return sorted(names - {"__init__"})


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The fields that make two recipes (as dicts) two runs, one line each.

    A field that one of them lacks has its default.
    """
    old, new = (json.loads(json.dumps({**DEFAULTS, **values})) for values in (old, new))
    names = [name for name in {**old, **new} if name not in _MONITORING]
    changed = [name for name in names if old.get(name) != new.get(name)]
    return "\n".join(f"  {name}: {old.get(name)!r} -> {new.get(name)!r}" for name in changed)


def resolve(path: str | os.PathLike) -> Path:
    """The absolute path to read from. To write, take `output_path`.

    A relative path starts at `ROOT`. If nothing is there and the file comes with vflan
    (`SHIPPED_FILES`), it starts at `SHIPPED`.
    """
    path = _expanded(path)
    in_project = ROOT / path
    if ROOT == SHIPPED or in_project.exists() or not _is_shipped(path):
        return in_project
    return SHIPPED / path


def output_path(path: str | os.PathLike) -> Path:
    """The absolute path to write to: a relative one starts at `ROOT`, never among shipped files."""
    return ROOT / _expanded(path)


def _expanded(path: str | os.PathLike) -> Path:
    """A path with `~` replaced; ValueError for a user that this machine does not have."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0]
        raise ValueError(
            f"{in_brief(str(path))}: {user} is the home of nobody here; write ./{user} "
            "for a folder of that name."
        ) from None


def _is_shipped(path: PurePath) -> bool:
    """Whether `SHIPPED_FILES` matches a relative path, or a folder above it."""
    if path.is_absolute() or ".." in path.parts:
        return False
    # fnmatch's * also matches a slash, so the depths have to agree as well.
    return any(
        fnmatchcase(place.as_posix(), pattern) and len(place.parts) == pattern.count("/") + 1
        for place in (path, *path.parents)
        for pattern in SHIPPED_FILES
    )


def output_folder(album: str | os.PathLike, kind: str) -> Path:
    """The folder runs/<album>/<kind> of what notebooks write; it is made if it is missing.

    album: the name of a preset, or a folder of runs: `resolve(p.base.runs)`, which `changes` may
    have set. kind: figures or results.
    """
    folder = resolve("runs") / album / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shown(path: Path) -> str:
    """A path for messages: relative to the project folder if it is inside."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that vflan wrote, {} if there is no file; ValueError if damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(
            f"{shown(path)} is damaged: put back a whole copy, or delete it and what it belongs to."
        )
    return value


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file by renaming, so that a reader never sees half a file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def commit() -> str:
    """The clone's commit, with `+` if tracked files have changed; "" where there is no clone."""
    # An installed package lies in no repository of ours, even if the working directory is in one.
    if INSTALLED:
        return ""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=SHIPPED, capture_output=True, text=True).stdout.strip()
    # This machine has no git.
    except OSError:
        return ""


def weights_source(path: str) -> str:
    """A folder if it exists, else a hub id. FileNotFoundError for what can only be a folder."""
    if resolve(path).exists():
        return str(resolve(path))
    if Path(path).is_absolute() or path.startswith(("data/", "runs/", ".")) or path.count("/") > 1:
        raise FileNotFoundError(
            f"{path}: no such folder; data/README.md says where the backbones come from."
        )
    return path


def _task_weight(entry: str) -> tuple[str, float]:
    task, equals, weight = entry.rpartition("=")
    try:
        number = float(weight if equals else "")
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        problem = "write it as task=weight, VQAv2=2 for example; a weight is at least 0."
        raise ValueError(f"task_weights={in_brief(entry)}: {problem}")
    return task, number


def _check_names(names) -> None:
    """Raise ValueError for a name that is no field of Recipe, with the closest one."""
    if not isinstance(names, dict):
        kind = type(names).__name__
        raise ValueError(
            f"A recipe is a table of fields and values, not {kind}; see vflan/presets."
        )
    for name in names:
        if name not in _FIELDS:
            near = difflib.get_close_matches(str(name)[:100], _FIELDS, n=1, cutoff=0.0)
            raise ValueError(f"Recipe has no field {in_brief(name)}; the closest is {near[0]!r}.")
