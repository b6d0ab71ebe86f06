"""The application: the page's files, and a small versioned interface of JSON and server-sent events."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Final

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from kalmanguard.certificate.verify import NON_CLAIMS
from kalmanguard.dashboard.answers import brief, cleaned, encode, series
from kalmanguard.dashboard.evidence import evidence
from kalmanguard.dashboard.library import Entry, Library
from kalmanguard.dashboard.security import refused
from kalmanguard.dashboard.stream import MOST_STREAMS, Streams
from kalmanguard.errors import JournalError

_TYPES: Final = {"html": "text/html", "css": "text/css", "js": "text/javascript", "LICENSE": "text/plain"}
#: Points of a stretch; events of a list; marks on the time line; columns of a heat map.
POINTS, EVENTS, MARKS, CELLS = (20, 2_000, 600), (1, 1_000, 200), 300, 160
_LATEST_STEP = 2**53
#: Encoded stretches that are kept for the next viewer.
_KEPT = 48

Handler = Callable[[Request, Entry], Awaitable[Response]]


def application(library: Library, streams: Streams) -> Starlette:
    """Put the application together.

    Notes
    -----
    Runs are addressed by their opaque names. Nothing of a request is ever made part of a path: the page's files are
    read once, here.
    """
    pages = _files()
    views = _Views(library, streams)

    async def page(request: Request) -> Response:
        found = pages.get(request.path_params.get("name", "index.html"))
        if found is None:
            raise HTTPException(404)
        # The page is small, and a new version must not meet old scripts.
        return Response(found[0], media_type=found[1], headers={"cache-control": "no-cache"})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        streams.start()
        yield

    async def failed(_: Request, error: Exception) -> Response:
        status = error.status_code if isinstance(error, HTTPException) else 500
        text = {404: "There is no such thing here.", 405: "The dashboard answers GET and HEAD only."}.get(status)
        return refused(status, text or (str(error.detail) if isinstance(error, HTTPException) else "It failed."))

    prefix = "/api/v1"
    run = prefix + "/runs/{key}"
    return Starlette(
        routes=[
            Route("/", page),
            Route("/static/{name:path}", page),
            Route(prefix + "/runs", views.runs),
            Route(run, views.of_run(views.summary)),
            Route(run + "/series", views.of_run(views.series)),
            Route(run + "/events", views.of_run(views.events)),
            Route(run + "/events/{seq:int}", views.of_run(views.evidence)),
            Route(run + "/layers", views.of_run(views.layers)),
            Route(run + "/certificate", views.of_run(views.certificate)),
            Route(run + "/stream", views.of_run(views.stream)),
        ],
        exception_handlers={HTTPException: failed, Exception: failed},
        lifespan=lifespan,
    )


class _Views:
    """One method an address."""

    def __init__(self, library: Library, streams: Streams) -> None:
        self._library, self._streams = library, streams
        self._stretches: OrderedDict[tuple[object, ...], bytes] = OrderedDict()

    def of_run(self, view: Handler) -> Callable[[Request], Awaitable[Response]]:
        """A handler that is given the run that the address names."""

        async def handle(request: Request) -> Response:
            entry = self._library.get(request.path_params["key"])
            if entry is None:
                return refused(404, "There is no run of that name here.")
            try:
                return await view(request, entry)
            except JournalError:
                # Its sentence holds the path of the journal, which is nobody's business.
                return refused(409, "The run's journal cannot be read there: it is gone or damaged.")
            except ValueError as error:
                return refused(400, str(error))

        return handle

    async def runs(self, _: Request) -> Response:
        return _json(encode({"runs": [brief(entry) for entry in self._library.entries()]}))

    async def summary(self, _: Request, entry: Entry) -> Response:
        return _json(self._streams.body(entry))

    async def series(self, request: Request, entry: Entry) -> Response:
        low, high = _range(request, entry)
        points = _number(request, "points", *POINTS)
        course = entry.course
        key = (entry.key, id(course), course.revision, low, high, points)
        body = self._stretches.get(key)
        if body is None:
            body = await run_in_threadpool(_stretch, entry, low, high, points)
            self._stretches[key] = body
            while len(self._stretches) > _KEPT:
                self._stretches.popitem(last=False)
        return _json(body)

    async def events(self, request: Request, entry: Entry) -> Response:
        limit = _number(request, "limit", *EVENTS)
        before = _number(request, "before", 0, _LATEST_STEP, 0) or None
        course = entry.course
        with course.lock:
            found = course.events.latest(limit, before)
            total = course.events.total
        return _json(encode({"total": total, "events": [event.to_dict() for event in found]}))

    async def evidence(self, request: Request, entry: Entry) -> Response:
        seq = request.path_params["seq"]
        if not 0 < seq < _LATEST_STEP:
            return refused(400, "The number of a record is at least 1.")
        found = await run_in_threadpool(evidence, entry.file, seq)
        return refused(404, "The journal has no such record.") if found is None else _json(encode(cleaned(found)))

    async def layers(self, request: Request, entry: Entry) -> Response:
        low, high = _range(request, entry)
        course = entry.course
        with course.lock:
            return _json(encode(course.findings.map(low, high, CELLS)))

    async def certificate(self, request: Request, entry: Entry) -> Response:
        certificates, course = self._library.certificates, entry.course
        if request.query_params.get("make") == "1":
            certificates.want(entry.key, entry.file, course.records, asked=True)
        known = certificates.get(entry.key)
        return _json(encode({"certificate": known.to_dict(course.records), "non_claims": list(NON_CLAIMS)}))

    async def stream(self, _: Request, entry: Entry) -> Response:
        if self._streams.open >= MOST_STREAMS:
            return refused(503, f"{MOST_STREAMS} viewers are watching already: close another page first.")
        return StreamingResponse(self._streams.messages(entry), media_type="text/event-stream")


def _stretch(entry: Entry, low: int, high: int, points: int) -> bytes:
    course = entry.course
    revision = course.revision
    data = series(course.stretch(low, high, points), revision)
    with course.lock:
        marks = [event.to_dict() for event in course.events.marks(low, high, MARKS)]
    for mark in marks:
        del mark["text"]
    return encode(data | {"marks": marks, "from": low, "to": high})


def _range(request: Request, entry: Entry) -> tuple[int, int]:
    course = entry.course
    low = _number(request, "from", 0, _LATEST_STEP, course.first_step or 0)
    high = _number(request, "to", 0, _LATEST_STEP, course.last_step)
    if high < low:
        raise ValueError(f"from = {low} lies behind to = {high}: swap them.")
    return low, high


def _number(request: Request, name: str, least: int, most: int, otherwise: int) -> int:
    text = request.query_params.get(name)
    if text is None:
        return otherwise
    if not (text.isascii() and text.isdigit() and len(text) <= 16) or not least <= int(text) <= most:
        raise ValueError(f"{name} must be a whole number from {least} to {most}.")
    return int(text)


def _json(body: bytes) -> Response:
    return Response(body, media_type="application/json")


def _files() -> dict[str, tuple[bytes, str]]:
    """The page's files by name; there is nothing else that could be asked for."""
    found = {}
    folder = files("kalmanguard.dashboard") / "static"
    for prefix, place in (("", folder), ("vendor/", folder / "vendor")):
        for item in place.iterdir():
            if item.is_file():
                kind = _TYPES.get(item.name.rpartition(".")[2], "application/octet-stream")
                found[prefix + item.name] = (item.read_bytes(), kind)
    return found
