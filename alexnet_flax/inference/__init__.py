"""What a trained network computes of images: classes, activations, attributions."""
