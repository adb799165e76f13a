"""The description of the API at /openapi.json."""

from typing import Any

from pydantic.json_schema import models_json_schema

from specjax.serving.openai import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest

POSTS = {
    "/v1/chat/completions": (ChatRequest, "Answers a conversation, whole or as a stream of events."),
    "/v1/completions": (CompletionRequest, "Continues prompts, whole or as a stream of events."),
    "/tokenize": (TokenizeRequest, "The token ids of a prompt or a conversation."),
    "/detokenize": (DetokenizeRequest, "The text of token ids."),
}
GETS = {
    "/v1/models": "The model that is served.",
    "/v1/models/{model}": "The model of that name.",
    "/health": "200 while the engine lives, 503 when it has died.",
    "/ready": "200 while requests are taken, 503 before and after.",
    "/version": "The version of specjax.",
    "/metrics": "Prometheus metrics.",
    "/openapi.json": "This description.",
}
STATUSES = {
    "400": "A wrong field.",
    "401": "The API key is missing or wrong.",
    "404": "An unknown model or path.",
    "405": "Another method is needed.",
    "413": "The body is too large.",
    "415": "The body is not JSON.",
    "429": "The queue is full; Retry-After says when to come back.",
    "503": "The server starts, shuts down, or its engine has died.",
    "504": "The request took longer than the server allows.",
}

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def _errors() -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
    return {status: {"description": text, "content": content} for status, text in STATUSES.items()}


def _answer(path: str) -> dict[str, Any]:
    kinds = {
        "/metrics": ["text/plain"],
        "/v1/chat/completions": ["text/event-stream"],
        "/v1/completions": ["text/event-stream"],
    }
    found = kinds.get(path, [])
    content: dict[str, Any] = {kind: {"schema": {"type": "string"}} for kind in found}
    if path != "/metrics":
        content["application/json"] = {"schema": {"type": "object"}}
    return {"200": {"description": "The answer.", "content": content}}


def openapi(version: str, with_keys: bool) -> dict[str, Any]:
    """The whole description.

    Args:
      version: of specjax.
      with_keys: whether requests need an API key.
    """
    kinds = [(kind, "validation") for kind, _ in POSTS.values()]
    _, models = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    paths: dict[str, Any] = {}
    for path, (kind, text) in POSTS.items():
        body = {"application/json": {"schema": {"$ref": f"#/components/schemas/{kind.__name__}"}}}
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {"required": True, "content": body},
                "responses": _answer(path) | _errors(),
            }
        }
    for path, text in GETS.items():
        paths[path] = {"get": {"summary": text, "responses": _answer(path) | _errors()}}
    paths["/v1/models/{model}"]["get"]["parameters"] = [
        {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    ]
    out: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "specjax", "version": version},
        "paths": paths,
        "components": {"schemas": {**models["$defs"], "Error": _ERROR}},
    }
    if with_keys:
        out["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        out["security"] = [{"key": []}]
    return out
