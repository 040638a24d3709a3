import { useState } from "preact/hooks";
import { Failure } from "../../api/client";
import { FailureNote } from "../../parts/loading/loading";
import { moment, visible } from "../../parts/words/words";
import type { Feed } from "./feed";

const LEVELS = { info: "", warn: "warn", error: "bad" };

export function Events({ feed }: { feed: Feed }) {
  const [failure, setFailure] = useState<Failure>();
  const older = () => {
    setFailure(undefined);
    feed.older().catch((error) => setFailure(Failure.of(error)));
  };
  return (
    <section class="panel">
      <h2>Events</h2>
      <div class="events" role="log" aria-label="Events, newest first" tabIndex={0}>
        <ol>
        {feed.messages.value.map((event) => (
          <li key={event.id} class={LEVELS[event.level]}>
            <time dateTime={new Date(event.created_at * 1000).toISOString()}>{moment(event.created_at)}</time>
            <span>
              {event.level !== "info" && <b>{event.level === "warn" ? "Warning" : "Error"}: </b>}
              {visible(event.message)}
            </span>
          </li>
        ))}
        </ol>
      </div>
      {failure && <FailureNote failure={failure} />}
      {feed.hasOlder.value && <button onClick={older}>Older events</button>}
    </section>
  );
}
