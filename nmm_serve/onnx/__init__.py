"""ONNX: build a checkpoint's graphs, check them against torch, and run them.

`runtime`, `manifest` and what they import know nothing of torch: a machine that only serves does not need it.
"""
