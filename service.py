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

Run it with ``uvicorn service:app``, or embed ``create_app()``, which lists the settings; each has an environment
variable too, ``NOTIFY_`` and its name in capitals.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import io
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import sqlite3
import struct
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from traceback import format_exception_only
from typing import Any, NamedTuple

import anyio.to_thread
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

log = logging.getLogger("notify")

# ---------------------------------------------------------------------------------------------------- settings

_SWITCH = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
# Of each: how it is read from a variable, whether it makes sense (True is no number), and the rule.
_SETTINGS: dict[str, tuple[Callable[[str], Any], Callable[[Any], object], str]] = {
    "log": (str, lambda v: isinstance(v, str | Path) and re.fullmatch(r"[^\0]+", str(v)), "the path of a file"),
    "outbox": (str, lambda v: isinstance(v, str | Path) and re.fullmatch(r"[^\0]+", str(v)), "the path of a folder"),
    "delay": (float, lambda v: type(v) in (int, float) and 0 <= v < math.inf, "seconds, 0 or more"),
    "concurrency": (int, lambda v: type(v) is int and v > 0, "a whole number of at least 1"),
    "max_pending": (int, lambda v: type(v) is int and v > 0, "a whole number of at least 1"),
    "token": (str, lambda v: v is None or (type(v) is str and re.fullmatch("[!-~]+", v)), "visible ASCII characters"),
    "fsync": (lambda text: _SWITCH[text.lower()], lambda v: type(v) is bool, "true or false"),
}


def _check(notify: object, **settings: object) -> None:
    if notify is not None and not callable(notify):
        raise TypeError(f"notify must be callable with a Notification, not {notify!r}")
    for name, (_, makes_sense, rule) in _SETTINGS.items():
        if not makes_sense(settings[name]):
            raise ValueError(f"{name} (NOTIFY_{name.upper()}) must be {rule}, not {settings[name]!r}")


def _environment() -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, (read, *_) in _SETTINGS.items():
        with suppress(KeyError, ValueError):
            settings[name] = os.environ[f"NOTIFY_{name.upper()}"]
            settings[name] = read(settings[name])  # if this fails it stays a text, which is refused
    return settings


# ------------------------------------------------------------------------------------------------ notification

_ID = slice(25, 57)  # where a line has its id: after 24 characters of time and a space


@dataclass(frozen=True, slots=True)
class Notification:
    """What a notifier is called with; ``accepted_at`` is in UTC, in ISO 8601 with milliseconds."""

    id: str  # unique, and the same at every attempt
    email: str
    message: str  # exactly as it was sent
    accepted_at: str


@dataclass(slots=True, eq=False)
class _Entry:
    """A notification on its way."""

    line: str  # at first without time and id; "": only asks the writer whether it can write, or the log to be synced
    among: set[_Entry] = field(repr=False)  # those of the same origin that are not delivered
    key: str | None = None
    digest: str = ""  # of what a repeated key must come with, too
    seq: int = 0  # its number in the outbox; 0: it is not there
    replayed: str = ""  # the id that its key was given first
    error: HTTPException | None = None  # the refusal; also None if the outbox cannot be written: see failure
    failure: str = ""  # why the outbox cannot be written
    since: float | None = None  # when it failed first, on the monotonic clock
    due: float = 0.0  # when the relay may deliver it; inf: it is set aside; nan: not yet looked for in the log


def _text_of(email: str, message: str) -> str:
    """What is not printable is escaped: one notification is one line, and no message can forge another's."""
    if "\\" in message or not message.isprintable():
        message = "".join(c if c.isprintable() and c != "\\" else c.encode("unicode_escape").decode() for c in message)
    return f"notification for {email}: {message}"


def _read_line(line: str) -> Notification:
    accepted_at, id, _, _, email, message = line.split(" ", 5)
    message = message.encode("latin-1", "backslashreplace").decode("unicode_escape")
    return Notification(id, email.removesuffix(":"), message, accepted_at)


# --------------------------------------------------------------------------------------------------- endpoints

# https://html.spec.whatwg.org/multipage/input.html#valid-e-mail-address
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
_EMAIL = rf"^[a-zA-Z0-9.!#$%&'*+\/=?^_`{{|}}~-]{{1,64}}@{_LABEL}(?:\.{_LABEL})*$"
_is_email = re.compile(_EMAIL).fullmatch  # ^ and $ are for readers of the OpenAPI document
# By default Python accepts NaN, which int refuses, and refuses integers of more than 4,300 digits.
_read_json = json.JSONDecoder(parse_int=float, parse_constant=int).decode
_MESSAGE = "some notification"
_RETRY = {"Retry-After": "1"}  # seconds
_DETAILS = {  # of what the framework raises
    404: "Nothing is here: see /openapi.json for what there is.",
    405: "Use one of the methods that the Allow header names.",
    500: "The service failed: ask whoever runs it to look in its log.",
}


class _Accepted(JSONResponse):
    """The 202, made in one step, as all of it but the id is known."""

    def __init__(self, entry: _Entry, background: BackgroundTask) -> None:
        self.status_code, self.background = 202, background
        id = (entry.replayed or entry.line[_ID]).encode()
        self.body = b'{"id":"%b","message":"Notification sent in the background"}' % id
        self.raw_headers = [(b"content-length", b"%d" % len(self.body)), (b"content-type", b"application/json")]
        if entry.replayed:
            self.raw_headers.append((b"idempotent-replayed", b"true"))


class _Api:
    def __init__(self, outbox: _Outbox, relay: _Relay, token: str | None) -> None:
        self._outbox, self._relay, self._token, self._catch_up = outbox, relay, token, BackgroundTask(relay.catch_up)

    async def send_notification(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict([*scope["headers"]][::-1])  # of two with one name the first
        if self._token is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(given.strip(), self._token.encode()):
                raise HTTPException(401, "Send Authorization: Bearer <token>.", {"WWW-Authenticate": "Bearer"})
        email = scope["path_params"]["email"].removesuffix("/")  # as {email:path} takes it, too
        if len(email) > 254 or not _is_email(email):
            raise HTTPException(422, "Name one whole e-mail address in the path, such as user@example.com.")
        key = headers.get(b"idempotency-key")
        if key is not None and not re.fullmatch(b"[ -~]{1,255}", key):
            raise HTTPException(400, "Make Idempotency-Key 1 to 255 printable ASCII characters.")
        message = await _read_message(headers.get(b"content-type", b""), receive)
        digest = hashlib.sha256(f"{email}\n{message}".encode()).hexdigest() if key else ""
        entry = _Entry(_text_of(email, message), self._outbox.accepted, key and key.decode(), digest)
        loop = _this_loop()
        await self._outbox.writer.run(entry, loop)
        if not entry.seq and not entry.replayed:
            raise entry.error or HTTPException(503, "The outbox cannot be written: try again later.", _RETRY)
        await _Accepted(entry, _Delivery(self._relay, entry, loop))(scope, receive, send)

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        error, pending, failed = await self._outbox.probe()
        code, headers, status = (503, _RETRY, f"the outbox cannot be written: {error}") if error else (200, None, "ok")
        status = status.encode(errors="backslashreplace").decode()  # as a path need not be Unicode
        content = {"status": status, "pending": pending, "failed": failed}
        await JSONResponse(content, code, headers, background=self._catch_up)(scope, receive, send)

    async def openapi(self, scope: Scope, receive: Receive, send: Send) -> None:
        await JSONResponse(_OPENAPI | {"servers": [{"url": scope.get("root_path") or "/"}]})(scope, receive, send)

    async def refuse(self, request: object, exc: Exception) -> JSONResponse:
        """The answer to every error; the framework logs what is no HTTPException."""
        error = exc if isinstance(exc, HTTPException) else HTTPException(500)
        content = {"detail": _DETAILS.get(error.status_code, error.detail)}
        return JSONResponse(content, error.status_code, error.headers, background=self._catch_up)


async def _read_message(content_type: bytes, receive: Receive) -> str:
    body, more = b"", True
    while more:
        event = await receive()
        if event["type"] == "http.disconnect":
            raise HTTPException(400, "Send the whole body.")  # nobody is there to read it
        body, more = body + event.get("body", b""), event.get("more_body", False)
        if len(body) > 64 * 1024:
            raise HTTPException(413, "Send a body of at most 64 KiB.")
    if not body:
        return _MESSAGE
    if content_type.partition(b";")[0].strip().lower() != b"application/json":
        raise HTTPException(415, "Send the body as Content-Type: application/json, or send none.")
    try:
        content = _read_json(body.decode())
    except (ValueError, RecursionError):
        raise HTTPException(400, "Send a body that is JSON in UTF-8.") from None
    if not isinstance(content, dict) or not content.keys() <= {"message"}:
        raise HTTPException(422, "Send a JSON object with no other key than message.")
    message = content.get("message", _MESSAGE)
    if not isinstance(message, str) or not re.fullmatch("[^\ud800-\udfff]{0,10000}", message):
        raise HTTPException(422, "Make message a string of at most 10,000 characters, with no lone surrogate.")
    return message


# ------------------------------------------------------------------------------------------------ group commit
#
# Goals: the event loop waits for no disk and no notifier. No hop between threads, no commit and no wake-up for each
# notification, but one for all that is queued. Nothing belongs to one event loop, as one app may serve several.
#
# Plan: `run` queues an entry and returns a future. A thread is started, or woken two turns of the loop later; it takes
# all that is queued (a `def` notifier's takes one), handles it, and has each loop release those who wait, with one
# call. What comes meanwhile is the next batch, so that batches grow with the load. A thread that gets nothing for a
# while ends; if it was woken meanwhile, it first handles an empty list, for what was put off. Every queued entry is
# handled, even if nobody waits for it any more.

_LINGER = 0.05  # seconds that a thread waits for entries, and at least between two syncs
_PAUSE, _FEW = 0.002, 16  # seconds that the log's thread rests after a batch, if it is of fewer entries than this


class _TrioFuture:
    """The part of an asyncio future that is used here, for trio."""

    def __init__(self) -> None:
        event = anyio.Event()
        self.done, self.set_result, self._wait = event.is_set, lambda _: event.set(), event.wait

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()


class _TrioLoop(NamedTuple):
    """The part of an asyncio loop that is used here, for trio; two of one run are equal."""

    call_soon: Callable[..., None]
    call_soon_threadsafe: Callable[..., None]
    create_future: Callable[[], _TrioFuture] = _TrioFuture


def _this_loop() -> Any:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        from anyio.lowlevel import current_token  # here, so that to import this module takes no longer

        token: Any = current_token().native_token
        return _TrioLoop(token.run_sync_soon, token.run_sync_soon)


def _release(waiters: list[Any]) -> None:
    for waiter in waiters:
        if not waiter.done():  # it is, if whoever awaited it was cancelled
            waiter.set_result(None)


class _Group:
    """One thread that handles all that is queued; or, if most is given, so many that handle one entry at a time."""

    def __init__(self, handle: Callable[..., None], fail: Callable[..., None], most: int = 0, pause: float = 0) -> None:
        self._handle, self._fail, self._pause = handle, fail, pause
        self._max_threads, self._at_once = (most, 1) if most else (1, 1_000_000)  # threads, and entries for each
        self.queued: list[tuple[_Entry, Any, Any]] = []  # each with its waiter, and the waiter's loop
        self._lock = threading.RLock()  # no Lock: garbage is collected within, which may run a host's code that posts
        self._bell = queue.SimpleQueue[None]()  # wakes a thread for each item, at times in vain
        self._threads, self._busy = 0, 0  # all, and those that are at work
        self._woken = False  # so that a thread handles an empty list if nothing is queued
        self._waking: Any = None  # the loop that will call wake; without the lock, as this may cost a call too many

    def run(self, entry: _Entry, loop: Any) -> Any:
        """Queue the entry; what this returns is to be awaited, by the loop, which is the running one."""
        waiter = loop.create_future()
        self.queued.append((entry, waiter, loop))
        if not self._threads:
            if not self.wake():
                return self._wait_without_thread(waiter)
        elif self._waking != loop:
            loop.call_soon(loop.call_soon, self.wake)  # in the next turn but one; once for many
            self._waking = loop
        return waiter

    async def _wait_without_thread(self, waiter: Any) -> None:
        while not (waiter.done() or self.wake()):
            await anyio.sleep(_POLL)
        await waiter

    def wake(self) -> bool:
        """Have a thread handle what is queued, or if that is nothing, what was put off; False: no thread can be had."""
        self._waking = None
        with self._lock:
            self._woken = True
            wanted = max(1, len(self.queued))
            for _ in self.queued[self._bell.qsize() : self._max_threads]:
                self._bell.put(None)
            with suppress(RuntimeError, MemoryError):
                while self._threads < min(self._busy + wanted, self._max_threads):
                    threading.Thread(target=self._work, name="notify", daemon=True).start()
                    self._threads += 1
            return self._threads > 0

    def _take(self) -> list[tuple[_Entry, Any, Any]] | None:
        """What is queued, once something is; empty: to see to what was put off; None: this thread has to end."""
        try:
            while not self.queued:
                self._bell.get(timeout=_LINGER)
        except queue.Empty:
            with self._lock:
                if not self._woken:
                    self._threads -= 1  # run does it the other way round: it queues, and then looks for a thread
                    if not self.queued:
                        return None
                    self._threads += 1
        with self._lock:
            self._woken = False
            taken = self.queued[: self._at_once]
            del self.queued[: len(taken)]  # and no others: run queues without the lock
            self._busy += 1
            return taken

    def _work(self) -> None:
        while (taken := self._take()) is not None:
            entries = [entry for entry, _, _ in taken]
            new = [entry for entry in entries if entry.line]
            try:
                self._handle(new, len(new) < len(entries))
            except BaseException as exc:  # whatever it is, the thread goes on, and nobody waits for ever
                with suppress(BaseException):
                    self._fail(entries, exc)
            for loop in {loop for _, _, loop in taken}:
                with suppress(Exception):  # the loop is closed, so that nobody waits
                    loop.call_soon_threadsafe(_release, [waiter for _, waiter, its_loop in taken if its_loop == loop])
            if self._pause and len(taken) < _FEW:  # let more gather, as no answer waits for this thread
                time.sleep(self._pause)
            with self._lock:
                self._busy -= 1


# ------------------------------------------------------------------------------------------------------ outbox

_PROBE = "INSERT OR REPLACE INTO probe (rowid, filler) VALUES (1, randomblob(16384))"
_LAYOUT = """
PRAGMA page_size = 2048;    -- bytes: most commits change a line or a few, and write whole pages
PRAGMA auto_vacuum = FULL;  -- as it empties, the file gets smaller, and most commits change fewer pages
"""
_SCHEMA = f"""
BEGIN;
CREATE TABLE IF NOT EXISTS pending (  -- what is accepted and not delivered
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    worker TEXT NOT NULL,  -- whose it is: that of the holder of WORKER.lock
    line TEXT NOT NULL     -- as in the log
);
CREATE TABLE IF NOT EXISTS keys (key TEXT PRIMARY KEY, id TEXT NOT NULL, digest TEXT NOT NULL, at REAL NOT NULL)
    WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS keys_at ON keys (at);
CREATE TABLE IF NOT EXISTS probe (filler BLOB);  -- what is written to see whether it can be
{_PROBE};
COMMIT;
PRAGMA wal_checkpoint(TRUNCATE);  -- so that damage to the file shows
"""
_CHECK = "SELECT * FROM pragma_quick_check, (SELECT count(*) FROM sqlite_schema) LIMIT 1"
_IS_OURS = "SELECT seq, worker, line, key, id, digest, at, filler FROM pending, keys, probe LIMIT 0"  # or an error
# One statement for many rows, as with each the thread gives up the interpreter, and has to get it back.
_INSERT = "INSERT INTO pending (worker, line) SELECT ?, value FROM json_each(?)"
_DELETE = "DELETE FROM pending WHERE seq IN (SELECT value FROM json_each(?))"
_OTHERS = "SELECT DISTINCT worker FROM pending WHERE worker != ?"
_LEFT = "SELECT seq FROM pending WHERE worker IN (SELECT value FROM json_each(?)) LIMIT 500"
_CLAIM = f"UPDATE pending SET worker = ? WHERE seq IN ({_LEFT}) RETURNING line, seq"
_FORGET_KEYS = "DELETE FROM keys WHERE key IN (SELECT key FROM keys WHERE at < ? LIMIT 1000)"
_KEEP_KEY = "INSERT OR REPLACE INTO keys VALUES (?, ?, ?, ?)"
_FIND_KEY = "SELECT id, digest FROM keys WHERE key = ? AND at >= ?"

# Locks are SQLite's own, which die with their process: _LOCK is held until it is closed, _LOG_LOCK by transactions.
_LOCK = "PRAGMA journal_mode = OFF; BEGIN EXCLUSIVE"  # on an empty file, where there is nothing to roll back
_LOG_LOCK = "CREATE TABLE IF NOT EXISTS filler (filler)"  # as to commit in an empty file would need room on the disk

_DAY = 24 * 60 * 60.0  # seconds
_BUSY_WAIT, _LOCK_WAIT = 2.0, 10.0  # seconds to wait for another worker's commit, and for its start or its lines
_LATE = 2.0  # seconds that the relay leaves an entry to its request's task
_MOST_ADOPTED = 20_000  # that were adopted and not yet tried; past it, the others wait with the dead


class _Outbox:
    """What is accepted and not yet delivered, in SQLite, and the thread that writes it down."""

    def __init__(self, folder: str | Path, max_pending: int, fsync: bool) -> None:
        self._folder = Path(folder) if str(folder) == ":memory:" else Path(folder).absolute()
        self._on_disk = self._folder.is_absolute()
        self._path, self._wal = self._folder / "outbox.db", self._folder / "outbox.db-wal"
        self._pragmas = f"""
            PRAGMA journal_mode = WAL;       -- readers do not wait for the writer
            PRAGMA synchronous = {"FULL" if fsync else "NORMAL"};     -- FULL: a commit is on the disk
            PRAGMA wal_autocheckpoint = 256; -- pages: the WAL shall not fill a small disk; see adopt, too
            PRAGMA busy_timeout = 1;         -- ms: _transaction tries again, and adopt at its next look
        """
        self._max_pending = max_pending
        self.writer, self._warn = _Group(self._write, self._refuse), _Warnings(1)
        self.accepted: set[_Entry] = set()  # those that are ours and not delivered, of this process's requests
        self._adopted: set[_Entry] = set()  # and those that the dead left
        self.waiting: dict[_Entry, bool] = {}  # those neither in hand nor set aside: whoever pops one has it
        self.unsynced: list[_Entry] = []  # the relay's: what is in the log, but perhaps not yet on its disk
        self._undeleted: list[int] = []  # what is delivered; the rows go with the next commit
        self._db: sqlite3.Connection | None = None
        self._lock = threading.RLock()  # held while it is opened, written or closed
        self.adopting = threading.Lock()  # held by adopt and by close

    async def probe(self) -> tuple[str, int, int]:
        """Why it cannot be written, or ""; how many are pending (not set aside); how many of all failed last time."""
        entry = _Entry("", set())
        await self.writer.run(entry, _this_loop())  # and so what was put before it is written first
        ours = [*self.accepted, *self._adopted]
        return entry.failure, sum(one.due != math.inf for one in ours), sum(one.since is not None for one in ours)

    def settle(self, entries: list[_Entry], synced: bool = True) -> None:
        """Count these as delivered; their rows go with the next commit; if unsynced, once this is called again."""
        if synced:
            self._undeleted += [entry.seq for entry in entries]
            self.writer.wake()
        for entry in entries:
            entry.among.discard(entry)

    def _write(self, new: list[_Entry], probed: bool) -> None:
        """Keep what is new, and delete what is delivered; if probed, see whether it can be written, too."""
        with self._lock:
            undeleted = self._undeleted.copy()
            if not (new or probed or undeleted):
                return
            # Once for all, and before other workers wait for our transaction, as each call may give up the interpreter.
            accepted_at = datetime.now(UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
            ids = secrets.token_hex(16 * len(new))
            with _transaction(self.open()) as db:
                if undeleted:
                    db.execute(_DELETE, (json.dumps(undeleted),))
                fresh = self._admit(db, new, accepted_at, ids)
                last = db.execute(_INSERT, (self._worker, _json_of([entry.line for entry in fresh]))).lastrowid or 0
                if probed:
                    db.execute(_PROBE)
            del self._undeleted[: len(undeleted)]
            late = time.monotonic() + _LATE
            for seq, entry in enumerate(fresh, last - len(fresh) + 1):
                entry.seq, entry.due = seq, late
            self.accepted.update(fresh)
            self.waiting |= dict.fromkeys(fresh, True)
            if probed:
                with suppress(sqlite3.Error):
                    db.execute("PRAGMA wal_checkpoint")  # so that the probe does not take the room that it has found

    def _refuse(self, new: list[_Entry], error: BaseException) -> None:
        for entry in new:  # whatever the error is, there is no 202
            entry.replayed, entry.error, entry.failure = "", None, str(error) or repr(error)
        self._warn("the outbox cannot be written, and answers are 503", error)
        if getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_IOERR:
            with suppress(Exception):  # over the failed commit, which may be whole in the WAL, for a start to replay
                self._write([], probed=True)

    def _admit(self, db: sqlite3.Connection, new: list[_Entry], accepted_at: str, ids: str) -> list[_Entry]:
        """Those to be kept; the others have the id of an earlier one, or an error."""
        now, room = time.time(), self._max_pending - len(self.accepted)
        fresh: list[_Entry] = []
        for i, entry in enumerate(new):
            known = db.execute(_FIND_KEY, (entry.key, now - _DAY)).fetchone() if entry.key else None
            if known and known[1] != entry.digest:
                entry.error = HTTPException(422, "Use another Idempotency-Key: this one came with other content.")
            elif known:
                entry.replayed = known[0]
            elif len(fresh) >= room:
                entry.error = HTTPException(503, "Too many notifications are pending: try again later.", _RETRY)
            else:
                entry.line = f"{accepted_at} {ids[32 * i : 32 * i + 32]} {entry.line}"
                fresh.append(entry)
                if entry.key:
                    db.execute(_KEEP_KEY, (entry.key, entry.line[_ID], entry.digest, now))
        if any(entry.key for entry in fresh):
            db.execute(_FORGET_KEYS, (now - _DAY,))  # _claim does, too; in memory it has another database
        return fresh

    def open(self) -> sqlite3.Connection:
        """The connection; or raise OSError, and leave what cannot be used as it is."""
        try:
            with self._lock:
                if self._db is None:
                    self._db = self._start()
                elif self._on_disk and (self._path.stat().st_ino != self._inode or not os.access(self._wal, os.F_OK)):
                    # Not a stat of the WAL: its next write would record the time anew, which costs I/O at each commit.
                    raise OSError("it was replaced while it was in use")
        except (OSError, sqlite3.Error) as exc:
            remedy = "mend it, or move it away while no worker runs, or name another (NOTIFY_OUTBOX, outbox=)"
            raise OSError(f"the outbox {self._folder} cannot be used, {exc}: {remedy}") from exc
        return self._db

    def _start(self) -> sqlite3.Connection:
        if self._on_disk:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for parent in self._folder.parents:
                _sync_folder(parent)
        log.info("opening the outbox %s", self._path)
        with _connected(self._folder / "outbox.lock", _LOCK), ExitStack() as opened:
            self.log_lock = opened.enter_context(_connected(self._folder / "log.lock", _LOG_LOCK))
            is_new = not self._on_disk or _is_new(self._path, self._wal)
            script = _LAYOUT + self._pragmas + _SCHEMA if is_new else self._pragmas
            db, self._adopt_db = (opened.enter_context(_connected(self._path, script)) for _ in range(2))
            self._inode = self._path.stat().st_ino if self._on_disk else 0
            list(self._dead_of(path.stem for path in self._folder.glob("[0-9a-f]" * 16 + ".lock")))  # whose locks go
            self._worker = secrets.token_hex(8)
            opened.enter_context(_connected(self._folder / f"{self._worker}.lock", _LOCK))
            self._let_go = weakref.finalize(self, opened.pop_all().close)  # called by close, or when the app is dropped
            self._let_go.atexit = False  # as threads may be at work then
            return db

    def close(self) -> None:
        """Close it, unless an entry is in hand or may still be taken; its rows stay for whoever adopts them."""
        with self.adopting, self._lock, _connected(self._folder / "outbox.lock", _LOCK):  # nobody starts meanwhile
            now = time.monotonic()
            old = [entry for entry in list(self.waiting) if entry.since is not None or not entry.due > now]  # nan, too
            left = [entry for entry in old if self.waiting.pop(entry, False)]  # so that nobody takes it
            pending = sum(entry.due != math.inf for entry in [*self.accepted, *self._adopted])
            if len(left) < pending or self.unsynced or self._undeleted or not self._on_disk:
                self.waiting |= dict.fromkeys(left, True)
                return  # in hand, soon to be, not yet synced or deleted, or in memory: it stays open
            self._db = None
            for kept in (self.accepted, self._adopted, self.waiting):
                kept.clear()  # and not replaced, as a request that has not been written yet holds the first
            self._let_go()
            (self._folder / f"{self._worker}.lock").unlink(missing_ok=True)

    def adopt(self, find_delivered: Callable[[set[str]], set[str]]) -> None:
        """Make ours what the dead left, less what the log has; waits for the disk, and for the search of the log."""
        with self.adopting:
            self.open()
            if self._undeleted:
                self.writer.wake()  # so that it tries again
            dead = list(self._dead_of(worker for (worker,) in self._adopt_db.execute(_OTHERS, (self._worker,))))
            untried = sum(entry.since is None for entry in list(self._adopted))
            try:
                self._adopt_db.execute("PRAGMA wal_checkpoint(TRUNCATE)")  # or the WAL never gets smaller
                while untried < _MOST_ADOPTED and (claimed := self._claim(dead)):
                    untried += claimed
            finally:  # also for what an earlier look has claimed and could not search for
                if unsearched := [entry for entry in list(self.waiting) if math.isnan(entry.due)]:
                    log.info("looking in the log for %d notifications that the dead left", len(unsearched))
                    ids = find_delivered({entry.line[_ID] for entry in unsearched})
                    delivered = [entry for entry in unsearched if entry.line[_ID] in ids]
                    for entry in delivered:
                        del self.waiting[entry]
                    self.settle(delivered)
                    for entry in unsearched:
                        entry.due = 0.0

    def _dead_of(self, workers: Iterator[str]) -> Iterator[str]:
        """Those whose lock nobody holds; the lock is removed. No name is used twice: the dead stay dead."""
        # A worker locks before its first row. One without rows may be about to lock, unless we hold outbox.lock.
        for worker in workers:
            with suppress(sqlite3.Error, OSError):  # it lives, or this is no lock of ours
                with _connected(self._folder / f"{worker}.lock", _LOCK, wait=0):
                    yield worker
                (self._folder / f"{worker}.lock").unlink()

    def _claim(self, dead: list[str]) -> int:
        """Make ours a batch of what the dead left, as other workers' commits wait meanwhile; how many these are."""
        with _transaction(self._adopt_db) as db:
            db.execute(_FORGET_KEYS, (time.time() - _DAY,))  # a batch of them, too, even if nobody is dead
            rows = db.execute(_CLAIM, (self._worker, json.dumps(dead))).fetchall()
        adopted = [_Entry(line, self._adopted, seq=seq, due=math.nan) for line, seq in rows]
        self._adopted.update(adopted)
        self.waiting |= dict.fromkeys(adopted, True)
        return len(rows)


def _json_of(lines: list[str]) -> str:
    """An array of lines, in a third of json's time: of what is printable, JSON escapes only backslashes and quotes."""
    text = "\n".join(lines).replace("\\", r"\\").replace('"', r"\"").replace("\n", '","')
    return f'["{text}"]' if text else "[]"


def _transaction(db: sqlite3.Connection) -> sqlite3.Connection:
    deadline = time.monotonic() + _BUSY_WAIT
    while not db.in_transaction:
        try:
            db.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as exc:  # SQLite's own pauses grow: the longest to wait would starve
            if exc.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
    return db  # as a context manager it commits, or rolls back


@contextmanager
def _connected(path: Path, script: str = "", wait: float = _LOCK_WAIT) -> Iterator[sqlite3.Connection]:
    name = path if path.is_absolute() else ":memory:"
    with closing(sqlite3.connect(name, timeout=wait, isolation_level=None, check_same_thread=False)) as db:
        if path.is_absolute():
            path.chmod(0o600)  # only now: to open and close it ourselves would drop this process's locks on it
        db.text_factory = lambda text: text.decode(errors="backslashreplace")  # one bad row shall not stop all
        db.executescript(script)
        yield db


def _is_new(path: Path, wal: Path) -> bool:
    """Whether the database is still to be filled; makes its file. Raises, and changes nothing, if it is unusable."""
    size, changes = path.stat().st_size if path.exists() else 0, b""
    with suppress(FileNotFoundError):  # it goes when the last of all closes the database
        changes = wal.read_bytes()
    if not size and not changes:
        path.touch(0o600)  # for nobody else, from the first moment
        return True
    if size < 512 or (any(changes) and not _is_wal_header(changes[:32].ljust(32))):
        raise OSError(f"{path.name} or its WAL is damaged")  # though SQLite would do without the WAL, and remove it
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable={not wal.exists():d}", uri=True)) as db:
        [[verdict, tables]] = db.execute(_CHECK)
        if verdict != "ok":
            raise OSError(verdict)
        if tables:
            db.execute(_IS_OURS)
    return not tables  # as when the disk was full, or the process killed, while it was made


def _is_wal_header(header: bytes) -> bool:
    """https://www.sqlite.org/fileformat2.html#the_write_ahead_log"""
    a = b = 0
    for x, y in struct.iter_unpack(">II" if header[3] & 1 else "<II", header[:24]):
        a = (a + x + b) % 2**32
        b = (b + y + a) % 2**32
    return header[:3] == b"\x37\x7f\x06" and header[24:] == struct.pack(">II", a, b)


def _sync_folder(folder: Path) -> None:
    """Have the names of new files on the disk, where a folder can be opened."""
    with suppress(OSError), ExitStack() as opened:
        opened.callback(os.close, file := os.open(folder, os.O_RDONLY))
        os.fsync(file)


# ------------------------------------------------------------------------------------------------------- relay

_LOOK = 2.0  # seconds between two looks for what the dead left
_POLL = 0.05  # seconds between two looks for what is due, or for a thread where none could be had
_DRAIN, _FLUSH = 10.0, 2.0  # seconds at the end for what the relay has in hand, and for the last writes
_LOG_PAUSES = 0.1, 30.0, math.inf  # seconds: the first pause, the longest, and when it is set aside
_OWN_PAUSES = 1.0, 900.0, _DAY


class _Delivery(BackgroundTask):
    """The task of a 202, which Starlette need not look up how to call; after a replay there is nothing to deliver."""

    def __init__(self, relay: _Relay, entry: _Entry, loop: Any) -> None:
        self._relay, self._entry, self._loop = relay, entry, loop

    def __call__(self) -> Any:
        return self._relay.deliver(self._entry, self._loop)


class _Relay:
    """Delivers: at once as a request's background task, and later what had no task, failed or was left."""

    def __init__(self, outbox: _Outbox, notify: Any, file: _LogFile, delay: float, threads: int) -> None:
        own = notify is not None
        self._outbox, self._notify, self._file, self._delay = outbox, notify, file, 0.0 if own else delay
        self._is_async = own and BackgroundTask(notify).is_async
        self._by_thread = not (self._is_async or self._delay)  # all that a request's task does is to wait for one
        set_aside = partial(self._fail, set_aside=True)  # the lines may be in the log
        self._group = _Group(self._call, self._fail, threads) if own else _Group(self._append, set_aside, pause=_PAUSE)
        self._find_delivered = (lambda ids: set[str]()) if own else file.find  # one's own may be called again
        self._pauses, self._warn = (_OWN_PAUSES, _Warnings(50)) if own else (_LOG_PAUSES, _Warnings(1))
        self._lifespans: set[anyio.CancelScope] = set()  # the scope of each one's clock
        self._in_requests, self._in_relay = set[_Entry](), set[_Entry]()  # what tasks, or their threads, have in hand
        self._most_in_hand = max(500, threads)  # in each; in requests only where a lifespan runs. The rest waits
        self._last_sync = self._next_step = self._next_look = 0.0  # on the monotonic clock

    async def catch_up(self) -> None:
        """Without a lifespan, do what needs a clock, after every answer but the OpenAPI document."""
        while not self._lifespans and time.monotonic() >= self._next_step and len(self._in_relay) < self._most_in_hand:
            async with anyio.create_task_group() as tasks:
                await self._adopt()
                self._step(tasks.start_soon)

    @asynccontextmanager
    async def lifespan(self, app: object = None) -> AsyncIterator[None]:
        """Refuse to start on an outbox that cannot be used; from then on, do in time what needs a clock."""
        await _in_thread(self._outbox.open)
        clock, error = anyio.CancelScope(), None
        async with anyio.create_task_group() as tasks:
            self._lifespans.add(clock)
            tasks.start_soon(self._keep_time, clock, tasks.start_soon)
            try:
                yield
            except Exception as exc:  # the host's own, which a task group would wrap
                error = exc
            finally:
                self._lifespans.discard(clock)
                clock.cancel()
                tasks.cancel_scope.deadline = anyio.current_time() + _DRAIN
                log.info("waiting at most %d s for %d notifications in hand", _DRAIN, len(self._in_relay))
        with anyio.move_on_after(_FLUSH), suppress(OSError, RuntimeError, sqlite3.Error):  # as the log may hang
            if self._notify is None:
                await self._group.run(_Entry("", set()), _this_loop())  # which syncs
            await self._outbox.probe()  # which commits what was deleted
            if not self._lifespans:
                await _in_thread(self._outbox.close)
                self._next_look = 0.0
        if error:
            raise error

    async def _keep_time(self, clock: anyio.CancelScope, start_soon: Callable[..., object]) -> None:
        pause = _POLL
        with clock:
            while clock in self._lifespans:  # as a sleep that is over swallows the cancellation
                start_soon(self._adopt)  # beside the rest, as it may take long to search the log
                self._step(start_soon)
                await anyio.sleep(pause)
                pause = _POLL if self._outbox.waiting or self._in_requests or self._in_relay else min(2 * pause, 1)

    async def _adopt(self) -> None:
        """Every _LOOK seconds take over what the dead left, unless somebody is at it."""
        if time.monotonic() >= self._next_look and not self._outbox.adopting.locked():
            self._next_look = time.monotonic() + _LOOK
            try:
                await _in_thread(self._outbox.adopt, self._find_delivered)
            except Exception as exc:
                self._warn("what is left in the outbox has to wait", exc)

    def _step(self, start_soon: Callable[..., object]) -> None:
        """Start to deliver what is due, as far as there is room."""
        for group in (self._outbox.writer, self._group):
            if group.queued:  # as no thread could be had, and whoever waited was cancelled
                group.wake()
        now = time.monotonic()
        due = [entry for entry in list(self._outbox.waiting) if entry.due <= now]
        room = max(0, self._most_in_hand - len(self._in_relay))
        for entry in due[:room]:
            start_soon(self.attempt, entry)
        self._next_step = now if len(due) > room else now + _POLL  # now: so that catch_up goes on

    def deliver(self, entry: _Entry, loop: Any) -> Any:
        """Attempt the entry as a request's task; what this returns is to be awaited."""
        has_room = len(self._in_requests) < self._most_in_hand  # if not, attempt leaves it to the relay
        if self._by_thread and self._lifespans and has_room and self._outbox.waiting.pop(entry, False):
            self._in_requests.add(entry)  # until the thread is done with it
            return self._group.run(entry, loop)  # as attempt would, but with no coroutine
        return self.attempt(entry, loop)

    async def attempt(self, entry: _Entry, request_loop: Any = None) -> None:
        """Deliver the entry, unless somebody has it in hand. Raises nothing but the cancellation of its own task."""
        in_request = request_loop is not None
        in_hand, delay = (self._in_requests, self._delay) if in_request else (self._in_relay, 0.0)
        if self._lifespans and len(in_hand) >= self._most_in_hand:
            if entry in self._outbox.waiting:  # or the relay, for which it is made due here, was faster
                entry.due = time.monotonic() + delay
        elif self._outbox.waiting.pop(entry, False):
            in_hand.add(entry)
            try:
                if delay:
                    await anyio.sleep(delay)
                if self._is_async:
                    await self._notify(_read_line(entry.line))
                    self._outbox.settle([entry])
            except BaseException as exc:
                self._fail([entry], exc)
                if isinstance(exc, GeneratorExit):
                    return  # the notifier's; or of whoever closes this coroutine, which then must not wait again
                if in_request and _ends_task(exc):
                    raise  # which a task of the relay's must not, as it would end all the others
                if isinstance(exc, BaseExceptionGroup):  # a trio nursery wraps a cancellation: this raises it again
                    await anyio.sleep(0)
            else:
                if not self._is_async:
                    await self._group.run(entry, request_loop or _this_loop())
            finally:
                in_hand.discard(entry)
        if in_request and not self._lifespans:
            await self.catch_up()

    def _call(self, entries: list[_Entry], _: bool) -> None:
        for entry in entries:
            result = self._notify(_read_line(entry.line))
            if isinstance(result, Awaitable | Generator | AsyncGenerator):
                raise TypeError("notify returned what nobody runs: make it a def or an async def, with no yield")
            self._outbox.settle([entry])
            self._in_requests.discard(entry)

    def _append(self, new: list[_Entry], asked: bool) -> None:
        """Append what is new; sync at most once per _LINGER, or when asked to, and only then delete the rows."""
        try:
            if new:
                self._file.append([entry.line for entry in new])
        except BaseException as exc:
            self._fail(new, exc, set_aside=exc.__context__ is not None)  # as some lines may have stayed
        else:
            self._outbox.unsynced += new
            self._outbox.settle(new, synced=False)
            self._in_requests.difference_update(new)
        if not asked and time.monotonic() < self._last_sync + _LINGER:
            self._group.wake()
            return  # to sync later: with the next lines, or when none come
        self._last_sync = time.monotonic()
        try:
            self._file.sync()
            self._outbox.settle(self._outbox.unsynced)
        except BaseException as exc:  # to sync again would prove nothing
            self._fail(self._outbox.unsynced, exc, set_aside=True)
        finally:
            self._outbox.unsynced.clear()

    def _fail(self, entries: list[_Entry], error: BaseException, set_aside: bool = False) -> None:
        """Have the entries wait for another attempt, or if they are set aside, for the next start."""
        self._in_requests.difference_update(entries)
        now = time.monotonic()
        for entry in entries:
            is_first, entry.since = entry.since is None, entry.since or now
            entry.among.add(entry)  # again, if it was settled
            entry.due = math.inf if set_aside else now + _backoff(now - entry.since, *self._pauses)
            if entry.due != math.inf:
                self._outbox.waiting[entry] = True
            if is_first or entry.due == math.inf:
                fate = "waits for the next start" if entry.due == math.inf else "is tried again"
                self._warn(f"notification %s failed, and {fate}", error, entry.line[_ID])


def _backoff(failing: float, first: float, longest: float, patience: float) -> float:
    """Seconds until the next attempt: as long as it has failed so far, so that pauses double; inf: it is set aside."""
    return math.inf if failing >= patience else min(longest, first + failing) * random.uniform(0.75, 1)


def _ends_task(error: BaseException) -> bool:
    """Whether this task is cancelled, and not only something that the notifier waited for."""
    cancelled = anyio.get_cancelled_exc_class()
    task = asyncio.current_task() if cancelled is asyncio.CancelledError else None  # trio's says enough
    return isinstance(error, cancelled) and (task is None or task.cancelling() > 0)


class _Warnings:
    """Warns, but of the same thing only so many times a minute."""

    def __init__(self, most: int) -> None:
        self._never, self._recent = [-math.inf] * most, dict[str, list[float]]()  # times, the oldest first

    def __call__(self, message: str, error: BaseException, *args: object) -> None:
        recent = self._recent.get(message, self._never)
        if recent[0] < time.monotonic() - 60:
            self._recent[message] = [*recent[1:], time.monotonic()]
            with suppress(Exception):  # whatever the error does when it is printed, or a handler of the record
                log.warning(f"{message}: %.500r", *args, "".join(format_exception_only(error)).strip())


async def _in_thread(function: Callable[..., object], *args: object) -> None:
    await anyio.to_thread.run_sync(function, *args, limiter=anyio.CapacityLimiter(1))  # of its own, not the host's


# ---------------------------------------------------------------------------------------------------- log file


class _LogFile:
    """The file that the default notifier appends to. It may be renamed at any time: the next line makes a new one."""

    def __init__(self, path: str | Path, fsync: bool, outbox: _Outbox) -> None:
        self._path, self._fsync, self._outbox = Path(path).absolute(), fsync, outbox
        self._files: list[io.FileIO] = []  # open from a line to the next sync; more than one only if it was renamed
        self._place: str | int = ""  # of the last of them: its path as the system tells it, or its inode

    def append(self, lines: list[str]) -> None:
        """Append all lines to a file, or raise and append none; if the error has a context, some may have stayed."""
        data = "\n".join([*lines, ""]).encode()
        with _transaction(self._outbox.log_lock):  # so that one worker writes at a time
            file = self._open()
            end = _cut_torn_line(file) if file.readable() else None
            if end == 0:
                _sync_folder(self._path.parent)
            try:
                while data:
                    data = data[file.write(data) :]
            except BaseException as exc:
                exc.add_note(f"while writing {self._path}")
                if end is not None:
                    file.truncate(end)
                raise

    def _open(self) -> io.FileIO:
        if not self._files or self._place_of(self._files[-1]) != self._place:
            is_other = self._path.exists() and not self._path.is_file()
            # Only a regular file is readable: a FIFO shall not be its own reader, nor wait for one.
            mode, flag = ("a", getattr(os, "O_NONBLOCK", 0)) if is_other else ("a+", 0)
            self._files.append(io.FileIO(self._path, mode, opener=lambda path, how: os.open(path, how | flag, 0o600)))
            if is_other:
                os.set_blocking(self._files[-1].fileno(), True)
            self._place = self._place_of(self._files[-1])
        return self._files[-1]

    def _place_of(self, file: io.FileIO) -> str | int:
        with suppress(OSError):  # first, as a stat has the next write record the time anew, which costs I/O
            return os.readlink(f"/proc/self/fd/{file.fileno()}")
        return self._path.exists() and self._path.stat().st_ino  # this is not Linux

    def sync(self) -> None:
        """Have what was appended on the disk; raises OSError."""
        while self._files:
            with self._files.pop(0) as file:  # the oldest: if this fails, the log is still the last of them
                if self._fsync and file.readable():
                    os.fsync(file.fileno())

    def find(self, ids: set[str]) -> set[str]:
        """Which of the ids have a whole line, here or in a file that this one was renamed to."""
        found, seen, looks = set[str](), set[tuple[int, ...]](), 0
        while looks < 2:  # in a row with no new file, as one may be renamed meanwhile
            looks += 1
            for path in _named_like(self._path) + _named_like(self._path.resolve()):  # as it may be a link
                with suppress(FileNotFoundError, PermissionError), path.open(encoding="latin-1", newline="\n") as file:
                    if (status := os.fstat(file.fileno()))[1:3] not in seen:  # inode and device
                        seen.add(status[1:3])
                        looks = 0
                        found.update(line[_ID] for line in file if line[_ID] in ids and line.endswith("\n"))
                        if self._fsync and os.name == "posix":  # as their writer may have died before it did
                            os.fsync(file.fileno())
        return found


def _named_like(log: Path) -> list[Path]:
    """Such as log.txt.1 and log-2026.txt, not logins.txt; and no database or lock: to close it would drop our locks."""
    name, stem, other = re.escape(log.name), re.escape(log.stem), r".*\.(db|sqlite\d?|lock)\b"
    is_like = re.compile(rf"({name}(?!{other})|(?!{other}){stem})(?![a-zA-Z])").match
    return [path for path in log.parent.iterdir() if is_like(path.name) and path.is_file()]


def _cut_torn_line(file: io.FileIO) -> int:
    """Cut what follows the last newline, as a crash has left it; where the file ends then."""
    end = size = file.seek(0, os.SEEK_END)
    tail = b""
    while end and b"\n" not in tail:
        end = file.seek(max(0, end - 4096))
        tail = file.read(4096)
    end += tail.rfind(b"\n") + 1
    if end < size:
        file.truncate(end)
    return end


# --------------------------------------------------------------------------------------------------------- OpenAPI

_STRING, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_HEADERS = {202: "Idempotent-Replayed", 401: "WWW-Authenticate", 405: "Allow", 503: "Retry-After"}


def _answers(texts: dict[int, str], **properties: dict[str, Any]) -> dict[int, Any]:
    """OpenAPI's answers, by status: each is described by its text, and is an object with these properties."""
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    content = {"content": {"application/json": {"schema": schema}}}
    headers = {code: {name: {"schema": _STRING}} for code, name in _HEADERS.items()}
    return {code: {"description": text, "headers": headers.get(code, {})} | content for code, text in texts.items()}


_REFUSED = _answers({code: HTTPException(code).detail for code in (400, 401, 413, 415, 422, 503)}, detail=_STRING)
_ANYWHERE = _answers(_DETAILS, detail=_STRING)
_STATE = _answers({200: "They can be kept.", 503: "They cannot."}, status=_STRING, pending=_COUNT, failed=_COUNT)
_HEALTH = {"summary": "Whether notifications can be kept, and how many wait.", "responses": _ANYWHERE | _STATE}
_DOCUMENT = _answers({200: "OpenAPI 3.1."}, openapi=_STRING, info={}, paths={}, components={}, servers={})
_SELF = {"summary": "This document.", "responses": _ANYWHERE | _DOCUMENT}
_CONTENT = {"message": _STRING | {"maxLength": 10_000, "default": _MESSAGE}}
_BODY = {"type": "object", "properties": _CONTENT, "additionalProperties": False}
_ADDRESS = {"name": "email", "in": "path", "required": True, "schema": _STRING | {"pattern": _EMAIL, "maxLength": 254}}
_KEY = {"name": "Idempotency-Key", "in": "header", "schema": _STRING | {"pattern": "^[ -~]{1,255}$"}}
_SEND = {
    "summary": "Keep a notification, answer, and deliver it afterwards.",
    "security": [{}, {"token": []}],
    "parameters": [_ADDRESS, _KEY],
    "requestBody": {"content": {"application/json": {"schema": _BODY}}},
    "responses": _ANYWHERE | _REFUSED | _answers({202: "It is kept."}, id=_STRING, message=_STRING),
}
_OPENAPI: dict[str, Any] = {
    "openapi": "3.1.0",
    "info": {"title": "Notify", "version": "1.0.0", "description": "Answers first, notifies after: 202 means kept."},
    "paths": {
        "/send-notification/{email}": {"post": _SEND},
        "/health": {"get": _HEALTH, "head": _HEALTH},
        "/openapi.json": {"get": _SELF, "head": _SELF},
    },
    "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
}

# ----------------------------------------------------------------------------------------------------- the app


def create_app(
    notify: Callable[[Notification], Any] | None = None,
    *,
    log: str | Path = "log.txt",
    outbox: str | Path = "outbox",
    delay: float = 0.0,
    concurrency: int = 40,
    max_pending: int = 10_000,
    token: str | None = None,
    fsync: bool = True,
) -> Starlette:
    """Make the service. Opens, creates and starts nothing: the lifespan or the first request does.

    Args:
        notify: A ``def`` (runs on a thread) or ``async def`` of one Notification. None: append its line to ``log``.
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
    _check(**locals())
    box = _Outbox(outbox, max_pending, fsync)
    relay = _Relay(box, notify, _LogFile(log, fsync, box), delay, concurrency)
    api = _Api(box, relay, token)
    send = Route("/send-notification/{email:path}", api.send_notification, methods=["POST"])
    routes = [send, Route("/health", api.health), Route("/openapi.json", api.openapi)]
    for route in routes:  # each allows one slash at the end, and, unlike Starlette's own pattern, no newline
        route.path_regex = re.compile(route.path_regex.pattern.removesuffix("$") + r"/?\Z", re.DOTALL)
        route.app = route.endpoint  # Starlette would wrap it, as a function of a Request
    handlers = {HTTPException: api.refuse, Exception: api.refuse}
    service = Starlette(routes=routes, exception_handlers=handlers, lifespan=relay.lifespan)
    service.router.redirect_slashes = False
    return service


@asynccontextmanager
async def _program(service: Starlette) -> AsyncIterator[None]:
    """The lifespan of ``service:app``, whose process is ours to tune, as no host's is."""
    with ExitStack() as at_end:
        at_end.callback(gc.set_threshold, *gc.get_threshold())
        at_end.callback(gc.unfreeze)
        gc.freeze()  # or all that was imported is searched now and then, which stops every answer for 10 ms
        gc.set_threshold(50_000)  # objects; Python's own takes a tenth of a busy loop's time, to find next to nothing
        async with _lifespan(service):
            yield


app = create_app(**_environment())
_lifespan, app.router.lifespan_context = app.router.lifespan_context, _program

if __name__ == "__main__":
    import uvicorn

    uvicorn.run(app)
