"""The graph: tracing, canonical form, groups and quantizer insertion."""
