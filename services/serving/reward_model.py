"""Runs a reward model (a language model whose head returns numbers instead of text) in plain torch.

vLLM would need a separate engine for a reward model and would bring no speed, because a reward model generates no text
and keeps no cache. The trainer's own scorer computes each prompt once for all its completions, reads every kind of
model that can be trained, and gives the same numbers as the trainer.
"""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from fastapi import FastAPI
from transformers import AutoConfig

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.model import load_reward_model
from dpo_core.plan.positions import positions_in
from dpo_core.policy.scorer import Scorer
from services.contract import Deployment
from services.serving.cores import num_threads
from services.serving.scoring import Scoring

MAX_TOKENS_PER_PACK = 4096  # of one forward pass, unless one completion and its prompt are longer


def start(deployment: Deployment, folder: str) -> FastAPI:
    """Loads the reward model from the local folder `folder`, and returns its HTTP server. `deployment` says how the
    model is served."""
    torch.set_num_threads(num_threads())
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    own = config.dtype or torch.float32
    model = load_reward_model(
        folder,
        num_outputs=deployment.num_outputs,
        dtype=own if deployment.dtype == "auto" else getattr(torch, deployment.dtype),
        device="cuda" if torch.cuda.is_available() else "cpu",  # Ray hides GPUs that the replica does not reserve
    )
    app = FastAPI(openapi_url=None)
    positions = positions_in(config) or 2**31
    rewards = Rewards(Scorer(model), deployment.num_outputs)
    Scoring(deployment.source, min(positions, deployment.max_model_len or positions), rewards.score).add_to(app)
    return app


class Rewards:
    """Computes the outputs of a reward model for completions.

    Several requests may call the method `score` at the same time, but only one forward pass runs at a time.
    """

    def __init__(self, scorer: Scorer, num_outputs: int) -> None:
        self._scorer, self._num_outputs = scorer, num_outputs
        self._computing = asyncio.Lock()

    async def score(self, groups: Sequence[EncodedGroup]) -> list[list[list[float]]]:
        """Returns the outputs of the reward model's head. `[group][completion]` of the result is the list of outputs
        for this completion; a group is a prompt with its completions."""
        parts = [(i, part) for i, group in enumerate(groups) for part in self._parts(group)]
        outputs_by_part: list[list[list[float]]] = [[] for _ in parts]
        packs = self._scorer.plan([part for _, part in parts], num_ranks=1, max_tokens_per_pack=MAX_TOKENS_PER_PACK)[0]
        for pack in packs:
            async with self._computing:  # other requests compute between the packs of this one
                rows = iter(await asyncio.to_thread(self._measure, [parts[i][1] for i in pack]))
            for i in pack:
                outputs_by_part[i] = [next(rows) for _ in parts[i][1].completion_ids]
        outputs: list[list[list[float]]] = [[] for _ in groups]
        for (i, _), part_outputs in zip(parts, outputs_by_part, strict=True):
            outputs[i] += part_outputs
        return outputs

    def _parts(self, group: EncodedGroup) -> Iterator[EncodedGroup]:
        """Splits a group (a prompt and its completions) into smaller groups with the same prompt, in the order of the
        completions.

        Each smaller group fits into one forward pass of MAX_TOKENS_PER_PACK tokens, or has only one completion.
        """
        ids = list(group.completion_ids)
        while ids:
            count = len(ids)
            while count > 1 and self._scorer.count_tokens(_with(group, ids[:count])) > MAX_TOKENS_PER_PACK:
                count //= 2
            yield _with(group, ids[:count])
            del ids[:count]

    @torch.no_grad()
    def _measure(self, groups: Sequence[EncodedGroup]) -> list[list[float]]:
        outputs: list[list[float]] = self._scorer(self._scorer.collate(groups))[:, : self._num_outputs].tolist()
        return outputs


def _with(group: EncodedGroup, completion_ids: Sequence[Sequence[int]]) -> EncodedGroup:
    return replace(group, completion_ids=tuple(completion_ids), others=None, ratings=None)
