import { useState } from "preact/hooks";
import { Failure } from "../../api/client";
import { FailureNote } from "../../parts/loading/loading";
import { remember } from "../../parts/session/session";

export function SignIn() {
  const [failure, setFailure] = useState<Failure>();
  const [isAsking, setAsking] = useState(false);

  async function submit(event: SubmitEvent) {
    event.preventDefault();
    const fields = new FormData(event.currentTarget as HTMLFormElement);
    const value = String(fields.get("key")).trim();
    setAsking(true);
    setFailure(undefined);
    try {
      await check(value);
      remember(value, fields.has("kept"));
    } catch (error) {
      setFailure(Failure.of(error));
    }
    setAsking(false);
  }

  return (
    <main class="sign-in">
      <h1>raydpo</h1>
      <form class="panel" onSubmit={submit}>
        <label for="key">API key</label>
        <input id="key" name="key" type="password" autocomplete="off" spellcheck={false} required autofocus />
        <p class="hint">
          <code>raydpo up</code> prints the file that holds the first key. An admin makes further keys.
        </p>
        <label class="check">
          <input name="kept" type="checkbox" /> Keep the key in this browser after the tab is closed
        </label>
        {failure && <FailureNote failure={failure} />}
        <button class="main" disabled={isAsking}>
          {isAsking ? "Checking…" : "Sign in"}
        </button>
      </form>
    </main>
  );
}

/** Throws a Failure if the service does not know the key. A key that may not list jobs is known as well. */
async function check(value: string) {
  if (/[^\x21-\x7e]/.test(value)) throw new Failure("A key has letters, digits and signs only, and no spaces.");
  const answer = await fetch("/v1/fine_tuning/jobs?limit=1", { headers: { authorization: `Bearer ${value}` } });
  if (answer.ok || answer.status === 403) return;
  const body = await answer.json().catch(() => undefined);
  if (answer.status === 401) throw new Failure("The service does not know this key. Check that it is whole.");
  throw Failure.answered(answer.status, body);
}
