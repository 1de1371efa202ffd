"""Which contraction computes a layer, and why: plans, what they cost, what a device does."""
