/** One prompt and the two answers to it, while they are written and after they are there. */

import { signal } from "@preact/signals";
import { ask, messagesOf, textOf, type Form, type Question } from "../../api/answer";
import { Failure } from "../../api/client";

const AGAIN_MS = 3000;

export class Answer {
  text = signal("");
  thought = signal("");
  state = signal<"waiting" | "writing" | "complete" | "failed">("waiting");
  failure = signal<Failure | undefined>(undefined); // also why a model that loads does not answer yet
  end = signal(""); // why it ended, in the service's words
  form = signal<Form>("messages");

  constructor(readonly model: string) {}

  /** The completion as feedback has it, in the form of the round's prompt. */
  as(form: Form) {
    return { completion: form === "text" ? this.text.value : this.messages(this.text.value), model: this.model };
  }

  messages(text: string) {
    const thought = this.thought.value;
    return [{ role: "assistant", content: text, ...(thought && { reasoning_content: thought }) }];
  }

  /** Asks until the model has answered. A model that is being loaded is asked again. */
  async run(question: Question, leaving: AbortSignal): Promise<void> {
    while (!leaving.aborted) {
      try {
        await this.read(question, leaving);
        this.state.value = "complete";
        return;
      } catch (error) {
        if (leaving.aborted) break;
        const failure = Failure.of(error);
        this.failure.value = failure;
        if (failure.status === 400 && this.form.value === "messages" && /chat template/i.test(failure.message)) {
          this.form.value = "text";
        } else if (failure.status === 503 && this.state.value === "waiting") {
          await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
        } else {
          this.state.value = "failed";
          return;
        }
      }
    }
    this.state.value = "failed";
    this.failure.value = new Failure("You have stopped this answer. Ask again for a whole one.");
  }

  private async read(question: Question, leaving: AbortSignal) {
    for await (const part of ask(this.model, question, this.form.value, leaving)) {
      this.state.value = "writing";
      this.failure.value = undefined;
      this.text.value += part.text ?? "";
      this.thought.value += part.thought ?? "";
      this.end.value = part.end ?? this.end.value;
    }
    this.failure.value = undefined;
  }
}

export class Round {
  readonly answers: [Answer, Answer]; // in the order of the screen
  readonly key = randomKey(); // so that a vote that is sent twice counts once
  private leaving = new AbortController();

  constructor(
    readonly question: Question,
    models: [string, string],
    readonly isBlind: boolean,
  ) {
    const [first, second] = isBlind && randomBit() ? [models[1], models[0]] : models;
    this.answers = [new Answer(first), new Answer(second)];
  }

  run() {
    for (const answer of this.answers) void answer.run(this.question, this.leaving.signal);
  }

  stop() {
    this.leaving.abort();
  }

  get isOver(): boolean {
    return this.answers.every((answer) => ["complete", "failed"].includes(answer.state.value));
  }

  get isComplete(): boolean {
    return this.answers.every((answer) => answer.state.value === "complete");
  }

  /** The form in which the vote is stored: text only if both models continued the plain text. */
  get form(): Form {
    return this.answers.every((answer) => answer.form.value === "text") ? "text" : "messages";
  }

  get prompt() {
    return this.form === "text" ? textOf(this.question) : messagesOf(this.question);
  }
}

const randomBit = () => crypto.getRandomValues(new Uint8Array(1))[0]! & 1;

/** As `crypto.randomUUID`, which browsers have on https and localhost only. */
const randomKey = () =>
  Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
