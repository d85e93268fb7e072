"""What an answer is worth: checks of text, of steps and of programs that are run, without JAX."""
