"""A local server for the chat-completions protocol, whose replies a test chooses."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

KEY = "sk-a-secret-that-must-not-be-seen"


def said(text, model="served-v1", finish="stop"):
    """The body of a good reply."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [choice],
    }


class ChatServer(ThreadingHTTPServer):
    """reply(body, number) -> body, or (status, body), or (status, body, headers).

    A body that is a str is sent unchanged; others are sent as JSON.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.reply, self.asked, self.keys, self.lock = reply, [], set(), threading.Lock()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def texts(self):
        """The text of each question, in the order of arrival."""
        content = [body["messages"][-1]["content"] for body in self.asked]
        return [
            c if isinstance(c, str) else next(p["text"] for p in c if p["type"] == "text")
            for c in content
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.asked.append(body)
            self.server.keys.add(self.headers["Authorization"])
            number = len(self.server.asked)
        found = self.server.reply(body, number)
        status, answer, headers = (
            (*found, {}, {})[:3] if isinstance(found, tuple) else (200, found, {})
        )
        data = (answer if isinstance(answer, str) else json.dumps(answer)).encode()
        try:
            self.send_response(status)
            for name, value in ({"Content-Type": "application/json"} | headers).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except OSError:
            pass  # the client had no patience

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(monkeypatch):
    """serve(reply) -> a running ChatServer that the environment variables point to.

    The waits between retries take milliseconds.
    """
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    monkeypatch.setattr("openai._base_client.MAX_RETRY_DELAY", 0.002)
    started = []

    def start(reply):
        server = ChatServer(reply)
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        started.append(server)
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()
