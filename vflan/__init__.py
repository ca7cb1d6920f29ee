"""Vision-Flan and its two-stage visual instruction tuning (Xu et al., 2024), from raw samples to figures.

Names are looked up on first use, so that `import vflan` takes milliseconds and the figures need no torch.
"""

import sys
from importlib import import_module
from types import ModuleType

_HOME = {
    "recipe": ["preset", "Recipe", "replace"],
    "samples": ["load_samples", "save_samples"],
    "mixtures": ["mix", "diverse"],
    "llava_mixture": ["llava_mixture"],
    "checks": ["check"],
    "fetch": ["fetch"],
    "conversation": ["encode"],
    "model": ["load_model", "parts", "swap_part"],
    "runs": ["Run"],
    "plan": ["plan"],
    "train": ["train"],
    "answers": ["answer"],
    "served": ["ServedModel"],
    "evaluate": ["evaluate"],
    "sweeps": ["sweep", "Arm", "Swap"],
    "benchmarks": ["BENCHMARKS"],
}
_MODULES = ("plots", "world", "stats", "judge", "widgets", "claims")
_WHERE = {name: module for module, names in _HOME.items() for name in names}
__all__ = [*_WHERE, *_MODULES]


def __getattr__(name):
    if name in _WHERE:
        value = getattr(import_module(f"vflan.{_WHERE[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"vflan.{name}")
    else:
        raise AttributeError(f"vflan has no {name!r}; it has {', '.join(__all__)}")
    globals()[name] = value
    return value


def __dir__():
    return __all__


class _Package(ModuleType):
    """vflan.train is the function `train`, also after something has imported the file of that name."""

    def __setattr__(self, name, value):
        if not (name in _WHERE and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
