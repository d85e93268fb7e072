"""What a run costs before it starts: parameters, FLOPs, memory, time, on chips not at hand."""
