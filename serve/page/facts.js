// What stands beside the picture: the legend and the times.

/** 0.1234 as "12.3 %". */
export function percent(share) {
  return share > 0 && share < 0.0005 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

/** Fill `list` with the classes present; `look(id or null)` as the mouse comes and goes, `pin(id)` on a click. */
export function showLegend(list, present, { look, pin }) {
  list.replaceChildren(...present.map((entry) => legendRow(entry, look, pin)));
}

function legendRow({ id, name, color, share }, look, pin) {
  const button = element("button", { type: "button", ariaPressed: "false", title: "Show this class alone" });
  button.dataset.id = id;
  button.style.setProperty("--colour", `rgb(${color.join()})`);
  button.style.setProperty("--share", share);
  button.append(
    element("span", { className: "swatch" }),
    element("span", { className: "name", textContent: name }),
    element("span", { className: "share", textContent: percent(share) }),
  );
  button.addEventListener("click", () => pin(id));
  button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && look(id));
  button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && look(null));
  const row = element("li");
  row.append(button);
  return row;
}

/** Fill `list` with the stages of one request, each bar starting where the one before it ended. */
export function showTimes(list, total, { stages, roundTrip }) {
  const rows = stagesOf(stages, roundTrip);
  const whole = rows.reduce((sum, [, ms]) => sum + ms, 0) || 1;
  let before = 0;
  const items = rows.map(([stage, ms]) => {
    const item = element("li");
    item.style.setProperty("--from", before / whole);
    item.style.setProperty("--part", ms / whole);
    before += ms;
    item.append(
      element("span", { className: "name", textContent: stage }),
      element("span", { className: "track" }),
      element("span", { className: "ms", textContent: milliseconds(ms) }),
    );
    return item;
  });
  total.textContent = milliseconds(roundTrip);
  list.replaceChildren(...items);
}

/** The server's stages, and what they leave: receiving the photo (the server's total), and the way there and back. */
function stagesOf(stages, roundTrip) {
  const named = [...stages].filter(([stage]) => stage !== "total");
  const served = stages.get("total") ?? 0;
  const rest = served - named.reduce((sum, [, ms]) => sum + ms, 0);
  return [["network", Math.max(0, roundTrip - served)], ["receive, other", Math.max(0, rest)], ...named];
}

function milliseconds(ms) {
  return ms < 10 ? `${ms.toFixed(1)} ms` : ms < 10_000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`;
}

function element(name, properties = {}) {
  return Object.assign(document.createElement(name), properties);
}
