use std::{
    fmt::Write as _,
    io::{self, Write as _},
    ops::Range,
    path::PathBuf,
};

use dromedary_command::{Common, Error, boolean, required};
use dromedary_parallel::planned_device;
use serde::{Deserialize, Serialize};
use tch::Device;

use super::settings;
use crate::{
    Checkpoint, Dtype, Footprint, LoadOptions, Memory, Outline, Plan, RankPlan, Slowest, Workload,
    select_kind, select_nf4,
};

/// Show how a model is split over processes: what each of them owns, stores and computes.
///
/// Nothing is loaded. Any number of processes up to the number of query heads will do, it need not
/// divide anything. The slowest process is the one that all others wait for: 1.10 x the mean work
/// means that the split gives at most 1 / 1.10 of the speed of an even one.
#[derive(Debug, Default, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct PlanArgs {
    /// Folder of the checkpoint, or a config.json alone.
    #[arg(long, value_name = "PATH", aliases = ["ckpt-dir", "model-name-or-path"])]
    checkpoint: Option<PathBuf>,
    /// Processes that the model is split over [default: 1].
    #[arg(long, value_name = "COUNT")]
    tp: Option<usize>,
    /// Where it would run: auto, cpu or cuda; auto is a GPU where there is one here
    /// [default: auto].
    #[arg(long)]
    device: Option<String>,
    /// Kind of the weights: auto, f32, bf16 or f16; auto is f32 on a CPU and the stored one on a GPU
    /// [default: auto].
    #[arg(long)]
    dtype: Option<String>,
    /// Bits of the linear layers: 4 as `llama quantize --nf4` stores them, 16 for --dtype
    /// [default: as the checkpoint is stored; 16 on a GPU].
    #[arg(long, value_name = "BITS")]
    bits: Option<u8>,
    /// Tokens of the prefix that all rows share: each rank keeps its keys and values once, and every
    /// new token attends to them [default: 0].
    #[arg(long, value_name = "TOKENS")]
    prefix_tokens: Option<u64>,
    /// Rows that are generated at once [default: 8].
    #[arg(long, value_name = "ROWS", value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    max_batch_size: Option<u64>,
    /// Tokens of a row behind the prefix, its prompt and its output [default: 512, or
    /// what the context leaves].
    #[arg(long, value_name = "TOKENS")]
    max_seq_len: Option<u64>,
    /// Print JSON, with exact numbers, instead of a table [default: false].
    #[arg(long, num_args = 0..=1, default_missing_value = "true", value_parser = boolean)]
    json: Option<bool>,
}

#[derive(Debug, Serialize)]
struct PlanConfig {
    checkpoint: PathBuf,
    tp: usize,
    device: String,
    dtype: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    bits: Option<u8>,
    prefix_tokens: u64,
    max_batch_size: u64,
    max_seq_len: Option<u64>,
    json: bool,
}

impl TryFrom<PlanArgs> for PlanConfig {
    type Error = Error;

    fn try_from(args: PlanArgs) -> Result<Self, Error> {
        Ok(Self {
            checkpoint: required(args.checkpoint, "checkpoint")?,
            tp: args.tp.unwrap_or(1),
            device: args.device.unwrap_or_else(|| "auto".into()),
            dtype: args.dtype.unwrap_or_else(|| "auto".into()),
            bits: args.bits,
            prefix_tokens: args.prefix_tokens.unwrap_or(0),
            max_batch_size: args.max_batch_size.unwrap_or(8),
            max_seq_len: args.max_seq_len,
            json: args.json.unwrap_or(false),
        })
    }
}

pub(super) fn run(args: PlanArgs, common: &Common) -> anyhow::Result<()> {
    let Some(config) = settings::<_, PlanConfig>("plan", args, common)? else { return Ok(()) };
    let report = Report::new(&config)?;
    let text =
        if config.json { serde_json::to_string_pretty(&report)? + "\n" } else { report.table()? };
    io::stdout().write_all(text.as_bytes())?;
    Ok(())
}

/// What is printed: the whole of it as JSON, or as a table.
#[derive(Debug, Serialize)]
struct Report {
    checkpoint: PathBuf,
    tp: usize,
    device: &'static str,
    dtype: String,
    /// Linear layers are in four bits.
    nf4: bool,
    kv_dtype: String,
    num_hidden_layers: i64,
    num_attention_heads: i64,
    num_key_value_heads: i64,
    intermediate_size: i64,
    vocab_size: i64,
    prefix_tokens: u64,
    max_batch_size: u64,
    max_seq_len: u64,
    ranks: Vec<Rank>,
    total: Bytes,
    slowest: Option<Slowest>,
}

#[derive(Debug, Serialize)]
struct Rank {
    rank: usize,
    q_heads: Range<usize>,
    kv_heads: Range<usize>,
    groups: Vec<Group>,
    intermediate: Range<i64>,
    vocab: Range<i64>,
    #[serde(flatten)]
    bytes: Bytes,
    parameters: u64,
    parameters_read: u64,
    work_per_token: u64,
}

/// Query heads that read one key/value head.
#[derive(Debug, Serialize)]
struct Group {
    kv_head: usize,
    q_heads: Range<usize>,
}

#[derive(Debug, Default, Clone, Copy, Serialize)]
struct Bytes {
    kv_bytes_per_token: u64,
    #[serde(flatten)]
    memory: Memory,
}

impl Bytes {
    fn plus(self, other: Self) -> Self {
        let (own, other_memory) = (self.memory, other.memory);
        Self {
            kv_bytes_per_token: self.kv_bytes_per_token + other.kv_bytes_per_token,
            memory: Memory {
                weight_bytes: own.weight_bytes + other_memory.weight_bytes,
                prefix_bytes: own.prefix_bytes + other_memory.prefix_bytes,
                slot_bytes: own.slot_bytes + other_memory.slot_bytes,
                work_bytes: own.work_bytes + other_memory.work_bytes,
                peak_bytes: own.peak_bytes + other_memory.peak_bytes,
            },
        }
    }
}

impl Report {
    fn new(settings: &PlanConfig) -> anyhow::Result<Self> {
        let Outline { config, dtype, nf4 } = Checkpoint::outline(&settings.checkpoint)?;
        let plan = Plan::new(&config, settings.tp)?;
        let context = u64::try_from(config.max_position_embeddings)?;
        if settings.prefix_tokens >= context {
            anyhow::bail!(
                "--prefix-tokens {} leaves no room in the model's context of {context}",
                settings.prefix_tokens
            );
        }
        let room = context - settings.prefix_tokens;
        let max_seq_len = settings.max_seq_len.unwrap_or(DEFAULT_SEQ_LEN.min(room));
        if max_seq_len > room {
            anyhow::bail!(
                "--max-seq-len {max_seq_len} behind --prefix-tokens {} is more than the model's context \
                 of {context}",
                settings.prefix_tokens
            );
        }
        let device = planned_device(&settings.device)?;
        let kind = select_kind(&settings.dtype, device, dtype)?;
        let nf4 = select_nf4(settings.bits, device, nf4 || settings.bits == Some(4))?;
        let options = LoadOptions { device, kind, nf4, tp: settings.tp, ..LoadOptions::default() };
        let footprints: Vec<Footprint> = (0..settings.tp)
            .map(|tp_rank| Footprint::new(&config, &plan, &LoadOptions { tp_rank, ..options }))
            .collect();
        let workload = Workload {
            prefix_tokens: settings.prefix_tokens,
            max_batch_size: settings.max_batch_size,
            max_seq_len,
            max_kv_tokens: None,
        };
        let ranks: Vec<Rank> = footprints
            .iter()
            .enumerate()
            .map(|(rank, cost)| Rank::new(rank, plan.rank(rank), cost, &workload))
            .collect();
        let name = |kind| Dtype::of_kind(kind).map_or_else(String::new, |dtype| dtype.to_string());
        Ok(Self {
            checkpoint: settings.checkpoint.clone(),
            tp: settings.tp,
            device: if device == Device::Cpu { "cpu" } else { "cuda" },
            dtype: name(kind),
            nf4,
            kv_dtype: name(options.compute_kind()),
            num_hidden_layers: config.num_hidden_layers,
            num_attention_heads: config.num_attention_heads,
            num_key_value_heads: config.num_key_value_heads,
            intermediate_size: config.intermediate_size,
            vocab_size: config.vocab_size,
            prefix_tokens: settings.prefix_tokens,
            max_batch_size: settings.max_batch_size,
            max_seq_len,
            total: ranks.iter().map(|rank| rank.bytes).fold(Bytes::default(), Bytes::plus),
            ranks,
            slowest: Slowest::of(&footprints, settings.prefix_tokens),
        })
    }

    fn table(&self) -> anyhow::Result<String> {
        let mut text = String::new();
        writeln!(text, "model      {}", self.checkpoint.display())?;
        writeln!(
            text,
            "           {} layers, {} query and {} key/value heads, {} ffn columns, {} vocabulary \
             rows",
            self.num_hidden_layers,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.intermediate_size,
            self.vocab_size
        )?;
        writeln!(
            text,
            "kept as    {} on {}{}, keys and values in {}",
            self.dtype,
            self.device,
            if self.nf4 { ", linear layers in NF4" } else { "" },
            self.kv_dtype
        )?;
        writeln!(
            text,
            "generates  prefix of {} tokens, {} rows of {} tokens behind it",
            self.prefix_tokens, self.max_batch_size, self.max_seq_len
        )?;
        writeln!(text)?;
        let mut rows = vec![HEADINGS.map(String::from).to_vec()];
        rows.extend(self.ranks.iter().map(Rank::cells));
        let mut total = vec!["all".to_owned()];
        total.resize(HEADINGS.len() - 1 - BYTE_COLUMNS, String::new());
        total.extend(self.total.cells());
        rows.push(total);
        text.push_str(&aligned(&rows));
        if let Some(slowest) = self.slowest {
            writeln!(text)?;
            writeln!(
                text,
                "slowest    rank {} with {:.3} x the mean work for a token and {:.3} x the mean \
                 weights",
                slowest.rank, slowest.work_over_mean, slowest.weights_over_mean
            )?;
        }
        Ok(text)
    }
}

/// Tokens of a row behind the prefix where nobody says otherwise.
const DEFAULT_SEQ_LEN: u64 = 512;

/// Columns of bytes, before the last one.
const BYTE_COLUMNS: usize = 6;

const HEADINGS: [&str; 7 + BYTE_COLUMNS] = [
    "rank",
    "query heads",
    "key/value heads",
    "queries of each",
    "ffn columns",
    "vocabulary rows",
    "weights",
    "K/V a token",
    "prefix",
    "slots",
    "work",
    "peak",
    "multiply-adds a token",
];

impl Rank {
    fn new(rank: usize, plan: &RankPlan, cost: &Footprint, workload: &Workload) -> Self {
        let group = |(kv_head, q_heads): &(usize, Range<usize>)| Group {
            kv_head: *kv_head,
            q_heads: q_heads.clone(),
        };
        Self {
            rank,
            q_heads: plan.q_heads(),
            kv_heads: plan.kv_heads(),
            groups: plan.groups.iter().map(group).collect(),
            intermediate: plan.intermediate.clone(),
            vocab: plan.vocab.clone(),
            bytes: Bytes {
                kv_bytes_per_token: cost.kv_bytes_per_token,
                memory: cost.memory(workload),
            },
            parameters: cost.parameters,
            parameters_read: cost.parameters_read,
            work_per_token: cost.work(workload.prefix_tokens),
        }
    }

    fn cells(&self) -> Vec<String> {
        let mut sizes: Vec<String> =
            self.groups.iter().map(|group| group.q_heads.len().to_string()).collect();
        sizes.dedup();
        let mut cells = vec![
            self.rank.to_string(),
            format!("{:?}", self.q_heads),
            format!("{:?}", self.kv_heads),
            sizes.join(", "),
            format!("{:?}", self.intermediate),
            format!("{:?}", self.vocab),
        ];
        cells.extend(self.bytes.cells());
        cells.push(short(self.work_per_token, ""));
        cells
    }
}

impl Bytes {
    fn cells(&self) -> [String; BYTE_COLUMNS] {
        let Memory { weight_bytes, prefix_bytes, slot_bytes, work_bytes, peak_bytes } = self.memory;
        let kv = self.kv_bytes_per_token;
        [weight_bytes, kv, prefix_bytes, slot_bytes, work_bytes, peak_bytes].map(|n| short(n, "B"))
    }
}

/// Four digits and a decimal prefix, as in `538.1 MB`.
fn short(number: u64, unit: &str) -> String {
    let mut value = number as f64;
    let mut prefixes = ["", "k", "M", "G", "T"].into_iter();
    let mut prefix = prefixes.next().unwrap_or_default();
    for larger in prefixes {
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        prefix = larger;
    }
    let digits = if prefix.is_empty() || value >= 99.95 { 0 } else { 1 };
    let separator = if prefix.is_empty() && unit.is_empty() { "" } else { " " };
    format!("{value:.digits$}{separator}{prefix}{unit}")
}

/// Columns as wide as their widest cell.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column| rows.iter().filter_map(|row: &Vec<String>| row.get(column)).map(String::len).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:>width$}")).collect();
        text.push_str(cells.join("  ").trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (number, text) in [
            (0, "0 B"),
            (999, "999 B"),
            (1000, "1.0 kB"),
            (99_949, "99.9 kB"),
            (99_950, "100 kB"),
            (999_499, "999 kB"),
            (999_500, "1.0 MB"),
            (17_244_886_016, "17.2 GB"),
            (7_000_000_000_000_000, "7000 TB"),
        ] {
            assert_eq!(short(number, "B"), text);
        }
        assert_eq!(short(17, ""), "17");
        assert_eq!(short(134_515_008, ""), "135 M");
    }

    #[test]
    fn columns_are_aligned_to_the_right() {
        let rows = [vec!["rank".into(), "a".into()], vec!["10".into(), "bbb".into()]];
        assert_eq!(aligned(&rows), "rank    a\n  10  bbb\n");
    }
}
