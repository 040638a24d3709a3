"""Builds the JSON objects of the API for files, uploads and checks of training files."""

from collections.abc import Mapping
from typing import Any

from services.contract import InvalidRows, SideJobResult
from services.control_plane.core.responses import seconds
from services.control_plane.core.tables import (
    File,
    Upload,
    UploadPart,
)
from services.control_plane.files.files import TRAINING


def file_object(row: File) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.num_bytes,
        "created_at": seconds(row.created_at),
        "expires_at": seconds(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": _file_status(row),
        "status_details": row.refusal,
        "x_raydpo": {
            "sha256": row.sha256,
            "report": row.report,
            "checked_bytes": row.num_checked,
            **reading_fields(row.reading or {}),
        },
    }


def reading_fields(reading: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options for reading a file's rows as fields of the API. `reading` is a stored `Reading`, which
    another release of the service may have written.
    """
    rows = InvalidRows().model_dump() | reading.get("invalid_rows", {})
    return {
        "columns": reading.get("columns") or None,
        "invalid_rows": rows["how"],
        "max_invalid_share": rows["max_share"] if rows["how"] == "drop" else None,
    }


def _file_status(row: File) -> str:
    if row.refusal is not None:
        return "error"
    return "uploaded" if row.purpose == TRAINING and row.report is None else "processed"


def upload_object(row: Upload, state: str, file: File | None) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "upload",
        "bytes": row.num_bytes,
        "created_at": seconds(row.created_at),
        "expires_at": seconds(row.expires_at),
        "filename": row.filename,
        "purpose": row.purpose,
        "status": state,
        "file": file and file_object(file),
    }


def part_object(row: UploadPart) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "upload.part",
        "created_at": seconds(row.created_at),
        "upload_id": row.upload_id,
    }


def check_object(check_id: str, file: File, result: SideJobResult | None, *, running: bool = False) -> dict[str, Any]:
    """Returns the API's JSON object of a check of a training file: its status, and the report on the file's rows.

    `check_id` is the id of the check, and `running` says whether the check still runs. `result` is the result of
    encoding the rows for a model. `result` is None if the request named no model, or if the check still runs.
    """
    error = result.error if result else None
    of_model = result.report or {} if result else {}
    return {
        "object": "dataset.check",
        "id": check_id,
        "status": "running" if running else "failed" if error else "completed",
        "report": {"survey": file.report, **of_model},
        "error": error and {"code": error.code, "message": error.message, "param": error.param},
    }
