"""From measured inputs to ranges and rounded weights: blocks, candidates, joint search, GPTQ."""
