/** Numbers with their units, times in the reader's own zone, and words of others. */

const MOMENT = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
const CLOCK = new Intl.DateTimeFormat(undefined, { timeStyle: "medium" });
const WHOLE = new Intl.NumberFormat();
const ZONE = new Intl.DateTimeFormat(undefined, { timeZoneName: "long" });

export const moment = (seconds: number) => MOMENT.format(seconds * 1000);
export const clock = (seconds: number) => CLOCK.format(seconds * 1000);
export const whole = (value: number) => WHOLE.format(value);
export const zone = () => ZONE.formatToParts().find((part) => part.type === "timeZoneName")?.value ?? "";

export function count(number: number, one: string, many = `${one}s`): string {
  return `${whole(number)} ${number === 1 ? one : many}`;
}

/** Such as "3 min", in the largest unit of which there are at least two. */
export function duration(seconds: number): string {
  const units: [number, string][] = [
    [86400, "days"],
    [3600, "h"],
    [60, "min"],
  ];
  for (const [size, name] of units) if (seconds >= 2 * size) return `${Math.round(seconds / size)} ${name}`;
  return `${Math.round(seconds)} s`;
}

export function bytes(number: number): string {
  const units = ["bytes", "kB", "MB", "GB", "TB"];
  const power = Math.min(units.length - 1, Math.floor(Math.log10(Math.max(1, number)) / 3));
  return `${power ? (number / 1000 ** power).toPrecision(3) : number} ${units[power]}`;
}

/** A figure with four digits that count, such as 0.6931 or 1.25e-6. */
export function figure(value: number): string {
  if (!Number.isFinite(value)) return String(value);
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3) return value.toExponential(2);
  return size >= 1e4 ? whole(Math.round(value)) : String(Number(value.toPrecision(4)));
}

export const percent = (share: number) => `${(100 * share).toFixed(share === 0 || share === 1 ? 0 : 1)} %`;

const UNSEEN = /[^\P{C}\n\t\u200c\u200d]|[\u2028\u2029]/gu; // joiners belong to scripts and emoji

/** Names the characters that nobody sees, or that turn others around, such as ⟨U+202E⟩. */
export function visible(text: string): string {
  return text.replace(UNSEEN, (sign) => `⟨U+${sign.codePointAt(0)!.toString(16).toUpperCase().padStart(4, "0")}⟩`);
}
