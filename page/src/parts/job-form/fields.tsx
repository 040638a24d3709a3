import { useContext } from "preact/hooks";
import type { Method } from "../../api/client";
import type { Draft } from "../form/draft";
import { change, Field, OptionField, Prose, Refusal, TextField, valueOf } from "../form/field";
import { FileField } from "../form/files";
import { ModelField } from "../form/models";
import { ROWS } from "../upload/drop";
import type { Kind, Known } from "./known";

const MAIN = ["adapter", "precision", "max_length"];
const ELSEWHERE = ["validation_share"];

/** The fields of a job stand in the address below `at`, which is empty for a job and `job.` for the job of other work. */
interface Props {
  known: Known;
  draft: Draft; // of the job alone
  at: string;
}

export function Data({ known, at }: Omit<Props, "draft">) {
  return (
    <fieldset class="panel">
      <legend>Data</legend>
      <FileField path={`${at}training_file`} label="Training file" hint={ROWS} />
      <Validation known={known} at={at} />
    </fieldset>
  );
}

export function Validation({ known, at }: Omit<Props, "draft">) {
  const share = known.options.validation_share;
  return (
    <>
      <FileField
        path={`${at}validation_file`}
        label="Validation file"
        hint="The model is evaluated on these rows at every checkpoint and never learns from them. You may leave it out."
      />
      {share && !valueOf(`${at}validation_file`) && (
        <OptionField path={`${at}x_raydpo.validation_share`} name="validation_share" option={share} />
      )}
    </>
  );
}

export function Start({ draft, at }: Omit<Props, "known">) {
  return (
    <fieldset class="panel">
      <legend>Model</legend>
      <ModelField
        path={`${at}model`}
        label="Start from"
        hint="A base model, or a policy: a model that an earlier job has trained."
        chosen={draft.model}
      />
      <Name at={at} />
    </fieldset>
  );
}

export function Name({ at }: { at: string }) {
  return (
    <TextField
      path={`${at}suffix`}
      label="Name"
      hint="A part of the name that the trained model, the policy, gets: letters, digits, _, . and -."
      placeholder="none"
    />
  );
}

const methodOf = ({ known, draft }: Props) => known.methods.find(({ id }) => id === draft["method.type"]);

export function Objective({ kind, ...props }: Props & { kind?: Kind }) {
  const { known, draft, at } = props;
  const method = methodOf(props);
  const learns = (each: Method) => !kind || each.learns_from.includes(kind);
  return (
    <fieldset class="panel">
      <legend>Objective</legend>
      <Field path={`${at}method.type`} label="Method" hint={method && <About method={method} />}>
        {(attributes) => (
          <select
            {...attributes}
            value={draft["method.type"]}
            onChange={(event) => change(`${at}method.type`, event.currentTarget.value)}
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
        <Hyperparameters of={method?.hyperparameters} method={method} at={at} />
      </div>
    </fieldset>
  );
}

interface HyperparametersProps {
  of: Method["hyperparameters"] | undefined;
  method: Method | undefined;
  at: string;
}

function Hyperparameters({ of = {}, method, at }: HyperparametersProps) {
  return (
    <>
      {Object.entries(of).map(([name, option]) => (
        <OptionField key={name} path={`${at}method.${method!.id}.hyperparameters.${name}`} name={name} option={option} />
      ))}
    </>
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

export function Training(props: Props) {
  const { known, draft, at } = props;
  const method = methodOf(props);
  const ofAdapter = Object.keys(known.options).filter((name) => name.startsWith("adapter."));
  return (
    <fieldset class="panel">
      <legend>Training</legend>
      <div class="options">
        <Hyperparameters of={method?.common_hyperparameters} method={method} at={at} />
        <Extensions known={known} names={MAIN} at={at} />
      </div>
      {draft["x_raydpo.adapter"] !== "none" && (
        <details open={Object.keys(draft).some((path) => path.startsWith("x_raydpo.adapter."))}>
          <summary>Options of the adapter</summary>
          <div class="options">
            <Extensions known={known} names={ofAdapter} at={at} />
          </div>
        </details>
      )}
    </fieldset>
  );
}

function Extensions({ known, names, at }: { known: Known; names: string[]; at: string }) {
  return (
    <>
      {names.map((name) => (
        <OptionField key={name} path={`${at}x_raydpo.${name}`} name={name} option={known.options[name]!} />
      ))}
    </>
  );
}

/** The rarer options of a job. They are open if one of them is set or refused, so that no setting is hidden. */
export function More({ known, at, title = "More options" }: Omit<Props, "draft"> & { title?: string }) {
  const refusal = useContext(Refusal);
  const rest = Object.keys(known.options).filter(
    (name) => ![...MAIN, ...ELSEWHERE].includes(name) && !name.startsWith("adapter."),
  );
  const paths = ["seed", "metadata", ...rest.map((name) => `x_raydpo.${name}`)].map((path) => at + path);
  return (
    <details class="panel" open={paths.some((path) => valueOf(path) || refusal?.param === path)}>
      <summary>{title}</summary>
      <div class="options">
        <TextField
          path={`${at}seed`}
          label={<code>seed</code>}
          hint="The same seed shuffles the rows in the same way. The service chooses one, and the job shows it."
          placeholder="chosen by the service"
        />
        <TextField
          path={`${at}metadata`}
          label={<code>metadata</code>}
          hint={'Up to 16 texts of your own, such as {"team": "search"}.'}
          placeholder="none"
        />
        <Extensions known={known} names={rest} at={at} />
      </div>
    </details>
  );
}
