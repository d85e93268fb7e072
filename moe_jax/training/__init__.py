"""From a batch to the next state: objective, optimizer step, loop, held-out evaluation."""
