// Runs a fused detector in onnxruntime-web: letterboxes an image as the file's metadata say, and takes its boxes back to the image.
//   const detector = await Detector.open(".");
//   const rows = await detector.detect(await createImageBitmap(blob, DECODE));
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs";

if (!globalThis.crossOriginIsolated) ort.env.wasm.numThreads = 1; // threads share memory, which only isolated pages may

/** Options of createImageBitmap: pixels as they are in the file, turned as the camera was held. */
export const DECODE = { colorSpaceConversion: "none", imageOrientation: "from-image", premultiplyAlpha: "none" };
const GRAY = 114;

export class Detector {
  /** Open the model of a folder: its model.json and the file that this names. */
  static async open(folder) {
    const answer = await fetch(`${folder}/model.json`);
    if (!answer.ok) throw new Error(`${folder}/model.json: ${answer.status} ${answer.statusText}`);
    const settings = await answer.json();
    const session = await ort.InferenceSession.create(`${folder}/${settings.file}`, { executionProviders: ["wasm"] });
    return new Detector(settings, session);
  }

  constructor(settings, session) {
    this.settings = settings;
    this.session = session;
  }

  /** Detect objects in an ImageBitmap. Returns rows, best first: box in pixels of the image (x1, y1, x2, y2; oriented: cx, cy, w, h,
   * angle), score, label, name, and keypoints [[x, y, ...]] of models that give them. */
  async detect(bitmap) {
    const { settings } = this;
    const place = placement(bitmap.width, bitmap.height, settings);
    const one = tensorOf(pixelsOf(bitmap), place);
    const images = new Float32Array(settings.batch * one.length);
    for (let i = 0; i < settings.batch; i++) images.set(one, i * one.length);
    const shape = [settings.batch, 3, place.height, place.width];
    const found = await this.session.run({ [settings.input]: new ort.Tensor("float32", images, shape) });
    const [count, boxes, scores, labels, points] =
      ["count", "boxes", "scores", "labels", "keypoints"].map((key) => found[settings.outputs[key]]);
    return Array.from({ length: count.data[0] }, (_, i) => ({
      box: toImage(rowOf(boxes, i), place),
      score: scores.data[i],
      label: labels.data[i],
      name: settings.names[labels.data[i]] ?? String(labels.data[i]),
      ...(points && { keypoints: pointsToImage(rowOf(points, i), points.dims[3], place) }),
    }));
  }
}

/** Values of row i of the first image of [B, K, ...]. */
function rowOf(tensor, i) {
  const size = tensor.dims.slice(2).reduce((a, b) => a * b, 1);
  return Array.from(tensor.data.subarray(i * size, (i + 1) * size));
}

/** Where an image lies in the input, in whole pixels. Sizes are rounded as in fusenms.Detector. */
export function placement(imageWidth, imageHeight, settings) {
  let { height, width } = settings;
  const whole = { imageWidth, imageHeight };
  if (settings.stretch) return { ...whole, height, width, left: 0, top: 0, innerWidth: width, innerHeight: height };
  if (settings.dynamicSize) { // the smallest input of whole strides
    const gain = Math.min(height / imageHeight, width / imageWidth);
    const inner = [imageHeight, imageWidth].map((side) => Math.max(1, roundToEven(side * gain)));
    height = inner[0] + ((height - inner[0]) % settings.stride);
    width = inner[1] + ((width - inner[1]) % settings.stride);
  }
  const gain = Math.min(height / imageHeight, width / imageWidth);
  const innerWidth = Math.max(1, roundToEven(imageWidth * gain));
  const innerHeight = Math.max(1, roundToEven(imageHeight * gain));
  const left = Math.max(0, roundToEven((width - innerWidth) / 2 - 0.1));
  const top = Math.max(0, roundToEven((height - innerHeight) / 2 - 0.1));
  return { ...whole, height, width, left, top, innerWidth, innerHeight };
}

function roundToEven(value) {
  const low = Math.floor(value);
  if (value - low !== 0.5) return Math.round(value);
  return low % 2 ? low + 1 : low;
}

function pixelsOf(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

/** RGBA pixels of an image as the model's input: float32 [3, height, width], RGB, 0 to 1, on gray. */
function tensorOf(pixels, place) {
  const size = place.height * place.width;
  const values = new Float32Array(3 * size).fill(GRAY / 255);
  const columns = between(place.imageWidth, place.innerWidth);
  const rows = between(place.imageHeight, place.innerHeight);
  for (let y = 0; y < place.innerHeight; y++) {
    const [above, below, down] = rows[y];
    for (let x = 0; x < place.innerWidth; x++) {
      const [before, after, right] = columns[x];
      const at = (place.top + y) * place.width + place.left + x;
      for (let c = 0; c < 3; c++) {
        const value = (row, column) => pixels[4 * (row * place.imageWidth + column) + c];
        const upper = value(above, before) * (1 - right) + value(above, after) * right;
        const lower = value(below, before) * (1 - right) + value(below, after) * right;
        values[c * size + at] = Math.round(upper * (1 - down) + lower * down) / 255;
      }
    }
  }
  return values;
}

/** For each pixel of a scaled side, the two pixels that it lies between, and how far from the first: linear, between centers. */
function between(from, to) {
  return Array.from({ length: to }, (_, i) => {
    const at = Math.min(Math.max(((i + 0.5) * from) / to - 0.5, 0), from - 1);
    const low = Math.floor(at);
    return [low, Math.min(low + 1, from - 1), at - low];
  });
}

/** A box of the input in pixels of the image. */
function toImage(box, place) {
  const [gainX, gainY] = [place.innerWidth / place.imageWidth, place.innerHeight / place.imageHeight];
  if (box.length === 5) {
    return [(box[0] - place.left) / gainX, (box[1] - place.top) / gainY, box[2] / gainX, box[3] / gainY, box[4]];
  }
  const x = (value) => clip((value - place.left) / gainX, place.imageWidth);
  const y = (value) => clip((value - place.top) / gainY, place.imageHeight);
  return [x(box[0]), y(box[1]), x(box[2]), y(box[3])];
}

function pointsToImage(values, dims, place) {
  const points = [];
  for (let i = 0; i < values.length; i += dims) {
    const [x, y] = toImage([values[i], values[i + 1], 0, 0], place);
    points.push([x, y, ...values.slice(i + 2, i + dims)]);
  }
  return points;
}

const clip = (value, most) => Math.min(Math.max(value, 0), most);

/** Draw rows on a canvas that holds the image. */
export function draw(context, rows) {
  const unit = Math.max(1, Math.round(Math.max(context.canvas.width, context.canvas.height) / 400));
  context.lineWidth = 2 * unit;
  context.font = `${12 * unit}px sans-serif`;
  context.textBaseline = "bottom";
  for (const row of rows) {
    const color = `hsl(${(row.label * 137.5) % 360} 90% 45%)`;
    const corners = cornersOf(row.box);
    context.strokeStyle = context.fillStyle = color;
    context.beginPath();
    for (const [x, y] of corners) context.lineTo(x, y);
    context.closePath();
    context.stroke();
    for (const [x, y, visible = 1] of row.keypoints ?? []) {
      if (visible > 0.5) context.fillRect(x - unit, y - unit, 2 * unit, 2 * unit);
    }
    const text = `${row.name} ${row.score.toFixed(2)}`;
    const width = context.measureText(text).width + 4 * unit;
    const x = Math.max(0, Math.min(corners[0][0], context.canvas.width - width));
    const y = Math.max(corners[0][1], 14 * unit);
    context.fillRect(x, y - 14 * unit, width, 14 * unit);
    context.fillStyle = "white";
    context.fillText(text, x + 2 * unit, y);
  }
}

function cornersOf(box) {
  if (box.length === 4) return [[box[0], box[1]], [box[2], box[1]], [box[2], box[3]], [box[0], box[3]]];
  const [cx, cy, w, h, angle] = box;
  const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
  return [[-1, -1], [1, -1], [1, 1], [-1, 1]].map(([i, j]) => [
    cx + (i * w * cos - j * h * sin) / 2,
    cy + (i * w * sin + j * h * cos) / 2,
  ]);
}
