"""Asks models for answers, choices and rewards, on behalf of an evaluation."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_core.data.groups import Group
from dpo_core.data.messages import Text
from services.contract import storable
from services.control_plane.core.errors import ApiError
from services.control_plane.evaluations.requests import Sampling
from services.control_plane.evaluations.rows import said
from services.control_plane.inference.inference import Inference
from services.control_plane.inference.metering import Meter
from services.control_plane.models.models import NamedModel
from services.control_plane.rewards.judges import Judge
from services.control_plane.rewards.preferences import Judged
from services.control_plane.rewards.scoring import Scoring


@dataclass(frozen=True)
class Models:
    """Asks models through the service's own gateway. `meter_of` returns, for a model's id, the meter that counts the
    tokens."""

    inference: Inference
    scoring: Scoring
    meter_of: Callable[[str], Meter]

    async def answer(self, model: NamedModel, group: Group, sampling: Sampling, number: int) -> dict[str, Any]:
        """Returns the model's answer to the group's prompt, as a JSON object: `text`, `num_tokens`, and whether it
        `is_finished`.

        `number` is that of the item, which makes the seed its own.
        """
        options = {**sampling.model_dump(), "seed": (sampling.seed + number) % 2**31}
        choice, usage = await self._complete(model, group, options)
        text = choice["text"] if "text" in choice else said(choice["message"])
        return {
            "text": storable(text),
            "num_tokens": usage["completion_tokens"],
            "is_finished": choice["finish_reason"] != "length",
        }

    async def choose(self, model: NamedModel, question: str, choices: tuple[str, ...]) -> str:
        """Returns which of the choices the model gives as its answer to the question, at temperature 0. The model's
        engine allows no other answer."""
        group = Group([{"role": "user", "content": question}], (), 1)
        options = {"max_tokens": 16, "temperature": 0, "structured_outputs": {"choice": choices}}
        choice, _ = await self._complete(model, group, options)
        text = str(choice["message"]["content"] or "").strip()
        if text not in choices:
            raise ApiError(f"The judge '{model.id}' answered {text!r:.80}, which is no choice.", code="model_error")
        return text

    async def rewards(self, judge: Judge, group: Group) -> list[Judged]:
        """Returns the rewards of the group's completions."""
        return (await self.scoring.judge(judge, [group], self.meter_of)).groups[0]

    async def _complete(self, model: NamedModel, group: Group, options: dict[str, Any]) -> tuple[Any, Any]:
        """Returns the model's first choice, and the count of tokens. A text is completed as it is; messages are
        answered."""
        asked = {"model": model.id, **options}
        if isinstance(group.prompt, str):
            path, asked["prompt"] = "completions", group.prompt
        else:
            path, asked["messages"] = "chat/completions", group.prompt
            more = {"tools": group.tools, "chat_template_kwargs": group.template_arguments}
            asked |= {name: value for name, value in more.items() if value}
        answer = await self.inference.ask(model, path, json.dumps(asked).encode(), self.meter_of(model.id))
        try:
            parsed = json.loads(answer)
            return parsed["choices"][0], parsed["usage"]
        except (ValueError, LookupError, TypeError):
            raise ApiError(f"The model '{model.id}' returned no answer that can be read.", code="model_error") from None


def completion_of(prompt: Text, text: str) -> Text:
    """Returns an answer as a completion in the form of its prompt."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
