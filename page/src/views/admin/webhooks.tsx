import { useState } from "preact/hooks";
import { api, ask, Failure, type NewWebhook, type Webhook } from "../../api/client";
import { AskFirst } from "../../parts/dialog/dialog";
import { FailureNote, Show, useLoaded } from "../../parts/loading/loading";
import { moment, visible, zone } from "../../parts/words/words";
import { Secret } from "./secret";

const MOST = 100; // that a project may have

/** The webhook endpoints of the project, to which the service tells the ends of jobs and evaluations, and the form for
 * a new one. */
export function Webhooks() {
  const loaded = useLoaded(load, []);
  const [made, setMade] = useState<NewWebhook>();
  const [failure, setFailure] = useState<Failure>();

  async function remove(id: string) {
    setFailure(undefined);
    try {
      await ask(api.DELETE("/v1/webhook_endpoints/{endpoint_id}", { params: { path: { endpoint_id: id } } }));
      if (made?.id === id) setMade(undefined);
      loaded.again();
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  return (
    <>
      <div class="heading">
        <h1>Webhooks</h1>
      </div>
      {made && (
        <Secret
          key={made.id}
          title={`The signing secret of ${visible(made.name)}`}
          what="signing secret"
          value={made.signing_secret}
          onDone={() => setMade(undefined)}
        />
      )}
      {failure && <FailureNote failure={failure} />}
      <Show of={loaded}>
        {({ webhooks, types }) => (
          <>
            {webhooks.length ? (
              <Table webhooks={webhooks} remove={remove} />
            ) : (
              <p class="note">
                There are no webhooks. The service sends a message to each one when a job or an evaluation of your project
                ends, signed with a secret that only the two of them know.
              </p>
            )}
            <Make
              types={types}
              onMade={(webhook) => {
                setMade(webhook);
                loaded.again();
              }}
            />
          </>
        )}
      </Show>
    </>
  );
}

async function load(signal: AbortSignal) {
  const [webhooks, types] = await Promise.all([
    ask(api.GET("/v1/webhook_endpoints", { params: { query: { limit: MOST } }, signal })),
    ask(api.GET("/v1/webhook_event_types", { signal })),
  ]);
  return { webhooks: webhooks.data, types: types.data };
}

function Table({ webhooks, remove }: { webhooks: Webhook[]; remove: (id: string) => void }) {
  return (
    <table class="list">
      <thead>
        <tr>
          <th>Webhook</th>
          <th>Messages</th>
          <th>State</th>
          <th>Created</th>
          <th>
            <span class="unseen">Acts</span>
          </th>
        </tr>
      </thead>
      <tbody>
        {webhooks.map((webhook) => (
          <tr key={webhook.id}>
            <th scope="row">
              {visible(webhook.name)}
              <small class="id">{visible(webhook.url)}</small>
              <small class="id">{webhook.id}</small>
            </th>
            <td data-label="Messages">
              {webhook.event_types.map((type) => (
                <div key={type}>{type}</div>
              ))}
            </td>
            <td data-label="State" title={zone()}>
              {webhook.x_raydpo.disabled_at ? `off since ${moment(webhook.x_raydpo.disabled_at)}, because it answered 410` : "on"}
            </td>
            <td data-label="Created" title={zone()}>
              {moment(webhook.created_at)}
            </td>
            <td>
              <div class="acts">
                <Test webhook={webhook} />
                <AskFirst
                  act="Delete"
                  question={`Delete the webhook ${visible(webhook.name)}?`}
                  refusal="Keep it"
                  onAgree={() => remove(webhook.id)}
                >
                  <p>Messages that wait for it are not sent.</p>
                </AskFirst>
              </div>
            </td>
          </tr>
        ))}
      </tbody>
    </table>
  );
}

/** Sends a sample of the first type of message now, and tells what the endpoint answers. */
function Test({ webhook }: { webhook: Webhook }) {
  const [said, setSaid] = useState("");
  const [failure, setFailure] = useState<Failure>();
  const [isSending, setSending] = useState(false);

  async function send() {
    setSaid("");
    setFailure(undefined);
    setSending(true);
    try {
      const params = { path: { endpoint_id: webhook.id } };
      const body = { event_type: webhook.event_types[0]! };
      const { status_code } = await ask(api.POST("/v1/webhook_endpoints/{endpoint_id}/test", { params, body }));
      setSaid(`It answered with status ${status_code}.`);
    } catch (error) {
      setFailure(Failure.of(error));
    }
    setSending(false);
  }

  return (
    <>
      <button onClick={send} disabled={isSending} aria-label={`Test ${visible(webhook.name)}`}>
        Test
      </button>
      <small role="status">{said}</small>
      {failure && <FailureNote failure={failure} />}
    </>
  );
}

function Make({ types, onMade }: { types: string[]; onMade: (webhook: NewWebhook) => void }) {
  const [failure, setFailure] = useState<Failure>();

  async function make(event: SubmitEvent) {
    event.preventDefault();
    const form = event.currentTarget as HTMLFormElement;
    const fields = new FormData(form);
    const text = (name: string) => String(fields.get(name)).trim();
    const body = { name: text("name"), url: text("url"), event_types: fields.getAll("type").map(String) };
    setFailure(undefined);
    try {
      onMade(await ask(api.POST("/v1/webhook_endpoints", { body })));
      form.reset();
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  return (
    <form class="panel" onSubmit={make}>
      <h2>Make a webhook</h2>
      <div class="fields">
        <div>
          <label for="name">Name</label>
          <input id="name" name="name" required maxLength={64} placeholder="such as chat" />
        </div>
        <div>
          <label for="url">URL</label>
          <input id="url" name="url" required placeholder="https://…" inputMode="url" autocomplete="off" />
        </div>
      </div>
      <fieldset class="plain">
        <legend>Messages</legend>
        {types.map((type) => (
          <label class="check" key={type}>
            <input type="checkbox" name="type" value={type} defaultChecked /> {type}
          </label>
        ))}
      </fieldset>
      {failure && <FailureNote failure={failure} />}
      <div class="acts">
        <button class="main">Make the webhook</button>
      </div>
    </form>
  );
}
