"""Ask a model behind an OpenAI-compatible endpoint (OpenAI, vLLM and their kind): many questions at once, with patience.

Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY and go nowhere else: into no file, no message, no repr.
The `openai` client itself tries again after time-outs, 429 and 5xx, waiting longer each time or as the server asks.
"""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import NamedTuple

DEFAULT_URL = "https://api.openai.com/v1"


class Reply(NamedTuple):
    """What came back; `model` is the version that the endpoint names, `trouble` why there is no text."""

    text: str
    finish: str = "stop"
    model: str = ""
    trouble: str = ""


def ask_all(model, requests, max_tokens, temperature=0.0, workers=8, timeout=120.0, retries=6):
    """Yields (index, Reply) as they come. requests: functions that return the messages (pictures are read only then).

    A question that fails for its own sake is a Reply with `trouble`. ValueError where no question could succeed (key,
    model name, address); ConnectionError once twice as many as `workers`, and 8 at least, failed in a row.
    """
    if not requests:
        return
    client, limit = _client(timeout, retries), ["max_tokens"]

    def one(make):
        try:
            return _ask(client, model, make(), max_tokens, temperature, limit)
        except OSError as trouble:  # a picture that does not open
            return Reply("", trouble=str(trouble))

    pool, down = ThreadPoolExecutor(workers), 0
    try:
        index_of = {pool.submit(one, make): i for i, make in enumerate(requests)}
        for future in as_completed(index_of):
            reply = future.result()
            down = down + 1 if reply.finish == "down" else 0
            if down >= max(8, 2 * workers):
                raise ConnectionError(
                    f"The endpoint failed {down} times in a row ({reply.trouble}): is it running? What it has answered "
                    "is kept; call again to go on."
                )
            yield index_of[future], reply
    finally:
        pool.shutdown(cancel_futures=True)
        client.close()


def endpoint_hash():
    """Eight hex digits that tell endpoints apart without naming them."""
    return hashlib.sha256(
        os.environ.get("OPENAI_BASE_URL", DEFAULT_URL).rstrip("/").encode()
    ).hexdigest()[:8]


def _client(timeout, retries):
    from openai import OpenAI

    if not os.environ.get("OPENAI_API_KEY"):
        raise ValueError(
            "Set OPENAI_API_KEY in the environment (and OPENAI_BASE_URL for a server of your own, which may ask for no "
            "key: any word will do then)."
        )
    return OpenAI(timeout=timeout, max_retries=retries)


def _ask(client, model, messages, max_tokens, temperature, limit):
    import openai

    more = {} if temperature is None else {"temperature": temperature}
    try:
        reply = client.chat.completions.create(
            model=model, messages=messages, **{limit[0]: max_tokens}, **more
        )
        choice = reply.choices[0]
        text = choice.message.content
        if not isinstance(text, str | None):
            raise TypeError("content is no text")
        return Reply((text or "").strip(), choice.finish_reason or "stop", str(reply.model or ""))
    except (openai.AuthenticationError, openai.PermissionDeniedError):
        raise ValueError("The endpoint refused the key: check OPENAI_API_KEY.") from None
    except openai.NotFoundError:
        raise ValueError(
            f"The endpoint knows no model {model!r} or has another address: check the name and OPENAI_BASE_URL."
        ) from None
    except openai.BadRequestError as trouble:
        if limit[0] == "max_tokens" and "max_completion_tokens" in str(
            trouble
        ):  # newer models renamed it
            limit[0] = "max_completion_tokens"
            return _ask(client, model, messages, max_tokens, temperature, limit)
        return Reply("", "error", trouble=_said(trouble))
    except (
        openai.RateLimitError,
        openai.InternalServerError,
        openai.APIConnectionError,
    ) as trouble:
        return Reply("", "down", trouble=_said(trouble))
    except openai.APIStatusError as trouble:
        return Reply("", "error", trouble=_said(trouble))
    except (openai.APIError, ValueError, TypeError, AttributeError, LookupError) as trouble:
        return Reply("", "error", trouble=f"malformed reply ({type(trouble).__name__})")


def _said(trouble):
    """The error in one short line, without key and address, should the server repeat them."""
    text = " ".join(str(trouble).split())
    for secret in (os.environ.get("OPENAI_API_KEY"), os.environ.get("OPENAI_BASE_URL")):
        text = text.replace(secret, "...") if secret else text
    return f"{type(trouble).__name__}: {text[:200]}"
