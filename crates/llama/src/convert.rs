//! Meta's layout into Hugging Face's and back, block by block.

use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
};

use crate::{
    LlamaConfig,
    checkpoint::{
        Checkpoint, CheckpointWriter, EMBEDDING, FolderWriter, HEAD, MetaCheckpoint, MetaOptions,
        PARAMS, Params, TOKENIZER_FILES, TensorSpec, TorchWriter, meta_name, row_unit,
        to_meta_order,
    },
    deal::deal,
    error::{Error, Result},
    logit_check::{LogitDifference, TOLERANCE, compare},
    meter::Meter,
    plan::Shard,
};

/// Bytes of a weight in memory at once.
const BLOCK: usize = 8 << 20;
/// A layout of checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CheckpointFormat {
    /// `params.json` and `consolidated.NN.pth`.
    Meta,
    /// `config.json` and safetensors files.
    HuggingFace,
}

impl CheckpointFormat {
    /// The layout of a folder.
    ///
    /// # Errors
    /// [`Error::NoCheckpoint`] if the folder has the configuration of neither or of both.
    pub fn of(dir: &Path) -> Result<Self> {
        match (dir.join(PARAMS).is_file(), dir.join("config.json").is_file()) {
            (true, false) => Ok(Self::Meta),
            (false, true) => Ok(Self::HuggingFace),
            (both, _) => Err(Error::NoCheckpoint {
                path: dir.into(),
                message: format!(
                    "there is {} config.json (Hugging Face's layout) {} {PARAMS} (Meta's)",
                    if both { "a" } else { "no" },
                    if both { "and a" } else { "and no" },
                ),
            }),
        }
    }
}

/// What is converted, and where to.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// Folder of the checkpoint, in either layout. It becomes one of the other.
    pub checkpoint: PathBuf,
    /// Folder that is to be written; must not exist.
    pub output: PathBuf,
    /// Meta's layout: number of files `consolidated.NN.pth`.
    pub num_shards: usize,
    /// Hugging Face's layout: largest weight file in bytes.
    pub max_shard_size: u64,
    /// Tokenizer of a checkpoint of Meta's layout, if its folder has none.
    pub tokenizer: Option<PathBuf>,
    /// Context of a checkpoint of Meta's layout, whose files do not say it.
    pub max_position_embeddings: Option<i64>,
    /// Compare the logits of both when the output is written.
    pub verify: bool,
}

/// What a conversion did.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvertReport {
    /// The layout that was written.
    pub format: CheckpointFormat,
    /// The model's sizes.
    pub config: LlamaConfig,
    /// Tensors written; those of several files count once.
    pub tensors: usize,
    /// Bytes of all tensors.
    pub bytes: u64,
    /// How far the logits of input and output are apart.
    pub difference: Option<LogitDifference>,
}

/// Writes a checkpoint of Meta's layout as one of Hugging Face's, or the other way. Weights keep their
/// data type; rows of query and key heads change their order, because Meta turns neighbouring features
/// and Hugging Face those that are half a head apart. Checkpoints that Dromedary padded come out as the
/// model that they are. `progress` gets the number of bytes after each block, and may stop it.
///
/// The output folder appears when it is complete and, with `verify`, has been compared. Memory stays
/// small whatever the model's size.
///
/// # Errors
/// An input that is not as strict as [`Checkpoint::open`] demands, a model that the other layout cannot
/// hold or that cannot be cut into `num_shards`, before anything is written; [`Error::Interrupted`]
/// where `progress` says so; [`Error::LogitsDiffer`]; what reading, writing and publishing can meet.
pub fn convert(
    options: &ConvertOptions,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<ConvertReport> {
    match CheckpointFormat::of(&options.checkpoint)? {
        CheckpointFormat::Meta => to_hf(options, progress),
        CheckpointFormat::HuggingFace => to_meta(options, progress),
    }
}

fn to_hf(
    options: &ConvertOptions,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<ConvertReport> {
    let meta_options = MetaOptions {
        tokenizer: options.tokenizer.clone(),
        max_position_embeddings: options.max_position_embeddings,
    };
    let meta = MetaCheckpoint::open(&options.checkpoint, &meta_options)?;
    let mut writer =
        CheckpointWriter::create(&options.output, meta.specs(), options.max_shard_size)?;
    let config = format!("{:#}\n", meta.hf_config());
    writer.add_file("config.json", config.as_bytes())?;
    for path in [Some(&options.checkpoint), options.tokenizer.as_ref()].into_iter().flatten() {
        writer.copy_tokenizer(path)?;
    }
    let order = writer.order().to_vec();
    let meter = Meter::new(progress);
    for spec in &order {
        for rows in spec.blocks(meta.unit(&spec.name), BLOCK) {
            let block = meta.rows(&spec.name, rows)?;
            writer.append(&spec.name, &block)?;
            meter.written(&block)?;
        }
    }
    let difference = writer.finish_checked(|dir| {
        let check = || compare(&meta, &Checkpoint::open(dir)?, &options.output, TOLERANCE, &meter);
        options.verify.then(check).transpose()
    })?;
    Ok(ConvertReport {
        format: CheckpointFormat::HuggingFace,
        config: meta.config().clone(),
        tensors: order.len(),
        bytes: meter.bytes(),
        difference,
    })
}

fn to_meta(
    options: &ConvertOptions,
    progress: &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<ConvertReport> {
    let base = Checkpoint::open(&options.checkpoint)?;
    let config = base.config();
    let params = Params::of_hf(config, &options.checkpoint.join("config.json"))?;
    let split = MetaSplit::new(config, &params, options.num_shards)?;
    let mut folder = FolderWriter::create(&options.output)?;
    let params = serde_json::to_vec(&params)
        .map_err(|source| Error::Json { path: options.output.join(PARAMS), source })?;
    folder.add_file(PARAMS, &params)?;
    folder.copy_companions(&options.checkpoint, TOKENIZER_FILES)?;
    let tensors = tensors_of_meta(&base)?;
    let mut files = split.files(&folder, &tensors)?;
    let meter = Meter::new(progress);
    for (spec, source) in &tensors {
        let unit = row_unit(config, source);
        for rows in spec.blocks(unit, BLOCK) {
            let mut block = base.read_rows(source, rows.clone())?;
            if is_turned(source) {
                block = to_meta_order(&block, config.head_dim)?;
            }
            let shards = split.shards(&spec.name, &spec.shape);
            deal(&shards, &rows, &block, &mut |file, part| files[file].append(&spec.name, part))?;
            meter.written(&block)?;
        }
    }
    for (number, file) in files.into_iter().enumerate() {
        folder.add_written(MetaSplit::file_name(number), file.finish()?);
    }
    let difference = folder.finish_checked(|dir| {
        let check = || {
            let written = MetaCheckpoint::open(dir, &MetaOptions::default())?;
            compare(&base, &written, &options.output, TOLERANCE, &meter)
        };
        options.verify.then(check).transpose()
    })?;
    Ok(ConvertReport {
        format: CheckpointFormat::Meta,
        config: config.clone(),
        tensors: tensors.len(),
        bytes: meter.bytes(),
        difference,
    })
}

/// Whether a tensor's rows have another order in the two layouts.
fn is_turned(hf_name: &str) -> bool {
    hf_name.ends_with(".q_proj.weight") || hf_name.ends_with(".k_proj.weight")
}

/// The tensors of Meta's layout, each with the name of the one that it is made of. There is always a
/// head, if only a copy of the embedding.
fn tensors_of_meta(base: &Checkpoint) -> Result<Vec<(TensorSpec, String)>> {
    let mut sources = base.specs()?;
    if base.config().tie_word_embeddings {
        sources.extend(sources.iter().find(|spec| spec.name == EMBEDDING).cloned());
    }
    let count = sources.len();
    let tied = base.config().tie_word_embeddings;
    let named = sources.into_iter().enumerate().filter_map(|(number, spec)| {
        let is_head = tied && number + 1 == count;
        let name = meta_name(if is_head { HEAD } else { &spec.name })?;
        Some((TensorSpec { name, ..spec.clone() }, spec.name))
    });
    Ok(named.collect())
}

/// The cut of a model into equal parts, as Meta's code expects it.
struct MetaSplit {
    count: usize,
    embedding_by_rows: bool,
}

impl MetaSplit {
    /// # Errors
    /// [`Error::UnequalShards`] if a dimension is no multiple of the number of files.
    fn new(config: &LlamaConfig, params: &Params, count: usize) -> Result<Self> {
        // Meta's own code cuts the embedding along the vocabulary since LLaMA 3.
        let embedding_by_rows =
            params.use_scaled_rope || params.rope_theta.is_some_and(|theta| theta >= 5e5);
        for (what, size) in [
            ("num_attention_heads", config.num_attention_heads),
            ("num_key_value_heads", config.num_key_value_heads),
            ("intermediate_size", config.intermediate_size),
            ("hidden_size", config.hidden_size),
            ("vocab_size", config.vocab_size),
        ] {
            if count == 0 || size % count as i64 != 0 {
                return Err(Error::UnequalShards { what, size, count });
            }
        }
        Ok(Self { count, embedding_by_rows })
    }

    fn file_name(number: usize) -> String {
        format!("consolidated.{number:02}.pth")
    }

    /// What each file has of a tensor of this shape, by Meta's name.
    fn shards(&self, name: &str, shape: &[i64]) -> Vec<Shard> {
        let cut_by_columns = name.ends_with(".wo.weight")
            || name.ends_with(".w2.weight")
            || (name.starts_with("tok_embeddings.") && !self.embedding_by_rows);
        let dim = (shape.len() > 1).then_some(usize::from(cut_by_columns));
        (0..self.count).map(|number| Shard::equal(dim, shape, number, self.count)).collect()
    }

    fn files(
        &self,
        folder: &FolderWriter,
        tensors: &[(TensorSpec, String)],
    ) -> Result<Vec<TorchWriter>> {
        let (dir, target) = folder.paths();
        (0..self.count)
            .map(|number| {
                let local = tensors.iter().map(|(spec, _)| {
                    let shards = self.shards(&spec.name, &spec.shape);
                    let shape = shards[number].local_shape(&spec.shape);
                    TensorSpec { shape, ..spec.clone() }
                });
                TorchWriter::create(dir, target, &Self::file_name(number), local.collect())
            })
            .collect()
    }
}
