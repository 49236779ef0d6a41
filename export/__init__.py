"""From a model to ONNX files, engines and proof that they are right."""
