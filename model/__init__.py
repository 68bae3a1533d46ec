"""Networks, mixers, processes and samplers: pure functions and Flax linen modules."""
