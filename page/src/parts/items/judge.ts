import { visible } from "../words/words";

/** The judge of a request in words, such as `regex ^Gladly`. */
export function judgeText(given: unknown): string | undefined {
  const judge = given as { type: string; model?: string; pattern?: string } | undefined;
  return judge && visible(judge.model ?? [judge.type, judge.pattern].filter(Boolean).join(" "));
}
