// The probe: a point of the picture that mouse, finger or arrow keys move, and the name of the class that lies there.

const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const STRIDES = 40; // steps of the arrow keys across the picture; with Shift they are pixels

export class Probe {
  #mask = null; // {width, height, ids}
  #point = null; // {x, y} in pixels of the mask

  /** On `canvas`, with `spot` as its mark; `nameOf(id)` gives {name, colour}, and is told null when the probe goes. */
  constructor(canvas, spot, nameOf) {
    this.canvas = canvas;
    this.spot = spot;
    this.nameOf = nameOf;
    const hide = () => this.#hide();
    canvas.addEventListener("pointermove", (event) => this.#pointAt(event));
    canvas.addEventListener("pointerdown", (event) => this.#pointAt(event));
    canvas.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && hide());
    canvas.addEventListener("blur", hide);
    canvas.addEventListener("keydown", (event) => this.#step(event));
  }

  /** There is a mask to look at. */
  enter(mask) {
    this.#mask = mask;
  }

  /** There is none. */
  leave() {
    this.#hide();
    this.#mask = null;
  }

  #pointAt({ clientX, clientY }) {
    if (!this.#mask) return;
    const box = this.canvas.getBoundingClientRect();
    const { width, height } = this.#mask;
    this.#show(((clientX - box.left) / box.width) * width, ((clientY - box.top) / box.height) * height);
  }

  #step(event) {
    if (event.key === "Escape") this.#hide();
    const step = STEPS[event.key];
    if (!this.#mask || !step) return;
    event.preventDefault(); // the page does not scroll
    const { width, height } = this.#mask;
    const stride = event.shiftKey ? 1 : Math.max(1, Math.round(width / STRIDES));
    if (!this.#point) this.#show(width / 2, height / 2);
    else this.#show(this.#point.x + step[0] * stride, this.#point.y + step[1] * stride);
  }

  #show(x, y) {
    const { width, height, ids } = this.#mask;
    const inside = (value, size) => Math.min(Math.max(Math.floor(value), 0), size - 1);
    this.#point = { x: inside(x, width), y: inside(y, height) };
    const { name, colour } = this.nameOf(ids[this.#point.y * width + this.#point.x]);
    this.spot.style.setProperty("--x", (this.#point.x + 0.5) / width);
    this.spot.style.setProperty("--y", (this.#point.y + 0.5) / height);
    this.spot.style.setProperty("--colour", colour);
    this.spot.classList.toggle("high", this.#point.y < height / 5);
    this.spot.firstElementChild.textContent = name;
    this.spot.hidden = false;
  }

  #hide() {
    this.#point = null;
    this.spot.hidden = true;
    this.nameOf(null);
  }
}
