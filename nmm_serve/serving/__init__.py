"""The server for exported models: OpenAI's endpoints over ONNX Runtime, without torch."""
