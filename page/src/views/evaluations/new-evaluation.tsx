import { api, ask, type CreateEvaluation } from "../../api/client";
import { Panels } from "../../parts/form/described";
import { loadModels } from "../../parts/form/models";
import { bodyOf, describe, usesOfJudge, type Described, type Uses } from "../../parts/form/schema";
import { Making, useSending } from "../../parts/form/sending";
import { Show, useLoaded } from "../../parts/loading/loading";
import { route } from "../../parts/route/route";

const PATH = "/v1/x/evaluations";
const PANELS = {
  "What it finds out": ["kind", "model", "baseline", "reference", "beta", "num_samples"],
  Prompts: ["file", "rows"],
  Judge: ["judge"],
};
const USES: Uses = {
  baseline: ["kind", ["compare"]],
  judge: ["kind", ["compare", "score", "samples"]],
  num_samples: ["kind", ["samples"]],
  reference: ["kind", ["preferences", "drift"]],
  beta: ["kind", ["preferences"]],
  sampling: ["kind", ["compare", "score", "samples", "drift"]],
  ...usesOfJudge("judge"),
};

interface Known {
  fields: Described[];
  models: string[];
}

export function NewEvaluation() {
  const known = useLoaded(load, []);
  return (
    <>
      <div class="heading">
        <h1>New evaluation</h1>
      </div>
      <Show of={known}>{(value) => <Form known={value} />}</Show>
    </>
  );
}

async function load(signal: AbortSignal): Promise<Known> {
  const [fields, models] = await Promise.all([describe("CreateEvaluation"), loadModels(signal)]);
  return { fields, models };
}

function Form({ known: { fields, models } }: { known: Known }) {
  const draft = { kind: "compare", ...Object.fromEntries(route.value.query) };
  const body = bodyOf(fields, draft, USES) as unknown as CreateEvaluation;
  const sending = useSending(body, (headers) => ask(api.POST(PATH, { body, headers })), "evaluations");
  return (
    <Making sending={sending} models={models} act="Create the evaluation" path={PATH} body={body}>
      <Panels of={fields} draft={draft} uses={USES} panels={PANELS} />
    </Making>
  );
}
