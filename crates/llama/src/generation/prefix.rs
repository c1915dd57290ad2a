//! Pinning a prefix: run once, or taken from a folder of prefixes that were run before.

// Shapes: P = tokens of the prefix, KV = K/V heads of this rank, D = head_dim.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use dromedary_files::{AtomicDir, FileEntry, Manifest};
use dromedary_torch_ext::release_free_memory;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use super::Engine;
use crate::{
    Dtype, Error, Result,
    checkpoint::{SafetensorsWriter, TensorFile, TensorSpec},
    kernels::Kernels,
    kv_cache::SharedPrefix,
};

/// The keys and values.
const TENSORS: &str = "prefix.safetensors";

/// Entries' names begin with it.
const NAME: &str = "prefix-";

/// What a killed process has left is removed when nothing was written to it for so long: a hundred
/// times what a prefix takes.
const ABANDONED_AFTER: Duration = Duration::from_secs(6 * 3600);

/// Variables on which the results of libtorch's operations on a CPU depend.
const LIBTORCH_VARIABLES: [&str; 3] = ["ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_DYNAMIC"];

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

/// What keys and values depend on, to the last bit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Description {
    version: u32,
    /// Of this crate: another one may add in another order.
    crate_version: String,
    model: String,
    tokens: Vec<u32>,
    /// What is computed in.
    kind: String,
    /// What the weights were rounded to.
    weights: String,
    device: String,
    /// What a CPU has decides which kernels compute, here and in libtorch.
    #[serde(skip_serializing_if = "Option::is_none")]
    instructions: Option<String>,
    packed: bool,
    /// Linear layers are kept in NF4.
    nf4: bool,
    /// Where libtorch's operations compute on a CPU: threads, and what MKL and libtorch are told. This
    /// crate's own kernels give the same bits under all of these.
    #[serde(skip_serializing_if = "Option::is_none")]
    libtorch: Option<BTreeMap<String, String>>,
    tp_rank: usize,
    tp: usize,
}

impl Description {
    /// `variable` gives those of the environment.
    fn new(
        engine: &Engine<'_>,
        model: &str,
        tokens: &[u32],
        variable: impl Fn(&str) -> Option<String>,
    ) -> Self {
        let llama = engine.model;
        let on_cpu = llama.device() == Device::Cpu;
        let libtorch = || {
            let set = |name: &str| Some((name.to_owned(), variable(name)?));
            let mut settings: BTreeMap<_, _> =
                LIBTORCH_VARIABLES.into_iter().filter_map(set).collect();
            settings.insert("threads".to_owned(), tch::get_num_threads().to_string());
            settings
        };
        Self {
            version: 2,
            crate_version: env!("CARGO_PKG_VERSION").to_owned(),
            model: model.to_owned(),
            tokens: tokens.to_vec(),
            kind: format!("{:?}", llama.kind()),
            weights: format!("{:?}", llama.weights_kind()),
            // Which of a node's GPUs it is makes no difference.
            device: if on_cpu { "cpu" } else { "gpu" }.to_owned(),
            instructions: on_cpu.then(|| Kernels::detect().to_string()),
            packed: llama.packs(),
            nf4: llama.keeps_nf4(),
            libtorch: (on_cpu && llama.kernels().is_none()).then(libtorch),
            tp_rank: engine.comm.rank(),
            tp: engine.comm.world_size(),
        }
    }

    fn name(&self) -> Result<String> {
        let hash = blake3::hash(&self.to_json()?).to_hex();
        Ok(format!("{NAME}{}", &hash[..32]))
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
        let description =
            Description::new(self, &cache.model, tokens, |name| std::env::var(name).ok());
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
        // Each may be as large as an entry.
        if let Some(all) = folder.parent() {
            AtomicDir::remove_abandoned(all, NAME, ABANDONED_AFTER)?;
        }
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

#[cfg(test)]
mod tests {
    use dromedary_parallel::SingleProcess;
    use dromedary_tokenizer::Tokenizer;

    use super::*;
    use crate::{Checkpoint, Llama, LoadOptions, generation::EngineConfig};

    fn described(options: LoadOptions, variable: impl Fn(&str) -> Option<String>) -> Description {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/stories260k");
        let model = Llama::load(&Checkpoint::open(&dir).unwrap(), &options).unwrap();
        let tokenizer = Tokenizer::open(&dir).unwrap();
        let engine =
            Engine::new(&model, &tokenizer, &SingleProcess, EngineConfig::default()).unwrap();
        Description::new(&engine, "stories", &[1, 2], variable)
    }

    #[test]
    fn whatever_changes_the_bits_is_another_entry() {
        let base = described(LoadOptions::default(), |_| None);
        let mut others = vec![base.clone()];
        let mut other = |change: &dyn Fn(&mut Description)| {
            let mut other = base.clone();
            change(&mut other);
            others.push(other);
        };
        other(&|entry| entry.crate_version.push('1'));
        other(&|entry| entry.model.push('1'));
        other(&|entry| entry.tokens.push(1));
        other(&|entry| entry.device = "gpu".to_owned());
        other(&|entry| entry.instructions = Some("fewer".to_owned()));
        other(&|entry| entry.nf4 = true);
        other(&|entry| entry.tp_rank = 1);
        other(&|entry| entry.tp = 2);
        // Weights of 16 bits, of which a CPU computes in f32 for all, and f32 by libtorch's operations.
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let options = LoadOptions { kind, pack: false, ..LoadOptions::default() };
            others.push(described(options, |_| None));
            for variable in LIBTORCH_VARIABLES {
                let set = |name: &str| (name == variable).then(|| "AVX2".to_owned());
                others.push(described(options, set));
            }
            let mut threads = described(options, |_| None);
            let settings = threads.libtorch.as_mut().unwrap();
            assert_eq!(settings.keys().collect::<Vec<_>>(), ["threads"]);
            settings.insert("threads".to_owned(), "64".to_owned());
            others.push(threads);
        }
        let names: std::collections::BTreeSet<String> =
            others.iter().map(|entry| entry.name().unwrap()).collect();
        assert_eq!(names.len(), others.len());
        // What libtorch is told is nothing to this crate's own kernels.
        assert_eq!(base.libtorch, None);
        assert_eq!(base, described(LoadOptions::default(), |_| Some("AVX2".to_owned())));
    }
}
