import { useEffect, useState } from "preact/hooks";
import { Failure } from "../../api/client";
import { hasIssuer, hasReturned, leaveForIssuer, returnFromIssuer } from "../../api/sign-in";
import { FailureNote, useLoaded } from "../../parts/loading/loading";
import { hasEnded, remember } from "../../parts/session/session";

let isReturning = hasReturned; // until the code of the issuer is exchanged, once

export function SignIn() {
  const issuer = useLoaded(hasIssuer, []);
  const [failure, setFailure] = useState<Failure>();
  const [isBusy, setBusy] = useState(isReturning);

  async function attempt(act: () => Promise<void>) {
    setBusy(true);
    setFailure(undefined);
    try {
      await act();
    } catch (error) {
      setFailure(Failure.of(error));
      setBusy(false);
    }
  }

  useEffect(() => {
    if (!isReturning) return;
    isReturning = false;
    void attempt(async () => remember(await returnFromIssuer()));
  }, []);

  function submit(event: SubmitEvent) {
    event.preventDefault();
    const fields = new FormData(event.currentTarget as HTMLFormElement);
    const token = String(fields.get("key")).trim();
    void attempt(async () => {
      await check(token);
      remember({ token }, fields.has("kept"));
    });
  }

  return (
    <main class="sign-in">
      <h1>raydpo</h1>
      {hasEnded.value && <p class="note">Your sign-in has ended. Sign in again to go on where you were.</p>}
      {failure && <FailureNote failure={failure} />}
      {issuer.failure && <FailureNote failure={issuer.failure} again={issuer.again} />}
      {issuer.value && (
        <div class="panel">
          <button class="main" disabled={isBusy} onClick={() => attempt(leaveForIssuer)}>
            Sign in with your organization
          </button>
          <p class="hint">Its sign-in page sends you back here. You may also use an API key.</p>
        </div>
      )}
      <form class="panel" onSubmit={submit}>
        <label for="key">API key</label>
        <input id="key" name="key" type="password" autocomplete="off" spellcheck={false} required autofocus />
        <p class="hint">
          <code>raydpo up</code> prints the command that shows the first key. An admin makes further keys.
        </p>
        <label class="check">
          <input name="kept" type="checkbox" /> Keep the key in this browser after the tab is closed
        </label>
        <button class={issuer.value ? undefined : "main"} disabled={isBusy}>
          {isBusy ? "Signing in…" : "Sign in"}
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
  if (answer.status === 401) {
    const remedy = "Check that it is whole, and that it is the key itself, not the name of the file that holds it.";
    throw new Failure(`The service does not know this key. ${remedy}`);
  }
  throw Failure.answered(answer.status, body);
}
