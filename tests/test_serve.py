"""A model in use, served: real requests over HTTP to a real server."""

from __future__ import annotations

import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from served import Sent, Served, files, form, pictures, server  # noqa: F401  fixtures
from test_learner import drawings, learned  # noqa: F401  fixtures

from perdure import Learner
from perdure.data.places import InMemory
from perdure.serve.limits import Limits
from perdure.serve.worker import Question, Worker


def test_answers_are_those_of_predict(server: Served, pictures: list[Path], learned: Path) -> None:
    status, answer = server.predict(files(*pictures))
    assert status == 200 and answer["state"] == "task_02_digits"
    expected = Learner(learned).predict(pictures, topk=5)
    assert [{**row, "path": row["file"]} for row in answer["answers"]] == [{**o, "file": o["path"]} for o in expected]
    words: Sent = [("classes", None, b"cat, zero"), ("classes", None, b"a door"), ("topk", None, b"1")]
    status, answer = server.predict([*files(pictures[0]), *words])
    (row,), (one,) = answer["answers"], Learner(learned).predict(pictures[:1], classes=["cat", "zero", "a door"])
    assert {key: row[key] for key in one if key != "path"} == {key: one[key] for key in one if key != "path"}
    assert row["top"] == [{"label": one["label"], "score": one["score"]}]


def test_many_at_once_get_their_own_answers(
    server: Served, pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [server.predict(files(path))[1]["answers"][0] for path in pictures]
    asked: list[int] = []
    predict = server.worker.learner.predict

    def counted(images: Any, **more: Any) -> Any:
        asked.append(len(images))
        return predict(images, **more)

    monkeypatch.setattr(server.worker.learner, "predict", counted)
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda path: server.predict(files(path)), pictures * 6))
    assert sum(asked) == 6 * len(pictures) and max(asked) > 1  # some were answered together
    for (status, answer), one in zip(found, alone * 6, strict=True):
        (row,) = answer["answers"]
        assert status == 200 and {**row, "score": 0, "top": 0} == {**one, "score": 0, "top": 0}
        assert [x["label"] for x in row["top"]] == [x["label"] for x in one["top"]]
        assert [x["score"] for x in row["top"]] == pytest.approx([x["score"] for x in one["top"]], abs=3e-6)


def test_what_waits_is_taken_by_kind_and_up_to_a_batch(learned: Path) -> None:
    worker, one = Worker(Learner(learned), Limits(batch=4)), InMemory(b"", "x")
    questions = [Question([one] * n, classes, 5) for n, classes in ((2, None), (1, ("a", "b")), (3, None), (2, None))]
    for question in questions:
        worker.ask(question)
    assert [worker.take() for _ in range(3)] == [[questions[0], questions[3]], [questions[1]], [questions[2]]]


def test_headers_and_what_is_said_of_the_endpoint(server: Served, learned: Path) -> None:
    for path, kind in (("/", "text/html"), ("/history", "json"), ("/openapi.json", "json"), ("/nothing", "json")):
        _, about, _ = server.get(path)
        assert kind in about["content-type"] and about["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in about["content-security-policy"] and "server" not in about
        assert "unsafe" not in about["content-security-policy"] and "access-control-allow-origin" not in about
    (_, about, page), (_, other, _) = server.get("/"), server.get("/")
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", about["content-security-policy"])
    assert nonce and page.count(f'nonce="{nonce[1]}"') == 2 and nonce[1] not in other["content-security-policy"]
    assert not re.search(r"""(src|href)="(https?:)?//|@import|url\(""", page)
    _, _, history = server.get("/history")
    assert [task["task"] for task in history["tasks"]] == ["animals", "digits"] and len(history["classes"]) == 8
    own = Learner(learned).history()
    for task, record in zip(history["tasks"], own, strict=True):
        rows = {row["name"]: row for row in record["rows"]}
        assert task["before"] == rows[task["task"]]["before"] and task["after"] == rows[task["task"]]["after"]
        assert task["now"] == next(row["after"] for row in own[-1]["rows"] if row["name"] == task["task"])
        assert f"{task['before']:.1f}</td>" in page and f"{task['after']:.1f}</td>" in page
    assert (
        history["probe"]["now"] is not None and "marks" not in str(history) and str(learned.parent) not in str(history)
    )
    _, _, api = server.get("/openapi.json")
    assert set(api["paths"]) == {"/predict", "/history", "/health"} and api["openapi"].startswith("3.1")
    sent = api["paths"]["/predict"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert sent["files"]["maxItems"] == 8 and set(sent) == {"files", "classes", "topk"}
    assert set(api["components"]["schemas"]["History"]["properties"]) == set(history)
    answers = {path: set(next(iter(verbs.values()))["responses"]) for path, verbs in api["paths"].items()}
    assert answers["/history"] == answers["/health"] == {"200", "403", "500", "503"}
    assert answers["/predict"] == {"200", "400", "403", "408", "413", "500", "503"}
    assert api["paths"]["/health"]["get"]["responses"]["503"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "Health"
    )


def test_a_task_learned_meanwhile_answers_the_next_request(
    learned: Path,
    drawings: Path,
    tmp_path: Path,
    pictures: list[Path],
) -> None:
    home = tmp_path / "HOME"
    shutil.copytree(learned, home)
    served = Served(Learner(home))
    assert served.predict(files(pictures[0]))[1]["state"] == "task_02_digits"
    Learner(home).undo()
    assert Learner(home).learn(drawings / "food", name="digits").accepted  # another state of the same name
    assert (
        served.predict(files(pictures[0]))[1]["answers"][0]["top"]
        == Learner(home).predict(pictures[:1], topk=5)[0]["top"]
    )
    Learner(home).undo()
    status, answer = served.predict(files(pictures[0]))
    assert answer["state"] == "task_01_animals" == served.get("/health")[2]["state"]
    assert [one["state"] for one in served.get("/history")[2]["tasks"]] == ["current", "undone", "undone"]
    shutil.rmtree(home / "task_01_animals")
    shutil.rmtree(home / "task_00_before")
    assert served.predict(files(pictures[0]))[0] == 503 == served.get("/history")[0]
    served.end()


def test_an_export_is_served_too(learned: Path, tmp_path: Path, pictures: list[Path]) -> None:
    from perdure.serve.course import opened

    Learner(learned).export(tmp_path / "out")
    served = Served(opened(tmp_path / "out"))
    _, answer = served.predict(files(*pictures))
    expected = Learner(learned).predict(pictures, topk=5)
    assert answer["state"] == "out" and [r["top"] for r in answer["answers"]] == [r["top"] for r in expected]
    tasks = served.get("/history")[2]["tasks"]
    assert [(task["task"], task["after"], len(task["classes"])) for task in tasks] == [
        ("animals", None, 4),
        ("digits", None, 4),
    ]
    assert "digits" in served.get("/")[2]
    served.end()
