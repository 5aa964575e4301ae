"""The endpoint described as OpenAPI has it."""

from __future__ import annotations

from typing import Any

from perdure import __version__
from perdure.serve.limits import MB, Limits

TEXT, COUNT = {"type": "string"}, {"type": "integer"}
NAME = {"type": ["string", "null"]}
REASONS = "Where the method has concepts: those that decided, and what each contributed to the label's logit."


def array(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def record(required: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required.split()}


def reference(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def response(description: str, schema: str) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": reference(schema)}}}


def described(limits: Limits) -> dict[str, Any]:
    """The document at ``/openapi.json``, with the limits of this server."""
    return {
        "openapi": "3.1.0",
        "info": {"title": "perdure serve", "version": __version__, "description": "A model in use: what pictures show."},
        "paths": {
            "/predict": {"post": predict(limits)},
            "/history": get("The tasks learned, in order", "History"),
            "/health": get("Whether the server answers, and which state did last", "Health", "503"),
        },
        "components": {"schemas": schemas()},
    }  # fmt: skip


EVERY = {
    "403": "Another site's page asks, or the server does not go by that name.",
    "500": "Something went wrong that should not; the server's terminal says what.",
}  # of any request


def get(summary: str, schema: str, *same: str) -> dict[str, Any]:
    """``same``: the status of an answer of that schema too."""
    failures = {"503": "The model in use cannot be read just now.", **EVERY}
    found = {status: response(said, "Error") for status, said in failures.items()}
    answers = {status: response(summary + ".", schema) for status in ("200", *same)}
    return {"get": {"summary": summary, "responses": {**found, **answers}}}


def predict(limits: Limits) -> dict[str, Any]:
    form = record(
        "files",
        files={**array({"type": "string", "format": "binary"}), "minItems": 1, "maxItems": limits.pictures},
        classes={
            **TEXT,
            "description": "Names to tell apart, two or more, with commas between; left out: all learned.",
        },
        topk={**COUNT, "minimum": 1, "maximum": limits.topk, "default": 5, "description": "How many of the likeliest."},
    )
    form["properties"]["files"]["description"] = f"Pictures, {limits.upload / MB:g} MB together."
    return {
        "summary": "What pictures show",
        "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}},
        "responses": {
            "200": response("An answer a picture, in order; one that could not be read has `error`.", "Answers"),
            "400": response("No such form, no such classes, or no picture that could be read.", "Error"),
            **{status: response(said, "Error") for status, said in EVERY.items()},
            "408": response("The upload took too long.", "Error"),
            "413": response("The upload is too large.", "Error"),
            "503": response(
                "Too many requests wait (Retry-After says for how long), the model cannot be read just now, or it stops.",
                "Error",
            ),
        },
    }


def schemas() -> dict[str, Any]:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    answer = record(
        "file",
        file={**TEXT, "description": "The picture's name, as it was sent."},
        label=TEXT,
        score={**share, "description": "The label's probability among the classes asked for."},
        task={**NAME, "description": "The task that taught the class; null: none did."},
        expert={**TEXT, "description": "Whose say was largest."},
        weight={**share, "description": "Its share of all experts'."},
        top=array(record("label score", label=TEXT, score=share)),
        why={
            **array(record("concept contribution", concept=TEXT, contribution={"type": "number"})),
            "description": REASONS,
        },
        error={**TEXT, "description": "Why there is no answer."},
    )
    per_cent = {"type": ["number", "null"], "minimum": 0, "maximum": 100}
    task = record(
        "number task state classes before after",
        number=COUNT, task=TEXT, state={"enum": ["current", "forgotten", "refused", "undone"]}, when=NAME,
        classes=array(TEXT), train={"type": ["integer", "null"]}, test={"type": ["integer", "null"]},
        before=per_cent, after=per_cent, now=per_cent, refused=TEXT, rows=array({"type": "object"}),
    )  # fmt: skip
    return {
        "Answer": answer,
        "Answers": record(
            "state answers",
            state={**TEXT, "description": "The state of the model that answered."},
            answers=array(reference("Answer")),
        ),
        "History": record(
            "state classes probe tasks", state=TEXT, classes=array(TEXT), tasks=array(task),
            probe=record("before now", before=per_cent, now=per_cent),
        ),
        "Health": record("status state method requests perdure", status={"enum": ["ok", "stopping"]}, state=TEXT,
                         method=TEXT, requests=COUNT, perdure=TEXT),
        "Error": record("error", error=TEXT),
    }  # fmt: skip
