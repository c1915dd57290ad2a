//! Step 3: principle engraving by supervised fine-tuning
