use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The name of a folder's manifest.
pub const MANIFEST_NAME: &str = "manifest.json";

/// A manifest lists file names; one above this size is not ours.
const MAX_MANIFEST_BYTES: u64 = 64 << 20;

/// The files of a folder with their sizes and hashes: what makes a folder complete.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// From the path below the folder, with `/` between its parts, to the file's entry.
    pub files: BTreeMap<String, FileEntry>,
}

/// One file of a [`Manifest`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Bytes.
    pub size: u64,
    /// The BLAKE3 hash of the content in hexadecimal.
    pub blake3: String,
}

impl Manifest {
    /// Reads and hashes every file below `folder`, except the manifest itself.
    ///
    /// # Errors
    /// [`Error::Read`], naming the file.
    pub fn of_dir(folder: impl AsRef<Path>) -> Result<Manifest> {
        let mut manifest = Manifest::default();
        manifest.add_dir(folder.as_ref(), "")?;
        Ok(manifest)
    }

    fn add_dir(&mut self, folder: &Path, prefix: &str) -> Result<()> {
        for entry in fs::read_dir(folder).map_err(Error::read(folder))? {
            let entry = entry.map_err(Error::read(folder))?;
            let path = entry.path();
            let name = entry.file_name().into_string().map_err(|name| Error::Damaged {
                path: folder.join(name),
                message: "its name is not valid UTF-8".to_owned(),
            })?;
            let name = format!("{prefix}{name}");
            if path.is_dir() {
                self.add_dir(&path, &format!("{name}/"))?;
            } else if name != MANIFEST_NAME {
                let entry = FileEntry { size: size_of_file(&path)?, blake3: hash_file(&path)? };
                self.files.insert(name, entry);
            }
        }
        Ok(())
    }

    /// Reads `manifest.json` of a folder.
    ///
    /// # Errors
    /// [`Error::Read`] where there is none, [`Error::Damaged`] where it is no manifest or names
    /// files outside of the folder.
    pub fn read(folder: impl AsRef<Path>) -> Result<Manifest> {
        let path = folder.as_ref().join(MANIFEST_NAME);
        let damaged = |message: String| Error::Damaged { path: path.clone(), message };
        if size_of_file(&path)? > MAX_MANIFEST_BYTES {
            return Err(damaged("it is too large for a manifest".to_owned()));
        }
        let bytes = fs::read(&path).map_err(Error::read(&path))?;
        let manifest: Manifest =
            serde_json::from_slice(&bytes).map_err(|error| damaged(error.to_string()))?;
        match manifest.files.keys().find(|name| !stays_below(name)) {
            Some(name) => Err(damaged(format!("it names {name:?}, outside of its folder"))),
            None => Ok(manifest),
        }
    }

    /// Compares the files of a folder with this manifest: presence, size, hash. Files that the
    /// manifest does not name are not looked at.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming the first file that differs, [`Error::Read`] where one cannot be
    /// read.
    pub fn verify(&self, folder: impl AsRef<Path>) -> Result<()> {
        self.verify_sizes(&folder)?;
        for (name, entry) in &self.files {
            let path = folder.as_ref().join(name);
            let got = hash_file(&path)?;
            if got != entry.blake3 {
                let message = format!("expected the BLAKE3 hash {}, got {got}", entry.blake3);
                return Err(Error::Damaged { path, message });
            }
        }
        Ok(())
    }

    /// As [`verify`](Manifest::verify) without reading the files' content.
    ///
    /// # Errors
    /// [`Error::Damaged`] naming the first file that is missing or has another size.
    pub fn verify_sizes(&self, folder: impl AsRef<Path>) -> Result<()> {
        for (name, entry) in &self.files {
            let path = folder.as_ref().join(name);
            if !path.is_file() {
                return Err(Error::Damaged { path, message: "it is missing".to_owned() });
            }
            let got = size_of_file(&path)?;
            if got != entry.size {
                let message = format!("expected {} bytes, got {got}", entry.size);
                return Err(Error::Damaged { path, message });
            }
        }
        Ok(())
    }
}

fn size_of_file(path: &Path) -> Result<u64> {
    Ok(fs::metadata(path).map_err(Error::read(path))?.len())
}

fn stays_below(name: &str) -> bool {
    !name.is_empty()
        && Path::new(name).components().all(|part| matches!(part, Component::Normal(_)))
}

/// The BLAKE3 hash of a file's content in hexadecimal.
///
/// # Errors
/// [`Error::Read`].
pub fn hash_file(path: impl AsRef<Path>) -> Result<String> {
    let path = path.as_ref();
    let mut file = File::open(path).map_err(Error::read(path))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let len = file.read(&mut buffer).map_err(Error::read(path))?;
        if len == 0 {
            return Ok(hasher.finalize().to_hex().to_string());
        }
        hasher.update(&buffer[..len]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("sub")).unwrap();
        fs::write(folder.path().join("a.bin"), [1, 2, 3]).unwrap();
        fs::write(folder.path().join("sub/b.bin"), b"").unwrap();
        folder
    }

    #[test]
    fn lists_files_of_subfolders() {
        let folder = folder();
        fs::write(folder.path().join(MANIFEST_NAME), b"old").unwrap();
        let manifest = Manifest::of_dir(folder.path()).unwrap();
        assert_eq!(manifest.files.keys().collect::<Vec<_>>(), ["a.bin", "sub/b.bin"]);
        assert_eq!(manifest.files["a.bin"].size, 3);
        manifest.verify(folder.path()).unwrap();
    }

    #[test]
    fn the_hash_is_blake3() {
        let folder = folder();
        // The published value for the empty input.
        assert_eq!(
            hash_file(folder.path().join("sub/b.bin")).unwrap(),
            "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
        );
    }

    #[test]
    fn every_damage_names_the_file() {
        for (content, expected) in [
            (Some(&[1, 2][..]), "expected 3 bytes, got 2"),
            (Some(&[1, 2, 2]), "hash"),
            (Some(&[0, 0, 0]), "hash"),
            (None, "missing"),
        ] {
            let folder = folder();
            let file = folder.path().join("a.bin");
            let manifest = Manifest::of_dir(folder.path()).unwrap();
            match content {
                Some(content) => fs::write(file, content).unwrap(),
                None => fs::remove_file(file).unwrap(),
            }
            let error = manifest.verify(folder.path()).unwrap_err().to_string();
            assert!(error.contains("a.bin") && error.contains(expected), "{error}");
        }
    }

    #[test]
    fn hostile_manifests_are_refused() {
        let deep = "[".repeat(100_000);
        for text in [
            r#"{"files": {"../x": {"size": 0, "blake3": ""}}}"#,
            r#"{"files": {"/etc/passwd": {"size": 0, "blake3": ""}}}"#,
            r#"{"files": {"": {"size": 0, "blake3": ""}}}"#,
            r#"{"files": {"x": {"size": -1, "blake3": ""}}}"#,
            "{}",
            "",
            &deep,
        ] {
            let folder = folder();
            fs::write(folder.path().join(MANIFEST_NAME), text).unwrap();
            let error = Manifest::read(folder.path()).unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{error}");
            assert!(error.to_string().contains(MANIFEST_NAME));
        }
    }

    #[test]
    fn a_folder_without_manifest_is_an_error() {
        let folder = folder();
        let error = Manifest::read(folder.path()).unwrap_err();
        assert!(matches!(error, Error::Read { .. }), "{error}");
    }
}
