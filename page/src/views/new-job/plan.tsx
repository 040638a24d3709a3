import { useEffect, useState } from "preact/hooks";
import { api, ask, type Failure, type Plan as PlanObject } from "../../api/client";
import { Fact } from "../../parts/fact/fact";
import { useLoaded } from "../../parts/loading/loading";
import { bytes, visible, whole } from "../../parts/words/words";
import { textOf, type Body } from "./draft";
import { change } from "./field";

const SETTLE_MS = 400;
const UNPLANNED = ["model_unreadable", "model_unplannable"]; // such a job may still run

export interface Planned {
  plan?: PlanObject;
  refusal?: Failure; // of the job itself
  unplanned?: Failure;
}

/** Asks for the plan of the job once its writer has not changed it for a moment. */
export function usePlan(body: Body): Planned {
  const now = JSON.stringify(body);
  const [settled, setSettled] = useState(now);
  useEffect(() => {
    const timer = setTimeout(() => setSettled(now), SETTLE_MS);
    return () => clearTimeout(timer);
  }, [now]);
  const loaded = useLoaded((signal) => load(JSON.parse(settled) as Body, signal), [settled]);
  if (settled !== now) return {};
  const { value, failure } = loaded;
  if (!failure) return { plan: value };
  return UNPLANNED.includes(failure.code ?? "") ? { unplanned: failure } : { refusal: failure };
}

async function load(body: Body, signal: AbortSignal): Promise<PlanObject | undefined> {
  if (!body.model || !(body.training_file || body.x_raydpo?.dataset)) return undefined;
  return ask(api.POST("/v1/x/plans", { body, signal }));
}

export function Plan({ of, isReady }: { of: Planned; isReady: boolean }) {
  return (
    <section class="panel" aria-label="Plan">
      <h2>Plan</h2>
      <div role="status">{inWords(of, isReady)}</div>
      {of.plan && <Figures plan={of.plan} />}
    </section>
  );
}

function inWords({ plan, refusal, unplanned }: Planned, isReady: boolean) {
  if (!isReady) return <p class="note">Choose a model and a training file, and see here what the job needs.</p>;
  if (refusal) return <p class="bad">The service would refuse this job: {visible(refusal.message)}</p>;
  if (unplanned) return <p class="note">There is no plan, but the job may run. {visible(unplanned.message)}</p>;
  if (!plan) return <p class="note">Planning…</p>;
  const where = plan.device === "gpu" ? "GPU" : "machine";
  if (plan.fits === null) return <p class="warn">Whether the job fits is not known. Each worker needs {bytes(plan.needed_bytes)}.</p>;
  return (
    <p class={plan.fits ? "good" : "bad"}>
      {plan.fits ? "The job fits" : "The job does not fit"}: each of its workers needs {bytes(plan.needed_bytes)}, and
      the {where} has {bytes(plan.worker_bytes ?? 0)} for it.
    </p>
  );
}

function Figures({ plan }: { plan: PlanObject }) {
  const parts = Object.entries(plan.parts).filter(([, size]) => size > 0);
  const facts: [string, string | null][] = [
    ["Steps", plan.steps === null ? null : whole(plan.steps)],
    ["Tokens", plan.tokens === null ? null : whole(plan.tokens)],
    ["A checkpoint", bytes(plan.checkpoint_bytes)],
    ...parts.map(([name, size]): [string, string] => [`Memory: ${name.replaceAll("_", " ")}`, bytes(size)]),
  ];
  return (
    <>
      {plan.changes.map((each) => (
        <p key={each.field}>
          {visible(each.message)}{" "}
          <button type="button" onClick={() => change(each.field, textOf(each.value))}>
            Set {each.field.split(".").at(-1)} to {textOf(each.value)}
          </button>
        </p>
      ))}
      <dl>
        {facts.map(
          ([name, value]) =>
            value && (
              <Fact key={name} name={name}>
                {value}
              </Fact>
            ),
        )}
      </dl>
      {plan.notes.map((note) => (
        <p key={note} class="hint">
          {note}
        </p>
      ))}
    </>
  );
}
