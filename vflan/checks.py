"""The doctor: every row and every picture judged by the rules that training uses."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pandas as pd
from datasets import Dataset

from vflan.conversation import audit
from vflan.pictures import picture_trouble


@dataclass(frozen=True)
class Report:
    """What `check` found: `rows` = `ok` + len(`bad`). `repaired` rows are trained on, less the named part (and count as ok)."""

    rows: int
    ok: int
    bad: pd.DataFrame  # row, id, reason
    repaired: pd.DataFrame  # row, id, reason

    @property
    def reasons(self) -> pd.Series:
        """How many bad rows for each kind of reason."""
        return self.bad.reason.str.split(":").str[0].value_counts()

    def __str__(self):
        lines = [
            f"{self.rows} rows: {self.ok} fine, {len(self.bad)} bad, {len(self.repaired)} of the fine ones repaired"
        ]
        return "\n".join(lines + [f"  {count} x {reason}" for reason, count in self.reasons.items()])

    __repr__ = __str__


def check(samples: Dataset) -> Report:
    """Judge every row by the rules that training uses; each bad row gets one reason, each picture is decoded once."""
    images, conversations = samples["image"][:], samples["conversations"][:]
    distinct = list(dict.fromkeys(path for path in images if path))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # Pillow decodes outside Python's lock
        verdicts = dict(zip(distinct, pool.map(picture_trouble, distinct, chunksize=64)))
    bad, repaired = [], []
    for row, (image, turns, name) in enumerate(zip(images, conversations, samples["id"][:])):
        try:
            found = audit(turns)
            if found.has_image != bool(image):
                raise ValueError(
                    "image token without a picture" if found.has_image else "picture without an image token"
                )
            if image and verdicts[image]:
                raise ValueError(verdicts[image])
            if found.dropped:
                repaired.append((row, name, "left out: " + "; ".join(found.dropped)))
        except ValueError as trouble:
            bad.append((row, name, str(trouble)))
    columns = ["row", "id", "reason"]
    frames = pd.DataFrame(bad, columns=columns), pd.DataFrame(repaired, columns=columns)
    return Report(len(images), len(images) - len(bad), *frames)
