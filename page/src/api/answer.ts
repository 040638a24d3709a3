/** Asks a model, and yields its answer as it is written. */

import { bearer, Failure } from "./client";
import { framesOf } from "./frames";

export interface Question {
  system: string;
  prompt: string;
  temperature: number | null; // null: the model's default
  maxTokens: number | null;
}

export interface Message {
  role: string;
  content: string;
}

/** With `messages` the chat template writes the prompt; with `text` the model continues it as it stands. */
export type Form = "messages" | "text";

export interface Part {
  text?: string;
  thought?: string;
  end?: string; // why the answer ended: stop, length, …
}

interface Chunk {
  error?: { message?: string };
  choices?: {
    text?: string;
    delta?: { content?: string | null; reasoning?: string | null };
    finish_reason?: string | null;
  }[];
}

export function messagesOf({ system, prompt }: Question): Message[] {
  const user = { role: "user", content: prompt };
  return system ? [{ role: "system", content: system }, user] : [user];
}

export const textOf = ({ system, prompt }: Question) => (system ? `${system}\n\n${prompt}` : prompt);

export async function* ask(
  model: string,
  question: Question,
  form: Form,
  signal: AbortSignal,
): AsyncGenerator<Part> {
  const { temperature, maxTokens } = question;
  const body = {
    model,
    stream: true,
    ...(form === "messages" ? { messages: messagesOf(question) } : { prompt: textOf(question) }),
    ...(temperature !== null && { temperature }),
    ...(maxTokens !== null && { max_tokens: maxTokens }),
  };
  const answer = await fetch(form === "messages" ? "/v1/chat/completions" : "/v1/completions", {
    method: "POST",
    headers: { authorization: await bearer(), "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  if (!answer.ok) throw Failure.answered(answer.status, await answer.json().catch(() => undefined));
  for await (const { data } of framesOf(answer)) {
    if (!data || data === "[DONE]") continue;
    const chunk = JSON.parse(data) as Chunk;
    if (chunk.error) throw Failure.answered(500, chunk);
    const choice = chunk.choices?.[0];
    if (!choice) continue;
    const { delta, text, finish_reason: end } = choice;
    yield { text: delta?.content ?? text, thought: delta?.reasoning ?? undefined, end: end ?? undefined };
  }
}
