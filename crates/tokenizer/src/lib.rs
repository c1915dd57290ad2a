//! LLaMA tokenizers: plain text in, exact bounds, incremental decoding
