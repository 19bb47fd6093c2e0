"""Our code that runs inside vLLM's processes, and what says whether it may: `known_vllm`."""
