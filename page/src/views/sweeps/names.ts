/** The parameters of a sweep in short words. */

import { visible } from "../../parts/words/words";

export type Names = Map<string, string>;

/** Returns a name for each path of a parameter: its last part, or the whole path if another one ends alike. */
export function shortNames(paths: string[]): Names {
  const last = paths.map((path) => path.split(".").at(-1)!);
  return new Map(paths.map((path, at) => [path, last.filter((each) => each === last[at]).length > 1 ? path : last[at]!]));
}

/** Returns a value as a text: a JSON text, unless it is a text itself. */
export const text = (value: unknown) => visible(typeof value === "string" ? value : JSON.stringify(value));

/** Such as "beta 0.1, n_epochs 2". */
export function valueText(parameters: Record<string, unknown>, names: Names): string {
  return Object.entries(parameters)
    .map(([path, value]) => `${names.get(path) ?? path} ${text(value)}`)
    .join(", ");
}
