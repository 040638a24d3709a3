import type { ComponentChildren } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import { Failure } from "../../api/client";
import { FailureNote } from "../loading/loading";
import { href } from "../route/route";
import { visible } from "../words/words";
import { Refusal } from "./field";
import { Files, useFiles } from "./files";
import { Models } from "./models";

interface Sending {
  failure?: Failure;
  isSending: boolean;
  send: (event: SubmitEvent) => Promise<void>;
}

/** Makes what the body describes, and opens its view. The same body that is sent again after a lost answer makes it once. */
export function useSending(
  body: unknown,
  make: (headers: { "idempotency-key": string }) => Promise<{ id: string }>,
  view: string,
): Sending {
  const [failure, setFailure] = useState<Failure>();
  const [isSending, setSending] = useState(false);
  const now = JSON.stringify(body);
  const sent = useRef({ body: "", key: "" });
  useEffect(() => setFailure(undefined), [now]);
  useEffect(() => {
    if (failure?.param) document.getElementById(failure.param)?.focus();
  }, [failure]);
  async function send(event: SubmitEvent) {
    event.preventDefault();
    setSending(true);
    setFailure(undefined);
    if (sent.current.body !== now) sent.current = { body: now, key: newKey() };
    try {
      const made = await make({ "idempotency-key": sent.current.key });
      location.hash = href([view, made.id]);
    } catch (error) {
      setFailure(atField(Failure.of(error)));
    }
    setSending(false);
  }
  return { failure, isSending, send };
}

const newKey = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("-");

/** Returns the failure with the path of a field that is shown: the one that it names, or the one around it. */
function atField(failure: Failure): Failure {
  let path = failure.param ?? "";
  while (path && !document.getElementById(path)) path = path.slice(0, Math.max(0, path.lastIndexOf(".")));
  return new Failure(failure.message, failure.status, path || failure.param, failure.code);
}

interface Props {
  sending: Sending;
  models: string[];
  refusal?: Failure; // what the service has said of the draft before it is sent
  act: string; // what the button says
  method?: string; // of the request
  path: string;
  body: unknown;
  aside?: ComponentChildren;
  children: ComponentChildren;
}

/** A form that describes new work, and beside it the button that makes it, and the request that this sends. */
export function Making({ sending, models, refusal, act, method = "POST", path, body, aside, children }: Props) {
  const { failure, isSending, send } = sending;
  const files = useFiles();
  return (
    <Refusal.Provider value={failure ?? refusal}>
      <form class="making" onSubmit={send} noValidate>
        <div>
          {files.failure && <FailureNote failure={files.failure} again={files.again} />}
          <Models.Provider value={models}>
            <Files.Provider value={files}>{children}</Files.Provider>
          </Models.Provider>
        </div>
        <div class="aside">
          {aside}
          {failure && <FailureNote failure={failure} />}
          <button class="main" disabled={isSending}>
            {isSending ? "Sending…" : act}
          </button>
          <Request method={method} path={path} body={body} />
        </div>
      </form>
    </Refusal.Provider>
  );
}

function Request({ method, path, body }: { method: string; path: string; body: unknown }) {
  return (
    <section class="panel" aria-label="Request">
      <h2>Request</h2>
      <p class="hint">What the form sends. A program may send the same.</p>
      <pre class="log" tabIndex={0} aria-label="The request as JSON">
        {method} {path}
        {"\n\n"}
        {visible(JSON.stringify(body, undefined, 2))}
      </pre>
    </section>
  );
}
