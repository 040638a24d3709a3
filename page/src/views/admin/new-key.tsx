import { useState } from "preact/hooks";
import { api, ask, Failure, type Key, type NewKey, type Project } from "../../api/client";
import { FailureNote } from "../../parts/loading/loading";
import { visible } from "../../parts/words/words";
import { Secret } from "./secret";

const DAY = 86_400;
const SCOPES: Record<Key["scopes"][number], string> = {
  read: "reads everything of its project",
  write: "uploads files, submits jobs, and changes what its project owns",
  inference: "asks models",
  admin: "manages keys, projects, usage and the audit log",
};
const USUAL = ["read", "write", "inference"];

/** The text of a new key. It is missing if the request was sent again, because the first answer was lost. */
export function NewSecret({ made, onDone }: { made: NewKey; onDone: () => void }) {
  const title = `The key ${visible(made.name)}`;
  if (made.value !== null) return <Secret title={title} what="key" value={made.value} onDone={onDone} />;
  return (
    <section class="panel">
      <h2>{title}</h2>
      <p class="bad">The answer with the key was lost. Revoke this key, and make another one.</p>
    </section>
  );
}

export function MakeKey({ projects, onMade }: { projects: Project[]; onMade: (key: NewKey) => void }) {
  const [failure, setFailure] = useState<Failure>();
  const [isBusy, setBusy] = useState(false);

  async function make(event: SubmitEvent) {
    event.preventDefault();
    const form = event.currentTarget as HTMLFormElement;
    setFailure(undefined);
    setBusy(true);
    try {
      onMade(await ask(api.POST("/v1/x/keys", { body: bodyOf(new FormData(form)) })));
      form.reset();
    } catch (error) {
      setFailure(Failure.of(error));
    }
    setBusy(false);
  }

  return (
    <form class="panel" onSubmit={make}>
      <h2>Make a key</h2>
      <div class="fields">
        <div>
          <label for="name">Name</label>
          <input id="name" name="name" required maxLength={64} placeholder="such as ci" />
        </div>
        <div>
          <label for="of-project">Project</label>
          <select id="of-project" name="project">
            <option value="">that of your own key</option>
            {projects
              .filter((project) => !project.archived_at)
              .map((project) => (
                <option value={project.id}>{visible(project.name)}</option>
              ))}
          </select>
        </div>
      </div>
      <fieldset class="plain">
        <legend>Scopes</legend>
        {Object.entries(SCOPES).map(([scope, what]) => (
          <label class="check" key={scope}>
            <input type="checkbox" name="scope" value={scope} defaultChecked={USUAL.includes(scope)} /> <b>{scope}</b> {what}
          </label>
        ))}
      </fieldset>
      <div class="fields">
        <Amount name="days" label="Days until it expires" empty="never" />
        <Amount name="requests" label="Requests a minute" />
        <Amount name="tokens" label="Tokens a minute" />
      </div>
      {failure && <FailureNote failure={failure} />}
      <div class="acts">
        <button class="main" disabled={isBusy}>
          Make the key
        </button>
      </div>
    </form>
  );
}

function Amount({ name, label, empty = "no limit of its own" }: { name: string; label: string; empty?: string }) {
  return (
    <div>
      <label for={name}>{label}</label>
      <input id={name} name={name} type="number" min={1} step={1} placeholder={`empty: ${empty}`} />
    </div>
  );
}

function bodyOf(fields: FormData) {
  const number = (name: string) => (fields.get(name) ? Number(fields.get(name)) : undefined);
  const days = number("days");
  return {
    name: String(fields.get("name")).trim(),
    project_id: String(fields.get("project")) || undefined,
    scopes: fields.getAll("scope") as Key["scopes"],
    requests_per_minute: number("requests"),
    tokens_per_minute: number("tokens"),
    expires_at: days && Math.floor(Date.now() / 1000 + days * DAY),
  };
}
