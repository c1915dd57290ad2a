//! The two containers of PyTorch's files: zip archives since version 1.6, and the stream of pickles and
//! storages before that. Both give the pickle of the tensors, and where each storage lies in the file.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

use zip::{CompressionMethod, ZipArchive, result::ZipError};

use super::pickle::{Pickle, Value};
use crate::checkpoint::header::MAX_TENSORS;

/// Bytes of a pickle, and of what is read of an archive's directory. LLaMA-3.1-405B's need 300 kB.
const MAX_PICKLE: u64 = 16 << 20;
/// The number in the first pickle of the old format, little-endian, and the one in the second.
const OLD_MAGIC: &[u8] = &[0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
const OLD_VERSION: i64 = 1001;

/// Where the bytes of a storage are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Place {
    pub(super) begin: u64,
    pub(super) len: u64,
}

/// An opened container.
#[derive(Debug)]
pub(super) struct Container {
    /// Bytes that begin with the pickle of the tensors.
    pub(super) pickle: Vec<u8>,
    /// By the storage's key.
    pub(super) storages: BTreeMap<String, Place>,
}

/// Opens a file of `size` bytes in either format.
pub(super) fn open(file: &File, size: u64) -> Result<Container, String> {
    let mut magic = [0; 4];
    let len = magic.len().min(size as usize);
    file.read_exact_at(&mut magic[..len], 0).map_err(|error| error.to_string())?;
    match &magic {
        b"PK\x03\x04" => open_archive(file, size),
        _ => open_stream(file, size),
    }
}

// ---- the zip archive ----

/// A file of whose bytes only so many are read: an archive's directory is as long as it says itself.
struct Limited<'a> {
    file: &'a File,
    at: u64,
    size: u64,
    left: u64,
}

impl Read for Limited<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read_at(buffer, self.at)?;
        self.left = self.left.checked_sub(len as u64).ok_or_else(|| {
            io::Error::other(format!("its directory has more than {MAX_PICKLE} bytes"))
        })?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Limited<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.size.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        Ok(self.at)
    }
}

fn open_archive(file: &File, size: u64) -> Result<Container, String> {
    let reader = Limited { file, at: 0, size, left: 2 * MAX_PICKLE };
    let mut archive = ZipArchive::new(reader).map_err(damaged)?;
    if archive.len() > 2 * MAX_TENSORS {
        return Err(format!("its archive has {} members", archive.len()));
    }
    let mut members = BTreeMap::new();
    for index in 0..archive.len() {
        let member = archive.by_index_raw(index).map_err(damaged)?;
        let name = member.name().to_owned();
        if member.enclosed_name().is_none() || name.starts_with('/') || name.contains('\\') {
            return Err(format!("its member {name:?} leads out of the archive"));
        }
        let (stored, packed) = (member.size(), member.compressed_size());
        if member.compression() != CompressionMethod::Stored || member.encrypted() {
            return Err(format!("its member {name} is compressed or encrypted, torch stores"));
        }
        let begin = member.data_start().ok_or_else(|| format!("its member {name} has no data"))?;
        let ends_inside = begin.checked_add(stored).is_some_and(|end| end <= size);
        if stored != packed || !ends_inside {
            return Err(format!(
                "its member {name} should have {stored} bytes from {begin} on, stored in {packed}, \
                 but the file has {size}"
            ));
        }
        members.insert(name, (index, Place { begin, len: stored }));
    }
    refuse_overlaps(&members)?;
    let (root, pickle) = main_pickle(&members)?;
    if pickle.1.len > MAX_PICKLE {
        return Err(format!("a pickle of {} bytes, the limit is {MAX_PICKLE}", pickle.1.len));
    }
    let pickle = read_member(&mut archive, pickle.0)?;
    if let Some((index, _)) = members.get(&format!("{root}/byteorder")) {
        let order = read_member(&mut archive, *index)?;
        if order != b"little" {
            return Err(format!("its byte order is {}", String::from_utf8_lossy(&order)));
        }
    }
    let prefix = format!("{root}/data/");
    let storages = members
        .iter()
        .filter_map(|(name, (_, place))| Some((name.strip_prefix(&prefix)?.to_owned(), *place)))
        .collect();
    Ok(Container { pickle, storages })
}

fn damaged(error: ZipError) -> String {
    format!("its archive is damaged or cut off: {error}")
}

/// A short archive whose members share bytes could hold any number of storages.
fn refuse_overlaps(members: &BTreeMap<String, (usize, Place)>) -> Result<(), String> {
    let mut places: Vec<_> = members.iter().map(|(name, (_, place))| (place, name)).collect();
    places.sort_by_key(|(place, _)| (place.begin, place.len));
    for pair in places.windows(2) {
        if pair[0].0.begin + pair[0].0.len > pair[1].0.begin {
            return Err(format!("its members {} and {} overlap", pair[0].1, pair[1].1));
        }
    }
    Ok(())
}

/// The one member `ROOT/data.pkl`, and its root.
fn main_pickle(
    members: &BTreeMap<String, (usize, Place)>,
) -> Result<(&str, (usize, Place)), String> {
    let mut found = members.iter().filter_map(|(name, member)| {
        let root = name.strip_suffix("/data.pkl")?;
        (!root.contains('/')).then_some((root, *member))
    });
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (None, _) => Err("its archive has no data.pkl".into()),
        (Some(_), Some(_)) => Err("its archive has several data.pkl".into()),
    }
}

/// A small member; its checksum is compared.
fn read_member(archive: &mut ZipArchive<Limited<'_>>, index: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let member = archive.by_index(index).map_err(damaged)?;
    member
        .take(MAX_PICKLE)
        .read_to_end(&mut bytes)
        .map_err(|error| format!("its archive is damaged: {error}"))?;
    Ok(bytes)
}

// ---- the stream ----

/// Five pickles: a magic number, a version, facts about the machine, the tensors, the keys of the
/// storages; then each storage as its length and its elements.
fn open_stream(file: &File, size: u64) -> Result<Container, String> {
    let mut bytes = vec![0; size.min(MAX_PICKLE) as usize];
    file.read_exact_at(&mut bytes, 0).map_err(|error| error.to_string())?;
    let magic = Pickle::run(&bytes)
        .map_err(|_| "it is neither a zip archive nor of the older format".to_owned())?;
    if magic.root() != Value::Long(OLD_MAGIC) {
        return Err("it is neither a zip archive nor of the older format".into());
    }
    let version = Pickle::run(&bytes[magic.len..])?;
    if version.root() != Value::Int(OLD_VERSION) {
        return Err(format!("its version is {:?}, not {OLD_VERSION}", version.root()));
    }
    let machine_at = magic.len + version.len;
    let machine = Pickle::run(&bytes[machine_at..])?;
    let little_endian = (Value::Text("little_endian"), Value::Bool(true));
    if !machine.dict().is_some_and(|facts| facts.contains(&little_endian)) {
        return Err("it does not say that its bytes are in little-endian order".into());
    }
    let tensors_at = machine_at + machine.len;
    let tensors = Pickle::run(&bytes[tensors_at..])?;
    let keys_at = tensors_at + tensors.len;
    let keys = Pickle::run(&bytes[keys_at..])?;
    let storages = places(file, size, (keys_at + keys.len) as u64, &tensors, &keys)?;
    bytes.truncate(keys_at);
    bytes.drain(..tensors_at);
    Ok(Container { pickle: bytes, storages })
}

/// Where each storage is, the first at `at`.
fn places(
    file: &File,
    size: u64,
    mut at: u64,
    tensors: &Pickle<'_>,
    keys: &Pickle<'_>,
) -> Result<BTreeMap<String, Place>, String> {
    let storages: BTreeMap<_, _> = tensors.storages().iter().map(|s| (s.key, s)).collect();
    let mut places = BTreeMap::new();
    for key in keys.list().ok_or("it does not list its storages")? {
        let Value::Text(key) = key else { return Err(format!("a storage with the key {key:?}")) };
        let storage = storages.get(key).ok_or_else(|| format!("no tensor uses storage {key}"))?;
        let mut len = [0; 8];
        file.read_exact_at(&mut len, at).map_err(|_| format!("it ends before storage {key}"))?;
        let elements = u64::from_le_bytes(len);
        let bytes = elements.checked_mul(storage.dtype.bitsize() as u64 / 8);
        let end = bytes.and_then(|bytes| (at + 8).checked_add(bytes));
        let (Some(len), Some(end)) = (bytes, end.filter(|end| *end <= size)) else {
            return Err(format!(
                "storage {key} should have {elements} elements from byte {} on, but the file has \
                 {size} bytes",
                at + 8
            ));
        };
        if places.insert((*key).to_owned(), Place { begin: at + 8, len }).is_some() {
            return Err(format!("storage {key} is listed twice"));
        }
        at = end;
    }
    match at == size {
        true => Ok(places),
        false => Err(format!("{} bytes follow the last storage", size - at)),
    }
}
