"""Samples on disk: every released format, read once into an Arrow table that later opens map into memory."""

import codecs
import glob
import hashlib
import json
import os
import posixpath
import re
import warnings
import zipfile
from functools import lru_cache
from itertools import chain, repeat
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from filelock import FileLock, Timeout

from vflan.config import CACHE
from vflan.data.conversation import IMAGE
from vflan.data.images import INSIDE, OUTSIDE
from vflan.progress import progress

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.string()),
        ("task_name", pa.string()),
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
    ]
)
_LAYOUT = 1  # of the table; another number makes every table again
_END = b"\xff\xff\xff\xff\0\0\0\0"  # how an Arrow stream that was written to its end ends
_BLOCK = 1 << 23  # bytes of json read at a time; its rows are one batch of the table


def load_samples(path: str | os.PathLike, images: str | os.PathLike | None = None) -> Dataset:
    """Samples in LLaVA's form as a memory-mapped Arrow table: a json array, json lines, or parquet.

    `path` is a file, a folder of parquet parts, or a pattern that names some of them. Columns: id, image (the string that
    `read_picture` takes, None for text-only), task_name, conversations (list of {from, value}). Pictures are looked for in `images`, a
    folder or a zip; by default in the folder `images` beside the file, in the one image*.zip there, or beside the file itself. That zip
    also stands in for a folder that was not unpacked. The first open converts into data/cache and says which picture leaves its folder;
    nothing else is judged here: see `check`.
    """
    parts, root = _parts(Path(path)), _images_root(Path(path), images)
    source = [*map(str, parts), str(root)]
    digest = hashlib.blake2b(json.dumps(source).encode(), digest_size=8).hexdigest()
    table = CACHE / "samples" / f"{parts[0].stem[:80]}-{digest}.arrow"
    state = [[status.st_size, status.st_mtime_ns] for status in map(os.stat, parts)]
    key = json.dumps([_LAYOUT, source, state]).encode()
    samples = _open(table, key)
    if samples is not None:
        return samples
    try:
        table.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(
            table.with_suffix(".lock")
        ):  # of several openers one converts and the others wait
            samples = _open(table, key)
            if samples is None:
                _convert(parts, root, key, table)
                samples = _open(table, key)
        if samples is None:
            raise OSError("what was written cannot be read back")
        return samples
    except (OSError, NotImplementedError) as trouble:  # the latter: a file system without locks
        warnings.warn(
            f"{table.parent} is of no use ({getattr(trouble, 'strerror', None) or trouble}), so {path} is held in memory; "
            "set VFLAN_CACHE to a folder with room.",
            stacklevel=2,
        )
    return Dataset(pa.Table.from_batches(_batches(parts, root), _SCHEMA))


def save_samples(rows, path: str | os.PathLike, images: str | os.PathLike | None = None) -> Path:
    """Write rows (dicts, or a Dataset) as LLaVA json, one a line of the array, whole or not at all.

    Pictures inside `images`, a folder or a zip, become relative to it.
    """
    path = Path(path)
    inside = tuple(f"{Path(images).resolve()}{mark}" for mark in (os.sep, "::")) if images else ()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(scratch, "w", encoding="utf-8") as file:
            for number, row in enumerate(rows):
                row = {key: value for key, value in row.items() if value is not None}
                name = str(row.get("image", "")).removeprefix(OUTSIDE)
                mark = next((mark for mark in inside if name.startswith(mark)), "")
                row |= {"image": name.removeprefix(mark)} if "image" in row else {}
                file.write((",\n" if number else "[\n") + json.dumps(row, ensure_ascii=False))
            file.write("\n]\n" if file.tell() else "[]\n")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return path


def texture(samples: Dataset) -> pd.DataFrame:
    """A row a sample, in their order: task_name, turns, question and answer (words of the first one of each), image.

    `image` says where the first question names its picture: first, last, inside, or none. Read in stretches, in Arrow, so
    that the full set's 1,664,261 rows take seconds and little memory; empty conversations count 0 words.
    """
    parts = []
    for batch in samples.with_format("arrow").iter(batch_size=1 << 15):
        turns = batch["conversations"].combine_chunks()
        count = pc.fill_null(pc.list_value_length(turns), 0).to_numpy()
        text = pc.utf8_trim_whitespace(pc.fill_null(pc.struct_field(turns.flatten(), "value"), ""))
        start = np.cumsum(count) - count
        asked, said = (text.take(np.clip(start + i, 0, max(0, len(text) - 1))) for i in (0, 1))
        has = pc.match_substring(asked, IMAGE)
        place = pc.if_else(
            pc.starts_with(asked, IMAGE),
            "first",
            pc.if_else(pc.ends_with(asked, IMAGE), "last", "inside"),
        )
        part = {"task_name": batch["task_name"].combine_chunks(), "turns": count}
        part["question"] = np.where(
            count > 0, pc.subtract(pc.count_substring_regex(asked, r"\S+"), has.cast("int32")), 0
        )
        part["answer"] = np.where(count > 1, pc.count_substring_regex(said, r"\S+"), 0)
        part["image"] = np.where(count > 0, pc.if_else(has, place, "none"), "none")
        parts.append(pd.DataFrame({name: np.asarray(column) for name, column in part.items()}))
    return pd.concat(parts, ignore_index=True)


# ------------------------------------------------------------------------------------------------- where things are


def _parts(path: Path) -> list[Path]:
    """The files to read, in order."""
    path = Path(
        os.path.abspath(path)
    )  # not resolved: the hub's cache holds links to files without an ending
    if path.is_file():
        return [path]
    parts = sorted(
        path.rglob("*.parquet")
        if path.is_dir()
        else map(Path, glob.glob(str(path), recursive=True))
    )
    if not parts:
        lack = "no parquet file in this folder" if path.is_dir() else "no such samples file"
        raise FileNotFoundError(
            f"{path}: {lack}; data/README.md says how to get it (tiny: notebook 01 makes it)."
        )
    splits = sorted(
        {split[0] for part in parts if (split := re.match("train|val|dev|test", part.name))}
    )
    if len(splits) > 1:
        raise ValueError(
            f"{path} holds the splits {', '.join(splits)}; name one, as in {path}/**/{splits[-1]}*.parquet."
        )
    return parts


def _images_root(path: Path, images) -> Path:
    folder = path if path.is_dir() else path.parent
    zips, beside = list(folder.glob("image*.zip")), folder / "images"
    if images is None:
        images = beside if beside.is_dir() else zips[0] if len(zips) == 1 else folder
    elif not Path(images).exists() and len(zips) == 1 and Path(images).suffix != ".zip":
        images = zips[0]  # the folder that a recipe names was never unpacked
    root = Path(images).resolve()
    if _is_zip(root) and not zipfile.is_zipfile(root):
        lack = "not a whole zip archive" if root.exists() else "no such archive"
        raise ValueError(
            f"{root}: {lack}; download it again, or name the folder it was unpacked to."
        )
    return root


def _is_zip(root: Path) -> bool:
    return root.suffix.lower() == ".zip" and not root.is_dir()


def _placing(root: Path):
    """A function from a sample's picture name to the string that `read_picture` takes; none leaves the folder or zip."""
    if _is_zip(root):

        def place(name):
            member = posixpath.normpath(name)
            leaves = member in (".", "..") or member.startswith(("/", "../"))
            return f"{OUTSIDE}{name}" if leaves else f"{root}::{member}"

        return place

    @lru_cache(maxsize=1 << 16)
    def look(folder):
        """Where a folder really is, and which names in it are links: one listing instead of a look at every picture."""
        real, links = os.path.realpath(folder), ()
        if os.path.join(real, "").startswith(base):
            try:
                with os.scandir(real) as entries:
                    links = {entry.name for entry in entries if entry.is_symlink()}
            except OSError:  # no such folder: its pictures will be found missing
                pass
        return real, links

    base = os.path.join(root, "")  # ends in a slash

    def place(name):
        if "\0" in name:
            return base + name  # no file has such a name: it will be found missing
        inside = (
            INSIDE.fullmatch(name) if "::" in name else None
        )  # as save_samples writes what lies in a container
        path = os.path.join(base, inside[1] if inside else name)
        folder, file = os.path.split(path)
        real, links = look(folder)
        path = (
            os.path.realpath(path)
            if file in links or file in ("", ".", "..")
            else os.path.join(real, file)
        )
        if not path.startswith(base):
            return f"{OUTSIDE}{name}"
        return f"{path}::{inside[3]}" if inside else path

    return place


# ------------------------------------------------------------------------------------------------------- the table


def _open(table: Path, key: bytes) -> Dataset | None:
    """The table, mapped into memory; None when there is none, when it was made from another file, or when it is damaged."""
    try:
        with open(table, "rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
                return None
        with pa.memory_map(str(table)) as file:
            if (pa.ipc.open_stream(file).schema.metadata or {}).get(b"vflan") != key:
                return None
        return Dataset.from_file(str(table))
    except (OSError, ValueError, pa.ArrowException):
        return None


def _convert(parts, root: Path, key: bytes, table: Path):
    """Write the table under another name, then rename it: a kill leaves no half table."""
    for left in table.parent.glob(
        f"*-{'[0-9a-f]' * 16}.part"
    ):  # of conversions that were killed; the lock of a living one is held
        try:
            with FileLock(left.with_suffix(".lock"), blocking=False):
                left.unlink(missing_ok=True)
        except Timeout:
            pass
    scratch = table.with_suffix(".part")
    try:
        with open(scratch, "wb") as file:
            with pa.ipc.new_stream(file, _SCHEMA.with_metadata({"vflan": key})) as writer:
                for batch in _batches(parts, root):
                    writer.write_batch(batch)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(table)
    finally:
        scratch.unlink(missing_ok=True)


def _batches(parts, root: Path):
    """The rows of all files in Arrow's form, some thousands at a time."""
    place, number = _placing(root), 0
    size = sum(part.stat().st_size for part in parts)
    with progress(f"reading {parts[0].name}", size, "B") as bar:
        for part in parts:
            with open(part, "rb") as file:
                is_parquet = file.read(4) == b"PAR1"
            done = 0
            for rows, at in _parquet(part) if is_parquet else _json(part):
                try:
                    yield _batch(rows, number, place)
                except UnicodeEncodeError:
                    yield _batch(_mended(rows), number, place)
                number += len(rows)
                bar.update(at - done)
                done = at


def _batch(rows, first: int, place) -> pa.RecordBatch:
    """Raw json objects in the four columns; what has the wrong type becomes what `check` will name."""
    ids, images, tasks, ends, roles, values = [], [], [], [0], [], []
    for number, row in enumerate(rows, first):
        row = row if isinstance(row, dict) else {}
        name, image, turns = row.get("id"), row.get("image"), row.get("conversations")
        ids.append(str(number if name is None else name))
        images.append(image if image is None or isinstance(image, _Placed) else place(str(image)))
        tasks.append(str(row.get("task_name") or ""))
        for turn in turns if isinstance(turns, list) else ():
            turn = turn if isinstance(turn, dict) else {}
            role, value = turn.get("from"), turn.get("value")
            roles.append(role if isinstance(role, str) else None)
            values.append(value if isinstance(value, str) else None)
        ends.append(len(roles))
    turns = pa.StructArray.from_arrays(
        [pa.array(roles, pa.string()), pa.array(values, pa.string())], ["from", "value"]
    )
    columns = [pa.array(column, pa.string()) for column in (ids, images, tasks)]
    columns.append(pa.ListArray.from_arrays(pa.array(ends, pa.int32()), turns))
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


class _Placed(str):
    """A picture's name that is whole already."""


def _mended(value):
    """Half surrogate pairs, which json may hold and UTF-8 may not, as U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_mended(item) for item in value]
    return (
        {_mended(key): _mended(item) for key, item in value.items()}
        if isinstance(value, dict)
        else value
    )


# ---------------------------------------------------------------------------------------------------------- reading


def _json(path: Path):
    """(some rows, bytes read so far) of a json array, or of json lines."""
    with open(path, "rb") as file:
        blocks = _texts(file, path)
        first = next((block for block in blocks if block.strip()), "")
        read = _array if first.lstrip().startswith("[") else _lines
        for rows in read(chain([first], blocks), path):
            yield rows, file.tell()


def _texts(file, path: Path):
    decoder, block = codecs.getincrementaldecoder("utf-8-sig")(), b"-"
    while block:
        block = file.read(_BLOCK)
        try:
            yield decoder.decode(block, final=not block)
        except UnicodeDecodeError as trouble:
            at = file.tell() - len(trouble.object) + trouble.start
            raise ValueError(
                f"{path} is not whole: byte {at} is not UTF-8 text; download it again."
            ) from None


_between = re.compile(r"[ \t\r\n]*").match  # white space of json


def _array(blocks, path: Path):
    """The elements of one json array, a list for each block of text; only an element that a block cuts is carried on."""
    decode = json.JSONDecoder().raw_decode
    then = {
        ("[", "["): "value or ]",
        ("value or ]", "]"): "end",
        (", or ]", ","): "value",
        (", or ]", "]"): "end",
    }
    text, at, seen, line, want = "", 0, 0, 1, "["
    for block in chain(blocks, [None]):
        seen, line = seen + at, line + text.count("\n", 0, at)  # characters and lines before `text`
        text, at, rows = text[at:] + (block or ""), 0, []
        try:
            while (at := _between(text, at).end()) < len(text):
                mark = text[at]
                if want == "value" or want == "value or ]" and mark != "]":
                    row, end = decode(text, at)
                    if (
                        end == len(text)
                        and block is not None
                        and not isinstance(row, (dict, list, str))
                    ):
                        break  # a number may go on in the next block
                    rows.append(row)
                    at, want = end, ", or ]"
                elif (want, mark) in then:
                    at, want = at + 1, then[want, mark]
                else:
                    raise json.JSONDecodeError(
                        "Extra data" if want == "end" else f"Expecting {want}", text, at
                    )
            if block is None and want != "end":
                raise json.JSONDecodeError(f"Expecting {want}", text, at)
        except (ValueError, RecursionError) as trouble:
            where = getattr(trouble, "pos", at)
            # near the end of the block, or in a string without an end, the next block may make it whole
            if block is None or not (
                where > len(text) - 16 or str(trouble).startswith("Unterminated")
            ):
                where = f"line {line + text.count(chr(10), 0, where)}, character {seen + where}"
                what = getattr(trouble, "msg", trouble)
                raise ValueError(
                    f"{path} is not whole json ({what}: {where}); download it again."
                ) from None
        yield rows


def _lines(blocks, path: Path):
    """The rows of json lines; only \\n ends a line, since answers may hold U+2028."""
    rest, number = "", 0
    for block in chain(blocks, ["\n"]):
        *lines, rest = (rest + block).split("\n")
        rows = []
        for line in lines:
            number += 1
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as trouble:
                what = getattr(trouble, "msg", trouble)
                raise ValueError(
                    f"{path}, line {number} is not json ({what}); download or write it again."
                ) from None
        yield rows


def _parquet(path: Path):
    """(some rows, bytes read so far) of a parquet file; an embedded picture is named by its row, not read."""
    import pyarrow.parquet as pq

    size, row = path.stat().st_size, 0
    try:
        with pq.ParquetFile(path) as file:
            leaves = [file.schema.column(i).path for i in range(len(file.schema))]
            kinds = {field.name: field.type for field in file.schema_arrow}
            if "conversations" not in kinds:
                raise ValueError(
                    f"{path} has no column conversations, only {', '.join(kinds)}; give a set in LLaVA's form."
                )
            binary = "image" in kinds and pa.types.is_binary(kinds["image"])
            data = "image" if binary else "image.bytes"
            image = [leaf for leaf in ("image", "image.path") if leaf in leaves and leaf != data]
            for group in range(file.num_row_groups):
                embedded = _embedded(file, group, data) if data in leaves else repeat(False)
                for batch in file.iter_batches(
                    4096, [group], ["id", "task_name", "conversations", *image]
                ):
                    rows = batch.to_pylist()
                    for sample, inside in zip(rows, embedded):
                        name = sample.get("image")
                        name = name.get("path") if isinstance(name, dict) else name
                        sample["image"] = _Placed(f"{path}::{row}") if inside else name
                        row += 1
                    yield rows, size * row // file.metadata.num_rows
    except pa.ArrowInvalid as trouble:
        raise ValueError(
            f"{path} is not a whole parquet file ({trouble}); download it again."
        ) from None


def _embedded(file, group: int, data: str):
    """Whether each row of a group holds its picture's bytes; the file's statistics mostly say so without a look at them."""
    group_of = file.metadata.row_group(group)
    column = next(
        c for c in map(group_of.column, range(group_of.num_columns)) if c.path_in_schema == data
    )
    nulls = (
        column.statistics.null_count
        if column.statistics and column.statistics.has_null_count
        else None
    )
    if nulls in (0, group_of.num_rows):
        yield from repeat(nulls == 0, group_of.num_rows)
        return
    for batch in file.iter_batches(64, [group], [data]):
        pictures = batch.column("image")
        pictures = (
            pc.struct_field(pictures, "bytes") if pa.types.is_struct(pictures.type) else pictures
        )
        yield from pictures.is_valid().to_pylist()
