/** One prompt and the two answers to it, while they are written and after they are there. */

import { signal } from "@preact/signals";
import { ask, messagesOf, textOf, type Form, type Question } from "../../api/answer";
import { Failure } from "../../api/client";
import { whenLoaded } from "../../api/waiting";

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
    try {
      await whenLoaded(() => this.readInItsForm(question, leaving), leaving, (why) => (this.failure.value = why));
      this.state.value = "complete";
    } catch (error) {
      this.failure.value = leaving.aborted
        ? new Failure("You have stopped this answer. Ask again for a whole one.")
        : Failure.of(error);
      this.state.value = "failed";
    }
  }

  /** Reads the answer. A model without a chat template continues the plain text. */
  private async readInItsForm(question: Question, leaving: AbortSignal) {
    try {
      await this.read(question, leaving);
    } catch (error) {
      const { status, message } = Failure.of(error);
      if (status !== 400 || this.form.value === "text" || !/chat template/i.test(message)) throw error;
      this.form.value = "text";
      await this.read(question, leaving);
    }
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
