"""A request's body: read within its limits, and taken apart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Iterator, Mapping

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from perdure.data.places import InMemory
from perdure.launch.learner.answers import names_in
from perdure.serve.limits import MB, Limits, Refused
from perdure.serve.worker import Question

FIELD = 64_000  # bytes of a field that is no picture
DISCARDED = 8  # times as much as is allowed is read of an upload that is refused, so that its sender hears why


class Room:
    """Which requests are being read or wait: no more, and no larger ones together, than there is room for."""

    def __init__(self, limits: Limits):
        self.limits, self.requests, self.bytes = limits, 0, 0

    @contextlib.contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Keep room for a request of ``size`` bytes. ``Refused`` where there is none."""
        if self.requests >= self.limits.queue or self.bytes + size > max(self.limits.held, size):
            raise Refused(503, f"{self.requests} requests are waiting already. Try again in a moment.", retry_after=1)
        self.requests, self.bytes = self.requests + 1, self.bytes + size
        try:
            yield
        finally:
            self.requests, self.bytes = self.requests - 1, self.bytes - size


class Body:
    """The body of ``request``, as it arrives."""

    def __init__(self, request: Request, limits: Limits):
        self.request, self.limits, self.ended = request, limits, False

    @property
    def size(self) -> int:
        """How large it says it is, or the most that it may be. ``Refused`` if that is too much."""
        said = self.request.headers.get("content-length", "")
        size = int(said) if said.isascii() and said.isdigit() else self.limits.upload
        if size > self.limits.upload:
            raise self.too_large()
        return size

    def too_large(self) -> Refused:
        return Refused(
            413, f"The upload is larger than {self.limits.upload / MB:g} MB. Send fewer or smaller pictures at a time."
        )

    async def chunks(self, most: int) -> AsyncGenerator[bytes, None]:
        """What arrives. ``Refused`` beyond ``most`` bytes."""
        while not self.ended:
            message = await self.request.receive()
            if message["type"] == "http.disconnect":
                self.ended = True
                raise ClientDisconnect
            self.ended = not message.get("more_body", False)
            chunk = message.get("body", b"")
            most -= len(chunk)
            if most < 0:
                raise self.too_large()
            yield chunk

    async def discard(self) -> None:
        """Read on after a refusal, for a while: who is still sending does not hear what is said."""

        async def rest() -> None:
            async for _ in self.chunks(DISCARDED * self.limits.upload):
                pass

        with contextlib.suppress(Refused, ClientDisconnect, asyncio.TimeoutError):
            await asyncio.wait_for(rest(), self.limits.patience)

    async def question(self) -> Question:
        """What the request asks. ``Refused`` for anything that is no such form."""
        if not self.request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            raise Refused(400, "Send a form (multipart/form-data) with pictures in fields named 'files'.")
        parser = MultiPartParser(
            self.request.headers, self.chunks(self.limits.upload), max_files=self.limits.pictures,
            max_fields=self.limits.names + 1, max_part_size=FIELD,
        )  # fmt: skip
        try:
            form = await asyncio.wait_for(parser.parse(), self.limits.patience)
        except MultiPartException as error:
            raise Refused(400, f"The form cannot be read: {error.message.rstrip('.')}.") from None
        except asyncio.TimeoutError:
            raise Refused(408, f"The upload did not arrive within {self.limits.patience:g} seconds.") from None
        try:
            return await self.understood(form.multi_items())
        finally:
            await form.close()

    async def understood(self, fields: list[tuple[str, str | UploadFile]]) -> Question:
        pictures: list[InMemory] = []
        words: dict[str, list[str]] = {"classes": [], "topk": []}
        for name, value in fields:
            if isinstance(value, UploadFile) and name == "files":
                data = await value.read()
                if data or value.filename:  # browsers send an empty part where no file was chosen
                    pictures.append(InMemory(data, value.filename or f"picture {len(pictures) + 1}"))
            elif isinstance(value, str) and name in words:
                words[name].append(value)
            else:
                raise Refused(400, f"There is no field '{name}' of that kind. Allowed are files, classes, topk.")
        if not pictures:
            raise Refused(400, "No pictures are given. Send them in fields named 'files'.")
        return Question(pictures, classes_of(words, self.limits), topk_of(words, self.limits))


def classes_of(words: Mapping[str, list[str]], limits: Limits) -> tuple[str, ...] | None:
    """The names to tell apart; None: those learned."""
    names = tuple(name for text in words["classes"] for name in names_in(text))
    if len(names) > limits.names:
        raise Refused(400, f"{len(names):,} classes are asked for; allowed are {limits.names:,}.")
    return names or None


def topk_of(words: Mapping[str, list[str]], limits: Limits) -> int:
    said = words["topk"][-1].strip() if words["topk"] else "5"
    if not (said.isascii() and said.isdigit() and len(said) < 9 and 1 <= int(said) <= limits.topk):
        raise Refused(400, f"topk is a number from 1 to {limits.topk}, not '{said[:40]}'.")
    return int(said)
