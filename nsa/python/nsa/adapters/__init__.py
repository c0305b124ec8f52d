"""NSA in training stacks, through their own extension points: modules megatron, huggingface and
torchtitan, each of which needs that stack to be installed. Each one's text says what the stack does
to masks, RoPE, GQA and context-parallel sharding. What cannot be honoured is a ValueError."""
