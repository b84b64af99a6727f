"""Answer first, notify after: one Starlette module, and 202 means kept.

The life of a notification:

1. ``POST /send-notification/{email}`` is checked, and becomes one line of text.
2. The outbox, a SQLite database, commits the line together with all that came at the same moment.
3. The client has its 202 and an id. Nothing slow has happened yet.
4. The answer's BackgroundTask hands the line to the notifier: by default, a thread that appends it to a file.
5. What is delivered leaves the outbox. What failed, or a dead process left there, is the relay's to deliver.

Promised: the answer never waits for the notifier. After a 202 the default notifier writes the line exactly once, and
a ``notify`` of one's own is called at least once, always with the same id, whatever is killed, full or broken in
between. No other answer leaves a notification behind.

Run it with ``uvicorn service:app``, or embed ``create_app()``, which lists the settings. Each has an environment
variable too: ``NOTIFY_`` and its name in capitals.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import math
import os
import random
import re
import secrets
import sqlite3
import stat
import threading
import time
import weakref
from asyncio import current_task, get_running_loop
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from traceback import format_exception_only
from typing import Any, Generic, TypeVar

import anyio
import anyio.to_thread
from anyio.abc import TaskGroup
from anyio.lowlevel import current_token
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

log = logging.getLogger("notify")
T = TypeVar("T")
_Path = str | os.PathLike[str]

# ---------------------------------------------------------------------------------------------------- settings


def _is_path(value: object) -> bool:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else b""
    return isinstance(path, str) and path != "" and "\0" not in path


_SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}

# Of each: how it is read from a variable, whether it makes sense, and the rule.
_SETTINGS: dict[str, tuple[Callable[[str], Any], Callable[[Any], object], str]] = {
    "log": (str, _is_path, "the path of a file"),
    "outbox": (str, _is_path, "the path of a folder"),
    "delay": (float, lambda number: type(number) in (int, float) and 0 <= number < math.inf, "seconds, 0 or more"),
    "concurrency": (int, lambda number: type(number) is int and number >= 1, "a whole number of at least 1"),
    "max_pending": (int, lambda number: type(number) is int and number >= 1, "a whole number of at least 1"),
    "token": (
        str,
        lambda text: text is None or (type(text) is str and re.fullmatch("[!-~]+", text)),
        "printable ASCII with no space in it",
    ),
    "fsync": (lambda text: _SWITCH[text.lower()], lambda value: type(value) is bool, "true or false"),
}


def _check(name: str, label: str, value: object) -> None:
    _, makes_sense, rule = _SETTINGS[name]
    if not makes_sense(value):
        raise ValueError(f"{label} must be {rule}, not {value!r}")


def _environment() -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, (read, *_) in _SETTINGS.items():
        label = f"NOTIFY_{name.upper()}"
        if (value := os.environ.get(label)) is not None:
            settings[name] = value
            with suppress(ValueError, KeyError):
                settings[name] = read(value)
            _check(name, label, settings[name])
    return settings


# ------------------------------------------------------------------------------------------------ notification


@dataclass(frozen=True, slots=True)
class Notification:
    """What a notifier is called with.

    ``id`` is unique, and the same at every attempt. ``message`` is the text exactly as it was sent.
    ``accepted_at`` is the time in UTC, in ISO 8601 with milliseconds.
    """

    id: str
    email: str
    message: str
    accepted_at: str


def _write_line(accepted_at: str, identifier: str, email: str, message: str) -> str:
    """One notification is one line: what is not printable is escaped, so that no message can forge another's."""
    if "\\" in message or not message.isprintable():
        message = "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in message)
    return f"{accepted_at} {identifier} notification for {email}: {message}"


def _read_line(line: str) -> Notification:
    accepted_at, identifier, _, _, rest = line.split(" ", 4)
    email, _, message = rest.partition(": ")
    message = message.encode("latin-1", "backslashreplace").decode("unicode_escape")
    return Notification(identifier, email, message, accepted_at)


_ID = slice(25, 57)  # of a line: after 24 characters of time and a space
_MAX_LINE = 128 * 1024  # bytes: 10,000 characters, of at most 10 each when escaped, and what stands before them

# --------------------------------------------------------------------------------------------------- endpoints

# https://html.spec.whatwg.org/multipage/input.html#valid-e-mail-address
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_EMAIL = rf"[a-zA-Z0-9.!#$%&'*+\/=?^_`{{|}}~-]{{1,64}}@{_LABEL}(?:\.{_LABEL})*"
_is_email = re.compile(_EMAIL).fullmatch
_is_key = re.compile("[ -~]{1,255}").fullmatch
_has_surrogate = re.compile("[\ud800-\udfff]").search

_MAX_BODY = 64 * 1024  # bytes
_DEFAULT_MESSAGE = "some notification"
_RETRY = {"Retry-After": "1"}  # seconds
_DETAILS = {
    404: "Nothing is here: see /openapi.json for what there is.",
    405: "Use one of the methods that the Allow header names.",
    500: "The service failed: ask whoever runs it, as its log says why.",
}


class _Api:
    def __init__(self, outbox: _Outbox, relay: _Relay, token: str | None) -> None:
        self._outbox = outbox
        self._relay = relay
        self._token = None if token is None else token.encode()
        self._catch_up = BackgroundTask(relay.catch_up)

    async def send_notification(self, request: Request) -> Response:
        if self._token is not None:
            self._authorize(request, self._token)
        email = request.path_params["email"].removesuffix("/")
        if not email:
            raise HTTPException(404)
        if len(email) > 254 or not _is_email(email):
            raise HTTPException(422, "Name one whole e-mail address in the path, such as user@example.com.")
        key = request.headers.get("idempotency-key")
        if key is not None and not _is_key(key):
            raise HTTPException(400, "Make Idempotency-Key 1 to 255 printable ASCII characters.")
        entry = await self._outbox.accept(email, await _read_message(request), key)
        content = {"id": entry.id, "message": "Notification sent in the background"}
        if entry.replayed:
            return _Answer(content, 202, {"Idempotent-Replayed": "true"}, background=self._catch_up)
        return _Answer(content, 202, background=BackgroundTask(self._relay.deliver, entry))

    def _authorize(self, request: Request, token: bytes) -> None:
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given.strip().encode("latin-1"), token):
            raise HTTPException(401, "Send the header Authorization: Bearer <token>.", {"WWW-Authenticate": "Bearer"})

    async def health(self, request: Request) -> Response:
        pending, failed, error = await self._outbox.health()
        status = f"the outbox cannot be written: {error}" if error else "ok"
        content = {"status": status, "pending": pending, "failed": failed}
        return _Answer(content, 503 if error else 200, _RETRY if error else None, background=self._catch_up)

    async def refuse(self, request: Request, exc: Exception) -> Response:
        """The answer to what cannot be kept; the framework logs what is no HTTPException."""
        status, headers = (exc.status_code, exc.headers) if isinstance(exc, HTTPException) else (500, None)
        detail = _DETAILS.get(status) or getattr(exc, "detail", "")
        return _Answer({"detail": detail}, status, headers, background=self._catch_up)

    async def openapi(self, request: Request) -> Response:
        return _Answer({**_OPENAPI, "servers": [{"url": request.scope.get("root_path") or "/"}]})


class _Answer(JSONResponse):
    """Starlette's own, with one encoder for all answers."""

    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

    def render(self, content: Any) -> bytes:
        return self.encode(content).encode()


async def _read_message(request: Request) -> str:
    body = await _read_body(request)
    if not body:
        return _DEFAULT_MESSAGE
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Send the body as Content-Type: application/json, or send none.")
    try:
        content = _read_json(body.decode())
    except (ValueError, RecursionError):
        raise HTTPException(400, "Send a body that is JSON in UTF-8.") from None
    if not isinstance(content, dict) or not content.keys() <= {"message"}:
        raise HTTPException(422, "Send a JSON object with no other key than message.")
    message = content.get("message", _DEFAULT_MESSAGE)
    if not isinstance(message, str) or len(message) > 10_000 or _has_surrogate(message):
        raise HTTPException(422, "Make message a string of at most 10,000 characters, with no lone surrogate.")
    return message


async def _read_body(request: Request) -> bytes:
    body, more = bytearray(), True
    while more:
        event = await request.receive()
        if event["type"] == "http.disconnect":
            raise ClientDisconnect
        body += event.get("body", b"")
        if len(body) > _MAX_BODY:
            raise HTTPException(413, "Send a body of at most 64 KiB.")
        more = event.get("more_body", False)
    return bytes(body)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Python's own takes NaN, and takes an integer of more than 4,300 digits for malformed.
_read_json = json.JSONDecoder(parse_int=float, parse_constant=_refuse_constant).decode


async def _ignore(request: Request, exc: Exception) -> Response:
    return Response(status_code=400)  # for nobody: the client went away in the middle of its body


class _Route(Route):
    """Matches the whole path, but for one slash at its end: Starlette's own lets a last newline fall off."""

    def __init__(self, path: str, endpoint: Callable[[Request], Any], method: str) -> None:
        super().__init__(path, endpoint, methods=[method])
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"/?\Z", re.DOTALL)

        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            response = await endpoint(Request(scope, receive, send))
            await response(scope, receive, send)

        self.app = app  # Starlette's own looks for exception handlers, as the app does already


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _answer(description: str, schema: dict[str, Any] | None = None, *headers: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": description, "headers": {name: {"schema": _STRING} for name in headers}}
    return answer | ({"content": {"application/json": {"schema": schema}}} if schema else {})


_STRING = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_HEALTH = _object(status=_STRING, pending=_COUNT, failed=_COUNT)
_PROBLEM = _object(detail=_STRING | {"description": "What to do, in one sentence."})
_ANYWHERE = {
    "404": _answer("No such path.", _PROBLEM),
    "405": _answer("No such method here.", _PROBLEM, "Allow"),
    "500": _answer("The service failed.", _PROBLEM),
}
_BODY = _object(message=_STRING | {"maxLength": 10_000, "default": _DEFAULT_MESSAGE}) | {"required": []}
_SEND = {
    "operationId": "sendNotification",
    "summary": "Keep a notification, answer, and deliver it afterwards.",
    "security": [{}, {"token": []}],
    "parameters": [
        {"name": "email", "in": "path", "required": True}
        | {"schema": _STRING | {"pattern": f"^{_EMAIL}$", "maxLength": 254}},
        {"name": "Idempotency-Key", "in": "header", "description": "What comes again in 24 hours notifies once."}
        | {"schema": _STRING | {"pattern": "^[ -~]+$", "minLength": 1, "maxLength": 255}},
    ],
    "requestBody": {"content": {"application/json": {"schema": _BODY}}},
    "responses": {
        "202": _answer("It is kept.", _object(id=_STRING, message=_STRING), "Idempotent-Replayed"),
        "400": _answer("The body is not JSON, or Idempotency-Key is not printable ASCII.", _PROBLEM),
        "401": _answer("The token is missing or wrong.", _PROBLEM, "WWW-Authenticate"),
        "413": _answer("The body is over 64 KiB.", _PROBLEM),
        "415": _answer("The body is not application/json.", _PROBLEM),
        "422": _answer("The address or the body is not valid, or the key came with other content.", _PROBLEM),
        "503": _answer("Too many are pending, or the outbox cannot be written.", _PROBLEM, "Retry-After"),
        **_ANYWHERE,
    },
}
_OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "Notify",
        "version": "1.0.0",
        "description": "Answers first and notifies after: 202 means kept.",
    },
    "paths": {
        "/send-notification/{email}": {"post": _SEND},
        "/health": {
            "get": {
                "operationId": "getHealth",
                "summary": "Whether notifications can be kept, and how many wait.",
                "responses": {
                    "200": _answer("They can.", _HEALTH),
                    "503": _answer("The outbox cannot be written.", _HEALTH, "Retry-After"),
                    **_ANYWHERE,
                },
            },
            "head": {
                "operationId": "headHealth",
                "summary": "Whether notifications can be kept.",
                "responses": {"200": _answer("They can."), "503": _answer("They cannot."), "500": _answer("Failed.")},
            },
        },
        "/openapi.json": {
            "get": {
                "operationId": "getDescription",
                "summary": "This description.",
                "responses": {"200": _answer("OpenAPI 3.1.", {"type": "object"}), **_ANYWHERE},
            }
        },
    },
    "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
}

# ------------------------------------------------------------------------------------------------ group commit
#
# Goals: the event loop waits for no disk and no notifier. No hop between threads, no commit and no wake-up for each
# notification, but one for all that gathered. Nothing belongs to one event loop, as one app may serve several, and
# an app that is no longer used leaves nothing behind.
#
# Plan: `run` adds the work to a list, and waits for an event that it shares with all who wait on the same loop. When
# the loop has done its turn, a thread takes the list, handles it, and has each loop set its event. What comes
# meanwhile gathers for the next round, so that rounds grow with the load. The thread starts with the first work, and
# ends when there has been none for a while. Work is handled even if the one who waited for it was cancelled.

_IDLE = 5.0  # seconds
_LINGER = 0.02  # seconds that work which nobody waits for may wait for company


class _Group(Generic[T]):
    """One thread that takes all the work at once, or up to so many of which each takes one."""

    def __init__(self, handle: Callable[[list[T]], None], threads: int | None = None) -> None:
        self._handle = handle
        self._takes_all = threads is None
        self._max_threads = threads or 1
        self._works: deque[tuple[T, Any, anyio.Event]] = deque()
        self._later: list[T] = []
        self._events: dict[Any, anyio.Event] = {}
        self._lock = threading.RLock()  # as the collection of a dropped task may put while it is held
        self._changed = threading.Condition(self._lock)
        self._threads = self._idle = 0
        self._dozing = False

    async def run(self, work: T) -> None:
        """Return when the work was handled."""
        loop = _current_loop()
        with self._lock:
            event = self._events.get(loop)
            if event is None:
                event = anyio.Event()
                if self._takes_all and self._threads:
                    self._events[loop] = event
                (getattr(loop, "call_soon", None) or loop.run_sync_soon)(self._wake)
            self._works.append((work, loop, event))
        await event.wait()

    def put(self, works: list[T]) -> None:
        """Have the works handled soon; from any thread."""
        with self._lock:
            self._later += works
        if self._dozing or not self._threads:
            self._wake()

    def _wake(self) -> None:
        with self._lock:
            self._changed.notify()
            if self._threads < self._max_threads and (not self._threads or len(self._works) > self._idle):
                threading.Thread(target=self._work, name="notify", daemon=True).start()
                self._threads += 1

    def _work(self) -> None:
        while taken := self._take():
            works, waiting = taken
            try:
                self._handle(works)
            except Exception:
                log.exception("this should not happen, and is a bug of the service")
            for loop, event in waiting:
                with suppress(RuntimeError):  # the loop is closed, and nobody waits
                    _call_soon(loop, event.set)

    def _take(self) -> tuple[list[T], set[tuple[Any, anyio.Event]]] | None:
        with self._lock:
            self._idle += 1
            if not self._changed.wait_for(lambda: self._works, _LINGER) and not self._later:
                self._dozing = True
                self._changed.wait_for(lambda: self._works or self._later, _IDLE)
                self._dozing = False
            self._idle -= 1
            if not self._works and not self._later:
                self._threads -= 1
                return None
            most = len(self._works) if self._takes_all else min(1, len(self._works))
            taken = [self._works.popleft() for _ in range(most)]
            works, self._later, self._events = [work for work, *_ in taken] + self._later, [], {}
            return works, {(loop, event) for _, loop, event in taken}


def _current_loop() -> Any:
    try:
        return get_running_loop()
    except RuntimeError:
        return current_token().native_token


def _call_soon(loop: Any, function: Callable[[], None]) -> None:
    # AnyIO's own way in from another thread waits until the loop has done it; asyncio's and trio's do not.
    (getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon)(function)


# ------------------------------------------------------------------------------------------------------ outbox

_SCHEMA = """
CREATE TABLE pending (     -- what is accepted and not delivered
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    worker TEXT NOT NULL,  -- whose it is: it holds the lock WORKER.lock
    due REAL,              -- when to try again, on the worker's monotonic clock; NULL: in hand; 1e300: set aside
    since REAL,            -- when it failed first, on that clock
    line TEXT NOT NULL     -- as in the log
);
CREATE INDEX pending_due ON pending (worker, due) WHERE due IS NOT NULL;
CREATE TABLE keys (key TEXT PRIMARY KEY, id TEXT NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX keys_at ON keys (at);
CREATE TABLE probe (padding BLOB);
INSERT INTO probe VALUES (NULL);
"""
_APPLICATION_ID = 0x6E6F7466

# One statement for many rows, as with each the thread gives up the interpreter, and has to get it back.
_INSERT = "INSERT INTO pending (worker, line) SELECT ?, value FROM json_each(?)"
_DELETE = "DELETE FROM pending WHERE worker = ? AND seq IN (SELECT value FROM json_each(?))"
_POSTPONE = """UPDATE pending SET due = value ->> 1, since = value ->> 2 FROM json_each(?2)
    WHERE worker = ?1 AND seq = value ->> 0"""
_NEXT_DUE = "SELECT min(due) FROM pending WHERE worker = ? AND due IS NOT NULL"
_CLAIM = """UPDATE pending SET due = NULL WHERE seq IN
    (SELECT seq FROM pending WHERE worker = ? AND due <= ? ORDER BY due LIMIT ?) RETURNING line, seq, since"""
_COUNTS = "SELECT count(*) FILTER (WHERE due IS NULL OR due < 1e300), count(since) FROM pending WHERE worker = ?"
_IN_HAND = "SELECT 1 FROM pending WHERE worker = ? AND due IS NULL LIMIT 1"
_OWNERS = "SELECT DISTINCT worker FROM pending"
_IDS = "SELECT seq, substr(line, 26, 32) FROM pending WHERE worker = ?"
_ADOPT = """UPDATE pending SET worker = ?, due = 0, since = NULL WHERE seq IN
    (SELECT seq FROM pending WHERE worker = ? LIMIT ?)"""
_FORGET_KEYS = "DELETE FROM keys WHERE at < ?"
_TAKE_KEYS = "INSERT INTO keys SELECT value ->> 0, value ->> 1, value ->> 2, ? FROM json_each(?)"
_WHOSE_KEYS = "SELECT key, id, digest FROM keys WHERE key IN (SELECT value FROM json_each(?))"
_PROBE = "UPDATE probe SET padding = randomblob(16384)"  # needs as much room as a request

_DAY = 24 * 60 * 60.0  # seconds
_NEVER = 1e300  # when what is set aside is due
_BUSY_WAIT = 2.0  # seconds to wait for another worker's commit
_LOCK_WAIT = 10.0  # seconds to wait for another worker's start, or its lines
_ADOPTED_AT_ONCE = 5_000  # as others wait meanwhile
_MAX_WAL = 16 * 1024 * 1024  # bytes


class _OutboxError(Exception):
    """The outbox cannot be used: says which, why and what to do."""


_FAILURES = (_OutboxError, sqlite3.Error, OSError)


@dataclass(slots=True, eq=False)
class _Entry:
    """A notification on its way."""

    line: str
    seq: int = 0  # in the outbox; 0: not yet
    since: float | None = None  # when it failed first, on the monotonic clock
    due: float | None = None  # when to try again; None: it is delivered
    kept: float = 0.0  # when it was committed or claimed
    id: str = ""
    key: str | None = None
    digest: str = ""
    replayed: bool = False
    error: Exception | None = None


class _Outbox:
    """What is accepted and not yet delivered, and the thread that writes it down."""

    def __init__(self, folder: _Path, max_pending: int, fsync: bool) -> None:
        self.database = _Database(None if os.fspath(folder) == ":memory:" else Path(folder).absolute(), fsync)
        self._max_pending = max_pending
        self._writer: _Group[_Entry | tuple[Callable[[], Any], Future[Any]]] = _Group(self._write)
        self._warn = _Warnings(1)
        self._accepted: set[int] = set()  # by this process, and not delivered; the writer's own
        self._settled: list[_Entry] = []  # what became of these is not in the database yet; the writer's own
        self._offered: dict[int, _Entry] = {}  # kept, and in nobody's hands
        self._counts = (0, 0)
        weakref.finalize(self, self.database.close).atexit = False  # as something may be under way then

    async def accept(self, email: str, message: str, key: str | None) -> _Entry:
        """Keep a notification, or raise the HTTPException that says why not."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
        identifier = secrets.token_hex(16)
        entry = _Entry(_write_line(now, identifier, email, message), id=identifier, key=key)
        if key is not None:
            entry.digest = hashlib.sha256(f"{email}\n{message}".encode()).hexdigest()
        await self._writer.run(entry)
        if isinstance(entry.error, HTTPException):
            raise entry.error
        if not entry.seq and not entry.replayed:
            raise HTTPException(503, "The outbox cannot be written: try again later.", _RETRY)
        return entry

    def take(self, entry: _Entry) -> bool:
        """Whether the entry is the caller's to deliver, as it is for the first who asks."""
        return self._offered.pop(entry.seq, None) is not None

    def settle(self, entries: list[_Entry]) -> None:
        """Write down what became of entries that were taken: they are delivered, or due again."""
        self._writer.put(list(entries))

    async def call(self, function: Callable[[], T]) -> T:
        """What the function returns or raises on the writer's thread."""
        future: Future[T] = Future()
        await self._writer.run((function, future))
        return future.result()

    async def health(self) -> tuple[int, int, Exception | None]:
        """How many are pending and have failed, as last known, and why the outbox cannot be written, if so."""
        try:
            await self.call(self._look)
        except Exception as exc:
            return *self._counts, exc
        return *self._counts, None

    def _look(self) -> None:
        pending, failed = self.database.count()
        done = [entry for entry in self._settled if entry.due is None]  # but not deleted yet
        self._counts = pending - len(done), failed - sum(entry.since is not None for entry in done)
        self.database.probe()

    def claim(self, limit: int) -> tuple[list[_Entry], float]:
        """So many entries that are due, and those that no task came for, and when the next is due; for the writer."""
        entries, due = self.database.claim(limit)
        self._offer(entries)
        # For these the request was cancelled, or the host's middleware raised.
        left = [entry for entry in self._offered.copy().values() if entry.kept < time.monotonic() - _TICK]
        return entries + left, due

    def close(self) -> None:
        """Let go of the outbox, unless something is under way, which ends with the process; for the writer."""
        if not self._settled and self.database.is_quiet():
            self.database.close()
            self._accepted.clear()

    def _offer(self, entries: list[_Entry]) -> None:
        now = time.monotonic()
        for entry in entries:
            entry.kept = now
            self._offered[entry.seq] = entry

    def _write(self, works: list[_Entry | tuple[Callable[[], Any], Future[Any]]]) -> None:
        new = [work for work in works if isinstance(work, _Entry) and not work.seq]
        self._settled += [work for work in works if isinstance(work, _Entry) and work.seq]
        self._accepted.difference_update(entry.seq for entry in self._settled if entry.due is None)
        try:
            self.database.write(new, self._settled, self._max_pending - len(self._accepted))
            self._settled = []
        except Exception as exc:  # whatever it is, there is no seq, and so no 202
            for entry in new:
                entry.replayed = False
            self._warn("the outbox cannot be written, and answers are 503: %s", _reason(exc))
        fresh = [entry for entry in new if entry.seq]
        self._accepted.update(entry.seq for entry in fresh)
        self._offer(fresh)
        for work in works:
            if not isinstance(work, _Entry):
                function, future = work
                try:
                    future.set_result(function())
                except Exception as exc:
                    future.set_exception(exc)


class _Database:
    """The outbox on disk, or in memory."""

    def __init__(self, folder: Path | None, fsync: bool) -> None:
        self.folder = folder
        self._path = folder / "outbox.db" if folder else Path(":memory:")
        self._synchronous = "FULL" if fsync else "NORMAL"
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._worker = ""  # our name
        self._log_lock: sqlite3.Connection | None = None
        self._alive = ExitStack()  # holds the lock that says that we are

    def open(self) -> sqlite3.Connection:
        """The connection; or raise _OutboxError, and leave what cannot be used as it is."""
        try:
            if self._db is None:
                self._db = self._open()
            elif self.folder and (os.stat(self._path).st_ino != self._inode or not os.path.exists(f"{self._path}-wal")):
                raise OSError("it was replaced while it was in use")
        except (OSError, sqlite3.Error) as exc:
            remedy = "mend it, move it away to start with an empty one, or name another (NOTIFY_OUTBOX, outbox=)"
            if getattr(exc, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY:
                remedy = "another worker holds it for long: see whether one is stopped, and try again"
            raise _OutboxError(f"the outbox {self.folder} cannot be used, {exc}: {remedy}") from exc
        return self._db

    def _open(self) -> sqlite3.Connection:
        worker = secrets.token_hex(8)
        with ExitStack() as opening:
            if self.folder:
                self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                opening.enter_context(_locked(self.folder / "outbox.lock"))
            new = self.folder is None or _is_new(self._path)
            if self.folder:
                _create(self._path)
                self._inode = os.stat(self._path).st_ino
            db = self._connect()
            on_failure = opening.enter_context(ExitStack())
            on_failure.callback(db.close)
            if new:
                db.executescript(f"BEGIN; {_SCHEMA} PRAGMA application_id = {_APPLICATION_ID}; COMMIT")
                db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # so that damage to the file shows
            db.execute("PRAGMA busy_timeout = 0")  # see _transaction
            if self.folder:
                _sync(self.folder, self.folder.parent)
                self._alive.enter_context(_locked(self.folder / f"{worker}.lock"))
            on_failure.pop_all()
        self._worker = worker
        return db

    def _connect(self) -> sqlite3.Connection:
        db = _connect(self._path, _LOCK_WAIT)
        db.execute("PRAGMA journal_mode = WAL")  # who reads does not wait for who writes
        db.execute(f"PRAGMA synchronous = {self._synchronous}")  # FULL: a commit is on the disk
        db.execute("PRAGMA wal_autocheckpoint = 0")  # as a commit would wait for it: see tend
        return db

    def write(self, new: list[_Entry], settled: list[_Entry], room: int) -> None:
        """Commit what came in, as far as there is room, and what is done."""
        if not new and not settled:
            return
        with _transaction(self.open()) as db:
            fresh = self._sort_out(db, new, room)
            if keys := [(entry.key, entry.id, entry.digest) for entry in fresh if entry.key is not None]:
                db.execute(_TAKE_KEYS, (time.time(), json.dumps(keys)))
            if fresh:
                last = db.execute(_INSERT, (self._worker, json.dumps([entry.line for entry in fresh]))).lastrowid or 0
            if delivered := [entry.seq for entry in settled if entry.due is None]:
                db.execute(_DELETE, (self._worker, json.dumps(delivered)))
            if postponed := [(entry.seq, entry.due, entry.since) for entry in settled if entry.due is not None]:
                db.execute(_POSTPONE, (self._worker, json.dumps(postponed)))
        for position, entry in enumerate(reversed(fresh)):
            entry.seq = last - position

    def _sort_out(self, db: sqlite3.Connection, new: list[_Entry], room: int) -> list[_Entry]:
        """Those to be kept; the others are replayed, or have an error."""
        fresh: list[_Entry] = []
        owners: dict[str | None, tuple[str, str]] = {}
        if keys := [entry.key for entry in new if entry.key is not None]:
            db.execute(_FORGET_KEYS, (time.time() - _DAY,))
            owners = {key: (name, digest) for key, name, digest in db.execute(_WHOSE_KEYS, (json.dumps(keys),))}
        for entry in new:
            owner, digest = owners.get(entry.key, ("", ""))
            if owner and digest != entry.digest:
                entry.error = HTTPException(422, "Use another Idempotency-Key: this one came with other content.")
            elif owner:
                entry.replayed, entry.id = True, owner
            elif len(fresh) >= room:
                entry.error = HTTPException(503, "Too many notifications are pending: try again later.", _RETRY)
            else:
                fresh.append(entry)
                if entry.key is not None:
                    owners[entry.key] = (entry.id, entry.digest)
        return fresh

    def count(self) -> tuple[int, int]:
        """How many entries are pending, and of how many the last attempt failed."""
        pending, failed = self.open().execute(_COUNTS, (self._worker,)).fetchone()
        return pending, failed

    def is_quiet(self) -> bool:
        """Whether nothing is in anybody's hands; the memory's never is, as it would be lost."""
        return self.folder is not None and not self.open().execute(_IN_HAND, (self._worker,)).fetchone()

    def probe(self) -> None:
        """Write something."""
        with _transaction(self.open()) as db:
            db.execute(_PROBE)

    def claim(self, limit: int) -> tuple[list[_Entry], float]:
        """Up to so many entries that are due, and when the next one is."""
        db, now = self.open(), time.monotonic()
        [due] = db.execute(_NEXT_DUE, (self._worker,)).fetchone()
        if due is None or due > now or limit <= 0:
            return [], _NEVER if due is None else due
        with _transaction(db):
            rows = db.execute(_CLAIM, (self._worker, now, limit)).fetchall()
            [due] = db.execute(_NEXT_DUE, (self._worker,)).fetchone()
        return [_Entry(*row) for row in rows], _NEVER if due is None else due

    def tend(self) -> set[str]:
        """Do now and then what no request shall wait for; the other workers, which may be dead."""
        db = self.open()
        with _transaction(db):
            db.execute(_FORGET_KEYS, (time.time() - _DAY,))
        if self.folder and os.stat(f"{self._path}-wal").st_size > _MAX_WAL:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        owners = {worker for (worker,) in db.execute(_OWNERS)}
        locks = {path.stem for path in self.folder.glob("*.lock")} if self.folder else set()
        return (owners | locks) - {self._worker, "outbox", "log"}

    def adopt(self, worker: str, find_delivered: Callable[[set[str]], set[str]]) -> int:
        """Make ours what a worker left, if it is dead, less what it had delivered; on a thread of its own."""
        folder = self.folder or Path()
        with ExitStack() as dead:
            try:
                with _locked(folder / "outbox.lock"):  # two that try one lock at the same moment can both fail
                    dead.enter_context(_locked(folder / f"{worker}.lock", wait=0))
            except sqlite3.OperationalError:
                return 0  # it lives
            db = dead.enter_context(closing(self._connect()))
            rows = db.execute(_IDS, (worker,)).fetchall()
            delivered = find_delivered({identifier for _, identifier in rows}) if rows else set()
            with _transaction(db):
                db.execute(_DELETE, (worker, json.dumps([seq for seq, identifier in rows if identifier in delivered])))
            for _ in range(0, len(rows), _ADOPTED_AT_ONCE):
                with _transaction(db):
                    db.execute(_ADOPT, (self._worker, worker, _ADOPTED_AT_ONCE))
        _remove(folder / f"{worker}.lock")
        return len(rows) - len(delivered)

    @contextmanager
    def log_locked(self) -> Iterator[None]:
        """Hold the lock that keeps the lines of this outbox's workers apart; for the log's thread."""
        if self._log_lock is None:
            self._log_lock = _open_lock(self.folder / "log.lock" if self.folder else Path(":memory:"), _LOCK_WAIT)
        self._log_lock.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            self._log_lock.execute("ROLLBACK")

    def close(self) -> None:
        """Close the database, and let go of the lock that says that we live."""
        if self._log_lock is not None:
            self._log_lock.close()
            self._log_lock = None
        if self._db is not None:
            self._db.close()
            self._db = None
            self._alive.close()
            if self.folder:
                _remove(self.folder / f"{self._worker}.lock")


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    deadline = time.monotonic() + _BUSY_WAIT
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
            break
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.0005)  # SQLite's own pauses grow, so that who has waited longest would starve
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk has rolled it back already
            db.execute("ROLLBACK")
        raise


@contextmanager
def _locked(path: Path, wait: float = _LOCK_WAIT) -> Iterator[None]:
    """Hold a lock that dies with its process: SQLite's own, on an empty file."""
    with closing(_open_lock(path, wait)) as db:
        db.execute("BEGIN EXCLUSIVE")
        yield


def _open_lock(path: Path, wait: float) -> sqlite3.Connection:
    _create(path)
    db = _connect(path, wait)
    db.execute("PRAGMA journal_mode = OFF")  # there is nothing to roll back
    return db


def _connect(path: Path, wait: float) -> sqlite3.Connection:
    return sqlite3.connect(path, timeout=wait, isolation_level=None, check_same_thread=False)


def _create(path: Path) -> None:
    if path == Path(":memory:"):
        return
    # With O_EXCL: to open and close a file that SQLite has open in this process would drop its locks.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _is_new(path: Path) -> bool:
    """Whether there is no database yet; raises if there is, but damaged or another program's. Changes nothing."""
    wal = Path(f"{path}-wal")
    size = path.stat().st_size if path.exists() else 0
    magic = b""
    if wal.exists():
        with wal.open("rb") as file:
            magic = file.read(4)
    if magic.strip(b"\0") and magic not in (b"\x37\x7f\x06\x82", b"\x37\x7f\x06\x83"):
        raise OSError(f"{wal.name} is damaged")
    if size < 512:  # what SQLite takes for a new database, and removes the log of
        if size or magic:
            raise OSError(f"{path.name} is no database")
        return True
    immutable = "" if wal.exists() else "&immutable=1"
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro{immutable}", timeout=_LOCK_WAIT, uri=True)) as db:
        [verdict] = db.execute("PRAGMA quick_check(1)").fetchone()
        [application_id] = db.execute("PRAGMA application_id").fetchone()
        [tables] = db.execute("SELECT count(*) FROM sqlite_schema").fetchone()
    if verdict != "ok":
        raise OSError(verdict)
    if tables and application_id != _APPLICATION_ID:
        raise OSError("it is the database of another program")
    return not tables  # as when the disk was full, or the process killed, while it was made


def _sync(*folders: Path) -> None:
    """Have the names of new files on the disk, where a folder can be opened."""
    for folder in folders:
        with suppress(OSError):
            file = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


# ------------------------------------------------------------------------------------------------------- relay

_TICK = 2.0  # seconds between two looks for what was left
_WINDOW = 500  # how many the relay has in hand at once


class _Relay:
    """Delivers: at once as a request's background task, and later what had no task, failed or was left."""

    def __init__(
        self,
        outbox: _Outbox,
        notify: Callable[[Notification], Any] | None,
        log_file: _LogFile,
        delay: float,
        threads: int,
    ) -> None:
        self._outbox = outbox
        self._notify = notify
        self._log_file = log_file
        own, function = notify is not None, notify
        while isinstance(function, partial):
            function = function.func
        self._delay = 0.0 if own else delay
        self._is_async = any(map(inspect.iscoroutinefunction, (function, getattr(function, "__call__", 0))))  # noqa: B004
        self._group: _Group[_Entry] = _Group(self._deliver_all, threads if own else None)
        self._wait_initial, self._wait_max, self._give_up = (1.0, 900.0, _DAY) if own else (0.1, 30.0, math.inf)
        self._warn = _Warnings(50 if own else 1)
        self._lifespans = 0
        self._stepping = threading.Lock()
        self._next = self._next_tick = 0.0  # when there is something to do, on the monotonic clock
        self._in_hand: set[_Entry] = set()
        self._more = False
        self._nap: tuple[Any, anyio.Event] | None = None

    async def deliver(self, entry: _Entry) -> None:
        """A request's background task; does not raise."""
        if self._outbox.take(entry):
            await self._attempt(entry)
        await self.catch_up()

    async def catch_up(self) -> None:
        """With no lifespan, do with the traffic what needs a clock: the background task of the other answers."""
        while not self._lifespans and time.monotonic() >= self._next:
            async with anyio.create_task_group() as tasks:
                if not await self._step(tasks):
                    break

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Refuse to start on an outbox that cannot be used; from then on, do in time what needs a clock."""
        await self._outbox.call(self._outbox.database.open)
        try:
            async with anyio.create_task_group() as tasks:
                self._lifespans += 1
                tasks.start_soon(self._run, tasks)
                try:
                    yield
                finally:
                    self._lifespans -= 1
                    tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:  # the host's own error shall reach it as it was
            if len(group.exceptions) > 1:
                raise
            raise group.exceptions[0] from None
        with suppress(*_FAILURES):
            await self._outbox.call(self._outbox.close)

    async def _run(self, tasks: TaskGroup) -> None:
        while True:
            self._nap = nap = _current_loop(), anyio.Event()
            pause = self._next - time.monotonic() if await self._step(tasks) else _TICK
            with anyio.move_on_after(pause):
                await nap[1].wait()

    async def _step(self, tasks: TaskGroup) -> bool:
        """Adopt what is left, and start to deliver what is due; False if this is being done elsewhere."""
        now = time.monotonic()
        if not self._stepping.acquire(blocking=False):
            return False
        try:
            self._next = now + _TICK
            entries, due = await self._outbox.call(partial(self._outbox.claim, _WINDOW - len(self._in_hand)))
            for entry in filter(self._outbox.take, entries):
                self._in_hand.add(entry)
                tasks.start_soon(self._deliver_again, entry)
            self._more = due <= now  # and no room in the window
            if not self._more:
                self._next = min(self._next, due)
            if now >= self._next_tick:
                self._next_tick = now + _TICK
                for worker in await self._outbox.call(self._outbox.database.tend):
                    adopt = partial(self._outbox.database.adopt, worker, self._find_delivered)
                    limiter = anyio.CapacityLimiter(1)  # the host's threads stay the host's
                    if await anyio.to_thread.run_sync(adopt, limiter=limiter):
                        self._next = 0.0
        except Exception as exc:
            self._warn("what is left in the outbox has to wait: %s", _reason(exc))
        finally:
            self._stepping.release()
        return True

    def _find_delivered(self, ids: set[str]) -> set[str]:
        return self._log_file.find(ids) if self._notify is None else set()  # others can tell by the id

    async def _deliver_again(self, entry: _Entry) -> None:
        try:
            await self._attempt(entry)
        finally:
            self._in_hand.discard(entry)
            if self._more and len(self._in_hand) <= _WINDOW // 2:
                self._ring(0)

    def _ring(self, due: float) -> None:
        if due < self._next:
            self._next = due
            if self._nap is not None:
                with suppress(RuntimeError):
                    _call_soon(self._nap[0], self._nap[1].set)

    async def _attempt(self, entry: _Entry) -> None:
        try:
            if self._delay:
                await anyio.sleep(self._delay)
            if self._is_async and self._notify is not None:
                await self._notify(_read_line(entry.line))
        except BaseException as exc:
            self._settle([entry], exc)
            if _ends_task(exc):
                raise
        else:
            if self._is_async:
                self._settle([entry])
            else:
                await self._group.run(entry)
        if entry.due is not None:
            self._ring(entry.due)

    def _deliver_all(self, entries: list[_Entry]) -> None:
        try:
            if self._notify is None:
                self._log_file.append([entry.line for entry in entries])
            else:
                result = self._notify(_read_line(entries[0].line))
                if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
                    raise TypeError("notify returned what nobody runs: make it a def, or an async def, that returns")
        except BaseException as exc:
            self._settle(entries, exc)
        else:
            self._settle(entries)

    def _settle(self, entries: list[_Entry], error: BaseException | None = None) -> None:
        if error is not None:
            reason, now = _reason(error), time.monotonic()
            first = [entry.line[_ID] for entry in entries if entry.since is None]
            for entry in entries:
                entry.since = now if entry.since is None else entry.since
                entry.due = self._when_again(now, entry.since)
                if entry.due == _NEVER:
                    log.error(
                        "notification %s failed for a day, and waits for the next start: %s", entry.line[_ID], reason
                    )
            if first:
                self._warn(
                    "notification %s and %d more failed, and are tried again: %s", first[0], len(first) - 1, reason
                )
        self._outbox.settle(entries)

    def _when_again(self, now: float, since: float) -> float:
        """After a pause as long as it has failed so far, so that pauses double."""
        failing = now - since
        pause = min(self._wait_max, self._wait_initial + failing) * random.uniform(0.75, 1)
        return now + pause if failing < self._give_up else _NEVER


def _ends_task(error: BaseException) -> bool:
    """Whether it is this task that ends, and not only something that the notifier did or waited for."""
    if isinstance(error, GeneratorExit):
        return True
    if not isinstance(error, anyio.get_cancelled_exc_class()):
        return False
    with suppress(RuntimeError):  # on trio nobody else can raise it
        task = current_task()
        return task is None or task.cancelling() > 0
    return True


def _reason(error: BaseException) -> str:
    """In one line, of no great length, whatever the error does when it is printed."""
    return repr("".join(format_exception_only(error)).strip())[:500]


class _Warnings:
    """Warns, but only so many times a minute."""

    def __init__(self, most: int) -> None:
        self._recent: deque[float] = deque([-math.inf] * most, maxlen=most)

    def __call__(self, message: str, *args: object) -> None:
        if self._recent[0] < time.monotonic() - 60:
            self._recent.append(time.monotonic())
            log.warning(message, *args)


# ---------------------------------------------------------------------------------------------------- log file


class _LogFile:
    """The file that the default notifier appends to."""

    def __init__(self, path: _Path, fsync: bool, locked: Callable[[], AbstractContextManager[None]]) -> None:
        self._path = Path(path).absolute()
        self._fsync = fsync
        self._locked = locked

    def append(self, lines: list[str]) -> None:
        """Append the lines, all or none; raises OSError."""
        # Opened by its name each time, so that it can be renamed. A FIFO shall not be its own reader, nor wait for one.
        special = self._is_special()
        mode = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) if special else os.O_RDWR
        with ExitStack() as stack:
            file = os.open(self._path, mode | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
            stack.callback(os.close, file)
            if special:
                os.set_blocking(file, True)
            stack.enter_context(self._locked())
            self._append(file, "".join(f"{line}\n" for line in lines).encode())

    def _is_special(self) -> bool:
        with suppress(FileNotFoundError):
            return not stat.S_ISREG(os.stat(self._path).st_mode)
        return False

    def _append(self, file: int, data: bytes) -> None:
        end = _cut_torn_line(file) if stat.S_ISREG(os.fstat(file).st_mode) else None
        try:
            while data:
                data = data[os.write(file, data) :]
            if self._fsync and end is not None:
                os.fsync(file)
                if not end:
                    _sync(self._path.parent)
        except OSError as exc:
            exc.filename = os.fspath(self._path)
            if end is not None:
                os.ftruncate(file, end)
            raise

    def find(self, ids: set[str]) -> set[str]:
        """Which of the ids have a whole line, here or in a file that this one was renamed to."""
        wanted, found = {identifier.encode() for identifier in ids}, set()
        seen: set[int] = set()
        while files := [path for path in self._path.parent.iterdir() if self._is_ours(path, seen)]:
            for path in files:  # and look again, as it may be renamed meanwhile
                with suppress(FileNotFoundError), path.open("rb") as file:
                    seen.add(os.fstat(file.fileno()).st_ino)
                    for line in iter(partial(file.readline, _MAX_LINE), b""):
                        if line[_ID] in wanted and line.endswith(b"\n"):
                            found.add(line[_ID])
        return {identifier.decode() for identifier in found}

    def _is_ours(self, path: Path, seen: set[int]) -> bool:
        # Never a file of the outbox's: to close it would drop this process's locks on it.
        if path.suffix == ".lock" or path.name.startswith("outbox.db"):
            return False
        with suppress(FileNotFoundError):
            state = path.stat()
            name = re.match(re.escape(self._path.stem) + "(?![a-zA-Z])", path.name)
            return name is not None and stat.S_ISREG(state.st_mode) and state.st_ino not in seen
        return False


def _cut_torn_line(file: int) -> int:
    """Where to append: after the last whole line, as a crash may have torn one."""
    size = end = os.lseek(file, 0, os.SEEK_END)
    while end:
        start = max(0, end - (1 if end == size else _MAX_LINE))
        os.lseek(file, start, os.SEEK_SET)
        newline = os.read(file, end - start).rfind(b"\n")
        end = start + newline + 1 if newline >= 0 else start
        if newline >= 0:
            break
    if end != size:
        os.ftruncate(file, end)
    return end


# ----------------------------------------------------------------------------------------------------- the app


def create_app(
    notify: Callable[[Notification], Any] | None = None,
    *,
    log: _Path = "log.txt",
    outbox: _Path = "outbox",
    delay: float = 0.0,
    concurrency: int = 40,
    max_pending: int = 10_000,
    token: str | None = None,
    fsync: bool = True,
) -> Starlette:
    """Make the service. Opens, creates and starts nothing: the lifespan or the first request does.

    Args:
        notify: Called with each Notification: a ``def`` on a thread of the service's own, an ``async def`` on the
            caller's event loop. None: append the notification's line to ``log``.
        log: The file that the default notifier appends to.
        outbox: The folder where what is not yet delivered is kept; ``":memory:"`` keeps nothing on disk.
        delay: Seconds that the default notifier waits before it writes.
        concurrency: How many ``def`` notifiers may run at once.
        max_pending: How many accepted notifications may be undelivered at once; past it, the answer is 503.
        token: What ``POST`` wants as ``Authorization: Bearer <token>``; None: nothing.
        fsync: True: what was acknowledged survives a loss of power. False: it survives the end of the process.

    Raises:
        TypeError: ``notify`` cannot be called.
        ValueError: Another setting makes no sense; names it, its value and the rule.
    """
    if notify is not None and not callable(notify):
        raise TypeError(f"notify must be callable with a Notification, not {notify!r}")
    settings = {"log": log, "outbox": outbox, "delay": delay, "concurrency": concurrency}
    for name, value in (settings | {"max_pending": max_pending, "token": token, "fsync": fsync}).items():
        _check(name, name, value)
    box = _Outbox(outbox, max_pending, fsync)
    relay = _Relay(box, notify, _LogFile(log, fsync, box.database.log_locked), delay, concurrency)
    api = _Api(box, relay, token)
    service = Starlette(
        routes=[
            _Route("/send-notification/{email:path}", api.send_notification, "POST"),
            _Route("/health", api.health, "GET"),
            _Route("/openapi.json", api.openapi, "GET"),
        ],
        exception_handlers={HTTPException: api.refuse, ClientDisconnect: _ignore, Exception: api.refuse},
        lifespan=relay.lifespan,
    )
    service.router.redirect_slashes = False
    return service


app = create_app(**_environment())

if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
