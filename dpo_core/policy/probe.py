"""Finds out, on a small example, in which way a model's outputs can be computed: whether completions can share one copy
of their prompt, and whether several completions can be computed in one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PretrainedConfig, PreTrainedModel

from dpo_core.encoding.encode import EncodedGroup
from dpo_core.models.architecture import UnusableModel, is_reward_model
from dpo_core.models.miniature import miniature, ropes
from dpo_core.policy.batch import Batch, collate
from dpo_core.policy.forward import Logits, decoder, packed_logps, packed_rewards, plain_logps, plain_rewards, readings
from dpo_core.policy.measures import NUM_MEASURES, Measures
from dpo_core.policy.routing import Experts, experts_of

TOLERATED = 1e-4  # allowed difference in float32, relative to the larger of 1 and the largest answer
NUM_TOKENS = 30  # in the example: more than the windows and chunks of a miniature
# The errors that architectures raise for arguments that they do not know.
REFUSALS = (AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)
ATTENTION = {"full_attention", "sliding_attention", "attention"}  # kinds of layers that are attention


@dataclass(frozen=True)
class Manner:
    """Says how to compute a model's outputs.

    `logits` has the factor and the cap of the model's logits. `no_sharing` is the reason why completions cannot share
    one copy of their prompt; it is empty if they can. `no_batches` is the reason why completions cannot be computed in
    batches; it is empty if they can. `experts` are the experts that training balances, None if it balances none;
    `no_balance` is the reason if it balances none although the model's config asks for it.
    """

    logits: Logits
    no_sharing: str = ""  # why completions cannot share their prompt; empty: they can
    no_batches: str = ""  # why each completion needs a forward of its own; empty: batches work
    experts: Experts | None = None  # those that training balances
    no_balance: str = ""  # why training does not balance experts, although the model's config says that it does


@torch.no_grad()
def probe(model: PreTrainedModel) -> Manner:
    """Returns the fastest way of computing the model's outputs that agrees with the model's own forward. Raises
    UnusableModel if outputs of the model depend on later tokens.

    The function compares outputs of a miniature, a small model of the same architecture. If no miniature can be made,
    it compares outputs of the model itself on a few tokens. This shows too little to allow shared prompts; in half
    precision it also shows too little to allow batches.
    """
    config = model.config.get_text_config()
    stretched = _depends_on_length(config)
    subject, no_sharing = _subject(model)
    _check_causal(subject)
    no_sharing = stretched or _has_a_state(config) or no_sharing
    place = 0
    if not no_sharing:
        no_sharing, place = _try_packs(subject, shared=True)
    coarse = (
        f"its numbers in {model.dtype} are too coarse to compare"
        if subject is model and model.dtype != torch.float32
        else ""
    )
    no_batches = stretched or coarse
    if no_sharing and not no_batches:
        no_batches, place = _try_packs(subject, shared=False)
    no_balance = _try_balance(subject) if experts_of(model) else ""
    return Manner(
        readings(config)[place], no_sharing, no_batches, None if no_balance else experts_of(model), no_balance
    )


def _subject(model: PreTrainedModel) -> tuple[PreTrainedModel, str]:
    """Returns the model on which `probe` compares outputs, and a reason. Normally the model is a miniature (a small
    model with the architecture of `model`), and the reason is empty. If no miniature can be made, the model is `model`
    itself, and the reason says why."""
    for narrow in (True, False):
        try:
            small = miniature(model, narrow=narrow)
            _answer(small, _ids(small))
        except Exception as error:  # architectures refuse such configs with errors of any kind
            reason = f"no small copy of it can be made to try this, {type(error).__name__}: {error}"
        else:
            return small, ""
    return model, reason


def _check_causal(model: PreTrainedModel) -> None:
    """Raises UnusableModel if the model is not causal, that is, if its outputs at some tokens depend on later
    tokens."""
    ids, half = _ids(model), NUM_TOKENS // 2
    first, second = (_answer(model, ids[:half] + rest)[:half] for rest in (ids[half:], ids[:half][::-1]))
    if _difference(first, second) > _tolerated(model, first):
        name = type(model).__name__
        raise UnusableModel(
            f"{name} sees later tokens while it predicts earlier ones; "
            "use a causal model (if the config has the field 'is_decoder', set it to true)."
        )


def _answer(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """Returns what the model's own forward computes for the tokens `ids`: log-probabilities [T, V], or the hidden
    states [T, H] of a reward model."""
    inputs = torch.tensor([list(ids)], device=model.device)
    if is_reward_model(model):
        return cast(Tensor, decoder(model)(input_ids=inputs, use_cache=False).last_hidden_state[0])
    return cast(Tensor, model(input_ids=inputs, use_cache=False).logits[0]).float().log_softmax(1)


def _try_packs(model: PreTrainedModel, *, shared: bool) -> tuple[str, int]:
    """Checks whether the model computes the right log-probabilities if it computes several completions together. For
    this, computes a small example in two ways, and compares the results: all completions in one forward pass, and one
    completion after the other by the model's own forward. `shared` says whether completions that are computed together
    share one copy of their prompt.

    Models turn the outputs of their heads into logits in different ways. `readings(config)` lists the ways that are
    possible for this model, and this function tries each of them. Returns two values:

    - why completions cannot be computed together, as a text: how the results differ, or the error of the model; empty
      if the results agree
    - the index of the first way in `readings(config)` with which the results agree; 0 if they agree with none
    """
    packed, unshared = (_example(model, share_prompts=share) for share in (shared, False))
    rewards, candidates = is_reward_model(model), readings(model.config.get_text_config())
    plain = plain_rewards(model, unshared) if rewards else plain_logps(model, unshared).logps
    differences = []
    for place, logits in enumerate(candidates):
        try:
            if rewards:
                answer = packed_rewards(model, packed, shared=shared)
            else:
                answer = packed_logps(model, packed, logits, shared=shared).logps
        except REFUSALS as error:
            return f"{type(error).__name__}: {error}", 0
        differences.append(_difference(answer, plain))
        if differences[-1] <= _tolerated(model, plain):
            return "", place
    return f"its log-probabilities would differ by {differences[0]:.2g}", 0


def _try_balance(model: PreTrainedModel) -> str:
    """Computes the load-balancing loss of a small example with this package's own formula, and compares it with the
    load-balancing loss that the model's forward returns. Returns how the two differ; empty if they agree."""
    ids, experts = _ids(model), experts_of(model)
    assert experts is not None
    try:
        inputs = torch.tensor([ids], device=model.device)
        outputs = model(input_ids=inputs, use_cache=False, output_router_logits=True)
        if not outputs.router_logits:
            return "a small copy of the model has no routers"
        spread = experts.spread(outputs.router_logits).sum(0)[None]
    except REFUSALS as error:
        return f"{type(error).__name__}: {error}"
    measures = Measures([EncodedGroup(ids[:9], (ids[9:],), None, 1)], pad(spread, (NUM_MEASURES, 0)))
    difference = _difference(experts.loss(measures), outputs.aux_loss)
    return f"it would differ by {difference:.2g}" if difference > _tolerated(model, outputs.aux_loss) else ""


def _example(model: PreTrainedModel, *, share_prompts: bool) -> Batch:
    """Returns a batch with two groups (prompts with their completions). The first is a prompt with two completions, and
    is longer than the attention windows of a miniature. The second is a prompt with one completion. With
    `share_prompts`, the two completions share one copy of their prompt."""
    ids = _ids(model)
    groups = [EncodedGroup(ids[:9], (ids[9:16], ids[16:22]), None, 1), EncodedGroup(ids[22:23], (ids[23:],), None, 2)]
    return collate(groups, share_prompts=share_prompts, with_ends=is_reward_model(model)).to(model.device)


def _ids(model: PreTrainedModel) -> list[int]:
    return [i % model.config.get_text_config().vocab_size for i in range(3, 3 + NUM_TOKENS)]


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Returns the largest absolute difference between the tensors `ours` and `theirs`, which have the same shape.
    Returns infinity if a difference is nan."""
    return (ours.float() - theirs.float()).abs().max().nan_to_num(nan=torch.inf).item()


def _tolerated(model: PreTrainedModel, answer: Tensor) -> float:
    """Returns the largest difference from `answer` that rounding may cause in the model's dtype."""
    return TOLERATED * max(1.0, answer.abs().max().item()) if model.dtype == torch.float32 else 0.3


def _has_a_state(config: PretrainedConfig) -> str:
    """Returns the kinds of the model's layers that are not attention, as a text such as "mamba, conv"; empty if there
    are none. Such layers may carry a state from one completion to the next, an effect that a small example may not
    show."""
    names = ("layer_types", "layers_block_type", "block_types")
    kinds = {kind for name in names for kind in getattr(config, name, None) or ()}
    return ", ".join(sorted(kinds - ATTENTION))


def _depends_on_length(config: PretrainedConfig) -> str:
    """Returns the kinds of the model's rotary positions that change with the longest sequence of a batch, as a text
    such as "dynamic positions"; empty if there are none."""
    kinds = {rope.get("rope_type") for rope in ropes(config)}
    return ", ".join(f"{kind} positions" for kind in ("dynamic", "longrope") if kind in kinds)
