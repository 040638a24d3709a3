"""The loop: `train` yields one StepResult per optimizer step."""

import math
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_core.checkpoint import restore, save_checkpoint
from dpo_core.config import TrainConfig
from dpo_core.encode import EncodedGroup
from dpo_core.metrics import measure
from dpo_core.model import Scorer
from dpo_core.objectives import Statistics, check_groups, count_units, losses
from dpo_core.optim import Gradients, learning_rate, make_optimizer
from dpo_core.scores import NUM_MEASURES, Scores


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, as seen over all ranks. Metrics are of the policy before the step."""

    step: int  # from 1
    total_steps: int
    metrics: dict[str, float]
    checkpoint: Path | None  # written after this step; on rank 0 only
    num_tokens: int  # trained on since step 1: every prompt once and its completions


def train(
    config: TrainConfig,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    global_batches: Iterable[Sequence[EncodedGroup]],
    *,
    total_steps: int,
    checkpoint_dir: Path,
    resume: Path | None = None,
) -> Iterator[StepResult]:
    """Train `policy` in place, with dropout off.

    `config` is resolved. Every rank is given the same global batches, the first being that of the
    step after `resume`'s, and computes its own share. Checkpoints are `checkpoint_dir/step-000012`.
    A step whose loss or gradient is no finite number is yielded without one, and then ends the run.
    """
    assert config.checkpoint_steps is not None  # resolved
    if policy.dtype != torch.float32:
        raise ValueError(f"The policy is {policy.dtype}, where small updates are lost; load it in torch.float32.")
    policy.train(False)
    optimizer = make_optimizer(policy, config.optim)
    done, num_tokens, statistics = 0, 0, Statistics()
    if resume is not None:
        manifest = restore(resume, policy=policy, optimizer=optimizer, config=config, total_steps=total_steps)
        done, num_tokens = manifest.step, manifest.num_tokens
        statistics = Statistics(**manifest.statistics)
    _agree_on_weights(policy)
    gradients = Gradients(policy)
    scorer = Scorer(policy)
    batches = iter(global_batches)
    for step in range(done + 1, total_steps + 1):
        groups = next(batches, ())
        if not groups:
            raise ValueError(f"No groups came for step {step} of {total_steps}; total_steps must fit the data.")
        check_groups(config.objective, groups)
        started = time.perf_counter()
        gradients.zero()
        _check_fingerprints(groups, step, policy.device)
        found, loss = _accumulate(config, scorer, groups, statistics)
        _add_up_over_ranks(gradients.flat)
        grad_norm = gradients.clip(config.optim.max_grad_norm)
        rate = learning_rate(config.optim, step, total_steps)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.step()
        scalars = {"loss": loss, **measure(config.objective, Scores(groups, found)), "grad_norm": grad_norm}
        metrics = dict(zip(scalars, torch.stack(list(scalars.values())).tolist(), strict=True))
        tokens = sum(group.num_tokens for group in groups)
        num_tokens += tokens
        metrics |= {"lr": rate, "tokens_per_second": tokens / (time.perf_counter() - started)}
        checkpoint = None
        diverged = not math.isfinite(metrics["loss"] + metrics["grad_norm"])
        if not diverged and (step % config.checkpoint_steps == 0 or step == total_steps):
            if _rank() == 0:
                checkpoint = checkpoint_dir / f"step-{step:06d}"
                save_checkpoint(
                    checkpoint,
                    policy=policy,
                    tokenizer=tokenizer,
                    optimizer=optimizer,
                    config=config,
                    step=step,
                    total_steps=total_steps,
                    num_tokens=num_tokens,
                    statistics=vars(statistics),
                )
            if dist.is_initialized():
                dist.barrier()
        yield StepResult(step, total_steps, metrics, checkpoint, num_tokens)
        if diverged:
            values = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
            raise FloatingPointError(f"Training diverged at step {step} ({values}); lower the learning rate.")


def _accumulate(
    config: TrainConfig, scorer: Scorer, groups: Sequence[EncodedGroup], statistics: Statistics
) -> tuple[Tensor, Tensor]:
    """Forward and backward of this rank's packs: what the policy says of all completions, and the loss."""
    ranks = scorer.plan(groups, num_ranks=_num_ranks(), max_tokens_per_pack=config.max_tokens_per_pack)
    packs = [pack for pack in ranks[_rank()] if pack]  # other ranks have more; nothing inside a pack is collective
    starts = [0, *accumulate(len(group.completion_ids) for group in groups)]
    found = torch.zeros(starts[-1], NUM_MEASURES, device=scorer.model.device)

    def places(pack: list[int]) -> list[int]:
        return [place for i in pack for place in range(starts[i], starts[i + 1])]

    if not config.objective.traits.needs_whole_batch:
        for pack in packs:
            own = [groups[i] for i in pack]
            measured = scorer.measure(scorer.collate(own))
            found[places(pack)] = measured.detach()
            _loss(config, Scores(own, measured), groups, statistics).backward()  # type: ignore[no-untyped-call]
        _add_up_over_ranks(found)
        return found, _loss(config, Scores(groups, found), groups, statistics)
    # The loss joins completions of all ranks: find all, then give each pack its part of the gradient.
    kept = {}
    with torch.set_grad_enabled(len(ranks[0]) == 1):  # one pack is not computed again
        for number, pack in enumerate(packs):
            kept[number] = scorer.measure(scorer.collate([groups[i] for i in pack]))
            found[places(pack)] = kept[number].detach()
    _add_up_over_ranks(found)
    leaf = found.clone().requires_grad_()
    loss = _loss(config, Scores(groups, leaf), groups, statistics)
    (slope,) = torch.autograd.grad(loss, leaf)
    for number, pack in enumerate(packs):
        measured = kept[number] if len(ranks[0]) == 1 else scorer.measure(scorer.collate([groups[i] for i in pack]))
        measured.backward(slope[places(pack)])  # type: ignore[no-untyped-call]
    return found, loss.detach()


def _loss(config: TrainConfig, scores: Scores, global_batch: Sequence[EncodedGroup], statistics: Statistics) -> Tensor:
    """The share of these groups in the loss of the global batch."""
    weights = torch.tensor([group.weight for group in scores.groups]).to(scores.found.device)
    return (losses(config.objective, scores, statistics) * weights).sum() / count_units(config.objective, global_batch)


def _check_fingerprints(groups: Sequence[EncodedGroup], step: int, device: torch.device) -> None:
    if dist.is_initialized():
        own = torch.tensor([_fingerprint(groups), -_fingerprint(groups)], device=device)
        dist.all_reduce(own, dist.ReduceOp.MAX)
        if own.sum().item():
            raise RuntimeError(f"Ranks were given different global batches for step {step}; give each the same groups.")


def _fingerprint(groups: Sequence[EncodedGroup]) -> int:
    return zlib.crc32(repr([(group.line, group.num_tokens) for group in groups]).encode())


def _agree_on_weights(policy: PreTrainedModel) -> None:
    """All ranks start from rank 0's weights."""
    if dist.is_initialized():
        for parameter in policy.parameters():
            dist.broadcast(parameter.data, 0)


def _add_up_over_ranks(*tensors: Tensor) -> None:
    """Losses are divided by the global batch's counts already, so gradients need no mean."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _num_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
