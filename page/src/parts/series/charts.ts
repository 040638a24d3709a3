/** Which metrics are drawn, and together. */

import { percent } from "../words/words";

export interface Chart {
  title: string;
  unit?: string;
  show?: (value: number) => string;
  lines: [metric: string, label: string, color: number][];
}

export const CHARTS: Chart[] = [
  { title: "Loss", lines: [["train_loss", "training", 1], ["full_valid_loss", "validation", 2]] },
  {
    title: "Margin",
    unit: "reward of the chosen answer less that of the rejected one",
    lines: [["train_reward_margin", "training", 1], ["full_valid_reward_margin", "validation", 2]],
  },
  {
    title: "Accuracy",
    unit: "share of pairs in the right order",
    show: percent,
    lines: [["train_reward_accuracy", "training", 1], ["full_valid_reward_accuracy", "validation", 2]],
  },
  {
    title: "Accuracy of tokens",
    show: percent,
    lines: [["train_mean_token_accuracy", "training", 1], ["full_valid_mean_token_accuracy", "validation", 2]],
  },
  {
    title: "Log-probabilities",
    unit: "nats, of an answer",
    lines: [
      ["logps_chosen", "chosen", 3],
      ["logps_rejected", "rejected", 2],
      ["eval/logps/chosen", "chosen, validation", 5],
      ["eval/logps/rejected", "rejected, validation", 6],
    ],
  },
  { title: "Rewards", lines: [["rewards_chosen", "chosen", 3], ["rewards_rejected", "rejected", 2]] },
  { title: "KL from the reference", unit: "nats", lines: [["kl", "training", 1], ["eval/kl", "validation", 2]] },
  { title: "Throughput", unit: "tokens a second", lines: [["tokens_per_second", "all workers", 5]] },
  {
    title: "Use of the hardware",
    unit: "share of its rate in a large matrix product",
    show: percent,
    lines: [["hfu", "first worker", 5]],
  },
  { title: "Norm of the gradient", lines: [["grad_norm", "before clipping", 4]] },
  { title: "Learning rate", lines: [["learning_rate", "of the step", 4]] },
];

/** Whether the metric has values at some steps only: those of a checkpoint that was evaluated. */
export const isSparse = (metric: string) => metric.startsWith("full_valid_") || metric.startsWith("eval/");
