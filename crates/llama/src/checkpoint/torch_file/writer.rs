//! Writing a file that `torch.load` reads, with `weights_only` too, tensor by tensor: a zip archive of
//! stored members, the pickle first.

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
};

use tch::Tensor;
use zip::{
    CompressionMethod, ZipWriter,
    result::ZipError,
    write::{SimpleFileOptions, StreamWriter},
};

use crate::{
    checkpoint::{
        Dtype,
        output::{Awaited, HashedFile, TensorSpec, Written},
    },
    error::{Error, Result},
};

/// The folder inside of the archive.
const ROOT: &str = "archive";
/// What PyTorch aligns storages to, so that a program may map them.
const ALIGNMENT: u16 = 64;

/// A PyTorch file that is being written.
#[derive(Debug)]
pub(crate) struct TorchWriter {
    path: PathBuf,
    archive: ZipWriter<StreamWriter<Sink>>,
    awaited: Awaited,
    /// Storages that have been begun.
    begun: usize,
}

impl TorchWriter {
    /// Creates `name` in the temporary folder `dir` and writes the pickle; errors name the file as it
    /// will be called in `target`.
    pub(crate) fn create(
        dir: &Path,
        target: &Path,
        name: &str,
        tensors: Vec<TensorSpec>,
    ) -> Result<Self> {
        let path = target.join(name);
        let file = HashedFile::create(&dir.join(name), &path)?;
        let archive = ZipWriter::new_stream(Sink { file, failed: false });
        let pickle = pickle(&tensors);
        let awaited = Awaited::new(&path, tensors);
        let mut writer = Self { path, archive, awaited, begun: 0 };
        writer.member("data.pkl")?;
        writer.put(&pickle)?;
        // What torch.save writes beside it: the byte order of the storages and the format's version.
        writer.member("byteorder")?;
        writer.put(b"little")?;
        writer.member("version")?;
        writer.put(b"3\n")?;
        Ok(writer)
    }

    /// Appends rows of the first tensor that is not complete, which must be `name`.
    pub(crate) fn append(&mut self, name: &str, rows: &Tensor) -> Result<()> {
        self.begin_storages()?;
        let (awaited, archive, path) = (&mut self.awaited, &mut self.archive, &self.path);
        awaited.accept(name, rows, |bytes| archive.write_all(bytes).map_err(Error::io(path)))
    }

    /// Ends the file; who publishes its folder makes it durable.
    pub(crate) fn finish(mut self) -> Result<Written> {
        self.begin_storages()?;
        self.awaited.finish()?;
        let path = self.path.clone();
        let sink = self.archive.finish().map_err(|error| failed(&path, error))?;
        sink.into_inner().file.finish(&path)
    }

    /// Begins the member of the awaited tensor, and those of the tensors without elements before it.
    fn begin_storages(&mut self) -> Result<()> {
        let wanted = self.awaited.begun();
        while self.begun < wanted {
            self.member(&format!("data/{}", self.begun))?;
            self.begun += 1;
        }
        Ok(())
    }

    fn member(&mut self, name: &str) -> Result<()> {
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .last_modified_time(zip::DateTime::default())
            .large_file(true)
            .with_alignment(ALIGNMENT);
        let started = self.archive.start_file(format!("{ROOT}/{name}"), options);
        started.map_err(|error| failed(&self.path, error))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.archive.write_all(bytes).map_err(Error::io(&self.path))
    }
}

fn failed(path: &Path, error: ZipError) -> Error {
    match error {
        ZipError::Io(source) => Error::Io { path: path.to_path_buf(), source },
        other => Error::Write { path: path.to_path_buf(), message: other.to_string() },
    }
}

/// Takes everything once a write has failed: a dropped `ZipWriter` goes on to write its directory, and
/// would print that it cannot.
#[derive(Debug)]
struct Sink {
    file: HashedFile,
    failed: bool,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.failed {
            return Ok(bytes.len());
        }
        let written = self.file.write_all(bytes);
        self.failed = written.is_err();
        written.map(|()| bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The pickle of `{name: tensor}` in protocol 2, each tensor with a storage of its own, numbered.
fn pickle(tensors: &[TensorSpec]) -> Vec<u8> {
    let mut out = b"\x80\x02}(".to_vec();
    for (number, tensor) in tensors.iter().enumerate() {
        text(&mut out, &tensor.name);
        out.extend_from_slice(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut out, "storage");
        out.extend_from_slice(match tensor.dtype {
            Dtype::F32 => b"ctorch\nFloatStorage\n",
            Dtype::F16 => b"ctorch\nHalfStorage\n",
            Dtype::Bf16 => b"ctorch\nBFloat16Storage\n",
            Dtype::U8 => b"ctorch\nByteStorage\n",
        });
        text(&mut out, &number.to_string());
        text(&mut out, "cpu");
        integer(&mut out, tensor.shape.iter().product());
        out.extend_from_slice(b"tQK\x00(");
        tensor.shape.iter().for_each(|size| integer(&mut out, *size));
        out.extend_from_slice(b"t(");
        for dim in 1..=tensor.shape.len() {
            integer(&mut out, tensor.shape[dim..].iter().product());
        }
        out.extend_from_slice(b"t\x89ccollections\nOrderedDict\n)RtR");
    }
    out.extend_from_slice(b"u.");
    out
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend_from_slice(&(text.len() as u32).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

fn integer(out: &mut Vec<u8>, value: i64) {
    match i32::try_from(value) {
        Ok(value) => {
            out.push(b'J');
            out.extend_from_slice(&value.to_le_bytes());
        }
        Err(_) => {
            out.extend_from_slice(&[0x8a, 8]);
            out.extend_from_slice(&value.to_le_bytes());
        }
    }
}
