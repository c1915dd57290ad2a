//! Ids against Hugging Face's, over real vocabularies.

mod reference;
mod vocabularies;
