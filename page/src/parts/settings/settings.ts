/** The settings of jobs, as the paths of their options. */

import type { Job } from "../../api/client";

export type Values = Record<string, unknown>;

/** Returns what a job was asked for, or decided, by the path of the option. */
export function settingsOf(job: Job): Record<string, string> {
  const { method, x_raydpo, ...others } = job.x_raydpo.request as Values & { method: Values; x_raydpo: Values };
  const kind = String(method.type);
  const { hyperparameters } = job.method[kind] as { hyperparameters: Values };
  const asked = (method[kind] as { hyperparameters: Values }).hyperparameters;
  return Object.fromEntries([
    ...flat(others),
    ["method", kind],
    ...flat({ ...asked, ...hyperparameters }),
    ...flat(x_raydpo),
  ]);
}

/** Returns the values by their paths, such as `adapter.r`. */
export function flat(values: Values, before = ""): [string, string][] {
  return Object.entries(values).flatMap(([name, value]) => {
    const isInner = typeof value === "object" && value !== null && !Array.isArray(value);
    if (isInner) return flat(value as Values, `${before}${name}.`);
    return [[`${before}${name}`, typeof value === "string" ? value : JSON.stringify(value)]];
  });
}
