//! Step 1: collect, clean and subsample prompts
