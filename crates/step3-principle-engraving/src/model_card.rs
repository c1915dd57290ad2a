//! The model card: `README.md` beside what was trained, with settings, data and results.

use std::{
    fmt::{self, Display},
    path::Path,
};

use dromedary_files::hash_file;

use crate::{
    audit::{Audit, Side},
    config::TrainConfig,
    dataset::MetaPrompts,
    error::Result,
    formats::DatasetFormat,
    held_out::EvalRows,
    metrics::{CURVES_FILE, Line},
    schedule::Schedule,
};

/// Steps over which the first and the last loss are averaged.
const AVERAGED: usize = 10;

/// What the card tells.
pub(crate) struct ModelCard<'a> {
    pub(crate) config: &'a TrainConfig,
    pub(crate) schedule: &'a Schedule,
    pub(crate) audit: &'a Audit,
    pub(crate) inputs: &'a Inputs,
    /// Rows trained on, rows held out.
    pub(crate) rows: [usize; 2],
    /// Number kind of the frozen weights.
    pub(crate) kind: String,
    /// Numbers that were trained.
    pub(crate) num_parameters: i64,
    pub(crate) lines: &'a [Line],
}

/// Hashes of everything that the run read: it can be told whether a file is the same one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Inputs {
    /// Fingerprint of the base model.
    base: String,
    /// Fingerprint of the tokenizer.
    tokenizer: String,
    /// Hash of the adapter that training starts from.
    adapter: Option<String>,
    /// Name and BLAKE3 hash of each file.
    files: Vec<(String, String)>,
}

impl Inputs {
    /// Hashes the files that `config` names.
    ///
    /// # Errors
    /// If one cannot be read.
    pub(crate) fn of(config: &TrainConfig, base: String, tokenizer: &str) -> Result<Self> {
        let mut paths = vec![config.data.dataset.clone()];
        if let Some(EvalRows::File(path)) = config.eval.as_ref().map(|eval| &eval.rows) {
            paths.push(path.clone());
        }
        if let Some(pattern) = &config.data.meta_prompt_pattern {
            paths.extend(MetaPrompts::open(pattern)?.paths);
        }
        paths.extend(config.data.chat.template.clone());
        let adapter = config.adapter.as_ref().map(|dir| dir.join("adapter_model.safetensors"));
        paths.extend(adapter.clone());
        let entry = |path: &std::path::PathBuf| Ok((path.display().to_string(), hash_file(path)?));
        let files = paths.iter().map(entry).collect::<Result<_>>()?;
        let adapter = adapter.map(hash_file).transpose()?;
        Ok(Self { base, tokenizer: tokenizer.to_owned(), adapter, files })
    }

    /// What steps depend on besides the rows' tokens, wherever the files are.
    pub(crate) fn fingerprints(&self) -> impl std::fmt::Debug {
        (&self.base, &self.tokenizer, &self.adapter)
    }
}

/// A Markdown table of two columns.
struct Table<'a>(&'a [(&'a str, String)]);

impl Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in self.0 {
            writeln!(f, "| {name} | {} |", value.replace('|', "\\|"))?;
        }
        Ok(())
    }
}

fn code(value: impl Display) -> String {
    format!("`{value}`")
}

impl ModelCard<'_> {
    fn settings(&self) -> Vec<(&'static str, String)> {
        let TrainConfig { data, lora, batches, adamw, .. } = self.config;
        let schedule = self.schedule;
        let mut shape = format!("{:?}", schedule.schedule_type).to_lowercase();
        if schedule.decay_steps > 0 {
            shape += &format!(", decay over {} steps", schedule.decay_steps);
        }
        let modules: Vec<&str> = lora.target_modules.iter().map(String::as_str).collect();
        let method = if self.config.full_finetune { "all weights" } else { "LoRA" };
        let mut settings =
            vec![("method", format!("{method}, {} trained numbers", self.num_parameters))];
        if !self.config.full_finetune {
            settings.extend([
                ("r, alpha", format!("{}, {}", lora.r, lora.lora_alpha)),
                ("dropout", lora.lora_dropout.to_string()),
                ("scaled by the root of r", lora.use_rslora.to_string()),
                ("layers", modules.join(", ")),
            ]);
        }
        settings.extend([
            ("optimizer steps", schedule.total_steps.to_string()),
            (
                "rows of a step",
                format!("{} x {} micro-batches", batches.batch_size, batches.accumulation_steps),
            ),
            ("rows of similar length together", batches.group_by_length.to_string()),
            ("learning rate", format!("{}, {shape}", schedule.learning_rate)),
            ("warm-up", format!("{} steps", schedule.warmup_steps)),
            ("AdamW", format!("beta {} and {}, eps {:e}", adamw.beta1, adamw.beta2, adamw.eps)),
            ("weight decay", adamw.weight_decay.to_string()),
            ("gradients clipped to norm", adamw.max_grad_norm.to_string()),
            ("source, target at most", {
                let collate = &data.collate;
                format!("{} and {} tokens", collate.source_max_len, collate.target_max_len)
            }),
            ("EOS behind targets", data.collate.add_eos_to_target.to_string()),
            ("sources learned", data.collate.train_on_source.to_string()),
            (
                "learned of conversations",
                format!("{:?}", data.collate.learned_turns).to_lowercase(),
            ),
            ("kind of the base's weights", self.kind.clone()),
            ("seed", self.config.seed.to_string()),
        ]);
        settings
    }

    fn data(&self) -> Vec<(&'static str, String)> {
        let audit = self.audit;
        let cut =
            |side: &Side| format!("{} rows, {} tokens", side.truncated_rows, side.truncated_tokens);
        let [trained, held_out] = self.rows;
        vec![
            ("format of the rows", audit.format.to_string()),
            ("rows trained on", trained.to_string()),
            ("rows held out", held_out.to_string()),
            ("rows without a target, left out", audit.without_target.len().to_string()),
            ("tokens", format!("{}, {} of them learned", audit.tokens(), audit.learned_tokens)),
            ("sources cut on the left", cut(&audit.source)),
            ("targets cut on the right", cut(&audit.target)),
            ("conversations cut on the right", cut(&audit.conversation)),
            ("targets that end in a stop mark", format!("{:.1} %", audit.stop_mark_percent())),
        ]
    }

    fn results(&self) -> Vec<(&'static str, String)> {
        let lines = self.lines;
        let loss = |lines: &[Line]| {
            let losses: Vec<f64> =
                lines.iter().map(|line| line.step.loss).filter(|loss| loss.is_finite()).collect();
            format!("{:.4}", losses.iter().sum::<f64>() / losses.len() as f64)
        };
        let count = AVERAGED.min(lines.len());
        let held_out: Vec<f64> = lines.iter().filter_map(|line| line.eval_loss).collect();
        let seconds: f64 = lines.iter().map(|line| line.step.seconds).sum();
        let tokens: usize = lines.iter().map(|line| line.step.tokens).sum();
        let mut results = vec![
            ("loss of the first steps", loss(&lines[..count])),
            ("loss of the last steps", loss(&lines[lines.len() - count..])),
        ];
        if let [.., last] = held_out[..] {
            let best = held_out.iter().copied().fold(f64::INFINITY, f64::min);
            results.push(("held-out loss at the end", format!("{last:.4}")));
            results.push(("lowest held-out loss", format!("{best:.4}")));
        }
        let skipped = lines.iter().filter(|line| line.step.skipped).count();
        results.extend([
            ("steps skipped for numbers that were not finite", skipped.to_string()),
            ("tokens read", tokens.to_string()),
            ("time in steps", format!("{seconds:.0} s")),
        ]);
        results
    }
}

impl Display for ModelCard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let base = self.config.checkpoint.display().to_string();
        let name = Path::new(&base).file_name().unwrap_or_default().to_string_lossy();
        // A JSON string is a YAML string, whatever is in it.
        let yaml = serde_json::to_string(&base).map_err(|_| fmt::Error)?;
        let adapter = !self.config.full_finetune;
        let (library, tag, what) = match adapter {
            true => ("peft", "lora", "adapter"),
            false => ("transformers", "full-fine-tuning", "model"),
        };
        writeln!(f, "---\nbase_model: {yaml}\nlibrary_name: {library}")?;
        writeln!(f, "pipeline_tag: text-generation\ntags:\n- {tag}\n- self-align")?;
        writeln!(f, "- principle-engraving\n---\n")?;
        writeln!(f, "# Principle-engraved {what} of {name}\n")?;
        writeln!(
            f,
            "{}\n",
            match self.audit.format {
                DatasetFormat::Dromedary => {
                    "The base model was fine-tuned on answers that it gave behind a set of principles, with a \
                     short\nsystem prompt in the principles' place."
                }
                _ => "The base model was fine-tuned on the rows named below.",
            }
        )?;
        writeln!(f, "## Use\n")?;
        if adapter {
            writeln!(
                f,
                "```sh\nllama merge --checkpoint {base} --adapter . --output merged\n```\n"
            )?;
        }
        writeln!(f, "Prompts have the form that it was trained on:\n")?;
        let format = self.audit.format;
        writeln!(f, "```text\n{}\n```\n", format.prompt_form())?;
        let mut ends = Vec::new();
        if format.has_chat_template() {
            ends.push("where the chat template ends a turn".to_owned());
        } else if self.config.data.collate.add_eos_to_target {
            ends.push("at EOS".to_owned());
        }
        ends.extend(format.stop_mark().map(|mark| format!("where the model writes `{mark}`")));
        if !ends.is_empty() {
            writeln!(f, "An answer ends {}.\n", ends.join(", or "))?;
        }
        writeln!(f, "## Results\n\n| | |\n|---|---|\n{}", Table(&self.results()))?;
        writeln!(f, "![loss, gradient norm and learning rate by step]({CURVES_FILE})\n")?;
        writeln!(f, "## Data\n\n| | |\n|---|---|\n{}", Table(&self.data()))?;
        writeln!(f, "| file | BLAKE3 |\n|---|---|")?;
        for (path, hash) in &self.inputs.files {
            writeln!(f, "| {} | {} |", code(path), code(hash))?;
        }
        writeln!(f, "| base model {} (fingerprint) | {} |", code(&base), code(&self.inputs.base))?;
        writeln!(f, "| tokenizer (fingerprint) | {} |\n", code(&self.inputs.tokenizer))?;
        write!(f, "## Settings\n\n| | |\n|---|---|\n{}", Table(&self.settings()))
    }
}
