"""Loading models, attaching adapters, freezing, and the memory they need."""
