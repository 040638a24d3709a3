/** The limits of a project, with their words. */

import { bytes, figure, whole } from "../../parts/words/words";

export const LIMITS = [
  { name: "max_running_jobs", label: "Running jobs", step: "1" },
  { name: "max_queued_jobs", label: "Queued and paused jobs", step: "1" },
  { name: "max_bytes", label: "Bytes of files and votes", step: "1" },
  { name: "max_accelerator_hours", label: "Accelerator hours", step: "any" },
] as const;

export function shown(name: string, value: number): string {
  if (name === "max_bytes") return bytes(value);
  return Number.isInteger(value) ? whole(value) : figure(value);
}
