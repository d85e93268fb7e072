"""Messages that a text carries: written by a logits processor, read without the model."""
