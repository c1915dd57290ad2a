//! Training rows as tokens: truncation, labels, and batches without padding.
//!
//! Legend: `T` tokens of all rows of a micro-batch, one row behind the other; `N` positions whose
//! next token is learned.

use std::ops::Range;

use dromedary_tokenizer::Tokenizer;

use crate::{args::LearnedTurns, dataset::SourceTarget};

/// How rows are cut and which tokens are learned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CollateConfig {
    /// Tokens of a source, counted with BOS; longer ones lose their beginning.
    pub source_max_len: usize,
    /// Tokens of a target, counted with EOS; longer ones lose their end.
    pub target_max_len: usize,
    /// Learn the source's tokens too.
    pub train_on_source: bool,
    /// End a target with EOS, which is the first to be cut off.
    pub add_eos_to_target: bool,
    /// Which turns of a conversation are learned.
    pub learned_turns: LearnedTurns,
}

impl CollateConfig {
    /// Tokens of a conversation whose turns are learned wherever they stand, counted with EOS; longer ones
    /// lose their end.
    pub fn conversation_max_len(&self) -> usize {
        self.source_max_len + self.target_max_len
    }
}

/// One row as tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Example {
    /// The row's id.
    pub example_id: u64,
    /// What is read, and what is learned.
    pub input_ids: Vec<u32>,
    /// Positions of the learned tokens: stretches in ascending order that do not touch. Position 0 is in
    /// none of them: a row's first token has no predecessor to be predicted from.
    pub learned: Vec<Range<usize>>,
    /// Tokens that were cut on the left.
    pub truncated_left: usize,
    /// Tokens that were cut on the right.
    pub truncated_right: usize,
}

impl Example {
    /// A row of which nothing was cut off. `learned` may be in ascending order only roughly: stretches are
    /// clipped to the row, and joined where they touch.
    pub fn new(
        example_id: u64,
        mut input_ids: Vec<u32>,
        learned: impl IntoIterator<Item = Range<usize>>,
    ) -> Self {
        let clipped = |range: Range<usize>| range.start.max(1)..range.end.min(input_ids.len());
        let mut ranges: Vec<_> =
            learned.into_iter().map(clipped).filter(|range| !range.is_empty()).collect();
        ranges.sort_by_key(|range| range.start);
        let mut learned: Vec<Range<usize>> = Vec::new();
        for range in ranges {
            match learned.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => learned.push(range),
            }
        }
        // Rows stay for the whole run, so they do not keep room for what was cut off.
        input_ids.shrink_to_fit();
        Self { example_id, input_ids, learned, truncated_left: 0, truncated_right: 0 }
    }

    /// A row whose tokens are all learned from position `learn_from` on, and of which nothing was cut off.
    pub fn learned_from(example_id: u64, input_ids: Vec<u32>, learn_from: usize) -> Self {
        let learned = learn_from..input_ids.len();
        Self::new(example_id, input_ids, [learned])
    }

    /// Number of tokens that are learned.
    pub fn num_targets(&self) -> usize {
        self.learned.iter().map(ExactSizeIterator::len).sum()
    }
}

/// Turns text into tokens, so that decoding source and target ids gives back their text.
///
/// BOS stays in front where the source is cut. Dromedary cut it off together with the oldest
/// tokens (`finetune_qlora.py`, left truncation of a text that holds the BOS string).
pub fn encode(row: &SourceTarget, tokenizer: &Tokenizer, config: &CollateConfig) -> Example {
    Sides::encode(row, tokenizer, config).encoded(row.example_id, usize::MAX, false, config).example
}

/// A row as tokens, and what an audit wants to know of it.
pub(crate) struct Encoded {
    pub(crate) example: Example,
    pub(crate) lengths: Lengths,
    /// A model that learned this row would end its answer where the row's last one ends.
    pub(crate) ends_in_stop_mark: bool,
}

/// How the tokens of a row are limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lengths {
    /// So many of the source and so many of the target, each with a limit of its own.
    Sides([usize; 2]),
    /// All together.
    Conversation,
}

/// The two sides of a row as tokens, cut to their lengths.
pub(crate) struct Sides {
    source: Vec<u32>,
    target: Vec<u32>,
    truncated_left: usize,
    truncated_right: usize,
}

impl Sides {
    pub(crate) fn encode(
        row: &SourceTarget,
        tokenizer: &Tokenizer,
        config: &CollateConfig,
    ) -> Self {
        let source = tokenizer.encode_with_bos(&row.source);
        let target = tokenizer.encode_continuation(&row.source, &row.target);
        let eos = tokenizer.eos_id().filter(|_| config.add_eos_to_target);
        Self::cut(source, target, eos, tokenizer, config)
    }

    /// Cuts a source on the left, and a target with the `eos` behind it on the right.
    pub(crate) fn cut(
        mut source: Vec<u32>,
        mut target: Vec<u32>,
        eos: Option<u32>,
        tokenizer: &Tokenizer,
        config: &CollateConfig,
    ) -> Self {
        let has_bos = tokenizer.adds_bos() && source.first().copied() == tokenizer.bos_id();
        let num_bos = usize::from(has_bos);
        // BOS stays, however little room there is.
        let truncated_left =
            source.len().saturating_sub(config.source_max_len).min(source.len() - num_bos);
        source.drain(num_bos..num_bos + truncated_left);

        // EOS counts, as in Dromedary, which wrote it behind the text and cut the tokens of both.
        target.extend(eos);
        let truncated_right = target.len().saturating_sub(config.target_max_len);
        target.truncate(config.target_max_len);
        Self { source, target, truncated_left, truncated_right }
    }

    /// The row, of whose target up to `num_learned` tokens are learned; `ends` tells whether a stop mark is at
    /// the end of the whole target.
    pub(crate) fn encoded(
        self,
        example_id: u64,
        num_learned: usize,
        ends: bool,
        config: &CollateConfig,
    ) -> Encoded {
        let Self { source, mut target, truncated_left, truncated_right } = self;
        let lengths = Lengths::Sides([source.len(), target.len()]);
        let learn_from = if config.train_on_source { 0 } else { source.len() };
        let learned = learn_from..source.len().saturating_add(num_learned);
        let mut input_ids = source;
        input_ids.append(&mut target);
        let example = Example::new(example_id, input_ids, [learned]);
        let example = Example { truncated_left, truncated_right, ..example };
        Encoded { example, lengths, ends_in_stop_mark: ends && truncated_right == 0 }
    }
}

/// What a micro-batch has at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    /// Rows.
    pub rows: usize,
    /// Tokens of them together, T.
    pub tokens: usize,
    /// Learned ones of these, N.
    pub targets: usize,
}

impl BatchLimits {
    /// So many rows, however long they are.
    pub fn of_rows(rows: usize) -> Self {
        Self { rows, tokens: usize::MAX, targets: usize::MAX }
    }

    /// What the `rows` longest of `examples` have together.
    pub fn of_longest(examples: &[Example], rows: usize) -> Self {
        let mut longest: Vec<_> =
            examples.iter().map(|row| (row.input_ids.len(), row.num_targets())).collect();
        longest.sort_unstable_by(|a, b| b.cmp(a));
        longest.truncate(rows);
        let tokens = longest.iter().map(|&(tokens, _)| tokens).sum();
        Self { rows, tokens, targets: longest.iter().map(|&(_, targets)| targets).sum() }
    }

    /// Wide enough for each of `examples` alone.
    pub fn and_each_of(self, examples: &[Example]) -> Self {
        examples.iter().fold(self, |limits, row| Self {
            tokens: limits.tokens.max(row.input_ids.len()),
            targets: limits.targets.max(row.num_targets()),
            ..limits
        })
    }

    /// The rows in their order, as many together as the limits allow, and at least one.
    pub(crate) fn cut(self, examples: &[Example]) -> Vec<&[Example]> {
        let mut cut = Vec::new();
        let (mut start, mut tokens, mut targets) = (0, 0, 0);
        for (index, row) in examples.iter().enumerate() {
            tokens += row.input_ids.len();
            targets += row.num_targets();
            let fits =
                index - start < self.rows && tokens <= self.tokens && targets <= self.targets;
            if !fits && index > start {
                cut.push(&examples[start..index]);
                (start, tokens, targets) = (index, row.input_ids.len(), row.num_targets());
            }
        }
        if start < examples.len() {
            cut.push(&examples[start..]);
        }
        cut
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
        for position in example.learned.iter().cloned().flatten() {
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
pub(crate) mod tests {
    use super::*;

    fn example(example_id: u64, input_ids: &[u32], learn_from: usize) -> Example {
        Example::learned_from(example_id, input_ids.to_vec(), learn_from)
    }

    fn learn_from(example: &Example) -> usize {
        example.learned[0].start
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

    #[test]
    fn stretches_are_learned_where_they_lie_and_nowhere_else() {
        let rows = [
            Example::new(1, vec![1, 10, 11, 12, 13, 14, 15], [0..2, 3..4, 6..9]),
            Example::new(2, vec![1, 20, 21, 22, 23, 24], [5..6, 1..2, 1..3]),
        ];
        assert_eq!(rows[0].learned, [1..2, 3..4, 6..7]);
        assert_eq!(rows[1].learned, [1..3, 5..6]);
        let batch = MicroBatch::new(&rows);
        assert_eq!(batch.predict_at, [0, 2, 5, 7, 8, 11]);
        assert_eq!(batch.targets, [10, 12, 15, 20, 21, 24]);
        assert_eq!(batch.num_targets(), rows.iter().map(Example::num_targets).sum::<usize>());
    }

    /// That of stories260k.
    pub(crate) fn tokenizer() -> Tokenizer {
        let stories = "../llama/tests/data/stories260k";
        Tokenizer::open(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(stories)).unwrap()
    }

    fn config() -> CollateConfig {
        CollateConfig {
            source_max_len: 64,
            target_max_len: 64,
            train_on_source: false,
            add_eos_to_target: false,
            learned_turns: LearnedTurns::Assistant,
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
        let (read, learned) = example.input_ids.split_at(learn_from(&example));
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
        assert_eq!((&ended.input_ids, learn_from(&ended)), (&expected, learn_from(&plain)));
        assert_eq!(ended.num_targets(), plain.num_targets() + 1);

        let cut = |target_max_len| {
            encode(&row, &tokenizer, &CollateConfig { target_max_len, ..with_eos.clone() })
        };
        assert_eq!(cut(5).input_ids, plain.input_ids[..learn_from(&plain) + 5]);
        assert_eq!(cut(5).truncated_right, plain.num_targets() + 1 - 5);
        // EOS has a place of its own among them.
        assert_eq!(cut(plain.num_targets() + 1), ended);
        let without = Example { truncated_right: 1, ..plain.clone() };
        assert_eq!(cut(plain.num_targets()), without);
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
        let (source, target) = whole.input_ids.split_at(learn_from(&whole));
        for source_max_len in [1, 2, 7] {
            let cut = encode(&row, &tokenizer, &CollateConfig { source_max_len, ..config() });
            let kept = &source[source.len() - (source_max_len - 1)..];
            assert_eq!(cut.input_ids, [&source[..1], kept, target].concat());
            assert_eq!(learn_from(&cut), source_max_len);
            assert_eq!(cut.truncated_left, source.len() - source_max_len);
        }
    }

    #[test]
    fn rows_are_cut_where_a_limit_is_met_and_each_is_there_once() {
        let row = |id: u64, length: usize, targets: usize| {
            Example::learned_from(id, vec![7; length], length - targets)
        };
        let examples = [(6, 1), (4, 1), (9, 2), (3, 2), (3, 1), (20, 9), (2, 1), (2, 1)];
        let examples: Vec<_> =
            (0..).zip(examples).map(|(id, (length, targets))| row(id, length, targets)).collect();
        let sizes = |limits: BatchLimits| -> Vec<usize> {
            let cut = limits.cut(&examples);
            assert_eq!(cut.concat(), examples);
            cut.iter().map(|rows| rows.len()).collect()
        };
        assert_eq!(sizes(BatchLimits::of_rows(3)), [3, 3, 2]);
        assert_eq!(sizes(BatchLimits { rows: 3, tokens: 12, targets: 9 }), [2, 2, 1, 1, 2]);
        assert_eq!(sizes(BatchLimits { rows: 8, tokens: 99, targets: 3 }), [2, 1, 2, 1, 2]);
        let longest = BatchLimits::of_longest(&examples[..5], 2);
        assert_eq!(longest, BatchLimits { rows: 2, tokens: 15, targets: 3 });
        let wide = longest.and_each_of(&examples);
        assert_eq!(wide, BatchLimits { rows: 2, tokens: 20, targets: 9 });
        assert!(wide.cut(&[]).is_empty());
    }

    #[test]
    fn the_first_token_is_never_learned() {
        let whole = example(1, &[1, 10, 11], 0);
        let batch = MicroBatch::new([&whole]);
        assert_eq!(batch.predict_at, [0, 1]);
        assert_eq!(batch.num_targets(), whole.num_targets());
    }
}
