import { api, ask } from "../../api/client";
import { Show, useLoaded } from "../../parts/loading/loading";
import { href, route, setQuery } from "../../parts/route/route";
import { visible } from "../../parts/words/words";

const LINES = 1000;
const CLOSED = { log: null, attempt: null, after: null };

/** What the processes of an attempt printed. It is read when the reader opens it. */
export function Logs({ id }: { id: string }) {
  const isOpen = route.value.query.has("log");
  return (
    <details
      class="panel"
      open={isOpen}
      onToggle={(event) => {
        if (event.currentTarget.open !== isOpen) setQuery(isOpen ? CLOSED : { log: "driver" }, { replaces: true });
      }}
    >
      <summary>Logs of attempts</summary>
      {isOpen && <Log id={id} />}
    </details>
  );
}

function Log({ id }: { id: string }) {
  const { path, query } = route.value;
  const source = query.get("log") ?? "driver";
  const attempt = Number(query.get("attempt")) || undefined;
  const after = Number(query.get("after")) || 0; // the byte at which the first line begins
  const loaded = useLoaded((signal) => read(id, { source, attempt, after, limit: LINES }, signal), [
    id,
    source,
    attempt,
    after,
  ]);
  const choose = (name: string, value: string) => setQuery({ [name]: value, after: null }, { replaces: true });
  const at = (next: number | null) => href(path, { ...Object.fromEntries(query), after: next });
  return (
    <Show of={loaded}>
      {(log) => (
        <>
          <div class="acts">
            <Choice name="Attempt" of={log.attempts.map(String)} value={String(log.attempt)} choose={(value) => choose("attempt", value)} />
            <Choice name="Process" of={log.sources} value={log.source} choose={(value) => choose("log", value)} />
            <button onClick={loaded.again}>Read again</button>
          </div>
          {log.data.length ? (
            <pre class="log" tabIndex={0} aria-label="Lines of the log">
              {visible(log.data.join("\n"))}
            </pre>
          ) : (
            <p class="note">There are no lines. They come a few seconds after a process prints them.</p>
          )}
          <nav class="pages" aria-label="Pages of the log">
            {after > 0 && <a href={at(null)}>First lines</a>}
            {log.has_more && <a href={at(log.next)}>Further lines</a>}
          </nav>
        </>
      )}
    </Show>
  );
}

interface ChoiceProps {
  name: string;
  of: string[];
  value: string;
  choose: (value: string) => void;
}

function Choice({ name, of, value, choose }: ChoiceProps) {
  if (!of.length) return null;
  return (
    <label>
      {name}{" "}
      <select value={value} onChange={(event) => choose(event.currentTarget.value)}>
        {of.map((each) => (
          <option>{each}</option>
        ))}
      </select>
    </label>
  );
}

type LogQuery = { source: string; attempt?: number; after: number; limit: number };

function read(id: string, query: LogQuery, signal: AbortSignal) {
  const params = { path: { job_id: id }, query };
  return ask(api.GET("/v1/x/jobs/{job_id}/logs", { params, signal }));
}
