//! Files of `torch.save` (`consolidated.00.pth`): what tensors they hold, and where.

mod container;
mod pickle;
mod writer;

use std::{collections::BTreeMap, fs::File, path::Path};

use container::{Container, Place};
use pickle::{Pickle, Storage, View};
pub(crate) use writer::TorchWriter;

use super::{file::Entry, header::MAX_TENSORS};
use crate::error::{Error, Result};

/// The tensors of a file, and a hash of their descriptions.
pub(super) struct Tensors {
    pub(super) entries: BTreeMap<String, Entry>,
    pub(super) hash: blake3::Hash,
}

/// Reads what the file of `size` bytes says of its tensors; none of their elements.
pub(super) fn read(file: &File, size: u64, path: &Path) -> Result<Tensors> {
    let invalid = |message| Error::TorchFile { path: path.to_path_buf(), message };
    let container = container::open(file, size).map_err(invalid)?;
    let hash = blake3::hash(&container.pickle);
    let entries = entries(&container).map_err(invalid)?;
    Ok(Tensors { entries, hash })
}

fn entries(container: &Container) -> Result<BTreeMap<String, Entry>, String> {
    let pickle = Pickle::run(&container.pickle)?;
    let tensors = pickle.tensors()?;
    if tensors.len() > MAX_TENSORS {
        return Err(format!("more than {MAX_TENSORS} tensors"));
    }
    let mut entries = BTreeMap::new();
    for (name, view) in tensors {
        let storage = &pickle.storages()[view.storage];
        let place = container
            .storages
            .get(storage.key)
            .ok_or_else(|| format!("{name}: storage {:?} is not in the file", storage.key))?;
        let entry = entry(view, storage, *place).map_err(|why| format!("{name}: {why}"))?;
        if entries.insert(name.to_owned(), entry).is_some() {
            return Err(format!("the name {name} occurs twice"));
        }
    }
    Ok(entries)
}

/// Where a tensor's elements lie. Its rows must be runs of neighbours, but may be parts of longer ones:
/// `torch.save` keeps a slice of columns as a view of the whole matrix.
fn entry(view: &View, storage: &Storage<'_>, place: Place) -> Result<Entry, String> {
    let element = storage.dtype.bitsize() as u64 / 8;
    if storage.len.checked_mul(element) != Some(place.len) {
        return Err(format!(
            "storage {} should hold {} {}, but has {} bytes",
            storage.key, storage.len, storage.dtype, place.len
        ));
    }
    // Zeros count as ones at first: a product of the other sizes must not overflow anywhere else.
    let product = |product: i64, size: &i64| product.checked_mul((*size).max(1));
    let elements = view.shape.iter().try_fold(1_i64, product);
    let elements = elements.ok_or_else(|| format!("its shape {:?} is too large", view.shape))?;
    let elements = if view.shape.contains(&0) { 0 } else { elements };
    let entry = Entry {
        dtype: storage.dtype,
        shape: view.shape.to_vec(),
        begin: place.begin,
        len: elements as u64 * element,
        pitch: 0,
    };
    if elements == 0 {
        return Ok(entry);
    }
    let (row, pitch) = row_and_pitch(view)?;
    let last = (view.shape.first().map_or(0, |rows| rows - 1)).checked_mul(pitch);
    let end = last.and_then(|last| last.checked_add(row)?.checked_add_unsigned(view.offset));
    if end.is_none_or(|end| end as u64 > storage.len) {
        return Err(format!(
            "it needs more than storage {} has: {} elements, offset {}, shape {:?}, strides {:?}",
            storage.key, storage.len, view.offset, view.shape, view.strides
        ));
    }
    let begin = place.begin + view.offset * element;
    Ok(Entry { begin, pitch: pitch as u64 * element, ..entry })
}

/// Elements of a row, and from its first to the next one's; of a tensor that has elements.
fn row_and_pitch(view: &View) -> Result<(i64, i64), String> {
    let laid_out =
        |how: &str| format!("its rows {how}: shape {:?}, strides {:?}", view.shape, view.strides);
    let mut row = 1;
    for (size, stride) in view.shape.iter().zip(&*view.strides).skip(1).rev() {
        if *size > 1 && *stride != row {
            return Err(laid_out("are not runs of neighbours"));
        }
        row *= size;
    }
    match (view.shape.first(), view.strides.first()) {
        (Some(2..), Some(pitch)) if *pitch < row => Err(laid_out("overlap")),
        (Some(2..), Some(pitch)) => Ok((row, *pitch)),
        _ => Ok((row, row)),
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use safetensors::Dtype;
    use tch::Tensor;

    use crate::checkpoint::{TensorFile, TensorSpec, TorchWriter};

    fn data(name: &str) -> PathBuf {
        [env!("CARGO_MANIFEST_DIR"), "tests", "data", "torch", name].iter().collect()
    }

    fn expected() -> Vec<(String, Tensor)> {
        Tensor::read_safetensors(data("expected.safetensors")).unwrap()
    }

    /// Every tensor of a file has the values that PyTorch says.
    fn assert_equal(file: &TensorFile, prefix: &str) {
        let mut compared = 0;
        for (name, want) in expected() {
            let name = match (name.strip_prefix("state."), prefix) {
                (Some(name), "state.") => name,
                (None, "") => &name,
                _ => continue,
            };
            let entry = file.entry(name).unwrap();
            assert_eq!(entry.shape, want.size(), "{name}");
            compared += 1;
            if !matches!(entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
                continue;
            }
            let rows = want.size()[0];
            let got = file.read_rows(name, 0..rows).unwrap();
            assert!(got.kind() == want.kind() && got == want, "{name}: {got} for {want}");
            if let &[rows, columns] = want.size().as_slice()
                && rows > 1
            {
                let got = file.read_block(name, 1..rows, 1..columns).unwrap();
                assert_eq!(got, want.narrow(0, 1, rows - 1).narrow(1, 1, columns - 1), "{name}");
            }
        }
        assert_eq!(file.entries().len(), compared);
    }

    #[test]
    fn files_of_two_versions_in_every_form_are_read_equal() {
        for version in ["1.13", "2.13"] {
            for form in ["protocol2", "protocol3", "protocol4", "protocol5", "legacy"] {
                let path = data(&format!("torch{version}-{form}.pth"));
                let file = TensorFile::open_torch(&path).unwrap();
                assert_equal(&file, "");
                assert_eq!(file.entry("scalar").unwrap().dtype, Dtype::I64);
                assert_eq!(file.entry("double").unwrap().dtype, Dtype::F64);
                assert_eq!(file.entry("mask").unwrap().dtype, Dtype::BOOL);
            }
            let path = data(&format!("torch{version}-state-dict.pth"));
            assert_equal(&TensorFile::open_torch(&path).unwrap(), "state.");
        }
    }

    #[test]
    fn a_turned_matrix_is_refused_by_name() {
        for version in ["1.13", "2.13"] {
            let path = data(&format!("torch{version}-turned.pth"));
            let text = TensorFile::open_torch(&path).unwrap_err().to_string();
            assert!(text.contains("turned") && text.contains("strides [1, 6]"), "{text}");
        }
    }

    #[test]
    fn what_is_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let floats: Vec<_> = expected()
            .into_iter()
            .filter(|(_, tensor)| crate::Dtype::of_kind(tensor.kind()).is_some())
            .collect();
        let spec = |(name, tensor): &(String, Tensor)| TensorSpec {
            name: name.clone(),
            dtype: crate::Dtype::of_kind(tensor.kind()).unwrap(),
            shape: tensor.size(),
        };
        let specs = floats.iter().map(spec).collect();
        let mut writer = TorchWriter::create(dir.path(), dir.path(), "a.pth", specs).unwrap();
        for (name, tensor) in floats.iter().filter(|(_, tensor)| tensor.numel() > 0) {
            let first = tensor.narrow(0, 0, 1);
            writer.append(name, &first).unwrap();
            if tensor.size()[0] > 1 {
                writer.append(name, &tensor.narrow(0, 1, tensor.size()[0] - 1)).unwrap();
            }
        }
        let written = writer.finish().unwrap();
        let path = dir.path().join("a.pth");
        assert_eq!(written.size, path.metadata().unwrap().len());
        assert_eq!(written.blake3, dromedary_files::hash_file(&path).unwrap());
        let file = TensorFile::open_torch(&path).unwrap();
        for (name, tensor) in &floats {
            assert_eq!(file.read_rows(name, 0..tensor.size()[0]).unwrap(), *tensor, "{name}");
        }
    }
}
