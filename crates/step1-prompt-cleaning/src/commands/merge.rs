use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use dromedary_command::{Error, required};
use dromedary_records::{Prompt, RowWriter};
use serde::{Deserialize, Serialize};

use super::settings::{
    SharedArgs, SharedConfig, positive, refuse_overwriting, require_tokenizer_for_compat,
};
use super::{Run, Session, make_report_folder, on_threads, open_counter, prompt, publish};
use crate::buckets::KeyedBuckets;
use crate::report::{Report, SourceCounts};
use crate::sources::{
    AnsweredMessages, DollyPrompt, Fault, OasstMessage, Row, Value, refuse_hub_name, rows,
};
use crate::{
    DropReason, Edit, Fingerprint, KeyedOrder, LengthRule, Result, Rules, Source, TokenCounter,
    clean,
};

const COMMAND: &str = "clean-and-merge";

/// Flags of `clean-and-merge`.
#[derive(Clone, Debug, Default, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default)]
pub struct MergeArgs {
    /// Output of aggregate-sharegpt.
    #[arg(long, value_name = "FILE")]
    pub sharegpt_prompt_path: Option<PathBuf>,
    /// Output of subsample-openorca.
    #[arg(long, value_name = "FILE")]
    pub openorca_prompt_path: Option<PathBuf>,
    /// databricks-dolly-15k.jsonl, which the original downloads.
    #[arg(long, value_name = "FILE")]
    pub dolly: Option<PathBuf>,
    /// oasst1 as JSON lines, flat messages or trees, which the original downloads.
    #[arg(long, value_name = "FILE")]
    pub oasst: Option<PathBuf>,
    /// Where the prompts go: a JSON array, or JSON lines if it ends in .jsonl (.gz and .zst too).
    #[arg(long, value_name = "FILE", alias = "output-path")]
    pub output_file: Option<PathBuf>,
    /// tokenizer.json that measures lengths, or a folder with one [default: none, lengths are
    /// estimated].
    #[arg(long, value_name = "PATH", aliases = ["tokenizer-name", "tokenizer-path"])]
    pub tokenizer: Option<PathBuf>,
    /// Tokens of the shortest prompt that is kept, BOS counted [default: 2].
    #[arg(long, value_name = "TOKENS")]
    pub min_prompt_len: Option<usize>,
    /// Tokens of the longest prompt that is kept, BOS counted [default: 256].
    #[arg(long, value_name = "TOKENS")]
    pub max_prompt_len: Option<usize>,
    /// Seed of the order [default: 42].
    #[arg(long)]
    pub seed: Option<u64>,
    /// Flags that every command has.
    #[command(flatten)]
    #[serde(flatten)]
    pub shared: SharedArgs,
}

/// Settings of [`clean_and_merge`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct MergeConfig {
    /// Output of [`aggregate_sharegpt`](super::aggregate_sharegpt).
    pub sharegpt_prompt_path: Option<PathBuf>,
    /// Output of [`subsample_openorca`](super::subsample_openorca).
    pub openorca_prompt_path: Option<PathBuf>,
    /// Dolly-15k.
    pub dolly: Option<PathBuf>,
    /// oasst1.
    pub oasst: Option<PathBuf>,
    /// Where the prompts go.
    pub output_file: PathBuf,
    /// What measures lengths; without, they are estimated.
    pub tokenizer: Option<PathBuf>,
    /// Tokens of the shortest prompt.
    pub min_prompt_len: usize,
    /// Tokens of the longest prompt.
    pub max_prompt_len: usize,
    /// Seed of the order.
    pub seed: u64,
    /// Settings that every command has.
    #[serde(flatten)]
    pub shared: SharedConfig,
}

impl TryFrom<MergeArgs> for MergeConfig {
    type Error = Error;

    fn try_from(args: MergeArgs) -> dromedary_command::Result<MergeConfig> {
        let config = MergeConfig {
            sharegpt_prompt_path: args.sharegpt_prompt_path,
            openorca_prompt_path: args.openorca_prompt_path,
            dolly: args.dolly,
            oasst: args.oasst,
            output_file: required(args.output_file, "output_file")?,
            tokenizer: args.tokenizer,
            min_prompt_len: args.min_prompt_len.unwrap_or(2),
            max_prompt_len: positive(args.max_prompt_len.unwrap_or(256), "--max-prompt-len")?,
            seed: args.seed.unwrap_or(42),
            shared: args.shared.try_into()?,
        };
        config.check()?;
        Ok(config)
    }
}

impl MergeConfig {
    fn check(&self) -> dromedary_command::Result<()> {
        let files: Vec<_> =
            Source::ALL.into_iter().filter_map(|source| self.file(source)).collect();
        if files.is_empty() {
            return Err(Error::usage(
                "nothing to merge: give --sharegpt-prompt-path, --openorca-prompt-path, --dolly or \
                 --oasst",
            ));
        }
        if self.min_prompt_len > self.max_prompt_len {
            return Err(Error::usage(format!(
                "--min-prompt-len {} is more than --max-prompt-len {}",
                self.min_prompt_len, self.max_prompt_len
            )));
        }
        for source in Source::ALL {
            if let Some(file) = self.file(source) {
                refuse_hub_name(file, flag(source))?;
            }
        }
        if let Some(tokenizer) = &self.tokenizer {
            refuse_hub_name(tokenizer, "--tokenizer")?;
        }
        refuse_overwriting(&self.output_file, files)?;
        require_tokenizer_for_compat(self.shared.compat.is_some(), self.tokenizer.is_some())
    }

    fn file(&self, source: Source) -> Option<&PathBuf> {
        match source {
            Source::Dolly => self.dolly.as_ref(),
            Source::Oasst1 => self.oasst.as_ref(),
            Source::ShareGpt => self.sharegpt_prompt_path.as_ref(),
            Source::OpenOrca => self.openorca_prompt_path.as_ref(),
        }
    }
}

fn flag(source: Source) -> &'static str {
    match source {
        Source::Dolly => "--dolly",
        Source::Oasst1 => "--oasst",
        Source::ShareGpt => "--sharegpt-prompt-path",
        Source::OpenOrca => "--openorca-prompt-path",
    }
}

/// Cleans the prompts of all sources and writes each once, shuffled by the seed.
///
/// Where prompts are equal, the first wins in the order of [`Source::ALL`]. (Dromedary writes the
/// sources one after the other; shuffled, every part of the file is a fair sample.)
///
/// # Errors
/// A file that cannot be read or written, too many bad rows, no row left, a stop. Nothing is
/// written then.
pub fn clean_and_merge(config: &MergeConfig, session: &Session) -> Result<Report> {
    on_threads(config.shared.threads, || merge(config, session))
}

fn merge(config: &MergeConfig, session: &Session) -> Result<Report> {
    make_report_folder(config.shared.report.as_deref())?;
    let judge = Judge {
        rules: config.shared.compat.into(),
        counter: open_counter(config.tokenizer.as_deref())?,
        length: LengthRule { min: config.min_prompt_len, max: config.max_prompt_len, suffix: "" },
    };
    let mut writer = RowWriter::create(&config.output_file)?;
    let mut run = Run::new(session, config.shared.max_bad_rows);
    let mut merger = Merger::new(config);
    for source in Source::ALL {
        let Some(file) = config.file(source) else {
            tracing::warn!("no {}: the output has no prompts of {source}", flag(source));
            continue;
        };
        merger.counts.insert(source.to_string(), SourceCounts::default());
        run.read(
            file,
            open(source, file)?,
            |candidate| judge.judge(source, candidate),
            |judged| merger.admit(source, judged),
        )?;
    }
    for prompt in merger.buckets.into_ordered() {
        writer.write(&prompt?)?;
    }
    let report = run.report(COMMAND, config, &config.output_file, merger.counts)?;
    publish(report, writer, config.shared.report.as_deref())
}

/// What a source offers as a prompt: instruction and input.
type Candidate = std::result::Result<(String, String), DropReason>;

fn open(source: Source, file: &Path) -> Result<Box<dyn Iterator<Item = Result<Row<Candidate>>>>> {
    let alone = |instruction| (instruction, String::new());
    Ok(match source {
        Source::Dolly => Box::new(DollyPrompt::open(file)?.map(move |row| {
            Ok(row?.map(|prompt| match prompt {
                DollyPrompt::Prompt(instruction) => Ok(alone(instruction)),
                DollyPrompt::Unfit(reason) => Err(reason),
            }))
        })),
        Source::Oasst1 => {
            let answered = AnsweredMessages::open(file)?;
            Box::new(OasstMessage::open(file, answered)?.map(move |row| {
                Ok(row?.map(|message| match message {
                    OasstMessage::Prompt(text) => Ok(alone(text)),
                    OasstMessage::Unfit(reason) => Err(reason),
                }))
            }))
        }
        Source::ShareGpt | Source::OpenOrca => {
            Box::new(rows(file, &["instruction"])?.map(|row| Ok(row?.read(read_prompt))))
        }
    })
}

fn read_prompt(mut row: Value) -> std::result::Result<Candidate, Fault> {
    let instruction = row.take_text("instruction")?;
    let input = row.take_optional_text("input")?.unwrap_or_default();
    Ok(Ok((instruction, input)))
}

/// The rules that look at one prompt.
struct Judge {
    rules: Rules,
    counter: TokenCounter,
    length: LengthRule,
}

struct Judged {
    edits: Vec<Edit>,
    outcome: std::result::Result<(Fingerprint, Prompt), DropReason>,
}

impl Judge {
    fn judge(&self, source: Source, candidate: Candidate) -> Judged {
        let (instruction, input) = match candidate {
            Ok(candidate) => candidate,
            Err(reason) => return Judged { edits: Vec::new(), outcome: Err(reason) },
        };
        let cleaned = clean(self.rules, source, &instruction);
        let outcome = self.check(source, cleaned.text, input);
        Judged { edits: cleaned.edits, outcome }
    }

    fn check(
        &self,
        source: Source,
        instruction: &str,
        input: String,
    ) -> std::result::Result<(Fingerprint, Prompt), DropReason> {
        if instruction.is_empty() {
            return Err(DropReason::Empty);
        }
        let prompt = prompt(source, instruction.to_owned(), input);
        let whole = match prompt.input.as_str() {
            "" => prompt.instruction.clone(),
            input => format!("{}\n\n{input}", prompt.instruction),
        };
        match self.length.check(&self.counter, &whole) {
            Some(reason) => Err(reason),
            None => Ok((Fingerprint::of(self.rules, &whole), prompt)),
        }
    }
}

/// Keeps the first of equal prompts, in the order of the seed.
struct Merger {
    order: KeyedOrder,
    seen: BTreeSet<Fingerprint>,
    buckets: KeyedBuckets<Prompt>,
    counts: BTreeMap<String, SourceCounts>,
}

impl Merger {
    fn new(config: &MergeConfig) -> Merger {
        Merger {
            order: KeyedOrder::new(config.seed),
            seen: BTreeSet::new(),
            buckets: KeyedBuckets::beside(&config.output_file),
            counts: BTreeMap::new(),
        }
    }

    fn admit(&mut self, source: Source, judged: Option<Judged>) -> Result<()> {
        let counts = self.counts.entry(source.to_string()).or_default();
        counts.rows += 1;
        let Some(judged) = judged else {
            counts.count_drops(DropReason::BadRow, 1);
            return Ok(());
        };
        counts.count_edits(&judged.edits);
        match judged.outcome {
            Ok((fingerprint, prompt)) if self.seen.insert(fingerprint) => {
                counts.kept += 1;
                self.buckets.push(self.order.output_key(&fingerprint), &prompt)?;
            }
            Ok(_) => counts.count_drops(DropReason::Duplicate, 1),
            Err(reason) => counts.count_drops(reason, 1),
        }
        Ok(())
    }
}
