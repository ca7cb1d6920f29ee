"""The parameters of the notebooks: texts become values, and a value of the wrong kind is refused in one sentence."""

from vflan.config import read_changes, read_value

# name: (what it has to be, in words, and as a test). A notebook's own parameter that is not here is taken as it is.
_COUNT = "a whole number of at least 1", lambda value: _is_whole(value, 1)
_COUNTS = "a list of whole numbers of at least 1", lambda value: _all_whole(value, 1)
_SOME = "a whole number of at least 1, or None", lambda value: value is None or _is_whole(value, 1)
_TEXT = "a text", lambda value: isinstance(value, str)
KINDS = {
    "preset": _TEXT,
    "num_processes": _COUNT,
    "samples": _TEXT,
    "images": _TEXT,
    "seeds": (
        "a list of different whole numbers, [0, 1] for instance",
        lambda value: _all_whole(value, 0) and len(set(value)) == len(value),
    ),
    "jobs": _SOME,
    "budget": _SOME,
    "budgets": _COUNTS,
    "num_tasks": _COUNTS,
    "instances": _COUNTS,
    "often": _COUNT,
    "beyond": ("True or False", lambda value: isinstance(value, bool)),
    "live": ('"small" or "all"', lambda value: value in ("small", "all")),
    "other_language_model": (
        "a folder, a hub id or None",
        lambda value: value is None or isinstance(value, str),
    ),
}
_TEXTS = ("preset", "samples", "images", "live")


def checked(**values) -> list:
    """The values of notebook parameters in the order given, as the notebook needs them.

    A text, as `papermill -r` or a shell passes it, is read as the value that it shows: "2" is 2, "[0, 1]" a list.
    ValueError for a value of the wrong kind, and for a field that Recipe lacks in `changes`.
    """
    return [_checked(name, value) for name, value in values.items()]


def _checked(name, value):
    if name == "changes":
        return read_changes(value)
    if isinstance(value, str) and name not in _TEXTS:
        value = read_value(value)
    needs, fits = KINDS.get(name, ("", lambda value: True))
    if name == "seeds" and _is_whole(value, 0):
        value = [value]
    if not fits(value):
        raise ValueError(f"{name}={value!r}: {needs} is needed.")
    return list(value) if isinstance(value, tuple) else value


def _is_whole(value, least):
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _all_whole(value, least):
    many = isinstance(value, (list, tuple)) and len(value)
    return bool(many) and all(_is_whole(each, least) for each in value)
