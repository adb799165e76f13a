"""The HTTP application: OpenAI's endpoints over an engine. `process` runs it, `specjax.serve` is the command."""

import asyncio
import contextlib
import functools
import importlib.metadata
import json
import pathlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any, NamedTuple, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from specjax.serving import answers, errors, openai, schema, tools, translate
from specjax.serving.constraints import Grammars
from specjax.serving.errors import ApiError
from specjax.serving.exchange import Exchange, Office
from specjax.serving.middleware import Guard, Keys
from specjax.serving.requests import Closed, Engine, Overloaded
from specjax.serving.spelling import Speller
from specjax.serving.telemetry import Telemetry
from specjax.serving.translate import Facts, Limits, Plan

PAGE = pathlib.Path(__file__).parent / "page.html"

T = TypeVar("T")


class Settings(NamedTuple):
    """How a server behaves.

    Attributes:
      model: the name that is served.
      keys: API keys; none: everyone is let in.
      limits: of one request.
      max_body: the largest body, in bytes.
      request_timeout: seconds after which a request ends; None: never.
      max_requests: how many requests may be read, tokenised and answered at once; more are answered 429.
      engine: the label `engine` of its metrics, which tells replicas of one model apart.
    """

    model: str = "specjax"
    keys: tuple[str, ...] = ()
    limits: Limits = Limits()
    max_body: int = 4 * 2**20
    request_timeout: float | None = 3600.0
    max_requests: int = 1024
    engine: str = "0"


def _reply(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(errors.dumps(value), status, headers, media_type="application/json")


class Stream(Response):
    """A stream of events that ends, and frees its request, when the client leaves; also while nothing is sent."""

    def __init__(self, frames: AsyncIterator[bytes], exchange: Exchange, headers: dict[str, str]):
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no", **headers})
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        del self.headers["content-length"]
        self._frames, self._exchange = frames, exchange

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for frame in self._frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the events."""
        try:
            await while_connected(self._send(send), receive)
        except ClientDisconnect:
            scope["state"]["record"]["left"] = True
        finally:
            self._exchange.close()


async def while_connected(work: Awaitable[T], receive: Receive) -> T:
    """Awaits some work, and cancels it when the client leaves. Call it once the body has been read.

    Raises:
      ClientDisconnect: where the client left first.
    """

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(left())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


class Server:
    """The endpoints of one engine."""

    def __init__(self, engine: Engine, settings: Settings):
        """Prepares everything that needs no event loop.

        Args:
          engine: answers the requests.
          settings: how the server behaves.

        Raises:
          ValueError: for an engine without a tokenizer.
        """
        if engine.tokenizer is None:
            raise ValueError("The target has no tokenizer, and the API is one of text: serve a model with one.")
        self.engine, self.settings, self.tokenizer = engine, settings, engine.tokenizer
        self.telemetry = Telemetry(engine, settings.model, settings.engine)
        self.speller = Speller(self.tokenizer)
        grammars = Grammars(self.tokenizer, engine.vocab_size, max_bytes=settings.limits.grammar_bytes)
        self.facts = Facts(self.tokenizer, engine.vocab_size, engine.max_len, settings.limits, grammars)
        self.draining = False
        self.created = int(time.time())
        self.active = 0
        self._office: Office | None = None

    @property
    def office(self) -> Office:
        """Hands out what the engine says; there is one while the application runs.

        Raises:
          ApiError: before.
        """
        if self._office is None:
            raise errors.unavailable("The server starts: try again soon.")
        return self._office

    @contextlib.asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        """Listens to the engine, and watches over it."""
        await asyncio.to_thread(self._render_once)
        self._office = Office(self.engine, self.telemetry.observer, self.settings.request_timeout)
        watch = asyncio.ensure_future(self._watch())
        try:
            yield
        finally:
            watch.cancel()

    def _render_once(self) -> None:
        """Starts the process that renders chat templates, so that the first request need not wait for it."""
        if self.tokenizer.has_chat_template:
            with contextlib.suppress(ValueError, OSError):
                self.tokenizer.render_chat([{"role": "user", "content": "Hello"}])

    async def _watch(self) -> None:
        """Ends all requests where the engine dies: nothing would answer them any more."""
        while True:
            if not self.engine.alive:
                self.office.fail(errors.unavailable("The engine has stopped: send the request to another server."))
            await asyncio.sleep(0.5)

    async def _json(self, request: Request) -> Any:
        kind = request.headers.get("content-type", "application/json").split(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            # Pages of other sites may send a few other types without asking the browser's user.
            raise ApiError(415, f"The body is {kind[:80]}: send application/json.", code="unsupported_media_type")
        try:
            return json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise errors.wrong(
                None, f"The body is not JSON ({str(error)[:200]}): send a JSON object.", "invalid_json"
            ) from error

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self.settings.model:
            raise ApiError(
                404,
                f"The model {name[:200]!r} does not exist: this server has {self.settings.model!r}.",
                param="model",
                code="model_not_found",
            )

    def _open(self, plan: Plan) -> Exchange:
        exchange = self.office.exchange()
        try:
            exchange.open(plan)
        except Overloaded as error:
            raise errors.overloaded(str(error), error.retry_after) from error
        except Closed as error:
            raise errors.unavailable(str(error) or "The server shuts down.") from error
        except (ValueError, NotImplementedError) as error:
            raise errors.wrong(None, str(error)) from error
        return exchange

    async def _generate(self, request: Request, kind: type, translated: Callable[..., Plan], prefix: str) -> Response:
        if self.draining or not self.engine.alive:
            raise errors.unavailable("The server takes no more requests: send it to another.")
        if self.active >= self.settings.max_requests:
            raise errors.overloaded(f"{self.active} requests are being answered: try again later.", 1.0)
        self.active += 1
        try:
            asked, unknown = openai.parse(kind, await self._json(request))
            self._check_model(asked.model)
            salt = request.state.caller
            work = asyncio.to_thread(translated, self.facts, asked, salt)
            plan = await while_connected(work, request.receive)
            return await self._answer(request, asked, plan, prefix, _ignored(unknown))
        finally:
            self.active -= 1

    async def _answer(
        self, request: Request, asked: openai.Common, plan: Plan, prefix: str, headers: dict[str, str]
    ) -> Response:
        request_id = asked.request_id or request.state.request_id
        top = answers.head(prefix, self.settings.model, request_id)
        eos = self.tokenizer.eos_token_ids
        make: Any = answers.Chat if prefix == "chatcmpl" else answers.Completion
        shape: answers.Shape = make(asked, plan, self.speller, eos)
        exchange = self._open(plan)
        record = request.state.record
        record["prompt_tokens"] = sum(map(len, plan.prompts))
        if asked.stream:
            record["stream"] = True
            frames = answers.frames(shape, top, plan, exchange, asked)
            return Stream(_counted(frames, exchange, record), exchange, headers)
        try:
            answer = await while_connected(answers.whole(shape, top, plan, exchange), request.receive)
        finally:
            exchange.close()
            record["completion_tokens"] = sum(exchange.num_tokens.values())
        return _reply(answer, headers=headers)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._generate(request, openai.ChatRequest, translate.chat, "chatcmpl")

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._generate(request, openai.CompletionRequest, translate.completion, "cmpl")

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.created,
            "owned_by": "specjax",
            "root": self.settings.model,
            "max_model_len": self.engine.max_len,
        }

    async def models(self, request: Request) -> Response:
        """GET /v1/models."""
        return _reply({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        self._check_model(request.path_params["model"])
        return _reply(self._model())

    async def health(self, request: Request) -> Response:
        """GET /health: 503 once the engine has died."""
        if not self.engine.alive:
            raise errors.unavailable("The engine has stopped.")
        return _reply({"status": "ok"})

    async def ready(self, request: Request) -> Response:
        """GET /ready: 503 while programs are compiled, and once the server drains."""
        if self.draining or not self.engine.alive or not self.engine.ready:
            state = "draining" if self.draining else "starting" if self.engine.alive else "dead"
            raise errors.unavailable(f"The server is not ready: it is {state}.")
        return _reply({"status": "ready"})

    async def version(self, request: Request) -> Response:
        """GET /version."""
        return _reply({"version": _version()})

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        body, kind = self.telemetry.text()
        return Response(body, media_type=kind)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize, as vLLM has it."""
        asked, _ = openai.parse(openai.TokenizeRequest, await self._json(request))
        self._check_model(asked.model)
        if (asked.prompt is None) == (asked.messages is None):
            raise errors.wrong("prompt", "Give either a prompt or messages.")
        if asked.messages is not None:
            listed = tools.read(asked.tools, None)
            ids = await asyncio.to_thread(translate.conversation, self.facts, asked, listed)
        else:
            special = asked.add_special_tokens is not False
            ids = await asyncio.to_thread(translate.encode, self.facts, asked.prompt, "prompt", special)
        answer: dict[str, Any] = {"count": len(ids), "max_model_len": self.engine.max_len, "tokens": ids}
        if asked.return_token_strs:
            answer["token_strs"] = [self.speller.text(token) for token in ids]
        return _reply(answer)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize, as vLLM has it."""
        asked, _ = openai.parse(openai.DetokenizeRequest, await self._json(request))
        self._check_model(asked.model)
        if asked.tokens and max(asked.tokens) >= self.engine.vocab_size:
            raise errors.wrong("tokens", f"tokens has {max(asked.tokens)}: ids are 0 to {self.engine.vocab_size - 1}.")
        return _reply({"prompt": self.tokenizer.decode(asked.tokens, skip_special_tokens=False)})

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return _reply(schema.openapi(_version(), bool(self.settings.keys)))

    async def page(self, request: Request) -> Response:
        """GET /: a page to try the model."""
        policy = (
            "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        headers = {"content-security-policy": policy, "x-content-type-options": "nosniff"}
        return Response(await asyncio.to_thread(PAGE.read_bytes), 200, headers, media_type="text/html")


@functools.cache
def _version() -> str:
    return importlib.metadata.version("specjax")


def _ignored(unknown: Iterable[str]) -> dict[str, str]:
    """A header that names the fields of a request that had no effect."""
    names = [name for name in unknown if name.isascii() and name.isidentifier() and len(name) <= 64][:16]
    return {"x-ignored-fields": ", ".join(names)} if names else {}


async def _counted(frames: AsyncIterator[bytes], exchange: Exchange, record: dict[str, Any]) -> AsyncIterator[bytes]:
    try:
        async for frame in frames:
            yield frame
    finally:
        record["completion_tokens"] = sum(exchange.num_tokens.values())


def application(server: Server) -> Starlette:
    """The ASGI application of a server."""

    async def on_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        server.telemetry.refused(error.status)
        return _reply(error.body(), error.status, error.headers)

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = f"{request.method} {request.url.path[:200]}"
        reasons = {404: f"There is no {what}: see /openapi.json.", 405: f"{what} is not allowed: use another method."}
        own = ApiError(
            error.status_code, reasons.get(error.status_code, str(error.detail)), code=f"http_{error.status_code}"
        )
        own.headers = dict(error.headers or {})
        return await on_error(request, own)

    async def on_leave(request: Request, error: Exception) -> Response:
        request.state.record["left"] = True
        return Response(status_code=499)

    async def on_bug(request: Request, error: Exception) -> Response:
        return await on_error(request, errors.failed(f"The server failed ({type(error).__name__}): this is a bug."))

    routes = [
        Route("/v1/chat/completions", server.chat, methods=["POST"]),
        Route("/v1/completions", server.completions, methods=["POST"]),
        Route("/v1/models", server.models, methods=["GET"]),
        Route("/v1/models/{model:path}", server.model, methods=["GET"]),
        Route("/health", server.health, methods=["GET"]),
        Route("/ping", server.health, methods=["GET"]),
        Route("/ready", server.ready, methods=["GET"]),
        Route("/version", server.version, methods=["GET"]),
        Route("/metrics", server.metrics, methods=["GET"]),
        Route("/tokenize", server.tokenize, methods=["POST"]),
        Route("/detokenize", server.detokenize, methods=["POST"]),
        Route("/openapi.json", server.openapi, methods=["GET"]),
        Route("/", server.page, methods=["GET"]),
    ]
    settings, refused = server.settings, server.telemetry.refused
    guard = Middleware(Guard, keys=Keys(settings.keys), max_body=settings.max_body, refused=refused)
    handlers: dict[Any, Any] = {
        ApiError: on_error,
        HTTPException: on_http,
        ClientDisconnect: on_leave,
        Exception: on_bug,
    }
    app = Starlette(routes=routes, middleware=[guard], exception_handlers=handlers, lifespan=server.lifespan)
    app.state.server = server
    return app
