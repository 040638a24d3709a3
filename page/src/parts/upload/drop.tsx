import { useSignal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";
import { Failure, type TrainingFile } from "../../api/client";
import { FailureNote } from "../loading/loading";
import { bytes, percent, visible } from "../words/words";
import { upload, type Reading } from "./upload";

const LENIENT: Reading = { invalid_rows: "drop", max_invalid_share: 0.5 };

/** What a training file holds, for a reader who has none yet. */
export const ROWS =
  'Each line of a file is one row of JSON, such as {"prompt": "…", "chosen": "the better answer", "rejected": "the worse ' +
  'answer"}, or a chat to learn from: {"messages": […]}.';

interface Props {
  label: string;
  onFile: (file: TrainingFile) => void;
}

/** A place for a file, to drop it there or to choose it. It is sent at once. */
export function Drop({ label, onFile }: Props) {
  const sending = useSignal<{ file: File; sent: number } | undefined>(undefined);
  const refused = useSignal<{ file: File; failure: Failure } | undefined>(undefined);
  const isOver = useSignal(false);
  const leaving = useRef(new AbortController());
  useEffect(() => () => leaving.current.abort(), []);

  async function send(file: File | undefined, reading?: Reading) {
    if (!file) return;
    leaving.current.abort();
    const mine = (leaving.current = new AbortController());
    refused.value = undefined;
    sending.value = { file, sent: 0 };
    try {
      const done = await upload(file, reading, (sent) => (sending.value = { file, sent }), mine.signal);
      if (!mine.signal.aborted) onFile(done);
    } catch (error) {
      if (!mine.signal.aborted) refused.value = { file, failure: Failure.of(error) };
    }
    if (leaving.current === mine) sending.value = undefined;
  }

  const now = sending.value;
  return (
    <div>
      <label
        class={isOver.value ? "drop over" : "drop"}
        onDragOver={(event) => {
          event.preventDefault();
          isOver.value = true;
        }}
        onDragLeave={() => (isOver.value = false)}
        onDrop={(event) => {
          event.preventDefault();
          isOver.value = false;
          void send(event.dataTransfer?.files[0]);
        }}
      >
        <span>{label}</span>
        <input
          type="file"
          onChange={(event) => {
            void send(event.currentTarget.files?.[0]);
            event.currentTarget.value = ""; // so that the same file may be chosen again
          }}
        />
      </label>
      <div role="status">{now && <Sending {...now} />}</div>
      {refused.value && <Refused {...refused.value} again={(reading) => void send(refused.value!.file, reading)} />}
    </div>
  );
}

function Sending({ file, sent }: { file: File; sent: number }) {
  const isThere = sent >= file.size;
  return (
    <div class="progress">
      <progress aria-label={`Upload of ${file.name}`} max={1} value={isThere ? undefined : sent / file.size} />
      <span>
        <bdi>{visible(file.name)}</bdi>{" "}
        {isThere ? "has arrived; the service checks its rows." : `${percent(sent / file.size)} of ${bytes(file.size)}`}
      </span>
    </div>
  );
}

interface RefusedProps {
  file: File;
  failure: Failure;
  again: (reading?: Reading) => void;
}

function Refused({ file, failure, again }: RefusedProps) {
  const isForRows = failure.code === "invalid_file_format";
  return (
    <>
      <p>
        <bdi>{visible(file.name)}</bdi> was not taken:
      </p>
      <FailureNote failure={failure} again={isForRows ? undefined : again} />
      {isForRows && (
        <div class="acts">
          <button type="button" onClick={() => again(LENIENT)}>
            Send it again, without the rows that cannot be used
          </button>
          <small>At most half of the rows may be left out.</small>
        </div>
      )}
    </>
  );
}
