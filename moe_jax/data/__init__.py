"""Text to batches of token ids; the batch of a step is a pure function of seed and step."""
