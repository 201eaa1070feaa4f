"""The bank over HTTP: look-ups, matches, events, and scores where a model is given.

The event loop's thread owns the bank. A look-up, a match or a batch of events is one call of
compiled code that takes microseconds to milliseconds and never waits, so it runs in the loop
itself, and no other request can come between its reads or writes: no look-up meets a half-written
row, and none needs a lock. (In a pool of threads it would: the kernels run without Python's
lock, and copying a row is no atomic step.) What takes long goes to threads of its own:

- a commit writes files. It only reads the bank's rows, so look-ups go on meanwhile; events wait,
  in the order in which they came, until it is done;
- a reader's refresh opens the new state as another object, which then takes the old one's place;
- a model's forward pass. What it reads of the bank is gathered in the loop before.

Nothing here imports RecBole: a scorer is any object of the shape of :class:`ScorerLike`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Literal, Protocol, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import ErrorDetails, to_json
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from recbole_uip import __version__
from recbole_uip.bank.bank import FeatureBank
from recbole_uip.bank.limits import ServiceSettings
from recbole_uip.em.kernels import advance, advance_many
from recbole_uip.settings import SettingsError

__all__ = ["BankService", "ScorerLike", "ServiceError", "create_app"]

logger = logging.getLogger(__name__)

MAX_TOKEN = 256  # characters of a user's or an item's token
_T = TypeVar("_T")


class ServiceError(Exception):
    """A request that is refused; ``status`` is HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ScorerLike(Protocol):
    """What scores pairs; :class:`recbole_uip.bridge.serving.Scorer` does.

    ``interaction`` may read the bank, ``predict`` may not. Setting ``bank`` to a state that the
    model cannot read raises SettingsError.
    """

    name: str
    bank: FeatureBank | None

    def interaction(
        self,
        users: Sequence[str],
        items: Sequence[str],
        time: float | None,
        context: Mapping[str, Any] | None,
    ) -> Any: ...

    def predict(self, interaction: Any) -> np.ndarray: ...


# --- requests ------------------------------------------------------------------------------


Token = Annotated[str, StringConstraints(min_length=1, max_length=MAX_TOKEN)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class _Body(BaseModel):
    """A request, with no keys but its own."""

    model_config = ConfigDict(extra="forbid")


class LookUp(_Body):
    """Whose profile tokens are asked for."""

    users: list[Token]


class Match(_Body):
    """A user, and the items whose match tokens are asked for."""

    user: Token
    items: list[Token]


class Event(_Body):
    """A user met an item; ``liked`` where the bank's events have labels, ``time`` in their unit."""

    user: Token
    item: Token
    liked: Number | None = None
    time: Number | None = None


class Update(_Body):
    """Events that enter the bank; ``late`` says what becomes of one before its user's last.

    ``position`` is how far the stream has come with them, in its own words: the next commit keeps
    it, and /health tells it to a producer that goes on after a crash. Left out, it stays.
    """

    events: list[Event]
    late: Literal["refuse", "drop", "apply"] = "refuse"
    position: Token | None = None


class Score(_Body):
    """A user, the items to score, and further fields that the model reads."""

    user: Token
    items: list[Token]
    time: Number | None = None
    context: dict[str, Any] | None = None


# --- the service ---------------------------------------------------------------------------


class BankService:
    """A bank, perhaps a scorer, and who may do what when; every method runs in one event loop.

    Parameters
    ----------
    bank : FeatureBank
        Open for writing, or for reading alone.
    scorer : ScorerLike, optional
        Reads the same bank.
    settings : ServiceSettings, optional
    """

    def __init__(
        self,
        bank: FeatureBank,
        scorer: ScorerLike | None = None,
        settings: ServiceSettings | None = None,
    ) -> None:
        self.bank, self.scorer = bank, scorer
        self.settings = settings or ServiceSettings()
        #: What the last commit or refresh on the timer failed by.
        self.problem: str | None = None
        self._uncommitted = 0
        self._position = bank.position  # of the events that have entered
        self._writing = asyncio.Lock()
        self._stopping = asyncio.Event()
        self._files = ThreadPoolExecutor(1, "bank-files")
        self._scores = ThreadPoolExecutor(1, "bank-scores")
        self._timer: asyncio.Task | None = None

    async def start(self) -> None:
        """Load the compiled code before the first request needs it, and start the timer."""
        self._warm_up()
        self._timer = asyncio.create_task(self._keep_fresh())

    async def stop(self) -> None:
        """Commit what is not committed; the bank stays open."""
        self._stopping.set()
        if self._timer is not None:
            await self._timer
        try:
            if self._is_behind:
                await self.commit()
        finally:
            self._files.shutdown()
            self._scores.shutdown()

    def health(self) -> dict[str, Any]:
        """What is served, and whether its files are fresh."""
        bank = self.bank
        return {
            "status": "ok" if self.problem is None else "degraded",
            "problem": self.problem,
            "generation": bank.generation,
            "position": bank.position,
            "users": len(bank),
            "items": len(bank.model.items) - 1,
            "fields": bank.fields,
            "match_fields": bank.match_fields,
            "writable": bank.writable,
            "uncommitted_events": self._uncommitted,
            "model": None if self.scorer is None else self.scorer.name,
        }

    def look_up(self, request: LookUp) -> dict[str, Any]:
        """Codes of users as they are now, and which of the users the bank knows."""
        users = request.users
        self._check_count("users", len(users), self.settings.max_users)
        codes = self.bank.look_up_many(users)
        return {
            "fields": self.bank.fields,
            "codes": codes.tolist(),
            "known": [user in self.bank for user in users],
        }

    def match(self, request: Match) -> dict[str, Any]:
        """Match tokens of a user with candidate items."""
        self._check_count("items", len(request.items), self.settings.max_items)
        tokens = self.bank.match(request.user, request.items)
        return {"fields": self.bank.match_fields, "tokens": tokens.tolist()}

    async def score(self, request: Score) -> dict[str, Any]:
        """Click probabilities of a user with candidate items."""
        scorer = self.scorer
        if scorer is None:
            raise ServiceError(
                404,
                "/score has no model: start the service with the output folder of a run "
                "(recbole-uip bank serve --run DIR)",
            )
        items = request.items
        self._check_count("items", len(items), self.settings.max_items)
        users = [request.user] * len(items)
        columns = scorer.interaction(users, items, request.time, request.context)
        scores = await self._in_thread(self._scores, lambda: scorer.predict(columns))
        return {"model": scorer.name, "scores": scores.tolist()}

    async def update(self, request: Update) -> dict[str, Any]:
        """Let events enter, all or none; they show at once, and are durable after a commit."""
        self._check_writable()
        events = request.events
        self._check_count("events", len(events), self.settings.max_events)
        timeless = [event.time is None for event in events]
        if any(timeless) and not all(timeless):
            raise ServiceError(
                422,
                f"events.{timeless.index(True)}.time is missing, and other events have one: give "
                "a time to every event of a request, or to none",
            )
        unlabelled = [event.liked is None for event in events]
        if any(unlabelled) and not self.bank.model.implicit:
            raise ServiceError(
                422,
                f"events.{unlabelled.index(True)}.liked is missing: the bank's events have labels",
            )
        liked = [1.0 if event.liked is None else event.liked for event in events]
        async with self._writing:
            if len(events) == 1 and request.late == "refuse":
                # Microseconds: a batch of one takes several times as long.
                only = events[0]
                self.bank.update(only.user, only.item, liked[0], only.time)
                entered = 1
            else:
                entered = self.bank.update_many(
                    [event.user for event in events],
                    [event.item for event in events],
                    np.array(liked, dtype=np.float64),
                    None if any(timeless) else np.array([event.time for event in events]),
                    late=request.late,
                )
            self._uncommitted += entered
            if request.position is not None:
                self._position = request.position
        return {"entered": entered}

    async def commit(self) -> dict[str, Any]:
        """Make all events that have entered durable."""
        self._check_writable()
        try:
            # Shielded: a caller that goes away must not free the lock while files are written.
            return {"generation": await asyncio.shield(self._commit())}
        except Exception as error:
            self.problem = (
                f"the bank {self.bank.folder} could not be committed ({error}): see to its file "
                "system; the events are kept in memory, and the next commit takes them"
            )
            logger.exception("the bank %s could not be committed", self.bank.folder)
            raise ServiceError(500, self.problem) from error

    @property
    def _is_behind(self) -> bool:
        """Whether there is anything to commit."""
        return self._uncommitted > 0 or self._position != self.bank.position

    async def _commit(self) -> int:
        async with self._writing:
            position = self._position
            generation = await self._in_thread(self._files, lambda: self.bank.commit(position))
            self._uncommitted = 0
        self.problem = None
        return generation

    async def refresh(self) -> bool:
        """As a reader, serve what has been committed since; whether there was anything."""
        bank, current = self.bank, await self._in_thread(self._files, self.bank.is_current)
        if not current:
            fresh = await self._in_thread(self._files, bank.refreshed)
            if self.scorer is not None and self.scorer.bank is not None:
                self.scorer.bank = fresh
            self.bank = fresh
        self.problem = None
        return not current

    async def _keep_fresh(self) -> None:
        writes = self.bank.writable
        seconds = self.settings.commit_seconds if writes else self.settings.refresh_seconds
        while not self._stopping.is_set():
            with contextlib.suppress(asyncio.TimeoutError):  # not the builtin before Python 3.11
                await asyncio.wait_for(self._stopping.wait(), seconds)
                return
            try:
                if not writes:
                    await self.refresh()
                elif self._is_behind:
                    await self.commit()
            except ServiceError:
                pass  # said and logged; the next turn tries again
            except Exception as error:
                self.problem = (
                    f"the bank {self.bank.folder} could not be read anew ({error}): generation "
                    f"{self.bank.generation} is served meanwhile"
                )
                logger.exception("the bank %s could not be read anew", self.bank.folder)

    def _warm_up(self) -> None:
        bank, kernels = self.bank, self.bank.model.kernels
        bank.look_up_many([""])
        bank.match("", [""])
        if bank.writable:
            # On a copy of the state of nobody.
            state, _, fold = bank.state_of("")
            advance(state, kernels, 0, fold, 1.0)
            one = np.zeros(1, np.int64)
            advance_many(state[None, :], one, kernels, one, one, np.ones(1))
            bank.model.encoder.profiles(state[None, :], one + 1)

    def _check_writable(self) -> None:
        if not self.bank.writable:
            raise ServiceError(
                403,
                f"the bank {self.bank.folder} is served for reading: start its service with "
                "--write, or send events to the one that writes",
            )

    @staticmethod
    def _check_count(name: str, count: int, limit: int) -> None:
        if count > limit:
            raise ServiceError(
                413,
                f"{name} has {count} entries, and this service takes at most {limit}: send "
                f"several requests, or start it with a larger --max_{name}",
            )

    @staticmethod
    async def _in_thread(pool: ThreadPoolExecutor, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(pool, function)


# --- HTTP ----------------------------------------------------------------------------------


def create_app(service: Callable[[], BankService]) -> FastAPI:
    """The web application.

    Parameters
    ----------
    service : callable
        Makes the service, once, in the event loop that will run it.

    Returns
    -------
    FastAPI
        Errors are ``{"error": "..."}`` with a status of 400 (no JSON), 403 (not a writer), 404,
        405, 408 (half a body), 413 (too large), 415 (no JSON by its header), 422 (a value that
        cannot be used) or 500.
    """
    running: list[BankService] = []

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running[:] = [service()]
        await running[0].start()
        yield
        await running[0].stop()

    app = FastAPI(title="recbole-uip bank", version=__version__, lifespan=lifespan)

    async def read(request: Request, kind: type[BaseModel]) -> Any:
        told = request.headers.get("content-type", "")
        if told.partition(";")[0].strip().lower() != "application/json":
            # A page in a browser on this machine can send any other type without being asked.
            raise ServiceError(
                415, f"content-type={told!r} is not taken: send application/json as what it is"
            )
        return kind.model_validate_json(await _body(request, running[0].settings))

    @app.get("/health")
    async def health() -> Response:
        """What is served: generation, users, fields, model."""
        return _answer(running[0].health())

    @app.post("/look_up", openapi_extra=_takes(LookUp))
    async def look_up(request: Request) -> Response:
        """Codes of users, in the order of `fields`."""
        return _answer(running[0].look_up(await read(request, LookUp)))

    @app.post("/match", openapi_extra=_takes(Match))
    async def match(request: Request) -> Response:
        """Match tokens of a user with candidate items, in the order of `fields`."""
        return _answer(running[0].match(await read(request, Match)))

    @app.post("/update", openapi_extra=_takes(Update))
    async def update(request: Request) -> Response:
        """Events enter their users' profiles, all or none. Only a writer takes them."""
        return _answer(await running[0].update(await read(request, Update)))

    @app.post("/score", openapi_extra=_takes(Score))
    async def score(request: Request) -> Response:
        """Click probabilities of a user with candidate items."""
        return _answer(await running[0].score(await read(request, Score)))

    @app.post("/commit")
    async def commit(request: Request) -> Response:
        """Make the events so far durable, and visible to readers."""
        await _body(request, running[0].settings)
        return _answer(await running[0].commit())

    @app.exception_handler(ServiceError)
    async def refused(request: Request, error: ServiceError) -> Response:
        answer = _error(error.status, str(error))
        if error.status == 408:
            answer.headers["connection"] = "close"  # nobody waits for the other half
        return answer

    @app.exception_handler(ClientDisconnect)
    async def gone(request: Request, error: ClientDisconnect) -> Response:
        return _error(400, "the client went away before the body had come")  # read by nobody

    @app.exception_handler(SettingsError)
    async def unusable(request: Request, error: SettingsError) -> Response:
        return _error(422, " ".join(str(error).split()))

    @app.exception_handler(ValidationError)
    async def invalid(request: Request, error: ValidationError) -> Response:
        found = error.errors(include_url=False)
        # A misspelt name is also a missing one; the name that was given says more.
        return _error(*_explain(min(found, key=lambda each: each["type"] != "extra_forbidden")))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        what = f"{request.method} {request.url.path}"
        return _error(error.status_code, f"{what}: {error.detail}; /docs lists what there is")

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return _error(500, f"{request.url.path} failed ({type(error).__name__}): see the log")

    return app


async def _body(request: Request, settings: ServiceSettings) -> bytes:
    """A request's body, if it is neither too large nor too slow."""
    seconds = settings.body_seconds
    try:
        return await asyncio.wait_for(_read(request, settings.max_bytes), seconds)
    except asyncio.TimeoutError:  # not the builtin before Python 3.11
        raise ServiceError(
            408, f"the body had not come after {seconds:g} seconds: send it at once"
        ) from None


async def _read(request: Request, limit: int) -> bytes:
    """A request's body, of which no more than ``limit`` bytes are ever held."""
    told = request.headers.get("content-length", "0")
    parts, size = [], 0
    if told.isdigit() and int(told) <= limit:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                break
            parts.append(part)
        else:
            return b"".join(parts)
    raise ServiceError(
        413,
        f"the body has more than {limit} bytes: send several requests, or start the service "
        "with a larger --max_bytes",
    )


def _answer(content: Any, status: int = 200) -> Response:
    return Response(to_json(content), status, media_type="application/json")


def _error(status: int, message: str) -> Response:
    return _answer({"error": message}, status)


def _explain(error: ErrorDetails) -> tuple[int, str]:
    """Status and sentence of what pydantic found."""
    where, kind, value = ".".join(map(str, error["loc"])), error["type"], error["input"]
    if kind == "json_invalid":
        return 400, f"the body is not JSON ({error['ctx']['error']}): send a JSON object"
    if kind == "missing":
        return 422, f"{where} is missing: give it; /docs lists what each request takes"
    if kind == "extra_forbidden":
        return 422, f"{where} is not known: leave it out; /docs lists what each request takes"
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    message = error["msg"][:1].lower() + error["msg"][1:]
    return 422, f"{where or 'the body'}={shown} cannot be used: {message}"


def _takes(kind: type[BaseModel]) -> dict[str, Any]:
    """OpenAPI's description of a body; FastAPI's own parsing costs more than a look-up."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})
    for definition in definitions.values():
        schema["properties"]["events"]["items"] = definition
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
