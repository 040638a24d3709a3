"""Tests a deployment's settings with vLLM's own code, which turns them into the configuration of an engine."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from services.contract import Deployment
from services.deployment_settings import EngineSettings, Quantization, ReasoningParser, ToolCallParser
from services.serving.engine_args import MOST_SCORED_TOKENS, engine_args

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # in vLLM's own imports
FRONTEND = {"enable_auto_tool_choice", "tool_call_parser"}  # arguments of the HTTP server


def args_of(engine: dict[str, Any] | None = None, *, on_cpus: bool = True, **fields: Any) -> dict[str, Any]:
    given = {"app_name": "a", "model_id": "m", "source": "/m", "dtype": "float32"} | fields
    return engine_args(Deployment(**given, engine=EngineSettings(**engine or {})), on_cpus=on_cpus)


def config(folder: Path, args: dict[str, Any]) -> Any:
    from vllm.engine.arg_utils import AsyncEngineArgs

    of_engine = {name: value for name, value in args.items() if name not in FRONTEND}
    return AsyncEngineArgs(model=str(folder), **of_engine).create_engine_config()


@pytest.mark.slow
def test_an_engine_is_configured_as_its_deployment_says(model_folder: Path) -> None:
    settings = {"prefix_caching": False, "reasoning_parser": "qwen3", "quantization": "fp8_per_channel"}
    made = config(model_folder, args_of(settings, dtype="bfloat16", max_model_len=64))
    assert made.model_config.dtype == torch.bfloat16
    assert made.model_config.max_model_len == 64
    assert made.model_config.quantization == "fp8_per_channel"
    assert not made.cache_config.enable_prefix_caching
    assert made.structured_outputs_config.reasoning_parser == "qwen3"

    usual = config(model_folder, args_of())
    assert usual.model_config.dtype == torch.float32
    assert usual.cache_config.enable_prefix_caching
    assert usual.model_config.quantization is None


@pytest.mark.slow
@pytest.mark.parametrize(("num_gpus", "workers", "share"), [(2, 2, 0.5), (0.5, 1, 0.25)])
def test_gpus_are_divided_by_tensor_parallelism_or_shared(
    model_folder: Path, num_gpus: float, workers: int, share: float
) -> None:
    made = config(model_folder, args_of({"gpu_memory_utilization": 0.5}, on_cpus=False, num_gpus=num_gpus))
    assert made.parallel_config.tensor_parallel_size == workers
    assert made.cache_config.gpu_memory_utilization == share


def test_only_an_engine_that_scores_alone_has_small_batches_and_keeps_no_prefixes() -> None:
    answers, scores, both = (args_of(purpose=purpose) for purpose in ("answers", "scores", "both"))
    assert scores["max_num_batched_tokens"] == MOST_SCORED_TOKENS
    assert not scores["enable_prefix_caching"]
    assert answers == both
    assert "max_num_batched_tokens" not in answers
    assert answers["enable_prefix_caching"]
    assert args_of(on_cpus=False, num_gpus=1)["gpu_memory_utilization"] == 0.85


def test_tool_calls_are_read_by_the_parser_that_is_named() -> None:
    args = args_of({"tool_call_parser": "hermes"})
    assert (args["tool_call_parser"], args["enable_auto_tool_choice"]) == ("hermes", True)
    assert not FRONTEND & args_of().keys()


@pytest.mark.slow
def test_the_names_are_those_that_vllm_knows() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.reasoning import ReasoningParserManager
    from vllm.tool_parsers import ToolParserManager

    assert set(get_args(ToolCallParser)) == set(ToolParserManager.list_registered())
    assert set(get_args(ReasoningParser)) == set(ReasoningParserManager.list_registered())
    assert set(get_args(Quantization)) <= set(QUANTIZATION_METHODS)
