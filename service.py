"""Answer first, notify after: one Starlette module, and 202 means kept.

The life of a notification:

1. ``POST /send-notification/{email}`` is checked, and becomes one line of text.
2. The outbox, a SQLite database, commits the line together with all that came at the same moment.
3. The client gets its 202 and the notification's id. Nothing slow has happened yet.
4. A BackgroundTask hands the line to the notifier: by default, a thread that appends it to a file.
5. What is delivered leaves the outbox; what failed, or was left by a process that died, is the relay's.

Promised: the answer never waits for the notifier. After a 202 the default notifier writes the line exactly
once and a ``notify`` of your own is called at least once, with the same id, whatever is killed, full or
broken in between. No other answer leaves a notification behind.

Run it with ``uvicorn service:app``, or embed it with ``create_app()``. The settings are listed there; each has
an environment variable, ``NOTIFY_`` and its name in capitals.
"""

from __future__ import annotations

import glob
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
import uuid
import weakref
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import count, takewhile
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar, cast

import anyio
from anyio.abc import TaskGroup
from anyio.lowlevel import current_token
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

log = logging.getLogger("notify")

T = TypeVar("T")

# ------------------------------------------------------------------------------------------------- settings


class _Setting(NamedTuple):
    read: Callable[[str], Any]  # from the text of an environment variable
    type: tuple[type, ...]
    holds: Callable[[Any], bool]
    rule: str


def _switch(text: str) -> bool:
    return {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}[
        text.lower()
    ]


_A_PATH = _Setting(
    str, (str, os.PathLike), lambda path: os.fspath(path) not in ("", b""), "the path of a file or folder"
)
_A_NUMBER = _Setting(int, (int,), lambda number: number >= 1, "a whole number, at least 1")
_SETTINGS = {
    "log": _A_PATH,
    "outbox": _A_PATH,
    "delay": _Setting(
        float, (int, float), lambda seconds: 0 <= seconds < math.inf, "a finite number of seconds, not negative"
    ),
    "concurrency": _A_NUMBER,
    "max_pending": _A_NUMBER,
    "token": _Setting(
        str,
        (str, type(None)),
        lambda token: token is None or re.fullmatch("[!-~]+", token) is not None,
        "one or more printable ASCII characters, with no space among them",
    ),
    "fsync": _Setting(_switch, (bool,), lambda _: True, "true or false"),
}


def _check(setting: _Setting, name: str, value: Any) -> None:
    mistaken = isinstance(value, bool) and bool not in setting.type  # a bool is an int, but no number
    if mistaken or not isinstance(value, setting.type):
        raise TypeError(f"{name} must be {setting.rule}, not {value!r}")
    if not setting.holds(value):
        raise ValueError(f"{name} must be {setting.rule}, not {value!r}")


def _environment() -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, setting in _SETTINGS.items():
        variable = f"NOTIFY_{name.upper()}"
        if (text := os.environ.get(variable)) is None:
            continue
        try:
            settings[name] = setting.read(text)
        except (ValueError, KeyError):
            raise ValueError(f"{variable} must be {setting.rule}, not {text!r}") from None
        _check(setting, variable, settings[name])
    return settings


# --------------------------------------------------------------------------------------------- notification


@dataclass(frozen=True, slots=True)
class Notification:
    """What a notifier is called with.

    ``id`` is unique, and the same at every attempt. ``message`` is the text exactly as it was sent.
    ``accepted_at`` is UTC in ISO 8601, with milliseconds.
    """

    id: str
    email: str
    message: str
    accepted_at: str


def _line(notification: Notification) -> str:
    """One notification is one line: whatever is not printable is escaped, so that no message can forge another."""
    message = notification.message
    if "\\" in message or not message.isprintable():
        message = "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in message)
    return f"{notification.accepted_at} {notification.id} notification for {notification.email}: {message}"


def _parse(line: str) -> Notification:
    accepted_at, id, _, _, rest = line.split(" ", 4)
    email, _, message = rest.partition(": ")
    if "\\" in message:
        message = message.encode("latin-1", "backslashreplace").decode("unicode_escape")
    return Notification(id, email, message, accepted_at)


_ID = slice(25, 57)  # where a line has its id: after 24 characters of time and a space


# ------------------------------------------------------------------------------------------------ endpoints

# WHATWG HTML, "valid e-mail address": https://html.spec.whatwg.org/#valid-e-mail-address
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_EMAIL = r"[a-zA-Z0-9.!#$%&'*+\/=?^_`{|}~-]{1,64}@" + rf"{_LABEL}(?:\.{_LABEL})*"
_is_email = re.compile(_EMAIL).fullmatch
_is_key = re.compile("[ -~]{1,255}").fullmatch

_MAX_BODY = 64 * 1024  # bytes
_MAX_MESSAGE = 10_000  # characters
_RETRY_AFTER = {"Retry-After": "1"}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Python's decoder takes NaN, and refuses integers of more than 4,300 digits, which are JSON.
_decode_json = json.JSONDecoder(parse_int=float, parse_constant=_no_constant).decode


class _Api:
    def __init__(self, outbox: _Outbox, relay: _Relay, token: str | None) -> None:
        self._outbox = outbox
        self._relay = relay
        self._authorization = None if token is None else token.encode()

    async def send_notification(self, request: Request) -> Response:
        self._authorize(request)
        email = request.path_params["email"].removesuffix("/")
        if len(email) > 254 or not _is_email(email):
            raise HTTPException(422, "Name one whole e-mail address in the path, such as user@example.com.")
        key = request.headers.get("idempotency-key")
        if key is not None and not _is_key(key):
            raise HTTPException(400, "Make Idempotency-Key 1 to 255 printable ASCII characters.")
        message = await _read_message(request)
        entry = await self._outbox.accept(email, message, key)
        content = {"id": entry.id, "message": "Notification sent in the background"}
        if entry.replayed:
            return JSONResponse(content, 202, {"Idempotent-Replayed": "true"})
        return JSONResponse(content, 202, background=BackgroundTask(self._relay.deliver, entry))

    def _authorize(self, request: Request) -> None:
        if self._authorization is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip().encode("latin-1")
        if scheme.lower() != "bearer" or not secrets.compare_digest(given, self._authorization):
            challenge = {"WWW-Authenticate": "Bearer"}
            raise HTTPException(401, "Send the header Authorization: Bearer, and the token.", challenge)

    async def health(self, request: Request) -> Response:
        error = await self._outbox.check()
        status = "ok" if error is None else f"the outbox cannot be written: {error}"
        content = {"status": status, "pending": self._outbox.pending, "failed": self._outbox.failed}
        return JSONResponse(content, 200 if error is None else 503, None if error is None else _RETRY_AFTER)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse({**_OPENAPI, "servers": [{"url": request.scope.get("root_path") or "/"}]})


async def _read_message(request: Request) -> str:
    body = await _read_body(request)
    if not body:
        return "some notification"
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise HTTPException(415, "Send the body as Content-Type: application/json, or send none.")
    try:
        content = _decode_json(body.decode())
    except (ValueError, RecursionError):
        raise HTTPException(400, "Send a body that is JSON in UTF-8.") from None
    if not isinstance(content, dict) or not content.keys() <= {"message"}:
        raise HTTPException(422, "Send a JSON object with no other key than message.")
    message = content.get("message", "some notification")
    if not isinstance(message, str) or len(message) > _MAX_MESSAGE or re.search("[\ud800-\udfff]", message):
        raise HTTPException(422, "Make message a string of at most 10,000 characters, with no lone surrogate.")
    return message


async def _read_body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise HTTPException(413, "Send a body of at most 64 KiB.")
    return bytes(body)


_DETAILS = {
    404: "Nothing is here: see /openapi.json for what there is.",
    405: "Use one of the methods that the Allow header names.",
    500: "The service failed: report it to whoever runs it, whose log says why.",
}


async def _refuse(request: Request, exc: Exception) -> Response:
    status, headers = (exc.status_code, exc.headers) if isinstance(exc, HTTPException) else (500, None)
    detail = _DETAILS.get(status) or str(getattr(exc, "detail", ""))
    return JSONResponse({"detail": detail}, status, headers)


async def _forget_client(request: Request, exc: Exception) -> Response:
    return Response(status_code=400)  # which nobody reads: the client went away in the middle of its body


class _ExactRoute(Route):
    """Matches the whole path, but for one slash at its end. Starlette's own pattern lets a last newline fall off."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        super().__init__(path, endpoint, **options)
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"/?\Z", re.DOTALL)


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _answer(description: str, schema: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer: dict[str, Any] = {"description": description, "content": {"application/json": {"schema": schema}}}
    if headers:
        answer["headers"] = {
            name.replace("_", "-"): {"description": text, "schema": {"type": "string"}}
            for name, text in headers.items()
        }
    return answer


def _required(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "required": list(schema["properties"])}


_PROBLEM = _required(_object(detail={"type": "string", "description": "One sentence that says what to do."}))
_COUNT = {"type": "integer", "minimum": 0}
_HEALTH = _required(_object(status={"type": "string"}, pending=_COUNT, failed=_COUNT))
_FAILED = {"500": _answer("The service failed.", _PROBLEM)}
_OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {
        "title": "Notify",
        "version": "1.0.0",
        "description": "Answer first, notify after: 202 means kept. An unknown path is a 404 and an unknown method"
        " a 405 with Allow; like every error they are JSON, with one sentence in detail.",
    },
    "paths": {
        "/send-notification/{email}": {
            "post": {
                "operationId": "send_notification",
                "summary": "Keep a notification, answer, and deliver it afterwards.",
                "security": [{}, {"token": []}],
                "parameters": [
                    {
                        "name": "email",
                        "in": "path",
                        "required": True,
                        "description": "A valid e-mail address as HTML's <input type=email> defines it.",
                        "schema": {"type": "string", "pattern": f"^{_EMAIL}$", "maxLength": 254},
                    },
                    {
                        "name": "Idempotency-Key",
                        "in": "header",
                        "description": "The same key with the same content notifies once within 24 hours.",
                        "schema": {"type": "string", "pattern": "^[ -~]+$", "minLength": 1, "maxLength": 255},
                    },
                ],
                "requestBody": {
                    "content": {
                        "application/json": {
                            "schema": _object(
                                message={"type": "string", "maxLength": _MAX_MESSAGE, "default": "some notification"}
                            )
                        }
                    },
                },
                "responses": {
                    "202": _answer(
                        "Kept; delivered afterwards.",
                        _required(_object(id={"type": "string"}, message={"type": "string"})),
                        Idempotent_Replayed="true when this key was answered before.",
                    ),
                    "400": _answer("The body is not JSON, or the key is not printable ASCII.", _PROBLEM),
                    "401": _answer("The token is missing or wrong.", _PROBLEM, WWW_Authenticate="Bearer"),
                    "413": _answer("The body is over 64 KiB.", _PROBLEM),
                    "415": _answer("The body is not application/json.", _PROBLEM),
                    "422": _answer("The address, the content, or the key's content is not right.", _PROBLEM),
                    "503": _answer("Too many pending, or no way to keep it.", _PROBLEM, Retry_After="Seconds."),
                    **_FAILED,
                },
            }
        },
        "/health": {
            "get": {
                "operationId": "health",
                "summary": "Tell whether notifications can be kept, and how many wait.",
                "responses": {
                    "200": _answer("Notifications can be kept.", _HEALTH),
                    "503": _answer("The outbox cannot be written.", _HEALTH, Retry_After="Seconds."),
                    **_FAILED,
                },
            }
        },
        "/openapi.json": {
            "get": {
                "operationId": "openapi",
                "summary": "This description.",
                "responses": {"200": _answer("OpenAPI 3.1.", {"type": "object"}), **_FAILED},
            }
        },
    },
    "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
}


# --------------------------------------------------------------------------------------------- group commit
#
# Goals: no wait on the event loop for a disk or a notifier; no thread hop, commit or wake-up for each
# notification, but one for all that gathered; nothing that belongs to one event loop, so that one app may serve
# several; nothing left behind by an app that is no longer used.
#
# Plan: `run` puts the work on a list and waits for an event of its own. A daemon thread takes the whole list (or
# the first of it), handles it, and wakes each event loop once for all of its waiters. What gathers meanwhile is
# the next group, so the groups grow with the load. A thread starts when there is work and ends when there has
# been none for a while. Work that was put is handled even if the one who waited was cancelled.

_IDLE = 5.0  # seconds until an idle thread ends
_Waiter = tuple[anyio.Event, Any]  # and its event loop


class _Group(Generic[T]):
    def __init__(
        self,
        handle: Callable[[list[T]], None],
        name: str,
        *,
        threads: int = 1,
        most: int | None = None,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._handle = handle
        self._rest = rest  # called after each group, while nobody waits
        self._name = name
        self._max_threads = threads
        self._most = most
        self._jobs: deque[tuple[T, _Waiter | None]] = deque()
        self._ready = threading.Condition()
        self._threads = self._idle = 0

    async def run(self, work: T) -> T:
        """Return when the work was handled."""
        waiter = _waiter()
        self._put([(work, waiter)])
        await waiter[0].wait()
        return work

    def put(self, works: Iterable[T]) -> None:
        """Have the works handled; for any thread, and not waited for."""
        self._put([(work, None) for work in works])

    def _put(self, jobs: list[tuple[T, _Waiter | None]]) -> None:
        with self._ready:
            self._jobs.extend(jobs)
            if self._idle:
                self._ready.notify()
            elif self._threads < self._max_threads:
                threading.Thread(target=self._work, name=self._name, daemon=True).start()
                self._threads += 1

    def _work(self) -> None:
        while jobs := self._take():
            try:
                self._handle([work for work, _ in jobs])
            except Exception:
                log.exception("%s: this should not happen", self._name)
            _wake(waiter for _, waiter in jobs if waiter)
            del jobs
            self._rest()

    def _take(self) -> list[tuple[T, _Waiter | None]]:
        with self._ready:
            self._idle += 1
            self._ready.wait_for(lambda: self._jobs, _IDLE)
            self._idle -= 1
            jobs = [self._jobs.popleft() for _ in range(self._most or len(self._jobs)) if self._jobs]
            self._threads -= not jobs
            return jobs


def _waiter() -> _Waiter:
    return anyio.Event(), current_token().native_token


def _wake(waiters: Iterable[_Waiter]) -> None:
    events = defaultdict(list)
    for event, loop in waiters:
        events[loop].append(event)
    for loop, those in events.items():
        # AnyIO's own way in from another thread waits until the loop has run the call: asyncio's and trio's do not.
        call_soon = getattr(loop, "call_soon_threadsafe", None) or loop.run_sync_soon
        with suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            call_soon(_set_all, those)


def _set_all(events: list[anyio.Event]) -> None:
    for event in events:
        event.set()


# --------------------------------------------------------------------------------------------------- outbox

_SCHEMA = """
CREATE TABLE pending (            -- what is accepted and not delivered
    worker INTEGER NOT NULL,      -- who has it: the number of a worker-N.lock
    seq INTEGER NOT NULL,
    line TEXT NOT NULL,           -- as it is written to the log
    due REAL,                     -- when to try again, on the worker's monotonic clock; NULL: in hand, Inf: set aside
    since REAL,                   -- when it failed first, on that clock
    PRIMARY KEY (worker, seq)
) WITHOUT ROWID;
CREATE INDEX pending_due ON pending (worker, due) WHERE due IS NOT NULL;
CREATE TABLE keys (key TEXT PRIMARY KEY, id TEXT NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL) WITHOUT ROWID;
CREATE INDEX keys_at ON keys (at);
CREATE TABLE probe (padding BLOB);
INSERT INTO probe VALUES (NULL);
"""
_APPLICATION_ID = 0x6E6F7466  # "notf"

# One statement for many rows: each statement gives up and regains the interpreter's lock, which is slow under load.
_INSERT = "INSERT INTO pending (worker, seq, line) SELECT ?, ? + key, value FROM json_each(?)"
_DELETE = "DELETE FROM pending WHERE worker = ? AND seq IN (SELECT value FROM json_each(?))"
_POSTPONE = (
    "UPDATE pending SET due = value ->> 1, since = value ->> 2 FROM json_each(?) WHERE worker = ? AND seq = value ->> 0"
)
_CLAIM = (
    "UPDATE pending SET due = NULL WHERE worker = ?1 AND seq IN"
    " (SELECT seq FROM pending WHERE worker = ?1 AND due <= ?2 ORDER BY due LIMIT ?3) RETURNING seq, line, since"
)
_NEXT_DUE = "SELECT min(due) FROM pending WHERE worker = ?"
_LAST = "SELECT max(seq) FROM pending WHERE worker = ?"
_LINES = "SELECT seq, substr(line, 26, 32) FROM pending WHERE worker = ? AND seq <= ?"
_RELEASE = "UPDATE pending SET due = 0, since = NULL WHERE worker = ? AND seq <= ?"
_FORGET_KEYS = "DELETE FROM keys WHERE at < ?"
_TAKE_KEYS = (
    "INSERT INTO keys (key, id, digest, at) SELECT value ->> 0, value ->> 1, value ->> 2, ?1 FROM json_each(?2)"
    " WHERE true ON CONFLICT DO NOTHING"
)
_WHOSE_KEYS = "SELECT key, id, digest FROM keys WHERE key IN (SELECT value ->> 0 FROM json_each(?))"
_PROBE = "UPDATE probe SET padding = randomblob(16384)"  # about as much as one request with a long message

_DAY = 24 * 60 * 60.0  # seconds
_LOCK_WAIT = 5.0  # seconds that one worker waits for another at a lock that is held briefly
_MAX_WAL = 16 * 1024 * 1024  # bytes
_NEVER = 1e300  # the time at which what is set aside is due


class _OutboxError(Exception):
    """The outbox cannot be used: says which, why and what to do."""


_FAILURES = (_OutboxError, sqlite3.Error, OSError)


@dataclass(slots=True, eq=False)
class _Entry:
    """A notification on its way."""

    line: str
    id: str
    key: str | None = None
    digest: str = ""
    worker: int = 0
    seq: int = 0
    adopted: bool = False
    saved: float = 0.0  # when it was committed or claimed, on the monotonic clock
    since: float | None = None  # when it failed first, on that clock
    due: float | None = None  # when to try again; None: delivered
    replayed: bool = False
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class _Call(Generic[T]):
    """A function for the writer's thread."""

    function: Callable[[], T]
    result: T | None = None
    error: Exception | None = None


class _Outbox:
    """What is accepted and not yet delivered: its counts, and the thread that alone writes the database."""

    def __init__(self, folder: str | os.PathLike[str], max_pending: int, fsync: bool) -> None:
        self.database = _Database(None if os.fspath(folder) == ":memory:" else Path(folder).absolute(), fsync)
        self.complain = _Complaints(burst=1)
        self._max_pending = max_pending
        self._writer: _Group[Any] = _Group(self._write, "notify-outbox", rest=self.database.checkpoint)
        self._lock = threading.Lock()  # of what follows
        self._unclaimed: dict[tuple[int, int], _Entry] = {}  # kept, and in nobody's hands
        self._accepted = self._adopted = self._set_aside = self.failed = self._in_hand = 0
        self._unsaved: list[_Entry] = []  # the writer's own: what became of them is not in the database yet
        weakref.finalize(self, self.database.close).atexit = False

    @property
    def pending(self) -> int:
        """How many notifications this process owns and has neither delivered nor set aside."""
        return self._accepted + self._adopted - self._set_aside

    async def accept(self, email: str, message: str, key: str | None) -> _Entry:
        """Keep a notification, or raise the HTTPException that says why not."""
        with self._lock:
            if self._accepted >= self._max_pending:
                raise HTTPException(503, "Too many notifications are pending: try again later.", _RETRY_AFTER)
            self._accepted += 1
            self._in_hand += 1
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        notification = Notification(uuid.uuid4().hex, email, message, now)
        entry = _Entry(_line(notification), notification.id, key)
        if key is not None:
            entry.digest = hashlib.sha256(f"{email}\n{message}".encode()).hexdigest()
        await self._writer.run(entry)
        if isinstance(entry.error, HTTPException):
            raise entry.error
        if entry.error is not None:
            raise HTTPException(503, "The outbox cannot be written: try again later.", _RETRY_AFTER)
        return entry

    def take(self, entry: _Entry) -> bool:
        """Whether the entry is the caller's to deliver: it is for the first who asks."""
        with self._lock:
            return self._unclaimed.pop((entry.worker, entry.seq), None) is not None

    def abandoned(self) -> list[_Entry]:
        """Entries whose task did not come: its request was cancelled, or a host's middleware raised."""
        before = time.monotonic() - _TICK
        with self._lock:
            return list(takewhile(lambda entry: entry.saved < before, self._unclaimed.values()))

    def settle(self, entries: list[_Entry], backoff: _Backoff, error: BaseException | None) -> None:
        """Record what became of entries that were taken: they are delivered, or due again."""
        now = time.monotonic()
        with self._lock:
            self._in_hand -= len(entries)
            for entry in entries:
                if error is None:
                    self._count_out(entry)
                    continue
                if entry.since is None:
                    entry.since = now
                    self.failed += 1
                entry.due = backoff.due(entry.since, now)
                self._set_aside += entry.due == _NEVER
        self._writer.put(entries)

    def _count_out(self, entry: _Entry) -> None:
        self.failed -= entry.since is not None
        if entry.adopted:
            self._adopted -= 1
        else:
            self._accepted -= 1

    async def call(self, function: Callable[[], T]) -> T:
        """Call the function on the writer's thread."""
        call = await self._writer.run(_Call(function))
        if call.error is not None:
            raise call.error
        return cast(T, call.result)

    async def check(self) -> Exception | None:
        """Why the outbox cannot be written, if it cannot."""
        try:
            await self.call(self.database.probe)
        except _FAILURES as exc:
            return exc
        return None

    async def claim(self, limit: int) -> tuple[list[_Entry], float]:
        """Put entries that are due in nobody's hands, and say when the next is due."""

        def claim() -> tuple[list[_Entry], float]:
            entries, due = self.database.claim(limit)
            self._offer(entries)
            with self._lock:
                self._in_hand += len(entries)
            return entries, due

        return await self.call(claim)

    async def adopt(self, worker: int, written: list[int]) -> None:
        """Own what a worker left, less what it had delivered."""

        def adopt() -> None:
            left = self.database.release(worker, written)
            with self._lock:
                self._adopted += left

        await self.call(adopt)

    async def close(self) -> None:
        """Close the database, unless something is under way: then the locks live as long as the process."""

        def close() -> None:
            with self._lock:
                if self._in_hand == len(self._unclaimed) and not self._unsaved and self.database.folder:
                    self.database.close()
                    self._unclaimed.clear()
                    self._accepted = self._adopted = self._set_aside = self.failed = self._in_hand = 0

        await self.call(close)

    def _offer(self, entries: Iterable[_Entry]) -> None:
        now = time.monotonic()
        with self._lock:
            for entry in entries:
                entry.saved = now
                self._unclaimed[entry.worker, entry.seq] = entry

    def _write(self, works: list[_Entry | _Call[Any]]) -> None:
        entries = [work for work in works if isinstance(work, _Entry)]
        self._unsaved += [entry for entry in entries if entry.saved]
        self._commit([entry for entry in entries if not entry.saved])
        for call in works:
            if isinstance(call, _Call):
                try:
                    call.result = call.function()
                except _FAILURES as exc:
                    call.error = exc

    def _commit(self, entries: list[_Entry]) -> None:
        try:
            self.database.write(entries, self._unsaved)
        except _FAILURES as exc:
            self.complain("the outbox cannot be written, and answers are 503: %r", exc)
            for entry in entries:
                entry.error = exc
        else:
            self._unsaved.clear()
        with self._lock:
            for entry in entries:
                if entry.error is not None or entry.replayed:
                    self._accepted -= 1
                    self._in_hand -= 1
        self._offer(entry for entry in entries if entry.error is None and not entry.replayed)


class _Database:
    """The outbox on disk, for one thread."""

    def __init__(self, folder: Path | None, fsync: bool) -> None:
        self.folder = folder
        self._synchronous = "FULL" if fsync else "NORMAL"
        self._db: sqlite3.Connection | None = None
        self._path = Path() if folder is None else folder / "outbox.db"
        self._inode = 0
        self._worker = 0  # our number
        self._first = self._seq = 0  # the first of our rows that is not from an earlier life, and the next
        self._locks: dict[int, _Lock] = {}  # of the workers whose rows are ours: our own, and dead ones'
        self._unknown: dict[int, int] = {}  # of those, the ones with rows, up to a seq, that may be delivered already

    def open(self) -> sqlite3.Connection:
        """The connection; raises _OutboxError where the outbox cannot be used, and leaves it as it is."""
        if self._db is None:
            try:
                self._db = self._open_memory() if self.folder is None else self._open_folder(self.folder)
            except (sqlite3.Error, OSError) as exc:
                self.close()
                raise _OutboxError(
                    f"the outbox {self._path} cannot be used ({exc}): mend it, move it away to start with an empty"
                    " one, or set NOTIFY_OUTBOX or outbox= to another folder"
                ) from exc
        elif self.folder is not None and os.stat(self._path).st_ino != self._inode:
            raise _OutboxError(f"the outbox {self._path} was replaced: put it back, or restart the service")
        return self._db

    def _open_memory(self) -> sqlite3.Connection:
        db = _connect(":memory:")
        db.executescript(_SCHEMA)
        return db

    def _open_folder(self, folder: Path) -> sqlite3.Connection:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _Lock(folder / "outbox.lock", _LOCK_WAIT):
            _examine(self._path)
            _create(self._path)
            self._inode = os.stat(self._path).st_ino
            db = _connect(self._path)
            db.execute(f"PRAGMA busy_timeout = {int(_LOCK_WAIT * 1000)}")
            db.execute("PRAGMA journal_mode = WAL")  # readers and the writer do not wait for each other
            db.execute(f"PRAGMA synchronous = {self._synchronous}")  # FULL: a commit is on the disk
            db.execute("PRAGMA wal_autocheckpoint = 0")  # which would make a commit wait: checkpoint() is for that
            if not db.execute("PRAGMA application_id").fetchone()[0]:
                db.executescript(f"BEGIN; {_SCHEMA} PRAGMA application_id = {_APPLICATION_ID}; COMMIT")
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._join(folder, db)
            db.execute("PRAGMA busy_timeout = 0")  # whose pauses grow to 0.1 s: see transaction()
        return db

    def _join(self, folder: Path, db: sqlite3.Connection) -> None:
        for worker in count():
            lock = _Lock(folder / f"worker-{worker}.lock")
            if lock.acquire():
                break
            lock.close()
        self._worker, self._locks = worker, {worker: lock}
        last = db.execute(_LAST, (worker,)).fetchone()[0]
        self._unknown = {} if last is None else {worker: last}
        self._first = self._seq = 0 if last is None else last + 1

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        db = self.open()
        deadline = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                db.execute("BEGIN IMMEDIATE")
                break
            except sqlite3.OperationalError as exc:
                if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(0.0005)  # SQLite's own pauses grow, and would starve the worker that has waited longest
        try:
            yield db
            db.execute("COMMIT")
        except BaseException:
            if db.in_transaction:  # a full disk has rolled it back already
                db.execute("ROLLBACK")
            raise

    def write(self, entries: list[_Entry], settled: list[_Entry]) -> None:
        """Commit what came in and what is done."""
        if not entries and not settled:
            return
        with self.transaction() as db:
            keyed = [entry for entry in entries if entry.key is not None]
            if keyed:
                self._find_replays(db, keyed)
            fresh = [entry for entry in entries if entry.error is None and not entry.replayed]
            if fresh:
                db.execute(_INSERT, (self._worker, self._seq, json.dumps([entry.line for entry in fresh])))
            if settled:
                self._save(db, settled)
        for entry in fresh:
            entry.worker, entry.seq = self._worker, self._seq
            self._seq += 1

    def _find_replays(self, db: sqlite3.Connection, entries: list[_Entry]) -> None:
        now = time.time()
        keys = json.dumps([(entry.key, entry.id, entry.digest) for entry in entries])
        db.execute(_FORGET_KEYS, (now - _DAY,))
        db.execute(_TAKE_KEYS, (now, keys))
        kept = {key: (id, digest) for key, id, digest in db.execute(_WHOSE_KEYS, (keys,))}
        for entry in entries:
            id, digest = kept[entry.key]
            if digest != entry.digest:
                entry.error = HTTPException(422, "Use another Idempotency-Key: this one came with other content.")
            entry.replayed = id != entry.id
            entry.id = id

    def _save(self, db: sqlite3.Connection, settled: list[_Entry]) -> None:
        for worker in {entry.worker for entry in settled}:
            own = [entry for entry in settled if entry.worker == worker]
            delivered = [entry.seq for entry in own if entry.due is None]
            postponed = [(entry.seq, entry.due, entry.since) for entry in own if entry.due is not None]
            if delivered:
                db.execute(_DELETE, (worker, json.dumps(delivered)))
            if postponed:
                db.execute(_POSTPONE, (json.dumps(postponed), worker))

    def probe(self) -> None:
        """Write something, and forget keys that are too old."""
        with self.transaction() as db:
            db.execute(_PROBE)
            db.execute(_FORGET_KEYS, (time.time() - _DAY,))

    def claim(self, limit: int) -> tuple[list[_Entry], float]:
        """Up to ``limit`` entries that are due, and when the next one is."""
        entries: list[_Entry] = []
        due, now = _NEVER, time.monotonic()
        for worker in self._locks.keys() - self._unknown.keys():
            first = self.open().execute(_NEXT_DUE, (worker,)).fetchone()[0]
            if first is not None and first <= now and len(entries) < limit:
                with self.transaction() as db:
                    rows = db.execute(_CLAIM, (worker, now, limit - len(entries))).fetchall()
                    first = db.execute(_NEXT_DUE, (worker,)).fetchone()[0]
                for seq, line, since in rows:
                    adopted = worker != self._worker or seq < self._first
                    entries.append(_Entry(line, line[_ID], None, "", worker, seq, adopted, since=since))
            due = min(due, _NEVER if first is None else first)
        return entries, due

    def unknown(self) -> list[tuple[int, list[tuple[int, str]]]]:
        """Lock the workers that died and left rows; the seq and id of rows that may be delivered already."""
        db = self.open()
        if self.folder is None:
            return []
        for worker in self._locks.keys() - {self._worker} - self._unknown.keys():
            if db.execute(_LAST, (worker,)).fetchone()[0] is None:
                self._locks.pop(worker).close()
        for path in self.folder.glob("worker-*.lock"):
            worker = int(path.stem.removeprefix("worker-"))
            if worker not in self._locks and db.execute(_LAST, (worker,)).fetchone()[0] is not None:
                self._lock_dead(self.folder, db, worker)
        return [(worker, db.execute(_LINES, (worker, last)).fetchall()) for worker, last in self._unknown.items()]

    def _lock_dead(self, folder: Path, db: sqlite3.Connection, worker: int) -> None:
        # Two that try one lock at the same moment can both fail, so they try in turn.
        with _Lock(folder / "outbox.lock", _LOCK_WAIT):
            lock = _Lock(folder / f"worker-{worker}.lock")
            last = db.execute(_LAST, (worker,)).fetchone()[0] if lock.acquire() else None
            if last is None:
                lock.close()
            else:
                self._locks[worker], self._unknown[worker] = lock, last

    def release(self, worker: int, written: list[int]) -> int:
        """Make a dead worker's rows due, but for those that were written; how many are left."""
        last = self._unknown.get(worker)
        if last is None:
            return 0
        with self.transaction() as db:
            db.execute(_DELETE, (worker, json.dumps(written)))
            left = db.execute(_RELEASE, (worker, last)).rowcount
        del self._unknown[worker]
        return left

    def checkpoint(self) -> None:
        """Empty the write-ahead log when it has grown, while nobody waits."""
        if self._db is not None and self.folder is not None:
            with suppress(*_FAILURES):
                if os.stat(f"{self._path}-wal").st_size > _MAX_WAL:
                    self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def lock(self, name: str) -> AbstractContextManager[None]:
        """A lock that the workers of this outbox hold in turn."""
        return nullcontext() if self.folder is None else _Lock(self.folder / name, _LOCK_WAIT)

    def close(self) -> None:
        """Close the database, then let go of the locks."""
        if self._db is not None:
            self._db.close()
        for lock in self._locks.values():
            lock.close()
        self._db, self._locks, self._unknown = None, {}, {}


class _Lock:
    """An exclusive lock between processes, which dies with its process: SQLite's own, on an empty file."""

    def __init__(self, path: Path, wait: float = 0) -> None:
        _create(path)
        self._path = path
        self._db = _connect(path, wait)

    def acquire(self) -> bool:
        try:
            self._db.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as exc:
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                raise
            return False
        return True

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> None:
        if not self.acquire():
            self._db.close()
            raise OSError(f"{self._path} is locked by another process")

    def __exit__(self, *exc: object) -> None:
        self._db.close()


def _connect(path: str | Path, wait: float = 0) -> sqlite3.Connection:
    return sqlite3.connect(path, wait, isolation_level=None, check_same_thread=False)


def _create(path: Path) -> None:
    # With O_EXCL, as to open and close a file that SQLite has open in this process would drop its locks.
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _examine(path: Path) -> None:
    """Raise if the database is damaged or another program's. Reads it so that nothing is changed."""
    wal = Path(f"{path}-wal")
    if not path.exists() or not path.stat().st_size:
        if wal.exists() and wal.stat().st_size:  # SQLite would take the database for new, and remove it
            raise OSError(f"{wal.name} is there without its database")
        return
    alone = "" if wal.exists() else "&immutable=1"
    db = sqlite3.connect(f"{path.as_uri()}?mode=ro{alone}", uri=True, timeout=_LOCK_WAIT)
    try:
        [verdict] = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(verdict)
        application_id = db.execute("PRAGMA application_id").fetchone()[0]
        if application_id != _APPLICATION_ID and db.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise sqlite3.DatabaseError("it is another program's database")
    finally:
        db.close()


# ---------------------------------------------------------------------------------------------------- relay

_TICK = 2.0  # seconds between two looks for what died or was abandoned
_WINDOW = 500  # how many the relay has in hand at once


@dataclass(frozen=True, slots=True)
class _Backoff:
    """Each pause is about as long as the trouble has lasted, so that pauses double."""

    wait_initial: float
    wait_max: float
    give_up: float = math.inf

    def due(self, since: float, now: float) -> float:
        if now - since >= self.give_up:
            return _NEVER
        return now + min(self.wait_max, self.wait_initial + now - since) * random.uniform(0.75, 1)


class _Complaints:
    """Log warnings, in small numbers: a burst, then one a minute that tells how many were left out."""

    def __init__(self, burst: int) -> None:
        self._burst = self._left = burst
        self._next = self._omitted = 0.0

    def __call__(self, message: str, *args: object) -> None:
        now = time.monotonic()
        if self._left <= 0 and now < self._next:
            self._omitted += 1
            return
        self._left -= 1
        self._next = now + 60
        more, self._omitted = self._omitted, 0
        log.warning(message + (" (%d more like it were not logged)" % more if more else ""), *args)

    def reset(self) -> None:
        self._left = self._burst


class _Relay:
    """Delivers: at once, as a request's background task, and again or instead of it, when something went wrong."""

    def __init__(self, outbox: _Outbox, notifier: _LogFile | _Notifier) -> None:
        self._outbox = outbox
        self._notifier = notifier
        self._lifespans = 0
        self._stepping = threading.Lock()
        self._next = 0.0  # when there is something to do, on the monotonic clock
        self._in_hand: set[_Entry] = set()
        self._nap: _Waiter | None = None

    async def deliver(self, entry: _Entry) -> None:
        """A request's background task. Does not raise."""
        if self._outbox.take(entry):
            await self._attempt(entry)
        if not self._lifespans and time.monotonic() >= self._next:
            await self._catch_up()

    async def _attempt(self, entry: _Entry) -> None:
        await self._notifier.attempt(entry)
        if entry.due is not None and entry.due < self._next:
            self._next = entry.due
            self._ring()

    async def _catch_up(self) -> None:
        """With no lifespan, what needs a clock is done with the next traffic."""
        found = True
        while found:
            async with anyio.create_task_group() as tasks:
                found = await self._step(tasks)

    @asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """Refuse to start on an outbox that cannot be used; retry and adopt until the end."""
        await self._outbox.call(self._outbox.database.open)
        async with anyio.create_task_group() as tasks:
            self._lifespans += 1
            tasks.start_soon(self._run, tasks)
            try:
                yield
            finally:
                self._lifespans -= 1
                tasks.cancel_scope.cancel()
        await self._outbox.close()

    async def _run(self, tasks: TaskGroup) -> None:
        while True:
            self._nap = nap = _waiter()
            await self._step(tasks)
            with anyio.move_on_after(self._next - time.monotonic()):
                await nap[0].wait()

    def _ring(self) -> None:
        if self._nap is not None:
            _wake([self._nap])

    async def _step(self, tasks: TaskGroup) -> bool:
        """Adopt what is left, and start to deliver what is due; whether there was any."""
        if not self._stepping.acquire(blocking=False):
            return False
        try:
            self._next = time.monotonic() + _TICK
            for worker, rows in await self._outbox.call(self._outbox.database.unknown):
                written = await self._notifier.written({id for _, id in rows})
                await self._outbox.adopt(worker, [seq for seq, id in rows if id in written])
            entries, due = await self._outbox.claim(_WINDOW - len(self._in_hand))
            self._next = min(self._next, due if len(self._in_hand) < _WINDOW else _NEVER)
            entries = [entry for entry in entries + self._outbox.abandoned() if self._outbox.take(entry)]
            for entry in entries:
                self._in_hand.add(entry)
                tasks.start_soon(self._relay, entry)
            return bool(entries)
        except _FAILURES as exc:
            self._outbox.complain("the relay cannot go on, and will try again: %r", exc)
            return False
        finally:
            self._stepping.release()

    async def _relay(self, entry: _Entry) -> None:
        try:
            await self._attempt(entry)
        finally:
            self._in_hand.discard(entry)
            if not self._in_hand:
                self._ring()


class _Notifier:
    """A notifier of the user's own: called at least once for each notification."""

    def __init__(self, notify: Callable[[Notification], Any], concurrency: int, outbox: _Outbox) -> None:
        self._notify = notify
        self._outbox = outbox
        self._is_async = inspect.iscoroutinefunction(notify) or inspect.iscoroutinefunction(
            getattr(notify, "__call__", None)
        )
        self._threads: _Group[_Entry] = _Group(self._call, "notify", threads=concurrency, most=1)
        self._backoff = _Backoff(1.0, 15 * 60.0, _DAY)
        self._complain = _Complaints(burst=50)

    async def attempt(self, entry: _Entry) -> None:
        if not self._is_async:
            await self._threads.run(entry)
            return
        try:
            await self._notify(_parse(entry.line))
        except BaseException as exc:
            self._settle(entry, exc)
            if not isinstance(exc, Exception):  # a cancellation goes on
                raise
        else:
            self._settle(entry)

    async def written(self, ids: set[str]) -> set[str]:
        return set()  # only the notifier knows, and it can tell by the id

    def _call(self, entries: list[_Entry]) -> None:
        [entry] = entries
        try:
            result = self._notify(_parse(entry.line))
            if inspect.isawaitable(result):
                raise TypeError("notify returned an awaitable, which nobody awaits: make it an async def")
        except BaseException as exc:
            self._settle(entry, exc)
        else:
            self._settle(entry)

    def _settle(self, entry: _Entry, error: BaseException | None = None) -> None:
        first = entry.since is None
        self._outbox.settle([entry], self._backoff, error)
        if entry.due == _NEVER:
            log.error("notification %s failed for a day, and is set aside until the next start: %r", entry.id, error)
        elif error is not None and first:
            self._complain("notification %s failed, and will be tried again: %r", entry.id, error)


# ------------------------------------------------------------------------------------------------- log file


class _LogFile:
    """The default notifier: appends lines to a file, each exactly once."""

    def __init__(self, path: str | os.PathLike[str], delay: float, fsync: bool, outbox: _Outbox) -> None:
        self._path = Path(path).absolute()
        self._delay = delay
        self._fsync = fsync
        self._outbox = outbox
        self._lines: _Group[_Entry] = _Group(self._append, "notify-log")
        self._searches: _Group[_Call[set[str]]] = _Group(_run_calls, "notify-search")
        self._backoff = _Backoff(0.1, 30.0)
        self._complain = _Complaints(burst=1)

    async def attempt(self, entry: _Entry) -> None:
        if self._delay:
            try:
                await anyio.sleep(self._delay)
            except BaseException as exc:
                self._settle([entry], exc)
                raise
        await self._lines.run(entry)

    async def written(self, ids: set[str]) -> set[str]:
        """Which of these ids have their line already: in the log, or in a file that it was renamed to."""
        call = await self._searches.run(_Call(partial(_search, self._path, ids)))
        if call.error is not None:
            raise call.error
        return call.result or set()

    def _append(self, entries: list[_Entry]) -> None:
        lines = "".join(f"{entry.line}\n" for entry in entries).encode()
        try:
            with self._open() as file, self._outbox.database.lock("log.lock"):
                _append(file, lines, self._fsync)
        except _FAILURES as exc:
            self._settle(entries, exc)
        else:
            self._settle(entries)

    @contextmanager
    def _open(self) -> Iterator[int]:
        # By its name each time, so that it can be renamed. A FIFO must not be read here: it would have a reader.
        mode = os.O_WRONLY if self._path.exists() and not self._path.is_file() else os.O_RDWR
        file = os.open(self._path, mode | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o600)
        try:
            yield file
        finally:
            os.close(file)

    def _settle(self, entries: list[_Entry], error: BaseException | None = None) -> None:
        self._outbox.settle(entries, self._backoff, error)
        if error is None:
            self._complain.reset()
        else:
            waiting = "%s cannot be written; %d lines wait, that of %s first, and will be tried again: %r"
            self._complain(waiting, self._path, len(entries), entries[0].id, error)


def _run_calls(calls: list[_Call[Any]]) -> None:
    for call in calls:
        try:
            call.result = call.function()
        except _FAILURES as exc:
            call.error = exc


def _append(file: int, lines: bytes, fsync: bool) -> None:
    """Append in whole or not at all, and never to a torn line, which a crash or a full disk may leave."""
    if not stat.S_ISREG(os.fstat(file).st_mode):
        while lines:
            lines = lines[os.write(file, lines) :]
        return
    end = _cut_torn_line(file)
    try:
        while lines:
            lines = lines[os.write(file, lines) :]
        if fsync:
            os.fsync(file)
    except OSError:
        os.ftruncate(file, end)
        raise


def _cut_torn_line(file: int) -> int:
    size = end = os.fstat(file).st_size
    while end:
        start = max(0, end - 4096)
        os.lseek(file, start, os.SEEK_SET)
        newline = os.read(file, end - start).rfind(b"\n")
        end = start + newline + 1 if newline >= 0 else start
        if newline >= 0:
            break
    if end != size:
        os.ftruncate(file, end)
    return end


def _search(path: Path, ids: set[str]) -> set[str]:
    """The ids among these that have a complete line in the log, or in a file that was renamed from it."""
    wanted, found = {id.encode() for id in ids}, set()
    for file in path.parent.glob(f"{glob.escape(path.stem)}*"):
        if file.is_file():
            with file.open("rb") as lines:
                found |= {line[_ID] for line in lines if line[_ID] in wanted and line.endswith(b"\n")}
    return {id.decode() for id in found}


# --------------------------------------------------------------------------------------------------- the app


def create_app(
    notify: Callable[[Notification], Any] | None = None,
    *,
    log: str | os.PathLike[str] = "log.txt",
    outbox: str | os.PathLike[str] = "outbox",
    delay: float = 0.0,
    concurrency: int = 40,
    max_pending: int = 10_000,
    token: str | None = None,
    fsync: bool = True,
) -> Starlette:
    """Make the service. Opens, creates and starts nothing: the first request or the lifespan does.

    Args:
        notify: Called with each Notification: a ``def`` on a thread of the service's own, an ``async def`` on
            the caller's event loop. None appends the notification's line to ``log``.
        log: The file that the default notifier appends to.
        outbox: The folder where what is accepted and not yet delivered is kept; ``":memory:"`` keeps nothing
            on disk.
        delay: Seconds that the default notifier waits before it writes.
        concurrency: How many ``def`` notifiers may run at once.
        max_pending: How many accepted notifications may be undelivered at once; past it, the answer is 503.
        token: What ``POST`` wants as ``Authorization: Bearer <token>``.
        fsync: True: what was acknowledged also survives a loss of power. False: it survives the process.

    Raises:
        TypeError, ValueError: A setting makes no sense; names it, its value and the rule.
    """
    given: dict[str, Any] = {"log": log, "outbox": outbox, "delay": delay, "concurrency": concurrency}
    given |= {"max_pending": max_pending, "token": token, "fsync": fsync}
    for name, value in given.items():
        _check(_SETTINGS[name], name, value)
    if notify is not None and not callable(notify):
        raise TypeError(f"notify must be a callable of one Notification, not {notify!r}")
    kept = _Outbox(outbox, max_pending, fsync)
    notifier = _LogFile(log, delay, fsync, kept) if notify is None else _Notifier(notify, concurrency, kept)
    relay = _Relay(kept, notifier)
    api = _Api(kept, relay, token)
    routes = [
        _ExactRoute("/send-notification/{email:path}", api.send_notification, methods=["POST"]),
        _ExactRoute("/health", api.health),
        _ExactRoute("/openapi.json", api.openapi),
    ]
    handlers: dict[Any, Any] = {HTTPException: _refuse, ClientDisconnect: _forget_client, Exception: _refuse}
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=relay.lifespan)


app = create_app(**_environment())

if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
