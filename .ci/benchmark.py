"""Measure the service beside its alternatives, and against the numbers it has to reach.

    python .ci/benchmark.py                                   # everything, in about seven minutes
    python .ci/benchmark.py --part speed --only article,ours  # those subjects alone
    python .ci/benchmark.py --rounds 1 --seconds 2            # a quick look

Prints Markdown. Ends with an error if any subject gave an answer that is not 2xx, or if ours kept more or less than
it acknowledged; a goal that is missed is only told, for it may be the machine's. Every server is a real uvicorn
process on core 0, the load comes from core 1, and subjects take turns, so that what else the machine does hits all
alike. Needs Linux, two cores, Debian's packages ``wrk`` and ``redis-server``, and requirements.txt in this folder.
What is written goes to a new folder under $TMPDIR, which has to be on a real disk for fsync to mean anything.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import json
import os
import platform
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count, takewhile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

# ------------------------------------------------------------------------------------------------- subjects

_NOTHING = """
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

async def send_notification(request):
    email = request.path_params["email"]
    content = {"id": "0123456789abcdef0123456789abcdef", "message": "Notification sent in the background"}
    return JSONResponse(content, 202)

app = Starlette(routes=[Route("/send-notification/{email}", send_notification, methods=["POST"])])
"""

_TASK = """
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse
from starlette.routing import Route

def write_notification(email, message):
    with open("log.txt", "a") as file:
        file.write(f"notification for {email}: {message}\\n")

async def send_notification(request):
    task = BackgroundTask(write_notification, request.path_params["email"], message="some notification")
    content = {"id": "0123456789abcdef0123456789abcdef", "message": "Notification sent in the background"}
    return JSONResponse(content, 202, background=task)

app = Starlette(routes=[Route("/send-notification/{email}", send_notification, methods=["POST"])])
"""

_ARTICLE = """
from fastapi import BackgroundTasks, FastAPI

app = FastAPI()

def write_notification(email: str, message=""):
    with open("log.txt", mode="a") as email_file:
        content = f"notification for {email}: {message}\\n"
        email_file.write(content)

@app.post("/send-notification/{email}")
async def send_notification(email: str, background_tasks: BackgroundTasks):
    background_tasks.add_task(write_notification, email, message="some notification")
    return {"message": "Notification sent in the background"}
"""

_HUEY = """
from huey import SqliteHuey
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

huey = SqliteHuey(filename="huey.db")

@huey.task()
def write_notification(email, message):
    with open("log.txt", "a") as file:
        file.write(f"notification for {email}: {message}\\n")

def send_notification(request):
    task = write_notification(request.path_params["email"], message="some notification")
    return JSONResponse({"id": task.id, "message": "Notification sent in the background"}, 202)

app = Starlette(routes=[Route("/send-notification/{email}", send_notification, methods=["POST"])])
"""

_CELERY = """
import os
from celery import Celery
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

celery = Celery("app", broker=os.environ["BROKER"])

@celery.task
def write_notification(email, message):
    with open("log.txt", "a") as file:
        file.write(f"notification for {email}: {message}\\n")

def send_notification(request):
    task = write_notification.delay(request.path_params["email"], message="some notification")
    return JSONResponse({"id": task.id, "message": "Notification sent in the background"}, 202)

app = Starlette(routes=[Route("/send-notification/{email}", send_notification, methods=["POST"])])
"""

_SLEEPING = """
import asyncio, time
from service import create_app

{define}

app = create_app(notify, max_pending=30_000)
"""


@dataclass(frozen=True)
class Subject:
    name: str
    source: str | None = None  # of app.py; None: the service itself
    env: dict[str, str] = field(default_factory=dict)
    ours: bool = False
    broker: bool = False
    access_log: bool = False  # uvicorn's, which it has by default


_LIMIT = Subject("Starlette, nothing to do", _NOTHING)
_OURS = Subject("this service", ours=True)
_NO_FSYNC = Subject("this service, NOTIFY_FSYNC=0", env={"NOTIFY_FSYNC": "0"}, ours=True)
_SUBJECTS = {
    "limit": _LIMIT,
    "task": Subject("Starlette, def task", _TASK),
    "article": Subject("FastAPI, the article's program", _ARTICLE),
    "huey": Subject("SqliteHuey", _HUEY),
    "celery": Subject("Celery on Redis", _CELERY, broker=True),
    "ours": _OURS,
    "nofsync": _NO_FSYNC,
    "limit-logged": Subject("Starlette, nothing to do, access log", _NOTHING, access_log=True),
    "ours-logged": Subject("this service, access log", ours=True, access_log=True),
}
_NOTE = """
Rounds: {rounds}, of {seconds} s; medians. 32 connections, one worker on one core; memory is the peak, CPU the server's.
SqliteHuey and Celery take the notification in and no more: no worker of theirs runs, and Redis is not counted and runs
on the load's core. The article's program and the `def` task answer first, and what is unwritten is in memory alone."""


# ----------------------------------------------------------------------------------------------- the parts


class BenchmarkError(Exception):
    """What was measured cannot be believed: says why."""


_FAILURES = (BenchmarkError, OSError, EOFError)  # a server that is gone is one of the last two


class Benchmark:
    """The parts, and what they share: the folder to work in, the rounds, and what was reached."""

    def __init__(self, work: Path, rounds: int, seconds: float, only: list[str]) -> None:
        self.work = work
        self.rounds = rounds
        self.seconds = seconds
        self.only = only
        self.goals: list[tuple[str, str, str, str]] = []

    def speed(self) -> None:
        """All subjects under the same load."""
        subjects = [_SUBJECTS[key] for key in self.only]
        results = self._interleave(subjects, lambda subject: self._load(subject, self.seconds))
        limit, article = results.get(_LIMIT.name), results.get(_SUBJECTS["article"].name)
        rows = []
        for name, load in results.items():
            ratios = [f"{load.rate / other.rate:.2f}x" if other else "-" for other in (limit, article)]
            cpu, memory = f"{1e6 * load.cpu:.0f}", f"{load.memory:.0f}"
            rows.append([name, f"{load.rate:,.0f}", _ms(load.p50), _ms(load.p99), memory, cpu, *ratios])
        _table(["", "requests/s", "p50 ms", "p99 ms", "MiB", "CPU µs each", "of the limit", "of the article's"], rows)
        print(_NOTE.format(rounds=self.rounds, seconds=self.seconds))
        for subject, of_article, of_limit in ((_OURS, 4, 0.5), (_NO_FSYNC, 6, 0.75)):
            if (ours := results.get(subject.name)) and article:
                self._at_least(f"requests/s, {subject.name}, of the article's", ours.rate / article.rate, of_article)
            if ours and limit:
                self._at_least(f"requests/s, {subject.name}, of the limit", ours.rate / limit.rate, of_limit)
        if (ours := results.get(_OURS.name)) and article:
            self._at_most("p99, of the article's", ours.p99 / article.p99, 0.1, "x")
        if ours and limit:
            self._at_most("resident memory under load, of the limit's", ours.memory / limit.memory, 1.3, "x")

    def memory(self) -> None:
        """What a pending notification takes, and what answers take while a slow notifier has thousands of them."""
        slow = {"NOTIFY_DELAY": "20", "NOTIFY_MAX_PENDING": "30000"}
        define = "def notify(notification):\n    time.sleep(20)"
        define_async = "async def notify(notification):\n    await asyncio.sleep(20)"
        subjects = [
            Subject("default notifier, NOTIFY_DELAY=0", env={**slow, "NOTIFY_DELAY": "0"}, ours=True),
            Subject("default notifier, NOTIFY_DELAY=20", env=slow, ours=True),
            Subject("a def of 20 s", _SLEEPING.format(define=define), ours=True),
            Subject("an async def of 20 s", _SLEEPING.format(define=define_async), ours=True),
        ]
        results = self._interleave(subjects, self._fill_memory)
        without, *others = results.values()
        pending = ["-", *(f"{load.memory:.1f}" for load in others)]
        rows = [
            [name, kib, _ms(load.p50), _ms(load.p99)]
            for kib, (name, load) in zip(pending, results.items(), strict=True)
        ]
        _table(["at 1,000 posts/s", "KiB for each pending", "p50 ms", "p99 ms"], rows)
        self._at_most("memory for each pending notification", max(load.memory for load in others), 10, " KiB")
        p50, p99 = (max(load.p50 for load in others), max(load.p99 for load in others))
        self._at_most("p50 with a notifier of 20 s, of that without", p50 / without.p50, 1.5, "x")
        self._at_most("p99 with a notifier of 20 s, of that without", p99 / without.p99, 2, "x")

    def start(self) -> None:
        """20,000 left pending by a kill -9."""
        folder = self._folder()
        env = {"NOTIFY_DELAY": "1000000", "NOTIFY_MAX_PENDING": "30000"}
        with _serve(Subject("fill", env=env, ours=True), folder) as server:
            left = {json.loads(answer.body)["id"].encode() for answer in asyncio.run(_post(server.port, range(20_000)))}
        (folder / "log.txt").touch(mode=0o600)  # for the probe to read
        began = time.monotonic()
        with _serve(_OURS, folder) as server:
            first = time.monotonic() - began
            drained_at, answers = asyncio.run(_probe_until_drained(server, set(left)))
            _check_log(server, 20_000 + 2 + len(answers), 0)  # each start posts one
            if missing := left - set(_ids(server)):
                raise BenchmarkError(f"{len(missing)} of 20,000 acknowledged notifications are not in the log")
        drained = drained_at - began
        slowest = max(answer.seconds for answer in answers)
        print(
            f"\n20,000 pending after kill -9: {first:.2f} s to the first answer, {drained:.2f} s until all are in the"
        )
        print(f"log, {1000 * slowest:.0f} ms the slowest of {len(answers)} answers meanwhile, each line exactly once.")
        self._at_most("20,000 pending: first answer", first, 3, " s")
        self._at_most("20,000 pending: drained", drained, 10, " s")
        self._at_most("20,000 pending: slowest answer meanwhile", slowest, 0.5, " s")

    def rest(self) -> None:
        """Doing nothing, being imported, one lonely client, and four workers."""
        self._idle()
        self._at_most("import, over Starlette's", 1000 * _import_seconds(self.work), 20, " ms")
        lonely = self._interleave(
            [_LIMIT, _NO_FSYNC, _OURS], lambda subject: self._load(subject, min(self.seconds, 2), connections=1)
        )
        fsync = _fsync_seconds(self.work)
        rows = [[name, _ms(load.p50, 3), _ms(load.p99, 3)] for name, load in lonely.items()]
        _table(["one lonely client", "p50 ms", "p99 ms"], [*rows, ["one append and fsync here", _ms(fsync, 3), ""]])
        limit, no_fsync, ours = (load.p50 for load in lonely.values())
        self._at_most("one lonely client, NOTIFY_FSYNC=0, of the limit's p50", no_fsync / limit, 3, "x")
        self._at_most("one lonely client, beyond 3x the limit's p50, in fsyncs", (ours - 3 * limit) / fsync, 1)
        four = self._interleave(
            [_OURS, _NO_FSYNC], lambda subject: self._load(subject, min(self.seconds, 3), workers=4)
        )
        rows = [[name, f"{load.rate:,.0f}", _ms(load.p50), _ms(load.p99)] for name, load in four.items()]
        _table(["--workers 4, both cores", "requests/s", "p50 ms", "p99 ms"], rows)
        self._at_most("--workers 4: p99", 1000 * max(load.p99 for load in four.values()), 150, " ms")

    def _idle(self) -> None:
        with _serve(_LIMIT, self._folder()) as limit, _serve(_OURS, self._folder()) as ours:
            servers = (limit, ours)
            time.sleep(2)
            before = [_cpu_seconds(server.pid) for server in servers]
            time.sleep(10)
            cpu = [_cpu_seconds(server.pid) - start for server, start in zip(servers, before, strict=True)]
            memory = [_memory(server.pid, "VmRSS") for server in servers]
            _check_log(ours, 1, 0)
        names = (_LIMIT.name, _OURS.name)
        rows = [[*row] for row in zip(names, map(_ms, cpu), [f"{mib:.1f}" for mib in memory], strict=True)]
        _table(["at rest", "CPU ms in 10 s", "MiB"], rows)
        self._at_most("at rest: CPU over bare Starlette's in 10 s", 1000 * (cpu[1] - cpu[0]), 10, " ms")
        self._at_most("at rest: memory over bare Starlette's", memory[1] - memory[0], 8, " MiB")

    def _interleave(self, subjects: list[Subject], measure: Callable[[Subject], Load]) -> dict[str, Load]:
        loads: dict[str, list[Load]] = {subject.name: [] for subject in subjects}
        for number in range(self.rounds):
            for subject in subjects:
                os.sync()  # what the one before wrote is not for this one to wait for
                load = measure(subject)
                loads[subject.name].append(load)
                _tell(f"round {number + 1}: {subject.name}: {load}")
        return {name: Load(*map(median, zip(*rounds, strict=True))) for name, rounds in loads.items()}

    def _load(self, subject: Subject, seconds: float, connections: int = 32, workers: int = 1) -> Load:
        cores = ("0", "1") if workers == 1 else ("0,1", "0,1")
        with _serve(subject, self._folder(), cores[0], workers) as server:
            warm, _ = self._wrk(server, min(seconds, 1.0 if workers == 1 else 3.0), connections, cores[1])
            cpu = _cpu_seconds(server.pid)
            requests, load = self._wrk(server, seconds, connections, cores[1])
            load = load._replace(memory=_memory(server.pid, "VmHWM"), cpu=(_cpu_seconds(server.pid) - cpu) / requests)
            if subject.ours:  # wrk leaves without its last answers
                _check_log(server, 1 + warm + requests, 2 * connections)
        return load

    def _wrk(self, server: Server, seconds: float, connections: int, core: str) -> tuple[int, Load]:
        """How many answers there were, and what they took."""
        script = self.work / "post.lua"
        script.write_text(_LUA)
        # wrk takes whole seconds alone
        arguments = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(script)]
        text = _run(["taskset", "-c", core, "wrk", *arguments, f"http://127.0.0.1:{server.port}{_PATH}"])
        found = json.loads(text.rpartition("RESULT")[2])
        if found["refused"] or found["errors"]:
            raise BenchmarkError(
                f"{found['refused']} answers were not 2xx, and {found['errors']} connections failed, of"
                f" {found['requests']} requests"
            )
        microseconds = 1e-6
        rate = found["requests"] / (found["duration"] * microseconds)
        return found["requests"], Load(rate, found["p50"] * microseconds, found["p99"] * microseconds)

    def _fill_memory(self, subject: Subject) -> Load:
        """What 3,000 more pending take, once 1,000 are."""
        with _serve(subject, self._folder()) as server:
            asyncio.run(_post(server.port, range(1000), rate=1000))
            before = _memory(server.pid, "VmRSS")
            answers = asyncio.run(_post(server.port, range(3000), rate=1000))
            growth = _memory(server.pid, "VmRSS") - before
            if subject.env.get("NOTIFY_DELAY") == "0":
                _check_log(server, 4001, 0)
            elif (pending := _health(server.port)["pending"]) != 4001:
                raise BenchmarkError(f"/health says that {pending} are pending, and 4001 are")
        seconds = sorted(answer.seconds for answer in answers)
        return Load(0, seconds[len(seconds) // 2], seconds[len(seconds) * 99 // 100], growth * 1024 / 3000)

    def _folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.work))

    def _at_least(self, name: str, measured: float, goal: float) -> None:
        self.goals.append((name, f"{measured:.2f}x", f"≥ {goal}x", "yes" if measured >= goal else "**no**"))

    def _at_most(self, name: str, measured: float, goal: float, unit: str = "") -> None:
        self.goals.append((name, f"{measured:.2f}{unit}", f"≤ {goal}{unit}", "yes" if measured <= goal else "**no**"))


class Load(NamedTuple):
    rate: float  # requests a second
    p50: float  # seconds
    p99: float
    memory: float = 0  # MiB; in the part of that name, KiB for each pending notification
    cpu: float = 0  # seconds of the server's for each request: less moved by what else the machine does

    def __str__(self) -> str:
        times = f"{_ms(self.p50, 2)} and {_ms(self.p99, 2)} ms, {1e6 * self.cpu:.0f} µs of CPU each"
        return f"{self.rate:.0f}/s, {times}, {self.memory:.1f}"


# ------------------------------------------------------------------------------------------------- clients

_PATH = "/send-notification/user@example.com"
_LUA = """
wrk.method = "POST"
function done(summary, latency)
  local e = summary.errors
  io.write(string.format('RESULT{"requests": %d, "duration": %d, "refused": %d, "errors": %d, "p50": %d, "p99": %d}',
    summary.requests, summary.duration, e.status, e.connect + e.read + e.write + e.timeout,
    latency:percentile(50), latency:percentile(99)))
end
"""


class Answer(NamedTuple):
    seconds: float
    body: bytes


async def _post(port: int, numbers: Iterable[int], rate: float | None = None, connections: int = 32) -> list[Answer]:
    """Post once for each number, which with a rate is its turn; an answer's time then runs from that turn."""
    answers: list[Answer] = []
    turns = iter(numbers)
    start = time.perf_counter()

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for number in turns:
            began = time.perf_counter()
            if rate:
                turn = start + number / rate
                await asyncio.sleep(turn - began)
                began = turn if turn < began else time.perf_counter()  # our own timer's lateness is not the server's
            writer.write(f"POST {_PATH} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            body = await reader.readexactly(int(head.lower().partition(b"content-length:")[2].split()[0]))
            answers.append(Answer(time.perf_counter() - began, body))
            if not head.startswith(b"HTTP/1.1 202 "):
                raise BenchmarkError(f"an answer was not 202: {head + body!r}")
        writer.close()

    await asyncio.gather(*(client() for _ in range(connections)))
    return answers


async def _probe_until_drained(server: Server, left: set[bytes]) -> tuple[float, list[Answer]]:
    """When the last of these ids was in the log, and the answers to 100 posts a second meanwhile."""
    turns = takewhile(lambda _: left, count())
    probes = asyncio.create_task(_post(server.port, turns, rate=100, connections=8))
    deadline = time.monotonic() + 60
    rest = b""
    with (server.folder / "log.txt").open("rb") as log:
        while left and not probes.done():
            await asyncio.sleep(0.02)
            *lines, rest = (rest + log.read()).split(b"\n")
            left.difference_update(line.split(b" ", 2)[1] for line in lines)
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{len(left)} of 20,000 were not in the log after a minute")
    return time.monotonic(), await probes


def _request(port: int, method: str, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request(method, path)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _health(port: int) -> dict[str, Any]:
    status, body = _request(port, "GET", "/health")
    if status != 200:
        raise BenchmarkError(f"/health answered {status}: {body!r}")
    found: dict[str, Any] = json.loads(body)
    return found


def _check_log(server: Server, acknowledged: int, unanswered: int) -> None:
    """Raise unless, in the end, nothing is pending and what was acknowledged is in the log, each exactly once."""
    deadline = time.monotonic() + 30
    while (lines := len(_ids(server))) < acknowledged or any(_health(server.port)["pending"] for _ in range(8)):
        if time.monotonic() > deadline:
            raise BenchmarkError(
                f"half a minute later, {lines} lines for {acknowledged} answers; /health: {_health(server.port)}"
            )
        time.sleep(0.1)
    ids = _ids(server)
    if len(ids) > acknowledged + unanswered:
        raise BenchmarkError(f"{len(ids)} lines for {acknowledged} answers")
    if len(set(ids)) != len(ids):
        raise BenchmarkError(f"{len(ids)} lines have {len(set(ids))} ids")


def _ids(server: Server) -> list[bytes]:
    with suppress(FileNotFoundError), (server.folder / "log.txt").open("rb") as log:
        return [line.split(b" ", 2)[1] for line in log if line.endswith(b"\n")]
    return []


# ------------------------------------------------------------------------------------------------- servers


@dataclass(frozen=True)
class Server:
    pid: int
    port: int
    folder: Path


@contextmanager
def _serve(subject: Subject, folder: Path, core: str = "0", workers: int = 1) -> Iterator[Server]:
    """uvicorn in a process of its own, which has answered one post."""
    if subject.source is not None:
        (folder / "app.py").write_text(subject.source)
    module = "service" if subject.source is None else "app"
    port = _free_port()
    command = ["taskset", "-c", core, sys.executable, "-m", "uvicorn", f"{module}:app", "--port", str(port)]
    command += ["--workers", str(workers), "--loop", "uvloop", "--http", "httptools"]
    if not subject.access_log:
        command += ["--no-access-log", "--log-level", "warning"]
    env = os.environ | subject.env | {"PYTHONPATH": str(folder.parent)}  # where main() put service.py
    broker: AbstractContextManager[str] = _redis(folder) if subject.broker else nullcontext("")
    with broker as env["BROKER"], _process(command, folder, env) as process:
        try:
            _wait_for_answer(process, port)
            yield Server(process.pid, port, folder)
        except _FAILURES as exc:
            raise BenchmarkError(f"{subject.name}: {exc}") from exc
    if subject.ours and not subject.access_log and (said := (folder / "output").read_text()):
        _tell(f"{subject.name} said: {said[:1000]}")


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    port = _free_port()
    data = folder / "redis"
    data.mkdir()
    command = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(data), "--save", ""]
    with _process(command, data, dict(os.environ)):
        yield f"redis://127.0.0.1:{port}/0"


@contextmanager
def _process(command: list[str], folder: Path, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "output").open("ab") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield process
    except BenchmarkError as exc:
        said = (folder / "output").read_text(errors="replace")[-2000:]
        raise BenchmarkError(f"{exc}\n{command[0]} said: {said or 'nothing'}" if said else str(exc)) from exc
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its workers too
        process.wait()


def _wait_for_answer(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + 30
    while process.poll() is None and time.monotonic() < deadline:
        try:
            status, body = _request(port, "POST", _PATH)
        except ConnectionRefusedError:
            time.sleep(0.005)
            continue
        if not 200 <= status < 300:
            raise BenchmarkError(f"the first answer was {status}: {body!r}")
        return
    raise BenchmarkError("it did not start")


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _memory(pid: int, what: str) -> float:
    """VmRSS, what is resident now, or VmHWM, the most that ever was; in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{what}:")[2].split()[0]) / 1024


def _cpu_seconds(pid: int) -> float:
    return time.clock_gettime(~pid << 3 | 2)  # Linux's clock of that process's threads, to the nanosecond


# ------------------------------------------------------------------------------------------------- the rest


def _import_seconds(folder: Path) -> float:
    code = (
        "import time, starlette.applications, starlette.background, starlette.responses, starlette.routing\n"
        "began = time.perf_counter()\n"
        "import service\n"
        "print(time.perf_counter() - began)"
    )
    return median(float(_run(["taskset", "-c", "0", sys.executable, "-c", code], folder)) for _ in range(15))


def _fsync_seconds(folder: Path) -> float:
    def fsync() -> float:
        began = time.perf_counter()
        os.write(file.fileno(), bytes(4096))
        os.fsync(file.fileno())
        return time.perf_counter() - began

    with (folder / "fsync").open("wb") as file:
        return median(fsync() for _ in range(200))


def _machine(folder: Path) -> str:
    model = Path("/proc/cpuinfo").read_text().partition("model name")[2].partition("\n")[0].strip("\t :")
    disk = _run(["df", "--output=fstype", str(folder)]).split()[-1]
    packages = ", ".join(f"{name} {version(name)}" for name in ("starlette", "uvicorn", "fastapi", "huey", "celery"))
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, {disk} (one append and fsync:"
        f" {_ms(_fsync_seconds(folder), 2)} ms), Python {platform.python_version()}, SQLite {sqlite3.sqlite_version},"
        f" {packages}"
    )


def _run(command: list[str], folder: Path | None = None) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)} failed: {done.stderr or done.stdout}")
    return done.stdout


def _ms(seconds: float, digits: int = 1) -> str:
    return f"{1000 * seconds:.{digits}f}"


def _table(header: list[str], rows: Iterable[Iterable[str]]) -> None:
    print()
    for row in [header, ["---"] + ["---:"] * (len(header) - 1), *rows]:
        print(f"| {' | '.join(row)} |", flush=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_tools(only: list[str]) -> None:
    tools = {"wrk": "wrk", "taskset": "util-linux"}
    if "celery" in only:
        tools["redis-server"] = "redis-server"
    for tool, package in tools.items():
        if shutil.which(tool) is None:
            raise BenchmarkError(f"there is no {tool}: install Debian's package {package}")
    if not {0, 1} <= os.sched_getaffinity(0):
        raise BenchmarkError("cores 0 and 1 are both needed")


def main() -> None:
    parts = ("speed", "memory", "start", "rest")
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=[*parts, "all"], default="all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=5, help="how long each load lasts")
    parser.add_argument("--only", default=",".join(_SUBJECTS), help="subjects of the part speed: %(default)s")
    parser.add_argument("--service", type=Path, default=Path(__file__).parent.parent / "service.py")
    options = parser.parse_args()
    only = options.only.split(",")
    if unknown := set(only) - set(_SUBJECTS):
        parser.error(f"--only knows {', '.join(_SUBJECTS)}, and not {', '.join(unknown)}")
    for name in [name for name in os.environ if name.startswith("NOTIFY_")]:
        del os.environ[name]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    try:
        _check_tools(only)
        os.sched_setaffinity(0, {1})
        with tempfile.TemporaryDirectory(prefix="notify-benchmark-", ignore_cleanup_errors=True) as work:
            shutil.copy(options.service, Path(work) / "service.py")  # so that nobody edits it while it is measured
            _tell(f"{options.service}: sha256 {hashlib.sha256((Path(work) / 'service.py').read_bytes()).hexdigest()}")
            benchmark = Benchmark(Path(work), options.rounds, options.seconds, only)
            print(_machine(Path(work)))
            for part in parts if options.part == "all" else [options.part]:
                getattr(benchmark, part)()
            _table(["number to reach", "measured", "goal", "reached"], benchmark.goals)
    except BenchmarkError as exc:
        sys.exit(f"benchmark: {exc}")


if __name__ == "__main__":
    main()
