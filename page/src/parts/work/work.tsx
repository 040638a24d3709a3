import { useState } from "preact/hooks";
import { Failure } from "../../api/client";
import { AskFirst } from "../dialog/dialog";
import { FailureNote } from "../loading/loading";
import { href } from "../route/route";
import { hasEnded, Status, type JobStatus } from "../status/status";
import { visible } from "../words/words";

export type Wish = "pause" | "resume" | "cancel" | "delete";

interface Work {
  id: string;
  status: JobStatus;
  waits_for: string | null;
  error: { code: string | null; message: string } | null;
}

interface Props {
  title: string;
  name: string; // with its article, such as "the sweep"
  view: string; // the one that lists such work
  of: Work;
  canPause?: boolean;
  onCancel: string; // what a cancellation means
  onDelete: string; // what a deletion means
  send: (wish: Wish) => Promise<unknown>;
  again: () => void;
}

/** The heading of work that the service does in the background: how it stands, and what the reader may do with it. */
export function WorkHeading({ title, name, view, of, canPause, onCancel, onDelete, send, again }: Props) {
  const [failure, setFailure] = useState<Failure>();

  async function wish(what: Wish) {
    setFailure(undefined);
    try {
      await send(what);
    } catch (error) {
      setFailure(Failure.of(error));
    }
    again();
  }

  async function remove() {
    setFailure(undefined);
    try {
      await send("delete");
      location.hash = href(view);
    } catch (error) {
      setFailure(Failure.of(error));
    }
  }

  return (
    <>
      <div class="heading">
        <div class="title">
          <h1>{title}</h1>
          <small class="id">{of.id}</small>
        </div>
        <Status of={of.status} />
        <div class="acts">
          {canPause && of.status === "running" && <button onClick={() => wish("pause")}>Pause</button>}
          {of.status === "paused" && <button onClick={() => wish("resume")}>Resume</button>}
          {hasEnded(of.status) ? (
            <Asked act="Delete" name={name} means={onDelete} onAgree={remove} />
          ) : (
            <Asked act="Cancel" name={name} means={onCancel} onAgree={() => wish("cancel")} />
          )}
        </div>
      </div>
      {failure && <FailureNote failure={failure} />}
      {of.waits_for && <p>Waiting: {visible(of.waits_for)}</p>}
      {of.error && (
        <div class="failure">
          <p>
            <b>{of.error.code}</b>: {visible(of.error.message)}
          </p>
        </div>
      )}
    </>
  );
}

interface AskedProps {
  act: "Cancel" | "Delete";
  name: string;
  means: string;
  onAgree: () => Promise<void>;
}

function Asked({ act, name, means, onAgree }: AskedProps) {
  return (
    <AskFirst act={`${act} ${name}`} question={`${act} ${name}?`} refusal="Keep" onAgree={() => void onAgree()}>
      <p>{means}</p>
    </AskFirst>
  );
}
