import { api, ask, type CreateRounds } from "../../api/client";
import { within, type Draft } from "../../parts/form/draft";
import { Group, Panels } from "../../parts/form/described";
import { bodyOf, describe, usesOfJudge, type Described, type Uses } from "../../parts/form/schema";
import { Making, useSending } from "../../parts/form/sending";
import { bodyOf as jobOf } from "../../parts/job-form/draft";
import { More, Name, Objective, Training, Validation } from "../../parts/job-form/fields";
import { completed, loadKnown, type Known as KnownOfJobs } from "../../parts/job-form/known";
import { Show, useLoaded } from "../../parts/loading/loading";
import { route } from "../../parts/route/route";

const PATH = "/v1/x/rounds";
const PANELS = {
  Policy: ["model", "num_rounds", "stop_if_not_better"],
  Prompts: ["file", "rows"],
  Judge: ["judge"],
  Answers: ["num_samples", "selection"],
};
const USES: Uses = {
  "selection.beta": ["selection.type", ["rso"]],
  "selection.num_accepted": ["selection.type", ["rso"]],
  ...usesOfJudge("judge"),
  ...usesOfJudge("evaluation.judge"),
};

interface Known extends KnownOfJobs {
  fields: Described[];
}

export function NewRounds() {
  const known = useLoaded(load, []);
  return (
    <>
      <div class="heading">
        <h1>New rounds</h1>
      </div>
      <Show of={known}>{(value) => <Form known={value} />}</Show>
    </>
  );
}

async function load(signal: AbortSignal): Promise<Known> {
  const [fields, known] = await Promise.all([describe("CreateRounds"), loadKnown(signal)]);
  return { ...known, fields };
}

function Form({ known }: { known: Known }) {
  const draft: Draft = Object.fromEntries(route.value.query);
  const { model: _, ...job } = completed(within(draft, "job."), known, undefined); // each round gives its own model
  const of = { ...bodyOf(known.fields, draft, USES), job: jobOf(job) };
  const body = of as unknown as CreateRounds;
  const sending = useSending(body, (headers) => ask(api.POST(PATH, { body, headers })), "rounds");
  const shared = { known, draft: job, at: "job." };
  const words = known.fields.find(({ name }) => name === "job")!.option.description;
  return (
    <Making sending={sending} models={known.models} act="Create the rounds" path={PATH} body={body}>
      <Panels
        of={known.fields}
        draft={draft}
        uses={USES}
        panels={PANELS}
        elsewhere={["job"]}
        more="More options of the rounds"
      />
      <Group path="job" title="The job of each round" words={words} class="panel">
        <Name at="job." />
        <Validation {...shared} />
      </Group>
      <Objective {...shared} />
      <Training {...shared} />
      <More {...shared} title="More options of the job" />
    </Making>
  );
}
