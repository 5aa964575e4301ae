"""What a served model refuses, in words, and goes on: bad pictures, odd requests, too many, others' names and pages."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from served import Sent, Served, files, form, pictures, server  # noqa: F401  fixtures
from test_learner import drawings, learned  # noqa: F401  fixtures

from perdure import Learner
from perdure.serve.limits import Limits, Refused
from perdure.serve.worker import Question


def png(wide: int, tall: int) -> bytes:
    """A PNG that claims a size; a row of it is there."""

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", wide, tall, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(bytes(99))) + part(b"IEND", b"")


def test_pictures_that_are_none_are_named_beside_good_ones(server: Served, pictures: list[Path]) -> None:
    slender = io.BytesIO()
    Image.new("L", (1, 4000)).save(slender, "PNG")
    bad = {
        "text.png": (b"no picture", "no picture that can be read"), "empty.png": (b"", "no picture that can be read"),
        "cut.png": (pictures[0].read_bytes()[:200], "no image that can be read"),
        "bomb.png": (png(10_000, 5_001), "10,000 × 5,001 pixels; allowed are 50,000,000"),
        "huge.png": (png(90_000, 90_000), "far more than 50,000,000 pixels"),
        "thin.png": (slender.getvalue(), "more than 100 times"),
        "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no picture that can be read"),
    }  # fmt: skip
    sent: Sent = [("files", name, data) for name, (data, _) in bad.items()]
    status, answer = server.predict([*files(pictures[0]), *sent])
    assert status == 200 and "error" not in answer["answers"][0]
    for row, (name, (_, said)) in zip(answer["answers"][1:], bad.items(), strict=True):
        assert row["file"] == name and said in row["error"]
    for one in sent:
        status, answer = server.predict([one])
        assert status == 400 and bad[str(one[1])][1] in answer["error"]
    assert server.predict(files(pictures[0]))[0] == 200


def test_what_a_name_says_is_never_opened(server: Served, pictures: list[Path]) -> None:
    for name in (str(pictures[0]), "../../etc/passwd", "file:///etc/passwd"):
        status, answer = server.predict([("files", name, b"")])
        assert status == 400 and answer["answers"][0]["file"] == name and "can be read" in answer["error"]
    status, answer = server.predict([("files", None, str(pictures[0]).encode())])
    assert status == 400 and "There is no field 'files' of that kind" in answer["error"]
    assert server.get("/../../etc/passwd")[0] == server.get("/%2e%2e/page.html.j2")[0] == 404


def test_malformed_and_huge_requests_are_refused_in_words(server: Served, pictures: list[Path]) -> None:
    good = files(pictures[0])
    forms: list[tuple[Sent, str]] = [
        ([], "No pictures"), ([("files", "", b"")], "No pictures"), (good * 9, "Too many files"),
        ([*good, ("topk", None, b"0")], "from 1 to 1000, not '0'"), ([*good, ("topk", None, "²".encode())], "not '²'"),
        ([*good, ("classes", None, b"cat")], "two or more classes"), ([*good, ("path", None, b"x")], "no field 'path'"),
        ([*good, ("classes", None, b"a," * 1100)], "allowed are 1,000"),
        ([*good, ("classes", None, b"a,b" * 30_000)], "cannot be read"),
    ]  # fmt: skip
    for fields, said in forms:
        status, answer = server.predict(fields)
        assert (status, said in answer["error"]) == (400, True), (fields[-1:], answer)
    for data, kind in ((b"{}", "application/json"), (b"junk", "multipart/form-data; boundary=a"),
                       (form(good)[:-40], "multipart/form-data; boundary=xYx"), (b"x", "multipart/form-data")):  # fmt: skip
        status, _, answer = server.get("/predict", data, Content_Type=kind)
        assert status == 400 and answer["error"], (kind, data[:20])
    status, answer = server.predict([("files", "x", bytes(300_000))])
    assert status == 413 and "larger than 0.2 MB" in answer["error"]
    chunked = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n"
    chunked += b"Content-Type: multipart/form-data; boundary=xYx\r\n\r\n"
    body = form([("files", "x", bytes(300_000))])
    assert b" 413 " in server.raw(chunked + b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))[:20]
    endless = server.raw(
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nContent-Type: a\r\n\r\nmore than nine"
    )
    assert b" 400 " in endless[:20]
    assert b" 400 " in server.raw(b"\x16\x03\x01 not HTTP\r\n\r\n")[:20]
    assert server.predict(good)[0] == 200


def test_beyond_what_may_wait_requests_are_told_to_come_again(learned: Path, pictures: list[Path]) -> None:
    served = Served(Learner(learned), Limits(queue=2, patience=30))
    go, held, predict = threading.Event(), threading.Semaphore(0), served.worker.learner.predict

    def slowly(*given: Any, **more: Any) -> Any:
        held.release()
        go.wait()
        return predict(*given, **more)

    served.worker.learner.predict = slowly  # type: ignore[method-assign]
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(served.predict, files(pictures[0]))
        held.acquire()
        second = pool.submit(served.predict, files(pictures[1]))
        while served.get("/health")[2]["requests"] < 2:
            pass
        status, about, answer = served.get("/predict", form(files(pictures[2])), Content_Type="multipart/form-data")
        assert (status, about["retry-after"]) == (503, "1") and "2 requests are waiting" in answer["error"]
        go.set()
        assert first.result()[0] == second.result()[0] == 200
    assert served.get("/health")[2]["requests"] == 0
    served.end()
    with pytest.raises(Refused, match="being stopped"):
        served.worker.ask(Question([], None, 1))


@pytest.mark.slow
def test_who_says_nothing_does_not_keep_a_place_and_who_waits_does(learned: Path, pictures: list[Path]) -> None:
    served = Served(Learner(learned), Limits(patience=0.5))
    predict = served.worker.learner.predict

    def slowly(*given: Any, **more: Any) -> Any:
        threading.Event().wait(1.5)
        return predict(*given, **more)

    served.worker.learner.predict = slowly  # type: ignore[method-assign]
    begun = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
    assert served.raw(b"") == b"" and served.raw(begun) == b""  # it ends, and nothing was asked
    after = served.raw(begun + b"\r\n" + begun)  # one request whole, another never
    assert after.count(b"HTTP/1.1 200") == 1
    assert served.predict(files(pictures[0]))[0] == 200
    served.end()


def test_the_server_goes_on_whatever_one_request_brings_about(
    server: Served, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise RuntimeError("a secret of the inside")

    with monkeypatch.context() as patch:
        patch.setattr(server.worker.learner, "predict", broken)
        status, answer = server.predict(files(pictures[0]))
    assert status == 500 and "secret" not in str(answer) and "a secret of the inside" in capfd.readouterr().err
    assert server.predict(files(pictures[0]))[0] == 200


def test_only_its_own_names_and_its_own_pages_are_answered(server: Served, pictures: list[Path]) -> None:
    for name in (
        "evil.example",
        "localhost.evil.example",
        f"evil.example:{server.port}",
        "192.0.2.1",
        "[",
        "a@localhost@b",
        "0.0.0.0",
    ):
        status, about, answer = server.get("/health", Host=name)
        assert status == 403 and "does not go by that name" in answer["error"], name
        assert about["x-content-type-options"] == "nosniff"
    for name in ("localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:9"):
        assert server.get("/health", Host=name)[0] == 200, name
    twice = server.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n")
    none = server.raw(b"GET /health HTTP/1.0\r\n\r\n")
    assert b" 40" in twice[:12] and b" 40" in none[:12]
    for origin, expected in (("http://evil.example", 403), ("null", 403), (f"http://127.0.0.1:{server.port}", 200)):
        assert server.predict(files(pictures[0]), Origin=origin)[0] == expected


def test_bound_to_every_address_any_address_will_do_but_no_name() -> None:
    from perdure.serve.guard import Guard

    guard = Guard(None, "0.0.0.0")  # type: ignore[arg-type]
    assert guard.ours("//192.0.2.1:8000") and guard.ours("//[2001:db8::1]") and not guard.ours("//evil.example")
    assert Guard(None, "box.local").ours("//box.local:80") and not Guard(None, "box.local").ours("//192.0.2.1")  # type: ignore[arg-type]
