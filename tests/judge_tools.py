"""A real judge for tests: an HTTP server on this machine that speaks /v1/chat/completions, with planned faults."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dgd_lightning.scoring.judge_config import JudgeConfig
from dgd_lightning.scoring.rubric_grader import RubricJudge

KEY = "sk-a-test-key-0123456789"
TIMEOUT = 0.5  # of the client; "stall" takes longer


def make_row(number: int, *, rubrics: int = 3) -> dict[str, Any]:
    """A row whose answer names some of the words that its rubrics ask for; every third row's names all."""
    words = [f"word{number}_{i}" for i in range(rubrics)]
    named = words if number % 3 == 0 else [word for i, word in enumerate(words) if (number + i) % 2]
    return {
        "idx": str(number),
        "rubrics": [f"It must mention «{word}»." for word in words],
        "model_output": f"Answer {number}: " + ", ".join(named),
    }


def expected(row: dict[str, Any]) -> tuple[float, list[str], str]:
    """Value, status and rationale that `JudgeServer` gives a row of `make_row`."""
    words = re.findall("«(.*?)»", " ".join(row["rubrics"]))
    status = ["yes" if word in row["model_output"] else "no" for word in words]
    return float("no" not in status), status, f"naïve ☃ {status.count('yes')}"


class JudgeServer(ThreadingHTTPServer):
    """Judges by looking for the words between « and » in the response.

    Args:
        faults: what the first requests with one and the same prompt get, in order; then a good reply.
        delay: seconds before each reply.
    """

    daemon_threads = True

    def __init__(self, faults: Sequence[str] = (), *, delay: float = 0.0, usage: bool = True) -> None:
        self.faults, self.delay, self.usage = faults, delay, usage
        self.delay_from: int | None = None  # from this request on a reply takes a minute
        self.lock = threading.Lock()
        self.prompts: list[str] = []  # of every request
        self.bodies: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.seen: Counter[str] = Counter()
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, *_: Any) -> None:
        """Silent: clients that time out leave broken pipes."""


@contextmanager
def judge_server(faults: Sequence[str] = (), **settings: Any) -> Iterator[JudgeServer]:
    server = JudgeServer(faults, **settings)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def make_judge(url: str, cache: Path, **settings: Any) -> RubricJudge:
    """A judge that waits little."""
    quick = {"model": "fair", "timeout": TIMEOUT, "first_wait": 0.01, "longest_wait": 5.0}
    return RubricJudge(JudgeConfig(base_url=url, cache=str(cache), **{**quick, **settings}))


def good_reply(prompt: str) -> dict[str, Any]:
    if '"Error Class"' in prompt:
        return {"Reason": "naïve ☃", "Error Class": "format_error" if "word" in prompt else "context_ignored"}
    rubrics, _, response = prompt.partition("<response>")
    words = re.findall("«(.*?)»", rubrics)
    status = ["yes" if word in response else "no" for word in words]
    return {
        "Grading Rationale": f"naïve ☃ {status.count('yes')}",
        "List of Requirement Satisfaction Status": status,
        "Overall Score": int("no" not in status),
    }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: JudgeServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][0]["content"]
        with server.lock:
            server.prompts.append(prompt)
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.keys.add(self.headers["Authorization"])
            turn = server.seen[prompt]
            server.seen[prompt] += 1
            late = server.delay_from is not None and len(server.prompts) >= server.delay_from
        time.sleep(60.0 if late else server.delay)
        fault = server.faults[turn] if turn < len(server.faults) else ""
        if self.path != "/v1/chat/completions":
            return self.send(404, {"detail": "Not Found"})
        name, _, detail = fault.partition(":")
        getattr(self, f"fault_{name}")(prompt, detail) if fault else self.complete(json.dumps(good_reply(prompt)))

    def send(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def complete(self, content: str | None, *, ending: str = "stop", refusal: str | None = None) -> None:
        message = {"role": "assistant", "content": content, "refusal": refusal}
        body = {"choices": [{"index": 0, "message": message, "finish_reason": ending}], "object": "chat.completion"}
        if self.server.usage:
            body["usage"] = {"prompt_tokens": 1000, "completion_tokens": 10, "total_tokens": 1010}
        self.send(200, body)

    def changed(self, prompt: str, **changes: Any) -> None:
        names = {"score": "Overall Score", "status": "List of Requirement Satisfaction Status"}
        self.complete(json.dumps({**good_reply(prompt), **{names[name]: value for name, value in changes.items()}}))

    # transport

    def fault_status(self, _: str, detail: str) -> None:
        """``status:429``, ``status:429,0.3`` with Retry-After, ``status:429,date`` with a date one second ahead."""
        code, _, after = detail.partition(",")
        after = formatdate(time.time() + 1, usegmt=True) if after == "date" else after
        self.send(int(code), {"error": {"message": "later"}}, {"Retry-After": after} if after else {})

    def fault_error(self, _: str, detail: str) -> None:
        """``error:404,code,words``."""
        status, code, words = detail.split(",", 2)
        self.send(int(status), {"error": {"message": words, "code": code or None, "type": None}})

    def fault_echo(self, _: str, detail: str) -> None:
        """An error, padded, that repeats the key."""
        self.send(int(detail), {"error": {"message": "x" * 170 + " your key is " + self.headers["Authorization"]}})

    def fault_stall(self, *_: Any) -> None:
        time.sleep(TIMEOUT + 0.3)
        self.close_connection = True

    def fault_half(self, *_: Any) -> None:
        """The body ends before the length it announced."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "5000")
        self.end_headers()
        self.wfile.write(b'{"choices": [')
        self.wfile.flush()
        self.close_connection = True

    def fault_reset(self, *_: Any) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def fault_garbage(self, *_: Any) -> None:
        self.send(200, b'{"choices": [{"mess')

    def fault_html(self, *_: Any) -> None:
        self.send(200, b"<html>busy</html>", {"Content-Type": "text/html"})

    def fault_nochoice(self, *_: Any) -> None:
        self.send(200, {"error": {"message": "upstream is gone"}})

    # replies

    def fault_empty(self, *_: Any) -> None:
        self.complete("")

    def fault_null(self, *_: Any) -> None:
        self.complete(None)

    def fault_refusal(self, *_: Any) -> None:
        self.complete(None, refusal="I can't help with that.")

    def fault_prose(self, *_: Any) -> None:
        self.complete("I am sorry, I will not grade this.")

    def fault_filter(self, prompt: str, _: str) -> None:
        self.complete(json.dumps(good_reply(prompt)), ending="content_filter")

    def fault_cut(self, prompt: str, _: str) -> None:
        self.complete(json.dumps(good_reply(prompt))[:-20], ending="length")

    def fault_fewer(self, prompt: str, _: str) -> None:
        self.changed(prompt, status=good_reply(prompt)["List of Requirement Satisfaction Status"][:-1])

    def fault_contradiction(self, prompt: str, _: str) -> None:
        self.changed(prompt, score=1 - good_reply(prompt)["Overall Score"])

    def fault_maybe(self, prompt: str, _: str) -> None:
        status = good_reply(prompt)["List of Requirement Satisfaction Status"]
        self.changed(prompt, status=["maybe", *status[1:]])

    def fault_fenced(self, prompt: str, _: str) -> None:
        """No fault: a good verdict in a fence amid prose."""
        self.complete(f"Here it is:\n```json\n{json.dumps(good_reply(prompt), indent=1)}\n```\nDone.")

    def fault_always_no(self, prompt: str, _: str) -> None:
        status = ["no" for _ in good_reply(prompt)["List of Requirement Satisfaction Status"]]
        self.changed(prompt, status=status, score=0)
