import { useEffect, useState } from "preact/hooks";
import { api, ask, Failure, type Deployment } from "../../api/client";
import { FailureNote } from "../../parts/loading/loading";
import { clock, count, duration, figure, visible } from "../../parts/words/words";

const UNUSED_SECONDS = 60; // a shorter pause is not worth a word

/** Whether the model answers, what it waits for, and how busy it is. */
export function State({ of }: { of?: Deployment }) {
  if (!of) return <span class="status">not known</span>;
  const idleTime = idleTimeOf(of);
  return (
    <>
      <span class={`status ${of.state}`}>{of.state}</span>
      {of.attached_to && <small>on the engine of {of.attached_to}</small>}
      {of.waits_for && <small>waits for {visible(of.waits_for)}</small>}
      {of.error && <small class="bad">{visible(of.error)}</small>}
      {of.state === "running" && <small>{loadOf(of)}</small>}
      {of.state === "running" && idleTime && <small>{idleTime}</small>}
    </>
  );
}

function loadOf(of: Deployment): string {
  const { replicas_ready, requests_in_flight, tokens_per_second, time_to_first_token } = of;
  const parts = [count(replicas_ready, "replica")];
  if (requests_in_flight !== null) parts.push(`${count(requests_in_flight, "request")} in flight`);
  if (tokens_per_second !== null) parts.push(`${figure(tokens_per_second)} tokens/s`);
  if (time_to_first_token !== null) parts.push(`first token after ${shortly(time_to_first_token)}`);
  return parts.join(" · ");
}

/** How long nobody has used the engine, and when it is unloaded if that goes on. */
function idleTimeOf({ last_used_at, unloads_at, requests_in_flight }: Deployment): string | undefined {
  const now = Date.now() / 1000;
  if (requests_in_flight || last_used_at === null || now - last_used_at < UNUSED_SECONDS) return undefined;
  const unused = `unused for ${duration(now - last_used_at)}`;
  return unloads_at === null ? unused : `${unused} · unloaded at ${clock(unloads_at)} if nobody asks it`;
}

const shortly = (seconds: number) => (seconds < 2 ? `${Math.round(seconds * 1000)} ms` : duration(seconds));

const isLoaded = (of: Deployment) => of.state !== "unloaded" && of.state !== "failed";

/** Loads and unloads a model. A load that was asked for is asked for again until the model runs, so it keeps its turn. */
export function Acts({ of, onChange }: { of?: Deployment; onChange: () => void }) {
  const [isWanted, setWanted] = useState(false);
  const [failure, setFailure] = useState<Failure>();

  async function wish(what: "warm" | "unload") {
    setFailure(undefined);
    setWanted(what === "warm");
    try {
      const params = { path: { model_id: of!.id } };
      await ask(api.POST(`/v1/x/deployments/{model_id}/${what}`, { params }));
      onChange();
    } catch (error) {
      setFailure(Failure.of(error));
      setWanted(false);
    }
  }

  useEffect(() => {
    if (isWanted && of?.state === "waiting") void wish("warm");
    if (of?.state === "running" || of?.state === "failed") setWanted(false);
  }, [of]);
  if (!of) return null;
  return (
    <>
      {isLoaded(of) ? (
        !of.attached_to && (
          <button onClick={() => wish("unload")} aria-label={`Unload ${of.id}`}>
            Unload
          </button>
        )
      ) : (
        <button onClick={() => wish("warm")} aria-label={`Load ${of.id}`}>
          Load
        </button>
      )}
      {failure && <FailureNote failure={failure} />}
    </>
  );
}
