"""Runs the training loop: `train` yields one result per optimizer step."""

import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_core.checkpoint_selection import Evaluation, evaluations, stalls
from dpo_core.config import TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.adapter import check_base, fingerprint
from dpo_core.models.adapter_folder import EFFECT
from dpo_core.models.architecture import device_of, is_sharded
from dpo_core.models.model import check_model, check_policy, has_adapter
from dpo_core.models.parts import is_unread, read_parts
from dpo_core.models.quantization import precision_of
from dpo_core.objectives.drift import Drift
from dpo_core.objectives.losses import Statistics, check_groups
from dpo_core.objectives.metrics import compute_metrics
from dpo_core.plan.positions import check_max_length
from dpo_core.policy.adapter_effect import measure_effect, measured_groups
from dpo_core.policy.admission import admit, last_position
from dpo_core.policy.flops import Flops, matmul_rate
from dpo_core.policy.measures import Measures
from dpo_core.policy.routing import BALANCE, balance_metrics
from dpo_core.policy.scorer import Scorer
from dpo_core.training.checkpoint import Manifest, load, resumable
from dpo_core.training.checkpoint_writer import Publish, Writer
from dpo_core.training.evaluation import Batches, evaluate
from dpo_core.training.gradients import Pack, backward, check_agreement, make_packs, own_groups, smaller_packs
from dpo_core.training.load_ahead import LoadIds, load_ahead, load_groups
from dpo_core.training.optim import learning_rate, make_optimizer
from dpo_core.training.pack_size import checkpoint_activations, plan_memory
from dpo_core.training.ranks import MemoryRanOut, on_any_rank, rank, together
from dpo_core.training.weights import Weights, agree_on_weights, dtypes_of, shard

GlobalBatches = Sequence[Sequence[EncodedGroup]] | Callable[[int], Batches]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step, the same on all ranks (processes of the run): the number of the step, its
    metrics, the number of tokens trained on so far, a warning for the user (or None), and the run's evaluations so far.

    Metrics whose names begin with `eval/` measure the policy after the step; all other metrics measure the policy
    before it.
    """

    step: int  # from 1
    total_steps: int
    metrics: dict[str, float]
    num_tokens: int  # tokens trained on since step 1; a group's prompt counts once
    warning: str | None  # a sentence for the user
    evaluations: tuple[Evaluation, ...] = ()  # the run's values of best_metric so far


def train(
    config: TrainConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    global_batches: GlobalBatches,
    *,
    total_steps: int,
    checkpoint_dir: Path | str,
    resume: Path | str | None = None,
    publish: Publish | None = None,
    validation: Callable[[], Batches | None] | None = None,
    stop: Callable[[], bool] | None = None,
    load_ids: LoadIds | None = None,
) -> Iterator[StepResult]:
    """Trains `policy` in place and yields the result of each step. Trains all weights, or only the adapter if the
    policy has one; dropout outside the adapter is off.

    `config` must have no undecided options; `TrainConfig.resolved` decides them. `global_batches` is a list with one
    batch for each step of the run, or a function that takes a step number and returns the batches of all later steps.
    The function is called with 0 or, if the run continues from the checkpoint `resume`, with the step of this
    checkpoint. Every rank (process of the run) must be given the same batches, and computes its share of them. The loss
    is a mean over the groups (prompts with their completions) of a batch. A list is refused unless it has `total_steps`
    batches, each with `batch_size` groups or fewer. The batches of a function are not checked. A group longer than
    `max_length` is refused. A `max_length` beyond the model's positions is refused, too. The options `n_epochs`,
    `truncation` and `seed` record how the batches were made. Only `seed` has an effect on training: it decides an
    adapter's dropout.

    The groups of the batches and of the held-out data may be outlines (groups without their token ids). In this case
    `load_ids` must be given: a function that returns, for a list of outlines, the groups with their ids. A rank loads
    only the groups that it computes, in other threads, while it computes earlier steps.

    If a checkpoint is due at a step, the call for the next result starts to write it to `checkpoint_dir/step-000012`
    while training continues. When the checkpoint is written, `publish` is called with the step and the folder. All
    checkpoints are written when the iterator ends. A step whose loss or gradient is NaN or infinite changes no weight;
    its result is yielded without a checkpoint, and then FloatingPointError ends the run. A step without groups changes
    no weight and has no metrics; its checkpoint has the metrics of the previous step.

    `validation` is a function that returns held-out groups in batches of any size. The trainer calls `validation`
    whenever a checkpoint is due, and adds the policy's metrics on these groups, such as `eval/loss`, to the metrics of
    the step. Held-out groups do not change the weights. If `validation` returns None, the step has no evaluation. With
    `early_stop` the iterator ends once evaluations stop improving.

    The function `stop` is called before every step on every rank. Once `stop` returns true on one rank, all ranks save
    a checkpoint of the last step, unless that step already has one, and the iterator ends.
    """
    every = config.checkpoint_steps
    if every is None or None in (config.optim.learning_rate, config.batch_size, config.n_epochs):
        raise ValueError("The config still has undecided options; pass config.resolved(number of groups) to train.")
    _check_batches(config, global_batches, total_steps)
    with ExitStack() as undo:
        run = _Run(config, policy, global_batches, total_steps, Path(resume) if resume else None, undo, load_ids)
        writer = undo.enter_context(Writer(Path(checkpoint_dir), policy, tokenizer, run.weights, publish))
        drift, change = Drift(), run.change
        is_due, metrics = True, dict[str, float]()  # true, because before the first step there is nothing to save
        for step in range(run.step + 1, total_steps + 1):
            if stalls(run.evaluations, config.best_metric, config.early_stop):
                return
            if stop is not None and any(on_any_rank([stop()], run.scorer.model.device)):
                if not is_due:
                    writer.save(run.manifest(metrics), run.optimizer, run.effect())
                return
            groups = next(run.batches, None)
            if groups is None:
                raise ValueError(
                    f"The data ended before step {step} of {total_steps}; "
                    "lower total_steps, or give a batch for every step."
                )
            metrics = run.take_step(groups)
            writer.check()
            warning = None
            if groups:
                warning = " ".join(filter(None, [change, run.shortage, drift.warning(metrics)])) or None
                change = None
            if warning and rank() == 0:
                logger.warning("Step %d: %s", step, warning)
            is_due = step % every == 0 or step == total_steps
            held_out = validation() if validation and is_due and not _not_finite(metrics) else None
            if held_out is not None:
                metrics |= run.evaluate(held_out)
            yield StepResult(step, total_steps, metrics if groups else {}, run.num_tokens, warning, run.evaluations)
            if values := _not_finite(metrics):
                raise FloatingPointError(f"Training diverged at step {step} ({values}); {run.remedy}.")
            if is_due:
                writer.save(run.manifest(metrics), run.optimizer, run.effect())


def _check_batches(config: TrainConfig, batches: GlobalBatches, total_steps: int) -> None:
    """Checks the batches that `train` was given. Raises TypeError if `batches` is neither a function nor a list. Raises
    ValueError for a list that does not fit the run: a list must have `total_steps` batches, each with at most
    `batch_size` groups (prompts with their completions). The batches of a function are not checked."""
    if callable(batches):
        return
    if not hasattr(batches, "__getitem__"):  # an iterator cannot start at the step of a checkpoint
        what = f"global_batches is a {type(batches).__name__}; give a list with one batch for each step"
        function = "a function that takes a step number and returns the batches of all later steps"
        raise TypeError(f"{what}, or {function}.")
    if len(batches) != total_steps:
        raise ValueError(
            f"global_batches has {len(batches)} batches, but total_steps is {total_steps}; give one for each step."
        )
    assert config.batch_size is not None  # resolved
    for step, groups in enumerate(batches, 1):
        if len(groups) > config.batch_size:
            what = f"The batch of step {step} has {len(groups)} groups, but batch_size is {config.batch_size}"
            raise ValueError(f"{what}; give smaller batches, or raise batch_size.")


def _after(step: int, batches: GlobalBatches) -> Iterator[Sequence[EncodedGroup]]:
    return iter(batches(step) if callable(batches) else batches[step:])


class _Run:
    """The state of a training run: the policy, the optimizer, and the counters that change with each step.

    The callbacks in `undo` restore the policy at the end of the run: they revert all changes to the policy except the
    trained weights.
    """

    def __init__(
        self,
        config: TrainConfig,
        policy: PreTrainedModel,
        global_batches: GlobalBatches,
        total_steps: int,
        resume: Path | None,
        undo: ExitStack,
        load_ids: LoadIds | None,
    ) -> None:
        check_policy(policy)
        check_model(policy, config.objective)
        if resume is None:  # a run that began under an earlier rule goes on; no row exceeds the positions
            check_max_length(config.max_length, last_position(policy))
        policy.train(False)
        device = device_of(policy)
        manifest, self.precision, dtypes = None, precision_of(policy), dtypes_of(policy)
        if resume is not None:
            check = partial(resumable, resume, config=config, total_steps=total_steps, precision=self.precision)
            manifest, config = together(check, device)
        batches = _after(manifest.step if manifest else 0, global_batches)
        first = list(islice(batches, 1))  # the groups on which `plan_memory` measures memory
        agree_on_weights(policy)
        self.scorer = Scorer(policy, balances=True)
        self.matmul_rate = matmul_rate(policy.dtype, device)
        shard(self.scorer, config.sharding)
        saved = resume / "model" if resume and is_unread(policy) and not has_adapter(policy) else None
        if is_unread(policy):
            adapter = together(partial(read_parts, policy, saved), device)
            agree_on_weights(policy)
            if adapter is not None:
                check_base(adapter, policy)
        self.base = fingerprint(policy) if has_adapter(policy) else None
        if manifest and self.base and manifest.base not in (None, self.base):
            what = f"The adapter in {resume} was trained on a base whose weights differ from those of"
            raise ValueError(f"{what} {policy.name_or_path}; load the policy from the adapter's own base.")
        self.config, self._undo = plan_memory(config, self.scorer, first[0] if first else ()), undo
        assert self.config.max_tokens_per_pack is not None  # `plan_memory` has set it
        self.pack_size = self.config.max_tokens_per_pack
        self._load_ids = load_ids and self._admitting(load_ids)
        self.batches = undo.enter_context(closing(self._ahead(chain(first, batches))))
        if self.recomputes:
            undo.callback(checkpoint_activations(self.scorer))
        self.flops = Flops(policy, recomputed=self.recomputes)
        self.weights = Weights(policy, dtypes)
        undo.callback(self.weights.release)
        self.optimizer = make_optimizer(self.weights.stepped.values(), config.optim)
        self.total_steps, self.step, self.num_tokens, self.statistics = total_steps, 0, 0, Statistics()
        self.shortage: str | None = None  # a sentence for the user if memory ran out in the last step
        self.change: str | None = None  # a sentence for the user if a resumed run goes on with another loss
        self.learned: Sequence[EncodedGroup] = ()  # the groups of the last step that had any
        self.num_updates, self.metrics, self.evaluations = 0, dict[str, float](), tuple[Evaluation, ...]()
        if resume is not None and manifest is not None:
            load(
                resume,
                manifest,
                policy=policy,
                weights=self.weights,
                optimizer=self.optimizer,
                has_weights=saved is not None,
            )
            self.step, self.num_tokens = manifest.step, manifest.num_tokens
            trained = {key: value for key, value in manifest.metrics.items() if not key.startswith("eval/")}
            self.num_updates, self.metrics = manifest.num_updates, trained
            self.evaluations = manifest.evaluations
            self.statistics = Statistics(**manifest.statistics)
            self.change = self._change_of_balance() if trained else None

    def _change_of_balance(self) -> str | None:
        """Returns a sentence for the user if a resumed run changes whether training balances experts: the run balances
        them, but the run that wrote the checkpoint did not, or the reverse. Returns None if nothing changes. Releases
        that are older than the balancing loss balanced no experts."""
        experts, before = self.scorer.experts, BALANCE in self.metrics
        if before == (experts is not None):
            return None
        coefficient = f"trained with coefficient {experts.coefficient:g}" if experts else "no longer trained"
        what = f"was {'' if before else 'not '}trained up to step {self.step}, and is {coefficient} from here on"
        end = "loss and eval/loss never contain the balancing loss, so they can be compared with those of earlier steps"
        return f"The balance of the model's experts {what}; {end}."

    def take_step(self, groups: Sequence[EncodedGroup]) -> dict[str, float]:
        """Takes one optimizer step on the global batch `groups` (prompts with their completions), and returns the
        metrics of the step. If `groups` is empty, changes no weight and returns the metrics of the previous step."""
        started, self.shortage = time.perf_counter(), None
        self.step += 1
        if not groups:
            return dict(self.metrics)
        self.num_updates, self.learned = self.num_updates + 1, groups
        objective, optim, scorer = self.config.objective, self.config.optim, self.scorer
        check_groups(objective, self._admitted(groups))
        check_agreement(groups, f"global batches for step {self.step}", scorer.model.device)
        packs, measures, loss = self._backward(groups)
        grad_norm = self.weights.collect_gradients(optim.max_grad_norm)
        balance = balance_metrics(scorer.experts, measures)
        scalars = {"loss": loss, **compute_metrics(objective, measures), **balance, "grad_norm": grad_norm}
        metrics = dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))
        rate = learning_rate(optim, self.step, self.total_steps)
        if not _not_finite(metrics):
            for parameters in self.optimizer.param_groups:
                parameters["lr"] = rate
            self.optimizer.step()
            self.weights.update_policy()
        seconds = time.perf_counter() - started
        tokens = sum(group.num_tokens for group in groups)
        self.num_tokens += tokens
        self.metrics = metrics | {
            "lr": rate,
            "tokens_per_second": tokens / seconds,
            "hfu": sum(self.flops.count(pack.batch) for pack in packs) / seconds / self.matmul_rate,
            "tokens/computed": sum(map(scorer.count_tokens, groups)),
            "tokens/shared": sum(scorer.count_shared_tokens(group) for group in groups),
        }
        return dict(self.metrics)

    def _backward(self, groups: Sequence[EncodedGroup]) -> tuple[list[Pack], Measures, Tensor]:
        """Computes the gradients of the loss for one optimizer step. A pack holds the groups (prompts with their
        completions) that go through one forward pass together. Returns three values:

        - the packs that this rank (process of the run) computes
        - the measures (log-probabilities or rewards) of all completions of all ranks
        - the loss

        If memory runs out, computes the gradients again with packs of half the size. If packs cannot be smaller, the
        backward pass recomputes activations. Later steps keep the smaller packs and the recomputation. Neither changes
        the results.
        """
        statistics, seed = vars(self.statistics).copy(), self.config.seed * 2**32 + self.step
        while True:
            packs = make_packs(
                self.scorer, groups, max_tokens_per_pack=self.pack_size, seed=seed, load_ids=self._load_ids
            )
            try:
                return packs, *backward(self.config.objective, self.scorer, groups, packs, self.statistics)
            except MemoryRanOut:
                self.weights.drop_gradients()
                vars(self.statistics).update(statistics)
                self._take_less(groups)
            if self.scorer.model.device.type == "cuda":
                torch.cuda.empty_cache()  # what is left in pieces would not hold larger tensors

    def _take_less(self, groups: Sequence[EncodedGroup]) -> None:
        """Makes training need less memory: halves the packs. If each pack has only one group, makes the backward pass
        recompute activations instead. Raises MemoryRanOut if activations are recomputed already.

        A pack holds the groups (prompts with their completions) that go through one forward pass together.
        """
        smaller = smaller_packs(self.scorer, groups, self.pack_size)
        if smaller is not None:
            self.pack_size = smaller
            now = f"a forward pass has at most {smaller} tokens"
        elif not self.recomputes:
            self.config = replace(self.config, activation_checkpointing="on")
            self._undo.callback(checkpoint_activations(self.scorer))
            self.flops = Flops(self.scorer.model, recomputed=True)
            smaller_too = f"a forward pass has at most {self.pack_size} tokens and " if self.shortage else ""
            now = f"{smaller_too}activations are computed again in the backward pass"
        else:
            what = f"Memory ran out in step {self.step} with one row in a forward pass and activations computed again"
            raise MemoryRanOut(f"{what}; lower max_length or choose bfloat16.")
        self.shortage = f"Memory ran out in step {self.step}; from here on {now}, which changes no result."

    @property
    def recomputes(self) -> bool:
        return self.config.activation_checkpointing == "on"

    @property
    def remedy(self) -> str:
        """Advice for the user of a training run that ends because its loss or gradient is NaN or infinite."""
        if self.num_updates > 1:
            return "lower the learning rate"
        return "no weight was changed yet, so look for NaN or infinity in the policy and in the reference's scores"

    def evaluate(self, batches: Batches) -> dict[str, float]:
        """Returns the policy's metrics on the held-out groups (prompts with their completions) in `batches`. Also
        appends the value of `best_metric` to the run's evaluations."""
        with closing(self._ahead(batches)) as loaded:
            found = evaluate(
                self.config.objective,
                self.scorer,
                map(self._admitted, loaded),
                self.statistics,
                max_tokens_per_pack=self.pack_size,
                load_ids=self._load_ids,
            )
        self.evaluations += evaluations([(self.step, found)], self.config.best_metric)
        return found

    def _ahead(self, batches: Batches) -> Generator[Sequence[EncodedGroup]]:
        """Yields the batches. In each batch, the groups (prompts with their completions) that this rank (process of the
        run) computes have their token ids."""

        def own(groups: Sequence[EncodedGroup]) -> list[int]:
            return own_groups(self.scorer, groups, max_tokens_per_pack=self.pack_size)

        yield from batches if self._load_ids is None else load_ahead(batches, self._load_ids, own)

    def _admitting(self, load_ids: LoadIds) -> LoadIds:
        """Returns a function that loads the token ids of groups (prompts with their completions) as `load_ids` does,
        and raises ValueError if one of the loaded groups cannot be used for training."""
        return lambda outlines: self._admitted(load_ids(outlines))

    def _admitted(self, groups: Sequence[EncodedGroup]) -> Sequence[EncodedGroup]:
        admit(groups, self.scorer.model, max_length=self.config.max_length)
        return groups

    def effect(self) -> dict[str, bytes]:
        """Returns a dictionary with one file: its name, and its contents as bytes. The file says by how much the
        policy's adapter changes the log-probabilities of some training rows.

        Returns an empty dictionary if the policy has no adapter or is a reward model, if this run has not trained on
        any rows, or if another rank (process of the run) measures the change. In a sharded policy all ranks measure
        together; otherwise one rank does.
        """
        if not self.learned or not has_adapter(self.scorer.model) or self.scorer.rewards:
            return {}
        if rank() > 0 and not is_sharded(self.scorer.model):
            return {}
        groups = self.learned
        if self._load_ids:
            groups = load_groups(groups, measured_groups(groups), self._load_ids)
        measured = measure_effect(self.scorer, groups, max_tokens_per_pack=self.pack_size)
        return {EFFECT: measured.to_json()}

    def manifest(self, metrics: dict[str, float]) -> Manifest:
        return Manifest(
            step=self.step,
            total_steps=self.total_steps,
            num_updates=self.num_updates,
            num_tokens=self.num_tokens,
            metrics=metrics,
            statistics=vars(self.statistics).copy(),
            config=asdict(replace(self.config, max_tokens_per_pack=max(self.pack_size, self.config.max_length))),
            files={},
            dtype=self.precision,
            base=self.base,
            evaluations=self.evaluations,
        )


def _not_finite(metrics: dict[str, float]) -> str:
    """Returns a text that names those metrics of a step that are NaN or infinite, such as "loss nan, grad_norm inf".
    Looks only at the loss, the gradient norm and the evaluation's loss in `metrics`. The text is empty if all three are
    finite."""
    values = {key: metrics.get(key, 0.0) for key in ("loss", "grad_norm", "eval/loss")}
    return ", ".join(f"{key} {value}" for key, value in values.items() if not math.isfinite(value))
