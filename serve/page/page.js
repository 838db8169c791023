// The page: one photo at a time goes to the endpoint, and its mask comes back.

import { Failure, askMask, askModel, askSample } from "./api.js";
import { countShares, paint, readMask } from "./mask.js";
import { percent, showLegend, showTimes } from "./facts.js";
import { Probe } from "./probe.js";

const $ = (id) => document.getElementById(id);
const stage = $("stage");

let key = ""; // in memory alone
let model = null;
let photo = null; // the File that is shown
let result = null; // {mask, present, answer} of that photo
let running = new AbortController();
let pinned = null; // the id of the class that was picked in the legend
const probe = new Probe($("mask"), $("spot"), nameClass);

/** Show `file`, ask for its mask, and show that. A photo that is still in work is given up. */
async function segment(file) {
  const signal = begin();
  photo = file;
  result = null;
  pinned = null;
  setState("busy");
  showPhoto(file);
  countSeconds(signal);
  try {
    const answer = await askMask(file, key, signal);
    if (model?.digest !== answer.digest) await learnModel(signal); // another version is served by now
    const mask = await readMask(answer.png);
    if (signal.aborted) return;
    result = { mask, present: countShares(mask, model.classes), answer };
    showResult();
  } catch (error) {
    if (!signal.aborted) showFailure(error);
  }
}

async function useSample() {
  const signal = begin();
  try {
    await segment(await askSample(signal));
  } catch (error) {
    if (!signal.aborted) showFailure(error);
  }
}

/** Ask what is served, so that a missing key or a model that is not there is told before a photo is chosen. */
async function start() {
  const signal = begin();
  try {
    await learnModel(signal);
  } catch (error) {
    if (!signal.aborted) showFailure(error);
  }
}

/** The signal of a new request, for which the one before is given up and what was told of it is taken away. */
function begin() {
  running.abort();
  running = new AbortController();
  $("failure").hidden = true;
  $("key").hidden = true;
  return running.signal;
}

async function learnModel(signal) {
  model = await askModel(key, signal);
  $("model").textContent = `${model.name} · version ${model.version} · ${model.classes.length} classes`;
}

function setState(state) {
  document.body.dataset.state = state; // empty | busy | done
  $("view").hidden = state === "empty";
  $("facts").hidden = state !== "done";
  stage.setAttribute("aria-busy", state === "busy");
}

function countSeconds(signal) {
  const startedAt = performance.now();
  const tell = () => {
    const seconds = Math.round((performance.now() - startedAt) / 1000);
    $("elapsed").textContent = seconds ? `Segmenting … ${seconds} s` : "Segmenting …";
    if (signal.aborted || document.body.dataset.state !== "busy") clearInterval(timer);
  };
  const timer = setInterval(tell, 1000);
  tell();
  $("spoken").textContent = "Segmenting";
}

async function showPhoto(file) {
  const image = $("photo");
  URL.revokeObjectURL(image.src);
  image.src = URL.createObjectURL(file);
  $("photo-name").textContent = file.name;
  probe.leave();
  try {
    await image.decode();
    if (!result) setShape(image.naturalWidth, image.naturalHeight);
  } catch {
    // A picture that this browser cannot draw: the server decides whether it is one, and its mask can still be shown.
  }
}

function setShape(width, height) {
  stage.style.setProperty("--width", width);
  stage.style.setProperty("--height", height);
}

function showResult() {
  const { mask, present, answer } = result;
  setShape(mask.width, mask.height);
  paint($("mask"), mask, model.classes);
  $("mask").ariaLabel = `The mask: ${present.map(({ name, share }) => `${name} ${percent(share)}`).join(", ")}`;
  probe.enter(mask);
  showLegend($("legend"), present, { look: lookAt, pin });
  showTimes($("times"), $("total"), answer);
  $("photo-name").textContent = `${photo.name} · ${mask.width} × ${mask.height}`;
  $("request-id").textContent = `Request ${answer.requestId}`;
  setState("done");
  $("spoken").textContent = $("mask").ariaLabel;
}

function showFailure(error) {
  // Anything but a Failure is an error of this page; it belongs in the console, and still on the page.
  if (!(error instanceof Failure)) console.error(error);
  const told = error instanceof Failure ? error : new Failure(`The page failed: ${error.message}.`);
  $("failure-text").textContent = told.message;
  $("failure-id").textContent = told.requestId && `Request ${told.requestId}`;
  const locked = told.status === 401;
  $("failure").hidden = locked && !key; // nobody did anything wrong yet
  $("again").hidden = !told.passes;
  $("key").hidden = !locked;
  if (locked) $("key-text").focus();
  setState("empty");
}

/** Dim all classes but `id`; null: but the one picked in the legend, if any. */
function lookAt(id) {
  if (result) paint($("mask"), result.mask, model.classes, id ?? pinned);
}

function pin(id) {
  pinned = pinned === id ? null : id;
  for (const button of $("legend").querySelectorAll("button")) {
    button.ariaPressed = String(Number(button.dataset.id) === pinned);
  }
  lookAt(null);
}

/** The class `id` lies under the probe: name it and light its row of the legend; null: the probe is gone. */
function nameClass(id) {
  for (const button of $("legend").querySelectorAll("button")) {
    button.classList.toggle("lit", Number(button.dataset.id) === id);
  }
  if (id === null) return { name: "", colour: "transparent" };
  const entry = result.present.find((one) => one.id === id);
  return entry ? { name: entry.name, colour: `rgb(${entry.color.join()})` } : { name: "no class", colour: "transparent" };
}

// What is shown of the two layers, and what is saved of them.

function setLayer(layer) {
  stage.dataset.layer = layer;
  document.querySelector(`input[value=${layer}]`).checked = true;
}

function setOpacity() {
  $("opacity-text").value = `${$("opacity").value} %`;
  stage.style.setProperty("--opacity", $("opacity").value / 100);
}

async function overlayJpeg() {
  const { width, height } = result.mask;
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d");
  if ($("photo").naturalWidth) context.drawImage($("photo"), 0, 0, width, height);
  context.globalAlpha = $("opacity").value / 100;
  context.drawImage($("mask"), 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/jpeg", 0.92));
}

function summary() {
  const { mask, present, answer } = result;
  const { name, version, digest } = model;
  const body = {
    width: mask.width,
    height: mask.height,
    classes: present,
    model: { name, version, digest },
    request_id: answer.requestId,
  };
  return new Blob([JSON.stringify(body, null, 2)], { type: "application/json" });
}

function save(blob, ending) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = photo.name.replace(/\.[^.]*$/, "") + ending;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the browser reads it after the click
}

// What people do.

$("file").addEventListener("change", (event) => {
  const [file] = event.target.files;
  event.target.value = ""; // the same file may be chosen again
  if (file) segment(file);
});
$("sample").addEventListener("click", useSample);
$("again").addEventListener("click", () => (photo ? segment(photo) : start()));
$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key-text").value;
  if (photo) segment(photo);
  else start();
});

document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("dragging");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const [file] = event.dataTransfer.files;
  if (file) segment(file);
});
document.addEventListener("paste", (event) => {
  const [file] = event.clipboardData.files;
  if (file) segment(file);
});

$("layers").addEventListener("change", (event) => setLayer(event.target.value));
$("opacity").addEventListener("input", () => {
  setOpacity();
  setLayer("overlay");
});
$("mask").addEventListener("keydown", () => ($("spoken").textContent = $("spot-name").textContent));

$("save-mask").addEventListener("click", () => save(new Blob([result.answer.png], { type: "image/png" }), "-mask.png"));
$("save-overlay").addEventListener("click", async () => save(await overlayJpeg(), "-overlay.jpg"));
$("save-json").addEventListener("click", () => save(summary(), ".json"));

start();
