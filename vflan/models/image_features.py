"""Features of pictures: the frozen vision tower sees each picture once, before it is needed."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch

from vflan.config import CACHE, Recipe, shown
from vflan.data.images import decoded, stamp
from vflan.data.limits import MAX_PIXELS
from vflan.io import is_sealed, say, seal
from vflan.models import llava as models

if TYPE_CHECKING:
    from typing import Any

    from torch import nn
    from transformers import LlavaProcessor

MAX_KEPT_BYTES = 4 << 30  # features stay in memory if those of all pictures take at most this
TOWER_BATCH = 64  # pictures that go through the tower together, whatever the micro-batch
_FEATURES: dict = {}  # {tower and preparation: {picture: features}}, shared by the runs of a sweep


class Pictures:
    """Features of the pictures in a batch: (pictures, patches, width), or None for text only.

    The tower is frozen, so each picture needs one pass. Questions about the same picture in a step
    share it. The features of a small set stay in memory for later epochs and runs; with
    `feature_cache` they are stored on disk. Threads read the pictures of the next steps
    (`prefetch`) while the model computes.
    """

    def __init__(self, data: Any, model: nn.Module, processor: LlavaProcessor, recipe: Recipe):
        """data: a `vflan.training.batching.Data`, of which `pictures` and `picture` are read."""
        self.data, self.model, self.preparation = data, model, processor.image_processor
        self.tower, config = models.parts(model)["vision_tower"], model.config
        self.dtype = self.tower.dtype
        self.shape = (config.image_seq_length, config.vision_config.hidden_size)
        size = len(data.pictures) * math.prod(self.shape) * self.dtype.itemsize
        self.fits_memory = size <= MAX_KEPT_BYTES
        self.readers, self.pending, self.features = ThreadPoolExecutor(4), {}, {}
        self.folder, self.disk_full, self.keys = None, False, {}
        self.max_pixels = recipe.max_pixels
        if len(data.pictures) and (self.fits_memory or recipe.feature_cache):
            # Features are reused only if weights, layer and preparation are the same.
            weights, layer = models.fingerprint(self.tower), config.vision_feature_layer
            identity = f"{weights} {layer} {self.dtype} {self.preparation.to_dict()}"
            # Large pictures are reduced to it. With the default, features of earlier versions fit.
            if self.max_pixels != MAX_PIXELS:
                identity += f" {self.max_pixels}"
            if self.fits_memory:
                _make_room(identity, size, data.pictures)
                self.features = _FEATURES.setdefault(identity, {})
            if recipe.feature_cache:
                name = hashlib.sha256(identity.encode()).hexdigest()[:16]
                self.folder = CACHE / "features" / name
                self.folder.mkdir(parents=True, exist_ok=True)

    def prefetch(self, rows: np.ndarray) -> None:
        """Start to read, in the background, what `load` will need for these rows."""
        for key in self._keys(rows):
            if key not in self.features and key not in self.pending:
                self.pending[key] = self.readers.submit(self._read, key)

    def load(self, rows: np.ndarray) -> None:
        """Hold the features of these rows' pictures; of a large set, drop all others."""
        self.prefetch(rows)
        keys = dict.fromkeys(self._keys(rows))
        if not self.fits_memory:
            self.features = {key: self.features[key] for key in keys if key in self.features}
        # Wait for the threads; each gives stored features or the prepared pixels.
        waiting = {key: self.pending.pop(key, None) for key in keys}
        read = {key: one.result() for key, one in waiting.items() if key not in self.features}
        self.features |= {key: stored for key, (stored, _) in read.items() if stored is not None}
        missing = [key for key in read if key not in self.features]
        # Batches of one size whatever the micro-batch: the tower is fast, and bits do not change.
        for start in range(0, len(missing), TOWER_BATCH):
            batch = missing[start : start + TOWER_BATCH]
            pixels = torch.cat([read[key][1] for key in batch])  # (pictures, 3, side, side)
            with torch.no_grad():
                features = models.image_features(self.model, pixels.to(self.tower.device))
            if self.fits_memory or self.folder:
                features = features.cpu()  # (pictures, patches, width)
            self.features |= zip(batch, features)
            if self.folder and not self.disk_full:
                for key in batch:
                    self.readers.submit(self._write, key, self.features[key])

    def __call__(self, rows: np.ndarray) -> torch.Tensor | None:
        keys = self._keys(rows)
        if not keys:
            return None
        if not all(key in self.features for key in keys):
            self.load(rows)
        return torch.stack([self.features[key] for key in keys]).to(self.tower.device)

    def _keys(self, rows):
        """Return name, size and time of each row's picture: a replaced file is another picture."""
        indices = [index for index in self.data.picture[rows] if index >= 0]
        for index in indices:
            if index not in self.keys:
                name = str(self.data.pictures[index])
                self.keys[index] = (name, *stamp(name))
        return [self.keys[index] for index in indices]

    def _read(self, key):
        """Return (features, None) if they are on disk, otherwise (None, pixels)."""
        if self.folder:
            try:
                file = self._file(key)
                # NumPy would take the features of a file with flipped bits as they are.
                stored = torch.from_numpy(np.load(file)) if is_sealed(file) else None
                if stored is not None and stored.shape == self.shape:
                    if stored.dtype == _stored_dtype(self.dtype):
                        return stored.view(self.dtype), None
            except (OSError, ValueError):
                # The file is missing, or of another kind: compute the features again.
                pass
        with decoded(key[0], self.max_pixels, padded=True) as picture:
            return None, self.preparation([picture], return_tensors="pt")["pixel_values"]

    def _write(self, key, features):
        file = self._file(key)
        # Written under another name first, because other runs, and validation, read and write here.
        scratch = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            file.parent.mkdir(exist_ok=True)
            with scratch.open("wb") as out:
                np.save(out, features.view(_stored_dtype(self.dtype)).numpy())
            seal(scratch)
            scratch.replace(file)
        except OSError as error:
            # The cache is a convenience: a full disk must not stop the run.
            scratch.unlink(missing_ok=True)
            if not self.disk_full:
                self.disk_full = True
                warning = f"Cannot store more features in {shown(self.folder)} ({error.strerror})"
                say(f"{warning}; training goes on.")

    def _file(self, key):
        name = hashlib.sha256(repr(key).encode()).hexdigest()
        return self.folder / name[:2] / f"{name[2:32]}.npy"


def _make_room(identity: str, size: int, names: np.ndarray) -> None:
    """Forget what earlier runs left if it and this run's `size` bytes are more than may be kept.

    names: this run's pictures. A run that still trains keeps its own features.
    """
    ours, earlier = set(names.tolist()), 0
    for other, features in _FEATURES.items():
        for (name, *_), kept in features.items():
            earlier += kept.nbytes if other != identity or name not in ours else 0
    if earlier + size > MAX_KEPT_BYTES:
        _FEATURES.clear()


def _stored_dtype(dtype):
    # NumPy has no bfloat16.
    return torch.int16 if dtype == torch.bfloat16 else dtype
