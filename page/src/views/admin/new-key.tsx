import { useEffect, useRef, useState } from "preact/hooks";
import { api, ask, Failure, type Key, type NewKey, type Project } from "../../api/client";
import { FailureNote } from "../../parts/loading/loading";
import { visible } from "../../parts/words/words";

const DAY = 86_400;
const SCOPES: Record<Key["scopes"][number], string> = {
  read: "reads everything of its project",
  write: "uploads files, submits jobs, and changes what its project owns",
  inference: "asks models",
  admin: "manages keys, projects, usage and the audit log",
};
const USUAL = ["read", "write", "inference"];

/** The text of a new key, which is shown here and nowhere else. */
export function Secret({ made, onDone }: { made: NewKey; onDone: () => void }) {
  const field = useRef<HTMLInputElement>(null);
  const [said, setSaid] = useState("");
  useEffect(() => field.current?.focus(), []);

  async function copy() {
    field.current!.select();
    try {
      await navigator.clipboard.writeText(made.value!);
      setSaid("The key is copied.");
    } catch {
      setSaid("The browser does not let the page copy. The key is selected: press Ctrl and C."); // only on https
    }
  }

  return (
    <section class="panel" aria-label="The new key">
      <h2>The key {visible(made.name)}</h2>
      {made.value === null ? (
        <p class="bad">The answer with the key was lost. Revoke this key, and make another one.</p>
      ) : (
        <>
          <label for="secret">This is the only time that it is shown. Copy it to where it is needed.</label>
          <input id="secret" ref={field} readOnly value={made.value} class="id" onFocus={(event) => event.currentTarget.select()} />
          <div class="acts">
            <button class="main" onClick={copy}>
              Copy
            </button>
            <button onClick={onDone}>Done</button>
            <span role="status">{said}</span>
          </div>
        </>
      )}
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
