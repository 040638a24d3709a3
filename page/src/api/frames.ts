/** Reads server-sent events from the body of an answer. */

export interface Frame {
  id?: string;
  data?: string;
  retry?: number;
}

/** Yields the events as they come. `heard` is called with every piece that comes, also with signs of life. */
export async function* framesOf(answer: Response, heard: () => void = () => undefined): AsyncGenerator<Frame> {
  const reader = answer.body!.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    heard();
    const whole = (rest + part.value).split("\n\n");
    rest = whole.pop()!;
    yield* whole.map(parse);
  }
}

function parse(text: string): Frame {
  const frame: Frame = {};
  for (const line of text.split("\n")) {
    const colon = line.indexOf(": ");
    const value = line.slice(colon + 2);
    if (line.startsWith("id: ")) frame.id = value;
    if (line.startsWith("data: ")) frame.data = value;
    if (line.startsWith("retry: ")) frame.retry = Number(value);
  }
  return frame;
}
