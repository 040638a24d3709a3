import type { ComponentChildren } from "preact";
import { useRef } from "preact/hooks";

interface Props {
  act: string; // what the button says, such as "Cancel the job"
  question: string;
  refusal: string; // what the other button says, such as "Keep it"
  children: ComponentChildren;
  onAgree: () => void;
}

/** A button that asks before it acts. */
export function AskFirst({ act, question, refusal, children, onAgree }: Props) {
  const dialog = useRef<HTMLDialogElement>(null);
  const close = () => dialog.current!.close();
  return (
    <>
      <button class="danger" onClick={() => dialog.current!.showModal()}>
        {act}
      </button>
      <dialog ref={dialog} aria-label={question}>
        <h2>{question}</h2>
        {children}
        <div class="acts">
          <button
            class="danger"
            onClick={() => {
              close();
              onAgree();
            }}
          >
            {act}
          </button>
          <button onClick={close}>{refusal}</button>
        </div>
      </dialog>
    </>
  );
}
