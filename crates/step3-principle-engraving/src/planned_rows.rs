//! What `plan` takes from the settings of a run, and from its rows.

use std::path::Path;

use dromedary_command::Error as CommandError;
use dromedary_tokenizer::Tokenizer;

use crate::{
    args::TrainArgs,
    dataset::{DataConfig, Dataset},
    plan_command::PlanArgs,
};

impl PlanArgs {
    /// These settings, and where one is not given that of the run.
    ///
    /// # Errors
    /// A setting that says how rows are read where there is no data set.
    pub fn over_run(mut self, run: &TrainArgs) -> Result<Self, CommandError> {
        if run.max_steps.is_some_and(|steps| steps > 0) {
            tracing::warn!(
                "max_steps is not planned with: steps and hours are those of whole epochs"
            );
        }
        self.dataset = self.dataset.or_else(|| run.dataset.clone().filter(|rows| is_there(rows)));
        self.check_reading()?;
        let run = run.clone().with_defaults();
        macro_rules! of_run {
            ($($field:ident),* $(,)?) => {
                $(self.$field = self.$field.or(run.$field);)*
            };
        }
        of_run!(
            checkpoint,
            tokenizer,
            dataset_format,
            meta_prompt_pattern,
            learned_turns,
            chat_template,
            chat_date,
            source_max_len,
            target_max_len,
            lora_r,
            full_finetune,
            num_train_epochs,
            activations,
            max_memory,
            tp,
            shard_optimizer,
            bits,
            device,
            dtype,
        );
        let count = |number: usize| number as u64;
        let Self { per_device_train_batch_size, gradient_accumulation_steps, .. } = &mut self;
        *per_device_train_batch_size =
            per_device_train_batch_size.or(run.per_device_train_batch_size.map(count));
        *gradient_accumulation_steps =
            gradient_accumulation_steps.or(run.gradient_accumulation_steps.map(count));
        if self.lora_modules.is_empty() {
            self.lora_modules = run.lora_modules;
        }
        Ok(self)
    }

    /// Refuses what would be ignored.
    fn check_reading(&self) -> Result<(), CommandError> {
        let given = [
            ("tokenizer", self.tokenizer.is_some()),
            ("dataset-format", self.dataset_format.is_some()),
            ("meta-prompt-pattern", self.meta_prompt_pattern.is_some()),
            ("learned-turns", self.learned_turns.is_some()),
            ("chat-template", self.chat_template.is_some()),
            ("chat-date", self.chat_date.is_some()),
        ];
        match given.into_iter().find(|(_, is_given)| *is_given && self.dataset.is_none()) {
            Some((flag, _)) => Err(CommandError::usage(format!(
                "--{flag}: says how rows are read, and there is no --dataset"
            ))),
            None => Ok(()),
        }
    }

    /// Counts the rows of `--dataset`, where one is given, as `train` would read them with what else `run` says of
    /// them: their number, their mean and greatest length and the share that is learned, each where it is not
    /// given itself.
    ///
    /// # Errors
    /// If the data set cannot be read, or has no row to learn from.
    pub fn with_counted_rows(mut self, run: &TrainArgs) -> anyhow::Result<Self> {
        let Some(dataset) = &self.dataset else { return Ok(self) };
        let is_told = [self.rows, self.row_tokens, self.max_row_tokens].iter().all(Option::is_some);
        if is_told && self.learned.is_some() {
            return Ok(self);
        }
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
            ..run.clone()
        };
        let config = DataConfig::try_from(&args.with_defaults())?;
        let tokenizer = Tokenizer::open(&config.tokenizer)?;
        let rows = Dataset::read(&config.dataset, config.max_train_samples, &config, &tokenizer)?;
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

/// Whether the rows of a run are there; a plan is often made before.
fn is_there(rows: &Path) -> bool {
    let is_there = rows.exists();
    if !is_there {
        tracing::warn!("{} is not there: its rows are assumed, not counted", rows.display());
    }
    is_there
}

/// The folder of a checkpoint that is named by its folder or its `config.json`.
fn folder_of(checkpoint: &Path) -> &Path {
    match checkpoint.parent() {
        Some(folder) if checkpoint.is_file() => folder,
        _ => checkpoint,
    }
}
