// Elements and number formats of the page. All input of server and user enters the document here, as text only.

export const $ = (id) => document.getElementById(id);

/** Make an element; children that are not nodes become text. */
export function make(tag, className = "", ...children) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

/** Make a bar that fills `share` (0 to 1) of its track, with a line at `mark`. Hidden from screen readers: add the number as text. */
export function makeBar(share, mark = 0) {
  const fill = make("span", share > 0 ? "fill" : "");
  fill.style.width = `${100 * Math.min(Math.max(share, 0), 1)}%`;
  const track = make("span", "track", fill);
  if (mark > 0) {
    const line = make("span", "mark");
    line.style.left = `${100 * mark}%`;
    track.append(line);
  }
  track.setAttribute("aria-hidden", "true");
  return track;
}

/** Make a list of terms and values; pairs with an empty value are left out. */
export function makeTerms(className, pairs) {
  const shown = pairs.filter(([, value]) => value !== "");
  return make("dl", className, ...shown.map(([term, value]) => make("div", "", make("dt", "", term), make("dd", "", value))));
}

/** Format a share as a percentage; only an exact 0 or 1 is shown as 0 or 100 %. */
export function percent(share, digits = 1) {
  const least = 10 ** -digits;
  if (share > 0 && 100 * share < least / 2) return `< ${least} %`;
  if (share < 1 && 100 * (1 - share) < least / 2) return `> ${(100 - least).toFixed(digits)} %`;
  return `${(100 * share).toFixed(digits)} %`;
}

/** Format an amount of memory in GiB; below 0.1 GiB in MiB. */
export function memory(gib) {
  return gib >= 0.1 || gib === 0 ? `${gib.toFixed(2)} GiB` : `${(1024 * gib).toFixed(2)} MiB`;
}

export const count = (number) => Number(number).toLocaleString("en");
