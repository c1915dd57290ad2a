//! Ids against Hugging Face's, over real vocabularies.

#![expect(clippy::unwrap_used, reason = "helpers of tests, too")]

mod bounds; // lengths told without encoding
mod continuation; // the target rule
mod counting; // lengths told word by word
mod files; // folders, options, damaged files
mod golden; // ids made by Hugging Face's Python package, a megabyte of one thing included
mod sentencepiece; // models of sentencepiece against its own library
mod special; // names of control tokens in user text
mod streaming; // token by token
mod texts; // there and back, generated text
mod vocabularies; // where vocabularies are, and text to try them with
