import { useEffect } from "preact/hooks";
import { api, ask } from "../../api/client";
import { useFile } from "../../parts/file-report/file-report";
import { valueOf } from "../../parts/form/field";
import { Making, useSending } from "../../parts/form/sending";
import { bodyOf, draftOf } from "../../parts/job-form/draft";
import { Data, More, Objective, Start, Training } from "../../parts/job-form/fields";
import { completed, loadKnown, type Known } from "../../parts/job-form/known";
import { Plan, usePlan } from "../../parts/job-form/plan";
import { Show, useLoaded } from "../../parts/loading/loading";
import { route, setQuery } from "../../parts/route/route";

const PATH = "/v1/fine_tuning/jobs";

export function NewJob() {
  const known = useLoaded(loadKnown, []);
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

/** Writes the request of an earlier job into the address, and so into the form. */
function Again({ id, known }: { id: string; known: Known }) {
  const job = useLoaded(
    (signal) => ask(api.GET("/v1/fine_tuning/jobs/{job_id}", { params: { path: { job_id: id } }, signal })),
    [id],
  );
  useEffect(() => {
    if (job.value) setQuery({ again: null, ...draftOf(job.value, known.methods, known.options) }, { replaces: true });
  }, [job.value]);
  return (
    <Show of={job} list="jobs">
      {() => <p class="note">Loading…</p>}
    </Show>
  );
}

function Form({ known }: { known: Known }) {
  const kind = useFile(valueOf("training_file")).value?.x_raydpo.report?.kind;
  const draft = completed(Object.fromEntries(route.value.query), known, kind);
  const body = bodyOf(draft);
  const planned = usePlan(body, "");
  const sending = useSending(body, (headers) => ask(api.POST(PATH, { body, headers })), "jobs");
  const shared = { known, draft, at: "" };
  return (
    <Making
      sending={sending}
      models={known.models}
      refusal={planned.refusal}
      act="Submit the job"
      path={PATH}
      body={body}
      aside={<Plan of={planned} body={body} at="" />}
    >
      <Data {...shared} />
      <Start {...shared} />
      <Objective {...shared} kind={kind} />
      <Training {...shared} />
      <More {...shared} />
    </Making>
  );
}
