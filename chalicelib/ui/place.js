// Where the visitor is: the view, the filter and the open job stand in the page's address, so that it can be shared.

export const FILTERS = ["status", "model", "q"];
const listeners = [];

export const here = () => Object.fromEntries(new URLSearchParams(location.search));

/** The address with these parts changed; an empty one is left out. */
export function address(changes) {
  const parts = Object.entries({ ...here(), ...changes }).filter(([, value]) => value);
  return parts.length ? `?${new URLSearchParams(parts)}` : location.pathname;
}

export function go(changes, { replace = false } = {}) {
  const target = address(changes);
  if (target === (location.search || location.pathname)) return;
  history[replace ? "replaceState" : "pushState"](null, "", target);
  listeners.forEach((moved) => moved());
}

export function onMove(moved) {
  listeners.push(moved);
  addEventListener("popstate", moved);
}

/** Whether a click on a link stays on the page; with a modifier key it opens as any other. */
export function stays(event) {
  if (event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return false;
  event.preventDefault();
  return true;
}

/** Attributes of a link that stays on the page. */
export const link = (changes) => ({ href: address(changes), onclick: (event) => stays(event) && go(changes) });
