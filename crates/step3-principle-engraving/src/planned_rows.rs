//! What `plan` wants to know of rows, from the rows themselves.

use std::path::Path;

use dromedary_tokenizer::Tokenizer;

use crate::{
    args::TrainArgs,
    dataset::{DataConfig, Dataset},
    plan_command::PlanArgs,
};

impl PlanArgs {
    /// Counts the rows of `--dataset`, where one is given, as `train` would read them: their number, their mean and
    /// greatest length and the share that is learned, each where it is not given itself.
    ///
    /// # Errors
    /// If the data set cannot be read, or has no row to learn from.
    pub fn with_counted_rows(mut self) -> anyhow::Result<Self> {
        let Some(dataset) = &self.dataset else { return Ok(self) };
        let beside = self.checkpoint.as_deref().map(folder_of);
        let args = TrainArgs {
            dataset: Some(dataset.clone()),
            tokenizer: self.tokenizer.clone().or(beside.map(Path::to_owned)),
            dataset_format: self.dataset_format,
            meta_prompt_pattern: self.meta_prompt_pattern.clone(),
            learned_turns: self.learned_turns,
            chat_template: self.chat_template.clone(),
            chat_date: self.chat_date.clone(),
            source_max_len: self.source_max_len,
            target_max_len: self.target_max_len,
            ..TrainArgs::default()
        };
        let config = DataConfig::try_from(&args.with_defaults())?;
        let tokenizer = Tokenizer::open(&config.tokenizer)?;
        let rows = Dataset::read(&config.dataset, None, &config, &tokenizer)?;
        // Rows without a target are `train`'s affair.
        rows.check(true)?;
        let audit = &rows.audit;
        let tokens = audit.tokens();
        self.rows.get_or_insert(audit.rows as u64);
        self.row_tokens.get_or_insert(tokens.div_ceil(audit.rows) as u64);
        self.max_row_tokens.get_or_insert(audit.lengths.iter().copied().max().unwrap_or(0) as u64);
        self.learned.get_or_insert(audit.learned_tokens as f64 / tokens as f64);
        Ok(self)
    }
}

/// The folder of a checkpoint that is named by its folder or its `config.json`.
fn folder_of(checkpoint: &Path) -> &Path {
    match checkpoint.parent() {
        Some(folder) if checkpoint.is_file() => folder,
        _ => checkpoint,
    }
}
