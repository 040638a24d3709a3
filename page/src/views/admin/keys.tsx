import { useState } from "preact/hooks";
import { api, ask, Failure, type Key, type NewKey, type Project } from "../../api/client";
import { AskFirst } from "../../parts/dialog/dialog";
import { FailureNote, Show, useLoaded } from "../../parts/loading/loading";
import { href, route } from "../../parts/route/route";
import { moment, visible, zone } from "../../parts/words/words";
import { loadProjects } from "./load";
import { MakeKey, NewSecret } from "./new-key";

const PAGE = 25;

/** The keys that the reader manages, and the form that makes one. */
export function Keys() {
  const after = route.value.query.get("after") ?? undefined;
  const projects = useLoaded(loadProjects, []);
  const keys = useLoaded(
    (signal) => ask(api.GET("/v1/x/keys", { params: { query: { limit: PAGE, after } }, signal })),
    [after],
  );
  const [made, setMade] = useState<NewKey>();
  const [failure, setFailure] = useState<Failure>();

  async function revoke(id: string) {
    setFailure(undefined);
    try {
      await ask(api.POST("/v1/x/keys/{key_id}/revoke", { params: { path: { key_id: id } } }));
      keys.again();
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  return (
    <>
      <div class="heading">
        <h1>Keys</h1>
      </div>
      {made && <NewSecret key={made.id} made={made} onDone={() => setMade(undefined)} />}
      {failure && <FailureNote failure={failure} />}
      <Show of={keys}>
        {(page) => (
          <>
            {page.data.length ? (
              <Table keys={page.data} projects={projects.value ?? []} revoke={revoke} />
            ) : (
              <p class="note">
                {after ? "There are no older keys." : "There is only the key of the settings. Make one for each program below."}
              </p>
            )}
            <nav class="pages" aria-label="Pages">
              {after && <a href={href(["admin", "keys"])}>Newest keys</a>}
              {page.has_more && <a href={href(["admin", "keys"], { after: page.last_id })}>Older keys</a>}
            </nav>
            <MakeKey
              projects={projects.value ?? []}
              onMade={(key) => {
                setMade(key);
                keys.again();
              }}
            />
          </>
        )}
      </Show>
    </>
  );
}

interface TableProps {
  keys: Key[];
  projects: Project[];
  revoke: (id: string) => void;
}

function Table({ keys, projects, revoke }: TableProps) {
  const nameOf = (id: string) => projects.find((project) => project.id === id)?.name ?? id;
  return (
    <table class="list">
      <thead>
        <tr>
          <th>Key</th>
          <th>Project</th>
          <th>Scopes</th>
          <th>State</th>
          <th>Last used</th>
          <th>
            <span class="unseen">Acts</span>
          </th>
        </tr>
      </thead>
      <tbody>
        {keys.map((key) => (
          <tr key={key.id}>
            <th scope="row">
              {visible(key.name)}
              <small class="id">{key.redacted_value}</small>
              <small class="id">{key.id}</small>
            </th>
            <td data-label="Project">{nameOf(key.project_id)}</td>
            <td data-label="Scopes">
              {key.scopes.join(", ")}
              <Limits of={key} />
            </td>
            <td data-label="State" title={zone()}>
              {stateOf(key)}
            </td>
            <td data-label="Last used" title={zone()}>
              {key.last_used_at ? moment(key.last_used_at) : "never"}
            </td>
            <td>
              {!key.revoked_at && (
                <AskFirst act="Revoke" question={`Revoke the key ${visible(key.name)}?`} refusal="Keep it" onAgree={() => revoke(key.id)}>
                  <p>It stops working within a second, and for good.</p>
                </AskFirst>
              )}
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

function Limits({ of: { requests_per_minute, tokens_per_minute } }: { of: Key }) {
  const told = [
    requests_per_minute !== null && `${requests_per_minute} requests a minute`,
    tokens_per_minute !== null && `${tokens_per_minute} tokens a minute`,
  ].filter(Boolean);
  return told.length ? <small>at most {told.join(", ")}</small> : null;
}

function stateOf({ revoked_at, expires_at }: Key): string {
  if (revoked_at) return `revoked ${moment(revoked_at)}`;
  if (!expires_at) return "works";
  return expires_at * 1000 <= Date.now() ? `expired ${moment(expires_at)}` : `works until ${moment(expires_at)}`;
}
