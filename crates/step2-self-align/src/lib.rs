//! Step 2: principle-driven self-alignment: generate, filter, merge
