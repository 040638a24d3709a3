import { api, ask, type CreateSweep } from "../../api/client";
import { useFile } from "../../parts/file-report/file-report";
import { Panels } from "../../parts/form/described";
import { within, type Draft } from "../../parts/form/draft";
import { valueOf } from "../../parts/form/field";
import { bodyOf, describe, type Described, type Uses } from "../../parts/form/schema";
import { Making, useSending } from "../../parts/form/sending";
import { bodyOf as jobOf } from "../../parts/job-form/draft";
import { Data, More, Objective, Start, Training } from "../../parts/job-form/fields";
import { completed, loadKnown, type Known as KnownOfJobs } from "../../parts/job-form/known";
import { Plan, usePlan } from "../../parts/job-form/plan";
import { Show, useLoaded } from "../../parts/loading/loading";
import { route } from "../../parts/route/route";
import { Parameters, parametersOf } from "./parameters";

const PATH = "/v1/x/sweeps";
const AT = "job."; // where the job stands in the draft
const PANELS = { Search: ["search", "max_running_jobs"], "What a good trial is": ["metric"] };
const USES: Uses = {
  "search.num_trials": ["search.type", ["random", "tpe"]],
  "search.seed": ["search.type", ["random", "tpe"]],
};

interface Known extends KnownOfJobs {
  fields: Described[];
  parameter: Described[]; // the fields of a parameter
}

export function NewSweep() {
  const known = useLoaded(load, []);
  return (
    <>
      <div class="heading">
        <h1>New sweep</h1>
      </div>
      <Show of={known}>{(value) => <Form known={value} />}</Show>
    </>
  );
}

async function load(signal: AbortSignal): Promise<Known> {
  const [fields, parameter, known] = await Promise.all([describe("CreateSweep"), describe("Parameter"), loadKnown(signal)]);
  return { ...known, fields, parameter };
}

function Form({ known }: { known: Known }) {
  const kind = useFile(valueOf(`${AT}training_file`)).value?.x_raydpo.report?.kind;
  const draft: Draft = Object.fromEntries(route.value.query);
  const ofJob = completed(within(draft, AT), known, kind);
  const job = jobOf(ofJob);
  const of = { job, parameters: parametersOf(draft), ...bodyOf(known.fields, draft, USES) };
  const body = of as unknown as CreateSweep;
  const planned = usePlan(job, AT);
  const sending = useSending(body, (headers) => ask(api.POST(PATH, { body, headers })), "sweeps");
  const shared = { known, draft: ofJob, at: AT };
  const words = known.fields.find(({ name }) => name === "parameters")!.option.description;
  return (
    <Making
      sending={sending}
      models={known.models}
      refusal={planned.refusal}
      act="Create the sweep"
      path={PATH}
      body={body}
      aside={<Plan of={planned} body={job} at={AT} />}
    >
      <Data {...shared} />
      <Start {...shared} />
      <Objective {...shared} kind={kind} />
      <Parameters known={known} of={known.parameter} words={words} draft={draft} method={ofJob["method.type"]!} />
      <Panels
        of={known.fields}
        draft={draft}
        uses={USES}
        panels={PANELS}
        elsewhere={["job", "parameters"]}
        more="More options of the sweep"
      />
      <Training {...shared} />
      <More {...shared} title="More options of the jobs" />
    </Making>
  );
}
