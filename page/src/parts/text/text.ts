/** Makes plain texts of what rows hold. */

import type { FileRow } from "../../api/client";
import { visible } from "../words/words";

export type Said = FileRow["groups"][number]["prompt"];

/** Returns a text as it is. Of messages it returns their roles, contents and other fields. */
export function textOf(said: Said, isAnswer = false): string {
  if (typeof said === "string") return visible(said);
  const [only, ...more] = said;
  if (isAnswer && only && !more.length && only.role === "assistant" && Object.keys(only).length === 2)
    return visible(String(only.content));
  return said.map(messageText).join("\n\n");
}

function messageText({ role, content, ...others }: Record<string, unknown>): string {
  const rest = Object.entries(others).map(([name, value]) => `${name}: ${JSON.stringify(value)}`);
  return [`${role}:`, ...(content ? [String(content)] : []), ...rest].map(visible).join("\n");
}
