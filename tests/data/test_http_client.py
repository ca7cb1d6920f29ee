"""What bounds a server: a deadline for each request, bytes, redirects, waits between tries."""

import errno
import io
import socket
import threading
import time
from email.utils import formatdate

import httpx2
import pytest

from vflan.data import http_client
from vflan.data.http_client import BoundedClient, Elsewhere, Refused, wait


@pytest.fixture
def listen(monkeypatch):
    """listen(answer) -> the address of a server that hands each connection to answer(socket)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    listening = []

    def start(answer):
        server = socket.create_server(("127.0.0.1", 0))
        listening.append(server)

        def serve():
            while True:
                try:
                    connection = server.accept()[0]
                except OSError:
                    return
                threading.Thread(target=handle, args=[connection], daemon=True).start()

        def handle(connection):
            with connection:
                try:
                    answer(connection)
                except OSError:
                    pass  # the client had enough

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{server.getsockname()[1]}"

    yield start
    for server in listening:
        server.close()


def drip(connection, piece=b"x"):
    for _ in range(200):
        connection.sendall(piece)
        time.sleep(0.05)


def test_a_whole_request_has_one_deadline(listen):
    url = listen(lambda connection: drip(connection, b"HTTP/1.1 102 Wait\r\n\r\n"))
    start = time.monotonic()
    with BoundedClient(0.4) as client, pytest.raises(httpx2.ReadTimeout, match="in 0.4 seconds"):
        client.get(url)
    assert 0.3 < time.monotonic() - start < 3


def test_the_deadline_holds_behind_a_proxy_too(listen, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", listen(drip))
    monkeypatch.delenv("NO_PROXY")
    start = time.monotonic()
    with BoundedClient(0.4) as client, pytest.raises(httpx2.TimeoutException):
        client.get("http://nowhere.invalid/")
    assert time.monotonic() - start < 3


@pytest.mark.parametrize("pause", [None, 0.02])
def test_a_server_that_does_not_read_what_it_is_sent_does_not_hang(listen, pause):
    """Pictures are megabytes: a server may read none of them, or a little now and then."""

    def read(connection):
        for _ in range(400):
            time.sleep(pause or 10)
            connection.recv(1 << 14)

    url, start = listen(read), time.monotonic()
    with BoundedClient(0.5) as client, pytest.raises(httpx2.TimeoutException):
        client.post(url, content=b"x" * (64 << 20))
    assert time.monotonic() - start < 4


def test_pieces_of_a_file_each_have_a_deadline(listen):
    def send(connection):
        connection.recv(1 << 16)
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(4):
            time.sleep(0.2)
            connection.sendall(b"2\r\nab\r\n")
        # An extension of a chunk, which brings no byte of the file.
        connection.sendall(b"2;")
        drip(connection)

    got, start = [], time.monotonic()
    with BoundedClient(0.5) as client, pytest.raises(httpx2.ReadTimeout):
        request = client.build_request("GET", listen(send))
        got.extend(client.chunks(client.send(request, stream=True)))
    assert time.monotonic() - start < 4
    got, start = [], time.monotonic()
    with BoundedClient(0.5) as client, pytest.raises(httpx2.ReadTimeout):
        request = client.build_request("GET", listen(send))
        for chunk in client.chunks(client.send(request, stream=True)):
            got.append(chunk)
    assert b"".join(got) == b"abababab", "together these took longer than 0.5 seconds"


def test_a_reply_is_counted_and_a_small_one_arrives(listen):
    def send(connection):
        connection.recv(1 << 16)
        connection.sendall(
            b"HTTP/1.1 200 OK\r\nContent-Length: 1001\r\nX-A: 1\r\n\r\n" + b"x" * 1001
        )

    url = listen(send)
    with BoundedClient(5, max_bytes=1001) as client:
        response = client.get(url)
        assert response.content == b"x" * 1001 and response.headers["X-A"] == "1"
    with BoundedClient(5, max_bytes=1000) as client, pytest.raises(Refused, match="more than"):
        client.get(url)


@pytest.mark.parametrize(
    "old, new, same_host, everywhere",
    [
        ("http://a/x", "http://a/y", True, True),
        ("http://a:1/", "http://a:1/", True, True),
        ("http://a/", "https://a/", True, True),
        ("https://a/", "http://a/", False, False),
        ("https://a/", "https://b/", False, True),
        ("https://a/", "https://a.b/", False, True),
        ("https://a/", "https://a@b/", False, True),
        ("http://a:1/", "http://a:2/", False, True),
        ("https://a/", "http://b/", False, False),
        ("http://a/", "ftp://a/", False, False),
        ("http://a/", "file:///etc/passwd", False, False),
    ],
)
def test_a_redirect_stays_on_its_host_or_at_least_as_safe(old, new, same_host, everywhere):
    for elsewhere, follows in ((False, same_host), (True, everywhere)):
        asked = []

        def answer(request, asked=asked):
            asked.append(str(request.url))
            return httpx2.Response(302, headers={"Location": new})

        with BoundedClient(5, elsewhere=elsewhere) as client:
            client._transport = httpx2.MockTransport(answer)
            with pytest.raises(Refused) as refusal:
                client.get(old)
        assert (len(asked) > 1) == follows and isinstance(refusal.value, Elsewhere) != follows


def soon(seconds):
    return formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "55"}, 30),
        ({"retry-after-ms": "500"}, 0.5),
        ({"retry-after": "inf"}, 30),
        ({"retry-after": "9" * 500}, 30),
        ({"retry-after": soon(3600)}, 30),
        ({"ratelimit": '"api";r=0;t=12'}, 12),
        ({"ratelimit": '"api";r=0;t=250'}, 30),
        # None of these is a wish, so the wait is our own, which grows.
        ({}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": soon(-3600)}, None),
        ({"ratelimit": '"api";r=3;t=55'}, None),
    ],
)
def test_a_wait_is_what_the_server_asks_for_but_has_an_end(headers, seconds, monkeypatch, capsys):
    monkeypatch.setattr(http_client, "_shown_until", 0.0)
    waited = []
    for number in (0, 1, 100):
        wait(number, httpx2.Headers(headers), 30, waited.append)
    if seconds is None:
        assert 0.3 < waited[0] <= 0.5 < waited[1] <= 1 < waited[2] <= 8
    else:
        assert waited == [pytest.approx(seconds)] * 3
    shown = capsys.readouterr().err
    assert len(shown) < 100 and shown.count("\n") == (max(waited) >= 1), "one line for all"
    assert not shown or f"vflan waits {max(waited):.0f} s and tries again" in shown


def test_a_wait_that_cannot_be_shown_is_waited_all_the_same(monkeypatch):
    class FullDisk(io.StringIO):
        def write(self, text):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(http_client, "_shown_until", 0.0)
    monkeypatch.setattr("sys.stderr", FullDisk())
    waited = []
    wait(0, {"retry-after": "5"}, 30, waited.append)
    assert waited == [5]
