"""What the README promises, seen from outside: over ASGI, in the log, from the environment and from real processes.

Run it with `python -m pytest`. TEST_BACKENDS=asyncio,trio runs what is asynchronous on both.
"""

import asyncio
import errno
import fcntl
import functools
import gc
import http.client
import inspect
import io
import json
import logging
import math
import os
import queue
import random
import re
import runpy
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, nullcontext, suppress
from dataclasses import FrozenInstanceError
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

import service
from service import Notification, create_app

pytestmark = pytest.mark.anyio  # of what is asynchronous

# -------------------------------------------------------------------------------------------------- helpers

HERE = Path(__file__).resolve().parent
USER = "user@example.com"
PATH = f"/send-notification/{USER}"
TARGET = PATH.encode()
JSON = {"content-type": "application/json"}
AN_HOUR = 3600  # seconds of delay: longer than any test, so that what was acknowledged is still pending
A_LINE = "2026-11-22T05:46:00.123Z {id} notification for user@example.com: one"
LINE = re.compile(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z) (\S+) notification for ([^\s:]+): (.*)")


@pytest.fixture(scope="module", params=os.environ.get("TEST_BACKENDS", "asyncio").split(","))
def anyio_backend(request):
    return request.param


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log.txt"


@pytest.fixture
def outbox(tmp_path) -> Path:
    return tmp_path / "outbox"


@pytest.fixture
def sent() -> list[Notification]:
    """What the notifier was called with."""
    return []


@pytest.fixture
def app(sent) -> Starlette:
    """An app that keeps nothing."""
    return create_app(sent.append, outbox=":memory:")


def client(app) -> httpx.AsyncClient:
    """A client of the app in this process. Its answers come when the background task is done."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=None)


def path_of(email: str) -> str:
    return f"/send-notification/{quote(email, safe='')}"


async def post(app, email=USER, prefix="", **options) -> httpx.Response:
    with anyio.fail_after(60):
        async with client(app) as http:
            return await http.post(prefix + path_of(email), **options)


async def health(app) -> dict:
    async with client(app) as http:
        return (await http.get("/health")).json()


def counts(pending=0, failed=0) -> dict:
    return {"status": "ok", "pending": pending, "failed": failed}


async def settled(app, **expected) -> None:
    """Wait until /health counts so many, or else none."""

    async def reached():
        return await health(app) == counts(**expected)

    await soon(reached)


@asynccontextmanager
async def lifespan(app):
    async with app.router.lifespan_context(app):
        yield app


def as_async(function):
    """The same as an `async def`: a notifier that runs on the loop, or an ASGI send."""

    async def call(argument):
        await anyio.lowlevel.checkpoint()
        return function(argument)

    return call


def raises(_):
    """A notifier, or whatever is called with one thing, that fails."""
    raise RuntimeError("the mail is down")


def notifier(kind: str, sent: list):
    """Of "def" and "async def", one that appends to the list; of "log", the default."""
    return {"def": sent.append, "async def": as_async(sent.append), "log": None}[kind]


class Gate:
    """A notifier, `def` or on the loop, that lets nothing through until it is opened."""

    def __init__(self):
        self.came, self.sent = [], []
        self._opened = threading.Event()
        self.open = self._opened.set

    def __call__(self, notification):
        self.came.append(notification)
        assert self._opened.wait(20)
        self.sent.append(notification)

    async def on_loop(self, notification):
        self.came.append(notification)
        await soon(self._opened.is_set)
        self.sent.append(notification)


async def drive(app, send, error=None):
    """Call the app as a server does, for what httpx does not show: each message as it is sent, a receive that fails."""

    async def receive():
        if error:
            raise error
        return {"type": "http.request"}

    scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"}
    scope |= {"path": PATH, "raw_path": TARGET, "query_string": b"", "root_path": "", "headers": []}
    await app(scope | {"client": ("test", 1), "server": ("test", 80)}, receive, send)


def eventually(predicate, within=20.0):
    """`soon`, for a test that is not asynchronous."""
    return anyio.run(soon, predicate, within)


async def soon(predicate, within=20.0):
    """The predicate's first true value, for what happens elsewhere; it may be asynchronous."""
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


def rows(outbox: Path) -> int:
    """How many notifications the outbox keeps."""
    with closing(sqlite3.connect(outbox / "outbox.db")) as db:
        return db.execute("SELECT count(*) FROM pending").fetchone()[0]


@contextmanager
def warnings():
    """What the service warns of meanwhile."""
    messages, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("notify").addHandler(handler)
    try:
        yield messages
    finally:
        logging.getLogger("notify").removeHandler(handler)


@pytest.fixture
def warned():
    with warnings() as messages:
        yield messages


def cases(names: str, rows: dict):
    return pytest.mark.parametrize(names, rows.values(), ids=rows)


def shown(value) -> str:
    """The id of a case that is its own name, and no other's."""
    return f"{value!a:.50} {len(value)}"


TOGETHER = {}


def together(**ways):
    """Make tests of the function: one for each way, which calls it with a folder of its own and the way's arguments.

    All run at the same time, when the first is asked for, as they wait for the service's own pauses.
    """
    ways = ways or {"": ()}

    def make_test(function):
        def test(outcomes, way):
            if outcomes[function, way]:
                raise outcomes[function, way]

        TOGETHER.update({(function, way): arguments for way, arguments in ways.items()})
        test.__doc__ = function.__doc__
        return pytest.mark.parametrize("way", ways)(test)

    return make_test


@pytest.fixture(scope="module")
def outcomes(anyio_backend, tmp_path_factory):
    """With what error each of TOGETHER ended, or None."""
    ended = dict.fromkeys(TOGETHER)

    async def run(function, way):
        call = functools.partial(function, tmp_path_factory.mktemp("together"), *TOGETHER[function, way])
        try:
            await (call() if inspect.iscoroutinefunction(function) else anyio.to_thread.run_sync(call))
        except BaseException as exc:  # pytest.fail, too
            ended[function, way] = exc

    async def run_all():
        async with anyio.create_task_group() as tasks:
            for function, way in TOGETHER:
                tasks.start_soon(run, function, way)

    anyio.run(run_all, backend=anyio_backend)
    return ended


class Server:
    def __init__(self, process: subprocess.Popen, output: Path, prefix: str, log: Path, outbox: Path) -> None:
        self.process, self.log, self.outbox = process, log, outbox
        self.accepted: list[str] = []  # the ids of all that was acknowledged
        self.port, self._output, self._prefix = 0, output, prefix

    def ready(self) -> bool:
        """Whether it answers; finds its port in what it wrote. Fails if it has ended."""
        assert self.process.poll() is None, self.output()
        if not self.port and (listening := re.search(r" (http://127\.0\.0\.1:(\d+))", self.output())):
            self.port = int(listening[2])
            self.http = httpx.Client(base_url=listening[1] + self._prefix, timeout=30)
        with suppress(httpx.TransportError):
            return bool(self.port) and self.http.get("/health").status_code == 200
        return False

    def output(self) -> str:
        return self._output.read_text()

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

    def settled(self, **expected) -> None:
        eventually(lambda: self.http.get("/health").json() == counts(**expected))

    def kill(self) -> None:
        """End the whole group, workers included, as kill -9 does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.port:
            self.http.close()
            self.port = 0  # it may be another's now


def environment(**settings) -> dict[str, str]:
    """Ours, with these settings of the service and no others."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("NOTIFY_")}
    return env | {"PYTHONPATH": str(HERE)} | {f"NOTIFY_{name.upper()}": str(value) for name, value in settings.items()}


@contextmanager
def serve(folder: Path, *options: str, app="service:app", command=None, prefix="", ready=True, quiet=True, **settings):
    """A uvicorn, or the command, of its own process group, on a free port, with everything it writes in the folder.

    prefix: where the service is mounted. ready: wait for /health. quiet: there must be no traceback in its output.
    """
    settings = {"log": folder / "log.txt", "outbox": folder / "outbox"} | settings
    uvicorn = [sys.executable, "-W", "error", "-m", "uvicorn", app, "--port", "0", "--ws", "none", "--no-access-log"]
    where = {"cwd": folder, "env": environment(**settings), "stdin": subprocess.DEVNULL, "start_new_session": True}
    output = folder / f"output-{len(list(folder.glob('output-*')))}.txt"
    with output.open("wb") as file:
        process = subprocess.Popen(command or [*uvicorn, *options], **where, stdout=file, stderr=file)
    server = Server(process, output, prefix, settings["log"], settings["outbox"])
    try:
        if ready:
            eventually(server.ready)
        yield server
    finally:
        server.kill()
    if quiet and ready:
        assert "Traceback" not in server.output(), server.output()


class Clients:
    """Threads that post as fast as they are answered, to whatever their server is at the moment."""

    def __init__(self, server=None, sizes=(12,)):
        self.server, self._sizes, self._stop = server, sizes, threading.Event()
        self.kept: dict[str, str] = {}  # the id and message of each 202

    def __enter__(self):
        self._threads = ThreadPoolExecutor(16)
        self._ends = [self._threads.submit(self._post) for _ in range(16)]
        return self

    def __exit__(self, *exc):
        self._stop.set()
        with self._threads:
            for end in self._ends:
                end.result()  # raises what was no 202

    def more(self, number: int) -> None:
        """Wait until so many more were kept."""
        goal = len(self.kept) + number
        eventually(lambda: len(self.kept) >= goal, within=120)

    def _post(self):
        while not self._stop.wait(0.05):  # until there is a server again
            connection = http.client.HTTPConnection("127.0.0.1", self.server.port if self.server else 0, timeout=10)
            with closing(connection), suppress(OSError, http.client.HTTPException):
                while not self._stop.is_set():
                    message = str(random.random()).ljust(random.choice(self._sizes), "x")
                    connection.request("POST", PATH, json.dumps({"message": message}), JSON)
                    answer = connection.getresponse()
                    assert answer.status == 202
                    self.kept[json.load(answer)["id"]] = message


# ---------------------------------------------------------------------------------------------------- rules

GOOD_ADDRESSES = [
    "user@example.com", "User@EXAMPLE.com", "root@localhost", "1@2.3", "user@xn--bcher-kva.example",
    "user+tag@example.com", "o'brien@example.com", "sales/emea@example.com", "a//b@example.com",
    "..user..@example.com", "100%41@example.com", "!#$%&'*+/=?^_`{|}~-.@example.com",
    "a" * 64 + "@example.com", f"user@{'a' * 63}.com",
    f"user@{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 57}",  # 254 characters
]  # fmt: skip
BAD_ADDRESSES = [
    "", "user", "@example.com", "user@", "user@example.com@example.com", "user@example.com,root@example.com",
    "User <user@example.com>", '"user"@example.com', "user@[127.0.0.1]", "user@exam_ple.com",
    "user@-example.com", "user@example-.com", "user@.example.com", "user@example.com.", "user@example..com",
    " user@example.com", "user@example.com ", "us er@example.com", "user@example.com//", "user@example.com/health",
    "user@example.com\n", "user@example.com\n/", "user@example.com/\n", "\nuser@example.com", "user@example.com%0A",
    "user@example.com\r\n" + A_LINE, "user\0@example.com", "\x1b[31muser@example.com",
    "user\u2028@example.com", "user@example.com\x85", "üser@example.com", "user@exämple.com",
    "\u202euser@example.com",  # a bidirectional override
    "user@example.c\u0661m", "user@example.\u212aom",  # a digit that is not ASCII, and a letter that folds to it
    "a" * 65 + "@example.com", f"user@{'a' * 64}.com", "a" * 3000 + "@example.com", f"user@{'a.' * 1500}com",
    f"user@{'a' * 63}.{'b' * 63}.{'c' * 63}.{'d' * 58}",  # 255 characters
]  # fmt: skip


@pytest.mark.parametrize("email", GOOD_ADDRESSES, ids=shown)
@pytest.mark.parametrize("slash", ["", "/"], ids=["", "with a slash"])
async def test_a_valid_address_is_accepted_as_it_is(app, sent, email, slash):
    response = await post(app, email + slash)
    assert (response.status_code, [n.email for n in sent]) == (202, [email])


BODY = b'{"message": "hi"}'


class Chunks:
    """A body of no known length."""

    def __init__(self, *parts: bytes):
        self.parts = parts

    async def __aiter__(self):
        for part in self.parts:
            yield part


GOOD_BODIES = {
    "none": (JSON, b"", "some notification"),
    "none of another type": ({"content-type": "text/plain"}, b"", "some notification"),
    "empty object": (JSON, b"{}", "some notification"),
    "white space around": (JSON, b' \r\n\t{"message" : "hi"} \n', "hi"),
    "empty message": (JSON, b'{"message": ""}', ""),
    "10,000 characters": (JSON, b'{"message": "%s"}' % (b"x" * 10_000), "x" * 10_000),
    "10,000 characters of four bytes": (JSON, b'{"message": "%s"}' % ("😀" * 10_000).encode(), "😀" * 10_000),
    "10,000 escaped characters": (JSON, b'{"message": "%s"}' % (b"\\u0001" * 10_000), "\1" * 10_000),
    "quotes and backslashes": (JSON, rb'{"message": "\"\\\","}', '"\\",'),
    "surrogate pair": (JSON, b'{"message": "\\ud83d\\ude00"}', "😀"),
    "noncharacter": (JSON, b'{"message": "\\uffff"}', "\uffff"),
    "64 KiB": (JSON, BODY.ljust(64 * 1024), "hi"),
    "in chunks": (JSON, Chunks(b'{"mess', b"", b'age": "hi"}'), "hi"),
    "type in capitals": ({"content-type": "Application/JSON"}, BODY, "hi"),
    "type with a charset": ({"content-type": "application/json; charset=utf-8"}, BODY, "hi"),
    "type with a parameter": ({"content-type": "application/json;x=y"}, BODY, "hi"),
}

MALFORMED_BODIES = [
    b" ", b"\0", b"message=hi", b"{'message': 'hi'}", b'{"message": "hi"', b'{"message": "hi"} {}',
    b'{"message": "hi",}', b'{"message": "a\nb"}', b'{"message": "\\x41"}', b'{"message": NaN}',
    b'{"message": -Infinity}', b'{"message": "\xff"}', b'{"message": "\xc0\xaf"}',  # bad and overlong UTF-8
    b'{"message": "\xed\xa0\x80"}', b'\xef\xbb\xbf{"message": "hi"}',  # a surrogate in UTF-8, a byte order mark
    '{"message": "é"}'.encode("latin-1"), *(BODY.decode().encode(f"utf-{kind}") for kind in ("16", "16-le", "32")),
    b"[" * 30_000, b"[" * 30_000 + b"]" * 30_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
]  # fmt: skip
WRONG_BODIES = [
    b"null", b"true", b"1", b"1" * 6000, b'"message"', b"[]", b'[{"message": "hi"}]',
    b'{"message": null}', b'{"message": true}', b'{"message": 1}', b'{"message": 1e999}',
    b'{"message": %s}' % (b"1" * 6000), b'{"message": ["hi"]}', b'{"message": {}}',
    b'{"massage": "hi"}', b'{"Message": "hi"}', b'{"": "hi"}', b'{"\\ud800": "hi"}', b'{"message": "hi", "id": "1"}',
    b'{"message": "\\ud800"}', b'{"message": "a\\udc00b"}', b'{"message": "\\ude00\\ud83d"}',  # lone surrogates
    b'{"message": "%s"}' % (b"x" * 10_001),
]  # fmt: skip


@cases("headers, body, message", GOOD_BODIES)
async def test_a_body_is_optional_and_holds_a_message_of_up_to_10000_characters(app, sent, headers, body, message):
    response = await post(app, content=body, headers=headers)
    assert (response.status_code, [n.message for n in sent]) == (202, [message])


AS_THEY_ARE = ["some notification", "", "é 世界 😀", "a: b: c", " a "]
ESCAPED = [
    r"a\nb", r"a\r\nb", r"C:\\new", r"\\n", r"\x00", r"\x1b[31mred", r"\x7f", r"\x85", r"a\xa0b", r"a\u2028b",
    r"\xad", r"\u202egnp.exe", r"\ufeffhi", r"\ue000", r"\U000e0041", r"\U0010ffff",  # invisible, or misleading
    rf"x\n{A_LINE}",
]  # fmt: skip


@pytest.mark.parametrize("written", AS_THEY_ARE + ESCAPED)
async def test_a_notification_is_one_line_that_can_be_read_back_exactly(log, written):
    message = written if written in AS_THEY_ARE else written.encode().decode("unicode_escape")
    before = datetime.now(UTC)
    response = await post(create_app(log=log, outbox=":memory:"), "o'brien+x/y@example.com", json={"message": message})
    after = datetime.now(UTC)
    at, id, email, text = LINE.fullmatch(log.read_bytes().decode().removesuffix("\n")).groups()
    assert (id, email, text) == (response.json()["id"], "o'brien+x/y@example.com", written)
    assert before.replace(microsecond=before.microsecond // 1000 * 1000) <= datetime.fromisoformat(at) <= after
    assert read(log) == [Notification(id, email, message, at)]


def test_a_notification_is_frozen():
    notification = Notification(id="1", email=USER, message="hi", accepted_at="2026-11-22T05:46:00.123Z")
    assert notification == Notification("1", USER, "hi", "2026-11-22T05:46:00.123Z")
    with pytest.raises(FrozenInstanceError):
        notification.id = "2"


PAUSES = {"of the log": (service._LOG_PAUSES, 0.1, 30, math.inf), "of one's own": (service._OWN_PAUSES, 1, 900, 86_400)}


@cases("settings, first, longest, patience", PAUSES)
def test_pauses_are_jittered_and_double_to_a_longest_until_patience_is_over(settings, first, longest, patience):
    failing, pauses = 0.0, []
    while failing < 100_000 and (pause := service._backoff(failing, *settings)) < math.inf:
        pauses.append(pause)
        failing += pause
    growing = [pause for pause in pauses if pause < 0.75 * longest]
    assert 0.75 * first <= pauses[0] <= first
    assert 1.5 < (growing[-1] / growing[0]) ** (1 / (len(growing) - 1)) < 2.1
    assert 0.75 * longest <= min(pauses[len(growing) :]) < max(pauses) <= longest
    assert min(patience, 100_000) <= failing < min(patience, 100_000) + longest


KEYWORDS = {
    "delay": [-1, -0.001, math.nan, math.inf, "soon", "1", None, True],
    "concurrency": [0, -1, 1.5, math.inf, "many", None, True],
    "max_pending": [0, -1, 1.5, "many", None, False],
    "token": ["", "é", "a b", "a\nb", 5, b"secret", True],
    "fsync": ["true", 1, None],
    "log": ["", "a\0b", None, 5],
    "outbox": ["", "a\0b", None, 5],
    "notify": ["print", 5, [print]],
}
VARIABLES = {
    "NOTIFY_DELAY": ["soon", "", "-1", "nan", "inf", "1s"],
    "NOTIFY_CONCURRENCY": ["many", "", "0", "-1", "1.5"],
    "NOTIFY_MAX_PENDING": ["many", "", "0", "-1", "1e4"],
    "NOTIFY_TOKEN": ["", "é", "a\nb"],
    "NOTIFY_FSYNC": ["perhaps", "", "2"],
    "NOTIFY_LOG": [""],
    "NOTIFY_OUTBOX": [""],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in KEYWORDS for value in KEYWORDS[name]])
def test_a_keyword_that_makes_no_sense_is_refused_by_its_name(name, value):
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*{re.escape(repr(value))}"):
        create_app(**{name: value})


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in VARIABLES for value in VARIABLES[name]])
def test_a_variable_that_makes_no_sense_is_refused_by_its_name(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    told = re.escape(repr(value)[1:-1]) or "''"
    with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b.*(?<!\w){told}(?!\w)"):
        runpy.run_path(str(HERE / "service.py"))


@pytest.mark.parametrize("text", ["true", "True", "1", "yes", "on", "false", "FALSE", "0", "no", "off"])
async def test_fsync_is_a_word_or_a_digit_and_decides_whether_log_and_outbox_are_synced(outbox, monkeypatch, text):
    levels, synced, log = set(), set(), outbox / "log.txt"

    class Watched(sqlite3.Connection):
        def __exit__(self, *exc):
            if "outbox.db" in str([*self.execute("PRAGMA database_list")]):  # and not a lock, of which nothing is kept
                levels.update(*self.execute("PRAGMA synchronous"))
            return super().__exit__(*exc)

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Watched))
    monkeypatch.setattr(os, "fsync", lambda file: synced.add(os.fstat(file).st_ino))
    for name, value in {"FSYNC": text, "LOG": log, "OUTBOX": outbox}.items():
        monkeypatch.setenv(f"NOTIFY_{name}", str(value))
    await post(runpy.run_path(str(HERE / "service.py"))["app"])
    expected = text.lower() in ("true", "1", "yes", "on")
    assert levels == {2 if expected else 1}  # FULL: each commit is synced; NORMAL: each checkpoint
    assert (log.stat().st_ino in synced) == expected
    assert {outbox.stat().st_ino, outbox.parent.stat().st_ino} <= synced  # the names of what is new, always


# ----------------------------------------------------------------------------------------- HTTP in process

TOKEN = {"authorization": "Bearer s3cret"}
BAD_KEYS = ["", "k" * 256, b"a\x7f", b"a\tb", b"a\n", "ключ".encode(), b"cl\xe9"]
BAD_TOKENS = [
    "", "Bearer", "s3cret", "Basic s3cret", "Bearer secret", "Bearer s3c", "Bearer s3crets3cret",
    "Bearer ключ".encode(), b"Bearer s3cr\xe9t", bytes(range(128, 256)),
]  # fmt: skip
BAD_TYPES = ["", "text/plain", "application/jsonl", "x/y;application/json", b"application/json\xe9"]
NO_PATHS = ["/", "/nothing", "/healthy", "/health/ok", "/health//", "/health%0A", "/health/%0A", "/openapi.json%0A"]
NO_METHODS = [(method, PATH) for method in ("GET", "PUT", "DELETE", "OPTIONS", "BREW")]
NO_METHODS += [("POST", "/health"), ("POST", "/openapi.json")]
ERRORS = {
    **{f"400 body {shown(body)}": (400, "POST", PATH, TOKEN | JSON, body) for body in MALFORMED_BODIES},
    **{f"400 key {shown(key)}": (400, "POST", PATH, TOKEN | {"idempotency-key": key}, b"") for key in BAD_KEYS},
    "401 no token, and nothing else right": (401, "POST", "/send-notification/user", {"idempotency-key": ""}, b"{"),
    **{f"401 {shown(value)}": (401, "POST", PATH, {"authorization": value}, b"") for value in BAD_TOKENS},
    "404 no address": (404, "POST", "/send-notification", {}, b""),
    "404 capitals": (404, "POST", "/Send-Notification/user@example.com", TOKEN, b""),
    **{f"404 {path}": (404, "GET", path, {}, b"") for path in NO_PATHS},
    **{f"405 {method} {path}": (405, method, path, {}, b"") for method, path in NO_METHODS},
    "413 with a length": (413, "POST", PATH, TOKEN | JSON, b" " * (64 * 1024 + 1)),
    "413 in chunks": (413, "POST", PATH, TOKEN | JSON, Chunks(*[b" " * 1024] * 64, b" ")),
    "415 no type": (415, "POST", PATH, TOKEN, BODY),
    "415 form": (415, "POST", PATH, TOKEN | {"content-type": "application/x-www-form-urlencoded"}, b"message=hi"),
    **{f"415 {shown(media)}": (415, "POST", PATH, TOKEN | {"content-type": media}, BODY) for media in BAD_TYPES},
    **{f"422 address {shown(email)}": (422, "POST", path_of(email), TOKEN, b"") for email in BAD_ADDRESSES},
    **{f"422 body {shown(body)}": (422, "POST", PATH, TOKEN | JSON, body) for body in WRONG_BODIES},
}
ALLOWED = {"/health": {"GET", "HEAD"}, "/openapi.json": {"GET", "HEAD"}, PATH: {"POST"}}


@pytest.mark.filterwarnings("ignore:Async generator '(httpx|test_service):ResourceWarning")  # a body unread, on trio
@cases("status, method, path, headers, body", ERRORS)
async def test_every_error_is_one_sentence_of_json_and_leaves_nothing_behind(sent, status, method, path, headers, body):
    app = create_app(sent.append, outbox=":memory:", token="s3cret")
    async with client(app) as http:
        response = await http.request(method, path, headers=headers, content=body)
    refusal(response, status)
    assert (sent, await health(app)) == ([], counts())
    assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    if status == 405:
        assert {word.strip() for word in response.headers["allow"].split(",")} >= ALLOWED[path]


async def test_what_breaks_within_is_a_500_that_shows_nothing_of_it(app):
    messages = []
    with pytest.raises(RuntimeError, match="secret"):  # for the server's log
        await drive(app, as_async(messages.append), RuntimeError("secret"))
    start, body = messages
    response = httpx.Response(start["status"], headers=start["headers"], content=body["body"])
    assert "secret" not in refusal(response, 500)


async def test_the_answer_names_the_notification(app, sent):
    response = await post(app)
    assert response.headers["content-type"] == "application/json"
    assert response.json() == {"id": sent[0].id, "message": "Notification sent in the background"}
    assert datetime.fromisoformat(sent[0].accepted_at).tzinfo is not None


@pytest.mark.parametrize("scheme", ["Bearer ", "bearer ", "BEARER ", "Bearer  "])
async def test_the_token_opens_post_in_any_case_of_its_scheme(scheme):
    app = create_app(lambda n: None, outbox=":memory:", token="s3cret")
    assert (await post(app, headers={"authorization": f"{scheme}s3cret"})).status_code == 202


async def test_of_two_headers_with_one_name_the_first_counts(sent):
    app = create_app(sent.append, outbox=":memory:", token="s3cret")
    both = [("authorization", "Bearer s3cret"), ("authorization", "Bearer other")]
    assert [(await post(app, headers=headers)).status_code for headers in (both, both[::-1])] == [202, 401]


@pytest.mark.parametrize("path", ["/health", "/health/", "/openapi.json", "/openapi.json/"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_get_and_head_of_health_and_document_want_no_token(method, path):
    async with client(create_app(outbox=":memory:", token="s3cret")) as http:
        assert (await http.request(method, path)).status_code == 200


async def test_health_counts_what_is_pending_and_what_failed(outbox):
    gate = Gate()

    def notify(notification):
        if notification.message == "bad":
            raise RuntimeError
        gate(notification)

    app = create_app(notify, outbox=outbox)
    assert await health(app) == counts()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(post, app)
        await settled(app, pending=1)
        await post(app, json={"message": "bad"})
        assert await health(app) == counts(pending=2, failed=1)
        gate.open()
    assert await health(app) == counts(pending=1, failed=1)


async def test_past_max_pending_the_answer_is_503_until_there_is_room():
    gate = Gate()
    app = create_app(gate, outbox=":memory:", max_pending=2)
    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(post, app)
        await settled(app, pending=2)
        response = await post(app)
        refusal(response, 503)
        assert int(response.headers["retry-after"]) > 0
        gate.open()
    assert (await post(app)).status_code == 202
    assert len(gate.sent) == 3


KEY = {"idempotency-key": "order 66!"}


async def test_the_same_key_and_content_get_the_same_answer_and_notify_once(outbox, sent):
    app = create_app(sent.append, outbox=outbox)
    first = await post(app, headers=KEY)
    second = await post(app, headers=KEY, json={"message": "some notification"})
    assert (first.status_code, second.status_code, first.json()) == (202, 202, second.json())
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    assert [n.id for n in sent] == [first.json()["id"]]


@pytest.mark.parametrize(("email", "message"), [(USER, "other"), ("a@b.c", "hi"), ("a@b.c", "other")])
async def test_the_same_key_with_other_content_is_refused(app, sent, email, message):
    first = await post(app, headers=KEY, json={"message": "hi"})
    refusal(await post(app, email, headers=KEY, json={"message": message}), 422)
    assert (await post(app, headers=KEY, json={"message": "hi"})).json() == first.json()
    assert [(n.email, n.message) for n in sent] == [(USER, "hi")]
    assert await health(app) == counts()


@cases("key", {"1": "k", "signs": ' ~!"#' * 50, "255": "k" * 255, "%": "%0A", "SQL": "' OR 1=1 --"})
async def test_a_key_is_up_to_255_printable_ascii_characters(app, key):
    first, second = [await post(app, headers={"idempotency-key": key}) for _ in range(2)]
    assert first.json() == second.json()
    assert (await post(app, headers={"idempotency-key": key[:-1] + "?"})).json() != first.json()


@pytest.mark.parametrize("way", ["in time", "when it comes again", "when another comes"])
async def test_a_key_is_forgotten_after_24_hours(outbox, way):
    app = create_app(lambda n: None, outbox=outbox)

    def keys(seconds=0):
        with closing(sqlite3.connect(outbox / "outbox.db")) as db, db:
            db.execute("UPDATE keys SET at = at - ?", (seconds,))
            return db.execute("SELECT count(*) FROM keys").fetchone()[0]

    first = (await post(app, headers=KEY)).json()
    assert keys(seconds=24 * 3600 - 60) == 1
    assert (await post(app, headers=KEY)).json() == first
    keys(seconds=120)
    if way == "in time":
        async with lifespan(create_app(outbox=outbox)):
            await soon(lambda: keys() == 0)
    if way == "when another comes":
        await post(app, headers={"Idempotency-Key": "another"})
        assert keys() == 1
    assert (await post(app, headers=KEY)).json() != first


async def test_however_many_keys_come_and_are_old_a_commit_forgets_few(outbox):
    """As other workers wait for its end."""
    app = create_app(lambda n: None, outbox=outbox)
    await health(app)
    with closing(sqlite3.connect(outbox / "outbox.db")) as db, db:
        db.executemany("INSERT INTO keys VALUES (?, '', '', 0)", [(f"old {number}",) for number in range(20_000)])
    async with anyio.create_task_group() as tasks:
        for number in range(16):  # which gather, for one commit or a few
            tasks.start_soon(functools.partial(post, app, headers={"Idempotency-Key": f"new {number}"}))
    with closing(sqlite3.connect(outbox / "outbox.db")) as db:
        [[left]] = db.execute("SELECT count(*) FROM keys WHERE at = 0")
    assert 10_000 < left < 20_000


async def test_a_refused_request_does_not_use_up_its_key(app):
    refusal(await post(app, headers=KEY, json={"message": 1}), 422)
    response = await post(app, headers=KEY)
    assert (response.status_code, response.headers.get("idempotent-replayed")) == (202, None)


async def test_at_max_pending_a_key_that_was_answered_is_answered_again():
    app = create_app(raises, outbox=":memory:", max_pending=1)
    first, again = [await post(app, headers=KEY) for _ in range(2)]
    other, full = await post(app, headers=KEY, json={"message": "x"}), await post(app)
    assert [answer.status_code for answer in (first, again, other, full)] == [202, 202, 422, 503]
    assert again.json() == first.json()
    for _ in range(2):  # what was refused is not remembered
        refusal(await post(app, headers={"Idempotency-Key": "another"}), 503)


async def test_eight_at_once_with_one_key_notify_once(outbox, sent):
    answers = []
    apps = [create_app(sent.append, outbox=outbox) for _ in range(2)]

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


async def test_the_document_tells_every_route_body_header_and_answer(document):
    assert document["openapi"].startswith("3.1.")
    assert document["info"].keys() >= {"title", "version"}
    paths = document["paths"]
    operations = {f"{method} {path}": paths[path][method] for path in paths for method in paths[path]}
    sending = operations.pop("post /send-notification/{email}")
    assert {name: set(operation["responses"]) for name, operation in operations.items()} == {
        "get /health": {"200", "404", "405", "503", "500"},
        "head /health": {"200", "404", "405", "503", "500"},
        "get /openapi.json": {"200", "404", "405", "500"},
        "head /openapi.json": {"200", "404", "405", "500"},
    }
    assert not sending["requestBody"].get("required", False)
    schema = sending["requestBody"]["content"]["application/json"]["schema"]
    assert schema["additionalProperties"] is False
    assert schema["properties"].keys() == {"message"}
    assert schema["properties"]["message"]["maxLength"] == 10_000
    email, key = sending["parameters"]
    assert (email["name"], email["in"], email["required"]) == ("email", "path", True)
    assert (key["name"], key["in"], key.get("required", False)) == ("Idempotency-Key", "header", False)
    assert [bool(re.search(key["schema"]["pattern"], text)) for text in ("a b", "~" * 255, "", "~" * 256)] == [
        True, True, False, False,
    ]  # fmt: skip
    [name] = sending["security"][-1]
    assert document["components"]["securitySchemes"][name] == {"type": "http", "scheme": "bearer"}
    answers = sending["responses"]
    assert answers.keys() == {"202", "400", "401", "404", "405", "413", "415", "422", "503", "500"}
    headers = {(status, name) for status, answer in answers.items() for name in answer["headers"]}
    assert headers == {
        ("202", "Idempotent-Replayed"), ("401", "WWW-Authenticate"), ("405", "Allow"), ("503", "Retry-After"),
    }  # fmt: skip
    for status, answer in answers.items():
        properties = answer["content"]["application/json"]["schema"]["properties"]
        assert properties.keys() == ({"id", "message"} if status == "202" else {"detail"})


async def test_the_document_and_the_service_agree_on_addresses(document):
    schema = document["paths"]["/send-notification/{email}"]["post"]["parameters"][0]["schema"]
    pattern = schema["pattern"].removesuffix("$") + r"\Z"  # in JSON Schema's dialect $ is that

    def valid(email):
        return re.search(pattern, email) is not None and len(email) <= schema["maxLength"]

    assert [email for email in GOOD_ADDRESSES if not valid(email)] == []
    assert [email for email in BAD_ADDRESSES if valid(email)] == []


# ------------------------------------------------------------------------------------------------ embedding


def test_importing_wants_neither_posix_nor_uvicorn_and_making_apps_creates_and_starts_nothing(tmp_path):
    code = "import os, sys, threading, anyio.to_thread, starlette.applications\n"
    code += "sys.modules.update(dict.fromkeys(['fcntl', 'grp', 'pwd', 'resource', 'termios', 'uvicorn']))\n"
    code += "import service; service.create_app(); service.create_app(print, log='l', outbox='o/p');"
    code += "assert threading.active_count() == 1; assert os.listdir() == []"
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, env=environment(), check=True)


def test_run_as_a_program_it_serves_the_app(monkeypatch):
    served = []
    monkeypatch.setattr("uvicorn.run", served.append)
    program = runpy.run_path(str(HERE / "service.py"), run_name="__main__")
    assert served == [program["app"]]


async def test_the_collector_is_tuned_while_the_program_runs_and_never_for_a_host(app, monkeypatch):
    monkeypatch.setenv("NOTIFY_OUTBOX", ":memory:")
    gc.unfreeze()  # what Python 3.12 has frozen itself
    as_it_was = gc.get_freeze_count(), gc.get_threshold()
    async with lifespan(app):
        assert (gc.get_freeze_count(), gc.get_threshold()) == as_it_was
    with suppress(LookupError):
        async with lifespan(runpy.run_path(str(HERE / "service.py"))["app"]) as program:
            assert gc.get_freeze_count() > 0
            assert gc.get_threshold() > as_it_was[1]
            assert await health(program) == counts()
            raise LookupError
    assert (gc.get_freeze_count(), gc.get_threshold()) == as_it_was


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_the_answer_is_sent_before_the_notifier_is_called_and_does_not_wait_for_it(kind):
    gate = Gate()

    async def send(message):
        gate.came.append(message["type"])

    app = create_app(gate if kind == "def" else gate.on_loop, outbox=":memory:")
    async with anyio.create_task_group() as tasks:
        for number in range(1, 6):
            tasks.start_soon(drive, app, send)
            await soon(lambda: len(gate.came) == 3 * number)  # noqa: B023
        order = [getattr(event, "email", event) for event in gate.came]
        assert order == ["http.response.start", "http.response.body", USER] * 5
        assert gate.sent == []
        gate.open()
    assert len(gate.sent) == 5


class Recorder(list):
    """Empty, and so false, and yet a notifier."""

    def __call__(self, notification):
        self.append(notification)

    async def on_loop(self, notification):
        await anyio.lowlevel.checkpoint()
        self.append(notification)


class AsyncRecorder(Recorder):
    __call__ = Recorder.on_loop


CALLABLES = {
    "built-in": (Recorder, lambda recorder: recorder.append),
    "method": (Recorder, lambda recorder: recorder.__call__),
    "async method": (Recorder, lambda recorder: recorder.on_loop),
    "partial": (Recorder, lambda recorder: functools.partial(Recorder.__call__, recorder)),
    "async partial": (Recorder, lambda recorder: functools.partial(Recorder.on_loop, recorder)),
    "lambda": (Recorder, lambda recorder: lambda notification: recorder(notification)),
    "callable": (Recorder, lambda recorder: recorder),
    "async callable": (AsyncRecorder, lambda recorder: recorder),
}


@cases("kind, notify", CALLABLES)
async def test_any_callable_of_one_notification_is_a_notifier(kind, notify):
    recorder = kind()
    app = create_app(notify(recorder), outbox=":memory:", delay=AN_HOUR)  # which is the default notifier's
    answers = [(await post(app)).json()["id"] for _ in range(2)]
    assert [n.id for n in recorder] == answers
    assert all(type(n) is Notification for n in recorder)


async def test_a_def_notifier_runs_in_a_thread_and_an_async_def_on_the_callers_loop():
    threads = []

    async def on_loop(notification):
        threads.append((threading.get_ident(), anyio.lowlevel.current_token()))

    await post(create_app(lambda n: threads.append(threading.get_ident()), outbox=":memory:"))
    await post(create_app(on_loop, outbox=":memory:"))
    assert threads[0] != threading.get_ident()
    assert threads[1] == (threading.get_ident(), anyio.lowlevel.current_token())


@pytest.mark.parametrize("most", [1, 3])
async def test_at_most_concurrency_def_notifiers_run_at_once_and_each_post_waits_for_its_own(most):
    permits = threading.Semaphore(0)
    begun, ended, running, returned = [], [], [], []

    def notify(notification):
        begun.append(notification.id)
        running.append(len(begun) - len(ended))
        permits.acquire(timeout=20)
        ended.append(notification.id)

    async def ask():
        returned.append((await post(app)).json()["id"])

    app = create_app(notify, outbox=":memory:", concurrency=most)
    async with anyio.create_task_group() as tasks:
        for more in (most, 9 - most):  # who come when all are busy, and at the same moment
            for _ in range(more):
                tasks.start_soon(ask)
            await soon(lambda: len(begun) == most)
        await settled(app, pending=9)
        for released in range(9):
            expected = min(released + most, 9), released, released
            await soon(lambda: (len(begun), len(ended), len(returned)) == expected)  # noqa: B023
            permits.release()
    assert (max(running), returned) == (most, ended)


async def test_threads_that_wait_take_one_each_of_those_that_come_at_once(monkeypatch):
    meeting = threading.Barrier(3, timeout=15)
    app = create_app(lambda _: meeting.wait(), outbox=":memory:", concurrency=3)

    async def meet():
        async with anyio.create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(post, app)

    with monkeypatch.context() as patched:
        patched.setattr(service, "_LINGER", 30.0)  # seconds that a thread waits to be told
        await meet()
        await anyio.sleep(0.2)  # in which they come back to wait
    await meet()
    assert await health(app) == counts()


async def test_blocked_notifiers_leave_the_hosts_thread_pool_free():
    gate = Gate()
    mount = Mount("/notify", create_app(gate, outbox=":memory:", concurrency=60))
    host = Starlette(routes=[Route("/host", lambda request: PlainTextResponse("free")), mount])
    async with client(host) as http, anyio.create_task_group() as tasks:
        for _ in range(60):
            tasks.start_soon(http.post, f"/notify{PATH}")
        await soon(lambda: len(gate.came) == 60)
        assert (await http.get("/host")).text == "free"
        assert gate.sent == []
        gate.open()


@pytest.mark.parametrize("kind", [str, Path])
async def test_by_default_log_txt_and_outbox_are_here_and_both_may_be_str_or_path(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    await post(create_app())
    await post(create_app(log=kind("a.log"), outbox=kind("b/c")))
    assert len(read(tmp_path / "log.txt")) == len(read(tmp_path / "a.log")) == 1
    assert {str(path) for path in Path().glob("*")} == {"log.txt", "outbox", "a.log", "b"}
    assert Path("b/c").is_dir()


async def test_a_memory_outbox_keeps_nothing_on_disk(sent, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    async with lifespan(create_app(sent.append, outbox=":memory:")) as app:
        await post(app)
    assert len(sent) == 1
    assert list(tmp_path.iterdir()) == []


async def test_the_environment_sets_the_app_of_the_module(tmp_path, monkeypatch):
    settings = {"LOG": tmp_path / "a.log", "OUTBOX": tmp_path / "b", "TOKEN": "s3cret", "MAX_PENDING": 1}
    for name, value in (settings | {"DELAY": AN_HOUR, "CONCURRENCY": 2, "FSYNC": "false"}).items():
        monkeypatch.setenv(f"NOTIFY_{name}", str(value))
    app = runpy.run_path(str(HERE / "service.py"))["app"]
    refusal(await post(app), 401)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(functools.partial(post, app, headers=TOKEN))
        await settled(app, pending=1)
        refusal(await post(app, headers=TOKEN), 503)
        assert read(tmp_path / "a.log") == []
        assert (tmp_path / "b").is_dir()
        monkeypatch.setenv("NOTIFY_DELAY", "0")
        monkeypatch.setenv("NOTIFY_OUTBOX", ":memory:")
        await post(runpy.run_path(str(HERE / "service.py"))["app"], headers=TOKEN)
        assert len(read(tmp_path / "a.log")) == 1
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("prefix", ["/notify", "/api/v1/notify"])
async def test_mounted_it_answers_under_the_prefix_which_the_document_names(app, sent, prefix):
    host = Starlette(routes=[Mount(prefix, app)])
    for email in (USER, f"{USER}/"):
        assert (await post(host, email, prefix)).status_code == 202
    assert [n.email for n in sent] == [USER, USER]
    async with client(host) as http:
        assert (await http.get(f"{prefix}/health")).json()["status"] == "ok"
        assert (await http.get(f"{prefix}/openapi.json")).json()["servers"][0]["url"] == prefix
        refusal(await http.get(f"{prefix}/nothing"), 404)
        refusal(await http.get(f"{prefix}{PATH}"), 405)
        assert (await http.post(f"{prefix}{PATH}%0A")).status_code in (404, 422)
    assert len(sent) == 2


@pytest.mark.parametrize("served", [False, True], ids=["", "with lifespans that end"])
@pytest.mark.parametrize("kind", ["def", "async def", "log"])
def test_one_app_serves_several_event_loops(log, outbox, sent, served, kind):
    app = create_app(notifier(kind, sent), log=log, outbox=outbox, fsync=False)
    answers = []

    async def one_loop():
        async with asyncio.timeout(60), lifespan(app) if served else nullcontext(), client(app) as http:
            answers.extend([(await http.post(PATH)).json()["id"] for _ in range(5)])

    def loops(_):
        for _ in range(4):
            asyncio.run(one_loop())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(loops, range(4)))
    assert len(answers) == 80
    assert sorted(n.id for n in sent or read(log)) == sorted(answers)
    assert asyncio.run(health(app)) == counts()


def test_a_loop_that_is_closed_before_the_notifier_ends_harms_no_other():
    gate = Gate()
    app = create_app(gate, outbox=":memory:", concurrency=1)

    async def leave():
        asking = asyncio.create_task(post(app))
        await soon(lambda: gate.came)
        assert not asking.done()

    asyncio.run(leave())
    gate.open()
    eventually(lambda: gate.sent)
    answer = asyncio.run(asyncio.wait_for(post(app), 20))
    assert answer.status_code == 202
    assert len(gate.sent) == 2


def test_a_loop_that_is_blocked_keeps_no_other_waiting(monkeypatch):
    """Though it was the first to have something for the thread that both wait for."""
    monkeypatch.setattr(service, "_LINGER", 30.0)  # seconds that the thread waits to be told
    app = create_app(as_async(bool), outbox=":memory:")
    blocks, answered = threading.Event(), threading.Event()

    async def block():
        await post(app)  # which starts the thread
        asking = asyncio.create_task(drive(app, as_async(bool)))
        await asyncio.sleep(0)  # in which it asks
        blocks.set()
        assert answered.wait(15)
        await asking

    with ThreadPoolExecutor(1) as pool:
        blocked = pool.submit(asyncio.run, block())
        assert blocks.wait(15)
        assert asyncio.run(post(app)).status_code == 202
        answered.set()
        blocked.result()
    monkeypatch.undo()
    asyncio.run(post(app))  # after which the thread soon ends


async def test_at_its_end_a_lifespan_waits_for_what_the_relay_is_delivering(left, outbox):
    gate = Gate()
    async with lifespan(create_app(gate.on_loop, outbox=outbox)):
        await soon(lambda: len(gate.came) == 3)
        assert gate.sent == []
        gate.open()
    assert len(gate.sent) == 3


async def test_a_lifespan_that_ends_leaves_what_is_just_being_answered_to_its_task(outbox):
    """As when one app serves several event loops, and the lifespan of one of them ends."""
    answering, over = anyio.Event(), anyio.Event()
    asked, delivered = [], []

    async def notify(notification):
        delivered.append(anyio.get_current_task().id)

    async def send(message):
        asked.append(anyio.get_current_task().id)
        answering.set()
        await over.wait()

    app = create_app(notify, outbox=outbox)
    async with anyio.create_task_group() as tasks:
        async with lifespan(app):
            tasks.start_soon(drive, app, send)
            await answering.wait()
        over.set()
    assert delivered == asked[:1]


async def test_what_is_left_when_a_lifespan_ends_the_next_of_the_same_app_takes_up_at_once(outbox, monkeypatch):
    monkeypatch.setattr(service, "_LOOK", 1_000.0)  # seconds until it would look again
    sent, ready = [], False

    def notify(notification):
        assert ready
        sent.append(notification.id)

    app = create_app(notify, outbox=outbox)
    async with lifespan(app):
        answer = await post(app)
    ready = True
    async with lifespan(app):
        await soon(lambda: sent)
    assert sent == [answer.json()["id"]]


async def test_an_error_in_the_hosts_own_lifespan_reaches_it_as_it_was(app):
    with pytest.raises(LookupError, match="the host's"):
        async with lifespan(app):
            raise LookupError("the host's")


# --------------------------------------------------------------------------------------------------- outbox


async def test_only_the_owner_may_read_the_log_and_the_outbox(tmp_path, log, outbox):
    await post(create_app(log=log, outbox=outbox))
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert modes.pop(outbox) == 0o700
    assert set(modes.values()) == {0o600}
    assert any(path.parent == outbox for path in modes)


def _replace(log: Path) -> None:
    (new := log.with_name("new")).touch()
    new.rename(log)


LEAVES = {  # how a log is no longer the file of its name, at any time
    "renamed": lambda log: log.rename(log.with_name("log.txt.1")),
    "renamed for a new one": lambda log: (log.rename(log.with_name("log.txt.1")), log.touch()),
    "removed": lambda log: log.unlink(),
    "replaced": _replace,
    "its folder renamed": lambda log: (log.parent.rename(log.parent.with_name("old")), log.parent.mkdir()),
}


@pytest.fixture(params=["on Linux", "elsewhere"])
def system(request, monkeypatch):
    """Where an open file's link tells its name, and where there is none."""
    if request.param == "elsewhere":
        monkeypatch.setattr(os, "readlink", lambda path: os.stat(f"{path} is not there"))


linux_or_not = pytest.mark.usefixtures("system")


@linux_or_not
@cases("leave", LEAVES)
async def test_the_next_line_is_in_the_file_that_has_the_name_of_the_log(tmp_path, outbox, leave):
    log = tmp_path / "logs" / "log.txt"
    log.parent.mkdir()
    app = create_app(log=log, outbox=outbox)
    before = [(await post(app)).json()["id"] for _ in range(2)]
    assert ids(log) == before
    leave(log)
    after = [(await post(app)).json()["id"] for _ in range(2)]
    assert ids(log) == after
    assert all(ids(path) == before for path in tmp_path.rglob("log.txt*") if path != log)


async def test_what_an_app_with_no_lifespan_has_opened_is_closed_with_it(log, outbox, monkeypatch):
    """Python 3.13 and later warn of each connection that is only left to the garbage collector."""
    connect, left = sqlite3.connect, []

    class Connection(sqlite3.Connection):
        is_open = True

        def close(self):
            self.is_open = False
            super().close()

        def __del__(self):
            if self.is_open:
                left.append(self)

    def closed():
        gc.collect()
        return not [fd for fd in Path("/proc/self/fd").iterdir() if str(outbox) in os.path.realpath(fd)]

    monkeypatch.setattr(sqlite3, "connect", functools.partial(connect, factory=Connection))
    for _ in range(3):
        await post(create_app(log=log, outbox=outbox))
    await soon(closed)
    assert left == []


async def test_a_log_that_is_open_is_not_asked_for_its_times(log, outbox, monkeypatch):
    """Its next write would have every sync of any file write one block more."""
    box = service._Outbox(outbox, max_pending=1, fsync=True)
    box.open()
    file = service._LogFile(log, True, box)
    file.append(["one"])
    stat, fstat, asked = os.stat, os.fstat, []
    monkeypatch.setattr(os, "stat", lambda path, **how: asked.append(str(path)) or stat(path, **how))
    monkeypatch.setattr(os, "fstat", lambda file: asked.append(os.readlink(f"/proc/self/fd/{file}")) or fstat(file))
    file.append(["two"])
    monkeypatch.undo()
    file.sync()
    assert str(log) not in asked
    assert log.read_text() == "one\ntwo\n"


async def test_apps_on_different_outboxes_share_nothing(tmp_path, sent):
    gate = Gate()
    first = create_app(gate, outbox=tmp_path / "one", max_pending=1, concurrency=1)
    second = create_app(sent.append, outbox=tmp_path / "two", max_pending=1, concurrency=1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(functools.partial(post, first, headers=KEY, json={"message": "one"}))
        await soon(lambda: gate.came)
        response = await post(second, headers=KEY, json={"message": "two"})
        assert (response.status_code, "idempotent-replayed" in response.headers) == (202, False)
        assert (await health(first), await health(second)) == (counts(pending=1), counts())
        gate.open()
    assert ([n.message for n in gate.came], [n.message for n in sent]) == (["one"], ["two"])


async def test_apps_on_one_outbox_take_nothing_from_each_other_even_when_a_lifespan_is_over(outbox, sent):
    gate = Gate()
    first, second, third = (create_app(notify, outbox=outbox) for notify in (gate, sent.append, sent.append))
    async with anyio.create_task_group() as tasks:
        async with lifespan(first):
            for _ in range(3):
                tasks.start_soon(post, first)
            await soon(lambda: len(gate.came) == 3)
            async with lifespan(second):
                own = [(await post(second)).json()["id"] for _ in range(3)]
                assert await health(second) == counts()
            assert [n.id for n in sent] == own
            assert len(gate.came) == 3
        own.append((await post(third)).json()["id"])  # it looks for what is left
        gate.open()
    await settled(first)
    assert [n.id for n in sent] == own
    assert len(gate.came) == 3


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """A server that was killed when it had acknowledged three notifications and delivered none."""
    with serve(tmp_path_factory.mktemp("dead"), delay=AN_HOUR) as server:
        for message in ("one", "two", "three"):
            server.post(message)
        server.kill()
    assert ids(server.log) == []
    return server


@pytest.fixture
def left(dead, outbox) -> list[str]:
    """The ids that it left in the outbox, of which this test has a copy."""
    shutil.copytree(dead.outbox, outbox)
    return dead.accepted


@pytest.mark.parametrize("kind", ["def", "async def", "log"])
async def test_what_a_dead_process_left_is_delivered_once_at_the_next_start(left, log, outbox, sent, kind):
    expected = dict(zip(left, ["one", "two", "three"], strict=True))
    for message in ("four", "five"):
        app = create_app(notifier(kind, sent), log=log, outbox=outbox)
        async with lifespan(app):
            await soon(lambda: len(sent or ids(log)) >= 3)
            expected[(await post(app, json={"message": message})).json()["id"]] = message
            await settled(app)
    assert sorted((n.id, n.message) for n in sent or read(log)) == sorted(expected.items())


async def test_eight_that_start_at_once_on_what_a_dead_process_left_write_it_once(left, log, outbox):
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
    assert sorted(n.id for n in read(log)) == sorted([own, *left])


def test_an_entry_is_printed_without_those_that_are_pending_beside_it():
    pending = set()
    pending.update(service._Entry(line, pending) for line in ("mine", "theirs"))
    assert not any("mine" in repr(entry) and "theirs" in repr(entry) for entry in pending)


@pytest.mark.parametrize("fails", [True, False], ids=["failed", "delivered"])
async def test_what_was_adopted_is_pending_and_leaves_max_pending_to_what_comes_in(left, outbox, fails):
    gate, adopted = Gate(), []

    def notify(notification):
        if notification.id not in left:
            gate(notification)
        elif fails:
            raise RuntimeError
        adopted.append(notification)

    app = create_app(notify, outbox=outbox, max_pending=1)
    count = 3 if fails else 0
    async with lifespan(app), anyio.create_task_group() as tasks:
        await soon(lambda: len(adopted) == 3 - count)
        await settled(app, pending=count, failed=count)
        tasks.start_soon(post, app)
        await settled(app, pending=count + 1, failed=count)
        refusal(await post(app), 503)
        gate.open()


async def test_what_is_left_is_adopted_in_batches_and_what_is_not_begun_is_anothers_when_the_lifespan_is_over(
    left, outbox, sent, caplog, monkeypatch
):
    def opens(record):
        if record.msg.startswith("waiting at most"):  # from then on it begins nothing
            gate.open()
        return True

    caplog.set_level(logging.INFO, "notify")
    monkeypatch.setattr(logging.getLogger("notify"), "filters", [opens])
    monkeypatch.setattr(service, "_MOST_ADOPTED", 1000)
    with closing(sqlite3.connect(outbox / "outbox.db")) as db, db:
        for _ in range(9):
            db.execute("INSERT INTO pending (worker, line) SELECT worker, line FROM pending")
    gate = Gate()
    async with lifespan(create_app(gate.on_loop, outbox=outbox)) as app:
        await settled(app, pending=1000)
        await soon(lambda: len(gate.came) == 500)
    monkeypatch.undo()
    async with lifespan(create_app(sent.append, outbox=outbox)):
        await soon(lambda: len(gate.came) + len(sent) == 3 * 2**9)
    assert (len(gate.sent), len(sent)) == (500, 3 * 2**9 - 500)


BEFORE_A_CRASH = {  # the log, where its line is after the crash, and how this ends
    "in the log": ("log.txt", "log.txt", "one\n"),
    "torn": ("log.txt", "log.txt", "on"),
    "renamed": ("log.txt", "log.txt.1", "one\n"),
    "renamed within": ("log.txt", "log-2026.txt", "one\n"),
    "renamed like a database": ("app.db.log", "app.db.log.1", "one\n"),
    "renamed like a lock": ("log.lock", "log.lock.1", "one\n"),
    "renamed behind a link": ("log.txt", "linked/real.log.1", "one\n"),
}


@cases("name, before, end", BEFORE_A_CRASH)
async def test_a_line_written_before_the_crash_is_not_written_again_unless_it_is_torn(
    left, tmp_path, outbox, name, before, end
):
    log, before = tmp_path / name, tmp_path / before
    if before.parent != tmp_path:
        before.parent.mkdir()
        log.symlink_to(before.with_suffix(""))
    before.write_text(A_LINE.format(id=left[0]).removesuffix("one") + end)
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await soon(lambda: len({*ids(log), *ids(before)}) >= 3)
        await settled(app)
    assert sorted(n.id for path in {log, before} for n in read(path)) == sorted(left)


FORGERIES = {
    "the id": "{id}",
    "the id as a second column": "{id} notification for user@example.com: one",
    "a whole line": A_LINE,
    "a line after a newline": f"x\n{A_LINE}\n",
    "a line after a CR": f"x\r{A_LINE}",
    "a line after U+2028": f"x\u2028{A_LINE}",
    "a line after many": "x" * 9000 + " {id} notification for user@example.com: one",
}


@cases("forgery", FORGERIES)
async def test_anothers_message_cannot_pass_for_mine_after_a_crash(left, log, outbox, forgery):
    other = create_app(log=log, outbox=":memory:")
    forged = [(await post(other, json={"message": forgery.format(id=id)})).json()["id"] for id in left]
    async with lifespan(create_app(log=log, outbox=outbox)):
        await soon(lambda: len(ids(log)) >= 6)
    assert sorted(n.id for n in read(log)) == sorted(left + forged)


async def test_an_outbox_whose_making_was_interrupted_is_made_again(log, outbox):
    """A process that is killed, or a disk that is full, leaves SQLite's header, and not one table."""
    outbox.mkdir()
    with closing(sqlite3.connect(outbox / "outbox.db")) as half:
        half.execute("PRAGMA journal_mode = WAL")
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        answer = await post(app)
    assert ids(log) == [answer.json()["id"]]


@pytest.mark.parametrize(("name", "mode"), [("log.db", "DELETE"), ("log.sqlite3", "WAL"), ("log.lock", "DELETE")])
async def test_a_database_beside_the_log_keeps_its_locks(left, log, outbox, name, mode):
    """Such as the outbox's own; it is not read for lines, as to close it would drop this process's locks."""
    database = log.with_name(name)
    lock = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('BEGIN EXCLUSIVE')"
    with closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute(f"PRAGMA journal_mode = {mode}")
        db.execute("BEGIN EXCLUSIVE")
        async with lifespan(create_app(log=log, outbox=outbox)):
            await soon(lambda: len(ids(log)) == len(left))
        other = subprocess.run([sys.executable, "-c", lock, database], check=False, capture_output=True)
    assert b"database is locked" in other.stderr


@together()
async def test_a_free_lock_is_left_to_the_next_start_as_somebody_may_be_about_to_take_it(folder):
    """Who starts makes the file of his lock, and then takes it, holding outbox.lock."""
    new = folder / "outbox" / "0123456789abcdef.lock"
    async with lifespan(create_app(outbox=folder / "outbox")):
        new.touch()
        await anyio.sleep(1.6 * service._LOOK)  # until it has looked
        assert new.exists()
        async with lifespan(create_app(outbox=folder / "outbox")):
            assert not new.exists()


@together()
async def test_who_lost_his_own_lock_does_not_take_himself_for_dead(folder):
    gate, outbox = Gate(), folder / "outbox"
    async with lifespan(create_app(gate.on_loop, outbox=outbox)) as app, anyio.create_task_group() as tasks:
        tasks.start_soon(post, app)
        await soon(lambda: len(gate.came) == 1)
        for lock in outbox.glob("[0-9a-f]" * 16 + ".lock"):
            lock.unlink()
        await anyio.sleep(1.6 * service._LOOK)  # until it has looked
        assert len(gate.came) == 1
        gate.open()


async def test_locks_of_the_dead_do_not_pile_up_and_no_other_lock_is_touched(outbox):
    outbox.mkdir()
    others = [outbox / "poetry.lock", outbox / "deadbeefdeadbeef.lock"]
    for other in others:
        other.write_text("another program's")
    for number in range(5):
        (outbox / f"{number:016x}.lock").touch()
    async with lifespan(create_app(outbox=outbox)), lifespan(create_app(outbox=outbox)):
        locks = {*outbox.glob("*.lock")} - {*others, outbox / "outbox.lock", outbox / "log.lock"}
        assert len(locks) == 2
    assert [other.read_text() for other in others] == ["another program's"] * 2
    assert {*outbox.glob("*.lock")} == {*others, outbox / "outbox.lock", outbox / "log.lock"}


# --------------------------------------------------------------------------------------------------- faults


class UnprintableError(Exception):
    def __str__(self):
        raise RuntimeError


DOWN = RuntimeError("the mail is down\n" * 1000)
FAILING = {  # a def or an async def, with what it fails, and what the log says of it
    "def": (False, DOWN, "the mail is down"),
    "async def": (True, DOWN, "the mail is down"),
    "unprintable": (True, UnprintableError(), "UnprintableError"),
    "SystemExit": (True, SystemExit(), "SystemExit"),
    "GeneratorExit": (True, GeneratorExit(), "GeneratorExit"),
    "CancelledError": (True, asyncio.CancelledError(), "CancelledError"),
}


@together(**FAILING)
async def test_a_notification_that_fails_is_tried_again_after_growing_pauses(folder, is_async, failure, told):
    calls, times = [], []

    def notify(notification):
        calls.append(notification)
        if notification.message == "bad":
            times.append(time.monotonic())
            if len(times) <= 2:
                raise failure

    app = create_app(as_async(notify) if is_async else notify, outbox=folder / "outbox")
    with warnings() as warned:
        async with lifespan(app):
            bad = await post(app, json={"message": "bad"})
            good = await post(app, json={"message": "good"})
            assert [n.message for n in calls].count("good") == 1
            await soon(lambda: len(calls) >= 4)
            await settled(app)
    assert Counter(n.id for n in calls) == {bad.json()["id"]: 3, good.json()["id"]: 1}
    assert len(set(calls)) == 2
    assert times[2] - times[1] > 1.1  # the first pause is of 1 s at most, and pauses grow
    of_bad = [warning for warning in warned if bad.json()["id"] in warning]
    assert 1 <= len(of_bad) <= 2
    assert told in of_bad[0]
    assert len(of_bad[0]) < 1000
    assert of_bad[0].isprintable()


@together()
async def test_a_host_that_raises_after_the_answer_was_made_loses_nothing(folder):
    gate, calls = Gate(), []

    def notify(notification):
        calls.append(notification.message)
        if notification.message == "in flight":
            gate(notification)

    async def dispatch(request, call_next):
        response = await call_next(request)
        if "raise" in request.headers:
            raise RuntimeError
        return response

    app = create_app(notify, outbox=folder / "outbox")
    middleware = [Middleware(BaseHTTPMiddleware, dispatch=dispatch)]
    host = Starlette(routes=[Mount("/notify", app)], middleware=middleware, lifespan=lambda host: lifespan(app))
    transport = httpx.ASGITransport(host, raise_app_exceptions=False)
    async with lifespan(host), httpx.AsyncClient(transport=transport, base_url="http://test/notify") as http:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(functools.partial(http.post, PATH, json={"message": "in flight"}))
            await soon(lambda: calls == ["in flight"])
            response = await http.post(PATH, json={"message": "left"}, headers={"raise": "1"})
            assert response.status_code == 500
            await soon(lambda: "left" in calls)
            await settled(app, pending=1)
            gate.open()
        await settled(app)
    assert calls == ["in flight", "left"]


@together()
async def test_a_caller_that_is_cancelled_when_it_has_its_answer_loses_nothing(folder):
    log = folder / "log.txt"
    async with lifespan(create_app(log=log, outbox=folder / "outbox", delay=0.3)) as app:
        with anyio.CancelScope() as caller:

            async def send(message):
                if message["type"] == "http.response.body":
                    caller.cancel()

            await drive(app, send)
        assert caller.cancelled_caught
        assert read(log) == []
        await soon(lambda: ids(log))
        await settled(app)
    assert len(read(log)) == 1


async def test_a_caller_that_is_cancelled_harms_no_other_that_waits_for_the_same_commit(outbox, sent):
    app = create_app(sent.append, outbox=outbox)
    await post(app)
    answers = []

    async def ask():
        answers.append((await post(app)).status_code)

    with closing(sqlite3.connect(outbox / "outbox.db", isolation_level=None)) as db, anyio.fail_after(20):
        db.execute("BEGIN IMMEDIATE")
        async with anyio.create_task_group() as others:
            async with anyio.create_task_group() as caller:
                for tasks in others, caller, others:
                    tasks.start_soon(ask)
                await anyio.wait_all_tasks_blocked()
                caller.cancel_scope.cancel()
            db.execute("ROLLBACK")
    assert answers == [202, 202]


@together()
def test_a_caller_whose_time_is_up_in_the_middle_of_the_notifier_loses_nothing(folder):
    calls = []

    async def ask():
        async def notify(notification):
            calls.append(notification)
            if len(calls) == 1:
                limit.reschedule(0)
                await asyncio.sleep(AN_HOUR)

        async with lifespan(create_app(notify, outbox=folder / "outbox")) as app:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None) as limit:
                    await post(app)
            await soon(lambda: len(calls) >= 2)
            await settled(app)

    asyncio.run(ask())
    assert len(calls) == 2
    assert calls[0] == calls[1]


@together()
async def test_what_fails_is_tried_again_though_600_others_do_not_return(folder):
    calls, gate = [], anyio.Event()

    async def notify(notification):
        calls.append(notification.message)
        if notification.message == "hangs":
            await gate.wait()
        elif calls.count(notification.message) == 1:
            raise RuntimeError

    async with lifespan(create_app(notify, outbox=":memory:")) as app, anyio.create_task_group() as tasks:
        for _ in range(600):
            tasks.start_soon(functools.partial(post, app, json={"message": "hangs"}))
        await soon(lambda: calls.count("hangs") == 600)
        await post(app, json={"message": "fails once"})
        await soon(lambda: calls.count("fails once") == 2)
        gate.set()


async def test_a_thread_that_waits_takes_the_next_notification_and_few_others_are_started(sent, monkeypatch):
    """One more is, if the next notification comes while a thread is still on its way back to wait."""
    monkeypatch.setattr(service, "_LINGER", 1.0)  # seconds that it waits, even on a slow machine
    start, names = threading.Thread.start, []
    monkeypatch.setattr(threading.Thread, "start", lambda self: names.append(self.name) or start(self))
    app = create_app(sent.append, outbox=":memory:")
    for _ in range(100):
        await post(app)
    assert 2 <= names.count("notify") < 20  # one writes the outbox
    assert len(sent) == 100


@together()
async def test_a_task_that_comes_when_the_relay_has_delivered_does_nothing(folder):
    """Not even with the notification that came next, and of which it might have the number."""
    sent = []
    app = create_app(sent.append, outbox=folder / "outbox")
    may_end = {"/send-notification/a@b.c": anyio.Event(), PATH: anyio.Event()}

    async def slow_host(scope, receive, send):
        async def slow_send(message):
            await send(message)
            if message["type"] == "http.response.body":
                await may_end[scope["path"]].wait()

        await app(scope, receive, slow_send)

    async with lifespan(app), anyio.create_task_group() as another:
        async with anyio.create_task_group() as late:
            late.start_soon(post, slow_host, "a@b.c")
            await soon(lambda: [n.email for n in sent] == ["a@b.c"])
            await settled(app)
            another.start_soon(post, slow_host)
            await settled(app, pending=1)
            may_end["/send-notification/a@b.c"].set()
        may_end[PATH].set()
    assert [n.email for n in sent] == ["a@b.c", USER]


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt, StopIteration, BaseException])
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
    assert await health(app) == counts(pending=2, failed=2)


def test_a_request_that_is_closed_while_its_notifier_runs_waits_for_nothing_more():
    """As when its loop has ended, and its task is collected."""
    came = []

    async def notify(notification):
        came.append(notification)
        await asyncio.sleep(60)

    async def send(_):
        pass

    async def begin_and_close():
        request = drive(app, send)
        kept = request.send(None)
        await soon(kept.done)
        request.send(None)
        assert came
        request.close()
        return await health(app)

    app = create_app(notify, outbox=":memory:")
    assert asyncio.run(begin_and_close()) == counts(pending=1, failed=1)


async def test_a_def_that_returns_a_coroutine_has_delivered_nothing_and_is_told_how_to(warned, sent):
    coroutines = []

    def notify(notification):
        coroutines.append(as_async(sent.append)(notification))
        return coroutines[-1]

    app = create_app(notify, outbox=":memory:")
    await post(app)
    assert await health(app) == counts(pending=1, failed=1)
    assert any("async def" in warning for warning in warned)
    for coroutine in coroutines:
        coroutine.close()


@pytest.mark.parametrize(("served", "kind"), [(False, "delay"), (True, "delay"), (True, "async def"), (True, "def")])
async def test_of_520_at_once_the_relay_takes_what_is_too_much_for_the_requests_tasks(log, served, kind):
    answers, gate = [], Gate()
    notify = {"delay": None, "async def": gate.on_loop, "def": gate}[kind]
    app = create_app(notify, log=log, outbox=":memory:", delay=0.2)

    async def ask():
        answers.append((await post(app)).json()["id"])

    async with lifespan(app) if served else nullcontext():
        async with anyio.create_task_group() as tasks:
            for _ in range(520):
                tasks.start_soon(ask)
            if kind != "delay":
                await soon(lambda: len(answers) >= 20)  # the other requests' tasks have to do with one each
            gate.open()
        if served:
            await soon(lambda: len(gate.sent or ids(log)) == 520)
        assert sorted(n.id for n in gate.sent or read(log)) == sorted(answers)
        assert await health(app) == counts()


async def test_it_starts_while_another_program_writes_to_its_outbox(outbox, sent):
    async with lifespan(create_app(sent.append, outbox=outbox)) as first:
        await post(first)
        with closing(sqlite3.connect(outbox / "outbox.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            async with lifespan(create_app(sent.append, outbox=outbox)) as second:
                other.execute("ROLLBACK")
                await post(second)
    assert len(sent) == 2


async def test_once_all_is_delivered_the_outbox_is_small_again(outbox):
    gate = Gate()
    async with lifespan(create_app(gate, outbox=outbox)) as app:
        async with anyio.create_task_group() as tasks:
            for _ in range(100):
                tasks.start_soon(functools.partial(post, app, json={"message": "x" * 9000}))
            await settled(app, pending=100)
            gate.open()
        await settled(app)
    assert (outbox / "outbox.db").stat().st_size < 100_000


@pytest.mark.parametrize("kind", ["log", "def", "a def that fails"])
async def test_when_post_returns_it_has_been_tried_however_many_came_before(log, kind):
    tried = []

    def notify(notification):
        tried.append(notification.id)
        if kind == "a def that fails":
            raise RuntimeError("the mail is down")

    app = create_app(None if kind == "log" else notify, log=log, outbox=":memory:")
    async with lifespan(app), client(app) as http:
        for _ in range(510):
            id = (await http.post(PATH)).json()["id"]
            assert id in (log.read_text() if kind == "log" else tried)


async def test_without_a_lifespan_one_request_sees_to_all_that_it_adopts_however_many(outbox):
    async with lifespan(create_app(raises, outbox=outbox)) as app, anyio.create_task_group() as tasks:
        for _ in range(520):
            tasks.start_soon(post, app)
    gate = Gate()
    app = create_app(gate.on_loop, outbox=outbox)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(health, app)
        await soon(lambda: len(gate.came) == 500)
        with anyio.fail_after(20):
            await health(app)  # another leaves it to the first
        gate.open()
    assert len({n.id for n in gate.sent}) == len(gate.sent) == 520


async def test_many_failures_do_not_flood_the_servers_log(warned):
    app = create_app(raises, outbox=":memory:")
    async with client(app) as http:
        for _ in range(500):
            assert (await http.post(PATH)).status_code == 202
    assert (await health(app))["failed"] == 500
    assert 1 <= len(warned) <= 100


async def test_what_failed_is_kept_for_the_next_start(outbox, sent):
    async with lifespan(create_app(raises, outbox=outbox)) as app:
        failed = (await post(app)).json()["id"]
    async with lifespan(create_app(sent.append, outbox=outbox)):
        await soon(lambda: sent)
    assert [n.id for n in sent] == [failed]


BROKEN_LOGS = {
    "a directory": ("log.txt", Path.mkdir, Path.rmdir),
    "in no folder": ("missing/log.txt", lambda log: None, lambda log: log.parent.mkdir()),
    "a dangling link": ("log.txt", lambda log: log.symlink_to("missing/log.txt"), Path.unlink),
}


@cases("path, spoil, mend", BROKEN_LOGS)
async def test_a_log_that_cannot_be_written_stops_nothing_and_heals_by_itself(
    tmp_path, monkeypatch, warned, path, spoil, mend
):
    monkeypatch.setattr(service, "_OWN_PAUSES", (AN_HOUR,) * 3)  # which are not the log's
    log = tmp_path / path
    spoil(log)
    async with lifespan(create_app(log=log, outbox=tmp_path / "outbox")) as app:
        answers = [await post(app) for _ in range(30)]
        assert [answer.status_code for answer in answers] == [202] * 30
        assert await health(app) == counts(pending=30, failed=30)
        assert 1 <= sum(str(log) in warning for warning in warned) <= 5
        mend(log)
        await soon(lambda: len(ids(log)) >= 30)
        await settled(app)
    assert sorted(n.id for n in read(log)) == sorted(answer.json()["id"] for answer in answers)


def no_sync(file):
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@linux_or_not
async def test_what_a_log_could_not_sync_waits_for_the_next_start_renamed_or_not(log, outbox, monkeypatch):
    """A second fsync proves nothing of what the first one failed to write."""
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        answers = [await post(app)]
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_sync)
            answers.append(await post(app))
            renamed = log.rename(log.with_name("log.txt.1"))
            answers.append(await post(app))
            await settled(app, failed=2)
        answers.append(await post(app))
        assert ids(log)[-1] == answers[-1].json()["id"]
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await soon(lambda: rows(outbox) == 0)
    assert sorted(n.id for path in (log, renamed) for n in read(path)) == sorted(a.json()["id"] for a in answers)


async def test_what_was_adopted_and_not_synced_leaves_max_pending_to_what_comes_in(left, log, outbox, monkeypatch):
    async with lifespan(create_app(log=log, outbox=outbox, max_pending=1)) as app:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_sync)
            await settled(app, failed=len(left))
        assert (await post(app)).status_code == 202


async def test_a_task_that_comes_when_its_line_is_set_aside_writes_no_second(log, outbox, monkeypatch):
    may_end = anyio.Event()

    async def slow_send(message):
        if message["type"] == "http.response.body":
            await may_end.wait()

    monkeypatch.setattr(service, "_LATE", 0.1)  # seconds after which the relay delivers
    monkeypatch.setattr(os, "fsync", no_sync)
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drive, app, slow_send)
            await settled(app, failed=1)
            may_end.set()
        await settled(app, failed=1)
        assert len(ids(log)) == 1


async def test_a_task_that_comes_after_the_next_start_writes_no_line_again(log, outbox, monkeypatch):
    may_end, looking, may_look, find = anyio.Event(), threading.Event(), threading.Event(), service._LogFile.find

    async def slow_send(message):
        if message["type"] == "http.response.body":
            await may_end.wait()

    def slow_find(self, ids):
        looking.set()
        may_look.wait(60)
        return find(self, ids)

    monkeypatch.setattr(service, "_LATE", 0.1)  # seconds after which the relay delivers
    monkeypatch.setattr(service._LogFile, "find", slow_find)
    app = create_app(log=log, outbox=outbox)
    async with anyio.create_task_group() as tasks:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", no_sync)
            async with lifespan(app):
                tasks.start_soon(drive, app, slow_send)
                await settled(app, failed=1)
        async with lifespan(app):
            await soon(looking.is_set)  # what is left has the same number as what the task comes for
            may_end.set()
            await anyio.sleep(0.2)
            may_look.set()
            await soon(lambda: rows(outbox) == 0)
    assert len(ids(log)) == 1


def no_memory(self, entries, synced=True, settle=service._Outbox.settle):
    if not synced:
        raise MemoryError
    settle(self, entries)


@pytest.mark.parametrize(("owner", "name", "broken"), [(os, "fsync", no_sync), (service._Outbox, "settle", no_memory)])
async def test_whatever_fails_once_a_line_is_in_the_log_writes_it_no_second_time(
    log, outbox, monkeypatch, owner, name, broken
):
    """Not even with a handler of log records that ends the thread."""

    class Ends(logging.Handler):
        def emit(self, record):
            raise SystemExit

    monkeypatch.setattr(logging.getLogger("notify"), "handlers", [Ends(logging.WARNING)])
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, broken)
            answer = await post(app)
            await soon(lambda: ids(log))
            await anyio.sleep(0.5)  # in which it would be tried again
        assert ids(log) == [answer.json()["id"]]
    async with lifespan(create_app(log=log, outbox=outbox)):
        await soon(lambda: rows(outbox) == 0)
    assert ids(log) == [answer.json()["id"]]


async def test_lines_gather_while_the_log_rests_and_no_answer_waits_for_them(log, monkeypatch):
    append, batches = service._LogFile.append, []
    monkeypatch.setattr(service, "_PAUSE", 0.5)
    monkeypatch.setattr(service._LogFile, "append", lambda self, lines: batches.append(lines) or append(self, lines))
    app = create_app(log=log, outbox=":memory:")
    await post(app)  # which waits for nothing
    async with anyio.create_task_group() as tasks:
        for _ in range(10):
            answered = anyio.Event()

            async def send(message, answered=answered):
                if message["type"] == "http.response.body":
                    answered.set()

            tasks.start_soon(drive, app, send)
            await answered.wait()
    assert len(ids(log)) == 11
    assert len(batches) < 6


async def test_the_log_does_not_rest_after_many_lines(log, monkeypatch):
    monkeypatch.setattr(service, "_PAUSE", 60.0)
    monkeypatch.setattr(service, "_FEW", 1)  # so that one is many
    app = create_app(log=log, outbox=":memory:")
    with anyio.fail_after(20):
        sent = [(await post(app)).json()["id"] for _ in range(3)]
    assert ids(log) == sent


async def test_what_is_set_aside_is_told_however_soon_after_another_failure(log, outbox, monkeypatch, warned):
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        log.mkdir()
        await post(app)
        log.rmdir()
        await settled(app)
        monkeypatch.setattr(os, "fsync", no_sync)
        await post(app)
        await settled(app, failed=1)
    assert [warning.partition(": ")[0].partition("and ")[2] for warning in warned] == [
        "is tried again",
        "waits for the next start",
    ]


async def test_what_is_set_aside_is_not_looked_at_all_the_time(log, outbox, monkeypatch):
    step, steps = service._Relay._step, []
    monkeypatch.setattr(service._Relay, "_step", lambda *how: steps.append(how) or step(*how))
    monkeypatch.setattr(os, "fsync", no_sync)
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await post(app)
        await settled(app, failed=1)
        steps.clear()
        await anyio.sleep(1.5)
        assert 0 < len(steps) < 15  # of the 30 that there are as long as something is due


async def test_an_outbox_is_not_closed_while_the_log_has_lines_to_sync(log, outbox, monkeypatch, caplog):
    probe = service._Outbox.probe

    async def post_and_probe(self):
        monkeypatch.setattr(service._Outbox, "probe", probe)
        await post(app)
        return await self.probe()

    caplog.set_level("INFO", "notify")
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await post(app)
        monkeypatch.setattr(service._Outbox, "probe", post_and_probe)
    await soon(lambda: rows(outbox) == 0)
    assert len(ids(log)) == 2
    assert len([record for record in caplog.records if "opening" in record.message]) == 1


async def test_a_line_is_synced_before_its_row_goes(log, outbox, monkeypatch):
    kept, fsync = [], os.fsync

    def watched(file):
        if os.fstat(file).st_ino == log.stat().st_ino:
            kept.append((len(ids(log)) - sum(lines for lines, _ in kept), rows(outbox)))
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched)
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        for _ in range(20):
            await post(app)
    assert sum(lines for lines, _ in kept) == 20
    assert all(lines <= left for lines, left in kept)


async def test_what_is_found_in_the_log_is_synced_before_its_row_goes(left, log, outbox, monkeypatch):
    """Who wrote it may have died before, and the machine may be next."""
    renamed = log.with_name("log.txt.1")
    renamed.write_text(A_LINE.format(id=left[0]) + "\n")
    synced, fsync = [], os.fsync

    def watched(file):
        synced.append((os.fstat(file).st_ino, rows(outbox)))
        fsync(file)

    monkeypatch.setattr(os, "fsync", watched)
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await soon(lambda: rows(outbox) == 0)
        await settled(app)
    assert (renamed.stat().st_ino, 3) in synced


@pytest.mark.parametrize("error", [OSError, MemoryError])
async def test_a_write_that_fails_half_way_doubles_no_line_even_if_it_cannot_be_cut(log, outbox, monkeypatch, error):
    steps = []

    class Failing(io.FileIO):
        def write(self, data):
            if steps == ["torn"]:
                steps.append("failed")
                raise error("half way")
            if steps or data.count(b"\n") == 1:
                return super().write(data)
            steps.append("torn")
            return super().write(data[: data.index(b"\n") + 1])

        def truncate(self, size):
            if error is OSError:
                raise OSError("cannot be cut")
            return super().truncate(size)

    async def nothing_is_pending():
        return not (await health(app))["pending"]

    monkeypatch.setattr(io, "FileIO", Failing)
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(post, app)
        await soon(nothing_is_pending)
    assert steps == ["torn", "failed"]
    monkeypatch.undo()
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await settled(app)
        await soon(lambda: len(ids(log)) >= 10)
    assert len(set(ids(log))) == len(ids(log)) == 10


async def test_logs_of_one_number_on_two_file_systems_are_both_searched(left, log, outbox, monkeypatch):
    fstat = os.fstat
    monkeypatch.setattr(os, "fstat", lambda file: os.stat_result((0, 1, fstat(file).st_ino, *fstat(file)[3:])))
    paths = [log, log.with_name("log.txt.1")]
    for id, path in zip(left, paths, strict=False):
        path.write_text(A_LINE.format(id=id) + "\n")
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await soon(lambda: len(ids(log)) >= 2)
        await settled(app)
    assert sorted(n.id for path in paths for n in read(path)) == sorted(left)


async def test_a_log_that_is_renamed_while_it_is_searched_is_found(left, log, outbox, monkeypatch):
    log.write_text("".join(A_LINE.format(id=id) + "\n" for id in left))
    path_open = Path.open

    def renames(path, *args, **options):
        if path == log:
            log.rename(f"{log}.1")
        return path_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", renames)
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await settled(app)
        await soon(lambda: not rows(outbox))
    assert not log.exists()


@together()
async def test_retries_and_answers_go_on_while_the_log_is_searched(folder):
    searching, delivered, searched, in_time, path_open = set(), [], threading.Event(), [], Path.open

    def waits(path, *args, **options):
        if path.parent.parent == folder and path.name == "log.txt.1":
            searching.add(path)
            in_time.append(searched.wait(20))
        return path_open(path, *args, **options)

    async def run(folder, served):
        folder.mkdir()
        log, outbox = folder / "log.txt", folder / "outbox"
        async with lifespan(create_app(raises, outbox=outbox)) as app:
            left = (await post(app)).json()["id"]
        log.with_name("log.txt.1").touch()
        log.mkdir()
        app = create_app(log=log, outbox=outbox)
        served_or_not = lifespan(app) if served else nullcontext()
        async with served_or_not, anyio.create_task_group() as tasks, AsyncExitStack() as at_end:
            at_end.callback(searched.set)
            tasks.start_soon(health, app)
            await soon(lambda: len(searching) == 2)
            assert await health(app) == counts(pending=1)
            failed = (await post(app)).json()["id"]
            log.rmdir()
            if not served:
                await anyio.sleep(1.1 * service._LOOK)  # until it would look for the dead again
                await health(app)
            await soon(lambda: ids(log) == [failed])
            delivered.append(failed)
            await soon(lambda: len(delivered) == 2)
            searched.set()
            await soon(lambda: sorted(ids(log)) == sorted([failed, left]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "open", waits)
        async with anyio.create_task_group() as tasks:
            for served in (True, False):
                tasks.start_soon(run, folder / f"served {served}", served)
    assert all(in_time)  # nothing waited for the search


async def test_a_log_that_hangs_holds_up_no_start(tmp_path, log, outbox):
    """Whoever appends holds the lock of the log."""
    os.mkfifo(log)
    reader = os.open(log, os.O_RDONLY | os.O_NONBLOCK)
    pipe = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
    more_than_a_pipe_holds = {"message": "\U000e0001" * 10_000}  # of which each is escaped

    async def drained():
        with suppress(BlockingIOError):
            os.read(reader, pipe)
        return await health(app) == counts()

    try:
        async with lifespan(create_app(log=log, outbox=outbox)) as app, anyio.create_task_group() as tasks:
            tasks.start_soon(functools.partial(post, app, json=more_than_a_pipe_holds))
            await soon(lambda: fcntl.ioctl(reader, termios.FIONREAD, bytes(4)) == pipe.to_bytes(4, sys.byteorder))
            async with lifespan(create_app(log=tmp_path / "other.txt", outbox=outbox)) as other:
                assert await health(other) == counts()
            await soon(drained)
    finally:
        os.close(reader)


@together()
async def test_a_row_that_cannot_be_deleted_is_deleted_when_it_can_and_not_delivered_again(folder):
    outbox, sent = folder / "outbox", []
    async with lifespan(create_app(sent.append, outbox=outbox)) as app:
        await health(app)
        with closing(sqlite3.connect(outbox / "outbox.db")) as db, db:
            db.execute("CREATE TRIGGER no BEFORE DELETE ON pending BEGIN SELECT RAISE(ABORT, 'no'); END")
        first = (await post(app)).json()["id"]
        refusal(await post(app), 503)
        await anyio.sleep(10 * service._LINGER)  # until the writer has nothing more to do, and rests
        with closing(sqlite3.connect(outbox / "outbox.db")) as db, db:
            db.execute("DROP TRIGGER no")
        await soon(lambda: rows(outbox) == 0)
        assert await health(app) == counts()
    assert [n.id for n in sent] == [first]


REPLACED = {
    "renamed": lambda outbox: outbox.rename(outbox.with_name("elsewhere")),
    "removed": lambda outbox: (outbox / "outbox.db").unlink(),
    "its log removed": lambda outbox: (outbox / "outbox.db-wal").unlink(),
    "another in its place": lambda outbox: shutil.copy(db := outbox / "outbox.db", outbox / "new").replace(db),
}


@cases("replace", REPLACED)
async def test_an_outbox_that_is_replaced_while_it_is_in_use_promises_nothing_more(log, outbox, replace):
    async with client(create_app(log=log, outbox=outbox)) as http:
        first = await http.post(PATH)
        replace(outbox)
        second, status = await http.post(PATH), await http.get("/health")
    assert (first.status_code, second.status_code, status.status_code) == (202, 503, 503)
    assert str(outbox) in status.json()["status"]
    assert ids(log) == [first.json()["id"]]


async def test_a_checkpoint_that_fails_is_nobodys_answer(app, outbox, monkeypatch):
    class Full(sqlite3.Connection):
        def execute(self, sql, *values):
            if "checkpoint" in sql:
                raise sqlite3.OperationalError("database or disk is full")
            return super().execute(sql, *values)

    monkeypatch.setattr(sqlite3, "connect", functools.partial(sqlite3.connect, factory=Full))
    assert await health(app) == counts()


async def test_a_commit_that_fails_promises_nothing_to_those_who_sent_one_key_at_once(log, outbox):
    answers, app = [], create_app(log=log, outbox=outbox)

    async def ask():
        answers.append(await post(app, headers={"Idempotency-Key": "one"}))

    await health(app)
    with closing(sqlite3.connect(outbox / "outbox.db")) as db, db:
        db.execute("CREATE TRIGGER no BEFORE INSERT ON pending BEGIN SELECT RAISE(ABORT, 'no'); END")
    async with anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(ask)
    assert [answer.status_code for answer in answers] == [503] * 8
    assert not log.exists()


@cases("notify", {"def": raises, "async def": as_async(raises), "log": None})
async def test_logging_that_raises_harms_nothing(tmp_path, monkeypatch, notify):
    monkeypatch.setattr(logging.getLogger("notify"), "filters", [raises])
    app = create_app(notify, log=tmp_path, outbox=":memory:")  # a folder, and so no log
    assert [(await post(app)).status_code for _ in range(3)] == [202] * 3
    assert await health(app) == counts(pending=3, failed=3)


@pytest.mark.parametrize("kind", ["def", "log"])
async def test_a_thread_that_cannot_be_had_is_asked_for_again(log, sent, monkeypatch, kind):
    """As when the limit of processes is reached: for the outbox, and then for the notifier."""
    start, asked = threading.Thread.start, []

    def fails_three_times_of_four(thread):
        if thread.name == "notify":
            asked.append(thread)
            if len(asked) % 4:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails_three_times_of_four)
    app = create_app(notifier(kind, sent), log=log, outbox=":memory:")
    with anyio.fail_after(20):
        answer = await post(app)
    assert [n.id for n in sent or read(log)] == [answer.json()["id"]]
    assert len(asked) >= 8


def test_who_waits_for_a_thread_is_answered_once_that_of_another_request_did_the_work(monkeypatch):
    app = create_app(as_async(bool), outbox=":memory:")
    start, permits, started = threading.Thread.start, threading.Semaphore(0), []

    def may_start(thread):
        if thread.name == "notify":
            if not permits.acquire(blocking=False):
                raise RuntimeError("can't start new thread")
            started.append(thread)
        start(thread)

    async def ask_twice():
        first = asyncio.create_task(post(app))
        await asyncio.sleep(0.2)
        permits.release()
        second = asyncio.create_task(drive(app, as_async(bool)))
        await asyncio.sleep(0)  # in which it starts the thread
        started[0].join(15)  # meanwhile no request runs
        await asyncio.wait_for(asyncio.gather(first, second), 15)

    monkeypatch.setattr(threading.Thread, "start", may_start)
    asyncio.run(ask_twice())


def test_a_thread_that_is_about_to_end_takes_what_comes_when_no_other_can_be_had(monkeypatch):
    in_vain, ending, may_end, took_it = [], threading.Event(), threading.Event(), threading.Event()

    class Bell(queue.SimpleQueue):
        def get(self, timeout):
            if may_end.is_set():
                took_it.set()
            try:
                return super().get(timeout=timeout)
            except queue.Empty:
                in_vain.append(self)
                if len(in_vain) > 1:  # the first time it deletes what is delivered
                    ending.set()
                    may_end.wait(15)
                raise

    def refuses(thread):
        raise RuntimeError("can't start new thread")

    async def ask_twice():
        await post(app)
        assert await anyio.to_thread.run_sync(ending.wait, 15)
        monkeypatch.setattr(threading.Thread, "start", refuses)
        second = asyncio.create_task(drive(app, as_async(bool)))
        await asyncio.sleep(0)  # in which it queues; it would have the thread woken two turns later
        may_end.set()
        took_it.wait(2)  # or else it has ended; meanwhile no request runs
        await asyncio.wait_for(second, 15)

    monkeypatch.setattr(queue, "SimpleQueue", Bell)
    app = create_app(as_async(bool), outbox=":memory:")
    asyncio.run(ask_twice())


async def test_no_more_threads_are_woken_than_there_may_be_however_long_they_are_busy(monkeypatch):
    bells, gate = [], Gate()

    class Bell(queue.SimpleQueue):
        def __init__(self):
            super().__init__()
            bells.append(self)

    monkeypatch.setattr(queue, "SimpleQueue", Bell)
    app = create_app(gate, outbox=":memory:", concurrency=2)
    async with lifespan(app), anyio.create_task_group() as tasks:
        for number in range(1, 21):
            tasks.start_soon(post, app)
            await settled(app, pending=number)
        assert max(bell.qsize() for bell in bells) <= 2
        gate.open()


@pytest.mark.parametrize("busy", [False, True], ids=["", "though another is busy"])
async def test_a_thread_that_cannot_be_had_is_asked_for_again_when_its_caller_is_gone(monkeypatch, busy):
    start, refused, refusing = threading.Thread.start, [], False

    def may_start(thread):
        if thread.name == "notify" and refusing:
            refused.append(thread)
            raise MemoryError if busy else RuntimeError("can't start new thread")
        start(thread)

    async def send(message):
        nonlocal refusing
        refusing = message["type"] == "http.response.body"

    monkeypatch.setattr(threading.Thread, "start", may_start)
    gate = Gate()
    async with lifespan(create_app(gate, outbox=":memory:")) as app, anyio.create_task_group() as tasks:
        if busy:
            tasks.start_soon(post, app)
            await soon(lambda: gate.came)
        async with anyio.create_task_group() as caller:
            caller.start_soon(drive, app, send)
            await soon(lambda: refused)
            caller.cancel_scope.cancel()
        refusing = False
        await soon(lambda: len(gate.came) == 1 + busy, within=10)  # the gate holds a thread for longer
        gate.open()


@pytest.mark.parametrize("max_pending", [2, 1000], ids=["full", ""])
async def test_without_a_lifespan_the_next_traffic_retries_and_so_it_heals(log, outbox, max_pending):
    log.mkdir()
    app = create_app(log=log, outbox=outbox, max_pending=max_pending)
    answers = [await post(app) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [202, 202, 503 if max_pending == 2 else 202]
    first = answers[0].json()["id"]
    log.rmdir()

    async def retried():
        return (await post(app)).status_code == 202 and first in ids(log)

    await soon(retried)
    assert [n.id for n in read(log)].count(first) == 1


WHOLE = A_LINE.format(id="5f0b").encode() + b"\n"
TORN = {"half a line": WHOLE[:-3], "one byte": b"2", "2 MB": bytes(2_000_000), "half a character": "é".encode()[:1]}


@cases("tail", TORN)
@cases("head", {"": b"", "after a whole line": WHOLE})
async def test_a_torn_last_line_is_never_glued_to_the_next(log, head, tail):
    log.write_bytes(head + tail)
    answers = [(await post(create_app(log=log, outbox=":memory:"))).json()["id"] for _ in range(2)]
    assert log.read_bytes().startswith(head)
    *lines, end = log.read_bytes().removeprefix(head).removeprefix(tail + b"\n").decode().split("\n")
    assert [_parse(line).id for line in lines] == answers
    assert end == ""


def rewritten(name, change):
    """A damage that changes the bytes of one of the outbox's files."""

    def damage(outbox):
        path = outbox / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def inverted(start, end):
    return rewritten("outbox.db-wal", lambda data: data[:start] + bytes(255 - x for x in data[start:end]) + data[end:])


def a_file(outbox):
    shutil.rmtree(outbox)
    outbox.write_text("mine")


cut_in_half = rewritten("outbox.db", lambda data: data[: len(data) // 2])


def cut_in_half_alone(outbox):
    with closing(sqlite3.connect(outbox / "outbox.db")) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert not (outbox / "outbox.db-wal").exists()
    cut_in_half(outbox)


def changed(sql):
    def damage(outbox):
        with closing(sqlite3.connect(outbox / "outbox.db")) as db:
            db.execute(sql)

    return damage


def anothers(outbox):
    for path in outbox.glob("outbox.db*"):
        path.unlink()
    with closing(sqlite3.connect(outbox / "outbox.db")) as db:
        db.execute("CREATE TABLE pending (mine)")


DAMAGES = {
    "a file": a_file,
    "under a file": lambda outbox: a_file(outbox.parent),
    "garbage": rewritten("outbox.db", lambda data: b"garbage " * 4096),
    "one byte of garbage": rewritten("outbox.db", lambda data: b"x"),
    "cut in half": cut_in_half,
    "cut in half with no log beside it": cut_in_half_alone,
    "emptied beside its log": rewritten("outbox.db", lambda data: b""),
    "scribbled over": rewritten("outbox.db", lambda data: data[:100] + b"\xaa" * (len(data) - 100)),
    "another program's database": anothers,
    "a table that is gone": changed("DROP TABLE keys"),
    "another column": changed("ALTER TABLE pending RENAME COLUMN line TO text"),
    "its log's first byte": inverted(0, 1),
    "its log's page size": inverted(8, 12),
    "its log's salt": inverted(16, 24),
    "its log's header zeroed": rewritten("outbox.db-wal", lambda data: bytes(32) + data[32:]),
}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file but the -shm, an index that whoever opens a database after a crash makes anew."""
    paths = [path for path in folder.rglob("*") if not path.name.endswith("-shm")]
    return {str(path): path.read_bytes() if path.is_file() else None for path in paths}


@cases("damage", DAMAGES)
async def test_a_damaged_outbox_is_refused_at_start_or_with_503_and_not_touched(dead, damage, tmp_path, log, warned):
    outbox = tmp_path / "deep" / "outbox"
    shutil.copytree(dead.outbox, outbox)
    damage(outbox)
    before = contents(tmp_path)
    with pytest.raises(Exception, match=rf"(?s){re.escape(str(outbox))}.* mend it"):
        async with lifespan(create_app(log=log, outbox=outbox)):
            pass
    assert contents(tmp_path) == before
    async with client(create_app(log=log, outbox=outbox)) as http:
        [*_, response], answer = [await http.post(PATH) for _ in range(9)], await http.get("/health")
    refusal(response, 503)
    assert int(response.headers["retry-after"]) > 0
    assert (answer.status_code, answer.json()["pending"]) == (503, 0)
    assert int(answer.headers["retry-after"]) > 0
    assert answer.json()["status"] != "ok"
    assert contents(tmp_path) == before
    assert 1 <= sum(str(outbox) in warning for warning in warned) <= 3


async def test_a_byte_that_is_no_utf8_harms_no_other_notification_that_was_left(left, log, outbox):
    with closing(sqlite3.connect(outbox / "outbox.db")) as db, db:
        db.execute("UPDATE pending SET line = CAST(CAST(line AS BLOB) || x'ff' AS TEXT) WHERE seq = 2")
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await soon(lambda: len(ids(log)) == 3)
        await settled(app)
    assert sorted((n.id, n.message) for n in read(log)) == sorted(zip(left, ["one", "two\xff", "three"], strict=True))


async def test_what_the_look_for_the_dead_cannot_do_is_told(left, log, outbox, warned):
    async with lifespan(create_app(log=log, outbox=outbox)) as app:
        await settled(app)
        changed("DROP TABLE keys")(outbox)
        await soon(lambda: any("has to wait" in warning and "no such table" in warning for warning in warned))


async def test_health_tells_of_an_outbox_whose_path_is_not_unicode(tmp_path):
    (tmp_path / "file").touch()
    async with client(create_app(outbox=tmp_path / "file" / "\udcff")) as http:
        answer = await http.get("/health")
    assert answer.status_code == 503
    assert r"\udcff" in answer.json()["status"]


# ---------------------------------------------------------------------------------------------- live server


@pytest.fixture(scope="module", params=["h11", "httptools"])
def server(request, tmp_path_factory):
    with serve(tmp_path_factory.mktemp(request.param), "--http", request.param) as server:
        yield server


@pytest.fixture
def live(server):
    """A real server; after each test its log has exactly one line for each 202, and its output no traceback."""
    yield server
    eventually(lambda: sorted(ids(server.log)) == sorted(server.accepted))
    assert len(read(server.log)) == len(server.accepted)
    assert "Traceback" not in server.output(), server.output()
    assert "Exception" not in server.output(), server.output()


def request(path=TARGET, *headers: bytes, body=b"", method=b"POST", length=True) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (method, path), b"Host: test", b"Connection: close", *headers]
    if body and length:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join([*lines, b"", body])


def in_chunks(body: bytes, size=1000) -> bytes:
    parts = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])


MEDIA, CHUNKED = b"Content-Type: application/json", b"Transfer-Encoding: chunked"
BAD_TARGETS = [
    b"user@example.com%0A", b"user@example.com/%0a", b"user%00@example.com", b"us%FFer@example.com",
    b"us%C0%AFer@example.com", b"user@example.com%0", b"user@example.com%",
]  # fmt: skip
RAW = {  # some are refused by the server itself, with a 400 of its own
    "plain": ({202}, request()),
    "HTTP/1.0": ({202}, b"POST %s HTTP/1.0\r\nHost: test\r\n\r\n" % TARGET),
    "percent-encoded": ({202}, request(b"/send-notification/%75ser%2Btag%40example.com")),
    "encoded slash": ({202}, request(b"/send-notification/a%2Fb@example.com")),
    "query": ({202}, request(b"/send-notification/user@example.com?message=forged%0A")),
    "Authorization not ASCII": ({202}, request(TARGET, b"Authorization: Bearer \xff\xfe")),
    "chunked without a length": ({202}, request(TARGET, MEDIA, CHUNKED, body=in_chunks(BODY, 3), length=False)),
    "chunked and empty": ({202}, request(TARGET, CHUNKED, body=in_chunks(b""), length=False)),
    "chunked over 64 KiB": ({413}, request(TARGET, MEDIA, CHUNKED, body=in_chunks(b" " * 65537), length=False)),
    "10 MB promised": ({413}, request(TARGET, MEDIA, b"Content-Length: 10000000", body=b" " * 65537, length=False)),
    "bad chunk": ({400}, request(TARGET, MEDIA, CHUNKED, body=b"zz\r\n", length=False)),
    "percent and no digits": ({202}, request(b"/send-notification/%zz%4@example.com")),
    "raw bytes": ({400, 422}, request("/send-notification/üser@example.com".encode())),
    "raw NUL": ({400, 422}, request(b"/send-notification/user\0@example.com")),
    "dots": ({422}, request(b"/send-notification/../health")),
    "unheard-of method": ({400, 405}, request(method=b"BREW")),
    "no HTTP": ({400}, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"),
    **{shown(target): ({422}, request(b"/send-notification/" + target)) for target in BAD_TARGETS},
}


@cases("statuses, data", RAW)
def test_each_raw_request_gets_the_status_that_it_deserves(live, statuses, data):
    answer = live.talk(data)
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ")[1])
    assert status in statuses
    if status != 400:
        assert list(json.loads(body)) == (["id", "message"] if status == 202 else ["detail"])


def on_one_connection(port: int, requests) -> list[int]:
    """The statuses of these requests' answers; fails if the server closes the connection meanwhile."""
    statuses = []
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.connect()
        opened = connection.sock
        for method, path, headers, body in requests:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            response.read()
            statuses.append(response.status)
            assert connection.sock is opened
    return statuses


def test_errors_leave_the_connection_to_the_next_request(live):
    refused = [
        ("POST", "/send-notification/user", {}, None),
        ("POST", PATH, JSON, b"{"),
        ("POST", PATH, {}, b"{}"),
        ("POST", "/nothing", {}, None),
        ("GET", PATH, {}, None),
    ]
    assert on_one_connection(live.port, refused * 2) == [422, 400, 415, 404, 405] * 2


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("chunked", [False, True], ids=["with a length", "chunked"])
def test_a_client_that_leaves_in_mid_body_is_no_error_and_notifies_nobody(live, reset, chunked):
    part = in_chunks(BODY)[:-5] if chunked else b'{"message": '
    data = request(TARGET, MEDIA, CHUNKED if chunked else b"Content-Length: 100", body=part, length=False)
    before = live.output()
    for _ in range(5):
        with socket.create_connection(("127.0.0.1", live.port), timeout=10) as sock:
            sock.sendall(data)
            if reset:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    for _ in range(5):
        live.post()
    assert live.output() == before


@pytest.mark.parametrize("seed", range(3))
def test_whatever_bytes_arrive_it_is_a_202_with_one_line_or_a_4xx_with_none(live, seed):
    """And never a 5xx, however a request is mutated."""
    chance = random.Random(seed)
    hostile = rb"% %0A %0D%0A %00 %zz %C3%A9 / // .. @ \ \ud800 { } : , null NaN".split()
    hostile += [b" ", b"\t", b"\0", b"\xff", b"\xe2\x80\xa8", b'"', b'"message"', b"[" * 1000, b"1" * 5000]

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
        body = mutate(BODY)
        headers = [header.translate(None, b"\r\n") for header in (key, media, bearer) if chance.random() < 0.8]
        answer = live.talk(request(target.translate(None, b"\r\n") or b"/", *headers, body=body))
        [status] = re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer) or [b"none"]
        statuses[status.decode()] += 1
    assert statuses.keys() <= {"202", "400", "404", "405", "413", "415", "422"}, statuses
    assert statuses["202"] > 5
    assert statuses["422"] > 5


def test_a_log_that_hangs_for_ever_holds_up_no_answer(tmp_path):
    """A FIFO that nobody reads; when somebody does, the lines come with no new request."""
    os.mkfifo(tmp_path / "log.txt")
    with serve(tmp_path) as server:
        for _ in range(20):
            server.post()
        server.settled(pending=20, failed=20)
        reader = os.open(tmp_path / "log.txt", os.O_RDONLY | os.O_NONBLOCK)
        lines = bytearray()

        def all_there():
            with suppress(BlockingIOError):
                lines.extend(os.read(reader, 65536))
            return lines.count(b"\n") >= 20

        eventually(all_there)
        server.settled()
        os.close(reader)
    assert sorted(_parse(line).id for line in lines.decode().splitlines()) == sorted(server.accepted)


OWN_NOTIFIER = """
import fcntl
from service import create_app

def note(file, notification):
    with open(file, "a") as file:
        file.write(f"{notification.accepted_at} {notification.id}\\n")

def notify(notification):
    note("started.txt", notification)
    if notification.message == "bad":
        raise RuntimeError("the mail is down")
    with open("gate", "a") as gate:
        fcntl.flock(gate, fcntl.LOCK_SH)  # waits while the test holds it shut
    note("sent.txt", notification)

app = create_app(notify, outbox="outbox")
"""


@contextmanager
def gate_shut(folder):
    """Hold up every OWN_NOTIFIER that runs in the folder."""
    with open(folder / "gate", "a") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield


def test_answers_on_one_connection_wait_for_no_notifier_and_survive_one_that_raises(tmp_path):
    (tmp_path / "own.py").write_text(OWN_NOTIFIER)
    one, two = [("POST", PATH, JSON, json.dumps({"message": message})) for message in ("good", "bad")]
    with serve(tmp_path, app="own:app") as server:
        with gate_shut(tmp_path):
            assert on_one_connection(server.port, [one, two] * 3) == [202] * 6
            server.settled(pending=6, failed=3)
            assert ids(tmp_path / "sent.txt") == []
        eventually(lambda: len(ids(tmp_path / "sent.txt")) == 3)
        assert "the mail is down" in server.output()


# ---------------------------------------------------------------------------------------------------- crash

STOPS = {
    "kill -9": ([], [signal.SIGKILL]),
    "Ctrl-C twice": ([], [signal.SIGINT, signal.SIGINT]),
    "a graceful timeout": (["--timeout-graceful-shutdown", "0"], [signal.SIGTERM]),
}


@together(**STOPS)
def test_what_was_acknowledged_is_written_exactly_once_after(folder, options, signals):
    with serve(folder, *options, delay=AN_HOUR, quiet=False) as server:
        for _ in range(5):
            server.post()
        server.post(headers=KEY)
        assert ids(server.log) == []
        for number in signals:
            server.process.send_signal(number)
            eventually(lambda: server.process.poll() is not None or "Shutting down" in server.output())
        server.process.wait(20)
    with serve(folder) as restarted:
        eventually(lambda: len(ids(restarted.log)) >= 6)
        replay = restarted.post(headers=KEY)
        assert replay.headers["idempotent-replayed"] == "true"
        assert replay.json()["id"] == server.accepted[-1]
        restarted.settled()
    assert sorted(n.id for n in read(restarted.log)) == sorted(server.accepted)


@together()
def test_a_notifier_of_ones_own_is_called_with_the_same_id_after_a_crash(folder):
    (folder / "own.py").write_text(OWN_NOTIFIER)
    with gate_shut(folder), serve(folder, app="own:app") as server:
        server.post()
        eventually(lambda: ids(folder / "started.txt") == server.accepted)
        server.kill()
    with serve(folder, app="own:app") as restarted:
        eventually(lambda: ids(folder / "sent.txt"))
        restarted.settled()
    assert ids(folder / "sent.txt") == server.accepted
    assert ids(folder / "started.txt") == server.accepted * 2


@together()
def test_a_living_server_delivers_what_a_killed_one_left(folder):
    with serve(folder, delay=AN_HOUR) as first, serve(folder) as second:
        for _ in range(3):
            first.post()
            second.post()
        eventually(lambda: len(ids(second.log)) == 3)
        assert sorted(ids(second.log)) == sorted(second.accepted)
        first.kill()
        eventually(lambda: len(ids(second.log)) >= 6, within=10)
        second.settled()
    assert sorted(n.id for n in read(second.log)) == sorted(first.accepted + second.accepted)


def test_killed_again_and_again_under_load_every_line_is_there_once(tmp_path):
    with Clients(sizes=(10, 9000)) as clients:
        for more in (100, 200):
            with serve(tmp_path) as clients.server:
                clients.more(more)
    with serve(tmp_path) as server:
        server.post()
        eventually(lambda: {*clients.kept, *server.accepted} <= set(ids(server.log)))
        server.settled()
    lines = read(server.log)
    assert clients.kept.items() <= {(n.id, n.message) for n in lines}
    assert len({n.id for n in lines}) == len(lines)


# --------------------------------------------------------------------------------------------------- README

README = HERE / "README.md"


def test_every_python_block_of_the_readme_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.DOTALL | re.MULTILINE)

    def run(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "test_block.py").write_text(blocks[number])
        how = ["-m", "pytest", "-p", "no:cacheprovider"] if "def test_" in blocks[number] else []
        command = [sys.executable, "-W", "error", *how, "test_block.py"]
        return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60)

    assert blocks
    with ThreadPoolExecutor() as threads:
        for block, ended in zip(blocks, threads.map(run, range(len(blocks))), strict=True):
            assert ended.returncode == 0, f"{block}\n{ended.stdout}{ended.stderr}"


def test_the_readmes_first_page_shows_what_really_happens(tmp_path):
    """One command to run, one curl, the answer it gives, the line that appears, and one command to test."""
    page = "\n".join(README.read_text().split("\n")[:30])
    assert "uvicorn service:app" in page
    assert "pytest" in page
    [path] = re.findall(r"^curl -X POST http://127\.0\.0\.1:8000(/send-notification/\S+)$", page, re.MULTILINE)
    [answer] = re.findall(r'\{"id".*\}', page)
    [line] = [found for found in map(LINE.search, page.splitlines()) if found]
    with serve(tmp_path) as server:
        response = server.http.post(path)
        assert response.status_code == 202
        assert response.json() | {"id": ""} == json.loads(answer) | {"id": ""}
        eventually(lambda: ids(server.log))
    [written] = read(server.log)
    assert (written.email, written.message) == (line[3], line[4])


def test_the_readmes_query_shows_what_is_kept(left, outbox):
    [query] = re.findall(r'^sqlite3 outbox/outbox.db "(.+)"$', README.read_text(), re.MULTILINE)
    with closing(sqlite3.connect(outbox / "outbox.db")) as db:
        assert [_parse(line).id for [line] in db.execute(query)] == left


def test_the_readme_names_every_setting_and_its_default_and_no_other():
    parameters = inspect.signature(create_app).parameters
    variables = {name: f"`NOTIFY_{name.upper()}`" for name in parameters} | {"notify": ""}
    rows = re.findall(r"^\| `(\w+)` \| (\S*) ?\| `(\S+)` \|", README.read_text(), re.MULTILINE)
    assert rows == [(name, variables[name], repr(parameter.default)) for name, parameter in parameters.items()]


def test_each_promise_of_the_readme_has_its_tests():
    sources = [(HERE / path).read_text() for path in ("test_service.py", ".ci/test_wide.py")]
    tests = [name for source in sources for name in re.findall(r"^(?:async )?def (test_\w+)", source, re.MULTILINE)]
    promises = README.read_text().partition("| promise |")[2].partition("\n\n")[0].splitlines()[2:]
    choices = [re.fullmatch(r'\| .+ \| `"(.+)"` \|', promise)[1] for promise in promises]
    assert len(choices) == 7
    for word in " or ".join(choices).split(" or "):
        assert any(word in test for test in tests), word
