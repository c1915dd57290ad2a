//! A checkpoint that is stored as one file a rank of a tensor-parallel group.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use dromedary_files::Manifest;
use serde::{Deserialize, Serialize};
use tch::Tensor;

use super::{
    dtype::Dtype,
    file::{ReadCounters, TensorFile},
    pieces::{Piece, Pieces, Split},
    tensors::{shape_of, tensor_shapes},
};
use crate::{
    config::LlamaConfig,
    error::{Error, Result, TensorProblems},
    plan::{Plan, Shard},
};

/// The files of a folder that `llama shard` wrote. A file is opened, and its size compared with the
/// manifest's, when it is first needed: a node may hold those of its own ranks alone.
#[derive(Debug)]
pub(crate) struct RankFiles {
    dir: PathBuf,
    config: LlamaConfig,
    plan: Plan,
    manifest: Manifest,
    paths: Vec<PathBuf>,
    files: Vec<OnceLock<TensorFile>>,
    /// Ranks whose file has the manifest's hash.
    intact: Vec<OnceLock<()>>,
}

/// The content of [`RankFiles::INDEX`].
#[derive(Debug, Serialize, Deserialize)]
struct Index {
    tp: usize,
    files: Vec<String>,
}

impl RankFiles {
    /// The file that makes a folder one of rank files.
    pub(crate) const INDEX: &str = "shards.json";

    pub(crate) fn file_name(rank: usize, tp: usize) -> String {
        format!("rank-{rank:02}-of-{tp:02}.safetensors")
    }

    /// The text of the index of `tp` files.
    pub(crate) fn index(tp: usize) -> Vec<u8> {
        let names = (0..tp).map(|rank| Self::file_name(rank, tp));
        let index = Index { tp, files: names.collect() };
        let mut text = serde_json::to_vec_pretty(&index).unwrap_or_default();
        text.push(b'\n');
        text
    }

    /// Opens a folder, and compares its small files with the manifest.
    pub(super) fn open(dir: &Path, config: &LlamaConfig) -> Result<Self> {
        let path = dir.join(Self::INDEX);
        let manifest = Manifest::read(dir)?;
        for name in ["config.json", Self::INDEX] {
            verify(dir, &manifest, name)?;
        }
        let bytes = fs::read(&path).map_err(Error::io(&path))?;
        let index: Index = serde_json::from_slice(&bytes)
            .map_err(|source| Error::Json { path: path.clone(), source })?;
        let plan = Plan::new(config, index.tp)?;
        let names: Vec<_> = (0..index.tp).map(|rank| Self::file_name(rank, index.tp)).collect();
        if index.files != names {
            let message = format!("it names {:?}, expected {names:?}", index.files);
            return Err(Error::Index { path, message });
        }
        Ok(Self {
            dir: dir.to_path_buf(),
            config: config.clone(),
            plan,
            manifest,
            paths: names.iter().map(|name| dir.join(name)).collect(),
            files: names.iter().map(|_| OnceLock::new()).collect(),
            intact: names.iter().map(|_| OnceLock::new()).collect(),
        })
    }

    /// Ranks that the checkpoint was cut for.
    pub(super) fn tp(&self) -> usize {
        self.plan.tp()
    }

    /// Reads a rank's whole file and compares its hash, the first time.
    pub(super) fn verify_rank(&self, rank: usize) -> Result<()> {
        if self.intact[rank].get().is_none() {
            verify(&self.dir, &self.manifest, &Self::file_name(rank, self.tp()))?;
            let _ = self.intact[rank].set(());
        }
        self.file(rank).map(|_| ())
    }

    /// The file of a rank.
    pub(super) fn file(&self, rank: usize) -> Result<&TensorFile> {
        if let Some(file) = self.files[rank].get() {
            return Ok(file);
        }
        let name = Self::file_name(rank, self.tp());
        let path = self.dir.join(&name);
        let file = TensorFile::open(&path)?;
        let entry = self.manifest.files.get(&name).ok_or_else(|| unlisted(path.clone()))?;
        if entry.size != file.size() {
            let message = format!("expected {} bytes, got {}", entry.size, file.size());
            return Err(dromedary_files::Error::Damaged { path, message }.into());
        }
        self.check_shapes(rank, &file, path)?;
        Ok(self.files[rank].get_or_init(|| file))
    }

    fn check_shapes(&self, rank: usize, file: &TensorFile, path: PathBuf) -> Result<()> {
        let mut problems = TensorProblems::default();
        let all = tensor_shapes(&self.config);
        for (name, shape) in &all {
            let expected = self.plan.rank(rank).shard(name).local_shape(shape);
            match file.entries().get(name) {
                None => problems.missing.push(name.clone()),
                Some(entry) if entry.shape != expected => {
                    let got = &entry.shape;
                    problems.misshapen.push(format!("{name} (expected {expected:?}, got {got:?})"));
                }
                Some(_) => {}
            }
        }
        let known = |name: &String| all.iter().any(|(other, _)| other == name);
        problems.unexpected.extend(file.entries().keys().filter(|name| !known(name)).cloned());
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::WrongTensors { path, problems }),
        }
    }

    /// A slice as the plan of these ranks cuts it: one tensor of one file, or of several where it is the
    /// slice of another number of ranks.
    pub(super) fn read_slice(&self, name: &str, shard: &Shard) -> Result<Tensor> {
        let holder = match shard {
            // Everyone has it: the file that is open is the reader's own.
            Shard::Replicated => {
                self.files.iter().position(|file| file.get().is_some()).or(Some(0))
            }
            shard => (0..self.tp()).find(|rank| self.plan.rank(*rank).shard(name) == *shard),
        };
        let full = shape_of(&self.config, name);
        match holder {
            Some(rank) if self.plan.rank(rank).shard(name) == *shard => {
                let rows = shard.local_shape(&full)[0];
                self.file(rank)?.read_rows(name, 0..rows)
            }
            _ => {
                let columns = full.get(1).copied().unwrap_or(1);
                let (rows, columns) = match shard {
                    Shard::Replicated => (0..full[0], 0..columns),
                    Shard::Rows(slice) => (slice.range(), 0..columns),
                    Shard::Columns(slice) => (0..full[0], slice.range()),
                };
                self.pieces(name).read(&|rank| self.file(rank), rows, columns)
            }
        }
    }

    /// How the files make the whole tensor: each part from the rank that owns it.
    pub(super) fn pieces(&self, name: &str) -> Pieces {
        let mut split = Split::Replicated;
        let mut parts = Vec::new();
        for rank in 0..self.tp() {
            let held = self.plan.rank(rank).shard(name);
            let range = match (self.plan.owned(rank, name), held) {
                (Some(Shard::Rows(owned)), Shard::Rows(held)) => {
                    split = Split::Rows;
                    let shift = held.range().start;
                    owned.range().start - shift..owned.range().end - shift
                }
                (Some(Shard::Columns(owned)), _) => {
                    split = Split::Columns;
                    0..owned.range().end - owned.range().start
                }
                (Some(_), _) => 0..shape_of(&self.config, name)[0],
                (None, _) => continue,
            };
            parts.push(Piece { file: rank, name: name.to_owned(), range });
        }
        Pieces { split, parts }
    }

    pub(super) fn counters(&self) -> ReadCounters {
        let opened = self.files.iter().filter_map(OnceLock::get);
        opened.map(TensorFile::counters).fold(ReadCounters::default(), ReadCounters::plus)
    }

    /// Bytes of all files, by the manifest.
    pub(super) fn bytes_stored(&self) -> u64 {
        let size = |rank| self.manifest.files.get(&Self::file_name(rank, self.tp()));
        (0..self.tp()).filter_map(size).map(|entry| entry.size).sum()
    }

    pub(super) fn paths(&self) -> &[PathBuf] {
        &self.paths
    }

    /// The data type of a tensor, by a file that can be opened.
    pub(super) fn dtype(&self, name: &str) -> Result<Dtype> {
        self.file(self.any_rank())?.dtype(name)
    }

    /// A rank whose file can be opened: one that was compared with its hash before others.
    fn any_rank(&self) -> usize {
        let ranks = || 0..self.tp();
        ranks()
            .find(|rank| self.intact[*rank].get().is_some())
            .or_else(|| ranks().find(|rank| self.files[*rank].get().is_some()))
            .or_else(|| ranks().find(|rank| self.paths[*rank].exists()))
            .unwrap_or(0)
    }

    /// The hashes of all files: the same on every rank, whichever files it has.
    pub(super) fn hashes(&self) -> impl Iterator<Item = &str> {
        self.manifest.files.values().map(|entry| entry.blake3.as_str())
    }
}

/// Compares one file with the manifest.
fn verify(dir: &Path, manifest: &Manifest, name: &str) -> Result<()> {
    let entry = manifest.files.get(name).ok_or_else(|| unlisted(dir.join(name)))?;
    let alone = Manifest { files: [(name.to_owned(), entry.clone())].into() };
    Ok(alone.verify(dir)?)
}

fn unlisted(path: PathBuf) -> Error {
    let message = "the manifest does not list it".into();
    dromedary_files::Error::Damaged { path, message }.into()
}
