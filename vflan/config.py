"""A recipe: everything that decides a training run, in one frozen dataclass; presets are three of them."""

import ast
import dataclasses
import difflib
import json
import os
import runpy
import subprocess
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path, PurePath
from typing import NamedTuple

_PACKAGE = Path(__file__).resolve().parent
# A wheel holds copies of the files below in vflan/shipped (setup.py); a clone has no such folder.
INSTALLED = (_PACKAGE / "shipped").is_dir()
# Where the files that come with vflan are read from. Nothing is ever written below it, unless it is ROOT, the clone.
SHIPPED = _PACKAGE / "shipped" if INSTALLED else _PACKAGE.parent
# The project folder: relative paths of recipes start here, and everything is written below it. An installed package takes
# the working directory at import, never site-packages; a clone is its own project folder, wherever Python was started.
ROOT = (
    Path(os.environ.get("VFLAN_HOME") or (Path.cwd() if INSTALLED else SHIPPED))
    .expanduser()
    .absolute()
)
if INSTALLED:
    # Child processes and notebook kernels start in other working directories, and must agree.
    os.environ["VFLAN_HOME"] = str(ROOT)
# Files and whole folders that come with vflan: patterns, relative to SHIPPED.
SHIPPED_FILES = (
    "data/*.csv",
    "data/README.md",
    "data/results",
    "data/tiny/backbones.json",
    "data/tiny/language_model",
    "data/tiny/second_language_model",
    "data/tiny/vision_tower",
    "figures/vflan.mplstyle",
    "figures/tiny_frozen",
    "notebooks",
)
CACHE = Path(
    os.environ.get("VFLAN_CACHE") or ROOT / "data" / "cache"
)  # what can be made again: Arrow tables, verdicts, features

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
_WATCHING = (
    "save_every",
    "evaluate_every",
    "trackers",
)  # what is seen of a run, not what comes out of it
_RESERVED = {
    "CON",
    "PRN",
    "AUX",
    "NUL",
    *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10)),
}
_AT_LEAST = dict(
    num_tasks=1, per_task=1, num_samples=1, max_steps=1, global_batch=1, micro_batch=1, max_length=2
)
_AT_LEAST |= dict(
    lr=0,
    projector_lr=0,
    epochs=0,
    warmup_ratio=0,
    weight_decay=0,
    max_grad_norm=0,
    lora_r=0,
    save_every=0,
)
_AT_LEAST |= dict(
    lora_alpha=0, lora_dropout=0, max_bad_share=0, seed=0, pack_tokens=2, temperature=0.1
)
_AT_LEAST |= dict(heldout_rows=0, evaluate_every=0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training stage. Paths are relative to the project folder (`ROOT`; `resolve`), absolute, or hub ids."""

    name: str  # the run folder is `runs`/`name`
    stage: str  # what it makes: projector | base | chat
    vision_tower: str
    language_model: str
    samples: str  # LLaVA json
    images: str  # folder that the samples' pictures are relative to
    runs: str  # folder of run folders
    benchmarks: str = ""
    template: str = "vicuna_v1"  # the projector stage uses `plain`: picture, caption, newline
    image_aspect_ratio: str = "pad"  # `crop` in the projector stage, as LLaVA-1.5 really did
    num_tasks: int | None = None  # of `samples`; None: all
    per_task: int | None = None
    exclude: tuple[
        str, ...
    ] = ()  # tasks left out, by name or by flag of data/tasks.csv: benchmark, overlaps, faces
    num_samples: int | None = None  # a random subset of `samples`, after the three above
    temperature: float | None = (
        None  # the tasks share `num_samples` in proportion to n ** (1 / temperature)
    )
    task_weights: tuple[
        str, ...
    ] = ()  # or to weights, "task=2"; a task that is not named has weight 1
    more_samples: tuple[
        str, ...
    ] = ()  # further sample files mixed in; "file.json#1000" takes 1000 random rows of it
    tune: tuple[str, ...] = (
        "projector",
    )  # which parts learn; the vision tower never does (paper, section 3)
    bits: int = 16  # 8 and 4: the language model is quantised (LoRA is then needed to tune it)
    lora_r: int = 0  # 0: the language model is tuned in full
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
    max_steps: int | None = None  # when given it decides, not `epochs`
    global_batch: int = 16  # samples an optimiser step, over all processes
    micro_batch: int = 16  # samples a forward pass of one process
    max_length: int = 2048  # tokens, the picture's included
    packing: str = (
        "auto"  # several conversations in a row: on CUDA (auto), always (packed), never (padded)
    )
    pack_tokens: int | None = (
        None  # the most tokens in a packed row, which replaces micro_batch; None: max_length
    )
    loss_average: str = "tokens"  # each learned token of a global batch weighs the same; LLaVA averages micro_batches
    feature_cache: bool = (
        False  # keep the vision tower's features on disk (1.2 MB a picture at 7B) for later runs
    )
    precision: str = "fp32"
    gradient_checkpointing: bool = False
    compile: bool = False  # the language model's layers by torch.compile: a minute more at the start, faster steps on a GPU
    seed: int = 0
    sharding: str = "auto"  # over several processes; auto: fsdp2 for full tuning on GPUs, else each holds the whole model
    save_every: int = 0  # steps between checkpoints to resume from; 0: none
    heldout_rows: int = 0  # rows never trained on: their loss a task, and answers to a few of them
    evaluate_every: int = 0  # steps between looks at the held-out rows; 0: one look, at the end
    trackers: tuple[
        str, ...
    ] = ()  # tensorboard, wandb, trackio; metrics.jsonl is written in any case
    max_bad_share: float = 0.01  # more bad rows than this and the run does not start

    def __post_init__(self):
        for name, field in _FIELDS.items():
            value = getattr(self, name)
            many = field.type == tuple[str, ...]
            if many and isinstance(value, (str, list)):  # lists come from json and from notebooks
                value = (value,) if isinstance(value, str) else tuple(value)
                object.__setattr__(self, name, value)
            if many and not (isinstance(value, tuple) and all(map(_is_text, value))):
                raise ValueError(f"{name}={value!r}: a list of texts is needed.")
            if field.type is str and not _is_text(value):
                raise ValueError(f"{name}={value!r}: some text is needed.")
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{name}={value!r}: True or False is needed.")
        for field, known in _CHOICES.items():
            if getattr(self, field) not in known:
                raise ValueError(
                    f"{field}={getattr(self, field)!r}: choose one of {', '.join(map(str, known))}."
                )
        for field, least in _AT_LEAST.items():
            value = getattr(self, field)
            if value is None and _FIELDS[field].default is None:
                continue
            if (
                not isinstance(value, (int, float))
                or isinstance(value, bool)
                or not least <= value < 1e18
            ):
                raise ValueError(f"{field}={value!r}: a number of at least {least} is needed.")
            if "int" in str(_FIELDS[field].type) and value != int(value):
                raise ValueError(f"{field}={value!r}: a whole number is needed.")
        folder_name(self.name)
        if not self.tune or not set(self.tune) <= {"projector", "language_model"}:
            raise ValueError(
                f"tune={self.tune}: name projector, language_model or both; the vision tower stays frozen."
            )
        if "language_model" in self.tune and self.bits < 16 and not self.lora_r:
            raise ValueError(
                f"bits={self.bits}: a quantised language model learns only through LoRA; set lora_r (64, say)."
            )
        if (self.temperature or self.weights) and not self.num_samples:
            raise ValueError(
                "temperature and task_weights share out rows: say with num_samples how many."
            )
        if self.temperature and self.weights:
            raise ValueError(
                "temperature and task_weights both decide the shares: give one of them."
            )
        if self.lora_r and "language_model" not in self.tune:
            raise ValueError(
                f"lora_r={self.lora_r}: LoRA tunes the language model; add it to tune or set lora_r=0."
            )
        if self.pack_tokens and self.pack_tokens < self.max_length:
            raise ValueError(
                f"pack_tokens={self.pack_tokens} is below max_length={self.max_length}, so the longest conversation would not fit; "
                "raise it or lower max_length."
            )
        if self.sharding not in ("auto", "none") and (
            self.bits < 16 or self.optimizer == "adamw_8bit"
        ):
            raise ValueError(
                f"sharding={self.sharding!r}: quantised weights and the 8-bit optimiser cannot be shared out over processes; "
                "set sharding='none', or bits=16 and optimizer='adamw'."
            )
        if not set(self.trackers) <= set(_TRACKERS):
            raise ValueError(f"trackers={self.trackers}: choose among {', '.join(_TRACKERS)}.")
        if self.evaluate_every and not self.heldout_rows:
            raise ValueError(
                f"evaluate_every={self.evaluate_every} has nothing to look at; set heldout_rows too."
            )
        if self.lora_r and not self.lora_alpha:
            raise ValueError(
                f"lora_alpha is 0: LoRA would do nothing; {2 * self.lora_r} (twice lora_r) is usual."
            )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return output_path(self.runs) / self.name

    @property
    def weights(self) -> dict[str, float]:
        """`task_weights` as numbers."""
        return dict(map(_weight, self.task_weights))

    def to_dict(self) -> dict:
        """The fields as recipe.json holds them: tuples become lists."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_dict(cls, values: dict) -> "Recipe":
        """The recipe of a recipe.json; ValueError for a field that Recipe does not have."""
        _known(values)
        if lacking := [name for name in _FIELDS if name not in DEFAULTS and name not in values]:
            raise ValueError(f"A recipe needs {', '.join(lacking)}; recipe.json lacks it.")
        return cls(**values)


_FIELDS = {field.name: field for field in dataclasses.fields(Recipe)}
DEFAULTS = {
    name: field.default
    for name, field in _FIELDS.items()
    if field.default is not dataclasses.MISSING
}
DEFAULTS = json.loads(json.dumps(DEFAULTS))  # as they stand in a recipe.json


class Preset(NamedTuple):
    """The three stages, in the order they are trained."""

    projector: Recipe
    base: Recipe
    chat: Recipe


def one_recipe(recipe) -> None:
    """TypeError, with what to write, where a whole preset or something else stands in place of a recipe."""
    if isinstance(recipe, Preset):
        raise TypeError(
            "This is a preset, three recipes: give one of them, preset.projector, preset.base or preset.chat."
        )
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"This takes a vflan.Recipe, not {type(recipe).__name__}; vflan.preset('tiny').base is one."
        )


def replace(recipe: Recipe, **changes) -> Recipe:
    """The recipe with some fields changed; a sweep is plain Python around it."""
    _known(changes)
    return dataclasses.replace(recipe, **changes)


def for_seed(recipe: Recipe, seed: int) -> Recipe:
    """The recipe with another seed, under a name that tells: `base` is the run of seed 0, `base-seed1` of seed 1."""
    return replace(
        recipe, seed=seed, name=recipe.name if seed == 0 else f"{recipe.name}-seed{seed}"
    )


def preset(name: str, changes: dict | str = "{}", /, **more) -> Preset:
    """The three recipes of a preset: a name in `vflan/presets`, or the path of a .py file that defines `preset()`.

    `changes` and `more` are Recipe fields and go to all three stages. `changes` may be a text, as `papermill -p` passes it.
    """
    changes = read_changes(changes) | more
    for field in {"name", "stage"} & changes.keys():
        raise ValueError(
            f"{field}={changes[field]!r}: the three stages cannot share one; change it with replace()."
        )
    if str(name).endswith(".py"):
        path = Path(name) if Path(name).exists() else resolve(name)
        if not path.exists():
            raise FileNotFoundError(
                f"{name}: no such preset file; copy one of vflan/presets and point to it."
            )
        try:
            make = runpy.run_path(str(path)).get("preset")
        except (Exception, SystemExit) as trouble:  # it is code of somebody's own
            raise ValueError(
                f"{name} cannot be run: {type(trouble).__name__}: {trouble}"
            ) from trouble
        if not callable(make):
            raise ValueError(
                f"{name} defines no preset(); see vflan/presets/tiny.py for the shape."
            )
    elif name in (known := preset_names()):
        make = import_module(f"vflan.presets.{name}").preset
    else:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(
            f"There is no preset {name!r}{hint}; known ones are {', '.join(known)}, or give a .py file of your own."
        )
    try:
        recipes = list(make())
    except (Exception, SystemExit) as trouble:
        raise ValueError(
            f"preset() of {name} fails: {type(trouble).__name__}: {trouble}"
        ) from trouble
    if len(recipes) != 3 or not all(isinstance(recipe, Recipe) for recipe in recipes):
        raise ValueError(
            f"preset() of {name} must return three recipes: projector, base, chat; see vflan/presets/tiny.py."
        )
    return Preset(*(replace(recipe, **changes) for recipe in recipes))


def read_changes(changes: dict | str | None) -> dict:
    """Recipe fields and their values, from a dict or from its text; ValueError for a field that Recipe does not have."""
    if isinstance(changes, str):
        text, changes = changes, read_value(changes or "{}")
        if isinstance(changes, str):
            raise ValueError(f"changes={text!r} is no json; write it as '{{\"max_steps\": 40}}'.")
    changes = {} if changes is None else changes
    _known(changes)
    return changes


def read_value(text: str):
    """The value that a text shows, in json or as Python writes it; the text itself where it shows none."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return text


def preset_names() -> list[str]:
    return sorted(
        p.stem for p in (Path(__file__).parent / "presets").glob("*.py") if p.stem != "__init__"
    )


def differences(old: dict, new: dict) -> str:
    """The fields that make two recipes (as dicts) two runs, one line each; a field that one lacks has its default."""
    old, new = (json.loads(json.dumps({**DEFAULTS, **values})) for values in (old, new))
    keys = [key for key in {**old, **new} if key not in _WATCHING]
    return "\n".join(
        f"  {key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in keys
        if old.get(key) != new.get(key)
    )


def folder_name(name: str, what: str = "name") -> str:
    """`name`, if it is one plain folder name on every system; else ValueError, which says what is wrong with it.

    Letters of any script are welcome. Not allowed: path separators, `.` and `..`, control and
    direction characters, what Windows drops or reserves, over 100 characters or 200 bytes.
    """
    trouble = None
    if not isinstance(name, str) or not name:
        trouble = "some text is needed"
    elif bad := next((c for c in name if c in '/\\:*?"<>|' or not c.isprintable()), None):
        trouble = f"it holds the character {ascii(bad)}"
    elif name != name.strip() or name.startswith(".") or name.endswith("."):
        trouble = "it begins or ends with a dot or a space"
    elif len(name) > 100 or len(name.encode()) > 200:
        trouble = f"it has {len(name)} characters ({len(name.encode())} bytes), more than 100 (200)"
    elif name.split(".")[0].rstrip().upper() in _RESERVED:
        trouble = "Windows reserves it"
    if trouble:
        raise ValueError(
            f"{what}={name!r}: it becomes a folder, so it must be one plain folder name; {trouble}."
        )
    return name


def resolve(path: str | os.PathLike) -> Path:
    """The absolute path to read a recipe's path from: a relative one below `ROOT`, or, when it is not there and comes
    with vflan (`SHIPPED_FILES`), below `SHIPPED`. Write to `output_path` instead.
    """
    path = Path(path).expanduser()
    own = ROOT / path
    if ROOT == SHIPPED or own.exists() or not _is_shipped(path):
        return own
    return SHIPPED / path


def output_path(path: str | os.PathLike) -> Path:
    """The absolute path to write to: a relative one below `ROOT`, never among the files that come with vflan."""
    return ROOT / Path(path).expanduser()


def _is_shipped(path: PurePath) -> bool:
    """Whether a relative path is matched by `SHIPPED_FILES`, or lies in a folder that is."""
    if path.is_absolute() or ".." in path.parts:
        return False
    # fnmatch's * also matches a slash, so the depths have to agree as well
    return any(
        fnmatchcase(place.as_posix(), pattern) and len(place.parts) == pattern.count("/") + 1
        for place in (path, *path.parents)
        for pattern in SHIPPED_FILES
    )


def output_folder(album: str | os.PathLike, kind: str) -> Path:
    """The folder `figures` or `results` of what the notebooks make, in runs/<album>; it is made where it is missing.

    album: the name of a preset, or a folder of runs: `resolve(p.base.runs)`, which `changes` may have set.
    """
    folder = resolve("runs") / album / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def shown(path: Path) -> str:
    """A path as a person should read it: relative to the project folder when it lies there."""
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def read_json(path: Path) -> dict:
    """What a json file of ours holds, {} where there is none; ValueError for one that is damaged."""
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


def write_json(path: Path, value) -> None:
    """Whole or not at all: a reader never sees half a file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with scratch.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def commit() -> str:
    """The commit of vflan's clone, `+` behind it where tracked files were changed since; empty for an installed package."""
    if INSTALLED:
        return ""  # the working directory may lie in a repository too, but in somebody else's
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        told = subprocess.run(command, cwd=SHIPPED, capture_output=True, text=True)
    except OSError:  # no git here
        return ""
    return told.stdout.strip()


def weights_source(path: str) -> str:
    """A folder when it is there, else the hub id; a folder of ours that is missing is an error, not a download."""
    if resolve(path).exists():
        return str(resolve(path))
    if Path(path).is_absolute() or path.startswith(("data/", "runs/", ".")) or path.count("/") > 1:
        raise FileNotFoundError(
            f"{path}: no such folder; data/README.md says where the backbones come from."
        )
    return path


def _weight(entry: str) -> tuple[str, float]:
    task, equals, weight = entry.rpartition("=")
    try:
        return task, float(weight if equals else "")
    except ValueError:
        raise ValueError(
            f"task_weights={entry!r}: write it as task=weight, VQAv2=2 for example."
        ) from None


def _is_text(value) -> bool:
    """Whether a value can stand in a recipe.json as text: half a surrogate pair cannot, and no path holds a null byte."""
    return (
        isinstance(value, str)
        and "\0" not in value
        and not any("\ud800" <= c <= "\udfff" for c in value)
    )


def _known(names) -> None:
    if not isinstance(names, dict):
        raise ValueError(
            f"A recipe is a table of fields and values, not {type(names).__name__}; see vflan/presets."
        )
    for name in names:
        if name not in _FIELDS:
            near = difflib.get_close_matches(name, _FIELDS, n=1, cutoff=0.0)
            raise ValueError(f"Recipe has no field {name!r}; the closest is {near[0]!r}.")
