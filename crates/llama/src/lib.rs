//! The LLaMA core: checkpoints, shard plan, model, generation
