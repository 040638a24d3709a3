"""Trains small models with DPO on reference scores of several precisions, and compares the policies.

    python benchmarks/training/reference_precision.py --seeds 3 --json results.json

The base model is a Llama with random weights that is first trained on the demo's rows about a shop. Each policy then
learns the same pairs in the same order. The policies differ only in the scores (log-probabilities) of the reference
model that they learn from. These are exact (computed in float32), or computed with the same weights in bfloat16, or
exact plus Gaussian noise on each token, or exact plus an error that is the same in every pair.

The policies are compared on held-out pairs, by rewards that are computed with exact scores. `reward error` is the mean
absolute error of the scores in a pair's log-ratio, times beta. `away` is the mean distance, in nats a token, from the
policy that learned from exact scores. The row `another order` is the distance of a policy that learned from exact
scores in another order of the same rows. Figures are means over seeds, with the largest deviation.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from demo.base_model import make_base_model
from demo.rows import Shop
from dpo_core import EncodedGroup, Group, Optim, TrainConfig, encode_group, load_policy, load_tokenizer, train
from dpo_core.options import Dpo, Supervised
from dpo_core.policy.scorer import reference_token_logps

MAX_TOKENS_PER_PACK = 4096
NOISES = (0.01, 0.1, 0.3, 1.0)  # nats a token, standard deviation
BIASES = (-1.0, -0.1, -0.03, 0.03, 0.1, 1.0)  # of beta times a pair's log-ratio
OTHER_ORDER = "another order"
BATCH_SIZE, NUM_HELD_OUT = 16, 128
Logps = list[list[list[float]]]  # by group, completion and token


def main() -> None:
    args = _arguments()
    runs = []
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(_run(args, seed, Path(folder)))
        print(json.dumps(runs[-1]), flush=True)
    _print_table(runs)
    if args.json:
        args.json.write_text(json.dumps({"arguments": {**vars(args), "json": None}, "runs": runs}, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="Number of models. Default: %(default)s.")
    parser.add_argument("--pairs", type=int, default=768, help="Number of training pairs. Default: %(default)s.")
    parser.add_argument("--beta", type=float, default=0.1, help="DPO's beta. Default: %(default)s.")
    parser.add_argument("--learning-rate", type=float, default=3e-4, help="Learning rate of DPO. Default: %(default)s.")
    parser.add_argument("--json", type=Path, help="JSON file for all figures. Default: no file is written.")
    return parser.parse_args()


def _run(args: argparse.Namespace, seed: int, folder: Path) -> dict[str, dict[str, float]]:
    shop = Shop(num_things=20, num_held_out=60, seed=seed)
    base = _base(shop, folder, seed)
    tokenizer = load_tokenizer(base)
    rows = enumerate(shop.pairs(args.pairs + NUM_HELD_OUT), 1)
    groups = [encode_group(Group(prompt, (a, b), number), tokenizer) for number, (prompt, a, b) in rows]
    pairs, held_out = groups[: args.pairs], groups[args.pairs :]
    other_order = random.Random(seed).sample(range(len(pairs)), len(pairs))
    exact, rounded = _logps(base, pairs, torch.float32), _logps(base, pairs, torch.bfloat16)
    references = {"exact": exact, "bfloat16": rounded}
    references |= {f"noise of {noise:g} nats": _noisy(exact, noise, seed) for noise in NOISES}
    references |= {f"all rewards {bias:+g}": _biased(exact, bias / args.beta) for bias in BIASES}
    held_out_logps = _logps(base, held_out, torch.float32)
    figures, exact_policy = {}, None
    for name, logps in [*references.items(), (OTHER_ORDER, exact)]:
        order = other_order if name == OTHER_ORDER else range(len(pairs))
        policy = _train(args, base, [_scored(pairs[i], logps[i]) for i in order], seed)
        learned = reference_token_logps(policy, held_out, max_tokens_per_pack=MAX_TOKENS_PER_PACK)
        exact_policy = exact_policy or learned
        figures[name] = {
            "token p99": _p99(logps, exact),
            "reward error": args.beta * _mean_distance(list(map(_margin, logps)), list(map(_margin, exact))),
            **_outcome(args.beta, learned, held_out_logps),
            "away": _mean_distance(_flat(learned), _flat(exact_policy)),
        }
    return figures


def _base(shop: Shop, folder: Path, seed: int) -> Path:
    """Makes a base model in `folder` and trains it on demonstrations (prompts with answers) that `shop` makes. Returns
    the folder of the trained model."""
    rows = list(shop.demonstrations(6000))
    make_base_model(folder / "random", [f"{p} {a}" for p, a in rows], hidden_size=128, num_layers=3, seed=seed)
    tokenizer, policy = load_tokenizer(folder / "random"), load_policy(folder / "random")
    groups = [encode_group(Group(p, (a,), n), tokenizer) for n, (p, a) in enumerate(rows, 1)]
    config = TrainConfig(objective=Supervised(), optim=Optim(learning_rate=3e-3), batch_size=32, n_epochs=1, seed=seed)
    _steps(config.resolved(len(groups)), policy, tokenizer, list(_batches(groups, 32)))
    policy.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


def _train(args: argparse.Namespace, base: Path, groups: Sequence[EncodedGroup], seed: int) -> Any:
    policy, tokenizer = load_policy(base), load_tokenizer(base)
    optim = Optim(learning_rate=args.learning_rate)
    config = TrainConfig(objective=Dpo(beta=args.beta), optim=optim, batch_size=BATCH_SIZE, n_epochs=1, seed=seed)
    _steps(config.resolved(len(groups)), policy, tokenizer, list(_batches(groups, BATCH_SIZE)))
    return policy


def _steps(config: TrainConfig, policy: Any, tokenizer: Any, batches: list[list[EncodedGroup]]) -> None:
    config = replace(config, checkpoint_steps=len(batches))
    with tempfile.TemporaryDirectory() as folder:
        for _ in train(config, policy, tokenizer, batches, total_steps=len(batches), checkpoint_dir=folder):
            pass


def _batches(groups: Sequence[EncodedGroup], size: int) -> Iterator[list[EncodedGroup]]:
    for start in range(0, len(groups) - size + 1, size):
        yield list(groups[start : start + size])


def _logps(base: Path, groups: Sequence[EncodedGroup], dtype: torch.dtype) -> Logps:
    """Returns the log-probability of each completion token of the groups (prompts with their completions), computed by
    the model in the folder `base` in the type `dtype`."""
    model = load_policy(base).to(dtype)
    return reference_token_logps(model, groups, max_tokens_per_pack=MAX_TOKENS_PER_PACK)


def _noisy(logps: Logps, noise: float, seed: int) -> Logps:
    rng = random.Random(seed)
    return [[[logp + rng.gauss(0, noise) for logp in row] for row in group] for group in logps]


def _biased(logps: Logps, bias: float) -> Logps:
    return [[[chosen[0] + bias, *chosen[1:]], rejected] for chosen, rejected in logps]


def _scored(group: EncodedGroup, logps: list[list[float]]) -> EncodedGroup:
    return replace(group, ref_logps=tuple(map(math.fsum, logps)))


def _margin(group: Sequence[Sequence[float]]) -> float:
    return math.fsum(group[0]) - math.fsum(group[1])


def _outcome(beta: float, learned: Logps, reference: Logps) -> dict[str, float]:
    margins = [beta * (_margin(a) - _margin(b)) for a, b in zip(learned, reference, strict=True)]
    return {"accuracy": statistics.fmean(margin > 0 for margin in margins), "margin": statistics.fmean(margins)}


def _flat(logps: Logps) -> list[float]:
    return [logp for group in logps for row in group for logp in row]


def _mean_distance(some: Sequence[float], others: Sequence[float]) -> float:
    return statistics.fmean(abs(a - b) for a, b in zip(some, others, strict=True))


def _p99(logps: Logps, exact: Logps) -> float:
    errors = sorted(abs(a - b) for a, b in zip(_flat(logps), _flat(exact), strict=True))
    return errors[math.ceil(0.99 * len(errors)) - 1]


def _print_table(runs: Sequence[dict[str, dict[str, float]]]) -> None:
    columns = list(runs[0]["exact"])
    print(f"| reference | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name in runs[0]:
        cells = []
        for column in columns:
            values = [run[name][column] for run in runs]
            mean = statistics.fmean(values)
            cells.append(f"{mean:.3g} ± {max(abs(value - mean) for value in values):.2g}")
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
