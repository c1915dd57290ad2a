use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use tch::Tensor;

use super::{
    dtype::Dtype,
    file::{Entry, ReadCounters, TensorFile, block_of},
    index::{INDEX, SINGLE, open_files},
    nf4::{self, Nf4Weight},
    output::TensorSpec,
    rank_files::RankFiles,
    tensors::{HEAD, is_derived, tensor_shapes},
};
use crate::{
    config::{LlamaConfig, is_quantised},
    error::{Error, Result, TensorProblems},
    plan::Shard,
    quantised::Nf4Slice,
};

/// Bytes of each tensor that go into the fingerprint.
const FINGERPRINT_BYTES: usize = 4096;

/// A checkpoint folder whose tensors are exactly those of its configuration.
///
/// Opening it checks names, shapes, data types, file sizes and the index, and reads no weight.
/// Reading a weight checks that it is finite.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    config: LlamaConfig,
    storage: Storage,
    /// The model's tensors in the order of the forward pass.
    order: Vec<String>,
    specs: BTreeMap<String, TensorSpec>,
}

/// What is known of a checkpoint before a weight is read.
#[derive(Debug, Clone, PartialEq)]
pub struct Outline {
    /// The model's configuration.
    pub config: LlamaConfig,
    /// The data type that most parameters are read in; what the configuration claims where there are no
    /// weights.
    pub dtype: Dtype,
    /// Whether linear layers are stored in NF4.
    pub nf4: bool,
}

/// How a folder holds the tensors.
#[derive(Debug)]
enum Storage {
    /// Each in one file.
    Whole { files: Vec<TensorFile>, places: BTreeMap<String, Place> },
    /// Each rank of a group has its slices in a file of its own.
    OfRanks(Box<RankFiles>),
}

/// Where and how a tensor is stored in one of several files.
#[derive(Debug)]
struct Place {
    file: usize,
    nf4: Option<Nf4Weight>,
}

impl Checkpoint {
    /// Opens a folder with `config.json` and `model.safetensors`, or
    /// `model.safetensors.index.json` and the files that it names; weights may be in NF4, as
    /// [`quantize`](crate::quantize) and bitsandbytes make them. Or one with a file a rank, as
    /// [`shard`](crate::shard) writes it.
    ///
    /// # Errors
    /// Everything that is not as it should be: [`Error::WrongTensors`] lists all missing,
    /// unexpected and misshapen tensors and those of other data types; damaged, truncated and
    /// hostile files and contradictions between index and files are named.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        if !dir.is_dir() {
            let message =
                if dir.exists() { "it is not a folder" } else { "there is no such folder" };
            return Err(Error::NoCheckpoint { path: dir.into(), message: message.into() });
        }
        let config = LlamaConfig::open(dir)?;
        let shapes = tensor_shapes(&config);
        let storage = if dir.join(RankFiles::INDEX).exists() {
            Storage::OfRanks(Box::new(RankFiles::open(dir, &config)?))
        } else {
            let files = open_files(dir)?;
            let places = place(dir, &config, &files, &shapes)?;
            Storage::Whole { files, places }
        };
        let order = shapes.iter().map(|(name, _)| name.clone()).collect();
        let specs = shapes
            .into_iter()
            .map(|(name, shape)| {
                let dtype = storage.dtype(&name)?;
                Ok((name.clone(), TensorSpec { name, dtype, shape }))
            })
            .collect::<Result<_>>()?;
        Ok(Self { dir: dir.to_path_buf(), config, storage, order, specs })
    }

    /// What there is to know of a checkpoint, or of a `config.json` alone, without a weight: enough to plan
    /// with.
    ///
    /// # Errors
    /// As [`Checkpoint::open`] where there are weights, else as [`LlamaConfig::open`].
    pub fn outline(path: impl AsRef<Path>) -> Result<Outline> {
        let path = path.as_ref();
        let weights = [SINGLE, INDEX, RankFiles::INDEX];
        if weights.iter().any(|name| path.join(name).exists()) {
            let checkpoint = Self::open(path)?;
            let (dtype, nf4) = (checkpoint.dtype(), checkpoint.stores_nf4());
            return Ok(Outline { config: checkpoint.config, dtype, nf4 });
        }
        let config = LlamaConfig::open(path)?;
        let dtype = config.torch_dtype.unwrap_or(Dtype::F32);
        Ok(Outline { config, dtype, nf4: is_quantised(path)? })
    }

    /// The model's configuration.
    pub fn config(&self) -> &LlamaConfig {
        &self.config
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The model's tensors, in the order of the forward pass. A head that is tied to the
    /// embedding is not among them, whether it is stored or not.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(String::as_str)
    }

    /// The model's tensors in the order of [`Checkpoint::names`]: their shapes, and the data types in
    /// which they are read.
    ///
    /// # Errors
    /// None for a checkpoint that was opened.
    pub fn specs(&self) -> Result<Vec<TensorSpec>> {
        self.names().map(|name| self.spec(name).cloned()).collect()
    }

    /// The shape of a tensor.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn shape(&self, name: &str) -> Result<&[i64]> {
        Ok(&self.spec(name)?.shape)
    }

    /// The data type that a tensor is read in: the one that it is stored in, or that it was quantised
    /// from.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn dtype_of(&self, name: &str) -> Result<Dtype> {
        Ok(self.spec(name)?.dtype)
    }

    /// Whether a tensor is stored in NF4.
    pub fn is_quantised(&self, name: &str) -> bool {
        match &self.storage {
            Storage::Whole { places, .. } => places.get(name).is_some_and(|p| p.nf4.is_some()),
            Storage::OfRanks(_) => false,
        }
    }

    /// Whether linear layers are stored in NF4.
    pub fn stores_nf4(&self) -> bool {
        self.names().any(|name| self.is_quantised(name))
    }

    /// Bytes that a tensor is stored in.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`].
    pub fn bytes_of(&self, name: &str) -> Result<u64> {
        let size = self.spec(name)?.size();
        Ok(match &self.storage {
            Storage::Whole { places, .. } => {
                places.get(name).and_then(|place| place.nf4.as_ref()).map_or(size, Nf4Weight::bytes)
            }
            Storage::OfRanks(_) => size,
        })
    }

    /// The number of ranks that the checkpoint is cut for, if it is stored as one file a rank.
    pub fn cut_for(&self) -> Option<usize> {
        match &self.storage {
            Storage::Whole { .. } => None,
            Storage::OfRanks(ranks) => Some(ranks.tp()),
        }
    }

    /// Makes sure that a rank of a group of `tp` can load from this checkpoint. A file of the rank's own
    /// is read and compared with the manifest's hash.
    ///
    /// # Errors
    /// [`Error::CutForOthers`] if the checkpoint is cut for another number of ranks; a damaged or missing
    /// file by name.
    pub fn check_rank(&self, tp_rank: usize, tp: usize) -> Result<()> {
        match &self.storage {
            Storage::Whole { .. } => Ok(()),
            Storage::OfRanks(ranks) if ranks.tp() == tp => ranks.verify_rank(tp_rank),
            Storage::OfRanks(ranks) => {
                let path = self.dir.clone();
                Err(Error::CutForOthers { path, expected: ranks.tp(), got: tp })
            }
        }
    }

    /// The data type that most parameters are read in.
    pub fn dtype(&self) -> Dtype {
        let mut elements = BTreeMap::new();
        for spec in self.specs.values() {
            *elements.entry(spec.dtype).or_insert(0) += spec.shape.iter().product::<i64>();
        }
        elements.into_iter().max_by_key(|(_, count)| *count).map_or(Dtype::F32, |(dtype, _)| dtype)
    }

    /// Reads a whole tensor, in the data type of [`Checkpoint::dtype_of`].
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`], [`Error::NonFinite`], [`Error::Io`], [`Error::Torch`].
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let rows = self.shape(name)?[0];
        self.read_rows(name, 0..rows)
    }

    /// Reads some rows of a tensor.
    ///
    /// # Errors
    /// As [`Checkpoint::read`].
    pub fn read_rows(&self, name: &str, rows: Range<i64>) -> Result<Tensor> {
        let columns = self.shape(name)?.get(1).copied().unwrap_or(1);
        self.read_block(name, rows, 0..columns)
    }

    /// Reads one rank's part of a tensor. Ranges of rows are read alone; for ranges of columns the
    /// whole tensor is read, in chunks, and the columns are copied out of them. What is stored for this
    /// rank is read as it is.
    ///
    /// # Errors
    /// As [`Checkpoint::read`], and [`Error::ShardMismatch`] for the plan of another model.
    pub fn read_slice(&self, name: &str, shard: &Shard) -> Result<Tensor> {
        let (rows, columns) = block_of(name, self.shape(name)?, shard)?;
        match &self.storage {
            Storage::Whole { .. } => self.read_block(name, rows, columns),
            Storage::OfRanks(ranks) => ranks.read_slice(name, shard),
        }
    }

    /// One rank's part of a tensor that is stored in NF4, as it is stored; nothing of another.
    pub(crate) fn read_quantised(&self, name: &str, shard: &Shard) -> Result<Option<Nf4Slice>> {
        let Storage::Whole { files, places } = &self.storage else { return Ok(None) };
        let Some(Place { file, nf4: Some(weight) }) = places.get(name) else { return Ok(None) };
        let (rows, columns) = block_of(name, self.shape(name)?, shard)?;
        weight.read_slice(&files[*file], rows, columns).map(Some)
    }

    /// Some columns of some rows of a tensor.
    fn read_block(&self, name: &str, rows: Range<i64>, columns: Range<i64>) -> Result<Tensor> {
        match &self.storage {
            Storage::OfRanks(ranks) => {
                ranks.pieces(name).read(&|rank| ranks.file(rank), rows, columns)
            }
            Storage::Whole { files, places } => {
                let place = places.get(name).ok_or_else(|| self.no_such(name))?;
                let file = &files[place.file];
                match &place.nf4 {
                    Some(weight) => weight.read_block(file, rows, columns),
                    None if self.shape(name)?.len() == 1 => file.read_rows(name, rows),
                    None => file.read_block(name, rows, columns),
                }
            }
        }
    }

    /// A tensor in blocks of rows of about `max_bytes`, one row at least: for tools that must not
    /// hold a whole one.
    ///
    /// # Errors
    /// [`Error::NoSuchTensor`]; each block as [`Checkpoint::read`].
    pub fn read_blocks<'a>(
        &'a self,
        name: &'a str,
        max_bytes: usize,
    ) -> Result<impl Iterator<Item = Result<(Range<i64>, Tensor)>> + 'a> {
        let all = self.spec(name)?.blocks(1, max_bytes);
        Ok(all.map(move |rows| Ok((rows.clone(), self.read_rows(name, rows)?))))
    }

    /// What was read of the tensors of all files since they were opened.
    pub fn counters(&self) -> ReadCounters {
        match &self.storage {
            Storage::Whole { files, .. } => files
                .iter()
                .map(TensorFile::counters)
                .fold(ReadCounters::default(), ReadCounters::plus),
            Storage::OfRanks(ranks) => ranks.counters(),
        }
    }

    /// Bytes of the files, headers included.
    pub fn bytes_stored(&self) -> u64 {
        match &self.storage {
            Storage::Whole { files, .. } => files.iter().map(TensorFile::size).sum(),
            Storage::OfRanks(ranks) => ranks.bytes_stored(),
        }
    }

    /// The safetensors files.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let (whole, of_ranks) = match &self.storage {
            Storage::Whole { files, .. } => (&files[..], &[][..]),
            Storage::OfRanks(ranks) => (&[][..], ranks.paths()),
        };
        whole.iter().map(TensorFile::path).chain(of_ranks.iter().map(PathBuf::as_path))
    }

    /// A hash that tells checkpoints apart without reading them: of the configuration, the
    /// tokenizer, every header, every file's size and the first 4 kB of every tensor.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn fingerprint(&self) -> Result<String> {
        let mut hash = blake3::Hasher::new();
        for name in ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model"] {
            let path = self.dir.join(name);
            if path.exists() {
                let bytes = fs::read(&path).map_err(Error::io(&path))?;
                hash.update(name.as_bytes()).update(&(bytes.len() as u64).to_le_bytes());
                hash.update(&bytes);
            }
        }
        match &self.storage {
            Storage::Whole { files, .. } => {
                for file in files {
                    hash.update(file.header_hash().as_bytes()).update(&file.size().to_le_bytes());
                    for entry in file.entries().values() {
                        hash.update(&file.read_head(entry, FINGERPRINT_BYTES)?);
                    }
                }
            }
            Storage::OfRanks(ranks) => {
                for text in ranks.hashes() {
                    hash.update(text.as_bytes());
                }
            }
        }
        Ok(hash.finalize().to_hex().to_string())
    }

    fn spec(&self, name: &str) -> Result<&TensorSpec> {
        self.specs.get(name).ok_or_else(|| self.no_such(name))
    }

    fn no_such(&self, name: &str) -> Error {
        Error::NoSuchTensor { path: self.dir.clone(), name: name.to_string() }
    }
}

impl Storage {
    fn dtype(&self, name: &str) -> Result<Dtype> {
        match self {
            Self::Whole { files, places } => match &places[name] {
                Place { nf4: Some(weight), .. } => Ok(weight.dtype),
                Place { file, .. } => files[*file].dtype(name),
            },
            Self::OfRanks(ranks) => ranks.dtype(name),
        }
    }
}

/// Finds the file of every tensor, and collects what differs from the configuration.
fn place(
    dir: &Path,
    config: &LlamaConfig,
    files: &[TensorFile],
    expected: &[(String, Vec<i64>)],
) -> Result<BTreeMap<String, Place>> {
    let mut problems = TensorProblems::default();
    let mut places = BTreeMap::new();
    let mut beside_codes = BTreeSet::new();
    for (name, shape) in expected {
        let found = files.iter().position(|file| file.entries().contains_key(name));
        let Some(number) = found else {
            problems.missing.push(name.clone());
            continue;
        };
        let file = &files[number];
        let mut nf4 = None;
        if file.entries().contains_key(&nf4::state_name(name)) {
            beside_codes.extend(nf4::beside(name));
            let weight = Nf4Weight::open(file, name)?;
            if weight.shape != *shape {
                let got = &weight.shape;
                problems.misshapen.push(format!("{name} (expected {shape:?}, got {got:?})"));
            }
            nf4 = Some(weight);
        } else {
            compare(name, shape, file.entry(name)?, &mut problems);
        }
        places.insert(name.clone(), Place { file: number, nf4 });
    }
    let known: BTreeSet<&String> = expected.iter().map(|(name, _)| name).collect();
    for (name, entry) in files.iter().flat_map(TensorFile::entries) {
        if known.contains(name) || beside_codes.contains(name) || is_derived(name) {
            continue;
        }
        if name == HEAD && config.tie_word_embeddings {
            compare(name, &[config.vocab_size, config.hidden_size], entry, &mut problems);
            tracing::warn!(
                "{}: {HEAD} is stored, but tie_word_embeddings says that the embedding is the \
                 head: it is not used",
                dir.display()
            );
            continue;
        }
        problems.unexpected.push(name.clone());
    }
    if problems.is_empty() {
        Ok(places)
    } else {
        Err(Error::WrongTensors { path: dir.to_path_buf(), problems })
    }
}

fn compare(name: &str, shape: &[i64], entry: &Entry, problems: &mut TensorProblems) {
    if entry.shape != shape {
        problems.misshapen.push(format!("{name} (expected {shape:?}, got {:?})", entry.shape));
    }
    if Dtype::of_safetensors(entry.dtype).is_none() {
        problems.wrong_dtype.push(format!("{name} ({})", entry.dtype));
    }
}
