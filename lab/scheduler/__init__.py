"""vLLM's scheduler and ours over a made-up model: what a step costs them, without a GPU."""
