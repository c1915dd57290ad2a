//! `model.safetensors.index.json`: which file holds which tensor.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::Path,
};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};

use super::file::TensorFile;
use crate::error::{Error, Result};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// As for headers: LLaMA-3.1-405B's index has 100 kB.
const MAX_INDEX: u64 = 16 << 20;

#[derive(serde::Deserialize)]
struct Index {
    weight_map: WeightMap,
}

/// Tensor name -> file name, each tensor once.
struct WeightMap(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct MapVisitor;
        impl<'de> Visitor<'de> for MapVisitor {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut all = BTreeMap::new();
                while let Some((tensor, file)) = map.next_entry::<String, String>()? {
                    if let Some(other) = all.insert(tensor.clone(), file) {
                        return Err(A::Error::custom(format!("{tensor} occurs twice ({other})")));
                    }
                }
                Ok(WeightMap(all))
            }
        }
        deserializer.deserialize_map(MapVisitor)
    }
}

/// Opens the files of a folder: the single one or, as the index says, several.
pub(super) fn open_files(dir: &Path) -> Result<Vec<TensorFile>> {
    let (single, index) = (dir.join(SINGLE), dir.join(INDEX));
    match (single.exists(), index.exists()) {
        (true, false) => Ok(vec![TensorFile::open(&single)?]),
        (false, true) => open_indexed(dir, &index),
        (true, true) => Err(Error::NoCheckpoint {
            path: dir.to_path_buf(),
            message: format!("there is a {SINGLE} and a {INDEX}: move one of them away"),
        }),
        (false, false) => Err(nothing_found(dir)),
    }
}

fn nothing_found(dir: &Path) -> Error {
    let pickles = fs::read_dir(dir).ok().into_iter().flatten().flatten().any(|entry| {
        let path = entry.path();
        path.extension().is_some_and(|extension| extension == "pth" || extension == "bin")
    });
    let hint = if pickles {
        "; `llama convert` makes one of consolidated.NN.pth, other pickle files are not read"
    } else {
        ""
    };
    Error::NoCheckpoint {
        path: dir.to_path_buf(),
        message: format!("no {SINGLE} and no {INDEX}{hint}"),
    }
}

fn open_indexed(dir: &Path, path: &Path) -> Result<Vec<TensorFile>> {
    let wrong = |message| Error::Index { path: path.to_path_buf(), message };
    let size = fs::metadata(path).map_err(Error::io(path))?.len();
    if size > MAX_INDEX {
        return Err(wrong(format!("an index of {size} bytes, the limit is {MAX_INDEX}")));
    }
    let bytes = fs::read(path).map_err(Error::io(path))?;
    let index: Index = serde_json::from_slice(&bytes)
        .map_err(|source| Error::Json { path: path.to_path_buf(), source })?;
    let WeightMap(map) = index.weight_map;

    let names: BTreeSet<&String> = map.values().collect();
    if let Some(name) = names.iter().find(|name| !is_plain(name)) {
        return Err(wrong(format!("{name} is not the name of a safetensors file in this folder")));
    }
    let mut files = BTreeMap::new();
    for name in names {
        files.insert(name.clone(), TensorFile::open(&dir.join(name))?);
    }
    for (tensor, file) in &map {
        if !files.get(file).is_some_and(|file| file.entries().contains_key(tensor)) {
            return Err(wrong(format!("{tensor} should be in {file}, but is not")));
        }
    }
    for (name, file) in &files {
        for tensor in file.entries().keys() {
            if map.get(tensor) != Some(name) {
                return Err(wrong(format!("{name} holds {tensor}, which the index does not say")));
            }
        }
    }
    Ok(files.into_values().collect())
}

/// No folder, no way up: an index must not make us read elsewhere.
fn is_plain(name: &str) -> bool {
    Path::new(name).file_name().is_some_and(|last| last == name) && name.ends_with(".safetensors")
}
