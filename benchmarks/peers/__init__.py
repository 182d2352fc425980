"""What models are compared with when size counts in bytes: one file a peer; ``registry`` says what it enters.

Importing this package enters them all. A package that a peer needs is imported when the peer runs.
"""

from peers import floats, gptq, nncf_openvino, onnx_runtime, torchao_weights, vitshrink_jobs

__all__ = ["floats", "gptq", "nncf_openvino", "onnx_runtime", "torchao_weights", "vitshrink_jobs"]
