"""Defines the JSON body of POST /v1/x/rounds, which creates a set of rounds (repeated training of a policy on its own
answers), and the stored description of such a set.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from services.control_plane.core.errors import InvalidRequest
from services.control_plane.evaluations.requests import (
    MOST_INLINE,
    MOST_ITEMS,
    MOST_SAMPLES,
    EvaluationRow,
    Judge,
    Sampling,
    Spec,
)
from services.control_plane.http.validation import Text, parse
from services.control_plane.jobs.requests import CreateJob
from services.control_plane.rounds import selection

MOST_ROUNDS = 20
MOST_ROWS = 50_000  # of training data of a round, which are made in memory
GIVEN_BY_ROUNDS = ("model", "training_file")  # fields of a job that rounds fill in
LOCAL_ROWS = "./rows.jsonl"  # stands for the file of a round that has not been made yet

Rows = Annotated[list[EvaluationRow], Field(min_length=1, max_length=MOST_INLINE)]
MaxItems = Annotated[int, Field(ge=1, le=MOST_ITEMS)]


class Selection(BaseModel):
    """The field `selection` of a request for a set of rounds: which of the answers to a prompt become training data."""

    model_config = ConfigDict(extra="forbid")
    type: selection.Type = Field(
        default="best_worst",
        description="Which training rows are made of the answers to a prompt. `best_worst`: one pair, of the best and "
        "the worst answer. `all_pairs`: a pair of each two answers with different scores. `ranking`: one row with all "
        "answers and their scores, for objectives that learn from ratings. `rso`: pairs of the answers that "
        "statistical rejection sampling accepts.",
    )
    beta: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] | None = Field(
        default=None,
        description="Only for the type `rso`: the temperature of the rejection sampling. The lower it is, the fewer "
        "answers with low scores are accepted. Default: 0.5.",
    )
    num_accepted: Annotated[int, Field(ge=2, le=MOST_SAMPLES)] | None = Field(
        default=None,
        description="Only for the type `rso`: number of answers to accept for each prompt; each two of them make a "
        "pair. Default: an eighth of `num_samples`, but at least 2.",
    )

    @model_validator(mode="after")
    def _fits_its_type(self) -> Self:
        for name in ("beta", "num_accepted"):
            if self.type != "rso" and getattr(self, name) is not None:
                raise ValueError(f"a selection of the type '{self.type}' has no field '{name}'; leave it out.")
        return self

    def resolved(self, num_samples: int) -> selection.Selection:
        return selection.Selection(self.type, self.beta or 0.5, self.num_accepted or max(2, num_samples // 8))


class HeldOut(BaseModel):
    """The description of how the policy of each round is evaluated: the file of prompts, the judge of the answers, and
    how the answers are sampled. It is stored as a part of the description of the set of rounds (RoundsSpec)."""

    model_config = ConfigDict(extra="forbid")
    file: Text | None = Field(
        default=None,
        description="Id of an uploaded file with the prompts to evaluate policies on. Default, if `rows` is not sent "
        "either: the prompts that the rounds train on.",
    )
    max_items: MaxItems = Field(
        default=200,
        description="Maximum number of prompts to evaluate policies on. The first prompts are taken.",
    )
    judge: Judge | None = Field(
        default=None,
        description="What judges the answers when a policy is evaluated. Default: the same "
        "judge that scores the answers for training.",
    )
    sampling: Sampling | None = Field(
        default=None,
        description="How answers are sampled when a policy is evaluated. Default: as the answers that the rounds train "
        "on are sampled.",
    )


class CreateHeldOut(HeldOut):
    """The field `evaluation` of a request for a set of rounds. Unlike the stored description (HeldOut), it may contain
    the prompts themselves (`rows`)."""

    rows: Rows | None = Field(
        default=None, description="The prompts to evaluate policies on. Send this, `file` or neither."
    )


class RoundsSpec(BaseModel):
    """The stored description of a set of rounds (repeated training of a policy on its own answers): the first policy,
    the file of prompts, and how answers are sampled, judged and trained on. If the request itself contains the prompts,
    they are stored separately.
    """

    model_config = ConfigDict(extra="forbid")
    model: Text = Field(description="Name of the policy that the rounds start from: a base model, or a trained policy.")
    file: Text | None = Field(
        default=None, description="Id of an uploaded file with the prompts to sample answers to. Send this or `rows`."
    )
    max_items: MaxItems = Field(
        default=200,
        description="Maximum number of prompts to take from the file. The first prompts of the file are taken.",
    )
    prompts_per_round: Annotated[int, Field(ge=1, le=MOST_ITEMS)] | None = Field(
        default=None,
        description="Number of prompts that each round takes. A round continues after the last prompt of the round "
        "before; after the last prompt of all, the first one follows. Default: each round takes all prompts.",
    )
    num_rounds: int = Field(default=3, ge=1, le=MOST_ROUNDS, description="Maximum number of rounds.")
    num_samples: int = Field(
        default=4,
        ge=2,
        le=MOST_SAMPLES,
        description="Number of answers that the policy writes to each prompt in a round.",
    )
    sampling: Sampling = Field(
        default_factory=Sampling,
        description="How the policy samples its answers in each round: length, temperature, nucleus and seed. Each "
        "round derives other seeds from `seed`.",
    )
    judge: Judge = Field(description="What scores the answers in each round: a model, an implicit reward, or a rule.")
    selection: Selection = Field(
        default_factory=Selection, description="Which of the answers to a prompt become training data."
    )
    job: dict[str, Any] = Field(
        default_factory=lambda: {"method": {"type": "dpo"}},
        description="The job that trains the policy in each round: a body of POST /v1/fine_tuning/jobs without `model` "
        "and `training_file`. Default: the objective `dpo` with its defaults.",
    )
    start: Literal["newest", "first"] = Field(
        default="newest",
        description="The policy that the job of each round starts from: the `newest` one, or the `first` one, from "
        "which the rounds started.",
    )
    reference: Literal["newest", "first"] = Field(
        default="first",
        description="The reference model of the job of each round: the `newest` policy, or the `first` one, from which "
        "the rounds started.",
    )
    evaluation: HeldOut = Field(
        default_factory=HeldOut,
        description="How policies are evaluated: the one that the rounds start from, and the one that each round "
        "trains.",
    )
    stop_if_not_better: bool = Field(
        default=False,
        description="Whether the rounds end early, after a round whose policy is not better than the best policy "
        "before it.",
    )

    @property
    def models(self) -> set[str]:
        """Returns the names of the models that are needed when the first round begins: the first policy, and the models
        of the judges.
        """
        return {self.model} | self.judge.models | self.evaluating_judge.models

    def num_prompts(self, num_sampled: int) -> int:
        """Returns how many prompts each round takes. `num_sampled` is the number of prompts that the user gave for
        sampling answers."""
        return min(self.prompts_per_round or num_sampled, num_sampled)

    def seeded(self, sampling: Sampling, number: int) -> Sampling:
        """Returns `sampling` with a seed that depends on the round's `number`, so that each round samples other
        answers.
        """
        return sampling.model_copy(update={"seed": (sampling.seed + number * 1_000_003) % 2**31})

    def samples_of(self, model: str, number: int) -> Spec:
        """Returns the description of the evaluation that samples the answers of the round `number` from `model`."""
        return Spec(
            kind="samples",
            model=model,
            judge=self.judge,
            num_samples=self.num_samples,
            sampling=self.seeded(self.sampling, number),
        )

    @property
    def evaluating_judge(self) -> Judge:
        return self.evaluation.judge or self.judge

    @property
    def evaluating_sampling(self) -> Sampling:
        return self.evaluation.sampling or self.sampling

    def quality_of(self, model: str, before: str | None, *, is_asked: bool) -> Spec | None:
        """Returns the description of the evaluation that judges the answers of `model`.

        If the judge gives scores, the evaluation scores these answers. If the judge is asked which of two answers is
        better (`is_asked`), the evaluation compares them with the answers of `before`, the policy of the round before.
        Returns None if the judge is asked and `before` is None, because there is nothing to compare with.
        """
        told: dict[str, Any] = {"judge": self.evaluating_judge, "sampling": self.evaluating_sampling}
        if not is_asked:
            return Spec(kind="score", model=model, **told)
        return None if before is None else Spec(kind="compare", model=model, baseline=before, **told)

    def drift_of(self, model: str) -> Spec:
        """Returns the description of the evaluation that measures how far `model` is from the first policy."""
        whole = Sampling(max_tokens=self.evaluating_sampling.max_tokens, seed=self.evaluating_sampling.seed)
        return Spec(kind="drift", model=model, reference=self.model, sampling=whole)

    def job_of(self, rounds_id: str, number: int, newest: str, file: str) -> CreateJob:
        """Returns the request for the job of the round `number` in the set of rounds `rounds_id`.

        `newest` is the name of the newest policy, and `file` the id of the file with the round's rows. Raises
        InvalidRequest if a field of the job in the user's request is wrong.
        """
        start = newest if self.start == "newest" else self.model
        reference = newest if self.reference == "newest" else self.model
        asked = {**self.job, "model": start, "training_file": file}
        asked["metadata"] = _with(asked.get("metadata"), rounds=rounds_id, round=str(number))
        job = parse(CreateJob, asked, "job")
        if reference == start or not job.spec().config.objective.traits.needs_reference:
            return job
        extension = asked.get("x_raydpo") or {}
        named = _with(extension.get("reference"), model=reference)
        return parse(CreateJob, {**asked, "x_raydpo": _with(extension, reference=named)}, "job")


def _with(value: Any, **more: Any) -> Any:
    """Returns the JSON object `value` with the fields `more` added. None counts as an empty object. A value of any
    other type is returned as it is, so that a later check can refuse it.
    """
    return {**(value or {}), **more} if value is None or isinstance(value, dict) else value


class CreateRounds(RoundsSpec):
    """The JSON body of POST /v1/x/rounds, which creates a set of rounds (repeated training of a policy on its own
    answers). Unlike the stored description (RoundsSpec), it may contain the prompts themselves (`rows`)."""

    rows: Rows | None = Field(default=None, description="The prompts to sample answers to. Send this or `file`.")
    evaluation: CreateHeldOut = Field(
        default_factory=CreateHeldOut,
        description="How policies are evaluated: the one that the rounds start from, and the one that each round "
        "trains.",
    )

    def check(self) -> None:
        """Raises InvalidRequest, which names the field, if a field is missing, or two fields contradict each other."""
        if (self.file is None) == (self.rows is None):
            message = "Rounds take their prompts from one place; send either 'file' or 'rows'."
            raise InvalidRequest(message, param="file", code="missing_required_parameter")
        if self.evaluation.file is not None and self.evaluation.rows is not None:
            message = "An evaluation takes its prompts from one place; send either 'file' or 'rows'."
            raise InvalidRequest(message, param="evaluation.file")
        accepted = self.selection.num_accepted or 2
        if accepted > self.num_samples:
            message = f"num_accepted is {accepted}, but a prompt has {self.num_samples} samples; lower num_accepted."
            raise InvalidRequest(message, param="selection.num_accepted")
        for name in GIVEN_BY_ROUNDS:
            if name in self.job:
                message = f"The service sets the field '{name}' of each round's job itself; leave the field out."
                raise InvalidRequest(message, param=f"job.{name}")
        extension = self.job.get("x_raydpo")
        if isinstance(extension, dict) and extension.get("dataset") is not None:
            message = "The job of each round trains on the rows of the round; leave x_raydpo.dataset out."
            raise InvalidRequest(message, param="job.x_raydpo.dataset")
        reference = extension.get("reference") if isinstance(extension, dict) else None
        if isinstance(reference, dict) and reference.get("model") is not None:
            message = (
                "The field 'reference' of the rounds names the reference model; leave 'x_raydpo.reference.model' out."
            )
            raise InvalidRequest(message, param="job.x_raydpo.reference.model")

    def spec(self) -> RoundsSpec:
        """Returns the description of the set of rounds that the service stores. This description does not have the
        prompts that the request contains.
        """
        return RoundsSpec.model_validate(self.model_dump(exclude={"rows": True, "evaluation": {"rows"}}))
