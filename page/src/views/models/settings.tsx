import { api, ask, type Deployment, type DeploymentSettings, type Model } from "../../api/client";
import { Panels } from "../../parts/form/described";
import type { Values } from "../../parts/form/draft";
import { bodyOf, describe, type Described, type Uses } from "../../parts/form/schema";
import { Making, useSending } from "../../parts/form/sending";
import { Show, useLoaded } from "../../parts/loading/loading";
import { href, route } from "../../parts/route/route";
import { flat } from "../../parts/settings/settings";

const OF_REWARD_MODELS = ["replicas", "pinned", "idle_seconds", "dtype", "num_gpus", "max_model_len"]; // vLLM's are not
const PANELS = {
  "How an adapter is served": ["mode"],
  Replicas: ["replicas"],
  "Hardware and memory": ["num_gpus", "dtype", "quantization", "gpu_memory_utilization", "max_model_len"],
  "How long it stays loaded": ["pinned", "idle_seconds"],
};

interface Known {
  deployment: Deployment;
  fields: Described[];
}

/** The form for how a model is served. The address holds all settings that are chosen; the others are the defaults. */
export function Settings({ id }: { id: string }) {
  const known = useLoaded((signal) => load(id, signal), [id]);
  return (
    <>
      <div class="heading">
        <div class="title">
          <h1>How it is served</h1>
          <small class="id">
            <a href={href(["models", id])}>{id}</a>
          </small>
        </div>
      </div>
      <Show of={known} list="models">
        {(value) => <Form known={value} />}
      </Show>
    </>
  );
}

/** The address of the form, filled in with what is chosen now. */
export const toSettings = ({ id, chosen }: Deployment) => href(["models", id, "settings"], Object.fromEntries(flat(chosen)));

async function load(id: string, signal: AbortSignal): Promise<Known> {
  const params = { path: { model_id: id } };
  const [model, deployment, fields] = await Promise.all([
    ask(api.GET("/v1/models/{model_id}", { params, signal })),
    ask(api.GET("/v1/x/deployments/{model_id}", { params, signal })),
    describe("DeploymentSettings"),
  ]);
  const own = fields.filter(({ name }) => isOf(model, name));
  return { deployment, fields: withDefaults(own, deployment.settings, deployment.chosen) };
}

function isOf({ x_raydpo: { kind, adapter } }: Model, name: string): boolean {
  if (kind === "reward") return OF_REWARD_MODELS.includes(name);
  return name !== "mode" || adapter !== "none";
}

/** Returns the fields with the defaults of this model, which are its settings where none is chosen. */
function withDefaults(fields: Described[], settings: Values, chosen: Values): Described[] {
  return fields.map((field) => {
    const { name, option, inner } = field;
    const [setting, choice] = [settings[name], chosen[name]];
    if (inner) return { ...field, inner: withDefaults(inner, (setting ?? {}) as Values, (choice ?? {}) as Values) };
    const unset = option.choices ? null : undefined;
    return { ...field, option: { ...option, default: (choice === undefined ? setting : null) ?? unset } };
  });
}

function Form({ known: { deployment, fields } }: { known: Known }) {
  const { id, attached_to } = deployment;
  const uses: Uses = {}; // an adapter has settings of its own only if it is merged
  if (attached_to) for (const { path } of fields) if (path !== "mode") uses[path] = ["mode", ["merged"]];
  const draft = Object.fromEntries(route.value.query);
  const body = bodyOf(fields, draft, uses) as DeploymentSettings;
  const params = { path: { model_id: id } };
  const put = (headers: { "idempotency-key": string }) => ask(api.PUT("/v1/x/deployments/{model_id}", { params, body, headers }));
  return (
    <Making
      sending={useSending(body, put, "models")}
      models={[]}
      act="Store the settings"
      method="PUT"
      path={`/v1/x/deployments/${id}`}
      body={body}
      aside={<Words of={deployment} />}
    >
      <Panels of={fields} draft={draft} uses={uses} panels={PANELS} />
    </Making>
  );
}

function Words({ of: { id, attached_to } }: { of: Deployment }) {
  return (
    <>
      {attached_to && (
        <p>
          The adapter is attached to the engine of <a href={href(["models", attached_to])}>{attached_to}</a>, and served with
          the settings of that model. It has settings of its own if <code>mode</code> is <code>merged</code>.
        </p>
      )}
      <p class="note">
        A field that is empty has the default. If the model is loaded, new replicas take the place of the old ones, which
        finish their answers first.
      </p>
      {[...route.value.query].length > 0 && <a href={href(["models", id, "settings"])}>All defaults</a>}
    </>
  );
}
