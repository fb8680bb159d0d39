// Runs a fused model in onnxruntime-node or onnxruntime-web (WebAssembly, one thread) on pictures that were prepared in Python.
//   node run.mjs PACKAGE MODEL.onnx PICTURES.bin BATCH,3,HEIGHT,WIDTH      prints {output: [values]} as JSON
// NODE_PATH or the current folder must have node_modules with the package.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";

const [name, model, pictures, shape] = process.argv.slice(2);
const ort = createRequire(join(process.cwd(), "package.json"))(name);
if (name === "onnxruntime-web") ort.env.wasm.numThreads = 1;
const bytes = readFileSync(pictures);
const values = new Float32Array(bytes.buffer, bytes.byteOffset, bytes.byteLength / 4);
const options = { executionProviders: [name === "onnxruntime-web" ? "wasm" : "cpu"], logSeverityLevel: 3 };
const session = await ort.InferenceSession.create(readFileSync(model), options);
const start = performance.now();
const outputs = await session.run({ [session.inputNames[0]]: new ort.Tensor("float32", values, shape.split(",").map(Number)) });
const milliseconds = performance.now() - start;
const lists = Object.fromEntries(Object.entries(outputs).map(([key, tensor]) => [key, { dims: tensor.dims, data: Array.from(tensor.data) }]));
console.log(JSON.stringify({ version: ort.env.versions?.common ?? ort.env.versions?.node ?? "?", milliseconds, outputs: lists }));
