/** Draws the new data of charts, one chart in each frame of the screen, so that many charts do not hold up a frame.
 *
 * A chart that is out of sight is drawn when it comes into sight. */

import type uPlot from "uplot";

const waiting = new Map<uPlot, uPlot.AlignedData>(); // the chart that waits longest first
const inSight = new Set<uPlot>();
let isDrawing = false;

export function drawSoon(chart: uPlot, data: uPlot.AlignedData) {
  waiting.set(chart, data);
  start();
}

export function see(chart: uPlot, isThere: boolean) {
  if (isThere) inSight.add(chart);
  else inSight.delete(chart);
  start();
}

export function leave(chart: uPlot) {
  waiting.delete(chart);
  inSight.delete(chart);
}

function start() {
  if (isDrawing) return;
  isDrawing = true;
  requestAnimationFrame(drawNext);
}

function drawNext() {
  const next = [...waiting].find(([chart]) => inSight.has(chart));
  isDrawing = next !== undefined;
  if (!next) return;
  const [chart, data] = next;
  waiting.delete(chart); // newer data go to the end of the row
  chart.setData(data);
  requestAnimationFrame(drawNext);
}
