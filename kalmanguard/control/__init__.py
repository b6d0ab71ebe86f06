"""Evidence to decisions: the envelope, the ladder and its budget, what the ring keeps, how often to look."""
