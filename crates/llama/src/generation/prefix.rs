//! Pinning a prefix: run once, or taken from a folder of prefixes that were run before.

// Shapes: P = tokens of the prefix, KV = K/V heads of this rank, D = head_dim.

use std::{
    fs,
    path::{Path, PathBuf},
};

use dromedary_files::{AtomicDir, FileEntry, Manifest};
use dromedary_torch_ext::release_free_memory;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::Engine;
use crate::{
    Dtype, Error, Result,
    checkpoint::{SafetensorsWriter, TensorFile, TensorSpec},
    kv_cache::SharedPrefix,
};

/// The keys and values.
const TENSORS: &str = "prefix.safetensors";

/// What they were made from.
const DESCRIPTION: &str = "prefix.json";

/// A folder that keeps the keys and values of prefixes from one run to the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PrefixCache {
    /// The folder; each prefix of each rank is a folder in it.
    pub dir: PathBuf,
    /// Names the model with all that its keys and values depend on: fingerprints of checkpoint and
    /// tokenizer, of adapters where there are any.
    pub model: String,
}

/// What keys and values depend on.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    version: u32,
    model: String,
    tokens: Vec<u32>,
    kind: String,
    packed: bool,
    /// Linear layers are kept in NF4; absent in what was kept before they could be.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    nf4: bool,
    tp_rank: usize,
    tp: usize,
}

impl Description {
    fn name(&self) -> Result<String> {
        let hash = blake3::hash(&self.to_json()?).to_hex();
        Ok(format!("prefix-{}", &hash[..32]))
    }

    fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec(self)
            .map_err(|error| Error::Write { path: DESCRIPTION.into(), message: error.to_string() })
    }
}

impl Engine<'_> {
    /// Runs a prefix once; rows that begin with it, or with a part of it, take its keys and values
    /// from here on. It replaces an earlier one.
    ///
    /// Every rank of the group must call this.
    ///
    /// # Errors
    /// The prefix leaves no room in the model's context, a token is not in the vocabulary, memory
    /// ends, the exchange between ranks failed.
    pub fn pin_prefix(&mut self, tokens: &[u32]) -> Result<()> {
        self.check_prefix(tokens)?;
        self.prefix = if tokens.is_empty() { None } else { Some(self.run_prefix(tokens, None)?) };
        Ok(())
    }

    /// As [`Self::pin_prefix`], with a folder to take the prefix from, or to put it into once it has
    /// been run; gives whether it was taken.
    ///
    /// What does not fit or is damaged there is named in a warning, run again and replaced; so is a
    /// folder that cannot be written to: a cache is no reason to fail. The ranks take it together or
    /// run it together. Every rank of the group must call this.
    ///
    /// # Errors
    /// As [`Self::pin_prefix`].
    pub fn pin_prefix_cached(&mut self, tokens: &[u32], cache: &PrefixCache) -> Result<bool> {
        self.check_prefix(tokens)?;
        if tokens.is_empty() {
            self.prefix = None;
            return Ok(false);
        }
        let description = Description {
            version: 1,
            model: cache.model.clone(),
            tokens: tokens.to_vec(),
            kind: format!("{:?}", self.model.kind()),
            packed: self.model.packs(),
            nf4: self.model.keeps_nf4(),
            tp_rank: self.comm.rank(),
            tp: self.comm.world_size(),
        };
        let folder = cache.dir.join(description.name()?);
        let kept = if folder.exists() { self.kept_prefix(&folder, &description) } else { None };
        if self.all_have(kept.is_some())? {
            self.prefix = kept;
            return Ok(true);
        }
        let entry = Entry::create(&folder, &description, self)
            .map_err(|error| tracing::warn!("the prefix will not be kept: {error}"))
            .ok();
        self.prefix = Some(self.run_prefix(tokens, entry)?);
        Ok(false)
    }

    /// The pinned prefix.
    pub fn prefix(&self) -> Option<&SharedPrefix> {
        self.prefix.as_ref()
    }

    fn check_prefix(&self, tokens: &[u32]) -> Result<()> {
        let context = self.model.config().max_position_embeddings;
        if tokens.len() as i64 >= context {
            return Err(Error::PrefixTooLong { tokens: tokens.len(), context });
        }
        Ok(())
    }

    fn all_have(&self, own: bool) -> Result<bool> {
        if self.comm.world_size() == 1 {
            return Ok(own);
        }
        let mut missing = Tensor::from_slice(&[i64::from(!own)]);
        self.comm.all_reduce_max(&mut missing)?;
        Ok(Vec::<i64>::try_from(missing)? == [0])
    }

    fn run_prefix(&self, tokens: &[u32], mut entry: Option<Entry>) -> Result<SharedPrefix> {
        let length = tokens.len() as i64;
        let mut prefix = SharedPrefix::new(tokens.to_vec());
        let (heads, storage) = (self.model.heads(), &self.storage);
        tch::no_grad(|| -> Result<()> {
            let positions: Vec<i64> = (0..length).collect();
            let x = self.model.embed(tokens)?;
            let _ =
                self.model.forward_layers(x, &positions, self.comm, &mut |layer, q, k, v| {
                    prefix.push_layer(heads, storage, k, v)?;
                    entry = entry.take().and_then(|entry| warned(entry.with_layer(layer, k, v)));
                    prefix.attend_within(heads, storage, [q, k, v])
                })?;
            Ok(())
        })?;
        if let Some(entry) = entry {
            let _ = warned(entry.publish());
        }
        // A long prefix is the largest pass of all.
        release_free_memory();
        Ok(prefix)
    }

    /// The prefix of a folder, unless something is wrong with it.
    fn kept_prefix(&self, folder: &Path, description: &Description) -> Option<SharedPrefix> {
        let prefix = self.read_prefix(folder, description);
        prefix.map_err(|error| tracing::warn!("a kept prefix is not used: {error}")).ok()
    }

    fn read_prefix(&self, folder: &Path, description: &Description) -> Result<SharedPrefix> {
        Manifest::read(folder)?.verify(folder)?;
        let path = folder.join(DESCRIPTION);
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let foreign =
            |path: PathBuf, message: &str| Error::Header { path, message: message.into() };
        if serde_json::from_slice::<Description>(&bytes).ok().as_ref() != Some(description) {
            return Err(foreign(path, "it describes another prefix"));
        }
        let file = TensorFile::open(&folder.join(TENSORS))?;
        let mut prefix = SharedPrefix::new(description.tokens.clone());
        let shape = self.layer_shape(&description.tokens);
        for layer in 0..self.model.layers().len() {
            let read = |of: &str| -> Result<Tensor> {
                let tensor = file.read_rows(&name(layer, of), 0..shape[0])?;
                if tensor.size() != shape || tensor.f_kind()? != self.model.kind() {
                    return Err(foreign(file.path().to_owned(), "its tensors have other shapes"));
                }
                Ok(tensor.f_to_device(self.model.device())?)
            };
            let (k, v) = (read("k")?, read("v")?);
            prefix.push_layer(self.model.heads(), &self.storage, &k, &v)?;
        }
        Ok(prefix)
    }

    /// `(P, KV, D)`.
    fn layer_shape(&self, tokens: &[u32]) -> [i64; 3] {
        let heads = self.model.heads();
        [tokens.len() as i64, heads.n_local_kv_heads(), heads.head_dim]
    }
}

fn name(layer: usize, of: &str) -> String {
    format!("layers.{layer}.{of}")
}

fn warned<T>(result: Result<T>) -> Option<T> {
    result.map_err(|error| tracing::warn!("the prefix is not kept: {error}")).ok()
}

/// A prefix on its way into the folder.
struct Entry {
    folder: PathBuf,
    dir: AtomicDir,
    tensors: SafetensorsWriter,
    manifest: Manifest,
}

impl Entry {
    fn create(folder: &Path, description: &Description, engine: &Engine<'_>) -> Result<Self> {
        let kind: Kind = engine.model.kind();
        let dtype = Dtype::of_kind(kind).ok_or_else(|| Error::Write {
            path: folder.to_owned(),
            message: format!("{kind:?} has no place in safetensors"),
        })?;
        let shape = engine.layer_shape(&description.tokens).to_vec();
        let spec = |layer, of| TensorSpec { name: name(layer, of), dtype, shape: shape.clone() };
        let specs = (0..engine.model.layers().len())
            .flat_map(|layer| ["k", "v"].map(|of| spec(layer, of)))
            .collect();
        let dir = AtomicDir::replace_existing(folder)?;
        let tensors = SafetensorsWriter::create(dir.path(), folder, TENSORS, specs)?;
        let mut manifest = Manifest::default();
        let text = description.to_json()?;
        fs::write(dir.path().join(DESCRIPTION), &text)
            .map_err(Error::io(folder.join(DESCRIPTION)))?;
        let blake3 = blake3::hash(&text).to_hex().to_string();
        manifest.files.insert(DESCRIPTION.into(), FileEntry { size: text.len() as u64, blake3 });
        Ok(Self { folder: folder.to_owned(), dir, tensors, manifest })
    }

    fn with_layer(mut self, layer: usize, k: &Tensor, v: &Tensor) -> Result<Self> {
        self.tensors.append(&name(layer, "k"), k)?;
        self.tensors.append(&name(layer, "v"), v)?;
        Ok(self)
    }

    fn publish(mut self) -> Result<()> {
        let written = self.tensors.finish()?;
        let entry = FileEntry { size: written.size, blake3: written.blake3 };
        self.manifest.files.insert(TENSORS.into(), entry);
        self.dir.commit(&self.manifest)?;
        tracing::info!("the prefix is kept in {}", self.folder.display());
        Ok(())
    }
}
