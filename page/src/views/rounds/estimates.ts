/** What the evaluations of rounds have found, with its intervals. */

import type { Round } from "../../api/client";
import type { Line } from "../../parts/curve/curve";
import { figure, percent } from "../../parts/words/words";

type Estimate = NonNullable<Round["score"]>;

export interface Quality {
  name: "score" | "win_rate";
  title: string;
  unit: string;
  show: (value: number) => string;
}

const SCORE: Quality = { name: "score", title: "Score", unit: "mean of a policy's answers", show: figure };
const WIN_RATE: Quality = {
  name: "win_rate",
  title: "Win rate",
  unit: "against the policy of the round before",
  show: percent,
};

/** Returns how these rounds tell a better policy: by scores, or by comparisons, if the judge only compares. */
export const qualityOf = (rounds: Round[]) => (rounds.some((round) => round.win_rate) ? WIN_RATE : SCORE);

/** Such as "0.75 (0.7 to 0.81)". */
export function estimateText({ value, low, high }: Estimate, show = figure): string {
  return `${show(value)} (${show(low)} to ${show(high)})`;
}

/** Returns the line of estimates, one for each round, within the band of their intervals. */
export function bandOf(label: string, estimates: (Estimate | null)[], color: number): Line {
  const [values, low, high] = (["value", "low", "high"] as const).map((end) =>
    estimates.map((each) => each?.[end] ?? null),
  ) as [Line["values"], Line["values"], Line["values"]];
  return { label, values, low, high, color, isSparse: true };
}
