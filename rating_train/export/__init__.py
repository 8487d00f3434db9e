"""A trained model as a folder of its own: weights, remote code for ``transformers``, processor, ONNX, model card."""
