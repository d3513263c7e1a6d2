"""The application: the door to the model, and beside it readiness, figures, the chat page and the documentation."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route

from gpt_fast.serve.admission import AT_ONCE
from gpt_fast.serve.asgi import openapi
from gpt_fast.serve.asgi.door import READ, Door
from gpt_fast.serve.asgi.guard import Guard, Rules
from gpt_fast.serve.asgi.prometheus import Counted, Figures
from gpt_fast.serve.body import RequestError
from gpt_fast.serve.endpoints import ENDPOINTS

KNOWN = frozenset(
    ("/", "/docs", "/openapi.json", "/v1/models", *(f"/{path}" for path in (*READ, *filter(None, ENDPOINTS), *AT_ONCE)))
)


def build_app(door: Door, figures: Figures, rules: Rules, state: Callable[[], str]) -> Starlette:
    """state: "ok", or why no request should come now."""

    def health(request: Request) -> Response:
        told = state()
        return JSONResponse({"status": told}, 200 if told == "ok" else 503)

    def metrics(request: Request) -> Response:
        return Response(figures.text(), media_type=CONTENT_TYPE_LATEST)

    def page(request: Request) -> Response:
        return RedirectResponse("chat")  # its files lie beside it

    keys = bool(rules.keys)

    def document(request: Request) -> Response:
        return JSONResponse(openapi.document(keys=keys))

    def docs(request: Request) -> Response:
        return HTMLResponse(openapi.page(keys=keys), headers={"content-security-policy": "default-src 'none'"})

    return Starlette(
        routes=[
            Route("/", sync(page)),
            Route("/openapi.json", sync(document)),
            Route("/docs", sync(docs)),
            Route("/health", sync(health)),
            Route("/metrics", sync(metrics)),
            Mount("/", door),
        ],
        middleware=[
            Middleware(Counted, figures=figures, known=KNOWN),
            *([cors(rules)] if rules.origins else []),  # in front of the guard: a browser asks first, without the key
            Middleware(Guard, rules=rules),
        ],
        exception_handlers={HTTPException: refused},  # type: ignore[dict-item]
    )


def cors(rules: Rules) -> Middleware:
    """Tells browsers that pages of these origins may ask."""
    return Middleware(
        CORSMiddleware,
        allow_origins=rules.origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("x-request-id", "x-client-request-id", "retry-after"),
    )


def sync(answer: Callable[[Request], Response]):  # type: ignore[no-untyped-def]
    """As a coroutine: Starlette gives plain functions a thread each."""

    async def answered(request: Request) -> Response:
        return answer(request)

    return answered


async def refused(request: Request, error: HTTPException) -> Response:
    """What Starlette refuses by itself, in the form of all other errors."""
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    body = RequestError(message, status=error.status_code).body
    return Response(body, error.status_code, headers=error.headers, media_type="application/json")
