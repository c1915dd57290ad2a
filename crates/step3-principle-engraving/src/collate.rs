//! Training rows as tokens: truncation, labels, and batches without padding.
//!
//! Legend: `T` tokens of all rows of a micro-batch, one row behind the other; `N` positions whose
//! next token is learned.

use dromedary_tokenizer::Tokenizer;

use crate::dataset::SourceTarget;

/// How rows are cut and which tokens are learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollateConfig {
    /// Tokens of a source, counted with BOS; longer ones lose their beginning.
    pub source_max_len: usize,
    /// Tokens of a target; longer ones lose their end.
    pub target_max_len: usize,
    /// Learn the source's tokens too.
    pub train_on_source: bool,
    /// End a target that was not truncated with EOS.
    pub add_eos_to_target: bool,
}

/// One row as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The row's id.
    pub example_id: u64,
    /// Source and target.
    pub input_ids: Vec<u32>,
    /// Position of the first token that is learned; all behind it are learned too.
    pub learn_from: usize,
    /// Source tokens that were cut on the left.
    pub truncated_left: usize,
    /// Target tokens that were cut on the right.
    pub truncated_right: usize,
}

impl Example {
    /// Number of tokens that are learned. The first token of a row has no predecessor to be
    /// predicted from, so it never counts.
    pub fn num_targets(&self) -> usize {
        self.input_ids.len() - self.learn_from.max(1)
    }
}

/// Turns text into tokens, so that decoding source and target ids gives back their text.
///
/// BOS stays in front where the source is cut. Dromedary cut it off together with the oldest
/// tokens (`finetune_qlora.py`, left truncation of a text that holds the BOS string).
pub fn encode(row: &SourceTarget, tokenizer: &Tokenizer, config: &CollateConfig) -> Example {
    Sides::encode(row, tokenizer, config).joined(row.example_id, config)
}

/// The two sides of a row as tokens, cut to their lengths.
pub(crate) struct Sides {
    pub(crate) source: Vec<u32>,
    pub(crate) target: Vec<u32>,
    truncated_left: usize,
    truncated_right: usize,
}

impl Sides {
    pub(crate) fn encode(
        row: &SourceTarget,
        tokenizer: &Tokenizer,
        config: &CollateConfig,
    ) -> Self {
        let mut source = tokenizer.encode_with_bos(&row.source);
        let num_bos = usize::from(tokenizer.adds_bos());
        // BOS stays, however little room there is.
        let truncated_left =
            source.len().saturating_sub(config.source_max_len).min(source.len() - num_bos);
        source.drain(num_bos..num_bos + truncated_left);

        let mut target = tokenizer.encode_continuation(&row.source, &row.target);
        let truncated_right = target.len().saturating_sub(config.target_max_len);
        target.truncate(config.target_max_len);
        if config.add_eos_to_target && truncated_right == 0 {
            target.extend(tokenizer.eos_id());
        }
        Self { source, target, truncated_left, truncated_right }
    }

    pub(crate) fn joined(self, example_id: u64, config: &CollateConfig) -> Example {
        let Self { source, mut target, truncated_left, truncated_right } = self;
        let learn_from = if config.train_on_source { 0 } else { source.len() };
        let mut input_ids = source;
        input_ids.append(&mut target);
        Example { example_id, input_ids, learn_from, truncated_left, truncated_right }
    }
}

/// Rows laid one behind the other: no position is padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MicroBatch {
    /// Ids of the rows, in order.
    pub example_ids: Vec<u64>,
    /// Tokens of all rows, (T).
    pub input_ids: Vec<u32>,
    /// Length of each row; they sum to T.
    pub lengths: Vec<i64>,
    /// Positions whose next token is learned, (N), ascending.
    pub predict_at: Vec<i64>,
    /// The token to learn at each of these positions, (N).
    pub targets: Vec<i64>,
}

impl MicroBatch {
    /// Lays `examples` one behind the other.
    pub fn new<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut batch = Self {
            example_ids: Vec::new(),
            input_ids: Vec::new(),
            lengths: Vec::new(),
            predict_at: Vec::new(),
            targets: Vec::new(),
        };
        for example in examples {
            batch.push(example);
        }
        batch
    }

    fn push(&mut self, example: &Example) {
        let start = self.input_ids.len() as i64;
        for position in example.learn_from.max(1)..example.input_ids.len() {
            self.predict_at.push(start + position as i64 - 1);
            self.targets.push(i64::from(example.input_ids[position]));
        }
        self.example_ids.push(example.example_id);
        self.lengths.push(example.input_ids.len() as i64);
        self.input_ids.extend(&example.input_ids);
    }

    /// Position of each token in its row, (T).
    pub fn positions(&self) -> Vec<i64> {
        self.lengths.iter().flat_map(|&length| 0..length).collect()
    }

    /// Tokens of the batch, T.
    pub fn num_tokens(&self) -> usize {
        self.input_ids.len()
    }

    /// Learned tokens of the batch, N.
    pub fn num_targets(&self) -> usize {
        self.targets.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example(example_id: u64, input_ids: &[u32], learn_from: usize) -> Example {
        let input_ids = input_ids.to_vec();
        Example { example_id, input_ids, learn_from, truncated_left: 0, truncated_right: 0 }
    }

    #[test]
    fn rows_predict_only_their_own_targets() {
        let batch =
            MicroBatch::new(&[example(7, &[1, 10, 11, 12], 2), example(9, &[1, 20, 21], 2)]);
        assert_eq!(batch.input_ids, [1, 10, 11, 12, 1, 20, 21]);
        assert_eq!(batch.lengths, [4, 3]);
        assert_eq!(batch.positions(), [0, 1, 2, 3, 0, 1, 2]);
        assert_eq!(batch.predict_at, [1, 2, 5]);
        assert_eq!(batch.targets, [11, 12, 21]);
        assert_eq!(batch.example_ids, [7, 9]);
    }

    fn tokenizer() -> Tokenizer {
        let stories = "../llama/tests/data/stories260k";
        Tokenizer::open(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(stories)).unwrap()
    }

    fn config() -> CollateConfig {
        CollateConfig {
            source_max_len: 64,
            target_max_len: 64,
            train_on_source: false,
            add_eos_to_target: false,
        }
    }

    fn row() -> SourceTarget {
        let (source, target) = ("Name a river.\n\n### Dromedary", "\nThe Rhine.\n\n### User\n");
        SourceTarget { example_id: 3, source: source.into(), target: target.into() }
    }

    #[test]
    fn source_and_target_decode_to_their_texts_and_the_target_is_learned() {
        let (tokenizer, row) = (tokenizer(), row());
        let example = encode(&row, &tokenizer, &config());
        let (read, learned) = example.input_ids.split_at(example.learn_from);
        assert_eq!(tokenizer.decode(read), row.source);
        assert_eq!(tokenizer.decode_continuation(learned), row.target);
        assert_eq!(read[0], tokenizer.bos_id().unwrap());
        assert_eq!((example.truncated_left, example.truncated_right), (0, 0));
    }

    #[test]
    fn eos_ends_a_whole_target_where_asked_for() {
        let (tokenizer, row) = (tokenizer(), row());
        let plain = encode(&row, &tokenizer, &config());
        let with_eos = CollateConfig { add_eos_to_target: true, ..config() };
        let ended = encode(&row, &tokenizer, &with_eos);
        let expected = [&plain.input_ids[..], &[tokenizer.eos_id().unwrap()]].concat();
        assert_eq!((&ended.input_ids, ended.learn_from), (&expected, plain.learn_from));
        assert_eq!(ended.num_targets(), plain.num_targets() + 1);

        let cut = encode(&row, &tokenizer, &CollateConfig { target_max_len: 5, ..with_eos });
        assert_eq!(cut.input_ids, plain.input_ids[..plain.learn_from + 5]);
        assert_eq!(cut.truncated_right, plain.num_targets() - 5);
    }

    #[test]
    fn train_on_source_learns_all_but_the_first_token() {
        let (tokenizer, row) = (tokenizer(), row());
        let plain = encode(&row, &tokenizer, &config());
        let whole = encode(&row, &tokenizer, &CollateConfig { train_on_source: true, ..config() });
        assert_eq!(whole.input_ids, plain.input_ids);
        assert_eq!(whole.num_targets(), whole.input_ids.len() - 1);
        let batch = MicroBatch::new([&whole]);
        let next: Vec<i64> = whole.input_ids[1..].iter().map(|&id| i64::from(id)).collect();
        assert_eq!(batch.targets, next);
    }

    #[test]
    fn a_long_source_loses_its_beginning_and_keeps_bos() {
        let (tokenizer, row) = (tokenizer(), row());
        let whole = encode(&row, &tokenizer, &config());
        let (source, target) = whole.input_ids.split_at(whole.learn_from);
        for source_max_len in [1, 2, 7] {
            let cut = encode(&row, &tokenizer, &CollateConfig { source_max_len, ..config() });
            let kept = &source[source.len() - (source_max_len - 1)..];
            assert_eq!(cut.input_ids, [&source[..1], kept, target].concat());
            assert_eq!(cut.learn_from, source_max_len);
            assert_eq!(cut.truncated_left, source.len() - source_max_len);
        }
    }

    #[test]
    fn the_first_token_is_never_learned() {
        let whole = example(1, &[1, 10, 11], 0);
        let batch = MicroBatch::new([&whole]);
        assert_eq!(batch.predict_at, [0, 1]);
        assert_eq!(batch.num_targets(), whole.num_targets());
    }
}
