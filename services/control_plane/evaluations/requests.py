"""Defines the JSON body of POST /v1/x/evaluations, which creates an evaluation, and the stored description of an
evaluation.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations.rules import InvalidPattern, Rule, check_pattern
from services.control_plane.http.validation import Text

Kind = Literal["compare", "score", "samples", "preferences", "drift"]

MOST_ITEMS, MOST_INLINE = 1000, 256
OF_ALL_KINDS = {"kind", "model", "file", "rows", "max_items"}
OF_KIND: dict[str, set[str]] = {  # the fields that only some kinds have
    "compare": {"baseline", "judge", "sampling"},
    "score": {"judge", "sampling"},
    "samples": {"judge", "sampling", "num_samples"},
    "preferences": {"reference", "beta"},
    "drift": {"reference", "sampling"},
}
NEEDS_JUDGE = ("compare", "score", "samples")
MOST_SAMPLES, MOST_SAMPLES_TO_COMPARE = 64, 8  # a judge that is asked gives n (n - 1) verdicts on n samples
OF_JUDGE: dict[str, set[str]] = {  # the fields of each type of judge
    "model": {"model", "criteria"},
    "implicit": {"model", "reference", "beta"},
    "regex": {"pattern"},
    "length": set(),
    "exact": set(),
}
NEEDED_BY_JUDGE = {"model": "model", "regex": "pattern"}

_MESSAGE = {"type": "object", "properties": {"role": {"type": "string"}, "content": {"type": "string"}}}
_TEXT: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": _MESSAGE}]}


class Judge(BaseModel):
    """The field `judge` of a request for an evaluation: what decides which answer is better, or how good an answer
    is.
    """

    model_config = ConfigDict(extra="forbid")
    type: Literal["model", "implicit"] | Rule = Field(
        description="`model` asks a model that this service serves, or one at an address that the operator set. "
        "`implicit` takes a policy's implicit reward. The other types are rules: `regex` gives 1 to an answer in which "
        "`pattern` matches, else 0; `length` gives the number of words of the answer; `exact` gives 1 to an answer "
        "that equals the best completion of the prompt's row, else 0."
    )
    model: Text | None = Field(
        default=None,
        description="Name of the model that judges. For the type `model`: a reward model, which scores answers; or a "
        "policy, a base model or a judge from the operator's setting `judges`, which is asked which of two answers is "
        "better, or in evaluations of the kind `score` for a grade from 1 to 10. For the type `implicit`: the policy "
        "whose implicit reward counts; default: the model that is evaluated.",
    )
    reference: Text | None = Field(
        default=None,
        description="Only for a judge of the type `implicit`: name of the policy's reference model. Default: the "
        "reference model of the job that trained the policy.",
    )
    beta: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Only for a judge of the type `implicit`: the factor by which log-ratios are multiplied to give "
        "rewards. Default: beta of the job that trained the policy.",
    )
    criteria: Annotated[str, Field(max_length=4000)] | None = Field(
        default=None,
        description="Criteria by which a judge that is asked decides how good an answer is, in words. "
        "Default: the service's criteria. A reward model takes no criteria.",
    )
    pattern: Annotated[str, Field(min_length=1, max_length=1000)] | None = Field(
        default=None, description="Only for a judge of the type `regex`: the regular expression, in RE2's syntax."
    )

    @property
    def models(self) -> set[str]:
        """Returns the names of the models that the request names for the judge: its model and its reference model."""
        return {name for name in (self.model, self.reference) if name}

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        needed = NEEDED_BY_JUDGE.get(self.type)
        if needed is not None and getattr(self, needed) is None:
            raise ValueError(f"a judge of the type '{self.type}' needs the field '{needed}'.")
        for name in sorted(set[str]().union(*OF_JUDGE.values()) - OF_JUDGE[self.type]):
            if getattr(self, name) is not None:
                raise ValueError(f"a judge of the type '{self.type}' has no field '{name}'; leave it out.")
        if self.pattern is not None:
            try:
                check_pattern(self.pattern)
            except InvalidPattern as error:
                raise ValueError(f"{error}; write a regular expression that RE2 can read.") from None
        return self


class Sampling(BaseModel):
    """The field `sampling` of a request for an evaluation: how models sample the answers that are evaluated. It holds
    the length, temperature, nucleus (`top_p`) and seed.
    """

    model_config = ConfigDict(extra="forbid")
    max_tokens: int = Field(default=512, ge=1, le=32_768, description="Maximum number of tokens of an answer.")
    temperature: float = Field(
        default=1.0, ge=0, le=2, description="Sampling temperature; 0 always takes the most likely token."
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling: each token is sampled from the most likely tokens that together have this "
        "probability. 1 samples from all tokens.",
    )
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**31,
        description="Seed of the sampling for the first prompt. Each following prompt gets the next number: seed + 1, "
        "seed + 2 and so on.",
    )


class EvaluationRow(BaseModel):
    """A prompt to evaluate a model on, perhaps with completions. Pydantic does not check the values, because
    `dpo_core.data` does.
    """

    model_config = ConfigDict(extra="forbid")
    prompt: Annotated[Any, WithJsonSchema(_TEXT)] = Field(description="The prompt: a text, or a list of chat messages.")
    completions: Annotated[Any, WithJsonSchema({"type": "array", "items": _TEXT})] = Field(
        default=None,
        description="Completions of the prompt that people have ranked, the best one first. Each is a text if the "
        "prompt is a text, else a list of chat messages.",
    )
    system: Annotated[Any, WithJsonSchema({"type": "string"})] = Field(
        default=None,
        description="System prompt. If it is given, a prompt and completions that are texts are read as chat messages.",
    )
    tools: Annotated[Any, WithJsonSchema({"type": "array", "items": {"type": "object"}})] = Field(
        default=None,
        description="Tools (functions) that the model may call, in the format of the chat completions API.",
    )
    chat_template_kwargs: Annotated[Any, WithJsonSchema({"type": "object"})] = Field(
        default=None, description='Arguments for the model\'s chat template, such as `{"enable_thinking": false}`.'
    )


class Spec(BaseModel):
    """The description of an evaluation: its kind, models and options. If the request itself contains the prompts, they
    are not part of the description."""

    model_config = ConfigDict(extra="forbid")
    kind: Kind = Field(
        description="What the evaluation finds out. `compare`: which of two models answers better. `score`: how good a "
        "model's answers are. `samples`: how good several answers of a model to each prompt are. `preferences`: "
        "whether a policy or a reward model prefers the completions that people preferred. `drift`: how far a policy "
        "has moved from its reference model."
    )
    model: Text = Field(description="Name of the policy, checkpoint, reward model or base model to evaluate.")
    baseline: Text | None = Field(
        default=None,
        description="Only for the kind `compare`: name of the model to compare with. Default: the base model of the "
        "policy that is evaluated.",
    )
    judge: Judge | None = Field(
        default=None,
        description="What judges the answers: a model, an implicit reward, or a rule. Evaluations of the "
        "kinds `compare`, `score` and `samples` need a judge.",
    )
    reference: Text | None = Field(
        default=None,
        description="Only for the kinds `preferences` and `drift`: name of the reference model. Default: the reference "
        "model of the job that trained the policy.",
    )
    beta: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Only for the kind `preferences`: the factor by which log-ratios are multiplied to give rewards. "
        "Default: beta of the job that trained the policy.",
    )
    sampling: Sampling = Field(
        default_factory=Sampling,
        description="How the models sample the answers that are evaluated: length, temperature, nucleus and seed.",
    )
    num_samples: Annotated[int, Field(ge=2, le=MOST_SAMPLES)] | None = Field(
        default=None, description="Only for the kind `samples`: number of answers to each prompt. Default: 4."
    )
    file: Text | None = Field(
        default=None, description="Id of an uploaded file with the prompts to evaluate on. Send this or `rows`."
    )
    max_items: int = Field(
        default=200,
        ge=1,
        le=MOST_ITEMS,
        description="Maximum number of rows of the file to evaluate on. The first rows of the file are taken.",
    )

    @property
    def models(self) -> set[str]:
        """Returns the names of all models that take part in the evaluation."""
        judge = self.judge.models if self.judge else set()
        return {name for name in (self.model, self.baseline, self.reference) if name} | judge


class CreateEvaluation(Spec):
    """The JSON body of POST /v1/x/evaluations, which creates an evaluation of a model."""

    rows: Annotated[list[EvaluationRow], Field(min_length=1, max_length=MOST_INLINE)] | None = Field(
        default=None, description="The prompts to evaluate on, perhaps with completions. Send this or `file`."
    )

    def check(self) -> None:
        """Raises InvalidRequest, which names the field, if a field is missing that the kind of evaluation needs.

        Also raises InvalidRequest for a field that this kind does not have.
        """
        allowed = OF_ALL_KINDS | OF_KIND[self.kind]
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        for name in sorted(given - allowed):
            listed = ", ".join(sorted(allowed))
            message = f"An evaluation of the kind '{self.kind}' has no field '{name}'. It can have: {listed}."
            raise InvalidRequest(message, param=name, code="unknown_parameter")
        if self.kind in NEEDS_JUDGE and self.judge is None:
            message = f"An evaluation of the kind '{self.kind}' needs the field 'judge'."
            raise InvalidRequest(message, param="judge", code="missing_required_parameter")
        if (self.file is None) == (self.rows is None):
            message = "An evaluation takes its prompts from one place; send either 'file' or 'rows'."
            raise InvalidRequest(message, param="file", code="missing_required_parameter")

    def spec(self, **resolved: Any) -> Spec:
        """Returns the description of the evaluation to store. `resolved` are fields for which the service has chosen
        values.
        """
        return Spec.model_validate(self.model_dump(exclude={"rows"}) | resolved)
