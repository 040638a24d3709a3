import { useEffect } from "preact/hooks";
import { api, ask, type FileCheck } from "../../api/client";
import { Show, useLoaded } from "../../parts/loading/loading";
import { href, route, setQuery } from "../../parts/route/route";
import { count, figure, visible, whole } from "../../parts/words/words";

const AGAIN_MS = 2000;

/** What a model would see of the file: a check that the service runs when the reader asks for it. */
export function Seen({ id }: { id: string }) {
  const model = route.value.query.get("model") ?? "";
  const models = useLoaded(
    async (signal) => (await ask(api.GET("/v1/models", { signal }))).data.map((each) => each.id),
    [],
  );
  return (
    <section class="panel">
      <h2>What a model sees</h2>
      <Show of={models}>
        {(names) => (
          <label>
            Model{" "}
            <select value={model} onChange={(event) => setQuery({ model: event.currentTarget.value })}>
              <option value="">none chosen</option>
              {[...new Set([...names, ...(model ? [model] : [])])].map((each) => (
                <option>{each}</option>
              ))}
            </select>
          </label>
        )}
      </Show>
      {model ? (
        <Check key={model} id={id} model={model} />
      ) : (
        <p class="note">
          Choose a model, and the service encodes the rows for it: how many tokens they have, which would be left out or
          cut, and what is learned of them. That takes from seconds to minutes.
        </p>
      )}
    </section>
  );
}

function Check({ id, model }: { id: string; model: string }) {
  const check = useLoaded(
    (signal) => ask(api.POST("/v1/x/datasets/check", { body: { training_file: id, model }, signal })),
    [id, model],
  );
  const isRunning = check.value?.status === "running";
  useEffect(() => {
    const timer = isRunning ? setTimeout(check.again, AGAIN_MS) : undefined;
    return () => clearTimeout(timer);
  }, [check.value]);
  return <Show of={check}>{(value) => <Checked id={id} check={value} again={check.again} />}</Show>;
}

function Checked({ id, check, again }: { id: string; check: FileCheck; again: () => void }) {
  const { tokens, preview } = check.report;
  if (check.status === "running") return <p class="note">The service encodes the rows. You may leave and come back.</p>;
  if (check.error || !tokens)
    return (
      <div class="failure" role="alert">
        <p>{visible(String(check.error?.message ?? "The check has no result."))}</p>
        <button onClick={again}>Try again</button>
      </div>
    );
  return (
    <>
      <p>
        {whole(tokens.num_kept)} of {count(tokens.num_groups, "group")} would be learned, with at most {whole(tokens.limit)}{" "}
        tokens each.
      </p>
      <Marked id={id} tokens={tokens} />
      <Lengths tokens={tokens} />
      <h3>Some rows as the model reads them</h3>
      <p class="hint">
        What is marked is learned; the rest is only read. Each row has the words of the model's chat template.
      </p>
      {preview?.map((row) => (
        <Preview key={row.line} id={id} row={row} />
      ))}
    </>
  );
}

type Tokens = NonNullable<FileCheck["report"]["tokens"]>;
type Lines = Tokens["margins"];

function Marked({ id, tokens }: { id: string; tokens: Tokens }) {
  const found: [string, Lines][] = [
    ...Object.entries(tokens.dropped).map(([code, of]): [string, Lines] => [`left out: ${code.replaceAll("_", " ")}`, of]),
    ...Object.entries(tokens.truncated).map(([side, of]): [string, Lines] => [`cut: ${side}`, of]),
    ["with special tokens of the model in their text", tokens.special_tokens],
    ["without the words that begin every answer", tokens.unasked],
    ["with characters that the tokenizer does not know", tokens.unknown],
    ["with an answer that nothing ends", tokens.unended],
    ...Object.entries(tokens.unread).map(([what, of]): [string, Lines] => [`with ${what}, which is not read`, of]),
  ];
  return (
    <ul>
      {found
        .filter(([, of]) => of.count)
        .map(([words, of]) => (
          <li key={words}>
            <b class="warn">{whole(of.count)}</b> {words}{" "}
            <small>
              {of.first.map((line, place) => (
                <>
                  {place > 0 && ", "}
                  <a href={href(["data", id], { ...Object.fromEntries(route.value.query), from: line })}>{line}</a>
                </>
              ))}
            </small>
          </li>
        ))}
    </ul>
  );
}

const SIDES = ["prompt", "chosen", "rejected"];

/** The lengths of the sides of all rows, in tokens. */
function Lengths({ tokens }: { tokens: Tokens }) {
  const sides = SIDES.filter((side) => tokens.lengths[side]);
  const sizes = [...new Set(sides.flatMap((side) => Object.keys(tokens.lengths[side]!.histogram).map(Number)))];
  const number = (side: string) => Object.values(tokens.lengths[side]!.histogram).reduce((sum, each) => sum + each, 0);
  const row = (name: string, value: (side: string) => string) => (
    <tr>
      <th scope="row">{name}</th>
      {sides.map((side) => (
        <td class="number">{value(side)}</td>
      ))}
    </tr>
  );
  return (
    <table class="lengths">
      <caption>Rows by their tokens</caption>
      <thead>
        <tr>
          <th scope="col">tokens</th>
          {sides.map((side) => (
            <th scope="col" class="number">
              {side}
            </th>
          ))}
        </tr>
      </thead>
      <tbody>
        {row("mean", (side) => figure(tokens.lengths[side]!.total / Math.max(1, number(side))))}
        {row("longest", (side) => whole(tokens.lengths[side]!.longest))}
        {sizes
          .sort((a, b) => a - b)
          .map((size) => row(spanOf(size), (side) => whole(tokens.lengths[side]!.histogram[size] ?? 0)))}
      </tbody>
    </table>
  );
}

const spanOf = (size: number) => (size <= 2 ? `up to ${size}` : `${whole(size / 2 + 1)} to ${whole(size)}`);

function Preview({ id, row }: { id: string; row: NonNullable<FileCheck["report"]["preview"]>[number] }) {
  const sides: [string, string | null][] = [
    ["Chosen", row.chosen],
    ["Rejected", row.rejected],
  ];
  return (
    <article class="row" aria-label={`Line ${row.line} as the model reads it`}>
      <h4>
        <a href={href(["data", id], { ...Object.fromEntries(route.value.query), from: row.line })}>Line {whole(row.line)}</a>
        {row.dropped && <span class="bad"> is left out: {row.dropped.replaceAll("_", " ")}</span>}
      </h4>
      <div class="answers">
        {sides.map(
          ([name, learned]) =>
            learned !== null &&
            (learned || row.prompt) && (
              <div key={name} class="text">
                <h5>{name}</h5>
                <div class="words" dir="auto">
                  {visible(row.prompt)}
                  <mark class="learned">{visible(learned)}</mark>
                </div>
              </div>
            ),
        )}
      </div>
    </article>
  );
}
