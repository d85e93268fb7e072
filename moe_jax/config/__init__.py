"""What the fields of a configuration mean, their types and rules."""
