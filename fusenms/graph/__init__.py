"""ONNX graphs: how one is edited (`builder`), taken apart (`model`) and run (`session`)."""
