"""The latency lab: what is asked of an engine, when, and what it costs to keep one running."""
