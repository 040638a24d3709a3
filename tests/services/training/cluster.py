"""Runs a Ray cluster with one deployment until standard input ends: `cluster.py <temp folder> <model>`.

The deployment returns scores as a replica of services.serving does, but computes them with transformers, and can attach
no adapter.
"""

import math
import os
import sys

import ray
import torch
from ray import serve
from transformers import AutoModelForCausalLM

from services import forkserver
from services.contract import Adapter, CannotAttach, Score
from services.forkserver.start_ray import start_workers_as_forks


@serve.deployment(name="policy", ray_actor_options={"num_cpus": 1})
class Reference:
    def __init__(self, model_source: str) -> None:
        torch.set_num_threads(1)
        self.model = AutoModelForCausalLM.from_pretrained(model_source, dtype=torch.float32).eval()

    def score(self, prompt_ids: list[list[int]], completion_ids: list[list[int]]) -> list[Score]:
        return [Score(math.fsum(row), len(row)) for row in self.token_logps(prompt_ids, completion_ids)]

    @torch.inference_mode()
    def token_logps(
        self, prompt_ids: list[list[int]], completion_ids: list[list[int]], adapter: Adapter | None = None
    ) -> list[list[float]]:
        if adapter:
            raise CannotAttach(f"The engine cannot attach the adapter '{adapter.id}'.")
        return [self._logps(*row) for row in zip(prompt_ids, completion_ids, strict=True)]

    def _logps(self, prompt: list[int], completion: list[int]) -> list[float]:
        logits = self.model(input_ids=torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


if __name__ == "__main__":
    temp_folder, model_source = sys.argv[1:]
    start_workers_as_forks(os.environ[forkserver.VARIABLE])
    context = ray.init(
        num_cpus=6,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        _temp_dir=temp_folder,
    )
    serve.start(proxy_location="Disabled")
    serve.run(Reference.bind(model_source), name="tiny", route_prefix=None)
    sys.stdout.write(f"address {context.address_info['gcs_address']}\n")
    sys.stdout.flush()
    sys.stdin.read()
    ray.shutdown()
