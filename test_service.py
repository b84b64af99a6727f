"""What DESIGN promises, seen from outside: over ASGI, in the log file, from the environment and from real processes.

Run it with `python -m pytest`. TEST_BACKENDS=asyncio,trio runs what is asynchronous on both.
"""

import asyncio
import functools
import http.client
import inspect
import json
import logging
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from dataclasses import FrozenInstanceError, asdict
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import anyio
import anyio.lowlevel
import httpx
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

from service import Notification, create_app

# -------------------------------------------------------------------------------------------------- helpers

HERE = Path(__file__).resolve().parent
USER = "user@example.com"
PATH = f"/send-notification/{USER}"
TARGET = PATH.encode()
AN_HOUR = 3600  # seconds of delay: longer than any test, so that what was acknowledged is still pending
LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (\S+) notification for ([^\s:]+): (.*)")


@pytest.fixture(params=os.environ.get("TEST_BACKENDS", "asyncio").split(","))
def anyio_backend(request):
    return request.param


def client(app, **options) -> httpx.AsyncClient:
    """A client of the app in this process. Its answers come when the background task is done."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=None, **options)


async def post(app, email=USER, path="/send-notification/", **options) -> httpx.Response:
    with anyio.fail_after(60):
        async with client(app) as http:
            return await http.post(f"{path}{quote(email, safe='')}", **options)


async def health(app) -> dict:
    async with client(app) as http:
        return (await http.get("/health")).json()


def lifespan(app):
    return app.router.lifespan_context(app)


async def drive(app, send, *incoming, path=PATH, headers=()):
    """Call the app as a server does, for what httpx does not show: each message as it is sent."""
    incoming = list(incoming or [{"type": "http.request"}])

    async def receive():
        if not incoming:
            await anyio.sleep_forever()
        if isinstance(message := incoming.pop(0), Exception):
            raise message
        return message

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": list(headers)}
    await app(scope | {"client": ("test", 1), "server": ("test", 80)}, receive, send)


def eventually(predicate, within=10.0):
    """The predicate's first true value; for what another process or thread does."""
    deadline = time.monotonic() + within
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not within {within} s: {inspect.getsource(predicate).strip()}"
        time.sleep(0.02)
    return value


async def soon(predicate, within=10.0):
    """`eventually`, for what happens on this event loop; the predicate may be asynchronous."""
    deadline = time.monotonic() + within
    while True:
        value = predicate()
        if value := await value if inspect.isawaitable(value) else value:
            return value
        assert time.monotonic() < deadline, f"not within {within} s: {inspect.getsource(predicate).strip()}"
        await anyio.sleep(0.02)


def read(log: Path) -> list[Notification]:
    """The notifications in a log; fails if there is anything else in it."""
    text = log.read_bytes().decode() if log.exists() else ""
    assert text == "" or text.endswith("\n")
    lines = text.split("\n")[:-1]
    assert all(line.isprintable() and LINE.fullmatch(line) for line in lines), lines
    return [_parse(line) for line in lines]


def _parse(line: str) -> Notification:
    at, id, email, message = LINE.fullmatch(line).groups()
    return Notification(id, email, message.encode("latin-1", "backslashreplace").decode("unicode_escape"), at)


def ids(log: Path) -> list[str]:
    """The ids of the whole lines in a log that may be written at this moment."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.exists() else []
    return [line.split(b" ", 2)[1].decode() for line in lines]


def refusal(response: httpx.Response, status: int) -> str:
    """The one sentence of an error."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["detail"]
    detail = response.json()["detail"]
    assert re.fullmatch(r"[A-Z][^\n]+\.", detail), detail
    return detail


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "notify" and r.levelno >= logging.WARNING]


def cases(names: str, rows: dict):
    return pytest.mark.parametrize(names, list(rows.values()), ids=list(rows))


class Server:
    def __init__(self, process: subprocess.Popen, folder: Path, stderr: Path) -> None:
        self.process = process
        self.log = folder / "log.txt"
        self.accepted: list[str] = []  # the ids of all that was acknowledged
        self._stderr = stderr
        self.port = 0

    def ready(self) -> bool:
        assert self.process.poll() is None, self.stderr()
        if not self.port and (running := re.search(r"running on http://127\.0\.0\.1:(\d+)", self.stderr())):
            self.port = int(running[1])
            self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        with suppress(httpx.TransportError):
            return bool(self.port) and self.http.get("/health").status_code == 200
        return False

    def stderr(self) -> str:
        return self._stderr.read_text()

    def post(self, message: str | None = None, **options) -> httpx.Response:
        response = self.http.post(PATH, json={} if message is None else {"message": message}, **options)
        assert response.status_code == 202, response.text
        if "idempotent-replayed" not in response.headers:
            self.accepted.append(response.json()["id"])
        return response

    def talk(self, request: bytes) -> bytes:
        """Send these bytes, and receive until the server closes the connection."""
        received = b""
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as sock:
            with suppress(ConnectionError):  # it may close before it has read all
                sock.sendall(request)
            with suppress(ConnectionError):
                while data := sock.recv(65536):
                    received += data
        self.accepted += [id.decode() for id in re.findall(rb'\{"id":\s*"(\w+)"', received)]
        return received

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def kill(self) -> None:
        """End the whole group, workers included, as kill -9 does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serve(folder: Path, *options: str, app="service:app", ready=True, quiet=True, **settings):
    """A uvicorn of its own process group, on a free port, with everything it writes in the folder.

    ready: wait for /health. quiet: there must be no traceback in what it wrote to stderr.
    """
    env = {name: value for name, value in os.environ.items() if not name.startswith("NOTIFY_")}
    env |= {"PYTHONPATH": str(HERE), "NOTIFY_LOG": str(folder / "log.txt"), "NOTIFY_OUTBOX": str(folder / "outbox")}
    env |= {f"NOTIFY_{name.upper()}": str(value) for name, value in settings.items()}
    command = [sys.executable, "-W", "error", "-m", "uvicorn", app, "--port", "0", "--ws", "none", "--no-access-log"]
    stderr = folder / f"stderr-{len(list(folder.glob('stderr-*')))}.txt"
    with stderr.open("wb") as file:
        process = subprocess.Popen(
            [*command, *options],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
        )
    server = Server(process, folder, stderr)
    try:
        if ready:
            eventually(server.ready, 20)
        yield server
    finally:
        server.kill()
        if server.port:
            server.http.close()
    if quiet and ready:
        assert "Traceback" not in server.stderr(), server.stderr()


# ---------------------------------------------------------------------------------------------------- rules

GOOD_ADDRESSES = {
    "plain": "user@example.com",
    "plus": "user+tag@example.com",
    "apostrophe": "o'brien@example.com",
    "slash": "sales/emea@example.com",
    "two slashes": "a//b@example.com",
    "every sign": "!#$%&'*+/=?^_`{|}~-.@example.com",
    "percent": "100%41@example.com",
    "dots": "..user..@example.com",
    "no dot in the domain": "root@localhost",
    "digits": "1@2.3",
    "case": "User@EXAMPLE.com",
    "punycode": "user@xn--bcher-kva.example",
    "64 before the @": "a" * 64 + "@example.com",
    "a label of 63": f"user@{'a' * 63}.com",
    "254 in all": f"user@{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 57}",
}

BAD_ADDRESSES = {
    "no @": "user",
    "nothing before the @": "@example.com",
    "nothing after the @": "user@",
    "two @": "user@example.com@example.com",
    "two addresses": "user@example.com,root@example.com",
    "a name": "User <user@example.com>",
    "quoted": '"user"@example.com',
    "an IP literal": "user@[127.0.0.1]",
    "hyphen before a label": "user@-example.com",
    "hyphen after a label": "user@example-.com",
    "underscore in the domain": "user@exam_ple.com",
    "dot before the domain": "user@.example.com",
    "dot after the domain": "user@example.com.",
    "empty label": "user@example..com",
    "space before": " user@example.com",
    "space after": "user@example.com ",
    "space within": "us er@example.com",
    "newline after": "user@example.com\n",
    "newline and slash after": "user@example.com\n/",
    "slash and newline after": "user@example.com/\n",
    "newline before": "\nuser@example.com",
    "CR LF and a line": "user@example.com\r\n2026-11-22T05:46:00.123Z 5f0c notification for a@b.c: forged",
    "escaped newline": "user@example.com%0A",
    "NUL": "user\0@example.com",
    "ESC": "\x1b[31muser@example.com",
    "U+2028": "user\u2028@example.com",
    "U+0085 after": "user@example.com\x85",
    "bidi override": "\u202euser@example.com",
    "not ASCII before the @": "üser@example.com",
    "not ASCII after the @": "user@exämple.com",
    "a digit that is not ASCII": "user@example.c\u0661m",
    "a letter that folds to ASCII": "user@example.\u212aom",
    "65 before the @": "a" * 65 + "@example.com",
    "a label of 64": f"user@{'a' * 64}.com",
    "255 in all": f"user@{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 58}",
    "3,000 characters": "a" * 3000 + "@example.com",
    "3,000 after the @": "user@" + "a." * 1500 + "com",
    "two slashes after": "user@example.com//",
    "a path after": "user@example.com/health",
}


@pytest.mark.anyio
@cases("email", GOOD_ADDRESSES)
@pytest.mark.parametrize("slash", ["", "/"], ids=["", "with a slash"])
async def test_a_valid_address_is_accepted_as_it_is(email, slash):
    sent = []
    response = await post(create_app(sent.append, outbox=":memory:"), email + slash)
    assert (response.status_code, [n.email for n in sent]) == (202, [email])


@pytest.mark.anyio
@cases("email", BAD_ADDRESSES)
async def test_anything_but_one_whole_address_is_refused(email):
    sent = []
    response = await post(create_app(sent.append, outbox=":memory:"), email)
    refusal(response, 422)
    assert sent == []


@pytest.mark.anyio
async def test_no_address_is_refused():
    assert (await post(create_app(outbox=":memory:"), "")).status_code in (404, 422)


GOOD_BODIES = {
    "none": (b"", "some notification"),
    "empty object": (b"{}", "some notification"),
    "white space around": (b' \r\n\t{"message" : "hi"} \n', "hi"),
    "empty message": (b'{"message": ""}', ""),
    "10,000 characters": (b'{"message": "%s"}' % (b"x" * 10_000), "x" * 10_000),
    "10,000 characters of four bytes": (b'{"message": "%s"}' % ("😀" * 10_000).encode(), "😀" * 10_000),
    "10,000 escaped characters": (b'{"message": "%s"}' % (b"\\u0001" * 10_000), "\1" * 10_000),
    "surrogate pair": (b'{"message": "\\ud83d\\ude00"}', "😀"),
    "noncharacter": (b'{"message": "\\uffff"}', "\uffff"),
    "64 KiB": (b'{"message": "hi"}'.ljust(64 * 1024), "hi"),
}

MALFORMED_BODIES = {
    "cut off": b'{"message": "hi"',
    "more after it": b'{"message": "hi"} {}',
    "white space alone": b" ",
    "single quotes": b"{'message': 'hi'}",
    "trailing comma": b'{"message": "hi",}',
    "bare newline in a string": b'{"message": "a\nb"}',
    "bad escape": b'{"message": "\\x41"}',
    "NUL": b"\0",
    "bad UTF-8": b'{"message": "\xff"}',
    "surrogate in UTF-8": b'{"message": "\xed\xa0\x80"}',
    "overlong UTF-8": b'{"message": "\xc0\xaf"}',
    "Latin-1": '{"message": "é"}'.encode("latin-1"),
    "UTF-16": '{"message": "hi"}'.encode("utf-16"),
    "UTF-16 without a mark": '{"message": "hi"}'.encode("utf-16-le"),
    "UTF-32": '{"message": "hi"}'.encode("utf-32"),
    "byte order mark": b'\xef\xbb\xbf{"message": "hi"}',
    "NaN": b'{"message": NaN}',
    "Infinity": b'{"message": -Infinity}',
    "30,000 brackets": b"[" * 30_000,
    "30,000 brackets closed again": b"[" * 30_000 + b"]" * 30_000,
    "10,000 nested objects": b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    "form": b"message=hi",
}

WRONG_BODIES = {
    "null": b"null",
    "true": b"true",
    "number": b"1",
    "6,000 digits": b"1" * 6000,
    "string": b'"message"',
    "array": b"[]",
    "array of one object": b'[{"message": "hi"}]',
    "message null": b'{"message": null}',
    "message true": b'{"message": true}',
    "message number": b'{"message": 1}',
    "message of 6,000 digits": b'{"message": %s}' % (b"1" * 6000),
    "message number without end": b'{"message": 1e999}',
    "message array": b'{"message": ["hi"]}',
    "message object": b'{"message": {}}',
    "unknown key": b'{"massage": "hi"}',
    "key in capitals": b'{"Message": "hi"}',
    "empty key": b'{"": "hi"}',
    "surrogate for a key": b'{"\\ud800": "hi"}',
    "one key too many": b'{"message": "hi", "id": "1"}',
    "10,001 characters": b'{"message": "%s"}' % (b"x" * 10_001),
    "lone high surrogate": b'{"message": "\\ud800"}',
    "lone low surrogate": b'{"message": "a\\udc00b"}',
    "surrogates in the wrong order": b'{"message": "\\ude00\\ud83d"}',
}

JSON = {"content-type": "application/json"}


@pytest.mark.anyio
@cases("body, message", GOOD_BODIES)
async def test_a_body_is_optional_and_holds_a_message_of_up_to_10000_characters(body, message):
    sent = []
    response = await post(create_app(sent.append, outbox=":memory:"), content=body, headers=JSON)
    assert (response.status_code, [n.message for n in sent]) == (202, [message])


@pytest.mark.anyio
@cases(
    "body, status", {n: (b, 400) for n, b in MALFORMED_BODIES.items()} | {n: (b, 422) for n, b in WRONG_BODIES.items()}
)
async def test_any_other_body_is_refused(body, status):
    sent = []
    app = create_app(sent.append, outbox=":memory:")
    refusal(await post(app, content=body, headers=JSON), status)
    assert (sent, (await health(app))["pending"]) == ([], 0)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "media", ["application/json", "Application/JSON", "application/json; charset=utf-8", "application/json;x=y"]
)
async def test_json_may_be_named_in_any_case_and_with_parameters(media):
    sent = []
    await post(
        create_app(sent.append, outbox=":memory:"), content=b'{"message": "hi"}', headers={"content-type": media}
    )
    assert [n.message for n in sent] == ["hi"]


@pytest.mark.anyio
async def test_without_a_body_the_content_type_does_not_matter():
    response = await post(create_app(lambda n: None, outbox=":memory:"), headers={"content-type": "text/plain"})
    assert response.status_code == 202


ESCAPES = {
    "plain": ("some notification", "some notification"),
    "empty": ("", ""),
    "printable beyond ASCII": ("é 世界 😀", "é 世界 😀"),
    "colons": ("a: b: c", "a: b: c"),
    "newline": ("a\nb", r"a\nb"),
    "CR LF": ("a\r\nb", r"a\r\nb"),
    "backslash": ("C:\\new", r"C:\\new"),
    "what looks like an escape": ("\\n", r"\\n"),
    "NUL": ("\0", r"\x00"),
    "ESC": ("\x1b[31mred", r"\x1b[31mred"),
    "DEL": ("\x7f", r"\x7f"),
    "next line": ("\x85", r"\x85"),
    "no-break space": ("a\xa0b", r"a\xa0b"),
    "soft hyphen": ("\xad", r"\xad"),
    "U+2028": ("a\u2028b", r"a\u2028b"),
    "bidi override": ("\u202egnp.exe", r"\u202egnp.exe"),
    "byte order mark": ("\ufeffhi", r"\ufeffhi"),
    "private use": ("\ue000", r"\ue000"),
    "tag character": ("\U000e0041", r"\U000e0041"),
    "noncharacter": ("\U0010ffff", r"\U0010ffff"),
    "spaces at the ends": (" a ", " a "),
    "a whole forged line": (
        "x\n2026-11-22T05:46:00.123Z 5f0c notification for root@example.com: forged",
        r"x\n2026-11-22T05:46:00.123Z 5f0c notification for root@example.com: forged",
    ),
}


@pytest.mark.anyio
@cases("message, written", ESCAPES)
async def test_a_notification_is_one_line_that_can_be_read_back_exactly(tmp_path, message, written):
    log = tmp_path / "log.txt"
    before = datetime.now(UTC)
    response = await post(create_app(log=log, outbox=":memory:"), "o'brien+x/y@example.com", json={"message": message})
    after = datetime.now(UTC)
    at, id, email, text = LINE.fullmatch(log.read_bytes().decode().removesuffix("\n")).groups()
    assert (id, email, text) == (response.json()["id"], "o'brien+x/y@example.com", written)
    assert before.replace(microsecond=before.microsecond // 1000 * 1000) <= datetime.fromisoformat(at) <= after
    assert read(log) == [Notification(id, email, message, at)]


@pytest.mark.anyio
async def test_any_text_can_be_read_back_from_the_log(tmp_path):
    chance = random.Random(5)
    planes = [range(0x20), range(0x20, 0x80), range(0x80, 0x3000), range(0xE000, 0x10000), range(0x10000, 0x110000)]
    texts = ["".join(chr(chance.choice(chance.choice(planes))) for _ in range(30)) for _ in range(100)]
    app = create_app(log=tmp_path / "log.txt", outbox=":memory:")
    for text in texts:
        await post(app, json={"message": text})
    assert [n.message for n in read(tmp_path / "log.txt")] == texts


def test_a_notification_is_frozen():
    notification = Notification(id="1", email=USER, message="hi", accepted_at="2026-11-22T05:46:00.123Z")
    assert notification == Notification("1", USER, "hi", "2026-11-22T05:46:00.123Z")
    with pytest.raises(FrozenInstanceError):
        notification.id = "2"


REFUSED_KEYWORDS = {
    "delay": [-1, -0.001, math.nan, math.inf, "soon", "1", None, True],
    "concurrency": [0, -1, 1.5, math.inf, "many", None, True],
    "max_pending": [0, -1, 1.5, "many", None, False],
    "token": ["", "é", "a\nb", 5, b"secret", True],
    "fsync": ["true", 1, None],
    "log": ["", None, 5],
    "outbox": ["", None, 5],
    "notify": ["print", 5, [print]],
}

REFUSED_VARIABLES = {
    "NOTIFY_DELAY": ["soon", "", "-1", "nan", "inf", "1s"],
    "NOTIFY_CONCURRENCY": ["many", "", "0", "-1", "1.5"],
    "NOTIFY_MAX_PENDING": ["many", "", "0", "-1", "1e4"],
    "NOTIFY_TOKEN": ["", "é", "a\nb"],
    "NOTIFY_FSYNC": ["perhaps", "", "2"],
    "NOTIFY_LOG": [""],
    "NOTIFY_OUTBOX": [""],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in REFUSED_KEYWORDS for value in REFUSED_KEYWORDS[name]]
)
def test_a_keyword_that_makes_no_sense_is_refused_by_its_name(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*{re.escape(repr(value))}"):
        create_app(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name in REFUSED_VARIABLES for value in REFUSED_VARIABLES[name]]
)
def test_a_variable_that_makes_no_sense_is_refused_by_its_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    shown = re.escape(repr(value)[1:-1]) or "''"
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*(?<!\w){shown}(?!\w)"):
        runpy.run_path(str(HERE / "service.py"))


# ----------------------------------------------------------------------------------------- HTTP in process

TOKEN = {"authorization": "Bearer s3cret"}


async def chunks(size: int, *, each: int = 1000):
    for start in range(0, size, each):
        yield b" " * min(each, size - start)


ERRORS = {
    "400 malformed JSON": (400, "POST", PATH, {"content": b"{", "headers": TOKEN | JSON}),
    "400 empty key": (400, "POST", PATH, {"headers": TOKEN | {"idempotency-key": ""}}),
    "400 key of 256": (400, "POST", PATH, {"headers": TOKEN | {"idempotency-key": "k" * 256}}),
    "400 key with DEL": (400, "POST", PATH, {"headers": TOKEN | {"idempotency-key": b"a\x7f"}}),
    "400 key with a tab": (400, "POST", PATH, {"headers": TOKEN | {"idempotency-key": b"a\tb"}}),
    "400 key with a newline": (400, "POST", PATH, {"headers": TOKEN | {"idempotency-key": b"a\n"}}),
    "400 key in UTF-8": (400, "POST", PATH, {"headers": TOKEN | {"idempotency-key": "ключ".encode()}}),
    "400 key in Latin-1": (400, "POST", PATH, {"headers": TOKEN | {"idempotency-key": b"cl\xe9"}}),
    "401 no token": (401, "POST", PATH, {}),
    "401 empty": (401, "POST", PATH, {"headers": {"authorization": ""}}),
    "401 scheme alone": (401, "POST", PATH, {"headers": {"authorization": "Bearer"}}),
    "401 no scheme": (401, "POST", PATH, {"headers": {"authorization": "s3cret"}}),
    "401 another scheme": (401, "POST", PATH, {"headers": {"authorization": "Basic s3cret"}}),
    "401 another token": (401, "POST", PATH, {"headers": {"authorization": "Bearer secret"}}),
    "401 half the token": (401, "POST", PATH, {"headers": {"authorization": "Bearer s3c"}}),
    "401 twice the token": (401, "POST", PATH, {"headers": {"authorization": "Bearer s3crets3cret"}}),
    "401 in UTF-8": (401, "POST", PATH, {"headers": {"authorization": "Bearer ключ".encode()}}),
    "401 in Latin-1": (401, "POST", PATH, {"headers": {"authorization": b"Bearer s3cr\xe9t"}}),
    "401 all bytes": (401, "POST", PATH, {"headers": {"authorization": bytes(range(128, 256))}}),
    "404 root": (404, "GET", "/", {}),
    "404 unknown": (404, "GET", "/nothing", {}),
    "404 no address": (404, "POST", "/send-notification", {}),
    "404 longer": (404, "GET", "/healthy", {}),
    "404 deeper": (404, "GET", "/health/ok", {}),
    "404 two slashes": (404, "GET", "/health//", {}),
    "404 newline": (404, "GET", "/health%0A", {}),
    "404 slash and newline": (404, "GET", "/health/%0A", {}),
    "404 newline after the document": (404, "GET", "/openapi.json%0A", {}),
    "404 capitals": (404, "POST", "/Send-Notification/user@example.com", {"headers": TOKEN}),
    "405 GET": (405, "GET", PATH, {}),
    "405 PUT": (405, "PUT", PATH, {"headers": TOKEN}),
    "405 DELETE": (405, "DELETE", PATH, {"headers": TOKEN}),
    "405 OPTIONS": (405, "OPTIONS", PATH, {}),
    "405 unheard of": (405, "BREW", PATH, {}),
    "405 health": (405, "POST", "/health", {}),
    "405 document": (405, "POST", "/openapi.json", {}),
    "413 with a length": (413, "POST", PATH, {"content": b" " * (64 * 1024 + 1), "headers": TOKEN | JSON}),
    "413 in chunks": (
        413,
        "POST",
        PATH,
        {"content": functools.partial(chunks, 64 * 1024 + 1), "headers": TOKEN | JSON},
    ),
    "415 none": (415, "POST", PATH, {"content": b"{}", "headers": TOKEN}),
    "415 text": (415, "POST", PATH, {"content": b"{}", "headers": TOKEN | {"content-type": "text/plain"}}),
    "415 form": (415, "POST", PATH, {"data": {"message": "hi"}, "headers": TOKEN}),
    "415 longer": (415, "POST", PATH, {"content": b"{}", "headers": TOKEN | {"content-type": "application/jsonl"}}),
    "415 in a parameter": (
        415,
        "POST",
        PATH,
        {"content": b"{}", "headers": TOKEN | {"content-type": "x/y;application/json"}},
    ),
    "415 not ASCII": (
        415,
        "POST",
        PATH,
        {"content": b"{}", "headers": TOKEN | {"content-type": b"application/json\xe9"}},
    ),
    "422 address": (422, "POST", "/send-notification/user", {"headers": TOKEN}),
    "422 body": (422, "POST", PATH, {"json": {"message": 1}, "headers": TOKEN}),
}
ALLOWED = {"/health": {"GET", "HEAD"}, "/openapi.json": {"GET"}, PATH: {"POST"}}


@pytest.mark.anyio
@pytest.mark.filterwarnings(
    "ignore:Async generator '(httpx|test_service):ResourceWarning"
)  # a body left unread, on trio
@cases("status, method, path, options", ERRORS)
async def test_every_error_is_one_sentence_of_json_and_leaves_nothing_behind(status, method, path, options):
    sent = []
    app = create_app(sent.append, outbox=":memory:", token="s3cret")
    if callable(content := options.get("content")):
        options = options | {"content": content()}
    async with client(app) as http:
        response = await http.request(method, path, **options)
        refusal(response, status)
        assert (sent, (await http.get("/health")).json()["pending"]) == ([], 0)
    assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    if status == 405:
        assert {word.strip() for word in response.headers["allow"].split(",")} >= ALLOWED[path]


@pytest.mark.anyio
async def test_a_chunked_body_needs_no_length():
    async def body():
        yield b'{"mess'
        yield b""
        yield b'age": "hi"}'

    sent = []
    response = await post(create_app(sent.append, outbox=":memory:"), content=body(), headers=JSON)
    assert (response.status_code, [n.message for n in sent]) == (202, ["hi"])


@pytest.mark.anyio
async def test_what_breaks_within_is_a_500_that_shows_nothing_of_it():
    messages = []

    async def send(message):
        messages.append(message)

    with pytest.raises(RuntimeError, match="secret"):  # for the server's log
        await drive(create_app(outbox=":memory:"), send, RuntimeError("secret"))
    start, body = messages
    response = httpx.Response(start["status"], headers=start["headers"], content=body["body"])
    assert "secret" not in refusal(response, 500)


@pytest.mark.anyio
async def test_a_client_that_leaves_in_mid_body_is_no_error_and_notifies_nobody():
    sent, messages = [], []

    async def send(message):
        messages.append(message)

    part = {"type": "http.request", "body": b'{"message": ', "more_body": True}
    await drive(create_app(sent.append, outbox=":memory:"), send, part, {"type": "http.disconnect"})
    assert sent == []
    assert all(message.get("status", 0) < 500 for message in messages)


@pytest.mark.anyio
async def test_the_answer_names_the_notification():
    sent = []
    response = await post(create_app(sent.append, outbox=":memory:"), json={"message": "hi"})
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"id": sent[0].id, "message": "Notification sent in the background"}
    assert asdict(sent[0]) == {"id": sent[0].id, "email": USER, "message": "hi", "accepted_at": sent[0].accepted_at}
    assert datetime.fromisoformat(sent[0].accepted_at).tzinfo is not None


@pytest.mark.anyio
@pytest.mark.parametrize("authorization", ["Bearer s3cret", "bearer s3cret", "BEARER s3cret"])
async def test_the_token_opens_post_in_any_case_of_its_scheme(authorization):
    app = create_app(lambda n: None, outbox=":memory:", token="s3cret")
    assert (await post(app, headers={"authorization": authorization})).status_code == 202


@pytest.mark.anyio
@pytest.mark.parametrize("path", ["/health", "/health/", "/openapi.json", "/openapi.json/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_health_and_document_want_no_token(method, path):
    async with client(create_app(outbox=":memory:", token="s3cret")) as http:
        assert (await http.request(method, path)).status_code == 200


@pytest.mark.anyio
async def test_health_counts_what_is_pending_and_what_failed(tmp_path):
    gate = threading.Event()

    def notify(notification):
        if notification.message == "bad":
            raise RuntimeError
        gate.wait(20)

    app = create_app(notify, outbox=tmp_path / "outbox")
    assert await health(app) == {"status": "ok", "pending": 0, "failed": 0}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(post, app)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 1, "failed": 0}))
        await post(app, json={"message": "bad"})
        assert await health(app) == {"status": "ok", "pending": 2, "failed": 1}
        gate.set()
    assert await health(app) == {"status": "ok", "pending": 1, "failed": 1}


async def _is(answer, expected):
    return await answer == expected


@pytest.mark.anyio
async def test_past_max_pending_the_answer_is_503_until_there_is_room():
    gate, sent = threading.Event(), []

    def notify(notification):
        gate.wait(20)
        sent.append(notification.id)

    app = create_app(notify, outbox=":memory:", max_pending=2)
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(post, app)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 2, "failed": 0}))
        response = await post(app)
        refusal(response, 503)
        assert int(response.headers["retry-after"]) > 0
        gate.set()
    assert (await post(app)).status_code == 202
    assert len(sent) == 3


KEY = {"idempotency-key": "order 66!"}


@pytest.mark.anyio
async def test_the_same_key_and_content_get_the_same_answer_and_notify_once(tmp_path):
    sent = []
    app = create_app(sent.append, outbox=tmp_path / "outbox")
    first = await post(app, headers=KEY)
    second = await post(app, headers=KEY, json={"message": "some notification"})
    assert (first.status_code, second.status_code, first.json()) == (202, 202, second.json())
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert [n.id for n in sent] == [first.json()["id"]]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("email", "message"), [(USER, "other"), ("other@example.com", "hi"), ("other@example.com", "other")]
)
async def test_the_same_key_with_other_content_is_refused(email, message):
    sent = []
    app = create_app(sent.append, outbox=":memory:")
    await post(app, headers=KEY, json={"message": "hi"})
    refusal(await post(app, email, headers=KEY, json={"message": message}), 422)
    assert [(n.email, n.message) for n in sent] == [(USER, "hi")]
    assert (await health(app))["pending"] == 0


@pytest.mark.anyio
@pytest.mark.parametrize(
    "key", ["k", ' ~!"#' * 50, "k" * 255, "%0A", "' OR 1=1 --"], ids=["1", "signs", "255", "%", "SQL"]
)
async def test_a_key_is_up_to_255_printable_ascii_characters(key):
    app = create_app(lambda n: None, outbox=":memory:")
    first, second = [await post(app, headers={"idempotency-key": key}) for _ in range(2)]
    assert first.json() == second.json()
    assert (await post(app, headers={"idempotency-key": key[:-1] + "?"})).json() != first.json()


@pytest.mark.anyio
async def test_without_a_key_the_same_again_is_another_notification():
    sent = []
    app = create_app(sent.append, outbox=":memory:")
    answers = [(await post(app)).json()["id"] for _ in range(3)]
    assert len(set(answers)) == 3
    assert [n.id for n in sent] == answers


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["by the relay", "by the next request with a key"])
async def test_a_key_is_forgotten_after_24_hours(tmp_path, way):
    app = create_app(lambda n: None, outbox=tmp_path / "outbox")

    def keys(seconds=0):
        with closing(sqlite3.connect(tmp_path / "outbox" / "outbox.db")) as db, db:
            db.execute("UPDATE keys SET at = at - ?", (seconds,))
            return db.execute("SELECT count(*) FROM keys").fetchone()[0]

    first = (await post(app, headers=KEY)).json()
    assert keys(seconds=24 * 3600 - 60) == 1
    assert (await post(app, headers=KEY)).json() == first
    keys(seconds=120)
    if way == "by the relay":
        async with lifespan(create_app(outbox=tmp_path / "outbox")):
            await soon(lambda: keys() == 0)
    assert (await post(app, headers=KEY)).json() != first


@pytest.mark.anyio
async def test_a_refused_request_does_not_use_up_its_key():
    app = create_app(lambda n: None, outbox=":memory:")
    refusal(await post(app, headers=KEY, json={"message": 1}), 422)
    response = await post(app, headers=KEY)
    assert (response.status_code, response.headers.get("idempotent-replayed")) == (202, None)


@pytest.mark.anyio
async def test_eight_at_once_with_one_key_notify_once(tmp_path):
    sent, answers = [], []
    apps = [create_app(sent.append, outbox=tmp_path / "outbox") for _ in range(2)]

    async def ask(app):
        answers.append(await post(app, headers=KEY))

    async with anyio.create_task_group() as tasks:
        for app in apps * 4:
            tasks.start_soon(ask, app)
    assert [answer.status_code for answer in answers] == [202] * 8
    assert {answer.json()["id"] for answer in answers} == {n.id for n in sent}
    assert len(sent) == 1
    assert sum("idempotent-replayed" in answer.headers for answer in answers) == 7


@pytest.fixture
async def document(anyio_backend):
    async with client(create_app(outbox=":memory:")) as http:
        return (await http.get("/openapi.json")).json()


@pytest.mark.anyio
async def test_the_document_tells_every_route_and_answer(document):
    assert document["openapi"].startswith("3.1.")
    assert document["info"].keys() >= {"title", "version"}
    answers = {
        (method.upper(), path): set(operation["responses"])
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert answers.keys() == {
        ("POST", "/send-notification/{email}"),
        ("GET", "/health"),
        ("HEAD", "/health"),
        ("GET", "/openapi.json"),
    }
    sending = answers["POST", "/send-notification/{email}"]
    assert sending == {"202", "400", "401", "404", "405", "413", "415", "422", "503", "500"}
    assert answers["GET", "/health"] == {"200", "404", "405", "503", "500"}
    assert answers["GET", "/openapi.json"] == {"200", "404", "405", "500"}


@pytest.mark.anyio
async def test_the_document_tells_the_body_and_the_headers(document):
    operation = document["paths"]["/send-notification/{email}"]["post"]
    assert not operation["requestBody"].get("required", False)
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == {"message"}
    assert schema["properties"]["message"]["maxLength"] == 10_000
    email, key = operation["parameters"]
    assert (email["name"], email["in"], email["required"]) == ("email", "path", True)
    assert (key["name"], key["in"], key.get("required", False)) == ("Idempotency-Key", "header", False)
    headers = {status: set(answer.get("headers", ())) for status, answer in operation["responses"].items()}
    assert headers["202"] == {"Idempotent-Replayed"}
    assert headers["401"] == {"WWW-Authenticate"}
    assert headers["503"] == {"Retry-After"}
    for status, answer in operation["responses"].items():
        schema = answer["content"]["application/json"]["schema"]
        assert schema["properties"].keys() == ({"id", "message"} if status == "202" else {"detail"})


@pytest.mark.anyio
async def test_the_document_and_the_service_agree_on_addresses(document):
    schema = document["paths"]["/send-notification/{email}"]["post"]["parameters"][0]["schema"]
    pattern = schema["pattern"].removesuffix("$") + r"\Z"  # in JSON Schema's dialect $ is that

    def valid(email):
        return re.search(pattern, email) is not None and len(email) <= schema["maxLength"]

    assert [name for name, email in GOOD_ADDRESSES.items() if not valid(email)] == []
    assert [name for name, email in BAD_ADDRESSES.items() if valid(email)] == []


# ------------------------------------------------------------------------------------------------ embedding


def test_importing_and_making_apps_creates_nothing_and_starts_nothing(tmp_path):
    code = "import os, threading, service; service.create_app(); service.create_app(print, log='l', outbox='o/p');"
    code += "assert threading.active_count() == 1; assert os.listdir() == []"
    env = os.environ | {"PYTHONPATH": str(HERE)}
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=env, check=True)


@pytest.mark.anyio
async def test_the_answer_is_sent_before_the_notifier_is_called():
    order = []

    async def send(message):
        order.append(message["type"])

    await drive(create_app(lambda n: order.append("notified"), outbox=":memory:"), send)
    assert order == ["http.response.start", "http.response.body", "notified"]


@pytest.mark.anyio
@pytest.mark.parametrize("blocked", ["def", "async def"])
async def test_the_answer_does_not_wait_for_the_notifier(blocked):
    gate, done, messages = threading.Event(), [], []

    def in_thread(notification):
        assert gate.wait(20)
        done.append(notification)

    async def on_loop(notification):
        await soon(gate.is_set, 20)
        done.append(notification)

    async def send(message):
        messages.append(message["type"])

    app = create_app(in_thread if blocked == "def" else on_loop, outbox=":memory:")
    async with anyio.create_task_group() as tasks:
        for _ in range(5):
            tasks.start_soon(drive, app, send)
        await soon(lambda: messages.count("http.response.body") == 5)
        assert done == []
        gate.set()
    assert len(done) == 5


class Recorder:
    def __init__(self):
        self.sent = []

    def __len__(self):
        return 0  # false, and yet a notifier

    def method(self, notification):
        self.sent.append(notification)

    async def async_method(self, notification):
        await anyio.lowlevel.checkpoint()
        self.sent.append(notification)

    def partial(self, _, notification):
        self.sent.append(notification)

    async def async_partial(self, _, notification):
        await anyio.lowlevel.checkpoint()
        self.sent.append(notification)


class CallableRecorder(Recorder):
    __call__ = Recorder.method


class AsyncCallableRecorder(Recorder):
    __call__ = Recorder.async_method


@pytest.mark.anyio
@cases(
    "kind, notifier",
    {
        "built-in": (Recorder, lambda recorder: recorder.sent.append),
        "method": (Recorder, lambda recorder: recorder.method),
        "async method": (Recorder, lambda recorder: recorder.async_method),
        "partial": (Recorder, lambda recorder: functools.partial(recorder.partial, 1)),
        "async partial": (Recorder, lambda recorder: functools.partial(recorder.async_partial, 1)),
        "lambda": (Recorder, lambda recorder: lambda notification: recorder.method(notification)),
        "callable": (CallableRecorder, lambda recorder: recorder),
        "async callable": (AsyncCallableRecorder, lambda recorder: recorder),
    },
)
async def test_any_callable_of_one_notification_is_a_notifier(kind, notifier):
    recorder = kind()
    app = create_app(notifier(recorder), outbox=":memory:")
    answers = [(await post(app)).json()["id"] for _ in range(2)]
    assert [n.id for n in recorder.sent] == answers
    assert all(type(n) is Notification for n in recorder.sent)


@pytest.mark.anyio
async def test_a_def_notifier_runs_in_a_thread_and_an_async_def_on_the_callers_loop():
    threads = []

    async def on_loop(notification):
        threads.append((threading.get_ident(), anyio.lowlevel.current_token()))

    await post(create_app(lambda n: threads.append(threading.get_ident()), outbox=":memory:"))
    await post(create_app(on_loop, outbox=":memory:"))
    assert threads[0] != threading.get_ident()
    assert threads[1] == (threading.get_ident(), anyio.lowlevel.current_token())


@pytest.mark.anyio
async def test_at_most_concurrency_def_notifiers_run_at_once():
    lock, permits = threading.Lock(), threading.Semaphore(0)
    running, most, done = set(), 0, []

    def notify(notification):
        nonlocal most
        with lock:
            running.add(notification.id)
            most = max(most, len(running))
        permits.acquire(timeout=20)
        with lock:
            running.remove(notification.id)
            done.append(notification.id)

    app = create_app(notify, outbox=":memory:", concurrency=3)
    async with anyio.create_task_group() as tasks:
        for _ in range(9):
            tasks.start_soon(post, app)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 9, "failed": 0}))
        for released in range(9):
            await soon(lambda: len(done) == released and len(running) == min(3, 9 - released))  # noqa: B023
            permits.release()
    assert (most, len(done)) == (3, 9)


@pytest.mark.anyio
async def test_blocked_notifiers_leave_the_hosts_thread_pool_free():
    gate, blocked = threading.Event(), []

    def notify(notification):
        blocked.append(notification)
        gate.wait(20)

    def endpoint(request):
        return PlainTextResponse(str(gate.is_set()))

    app = create_app(notify, outbox=":memory:", concurrency=60)
    host = Starlette(routes=[Route("/host", endpoint), Mount("/notify", app)])
    async with client(host) as http, anyio.create_task_group() as tasks:
        for _ in range(60):
            tasks.start_soon(http.post, f"/notify{PATH}")
        await soon(lambda: len(blocked) == 60)
        assert (await http.get("/host")).text == "False"
        gate.set()


@pytest.mark.anyio
async def test_by_default_it_writes_log_txt_and_outbox_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    response = await post(create_app())
    assert [n.id for n in read(tmp_path / "log.txt")] == [response.json()["id"]]
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "outbox"}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", [str, Path])
async def test_paths_may_be_text_or_paths(tmp_path, kind):
    await post(create_app(log=kind(tmp_path / "a.log"), outbox=kind(tmp_path / "b" / "c")))
    assert len(read(tmp_path / "a.log")) == 1
    assert (tmp_path / "b" / "c").is_dir()


@pytest.mark.anyio
async def test_a_memory_outbox_keeps_nothing_on_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = []
    app = create_app(sent.append, outbox=":memory:")
    async with lifespan(app):
        await post(app)
    assert len(sent) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.anyio
async def test_the_environment_sets_the_app_of_the_module(tmp_path, monkeypatch):
    settings = {"LOG": tmp_path / "a.log", "OUTBOX": tmp_path / "b", "TOKEN": "s3cret", "MAX_PENDING": 1}
    for name, value in (settings | {"DELAY": AN_HOUR, "CONCURRENCY": 2, "FSYNC": "false"}).items():
        monkeypatch.setenv(f"NOTIFY_{name}", str(value))
    app = runpy.run_path(str(HERE / "service.py"))["app"]
    refusal(await post(app), 401)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(functools.partial(post, app, headers=TOKEN))
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 1, "failed": 0}))
        refusal(await post(app, headers=TOKEN), 503)
        assert read(tmp_path / "a.log") == []
        assert (tmp_path / "b").is_dir()
        monkeypatch.setenv("NOTIFY_DELAY", "0")
        monkeypatch.setenv("NOTIFY_OUTBOX", ":memory:")
        await post(runpy.run_path(str(HERE / "service.py"))["app"], headers=TOKEN)
        assert len(read(tmp_path / "a.log")) == 1
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("text", ["true", "false", "True", "FALSE", "1", "0"])
def test_a_switch_in_the_environment_is_a_word_or_a_digit(monkeypatch, text):
    monkeypatch.setenv("NOTIFY_FSYNC", text)
    assert isinstance(runpy.run_path(str(HERE / "service.py"))["app"], Starlette)


@pytest.mark.anyio
@pytest.mark.parametrize("prefix", ["/notify", "/api/v1/notify"])
async def test_mounted_it_answers_under_the_prefix(prefix):
    sent = []
    host = Starlette(routes=[Mount(prefix, create_app(sent.append, outbox=":memory:"))])
    for email in (USER, f"{USER}/"):
        assert (await post(host, email, f"{prefix}/send-notification/")).status_code == 202
    assert [n.email for n in sent] == [USER, USER]
    async with client(host) as http:
        assert (await http.get(f"{prefix}/health")).json()["status"] == "ok"
        assert (await http.get(f"{prefix}/openapi.json")).json()["servers"][0]["url"] == prefix
        refusal(await http.get(f"{prefix}/nothing"), 404)
        refusal(await http.get(f"{prefix}{PATH}"), 405)
        assert (await http.post(f"{prefix}{PATH}%0A")).status_code in (404, 422)
    assert len(sent) == 2


@pytest.mark.anyio
async def test_the_document_names_the_root_path_of_a_proxy():
    app = create_app(outbox=":memory:")
    transport = httpx.ASGITransport(app, root_path="/behind")
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        assert (await http.get("/behind/openapi.json")).json()["servers"][0]["url"] == "/behind"


@pytest.mark.parametrize("kind", ["def", "async def", "log"])
def test_one_app_serves_several_event_loops_in_turn(tmp_path, kind):
    sent = []

    async def notify(notification):
        sent.append(notification)

    notifier = {"def": sent.append, "async def": notify, "log": None}[kind]
    app = create_app(notifier, log=tmp_path / "log.txt", outbox=tmp_path / "outbox")
    answers = [asyncio.run(post(app)).json()["id"] for _ in range(3)]
    assert [n.id for n in sent or read(tmp_path / "log.txt")] == answers
    assert asyncio.run(health(app)) == {"status": "ok", "pending": 0, "failed": 0}


def test_one_app_serves_six_threads_each_with_its_own_loop(tmp_path):
    answers = []
    app = create_app(log=tmp_path / "log.txt", outbox=tmp_path / "outbox", fsync=False)

    async def ask():
        async with client(app) as http:
            answers.extend([(await http.post(PATH)).json()["id"] for _ in range(20)])

    threads = [threading.Thread(target=asyncio.run, args=[ask()]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(answers) == 120
    assert sorted(n.id for n in read(tmp_path / "log.txt")) == sorted(answers)


@pytest.mark.parametrize("kind", ["def", "log"])
def test_one_app_may_have_its_lifespan_on_several_loops_at_once_and_end_it_while_others_post(tmp_path, kind):
    sent, answers = [], []
    log = tmp_path / "log.txt"
    app = create_app(sent.append if kind == "def" else None, log=log, outbox=tmp_path / "outbox", fsync=False)

    async def one_loop():
        async with lifespan(app):
            answers.extend([(await post(app)).json()["id"] for _ in range(5)])

    def loops(_):
        for _ in range(5):
            asyncio.run(one_loop())

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(loops, range(4)))
    assert len(answers) == 100
    assert sorted([n.id for n in sent] or ids(log)) == sorted(answers)
    assert asyncio.run(health(app)) == {"status": "ok", "pending": 0, "failed": 0}


@pytest.mark.anyio
async def test_at_its_end_a_lifespan_waits_for_what_the_relay_is_delivering(left):
    started, ended = [], []

    async def notify(notification):
        started.append(notification)
        await anyio.sleep(0.1)
        ended.append(notification)

    async with lifespan(create_app(notify, outbox=left[0])):
        await soon(lambda: len(started) == 3)
        assert ended == []
    assert len(ended) == 3


@pytest.mark.anyio
async def test_an_error_in_the_hosts_own_lifespan_reaches_it_as_it_was():
    with pytest.raises(LookupError, match="the host's"):
        async with lifespan(create_app(outbox=":memory:")):
            raise LookupError("the host's")


# --------------------------------------------------------------------------------------------------- outbox


@pytest.mark.anyio
async def test_only_the_owner_may_read_the_log_and_the_outbox(tmp_path):
    await post(create_app(log=tmp_path / "log.txt", outbox=tmp_path / "outbox"))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes.pop(tmp_path / "outbox") == 0o700
    assert set(modes.values()) == {0o600}
    assert any(path.parent == tmp_path / "outbox" for path in modes)


@pytest.mark.anyio
async def test_the_log_may_be_renamed_at_any_time(tmp_path):
    log = tmp_path / "log.txt"
    app = create_app(log=log, outbox=tmp_path / "outbox")
    first, second = (await post(app)).json()["id"], (await post(app)).json()["id"]
    log.rename(tmp_path / "log.txt.1")
    third = (await post(app)).json()["id"]
    assert [n.id for n in read(tmp_path / "log.txt.1")] == [first, second]
    assert [n.id for n in read(log)] == [third]


@pytest.mark.anyio
async def test_apps_on_different_outboxes_share_nothing(tmp_path):
    gate, slow, quick = threading.Event(), [], []

    def blocked(notification):
        slow.append(notification.message)
        gate.wait(20)

    first = create_app(blocked, outbox=tmp_path / "one", max_pending=1, concurrency=1)
    second = create_app(quick.append, outbox=tmp_path / "two", max_pending=1, concurrency=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(functools.partial(post, first, headers=KEY, json={"message": "one"}))
        await soon(lambda: slow)
        response = await post(second, headers=KEY, json={"message": "two"})
        assert (response.status_code, "idempotent-replayed" in response.headers) == (202, False)
        assert ((await health(first))["pending"], (await health(second))["pending"]) == (1, 0)
        gate.set()
    assert (slow, [n.message for n in quick]) == (["one"], ["two"])


@pytest.mark.anyio
async def test_apps_on_one_outbox_take_nothing_from_each_other(tmp_path):
    gate, slow, quick = threading.Event(), [], []

    def blocked(notification):
        slow.append(notification.id)
        gate.wait(20)

    first = create_app(blocked, outbox=tmp_path / "outbox")
    second = create_app(quick.append, outbox=tmp_path / "outbox")
    async with lifespan(first), anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(post, first)
        await soon(lambda: len(slow) == 3)
        async with lifespan(second):
            own = [(await post(second)).json()["id"] for _ in range(3)]
            assert (await health(second))["pending"] == 0
        assert [n.id for n in quick] == own
        assert len(slow) == 3
        gate.set()
    assert len(slow) == 3


@pytest.mark.anyio
async def test_what_is_being_delivered_when_its_lifespan_ends_is_left_to_its_own_process(tmp_path):
    gate, slow, quick = threading.Event(), [], []

    def blocked(notification):
        slow.append(notification.id)
        gate.wait(20)

    first = create_app(blocked, outbox=tmp_path / "outbox")
    async with anyio.create_task_group() as tasks:
        async with lifespan(first):
            tasks.start_soon(post, first)
            await soon(lambda: slow)
        own = (await post(create_app(quick.append, outbox=tmp_path / "outbox"))).json()["id"]  # looks for what is left
        gate.set()
    await soon(lambda: _is(health(first), {"status": "ok", "pending": 0, "failed": 0}))
    assert [n.id for n in quick] == [own]
    assert len(slow) == 1


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """The folder of a server that was killed when it had acknowledged three notifications and delivered none."""
    folder = tmp_path_factory.mktemp("dead")
    with serve(folder, delay=AN_HOUR) as server:
        for message in ("one", "two", "three"):
            server.post(message)
        server.kill()
    assert ids(server.log) == []
    return folder, server.accepted


@pytest.fixture
def left(dead, tmp_path):
    """A copy of the outbox that a killed server left, and the ids in it."""
    folder, accepted = dead
    shutil.copytree(folder / "outbox", tmp_path / "outbox")
    return tmp_path / "outbox", accepted


@pytest.mark.anyio
async def test_what_a_dead_process_left_is_written_at_the_next_start(left, tmp_path):
    outbox, accepted = left
    app = create_app(log=tmp_path / "log.txt", outbox=outbox)
    async with lifespan(app):
        await soon(lambda: len(ids(tmp_path / "log.txt")) >= 3)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    assert sorted(n.id for n in read(tmp_path / "log.txt")) == sorted(accepted)
    assert {n.message for n in read(tmp_path / "log.txt")} == {"one", "two", "three"}


@pytest.mark.anyio
@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_what_a_dead_process_left_is_given_to_the_notifier_with_the_same_id(left, kind):
    outbox, accepted = left
    sent = []

    async def notify(notification):
        sent.append(notification)

    app = create_app(sent.append if kind == "def" else notify, outbox=outbox)
    async with lifespan(app):
        await soon(lambda: len(sent) >= 3)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    assert sorted((n.message, n.id) for n in sent) == sorted(zip(["one", "two", "three"], accepted, strict=True))


@pytest.mark.anyio
async def test_without_a_lifespan_the_next_traffic_adopts_what_a_dead_process_left(left, tmp_path):
    outbox, accepted = left
    app = create_app(log=tmp_path / "log.txt", outbox=outbox)
    own = (await post(app)).json()["id"]
    assert sorted(n.id for n in read(tmp_path / "log.txt")) == sorted([own, *accepted])


@pytest.mark.anyio
async def test_what_was_adopted_and_delivered_is_not_adopted_again(left):
    async def serve_one(expected):
        sent = []
        app = create_app(sent.append, outbox=left[0])
        async with lifespan(app):
            await soon(lambda: len(sent) >= expected)
            await post(app)
            await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
        return len(sent) - 1

    assert [await serve_one(3), await serve_one(0)] == [3, 0]


@pytest.mark.anyio
async def test_eight_that_start_at_once_on_what_a_dead_process_left_write_it_once(left, tmp_path):
    outbox, accepted = left
    log = tmp_path / "log.txt"
    done = anyio.Event()

    async def start():
        async with lifespan(create_app(log=log, outbox=outbox)):
            await done.wait()

    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(start)
        await soon(lambda: len(ids(log)) >= 3)
        done.set()
    own = (await post(create_app(log=log, outbox=outbox))).json()["id"]
    assert sorted(n.id for n in read(log)) == sorted([own, *accepted])


@pytest.mark.anyio
@pytest.mark.parametrize("fails", [True, False], ids=["failed", "delivered"])
async def test_what_was_adopted_is_pending_and_leaves_max_pending_to_what_comes_in(left, fails):
    gate, sent = threading.Event(), []

    def notify(notification):
        if notification.id not in left[1]:
            gate.wait(20)
        elif fails:
            raise RuntimeError
        sent.append(notification)

    app = create_app(notify, outbox=left[0], max_pending=1)
    count = 3 if fails else 0
    async with lifespan(app), anyio.create_task_group() as tasks:
        await soon(lambda: len(sent) == 3 - count)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": count, "failed": count}))
        tasks.start_soon(post, app)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": count + 1, "failed": count}))
        refusal(await post(app), 503)
        gate.set()


@pytest.mark.anyio
async def test_what_was_adopted_and_not_begun_is_anothers_when_the_lifespan_is_over(left):
    with closing(sqlite3.connect(left[0] / "outbox.db")) as db, db:
        for _ in range(8):
            db.execute("INSERT INTO pending (worker, line) SELECT worker, line FROM pending")
    gate, first, second = anyio.Event(), [], []

    async def notify(notification):
        first.append(notification)
        await gate.wait()

    app = create_app(notify, outbox=left[0])
    async with lifespan(app):
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 3 * 2**8, "failed": 0}))
        await soon(lambda: len(first) == 500)
        gate.set()
    async with lifespan(create_app(second.append, outbox=left[0])):
        await soon(lambda: len(first) + len(second) == 3 * 2**8)
    assert len(second) == 3 * 2**8 - 500


@pytest.mark.anyio
@pytest.mark.parametrize("file", ["log.txt", "log.txt.1"])
async def test_a_line_written_before_the_crash_is_not_written_again(left, tmp_path, file):
    outbox, accepted = left
    at = "2026-11-22T05:46:00.123Z"
    (tmp_path / file).write_text(f"{at} {accepted[0]} notification for {USER}: one\n")
    app = create_app(log=tmp_path / "log.txt", outbox=outbox)
    async with lifespan(app):
        await soon(lambda: len(ids(tmp_path / "log.txt") + ids(tmp_path / "log.txt.1")) >= 3)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    lines = read(tmp_path / "log.txt") + read(tmp_path / "log.txt.1")
    assert sorted(n.id for n in lines) == sorted(accepted)


@pytest.mark.anyio
async def test_a_line_torn_by_the_crash_is_written_again_whole(left, tmp_path):
    outbox, accepted = left
    log = tmp_path / "log.txt"
    log.write_text(f"2026-11-22T05:46:00.123Z {accepted[0]} notification for {USER}: on")
    app = create_app(log=log, outbox=outbox)

    def whole():
        return [line for line in log.read_text().split("\n") if line.endswith((": one", ": two", ": three"))]

    async with lifespan(app):
        await soon(lambda: len(whole()) >= 3)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    assert sorted(_parse(line).id for line in whole()) == sorted(accepted)


FORGERIES = {
    "the id": "{id}",
    "the id as a second column": "{id} notification for user@example.com: one",
    "a whole line": "2026-11-22T05:46:00.123Z {id} notification for user@example.com: one",
    "a line after a newline": "x\n2026-11-22T05:46:00.123Z {id} notification for user@example.com: one\n",
    "a line after a CR": "x\r2026-11-22T05:46:00.123Z {id} notification for user@example.com: one",
    "a line after U+2028": "x\u20282026-11-22T05:46:00.123Z {id} notification for user@example.com: one",
    "a line after many": "x" * 9000 + " {id} notification for user@example.com: one",
}


@pytest.mark.anyio
@cases("forgery", FORGERIES)
async def test_anothers_message_cannot_pass_for_mine_after_a_crash(left, tmp_path, forgery):
    outbox, accepted = left
    log = tmp_path / "log.txt"
    forged = [
        await post(create_app(log=log, outbox=":memory:"), json={"message": forgery.format(id=id)}) for id in accepted
    ]
    app = create_app(log=log, outbox=outbox)
    async with lifespan(app):
        await soon(lambda: len(ids(log)) >= 6)
    assert sorted(n.id for n in read(log)) == sorted([*accepted, *(response.json()["id"] for response in forged)])


@pytest.mark.anyio
async def test_an_outbox_whose_making_was_interrupted_is_made_again(tmp_path):
    """A process that is killed, or a disk that is full, leaves SQLite's header, and not one table."""
    (tmp_path / "outbox").mkdir()
    with closing(sqlite3.connect(tmp_path / "outbox" / "outbox.db")) as half:
        half.execute("PRAGMA journal_mode = WAL")
    app = create_app(log=tmp_path / "log.txt", outbox=tmp_path / "outbox")
    async with lifespan(app):
        answer = await post(app)
    assert ids(tmp_path / "log.txt") == [answer.json()["id"]]


@pytest.mark.anyio
async def test_log_and_outbox_may_share_a_folder(left):
    """Its own files are not read for lines: to close one would drop this process's locks, and another would tidy up."""
    outbox, accepted = left
    async with lifespan(create_app(log=outbox / "outbox.log", outbox=outbox)):
        await soon(lambda: (outbox / "outbox.log").exists() and len(ids(outbox / "outbox.log")) == len(accepted))
        visit = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.execute('DELETE FROM keys'); db.close()"
        subprocess.run([sys.executable, "-c", visit, outbox / "outbox.db"], check=True)
        assert (outbox / "outbox.db-wal").exists()


@pytest.mark.anyio
async def test_locks_of_the_dead_do_not_pile_up(tmp_path):
    outbox = tmp_path / "outbox"
    async with lifespan(create_app(log=tmp_path / "log.txt", outbox=outbox)):
        for number in range(5):
            (outbox / f"{number:016x}.lock").touch()
        await soon(lambda: not list(outbox.glob("0*00?.lock")))


# --------------------------------------------------------------------------------------------------- faults


async def a_notifier_that_fails_twice(outbox, caplog, on_loop):
    calls, times = [], []

    def notify(notification):
        calls.append(notification)
        if notification.message == "bad":
            times.append(time.monotonic())
            if len(times) <= 2:
                raise RuntimeError("the mail is down")

    async def notify_on_loop(notification):
        notify(notification)

    app = create_app(notify_on_loop if on_loop else notify, outbox=outbox)
    async with lifespan(app):
        bad = await post(app, json={"message": "bad"})
        good = await post(app, json={"message": "good"})
        assert [n.message for n in calls].count("good") == 1
        await soon(lambda: len(calls) >= 4, 20)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    assert Counter(n.id for n in calls) == {bad.json()["id"]: 3, good.json()["id"]: 1}
    assert len(set(calls)) == 2
    assert times[2] - times[1] > 1.1  # the first pause is of 1 s at most, and pauses grow
    told = [warning for warning in warnings(caplog) if bad.json()["id"] in warning]
    assert 1 <= len(told) <= 2
    assert "the mail is down" in told[0]


async def a_host_that_raises_after_the_answer_was_made(outbox):
    gate, calls = threading.Event(), []

    def notify(notification):
        calls.append(notification.message)
        if notification.message == "in flight":
            gate.wait(20)

    class Raise(BaseHTTPMiddleware):
        async def dispatch(self, request, call_next):
            response = await call_next(request)
            if "raise" in request.headers:
                raise RuntimeError
            return response

    app = create_app(notify, outbox=outbox)
    mount = Mount("/notify", app)
    host = Starlette(routes=[mount], middleware=[Middleware(Raise)], lifespan=lambda host: lifespan(app))
    transport = httpx.ASGITransport(host, raise_app_exceptions=False)
    async with lifespan(host), httpx.AsyncClient(transport=transport, base_url="http://test/notify") as http:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(functools.partial(http.post, PATH, json={"message": "in flight"}))
            await soon(lambda: calls == ["in flight"])
            response = await http.post(PATH, json={"message": "left"}, headers={"raise": "1"})
            assert response.status_code == 500
            await soon(lambda: "left" in calls)
            await soon(lambda: _is(health(app), {"status": "ok", "pending": 1, "failed": 0}))
            gate.set()
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    assert calls == ["in flight", "left"]


async def a_caller_that_is_cancelled_when_it_has_its_answer(outbox, log):
    app = create_app(log=log, outbox=outbox, delay=0.3)
    async with lifespan(app):
        with anyio.CancelScope() as caller:

            async def send(message):
                if message["type"] == "http.response.body":
                    caller.cancel()

            await drive(app, send)
        assert caller.cancelled_caught
        assert read(log) == []
        await soon(lambda: ids(log))
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    assert len(read(log)) == 1


async def a_client_that_takes_long_to_receive_its_answer(outbox):
    calls = []

    async def send(message):
        if message["type"] == "http.response.body":
            await soon(lambda: calls)

    app = create_app(calls.append, outbox=outbox)
    async with lifespan(app):
        await drive(app, send)
        await post(app)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    assert len(calls) == len(set(calls)) == 2


async def a_caller_whose_time_is_up_in_the_middle_of_the_notifier(outbox):
    calls = []

    async def notify(notification):
        calls.append(notification)
        if len(calls) == 1:
            limit.reschedule(0)
            await asyncio.sleep(AN_HOUR)

    app = create_app(notify, outbox=outbox)
    async with lifespan(app):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(None) as limit:
                await post(app)
        await soon(lambda: len(calls) >= 2)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    assert len(calls) == 2
    assert calls[0] == calls[1]


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError


async def an_async_notifier_that_raises(error):
    calls = []

    async def notify(notification):
        calls.append(notification.message)
        if len(calls) <= 2:
            raise error

    # Ends neither the relay nor its host.
    app = create_app(notify, outbox=":memory:")
    async with lifespan(app):
        assert (await post(app, json={"message": "bad"})).status_code == 202
        await soon(lambda: calls == ["bad"] * 3)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))


async def many_that_do_not_return():
    calls, gate = [], anyio.Event()

    async def notify(notification):
        calls.append(notification.message)
        if notification.message == "hangs":
            await gate.wait()
        elif calls.count(notification.message) == 1:
            raise RuntimeError

    app = create_app(notify, outbox=":memory:")
    async with lifespan(app), anyio.create_task_group() as tasks:
        for _ in range(600):
            tasks.start_soon(functools.partial(post, app, json={"message": "hangs"}))
        await soon(lambda: calls.count("hangs") == 600)
        await post(app, json={"message": "fails once"})
        await soon(lambda: calls.count("fails once") == 2)
        gate.set()


async def a_task_that_comes_when_its_row_is_gone_and_another_came():
    sent = []
    app = create_app(sent.append, outbox=":memory:")
    may_end = {"/send-notification/a@b.c": anyio.Event(), PATH: anyio.Event()}

    async def slow_host(scope, receive, send):
        async def slow_send(message):
            await send(message)
            if message["type"] == "http.response.body":
                await may_end[scope["path"]].wait()

        await app(scope, receive, slow_send)

    async with lifespan(app), anyio.create_task_group() as tasks:
        tasks.start_soon(post, slow_host, "a@b.c")
        await soon(lambda: [n.email for n in sent] == ["a@b.c"])
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
        tasks.start_soon(post, slow_host)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 1, "failed": 0}))
        for event in may_end.values():
            event.set()
            await anyio.wait_all_tasks_blocked()
    assert [n.email for n in sent] == ["a@b.c", USER]


@pytest.mark.anyio
async def test_the_relay_delivers_what_failed_or_was_abandoned_and_nothing_twice(tmp_path, caplog):
    """One test of what the names above say, since all of them wait for the relay's pauses."""
    time_is_up = a_caller_whose_time_is_up_in_the_middle_of_the_notifier(tmp_path / "6")
    ended = []

    async def run(case, *arguments):
        await case(*arguments)
        ended.append(case)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, a_notifier_that_fails_twice, ":memory:", caplog, False)
        tasks.start_soon(run, a_notifier_that_fails_twice, ":memory:", caplog, True)
        tasks.start_soon(run, a_notifier_that_fails_twice, tmp_path / "1", caplog, False)
        tasks.start_soon(run, a_notifier_that_fails_twice, tmp_path / "2", caplog, True)
        tasks.start_soon(run, a_host_that_raises_after_the_answer_was_made, tmp_path / "3")
        tasks.start_soon(run, a_host_that_raises_after_the_answer_was_made, ":memory:")
        tasks.start_soon(run, a_caller_that_is_cancelled_when_it_has_its_answer, tmp_path / "4", tmp_path / "log.txt")
        tasks.start_soon(run, a_client_that_takes_long_to_receive_its_answer, tmp_path / "5")
        tasks.start_soon(run, anyio.to_thread.run_sync, asyncio.run, time_is_up)
        for error in (RuntimeError, UnprintableError, SystemExit, GeneratorExit, asyncio.CancelledError):
            tasks.start_soon(run, an_async_notifier_that_raises, error)
        tasks.start_soon(run, many_that_do_not_return)
        tasks.start_soon(run, a_task_that_comes_when_its_row_is_gone_and_another_came)
    assert len(ended) == 16


@pytest.mark.anyio
@pytest.mark.parametrize(
    "error", [RuntimeError, SystemExit, KeyboardInterrupt, StopIteration, type("Own", (BaseException,), {})]
)
async def test_whatever_a_notifier_raises_harms_no_other(error):
    sent = []

    def notify(notification):
        if notification.message == "bad":
            raise error("the mail is down")
        sent.append(notification.message)

    app = create_app(notify, outbox=":memory:", concurrency=1)
    for message in ("bad", "one", "bad", "two"):
        assert (await post(app, json={"message": message})).status_code == 202
    assert sent == ["one", "two"]
    assert await health(app) == {"status": "ok", "pending": 2, "failed": 2}


@pytest.mark.anyio
async def test_with_a_concurrency_of_one_each_of_many_at_once_is_notified():
    sent = []
    app = create_app(sent.append, outbox=":memory:", concurrency=1)
    async with anyio.create_task_group() as tasks:
        for _ in range(30):
            tasks.start_soon(post, app)
    assert len({n.id for n in sent}) == len(sent) == 30


@pytest.mark.anyio
@pytest.mark.parametrize(("served", "kind"), [(False, "delay"), (True, "delay"), (True, "async def")])
async def test_of_520_at_once_the_relay_takes_what_is_too_much_for_the_requests_tasks(tmp_path, served, kind):
    answers, delivered = [], []
    gate = anyio.Event()

    async def notify(notification):
        await gate.wait()
        delivered.append(notification.id)

    notifier = {"async def": notify, "delay": None}[kind]
    app = create_app(notifier, log=tmp_path / "log.txt", outbox=":memory:", delay=0.2)

    async def ask():
        answers.append((await post(app)).json()["id"])

    def done():
        return delivered or ids(tmp_path / "log.txt")

    async with AsyncExitStack() as stack:
        if served:
            await stack.enter_async_context(lifespan(app))
        async with anyio.create_task_group() as tasks:
            for _ in range(520):
                tasks.start_soon(ask)
            if served and kind == "async def":
                await soon(lambda: len(answers) == 20)  # the other requests' tasks have to do with one each
            gate.set()
        if served:
            await soon(lambda: len(done()) == 520)
        assert sorted(done()) == sorted(answers)
        assert await health(app) == {"status": "ok", "pending": 0, "failed": 0}


@pytest.mark.anyio
async def test_full_with_no_lifespan_it_heals_with_the_next_traffic(tmp_path):
    log = tmp_path / "gone" / "log.txt"
    app = create_app(log=log, outbox=tmp_path / "outbox", max_pending=2)
    assert [(await post(app)).status_code for _ in range(3)] == [202, 202, 503]
    log.parent.mkdir()

    async def room():
        return (await post(app)).status_code == 202

    await soon(room)


@pytest.mark.anyio
async def test_at_max_pending_a_key_that_was_answered_is_answered_again():
    def notify(notification):
        raise RuntimeError

    app = create_app(notify, outbox=":memory:", max_pending=1)
    first = await post(app, headers=KEY)
    again, other, full = (
        await post(app, headers=KEY),
        await post(app, headers=KEY, json={"message": "x"}),
        await post(app),
    )
    assert [answer.status_code for answer in (first, again, other, full)] == [202, 202, 422, 503]
    assert again.json() == first.json()


@pytest.mark.anyio
async def test_many_failures_do_not_flood_the_servers_log(caplog):
    def notify(notification):
        raise RuntimeError("the mail is down")

    app = create_app(notify, outbox=":memory:")
    async with client(app) as http:
        for _ in range(500):
            assert (await http.post(PATH)).status_code == 202
    assert (await health(app))["failed"] == 500
    assert 1 <= len(warnings(caplog)) <= 100


def _a_directory(log):
    log.mkdir()
    return log.rmdir


def _in_no_folder(log):
    return log.parent.mkdir


def _a_dangling_link(log):
    log.parent.mkdir()
    log.symlink_to(log.parent / "missing" / "log.txt")
    return log.unlink


@pytest.mark.anyio
@cases("break_it", {"a directory": _a_directory, "in no folder": _in_no_folder, "a dangling link": _a_dangling_link})
async def test_a_log_that_cannot_be_written_stops_nothing_and_heals_by_itself(tmp_path, caplog, break_it):
    log = tmp_path / "logs" / "log.txt"
    if break_it is _a_directory:
        log.parent.mkdir()
    mend = break_it(log)
    app = create_app(log=log, outbox=tmp_path / "outbox")
    async with lifespan(app):
        answers = [await post(app) for _ in range(30)]
        assert [answer.status_code for answer in answers] == [202] * 30
        assert await health(app) == {"status": "ok", "pending": 30, "failed": 30}
        assert 1 <= len(warnings(caplog)) <= 5
        assert str(log) in warnings(caplog)[0]
        mend()
        await soon(lambda: len(ids(log)) >= 30)
        await soon(lambda: _is(health(app), {"status": "ok", "pending": 0, "failed": 0}))
    assert sorted(n.id for n in read(log)) == sorted(answer.json()["id"] for answer in answers)


@pytest.mark.anyio
async def test_without_a_lifespan_the_next_traffic_retries(tmp_path):
    log = tmp_path / "log.txt"
    log.mkdir()
    app = create_app(log=log, outbox=tmp_path / "outbox")
    first = (await post(app)).json()["id"]
    log.rmdir()

    async def retried():
        await post(app)
        return first in ids(log)

    await soon(retried)
    assert Counter(n.id for n in read(log))[first] == 1


@pytest.mark.anyio
async def test_what_failed_is_kept_for_the_next_start(tmp_path):
    def notify(notification):
        raise RuntimeError

    app = create_app(notify, outbox=tmp_path / "outbox")
    async with lifespan(app):
        failed = (await post(app)).json()["id"]
    sent = []
    async with lifespan(create_app(sent.append, outbox=tmp_path / "outbox")):
        await soon(lambda: sent)
    assert [n.id for n in sent] == [failed]


TORN = {
    "half a line": b"2026-11-22T05:46:00.123Z 5f0c notification for a@b.c: ha",
    "one byte": b"2",
    "9,000 bytes": b"x" * 9000,
    "half a character": "é".encode()[:1],
}


@pytest.mark.anyio
@cases("tail", TORN)
@pytest.mark.parametrize(
    "head", [b"", b"2026-11-22T05:46:00.123Z 5f0b notification for a@b.c: whole\n"], ids=["", "after a whole line"]
)
async def test_a_torn_last_line_is_never_glued_to_the_next(tmp_path, head, tail):
    log = tmp_path / "log.txt"
    log.write_bytes(head + tail)
    answers = [(await post(create_app(log=log, outbox=":memory:"))).json()["id"] for _ in range(2)]
    assert log.read_bytes().startswith(head)
    rest = log.read_bytes().removeprefix(head)
    lines = rest.removeprefix(tail + b"\n").decode().split("\n")
    assert [_parse(line).id for line in lines[:-1]] == answers
    assert lines[-1] == ""


def database(outbox: Path) -> Path:
    [path] = [path for path in outbox.iterdir() if path.read_bytes().startswith(b"SQLite format 3\0")]
    return path


def _a_file(outbox):
    shutil.rmtree(outbox)
    outbox.write_text("mine")


def _under_a_file(outbox):
    _a_file(outbox.parent)


def _garbage(outbox):
    database(outbox).write_bytes(b"garbage " * 4096)


def _short_garbage(outbox):
    database(outbox).write_bytes(b"x")


def _cut_in_half(outbox):
    path = database(outbox)
    os.truncate(path, path.stat().st_size // 2)


def _cut_in_half_alone(outbox):
    with closing(sqlite3.connect(database(outbox))) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert not list(outbox.glob("*-wal"))
    _cut_in_half(outbox)


def _anothers(outbox):
    path = database(outbox)
    for file in outbox.glob(f"{path.name}*"):
        file.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE pending (mine)")


def _emptied(outbox):
    os.truncate(database(outbox), 0)


def _scribbled(outbox):
    path = database(outbox)
    path.write_bytes(path.read_bytes()[:100] + b"\xaa" * (path.stat().st_size - 100))


def _log_damaged_at(start, end):
    def damage(outbox):
        path = next(outbox.glob("*-wal"))
        data = path.read_bytes()
        path.write_bytes(data[:start] + bytes(255 - byte for byte in data[start:end]) + data[end:])

    return damage


def _log_zeroed(outbox):
    path = next(outbox.glob("*-wal"))
    path.write_bytes(bytes(32) + path.read_bytes()[32:])


DAMAGES = {
    "a file": _a_file,
    "under a file": _under_a_file,
    "garbage": _garbage,
    "one byte of garbage": _short_garbage,
    "cut in half": _cut_in_half,
    "cut in half with no log beside it": _cut_in_half_alone,
    "emptied beside its log": _emptied,
    "scribbled over": _scribbled,
    "another program's database": _anothers,
    "its log's first byte": _log_damaged_at(0, 1),
    "its log's page size": _log_damaged_at(8, 12),
    "its log's salt": _log_damaged_at(16, 24),
    "its log's header zeroed": _log_zeroed,
}


@pytest.fixture(params=DAMAGES.values(), ids=DAMAGES)
def damaged(request, dead, tmp_path):
    shutil.copytree(dead[0] / "outbox", tmp_path / "deep" / "outbox")
    request.param(tmp_path / "deep" / "outbox")
    return tmp_path / "deep" / "outbox"


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file but the -shm, an index that whoever opens a database after a crash makes anew."""
    paths = [path for path in folder.rglob("*") if not path.name.endswith("-shm")]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.mark.anyio
async def test_a_damaged_outbox_is_refused_at_start_and_not_touched(damaged, tmp_path):
    before = contents(tmp_path)
    with pytest.raises(Exception, match=re.escape(str(damaged))):
        async with lifespan(create_app(log=tmp_path / "log.txt", outbox=damaged)):
            pass
    assert contents(tmp_path) == before


@pytest.mark.anyio
async def test_embedded_with_no_start_a_damaged_outbox_is_a_503_and_not_touched(damaged, tmp_path, caplog):
    before = contents(tmp_path)
    app = create_app(log=tmp_path / "log.txt", outbox=damaged)
    response = await post(app)
    refusal(response, 503)
    assert int(response.headers["retry-after"]) > 0
    async with client(app) as http:
        answer = await http.get("/health")
    assert answer.status_code == 503
    assert answer.json()["status"] != "ok"
    assert answer.json()["pending"] == 0
    assert contents(tmp_path) == before
    assert any(str(damaged) in warning for warning in warnings(caplog))


# ---------------------------------------------------------------------------------------------- live server


@pytest.fixture(scope="module", params=["h11", "httptools"])
def server(request, tmp_path_factory):
    with serve(tmp_path_factory.mktemp(request.param), "--http", request.param) as server:
        yield server


@pytest.fixture
def live(server):
    """A real server; after each test its log has exactly one line for each 202, and its stderr no traceback."""
    yield server
    eventually(lambda: sorted(ids(server.log)) == sorted(server.accepted))
    assert len(read(server.log)) == len(server.accepted)
    assert "Traceback" not in server.stderr(), server.stderr()
    assert "Exception" not in server.stderr(), server.stderr()


def request(path=TARGET, *headers: bytes, body=b"", method=b"POST", length=True) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (method, path), b"Host: test", b"Connection: close", *headers]
    if body and length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


def in_chunks(body: bytes, size=1000) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


MEDIA, CHUNKED = b"Content-Type: application/json", b"Transfer-Encoding: chunked"
RAW = {
    "plain": ({202}, request()),
    "HTTP/1.0": ({202}, b"POST %s HTTP/1.0\r\nHost: test\r\n\r\n" % TARGET),
    "slash": ({202}, request(b"/send-notification/user@example.com/")),
    "percent-encoded": ({202}, request(b"/send-notification/%75ser%2Btag%40example.com")),
    "encoded slash": ({202}, request(b"/send-notification/a%2Fb@example.com")),
    "query": ({202}, request(b"/send-notification/user@example.com?message=forged%0A")),
    "Authorization not ASCII": ({202}, request(TARGET, b"Authorization: Bearer \xff\xfe")),
    "chunked without a length": (
        {202},
        request(TARGET, MEDIA, CHUNKED, body=in_chunks(b'{"message": "hi"}', 3), length=False),
    ),
    "chunked and empty": ({202}, request(TARGET, CHUNKED, body=in_chunks(b""), length=False)),
    "chunked over 64 KiB": ({413}, request(TARGET, MEDIA, CHUNKED, body=in_chunks(b" " * 65537), length=False)),
    "over 64 KiB": ({413}, request(TARGET, MEDIA, body=b" " * 65537)),
    "ten megabytes promised": (
        {413},
        request(TARGET, MEDIA, b"Content-Length: 10000000", body=b" " * 65537, length=False),
    ),
    "bad chunk": ({400}, request(TARGET, MEDIA, CHUNKED, body=b"zz\r\n", length=False)),
    "30,000 brackets": ({400}, request(TARGET, MEDIA, body=b"[" * 30_000)),
    "UTF-16": ({400}, request(TARGET, MEDIA, body='{"message": "hi"}'.encode("utf-16"))),
    "lone surrogate": ({422}, request(TARGET, MEDIA, body=b'{"message": "\\ud800"}')),
    "6,000 digits": ({422}, request(TARGET, MEDIA, body=b'{"message": %s}' % (b"1" * 6000))),
    "key in UTF-8": ({400}, request(TARGET, "Idempotency-Key: ключ".encode())),
    "newline at the end": ({422}, request(b"/send-notification/user@example.com%0A")),
    "slash and newline at the end": ({422}, request(b"/send-notification/user@example.com/%0a")),
    "CR LF and a forged line": ({422}, request(b"/send-notification/user@example.com%0D%0A2026%20forged")),
    "NUL": ({422}, request(b"/send-notification/user%00@example.com")),
    "ESC": ({422}, request(b"/send-notification/%1B[31muser@example.com")),
    "U+2028": ({422}, request(b"/send-notification/user%E2%80%A8@example.com")),
    "bidi override": ({422}, request(b"/send-notification/%E2%80%AEuser@example.com")),
    "not UTF-8": ({422}, request(b"/send-notification/us%FFer@example.com")),
    "overlong UTF-8": ({422}, request(b"/send-notification/us%C0%AFer@example.com")),
    "cut off percent": ({422}, request(b"/send-notification/user@example.com%0")),
    "percent alone": ({422}, request(b"/send-notification/user@example.com%")),
    "percent and no digits": ({202, 400, 422}, request(b"/send-notification/%zz%4@example.com")),
    "raw bytes": ({400, 422}, request("/send-notification/üser@example.com".encode())),
    "raw NUL": ({400, 422}, request(b"/send-notification/user\0@example.com")),
    "3,000 characters": ({422}, request(b"/send-notification/" + b"a" * 3000 + b"@example.com")),
    "newline after health": ({404}, request(b"/health%0A", method=b"GET")),
    "unknown path": ({404}, request(b"/nothing", method=b"GET")),
    "dots": ({405, 422}, request(b"/send-notification/../health")),
    "wrong method": ({405}, request(method=b"PUT")),
    "unheard-of method": ({400, 405}, request(method=b"BREW")),
    "no HTTP": ({400}, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"),
}


@cases("statuses, data", RAW)
def test_a_stranger_gets_an_answer_that_fits(live, statuses, data):
    answer = live.talk(data)
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    assert status in statuses
    if status != 400:
        assert list(json.loads(body)) == (["id", "message"] if status == 202 else ["detail"])


def test_a_head_has_no_body(live):
    answer = live.talk(request(b"/health", method=b"HEAD"))
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.endswith(b"\r\n\r\n")


def test_errors_leave_the_connection_to_the_next_request(live):
    for path, options, status in [
        ("/send-notification/user", {}, 422),
        (PATH, {"content": b"{", "headers": JSON}, 400),
        (PATH, {"content": b"{}"}, 415),
        ("/nothing", {}, 404),
    ]:
        refusal(live.http.post(path, **options), status)
        live.post()


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
def test_a_client_that_leaves_in_mid_body_is_no_error_in_the_servers_log(live, reset, chunked):
    part = in_chunks(b'{"message": "hi"}')[:-5] if chunked else b'{"message": '
    data = request(TARGET, MEDIA, CHUNKED if chunked else b"Content-Length: 100", body=part, length=False)
    before = live.stderr()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
            sock.sendall(data)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    for _ in range(5):
        live.post()
    assert live.stderr() == before


@pytest.mark.parametrize("seed", range(3))
def test_fuzz(live, seed):
    """Whatever bytes arrive: a 202 with its one line, or a 4xx with none; never a 5xx."""
    chance = random.Random(seed)
    hostile = [
        b"%0A",
        b"%0D%0A",
        b"%00",
        b"%",
        b"%zz",
        b"%C3%A9",
        b"/",
        b"//",
        b"..",
        b"@",
        b" ",
        b"\t",
        b"\xff",
        b"\xe2\x80\xa8",
    ]
    hostile += [
        b'"',
        b"\\",
        b"\\ud800",
        b"{",
        b"}",
        b"[" * 1000,
        b"1" * 5000,
        b"null",
        b"NaN",
        b'"message"',
        b":",
        b",",
        b"\0",
    ]

    def mutate(data: bytes) -> bytes:
        for _ in range(chance.choice([0, 0, 0, 0, 1, 1, 3])):
            start = chance.randrange(len(data) + 1)
            middle = chance.choice([b"", chance.choice(hostile), chance.randbytes(chance.randrange(4))])
            data = data[:start] + middle + data[start + chance.randrange(3) :]
        return data

    statuses = Counter()
    for _ in range(100):
        target = b"/send-notification/" + mutate(b"user@example.com")
        key = b"Idempotency-Key: " + mutate(b"key %d" % chance.randrange(10**9))
        media = b"Content-Type: " + mutate(b"application/json")
        bearer = b"Authorization: " + mutate(b"Bearer token")
        body = mutate(b'{"message": "hi"}')
        headers = [header.translate(None, b"\r\n") for header in (key, media, bearer) if chance.random() < 0.8]
        answer = live.talk(request(target.translate(None, b"\r\n") or b"/", *headers, body=body))
        [status] = re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer) or [b"none"]
        statuses[status.decode()] += 1
    assert statuses.keys() <= {"202", "400", "404", "405", "413", "415", "422"}, statuses
    assert statuses["202"] > 5
    assert statuses["422"] > 5


def test_five_answers_on_one_connection_while_every_notification_takes_an_hour(tmp_path):
    with serve(tmp_path, delay=AN_HOUR) as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=20)
        sockets = set()
        for _ in range(5):
            connection.request("POST", PATH)
            response = connection.getresponse()
            assert (response.status, len(json.load(response)["id"]) > 8) == (202, True)
            sockets.add(connection.sock)
        connection.close()
        assert len(sockets) == 1
        assert server.http.get("/health").json() == {"status": "ok", "pending": 5, "failed": 0}
        assert ids(server.log) == []


def test_a_log_that_hangs_for_ever_holds_up_no_answer(tmp_path):
    """A FIFO that nobody reads; when somebody does, the lines come with no new request."""
    os.mkfifo(tmp_path / "log.txt")
    with serve(tmp_path) as server:
        for _ in range(20):
            server.post()
        eventually(lambda: server.http.get("/health").json() == {"status": "ok", "pending": 20, "failed": 20})
        reader = os.open(tmp_path / "log.txt", os.O_RDONLY | os.O_NONBLOCK)
        lines = bytearray()

        def all_there():
            with suppress(BlockingIOError):
                lines.extend(os.read(reader, 65536))
            return lines.count(b"\n") >= 20

        eventually(all_there)
        eventually(lambda: server.http.get("/health").json()["pending"] == 0)
        os.close(reader)
    assert sorted(_parse(line).id for line in lines.decode().split("\n")[:-1]) == sorted(server.accepted)


OWN_NOTIFIER = """
import os, time
from pathlib import Path
from service import create_app

Path(f"pid-{os.getpid()}").touch()

def notify(notification):
    with open("started.txt", "a") as file:
        file.write(f"{os.getpid()} {notification.id}\\n")
    while Path("stuck").exists():
        time.sleep(0.01)
    if notification.message == "bad":
        raise RuntimeError("the mail is down")
    with open("sent.txt", "a") as file:
        file.write(f"{notification.accepted_at} {notification.id}\\n")

app = create_app(notify, outbox="outbox")
"""


def test_a_notifier_that_raises_costs_the_connection_nothing(tmp_path):
    (tmp_path / "own.py").write_text(OWN_NOTIFIER)
    with serve(tmp_path, app="own:app") as server:
        bad = [server.post("bad").json()["id"] for _ in range(3) if server.post("good")]
        good = [id for id in server.accepted if id not in bad]
        eventually(lambda: sorted(ids(tmp_path / "sent.txt")) == sorted(good))
        eventually(lambda: server.http.get("/health").json() == {"status": "ok", "pending": 3, "failed": 3})
        assert all(id in server.stderr() for id in bad)
        assert "the mail is down" in server.stderr()


@cases("damage", {"a file": _a_file, "cut in half": _cut_in_half})
def test_a_server_does_not_start_on_a_damaged_outbox(dead, tmp_path, damage):
    shutil.copytree(dead[0] / "outbox", tmp_path / "outbox")
    damage(tmp_path / "outbox")
    before = contents(tmp_path)
    with serve(tmp_path, ready=False) as server:
        assert server.process.wait(20) != 0
    assert f"{tmp_path / 'outbox'}" in server.stderr()
    assert {path: data for path, data in contents(tmp_path).items() if "stderr" not in path} == before


# ---------------------------------------------------------------------------------------------------- crash


STOPS = {
    "kill -9": ((), [signal.SIGKILL]),
    "Ctrl-C twice": ((), [signal.SIGINT, signal.SIGINT]),
    "a graceful timeout": (("--timeout-graceful-shutdown", "1"), [signal.SIGTERM]),
}


@cases("options, signals", STOPS)
def test_what_was_acknowledged_is_written_exactly_once_after(tmp_path, options, signals):
    with serve(tmp_path, *options, delay=AN_HOUR, quiet=False) as server:
        for _ in range(5):
            server.post()
        server.post(headers=KEY)
        for number in signals:
            server.process.send_signal(number)
            eventually(lambda: server.process.poll() is not None or "Shutting down" in server.stderr())
        server.process.wait(20)
        assert ids(server.log) == []
    with serve(tmp_path) as restarted:
        eventually(lambda: len(ids(restarted.log)) >= 6)
        replay = restarted.post(headers=KEY)
        assert replay.headers["idempotent-replayed"] == "true"
        assert replay.json()["id"] == server.accepted[-1]
        eventually(lambda: restarted.http.get("/health").json() == {"status": "ok", "pending": 0, "failed": 0})
        restarted.stop()
    assert sorted(n.id for n in read(restarted.log)) == sorted(server.accepted)


def test_sigterm_waits_for_what_is_being_delivered(tmp_path):
    with serve(tmp_path, delay=0.2) as server:
        server.post()
        assert server.stop() in (0, -signal.SIGTERM)
        assert [n.id for n in read(server.log)] == server.accepted


def test_a_notifier_of_ones_own_is_called_with_the_same_id_after_a_crash(tmp_path):
    (tmp_path / "own.py").write_text(OWN_NOTIFIER)
    (tmp_path / "stuck").touch()
    with serve(tmp_path, app="own:app") as server:
        server.post()
        eventually(lambda: ids(tmp_path / "started.txt") == server.accepted)
        server.kill()
    (tmp_path / "stuck").unlink()
    with serve(tmp_path, app="own:app") as restarted:
        eventually(lambda: ids(tmp_path / "sent.txt"))
        eventually(lambda: restarted.http.get("/health").json() == {"status": "ok", "pending": 0, "failed": 0})
    assert ids(tmp_path / "sent.txt") == server.accepted
    assert ids(tmp_path / "started.txt") == server.accepted * 2


def test_a_living_server_delivers_what_a_killed_one_left(tmp_path):
    with serve(tmp_path, delay=AN_HOUR) as first, serve(tmp_path) as second:
        for _ in range(3):
            first.post()
            second.post()
        eventually(lambda: len(ids(second.log)) == 3)
        assert sorted(ids(second.log)) == sorted(second.accepted)
        first.kill()
        eventually(lambda: len(ids(second.log)) >= 6, 20)
        eventually(lambda: second.http.get("/health").json() == {"status": "ok", "pending": 0, "failed": 0})
    assert sorted(n.id for n in read(second.log)) == sorted(first.accepted + second.accepted)


def test_of_two_workers_one_killed_loses_nothing(tmp_path):
    (tmp_path / "own.py").write_text(OWN_NOTIFIER)
    (tmp_path / "stuck").touch()
    with serve(tmp_path, "--workers", "2", app="own:app") as server:
        pids = eventually(lambda: len(found := list(tmp_path.glob("pid-*"))) == 2 and found)
        started = tmp_path / "started.txt"

        def both_have_some():
            server.talk(request())
            return started.exists() and len({line.split()[0] for line in started.read_text().splitlines()}) == 2

        eventually(both_have_some, 20)
        os.kill(int(pids[0].name.removeprefix("pid-")), signal.SIGKILL)
        (tmp_path / "stuck").unlink()
        eventually(lambda: set(server.accepted) <= set(ids(tmp_path / "sent.txt")), 20)
    assert Counter(ids(tmp_path / "sent.txt")).keys() == set(server.accepted)


def test_killed_again_and_again_under_load_every_line_is_there_once(tmp_path):
    acknowledged = []

    def ask(port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        with suppress(OSError, http.client.HTTPException, ValueError):
            while True:
                connection.request("POST", PATH, json.dumps({"message": "x" * random.choice([10, 9000])}), JSON)
                acknowledged.append(json.load(connection.getresponse())["id"])
        connection.close()

    for more in (100, 200):
        with serve(tmp_path) as server:
            threads = [threading.Thread(target=ask, args=[server.port]) for _ in range(8)]
            for thread in threads:
                thread.start()
            goal = len(acknowledged) + more
            eventually(lambda: len(acknowledged) >= goal, 20)  # noqa: B023
            server.kill()
            for thread in threads:
                thread.join()
    with serve(tmp_path) as server:
        eventually(lambda: set(acknowledged) <= set(ids(server.log)), 20)
        eventually(lambda: server.http.get("/health").json() == {"status": "ok", "pending": 0, "failed": 0})
        server.post()
        eventually(lambda: server.accepted[0] in ids(server.log))
    lines = Counter(n.id for n in read(server.log))
    assert set(acknowledged) <= lines.keys()
    assert max(lines.values()) == 1


# --------------------------------------------------------------------------------------------------- README

README = HERE / "README.md"


def blocks(language: str) -> list[str]:
    """The fenced blocks whose whole info string is this; `python wide` and the like are another run's."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)


def test_every_python_block_of_the_readme_runs(tmp_path):
    env = {name: value for name, value in os.environ.items() if not name.startswith("NOTIFY_")}

    def run(block):
        folder = tmp_path / f"block-{blocks('python').index(block)}"
        folder.mkdir()
        (folder / "test_block.py").write_text(block)
        how = ["-m", "pytest", "-p", "no:cacheprovider"] if re.search(r"^(async )?def test_", block, re.M) else []
        command = [sys.executable, "-W", "error", *how, "test_block.py"]
        options = {"cwd": folder, "env": env | {"PYTHONPATH": str(HERE)}, "capture_output": True, "text": True}
        return block, subprocess.run(command, timeout=60, **options)

    assert blocks("python")
    with ThreadPoolExecutor() as threads:
        for block, ended in threads.map(run, blocks("python")):
            assert ended.returncode == 0, f"{block}\n{ended.stdout}{ended.stderr}"


def test_the_readmes_first_page_shows_what_really_happens(tmp_path):
    """One command to run, one curl, the answer it gives, the line that appears, and one command to test."""
    page = "\n".join(README.read_text().split("\n")[:30])
    assert "uvicorn service:app" in page
    assert "pytest" in page
    [curl] = [line for line in re.sub(r"\\\n\s*", " ", page).splitlines() if line.strip("$ ").startswith("curl ")]
    words = shlex.split(curl.strip("$ "))[1:]
    [url] = [word for word in words if "/send-notification/" in word]
    headers = dict(
        re.split(r":\s*", words[n + 1], maxsplit=1) for n, word in enumerate(words) if word in ("-H", "--header")
    )
    data = [words[n + 1] for n, word in enumerate(words) if word in ("-d", "--data", "--json")]
    shown = json.loads(re.search(r'^.*?(\{"id".*\})', page, re.MULTILINE)[1])
    line = next(found for found in map(LINE.search, page.splitlines()) if found)
    with serve(tmp_path) as server:
        path = "/send-notification/" + url.rpartition("/send-notification/")[2]
        headers |= JSON if "--json" in words else {}
        response = server.http.post(path, content="".join(data), headers=headers)
        assert response.status_code == 202
        assert {**response.json(), "id": ""} == {**shown, "id": ""}
        eventually(lambda: ids(server.log))
    [written] = read(server.log)
    assert (written.email, written.message) == (line[3], line[4])


def test_the_readme_names_every_setting_and_no_other():
    settings = {f"NOTIFY_{name.upper()}" for name in inspect.signature(create_app).parameters if name != "notify"}
    assert set(re.findall(r"NOTIFY_[A-Z_]*[A-Z]", README.read_text())) == settings
