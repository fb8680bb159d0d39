"""ONNX graphs: editing (`builder`), cutting and inspecting (`model`), running (`session`)."""
