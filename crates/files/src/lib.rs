//! Atomic files and folders, manifests, locks, append-only JSONL
