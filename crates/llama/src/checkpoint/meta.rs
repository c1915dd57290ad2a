//! Checkpoints of Meta's layout: `params.json` and `consolidated.NN.pth`, one file a rank of the job that
//! wrote them, and those that Dromedary padded to sizes that more ranks divide.

// Shapes of padded checkpoints: H = query heads in the files, of which the first n_heads are the model's
// and the rest is zero; each K/V head stands n_heads / n_kv_heads times in a row; D = head_dim.

use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use dromedary_tokenizer::Tokenizer;
use tch::{Kind, Tensor};

use super::{
    dtype::Dtype,
    file::{Entry, TensorFile},
    output::TensorSpec,
    params::{HfSizes, PARAMS, Params},
    pieces::{Piece, Pieces, Split},
    tensors::{EMBEDDING, HEAD, blocks, shape_of, tensor_shapes},
};
use crate::{
    attention::one_or_cat,
    config::LlamaConfig,
    error::{Error, Result, TensorProblems},
};

/// Bytes of a weight that the search for padding looks at at once.
const BLOCK: usize = 8 << 20;

/// What a folder of Meta's layout does not say.
#[derive(Debug, Clone, Default)]
pub(crate) struct MetaOptions {
    /// For `vocab_size` -1 and the ids of special tokens; default: the folder's own.
    pub(crate) tokenizer: Option<PathBuf>,
    /// The context; default: what Meta's models of these constants have.
    pub(crate) max_position_embeddings: Option<i64>,
}

/// A folder of Meta's layout whose tensors are exactly those of its `params.json`.
#[derive(Debug)]
pub(crate) struct MetaCheckpoint {
    files: Vec<TensorFile>,
    /// By the name that Hugging Face gives it, in the sizes of the files.
    tensors: BTreeMap<String, Pieces>,
    dtypes: BTreeMap<String, Dtype>,
    /// The sizes of the files.
    stored: LlamaConfig,
    /// The sizes of the model.
    config: LlamaConfig,
    /// The text of a `config.json`.
    hf_config: serde_json::Value,
    /// How often each K/V head stands in the files.
    repeats: i64,
}

impl MetaCheckpoint {
    /// Opens a folder. Of a padded checkpoint all weights are read, to find what is padding.
    ///
    /// # Errors
    /// As [`Checkpoint::open`](crate::Checkpoint::open); padding that is not zero, or K/V heads that
    /// should be copies of each other and are not.
    pub(crate) fn open(dir: &Path, options: &MetaOptions) -> Result<Self> {
        let params = Params::open(dir)?;
        let files = open_files(dir)?;
        let tokenizer = tokenizer(dir, options)?;
        let context = options.max_position_embeddings.unwrap_or_else(|| params.usual_context());
        let rows_of_head: i64 = files
            .iter()
            .filter_map(|file| file.entries().get("output.weight")?.shape.first())
            .sum();
        let vocab_size = vocab_size(dir, &params, tokenizer.as_ref(), rows_of_head)?;
        let resolve = |sizes: &HfSizes| {
            let value = params.to_hf(sizes, tokenizer.as_ref());
            let config = LlamaConfig::from_json(value.to_string().as_bytes(), &dir.join(PARAMS))?;
            Ok::<_, Error>((value, config))
        };
        let heads = params.stored_heads();
        let mut sizes = HfSizes {
            num_attention_heads: heads,
            num_key_value_heads: if params.qkv_dim.is_some() {
                heads
            } else {
                params.n_kv_heads.unwrap_or(params.n_heads)
            },
            intermediate_size: params.stored_intermediate_size(),
            vocab_size: params.model_vocab_size.unwrap_or(vocab_size),
            max_position_embeddings: context,
            dtype: Dtype::F32,
        };
        let (_, stored) = resolve(&sizes)?;
        let (tensors, dtypes) = place(dir, &stored, &files)?;
        sizes.dtype = dtypes.get(EMBEDDING).copied().unwrap_or(Dtype::F32);
        let (hf_config, config) = resolve(&sizes)?;
        let mut checkpoint = Self { files, tensors, dtypes, stored, config, hf_config, repeats: 1 };
        if params.is_padded() {
            let padding = Padding::find(&checkpoint, dir, params.n_heads, vocab_size)?;
            checkpoint.repeats = padding.repeats;
            sizes.num_attention_heads = params.n_heads;
            sizes.num_key_value_heads = match params.qkv_dim {
                Some(_) => params.n_heads / padding.repeats,
                None => sizes.num_key_value_heads,
            };
            sizes.intermediate_size = padding.intermediate_size;
            sizes.vocab_size = vocab_size;
            (checkpoint.hf_config, checkpoint.config) = resolve(&sizes)?;
        }
        Ok(checkpoint)
    }

    /// The model's sizes, without padding.
    pub(crate) fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The sizes of the files, padding included.
    pub(crate) fn stored_config(&self) -> &LlamaConfig {
        &self.stored
    }

    /// The `config.json` of the model.
    pub(crate) fn hf_config(&self) -> &serde_json::Value {
        &self.hf_config
    }

    /// The model's tensors by Hugging Face's names.
    pub(crate) fn specs(&self) -> Vec<TensorSpec> {
        tensor_shapes(&self.config)
            .into_iter()
            .map(|(name, shape)| {
                let dtype = self.dtypes[&name];
                TensorSpec { name, dtype, shape }
            })
            .collect()
    }

    /// Rows of a tensor as they are in the files: padding included, query and key heads in Meta's order.
    pub(crate) fn stored_rows(&self, name: &str, rows: Range<i64>) -> Result<Tensor> {
        let columns = columns(&self.stored, name);
        self.tensors[name].read(&|file| Ok(&self.files[file]), rows, 0..columns)
    }

    /// Rows of one of [`MetaCheckpoint::specs`], without padding, in Hugging Face's order. Those of
    /// attention's projections must be whole heads.
    pub(crate) fn rows(&self, name: &str, rows: Range<i64>) -> Result<Tensor> {
        let columns = columns(&self.config, name);
        let read = |rows| self.tensors[name].read(&|file| Ok(&self.files[file]), rows, 0..columns);
        let head_dim = self.config.head_dim;
        let is_k = name.ends_with(".k_proj.weight");
        let weight = if (is_k || name.ends_with(".v_proj.weight")) && self.repeats > 1 {
            let heads = rows.start / head_dim..rows.end / head_dim;
            let first_copies = heads
                .map(|head| head * self.repeats * head_dim)
                .map(|start| read(start..start + head_dim))
                .collect::<Result<_>>()?;
            one_or_cat(first_copies, 0)?
        } else {
            read(rows)?
        };
        if is_k || name.ends_with(".q_proj.weight") {
            return to_hf_order(&weight, head_dim);
        }
        Ok(weight)
    }

    /// How many rows of a tensor go together.
    pub(crate) fn unit(&self, name: &str) -> i64 {
        row_unit(&self.config, name)
    }
}

/// Columns of a matrix; 1 of a vector.
fn columns(config: &LlamaConfig, name: &str) -> i64 {
    shape_of(config, name).get(1).copied().unwrap_or(1)
}

/// How many rows of a tensor cannot be converted without each other: those of a head.
pub(crate) fn row_unit(config: &LlamaConfig, name: &str) -> i64 {
    let heads = [".q_proj.weight", ".k_proj.weight", ".v_proj.weight"];
    if heads.iter().any(|suffix| name.ends_with(suffix)) { config.head_dim } else { 1 }
}

/// Rows of whole heads from Meta's order, in which neighbours turn with each other, to Hugging Face's,
/// in which feature `i` turns with feature `i + D/2`.
fn to_hf_order(rows: &Tensor, head_dim: i64) -> Result<Tensor> {
    reordered(rows, [-1, head_dim / 2, 2])
}

/// The other way.
pub(crate) fn to_meta_order(rows: &Tensor, head_dim: i64) -> Result<Tensor> {
    reordered(rows, [-1, 2, head_dim / 2])
}

fn reordered(rows: &Tensor, [heads, outer, inner]: [i64; 3]) -> Result<Tensor> {
    let size = rows.size();
    let split = rows.f_view([heads, outer, inner, size[1]])?; // (H, outer, inner, C)
    Ok(split.f_transpose(1, 2)?.f_reshape(&size)?) // (H x D, C)
}

/// Meta's name of a tensor.
pub(crate) fn meta_name(hf_name: &str) -> Option<String> {
    match hf_name {
        EMBEDDING => return Some("tok_embeddings.weight".into()),
        HEAD => return Some("output.weight".into()),
        "model.norm.weight" => return Some("norm.weight".into()),
        _ => {}
    }
    let (layer, path) = hf_name.strip_prefix("model.layers.")?.split_once('.')?;
    let module = match path.strip_suffix(".weight")? {
        "input_layernorm" => "attention_norm",
        "self_attn.q_proj" => "attention.wq",
        "self_attn.k_proj" => "attention.wk",
        "self_attn.v_proj" => "attention.wv",
        "self_attn.o_proj" => "attention.wo",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "feed_forward.w1",
        "mlp.down_proj" => "feed_forward.w2",
        "mlp.up_proj" => "feed_forward.w3",
        _ => return None,
    };
    Some(format!("layers.{layer}.{module}.weight"))
}

/// Rotary frequencies, which LLaMA-1's files hold though `params.json` gives them.
fn is_derived(name: &str) -> bool {
    name == "rope.freqs" || name.ends_with(".inner_attention.rope.freqs")
}

/// `consolidated.00.pth` and on, without a gap.
fn open_files(dir: &Path) -> Result<Vec<TensorFile>> {
    let listed = fs::read_dir(dir).map_err(Error::io(dir))?;
    let mut paths = BTreeMap::new();
    for entry in listed {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let number = name.strip_prefix("consolidated.").and_then(|n| n.strip_suffix(".pth"));
        if let Some(number) = number.and_then(|number| number.parse::<usize>().ok()) {
            paths.insert(number, path);
        }
    }
    if let Some(missing) = (0..paths.len()).find(|number| !paths.contains_key(number)) {
        let message = format!(
            "{} files consolidated.NN.pth, but none of them is number {missing:02}",
            paths.len()
        );
        return Err(Error::NoCheckpoint { path: dir.into(), message });
    }
    if paths.is_empty() {
        let message = format!("there is a {PARAMS}, but no consolidated.00.pth");
        return Err(Error::NoCheckpoint { path: dir.into(), message });
    }
    paths.values().map(|path| TensorFile::open_torch(path)).collect()
}

fn tokenizer(dir: &Path, options: &MetaOptions) -> Result<Option<Tokenizer>> {
    Ok(match &options.tokenizer {
        Some(path) => Some(Tokenizer::open(path)?),
        // LLaMA 3's tokenizer.model is of another format: what is needed is asked for by name.
        None => Tokenizer::open(dir).ok(),
    })
}

/// Tokens of the model.
fn vocab_size(
    dir: &Path,
    params: &Params,
    tokenizer: Option<&Tokenizer>,
    rows_of_head: i64,
) -> Result<i64> {
    if params.vocab_size > 0 {
        return Ok(params.vocab_size);
    }
    match tokenizer {
        Some(tokenizer) => Ok(tokenizer.vocab_size() as i64),
        None if params.model_vocab_size.is_none() => Ok(rows_of_head),
        None => Err(Error::Config {
            path: dir.join(PARAMS),
            message: "vocab_size is -1, for that of a tokenizer, and there is none: give one"
                .into(),
        }),
    }
}

type Placed = (BTreeMap<String, Pieces>, BTreeMap<String, Dtype>);

/// Finds the pieces of every tensor, and collects what differs from the configuration.
fn place(dir: &Path, config: &LlamaConfig, files: &[TensorFile]) -> Result<Placed> {
    let mut problems = TensorProblems::default();
    let (mut tensors, mut dtypes) = (BTreeMap::new(), BTreeMap::new());
    let mut known = Vec::new();
    for (hf_name, shape) in tensor_shapes(config) {
        let Some(name) = meta_name(&hf_name) else { continue };
        let entries: Vec<_> = files.iter().filter_map(|file| file.entries().get(&name)).collect();
        if entries.len() < files.len() {
            let from = files.iter().position(|file| !file.entries().contains_key(&name));
            problems.missing.push(format!("{name} (file {:02})", from.unwrap_or(0)));
            known.push(name);
            continue;
        }
        match Dtype::of_safetensors(entries[0].dtype) {
            Some(dtype) if entries.iter().all(|entry| entry.dtype == entries[0].dtype) => {
                dtypes.insert(hf_name.clone(), dtype);
            }
            _ => {
                let all: Vec<_> = entries.iter().map(|entry| entry.dtype.to_string()).collect();
                problems.wrong_dtype.push(format!("{name} ({})", all.join(", ")));
            }
        }
        match pieces(&hf_name, &name, &shape, &entries) {
            Some(pieces) => {
                tensors.insert(hf_name, pieces);
            }
            None => {
                let shapes: Vec<_> = entries.iter().map(|entry| &entry.shape).collect();
                problems.misshapen.push(format!("{name} (expected {shape:?} of {shapes:?})"));
            }
        }
        known.push(name);
    }
    let extra = files.iter().flat_map(|file| file.entries().keys());
    let extra = extra.filter(|name| !known.contains(name) && !is_derived(name));
    problems.unexpected.extend(extra.cloned());
    problems.unexpected.dedup();
    match problems.is_empty() {
        true => Ok((tensors, dtypes)),
        false => Err(Error::WrongTensors { path: dir.into(), problems }),
    }
}

/// How the stored tensors make one of this shape. A model's embedding is cut along its features up to
/// LLaMA 2, along the vocabulary in LLaMA 3 and by Dromedary: its shapes tell.
fn pieces(hf_name: &str, name: &str, shape: &[i64], entries: &[&Entry]) -> Option<Pieces> {
    let module = hf_name.strip_suffix(".weight").unwrap_or(hf_name);
    let splits: &[Split] = match module.rsplit('.').next().unwrap_or(module) {
        _ if shape.len() == 1 => &[Split::Replicated],
        "embed_tokens" => &[Split::Columns, Split::Rows],
        "o_proj" | "down_proj" => &[Split::Columns],
        _ => &[Split::Rows],
    };
    let split = splits.iter().copied().find(|split| {
        let (cut, other) = match split {
            Split::Replicated => return entries.iter().all(|entry| entry.shape == shape),
            Split::Rows => (0, 1),
            Split::Columns => (1, 0),
        };
        let fit = |entry: &&Entry| entry.shape.len() == 2 && entry.shape[other] == shape[other];
        entries.iter().all(fit) && entries.iter().map(|e| e.shape[cut]).sum::<i64>() == shape[cut]
    })?;
    let dim = if split == Split::Columns { 1 } else { 0 };
    let parts = entries
        .iter()
        .enumerate()
        .map(|(file, entry)| Piece { file, name: name.into(), range: 0..entry.shape[dim] })
        .collect();
    Some(Pieces { split, parts })
}

/// What of a padded checkpoint is the model.
struct Padding {
    repeats: i64,
    intermediate_size: i64,
}

impl Padding {
    fn find(checkpoint: &MetaCheckpoint, dir: &Path, heads: i64, vocab_size: i64) -> Result<Self> {
        let stored = &checkpoint.stored;
        let search = Search { checkpoint, dir };
        for name in [EMBEDDING, HEAD] {
            search.rows_are_zero(name, vocab_size..stored.vocab_size)?;
        }
        // Whether a K/V head is the copy of the one before it, in all layers.
        let padded_heads = stored.num_key_value_heads == stored.num_attention_heads;
        let mut copies = vec![true; if padded_heads { heads as usize } else { 0 }];
        let mut intermediate_size = 1;
        let attention = heads * stored.head_dim;
        let padded = attention..stored.num_attention_heads * stored.head_dim;
        for layer in 0..stored.num_hidden_layers {
            let name = |path: &str| format!("model.layers.{layer}.{path}.weight");
            for path in ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"] {
                search.rows_are_zero(&name(path), padded.clone())?;
            }
            let used = search.used_columns(&name("self_attn.o_proj"))?;
            if used > attention {
                return Err(search.not_zero(&name("self_attn.o_proj"), used - 1));
            }
            for path in ["self_attn.k_proj", "self_attn.v_proj"] {
                search.find_copies(&name(path), &mut copies)?;
            }
            for path in ["mlp.gate_proj", "mlp.up_proj"] {
                intermediate_size = intermediate_size.max(search.used_rows(&name(path))?);
            }
            let used = search.used_columns(&name("mlp.down_proj"))?;
            intermediate_size = intermediate_size.max(used);
        }
        Ok(Self { repeats: repeats(&copies), intermediate_size })
    }
}

/// The largest number of equal heads that the model's can be dealt into, each group one after the other.
fn repeats(copies: &[bool]) -> i64 {
    let heads = copies.len();
    let fits = |r: &usize| {
        let is_first = |head: usize| head.is_multiple_of(*r);
        is_first(heads) && copies.iter().enumerate().all(|(head, copy)| is_first(head) || *copy)
    };
    (1..=heads).rev().find(fits).unwrap_or(1) as i64
}

/// Looks through the weights of a padded checkpoint, block by block.
struct Search<'a> {
    checkpoint: &'a MetaCheckpoint,
    dir: &'a Path,
}

impl Search<'_> {
    fn each_block(
        &self,
        name: &str,
        rows: Range<i64>,
        mut look: impl FnMut(i64, &Tensor) -> Result<()>,
    ) -> Result<()> {
        let columns = columns(&self.checkpoint.stored, name);
        for block in blocks(rows.end - rows.start, columns as u64 * 4, 1, BLOCK) {
            let block = block.start + rows.start..block.end + rows.start;
            look(block.start, &self.checkpoint.stored_rows(name, block)?)?;
        }
        Ok(())
    }

    fn rows_are_zero(&self, name: &str, rows: Range<i64>) -> Result<()> {
        self.each_block(name, rows, |start, block| match last_used(block, 1)? {
            None => Ok(()),
            Some(row) => Err(self.not_zero(name, start + row)),
        })
    }

    fn not_zero(&self, name: &str, index: i64) -> Error {
        Error::Config {
            path: self.dir.join(PARAMS),
            message: format!("{name} should be padding at index {index}, but is not zero there"),
        }
    }

    /// Rows up to the last that is not zero.
    fn used_rows(&self, name: &str) -> Result<i64> {
        let mut used = 0;
        let all = shape_of(&self.checkpoint.stored, name)[0];
        self.each_block(name, 0..all, |start, block| {
            used = last_used(block, 1)?.map_or(used, |row| start + row + 1);
            Ok(())
        })?;
        Ok(used)
    }

    /// Columns up to the last that is not zero.
    fn used_columns(&self, name: &str) -> Result<i64> {
        let mut used = 0;
        let all = shape_of(&self.checkpoint.stored, name)[0];
        self.each_block(name, 0..all, |_, block| {
            used = used.max(last_used(block, 0)?.map_or(0, |column| column + 1));
            Ok(())
        })?;
        Ok(used)
    }

    /// Clears `copies` of the heads that differ from the one before them.
    fn find_copies(&self, name: &str, copies: &mut [bool]) -> Result<()> {
        let head_dim = self.checkpoint.stored.head_dim;
        let mut last: Option<Tensor> = None;
        for (head, copy) in copies.iter_mut().enumerate() {
            let start = head as i64 * head_dim;
            let rows = self.checkpoint.stored_rows(name, start..start + head_dim)?;
            *copy &= last.is_none_or(|last| last.equal(&rows));
            last = Some(rows);
        }
        Ok(())
    }
}

/// The last index of the other dimension than `over` with a number that is not zero.
fn last_used(block: &Tensor, over: i64) -> Result<Option<i64>> {
    let used = block.f_ne(0.0)?.f_any_dim(over, false)?; // (rows) or (columns)
    let at = used.f_nonzero()?;
    Ok(match at.size()[0] {
        0 => None,
        count => Some(at.f_to_kind(Kind::Int64)?.f_int64_value(&[count - 1, 0])?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_of_equal_heads() {
        for (copies, expected) in [
            (&[true, true, false, true][..], 2),
            (&[true, true, true, true], 4),
            (&[true, false, false, false], 1),
            (&[true, true, true, false, true, true], 3),
            (&[true, true, false, true, true, true], 2),
        ] {
            assert_eq!(repeats(copies), expected, "{copies:?}");
        }
    }

    #[test]
    fn heads_are_turned_around_and_back() {
        let rows = Tensor::arange(12, (Kind::Float, tch::Device::Cpu)).view([12, 1]);
        let hf = to_hf_order(&rows, 6).unwrap();
        // Meta's features 0 and 1 turn with each other; here 0 turns with 0 + 3.
        let expected = [0., 2., 4., 1., 3., 5., 6., 8., 10., 7., 9., 11.];
        assert_eq!(hf.view(-1), Tensor::from_slice(&expected).to_kind(Kind::Float));
        assert_eq!(to_meta_order(&hf, 6).unwrap(), rows);
    }
}
