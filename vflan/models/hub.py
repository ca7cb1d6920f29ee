"""The first contact with the Hugging Face hub: nobody waits for one that does not answer."""

from __future__ import annotations

import os
import time
from functools import lru_cache
from typing import Any

import httpx2
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

PATIENCE = 5  # seconds for the first answer


def hub_options(source: str | os.PathLike) -> dict[str, Any]:
    """Options of `from_pretrained`: a hub that does not answer is not asked for file after file.

    transformers asks six times for each, for half a minute and without a word. FileNotFoundError if
    the model was never downloaded, or no model of the hub can have this name.
    """
    if os.path.isabs(source) or os.path.exists(source):
        return {}
    repo = str(source)
    try:
        cached = isinstance(try_to_load_from_cache(repo, "config.json"), str)
        # Asked once a minute: a run reads several files of a model one after the other.
        trouble = _trouble(repo, int(time.monotonic() // 60))
    # The hub's rules for names.
    except ValueError as error:
        reason = str(error).splitlines()[0][:200]
        raise FileNotFoundError(f"{repo}: no such folder is here, and {reason}") from None
    if trouble and not cached:
        raise FileNotFoundError(
            f"{repo}: no such folder is here, and the Hugging Face hub does not answer "
            f"({trouble}); correct the path, or download the model while you are online."
        )
    return dict(local_files_only=True) if trouble else {}


@lru_cache
def _trouble(repo: str, minute: int) -> str:
    """Why the hub does not answer; empty if it does, even with a refusal."""
    try:
        get_hf_file_metadata(hf_hub_url(repo, "config.json"), timeout=PATIENCE)
    except HfHubHTTPError as error:
        return f"status {error.response.status_code}" if error.response.status_code >= 500 else ""
    except (httpx2.HTTPError, ConnectionError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return ""
