import { useState } from "preact/hooks";
import { bearer, Failure } from "../../api/client";
import { FailureNote } from "../loading/loading";
import { bytes } from "../words/words";

/** A button that saves the weights of a model. The key goes in a header, so a plain link would not do. */
export function Download({ model }: { model: string }) {
  const [received, setReceived] = useState<number>();
  const [failure, setFailure] = useState<Failure>();
  const isBusy = received !== undefined;

  async function start() {
    setFailure(undefined);
    setReceived(0);
    try {
      save(await weightsOf(model, setReceived), `${model.replaceAll(":", "-")}.tar`);
    } catch (error) {
      setFailure(Failure.of(error));
    }
    setReceived(undefined);
  }

  return (
    <div>
      <button onClick={start} disabled={isBusy} aria-label={`Download ${model}`}>
        {isBusy ? `${bytes(received)} so far` : "Download"}
      </button>
      {failure && <FailureNote failure={failure} again={start} />}
    </div>
  );
}

async function weightsOf(model: string, received: (numBytes: number) => void): Promise<Blob> {
  const headers = { authorization: await bearer() };
  const answer = await fetch(`/v1/models/${encodeURIComponent(model)}/content`, { headers });
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
