"""Text from a model: cached decoding, sampling, speculation."""
