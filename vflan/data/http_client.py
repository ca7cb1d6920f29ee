"""A client for servers that may be slow, endless or hostile: judges, served models, the hub.

The server never decides how long a request takes, how much memory it needs, or where it goes:

- Time. A socket's time-out starts again with each byte, so one byte a second never ends. Here one
  deadline holds for all that a request does: connection, TLS, headers, body and redirects.
- Bytes. A reply may be endless, or unpack to gigabytes. Its bytes are counted after unpacking.
- Place. A redirect to another host would take the questions there, so it is refused.
- Waits. A server may ask for a pause before the next try. It is shown, and never longer than ours.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from vflan.io import say

MAX_BYTES = 8 << 20
MAX_REDIRECTS = 10
# Statuses of failures that may pass.
PASSING = (408, 409, 429, 500, 502, 503, 504)
# Seconds to wait after the first failure, and after many.
FIRST_WAIT, LAST_WAIT = 0.5, 8.0
# A wait of so many seconds is shown; a server that asks for more than a day asks for a day.
SHOWN_WAIT, LONGEST_WISH = 1.0, 86400.0
# A write to a socket is not interrupted, so each is short.
WRITTEN_AT_ONCE = 1 << 14

# When the request of this thread has to be over, as time.monotonic().
_end: ContextVar[float] = ContextVar("end", default=math.inf)
# Until when a shown wait lasts. Many threads wait at the same time, and one line is enough.
_shown_until = 0.0


class Refused(OSError):
    """A reply that is not accepted; the message says why."""


class Elsewhere(Refused):
    """The server redirects to another host."""


class BoundedClient(httpx2.Client):
    """A client whose requests each take at most `seconds`, and `max_bytes` of memory.

    A request over its time raises httpx2.ReadTimeout; Refused: too many bytes or redirects.
    elsewhere: follow redirects to other hosts (without the key), but never from https to http.
    `send(..., stream=True)` returns when the headers are there; then read with `chunks`.
    """

    def __init__(
        self, seconds: float, max_bytes: int = MAX_BYTES, elsewhere: bool = False, **options: Any
    ):
        # No limit, because waiting for a free connection would use up the request's time.
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=100)
        super().__init__(timeout=seconds, limits=limits, **options)
        self.seconds, self.max_bytes, self.elsewhere = seconds, max_bytes, elsewhere
        # The clients of httpx take no deadline, so it is put below them, where sockets are used.
        for transport in filter(None, (self._transport, *self._mounts.values())):
            pool = transport._pool
            pool._network_backend = _Timed(pool._network_backend)

    def send(self, request: httpx2.Request, *, stream: bool = False, **more: Any):
        """The Response to a request. It has been read, unless `stream`."""
        more.pop("follow_redirects", None)
        token = _end.set(time.monotonic() + self.seconds)
        try:
            response = self._follow(request, **more)
            return response if stream else self._read(response)
        except (TimeoutError, httpx2.TimeoutException):
            raise self._late(request) from None
        finally:
            _end.reset(token)

    def chunks(self, response: httpx2.Response) -> Iterator[bytes]:
        """The bytes of a reply as they come, not unpacked; each may take `seconds`."""
        raw = response.iter_raw()
        while True:
            token = _end.set(time.monotonic() + self.seconds)
            try:
                chunk = next(raw, None)
            except (TimeoutError, httpx2.TimeoutException):
                raise self._late(response.request) from None
            finally:
                _end.reset(token)
            if chunk is None:
                return
            yield chunk

    def _late(self, request: httpx2.Request) -> httpx2.ReadTimeout:
        return httpx2.ReadTimeout(f"no whole reply in {self.seconds:g} seconds", request=request)

    def _follow(self, request: httpx2.Request, **more: Any) -> httpx2.Response:
        for _ in range(MAX_REDIRECTS):
            response = super().send(request, stream=True, follow_redirects=False, **more)
            if not response.has_redirect_location:
                return response
            # The body of a redirect is never read.
            response.close()
            if response.next_request is None:
                raise Refused("the server redirects to something that is no address")
            if not self._may_follow(request.url, response.next_request.url):
                raise Elsewhere("the server redirects to another host")
            request = response.next_request
        raise Refused(f"the server redirects more than {MAX_REDIRECTS} times")

    def _may_follow(self, old: httpx2.URL, new: httpx2.URL) -> bool:
        place = (new.host, new.port) == (old.host, old.port)
        safe = new.scheme == old.scheme or (old.scheme, new.scheme) == ("http", "https")
        return safe and (place or self.elsewhere)

    def _read(self, response: httpx2.Response) -> httpx2.Response:
        """The same response with its body, unpacked."""
        content = bytearray()
        try:
            for part in response.iter_bytes():
                content += part
                if len(content) > self.max_bytes:
                    limit = f"{self.max_bytes / (1 << 20):g} MB"
                    raise Refused(f"the reply has more than {limit}, unpacked")
                # Unpacking takes time too, without any call to the socket.
                _left(None)
        finally:
            response.close()
        # What is returned is unpacked and whole.
        about_transfer = ("content-encoding", "content-length", "transfer-encoding")
        headers = [h for h in response.headers.multi_items() if h[0].lower() not in about_transfer]
        same = dict(request=response.request, extensions=response.extensions)
        return httpx2.Response(
            response.status_code, headers=headers, content=bytes(content), **same
        )


class _Timed:
    """A network backend or stream of httpcore. Each call ends when the request has to be over."""

    def __init__(self, inner: Any):
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def connect_tcp(self, *args: Any, timeout: float | None = None, **more: Any) -> _Timed:
        return _Timed(self._inner.connect_tcp(*args, timeout=_left(timeout), **more))

    def start_tls(
        self, ssl_context: Any, server_hostname: str | None = None, timeout: float | None = None
    ) -> _Timed:
        return _Timed(self._inner.start_tls(ssl_context, server_hostname, _left(timeout)))

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, _left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), WRITTEN_AT_ONCE):
            self._inner.write(buffer[start : start + WRITTEN_AT_ONCE], _left(timeout))


def _left(timeout: float | None) -> float | None:
    """`timeout`, or the seconds that the request has left if these are fewer."""
    left = _end.get() - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return timeout if left == math.inf else min(left, timeout or left)


def wait(
    number: int,
    headers: Mapping[str, str],
    longest: float,
    sleep: Callable[[float], Any] | None = None,
) -> None:
    """Wait after failure `number` (from 0): as long as the server asks, but not over `longest`.

    headers: of the server's reply. A server that asks for nothing is given more time at each
    failure. A wait that a person would notice is shown. sleep: by default time.sleep.
    """
    global _shown_until
    asked = _asked(headers)
    # Uneven, so that many questions do not come back at the same moment.
    own = min(FIRST_WAIT * 2.0 ** min(number, 20), LAST_WAIT) * random.uniform(0.75, 1)
    seconds = min(own if asked is None else asked, longest)
    now = time.monotonic()
    if seconds >= SHOWN_WAIT and now >= _shown_until:
        _shown_until = now + seconds
        wish = "The server failed" if asked is None else f"The server asks for {asked:.0f} s"
        say(f"{wish}: vflan waits {seconds:.0f} s and tries again.")
    (sleep or time.sleep)(seconds)


def _asked(headers: Mapping[str, str]) -> float | None:
    """The seconds that a server asks for, None if it asks for nothing that can be read."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers.get(name, "")) / unit
        except ValueError:
            continue
        if seconds > 0:
            return min(seconds, LONGEST_WISH)
    try:
        seconds = parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time()
        if seconds > 0:
            return min(seconds, LONGEST_WISH)
    except (KeyError, ValueError, TypeError, OverflowError):
        pass
    # The Hugging Face hub: "api";r=0;t=55, that is, nothing is left for 55 seconds.
    limited = re.search(r"\br=0\s*;\s*t=(\d{1,6})\b", headers.get("ratelimit", ""), re.ASCII)
    return float(limited[1]) if limited else None
