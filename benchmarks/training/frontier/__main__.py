"""Compares DPO and related methods with reinforcement learning (PPO): measures the reward of the trained policies, and
their KL divergence from the reference.

    python -m benchmarks.training.frontier --seeds 3 --json frontier.jsonl --picture frontier.svg

The benchmark repeats the experiment of figure 2 of the DPO paper, arXiv 2305.18290, with a model of 112,000 weights.
The reward of a text is known exactly. The README of the benchmarks describes the task and the results.
"""

import argparse
import json
import multiprocessing
import os
import sys
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).parents[3]))

from benchmarks.training.frontier.results import QUANTILES, draw_frontier, print_at_equal_kl, print_policies
from benchmarks.training.frontier.runs import all_runs, prepare_process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, choices=sorted(QUANTILES), default=3, help="Number of seeds. Default: 3.")
    parser.add_argument(
        "--processes", type=int, default=2, help="Number of seeds that run at the same time. Default: 2."
    )
    parser.add_argument("--json", type=Path, help="File for the figures, one JSON object per line. Default: none.")
    parser.add_argument("--picture", type=Path, help="Picture file with the ending .svg, .png or .pdf. Default: none.")
    args = parser.parse_args()
    with multiprocessing.get_context("spawn").Pool(args.processes, prepare_process) as pool:
        found = [run for of_seed in pool.imap(all_runs, range(args.seeds), chunksize=1) for run in of_seed]
    if args.json:
        args.json.write_text("\n".join(map(json.dumps, found)))
    print_policies(found)
    print_at_equal_kl(found)
    if args.picture:
        draw_frontier(found, args.picture)


if __name__ == "__main__":
    main()
