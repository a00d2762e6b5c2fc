"""Networks for other programs to run: StableHLO and ONNX, both from uint8 pictures to logits."""
