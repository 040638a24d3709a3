/** A job that is being written. The paths of its fields are those that errors of the API name: `model`,
 * `method.dpo.hyperparameters.beta`, `x_raydpo.adapter.r`. */

import type { components } from "../../api/schema";
import type { Job, Method, Option } from "../../api/client";
import { parsed, set, textOf, type Draft, type Values } from "../form/draft";

export type Body = components["schemas"]["CreateJob"];

const TEXTS = new Set(["model", "training_file", "validation_file", "suffix", "x_raydpo.dataset", "x_raydpo.reference.model"]);
const FIELDS = new Set([...TEXTS, "seed", "metadata", "method", "integrations", "x_raydpo"]);

/** Returns the body of the request. Hyperparameters of other methods than the chosen one are left out. */
export function bodyOf(draft: Draft): Body {
  const body: Values = Object.create(null);
  for (const [path, text] of Object.entries(draft)) {
    const names = path.split(".");
    const isOfOther = names[0] === "method" && names.length > 2 && names[1] !== draft["method.type"];
    const isOfNoAdapter = path.startsWith("x_raydpo.adapter.") && draft["x_raydpo.adapter"] === "none";
    if (!FIELDS.has(names[0]!) || isOfOther || isOfNoAdapter) continue;
    set(body, names, TEXTS.has(path) ? text : parsed(text));
  }
  return body as unknown as Body;
}

/** Returns the draft of the same job again. Options that have their default are left out. */
export function draftOf(job: Job, methods: Method[], options: Record<string, Option>): Draft {
  const { method, x_raydpo, ...others } = job.x_raydpo.request as Values & { method: Values; x_raydpo: Values };
  const kind = String(method.type);
  const known = methods.find((each) => each.id === kind);
  const defaults = { ...known?.hyperparameters, ...known?.common_hyperparameters };
  const { hyperparameters } = method[kind] as { hyperparameters: Values };
  const draft: Draft = { "method.type": kind };
  for (const [name, value] of Object.entries(others)) draft[name] = textOf(value);
  for (const [name, value] of Object.entries(hyperparameters))
    if (!isDefault(value, defaults[name])) draft[`method.${kind}.hyperparameters.${name}`] = textOf(value);
  for (const [name, value] of flat(x_raydpo))
    if (name.startsWith("adapter.") || !isDefault(value, options[name])) draft[`x_raydpo.${name}`] = textOf(value);
  return draft;
}

const isDefault = (value: unknown, option: Option | undefined) =>
  option !== undefined && JSON.stringify(value) === JSON.stringify(option.default);

function flat(values: Values): [string, unknown][] {
  return Object.entries(values).flatMap(([name, value]) => {
    if (!["adapter", "reference"].includes(name) || typeof value !== "object" || !value) return [[name, value]];
    const inner = Object.entries(value).filter(([key]) => key !== "type");
    return inner.map(([key, each]): [string, unknown] => [`${name}.${key}`, each]);
  });
}
