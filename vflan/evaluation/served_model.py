"""A vision model behind an OpenAI-compatible endpoint (vLLM and its kind): a 13B at the speed of a real engine."""

import base64
import mimetypes
import re
from dataclasses import dataclass
from pathlib import Path

from vflan.data.images import picture_trouble
from vflan.evaluation.answer_cache import Answer
from vflan.evaluation.api_client import ask_all, endpoint_hash


@dataclass(frozen=True)
class ServedModel:
    """The model that the endpoint calls `name`; address and key are read from OPENAI_BASE_URL and OPENAI_API_KEY.

    The chat template is the server's, so the prompt is the question alone: picture first, then the text. workers:
    questions asked at a time; the engine batches them.
    """

    name: str
    workers: int = 16
    timeout: float = 120.0
    retries: int = 6

    @property
    def fingerprint(self):
        """What a kept answer belongs to: the served name and, as a hash, the endpoint."""
        return f"{self.name} at endpoint {endpoint_hash()}"

    @property
    def folder_name(self):
        """The name as a folder under runs/served: what is no letter, digit, dot, dash or underscore becomes a dash."""
        return re.sub(r"[^A-Za-z0-9._-]+", "-", self.name).strip(".-")

    def answering(self, samples, max_new_tokens):
        """Yields (index, Answer) as they come, greedy; what failed is an error with a reason."""
        requests = [lambda sample=sample: messages(sample) for sample in samples]
        replies = ask_all(
            self.name,
            requests,
            max_new_tokens,
            workers=self.workers,
            timeout=self.timeout,
            retries=self.retries,
        )
        for index, reply in replies:
            finish = "error" if reply.trouble else "length" if reply.finish == "length" else "stop"
            yield index, Answer(reply.text, finish, reply.trouble)


def messages(sample):
    """One user turn: the picture, if there is one, as a data URL, and the text. OSError where the picture is broken."""
    content = [{"type": "text", "text": sample["text"]}]
    if path := sample.get("image"):
        if trouble := picture_trouble(str(path)):
            raise OSError(trouble)
        kind = mimetypes.guess_type(path)[0] or "image/png"
        data = base64.b64encode(Path(path).read_bytes()).decode()
        content.insert(0, {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}})
    return [{"role": "user", "content": content}]
