import { useState } from "preact/hooks";
import { api, Failure, type Deployment, type Model as ModelObject } from "../../api/client";
import { AskFirst } from "../../parts/dialog/dialog";
import { Download } from "../../parts/download/download";
import { Fact } from "../../parts/fact/fact";
import { FailureNote, Show, useFresh, useLoaded } from "../../parts/loading/loading";
import { href } from "../../parts/route/route";
import { moment } from "../../parts/words/words";
import { loadRow } from "./load";
import { whatIs } from "./models";
import { toSettings } from "./settings";
import { Sharing } from "./sharing";
import { Acts, State } from "./state";

export function Model({ id }: { id: string }) {
  const loaded = useLoaded((signal) => loadRow(id, signal), [id]);
  useFresh(loaded);
  return (
    <Show of={loaded} list="models">
      {({ model, deployment, trouble }) => (
        <>
          <Heading model={model} deployment={deployment} again={loaded.again} />
          {trouble && <p class="warn">{trouble}</p>}
          <div class="columns">
            <div>
              <Facts model={model} />
              {deployment && <Served of={deployment} />}
            </div>
            <div>
              <Weights model={model} />
              {model.x_raydpo.job && <Sharing model={id} />}
            </div>
          </div>
        </>
      )}
    </Show>
  );
}

interface HeadingProps {
  model: ModelObject;
  deployment?: Deployment;
  again: () => void;
}

function Heading({ model, deployment, again }: HeadingProps) {
  const [failure, setFailure] = useState<Failure>();

  async function remove() {
    setFailure(undefined);
    try {
      const { error, response } = await api.DELETE("/v1/models/{model_id}", { params: { path: { model_id: model.id } } });
      if (!response.ok) throw Failure.answered(response.status, error);
      location.hash = href("models");
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  const isReward = model.x_raydpo.kind === "reward"; // it writes no answers
  return (
    <>
      <div class="heading">
        <div class="title">
          <h1>{model.id}</h1>
          <State of={deployment} />
        </div>
        <div class="acts">
          <Acts of={deployment} onChange={again} />
          {!isReward && (
            <a class="button" href={href("ask", { a: model.id })}>
              Ask
            </a>
          )}
          <a class="button" href={href(["models", model.id, "rewards"])}>
            Score answers
          </a>
          <a class="button" href={href(["evaluations", "new"], { model: model.id, kind: isReward ? "preferences" : null })}>
            Evaluate
          </a>
          {model.x_raydpo.job && (
            <AskFirst act="Delete the model" question="Delete this model?" refusal="Keep it" onAgree={remove}>
              <p>Its weights are removed, for projects that share it as well. The job stays.</p>
            </AskFirst>
          )}
        </div>
      </div>
      {failure && <FailureNote failure={failure} />}
    </>
  );
}

function Facts({ model }: { model: ModelObject }) {
  const { job, root, quantization, adapter } = model.x_raydpo;
  return (
    <section class="panel">
      <h2>Model</h2>
      <dl>
        <Fact name="What it is">{whatIs(model)}</Fact>
        {job && (
          <>
            <Fact name="Base">
              <a href={href(["models", root])}>{root}</a>
            </Fact>
            <Fact name="Job">
              <a href={href(["jobs", job])}>{job}</a>
            </Fact>
            <Fact name="Created">{moment(model.created)}</Fact>
          </>
        )}
        {quantization && <Fact name="Quantization">{quantization}</Fact>}
        {adapter !== "none" && <Fact name="Adapter">{told(adapter)}</Fact>}
      </dl>
    </section>
  );
}

/** How the model is served, and the way to change that. */
function Served({ of }: { of: Deployment }) {
  const { settings, chosen, attached_to } = of;
  return (
    <section class="panel">
      <h2>How it is served</h2>
      {attached_to && (
        <p>
          As an adapter on the engine of <a href={href(["models", attached_to])}>{attached_to}</a>, whose settings these are.
        </p>
      )}
      <dl>
        {Object.entries(settings).map(([name, value]) => (
          <Fact key={name} name={name}>
            {told(value)} {name in chosen && <small>chosen</small>}
          </Fact>
        ))}
      </dl>
      <a class="button" href={toSettings(of)}>
        Change the settings
      </a>
    </section>
  );
}

function told(value: unknown): string {
  if (value === null) return "not set";
  if (typeof value !== "object") return String(value);
  return Object.entries(value)
    .map(([name, each]) => `${name} ${told(each)}`)
    .join(", ");
}

function Weights({ model }: { model: ModelObject }) {
  if (!model.x_raydpo.job) {
    return (
      <section class="panel">
        <h2>Weights</h2>
        <p class="note">A base model is the operator's. Download it where it came from.</p>
      </section>
    );
  }
  const isAdapter = model.x_raydpo.adapter !== "none";
  return (
    <section class="panel">
      <h2>Weights</h2>
      <p>
        A tar of a Hugging Face folder{isAdapter && " that holds the adapter"}. Into a folder, and with resumption:
      </p>
      <pre class="log" tabIndex={0} aria-label="Commands that download the weights">
        {[`raydpo models download ${model.id} ./weights`, isAdapter && `raydpo models download ${model.id} ./merged --format merged`]
          .filter(Boolean)
          .join("\n")}
      </pre>
      <Download model={model.id} />
    </section>
  );
}
