// Masks: one class id a pixel. Read from the server's PNG byte by byte, because a canvas would give back colours, and
// two classes may share one.

const DIMMED = 40; // alpha, of 255, of the classes beside the one that is looked at

/** {width, height, ids: Uint8Array} of an 8-bit palette PNG, as /v1/segment sends it (PNG specification, 3rd edition). */
export async function readMask(png) {
  const view = new DataView(png.buffer, png.byteOffset, png.byteLength);
  const packed = [];
  let width = 0;
  let height = 0;
  for (let at = 8; at + 12 <= png.length; ) {
    const length = view.getUint32(at);
    const kind = String.fromCharCode(...png.subarray(at + 4, at + 8));
    if (kind === "IHDR") {
      width = view.getUint32(at + 8);
      height = view.getUint32(at + 12);
      const [depth, colour, , , interlaced] = png.subarray(at + 16, at + 21);
      if (depth !== 8 || colour !== 3 || interlaced) throw new Error("a mask is an 8-bit palette PNG, not interlaced");
    }
    if (kind === "IDAT") packed.push(png.subarray(at + 8, at + 8 + length));
    at += length + 12;
  }
  const stream = new Blob(packed).stream().pipeThrough(new DecompressionStream("deflate"));
  const rows = new Uint8Array(await new Response(stream).arrayBuffer());
  return { width, height, ids: unfiltered(rows, width, height) };
}

/** Undo the filter that each row names in its first byte; typed arrays count modulo 256, as PNG wants it. */
function unfiltered(rows, width, height) {
  const ids = new Uint8Array(width * height);
  for (let y = 0, from = 0, to = 0; y < height; y += 1) {
    const guess = GUESSES[rows[from++]];
    for (let x = 0; x < width; x += 1, to += 1) {
      const left = x ? ids[to - 1] : 0;
      const up = y ? ids[to - width] : 0;
      ids[to] = rows[from++] + guess(left, up, x && y ? ids[to - width - 1] : 0);
    }
  }
  return ids;
}

const GUESSES = [
  () => 0,
  (left) => left,
  (left, up) => up,
  (left, up) => (left + up) >> 1,
  (left, up, corner) => {
    const [toLeft, toUp, toCorner] = [up - corner, left - corner, left + up - 2 * corner].map(Math.abs);
    if (toLeft <= toUp && toLeft <= toCorner) return left;
    return toUp <= toCorner ? up : corner;
  },
];

/** The classes present, each with its `share` of all pixels, the largest first. */
export function countShares({ ids }, classes) {
  const counts = new Uint32Array(256);
  for (const id of ids) counts[id] += 1;
  return classes
    .filter(({ id }) => counts[id])
    .map((entry) => ({ ...entry, share: counts[entry.id] / ids.length }))
    .sort((a, b) => b.share - a.share || a.id - b.id);
}

/** Draw the mask in its classes' colours; pixels of no class are clear. `only`: the one class that is not dimmed. */
export function paint(canvas, { width, height, ids }, classes, only = null) {
  const table = new Uint8ClampedArray(256 * 4);
  for (const { id, color } of classes) table.set([...color, only === null || only === id ? 255 : DIMMED], 4 * id);
  const colours = new Uint32Array(table.buffer);
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  for (let at = 0; at < ids.length; at += 1) pixels[at] = colours[ids[at]];
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(image, 0, 0);
}
