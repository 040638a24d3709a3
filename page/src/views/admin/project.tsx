import { useState } from "preact/hooks";
import { api, ask, Failure, type Project as ProjectObject } from "../../api/client";
import { AskFirst } from "../../parts/dialog/dialog";
import { Fact } from "../../parts/fact/fact";
import { FailureNote, Show, useLoaded } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { moment, visible } from "../../parts/words/words";
import { LIMITS, shown } from "./limits";

export function Project({ id }: { id: string }) {
  const path = { project_id: id };
  const loaded = useLoaded(
    async (signal) => {
      const [project, usage] = await Promise.all([
        ask(api.GET("/v1/x/projects/{project_id}", { params: { path }, signal })),
        ask(api.GET("/v1/x/projects/{project_id}/usage", { params: { path }, signal })),
      ]);
      return { project, usage };
    },
    [id],
  );
  const [failure, setFailure] = useState<Failure>();

  async function archive() {
    setFailure(undefined);
    try {
      await ask(api.POST("/v1/x/projects/{project_id}/archive", { params: { path } }));
      loaded.again();
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  async function remove() {
    setFailure(undefined);
    try {
      await ask(api.DELETE("/v1/x/projects/{project_id}", { params: { path } }));
      location.hash = href(["admin", "projects"]);
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  return (
    <Show of={loaded}>
      {({ project, usage }) => (
        <>
          <div class="heading">
            <div class="title">
              <h1>{visible(project.name)}</h1>
              <small class="id">{project.id}</small>
            </div>
            {project.archived_at ? (
              <>
                <span class="status">archived {moment(project.archived_at)}</span>
                <AskFirst act="Delete the project" question="Delete this project?" refusal="Keep it" onAgree={remove}>
                  <p>Its files, jobs, models and keys are deleted. This cannot be undone.</p>
                </AskFirst>
              </>
            ) : (
              <AskFirst act="Archive the project" question="Archive this project?" refusal="Keep it" onAgree={archive}>
                <p>Its keys stop working for good. Its files, jobs and models stay.</p>
              </AskFirst>
            )}
          </div>
          {failure && <FailureNote failure={failure} />}
          <div class="columns">
            <section class="panel">
              <h2>What it uses</h2>
              <dl>
                {LIMITS.map(({ name, label }) => {
                  const { used, limit } = usage.limits[name]!;
                  return (
                    <Fact key={name} name={label}>
                      {shown(name, used)} {limit === null ? <small>no limit</small> : `of ${shown(name, limit)}`}
                    </Fact>
                  );
                })}
                {Object.entries(usage.jobs).map(([state, number]) => (
                  <Fact key={state} name={`Jobs ${state}`}>
                    {number}
                  </Fact>
                ))}
              </dl>
            </section>
            {!project.archived_at && <Change key={project.id} project={project} onChange={loaded.again} />}
          </div>
        </>
      )}
    </Show>
  );
}

function Change({ project, onChange }: { project: ProjectObject; onChange: () => void }) {
  const [failure, setFailure] = useState<Failure>();
  const [said, setSaid] = useState("");

  async function change(event: SubmitEvent) {
    event.preventDefault();
    const fields = new FormData(event.currentTarget as HTMLFormElement);
    const number = (name: string) => (fields.get(name) === "" ? null : Number(fields.get(name)));
    const limits = Object.fromEntries(LIMITS.map(({ name }) => [name, number(name)]));
    const body = { name: String(fields.get("name")).trim(), weight: number("weight") ?? 1, ...limits };
    setFailure(undefined);
    setSaid("");
    try {
      await ask(api.POST("/v1/x/projects/{project_id}", { params: { path: { project_id: project.id } }, body }));
      setSaid("The changes are stored.");
      onChange();
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  return (
    <form class="panel" onSubmit={change}>
      <h2>Name and limits</h2>
      <label for="name">Name</label>
      <input id="name" name="name" required maxLength={64} defaultValue={project.name} />
      <label for="weight">Weight, its share of the cluster beside other projects</label>
      <input id="weight" name="weight" type="number" min={0.01} max={100} step="any" required defaultValue={String(project.weight)} />
      {LIMITS.map(({ name, label, step }) => (
        <div key={name}>
          <label for={name}>{label}</label>
          <input id={name} name={name} type="number" min={0} step={step} placeholder="empty: no limit" defaultValue={String(project[name] ?? "")} />
        </div>
      ))}
      {failure && <FailureNote failure={failure} />}
      <div class="acts">
        <button class="main">Store the changes</button>
        <span role="status">{said}</span>
      </div>
    </form>
  );
}
