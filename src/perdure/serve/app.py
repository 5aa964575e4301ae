"""What is answered to which request."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from perdure import __version__
from perdure.core.errors import PerdureError
from perdure.launch.learner.answers import Answer
from perdure.serve.course import classes, course, probe
from perdure.serve.guard import Guard
from perdure.serve.limits import Limits, Refused
from perdure.serve.openapi import described
from perdure.serve.page import rendered
from perdure.serve.uploads import Body, Room
from perdure.serve.worker import Worker


class Desk:
    """Takes requests, and hands out what ``worker`` answers."""

    def __init__(self, worker: Worker, limits: Limits):
        self.worker, self.limits, self.room = worker, limits, Room(limits)

    async def page(self, request: Request) -> Response:
        entries = await run_in_threadpool(course, self.worker.learner)
        text, policy = rendered(entries, self.worker.state, self.worker.method, self.limits)
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    async def predict(self, request: Request) -> Response:
        body = Body(request, self.limits)
        try:
            with self.room.taken(body.size):
                question = await body.question()
                found = await asyncio.wrap_future(self.worker.ask(question))
        except Refused as refused:
            await body.discard()
            return refusal(refused, over=not body.ended)
        rows = [shown(row) for row in found.rows]
        answer: dict[str, Any] = {"state": found.state, "answers": rows}
        if all("error" in row for row in rows):
            return JSONResponse({"error": rows[0]["error"], **answer}, 400)
        return JSONResponse(answer)

    async def history(self, request: Request) -> Response:
        entries = await run_in_threadpool(course, self.worker.learner)
        known = {"classes": classes(entries), "probe": probe(entries), "tasks": entries}
        return JSONResponse({"state": self.worker.state, **known})

    async def health(self, request: Request) -> Response:
        well = self.worker.thread.is_alive()
        said = {
            "status": "ok" if well else "stopping", "state": self.worker.state, "method": self.worker.method,
            "requests": self.room.requests, "perdure": __version__,
        }  # fmt: skip
        return JSONResponse(said, 200 if well else 503)

    async def openapi(self, request: Request) -> Response:
        return JSONResponse(described(self.limits))


def shown(row: Answer) -> dict[str, Any]:
    """A row of ``Learner.predict`` as it is sent: ``file`` instead of ``path``, ``top`` even of one."""
    best = {} if "error" in row else {"top": [{"label": row["label"], "score": row["score"]}]}
    return {"file": row["path"], **best, **{key: value for key, value in row.items() if key != "path"}}


def refusal(refused: Refused, over: bool = False) -> Response:
    """``over``: nothing more is read on this connection."""
    return JSONResponse(
        {"error": str(refused)}, refused.status, {**refused.headers, **({"Connection": "close"} if over else {})}
    )


async def unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    way = "There are /, /predict (POST), /history, /health and /openapi.json."
    return JSONResponse({"error": f"{error.detail}. {way}"}, error.status_code, error.headers)


async def unreadable(request: Request, error: Exception) -> Response:
    return refusal(Refused(503, str(error), retry_after=5))


async def gone(request: Request, error: Exception) -> Response:
    return Response(status_code=400)  # nobody hears it


async def broken(request: Request, error: Exception) -> Response:
    return refusal(Refused(500, "Something went wrong that should not; the server's terminal says what."))


def application(worker: Worker, limits: Limits, bound: str) -> ASGIApp:
    """The server's answers. ``bound``: the host that it is started on."""
    desk = Desk(worker, limits)
    routes = [
        Route("/", desk.page, methods=["GET"]),
        Route("/predict", desk.predict, methods=["POST"]),
        Route("/history", desk.history, methods=["GET"]),
        Route("/health", desk.health, methods=["GET"]),
        Route("/openapi.json", desk.openapi, methods=["GET"]),
    ]
    handlers: Any = {
        HTTPException: unknown, PerdureError: unreadable, OSError: unreadable, ClientDisconnect: gone, Exception: broken,
    }  # fmt: skip
    return Guard(Starlette(routes=routes, exception_handlers=handlers), bound)
