import { useSignal } from "@preact/signals";
import type { ComponentChildren } from "preact";
import { api, ask, type FileRow } from "../../api/client";
import { Show, useLoaded } from "../loading/loading";
import { href, route, setQuery } from "../route/route";
import { figure, visible, whole } from "../words/words";
import { difference, type Part } from "./diff";
import { textOf } from "../text/text";

const PAGE = 10;
const LONGEST = 2000; // characters of a text that are shown at first

/** The rows of a file, each with its answers side by side and their differences marked. */
export function Rows({ id }: { id: string }) {
  const from = Math.max(1, Math.floor(Number(route.value.query.get("from"))) || 1);
  const loaded = useLoaded((signal) => read(id, from, signal), [id, from]);
  const at = (line: number | null) => href(route.value.path, { ...Object.fromEntries(route.value.query), from: line });
  return (
    <section aria-label="Rows">
      <div class="heading">
        <h2>Rows</h2>
        <label>
          From line{" "}
          <input
            type="number"
            min={1}
            class="line"
            value={from}
            onChange={(event) => setQuery({ from: event.currentTarget.value })}
          />
        </label>
      </div>
      <Show of={loaded}>
        {(page) => (
          <>
            {page.data.map((row) => (
              <Row key={row.line} row={row} />
            ))}
            {!page.data.length && <p class="note">The file has no rows from line {whole(from)} on.</p>}
            <nav class="pages" aria-label="Pages of rows">
              {from > 1 && <a href={at(1)}>First rows</a>}
              {from > 1 && <a href={at(Math.max(1, from - PAGE))}>Earlier rows</a>}
              {page.next !== null && <a href={at(page.next)}>Further rows</a>}
            </nav>
          </>
        )}
      </Show>
    </section>
  );
}

function read(id: string, from: number, signal: AbortSignal) {
  const params = { path: { file_id: id }, query: { from, limit: PAGE } };
  return ask(api.GET("/v1/x/datasets/{file_id}/rows", { params, signal }));
}

function Row({ row }: { row: FileRow }) {
  return (
    <article class="panel row" aria-label={`Line ${row.line}`}>
      <h3>Line {whole(row.line)}</h3>
      {row.problem && (
        <p class="bad">
          Left out ({row.problem.code}): {visible(row.problem.message)}
        </p>
      )}
      {!row.problem && !row.groups.length && <p class="note">A row above has this answer as well.</p>}
      {row.groups.map((group) => (
        <Group group={group} />
      ))}
    </article>
  );
}

type GroupOfRow = FileRow["groups"][number];

function Group({ group }: { group: GroupOfRow }) {
  const isWhole = useSignal(false);
  const prompt = textOf(group.prompt);
  const answers = group.completions.map((each) => textOf(each, true));
  const length = Math.max(prompt.length, ...answers.map((answer) => answer.length));
  const cut = (text: string) => (isWhole.value || text.length <= LONGEST ? text : `${text.slice(0, LONGEST)} […]`);
  const [best, ...others] = answers.map(cut);
  const [ofBest, ofWorst] = others.length ? difference(best!, others.at(-1)!) : [plain(best!), []];
  const parts = [ofBest, ...others.slice(0, -1).map(plain), ...(others.length ? [ofWorst] : [])];
  return (
    <>
      <Text name="Prompt">{cut(prompt)}</Text>
      <div class="answers">
        {parts.map((each, place) => (
          <Text key={place} name={nameOf(group, place)} class={place === parts.length - 1 && place ? "worst" : "best"}>
            {each.map((part) => (part.isOwn ? <mark>{part.text}</mark> : part.text))}
          </Text>
        ))}
      </div>
      <p class="hint">{further(group)}</p>
      {length > LONGEST && !isWhole.value && (
        <button onClick={() => (isWhole.value = true)}>Show all {whole(length)} characters</button>
      )}
    </>
  );
}

const plain = (text: string): Part[] => [{ text, isOwn: false }];

function nameOf({ completions, ratings }: GroupOfRow, place: number): string {
  const rating = ratings ? `, rated ${figure(ratings[place]!)}` : "";
  if (completions.length === 1) return `Answer${rating}`;
  if (completions.length === 2) return `${place ? "Rejected" : "Chosen"}${rating}`;
  return `${whole(place + 1)} of ${whole(completions.length)}${rating}`;
}

function further({ weight, margin, tools, chat_template_kwargs: template }: GroupOfRow): string {
  return [
    weight !== 1 && `weight ${figure(weight)}`,
    margin !== null && `margin ${figure(margin)}`,
    tools && `tools ${JSON.stringify(tools)}`,
    template && `chat_template_kwargs ${JSON.stringify(template)}`,
  ]
    .filter(Boolean)
    .join(" · ");
}

function Text({ name, class: kind = "", children }: { name: string; class?: string; children: ComponentChildren }) {
  return (
    <div class={`text ${kind}`}>
      <h4>{name}</h4>
      <div class="words" dir="auto">
        {children}
      </div>
    </div>
  );
}
