/** Sends a file to the service in parts. The service checks its rows before it answers, unless the file is large. */

import { api, ask, type TrainingFile } from "../../api/client";

const PART_BYTES = 16 * 2 ** 20;

export type Reading = { invalid_rows: "drop"; max_invalid_share: number };

/** Returns the file. Calls `sent` with the number of bytes that have arrived. Throws a Failure if a row is refused. */
export async function upload(
  file: File,
  reading: Reading | undefined,
  sent: (numBytes: number) => void,
  signal: AbortSignal,
): Promise<TrainingFile> {
  const about = { purpose: "fine-tune", filename: file.name, bytes: file.size, mime_type: "application/jsonl" };
  const { id } = await ask(api.POST("/v1/uploads", { body: { ...about, x_raydpo: reading }, signal }));
  const params = { path: { upload_id: id } };
  try {
    const partIds: string[] = [];
    for (let start = 0; start < file.size; start += PART_BYTES) {
      const form = new FormData();
      form.append("data", file.slice(start, start + PART_BYTES));
      const bodySerializer = () => form;
      const part = await ask(
        api.POST("/v1/uploads/{upload_id}/parts", { params, body: { data: "" }, bodySerializer, signal }),
      );
      partIds.push(part.id);
      sent(Math.min(file.size, start + PART_BYTES));
    }
    const done = await ask(api.POST("/v1/uploads/{upload_id}/complete", { params, body: { part_ids: partIds }, signal }));
    return done.file!;
  } catch (error) {
    void api.POST("/v1/uploads/{upload_id}/cancel", { params }).catch(() => undefined);
    throw error;
  }
}
