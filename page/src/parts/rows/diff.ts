/** Finds the words in which two texts differ. */

export interface Part {
  text: string;
  isOwn: boolean; // the other text does not have it there
}

const WORDS = /[\p{L}\p{M}\p{N}_]+|\s+|[^\p{L}\p{M}\p{N}_\s]/gu;
const MOST_CELLS = 1_000_000; // of the table of common words; longer texts differ as a whole

/** Returns both texts in parts. The parts that are not own are the same in both. */
export function difference(first: string, second: string): [Part[], Part[]] {
  const [a, b] = [wordsOf(first), wordsOf(second)];
  let start = 0;
  while (start < Math.min(a.length, b.length) && a[start] === b[start]) start++;
  let end = 0;
  while (end < Math.min(a.length, b.length) - start && a.at(-1 - end) === b.at(-1 - end)) end++;
  const [ownA, ownB] = ownWords(a.slice(start, a.length - end), b.slice(start, b.length - end));
  const around = (words: string[], own: boolean[]) => {
    const same = (length: number) => Array<boolean>(length).fill(false);
    return joined(words, [...same(start), ...own, ...same(end)]);
  };
  return [around(a, ownA), around(b, ownB)];
}

const wordsOf = (text: string): string[] => text.match(WORDS) ?? [];

/** Marks the words that are in no longest common subsequence. */
function ownWords(a: string[], b: string[]): [boolean[], boolean[]] {
  const [ownA, ownB] = [Array<boolean>(a.length).fill(true), Array<boolean>(b.length).fill(true)];
  if ((a.length + 1) * (b.length + 1) > MOST_CELLS) return [ownA, ownB];
  const width = b.length + 1;
  const common = new Uint32Array((a.length + 1) * width); // in the words from here on
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      common[i * width + j] =
        a[i] === b[j]
          ? common[(i + 1) * width + j + 1]! + 1
          : Math.max(common[(i + 1) * width + j]!, common[i * width + j + 1]!);
  for (let i = 0, j = 0; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) ownA[i++] = ownB[j++] = false;
    else if (common[(i + 1) * width + j]! >= common[i * width + j + 1]!) i++;
    else j++;
  }
  return [ownA, ownB];
}

function joined(words: string[], own: boolean[]): Part[] {
  const parts: Part[] = [];
  words.forEach((word, place) => {
    const last = parts.at(-1);
    if (last?.isOwn === own[place]) last!.text += word;
    else parts.push({ text: word, isOwn: own[place]! });
  });
  return parts;
}
