/** The results of evaluations in words: as `raydpo evaluations show` prints them. */

import type { Evaluation } from "../../api/client";
import { figure, percent } from "../words/words";

const SHARES = [
  "win_rate",
  "length_controlled_win_rate",
  "order_disagreement",
  "agreement",
  "accuracy",
  "repetition",
  "unfinished",
];
const MAIN: Record<string, string> = {
  compare: "win_rate",
  score: "score",
  samples: "score",
  preferences: "accuracy",
  drift: "kl_per_sequence",
};

interface Estimate {
  value: number;
  low: number;
  high: number;
}

export interface Result {
  name: string;
  value: string;
  interval: string; // 95 %; empty for a result without one
}

const isObject = (value: unknown): value is Record<string, unknown> => typeof value === "object" && value !== null;
const isEstimate = (value: Record<string, unknown>) => ["value", "low", "high"].every((name) => name in value);

/** Returns every result that is there, by the path of its name. */
export function resultsOf(results: Record<string, unknown>, where = ""): Result[] {
  return Object.entries(results).flatMap(([name, value]) => {
    const label = `${where} ${name}`.trim().replaceAll("_", " ");
    const show = SHARES.includes(name) ? percent : figure;
    if (isObject(value) && isEstimate(value)) {
      const { value: found, low, high } = value as unknown as Estimate;
      return [{ name: label, value: show(found), interval: `${show(low)} to ${show(high)}` }];
    }
    if (isObject(value)) return resultsOf(value, label);
    if (value === null || value === undefined) return [];
    return [{ name: label, value: typeof value === "number" ? show(value) : String(value), interval: "" }];
  });
}

/** The one result that a list shows of an evaluation. */
export function mainResult({ kind, results }: Evaluation): Result | undefined {
  const name = MAIN[kind];
  return name && results && name in results ? resultsOf({ [name]: results[name] })[0] : undefined;
}
