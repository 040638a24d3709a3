/** What is being written in a form. It stands in the address, each field under the path that errors of the API name, such
 * as `model` or `judge.pattern`. */

export type Draft = Record<string, string>;
export type Values = Record<string, unknown>;

/** Sets a value in the object that the names lead to. Objects on the way are made. */
export function set(values: Values, [name, ...rest]: string[], value: unknown) {
  if (!rest.length) {
    values[name!] ??= value; // an adapter's options stand in place of its name
    return;
  }
  if (typeof values[name!] !== "object") values[name!] = Object.create(null);
  set(values[name!] as Values, rest, value);
}

/** Reads a text as JSON. A text that is none is returned as it is, so that the service refuses it by the field's name. */
export function parsed(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

export const textOf = (value: unknown) => (typeof value === "string" ? value : JSON.stringify(value));

/** Returns the part of the draft below a path such as `job.`, by the paths within that part. */
export function within(draft: Draft, at: string): Draft {
  const inner = Object.entries(draft).filter(([path]) => path.startsWith(at));
  return Object.fromEntries(inner.map(([path, text]) => [path.slice(at.length), text]));
}
