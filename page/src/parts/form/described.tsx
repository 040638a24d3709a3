import { useContext } from "preact/hooks";
import type { ComponentChildren } from "preact";
import { visible } from "../words/words";
import type { Draft } from "./draft";
import { Area, OptionField, Prose, Refusal } from "./field";
import { FileField } from "./files";
import { ModelField } from "./models";
import { isUsed, type Described, type Uses } from "./schema";

const MODELS = ["model", "baseline", "reference"];

interface Props {
  of: Described[];
  draft: Draft;
  uses: Uses;
}

/** Fields that the OpenAPI document describes, those of objects in groups of their own. Those of no use are left out. */
export function Fields({ of, draft, uses }: Props) {
  const used = of.filter(({ path }) => isUsed(path, draft, uses));
  const groups = used.filter((each) => each.inner);
  const isWide = ({ name }: Described) => name === "file" || name === "rows";
  const simple = used.filter((each) => !each.inner && !isWide(each));
  return (
    <>
      {used.filter(isWide).map((each) => (
        <One key={each.path} of={each} draft={draft} />
      ))}
      <div class="options">
        {simple.map((each) => (
          <One key={each.path} of={each} draft={draft} />
        ))}
      </div>
      {groups.map((each) => (
        <Group key={each.path} path={each.path} title={<code>{each.name}</code>} words={each.option.description}>
          <Fields of={each.inner!} draft={draft} uses={uses} />
        </Group>
      ))}
    </>
  );
}

function One({ of: { path, name, option, isText }, draft }: { of: Described; draft: Draft }) {
  const hint = <Prose text={option.description} />;
  if (name === "file") return <FileField path={path} label="File of prompts" hint={hint} />;
  if (name === "rows")
    return (
      <Area
        path={path}
        label="Or write the prompts here"
        hint={
          <>
            {hint} Each line is a prompt, or a row as JSON, such as <code>{'{"prompt": "…", "completions": ["best", "…"]}'}</code>.
          </>
        }
      />
    );
  if (MODELS.includes(name) && isText && !option.choices)
    return <ModelField path={path} label={<code>{name}</code>} hint={hint} chosen={draft[path]} empty="none chosen" />;
  return <OptionField path={path} name={name} option={option} chosen={draft[path]} />;
}

interface GroupProps {
  path: string;
  title: ComponentChildren;
  words: string;
  class?: string;
  children: ComponentChildren;
}

/** Fields that belong together. A refusal of them as a whole stands above them. */
export function Group({ path, title, words, class: kind = "group", children }: GroupProps) {
  const refusal = useContext(Refusal);
  return (
    <fieldset class={kind} id={path} tabIndex={-1}>
      <legend>{title}</legend>
      <div class="hint">
        {refusal?.param === path && <p class="bad">{visible(refusal.message)}</p>}
        <Prose text={words} />
      </div>
      {children}
    </fieldset>
  );
}

interface PanelsProps extends Props {
  panels: Record<string, string[]>; // the names of fields by the title of their panel
  elsewhere?: string[]; // names of fields that stand elsewhere
  more?: string; // the title of the further options
}

/** The fields in panels, and those that no panel names among the further options. */
export function Panels({ of, draft, uses, panels, elsewhere = [], more = "More options" }: PanelsProps) {
  const named = [...Object.values(panels).flat(), ...elsewhere];
  return (
    <>
      {Object.entries(panels).map(([title, names]) => (
        <Panel key={title} title={title} of={of.filter(({ name }) => names.includes(name))} draft={draft} uses={uses} />
      ))}
      <Further title={more} of={of.filter(({ name }) => !named.includes(name))} draft={draft} uses={uses} />
    </>
  );
}

function Panel({ title, of, draft, uses }: Props & { title: string }) {
  const [first, ...others] = of.filter(({ path }) => isUsed(path, draft, uses));
  if (!first) return null;
  if (first.inner && !others.length)
    return (
      <Group path={first.path} title={title} words={first.option.description} class="panel">
        <Fields of={first.inner} draft={draft} uses={uses} />
      </Group>
    );
  return (
    <fieldset class="panel">
      <legend>{title}</legend>
      <Fields of={of} draft={draft} uses={uses} />
    </fieldset>
  );
}

/** The rarer options. They are open if one of them is set or refused, so that no setting is hidden. */
function Further({ title, of, draft, uses }: Props & { title: string }) {
  const refusal = useContext(Refusal);
  if (!of.some(({ path }) => isUsed(path, draft, uses))) return null;
  const set = [...Object.keys(draft), refusal?.param ?? ""];
  const isOpen = of.some(({ path }) => set.some((each) => each === path || each.startsWith(`${path}.`)));
  return (
    <details class="panel" open={isOpen}>
      <summary>{title}</summary>
      <Fields of={of} draft={draft} uses={uses} />
    </details>
  );
}
