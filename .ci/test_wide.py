"""What needs other packages, root or minutes: other servers and hosts, real disks, real kills, real engines.

    python -m pytest .ci/test_wide.py

It wants the packages of .ci/requirements.txt, redis-server, and to be root (it mounts small disks of its own).
"""

import asyncio
import json
import os
import re
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from email import message_from_bytes
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle
from pathlib import Path

import anyio
import httpx
import pytest
import trio
from aiosmtpd.smtp import SMTP
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.configuration import set_hypothesis_home_dir
from starlette.testclient import TestClient

import test_service
from service import Notification, create_app
from test_service import AN_HOUR, JSON, MEDIA, PATH, TARGET, Clients, Server, cases, ids, read, request, rows, serve

# -------------------------------------------------------------------------------------------------- helpers

eventually = partial(test_service.eventually, within=60)  # for what hangs, not for what is slow


def post(server: Server, *messages: str) -> dict[str, str]:
    """Post them all on one connection; the ids, and their messages."""
    return {server.post(message).json()["id"]: message for message in messages}


def numbered(text: str, number: int) -> list[str]:
    return [f"{text} {n}" for n in range(number)]


def hosted(folder: Path, source: str, *options: str, **how):
    """A server of the app of this source, which starts with create_app."""
    (folder / "host.py").write_text(f"from service import create_app\n{source}")
    return serve(folder, *options, app="host:app", **how)


def block(heading: str, language: str = "python") -> str:
    """The first block in this language under the README's heading with this word."""
    pattern = rf"^#+ [^\n]*{heading}[^\n]*\n.*?^```{language}\n(.*?)^```$"
    return re.search(pattern, test_service.README.read_text(), re.IGNORECASE | re.MULTILINE | re.DOTALL)[1]


def delivered(server: Server) -> dict[str, str]:
    """The id and message of each line in the log and the files it was renamed to: each whole, and there once."""
    lines = [line for log in server.log.parent.glob("log.txt*") for line in read(log)]
    doubled = [id for id, times in Counter(line.id for line in lines).items() if times > 1]
    assert not doubled, f"{len(doubled)} of {len(lines)} doubled"
    return {line.id: line.message for line in lines}


def assert_exactly_once(kept: dict[str, str], server: Server) -> None:
    """Nothing lost, nothing doubled, nothing torn, nothing left in the outbox."""
    assert kept
    logs = server.log.parent.glob
    with suppress(AssertionError):  # then it is lost, and said below
        eventually(lambda: kept.keys() <= {id for log in logs("log.txt*") for id in ids(log)}, within=45)
    eventually(lambda: rows(server.outbox) == 0)
    lost = kept.items() - delivered(server).items()
    assert not lost, f"{len(lost)} of {len(kept)} lost, such as {lost.pop()[0]}"


def resources(server: Server) -> tuple[int, int]:
    """The server's memory in KiB, and its file descriptors."""
    process = Path(f"/proc/{server.process.pid}")
    memory = re.search(r"VmRSS:\s+(\d+) kB", (process / "status").read_text())
    return int(memory[1]), len(list((process / "fd").iterdir()))


@contextmanager
def disk(path: Path, size: str):
    """A small disk of its own."""
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def fill(folder: Path) -> Path:
    """Leave not a byte of room; remove the file to make room again."""
    filler = folder / "filler"
    with filler.open("ab", buffering=0) as file:
        for block in [b"x" * 65536, b"x"]:
            with suppress(OSError):
                while True:
                    file.write(block)
    return filler


# -------------------------------------------------------------------------------------------------- servers

SERVERS = {
    "uvicorn, h11, asyncio": "uvicorn service:app --port 0 --http h11 --loop asyncio",
    "uvicorn, httptools, uvloop": "uvicorn service:app --port 0 --http httptools --loop uvloop",
    "hypercorn, asyncio": "hypercorn service:app --bind 127.0.0.1:0 --worker-class asyncio",
    "hypercorn, trio": "hypercorn service:app --bind 127.0.0.1:0 --worker-class trio",
    "granian": "granian service:app --interface asgi --port {port}",
}


@pytest.fixture
def port():
    """A port that nobody else gets: who wants it, too, must say so with the same option, as granian does."""
    with socket.socket() as reserved:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(("127.0.0.1", 0))
        yield reserved.getsockname()[1]


@cases("command", SERVERS)
def test_every_server_answers_at_once_and_loses_nothing(tmp_path, command, port):
    command = [sys.executable, "-W", "error", "-m", *command.format(port=port).split()]
    with serve(tmp_path, command=command, delay=3) as server:
        kept = post(server, "killed 1", "killed 2")
    assert read(server.log) == []
    with serve(tmp_path, command=command, delay=3) as server:
        five = [("POST", PATH, JSON, json.dumps({"message": message})) for message in numbered("one connection", 5)]
        start = time.monotonic()
        assert test_service.on_one_connection(server.port, five) == [202] * 5
        assert time.monotonic() - start < 3, "an answer waited for the notification before it"
        eventually(lambda: len(ids(server.log)) == 7)
        kept |= post(server, "terminated 1", "terminated 2")
        server.process.terminate()
        server.process.wait(30)
    with serve(tmp_path, command=command) as server:
        assert_exactly_once(kept, server)
        server.settled()
    assert sorted({*delivered(server).values()} - {*kept.values()}) == numbered("one connection", 5)


# ---------------------------------------------------------------------------------------------------- hosts

STARLETTE = """
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

def own(request):
    return PlainTextResponse("own")

async def passes(request, call_next):
    return await call_next(request)

async def replaces(request, call_next):
    response = await call_next(request)
    return PlainTextResponse("replaced", response.status_code) if request.method == "POST" else response

async def raises(request, call_next):
    response = await call_next(request)
    if request.method == "POST":
        raise RuntimeError("the host raises")
    return response

app = Starlette(routes=[Route("/own", own), Mount("/mail", create_app())], middleware=[{middleware}])
"""
BESIDE = block("your own app", "python beside").replace("/notify", "/mail")
HOSTS = {
    "starlette": STARLETTE.format(middleware=""),
    "starlette, gzip": STARLETTE.format(middleware="Middleware(GZipMiddleware, minimum_size=1)"),
    "starlette, passing middleware": STARLETTE.format(middleware="Middleware(BaseHTTPMiddleware, dispatch=passes)"),
    "starlette, replacing middleware": STARLETTE.format(middleware="Middleware(BaseHTTPMiddleware, dispatch=replaces)"),
    "fastapi": """
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse

app = FastAPI()
app.mount("/mail", create_app())

@app.get("/own", response_class=PlainTextResponse)
def own():
    return "own"
""",
    "litestar": """
from litestar import Litestar, asgi, get

@get("/own", sync_to_thread=False, media_type="text/plain")
def own() -> str:
    return "own"

app = Litestar([own, asgi("/mail", is_mount=True, copy_scope=True)(create_app())])
""",
    "quart": """
from quart import Quart

host, notifications = Quart(__name__), create_app()

@host.get("/own")
async def own():
    return "own"
"""
    + BESIDE,
    "django": """
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpResponse
from django.urls import path

settings.configure(SECRET_KEY="secret", ROOT_URLCONF=__name__, ALLOWED_HOSTS=["*"])
urlpatterns = [path("own", lambda request: HttpResponse("own"))]
host, notifications = get_asgi_application(), create_app()
"""
    + BESIDE,
    "a bare function": """
notify = create_app()

async def app(scope, receive, send):
    assert scope["type"] == "http"
    if scope["path"].startswith("/mail/"):
        await notify({**scope, "path": scope["path"].removeprefix("/mail")}, receive, send)
    else:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"own"})
""",
}
NO_ROOT_PATH = {"litestar", "a bare function"}


@pytest.mark.parametrize("host", HOSTS)
def test_every_host_gets_one_line_for_each_post(tmp_path, host):
    with hosted(tmp_path, HOSTS[host], prefix="/mail") as server:
        for message in numbered("hello", 20):
            assert server.http.post(PATH, json={"message": message}).status_code == 202
        eventually(lambda: len(ids(server.log)) == 20)
        server.settled()
        assert httpx.get(f"http://127.0.0.1:{server.port}/own").text == "own"
        root = "/" if host in NO_ROOT_PATH else "/mail"
        assert [entry["url"] for entry in server.http.get("/openapi.json").json()["servers"]] == [root]
    assert sorted(delivered(server).values()) == sorted(numbered("hello", 20))


def test_a_host_with_no_lifespan_that_raises_after_the_answer_was_made_loses_nothing(tmp_path):
    source = STARLETTE.format(middleware="Middleware(BaseHTTPMiddleware, dispatch=raises)")
    with hosted(tmp_path, source, prefix="/mail", quiet=False) as server:
        for message in numbered("raised", 5):
            answer = server.http.post(PATH, json={"message": message}, headers={"Connection": "close"})
            assert answer.status_code == 500
        eventually(lambda: server.http.get("/health") and len(ids(server.log)) == 5)
        server.settled()
    assert sorted(delivered(server).values()) == numbered("raised", 5)


# ----------------------------------------------------------------------------------- TestClient, trio, fuzzing


@pytest.mark.parametrize("kind", ["log", "def", "async def"])
@pytest.mark.parametrize("entered", [True, False], ids=["in a with block", "with no with block"])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_when_post_returns_the_notification_is_delivered(tmp_path, backend, entered, kind):
    calls, log = [], tmp_path / "log.txt"

    def notify(notification):
        time.sleep(0.05)
        calls.append(notification)

    async def notify_async(notification):
        notify(notification)

    notifier = {"log": None, "def": notify, "async def": notify_async}[kind]
    client = TestClient(create_app(notifier, log=log, outbox=tmp_path / "outbox"), backend=backend)
    with client if entered else nullcontext():
        for number in range(5):
            assert client.post(PATH, json={"message": str(number)}).status_code == 202
            assert [n.message for n in calls or read(log)] == [str(n) for n in range(number + 1)]
        assert client.get("/health").json() == test_service.counts()


def test_on_trio_time_can_run_out_within_a_nursery_of_the_notifier():
    calls = []

    async def notify(notification):
        calls.append(notification.id)
        if len(calls) == 1:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                limit.deadline = trio.current_time()

    async def main():
        app = create_app(notify, outbox=":memory:")
        async with app.router.lifespan_context(app):
            with limit:
                await test_service.post(app)
            assert limit.cancelled_caught
            await test_service.soon(lambda: len(calls) == 2)

    limit = trio.CancelScope()
    trio.run(main)
    assert calls[0] == calls[1]


def passed(folder: Path, keyword: str, *options: str, **env: str) -> int:
    """How many of test_service.py's tests with this keyword pass in this environment, which all must."""
    command = [sys.executable, "-m", "pytest", "test_service.py", "-k", keyword, f"--basetemp={folder / 'tests'}"]
    where = {"cwd": test_service.HERE, "env": os.environ | env}
    result = subprocess.run([*command, *options], **where, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    return int(re.search(r"(\d+) passed", result.stdout)[1])


def test_what_is_tested_in_process_holds_on_trio(tmp_path):
    left_to_trio = "ignore:Async generator 'httpx._content:ResourceWarning"  # to close it
    assert passed(tmp_path, "trio", "-W", left_to_trio, TEST_BACKENDS="trio") > 200


def test_the_outbox_holds_on_a_newer_sqlite(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys, pysqlite3\nsys.modules['sqlite3'] = pysqlite3\n")
    assert passed(tmp_path, "outbox or left or key", PYTHONPATH=str(tmp_path)) > 50


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory):
    set_hypothesis_home_dir(tmp_path_factory.mktemp("hypothesis"))


@pytest.fixture
def logged(tmp_path):
    """A function that posts with these options: the status, and the messages in the log, which was empty."""
    log = tmp_path / "log.txt"
    with TestClient(create_app(log=log, outbox=":memory:")) as client:

        def send(**options):
            log.unlink(missing_ok=True)
            status = client.post(PATH, **options).status_code
            return status, [notification.message for notification in read(log)]

        yield send


FUZZ = settings(max_examples=300, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def test_any_message_is_one_line_that_can_be_read_back(logged):
    """Whatever the message: one line, all printable, and its escapes give the message back."""

    @FUZZ
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
    def check(message):
        assert logged(json={"message": message}) == (202, [message])

    check()


def test_any_body_is_kept_or_refused(logged):
    """Whatever bytes arrive: a 202 with its one line, or a 4xx with none; never a 5xx."""
    values = st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.just("message"), inner),
    )
    bodies = st.binary() | values.map(json.dumps).map(str.encode)
    bodies |= st.tuples(bodies, st.binary(max_size=3), bodies).map(b"".join)

    @FUZZ
    @given(bodies | st.text().map(lambda text: json.dumps({"message": text}).encode()))
    def check(body):
        status, messages = logged(content=body, headers=JSON)
        assert status == 202 or 400 <= status < 500
        assert len(messages) == (status == 202)

    check()


SCHEMATHESIS = {
    "hooks.py": """
import re
import uuid
from urllib.parse import unquote
import schemathesis

seen = set()

@schemathesis.hook
def before_call(context, case, kwargs):
    # A key that was used before is refused with other content, as it should be: use each once.
    key = case.headers.get("Idempotency-Key", "").strip()
    if key in seen:
        case.headers["Idempotency-Key"] = uuid.uuid4().hex
    seen.add(key)

@schemathesis.hook
def filter_case(context, case):
    # Schemathesis decodes an address with %2C in it once too often, and takes the result for a valid one.
    email = (case.path_parameters or {}).get("email", "")
    return "%" not in email or bool(re.fullmatch(r"[a-zA-Z0-9_.!#$%&'*+/=?^`{|}~-]+@[a-zA-Z0-9.-]+", unquote(email)))
""",
    # It does not know that a message can be refused for the size of its body.
    "schemathesis.toml": """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 404, 405, 406, 413, 415, 422]
""",
}


@pytest.mark.parametrize("way", ["on its own", "mounted", "with a token"])
def test_schemathesis_finds_nothing(tmp_path, way):
    for name, text in SCHEMATHESIS.items():
        (tmp_path / name).write_text(text)
    prefix = "/mail" if way == "mounted" else ""
    options = ["--header", "Authorization: Bearer secret"] if way == "with a token" else []
    # Not in a Mount of Starlette or FastAPI, which answer a path with a newline in it themselves.
    source = HOSTS["django"] if prefix else f"app = create_app(token={'secret' if options else None!r})"
    with hosted(tmp_path, source, prefix=prefix) as server:
        result = subprocess.run(
            [Path(sys.executable).with_name("schemathesis"), "run", str(server.http.base_url.join("openapi.json")),
             "--max-examples", "300", "--checks", "all", "--continue-on-failure", "--no-color",
             "--suppress-health-check", "all", *options],
            cwd=tmp_path, env=os.environ | {"SCHEMATHESIS_HOOKS": "hooks"},
            capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert result.returncode == 0, "\n".join(line[:200] for line in result.stdout.split("\n")) + result.stderr
        assert int(re.search(r"(\d+) generated", result.stdout)[1]) > 300
        server.settled()
    delivered(server)


# -------------------------------------------------------------------------------------------------- real disks


def test_while_the_outbox_has_no_room_it_promises_nothing(tmp_path):
    kept = {}

    def refused():
        message = f"{len(kept)} ".ljust(9000, "x")
        answer = server.http.post(PATH, json={"message": message})
        if answer.status_code == 202:
            kept[answer.json()["id"]] = message
            return False
        test_service.refusal(answer, 503)
        return int(answer.headers["Retry-After"]) > 0

    def is_well():
        answer = server.http.get("/health")
        assert (answer.status_code == 200) == (answer.json()["status"] == "ok")
        return answer.status_code == 200

    with disk(tmp_path / "disk", "4m") as small:
        with serve(tmp_path, outbox=small / "outbox", delay=1) as server:
            kept |= post(server, *numbered("before", 50))
            filler = fill(small)
            eventually(refused)
            eventually(lambda: not is_well())
            for _ in range(3):
                time.sleep(2.5)  # until the relay has freed what it can
                os.truncate(fill(small), filler.stat().st_size - 8192)  # room for a page or two
                assert not is_well() or not refused()
            eventually(lambda: server.log.read_text().count("before") == 50)  # and its row cannot be deleted
            filler.unlink()
            eventually(lambda: not refused(), within=5)
            eventually(is_well)
            assert_exactly_once(kept, server)
            server.settled()
            filler = fill(small)
            eventually(refused)
        filler.unlink()
        with serve(tmp_path, outbox=small / "outbox") as server:
            assert_exactly_once(kept, server)


BROKEN_DISK_HOST = """
import ctypes, errno, platform, struct
from service import app as service

SECCOMP, SYNCS = {"x86_64": (317, (74, 75)), "aarch64": (277, (82, 83))}[platform.machine()]

async def app(scope, receive, send):
    if scope["type"] == "http" and scope["path"] == "/break":  # from now on fsync and fdatasync fail
        code = struct.pack("HBBI", 0x20, 0, 0, 0) + struct.pack("HBBI", 0x15, 1, 0, SYNCS[0])
        code += struct.pack("HBBI", 0x15, 0, 1, SYNCS[1]) + struct.pack("HBBI", 0x06, 0, 0, 0x50000 | errno.EIO)
        code += struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)
        program = struct.pack("HxxxxxxP", 5, ctypes.addressof(buffer := ctypes.create_string_buffer(code)))
        libc = ctypes.CDLL(None)
        assert libc.prctl(38, 1, 0, 0, 0) == libc.syscall(SECCOMP, 1, 1, program) == 0  # for all threads
    await service(scope, receive, send)
"""


def test_what_could_not_be_synced_is_refused_and_not_kept(tmp_path):
    """Nor by what the failed commit has left in the write-ahead log, if the server is killed then."""
    with hosted(tmp_path, BROKEN_DISK_HOST) as server:
        kept = post(server, "before")
        server.http.get("/break")
        assert [server.http.post(PATH, json={"message": "refused"}).status_code for _ in range(3)] == [503] * 3
    with hosted(tmp_path, BROKEN_DISK_HOST) as server:
        kept |= post(server, "after")
        assert_exactly_once(kept, server)
    assert "refused" not in server.log.read_text()


def test_a_small_disk_is_not_filled_by_what_is_delivered(tmp_path):
    with disk(tmp_path / "disk", "1m") as small, serve(tmp_path, outbox=small / "outbox") as server:
        with Clients(server) as clients:
            clients.more(3000)
        assert_exactly_once(clients.kept, server)


def test_while_the_log_has_no_room_answers_go_on_and_it_heals_by_itself(tmp_path):
    with disk(tmp_path / "disk", "2m") as small, serve(tmp_path, log=small / "log.txt") as server:
        kept = post(server, "before")
        eventually(lambda: ids(server.log))
        filler = fill(small)
        with Clients(server) as clients:
            clients.more(1000)
        assert server.http.get("/health").json()["pending"] > 900
        filler.unlink()
        assert_exactly_once(kept | clients.kept, server)
        server.settled()
        assert 0 < sum("log.txt" in line for line in server.output().split("\n")) < 10


# ------------------------------------------------------------------------------------------------------- crash

WORKERS = ("--workers", "4")
CRASHES = {  # one worker on its own is test_service's
    "four workers": (WORKERS, {}),
    "a slow notifier": ([], {"delay": 0.4}),
    "no fsync": ([], {"fsync": False}),
}


@cases("options, settings", CRASHES)
def test_however_it_runs_killed_again_and_again_under_load_every_line_is_there_once(tmp_path, options, settings):
    with Clients(sizes=[12, 9000]) as clients:
        for _ in range(5):
            with serve(tmp_path, *options, **settings) as clients.server:
                clients.more(300)
    with serve(tmp_path, *options, **settings) as server:
        assert_exactly_once(clients.kept, server)
        server.settled()


def test_each_of_four_workers_is_killed_under_load_and_every_line_is_there_once(tmp_path):
    with serve(tmp_path, *WORKERS) as server:
        with Clients(server) as clients:
            started = partial(re.findall, r"Started server process \[(\d+)\]")
            for pid in eventually(lambda: len(found := started(server.output())) == 4 and found):
                clients.more(300)
                os.kill(int(pid), signal.SIGKILL)
            clients.more(300)
        assert_exactly_once(clients.kept, server)
        server.settled()


def test_killed_in_the_middle_of_a_write_nothing_is_torn(tmp_path):
    """What is left is written many lines at once, and the server killed as soon as the log grows."""

    def size():
        return log.stat().st_size if log.exists() else 0

    log = tmp_path / "log.txt"
    with serve(tmp_path, delay=AN_HOUR) as server, Clients(server, sizes=[9000]) as clients:
        clients.more(2000)
    for _ in range(6):
        before, deadline = size(), time.monotonic() + 60
        with serve(tmp_path, ready=False):
            while size() <= before:  # no pause, so as not to miss the write
                assert time.monotonic() < deadline
    with serve(tmp_path) as server:
        assert_exactly_once(clients.kept, server)


def test_eight_servers_start_at_once_on_what_a_dead_one_left(tmp_path):
    with serve(tmp_path, delay=AN_HOUR) as dead:
        kept = post(dead, *numbered("left", 500))
    with ExitStack() as stack:
        servers = [stack.enter_context(serve(tmp_path, ready=False)) for _ in range(8)]
        for server in servers:
            eventually(server.ready)
            kept |= post(server, "anew")
        assert_exactly_once(kept, server)
        for server in servers:
            server.settled()


def test_who_reads_the_outbox_costs_no_answer(tmp_path):
    with serve(tmp_path) as server:
        kept = post(server, "one")
        with closing(sqlite3.connect(server.outbox / "outbox.db", isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM sqlite_schema").fetchall()
            end = time.monotonic() + 8  # longer than it takes until the relay would checkpoint, and a commit gives up
            while time.monotonic() < end:
                kept |= post(server, "meanwhile")
        assert_exactly_once(kept, server)


def test_nobody_takes_the_work_of_a_server_that_is_paused(tmp_path):
    with serve(tmp_path, delay=5) as paused, serve(tmp_path) as other:
        kept = post(paused, *numbered("paused", 20))
        paused.process.send_signal(signal.SIGSTOP)
        end = time.monotonic() + 12
        while time.monotonic() < end:
            kept |= post(other, "meanwhile")
            time.sleep(0.2)
        assert "paused" not in other.log.read_text()
        paused.process.send_signal(signal.SIGCONT)
        assert_exactly_once(kept, other)
        paused.settled()
        other.settled()


def test_a_reload_under_load_loses_nothing(tmp_path):
    host = tmp_path / "host.py"

    def is_reloaded(times):
        host.write_text(host.read_text())  # again and again, as it takes uvicorn a moment until it watches
        return server.output().count("Started server process") > times

    with hosted(tmp_path, "app = create_app(delay=0.3)\n", "--reload") as server:
        with Clients(server) as clients:
            for times in (1, 2):
                clients.more(200)
                eventually(partial(is_reloaded, times))
            clients.more(200)
        assert_exactly_once(clients.kept, server)
        server.settled()


def test_a_log_can_be_renamed_under_load(tmp_path):
    with serve(tmp_path, *WORKERS) as server:
        with Clients(server) as clients:
            for number in range(4):
                clients.more(500)
                eventually(server.log.exists)
                server.log.rename(f"{server.log}.{number}")
            clients.more(500)
        assert_exactly_once(clients.kept, server)
        assert len(list(tmp_path.glob("log.txt*"))) == 5


@pytest.mark.parametrize("kind", ["delay", "def", "async def"])
def test_what_waits_takes_at_most_10_kib_each(tmp_path, kind):
    """With a request's whole chain of tasks kept alive for each, it would be more."""
    sleep = "await asyncio.sleep(600)" if kind == "async def" else "time.sleep(600)"
    notify = "notify = None" if kind == "delay" else f"{kind} notify(n): {sleep}"
    source = f"import asyncio, time\n{notify}\napp = create_app(notify, delay=600, fsync=False)\n"
    with hosted(tmp_path, source) as server, Clients(server) as clients:
        clients.more(1000)
        before = resources(server)[0]
        clients.more(5000)
        pending = len(clients.kept)
        assert resources(server)[0] - before < 10 * (pending - 1000)


def test_twenty_thousand_pending_at_start(tmp_path):
    """The goals are 3, 10 and 0.5 s: a busy machine gets three times that."""
    settings = {"max_pending": 30_000, "fsync": False}
    with serve(tmp_path, delay=AN_HOUR, **settings) as server, Clients(server) as clients:
        clients.more(20_000)
    start, slowest = time.monotonic(), 0.0
    with serve(tmp_path, **settings) as server:
        kept = clients.kept | post(server, "first")
        assert time.monotonic() - start < 9
        while len(ids(server.log)) < 20_000:
            assert time.monotonic() - start < 30
            asked = time.monotonic()
            kept |= post(server, "meanwhile")
            slowest = max(slowest, time.monotonic() - asked)
        assert slowest < 1.5
        assert resources(server)[0] < 250 * 1024
        assert_exactly_once(kept, server)
        server.settled()


# ----------------------------------------------------------------------------------------------------- engines


@contextmanager
def smtp_server():
    """A real SMTP server: its port, and the mail it received."""
    received, port = [], []

    class Verbatim(SMTP):
        async def smtp_RCPT(self, arg):
            self.envelope.recipient = arg  # as aiosmtpd decodes what it keeps
            await super().smtp_RCPT(arg)

    class Handler:
        async def handle_DATA(self, server, session, envelope):
            received.append(envelope)
            return "250 OK"

    async def serve():
        server = await asyncio.get_running_loop().create_server(lambda: Verbatim(Handler()), "127.0.0.1", 0)
        port.append(server.sockets[0].getsockname()[1])
        async with server:
            await asyncio.to_thread(stop.wait)

    stop = threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        yield eventually(lambda: port and port[0]), received
    finally:
        stop.set()
        thread.join()


MAIL = {
    "plain": ("user@example.com", "Hello, wörld 😀\n\nbye"),
    "forged headers": ("user@example.com", "Bcc: eve@example.com\r\nSubject: forged\r\n\r\nforged"),
    "forged end": (
        "user@example.com",
        "a\r\n.\r\nMAIL FROM:<eve@example.com>\r\nRCPT TO:<eve@example.com>\r\nDATA\r\n",
    ),
    "lone carriage returns": ("user@example.com", "a\rBcc: eve@example.com\r.\rb"),
    "a long line": ("user@example.com", "x" * 10_000),
    "odd address": ("a..b'/+{|}~=?utf-8?q?=@example.com", "odd"),
    "an address that could be decoded to others": ("=?utf-8?q?eve=40example.com=2C?=@example.com", "odd"),
    "an address that could be decoded to a header": ("=?utf-8?q?=0D=0ABcc=3A_eve=40example.com?=@example.com", "odd"),
    "percent and bang": ("a%b!c@example.com", "odd"),
    "the longest address": ("a" * 64 + "@" + ".".join(["b" * 60] * 3 + ["com"]), "long"),
    "nothing": ("user@example.com", ""),
}


def test_smtp_gets_each_notification_as_one_mail_that_no_input_can_forge(tmp_path, monkeypatch):
    with smtp_server() as (port, received):
        monkeypatch.setenv("SMTP_SERVER", f"127.0.0.1:{port}")
        with hosted(tmp_path, block("smtp")) as server:
            kept = {}
            for email, message in MAIL.values():
                answer = server.http.post(test_service.path_of(email), json={"message": message})
                assert answer.status_code == 202
                kept[answer.json()["id"]] = (email, message)
            server.settled()
    assert len(received) == len(MAIL)
    for envelope in received:
        mail = message_from_bytes(envelope.content)
        [id] = [id for id in kept if id in mail["Message-ID"]]
        email, message = kept.pop(id)
        assert (envelope.recipient, len(envelope.rcpt_tos)) == (f"TO:<{email}>", 1)
        assert ([to.split() for to in mail.get_all("To")], len(mail.get_all("From"))) == ([[email]], 1)
        assert (mail.get_all("Subject"), {"Bcc", "Cc"} & {*mail.keys()}) == (["A notification"], set())
        assert mail.get_payload(decode=True).decode().splitlines() == message.splitlines()


def test_a_webhook_gets_each_notification_and_its_repeat_with_the_id_as_idempotency_key(tmp_path, monkeypatch):
    calls = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            key, size = self.headers["Idempotency-Key"], int(self.headers["Content-Length"])
            self.send_response(204 if key in dict(calls) else 500)
            calls.append((key, json.loads(self.rfile.read(size))))
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as hook:
        thread = threading.Thread(target=hook.serve_forever)
        thread.start()
        try:
            monkeypatch.setenv("WEBHOOK", f"http://127.0.0.1:{hook.server_port}/hook")
            with hosted(tmp_path, block("webhook")) as server:
                kept = post(server, "one", "two\nlines", "three 😀")
                server.settled()
        finally:
            hook.shutdown()
            thread.join()
    assert Counter(key for key, _ in calls) == dict.fromkeys(kept, 2)
    assert all(body == {"email": test_service.USER, "message": kept[key]} for key, body in calls)


def test_a_webhook_reads_no_certificates_for_each_notification(monkeypatch):
    load, loads = ssl.create_default_context, []
    monkeypatch.setattr(ssl, "create_default_context", lambda *how, **more: loads.append(how) or load(*how, **more))
    monkeypatch.setenv("WEBHOOK", "https://127.0.0.1:1/nobody")
    exec(block("webhook"), recipe := {})
    for _ in range(3):
        with pytest.raises(httpx.ConnectError):
            anyio.run(recipe["call_webhook"], Notification("an id", test_service.USER, "hello", "now"))
    assert len(loads) == 1


def test_a_mail_server_and_a_broker_that_never_say_a_word_are_failures_and_no_threads_for_ever(tmp_path, monkeypatch):
    with ExitStack() as servers:
        silent = servers.enter_context(socket.create_server(("127.0.0.1", 0)))
        port = silent.getsockname()[1]
        monkeypatch.setenv("SMTP_SERVER", f"127.0.0.1:{port}")
        monkeypatch.setenv("CELERY_BROKER_URL", f"redis://127.0.0.1:{port}/0")
        started = []
        for name, source in {"smtp": block("smtp"), "celery": block("celery", "python celery")}.items():
            (tmp_path / name).mkdir()
            started.append(servers.enter_context(hosted(tmp_path / name, source)))
            post(started[-1], "unheard")
        for server in started:
            eventually(lambda server=server: server.http.get("/health").json()["failed"] == 1)


def test_celery_gets_each_notification_however_long_its_broker_is_down(tmp_path, monkeypatch):
    path = str(tmp_path / "redis.sock")
    redis = ["redis-server", "--port", "0", "--unixsocket", path, "--save", ""]
    celery = [sys.executable, "-m", "celery", "-A", "host:celery", "worker", "--pool", "solo", "--loglevel", "info"]
    monkeypatch.setenv("CELERY_BROKER_URL", f"redis+socket://{path}")

    with hosted(tmp_path, block("celery", "python celery")) as server:
        kept = post(server, *numbered("while it is down", 50))
        eventually(lambda: server.http.get("/health").json()["failed"] > 0)
        assert server.http.get("/health").json()["pending"] == 50
        with serve(tmp_path, command=redis, ready=False), serve(tmp_path, command=celery, ready=False) as worker:
            kept |= post(server, *numbered("when it is up", 50))
            worked = partial(re.findall, r"Task \S+\[(\w+)\] succeeded")
            eventually(lambda: {*worked(worker.output())} == kept.keys())
            server.settled()


# -------------------------------------------------------------------------------------------------------- soak

HOSTILE = [
    b"\x16\x03\x01 what is this\r\n\r\n",
    request(TARGET, MEDIA, b"Content-Length: 100", body=b"{", length=False),
    request(TARGET, MEDIA, test_service.CHUNKED, body=b"ffff\r\n{", length=False),
    request(TARGET, MEDIA, body=b"x" * 100_000),
    request(TARGET, MEDIA, body=b"[" * 30_000),
    request(TARGET, b"Idempotency-Key: \xff"),
    request(TARGET + b"%0A"),
    request(b"/" + b"a" * 20_000),
]


@contextmanager
def hostility(server: Server):
    """A stranger who sends all of these in turn, and waits for an answer or does not."""

    def be_hostile():
        for number, data in enumerate(cycle(HOSTILE)):
            if stop.is_set():
                break
            with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), timeout=1) as stranger:
                stranger.sendall(data)
                if number % 3:
                    stranger.recv(1000)

    stop = threading.Event()
    thread = threading.Thread(target=be_hostile)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def test_soak(tmp_path):
    """After good and hostile load, beside a server that is killed again and again, all is as it was at first."""
    kept, used = {}, []
    with serve(tmp_path, delay=0.05) as lasting:
        with hostility(lasting):
            for _ in range(6):
                with Clients(lasting) as clients, Clients() as others:
                    for _ in range(2):
                        with serve(tmp_path, delay=0.05) as others.server, hostility(others.server):
                            others.more(700)
                kept |= clients.kept | others.kept
                eventually(lambda: rows(lasting.outbox) == 0)
                lasting.settled()
                used.append(resources(lasting))
        assert_exactly_once(kept, lasting)
        memory, descriptors = zip(*used, strict=True)
        assert memory[-1] < memory[0] * 1.2 + 4096, memory
        assert descriptors[-1] < descriptors[0] + 10, descriptors
        lasting.settled()
