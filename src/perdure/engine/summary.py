"""What a run's ``metrics.json`` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from perdure.data.task import Stream
from perdure.engine.evaluate import Protocol, summarise
from perdure.engine.online import course
from perdure.engine.settings import Settings
from perdure.methods.base import Method

FORMAT = 1


def summary(
    config: Mapping[str, Any], settings: Settings, method: Method, stream: Stream, protocol: Protocol,
    rows: list[dict[str, Tensor]], records: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:  # fmt: skip
    """The figures of the rows so far, the course of losses, gap, times and remarks, and what the run was made with."""
    tasks = [t.name for t in stream.tasks]
    figures = summarise(stream, rows, protocol, transfers=method.scope == "task")
    seconds = [r["seconds"] for r in records]
    c = config
    return {
        "format": FORMAT,
        "perdure": c["environment"]["perdure"],
        "finished": len(rows) == len(tasks) + 1,
        "method": c["method"],
        "reference": method.reference,
        "scope": method.scope,
        "learns": method.learns,
        "stream": c["stream"],
        "seed": c["seed"],
        "tasks": tasks,
        **figures,
        **course(records),
        "gap": [r.get("gap") for r in records],
        "seconds": round(sum(s["train"] + s["evaluate"] for s in seconds), 2),
        "seconds_by_task": [{"task": r["task"], **r["seconds"]} for r in records],
        "peak_memory_mb": max(r["peak_memory_mb"] for r in records),
        **({"explained": records[-1]["explained"]} if "explained" in records[-1] else {}),
        "losses": {r["task"]: thinned(r["losses"]) for r in records if r["losses"]},
        "phases": {
            r["task"]: {name: thinned(losses) for name, losses in r["phases"].items() if losses}
            for r in records
            if r.get("phases")
        },
        "remarks": {r["task"]: r["remarks"] for r in records if r.get("remarks")},
        "protocol": {"labels": protocol.labels, "task_id": protocol.task_id},
        "config": {**c["options"], **asdict(settings)},
        "model": {"weights": c["weights"], **c.get("backbone", {})},
        "environment": c["environment"],
        "data": {"name": stream.name, "split": stream.digest, "notes": list(stream.notes)},
    }


def thinned(losses: dict[str, list[float]], points: int = 60) -> dict[str, list[float]]:
    """Losses as means over at most ``points`` stretches of steps, with the step at which each ends."""
    length = len(next(iter(losses.values())))
    size = -(-length // points)
    edges = range(0, length, size)
    means = {n: [round(sum(v[i : i + size]) / len(v[i : i + size]), 5) for i in edges] for n, v in losses.items()}
    return {"step": [min(i + size, length) for i in edges], **means}
