"""Tests that every objective can be trained by a job: its data are encoded, scored by the reference, and trained on."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_core.config import TrainConfig
from dpo_core.encoding.encode import EncodedGroup
from dpo_core.methods import METHODS
from dpo_core.models.model import load_policy, load_reward_model, load_tokenizer
from dpo_core.options import OBJECTIVES, Dpo, Kto, LdDpo, Mpo
from dpo_core.training.trainer import train
from services.contract import AttemptSpec
from services.training.data import dataset
from services.training.data.dataset import Dataset, Part
from services.training.data.encoding import encode_piece, recipe_of, split
from services.training.reference.trainer_scores import score_part
from tests.public_sets import PUBLIC_SETS, PublicSet

pytestmark = pytest.mark.slow

MakeSpec = Callable[..., AttemptSpec]
PAIRS, KTO = PUBLIC_SETS["HH-RLHF"], PUBLIC_SETS["LLaMA-Factory, KTO"]
ROWS = {
    "demonstrations": PublicSet("", "", [{"messages": row["messages"]} for row in KTO.rows]),
    "pairs": PAIRS,
    "ratings": PUBLIC_SETS["HelpSteer and HelpSteer2"],
    "unpaired": KTO,
}


@pytest.fixture
def prepare(
    make_spec: MakeSpec, byte_level_model: str, tmp_path: Path
) -> Callable[[TrainConfig, bytes], list[EncodedGroup]]:
    """Returns a function that encodes and scores rows as a job does, and returns the groups."""

    def prepare(config: TrainConfig, rows: bytes) -> list[EncodedGroup]:
        (tmp_path / "rows.jsonl").write_bytes(rows)
        spec = make_spec(config=config, training_uri=str(tmp_path / "rows.jsonl"), model_source=byte_level_model)
        ids, scores = (tmp_path / "ids").as_uri(), (tmp_path / "scores").as_uri()
        parts = tuple(
            part for piece in split(spec.training_uri) if (part := encode_piece(recipe_of(spec), ids, piece).training)
        )
        if not config.objective.traits.needs_reference:
            return list(dataset.read_groups(Dataset(uri=ids, parts=parts)))
        scored: tuple[Part, ...] = tuple(
            score_part(spec, Dataset(uri=ids, parts=parts), scores, part) for part in parts
        )
        return list(dataset.read_groups(Dataset(uri=ids, scores_uri=scores, parts=scored)))

    return prepare


@pytest.mark.parametrize("kind", METHODS)
def test_an_objective_trains_on_what_a_job_prepares(
    kind: str, prepare: Callable[[TrainConfig, bytes], list[EncodedGroup]], byte_level_model: str, tmp_path: Path
) -> None:
    objective = OBJECTIVES[kind]()
    learns_from = objective.traits.learns_from[0]
    rows = ROWS[learns_from].lines
    config = TrainConfig(objective=objective, batch_size=4, n_epochs=1, max_length=512)
    groups = prepare(config, rows)
    assert len(groups) >= 8
    batches = [groups[:4], groups[4:8]]
    num_outputs, tokenizer = objective.traits.num_outputs, load_tokenizer(byte_level_model)
    if num_outputs:
        policy = load_reward_model(byte_level_model, num_outputs=num_outputs)
    else:
        policy = load_policy(byte_level_model)
    run = train(config.resolved(8), policy, tokenizer, batches, total_steps=2, checkpoint_dir=tmp_path / "checkpoints")
    steps = list(run)
    assert [step.step for step in steps] == [1, 2]
    assert all(math.isfinite(step.metrics[name]) for step in steps for name in ("loss", "grad_norm"))
    assert all(step.metrics["grad_norm"] > 0 for step in steps)


def test_kto_has_an_answer_to_another_prompt_beside_each(prepare):  # type: ignore[no-untyped-def]
    plain = prepare(TrainConfig(max_length=512), PAIRS.lines)
    groups = prepare(TrainConfig(objective=Kto(), max_length=512), PAIRS.lines)
    for place, (group, alone) in enumerate(zip(groups, plain, strict=True)):
        following = plain[(place + 1) % len(plain)]
        assert group.completion_ids == (*alone.completion_ids, following.completion_ids[0])
        assert (group.rated(), math.isnan(group.ranked()[-1])) == ([1.0, 0.0], True)
        assert len(group.ref_logps or ()) == 3


def test_rows_of_one_prompt_have_no_answer_to_another(prepare):  # type: ignore[no-untyped-def]
    row = b'{"prompt": "%s", "completion": "Yes %d.", "label": true}\n'
    rows = b"".join(row % (prompt, n) for n, prompt in enumerate([b"A?"] * 3 + [b"B?"] * 2 + [b"A?"]))
    groups = prepare(TrainConfig(objective=Kto()), rows)
    given = [group.completion_ids[0] for group in groups]
    assert [group.completion_ids[1] for group in groups] == [given[3]] * 3 + [given[5]] * 2 + [given[3]]
    alike = prepare(TrainConfig(objective=Kto()), b"".join(row % (b"A?", n) for n in range(3)))
    assert [len(group.completion_ids) for group in alike] == [1, 1, 1]


def test_only_who_needs_them_has_the_references_scores_of_beginnings(prepare):  # type: ignore[no-untyped-def]
    assert prepare(TrainConfig(objective=Dpo(), max_length=512), PAIRS.lines)[0].ref_head_logps is None
    for objective in (LdDpo(), Mpo(objectives=(Dpo(), LdDpo()), weights=(1.0, 0.5))):
        group = prepare(TrainConfig(objective=objective, max_length=512), PAIRS.lines)[0]
        assert len(group.ref_head_logps or ()) == 2
