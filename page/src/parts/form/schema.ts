/** Requests as the service's own OpenAPI document describes them: their fields, what each means, and what it may be. */

import { Failure, type Option } from "../../api/client";
import { parsed, set, type Draft, type Values } from "./draft";

interface Schema {
  $ref?: string;
  type?: string;
  description?: string;
  default?: unknown;
  enum?: unknown[];
  anyOf?: Schema[];
  properties?: Record<string, Schema>;
  required?: string[];
  minimum?: number;
  maximum?: number;
  exclusiveMinimum?: number;
  exclusiveMaximum?: number;
}

export interface Described {
  path: string;
  name: string;
  option: Option;
  isText: boolean; // its value is a text as it stands, else JSON
  inner?: Described[]; // the fields of an object
}

/** The values of another field with which a field is of use. The others have no such field, so it is left out. */
export type Uses = Record<string, [path: string, values: string[]]>;

type Schemas = Record<string, Schema>;

let known: Promise<Schemas> | undefined; // it stays the same while the page is open

async function load(): Promise<Schemas> {
  const answer = await fetch("/openapi.json");
  if (!answer.ok) throw Failure.answered(answer.status, undefined);
  return ((await answer.json()) as { components: { schemas: Schemas } }).components.schemas;
}

/** Returns the fields of the request body with this name in the OpenAPI document. */
export async function describe(body: string): Promise<Described[]> {
  known ??= load().catch((error) => {
    known = undefined;
    throw error;
  });
  return fieldsOf(body, await known);
}

/** Returns the fields of an object. If the object may be left out, the defaults of its choices hold only if it is not. */
function fieldsOf(object: string, schemas: Schemas, at = "", isOptional = false): Described[] {
  const { properties = {}, required = [] } = schemas[object]!;
  return Object.entries(properties).map(([name, given]) => {
    const of = resolved(given, schemas);
    const path = at + name;
    const option = optionOf(of, required.includes(name));
    if (isOptional && option.choices && option.default !== undefined) option.default = null;
    const inner = of.$ref && fieldsOf(of.$ref, schemas, `${path}.`, isNullable(given));
    return { path, name, option, isText: of.type === "string", ...(inner && { inner }) };
  });
}

const isNullable = ({ anyOf = [] }: Schema) => anyOf.some(({ type }) => type === "null");

/** Returns the schema without its alternative `null`, with the choices of all others; `$ref` is the name of an object. */
function resolved(given: Schema, schemas: Schemas): Schema {
  const others = (given.anyOf ?? [given]).filter((each) => each.type !== "null");
  const choices = others.flatMap((each) => each.enum ?? []);
  const found: Schema = { ...others[0], ...given, ...(choices.length && { enum: choices }) };
  const name = (given.$ref ?? others[0]?.$ref)?.split("/").at(-1);
  return { ...found, $ref: name && schemas[name]?.properties ? name : undefined };
}

function optionOf(of: Schema, isNeeded: boolean): Option {
  const { description = "", type } = of;
  const choices = of.enum ?? (type === "boolean" ? [true, false] : undefined);
  const unset = choices && !isNeeded ? null : undefined; // what that means is in the description
  return { default: of.default ?? unset, range: rangeOf(of), description, ...(choices && { choices }) };
}

function rangeOf({ type, minimum, maximum, exclusiveMinimum, exclusiveMaximum }: Schema): string {
  const top = maximum ?? (exclusiveMaximum !== undefined && type === "integer" ? exclusiveMaximum - 1 : undefined);
  if (minimum !== undefined && top !== undefined) return `from ${minimum} to ${top}`;
  const parts = [
    minimum !== undefined && `at least ${minimum}`,
    exclusiveMinimum !== undefined && `greater than ${exclusiveMinimum}`,
    top !== undefined && `at most ${top}`,
    top === undefined && exclusiveMaximum !== undefined && `less than ${exclusiveMaximum}`,
  ];
  return parts.filter(Boolean).join(" and ");
}

export const isUsed = (path: string, draft: Draft, uses: Uses): boolean =>
  !uses[path] || uses[path][1].includes(draft[uses[path][0]] ?? "");

/** Returns the body of the request. Fields that are of no use with the rest of the draft are left out. */
export function bodyOf(fields: Described[], draft: Draft, uses: Uses, body: Values = Object.create(null)): Values {
  for (const { path, inner, isText } of fields) {
    const text = draft[path];
    if (!isUsed(path, draft, uses)) continue;
    if (inner) bodyOf(inner, draft, uses, body);
    else if (path.split(".").at(-1) === "rows") text && set(body, path.split("."), rowsOf(text));
    else if (text) set(body, path.split("."), isText ? text : parsed(text));
  }
  return body;
}

/** Returns the rows of a text, of which each line is a prompt, or a row as JSON. */
function rowsOf(text: string): unknown[] {
  const lines = text.split("\n").filter((line) => line.trim());
  return lines.map((line) => (line.startsWith("{") ? parsed(line) : { prompt: line }));
}

/** When the fields of a judge are of use, whose path is given. */
export const usesOfJudge = (at: string): Uses => {
  const of = (...types: string[]): [string, string[]] => [`${at}.type`, types];
  return {
    [`${at}.model`]: of("model", "implicit"),
    [`${at}.criteria`]: of("model"),
    [`${at}.reference`]: of("implicit"),
    [`${at}.beta`]: of("implicit"),
    [`${at}.pattern`]: of("regex"),
  };
};
