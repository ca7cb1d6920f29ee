"""A vision model behind an OpenAI-compatible endpoint (vLLM for instance): fast even for 13B."""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vflan.data.images import picture_trouble
from vflan.evaluation.answer_cache import Answer
from vflan.evaluation.api_client import ask_all, endpoint_hash


@dataclass(frozen=True)
class ServedModel:
    """The model that the endpoint calls `name`.

    Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY. The server applies its own chat
    template, so a prompt is the picture and then the question. workers: questions in flight, which
    the engine batches. timeout: seconds for a reply. retries: after failures that may pass.
    """

    name: str
    workers: int = 16
    timeout: float = 120.0
    retries: int = 6

    @property
    def fingerprint(self) -> str:
        """What a cached answer depends on: the served name and a hash of the endpoint."""
        return f"{self.name} at endpoint {endpoint_hash()}"

    @property
    def folder_name(self) -> str:
        """The folder under runs/served: the name, with dashes for what a file name may not hold."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip(".-")

    def answering(self, samples: list[dict], max_new_tokens: int) -> Iterator[tuple[int, Answer]]:
        """Yields (index, greedy Answer) as they come; a failure is an error with its reason."""
        # Functions, so that pictures are read and encoded only when they are sent.
        requests = [partial(messages, sample) for sample in samples]
        patience = dict(workers=self.workers, timeout=self.timeout, retries=self.retries)
        for index, reply in ask_all(self.name, requests, max_new_tokens, **patience):
            finish = "length" if reply.finish == "length" else "stop"
            yield index, Answer(reply.text, "error" if reply.trouble else finish, reply.trouble)


def messages(sample: dict) -> list[dict]:
    """One user turn: the picture, if any, as a data URL, then the text. OSError if it is broken."""
    content = [{"type": "text", "text": sample["text"]}]
    if path := sample.get("image"):
        if trouble := picture_trouble(str(path)):
            raise OSError(trouble)
        kind = mimetypes.guess_type(path)[0] or "image/png"
        # The file is sent unchanged: the server prepares pictures by itself.
        data = base64.b64encode(Path(path).read_bytes()).decode()
        url = f"data:{kind};base64,{data}"
        content.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return [{"role": "user", "content": content}]
