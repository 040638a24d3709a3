import { useState } from "preact/hooks";
import { api, ask, Failure, type Permission } from "../../api/client";
import { FailureNote, Show, useLoaded } from "../../parts/loading/loading";
import { moment } from "../../parts/words/words";

const ROUTE = "/v1/fine_tuning/checkpoints/{model_id}/permissions";
const MOST = 100;

/** The projects that may use the model. Only an admin of the project that owns it sees and changes them. */
export function Sharing({ model }: { model: string }) {
  const path = { model_id: model };
  const loaded = useLoaded(
    (signal) => ask(api.GET(ROUTE, { params: { path, query: { limit: MOST } }, signal })),
    [model],
  );
  const [failure, setFailure] = useState<Failure>();

  async function change(act: () => Promise<{ error?: unknown; response: Response }>) {
    setFailure(undefined);
    try {
      const { error, response } = await act();
      if (!response.ok) throw Failure.answered(response.status, error);
      loaded.again();
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  function share(event: SubmitEvent) {
    event.preventDefault();
    const form = event.currentTarget as HTMLFormElement;
    const project_ids = [String(new FormData(form).get("project")).trim()];
    void change(async () => {
      const answer = await api.POST(ROUTE, { params: { path }, body: { project_ids } });
      if (answer.response.ok) form.reset();
      return answer;
    });
  }

  function revoke(permission: Permission) {
    const params = { path: { ...path, permission_id: permission.id } };
    void change(() => api.DELETE(`${ROUTE}/{permission_id}`, { params }));
  }

  return (
    <section class="panel">
      <h2>Shared with</h2>
      <Show of={loaded}>
        {({ data }) => (
          <>
            {data.length === 0 && <p class="note">No other project uses this model.</p>}
            {data.map((permission) => (
              <div class="model" key={permission.id}>
                <div>
                  <code>{permission.project_id}</code> <small>since {moment(permission.created_at)}</small>
                </div>
                <button onClick={() => revoke(permission)} aria-label={`Stop sharing with ${permission.project_id}`}>
                  Stop sharing
                </button>
              </div>
            ))}
            <form onSubmit={share}>
              <label for="project">Id of a project</label>
              <input id="project" name="project" required placeholder="proj_…" aria-describedby="project-hint" />
              <p class="hint" id="project-hint">
                Its keys may ask the model and start jobs from it. They cannot download, share or delete it.
              </p>
              <button>Share</button>
            </form>
          </>
        )}
      </Show>
      {failure && <FailureNote failure={failure} />}
    </section>
  );
}
