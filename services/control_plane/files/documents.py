"""The JSON objects of files, uploads and checks of training files, as the OpenAPI document describes them.

docs/wire/objects.md says what the fields mean.
"""

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict

from dpo_core.data.survey import FeedbackReport


class FileExtension(TypedDict):
    sha256: str
    report: FeedbackReport | None
    checked_bytes: int | None
    columns: dict[str, str] | None
    invalid_rows: str
    max_invalid_share: float | None


class FileDocument(TypedDict):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    x_raydpo: FileExtension


class UploadDocument(TypedDict):
    id: str
    object: Literal["upload"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    file: FileDocument | None


class PartDocument(TypedDict):
    id: str
    object: Literal["upload.part"]
    created_at: int
    upload_id: str


class LinesDocument(TypedDict):
    """The number of a file's rows that have a certain property, and the lines of the first ten of these rows."""

    count: int
    first: list[int]


class ReasonDocument(LinesDocument):
    """The rows of a file that were left out for one reason, with a sentence about the first of these rows."""

    sentence: str


class LengthsDocument(TypedDict):
    """The lengths, in tokens, of one part of all rows, such as the prompts.

    The keys of `histogram` are powers of two. The value of 64 is the number of rows that have at most 64 tokens but
    more than 32.
    """

    total: int
    longest: int
    histogram: dict[str, int]


class TokensDocument(TypedDict):
    """Counts of what happened to the rows of a file while they were encoded for a model: rows that were kept, held out,
    left out or cut, warnings about rows, and lengths in tokens.
    """

    num_rows: int
    num_groups: int
    num_kept: int
    num_held_out: int
    invalid: dict[str, ReasonDocument]
    margins: LinesDocument
    dropped: dict[str, ReasonDocument]
    truncated: dict[str, LinesDocument]
    special_tokens: LinesDocument
    unasked: LinesDocument
    unknown: LinesDocument
    unended: LinesDocument
    unread: dict[str, LinesDocument]
    lengths: dict[str, LengthsDocument]
    chosen_longer: int
    rejected_longer: int
    shortest_too_long: int | None
    limit: int
    truncation: str


class PreviewDocument(TypedDict):
    """A row of a training file as the model sees it. If the row is left out, `dropped` is the code of the reason.

    The model learns from the completions, not from the prompt.
    """

    line: int
    dropped: str | None
    prompt: str
    chosen: str
    rejected: str | None


class CheckReport(TypedDict):
    survey: FeedbackReport | None
    tokens: NotRequired[TokensDocument]
    preview: NotRequired[list[PreviewDocument]]


class CheckDocument(TypedDict):
    """The JSON object of a check of a training file. `report` describes the rows and, if a model was named, their
    encoding.
    """

    object: Literal["dataset.check"]
    id: str
    status: Literal["running", "failed", "completed"]
    report: CheckReport
    error: dict[str, Any] | None


class RowProblem(TypedDict):
    code: str
    pointer: str
    message: str


class GroupDocument(TypedDict):
    """A prompt with its completions, the best completion first. The prompt and each completion is a text or a list of
    messages.
    """

    prompt: str | list[dict[str, Any]]
    completions: list[str | list[dict[str, Any]]]
    ratings: list[float] | None
    weight: float
    margin: float | None
    tools: list[dict[str, Any]] | None
    chat_template_kwargs: dict[str, Any] | None


class RowDocument(TypedDict):
    line: int
    groups: list[GroupDocument]
    problem: RowProblem | None


class RowsDocument(TypedDict):
    object: Literal["dataset.rows"]
    data: list[RowDocument]
    has_more: bool
    next: int | None
