/** Waits for models that are being loaded. */

import { Failure } from "./client";

const AGAIN_MS = 3000;

/** Asks a model, and asks it again while it is being loaded, which the service answers with 503, until `leaving` is
 * aborted. Tells `onWait` each time why there is no answer yet. Throws any other failure. */
export async function whenLoaded<Answer>(
  ask: () => Promise<Answer>,
  leaving: AbortSignal,
  onWait: (why: Failure) => void,
): Promise<Answer> {
  while (true) {
    try {
      return await ask();
    } catch (error) {
      const failure = Failure.of(error);
      if (leaving.aborted || failure.status !== 503) throw failure;
      onWait(failure);
    }
    await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
  }
}
