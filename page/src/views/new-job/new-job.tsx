import { useEffect, useRef, useState } from "preact/hooks";
import { api, ask, Failure, type FileReport, type Method, type Option } from "../../api/client";
import { useFile } from "../../parts/file-report/file-report";
import { FailureNote, Show, useLoaded } from "../../parts/loading/loading";
import { NoModels } from "../../parts/no-models/no-models";
import { href, route, setQuery } from "../../parts/route/route";
import { Data } from "./data";
import { bodyOf, draftOf, type Body, type Draft } from "./draft";
import { change, Field, OptionField, Prose, Refusal, TextField, valueOf } from "./field";
import { Plan, usePlan } from "./plan";

type Options = Record<string, Option>;

interface Known {
  methods: Method[];
  options: Options;
  models: string[];
}

const MAIN = ["adapter", "precision", "max_length"];
const ELSEWHERE = ["validation_share"];
const SUGGESTED: Record<NonNullable<FileReport["kind"]>, string> = {
  demonstrations: "supervised",
  pairs: "dpo",
  rankings: "dpo",
  ratings: "dpo",
  unpaired: "kto",
};

export function NewJob() {
  const known = useLoaded(load, []);
  const again = route.value.query.get("again");
  return (
    <>
      <div class="heading">
        <h1>New job</h1>
      </div>
      <Show of={known}>
        {(value) => (again ? <Again key={again} id={again} known={value} /> : <Form known={value} />)}
      </Show>
    </>
  );
}

async function load(signal: AbortSignal): Promise<Known> {
  const [methods, options, models] = await Promise.all([
    ask(api.GET("/v1/x/methods", { signal })),
    ask(api.GET("/v1/x/options", { signal })),
    ask(api.GET("/v1/models", { signal })),
  ]);
  return {
    methods: methods.data,
    options: Object.fromEntries(options.data.map(({ id, ...option }) => [id, option])),
    models: models.data.map((model) => model.id),
  };
}

/** Writes the request of an earlier job into the address, and so into the form. */
function Again({ id, known }: { id: string; known: Known }) {
  const job = useLoaded(
    (signal) => ask(api.GET("/v1/fine_tuning/jobs/{job_id}", { params: { path: { job_id: id } }, signal })),
    [id],
  );
  useEffect(() => {
    if (job.value) setQuery({ again: null, ...draftOf(job.value, known.methods, known.options) }, { replaces: true });
  }, [job.value]);
  return <Show of={job}>{() => <p class="note">Loading…</p>}</Show>;
}

/** What the address says, with what is chosen where it says nothing. */
function completed(draft: Draft, known: Known, kind: FileReport["kind"] | undefined): Draft {
  const chosen: Draft = { "method.type": (kind && SUGGESTED[kind]) ?? "dpo" };
  if (known.models[0]) chosen.model = known.models[0];
  return { ...chosen, ...draft };
}

function Form({ known }: { known: Known }) {
  const trainingFile = valueOf("training_file");
  const file = useFile(trainingFile).value;
  const kind = file?.x_raydpo.report?.kind;
  const draft = completed(Object.fromEntries(route.value.query), known, kind);
  const body = bodyOf(draft);
  const planned = usePlan(body);
  const { failure, isSending, send } = useSending(body);
  const refusal = failure ?? planned.refusal;
  return (
    <Refusal.Provider value={refusal}>
      <form class="new-job" onSubmit={send} noValidate>
        <div>
          <DataPart known={known} />
          <Start known={known} draft={draft} />
          <Objective known={known} draft={draft} kind={kind} />
          <Training known={known} draft={draft} />
          <More known={known} refusal={refusal} />
        </div>
        <div class="aside">
          <Plan of={planned} isReady={Boolean(body.model && (trainingFile || body.x_raydpo?.dataset))} />
          {failure && <FailureNote failure={failure} />}
          <button class="main" disabled={isSending}>
            {isSending ? "Submitting…" : "Submit the job"}
          </button>
        </div>
      </form>
    </Refusal.Provider>
  );
}

/** Submits the job, and opens it. The same job that is sent again after a lost answer is made once. */
function useSending(body: Body) {
  const [failure, setFailure] = useState<Failure>();
  const [isSending, setSending] = useState(false);
  const now = JSON.stringify(body);
  const sent = useRef({ body: "", key: "" });
  useEffect(() => setFailure(undefined), [now]);
  async function send(event: SubmitEvent) {
    event.preventDefault();
    setSending(true);
    setFailure(undefined);
    if (sent.current.body !== now) sent.current = { body: now, key: newKey() };
    try {
      const headers = { "idempotency-key": sent.current.key };
      const job = await ask(api.POST("/v1/fine_tuning/jobs", { body, headers }));
      location.hash = href(["jobs", job.id]);
    } catch (error) {
      const refused = Failure.of(error);
      setFailure(refused);
      if (refused.param) document.getElementById(refused.param)?.focus();
    }
    setSending(false);
  }
  return { failure, isSending, send };
}

const newKey = () => Array.from(crypto.getRandomValues(new Uint32Array(4)), (part) => part.toString(36)).join("-");

function DataPart({ known }: { known: Known }) {
  const files = useLoaded(
    async (signal) => (await ask(api.GET("/v1/files", { params: { query: { purpose: "fine-tune", limit: 100 } }, signal }))).data,
    [],
  );
  return (
    <>
      {files.failure && <FailureNote failure={files.failure} again={files.again} />}
      <Data files={files} share={known.options.validation_share} />
    </>
  );
}

function Start({ known, draft }: { known: Known; draft: Draft }) {
  const { models } = known;
  const model = draft.model ?? "";
  return (
    <fieldset class="panel">
      <legend>Model</legend>
      <Field path="model" label="Start from" hint={models.length ? "A base model, or a policy: a model that an earlier job has trained." : <NoModels />}>
        {(attributes) => (
          <select {...attributes} value={model} onChange={(event) => change("model", event.currentTarget.value)}>
            {!models.length && <option value="">no models</option>}
            {model && !models.includes(model) && <option>{model}</option>}
            {models.map((each) => (
              <option>{each}</option>
            ))}
          </select>
        )}
      </Field>
      <TextField
        path="suffix"
        label="Name"
        hint="A part of the name that the trained model, the policy, gets: letters, digits, _, . and -."
        placeholder="none"
      />
    </fieldset>
  );
}

function Objective({ known, draft, kind }: { known: Known; draft: Draft; kind?: FileReport["kind"] }) {
  const method = known.methods.find(({ id }) => id === draft["method.type"]);
  const learns = (each: Method) => !kind || each.learns_from.includes(kind);
  const options = Object.entries(method?.hyperparameters ?? {});
  return (
    <fieldset class="panel">
      <legend>Objective</legend>
      <Field path="method.type" label="Method" hint={method && <About method={method} />}>
        {(attributes) => (
          <select
            {...attributes}
            value={draft["method.type"]}
            onChange={(event) => change("method.type", event.currentTarget.value)}
          >
            {known.methods.map((each) => (
              <option key={each.id} value={each.id}>
                {learns(each) ? each.id : `${each.id} (does not learn from ${kind})`}
              </option>
            ))}
          </select>
        )}
      </Field>
      <div class="options">
        {options.map(([name, option]) => (
          <OptionField key={name} path={`method.${method!.id}.hyperparameters.${name}`} option={option} />
        ))}
      </div>
    </fieldset>
  );
}

function About({ method }: { method: Method }) {
  return (
    <>
      <Prose text={method.description} /> It learns from {method.learns_from.join(", ")}
      {method.needs_reference ? " and compares with a reference model" : " and needs no reference model"}.{" "}
      {method.papers.map((paper, place) => (
        <>
          {place > 0 && ", "}
          <a href={paper} target="_blank" rel="noreferrer">
            {paper.replace("https://", "")}
          </a>
        </>
      ))}
    </>
  );
}

function Training({ known, draft }: { known: Known; draft: Draft }) {
  const method = known.methods.find(({ id }) => id === draft["method.type"]);
  const common = Object.entries(method?.common_hyperparameters ?? {});
  return (
    <fieldset class="panel">
      <legend>Training</legend>
      <div class="options">
        {common.map(([name, option]) => (
          <OptionField key={name} path={`method.${method!.id}.hyperparameters.${name}`} option={option} />
        ))}
        {MAIN.map((name) => (
          <OptionField key={name} path={`x_raydpo.${name}`} option={known.options[name]!} />
        ))}
      </div>
      {draft["x_raydpo.adapter"] !== "none" && (
        <details open={Object.keys(draft).some((path) => path.startsWith("x_raydpo.adapter."))}>
          <summary>Options of the adapter</summary>
          <div class="options">
            {Object.entries(known.options)
              .filter(([name]) => name.startsWith("adapter."))
              .map(([name, option]) => (
                <OptionField key={name} path={`x_raydpo.${name}`} option={option} />
              ))}
          </div>
        </details>
      )}
    </fieldset>
  );
}

/** The rarer options. They are open if one of them is set or refused, so that no setting is hidden. */
function More({ known, refusal }: { known: Known; refusal?: Failure }) {
  const rest = Object.entries(known.options).filter(
    ([name]) => ![...MAIN, ...ELSEWHERE].includes(name) && !name.startsWith("adapter."),
  );
  const paths = ["seed", "metadata", ...rest.map(([name]) => `x_raydpo.${name}`)];
  return (
    <details class="panel" open={paths.some((path) => valueOf(path) || refusal?.param === path)}>
      <summary>More options</summary>
      <div class="options">
        <TextField
          path="seed"
          label={<code>seed</code>}
          hint="The same seed shuffles the rows in the same way. The service chooses one, and the job shows it."
          placeholder="chosen by the service"
        />
        <TextField
          path="metadata"
          label={<code>metadata</code>}
          hint={'Up to 16 texts of your own, such as {"team": "search"}.'}
          placeholder="none"
        />
        {rest.map(([name, option]) => (
          <OptionField key={name} path={`x_raydpo.${name}`} option={option} />
        ))}
      </div>
    </details>
  );
}
