"""Cached answers know their model by every byte of its files."""

import os

import pytest

from vflan.evaluation.answer_cache import hash_weights

MEGABYTE = 1 << 20


@pytest.mark.parametrize("size", [100, 3 * MEGABYTE, 40 * MEGABYTE + 123])
def test_one_changed_byte_anywhere_changes_the_hash(tmp_path, size):
    """Of a file larger than 17 MB, earlier versions read 17 pieces."""
    model = tmp_path / "model"
    model.mkdir()
    file, places = model / "model.safetensors", [0, size // 3, size // 2 + 7, size - 1]
    # 1.5 MB after the start lies between two of those pieces.
    places += [3 * MEGABYTE // 2] if size > 2 * MEGABYTE else []
    hashes = set()
    for time, place in enumerate([None, *places]):
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        file.write_bytes(content)
        # Two writes may come within one tick of the file system's clock.
        os.utime(file, ns=(time, time))
        hashes.add(hash_weights(model))
    assert len(hashes) == 1 + len(places)


def test_the_hash_of_a_small_file_is_that_of_earlier_versions(tmp_path):
    (tmp_path / "model").mkdir()
    content = bytes(range(256)) * 12_345
    (tmp_path / "model" / "model.safetensors").write_bytes(content)
    assert hash_weights(tmp_path / "model") == "b55c6980e709141e"
