/** Makes plain texts of what rows hold. Characters that nobody sees, or that turn others around, are named. */

import type { FileRow } from "../../api/client";

export type Said = FileRow["groups"][number]["prompt"];

const UNSEEN = /[^\P{C}\n\t\u200c\u200d]|[\u2028\u2029]/gu; // joiners belong to scripts and emoji

export function visible(text: string): string {
  return text.replace(UNSEEN, (sign) => `⟨U+${sign.codePointAt(0)!.toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

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
