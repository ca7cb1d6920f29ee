"""Client of an OpenAI-compatible endpoint (OpenAI, vLLM and others): many questions at a time.

Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY. They are written to no file, message
or repr, not even if a reply repeats the key. What may pass (time-outs, 429, 5xx) is tried again,
after a wait that grows or that the server asks for. data/http_client.py bounds what a server can
cost: each try has one deadline and a limit of bytes, waits are capped, and questions go to no other
host.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from threading import Event
from typing import TYPE_CHECKING, Any, NamedTuple

from vflan.data.http_client import PASSING, BoundedClient, Elsewhere, Refused, wait

if TYPE_CHECKING:
    from openai import OpenAI

DEFAULT_URL = "https://api.openai.com/v1"
# The longest wait between two tries; never longer than the time for a reply.
LONGEST_WAIT = 30.0
# A key of fewer characters is a word for a server that needs none, and occurs in answers.
SECRET_CHARACTERS = 8


class Reply(NamedTuple):
    """A reply. model: the version that the endpoint reports. trouble: why there is no text."""

    text: str
    finish: str = "stop"
    model: str = ""
    trouble: str = ""


def ask_all(
    model: str,
    requests: list[Callable[[], list[dict]]],
    max_tokens: int,
    temperature: float | None = 0.0,
    workers: int = 8,
    timeout: float = 120.0,
    retries: int = 6,
) -> Iterator[tuple[int, Reply]]:
    """Yields (index, Reply) as they come.

    requests: functions that return the messages, so that a picture is read only when it is sent.
    A question that fails by itself is a Reply with `trouble`. ValueError if no question could
    succeed (key, model name, address). ConnectionError after 2 * workers failures in a row, and
    not before 8.
    """
    if not requests:
        return
    longest_wait = min(LONGEST_WAIT, timeout)
    endpoint = _Endpoint(_client(timeout), model, max_tokens, temperature, retries, longest_wait)
    pool, failures = ThreadPoolExecutor(workers), 0
    try:
        index_of = {pool.submit(endpoint.ask, request): i for i, request in enumerate(requests)}
        for future in as_completed(index_of):
            reply = future.result()
            # Only failures in a row count: one success shows that the endpoint is running.
            failures = failures + 1 if reply.finish == "down" else 0
            if failures >= max(8, 2 * workers):
                raise ConnectionError(
                    f"The endpoint failed {failures} times in a row ({reply.trouble}): is it "
                    "running? Its answers so far are cached; call again to continue."
                )
            yield index_of[future], reply
    finally:
        # Also runs if the reader stops early: questions that wait are not sent any more.
        endpoint.stop.set()
        pool.shutdown(cancel_futures=True)
        endpoint.client.close()


def endpoint_hash() -> str:
    """Eight hex digits that distinguish endpoints without revealing their address."""
    url = os.environ.get("OPENAI_BASE_URL", DEFAULT_URL).rstrip("/")
    return hashlib.sha256(url.encode()).hexdigest()[:8]


def _client(timeout: float) -> OpenAI:
    from openai import OpenAI

    if not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(
            "Set OPENAI_API_KEY in the environment (and OPENAI_BASE_URL for a server of your own; "
            "if it needs no key, any word will do)."
        )
    # Tries are repeated here: the client would wait as long as the server says.
    return OpenAI(timeout=timeout, max_retries=0, http_client=BoundedClient(timeout))


@dataclass
class _Endpoint:
    """Asks a model question by question, in many threads at the same time."""

    client: OpenAI
    model: str
    max_tokens: int
    temperature: float | None
    retries: int
    longest_wait: float
    # Newer models have another name for the limit; the first answer that says so changes it.
    limit_name: str = "max_tokens"
    stop: Event = field(default_factory=Event)

    def ask(self, make_messages: Callable[[], list[dict]]) -> Reply:
        """The reply to a question, after as many tries as it needs."""
        try:
            messages = make_messages()
        # A picture that cannot be opened.
        except OSError as error:
            return Reply("", "error", trouble=str(error))
        number = 0
        while True:
            reply, headers = self._ask_once(messages)
            if headers is None or number >= self.retries or self.stop.is_set():
                return reply
            wait(number, headers, self.longest_wait, self.stop.wait)
            number += 1

    def _ask_once(self, messages: list[dict]) -> tuple[Reply, Mapping[str, str] | None]:
        """(the reply, the headers of a failure that may pass: None if it will not)."""
        import openai

        name = self.limit_name
        options = {name: self.max_tokens}
        options |= {} if self.temperature is None else {"temperature": self.temperature}
        # RecursionError: JSON with thousands of brackets in brackets.
        malformed = (openai.APIError, ValueError, TypeError, AttributeError, LookupError)
        malformed += (RecursionError,)
        try:
            reply = self.client.chat.completions.create(
                model=self.model, messages=messages, **options
            )
            return _read(reply), None
        # A wrong key, name or address fails for every question: stop at once, and do not quote the
        # server.
        except (openai.AuthenticationError, openai.PermissionDeniedError):
            raise ValueError("The endpoint refused the key: check OPENAI_API_KEY.") from None
        except openai.NotFoundError:
            raise ValueError(
                f"The endpoint knows no model {self.model!r} or has another address: check the "
                "name and OPENAI_BASE_URL."
            ) from None
        except Elsewhere:
            raise ValueError(
                "The endpoint redirects to another host, and no question was sent there: if you "
                "trust that host, put its address in OPENAI_BASE_URL."
            ) from None
        except Refused as error:
            return Reply("", "error", trouble=f"refused: {error}"), None
        except openai.APIConnectionError as error:
            return Reply("", "down", trouble=_redact(error)), {}
        except openai.APIStatusError as error:
            if name == "max_tokens" and "max_completion_tokens" in str(error):
                self.limit_name = "max_completion_tokens"
                return self._ask_once(messages)
            passing = error.status_code in PASSING or error.status_code >= 500
            down = error.status_code == 429 or error.status_code >= 500
            reply = Reply("", "down" if down else "error", trouble=_redact(error))
            return reply, error.response.headers if passing else None
        except malformed as error:
            return Reply("", "error", trouble=f"malformed reply ({type(error).__name__})"), None


def _read(reply: Any) -> Reply:
    """The Reply in a completion. Servers of other makers may leave out any field: TypeError,
    AttributeError or LookupError."""
    choice = reply.choices[0]
    text = choice.message.content
    if not isinstance(text, str | None):
        raise TypeError("content is no text")
    # Any other word of the server's must not be taken for one of ours, `down` for instance.
    finish = "length" if choice.finish_reason == "length" else "stop"
    return Reply(_clean(text or "").strip(), finish, _clean(str(reply.model or "")))


def _clean(text: str) -> str:
    """Text that may be stored and shown: without the key, and without what no file can hold."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if len(key) >= SECRET_CHARACTERS and not key.isalpha():
        text = text.replace(key, "...")
    # Half of a surrogate pair, which JSON can spell and UTF-8 cannot.
    return text.encode("utf-8", "replace").decode()


def _redact(error: Exception) -> str:
    """The error in one short line, without key and address: the server may repeat them."""
    text = " ".join(_clean(str(error)).split())
    for secret in (os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")):
        text = text.replace(secret, "...") if secret else text
    return f"{type(error).__name__}: {text[:200]}"
