"""Client of an OpenAI-compatible endpoint (OpenAI, vLLM and others): many questions at a time.

Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY. They are written to no file, message
or repr. The `openai` client retries after time-outs, 429 and 5xx; it waits longer each time, or as
long as the server says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from openai import OpenAI

DEFAULT_URL = "https://api.openai.com/v1"


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
    # A list, because all threads have to see when one finds the other name of the limit.
    client, limit_name = _client(timeout, retries), ["max_tokens"]

    def ask(make_messages):
        try:
            messages = make_messages()
            return _ask(client, model, messages, max_tokens, temperature, limit_name)
        # A picture that cannot be opened.
        except OSError as error:
            return Reply("", trouble=str(error))

    pool, failures = ThreadPoolExecutor(workers), 0
    try:
        index_of = {pool.submit(ask, request): i for i, request in enumerate(requests)}
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
        pool.shutdown(cancel_futures=True)
        client.close()


def endpoint_hash() -> str:
    """Eight hex digits that distinguish endpoints without revealing their address."""
    url = os.environ.get("OPENAI_BASE_URL", DEFAULT_URL).rstrip("/")
    return hashlib.sha256(url.encode()).hexdigest()[:8]


def _client(timeout: float, retries: int) -> OpenAI:
    from openai import OpenAI

    if not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(
            "Set OPENAI_API_KEY in the environment (and OPENAI_BASE_URL for a server of your own; "
            "if it needs no key, any word will do)."
        )
    return OpenAI(timeout=timeout, max_retries=retries)


def _ask(client, model, messages, max_tokens, temperature, limit_name) -> Reply:
    """One reply. limit_name: [name of the token limit], shared by all questions."""
    import openai

    options = {limit_name[0]: max_tokens}
    options |= {} if temperature is None else {"temperature": temperature}
    down = (openai.RateLimitError, openai.InternalServerError, openai.APIConnectionError)
    malformed = (openai.APIError, ValueError, TypeError, AttributeError, LookupError)
    try:
        # Servers of other makers may leave out any field, so everything is checked here.
        reply = client.chat.completions.create(model=model, messages=messages, **options)
        choice = reply.choices[0]
        text = choice.message.content
        if not isinstance(text, str | None):
            raise TypeError("content is no text")
        return Reply((text or "").strip(), choice.finish_reason or "stop", str(reply.model or ""))
    # A wrong key or name fails for every question: stop at once, and do not quote the server.
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise ValueError("The endpoint refused the key: check OPENAI_API_KEY.") from None
    except openai.NotFoundError:
        raise ValueError(
            f"The endpoint knows no model {model!r} or has another address: check the name and "
            "OPENAI_BASE_URL."
        ) from None
    except openai.BadRequestError as error:
        # Newer models renamed the limit.
        if limit_name[0] == "max_tokens" and "max_completion_tokens" in str(error):
            limit_name[0] = "max_completion_tokens"
            return _ask(client, model, messages, max_tokens, temperature, limit_name)
        return Reply("", "error", trouble=_redact(error))
    # The client has already retried these.
    except down as error:
        return Reply("", "down", trouble=_redact(error))
    except openai.APIStatusError as error:
        return Reply("", "error", trouble=_redact(error))
    except malformed as error:
        return Reply("", "error", trouble=f"malformed reply ({type(error).__name__})")


def _redact(error: Exception) -> str:
    """The error in one short line, without key and address: the server may repeat them."""
    text = " ".join(str(error).split())
    for secret in (os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")):
        text = text.replace(secret, "...") if secret else text
    return f"{type(error).__name__}: {text[:200]}"
