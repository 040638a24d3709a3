import { useState } from "preact/hooks";
import { bearer, Failure } from "../../api/client";
import { FailureNote } from "../loading/loading";
import { bytes } from "../words/words";

/** A button that saves the weights of a model. */
export function Download({ model }: { model: string }) {
  const path = `/v1/models/${encodeURIComponent(model)}/content`;
  return <Save path={path} file={`${model.replaceAll(":", "-")}.tar`} words="Download" label={`Download ${model}`} />;
}

interface Props {
  path: string; // of what is saved, at the service
  file: string; // the name of the file
  words: string;
  label?: string; // for screen readers, if the words do not say what is saved
}

/** A button that saves what the service has at a path. The key goes in a header, so a plain link would not do. */
export function Save({ path, file, words, label }: Props) {
  const [received, setReceived] = useState<number>();
  const [failure, setFailure] = useState<Failure>();
  const isBusy = received !== undefined;

  async function start() {
    setFailure(undefined);
    setReceived(0);
    try {
      save(await contentOf(path, setReceived), file);
    } catch (error) {
      setFailure(Failure.of(error));
    }
    setReceived(undefined);
  }

  return (
    <div>
      <button onClick={start} disabled={isBusy} aria-label={label}>
        {isBusy ? `${bytes(received)} so far` : words}
      </button>
      {failure && <FailureNote failure={failure} again={start} />}
    </div>
  );
}

async function contentOf(path: string, received: (numBytes: number) => void): Promise<Blob> {
  const headers = { authorization: await bearer() };
  const answer = await fetch(path, { headers });
  if (!answer.ok) throw Failure.answered(answer.status, await answer.json().catch(() => undefined));
  let numBytes = 0;
  const counting = new TransformStream<Uint8Array, Uint8Array>({
    transform(part, out) {
      received((numBytes += part.length));
      out.enqueue(part);
    },
  });
  return new Response(answer.body!.pipeThrough(counting)).blob();
}

function save(content: Blob, name: string) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}
