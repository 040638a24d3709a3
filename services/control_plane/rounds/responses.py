"""Builds the JSON objects of sets of rounds (repeated training of a policy on its own answers)."""

from typing import Any

from services.control_plane.core.responses import seconds
from services.control_plane.core.tables import EVALUATION_ENDS, Rounds
from services.control_plane.rounds.stages import Entry, best_of, stage_of


def rounds_object(row: Rounds) -> dict[str, Any]:
    best = best_of(row.history)
    return {
        "id": row.id,
        "object": "rounds",
        "created_at": seconds(row.created_at),
        "status": row.state,
        "stage": None if row.state in EVALUATION_ENDS else stage_of(row.history[-1]),
        "request": {name: value for name, value in row.spec.items() if value is not None},
        "rounds": list(map(_round_object, row.history)),
        "best_round": best["number"],
        "model": best["model"],
        "waits_for": row.waits_for,
        "end_reason": row.end_reason,
        "finished_at": seconds(row.finished_at),
        "error": row.error,
    }


def _round_object(entry: Entry) -> dict[str, Any]:
    results = entry.get("results") or {}
    names = ("samples", "rows", "file", "job", "model")
    return {
        "number": entry["number"],
        **{name: entry.get(name) for name in names},
        "evaluations": entry.get("evaluations") or {},
        **{name: results.get(name) for name in ("score", "win_rate", "kl", "num_failed")},
    }
