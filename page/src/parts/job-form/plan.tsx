import { useEffect, useState } from "preact/hooks";
import { api, ask, Failure, type Plan as PlanObject } from "../../api/client";
import { Fact } from "../fact/fact";
import { textOf } from "../form/draft";
import { change } from "../form/field";
import { useLoaded } from "../loading/loading";
import { bytes, visible, whole } from "../words/words";
import type { Body } from "./draft";

const SETTLE_MS = 400;
const UNPLANNED = ["model_unreadable", "model_unplannable"]; // such a job may still run

export interface Planned {
  plan?: PlanObject;
  refusal?: Failure; // of the job itself
  unplanned?: Failure;
}

/** Asks for the plan of the job once its writer has not changed it for a moment. The job stands in the draft below `at`. */
export function usePlan(body: Body, at: string): Planned {
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
  if (UNPLANNED.includes(failure.code ?? "")) return { unplanned: failure };
  const { message, status, param, code } = failure;
  return { refusal: new Failure(message, status, param && at + param, code) };
}

const isReady = ({ model, training_file, x_raydpo }: Body) => Boolean(model && (training_file || x_raydpo?.dataset));

async function load(body: Body, signal: AbortSignal): Promise<PlanObject | undefined> {
  if (!isReady(body)) return undefined;
  return ask(api.POST("/v1/x/plans", { body, signal }));
}

interface Props {
  of: Planned;
  body: Body;
  at: string; // as above
}

export function Plan({ of, body, at }: Props) {
  return (
    <section class="panel" aria-label="Plan">
      <h2>Plan</h2>
      <div role="status">{inWords(of, isReady(body))}</div>
      {of.plan && <Figures plan={of.plan} at={at} />}
    </section>
  );
}

function inWords({ plan, refusal, unplanned }: Planned, isWhole: boolean) {
  if (!isWhole) return <p class="note">Choose a model and a training file, and see here what the job needs.</p>;
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

function Figures({ plan, at }: { plan: PlanObject; at: string }) {
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
          <button type="button" onClick={() => change(at + each.field, textOf(each.value))}>
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
