"""The loop: `train` yields one StepResult per optimizer step."""

import math
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dpo_core.checkpoint import restore, save_checkpoint
from dpo_core.config import TrainConfig
from dpo_core.encode import EncodedGroup
from dpo_core.metrics import MEASURES
from dpo_core.model import Scorer
from dpo_core.objectives import OBJECTIVES, check_groups
from dpo_core.optim import Gradients, learning_rate, make_optimizer


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
    done, num_tokens = 0, 0
    if resume is not None:
        manifest = restore(resume, policy=policy, optimizer=optimizer, config=config, total_steps=total_steps)
        done, num_tokens = manifest.step, manifest.num_tokens
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
        sums = _accumulate(config, scorer, groups)
        _add_up_over_ranks(gradients.flat, sums)
        grad_norm = gradients.clip(config.optim.max_grad_norm)
        rate = learning_rate(config.optim, step, total_steps)
        for parameters in optimizer.param_groups:
            parameters["lr"] = rate
        optimizer.step()
        metrics = _read_metrics(config, groups, step, sums, grad_norm)
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
                )
            if dist.is_initialized():
                dist.barrier()
        yield StepResult(step, total_steps, metrics, checkpoint, num_tokens)
        if diverged:
            found = f"loss {metrics['loss']}, gradient norm {metrics['grad_norm']}"
            raise FloatingPointError(f"Training diverged at step {step} ({found}); lower the learning rate.")


def _accumulate(config: TrainConfig, scorer: Scorer, groups: Sequence[EncodedGroup]) -> Tensor:
    """Forward and backward of this rank's packs. Returns its sums: fingerprint, losses, then each metric."""
    objective = config.objective
    losses_of, (keys, measure) = OBJECTIVES[objective.type].losses, MEASURES[objective.type]
    num_units = _count_units(config, groups)
    sums = torch.zeros(2 + len(keys), device=scorer.model.device)
    ranks = scorer.plan(groups, num_ranks=_num_ranks(), max_tokens_per_pack=config.max_tokens_per_pack)
    for pack in ranks[_rank()]:
        if not pack:
            continue  # other ranks have more; nothing collective happens inside a pack
        batch = scorer.collate([groups[i] for i in pack])
        token_logps, correct = scorer.token_logps(batch)
        losses = losses_of(objective, batch, token_logps)
        (losses.sum() / num_units).backward()  # type: ignore[no-untyped-call]
        measured = measure(objective, batch, token_logps.detach(), correct)
        sums[1:] += torch.cat([losses.detach().sum()[None], measured])
    sums[0] = _fingerprint(groups)
    return sums


def _read_metrics(
    config: TrainConfig, groups: Sequence[EncodedGroup], step: int, sums: Tensor, grad_norm: Tensor
) -> dict[str, float]:
    """Sums become means over the global batch. The step's only wait for the device."""
    fingerprints, *values, norm = torch.cat([sums, grad_norm[None]]).tolist()
    if fingerprints != _num_ranks() * _fingerprint(groups):
        raise RuntimeError(f"Ranks were given different global batches for step {step}; give each the same groups.")
    num_units = _count_units(config, groups)
    means = zip(("loss", *MEASURES[config.objective.type][0]), (value / num_units for value in values), strict=True)
    return {**dict(means), "grad_norm": norm}


def _fingerprint(groups: Sequence[EncodedGroup]) -> int:
    """Of a global batch; so small that float32 adds it up exactly over 256 ranks."""
    return zlib.crc32(repr([(group.line, group.num_tokens) for group in groups]).encode()) % 2**16


def _count_units(config: TrainConfig, groups: Sequence[EncodedGroup]) -> int:
    return OBJECTIVES[config.objective.type].count_units(groups)


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
