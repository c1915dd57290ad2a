//! The header of a safetensors file: parsed by the `safetensors` crate, after a look of our own at
//! what that crate lets pass (duplicate names, of which it takes the last) and at what makes it
//! allocate many times the header's size (long shapes, many tensors).

use std::{collections::BTreeSet, fmt, fs::File, os::unix::fs::FileExt, path::Path};

use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserialize, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use crate::error::{Error, Result};

/// The format allows 100 MB. LLaMA-3.1-405B's files have headers below 200 kB; parsing takes
/// several times the header's size in memory, which a hostile file should not choose.
const MAX_HEADER: u64 = 16 << 20;
/// Tensors of one file; LLaMA-3.1-405B has 1138.
pub(super) const MAX_TENSORS: usize = 1 << 16;
const MAX_NAME: usize = 512;
const MAX_DIMS: usize = 8;

/// The length of the length of the header.
const PREFIX: u64 = 8;

pub(super) struct Header {
    /// Where the tensors' bytes begin in the file.
    pub(super) data_start: u64,
    pub(super) metadata: Metadata,
    /// Hash of the header's bytes.
    pub(super) hash: blake3::Hash,
}

/// Reads and checks the header of a file of `size` bytes.
pub(super) fn read(file: &File, size: u64, path: &Path) -> Result<Header> {
    let invalid = |message: String| Error::Header { path: path.to_path_buf(), message };
    if size < PREFIX {
        return Err(invalid(format!("{size} bytes are too few for a header")));
    }
    let mut prefix = [0; PREFIX as usize];
    file.read_exact_at(&mut prefix, 0).map_err(Error::io(path))?;
    let len = u64::from_le_bytes(prefix);
    if len > MAX_HEADER {
        return Err(invalid(format!("a header of {len} bytes, the limit is {MAX_HEADER}")));
    }
    if len > size - PREFIX {
        return Err(Error::Truncated {
            path: path.to_path_buf(),
            expected: len + PREFIX,
            got: size,
        });
    }
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, PREFIX).map_err(Error::io(path))?;
    let metadata = parse(&bytes).map_err(invalid)?;
    let data_start = PREFIX + len;
    let expected = data_start
        .checked_add(metadata.data_len() as u64)
        .ok_or_else(|| invalid("offsets beyond 2^64".into()))?;
    if size < expected {
        return Err(Error::Truncated { path: path.to_path_buf(), expected, got: size });
    }
    if size > expected {
        return Err(invalid(format!("{} bytes follow the last tensor", size - expected)));
    }
    Ok(Header { data_start, metadata, hash: blake3::hash(&bytes) })
}

fn parse(bytes: &[u8]) -> Result<Metadata, String> {
    if bytes.first() != Some(&b'{') {
        return Err("the header does not begin with {".into());
    }
    let text = std::str::from_utf8(bytes).map_err(|e| format!("the header is not UTF-8: {e}"))?;
    serde_json::from_str::<Outline>(text).map_err(|e| format!("header: {e}"))?;
    serde_json::from_str::<Metadata>(text).map_err(|e| format!("header: {e}"))
}

/// Accepts what may go on to the `safetensors` crate, and keeps nothing.
struct Outline;

impl<'de> Deserialize<'de> for Outline {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(OutlineVisitor)
    }
}

struct OutlineVisitor;

impl<'de> Visitor<'de> for OutlineVisitor {
    type Value = Outline;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a map of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Outline, A::Error> {
        let mut names = BTreeSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if name.len() > MAX_NAME {
                return Err(A::Error::custom(format!("a name of {} bytes", name.len())));
            }
            if name == "__metadata__" {
                map.next_value::<TextMap>()?;
            } else {
                map.next_value::<TensorOutline>()
                    .map_err(|e| A::Error::custom(format!("tensor {name}: {e}")))?;
            }
            if names.contains(&name) {
                return Err(A::Error::custom(format!("the name {name} occurs twice")));
            }
            names.insert(name);
            if names.len() > MAX_TENSORS {
                return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            }
        }
        Ok(Outline)
    }
}

/// `__metadata__`: texts by name, each name once.
struct TextMap;

impl<'de> Deserialize<'de> for TextMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextMapVisitor;
        impl<'de> Visitor<'de> for TextMapVisitor {
            type Value = TextMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<TextMap, A::Error> {
                let mut names = BTreeSet::new();
                while let Some((name, _)) = map.next_entry::<String, String>()? {
                    if names.contains(&name) {
                        return Err(A::Error::custom(format!("metadata {name} occurs twice")));
                    }
                    names.insert(name);
                    if names.len() > MAX_TENSORS {
                        return Err(A::Error::custom("too many metadata entries"));
                    }
                }
                Ok(TextMap)
            }
        }
        deserializer.deserialize_map(TextMapVisitor)
    }
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(dead_code, reason = "the fields are there to be checked")]
struct TensorOutline {
    dtype: IgnoredAny,
    shape: ShortShape,
    data_offsets: (u64, u64),
}

struct ShortShape;

impl<'de> Deserialize<'de> for ShortShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ShapeVisitor;
        impl<'de> Visitor<'de> for ShapeVisitor {
            type Value = ShortShape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a shape of at most {MAX_DIMS} dimensions")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<ShortShape, A::Error> {
                let mut dims = 0;
                while let Some(size) = seq.next_element::<u64>()? {
                    dims += 1;
                    if dims > MAX_DIMS {
                        return Err(A::Error::invalid_length(dims, &self));
                    }
                    if i64::try_from(size).is_err() {
                        return Err(A::Error::custom(format!("a dimension of {size}")));
                    }
                }
                Ok(ShortShape)
            }
        }
        deserializer.deserialize_seq(ShapeVisitor)
    }
}

/// The named tensors of a header, in the order of their bytes.
pub(super) fn entries(metadata: &Metadata) -> Vec<(String, TensorInfo)> {
    metadata
        .offset_keys()
        .into_iter()
        .filter_map(|name| {
            let info = metadata.info(&name)?.clone();
            Some((name, info))
        })
        .collect()
}
