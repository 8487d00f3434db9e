"""Fetching from a hostile server: every URL ends kept or named, nothing hangs, nothing settled is asked for twice."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rating_train.errors import UserError
from rating_train.files import read_json, read_json_lines
from rating_train.prepare.images import http_client
from rating_train.prepare.images.fetch import FetchOptions, FetchProgress, fetch_all
from rating_train.prepare.images.fetch_options import parse_fetch_options
from rating_train.prepare.images.lookup import ImageProblem
from rating_train.prepare.images.square import square_jpeg
from rating_train.prepare.images.stores import CacheStore
from rating_train.shards.schema import MANIFEST_NAME, QUARANTINE_NAME
from tests.conftest import REPO

pytestmark = pytest.mark.timeout(60)

QUICK = FetchOptions(
    concurrency=16,
    per_host=16,
    connect_timeout_s=10,
    read_timeout_s=10,
    total_timeout_s=15,
    retries=1,
    backoff_s=0.02,
    max_wait_s=0.2,
    max_bytes=200_000,
    allow_private=True,
)

#: For a server that stalls. A busy machine may take as long for an answer that comes at once, which would then be
#: asked for twice, so answers are not counted with these.
IMPATIENT = {"read_timeout_s": 0.8, "total_timeout_s": 1.5}


def jpeg(seed: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (60, 40), (seed % 256, 99, 199)).save(out, "JPEG")
    return out.getvalue() + b"%d" % seed


def bomb_png() -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


class Answer(socketserver.StreamRequestHandler):
    """One connection, one request, answered as the first part of its path says."""

    server: HostileServer
    timeout = 20

    def handle(self) -> None:
        line = self.rfile.readline().decode("latin-1").split()
        if len(line) < 2:
            return
        while self.rfile.readline().strip():
            pass
        path = line[1]
        with self.server.lock:
            self.server.count[path] += 1
            turn = self.server.count[path]
            self.server.now += 1
            self.server.most = max(self.server.most, self.server.now)
        try:
            kind, _, rest = path.strip("/").partition("/")
            getattr(self, "do_" + kind)(rest, turn)
        except OSError:
            pass  # the client has hung up, as it should
        finally:
            with self.server.lock:
                self.server.now -= 1

    def say(
        self,
        body: bytes,
        status: str = "200 OK",
        kind: str = "image/jpeg",
        length: int | None = None,
        **more: str,
    ) -> None:
        fields = {"Content-Length": str(len(body) if length is None else length), "Connection": "close"}
        fields |= {"Content-Type": kind} if kind else {}
        fields |= {name.replace("_", "-"): value for name, value in more.items()}
        head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
        self.wfile.write(f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body)

    def do_good(self, rest: str, turn: int) -> None:
        time.sleep(self.server.delay_s)
        self.say(jpeg(int(rest)))

    def do_octets(self, rest: str, turn: int) -> None:
        self.say(jpeg(), kind="application/octet-stream" if rest == "typed" else "")

    def do_bomb(self, rest: str, turn: int) -> None:
        self.say(bomb_png(), kind="image/png")

    def do_html(self, rest: str, turn: int) -> None:
        self.say(b"<html>not yours</html>", kind="text/html; charset=utf-8")

    def do_htmlasjpeg(self, rest: str, turn: int) -> None:
        self.say(b"<html>not yours</html>")

    def do_gzip(self, rest: str, turn: int) -> None:
        self.say(jpeg(), Content_Encoding="gzip")

    def do_empty(self, rest: str, turn: int) -> None:
        self.say(b"")

    def do_status(self, rest: str, turn: int) -> None:
        self.say(b"<html>", status=f"{rest} No")

    def do_retry(self, rest: str, turn: int) -> None:  # 429, then the picture
        if turn == 1:
            self.say(b"", status="429 Slow Down", Retry_After=rest)
        else:
            self.say(jpeg())

    def do_redirect(self, rest: str, turn: int) -> None:
        self.say(b"", status="302 Found", Location=self.server.redirect_to)

    def do_stall(self, rest: str, turn: int) -> None:
        self.server.closing.wait(20)

    def do_stallbody(self, rest: str, turn: int) -> None:
        self.say(jpeg(), length=10_000)
        self.server.closing.wait(20)

    def do_drip(self, rest: str, turn: int) -> None:
        self.say(b"", length=10_000)
        for _ in range(100):
            self.wfile.write(b"\xff")
            time.sleep(0.1)

    def do_truncate(self, rest: str, turn: int) -> None:
        self.say(jpeg(), length=10_000)

    def do_chunks(self, rest: str, turn: int) -> None:  # no last chunk
        head = "HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n"
        self.wfile.write(head.encode() + b"3\r\n\xff\xd8\xff\r\n")

    def do_reset(self, rest: str, turn: int) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def do_close(self, rest: str, turn: int) -> None:
        pass

    def do_garbage(self, rest: str, turn: int) -> None:
        self.wfile.write(b"\x00\xff nothing of HTTP \r\n\r\n")

    def do_headers(self, rest: str, turn: int) -> None:  # without end
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        while True:
            self.wfile.write(b"X-Flood: " + b"x" * 4000 + b"\r\n")

    def do_large(self, rest: str, turn: int) -> None:
        self.say(jpeg(), length=10**12)

    def do_endless(self, rest: str, turn: int) -> None:  # no length is told, and no end comes
        self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: image/jpeg\r\n\r\n\xff\xd8\xff")
        while True:
            self.wfile.write(bytes(65536))
            self.server.flood += 65536


class HostileServer(socketserver.ThreadingTCPServer):
    """Counts requests by path; ``most`` is the largest number under way at a time."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.count: Counter[str] = Counter()
        self.now = self.most = self.flood = 0
        self.delay_s = 0.0
        self.redirect_to = self.url("good/1")

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are the purpose."""


@pytest.fixture
def server() -> Iterator[HostileServer]:
    hostile = HostileServer()
    thread = threading.Thread(target=hostile.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield hostile
    hostile.closing.set()
    hostile.shutdown()
    hostile.server_close()
    thread.join(5)


def options(**changes: Any) -> FetchOptions:
    return FetchOptions(**{**QUICK.__dict__, **changes})


def fetch(server: HostileServer, cache: Path, paths: list[str], **changes: Any) -> dict[str, tuple[str, str]]:
    """{path: (reason, detail)} of the problems."""
    requests = [(f"B{n}", server.url(path)) for n, path in enumerate(paths)]
    problems = fetch_all(requests, cache, options(**changes))
    return {p: (problems[u].reason, problems[u].detail) for p in paths if (u := server.url(p)) in problems}


#: What a server may do -> the reason, the requests it takes; "" is kept.
CASES = {
    "good/7": ("", 1),
    "octets/typed": ("", 1),
    "octets/untyped": ("", 1),
    "bomb/a.png": ("", 1),
    "retry/0": ("", 2),
    "html/a.jpg": ("fetch_not_an_image", 1),
    "htmlasjpeg/a.jpg": ("fetch_not_an_image", 1),
    "gzip/a.jpg": ("fetch_not_an_image", 1),
    "empty/a.jpg": ("image_empty", 1),
    "status/404": ("fetch_gone", 1),
    "status/410": ("fetch_gone", 1),
    "status/403": ("fetch_refused", 1),
    "status/206": ("fetch_refused", 1),
    "status/503": ("fetch_failed", 2),
    "status/429": ("fetch_failed", 2),
    "redirect/a.jpg": ("fetch_redirect", 1),
    "stall/a.jpg": ("fetch_failed", 2),
    "stallbody/a.jpg": ("fetch_failed", 2),
    "drip/a.jpg": ("fetch_failed", 2),
    "truncate/a.jpg": ("fetch_failed", 2),
    "chunks/a.jpg": ("fetch_failed", 2),
    "reset/a.jpg": ("fetch_failed", 2),
    "close/a.jpg": ("fetch_failed", 2),
    "garbage/a.jpg": ("fetch_failed", 2),
    "headers/a.jpg": ("fetch_failed", 2),
    "large/a.jpg": ("image_too_large", 1),
    "endless/a.jpg": ("image_too_large", 1),
}

STALLS = [path for path in CASES if path.startswith(("stall", "drip"))]


def test_everything_a_server_may_do_ends_kept_or_named(server: HostileServer, tmp_path: Path) -> None:
    began = time.monotonic()
    problems = fetch(server, tmp_path, [path for path in CASES if path not in STALLS])
    problems |= fetch(server, tmp_path, STALLS, **IMPATIENT)
    seconds = time.monotonic() - began
    assert {path: problems.get(path, ("", ""))[0] for path in CASES} == {p: r for p, (r, _) in CASES.items()}
    assert all(detail for _, detail in problems.values())
    requests = {path: server.count["/" + path] for path in CASES}
    assert requests == {path: n for path, (_, n) in CASES.items()}
    # What stalls takes 2 requests of 1.5 s and a wait of 0.2 s, all at a time; the server would stall for 20 s.
    assert seconds < 20, "nothing hangs"
    assert server.flood < 20 * QUICK.max_bytes, "an endless body is stopped while it comes"

    store = CacheStore(tmp_path)
    assert store.read(server.url("good/7"), "-") == jpeg(7)
    for path, (reason, _) in CASES.items():
        if reason:
            with pytest.raises(ImageProblem) as caught:
                store.read(server.url(path), "-")
            assert caught.value.reason == reason
    with pytest.raises(ImageProblem) as caught:
        square_jpeg(store.read(server.url("bomb/a.png"), "-"), 32)
    assert caught.value.reason == "image_too_large"

    again = fetch(server, tmp_path, list(CASES))
    assert again == problems, "the same outcome from the cache"
    assert {path: server.count["/" + path] for path in CASES} == requests, "nothing is asked for twice"


def test_retry_failed_asks_for_the_failed_ones_only(server: HostileServer, tmp_path: Path) -> None:
    paths = ["good/1", "status/404", "status/503"]
    fetch(server, tmp_path, paths)
    problems = fetch(server, tmp_path, paths, retry_failed=True)
    assert {p: r for p, (r, _) in problems.items()} == {
        "status/404": "fetch_gone",
        "status/503": "fetch_failed",
    }
    assert dict(server.count) == {"/good/1": 1, "/status/404": 2, "/status/503": 4}


def test_a_url_of_several_items_is_fetched_once(server: HostileServer, tmp_path: Path) -> None:
    server.delay_s = 0.1
    seen: list[FetchProgress] = []
    requests = [(f"B{n}", server.url("good/1" if n % 2 else "status/404")) for n in range(40)]
    problems = fetch_all(requests, tmp_path, QUICK, seen.append)
    assert list(problems) == [server.url("status/404")]
    assert dict(server.count) == {"/good/1": 1, "/status/404": 1}
    assert seen[-1] == FetchProgress(total=40, kept=20, problems=20, fetched=1)
    assert [p.kept + p.problems for p in seen] == list(range(1, 41))


@pytest.mark.parametrize(("per_host", "concurrency", "most"), [(3, 16, 3), (16, 5, 5)])
def test_requests_under_way_are_bounded(
    server: HostileServer, tmp_path: Path, per_host: int, concurrency: int, most: int
) -> None:
    server.delay_s = 0.02
    paths = [f"good/{n}" for n in range(40)]
    assert not fetch(server, tmp_path, paths, per_host=per_host, concurrency=concurrency)
    assert server.most == most


def test_a_slow_host_does_not_hold_up_another(server: HostileServer, tmp_path: Path) -> None:
    other = HostileServer()
    thread = threading.Thread(target=other.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    stalled = [("-", server.url(f"stall/{n}")) for n in range(6)]
    quick = [("-", other.url(f"good/{n}").replace("127.0.0.1", "localhost")) for n in range(30)]
    kept_after: list[float] = []
    began = time.monotonic()

    def on_progress(progress: FetchProgress) -> None:
        if progress.kept == len(quick) and not kept_after:
            kept_after.append(time.monotonic() - began)

    fetch_all(stalled + quick, tmp_path, options(per_host=2, concurrency=4, **IMPATIENT), on_progress)
    other.shutdown()
    other.server_close()
    assert kept_after and kept_after[0] < 0.4 * (time.monotonic() - began)


def test_waits_grow_and_are_bounded() -> None:
    o = FetchOptions(backoff_s=0.5, max_wait_s=60)
    waits = [o.wait_s("u", n, 0.0) for n in range(4)]
    assert all(0.5 * 0.5 * 2**n <= w <= 1.5 * 0.5 * 2**n for n, w in enumerate(waits))
    assert waits == [o.wait_s("u", n, 0.0) for n in range(4)] and o.wait_s("v", 0, 0.0) != waits[0]
    assert o.wait_s("u", 0, 7.0) == 7.0 and o.wait_s("u", 0, 10**9) == 60 and o.wait_s("u", 30, 0) == 60


@pytest.mark.parametrize(
    ("value", "low", "high"),
    [("3", 3, 3), ("", 0, 0), ("soon", 0, 0), ("-5", 0, 0), ("nan", 0, 0), ("inf", 60, float("inf"))],
)
def test_retry_after_numbers(value: str, low: float, high: float) -> None:
    assert low <= http_client._retry_after_s(value) <= high


def test_retry_after_dates() -> None:
    import email.utils

    assert 8 <= http_client._retry_after_s(email.utils.formatdate(time.time() + 10, usegmt=True)) <= 10
    assert http_client._retry_after_s("Wed, 21 Oct 2015 07:28:00 GMT") == 0


def test_retry_after_is_honoured_up_to_the_bound(server: HostileServer, tmp_path: Path) -> None:
    began = time.monotonic()
    assert not fetch(server, tmp_path, ["retry/3600"], max_wait_s=0.5)
    assert 0.5 <= time.monotonic() - began < 60, "not the hour that the server asks for"


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="3 problems"):
        FetchOptions(concurrency=0, retries=-1, read_timeout_s=float("nan"))


# --- addresses ----------------------------------------------------------------------------------------


def test_private_addresses_are_refused_by_default(server: HostileServer, tmp_path: Path) -> None:
    port = server.server_address[1]
    hosts = (
        "127.0.0.1 localhost [::1] [::ffff:127.0.0.1] [::ffff:7f00:1] [::] 0.0.0.0 2130706433 0x7f000001 127.1 "
        "0177.0.0.1 127.0.0.1. 169.254.169.254 10.0.0.1 192.168.1.1 172.16.0.1 100.64.0.1 224.0.0.1 240.0.0.1 "
        "[fe80::1] [fc00::1] [64:ff9b::7f00:1] [2002:7f00:1::] [ff02::1]"
    ).split()
    urls = [f"http://{host}:{port}/good/1" for host in hosts]
    began = time.monotonic()
    problems = fetch_all([("-", url) for url in urls], tmp_path, options(allow_private=False))
    reasons = {host: problems[url].reason for host, url in zip(hosts, urls)}
    trailing_dot = reasons.pop("127.0.0.1.")  # some resolvers take it for a name, and find none
    assert trailing_dot in ("fetch_address_refused", "fetch_failed")
    assert set(reasons.values()) == {"fetch_address_refused"}, reasons
    assert not server.count and time.monotonic() - began < 60


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_public_addresses(address: str) -> None:
    assert http_client._is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "a.jpg",
        "file:///etc/passwd",
        "ftp://127.0.0.1/a",
        "http://",
        "http://[",
        "http:///a.jpg",
        "http://u:p@127.0.0.1/a",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:x/",
        "http://127.0.0.1/" + "x" * 5000,
        "http://\ud800/",
    ],
)
def test_bad_urls(tmp_path: Path, url: str) -> None:
    assert fetch_all([("-", url)], tmp_path, options(retries=0))[url].reason == "fetch_bad_url"


def test_a_name_is_looked_up_once_and_that_address_is_used(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def look_up(host: str) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["127.0.0.2"]

    monkeypatch.setattr(http_client, "_look_up", look_up)
    urls = [server.url(f"good/{n}").replace("127.0.0.1", "shop.invalid") for n in range(5)]
    assert not fetch_all([("-", url) for url in urls], tmp_path, QUICK)
    assert asked == ["shop.invalid"] and sum(server.count.values()) == 5


def test_a_name_that_is_not_found_is_not_asked_for_by_everybody_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def look_up(host: str) -> list[str]:
        asked.append(host)
        await asyncio.sleep(30)
        return []

    monkeypatch.setattr(http_client, "_look_up", look_up)
    began = time.monotonic()
    urls = [f"http://shop.invalid/{n}" for n in range(10)]
    problems = fetch_all([("-", url) for url in urls], tmp_path, options(connect_timeout_s=0.3))
    assert {p.reason for p in problems.values()} == {"fetch_failed"} and len(problems) == 10
    assert len(asked) == 1 and time.monotonic() - began < 25, "a look-up takes 30 s"


def test_one_private_address_among_several_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    async def look_up(host: str) -> list[str]:
        return ["8.8.8.8", "127.0.0.1"]

    monkeypatch.setattr(http_client, "_look_up", look_up)
    addresses = http_client._CheckedAddresses(allow_private=False, timeout_s=1)
    with pytest.raises(ImageProblem):
        asyncio.run(addresses.check("shop.invalid"))
    with pytest.raises(OSError):
        asyncio.run(addresses.resolve("shop.invalid", 80))


def test_the_socket_is_refused_even_if_the_look_up_was_fooled(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def trusting(self: Any, host: str) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(http_client._CheckedAddresses, "check", trusting)
    for url in (server.url("good/1"), server.url("good/1").replace("127.0.0.1", "shop.invalid")):
        (problem,) = fetch_all([("-", url)], tmp_path, options(allow_private=False)).values()
        assert problem.reason == "fetch_address_refused"
    assert not server.count


def test_redirects_that_are_allowed_are_checked_too(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not fetch(server, tmp_path / "a", ["redirect/a.jpg"], max_redirects=1)
    server.redirect_to = "/good/2"
    assert not fetch(server, tmp_path / "b", ["redirect/a.jpg"], max_redirects=1)
    assert server.count["/good/1"] == server.count["/good/2"] == 1
    server.redirect_to = server.url("redirect/a.jpg")
    assert fetch(server, tmp_path / "c", ["redirect/a.jpg"], max_redirects=3)["redirect/a.jpg"][0] == (
        "fetch_redirect"
    )
    assert server.count["/redirect/a.jpg"] == 2 + 4
    real = http_client._is_public
    monkeypatch.setattr(http_client, "_is_public", lambda a: a == "127.0.0.1" or real(a))
    for target, reason in (
        ("file:///etc/passwd", "fetch_bad_url"),
        ("http://127.0.0.2/", "fetch_address_refused"),
    ):
        server.redirect_to = target
        got = fetch(server, tmp_path / reason, ["redirect/a.jpg"], max_redirects=3, allow_private=False)
        assert got["redirect/a.jpg"][0] == reason


# --- stopping -----------------------------------------------------------------------------------------

PROGRAM = """
import sys
from rating_train.prepare.images.fetch import FetchOptions, fetch_all
base, cache, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
urls = [(str(n), f"{base}{n}") for n in range(count)]
options = FetchOptions(allow_private=True, concurrency=16, per_host=16)
fetch_all(urls, cache, options, lambda p: print(p.fetched, flush=True))
"""


def start(server: HostileServer, cache: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM, server.url("good/"), str(cache), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def stop_after(process: subprocess.Popen[str], fetched: int, how: Callable[[], None]) -> str:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.strip().isdigit() and int(line) >= fetched:
            break
    how()
    rest, _ = process.communicate(timeout=20)
    return "".join(lines[-20:]) + rest


@pytest.mark.parametrize("interrupt", ["kill", "terminate_by_ctrl_c"])
def test_stopped_at_any_moment_the_cache_is_complete_and_used(
    server: HostileServer, tmp_path: Path, interrupt: str
) -> None:
    """Stopped twice at some moment, then run to the end: no torn file, and only what was under way comes twice."""
    count = 300
    server.delay_s = 0.005
    store = CacheStore(tmp_path)
    settled_at_stop: list[tuple[set[int], Counter[str]]] = []
    for after in (40, 70):
        process = start(server, tmp_path, count)
        how = process.kill if interrupt == "kill" else (lambda p=process: os.kill(p.pid, 2))
        output = stop_after(process, after, how)
        assert process.returncode != 0 and (interrupt == "kill" or "KeyboardInterrupt" in output), output
        kept = {n for n in range(count) if store.has(server.url(f"good/{n}"))}
        assert after <= len(kept) < count
        for n in kept:
            assert store.read(server.url(f"good/{n}"), "-") == jpeg(n), "complete or absent"
        settled_at_stop.append((kept, server.count.copy()))
    assert not fetch(server, tmp_path, [f"good/{n}" for n in range(count)])
    assert all(store.read(server.url(f"good/{n}"), "-") == jpeg(n) for n in range(count))
    for kept, then in settled_at_stop:
        assert all(server.count[f"/good/{n}"] == then[f"/good/{n}"] for n in kept)
    assert sum(server.count.values()) <= count + 2 * 16


def test_a_cache_that_cannot_be_written_stops_the_fetch(
    server: HostileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: CacheStore, url: str, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CacheStore, "put", full)
    with pytest.raises(UserError, match="No space left"):
        fetch(server, tmp_path, [f"good/{n}" for n in range(50)] + ["stall/1"])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        fetch(server, tmp_path / "file", ["good/1"])


# --- the complete command ----------------------------------------------------------------------------------

GOOD = 150


class FetchingPrepare:
    """``rating-train prepare --fetch`` of one listing per URL, started as a user does, killed at the end."""

    def __init__(self, folder: Path, listings: dict[str, list[str]]) -> None:
        self.out, self.source = folder / "data", folder / "catalogue.jsonl"
        self.cache = CacheStore(folder / "data.build" / "fetch")
        self.process: subprocess.Popen[str] | None = None
        with open(self.source, "w") as f:
            for n, (item_id, urls) in enumerate(listings.items()):
                line = {
                    "parent_asin": item_id,
                    "title": f"thing {n}",
                    "average_rating": 4,
                    "rating_number": 20,
                }
                image = {"image_paths": urls} if len(urls) > 1 else {"images": [{"large": urls[0]}]}
                f.write(json.dumps({**line, **image}) + "\n")

    def start(self, **settings: Any) -> subprocess.Popen[str]:
        """In a session of its own; ``settings`` are those of :class:`FetchOptions` that differ from the test's."""
        values = {name: v for name, v in vars(options(**settings)).items() if v != vars(FetchOptions())[name]}
        command = [
            *(sys.executable, "-m", "rating_train", "prepare", "--source", self.source, "--out", self.out),
            *("--image-size-px", 32, "--part-items", 50, "--shard-size-mb", 1, "--max-text-chars", 200),
            *("--fetch", "--fetch-set", *(f"{n}={str(v).lower()}" for n, v in values.items())),
        ]
        self.process = subprocess.Popen(
            [str(word) for word in command],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return self.process

    def finish(self, code: int = 0, **settings: Any) -> str:
        said, _ = self.start(**settings).communicate(timeout=60)
        assert self.process is not None and self.process.returncode == code, said[-3000:]
        return said

    def kill(self) -> None:
        """kill -9 of all its processes."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(20)

    def reasons(self) -> dict[str, str]:
        """Of the dataset that was made: what the quarantine says, by id; everything has a detail."""
        rows = list(read_json_lines(self.out / QUARANTINE_NAME))
        assert all(row["detail"] for row in rows)
        return {row["id"]: row["reason"] for row in rows}


@pytest.fixture
def listings(server: HostileServer) -> dict[str, list[str]]:
    """Of every case one, many good ones around them, two with one URL, and two with several."""
    paths = [f"good/{n}" for n in range(GOOD)]
    for place, path in enumerate(CASES):
        paths.insert(place * 3, path)
    paths.append("good/0")
    made = {f"F{n:04d}": [server.url(path)] for n, path in enumerate(paths)}
    made["SEVERAL"] = [server.url(p) for p in ("status/404", "bomb/b.png", "good/900", "good/901")]
    made["NONE"] = [server.url(p) for p in ("status/410", "html/b.jpg")]
    return made


@pytest.mark.timeout(120)
def test_prepare_with_fetch_killed_midway_resumes_without_requesting_twice(
    server: HostileServer, tmp_path: Path, listings: dict[str, list[str]]
) -> None:
    server.delay_s = 0.1
    prepare = FetchingPrepare(tmp_path, listings)
    patient = {"read_timeout_s": 4.0, "total_timeout_s": 5.0}  # longer than an answer of a busy machine takes
    urls = sorted({url for several in listings.values() for url in several})
    path = lambda url: "/" + url.split("/", 3)[3]  # noqa: E731
    try:
        prepare.start(**patient)
        deadline = time.monotonic() + 40
        while (
            sum(prepare.cache.has(u) for u in urls) < 30
            or sum(bool(prepare.cache.problem(u)) for u in urls) < 10
        ):
            assert prepare.process and prepare.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        prepare.kill()
        kept = [url for url in urls if prepare.cache.has(url)]
        failed = [url for url in urls if prepare.cache.problem(url)]
        then = server.count.copy()
        assert len(kept) >= 30 and len(failed) >= 10 and len(kept) + len(failed) < len(urls), "in the middle"
        final = {problem.reason for url in failed if (problem := prepare.cache.problem(url))}
        assert {"fetch_gone", "fetch_refused", "fetch_not_an_image"} <= final

        printed = prepare.finish(**patient)
    finally:
        prepare.kill()
    assert {u: server.count[path(u)] - then[path(u)] for u in kept + failed} == dict.fromkeys(
        kept + failed, 0
    )
    most = {path(u): 4 for u in urls} | {f"/good/{n}": 2 for n in range(GOOD)}
    assert all(1 <= server.count[p] <= most[p] for p in most), "each URL was asked for, none again and again"

    expected = {
        item: reason
        for item, (url, *more) in listings.items()
        if not more and (reason := CASES.get(path(url)[1:], ("",))[0])
    }
    expected |= {"NONE": "image_none_usable"}
    expected |= {
        item: "image_too_large" for item, several in listings.items() if several == [server.url("bomb/a.png")]
    }
    assert prepare.reasons() == expected, "every item ends kept or named"
    manifest = read_json(prepare.out / MANIFEST_NAME)
    assert manifest["kept"] == len(listings) - len(expected) and "prepared" in printed
    assert manifest["images"] == {
        "listings_with_several": 2,
        "fell_back_to_a_later_one": 1,
        "extra_unused": 1,
        "refused": {"fetch_gone": 2, "fetch_not_an_image": 1, "image_too_large": 1},
    }
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("data")] == ["data"]


def test_prepare_with_fetch_refuses_private_addresses_by_itself(
    server: HostileServer, tmp_path: Path
) -> None:
    prepare = FetchingPrepare(tmp_path, {"A": [server.url("good/1")], "B": [server.url("good/2")]})
    try:
        said = prepare.finish(code=2, allow_private=False)
    finally:
        prepare.kill()
    assert "fetch_address_refused" in said and "Traceback" not in said
    assert not server.count, "nothing was asked for"
    assert "too many records dropped" in said and prepare.cache.problem(server.url("good/2")), (
        "what was found out by fetching outlives a build that is given up"
    )


def test_settings_of_the_command_line() -> None:
    given = ["per_host=16", "backoff_s=2", "allow_private=true", "user_agent=a=b", "per_host=4"]
    assert parse_fetch_options(given) == FetchOptions(
        per_host=4, backoff_s=2.0, allow_private=True, user_agent="a=b"
    )
    assert parse_fetch_options(()) == FetchOptions()
    with pytest.raises(UserError) as error:
        parse_fetch_options(["perhost=1", "retries", "allow_private=1", "retries=x"])
    for words in (
        "4 problems: ",
        "'retries' is not of the form NAME=VALUE",
        "unknown key `perhost` (did you mean `per_host`?)",
        "`allow_private` is 1 (int), expected true or false",
        "`retries` is 'x' (str), expected a whole number",
    ):
        assert words in str(error.value)
    with pytest.raises(UserError, match="`retries` is -1"):
        parse_fetch_options(["retries=-1"])
