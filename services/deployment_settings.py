"""Defines the settings of a model's deployment: how Ray Serve and vLLM serve it.

The settings file, the REST API and the cluster share these classes. None, or a field that is left out, means the
service's default.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

Dtype = Literal["float32", "bfloat16", "float16", "auto"]
# What vLLM can do to unquantized weights while it loads them. A checkpoint that is quantized needs no setting.
Quantization = Literal["fp8", "fp8_per_tensor", "fp8_per_channel", "fp8_per_block", "mxfp8"]
# The names that the installed vLLM knows; a test compares them.
# fmt: off
ToolCallParser = Literal[
    "apertus", "cohere_command3", "cohere_command4", "deepseek_v3", "deepseek_v31", "deepseek_v32", "deepseek_v4",
    "dots", "ernie45", "functiongemma", "gemma4", "gigachat3", "glm45", "glm47", "granite", "granite-20b-fc",
    "granite4", "hermes", "hunyuan_a13b", "hy_v3", "hy_v4", "inkling", "internlm", "jamba", "kimi_k2", "kimi_k3",
    "lfm2", "ling3", "llama3_json", "llama4_json", "llama4_pythonic", "longcat", "mimo", "minicpm5", "minimax_m2",
    "minimax_m3", "mistral", "muse_glimmer", "olmo3", "openai", "phi4_mini_json", "poolside_v1", "pythonic",
    "qwen3_coder", "qwen3_xml", "seed_oss", "step3", "step3p5", "xlam",
]
ReasoningParser = Literal[
    "cohere_command3", "cohere_command4", "deepseek_r1", "deepseek_v3", "deepseek_v4", "ernie45", "gemma4", "glm45",
    "glm47", "granite", "holo2", "hunyuan_a13b", "hy_v3", "hy_v4", "inkling", "kimi_k2", "kimi_k3", "ling3", "mimo",
    "minimax_m2", "minimax_m2_append_think", "minimax_m3", "mistral", "muse_glimmer", "nemotron_v3", "olmo3",
    "openai_gptoss", "poolside_v1", "qwen3", "seed_oss", "step3", "step3p5",
]
# fmt: on
LoraRank = Literal[0, 1, 8, 16, 32, 64, 128, 256, 320, 512]  # those that vLLM's kernels know, and 0

Mode = Literal["auto", "merged"]


class Replicas(BaseModel):
    """Sets how many replicas a model has. Ray Serve adapts the number to the load, between `min` and `max`, so that
    each replica has about `target_ongoing_requests` requests at a time."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    min: int = Field(default=1, ge=1, le=1000, description="Minimum number of replicas while the model is loaded.")
    max: int = Field(default=1, ge=1, le=1000, description="Maximum number of replicas.")
    target_ongoing_requests: float = Field(
        default=32,
        gt=0,
        le=1000,
        description="Number of requests that each replica has at a time. If each has more, Ray Serve adds replicas.",
    )

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.min > self.max:
            raise ValueError(
                f"replicas.min is {self.min}, which is more than replicas.max, {self.max}; lower min, or raise max"
            )
        return self


def _as_range(value: object) -> object:
    """Returns a single number n of replicas as the range from n to n, and any other value unchanged."""
    return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value


class EngineSettings(BaseModel):
    """Holds the settings of a deployment (how a model is served) that the model's replicas and vLLM engines need, such
    as the number of replicas and the limits for LoRA adapters."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    replicas: Annotated[Replicas, BeforeValidator(_as_range)] = Field(
        default=Replicas(),
        description="How many replicas (copies) of the model answer requests. Ray Serve adapts the number to the load.",
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="Share of each GPU's memory that the engine uses. Default: 0.85."
    )
    quantization: Quantization | None = Field(
        default=None,
        description="How vLLM quantizes the weights while it loads them, on GPUs. Default: it does not. A model whose "
        "files are quantized needs no setting.",
    )
    tool_call_parser: ToolCallParser | None = Field(
        default=None,
        description="vLLM's name of the parser that finds tool calls in the model's answers. Default: none.",
    )
    reasoning_parser: ReasoningParser | None = Field(
        default=None,
        description="vLLM's name of the parser that separates the model's reasoning from its answers. Default: none.",
    )
    prefix_caching: bool = Field(
        default=True, description="Whether the engine keeps what it has computed of prompts that begin alike."
    )
    max_lora_rank: LoraRank = Field(
        default=32, description="Largest rank of adapters that the engine attaches. With 0 it attaches none."
    )
    max_loras: int = Field(
        default=4,
        ge=1,
        le=1000,
        description="Maximum number of adapters in one step of the engine. Requests for further adapters wait. The "
        "engine reserves memory for as many adapters of the largest rank.",
    )
    max_cpu_loras: int = Field(
        default=64,
        ge=1,
        le=100_000,
        description="Maximum number of adapters that stay attached, in the CPU's memory. Those that were unused for "
        "longest leave first.",
    )


class DeploymentSettings(EngineSettings):
    """Holds all settings of a model's deployment: the settings of its engine, and those by which the control plane
    decides when and how to load the model, such as `pinned` and `idle_seconds`."""

    mode: Mode = Field(
        default="auto",
        description="How an adapter is served: `auto` attaches it to the engine of its base model if that is possible, "
        "`merged` merges it into its base model, in an engine of its own.",
    )
    pinned: bool = Field(
        default=False, description="Whether the model is loaded without a request, and never unloaded for others."
    )
    idle_seconds: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Seconds that the model stays loaded while nobody uses it. Default: the service's setting "
        "`model_idle_seconds`.",
    )
    dtype: Dtype | None = Field(
        default=None,
        description="Number type in which the model computes; `auto` takes that of the model's files. Default: the "
        "service's setting `dtype`; without it, `bfloat16` on GPUs and `float32` on CPUs.",
    )
    num_gpus: Annotated[float, Field(ge=0, le=1024)] | None = Field(
        default=None,
        description="Number of GPUs of each replica: a share below 1, or a whole number, over which the model is "
        "divided (tensor parallelism). With 0 it is served on CPUs. Default: the service's setting "
        "`num_gpus_per_model`.",
    )
    max_model_len: Annotated[int, Field(ge=1, lt=2**31)] | None = Field(
        default=None,
        description="Maximum number of tokens of a prompt and its answer. Default: what the model supports, or what "
        "fits into the memory.",
    )

    @field_validator("num_gpus")
    @classmethod
    def _whole_or_share(cls, num_gpus: float | None) -> float | None:
        if num_gpus is not None and num_gpus > 1 and num_gpus % 1:
            raise ValueError(f"num_gpus is {num_gpus:g}; it must be a share below 1 or a whole number")
        return num_gpus

    def trouble(self, *, num_gpus: float, dtype: Dtype) -> tuple[str, str] | None:
        """Returns two texts about the first field whose value cannot work: its name and the reason. Returns None if all
        values can work.

        `num_gpus` is the number of GPUs for each replica, `dtype` the number type in which the model is served.
        """
        for name in ("gpu_memory_utilization", "quantization"):
            if (value := getattr(self, name)) is not None and not num_gpus:
                return (
                    name,
                    f"'{name}' is {value!r}, which only GPUs support, but the model is served on CPUs; set num_gpus, "
                    f"or leave '{name}' out",
                )
        if self.max_cpu_loras < self.max_loras:
            most = f"max_loras, which is {self.max_loras}"
            return (
                "max_cpu_loras",
                f"max_cpu_loras is {self.max_cpu_loras}, less than {most}; raise max_cpu_loras, or lower max_loras",
            )
        if self.quantization is not None and dtype == "float32":
            return (
                "quantization",
                f"'quantization' is '{self.quantization}', which does not work with the dtype 'float32'; set 'dtype' "
                "to 'bfloat16'",
            )
        return None

    def engine(self) -> EngineSettings:
        return EngineSettings(**{name: getattr(self, name) for name in EngineSettings.model_fields})
