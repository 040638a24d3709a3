"""Defines the request bodies for files, for uploads in parts, and for checks of rows."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
)

from dpo_core.config import TrainConfig, Truncation
from dpo_core.data.formats.formats import ROLES
from services.contract import InvalidRows, Reading
from services.control_plane.core.errors import InvalidRequest
from services.control_plane.files.files import LONGEST_LIFE, LONGEST_NAME, SHORTEST_LIFE, TRAINING
from services.control_plane.files.uploads import MOST_PARTS
from services.control_plane.http.validation import Text, parse, refuse_unknown

READING = {"columns", "invalid_rows", "max_invalid_share"}


Columns = dict[str, Annotated[str, StringConstraints(min_length=1, max_length=256)]]


def reading(extension: Mapping[str, Any]) -> Reading:
    """Returns the options for reading a file's rows that `extension`, the field `x_raydpo` of a request, holds.

    Raises InvalidRequest, which names the invalid field.
    """
    return Reading(columns=_columns(extension.get("columns", {})), invalid_rows=_invalid_rows(extension))


def _columns(given: object) -> dict[str, str]:
    where = "x_raydpo.columns"
    columns: dict[str, str] = parse(Columns, given, where)
    if unknown := sorted(columns.keys() - ROLES):
        message = (
            f"{where} names the role '{unknown[0]:.80}', which does not exist; "
            f"the roles are {', '.join(sorted(ROLES))}."
        )
        raise InvalidRequest(message, param=f"{where}.{unknown[0]:.80}", code="unknown_parameter")
    return columns


def _invalid_rows(extension: Mapping[str, Any]) -> InvalidRows:
    paths = {"how": "x_raydpo.invalid_rows", "max_share": "x_raydpo.max_invalid_share"}
    given = {"how": extension.get("invalid_rows"), "max_share": extension.get("max_invalid_share")}
    given = {name: value for name, value in given.items() if value is not None}
    invalid_rows: InvalidRows = parse(InvalidRows, given, "x_raydpo", paths)
    if "max_share" in given and invalid_rows.how == "refuse":
        message = f"{paths['max_share']} has an effect only with invalid_rows 'drop'; send invalid_rows 'drop' as well."
        raise InvalidRequest(message, param=paths["max_share"])
    return invalid_rows


class CheckDataset(BaseModel):
    """The JSON body of POST /v1/x/datasets/check, which asks for a check of a training file, perhaps with a model."""

    model_config = ConfigDict(extra="forbid")
    training_file: Text
    model: Text | None = None
    max_length: int | None = None
    truncation: Truncation | None = None

    def config(self) -> TrainConfig:
        """Returns a training config with the options of this body, all of which influence how rows are encoded.

        Raises InvalidRequest, which names the invalid field.
        """
        given = self.model_dump(include={"max_length", "truncation"}, exclude_none=True)
        if given and self.model is None:
            (name, *_) = given
            message = (
                f"{name} is a number of tokens, which depends on the model's tokenizer; send the field model as well."
            )
            raise InvalidRequest(message, param=name)
        return parse(TrainConfig, given, "", {name: name for name in given})


class ExpiresAfter(BaseModel):
    """The field `expires_after` of a request: the time from a file's creation until it expires.

    In multipart forms, the fields are `expires_after[anchor]` and `expires_after[seconds]`.
    """

    model_config = ConfigDict(extra="forbid")
    anchor: Literal["created_at"]
    seconds: Annotated[int, Field(ge=SHORTEST_LIFE, le=LONGEST_LIFE)]


class CreateFile(BaseModel):
    """The text fields of the multipart body of POST /v1/files, which uploads a file. The file itself is not among
    them."""

    model_config = ConfigDict(extra="forbid")
    purpose: Text
    expires_after: ExpiresAfter | None = None
    x_raydpo: dict[str, Any] | None = None

    @field_validator("purpose")
    @classmethod
    def _check_purpose(cls, purpose: str) -> str:
        if purpose != TRAINING:
            message = f"purpose '{purpose:.80}' is not supported; it must be '{TRAINING}'."
            raise InvalidRequest(message, param="purpose", code="unsupported_value")
        return purpose

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> Self:
        return parse(cls, fields, "")

    @property
    def life_seconds(self) -> int | None:
        return self.expires_after.seconds if self.expires_after else None

    def reading(self) -> Reading:
        """Returns the options for reading the file's rows that the field `x_raydpo` of this body holds.

        Raises InvalidRequest, which names the invalid field.
        """
        extension = self.x_raydpo or {}
        refuse_unknown(extension, READING, "x_raydpo")
        return reading(extension)


class CreateUpload(CreateFile):
    """The JSON body of POST /v1/uploads, which begins an upload of a file in parts: the file's name, size, media type
    and purpose.
    """

    filename: Text
    bytes: Annotated[int, Field(ge=1)]
    mime_type: Annotated[str, StringConstraints(max_length=LONGEST_NAME, pattern=r"^[ -~]+$")]


class CompleteUpload(BaseModel):
    """The JSON body of POST /v1/uploads/{id}/complete, which joins the parts of an upload in the order of
    `part_ids`."""

    model_config = ConfigDict(extra="forbid")
    part_ids: Annotated[list[Text], Field(min_length=1, max_length=MOST_PARTS)]
    md5: Text | None = None
