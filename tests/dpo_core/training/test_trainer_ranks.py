"""Tests `train` on two and on four gloo ranks. Each rank is a fork of a process that has imported this file."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing import start_processes
from transformers import Gemma2Config, Gemma2ForCausalLM

from dpo_core.config import Lora, Optim, Quantization, TrainConfig
from dpo_core.encoding.encode import EncodedGroup, Outline
from dpo_core.models.adapter_folder import EFFECT
from dpo_core.models.model import load_policy, load_tokenizer
from dpo_core.models.parts import is_unread
from dpo_core.models.quantization import scales_of
from dpo_core.options import Dpo, Mpo
from dpo_core.policy.adapter_effect import NUM_ROWS, measure_effect, read_effect
from dpo_core.policy.scorer import Scorer
from dpo_core.training.checkpoint import DamagedCheckpoint, load, read_manifest, verify
from dpo_core.training.optim import make_optimizer
from dpo_core.training.trainer import train
from dpo_core.training.weights import Weights, shard

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[3]
CONFIG = TrainConfig(
    objective=Dpo(beta=0.5),
    optim=Optim(learning_rate=1e-2),
    batch_size=8,
    n_epochs=1,
    max_length=64,
    max_tokens_per_pack=64,
    checkpoint_steps=2,
)


@dataclass(frozen=True)
class Case:
    num_ranks: int
    config: TrainConfig
    adapter: Lora | None = None
    dtype: torch.dtype = torch.float32
    model: str = "model"
    quantization: Quantization | None = None
    in_parts: bool = False


CASES = {
    "copies": Case(2, CONFIG),
    "copies, a loss over the whole batch": Case(2, replace(CONFIG, objective=Mpo())),
    "copies of an adapter": Case(2, CONFIG, adapter=Lora(r=4)),
    "copies of an adapter over nf4": Case(2, CONFIG, adapter=Lora(r=4), quantization="nf4"),
    "shards": Case(2, replace(CONFIG, sharding="full")),
    "shards, a loss over the whole batch": Case(2, replace(CONFIG, objective=Mpo(), sharding="full")),
    "shards, activations computed again": Case(2, replace(CONFIG, sharding="full", activation_checkpointing="on")),
    "shards that compute in bfloat16": Case(2, replace(CONFIG, sharding="full"), dtype=torch.bfloat16),
    "shards of an adapter in bfloat16": Case(
        2, replace(CONFIG, sharding="full"), adapter=Lora(r=4), dtype=torch.bfloat16
    ),
    "shards that cannot share prompts": Case(2, replace(CONFIG, sharding="full"), model="capped model"),
    "parts": Case(2, replace(CONFIG, sharding="full"), in_parts=True),
    "parts with an adapter in bfloat16": Case(
        2, replace(CONFIG, sharding="full"), adapter=Lora(r=4), dtype=torch.bfloat16, in_parts=True
    ),
    "parts that are copies": Case(2, CONFIG, in_parts=True),
    "copies of a mixture": Case(2, CONFIG, model="mixture"),
    "shards of a mixture": Case(2, replace(CONFIG, sharding="full", activation_checkpointing="on"), model="mixture"),
    "parts of a mixture with an adapter": Case(
        2, replace(CONFIG, sharding="full"), adapter=Lora(r=4), model="mixture", in_parts=True
    ),
    "four shards": Case(4, replace(CONFIG, sharding="full")),
    "two copies of two shards": Case(4, replace(CONFIG, sharding="hybrid")),
}
OUTLINED = [
    "copies",
    "copies, a loss over the whole batch",
    "copies of an adapter",
    "shards",
    "shards of a mixture",
    "parts with an adapter in bfloat16",
]
STOPPED = ["copies", "shards", "parts"]
IN_HALVES = [name for name, case in CASES.items() if case.dtype == torch.bfloat16]
SHARDED = [name for name, case in CASES.items() if case.config.sharding != "auto" and case.dtype == torch.float32]


def read_pairs(folder: Path) -> list[EncodedGroup]:
    return [EncodedGroup(**fields) for fields in json.loads((folder / "pairs.json").read_text())]


def train_in(
    home: Path,
    folder: Path,
    case: Case,
    *,
    resume: Path | None = None,
    stop: Callable[[], bool] | None = None,
    outlined: bool = False,
) -> None:
    """Trains the model in `home`, and writes metrics and weights to `folder`, and sharded checkpoints to its parent.

    With `outlined`, the batches have no token ids. The numbers of the pairs whose ids are loaded are also written."""
    pairs = read_pairs(home)
    with_ids, loaded = list(pairs), list[int]()

    def load(outlines: Sequence[Outline]) -> list[EncodedGroup]:
        loaded.extend(outline.place for outline in outlines)
        return [with_ids[outline.place] for outline in outlines]

    if outlined:
        pairs = [Outline.of(pair, place) for place, pair in enumerate(pairs)]
    policy = load_policy(
        home / case.model,
        adapter=case.adapter,
        dtype=case.dtype,
        quantization=case.quantization,
        in_parts=case.in_parts,
    )
    assert is_unread(policy) == case.in_parts
    if folder.name == "rank1" and not case.in_parts:  # ranks start from rank 0's weights
        for tensor in (policy.lm_head.weight, *scales_of(policy)):
            torch.nn.init.zeros_(tensor)
    batches = [pairs, pairs[:1], pairs[1:4]]  # the second leaves ranks without a pack
    steps = train(
        case.config, policy, load_tokenizer(home / "model"), batches,
        total_steps=3, checkpoint_dir=folder.parent if case.config.sharding != "auto" else folder, resume=resume,
        validation=lambda: [pairs[:5], pairs[5:6], pairs[6:]], stop=stop, load_ids=load if outlined else None,
    )  # fmt: skip
    results = [(r.step, r.num_tokens, r.metrics) for r in steps]
    allowed = {case.dtype} | ({torch.uint8} if case.quantization else set())
    assert {parameter.dtype for parameter in policy.parameters() if not parameter.requires_grad} <= allowed
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "loaded.json").write_text(json.dumps(loaded))
    whole = {n: (p.full_tensor() if isinstance(p, DTensor) else p).detach() for n, p in policy.named_parameters()}
    save_file({name: tensor.float() for name, tensor in whole.items()}, folder / "weights.safetensors")


def stop_in(home: Path, name: str, rank: int) -> None:
    """Asks only rank 1 to stop after the first step. All ranks must stop, and then go on as if they had not."""
    case, folder = CASES[name], home / f"{name}, stopped" / f"rank{rank}"
    wishes = iter([False, rank == 1])
    train_in(home, folder, case, stop=lambda: next(wishes))
    shared = folder.parent if case.config.sharding != "auto" else folder.parent / "rank0"
    dist.barrier()  # the checkpoint is rank 0's to complete
    train_in(home, folder / "resumed", case, resume=shared / "step-000001")


def disagree_in(folder: Path) -> None:
    """Gives each rank other groups. Both ranks must notice this, and neither may hang."""
    model, pairs = folder / "model", read_pairs(folder)
    own = pairs[: 3 + dist.get_rank()]
    for batch, what in ((own, "global batches for step 1"), (pairs, "groups to evaluate on")):
        results = train(
            CONFIG, load_policy(model), load_tokenizer(model), [batch],
            total_steps=1, checkpoint_dir=folder, validation=lambda: [own],
        )  # fmt: skip
        with pytest.raises(RuntimeError, match=f"different {what}"):
            list(results)


def fail_in(home: Path) -> None:
    """Lets only rank 1 fail, at first to publish its part of a checkpoint, then to resume. Rank 0 must not wait for
    it."""
    own = dist.get_rank()

    def publish(step: int, folder: Path) -> None:
        if own == 1:
            raise OSError("no room")

    for publishing, resume in ((publish, None), (None, home / "shards" / ("step-000002", "no step")[own])):
        steps = train(
            CASES["shards"].config, load_policy(home / "model"), load_tokenizer(home / "model"), [read_pairs(home)] * 3,
            total_steps=3, checkpoint_dir=home / "failed", publish=publishing, resume=resume,
        )  # fmt: skip
        with pytest.raises((RuntimeError, OSError, DamagedCheckpoint)) as failed:
            list(steps)
        expected = ("Another rank failed", "no room" if publishing else "is missing")[own]
        assert expected in str(failed.value)


def compute_unlike_completions_in(home: Path) -> None:
    """Trains on lengths of completions that one rank could compute in one padded batch, and the other rank could
    not."""
    scorer = Scorer(load_policy(home / "capped model"))
    shard(scorer, "full")
    lengths = ((1, 30), (5, 5))[dist.get_rank()]
    group = EncodedGroup([5], tuple([6] * length for length in lengths), None, 1)
    scorer(scorer.collate([group])).sum().backward()


def run_rank(rank: int, num_ranks: int, home: Path) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    dist.init_process_group("gloo", init_method=f"file://{home}/rendezvous{num_ranks}", rank=rank, world_size=num_ranks)
    for name, case in CASES.items():
        if case.num_ranks == num_ranks:
            train_in(home, home / name / f"rank{rank}", case)
    if num_ranks == 4:  # from another number of ranks
        shards = CASES["four shards"]
        train_in(home, home / "resumed by four" / f"rank{rank}", shards, resume=home / "shards" / "step-000002")
    else:
        resumed = home / "parts, resumed" / f"rank{rank}"
        train_in(home, resumed, CASES["parts"], resume=home / "shards" / "step-000002")
        for name in OUTLINED:
            train_in(home, home / f"{name}, outlined" / f"rank{rank}", CASES[name], outlined=True)
        for name in STOPPED:
            stop_in(home, name, rank)
        for name in IN_HALVES:  # where nothing is left to do
            whole = home / f"{name}, by one"
            resumed, checkpoint = whole / "resumed" / f"rank{rank}", whole / "step-000003"
            train_in(home, resumed, CASES[name], resume=checkpoint)
        disagree_in(home)
        fail_in(home)
        compute_unlike_completions_in(home)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def home(make_policy, make_mixture, sizes, tokenizer, pairs, tmp_path_factory) -> Path:
    """Runs all cases on all ranks, and returns the folder of what they left."""
    home = tmp_path_factory.mktemp("ranks")
    make_policy().save_pretrained(home / "model")
    Gemma2ForCausalLM(Gemma2Config(**sizes)).save_pretrained(home / "capped model")
    make_mixture().save_pretrained(home / "mixture")
    tokenizer.save_pretrained(home / "model")
    (home / "pairs.json").write_text(json.dumps([asdict(pair) for pair in pairs]))
    for name in IN_HALVES:
        train_in(home, home / f"{name}, by one" / "rank0", CASES[name])
    subprocess.run([sys.executable, "-m", "tests.dpo_core.training.test_trainer_ranks", home], cwd=ROOT, check=True)
    return home


def results(folder: Path) -> list[tuple[list[int], dict[str, float]]]:
    """Returns the steps and tokens, and the metrics that do not depend on the clock."""
    steps = json.loads((folder / "results.json").read_text())
    return [(counts, {k: v for k, v in m.items() if k not in ("tokens_per_second", "hfu")}) for *counts, m in steps]


@pytest.mark.parametrize("name", CASES)
def test_ranks_train_as_one_does(name, home):
    case = CASES[name]
    train_in(home, home / name / "alone" / "rank0", replace(case, config=replace(case.config, sharding="auto")))
    alone, *every = (home / name / folder for folder in ("alone/rank0", *(f"rank{r}" for r in range(case.num_ranks))))
    tolerance = 0.1 if case.dtype == torch.bfloat16 else 1e-4
    for folder in every:
        for (counts, metrics), (their_counts, theirs) in zip(results(folder), results(alone), strict=True):
            assert counts == their_counts
            assert metrics == pytest.approx(theirs, rel=tolerance, abs=tolerance / 10)
    expected, *found = (load_file(folder / "weights.safetensors") for folder in (alone, *every))
    for weights in found:
        torch.testing.assert_close(weights, found[0], rtol=0, atol=0)
    if case.dtype == torch.float32:
        torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", SHARDED)
def test_a_checkpoint_of_shards_is_whole_and_resumed_by_one(name, home):
    case = CASES[name]
    checkpoint = home / name / "step-000002"
    parts = [path for path in verify(checkpoint).files if path.startswith("optimizer-")]
    assert len(parts) == (4 if name == "four shards" else 2)
    alone = replace(case, config=replace(case.config, sharding="auto"))
    train_in(home, home / name / "resumed" / "rank0", alone, resume=checkpoint)
    resumed, straight = (load_file(home / name / f / "weights.safetensors") for f in ("resumed/rank0", "rank0"))
    torch.testing.assert_close(resumed, straight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.adapter and case.model == "model"])
def test_a_checkpoint_has_the_effect_of_its_adapter_on_the_last_rows(name, home):
    case = CASES[name]
    shared = home / name / ("rank0" if case.config.sharding == "auto" else "")
    folder, base = shared / "step-000003" / "model", home / case.model
    saved = load_policy(base, adapter=folder, dtype=case.dtype, quantization=case.quantization)
    expected = measure_effect(Scorer(saved), read_pairs(home)[1:4], max_tokens_per_pack=64)
    found = read_effect(folder)
    places = [(row.prompt_ids, row.completion_ids) for row in found.rows]
    assert places == [(row.prompt_ids, row.completion_ids) for row in expected.rows]
    numbers = ([number for row in effect.rows for number in (row.policy, row.base)] for effect in (found, expected))
    assert next(numbers) == pytest.approx(next(numbers), abs=1e-3 if case.dtype == torch.float32 else 0.5)
    assert found.largest > 0


def masters_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Returns the trained weights in float32 from a checkpoint in bfloat16."""
    parts = [load_file(path) for path in sorted(checkpoint.glob("optimizer-*"))]
    names = [key.removesuffix(".master") for key in parts[0] if key.endswith(".master")]
    return {name: torch.cat([part[f"{name}.master"] for part in parts]) for name in names}


@pytest.mark.parametrize("name", IN_HALVES)
def test_shards_in_bfloat16_go_on_from_one_and_one_from_shards_with_every_bit(name, home):
    case, by_one = CASES[name], home / f"{name}, by one"
    expected = masters_of(by_one / "step-000003")
    found = load_file(by_one / "resumed" / "rank1" / "weights.safetensors")
    torch.testing.assert_close({key: found[key] for key in expected}, expected, rtol=0, atol=0)

    shards = load_file(home / name / "rank0" / "weights.safetensors")
    checkpoint = home / name / "step-000003"
    expected = masters_of(checkpoint)
    torch.testing.assert_close({key: shards[key] for key in expected}, expected, rtol=0, atol=0)
    policy = load_policy(home / case.model, adapter=case.adapter, dtype=case.dtype)
    weights = Weights(policy)
    optimizer = make_optimizer(weights.stepped.values(), Optim())
    load(checkpoint, read_manifest(checkpoint), policy=policy, weights=weights, optimizer=optimizer)
    found = {key: parameter.detach() for key, parameter in weights.masters.items()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert all(torch.equal(weights.trained[key], master.bfloat16()) for key, master in expected.items())


@pytest.mark.parametrize("name", IN_HALVES)
def test_a_model_is_saved_in_its_own_precision_by_shards_too(name, home):
    model = home / name / "step-000003" / "model"
    (weights,) = model.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.bfloat16}
    if CASES[name].adapter is None:
        assert json.loads((model / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ["parts", "parts, resumed"])
def test_ranks_that_read_their_parts_train_as_those_that_read_all(name, rank, home):
    found, expected = (results(home / each / f"rank{rank}") for each in (name, "shards"))
    assert found == expected[-len(found) :]
    weights = [load_file(home / each / f"rank{rank}" / "weights.safetensors") for each in (name, "shards")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_four_ranks_resume_a_run_of_two(home):
    resumed, straight = (
        load_file(home / name / "weights.safetensors") for name in ("resumed by four/rank0", "shards/rank0")
    )
    torch.testing.assert_close(resumed, straight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OUTLINED)
def test_ranks_that_load_only_what_they_compute_train_as_if_they_had_all(name, home):
    loaded = []
    for rank in ("rank0", "rank1"):
        outlined, straight = home / f"{name}, outlined" / rank, home / name / rank
        assert results(outlined) == results(straight)
        weights = [load_file(folder / "weights.safetensors") for folder in (outlined, straight)]
        torch.testing.assert_close(*weights, rtol=0, atol=0)
        loaded.append(json.loads((outlined / "loaded.json").read_text()))
    num_pairs = len(read_pairs(home))
    steps = num_pairs + 1 + 3 + 2 * num_pairs  # three steps, and two evaluations
    for_empty_packs = 6 if CASES[name].config.sharding == "full" else 0  # at most; a sharded rank runs another's group
    measuring = 2 if CASES[name].config.sharding == "full" else 1  # ranks; a sharded policy needs all of them
    for_effects = measuring * 2 * NUM_ROWS if CASES[name].adapter else 0  # at most; two checkpoints
    assert all(loaded)
    assert steps <= sum(map(len, loaded)) <= steps + for_empty_packs + for_effects
    effects = [sorted((home / folder).rglob(EFFECT)) for folder in (f"{name}, outlined", name)]
    assert bool(effects[0]) == bool(CASES[name].adapter)
    by_step = [{path.parent.parent.name: path.read_bytes() for path in paths} for paths in effects]
    assert by_step[0] == by_step[1]


@pytest.mark.parametrize("name", STOPPED)
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_stop_together_when_one_is_asked_to_and_resume_as_if_they_had_not(name, rank, home):
    stopped, straight = home / f"{name}, stopped" / f"rank{rank}", home / name / f"rank{rank}"
    assert results(stopped) + results(stopped / "resumed") == results(straight)
    assert len(results(stopped)) == 1
    weights = [load_file(folder / "weights.safetensors") for folder in (stopped / "resumed", straight)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_only_one_of_several_copies_is_saved(home):
    assert list((home / "copies" / "rank0").glob("step-*"))
    assert not list((home / "copies" / "rank1").glob("step-*"))


def run_all_ranks(home: Path) -> None:
    """Runs all ranks. The first rank that fails ends the others, and its error is raised here."""
    import_module("peft")  # else each rank imports it for itself
    for num_ranks in (2, 4):
        start_processes(run_rank, (num_ranks, home), nprocs=num_ranks, daemon=True, start_method="fork")


if __name__ == "__main__":
    run_all_ranks(Path(sys.argv[1]))
